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
// radix 2 or 4 and four bits, where the code is clamp(((bits of |x|) + carry) >> shift, base, base + 7) - base;
// {1, 0, 0, 0, 0} for E2M1; or, for any float of up to eight bits with subnormal numbers, {2, bits of the mantissa, bias,
// bits of the largest value, bits}.
HB_EXPORT void hb_encode_levels(const void* x, int32_t dtype, int64_t n, const float* inv_scale, int32_t count,
                                const int32_t* rules, uint8_t* out0, uint8_t* out1, float* range);

// ---- clips (clip.inc.cpp) -------------------------------------------------------------------------------------------

// Bits: low <= x <= high; and |x| == high among those. any_tie: 1 if any of the second kind is set, else 0.
HB_EXPORT void hb_clip_bits(const void* x, int32_t dtype, int64_t n, const float* low, const float* high,
                            uint8_t* inside, uint8_t* ties, int32_t* any_tie);

// hb_encode_grid (inv_scale 1 / clip * top, in float64 and then rounded), hb_value_range and hb_clip_bits (high clip, low
// its negative, or 0 for bottom = 0) from one read.
// range: the range, and 1 if any element is at the clip, else 0. inside: null for no bits.
HB_EXPORT void hb_encode_clipped(const void* x, int32_t dtype, int64_t n, const float* clip, int32_t bottom,
                                 int32_t top, int32_t bits, uint8_t* out, float* range, uint8_t* inside, uint8_t* ties);

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
    // 8-bit floats: for each of 256 codes the 16 lowest bits, with a sign, of what it stands for, then the next 16, then
    // what is left. From these come planes of 8 bits: a code stands for the sum of 2^(8 i) times its number of plane i.
    // Else null. Only for the first operand, with a second one of at most 32 in magnitude.
    const int16_t* planes;
    int32_t plane;       // the one that is read; hb_convolve_weight reads all that are not zero
};

// sums_BMN = a_BMK b_BKN, exact. Each operand is a batch of row-major matrices, whose rows run along K (a: M x K,
// b: N x K; *_along = 1) or across it (a: K x M, b: K x N; *_along = 0).
//   panels  null, or what hb_matmul_panels left of b for the method that will be taken (hb_matmul_method tells), on the
//           same instruction set. Only for B = 1 and without `wide`.
//   sums    (B, M, N): where the scales and `wide` are null the sums; where the scales are not, float32(sum) * scale, in
//           the same memory; where `wide` is not null it is used and left without meaning.
//   wide    (B, M, N) or null: takes the sums where K products may pass 2^31. The scales are then ignored.
//   scale_a, scale_b, unit: scale = float32(scale_a * scale_b * unit), multiplied in float64. Both null for sums.
//   method  0 chooses; 1 8-bit, 2 window, 3 16-bit numbers, where that can be.
// Returns the method taken.
HB_EXPORT int32_t hb_matmul(const struct hb_codes* a, int32_t a_along, const struct hb_codes* b, int32_t b_along,
                            const void* panels, int64_t batch, int64_t m, int64_t n, int64_t k, int32_t* sums,
                            int64_t* wide, const float* scale_a, const float* scale_b, double unit, int32_t method);

// The method that hb_matmul takes for these operands and N columns.
HB_EXPORT int32_t hb_matmul_method(const struct hb_codes* a, const struct hb_codes* b, int64_t n, int32_t method);

// Planes of an 8-bit float's codes that are not zero: all below the result.
HB_EXPORT int32_t hb_plane_count(const struct hb_codes* q);

// Brings one matrix b_KN into the layout that hb_matmul multiplies, for products with many a. Methods 1 and 2 share one
// layout. Returns the bytes that it takes; where `panels` is null that is all it does.
HB_EXPORT int64_t hb_matmul_panels(const struct hb_codes* b, int32_t b_along, int64_t n, int64_t k, int32_t method,
                                   void* panels);

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

