/* The pattern table, its Walsh-Hadamard coefficients, and the masks of routes against the elementwise rule, for every
 * pattern. */
#include "pack_fixture.h"

#include "route/masks.h"

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

/* c may be value. */
static void coefficients_of(const double *value, int n, double *c) {
    double largest = 0;
    for (unsigned i = 0; i < 1u << n; i++) largest = fmax(largest, fabs(value[i]));
    if (c != value) memcpy(c, value, sizeof *c << n);
    obm__pattern_transform(c, n, 1);
    for (unsigned i = 0; i < 1u << n; i++)
        if (fabs(c[i]) <= largest * OBM_PATTERN_NOISE) c[i] = 0;
}

/* What a run on planes adds up: c[M] times the product of the signs of M. */
static double pattern_sum(const double *c, int n, unsigned pattern) {
    double sum = 0;
    for (unsigned m = 0; m < 1u << n; m++) sum += __builtin_parity(m & ~pattern) ? -c[m] : c[m];
    return sum;
}

static int count_masks(const double *c, int n) {
    int masks = 0;
    for (unsigned m = 0; m < 1u << n; m++) masks += c[m] != 0;
    return masks;
}

static void check_rule(const bench *b, const obm__merge_rule *rule) {
    double value[OBM_PATTERNS], c[OBM_PATTERNS], d[6];
    unsigned count = 1u << b->set.n;
    obm__pattern_values(rule, &b->set, b->alpha, value);
    coefficients_of(value, b->set.n, c);
    for (unsigned s = 0; s < count; s++) {
        values_of_pattern(b, s, d);
        double merged = obm__merged_delta(d, b->tasks, rule->weights, rule->lambda, rule->reading);
        assert_true(value[s] == merged);
        assert_true(fabs(merged - reference_merged(b, rule, s)) <= 1e-15);
        assert_true(fabs(pattern_sum(c, b->set.n, s) - merged) <= 1e-13);
        if (!__builtin_parity(s)) assert_true(c[s] == 0);
    }
}

