/* Prompts that begin alike: what they have in common is computed once in a call, and no bit depends on it. */
#include "planes_fixture.h"

#include <stdatomic.h>

#define TASKS 3
#define COMMON 140 /* two whole pages of 64 positions, and some more */
#define PROMPTS 7
#define LAYERS 2

static const double routes[2][TASKS] = {{1, 0, 0}, {0.5, 0, 0.25}};
static const char *const long_rope =
    ",\"max_position_embeddings\":200,\"rope_scaling\":{\"rope_type\":\"longrope\",\"factor\":2,"
    "\"original_max_position_embeddings\":160,\"short_factor\":[1,1,1,1],\"long_factor\":[2,2,3,3]}";

/* ---- rows that run, counted by their norms: two in each layer, one behind the last ---- */

static obm_kernels counting;
static void (*norm_mul)(float *, const float *, const float *, float, float, size_t);
static _Atomic size_t norms;

static void count_norm(float *out, const float *x, const float *weight, float scale, float offset, size_t n) {
    norms++;
    norm_mul(out, x, weight, scale, offset, n);
}

static void open_counted(world *w, const char *extra, int window, int threads) {
    *w = (world){.c = {window ? "mistral" : "llama", 150, 64, 64, LAYERS, 4, 2, 8, window, 0, OBM_BF16, 3, extra},
                 .tasks = TASKS};
    for (int k = 0; k < TASKS; k++) w->spec[k] = (expert_spec){.policy = "linear", .scale = "row", .planes = 1};
    open_world(w, threads);
    counting = *w->ctx->k;
    norm_mul = counting.norm_mul;
    counting.norm_mul = count_norm;
    w->ctx->k = &counting;
}

static obm_model *open_kv(const world *w, obm_dtype kv) {
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_model *m;
    obm_error err;
    o.kv = kv;
    check_ok(obm_model_from_pack(w->ctx, w->pack, &o, &m, &err), &err);
    return m;
}

/* COMMON ids of all, then as many of its own as `own` and its number say. */
typedef struct prompts {
    int32_t ids[PROMPTS][200];
    obm_prompt p[PROMPTS];
    double route[PROMPTS][TASKS];
    size_t rows; /* of all */
} prompts;

static void make_prompts(const world *w, bool routed, prompts *out) {
    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < PROMPTS; i++) {
        size_t n = COMMON + 3 + 5 * i;
        memcpy(out->ids[i], w->ids, sizeof w->ids[0] * n);
        for (size_t j = COMMON; j < n; j++) out->ids[i][j] = (int32_t)((j * 7 + i * 31) % 150);
        out->p[i].ids = out->ids[i];
        out->p[i].n_ids = n;
        out->rows += n;
        if (routed) memcpy(out->route[i], routes[i % 2], sizeof routes[0]);
    }
}

static obm_generate_options options_of(const prompts *p, size_t max_tokens, size_t batch) {
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.routes = p->route[0];
    o.n_routes = PROMPTS;
    o.max_tokens = max_tokens;
    o.batch = batch;
    o.ignore_eos = true;
    return o;
}

static void clear(obm_completion *c, size_t n) {
    for (size_t i = 0; i < n; i++) obm_completion_clear(&c[i]);
}

/* Every prompt in a call of its own, which has nothing to share. */
static void run_alone(obm_model *m, const prompts *p, size_t max_tokens, obm_completion *out) {
    obm_error err;
    for (size_t i = 0; i < PROMPTS; i++) {
        obm_generate_options o = options_of(p, max_tokens, 1);
        o.routes = p->route[i];
        o.n_routes = 1;
        check_ok(obm_model_generate_batch(m, &p->p[i], 1, &o, &out[i], &err), &err);
    }
    assert_int_equal(m->kv_bytes, 0);
}

static void check_batch(obm_model *m, const prompts *p, size_t max_tokens, size_t batch, const obm_completion *alone) {
    obm_error err;
    obm_completion got[PROMPTS];
    obm_generate_options o = options_of(p, max_tokens, batch);
    check_ok(obm_model_generate_batch(m, p->p, PROMPTS, &o, got, &err), &err);
    for (size_t i = 0; i < PROMPTS; i++) {
        assert_int_equal(got[i].n_ids, alone[i].n_ids);
        assert_memory_equal(got[i].ids, alone[i].ids, got[i].n_ids * sizeof *got[i].ids);
        assert_int_equal(got[i].n_prompt, alone[i].n_prompt);
    }
    assert_int_equal(m->kv_bytes, 0);
    clear(got, PROMPTS);
}

static size_t norms_of(size_t rows, size_t ends) { return rows * 2 * LAYERS + ends; }

