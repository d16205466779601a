/* Task vectors, 1-bit planes and their statistics. */
#ifndef OBM_DELTA_H
#define OBM_DELTA_H

#include "../io/io.h"

#define OBM_MAX_PLANES 8
/* Elements per tile of every streaming pass; a multiple of 4096 so that reductions cut at the same places. */
#define OBM_TILE (1 << 16)

/* One row of a task vector: matched tensors of base and expert. */
typedef struct obm__pair {
    const char *name;
    obm_class cls;
    obm_tensor base, expert;   /* data NULL on the side that lacks it (a head that is tied there views the embedding) */
    int64_t extra_rows;        /* rows of the expert beyond the base's (vocabulary) */
} obm__pair;
struct obm_task_vector {
    const obm_checkpoint *base, *expert;
    obm__pair *pairs;          /* sorted by name */
    size_t count;
};
/* d of elements [begin, begin + n), f32; scratch: n floats. */
void obm__pair_read(const obm_kernels *k, const obm__pair *p, int64_t begin, int64_t n, float *d, float *scratch);
/* Widen n elements from element `begin` of any float tensor (dtype checked by the caller). */
void obm__widen(const obm_kernels *k, const obm_tensor *t, int64_t begin, int64_t n, float *out);
/* Narrow n f32 to dtype bytes (F32, F16, BF16; round to nearest even). */
void obm__narrow(const obm_kernels *k, obm_dtype dtype, const float *in, int64_t n, void *out);

/* How scales are laid out over a (rows, cols) matrix. */
typedef enum { OBM_SCALE_MATRIX = 0, OBM_SCALE_ROW = 1, OBM_SCALE_GROUP = 2 } obm__scale_kind;
typedef struct obm__scale { obm__scale_kind kind; int64_t group; } obm__scale;
obm_status obm__scale_parse(const char *text, obm__scale *out, obm_error *err);
int64_t obm__scale_count(obm__scale s, int64_t rows, int64_t cols);

/* A compressed matrix: sum over planes p of alpha_p * sign_p.  Views or owned by whoever made it. */
typedef struct obm__planes {
    int64_t rows, cols, row_bytes;   /* row_bytes = 8 * ceil(cols / 64) */
    int n;                           /* planes; 0: alpha was 0 everywhere */
    obm__scale scale;
    const uint8_t *signs[OBM_MAX_PLANES];   /* (rows, row_bytes) */
    const float *alphas[OBM_MAX_PLANES];    /* obm__scale_count */
} obm__planes;
/* out[0..n) = the values of row `row`, columns [col, col + n), of plane-sum d~ (added in plane order in f32). */
void obm__planes_read_row(const obm_kernels *k, const obm__planes *p, int64_t row, int64_t col, int64_t n, float *out);

#endif
