/* The router: L-BFGS, the regression against plain gradient descent, the report, and training on a pack end to end. */
#include "delta_fixture.h"

#include "model/model.h"
#include "route/lbfgs.h"
#include "route/regression.h"
#include "route/router.h"

/* ---- L-BFGS ---- */

static double quadratic(void *arg, const double *x, double *g) {
    double sum = 0;
    (void)arg;
    for (int i = 0; i < 20; i++) {
        double scale = pow(10, i / 5.0), off = x[i] - i;
        g[i] = scale * off;
        sum += 0.5 * scale * off * off;
    }
    return sum;
}

static double rosenbrock(void *arg, const double *x, double *g) {
    double a = 1 - x[0], b = x[1] - x[0] * x[0];
    (void)arg;
    g[0] = -2 * a - 400 * x[0] * b;
    g[1] = 200 * b;
    return a * a + 100 * b * b;
}

static double nowhere(void *arg, const double *x, double *g) {
    (void)arg;
    g[0] = x[0];
    return NAN;
}

static int stop_at_three(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)what;
    (void)total;
    ++*(int *)user;
    return done >= 3;
}

static void test_lbfgs(void **state) {
    (void)state;
    obm__lbfgs s = {.objective = quadratic, .n = 20, .history = 5, .max_iterations = 2000, .tolerance = 1e-9};
    obm__lbfgs_result result;
    double x[20] = {0}, y[2] = {-1.2, 1};
    OK(obm__lbfgs_run(&s, x, &result, err));
    assert_true(result.converged);
    for (int i = 0; i < 20; i++) assert_true(fabs(x[i] - i) <= 1e-8);
    s.objective = rosenbrock;
    s.n = 2;
    OK(obm__lbfgs_run(&s, y, &result, err));
    assert_true(result.converged && fabs(y[0] - 1) <= 1e-7 && fabs(y[1] - 1) <= 1e-7);
    s.max_iterations = 2;
    y[0] = -1.2;
    OK(obm__lbfgs_run(&s, y, &result, err));
    assert_true(!result.converged && result.iterations == 2);
}

static void test_lbfgs_failures(void **state) {
    (void)state;
    int calls = 0;
    double x[2] = {-1.2, 1};
    obm__lbfgs s = {.objective = rosenbrock,
                    .n = 2,
                    .history = 5,
                    .max_iterations = 200,
                    .tolerance = 0,
                    .progress = stop_at_three,
                    .progress_user = &calls};
    FAILS(obm__lbfgs_run(&s, x, NULL, err), OBM_E_USER, "stopped");
    assert_int_equal(calls, 4);
    assert_true(x[0] == -1.2 && x[1] == 1);
    s.objective = nowhere;
    FAILS(obm__lbfgs_run(&s, x, NULL, err), OBM_E_VALUE, "nan");
    s.history = 0;
    FAILS(obm__lbfgs_run(&s, x, NULL, err), OBM_E_ARG, "history");
}

/* ---- the regression ---- */

enum { N = 60, WIDTH = 5, TASKS = 3 };

typedef struct data {
    float x[N * WIDTH];
    uint32_t label[N], use[N];
    obm__examples e;
} data;

/* shift: how far the tasks lie apart; one feature is constant. */
static void fill(data *d, float shift) {
    uint64_t seed = 11;
    for (uint32_t i = 0; i < N; i++) {
        d->use[i] = i;
        d->label[i] = i % 7 == 0 ? 2 : i % 2;
        for (int k = 0; k < WIDTH; k++) d->x[i * WIDTH + (uint32_t)k] = fixture_random(&seed) * (float)(k + 1) + 3;
        d->x[i * WIDTH + d->label[i]] += shift;
        d->x[i * WIDTH + 4] = 0.7f;
    }
    d->e = (obm__examples){d->x, d->label, d->use, N, WIDTH, TASKS};
}

static void fit(obm_context *ctx, const data *d, double l2, float *mean, float *scale, float *weight, float *bias) {
    obm__regression_options o = {.l2 = l2};
    obm__standardise(&d->e, mean, scale);
    OK(obm__regression_fit(ctx, &d->e, mean, scale, &o, weight, bias, err));
}

