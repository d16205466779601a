/* Model folders out: shards, index, carried files, refusals, and a run killed before every single step of the commit.
 */
#include "io_fixture.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <regex.h>
#include <setjmp.h>
#include <stdarg.h>
#include <signal.h>
#include <sys/statvfs.h>
#include <sys/wait.h>

#include <cmocka.h>

/* rename, link and unlink of this program, so that a child can die just before the n-th of them (0: never), and an
 * fsync that takes no time: a dying process loses nothing that it has written. */
static int steps_left;
static bool no_links; /* as on a file system without them */

static void step(void) {
    if (steps_left > 0 && --steps_left == 0) raise(SIGKILL);
}

int rename(const char *from, const char *to) {
    step();
    return renameat(AT_FDCWD, from, AT_FDCWD, to);
}

int link(const char *from, const char *to) {
    step();
    if (no_links) return errno = EPERM, -1;
    return linkat(AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlink(const char *path) {
    step();
    return unlinkat(AT_FDCWD, path, 0);
}

static uint64_t disk_room = UINT64_MAX; /* what a file system of this program has free; that: it does not tell */

int statvfs(const char *path, struct statvfs *fs) {
    if (access(path, F_OK)) return -1;
    *fs = (struct statvfs){.f_blocks = disk_room != UINT64_MAX, .f_frsize = 1};
    fs->f_bavail = fs->f_bfree = disk_room;
    return 0;
}

static const char *replaced; /* a folder whose model is replaced just before its second shard is opened */
static void replace_it(void);

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int mode = flags & O_CREAT ? va_arg(rest, int) : 0;
    va_end(rest);
    if (replaced && strstr(path, "/model-00002-of-")) replace_it();
    return openat(AT_FDCWD, path, flags, mode);
}

int fsync(int fd) {
    (void)fd;
    return 0;
}

/* ---- helpers ---- */

static const char *const names[] = {"c", "a", "b"};
#define JOURNAL "onebitmerge-unfinished.json"

/* Three U8 tensors of 100 bytes, all equal to `fill`, written in pieces of 7 bytes. */
static obm_status write_model(const char *path, const obm__model_writer_options *o, char fill, obm_error *err) {
    obm__model_writer *w = NULL;
    char piece[7];
    memset(piece, fill, sizeof piece);
    obm_status status;
    OBM_GO(obm__model_writer_new(path, o, &w, err));
    for (int i = 0; i < 3; i++) OBM_GO(obm__model_writer_declare(w, names[i], OBM_U8, 2, (int64_t[]){10, 10}, err));
    OBM_GO(obm__model_writer_begin(w, err));
    for (size_t i = 0; i < 3; i++) {
        for (size_t at = 0; at < 100 && !obm__model_writer_has(w, i); at += 7)
            OBM_GO(obm__model_writer_write(w, piece, at + 7 < 100 ? 7 : 100 - at, err));
    }
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

/* Of the names that a POSIX extended expression matches. */
static int count_files(const char *dir, const char *pattern) {
    regex_t expression;
    int n = 0;
    assert_int_equal(regcomp(&expression, pattern, REG_EXTENDED | REG_NOSUB), 0);
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) n += regexec(&expression, e->d_name, 0, NULL, 0) == 0;
    }
    closedir(d);
    regfree(&expression);
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

/* The text, and a line for every file of weights with what it hashes to. */
static void same_card(const char *dir, const char *text) {
    char path[1024], *found, hash[33], line[512];
    obm__map map;
    size_t files = 0, lines = 0;
    snprintf(path, sizeof path, "%s/README.md", dir);
    assert_int_equal(obm__file_read(path, &found, NULL, NULL), OBM_OK);
    assert_memory_equal(found, text, strlen(text));
    for (char *at = found; (at = strstr(at, ".safetensors |")); at++) lines++;
    DIR *d = opendir(dir);
    for (struct dirent *e; (e = readdir(d));) {
        if (!strstr(e->d_name, ".safetensors") || strstr(e->d_name, ".json")) continue;
        files++;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        assert_int_equal(obm__map_open(path, &map, NULL), OBM_OK);
        assert_int_equal(obm__map_xxh3(&map, NULL, NULL, hash, NULL), OBM_OK);
        obm__map_close(&map);
        snprintf(line, sizeof line, "| %s | %s |\n", e->d_name, hash);
        if (!strstr(found, line)) fail_msg("no %s in %s", line, found);
    }
    closedir(d);
    assert_true(files > 0 && files == lines);
    obm_free(found);
}

static void test_card_of_shards(void **state) {
    (void)state;
    const char *to = in_dir("card");
    for (const char *fill = "xyz"; *fill; fill++) { /* into a new folder, and over shards of the same names */
        obm__model_writer_options o = {.card = "# shards\n", .shard_bytes = 250, .overwrite = true};
        write_ok(to, &o, *fill);
        same_card(to, "# shards\n");
    }
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
    same_card(to, "# card\n");
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
                     OBM_E_OCCUPIED);
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

/* The exit code of a child; 99: it was killed, by itself. */
static int end_of(pid_t child) {
    int result = -1;
    assert_int_equal(waitpid(child, &result, 0), child);
    if (WIFSIGNALED(result) && WTERMSIG(result) == SIGKILL) return 99;
    assert_true(WIFEXITED(result));
    return WEXITSTATUS(result);
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
    return end_of(child);
}

/* The weights have the names that they have in a new folder, and nothing is beside them. */
static void assert_plain(const char *dir, uint64_t shard_bytes) {
    bool many = shard_bytes < 300;
    assert_int_equal(count_files(dir, many ? "^model-0000[123]-of-00003[.]safetensors$" : "^model[.]safetensors$"),
                     many ? 3 : 1);
    assert_int_equal(count_files(dir, "^model-|[.]safetensors"), many ? 4 : 1); /* the index */
    assert_int_equal(count_files(dir, "tmp|unfinished"), 0);
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
        /* Whatever is there, the next run ends as if nothing had been. */
        assert_int_equal(replace_killed(dir, to, 2, 0), 0);
        assert_int_equal(model_state(dir, &tag), 'n');
        assert_plain(dir, to);
    }
    assert_in_range(n, 2, 49);
    assert_plain(dir, to);
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

/* ---- going on after a kill ---- */

static obm_json *job_of(const char *recipe) {
    obm_json *job = obm__json_new_object();
    obm__json_set(job, "recipe", obm__json_new_string(recipe));
    obm__json_set(job, "random seed", obm__json_new_int(7));
    return job;
}

typedef struct attempt {
    uint64_t shard_bytes;
    int tag;
    bool overwrite, resume;
    const char *recipe;
} attempt;

static obm_status try_write(const char *dir, const attempt *a, obm_error *err) {
    obm_json *config = tagged_config(a->tag), *job = job_of(a->recipe ? a->recipe : "r");
    obm_status status = write_model(dir,
                                    &(obm__model_writer_options){.shard_bytes = a->shard_bytes,
                                                                 .config = config,
                                                                 .card = "# new\n",
                                                                 .overwrite = a->overwrite,
                                                                 .resume = a->resume,
                                                                 .job = job},
                                    'n', err);
    obm__json_free(config);
    obm__json_free(job);
    return status;
}

/* Exit code of a child that writes and dies before its n-th rename or unlink; 0: it ran through. */
static int write_killed(const char *dir, const attempt *a, int n) {
    pid_t child = fork();
    if (child == 0) {
        steps_left = n;
        _exit(try_write(dir, a, NULL) == OBM_OK ? 0 : 1);
    }
    return end_of(child);
}

static void fresh(const char *dir, uint64_t old_shards) {
    if (access(dir, F_OK) == 0) assert_int_equal(fixture_remove_tree(dir), 0);
    if (old_shards) old_model(dir, old_shards);
}

static void same_folders(const char *a, const char *b) {
    assert_int_equal(count_files(a, "."), count_files(b, "."));
    DIR *d = opendir(a);
    for (struct dirent *e; (e = readdir(d));) {
        char path[800], *x, *y;
        size_t n, m;
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        snprintf(path, sizeof path, "%s/%s", a, e->d_name);
        assert_int_equal(obm__file_read(path, &x, &n, NULL), OBM_OK);
        snprintf(path, sizeof path, "%s/%s", b, e->d_name);
        if (obm__file_read(path, &y, &m, NULL) != OBM_OK) fail_msg("%s is not there", path);
        if (n != m || memcmp(x, y, n)) fail_msg("%s differs from the one in %s", path, a);
        obm_free(x);
        obm_free(y);
    }
    closedir(d);
}

static void succeed(const char *dir, const attempt *a, int n) {
    obm_error err;
    if (try_write(dir, a, &err) != OBM_OK) fail_msg("after a kill before step %d: %s", n, err.message);
}

/* Killed before every step; each time once resumed, once begun anew.  A resumed folder equals that of a run that nobody
 * killed, byte for byte; from scratch only the shards' names may differ. */
static void resume_everywhere(uint64_t old_shards, uint64_t shards, int tag) {
    const char *dir = in_dir("resumed");
    char whole[512];
    snprintf(whole, sizeof whole, "%s", in_dir("whole"));
    attempt first = {shards, tag, old_shards != 0, false, NULL}, again = first, anew = first;
    again.resume = again.overwrite = true;
    fresh(whole, old_shards);
    succeed(whole, &first, 0);
    int n = 1, found;
    for (;; n++) {
        fresh(dir, old_shards);
        int code = write_killed(dir, &first, n);
        if (code == 0) break;
        assert_int_equal(code, 99);
        again.overwrite = old_shards != 0;
        succeed(dir, &again, n);
        same_folders(dir, whole);

        fresh(dir, old_shards);
        assert_int_equal(write_killed(dir, &first, n), 99);
        bool complete = model_state(dir, &found) == 'n' && found == tag;
        anew.overwrite = first.overwrite || complete;
        succeed(dir, &anew, n);
        assert_int_equal(model_state(dir, &found), 'n');
        assert_int_equal(found, tag);
        assert_int_equal(count_files(dir, "tmp|unfinished"), 0);
        assert_int_equal(count_files(dir, "[.]safetensors$"), shards < 300 ? 3 : 1);
        assert_int_equal(count_files(dir, "."), shards < 300 ? 7 : 4);
    }
    assert_in_range(n, 6, 60);
}

static void test_resume(void **state) {
    (void)state;
    static const uint64_t sizes[] = {0, 100, 1000};
    for (int old = 0; old < 3; old++) {
        for (int to = 1; to < 3; to++) {
            for (int tag = 1; tag < 2 + (old > 0); tag++) resume_everywhere(sizes[old], sizes[to], tag);
        }
    }
}

/* Killed twice, at many pairs of moments: the second time while going on. */
static void test_resume_twice(void **state) {
    (void)state;
    const char *dir = in_dir("twice"), *whole = in_dir("twice-whole");
    attempt first = {100, 2, true, false, NULL}, again = {100, 2, true, true, NULL};
    fresh(whole, 100);
    succeed(whole, &first, 0);
    for (int n = 2;; n += 5) {
        for (int m = 1;; m += 3) {
            fresh(dir, 100);
            if (write_killed(dir, &first, n) == 0) return;
            if (write_killed(dir, &again, m) == 0) break;
            succeed(dir, &again, n);
            same_folders(dir, whole);
        }
    }
}

static ino_t file_number(const char *dir, const char *pattern) {
    char command[700];
    unsigned long number = 0;
    snprintf(command, sizeof command, "ls -i %s | grep -E -- '%s'", dir, pattern);
    FILE *f = popen(command, "r");
    if (!f || fscanf(f, "%lu", &number) != 1) number = 0;
    if (f) pclose(f);
    return (ino_t)number;
}

/* Dies when the second shard is written and noted: step 1 is the first journal, 2 and 3 those of the two shards. */
static void kill_in_third_shard(const char *dir, const attempt *a) {
    fresh(dir, 0);
    assert_int_equal(write_killed(dir, a, 4), 99);
    assert_int_equal(count_files(dir, "model-.*tmp"), 3);
}

static void test_kept_shards(void **state) {
    (void)state;
    const char *dir = in_dir("kept");
    attempt first = {100, 1, false, false, NULL}, again = {100, 1, false, true, NULL};
    kill_in_third_shard(dir, &first);
    ino_t one = file_number(dir, "model-00001"), two = file_number(dir, "model-00002");
    /* A byte of the second is other than it was: it is written again, the first is the same file as before.  The link
     * keeps the second's number from being given to its successor. */
    char command[1400];
    snprintf(command, sizeof command,
             "ln %s/model-00002* %s.held && printf X | dd of=%s.held bs=1 seek=300 conv=notrunc 2>/dev/null", dir, dir,
             dir);
    assert_int_equal(system(command), 0);
    succeed(dir, &again, 4);
    int tag;
    assert_int_equal(model_state(dir, &tag), 'n');
    assert_true(one && one == file_number(dir, "model-00001"));
    assert_true(two && two != file_number(dir, "model-00002"));
    assert_int_equal(count_files(dir, "tmp|unfinished"), 0);
}

/* A shard that has its name already and is not what the run wrote: refused by name; overwriting writes that one again.
 */
static void test_damaged_shard(void **state) {
    (void)state;
    const char *dir = in_dir("damaged");
    attempt first = {100, 1, false, false, NULL}, again = {100, 1, false, true, NULL};
    for (int n = 5;; n++) {
        fresh(dir, 0);
        assert_int_equal(write_killed(dir, &first, n), 99);
        if (count_files(dir, "^model-0000[12]-of-00003[.]safetensors$") == 2) break;
    }
    ino_t one = file_number(dir, "model-00001");
    char command[700];
    snprintf(command, sizeof command,
             "printf X | dd of=%s/model-00002-of-00003.safetensors bs=1 seek=300 conv=notrunc 2>/dev/null", dir);
    assert_int_equal(system(command), 0);
    obm_error err;
    for (int resume = 0; resume < 2; resume++) {
        again.resume = resume;
        assert_int_equal(try_write(dir, &again, &err), OBM_E_EXISTS);
        assert_non_null(strstr(err.message, "model-00002-of-00003.safetensors is damaged"));
    }
    again.overwrite = true;
    succeed(dir, &again, 4);
    int tag;
    assert_int_equal(model_state(dir, &tag), 'n');
    assert_plain(dir, 100);
    assert_true(one && one == file_number(dir, "model-00001"));
}

#define FAR "/a/place/that/is/long/with/many/folders/on/the/way/and/all/of/them/alike/until/here/comes/"

static void test_another_job(void **state) {
    (void)state;
    const char *dir = in_dir("job"), *copy = in_dir("job-copy");
    attempt first = {100, 1, false, false, FAR "one"}, other = {100, 1, false, true, FAR "other"};
    obm_error err;
    char command[1400];
    kill_in_third_shard(dir, &first);
    snprintf(command, sizeof command, "cp -r %s %s", dir, copy);
    assert_int_equal(system(command), 0);
    assert_int_equal(try_write(dir, &other, &err), OBM_E_MISMATCH);
    assert_non_null(
        strstr(err.message, "recipe differs, ...e/until/here/comes/one\" then, ...e/until/here/comes/other\" now"));
    same_folders(dir, copy);
    assert_int_equal(write_model(dir, &(obm__model_writer_options){.resume = true}, 'n', &err), OBM_E_MISMATCH);
    same_folders(dir, copy);
    other.overwrite = true;
    succeed(dir, &other, 4);
    int tag;
    assert_int_equal(model_state(dir, &tag), 'n');
    assert_int_equal(count_files(dir, "tmp|unfinished"), 0);
}

static obm_status ask_finished(const char *dir, const attempt *a, bool *finished, obm_error *err) {
    obm_json *job = job_of(a->recipe ? a->recipe : "r");
    obm__model_writer *w;
    obm__model_writer_options o = {
        .shard_bytes = a->shard_bytes, .overwrite = a->overwrite, .resume = a->resume, .job = job};
    assert_int_equal(obm__model_writer_new(dir, &o, &w, err), OBM_OK);
    for (int i = 0; i < 3; i++)
        assert_int_equal(obm__model_writer_declare(w, names[i], OBM_U8, 2, (int64_t[]){10, 10}, NULL), OBM_OK);
    obm_status status = obm__model_writer_finished(w, finished, err);
    obm__model_writer_free(w);
    obm__json_free(job);
    return status;
}

/* One byte of a file is another, and as it was before. */
static void flip_byte(const char *dir, const char *name, long at) {
    char path[600];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, at, SEEK_SET), 0);
    int c = fgetc(f);
    assert_int_equal(fseek(f, at, SEEK_SET), 0);
    fputc(c ^ 1, f);
    assert_int_equal(fclose(f), 0);
}

