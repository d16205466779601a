/* Routes of packs at run time: equal bits whatever runs beside, what routes keep in memory, overlays that are built
 * while sequences run, packs that change under a model. */
#include "planes_fixture.h"

#define N_ROUTES 6
static const double routes[N_ROUTES][3] = {{0, 0, 0}, {1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {0.6, 0.3, 0}, {0.5, 0.4, 0.3}};
static const char *const untouched[] = {"embed_tokens", "lm_head", "norm"};

/* Everything on planes; or, with `full`, a head that is kept full, so that it is an overlay. */
static void open_plain(world *w, int threads, bool full) {
    *w = (world){.c = {"llama", 150, 70, 130, 2, 5, 5, 14, 0, 0, OBM_BF16, 3, NULL}, .tasks = 3};
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < 3; i++)
            if (!full || i != 1) w->spec[k].same[full && i == 2 ? 1 : i] = untouched[i];
    open_world(w, threads);
}

static void get_logits(obm_model *m, const world *w, const double *route, bool decode, size_t n, float *out) {
    obm_error err;
    obm_run_options options = OBM_INIT(obm_run_options);
    options.route = route;
    options.all = true;
    options.decode = decode;
    check_ok(obm_model_logits(m, w->ids, n, &options, out, &err), &err);
}

/* ---- bits ---- */

static void bits_do_not_depend_on_threads(void **state) {
    (void)state;
    static const int threads[] = {1, 2, 5};
    static float expected[N_ROUTES][2][9 * 150], got[9 * 150];
    for (int i = 0; i < 3; i++) {
        world w;
        open_plain(&w, threads[i], true);
        obm_model *m = open_model(&w, false, 0), *second = open_model(&w, false, 0);
        for (int r = 0; r < N_ROUTES; r++)
            for (int decode = 0; decode < 2; decode++) {
                get_logits(m, &w, routes[r], decode, 9, i ? got : expected[r][decode]);
                if (i) assert_memory_equal(got, expected[r][decode], sizeof got);
                get_logits(second, &w, routes[r], decode, 9, got); /* two models on one pack */
                assert_memory_equal(got, expected[r][decode], sizeof got);
            }
        obm_model_free(m);
        obm_model_free(second);
        close_world(&w);
    }
}

/* Logits of the last position of a sequence that has come so far. */
static obm_status keep_last(void *arg, obm_model *m, const obm__row *rows, size_t n, obm_error *err) {
    size_t last = 0;
    for (size_t i = 0; i < n; i++)
        if (rows[i].sequence) last = i;
    return obm__forward_logits(m, rows, &last, 1, arg, err);
}

static void a_prompt_in_chunks_is_the_whole_prompt(void **state) {
    (void)state;
    static const size_t cuts[][4] = {{130}, {1, 63, 66}, {64, 1, 65}, {100, 30}};
    world w;
    obm_error err;
    float expected[150], got[150];
    open_plain(&w, 2, true);
    obm_model *m = open_model(&w, false, 0);
    for (int r = 0; r < N_ROUTES; r++)
        for (size_t c = 0; c < 4; c++) {
            obm__sequence *s;
            size_t done = 0;
            check_ok(obm__sequence_new(m, routes[r], OBM_F32, &s, &err), &err);
            for (size_t i = 0; i < 4 && cuts[c][i]; done += cuts[c][i++])
                check_ok(obm__prefill(m, s, w.ids + done, cuts[c][i], false, 2, keep_last, got, &err), &err);
            if (!c) memcpy(expected, got, sizeof got);
            assert_memory_equal(got, expected, sizeof got);
            obm__sequence_free(m, s);
        }
    obm_model_free(m);
    close_world(&w);
}