static void reference_standardise(const data *d, double z[N][WIDTH]) {
    for (int k = 0; k < WIDTH; k++) {
        double mean = 0, variance = 0;
        for (int i = 0; i < N; i++) mean += d->x[i * WIDTH + k] / (double)N;
        for (int i = 0; i < N; i++) variance += pow(d->x[i * WIDTH + k] - mean, 2) / N;
        for (int i = 0; i < N; i++) z[i][k] = variance > 1e-12 ? (d->x[i * WIDTH + k] - mean) / sqrt(variance) : 0;
    }
}

/* Plain gradient descent, until it does not move any more. */
static void reference_fit(const data *d, double l2, double w[TASKS][WIDTH], double b[TASKS]) {
    static double z[N][WIDTH];
    reference_standardise(d, z);
    for (int step = 0; step < 20000; step++) {
        double gw[TASKS][WIDTH] = {{0}}, gb[TASKS] = {0};
        for (int i = 0; i < N; i++) {
            double p[TASKS], sum = 0;
            for (int t = 0; t < TASKS; t++) {
                p[t] = b[t];
                for (int k = 0; k < WIDTH; k++) p[t] += w[t][k] * z[i][k];
                sum += p[t] = exp(p[t]);
            }
            for (int t = 0; t < TASKS; t++) {
                double error = p[t] / sum - (d->label[i] == (uint32_t)t);
                gb[t] += error / N;
                for (int k = 0; k < WIDTH; k++) gw[t][k] += error * z[i][k] / N;
            }
        }
        for (int t = 0; t < TASKS; t++) {
            b[t] -= 0.5 * gb[t];
            for (int k = 0; k < WIDTH; k++) w[t][k] -= 0.5 * (gw[t][k] + l2 * w[t][k]);
        }
    }
}

static void test_regression_against_descent(void **state) {
    (void)state;
    obm_context *ctx = fixture_context(2);
    static const float shifts[] = {0, 1, 30}; /* inseparable, in between, separable */
    static const double l2s[] = {1e-2, 1e-2, 0.1};
    for (int s = 0; s < 3; s++) {
        data d;
        float mean[WIDTH], scale[WIDTH], weight[TASKS * WIDTH], bias[TASKS];
        double w[TASKS][WIDTH] = {{0}}, b[TASKS] = {0};
        fill(&d, shifts[s]);
        fit(ctx, &d, l2s[s], mean, scale, weight, bias);
        reference_fit(&d, l2s[s], w, b);
        assert_true(scale[4] == 0);
        for (int t = 0; t < TASKS; t++) {
            assert_true(fabs(bias[t] - b[t]) <= 1e-4);
            for (int k = 0; k < WIDTH; k++) assert_true(fabs(weight[t * WIDTH + k] - w[t][k]) <= 1e-4);
        }
    }
    obm_context_free(ctx);
}

/* Features that say nothing: the probabilities are the shares of the tasks. */
static void test_regression_of_constants(void **state) {
    (void)state;
    obm_context *ctx = fixture_context(1);
    data d;
    float mean[WIDTH], scale[WIDTH], weight[TASKS * WIDTH], bias[TASKS];
    double p[TASKS], count[TASKS] = {0};
    fill(&d, 0);
    for (int i = 0; i < N * WIDTH; i++) d.x[i] = 1.5f;
    for (int i = 0; i < N; i++) count[d.label[i]]++;
    fit(ctx, &d, 1e-2, mean, scale, weight, bias);
    obm__regression_apply(d.x, WIDTH, TASKS, mean, scale, weight, bias, p);
    for (int t = 0; t < TASKS; t++) assert_true(fabs(p[t] - count[t] / N) <= 1e-6);
    obm_context_free(ctx);
}

