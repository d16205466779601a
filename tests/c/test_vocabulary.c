/* Merges of models with different vocabularies: the result's tokenizer, the row that every token takes, and the chat
 * template. */
#include "recipe_fixture.h"

static char *in_model(const char *dir, const char *name) {
    char *path = obm__path_join(folder, dir), *whole = obm__path_join(path, name);
    obm_free(path);
    return whole;
}

static void write_file(const char *dir, const char *name, const char *text) {
    char *path = in_model(dir, name);
    OK(obm__file_write(path, text, strlen(text), err));
    obm_free(path);
}

static char *read_file(const char *dir, const char *name) {
    char *path = in_model(dir, name), *text;
    OK(obm__file_read(path, &text, NULL, err));
    obm_free(path);
    return text;
}

/* ---- models ---- */

#define COLS 300 /* more than one block of columns */

/* Column c of row `row` of model m's embedding. */
static double value(int m, size_t row, size_t c) { return m * 100 + (double)row + (double)c / 512; }

static void write_model(const char *name, int m, int64_t rows, const char *tokenizer, const char *tokenizer_config) {
    obm__st_writer *w;
    char *dir = in_model(name, ""), *path = in_model(name, "model.safetensors"), config[160];
    OK(obm__make_directory(dir, err));
    OK(obm__st_writer_new(path, &w, err));
    OK(obm__st_writer_declare(w, "model.embed_tokens.weight", OBM_F32, 2, (int64_t[]){rows, COLS}, err));
    OK(obm__st_writer_declare(w, "model.norm.weight", OBM_F32, 1, (int64_t[]){1}, err));
    OK(obm__st_writer_begin(w, err));
    for (int64_t r = 0; r < rows; r++) {
        float x[COLS];
        for (size_t c = 0; c < COLS; c++) x[c] = (float)value(m, (size_t)r, c);
        OK(obm__st_writer_write(w, x, sizeof x, err));
    }
    OK(obm__st_writer_write(w, &(float){(float)m}, 4, err));
    OK(obm__st_writer_finish(w, NULL, err));
    obm__st_writer_free(w);
    snprintf(config, sizeof config, "{\"model_type\": \"llama\", \"vocab_size\": %d, \"tie_word_embeddings\": true}",
             (int)rows);
    write_file(name, "config.json", config);
    if (tokenizer) write_file(name, "tokenizer.json", tokenizer);
    if (tokenizer_config) write_file(name, "tokenizer_config.json", tokenizer_config);
    obm_free(dir), obm_free(path);
}

#define TOKENIZER(vocab, merges, added)                                                                       \
    "{\"version\": \"1.0\", \"added_tokens\": [" added "], \"model\": {\"type\": \"BPE\", \"vocab\": {" vocab \
    "}, \"merges\": [" merges "]}}"
#define ADDED(id, text) "{\"id\": " #id ", \"content\": \"" text "\", \"special\": true, \"normalized\": false}"

/* base: a b ab <s>; one: a b ab <s> <x> mix; two: b c a <s> mix, with two rows more */
static void three_models(void) {
    write_model("base", 1, 4, TOKENIZER("\"a\": 0, \"b\": 1, \"ab\": 2", "\"a b\"", ADDED(3, "<s>")),
                "{\"added_tokens_decoder\": {\"3\": {\"content\": \"<s>\"}}, \"chat_template\": \"{{ first }}\"}");
    write_model("one", 2, 6,
                TOKENIZER("\"a\": 0, \"b\": 1, \"ab\": 2", "\"a b\"",
                          ADDED(3, "<s>") ", " ADDED(4, "<x>") ", " ADDED(5, "mix")),
                "{\"chat_template\": \" {{ second }}\\n\"}");
    write_model("two", 3, 7, TOKENIZER("\"b\": 0, \"c\": 1, \"a\": 2", "", ADDED(3, "<s>") ", " ADDED(4, "mix")),
                "{\"chat_template\": [{\"name\": \"x\", \"template\": \"no\"}, {\"name\": \"default\", \"template\": "
                "\"{{ second }}\"}]}");
}

/* That row `row` of the result is the mean of n rows, each of a model; n 0: zero. */
typedef struct mean {
    size_t n, models[3], rows[3];
} mean;