/* One decode step of sequences with all routes at once against each alone, logits and all. */
static void steps_of_many_routes_are_steps_alone(void **state) {
    (void)state;
    world w;
    obm_error err;
    static float together[N_ROUTES * 150], alone[150];
    obm__sequence *s[N_ROUTES][2];
    obm__row rows[N_ROUTES];
    size_t which[N_ROUTES];
    open_plain(&w, 2, true);
    obm_model *m = open_model(&w, false, 0);
    for (size_t r = 0; r < N_ROUTES; r++)
        for (int copy = 0; copy < 2; copy++) {
            check_ok(obm__sequence_new(m, routes[r], OBM_F32, &s[r][copy], &err), &err);
            check_ok(obm__prefill(m, s[r][copy], w.ids + r, 5 + r, false, 2, NULL, NULL, &err), &err);
            check_ok(obm__sequence_reserve(m, s[r][copy], 20, &err), &err);
        }
    for (int step = 0; step < 4; step++) {
        for (size_t r = 0; r < N_ROUTES; r++) {
            rows[r] = (obm__row){s[r][0], s[r][0]->length, w.ids[20 + r]};
            which[r] = r;
        }
        check_ok(obm__forward(m, rows, N_ROUTES, false, 2, &err), &err);
        check_ok(obm__forward_logits(m, rows, which, N_ROUTES, together, &err), &err);
        for (size_t r = 0; r < N_ROUTES; r++) {
            obm__row row = {s[r][1], s[r][1]->length, w.ids[20 + r]};
            check_ok(obm__forward(m, &row, 1, false, 2, &err), &err);
            check_ok(obm__forward_logits(m, &row, which, 1, alone, &err), &err);
            assert_memory_equal(alone, together + r * 150, sizeof alone);
            s[r][0]->length++;
            s[r][1]->length++;
        }
    }
    for (size_t r = 0; r < N_ROUTES; r++)
        for (int copy = 0; copy < 2; copy++) obm__sequence_free(m, s[r][copy]);
    obm_model_free(m);
    close_world(&w);
}

/* ---- memory ---- */

static size_t count_routes(const obm_model *m) {
    size_t n = 0;
    for (const obm__weights *w = m->routes; w; w = w->next) n++;
    return n;
}

/* Coefficients of the hard routes, from which all routes are made, and the memory kept for the next of these. */
static uint64_t coefficient_bytes(const obm_model *m) {
    uint64_t spare = m->spare ? obm__planes_route_bytes(m->spare) : 0;
    return (m->hard_routes ? obm__coefficient_cache_bytes(m->hard_routes->cache) : 0) + spare;
}

static void check_account(const obm_model *m) {
    obm_model_memory memory;
    uint64_t overlays = 0, terms = 0;
    obm_model_account(m, &memory);
    for (const obm__weights *w = m->routes; w; w = w->next) {
        overlays += w->bytes;
        terms += w->terms_bytes;
    }
    for (const obm__overlay *o = m->overlays; o; o = o->next) overlays += o->bytes;
    assert_int_equal(memory.overlays, overlays);
    assert_int_equal(memory.planes, m->signs_bytes + coefficient_bytes(m) + terms);
}

static void switching_routes_moves_no_weights(void **state) {
    (void)state;
    world w;
    obm_model_memory memory;
    float logits[150];
    open_plain(&w, 2, false);
    for (int lambda = 0; lambda < 2; lambda++) {
        w.pack->settings.lambda = 0.3 * lambda;
        obm_model *m = open_model(&w, false, 0);
        obm_model_account(m, &memory);
        uint64_t signs = memory.planes;
        assert_true(signs > 0);
        for (int i = 0; i < 20; i++) {
            double soft[3] = {0.1 * i, 0.02 * i, 0.5};
            get_logits(m, &w, i < N_ROUTES ? routes[i] : soft, true, 1, logits);
            obm_model_account(m, &memory);
            assert_null(m->overlays);
            assert_true(memory.overlays <= count_routes(m) * 5 * 70 * sizeof(float)); /* norms, widened to f32 */
            check_account(m);
        }
        assert_true(memory.planes > signs);
        assert_int_equal(m->signs_bytes, signs);
        obm_model_free(m);
    }
    close_world(&w);
}

