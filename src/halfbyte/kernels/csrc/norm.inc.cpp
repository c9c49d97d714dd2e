// Batch norm whose input is kept as codes. Numbers lie in planes: one for each image and channel, one after another.
//
// A plane's sum has one order: rows of 4096, the last filled up with zeros to a power of two, each folded in halves; the
// rows' sums in the same way. What becomes of the sums of planes is a matter of few numbers, and the caller's.
#include <cstdlib>

#include "threads.h"
#include "vec.h"

namespace hb {
namespace HB_NS {

// The sum of n doubles, which are overwritten and have room up to a power of two.
HB_INLINE double fold_some(double* x, int64_t n) {
    int64_t size = 1;
    while (size < n) size *= 2;
    for (int64_t i = n; i < size; ++i) x[i] = 0.0;
    int64_t half = size / 2;
    for (; half >= PAIR; half /= 2) {
        for (int64_t i = 0; i < half; i += PAIR) {
            const vd sum = wide(x + i) + wide(x + i + half);
            memcpy(x + i, &sum, sizeof sum);
        }
    }
    for (; half >= 1; half /= 2)
        for (int64_t i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0] + 0.0;
}

// Two sums over a plane at once: `map(i, a, b)` gives what is summed from number i on, PAIR at a time; `one` a single one.
template <class Map, class One>
HB_INLINE void plane_sums_of(int64_t size, double* first, double* second, double* rest, double* out, const Map& map,
                             const One& one) {
    int64_t rows = 0;
    for (int64_t start = 0; start < size; start += ROW, ++rows) {
        const int64_t count = size - start < ROW ? size - start : ROW;
        int64_t i = 0;
        for (; i + PAIR <= count; i += PAIR) {
            vd a, b;
            map(start + i, a, b);
            memcpy(first + i, &a, sizeof a);
            memcpy(second + i, &b, sizeof b);
        }
        for (; i < count; ++i) one(start + i, first[i], second[i]);
        rest[2 * rows] = fold_some(first, count);
        rest[2 * rows + 1] = fold_some(second, count);
    }
    // The rows of a large plane, in rows again.
    while (rows > 1) {
        int64_t left = 0;
        for (int64_t start = 0; start < rows; start += ROW, ++left) {
            const int64_t count = rows - start < ROW ? rows - start : ROW;
            for (int64_t i = 0; i < count; ++i) {
                first[i] = rest[2 * (start + i)];
                second[i] = rest[2 * (start + i) + 1];
            }
            rest[2 * left] = fold_some(first, count);
            rest[2 * left + 1] = fold_some(second, count);
        }
        rows = left;
    }
    out[0] = rest[0];
    out[1] = rest[1];
}

// Planes to a task: about 8192 numbers.
HB_INLINE int64_t planes_together(int64_t size) { return size >= 8192 ? 1 : 8192 / size; }

// Work space of a task: twice the numbers of a group of planes with a block of bits before and behind, and what
// plane_sums_of needs.
struct NormMemory {
    void* memory;
    double *first, *second, *rest;
    float *g, *x;