/* A finished folder says so to the same job, whatever the names of its shards; and a damaged one which file it is. */
static void test_finished(void **state) {
    (void)state;
    static const char *const damaged[] = {"model-00002-of-00003.safetensors", "config.json",
                                          "model.safetensors.index.json"};
    const char *dir = in_dir("finished");
    attempt a = {100, 1, true, true, NULL}, other = {100, 1, false, true, "another"};
    attempt one = {1000, 1, false, true, NULL};
    obm_error err;
    bool finished = true;
    for (int i = 0; i < 2; i++) {
        no_links = i == 0;
        fresh(dir, 100);
        assert_int_equal(ask_finished(dir, &a, &finished, &err), OBM_OK);
        assert_false(finished); /* a model of nobody's */
        succeed(dir, &a, 0);
        assert_int_equal(ask_finished(dir, &a, &finished, &err), OBM_OK);
        assert_true(finished);
    }
    a.overwrite = false;
    assert_int_equal(ask_finished(dir, &other, &finished, &err), OBM_E_MISMATCH);
    assert_non_null(strstr(err.message, "the finished merge there is another: recipe differs"));
    for (size_t i = 0; i < sizeof damaged / sizeof *damaged; i++) {
        char text[100];
        long at = i == 2 ? 80 : 3;
        snprintf(text, sizeof text, "%s is damaged", damaged[i]);
        flip_byte(dir, damaged[i], at);
        assert_int_equal(ask_finished(dir, &a, &finished, &err), OBM_E_EXISTS);
        assert_non_null(strstr(err.message, text));
        a.overwrite = true;
        assert_int_equal(ask_finished(dir, &a, &finished, &err), OBM_OK);
        assert_false(finished);
        a.overwrite = false;
        flip_byte(dir, damaged[i], at);
        assert_int_equal(ask_finished(dir, &a, &finished, &err), OBM_OK);
        assert_true(finished);
    }
    fresh(dir, 0);
    succeed(dir, &one, 0);
    assert_int_equal(ask_finished(dir, &one, &finished, &err), OBM_OK);
    assert_true(finished);
    assert_int_equal(write_model(dir, &(obm__model_writer_options){.overwrite = true}, 'n', &err), OBM_OK);
    assert_int_equal(count_files(dir, "finished"), 0); /* that record was of the model that is gone */
}

