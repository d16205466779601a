/* Static merges: method rows, resolved steps, statistics and the element pipeline.
 *
 *     delta -> mask -> rescale -> weight -> consensus -> reduce -> normalise -> scale -> add
 *
 * A method is a row of settings (obm__method); parameters turn it into obm__steps; the pipeline knows steps only.  All
 * passes walk a tensor in blocks of OBM_MERGE_BLOCK elements, each block independent of the others, so that results do
 * not depend on threads, tiles or order. */
#ifndef OBM_MERGE_H
#define OBM_MERGE_H

#include "../delta/delta.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* The kernels' reduction length; OBM_TILE is a multiple of it.  A block of every lane fits the second-level cache. */
#define OBM_MERGE_BLOCK 4096
/* Elements that the arithmetic takes in one go: so many of every lane fit the nearest cache. */
#define OBM_MERGE_PART 512
/* Elements between two looks at the progress callback; a multiple of the block, some tens of milliseconds. */
#define OBM_MERGE_SPAN ((uint64_t)1 << 22)

/* ---- methods (registry.c; one file each) ---- */

typedef enum { OBM_MASK_NONE, OBM_MASK_MAGNITUDE, OBM_MASK_OUTLIERS, OBM_MASK_RANDOM, OBM_MASK_RANKED } obm__mask_kind;
typedef enum { OBM_CONSENSUS_NONE, OBM_CONSENSUS_SIGN } obm__consensus;
/* BY_PROFILE: to the L1 norm as mergekit does, by 1 / probability in the paper profile. */
typedef enum { OBM_RESCALE_NONE, OBM_RESCALE_L1, OBM_RESCALE_INVERSE_DENSITY, OBM_RESCALE_BY_PROFILE } obm__rescale;

typedef struct obm__run obm__run;
typedef struct obm__group obm__group;
typedef struct obm__block obm__block;
typedef struct obm__steps obm__steps;

/* What a method does that is no row of settings; each may be NULL.  They get a group after its deltas are formed. */
typedef struct obm__custom {
    /* What the parameters must fulfil together. */
    obm_status (*check)(const obm__steps *s, obm_error *err);
    /* Statistics over all groups of one scope, into groups[i].stats and cuts. */
    obm_status (*prepare)(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err);
    /* A number per element >= 0 that obm__select ranks when its model is OBM_BY_SCORE; 0 will do below `least`. */
    void (*score)(const obm__block *b, float least, float *out);
    /* Replaces consensus, reduction and adding: the merged values of a block into b->mixed. */
    void (*merge)(const obm__block *b);
    /* What the merge needs of this tensor as a whole: into g->formed, just before its elements are merged. */
    obm_status (*form)(const obm__run *run, obm__group *g, obm_error *err);
    /* Bytes that `prepare`, `form` or `run` take for one tensor. */
    uint64_t (*bytes)(const obm__group *g);
    /* Replaces the pass over the elements: obm__group_run. */
    obm_status (*run)(const obm__run *run, const obm__group *g, uint64_t begin, uint64_t n, obm_dtype dtype, void *out,
                      obm_error *err);
} obm__custom;

typedef struct obm__method {
    obm_method_info info;
    bool deltas;        /* works on task vectors and adds the base; else on the weights themselves */
    bool optional_base; /* takes a base, but needs none */
    obm__mask_kind mask;
    obm__consensus consensus;
    obm__rescale rescale;   /* what the parameter `rescale` asks for */
    bool tensor_statistics; /* scope -1 is the tensor in the paper profile too */
    bool f32_deltas; /* task vectors are never rounded to the working dtype: no profile of mergekit's to follow */
    /* For a dry run's guess: nanoseconds per element and model of what the custom functions compute, as measured. */
    double cost;
    const obm__custom *custom;
} obm__method;

