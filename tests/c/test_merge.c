/* Merges of one tensor: shared vectors, mergekit's own outputs, and an independent reference that sorts. */
#include "delta_fixture.h"
#include "merge/merge.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static obm_context *new_context(int threads) {
    obm_context_options options = OBM_INIT(obm_context_options);
    options.threads = threads;
    obm_context *ctx;
    obm_error err;
    if (obm_context_new(&options, &ctx, &err) != OBM_OK) fail_msg("%s", err.message);
    return ctx;
}

static uint64_t rng_state;
static uint64_t rng(void) { /* xorshift64*: not the generator under test */
    rng_state ^= rng_state >> 12;
    rng_state ^= rng_state << 25;
    rng_state ^= rng_state >> 27;
    return rng_state * 0x2545f4914f6cdd1dULL;
}
static float uniform(void) { return (float)((double)(rng() >> 40) / (1 << 23) - 1.0); }

static obm_tensor vector_f32(const float *data, size_t n) {
    return (obm_tensor){.data = data, .dtype = OBM_F32, .ndim = 1, .shape = {(int64_t)n}};
}

/* ---- shared vectors ---- */

#define MAX_MODELS 4
#define MAX_PARAMS 32
typedef struct vector_case {
    char name[128], method[64];
    obm_profile profile;
    uint64_t seed;
    obm_param params[MAX_PARAMS];
    char param_names[MAX_PARAMS][32];
    size_t n_params, n_models;
    obm_tensor shape, base, models[MAX_MODELS];
    void *buffers[MAX_MODELS + 1];
    size_t n_buffers;
} vector_case;

/* "bf16 0x1.8p-3 ..." in the case's shape. */
static obm_tensor read_tensor(vector_case *c, char *text) {
    obm_tensor t = c->shape;
    char *end = strchr(text, ' ');
    *end++ = 0;
    t.dtype = !strcmp(text, "f32") ? OBM_F32 : !strcmp(text, "bf16") ? OBM_BF16 : OBM_F16;
    size_t count = (size_t)obm_tensor_count(&t);
    float *x = malloc(count * sizeof *x);
    void *data = malloc(count * sizeof *x);
    for (size_t i = 0; i < count; i++) x[i] = strtof(end, &end);
    obm__narrow(obm_kernels_find("scalar"), t.dtype, x, (int64_t)count, data);
    free(x);
    t.data = data;
    c->buffers[c->n_buffers++] = data;
    return t;
}

static void check_case(obm_context *ctx, vector_case *c, char *expected) {
    bool exact = !strncmp(expected, "exact", 5);
    double bound = strtod(expected, NULL);
    char *end = strchr(expected, ' ');
    size_t n = (size_t)obm_tensor_count(&c->shape);
    float *got = malloc(n * sizeof *got);
    obm_error err;
    if (obm_merge_tensors(ctx, c->method, c->profile, c->base.data ? &c->base : NULL, c->models, c->n_models, c->params,
                          c->n_params, c->seed, got, &err) != OBM_OK)
        fail_msg("%s: %s", c->name, err.message);
    for (size_t i = 0; i < n; i++) {
        float w = strtof(end, &end);
        if (exact ? w != got[i] : !(fabs((double)w - got[i]) <= bound))
            fail_msg("%s: element %zu is %.9g, expected %.9g", c->name, i, got[i], w);
    }
    free(got);
}

static void case_line(obm_context *ctx, vector_case *c, char *line, size_t *done) {
    char *rest = strchr(line, ' ');
    if (!rest) return;
    *rest++ = 0;
    rest[strcspn(rest, "\n")] = 0;
    if (!strcmp(line, "case")) {
        for (size_t i = 0; i < c->n_buffers; i++) free(c->buffers[i]);
        *c = (vector_case){0};
        snprintf(c->name, sizeof c->name, "%s", rest);
    } else if (!strcmp(line, "method")) {
        snprintf(c->method, sizeof c->method, "%s", rest);
    } else if (!strcmp(line, "profile")) {
        c->profile = !strcmp(rest, "paper") ? OBM_PROFILE_PAPER : OBM_PROFILE_MERGEKIT;
    } else if (!strcmp(line, "seed")) {
        c->seed = strtoull(rest, NULL, 10);
    } else if (!strcmp(line, "param")) {
        obm_param *p = &c->params[c->n_params];
        p->name = c->param_names[c->n_params];
        assert_int_equal(sscanf(rest, "%31s %d %lf", c->param_names[c->n_params++], &p->model, &p->value), 3);
    } else if (!strcmp(line, "shape")) {
        for (char *p = rest; *p; p += *p == ' ') c->shape.shape[c->shape.ndim++] = strtol(p, &p, 10);
    } else if (!strcmp(line, "base")) {
        c->base = read_tensor(c, rest);
    } else if (!strcmp(line, "model")) {
        c->models[c->n_models++] = read_tensor(c, rest);
    } else if (!strcmp(line, "merged")) {
        check_case(ctx, c, rest);
        ++*done;
    }
}

static void test_vectors(void **state) {
    (void)state;
    FILE *f = fopen(OBM_SOURCE_DIR "/tests/vectors/merge.txt", "r");
    assert_non_null(f);
    obm_context *ctx = new_context(2);
    vector_case c = {0};
    char *line = NULL;
    size_t capacity = 0, done = 0;
    while (getline(&line, &capacity, f) > 0) case_line(ctx, &c, line, &done);
    assert_true(done >= 30);
    for (size_t i = 0; i < c.n_buffers; i++) free(c.buffers[i]);
    free(line);
    fclose(f);
    obm_context_free(ctx);
}

