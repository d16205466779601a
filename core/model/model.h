/*
 * What runs a model: config, weights under a route, KV cache, the forward pass, sampling.
 *
 * A forward call takes rows: one token each, of a sequence at a position.  Prefill rows come in tiles of OBM_TILE_TOKENS
 * (one sequence per tile, position p in row p mod 64, empty rows between); decode rows are one per sequence.  Either way a
 * row's result depends on its own sequence only: not on its neighbours, the chunking of a prompt, or the threads.
 */
#ifndef OBM_MODEL_H
#define OBM_MODEL_H

#include "../route/dynamic.h"
#include "../route/masks.h"
#include "../route/router.h"
#include "placement.h"

#include <math.h>

/* ---- architectures (arch.c): one row per model_type of config.json ---- */

typedef enum obm__role {
    OBM_Q, OBM_K, OBM_V, OBM_O, OBM_GATE, OBM_UP, OBM_DOWN,                             /* matrices of a layer */
    OBM_MATRIX_ROLES,
    OBM_Q_BIAS = OBM_MATRIX_ROLES, OBM_K_BIAS, OBM_V_BIAS, OBM_O_BIAS, OBM_GATE_BIAS, OBM_UP_BIAS, OBM_DOWN_BIAS,   /* matrix + OBM_Q_BIAS */
    OBM_ATTENTION_NORM, OBM_ATTENTION_POST_NORM, OBM_MLP_NORM, OBM_MLP_POST_NORM,       /* before and after a block */
    OBM_Q_NORM, OBM_K_NORM,                                                             /* before the rotation */
    OBM_LAYER_ROLES,
    OBM_EMBEDDING = OBM_LAYER_ROLES, OBM_FINAL_NORM, OBM_HEAD,                          /* once per model */
    OBM_ROLES
} obm__role;

/* What an architecture has beyond LLaMA's, and so which keys of config.json it reads (config_keys.c). */
enum {
    OBM_HAS_ATTENTION_BIAS = 1 << 0,    /* where attention_bias says so */
    OBM_HAS_MLP_BIAS = 1 << 1,          /* where mlp_bias says so */
    OBM_HAS_QKV_BIAS = 1 << 2,          /* always, and none on the output */
    OBM_HAS_WINDOW = 1 << 3,            /* sliding_window */
    OBM_HAS_WINDOW_SWITCH = 1 << 4,     /* use_sliding_window */
    OBM_HAS_WINDOW_TAIL = 1 << 5,       /* max_window_layers */
    OBM_HAS_WINDOW_PATTERN = 1 << 6,    /* sliding_window_pattern */
    OBM_HAS_NO_ROPE_LAYERS = 1 << 7,    /* no_rope_layers, no_rope_layer_interval */
    OBM_HAS_LOCAL_ROPE = 1 << 8,        /* layers with a window rotate by rope_local_base_freq */
    OBM_HAS_PARTIAL_ROPE = 1 << 9,      /* partial_rotary_factor */
    OBM_HAS_QUERY_SCALAR = 1 << 10,     /* query_pre_attn_scalar instead of head_dim */
    OBM_HAS_ATTENTION_CAP = 1 << 11,    /* attn_logit_softcapping */
    OBM_HAS_LOGIT_CAP = 1 << 12,        /* final_logit_softcapping */
    OBM_HAS_MULTIPLIERS = 1 << 13,      /* embedding_, residual_, attention_multiplier, logits_scaling */
    OBM_HAS_SCALED_EMBEDDING = 1 << 14, /* by sqrt(hidden_size) */
    OBM_HAS_WHOLE_QK_NORM = 1 << 15,    /* q and k norms over all heads together, not head by head */
    OBM_HAS_HIDDEN_ACTIVATION = 1 << 16,/* hidden_activation; hidden_act is not looked at */
    OBM_HAS_OLD_LONGROPE = 1 << 17,     /* "yarn" is an old name of longrope */
};

/* Which layers see sliding_window positions only, unless layer_types says. */
typedef enum obm__window_rule {
    OBM_WINDOW_ALL,
    OBM_WINDOW_TAIL,        /* from max_window_layers on */
    OBM_WINDOW_ALTERNATE,   /* all but every window_pattern-th */
    OBM_WINDOW_NO_ROPE      /* those that do not rotate */
} obm__window_rule;

typedef enum obm__activation { OBM_SILU, OBM_GELU_TANH } obm__activation;

/* Defaults are those of a key that config.json lacks; 0 where LLaMA's hold. */
typedef struct obm__arch {
    const char *model_type;
    const char *inner, *inner_type; /* the key of the text model's own config, and the model_type there; else NULL */
    const char *names[OBM_ROLES];   /* tensor names, "{}" is the layer; NULL: the architecture has no such tensor */
    unsigned has;                   /* OBM_HAS_* */
    obm__window_rule windows;
    int64_t window_pattern;
    float norm_offset;              /* added to the weights of all norms */
    int64_t default_heads, default_vocab, default_window, default_positions, default_original_positions;
    int64_t default_kv_heads;       /* 0: as many as heads */
    int64_t default_head_dim;       /* 0: hidden / heads */
    double default_theta, default_eps;
    double default_attention_cap, default_logit_cap, default_query_scalar;
    bool default_tied;
} obm__arch;
const obm__arch *obm__arch_find(const char *model_type);
void obm__arch_list(char *buf, size_t size);   /* "llama, mistral, ..." */

