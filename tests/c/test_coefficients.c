/* The pattern table and its Walsh-Hadamard coefficients against the elementwise rule, for every pattern. */
#include "pack_fixture.h"

#include "route/coefficients.h"

/* n planes of matrix scale, `per` of them to each expert. */
typedef struct bench {
    obm__planes planes[6];
    float alpha[8];
    obm__plane_set set;
    size_t tasks;
} bench;

static void bench_fill(bench *b, size_t tasks, int per, const float *alpha) {
    memset(b, 0, sizeof *b);
    b->tasks = tasks;
    memcpy(b->alpha, alpha, tasks * (size_t)per * sizeof *alpha);
    for (size_t k = 0; k < tasks; k++) {
        b->planes[k] = (obm__planes){.rows = 1, .cols = 8, .row_bytes = 8, .n = per};
        for (int p = 0; p < per; p++) b->planes[k].alphas[p] = &b->alpha[k * (size_t)per + (size_t)p];
        assert_true(obm__plane_set_add(&b->set, k, &b->planes[k]));
    }
}

static void values_of_pattern(const bench *b, unsigned pattern, double *d) {
    memset(d, 0, b->tasks * sizeof *d);
    for (int i = 0; i < b->set.n; i++) d[b->set.task[i]] += pattern & 1u << i ? b->alpha[i] : -b->alpha[i];
}

static double reference_merged(const bench *b, const obm__merge_rule *rule, unsigned pattern) {
    double d[6], others[6], sum = 0;
    values_of_pattern(b, pattern, d);
    for (size_t k = 0; k < b->tasks; k++) {
        size_t n = 0;
        for (size_t j = 0; j < b->tasks; j++)
            if (j != k) others[n++] = rule->reading == OBM_READING_RECOMPUTED ? d[j] - d[k] : d[j];
        sum += rule->weights[k] * (d[k] + rule->lambda * reference_ties(others, n));
    }
    return sum;
}

static void check_rule(const bench *b, const obm__merge_rule *rule) {
    double value[OBM_PATTERNS], c[OBM_PATTERNS], d[6];
    unsigned count = 1u << b->set.n;
    obm__pattern_values(rule, &b->set, b->alpha, value);
    obm__pattern_coefficients(value, b->set.n, c);
    for (unsigned s = 0; s < count; s++) {
        values_of_pattern(b, s, d);
        double merged = obm__merged_delta(d, b->tasks, rule->weights, rule->lambda, rule->reading);
        assert_true(value[s] == merged);
        assert_true(fabs(merged - reference_merged(b, rule, s)) <= 1e-15);
        assert_true(fabs(obm__pattern_sum(c, b->set.n, s) - merged) <= 1e-13);
        if (!__builtin_parity(s)) assert_true(c[s] == 0);
    }
}

static void check_linear_in_route(const bench *b, const obm__merge_rule *rule) {
    double c[OBM_PATTERNS], one[OBM_PATTERNS], sum[OBM_PATTERNS] = {0};
    obm__pattern_values(rule, &b->set, b->alpha, c);
    obm__pattern_coefficients(c, b->set.n, c);
    for (size_t k = 0; k < b->tasks; k++) {
        double hard[6] = {0};
        hard[k] = 1;
        obm__merge_rule alone = {rule->n_tasks, hard, rule->lambda, rule->reading};
        obm__pattern_values(&alone, &b->set, b->alpha, one);
        obm__pattern_coefficients(one, b->set.n, one);
        for (int m = 0; m < 1 << b->set.n; m++) sum[m] += rule->weights[k] * one[m];
    }
    for (int m = 0; m < 1 << b->set.n; m++) assert_true(fabs(sum[m] - c[m]) <= 1e-13);
}

static void check_all_routes(const bench *b) {
    static const double lambdas[] = {0, 0.3, 1};
    static const double soft[3][6] = {{0.7, 0.2, 0.1, 0.4, 1.5, 0}, {0, 0.5, 0.5, 0, 0, 0.25}, {0}};
    for (size_t route = 0; route < b->tasks + 3; route++) {
        double weights[6] = {0};
        if (route < b->tasks)
            weights[route] = 1;
        else
            memcpy(weights, soft[route - b->tasks], sizeof weights);
        for (int l = 0; l < 3; l++) {
            for (int reading = 0; reading < 2; reading++) {
                obm__merge_rule rule = {b->tasks, weights, lambdas[l], (obm_reading)reading};
                check_rule(b, &rule);
                check_linear_in_route(b, &rule);
            }
        }
    }
}

/* Every pattern of scales in which a sum can cancel, and one in which none does. */
static const float special[][8] = {
    {0.011f, 0.023f, 0.017f, 0.031f, 0.0071f, 0.013f, 0.0057f, 0.0029f},
    {0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f},                 /* a = b */
    {0.25f, 0, 0.125f, 0, 0.5f, 0, 0.375f, 0},                        /* b = 0 */
    {0.75f, 0.5f, 0.25f, 0.125f, 0.125f, 0.0625f, 0.0625f, 0.03125f}, /* a = b + c */
    {0.25f, 0.75f, 0.5f, 0.625f, 0.375f, 0.5f, 0.125f, 0.875f},       /* a_i + a_j = 2 a_k */
    {0, 0, 0, 0, 0, 0, 0, 0},
};