static void soft_routes_stay_within_the_budget(void **state) {
    (void)state;
    world w;
    float logits[150];
    obm_model_memory memory;
    open_plain(&w, 2, false);
    obm_model *m = open_model(&w, false, 0);
    get_logits(m, &w, routes[4], true, 1, logits);
    uint64_t one = m->routes->terms_bytes;
    obm_model_free(m);
    m = open_model(&w, false, 3 * one + one / 2);
    for (int i = 0; i < 30; i++) {
        double soft[3] = {0.01 * i, 0.5, 0};
        soft[2] = 0.001 * i;
        get_logits(m, &w, soft, true, 1, logits);
        obm_model_account(m, &memory);
        assert_true(memory.overlays + memory.planes - m->signs_bytes - coefficient_bytes(m) <= 3 * one + one / 2);
        assert_true(count_routes(m) <= 5);
        check_account(m);
    }
    assert_true(count_routes(m) >= 3);
    obm_model_free(m);
    close_world(&w);
}

/* Mixtures that nobody runs are few, and one in the memory of another has the bits of one in new memory. */
static void few_mixtures_are_kept(void **state) {
    (void)state;
    world w;
    float used[150], fresh[150];
    open_plain(&w, 2, false);
    obm_model *m = open_model(&w, false, 0);
    for (int i = 0; i < 40; i++) {
        double soft[3] = {0.01 * i, i % 3 ? 0.5 : 0, 0.25};
        get_logits(m, &w, soft, true, 1, used);
        get_logits(m, &w, routes[i % 3], true, 1, fresh);
        check_account(m);
        assert_true(count_routes(m) <= 1 + 3 + 16); /* the base, hard routes, mixtures */
        if (i % 10 != 9) continue;
        assert_true(i < 19 || m->spare != NULL);
        obm_model *other = open_model(&w, false, 0);
        get_logits(other, &w, soft, true, 1, fresh);
        assert_memory_equal(used, fresh, sizeof used);
        obm_model_free(other);
    }
    obm_model_free(m);
    close_world(&w);
}

static obm__weights *acquire(obm_model *m, const double *route) {
    obm__weights *w;
    obm_error err;
    check_ok(obm__weights_acquire(m, route, &w, &err), &err);
    return w;
}

/* At lambda 0 an expert that is the base's in the head does not matter there, whatever its weight. */
static void overlays_are_shared_and_freed(void **state) {
    (void)state;
    world w = {.c = {"llama", 150, 70, 130, 1, 5, 5, 14, 0, 0, OBM_F32, 3, NULL},
               .tasks = 3,
               .spec = {{.same = {"lm_head", "embed_tokens", "norm"}},
                        {.same = {"norm", "embed_tokens"}},
                        {.same = {"lm_head", "embed_tokens", "norm"}}}};
    static const double alike[][3] = {{0, 0.5, 0}, {0.3, 0.5, 0}, {0.1, 0.5, 0.7}}, other[3] = {0, 0.25, 0};
    open_world(&w, 2);
    w.pack->settings.lambda = 0;
    obm_model *m = open_model(&w, false, 1);
    obm__weights *first = acquire(m, alike[0]), *second = acquire(m, alike[1]), *third = acquire(m, alike[2]);
    assert_int_equal(m->overlay_bytes, 150 * 70 * 4);
    assert_ptr_equal(obm__weights_at(first, 0, OBM_HEAD)->data, obm__weights_at(third, 0, OBM_HEAD)->data);
    assert_int_equal(m->overlays->refs, 3);
    obm__weights *fourth = acquire(m, other);
    assert_int_equal(m->overlay_bytes, 2 * 150 * 70 * 4);
    check_account(m);
    obm__weights_release(m, first);
    obm__weights_release(m, third);
    assert_int_equal(m->overlay_bytes, 2 * 150 * 70 * 4);
    obm__weights_release(m, second);
    obm__weights_release(m, fourth);
    assert_null(m->overlays);
    assert_int_equal(m->overlay_bytes, 0);
    check_account(m);
    obm_model_free(m);
    close_world(&w);
}

