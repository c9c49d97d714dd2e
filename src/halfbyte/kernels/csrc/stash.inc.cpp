// What is kept for the backward pass: numbers as codes with a minimum and a step for each block of 128, masks as bits.
//
// The noise of the rounding has 16 bits, so that a counter of Philox serves eight numbers: number 32 w + 16 h + j of a
// block takes the low (h = 0) or high (h = 1) half of word w of the block's counter j.
#include "threads.h"
#include "vec.h"

namespace hb {
namespace HB_NS {

constexpr int64_t COUNTERS = BLOCK / 8;  // of a block
constexpr int64_t CHUNK = 4096;          // numbers that stay in the first cache between two walks over them

// ---- noise ----------------------------------------------------------------------------------------------------------

// (k + 1/2) / 2^16 for each number of a block.
HB_INLINE void stash_noise(const Philox& random, int64_t block, float* noise) {
    constexpr int LANES = W / 2, SIDE = 2;
    typedef uint32_t narrow __attribute__((vector_size(2 * W)));
    uint32_t words[4][COUNTERS];
    vq steps = {};
    for (int j = 0; j < LANES; ++j) steps[j] = (uint64_t)j;
    for (int b = 0; b < COUNTERS; b += SIDE * LANES) {
        vq c0[SIDE], c1[SIDE], c2[SIDE], c3[SIDE];
        for (int s = 0; s < SIDE; ++s) {
            c0[s] = steps + (uint64_t)(block * COUNTERS + b + s * LANES);
            c1[s] = vq{} + random.counter[0], c2[s] = vq{} + random.counter[1], c3[s] = vq{} + random.counter[2];
        }
        uint32_t k0 = random.key[0], k1 = random.key[1];
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
            const vq found[4] = {c0[s], c1[s], c2[s], c3[s]};
            for (int w = 0; w < 4; ++w) {
                const narrow low = __builtin_convertvector(found[w], narrow);
                memcpy(words[w] + b + s * LANES, &low, sizeof low);
            }
        }
    }
    for (int w = 0; w < 4; ++w) {
        for (int j = 0; j < COUNTERS; j += W) {
            vi word;
            memcpy(&word, words[w] + j, sizeof word);
            const vi low = word & 0xffff, high = (vi)((vu)word >> 16);
            const vf first = __builtin_convertvector(2 * low + 1, vf) * 0x1p-17f;
            const vf second = __builtin_convertvector(2 * high + 1, vf) * 0x1p-17f;
            memcpy(noise + 32 * w + j, &first, sizeof first);
            memcpy(noise + 32 * w + 16 + j, &second, sizeof second);
        }
    }
}

// ---- numbers to codes -----------------------------------------------------------------------------------------------

HB_INLINE float from_bfloat16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The nearest bfloat16 that is not above a number (up = 0), or not below it (up = 1).
HB_INLINE uint16_t to_bfloat16(float x, uint32_t up) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const bool away = bits >> 31 != up && (bits & 0xffff);
    return (uint16_t)((bits >> 16) + away);
}

// A block's minimum and step; whether both and all numbers are finite.
struct Steps {
    uint16_t low, step;
    bool finite;
};

HB_INLINE Steps steps_of(float low, float high, bool nan, int levels) {
    Steps found;
    found.low = to_bfloat16(low + 0.0f, 0);
    const float base = from_bfloat16(found.low), step = (high - base) / (float)levels;
    found.step = step < 0x1p-120f ? 0 : to_bfloat16(step, 1);
    const float up = from_bfloat16(found.step);
    // What is not finite does not give 0 when it is subtracted from itself.
    found.finite = !nan && low - low == 0.0f && high - high == 0.0f && base - base == 0.0f && up - up == 0.0f;
    return found;
}

