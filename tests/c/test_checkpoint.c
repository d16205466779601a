/* Checkpoint folders: which files count, what is refused and in which words, and the tensors as one list. */
#include "io_fixture.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define T(name) "\"" name "\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}"
#define INDEX "model.safetensors.index.json"

/* A fresh folder under the fixture's. */
static const char *folder(const char *name) {
    const char *path = in_dir(name);
    if (mkdir(path, 0777) != 0) abort();
    return path;
}

static void put(const char *dir, const char *name, const char *text) {
    char path[600];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    put_text(path, text);
}

/* One U8 tensor of two bytes. */
static void put_weights(const char *dir, const char *name, const char *tensor, const char *two_bytes) {
    char path[600], header[200];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    snprintf(header, sizeof header, "{" T("%s") "}", tensor);
    put_safetensors(path, header, two_bytes, 2);
}

static obm_checkpoint *open_ok(const char *path) {
    obm_checkpoint *c = NULL;
    obm_error err;
    if (obm_checkpoint_open(NULL, path, &c, &err) != OBM_OK) fail_msg("%s", err.message);
    return c;
}

static void refused(const char *path, obm_status status, const char *said) {
    obm_checkpoint *c = (obm_checkpoint *)&c;
    obm_error err;
    assert_int_equal(obm_checkpoint_open(NULL, path, &c, &err), status);
    assert_ptr_equal(c, &c);
    if (!strstr(err.message, said)) fail_msg("expected \"%s\" in \"%s\"", said, err.message);
    assert_int_equal(err.code, status);
}

static void has(const obm_checkpoint *c, const char *name, const char *two_bytes) {
    obm_tensor t;
    obm_error err;
    if (obm_checkpoint_get(c, name, &t, &err) != OBM_OK) fail_msg("%s", err.message);
    assert_memory_equal(t.data, two_bytes, 2);
}

static void test_single_file(void **state) {
    (void)state;
    const char *dir = folder("file");
    put_weights(dir, "any.safetensors", "x", "ab");
    char path[600];
    snprintf(path, sizeof path, "%s/any.safetensors", dir);
    obm_checkpoint *c = open_ok(path);
    assert_string_equal(obm_checkpoint_path(c), path);
    assert_string_equal(c->directory, dir);
    assert_null(obm_checkpoint_config(c));
    assert_false(obm_checkpoint_is_tied(c));
    assert_int_equal(obm_checkpoint_count(c), 1);
    has(c, "x", "ab");
    char hex[65];
    assert_int_equal(obm_checkpoint_sha256(c, "x", hex, NULL), OBM_OK);
    assert_string_equal(hex, "fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603");
    obm_error err;
    obm_tensor t;
    assert_int_equal(obm_checkpoint_sha256(c, "y", hex, &err), OBM_E_NOTFOUND);
    assert_int_equal(obm_checkpoint_get(c, "y", &t, &err), OBM_E_NOTFOUND);
    assert_non_null(strstr(err.message, "no tensor y"));
    obm_checkpoint_free(c);
    refused(in_dir("file/absent.safetensors"), OBM_E_IO, "No such file");
    refused(in_dir("nowhere"), OBM_E_IO, "No such file");
    refused("", OBM_E_IO, "cannot open");
}

static void test_indexed(void **state) {
    (void)state;
    const char *dir = folder("indexed");
    put_weights(dir, "m-1.safetensors", "b", "bb");
    put_weights(dir, "m-2.safetensors", "a", "aa");
    put_weights(dir, "unlisted.safetensors", "c", "cc");
    put(dir, "config.json", "{\"tie_word_embeddings\": false}\n");
    put(dir, INDEX,
        "{\"metadata\":{\"total_size\":4},\"weight_map\":{\"b\":\"m-1.safetensors\",\"a\":\"m-2.safetensors\"}}");
    obm_checkpoint *c = open_ok(dir);
    assert_string_equal(obm_checkpoint_config(c), "{\"tie_word_embeddings\": false}\n");
    assert_int_equal(obm_checkpoint_count(c), 2);
    const char *name;
    obm_tensor t;
    obm_checkpoint_at(c, 0, &name, &t);
    assert_string_equal(name, "a");
    assert_memory_equal(t.data, "aa", 2);
    obm_checkpoint_at(c, 1, &name, NULL);
    assert_string_equal(name, "b");
    obm_checkpoint_free(c);
}

