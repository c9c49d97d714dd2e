// Random rounding: up or down, with the number itself as the mean. The noise is Philox-4x32-10's, as halfbyte.rng has
// it, computed block by block where it is used, or read from the caller.
//
// Noise is k * 2^-24 with a whole k. An element goes up if its share of the way to the next level exceeds that. Every
// comparison below is exact in float32 or in 32-bit integers, so it decides as the reference does in float64.
#include "threads.h"
#include "vec.h"

namespace hb {
namespace HB_NS {

// ---- noise ----------------------------------------------------------------------------------------------------------

// The product of the lower halves of each 64-bit lane; and the operations that a compiler does not find by itself.
#if defined(HB_AVX512VNNI)
HB_INLINE vq times(vq a, uint32_t m) { return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m)); }
HB_INLINE vq xor3(vq a, vq b, vq c) {
    return (vq)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
HB_INLINE vq halves(vq low, vq high) {
    return (vq)_mm512_mask_shuffle_epi32((__m512i)low, 0xAAAA, (__m512i)high, _MM_PERM_CCAA);
}
HB_INLINE vq evens(vq a, vq b) { return (vq)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b); }
HB_INLINE vq odds(vq a, vq b) { return (vq)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b); }
#elif defined(HB_AVX2)
HB_INLINE vq times(vq a, uint32_t m) { return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m)); }
HB_INLINE vq xor3(vq a, vq b, vq c) { return a ^ b ^ c; }
HB_INLINE vq halves(vq low, vq high) {
    return (vq)_mm256_blend_epi32((__m256i)low, _mm256_slli_epi64((__m256i)high, 32), 0xAA);
}
HB_INLINE vq evens(vq a, vq b) { return (vq)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b); }
HB_INLINE vq odds(vq a, vq b) { return (vq)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b); }
#else
HB_INLINE vq times(vq a, uint32_t m) { return (a & 0xffffffffull) * (uint64_t)m; }
HB_INLINE vq xor3(vq a, vq b, vq c) { return a ^ b ^ c; }
HB_INLINE vq halves(vq low, vq high) { return (low & 0xffffffffull) | high << 32; }
HB_INLINE vq evens(vq a, vq b) { return vq{a[0], b[0]}; }
HB_INLINE vq odds(vq a, vq b) { return vq{a[1], b[1]}; }
#endif

constexpr uint32_t MULTIPLIER[2] = {0xD2511F53u, 0xCD9E8D57u}, WEYL[2] = {0x9E3779B9u, 0xBB67AE85u};

// What the elements of a tensor share: the key, and three words of the counter.
struct Philox {
    uint32_t key[2], counter[3];
};

// Philox with all worked out beforehand that does not depend on the element.
struct Rounds {
    static constexpr int ROUNDS = 10;
    uint64_t keys[ROUNDS][2];
    // Of the first two rounds, what does not depend on the counter's word 0: of round 1 what the upper products of word
    // 0 and (with the key) of word 2 are combined with; of round 2 the same, and its words 3.
    uint64_t third, first, second, fourth;

    explicit Rounds(const Philox& random) {
        for (uint32_t round = 0; round < ROUNDS; ++round)
            for (int j = 0; j < 2; ++j) keys[round][j] = (uint32_t)(random.key[j] + round * WEYL[j]);
        const uint64_t p1 = (uint64_t)random.counter[1] * MULTIPLIER[1];
        const uint64_t c0 = (uint32_t)((p1 >> 32) ^ random.counter[0] ^ keys[0][0]);
        const uint64_t p0 = c0 * MULTIPLIER[0];
        third = random.counter[2] ^ keys[0][1];
        first = (uint32_t)p1 ^ keys[1][0];
        second = (p0 >> 32) ^ keys[1][1];
        fourth = (uint32_t)p0;
    }