/* An overlay is what it is under the weights that matter, whoever asks for it first. */
static void overlays_do_not_depend_on_who_came_first(void **state) {
    (void)state;
    world w = {.c = {"llama", 150, 70, 130, 1, 5, 5, 14, 0, 0, OBM_F32, 3, NULL},
               .tasks = 3,
               .spec = {{.same = {"lm_head"}}, {.same = {"lm_head"}}, {.copy_of = 0}}};
    static const double one[3] = {0.7, 0, 0.3}, two[3] = {0.4, 0.3, 0.3}; /* 0.4 + 0.3 == 0.7, but not its products */
    float expected[150], got[150];
    open_world(&w, 2);
    w.pack->settings.lambda = 0.3;
    for (int i = 0; i < 2; i++) {
        obm_model *m = open_model(&w, false, 0);
        obm__weights *a = acquire(m, i ? two : one), *b = acquire(m, i ? one : two);
        size_t head_bytes = 150 * 70 * 4;
        float *before = (float *)obm__weights_at(i ? b : a, 0, OBM_HEAD)->data;
        assert_ptr_equal(obm__weights_at(a, 0, OBM_HEAD)->data, obm__weights_at(b, 0, OBM_HEAD)->data);
        static float kept[150 * 70];
        if (i) assert_memory_equal(before, kept, head_bytes);
        memcpy(kept, before, head_bytes);
        get_logits(m, &w, two, false, 1, i ? got : expected);
        obm__weights_release(m, a);
        obm__weights_release(m, b);
        obm_model_free(m);
    }
    assert_memory_equal(got, expected, sizeof got);
    close_world(&w);
}

/* Dense weights at lambda 0: a hard route with vocabulary of its own and a soft one that only adds an expert which is
 * the base's there agree in all weights that matter, but not in their rows. */
static void extra_rows_tell_overlays_apart(void **state) {
    (void)state;
    static const obm_map_rule map[] = {{"*embed_tokens*", OBM_MODE_1BIT}, {"lm_head*", OBM_MODE_1BIT}};
    world w = {.c = {"llama", 150, 70, 130, 1, 5, 5, 14, 0, 0, OBM_F32, 3, NULL},
               .tasks = 2,
               .spec = {{.same = {"embed_tokens", "lm_head"}}, {.extra = 3, .map = map, .n_map = 2}}};
    static const double hard[2] = {0, 1}, soft[2] = {0.5, 1};
    open_world(&w, 2);
    w.pack->settings.lambda = 0;
    obm_model *m = open_model(&w, true, 0);
    obm__weights *a = acquire(m, hard), *b = acquire(m, soft);
    assert_int_equal(obm__weights_vocab(a), 153);
    assert_int_equal(obm__weights_vocab(b), 150);
    obm__weights_release(m, a);
    obm__weights_release(m, b);
    obm_model_free(m);
    close_world(&w);
}

static void changed_settings_are_noticed(void **state) {
    (void)state;
    world w;
    float before[150], after[150], fresh[150];
    open_plain(&w, 2, true);
    w.pack->settings.lambda = 0.3;
    obm_model *m = open_model(&w, false, 0);
    for (int change = 0; change < 3; change++) {
        get_logits(m, &w, routes[1], true, 1, before);
        obm__weights *old = acquire(m, routes[1]); /* runs on, as it was */
        if (change == 0) w.pack->settings.lambda = 1;
        if (change == 1) w.pack->settings.reading = OBM_READING_RECOMPUTED;
        if (change == 2) w.pack->settings.density = 0.1;
        get_logits(m, &w, routes[1], true, 1, after);
        obm_model *other = open_model(&w, false, 0);
        get_logits(other, &w, routes[1], true, 1, fresh);
        obm_model_free(other);
        assert_memory_equal(after, fresh, sizeof after);
        assert_memory_not_equal(after, before, sizeof after);
        obm__weights_release(m, old);
        assert_int_equal(count_routes(m), 2); /* the base and the new one */
        check_account(m);
    }
    obm_model_free(m);
    close_world(&w);
}

/* ---- packs that change ---- */

static obm_status replace_expert(world *w, int k, bool remove_first, obm_error *err) {
    obm_expert e = OBM_INIT(obm_expert);
    obm_compress_options o = OBM_INIT(obm_compress_options);
    e.name = task_names[k];
    e.path = w->dir[k + 1];
    o.overwrite = true;
    if (remove_first) OBM_TRY(obm_pack_remove(w->pack, e.name, err));
    return obm_pack_add(w->pack, &e, &o, err);
}