static void test_bad_index(void **state) {
    (void)state;
    static const struct {
        const char *text, *said;
    } cases[] = {
        {"{\"weight_map\":{\"a\":\"m.safetensors\",\"z\":\"m.safetensors\"}}", "tensor z is not in"},
        {"{\"weight_map\":{\"a\":\"gone.safetensors\"}}", "No such file"},
        {"{\"weight_map\":{\"a\":\"../bad/m.safetensors\"}}",
         "weight_map.a: expected the name of a file in this folder, found \"../bad"},
        {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "found \"/etc/passwd\""},
        {"{\"weight_map\":{\"a\":\"..\"}}", "found \"..\""},
        {"{\"weight_map\":{\"a\":\"sub\\\\m.safetensors\"}}", "expected the name of a file"},
        {"{\"weight_map\":{\"a\":\"m.safetensors\\u0000.txt\"}}", "expected the name of a file"},
        {"{\"weight_map\":{\"a\":\"\"}}", "expected the name of a file"},
        {"{\"weight_map\":{\"a\":7}}", "found an integer"},
        {"{\"weight_map\":[]}", "weight_map: expected an object, found an array"},
        {"{}", "weight_map: expected an object, found nothing"},
        {"[", "not valid JSON"},
    };
    const char *dir = folder("bad");
    put_weights(dir, "m.safetensors", "a", "aa");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put(dir, INDEX, cases[i].text);
        refused(dir, i == 1 ? OBM_E_IO : OBM_E_FORMAT, cases[i].said);
    }
}

static void test_precedence(void **state) {
    (void)state;
    const char *dir = folder("both");
    put_weights(dir, "shard.safetensors", "a", "11");
    put(dir, INDEX, "{\"weight_map\":{\"a\":\"shard.safetensors\"}}");
    put_weights(dir, "model.safetensors", "a", "22");
    obm_checkpoint *c = open_ok(dir);
    has(c, "a", "22");
    obm_checkpoint_free(c);
}

static void test_no_index(void **state) {
    (void)state;
    const char *dir = folder("loose");
    refused(dir, OBM_E_FORMAT, "no weights here");
    refused(dir, OBM_E_FORMAT, "found an empty folder");
    folder("loose/a");
    put(dir, "config.json", "{}");
    refused(dir, OBM_E_FORMAT, "or other .safetensors files, found a/, config.json");
    static const char pointer[] = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    put(dir, "one.safetensors", pointer);
    refused(dir, OBM_E_FORMAT, "loose/one.safetensors: found a Git LFS pointer of 63 bytes in place of the file");
    put(dir, "config.json", pointer);
    put_weights(dir, "one.safetensors", "a", "11");
    refused(dir, OBM_E_FORMAT, "loose/config.json: found a Git LFS pointer of 63 bytes in place of the file");
    put(dir, "config.json", "{}");
    put_weights(dir, "one.safetensors", "a", "11");
    put_weights(dir, "two.safetensors", "b", "22");
    put(dir, "optimizer.pt", "x");
    put(dir, "three.safetensors.tmp-1-0", "half a file");
    obm_checkpoint *c = open_ok(dir);
    assert_int_equal(obm_checkpoint_count(c), 2);
    has(c, "b", "22");
    obm_checkpoint_free(c);
    put_weights(dir, "three.safetensors", "a", "33");
    refused(dir, OBM_E_FORMAT, "tensor a is in two files");
    put_weights(dir, "three.safetensors", "c", "33");
    put_weights(dir, "model-00001-of-00001.safetensors", "d", "44");
    obm_checkpoint_free(open_ok(dir));
    put_weights(dir, "model-00002-of-00003.safetensors", "e", "55");
    refused(dir, OBM_E_FORMAT,
            "model-00002-of-00003.safetensors is one of several files, and model.safetensors.index.json is missing");
}

static void test_refused_kinds(void **state) {
    (void)state;
    const char *dir = folder("torch");
    put(dir, "config.json", "{}");
    put(dir, "pytorch_model.bin", "x");
    refused(dir, OBM_E_UNSUPPORTED, "AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)");
    refused(in_dir("torch/pytorch_model.bin"), OBM_E_UNSUPPORTED, "pickled torch weights");
    refused(in_dir("torch/consolidated.00.pth"), OBM_E_UNSUPPORTED, "safetensors.torch.save_file(");
    put_weights(dir, "model.safetensors", "a", "aa");
    obm_checkpoint_free(open_ok(dir));
    put(dir, "adapter_config.json", "{}");
    refused(dir, OBM_E_FORMAT, "adapter_config.json: peft_type: expected \"LORA\", found nothing");
}

static void test_gguf(void **state) {
    (void)state;
    const char *dir = folder("gguf");
    put(dir, "model-q4.gguf", "x");
    refused(dir, OBM_E_UNSUPPORTED, "model-q4.gguf is a GGUF file, which is not read; convert it in Python");
    refused(in_dir("gguf/model-q4.gguf"), OBM_E_UNSUPPORTED, "gguf_file=NAME");
}

static obm_status to_fixture(void *user, const char *name, char *path, size_t size, obm_error *err) {
    (*(int *)user)++;
    if (!strcmp(name, "org/none")) return obm__fail(err, OBM_E_NOTFOUND, "%s: nobody has it", name);
    snprintf(path, size, "%s/named", fixture_dir);
    return OBM_OK;
}

