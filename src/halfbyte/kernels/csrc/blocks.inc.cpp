// Block formats: the largest magnitude of each block, the blocks' scales, and codes of numbers over their scales.
//
// A tensor is seen as (outer, length, inner), row-major, and cut along `length` into blocks; the last one may be short.
// What there is one of for each block is a grid of (outer, blocks, inner).
#include "threads.h"
#include "vec.h"

namespace hb {
namespace HB_NS {

constexpr int64_t STRIP = 1024;  // elements of a row that are looked at together: their maxima stay in the cache

// ---- the largest magnitude ------------------------------------------------------------------------------------------

// The bits of |x|: as whole numbers they are ordered as the numbers are, infinity and then NaN at the end.
template <int D>
HB_INLINE vi magnitude_bits(const void* x, int64_t i) {
    return bits_of(load<D>(x, i)) & 0x7fffffff;
}

template <int D>
HB_INLINE int32_t one_magnitude(const void* x, int64_t i) {
    typename Storage<D>::type same[W];
    for (int j = 0; j < W; ++j) memcpy(&same[j], static_cast<const typename Storage<D>::type*>(x) + i, sizeof same[j]);
    return magnitude_bits<D>(same, 0)[0];
}

// Of `count` elements that lie one after another.
template <int D>
HB_INLINE int32_t largest_along(const void* x, int64_t i, int64_t count) {
    int32_t largest = 0;
    if (count >= W) {
        vi all = magnitude_bits<D>(x, i + count - W);
        for (int64_t k = 0; k + W <= count; k += W) all = vmax(all, magnitude_bits<D>(x, i + k));
        for (int j = 0; j < W; ++j) largest = all[j] > largest ? all[j] : largest;
        return largest;
    }
    for (int64_t k = 0; k < count; ++k) {
        const int32_t bits = one_magnitude<D>(x, i + k);
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// Of `count` rows, `apart` from each other, in each of `width` places.
template <int D>
HB_INLINE void largest_across(const void* x, int64_t i, int64_t count, int64_t apart, int64_t width, int32_t* out) {
    int64_t j = 0;
    for (; j + 4 * W <= width; j += 4 * W) {
        vi largest[4] = {};
        for (int64_t k = 0; k < count; ++k)
            for (int v = 0; v < 4; ++v) largest[v] = vmax(largest[v], magnitude_bits<D>(x, i + k * apart + j + v * W));
        memcpy(out + j, largest, sizeof largest);
    }
    for (; j + W <= width; j += W) {
        vi largest = {};
        for (int64_t k = 0; k < count; ++k) largest = vmax(largest, magnitude_bits<D>(x, i + k * apart + j));
        memcpy(out + j, &largest, sizeof largest);
    }
    for (; j < width; ++j) {
        out[j] = 0;
        for (int64_t k = 0; k < count; ++k) {
            const int32_t bits = one_magnitude<D>(x, i + k * apart + j);
            out[j] = bits > out[j] ? bits : out[j];
        }
    }
}

// Of numbers that are not negative; NaN if one is, 0 for none.
static float largest_of(const float* x, int64_t n) {
    int32_t top = 0;
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        top = bits > top ? bits : top;
    }
    return float_of(splat(top))[0];
}

static void block_amax(const void* x, int32_t dtype, int64_t outer, int64_t length, int64_t inner, int64_t block,
                       float* out, float* top) {
    const int64_t blocks = (length + block - 1) / block, strips = (inner + STRIP - 1) / STRIP;
    with_dtype(dtype, [&](auto d) {
        parallel_for(outer * blocks * strips, most(1, 32768 / most(1, block * least(inner, STRIP))),
                     [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t grid = task / strips, o = grid / blocks, b = grid % blocks, j = task % strips * STRIP;
                const int64_t count = least(block, length - b * block), width = least(STRIP, inner - j);
                const int64_t first = (o * length + b * block) * inner + j;
                int32_t largest[STRIP];
                if (inner == 1) largest[0] = largest_along<d>(x, first, count);
                else largest_across<d>(x, first, count, inner, width, largest);
                memcpy(out + grid * inner + j, largest, width * sizeof *largest);
            }
        });
    });
    if (top) *top = largest_of(out, outer * blocks * inner);
}

// ---- scales ---------------------------------------------------------------------------------------------------------

// The nearest E4M3 code of a number that is not negative, ties to even, at most 448.
HB_INLINE vi e4m3_of(vf x) {
    const vi magnitude = vmin(bits_of(x) & 0x7fffffff, splat((127 + 8) << 23 | 0x600000));
    // Below 2^-6 the codes are whole multiples of 2^-9.
    const vi below = bits_of(float_of(magnitude) * 0x1p9f + 0x1.8p23f) & 15;
    const vi above = (magnitude + ((magnitude >> 20) & 1) + ((1 << 19) - 1)) >> 20;
    return magnitude < (127 - 6) << 23 ? below : above - ((127 - 7) << 3);
}

HB_INLINE vf e4m3_value(vi code) {
    const vf tiny = __builtin_convertvector(code, vf) * 0x1p-9f;
    return code < 8 ? tiny : float_of((code << 20) + ((127 - 7) << 23));
}

// The next power of two that a rule gives a block, as its exponent: see MXFP4 in halfbyte.quantizers.block.
struct MxRule {
    vi up;  // a mantissa in [1/2, 1) of these bits at least adds one to the exponent

    explicit MxRule(int32_t kind)
        : up(splat(kind == 1   ? bits_above(0.5f)
                   : kind == 2 ? bits(0.875f)
                   : kind == 3 ? bits_above(0.75f)
                               : INT32_MAX)) {}

