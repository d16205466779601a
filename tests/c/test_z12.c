/* Models whose matrices go over to 12 bits per weight behind the tokens: at every moment prompts, steps, batches and
 * routes on planes give the bits of the plain model, for any number of threads; stopped calls go on later. */
#include "planes_fixture.h"

#include <sys/mman.h>

enum { N = 70, TOKENS = 24, BATCH = 3, STATES = 9 };

static world w;
static obm_error err;
static float *expected[4], *got[4]; /* of the base and of a route: all logits of a prompt, and decoded ones */
static int32_t said[BATCH][TOKENS];
static const double route[] = {0.7, 0.3};

static size_t size_of(int which) { return (size_t)(which % 2 ? 1 : N) * (size_t)w.c.vocab * sizeof(float); }

static obm_model *open_as(obm_context *ctx, obm_z12 z12) {
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_model *m;
    o.z12 = z12;
    check_ok(obm_model_open(ctx, w.pack_dir, &o, &m, &err), &err);
    return m;
}

static void run_logits(obm_model *m, float **out) {
    obm_run_options r = OBM_INIT(obm_run_options);
    for (int i = 0; i < 4; i++) {
        r.route = i < 2 ? NULL : route;
        r.all = i % 2 == 0;
        r.decode = i % 2 == 1;
        check_ok(obm_model_logits(m, w.ids, i % 2 ? 5 : N, &r, out[i], &err), &err);
    }
}

/* The last of a batch runs on planes. */
static void generate(obm_model *m, size_t n, int32_t (*out)[TOKENS], obm_progress_fn progress, obm_status expect) {
    obm_generate_options o = OBM_INIT(obm_generate_options);
    obm_prompt p[BATCH];
    obm_completion c[BATCH];
    const double routes[BATCH][2] = {{0, 0}, {0, 0}, {0.7, 0.3}};
    for (size_t i = 0; i < n; i++) p[i] = (obm_prompt){.ids = w.ids + i, .n_ids = 8};
    o.max_tokens = TOKENS;
    o.ignore_eos = true;
    o.routes = routes[0];
    o.n_routes = n;
    o.batch = n;
    o.progress = progress;
    assert_int_equal(obm_model_generate_batch(m, p, n, &o, c, &err), expect);
    for (size_t i = 0; i < n && expect == OBM_OK; i++) {
        assert_int_equal(c[i].n_ids, TOKENS);
        memcpy(out[i], c[i].ids, sizeof *out);
        obm_completion_clear(&c[i]);
    }
}

static void check_logits(obm_model *m) {
    run_logits(m, got);
    for (int i = 0; i < 4; i++)
        if (memcmp(got[i], expected[i], size_of(i))) fail_msg("logits %d differ", i);
}

static void check_text(obm_model *m, size_t n) {
    int32_t text[BATCH][TOKENS];
    generate(m, n, text, NULL, OBM_OK);
    assert_memory_equal(text, said, n * sizeof *text);
}

static uint64_t plain_of(const obm_model *m) {
    obm_model_info i;
    obm_model_describe(m, &i);
    return i.z12_plain;
}

static obm_status pack_step(obm_model *m, obm__pulse *pulse, size_t tokens) {
    check_ok(obm__model_enter(m, pulse, &err), &err);
    obm_status status = obm__z12_step(m, tokens, &err);
    obm__model_leave(m);
    return status;
}

static int setup(void **state) {
    (void)state;
    w = (world){.c = {"llama", 450, 256, 320, 2, 8, 4, 32, 0, 1, OBM_BF16, 11, NULL}, .tasks = 2};
    w.spec[0] = (expert_spec){.policy = "linear", .scale = "row"};
    w.spec[1] = (expert_spec){.policy = "attention", .scale = "matrix"};
    open_world(&w, 2);
    for (int i = 0; i < 4; i++) {
        expected[i] = calloc(1, size_of(i));
        got[i] = calloc(1, size_of(i));
    }
    obm_model *m = open_as(w.ctx, OBM_Z12_OFF);
    run_logits(m, expected);
    generate(m, BATCH, said, NULL, OBM_OK);
    assert_int_equal(plain_of(m), 0);
    obm_model_free(m);
    return 0;
}