    // k of elements i ... i + 127, for i a multiple of 128. Four elements share a counter. Only the lower half of each
    // 64-bit lane counts; what the products leave above it is cut off at the end. Some vectors go side by side, as each
    // product waits for the one before.
    HB_INLINE void fill(int64_t i, int32_t* k) const {
        constexpr int LANES = W / 2, SIDE = W == 16 ? 4 : 2;
        // In the order in which `evens` and `odds` bring the counters back into theirs.
        vq steps = {};
        for (int j = 0; j < LANES; ++j) steps[j] = (uint64_t)(j / 2 + j % 2 * (LANES / 2));
        for (int b = 0; b < BLOCK / 4; b += SIDE * LANES) {
            vq c0[SIDE], c1[SIDE], c2[SIDE], c3[SIDE];
            for (int s = 0; s < SIDE; ++s) {
                const vq p0 = times(steps + (uint64_t)(i / 4 + b + s * LANES), MULTIPLIER[0]);
                const vq p1 = times((p0 >> 32) ^ third, MULTIPLIER[1]);
                c0[s] = (p1 >> 32) ^ first, c1[s] = p1, c2[s] = p0 ^ second, c3[s] = vq{} + fourth;
            }
            for (int round = 2; round < ROUNDS; ++round) {
                for (int s = 0; s < SIDE; ++s) {
                    const vq p0 = times(c0[s], MULTIPLIER[0]), p1 = times(c2[s], MULTIPLIER[1]);
                    c0[s] = xor3(p1 >> 32, c1[s], vq{} + keys[round][0]);
                    c2[s] = xor3(p0 >> 32, c3[s], vq{} + keys[round][1]);
                    c1[s] = p1;
                    c3[s] = p0;
                }
            }
            for (int s = 0; s < SIDE; ++s) {
                const vq low = (vq)((vu)halves(c0[s], c1[s]) >> 8), high = (vq)((vu)halves(c2[s], c3[s]) >> 8);
                const vq near = evens(low, high), far = odds(low, high);
                memcpy(k + 4 * (b + s * LANES), &near, sizeof near);
                memcpy(k + 4 * (b + s * LANES) + W, &far, sizeof far);
            }
        }
    }
};

HB_INLINE vf noise_of(vi k) { return __builtin_convertvector(k, vf) * 0x1p-24f; }

static void uniform(float* out, int64_t n, const uint32_t* philox) {
    const Rounds random({{philox[0], philox[1]}, {philox[2], philox[3], philox[4]}});
    parallel_for(blocks_of(n), GRAIN, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            int32_t k[BLOCK];
            float rest[BLOCK];
            random.fill(b * BLOCK, k);
            const bool whole = n - b * BLOCK >= BLOCK;
            float* noise = whole ? out + b * BLOCK : rest;
            for (int j = 0; j < BLOCK; ++j) noise[j] = (float)k[j] * 0x1p-24f;
            if (!whole) memcpy(out + b * BLOCK, rest, (n - b * BLOCK) * sizeof *out);
        }
    });
}

// ---- rules ----------------------------------------------------------------------------------------------------------

