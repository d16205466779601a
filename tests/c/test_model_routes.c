/* Models that run packs: weights under routes, their cache, mixed batches, extra vocabulary, routers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "model/model.h"
#include "tiny_model.h"

#include <dirent.h>

#define T 70
#define VOCAB 450   /* of the tokenizer */
#define TASKS 3

static void check_ok(obm_status status, const obm_error *err) {
    if (status != OBM_OK) fail_msg("%s: %s", obm_status_name(status), err->message);
}

/* A pack of three experts: `chat` moves every weight, `math` one weight in 50 (tiny alphas), `code` has more
 * vocabulary. */
typedef struct fixture {
    tiny c;
    tiny_weights base;
    char *dir[TASKS + 1], *pack_dir;
    obm_context *ctx;
    obm_pack *pack;
    int32_t ids[T];
} fixture;

#define EXTRA 3
static const char *const names[TASKS] = {"chat", "math", "code"};

static bool is_vocabulary(const tiny_tensor *t) {
    return strstr(t->name, "embed_tokens") || strstr(t->name, "lm_head");
}

static void write_expert(fixture *f, int task) {
    tiny c = f->c;
    tiny_weights w;
    obm_error err;
    unsigned state = 1000 + (unsigned)task;
    tiny_weights_new(&c, &w);
    if (task == 2) c.vocab += EXTRA;
    for (int i = 0; i < w.n; i++) {
        tiny_tensor *t = &w.t[i];
        size_t count = (size_t)(t->rows ? t->rows : 1) * (size_t)t->cols;
        for (size_t j = 0; j < count; j++)
            if (task != 1 || tiny_random(&state) % 50 == 0)
                t->data[j] += (float)((int)(tiny_random(&state) % 3) - 1) / 64.0f;
        if (task != 2 || !is_vocabulary(t)) continue;
        size_t more = (size_t)EXTRA * (size_t)t->cols;
        t->data = realloc(t->data, (count + more) * sizeof *t->data);
        for (size_t j = 0; j < more; j++) t->data[count + j] = (float)((int)(tiny_random(&state) % 41) - 20) / 64.0f;
        t->rows += EXTRA;
    }
    f->dir[task + 1] = tiny_folder();
    if (tiny_write(&c, &w, f->dir[task + 1], &err)) fail_msg("%s", err.message);
    tiny_weights_free(&w);
}

static void open_fixture(fixture *f, obm_dtype dtype, int tied) {
    obm_error err;
    obm_context_options options = OBM_INIT(obm_context_options);
    obm_expert experts[TASKS];
    f->c = (tiny){"llama", VOCAB, 30, 45, 2, 6, 2, 10, 0, tied, dtype, 2, NULL};
    tiny_weights_new(&f->c, &f->base);
    f->dir[0] = tiny_folder();
    if (tiny_write(&f->c, &f->base, f->dir[0], &err)) fail_msg("%s", err.message);
    char *tokenizer;
    size_t size;
    check_ok(obm__file_read(OBM_SOURCE_DIR "/tests/vectors/tokenizers/smollm2.json", &tokenizer, &size, &err), &err);
    assert_int_equal(tiny_write_text(f->dir[0], "tokenizer.json", tokenizer), 0);
    obm_free(tokenizer);
    options.threads = 2;
    check_ok(obm_context_new(&options, &f->ctx, &err), &err);
    for (int i = 0; i < TASKS; i++) {
        write_expert(f, i);
        experts[i] = OBM_INIT(obm_expert);
        experts[i].name = names[i];
        experts[i].path = f->dir[i + 1];
    }
    f->pack_dir = tiny_folder();
    obm_compress_options compress = OBM_INIT(obm_compress_options);
    compress.overwrite = true;
    check_ok(obm_compress(f->ctx, f->dir[0], experts, TASKS, &compress, f->pack_dir, NULL, &f->pack, &err), &err);
    unsigned state = 5;
    for (int i = 0; i < T; i++) f->ids[i] = (int32_t)(tiny_random(&state) % VOCAB);
}

static void remove_pack(char *dir) {
    DIR *d = opendir(dir);
    struct dirent *e;
    char path[1024];
    while (d && (e = readdir(d))) {
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        if (e->d_name[0] != '.') unlink(path);
    }
    if (d) closedir(d);
    rmdir(dir);
    free(dir);
}

static void close_fixture(fixture *f) {
    obm_pack_free(f->pack);
    obm_context_free(f->ctx);
    tiny_weights_free(&f->base);
    for (int i = 0; i <= TASKS; i++) tiny_remove(f->dir[i]);
    remove_pack(f->pack_dir);
}