static void test_regression_threads(void **state) {
    (void)state;
    static const int threads[] = {1, 2, 5};
    float first[TASKS * WIDTH], first_bias[TASKS];
    for (int i = 0; i < 3; i++) {
        obm_context *ctx = fixture_context(threads[i]);
        data d;
        float mean[WIDTH], scale[WIDTH], weight[TASKS * WIDTH], bias[TASKS];
        fill(&d, 1);
        fit(ctx, &d, 1e-2, mean, scale, weight, bias);
        if (i == 0) memcpy(first, weight, sizeof first), memcpy(first_bias, bias, sizeof bias);
        assert_memory_equal(weight, first, sizeof first);
        assert_memory_equal(bias, first_bias, sizeof bias);
        obm_context_free(ctx);
    }
}

static void test_regression_of_nonfinite(void **state) {
    (void)state;
    obm_context *ctx = fixture_context(2);
    static const float wrong[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        data d;
        float mean[WIDTH], scale[WIDTH], weight[TASKS * WIDTH], bias[TASKS];
        obm__regression_options o = {.l2 = 1e-2};
        fill(&d, 1);
        d.x[7 * WIDTH + 2] = wrong[i];
        obm__standardise(&d.e, mean, scale);
        FAILS(obm__regression_fit(ctx, &d.e, mean, scale, &o, weight, bias, err), OBM_E_VALUE, "nan");
    }
    obm_context_free(ctx);
}

/* ---- split and report ---- */

static void check_split(const uint32_t *label, size_t n, double holdout, uint64_t seed) {
    obm__holdout s, again;
    obm__holdout_options o = {holdout, seed};
    int seen[256] = {0}, sides[TASKS][2] = {{0}}, count[TASKS] = {0};
    OK(obm__holdout_new(label, n, TASKS, &o, &s, err));
    assert_int_equal(s.n_train + s.n_held, n);
    for (size_t i = 0; i < s.n_train; i++) seen[s.train[i]]++, sides[label[s.train[i]]][0]++;
    for (size_t i = 0; i < s.n_held; i++) seen[s.held[i]]++, sides[label[s.held[i]]][1]++;
    for (size_t i = 0; i < n; i++) assert_int_equal(seen[i], 1);
    for (size_t i = 0; i < n; i++) count[label[i]]++;
    for (int t = 0; t < TASKS; t++) {
        assert_true(sides[t][0] >= 1 && sides[t][1] >= 1);
        assert_true(fabs(sides[t][1] - holdout * count[t]) <= 1);
    }
    OK(obm__holdout_new(label, n, TASKS, &o, &again, err));
    assert_memory_equal(s.train, again.train, s.n_train * sizeof *s.train);
    obm__holdout_clear(&again);
    obm__holdout_clear(&s);
}

static void test_split(void **state) {
    (void)state;
    uint32_t label[200];
    for (uint32_t i = 0; i < 200; i++) label[i] = i < 2 ? 2 : i % 2;
    check_split(label, 200, 0.2, 0);
    check_split(label, 200, 0.5, 9);
    check_split(label, 200, 0.01, 9);
    obm__holdout a, b;
    OK(obm__holdout_new(label, 200, TASKS, &(obm__holdout_options){0.2, 1}, &a, err));
    OK(obm__holdout_new(label, 200, TASKS, &(obm__holdout_options){0.2, 2}, &b, err));
    assert_memory_not_equal(a.held, b.held, a.n_held * sizeof *a.held);
    obm__holdout_clear(&a);
    obm__holdout_clear(&b);
}

/* One feature x, two tasks, p(1) = 1 / (1 + exp(-x)): confidences and answers are known. */
static void test_report_by_hand(void **state) {
    (void)state;
    float mean[] = {0}, scale[] = {1}, weight[] = {0, 1}, bias[] = {0, 0};
    obm__router r = {.width = 1, .tasks = 2, .mean = mean, .scale = scale, .weight = weight, .bias = bias};
    static const double p[] = {0.55, 0.58, 0.95, 0.97, 0.30, 0.02};
    static const uint32_t label[] = {1, 0, 1, 1, 1, 0};
    float x[6];
    uint32_t held[] = {0, 1, 2, 3, 4, 5};
    for (int i = 0; i < 6; i++) x[i] = (float)log(p[i] / (1 - p[i]));
    obm__holdout s = {.held = held, .n_held = 6};
    obm_router_report report;
    obm__router_measure(&r, x, label, &s, &report);
    assert_true(fabs(report.accuracy - 4.0 / 6) <= 1e-12);
    assert_int_equal(report.confusion[0][0], 1);
    assert_int_equal(report.confusion[0][1], 1);
    assert_int_equal(report.confusion[1][0], 1);
    assert_int_equal(report.confusion[1][1], 3);
    /* bins 0.5-0.6: 1 of 2 right at 1.13; 0.7-0.8: 0 of 1 at 0.70; 0.9-1: 3 of 3 at 0.95 + 0.97 + 0.98 */
    double expected = (fabs(1 - 1.13) + fabs(0 - 0.70) + fabs(3 - 2.90)) / 6;
    assert_true(fabs(report.calibration_error - expected) <= 1e-6);
}