/* A callback of a call that runs on the pack tries to change it. */
typedef struct meddler {
    world *w;
    obm_status add, remove, set, train;
} meddler;

static obm_status meddle(void *user, obm_request *request, double *weights, obm_error *err) {
    meddler *md = user;
    obm_pack *p = md->w->pack;
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    obm_prompt prompt = {.ids = md->w->ids, .n_ids = 5};
    const char *task = obm_pack_task_name(p, 0);
    (void)request;
    obm_pack_get_settings(p, &s);
    md->add = replace_expert(md->w, 0, 0, err);
    md->remove = obm_pack_remove(p, task, err);
    md->set = obm_pack_set_settings(p, &s, err);
    md->train = obm_router_train(p, &prompt, &task, 1, NULL, NULL, err);
    weights[0] = 1;
    return OBM_OK;
}

static void a_pack_in_use_does_not_change(void **state) {
    (void)state;
    obm_error err;
    world w = {.c = {"llama", 150, 70, 130, 1, 5, 5, 14, 0, 1, OBM_F32, 3, NULL}, .tasks = 3};
    double weights[3] = {0};
    open_world(&w, 2);
    meddler md = {.w = &w};
    obm_model *m = open_model(&w, false, 0);
    obm_prompt p = {.ids = w.ids, .n_ids = 5};
    obm_generate_options o = OBM_INIT(obm_generate_options);
    obm_completion c;
    check_ok(obm_model_route(m, &p, meddle, &md, weights, NULL, &err), &err);
    assert_true(md.add == OBM_E_BUSY && md.remove == OBM_E_BUSY && md.set == OBM_E_BUSY && md.train == OBM_E_BUSY);
    o.router = meddle;
    o.router_user = &md;
    o.max_tokens = 2;
    md = (meddler){.w = &w};
    check_ok(obm_model_generate_batch(m, &p, 1, &o, &c, &err), &err);
    assert_true(md.add == OBM_E_BUSY && md.remove == OBM_E_BUSY && md.set == OBM_E_BUSY && md.train == OBM_E_BUSY);
    obm_completion_clear(&c);
    check_ok(obm_pack_remove(w.pack, obm_pack_task_name(w.pack, 0), &err), &err); /* it is given back */
    obm_model_free(m);
    close_world(&w);
}

/* What a model holds of an expert is gone with it: a clear error, also where as many experts are there again. */
static void other_experts_need_another_model(void **state) {
    (void)state;
    obm_error err;
    for (int remove_first = 0; remove_first < 2; remove_first++) {
        world w = {.c = {"llama", 150, 70, 130, 1, 5, 5, 14, 0, 1, OBM_F32, 3, NULL},
                   .tasks = 3,
                   .spec = {{.own_head = true}}};
        float logits[150];
        open_world(&w, 2);
        obm_model *m = open_model(&w, false, 0);
        obm_prompt p = {.ids = w.ids, .n_ids = 5};
        obm_generate_options o = OBM_INIT(obm_generate_options);
        obm_run_options run = OBM_INIT(obm_run_options);
        obm_stream *stream;
        const char *text;
        size_t len;
        run.route = o.routes = routes[1];
        o.n_routes = 1;
        o.ignore_eos = true;
        get_logits(m, &w, routes[5], true, 1, logits);
        check_ok(obm_stream_open(m, &p, &o, &stream, &err), &err);
        check_ok(replace_expert(&w, 0, remove_first, &err), &err);
        assert_int_equal(obm_stream_next(stream, &text, &len, &err), OBM_E_ARG);
        assert_non_null(strstr(err.message, "open it again"));
        obm_stream_free(stream);
        assert_int_equal(obm_model_logits(m, w.ids, 1, &run, logits, &err), OBM_E_ARG);
        assert_non_null(strstr(err.message, "open it again"));
        obm_model_free(m);
        m = open_model(&w, false, 0);
        get_logits(m, &w, routes[1], true, 1, logits);
        obm_model_free(m);
        close_world(&w);
    }
}

/* ---- overlays beside sequences that run ---- */