/* ---- config.json (config.c, config_rope.c, config_keys.c) ---- */

typedef enum obm__rope_type {
    OBM_ROPE_DEFAULT, OBM_ROPE_LINEAR, OBM_ROPE_DYNAMIC, OBM_ROPE_LLAMA3, OBM_ROPE_YARN, OBM_ROPE_LONGROPE,
    OBM_ROPE_TYPES
} obm__rope_type;

typedef struct obm__rope {
    obm__rope_type type;
    int64_t dim;                                              /* columns of a head that are rotated */
    double theta, factor, original_positions;
    double low_freq_factor, high_freq_factor;                 /* llama3 */
    double beta_fast, beta_slow; bool truncate;               /* yarn */
    float attention_factor;                                   /* of cosine and sine: yarn, longrope; else 1 */
    float *short_factor, *long_factor;                        /* longrope: (pairs), owned */
} obm__rope;
#define OBM_ROPES 2   /* of layers that see everything, of layers with a window */

typedef struct obm__layer {
    int64_t window;             /* 0: none */
    int rope;                   /* of config.ropes; -1: positions are not rotated */
} obm__layer;

typedef struct obm__config {
    const obm__arch *arch;
    int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, max_positions, window;   /* window 0: none */
    float norm_eps;
    bool tied, attention_bias, mlp_bias;
    obm__activation activation;
    float attention_scale;                     /* of q . k */
    float attention_cap, logit_cap;            /* c * tanh(x / c); 0: none */
    float embedding_multiplier, residual_multiplier, logit_divisor;
    obm__rope ropes[OBM_ROPES]; int n_ropes;
    obm__layer *layer;                         /* (layers), owned */
    int32_t *eos; size_t n_eos;
} obm__config;
/* generation may be NULL (generation_config.json; its eos_token_id wins).  `where` names the file in messages.
 * *out is cleared with obm__config_clear.  Errors: FORMAT (a key is missing or wrong), UNSUPPORTED (names the key). */
obm_status obm__config_parse(const obm_json *config, const obm_json *generation, const char *where, obm__config *out, obm_error *err);
void obm__config_clear(obm__config *c);
bool obm__config_has(const obm__config *c, obm__role role);   /* false: an absent bias, the head of a tied model */
void obm__config_shape(const obm__config *c, obm__role role, int64_t *rows, int64_t *cols);   /* vectors: rows 1 */
/* Matrices that share a name share a tensor, one after the other in the order of their roles (Phi-3's qkv_proj and
 * gate_up_proj): this one's rows begin at `first` of `whole`. */
void obm__config_place(const obm__config *c, obm__role role, int64_t *first, int64_t *whole);

/* ---- sign planes (planes.c) ---- */

/* Columns over which neither the scale of the activations nor any alpha changes: byte columns [first, first + count). */
typedef struct obm__segment { size_t first, count; } obm__segment;

/* The signs of one matrix, those of every expert, in the order in which a run reads them: blocks of 64 rows, in a block
 * one plane after the other, in a plane the 64 bytes of each byte column.  All routes share them. */
typedef struct obm__signs {
    uint8_t *blocks;            /* (ceil(rows / 64), n, row_bytes, 64); NULL: no expert is 1-bit here */
    size_t n;                   /* planes in pack order: experts, then planes of an expert */
    int64_t rows, cols, row_bytes;
    int64_t first;              /* its first row in the tensor of the pack */
    obm__segment *segments;
    size_t n_segments;
} obm__signs;
/* Repacks the signs of all matrices of the pack (once per model). */
obm_status obm__signs_load(obm_model *m, obm_error *err);
void obm__signs_free_all(obm_model *m);
size_t obm__signs_bytes(const obm__signs *s);   /* of its blocks */
/* Those of a matrix, or of a tied head; NULL without. */
const obm__signs *obm__signs_of(const obm_model *m, int64_t layer, obm__role role);

/* The coefficients of the hard routes under one setting of the pack, from which all routes are made (route/masks.h).
 * Shared by the routes that were prepared under it. */
typedef struct obm__hard_routes {
    obm__coefficient_cache *cache;
    obm_pack_settings settings;
    int refs;
} obm__hard_routes;
/* Those of the pack's settings as they are now, computed where they are not there yet; references. */
obm_status obm__coefficients_acquire(obm_model *m, obm__hard_routes **out, obm_error *err);
void obm__coefficients_release(obm__hard_routes *h);

/* What a route adds to the base in one matrix: sum over masks M of c_M * prod_{i in M} s_i (route/coefficients.c). */
typedef struct obm__terms {
    const obm__signs *signs;
    const obm__route_masks *masks;      /* one or more */
    const obm__coefficient_shape *shape;
} obm__terms;

