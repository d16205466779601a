/* The tables by name, and the scalar entries that faster tables fall back to for what they do not speed up and for
 * tails. */
#ifndef OBM_KERNEL_TABLES_H
#define OBM_KERNEL_TABLES_H

#include "kernels.h"

extern const obm_kernels obm__kernels_scalar;
#if defined(__x86_64__)
extern const obm_kernels obm__kernels_avx2;
extern const obm_kernels obm__kernels_avx512;
extern const obm_kernels obm__kernels_avx512_bf16; /* the same, and products of bf16 */
extern const obm_kernels obm__kernels_amx;         /* and those by tiles */
/* Whether the system lets this process use tiles: it is asked once, when the first are to be used. */
int obm__tiles_allowed(void);
#elif defined(__aarch64__)
extern const obm_kernels obm__kernels_neon;
#endif

void obm__scalar_bf16_to_f32(float *dst, const uint16_t *src, size_t n);
void obm__scalar_f16_to_f32(float *dst, const uint16_t *src, size_t n);
void obm__scalar_f32_to_bf16(uint16_t *dst, const float *src, size_t n);
void obm__scalar_f32_to_f16(uint16_t *dst, const float *src, size_t n);
void obm__scalar_sub_f32(float *d, const float *a, const float *b, size_t n);
void obm__scalar_sub_bf16(float *d, const uint16_t *a, const uint16_t *b, size_t n);
void obm__scalar_axpy_f32(float *y, float a, const float *x, size_t n);
void obm__scalar_mix_f32(float *out, const float *const *c, const double *w, size_t count, size_t n);
size_t obm__scalar_find_nonfinite(const float *x, size_t n);
size_t obm__scalar_find_above(const float *x, float a, size_t n);
double obm__scalar_abs_sum(const float *x, size_t n);
double obm__scalar_sign_sum_bf16(uint8_t *bits, const uint16_t *a, const uint16_t *b, size_t n);
double obm__scalar_dot(const float *x, const float *y, size_t n);
size_t obm__scalar_count_zero(const float *x, size_t n);
void obm__scalar_sign_pack(uint8_t *bits, const float *d, size_t n);
void obm__scalar_sign_axpy(float *y, const uint8_t *bits, float alpha, size_t n);
void obm__scalar_magnitude_histogram(uint32_t *histogram, const float *x, size_t n);
size_t obm__scalar_delta_bf16(float *d, const uint16_t *a, const uint16_t *b, int round, uint32_t least, size_t n);
void obm__scalar_count_from(uint32_t *counts, const uint32_t *from, const float *x, size_t n);
void obm__scalar_low_histogram(uint32_t *histogram, uint32_t high, const float *x, size_t n);
void obm__scalar_lows_f32(uint16_t *out, size_t *found, size_t *zeros, uint32_t high, const float *x, size_t n);
void obm__scalar_keep_from(float *x, uint32_t least, size_t n);
void obm__scalar_agree_f32(float *out, const obm__agreement *m, size_t n);
void obm__scalar_sum_f32(float *out, const obm__agreement *m, size_t n);
size_t obm__scalar_store_bf16(uint16_t *out, const float *x, size_t n);
size_t obm__scalar_count_bf16(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b, int round,
                              size_t n);
size_t obm__scalar_sizes_bf16(uint16_t *out, uint16_t *most, const uint16_t *a, const uint16_t *b, int round, size_t n);
size_t obm__scalar_lows_bf16(uint16_t *out, size_t *found, size_t *zeros, uint32_t high, const uint16_t *a,
                             const uint16_t *b, size_t n);
size_t obm__scalar_merge_bf16(uint16_t *out, const obm__tile *t, size_t n);
size_t obm__scalar_vote_bf16(int64_t *votes, const obm__tile *t, size_t n);
/* A tile without its first i elements, a multiple of 8; room: for what its pointers become. */
typedef struct obm__tile_rest {
    const uint16_t *models[OBM__TILE_MODELS];
    const uint8_t *keep[OBM__TILE_MODELS];
} obm__tile_rest;
obm__tile obm__tile_behind(const obm__tile *t, size_t i, obm__tile_rest *room);
void obm__scalar_random_bits(uint8_t *bits, uint64_t state, uint64_t limit, size_t n);
void obm__scalar_random_tops(uint32_t *out, uint64_t state, size_t n);
void obm__scalar_random_highs(uint16_t *out, uint64_t state, size_t n);
void obm__scalar_choose_sizes(uint8_t *kept, uint8_t *open, const uint16_t *highs, const uint16_t *sizes,
                              const obm__choice *c, size_t n);
