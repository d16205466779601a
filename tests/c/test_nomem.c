/* Every allocation of the library fails in turn: what comes is NOMEM and nothing leaks, or success where the memory was
 * not needed; and a pack on disk is the old one or the new one, never a broken one.  Allocations inside jansson's
 * reader are left out: it cannot be told apart from bad text there (core/io/json.c asks for the memory beforehand). */
#include "delta_fixture.h"
#include "model/model.h"
#include "route/masks.h"
#include "tiny_model.h"

#include <jansson.h>
#include <pthread.h>
#include <sys/stat.h>

void *__real_malloc(size_t n);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *p, size_t n);
void *__real_aligned_alloc(size_t alignment, size_t n);
void __real_free(void *p);
json_t *__real_json_loadb(const char *text, size_t n, size_t flags, json_error_t *e);
json_t *__real_json_loads(const char *text, size_t flags, json_error_t *e);

/* ---- allocations, counted ---- */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static long countdown; /* the allocation that fails, 0: none does */
static bool fired, tracking;
static _Thread_local int reading;
enum { SLOTS = 1 << 15 }; /* many more than one attempt allocates */
static void *blocks[SLOTS];
static long live;

static bool fails(void) {
    if (reading) return false;
    pthread_mutex_lock(&mutex);
    bool now = countdown > 0 && --countdown == 0;
    fired = fired || now;
    pthread_mutex_unlock(&mutex);
    return now;
}

/* The slot of a block, or the free one where it goes; a removed block leaves `blocks` itself as a marker. */
static size_t slot_of(const void *p) {
    size_t i = ((size_t)p >> 4) * 2654435761u % SLOTS;
    while (blocks[i] && blocks[i] != p) i = (i + 1) % SLOTS;
    return i;
}

static void *note(void *p) {
    pthread_mutex_lock(&mutex);
    if (p && tracking) {
        blocks[slot_of(p)] = p;
        live++;
    }
    pthread_mutex_unlock(&mutex);
    return p;
}

static void forget(void *p) {
    pthread_mutex_lock(&mutex);
    size_t i = slot_of(p);
    if (p && blocks[i] == p) {
        blocks[i] = (void *)blocks;
        live--;
    }
    pthread_mutex_unlock(&mutex);
}

void *__wrap_malloc(size_t n) { return fails() ? NULL : note(__real_malloc(n)); }
void *__wrap_calloc(size_t count, size_t size) { return fails() ? NULL : note(__real_calloc(count, size)); }
void *__wrap_aligned_alloc(size_t alignment, size_t n) {
    return fails() ? NULL : note(__real_aligned_alloc(alignment, n));
}
void *__wrap_realloc(void *p, size_t n) {
    if (fails()) return NULL;
    forget(p);
    return note(__real_realloc(p, n));
}
void __wrap_free(void *p) {
    forget(p);
    __real_free(p);
}
json_t *__wrap_json_loadb(const char *text, size_t n, size_t flags, json_error_t *e) {
    reading++;
    json_t *v = __real_json_loadb(text, n, flags, e);
    reading--;
    return v;
}
json_t *__wrap_json_loads(const char *text, size_t flags, json_error_t *e) {
    reading++;
    json_t *v = __real_json_loads(text, flags, e);
    reading--;
    return v;
}

/* ---- what is tried ---- */

static obm_context *context;
static char *folders[4]; /* base, and three experts */
static char *root;
static const char *const tasks[] = {"chat", "math", "code"};