extern const obm__method obm__method_linear, obm__method_task_arithmetic, obm__method_ties, obm__method_dare_linear,
    obm__method_dare_ties, obm__method_passthrough, obm__method_slerp, obm__method_nuslerp, obm__method_multislerp,
    obm__method_karcher, obm__method_della, obm__method_della_linear, obm__method_breadcrumbs,
    obm__method_breadcrumbs_ties, obm__method_model_stock, obm__method_sce, obm__method_ram, obm__method_ramplus_tl,
    obm__method_nearswap, obm__method_arcee_fusion, obm__method_consensus, obm__method_emr, obm__method_varm,
    obm__method_wudi, obm__method_optmerge, obm__method_tsvm, obm__method_iso_c, obm__method_iso_cts, obm__method_opcm,
    obm__method_twin, obm__method_pcb, obm__method_magnitude_prune, obm__method_localize_stitch, obm__method_mwa;

/* A base is an input of its own; else it is a model like the others. */
static inline bool obm__method_takes_base(const obm__method *m) { return m->info.needs_base || m->optional_base; }
/* ARG unless the method takes n models; `where` goes in front. */
obm_status obm__method_check_count(const obm__method *m, size_t n, const char *where, obm_error *err);

/* Parameter rows that several methods share. */
#define OBM_PARAM_ROW(name, doc, scope, required, dflt, min, max, is_bool) \
    { name, doc, scope, required, dflt, min, max, is_bool }
#define OBM_PARAM_BOOL(name, doc, dflt) OBM_PARAM_ROW(name, doc, OBM_PARAM_GLOBAL, false, dflt, 0, 1, true)
#define OBM_PARAM_WEIGHT                                                                                               \
    OBM_PARAM_ROW("weight", "factor of this model; the paper profile takes 1 where it is absent", OBM_PARAM_PER_MODEL, \
                  true, 1, -INFINITY, INFINITY, false)
#define OBM_PARAM_FACTOR(doc) OBM_PARAM_ROW("weight", doc, OBM_PARAM_PER_MODEL, false, 1, -INFINITY, INFINITY, false)
#define OBM_PARAM_DENSITY(doc) OBM_PARAM_ROW("density", doc, OBM_PARAM_PER_MODEL, false, 1, 0, 1, false)
#define OBM_PARAM_LAMBDA \
    OBM_PARAM_ROW("lambda", "factor of the merged task vector", OBM_PARAM_GLOBAL, false, 1, -INFINITY, INFINITY, false)
#define OBM_PARAM_SCOPE                                                                                           \
    OBM_PARAM_ROW("scope",                                                                                        \
                  "statistics over each tensor (0, `tensor`) or the whole model (1, `model`); -1: tensor in the " \
                  "mergekit profile, model in the paper profile",                                                 \
                  OBM_PARAM_GLOBAL, false, -1, -1, 1, false)
#define OBM_PARAM_INT8_MASK OBM_PARAM_BOOL("int8_mask", "accepted for mergekit's recipes, without effect", 0)
#define OBM_PARAM_NORMALIZE(doc, dflt) OBM_PARAM_BOOL("normalize", doc, dflt)
#define OBM_PARAM_RESCALE(doc, dflt) OBM_PARAM_BOOL("rescale", doc, dflt)
#define OBM_COUNT(array) (sizeof(array) / sizeof *(array))

/* NOTFOUND lists the known names and suggests the nearest. */
obm_status obm__method_find(const char *name, const obm__method **out, obm_error *err);
/* NULL if the method has no such parameter. */
const obm_param_info *obm__method_param(const obm__method *m, const char *name);
/* True for a name that some method here, or one of mergekit's, takes. */
bool obm__param_is_known(const char *name);

/* NOTFOUND: the known ones and a suggestion; where: what the message begins with, "" for nothing. */
obm_status obm__fail_unknown_param(const obm__method *m, const char *name, const char *where, obm_error *err);
/* "a, b, c" into buf, cut at its size. */
void obm__list_names(const char *const *names, size_t n, char *buf, size_t size);
/* The nearest of `names` by edit distance as ", did you mean `x`?", or "" if none is near.  buf: 96 bytes or more. */
const char *obm__suggest(const char *name, const char *const *names, size_t n, char *buf, size_t size);

/* ---- methods of the caller (own.c) ---- */

/* A row of the table made from a description; the description stays the caller's. */
typedef struct obm__own {
    obm__method row; /* first: from the method in a group's steps own.c comes back to this struct */
    const obm_custom_method *spec;
} obm__own;
/* Errors: ARG. */
obm_status obm__own_new(const obm_custom_method *spec, obm__own *out, obm_error *err);