void obm__scalar_sum_sizes(double *sums, const uint16_t *sizes, const uint8_t *keep, size_t n);
/* The sums of the lanes, of all and of what is kept, after the last n elements have come to them. */
void obm__sum_sizes_rest(double *sums, double lane[2][16], const uint16_t *sizes, const uint8_t *keep, size_t n);
#define OBM__GOLDEN 0x9e3779b97f4a7c15u
#define OBM__MIX_FIRST 0xbf58476d1ce4e5b9u
#define OBM__MIX_SECOND 0x94d049bb133111ebu
void obm__scalar_rows_bf16(float *y, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t n);
void obm__scalar_rows_f16(float *y, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t n);
void obm__scalar_rows_f32(float *y, const float *w, size_t ld, size_t rows, const float *x, size_t n);
/* exp(x) = 2^n * exp(r), n = x / ln 2 rounded, r = x - n ln 2, |r| <= 0.35: the series of exp(r) up to r^7 is then
 * within 0.35^8 / 8! = 2^-27.4 of it.  Adding and taking away 1.5 * 2^23 rounds to an integer.  2^n is multiplied as
 * two halves, since it may be denormal or 2^128.  ln 2 is two floats, whose products with n an fma does not round. */
#define OBM__EXP_MAGIC 0x1.8p23f
#define OBM__EXP_LOG2E 0x1.715476p0f
#define OBM__EXP_LN2 0x1.62e43p-1f
#define OBM__EXP_LN2_LOW (-0x1.05c61p-29f)
#define OBM__EXP_LEAST (-104.0f) /* below: 0 */
#define OBM__EXP_MOST 89.0f      /* above: Inf */
void obm__scalar_silu_mul(float *gate, const float *up, size_t n);
#define OBM__GELU_SLOPE (-1.5957691216057308f)  /* -2 sqrt(2 / pi) */
#define OBM__GELU_CUBE (-0.071354816272600245f) /* times 0.044715 */
void obm__scalar_gelu_mul(float *gate, const float *up, size_t n);
void obm__scalar_rotate(float *x, size_t apart, const float *cosine, const float *sine, size_t pairs);
void obm__scalar_norm_mul(float *out, const float *x, const float *weight, float scale, float offset, size_t n);
float obm__scalar_scale_max(float *x, float scale, size_t n);
void obm__scalar_gemm_pack_half(float *packed, const float *rows, size_t ld, size_t n_rows, size_t n);
void obm__scalar_gemm_pairs(float *y, size_t ldy, const uint32_t *packed, size_t strips, const uint32_t *x, size_t ldx,
                            size_t tokens, size_t n);
void obm__scalar_gemm_pack(float *packed, const float *rows, size_t ld, size_t n_rows, size_t n);
/* The inverse of a row's table. */
typedef struct obm__z12_index {
    uint8_t code[256]; /* of a high byte: 16 + its index, 0 without */
    uint8_t upper[OBM__Z12_TABLE]; /* upper halves that the table's bytes have: few, since weights differ little in size */
    size_t n;
} obm__z12_index;
/* 64 weights of one row to 96 bytes.  Not 0: there are escapes among them, whose index becomes 0. */
typedef int (*obm__z12_block_fn)(uint8_t *out, const uint16_t *w, const obm__z12_index *index);
int obm__scalar_z12_block(uint8_t *out, const uint16_t *w, const obm__z12_index *index);
size_t obm__z12_encode_by(obm__z12_block_fn encode_block, uint8_t *codes, uint8_t *table, obm__z12_escape *escapes,
                          size_t room, const uint16_t *w, size_t cols);
size_t obm__scalar_z12_encode(uint8_t *codes, uint8_t *table, obm__z12_escape *escapes, size_t room, const uint16_t *w,
                              size_t cols);
void obm__scalar_plane_repack(uint8_t *block, const uint8_t *rows, size_t stride, size_t n_rows, size_t n_bytes);
void obm__scalar_plane_unpack(uint8_t *rows, size_t stride, const uint8_t *block, size_t n_bytes);
void obm__scalar_plane_tables(uint8_t *tables, float *scales, int32_t *abs_sums, const float *x, size_t cols);
void obm__scalar_plane_sums(int32_t *sums, const uint8_t *const *planes, int n, size_t n_bytes, const uint8_t *tables,
                            const int32_t *abs_sums, const void *ahead);
void obm__scalar_plane_add(float *y, const uint8_t *const *bits, int n, float c, size_t cols);

/* How a tile of plane_tables with the largest magnitude m > 0 becomes integers: q = rint(x * lift * steps), x = q *
 * scale. The lift, an exact multiplication, keeps 4095 / m finite where m is tiny.  q needs no clamp: steps and the
 * product are rounded once each, so |x * lift * steps| <= 4095 * (1 + 2^-22) < 4095.5. */
typedef struct obm__quantiser {
    float lift, steps, scale;
} obm__quantiser;
static inline obm__quantiser obm__quantise(float m) {
    float lift = m < 0x1p-100f ? 0x1p+100f : 1;
    return (obm__quantiser){lift, (float)OBM__PLANE_STEPS / (m * lift), m / (float)OBM__PLANE_STEPS};
}

/* Steps 8, 4, 2, 1 of the reduction tree that kernels.h states; destroys lane. */
static inline double obm__lane_sum(double lane[16]) {
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++) lane[j] += lane[j + step];
    return lane[0];
}

#endif
