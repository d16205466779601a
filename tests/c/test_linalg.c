/* Dense products and decompositions against plain loops, and the solver under Gram matrices on RegMean's. */
#include "delta_fixture.h"
#include "merge/merge.h"

#include <math.h>

static double uniform(void) {
    static uint64_t x = 88172645463325252ULL;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return (double)(x >> 11) * 0x1p-53 - 0.5;
}

static double *random_matrix(size_t n) {
    double *a = obm__alloc(n ? n : 1, sizeof *a);
    for (size_t i = 0; i < n; i++) a[i] = uniform();
    return a;
}

/* op(A) op(B) by the definition. */
static void multiply_plain(bool ta, bool tb, size_t m, size_t n, size_t k, const double *a, const double *b,
                           double *c) {
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            double sum = 0;
            for (size_t l = 0; l < k; l++)
                sum += (ta ? a[l * m + i] : a[i * k + l]) * (tb ? b[j * k + l] : b[l * n + j]);
            c[i * n + j] = sum;
        }
}

static void assert_near(const double *have, const double *want, size_t n, double tolerance) {
    for (size_t i = 0; i < n; i++)
        if (!(fabs(have[i] - want[i]) <= tolerance)) fail_msg("[%zu]: %.17g, expected %.17g", i, have[i], want[i]);
}

static void test_products(void **state) {
    (void)state;
    static const size_t shapes[][3] = {{1, 1, 1}, {3, 5, 7}, {65, 2, 129}, {130, 67, 1}, {64, 64, 64}};
    for (size_t i = 0; i < 4 * sizeof shapes / sizeof *shapes; i++) {
        const size_t *s = shapes[i / 4], m = s[0], n = s[1], k = s[2];
        double *a = random_matrix(m * k), *b = random_matrix(k * n), *c = random_matrix(m * n),
               *want = random_matrix(m * n), *first = random_matrix(m * n), *one = random_matrix(m * n);
        memcpy(first, c, m * n * sizeof *c);
        multiply_plain(i & 1, i & 2, m, n, k, a, b, want);
        for (size_t j = 0; j < m * n; j++) want[j] = 2 * want[j] - first[j];
        for (int threads = 1; threads <= 3; threads++) {
            obm_context *ctx = fixture_context(threads);
            obm__product p = {i & 1, i & 2, m, n, k, 2, -1, a, b, c};
            memcpy(c, first, m * n * sizeof *c);
            OK(obm__multiply(ctx, &p, NULL, NULL, err));
            assert_near(c, want, m * n, 1e-13);
            if (threads == 1) memcpy(one, c, m * n * sizeof *c);
            assert_memory_equal(c, one, m * n * sizeof *c);
            obm_context_free(ctx);
        }
        obm_free(a), obm_free(b), obm_free(c), obm_free(want), obm_free(first), obm_free(one);
    }
}

static void test_svd(void **state) {
    (void)state;
    static const size_t shapes[][2] = {{1, 1}, {7, 7}, {13, 5}, {5, 13}, {40, 3}, {1, 9}, {9, 1}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        size_t m = shapes[i][0], n = shapes[i][1];
        obm__svd d;
        OK(obm__svd_new(m, n, "x", &d, err));
        double *a = random_matrix(m * n), *back = random_matrix(m * n), *square = random_matrix(d.k * d.k);
        memcpy(d.a, a, m * n * sizeof *a);
        OK(obm__svd_run(&d, "x", err));
        for (size_t j = 1; j < d.k; j++) assert_true(d.s[j] <= d.s[j - 1] && d.s[j] >= 0);
        assert_int_equal(obm__svd_rank(&d), d.k);
        for (int side = 0; side < 2; side++) { /* U^T U = VT VT^T = 1 */
            multiply_plain(side == 0, side == 1, d.k, d.k, side ? n : m, side ? d.vt : d.u, side ? d.vt : d.u, square);
            for (size_t j = 0; j < d.k; j++) square[j * d.k + j] -= 1;
            for (size_t j = 0; j < d.k * d.k; j++) assert_true(fabs(square[j]) < 1e-13);
        }
        for (size_t j = 0; j < d.k * n; j++) d.vt[j] *= d.s[j / n];
        multiply_plain(false, false, m, n, d.k, d.u, d.vt, back);
        assert_near(back, a, m * n, 1e-13);
        obm_free(a), obm_free(back), obm_free(square);
        obm__svd_free(&d);
    }
}

