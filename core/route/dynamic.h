/*
 * The dynamic merge: what the weights are under one route.
 *
 *     theta(k) = theta_base + d~_k + lambda * TIES({ d~_j : j != k })                      hard route, reading onto_base
 *     theta(w) = theta_base + sum_k w_k (theta(k) - theta_base)                            soft route
 *
 * Where all experts are 1-bit (or same, or dropped) in a matrix, theta depends on the n sign bits only: the table over the
 * 2^n patterns and its Walsh-Hadamard transform (coefficients.c) give the merged value and, later, the scalars for running
 * on the planes.  Everything else (full tensors) goes through the plain elementwise rule, with trims by the profile.
 */
#ifndef OBM_DYNAMIC_H
#define OBM_DYNAMIC_H

#include "../io/pack.h"

/* The elementwise TIES of the remainder (unit weights, disjoint mean, a zero sum yields 0), in f64 over values in pack order.
 * The specification that tables, tests and full tensors share. */
double obm__ties_remainder(const double *d, size_t n);
/* theta(w) - theta_base of one element, from the K task-vector values d[0..K) in f64. */
double obm__merged_delta(const double *d, size_t n_tasks, const double *weights, double lambda, obm_reading reading);

/* A prepared route: trim thresholds of full tensors and which tensors differ from the base.  Immutable, share freely. */
typedef struct obm__route_plan obm__route_plan;
obm_status obm__route_plan_new(const obm_pack *p, const double *weights, obm__route_plan **out, obm_error *err);
void obm__route_plan_free(obm__route_plan *r);
/* False: the tensor is the base's under this route, use it as it is. */
bool obm__route_changes(const obm__route_plan *r, size_t tensor);
/* Shape under the route (extra vocabulary rows of the one-hot expert) and whether the tensor exists at all (an expert's untied head). */
obm_status obm__route_shape(const obm__route_plan *r, size_t tensor, obm_tensor *shape, bool *exists);
/* Rows [row, row + n) of the merged tensor, f32, (n, cols); 1-D tensors are one row.  Thread-safe. */
obm_status obm__route_rows(const obm__route_plan *r, size_t tensor, int64_t row, int64_t n, float *out, obm_error *err);

#endif
