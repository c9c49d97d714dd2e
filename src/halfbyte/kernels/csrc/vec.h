// Vectors of W 32-bit lanes in the width of the instruction set, on the compilers' own vector types (GCC and clang).
#ifndef HB_VEC_H
#define HB_VEC_H

#include "halfbyte.h"
#include "isa.h"

namespace hb {
namespace HB_NS {

#if defined(HB_AVX512VNNI)
constexpr int W = 16;
#elif defined(HB_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint64_t vq __attribute__((vector_size(4 * W)));         // W / 2 lanes
typedef double vd __attribute__((vector_size(4 * W)));           // W / 2 lanes
typedef float half_vf __attribute__((vector_size(2 * W)));       // W / 2 lanes
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint8_t quarter_vb __attribute__((vector_size(W)));

HB_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HB_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

HB_INLINE vf splat(float x) { return x - vf{}; }
HB_INLINE vi splat(int32_t x) { return x - vi{}; }
HB_INLINE vi bits_of(vf x) { return (vi)x; }
HB_INLINE vf float_of(vi x) { return (vf)x; }

#if defined(HB_AVX512VNNI)
HB_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
HB_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
HB_INLINE vi vmin(vi a, vi b) { return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b); }
HB_INLINE vi vmax(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
HB_INLINE vf vfloor(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
#elif defined(HB_AVX2)
HB_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
HB_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
HB_INLINE vi vmin(vi a, vi b) { return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b); }
HB_INLINE vi vmax(vi a, vi b) { return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
HB_INLINE vf vfloor(vf x) { return _mm256_floor_ps(x); }
#else
HB_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
HB_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
HB_INLINE vi vmin(vi a, vi b) { return a < b ? a : b; }
HB_INLINE vi vmax(vi a, vi b) { return a > b ? a : b; }
// For numbers below 2^31 that are not negative: the conversion cuts off.
HB_INLINE vf vfloor(vf x) { return __builtin_convertvector(__builtin_convertvector(x, vi), vf); }
#endif

// ---- loading numbers of any type ------------------------------------------------------------------------------------

template <int D>
struct Storage {
    typedef uint16_t type;
};
template <>
struct Storage<HB_FLOAT32> {
    typedef float type;
};
template <>
struct Storage<HB_FLOAT64> {
    typedef double type;
};

// W numbers as float32, exactly.
template <int D>
HB_INLINE vf load(const void* x, int64_t i) {
    const auto* p = static_cast<const typename Storage<D>::type*>(x) + i;
    if constexpr (D == HB_FLOAT32) {
        vf v;
        memcpy(&v, p, sizeof v);
        return v;
    } else {
        vh h;
        memcpy(&h, p, sizeof h);
        if constexpr (D == HB_BFLOAT16) return (vf)(__builtin_convertvector(h, vu) << 16);
#if defined(HB_AVX512VNNI)
        return _mm512_cvtph_ps((__m256i)h);
#elif defined(HB_AVX2)
        return _mm256_cvtph_ps((__m128i)h);
#else
        // Normal numbers get the wider exponent's bias; the top exponent becomes the top one; subnormal numbers are
        // whole multiples of 2^-24.
        const vu wide = __builtin_convertvector(h, vu);
        const vi magnitude = (vi)(wide & 0x7fffu), sign = (vi)((wide & 0x8000u) << 16);
        const vi shifted = magnitude << 13;
        const vi normal = shifted + (112 << 23), special = shifted + (224 << 23);
        const vi tiny = bits_of(__builtin_convertvector(magnitude, vf) * 0x1p-24f);
        const vi found = magnitude < 0x0400 ? tiny : magnitude >= 0x7c00 ? special : normal;
        return float_of(found | sign);
#endif
    }
}

// ---- storing codes --------------------------------------------------------------------------------------------------

constexpr int GROUP = 64 / W;  // vectors that fill 64 bytes, one lane a byte

// 64 bytes from the low bytes of 64 lanes, in order. The lanes hold 0...255.
HB_INLINE void store_bytes(uint8_t* out, const vi* v) {
#if defined(HB_AVX512VNNI)
    for (int j = 0; j < GROUP; ++j) _mm_storeu_si128((__m128i*)(out + 16 * j), _mm512_cvtepi32_epi8((__m512i)v[j]));
#elif defined(HB_AVX2)
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int j = 0; j < GROUP; j += 4) {
        const __m256i a = _mm256_packs_epi32((__m256i)v[j], (__m256i)v[j + 1]);
        const __m256i b = _mm256_packs_epi32((__m256i)v[j + 2], (__m256i)v[j + 3]);
        _mm256_storeu_si256((__m256i*)(out + 8 * j), _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order));
    }
#else
    for (int j = 0; j < GROUP; ++j) {
        const quarter_vb bytes = __builtin_convertvector(v[j], quarter_vb);
        memcpy(out + W * j, &bytes, sizeof bytes);
    }
#endif
}

}  // namespace HB_NS
}  // namespace hb

#endif
