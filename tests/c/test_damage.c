/* Damaged files: everything that a user may bring, cut after every byte; files that shrink while they are in use;
 * configs whose sizes are lies.  What comes is an error that names the file, never less. */
#include "delta_fixture.h"
#include "tiny_model.h"

#include "merge/recipe.h"

typedef struct world {
    obm_context *ctx;
    char *root, *base, *expert, *pack;
} world;

static const char *const TOKENIZERS[] = {
    "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"c\":2},\"merges\":[]},"
    "\"pre_tokenizer\":{\"type\":\"ByteLevel\"},\"decoder\":{\"type\":\"ByteLevel\"}}",
    "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"c\":2,\"d\":3},\"merges\":[]},"
    "\"pre_tokenizer\":{\"type\":\"ByteLevel\"},\"decoder\":{\"type\":\"ByteLevel\"}}"};

static char *make_model(const world *w, const char *name, unsigned seed) {
    tiny c = {.type = "llama",
              .vocab = 8,
              .hidden = 4,
              .inter = 4,
              .layers = 1,
              .heads = 1,
              .kv_heads = 1,
              .dim = 4,
              .tied = 1,
              .dtype = OBM_F32,
              .seed = seed};
    tiny_weights weights = {0};
    char *folder = obm__path_join(w->root, name);
    OK(obm__make_directory(folder, err));
    tiny_weights_new(&c, &weights);
    assert_int_equal(tiny_write(&c, &weights, folder, NULL), 0);
    tiny_weights_free(&weights);
    tiny_write_text(folder, "tokenizer.json", TOKENIZERS[seed > 1]);
    tiny_write_text(folder, "generation_config.json", seed > 1 ? "{\"eos_token_id\":[2,3]}" : "{\"eos_token_id\":2}");
    return folder;
}

static void train(obm_pack *p) {
    static const char *const texts[] = {"abc", "bca", "cab", "aab", "bbc", "cca"};
    static const char *const names[] = {"chat", "math", "chat", "math", "chat", "math"};
    obm_prompt prompts[6] = {{0}};
    obm_router_report report;
    for (int i = 0; i < 6; i++) prompts[i].text = texts[i];
    OK(obm_router_train(p, prompts, names, 6, NULL, &report, err));
}

static obm_status open_pack(const world *w, obm_pack **out, obm_error *err) {
    return obm_pack_open(w->ctx, w->pack, NULL, out, err);
}

static int setup(void **state) {
    world *w = calloc(1, sizeof *w);
    obm_expert e[2] = {OBM_INIT(obm_expert), OBM_INIT(obm_expert)};
    obm_pack *p;
    w->ctx = fixture_context(1);
    w->root = fixture_folder();
    w->base = make_model(w, "base", 1);
    w->expert = make_model(w, "expert", 2);
    w->pack = obm__path_join(w->root, "pack");
    e[0].name = "chat";
    e[1].name = "math";
    e[0].path = e[1].path = w->expert;
    e[1].policy = "attention";
    OK(obm_compress(w->ctx, w->base, e, 2, NULL, w->pack, NULL, &p, err));
    train(p);
    obm_pack_free(p);
    *state = w;
    return 0;
}

static int teardown(void **state) {
    world *w = *state;
    fixture_remove(w->root);
    obm_free(w->base);
    obm_free(w->expert);
    obm_free(w->pack);
    obm_free(w->root);
    obm_context_free(w->ctx);
    free(w);
    return 0;
}