static int teardown(void **state) {
    (void)state;
    for (int i = 0; i < 4; i++) {
        free(expected[i]);
        free(got[i]);
    }
    close_world(&w);
    return 0;
}

static void every_moment(void **state) {
    (void)state;
    for (int threads = 1; threads <= 3; threads++) {
        obm_context_options o = OBM_INIT(obm_context_options);
        obm_context *ctx;
        o.threads = threads;
        check_ok(obm_context_new(&o, &ctx, &err), &err);
        obm_model *m = open_as(ctx, OBM_Z12_OFF);
        uint64_t packed = 0;
        int states = 0;
        obm__z12_begin(m, 1, STATES);
        check_ok(pack_step(m, NULL, 1), &err);
        assert_int_equal(m->z12_saved, 0); /* the step that is waited for */
        while (m->packing) {
            check_ok(pack_step(m, NULL, 1), &err);
            if (m->z12_saved == packed) continue;
            packed = m->z12_saved;
            states++;
            check_logits(m);
            if (states % 3 == 1) check_text(m, BATCH);
        }
        assert_true(states >= 5);
        assert_int_equal(m->z12_to_come, 0);
        check_text(m, 1);
        obm_model_free(m);
        obm_context_free(ctx);
    }
}

static void behind_tokens(void **state) {
    (void)state;
    obm_model *m = open_as(w.ctx, OBM_Z12_OFF);
    obm_model_info i;
    obm_model_memory before, after;
    obm_model_account(m, &before);
    obm__z12_begin(m, 4, STATES);
    check_text(m, BATCH); /* their steps read the mapping: nothing to gain */
    obm_model_describe(m, &i);
    assert_int_equal(i.z12_plain, 0);
    assert_true(i.z12_to_come > 0);
    uint64_t all = i.z12_to_come;
    check_text(m, 1);
    obm_model_describe(m, &i);
    assert_int_equal(i.z12_to_come, 0);
    assert_int_equal(i.z12_plain, all);
    obm_model_account(m, &after);
    assert_int_equal(after.base, before.base + i.z12_bytes);
    check_logits(m);
    obm_model_free(m);
}

/* Without the mapping beside it, batches and prompts unpack. */
static void packed_alone(void **state) {
    (void)state;
    obm_model *m = open_as(w.ctx, OBM_Z12_ON);
    obm_model_memory memory;
    assert_true(m->z12_beside && !m->packing);
    m->z12_beside = false;
    obm_model_account(m, &memory);
    assert_int_equal(memory.base, m->base_bytes - m->z12_saved + m->z12_bytes);
    check_logits(m);
    check_text(m, BATCH);
    obm_model_free(m);
}

static int stop(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)what, (void)done, (void)total;
    return *(int *)user;
}

static void stopped_and_continued(void **state) {
    (void)state;
    int stops = 1;
    obm_model *m = open_as(w.ctx, OBM_Z12_OFF);
    obm__z12_begin(m, 0, 1);
    obm__pulse pulse = obm__pulse_new(w.ctx, stop, &stops, "generate", 1);
    assert_int_equal(pack_step(m, &pulse, 1), OBM_E_USER);
    assert_non_null(m->packing);
    check_logits(m);
    stops = 0;
    check_ok(pack_step(m, &pulse, 1), &err);
    assert_true(m->z12_saved > 0);
    check_text(m, 1);
    assert_null(m->packing);
    obm_model_free(m);
    m = open_as(w.ctx, OBM_Z12_OFF);
    obm__z12_begin(m, 0, 1000);
    check_ok(pack_step(m, NULL, 1), &err); /* freed in the middle of a matrix */
    obm_model_free(m);
}

static char logged[512];
static void keep_log(void *user, const char *message) {
    (void)user;
    snprintf(logged, sizeof logged, "%s", message);
}

