/* The dynamic merge over packs made by hand, against a plain reference that knows nothing of tables, tiles or streams.
 */
#include "pack_fixture.h"

#include "route/kth.h"
#include "route/masks.h"

/* chat: 1-bit matrices; math: 1-bit by other scales; code: partly full.  Every kind of tensor comes up. */
static fixture *mixed_pack(int threads) {
    fixture *f = fixture_new(3, 6, threads);
    size_t a = fixture_tensor(f, "a.one_bit", 9, 200), b = fixture_tensor(f, "b.one_bit_two_planes", 5, 130);
    size_t c = fixture_tensor(f, "c.mixed", 7, 520), d = fixture_tensor(f, "d.full", 11, 33);
    size_t e = fixture_tensor(f, "e.only_code", 4, 70), g = fixture_tensor(f, "f.base", 3, 17);
    fixture_planes(f, 0, a, 1, OBM_SCALE_ROW, 0);
    fixture_planes(f, 1, a, 1, OBM_SCALE_MATRIX, 0);
    fixture_planes(f, 2, a, 1, OBM_SCALE_GROUP, 64);
    fixture_planes(f, 0, b, 2, OBM_SCALE_ROW, 0);
    fixture_planes(f, 1, b, 2, OBM_SCALE_GROUP, 128);
    fixture_planes(f, 0, c, 1, OBM_SCALE_ROW, 0);
    fixture_full(f, 1, c, 0);
    for (size_t k = 0; k < 3; k++) fixture_full(f, k, d, 0);
    fixture_full(f, 2, e, 0);
    fixture_entry(f, 1, g)->mode = OBM_MODE_DROP;
    return f;
}

static void check_route(fixture *f, const double *weights) {
    size_t offsets[16];
    float *expected = reference_route(f, weights, offsets);
    for (size_t t = 0; t < f->pack.n_tensors; t++) {
        size_t n = offsets[t + 1] - offsets[t];
        float *out = malloc(n * sizeof *out);
        assert_non_null(out);
        obm_error err;
        if (obm_pack_materialise(&f->pack, weights, f->pack.tensors[t].name, out, &err) != OBM_OK)
            fail_msg("%s", err.message);
        for (size_t i = 0; i < n; i++) {
            /* Both round an f64 once; the f64 values may differ in their last bits, so a rare neighbour is right too.
             */
            float want = expected[offsets[t] + i];
            if (fabsf(out[i] - want) > 1.2e-7f * fmaxf(1e-3f, fabsf(want)))
                fail_msg("tensor %s, element %zu: %.9g, expected %.9g", f->pack.tensors[t].name, i, out[i], want);
        }
        free(out);
    }
    free(expected);
}

static void check_settings(fixture *f) {
    static const double routes[][3] = {{1, 0, 0},       {0, 1, 0},   {0, 0, 1}, {0.7, 0, 0.3},
                                       {0.2, 0.3, 1.5}, {0, 0, 0.5}, {0, 0, 0}};
    for (size_t i = 0; i < sizeof routes / sizeof *routes; i++) check_route(f, routes[i]);
}

static void test_against_reference(void **state) {
    (void)state;
    fixture *f = mixed_pack(2);
    static const double lambdas[] = {0, 0.3, 1}, densities[] = {1, 0.37, 0.2, 1e-9};
    for (int l = 0; l < 3; l++) {
        for (int d = 0; d < 4; d++) {
            for (int profile = 0; profile < 3; profile++) {
                for (int reading = 0; reading < 2; reading++) {
                    f->pack.settings = (obm_pack_settings){sizeof f->pack.settings, lambdas[l], (obm_reading)reading,
                                                           (obm_profile)profile, densities[d]};
                    check_settings(f);
                }
            }
        }
    }
    fixture_free(f);
}

