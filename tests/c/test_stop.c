/*
 * How long calls work between two looks at their progress callback, or at the context's interrupt, on a matrix of a
 * real model's size: what a Ctrl-C has to wait for.  Counted in processor time of one thread, so that what else the
 * machine does matters little, and relative to a loop of this file, so that sanitizers and emulators slow both alike.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "io_fixture.h"
#include "merge/merge.h"

#include <time.h>

#define NAME "model.layers.0.mlp.up_proj.weight"
#define COLS 4096
/* Seconds: the period of 50 ms and a slice of work, three times over for a processor that others use too; what looks at
 * its end only takes longer. */
#define BOUND 0.4

static obm_context *ctx;
static obm_error err;
static size_t rows;  /* of the matrix */
static double limit; /* BOUND, or more where this program runs slowly */

static double spent(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint32_t next(uint32_t *state) { return *state = *state * 1664525u + 1013904223u; }

/* Four million steps of arithmetic and a look-up take 10 ms of a usual processor, and at most 15. */
static double slowness(void) {
    static uint32_t table[256];
    volatile uint32_t keep;
    uint32_t x = 1;
    double begin = spent();
    for (int i = 0; i < 4000000; i++) keep = table[x >> 24] ^= next(&x);
    (void)keep;
    double times = (spent() - begin) / 0.015;
    return times < 1 ? 1 : times;
}

/* ---- watching ---- */

static struct watch {
    double last, longest;
    size_t looks, stop_at; /* 0: never */
} seen;

static int look(void) {
    double now = spent();
    if (now - seen.last > seen.longest) seen.longest = now - seen.last;
    seen.last = now;
    seen.looks++;
    return seen.stop_at && seen.looks >= seen.stop_at;
}

static int on_progress(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)user;
    assert_non_null(what);
    assert_true(done <= total);
    return look();
}

static int on_interrupt(void *user) {
    (void)user;
    return look();
}

typedef obm_status (*call_fn)(obm_progress_fn progress);

static void check_longest(const char *name) {
    print_message("%s: %.3f s without a look, at most %.3f\n", name, seen.longest, limit);
    if (seen.longest > limit) fail_msg("%s: %.3f s without a look, at most %.3f", name, seen.longest, limit);
}

/* To its end, then stopped at once: a quick machine looks only once. */
static void check_call(call_fn call, const char *name) {
    seen = (struct watch){.last = spent()};
    if (call(on_progress) != OBM_OK) fail_msg("%s: %s", name, err.message);
    look();
    check_longest(name);
    seen = (struct watch){.last = spent(), .stop_at = 1};
    assert_int_equal(call(on_progress), OBM_E_USER);
    assert_int_equal(seen.looks, 1);
}

/* ---- a base and two experts of one matrix ---- */

static void write_checkpoint(const char *folder, uint32_t seed) {
    static uint16_t block[1 << 16];
    char header[256], path[512];
    size_t bytes = rows * COLS * sizeof *block;
    snprintf(header, sizeof header, "{\"" NAME "\":{\"dtype\":\"BF16\",\"shape\":[%zu,%d],\"data_offsets\":[0,%zu]}}",
             rows, COLS, bytes);
    snprintf(path, sizeof path, "%s/model.safetensors", in_dir(folder));
    assert_int_equal(mkdir(in_dir(folder), 0777), 0);
    put_safetensors(path, header, NULL, 0);
    FILE *f = fopen(path, "ab");
    assert_non_null(f);
    for (size_t at = 0; at < bytes; at += sizeof block) {
        for (size_t i = 0; i < sizeof block / sizeof *block; i++) /* [1, 2): finite */
            block[i] = (uint16_t)(0x3f80 | (next(&seed) >> 25));
        assert_int_equal(fwrite(block, sizeof block, 1, f), 1);
    }
    assert_int_equal(fclose(f), 0);
}

static obm_pack *pack;
static obm_checkpoint *base, *expert;
static obm_task_vector *vector;
static float *values; /* (rows, COLS) */

static obm_status compress_as(const char *policy, const char *out, obm_progress_fn progress, obm_pack **opened) {
    obm_compress_options o = OBM_INIT(obm_compress_options);
    obm_expert e[2] = {OBM_INIT(obm_expert), OBM_INIT(obm_expert)};
    e[0].name = "a";
    e[0].path = in_dir("one");
    e[1].name = "b";
    e[1].path = in_dir("two");
    e[0].policy = e[1].policy = policy;
    o.overwrite = true;
    o.progress = progress;
    return obm_compress(ctx, in_dir("base"), e, 2, &o, in_dir(out), NULL, opened, &err);
}

