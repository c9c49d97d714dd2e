// The C interface of halfbyte's kernels. Plain functions over pointers: no headers of PyTorch, no C++ in the interface.
//
// Conventions
//   * Pointers are to contiguous memory and need no alignment. Sizes count elements. Nothing is allocated for the
//     caller; what a function overwrites or needs as scratch memory comes from outside.
//   * Codes are packed as halfbyte.qtensor.pack says: of each block of 128 four-bit codes, byte j holds code j in its
//     low and code 64 + j in its high half; a last block of r < 128 does the same around h = (r + 1) / 2. Codes of
//     more than four bits take a byte each. Bits are packed as halfbyte.qtensor.pack_bits says, in blocks of 512.
//   * Scalars that the caller holds in tensors (scales, limits) come as pointers to them.
//   * Every result equals that of halfbyte.kernels.reference to the bit, for any instruction set and number of threads.
//     What NaN becomes in a code is not defined, as there; `range` tells whether there was one.
#ifndef HALFBYTE_H
#define HALFBYTE_H

#include <stdint.h>

#if defined(__GNUC__)
#define HB_EXPORT __attribute__((visibility("default")))
#else
#define HB_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ---- the library (dispatch.cpp) -------------------------------------------------------------------------------------

// Types of the numbers that are encoded. The encoders take the first three; they compute in float32.
enum hb_dtype { HB_FLOAT32 = 0, HB_BFLOAT16 = 1, HB_FLOAT16 = 2, HB_FLOAT64 = 3 };