// Encodes blocks begin ... end - 1; returns whether all numbers were finite.
template <int D, bool NIBBLES>
static bool stash_blocks(const void* x, int64_t n, int64_t begin, int64_t end, const Philox& random, uint8_t* out,
                         uint16_t* steps) {
    constexpr int LEVELS = NIBBLES ? 15 : 255, VECTORS = BLOCK / W;
    bool finite = true;
    for (int64_t b = begin; b < end; ++b) {
        const int64_t start = b * BLOCK, count = n - start < BLOCK ? n - start : BLOCK;
        vf v[VECTORS];
        if (count == BLOCK) {
            for (int j = 0; j < VECTORS; ++j) v[j] = load<D>(x, start + j * W);
        } else {
            const Padded<D> rest(x, start, count);
            for (int j = 0; j < VECTORS; ++j) v[j] = load<D>(rest.numbers, j * W);
        }
        vf low = v[0], high = v[0];
        vi nan = v[0] != v[0];
        for (int j = 1; j < VECTORS; ++j) {
            low = vmin(low, v[j]), high = vmax(high, v[j]);
            nan |= v[j] != v[j];
        }
        float least = low[0], most = high[0];
        int broken = nan[0];
        for (int j = 1; j < W; ++j) {
            least = low[j] < least ? low[j] : least;
            most = high[j] > most ? high[j] : most;
            broken |= nan[j];
        }
        const Steps found = steps_of(least, most, broken != 0, LEVELS);
        finite &= found.finite;
        steps[2 * b] = found.low, steps[2 * b + 1] = found.step;
        const float step = from_bfloat16(found.step);
        const vf base = splat(from_bfloat16(found.low)), inverse = splat(step > 0.0f ? 1.0f / step : 0.0f);
        float noise[BLOCK];
        stash_noise(random, b, noise);
        vi codes[VECTORS];
        for (int j = 0; j < VECTORS; ++j) {
            vf some;
            memcpy(&some, noise + j * W, sizeof some);
            // Not negative, so cutting off is rounding down.
            const vi code = __builtin_convertvector((v[j] - base) * inverse + some, vi);
            codes[j] = vmin(vmax(code, vi{}), splat(LEVELS));
        }
        if (count == BLOCK && NIBBLES) {
            for (int j = 0; j < VECTORS / 2; ++j) codes[j] |= codes[j + VECTORS / 2] << 4;
            store_bytes(out + place(b, true), codes);
        } else if (count == BLOCK) {
            store_bytes(out + place(b, false), codes);
            store_bytes(out + place(b, false) + BLOCK / 2, codes + VECTORS / 2);
        } else {
            uint8_t bytes[BLOCK];
            store_bytes(bytes, codes);
            store_bytes(bytes + BLOCK / 2, codes + VECTORS / 2);
            pack_rest(bytes, count, NIBBLES, out + place(b, NIBBLES));
        }
    }
    return finite;
}

static void stash_encode(const void* x, int32_t dtype, int64_t n, int32_t bits, const uint32_t* philox, uint8_t* out,
                         uint16_t* steps, int32_t* finite) {
    const Philox random = {{philox[0], philox[1]}, {philox[2], philox[3], philox[4]}};
    *finite = 1;
    with_dtype(dtype, [&](auto d) {
        parallel_for(blocks_of(n), GRAIN / 4, [&](int64_t begin, int64_t end) {
            const bool good = bits == 4 ? stash_blocks<d, true>(x, n, begin, end, random, out, steps)
                                        : stash_blocks<d, false>(x, n, begin, end, random, out, steps);
            if (!good) __atomic_store_n(finite, 0, __ATOMIC_RELAXED);
        });
    });
}

// ---- codes to numbers -----------------------------------------------------------------------------------------------

// A whole block. A code of eight bits times a step of eight is exact, so only the addition rounds.
template <bool NIBBLES>
HB_INLINE void stash_block(const uint8_t* codes, const uint16_t* steps, float* out) {
    const vf low = splat(from_bfloat16(steps[0])), step = splat(from_bfloat16(steps[1]));
    for (int j = 0; j < BLOCK / (NIBBLES ? 2 : 1); j += W) {
        quarter_vb bytes;
        memcpy(&bytes, codes + j, sizeof bytes);
        const vi wide = __builtin_convertvector(bytes, vi);
        const vf first = low + __builtin_convertvector(NIBBLES ? wide & 15 : wide, vf) * step;
        memcpy(out + j, &first, sizeof first);
        if (NIBBLES) {
            const vf second = low + __builtin_convertvector(wide >> 4, vf) * step;
            memcpy(out + BLOCK / 2 + j, &second, sizeof second);
        }
    }
}