/* Every method has at least three shared vectors. */
/* What the vectors of one method have between them. */
typedef struct coverage {
    size_t cases;
    bool vector, odd; /* a 1-D tensor, a matrix of an odd number of elements */
    const obm_method_info *info;
    bool params[32];
} coverage;

static void read_block(const char *at, const char *end, coverage *c) {
    c->cases++;
    while (at < end) {
        long dims[4];
        char name[64];
        int n = sscanf(at, "shape %ld %ld %ld %ld", &dims[0], &dims[1], &dims[2], &dims[3]);
        c->vector |= n == 1;
        c->odd |= n == 2 && dims[0] % 2 && dims[1] % 2;
        if (sscanf(at, "param %63s", name) == 1)
            for (size_t p = 0; p < c->info->n_params; p++) c->params[p] |= !strcmp(name, c->info->params[p].name);
        at += strcspn(at, "\n") + 1;
    }
}

/* Nobody is listed without a case of a vector, one of odd sizes, and one of every parameter; but int8_mask does nothing,
 * and one tensor has one scope. */
static void test_vector_coverage(void **state) {
    (void)state;
    char *text;
    size_t size;
    assert_int_equal(obm__file_read(OBM_SOURCE_DIR "/tests/vectors/merge.txt", &text, &size, NULL), OBM_OK);
    for (size_t i = 0; i < obm_method_count(); i++) {
        char line[96];
        coverage c = {.info = obm_method_at(i)};
        assert_true(c.info->n_params <= OBM_COUNT(c.params));
        snprintf(line, sizeof line, "\nmethod %s\n", c.info->name);
        for (char *p = text; (p = strstr(p, line)); p++) read_block(p + 1, strstr(p, "\nend"), &c);
        if (c.cases < 3 || !c.vector || !c.odd)
            fail_msg("%s has %zu cases, 1-D %d, odd %d", c.info->name, c.cases, c.vector, c.odd);
        for (size_t p = 0; p < c.info->n_params; p++) {
            const char *name = c.info->params[p].name;
            if (!c.params[p] && strcmp(name, "int8_mask") && strcmp(name, "scope"))
                fail_msg("%s: no case gives %s", c.info->name, name);
        }
    }
    assert_null(obm_method_at(obm_method_count()));
    obm_free(text);
}

/* ---- mergekit's own outputs ---- */

/* mergekit computes in f32 and sums in torch's order; the values are of size 1 to 4, so 2e-6 is four to 16 ulp (an
 * angle's cosine in f32 costs most). */
#define GOLDEN_TOLERANCE 2e-6

static void read_numbers(const obm_json *array, float *out, size_t n) {
    assert_int_equal(obm__json_size(array), n);
    for (size_t i = 0; i < n; i++) {
        double x;
        assert_true(obm__json_real(obm__json_at(array, i), &x));
        out[i] = (float)x;
    }
}

static void add_param(obm_param *params, size_t *n, const char *name, int model, double value) {
    params[(*n)++] = (obm_param){name, model, value};
}

/* Which tensors a case merges: "base:m0,-m1" or without a base "m0,m1". */
typedef struct golden_inputs {
    bool has_base;
    obm_tensor base, models[3];
    size_t n;
    float negated[24];
} golden_inputs;

static obm_tensor golden_input(golden_inputs *in, const char *word, const obm_tensor *b, const obm_tensor *m) {
    if (*word == 'b') return *b;
    const obm_tensor *t = &m[word[*word == '-' ? 2 : 1] - '0'];
    if (*word != '-') return *t;
    for (size_t i = 0; i < 24; i++) in->negated[i] = -((const float *)t->data)[i];
    return vector_f32(in->negated, 24);
}

static void parse_inputs(golden_inputs *in, char *text, const obm_tensor *b, const obm_tensor *m) {
    char *colon = strchr(text, ':');
    in->has_base = colon != NULL;
    if (colon) in->base = golden_input(in, text, b, m);
    for (char *p = colon ? colon + 1 : text; p; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL)
        in->models[in->n++] = golden_input(in, p, b, m);
    in->base.ndim = 2, in->base.shape[0] = 4, in->base.shape[1] = 6;
    for (size_t i = 0; i < in->n; i++) in->models[i].ndim = 2, in->models[i].shape[0] = 4, in->models[i].shape[1] = 6;
}

/* "ties inputs=base:m0,m1,m2 w=.5,.3,.7 density=.2,.5,.9 normalize=false lambda=.6 rescale=true(l1)" */
static size_t parse_golden(char *text, char **method, obm_param *params, char **inputs) {
    size_t n = 0;
    char *save, *word = strtok_r(text, " ", &save);
    *method = word;
    while ((word = strtok_r(NULL, " ", &save))) {
        char *value = strchr(word, '=');
        *value++ = 0;
        if (!strcmp(word, "inputs")) {
            *inputs = value;
            continue;
        }
        if (!strncmp(value, "true", 4) || !strncmp(value, "false", 5)) {
            add_param(params, &n, word, -1, *value == 't');
            continue;
        }
        const char *name = !strcmp(word, "w") ? "weight" : word;
        bool per_model = strcmp(name, "lambda") != 0;
        double x = strtod(value, &value);
        if (!per_model || *value != ',') {
            add_param(params, &n, name, -1, x);
            continue;
        }
        add_param(params, &n, name, 0, x);
        for (int i = 1; *value == ','; i++) add_param(params, &n, name, i, strtod(value + 1, &value));
    }
    return n;
}