/* Activations as the planes take them: fixed point, in tables (kernels.h).  One for each vector of a batch. */
typedef struct obm__tables {
    uint8_t *bytes;             /* (row_bytes, 64) */
    float *scales;              /* (tiles) */
    int32_t *sums;              /* (groups of 64 columns) */
} obm__tables;
/* y[r] += the terms of rows [row, row + rows) of a block of 64 rows, times the vector in the tables.  `ahead`: what is
 * read next, NULL or the next rows of the base. */
void obm__terms_multiply(const obm_kernels *k, const obm__terms *t, const obm__tables *x, int64_t row, int64_t rows,
                         const void *ahead, size_t ahead_bytes, float *y);
/* panel (rows, cols) += the terms of rows [row, row + rows), row a multiple of 64; strip: OBM_STRIP_BYTES of scratch. */
#define OBM_STRIP_BYTES ((size_t)OBM_ROUTE_MASKS * OBM__PLANE_ROWS * OBM__PLANE_TILE / 8)
void obm__terms_add(const obm_kernels *k, const obm__terms *t, int64_t row, int64_t rows, float *panel, uint8_t *strip);

/* Where a role's tensor stands in a list of (layers, OBM_LAYER_ROLES), then the three of the model. */
static inline size_t obm__role_index(int64_t layers, int64_t layer, obm__role role) {
    return role < OBM_LAYER_ROLES ? (size_t)(layer * OBM_LAYER_ROLES + role)
                                  : (size_t)(layers * OBM_LAYER_ROLES + role - OBM_LAYER_ROLES);
}

/* ---- the base in 12 bits per weight (z12.c) ---- */

typedef struct obm__packing obm__packing;

/* Packs the bf16 matrices of m->base_alone (once per model); those with many escapes stay as they are. */
obm_status obm__z12_load(obm_model *m, obm_error *err);
/* Or behind the tokens, where it is worth it; without memory it says so, and the rest stays as it is. */
void obm__z12_auto(obm_model *m);
void obm__z12_begin(obm_model *m, size_t steps_before, size_t steps_while);   /* worth it or not; rows have no place */
/* Once before every step of a generation: packs a share where it has one token. */
obm_status obm__z12_step(obm_model *m, size_t tokens, obm_error *err);
void obm__z12_end(obm_model *m);   /* no more of it: what is packed stays */
void obm__z12_free_all(obm_model *m);
obm_status obm__z12_check(obm_z12 wanted, obm_error *err);

/* ---- placed memory (placed.c): everything here is as if there were one node while m->placement is NULL ---- */

typedef enum obm__placed_part {
    OBM_PLACED_WEIGHTS, OBM_PLACED_PLANES, OBM_PLACED_OVERLAYS, OBM_PLACED_KV, OBM_PLACED_PARTS
} obm__placed_part;
/* A block of rows: bytes [at[i], at[i + 1]) are read by the workers of node i, by anybody's where rows have no place. */
typedef struct obm__region obm__region;
struct obm__region {
    void *data;
    size_t bytes, at[OBM_NODES + 1];
    int copies;                 /* > 1: of all bytes, the first one at home */
    bool shared;                /* one copy, read by all nodes with workers and spread over the nodes */
    obm__placed_part part;
    obm__region *next;
};
/* Makes m->placement if the context's workers are in lanes. */
obm_status obm__place_model(obm_model *m, bool z12, obm_error *err);
/* Copies what is not packed of m->base_alone. */
obm_status obm__place_weights(obm_model *m, obm_error *err);
/* Memory for `items` of `per_item` rows each of a matrix of a kind; NULL: none left. */
void *obm__place_alloc(obm_model *m, obm__placed_part part, int kind, int64_t per_item, size_t items, size_t item_bytes);
void obm__place_free(obm_model *m, void *data);
/* A matrix of a role that a route makes, (rows) of row_bytes; there once, whatever the mode.  It is in no list and warns of
 * nothing, so that another thread may ask for it while sequences run.  NULL: none left. */
obm__region *obm__place_overlay(const obm_model *m, obm__role role, int64_t rows, size_t row_bytes);
void obm__place_overlay_free(obm__region *r);   /* NULL is fine */
/* fn over the items of such a matrix, each of per_item rows, by the workers of the rows' nodes. */
obm_status obm__place_overlay_slices(obm_model *m, obm__role role, int64_t rows, int64_t per_item, size_t items, size_t size,
                                     obm__range_fn fn, void *arg, obm_error *err);
void obm__place_free_all(obm_model *m);
uint64_t obm__place_more(const obm_model *m, obm__placed_part part);   /* bytes of all copies but the first */
/* Where rows are replicated, a block of `bytes` is there once for each node: the copy that is near a worker lies
 * obm__place_near bytes behind the first.  Its filler fills the first, and has the nodes copy it. */
