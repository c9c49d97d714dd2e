// Ranges and sums. A sum has one order, whatever the instruction set: rows of 4096, each folded in halves.
#include "threads.h"
#include "vec.h"

namespace hb {
namespace HB_NS {

constexpr int64_t ROW = 4096;

// ---- range ----------------------------------------------------------------------------------------------------------

// The running smallest and largest number of each lane, and whether a NaN was seen.
struct Range {
    vf low, high;
    vi nan;

    HB_INLINE Range() : low(splat(__builtin_inff())), high(splat(-__builtin_inff())), nan{} {}

    HB_INLINE void see(vf x) {
        nan |= x != x;
        low = vmin(low, x);
        high = vmax(high, x);
    }
};

// A range that threads merge theirs into; the order does not matter.
struct SharedRange {
    float low = __builtin_inff(), high = -__builtin_inff();
    bool nan = false;
    char busy = 0;

    void merge(const Range& range) {
        while (__atomic_test_and_set(&busy, __ATOMIC_ACQUIRE)) {
        }
        for (int j = 0; j < W; ++j) {
            nan |= range.nan[j] != 0;
            low = range.low[j] < low ? range.low[j] : low;
            high = range.high[j] > high ? range.high[j] : high;
        }
        __atomic_clear(&busy, __ATOMIC_RELEASE);
    }

    // A zero comes out positive: which of the two zeros was seen first is chance.
    void write(float* out) const {
        out[0] = nan ? __builtin_nanf("") : low + 0.0f;
        out[1] = nan ? __builtin_nanf("") : high + 0.0f;
    }
};

template <int D>
static void range_of(const void* x, int64_t n, float* out) {
    SharedRange all;
    parallel_for((n + ROW - 1) / ROW, 16, [&](int64_t begin, int64_t end) {
        const int64_t stop = end * ROW < n ? end * ROW : n;
        // Four of them, or each minimum would wait for the last.
        Range range[4];
        int64_t i = begin * ROW;
        for (; i + 4 * W <= stop; i += 4 * W)
            for (int k = 0; k < 4; ++k) range[k].see(load<D>(x, i + k * W));
        for (; i < stop; ++i) {
            // The last few, each repeated over the lanes.
            typename Storage<D>::type same[W];
            for (int j = 0; j < W; ++j) memcpy(&same[j], (const typename Storage<D>::type*)x + i, sizeof same[j]);
            range[0].see(load<D>(same, 0));
        }
        for (int k = 0; k < 4; ++k) all.merge(range[k]);
    });
    all.write(out);
}

static void value_range(const void* x, int32_t dtype, int64_t n, float* out) {
    if (n == 0) {
        out[0] = out[1] = 0.0f;
    } else if (dtype == HB_FLOAT32) {
        range_of<HB_FLOAT32>(x, n, out);
    } else if (dtype == HB_BFLOAT16) {
        range_of<HB_BFLOAT16>(x, n, out);
    } else {
        range_of<HB_FLOAT16>(x, n, out);
    }
}

// ---- sums -----------------------------------------------------------------------------------------------------------

HB_INLINE vd wide(const float* p) {
    half_vf v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vd);
}

HB_INLINE vd wide(const double* p) {
    vd v;
    memcpy(&v, p, sizeof v);
    return v;
}

constexpr int64_t PAIR = W / 2;  // doubles in a vector

// The sum of ROW numbers, each mapped first: x[i] + x[i + half], and again with half as many, down to one.
template <class T, class Map>
HB_INLINE double fold(const T* x, const Map& map) {
    double part[ROW / 8];
    // Three halvings in registers: the eight numbers that meet in place i.
    for (int64_t i = 0; i < ROW / 8; i += PAIR) {
        // Eight short streams are more than the processor foresees: the next row is fetched by hand.
        const char* next = reinterpret_cast<const char*>(x + ROW + 8 * i);
        for (int64_t byte = 0; byte < 8 * PAIR * (int64_t)sizeof(T); byte += 64) __builtin_prefetch(next + byte);
        vd v[8];
        for (int k = 0; k < 8; ++k) v[k] = map(wide(x + i + k * (ROW / 8)));
        const vd sum = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
        memcpy(part + i, &sum, sizeof sum);
    }
    int64_t half = ROW / 16;
    for (; half >= PAIR; half /= 2) {
        for (int64_t i = 0; i < half; i += PAIR) {
            const vd sum = wide(part + i) + wide(part + i + half);
            memcpy(part + i, &sum, sizeof sum);
        }
    }
    for (; half >= 1; half /= 2)
        for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
}

struct Same {
    HB_INLINE vd operator()(vd x) const { return x; }
};
struct Magnitude {
    HB_INLINE vd operator()(vd x) const { return (vd)((vq)x & 0x7fffffffffffffffull); }
};
struct Square {
    HB_INLINE vd operator()(vd x) const { return x * x; }
};

HB_NOINLINE static double fold_row(const double* x) { return fold(x, Same{}); }
HB_NOINLINE static double fold_row(const float* x) { return fold(x, Same{}); }

// The sum of a few doubles, which are overwritten: rows of them, then rows of the rows' sums, until one is left.
static double fold_rest(double* x, int64_t n) {
    double row[ROW];
    while (n > 1) {
        int64_t rows = 0;
        for (int64_t i = 0; i < n; i += ROW, ++rows) {
            const int64_t length = n - i < ROW ? n - i : ROW;
            memcpy(row, x + i, length * sizeof *row);
            memset(row + length, 0, (ROW - length) * sizeof *row);
            x[rows] = fold_row(row);
        }
        n = rows;
    }
    return n == 1 ? x[0] + 0.0 : 0.0;
}

// Calls body(row, numbers) for each row, as float32 or float64; the last is filled up with zeros.
template <int D, class Body>
HB_INLINE void for_rows(const void* x, int64_t n, const Body& body) {
    typedef typename Storage<D>::type T;
    parallel_for((n + ROW - 1) / ROW, 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const T* p = static_cast<const T*>(x) + r * ROW;
            T last[ROW];
            if (n - r * ROW < ROW) {
                memset(last, 0, sizeof last);
                memcpy(last, p, (n - r * ROW) * sizeof(T));
                p = last;
            }
            if constexpr (D == HB_FLOAT32 || D == HB_FLOAT64) {
                body(r, p);
            } else {
                float row[ROW];
                for (int64_t i = 0; i < ROW; i += W) {
                    const vf v = load<D>(p, i);
                    memcpy(row + i, &v, sizeof v);
                }
                body(r, static_cast<const float*>(row));
            }
        }
    });
}