/* ---- steps: a method with its parameters, for the n models of one tensor ---- */

struct obm__steps {
    const obm__method *method;
    bool paper; /* the profile */
    bool deltas;
    obm__mask_kind mask;
    obm__rescale rescale;
    obm__consensus consensus;
    bool round_deltas;      /* deltas take the working dtype before they are masked */
    bool weighted_election; /* signs are elected on weight * delta; else on the deltas */
    bool majority_zero;     /* a zero sum takes the majority of all elected signs; else +1 */
    bool model_scope;       /* statistics over the whole model */
    bool normalize;
    float lambda;
    uint64_t seed;
    size_t n;
    const char *const *labels; /* (n), borrowed: what messages call the models; NULL: by their numbers */
    float *weight;             /* (n), owned */
    double *density;           /* (n), owned */
    double *values;            /* (parameters of the method, n), owned: completed with defaults */
};

/* Checks names, ranges and required parameters, fills defaults.  A per-model parameter with model -1 holds for every
 * model that has none of its own.  labels: (n), nullable, borrowed for as long as the steps are there.  Errors:
 * NOTFOUND, ARG, NOMEM. */
obm_status obm__steps_new(const obm__method *m, obm_profile profile, size_t n, const char *const *labels,
                          const obm_param *params, size_t n_params, uint64_t seed, obm__steps *out, obm_error *err);
/* What messages call a model: its label, else "model 0" into buf. */
typedef char obm__model_name[32];
const char *obm__model_label(const char *const *labels, size_t model, obm__model_name buf);
void obm__steps_free(obm__steps *s);
/* A parameter of the method; for one of the whole merge any model will do. */
double obm__steps_value(const obm__steps *s, const char *name, size_t model);

/* ---- random numbers (random.c) ---- */

uint64_t obm__random_key(uint64_t seed, const char *tensor, size_t model);
/* The draw of one element: kept with probability `keep` if it is below obm__random_limit(keep). */
uint64_t obm__random_draw(uint64_t key, uint64_t element);
uint64_t obm__random_limit(double keep);
/* The state of the kernels' generators for draws from `element` on. */
uint64_t obm__random_state(uint64_t key, uint64_t element);
/* Zeroes d[j] unless element begin + j is drawn with probability `keep`. */
void obm__random_mask(uint64_t key, uint64_t begin, double keep, float *d, size_t n);
/* The same as bits, LSB first: 1 is kept.  keep < 1. */
void obm__random_bits(const obm_kernels *k, uint64_t key, uint64_t begin, double keep, uint8_t *bits, size_t n);

/* ---- masks by rank (ranked.c) ---- */

/* What a mask by rank leaves of each element of a span: 0, 1, or where the rescaling asks for it 1 / probability. */
typedef struct obm__ranked obm__ranked;
/* For walks over `count` elements.  Whole rows are ranked, so that memory grows with the length of a row. */
obm_status obm__ranked_new(const obm__run *run, const obm__group *g, uint64_t count, obm__ranked **out, obm_error *err);
obm_status obm__ranked_fill(const obm__run *run, obm__ranked *r, const obm__group *g, uint64_t at, uint64_t until,
                            float *lanes, obm_error *err);
/* Elements [element, element + n), which were filled last or are kept. */
void obm__ranked_apply(const obm__ranked *r, const obm__group *g, size_t model, uint64_t element, float *d, size_t n);
/* The same as bits, LSB first: 1 is kept; they are borrowed, or in `room` of (n + 7) / 8 bytes.  n <= OBM_MERGE_BLOCK,
 * for densities inside of (0, 1) where no factors are wanted. */
const uint8_t *obm__ranked_bits(const obm__ranked *r, size_t model, uint64_t element, uint8_t *room, size_t n);
/* Whether what a walk over the whole group fills stays for the next one: its bits take no more than the floats of a
 * span. */
bool obm__ranked_keeps(const obm__group *g);
void obm__ranked_free(obm__ranked *r);
uint64_t obm__ranked_bytes(const obm__group *g, int threads);

/* ---- exact selection (select.c) ---- */