static void expect_rows(const obm_checkpoint *c, const mean *want, size_t rows) {
    obm_tensor t;
    int64_t size = 0;
    OK(obm_checkpoint_get(c, "model.embed_tokens.weight", &t, err));
    assert_int_equal(t.shape[0], rows);
    assert_true(obm__json_int(obm__json_get(c->config, "vocab_size"), &size));
    assert_int_equal(size, rows);
    for (size_t r = 0; r < rows; r++) {
        float x[COLS];
        OK(obm_tensor_read_f32(&t, (int64_t)(r * COLS), COLS, x, err));
        for (size_t col = 0; col < COLS; col++) {
            double sum = 0;
            for (size_t i = 0; i < want[r].n; i++)
                sum += value((int)want[r].models[i], want[r].rows[i], col) / (double)want[r].n;
            if (fabs(x[col] - sum) > 1e-3) fail_msg("row %zu, column %zu is %g, expected %g", r, col, x[col], sum);
        }
    }
}

static int64_t id_in(const char *dir, const char *token) {
    obm_json *root;
    char *path = in_model(dir, "tokenizer.json");
    OK(obm__json_load(path, &root, err));
    int64_t id = -1;
    const obm_json *added = obm__json_get(root, "added_tokens");
    obm__json_int(obm__json_get(obm__json_get(obm__json_get(root, "model"), "vocab"), token), &id);
    for (size_t i = 0; i < obm__json_size(added); i++)
        if (!strcmp(obm__json_string(obm__json_get(obm__json_at(added, i), "content")), token))
            obm__json_int(obm__json_get(obm__json_at(added, i), "id"), &id);
    obm__json_free(root);
    obm_free(path);
    return id;
}

/* ---- rows ---- */

#define ALL                                                                                                     \
    "merge_method: linear\nbase_model: base\nmodels: [{model: base}, {model: one}, {model: two}]\nparameters: " \
    "{weight: 1}\n"

/* Rows as linear means of three inputs: where a model lacks a token the base's row stands in, then the only one. */
static void test_base(void **state) {
    (void)state;
    three_models();
    write_file("base", "vocab.json", "{}");
    obm_checkpoint *c = merged(ALL "tokenizer_source: base\n", "based");
    const mean want[] = {
        {3, {1, 2, 3}, {0, 0, 2}}, {3, {1, 2, 3}, {1, 1, 0}}, {3, {1, 2, 1}, {2, 2, 2}}, {3, {1, 2, 3}, {3, 3, 3}}};
    expect_rows(c, want, 4);
    obm_checkpoint_free(c);
    char *first = read_file("base", "tokenizer.json"), *second = read_file("based", "tokenizer.json");
    assert_string_equal(first, second); /* as it is */
    obm_free(first), obm_free(second);
    obm_free(read_file("based", "vocab.json"));
}

static void test_union(void **state) {
    (void)state;
    three_models();
    obm_checkpoint *c = merged(ALL "tokenizer: {}\n", "united"); /* source: union */
    assert_int_equal(id_in("united", "ab"), 2);
    assert_int_equal(id_in("united", "c"), 4);
    assert_int_equal(id_in("united", "<x>"), 5);
    assert_int_equal(id_in("united", "mix"), 6);
    /* <x> and c have one owner each; mix is what the base lacks, so the mean of two stands in for it */
    const mean want[] = {{3, {1, 2, 3}, {0, 0, 2}},
                         {3, {1, 2, 3}, {1, 1, 0}},
                         {3, {1, 2, 1}, {2, 2, 2}},
                         {3, {1, 2, 3}, {3, 3, 3}},
                         {1, {3}, {1}},
                         {1, {2}, {4}},
                         {2, {2, 3}, {5, 4}}};
    expect_rows(c, want, 7);
    obm_checkpoint_free(c);
    char *config = read_file("united", "tokenizer_config.json");
    assert_non_null(strstr(config, "\"mix\"")); /* added_tokens_decoder */
    obm_free(config);
    char *stale = in_model("united", "vocab.json"); /* of the base: it lacks the new tokens */
    assert_false(obm__file_exists(stale));
    obm_free(stale);
}

static void test_tokens(void **state) {
    (void)state;
    three_models();
    obm_checkpoint *c =
        merged("merge_method: passthrough\nmodels: [{model: base}]\ntokenizer:\n  source: model:base\n  "
               "pad_to_multiple_of: 4\n"
               "  tokens:\n    new: {source: {kind: model_token, model: base, token: ab}}\n"
               "    newer: {source: {kind: model_token, model: base, token_id: 3}}\n"
               "    nothing: {source: {kind: zero}}\n    none: {}\n    a: {source: {kind: zero}, force: true}\n"
               "    b: {source: {kind: zero}}\n",
               "ruled");
    mean want[8] = {{0}, {1, {1}, {1}}, {1, {1}, {2}}, {1, {1}, {3}}, {1, {1}, {2}}, {1, {1}, {3}}, {0}, {0}};
    expect_rows(c, want, 8);
    obm_checkpoint_free(c);

    c = merged("merge_method: linear\nmodels: [{model: base}, {model: one}]\nparameters: {weight: 1}\ntokenizer:\n  "
               "source: one\n"
               "  tokens: {<s>: {source: one, force: true}, a: {source: base, force: true}}\n",
               "forced");
    const mean both[] = {{1, {1}, {0}}, {2, {1, 2}, {1, 1}}, {2, {1, 2}, {2, 2}},
                         {1, {2}, {3}}, {1, {2}, {4}},       {1, {2}, {5}}};
    expect_rows(c, both, 6);
    obm_checkpoint_free(c);
}