/* A dry run's answer. */
static obm_status ask_files(const char *dir, const attempt *a, obm_error *err) {
    obm_json *job = job_of("r"), *list = NULL;
    obm__model_writer *w;
    obm__model_writer_options o = {.shard_bytes = a->shard_bytes, .resume = a->resume, .job = job};
    assert_int_equal(obm__model_writer_new(dir, &o, &w, err), OBM_OK);
    for (int i = 0; i < 3; i++)
        assert_int_equal(obm__model_writer_declare(w, names[i], OBM_U8, 2, (int64_t[]){10, 10}, NULL), OBM_OK);
    obm_status status = obm__model_writer_files(w, true, &list, err);
    obm__model_writer_free(w);
    obm__json_free(list);
    obm__json_free(job);
    return status;
}

/* All shards have to fit, not the first alone; of a run that goes on those that are left, also in the room of what the
 * run before had begun. */
static void test_no_room(void **state) {
    (void)state;
    const char *dir = in_dir("no-room");
    attempt a = {100, 1, false, true, NULL};
    obm_error err;
    disk_room = 300; /* each shard takes more than its 100 bytes and a header */
    assert_int_equal(try_write(dir, &a, &err), OBM_E_IO);
    assert_int_equal(err.os_errno, ENOSPC);
    assert_non_null(strstr(err.message, "no-room: 0.0 MB are to be written, 0.0 MB are free there: No space left"));
    assert_int_equal(access(dir, F_OK), -1);
    assert_int_equal(ask_files(dir, &a, &err), OBM_E_IO);
    disk_room = UINT64_MAX;
    kill_in_third_shard(dir, &a);
    disk_room = 0;
    assert_int_equal(ask_files(dir, &a, &err), OBM_OK);
    char command[1400];
    snprintf(command, sizeof command, "rm %s/model-00003* %s/*.json.tmp-*", dir, dir);
    assert_int_equal(system(command), 0);
    assert_int_equal(ask_files(dir, &a, &err), OBM_E_IO);
    disk_room = 300;
    assert_int_equal(ask_files(dir, &a, &err), OBM_OK);
    succeed(dir, &a, 0);
    disk_room = UINT64_MAX;
}