/* Which elements of one task vector survive: magnitude pattern above `bits`, and of the equal ones the first `equal`.
 */
typedef struct obm__cut {
    bool all, none;
    uint32_t bits;  /* f32 pattern without the sign */
    uint64_t equal; /* UINT64_MAX: all of them */
    /* Equal elements in front of each block, and in the end of all; owned; NULL where `equal` is 0 or UINT64_MAX. */
    uint64_t *before;
} obm__cut;

/* ---- groups: one tensor across the models ---- */

/* Who runs and who is told. */
struct obm__run {
    obm_context *ctx;
    obm_progress_fn progress; /* nullable */
    void *user;
    const char *what;
    uint64_t done, total;
};
/* Reports done of total; USER when the callback asks to stop. */
obm_status obm__run_report(const obm__run *run, obm_error *err);

/* ---- rows of other tensors (rows.c) ---- */

typedef enum { OBM_ROW_INPUT, OBM_ROW_ZERO, OBM_ROW_MADE } obm__row_kind;
typedef struct obm__row {
    uint32_t row; /* of the input's tensor, or of what is made */
    uint16_t input;
    uint16_t kind;
} obm__row;
/* The inputs of a group, base first, as tensors of (rows, cols) whose rows come from their own and each other's. */
typedef struct obm__rows {
    size_t n;
    obm_tensor *sources;       /* (n), as they are in the files; owned, as are: */
    const obm__pair **changes; /* (n), or NULL: what is read instead */
    obm__row *maps;            /* (n, rows) */
    uint64_t *means;           /* (n_means): the rows that are the mean of what the inputs have there */
    size_t n_means;
    uint64_t rows, filled, cols; /* rows behind `filled` are the mean of those before, for each input */
    float *made;                 /* (n_means, then n if there is padding; cols) */
} obm__rows;
/* scratch: n floats */
void obm__rows_read(const obm_kernels *k, const obm__rows *r, size_t input, uint64_t begin, size_t n, float *out,
                    float *scratch);
uint64_t obm__rows_made(const obm__rows *r); /* rows of `made` */
/* Computes what is made, once, before anything is read.  Errors: NOMEM, USER. */
obm_status obm__rows_fill(const obm__run *run, obm__rows *r, obm_error *err);
void obm__rows_free(obm__rows *r);

struct obm__group {
    const char *name;         /* feeds the random masks; "" for a nameless tensor */
    const obm_tensor *base;   /* NULL for methods without one */
    const obm_tensor *models; /* (steps->n) */
    const obm__pair *base_change,
        *const *changes;    /* what base and models are read from instead; NULL, or (steps->n) of them or NULL */
    const obm__rows *rows;  /* nullable: what base and models are read through, then they have no data of their own */
    const char *base_label; /* for messages, nullable */
    obm_dtype work;         /* what inputs, and in the mergekit profile deltas, are rounded to; F32: nothing is */
    uint64_t count;         /* elements */
    bool mapped;            /* inputs lie in file mappings: their pages may go once they are read */
    bool held;              /* all pages are mapped and stay from pass to pass, until obm__group_drop */
    const obm__steps *steps;
    obm__cut *cuts;      /* (n), from obm__statistics */
    float *factors;      /* (n), rescale factors */
    obm__cut *tops;      /* (n), what a mask of outliers takes away again */
    double *stats;       /* of the method's own `prepare`, owned */
    float *formed;       /* of the method's own `form`, owned */
    obm__ranked *ranked; /* what the statistics found of a mask by rank, nullable, owned */
    float zero_sign;     /* +1 or -1: what a zero sum elects */
};