size_t obm__place_near(const obm_model *m, size_t bytes, int worker);
size_t obm__place_near_node(const obm_model *m, size_t bytes, int node);
obm_status obm__place_spread(obm_model *m, void *data, obm_error *err);
/* The same without a record: whole pages, bound as `at` says. */
char *obm__map_huge(size_t bytes);   /* whole pages, zero, huge ones where the system has them; NULL: no memory */
void *obm__place_map(obm_model *m, size_t bytes, const size_t *at);
void obm__place_unmap(void *data, size_t bytes);
/* The nodes' items of that kind; one lane with all of them where rows have no place. */
void obm__place_split(const obm_model *m, int kind, int64_t per_item, size_t items, obm__lanes *out);
/* obm__parallel_slices of such items, by the workers of their nodes. */
obm_status obm__place_slices(obm_model *m, int kind, int64_t per_item, size_t items, size_t size, obm__range_fn fn, void *arg,
                             obm_error *err);
/* obm__parallel over rows of activations: those of one node alone where the others' workers rest. */
void obm__place_rows(const obm_model *m, size_t n, size_t grain, obm__range_fn fn, void *arg);
/* The calling thread is worker 0 while it is in the model, and what it was before and after. */
void obm__place_caller(obm_model *m);
void obm__place_leave(obm_model *m);

/* ---- weights under a route (weights.c) ---- */

typedef struct obm__matrix {
    const void *data;           /* F32, F16, BF16; aligned; NULL: absent, or found by token */
    obm_dtype dtype;
    int64_t rows, cols;
    const obm__terms *terms;    /* what the route adds on planes; NULL: nothing */
    bool by_token;              /* an embedding whose rows are merged when they are asked for */
    const obm__z12 *z12;        /* the same weights packed, which runs read in place of data; NULL, or no codes: not packed */
    const void *origin;         /* what data is a placed copy of, in the mapping; NULL: data is no copy */
} obm__matrix;
static inline const obm__z12 *obm__matrix_packed(const obm__matrix *w) { return w->z12 && w->z12->codes ? w->z12 : NULL; }

/* A tensor that does not run on planes, materialised for one route, or for all that agree on it (overlay.c). */
typedef struct obm__overlay obm__overlay;
struct obm__overlay {
    size_t tensor;
    int64_t rows;               /* a hard route may bring extra vocabulary */
    double *route;              /* (tasks), as far as it matters to the tensor */
    obm_pack_settings settings;
    obm__matrix matrix;
    obm__region *region;        /* its placed memory; NULL: memory of its own */
    uint64_t bytes;
    int refs;                   /* weights that use it */
    obm__overlay *next;
};

/* Keys of the list of overlays: tensor, rows, route as far as it matters, settings of the pack. */
obm__overlay *obm__overlay_find(const obm_model *m, size_t tensor, int64_t rows, const double *route);   /* NULL: not there */
obm_status obm__overlay_new(const obm_model *m, size_t tensor, int64_t rows, const double *route, obm__overlay **out,
                            obm_error *err);
void obm__overlay_keep(obm_model *m, obm__overlay *o);      /* into the list, once it is filled */
void obm__overlay_release(obm_model *m, obm__overlay *o);   /* drops a reference; the last one frees */
void obm__overlay_free(obm__overlay *o);                    /* one that is not in the list */
bool obm__same_settings(const obm_pack_settings *a, const obm_pack_settings *b);
/* The tensor under the plan's route; shape is its shape there.  stop NULL: by the pool, with the pulse; else on this thread
 * alone until *stop is set (USER).  out->data is owned, *region too: not NULL where out->data is its memory.  region NULL:
 * the tensor is a vector, which everybody reads. */
obm_status obm__overlay_fill(obm_model *m, const obm__route_plan *plan, size_t tensor, obm__role role, const obm_tensor *shape,
                             const _Atomic int *stop, obm__matrix *out, obm__region **region, obm_error *err);

/* Everything the forward pass multiplies with, for one route: the base's mapping, what is added on planes, overlays. */
typedef struct obm__weights obm__weights;
struct obm__weights {
    double *route;              /* (tasks), NULL: the base alone */
    size_t tasks;
    obm_pack_settings settings; /* of the pack when the route was prepared */
    obm__matrix *tensors;       /* (layers, OBM_LAYER_ROLES), then the three of the model; data NULL: absent */
    int64_t layers;
    obm__route_plan *plan;      /* owned; NULL: the base alone */
    size_t embedding;           /* tensor of the pack, for rows by token */
    obm__overlay **overlays; size_t n_overlays;   /* referenced */
    obm__hard_routes *hard_routes;                /* referenced; NULL: nothing runs on planes */
    obm__planes_route *masks;                     /* owned */
    obm__terms *terms;                            /* owned: (layers, OBM_MATRIX_ROLES), then the head's */
    void **owned; size_t n_owned;
    uint64_t bytes, terms_bytes;/* of owned, of masks and terms */
    int refs;                   /* running sequences */
    uint64_t used;              /* clock of the last acquire */
    obm__weights *next;
};
/* The one question a linear layer asks: this matrix under this route. */
static inline const obm__matrix *obm__weights_at(const obm__weights *w, int64_t layer, obm__role role) {
    return &w->tensors[obm__role_index(w->layers, layer, role)];
}
static inline int64_t obm__weights_vocab(const obm__weights *w) { return obm__weights_at(w, 0, OBM_EMBEDDING)->rows; }
/* Row `id` of the embedding, f32, (hidden). */
obm_status obm__weights_embed(const obm_model *m, const obm__weights *w, int32_t id, float *out, obm_error *err);
/* route NULL or all zero: the base alone.  Prepares or finds the route and takes a reference; obm__weights_release drops
 * it.  Unreferenced routes beyond the model's budget go, least recently used first. */
