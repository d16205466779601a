/*
 * Limited-memory BFGS: the two-loop recursion (Nocedal & Wright, Numerical Optimization, algorithm 7.4) with a
 * bisection line search for the weak Wolfe conditions (Lewis & Overton, Nonsmooth optimization via quasi-Newton
 * methods, section 2). The weak Wolfe condition makes <s, y> > 0, so every pair can be used.  Knows nothing of what it
 * minimises.
 */
#include "lbfgs.h"

#include <math.h>
#include <string.h>

/* Armijo and curvature constants of the line search (Nocedal & Wright, section 3.1). */
#define SUFFICIENT_DECREASE 1e-4
#define CURVATURE 0.9
/* Bisections until the bracket is below the spacing of f64. */
#define MAX_TRIALS 60
#define MAX_HISTORY 32

typedef struct run {
    const obm__lbfgs *s;
    double *x, *g;           /* now */
    double *x_next, *g_next; /* the trial */
    double *direction;
    double *steps, *changes; /* (history, n): x and gradient differences, a ring */
    double rho[MAX_HISTORY]; /* 1 / <step, change> */
    int pairs, newest;
    double value;
} run;

static double dot(const double *a, const double *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void axpy(double *y, double a, const double *x, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] += a * x[i];
}

static double largest(const double *g, size_t n) {
    double most = 0;
    for (size_t i = 0; i < n; i++) most = fmax(most, fabs(g[i]));
    return most;
}

/* direction = -H g with H built from the kept pairs, newest first and back. */
static void find_direction(run *r) {
    size_t n = r->s->n;
    int history = r->s->history;
    double weight[MAX_HISTORY];
    for (size_t i = 0; i < n; i++) r->direction[i] = -r->g[i];
    for (int i = 0; i < r->pairs; i++) {
        int at = (r->newest - i + history) % history;
        weight[at] = r->rho[at] * dot(r->steps + (size_t)at * n, r->direction, n);
        axpy(r->direction, -weight[at], r->changes + (size_t)at * n, n);
    }
    if (r->pairs > 0) {
        /* The newest pair's curvature scales the start matrix. */
        const double *y = r->changes + (size_t)r->newest * n;
        double scale = 1 / (r->rho[r->newest] * dot(y, y, n));
        for (size_t i = 0; i < n; i++) r->direction[i] *= scale;
    }
    for (int i = r->pairs - 1; i >= 0; i--) {
        int at = (r->newest - i + history) % history;
        double back = r->rho[at] * dot(r->changes + (size_t)at * n, r->direction, n);
        axpy(r->direction, weight[at] - back, r->steps + (size_t)at * n, n);
    }
}

/* False: no step along the direction improves. */
static bool line_search(run *r, double first, double *value) {
    size_t n = r->s->n;
    double slope = dot(r->g, r->direction, n), low = 0, high = INFINITY, t = first;
    if (!(slope < 0)) return false;
    for (int trial = 0; trial < MAX_TRIALS; trial++) {
        for (size_t i = 0; i < n; i++) r->x_next[i] = r->x[i] + t * r->direction[i];
        *value = r->s->objective(r->s->arg, r->x_next, r->g_next);
        if (!(*value <= r->value + SUFFICIENT_DECREASE * t * slope))
            high = t;
        else if (dot(r->g_next, r->direction, n) < CURVATURE * slope)
            low = t;
        else
            return true;
        t = isinf(high) ? 2 * t : 0.5 * (low + high);
    }
    return false;
}

static void accept(run *r, double value) {
    size_t n = r->s->n;
    int at = (r->newest + 1) % r->s->history;
    double *s = r->steps + (size_t)at * n, *y = r->changes + (size_t)at * n;
    for (size_t i = 0; i < n; i++) {
        s[i] = r->x_next[i] - r->x[i];
        y[i] = r->g_next[i] - r->g[i];
    }
    double curvature = dot(s, y, n);
    memcpy(r->x, r->x_next, n * sizeof *r->x);
    memcpy(r->g, r->g_next, n * sizeof *r->g);
    r->value = value;
    if (!(curvature > 0)) return; /* underflow at the very end */
    r->rho[at] = 1 / curvature;
    r->newest = at;
    if (r->pairs < r->s->history) r->pairs++;
}

static obm_status iterate(run *r, obm__lbfgs_result *result, obm_error *err) {
    const obm__lbfgs *s = r->s;
    r->value = s->objective(s->arg, r->x, r->g);
    if (!isfinite(r->value))
        return obm__fail(err, OBM_E_VALUE, "the function to minimise is %g at the start", r->value);
    for (; result->iterations < s->max_iterations; result->iterations++) {
        double value, gradient = largest(r->g, s->n);
        if (gradient <= s->tolerance) break;
        if (s->progress &&
            s->progress(s->progress_user, "train", (uint64_t)result->iterations, (uint64_t)s->max_iterations))
            return obm__fail(err, OBM_E_USER, "training was stopped");
        find_direction(r);
        /* Without curvature yet, a first step of length 1 / |g| is a guess at the scale. */
        if (!line_search(r, r->pairs ? 1 : fmin(1, 1 / gradient), &value)) break;
        accept(r, value);
    }
    result->value = r->value;
    result->gradient = largest(r->g, s->n);
    result->converged = result->gradient <= s->tolerance;
    return OBM_OK;
}

obm_status obm__lbfgs_run(const obm__lbfgs *s, double *x, obm__lbfgs_result *result, obm_error *err) {
    size_t vectors = 5 + 2 * (size_t)s->history, total;
    obm__lbfgs_result own = {0};
    if (s->history < 1 || s->history > MAX_HISTORY)
        return obm__fail(err, OBM_E_ARG, "history is %d, expected 1 to 32", s->history);
    if (!obm__mul(vectors, s->n, &total)) return obm__fail_nomem(err, SIZE_MAX);
    double *memory = obm__alloc(total, sizeof *memory);
    if (!memory) return obm__fail_nomem(err, total * sizeof *memory);
    double *at[5];
    for (int i = 0; i < 5; i++) at[i] = memory + (size_t)i * s->n;
    run r = {.s = s, .x = at[0], .g = at[1], .x_next = at[2], .g_next = at[3], .direction = at[4], .newest = -1};
    r.steps = memory + 5 * s->n;
    r.changes = r.steps + (size_t)s->history * s->n;
    memcpy(r.x, x, s->n * sizeof *x);
    obm_status status = iterate(&r, &own, err);
    if (status == OBM_OK) memcpy(x, r.x, s->n * sizeof *x);
    if (status == OBM_OK && result) *result = own;
    obm_free(memory);
    return status;
}