static void check_linear_in_route(const bench *b, const obm__merge_rule *rule) {
    double c[OBM_PATTERNS], one[OBM_PATTERNS], sum[OBM_PATTERNS] = {0};
    obm__pattern_values(rule, &b->set, b->alpha, c);
    coefficients_of(c, b->set.n, c);
    for (size_t k = 0; k < b->tasks; k++) {
        double hard[6] = {0};
        hard[k] = 1;
        obm__merge_rule alone = {rule->n_tasks, hard, rule->lambda, rule->reading};
        obm__pattern_values(&alone, &b->set, b->alpha, one);
        coefficients_of(one, b->set.n, one);
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
    coefficients_of(c, b->set.n, c);
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
        assert_int_equal(count_masks(c, 3), 3); /* three planes and nothing else */
        assert_true(c[7] == 0);
        hard_coefficients(&b, k, 0, c);
        assert_int_equal(count_masks(c, 3), 1); /* routing only: one plane */
    }
    bench_fill(&b, 4, 1, special[0]);
    hard_coefficients(&b, 0, 0.3, c);
    assert_int_equal(count_masks(c, 4), 5); /* the routed plane, three others, their XOR */
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

/* ---- masks of a matrix ---- */

/* All planes of tensor 0, in pack order, by the fixture's own arrays. */
typedef struct plain_plane {
    size_t task;
    int plane;
} plain_plane;

static size_t plain_planes(const fixture *f, plain_plane *out) {
    size_t n = 0;
    for (size_t k = 0; k < f->pack.n_experts; k++) {
        const obm__pack_entry *e = &f->pack.experts[k].entries[0];
        for (int p = 0; e->mode == OBM_MODE_1BIT && p < e->planes.n; p++) out[n++] = (plain_plane){k, p};
    }
    return n;
}

static double plain_alpha(const fixture *f, const plain_plane *p, int64_t row, int64_t col) {
    const obm__planes *from = &f->pack.experts[p->task].entries[0].planes;
    int64_t group = from->scale.group;
    switch (from->scale.kind) {
    case OBM_SCALE_MATRIX:
        return from->alphas[p->plane][0];
    case OBM_SCALE_ROW:
        return from->alphas[p->plane][row];
    case OBM_SCALE_GROUP:
        break;
    }
    return from->alphas[p->plane][row * ((from->cols + group - 1) / group) + col / group];
}

/* theta(w) - theta_base where the signs of the planes are those of `pattern`. */
static double plain_value(const fixture *f, const plain_plane *planes, size_t n, const double *alpha,
                          const double *weights, unsigned pattern) {
    double d[6] = {0}, others[6], sum = 0;
    size_t tasks = f->pack.n_experts;
    for (size_t i = 0; i < n; i++) d[planes[i].task] += pattern & 1u << i ? alpha[i] : -alpha[i];
    for (size_t k = 0; k < tasks; k++) {
        size_t m = 0;
        for (size_t j = 0; j < tasks; j++)
            if (j != k) others[m++] = f->pack.settings.reading == OBM_READING_RECOMPUTED ? d[j] - d[k] : d[j];
        sum += weights[k] * (d[k] + f->pack.settings.lambda * reference_ties(others, m));
    }
    return sum;
}

/* A stretch with constant scales under one route: c[M] by the definition, M over all planes of the matrix. */
typedef struct plain_stretch {
    unsigned count;
    double value[64], c[64], largest;
} plain_stretch;

static void plain_fill(const fixture *f, const plain_plane *planes, size_t n, const double *weights, int64_t row,
                       int64_t col, plain_stretch *s) {
    double alpha[6];
    for (size_t i = 0; i < n; i++) alpha[i] = plain_alpha(f, &planes[i], row, col);
    s->count = 1u << n;
    s->largest = 0;
    for (unsigned p = 0; p < s->count; p++) {
        s->value[p] = plain_value(f, planes, n, alpha, weights, p);
        s->largest = fmax(s->largest, fabs(s->value[p]));
    }
    for (unsigned m = 0; m < s->count; m++) {
        double sum = 0;
        for (unsigned p = 0; p < s->count; p++) sum += __builtin_parity(m & ~p) ? -s->value[p] : s->value[p];
        s->c[m] = fabs(sum / s->count) <= 1e-13 * s->largest ? 0 : sum / s->count;
    }
}

/* A route's coefficient of mask M (over all planes) at a place; 0 where the route does not list it. */
static double listed(const obm__route_masks *r, const obm__coefficient_shape *shape, unsigned m, int64_t row,
                     int64_t col) {
    size_t at = (size_t)(col / shape->group * shape->c_rows + (shape->c_rows == 1 ? 0 : row));
    for (int i = 0; i < r->n; i++) {
        unsigned all = 0;
        for (int j = 0; j < r->n_planes; j++)
            if (r->mask[i] >> j & 1) all |= 1u << r->plane[j];
        if (all == m) return r->c[i][at];
    }
    return 0;
}

/* A soft route is the f64 sum of what the hard routes run with, rounded once.  Returns the sum of the sizes. */
static double check_mixture(const obm__coefficients *c, const double *weights, const obm__route_masks *r,
                            unsigned masks, int64_t row, int64_t col) {
    const obm__coefficient_shape *shape = obm__coefficients_shape(c);
    double largest = 0;
    obm__route_masks hard[6];
    for (size_t k = 0; k < 6; k++) {
        double one[6] = {0};
        one[k] = 1;
        if (weights[k] != 0) assert_int_equal(obm__coefficients_route(c, one, NULL, &hard[k], NULL), OBM_OK);
    }
    for (unsigned m = 0; m < masks; m++) {
        double sum = 0, size = 0;
        for (size_t k = 0; k < 6; k++) {
            if (weights[k] == 0) continue;
            double x = listed(&hard[k], shape, m, row, col);
            sum += weights[k] * x;
            size += weights[k] * fabs(x);
        }
        largest = fmax(largest, size);
        double got = listed(r, shape, m, row, col);
        assert_true(got == (float)sum || (got == 0 && fabs(sum) <= 0x1p-24 * size));
    }
    return largest;
}

static void check_stretch(const plain_stretch *s, const obm__route_masks *r, const obm__coefficient_shape *shape,
                          int64_t row, int64_t col, double mixed) {
    double c[64], slack = 0;
    for (unsigned m = 0; m < s->count; m++) {
        c[m] = listed(r, shape, m, row, col);
        /* Rounded once: half a unit in the last place of an f32, and what f64 loses on either side.  A mixture adds
         * values that were rounded before. */
        double bound = 0x1p-24 * (fabs(s->c[m]) + mixed) + 1e-12 * s->largest;
        if (fabs(c[m] - s->c[m]) > bound) fail_msg("c[%u] = %.9g, expected %.17g", m, c[m], s->c[m]);
        slack += bound;
    }
    for (unsigned p = 0; p < s->count; p++) {
        double sum = 0;
        for (unsigned m = 0; m < s->count; m++) sum += __builtin_parity(m & ~p) ? -c[m] : c[m];
        assert_true(fabs(sum - s->value[p]) <= slack);
    }
}

static void check_masks(const obm__route_masks *r, const bool *used, unsigned count, size_t n_planes) {
    bool in_mask[64] = {false};
    int masks = 0;
    for (unsigned m = 0; m < count; m++) masks += used[m];
    assert_int_equal(r->n, masks); /* nothing is read whose coefficients are 0 on all rows */
    for (int i = 0; i < r->n; i++) {
        assert_true(__builtin_parity(r->mask[i]));
        for (int j = 0; j < r->n_planes; j++) in_mask[j] |= r->mask[i] >> j & 1;
    }
    for (int j = 0; j < r->n_planes; j++) {
        assert_true(in_mask[j] && r->plane[j] < n_planes);
        if (j) assert_true(r->plane[j - 1] < r->plane[j]);
    }
}

/* Masks of any hard route that has a weight: what decides on an overlay. */
static int plain_union(const fixture *f, const plain_plane *planes, size_t n, const double *weights) {
    bool used[64] = {false};
    const obm_tensor *base = &f->pack.tensors[0].base;
    plain_stretch s;
    int masks = 0;
    for (size_t k = 0; k < f->pack.n_experts; k++) {
        double hard[6] = {0};
        hard[k] = 1;
        for (int64_t row = 0; weights[k] != 0 && row < base->shape[0]; row++) {
            for (int64_t col = 0; col < base->shape[1]; col += 64) {
                plain_fill(f, planes, n, hard, row, col, &s);
                for (unsigned m = 0; m < s.count; m++) used[m] |= s.c[m] != 0;
            }
        }
    }
    for (int m = 0; m < 64; m++) masks += used[m];
    return masks;
}

static void check_matrix_route(fixture *f, const obm__coefficients *c, const double *weights, int *overlays) {
    plain_plane planes[6];
    size_t n = plain_planes(f, planes), room = obm__coefficients_room(c, weights);
    const obm_tensor *base = &f->pack.tensors[0].base;
    const obm__coefficient_shape *shape = obm__coefficients_shape(c);
    float *floats = malloc((room + 1) * sizeof *floats);
    obm__route_masks r;
    bool used[64] = {false};
    plain_stretch s = {.count = 1};
    int masks, most = plain_union(f, planes, n, weights);
    assert_non_null(floats);
    assert_int_equal(obm__coefficients_route(c, weights, floats, &r, NULL), OBM_OK);
    obm_run run = obm__coefficients_masks(c, weights, &masks);
    assert_int_equal(run, most > 8 ? OBM_RUN_OVERLAY : most ? OBM_RUN_PLANES : OBM_RUN_BASE);
    assert_int_equal(masks, most > 8 ? 0 : most);
    *overlays += run == OBM_RUN_OVERLAY;
    if (run == OBM_RUN_OVERLAY) {
        assert_true(r.run == OBM_RUN_OVERLAY && r.n == 0 && room == 0);
    } else {
        for (int64_t row = 0; row < base->shape[0]; row++) {
            for (int64_t col = 0; col < base->shape[1]; col += 64) {
                plain_fill(f, planes, n, weights, row, col, &s);
                for (unsigned m = 0; m < s.count; m++) used[m] |= s.c[m] != 0;
                bool hard = obm__route_hard(weights, f->pack.n_experts) != SIZE_MAX;
                double mixed = hard ? 0 : check_mixture(c, weights, &r, s.count, row, col);
                check_stretch(&s, &r, shape, row, col, mixed);
            }
        }
        check_masks(&r, used, s.count, n);
        assert_int_equal(r.run, r.n ? OBM_RUN_PLANES : OBM_RUN_BASE);
    }
    free(floats);
}

/* Hard routes, mixtures, and the base. */
static void check_matrix(fixture *f, int *overlays) {
    static const double soft[4][6] = {{0.7, 0.2, 0.1, 0.4, 1.5, 0}, {0, 0.5, 0.5, 0, 0, 0.25}, {0.25}, {0}};
    obm__coefficients *c;
    obm_error err;
    if (obm__coefficients_new(&f->pack, 0, NULL, &c, &err) != OBM_OK) fail_msg("%s", err.message);
    plain_plane planes[6];
    size_t listed_planes, n = plain_planes(f, planes);
    if (!n) {
        assert_null(c);
        return;
    }
    const obm__plane_ref *refs = obm__coefficients_planes(c, &listed_planes);
    assert_int_equal(listed_planes, n);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(refs[i].task, planes[i].task);
        assert_int_equal(refs[i].plane, planes[i].plane);
    }
    for (size_t route = 0; route < f->pack.n_experts + 4; route++) {
        double weights[6] = {0};
        if (route < f->pack.n_experts)
            weights[route] = 1;
        else
            memcpy(weights, soft[route - f->pack.n_experts], f->pack.n_experts * sizeof *weights);
        check_matrix_route(f, c, weights, overlays);
    }
    obm__coefficients_free(c);
}