obm_status obm__weights_acquire(obm_model *m, const double *route, obm__weights **out, obm_error *err);
/* The same beside other routes that run: *out is NULL while its overlays are being built on a thread of their own, and
 * when it would take the routes in use over the budget. */
obm_status obm__weights_admit(obm_model *m, const double *route, obm__weights **out, obm_error *err);
void obm__weights_release(obm_model *m, obm__weights *w);
/* ARG once the pack has other experts than when the model was opened: weights point into what it had then. */
obm_status obm__weights_check(const obm_model *m, obm_error *err);
/* Stops the thread that builds overlays. */
void obm__weights_cancel(obm_model *m);
void obm__weights_free_all(obm_model *m);

/* ---- preparing a route (prepare.c) ---- */

typedef struct obm__pending {
    size_t tensor;
    obm_tensor shape;
    bool vector;
    obm__role role;
    obm__matrix *out;           /* where it belongs in the weights */
    obm__overlay *overlay;      /* NULL: a vector, which its route keeps for itself */
    bool shared;                /* an entry before this one fills the overlay: a fused tensor has several roles */
    obm__matrix filled;         /* that vector */
} obm__pending;
typedef struct obm__build {
    obm_model *m;
    obm__weights *w;
    obm__pending *pending; size_t n_pending;
    bool trims, ties_head, head_has_planes;
    uint64_t needed;            /* bytes of overlays to come, in the base's dtype */
    obm_error *err;
    obm__task *task;            /* on a thread of its own */
    _Atomic int stop;
    obm_status status;          /* of that thread */
    obm_error error;
} obm__build;
/* Decides about every tensor; what has to be computed is left to obm__build_run, which may run on another thread while
 * sequences run (stop as for obm__overlay_fill).  obm__build_keep hands the weights out. */
obm_status obm__build_new(obm_model *m, const double *route, obm__build **out, obm_error *err);
obm_status obm__build_run(obm__build *b, const _Atomic int *stop, obm_error *err);
obm_status obm__build_keep(obm__build *b, obm__weights **out, obm_error *err);
void obm__build_free(obm__build *b);
void obm__weights_free(obm_model *m, obm__weights *w);

/* ---- KV cache and sequences (kv.c) ---- */

#define OBM_TILE_TOKENS 64
#define OBM_BLOCK_ROWS OBM__PLANE_ROWS   /* weight rows of one item of work: a block of the planes, whole strips of gemm */
/* Keys and values of 64 positions in all layers: (layers, 2, kv_heads, 64, head_dim), where heads lie on several nodes one
 * such block for the heads of each.  Pages never move, so growing copies nothing. */
typedef struct obm__page {
    void *data;
    size_t users;               /* sequences that have it */
} obm__page;
typedef struct obm__sequence {
    obm__weights *weights;      /* referenced; NULL: what is left of one that has ended */
    obm_dtype kv;
    obm__page **pages; size_t n_pages, capacity;
    int64_t length;             /* positions filled */
    float *frequencies;         /* (ropes, pairs): its own where they depend on how long it gets, else NULL */
} obm__sequence;
obm_status obm__sequence_new(obm_model *m, const double *route, obm_dtype kv, obm__sequence **out, obm_error *err);
/* *out NULL: the route budget has no room beside what runs. */
obm_status obm__sequence_admit(obm_model *m, const double *route, obm_dtype kv, obm__sequence **out, obm_error *err);
void obm__sequence_free(obm_model *m, obm__sequence *s);
/* Tells an empty sequence how many positions it will have at most in this call.  The rotation of dynamic and longrope
 * depends on the length; it is chosen once, by this one, so that it does not depend on chunks or on the step. */
obm_status obm__sequence_expect(const obm_model *m, obm__sequence *s, int64_t positions, obm_error *err);
obm_status obm__sequence_reserve(obm_model *m, obm__sequence *s, int64_t positions, obm_error *err);
/* A prompt that begins like another of the same route has the same keys and values there, bit for bit, since chunks and
 * neighbours change none.  False: the two rotate differently (see obm__sequence_expect). */
bool obm__sequence_alike(const obm_model *m, const obm__sequence *a, const obm__sequence *b);
/* s, which is empty, begins with the first pages of `from`, all of prompts: both have them.  They need not be computed
 * yet where their rows come before those of s. */
obm_status obm__sequence_share(obm__sequence *s, const obm__sequence *from, size_t pages, obm_error *err);
/* s, which is empty, gets all pages of `from`, and goes on behind its first `length` positions. */
void obm__sequence_continue(obm__sequence *s, obm__sequence *from, int64_t length);
/* All but the first pages go, and the weights: for others to share. */
void obm__sequence_cut(obm_model *m, obm__sequence *s, size_t pages);
size_t obm__kv_page_bytes(const obm_model *m, obm_dtype kv);
/* Of a page, by node, where there is a placement (zeros where its heads have no place). */
void obm__kv_bounds(const obm_model *m, obm_dtype kv, size_t *at);
/* Keys (which 0) or values (which 1) of one page: (64, head_dim) of dtype s->kv. */
void *obm__kv_at(const obm_model *m, const obm__sequence *s, int64_t page, int64_t layer, int which, int64_t kv_head);