static void test_golden(void **state) {
    (void)state;
    obm_error err;
    obm_json *root;
    if (obm__json_load(OBM_SOURCE_DIR "/tests/vectors/mergekit_golden.json", &root, &err) != OBM_OK)
        fail_msg("%s", err.message);
    obm_context *ctx = new_context(2);
    float base[24], models[3][24], want[24], got[24];
    obm_tensor b = vector_f32(base, 24), m[3];
    read_numbers(obm__json_get(root, "base"), base, 24);
    for (size_t i = 0; i < 3; i++) {
        read_numbers(obm__json_at(obm__json_get(root, "models"), i), models[i], 24);
        m[i] = vector_f32(models[i], 24);
    }
    const obm_json *expected = obm__json_get(root, "expected");
    size_t done = 0;
    for (void *it = obm__json_first(expected); it; it = obm__json_next(expected, it), done++) {
        char text[128], *method, *inputs = NULL;
        obm_param params[MAX_PARAMS];
        golden_inputs in = {0};
        snprintf(text, sizeof text, "%s", obm__json_key(it));
        size_t n = parse_golden(text, &method, params, &inputs);
        assert_non_null(inputs);
        parse_inputs(&in, inputs, &b, m);
        read_numbers(obm__json_value(it), want, 24);
        if (obm_merge_tensors(ctx, method, OBM_PROFILE_DEFAULT, in.has_base ? &in.base : NULL, in.models, in.n, params,
                              n, 0, got, &err) != OBM_OK)
            fail_msg("%s: %s", obm__json_key(it), err.message);
        for (size_t i = 0; i < 24; i++)
            if (!(fabs((double)want[i] - got[i]) <= GOLDEN_TOLERANCE))
                fail_msg("%s: element %zu is %.9g, expected %.9g", obm__json_key(it), i, got[i], want[i]);
    }
    assert_int_equal(done, 33);
    obm__json_free(root);
    obm_context_free(ctx);
}

/* ---- an independent TIES over several tensors ---- */

typedef struct ranked {
    float magnitude;
    size_t index;
} ranked;
static int by_rank(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->magnitude != y->magnitude) return x->magnitude > y->magnitude ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

static void trim_by_sorting(float *d, size_t n, double density) {
    if (density >= 1) return;
    size_t keep = (size_t)(density * (double)n);
    ranked *r = malloc(n * sizeof *r);
    for (size_t i = 0; i < n; i++) r[i] = (ranked){fabsf(d[i]), i};
    qsort(r, n, sizeof *r, by_rank);
    for (size_t i = keep ? keep : 1; i < n; i++) d[r[i].index] = 0;
    free(r);
}

static float sign_of(float x) { return (float)((x > 0) - (x < 0)); }

/* The paper profile over one concatenation: unweighted election, global majority for zero sums, weighted disjoint mean.
 */
static void ties_paper(const float *base, float **d, size_t models, size_t n, const double *density,
                       const float *weight, float *out) {
    double votes = 0;
    float *sum = calloc(n, sizeof *sum);
    for (size_t i = 0; i < models; i++) {
        trim_by_sorting(d[i], n, density[i]);
        for (size_t j = 0; j < n; j++) sum[j] += d[i][j];
    }
    for (size_t j = 0; j < n; j++) votes += sign_of(sum[j]);
    for (size_t j = 0; j < n; j++) {
        float elected = sum[j] == 0 ? (votes < 0 ? -1.0f : 1.0f) : sign_of(sum[j]), mixed = 0, mass = 0;
        for (size_t i = 0; i < models; i++) {
            if (sign_of(d[i][j]) != elected) continue;
            mixed += weight[i] * d[i][j];
            mass += weight[i];
        }
        out[j] = base[j] + (mass == 0 ? mixed : mixed / mass);
    }
    free(sum);
}

#define N_GROUPS 3
static const size_t group_size[N_GROUPS] = {70001, 1, 12345};

