/* Dense linear algebra in f64: products by our own workers, decompositions by LAPACK on the calling thread.  Says in
 * errors what the matrix was; knows nothing else about it. */
#include "sys.h"

#include <string.h>

/* ---- products ---- */

/* Rows of a panel: large enough for the library's own blocking, small enough that two workers share small matrices. */
#define PANEL 64

typedef struct product {
    const obm__product *p;
    size_t first; /* panel of the band in work */
} product;

static void panel_range(void *arg, size_t begin, size_t end, int worker) {
    const product *w = arg;
    const obm__product *p = w->p;
    (void)worker;
    for (size_t i = w->first + begin; i < w->first + end; i++) {
        size_t row = i * PANEL, rows = p->m - row < PANEL ? p->m - row : PANEL;
        const double *a = p->a + row * (p->transpose_a ? 1 : p->k);
        obm__dgemm(p->transpose_a, p->transpose_b, (int64_t)rows, (int64_t)p->n, (int64_t)p->k, p->alpha, a,
                   (int64_t)(p->transpose_a ? p->m : p->k), p->b, (int64_t)(p->transpose_b ? p->k : p->n), p->beta,
                   p->c + row * p->n, (int64_t)p->n);
    }
}

obm_status obm__multiply(obm_context *ctx, const obm__product *p, obm__look_fn look, void *user, obm_error *err) {
    if (p->m == 0 || p->n == 0) return OBM_OK;
    if (p->k == 0) {
        for (size_t i = 0; i < p->m * p->n; i++) p->c[i] = p->beta == 0 ? 0 : p->beta * p->c[i];
        return OBM_OK;
    }
    size_t panels = (p->m + PANEL - 1) / PANEL, band = (size_t)ctx->threads;
    OBM_TRY(obm__blas_check(ctx->threads, err));
    /* One panel per worker between two looks: a panel of 4096 x 4096 takes a tenth of a second. */
    obm_status status = OBM_OK;
    obm__blas_enter();
    for (product w = {p, 0}; status == OBM_OK && w.first < panels; w.first += band) {
        size_t n = panels - w.first < band ? panels - w.first : band;
        obm__parallel(ctx, n, 1, panel_range, &w);
        if (look) status = look(user, err);
    }
    obm__blas_leave();
    return status;
}

/* ---- room ---- */

static uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* dgesdd's LWORK for job O (its documentation), and a block of 64 for each row and column, which its blocked code uses
 * where it is there. */
static uint64_t svd_work(uint64_t m, uint64_t n) {
    uint64_t k = min_u64(m, n), most = max_u64(m, n);
    return 3 * k + max_u64(most, 5 * k * k + 4 * k) + 64 * (m + n);
}

/* Doubles of a, small, s and work, and LAPACK's integers (8 k). */
static uint64_t svd_doubles(uint64_t m, uint64_t n) {
    uint64_t k = min_u64(m, n);
    return m * n + k * k + k + svd_work(m, n) + 4 * k + 8;
}

uint64_t obm__svd_bytes(uint64_t m, uint64_t n) { return svd_doubles(m, n) * sizeof(double); }

static obm_status check_sizes(uint64_t m, uint64_t n, uint64_t (*work)(uint64_t, uint64_t), const char *what,
                              obm_error *err) {
    if (m <= INT32_MAX && n <= INT32_MAX && (n == 0 || m <= INT32_MAX / n) &&
        (min_u64(m, n) < 65536 && work(m, n) <= INT32_MAX))
        return OBM_OK;
    return obm__fail(err, OBM_E_UNSUPPORTED, "%s: a matrix of (%llu, %llu) is beyond LAPACK's 32-bit sizes", what,
                     (unsigned long long)m, (unsigned long long)n);
}

/* LAPACK leaves the larger factor in the place of the matrix, VT for a square one. */
void obm__svd_shape(obm__svd *d, size_t m, size_t n) {
    size_t k = m < n ? m : n;
    double *small = (double *)d->memory + m * n;
    *d = (obm__svd){.m = m, .n = n, .k = k, .a = d->memory, .s = small + k * k, .memory = d->memory};
    d->work = d->s + k;
    d->n_work = (size_t)svd_work(m, n);
    d->u = m > n ? d->a : small;
    d->vt = m > n ? small : d->a;
}