/* More planes than a pattern holds: the elementwise rule, the same reference. */
static void test_many_planes(void **state) {
    (void)state;
    fixture *f = fixture_new(3, 1, 1);
    size_t t = fixture_tensor(f, "w", 6, 150);
    for (size_t k = 0; k < 3; k++) fixture_planes(f, k, t, 3, k ? OBM_SCALE_ROW : OBM_SCALE_GROUP, 64);
    obm__route_plan *plan;
    double weights[] = {0, 1, 0};
    assert_int_equal(obm__route_plan_new(&f->pack, weights, OBM_ROUTE_ALL, NULL, &plan, NULL), OBM_OK);
    assert_int_equal(obm__route_kind_of(plan, t), OBM_ROUTE_ELEMENTS);
    obm__route_plan_free(plan);
    check_settings(f);
    f->pack.settings.lambda = 0; /* routing only: three planes, a table again */
    assert_int_equal(obm__route_plan_new(&f->pack, weights, OBM_ROUTE_ALL, NULL, &plan, NULL), OBM_OK);
    assert_int_equal(obm__route_kind_of(plan, t), OBM_ROUTE_PATTERNS);
    obm__route_plan_free(plan);
    check_settings(f);
    fixture_free(f);
}

static obm__route_kind kind_under(fixture *f, const double *weights, size_t tensor) {
    obm__route_plan *plan;
    assert_int_equal(obm__route_plan_new(&f->pack, weights, OBM_ROUTE_ALL, NULL, &plan, NULL), OBM_OK);
    obm__route_kind kind = obm__route_kind_of(plan, tensor);
    assert_int_equal(obm__route_changes(plan, tensor), kind != OBM_ROUTE_BASE);
    obm__route_plan_free(plan);
    return kind;
}

static void test_kinds(void **state) {
    (void)state;
    fixture *f = mixed_pack(1);
    static const double chat[] = {1, 0, 0}, code[] = {0, 0, 1}, base[] = {0, 0, 0}, half[] = {0, 0, 0.5};
    assert_int_equal(kind_under(f, chat, 0), OBM_ROUTE_PATTERNS);
    assert_int_equal(kind_under(f, chat, 2), OBM_ROUTE_ELEMENTS);
    assert_int_equal(kind_under(f, chat, 5), OBM_ROUTE_BASE);
    assert_int_equal(kind_under(f, base, 0), OBM_ROUTE_BASE);
    assert_int_equal(kind_under(f, code, 4), OBM_ROUTE_EXPERT); /* nobody else has a task vector here */
    assert_int_equal(kind_under(f, half, 4), OBM_ROUTE_ELEMENTS);
    assert_int_equal(kind_under(f, code, 3), OBM_ROUTE_ELEMENTS);
    f->pack.settings.lambda = 0;
    assert_int_equal(kind_under(f, code, 3), OBM_ROUTE_EXPERT);
    assert_int_equal(kind_under(f, code, 2), OBM_ROUTE_BASE);
    f->pack.settings.lambda = 0.3;
    f->pack.settings.reading = OBM_READING_RECOMPUTED;
    assert_int_equal(kind_under(f, code, 4), OBM_ROUTE_ELEMENTS); /* the others are -d~_code */
    fixture_free(f);
}

/* A full tensor under its hard route is the expert's to the bit, also where base + (expert - base) rounds. */
static void test_expert_is_exact(void **state) {
    (void)state;
    fixture *f = fixture_new(2, 1, 1);
    size_t t = fixture_tensor(f, "norm", 1, 4);
    fixture_full(f, 0, t, 0);
    fixture_full(f, 1, t, 0);
    float *base = (float *)f->pack.tensors[t].base.data, *own = (float *)fixture_entry(f, 0, t)->full.data;
    base[0] = 1e8f, own[0] = 1.2345678f;
    base[1] = -3e-20f, own[1] = 0.1f;
    base[2] = 7, own[2] = -0.0f;
    f->pack.settings.lambda = 0;
    float out[4];
    assert_int_equal(obm_pack_materialise(&f->pack, (double[]){1, 0}, "norm", out, NULL), OBM_OK);
    assert_memory_equal(out, own, sizeof out);
    f->pack.n_experts = 1; /* K = 1: no remainder at any lambda */
    f->pack.settings.lambda = 1;
    memset(out, 0, sizeof out);
    assert_int_equal(obm_pack_materialise(&f->pack, (double[]){1}, "norm", out, NULL), OBM_OK);
    assert_memory_equal(out, own, sizeof out);
    fixture_free(f);
}