    static int32_t bits(float x) {
        int32_t found;
        memcpy(&found, &x, sizeof found);
        return found;
    }
    static int32_t bits_above(float x) { return bits(x) + 1; }

    // e with amax = m 2^e, less 3, plus one where the rule says so; -127 for zero.
    HB_INLINE vi operator()(vf amax) const {
        // A subnormal number has its exponent after a multiplication that is exact.
        const vi small = bits_of(amax) < (1 << 23);
        const vi wide = small ? bits_of(amax * 0x1p32f) : bits_of(amax);
        const vi exponent = (wide >> 23) - 126 - (small & 32), mantissa = (wide & 0x7fffff) | (126 << 23);
        const vi found = exponent - 3 - (mantissa >= up);
        return amax > 0.0f ? vmin(vmax(found, splat(-127)), splat(126)) : splat(-127);
    }
};

// Calls f(i, count) for a vector at a time; `count` is W but for the last.
template <class F>
HB_INLINE void each_vector(int64_t n, const F& f) {
    parallel_for((n + STRIP - 1) / STRIP, 8, [&](int64_t begin, int64_t end) {
        const int64_t stop = least(n, end * STRIP);
        for (int64_t i = begin * STRIP; i < stop; i += W) f(i, least(W, stop - i));
    });
}

HB_INLINE vf some_of(const float* x, int64_t i, int64_t count) {
    vf v = {};
    memcpy(&v, x + i, count * sizeof *x);
    return v;
}

HB_INLINE void put_codes(vi codes, uint8_t* out, int64_t count) {
    const quarter_vb bytes = __builtin_convertvector(codes, quarter_vb);
    memcpy(out, &bytes, count);
}

static void nv_scales(const float* amax, int64_t n, float limit, float largest, float* scale, uint8_t* codes,
                      float* inverse) {
    const float top = largest_of(amax, n);
    float encode = 1.0f / top * largest;
    if (!(top > 0.0f) || !(encode <= __FLT_MAX__)) encode = 1.0f;
    *scale = 1.0f / encode;
    const vf up = splat(encode), down = splat(*scale), by = splat(limit);
    each_vector(n, [&](int64_t i, int64_t count) {
        const vi code = e4m3_of(some_of(amax, i, count) / by * up);
        const vf product = e4m3_value(code) * down;
        const vf found = product > 0.0f ? vmin(1.0f / product, splat(__FLT_MAX__)) : vf{};
        put_codes(code, codes + i, count);
        memcpy(inverse + i, &found, count * sizeof *inverse);
    });
}

static void mx_scales(const float* amax, int64_t n, int32_t kind, float factor, uint8_t* codes, float* inverse) {
    const MxRule rule(kind);
    each_vector(n, [&](int64_t i, int64_t count) {
        const vi exponent = rule(some_of(amax, i, count));
        // 2^127 for -127 has the largest exponent; 2^-126 the smallest normal one.
        const vf found = float_of((127 - exponent) << 23) * factor;
        put_codes(exponent + 127, codes + i, count);
        memcpy(inverse + i, &found, count * sizeof *inverse);
    });
}

// ---- codes ----------------------------------------------------------------------------------------------------------

// A number of each block, walked over in the order of the elements.
struct PerBlock {
    const float* grid;
    int64_t outer, length, inner, block;

    // Those of elements i ... i + count.
    HB_INLINE void fill(int64_t i, int64_t count, float* out) const {
        const int64_t blocks = (length + block - 1) / block;
        int64_t j = i % inner, l = i / inner % length, o = i / inner / length;
        while (count > 0) {
            const float* from = grid + (o * blocks + l / block) * inner + j;
            int64_t run;
            if (inner == 1) {
                run = least(count, least(block - l % block, length - l));
                for (int64_t k = 0; k < run; ++k) out[k] = *from;
                l += run;
            } else {
                run = least(count, inner - j);
                memcpy(out, from, run * sizeof *out);
                j += run;
                if (j == inner) j = 0, ++l;
            }
            if (l == length) l = 0, ++o;
            out += run, count -= run;
        }
    }
};

static void encode_in_blocks(const void* x, int32_t dtype, int64_t outer, int64_t length, int64_t inner, int64_t block,
                             const float* inverse, const uint32_t* philox, uint8_t* out) {
    const int64_t n = outer * length * inner;
    const PerBlock scales = {inverse, outer, length, inner, block};
    Philox words = {};
    if (philox) words = {{philox[0], philox[1]}, {philox[2], philox[3], philox[4]}};
    const Rounds random(words);
    const E2m1 nearest(nullptr);
    const RandomE2m1 drawn;
    with_dtype(dtype, [&](auto d) {
        parallel_for(blocks_of(n), GRAIN / 4, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) {
                float factors[BLOCK] = {};
                scales.fill(b * BLOCK, least(BLOCK, n - b * BLOCK), factors);
                if (!philox) {
                    encode_blocks<d, 1, true>(x, n, b, b + 1, &out, [&](vf v, vi* c, int64_t i) {
                        c[0] = nearest(v * load<HB_FLOAT32>(factors, i % BLOCK));
                    });
                    continue;
                }
                int32_t k[BLOCK];
                random.fill(b * BLOCK, k);
                encode_blocks<d, 1, true>(x, n, b, b + 1, &out, [&](vf v, vi* c, int64_t i) {
                    vi some;
                    memcpy(&some, k + i % BLOCK, sizeof some);
                    c[0] = drawn(v * load<HB_FLOAT32>(factors, i % BLOCK), some);
                });
            }
        });
    });
}

}  // namespace HB_NS
}  // namespace hb
