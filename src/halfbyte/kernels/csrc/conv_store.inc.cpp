// From sums of positions by channels to a tensor whose channels come first.
namespace hb {
namespace HB_NS {
namespace {

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

// Writes rows of sums: row r, channel c goes to places[r] + c * volume.
HB_NOINLINE void store_block(const int32_t* sums, const int64_t* wide, int64_t stride, int64_t rows, int64_t channels,
                             const int64_t* places, int64_t volume, const Output& to) {
    if (to.wide) {
        for (int64_t c = 0; c < channels; c++)
            for (int64_t r = 0; r < rows; r++) to.wide[places[r] + c * volume] = wide[r * stride + c];
        return;
    }
    int64_t row = 0;
    while (row < rows) {
        int64_t some = 1, c = 0;
        while (some < 16 && row + some < rows && places[row + some] == places[row] + some) some++;
#if defined(HB_AVX512VNNI)
        for (; some == 16 && c + 16 <= channels; c += 16)
            transpose_numbers(sums + row * stride + c, stride, to.scale, to.sums + places[row] + c * volume, volume);
#endif
        for (; c < channels; c++) {
            int32_t* at = to.sums + places[row] + c * volume;
            for (int64_t r = 0; r < some; r++) at[r] = sums[(row + r) * stride + c];
            if (to.scale) scale_row(at, some, *to.scale);
        }
        row += some;
    }
}

}  // namespace
}  // namespace HB_NS
}  // namespace hb