/* Elements [begin, begin + n) of a group in the hands of one worker; n <= OBM_MERGE_BLOCK. */
struct obm__block {
    const obm_kernels *k;
    const obm__group *g;
    uint64_t begin;
    size_t n;
    float *base, *scratch, *sum, *mixed, *divisor; /* (OBM_MERGE_BLOCK) each */
    float *deltas;                                 /* (n_models, OBM_MERGE_BLOCK) */
};
static inline float *obm__block_delta(const obm__block *b, size_t model) { return b->deltas + model * OBM_MERGE_BLOCK; }
#define OBM_BLOCK_LANES 5
/* The lanes of one worker in memory of obm__group_scratch bytes per worker. */
static inline obm__block obm__block_of(float *memory, const obm_kernels *k, const obm__group *g, int worker) {
    float *p = memory + (size_t)worker * (OBM_BLOCK_LANES + g->steps->n) * OBM_MERGE_BLOCK;
    return (obm__block){.k = k,
                        .g = g,
                        .base = p,
                        .scratch = p + OBM_MERGE_BLOCK,
                        .sum = p + 2 * OBM_MERGE_BLOCK,
                        .mixed = p + 3 * OBM_MERGE_BLOCK,
                        .divisor = p + 4 * OBM_MERGE_BLOCK,
                        .deltas = p + OBM_BLOCK_LANES * OBM_MERGE_BLOCK};
}
/* Base and deltas as they are, without masks.  Returns the first index that is not finite, n if all are. */
size_t obm__block_load(const obm__block *b);

/* Vectors along the last dimension: how long, and how many of them. */
static inline uint64_t obm__group_cols(const obm__group *g) {
    return g->models[0].ndim ? (uint64_t)g->models[0].shape[g->models[0].ndim - 1] : 1;
}
static inline uint64_t obm__group_rows(const obm__group *g) { return g->count ? g->count / obm__group_cols(g) : 0; }

/* Adds up numbers over all elements: fn gives the n_sums of one block.  Blocks join by obm__tree_sum within a span,
 * spans one after the other.  n_sums <= OBM_MAX_SUMS. */
#define OBM_MAX_SUMS 2048
typedef void (*obm__sums_fn)(const obm__block *b, const void *arg, double *sums);
obm_status obm__group_sums(const obm__run *run, const obm__group *g, size_t n_sums, obm__sums_fn fn, const void *arg,
                           double *total, obm_error *err);
/* Calls fn for ranges that one worker works on alone, in parallel: whole rows, or up to OBM_MERGE_BLOCK columns of a
 * band of rows; the bands come in order.  fn loads what it needs and returns the first index that is not finite, else
 * UINT64_MAX. */
typedef struct obm__part {
    uint64_t row, rows, col, cols; /* of a matrix whose vectors are rows, or columns */
} obm__part;
typedef uint64_t (*obm__part_fn)(obm__block *b, const obm__part *part, void *arg);
/* For an fn that reads a row of `cols` elements from `start` on block by block, behind each: pages are let go with the
 * band, but those of a row that is one by itself and more than a span go on the way. */
void obm__row_release(const obm__block *b, uint64_t start, uint64_t cols);
obm_status obm__group_parts(const obm__run *run, const obm__group *g, uint64_t rows, uint64_t cols, bool by_columns,
                            obm__part_fn fn, void *arg, obm_error *err);

/* ---- combinations of vectors by their inner products (combine.c) ---- */

/* What is one vector: the tensor, each row along the last dimension, or each column along the first.  A 1-D tensor is
 * one row, and one column. */
typedef enum { OBM_VECTOR_TENSOR, OBM_VECTOR_ROW, OBM_VECTOR_COLUMN } obm__vector;
/* The factors c (n) of n vectors with the inner products gram (n, n). */
typedef obm_status (*obm__mix_fn)(const obm__steps *s, const double *gram, size_t n, double *c, obm_error *err);
/* Factors of every vector into stats: of the task vectors (or of the weights where there is no base), or of base and
 * models, in this order, for a method with a base that works on the weights themselves. */
obm_status obm__combine(const obm__run *run, obm__group *groups, size_t n_groups, obm__vector kind, obm__mix_fn mix,
                        obm_error *err);
void obm__combine_merge(const obm__block *b);
uint64_t obm__combine_bytes(const obm__group *g);

/* ---- matrices as a whole (dense.c), for the methods on LAPACK ---- */

/* Linear weights: not empty, 2-D, and neither an embedding, a head, a norm nor a bias; matrices of unknown names
 * (OBM_CLASS_OTHER) count.  Every other tensor has a rule without decompositions, since all of these methods are
 * defined on linear layers (and so are their authors' codes). */
