/* Minimises a smooth convex function of n variables by L-BFGS; f64, deterministic, one thread of its own. */
#ifndef OBM_LBFGS_H
#define OBM_LBFGS_H

#include "../sys/sys.h"

/* Returns f(x) and fills gradient (n). */
typedef double (*obm__objective_fn)(void *arg, const double *x, double *gradient);

typedef struct obm__lbfgs {
    obm__objective_fn objective;
    void *arg;
    size_t n;
    int history; /* pairs kept, 1 .. 32 */
    int max_iterations;
    double tolerance;         /* of the largest gradient component; reached: converged */
    obm_progress_fn progress; /* once per iteration, nullable */
    void *progress_user;
} obm__lbfgs;

typedef struct obm__lbfgs_result {
    double value, gradient; /* at the end; the largest |component| */
    int iterations;
    bool converged; /* false: max_iterations, or no step improves in f64 any more */
} obm__lbfgs_result;

/* x (n): the start, then the minimum.  result nullable.  Errors: NOMEM, USER, VALUE (the function is not finite at the
 * start). */
obm_status obm__lbfgs_run(const obm__lbfgs *s, double *x, obm__lbfgs_result *result, obm_error *err);

#endif
