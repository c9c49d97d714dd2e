// Numbers to packed codes. Each element is read once, whatever is made of it.
#include <type_traits>

#include "threads.h"
#include "vec.h"

namespace hb {
namespace HB_NS {

constexpr int64_t BLOCK = 128;        // codes in a block of the packed layout
constexpr int64_t BITS_BLOCK = 512;   // bits in a block of packed bits
constexpr float MAGIC = 0x1.8p23f;    // added to a number below 2^22 it leaves the nearest integer in the low bits

// ---- rules: what a lane's code is -----------------------------------------------------------------------------------

// Whole numbers: clamp, round half to even, count from `offset`. Clamping first is the same, as the ends are whole.
struct Grid {
    vf low, inv_scale, bottom, top;
    vi offset, mask;

    Grid(float low_, float inv_scale_, int offset_, int bottom_, int top_, int bits)
        : low(splat(low_)), inv_scale(splat(inv_scale_)), bottom(splat((float)(bottom_ - offset_))),
          top(splat((float)(top_ - offset_))), offset(splat(offset_)), mask(splat((1 << bits) - 1)) {}

    HB_INLINE vi operator()(vf x) const {
        const vf scaled = (x - low) * inv_scale;
        const vf near = vmin(vmax(scaled, bottom), top) + MAGIC;
        return (bits_of(near) + offset) & mask;
    }
};

// Radix 2 and 4: one addition to the bits whose carry does the rounding, then a shift leaves the exponent's code.
struct Log {
    vi carry, base, limit;
    int shift;

    explicit Log(const int32_t* rule)
        : carry(splat(rule[1])), base(splat(rule[3])), limit(splat(rule[4])), shift(rule[2]) {}

    HB_INLINE vi operator()(vf scaled) const {
        const vi bits = bits_of(scaled);
        const vi magnitude = vmin(bits & 0x7fffffff, limit);
        const vi code = vmin(vmax((magnitude + carry) >> shift, base), base + 7) - base;
        return code | ((bits >> 28) & 8);
    }
};

// E2M1: below 1 the codes are whole halves; from 1 up exponent and first mantissa bit, rounded, are the code.
struct E2m1 {
    explicit E2m1(const int32_t*) {}

    HB_INLINE vi operator()(vf scaled) const {
        const vi bits = bits_of(scaled);
        const vi magnitude = vmin(bits & 0x7fffffff, bits_of(splat(6.0f)));
        const vi below = bits_of(float_of(magnitude) * 2.0f + MAGIC) & 7;
        const vi above = ((((magnitude >> 22) & 1) + magnitude + ((1 << 21) - 1)) >> 22) - 252;
        return (magnitude < bits_of(splat(1.0f)) ? below : above) | ((bits >> 28) & 8);
    }
};

// Any float of few bits with subnormal numbers. rule: {2, bits of the mantissa, bias, bits of the largest value, bits}.
struct Minifloat {
    vi largest, smallest, half, from, sign;
    int cut, sign_shift;
    float to_whole;

    explicit Minifloat(const int32_t* rule)
        : largest(splat(rule[3])), smallest(splat((128 - rule[2]) << 23)), half(splat((1 << (22 - rule[1])) - 1)),
          from(splat((127 - rule[2]) << rule[1])), sign(splat(1 << (rule[4] - 1))), cut(23 - rule[1]),
          sign_shift(32 - rule[4]), to_whole(float_of(splat((126 + rule[2] + rule[1]) << 23))[0]) {}

    HB_INLINE vi operator()(vf scaled) const {
        const vi bits = bits_of(scaled), magnitude = vmin(bits & 0x7fffffff, largest);
        // Below the smallest normal number the codes are whole multiples of one unit.
        const vi below = bits_of(float_of(magnitude) * to_whole + MAGIC) & 0xff;
        const vi above = ((((magnitude >> cut) & 1) + magnitude + half) >> cut) - from;
        return (magnitude < smallest ? below : above) | ((bits >> sign_shift) & sign);
    }
};

// ---- walking over blocks --------------------------------------------------------------------------------------------

// Numbers i ... i + 127 of which only `count` exist: a copy filled up with the last one, so that no range changes.
template <int D>
struct Padded {
    typename Storage<D>::type numbers[BLOCK];

