/* What a killed writer of a model folder left.  Tells its files from everybody else's by proof, never by their place:
 * temporary names under the folder's lock, which a living writer would hold, and contents by the journal's XXH3. */
#include "unfinished.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define WHERE OBM_UNFINISHED_FILE

/* ---- names ---- */

static const char *digits(const char *p, size_t n, const char *set) { return strspn(p, set) >= n ? p + n : NULL; }

/* model-00001-of-00002.safetensors, or with 16 digits of the content's hash behind the first dash. */
static bool is_shard_of_many(const char *name) {
    static const char decimal[] = "0123456789";
    if (strncmp(name, "model-", 6)) return false;
    const char *p = name + 6;
    if (strspn(p, "0123456789abcdef") == 16 && p[16] == '-') p += 17;
    if (!(p = digits(p, 5, decimal))) return false;
    p += strspn(p, decimal);
    if (strncmp(p, "-of-", 4) || !(p = digits(p + 4, 5, decimal))) return false;
    return !strcmp(p + strspn(p, decimal), ".safetensors");
}

static bool is_temporary(const char *name) {
    size_t n = obm__temp_stem(name);
    char stem[64];
    if (!n || n >= sizeof stem) return false;
    memcpy(stem, name, n);
    stem[n] = 0;
    return is_shard_of_many(stem) || obm__is_small_file(stem) || !strcmp(stem, OBM_ONE_FILE) ||
           !strcmp(stem, OBM_INDEX_FILE) || !strcmp(stem, OBM_UNFINISHED_FILE) || !strcmp(stem, OBM_FINISHED_FILE);
}

/* ---- the journal ---- */

static bool exists_in(const char *dir, const char *name) {
    char *path = obm__path_join(dir, name);
    bool found = path && access(path, F_OK) == 0;
    obm_free(path);
    return found;
}

static obm_status check_journal(const char *path, const obm_json *journal, const char *expected, obm_error *err) {
    const char *format = obm__json_string(obm__json_get(journal, "format"));
    int64_t version = 0;
    if (!format || strcmp(format, expected))
        return obm__fail(err, OBM_E_FORMAT, "%s: not this library's: format is not \"%s\"", path, expected);
    if (!obm__json_int(obm__json_get(journal, "version"), &version) || version != OBM_UNFINISHED_VERSION)
        return obm__fail(err, OBM_E_UNSUPPORTED,
                         "%s: written by another version of this library: remove the file to "
                         "start anew",
                         path);
    return OBM_OK;
}

static obm_status read_journal(const char *dir, const char *name, const char *format, obm_json **out, obm_error *err) {
    char *path = obm__path_join(dir, name);
    if (!path) return obm__fail_nomem(err, strlen(dir));
    obm_json *journal = NULL;
    obm_status status = access(path, F_OK) ? OBM_OK : obm__json_load(path, &journal, err);
    if (status == OBM_OK && journal) status = check_journal(path, journal, format, err);
    obm_free(path);
    if (status == OBM_OK)
        *out = journal;
    else
        obm__json_free(journal);
    return status;
}

obm_status obm__unfinished_read(const char *dir, obm__unfinished *out, obm_error *err) {
    obm__unfinished u = {.dir = dir};
    OBM_TRY(read_journal(dir, OBM_UNFINISHED_FILE, OBM_UNFINISHED_FORMAT, &u.journal, err));
    char *path = obm__path_join(dir, OBM_INDEX_FILE);
    if (path && obm__json_load(path, &u.index, NULL) != OBM_OK) u.index = NULL;
    obm_free(path);
    u.model = exists_in(dir, OBM_INDEX_FILE) || exists_in(dir, OBM_ONE_FILE);
    *out = u;
    return OBM_OK;
}

/* A record that cannot be read proves nothing: the folder is then what it is without. */
obm_status obm__finished_read(const char *dir, obm__unfinished *out, obm_error *err) {
    OBM_TRY(obm__unfinished_read(dir, out, err));
    bool settled = out->model && !out->journal;
    obm__json_free(out->journal);
    out->journal = NULL;
    if (settled) (void)read_journal(dir, OBM_FINISHED_FILE, OBM_FINISHED_FORMAT, &out->journal, NULL);
    out->finished = out->journal != NULL;
    return OBM_OK;
}

void obm__unfinished_clear(obm__unfinished *u) {
    obm__json_free(u->journal);
    obm__json_free(u->index);
    *u = (obm__unfinished){0};
}