/* A head of 20000 rows that every expert has of its own: tens of ms of merging, and steps of less than one. */
#define BIG 20000
static void open_big(world *w) {
    *w = (world){.c = {"llama", BIG, 70, 20, 1, 5, 5, 14, 0, 0, OBM_BF16, 3, NULL}, .tasks = 3};
    for (int k = 0; k < 3; k++) w->spec[k].same[0] = "embed_tokens";
    open_world(w, 2);
    w->pack->settings.lambda = 0.3;
}

static void a_sequence_runs_on_while_overlays_are_built(void **state) {
    (void)state;
    world w;
    obm_error err;
    open_big(&w);
    obm_model *m = open_model(&w, false, 0), *other = open_model(&w, false, 0);
    obm__sequence *s;
    obm__weights *built = NULL, *expected = acquire(other, routes[5]);
    int steps = 0;
    check_ok(obm__model_enter(m, NULL, &err), &err);
    check_ok(obm__sequence_new(m, routes[1], OBM_F32, &s, &err), &err);
    check_ok(obm__sequence_reserve(m, s, 190, &err), &err);
    m->decoding = true;
    check_ok(obm__weights_admit(m, routes[5], &built, &err), &err);
    assert_null(built);
    assert_non_null(m->building);
    while (!built) {
        obm__row row = {s, s->length % 190, w.ids[0]};
        check_ok(obm__forward(m, &row, 1, false, 1, &err), &err);
        s->length++;
        steps++;
        check_ok(obm__weights_admit(m, routes[5], &built, &err), &err);
    }
    assert_true(steps >= 1);
    const obm__matrix *head = obm__weights_at(built, 0, OBM_HEAD), *same = obm__weights_at(expected, 0, OBM_HEAD);
    assert_int_equal(head->dtype, same->dtype);
    assert_memory_equal(head->data, same->data, (size_t)BIG * 70 * obm_dtype_size(head->dtype));
    obm__weights_release(m, built);
    obm__sequence_free(m, s);
    obm__model_leave(m);
    obm__weights_release(other, expected);
    obm_model_free(other);
    obm_model_free(m);
    close_world(&w);
}

static void a_build_can_be_left(void **state) {
    (void)state;
    world w;
    obm_error err;
    obm__weights *none, *got;
    open_big(&w);
    obm_model *m = open_model(&w, false, 0);
    for (int i = 0; i < 4; i++) {
        check_ok(obm__model_enter(m, NULL, &err), &err);
        m->decoding = true;
        check_ok(obm__weights_admit(m, routes[4], &none, &err), &err);
        assert_null(none);
        assert_non_null(m->building);
        obm__model_leave(m);
        assert_null(m->building);
        check_account(m);
    }
    got = acquire(m, routes[4]); /* and made here after all */
    obm__weights_release(m, got);
    m->decoding = true;
    check_ok(obm__weights_admit(m, routes[5], &none, &err), &err);
    obm_model_free(m); /* while the thread builds */
    close_world(&w);
}

static int stop_always(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)user, (void)what, (void)done, (void)total;
    return 1;
}

static void waiting_for_a_build_can_be_stopped(void **state) {
    (void)state;
    world w;
    obm_error err;
    obm__weights *none;
    obm__pulse pulse = {.fn = stop_always, .what = "generate"};
    open_big(&w);
    obm_model *m = open_model(&w, false, 0);
    check_ok(obm__model_enter(m, NULL, &err), &err);
    m->decoding = true;
    check_ok(obm__weights_admit(m, routes[5], &none, &err), &err);
    m->decoding = false; /* nothing runs any more, so it is waited for */
    m->pulse = &pulse;
    assert_int_equal(obm__weights_admit(m, routes[5], &none, &err), OBM_E_USER);
    obm__model_leave(m);
    assert_null(m->building);
    check_account(m);
    obm_model_free(m);
    close_world(&w);
}

static int stop_at_third(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)user, (void)what, (void)total;
    return done >= 3;
}