/* One prompt of each route runs whole, the others from their third page on. */
static void a_batch_computes_it_once(void **state) {
    (void)state;
    for (int variant = 0; variant < 8; variant++) {
        world w;
        prompts p;
        obm_completion alone[PROMPTS];
        bool routed = variant & 1;
        open_counted(&w, NULL, variant & 4 ? 20 : 0, variant & 2 ? 3 : 1);
        obm_model *m = open_kv(&w, variant & 2 ? OBM_F16 : OBM_F32);
        make_prompts(&w, routed, &p);
        norms = 0;
        run_alone(m, &p, 1, alone);
        assert_int_equal(norms, norms_of(p.rows, PROMPTS));
        for (size_t batch = routed ? 2 : 1; batch <= PROMPTS + 1; batch++) {
            norms = 0;
            check_batch(m, &p, 1, batch, alone);
            assert_int_equal(norms, norms_of(p.rows - (PROMPTS - (routed ? 2 : 1)) * 128, PROMPTS));
        }
        clear(alone, PROMPTS);
        run_alone(m, &p, 9, alone);
        for (size_t batch = 1; batch <= PROMPTS + 1; batch++) check_batch(m, &p, 9, batch, alone);
        clear(alone, PROMPTS);
        obm_model_free(m);
        close_world(&w);
    }
}

/* What was decoded is no part of a prompt: a longer one that goes on with the same ids runs them itself. */
static void decoded_positions_are_not_shared(void **state) {
    (void)state;
    world w;
    prompts p;
    obm_error err;
    obm_completion first, got[2];
    open_counted(&w, NULL, 0, 1);
    obm_model *m = open_kv(&w, OBM_F32);
    make_prompts(&w, false, &p);
    obm_generate_options o = options_of(&p, 40, 1);
    p.p[0].n_ids = 100;
    o.n_routes = 1;
    check_ok(obm_model_generate_batch(m, p.p, 1, &o, &first, &err), &err);
    memcpy(p.ids[1], p.ids[0], 100 * sizeof p.ids[0][0]);
    memcpy(p.ids[1] + 100, first.ids, 40 * sizeof p.ids[0][0]);
    p.p[1].n_ids = 140;
    norms = 0;
    check_ok(obm_model_generate_batch(m, p.p, 2, &o, got, &err), &err);
    assert_int_equal(norms, norms_of(100 + 39 + 140 - 64 + 39, 80)); /* one page in common */
    clear(&first, 1);
    clear(got, 2);
    obm_model_free(m);
    close_world(&w);
}

/* The same prompt again and again: its last token runs for each. */
static void whole_pages_of_equal_prompts(void **state) {
    (void)state;
    world w;
    prompts p;
    obm_completion alone[PROMPTS];
    open_counted(&w, NULL, 0, 1);
    obm_model *m = open_kv(&w, OBM_F32);
    make_prompts(&w, false, &p);
    for (size_t i = 0; i < PROMPTS; i++) {
        memcpy(p.ids[i], w.ids, sizeof w.ids[0] * 128);
        p.p[i].n_ids = 128;
    }
    run_alone(m, &p, 5, alone);
    for (size_t batch = 1; batch <= PROMPTS; batch += 3) {
        norms = 0;
        check_batch(m, &p, 5, batch, alone);
        assert_int_equal(norms, norms_of(128 + (PROMPTS - 1) * 64 + PROMPTS * 4, PROMPTS * 5));
    }
    clear(alone, PROMPTS);
    obm_model_free(m);
    close_world(&w);
}

/* Prompts up to 160 positions rotate by other factors than longer ones. */
static void rotations_of_their_own(void **state) {
    (void)state;
    world w;
    prompts p;
    obm_completion alone[PROMPTS];
    open_counted(&w, long_rope, 0, 1);
    obm_model *m = open_kv(&w, OBM_F32);
    make_prompts(&w, false, &p); /* 143, 148, 153, 158 and 163, 168, 173 */
    run_alone(m, &p, 1, alone);
    norms = 0;
    check_batch(m, &p, 1, PROMPTS, alone);
    assert_int_equal(norms, norms_of(p.rows - (PROMPTS - 2) * 128, PROMPTS));
    clear(alone, PROMPTS);
    obm_model_free(m);
    close_world(&w);
}

/* ---- memory ---- */

typedef struct watched {
    obm_model *m;
    uint64_t most, done, stop_at;
} watched;

/* Whenever one has ended; a slow machine asks in between too. */

static int watch(void *user, const char *what, uint64_t done, uint64_t total) {
    watched *x = user;
    (void)what;
    (void)total;
    if (done != x->done && x->m->kv_bytes > x->most) x->most = x->m->kv_bytes;
    x->done = done;
    return done == x->stop_at;
}

