/* Least squares under Gram matrices: one solver for every merge that says how much an error counts in which direction
 * of a layer's inputs.  G_t = I gives the mean, X^T X gives RegMean, D_t^T D_t / ||D_t||^2 gives WUDI. */
#include "merge.h"

/* The factors of the eigenvalues w, rising, in their place. */
static void filter(double *w, size_t n, obm__gram_filter f) {
    double largest = n && w[n - 1] > 0 ? w[n - 1] : 0;
    for (size_t i = 0; i < n; i++) {
        /* Eigenvalues are squares of singular values, and so is what rounding leaves of a zero. */
        bool counts = w[i] > OBM_RANK_TOLERANCE * OBM_RANK_TOLERANCE * largest && n - i <= f.keep;
        w[i] = counts ? 1 / (w[i] + f.ridge) : 0;
    }
}

obm_status obm__gram_solve(const obm__run *run, size_t m, size_t n, double *c, double *r, double *work,
                           obm__gram_filter f, const char *what, obm_error *err) {
    if (f.ridge > 0 && f.keep >= n) {
        for (size_t i = 0; i < n; i++) c[i * n + i] += f.ridge;
        return obm__solve(m, n, c, r, what, err);
    }
    double *w = obm__alloc(n, sizeof *w);
    if (!w) return obm__fail_nomem(err, n * sizeof *w);
    /* R V g(w) V^T, eigenvectors in the rows of c. */
    obm__product into = {.transpose_b = true, .m = m, .n = n, .k = n, .alpha = 1, .a = r, .b = c, .c = work};
    obm__product back = {.m = m, .n = n, .k = n, .alpha = 1, .a = work, .b = c, .c = r};
    obm_status status = obm__eigen(n, c, w, what, err);
    if (status == OBM_OK) status = obm__dense_multiply(run, &into, err);
    filter(w, n, f);
    for (size_t i = 0; status == OBM_OK && i < m; i++)
        for (size_t j = 0; j < n; j++) work[i * n + j] *= w[j];
    if (status == OBM_OK) status = obm__dense_multiply(run, &back, err);
    obm_free(w);
    return status;
}
