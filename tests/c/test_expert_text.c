/* Experts with a tokenizer, a chat template and eos ids of their own: from their folders into a pack, out of it under
 * their hard routes only. */
#include "delta_fixture.h"
#include "model/model.h"
#include "tiny_model.h"

#include <dirent.h>

enum { VOCAB = 450, EXTRA = 2, TOOL = 450 };
#define PROMPT "So <|tool|> has a<|tool|>b"
#define TEMPLATE(first)                                                                                        \
    "{% for message in messages %}" first "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + " \
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
#define BRIEF "{% if loop.first %}{{ '<|im_start|>system\\nBe brief<|im_end|>\\n' }}{% endif %}"

typedef struct world {
    obm_context *ctx;
    char *dir, *base, *chat, *math, *pack;
} world;

/* ---- folders ---- */

static char *model_folder(world *w, const char *name, int vocab, unsigned seed) {
    tiny shape = {"mistral", vocab, 24, 37, 2, 4, 2, 6, 20, 0, OBM_BF16, seed, NULL};
    tiny_weights weights = {0};
    char *path = obm__path_join(w->dir, name);
    obm_error err;
    OK(obm__make_directory(path, err));
    tiny_weights_new(&shape, &weights);
    assert_int_equal(tiny_write(&shape, &weights, path, &err), 0);
    tiny_weights_free(&weights);
    return path;
}

static obm_json *load_json(const char *folder, const char *name) {
    char *path = obm__path_join(folder, name);
    obm_json *v = NULL;
    OK(obm__json_load(path, &v, err));
    obm_free(path);
    return v;
}

/* Steals v. */
static void save_json(const char *folder, const char *name, obm_json *v) {
    char *text = obm__json_text(v, 1);
    assert_int_equal(tiny_write_text(folder, name, text), 0);
    obm_free(text);
    obm__json_free(v);
}

static obm_json *base_tokenizer(void) { return load_json(OBM_SOURCE_DIR "/tests/vectors/tokenizers", "smollm2.json"); }

static obm_json *child(const obm_json *v, const char *key) { return (obm_json *)obm__json_get(v, key); }

/* The base's with one token more. */
static obm_json *own_tokenizer(void) {
    obm_json *t = base_tokenizer(), *token = obm__json_new_object();
    assert_true(obm__json_set(token, "id", obm__json_new_int(TOOL)));
    assert_true(obm__json_set(token, "content", obm__json_new_string("<|tool|>")));
    assert_true(obm__json_set(token, "special", obm__json_new_bool(true)));
    assert_true(obm__json_append(child(t, "added_tokens"), token));
    return t;
}

static void write_config(const char *folder, const char *template_text) {
    obm_json *v = obm__json_new_object();
    assert_true(obm__json_set(v, "chat_template", obm__json_new_string(template_text)));
    assert_true(obm__json_set(v, "eos_token", obm__json_new_string("<|im_end|>")));
    save_json(folder, "tokenizer_config.json", v);
}

/* base; chat: two rows more, nothing own yet; math: the base's files, written another way. */
static int setup(void **state) {
    world *w = calloc(1, sizeof *w);
    w->ctx = fixture_context(2);
    w->dir = fixture_folder();
    w->base = model_folder(w, "base", VOCAB, 5);
    w->chat = model_folder(w, "chat", VOCAB + EXTRA, 6);
    w->math = model_folder(w, "math", VOCAB, 7);
    w->pack = obm__path_join(w->dir, "my.pack");
    save_json(w->base, "tokenizer.json", base_tokenizer());
    write_config(w->base, TEMPLATE(""));
    tiny_write_text(w->base, "merges.txt", "a b\n");
    tiny_write_text(w->base, "generation_config.json", "{\"eos_token_id\": 2}");
    obm_json *same = base_tokenizer();
    assert_true(obm__json_set(same, "padding", obm__json_new_object()));
    save_json(w->math, "tokenizer.json", same);
    tiny_write_text(w->math, "generation_config.json", "{\"eos_token_id\": [2], \"do_sample\": true}");
    *state = w;
    return 0;
}

static int teardown(void **state) {
    world *w = *state;
    fixture_remove(w->dir);
    obm_context_free(w->ctx);
    obm_free(w->dir), obm_free(w->base), obm_free(w->chat), obm_free(w->math), obm_free(w->pack);
    free(w);
    return 0;
}