static const char *in_root(const char *name) {
    static char paths[4][600];
    static int at;
    char *path = paths[at++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", root, name);
    return path;
}

static obm_status compress_as(const char *name, size_t n, const char *shared, obm_pack **out, obm_error *e) {
    obm_expert experts[3];
    obm_compress_options o = OBM_INIT(obm_compress_options);
    o.overwrite = true;
    o.shared = shared;
    for (size_t i = 0; i < n; i++) {
        experts[i] = OBM_INIT(obm_expert);
        experts[i].name = tasks[i];
        experts[i].path = folders[i + 1];
        experts[i].planes = i == 1 ? 2 : 1;
    }
    return obm_compress(context, folders[0], experts, n, &o, in_root(name), NULL, out, e);
}

static obm_status compress_to(const char *name, size_t n, obm_pack **out, obm_error *e) {
    return compress_as(name, n, NULL, out, e);
}

static obm_status try_model(obm_error *e) {
    obm_model *m;
    OBM_TRY(obm_model_open(context, in_root("pack"), NULL, &m, e));
    obm_model_free(m);
    return OBM_OK;
}

static obm_status try_export(obm_error *e) {
    obm_export_options o = OBM_INIT(obm_export_options);
    obm_pack *p;
    o.overwrite = true;
    OBM_TRY(obm_pack_open(context, in_root("pack"), NULL, &p, e));
    obm_status status = obm_pack_export(p, (double[]){0, 0, 1}, &o, in_root("dense"), NULL, e);
    obm_pack_free(p);
    return status;
}

static obm_status try_compress(obm_error *e) {
    obm_pack *p = NULL;
    obm_status status = compress_to("pack", 3, &p, e);
    assert_true(status == OBM_OK || !p);
    obm_pack_free(p);
    return status;
}

static obm_status try_shared(obm_error *e) {
    obm_pack *p = NULL;
    obm_status status = compress_as("shared", 3, "emr", &p, e);
    assert_true(status == OBM_OK || !p);
    obm_pack_free(p);
    return status;
}

static obm_status with_pack(obm_status (*use)(obm_pack *p, obm_error *e), obm_error *e) {
    obm_pack *p = NULL;
    obm_status status = obm_pack_open(context, in_root("pack"), NULL, &p, e);
    assert_true(status == OBM_OK || !p);
    if (status == OBM_OK) status = use(p, e);
    obm_pack_free(p);
    return status;
}

static obm_status verify(obm_pack *p, obm_error *e) { return obm_pack_verify(p, NULL, NULL, e); }
static obm_status try_verify(obm_error *e) { return with_pack(verify, e); }

static obm_status set(obm_pack *p, obm_error *e) {
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    s.lambda = 0.7;
    s.density = 0.1;
    return obm_pack_set_settings(p, &s, e);
}
static obm_status try_set(obm_error *e) { return with_pack(set, e); }

static obm_status materialise(obm_pack *p, obm_error *e) {
    double weights[3];
    float out[64 * 16];
    char *text = NULL;
    OBM_TRY(obm_pack_parse_route(p, "chat=.5, math=.25", weights, e));
    OBM_TRY(obm_pack_format_route(p, weights, &text, e));
    obm_free(text);
    OBM_TRY(obm_pack_materialise(p, weights, "model.embed_tokens.weight", out, e));
    return obm_pack_materialise(p, weights, "model.layers.0.mlp.up_proj.weight", out, e);
}
static obm_status coefficients(obm_pack *p, obm_error *e) {
    static obm_tensor_run runs[64];
    static const double hard[] = {0, 1, 0}, soft[] = {0.5, 0.25, 0.25};
    obm__coefficient_cache *cache;
    obm__planes_route *route = NULL;
    assert_true(obm_pack_tensor_count(p) <= 64);
    OBM_TRY(obm_pack_runs(p, runs, e));
    OBM_TRY(obm__coefficient_cache_new(p, NULL, &cache, e));
    obm_status status = obm__planes_route_renew(NULL, cache, hard, &route, e);
    if (status == OBM_OK) {
        obm__planes_route_free(route);
        route = NULL;
        status = obm__planes_route_renew(NULL, cache, soft, &route, e);
    }
    obm__planes_route_free(route);
    obm__coefficient_cache_free(cache);
    return status;
}
static obm_status try_coefficients(obm_error *e) { return with_pack(coefficients, e); }
static obm_status try_materialise(obm_error *e) { return with_pack(materialise, e); }

/* A second route comes in beside one that runs, so that its overlays (norms and vocabulary are full) are made on
 * another thread; whatever fails, the same model runs afterwards as if nothing had been. */
static obm_status step(obm_model *m, obm__sequence *s, obm_error *e) {
    float logits[64];
    obm__row row = {s, s->length, 3};
    size_t which = 0;
    OBM_TRY(obm__sequence_reserve(m, s, s->length + 1, e));
    OBM_TRY(obm__forward(m, &row, 1, false, 1, e));
    return obm__forward_logits(m, &row, &which, 1, logits, e);
}

static obm_status run_beside(obm_model *m, obm__sequence *s, obm_error *e) {
    static const double soft[] = {0.5, 0.25, 0.25};
    obm__sequence *second = NULL;
    m->decoding = true;
    do {
        OBM_TRY(step(m, s, e));
        OBM_TRY(obm__sequence_admit(m, soft, OBM_F32, &second, e));
    } while (!second);
    obm_status status = step(m, second, e);
    obm__sequence_free(m, second);
    return status;
}

static obm_status run_routes(obm_model *m, obm_error *e) {
    static const double hard[] = {1, 0, 0};
    obm__sequence *s = NULL;
    OBM_TRY(obm__model_enter(m, NULL, e));
    obm_status status = obm__sequence_new(m, hard, OBM_F32, &s, e);
    if (status == OBM_OK) status = run_beside(m, s, e);
    obm__sequence_free(m, s);
    obm__model_leave(m);
    return status;
}

static obm_status run_model(obm_pack *p, obm_error *e) {
    obm_model *m = NULL;
    obm_error again;
    OBM_TRY(obm_model_from_pack(context, p, NULL, &m, e));
    obm_status status = run_routes(m, e);
    if (status != OBM_OK && run_routes(m, &again) != OBM_OK) fail_msg("not usable any more: %s", again.message);
    obm_model_free(m);
    return status;
}
static obm_status try_routes(obm_error *e) { return with_pack(run_model, e); }

static obm_status train(obm_pack *p, obm_error *e) {
    static const char *const texts[] = {"abc", "bcd", "cde", "aab", "bbc", "ccd", "aac", "bbd", "cce"};
    obm_prompt prompts[9] = {{0}};
    const char *names[9];
    obm_router_report report;
    for (int i = 0; i < 9; i++) {
        prompts[i].text = texts[i];
        names[i] = tasks[i % 3];
    }
    return obm_router_train(p, prompts, names, 9, NULL, &report, e);
}
static obm_status try_train(obm_error *e) { return with_pack(train, e); }

/* Whatever came is freed; a completion after a failure is not touched. */
static obm_status generate(obm_model *m, const double *routes, size_t n_routes, obm_error *e) {
    obm_prompt prompts[2] = {{.text = "abc"}, {.text = "deab"}};
    obm_completion out[2];
    obm_generate_options o = OBM_INIT(obm_generate_options);
    o.routes = routes;
    o.n_routes = n_routes;
    o.max_tokens = 3;
    o.ignore_eos = true;
    OBM_TRY(obm_model_generate_batch(m, prompts, 2, &o, out, e));
    for (int i = 0; i < 2; i++) obm_completion_clear(&out[i]);
    return OBM_OK;
}

/* On planes or materialised: hard and soft routes, an expert with a head and a text of its own, and the router. */
static obm_status run(bool materialise, obm_error *e) {
    static const double routes[2][3] = {{1, 0, 0}, {0.5, 0.25, 0}}, own[3] = {0, 0, 1};
    static const int32_t ids[] = {0, 1, 2, 3};
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_run_options r = OBM_INIT(obm_run_options);
    obm_model *m = NULL;
    float logits[64];
    o.materialise = materialise;
    obm_status status = obm_model_open(context, in_root("pack"), &o, &m, e);
    if (status == OBM_OK) status = generate(m, routes[0], 2, e);
    if (status == OBM_OK) status = generate(m, own, 1, e);
    r.route = routes[1];
    if (status == OBM_OK) status = obm_model_logits(m, ids, 4, &r, logits, e);
    obm_model_free(m);
    return status;
}
static obm_status try_planes(obm_error *e) { return run(false, e); }
static obm_status try_materialised(obm_error *e) { return run(true, e); }

static obm_status try_score(obm_error *e) {
    obm_prompt prompt = {.text = "abc"};
    float features[8];
    obm_model *m = NULL;
    obm_status status = obm_model_open(context, folders[0], NULL, &m, e);
    if (status == OBM_OK) status = obm_model_embed(m, &prompt, 1, 1, NULL, NULL, features, e);
    if (status == OBM_OK) status = generate(m, NULL, 0, e);
    obm_model_free(m);
    return status;
}

static obm_status merge(bool resume, obm_error *e) {
    static char recipe[2000];
    obm_merge_options o = OBM_INIT(obm_merge_options);
    o.overwrite = true;
    o.resume = resume;
    o.shard_bytes = 1000;
    snprintf(recipe, sizeof recipe,
             "merge_method: ties\nbase_model: %s\nmodels:\n- {model: %s, parameters: {weight: 1, density: [0.5, 1]}}\n"
             "- {model: %s, parameters: {weight: 0.5, density: 0.3}}\n",
             folders[0], folders[1], folders[3]);
    return obm_merge(context, recipe, &o, in_root("merged"), NULL, e);
}
static obm_status try_merge(obm_error *e) { return merge(false, e); }
static obm_status try_resume(obm_error *e) { return merge(true, e); }

/* Experts of a pack, with the tokenizer that the result takes from one. */
static obm_status try_members(obm_error *e) {
    static char recipe[2000];
    obm_merge_options o = OBM_INIT(obm_merge_options);
    o.overwrite = true;
    snprintf(recipe, sizeof recipe,
             "merge_method: linear\nchat_template: auto\nmodels:\n- {model: \"%s:chat\", parameters: {weight: 1}}\n"
             "- {model: \"%s:math\", parameters: {weight: 1}}\n",
             in_root("pack"), in_root("pack"));
    return obm_merge(context, recipe, &o, in_root("merged"), NULL, e);
}

static obm_status try_statistics(obm_error *e) {
    obm_checkpoint *base = NULL, *expert = NULL;
    obm_task_vector *v = NULL;
    obm_delta_stats stats[OBM_CLASS_COUNT];
    obm_delta_pair pairs[OBM_CLASS_COUNT];
    obm_status status = obm_checkpoint_open(context, folders[0], &base, e);
    if (status == OBM_OK) status = obm_checkpoint_open(context, folders[2], &expert, e);
    if (status == OBM_OK) status = obm_task_vector_new(base, expert, &v, e);
    if (status == OBM_OK) status = obm_task_vector_stats(context, v, NULL, NULL, stats, e);
    if (status == OBM_OK) status = obm_task_vector_compare(context, v, v, NULL, NULL, pairs, e);
    obm_task_vector_free(v);
    obm_checkpoint_free(expert);
    obm_checkpoint_free(base);
    return status;
}

static obm_status change(obm_pack *p, obm_error *e) {
    obm_expert law = OBM_INIT(obm_expert);
    law.name = "law";
    law.path = folders[3];
    /* what failed between the two calls below has left it */
    if (obm_pack_task_count(p) == 4) OBM_TRY(obm_pack_remove(p, "law", e));
    OBM_TRY(obm_pack_add(p, &law, NULL, e));
    return obm_pack_remove(p, "law", e);
}
static obm_status try_change(obm_error *e) { return with_pack(change, e); }

static obm_status try_tokenizer(obm_error *e) {
    static const char text[] = "Hello w\xc3\xb6rld e\xcc\x81 12345  \n what's up";
    obm_tokenizer *t = NULL;
    int32_t *ids = NULL;
    char *back = NULL;
    size_t n = 0, len = 0;
    obm_status status = obm_tokenizer_open(context, OBM_SOURCE_DIR "/tests/vectors/tokenizers/qwen2.json", &t, e);
    if (status == OBM_OK) status = obm_tokenizer_encode(t, text, sizeof text - 1, true, &ids, &n, e);
    if (status == OBM_OK) status = obm_tokenizer_decode(t, ids, n, false, &back, &len, e);
    obm_free(ids);
    obm_free(back);
    obm_tokenizer_free(t);
    return status;
}

/* ---- one allocation after the other ---- */

/* step: every how manieth; long attempts try some only, so that the test stays quick. */
static void fail_each(obm_status (*attempt)(obm_error *e), long step, bool changes_pack) {
    long n = 0;
    do {
        obm_error e = {0};
        memset(blocks, 0, sizeof blocks);
        live = 0;
        n += step;
        fired = false;
        tracking = true;
        countdown = n;
        obm_status status = attempt(&e);
        countdown = 0;
        tracking = false;
        if (status != OBM_OK && (status != OBM_E_NOMEM || e.code != OBM_E_NOMEM || !fired))
            fail_msg("allocation %ld: %s: %s", n, obm_status_name(status), e.message);
        if (live) fail_msg("allocation %ld: %ld blocks leak", n, live);
        if (fired && changes_pack && try_verify(&e) != OBM_OK)
            fail_msg("allocation %ld breaks the pack: %s", n, e.message);
    } while (fired);
    assert_true(n > 10);
}

static void test_open(void **state) {
    (void)state;
    fail_each(try_verify, 3, false);
    fail_each(try_materialise, 3, false);
    fail_each(try_coefficients, 3, false);
    fail_each(try_model, 5, false);
    fail_each(try_export, 7, false);
}

/* Matrices that are packed behind tokens: what there is no memory for stays as it is, and nobody is told by an error.
 */
static obm_status pack_behind(obm_model *m, obm_error *e) {
    OBM_TRY(obm__model_enter(m, NULL, e));
    obm_status status = OBM_OK;
    obm__z12_begin(m, 0, 3);
    while (m->packing && status == OBM_OK) status = obm__z12_step(m, 1, e);
    obm__model_leave(m);
    return status;
}

static obm_status try_packing(obm_error *e) {
    static const int32_t ids[] = {0, 1, 2, 3};
    static float expected[64];
    static bool known;
    float logits[64] = {0};
    obm_run_options r = OBM_INIT(obm_run_options);
    obm_model *m = NULL;
    r.decode = true;
    obm_status status = obm_model_open(context, folders[0], NULL, &m, e);
    if (status == OBM_OK && !known) {
        long left = countdown;
        countdown = 0;
        if (obm_model_logits(m, ids, 4, &r, expected, e) != OBM_OK) fail_msg("%s", e->message);
        known = true;
        countdown = left;
    }
    if (status == OBM_OK && pack_behind(m, e) != OBM_OK) fail_msg("%s", e->message);
    assert_true(fired || m->z12_saved > 0);
    if (status == OBM_OK) status = obm_model_logits(m, ids, 4, &r, logits, e);
    if (status == OBM_OK) assert_memory_equal(logits, expected, sizeof logits);
    obm_model_free(m);
    return status;
}

static void test_model(void **state) {
    (void)state;
    fail_each(try_packing, 1, false);
    fail_each(try_routes, 1, false);
}

static void test_tokenizer(void **state) {
    (void)state;
    fail_each(try_tokenizer, 1, false);
}

static void test_runs(void **state) {
    (void)state;
    fail_each(try_planes, 13, false);
    fail_each(try_materialised, 13, false);
    fail_each(try_score, 5, false);
}

static void test_merges(void **state) {
    (void)state;
    fail_each(try_statistics, 1, false);
    fail_each(try_merge, 7, false);
    fail_each(try_members, 7, false);
    fail_each(try_resume, 7, false);
}

static void test_changes(void **state) {
    (void)state;
    fail_each(try_set, 11, true);
    fail_each(try_train, 7, true);
    fail_each(try_change, 17, true);
}

static void test_compress(void **state) {
    (void)state;
    fail_each(try_compress, 43, true);
    fail_each(try_shared, 43, true);
}

static int setup(void **state) {
    (void)state;
    json_set_alloc_funcs(__wrap_malloc, __wrap_free);
    if (obm_context_new(NULL, &context, NULL) != OBM_OK || !(root = tiny_folder())) return -1;
    for (unsigned i = 0; i < 4; i++) {
        tiny c = {.type = "llama",
                  .vocab = 6,
                  .hidden = 8,
                  .inter = 8,
                  .layers = 1,
                  .heads = 2,
                  .kv_heads = 1,
                  .dim = 4,
                  .tied = i != 2,
                  .dtype = OBM_BF16,
                  .seed = i + 1};
        tiny_weights w = {0};
        tiny_weights_new(&c, &w);
        if (!(folders[i] = tiny_folder()) || tiny_write(&c, &w, folders[i], NULL)) return -1;
        tiny_weights_free(&w);
    }
    tiny_write_text(
        folders[0], "tokenizer.json",
        "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"c\":2,\"d\":3,\"e\":4,\"f\":5},\"merges\":[]},"
        "\"pre_tokenizer\":{\"type\":\"ByteLevel\"},\"decoder\":{\"type\":\"ByteLevel\"}}");
    tiny_write_text(folders[3], "tokenizer.json",
                    "{\"normalizer\":null,\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"c\":2,\"d\":3,\"e\":"
                    "4,\"f\":5},\"merges\":[]},"
                    "\"pre_tokenizer\":{\"type\":\"ByteLevel\"},\"decoder\":{\"type\":\"ByteLevel\"}}");
    tiny_write_text(folders[3], "tokenizer_config.json", "{\"chat_template\":\"{{ x }}\",\"eos_token\":\"f\"}");
    tiny_write_text(folders[3], "generation_config.json", "{\"eos_token_id\":[2,5]}");
    return compress_to("pack", 2, NULL, NULL) == OBM_OK && compress_to("pack", 3, NULL, NULL) == OBM_OK ? 0 : -1;
}

static int teardown(void **state) {
    char command[700];
    (void)state;
    for (int i = 0; i < 4; i++) tiny_remove(folders[i]);
    snprintf(command, sizeof command, "rm -r '%s'", root);
    int failed = system(command);
    free(root);
    obm_context_free(context);
    return failed;
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_open),      cmocka_unit_test(test_model),
                                       cmocka_unit_test(test_tokenizer), cmocka_unit_test(test_runs),
                                       cmocka_unit_test(test_merges),    cmocka_unit_test(test_changes),
                                       cmocka_unit_test(test_compress)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