/* ---- the job ---- */

#define SHOWN 100  /* bytes of a value */
#define CONTEXT 20 /* of what two long values begin with alike */

static size_t common_prefix(const char *a, const char *b) {
    size_t n = 0;
    while (a[n] && a[n] == b[n]) n++;
    return n;
}

static bool inside_character(char c) { return ((unsigned char)c & 0xC0) == 0x80; } /* of UTF-8 */

/* One line from byte `at` on, cut to the size, both at characters. */
static void cut(const char *text, size_t at, char buf[SHOWN]) {
    size_t n = strlen(text), shown = SHOWN - 7;
    if (at > n) at = n;
    while (at && inside_character(text[at])) at--;
    bool all = n - at <= shown;
    while (!all && shown && inside_character(text[at + shown])) shown--;
    snprintf(buf, SHOWN, "%s%.*s%s", at ? "..." : "", (int)shown, text + at, all ? "" : "...");
}

/* Both values as text.  Long ones that begin alike, as paths do, show where they part. */
static void value_texts(const obm_json *then, const obm_json *now, char a[SHOWN], char b[SHOWN]) {
    char *x = then ? obm__json_text(then, 0) : NULL, *y = now ? obm__json_text(now, 0) : NULL;
    size_t alike = x && y ? common_prefix(x, y) : 0, longest = 0;
    if (x) longest = strlen(x);
    if (y && strlen(y) > longest) longest = strlen(y);
    size_t at = longest > SHOWN - 7 && alike > 2 * CONTEXT ? alike - CONTEXT : 0;
    cut(x ? x : "nothing", x ? at : 0, a);
    cut(y ? y : "nothing", y ? at : 0, b);
    obm_free(x);
    obm_free(y);
}

static bool same_value(const obm_json *a, const obm_json *b) {
    char *x = a ? obm__json_text(a, 0) : NULL, *y = b ? obm__json_text(b, 0) : NULL;
    bool same = x && y && !strcmp(x, y);
    obm_free(x);
    obm_free(y);
    return same;
}

static void add_step(char *path, size_t size, const char *key, size_t index) {
    size_t n = strlen(path);
    if (key)
        snprintf(path + n, size - n, ".%.64s", key);
    else
        snprintf(path + n, size - n, "[%zu]", index);
}

static const char *differing_key(const obm_json *a, const obm_json *b) {
    for (void *it = obm__json_first(a); it; it = obm__json_next(a, it))
        if (!same_value(obm__json_value(it), obm__json_get(b, obm__json_key(it)))) return obm__json_key(it);
    return NULL;
}

/* The first difference inside of two values that differ; path grows by the way there. */
static void find_difference(const obm_json **then, const obm_json **now, char *path, size_t size) {
    while (*then && *now && obm__json_kind(*then) == obm__json_kind(*now)) {
        const char *key = NULL;
        size_t i = 0;
        if (obm__json_kind(*then) == OBM_JSON_OBJECT) {
            if (!(key = differing_key(*now, *then)) && !(key = differing_key(*then, *now))) return;
            add_step(path, size, key, 0);
            *then = obm__json_get(*then, key), *now = obm__json_get(*now, key);
        } else if (obm__json_kind(*then) == OBM_JSON_ARRAY) {
            while (same_value(obm__json_at(*then, i), obm__json_at(*now, i))) i++;
            add_step(path, size, NULL, i);
            *then = obm__json_at(*then, i), *now = obm__json_at(*now, i);
        } else {
            return;
        }
    }
}

static obm_status differs(const obm__unfinished *u, const char *key, const obm_json *then, const obm_json *now,
                          obm_error *err) {
    char path[240], a[SHOWN], b[SHOWN];
    snprintf(path, sizeof path, "%.100s", key);
    find_difference(&then, &now, path, sizeof path);
    value_texts(then, now, a, b);
    return obm__fail(err, OBM_E_MISMATCH,
                     "%s: the %sfinished merge there is another: %s differs, %s then, %s now (overwriting, --force, "
                     "starts anew)",
                     u->dir, u->finished ? "" : "un", path, a, b);
}