static obm_model *open_as(const fixture *f, uint64_t budget, bool materialise) {
    obm_model_options options = OBM_INIT(obm_model_options);
    obm_model *m;
    obm_error err;
    options.route_budget = budget;
    options.materialise = materialise;
    check_ok(obm_model_from_pack(f->ctx, f->pack, &options, &m, &err), &err);
    return m;
}

static obm_model *open_model(const fixture *f, uint64_t budget) { return open_as(f, budget, false); }

/* The merged weights as the pack states them, in f32. */
static void materialise(const fixture *f, const double *route, tiny *c, tiny_weights *w) {
    obm_error err;
    obm_tensor shape;
    *c = f->c;
    tiny_weights_new(&f->c, w);
    for (int i = 0; i < w->n; i++) {
        tiny_tensor *t = &w->t[i];
        check_ok(obm_pack_route_shape(f->pack, route, t->name, &shape, &err), &err);
        if (t->rows) t->rows = (int)shape.shape[0];
        if (strstr(t->name, "embed_tokens")) c->vocab = (int)shape.shape[0];
        t->data = realloc(t->data, (size_t)obm_tensor_count(&shape) * sizeof *t->data);
        check_ok(obm_pack_materialise(f->pack, route, t->name, t->data, &err), &err);
    }
}

static double distance(const float *a, const double *b, size_t rows, size_t width_a, size_t width_b) {
    double worst = 0, scale = 0;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < width_b; i++) {
            double d = fabs(a[r * width_a + i] - b[r * width_b + i]);
            if (!(d <= worst)) worst = d;
            scale = fmax(scale, fabs(b[r * width_b + i]));
        }
    return worst / scale;
}