// The sums of grad_weight (a: grad_output, b: input): where `result` is given it takes float32(sum) * scale as
// (O, I, taps); else `wide`, or where that is null `sums`, takes the sums as (O, taps, I). 2^31 must not be passed
// within 1,024 products, nor within one row of the output.
HB_EXPORT int32_t hb_convolve_weight(const struct hb_codes* a, const struct hb_codes* b,
                                     const struct hb_conv_shape* shape, int32_t* sums, int64_t* wide,
                                     const float* scale, float* result, int32_t method);

// ---- what is kept for the backward pass (stash.inc.cpp) -------------------------------------------------------------

// Codes of 4 or 8 bits, rounded at random, of blocks of 128 numbers: of each block its minimum and step, two bfloat16, go
// to `steps`; a number is minimum + code * step. halfbyte.kernels.reference.stash_encode says how.
// philox: as for hb_uniform. finite: 1 if all numbers, minima and steps were; where it is 0 the codes mean nothing.
HB_EXPORT void hb_stash_encode(const void* x, int32_t dtype, int64_t n, int32_t bits, const uint32_t* philox,
                               uint8_t* out, uint16_t* steps, int32_t* finite);

// The numbers of hb_stash_encode's codes.
HB_EXPORT void hb_stash_decode(const uint8_t* codes, const uint16_t* steps, int64_t n, int32_t bits, float* out);

// The larger of x and 0, and one bit for each number that is not at or below 0. `out` may be x.
HB_EXPORT void hb_relu(const float* x, int64_t n, float* out, uint8_t* bits);

// grad where the bit is set, and 0.
HB_EXPORT void hb_relu_backward(const float* grad, const uint8_t* bits, int64_t n, float* out);

// ---- batch norm (norm.inc.cpp) --------------------------------------------------------------------------------------

// Tensors are planes of `size` numbers one after another, that of image i and channel c at i * channels + c. Sums over a
// plane are formed as halfbyte.kernels.reference.plane_moments says.

// The sums of x and of x^2 over each plane: out[2 p], out[2 p + 1].
HB_EXPORT void hb_plane_moments(const float* x, int64_t planes, int64_t size, double* out);

// out = x * factor + shift, a number of each for a channel, and hb_stash_encode's codes of x, from one read. positive:
// null, or where hb_relu's bits of the result go; it is then passed through hb_relu, too.
HB_EXPORT void hb_norm_forward(const float* x, int64_t planes, int64_t channels, int64_t size, const float* factor,
                               const float* shift, int32_t bits, const uint32_t* philox, float* out, uint8_t* codes,
                               uint16_t* steps, uint8_t* positive, int32_t* finite);

// The sums of grad and of grad * (decoded x) over each plane. positive: null, or what grad passes through first.
HB_EXPORT void hb_norm_sums(const float* grad, const uint8_t* codes, const uint16_t* steps, int32_t bits,
                            const uint8_t* positive, int64_t planes, int64_t size, double* out);

// out = grad * of_grad + (x * of_x + shift), a number of each for a channel, x decoded and grad as above.
HB_EXPORT void hb_norm_backward(const float* grad, const uint8_t* codes, const uint16_t* steps, int32_t bits,
                                const uint8_t* positive, int64_t planes, int64_t channels, int64_t size,
                                const float* of_grad, const float* of_x, const float* shift, float* out);

// ---- block formats (blocks.inc.cpp) ----------------------------------------------------------------------------------

// A tensor is (outer, length, inner), cut along `length` into blocks of `block` elements, the last one perhaps shorter.
// A grid holds one thing for each block: (outer, ceil(length / block), inner).

// The largest magnitude of each block, to a grid; NaN or infinite where an element is. top: the largest of all (0 for
// none), or null.
HB_EXPORT void hb_block_amax(const void* x, int32_t dtype, int64_t outer, int64_t length, int64_t inner, int64_t block,
                             float* out, float* top);