/* ---- rotary embedding (rope.c) ---- */

int64_t obm__rope_pairs(const obm__rope *r);   /* columns (i, i + pairs) of a head rotate together */
bool obm__rope_needs_length(const obm__rope *r);
/* out: (pairs) inverse frequencies for sequences of up to `positions`. */
void obm__rope_frequencies(const obm__rope *r, int64_t positions, float *out);
/* Cosines and sines of a position, times the attention factor. */
void obm__rope_table(const obm__rope *r, const float *frequencies, int64_t position, float *cosine, float *sine);

/* ---- forward (forward.c, linear.c, attention.c) ---- */

typedef struct obm__row {
    obm__sequence *sequence;    /* NULL: an empty row of a tile */
    int64_t position;
    int32_t id;
} obm__row;

/* What one head of a row makes of a part of the positions that it sees: the largest score, and the total of the weights
 * relative to it. */
#define OBM_PART_POSITIONS 1024
typedef struct obm__part { double total; float largest; } obm__part;

/* Buffers of a forward call, grown as needed and kept. */
typedef struct obm__scratch {
    size_t rows, part_rows;     /* room for: rows, and parts of rows that decode */
    const obm__weights **weights;   /* (rows): of each row's sequence, NULL for empty rows */
    float *x, *normed;          /* (rows, hidden) */
    float *q, *mixed;           /* (rows, heads * head_dim) */
    float *k, *v;               /* (rows, kv_heads * head_dim) */
    float *gate, *up;           /* (rows, intermediate) */
    float *cosine, *sine;       /* (ropes, rows, pairs) */
    float *panels, *packed, *products;   /* per worker: (64, widest) = panel_size, as read and as GEMM takes it; (64, 64) */
    size_t panel_size, widest;  /* columns of the widest matrix */
    uint8_t *strips;            /* per worker: OBM_STRIP_BYTES; NULL: no planes */
    uint16_t *rounded;          /* (rows, widest): activations of prompts as bf16; NULL: they stay f32 */
    uint16_t *unpacked;         /* per worker: (OBM__Z12_UNPACKED, widest); NULL: no z12, or the mapping beside it */
    obm__tables *tables;        /* (table_rows) of the vectors of a decode step */
    size_t table_rows;
    void *table_bytes;          /* what they point into */
    float *scores, *widened;    /* per worker: (heads of a group, OBM_PART_POSITIONS) and (64, head_dim) */
    obm__part *parts;           /* (rows, heads, parts) */
    float *sums;                /* (rows, heads, parts, head_dim) */
    float *tiles;               /* per worker: obm__tile_floats */
    uint64_t bytes;
} obm__scratch;
void obm__scratch_free(obm__scratch *s);
/* Room for the tables of n vectors. */
obm_status obm__scratch_tables(obm_model *m, size_t n, obm_error *err);

/* Work between two looks at the pulse: about 25 ms at 40 GFLOP/s. */
#define OBM_SLICE_FLOPS 1e9

/* One linear layer, y = x W^T + b; y: (n, ld). */
typedef struct obm__linear { obm__role role; float *y; int64_t ld; } obm__linear;
/* `count` <= 3 layers that read the same x, (n, cols), as one parallel region; row i is multiplied with weights[i], rows
 * with NULL are skipped.  tiled: through GEMM, whose results depend on the row of x and of W alone, else row by row. */
obm_status obm__linear_run(obm_model *m, const obm__weights *const *weights, size_t n, bool tiled, int64_t layer,
                           const obm__linear *layers, size_t count, const float *x, obm_error *err);
/* Zhang and Sennrich 2019: x / sqrt(mean(x^2) + eps) * (weight + offset); out may be x. */
void obm__rms_norm(const obm_model *m, const float *x, const float *weight, int64_t n, float *out);
/* Gemma 2: cap * tanh(x / cap), which bends large values and hardly changes small ones. */
static inline float obm__soft_cap(float x, float cap) { return cap * tanhf(x / cap); }
/* Normalises and rotates q and k, writes k and v of all rows to their caches, attends; the result is in m->scratch.mixed.
 * tiled: as in obm__linear_run. */
obm_status obm__attention_run(obm_model *m, const obm__row *rows, size_t n, bool tiled, int64_t layer, obm_error *err);
/* The heads [head, head + span), which read the same keys, of rows [first, first + n) of a tile, all with a sequence. */
void obm__attend_tile(const obm_model *m, const obm__row *rows, size_t first, size_t n, int64_t layer, int64_t head,
                      size_t span, int worker);
size_t obm__tile_floats(const obm_model *m);