static const double routes[][TASKS] = {{0, 0, 0}, {1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {0.7, 0.3, 0}, {0.2, 0.2, 0.2}};
#define N_ROUTES (sizeof routes / sizeof *routes)
/* Weights rounded to bf16 are off by 2^-9 of themselves; errors of many terms average out.  f32: as in test_model.c. */
#define BF16_BOUND 2e-2
#define F32_BOUND 1e-4

static void logits_are_those_of_the_merged_weights(void **state) {
    (void)state;
    const struct { obm_dtype dtype; int tied; } cases[] = {{OBM_F32, 0}, {OBM_F32, 1}, {OBM_BF16, 0}, {OBM_F16, 1}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        fixture f;
        obm_error err;
        open_fixture(&f, cases[k].dtype, cases[k].tied);
        obm_model *m = open_model(&f, 0);
        obm_model_info info;
        obm_model_describe(m, &info);
        assert_int_equal(info.vocab, f.c.vocab + EXTRA);
        float *got = malloc((size_t)T * (size_t)info.vocab * sizeof *got);
        double *expected = malloc((size_t)T * (size_t)info.vocab * sizeof *expected);
        for (size_t r = 0; r < N_ROUTES; r++) {
            tiny c;
            tiny_weights w;
            obm_run_options options = OBM_INIT(obm_run_options);
            options.route = routes[r];
            options.all = true;
            materialise(&f, routes[r], &c, &w);
            assert_int_equal(c.vocab, f.c.vocab + (r == 3 ? EXTRA : 0));
            tiny_reference(&c, &w, f.ids, T, expected, NULL);
            check_ok(obm_model_logits(m, f.ids, T, &options, got, &err), &err);
            double d = distance(got, expected, T, (size_t)info.vocab, (size_t)c.vocab);
            if (!(d < (cases[k].dtype == OBM_F32 || r == 0 ? F32_BOUND : BF16_BOUND)))
                fail_msg("case %zu, route %zu: %g", k, r, d);
            for (int64_t i = c.vocab; i < info.vocab; i++) assert_true(got[i] == -INFINITY);
            tiny_weights_free(&w);
        }
        free(got);
        free(expected);
        obm_model_free(m);
        close_fixture(&f);
    }
}

static void set_lambda(fixture *f, double lambda) {
    obm_pack_settings settings = OBM_INIT(obm_pack_settings);
    obm_error err;
    obm_pack_get_settings(f->pack, &settings);
    settings.lambda = lambda;
    check_ok(obm_pack_set_settings(f->pack, &settings, &err), &err);
}

/* A pack's lambda may change while a model runs it: what was prepared before is not used again. */
static void changed_settings_are_noticed(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    float before[VOCAB + EXTRA], after[VOCAB + EXTRA], fresh[VOCAB + EXTRA];
    open_fixture(&f, OBM_F32, 0);
    obm_model *m = open_model(&f, 0);
    obm_run_options options = OBM_INIT(obm_run_options);
    options.route = routes[1];
    check_ok(obm_model_logits(m, f.ids, 9, &options, before, &err), &err);
    set_lambda(&f, 1);
    check_ok(obm_model_logits(m, f.ids, 9, &options, after, &err), &err);
    assert_int_equal(m->routes->next ? m->routes->next->next != NULL : 0, 0);   /* the old one is gone */
    obm_model_free(m);
    m = open_model(&f, 0);
    check_ok(obm_model_logits(m, f.ids, 9, &options, fresh, &err), &err);
    assert_memory_equal(after, fresh, VOCAB * sizeof *after);
    assert_memory_not_equal(after, before, VOCAB * sizeof *after);
    obm_model_free(m);
    close_fixture(&f);
}

/* Tiny alphas would be lost in bf16, so those matrices stay f32; others keep the base's dtype. */
static void dtypes_of_materialised_weights(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    obm__weights *w;
    open_fixture(&f, OBM_BF16, 0);
    obm_model *m = open_as(&f, 0, true);
    check_ok(obm__weights_acquire(m, routes[1], &w, &err), &err);
    assert_int_equal(obm__weights_at(w, 1, OBM_GATE)->dtype, OBM_BF16);
    obm__weights_release(m, w);
    set_lambda(&f, 0);
    check_ok(obm__weights_acquire(m, routes[2], &w, &err), &err);
    assert_int_equal(obm__weights_at(w, 1, OBM_GATE)->dtype, OBM_F32);
    obm__weights_release(m, w);
    check_ok(obm__weights_acquire(m, NULL, &w, &err), &err);
    const obm__st_entry *e = obm__checkpoint_find(m->base, "model.layers.1.mlp.gate_proj.weight");
    assert_ptr_equal(obm__weights_at(w, 1, OBM_GATE)->data, e->t.data);   /* a view */
    obm__weights_release(m, w);
    obm_model_free(m);
    close_fixture(&f);
}

static void ids_of_extra_vocabulary(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    float logits[VOCAB + EXTRA];
    const int32_t extra = VOCAB, beyond = VOCAB + EXTRA;
    open_fixture(&f, OBM_F32, 1);
    obm_model *m = open_model(&f, 0);
    obm_run_options options = OBM_INIT(obm_run_options);
    options.route = routes[3];
    check_ok(obm_model_logits(m, &extra, 1, &options, logits, &err), &err);
    assert_true(isfinite(logits[VOCAB + EXTRA - 1]));
    assert_int_equal(obm_model_logits(m, &beyond, 1, &options, logits, &err), OBM_E_ARG);
    options.route = routes[1];
    assert_int_equal(obm_model_logits(m, &extra, 1, &options, logits, &err), OBM_E_ARG);
    obm_model_free(m);
    close_fixture(&f);
}

/* ---- the cache of routes ---- */

static void routes_are_kept_within_the_budget(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    float logits[VOCAB + EXTRA];
    obm_model_memory one, now;
    open_fixture(&f, OBM_F32, 0);
    obm_model *m = open_model(&f, 0);
    obm_run_options options = OBM_INIT(obm_run_options);
    options.route = routes[1];
    check_ok(obm_model_logits(m, f.ids, 3, &options, logits, &err), &err);
    obm_model_account(m, &one);
    assert_true(one.overlays > 0 && one.planes > 0 && one.kv == 0);
    obm__weights *kept = m->routes;
    check_ok(obm_model_logits(m, f.ids, 3, &options, logits, &err), &err);
    assert_ptr_equal(m->routes, kept);   /* found, not made again */
    obm_model_free(m);

    m = open_model(&f, one.overlays * 5 / 2);   /* two routes */
    obm__weights *running;
    check_ok(obm__weights_acquire(m, routes[1], &running, &err), &err);
    for (size_t r = 2; r < N_ROUTES; r++) {
        options.route = routes[r];
        check_ok(obm_model_logits(m, f.ids, 3, &options, logits, &err), &err);
        obm_model_account(m, &now);
        assert_true(now.overlays <= one.overlays * 5 / 2);
        bool there = false;
        for (obm__weights *w = m->routes; w; w = w->next) there |= w == running;
        assert_true(there);   /* a running sequence's weights stay */
    }
    obm__weights_release(m, running);
    obm_model_free(m);
    close_fixture(&f);
}

/* ---- generation ---- */

static void check_mixed_batch(uint64_t budget) {
    fixture f;
    obm_error err;
    obm_prompt p[N_ROUTES];
    obm_completion together[N_ROUTES], alone;
    open_fixture(&f, OBM_BF16, 0);
    obm_model *m = open_model(&f, budget);
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = 12;
    o.ignore_eos = true;
    o.routes = &routes[0][0];
    o.n_routes = N_ROUTES;
    for (size_t i = 0; i < N_ROUTES; i++) p[i] = (obm_prompt){.ids = f.ids + i, .n_ids = 10 + i};
    check_ok(obm_model_generate_batch(m, p, N_ROUTES, &o, together, &err), &err);
    for (size_t i = 0; i < N_ROUTES; i++) {
        o.routes = routes[i];
        o.n_routes = 1;
        check_ok(obm_model_generate_batch(m, &p[i], 1, &o, &alone, &err), &err);
        assert_int_equal(alone.n_ids, together[i].n_ids);
        assert_memory_equal(alone.ids, together[i].ids, alone.n_ids * sizeof *alone.ids);
        assert_int_equal(alone.n_route, TASKS);
        assert_memory_equal(alone.route, routes[i], sizeof routes[i]);
        obm_completion_clear(&alone);
        obm_completion_clear(&together[i]);
    }
    o.n_routes = 2;
    assert_int_equal(obm_model_generate_batch(m, p, N_ROUTES, &o, together, &err), OBM_E_ARG);
    const double wrong[] = {1, -1, 0};
    o.routes = wrong;
    o.n_routes = 1;
    assert_int_equal(obm_model_generate_batch(m, p, 1, &o, together, &err), OBM_E_ARG);
    obm_model_free(m);
    close_fixture(&f);
}

static void routes_in_a_batch_do_not_disturb_each_other(void **state) {
    (void)state;
    check_mixed_batch(0);   /* all together */
    check_mixed_batch(1);   /* nothing is kept but what runs, and only one runs at a time */
}

typedef struct watch { const obm_model *m; uint64_t most; } watch;

/* Called when a sequence has ended, while the others still hold their routes. */
static int watch_overlays(void *user, const char *what, uint64_t done, uint64_t total) {
    watch *w = user;
    obm_model_memory now;
    (void)what, (void)done, (void)total;
    obm_model_account(w->m, &now);
    if (now.overlays > w->most) w->most = now.overlays;
    return 0;
}

/* Bytes of routes at the busiest moment of a batch of soft routes, all of one size; out: ids of all. */
static uint64_t most_overlays(const fixture *f, uint64_t budget, size_t n, size_t steps, int32_t *out) {
    obm_error err;
    obm_prompt p[8];
    obm_completion c[8];
    double soft[8][TASKS];
    obm_model *m = open_as(f, budget, true);
    watch w = {m, 0};
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = steps;
    o.ignore_eos = true;
    o.routes = soft[0];
    o.n_routes = n;
    o.batch = n;
    o.progress = watch_overlays;
    o.progress_user = &w;
    for (size_t i = 0; i < n; i++) {
        p[i] = (obm_prompt){.ids = f->ids + i, .n_ids = 10};
        soft[i][0] = soft[i][1] = 0.1 + 0.05 * (double)i;
        soft[i][2] = 0;
    }
    check_ok(obm_model_generate_batch(m, p, n, &o, c, &err), &err);
    for (size_t i = 0; i < n; i++) {
        memcpy(out + i * steps, c[i].ids, steps * sizeof *out);
        obm_completion_clear(&c[i]);
    }
    obm_model_free(m);
    return w.most;
}

static void a_batch_runs_no_more_routes_than_the_budget_holds(void **state) {
    (void)state;
    fixture f;
    int32_t expected[8 * 5], got[8 * 5];
    open_fixture(&f, OBM_F32, 0);
    uint64_t one = most_overlays(&f, 0, 1, 5, got), all = most_overlays(&f, 0, 8, 5, expected);
    assert_int_equal(all, 8 * one);
    for (uint64_t routes_held = 1; routes_held < 8; routes_held += 2) {
        uint64_t budget = one * routes_held + one / 2;
        assert_int_equal(most_overlays(&f, budget, 8, 5, got), one * routes_held);
        assert_memory_equal(got, expected, sizeof expected);
    }
    assert_true(most_overlays(&f, 1, 8, 5, got) <= one);   /* too small for any: one at a time */
    assert_memory_equal(got, expected, sizeof expected);
    close_fixture(&f);
}

static void the_default_budget_is_a_quarter_of_the_memory(void **state) {
    (void)state;
    fixture f;
    obm_context_info info;
    open_fixture(&f, OBM_F32, 0);
    obm_model *m = open_model(&f, 0);
    obm_context_describe(f.ctx, &info);
    assert_true(info.memory_total > 0);
    assert_int_equal(m->route_budget, info.memory_total / 4);
    obm_model_free(m);
    close_fixture(&f);
}

static void scores_take_routes(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    obm_score s[2];
    float logits[VOCAB + EXTRA];
    open_fixture(&f, OBM_F32, 0);
    obm_model *m = open_model(&f, 0);
    obm_score_item items[2] = {{.prompt = {.ids = f.ids, .n_ids = 9},
                                .continuation_ids = f.ids + 9,
                                .n_continuation_ids = 1,
                                .route = routes[1]},
                               {.prompt = {.ids = f.ids, .n_ids = 9},
                                .continuation_ids = f.ids + 9,
                                .n_continuation_ids = 1,
                                .route = routes[4]}};
    check_ok(obm_model_score(m, items, 2, NULL, s, &err), &err);
    for (int i = 0; i < 2; i++) {
        obm_run_options options = OBM_INIT(obm_run_options);
        double total = 0;
        options.route = items[i].route;
        check_ok(obm_model_logits(m, f.ids, 9, &options, logits, &err), &err);
        for (int j = 0; j < VOCAB; j++) total += exp(logits[j]);
        assert_true(fabs(s[i].logprob - (logits[f.ids[9]] - log(total))) < 1e-9);
        assert_memory_equal(s[i].route, items[i].route, sizeof routes[1]);
        obm_score_clear(&s[i]);
    }
    obm_model_free(m);
    close_fixture(&f);
}

/* ---- routers ---- */

typedef struct seen { int calls, stop_at; char text[64]; } seen;

/* Prompts that hold an "e" go to the expert with more vocabulary, others to a mixture. */
static obm_status route_by_letter(void *user, obm_request *request, double *weights, obm_error *err) {
    seen *s = user;
    const char *text = obm_request_text(request);
    (void)err;
    snprintf(s->text, sizeof s->text, "%s", text);
    if (++s->calls == s->stop_at) return OBM_E_USER;
    memcpy(weights, strchr(text, 'e') ? routes[3] : routes[4], sizeof routes[3]);
    return OBM_OK;
}

static void a_router_decides_where_no_route_is_given(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    seen s = {0};
    const bool routed[3] = {false, true, false};
    const double given[3][TASKS] = {{9, 9, 9}, {0, 1, 0}, {9, 9, 9}};
    const obm_prompt p[3] = {{.text = "in the sea"}, {.text = "in the sea"}, {.text = "in a box"}};
    obm_completion c[3];
    open_fixture(&f, OBM_BF16, 0);
    obm_model *m = open_model(&f, 0);
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = 4;
    o.router = route_by_letter;
    o.router_user = &s;
    o.routes = &given[0][0];
    o.n_routes = 3;
    o.routed = routed;
    check_ok(obm_model_generate_batch(m, p, 3, &o, c, &err), &err);
    assert_int_equal(s.calls, 2);
    assert_string_equal(s.text, "in a box");
    assert_memory_equal(c[0].route, routes[3], sizeof routes[3]);
    assert_memory_equal(c[1].route, given[1], sizeof routes[3]);
    assert_memory_equal(c[2].route, routes[4], sizeof routes[3]);
    for (int i = 0; i < 3; i++) obm_completion_clear(&c[i]);
    s = (seen){.stop_at = 2};
    assert_int_equal(obm_model_generate_batch(m, p, 3, &o, c, &err), OBM_E_USER);
    o.router = NULL;   /* and the pack has none of its own */
    assert_int_equal(obm_model_generate_batch(m, p, 3, &o, c, &err), OBM_E_NOTFOUND);
    obm_model_free(m);
    close_fixture(&f);
}

/* ---- routing again ---- */

#define STEPS 14
/* Which route each call about a prompt is answered with; prompts are told apart by their first letter. */
typedef struct planner {
    int answers[3][8];
    size_t calls[3];
    char texts[3][8][96];   /* what it saw */
} planner;

static obm_status route_by_plan(void *user, obm_request *request, double *weights, obm_error *err) {
    planner *p = user;
    const char *text = obm_request_text(request);
    size_t which = (size_t)(text[0] - 'a'), call = p->calls[which]++;
    (void)err;
    snprintf(p->texts[which][call], sizeof p->texts[which][call], "%s", text);
    memcpy(weights, routes[p->answers[which][call]], sizeof routes[0]);
    return OBM_OK;
}

static obm_status keep_last_row(void *arg, obm_model *m, const obm__row *rows, size_t n, obm_error *err) {
    size_t last = 0;
    for (size_t i = 0; i < n; i++)
        if (rows[i].sequence) last = i;
    return obm__forward_logits(m, rows, &last, 1, arg, err);
}

/* Greedy decoding by hand: from token number every * k on under the route answers[k], on the keys and values that are
 * there; a last token that the new route does not know runs under the old one. */
static void decode_by_hand(obm_model *m, const int32_t *prompt, size_t n, const int *answers, size_t every,
                           int32_t *out) {
    obm_error err;
    float logits[VOCAB + EXTRA];
    obm__sequence *s;
    int now = answers[0];
    check_ok(obm__model_enter(m, NULL, &err), &err);
    check_ok(obm__sequence_new(m, routes[now], OBM_F32, &s, &err), &err);
    check_ok(obm__prefill(m, s, prompt, n, false, m->config.layers, keep_last_row, logits, &err), &err);
    out[0] = obm__argmax(m->ctx->k, logits, m->vocab);
    for (size_t i = 1; i < STEPS; i++) {
        int next = answers[i / every];
        if (next != now && (out[i - 1] < VOCAB || next == 3)) {
            obm__weights_release(m, s->weights);
            check_ok(obm__weights_acquire(m, routes[next], &s->weights, &err), &err);
            now = next;
        }
        check_ok(obm__sequence_reserve(m, s, s->length + 1, &err), &err);
        const obm__row row = {s, s->length, out[i - 1]};
        const size_t which = 0;
        check_ok(obm__forward(m, &row, 1, false, m->config.layers, &err), &err);
        check_ok(obm__forward_logits(m, &row, &which, 1, logits, &err), &err);
        s->length++;
        out[i] = obm__argmax(m->ctx->k, logits, m->vocab);
    }
    obm__sequence_free(m, s);
    obm__model_leave(m);
}

static void check_rerouted(const obm_completion *c, const int *answers, size_t every, const int32_t *expected) {
    assert_int_equal(c->n_ids, STEPS);
    assert_memory_equal(c->ids, expected, STEPS * sizeof *expected);
    size_t n = 0;
    for (size_t k = 0; k * every < STEPS; k++) {
        if (k && answers[k] == answers[k - 1]) continue;
        assert_true(n < c->n_routes);
        assert_int_equal(c->route_tokens[n], k * every);
        assert_memory_equal(c->routes + n * TASKS, routes[answers[k]], sizeof routes[0]);
        n++;
    }
    assert_int_equal(c->n_routes, n);
    assert_memory_equal(c->route, c->routes + (n - 1) * TASKS, sizeof routes[0]);
}

static const planner plans = {.answers = {{1, 2, 4, 4, 0}, {4, 4, 1, 5, 3}, {2, 1, 2, 1, 2}}};
static const char *const reroute_texts[3] = {"a in the sea", "b in a box", "c over the hills and far away"};

/* Each sequence switches on its own, alone and beside others, whatever room there is for routes. */
static void check_rerouting(obm_dtype dtype, uint64_t budget, bool materialise) {
    const size_t every = 3;
    fixture f;
    obm_error err;
    obm_prompt p[3];
    obm_completion c[3];
    int32_t expected[3][STEPS], *ids;
    size_t n;
    open_fixture(&f, dtype, 0);
    obm_model *m = open_as(&f, budget, materialise);
    for (int i = 0; i < 3; i++) {
        p[i] = (obm_prompt){.text = reroute_texts[i]};
        check_ok(obm_tokenizer_encode(obm_model_tokenizer(m), p[i].text, strlen(p[i].text), true, &ids, &n, &err), &err);
        decode_by_hand(m, ids, n, plans.answers[i], every, expected[i]);
        obm_free(ids);
    }
    planner plan = plans;
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = STEPS;
    o.ignore_eos = true;
    o.router = route_by_plan;
    o.router_user = &plan;
    o.route_every = every;
    for (size_t batch = 1; batch <= 3; batch++) {
        plan = plans;
        o.batch = batch;
        check_ok(obm_model_generate_batch(m, p, 3, &o, c, &err), &err);
        for (int i = 0; i < 3; i++) {
            check_rerouted(&c[i], plans.answers[i], every, expected[i]);
            assert_int_equal(plan.calls[i], 5);
            assert_string_equal(plan.texts[i][0], reroute_texts[i]);
            for (size_t k = 1; k < 5; k++) {   /* the prompt, then the beginning of the text that came of it */
                size_t said = strlen(reroute_texts[i]), len = strlen(plan.texts[i][k]);
                assert_memory_equal(plan.texts[i][k], reroute_texts[i], said);
                assert_true(len > strlen(plan.texts[i][k - 1]));
                assert_memory_equal(plan.texts[i][k] + said, c[i].text, len - said);
            }
            obm_completion_clear(&c[i]);
        }
    }
    obm_model_free(m);
    close_fixture(&f);
}

static void a_router_may_change_its_mind(void **state) {
    (void)state;
    check_rerouting(OBM_BF16, 0, false);
    check_rerouting(OBM_F32, 1, false);   /* room for one route: those that wait give theirs back */
    check_rerouting(OBM_F32, 1, true);
    check_rerouting(OBM_BF16, 0, true);
}

static void a_stream_is_routed_again(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    obm_completion c;
    open_fixture(&f, OBM_F32, 0);
    obm_model *m = open_model(&f, 0);
    planner plan = plans;
    const obm_prompt p = {.text = reroute_texts[0]};
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = STEPS;
    o.ignore_eos = true;
    o.router = route_by_plan;
    o.router_user = &plan;
    o.route_every = 3;
    check_ok(obm_model_generate_batch(m, &p, 1, &o, &c, &err), &err);
    plan = plans;
    obm_stream *s;
    const char *text;
    size_t len;
    check_ok(obm_stream_open(m, &p, &o, &s, &err), &err);
    memset(&o, 0x55, sizeof o);   /* the struct may go, its router may not */
    do check_ok(obm_stream_next(s, &text, &len, &err), &err);
    while (text);
    const obm_completion *r = obm_stream_result(s);
    assert_int_equal(r->n_routes, c.n_routes);
    assert_memory_equal(r->routes, c.routes, c.n_routes * sizeof routes[0]);
    assert_memory_equal(r->route_tokens, c.route_tokens, c.n_routes * sizeof *c.route_tokens);
    assert_memory_equal(r->ids, c.ids, STEPS * sizeof *c.ids);
    obm_stream_free(s);
    obm_completion_clear(&c);
    obm_model_free(m);
    close_fixture(&f);
}

static obm_status first_code_then_chat(void *user, obm_request *request, double *weights, obm_error *err) {
    int *calls = user;
    (void)request, (void)err;
    memcpy(weights, routes[(*calls)++ ? 1 : 3], sizeof routes[0]);
    return OBM_OK;
}

/* Prompts are tried until one answers with a token that only `code` has; then the route changes right after it. */
static void a_token_that_the_new_route_lacks(void **state) {
    (void)state;
    static const int code[STEPS] = {3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3};
    static const int then_chat[STEPS] = {3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    fixture f;
    obm_error err;
    obm_completion c;
    int32_t expected[STEPS];
    size_t start = 0, at = STEPS;
    int calls = 0;
    char path[1024];
    open_fixture(&f, OBM_F32, 0);
    snprintf(path, sizeof path, "%s/tokenizer.json", f.dir[0]);   /* it does not have these ids */
    assert_int_equal(unlink(path), 0);
    obm_model *m = open_model(&f, 0);
    for (; start + 8 < T && at >= STEPS - 2; start++) {
        decode_by_hand(m, f.ids + start, 8, code, 1, expected);
        for (at = 0; at < STEPS && expected[at] < VOCAB; at++) {}
    }
    assert_true(at < STEPS - 2);
    decode_by_hand(m, f.ids + start - 1, 8, then_chat, at + 1, expected);
    assert_true(expected[at] >= VOCAB && expected[at + 1] < VOCAB + EXTRA);
    const obm_prompt p = {.ids = f.ids + start - 1, .n_ids = 8};
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = STEPS;
    o.ignore_eos = true;
    o.router = first_code_then_chat;
    o.router_user = &calls;
    o.route_every = at + 1;
    check_ok(obm_model_generate_batch(m, &p, 1, &o, &c, &err), &err);
    assert_memory_equal(c.ids, expected, sizeof expected);
    assert_int_equal(c.n_routes, 2);
    size_t first = at + 1;   /* drawn under `code` still: its input is the token that only `code` knows */
    while (expected[first] >= VOCAB) first++;
    assert_int_equal(c.route_tokens[1], first + 1);
    obm_completion_clear(&c);
    obm_model_free(m);
    close_fixture(&f);
}

/* Given routes stay, a router that fails stops the call, and a plain model has nothing to ask. */
static void what_is_not_routed_again(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    obm_completion c;
    seen s = {.stop_at = 2};
    const obm_prompt p = {.text = "in the sea"};
    open_fixture(&f, OBM_F32, 0);
    obm_model *m = open_model(&f, 0), *plain;
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = 6;
    o.ignore_eos = true;
    o.router = route_by_letter;
    o.router_user = &s;
    o.route_every = 2;
    assert_int_equal(obm_model_generate_batch(m, &p, 1, &o, &c, &err), OBM_E_USER);
    assert_int_equal(s.calls, 2);
    obm_stream *stream;
    const char *text;
    size_t len;
    s = (seen){.stop_at = 2};
    check_ok(obm_stream_open(m, &p, &o, &stream, &err), &err);
    obm_status status;
    while ((status = obm_stream_next(stream, &text, &len, &err)) == OBM_OK && text) {}
    assert_int_equal(status, OBM_E_USER);
    while ((status = obm_stream_next(stream, &text, &len, &err)) == OBM_OK && text) {}   /* asked again, it goes on */
    check_ok(status, &err);
    obm_stream_free(stream);
    o.routes = routes[1];
    o.n_routes = 1;
    check_ok(obm_model_generate_batch(m, &p, 1, &o, &c, &err), &err);
    assert_int_equal(c.n_routes, 1);
    assert_int_equal(c.route_tokens[0], 0);
    assert_memory_equal(c.routes, routes[1], sizeof routes[1]);
    obm_completion_clear(&c);
    o.route_every = 0;
    check_ok(obm_model_generate_batch(m, &p, 1, &o, &c, &err), &err);
    assert_null(c.routes);
    assert_null(c.route_tokens);
    obm_completion_clear(&c);
    obm_generate_options every = OBM_INIT(obm_generate_options);
    every.route_every = 2;
    check_ok(obm_model_open(f.ctx, f.dir[0], NULL, &plain, &err), &err);
    assert_int_equal(obm_model_generate_batch(plain, &p, 1, &every, &c, &err), OBM_E_ARG);
    obm_model_free(plain);
    obm_model_free(m);
    close_fixture(&f);
}

/* Features are the mean hidden states of the base over the ids of the user's words. */
static void features_of_prompts(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    float got[2 * 30], expected[30];
    const char *text = "in the sea";
    const obm_message turns[] = {{"system", "ignored"}, {"user", text}};
    const obm_prompt p[2] = {{.text = text}, {.messages = turns, .n_messages = 2}};
    int32_t *ids;
    size_t n;
    open_fixture(&f, OBM_BF16, 0);
    obm_model *m = open_model(&f, 0);
    check_ok(obm_tokenizer_encode(obm_model_tokenizer(m), text, strlen(text), false, &ids, &n, &err), &err);
    for (int layer = 0; layer <= 2; layer++) {
        check_ok(obm__model_pool(m, ids, n, layer, expected, &err), &err);
        check_ok(obm_model_embed(m, p, 2, layer, NULL, NULL, got, &err), &err);
        assert_memory_equal(got, expected, sizeof expected);
        assert_memory_equal(got + 30, expected, sizeof expected);
    }
    obm_free(ids);
    obm_model_free(m);
    close_fixture(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(logits_are_those_of_the_merged_weights),
        cmocka_unit_test(changed_settings_are_noticed),
        cmocka_unit_test(dtypes_of_materialised_weights),
        cmocka_unit_test(ids_of_extra_vocabulary),
        cmocka_unit_test(routes_are_kept_within_the_budget),
        cmocka_unit_test(the_default_budget_is_a_quarter_of_the_memory),
        cmocka_unit_test(a_batch_runs_no_more_routes_than_the_budget_holds),
        cmocka_unit_test(routes_in_a_batch_do_not_disturb_each_other),
        cmocka_unit_test(scores_take_routes),
        cmocka_unit_test(a_router_decides_where_no_route_is_given),
        cmocka_unit_test(a_router_may_change_its_mind),
        cmocka_unit_test(a_stream_is_routed_again),
        cmocka_unit_test(a_token_that_the_new_route_lacks),
        cmocka_unit_test(what_is_not_routed_again),
        cmocka_unit_test(features_of_prompts),
    };
    return cmocka_run_group_tests_name("model_routes", tests, NULL, NULL);
}