    NormMemory(int64_t numbers, int64_t size) {
        const int64_t room = numbers + 2 * BITS_BLOCK, rows = (size + ROW - 1) / ROW;
        memory = std::malloc((size_t)((2 * ROW + 2 * rows) * sizeof(double) + 2 * room * sizeof(float)));
        if (!memory) std::abort();
        first = static_cast<double*>(memory);
        second = first + ROW;
        rest = second + ROW;
        g = reinterpret_cast<float*>(rest + 2 * rows);
        x = g + room;
    }
    NormMemory(const NormMemory&) = delete;
    ~NormMemory() { std::free(memory); }
};

// Calls body(first plane, planes, memory) for groups of planes.
template <class Body>
HB_INLINE void for_planes(int64_t planes, int64_t size, const Body& body) {
    const int64_t together = planes_together(size);
    parallel_for((planes + together - 1) / together, 2, [&](int64_t begin, int64_t end) {
        const NormMemory memory(together * size, size);
        for (int64_t t = begin; t < end; ++t) {
            const int64_t first = t * together;
            body(first, planes - first < together ? planes - first : together, memory);
        }
    });
}

// ---- forward --------------------------------------------------------------------------------------------------------

static void plane_moments(const float* x, int64_t planes, int64_t size, double* out) {
    for_planes(planes, size, [&](int64_t from, int64_t count, const NormMemory& memory) {
        for (int64_t p = from; p < from + count; ++p) {
            const float* numbers = x + p * size;
            plane_sums_of(
                size, memory.first, memory.second, memory.rest, out + 2 * p,
                [&](int64_t i, vd& a, vd& b) { a = wide(numbers + i), b = a * a; },
                [&](int64_t i, double& a, double& b) { a = numbers[i], b = a * a; });
        }
    });
}

// Numbers begin ... end - 1: body(channel, from, to) for each stretch of one plane.
template <class Body>
HB_INLINE void for_channels(int64_t begin, int64_t end, int64_t channels, int64_t size, const Body& body) {
    for (int64_t i = begin; i < end;) {
        const int64_t p = i / size, stop = (p + 1) * size < end ? (p + 1) * size : end;
        body(p % channels, i, stop);
        i = stop;
    }
}

static void norm_forward(const float* x, int64_t planes, int64_t channels, int64_t size, const float* factor,
                         const float* shift, int32_t bits, const uint32_t* philox, float* out, uint8_t* codes,
                         uint16_t* steps, uint8_t* positive, int32_t* finite) {
    const Philox random = {{philox[0], philox[1]}, {philox[2], philox[3], philox[4]}};
    const int64_t n = planes * size;
    *finite = 1;
    parallel_for((n + CHUNK - 1) / CHUNK, 4, [&](int64_t begin, int64_t end) {
        bool good = true;
        for (int64_t c = begin; c < end; ++c) {
            const int64_t start = c * CHUNK, stop = n - start < CHUNK ? n : start + CHUNK;
            const int64_t first = start / BLOCK, last = blocks_of(stop);
            good &= bits == 4 ? stash_blocks<HB_FLOAT32, true>(x, n, first, last, random, codes, steps)
                              : stash_blocks<HB_FLOAT32, false>(x, n, first, last, random, codes, steps);
            for_channels(start, stop, channels, size, [&](int64_t channel, int64_t from, int64_t to) {
                const float by = factor[channel], more = shift[channel];
                for (int64_t i = from; i < to; ++i) out[i] = x[i] * by + more;
            });
            if (positive) {
                positive_bits(out + start, stop - start, positive + start / 8);
                keep_marked(out + start, positive + start / 8, stop - start, out + start);
            }
        }
        if (!good) __atomic_store_n(finite, 0, __ATOMIC_RELAXED);
    });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The gradient of planes from ... from + count - 1, zero where `positive` is not set; where it begins.
HB_INLINE const float* marked_gradient(const float* grad, const uint8_t* positive, int64_t n, int64_t begin, int64_t end,
                                       float* memory) {
    if (!positive) return grad + begin;
    const int64_t start = begin / BITS_BLOCK * BITS_BLOCK;
    const int64_t block_end = (end + BITS_BLOCK - 1) / BITS_BLOCK * BITS_BLOCK;
    keep_marked(grad + start, positive + start / 8, (block_end < n ? block_end : n) - start, memory);
    return memory + (begin - start);
}

template <bool NIBBLES>
static void norm_sums_of(const float* grad, const uint8_t* codes, const uint16_t* steps, const uint8_t* positive,
                         int64_t planes, int64_t size, double* out) {
    const int64_t n = planes * size;
    for_planes(planes, size, [&](int64_t from, int64_t count, const NormMemory& memory) {
        const int64_t begin = from * size, end = begin + count * size;
        const float* g = marked_gradient(grad, positive, n, begin, end, memory.g);
        const float* x = stash_range<NIBBLES>(codes, steps, n, begin, end, memory.x);
        for (int64_t p = 0; p < count; ++p, g += size, x += size) {
            plane_sums_of(
                size, memory.first, memory.second, memory.rest, out + 2 * (from + p),
                [&](int64_t i, vd& a, vd& b) { a = wide(g + i), b = a * wide(x + i); },
                [&](int64_t i, double& a, double& b) { a = g[i], b = a * (double)x[i]; });
        }
    });
}

static void norm_sums(const float* grad, const uint8_t* codes, const uint16_t* steps, int32_t bits,
                      const uint8_t* positive, int64_t planes, int64_t size, double* out) {
    if (bits == 4) norm_sums_of<true>(grad, codes, steps, positive, planes, size, out);
    else norm_sums_of<false>(grad, codes, steps, positive, planes, size, out);
}

template <bool NIBBLES>
static void norm_backward_of(const float* grad, const uint8_t* codes, const uint16_t* steps, const uint8_t* positive,
                             int64_t planes, int64_t channels, int64_t size, const float* of_grad, const float* of_x,
                             const float* shift, float* out) {
    const int64_t n = planes * size;
    for_planes(planes, size, [&](int64_t from, int64_t count, const NormMemory& memory) {
        const int64_t begin = from * size, end = begin + count * size;
        const float* g = marked_gradient(grad, positive, n, begin, end, memory.g) - begin;
        const float* x = stash_range<NIBBLES>(codes, steps, n, begin, end, memory.x) - begin;
        for_channels(begin, end, channels, size, [&](int64_t channel, int64_t start, int64_t stop) {
            const float a = of_grad[channel], b = of_x[channel], c = shift[channel];
            for (int64_t i = start; i < stop; ++i) out[i] = g[i] * a + (x[i] * b + c);
        });
    });
}

static void norm_backward(const float* grad, const uint8_t* codes, const uint16_t* steps, int32_t bits,
                          const uint8_t* positive, int64_t planes, int64_t channels, int64_t size,
                          const float* of_grad, const float* of_x, const float* shift, float* out) {
    if (bits == 4) {
        norm_backward_of<true>(grad, codes, steps, positive, planes, channels, size, of_grad, of_x, shift, out);
    } else {
        norm_backward_of<false>(grad, codes, steps, positive, planes, channels, size, of_grad, of_x, shift, out);
    }
}

}  // namespace HB_NS
}  // namespace hb