static void put(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

/* ---- cut after every byte ---- */

typedef obm_status (*use_fn)(const world *w, obm_error *err);

static obm_status use_model(const char *path, const world *w, obm_error *err) {
    obm_model *m = NULL;
    obm_status status = obm_model_open(w->ctx, path, NULL, &m, err);
    assert_true((status == OBM_OK) == (m != NULL));
    obm_model_free(m);
    return status;
}
static obm_status use_weights(const world *w, obm_error *err) {
    obm_checkpoint *c = NULL;
    obm_status status = obm_checkpoint_open(w->ctx, w->base, &c, err);
    obm_checkpoint_free(c);
    return status;
}
static obm_status use_base(const world *w, obm_error *err) { return use_model(w->base, w, err); }
static obm_status use_pack(const world *w, obm_error *err) { return use_model(w->pack, w, err); }
static obm_status just_open(const world *w, obm_error *err) {
    obm_pack *p = NULL;
    obm_status status = open_pack(w, &p, err);
    obm_pack_free(p);
    return status;
}
static obm_status verify_pack(const world *w, obm_error *err) {
    obm_pack *p = NULL;
    obm_status status = open_pack(w, &p, err);
    if (status == OBM_OK) status = obm_pack_verify(p, NULL, NULL, err);
    obm_pack_free(p);
    return status;
}

/* After every byte; ONEBITMERGE_TEST_STRIDE=N, after every Nth, is for valgrind, under which all take an hour. */
static size_t stride(void) {
    const char *n = getenv("ONEBITMERGE_TEST_STRIDE");
    return n && atoi(n) > 0 ? (size_t)atoi(n) : 1;
}

/* `blank`: white space at its end, which may go. */
static void cut_everywhere(const world *w, const char *path, size_t blank, use_fn use) {
    char *text;
    size_t size;
    const char *name = strrchr(path, '/') + 1;
    OK(obm__file_read(path, &text, &size, err));
    OK(use(w, err));
    for (size_t n = size; n-- > 0;) { /* shorter and shorter: nothing need be written */
        obm_error e = {0};
        if ((size - n - 1) % stride() && n) continue;
        assert_int_equal(truncate(path, (off_t)n), 0);
        obm_status status = use(w, &e);
        if (n + blank >= size) continue;
        if (status == OBM_OK) fail_msg("%s: accepted when cut after %zu of %zu bytes", name, n, size);
        if (status != OBM_E_FORMAT || !strstr(e.message, name))
            fail_msg("%s cut after %zu bytes: %s: %s", name, n, obm_status_name(status), e.message);
    }
    put(path, text, size);
    OK(use(w, err));
    obm_free(text);
}

static void test_model_folder(void **state) {
    static const struct {
        const char *name;
        use_fn use;
    } files[] = {{"model.safetensors", use_weights}, {"config.json", use_base}, {"generation_config.json", use_base}};
    for (size_t i = 0; i < OBM_COUNT(files); i++) {
        world *w = *state;
        char *path = obm__path_join(w->base, files[i].name);
        cut_everywhere(w, path, 0, files[i].use);
        obm_free(path);
    }
}

#define INDEX                                                                                          \
    "{\"weight_map\":{\"model.embed_tokens.weight\":\"part.safetensors\",\"model.norm.weight\":\"part" \
    ".safetensors\"}}"
static obm_status use_index(const world *w, obm_error *err) {
    obm_checkpoint *c = NULL;
    char *folder = obm__path_join(w->root, "indexed");
    obm_status status = obm_checkpoint_open(w->ctx, folder, &c, err);
    obm_checkpoint_free(c);
    obm_free(folder);
    return status;
}
static void test_index(void **state) {
    world *w = *state;
    char *folder = obm__path_join(w->root, "indexed"), *index = obm__path_join(folder, "model.safetensors.index.json");
    char *from = obm__path_join(w->base, "model.safetensors"), *to = obm__path_join(folder, "part.safetensors");
    OK(obm__make_directory(folder, err));
    assert_int_equal(link(from, to), 0);
    put(index, INDEX, strlen(INDEX));
    cut_everywhere(w, index, 0, use_index);
    obm_free(folder);
    obm_free(index);
    obm_free(from);
    obm_free(to);
}

static obm_status use_adapter(const world *w, obm_error *err) {
    obm_checkpoint *base = NULL, *adapter = NULL;
    obm_task_vector *v = NULL;
    char *folder = obm__path_join(w->root, "adapter");
    OK(obm_checkpoint_open(w->ctx, w->base, &base, err));
    obm_status status = obm_checkpoint_open(w->ctx, folder, &adapter, err);
    if (status == OBM_OK) status = obm_task_vector_new(base, adapter, &v, err);
    assert_true((status == OBM_OK) == (v != NULL));
    obm_task_vector_free(v);
    obm_checkpoint_free(adapter);
    obm_checkpoint_free(base);
    obm_free(folder);
    return status;
}

/* A LoRA folder: what says how its factors are scaled, and the factors. */
static void test_adapter_folder(void **state) {
    static const char config[] = "{\"peft_type\":\"LORA\",\"task_type\":\"CAUSAL_LM\",\"r\":1,\"lora_alpha\":2,"
                                 "\"use_rslora\":true,\"rank_pattern\":{\"q_proj\":2},\"alpha_pattern\":{\"^q\":0.5}}";
    static const float x[8] = {1, -2, 3, -4, 5, -6, 7, -8};
#define Q "base_model.model.model.layers.0.self_attn.q_proj.lora_"
#define HEAD "base_model.model.lm_head.lora_"
    static const fixture_tensor tensors[] = {{Q "A.weight", OBM_BF16, 2, {2, 4}, x, NULL},
                                             {Q "B.weight", OBM_BF16, 2, {4, 2}, x, NULL},
                                             {HEAD "A.weight", OBM_F32, 2, {1, 4}, x, NULL},
                                             {HEAD "B.weight", OBM_F32, 2, {8, 1}, x, NULL}};
    world *w = *state;
    char *folder = obm__path_join(w->root, "adapter");
    OK(obm__make_directory(folder, err));
    char *json = obm__path_join(folder, "adapter_config.json"), *weights = obm__path_join(folder, OBM_ADAPTER_WEIGHTS);
    put(json, config, strlen(config));
    fixture_write_file(w->ctx, weights, tensors, OBM_COUNT(tensors));
    cut_everywhere(w, json, 0, use_adapter);
    cut_everywhere(w, weights, 0, use_adapter);
    obm_free(json);
    obm_free(weights);
    obm_free(folder);
}

static size_t list_pack(const world *w, char names[16][128]) {
    char command[700];
    size_t n = 0;
    snprintf(command, sizeof command, "ls '%s'", w->pack);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    while (n < 16 && fgets(names[n], sizeof names[n], f)) {
        names[n][strcspn(names[n], "\n")] = 0;
        n++;
    }
    pclose(f);
    return n;
}

/* pack.json, two experts, the router, and the tokenizer and eos of the experts. */
static void test_pack_folder(void **state) {
    world *w = *state;
    char names[16][128];
    size_t n = list_pack(w, names), texts = 0;
    OK(use_pack(w, err));
    for (size_t i = 0; i < n; i++) {
        char *path = obm__path_join(w->pack, names[i]);
        bool text = strncmp(names[i], "pack.json", 9) && strstr(names[i], ".json");
        cut_everywhere(w, path, strcmp(names[i], "pack.json") ? 0 : 1, text ? verify_pack : just_open);
        texts += text;
        obm_free(path);
    }
    assert_int_equal(n, 4 + texts);
    assert_true(texts >= 1);
}

/* Every prefix of a recipe is refused with a line and a reason, or is a recipe itself. */
static void test_recipe(void **state) {
    static const char text[] =
        "merge_method: ties\nbase_model: \"b\"\nmodels:\n  - model: a\n    parameters: {weight: 0.5,"
        " density: [1, .5]}\n  - model: c\n    parameters:\n      weight:\n        - filter: mlp\n"
        "          value: &v 1e-1\n        - value: *v\nparameters: {normalize: yes}\n";
    world *w = *state;
    size_t refused = 0;
    for (size_t n = 0; n <= sizeof text - 1; n++) {
        obm__recipe *r = NULL;
        obm_error e = {0};
        char *cut = malloc(n + 1);
        memcpy(cut, text, n);
        cut[n] = 0;
        obm_status status = obm__recipe_parse(w->ctx, cut, OBM_PROFILE_DEFAULT, &r, &e);
        assert_true((status == OBM_OK) == (r != NULL));
        if (status != OBM_OK && strncmp(e.message, "recipe", 6)) fail_msg("cut after %zu bytes: %s", n, e.message);
        refused += status != OBM_OK;
        if (n == sizeof text - 1 && status != OBM_OK) fail_msg("%s", e.message);
        obm__recipe_free(r);
        free(cut);
    }
    assert_in_range(refused, 60, sizeof text - 2);
}

/* A key of a megabyte, and aliases that would repeat it: a file of 200 KB must not become gigabytes. */
static void test_recipe_of_long_keys(void **state) {
    enum { KEY = 100000, ALIASES = 20000 };
    char *text = malloc(KEY + 5 * ALIASES + 100), *at = text;
    obm_json *tree = NULL;
    (void)state;
    at += sprintf(at, "- &a {? ");
    memset(at, 'k', KEY);
    at += KEY;
    at += sprintf(at, " : 1}\n");
    for (int i = 0; i < ALIASES; i++) at += sprintf(at, "- *a\n");
    FAILS(obm__yaml_parse(text, (size_t)(at - text), "recipe", &tree, err), OBM_E_FORMAT, "too many values");
    free(text);
}

/* ---- files that shrink while they are in use ---- */

static char *first_file(const world *w, const char *prefix) {
    char names[16][128];
    for (size_t i = 0, n = list_pack(w, names); i < n; i++)
        if (!strncmp(names[i], prefix, strlen(prefix))) return obm__path_join(w->pack, names[i]);
    fail_msg("no %s", prefix);
    return NULL;
}

/* Runs the statement while the file is `less` bytes shorter, then makes it whole again; the inode stays the same. */
#define WHILE_CUT(path, statement)                      \
    do {                                                \
        char *bytes_;                                   \
        size_t size_;                                   \
        OK(obm__file_read(path, &bytes_, &size_, err)); \
        assert_int_equal(truncate(path, 100), 0);       \
        statement;                                      \
        put(path, bytes_, size_);                       \
        obm_free(bytes_);                               \
    } while (0)

#define SHRUNK "as when it was opened, found 100: a file in use is replaced by rename"

static void test_shrunk_checkpoint(void **state) {
    world *w = *state;
    obm_checkpoint *base = NULL, *expert = NULL;
    obm_task_vector *v = NULL;
    obm_tensor t;
    obm_delta_stats stats[OBM_CLASS_COUNT], one;
    obm_delta_pair pairs[OBM_CLASS_COUNT];
    float x[64];
    char hash[65];
    char *path = obm__path_join(w->expert, "model.safetensors");
    OK(obm_checkpoint_open(w->ctx, w->base, &base, err));
    OK(obm_checkpoint_open(w->ctx, w->expert, &expert, err));
    OK(obm_task_vector_new(base, expert, &v, err));
    WHILE_CUT(path, {
        obm_task_vector *other = NULL;
        FAILS(obm_checkpoint_get(expert, "model.norm.weight", &t, err), OBM_E_IO, SHRUNK);
        FAILS(obm_checkpoint_sha256(expert, "model.norm.weight", hash, err), OBM_E_IO, SHRUNK);
        FAILS(obm_task_vector_new(base, expert, &other, err), OBM_E_IO, SHRUNK);
        FAILS(obm_task_vector_read(v, "model.norm.weight", x, err), OBM_E_IO, SHRUNK);
        FAILS(obm_task_vector_stats(w->ctx, v, NULL, NULL, stats, err), OBM_E_IO, SHRUNK);
        FAILS(obm_task_vector_tensor_stats(w->ctx, v, "model.norm.weight", &one, err), OBM_E_IO, SHRUNK);
        FAILS(obm_task_vector_compare(w->ctx, v, v, NULL, NULL, pairs, err), OBM_E_IO, SHRUNK);
        OK(obm_checkpoint_get(base, "model.norm.weight", &t, err));
    });
    OK(obm_task_vector_read(v, "model.norm.weight", x, err));
    OK(obm_task_vector_stats(w->ctx, v, NULL, NULL, stats, err));
    obm_task_vector_free(v);
    obm_checkpoint_free(base);
    obm_checkpoint_free(expert);
    obm_free(path);
}

static void use_shrunk_model(const world *w, obm_model *m, const char *path) {
    const int32_t ids[] = {0, 1};
    float logits[8];
    obm_prompt prompt = {.text = "ab"};
    double weights[2];
    WHILE_CUT(path, {
        obm_completion c;
        FAILS(obm_model_logits(m, ids, 2, NULL, logits, err), OBM_E_IO, SHRUNK);
        FAILS(obm_model_generate_batch(m, &prompt, 1, NULL, &c, err), OBM_E_IO, SHRUNK);
        FAILS(obm_model_embed(m, &prompt, 1, 0, NULL, NULL, logits, err), OBM_E_IO, SHRUNK);
        FAILS(obm_model_route(m, &prompt, NULL, NULL, weights, NULL, err), OBM_E_IO, SHRUNK);
    });
    OK(obm_model_logits(m, ids, 2, NULL, logits, err));
    (void)w;
}

static void test_shrunk_pack(void **state) {
    world *w = *state;
    obm_pack *p = NULL;
    obm_model *m = NULL;
    float x[64];
    double route[2] = {1, 0};
    char *paths[] = {obm__path_join(w->base, "model.safetensors"), first_file(w, "chat-")};
    char *out = obm__path_join(w->root, "dense");
    OK(open_pack(w, &p, err));
    OK(obm_model_from_pack(w->ctx, p, NULL, &m, err));
    for (int i = 0; i < 2; i++) {
        WHILE_CUT(paths[i], {
            FAILS(obm_pack_materialise(p, route, "model.norm.weight", x, err), OBM_E_IO, SHRUNK);
            FAILS(obm_pack_export(p, route, NULL, out, NULL, err), OBM_E_IO, SHRUNK);
            assert_false(obm__is_directory(out));
        });
        use_shrunk_model(w, m, paths[i]);
        obm_free(paths[i]);
    }
    char *path = obm__path_join(w->base, "model.safetensors");
    WHILE_CUT(path, FAILS(obm_pack_verify(p, NULL, NULL, err), OBM_E_IO, SHRUNK));
    obm_free(path);
    OK(obm_pack_verify(p, NULL, NULL, err));
    obm_model_free(m);
    obm_pack_free(p);
    obm_free(out);
}

/* Cut in the middle of a pass, from its progress callback: the next tensor is not read any more. */
static int cut_now(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)what;
    (void)done;
    (void)total;
    return truncate(user, 100);
}

