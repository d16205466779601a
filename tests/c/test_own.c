/* Merge methods of the caller: what a function gets, what its answer becomes, and what is refused.  Expected values are
 * formulas written out here. */
#include <onebitmerge.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N ((size_t)700001) /* odd, and more than two tiles */

typedef struct seen {
    size_t calls;
    uint64_t next; /* the element the next tile must begin with */
    size_t elements;
    const char *fail;
    uint64_t nan_at;
    float *memory;
    size_t memory_calls;
} seen;

static obm_context *new_context(int threads) {
    obm_context_options options = OBM_INIT(obm_context_options);
    options.threads = threads;
    obm_context *ctx;
    obm_error err;
    if (obm_context_new(&options, &ctx, &err) != OBM_OK) fail_msg("%s", err.message);
    return ctx;
}

/* out = gain * sum(weight_i * v_i), and the inputs are spoilt afterwards: they are the function's. */
static obm_status weighted_sum(void *user, const obm_merge_tile *t, obm_error *err) {
    seen *s = user;
    s->calls++;
    assert_int_equal(t->begin, s->next);
    s->next = t->begin + t->count;
    s->elements += t->count;
    if (s->fail) {
        err->code = OBM_E_USER;
        snprintf(err->message, sizeof err->message, "%s", s->fail);
        return OBM_E_USER;
    }
    float gain = (float)t->values[t->n_models];
    for (size_t i = 0; i < t->n_models; i++) {
        float weight = (float)t->values[i];
        for (size_t j = 0; j < t->count; j++) t->out[j] += gain * weight * t->vectors[i * t->count + j];
    }
    memset(t->vectors, 0xff, t->n_models * t->count * sizeof *t->vectors);
    if (s->nan_at >= t->begin && s->nan_at < s->next) t->out[s->nan_at - t->begin] = NAN;
    return OBM_OK;
}

static const obm_param_info params[] = {
    {"weight", "factor of a model", OBM_PARAM_PER_MODEL, true, 1, -10, 10, false},
    {"gain", "factor of all", OBM_PARAM_GLOBAL, false, 2, 0, 100, false},
};

static obm_custom_method method_of(seen *s) {
    obm_custom_method m = OBM_INIT(obm_custom_method);
    m.info = (obm_method_info){.name = "sum", .params = params, .n_params = 2, .needs_base = true};
    m.merge = weighted_sum;
    m.user = s;
    *s = (seen){.nan_at = UINT64_MAX};
    return m;
}

typedef struct inputs {
    obm_tensor base, models[2];
    float *data; /* (3, N) */
} inputs;

static inputs make_inputs(size_t n) {
    inputs in = {.data = malloc(3 * n * sizeof(float))};
    for (size_t j = 0; j < 3 * n; j++) in.data[j] = (float)((double)((j * 2654435761u) % 100003u) / 50001.0 - 1.0);
    obm_tensor t = {.dtype = OBM_F32, .ndim = 1, .shape = {(int64_t)n}, .data = in.data};
    in.base = t;
    for (size_t i = 0; i < 2; i++) {
        t.data = in.data + (i + 1) * n;
        in.models[i] = t;
    }
    return in;
}

static const obm_param weights[] = {{"weight", 0, 0.5}, {"weight", 1, -1.5}};

static obm_status run(int threads, const obm_custom_method *m, const inputs *in, float *out, obm_error *err) {
    obm_context *ctx = new_context(threads);
    obm_status status = obm_merge_tensors_custom(ctx, m, OBM_PROFILE_DEFAULT, m->info.needs_base ? &in->base : NULL,
                                                 in->models, 2, weights, 2, 0, out, err);
    obm_context_free(ctx);
    return status;
}

static void test_formula(void **state) {
    (void)state;
    inputs in = make_inputs(N);
    float *a = malloc(N * sizeof *a), *b = malloc(N * sizeof *b);
    seen s;
    obm_error err;
    obm_custom_method m = method_of(&s);
    if (run(1, &m, &in, a, &err) != OBM_OK) fail_msg("%s", err.message);
    assert_true(s.calls > 1);
    assert_int_equal(s.elements, N);
    for (size_t j = 0; j < N; j++) {
        float d0 = in.data[N + j] - in.data[j], d1 = in.data[2 * N + j] - in.data[j];
        float want = in.data[j] + (0.0f + 2.0f * 0.5f * d0 + 2.0f * -1.5f * d1);
        if (a[j] != want) fail_msg("element %zu is %.9g, expected %.9g", j, a[j], want);
    }
    m = method_of(&s);
    m.whole_tensor = true;
    assert_int_equal(run(3, &m, &in, b, &err), OBM_OK);
    assert_int_equal(s.calls, 1);
    assert_memory_equal(a, b, N * sizeof *a);
    free(a);
    free(b);
    free(in.data);
}

/* Without a base the vectors are the weights, and nothing is added. */
static void test_weights(void **state) {
    (void)state;
    inputs in = make_inputs(5);
    seen s;
    obm_error err;
    obm_custom_method m = method_of(&s);
    m.info.needs_base = false;
    float out[5];
    assert_int_equal(run(2, &m, &in, out, &err), OBM_OK);
    for (size_t j = 0; j < 5; j++) assert_true(out[j] == 0.0f + 1.0f * in.data[5 + j] + -3.0f * in.data[10 + j]);
    free(in.data);
}

static float *give_memory(void *user, size_t floats) {
    seen *s = user;
    s->memory_calls++;
    free(s->memory);
    return s->memory = malloc(floats * sizeof(float));
}