/* Rows behind the last token are the mean of all before, for each input; the merge comes after. */
static void test_padding(void **state) {
    (void)state;
    three_models();
    obm_checkpoint *c =
        merged("merge_method: passthrough\nmodels: [{model: one}]\ntokenizer: {source: base, pad_to_multiple_of: 8}\n",
               "padded");
    obm_tensor t;
    float x[COLS];
    OK(obm_checkpoint_get(c, "model.embed_tokens.weight", &t, err));
    assert_int_equal(t.shape[0], 8);
    for (int64_t row = 6; row < 8; row++) {
        OK(obm_tensor_read_f32(&t, row * COLS, COLS, x, err));
        for (size_t col = 0; col < COLS; col++) assert_true(fabs(x[col] - (value(2, 0, col) + 2.5)) < 1e-3);
    }
    obm_checkpoint_free(c);
}

/* What has no row is no part of the base's vocabulary: its pieces, their merges and added tokens go. */
static void test_unused_tokens(void **state) {
    (void)state;
    three_models();
    write_model("base", 1, 2, TOKENIZER("\"a\": 0, \"b\": 1, \"ab\": 2", "\"a b\", [\"a\", \"ab\"]", ADDED(3, "<s>")),
                NULL);
    obm_checkpoint *c =
        merged("merge_method: passthrough\nmodels: [{model: base}]\ntokenizer_source: base\n", "stripped");
    const mean want[] = {{1, {1}, {0}}, {1, {1}, {1}}};
    expect_rows(c, want, 2);
    obm_checkpoint_free(c);
    assert_int_equal(id_in("stripped", "b"), 1);
    assert_int_equal(id_in("stripped", "ab"), -1);
    assert_int_equal(id_in("stripped", "<s>"), -1);
    char *text = read_file("stripped", "tokenizer.json");
    assert_non_null(strstr(text, "\"merges\": []"));
    obm_free(text);
}

/* Task vectors by token: rows that a model lacks do not change. */
static void test_task_vectors(void **state) {
    (void)state;
    three_models();
    obm_checkpoint *c =
        merged("merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: two}]\nparameters: {weight: 1}\n"
               "tokenizer_source: union\nchat_template: chatml\n",
               "vectors");
    const mean want[] = {{1, {3}, {2}}, {1, {3}, {0}}, {1, {1}, {2}}, {1, {3}, {3}}, {1, {3}, {1}}, {1, {3}, {4}}};
    expect_rows(c, want, 6);
    obm_checkpoint_free(c);
}

/* A document that is only planned yet has a vocabulary too. */
static void test_documents(void **state) {
    (void)state;
    three_models();
    obm_checkpoint *c = merged(
        "merge_method: linear\nmodels: [{model: both}, {model: two}]\nparameters: {weight: 1}\ntokenizer_source: both\n"
        "---\nname: both\nmerge_method: passthrough\nmodels: [{model: one}]\ntokenizer: {tokens: {c: {source: {kind: "
        "zero}}}}\n",
        "chained");
    const mean want[] = {{2, {2, 3}, {0, 2}}, {2, {2, 3}, {1, 0}}, {1, {2}, {2}},
                         {2, {2, 3}, {3, 3}}, {1, {2}, {4}},       {2, {2, 3}, {5, 4}}};
    obm_tensor t;
    float x;
    OK(obm_checkpoint_get(c, "model.embed_tokens.weight", &t, err));
    for (size_t r = 0; r < 6; r++) {
        double sum = 0;
        for (size_t i = 0; i < want[r].n; i++)
            sum += value((int)want[r].models[i], want[r].rows[i], 0) / (double)want[r].n;
        OK(obm_tensor_read_f32(&t, (int64_t)(r * COLS), 1, &x, err));
        assert_true(fabs(x - sum) < 1e-3);
    }
    OK(obm_tensor_read_f32(&t, 6 * COLS, 1, &x, err)); /* c: zero in one, its own row in the other */
    assert_true(t.shape[0] == 7 && fabs(x - 0.5 * value(3, 1, 0)) < 1e-3);
    obm_checkpoint_free(c);
}

/* ---- chat templates ---- */