static int setup(void **state) {
    obm_context_options o = OBM_INIT(obm_context_options);
    double times = slowness();
    /* valgrind slows vectors down more than that loop. */
    const char *patience = getenv("ONEBITMERGE_TEST_PATIENCE");
    limit = BOUND * times * (patience ? atof(patience) : 1);
    rows = times < 4 ? 8192 : 1024;
    o.threads = 1;
    o.interrupt = on_interrupt;
    if (fixture_make(state) || obm_context_new(&o, &ctx, &err) != OBM_OK) return -1;
    write_checkpoint("base", 1);
    write_checkpoint("one", 2);
    write_checkpoint("two", 3);
    values = malloc(rows * COLS * sizeof *values);
    return values && !obm_checkpoint_open(ctx, in_dir("base"), &base, &err) &&
                   !obm_checkpoint_open(ctx, in_dir("one"), &expert, &err) &&
                   !obm_task_vector_new(base, expert, &vector, &err) && !compress_as("linear", "pack", NULL, &pack)
               ? 0
               : -1;
}

static int teardown(void **state) {
    obm_pack_free(pack);
    obm_task_vector_free(vector);
    obm_checkpoint_free(expert);
    obm_checkpoint_free(base);
    obm_context_free(ctx);
    free(values);
    return fixture_remove(state);
}

/* ---- the calls ---- */

static const double route[] = {0.5, 0.5};

static obm_status run_stats(obm_progress_fn progress) {
    obm_delta_stats out[OBM_CLASS_COUNT];
    return obm_task_vector_stats(ctx, vector, progress, NULL, out, &err);
}

static obm_status run_compare(obm_progress_fn progress) {
    obm_delta_pair out[OBM_CLASS_COUNT];
    return obm_task_vector_compare(ctx, vector, vector, progress, NULL, out, &err);
}

static obm_status run_compress(obm_progress_fn progress) { return compress_as("linear", "new", progress, NULL); }
static obm_status run_verify(obm_progress_fn progress) { return obm_pack_verify(pack, progress, NULL, &err); }

static obm_status run_export(obm_progress_fn progress) {
    obm_export_options o = OBM_INIT(obm_export_options);
    o.overwrite = true;
    o.progress = progress;
    return obm_pack_export(pack, route, &o, in_dir("exported"), NULL, &err);
}

static obm_status run_merge(obm_progress_fn progress) {
    obm_merge_options o = OBM_INIT(obm_merge_options);
    o.overwrite = true;
    o.progress = progress;
    o.directory = fixture_dir;
    return obm_merge(ctx,
                     "{\"merge_method\": \"ties\", \"base_model\": \"base\", \"parameters\": {\"density\": 0.3, "
                     "\"weight\": 1}, \"models\": "
                     "[{\"model\": \"one\"}, {\"model\": \"two\"}]}",
                     &o, in_dir("merged"), NULL, &err);
}

/* Without a progress callback of their own. */
static obm_status run_tensor_stats(obm_progress_fn progress) {
    obm_delta_stats out;
    (void)progress;
    return obm_task_vector_tensor_stats(ctx, vector, NAME, &out, &err);
}

static obm_status run_read_values(obm_progress_fn progress) {
    (void)progress;
    return obm_task_vector_read(vector, NAME, values, &err);
}

static obm_status run_sha256(obm_progress_fn progress) {
    char hex[65];
    (void)progress;
    return obm_checkpoint_sha256(base, NAME, hex, &err);
}

static obm_status run_materialise(obm_progress_fn progress) {
    (void)progress;
    return obm_pack_materialise(pack, route, NAME, values, &err);
}

static obm_status run_merge_tensors(obm_progress_fn progress) {
    obm_tensor t[3];
    obm_param params[] = {{"density", -1, 0.3}, {"weight", -1, 1}};
    (void)progress;
    OBM_TRY(obm_checkpoint_get(base, NAME, &t[0], &err));
    OBM_TRY(obm_checkpoint_get(expert, NAME, &t[1], &err));
    t[2] = t[1];
    return obm_merge_tensors(ctx, "ties", OBM_PROFILE_DEFAULT, &t[0], &t[1], 2, params, 2, 0, values, &err);
}