static void test_one_plane_each(void **state) {
    (void)state;
    for (size_t tasks = 1; tasks <= 6; tasks++) {
        for (size_t i = 0; i < sizeof special / sizeof *special; i++) {
            bench b;
            bench_fill(&b, tasks, 1, special[i]);
            check_all_routes(&b);
        }
    }
}

static void test_two_planes_each(void **state) {
    (void)state;
    for (size_t tasks = 1; tasks <= 4; tasks++) {
        for (size_t i = 0; i < sizeof special / sizeof *special; i++) {
            bench b;
            bench_fill(&b, tasks, 2, special[i]);
            check_all_routes(&b);
        }
    }
}

static void hard_coefficients(const bench *b, size_t k, double lambda, double *c) {
    double weights[6] = {0};
    weights[k] = 1;
    obm__merge_rule rule = {b->tasks, weights, lambda, OBM_READING_ONTO_BASE};
    obm__pattern_values(&rule, &b->set, b->alpha, c);
    obm__pattern_coefficients(c, b->set.n, c);
}

/* Routed to plane 0, the remainder is {a, b}: for a > b > 0 ((3a + b) / 4) s1 - ((a - b) / 4) s2, for a = b the half of
 * both, for b = 0 the other one alone; times lambda. */
static void test_closed_form(void **state) {
    (void)state;
    static const float alphas[][3] = {{0.5f, 0.75f, 0.25f}, {0.5f, 0.75f, 0.75f}, {0.5f, 0.75f, 0}};
    static const double expected[][2] = {{(3 * 0.75 + 0.25) / 4, -(0.75 - 0.25) / 4}, {0.375, 0.375}, {0.75, 0}};
    for (int i = 0; i < 3; i++) {
        bench b;
        double c[8];
        bench_fill(&b, 3, 1, alphas[i]);
        hard_coefficients(&b, 0, 0.5, c);
        assert_true(fabs(c[1] - 0.5) <= 1e-15);
        assert_true(fabs(c[2] - 0.5 * expected[i][0]) <= 1e-15);
        assert_true(fabs(c[4] - 0.5 * expected[i][1]) <= 1e-15);
    }
}

static void test_masks(void **state) {
    (void)state;
    double c[OBM_PATTERNS];
    bench b;
    bench_fill(&b, 3, 1, special[0]);
    for (size_t k = 0; k < 3; k++) {
        hard_coefficients(&b, k, 0.3, c);
        assert_int_equal(obm__pattern_masks(c, 3), 3); /* three planes and nothing else */
        assert_true(c[7] == 0);
        hard_coefficients(&b, k, 0, c);
        assert_int_equal(obm__pattern_masks(c, 3), 1); /* routing only: one plane */
    }
    bench_fill(&b, 4, 1, special[0]);
    hard_coefficients(&b, 0, 0.3, c);
    assert_int_equal(obm__pattern_masks(c, 4), 5); /* the routed plane, three others, their XOR */
    assert_true(c[14] != 0);
}

static void test_set_limit(void **state) {
    (void)state;
    bench b;
    bench_fill(&b, 4, 2, special[0]);
    assert_int_equal(b.set.n, 8);
    assert_false(obm__plane_set_add(&b.set, 4, &b.planes[0]));
    assert_int_equal(b.set.n, 8);
}

static void test_patterns_of_bits(void **state) {
    (void)state;
    fixture *f = fixture_new(3, 1, 1);
    size_t t = fixture_tensor(f, "w", 3, 83);
    obm__plane_set set = {0};
    for (size_t k = 0; k < 3; k++) {
        fixture_planes(f, k, t, k == 1 ? 2 : 1, OBM_SCALE_ROW, 0);
        assert_true(obm__plane_set_add(&set, k, &fixture_entry(f, k, t)->planes));
    }
    uint8_t pattern[83];
    for (int64_t row = 0; row < 3; row++) {
        obm__plane_set_patterns(&set, row, 8, 75, pattern);
        for (int64_t i = 0; i < 75; i++) {
            unsigned expected = 0;
            for (int p = 0; p < set.n; p++) {
                const uint8_t *signs = set.from[p]->signs[set.plane[p]] + row * set.from[p]->row_bytes;
                expected |= (unsigned)(signs[(8 + i) / 8] >> (8 + i) % 8 & 1) << p;
            }
            assert_int_equal(pattern[i], expected);
        }
    }
    fixture_free(f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_plane_each), cmocka_unit_test(test_two_planes_each),
        cmocka_unit_test(test_closed_form),    cmocka_unit_test(test_masks),
        cmocka_unit_test(test_set_limit),      cmocka_unit_test(test_patterns_of_bits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