/* A run that is to be resumed and fails keeps what it has finished; any other takes all of it back. */
static void test_failed_run(void **state) {
    (void)state;
    const char *dir = in_dir("failed");
    obm_json *job = job_of("r");
    for (int resume = 0; resume < 2; resume++) {
        obm__model_writer *w;
        obm__model_writer_options o = {.shard_bytes = 100, .job = job, .resume = resume};
        assert_int_equal(obm__model_writer_new(dir, &o, &w, NULL), OBM_OK);
        for (int i = 0; i < 3; i++)
            assert_int_equal(obm__model_writer_declare(w, names[i], OBM_U8, 2, (int64_t[]){10, 10}, NULL), OBM_OK);
        assert_int_equal(obm__model_writer_begin(w, NULL), OBM_OK);
        char bytes[150];
        memset(bytes, 'n', sizeof bytes);
        assert_int_equal(obm__model_writer_write(w, bytes, sizeof bytes, NULL), OBM_OK);
        obm__model_writer_free(w);
        assert_int_equal(access(dir, F_OK) == 0, resume);
    }
    assert_int_equal(count_files(dir, "tmp"), 1);
    assert_int_equal(count_files(dir, "."), 2);
    assert_int_equal(
        write_model(dir, &(obm__model_writer_options){.shard_bytes = 100, .job = job, .resume = true}, 'n', NULL),
        OBM_OK);
    obm__json_free(job);
    int tag;
    assert_int_equal(model_state(dir, &tag), 'n');
    assert_int_equal(count_files(dir, "tmp|unfinished"), 0);
}