/* Model scope over three tensors; coarse values, multiples of `step`, make magnitudes tie across blocks and tensors. */
static void check_model_scope(obm_context *ctx, int levels, float step) {
    enum { MODELS = 2 };
    size_t n = 0;
    for (int g = 0; g < N_GROUPS; g++) n += group_size[g];
    float *base = malloc(n * sizeof *base), *x[MODELS], *d[MODELS], *want = malloc(n * sizeof *want),
          *got = malloc(n * sizeof *got);
    for (size_t j = 0; j < n; j++) base[j] = (float)(int)(uniform() * 64) / 8;
    for (int i = 0; i < MODELS; i++) {
        x[i] = malloc(n * sizeof *x[i]);
        d[i] = malloc(n * sizeof *d[i]);
        for (size_t j = 0; j < n; j++) {
            x[i][j] = base[j] + (levels ? (float)(int)(uniform() * (float)levels) * step : uniform());
            d[i][j] = x[i][j] - base[j];
        }
    }
    const double density[MODELS] = {0.37, 0.6};
    const float weight[MODELS] = {1, 0.25f};
    ties_paper(base, d, MODELS, n, density, weight, want);

    const obm_param params[] = {
        {"weight", 0, weight[0]}, {"weight", 1, weight[1]}, {"density", 0, density[0]}, {"density", 1, density[1]}};
    obm__steps steps;
    assert_int_equal(obm__steps_new(&obm__method_ties, OBM_PROFILE_PAPER, MODELS, NULL, params, 4, 0, &steps, NULL),
                     OBM_OK);
    obm_tensor b[N_GROUPS], m[N_GROUPS][MODELS];
    obm__group groups[N_GROUPS];
    size_t at = 0;
    for (int g = 0; g < N_GROUPS; g++) {
        b[g] = vector_f32(base + at, group_size[g]);
        for (int i = 0; i < MODELS; i++) m[g][i] = vector_f32(x[i] + at, group_size[g]);
        groups[g] = (obm__group){.name = "t", .base = &b[g], .models = m[g], .count = group_size[g], .steps = &steps};
        at += group_size[g];
    }
    assert_int_equal(obm__statistics(&(obm__run){.ctx = ctx}, groups, N_GROUPS, NULL), OBM_OK);
    at = 0;
    for (int g = 0; g < N_GROUPS; g++) {
        assert_int_equal(
            obm__group_run(&(obm__run){.ctx = ctx}, &groups[g], 0, groups[g].count, OBM_F32, got + at, NULL), OBM_OK);
        at += group_size[g];
        obm__group_clear(&groups[g]);
    }
    for (size_t j = 0; j < n; j++)
        if (want[j] != got[j]) fail_msg("levels %d, element %zu is %.9g, expected %.9g", levels, j, got[j], want[j]);
    obm__steps_free(&steps);
    for (int i = 0; i < MODELS; i++) free(x[i]), free(d[i]);
    free(base), free(want), free(got);
}

static void test_model_scope(void **state) {
    (void)state;
    rng_state = 11;
    for (int threads = 1; threads <= 5; threads += 2) {
        obm_context *ctx = new_context(threads);
        check_model_scope(ctx, 0, 0);
        check_model_scope(ctx, 3, 0.125f);
        check_model_scope(ctx, 1, 0.125f);
        /* Of so many that share an upper half and have a lower one no list is kept. */
        check_model_scope(ctx, 3, 0.125f + 0x1p-18f);
        check_model_scope(ctx, 4, 0.125f + 0x1p-18f);
        obm_context_free(ctx);
    }
}

/* Cutting one long tensor into two changes nothing under model scope; the whole crosses a span. */
static void test_spans(void **state) {
    (void)state;
    enum { N = (1 << 22) + 5000, CUT = 3 * OBM_MERGE_BLOCK + 17 };
    obm_context *ctx = new_context(2);
    float *base = calloc(N, sizeof *base), *x = malloc(N * sizeof *x), *whole = malloc(N * sizeof *x),
          *parts = malloc(N * sizeof *x);
    rng_state = 21;
    for (size_t j = 0; j < N; j++) x[j] = (float)(int)(uniform() * 40) / 8;
    const obm_param params[] = {{"weight", 0, 1}, {"density", 0, 0.45}, {"scope", -1, 1}};
    obm__steps steps;
    assert_int_equal(obm__steps_new(&obm__method_ties, OBM_PROFILE_MERGEKIT, 1, NULL, params, 3, 0, &steps, NULL),
                     OBM_OK);
    const size_t at[] = {0, 0, CUT}, count[] = {N, CUT, N - CUT};
    obm_tensor b[3], m[3];
    obm__group g[3];
    for (int i = 0; i < 3; i++) {
        b[i] = vector_f32(base + at[i], count[i]);
        m[i] = vector_f32(x + at[i], count[i]);
        g[i] = (obm__group){.name = "t", .base = &b[i], .models = &m[i], .count = count[i], .steps = &steps};
    }
    obm__run run = {.ctx = ctx};
    assert_int_equal(obm__statistics(&run, g, 1, NULL), OBM_OK);
    assert_int_equal(obm__statistics(&run, g + 1, 2, NULL), OBM_OK);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(obm__group_run(&run, &g[i], 0, count[i], OBM_F32, (i ? parts : whole) + at[i], NULL), OBM_OK);
        obm__group_clear(&g[i]);
    }
    size_t kept = 0;
    for (size_t j = 0; j < N; j++) kept += whole[j] != 0;
    assert_int_equal(kept, (size_t)(0.45 * N)); /* more than that are not zero, so the cut decides */
    assert_memory_equal(whole, parts, N * sizeof *x);
    obm__steps_free(&steps);
    free(base), free(x), free(whole), free(parts);
    obm_context_free(ctx);
}

/* ---- properties ---- */

#define BIG 100002 /* = 6 * 16667: rows longer than a block */

static void fill(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = uniform();
}