// torch's own loop: calls body(begin, end, context) for stretches of begin...end from its pool of threads.
typedef int32_t (*hb_parallel_for)(int64_t begin, int64_t end, int64_t grain,
                                   void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Hands over torch's loop; null (the state at the start) runs everything in the calling thread.
HB_EXPORT void hb_set_parallel_for(hb_parallel_for function);

// The instruction set in use: "avx512" (with VNNI), "avx2" or "portable". Chosen at the first call that needs it.
HB_EXPORT const char* hb_isa(void);

// Whether this processor and this build have that instruction set: 1 or 0.
HB_EXPORT int32_t hb_has_isa(const char* name);

// Uses that instruction set from now on; null chooses the best. Returns 0, or 1 if there is none of that name here.
HB_EXPORT int32_t hb_force_isa(const char* name);

// Compiler, target and a fingerprint of the sources, as one line of text.
HB_EXPORT const char* hb_build(void);

// ---- statistics (statistics.inc.cpp) --------------------------------------------------------------------------------

// The smallest and the largest of n numbers, in float32: out[0], out[1]; both NaN if any number is, both 0 for n = 0.
// A zero comes out positive. No float64.
HB_EXPORT void hb_value_range(const void* x, int32_t dtype, int64_t n, float* out);

// The means of |x| and of x^2: out[0], out[1]; 0 for n = 0. Sums are formed as hb_stable_sum says.
// scratch: 2 * ceil(n / 4096) doubles.
HB_EXPORT void hb_moments(const void* x, int32_t dtype, int64_t n, double* scratch, double* out);

// The sum in float64, in one order whatever the number of threads: rows of 4096, the last filled up with zeros, are
// folded in halves, x[i] + x[i + 2048] and so on down to one; the rows' sums are summed in the same way.
// scratch: ceil(n / 4096) doubles.
HB_EXPORT void hb_stable_sum(const void* x, int32_t dtype, int64_t n, double* scratch, double* out);

// ---- numbers to codes (quantize.inc.cpp) ----------------------------------------------------------------------------

// Whole numbers: clamp(rint((x - low) * inv_scale) + offset, bottom, top), ties to even; two's complement.
// low: null for nothing. bits: 1 to 8. range: where hb_value_range's result goes, from the same read; null for nowhere.
HB_EXPORT void hb_encode_grid(const void* x, int32_t dtype, int64_t n, const float* low, const float* inv_scale,
                              int32_t offset, int32_t bottom, int32_t top, int32_t bits, uint8_t* out, float* range);

// Formats with a sign and an exponent, in one (count = 1) or two (count = 2) formats; two logarithmic formats, the two
// phases of a gradient, come from one read.
// rules: for each format five numbers: {0, carry, shift, base, bits of the largest value} for a logarithmic format of
// radix 2 or 4 and four bits, where the code is clamp(((bits of |x|) + carry) >> shift, base, base + 7) - base; or
// {1, 0, 0, 0, 0} for E2M1.
HB_EXPORT void hb_encode_levels(const void* x, int32_t dtype, int64_t n, const float* inv_scale, int32_t count,
                                const int32_t* rules, uint8_t* out0, uint8_t* out1, float* range);

// ---- clips (clip.inc.cpp) -------------------------------------------------------------------------------------------

// Bits: low <= x <= high; and |x| == high among those. any_tie: 1 if any of the second kind is set, else 0.
HB_EXPORT void hb_clip_bits(const void* x, int32_t dtype, int64_t n, const float* low, const float* high,
                            uint8_t* inside, uint8_t* ties, int32_t* any_tie);

// hb_encode_grid (low 0, offset 0), hb_value_range and hb_clip_bits from one read.
HB_EXPORT void hb_encode_clipped(const void* x, int32_t dtype, int64_t n, const float* inv_scale, int32_t bottom,
                                 int32_t top, int32_t bits, const float* low, const float* high, uint8_t* out,
                                 float* range, uint8_t* inside, uint8_t* ties, int32_t* any_tie);

// The gradients of a clipped tensor, in place (zero outside), and of its clip, to out: the sum over the elements at or
// above it, minus, if the codes are signed, that over those at or below its negative.
// bits: 4 or 8. ties: null if there is none. scratch: ceil(n / 262144) doubles.
HB_EXPORT void hb_clip_backward(void* grad, int32_t dtype, int64_t n, const uint8_t* qdata, int32_t bits,
                                int32_t is_signed, const uint8_t* inside, const uint8_t* ties, double* scratch,
                                float* out);

// ---- random rounding (random.inc.cpp) -------------------------------------------------------------------------------

// halfbyte.rng.uniform's numbers. philox: the key's two words, then words 1 to 3 of the counter (step, layer, operand).
HB_EXPORT void hb_uniform(float* out, int64_t n, const uint32_t* philox);

// Random rounding of x * inv_scale, as halfbyte.kernels.reference.encode_stochastic says.
// kind and rule: 0 whole numbers {bottom, top, bits}; 1 E2M1, no rule; 2 logarithmic, four bits {log2 of the radix (1 or
// 2), bias, 1 for the odd phase}. noise: n multiples of 2^-24 in [0, 1), or null for hb_uniform's numbers by `philox`.
HB_EXPORT void hb_encode_random(const void* x, int32_t dtype, int64_t n, const float* inv_scale, int32_t kind,
                                const int32_t* rule, const float* noise, const uint32_t* philox, uint8_t* out);

// ---- the three GEMMs (gemm.inc.cpp, conv.inc.cpp) --------------------------------------------------------------------

// Packed codes and the whole numbers that they stand for.
struct hb_codes {
    const uint8_t* codes;
    int64_t numel;
    int32_t bits;        // of a code: up to 4, two to a byte; more, one to a byte
    int32_t flip;        // more than four bits: a code stands for (code ^ flip) - flip
    int32_t low, high;   // the smallest and the largest number, at most 4096 in magnitude
    int16_t table[16];   // up to four bits: the number of each code; code 0 stands for 0
};

// sums_BMN = a_BMK b_BKN, exact. Each operand is a batch of row-major matrices, whose rows run along K (a: M x K,
// b: N x K; *_along = 1) or across it (a: K x M, b: K x N; *_along = 0).
//   sums    (B, M, N): where `scale` is null and `wide` is null the sums; where `scale` is not, float32(sum) * scale, in
//           the same memory; where `wide` is not null it is used and left without meaning.
//   wide    (B, M, N) or null: takes the sums where K products may pass 2^31. `scale` is then ignored.
//   scale   one float32, or null.
//   method  0 chooses; 1 8-bit, 2 window, 3 16-bit numbers, where that can be.
// Returns the method taken.
HB_EXPORT int32_t hb_matmul(const struct hb_codes* a, int32_t a_along, const struct hb_codes* b, int32_t b_along,
                            int64_t batch, int64_t m, int64_t n, int64_t k, int32_t* sums, int64_t* wide,
                            const float* scale, int32_t method);

// A convolution in three spatial dimensions (depth, height, width), those that are missing of length 1. The input has
// groups * fan_in channels, the output groups * fan_out; all tensors are row-major, (N, C, D, H, W).
struct hb_conv_shape {
    int64_t images, groups, fan_in, fan_out;
    int64_t input[3], output[3], kernel[3], stride[3], padding[3], dilation[3];
};

// The sums of a convolution (a: input, b: weight -> output) or, if `gradient`, of its grad_input (a: grad_output,
// b: weight -> input). `sums`, `wide` and `scale` as for hb_matmul, except that `wide` leaves `sums` alone.
HB_EXPORT int32_t hb_convolve(const struct hb_codes* a, const struct hb_codes* b, const struct hb_conv_shape* shape,
                              int32_t gradient, int32_t* sums, int64_t* wide, const float* scale, int32_t method);

// The sums of grad_weight (a: grad_output, b: input): `sums` and `wide` are (O, taps, I), work space where `scale` is
// given; `result` then takes float32(sum) * scale as (O, I, taps). 2^31 must not be passed within 1,024 products, nor
// within one row of the output.
HB_EXPORT int32_t hb_convolve_weight(const struct hb_codes* a, const struct hb_codes* b,
                                     const struct hb_conv_shape* shape, int32_t* sums, int64_t* wide,
                                     const float* scale, float* result, int32_t method);

#ifdef __cplusplus
}
#endif

#endif