/* Scales of a kind in which sums cancel often, or never. */
static float drawn_alpha(fixture *f, int family, float before) {
    double u = fixture_random(f);
    switch (family) {
    case 0: /* no two alike */
        return (float)(0.02 + 0.015 * u);
    case 1: /* small multiples of one number: a = b, a = b + c, a_i + a_j = 2 a_k, zeros */
        return (float)(floor((u + 1) * 2.5) / 64);
    case 2: /* zeros and wide ranges */
        return u < -0.4 ? 0 : (float)ldexp(1 + u, (int)(8 * u) - 10);
    default: /* runs of the same */
        return u < 0.5 && before > 0 ? before : (float)(0.02 + 0.01 * u);
    }
}

static size_t draw(fixture *f, size_t below) { return (size_t)((fixture_random(f) + 1) / 2 * (double)below) % below; }

static void draw_pack(fixture *f) {
    static const double lambdas[] = {0, 0.3, 1, 2.5};
    size_t t = fixture_tensor(f, "w", (int64_t)(1 + draw(f, 40)), (int64_t)(1 + draw(f, 300))), room = 6;
    int family = (int)draw(f, 4);
    for (size_t k = 0; k < f->pack.n_experts && room; k++) {
        size_t planes = draw(f, 8) == 0 ? 0 : draw(f, 4) == 0 ? 2 : 1;
        obm__scale_kind kind = (obm__scale_kind)draw(f, 3);
        if (planes > room) planes = room;
        room -= planes;
        if (!planes) continue; /* same */
        fixture_planes(f, k, t, (int)planes, kind, draw(f, 2) ? 64 : 128);
        const obm__planes *p = &fixture_entry(f, k, t)->planes;
        bool absent = draw(f, 10) == 0;
        for (int i = 0; i < p->n; i++) {
            float *alphas = (float *)p->alphas[i];
            int64_t n = obm__scale_count(p->scale, p->rows, p->cols);
            for (int64_t j = 0; j < n; j++) alphas[j] = absent ? 0 : drawn_alpha(f, family, j ? alphas[j - 1] : 0);
        }
    }
    f->pack.settings.lambda = lambdas[draw(f, 4)];
    f->pack.settings.reading = draw(f, 2) ? OBM_READING_RECOMPUTED : OBM_READING_ONTO_BASE;
}