/* What is kept for others is the pages in common, and all of one prompt; nothing when a call ends, however it does. */
static void memory_is_bounded(void **state) {
    (void)state;
    world w;
    prompts p;
    obm_error err;
    obm_completion got[PROMPTS];
    open_counted(&w, NULL, 0, 1);
    obm_model *m = open_kv(&w, OBM_F32);
    uint64_t page = obm__kv_page_bytes(m, OBM_F32);
    make_prompts(&w, false, &p); /* of three pages each */
    for (int apart = 0; apart < 2; apart++) {
        watched x = {.m = m, .stop_at = UINT64_MAX};
        for (size_t i = 0; apart && i < PROMPTS; i++) p.ids[i][0] = (int32_t)i; /* nothing in common */
        obm_generate_options o = options_of(&p, 3, 2);
        o.progress = watch;
        o.progress_user = &x;
        check_ok(obm_model_generate_batch(m, p.p, PROMPTS, &o, got, &err), &err);
        clear(got, PROMPTS);
        assert_int_equal(m->kv_bytes, 0);
        /* one of two has ended: its whole pages, which are the other's too or not, and the other's */
        assert_int_equal(x.most, (apart ? 2 + 3 : 2 + 1) * page);
        x.done = 0;
        x.stop_at = 3;
        assert_int_equal(obm_model_generate_batch(m, p.p, PROMPTS, &o, got, &err), OBM_E_USER);
        assert_int_equal(m->kv_bytes, 0);
    }
    obm_model_free(m);
    close_world(&w);
}

/* ---- scores ---- */

enum { ITEMS = 6 };

static void make_items(const prompts *p, obm_score_item *items) {
    static int32_t answers[ITEMS][12];
    memset(items, 0, ITEMS * sizeof *items);
    for (size_t i = 0; i < ITEMS; i++) {
        for (size_t j = 0; j < 12; j++) answers[i][j] = (int32_t)((j < 4 ? j : j * 11 + i * 17) % 150);
        items[i].prompt = (obm_prompt){.ids = p->ids[i / 4], .n_ids = i == 3 ? 120 : 143};
        items[i].continuation_ids = answers[i];
        items[i].n_continuation_ids = 6 + i;
        items[i].route = routes[i == 2];
    }
}

/* Each item goes on behind what it has in common with the one before, if that ran under its route. */
static void scores_go_on(void **state) {
    (void)state;
    /* item 2 has another route, and so has 3 again; 4 is of another prompt (140 ids in common with the one of 3, which
     * has 120), 5 of the same as 4, and what is scored first is predicted by row 142 */
    const size_t prompt[ITEMS] = {143, 143, 143, 120, 143, 143}, common[ITEMS] = {0, 142, 0, 0, 120, 142};
    for (int threads = 1; threads <= 3; threads += 2) {
        world w;
        prompts p;
        obm_error err;
        obm_score together[ITEMS], alone;
        obm_score_item items[ITEMS];
        size_t rows = 0, scored = 0;
        open_counted(&w, NULL, 0, threads);
        obm_model *m = open_kv(&w, OBM_F32);
        make_prompts(&w, false, &p);
        make_items(&p, items);
        for (size_t i = 0; i < ITEMS; i++) {
            rows += prompt[i] + items[i].n_continuation_ids - 1 - common[i];
            scored += items[i].n_continuation_ids;
        }
        norms = 0;
        check_ok(obm_model_score(m, items, ITEMS, NULL, together, &err), &err);
        assert_int_equal(norms, norms_of(rows, scored));
        assert_int_equal(m->kv_bytes, 0);
        for (size_t i = 0; i < ITEMS; i++) {
            check_ok(obm_model_score(m, items + i, 1, NULL, &alone, &err), &err);
            assert_int_equal(alone.n, together[i].n);
            assert_memory_equal(alone.token_logprobs, together[i].token_logprobs, alone.n * sizeof(double));
            assert_int_equal(alone.is_greedy, together[i].is_greedy);
            obm_score_clear(&alone);
            obm_score_clear(&together[i]);
        }
        items[4].prompt.n_ids = 0;
        items[4].n_continuation_ids = 0; /* refused, behind others */
        assert_int_not_equal(obm_model_score(m, items, ITEMS, NULL, together, &err), OBM_OK);
        assert_int_equal(m->kv_bytes, 0);
        obm_model_free(m);
        close_world(&w);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_batch_computes_it_once),     cmocka_unit_test(decoded_positions_are_not_shared),
        cmocka_unit_test(whole_pages_of_equal_prompts), cmocka_unit_test(rotations_of_their_own),
        cmocka_unit_test(memory_is_bounded),            cmocka_unit_test(scores_go_on),
    };
    return cmocka_run_group_tests_name("prefix", tests, NULL, NULL);
}