/* Memory that was free when the model was opened is not when packing begins: asked for once, then. */
static void memory_is_gone(void **state) {
    (void)state;
    obm_context_options o = OBM_INIT(obm_context_options);
    obm_context *ctx;
    o.threads = 2;
    o.log = keep_log;
    check_ok(obm_context_new(&o, &ctx, &err), &err);
    for (int gone = 0; gone < 2; gone++) {
        obm_model *m = open_as(ctx, OBM_Z12_OFF);
        uint64_t bytes = m->base_bytes;
        obm__z12_begin(m, 1, STATES);
        check_ok(pack_step(m, NULL, 1), &err);
        assert_non_null(m->packing);
        if (!gone) check_ok(pack_step(m, NULL, 1), &err);
        m->base_bytes = UINT64_MAX / 8; /* more than there is */
        check_ok(pack_step(m, NULL, 1), &err);
        m->base_bytes = bytes;
        assert_int_equal(m->packing == NULL, gone);
        assert_int_equal(m->z12_saved == 0, gone);
        assert_int_equal(strstr(logged, "no memory to hold more matrices in 12 bits per weight") != NULL, gone);
        check_logits(m);
        obm_model_free(m);
    }
    obm_context_free(ctx);
}

static size_t pages_there(char *at, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page, n = 0;
    unsigned char *there = malloc(pages);
    assert_non_null(there);
    assert_int_equal(mincore(at, bytes, there), 0);
    for (size_t i = 0; i < pages; i++) n += there[i] & 1;
    free(there);
    return n;
}

/* Packing ends in the middle of a matrix: of its codes no page remains. */
static void codes_of_no_use_go(void **state) {
    (void)state;
    obm_context_options o = OBM_INIT(obm_context_options);
    obm_context *ctx;
    o.threads = 1;
    check_ok(obm_context_new(&o, &ctx, &err), &err);
    obm_model *m = open_as(ctx, OBM_Z12_OFF);
    obm__z12_begin(m, 0, 1000);
    check_ok(pack_step(m, NULL, 1), &err);
    assert_int_equal(m->z12_used, 0);
    assert_true(pages_there(m->z12_pages, m->z12_room) > 0);
    obm__z12_end(m);
    assert_int_equal(pages_there(m->z12_pages, m->z12_room), 0);
    check_logits(m);
    obm_model_free(m);
    obm_context_free(ctx);
}

static void small_models_stay(void **state) {
    (void)state;
    obm_model *m = open_as(w.ctx, OBM_Z12_AUTO); /* the caches hold it */
    check_text(m, 1);
    check_text(m, 1);
    assert_true(!m->packing && !m->z12);
    obm_model_free(m);
}

static size_t pages_mapped(void) {
    size_t pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%zu", &pages), 1);
    fclose(f);
    return pages;
}

/* Codes are not a number of whole pages; of ten such mappings nothing remains, not even of what aligned them. */
static void mappings_go(void **state) {
    (void)state;
    const size_t bytes = ((size_t)2 << 20) + 64, page = (size_t)sysconf(_SC_PAGESIZE), before = pages_mapped();
    for (int i = 0; i < 10; i++) {
        char *p = obm__map_huge(bytes);
        assert_non_null(p);
        assert_int_equal((uintptr_t)p % ((uintptr_t)2 << 20), 0);
        p[bytes - 1] = 1;
        obm__place_unmap(p, bytes);
    }
    assert_in_range(pages_mapped(), 0, before + ((size_t)1 << 20) / page);
}

static void names(void **state) {
    (void)state;
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_model *m;
    obm_z12 z12 = OBM_Z12_AUTO;
    const char *const all[] = {"auto", "on", "off"};
    for (int i = 0; i < 3; i++) {
        check_ok(obm_z12_find(all[i], &z12, &err), &err);
        assert_int_equal(z12, i);
    }
    assert_int_equal(obm_z12_find("yes", &z12, &err), OBM_E_ARG);
    assert_string_equal(err.message, "z12: expected auto, on or off, found \"yes\"");
    o.z12 = (obm_z12)3;
    assert_int_equal(obm_model_open(w.ctx, w.pack_dir, &o, &m, &err), OBM_E_ARG);
    assert_string_equal(err.message, "z12: expected 0 (auto) to 2 (off), found 3");
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(every_moment),
                                       cmocka_unit_test(behind_tokens),
                                       cmocka_unit_test(packed_alone),
                                       cmocka_unit_test(stopped_and_continued),
                                       cmocka_unit_test(memory_is_gone),
                                       cmocka_unit_test(codes_of_no_use_go),
                                       cmocka_unit_test(small_models_stay),
                                       cmocka_unit_test(mappings_go),
                                       cmocka_unit_test(names)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
