/*
 * The kernel table.  scalar.c is the specification; every other table starts from it (or from the next lower ISA) and
 * overrides entries, so there are no holes.  Each comment below is the contract that every ISA must meet.
 *
 *   exact      same bits on every ISA
 *   row-exact  the result of one row does not depend on which other rows or how many are in the call (same ISA);
 *              between ISAs within the stated bound
 *
 * NaN and Inf: conversions pass them on; sign_pack treats NaN as bit 0 (callers refuse non-finite values before).  Where
 * arithmetic meets NaN operands, which payload comes out is open.
 * Inputs need no alignment (tensors of mapped files may have none), outputs that of their element.  n may be 0.  Inputs and outputs must not overlap
 * unless stated.
 */
#ifndef OBM_KERNELS_H
#define OBM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

typedef struct obm_kernels {
    const char *isa;   /* "scalar", "avx2", "avx512", "neon" */

    /* exact.  f16 -> f32 makes a NaN quiet, bf16 -> f32 keeps its bits; f32 -> bf16/f16 rounds to nearest even,
     * keeps infinities, and makes any NaN a quiet one with its upper payload bits. */
    void (*bf16_to_f32)(float *dst, const uint16_t *src, size_t n);
    void (*f16_to_f32)(float *dst, const uint16_t *src, size_t n);
    void (*f32_to_bf16)(uint16_t *dst, const float *src, size_t n);
    void (*f32_to_f16)(uint16_t *dst, const float *src, size_t n);

    /* exact.  d = a - b in f32; d may be a or b. */
    void (*sub_f32)(float *d, const float *a, const float *b, size_t n);
    /* exact.  The same of two bf16 arrays, widened as by bf16_to_f32. */
    void (*sub_bf16)(float *d, const uint16_t *a, const uint16_t *b, size_t n);
    /* exact.  y += a * x, product rounded, then sum rounded (no fma). */
    void (*axpy_f32)(float *y, float a, const float *x, size_t n);

    /* exact.  Index of the first NaN or Inf, n if all are finite. */
    size_t (*find_nonfinite)(const float *x, size_t n);

    /* exact.  Reductions over at most 4096 elements: 16 lanes of f64, element i goes to lane i % 16 in increasing i, then
     * lanes are summed ((0+8)+(4+12)) + ((2+10)+(6+14)) and so on: for step = 8, 4, 2, 1: lane[j] += lane[j + step], j < step.
     * abs_sum: sum |x|.  dot: sum x*y, products exact in f64.  Longer ranges are cut at multiples of 4096 by the caller
     * and joined with obm__tree_sum. */
    double (*abs_sum)(const float *x, size_t n);
    double (*dot)(const float *x, const float *y, size_t n);
    /* exact.  Number of elements equal to 0. */
    size_t (*count_zero)(const float *x, size_t n);

    /* exact.  Bit i % 8 (LSB first) of byte i / 8 is 1 iff d[i] >= 0 (-0.0 counts as >= 0).  Bits from n up to the end of
     * the last byte are 0.  Writes ceil(n / 8) bytes. */
    void (*sign_pack)(uint8_t *bits, const float *d, size_t n);
    /* exact.  y[i] += bit i ? alpha : -alpha. */
    void (*sign_axpy)(float *y, const uint8_t *bits, float alpha, size_t n);

    /* exact.  Counts |x| by the upper 15 bits under the sign of its f32 pattern: histogram[(bits >> 16) & 0x7fff]++. */
    void (*magnitude_histogram)(uint32_t *histogram /* 32768 */, const float *x, size_t n);

    /* row-exact.  y[r] = sum_j w[r * ld + j] * x[j], r < rows, f32 accumulation in any lane order with fma;
     * |error| <= n * 2^-23 * sum |w x| against f64. */
    void (*rows_bf16)(float *y, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t n);
    void (*rows_f16)(float *y, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t n);
    void (*rows_f32)(float *y, const float *w, size_t ld, size_t rows, const float *x, size_t n);

    /* The same for several vectors, so that weights are widened once for all of them: y[t * ldy + r], t < tokens, has the
     * bits that rows_* of the same table gives for row r and the vector x + t * ldx. */
    void (*batch_bf16)(float *y, size_t ldy, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t ldx,
                       size_t tokens, size_t n);
    void (*batch_f16)(float *y, size_t ldy, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t ldx,
                      size_t tokens, size_t n);
    void (*batch_f32)(float *y, size_t ldy, const float *w, size_t ld, size_t rows, const float *x, size_t ldx,
                      size_t tokens, size_t n);
} obm_kernels;

/* Tables that this CPU can run, worst first; ends with NULL.  For tests and for the context. */
const obm_kernels *const *obm_kernels_list(void);
/* By name among those; NULL if unknown or not available here. */
const obm_kernels *obm_kernels_find(const char *isa);

#endif