/* ---- end to end ---- */

#define TOKENIZER OBM_SOURCE_DIR "/tests/vectors/tokenizers/gpt2.json"
enum { HIDDEN = 16 };

typedef struct family {
    obm_context *ctx;
    char *dir, *base, *pack_path;
    obm_pack *pack;
} family;

static char *write_model(family *f, const char *name, int64_t vocab, uint64_t seed) {
    const fixture_tensor t[] = {
        {"model.embed_tokens.weight", OBM_F32, 2, {vocab, HIDDEN}, fixture_values((size_t)vocab * HIDDEN, 1), NULL},
        {"model.layers.0.input_layernorm.weight", OBM_F32, 1, {HIDDEN}, fixture_values(HIDDEN, 2), NULL},
        {"model.layers.0.mlp.down_proj.weight", OBM_F32, 2, {HIDDEN, 8}, fixture_values(HIDDEN * 8, seed), NULL},
        {"model.layers.0.mlp.gate_proj.weight", OBM_F32, 2, {8, HIDDEN}, fixture_values(HIDDEN * 8, seed + 1), NULL},
        {"model.layers.0.mlp.up_proj.weight", OBM_F32, 2, {8, HIDDEN}, fixture_values(HIDDEN * 8, seed + 2), NULL},
        {"model.layers.0.post_attention_layernorm.weight", OBM_F32, 1, {HIDDEN}, fixture_values(HIDDEN, 3), NULL},
        {"model.layers.0.self_attn.k_proj.weight",
         OBM_F32,
         2,
         {HIDDEN, HIDDEN},
         fixture_values(HIDDEN * HIDDEN, 4),
         NULL},
        {"model.layers.0.self_attn.o_proj.weight",
         OBM_F32,
         2,
         {HIDDEN, HIDDEN},
         fixture_values(HIDDEN * HIDDEN, 5),
         NULL},
        {"model.layers.0.self_attn.q_proj.weight",
         OBM_F32,
         2,
         {HIDDEN, HIDDEN},
         fixture_values(HIDDEN * HIDDEN, 6),
         NULL},
        {"model.layers.0.self_attn.v_proj.weight",
         OBM_F32,
         2,
         {HIDDEN, HIDDEN},
         fixture_values(HIDDEN * HIDDEN, seed + 3),
         NULL},
        {"model.norm.weight", OBM_F32, 1, {HIDDEN}, fixture_values(HIDDEN, 7), NULL},
    };
    size_t n = sizeof t / sizeof *t;
    char *path = fixture_model(f->ctx, f->dir, name, t, n);
    for (size_t i = 0; i < n; i++) obm_free((void *)t[i].values);
    char *text = obm__format(
        "{\"model_type\": \"llama\", \"hidden_size\": %d, \"intermediate_size\": 8, \"num_hidden_layers\": 1, "
        "\"num_attention_heads\": 2, \"vocab_size\": %lld, \"rms_norm_eps\": 1e-5, \"hidden_act\": \"silu\", "
        "\"max_position_embeddings\": 2048, \"tie_word_embeddings\": true}",
        HIDDEN, (long long)vocab);
    char *config = obm__path_join(path, "config.json"), *copy = obm__path_join(path, "tokenizer.json"), *json;
    size_t size;
    OK(obm__file_write(config, text, strlen(text), err));
    OK(obm__file_read(TOKENIZER, &json, &size, err));
    OK(obm__file_write(copy, json, size, err));
    obm_free(text), obm_free(config), obm_free(copy), obm_free(json);
    return path;
}

