/* Task vectors, 1-bit planes and their statistics. */
#ifndef OBM_DELTA_H
#define OBM_DELTA_H

#include "../io/io.h"

#include <stdatomic.h>

#define OBM_MAX_PLANES 8
/* Elements per tile of every streaming pass; a multiple of 4096 so that reductions cut at the same places. */
#define OBM_TILE (1 << 16)
/* Every f64 reduction over a row (or a group of columns) is cut into blocks of this many elements, summed in the kernels'
 * 16-lane order; blocks of a row are joined by obm__tree_sum, and so are the rows of a matrix. */
#define OBM_BLOCK 4096

/* The lowest index that threads find something wrong at. */
static inline void obm__note_bad(_Atomic int64_t *lowest, int64_t index) {
    int64_t seen = atomic_load(lowest);
    while (index < seen && !atomic_compare_exchange_weak(lowest, &seen, index)) {
    }
}

/* How many pieces of a size n elements are cut into; nothing is one, too. */
static inline uint64_t obm__pieces(uint64_t n, uint64_t size) { return n ? (n - 1) / size + 1 : 1; }

bool obm__is_float(obm_dtype dtype);            /* F32, F16, BF16, F64 */
size_t obm__tensor_bytes(const obm_tensor *t);
/* Rotary frequencies follow from the config; old checkpoints carry them as a buffer, new ones do not. */
bool obm__is_derived_buffer(const char *name);
void obm__tensor_rows(const obm_tensor *t, int64_t *rows, int64_t *cols);   /* 1-D is one row; from 3-D on all but the first are columns */
const char *obm__shape_text(const obm_tensor *t, char *buf, size_t size);   /* "(4, 8)" */

/* A matrix as two factors: scaling * B A, or its transpose (lowrank.c).  Views. */
typedef struct obm__lowrank {
    obm_tensor a, b;           /* (rank, in), (out, rank) */
    int64_t rank, rows, cols;  /* of the matrix: (out, in), transposed (in, out) */
    double scaling;
    bool transposed;
} obm__lowrank;
/* d of elements [begin, begin + n), f32; the rule is in lowrank.c. */
void obm__lowrank_read(const obm_kernels *k, const obm__lowrank *l, int64_t begin, int64_t n, float *d);
uint64_t obm__lowrank_bytes(const obm__lowrank *l);   /* of both factors */
/* SHAPE where factors, rank and the base's matrix do not fit, or one is no float; cols and rows may still be 0. */
obm_status obm__lowrank_check(const obm__lowrank *l, const char *name, const obm_tensor *base, obm_error *err);

/* A matrix as a mask over a vector that several models share: scaling * shared where the bit is 1, else 0.  Views. */
typedef struct obm__masked {
    obm_tensor shared;         /* (rows, cols), float */
    const uint8_t *bits;       /* (rows, row_bytes): column c of a row is bit c % 8 of byte c / 8 */
    int64_t rows, cols, row_bytes;
    float scaling;             /* finite */
} obm__masked;
/* d of elements [begin, begin + n), f32: one product each, rounded once. */
void obm__masked_read(const obm_kernels *k, const obm__masked *m, int64_t begin, int64_t n, float *d);
/* Hands back the pages that they were read from, whole ones. */
void obm__masked_release(const obm__masked *m, int64_t begin, int64_t n);

/* ---- PEFT folders out (adapter_writer.c) ---- */

typedef struct obm__adapter_writer obm__adapter_writer;
/* Whether a folder may take an adapter: EXISTS for one that holds an adapter (without `overwrite`), OCCUPIED for one that
 * holds anything else; ARG for one of the inputs. */
obm_status obm__adapter_writer_check(const char *dir, bool overwrite, const char *const *inputs, size_t n, obm_error *err);
/* Locks the folder (BUSY); free before finish leaves it as it was. */
obm_status obm__adapter_writer_new(const char *dir, obm_dtype dtype, obm__adapter_writer **out, obm_error *err);
/* The factors a (rank, cols) and b (rows, rank) of the weight `tensor`, which ends in ".weight", in the writer's dtype;
 * they are copied.  Errors: IO, NOMEM. */
obm_status obm__adapter_writer_add(obm__adapter_writer *w, const char *tensor, int64_t rank, int64_t rows, int64_t cols, const void *a,
                                   const void *b, obm_error *err);
/* base: what the config calls the base model. */
obm_status obm__adapter_writer_finish(obm__adapter_writer *w, const char *base, obm_error *err);
void obm__adapter_writer_free(obm__adapter_writer *w);