    HB_INLINE Padded(const void* x, int64_t i, int64_t count) {
        const auto* p = static_cast<const typename Storage<D>::type*>(x) + i;
        memcpy(numbers, p, count * sizeof *numbers);
        for (int64_t j = count; j < BLOCK; ++j) memcpy(numbers + j, p + count - 1, sizeof *numbers);
    }
};

// The place of the codes of block b: a whole block of 4-bit codes is 64 bytes, of 8-bit codes 128.
HB_INLINE int64_t place(int64_t block, bool nibbles) { return block * (nibbles ? BLOCK / 2 : BLOCK); }

// Packs `count` codes that stand one to a byte.
static void pack_rest(const uint8_t* codes, int64_t count, bool nibbles, uint8_t* out) {
    if (!nibbles) {
        memcpy(out, codes, count);
        return;
    }
    const int64_t half = (count + 1) / 2;
    for (int64_t j = 0; j < half; ++j) out[j] = codes[j] | (half + j < count ? codes[half + j] << 4 : 0);
}

// Encodes blocks begin ... end - 1 of n numbers by N rules at once. `code(v, c, i)` writes the codes of the vector v,
// the numbers from i on, to c[0 ... N - 1].
template <int D, int N, bool NIBBLES, class Code>
HB_INLINE void encode_blocks(const void* x, int64_t n, int64_t begin, int64_t end, uint8_t* const* outs, const Code& code) {
    for (int64_t b = begin; b < end; ++b) {
        const int64_t start = b * BLOCK, count = n - start;
        if (count >= BLOCK) {
            vi low[N][GROUP], high[N][GROUP];
            for (int j = 0; j < GROUP; ++j) {
                vi c[N], d[N];
                code(load<D>(x, start + j * W), c, start + j * W);
                code(load<D>(x, start + BLOCK / 2 + j * W), d, start + BLOCK / 2 + j * W);
                for (int k = 0; k < N; ++k) {
                    low[k][j] = NIBBLES ? c[k] | d[k] << 4 : c[k];
                    if (!NIBBLES) high[k][j] = d[k];
                }
            }
            for (int k = 0; k < N; ++k) {
                store_bytes(outs[k] + place(b, NIBBLES), low[k]);
                if (!NIBBLES) store_bytes(outs[k] + place(b, NIBBLES) + BLOCK / 2, high[k]);
            }
        } else {
            const Padded<D> rest(x, start, count);
            uint8_t codes[N][BLOCK];
            for (int half = 0; half < BLOCK; half += BLOCK / 2) {
                vi found[N][GROUP];
                for (int j = 0; j < GROUP; ++j) {
                    vi c[N];
                    code(load<D>(rest.numbers, half + j * W), c, start + half + j * W);
                    for (int k = 0; k < N; ++k) found[k][j] = c[k];
                }
                for (int k = 0; k < N; ++k) store_bytes(codes[k] + half, found[k]);
            }
            for (int k = 0; k < N; ++k) pack_rest(codes[k], count, NIBBLES, outs[k] + place(b, NIBBLES));
        }
    }
}

constexpr int64_t GRAIN = 256;  // blocks that are worth a thread

HB_INLINE int64_t blocks_of(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

// Calls f with the type of the numbers as a constant.
template <class F>
HB_INLINE void with_dtype(int32_t dtype, const F& f) {
    if (dtype == HB_FLOAT32) f(std::integral_constant<int, HB_FLOAT32>{});
    else if (dtype == HB_BFLOAT16) f(std::integral_constant<int, HB_BFLOAT16>{});
    else f(std::integral_constant<int, HB_FLOAT16>{});
}

// ---- whole numbers --------------------------------------------------------------------------------------------------

static void encode_grid(const void* x, int32_t dtype, int64_t n, const float* low, const float* inv_scale,
                        int32_t offset, int32_t bottom, int32_t top, int32_t bits, uint8_t* out, float* range) {
    const Grid grid(low ? *low : 0.0f, *inv_scale, offset, bottom, top, bits);
    SharedRange all;
    with_dtype(dtype, [&](auto d) {
        parallel_for(blocks_of(n), GRAIN, [&](int64_t begin, int64_t end) {
            if (range) {
                Range seen;
                const auto code = [&](vf v, vi* c, int64_t) { seen.see(v), c[0] = grid(v); };
                bits <= 4 ? encode_blocks<d, 1, true>(x, n, begin, end, &out, code)
                          : encode_blocks<d, 1, false>(x, n, begin, end, &out, code);
                all.merge(seen);
            } else {
                const auto code = [&](vf v, vi* c, int64_t) { c[0] = grid(v); };
                bits <= 4 ? encode_blocks<d, 1, true>(x, n, begin, end, &out, code)
                          : encode_blocks<d, 1, false>(x, n, begin, end, &out, code);
            }
        });
    });
    if (range && n) all.write(range);
    else if (range) range[0] = range[1] = 0.0f;
}

// ---- formats with a sign and an exponent ----------------------------------------------------------------------------

template <int D, bool NIBBLES, class Rule>
HB_INLINE void encode_by(const Rule& rule, const void* x, int64_t n, int64_t begin, int64_t end, vf scale, uint8_t* out,
                         Range* seen) {
    if (seen)
        encode_blocks<D, 1, NIBBLES>(x, n, begin, end, &out,
                                     [&](vf v, vi* c, int64_t) { seen->see(v), c[0] = rule(v * scale); });
    else
        encode_blocks<D, 1, NIBBLES>(x, n, begin, end, &out, [&](vf v, vi* c, int64_t) { c[0] = rule(v * scale); });
}

// By a rule whose numbers are known at run time.
template <int D>
static void encode_rule(const int32_t* rule, const void* x, int64_t n, int64_t begin, int64_t end, vf scale,
                        uint8_t* out, Range* seen) {
    if (rule[0] == 0) encode_by<D, true>(Log(rule), x, n, begin, end, scale, out, seen);
    else if (rule[0] == 1) encode_by<D, true>(E2m1(rule), x, n, begin, end, scale, out, seen);
    else if (rule[4] > 4) encode_by<D, false>(Minifloat(rule), x, n, begin, end, scale, out, seen);
    else encode_by<D, true>(Minifloat(rule), x, n, begin, end, scale, out, seen);
}

constexpr int64_t AT_A_TIME = 64;  // blocks that one rule after another encodes, while they are in the cache

static void encode_each(const void* x, int32_t dtype, int64_t n, float inv_scale, int32_t count, const int32_t* rules,
                        uint8_t* const* outs, SharedRange* all) {
    const vf scale = splat(inv_scale);
    with_dtype(dtype, [&](auto d) {
        parallel_for(blocks_of(n), GRAIN, [&](int64_t begin, int64_t end) {
            Range seen;
            for (int64_t b = begin; b < end; b += AT_A_TIME) {
                const int64_t stop = least(end, b + AT_A_TIME);
                for (int k = 0; k < count; ++k)
                    encode_rule<d>(rules + 5 * k, x, n, b, stop, scale, outs[k], all && !k ? &seen : nullptr);
            }
            if (all) all->merge(seen);
        });
    });
}

// Two logarithmic formats from one read: the two phases of a gradient.
static void encode_pair(const Log& first, const Log& second, const void* x, int32_t dtype, int64_t n, float inv_scale,
                        uint8_t* const* outs, SharedRange* all) {
    const vf scale = splat(inv_scale);
    with_dtype(dtype, [&](auto d) {
        parallel_for(blocks_of(n), GRAIN, [&](int64_t begin, int64_t end) {
            Range seen;
            if (all) {
                encode_blocks<d, 2, true>(x, n, begin, end, outs, [&](vf v, vi* c, int64_t) {
                    seen.see(v), c[0] = first(v * scale), c[1] = second(v * scale);
                });
                all->merge(seen);
            } else {
                encode_blocks<d, 2, true>(x, n, begin, end, outs, [&](vf v, vi* c, int64_t) {
                    c[0] = first(v * scale), c[1] = second(v * scale);
                });
            }
        });
    });
}

static void encode_levels(const void* x, int32_t dtype, int64_t n, const float* inv_scale, int32_t count,
                          const int32_t* rules, uint8_t* out0, uint8_t* out1, float* range) {
    SharedRange all;
    SharedRange* seen = range ? &all : nullptr;
    uint8_t* outs[2] = {out0, out1};
    if (count == 2 && rules[0] == 0 && rules[5] == 0) {
        encode_pair(Log(rules), Log(rules + 5), x, dtype, n, *inv_scale, outs, seen);
    } else {
        encode_each(x, dtype, n, *inv_scale, count, rules, outs, seen);
    }
    if (range && n) all.write(range);
    else if (range) range[0] = range[1] = 0.0f;
}

}  // namespace HB_NS
}  // namespace hb