static family family_new(void) {
    family f = {.ctx = fixture_context(2), .dir = fixture_folder()};
    obm_tokenizer *t;
    OK(obm_tokenizer_open(f.ctx, TOKENIZER, &t, err));
    int64_t vocab = (int64_t)obm_tokenizer_size(t);
    obm_tokenizer_free(t);
    f.base = write_model(&f, "base", vocab, 100);
    char *chat = write_model(&f, "chat", vocab, 200), *math = write_model(&f, "math", vocab, 300);
    obm_expert experts[2] = {OBM_INIT(obm_expert), OBM_INIT(obm_expert)};
    experts[0].name = "chat", experts[0].path = chat;
    experts[1].name = "math", experts[1].path = math;
    f.pack_path = obm__path_join(f.dir, "my.pack");
    OK(obm_compress(f.ctx, f.base, experts, 2, NULL, f.pack_path, NULL, &f.pack, err));
    obm_free(chat), obm_free(math);
    return f;
}

static void family_free(family *f) {
    obm_pack_free(f->pack);
    obm_context_free(f->ctx);
    fixture_remove(f->dir);
    obm_free(f->dir), obm_free(f->base), obm_free(f->pack_path);
}

/* Greetings against sums: words tell them apart. */
enum { EXAMPLES = 60 };
typedef struct corpus {
    obm_prompt prompts[EXAMPLES];
    const char *task[EXAMPLES];
    char text[EXAMPLES][64];
} corpus;
static void fill_corpus(corpus *c) {
    static const char *const words[] = {"hello", "friend", "please", "thanks", "morning", "tell me"};
    memset(c, 0, sizeof *c);
    for (int i = 0; i < EXAMPLES; i++) {
        if (i % 2)
            snprintf(c->text[i], 64, "%d + %d * %d = ?", i * 7, i + 31, 90 - i);
        else
            snprintf(c->text[i], 64, "%s, %s the %s", words[i % 6], words[i / 2 % 6], words[(i + 3) % 5]);
        c->prompts[i].text = c->text[i];
        c->task[i] = i % 2 ? "math" : "chat";
    }
}

static void test_train_and_reopen(void **state) {
    (void)state;
    family f = family_new();
    static corpus c;
    static obm_router_report report, stored;
    fill_corpus(&c);
    FAILS(obm_pack_router_report(f.pack, &stored, err), OBM_E_NOTFOUND, "no router");
    for (int layer = 0; layer < 2; layer++) {
        obm_router_options o = OBM_INIT(obm_router_options);
        o.layer = layer;
        OK(obm_router_train(f.pack, c.prompts, c.task, EXAMPLES, &o, &report, err));
        assert_int_equal(report.n_held_out, 12);
        assert_int_equal(report.n_train, 48);
        assert_int_equal(report.layer, layer);
        assert_true(report.accuracy >= 0.9);
    }
    obm_pack *again;
    OK(obm_pack_open(f.ctx, f.pack_path, NULL, &again, err));
    OK(obm_pack_router_report(again, &stored, err));
    assert_memory_equal(&stored, &report, sizeof report);
    assert_memory_equal(again->router->weight, f.pack->router->weight, 2 * HIDDEN * sizeof(float));
    OK(obm_pack_verify(again, NULL, NULL, err));
    OK(obm_pack_remove(again, "chat", err)); /* another set of tasks: the router goes */
    FAILS(obm_pack_router_report(again, &stored, err), OBM_E_NOTFOUND, "no router");
    obm_pack_free(again);
    family_free(&f);
}