static void test_extra_rows(void **state) {
    (void)state;
    fixture *f = fixture_new(2, 2, 2);
    size_t e = fixture_tensor(f, "lm_head.weight", 6, 10), g = fixture_tensor(f, OBM_EMBEDDING_NAME, 6, 10);
    fixture_full(f, 0, g, 3);
    fixture_planes(f, 0, e, 1, OBM_SCALE_ROW, 0);
    fixture_entry(f, 0, e)->extra = fixture_floats(f, 3, 10, 1);
    fixture_full(f, 1, g, 0);
    obm_tensor shape;
    static const double first[] = {1, 0}, second[] = {0, 1}, soft[] = {0.5, 0.5}, scaled[] = {0.5, 0};
    const double *without[] = {second, soft, scaled};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(obm_pack_route_shape(&f->pack, without[i], OBM_EMBEDDING_NAME, &shape, NULL), OBM_OK);
        assert_int_equal(shape.shape[0], 6);
    }
    const char *names[] = {"lm_head.weight", OBM_EMBEDDING_NAME};
    const float *extra[] = {fixture_entry(f, 0, e)->extra.data, (const float *)fixture_entry(f, 0, g)->full.data + 60};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(obm_pack_route_shape(&f->pack, first, names[i], &shape, NULL), OBM_OK);
        assert_int_equal(shape.shape[0], 9);
        assert_null(shape.data);
        float out[90];
        assert_int_equal(obm_pack_materialise(&f->pack, first, names[i], out, NULL), OBM_OK);
        assert_memory_equal(out + 60, extra[i], 30 * sizeof *out);
    }
    fixture_free(f);
}

/* Tied base; chat has a head of its own, math is tied: its head is its embedding. */
static void test_untied_head(void **state) {
    (void)state;
    fixture *f = fixture_new(2, 2, 1);
    size_t head = fixture_tensor(f, OBM_HEAD_NAME, 6, 10), embedding = fixture_tensor(f, OBM_EMBEDDING_NAME, 6, 10);
    f->pack.tensors[head].base = f->pack.tensors[embedding].base;
    f->pack.tensors[head].in_base = false;
    fixture_full(f, 0, head, 0);
    fixture_full(f, 0, embedding, 0);
    fixture_full(f, 1, embedding, 0);
    f->pack.settings.lambda = 0;
    static const double chat[] = {1, 0}, math[] = {0, 1}, base[] = {0, 0};
    float a[60], b[60];
    obm_error err;
    obm_tensor shape;
    assert_int_equal(obm_pack_materialise(&f->pack, chat, OBM_HEAD_NAME, a, NULL), OBM_OK);
    assert_memory_equal(a, fixture_entry(f, 0, head)->full.data, sizeof a);
    assert_int_equal(obm_pack_route_shape(&f->pack, math, OBM_HEAD_NAME, &shape, &err), OBM_E_NOTFOUND);
    assert_int_equal(obm_pack_materialise(&f->pack, base, OBM_HEAD_NAME, a, &err), OBM_E_NOTFOUND);
    f->pack.settings.lambda = 0.5;
    f->pack.settings.density = 0.3;
    for (int profile = 0; profile < 3; profile++) {
        f->pack.settings.profile = (obm_profile)profile;
        /* The same pack with the tied head written out gives the same head. */
        assert_int_equal(obm_pack_materialise(&f->pack, chat, OBM_HEAD_NAME, a, NULL), OBM_OK);
        assert_int_equal(obm_pack_materialise(&f->pack, math, OBM_HEAD_NAME, b, NULL), OBM_OK);
        const float *own = fixture_entry(f, 0, head)->full.data, *theta = f->pack.tensors[embedding].base.data;
        const float *other = fixture_entry(f, 1, embedding)->full.data;
        double d[60], kept[60];
        for (int i = 0; i < 60; i++) kept[i] = d[i] = other[i] - theta[i];
        reference_trim(kept, 60, 0.3);
        for (int i = 0; i < 60; i++)
            assert_true(a[i] == (float)(theta[i] + ((double)(own[i] - theta[i]) + 0.5 * kept[i])));
    }
    fixture_free(f);
}