/* What looks nearly like ours stays; a journal that is not ours stops the run. */
static void test_other_peoples_files(void **state) {
    (void)state;
    static const char *const theirs[] = {"notes.txt",
                                         "notes.tmp-1-2",
                                         "mine.safetensors.tmp-12-0",
                                         "model.safetensors.tmp",
                                         "model.safetensors.tmp-12",
                                         "model.safetensors.tmp-12-0.bak",
                                         "config.json.tmp-x-1",
                                         "model-1-of-2.safetensors.tmp-12-0",
                                         "xmodel-00001-of-00002.safetensors.tmp-12-0"};
    static const char *const ours[] = {"model.safetensors.tmp-12-0", "config.json.tmp-999999999-3",
                                       "model-0123456789abcdef-00001-of-00002.safetensors.tmp-1-0"};
    const char *dir = in_dir("theirs");
    char path[700];
    assert_int_equal(mkdir(dir, 0777), 0);
    for (size_t i = 0; i < 9; i++) snprintf(path, sizeof path, "%s/%s", dir, theirs[i]), put_text(path, "mine");
    for (size_t i = 0; i < 3; i++) snprintf(path, sizeof path, "%s/%s", dir, ours[i]), put_text(path, "left");
    write_ok(dir, NULL, 'x');
    for (size_t i = 0; i < 9; i++) same_text(dir, theirs[i], "mine");
    for (size_t i = 0; i < 3; i++) assert_false(in_folder(dir, ours[i]));
    snprintf(path, sizeof path, "%s/" JOURNAL, dir);
    put_text(path, "{\"mine\": 1}");
    obm_error err;
    assert_int_equal(write_model(dir, &(obm__model_writer_options){.overwrite = true}, 'y', &err), OBM_E_FORMAT);
    assert_non_null(strstr(err.message, JOURNAL));
    same_text(dir, JOURNAL, "{\"mine\": 1}");
    int tag;
    assert_int_equal(model_state(dir, &tag), 'x');
}