static void merge_big(obm_context *ctx, const char *method, obm_profile profile, int64_t rows, float *out) {
    static float base[BIG], model[3][BIG];
    rng_state = 5;
    fill(base, BIG);
    obm_tensor b = vector_f32(base, BIG), m[3];
    if (rows) b.ndim = 2, b.shape[0] = rows, b.shape[1] = BIG / rows;
    for (int i = 0; i < 3; i++) {
        fill(model[i], BIG);
        for (size_t j = 0; j < BIG; j += 3) model[i][j] = base[j] + (float)(int)(model[i][j] * 3) / 4;
        m[i] = b;
        m[i].data = model[i];
    }
    const obm__method *row;
    obm_error err;
    obm_param params[5];
    size_t n_params = 0, n = 3;
    assert_int_equal(obm__method_find(method, &row, &err), OBM_OK);
    const obm_param known[] = {
        {"weight", -1, 0.5}, {"density", -1, 0.4}, {"t", -1, 0.3}, {"select_topk", -1, 0.5}, {"metric", -1, 0.5}};
    for (size_t i = 0; i < 5; i++)
        if (obm__method_param(row, known[i].name)) params[n_params++] = known[i];
    if (row->info.max_models && n > (size_t)row->info.max_models) n = (size_t)row->info.max_models;
    if (obm_merge_tensors(ctx, method, profile, obm__method_takes_base(row) ? &b : NULL, m, n, params, n_params, 9, out,
                          &err) != OBM_OK)
        fail_msg("%s: %s", method, err.message);
}

static void test_threads_agree(void **state) {
    (void)state;
    static float one[BIG], many[BIG];
    const int threads[] = {2, 5};
    for (size_t i = 0; i < obm_method_count() * 6; i++) {
        const char *method = obm_method_at(i / 6)->name;
        obm_profile profile = i % 2 ? OBM_PROFILE_PAPER : OBM_PROFILE_MERGEKIT;
        const int64_t rows = (const int64_t[]){0, 6, 16667}[i % 3];
        obm_context *ctx = new_context(1);
        merge_big(ctx, method, profile, rows, one);
        obm_context_free(ctx);
        for (size_t t = 0; t < 2; t++) {
            ctx = new_context(threads[t]);
            merge_big(ctx, method, profile, rows, many);
            obm_context_free(ctx);
            if (memcmp(one, many, sizeof one)) fail_msg("%s differs between 1 and %d threads", method, threads[t]);
        }
    }
}

/* Keep rate within five standard deviations, kept values exactly d / p, and other draws for another seed or model. */
static void test_dare_mask(void **state) {
    (void)state;
    static float d[BIG], e[BIG];
    for (size_t j = 0; j < BIG; j++) d[j] = e[j] = 1;
    const double p = 0.3;
    obm__random_mask(obm__random_key(1, "w", 0), 0, p, d, BIG);
    size_t kept = 0, same = 0;
    for (size_t j = 0; j < BIG; j++) kept += d[j] != 0;
    assert_true(fabs((double)kept - p * BIG) < 5 * sqrt(BIG * p * (1 - p)));
    obm__random_mask(obm__random_key(1, "w", 1), 0, p, e, BIG);
    for (size_t j = 0; j < BIG; j++) same += d[j] == e[j];
    double agreement = p * p + (1 - p) * (1 - p); /* independent masks */
    assert_true(fabs((double)same - agreement * BIG) < 5 * sqrt(BIG * agreement * (1 - agreement)));
    /* a mask that starts in the middle is the middle of the mask */
    float tail[100];
    for (size_t j = 0; j < 100; j++) tail[j] = 1;
    obm__random_mask(obm__random_key(1, "w", 0), 5000, p, tail, 100);
    assert_memory_equal(tail, d + 5000, sizeof tail);
}

static void test_dare_values(void **state) {
    (void)state;
    obm_context *ctx = new_context(2);
    static float base[BIG], model[BIG], out[BIG];
    rng_state = 3;
    fill(model, BIG);
    obm_tensor b = vector_f32(base, BIG), m = vector_f32(model, BIG);
    const obm_param params[] = {{"weight", 0, 1}, {"density", 0, 0.25}};
    assert_int_equal(obm_merge_tensors(ctx, "dare_linear", OBM_PROFILE_DEFAULT, &b, &m, 1, params, 2, 77, out, NULL),
                     OBM_OK);
    double before = 0, after = 0;
    for (size_t j = 0; j < BIG; j++) {
        assert_true(out[j] == 0 || out[j] == model[j] * 4);
        before += fabs((double)model[j]);
        after += fabs((double)out[j]);
    }
    assert_true(fabs(after / before - 1) < 0.03); /* the L1 norm in expectation */
    obm_context_free(ctx);
}

static void test_half_deltas_are_rounded(void **state) {
    (void)state;
    obm_context *ctx = new_context(1);
    /* bf16: 1.0078125 - 2^-9 = 1.005859375 needs 10 bits; it rounds to 1.0078125 in the mergekit profile only. */
    const uint16_t base[] = {0x3b00}, model[] = {0x3f81};
    obm_tensor b = {.data = base, .dtype = OBM_BF16, .ndim = 1, .shape = {1}}, m = b;
    m.data = model;
    const obm_param weight = {"weight", 0, 1};
    float out;
    assert_int_equal(obm_merge_tensors(ctx, "ties", OBM_PROFILE_MERGEKIT, &b, &m, 1, &weight, 1, 0, &out, NULL),
                     OBM_OK);
    assert_true(out == 1.0078125f + 0.001953125f);
    assert_int_equal(obm_merge_tensors(ctx, "ties", OBM_PROFILE_PAPER, &b, &m, 1, &weight, 1, 0, &out, NULL), OBM_OK);
    assert_true(out == 1.0078125f);
    obm_context_free(ctx);
}

/* ---- errors ---- */