static void test_threads_agree(void **state) {
    (void)state;
    static const int threads[] = {1, 2, 5};
    static const double weights[] = {0.25, 1, 0.5};
    float first[6][4096];
    for (int i = 0; i < 3; i++) {
        fixture *f = mixed_pack(threads[i]);
        f->pack.settings.density = 0.3;
        for (size_t t = 0; t < f->pack.n_tensors; t++) {
            float out[4096];
            size_t n = (size_t)obm_tensor_count(&f->pack.tensors[t].base);
            assert_int_equal(obm_pack_materialise(&f->pack, weights, f->pack.tensors[t].name, out, NULL), OBM_OK);
            if (i == 0)
                memcpy(first[t], out, n * sizeof *out);
            else
                assert_memory_equal(first[t], out, n * sizeof *out);
        }
        fixture_free(f);
    }
}

static void test_soft_is_linear(void **state) {
    (void)state;
    fixture *f = mixed_pack(1);
    f->pack.settings.density = 0.4;
    static const double soft[] = {0.7, 0, 0.3};
    for (size_t t = 0; t < f->pack.n_tensors; t++) {
        float mix[4096], one[4096];
        double sum[4096];
        size_t n = (size_t)obm_tensor_count(&f->pack.tensors[t].base);
        const float *base = f->pack.tensors[t].base.data;
        for (size_t i = 0; i < n; i++) sum[i] = base[i];
        for (size_t k = 0; k < 3; k++) {
            double hard[3] = {0};
            hard[k] = 1;
            assert_int_equal(obm_pack_materialise(&f->pack, hard, f->pack.tensors[t].name, one, NULL), OBM_OK);
            for (size_t i = 0; i < n; i++) sum[i] += soft[k] * ((double)one[i] - base[i]);
        }
        assert_int_equal(obm_pack_materialise(&f->pack, soft, f->pack.tensors[t].name, mix, NULL), OBM_OK);
        for (size_t i = 0; i < n; i++) assert_true(fabs(mix[i] - sum[i]) <= 3e-7);
    }
    fixture_free(f);
}

static void test_recomputed_with_two_is_the_other(void **state) {
    (void)state;
    fixture *f = fixture_new(2, 1, 1);
    size_t t = fixture_tensor(f, "w", 4, 64);
    fixture_planes(f, 0, t, 1, OBM_SCALE_MATRIX, 0);
    fixture_planes(f, 1, t, 1, OBM_SCALE_MATRIX, 0);
    f->pack.settings.reading = OBM_READING_RECOMPUTED;
    f->pack.settings.lambda = 1;
    float out[256];
    assert_int_equal(obm_pack_materialise(&f->pack, (double[]){1, 0}, "w", out, NULL), OBM_OK);
    assert_int_equal(obm_pack_materialise(&f->pack, (double[]){1, 0}, "w", out, NULL), OBM_OK);
    assert_int_equal(f->warnings, 1);
    for (int i = 0; i < 256; i++) {
        double other = ((const float *)f->pack.tensors[t].base.data)[i] + reference_delta(f, 1, t, i / 64, i % 64);
        assert_true(fabs(out[i] - other) <= 1e-7);
    }
    fixture_free(f);
}

/* Sign of the plane `from` of a matrix at (row, col). */
static double sign_at(const obm__plane_ref *p, int64_t row, int64_t col) {
    return p->from->signs[p->plane][row * p->from->row_bytes + col / 8] >> col % 8 & 1 ? 1 : -1;
}