// NVFP4's scales, as halfbyte.kernels.reference.nv_scales says, of a grid of n largest magnitudes: the tensor's scale,
// the E4M3 codes of the blocks' and what their elements are multiplied by. `inverse` may be `amax`.
HB_EXPORT void hb_nv_scales(const float* amax, int64_t n, float limit, float largest, float* scale, uint8_t* codes,
                            float* inverse);

// MXFP4's E8M0 codes, and factor over the scale. rule: 0 floor, 1 ceil, 2 even, 3 rceil.
HB_EXPORT void hb_mx_scales(const float* amax, int64_t n, int32_t rule, float factor, uint8_t* codes, float* inverse);

// E2M1 codes of x times its block's number in the grid `inverse`; with `philox` rounded at random, as hb_encode_random's
// kind 1 is.
HB_EXPORT void hb_encode_in_blocks(const void* x, int32_t dtype, int64_t outer, int64_t length, int64_t inner,
                                   int64_t block, const float* inverse, const uint32_t* philox, uint8_t* out);

// ---- rotations (rotate.inc.cpp) -------------------------------------------------------------------------------------

// Groups of `size` (a power of two, at most 256) along `length` times Sylvester's matrix, as
// halfbyte.kernels.reference.rotate says. signs: `size` of them or null, multiplied before or, if `back`, after.
// factors[i]: what a group of 2^i is multiplied by.
HB_EXPORT void hb_rotate(const float* x, int64_t outer, int64_t length, int64_t inner, int32_t size, const float* signs,
                         int32_t back, const float* factors, float* out);

// ---- products of numbers (numbers.inc.cpp) ---------------------------------------------------------------------------

// The scales of blocks as numbers: E4M3 codes, or if `powers` E8M0 codes over the largest one, whose exponent is
// returned (else 0). Powers of two that are more than 60 below the largest become 0.
HB_EXPORT int32_t hb_block_factors(const uint8_t* codes, int64_t n, int32_t powers, float* out);

// The whole numbers of codes times their blocks' factors (null: none). values: 256 numbers for codes of more than four
// bits, or null where those are whole numbers. Returns 0 if a number other than zero met a factor of zero, else 1.
HB_EXPORT int32_t hb_decode_numbers(const struct hb_codes* q, const float* values, int64_t outer, int64_t length,
                                    int64_t inner, int64_t block, const float* factors, float* out);

// The products below are of exact float32 numbers, summed in float64 in an order that depends on shapes alone.
//   flush   0; or a number of neighbors along the reduction whose products are whole multiples of one unit with a sum
//           below 2^24 of them: float32 adds those up first. For a convolution along the channels of a group, for its
//           wgrad along the images. At most 512.
//   power, scales, twice   the result is float32(sum * 2^power * scales); with `twice` the float32 product of
//           float32(sum * 2^power) and float32(scales).

// Brings one matrix b into the layout that hb_matmul_numbers multiplies. Returns the bytes that it takes; where `panels`
// is null that is all it does.
HB_EXPORT int64_t hb_number_panels(const float* b, int32_t b_along, int64_t n, int64_t k, int64_t flush, void* panels);

// Matrices as for hb_matmul. panels: null, or hb_number_panels' for a batch of 1.
HB_EXPORT void hb_matmul_numbers(const float* a, int32_t a_along, const float* b, int32_t b_along, const void* panels,
                                 int64_t batch, int64_t m, int64_t n, int64_t k, int64_t flush, int32_t power,
                                 double scales, int32_t twice, float* out);

// fprop (a: input, b: weight) or, if `gradient`, dgrad (a: grad_output, b: weight) of a convolution.
HB_EXPORT void hb_convolve_numbers(const float* a, const float* b, const struct hb_conv_shape* shape, int32_t gradient,
                                   int64_t flush, int32_t power, double scales, int32_t twice, float* out);

// wgrad (a: grad_output, b: input), as (O, I, taps).
HB_EXPORT void hb_convolve_weight_numbers(const float* a, const float* b, const struct hb_conv_shape* shape,
                                          int64_t flush, int32_t power, double scales, int32_t twice, float* out);

#ifdef __cplusplus
}
#endif

#endif