static void test_shrunk_in_a_pass(void **state) {
    world *w = *state;
    char *path = obm__path_join(w->expert, "model.safetensors"), *out = obm__path_join(w->root, "out");
    char *recipe =
        obm__format("{\"merge_method\": \"linear\", \"models\": [{\"model\": \"%s\", \"parameters\": {\"weight\": 1}},"
                    "{\"model\": \"%s\", \"parameters\": {\"weight\": 1}}]}",
                    w->base, w->expert);
    char *bytes;
    size_t size;
    obm_merge_options o = OBM_INIT(obm_merge_options);
    obm_compress_options c = OBM_INIT(obm_compress_options);
    obm_expert e = OBM_INIT(obm_expert);
    o.progress = c.progress = cut_now;
    o.progress_user = c.progress_user = path;
    e.name = "chat";
    e.path = w->expert;
    OK(obm__file_read(path, &bytes, &size, err));
    FAILS(obm_merge(w->ctx, recipe, &o, out, NULL, err), OBM_E_IO, SHRUNK);
    assert_false(obm__is_directory(out));
    put(path, bytes, size);
    FAILS(obm_compress(w->ctx, w->base, &e, 1, &c, out, NULL, NULL, err), OBM_E_IO, SHRUNK);
    assert_false(obm__is_directory(out));
    put(path, bytes, size);
    obm_free(bytes);
    obm_free(recipe);
    obm_free(path);
    obm_free(out);
}