/* The same route run on planes: base + sum of c_M times products of signs. */
static void test_coefficients_of_a_plan(void **state) {
    (void)state;
    fixture *f = mixed_pack(1);
    double weights[] = {0.5, 0.25, 1};
    obm__route_plan *plan;
    obm__coefficients *c;
    obm__route_masks masks;
    size_t n_planes;
    float row[200];
    assert_int_equal(obm__route_plan_new(&f->pack, weights, OBM_ROUTE_ALL, NULL, &plan, NULL), OBM_OK);
    assert_int_equal(obm__coefficients_new(&f->pack, 0, NULL, &c, NULL), OBM_OK);
    const obm__plane_ref *planes = obm__coefficients_planes(c, &n_planes);
    const obm__coefficient_shape *shape = obm__coefficients_shape(c);
    assert_int_equal(n_planes, 3);
    float *room = malloc(obm__coefficients_room(c, weights) * sizeof *room);
    assert_non_null(room);
    assert_int_equal(obm__coefficients_route(c, weights, room, &masks, NULL), OBM_OK);
    assert_int_equal(masks.n, 3); /* two others at a time are linear: no XOR */
    for (int64_t r = 0; r < 9; r++) {
        assert_int_equal(obm__route_rows(plan, 0, r, 1, row, NULL), OBM_OK);
        for (int64_t i = 0; i < 200; i++) {
            double theta = ((const float *)f->pack.tensors[0].base.data)[r * 200 + i];
            for (int m = 0; m < masks.n; m++) {
                double product = masks.c[m][i / shape->group * shape->c_rows + (shape->c_rows == 1 ? 0 : r)];
                for (int p = 0; p < masks.n_planes; p++)
                    if (masks.mask[m] >> p & 1) product *= sign_at(&planes[masks.plane[p]], r, i);
                theta += product;
            }
            assert_true(fabs(theta - row[i]) <= 1e-7);
        }
    }
    free(room);
    obm__coefficients_free(c);
    obm__route_plan_free(plan);
    fixture_free(f);
}

/* The k largest by counting, against sorting; few bits, so that many are equal. */
static void check_kth(fixture *f, size_t n, uint64_t k) {
    float x[300];
    magnitude m[300];
    obm__kth s;
    for (size_t i = 0; i < n; i++) {
        x[i] = (float)(round(fixture_random(f) * 20) / 64);
        m[i] = (magnitude){fabs(x[i]), i};
    }
    qsort(m, n, sizeof *m, by_magnitude);
    assert_int_equal(obm__kth_begin(&s, k, NULL), OBM_OK);
    for (int pass = 0; pass < 2; pass++) {
        obm__kth_add(&s, f->pack.ctx->k, x, n / 3);
        obm__kth_add(&s, f->pack.ctx->k, x + n / 3, n - n / 3);
        obm__kth_turn(&s);
    }
    obm__kth_end(&s);
    bool kept[300] = {false};
    uint64_t equal = s.equal, held = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = obm__magnitude_bits(x[i]);
        kept[i] = bits > s.threshold || (bits == s.threshold && equal > 0 && equal--);
        held += kept[i];
    }
    assert_int_equal(held, k < n ? k : n);
    for (size_t i = 0; i < held; i++) assert_true(kept[m[i].at]);
}

static void test_kth(void **state) {
    (void)state;
    fixture *f = fixture_new(1, 1, 1);
    static const size_t counts[] = {0, 1, 2, 7, 64, 300};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        for (uint64_t k = 1; k <= counts[i] + 2; k++) check_kth(f, counts[i], k);
    }
    fixture_free(f);
}

/* Nothing to count for one expert, and a threshold that keeps one element for another. */
static void test_paper_trim_without_full_tensors(void **state) {
    (void)state;
    fixture *f = fixture_new(3, 2, 1);
    size_t a = fixture_tensor(f, "a", 3, 70), b = fixture_tensor(f, "b", 2, 9);
    for (size_t k = 0; k < 3; k++) fixture_planes(f, k, a, 1, OBM_SCALE_ROW, 0);
    fixture_full(f, 1, b, 0);
    f->pack.settings.profile = OBM_PROFILE_PAPER;
    f->pack.settings.density = 0.01;
    check_settings(f);
    f->pack.settings.reading = OBM_READING_RECOMPUTED;
    check_settings(f);
    fixture_free(f);
}

