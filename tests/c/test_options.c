/* Structs with struct_size, each through the functions that take it: sizes of older and newer callers, and impossible
 * ones. */
#include <onebitmerge.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define MODELS OBM_SOURCE_DIR "/examples/models/"
#define TASKS 2

typedef struct fixture {
    obm_context *ctx;
    obm_pack *pack;
    obm_model *model;
    char dir[64];
} fixture;

static fixture f;

static const obm_expert experts[TASKS] = {{sizeof(obm_expert), "chat", MODELS "chat", NULL, NULL, 0, NULL, 0},
                                          {sizeof(obm_expert), "math", MODELS "math", NULL, NULL, 0, NULL, 0}};

static int set_up(void **state) {
    (void)state;
    obm_error err;
    char out[80];
    strcpy(f.dir, "/tmp/obm-options-XXXXXX");
    if (!mkdtemp(f.dir)) return -1;
    snprintf(out, sizeof out, "%s/p", f.dir);
    return obm_context_new(NULL, &f.ctx, &err) ||
           obm_compress(f.ctx, MODELS "base", experts, TASKS, NULL, out, NULL, &f.pack, &err) ||
           obm_model_open(f.ctx, MODELS "base", NULL, &f.model, &err);
}

static int tear_down(void **state) {
    (void)state;
    char command[96];
    obm_model_free(f.model);
    obm_pack_free(f.pack);
    obm_context_free(f.ctx);
    snprintf(command, sizeof command, "rm -r %s", f.dir);
    return system(command);
}

/* ---- one call per function; what each returns with its own struct is the yardstick ---- */

static obm_status context_new(void *o, obm_error *err) {
    obm_context *ctx = NULL;
    obm_status status = obm_context_new(o, &ctx, err);
    obm_context_free(ctx);
    return status;
}

static obm_status compress(void *o, obm_error *err) {
    obm_plan plan;
    ((obm_compress_options *)o)->dry_run = true;
    return obm_compress(f.ctx, MODELS "base", experts, TASKS, o, "/nowhere/at/all", &plan, NULL, err);
}

static obm_status add_options(void *o, obm_error *err) {
    const obm_expert code = {sizeof(obm_expert), "code", MODELS "code", NULL, NULL, 0, NULL, 0};
    ((obm_compress_options *)o)->dry_run = true;
    return obm_pack_add(f.pack, &code, o, err);
}

static obm_status add_expert(void *e, obm_error *err) {
    obm_compress_options o = OBM_INIT(obm_compress_options);
    o.dry_run = true;
    ((obm_expert *)e)->name = "code";
    ((obm_expert *)e)->path = MODELS "code";
    return obm_pack_add(f.pack, e, &o, err);
}

static obm_status compress_expert(void *e, obm_error *err) {
    obm_compress_options o = OBM_INIT(obm_compress_options);
    o.dry_run = true;
    ((obm_expert *)e)->name = "code";
    ((obm_expert *)e)->path = MODELS "code";
    return obm_compress(f.ctx, MODELS "base", e, 1, &o, "/nowhere/at/all", NULL, NULL, err);
}

static obm_status set_settings(void *s, obm_error *err) {
    ((obm_pack_settings *)s)->lambda = 0.25;
    ((obm_pack_settings *)s)->density = 0.5;
    return obm_pack_set_settings(f.pack, s, err);
}

static obm_status export(void *o, obm_error *err) {
    static const double route[TASKS] = {1, 0};
    ((obm_export_options *)o)->dry_run = true;
    return obm_pack_export(f.pack, route, o, "/nowhere/at/all", NULL, err);
}

static obm_status model_open(void *o, obm_error *err) {
    obm_model *m = NULL;
    obm_status status = obm_model_open(f.ctx, MODELS "base", o, &m, err);
    obm_model_free(m);
    return status;
}

static obm_status model_from_pack(void *o, obm_error *err) {
    obm_model *m = NULL;
    obm_status status = obm_model_from_pack(f.ctx, f.pack, o, &m, err);
    obm_model_free(m);
    return status;
}

static float *values(void) {
    obm_model_info info;
    obm_model_describe(f.model, &info);
    float *x = malloc((size_t)(info.vocab + info.hidden) * sizeof *x);
    assert_non_null(x);
    return x;
}

static obm_status logits(void *o, obm_error *err) {
    float *x = values();
    obm_status status = obm_model_logits(f.model, &(int32_t){5}, 1, o, x, err);
    free(x);
    return status;
}

static obm_status hidden(void *o, obm_error *err) {
    float *x = values();
    obm_status status = obm_model_hidden(f.model, &(int32_t){5}, 1, 1, o, x, err);
    free(x);
    return status;
}

static obm_status router_train(void *o, obm_error *err) { /* ARG: no examples */
    return obm_router_train(f.pack, NULL, NULL, 0, o, NULL, err);
}

