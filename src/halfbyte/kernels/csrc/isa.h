// Which instruction set a translation unit is compiled for.
//
// kernels.cpp and all that it includes (*.inc.cpp) is compiled once for each instruction set. Two rules keep the copies
// apart, since the linker merges functions of one name, and a merged one would run the wrong instructions:
//   * everything lives in namespace hb::HB_NS, which isa.h names after the instruction set;
//   * no function of the C++ library that is not trivially inlined: no containers, strings, streams or allocators.
#ifndef HB_ISA_H
#define HB_ISA_H

#include <cstdint>
#include <cstring>

// GCC 12 takes the undefined operands of its own AVX-512 intrinsics for a mistake of ours.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512VNNI__) && defined(__FMA__) && defined(__F16C__)
#define HB_AVX512VNNI 1
#define HB_AVX2 1  // AVX2 intrinsics may be used as well
#define HB_NS avx512
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HB_AVX2 1
#define HB_NS avx2
#include <immintrin.h>
#else
#define HB_PORTABLE 1
#define HB_NS portable
#endif

#define HB_INLINE inline __attribute__((always_inline))
#define HB_NOINLINE __attribute__((noinline))

#endif
