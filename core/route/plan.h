/* The inside of a prepared route, shared by plan.c (what has to be done), trim.c (thresholds) and dynamic.c (the
 * values). */
#ifndef OBM_ROUTE_PLAN_H
#define OBM_ROUTE_PLAN_H

#include "dynamic.h"

/* Columns of one step; a multiple of 8, small enough that the values of 64 experts stay in the cache. */
#define OBM_ROUTE_CHUNK 512

/* A trimmed full tensor keeps |x| above the threshold, and equal magnitudes up to the element `last`. */
typedef struct obm__route_cut {
    bool active;
    uint32_t threshold; /* f32 bits, sign cleared */
    int64_t last;
} obm__route_cut;

typedef struct obm__route_tensor {
    obm__route_kind kind;
    bool exists;
    int64_t rows, cols;           /* of the base */
    const obm_tensor *extra;      /* where the routed expert's extra rows lie, NULL without */
    int64_t extra_first, n_extra; /* from this row of `extra` on */
    obm__plane_set planes;        /* PATTERNS */
    obm__route_cut *cuts;         /* ELEMENTS with trims: obm__route_cut_index; NULL: nothing is trimmed */
} obm__route_tensor;

struct obm__route_plan {
    const obm_pack *pack;
    obm__merge_rule rule;
    double *weights;            /* rule.weights, owned */
    size_t hard;                /* obm__route_hard */
    obm__route_tensor *tensors; /* (n_tensors) */
    size_t n_tensors;           /* of the pack, which may have changed when the plan goes */
    obm__pulse *pulse;          /* these two are looked at while trims are found; each may be NULL */
    const _Atomic int *stop;
};

/* The entry that gives expert k's task vector in a tensor: its own, or its embedding's where its head is tied. */
const obm__pack_entry *obm__route_entry(const obm_pack *p, size_t task, size_t tensor);
/* True if the entry has a task vector at all (a plane, a mask, or a full tensor). */
bool obm__entry_present(const obm__pack_entry *e);
/* True if that task vector is more than signs and scales (a full tensor, or a mask): trimmed, and never run on planes. */
bool obm__entry_is_dense(const obm__pack_entry *e);
/* True if expert j's task vector enters the merge: routed to, or in the remainder of one that is. */
bool obm__route_involves(const obm__merge_rule *rule, size_t task);

/* obm__ties_remainder of n <= OBM_ROUTE_CHUNK columns at once, to the bit: d (count, n), rows `stride` apart. */
void obm__ties_columns(const double *d, size_t count, int64_t stride, int64_t n, double *out);

/* d~ of expert `task`: row `row`, columns [col, col + n), n <= OBM_ROUTE_CHUNK; zeros if it does not come in.
 * base: the same columns of the base. */
void obm__route_read(const obm__route_plan *r, size_t task, size_t tensor, int64_t row, int64_t col, int64_t n,
                     const float *base, double *out);
/* Row `row`, columns [col, col + n) of the base. */
void obm__route_read_base(const obm__route_plan *r, size_t tensor, int64_t row, int64_t col, int64_t n, float *out);

/* onto_base trims d~_j whatever is routed to; recomputed trims d~_j - d~_k for every k. */
size_t obm__route_cut_count(const obm__merge_rule *rule);
size_t obm__route_cut_index(const obm__merge_rule *rule, size_t routed, size_t other);
/* Fills the cuts of tensor `only`, of all, or of none. */
obm_status obm__route_trim(obm__route_plan *r, size_t only, obm_error *err);

#endif