/* One row of a task vector: matched tensors of base and expert. */
typedef struct obm__pair {
    const char *name;
    obm_class cls;
    obm_tensor base, expert;   /* data NULL on the side that lacks it (a head that is tied there views the embedding) */
    int64_t extra_rows;        /* rows of the expert beyond the base's (vocabulary) */
    /* Where the expert has no tensor of its own, `expert` has its shape, and data NULL: d is in factors, in planes, in a mask, or 0 */
    const obm__lowrank *lora;
    const struct obm__planes *planes;
    const obm__masked *masked;
    const obm_tensor *extra;   /* then, of a pack: the extra rows by themselves */
} obm__pair;
struct obm_task_vector {
    const obm_checkpoint *base, *expert;
    obm__pair *pairs;          /* sorted by name */
    size_t count;
    obm__lowrank *lowranks;    /* owned; NULL unless the expert is an adapter */
    obm_pack *pack;            /* owned, with this expert alone on `base`; NULL unless it is one of a pack */
};
/* The pairs of an adapter: v has base and expert, and is freed by the caller also after a failure (adapter.c). */
obm_status obm__adapter_pairs(obm_task_vector *v, obm_error *err);
/* The same of an expert of a pack (io/pack_member.c).  MISMATCH names the first tensor in which the base is not the pack's. */
obm_status obm__member_pairs(obm_task_vector *v, obm_error *err);
void obm__member_unload(obm_pack *p);
obm_status obm__member_check(const obm_pack *p, obm_error *err);   /* obm__map_check of the files behind its pairs */
/* Checks and completes a pair: class, extra rows.  Errors: SHAPE, DTYPE. */
obm_status obm__pair_fill(obm__pair *p, const char *name, const obm_tensor *base, const obm_tensor *expert, obm_error *err);
/* obm__checkpoint_check of both sides. */
obm_status obm__task_vector_check(const obm_task_vector *v, obm_error *err);
/* NULL with NOTFOUND in err. */
const obm__pair *obm__task_vector_find(const obm_task_vector *v, const char *name, obm_error *err);
/* OBM_E_VALUE: names the tensor and element `index`, which is NaN or Inf. */
obm_status obm__fail_nonfinite(obm_error *err, const obm__pair *p, int64_t index);
/* Whether both sides are bf16 arrays that kernels can read where they lie. */
bool obm__pair_is_bf16(const obm__pair *p);
/* d of elements [begin, begin + n), f32; scratch: n floats, left with no meaning. */
void obm__pair_read(const obm_kernels *k, const obm__pair *p, int64_t begin, int64_t n, float *d, float *scratch);
/* The expert's own values at elements [begin, begin + n) of its shape, f32: its tensor, f32(base + d) where it has none;
 * scratch: n floats. */
void obm__pair_values(const obm_kernels *k, const obm__pair *p, int64_t begin, int64_t n, float *out, float *scratch);
/* Hands back the pages that they were read from, whole ones. */
void obm__pair_release(const obm__pair *p, int64_t begin, int64_t n);
/* Widen n elements from element `begin` of any float tensor (dtype checked by the caller). */
void obm__widen(const obm_kernels *k, const obm_tensor *t, int64_t begin, int64_t n, float *out);
/* Narrow n f32 to dtype bytes (F32, F16, BF16; round to nearest even). */
void obm__narrow(const obm_kernels *k, obm_dtype dtype, const float *in, int64_t n, void *out);

/* How a shared vector and its masks come about (masked.c). */
typedef struct obm__sharing {
    bool emr;                  /* elected signs and largest magnitudes; else the sum: TALL */
    double lambda;             /* of TALL's masks */
} obm__sharing;
/* Elements [begin, begin + n) of the vector of all pairs, f32, n <= OBM_BLOCK.  False: a task vector is NaN or Inf here, or
 * the sum is; out has no meaning then. */
bool obm__shared_read(const obm_kernels *k, const obm__sharing *s, const obm__pair *const *pairs, size_t count, int64_t begin,
                      int64_t n, float *out);
/* The mask of n elements; d of the model and the shared vector as it is stored.  Whole bytes are written, bits
 * from n on are 0. */
void obm__mask_pack(const obm__sharing *s, const float *d, const float *shared, int64_t n, uint8_t *bits);
/* x[i] = 0 where bit (first + i) is 0. */
void obm__mask_apply(const uint8_t *bits, int64_t first, float *x, int64_t n);