static void test_train_refusals(void **state) {
    (void)state;
    family f = family_new();
    static corpus c;
    fill_corpus(&c);
    obm_router_options o = OBM_INIT(obm_router_options);
    const char *wrong[] = {"chat", "law", "math", "chat"}, *one[] = {"chat", "chat", "chat", "math"};
    FAILS(obm_router_train(f.pack, c.prompts, wrong, 4, NULL, NULL, err), OBM_E_NOTFOUND, "law");
    FAILS(obm_router_train(f.pack, c.prompts, one, 4, NULL, NULL, err), OBM_E_ARG, "task math has 1 example");
    o.holdout = 1;
    FAILS(obm_router_train(f.pack, c.prompts, c.task, EXAMPLES, &o, NULL, err), OBM_E_ARG, "holdout");
    o.holdout = 0, o.l2 = -1;
    FAILS(obm_router_train(f.pack, c.prompts, c.task, EXAMPLES, &o, NULL, err), OBM_E_ARG, "l2");
    o.l2 = 0, o.layer = 2;
    FAILS(obm_router_train(f.pack, c.prompts, c.task, EXAMPLES, &o, NULL, err), OBM_E_ARG, "layer");
    int calls = 0;
    o.layer = 0, o.progress = stop_at_three, o.progress_user = &calls;
    FAILS(obm_router_train(f.pack, c.prompts, c.task, EXAMPLES, &o, NULL, err), OBM_E_USER, "");
    assert_null(f.pack->router);
    family_free(&f);
}

/* ---- requests ---- */

typedef struct seen {
    char text[128];
    size_t n_ids;
    double builtin[2];
    float feature;
    obm_status fail;
    double answer[2];
} seen;

static obm_status ask(void *user, obm_request *r, double *weights, obm_error *err) {
    seen *s = user;
    const int32_t *ids;
    const float *features, *again;
    const double *p;
    size_t n;
    snprintf(s->text, sizeof s->text, "%s", obm_request_text(r));
    obm_request_tokens(r, &ids, &s->n_ids);
    if (s->fail) {
        if (s->fail == OBM_E_USER) return s->fail;
        err->code = s->fail;
        snprintf(err->message, sizeof err->message, "own words");
        return s->fail;
    }
    OBM_TRY(obm_request_features(r, 1, &features, &n, err));
    OBM_TRY(obm_request_features(r, 1, &again, &n, err));
    if (again != features || n != HIDDEN || obm_request_task_count(r) != 2) return OBM_E_VALUE;
    s->feature = features[3];
    if (obm_request_builtin(r, &p, err) == OBM_OK) memcpy(s->builtin, p, sizeof s->builtin);
    memcpy(weights, s->answer, sizeof s->answer);
    return OBM_OK;
}

static void check_routes(obm_model *m, const corpus *c) {
    int right = 0;
    for (int i = 0; i < EXAMPLES; i++) {
        double weights[2], p[2];
        OK(obm_model_route(m, &c->prompts[i], NULL, NULL, weights, p, err));
        assert_true(fabs(p[0] + p[1] - 1) <= 1e-12);
        assert_true(weights[p[1] > p[0]] == 1 && weights[p[1] <= p[0]] == 0);
        right += weights[i % 2] == 1;
    }
    assert_true(right >= EXAMPLES * 9 / 10);
}

static void check_callbacks(obm_model *m) {
    seen s = {.answer = {0.25, 2}};
    obm_message turns[] = {{"system", "be kind"}, {"user", "hello"}, {"assistant", "yes?"}, {"user", "1 + 1"}};
    obm_prompt prompt = {.messages = turns, .n_messages = 4}, text = {.text = "hello\n1 + 1"};
    double weights[2] = {7, 7}, p[2];
    float x[HIDDEN];
    OK(obm_model_route(m, &prompt, ask, &s, weights, p, err));
    assert_string_equal(s.text, "hello\n1 + 1");
    assert_true(weights[0] == 0.25 && weights[1] == 2 && p[0] == s.builtin[0] && p[1] == s.builtin[1]);
    OK(obm_model_embed(m, &text, 1, 1, NULL, NULL, x, err));
    assert_true(x[3] == s.feature);
    s.fail = OBM_E_USER;
    weights[0] = 7;
    FAILS(obm_model_route(m, &prompt, ask, &s, weights, NULL, err), OBM_E_USER, "USER");
    s.fail = OBM_E_IO;
    FAILS(obm_model_route(m, &prompt, ask, &s, weights, NULL, err), OBM_E_IO, "own words");
    s.fail = OBM_OK;
    s.answer[1] = -0.5;
    FAILS(obm_model_route(m, &prompt, ask, &s, weights, NULL, err), OBM_E_ARG, "math");
    s.answer[1] = INFINITY;
    FAILS(obm_model_route(m, &prompt, ask, &s, weights, NULL, err), OBM_E_ARG, "math");
    s.answer[0] = NAN;
    FAILS(obm_model_route(m, &prompt, ask, &s, weights, NULL, err), OBM_E_ARG, "the weight of task chat is nan");
    assert_true(weights[0] == 7);
}