static double spent_by_all(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Scales of groups: one matrix takes long, and the caller looks while another thread works.  What counts is how much of
 * the work is done although the first look says stop. */
static void grouped_scales(void **state) {
    static const char *const names[] = {"a", "b", "c", "d"};
    const char *one = in_dir("one"), *two = in_dir("two");
    obm_expert e[4];
    obm_tensor_run run;
    obm_pack *p;
    (void)state;
    for (int i = 0; i < 4; i++) {
        e[i] = OBM_INIT(obm_expert);
        e[i].name = names[i];
        e[i].path = i % 2 ? one : two;
        e[i].scale = "group:64";
    }
    seen = (struct watch){0};
    assert_int_equal(obm_compress(ctx, in_dir("base"), e, 4, NULL, in_dir("grouped"), NULL, &p, &err), OBM_OK);
    double begin = spent_by_all();
    assert_int_equal(obm_pack_runs(p, &run, &err), OBM_OK);
    double whole = spent_by_all() - begin;
    assert_int_equal(run.hard, OBM_RUN_PLANES);
    seen = (struct watch){.stop_at = 1};
    begin = spent_by_all();
    assert_int_equal(obm_pack_runs(p, &run, &err), OBM_E_USER);
    double took = spent_by_all() - begin;
    assert_string_equal(err.message, "runs: interrupted");
    print_message("runs: %.3f s, stopped after %.3f s\n", whole, took);
    if (took > whole / 2) fail_msg("runs: %.3f s of %.3f s although it was told to stop", took, whole);
    obm_pack_free(p);
}

/* A vocabulary's padding rows, the means of all others, before a merge reads anything: watched as above. */
static void filled_rows(void **state) {
    enum { INPUTS = 4 };
    obm_tensor sources[INPUTS];
    const obm__pair *changes[INPUTS] = {NULL};
    (void)state;
    obm__row *maps = calloc(INPUTS * (rows + 1), sizeof *maps);
    assert_non_null(maps);
    for (size_t i = 0; i < INPUTS * (rows + 1); i++)
        maps[i] = (obm__row){.row = (uint32_t)(i % (rows + 1)), .input = (uint16_t)(i / (rows + 1))};
    for (int i = 0; i < INPUTS; i++) assert_int_equal(obm_checkpoint_get(base, NAME, &sources[i], &err), OBM_OK);
    obm__rows r = {.n = INPUTS, .sources = sources, .changes = changes, .maps = maps};
    r.rows = rows + 1, r.filled = rows, r.cols = COLS;
    obm__run run = {.ctx = ctx, .progress = on_progress, .what = "merge"};
    seen = (struct watch){0};
    double begin = spent_by_all();
    assert_int_equal(obm__rows_fill(&run, &r, &err), OBM_OK);
    double whole = spent_by_all() - begin;
    assert_non_null(r.made);
    assert_true(r.made[0] > 1 && r.made[0] < 2);
    obm_free(r.made);
    r.made = NULL;
    seen = (struct watch){.stop_at = 1};
    begin = spent_by_all();
    assert_int_equal(obm__rows_fill(&run, &r, &err), OBM_E_USER);
    double took = spent_by_all() - begin;
    assert_string_equal(err.message, "merge: stopped by the progress callback");
    assert_null(r.made);
    print_message("rows: %.3f s, stopped after %.3f s\n", whole, took);
    if (took > whole / 2) fail_msg("rows: %.3f s of %.3f s although it was told to stop", took, whole);
    free(maps);
}

/* Some megabytes of words, and of one word. */
static obm_tokenizer *tokenizer;
static char *text;
static size_t text_size;

static obm_status run_encode(obm_progress_fn progress) {
    int32_t *ids = NULL;
    size_t n;
    (void)progress;
    obm_status status = obm_tokenizer_encode(tokenizer, text, text_size, false, &ids, &n, &err);
    obm_free(ids);
    return status;
}

static obm_status run_decode(obm_progress_fn progress) {
    static int32_t ids[1 << 20];
    char *out = NULL;
    size_t n;
    (void)progress;
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) ids[i] = (int32_t)(i * 7919 % 700);
    obm_status status = obm_tokenizer_decode(tokenizer, ids, text_size / 2, false, &out, &n, &err);
    obm_free(out);
    return status;
}

