// The learned clip of an activation: one bit an element for the backward pass, and the backward pass itself.
#include "threads.h"
#include "vec.h"

namespace hb {
namespace HB_NS {

// ---- bits -----------------------------------------------------------------------------------------------------------

struct Clip {
    vf low, high;

    HB_INLINE vi inside(vf x) const { return (x >= low) & (x <= high); }
    // |low| is the upper clip or 0, so one comparison of the magnitude finds both ends.
    HB_INLINE vi at_end(vf x) const { return float_of(bits_of(x) & 0x7fffffff) == high; }
};

// Up to 512 numbers from i on: their bits, inside the clip and at its ends. Returns whether any is at an end.
template <int D>
HB_INLINE bool bits_of_block(const void* x, int64_t i, const Clip& clip, uint8_t* inside, uint8_t* ties) {
    vi in[GROUP] = {}, end[GROUP] = {}, any = {};
    for (int k = 0; k < 8; ++k) {
        for (int j = 0; j < GROUP; ++j) {
            const vf v = load<D>(x, i + 64 * k + j * W);
            const vi within = clip.inside(v), at = clip.at_end(v) & within;
            in[j] |= within & (1 << k);
            end[j] |= at & (1 << k);
        }
    }
    for (int j = 0; j < GROUP; ++j) any |= end[j];
    store_bytes(inside, in);
    store_bytes(ties, end);
    for (int j = 1; j < W; ++j) any[0] |= any[j];
    return any[0] != 0;
}

// The last r < 512 numbers: the same around (r + 7) / 8 bytes.
template <int D>
static bool bits_of_rest(const void* x, int64_t i, int64_t r, const Clip& clip, uint8_t* inside, uint8_t* ties) {
    typename Storage<D>::type rest[BITS_BLOCK];
    memset(rest, 0, sizeof rest);
    memcpy(rest, static_cast<const typename Storage<D>::type*>(x) + i, r * sizeof *rest);
    const int64_t size = (r + 7) / 8;
    memset(inside, 0, size);
    memset(ties, 0, size);
    bool any = false;
    for (int64_t e = 0; e < r; e += W) {
        const vf v = load<D>(rest, e);
        const vi within = clip.inside(v), at = clip.at_end(v) & within;
        for (int64_t j = 0; j < W && e + j < r; ++j) {
            const int64_t byte = (e + j) % size, bit = (e + j) / size;
            inside[byte] |= (within[j] & 1) << bit;
            ties[byte] |= (at[j] & 1) << bit;
            any |= at[j] != 0;
        }
    }
    return any;
}

static void clip_bits(const void* x, int32_t dtype, int64_t n, const float* low, const float* high, uint8_t* inside,
                      uint8_t* ties, int32_t* any_tie) {
    const Clip clip = {splat(*low), splat(*high)};
    *any_tie = 0;
    with_dtype(dtype, [&](auto d) {
        parallel_for((n + BITS_BLOCK - 1) / BITS_BLOCK, GRAIN / 4, [&](int64_t begin, int64_t end) {
            bool any = false;
            for (int64_t b = begin; b < end; ++b) {
                const int64_t start = b * BITS_BLOCK, place = b * (BITS_BLOCK / 8);
                if (n - start >= BITS_BLOCK) any |= bits_of_block<d>(x, start, clip, inside + place, ties + place);
                else any |= bits_of_rest<d>(x, start, n - start, clip, inside + place, ties + place);
            }
            if (any) __atomic_store_n(any_tie, 1, __ATOMIC_RELAXED);
        });
    });
}

// Codes, range and bits from one read: what an activation with a learned clip needs.
static void encode_clipped(const void* x, int32_t dtype, int64_t n, const float* high, int32_t bottom, int32_t top,
                           int32_t bits, uint8_t* out, float* range, uint8_t* inside, uint8_t* ties) {
    const Clip clip = {splat(bottom < 0 ? -*high : 0.0f), splat(*high)};
    const Grid grid(0.0f, (float)(1.0 / (double)*high * top), 0, bottom, top, bits);
    int32_t any_tie = 0;
    SharedRange all;
    with_dtype(dtype, [&](auto d) {
        parallel_for((n + BITS_BLOCK - 1) / BITS_BLOCK, GRAIN / 4, [&](int64_t begin, int64_t end) {
            Range seen;
            bool any = false;
            const auto code = [&](vf v, vi* c, int64_t) { seen.see(v), c[0] = grid(v); };
            for (int64_t b = begin; b < end; ++b) {
                // The block stays in the first cache between the two walks over it.
                const int64_t start = b * BITS_BLOCK, place = b * (BITS_BLOCK / 8), first = b * (BITS_BLOCK / BLOCK);
                const bool whole = n - start >= BITS_BLOCK;
                const int64_t last = whole ? first + BITS_BLOCK / BLOCK : blocks_of(n);
                bits <= 4 ? encode_blocks<d, 1, true>(x, n, first, last, &out, code)
                          : encode_blocks<d, 1, false>(x, n, first, last, &out, code);
                if (!inside) continue;
                if (whole) any |= bits_of_block<d>(x, start, clip, inside + place, ties + place);
                else any |= bits_of_rest<d>(x, start, n - start, clip, inside + place, ties + place);
            }
            if (any) __atomic_store_n(&any_tie, 1, __ATOMIC_RELAXED);
            all.merge(seen);
        });
    });
    if (n) all.write(range);
    else range[0] = range[1] = 0.0f;
    range[2] = (float)any_tie;
}

// ---- backward -------------------------------------------------------------------------------------------------------

constexpr int64_t PIECE = 262144;  // elements whose part of a sum is formed by itself, as the reference does

// Numbers in the order that they come, folded row by row.
struct Collected {
    float row[ROW + 64 + 16];  // a row, 64 more, and what a whole vector's store writes beyond them
    double sums[PIECE / ROW];
    int64_t count = 0, rows = 0;