/* How scales are laid out over a (rows, cols) matrix. */
typedef enum { OBM_SCALE_MATRIX = 0, OBM_SCALE_ROW = 1, OBM_SCALE_GROUP = 2 } obm__scale_kind;
typedef struct obm__scale { obm__scale_kind kind; int64_t group; } obm__scale;
obm_status obm__scale_parse(const char *text, obm__scale *out, obm_error *err);
int64_t obm__scale_count(obm__scale s, int64_t rows, int64_t cols);   /* -1 on overflow */
char *obm__scale_text(obm__scale s);   /* "matrix", "row", "group:128"; owned */
int64_t obm__row_bytes(int64_t cols);  /* 8 * ceil(cols / 64) */

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

/* Columns from `col` on over which no alpha of a row changes. */
int64_t obm__planes_span(const obm__planes *p, int64_t col);
/* alpha of plane p at (row, col), whatever the layout of the scales. */
float obm__planes_alpha(const obm__planes *p, int plane, int64_t row, int64_t col);
/* d~ of row `row`, columns [col, col + n), summed in plane order in f64. */
void obm__planes_read_f64(const obm__planes *p, int64_t row, int64_t col, int64_t n, double *out);
/* x += the values of row `row`, columns [col, col + n): f32(x + d~) with d~ in f64, as a route has it. */
void obm__planes_add_row(const obm_kernels *k, const obm__planes *p, int64_t row, int64_t col, int64_t n, float *x);

/* Takes finished bytes in order: rows up to `rows_done` of the matrix are out. */
typedef obm_status (*obm__sink_fn)(void *user, const void *bytes, size_t n, int64_t rows_done, obm_error *err);
/* One plane of a matrix pair (2-D, float), streaming, in parallel.  alphas[0..plane) are the planes before it, alphas[plane]
 * is filled (obm__scale_count floats); signs go to the sink, (rows, row_bytes).  *zero: every alpha of the plane is 0.
 * Errors: VALUE (NaN or Inf), NOMEM, those of the sink. */
obm_status obm__onebit_plane(obm_context *ctx, const obm__pair *pair, obm__scale scale, int plane, float *const *alphas,
                             obm__sink_fn sink, void *user, bool *zero, obm_error *err);
/* The same of the first plane, for rows [first, last) on one thread; the pair's data begin with row `first`.  Out: their
 * signs, their scales into alphas, and for a scale per matrix the sums of rows, of which obm__onebit_alpha makes the scale in
 * the end.  scratch: obm__onebit_scratch(cols) bytes, a multiple of 64, aligned.  Returns the lowest index of a NaN or Inf, INT64_MAX for none. */
size_t obm__onebit_scratch(int64_t cols);
int64_t obm__onebit_rows(const obm_kernels *k, const obm__pair *pair, obm__scale scale, float *alphas, double *row_sums,
                         int64_t first, int64_t last, uint8_t *signs, void *scratch);
float obm__onebit_alpha(const double *row_sums, int64_t rows, int64_t cols);
/* Bytes of buffers that obm__onebit_plane holds, alphas aside: an upper bound. */
uint64_t obm__onebit_memory(const obm_context *ctx, int64_t rows, int64_t cols);

/* ---- policy (policy.c) ---- */

/* How one expert is to be compressed; resolved from obm_expert. */
typedef struct obm__policy {
    unsigned classes;          /* bit per obm_class: compressed */
    obm_mode compressed;       /* what they become: 1BIT, MASK where the pack has a shared vector */
    obm__scale scale;
    int planes;
    const obm_map_rule *map;   /* borrowed */
    size_t n_map;
} obm__policy;
/* *text: "linear, scale row, planes 1, map *.q_proj.weight=full"; owned.  masks: matrices become masks of a shared vector.
 * Errors: ARG. */
obm_status obm__policy_parse(const obm_expert *e, obm_profile profile, bool masks, obm__policy *out, char **text, obm_error *err);
bool obm__glob_matches(const char *glob, const char *name);   /* shell patterns; * also matches dots */
bool obm__pair_is_matrix(const obm__pair *p);   /* of floats: what can be 1bit */
const obm_map_rule *obm__policy_rule(const obm__policy *p, const char *name);   /* the first that matches, or NULL */
/* Errors: ARG when a rule asks for 1 bit or a mask in a tensor that is not a float matrix. */
obm_status obm__policy_mode(const obm__policy *p, const obm__pair *pair, obm_mode *out, obm_error *err);

#endif