template <int D>
static void moments_of(const void* x, int64_t n, double* scratch, double* out) {
    const int64_t rows = (n + ROW - 1) / ROW;
    for_rows<D>(x, n, [&](int64_t r, const auto* row) {
        scratch[r] = fold(row, Magnitude{});
        scratch[rows + r] = fold(row, Square{});
    });
    out[0] = fold_rest(scratch, rows) / (double)n;
    out[1] = fold_rest(scratch + rows, rows) / (double)n;
}

static void moments(const void* x, int32_t dtype, int64_t n, double* scratch, double* out) {
    if (n == 0) {
        out[0] = out[1] = 0.0;
    } else if (dtype == HB_FLOAT32) {
        moments_of<HB_FLOAT32>(x, n, scratch, out);
    } else if (dtype == HB_FLOAT64) {
        moments_of<HB_FLOAT64>(x, n, scratch, out);
    } else if (dtype == HB_BFLOAT16) {
        moments_of<HB_BFLOAT16>(x, n, scratch, out);
    } else {
        moments_of<HB_FLOAT16>(x, n, scratch, out);
    }
}

template <int D>
static void sum_of(const void* x, int64_t n, double* scratch, double* out) {
    for_rows<D>(x, n, [&](int64_t r, const auto* row) { scratch[r] = fold_row(row); });
    *out = fold_rest(scratch, (n + ROW - 1) / ROW);
}

static void stable_sum(const void* x, int32_t dtype, int64_t n, double* scratch, double* out) {
    if (dtype == HB_FLOAT32) {
        sum_of<HB_FLOAT32>(x, n, scratch, out);
    } else if (dtype == HB_FLOAT64) {
        sum_of<HB_FLOAT64>(x, n, scratch, out);
    } else if (dtype == HB_BFLOAT16) {
        sum_of<HB_BFLOAT16>(x, n, scratch, out);
    } else {
        sum_of<HB_FLOAT16>(x, n, scratch, out);
    }
}

}  // namespace HB_NS
}  // namespace hb