/* A router in memory whose numbers are spoiled: what it answers is an error, and no route. */
static void check_spoiled_router(const family *f, obm_model *m, const obm_prompt *prompt) {
    obm__router *r = f->pack->router;
    float *const places[] = {&r->weight[3], &r->weight[HIDDEN + 3], &r->mean[3], &r->scale[3], &r->bias[0], &r->bias[1]};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        double weights[2] = {7, 7}, p[2] = {7, 7};
        float kept = *places[i];
        *places[i] = NAN;
        FAILS(obm_model_route(m, prompt, NULL, NULL, weights, p, err), OBM_E_VALUE, "not finite");
        assert_true(weights[0] == 7 && weights[1] == 7 && p[0] == 7);
        *places[i] = kept;
    }
}

/* Every number of a file becomes NaN (behind an open mapping as well). */
static void spoil_file(const char *dir, const char *name) {
    char *path = obm__path_join(dir, name);
    FILE *file = fopen(path, "r+b");
    uint64_t header;
    assert_non_null(file);
    assert_int_equal(fread(&header, 8, 1, file), 1);
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    long end = ftell(file);
    assert_int_equal(fseek(file, (long)header + 8, SEEK_SET), 0);
    for (long at = (long)header + 8; at < end; at++) fputc(0xff, file);
    assert_int_equal(fclose(file), 0);
    obm_free(path);
}

static void test_nonfinite(void **state) {
    (void)state;
    family f = family_new();
    static corpus c;
    obm_model *m;
    double weights[2] = {7, 7};
    fill_corpus(&c);
    OK(obm_router_train(f.pack, c.prompts, c.task, EXAMPLES, NULL, NULL, err));
    OK(obm_model_from_pack(f.ctx, f.pack, NULL, &m, err));
    check_spoiled_router(&f, m, &c.prompts[0]);
    OK(obm_model_route(m, &c.prompts[0], NULL, NULL, weights, NULL, err));
    obm_model_free(m);
    spoil_file(f.base, "model.safetensors");
    OK(obm_model_from_pack(f.ctx, f.pack, NULL, &m, err));
    weights[0] = 7;
    FAILS(obm_model_route(m, &c.prompts[0], NULL, NULL, weights, NULL, err), OBM_E_VALUE, "not finite");
    assert_true(weights[0] == 7);
    obm_model_free(m);
    const obm__router *before = f.pack->router;
    FAILS(obm_router_train(f.pack, c.prompts, c.task, EXAMPLES, NULL, NULL, err), OBM_E_VALUE,
          "router: example 0: the base's hidden states are not finite");
    assert_ptr_equal(f.pack->router, before);
    family_free(&f);
}

static void test_stored_router_of_nonfinite(void **state) {
    (void)state;
    family f = family_new();
    static corpus c;
    obm_pack *again;
    fill_corpus(&c);
    OK(obm_router_train(f.pack, c.prompts, c.task, EXAMPLES, NULL, NULL, err));
    const char *name = obm__json_string(obm__json_get(obm__json_get(f.pack->manifest, "router"), "file"));
    spoil_file(f.pack_path, name);
    FAILS(obm_pack_open(f.ctx, f.pack_path, NULL, &again, err), OBM_E_FORMAT, "expected finite numbers");
    family_free(&f);
}