/* Without links a replaced model keeps the names with hashes, and files of no model that have the plain ones stay. */
static void test_no_links(void **state) {
    (void)state;
    const char *dir = in_dir("no-links"), *second = in_dir("no-links/model-00002-of-00003.safetensors");
    const obm__model_writer_options options = {.shard_bytes = 100, .overwrite = true};
    int tag;
    assert_int_equal(mkdir(dir, 0777), 0);
    put_text(second, "mine");
    no_links = true;
    write_ok(dir, &options, 'a');
    write_ok(dir, &options, 'b');
    no_links = false;
    assert_int_equal(model_state(dir, &tag), 'b');
    assert_int_equal(count_files(dir, "^model-[0-9a-f]{16}-0000[123]-of-00003[.]safetensors$"), 3);
    assert_int_equal(count_files(dir, "tmp|unfinished"), 0);
    same_text(dir, "model-00002-of-00003.safetensors", "mine");
}

static void replace_it(void) {
    const char *dir = replaced;
    replaced = NULL;
    write_ok(dir, &(obm__model_writer_options){.shard_bytes = 100, .overwrite = true}, 'n');
}

/* The shards of both models have the same names. */
static void test_replaced_while_read(void **state) {
    (void)state;
    const char *dir = in_dir("replaced");
    int tag;
    write_ok(dir, &(obm__model_writer_options){.shard_bytes = 100}, 'o');
    replaced = dir;
    assert_int_equal(model_state(dir, &tag), 'n');
    assert_null(replaced);
}

