// Hadamard rotations along one axis, as halfbyte.kernels.reference.rotate has them: additions and subtractions stage by
// stage, one multiplication last, signs before or after. Every element goes through the same operations in the same
// order whatever the width of a vector, so that all bits are the reference's.
#include "threads.h"
#include "vec.h"

namespace hb {
namespace HB_NS {

constexpr int LARGEST_GROUP = 256;  // rows that are turned at once

// The stages from `half` on of a group of `size` vectors: Sylvester's matrix over the vectors.
HB_INLINE void butterflies(vf* x, int size, int half) {
    for (; half < size; half *= 2)
        for (int i = 0; i < size; i += 2 * half)
            for (int j = i; j < i + half; ++j) {
                const vf low = x[j], high = x[j + half];
                x[j] = low + high;
                x[j + half] = low - high;
            }
}

// One stage inside a vector: lanes `half` apart.
HB_INLINE vf inside(vf x, int half) {
    vi from = {}, second = {};
    for (int j = 0; j < W; ++j) from[j] = j ^ half, second[j] = j & half ? -1 : 0;
#if defined(__clang__)
    vf other = {};
    for (int j = 0; j < W; ++j) other[j] = x[j ^ half];
#else
    const vf other = __builtin_shuffle(x, from);
#endif
    return second ? other - x : x + other;
}

// A group of `size` numbers, from places that lie `apart` from each other to the same places elsewhere.
static void turn_one(const float* x, int64_t apart, int size, const float* signs, bool back, float factor, float* out) {
    float some[LARGEST_GROUP];
    for (int k = 0; k < size; ++k) some[k] = signs && !back ? x[k * apart] * signs[k] : x[k * apart];
    for (int half = 1; half < size; half *= 2)
        for (int i = 0; i < size; i += 2 * half)
            for (int j = i; j < i + half; ++j) {
                const float low = some[j], high = some[j + half];
                some[j] = low + high;
                some[j + half] = low - high;
            }
    for (int k = 0; k < size; ++k) {
        const float turned = size > 1 ? some[k] * factor : some[k];
        out[k * apart] = signs && back ? turned * signs[k] : turned;
    }
}

// Groups that lie across: rows of `inner` numbers, `length` of them a group; SIZE is that number or 0.
template <int SIZE>
static void turn_rows(const float* x, int64_t inner, int64_t begin, int64_t end, int length, const float* signs,
                      bool back, float factor, float* out) {
    const int size = SIZE ? SIZE : length;
    vf some[SIZE ? SIZE : LARGEST_GROUP];
    int64_t j = begin;
    for (; size > 1 && j + W <= end; j += W) {
        for (int k = 0; k < size; ++k) {
            const vf v = load<HB_FLOAT32>(x, k * inner + j);
            some[k] = signs && !back ? v * signs[k] : v;
        }
        butterflies(some, size, 1);
        for (int k = 0; k < size; ++k) {
            const vf v = some[k] * factor, with_sign = signs && back ? v * signs[k] : v;
            memcpy(out + k * inner + j, &with_sign, sizeof with_sign);
        }
    }
    for (; j < end; ++j) turn_one(x + j, inner, size, signs, back, factor, out + j);
}

// A group that lies along: `size` numbers one after another, a multiple of W.
static void turn_line(const float* x, int size, const float* signs, bool back, float factor, float* out) {
    vf some[LARGEST_GROUP / W];
    const int vectors = size / W;
    for (int v = 0; v < vectors; ++v) {
        some[v] = load<HB_FLOAT32>(x, v * W);
        if (signs && !back) some[v] = some[v] * load<HB_FLOAT32>(signs, v * W);
        for (int half = 1; half < W; half *= 2) some[v] = inside(some[v], half);
    }
    butterflies(some, vectors, 1);
    for (int v = 0; v < vectors; ++v) {
        some[v] = some[v] * factor;
        if (signs && back) some[v] = some[v] * load<HB_FLOAT32>(signs, v * W);
        memcpy(out + v * W, &some[v], sizeof some[v]);
    }
}

static void rotate(const float* x, int64_t outer, int64_t length, int64_t inner, int32_t size, const float* signs,
                   int32_t back, const float* factors, float* out) {
    const int64_t strips = (inner + STRIP - 1) / STRIP;
    const int64_t grain = most(1, 32768 / most(1, length * least(inner, STRIP)));
    parallel_for(outer * strips, grain, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t from = task % strips * STRIP, until = least(inner, from + STRIP);
            int64_t l = 0;
            int group = size, power = 0;
            while (group > 1) group /= 2, ++power;
            for (group = size; l < length; l += group) {
                // All whole groups first, then the binary digits of the rest from the top.
                while (group > length - l) group /= 2, --power;
                const int64_t first = (task / strips * length + l) * inner;
                const float factor = factors[power];
                if (inner == 1 && group >= W) turn_line(x + first, group, signs, back, factor, out + first);
                else (group == 16 ? turn_rows<16> : group == 32 ? turn_rows<32> : turn_rows<0>)(
                    x + first, inner, from, until, group, signs, back, factor, out + first);
            }
        }
    });
}

}  // namespace HB_NS
}  // namespace hb