static void give_chat_everything(const world *w, const char *generation) {
    save_json(w->chat, "tokenizer.json", own_tokenizer());
    write_config(w->chat, TEMPLATE(BRIEF));
    tiny_write_text(w->chat, "generation_config.json", generation);
}

static obm_status compress_to(const world *w, const char *path, obm_pack **out, obm_error *err) {
    obm_expert e[2] = {OBM_INIT(obm_expert), OBM_INIT(obm_expert)};
    obm_compress_options o = OBM_INIT(obm_compress_options);
    e[0].name = "chat", e[0].path = w->chat;
    e[1].name = "math", e[1].path = w->math;
    o.overwrite = true;
    return obm_compress(w->ctx, w->base, e, 2, &o, path, NULL, out, err);
}

static obm_pack *compress(const world *w) {
    obm_pack *p = NULL;
    OK(compress_to(w, w->pack, &p, err));
    return p;
}

static size_t count_files(const char *dir, const char *ending) {
    size_t n = 0;
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        size_t len = strlen(e->d_name), end = strlen(ending);
        n += len >= end && !strcmp(e->d_name + len - end, ending);
    }
    closedir(d);
    return n;
}

/* ---- what is stored ---- */

static void equal_texts_are_not_stored(void **state) {
    world *w = *state;
    obm_pack *p = compress(w);
    assert_string_equal(obm_pack_text(p, 0), "");
    assert_string_equal(obm_pack_text(p, 1), "");
    assert_int_equal(count_files(w->pack, ".json"), 1);
    assert_null(obm__json_get(p->experts[1].record, "text"));
    obm_pack_free(p);
}

static void each_part_is_stored_alone(void **state) {
    world *w = *state;
    tiny_write_text(w->chat, "generation_config.json", "{\"eos_token_id\": [2, 7]}");
    obm_pack *p = compress(w);
    assert_string_equal(obm_pack_text(p, 0), "eos");
    assert_int_equal(p->experts[0].text.n_eos, 2);
    obm_pack_free(p);
    tiny_write_text(w->chat, "generation_config.json", "{\"eos_token_id\": 2}");
    tiny_write_text(w->chat, "chat_template.jinja", "{{ messages[0]['content'] }}");
    p = compress(w);
    assert_string_equal(obm_pack_text(p, 0), "template");
    assert_int_equal(count_files(w->pack, ".jinja"), 1);
    assert_int_equal(count_files(w->pack, ".json"), 1); /* eos is not own any more: its file went */
    obm_pack_free(p);
    obm_model *m;
    OK(obm_model_open(w->ctx, w->pack, NULL, &m, err));
    assert_string_equal(obm_tokenizer_template(obm_model_tokenizer_for(m, (double[]){1, 0})),
                        "{{ messages[0]['content'] }}");
    assert_string_equal(obm_tokenizer_eos(obm_model_tokenizer_for(m, (double[]){1, 0})), "<|im_end|>"); /* the base's */
    assert_ptr_equal(obm_model_tokenizer_for(m, (double[]){0, 1}), obm_model_tokenizer(m));
    assert_ptr_equal(obm_model_tokenizer_for(m, NULL), obm_model_tokenizer(m));
    obm_model_free(m);
}

/* Other merges cut other words; ids mean the same, so that is the expert's affair. */
static void other_merges_are_fine(void **state) {
    world *w = *state;
    obm_json *t = base_tokenizer(), *none = obm__json_new_array();
    assert_true(obm__json_set(child(t, "model"), "merges", none));
    save_json(w->chat, "tokenizer.json", t);
    obm_pack *p = compress(w);
    assert_string_equal(obm_pack_text(p, 0), "tokenizer");
    obm_pack_free(p);
    obm_model *m;
    int32_t *ids;
    size_t n, base_n;
    OK(obm_model_open(w->ctx, w->pack, NULL, &m, err));
    OK(obm_tokenizer_encode(obm_model_tokenizer_for(m, (double[]){1, 0}), "has", 3, false, &ids, &n, err));
    obm_free(ids);
    OK(obm_tokenizer_encode(obm_model_tokenizer(m), "has", 3, false, &ids, &base_n, err));
    obm_free(ids);
    assert_int_equal(n, 3);
    assert_true(base_n < 3);
    obm_model_free(m);
}