/* Back to what fixture_new made: contexts take longer than the checks. */
static void forget_tensors(fixture *f, size_t owned) {
    while (f->n_owned > owned) free(f->owned[--f->n_owned]);
    f->pack.n_tensors = 0;
    for (size_t k = 0; k < f->pack.n_experts; k++) *fixture_entry(f, k, 0) = (obm__pack_entry){.mode = OBM_MODE_SAME};
}

static void test_random_packs(void **state) {
    (void)state;
    int overlays = 0;
    for (size_t tasks = 1; tasks <= 6; tasks++) {
        fixture *f = fixture_new(tasks, 1, 1);
        size_t owned = f->n_owned;
        for (int i = 0; i < 50; i++) {
            draw_pack(f);
            check_matrix(f, &overlays);
            forget_tensors(f, owned);
        }
        fixture_free(f);
    }
    assert_true(overlays > 20); /* both ends are met */
}

static fixture *one_plane_each(size_t tasks, obm__scale_kind kind) {
    fixture *f = fixture_new(tasks, 1, 1);
    size_t t = fixture_tensor(f, "w", 5, 70);
    for (size_t k = 0; k < tasks; k++) fixture_planes(f, k, t, 1, kind, 64);
    return f;
}

/* Every family of ties and every count of experts, each with each rule and all layouts. */
static void check_special(fixture *f, int *overlays) {
    static const double lambdas[] = {0, 0.3, 1};
    for (int i = 0; i < 6 * 3 * 2; i++) {
        for (size_t k = 0; k < f->pack.n_experts; k++) {
            const obm__planes *p = &fixture_entry(f, k, 0)->planes;
            int64_t n = obm__scale_count(p->scale, p->rows, p->cols);
            for (int64_t j = 0; j < n; j++) ((float *)p->alphas[0])[j] = special[i % 6][k];
        }
        f->pack.settings.lambda = lambdas[i / 6 % 3];
        f->pack.settings.reading = (obm_reading)(i / 18);
        check_matrix(f, overlays);
    }
}

