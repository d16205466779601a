/* Model folders out: shards, index, carried files, refusals, and a run killed before every single step of the commit.
 */
#include "io_fixture.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <sys/wait.h>

#include <cmocka.h>

/* rename and unlink of this program, so that a child can die just before the n-th of them (0: never), and an fsync that
 * takes no time: a dying process loses nothing that it has written. */
static int steps_left;

static void step(void) {
    if (steps_left > 0 && --steps_left == 0) _exit(99);
}

int rename(const char *from, const char *to) {
    step();
    return renameat(AT_FDCWD, from, AT_FDCWD, to);
}

int unlink(const char *path) {
    step();
    return unlinkat(AT_FDCWD, path, 0);
}

int fsync(int fd) {
    (void)fd;
    return 0;
}

/* ---- helpers ---- */

static const char *const names[] = {"c", "a", "b"};

/* Three U8 tensors of 100 bytes, all equal to `fill`, written in pieces of 7 bytes. */
static obm_status write_model(const char *path, const obm__model_writer_options *o, char fill, obm_error *err) {
    obm__model_writer *w = NULL;
    char piece[7];
    memset(piece, fill, sizeof piece);
    obm_status status;
    OBM_GO(obm__model_writer_new(path, o, &w, err));
    for (int i = 0; i < 3; i++) OBM_GO(obm__model_writer_declare(w, names[i], OBM_U8, 2, (int64_t[]){10, 10}, err));
    OBM_GO(obm__model_writer_begin(w, err));
    for (size_t at = 0; at < 300; at += 7) OBM_GO(obm__model_writer_write(w, piece, at + 7 < 300 ? 7 : 300 - at, err));
    OBM_GO(obm__model_writer_finish(w, err));
done:
    obm__model_writer_free(w);
    return status;
}

static void write_ok(const char *path, const obm__model_writer_options *o, char fill) {
    obm_error err;
    if (write_model(path, o, fill, &err) != OBM_OK) fail_msg("%s", err.message);
}

/* The byte that all tensors of the model are filled with and a tag from its config, 0 if it cannot be opened.  Fails on
 * any mixture. */
static char model_state(const char *path, int *tag) {
    obm_checkpoint *c = NULL;
    if (obm_checkpoint_open(NULL, path, &c, NULL) != OBM_OK) return 0;
    assert_int_equal(obm_checkpoint_count(c), 3);
    char fill = 0;
    for (size_t i = 0; i < 3; i++) {
        obm_tensor t;
        obm_checkpoint_at(c, i, NULL, &t);
        const char *bytes = t.data;
        if (i == 0) fill = bytes[0];
        for (int j = 0; j < 100; j++) assert_int_equal(bytes[j], fill);
    }
    int64_t value = -1;
    obm__json_int(obm__json_get(c->config, "tag"), &value);
    *tag = (int)value;
    obm_checkpoint_free(c);
    return fill;
}

static int count_files(const char *dir, const char *pattern) {
    char command[700];
    snprintf(command, sizeof command, "ls -A %s | grep -c -E -- '%s'", dir, pattern);
    FILE *f = popen(command, "r");
    int n = -1;
    if (!f || fscanf(f, "%d", &n) != 1) n = -1;
    if (f) pclose(f);
    return n;
}

static obm_json *tagged_config(int tag) {
    obm_json *config = obm__json_new_object();
    assert_true(obm__json_set(config, "tag", obm__json_new_int(tag)));
    return config;
}

static bool in_folder(const char *dir, const char *name) {
    char path[700];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return access(path, F_OK) == 0;
}

/* ---- shapes of the output ---- */

static void test_single(void **state) {
    (void)state;
    const char *dir = in_dir("deep/single");
    write_ok(dir, NULL, 'x');
    int tag;
    assert_int_equal(model_state(dir, &tag), 'x');
    assert_int_equal(count_files(dir, "."), 1);
    assert_true(in_folder(dir, "model.safetensors"));
    obm_checkpoint *c;
    assert_int_equal(obm_checkpoint_open(NULL, dir, &c, NULL), OBM_OK);
    assert_string_equal(obm__json_string(obm__json_get(c->files[0]->metadata, "format")), "pt");
    obm_checkpoint_free(c);
}