static void ids_in_conflict_are_refused(void **state) {
    world *w = *state;
    obm_json *t = base_tokenizer(), *vocab = child(child(t, "model"), "vocab");
    int64_t a, b;
    char expected[160];
    assert_true(obm__json_int(obm__json_get(vocab, "a"), &a) && obm__json_int(obm__json_get(vocab, "b"), &b));
    assert_true(obm__json_set(vocab, "a", obm__json_new_int(b)) && obm__json_set(vocab, "b", obm__json_new_int(a)));
    save_json(w->chat, "tokenizer.json", t);
    snprintf(expected, sizeof expected, "tokenizer.json gives id %d the token \"%s\", the base's is \"%s\"",
             (int)(a < b ? a : b), a < b ? "b" : "a", a < b ? "a" : "b");
    FAILS(compress_to(w, w->pack, NULL, err), OBM_E_MISMATCH, expected);
    FAILS(compress_to(w, w->pack, NULL, err), OBM_E_MISMATCH, "expert chat: ");
    assert_false(obm__is_directory(w->pack));
    save_json(w->chat, "tokenizer.json", base_tokenizer());
    obm_pack *p = compress(w);
    save_json(w->chat, "tokenizer.json", own_tokenizer());
    t = own_tokenizer();
    assert_true(
        obm__json_set((obm_json *)obm__json_at(child(t, "added_tokens"), 1), "content", obm__json_new_string("<|X|>")));
    save_json(w->math, "tokenizer.json", t);
    obm_expert e = OBM_INIT(obm_expert);
    e.name = "law", e.path = w->math;
    FAILS(obm_pack_add(p, &e, NULL, err), OBM_E_FORMAT, "added token \"<|X|>\" has id 1"); /* contradicts itself */
    obm_compress_options dry = OBM_INIT(obm_compress_options);
    dry.dry_run = true;
    t = base_tokenizer();
    vocab = child(child(t, "model"), "vocab");
    assert_true(obm__json_set(vocab, "a", obm__json_new_int(b)) && obm__json_set(vocab, "b", obm__json_new_int(a)));
    save_json(w->math, "tokenizer.json", t);
    FAILS(obm_pack_add(p, &e, &dry, err), OBM_E_MISMATCH, "expert law: ");
    FAILS(obm_pack_add(p, &e, NULL, err), OBM_E_MISMATCH, "expert law: ");
    assert_int_equal(obm_pack_task_count(p), 2);
    obm_pack_free(p);
}

static void tokenizers_that_cannot_run_are_refused(void **state) {
    world *w = *state;
    obm_json *t = own_tokenizer();
    assert_true(obm__json_set(child(t, "model"), "type", obm__json_new_string("WordPiece")));
    save_json(w->chat, "tokenizer.json", t);
    FAILS(compress_to(w, w->pack, NULL, err), OBM_E_UNSUPPORTED, "WordPiece");
    t = own_tokenizer();
    assert_true(obm__json_set(child(t, "model"), "vocab", obm__json_new_array()));
    save_json(w->chat, "tokenizer.json", t);
    FAILS(compress_to(w, w->pack, NULL, err), OBM_E_UNSUPPORTED, "expert chat: ");
    tiny_write_text(w->chat, "tokenizer.json", "{\"model\": ");
    FAILS(compress_to(w, w->pack, NULL, err), OBM_E_FORMAT, "tokenizer.json");
    tiny_write_text(w->chat, "tokenizer.json", "[]");
    FAILS(compress_to(w, w->pack, NULL, err), OBM_E_FORMAT, "expected an object");
    save_json(w->chat, "tokenizer.json", own_tokenizer());
    tiny_write_text(w->chat, "generation_config.json", "{\"eos_token_id\": \"x\"}");
    FAILS(compress_to(w, w->pack, NULL, err), OBM_E_FORMAT, "eos_token_id");
}

/* ---- changes, damage, age ---- */

