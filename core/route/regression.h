/* Multinomial logistic regression with L2 on standardised features.  Arrays in, arrays out: no packs, no prompts. */
#ifndef OBM_REGRESSION_H
#define OBM_REGRESSION_H

#include "../sys/sys.h"

typedef struct obm__examples {
    const float *features; /* (n, width) */
    const uint32_t *label; /* (n), < tasks */
    const uint32_t *use;   /* (n_use) rows that take part */
    size_t n_use, width, tasks;
} obm__examples;

/* mean and scale (width) over the rows in use; scale is 1 / standard deviation, 0 for a feature that does not vary. */
void obm__standardise(const obm__examples *e, float *mean, float *scale);

typedef struct obm__regression_options {
    double l2;
    obm_progress_fn progress;
    void *progress_user;
} obm__regression_options;
/*
 * Minimises  mean over examples of -log softmax(W z + b)[label]  +  l2 / 2 * ||W||^2,  z = (x - mean) * scale.
 * weight (tasks, width), bias (tasks).  The same bits for any thread count.  Errors: NOMEM, USER, VALUE.
 */
obm_status obm__regression_fit(obm_context *ctx, const obm__examples *e, const float *mean, const float *scale,
                               const obm__regression_options *o, float *weight, float *bias, obm_error *err);
/* probabilities (tasks) of one row of features. */
void obm__regression_apply(const float *x, size_t width, size_t tasks, const float *mean, const float *scale,
                           const float *weight, const float *bias, double *probabilities);

#endif