/* The first of three runs into the last position soon, and the next prompt comes in while the others decode. */
static obm_status run_batch(obm_model *m, const world *w, bool stops, size_t n, size_t first, obm_completion *out,
                            obm_error *err) {
    obm_prompt p[N_ROUTES];
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.max_tokens = 20;
    o.ignore_eos = true;
    o.routes = routes[first];
    o.n_routes = n;
    o.batch = n < 3 ? n : 3;
    o.progress = stops ? stop_at_third : NULL;
    for (size_t i = 0; i < n; i++)
        p[i] = (obm_prompt){.ids = w->ids + first + i, .n_ids = (first + i) % 3 ? 10 + first + i : 197};
    return obm_model_generate_batch(m, p, n, &o, out, err);
}

static void batches_with_builds_equal_requests_alone(void **state) {
    (void)state;
    world w;
    obm_error err;
    obm_completion together[N_ROUTES], alone;
    open_big(&w);
    obm_model *m = open_model(&w, false, 0), *fresh = open_model(&w, false, 0);
    check_ok(run_batch(m, &w, false, N_ROUTES, 0, together, &err), &err);
    for (size_t i = 0; i < N_ROUTES; i++) {
        check_ok(run_batch(fresh, &w, false, 1, i, &alone, &err), &err);
        assert_int_equal(alone.n_ids, together[i].n_ids);
        assert_memory_equal(alone.ids, together[i].ids, alone.n_ids * sizeof *alone.ids);
        obm_completion_clear(&alone);
        obm_completion_clear(&together[i]);
    }
    obm_model_free(fresh);
    fresh = open_model(&w, false, 0);
    assert_int_equal(run_batch(fresh, &w, true, N_ROUTES, 0, together, &err), OBM_E_USER);
    assert_null(fresh->building);
    check_account(fresh);
    check_ok(run_batch(fresh, &w, false, 1, 5, &alone, &err), &err); /* it is usable */
    obm_completion_clear(&alone);
    obm_model_free(fresh);
    obm_model_free(m);
    close_world(&w);
}

/* ---- numbers that are none ---- */

static void activations_that_are_no_numbers_are_refused(void **state) {
    (void)state;
    world w;
    obm_error err;
    static const double huge[2][3] = {{1e30, 0, 0}, {1e300, 0, 0}}; /* products overflow; coefficients do */
    obm_completion out;
    obm_prompt p = {0};
    open_plain(&w, 2, false);
    obm_model *m = open_model(&w, false, 0);
    obm_generate_options o = OBM_INIT(obm_generate_options);
    p.ids = w.ids;
    p.n_ids = 5;
    o.n_routes = 1;
    for (int i = 0; i < 2; i++) {
        o.routes = huge[i];
        assert_int_equal(obm_model_generate_batch(m, &p, 1, &o, &out, &err), OBM_E_VALUE);
    }
    o.routes = routes[1];
    o.max_tokens = 2;
    check_ok(obm_model_generate_batch(m, &p, 1, &o, &out, &err), &err);
    obm_completion_clear(&out);
    obm_model_free(m);
    close_world(&w);
}

/* ---- anything ---- */

static unsigned pick(unsigned *state, unsigned n) { return tiny_random(state) % n; }

static void random_world(world *w, unsigned seed) {
    static const char *const policies[] = {"linear", "attention", "mlp", "full"}, *const scales[] = {"matrix", "row",
                                                                                                     "group:64"};
    static const char *const parts[] = {"embed_tokens", "lm_head", "norm", "mlp", "q_proj", "self_attn"};
    static const obm_map_rule map[] = {{"*embed_tokens*", OBM_MODE_1BIT}, {"lm_head*", OBM_MODE_1BIT}};
    unsigned s = seed * 7919;
    *w = (world){.c = {"llama", 40 + (int)pick(&s, 90), 12 * (1 + (int)pick(&s, 8)), 10 + (int)pick(&s, 150), 1, 4, 2,
                       6, 0, (int)pick(&s, 2), OBM_F32, seed, NULL},
                 .tasks = 1 + (int)pick(&s, 4)};
    for (int k = 0; k < w->tasks; k++) {
        expert_spec *e = &w->spec[k];
        *e = (expert_spec){.policy = policies[pick(&s, 4)],
                           .scale = scales[pick(&s, 3)],
                           .planes = 1 + (int)pick(&s, 2),
                           .dtype = (int)pick(&s, 4),
                           .map = map,
                           .n_map = pick(&s, 3)};
        for (unsigned i = 0, n = pick(&s, 3); i < n; i++) e->same[i] = parts[pick(&s, 6)];
        if (k && !pick(&s, 5)) e->copy_of = k;
        if (k && e->copy_of)
            e->own_head = w->spec[e->copy_of - 1].own_head, e->extra = w->spec[e->copy_of - 1].extra;
        else {
            e->own_head = w->c.tied && !pick(&s, 4);
            e->extra = pick(&s, 4) ? 0 : (int)pick(&s, 80);
        }
    }
}