static void they_come_and_go_with_their_expert(void **state) {
    world *w = *state;
    give_chat_everything(w, "{\"eos_token_id\": [2, 9]}");
    obm_pack *p = compress(w);
    assert_string_equal(obm_pack_text(p, 0), "tokenizer, template, eos");
    assert_int_equal(count_files(w->pack, ".json"), 4);
    char *stray = obm__path_join(w->pack, "tokenizer.obm-partial.tmp-1-1"),
         *other = obm__path_join(w->pack, "tokenizer-mine.json");
    OK(obm__file_write(stray, "x", 1, err));
    OK(obm__file_write(other, "x", 1, err));
    OK(obm_pack_verify(p, NULL, NULL, err));
    OK(obm_pack_remove(p, "chat", err));
    assert_int_equal(count_files(w->pack, ".json"), 2); /* pack.json, and what is not ours */
    assert_false(obm__file_exists(stray));
    assert_true(obm__file_exists(other));
    obm_expert e = OBM_INIT(obm_expert);
    e.name = "again", e.path = w->chat;
    OK(obm_pack_add(p, &e, NULL, err));
    e.name = "more"; /* the same files: stored once, and they stay while one expert names them */
    OK(obm_pack_add(p, &e, NULL, err));
    assert_int_equal(count_files(w->pack, ".json"), 5);
    OK(obm_pack_remove(p, "again", err));
    assert_int_equal(count_files(w->pack, ".json"), 5);
    assert_string_equal(obm_pack_text(p, 1), "tokenizer, template, eos");
    OK(obm_pack_verify(p, NULL, NULL, err));
    obm_pack_free(p);
    obm_free(stray), obm_free(other);
}

static void rewrite(const char *path, const char *text) { OK(obm__file_write(path, text, strlen(text), err)); }

static void damage_is_found(void **state) {
    world *w = *state;
    give_chat_everything(w, "{\"eos_token_id\": [2, 9]}");
    obm_pack *p = compress(w);
    char *path = obm__strdup(p->experts[0].text.paths[OBM_TEXT_TOKENIZER]), *text;
    size_t size;
    OK(obm__file_read(path, &text, &size, err));
    *strstr(text, "<|tool|>") = '{';
    OK(obm__file_write(path, text, size, err));
    FAILS(obm_pack_verify(p, NULL, NULL, err), OBM_E_FORMAT, "tokenizer-");
    obm_pack_free(p);
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err)); /* checksums are verify's */
    FAILS(obm_pack_verify(p, NULL, NULL, err), OBM_E_FORMAT, "checksum");
    obm_pack_free(p);
    text[size - 1] = 0;
    rewrite(path, text);
    FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_FORMAT, "bytes long");
    unlink(path);
    FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_IO, "tokenizer-");
    obm_free(text), obm_free(path);
}

static void edit_text(const world *w, const char *key, obm_json *value) {
    obm_json *manifest = load_json(w->pack, "pack.json");
    obm_json *text = child(obm__json_at(obm__json_get(manifest, "experts"), 0), "text");
    assert_true(obm__json_set(text, key, value));
    save_json(w->pack, "pack.json", manifest);
}

static void hostile_records_are_refused(void **state) {
    world *w = *state;
    obm_pack *p;
    give_chat_everything(w, "{\"eos_token_id\": [2, 9]}");
    obm_pack_free(compress(w));
    obm_json *manifest = load_json(w->pack, "pack.json");
    static const char *const names[] = {"../base/tokenizer.json", "tokenizer-0123456789abcdef.jinja", "pack.json", ""};
    for (size_t i = 0; i < 4; i++) {
        obm_json *files = obm__json_copy(
            obm__json_get(obm__json_get(obm__json_at(obm__json_get(manifest, "experts"), 0), "text"), "files"));
        assert_true(obm__json_set(child(files, "tokenizer.json"), "file", obm__json_new_string(names[i])));
        edit_text(w, "files", files);
        FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_FORMAT, "expert chat: text: \"file\"");
    }
    edit_text(w, "files", obm__json_new_int(1));
    FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_FORMAT, "\"files\"");
    obm_json *unknown = obm__json_new_object();
    assert_true(obm__json_set(unknown, "setup.py", obm__json_new_object()));
    edit_text(w, "files", unknown);
    FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_FORMAT, "unknown text file");
    edit_text(w, "files", obm__json_new_object());
    edit_text(w, "eos", obm__json_new_int(3));
    FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_FORMAT, "\"eos\": expected an array");
    obm_json *list = obm__json_new_array();
    assert_true(obm__json_append(list, obm__json_new_real(1e300)));
    edit_text(w, "eos", list);
    FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_FORMAT, "\"eos\"[0]");
    obm__json_free(manifest);
}