bool obm__dense_is_matrix(const obm__group *g);
/* (m, n) and min(m, n) of a matrix. */
typedef struct obm__dense_size {
    size_t m, n, k;
} obm__dense_size;
obm__dense_size obm__dense_size_of(const obm__group *g);
/* out (m, n) = (add ? out : 0) + factor * task vector.  Errors: VALUE (NaN or Inf), USER, NOMEM. */
obm_status obm__dense_load(const obm__run *run, const obm__group *g, size_t model, double factor, bool add, double *out,
                           obm_error *err);
/* C = alpha * op(A) * op(B) + beta * C, asking the progress callback in between. */
obm_status obm__dense_multiply(const obm__run *run, const obm__product *p, obm_error *err);
/* The first `count` singular triples of d to places [first, first + count) of u (m, all), vt (all, n) and s (all).
 * Directions beyond the rank have no singular vectors: their places stay as they are. */
void obm__dense_take(const obm__svd *d, size_t first, size_t count, size_t all, double *u, double *vt, double *s);
/* x (m, n) becomes its orthogonal polar factor, by the room of d, which keeps its shape and nothing else.  Errors:
 * VALUE where the decomposition does not converge, USER, NOMEM. */
obm_status obm__dense_polar(const obm__run *run, const obm__group *g, obm__svd *d, size_t m, size_t n, double *x,
                            obm_error *err);
/* The merged task vector of the tensor, rounded to f32, into g->formed.  Errors: NOMEM. */
obm_status obm__dense_form(obm__group *g, const double *x, obm_error *err);
/* mixed = base + factor * formed; then the rule of most methods: lambda is the factor, and what was not formed is the
 * mean of the weighted task vectors. */
void obm__dense_add(const obm__block *b, double factor);
void obm__dense_merge(const obm__block *b);

/* ---- least squares under Gram matrices (gram.c) ---- */

/* Eigenvalues w of C that count, and how: 1 / (w + ridge) for the `keep` largest; never those of practically 0, where R
 * is 0 too. */
typedef struct obm__gram_filter {
    double ridge;
    size_t keep;
} obm__gram_filter;
/* min over M of sum_t tr[(M - D_t) G_t (M - D_t)^T] with C = sum G_t and R = sum D_t G_t - M_0 C: M = M_0 + R g(C).  R
 * (m, n) is replaced by R g(C), C (n, n) is lost; work: (m, n), not used where a ridge on all eigenvalues lets a
 * Cholesky factorisation do.  `what` is for messages.  Errors: VALUE (C is not positive definite, or its decomposition
 * does not converge), UNSUPPORTED (beyond LAPACK's sizes), USER, NOMEM. */
obm_status obm__gram_solve(const obm__run *run, size_t m, size_t n, double *c, double *r, double *work,
                           obm__gram_filter f, const char *what, obm_error *err);

/* For messages: "the tensor" where it has no name. */
const char *obm__group_name(const obm__group *g);
/* The dtype that a merge without a `dtype` works in: the common one, F32 where they differ. */
obm_dtype obm__group_common_dtype(const obm_tensor *base, const obm_tensor *models, size_t n);
/* base and d: floats of elements [begin, begin + n), n <= OBM_MERGE_BLOCK; scratch: OBM_MERGE_BLOCK floats. */
void obm__group_base(const obm_kernels *k, const obm__group *g, uint64_t begin, size_t n, float *base, float *scratch);
/* The delta (or the weights, for methods without deltas).  Returns the first index that is not finite, n if all are. */
size_t obm__group_delta(const obm_kernels *k, const obm__group *g, size_t model, uint64_t begin, size_t n,
                        const float *base, float *d, float *scratch);
/* Whether obm__group_delta can do without `base`. */
bool obm__group_is_plain(const obm__group *g, size_t model);
/* What a plain delta is made of: bf16 of the model and of the base, from element `begin` on, and whether it is rounded.
 */
typedef struct obm__plain {
    const uint16_t *model, *base; /* base: NULL where nothing is subtracted */
    int round;
} obm__plain;
obm__plain obm__group_plain(const obm__group *g, size_t model, uint64_t begin);
/* The same, and +0 in place of magnitude patterns below `least`. */
size_t obm__group_trimmed(const obm_kernels *k, const obm__group *g, size_t model, uint64_t begin, size_t n,
                          const float *base, uint32_t least, float *d, float *scratch);