static void test_special_packs(void **state) {
    (void)state;
    int overlays = 0;
    for (size_t tasks = 2; tasks <= 6; tasks++) {
        for (int kind = 0; kind < 3; kind++) {
            fixture *f = one_plane_each(tasks, (obm__scale_kind)kind);
            check_special(f, &overlays);
            fixture_free(f);
        }
    }
    assert_true(overlays > 0);
}

/* Hard routes of n one-plane experts: n masks up to 3, an XOR from 4 on, an overlay from 5 on; any n with lambda 0. */
static void test_mask_counts(void **state) {
    (void)state;
    static const int onto[] = {0, 1, 2, 3, 5, 0, 0}, soft[] = {0, 1, 2, 3, 8, 0, 0},
                     recomputed[] = {0, 1, 2, 4, 8, 0, 0};
    for (size_t tasks = 1; tasks <= 6; tasks++) {
        fixture *f = one_plane_each(tasks, OBM_SCALE_ROW);
        obm_tensor_run r;
        assert_int_equal(obm_pack_runs(&f->pack, &r, NULL), OBM_OK);
        assert_string_equal(r.name, "w");
        assert_int_equal(r.planes, tasks);
        assert_int_equal(r.hard, tasks > 4 ? OBM_RUN_OVERLAY : OBM_RUN_PLANES);
        assert_int_equal(r.overlays, tasks > 4 ? tasks : 0);
        assert_int_equal(r.hard_masks, onto[tasks]);
        assert_int_equal(r.soft_masks, soft[tasks]);
        f->pack.settings.reading = OBM_READING_RECOMPUTED;
        assert_int_equal(obm_pack_runs(&f->pack, &r, NULL), OBM_OK);
        assert_int_equal(r.hard_masks, recomputed[tasks]);
        f->pack.settings.lambda = 0;
        assert_int_equal(obm_pack_runs(&f->pack, &r, NULL), OBM_OK);
        assert_true(r.hard == OBM_RUN_PLANES && r.soft == OBM_RUN_PLANES && r.hard_masks == 1);
        assert_int_equal(r.soft_masks, tasks);
        fixture_free(f);
    }
}