/* Replaced by rename, or removed: what is mapped lives on. */
static void test_replaced(void **state) {
    world *w = *state;
    char *path = obm__path_join(w->expert, "model.safetensors"), *bytes;
    size_t size;
    obm_checkpoint *c = NULL;
    obm_tensor t;
    float before[4], after[4];
    OK(obm__file_read(path, &bytes, &size, err));
    OK(obm_checkpoint_open(w->ctx, w->expert, &c, err));
    OK(obm_checkpoint_get(c, "model.norm.weight", &t, err));
    OK(obm_tensor_read_f32(&t, 0, 4, before, err));
    OK(obm__file_write(path, "short", 5, err));
    OK(obm_checkpoint_get(c, "model.norm.weight", &t, err));
    assert_int_equal(unlink(path), 0);
    OK(obm_checkpoint_get(c, "model.norm.weight", &t, err));
    OK(obm_tensor_read_f32(&t, 0, 4, after, err));
    assert_memory_equal(before, after, sizeof before);
    put(path, bytes, size);
    obm_checkpoint_free(c);
    obm_free(bytes);
    obm_free(path);
}

/* ---- sizes that are lies ---- */

/* Refused before anything of such a size is allocated or walked through. */
static void test_large_sizes(void **state) {
    world *w = *state;
    static const struct {
        const char *from, *to, *part;
        obm_status status;
    } edits[] = {
        {"\"num_hidden_layers\":1", "\"num_hidden_layers\":2147483648", "\"num_hidden_layers\": expected 1 to 65536",
         OBM_E_FORMAT},
        {"\"num_hidden_layers\":1", "\"num_hidden_layers\":65536", "\"num_hidden_layers\": expected at most 11",
         OBM_E_FORMAT},
        {"\"head_dim\":4", "\"head_dim\":2147483648", "config.json asks for shape (2147483648, 4), found (4, 4)",
         OBM_E_SHAPE},
        {"\"vocab_size\":8", "\"vocab_size\":2147483648", "config.json asks for shape (2147483648, 4)", OBM_E_SHAPE},
        {"\"max_position_embeddings\":200", "\"max_position_embeddings\":2147483648", "", OBM_OK},
    };
    char *path = obm__path_join(w->base, "config.json"), *text;
    size_t size;
    OK(obm__file_read(path, &text, &size, err));
    for (size_t i = 0; i < OBM_COUNT(edits); i++) {
        char *at = strstr(text, edits[i].from);
        assert_non_null(at);
        char *edited = obm__format("%.*s%s%s", (int)(at - text), text, edits[i].to, at + strlen(edits[i].from));
        put(path, edited, strlen(edited));
        if (edits[i].status == OBM_OK) {
            OK(use_base(w, err));
            OK(use_pack(w, err));
        } else {
            FAILS(use_base(w, err), edits[i].status, edits[i].part);
            FAILS(use_pack(w, err), edits[i].status, edits[i].part);
        }
        obm_free(edited);
    }
    put(path, text, size);
    obm_free(text);
    obm_free(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_model_folder),
        cmocka_unit_test(test_index),
        cmocka_unit_test(test_adapter_folder),
        cmocka_unit_test(test_pack_folder),
        cmocka_unit_test(test_recipe),
        cmocka_unit_test(test_recipe_of_long_keys),
        cmocka_unit_test(test_shrunk_checkpoint),
        cmocka_unit_test(test_shrunk_pack),
        cmocka_unit_test(test_shrunk_in_a_pass),
        cmocka_unit_test(test_replaced),
        cmocka_unit_test(test_large_sizes),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