/* A pack.json without "text", as packs had it before. */
static void packs_without_texts_open(void **state) {
    world *w = *state;
    obm_pack *p;
    obm_model *m;
    give_chat_everything(w, "{\"eos_token_id\": [2, 9]}");
    obm_pack_free(compress(w));
    obm_json *manifest = load_json(w->pack, "pack.json"), *experts = child(manifest, "experts");
    obm_json *old = obm__json_new_array();
    for (size_t i = 0; i < 2; i++) {
        obm_json *record = obm__json_new_object();
        const obm_json *now = obm__json_at(experts, i);
        for (void *it = obm__json_first(now); it; it = obm__json_next(now, it))
            if (strcmp(obm__json_key(it), "text"))
                assert_true(obm__json_set(record, obm__json_key(it), obm__json_copy(obm__json_value(it))));
        assert_true(obm__json_append(old, record));
    }
    assert_true(obm__json_set(manifest, "experts", old));
    save_json(w->pack, "pack.json", manifest);
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    assert_string_equal(obm_pack_text(p, 0), "");
    OK(obm_pack_verify(p, NULL, NULL, err));
    OK(obm_model_from_pack(w->ctx, p, NULL, &m, err));
    assert_ptr_equal(obm_model_tokenizer_for(m, (double[]){1, 0}), obm_model_tokenizer(m));
    obm_model_free(m);
    obm_pack_free(p);
}

/* The base's tokenizer is not part of its fingerprint. */
static void a_base_with_another_tokenizer_is_refused(void **state) {
    world *w = *state;
    obm_model *m;
    save_json(w->chat, "tokenizer.json", own_tokenizer());
    obm_pack_free(compress(w));
    obm_json *t = base_tokenizer(), *vocab = child(child(t, "model"), "vocab");
    int64_t a, b;
    assert_true(obm__json_int(obm__json_get(vocab, "a"), &a) && obm__json_int(obm__json_get(vocab, "b"), &b));
    assert_true(obm__json_set(vocab, "a", obm__json_new_int(b)) && obm__json_set(vocab, "b", obm__json_new_int(a)));
    save_json(w->base, "tokenizer.json", t);
    FAILS(obm_model_open(w->ctx, w->pack, NULL, &m, err), OBM_E_MISMATCH, "expert chat: ");
}

/* ---- running ---- */

static obm_model *open_with(world *w, const char *generation) {
    obm_model *m;
    give_chat_everything(w, generation);
    obm_pack_free(compress(w));
    OK(obm_model_open(w->ctx, w->pack, NULL, &m, err));
    return m;
}

static const double chat_route[] = {1, 0}, math_route[] = {0, 1}, soft_route[] = {0.5, 0}, base_route[] = {0, 0};

static obm_completion generate(obm_model *m, obm_prompt prompt, const double *route, bool ignore_eos) {
    obm_generate_options o = OBM_INIT(obm_generate_options);
    obm_completion c;
    o.routes = route, o.n_routes = 1, o.max_tokens = 8, o.ignore_eos = ignore_eos;
    OK(obm_model_generate_batch(m, &prompt, 1, &o, &c, err));
    return c;
}

static size_t encoded(const obm_tokenizer *t, const char *text, bool special, int32_t **ids) {
    size_t n;
    OK(obm_tokenizer_encode(t, text, strlen(text), special, ids, &n, err));
    return n;
}

/* Text under a route is the ids of that route's tokenizer; the text that comes out is decoded with it. */
static void check_prompt(obm_model *m, const double *route, const obm_tokenizer *t) {
    int32_t *ids;
    char *text;
    size_t n = encoded(t, PROMPT, true, &ids), len;
    obm_completion by_text = generate(m, (obm_prompt){.text = PROMPT}, route, true);
    obm_completion by_ids = generate(m, (obm_prompt){.ids = ids, .n_ids = n}, route, true);
    assert_int_equal(by_text.n_prompt, n);
    assert_memory_equal(by_text.ids, by_ids.ids, 8 * sizeof *ids);
    OK(obm_tokenizer_decode(t, by_text.ids, by_text.n_ids, true, &text, &len, err));
    assert_string_equal(by_text.text, text);
    assert_string_equal(by_ids.text, text);
    obm_completion_clear(&by_text), obm_completion_clear(&by_ids);
    obm_free(text), obm_free(ids);
}

static void a_hard_route_has_its_own_tokenizer(void **state) {
    world *w = *state;
    obm_model *m = open_with(w, "{\"eos_token_id\": [2, 9]}");
    const obm_tokenizer *base = obm_model_tokenizer(m), *own = obm_model_tokenizer_for(m, chat_route);
    assert_int_equal(obm_tokenizer_id(own, "<|tool|>"), TOOL);
    assert_int_equal(obm_tokenizer_id(base, "<|tool|>"), -1);
    check_prompt(m, chat_route, own);
    check_prompt(m, math_route, base);
    check_prompt(m, soft_route, base);
    check_prompt(m, base_route, base);
    obm_model_free(m);
}