/* lambda = 0: the coefficients are the pack's scales, bit for bit; a group's are put in the order of runs.  They are
 * copies: a run must not keep pages of the pack's files resident. */
static void test_scales_are_copied(void **state) {
    (void)state;
    for (int kind = 0; kind < 3; kind++) {
        fixture *f = one_plane_each(3, (obm__scale_kind)kind);
        f->pack.settings.lambda = 0;
        obm__coefficients *c;
        obm__route_masks r;
        assert_int_equal(obm__coefficients_new(&f->pack, 0, NULL, &c, NULL), OBM_OK);
        assert_int_equal(obm__coefficients_route(c, (double[]){0, 1, 0}, NULL, &r, NULL), OBM_OK);
        assert_true(r.n == 1 && r.n_planes == 1 && r.plane[0] == 1 && r.mask[0] == 1);
        const float *alphas = fixture_entry(f, 1, 0)->planes.alphas[0];
        assert_ptr_not_equal(r.c[0], alphas);
        size_t n = kind == OBM_SCALE_MATRIX ? 1 : kind == OBM_SCALE_ROW ? 5 : 0;
        assert_memory_equal(r.c[0], alphas, n * sizeof *alphas);
        for (int i = 0; kind == OBM_SCALE_GROUP && i < 10; i++) assert_true(r.c[0][i % 2 * 5 + i / 2] == alphas[i]);
        obm__coefficients_free(c);
        fixture_free(f);
    }
}

/* A full tensor of an expert that comes in: an overlay, not an error. */
static void test_full_is_overlay(void **state) {
    (void)state;
    fixture *f = one_plane_each(3, OBM_SCALE_ROW);
    fixture_full(f, 2, 0, 0);
    obm_tensor_run r;
    assert_int_equal(obm_pack_runs(&f->pack, &r, NULL), OBM_OK);
    assert_true(r.hard == OBM_RUN_OVERLAY && r.soft == OBM_RUN_OVERLAY && r.overlays == 3);
    f->pack.settings.lambda = 0;
    assert_int_equal(obm_pack_runs(&f->pack, &r, NULL), OBM_OK);
    assert_true(r.hard == OBM_RUN_OVERLAY && r.overlays == 1 && r.hard_masks == 1);
    for (size_t k = 0; k < 2; k++) fixture_entry(f, k, 0)->mode = OBM_MODE_SAME;
    assert_int_equal(obm_pack_runs(&f->pack, &r, NULL), OBM_OK); /* no planes at all */
    assert_true(r.planes == 0 && r.overlays == 1);
    fixture_entry(f, 2, 0)->mode = OBM_MODE_SAME;
    assert_int_equal(obm_pack_runs(&f->pack, &r, NULL), OBM_OK);
    assert_true(r.hard == OBM_RUN_BASE && r.soft == OBM_RUN_BASE && r.overlays == 0);
    assert_string_equal(obm_run_name(r.hard), "base");
    fixture_free(f);
}