static void long_texts(void **state) {
    static const char words[] = "Tom has 3 apples, and buys 12 more. ";
    (void)state;
    assert_int_equal(obm_tokenizer_open(ctx, OBM_SOURCE_DIR "/examples/models/base", &tokenizer, &err), OBM_OK);
    text_size = rows << 7; /* a megabyte */
    text = malloc(text_size);
    assert_non_null(text);
    for (size_t i = 0; i < text_size; i++) text[i] = words[i % (sizeof words - 1)];
    check_call(run_encode, "encode");
    check_call(run_decode, "decode");
    for (size_t i = 0; i < text_size; i++) text[i] = "theandhersingoutbuys"[i % 20];
    check_call(run_encode, "encode one word");
    free(text);
    obm_tokenizer_free(tokenizer);
}

/* A progress callback that is not given: the interrupt stands in for it. */
static obm_status run_without(obm_progress_fn progress) {
    (void)progress;
    return run_export(NULL);
}

/* ---- models: the example family is small, so only that they look, and that nothing is left behind ---- */

static obm_pack *family;

static obm_status run_open(obm_progress_fn progress) {
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_model *m;
    o.progress = progress;
    OBM_TRY(obm_model_from_pack(ctx, family, &o, &m, &err));
    obm_model_free(m);
    return OBM_OK;
}

static void opening_models(void **state) {
    (void)state;
    obm_expert e[2] = {OBM_INIT(obm_expert), OBM_INIT(obm_expert)};
    seen = (struct watch){0};
    e[0].name = "math";
    e[0].path = OBM_SOURCE_DIR "/examples/models/math";
    e[1].name = "code";
    e[1].path = OBM_SOURCE_DIR "/examples/models/code";
    assert_int_equal(
        obm_compress(ctx, OBM_SOURCE_DIR "/examples/models/base", e, 2, NULL, in_dir("family"), NULL, &family, &err),
        OBM_OK);
    check_call(run_open, "open");
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_model *m;
    seen = (struct watch){.last = spent(), .stop_at = 1};
    o.progress = on_progress;
    assert_int_equal(obm_model_open(ctx, in_dir("family"), &o, &m, &err), OBM_E_USER); /* while the pack is opened */
    o.struct_size = offsetof(obm_model_options, progress);
    assert_int_equal(obm_model_from_pack(ctx, family, &o, &m, &err), OBM_E_USER); /* an older caller's: the interrupt */
    seen.stop_at = 0;
    assert_int_equal(obm_model_from_pack(ctx, family, &o, &m, &err), OBM_OK);
    int32_t ids[400];
    for (int i = 0; i < 400; i++) ids[i] = i;
    float *logits = malloc(768 * sizeof *logits);
    assert_non_null(logits);
    obm_run_options r = OBM_INIT(obm_run_options);
    r.decode = true;
    seen = (struct watch){.last = spent()};
    assert_int_equal(obm_model_logits(m, ids, 400, &r, logits, &err), OBM_OK);
    check_longest("logits");
    assert_true(seen.looks >= 1);
    seen.stop_at = seen.looks + 1;
    assert_int_equal(obm_model_logits(m, ids, 400, &r, logits, &err), OBM_E_USER);
    assert_non_null(strstr(err.message, "logits: interrupted"));
    free(logits);
    obm_model_free(m);
    obm_pack_free(family);
}

#define TEST(name)                     \
    static void name(void **state) {   \
        (void)state;                   \
        check_call(run_##name, #name); \
    }
TEST(stats)
TEST(compare)
TEST(compress)
TEST(verify)
TEST(export)
TEST(merge)
TEST(tensor_stats)
TEST(read_values)
TEST(sha256)
TEST(materialise)
TEST(merge_tensors)
TEST(without)

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stats),          cmocka_unit_test(compare),       cmocka_unit_test(compress),
        cmocka_unit_test(verify),         cmocka_unit_test(export),        cmocka_unit_test(merge),
        cmocka_unit_test(tensor_stats),   cmocka_unit_test(read_values),   cmocka_unit_test(sha256),
        cmocka_unit_test(materialise),    cmocka_unit_test(merge_tensors), cmocka_unit_test(without),
        cmocka_unit_test(opening_models), cmocka_unit_test(long_texts),    cmocka_unit_test(grouped_scales),
        cmocka_unit_test(filled_rows)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