static void check_parse(fixture *f, const char *text, const double *expected, const char *canonical) {
    double weights[3] = {9, 9, 9};
    obm_error err;
    if (obm_pack_parse_route(&f->pack, text, weights, &err) != OBM_OK) fail_msg("%s: %s", text, err.message);
    for (int k = 0; k < 3; k++) assert_true(weights[k] == expected[k]);
    char *back;
    assert_int_equal(obm_pack_format_route(&f->pack, weights, &back, NULL), OBM_OK);
    assert_string_equal(back, canonical);
    obm_free(back);
}

static void test_route_texts(void **state) {
    (void)state;
    fixture *f = fixture_new(3, 1, 1);
    check_parse(f, "math", (double[]){0, 1, 0}, "math");
    check_parse(f, " 2 ", (double[]){0, 0, 1}, "code");
    check_parse(f, "base", (double[]){0, 0, 0}, "base");
    check_parse(f, "chat=.7,math=.3", (double[]){0.7, 0.3, 0}, "chat=0.7,math=0.3");
    check_parse(f, "code = 1", (double[]){0, 0, 1}, "code");
    check_parse(f, "1=2.5, 0=1e-3", (double[]){1e-3, 2.5, 0}, "chat=0.001,math=2.5");
    static const struct {
        const char *text;
        obm_status status;
    } bad[] = {
        {"law", OBM_E_NOTFOUND}, {"3", OBM_E_NOTFOUND},        {"", OBM_E_NOTFOUND},      {"chat=", OBM_E_ARG},
        {"chat=x", OBM_E_ARG},   {"chat=1,chat=2", OBM_E_ARG}, {"chat,math", OBM_E_ARG},  {"chat=-1", OBM_E_ARG},
        {"chat=nan", OBM_E_ARG}, {"chat=inf", OBM_E_ARG},      {"law=1", OBM_E_NOTFOUND}, {"chat=1,", OBM_E_ARG},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        double weights[3] = {5, 5, 5};
        obm_error err;
        assert_int_equal(obm_pack_parse_route(&f->pack, bad[i].text, weights, &err), bad[i].status);
        assert_true(weights[0] == 5 && err.message[0]);
    }
    char *text;
    assert_int_equal(obm_pack_format_route(&f->pack, (double[]){0, NAN, 0}, &text, NULL), OBM_E_ARG);
    fixture_free(f);
}

static void test_wrong_use(void **state) {
    (void)state;
    fixture *f = mixed_pack(1);
    float out[2048];
    obm_error err;
    assert_int_equal(obm_pack_materialise(&f->pack, (double[]){1, 0, 0}, "nothing", out, &err), OBM_E_NOTFOUND);
    assert_int_equal(obm_pack_materialise(&f->pack, (double[]){1, -1, 0}, "a.one_bit", out, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "math"));
    f->pack.tensors[5].base.dtype = OBM_I32;
    assert_int_equal(obm_pack_materialise(&f->pack, (double[]){1, 0, 0}, "f.base", out, &err), OBM_E_DTYPE);
    fixture_free(f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_reference),
        cmocka_unit_test(test_many_planes),
        cmocka_unit_test(test_kinds),
        cmocka_unit_test(test_expert_is_exact),
        cmocka_unit_test(test_extra_rows),
        cmocka_unit_test(test_untied_head),
        cmocka_unit_test(test_threads_agree),
        cmocka_unit_test(test_soft_is_linear),
        cmocka_unit_test(test_recomputed_with_two_is_the_other),
        cmocka_unit_test(test_coefficients_of_a_plan),
        cmocka_unit_test(test_kth),
        cmocka_unit_test(test_paper_trim_without_full_tensors),
        cmocka_unit_test(test_route_texts),
        cmocka_unit_test(test_wrong_use),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