/* Two equal rows have one direction; the polar factor is the projection's, and the third row's own. */
static void test_polar_of_what_is_deficient(void **state) {
    (void)state;
    obm_context *ctx = fixture_context(2);
    obm__svd d;
    double x[] = {3, 4, 0, 3, 4, 0, 0, 0, 5}, root = sqrt(0.5);
    const double want[] = {0.6 * root, 0.8 * root, 0, 0.6 * root, 0.8 * root, 0, 0, 0, 1};
    OK(obm__svd_new(5, 3, "x", &d, err));
    OK(obm__polar(ctx, &d, 3, 3, x, "x", NULL, NULL, err));
    assert_near(x, want, 9, 1e-15);
    assert_true(d.m == 5 && d.n == 3);
    obm__svd_free(&d);
    obm_context_free(ctx);
}

static void test_refusals(void **state) {
    (void)state;
    obm__svd d;
    double c[] = {1, 2, 2, 1}, b[] = {1, 1};
    FAILS(obm__svd_new((size_t)1 << 31, 2, "w", &d, err), OBM_E_UNSUPPORTED,
          "w: a matrix of (2147483648, 2) is beyond LAPACK's 32-bit sizes");
    FAILS(obm__svd_new(30000, 30000, "w", &d, err), OBM_E_UNSUPPORTED, "(30000, 30000)");
    FAILS(obm__solve(1, 2, c, b, "w", err), OBM_E_VALUE, "w: the Gram matrix is not positive definite");
}

/* RegMean (Jin et al., arXiv 2212.09849): W sum X_t^T X_t = sum W_t X_t^T X_t. */
static void test_gram_solve_on_regmean(void **state) {
    (void)state;
    enum { M = 4, N = 6, ROWS = 9, T = 3 };
    obm_context *ctx = fixture_context(2);
    const obm__run run = {.ctx = ctx};
    for (int form = 0; form < 2; form++) { /* all eigenvalues, or a Cholesky factorisation */
        double ridge = form ? 1e-3 : 0, c[N * N] = {0}, r[M * N] = {0}, gram[N * N], part[M * N], work[M * N],
               left[M * N];
        for (int t = 0; t < T; t++) {
            double *x = random_matrix(ROWS * N), *w = random_matrix(M * N);
            multiply_plain(true, false, N, N, ROWS, x, x, gram);
            multiply_plain(false, false, M, N, N, w, gram, part);
            for (int i = 0; i < N * N; i++) c[i] += gram[i];
            for (int i = 0; i < M * N; i++) r[i] += part[i];
            obm_free(x), obm_free(w);
        }
        memcpy(gram, c, sizeof c);
        memcpy(part, r, sizeof r);
        OK(obm__gram_solve(&run, M, N, c, r, work, (obm__gram_filter){ridge, N}, "w", err));
        multiply_plain(false, false, M, N, N, r, gram, left);
        for (int i = 0; i < M * N; i++) left[i] += ridge * r[i];
        assert_near(left, part, M * N, 1e-12);
    }
    obm_context_free(ctx);
}

/* Eigenvalues 4, 1 and 0 along known axes: which count, and how. */
static void test_gram_filters(void **state) {
    (void)state;
    obm_context *ctx = fixture_context(1);
    const obm__run run = {.ctx = ctx};
    static const struct {
        obm__gram_filter f;
        double want[3];
    } rows[] = {{{0, 3}, {0.5, 3, 0}},
                {{0, 1}, {0.5, 0, 0}},
                {{1, 2}, {0.4, 1.5, 0}},
                {{0, 0}, {0, 0, 0}},
                {{1, 3}, {0.4, 1.5, 7}}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        double c[] = {4, 0, 0, 0, 1, 0, 0, 0, 0}, r[] = {2, 3, 7}, work[3];
        OK(obm__gram_solve(&run, 1, 3, c, r, work, rows[i].f, "w", err));
        assert_near(r, rows[i].want, 3, 1e-15);
    }
    obm_context_free(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_products),
                                       cmocka_unit_test(test_svd),
                                       cmocka_unit_test(test_polar_of_what_is_deficient),
                                       cmocka_unit_test(test_refusals),
                                       cmocka_unit_test(test_gram_solve_on_regmean),
                                       cmocka_unit_test(test_gram_filters)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