    HB_INLINE void flush_full() {
        if (count < ROW) return;
        sums[rows++] = fold_row(row);
        memmove(row, row + ROW, (count - ROW) * sizeof *row);
        count -= ROW;
    }

    double total() {
        if (rows == 0 && count == 0) return 0.0;
        if (rows == 0 && count == 1) return (double)row[0] + 0.0;
        if (count) {
            memset(row + count, 0, (ROW - count) * sizeof *row);
            sums[rows++] = fold_row(row);
        }
        return fold_rest(sums, rows);
    }
};

struct Codes {
    const uint8_t* data;
    int64_t n;
    bool nibbles, is_signed;
    int negative;  // the first code of a negative number, where there are any
    // What one more at an element of that code does to the clip: outside or at the clip a code is the extreme one, or 0
    // below an unsigned clip's zero.
    float weight[256];

    Codes(const uint8_t* data_, int64_t n_, int bits, bool is_signed_)
        : data(data_), n(n_), nibbles(bits <= 4), is_signed(is_signed_), negative(1 << (bits - 1)) {
        for (int c = 0; c < 256; ++c) weight[c] = is_signed ? c >= negative ? -1.0f : 1.0f : c > 0 ? 1.0f : 0.0f;
    }

    int at(int64_t i) const {
        if (!nibbles) return data[i];
        const int64_t block = i / BLOCK, offset = i % BLOCK, rest = n - block * BLOCK;
        const int64_t half = rest < BLOCK ? (rest + 1) / 2 : BLOCK / 2;
        const uint8_t* bytes = data + block * (BLOCK / 2);
        return offset < half ? bytes[offset] & 15 : bytes[offset - half] >> 4;
    }
};

// Bit k of the 64 bytes, as 64 bits.
HB_INLINE uint64_t plane(const uint8_t* bytes, int k) {
#if defined(HB_AVX512VNNI)
    return _mm512_test_epi8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8((char)(1 << k)));
#elif defined(HB_AVX2)
    uint64_t found = 0;
    for (int h = 0; h < 2; ++h) {
        const __m256i v = _mm256_loadu_si256((const __m256i*)(bytes + 32 * h));
        const __m256i top = _mm256_sll_epi16(v, _mm_cvtsi32_si128(7 - k));
        found |= (uint64_t)(uint32_t)_mm256_movemask_epi8(top) << (32 * h);
    }
    return found;
#else
    uint64_t found = 0;
    for (int j = 0; j < 64; ++j) found |= (uint64_t)(bytes[j] >> k & 1) << j;
    return found;
#endif
}

// Sets the marked ones of 64 numbers to zero.
template <int D>
HB_INLINE void clear(void* grad, int64_t i, uint64_t outside) {
    auto* p = static_cast<typename Storage<D>::type*>(grad) + i;
    if constexpr (D == HB_FLOAT32) {
        vi lane_bit = {};
        for (int j = 0; j < W; ++j) lane_bit[j] = 1 << j;
        for (int j = 0; j < 64; j += W) {
            const vi keep = (splat((int32_t)(outside >> j)) & lane_bit) == 0;
            const vf kept = float_of(bits_of(load<D>(p, j)) & keep);
            memcpy(p + j, &kept, sizeof kept);
        }
    } else {
        for (int j = 0; j < 64; ++j) p[j] = (uint16_t)(p[j] & ((outside >> j & 1) - 1));
    }
}

// W bytes, one a lane.
HB_INLINE vi load_bytes(const uint8_t* p) {
#if defined(HB_AVX512VNNI)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(HB_AVX2)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    quarter_vb bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, vi);
#endif
}

#if defined(HB_AVX2) && !defined(HB_AVX512VNNI)
// For each choice of eight lanes the numbers of those chosen, in order.
struct Chosen {
    uint64_t lanes[256];