/* Masks as bits: what an element keeps is random, and a mispredicted branch costs more than the arithmetic around it.
 */
static inline uint32_t obm__bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}
/* x where keep is true, else +0. */
static inline float obm__keep_if(float x, bool keep) {
    uint32_t u = obm__bits_of(x) & -(uint32_t)keep;
    memcpy(&x, &u, sizeof u);
    return x;
}

/* Keeps the lowest index that any worker meets, so that the error does not depend on threads. */
static inline void obm__note_lowest(_Atomic uint64_t *lowest, uint64_t index) {
    uint64_t seen = atomic_load_explicit(lowest, memory_order_relaxed);
    while (index < seen && !atomic_compare_exchange_weak(lowest, &seen, index)) {
    }
}
/* Maps the pages of elements [begin, end), as far as there are so many, of the base and one model, or of all
 * (SIZE_MAX). */
void obm__group_populate(const obm__group *g, size_t model, uint64_t begin, uint64_t end);
/* Drops the pages of elements [begin, begin + n) of mapped inputs from resident memory. */
void obm__group_drop(const obm__group *g, uint64_t begin, uint64_t n);
/* The same unless they are held: every pass does so behind itself. */
void obm__group_release(const obm__group *g, uint64_t begin, uint64_t n);
/* The error for an element that is not finite, naming tensor, model and index. */
obm_status obm__group_bad(const obm_kernels *k, const obm__group *g, uint64_t index, obm_error *err);
/* The same where what ranks the elements (a score) may be at fault. */
obm_status obm__group_bad_rank(const obm_kernels *k, const obm__group *g, uint64_t index, obm_error *err);

#define OBM_BY_SCORE SIZE_MAX
/* The first n_keep elements by magnitude of model `model` over the concatenation of all groups; fills
 * groups[i].cuts[model], or cuts[0] for the method's own score (OBM_BY_SCORE). */
obm_status obm__select(const obm__run *run, obm__group *groups, size_t n_groups, size_t model, uint64_t n_keep,
                       obm_error *err);
/* The same of several models in passes that they share, n_picks <= OBM__PICKS. */
typedef struct obm__pick {
    size_t model;
    uint64_t n; /* that stay */
} obm__pick;
enum { OBM__PICKS = 8 };
obm_status obm__select_each(const obm__run *run, obm__group *groups, size_t n_groups, const obm__pick *picks,
                            size_t n_picks, obm_error *err);
/* The n-th largest (from 1) of the same values. */
obm_status obm__select_value(const obm__run *run, obm__group *groups, size_t n_groups, size_t model, uint64_t n,
                             float *out, obm_error *err);
/* Bytes that lists of a selection among so many elements take at most. */
uint64_t obm__select_bytes(uint64_t count, size_t n_picks);
void obm__cut_apply(const obm_kernels *k, const obm__cut *c, uint64_t block, float *d, size_t n);
/* What obm__cut_apply leaves of all n elements of a block: magnitude patterns from *least on; false where elements
 * equal to the threshold are only partly kept. */
bool obm__cut_least(const obm__cut *c, uint64_t block, size_t n, uint32_t *least);

/* Everything the element pass needs to know in advance, over all groups of one scope; call obm__group_clear afterwards
 * whatever it returns. */
obm_status obm__statistics(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err);
void obm__group_clear(obm__group *g);
/* The method's own `form`, unless it is done. */
obm_status obm__group_form(const obm__run *run, obm__group *g, obm_error *err);
/* Merges elements [begin, begin + n) into out as `dtype`; begin is a multiple of OBM_MERGE_BLOCK. */
obm_status obm__group_run(const obm__run *run, const obm__group *g, uint64_t begin, uint64_t n, obm_dtype dtype,
                          void *out, obm_error *err);
/* Writes n floats as `dtype` and returns the first index that became NaN or Inf, n if none; x is overwritten. */
size_t obm__store_block(const obm_kernels *k, obm_dtype dtype, float *x, size_t n, void *out);
/* Scratch of one worker in the element pass, bytes. */
size_t obm__group_scratch(size_t n_models);

#endif
