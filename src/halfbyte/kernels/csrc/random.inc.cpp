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

#if defined(HB_AVX512VNNI)
HB_INLINE vq times(vq a, uint32_t m) { return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m)); }
HB_INLINE void store_pairs(uint64_t* out, vq a, vq b) {
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64((__m512i)a, first, (__m512i)b));
    _mm512_storeu_si512(out + 8, _mm512_permutex2var_epi64((__m512i)a, second, (__m512i)b));
}
#elif defined(HB_AVX2)
HB_INLINE vq times(vq a, uint32_t m) { return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m)); }
HB_INLINE void store_pairs(uint64_t* out, vq a, vq b) {
    const __m256i low = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
    const __m256i high = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
    _mm256_storeu_si256((__m256i*)out, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((__m256i*)(out + 4), _mm256_permute2x128_si256(low, high, 0x31));
}
#else
HB_INLINE vq times(vq a, uint32_t m) { return (a & 0xffffffffull) * (uint64_t)m; }
HB_INLINE void store_pairs(uint64_t* out, vq a, vq b) {
    for (int j = 0; j < W / 2; ++j) out[2 * j] = a[j], out[2 * j + 1] = b[j];
}
#endif

struct Philox {
    uint32_t key[2], counter[3];

    // k of elements i ... i + 127, for i a multiple of 128. Four elements share a counter. Only the lower half of each
    // 64-bit lane counts; what the products leave above it is cut off at the end. Some vectors go side by side, as each
    // product waits for the one before.
    HB_INLINE void fill(int64_t i, int32_t* k) const {
        constexpr int LANES = W / 2, SIDE = W == 16 ? 4 : 2;
        vq steps = {};
        for (int j = 0; j < LANES; ++j) steps[j] = (uint64_t)j;
        for (int b = 0; b < BLOCK / 4; b += SIDE * LANES) {
            vq c0[SIDE], c1[SIDE], c2[SIDE], c3[SIDE];
            for (int s = 0; s < SIDE; ++s) {
                c0[s] = steps + (uint64_t)(i / 4 + b + s * LANES);
                c1[s] = vq{} + counter[0], c2[s] = vq{} + counter[1], c3[s] = vq{} + counter[2];
            }
            uint32_t k0 = key[0], k1 = key[1];
            for (int round = 0; round < 10; ++round) {
                for (int s = 0; s < SIDE; ++s) {
                    const vq p0 = times(c0[s], 0xD2511F53u), p1 = times(c2[s], 0xCD9E8D57u);
                    c0[s] = (p1 >> 32) ^ c1[s] ^ (uint64_t)k0;
                    c2[s] = (p0 >> 32) ^ c3[s] ^ (uint64_t)k1;
                    c1[s] = p1;
                    c3[s] = p0;
                }
                k0 += 0x9E3779B9u;
                k1 += 0xBB67AE85u;
            }
            for (int s = 0; s < SIDE; ++s) {
                const vq first = (c0[s] >> 8 & 0xffffffull) | (c1[s] >> 8 & 0xffffffull) << 32;
                const vq second = (c2[s] >> 8 & 0xffffffull) | (c3[s] >> 8 & 0xffffffull) << 32;
                uint64_t pairs[W];
                store_pairs(pairs, first, second);
                memcpy(k + 4 * (b + s * LANES), pairs, sizeof pairs);
            }
        }
    }
};

HB_INLINE vf noise_of(vi k) { return __builtin_convertvector(k, vf) * 0x1p-24f; }

static void uniform(float* out, int64_t n, const uint32_t* philox) {
    const Philox random = {{philox[0], philox[1]}, {philox[2], philox[3], philox[4]}};
    parallel_for(blocks_of(n), GRAIN, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            int32_t k[BLOCK];
            float noise[BLOCK];
            random.fill(b * BLOCK, k);
            for (int j = 0; j < BLOCK; ++j) noise[j] = (float)k[j] * 0x1p-24f;
            memcpy(out + b * BLOCK, noise, (n - b * BLOCK < BLOCK ? n - b * BLOCK : BLOCK) * sizeof *out);
        }
    });
}

// ---- rules ----------------------------------------------------------------------------------------------------------

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

// Levels radix^(c - bias), c = 1 ... 7, and 0; the odd phase is the even phase of twice the number.
struct RandomLog {
    int log2_radix, bias, odd;

    HB_INLINE vi operator()(vf scaled, vi k) const {
        const vi sign = (bits_of(scaled) >> 28) & 8, bits = bits_of(scaled) & 0x7fffffff;
        const vi exponent = (bits >> 23) - 127 + odd;
        const vi level = vmin(vmax((exponent >> (log2_radix - 1)) + bias, vi{}), splat(7));
        // Below the smallest level: the share of the way from 0 to it.
        const vf to_first = splat(float_of(splat((127 + (bias - 1) * log2_radix + odd) << 23))[0]);
        const vi up_from_zero = float_of(bits) * to_first > noise_of(k);
        // Elsewhere: divided by its level a number is 1 to radix, and the way to the next level radix - 1 long.
        const vf quotient = float_of(bits - ((((level - bias) << (log2_radix - 1)) - odd) << 23));
        const vi way = __builtin_convertvector((quotient - 1.0f) * 0x1p24f, vi);
        const vi up_from_level = (way > (log2_radix == 2 ? 3 * k : k)) & (level < 7);
        const vi up = level == 0 ? up_from_zero : up_from_level;
        return (level - up) | sign;
    }
};

// ---- encoding -------------------------------------------------------------------------------------------------------

// Where the noise comes from: the caller's numbers, or Philox.
struct Noise {
    const float* given;
    int64_t n;
    Philox philox;

    HB_INLINE void fill(int64_t i, int32_t* k) const {
        if (!given) {
            philox.fill(i, k);
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
    Noise source = {noise, n, {}};
    if (philox) source.philox = {{philox[0], philox[1]}, {philox[2], philox[3], philox[4]}};
    with_dtype(dtype, [&](auto d) {
        if (kind == 0 && rule[2] <= 4) {
            at_random<d, true>(RandomGrid(rule[0], rule[1], rule[2]), x, n, *inv_scale, source, out);
        } else if (kind == 0) {
            at_random<d, false>(RandomGrid(rule[0], rule[1], rule[2]), x, n, *inv_scale, source, out);
        } else if (kind == 1) {
            at_random<d, true>(RandomE2m1{}, x, n, *inv_scale, source, out);
        } else {
            at_random<d, true>(RandomLog{rule[0], rule[1], rule[2]}, x, n, *inv_scale, source, out);
        }
    });
}

}  // namespace HB_NS
}  // namespace hb