static obm_status generate(void *o, obm_error *err) {
    ((obm_generate_options *)o)->max_tokens = 1;
    return obm_model_generate(f.model, "a", o, NULL, NULL, err);
}

static obm_status generate_batch(void *o, obm_error *err) {
    obm_completion c = {0};
    ((obm_generate_options *)o)->max_tokens = 1;
    obm_status status = obm_model_generate_batch(f.model, &(obm_prompt){.text = "a"}, 1, o, &c, err);
    obm_completion_clear(&c);
    return status;
}

static obm_status stream_open(void *o, obm_error *err) {
    obm_stream *s = NULL;
    obm_status status = obm_stream_open(f.model, &(obm_prompt){.text = "a"}, o, &s, err);
    obm_stream_free(s);
    return status;
}

static obm_status score(void *o, obm_error *err) {
    obm_score s = {0};
    obm_status status = obm_model_score(f.model, &(obm_score_item){.continuation = "a b"}, 1, o, &s, err);
    obm_score_clear(&s);
    return status;
}

static obm_status merge(void *o, obm_error *err) {
    static const char recipe[] = "{\"merge_method\": \"linear\", \"dtype\": \"bfloat16\", \"models\": ["
                                 "{\"model\": \"" MODELS "chat\", \"parameters\": {\"weight\": 1}},"
                                 "{\"model\": \"" MODELS "math\", \"parameters\": {\"weight\": 1}}]}";
    ((obm_merge_options *)o)->dry_run = true;
    return obm_merge(f.ctx, recipe, o, "/nowhere/at/all", NULL, err);
}

/* `cut`: what an older caller's struct may have ended before; everything that the call sets lies in front of it. */
#define CASE(function, type, cut) \
    { #function, #type, sizeof(type), offsetof(type, cut), function }
static const struct {
    const char *name, *type;
    size_t size, cut;
    obm_status (*call)(void *options, obm_error *err);
} cases[] = {
    CASE(context_new, obm_context_options, log),
    CASE(compress, obm_compress_options, profile),
    CASE(add_options, obm_compress_options, profile),
    CASE(add_expert, obm_expert, policy),
    CASE(compress_expert, obm_expert, policy),
    CASE(set_settings, obm_pack_settings, density),
    CASE(export, obm_export_options, progress),
    CASE(model_open, obm_model_options, kv),
    CASE(model_from_pack, obm_model_options, kv),
    CASE(logits, obm_run_options, decode),
    CASE(hidden, obm_run_options, decode),
    CASE(router_train, obm_router_options, seed),
    CASE(generate, obm_generate_options, temperature),
    CASE(generate_batch, obm_generate_options, temperature),
    CASE(stream_open, obm_generate_options, temperature),
    CASE(score, obm_score_options, render),
    CASE(merge, obm_merge_options, progress),
};

/* On the heap; of a newer caller's struct the bytes behind ours are `tail`. */
static obm_status call(size_t at, size_t struct_size, int tail, obm_error *err) {
    size_t size = cases[at].size, allocated = struct_size > size && struct_size <= 4096 ? struct_size : size;
    char *options = calloc(1, allocated);
    assert_non_null(options);
    memset(err, 0, sizeof *err);
    memcpy(options, &struct_size, sizeof struct_size);
    memset(options + size, tail, allocated - size);
    obm_status status = cases[at].call(options, err);
    free(options);
    return status;
}

static void test_sizes(void **state) {
    (void)state;
    obm_error err, want;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t size = cases[i].size;
        obm_status usual = call(i, size, 0, &want);
        if (usual != (cases[i].call == router_train ? OBM_E_ARG : OBM_OK))
            fail_msg("%s: %s", cases[i].name, want.message);
        /* An older caller, and newer ones. */
        const size_t fine[] = {cases[i].cut, size + 1, size + 64};
        for (size_t j = 0; j < 3; j++) {
            obm_status status = call(i, fine[j], 0, &err);
            if (status != usual || strcmp(err.message, want.message))
                fail_msg("%s, %zu: %s", cases[i].name, fine[j], err.message);
        }
        if (call(i, size + 64, 1, &err) != OBM_E_UNSUPPORTED || !strstr(err.message, cases[i].type))
            fail_msg("%s: %s", cases[i].name, err.message);
        const size_t wrong[] = {0, 4, 4097, SIZE_MAX};
        for (size_t j = 0; j < 4; j++) {
            if (call(i, wrong[j], 0, &err) != OBM_E_ARG || !strstr(err.message, cases[i].type) ||
                !strstr(err.message, "struct_size"))
                fail_msg("%s, %zu: %s", cases[i].name, wrong[j], err.message);
        }
    }
}

