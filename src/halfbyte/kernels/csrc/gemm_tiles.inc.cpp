// The innermost loops of every GEMM: a few rows of A by one panel of B, sums in registers.
//
// Both operands lie in memory as 32-bit groups along the reduction: four 8-bit or two 16-bit numbers ("words"). One
// step multiplies a group of each row of A, signed, with the groups of all columns of a panel of B. In 8 bits B is
// unsigned, its numbers plus an offset, because that is what the instructions take; the rows' sums times the offset are
// subtracted at the end. Sums wrap modulo 2^32, so that only the true sum has to fit.
#include <type_traits>

namespace hb {
namespace HB_NS {
namespace {

#if defined(HB_AVX512VNNI)
constexpr int LANES = 16, VECTORS = 4, ROWS = 6;
#elif defined(HB_AVX2)
constexpr int LANES = 8, VECTORS = 2, ROWS = 4;
#else
constexpr int LANES = 8, VECTORS = 2, ROWS = 4;
#endif
constexpr int PANEL = LANES * VECTORS;  // columns of a full panel

// C[row][column] = (A B << shift) + start[row], plus what was there if `add`.
struct Tile {
    int64_t steps;
    const char* a;              // group of row r at step s: a + r * row_stride + s * step_stride (bytes)
    int64_t row_stride, step_stride;
    const char* b;              // one panel: step after step the groups of its columns
    const int32_t* first;       // sums to begin with, before the shift, PANEL apart; null for zero
    int shift;
    const int32_t* start;
    int32_t* c;
    int64_t c_stride;
    bool add;
};

using TileFunction = void (*)(const Tile&);

// f(0), f(1), ... f(N - 1) with constants. GCC unrolls loops over an array of registers too late: it has put the array
// into memory by then.
template <int N, int I = 0, class F>
HB_INLINE void each(const F& f) {
    if constexpr (I < N) {
        f(std::integral_constant<int, I>{});
        each<N, I + 1>(f);
    }
}

#define HB_EACH(i) [&](auto i) __attribute__((always_inline))

#if defined(HB_AVX512VNNI)

// The unmasked intrinsics make GCC 12 warn of an operand that they do not use.
HB_INLINE __m512i left_shift(__m512i x, __m512i by) { return _mm512_maskz_sllv_epi32(0xffff, x, by); }

// As assembly, since GCC 12 copies and spills the sums around the intrinsics of these two instructions.
template <bool WORDS>
HB_INLINE void multiply_add(__m512i& sum, __m512i b, __m512i a) {
    if (WORDS)
        __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    else
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
}

// Out of line: inside a larger function GCC keeps the sums in memory.
template <int R, int V, bool WORDS>
HB_NOINLINE void tile(const Tile& t) {
    __m512i sum[R * V];
    if (t.first)
        each<R * V>(HB_EACH(i) { sum[i] = _mm512_loadu_si512(t.first + i / V * PANEL + i % V * LANES); });
    else
        each<R * V>(HB_EACH(i) { sum[i] = _mm512_setzero_si512(); });
    const char *a = t.a, *b = t.b;
    const int64_t row = t.row_stride, step = t.step_stride;
    for (int64_t s = t.steps; s > 0; s--) {
        __m512i panel[V];
        each<V>(HB_EACH(v) { panel[v] = _mm512_loadu_si512(b + v * 64); });
        each<R>(HB_EACH(r) {
            int32_t group;
            std::memcpy(&group, a + r * row, 4);
            const __m512i all = _mm512_set1_epi32(group);
            each<V>(HB_EACH(v) { multiply_add<WORDS>(sum[r * V + v], panel[v], all); });
        });
        a += step;
        b += V * 64;
    }
    const __m512i shift = _mm512_set1_epi32(t.shift);
    each<R * V>(HB_EACH(i) {
        constexpr int r = i / V;
        int32_t* c = t.c + r * t.c_stride + i % V * LANES;
        __m512i total = _mm512_add_epi32(left_shift(sum[i], shift), _mm512_set1_epi32(t.start[r]));
        if (t.add) total = _mm512_add_epi32(total, _mm512_loadu_si512(c));
        _mm512_storeu_si512(c, total);
    });
}

// The same for few groups of a row, given by value and step: out += A B, or out = (A B) << 8 if `fresh`.
template <int V>
HB_NOINLINE void sparse_row(const int32_t* groups, const int32_t* steps, int count, const char* b, int32_t* out,
                            bool fresh) {
    __m512i sum[V];
    each<V>(HB_EACH(v) { sum[v] = fresh ? _mm512_setzero_si512() : _mm512_loadu_si512(out + v * LANES); });
    for (int i = 0; i < count; i++) {
        const __m512i all = _mm512_set1_epi32(groups[i]);
        const char* panel = b + static_cast<int64_t>(steps[i]) * (V * 64);
        each<V>(HB_EACH(v) { multiply_add<false>(sum[v], _mm512_loadu_si512(panel + v * 64), all); });
    }
    const __m512i shift = _mm512_set1_epi32(fresh ? 8 : 0);
    each<V>(HB_EACH(v) { _mm512_storeu_si512(out + v * LANES, left_shift(sum[v], shift)); });
}

#elif defined(HB_AVX2)

template <bool WORDS>
HB_INLINE void multiply_add(__m256i& sum, __m256i b, __m256i a) {
    // Pairs of 8-bit products are added in 16 bits, with saturation: `fits_bytes` keeps them below it.
    const __m256i pairs = WORDS ? _mm256_madd_epi16(b, a)
                                : _mm256_madd_epi16(_mm256_maddubs_epi16(b, a), _mm256_set1_epi16(1));
    sum = _mm256_add_epi32(sum, pairs);
}

template <int R, int V, bool WORDS>
HB_NOINLINE void tile(const Tile& t) {
    __m256i sum[R * V];
    each<R * V>(HB_EACH(i) { sum[i] = _mm256_setzero_si256(); });
    const char *a = t.a, *b = t.b;
    const int64_t row = t.row_stride, step = t.step_stride;
    for (int64_t s = t.steps; s > 0; s--) {
        __m256i panel[V];
        each<V>(HB_EACH(v) { panel[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + v * 32)); });
        each<R>(HB_EACH(r) {
            int32_t group;
            std::memcpy(&group, a + r * row, 4);
            const __m256i all = _mm256_set1_epi32(group);
            each<V>(HB_EACH(v) { multiply_add<WORDS>(sum[r * V + v], panel[v], all); });
        });
        a += step;
        b += V * 32;
    }
    each<R * V>(HB_EACH(i) {
        constexpr int r = i / V;
        auto* c = reinterpret_cast<__m256i*>(t.c + r * t.c_stride + i % V * LANES);
        __m256i total = _mm256_add_epi32(sum[i], _mm256_set1_epi32(t.start[r]));
        if (t.add) total = _mm256_add_epi32(total, _mm256_loadu_si256(c));
        _mm256_storeu_si256(c, total);
    });
}

#else

template <int R, int V, bool WORDS>
HB_NOINLINE void tile(const Tile& t) {
    constexpr int columns = V * LANES;
    uint32_t sum[R][columns] = {};
    for (int64_t s = 0; s < t.steps; s++)
        for (int r = 0; r < R; r++) {
            const char* a = t.a + r * t.row_stride + s * t.step_stride;
            if (WORDS) {
                int16_t x[2], y[2 * columns];
                std::memcpy(x, a, 4);
                std::memcpy(y, t.b + s * columns * 4, sizeof y);
                for (int j = 0; j < columns; j++)
                    sum[r][j] += static_cast<uint32_t>(x[0] * y[2 * j]) + static_cast<uint32_t>(x[1] * y[2 * j + 1]);
            } else {
                int8_t x[4];
                uint8_t y[4 * columns];
                std::memcpy(x, a, 4);
                std::memcpy(y, t.b + s * columns * 4, sizeof y);
                for (int j = 0; j < columns; j++)
                    sum[r][j] += static_cast<uint32_t>(x[0] * y[4 * j] + x[1] * y[4 * j + 1] + x[2] * y[4 * j + 2] +
                                                       x[3] * y[4 * j + 3]);
            }
        }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < columns; j++) {
            int32_t* c = t.c + r * t.c_stride + j;
            const uint32_t total = sum[r][j] + static_cast<uint32_t>(t.start[r]);
            *c = static_cast<int32_t>(t.add ? total + static_cast<uint32_t>(*c) : total);
        }
}

#endif

// tile_for<WORDS>(rows, vectors); vectors is 1, 2 or 4.
template <bool WORDS, int V>
HB_INLINE TileFunction tile_of(int rows) {
    static constexpr TileFunction table[] = {
        &tile<1, V, WORDS>, &tile<2, V, WORDS>, &tile<3, V, WORDS>, &tile<4, V, WORDS>,
#if defined(HB_AVX512VNNI)
        &tile<5, V, WORDS>, &tile<6, V, WORDS>,
#endif
    };
    return table[rows - 1];
}

template <bool WORDS>
TileFunction tile_for(int rows, int vectors) {
#if defined(HB_AVX512VNNI)
    if (vectors == 4) return tile_of<WORDS, 4>(rows);
#endif
    return vectors == 2 ? tile_of<WORDS, 2>(rows) : tile_of<WORDS, 1>(rows);
}

// Vectors that hold the last columns of a matrix: 1, 2 or 4.
HB_INLINE int vectors_for(int64_t columns) {
    if (columns > 2 * LANES) return VECTORS;
    return columns > LANES ? 2 : 1;
}

// Columns of all panels of a matrix, the last one's padding included.
HB_INLINE int64_t padded_columns(int64_t columns) {
    const int64_t whole = columns / PANEL * PANEL;
    return whole == columns ? whole : whole + vectors_for(columns - whole) * LANES;
}

}  // namespace
}  // namespace HB_NS
}  // namespace hb
