/*
 * What a run on planes reads under a route: for every matrix a few masks of its planes, and one scale for each.
 * Computed once per pack and hard route; a change of route is then a matter of pointers (hard) or of weighted sums
 * (soft).
 */
#ifndef OBM_ROUTE_MASKS_H
#define OBM_ROUTE_MASKS_H

#include "dynamic.h"

/* More than this many masks (or planes) under a route: the matrix runs as an overlay. */
#define OBM_ROUTE_MASKS 8

/* A plane of a matrix.  All that experts have are listed, in pack order: experts, then the planes of an expert. */
typedef struct obm__plane_ref {
    size_t task;
    int plane;               /* of that expert's */
    bool absent;             /* every scale is 0: no mask has it, its signs need not be kept */
    const obm__planes *from; /* borrowed from the pack; a tied expert's head has its embedding's */
} obm__plane_ref;

/* The planes of a tensor, in this order: how many, and into out (nullable). */
size_t obm__planes_list(const obm_pack *p, size_t tensor, obm__plane_ref *out);

typedef struct obm__coefficients obm__coefficients;

/* One matrix under one route.  Masks whose coefficient is 0 everywhere are left out, and planes that are in no mask. */
typedef struct obm__route_masks {
    obm_run run; /* OVERLAY: materialise it; everything below is 0 */
    int n_planes;
    size_t plane[OBM_ROUTE_MASKS]; /* ascending, into obm__coefficients_planes */
    int n;
    uint8_t mask[OBM_ROUTE_MASKS];   /* bit i: plane[i]; an odd number of bits, whose XOR it is */
    const float *c[OBM_ROUTE_MASKS]; /* (groups, c_rows) */
} obm__route_masks;

/* How coefficients lie over a matrix: c[(col / group) * c_rows + row], c_rows 1 where all rows share them. */
typedef struct obm__coefficient_shape {
    int64_t rows, cols;    /* of the base: extra vocabulary rows of a hard route have no planes */
    int64_t group, groups; /* columns that share a scale; cols and 1 without groups */
    int64_t c_rows;
    size_t count; /* groups * c_rows */
} obm__coefficient_shape;

/*
 * The coefficients of one tensor's hard routes under the pack's settings.  *out NULL: no expert has planes here.
 * Immutable, share freely; borrows the pack, and ends with a change of its experts or settings.
 * stop (nullable): once it is 1, what is not done yet is left, with USER.
 * Errors: NOMEM; USER; VALUE: lambda makes a coefficient too large for f32; UNSUPPORTED: more experts than routes take.
 */
obm_status obm__coefficients_new(const obm_pack *p, size_t tensor, const _Atomic int *stop, obm__coefficients **out,
                                 obm_error *err);
void obm__coefficients_free(obm__coefficients *c);
const obm__plane_ref *obm__coefficients_planes(const obm__coefficients *c, size_t *n);
const obm__coefficient_shape *obm__coefficients_shape(const obm__coefficients *c);
size_t obm__coefficients_bytes(const obm__coefficients *c); /* all it holds; scales that the pack has are not copied */

/* How a route runs, and by how many masks at most (a soft route's coefficients may cancel to 0 besides). */
obm_run obm__coefficients_masks(const obm__coefficients *c, const double *weights, int *n);
/* Floats that obm__coefficients_route needs: 0 for a hard route, an overlay and the base. */
size_t obm__coefficients_room(const obm__coefficients *c, const double *weights);
/*
 * weights: (n_experts), finite and >= 0 (obm__route_check).  A hard route borrows from c, a soft one fills `room` (what
 * it does not use of it has no meaning) and borrows that.  Precision: c(k) is computed in f64 and rounded once to f32;
 * c(w) = sum_k w_k c(k) adds those in f64 (tasks in order) and rounds once.  A mask whose sums are below 2^-24 of
 * sum_k w_k |c(k)| on all rows, which is what rounding leaves of tasks that cancel, is left out.
 * Errors: VALUE: a weight makes a coefficient too large for f32.
 */
obm_status obm__coefficients_route(const obm__coefficients *c, const double *weights, float *room,
                                   obm__route_masks *out, obm_error *err);

/* ---- all matrices of a pack ---- */

typedef struct obm__coefficient_cache obm__coefficient_cache;
/* pulse (nullable) is looked at all the time. */
obm_status obm__coefficient_cache_new(const obm_pack *p, obm__pulse *pulse, obm__coefficient_cache **out,
                                      obm_error *err);
void obm__coefficient_cache_free(obm__coefficient_cache *s);
/* NULL: no expert has planes in this tensor; obm__route_changes says whether it is an overlay or the base's. */
const obm__coefficients *obm__coefficient_cache_at(const obm__coefficient_cache *s, size_t tensor);
size_t obm__coefficient_cache_bytes(const obm__coefficient_cache *s);

/* A route of all of them, by the pack's threads.  Borrows the cache.  Errors: as obm__coefficients_route, NOMEM. */
typedef struct obm__planes_route obm__planes_route;
/* In the memory of a route that is not needed any more (NULL: none), which it takes over: new pages cost more than a
 * soft route's sums. */
obm_status obm__planes_route_renew(obm__planes_route *old, const obm__coefficient_cache *s, const double *weights,
                                   obm__planes_route **out, obm_error *err);
void obm__planes_route_free(obm__planes_route *r);
/* Tensors without planes: BASE, also where a full tensor makes them an overlay (obm__route_changes). */
const obm__route_masks *obm__planes_route_at(const obm__planes_route *r, size_t tensor);
size_t obm__planes_route_bytes(const obm__planes_route *r);

#endif