static void a_hard_route_has_its_own_template(void **state) {
    world *w = *state;
    obm_model *m = open_with(w, "{\"eos_token_id\": [2, 9]}");
    obm_message turn = {"user", "a<|tool|>"};
    static const char own[] =
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\na<|tool|><|im_end|>\n<|im_start|>"
        "assistant\n";
    int32_t *ids;
    size_t n = encoded(obm_model_tokenizer_for(m, chat_route), own, false, &ids);
    obm_free(ids);
    obm_completion c = generate(m, (obm_prompt){.messages = &turn, .n_messages = 1}, chat_route, true);
    assert_int_equal(c.n_prompt, n);
    obm_completion_clear(&c);
    c = generate(m, (obm_prompt){.text = "a<|tool|>", .chat = true}, chat_route, true);
    assert_int_equal(c.n_prompt, n);
    obm_completion_clear(&c);
    n = encoded(obm_model_tokenizer(m), strstr(own, "<|im_start|>user"), false, &ids);
    obm_free(ids);
    c = generate(m, (obm_prompt){.messages = &turn, .n_messages = 1}, soft_route, true);
    assert_int_equal(c.n_prompt, n);
    obm_completion_clear(&c);
    obm_model_free(m);
}

static void a_hard_route_stops_at_its_own_eos(void **state) {
    world *w = *state;
    obm_model *m = open_with(w, "{\"eos_token_id\": 2}");
    obm_prompt prompt = {.text = PROMPT};
    char generation[64];
    size_t at = 1;
    obm_completion free_run = generate(m, prompt, chat_route, true), other = generate(m, prompt, soft_route, true);
    while (at < 7 && free_run.ids[at] == free_run.ids[0]) at++;
    snprintf(generation, sizeof generation, "{\"eos_token_id\": [%d, %d]}", free_run.ids[at], other.ids[0]);
    obm_model_free(m);
    m = open_with(w, generation);
    obm_completion c = generate(m, prompt, chat_route, false);
    assert_int_equal(c.finish, OBM_FINISH_STOP);
    assert_int_equal(c.n_ids, at + 1);
    obm_completion_clear(&c);
    c = generate(m, prompt, soft_route, false); /* its first id is an eos of chat, not of the base */
    assert_int_equal(c.ids[0], other.ids[0]);
    assert_true(other.ids[0] == 2 || c.n_ids > 1);
    obm_completion_clear(&c), obm_completion_clear(&free_run), obm_completion_clear(&other);
    obm_model_free(m);
}

typedef struct asked {
    int32_t ids[64];
    size_t n;
} asked;

static obm_status to_chat(void *user, obm_request *request, double *weights, obm_error *err) {
    asked *a = user;
    const int32_t *ids;
    (void)err;
    obm_request_tokens(request, &ids, &a->n);
    memcpy(a->ids, ids, a->n * sizeof *ids);
    weights[0] = 1;
    return OBM_OK;
}

static void routers_see_the_ids_of_the_base(void **state) {
    world *w = *state;
    obm_model *m = open_with(w, "{\"eos_token_id\": [2, 9]}");
    obm_generate_options o = OBM_INIT(obm_generate_options);
    obm_prompt prompt = {.text = PROMPT};
    obm_completion c;
    asked a = {0};
    int32_t *base, *own;
    size_t n_base = encoded(obm_model_tokenizer(m), PROMPT, false, &base),
           n_own = encoded(obm_model_tokenizer_for(m, chat_route), PROMPT, true, &own);
    o.router = to_chat, o.router_user = &a, o.max_tokens = 1;
    OK(obm_model_generate_batch(m, &prompt, 1, &o, &c, err));
    assert_int_equal(a.n, n_base);
    assert_memory_equal(a.ids, base, n_base * sizeof *base);
    assert_int_equal(c.n_prompt, n_own);
    assert_int_not_equal(n_own, n_base);
    obm_completion_clear(&c);
    obm_free(base), obm_free(own);
    obm_model_free(m);
}