static void test_sharded(void **state) {
    (void)state;
    const char *dir = in_dir("sharded");
    write_ok(dir, &(obm__model_writer_options){.shard_bytes = 250}, 'x');
    int tag;
    assert_int_equal(model_state(dir, &tag), 'x');
    assert_int_equal(count_files(dir, "."), 3);
    char path[700];
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", dir);
    obm_json *index;
    assert_int_equal(obm__json_load(path, &index, NULL), OBM_OK);
    int64_t total = 0;
    assert_true(obm__json_int(obm__json_get(obm__json_get(index, "metadata"), "total_size"), &total) && total == 300);
    const obm_json *map = obm__json_get(index, "weight_map");
    assert_string_equal(obm__json_string(obm__json_get(map, "c")), "model-00001-of-00002.safetensors");
    assert_string_equal(obm__json_string(obm__json_get(map, "a")), "model-00001-of-00002.safetensors");
    assert_string_equal(obm__json_string(obm__json_get(map, "b")), "model-00002-of-00002.safetensors");
    obm__json_free(index);
}

/* Larger than the limit: a shard each.  Empty tensors go along. */
static void test_shard_limits(void **state) {
    (void)state;
    const char *dir = in_dir("limits");
    obm__model_writer *w;
    obm_error err;
    assert_int_equal(obm__model_writer_new(dir, &(obm__model_writer_options){.shard_bytes = 1}, &w, &err), OBM_OK);
    const struct {
        const char *name;
        int64_t n;
    } tensors[] = {{"e0", 0}, {"two", 2}, {"e1", 0}, {"one", 1}, {"e2", 0}, {"three", 3}, {"e3", 0}};
    for (size_t i = 0; i < 7; i++)
        assert_int_equal(obm__model_writer_declare(w, tensors[i].name, OBM_U8, 1, &tensors[i].n, &err), OBM_OK);
    uint64_t planned = obm__model_writer_size(w);
    assert_int_equal(access(dir, F_OK), -1);
    assert_int_equal(obm__model_writer_begin(w, &err), OBM_OK);
    assert_int_equal(obm__model_writer_size(w), planned);
    assert_int_equal(obm__model_writer_write(w, "223444", 6, &err), OBM_OK);
    assert_int_equal(obm__model_writer_write(w, "x", 1, &err), OBM_E_ARG);
    assert_int_equal(obm__model_writer_finish(w, &err), OBM_OK);
    obm__model_writer_free(w);
    obm_checkpoint *c;
    assert_int_equal(obm_checkpoint_open(NULL, dir, &c, &err), OBM_OK);
    assert_int_equal(c->n_files, 3);
    assert_int_equal(obm_checkpoint_count(c), 7);
    uint64_t size = 0;
    for (size_t i = 0; i < 3; i++) size += c->files[i]->map.size;
    assert_int_equal(size, planned);
    obm_tensor t;
    assert_int_equal(obm_checkpoint_get(c, "three", &t, &err), OBM_OK);
    assert_memory_equal(t.data, "444", 3);
    obm_checkpoint_free(c);
}

static void test_nothing_declared(void **state) {
    (void)state;
    obm__model_writer *w;
    assert_int_equal(obm__model_writer_new(in_dir("nothing"), NULL, &w, NULL), OBM_OK);
    assert_int_equal(obm__model_writer_begin(w, NULL), OBM_OK);
    assert_int_equal(obm__model_writer_finish(w, NULL), OBM_OK);
    obm__model_writer_free(w);
    obm_checkpoint *c;
    assert_int_equal(obm_checkpoint_open(NULL, in_dir("nothing"), &c, NULL), OBM_OK);
    assert_int_equal(obm_checkpoint_count(c), 0);
    obm_checkpoint_free(c);
}

static void same_text(const char *dir, const char *name, const char *text) {
    char path[700], *found;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    assert_int_equal(obm__file_read(path, &found, NULL, NULL), OBM_OK);
    assert_string_equal(found, text);
    obm_free(found);
}