static obm_status merge_with(obm_context *ctx, const char *method, const obm_tensor *base, const obm_tensor *models,
                             size_t n, const obm_param *params, size_t n_params, obm_error *err) {
    float out[8] = {42};
    obm_status status =
        obm_merge_tensors(ctx, method, OBM_PROFILE_DEFAULT, base, models, n, params, n_params, 0, out, err);
    assert_true(status == OBM_OK || out[0] == 42);
    return status;
}

static void test_errors(void **state) {
    (void)state;
    obm_context *ctx = new_context(2);
    float x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, y[8] = {2, 2, 2, 2, NAN, 2, 2, 2};
    obm_tensor b = vector_f32(x, 8), m = vector_f32(x, 8), bad = vector_f32(y, 8), small = vector_f32(x, 7);
    obm_param weight = {"weight", 0, 1};
    obm_error err;
#define EXPECT(call, status, text)                                                         \
    do {                                                                                   \
        assert_int_equal(call, status);                                                    \
        if (!strstr(err.message, text)) fail_msg("`%s` is not in: %s", text, err.message); \
    } while (0)
    EXPECT(merge_with(ctx, "tie", &b, &m, 1, &weight, 1, &err), OBM_E_NOTFOUND, "did you mean \"ties\"?");
    EXPECT(merge_with(ctx, "ties", &b, &m, 1, &(obm_param){"densty", 0, 1}, 1, &err), OBM_E_NOTFOUND,
           "did you mean \"density\"?");
    EXPECT(merge_with(ctx, "ties", &b, &m, 1, NULL, 0, &err), OBM_E_ARG, "needs the parameter weight for model 0");
    EXPECT(merge_with(ctx, "ties", NULL, &m, 1, &weight, 1, &err), OBM_E_ARG, "needs a base");
    EXPECT(merge_with(ctx, "linear", &b, &m, 1, &weight, 1, &err), OBM_E_ARG, "has no base");
    EXPECT(merge_with(ctx, "linear", NULL, &m, 1, &(obm_param){"weight", 0, 0}, 1, &err), OBM_E_ARG, "sum to 0");
    EXPECT(merge_with(ctx, "ties", &b, &m, 0, &weight, 1, &err), OBM_E_ARG, "at least 1");
    EXPECT(merge_with(ctx, "ties", &b, &small, 1, &weight, 1, &err), OBM_E_SHAPE,
           "model 0: expected the shape (8) of the first tensor, found (7)");
    EXPECT(merge_with(ctx, "ties", &b, &bad, 1, &weight, 1, &err), OBM_E_VALUE, "NaN or Inf in model 0 at index 4");
    EXPECT(merge_with(ctx, "ties", &bad, &b, 1, &weight, 1, &err), OBM_E_VALUE, "NaN or Inf in the base at index 4");
    const obm_param dense[] = {weight, {"density", 0, 1.5}};
    EXPECT(merge_with(ctx, "ties", &b, &m, 1, dense, 2, &err), OBM_E_ARG,
           "density: expected a number in [0, 1], found 1.5");
    const obm_param half[] = {weight, {"normalize", -1, 0.5}};
    EXPECT(merge_with(ctx, "ties", &b, &m, 1, half, 2, &err), OBM_E_ARG, "normalize: expected true or false");
    const obm_param local[] = {weight, {"normalize", 0, 1}};
    EXPECT(merge_with(ctx, "ties", &b, &m, 1, local, 2, &err), OBM_E_ARG, "holds for the whole merge");
    EXPECT(merge_with(ctx, "ties", &b, &m, 1, &(obm_param){"weight", 1, 1}, 1, &err), OBM_E_ARG, "given for model 1");
    EXPECT(merge_with(ctx, "ties", &b, &m, 1, &(obm_param){"weight", 0, NAN}, 1, &err), OBM_E_ARG, "finite");
    float huge[8] = {3e38f}, low[8] = {-3e38f};
    obm_tensor top = vector_f32(huge, 8), bottom = vector_f32(low, 8);
    EXPECT(merge_with(ctx, "ties", &bottom, &top, 1, &weight, 1, &err), OBM_E_VALUE, "overflows");
    EXPECT(merge_with(ctx, "linear", NULL, (obm_tensor[]){top, top}, 2,
                      (obm_param[]){{"weight", -1, 1}, {"normalize", -1, 0}}, 2, &err),
           OBM_E_VALUE, "overflows the output");
    const obm_param t = {"t", -1, 0.5};
    EXPECT(merge_with(ctx, "slerp", NULL, &m, 1, &t, 1, &err), OBM_E_ARG, "slerp needs a base");
    EXPECT(merge_with(ctx, "slerp", &b, &m, 1, NULL, 0, &err), OBM_E_ARG, "slerp needs the parameter t");
    EXPECT(merge_with(ctx, "slerp", &b, (obm_tensor[]){m, m}, 2, &t, 1, &err), OBM_E_ARG,
           "slerp takes exactly 1 model besides the base, found 2");
    EXPECT(merge_with(ctx, "nuslerp", NULL, &m, 1, &weight, 1, &err), OBM_E_ARG,
           "nuslerp takes exactly 2 models, found 1");
    EXPECT(merge_with(ctx, "model_stock", &b, &m, 1, NULL, 0, &err), OBM_E_ARG, "at least 2 models besides the base");
    EXPECT(merge_with(ctx, "karcher", &b, &m, 1, NULL, 0, &err), OBM_E_ARG, "has no base");
    EXPECT(merge_with(ctx, "slerp", &bad, &b, 1, &t, 1, &err), OBM_E_VALUE, "NaN or Inf in the base at index 4");
    EXPECT(merge_with(ctx, "arcee_fusion", &b, &bad, 1, NULL, 0, &err), OBM_E_VALUE,
           "NaN or Inf in model 0 at index 4");
    EXPECT(merge_with(ctx, "model_stock", &b, (obm_tensor[]){bad, b}, 2, &(obm_param){"filter_wise", -1, 1}, 1, &err),
           OBM_E_VALUE, "NaN or Inf in model 0 at index 4");
    const obm_param narrow[] = {weight, {"density", 0, 0.1}};
    EXPECT(merge_with(ctx, "della", &b, &m, 1, narrow, 2, &err), OBM_E_ARG, "density - epsilon");
    const obm_param half_kept[] = {weight, {"density", 0, 0.5}};
    EXPECT(merge_with(ctx, "della", &b, &bad, 1, half_kept, 2, &err), OBM_E_VALUE, "NaN or Inf in model 0 at index 4");
    const obm_param balanced[] = {{"weight", 0, 1}, {"weight", 1, -1}};
    EXPECT(merge_with(ctx, "multislerp", &b, (obm_tensor[]){m, m}, 2, balanced, 2, &err), OBM_E_ARG, "sum to 0");
    m.dtype = OBM_I32;
    EXPECT(merge_with(ctx, "ties", &b, &m, 1, &weight, 1, &err), OBM_E_DTYPE, "found I32");
    obm_context_free(ctx);
}