static void each_of_a_batch_has_its_own(void **state) {
    world *w = *state;
    obm_model *m = open_with(w, "{\"eos_token_id\": [2, 9]}");
    const double *one[] = {chat_route, base_route, soft_route, math_route, chat_route};
    obm_prompt prompts[5];
    double routes[5][2];
    obm_completion all[5];
    obm_generate_options o = OBM_INIT(obm_generate_options);
    for (int i = 0; i < 5; i++) {
        prompts[i] = (obm_prompt){.text = PROMPT};
        memcpy(routes[i], one[i], sizeof routes[i]);
    }
    o.routes = routes[0], o.n_routes = 5, o.max_tokens = 8, o.batch = 3;
    OK(obm_model_generate_batch(m, prompts, 5, &o, all, err));
    for (int i = 0; i < 5; i++) {
        obm_completion c = generate(m, prompts[i], one[i], false);
        assert_int_equal(c.n_prompt, all[i].n_prompt);
        assert_int_equal(c.n_ids, all[i].n_ids);
        assert_memory_equal(c.ids, all[i].ids, c.n_ids * sizeof *c.ids);
        assert_string_equal(c.text, all[i].text);
        obm_completion_clear(&c);
    }
    for (int i = 0; i < 5; i++) obm_completion_clear(&all[i]);
    obm_model_free(m);
}

static void scores_follow_the_route(void **state) {
    world *w = *state;
    obm_model *m = open_with(w, "{\"eos_token_id\": [2, 9]}");
    const double *routes[] = {chat_route, soft_route};
    for (int i = 0; i < 2; i++) {
        const obm_tokenizer *t = obm_model_tokenizer_for(m, routes[i]);
        int32_t *prompt, *rest, *whole;
        size_t n = encoded(t, "So <|tool|>", true, &prompt), k = encoded(t, " has", false, &rest),
               all = encoded(t, PROMPT, true, &whole);
        obm_score_item items[4] = {{.prompt = {.text = "So <|tool|>"}, .continuation = " has", .route = routes[i]},
                                   {.prompt = {.ids = prompt, .n_ids = n},
                                    .continuation_ids = rest,
                                    .n_continuation_ids = k,
                                    .route = routes[i]},
                                   {.continuation = PROMPT, .route = routes[i]},
                                   {.continuation_ids = whole, .n_continuation_ids = all, .route = routes[i]}};
        obm_score s[4];
        OK(obm_model_score(m, items, 4, NULL, s, err));
        assert_int_equal(s[0].n, k);
        assert_true(s[0].logprob == s[1].logprob);
        assert_int_equal(s[2].n, all - 1);
        assert_true(s[2].logprob == s[3].logprob);
        for (int j = 0; j < 4; j++) obm_score_clear(&s[j]);
        obm_free(prompt), obm_free(rest), obm_free(whole);
    }
    obm_model_free(m);
}

typedef struct renderer {
    const obm_tokenizer *seen;
    int mode; /* 0: a text, 1: left to the built-in, 2: an error */
} renderer;

static obm_status render(void *user, const obm_tokenizer *t, const obm_message *messages, size_t n, const char **text,
                         obm_error *err) {
    renderer *r = user;
    r->seen = t;
    assert_int_equal(n, 1);
    assert_string_equal(messages[0].role, "user");
    if (r->mode == 0) *text = "a<|tool|>";
    if (r->mode < 2) return OBM_OK;
    if (err) strcpy(err->message, "no template today");
    return OBM_E_UNSUPPORTED;
}

static void templates_may_be_rendered_by_the_caller(void **state) {
    world *w = *state;
    obm_model *m = open_with(w, "{\"eos_token_id\": [2, 9]}");
    obm_generate_options o = OBM_INIT(obm_generate_options);
    obm_score_options so = OBM_INIT(obm_score_options);
    obm_message turn = {"user", "hello"};
    obm_prompt prompt = {.messages = &turn, .n_messages = 1};
    obm_score_item item = {.prompt = prompt, .continuation = "b", .route = chat_route};
    obm_score score;
    obm_completion c;
    renderer r = {0};
    o.render = render, o.render_user = &r, o.routes = chat_route, o.n_routes = 1, o.max_tokens = 1;
    so.render = render, so.render_user = &r;
    OK(obm_model_generate_batch(m, &prompt, 1, &o, &c, err));
    assert_int_equal(c.n_prompt, 2);
    assert_ptr_equal(r.seen, obm_model_tokenizer_for(m, chat_route));
    obm_completion_clear(&c);
    o.routes = soft_route;
    OK(obm_model_generate_batch(m, &prompt, 1, &o, &c, err));
    assert_ptr_equal(r.seen, obm_model_tokenizer(m));
    obm_completion_clear(&c);
    OK(obm_model_score(m, &item, 1, &so, &score, err));
    assert_ptr_equal(r.seen, obm_model_tokenizer_for(m, chat_route));
    obm_score_clear(&score);
    r.mode = 1;
    OK(obm_model_generate_batch(m, &prompt, 1, &o, &c, err));
    assert_true(c.n_prompt > 2);
    obm_completion_clear(&c);
    r.mode = 2;
    FAILS(obm_model_generate_batch(m, &prompt, 1, &o, &c, err), OBM_E_UNSUPPORTED, "no template today");
    obm_model_free(m);
}