obm_status obm__unfinished_same_job(const obm__unfinished *u, const obm_json *job, obm_error *err) {
    const obm_json *then = obm__json_get(u->journal, "job");
    if (!then || obm__json_kind(then) != OBM_JSON_OBJECT || !job)
        return obm__fail(err, OBM_E_MISMATCH,
                         "%s: what was left unfinished there is no merge (overwriting, --force, starts anew)", u->dir);
    for (void *it = obm__json_first(job); it; it = obm__json_next(job, it)) {
        const obm_json *before = obm__json_get(then, obm__json_key(it));
        if (!same_value(before, obm__json_value(it)))
            return differs(u, obm__json_key(it), before, obm__json_value(it), err);
    }
    for (void *it = obm__json_first(then); it; it = obm__json_next(then, it)) {
        if (!obm__json_get(job, obm__json_key(it)))
            return differs(u, obm__json_key(it), obm__json_value(it), NULL, err);
    }
    return OBM_OK;
}

/* ---- proof ---- */

/* *same: the file is there with this size and hash.  Fails only when the callback stops, or without memory. */
static obm_status is_proven(const char *dir, const char *name, uint64_t bytes, const char *xxh3, obm__tick_fn tick,
                            void *user, bool *same, obm_error *err) {
    char *path = obm__path_join(dir, name), hash[33];
    obm__map map = {0};
    *same = false;
    if (!path) return obm__fail_nomem(err, strlen(dir));
    obm_status status = obm__map_open(path, &map, NULL);
    obm_free(path);
    if (status != OBM_OK) return OBM_OK;
    if (map.size == bytes) {
        status = obm__map_xxh3(&map, tick, user, hash, err);
        *same = status == OBM_OK && !strcmp(hash, xxh3);
    }
    obm__map_close(&map);
    return status;
}

static bool size_and_hash(const obm_json *record, uint64_t *bytes, const char **xxh3) {
    int64_t n = -1;
    *xxh3 = obm__json_string(obm__json_get(record, "xxh3"));
    if (!*xxh3 || !obm__json_int(obm__json_get(record, "bytes"), &n) || n < 0) return false;
    *bytes = (uint64_t)n;
    return true;
}

obm_status obm__unfinished_shard(const obm__unfinished *u, size_t i, const char *name, uint64_t bytes,
                                 obm__tick_fn tick, void *user, obm__finished_shard *out, obm_error *err) {
    const obm_json *record = obm__json_at(obm__json_get(u->journal, "shards"), i);
    const char *temp = obm__json_string(obm__json_get(record, "temp")), *xxh3;
    const char *finals[] = {obm__json_string(obm__json_get(record, "file")),
                            obm__json_string(obm__json_get(record, "plain"))};
    uint64_t recorded;
    bool same = false;
    *out = (obm__finished_shard){0};
    if (!size_and_hash(record, &recorded, &xxh3) || recorded != bytes || strlen(xxh3) != 32) return OBM_OK;
    if (temp && obm__temp_stem(temp) == strlen(name) && !strncmp(temp, name, strlen(name)))
        OBM_TRY(is_proven(u->dir, temp, bytes, xxh3, tick, user, &same, err));
    const char *found = temp;
    bool published = !same;
    for (size_t f = 0; !same && f < 2; f++) {
        found = finals[f];
        if (found && (!strcmp(found, OBM_ONE_FILE) || is_shard_of_many(found)))
            OBM_TRY(is_proven(u->dir, found, bytes, xxh3, tick, user, &same, err));
    }
    if (!same) return OBM_OK;
    out->file = obm__strdup(found);
    if (!out->file) return obm__fail_nomem(err, strlen(name));
    memcpy(out->hash, xxh3, sizeof out->hash);
    out->published = published;
    return OBM_OK;
}

static bool is_in_index(const obm__unfinished *u, const char *name) {
    const obm_json *map = obm__json_get(u->index, "weight_map");
    for (void *it = obm__json_first(map); it; it = obm__json_next(map, it)) {
        const char *file = obm__json_string(obm__json_value(it));
        if (file && !strcmp(file, name)) return true;
    }
    return false;
}

static bool has_name(const obm_json *record, const char *key, const char *name) {
    const char *own = obm__json_string(obm__json_get(record, key));
    return own && !strcmp(own, name);
}

