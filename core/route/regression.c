/* Fits the multinomial logistic regression: objective and gradient for L-BFGS, standardisation, softmax. */
#include "regression.h"

#include "lbfgs.h"

#include <math.h>
#include <string.h>

/* A convex problem of this size is done in tens of iterations; the limit is for hopelessly scaled ones. */
#define MAX_ITERATIONS 500
/* Far below what a probability is printed with, far above the rounding of the mean of f64 losses. */
#define TOLERANCE 1e-7
#define HISTORY 10

static const float *row_of(const obm__examples *e, size_t i) { return e->features + (size_t)e->use[i] * e->width; }

/* A spread below the rounding of f32 around the mean is no information. */
static float scale_of(double mean, double variance) {
    double deviation = sqrt(variance);
    return deviation > 1e-6 * fabs(mean) && deviation > 0 ? (float)(1 / deviation) : 0;
}

void obm__standardise(const obm__examples *e, float *mean, float *scale) {
    for (size_t d = 0; d < e->width; d++) {
        double sum = 0, squares = 0, n = (double)e->n_use;
        for (size_t i = 0; i < e->n_use; i++) sum += row_of(e, i)[d];
        for (size_t i = 0; i < e->n_use; i++) {
            double off = row_of(e, i)[d] - sum / n;
            squares += off * off;
        }
        mean[d] = (float)(sum / n);
        scale[d] = scale_of(sum / n, squares / n);
    }
}

/* In place: logits to probabilities; returns log(sum of exp). */
static double softmax(double *logits, size_t n) {
    double top = logits[0], sum = 0;
    for (size_t k = 1; k < n; k++) top = fmax(top, logits[k]);
    for (size_t k = 0; k < n; k++) sum += logits[k] = exp(logits[k] - top);
    for (size_t k = 0; k < n; k++) logits[k] /= sum;
    return top + log(sum);
}

void obm__regression_apply(const float *x, size_t width, size_t tasks, const float *mean, const float *scale,
                           const float *weight, const float *bias, double *probabilities) {
    for (size_t k = 0; k < tasks; k++) {
        double sum = bias[k];
        for (size_t d = 0; d < width; d++) sum += (double)weight[k * width + d] * (((double)x[d] - mean[d]) * scale[d]);
        probabilities[k] = sum;
    }
    softmax(probabilities, tasks);
}

/* Parameters are one vector: W (tasks, width), then b (tasks). */
typedef struct problem {
    obm_context *ctx;
    const obm__examples *e;
    double l2;
    float *z;        /* (n_use, width) standardised */
    double *error;   /* (n_use, tasks): probability - [label] */
    double *loss;    /* (n_use) */
    const double *x; /* of the running evaluation */
    double *gradient;
} problem;

/* Each example on its own: loss, and what its gradient is made of. */
static void run_examples(void *arg, size_t begin, size_t end, int worker) {
    problem *p = arg;
    size_t width = p->e->width, tasks = p->e->tasks;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        const float *z = p->z + i * width;
        double *error = p->error + i * tasks;
        uint32_t label = p->e->label[p->e->use[i]];
        for (size_t k = 0; k < tasks; k++) {
            const double *w = p->x + k * width;
            double sum = p->x[tasks * width + k];
            for (size_t d = 0; d < width; d++) sum += w[d] * z[d];
            error[k] = sum;
        }
        double own = error[label];
        p->loss[i] = softmax(error, tasks) - own;
        error[label] -= 1;
    }
}

/* Each feature on its own, examples in order: so the sums do not depend on who computes which feature. */
static void run_features(void *arg, size_t begin, size_t end, int worker) {
    problem *p = arg;
    size_t width = p->e->width, tasks = p->e->tasks, n = p->e->n_use;
    (void)worker;
    for (size_t k = 0; k < tasks; k++) {
        double *g = p->gradient + k * width;
        const double *w = p->x + k * width;
        for (size_t d = begin; d < end; d++) g[d] = 0;
        for (size_t i = 0; i < n; i++) {
            double error = p->error[i * tasks + k];
            const float *z = p->z + i * width;
            for (size_t d = begin; d < end; d++) g[d] += error * z[d];
        }
        for (size_t d = begin; d < end; d++) g[d] = g[d] / (double)n + p->l2 * w[d];
    }
}

static double evaluate(void *arg, const double *x, double *gradient) {
    problem *p = arg;
    size_t width = p->e->width, tasks = p->e->tasks, n = p->e->n_use;
    double norm = 0;
    p->x = x;
    p->gradient = gradient;
    obm__parallel(p->ctx, n, 16, run_examples, p);
    obm__parallel(p->ctx, width, 16, run_features, p);
    for (size_t k = 0; k < tasks; k++) {
        double sum = 0;
        for (size_t i = 0; i < n; i++) sum += p->error[i * tasks + k];
        gradient[tasks * width + k] = sum / (double)n;
    }
    for (size_t i = 0; i < tasks * width; i++) norm += x[i] * x[i];
    return obm__tree_sum(p->loss, n) / (double)n + 0.5 * p->l2 * norm;
}

static void fill_standardised(problem *p, const float *mean, const float *scale) {
    size_t width = p->e->width;
    for (size_t i = 0; i < p->e->n_use; i++) {
        const float *x = row_of(p->e, i);
        for (size_t d = 0; d < width; d++) p->z[i * width + d] = (float)(((double)x[d] - mean[d]) * scale[d]);
    }
}

static obm_status minimise(problem *p, const obm__regression_options *o, double *x, obm_error *err) {
    obm__lbfgs s = {.objective = evaluate,
                    .arg = p,
                    .n = p->e->tasks * (p->e->width + 1),
                    .history = HISTORY,
                    .max_iterations = MAX_ITERATIONS,
                    .tolerance = TOLERANCE,
                    .progress = o->progress,
                    .progress_user = o->progress_user};
    return obm__lbfgs_run(&s, x, NULL, err);
}

obm_status obm__regression_fit(obm_context *ctx, const obm__examples *e, const float *mean, const float *scale,
                               const obm__regression_options *o, float *weight, float *bias, obm_error *err) {
    size_t n = e->n_use, weights = e->tasks * e->width;
    problem p = {.ctx = ctx, .e = e, .l2 = o->l2};
    p.z = obm__alloc(n, e->width * sizeof *p.z);
    p.error = obm__alloc(n, e->tasks * sizeof *p.error);
    p.loss = obm__alloc(n, sizeof *p.loss);
    double *x = obm__calloc(weights + e->tasks, sizeof *x);
    obm_status status = p.z && p.error && p.loss && x ? OBM_OK : obm__fail_nomem(err, n * e->width * sizeof *p.z);
    if (status == OBM_OK) {
        fill_standardised(&p, mean, scale);
        status = minimise(&p, o, x, err);
    }
    for (size_t i = 0; status == OBM_OK && i < weights; i++) weight[i] = (float)x[i];
    for (size_t k = 0; status == OBM_OK && k < e->tasks; k++) bias[k] = (float)x[weights + k];
    obm_free(p.z);
    obm_free(p.error);
    obm_free(p.loss);
    obm_free(x);
    return status;
}
