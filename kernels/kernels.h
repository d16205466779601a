/*
 * The kernel table.  scalar.c is the specification; every other table starts from it (or from the next lower ISA) and
 * overrides entries, so there are no holes.  Each comment below is the contract that every ISA must meet.
 *
 *   exact      same bits on every ISA
 *   row-exact  the result of one row does not depend on which other rows or how many are in the call (same ISA);
 *              between ISAs within the stated bound
 *
 * NaN and Inf: conversions pass them on; sign_pack treats NaN as bit 0 (callers refuse non-finite values before). Where
 * arithmetic meets NaN operands, which payload comes out is open.
 * Inputs need no alignment (tensors of mapped files may have none), outputs that of their element.  n may be 0.  Inputs
 * and outputs must not overlap unless stated.
 */
#ifndef OBM_KERNELS_H
#define OBM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/*
 * Planes in block layout: 64 rows at a time; inside a block, for each byte column c of the packed rows (row-major, LSB
 * first, padded with zero bits to whole groups of 64 columns) 64 bytes, byte i of them being byte c of row i.  A block
 * of n_bytes byte columns takes 64 * n_bytes bytes.  Vectors are quantised in tiles of 2048 columns, each with a scale.
 */
enum {
    OBM__PLANE_ROWS = 64,   /* rows of a block */
    OBM__PLANE_TILE = 2048, /* columns with one scale; 2048 / 8 = 256 is also what 16-bit sums of bytes can hold */
    OBM__PLANE_GROUP = 64,  /* columns whose |q| are summed together */
    OBM__PLANE_TABLE = 64,  /* bytes of lookup table per byte column */
    OBM__PLANE_STEPS = 4095 /* |q| at most, so that four of them stay under 2^14: two limbs of 7 bits */
};

/*
 * z12: bf16 matrices in 12 bits per weight, without loss.  A bf16 is a low byte (last exponent bit and mantissa), kept
 * as it is, and a high byte (sign and the rest of the exponent), of which weights of one row need few: it becomes a
 * 4-bit index into the row's table of its 16 most frequent ones.  Weights with another high byte are escapes, listed
 * aside.
 *
 * A row's 96 bytes of 64 columns: 32 low bytes of columns 0..31, 32 of columns 32..63, and 32 bytes of indices, low
 * nibble for the first half, high nibble for the second.  Inside a half the columns lie as 0-7, 16-23, 8-15, 24-31:
 * unpacking inside 128-bit lanes then gives them in order.
 */
enum {
    OBM__Z12_COLUMNS = 64, /* of a block */
    OBM__Z12_BYTES = 96,   /* of one row in a block */
    OBM__Z12_TABLE = 16,   /* high bytes of a row */
    OBM__Z12_UNPACKED = 16 /* rows that batch_z12 unpacks together: few enough for the nearest caches */
};

enum {
    OBM__GEMM_ROWS = 32,  /* of a strip */
    OBM__GEMM_HALF = 16,  /* whose columns fill cache lines: AVX-512 takes both halves at a time, the others one */
    OBM__GEMM_BLOCK = 256 /* columns: 16 rows of them stay in the nearest cache */
};

typedef struct obm__z12_escape {
    uint32_t block; /* ascending inside a row */
    uint8_t col;    /* in the block */
    uint16_t value;
} obm__z12_escape;

typedef struct obm__z12 {
    uint8_t *codes;            /* (rows, blocks, 96) */
    uint8_t *tables;           /* (rows, 16) */
    obm__z12_escape *escapes;  /* of all rows, in order */
    uint32_t *first_escape;    /* (rows + 1) */
    size_t rows, cols, blocks; /* blocks of a row: ceil(cols / 64); columns behind cols have any value */
} obm__z12;

/* What agree_f32 and sum_f32 make of the task vectors of one stretch of elements. */
typedef struct obm__agreement {
    const float *deltas; /* (count), `stride` apart */
    size_t count, stride;
    const float *weights, *votes; /* (count) */
    const float *base;            /* nullable: added in the end */
    float lambda;
    float zero_sign; /* agree_f32 only, with votes and normalize */
    int normalize;
    float divisor; /* sum_f32 only */
} obm__agreement;

/* What merge_bf16 and vote_bf16 make of one stretch of bf16 tensors: delta_bf16, masks, factors and agree_f32 or
 * sum_f32 in one pass, of which no lane goes to memory. */