static void test_carried_files(void **state) {
    (void)state;
    static const char *const all[] = {"config.json",
                                      "generation_config.json",
                                      "tokenizer.json",
                                      "tokenizer_config.json",
                                      "special_tokens_map.json",
                                      "vocab.json",
                                      "merges.txt",
                                      "tokenizer.model",
                                      "added_tokens.json",
                                      "chat_template.jinja"};
    const char *from = in_dir("from"), *to = in_dir("to");
    assert_int_equal(mkdir(from, 0777), 0);
    for (size_t i = 0; i < 10; i++) {
        char path[700];
        snprintf(path, sizeof path, "%s/%s", from, all[i]);
        put_text(path, i == 0 ? "{\"tag\": 1}" : all[i]);
    }
    put_text(in_dir("from/other.txt"), "not carried");
    put_text(in_dir("from/README.md"), "the base's own");
    write_ok(to, &(obm__model_writer_options){.copy_from = from, .card = "# card\n"}, 'x');
    for (size_t i = 1; i < 10; i++) same_text(to, all[i], all[i]);
    same_text(to, "config.json", "{\"tag\": 1}");
    same_text(to, "README.md", "# card\n");
    assert_int_equal(count_files(to, "."), 12);

    /* A replaced config, and a file that the new source lacks. */
    assert_int_equal(remove(in_dir("from/chat_template.jinja")), 0);
    obm_json *config = tagged_config(2);
    write_ok(to, &(obm__model_writer_options){.copy_from = from, .config = config, .overwrite = true}, 'y');
    obm__json_free(config);
    int tag;
    assert_int_equal(model_state(to, &tag), 'y');
    assert_int_equal(tag, 2);
    assert_false(in_folder(to, "chat_template.jinja"));
    same_text(to, "README.md", "# card\n");
}

/* ---- refusals and failures ---- */

static void test_exists(void **state) {
    (void)state;
    obm_error err;
    const char *dir = in_dir("taken");
    write_ok(dir, NULL, 'x');
    assert_int_equal(write_model(dir, NULL, 'y', &err), OBM_E_EXISTS);
    assert_non_null(strstr(err.message, "taken holds a model, and overwriting was not asked for"));
    int tag;
    assert_int_equal(model_state(dir, &tag), 'x');
    write_ok(dir, &(obm__model_writer_options){.overwrite = true}, 'y');
    assert_int_equal(model_state(dir, &tag), 'y');
    put_text(in_dir("plain"), "a file");
    assert_int_equal(write_model(in_dir("plain"), &(obm__model_writer_options){.overwrite = true}, 'y', &err),
                     OBM_E_EXISTS);
    assert_int_equal(mkdir(in_dir("notes"), 0777), 0);
    put_text(in_dir("notes/notes.txt"), "mine");
    write_ok(in_dir("notes"), NULL, 'x');
    assert_int_equal(remove(in_dir("notes/model.safetensors")), 0);
    put_text(in_dir("notes/README.md"), "mine");
    assert_int_equal(write_model(in_dir("notes"), &(obm__model_writer_options){.card = "x"}, 'x', &err), OBM_E_EXISTS);
    assert_non_null(strstr(err.message, "holds a README.md"));
}

static void test_unfinished(void **state) {
    (void)state;
    const char *dir = in_dir("unfinished");
    obm__model_writer *w;
    obm_error err;
    assert_int_equal(obm__model_writer_new(dir, &(obm__model_writer_options){.shard_bytes = 5}, &w, &err), OBM_OK);
    assert_int_equal(obm__model_writer_write(w, "x", 1, &err), OBM_E_ARG);
    for (int i = 0; i < 3; i++)
        assert_int_equal(obm__model_writer_declare(w, names[i], OBM_U8, 1, (int64_t[]){5}, &err), OBM_OK);
    assert_int_equal(obm__model_writer_begin(w, &err), OBM_OK);
    assert_int_equal(obm__model_writer_declare(w, "late", OBM_U8, 1, (int64_t[]){5}, &err), OBM_E_ARG);
    assert_int_equal(obm__model_writer_write(w, "0123456", 7, &err), OBM_OK);
    assert_int_equal(obm__model_writer_finish(w, &err), OBM_E_ARG);
    assert_int_equal(count_files(dir, "tmp"), 2);
    obm__model_writer_free(w);
    assert_int_not_equal(access(dir, F_OK), 0);
    assert_int_equal(obm__model_writer_new(dir, NULL, &w, &err), OBM_OK);
    for (int i = 0; i < 2; i++)
        assert_int_equal(obm__model_writer_declare(w, "twice", OBM_U8, 1, (int64_t[]){5}, &err), OBM_OK);
    assert_int_equal(obm__model_writer_begin(w, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "tensor twice declared twice"));
    obm__model_writer_free(w);
}