static bool is_listed(const obm__unfinished *u, const char *list, const char *name) {
    const obm_json *records = obm__json_get(u->journal, list);
    for (size_t i = 0; i < obm__json_size(records); i++) {
        const obm_json *record = obm__json_at(records, i);
        const char *xxh3;
        uint64_t bytes;
        bool same = false;
        if (!has_name(record, "file", name) && !has_name(record, "plain", name)) continue;
        if (!size_and_hash(record, &bytes, &xxh3)) continue;
        if (is_proven(u->dir, name, bytes, xxh3, NULL, NULL, &same, NULL) == OBM_OK && same) return true;
    }
    return false;
}

char *obm__unfinished_hashed_name(const char *plain, const char *xxh3) {
    return obm__format("model-%.16s-%s", xxh3, plain + strlen("model-"));
}

/* Under its name, or that with the hash where there were no links. */
static obm_status check_record(const obm__unfinished *u, const obm_json *record, obm__tick_fn tick, void *user,
                               obm_error *err) {
    const char *name = obm__json_string(obm__json_get(record, "file")), *xxh3;
    uint64_t bytes;
    bool same = false, known = name && !strchr(name, '/') && size_and_hash(record, &bytes, &xxh3);
    if (known) OBM_TRY(is_proven(u->dir, name, bytes, xxh3, tick, user, &same, err));
    bool absent = known && !exists_in(u->dir, name);
    if (known && !same && is_shard_of_many(name)) {
        char *hashed = obm__unfinished_hashed_name(name, xxh3);
        obm_status status = hashed ? is_proven(u->dir, hashed, bytes, xxh3, tick, user, &same, err)
                                   : obm__fail_nomem(err, strlen(name));
        absent = absent && hashed && !exists_in(u->dir, hashed);
        obm_free(hashed);
        OBM_TRY(status);
    }
    if (same) return OBM_OK;
    if (absent)
        return obm__fail(err, OBM_E_EXISTS, "%s: %s, which the finished merge wrote, is missing", u->dir, name);
    return obm__fail(err, OBM_E_EXISTS,
                     "%s: %s is damaged: it is not what the finished merge wrote (another size or checksum)",
                     u->dir, known ? name : OBM_FINISHED_FILE);
}

static obm_status check_records(const obm__unfinished *u, const char *list, obm__tick_fn tick, void *user,
                                obm_error *err) {
    const obm_json *records = obm__json_get(u->journal, list);
    for (size_t i = 0; i < obm__json_size(records); i++)
        OBM_TRY(check_record(u, obm__json_at(records, i), tick, user, err));
    return OBM_OK;
}

obm_status obm__finished_check(const obm__unfinished *u, obm__tick_fn tick, void *user, obm_error *err) {
    OBM_TRY(check_records(u, "shards", tick, user, err));
    return check_records(u, "small", tick, user, err);
}

/* An index that cannot be read may refer to anything. */
static bool is_unused_shard(const obm__unfinished *u, const char *name) {
    if (!is_shard_of_many(name) || is_in_index(u, name)) return false;
    return (u->index || !exists_in(u->dir, OBM_INDEX_FILE)) && is_listed(u, "shards", name);
}

bool obm__unfinished_owns(const obm__unfinished *u, const char *name) {
    return is_temporary(name) || is_unused_shard(u, name) || (obm__is_small_file(name) && is_listed(u, "small", name));
}

bool obm__unfinished_names(const obm__unfinished *u, const char *name) {
    const obm_json *records = obm__json_get(u->journal, "shards");
    for (size_t i = 0; i < obm__json_size(records); i++)
        if (has_name(obm__json_at(records, i), "file", name)) return true;
    return false;
}

void obm__unfinished_remove(const obm__unfinished *u, bool (*keep)(const void *user, const char *name),
                            const void *user, bool small) {
    DIR *d = opendir(u->dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        const char *name = e->d_name;
        if (obm__is_small_file(name) && (!small || u->model)) continue;
        if ((keep && keep(user, name)) || !obm__unfinished_owns(u, name)) continue;
        char *path = obm__path_join(u->dir, name);
        if (path) (void)unlink(path);
        obm_free(path);
    }
    if (d) closedir(d);
}

uint64_t obm__unfinished_bytes(const char *dir, const char *name) {
    uint64_t bytes = 0;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        struct stat st;
        if ((name && strcmp(e->d_name, name)) || !is_temporary(e->d_name)) continue;
        if (!fstatat(dirfd(d), e->d_name, &st, AT_SYMLINK_NOFOLLOW) && st.st_nlink == 1)
            bytes += (uint64_t)st.st_blocks * 512;
    }
    if (d) closedir(d);
    return bytes;
}