obm_status obm__svd_new(size_t m, size_t n, const char *what, obm__svd *out, obm_error *err) {
    OBM_TRY(check_sizes(m, n, svd_work, what, err));
    obm__svd d = {.memory = obm__alloc((size_t)svd_doubles(m, n), sizeof(double))};
    if (!d.memory) return obm__fail_nomem(err, obm__svd_bytes(m, n));
    obm__svd_shape(&d, m, n);
    *out = d;
    return OBM_OK;
}

void obm__svd_free(obm__svd *d) {
    obm_free(d->memory);
    d->memory = NULL;
}

obm_status obm__svd_run(const obm__svd *d, const char *what, obm_error *err) {
    if (d->k == 0) return OBM_OK;
    int32_t *integers = (int32_t *)(void *)(d->work + d->n_work);
    OBM_TRY(obm__blas_check(1, err));
    int info = obm__dgesdd((int64_t)d->m, (int64_t)d->n, d->a, d->s, d->m > d->n ? d->vt : d->u, d->work,
                           (int64_t)d->n_work, integers);
    if (info == 0) return OBM_OK;
    return obm__fail(err, OBM_E_VALUE, "%s: the singular value decomposition does not converge (LAPACK dgesdd: %d)",
                     what, info);
}

size_t obm__svd_rank(const obm__svd *d) {
    size_t r = 0;
    while (r < d->k && d->s[r] > OBM_RANK_TOLERANCE * d->s[0]) r++;
    return r;
}

/* ---- symmetric matrices ---- */

obm_status obm__polar(obm_context *ctx, obm__svd *d, size_t m, size_t n, double *x, const char *what, obm__look_fn look,
                      void *user, obm_error *err) {
    size_t before_m = d->m, before_n = d->n;
    obm__svd_shape(d, m, n);
    memcpy(d->a, x, m * n * sizeof *x);
    obm_status status = obm__svd_run(d, what, err);
    size_t rank = status == OBM_OK ? obm__svd_rank(d) : 0;
    if (rank < d->k) memset(d->vt + rank * n, 0, (d->k - rank) * n * sizeof *d->vt);
    obm__product p = {.m = m, .n = n, .k = d->k, .alpha = 1, .a = d->u, .b = d->vt, .c = x};
    if (status == OBM_OK) status = obm__multiply(ctx, &p, look, user, err);
    obm__svd_shape(d, before_m, before_n);
    return status;
}

static uint64_t eigen_work(uint64_t n, uint64_t unused) {
    (void)unused;
    return 1 + 6 * n + 2 * n * n; /* dsyevd's LWORK */
}

uint64_t obm__eigen_bytes(uint64_t n) { return eigen_work(n, n) * sizeof(double) + (3 + 5 * n) * sizeof(int32_t); }

obm_status obm__eigen(size_t n, double *a, double *w, const char *what, obm_error *err) {
    OBM_TRY(check_sizes(n, n, eigen_work, what, err));
    if (n == 0) return OBM_OK;
    OBM_TRY(obm__blas_check(1, err));
    size_t n_work = (size_t)eigen_work(n, n), n_integers = 3 + 5 * n;
    double *work = obm__alloc(n_work, sizeof *work);
    int32_t *integers = obm__alloc(n_integers, sizeof *integers);
    obm_status status = work && integers ? OBM_OK : obm__fail_nomem(err, obm__eigen_bytes(n));
    int info = 0;
    if (status == OBM_OK) info = obm__dsyevd((int64_t)n, a, w, work, (int64_t)n_work, integers, (int64_t)n_integers);
    obm_free(work);
    obm_free(integers);
    if (status != OBM_OK || info == 0) return status;
    return obm__fail(err, OBM_E_VALUE, "%s: the eigenvalues do not converge (LAPACK dsyevd: %d)", what, info);
}

obm_status obm__solve(size_t m, size_t n, double *c, double *b, const char *what, obm_error *err) {
    if (m == 0 || n == 0) return OBM_OK;
    OBM_TRY(check_sizes(n, n, eigen_work, what, err));
    OBM_TRY(obm__blas_check(1, err));
    int info = obm__dposv((int64_t)n, (int64_t)m, c, b);
    if (info == 0) return OBM_OK;
    return obm__fail(err, OBM_E_VALUE,
                     "%s: the Gram matrix is not positive definite (LAPACK dposv: %d); a larger ridge makes it so",
                     what, info);
}