/* On planes and dense: prefill within rounding, decode within the tables' error (test_planes.c). */
static void any_pack_runs_as_its_dense_weights(void **state) {
    (void)state;
    for (unsigned seed = 1; seed <= 20; seed++) {
        world w;
        random_world(&w, seed);
        open_world(&w, 2);
        obm_model *m = open_model(&w, false, 0), *dense = open_model(&w, true, 0);
        unsigned s = seed;
        size_t width = (size_t)m->vocab;
        float *a = malloc(3 * width * sizeof *a), *b = malloc(3 * width * sizeof *b);
        for (int i = 0; i < 10; i++) {
            double route[MAX_TASKS] = {0};
            w.pack->settings.lambda = 0.5 * pick(&s, 3);
            w.pack->settings.reading = pick(&s, 2) ? OBM_READING_RECOMPUTED : OBM_READING_ONTO_BASE;
            w.pack->settings.density = pick(&s, 2) ? 1 : 0.3;
            for (int k = 0; k < w.tasks; k++) route[k] = pick(&s, 2) ? pick(&s, 9) / 8.0 : 0;
            if (pick(&s, 2)) {
                memset(route, 0, sizeof route);
                route[pick(&s, (unsigned)w.tasks)] = 1;
            }
            get_logits(dense, &w, route, false, 3, b);
            for (int decode = 0; decode < 2; decode++) {
                double scale = 0, worst = 0;
                get_logits(m, &w, route, decode, 3, a);
                for (size_t j = 0; j < 3 * width; j++) {
                    assert_true(isfinite(a[j]) || (a[j] == -INFINITY && b[j] == -INFINITY));
                    if (a[j] == -INFINITY) continue;
                    scale = fmax(scale, fabs(b[j]));
                    worst = fmax(worst, fabs((double)a[j] - b[j]));
                }
                if (!(worst < (decode ? 1e-3 : 1e-4) * scale))
                    fail_msg("seed %u, %d: off by %g of %g", seed, i, worst, scale);
            }
            check_account(m);
        }
        free(a);
        free(b);
        obm_model_free(m);
        obm_model_free(dense);
        close_world(&w);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bits_do_not_depend_on_threads),
        cmocka_unit_test(a_prompt_in_chunks_is_the_whole_prompt),
        cmocka_unit_test(steps_of_many_routes_are_steps_alone),
        cmocka_unit_test(switching_routes_moves_no_weights),
        cmocka_unit_test(soft_routes_stay_within_the_budget),
        cmocka_unit_test(few_mixtures_are_kept),
        cmocka_unit_test(overlays_are_shared_and_freed),
        cmocka_unit_test(overlays_do_not_depend_on_who_came_first),
        cmocka_unit_test(extra_rows_tell_overlays_apart),
        cmocka_unit_test(changed_settings_are_noticed),
        cmocka_unit_test(other_experts_need_another_model),
        cmocka_unit_test(a_pack_in_use_does_not_change),
        cmocka_unit_test(a_sequence_runs_on_while_overlays_are_built),
        cmocka_unit_test(a_build_can_be_left),
        cmocka_unit_test(waiting_for_a_build_can_be_stopped),
        cmocka_unit_test(batches_with_builds_equal_requests_alone),
        cmocka_unit_test(activations_that_are_no_numbers_are_refused),
        cmocka_unit_test(any_pack_runs_as_its_dense_weights),
    };
    return cmocka_run_group_tests_name("plane_routes", tests, NULL, NULL);
}