/* Weights and lambdas that no f32 can hold name the tensor. */
static void test_too_large(void **state) {
    (void)state;
    fixture *f = one_plane_each(3, OBM_SCALE_ROW);
    obm__coefficients *c;
    obm__route_masks r;
    float room[15];
    obm_error err;
    assert_int_equal(obm__coefficients_new(&f->pack, 0, NULL, &c, NULL), OBM_OK);
    assert_int_equal(obm__coefficients_room(c, (double[]){1e300, 0, 0}), 15);
    assert_int_equal(obm__coefficients_route(c, (double[]){1e300, 0, 0}, room, &r, &err), OBM_E_VALUE);
    assert_non_null(strstr(err.message, "tensor w"));
    obm__coefficients_free(c);
    f->pack.settings.lambda = 1e300;
    assert_int_equal(obm__coefficients_new(&f->pack, 0, NULL, &c, &err), OBM_E_VALUE);
    assert_null(c);
    obm_tensor_run run;
    assert_int_equal(obm_pack_runs(&f->pack, &run, &err), OBM_E_VALUE);
    fixture_free(f);
}

/* All matrices at once give what each gives alone, for any number of threads. */
static void test_cache(void **state) {
    (void)state;
    static const double routes[][3] = {{0, 1, 0}, {0.5, 0.25, 0.25}, {0, 0, 0}};
    for (int threads = 1; threads <= 3; threads++) {
        fixture *f = fixture_new(3, 8, threads);
        for (size_t t = 0; t < 8; t++) {
            fixture_tensor(f, "w", (int64_t)(7000 * (t % 3) + 11), 8);
            for (size_t k = 0; k < t % 4; k++) fixture_planes(f, k, t, 1, (obm__scale_kind)(t % 3), 64);
        }
        obm__coefficient_cache *cache;
        assert_int_equal(obm__coefficient_cache_new(&f->pack, NULL, &cache, NULL), OBM_OK);
        assert_true(obm__coefficient_cache_bytes(cache) > 0);
        for (size_t i = 0; i < 3; i++) {
            obm__planes_route *route;
            assert_int_equal(obm__planes_route_renew(NULL, cache, routes[i], &route, NULL), OBM_OK);
            assert_true(obm__planes_route_bytes(route) > 0);
            for (size_t t = 0; t < 8; t++) {
                const obm__coefficients *c = obm__coefficient_cache_at(cache, t);
                const obm__route_masks *all = obm__planes_route_at(route, t);
                obm__route_masks alone;
                assert_true((c == NULL) == (t % 4 == 0));
                if (!c) {
                    assert_int_equal(all->run, OBM_RUN_BASE);
                    continue;
                }
                float *room = malloc((obm__coefficients_room(c, routes[i]) + 1) * sizeof *room);
                assert_int_equal(obm__coefficients_route(c, routes[i], room, &alone, NULL), OBM_OK);
                assert_int_equal(alone.n, all->n);
                for (int m = 0; m < alone.n; m++)
                    assert_memory_equal(alone.c[m], all->c[m], obm__coefficients_shape(c)->count * sizeof(float));
                free(room);
            }
            obm__planes_route_free(route);
        }
        obm__planes_route *route;
        obm_error err;
        assert_int_equal(obm__planes_route_renew(NULL, cache, (double[]){1e300, 0, 0}, &route, &err), OBM_E_VALUE);
        assert_int_equal(obm__planes_route_renew(NULL, cache, (double[]){NAN, 0, 0}, &route, &err), OBM_E_ARG);
        obm__coefficient_cache_free(cache);
        fixture_free(f);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_plane_each),  cmocka_unit_test(test_two_planes_each),
        cmocka_unit_test(test_closed_form),     cmocka_unit_test(test_masks),
        cmocka_unit_test(test_set_limit),       cmocka_unit_test(test_patterns_of_bits),
        cmocka_unit_test(test_random_packs),    cmocka_unit_test(test_special_packs),
        cmocka_unit_test(test_mask_counts),     cmocka_unit_test(test_scales_are_copied),
        cmocka_unit_test(test_full_is_overlay), cmocka_unit_test(test_too_large),
        cmocka_unit_test(test_cache),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