/* ---- replacing a model, killed before every step ---- */

static void old_model(const char *dir, uint64_t shard_bytes) {
    if (access(dir, F_OK) == 0) assert_int_equal(fixture_remove_tree(dir), 0);
    obm_json *config = tagged_config(1);
    write_ok(dir, &(obm__model_writer_options){.shard_bytes = shard_bytes, .config = config}, 'o');
    obm__json_free(config);
}

/* Exit code of a child that replaces the model and dies before its n-th rename or unlink; 0: it ran through. */
static int replace_killed(const char *dir, uint64_t shard_bytes, int tag, int n) {
    pid_t child = fork();
    if (child == 0) {
        steps_left = n;
        obm_json *config = obm__json_new_object();
        obm__json_set(config, "tag", obm__json_new_int(tag));
        obm_status status = write_model(
            dir, &(obm__model_writer_options){.shard_bytes = shard_bytes, .config = config, .overwrite = true}, 'n',
            NULL);
        _exit(status == OBM_OK ? 0 : 1);
    }
    int result = -1;
    assert_int_equal(waitpid(child, &result, 0), child);
    assert_true(WIFEXITED(result));
    return WEXITSTATUS(result);
}

/* With the same config every state is the old model or the new one.  With another there is also "no model", never a
 * mixture. */
static void kill_everywhere(const char *dir, uint64_t from, uint64_t to, bool same_config) {
    bool seen_new = false;
    int n = 1;
    for (;; n++) {
        old_model(dir, from);
        int code = replace_killed(dir, to, same_config ? 1 : 2, n), tag = -1;
        char fill = model_state(dir, &tag);
        if (code == 0) {
            assert_int_equal(fill, 'n');
            break;
        }
        assert_int_equal(code, 99);
        if (fill == 'o')
            assert_true(tag == 1 && !seen_new);
        else if (fill == 'n')
            assert_int_equal(tag, same_config ? 1 : 2);
        else
            assert_false(same_config);
        seen_new = seen_new || fill == 'n';
        assert_true(n < 50);
    }
    assert_in_range(n, 2, 49);
    assert_int_equal(count_files(dir, "tmp"), 0);
    assert_int_equal(count_files(dir, "[.]safetensors$"), to < 300 ? 3 : 1);
    assert_int_equal(count_files(dir, "index"), to < 300 ? 1 : 0);
    /* And what a killed run left does not hinder the next one. */
    old_model(dir, from);
    replace_killed(dir, to, 2, 2);
    assert_int_equal(replace_killed(dir, to, 2, 0), 0);
    int tag;
    assert_int_equal(model_state(dir, &tag), 'n');
    assert_int_equal(tag, 2);
}

static void test_killed(void **state) {
    (void)state;
    static const uint64_t sizes[] = {100, 1000}; /* three shards, one file */
    for (int from = 0; from < 2; from++) {
        for (int to = 0; to < 2; to++) {
            for (int same = 0; same < 2; same++) kill_everywhere(in_dir("killed"), sizes[from], sizes[to], same);
        }
    }
}

/* A first write that is killed leaves nothing that opens, or the whole model. */
static void test_killed_first_write(void **state) {
    (void)state;
    const char *dir = in_dir("first");
    for (int shards = 0; shards < 2; shards++) {
        for (int n = 1;; n++) {
            if (access(dir, F_OK) == 0) assert_int_equal(fixture_remove_tree(dir), 0);
            int code = replace_killed(dir, shards ? 100 : 1000, 3, n), tag = -1;
            char fill = model_state(dir, &tag);
            assert_true(fill == 0 || (fill == 'n' && tag == 3));
            if (code == 0) break;
        }
        int tag;
        assert_int_equal(model_state(dir, &tag), 'n');
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_single),
        cmocka_unit_test(test_sharded),
        cmocka_unit_test(test_shard_limits),
        cmocka_unit_test(test_nothing_declared),
        cmocka_unit_test(test_carried_files),
        cmocka_unit_test(test_exists),
        cmocka_unit_test(test_unfinished),
        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_killed_first_write),
    };
    return cmocka_run_group_tests(tests, fixture_make, fixture_remove);
}