static void test_names(void **state) {
    (void)state;
    int asked = 0;
    obm_error err;
    obm_checkpoint *c = NULL;
    obm_context *with;
    obm_context_options options = OBM_INIT(obm_context_options);
    options.resolve = to_fixture;
    options.resolve_user = &asked;
    assert_int_equal(obm_context_new(&options, &with, &err), OBM_OK);
    put_weights(folder("named"), "model.safetensors", "a", "aa");
    assert_int_equal(obm_checkpoint_open(with, "org/name@v1", &c, &err), OBM_OK);
    assert_string_equal(obm_checkpoint_path(c), in_dir("named"));
    obm_checkpoint_free(c);
    assert_int_equal(obm_checkpoint_open(with, "org/none", &c, &err), OBM_E_NOTFOUND);
    assert_non_null(strstr(err.message, "nobody has it"));
    assert_int_equal(asked, 2);
    static const char *const paths[] = {"./org/name", "/org/name", "name", "a/b/c",   "a/b@", "@/b",
                                        "a//b",       ".a/b",      "a/..", "a/b@c@d", "a b/c"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        assert_int_equal(obm_checkpoint_open(with, paths[i], &c, &err), OBM_E_IO);
    assert_int_equal(asked, 2);
    obm_context_free(with);
    refused("org/name", OBM_E_IO,
            "org/name: a local path is needed here; names of the Hugging Face hub resolve in the Python");
}

static void test_config(void **state) {
    (void)state;
    const char *dir = folder("config");
    put_weights(dir, "model.safetensors", "a", "aa");
    put(dir, "config.json", "[]");
    refused(dir, OBM_E_FORMAT, "config.json: expected an object, found an array");
    put(dir, "config.json", "{\"a\":");
    refused(dir, OBM_E_FORMAT, "config.json: not valid JSON at line 1");
}

static void test_tied(void **state) {
    (void)state;
    static const struct {
        const char *config, *second;
        bool embedding, tied;
    } cases[] = {
        {NULL, "x", true, true},
        {NULL, OBM_HEAD_NAME, true, false},
        {"{}", OBM_HEAD_NAME, true, false},
        {"{\"tie_word_embeddings\": true}", OBM_HEAD_NAME, true, false},
        {"{\"tie_word_embeddings\": false}", OBM_HEAD_NAME, true, false},
        {"{\"tie_word_embeddings\": false}", "x", true, true},
        {"{\"tie_word_embeddings\": true}", "x", false, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char name[16];
        snprintf(name, sizeof name, "tied%zu", i);
        const char *dir = folder(name);
        put_weights(dir, "1.safetensors", cases[i].embedding ? OBM_EMBEDDING_NAME : "y", "ee");
        put_weights(dir, "2.safetensors", cases[i].second, "hh");
        if (cases[i].config) put(dir, "config.json", cases[i].config);
        obm_checkpoint *c = open_ok(dir);
        if (obm_checkpoint_is_tied(c) != cases[i].tied) fail_msg("case %zu", i);
        obm_checkpoint_free(c);
    }
}

/* Messages stay one line whatever a file puts into its names. */
static void test_message_is_one_line(void **state) {
    (void)state;
    const char *dir = folder("line");
    put_safetensors(in_dir("line/model.safetensors"), "{\"a\\nb\\u0007\":{\"dtype\":\"F99\"}}", NULL, 0);
    refused(dir, OBM_E_FORMAT, "tensor a?b?: unknown dtype");
}

/* ---- copies of what is mapped ---- */

static obm_status copy_of(const obm_checkpoint *c, char *to, obm_error *err) {
    obm__reader *r = NULL;
    assert_int_equal(obm__reader_new(&c, 1, &r, err), OBM_OK);
    obm_status status = obm__reader_get(r, c->tensors[0]->t.data, 2, to, err);
    obm__reader_free(r);
    return status;
}

static void test_reader(void **state) {
    (void)state;
    const char *dir = folder("reader");
    char path[600], other[600], two[2];
    obm_error err;
    put_weights(dir, "model.safetensors", "x", "ab");
    put_weights(dir, "other.tmp", "x", "cd");
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    snprintf(other, sizeof other, "%s/other.tmp", dir);
    obm_checkpoint *c = open_ok(dir);
    assert_int_equal(copy_of(c, two, &err), OBM_OK);
    assert_memory_equal(two, "ab", 2);
    assert_int_equal(rename(other, path), 0); /* the name is another file's now: what was mapped counts */
    assert_int_equal(copy_of(c, two, &err), OBM_OK);
    assert_memory_equal(two, "ab", 2);
    obm_checkpoint_free(c);
    c = open_ok(dir);
    assert_int_equal(truncate(path, 20), 0);
    assert_int_equal(copy_of(c, two, &err), OBM_E_IO);
    assert_non_null(strstr(err.message, "as when it was opened, found 20"));
    obm_checkpoint_free(c);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_single_file), cmocka_unit_test(test_indexed),  cmocka_unit_test(test_bad_index),
        cmocka_unit_test(test_precedence),  cmocka_unit_test(test_no_index), cmocka_unit_test(test_refused_kinds),
        cmocka_unit_test(test_gguf),        cmocka_unit_test(test_names),    cmocka_unit_test(test_reader),
        cmocka_unit_test(test_config),      cmocka_unit_test(test_tied),     cmocka_unit_test(test_message_is_one_line),
    };
    return cmocka_run_group_tests(tests, fixture_make, fixture_remove);
}