/* ---- masks by rank, from the definition ---- */

static const float *by_magnitude;
static int compare_ranks(const void *a, const void *b) {
    uint32_t i = *(const uint32_t *)a, j = *(const uint32_t *)b;
    float x = fabsf(by_magnitude[i]), y = fabsf(by_magnitude[j]);
    return x != y ? (x > y) - (x < y) : (i > j) - (i < j);
}

/* Rows of values that differ, of few values, of one value, of many octaves, and of values with small neighbours. */
static float ranked_value(size_t row, size_t col) {
    float x = uniform() + 2, sign = rng() & 1 ? 1.0f : -1.0f;
    if (row == 1) x = (float)(rng() % 5 + 1);
    if (row == 2) x = 3;
    if (row == 3) x = ldexpf(x, -(int)(rng() % 60));
    if (row == 4) x = 2 + (float)(rng() % 64) * 0x1p-22f;
    if (row == 5) x = (float)(col + 1);
    return sign * x;
}

/* The last of several models is all that weighs; narrow: all is bf16. */
static void check_ranks(obm_context *ctx, size_t cols, size_t n_models, bool narrow) {
    enum { ROWS = 6, MODELS = 10 };
    const obm_kernels *k = obm_kernels_find("scalar");
    const size_t n = ROWS * cols;
    float *base = calloc(n, sizeof *base), *x = malloc(n * sizeof *x), *got = malloc(n * sizeof *got);
    uint16_t *half = malloc(n * sizeof *half);
    uint32_t *order = malloc(cols * sizeof *order);
    const double density = 0.4, epsilon = 0.3;
    rng_state = 3;
    for (size_t i = 0; i < n; i++) x[i] = ranked_value(i / cols, i % cols);
    if (narrow) {
        k->f32_to_bf16(half, x, n);
        k->bf16_to_f32(x, half, n);
    }
    obm_tensor b = vector_f32(base, n), m[MODELS];
    b.ndim = 2, b.shape[0] = ROWS, b.shape[1] = (int64_t)cols;
    if (narrow) b.dtype = OBM_BF16;
    for (size_t i = 0; i < n_models; i++) {
        m[i] = b;
        m[i].data = narrow ? (void *)half : (void *)x;
    }
    obm_param params[] = {{"weight", -1, 0},
                          {"weight", (int)n_models - 1, 1},
                          {"density", -1, density},
                          {"epsilon", -1, epsilon},
                          {"rescale", -1, 0}};
    obm_error err;
    if (obm_merge_tensors(ctx, "della", OBM_PROFILE_MERGEKIT, &b, m, n_models, params, 5, 77, got, &err) != OBM_OK)
        fail_msg("%s", err.message);
    uint64_t key = obm__random_key(77, "", n_models - 1);
    for (size_t row = 0; row < ROWS; row++) {
        by_magnitude = x + row * cols;
        for (size_t j = 0; j < cols; j++) order[j] = (uint32_t)j;
        qsort(order, cols, sizeof *order, compare_ranks);
        for (size_t rank = 0; rank < cols; rank++) {
            size_t i = row * cols + order[rank];
            double p = cols == 1 ? density : density - epsilon + 2 * epsilon * ((double)rank / (double)(cols - 1));
            bool stays = (double)obm__random_draw(key, i) * 0x1p-53 < p;
            if (got[i] != (stays ? x[i] : 0))
                fail_msg("%zu columns: row %zu, rank %zu: %a", cols, row, rank, (double)got[i]);
        }
    }
    free(base);
    free(x);
    free(got);
    free(half);
    free(order);
}

static void test_ranks(void **state) {
    (void)state;
    static const size_t lengths[] = {1, 2, 3, 64, 257, 4096, 20000};
    obm_context *ctx = new_context(2);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        check_ranks(ctx, lengths[i], 1, false);
        check_ranks(ctx, lengths[i], 2, true);
        if (lengths[i] < 300) check_ranks(ctx, lengths[i], 10, true);
    }
    obm_context_free(ctx);
}