/* What the fields behind the cut hold is not read. */
static void test_older_caller(void **state) {
    (void)state;
    obm_error err;
    obm_model_options o = OBM_INIT(obm_model_options);
    o.kv = OBM_I64;
    assert_int_equal(model_open(&o, &err), OBM_E_ARG);
    o.struct_size = offsetof(obm_model_options, kv);
    assert_int_equal(model_open(&o, &err), OBM_OK);
    obm_generate_options g = OBM_INIT(obm_generate_options);
    g.temperature = -1;
    assert_int_equal(generate(&g, &err), OBM_E_ARG);
    g.struct_size = offsetof(obm_generate_options, temperature);
    assert_int_equal(generate(&g, &err), OBM_OK);
}

static void test_settings_are_not_written_beyond(void **state) {
    (void)state;
    obm_error err;
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    s.lambda = 0.25, s.density = 0.5, s.profile = OBM_PROFILE_PAPER;
    assert_int_equal(obm_pack_set_settings(f.pack, &s, &err), OBM_OK);
    /* Fields that an older caller does not have stay as they are. */
    obm_pack_settings older = {.struct_size = offsetof(obm_pack_settings, reading), .lambda = 0.75, .density = 9};
    assert_int_equal(obm_pack_set_settings(f.pack, &older, &err), OBM_OK);
    memset(&s, 0x77, sizeof s);
    s.struct_size = offsetof(obm_pack_settings, density);
    obm_pack_get_settings(f.pack, &s);
    assert_int_equal(s.struct_size, offsetof(obm_pack_settings, density));
    assert_true(s.lambda == 0.75 && s.profile == OBM_PROFILE_PAPER);
    for (size_t i = 0; i < sizeof s.density; i++) assert_int_equal(((unsigned char *)&s.density)[i], 0x77);
    struct {
        obm_pack_settings s;
        unsigned char more[16], guard;
    } newer;
    memset(&newer, 0x77, sizeof newer);
    newer.s.struct_size = offsetof(
                              struct {
                                  obm_pack_settings s;
                                  unsigned char more[16];
                              },
                              more) +
                          16;
    obm_pack_get_settings(f.pack, &newer.s);
    assert_true(newer.s.struct_size == sizeof s + 16 && newer.s.density == 0.5);
    for (size_t i = 0; i < 16; i++) assert_int_equal(newer.more[i], 0);
    assert_int_equal(newer.guard, 0x77);
    assert_int_equal(obm_pack_set_settings(f.pack, &newer.s, &err), OBM_OK);
    memset(&s, 0, sizeof s);
    obm_pack_get_settings(f.pack, &s); /* no size: nothing is written */
    assert_true(s.struct_size == 0 && s.lambda == 0);
}

/* Elements of another version's size: the stride is theirs. */
static void test_array_of_experts(void **state) {
    (void)state;
    typedef struct newer {
        obm_expert e;
        void *unknown;
    } newer;
    typedef struct older {
        size_t struct_size;
        const char *name, *path;
    } older;
    obm_error err;
    obm_plan want, plan;
    obm_compress_options o = OBM_INIT(obm_compress_options);
    o.dry_run = true;
    assert_int_equal(obm_compress(f.ctx, MODELS "base", experts, TASKS, &o, "/nowhere/at/all", &want, NULL, &err),
                     OBM_OK);
    newer n[TASKS] = {{experts[0], NULL}, {experts[1], NULL}};
    older l[TASKS] = {{sizeof(older), "chat", MODELS "chat"}, {sizeof(older), "math", MODELS "math"}};
    for (size_t i = 0; i < TASKS; i++) n[i].e.struct_size = sizeof(newer);
    assert_int_equal(obm_compress(f.ctx, MODELS "base", &n[0].e, TASKS, &o, "/nowhere/at/all", &plan, NULL, &err),
                     OBM_OK);
    assert_int_equal(plan.bytes_written, want.bytes_written);
    assert_int_equal(obm_compress(f.ctx, MODELS "base", (const obm_expert *)(const void *)l, TASKS, &o,
                                  "/nowhere/at/all", &plan, NULL, &err),
                     OBM_OK);
    assert_int_equal(plan.bytes_written, want.bytes_written);
    n[1].unknown = n;
    assert_int_equal(obm_compress(f.ctx, MODELS "base", &n[0].e, TASKS, &o, "/nowhere", &plan, NULL, &err),
                     OBM_E_UNSUPPORTED);
    n[1].unknown = NULL, n[1].e.struct_size = sizeof(obm_expert);
    assert_int_equal(obm_compress(f.ctx, MODELS "base", &n[0].e, TASKS, &o, "/nowhere", &plan, NULL, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "in element 1, expected that of the first"));
    assert_int_equal(obm_compress(f.ctx, MODELS "base", NULL, 1, &o, "/nowhere", &plan, NULL, &err), OBM_E_ARG);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sizes),
        cmocka_unit_test(test_older_caller),
        cmocka_unit_test(test_settings_are_not_written_beyond),
        cmocka_unit_test(test_array_of_experts),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