/* Runs `layers` layers; the hidden states are in m->scratch.x, (n, hidden).  Sequences must have room for the positions. */
obm_status obm__forward(obm_model *m, const obm__row *rows, size_t n, bool tiled, int64_t layers, obm_error *err);
/* Logits of some rows of the last forward call over all layers.  out: (n, m->vocab), ids that the route lacks at -inf.  Always
 * row by row, so that a row's logits do not depend on which others are asked for. */
obm_status obm__forward_logits(obm_model *m, const obm__row *rows, const size_t *which, size_t n, float *out, obm_error *err);

/* Called after each chunk of a prompt; rows with a sequence hold its tokens in order. */
typedef obm_status (*obm__visit_fn)(void *arg, obm_model *m, const obm__row *rows, size_t n, obm_error *err);
#define OBM_CHUNK_ROWS 512   /* 8 tiles: enough to reuse a converted panel, small enough to bound the buffers */
/* Rows for the next tokens of s in whole tiles, at most `room` rows (a multiple of 64); returns how many tokens fit. */
size_t obm__fill_tiles(obm__sequence *s, const int32_t *ids, size_t n, obm__row *rows, size_t room, size_t *n_rows);
/* Appends ids to a sequence through GEMM tiles, or one by one through the decode path; visit may be NULL. */
obm_status obm__prefill(obm_model *m, obm__sequence *s, const int32_t *ids, size_t n, bool decode, int64_t layers,
                        obm__visit_fn visit, void *arg, obm_error *err);

/* ---- the model (model.c) ---- */

/* How text and ids belong together under a route. */
typedef struct obm__model_text {
    const obm_tokenizer *tokenizer;     /* NULL without tokenizer.json */
    const int32_t *eos; size_t n_eos;
    obm_tokenizer *owned;               /* an expert's own that no expert before it has; NULL without */
    int32_t *owned_eos;                 /* a copy: the pack may change while the model is open */
} obm__model_text;

struct obm_model {
    obm_context *ctx;
    obm__guard guard;
    unsigned warned_of_length;          /* a warning is given once */
    const obm_checkpoint *base;         /* of the pack, or our own */
    obm_checkpoint *own_checkpoint;
    const obm_pack *pack;               /* NULL for a plain model */
    obm_pack *own_pack;
    size_t tasks;                       /* of the pack at opening */
    uint64_t revision;                  /* of the pack at opening: what it gave out is gone once that changes */
    obm_tokenizer *tokenizer;           /* the base's, NULL without tokenizer.json */
    obm__model_text *texts;             /* (tasks), then the base's */
    obm__config config;
    int64_t vocab;                      /* the largest of base and experts */
    obm_dtype kv, prefill;
    uint64_t route_budget;
    int64_t pairs;                      /* of the widest rotation */
    float *frequencies;                 /* (ropes, pairs), for sequences of any length or of no more than was trained */
    float embedding_scale;
    size_t *tensors;                    /* of the pack, in the order of obm__weights.tensors; NULL for a plain model */
    obm__placement *placement;          /* NULL: memory is where the system puts it, and rows are anybody's */
    obm__region *regions;               /* list */
    void *caller_bound;                 /* what the calling thread is bound to outside */
    bool bind_refused, thread_refused;  /* and warned about */
    obm__weights *base_alone;           /* in the list */
    obm__planes_route *spare;           /* memory for the coefficients of the next route; NULL */
    obm__weights *routes;               /* list; the base alone is the last */
    uint64_t clock;
    obm__z12 *z12;                      /* (layers, OBM_MATRIX_ROLES), then the head's, empty where the base is read as it is; NULL: it all is */
    obm__signs *signs;                  /* (layers, OBM_MATRIX_ROLES), then the head's; NULL: nothing runs on planes */
    obm__hard_routes *hard_routes;      /* of the pack's last settings; NULL: no route has asked yet */
    obm__overlay *overlays;             /* list */
    obm__build *building;               /* a route whose overlays are on their way; NULL */
    bool uses_pack;                     /* counted among the pack's users */
    bool materialise;                   /* nothing runs on planes */
    bool decoding;                      /* sequences run that must not wait for overlays of others */
    uint64_t params, base_bytes, kv_bytes, overlay_bytes, signs_bytes, terms_bytes;
    uint64_t z12_bytes, z12_saved, z12_to_come;   /* of packed matrices: now, and as bf16; of those that will be */
    char *z12_pages;                    /* the codes of all; NULL where rows have places */
    size_t z12_room, z12_used;
    bool z12_beside;                    /* the mapping stays too, for what several tokens are multiplied with */
    obm__packing *packing;              /* behind the tokens; NULL: nothing is to come */
    obm__scratch scratch;
    obm__pulse *pulse;                  /* of the running call, NULL if it cannot be stopped */
};
/* Lists over all matrices: those of the layers, then the head. */
static inline size_t obm__matrix_count(const obm_model *m) { return (size_t)m->config.layers * OBM_MATRIX_ROLES + 1; }
static inline obm__role obm__matrix_role(const obm_model *m, size_t i, int64_t *layer) {
    bool head = i + 1 == obm__matrix_count(m);
    *layer = head ? 0 : (int64_t)(i / OBM_MATRIX_ROLES);
    return head ? OBM_HEAD : (obm__role)(i % OBM_MATRIX_ROLES);
}
/* Enters the guard and sets the pulse (nullable) of this call; obm__model_leave undoes both. */
obm_status obm__model_enter(obm_model *m, obm__pulse *pulse, obm_error *err);
void obm__model_leave(obm_model *m);
/* A stream keeps the model between its calls, but not the pack: that may change, and ends the stream with an error. */
void obm__model_pause(obm_model *m);
obm_status obm__model_resume(obm_model *m, obm_error *err);   /* BUSY while the pack changes */
/* Mean of the hidden states after `layer` of the base alone over the ids (layer 0: the embeddings, no forward pass).
 * out: (hidden).  Does not enter the guard: for callers that hold the model. */
