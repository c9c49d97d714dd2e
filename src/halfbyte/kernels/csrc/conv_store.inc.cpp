// From sums of positions by channels to a tensor whose channels come first.
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hb {
namespace HB_NS {
namespace {

// Asks for pages of 2 MiB where a result is to be written: fresh memory of that size, page by page, costs as much time
// as the products. No promise, and no harm where the system does not know it.
inline void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const auto page = static_cast<uintptr_t>(4096), from = reinterpret_cast<uintptr_t>(memory);
    if (bytes < int64_t{4} << 20) return;
    const uintptr_t begin = (from + page - 1) / page * page, end = (from + static_cast<uintptr_t>(bytes)) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct Output {
    int32_t* sums;
    int64_t* wide;
    const float* scale;
};

#if defined(HB_AVX512VNNI)

// 16 rows of 16 32-bit numbers to 16 columns.
HB_INLINE void transpose_numbers(const int32_t* from, int64_t row, const float* scale, int32_t* to, int64_t column) {
    __m512i x[16], y[16];
    each<16>(HB_EACH(i) {
        x[i] = _mm512_loadu_si512(from + i * row);
        if (scale) {
            const __m512 sums = _mm512_maskz_cvtepi32_ps(0xffff, x[i]);
            x[i] = _mm512_castps_si512(_mm512_mul_ps(sums, _mm512_set1_ps(*scale)));
        }
    });
    each<8>(HB_EACH(i) {
        y[2 * i] = _mm512_maskz_unpacklo_epi32(0xffff, x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, x[2 * i], x[2 * i + 1]);
    });
    // Each lane of 128 bits of x[4 i + k] holds column 4 lane + k of rows 4 i ... 4 i + 3.
    each<4>(HB_EACH(i) {
        x[4 * i] = _mm512_maskz_unpacklo_epi64(0xff, y[4 * i], y[4 * i + 2]);
        x[4 * i + 1] = _mm512_maskz_unpackhi_epi64(0xff, y[4 * i], y[4 * i + 2]);
        x[4 * i + 2] = _mm512_maskz_unpacklo_epi64(0xff, y[4 * i + 1], y[4 * i + 3]);
        x[4 * i + 3] = _mm512_maskz_unpackhi_epi64(0xff, y[4 * i + 1], y[4 * i + 3]);
    });
    each<4>(HB_EACH(k) {
        const __m512i a = _mm512_maskz_shuffle_i32x4(0xffff, x[k], x[4 + k], 0x44);       // lanes 0 1 | 0 1
        const __m512i b = _mm512_maskz_shuffle_i32x4(0xffff, x[k], x[4 + k], 0xee);       // lanes 2 3 | 2 3
        const __m512i c = _mm512_maskz_shuffle_i32x4(0xffff, x[8 + k], x[12 + k], 0x44);
        const __m512i d = _mm512_maskz_shuffle_i32x4(0xffff, x[8 + k], x[12 + k], 0xee);
        _mm512_storeu_si512(to + k * column, _mm512_maskz_shuffle_i32x4(0xffff, a, c, 0x88));
        _mm512_storeu_si512(to + (4 + k) * column, _mm512_maskz_shuffle_i32x4(0xffff, a, c, 0xdd));
        _mm512_storeu_si512(to + (8 + k) * column, _mm512_maskz_shuffle_i32x4(0xffff, b, d, 0x88));
        _mm512_storeu_si512(to + (12 + k) * column, _mm512_maskz_shuffle_i32x4(0xffff, b, d, 0xdd));
    });
}

#endif

// Writes a part's sums, (image, position, `stride`), to channels first ... first + have of a tensor of `all` channels.
HB_NOINLINE void store_part(const int64_t* lengths, const Part& part, int64_t all, int64_t first, int64_t have,
                            int64_t stride, const int32_t* sums, const int64_t* wide, const Output& to) {
    const int64_t volume = lengths[0] * lengths[1] * lengths[2], n = part.length(1) * part.length(2);
    for (int64_t i = 0; i < part.images; i++)
        for (int64_t d = part.begin[0]; d < part.end[0]; d++, sums += n * stride, wide += n * stride) {
            const int64_t place = (d * lengths[1] + part.begin[1]) * lengths[2];
            const int64_t base = ((part.image + i) * all + first) * volume + place;
            int64_t c = 0;
            for (; to.wide && c < have; c++)
                for (int64_t r = 0; r < n; r++) to.wide[base + c * volume + r] = wide[r * stride + c];
            while (c < have) {
                int32_t* at = to.sums + base + c * volume;
                int64_t r = 0, some = 1;
#if defined(HB_AVX512VNNI)
                if (c + 16 <= have) {
                    some = 16;
                    for (; r + 16 <= n; r += 16)
                        transpose_numbers(sums + r * stride + c, stride, to.scale, at + r, volume);
                }
#endif
                for (int64_t j = 0; j < some; j++, at += volume) {
                    for (int64_t k = r; k < n; k++) at[k] = sums[k * stride + c + j];
                    if (to.scale) scale_row(at + r, n - r, *to.scale);
                }
                c += some;
            }
        }
}

}  // namespace
}  // namespace HB_NS
}  // namespace hb