static void check_prompts(obm_model *m) {
    seen s = {.answer = {1, 0}};
    double weights[2];
    char *longer = obm__calloc(4001, 1);
    for (int i = 0; i < 4000; i++) longer[i] = " 1+x"[i % 4];
    obm_prompt long_text = {.text = longer}, empty = {.text = ""}, ids = {0};
    int32_t *encoded;
    size_t n;
    OK(obm_model_route(m, &long_text, ask, &s, weights, NULL, err));
    assert_int_equal(s.n_ids, OBM_ROUTER_TOKENS);
    OK(obm_model_route(m, &empty, ask, &s, weights, NULL, err));
    assert_int_equal(s.n_ids, 0);
    assert_true(s.feature == 0);
    OK(obm_tokenizer_encode(obm_model_tokenizer(m), "3 * 4", 5, false, &encoded, &n, err));
    ids.ids = encoded, ids.n_ids = n;
    OK(obm_model_route(m, &ids, ask, &s, weights, NULL, err));
    assert_string_equal(s.text, "3 * 4");
    obm_free(encoded), obm_free(longer);
}

static void test_requests(void **state) {
    (void)state;
    family f = family_new();
    static corpus c;
    obm_model *m;
    double weights[2], p[2];
    seen s = {.answer = {1, 0}};
    fill_corpus(&c);
    OK(obm_model_from_pack(f.ctx, f.pack, NULL, &m, err));
    FAILS(obm_model_route(m, &c.prompts[0], NULL, NULL, weights, p, err), OBM_E_NOTFOUND, "no router");
    OK(obm_model_route(m, &c.prompts[0], ask, &s, weights, p, err));
    assert_true(weights[0] == 1 && isnan(p[0]) && isnan(p[1]));
    OK(obm_router_train(f.pack, c.prompts, c.task, EXAMPLES, NULL, NULL, err));
    check_routes(m, &c);
    check_callbacks(m);
    check_prompts(m);
    obm_model_free(m);
    OK(obm_model_open(f.ctx, f.base, NULL, &m, err));
    FAILS(obm_model_route(m, &c.prompts[0], NULL, NULL, weights, p, err), OBM_E_ARG, "plain model");
    obm_model_free(m);
    family_free(&f);
}

/* A route in the pack, materialised, and its exported folder are one model. */
static void test_exported_route_runs_the_same(void **state) {
    (void)state;
    family f = family_new();
    char *out = obm__path_join(f.dir, "out");
    static const double routes[][2] = {{1, 0}, {0, 1}, {0.25, 0.5}, {0, 0}};
    static const int32_t ids[] = {5, 80, 200, 7, 7, 31};
    obm_model *pack, *dense;
    obm_model_options materialised = OBM_INIT(obm_model_options);
    materialised.materialise = true;
    OK(obm_model_from_pack(f.ctx, f.pack, &materialised, &pack, err));
    obm_model_info info;
    obm_model_describe(pack, &info);
    float *a = obm__alloc((size_t)info.vocab, sizeof *a), *b = obm__alloc((size_t)info.vocab, sizeof *b);
    for (int i = 0; i < 4; i++) {
        obm_export_options o = OBM_INIT(obm_export_options);
        obm_run_options run = OBM_INIT(obm_run_options);
        o.overwrite = true;
        run.route = routes[i];
        OK(obm_pack_export(f.pack, routes[i], &o, out, NULL, err));
        OK(obm_model_open(f.ctx, out, NULL, &dense, err));
        OK(obm_model_logits(pack, ids, 6, &run, a, err));
        OK(obm_model_logits(dense, ids, 6, NULL, b, err));
        assert_memory_equal(a, b, (size_t)info.vocab * sizeof *a);
        obm_model_free(dense);
    }
    obm_free(a), obm_free(b), obm_free(out);
    obm_model_free(pack);
    family_free(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lbfgs),
        cmocka_unit_test(test_lbfgs_failures),
        cmocka_unit_test(test_regression_against_descent),
        cmocka_unit_test(test_regression_of_constants),
        cmocka_unit_test(test_regression_of_nonfinite),
        cmocka_unit_test(test_regression_threads),
        cmocka_unit_test(test_split),
        cmocka_unit_test(test_report_by_hand),
        cmocka_unit_test(test_train_and_reopen),
        cmocka_unit_test(test_train_refusals),
        cmocka_unit_test(test_requests),
        cmocka_unit_test(test_nonfinite),
        cmocka_unit_test(test_stored_router_of_nonfinite),
        cmocka_unit_test(test_exported_route_runs_the_same),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