/* bf16 from beginning to end takes one pass over the elements; floats for output take several, and round to the same.
 * Lengths: less than a vector, blocks with a rest, thresholds with many equal elements. */
static void check_one_pass(obm_context *ctx, const char *method, obm_profile profile, size_t n_models, size_t n) {
    const obm_kernels *k = obm_kernels_find("scalar");
    uint16_t *data = malloc(2 * n * (n_models + 1)), *got = malloc(2 * n), *expected = malloc(2 * n);
    float *wide = malloc(4 * n);
    obm_tensor t[6];
    for (size_t m = 0; m <= n_models; m++) {
        for (size_t i = 0; i < n; i++) {
            float x = uniform() * (m ? 0.01f : 0.1f), base = 0;
            if (m) k->bf16_to_f32(&base, data + i, 1), x = rng() % 4 ? base + x : base;
            k->f32_to_bf16(data + m * n + i, &x, 1);
        }
        t[m] = (obm_tensor){.data = data + m * n, .dtype = OBM_BF16, .ndim = 1, .shape = {(int64_t)n}};
    }
    const obm__method *method_row;
    obm_error err;
    assert_int_equal(obm__method_find(method, &method_row, &err), OBM_OK);
    obm_param params[] = {{"weight", -1, 0.7}, {"weight", 0, -0.4}, {"density", -1, 0.3}};
    obm__steps steps;
    assert_int_equal(obm__steps_new(method_row, profile, n_models, NULL, params,
                                    obm__method_param(method_row, "density") ? 3 : 2, 9, &steps, &err),
                     OBM_OK);
    obm__run run = {.ctx = ctx, .what = "merge"};
    obm__group g = {.name = "w",
                    .base = method_row->deltas ? t : NULL,
                    .models = t + 1,
                    .steps = &steps,
                    .work = OBM_BF16,
                    .count = n};
    assert_int_equal(obm__statistics(&run, &g, 1, &err), OBM_OK);
    assert_int_equal(obm__group_run(&run, &g, 0, n, OBM_BF16, got, &err), OBM_OK);
    assert_int_equal(obm__group_run(&run, &g, 0, n, OBM_F32, wide, &err), OBM_OK);
    k->f32_to_bf16(expected, wide, n);
    if (memcmp(got, expected, 2 * n))
        fail_msg("%s, %zu models, %zu elements: bf16 is not f32 rounded", method, n_models, n);
    obm__group_clear(&g);
    obm__steps_free(&steps);
    free(data);
    free(got);
    free(expected);
    free(wide);
}

static void test_one_pass(void **state) {
    (void)state;
    static const char *const methods[] = {"linear", "task_arithmetic",  "ties",        "dare_ties", "dare_linear",
                                          "della",  "breadcrumbs_ties", "della_linear"};
    obm_context *ctx = new_context(2);
    rng_state = 11;
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        for (size_t n_models = 1; n_models <= 5; n_models++)
            for (int paper = 0; paper < 2; paper++) {
                obm_profile profile = paper ? OBM_PROFILE_PAPER : OBM_PROFILE_MERGEKIT;
                check_one_pass(ctx, methods[i], profile, n_models, 7 + n_models);
                check_one_pass(ctx, methods[i], profile, n_models, 2 * OBM_MERGE_BLOCK + 77);
            }
    obm_context_free(ctx);
}

/* A merge may go on where the CPU has tiles, or has none: they multiply no merge's numbers. */
static void test_tiles_are_no_other_merge(void **state) {
    (void)state;
    obm_context *ctx = new_context(1);
    obm_kernels tiles = *ctx->k, another = *ctx->k;
    obm_merge_options again = OBM_INIT(obm_merge_options);
    char *root = fixture_folder(), *out = obm__path_join(root, "out");
    char *in = fixture_model(ctx, root, "in", &(fixture_tensor){"a", OBM_F32, 1, {3}, (float[]){1, 2, 3}, NULL}, 1);
    char *recipe = obm__format("{\"merge_method\":\"passthrough\",\"models\":[{\"model\":\"%s\"}]}", in);
    again.resume = true;
    tiles.isa = "amx";
    ctx->k = &tiles;
    OK(obm_merge(ctx, recipe, NULL, out, NULL, err));
    tiles.isa = "avx512";
    OK(obm_merge(ctx, recipe, &again, out, NULL, err));
    another.isa = "another";
    ctx->k = &another;
    FAILS(obm_merge(ctx, recipe, &again, out, NULL, err), OBM_E_MISMATCH, "kernels differs");
    fixture_remove(root);
    obm_free(recipe);
    obm_free(in);
    obm_free(out);
    obm_free(root);
    obm_context_free(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tiles_are_no_other_merge),
        cmocka_unit_test(test_vectors),
        cmocka_unit_test(test_vector_coverage),
        cmocka_unit_test(test_golden),
        cmocka_unit_test(test_model_scope),
        cmocka_unit_test(test_spans),
        cmocka_unit_test(test_threads_agree),
        cmocka_unit_test(test_dare_mask),
        cmocka_unit_test(test_dare_values),
        cmocka_unit_test(test_half_deltas_are_rounded),
        cmocka_unit_test(test_ranks),
        cmocka_unit_test(test_one_pass),
        cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests_name("merge", tests, NULL, NULL);
}
