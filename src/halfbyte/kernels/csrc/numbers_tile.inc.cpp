// Products of numbers in floating point: the innermost loops, and the ways of numbers into the layouts that they read.
//
// Sums are float64. Where all products of `flush` neighbors along the reduction are whole multiples of one unit (a
// block has one scale in either operand), these are summed in float32, which holds such a sum exactly, and then added to
// the float64 ones: T is float. Everywhere else numbers are widened before they are multiplied: T is double.
namespace hb {
namespace HB_NS {
namespace {

#if defined(HB_AVX512VNNI)
constexpr int FEW = 4, MANY = 8;  // rows of a tile of two vectors of float, and of one
#else
constexpr int FEW = 2, MANY = 4;
#endif

// C[row][column] = or += A B along runs of the reduction.
template <class T>
struct NumberTile {
    const T* a[MANY];
    double* c[MANY];
    const T* b;                       // step after step a row of V * W numbers, `apart` from each other
    int64_t apart;
    const Run* runs;                  // in numbers from a and b
    int64_t count, steps, flush;      // of runs; of products in each; products that float32 sums
    bool add;
};

#if defined(HB_AVX512VNNI)
HB_INLINE vf fused(vf a, vf b, vf sum) { return _mm512_fmadd_ps(a, b, sum); }
HB_INLINE vd fused(vd a, vd b, vd sum) { return _mm512_fmadd_pd(a, b, sum); }
HB_INLINE vd low_half(vf x) { return _mm512_maskz_cvtps_pd(0xff, _mm512_castps512_ps256(x)); }
HB_INLINE vd high_half(vf x) { return _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, x, 1)); }
HB_INLINE half_vf narrowed(vd x) { return (half_vf)_mm512_maskz_cvtpd_ps(0xff, x); }
#elif defined(HB_AVX2)
HB_INLINE vf fused(vf a, vf b, vf sum) { return _mm256_fmadd_ps(a, b, sum); }
HB_INLINE vd fused(vd a, vd b, vd sum) { return _mm256_fmadd_pd(a, b, sum); }
HB_INLINE vd low_half(vf x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
HB_INLINE vd high_half(vf x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
HB_INLINE half_vf narrowed(vd x) { return (half_vf)_mm256_cvtpd_ps(x); }
#else
// Every product is exact, so one rounding and two are the same.
HB_INLINE vf fused(vf a, vf b, vf sum) { return a * b + sum; }
HB_INLINE vd fused(vd a, vd b, vd sum) { return a * b + sum; }
HB_INLINE vd low_half(vf x) { return vd{x[0], x[1]}; }
HB_INLINE vd high_half(vf x) { return vd{x[2], x[3]}; }
HB_INLINE half_vf narrowed(vd x) { return __builtin_convertvector(x, half_vf); }
#endif

template <class V>
HB_INLINE V vector_at(const void* x) {
    V v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

// Out of line: inside a larger function GCC keeps the sums in memory.
template <int R, int V>
HB_NOINLINE void number_tile(const NumberTile<float>& t) {
    constexpr int HALF = W / 2;
    vd low[R * V], high[R * V];
    each<R * V>(HB_EACH(i) {
        const double* c = t.c[i / V] + i % V * W;
        low[i] = t.add ? vector_at<vd>(c) : vd{};
        high[i] = t.add ? vector_at<vd>(c + HALF) : vd{};
    });
    const float* row[R];
    each<R>(HB_EACH(r) { row[r] = t.a[r]; });
    for (int64_t i = 0; i < t.count; i++) {
        const float* b = t.b + t.runs[i].b;
        int64_t at = t.runs[i].a;
        for (const int64_t end = at + t.steps; at < end;) {
            const int64_t stop = least(end, at + t.flush);
            vf sum[R * V];
            each<R * V>(HB_EACH(j) { sum[j] = vf{}; });
            for (; at < stop; at++, b += t.apart) {
                vf panel[V];
                each<V>(HB_EACH(v) { panel[v] = vector_at<vf>(b + v * W); });
                each<R>(HB_EACH(r) {
                    const vf all = splat(row[r][at]);
                    each<V>(HB_EACH(v) { sum[r * V + v] = fused(panel[v], all, sum[r * V + v]); });
                });
            }
            each<R * V>(HB_EACH(j) {
                low[j] += low_half(sum[j]);
                high[j] += high_half(sum[j]);
            });
        }
    }
    each<R * V>(HB_EACH(i) {
        double* c = t.c[i / V] + i % V * W;
        std::memcpy(c, &low[i], sizeof low[i]);
        std::memcpy(c + HALF, &high[i], sizeof high[i]);
    });
}

template <int R, int V>
HB_NOINLINE void number_tile(const NumberTile<double>& t) {
    constexpr int HALF = W / 2, N = 2 * V;
    vd sum[R * N];
    each<R * N>(HB_EACH(i) { sum[i] = t.add ? vector_at<vd>(t.c[i / N] + i % N * HALF) : vd{}; });
    const double* row[R];
    each<R>(HB_EACH(r) { row[r] = t.a[r]; });
    for (int64_t i = 0; i < t.count; i++) {
        const double* b = t.b + t.runs[i].b;
        const int64_t end = t.runs[i].a + t.steps;
        for (int64_t at = t.runs[i].a; at < end; at++, b += t.apart) {
            vd panel[N];
            each<N>(HB_EACH(v) { panel[v] = vector_at<vd>(b + v * HALF); });
            each<R>(HB_EACH(r) {
                const vd all = row[r][at] - vd{};
                each<N>(HB_EACH(v) { sum[r * N + v] = fused(panel[v], all, sum[r * N + v]); });
            });
        }
    }
    each<R * N>(HB_EACH(i) { std::memcpy(t.c[i / N] + i % N * HALF, &sum[i], sizeof sum[i]); });
}

template <int V, class T, int R = (V == 1 ? MANY : FEW)>
HB_INLINE void number_rows(const NumberTile<T>& t, int rows) {
    if (rows == R) number_tile<R, V>(t);
    else if constexpr (R > 1) number_rows<V, T, R - 1>(t, rows);
}

template <class T>
HB_INLINE void number_tiles(const NumberTile<T>& t, int rows, int64_t width) {
    width > W ? number_rows<2>(t, rows) : number_rows<1>(t, rows);
}

// Columns of a full panel, of all panels with the last one's padding, and of one panel.
constexpr int64_t WIDTH = 2 * W;
HB_INLINE int64_t number_columns(int64_t n) { return round_up(n, W); }
HB_INLINE int64_t number_width(int64_t padded, int64_t column) { return least(WIDTH, padded - column); }
HB_INLINE int tile_rows(int64_t width) { return width > W ? FEW : MANY; }

// ---- layouts --------------------------------------------------------------------------------------------------------

// to[k * column + j] = from[j * row + k] for j < rows, k < n.
template <class T>
HB_NOINLINE void turn(const float* from, int64_t row, int64_t rows, int64_t n, T* to, int64_t column) {
    int64_t j = 0;
#if defined(HB_AVX512VNNI)
    for (; j + 16 <= rows; j += 16) {
        const float* x = from + j * row;
        int64_t k = 0;
        for (; k + 16 <= n; k += 16) {
            if constexpr (sizeof(T) == 4) {
                transpose_numbers(reinterpret_cast<const int32_t*>(x + k), row, nullptr,
                                  reinterpret_cast<int32_t*>(to + k * column + j), column);
            } else {
                alignas(64) float some[16][16];
                transpose_numbers(reinterpret_cast<const int32_t*>(x + k), row, nullptr,
                                  reinterpret_cast<int32_t*>(some[0]), 16);
                for (int i = 0; i < 16; i++)
                    for (int l = 0; l < 16; l++) to[(k + i) * column + j + l] = some[i][l];
            }
        }
        for (; k < n; k++)
            for (int i = 0; i < 16; i++) to[k * column + j + i] = x[i * row + k];
    }
#endif
    for (int64_t k = 0; k < n; k++)
        for (int64_t i = j; i < rows; i++) to[k * column + i] = from[i * row + k];
}

template <class T>
HB_INLINE void widened(const float* from, int64_t n, T* to) {
    for (int64_t i = 0; i < n; i++) to[i] = from[i];
}

// What becomes of a sum: float32 of it times a power of two times the scales, rounded once or, if `twice`, the sum and
// the scales first.
struct Finish {
    double power, scales;
    bool twice;

    Finish(int32_t exponent, double scales_, int32_t twice_) : scales(scales_), twice(twice_ != 0) {
        const int64_t bits = int64_t{1023 + exponent} << 52;
        std::memcpy(&power, &bits, sizeof power);
    }
    HB_INLINE float operator()(double sum) const {
        return twice ? static_cast<float>(sum * power) * static_cast<float>(scales)
                     : static_cast<float>(sum * power * scales);
    }
    // `n` sums in a row.
    HB_INLINE void row(const double* sums, int64_t n, float* out) const {
        if (twice)
            for (int64_t i = 0; i < n; i++) out[i] = static_cast<float>(sums[i] * power) * static_cast<float>(scales);
        else
            for (int64_t i = 0; i < n; i++) out[i] = static_cast<float>(sums[i] * power * scales);
    }
};

}  // namespace

// ---- from codes -----------------------------------------------------------------------------------------------------

// The scales of blocks as numbers: E4M3 codes as they are; E8M0 codes (`powers`) over the largest of them, whose
// exponent is returned. A block that is more than 60 powers of two below that gets 0.
static int32_t block_factors(const uint8_t* codes, int64_t n, int32_t powers, float* out) {
    if (!powers) {
        float table[128];
        for (int c = 0; c < 128; c++) table[c] = e4m3_value(splat(c))[0];
        table[127] = __builtin_nanf("");
        for (int64_t i = 0; i < n; i++) out[i] = table[codes[i] & 127];
        return 0;
    }
    uint8_t largest = 0;
    for (int64_t i = 0; i < n; i++) largest = codes[i] > largest ? codes[i] : largest;
    float table[256];
    for (int c = 0; c < 256; c++) {
        const int below = largest - c;
        table[c] = below < 0 || below > 60 ? 0.0f : float_of(splat((127 - below) << 23))[0];
    }
    for (int64_t i = 0; i < n; i++) out[i] = table[codes[i]];
    return largest - 127;
}

// Whole numbers that codes stand for, times their block's factor. values: of each code of more than four bits, or null.
// Returns 0 if a code that is not zero met a factor of zero, else 1.
static int32_t decode_numbers(const hb_codes* q, const float* values, int64_t outer, int64_t length, int64_t inner,
                              int64_t block, const float* factors, float* out) {
    const Reading how = reading_of(*q, 0);
    const PerBlock scales = {factors, outer, length, inner, block};
    int32_t lost = 0;
    parallel_for(blocks_of(q->numel), GRAIN, [&](int64_t begin, int64_t end) {
        bool any = false;
        for (int64_t b = begin; b < end; b++) {
            const int64_t start = b * BLOCK, n = least(BLOCK, q->numel - start);
            alignas(64) uint8_t codes[BLOCK];
            alignas(64) int16_t words[BLOCK];
            float* to = out + start;
            unpack(*q, start, n, codes);
            if (values) {
                for (int64_t i = 0; i < n; i++) to[i] = values[codes[i]];
            } else {
                read_words(how, n, codes, words);
                for (int64_t i = 0; i < n; i++) to[i] = words[i];
            }
            if (!factors) continue;
            float some[BLOCK];
            scales.fill(start, n, some);
            int wrong = 0;
            for (int64_t i = 0; i < n; i++) {
                wrong |= (some[i] == 0.0f) & (to[i] != 0.0f);
                to[i] *= some[i];
            }
            any |= wrong != 0;
        }
        if (any) __atomic_store_n(&lost, 1, __ATOMIC_RELAXED);
    });
    return !lost;
}

}  // namespace HB_NS
}  // namespace hb