obm_status obm__model_pool(obm_model *m, const int32_t *ids, size_t n, int layer, float *out, obm_error *err);
obm_status obm__model_check_ids(const obm_model *m, const obm__weights *w, const int32_t *ids, size_t n, obm_error *err);
size_t obm__model_tasks(const obm_model *m);   /* 0 for a plain model */
/* Opens the checkpoint or the pack, then reads config.json: the first two steps of obm_model_open. */
obm_status obm__model_open_files(obm_model *m, const char *name, const char *base, obm__pulse *pulse, obm_error *err);
obm_status obm__model_load_config(obm_model *m, obm_error *err);
/* What the placement plan needs to know, from config and headers; m->tensors is there for a pack (shapes.c). */
obm_status obm__placed_shapes_of(const obm_model *m, bool z12, obm__placed_shapes *out, obm_error *err);
/* The role of a kind, and the other way round: matrices of a layer, then the head. */
static inline obm__role obm__kind_role(int kind) { return kind == OBM_KIND_HEAD ? OBM_HEAD : (obm__role)kind; }
static inline int obm__role_kind(obm__role role) { return role == OBM_HEAD ? OBM_KIND_HEAD : (int)role; }
/* "model.layers.{}.x" with the layer in place of {}. */
void obm__tensor_name(const char *pattern, int64_t layer, char *buf, size_t size);
/* Fills m->tensors. */
obm_status obm__model_find_tensors(obm_model *m, obm_error *err);
/* Index in the pack of a role's tensor (of the embedding for a tied head), or SIZE_MAX. */
size_t obm__model_tensor(const obm_model *m, int64_t layer, obm__role role);
/* route NULL: the base's.  Never NULL. */
const obm__model_text *obm__model_text_for(const obm_model *m, const double *route);
/* Fills m->texts from the pack; MISMATCH when the base's tokenizer is no longer the one that an expert was checked with. */
obm_status obm__model_load_texts(obm_model *m, obm_error *err);
void obm__model_free_texts(obm_model *m);

/* ---- sampling (sample.c) ---- */

typedef struct obm__sampler {
    const obm_kernels *k;
    double temperature, top_p, min_p, repetition_penalty;   /* 0 (and 1 for the last): off */
    size_t top_k;
    uint64_t seed, stream;      /* stream: the prompt's index */
    struct obm__candidate *candidates;   /* (vocab) */
    int64_t vocab;
} obm__sampler;
obm_status obm__sampler_init(obm__sampler *s, const obm_kernels *k, const obm_generate_options *options,
                             uint64_t stream, int64_t vocab, obm_error *err);
void obm__sampler_clear(obm__sampler *s);
/* The token of step `step`; logits are changed.  history: prompt and generated ids, for the repetition penalty. */
int32_t obm__sample(obm__sampler *s, float *logits, const int32_t *history, size_t n_history, uint64_t step);
/* VALUE when nothing can be drawn from them: a NaN, or a largest one that is infinite.  -inf masks an id and is fine. */
obm_status obm__logits_check(const obm_kernels *k, const float *logits, int64_t n, size_t position, size_t prompt,
                             obm_error *err);
/* Lowest index among equals; the first NaN where there is one. */
int32_t obm__argmax(const obm_kernels *k, const float *logits, int64_t n);
double obm__random_uniform(uint64_t seed, uint64_t stream, uint64_t step);   /* [0, 1) */

/* ---- prompts (prompt.c) ---- */

/* How the prompts of one route become ids. */
typedef struct obm__prompter {
    const obm_model *m;
    const obm_tokenizer *tokenizer;   /* the route's */
    obm_render_fn render;             /* NULL: the built-in templates */
    void *render_user;
    const char *template_name;        /* of the built-in one that is wanted, before `render`; NULL: the model's own */
} obm__prompter;
/* The ids that run for a prompt, as obm_prompt says.  chat: text is one user turn.  *ids owned. */
obm_status obm__prompt_ids(const obm__prompter *how, const obm_prompt *p, bool chat, int32_t **ids, size_t *n, obm_error *err);
/* The text that runs for a prompt (rendered where needed); *text NULL for ids.  *special: the post-processor's tokens apply. */
obm_status obm__prompt_text(const obm__prompter *how, const obm_prompt *p, bool chat, char **text, bool *special, obm_error *err);

#endif