/* ---- export ---- */

static void same_file(const char *a_dir, const char *b_dir, const char *name) {
    char *a = obm__path_join(a_dir, name), *b = obm__path_join(b_dir, name), *x, *y;
    size_t n, k;
    OK(obm__file_read(a, &x, &n, err));
    OK(obm__file_read(b, &y, &k, err));
    assert_int_equal(n, k);
    assert_memory_equal(x, y, n);
    obm_free(a), obm_free(b), obm_free(x), obm_free(y);
}

static bool has_file(const char *dir, const char *name) {
    char *path = obm__path_join(dir, name);
    bool there = obm__file_exists(path);
    obm_free(path);
    return there;
}

static void exports_carry_what_applies(void **state) {
    world *w = *state;
    static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"};
    obm_export_options o = OBM_INIT(obm_export_options);
    o.overwrite = true;
    give_chat_everything(w, "{\"eos_token_id\": [2, 9]}");
    obm_pack *p = compress(w);
    char *out = obm__path_join(w->dir, "out");
    OK(obm_pack_export(p, chat_route, &o, out, NULL, err));
    for (int i = 0; i < 3; i++) same_file(out, w->chat, names[i]);
    assert_false(has_file(out, "merges.txt"));
    obm_json *config = load_json(out, "config.json");
    assert_int_equal(obm__json_size(obm__json_get(config, "eos_token_id")), 2);
    obm__json_free(config);
    obm_model *m; /* the folder runs as the route did */
    OK(obm_model_open(w->ctx, out, NULL, &m, err));
    assert_int_equal(obm_tokenizer_id(obm_model_tokenizer(m), "<|tool|>"), TOOL);
    obm_model_free(m);
    OK(obm_pack_export(p, soft_route, &o, out, NULL, err));
    for (int i = 0; i < 3; i++) same_file(out, w->base, names[i]);
    assert_true(has_file(out, "merges.txt"));
    OK(obm_pack_export(p, math_route, &o, out, NULL, err));
    for (int i = 0; i < 3; i++) same_file(out, w->base, names[i]);
    obm_pack_free(p);
    /* eos from config.json alone: the base's generation_config.json would win over it */
    char *generation = obm__path_join(w->chat, "generation_config.json");
    unlink(generation);
    obm_free(generation);
    config = load_json(w->chat, "config.json");
    assert_true(obm__json_set(config, "eos_token_id", obm__json_new_int(11)));
    save_json(w->chat, "config.json", config);
    p = compress(w);
    OK(obm_pack_export(p, chat_route, &o, out, NULL, err));
    assert_false(has_file(out, "generation_config.json"));
    int64_t eos = 0;
    config = load_json(out, "config.json");
    assert_true(obm__json_int(obm__json_get(config, "eos_token_id"), &eos));
    assert_int_equal(eos, 11);
    obm__json_free(config);
    obm_pack_free(p);
    obm_free(out);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(equal_texts_are_not_stored),
        TEST(each_part_is_stored_alone),
        TEST(other_merges_are_fine),
        TEST(ids_in_conflict_are_refused),
        TEST(tokenizers_that_cannot_run_are_refused),
        TEST(they_come_and_go_with_their_expert),
        TEST(damage_is_found),
        TEST(hostile_records_are_refused),
        TEST(packs_without_texts_open),
        TEST(a_base_with_another_tokenizer_is_refused),
        TEST(a_hard_route_has_its_own_tokenizer),
        TEST(a_hard_route_has_its_own_template),
        TEST(a_hard_route_stops_at_its_own_eos),
        TEST(routers_see_the_ids_of_the_base),
        TEST(each_of_a_batch_has_its_own),
        TEST(scores_follow_the_route),
        TEST(templates_may_be_rendered_by_the_caller),
        TEST(exports_carry_what_applies),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