static void expect_template(const char *recipe, const char *part) {
    obm_checkpoint_free(merged(recipe, "chat"));
    char *text = read_file("chat", "chat_template.jinja"), *config = read_file("chat", "tokenizer_config.json");
    if (!strstr(text, part)) fail_msg("`%s` is not in: %s", part, text);
    obm_json *root;
    OK(obm__json_parse(config, strlen(config), "config", &root, err));
    assert_string_equal(obm__json_string(obm__json_get(root, "chat_template")), text);
    obm__json_free(root);
    obm_free(text), obm_free(config);
}

static void test_chat_templates(void **state) {
    (void)state;
    three_models();
    const char own[] = ALL "tokenizer_source: union\nchat_template: '{{ a template of my own }}'\n";
    expect_template(ALL "tokenizer_source: base\nchat_template: auto\n", "{{ second }}");
    expect_template(ALL "tokenizer_source: union\nchat_template: llama3\n", "<|start_header_id|>");
    expect_template(own, "{{ a template of my own }}");
    expect_template("merge_method: passthrough\nmodels: [{model: one}]\nchat_template: auto\n", "{{ second }}");
    write_model("bare", 1, 4, NULL, NULL);
    obm_checkpoint_free(merged("merge_method: passthrough\nmodels: [{model: bare}]\nchat_template: alpaca\n", "chat"));
    assert_non_null(strstr(warnings, "no tokenizer_config.json"));
    obm_checkpoint_free(merged("merge_method: passthrough\nmodels: [{model: bare}]\nchat_template: auto\n", "chat"));
    assert_non_null(strstr(warnings, "no model has a chat template"));
    write_model("listed", 1, 4, NULL, "[]");
    FAILS(merge_to("merge_method: passthrough\nmodels: [{model: listed}]\nchat_template: chatml\n", "never", NULL, err),
          OBM_E_FORMAT, "listed/tokenizer_config.json: expected an object, found an array");
}

/* ---- errors: all while planning ---- */

static void test_errors(void **state) {
    (void)state;
    three_models();
    write_model("bare", 1, 4, NULL, NULL);
    write_model("unigram", 1, 4, "{\"model\": {\"type\": \"Unigram\", \"vocab\": [[\"a\", 0]]}}", NULL);
    expect_error(ALL, OBM_E_SHAPE, "or tokenizer_source says which to take");
    expect_error("merge_method: passthrough\nmodels: [{model: bare}]\ntokenizer_source: base\n", OBM_E_NOTFOUND,
                 "recipe: tokenizer: bare has no tokenizer.json");
    expect_error("merge_method: passthrough\nmodels: [{model: base}]\ntokenizer_source: bare\n", OBM_E_NOTFOUND,
                 "recipe: tokenizer: bare has no tokenizer.json");
    expect_error("merge_method: passthrough\nmodels: [{model: base}]\ntokenizer_source: nowhere\n", OBM_E_NOTFOUND,
                 "nowhere");
    expect_error("merge_method: passthrough\nmodels: [{model: unigram}]\ntokenizer_source: base\n", OBM_E_UNSUPPORTED,
                 "expected a vocabulary of the form {token: id} (BPE), found an array");
    expect_error(ALL "tokenizer: {tokens: {new: {source: elsewhere}}}\n", OBM_E_ARG,
                 "tokenizer.tokens.new: elsewhere is no model that model.embed_tokens.weight is merged from");
    expect_error(ALL "tokenizer: {tokens: {<x>: {source: two}}}\n", OBM_E_NOTFOUND,
                 "tokens.<x>: two has no token \"<x>\"");
    expect_error(ALL "tokenizer: {tokens: {n: {source: {kind: model_token, model: one, token: nil}}}}\n",
                 OBM_E_NOTFOUND, "one has no token \"nil\"");
    expect_error(ALL "tokenizer: {tokens: {n: {source: {kind: model_token, model: one, token_id: 6}}}}\n", OBM_E_ARG,
                 "token_id: one has 6 rows, found 6");
    /* a model without a tokenizer has the base's vocabulary */
    OK(merge_to("merge_method: linear\nmodels: [{model: base}, {model: bare}]\nparameters: {weight: "
                "1}\ntokenizer_source: base\n",
                NULL, NULL, err));
    assert_non_null(strstr(warnings, "bare has no tokenizer.json: its vocabulary is taken to be that of base"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_base),      cmocka_unit_test(test_union),          cmocka_unit_test(test_tokens),
        cmocka_unit_test(test_padding),   cmocka_unit_test(test_unused_tokens),  cmocka_unit_test(test_task_vectors),
        cmocka_unit_test(test_documents), cmocka_unit_test(test_chat_templates), cmocka_unit_test(test_errors),
    };
    return cmocka_run_group_tests_name("vocabulary", tests, setup, teardown);
}