enum { OBM__TILE_MODELS = 8 }; /* at most */
typedef struct obm__tile {
    const uint16_t *const *models; /* (count) */
    const uint16_t *base;          /* nullable: subtracted from the models, and added in the end */
    size_t count;
    const uint8_t *const *keep;   /* nullable; (count) bits as sign_pack writes them, or NULL: where it is 0, +0 */
    const uint32_t *least;        /* (count), of delta_bf16, as is `round` */
    const float *factors;         /* nullable; (count): of the masked deltas */
    const float *weights, *votes; /* (count); these as in obm__agreement */
    float lambda, zero_sign, divisor;
    int round, agree, normalize; /* agree: as agree_f32, else as sum_f32 */
} obm__tile;

/* What choose_sizes decides by. */
typedef struct obm__choice {
    uint16_t from, step, keep[16], drop[16];
} obm__choice;

typedef struct obm_kernels {
    const char *isa; /* "scalar", "avx2", "avx512", "neon" */

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

    /* exact.  out[i] = the sum of w[j] * c[j][i], j < count in order, rounded to f32 once: products and sums are
     * rounded in f64 (no fma).  count >= 1. */
    void (*mix_f32)(float *out, const float *const *c, const double *w, size_t count, size_t n);

    /* exact.  Index of the first NaN or Inf, n if all are finite. */
    size_t (*find_nonfinite)(const float *x, size_t n);
    /* exact.  Index of the first element above a, or NaN; n if there is none. */
    size_t (*find_above)(const float *x, float a, size_t n);

    /* exact.  Reductions over at most 4096 elements: 16 lanes of f64, element i goes to lane i % 16 in increasing i,
     * then lanes are summed ((0+8)+(4+12)) + ((2+10)+(6+14)) and so on: for step = 8, 4, 2, 1:
     * lane[j] += lane[j + step], j < step.  abs_sum: sum |x|.  dot: sum x*y, products exact in f64.  Longer ranges are
     * cut at multiples of 4096 by the caller and joined with obm__tree_sum. */
    double (*abs_sum)(const float *x, size_t n);
    double (*dot)(const float *x, const float *y, size_t n);
    /* exact.  Number of elements equal to 0. */
    size_t (*count_zero)(const float *x, size_t n);

    /* exact.  Bit i % 8 (LSB first) of byte i / 8 is 1 iff d[i] >= 0 (-0.0 counts as >= 0).  Bits from n up to the end
     * of the last byte are 0.  Writes ceil(n / 8) bytes. */
    void (*sign_pack)(uint8_t *bits, const float *d, size_t n);
    /* exact.  The signs of d = a - b as sub_bf16 has it, as sign_pack has them; back: abs_sum of d. */
    double (*sign_sum_bf16)(uint8_t *bits, const uint16_t *a, const uint16_t *b, size_t n);
    /* exact.  y[i] += bit i ? alpha : -alpha. */
    void (*sign_axpy)(float *y, const uint8_t *bits, float alpha, size_t n);

    /* exact.  Counts |x| by the upper 15 bits under the sign of its f32 pattern: histogram[(bits >> 16) & 0x7fff]++. */
    void (*magnitude_histogram)(uint32_t *histogram /* 32768 */, const float *x, size_t n);

    /* Static merges. */

    /* exact.  d = a - b (b NULL: a) of two bf16 arrays in f32, rounded to bf16 where `round` is not 0; what then has a
     * magnitude pattern (the f32 pattern under the sign) below `least` becomes +0.  Returns the first index whose
     * difference is not finite, rounded if asked for; n if all are.  From there on d has any value. */
    size_t (*delta_bf16)(float *d, const uint16_t *a, const uint16_t *b, int round, uint32_t least, size_t n);
    /* exact.  counts[k] += number of magnitude patterns >= from[k], k < 8, from[k] <= 2^31;  n < 2^31. */
    void (*count_from)(uint32_t *counts, const uint32_t *from, const float *x, size_t n);
    /* exact.  Of those whose upper 15 bits under the sign are `high`: histogram[lower 16 bits]++. */
    void (*low_histogram)(uint32_t *histogram /* 65536 */, uint32_t high, const float *x, size_t n);
    /* exact.  Of the same, as lows_bf16 lists them; n < 2^16. */
    void (*lows_f32)(uint16_t *out, size_t *found, size_t *zeros, uint32_t high, const float *x, size_t n);
    /* exact.  What has a magnitude pattern below `least` <= 2^31 becomes +0. */
    void (*keep_from)(float *x, uint32_t least, size_t n);
    /* exact.  Per element, for finite deltas: s = 0 + votes[0] * d[0] + ... in order, each product and sum rounded; s =
     * zero_sign where it is 0.  Models agree whose votes[t] * d[t] is not 0 and has the sign of s; m and w are their
     * sums of weights[t] * d[t] and weights[t], from +0 in order.  Where `normalize` is not 0, m /= w (w = 0: 1); then
     * out = base + m * lambda, without base m * lambda. */
    void (*agree_f32)(float *out, const obm__agreement *a, size_t n);
    /* exact.  m = 0 + weights[0] * d[0] + ... in order, then m / divisor; out as in agree_f32. */
    void (*sum_f32)(float *out, const obm__agreement *a, size_t n);
    /* exact.  f32_to_bf16, and the first index whose result is not finite, n if all are; from there on out has any
     * value. */
    size_t (*store_bf16)(uint16_t *out, const float *x, size_t n);

    /* exact.  The same over bf16 tensors as they are.  Each returns the first index with a difference (of merge_bf16
     * also: a result) that is not finite, rounded if asked for; n if there is none.  If there is one, what was written
     * or counted has any value. */

    /* counts[k] += number of differences, as delta_bf16 makes them, whose upper 15 bits under the sign are >= from[k],
     * k < 8, from[k] < 2^15;  n < 2^31. */
    size_t (*count_bf16)(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b, int round,
                         size_t n);
    /* Of the differences a - b (b NULL: a), not rounded, whose upper 15 bits under the sign are `high`, the lower halves
     * that are not 0, in order; out has room for n of them, *found: how many there are, *zeros: how many are 0;
     * n < 2^16. */
    size_t (*lows_bf16)(uint16_t *out, size_t *found, size_t *zeros, uint32_t high, const uint16_t *a,
                        const uint16_t *b, size_t n);
    /* out[i] = the upper 15 bits under the sign of difference i, as delta_bf16 makes it; *most: the largest of them, 0
     * where n is 0. */
    size_t (*sizes_bf16)(uint16_t *out, uint16_t *most, const uint16_t *a, const uint16_t *b, int round, size_t n);
    /* The merged stretch as bf16. */
    size_t (*merge_bf16)(uint16_t *out, const obm__tile *t, size_t n);
    /* *votes += number of elements whose sum of votes[t] * d[t] is above 0, less that of those below;  n < 2^31. */
    size_t (*vote_bf16)(int64_t *votes, const obm__tile *t, size_t n);

    /* exact.  Draws of a counter: z = mix(state + (i + 1) * 0x9e3779b97f4a7c15) modulo 2^64, where mix is the finaliser
     * of core/merge/random.c.  random_bits: bit i, LSB first, is z >> 11 < limit, limit < 2^53; bits from n up to the
     * end of the last byte are 0.  random_tops: out[i] = z >> 32; random_highs: z >> 48. */
    void (*random_bits)(uint8_t *bits, uint64_t state, uint64_t limit, size_t n);
    void (*random_tops)(uint32_t *out, uint64_t state, size_t n);
    void (*random_highs)(uint16_t *out, uint64_t state, size_t n);
    /* exact.  With c = min((max(highs[i], from) - from) * step >> 16, 15), sizes[i] < 2^15 and tables up to 2^15 - 1:
     * bit i of `kept` is sizes[i] >= keep[c], and bit i of `open` is that neither this nor sizes[i] < drop[c] holds.
     * Bits from n up to the end of the last byte are 0. */
    void (*choose_sizes)(uint8_t *kept, uint8_t *open, const uint16_t *highs, const uint16_t *sizes,
                         const obm__choice *c, size_t n);
    /* exact.  abs_sum of the bf16 whose patterns are sizes, all finite, n <= 4096, and of those whose bit is 1. */
    void (*sum_sizes)(double *sums /* 2 */, const uint16_t *sizes, const uint8_t *keep, size_t n);

    /* row-exact.  y[r] = sum_j w[r * ld + j] * x[j], r < rows, f32 accumulation in any lane order with fma;
     * |error| <= n * 2^-23 * sum |w x| against f64. */
    void (*rows_bf16)(float *y, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t n);
    void (*rows_f16)(float *y, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t n);
    void (*rows_f32)(float *y, const float *w, size_t ld, size_t rows, const float *x, size_t n);

    /* The same for several vectors, so that weights are widened once for all of them: y[t * ldy + r], t < tokens, has
     * the bits that rows_* of the same table gives for row r and the vector x + t * ldx. */
    void (*batch_bf16)(float *y, size_t ldy, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t ldx,
                       size_t tokens, size_t n);
    void (*batch_f16)(float *y, size_t ldy, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t ldx,
                      size_t tokens, size_t n);
    void (*batch_f32)(float *y, size_t ldy, const float *w, size_t ld, size_t rows, const float *x, size_t ldx,
                      size_t tokens, size_t n);

    /* exact.  With e(x), the exponential within 2^-22 of itself (and 2^-149 where it is denormal), 0 for -Inf, Inf from
     * 88.73 on, NaN for NaN. */

    /* exact.  gate = gate / (1 + e(-gate)) * up. */
    void (*silu_mul)(float *gate, const float *up, size_t n);
    /* exact.  The same with e(gate * u), u = -2 s (1 + 0.044715 gate^2) as one fma of gate^2, s = sqrt(2 / pi): the tanh
     * form of GELU, since (1 + tanh(x)) / 2 = 1 / (1 + exp(-2 x)). */
    void (*gelu_mul)(float *gate, const float *up, size_t n);
    /* exact.  x = e(x - max), and their sum, n <= 4096, as abs_sum has it. */
    double (*exp_sum)(float *x, float max, size_t n);
    /* exact.  x *= scale, and the largest of them, -Inf where n is 0; any value where one is NaN, any zero where it is 0. */
    float (*scale_max)(float *x, float scale, size_t n);
    /* exact.  x[i], x[i + pairs] = x[i] * c - x[i + pairs] * s, x[i + pairs] * c + x[i] * s with c = cosine[i], s = sine[i];
     * each product rounded, then the sum. */
    void (*rotate)(float *x, const float *cosine, const float *sine, size_t pairs);
    /* exact.  out = (weight + offset) * (x * scale), each rounded; out may be x. */
    void (*norm_mul)(float *out, const float *x, const float *weight, float scale, float offset, size_t n);
    /* exact.  out[i] += w[0] * rows[i], then w[1] * rows[ld + i] and so on; each product rounded, then the sum. */
    void (*mix_rows)(float *out, const float *w, const float *rows, size_t ld, size_t count, size_t n);

    /* Prompts: rows in strips of 32, in each half of a strip column by column, so that a run reads one stream. */

    /* exact.  packed (2, n, 16): packed[(r / 16 * n + j) * 16 + r % 16] = rows[r * ld + j]; rows n_rows .. 31 become 0.
     */
    void (*gemm_pack)(float *packed, const float *rows, size_t ld, size_t n_rows, size_t n);
    /* row-exact, and so for vectors: y[t * ldy + r] depends on row r and vector t alone.  r < 32 * strips, t < tokens;
     * packed (strips, 2, n, 16).  Columns are summed in increasing order, with or without fma, by blocks of 256 whose sums are added
     * in order; the bound of rows_f32 holds. */
    void (*gemm)(float *y, size_t ldy, const float *packed, size_t strips, const float *x, size_t ldx, size_t tokens,
                 size_t n);
    /* row-exact as gemm, of products of bf16: a pair holds column 2j below and 2j + 1 above, n and ldx count pairs, gemm_pack
     * packs them too.  Products and sums are of f32; numbers below 2^-126 may count as 0; in which order the columns are summed is
     * the instruction's.  Its bound is gemm's, on bf16. */
    void (*gemm_pairs)(float *y, size_t ldy, const uint32_t *packed, size_t strips, const uint32_t *x, size_t ldx,
                       size_t tokens, size_t n);

    /* exact.  One row w to codes (blocks, 96), table (16) and escapes.  Returns how many escapes there are; of more than
     * room the first room are written.  The high bytes of a table stand by falling frequency, equal ones by value. */
    size_t (*z12_encode)(uint8_t *codes, uint8_t *table, obm__z12_escape *escapes, size_t room, const uint16_t *w,
                         size_t cols);
    /* exact.  And back: rows [row, row + rows) to out, ld apart. */
    void (*z12_unpack)(uint16_t *out, size_t ld, const obm__z12 *w, size_t row, size_t rows);
    /* The bits that rows_bf16 of the same table gives for rows [row, row + rows) of the matrix. */
    void (*rows_z12)(float *y, const obm__z12 *w, size_t row, size_t rows, const float *x);
    /* And those of batch_bf16.  unpacked: scratch of OBM__Z12_UNPACKED rows of w->cols elements. */
    void (*batch_z12)(float *y, size_t ldy, const obm__z12 *w, size_t row, size_t rows, const float *x, size_t ldx,
                      size_t tokens, uint16_t *unpacked);

    /* Planes.  n_bytes is a multiple of 8 everywhere. */

    /* exact.  Packed rows (row r at rows + r * stride) to one block; rows n_rows .. 63 become 0.  1 <= n_rows <= 64. */
    void (*plane_repack)(uint8_t *block /* 64 * n_bytes */, const uint8_t *rows, size_t stride, size_t n_rows,
                         size_t n_bytes);
    /* exact.  And back: all 64 rows. */
    void (*plane_unpack)(uint8_t *rows, size_t stride, const uint8_t *block, size_t n_bytes);

    /*
     * exact.  A vector in fixed point.  Per tile: m = max |x|, q = x * (4095 / m) rounded to nearest even (the current
     * rounding mode must be that), scale = m / 4095.  A tile of zeros has scale 0, a tile with a NaN or Inf has scale
     * NaN and every q = 0: what is multiplied with it comes out NaN.  Columns from cols to a whole group have q = 0.
     *
     * For 4 columns the table holds U[e] = sum over k of (bit k of e ? max(q_k, 0) : max(-q_k, 0)), e = 0..15, at most
     * 4 * 4095 < 2^14, as two limbs of 7 bits: byte column c has the 64 bytes
     *     U & 127 of its low nibble, U & 127 of its high nibble, U >> 7 of the low nibble, U >> 7 of the high one.
     * As max(q, 0) - max(-q, 0) = q and their sum is |q|:  sum of +-q = 2 * sum of U - sum of |q|.
     *
     * tables: 64 bytes per byte column;  scales: one per tile;  abs_sums: sum |q|, one per group.  Tiles are
     * independent: a caller may pass them one by one (x + 2048 t, tables + 16384 t, scales + t, abs_sums + 32 t).
     */
    void (*plane_tables)(uint8_t *tables, float *scales, int32_t *abs_sums, const float *x, size_t cols);

    /*
     * exact.  sums[r] = sum over the columns of s_r * q, where s_r = +1 if the XOR of the planes' bits is 1, else -1:
     * for an odd number of planes that is the product of their signs, since with sign = -(-1)^bit it is
     * -(-1)^(sum of bits).  planes: n (1, 3, 5 or 7) pointers into blocks, at the first byte column; n_bytes <= 256,
     * all inside one tile; tables and abs_sums start at the same column.  Sums of ranges add up to the sum of the tile
     * (|sum| < 2^24, exact as float), and y = scale * (float)sum, tiles in order, is the product.
     *
     * Against f64: |scale * sum - sum of +-x| <= m / 8170 per column: q is within 1/2 + 4095 * 2^-23 of x * 4095 / m
     * (two roundings), and the rounding of m / 4095 adds 4095 * 2^-24, together < 0.5008 steps of m / 4095.  (Where m
     * is below 2^-100, m / 4095 may be denormal: 2^-138 per column more.)
     *
     * ahead: NULL, or memory that is wanted next; one cache line of it is asked for per byte column.  It need not
     * exist.
     */
    void (*plane_sums)(int32_t *sums /* 64 */, const uint8_t *const *planes, int n, size_t n_bytes,
                       const uint8_t *tables, const int32_t *abs_sums, const void *ahead);

    /* exact.  y[i] += bit i of the XOR of n packed rows ? c : -c;  n is odd and at most 7. */
    void (*plane_add)(float *y, const uint8_t *const *bits, int n, float c, size_t cols);
} obm_kernels;

/* Tables that this CPU can run, worst first; ends with NULL.  For tests and for the context. */
const obm_kernels *const *obm_kernels_list(void);
/* By name among those; NULL if unknown or not available here. */
const obm_kernels *obm_kernels_find(const char *isa);
/* Whether rows_z12 takes less time than rows_bf16 from memory: measured on AVX2 (Zen 3) and AVX-512 (Zen 5). */
int obm_kernels_z12_gains(const obm_kernels *k);
/* Whether gemm_pairs takes less time than gemm: where an instruction multiplies bf16.  Measured with AVX512-BF16, not with AMX. */
int obm_kernels_pairs_gain(const obm_kernels *k);

#endif