    constexpr Chosen() : lanes() {
        for (int some = 0; some < 256; ++some)
            for (int j = 0, place = 0; j < 8; ++j)
                if (some >> j & 1) lanes[some] |= (uint64_t)j << (8 * place++);
    }
};
static constexpr Chosen CHOSEN;
#endif

// Writes the marked lanes next to each other, and perhaps anything after them, up to W numbers. Returns how many.
HB_INLINE int compress(float* out, vf v, uint32_t some) {
#if defined(HB_AVX512VNNI)
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps((__mmask16)some, v));
#elif defined(HB_AVX2)
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&CHOSEN.lanes[some]));
    _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(v, lanes));
#else
    for (int j = 0, place = 0; j < W; ++j) out[place] = v[j], place += some >> j & 1;
#endif
    return __builtin_popcount(some);
}

// Collects the weighted gradients of the marked ones of 64 elements.
template <int D>
HB_INLINE void collect(const void* grad, int64_t i, uint64_t moving, const Codes& codes, Collected& moved) {
    const uint8_t* bytes = codes.nibbles ? codes.data + i / BLOCK * (BLOCK / 2) : codes.data + i;
    const int shift = codes.nibbles && i % BLOCK ? 4 : 0, mask = codes.nibbles ? 15 : 255;
    const vf above = splat(1.0f), below = splat(codes.is_signed ? -1.0f : 0.0f);
    for (int j = 0; j < 64; j += W) {
        const vi code = load_bytes(bytes + j) >> shift & mask;
        const vf weight = (codes.is_signed ? code < codes.negative : code > 0) ? above : below;
        const vf value = load<D>(grad, i + j) * weight;
        moved.count += compress(moved.row + moved.count, value, (uint32_t)(moving >> j) & ((1u << W) - 1));
    }
    moved.flush_full();
}

template <int D>
static double piece_backward(void* grad, int64_t start, int64_t stop, const Codes& codes, const uint8_t* inside,
                             const uint8_t* ties) {
    Collected moved;
    int64_t i = start;
    for (; i + BITS_BLOCK <= stop; i += BITS_BLOCK) {
        for (int k = 0; k < 8; ++k) {
            const uint64_t outside = ~plane(inside + i / 8, k);
            const uint64_t moving = outside | (ties ? plane(ties + i / 8, k) : 0);
            if (moving) collect<D>(grad, i + 64 * k, moving, codes, moved);
            if (outside) clear<D>(grad, i + 64 * k, outside);
        }
    }
    const int64_t size = (stop - i + 7) / 8;
    for (int64_t e = 0; i + e < stop; ++e) {
        const int64_t byte = i / 8 + e % size, bit = e / size;
        const bool outside = !(inside[byte] >> bit & 1), tie = ties && (ties[byte] >> bit & 1);
        typename Storage<D>::type same[W], *p = static_cast<typename Storage<D>::type*>(grad) + i + e;
        for (int j = 0; j < W; ++j) same[j] = *p;
        if (outside || tie) moved.row[moved.count++] = load<D>(same, 0)[0] * codes.weight[codes.at(i + e)];
        if (outside) memset(p, 0, sizeof *p);
        moved.flush_full();
    }
    return moved.total();
}

static void clip_backward(void* grad, int32_t dtype, int64_t n, const uint8_t* qdata, int32_t bits, int32_t is_signed,
                          const uint8_t* inside, const uint8_t* ties, double* scratch, float* out) {
    const Codes codes(qdata, n, bits, is_signed != 0);
    const int64_t pieces = (n + PIECE - 1) / PIECE;
    with_dtype(dtype, [&](auto d) {
        parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                const int64_t stop = (p + 1) * PIECE < n ? (p + 1) * PIECE : n;
                scratch[p] = piece_backward<d>(grad, p * PIECE, stop, codes, inside, ties);
            }
        });
    });
    double total = 0.0;
    for (int64_t p = 0; p < pieces; ++p) total += scratch[p];
    *out = (float)total;
}

}  // namespace HB_NS
}  // namespace hb