// Numbers begin ... end - 1 of n. `memory` begins with the block that `begin` is in; returns where that number is.
template <bool NIBBLES>
HB_INLINE float* stash_range(const uint8_t* codes, const uint16_t* steps, int64_t n, int64_t begin, int64_t end,
                             float* memory) {
    const int64_t first = begin / BLOCK;
    for (int64_t b = first; b * BLOCK < end; ++b) {
        const int64_t count = n - b * BLOCK;
        float* out = memory + (b - first) * BLOCK;
        const uint8_t* bytes = codes + place(b, NIBBLES);
        if (count >= BLOCK) {
            stash_block<NIBBLES>(bytes, steps + 2 * b, out);
            continue;
        }
        const float low = from_bfloat16(steps[2 * b]), step = from_bfloat16(steps[2 * b + 1]);
        const int64_t half = (count + 1) / 2;
        for (int64_t j = 0; j < count; ++j) {
            const int code = !NIBBLES ? bytes[j] : j < half ? bytes[j] & 15 : bytes[j - half] >> 4;
            out[j] = low + (float)code * step;
        }
    }
    return memory + begin % BLOCK;
}

static void stash_decode(const uint8_t* codes, const uint16_t* steps, int64_t n, int32_t bits, float* out) {
    parallel_for(blocks_of(n), GRAIN, [&](int64_t begin, int64_t end) {
        const int64_t stop = end * BLOCK < n ? end * BLOCK : n;
        if (bits == 4) stash_range<true>(codes, steps, n, begin * BLOCK, stop, out + begin * BLOCK);
        else stash_range<false>(codes, steps, n, begin * BLOCK, stop, out + begin * BLOCK);
    });
}

// ---- masks ----------------------------------------------------------------------------------------------------------

// Which of some numbers are not at or below zero: a NaN is among them. Only the last block may be short.
HB_INLINE void positive_bits(const float* x, int64_t count, uint8_t* bits) {
    int64_t i = 0;
    for (; i + BITS_BLOCK <= count; i += BITS_BLOCK) {
        vi found[GROUP] = {};
        for (int k = 0; k < 8; ++k) {
            for (int j = 0; j < GROUP; ++j) {
                vf v;
                memcpy(&v, x + i + 64 * k + j * W, sizeof v);
                found[j] |= ~(v <= 0.0f) & (1 << k);
            }
        }
        store_bytes(bits + i / 8, found);
    }
    const int64_t rest = count - i, size = (rest + 7) / 8;
    memset(bits + i / 8, 0, size);
    for (int64_t e = 0; e < rest; ++e) bits[i / 8 + e % size] |= (uint8_t)(!(x[i + e] <= 0.0f) << (e / size));
}

// The numbers whose bits are set, and zeros. Only the last block may be short; `out` may be `x`.
HB_INLINE void keep_marked(const float* x, const uint8_t* bits, int64_t count, float* out) {
    vi lane_bit = {};
    for (int j = 0; j < W; ++j) lane_bit[j] = 1 << j;
    int64_t i = 0;
    for (; i + BITS_BLOCK <= count; i += BITS_BLOCK) {
        for (int k = 0; k < 8; ++k) {
            const uint64_t marked = plane(bits + i / 8, k);
            for (int j = 0; j < 64; j += W) {
                const vi drop = (splat((int32_t)(marked >> j)) & lane_bit) == 0;
                vi v;
                memcpy(&v, x + i + 64 * k + j, sizeof v);
                v &= ~drop;
                memcpy(out + i + 64 * k + j, &v, sizeof v);
            }
        }
    }
    const int64_t size = (count - i + 7) / 8;
    for (int64_t e = 0; i + e < count; ++e) out[i + e] = bits[i / 8 + e % size] >> (e / size) & 1 ? x[i + e] : 0.0f;
}

static void relu(const float* x, int64_t n, float* out, uint8_t* bits) {
    parallel_for((n + CHUNK - 1) / CHUNK, 16, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            const int64_t start = c * CHUNK, count = n - start < CHUNK ? n - start : CHUNK;
            positive_bits(x + start, count, bits + start / 8);
            keep_marked(x + start, bits + start / 8, count, out + start);
        }
    });
}

static void relu_backward(const float* grad, const uint8_t* bits, int64_t n, float* out) {
    parallel_for((n + CHUNK - 1) / CHUNK, 16, [&](int64_t begin, int64_t end) {
        const int64_t start = begin * CHUNK, stop = end * CHUNK < n ? end * CHUNK : n;
        keep_marked(grad + start, bits + start / 8, stop - start, out + start);
    });
}

}  // namespace HB_NS
}  // namespace hb
