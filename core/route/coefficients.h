/*
 * TIES on planes: where every expert of a matrix is 1-bit (or the base's), the merged value depends on nothing but the
 * n sign bits of the planes involved.  coefficients.c derives the two forms of that function.
 */
#ifndef OBM_COEFFICIENTS_H
#define OBM_COEFFICIENTS_H

#include "../delta/delta.h"

/* A pattern of the signs is one byte: bit i is the sign bit of plane i.  More planes take the elementwise rule. */
#define OBM_PATTERN_PLANES 8
#define OBM_PATTERNS (1 << OBM_PATTERN_PLANES)
/* A coefficient below this share of the largest value is what rounding left of a 0: where the sum has no product of
 * these signs (a hard route is d~_k plus a function of the others), no trace may be left that a run would have to touch,
 * and 256 values, each a few units of 2^-53 off, stay below it. */
#define OBM_PATTERN_NOISE 0x1p-40
/* Experts in one pack, as far as routes are concerned. */
#define OBM_ROUTE_TASKS OBM_MAX_REPORT_TASKS

/* What turns K task-vector values into a merged one: obm__merged_delta with these arguments. */
typedef struct obm__merge_rule {
    size_t n_tasks;
    const double *weights; /* (n_tasks) the route */
    double lambda;
    obm_reading reading;
} obm__merge_rule;

/* The planes of one matrix that take part in a merge, in pack order (experts, then planes of an expert). */
typedef struct obm__plane_set {
    int n;
    size_t task[OBM_PATTERN_PLANES];             /* whose plane */
    const obm__planes *from[OBM_PATTERN_PLANES]; /* its expert's matrix */
    int plane[OBM_PATTERN_PLANES];               /* which of that expert's planes */
} obm__plane_set;
/* False: there are OBM_PATTERN_PLANES already. */
bool obm__plane_set_add(obm__plane_set *s, size_t task, const obm__planes *planes);
/* Columns from `col` on over which no alpha of the row changes: the rest of the row, or up to the next group of any
 * plane. */
int64_t obm__plane_set_span(const obm__plane_set *s, int64_t col);
/* alpha[n]: the scale of each plane at (row, col). */
void obm__plane_set_alphas(const obm__plane_set *s, int64_t row, int64_t col, float *alpha);
/* pattern[m]: the sign bits of columns [col, col + m) of a row, one byte per column; col a multiple of 8. */
void obm__plane_set_patterns(const obm__plane_set *s, int64_t row, int64_t col, int64_t m, uint8_t *pattern);

/* value[2^n]: theta(w) - theta_base for every pattern of the n signs, by the elementwise rule in f64. */
void obm__pattern_values(const obm__merge_rule *rule, const obm__plane_set *s, const float *alpha, double *value);
/* The Walsh-Hadamard transform of `lanes` functions side by side, in place: c (2^n, lanes) has their values and gets
 * coefficients, value(s) = sum over M of c[M] * prod_{i in M} s_i; 0 for every even-sized M. */
void obm__pattern_transform(double *c, int n, size_t lanes);

#endif
