/*
 * The dynamic merge: what the weights are under one route.
 *
 *     theta(k) = theta_base + d~_k + lambda * TIES({ d~_j : j != k })                      hard route, reading
 * onto_base theta(w) = theta_base + sum_k w_k (theta(k) - theta_base)                            soft route
 *
 * Where all experts are 1-bit (or same, or dropped) in a matrix, theta depends on the n sign bits only: the table over
 * the 2^n patterns and its Walsh-Hadamard transform (coefficients.c) give the merged value and, later, the scalars for
 * running on the planes.  Everything else (full tensors) goes through the plain elementwise rule, with trims by the
 * profile.
 */
#ifndef OBM_DYNAMIC_H
#define OBM_DYNAMIC_H

#include "../io/pack.h"
#include "coefficients.h"

/* The elementwise TIES of the remainder (unit weights, disjoint mean, a zero sum yields 0), in f64 over values in pack
 * order. The specification that tables, tests and full tensors share. */
double obm__ties_remainder(const double *d, size_t n);
/* theta(w) - theta_base of one element, from the K task-vector values d[0..K) in f64. */
double obm__merged_delta(const double *d, size_t n_tasks, const double *weights, double lambda, obm_reading reading);

/* Weights are used as given, but they have to be numbers: ARG names the task of one that is negative, NaN or infinite.
 */
obm_status obm__route_check(const obm_pack *p, const double *weights, obm_error *err);
/* The expert of a hard route (one weight, 1), or SIZE_MAX: a soft route, or the base alone. */
size_t obm__route_hard(const double *weights, size_t n);

/* A prepared route: trim thresholds of full tensors and which tensors differ from the base.  Borrows the pack.
 * Immutable, share freely. */
typedef struct obm__route_plan obm__route_plan;
/* `only` gets its trims, or ALL tensors do, which takes passes over full tensors; NONE: shapes can be asked for, rows
 * cannot.  pulse (nullable) is looked at meanwhile. */
#define OBM_ROUTE_ALL SIZE_MAX
#define OBM_ROUTE_NONE (SIZE_MAX - 1)
obm_status obm__route_plan_new(const obm_pack *p, const double *weights, size_t only, obm__pulse *pulse,
                               obm__route_plan **out, obm_error *err);
/* The trims of a plan made with NONE, which then gives rows of any tensor.  Either of pulse and stop may be NULL: on a
 * thread of its own there is no pulse, and USER once *stop is set. */
obm_status obm__route_plan_trim(obm__route_plan *r, obm__pulse *pulse, const _Atomic int *stop, obm_error *err);
void obm__route_plan_free(obm__route_plan *r);
/* False: the tensor is the base's under this route, use it as it is. */
bool obm__route_changes(const obm__route_plan *r, size_t tensor);
/* Shape under the route (extra vocabulary rows of the one-hot expert) and whether the tensor exists at all (an expert's
 * untied head).  shape->data is NULL, its dtype the base's. */
obm_status obm__route_shape(const obm__route_plan *r, size_t tensor, obm_tensor *shape, bool *exists);
/* Rows [row, row + n) of the merged tensor, f32, (n, cols); 1-D tensors are one row.  Thread-safe. */
obm_status obm__route_rows(const obm__route_plan *r, size_t tensor, int64_t row, int64_t n, float *out, obm_error *err);
/* All rows, by the pack's threads. */
obm_status obm__route_materialise(const obm__route_plan *r, size_t tensor, obm__pulse *pulse, float *out,
                                  obm_error *err);

/* How a tensor comes about under a route. */
typedef enum obm__route_kind {
    OBM_ROUTE_BASE = 0,     /* the base's own tensor */
    OBM_ROUTE_EXPERT = 1,   /* the routed expert's own tensor, to the bit: full, and nothing of the others comes in */
    OBM_ROUTE_PATTERNS = 2, /* sign patterns (coefficients.c) */
    OBM_ROUTE_ELEMENTS = 3  /* the elementwise rule */
} obm__route_kind;
obm__route_kind obm__route_kind_of(const obm__route_plan *r, size_t tensor);
/* EXPERT: that tensor, extra vocabulary rows included. */
const obm_tensor *obm__route_own(const obm__route_plan *r, size_t tensor);
/* The weights as far as they matter to one tensor: routes that agree in them have the same tensor.  weights: (tasks).
 * Experts that are the base's in this tensor are alike there, so the first of them takes the weight of all (at lambda 0
 * none of them matters); under `recomputed` with trims, which are found for each routed expert, nothing is put together. */
void obm__route_effective(const obm__route_plan *r, size_t tensor, double *weights);

#endif