// The next whole number, for numbers of 0 to 2^24; what others become does not matter.
#if defined(HB_AVX512VNNI)
HB_INLINE vi ceiling(vf x) { return (vi)_mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
#elif defined(HB_AVX2)
HB_INLINE vi ceiling(vf x) { return (vi)_mm256_cvtps_epi32(_mm256_ceil_ps(x)); }
#else
HB_INLINE vi ceiling(vf x) {
    const vi below = __builtin_convertvector(vmin(x, splat(0x1p24f)), vi);
    return below - (__builtin_convertvector(below, vf) < x);
}
#endif

HB_INLINE vf magnitude_of(vf x) { return float_of(bits_of(x) & 0x7fffffff); }

struct RandomGrid {
    vf limit, bottom, top;
    vi mask;

    RandomGrid(int bottom_, int top_, int bits)
        : limit(splat((float)(1 << bits))), bottom(splat((float)bottom_)), top(splat((float)top_)),
          mask(splat((1 << bits) - 1)) {}

    HB_INLINE vi operator()(vf scaled, vi k) const {
        const vf magnitude = vmin(magnitude_of(scaled), limit);
        const vf below = vfloor(magnitude);
        const vi up = noise_of(k) < magnitude - below;
        const vf whole = below + float_of(up & bits_of(splat(1.0f)));
        const vf with_sign = float_of(bits_of(whole) | (bits_of(scaled) & INT32_MIN));
        return bits_of(vmin(vmax(with_sign, bottom), top) + MAGIC) & mask;
    }
};

// The codes 0 ... 4 stand for steps of 1/2, 4 ... 6 for steps of 1 and 6, 7 for one of 2.
struct RandomE2m1 {
    HB_INLINE vi operator()(vf scaled, vi k) const {
        const vf magnitude = vmin(magnitude_of(scaled), splat(6.0f));
        const vi small = magnitude < 2.0f, middle = magnitude < 4.0f;
        const vf place = small ? magnitude * 2.0f : middle ? magnitude : (magnitude - 4.0f) * 0.5f;
        const vf below = vfloor(place);
        const vi up = noise_of(k) < place - below;
        const vi first = small ? vi{} : middle ? splat(2) : splat(6);
        const vi code = __builtin_convertvector(below, vi) + first - up;
        return code | ((bits_of(scaled) >> 28) & 8);
    }
};

// Levels 2^(c - bias), c = 1 ... 7, and 0. Twice its bits are a number's exponent and the share of its way to the next
// level in units of 2^-24; what is missing to the noise, added, carries into the exponent exactly if that goes up.
struct RandomLog2 {
    vi base;
    vf to_first;  // from the smallest level to 2^24 units

    explicit RandomLog2(int bias)
        : base(splat(127 - bias)), to_first(splat(float_of(splat((127 + bias - 1 + 24) << 23))[0])) {}

    HB_INLINE vi operator()(vf scaled, vi k) const {
        const vi bits = bits_of(scaled) & 0x7fffffff;
        // Below the smallest level: the share of the way from 0 to it, in whole units; more than one is one more.
        const vi from_zero = ceiling(float_of(bits) * to_first) + (base << 24);
        const vu place = (vu)(bits < (base + 1) << 23 ? from_zero : bits << 1);
        const vu code = (place + (vu)(0xffffff - k)) >> 24;
        return (vmin((vi)code, base + 7) - base) | ((bits_of(scaled) >> 28) & 8);
    }
};

// Levels 4^(c - bias), c = 1 ... 7, and 0; the odd phase is the even phase of twice the number.
struct RandomLog4 {
    int bias, odd;

    HB_INLINE vi operator()(vf scaled, vi k) const {
        const vi sign = (bits_of(scaled) >> 28) & 8, bits = bits_of(scaled) & 0x7fffffff;
        const vi exponent = (bits >> 23) - 127 + odd;
        const vi level = vmin(vmax((exponent >> 1) + bias, vi{}), splat(7));
        // Below the smallest level: the share of the way from 0 to it.
        const vf to_first = splat(float_of(splat((127 + (bias - 1) * 2 + odd) << 23))[0]);
        const vi up_from_zero = float_of(bits) * to_first > noise_of(k);
        // Elsewhere: divided by its level a number is 1 to 4, and the way to the next level 3 long.
        const vf quotient = float_of(bits - ((((level - bias) << 1) - odd) << 23));
        const vi way = __builtin_convertvector((quotient - 1.0f) * 0x1p24f, vi);
        const vi up_from_level = (way > 3 * k) & (level < 7);
        const vi up = level == 0 ? up_from_zero : up_from_level;
        return (level - up) | sign;
    }
};

// ---- encoding -------------------------------------------------------------------------------------------------------

// Where the noise comes from: the caller's numbers, or Philox.
struct Noise {
    const float* given;
    int64_t n;
    Rounds drawn;

    HB_INLINE void fill(int64_t i, int32_t* k) const {
        if (!given) {
            drawn.fill(i, k);
            return;
        }
        const int64_t count = n - i < BLOCK ? n - i : BLOCK;
        if (count == BLOCK) {
            for (int64_t j = 0; j < BLOCK; ++j) k[j] = (int32_t)(given[i + j] * 0x1p24f);
            return;
        }
        for (int64_t j = 0; j < count; ++j) k[j] = (int32_t)(given[i + j] * 0x1p24f);
        for (int64_t j = count; j < BLOCK; ++j) k[j] = 0;
    }
};

template <int D, bool NIBBLES, class Rule>
static void at_random(const Rule& rule, const void* x, int64_t n, float inv_scale, const Noise& noise, uint8_t* out) {
    const vf scale = splat(inv_scale);
    parallel_for(blocks_of(n), GRAIN / 4, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            int32_t k[BLOCK];
            noise.fill(b * BLOCK, k);
            encode_blocks<D, 1, NIBBLES>(x, n, b, b + 1, &out, [&](vf v, vi* c, int64_t i) {
                vi some;
                memcpy(&some, k + i % BLOCK, sizeof some);
                c[0] = rule(v * scale, some);
            });
        }
    });
}

static void encode_random(const void* x, int32_t dtype, int64_t n, const float* inv_scale, int32_t kind,
                          const int32_t* rule, const float* noise, const uint32_t* philox, uint8_t* out) {
    Philox random = {};
    if (philox) random = {{philox[0], philox[1]}, {philox[2], philox[3], philox[4]}};
    const Noise source = {noise, n, Rounds(random)};
    with_dtype(dtype, [&](auto d) {
        if (kind == 0 && rule[2] <= 4) {
            at_random<d, true>(RandomGrid(rule[0], rule[1], rule[2]), x, n, *inv_scale, source, out);
        } else if (kind == 0) {
            at_random<d, false>(RandomGrid(rule[0], rule[1], rule[2]), x, n, *inv_scale, source, out);
        } else if (kind == 1) {
            at_random<d, true>(RandomE2m1{}, x, n, *inv_scale, source, out);
        } else if (rule[0] == 1) {
            at_random<d, true>(RandomLog2(rule[1]), x, n, *inv_scale, source, out);
        } else {
            at_random<d, true>(RandomLog4{rule[1], rule[2]}, x, n, *inv_scale, source, out);
        }
    });
}

}  // namespace HB_NS
}  // namespace hb