static float *no_memory(void *user, size_t floats) {
    (void)user;
    (void)floats;
    return NULL;
}

static void test_memory(void **state) {
    (void)state;
    inputs in = make_inputs(N);
    float *a = malloc(N * sizeof *a), *b = malloc(N * sizeof *b);
    seen s;
    obm_error err;
    obm_custom_method m = method_of(&s);
    assert_int_equal(run(2, &m, &in, a, &err), OBM_OK);
    m = method_of(&s);
    m.memory = give_memory;
    assert_int_equal(run(2, &m, &in, b, &err), OBM_OK);
    assert_int_equal(s.memory_calls, s.calls);
    assert_memory_equal(a, b, N * sizeof *a);
    free(s.memory);
    m.memory = no_memory;
    assert_int_equal(run(2, &m, &in, b, &err), OBM_E_NOMEM);
    free(a);
    free(b);
    free(in.data);
}

static void test_failures(void **state) {
    (void)state;
    inputs in = make_inputs(N);
    float *out = malloc(N * sizeof *out);
    seen s;
    obm_error err;
    for (int whole = 0; whole < 2; whole++) {
        obm_custom_method m = method_of(&s);
        m.whole_tensor = whole;
        s.fail = "no more";
        assert_int_equal(run(2, &m, &in, out, &err), OBM_E_USER);
        assert_string_equal(err.message, "no more");
        assert_int_equal(s.calls, 1);

        m = method_of(&s);
        m.whole_tensor = whole;
        s.fail = "";
        assert_int_equal(run(2, &m, &in, out, &err), OBM_E_USER);
        assert_string_equal(err.message, "the tensor: stopped by the method sum");

        m = method_of(&s);
        m.whole_tensor = whole;
        s.nan_at = 600000;
        assert_int_equal(run(2, &m, &in, out, &err), OBM_E_VALUE);
        assert_string_equal(err.message, "the tensor: the method sum gave NaN or Inf at index 600000");
    }
    in.data[2 * N + 77] = INFINITY;
    obm_custom_method m = method_of(&s);
    assert_int_equal(run(2, &m, &in, out, &err), OBM_E_VALUE);
    assert_string_equal(err.message, "the tensor: NaN or Inf in model 1 at index 77");
    assert_int_equal(s.calls, 0);
    free(out);
    free(in.data);
}

static void refused(const obm_custom_method *m, const char *part) {
    obm_error err;
    assert_int_equal(obm_custom_method_check(m, &err), OBM_E_ARG);
    if (!strstr(err.message, part)) fail_msg("expected \"%s\" in: %s", part, err.message);
}

static void test_descriptions(void **state) {
    (void)state;
    seen s;
    obm_error err;
    obm_custom_method good = method_of(&s), m = good;
    assert_int_equal(obm_custom_method_check(&good, &err), OBM_OK);
    refused(NULL, "a method's name");
    m.info.name = "ties";
    refused(&m, "ties is a built-in method");
    m.info.name = "a b";
    refused(&m, "found \"a b\"");
    m.info.name = "";
    refused(&m, "a method's name");
    m = good;
    m.merge = NULL;
    refused(&m, "needs a function");
    m = good;
    m.info.min_models = 3;
    m.info.max_models = 2;
    refused(&m, "min_models");
    m = good;
    m.info.params = (obm_param_info[]){params[0], params[0]};
    refused(&m, "listed twice");
    obm_param_info bad = params[1];
    m.info.n_params = 1;
    m.info.params = &bad;
    bad.name = "scope";
    refused(&m, "cannot be named scope");
    bad.name = "x-y";
    refused(&m, "found \"x-y\"");
    bad.name = "x";
    bad.dflt = 101;
    refused(&m, "expected a default in [0, 100], found 101");
    m = good;
    m.info.n_params = 33;
    refused(&m, "at most 32 parameters");
}

/* An empty tensor never reaches the function; a scalar does. */
static void test_shapes(void **state) {
    (void)state;
    obm_context *ctx = new_context(2);
    seen s;
    obm_error err;
    float x[3] = {1, 2, 4}, out[1] = {9};
    for (int whole = 0; whole < 2; whole++) {
        obm_custom_method m = method_of(&s);
        m.whole_tensor = whole;
        obm_tensor base = {.dtype = OBM_F32, .ndim = 2, .shape = {0, 4}, .data = x}, models[2] = {base, base};
        assert_int_equal(
            obm_merge_tensors_custom(ctx, &m, OBM_PROFILE_DEFAULT, &base, models, 2, weights, 2, 0, out, &err), OBM_OK);
        assert_int_equal(s.calls, 0);
        base = (obm_tensor){.dtype = OBM_F32, .ndim = 0, .data = x};
        models[0] = models[1] = base;
        models[0].data = x + 1;
        models[1].data = x + 2;
        assert_int_equal(
            obm_merge_tensors_custom(ctx, &m, OBM_PROFILE_DEFAULT, &base, models, 2, weights, 2, 0, out, &err), OBM_OK);
        assert_true(out[0] == 1 + (2 * 0.5f * 1 + 2 * -1.5f * 3));
    }
    obm_custom_method m = method_of(&s);
    assert_int_equal(obm_merge_tensors_custom(ctx, &m, OBM_PROFILE_DEFAULT, NULL, NULL, 0, NULL, 0, 0, out, &err),
                     OBM_E_ARG);
    obm_context_free(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_formula),  cmocka_unit_test(test_weights),      cmocka_unit_test(test_memory),
        cmocka_unit_test(test_failures), cmocka_unit_test(test_descriptions), cmocka_unit_test(test_shapes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