/* Weights and texts that a journal claims, but whose contents are other: somebody's, so the folder is refused. */
static void test_unproven_claims(void **state) {
    (void)state;
    const char *dir = in_dir("claims"), *journal = in_dir("claims/" JOURNAL);
    assert_int_equal(mkdir(dir, 0777), 0);
    put_text(in_dir("claims/model-00001-of-00002.safetensors"), "mine");
    put_text(in_dir("claims/config.json"), "mine");
    put_text(journal,
             "{\"format\": \"onebitmerge unfinished model\", \"version\": 1, \"job\": null, \"made_folder\": true,"
             " \"shards\": [{\"temp\": \"../x\", \"file\": \"model-00001-of-00002.safetensors\", \"bytes\": 4,"
             " \"xxh3\": \"00000000000000000000000000000000\"}],"
             " \"small\": [{\"file\": \"config.json\", \"bytes\": 4, \"xxh3\": \"00\"}], \"old\": [\"../../x\", 3]}");
    obm_error err;
    assert_int_equal(write_model(dir, NULL, 'y', &err), OBM_E_EXISTS);
    same_text(dir, "model-00001-of-00002.safetensors", "mine");
    same_text(dir, "config.json", "mine");
    write_ok(dir, &(obm__model_writer_options){.overwrite = true}, 'y');
    same_text(dir, "model-00001-of-00002.safetensors", "mine");
    assert_int_equal(count_files(dir, "unfinished"), 0);
}

static void test_busy(void **state) {
    (void)state;
    const char *dir = in_dir("busy");
    obm_error err;
    int lock;
    assert_int_equal(mkdir(dir, 0777), 0);
    assert_int_equal(obm__directory_lock(dir, &lock, NULL), OBM_OK);
    assert_int_equal(write_model(dir, NULL, 'x', &err), OBM_E_BUSY);
    assert_non_null(strstr(err.message, "busy is being written by another process"));
    obm__directory_unlock(lock);
    write_ok(dir, NULL, 'x');
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_single),
        cmocka_unit_test(test_sharded),
        cmocka_unit_test(test_shard_limits),
        cmocka_unit_test(test_nothing_declared),
        cmocka_unit_test(test_carried_files),
        cmocka_unit_test(test_card_of_shards),
        cmocka_unit_test(test_exists),
        cmocka_unit_test(test_unfinished),
        cmocka_unit_test(test_killed),
        cmocka_unit_test(test_killed_first_write),
        cmocka_unit_test(test_resume),
        cmocka_unit_test(test_resume_twice),
        cmocka_unit_test(test_finished),
        cmocka_unit_test(test_no_room),
        cmocka_unit_test(test_kept_shards),
        cmocka_unit_test(test_damaged_shard),
        cmocka_unit_test(test_another_job),
        cmocka_unit_test(test_failed_run),
        cmocka_unit_test(test_other_peoples_files),
        cmocka_unit_test(test_no_links),
        cmocka_unit_test(test_replaced_while_read),
        cmocka_unit_test(test_unproven_claims),
        cmocka_unit_test(test_busy),
    };
    return cmocka_run_group_tests(tests, fixture_make, fixture_remove);
}
