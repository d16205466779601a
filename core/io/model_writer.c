/* Model folders out: shards, their index, config, tokenizer files and model card.  Knows nothing about the tensors'
 * meaning, nor how to tell what a killed run left (unfinished.c).
 *
 * How the new state appears.  Readers (obm_checkpoint_open and transformers alike) take model.safetensors if it is
 * there, else the index.  Everything is first written and synced under temporary names; then shards get final names
 * that nothing refers to yet, then the small files are renamed, and last comes the commit:
 *
 *     one shard       rename of model.safetensors (an old index and its shards are removed afterwards)
 *     several         rename of the index; where an old model.safetensors stands before it, the removal of that
 *
 * Shards that would take the names of an old model's get names with their content's hash.  Once that model is gone,
 * links give them the plain names, and a second index is renamed over the first: whichever is there, its files are.
 * Plain names come back with other contents, so a reader looks behind all shards whether the index is still the same.
 *
 * Weights and config.json are two files, and no order of renames switches both at once.  So when an existing model is
 * replaced by one whose config or tokenizer differs, the old commit file is removed before the small files change: a
 * run killed between the two leaves a folder without a model, which every reader refuses, never the weights of one with
 * the config of the other.
 *
 * The journal (OBM_UNFINISHED_FILE) is there from the first byte to after the commit.  It is written again whenever a
 * shard is finished, and before the first rename with all final names: so the next run knows, at whatever moment this
 * one is killed, what to go on with and what is nobody's.  Of a job the record (OBM_FINISHED_FILE) takes its place. */
#include "unfinished.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define DEFAULT_SHARD_BYTES 5000000000u

static const char *const carried[] = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
};
#define N_CARRIED (sizeof carried / sizeof *carried)
#define CARD "README.md"

/* The tensors [first, end). */
typedef struct {
    obm__st_writer *file;
    char *name, *plain; /* plain: the name without the content's hash, NULL where `name` is that */
    char hash[33];
    size_t first, end;
    uint64_t bytes;
    bool done;      /* sealed */
    bool adopted;   /* by a killed run */
    bool published; /* has its final name */
    bool ours;      /* published by this writer, where nothing was */
} shard;
/* A small file in transit: staged under temp, or to be removed because the new model has none. */
typedef struct {
    const char *name;
    char *temp;
    bool stale;
} small_file;

struct obm__model_writer {
    char *path, *copy_from, *config, *card;
    const char *const (*instead)[2];
    size_t n_instead;
    const char *const (*texts)[2];
    size_t n_texts;
    uint64_t shard_bytes;
    bool overwrite, resume;
    obm_json *job;
    obm__tick_fn tick;
    void *user;
    obm__declared_list tensors;
    shard *shards; /* NULL before begin */
    size_t n_shards, current;
    uint64_t left; /* bytes that the current shard still needs */
    small_file small[N_CARRIED + 1];
    size_t n_small;
    obm_json *small_records, *old; /* of the journal: contents of small files, shards of the model that is replaced */
    obm_json *final_records; /* of the record of a finished model: its small files */
    char *index_temp, *record_temp;
    bool committed;
    bool made_dir;  /* the folder is this writer's: an unfinished one goes again */
    int lock;       /* of the folder, -1 without */
    bool journaled; /* the journal in the folder is this writer's */
};

/* ---- the folder as it is ---- */

static obm_status exists_in(const char *dir, const char *name, bool *found, obm_error *err) {
    char *path = obm__path_join(dir, name);
    if (!path) return obm__fail_nomem(err, strlen(dir));
    *found = access(path, F_OK) == 0;
    obm_free(path);
    return OBM_OK;
}

static obm_status remove_in(const char *dir, const char *name, obm_error *err) {
    char *path = obm__path_join(dir, name);
    if (!path) return obm__fail_nomem(err, strlen(dir));
    obm_status status =
        unlink(path) == 0 || access(path, F_OK) != 0 ? OBM_OK : obm__fail_errno(err, "cannot remove %s", path);
    obm_free(path);
    return status;
}

bool obm__is_small_file(const char *name) {
    for (size_t i = 0; i < N_CARRIED; i++) {
        if (!strcmp(name, carried[i])) return true;
    }
    return !strcmp(name, CARD);
}

/* ---- declaring ---- */

static bool copy_options(obm__model_writer *w, const char *path, const obm__model_writer_options *o) {
    w->shard_bytes = o && o->shard_bytes ? o->shard_bytes : DEFAULT_SHARD_BYTES;
    w->overwrite = o && o->overwrite;
    w->resume = o && o->resume;
    w->tick = o ? o->tick : NULL;
    w->user = o ? o->user : NULL;
    w->path = obm__strdup(path);
    w->instead = o ? o->instead : NULL;
    w->n_instead = o ? o->n_instead : 0;
    w->texts = o ? o->texts : NULL;
    w->n_texts = o ? o->n_texts : 0;
    w->small_records = obm__json_new_array();
    w->old = obm__json_new_array();
    w->final_records = obm__json_new_array();
    bool ok = w->path && w->small_records && w->old && w->final_records;
    if (o && o->copy_from) ok = (w->copy_from = obm__strdup(o->copy_from)) && ok;
    if (o && o->config) ok = (w->config = obm__json_text(o->config, 2)) && ok;
    if (o && o->card) ok = (w->card = obm__strdup(o->card)) && ok;
    if (o && o->job) ok = (w->job = obm__json_copy(o->job)) && ok;
    return ok;
}

/* Owned; *none: the new model has no such file.  NULL otherwise: out of memory. */
static char *source_of(const obm__model_writer *w, const char *name, bool *none) {
    *none = false;
    for (size_t i = 0; i < w->n_instead; i++) {
        if (strcmp(w->instead[i][0], name) != 0) continue;
        *none = !w->instead[i][1];
        return *none ? NULL : obm__strdup(w->instead[i][1]);
    }
    return obm__path_join(w->copy_from, name);
}

/* Before hours of merging. */
static obm_status check_carried(const obm__model_writer *w, const char *name, obm_error *err) {
    bool none;
    char *source = source_of(w, name, &none);
    if (none) return OBM_OK;
    if (!source) return obm__fail_nomem(err, strlen(w->copy_from));
    obm_status status = OBM_OK;
    obm__map map;
    if (obm__file_exists(source) && (status = obm__map_open(source, &map, err)) == OBM_OK) {
        status = obm__refuse_pointer(map.data, map.size, source, err);
        obm__map_close(&map);
    }
    obm_free(source);
    return status;
}

obm_status obm__model_writer_new(const char *path, const obm__model_writer_options *o, obm__model_writer **out,
                                 obm_error *err) {
    obm__model_writer *w = obm__calloc(1, sizeof *w);
    if (!w) return obm__fail_nomem(err, sizeof *w);
    w->lock = -1;
    if (!copy_options(w, path, o)) {
        obm__model_writer_free(w);
        return obm__fail_nomem(err, 0);
    }
    obm_status status = OBM_OK;
    for (size_t i = 1; w->copy_from && i < N_CARRIED && status == OBM_OK; i++)
        status = check_carried(w, carried[i], err);
    if (status == OBM_OK)
        *out = w;
    else
        obm__model_writer_free(w);
    return status;
}

obm_status obm__model_writer_declare(obm__model_writer *w, const char *name, obm_dtype dtype, int32_t ndim,
                                     const int64_t *shape, obm_error *err) {
    if (w->shards) return obm__fail(err, OBM_E_ARG, "%s: tensor %s declared after writing began", w->path, name);
    return obm__declare(&w->tensors, w->path, name, dtype, ndim, shape, err);
}

/* ---- shards ---- */

/* Tensors fill a shard until the next one would pass the limit; a tensor larger than the limit has a shard of its own,
 * and empty ones never open a shard. */
static size_t shard_end(const obm__declared_list *l, size_t first, uint64_t limit) {
    uint64_t filled = 0;
    for (size_t i = first; i < l->count; i++) {
        uint64_t bytes = l->items[i].end - l->items[i].begin;
        if (filled > 0 && bytes > 0 && (bytes > limit || filled > limit - bytes)) return i;
        filled += bytes;
    }
    return l->count;
}

static size_t count_shards(const obm__declared_list *l, uint64_t limit) {
    size_t n = 1;
    for (size_t at = shard_end(l, 0, limit); at < l->count; at = shard_end(l, at, limit)) n++;
    return n;
}

static char *shard_file_name(size_t i, size_t n, const char *hash) {
    if (n == 1) return obm__strdup(OBM_ONE_FILE);
    char *plain = obm__format("model-%05zu-of-%05zu.safetensors", i + 1, n);
    if (!plain || !hash) return plain;
    char *hashed = obm__unfinished_hashed_name(plain, hash);
    obm_free(plain);
    return hashed;
}

static void free_shards(shard *shards, size_t n) {
    for (size_t i = 0; shards && i < n; i++) {
        obm__st_writer_free(shards[i].file);
        obm_free(shards[i].name);
        obm_free(shards[i].plain);
    }
    obm_free(shards);
}

static obm_status make_shard(const obm__model_writer *w, shard *s, size_t i, size_t n, obm_error *err) {
    s->name = shard_file_name(i, n, NULL);
    char *path = s->name ? obm__path_join(w->path, s->name) : NULL;
    if (!path) return obm__fail_nomem(err, strlen(w->path));
    obm_status status = obm__st_writer_new(path, &s->file, err);
    obm_free(path);
    OBM_TRY(status);
    s->end = shard_end(&w->tensors, s->first, w->shard_bytes);
    for (size_t t = s->first; t < s->end; t++) {
        const obm__declared *d = &w->tensors.items[t];
        OBM_TRY(obm__st_writer_declare(s->file, d->name, d->dtype, d->ndim, d->shape, err));
        s->bytes += d->end - d->begin;
    }
    return obm__st_writer_metadata(s->file, "format", "pt", err);
}

/* Also used for the size of a dry run, so it touches no file. */
static obm_status make_shards(const obm__model_writer *w, shard **out, size_t *out_n, obm_error *err) {
    size_t n = count_shards(&w->tensors, w->shard_bytes);
    shard *shards = obm__calloc(n, sizeof *shards);
    if (!shards) return obm__fail_nomem(err, n * sizeof *shards);
    for (size_t i = 0; i < n; i++) {
        if (i) shards[i].first = shards[i - 1].end;
        obm_status status = make_shard(w, &shards[i], i, n, err);
        if (status == OBM_OK) continue;
        free_shards(shards, n);
        return status;
    }
    *out = shards;
    *out_n = n;
    return OBM_OK;
}

uint64_t obm__model_writer_size(const obm__model_writer *w) {
    shard *shards = w->shards;
    size_t n = w->n_shards;
    if (!shards && make_shards(w, &shards, &n, NULL) != OBM_OK) return 0;
    uint64_t size = 0;
    for (size_t i = 0; i < n; i++) size += obm__st_writer_size(shards[i].file);
    if (!w->shards) free_shards(shards, n);
    return size;
}

/* Of the folder, or where it will be made.  Blocks that are reserved for root are among root's. */
static bool free_bytes(const char *path, uint64_t *out) {
    struct statvfs fs;
    char *at = obm__strdup(path), *slash;
    int failed = at ? statvfs(at, &fs) : -1;
    while (at && failed && (slash = strrchr(at, '/')) && slash > at) {
        *slash = 0;
        failed = statvfs(at, &fs);
    }
    if (at && failed) failed = statvfs(path[0] == '/' ? "/" : ".", &fs);
    obm_free(at);
    if (failed || !fs.f_blocks) return false; /* some file systems do not tell */
    *out = (uint64_t)(geteuid() ? fs.f_bavail : fs.f_bfree) * fs.f_frsize;
    return true;
}

/* What is still to be written has to fit beside what is there, also an old model: said before hours of merging, where
 * a shard's reservation would say it for that shard.  back: what will be removed before that. */
static obm_status check_space(const obm__model_writer *w, const shard *shards, size_t n, uint64_t back,
                              obm_error *err) {
    uint64_t needed = 0, room;
    for (size_t i = 0; i < n; i++)
        if (!shards[i].done) needed += obm__st_writer_size(shards[i].file);
    if (!free_bytes(w->path, &room) || needed <= room + back) return OBM_OK;
    errno = ENOSPC;
    return obm__fail_errno(err, "%s: %.1f MB are to be written, %.1f MB are free there", w->path, (double)needed * 1e-6,
                           (double)room * 1e-6);
}

static obm_json *file_record(const shard *s) {
    obm_json *record = obm__json_new_object();
    bool ok = obm__json_set(record, "file", obm__json_new_string(s->name));
    ok = obm__json_set(record, "bytes", obm__json_new_int((int64_t)obm__st_writer_size(s->file))) && ok;
    ok = obm__json_set(record, "there", obm__json_new_bool(s->done)) && ok;
    if (ok) return record;
    obm__json_free(record);
    return NULL;
}

static obm_status refuse_existing(const char *path, const shard *shards, size_t n, const obm__unfinished *u,
                                  obm_error *err);

/* kept: bytes of temporary files that are finished shards. */
static obm_status mark_finished(const obm__model_writer *w, const obm__unfinished *u, shard *shards, size_t n,
                                uint64_t *kept, obm_error *err) {
    for (size_t i = 0; i < n; i++) {
        obm__finished_shard found;
        OBM_TRY(obm__unfinished_shard(u, i, shards[i].name, obm__st_writer_size(shards[i].file), w->tick, w->user,
                                      &found, err));
        shards[i].done = found.file != NULL;
        shards[i].published = found.published;
        if (found.published) {
            obm_free(shards[i].name);
            shards[i].name = found.file;
        } else {
            if (found.file) *kept += obm__unfinished_bytes(w->path, found.file);
            obm_free(found.file);
        }
    }
    return OBM_OK;
}

/* Marks the shards that a run with `resume` would keep, and refuses what it would, as take_over does; writes nothing.
 * back: bytes of the remains that the run would remove. */
static obm_status find_finished(const obm__model_writer *w, shard *shards, size_t n, uint64_t *back, obm_error *err) {
    obm__unfinished u = {0};
    uint64_t kept = 0;
    bool finished;
    *back = 0;
    if (!obm__is_directory(w->path)) return OBM_OK;
    OBM_TRY(obm__model_writer_finished(w, &finished, err));
    for (size_t i = 0; finished && i < n; i++) shards[i].done = true;
    if (finished) return OBM_OK;
    OBM_TRY(obm__unfinished_read(w->path, &u, err));
    bool resume = w->resume && u.journal;
    obm_status status = resume ? obm__unfinished_same_job(&u, w->job, err) : OBM_OK;
    if (resume && status == OBM_OK) status = mark_finished(w, &u, shards, n, &kept, err);
    if (status == OBM_E_MISMATCH && w->overwrite) status = OBM_OK;
    if (status == OBM_OK && !w->overwrite) status = refuse_existing(w->path, shards, n, &u, err);
    obm__unfinished_clear(&u);
    uint64_t all = obm__unfinished_bytes(w->path, NULL);
    *back = all > kept ? all - kept : 0;
    return status;
}

obm_status obm__model_writer_files(const obm__model_writer *w, bool fit, obm_json **out, obm_error *err) {
    shard *shards;
    size_t n;
    uint64_t back;
    OBM_TRY(make_shards(w, &shards, &n, err));
    obm_status status = find_finished(w, shards, n, &back, err);
    if (status == OBM_OK && fit) status = check_space(w, shards, n, back, err);
    if (status != OBM_OK) {
        free_shards(shards, n);
        return status;
    }
    obm_json *list = obm__json_new_array();
    bool ok = list != NULL;
    for (size_t i = 0; ok && i < n; i++) ok = obm__json_append(list, file_record(&shards[i]));
    free_shards(shards, n);
    if (ok) {
        *out = list;
        return OBM_OK;
    }
    obm__json_free(list);
    return obm__fail_nomem(err, n);
}

bool obm__model_writer_recorded(const char *path) {
    obm__unfinished u;
    if (!obm__is_directory(path) || obm__finished_read(path, &u, NULL) != OBM_OK) return false;
    bool recorded = u.finished;
    obm__unfinished_clear(&u);
    return recorded;
}

/* Each name is the plain one, or that with the content's hash. */
static bool is_in_shard(const shard *s, const obm_json *record, const char *file) {
    const char *hash = obm__json_string(obm__json_get(record, "xxh3"));
    char *hashed = hash ? obm__unfinished_hashed_name(s->name, hash) : NULL;
    bool same = file && (!strcmp(file, s->name) || (hashed && !strcmp(file, hashed)));
    obm_free(hashed);
    return same;
}

/* Every tensor in its shard. */
static obm_status check_index(const obm__model_writer *w, const obm__unfinished *u, obm_error *err) {
    shard *shards;
    size_t n;
    OBM_TRY(make_shards(w, &shards, &n, err));
    const obm_json *map = obm__json_get(u->index, "weight_map"), *records = obm__json_get(u->journal, "shards");
    bool same = obm__json_size(records) == n && (n == 1 || obm__json_size(map) == w->tensors.count);
    for (size_t i = 0; n > 1 && same && i < n; i++) {
        for (size_t t = shards[i].first; same && t < shards[i].end; t++)
            same = is_in_shard(&shards[i], obm__json_at(records, i),
                               obm__json_string(obm__json_get(map, w->tensors.items[t].name)));
    }
    free_shards(shards, n);
    if (same) return OBM_OK;
    return obm__fail(err, OBM_E_EXISTS, "%s: %s is damaged: it is not what the finished merge wrote", w->path,
                     n > 1 ? OBM_INDEX_FILE : OBM_FINISHED_FILE);
}

obm_status obm__model_writer_finished(const obm__model_writer *w, bool *finished, obm_error *err) {
    obm__unfinished u;
    *finished = false;
    if (!w->resume || !w->job || !obm__is_directory(w->path)) return OBM_OK;
    OBM_TRY(obm__finished_read(w->path, &u, err));
    obm_status status = u.finished ? obm__unfinished_same_job(&u, w->job, err) : OBM_OK;
    if (u.finished && status == OBM_OK) status = check_index(w, &u, err);
    if (u.finished && status == OBM_OK) status = obm__finished_check(&u, w->tick, w->user, err);
    *finished = u.finished && status == OBM_OK;
    obm__unfinished_clear(&u);
    return w->overwrite && (status == OBM_E_MISMATCH || status == OBM_E_EXISTS) ? OBM_OK : status;
}

static int by_string(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

/* Each shard's header finds its own doubles; this finds those across shards. */
static obm_status check_names(const obm__model_writer *w, obm_error *err) {
    const char **names = obm__calloc(w->tensors.count, sizeof *names);
    if (!names) return obm__fail_nomem(err, w->tensors.count * sizeof *names);
    for (size_t i = 0; i < w->tensors.count; i++) names[i] = w->tensors.items[i].name;
    if (w->tensors.count > 1) qsort(names, w->tensors.count, sizeof *names, by_string);
    obm_status status = OBM_OK;
    for (size_t i = 1; i < w->tensors.count && status == OBM_OK; i++) {
        if (!strcmp(names[i - 1], names[i]))
            status = obm__fail(err, OBM_E_ARG, "%s: tensor %s declared twice", w->path, names[i]);
    }
    obm_free(names);
    return status;
}

/* ---- the journal ---- */

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* null for a shard that is not finished. */
static obm_json *shard_record(const shard *s, bool names) {
    if (!s->done) return obm__json_new_null();
    const char *temp = obm__st_writer_temp(s->file);
    obm_json *record = obm__json_new_object();
    bool ok = !temp || obm__json_set(record, "temp", obm__json_new_string(base_name(temp)));
    if (names || s->published) ok = obm__json_set(record, "file", obm__json_new_string(s->name)) && ok;
    if (names && s->plain) ok = obm__json_set(record, "plain", obm__json_new_string(s->plain)) && ok;
    ok = obm__json_set(record, "bytes", obm__json_new_int((int64_t)obm__st_writer_size(s->file))) && ok;
    ok = obm__json_set(record, "xxh3", obm__json_new_string(s->hash)) && ok;
    if (ok) return record;
    obm__json_free(record);
    return NULL;
}

static bool fill_journal(const obm__model_writer *w, bool names, obm_json *journal) {
    obm_json *shards = obm__json_new_array();
    bool ok = obm__json_set(journal, "format", obm__json_new_string(OBM_UNFINISHED_FORMAT));
    ok = obm__json_set(journal, "version", obm__json_new_int(OBM_UNFINISHED_VERSION)) && ok;
    ok = obm__json_set(journal, "made_folder", obm__json_new_bool(w->made_dir)) && ok;
    ok = obm__json_set(journal, "job", w->job ? obm__json_copy(w->job) : obm__json_new_null()) && ok;
    for (size_t i = 0; i < w->n_shards; i++) ok = obm__json_append(shards, shard_record(&w->shards[i], names)) && ok;
    ok = obm__json_set(journal, "shards", shards) && ok;
    ok = obm__json_set(journal, "small", obm__json_copy(w->small_records)) && ok;
    return obm__json_set(journal, "old", obm__json_copy(w->old)) && ok;
}

/* names: the shards' final names are decided. */
static obm_status write_journal(obm__model_writer *w, bool names, obm_error *err) {
    obm_json *journal = obm__json_new_object();
    char *text = fill_journal(w, names, journal) ? obm__json_text(journal, 1) : NULL;
    char *path = obm__path_join(w->path, OBM_UNFINISHED_FILE);
    obm_status status = text && path ? obm__file_write(path, text, strlen(text), err) : obm__fail_nomem(err, 0);
    w->journaled = w->journaled || status == OBM_OK;
    obm__json_free(journal);
    obm_free(text);
    obm_free(path);
    return status;
}

/* ---- what a killed run left ---- */

/* In a dry run shards that are done have no temporary name. */
static bool is_shard_file(const shard *shards, size_t n, const char *name) {
    for (size_t i = 0; i < n; i++) {
        const char *temp = obm__st_writer_temp(shards[i].file);
        const char *own = shards[i].published ? shards[i].name : temp ? base_name(temp) : NULL;
        if (shards[i].done && own && !strcmp(own, name)) return true;
    }
    return false;
}

static bool is_kept(const void *user, const char *name) {
    const obm__model_writer *w = user;
    return is_shard_file(w->shards, w->n_shards, name);
}

/* name becomes the shard's. */
static void take_name(shard *s, char *name) {
    if (!s->plain && strcmp(s->name, name))
        s->plain = s->name;
    else
        obm_free(s->name);
    s->name = name;
}

static obm_status adopt(obm__model_writer *w, shard *s, obm__finished_shard *found, obm_error *err) {
    memcpy(s->hash, found->hash, sizeof s->hash);
    if (found->published) {
        take_name(s, found->file);
        found->file = NULL;
        s->published = s->done = s->adopted = true;
        return OBM_OK;
    }
    char *temp = obm__path_join(w->path, found->file);
    if (!temp) return obm__fail_nomem(err, strlen(w->path));
    obm_status status = obm__st_writer_adopt(s->file, temp, err);
    obm_free(temp);
    s->done = s->adopted = status == OBM_OK;
    return status;
}

static obm_status adopt_shards(obm__model_writer *w, const obm__unfinished *u, obm_error *err) {
    for (size_t i = 0; i < w->n_shards; i++) {
        shard *s = &w->shards[i];
        obm__finished_shard found;
        OBM_TRY(obm__unfinished_shard(u, i, s->name, obm__st_writer_size(s->file), w->tick, w->user, &found, err));
        obm_status status = found.file ? adopt(w, s, &found, err) : OBM_OK;
        obm_free(found.file);
        OBM_TRY(status);
    }
    return OBM_OK;
}

/* The journal's lists stay true for the run that goes on, and for one that starts anew. */
static obm_status inherit(obm__model_writer *w, const obm__unfinished *u, obm_error *err) {
    const obm_json *lists[] = {obm__json_get(u->journal, "small"), obm__json_get(u->journal, "old")};
    obm_json *own[] = {w->small_records, w->old};
    bool made = false, ok = true;
    for (int l = 0; l < 2; l++) {
        for (size_t i = 0; i < obm__json_size(lists[l]); i++)
            ok = obm__json_append(own[l], obm__json_copy(obm__json_at(lists[l], i))) && ok;
    }
    obm__json_bool(obm__json_get(u->journal, "made_folder"), &made);
    w->made_dir = w->made_dir || made;
    return ok ? OBM_OK : obm__fail_nomem(err, 0);
}

/* ---- the start ---- */

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n > m && !strcmp(s + n - m, end);
}

/* Files of the shards (n; none where that is 0) are kept. */
static obm_status refuse_existing(const char *path, const shard *shards, size_t n, const obm__unfinished *u,
                                  obm_error *err) {
    char found[256] = "";
    bool weights = false;
    DIR *d = opendir(path);
    if (!d) return obm__fail_errno(err, "cannot read folder %s", path);
    for (struct dirent *e; !weights && (e = readdir(d));) {
        const char *name = e->d_name;
        bool heavy = ends_with(name, ".safetensors");
        if (!heavy && !obm__is_small_file(name)) continue;
        if (is_shard_file(shards, n, name) || obm__unfinished_owns(u, name)) continue;
        weights = heavy;
        snprintf(found, sizeof found, "%s", name);
    }
    closedir(d);
    if (weights && !u->model && obm__unfinished_names(u, found))
        return obm__fail(err, OBM_E_EXISTS,
                         "%s: %s is damaged: it is not what the stopped run wrote (another size or checksum); with "
                         "resume and overwriting this shard alone is computed again",
                         path, found);
    if (weights) return obm__fail(err, OBM_E_EXISTS, "%s holds a model, and overwriting was not asked for", path);
    if (!found[0]) return OBM_OK;
    return obm__fail(err, OBM_E_EXISTS, "%s holds a %s, and overwriting was not asked for", path, found);
}

obm_status obm__model_writer_check(const char *path, bool overwrite, obm_error *err) {
    obm__unfinished u;
    if (access(path, F_OK) != 0) return obm__check_parents(path, err);
    if (!obm__is_directory(path))
        return obm__fail(err, OBM_E_OCCUPIED, "%s is a file, expected a folder or nothing", path);
    if (overwrite) return OBM_OK;
    OBM_TRY(obm__unfinished_read(path, &u, err));
    obm_status status = u.journal ? OBM_OK : refuse_existing(path, NULL, 0, &u, err);
    obm__unfinished_clear(&u);
    return status;
}

static obm_status take_over(obm__model_writer *w, const obm__unfinished *u, obm_error *err) {
    bool resume = w->resume && u->journal;
    if (resume) {
        obm_status status = obm__unfinished_same_job(u, w->job, w->overwrite ? NULL : err);
        if (status != OBM_OK && !w->overwrite) return status;
        resume = status == OBM_OK;
    }
    if (resume) OBM_TRY(adopt_shards(w, u, err));
    if (!w->overwrite) OBM_TRY(refuse_existing(w->path, w->shards, w->n_shards, u, err));
    OBM_TRY(inherit(w, u, err));
    /* Without a lock a temporary name may be that of a writer at work. */
    if (w->lock >= 0) obm__unfinished_remove(u, is_kept, w, !resume);
    return write_journal(w, false, err);
}

static obm_status lock_folder(obm__model_writer *w, obm_error *err) {
    obm_status status = obm__directory_lock(w->path, &w->lock, err);
    if (status == OBM_E_BUSY) w->made_dir = false; /* by now it is somebody else's */
    return status == OBM_E_UNSUPPORTED ? OBM_OK : status;
}

/* Seals the shards that are full, up to the next one that needs bytes. */
static obm_status advance(obm__model_writer *w, obm_error *err) {
    for (; w->current < w->n_shards; w->current++) {
        shard *s = &w->shards[w->current];
        if (s->done) continue;
        if (!obm__st_writer_temp(s->file)) {
            w->left = s->bytes;
            OBM_TRY(obm__st_writer_begin(s->file, err));
        }
        if (w->left > 0) return OBM_OK;
        OBM_TRY(obm__st_writer_seal(s->file, s->hash, err));
        s->done = true;
        OBM_TRY(write_journal(w, false, err));
    }
    return OBM_OK;
}

obm_status obm__model_writer_begin(obm__model_writer *w, obm_error *err) {
    obm__unfinished u;
    if (w->shards) return obm__fail(err, OBM_E_ARG, "%s: writing has begun already", w->path);
    OBM_TRY(check_names(w, err));
    OBM_TRY(obm__model_writer_check(w->path, w->overwrite, err));
    w->made_dir = access(w->path, F_OK) != 0;
    OBM_TRY(obm__make_directory(w->path, err));
    OBM_TRY(lock_folder(w, err));
    OBM_TRY(make_shards(w, &w->shards, &w->n_shards, err));
    OBM_TRY(obm__unfinished_read(w->path, &u, err));
    obm_status status = take_over(w, &u, err);
    obm__unfinished_clear(&u);
    OBM_TRY(status);
    OBM_TRY(check_space(w, w->shards, w->n_shards, 0, err));
    return advance(w, err);
}

bool obm__model_writer_has(const obm__model_writer *w, size_t tensor) {
    for (size_t i = 0; i < w->n_shards; i++) {
        if (tensor < w->shards[i].end) return w->shards[i].adopted;
    }
    return false;
}

obm_status obm__model_writer_write(obm__model_writer *w, const void *bytes, size_t n, obm_error *err) {
    if (!w->shards) return obm__fail(err, OBM_E_ARG, "%s: writing has not begun", w->path);
    const char *p = bytes;
    while (n > 0) {
        if (w->current == w->n_shards) return obm__fail(err, OBM_E_ARG, "%s: %zu bytes more than declared", w->path, n);
        size_t part = n < w->left ? n : (size_t)w->left;
        OBM_TRY(obm__st_writer_write(w->shards[w->current].file, p, part, err));
        p += part;
        n -= part;
        w->left -= part;
        OBM_TRY(advance(w, err));
    }
    return OBM_OK;
}

/* ---- small files ---- */

static bool same_content(const char *path, const char *text, size_t size) {
    char *old;
    size_t old_size;
    if (obm__file_read(path, &old, &old_size, NULL) != OBM_OK) return false;
    bool same = old_size == size && !memcmp(old, text, size);
    obm_free(old);
    return same;
}

static obm_status note_small(obm_json *list, const char *name, const char *text, size_t size, obm_error *err) {
    char hash[33];
    obm__xxh3_of(text, size, hash);
    return obm__json_append(list, obm__file_record(name, size, hash)) ? OBM_OK : obm__fail_nomem(err, size);
}

static obm_status stage(obm__model_writer *w, const char *name, const char *text, size_t size, obm_error *err) {
    char *path = obm__path_join(w->path, name), *temp = NULL;
    if (!path) return obm__fail_nomem(err, strlen(w->path));
    /* People write more into the card. */
    obm_status status = strcmp(name, CARD) ? note_small(w->final_records, name, text, size, err) : OBM_OK;
    if (status == OBM_OK && !same_content(path, text, size)) status = obm__file_stage(path, text, size, &temp, err);
    obm_free(path);
    if (!temp) return status;
    w->small[w->n_small++] = (small_file){name, temp, false};
    return note_small(w->small_records, name, text, size, err);
}

/* A file that the old model has and the new one lacks (a chat template, say) would be read as the new one's. */
static obm_status mark_stale(obm__model_writer *w, const char *name, obm_error *err) {
    bool found = false;
    OBM_TRY(exists_in(w->path, name, &found, err));
    if (found) w->small[w->n_small++] = (small_file){name, NULL, true};
    return OBM_OK;
}

static obm_status stage_carried(obm__model_writer *w, const char *name, obm_error *err) {
    for (size_t i = 0; i < w->n_texts; i++)
        if (!strcmp(w->texts[i][0], name)) return stage(w, name, w->texts[i][1], strlen(w->texts[i][1]), err);
    bool none;
    char *source = source_of(w, name, &none), *text;
    size_t size;
    if (!source && !none) return obm__fail_nomem(err, strlen(w->copy_from));
    obm_status status = OBM_OK;
    if (none || !obm__file_exists(source)) {
        status = mark_stale(w, name, err);
    } else {
        status = obm__file_read(source, &text, &size, err);
        if (status == OBM_OK) {
            status = stage(w, name, text, size, err);
            obm_free(text);
        }
    }
    obm_free(source);
    return status;
}

/* The card ends with what each shard, under the name that it has where it can, should hash to. */
static obm_status stage_card(obm__model_writer *w, obm_error *err) {
    obm__buffer b = {0};
    obm__buffer_text(&b, w->card);
    obm__buffer_text(&b, "\n| file | XXH3-128, as `xxhsum -H2` prints it |\n|---|---|\n");
    for (size_t i = 0; i < w->n_shards; i++) {
        char *name = shard_file_name(i, w->n_shards, NULL);
        obm__buffer_printf(&b, "| %s | %s |\n", name ? name : "", w->shards[i].hash);
        b.failed |= !name;
        obm_free(name);
    }
    obm_status status = b.failed ? obm__fail_nomem(err, b.size) : stage(w, CARD, b.data, b.size, err);
    obm__buffer_free(&b);
    return status;
}

static obm_status stage_small(obm__model_writer *w, obm_error *err) {
    if (w->config) OBM_TRY(stage(w, carried[0], w->config, strlen(w->config), err));
    for (size_t i = w->config ? 1 : 0; w->copy_from && i < N_CARRIED; i++) OBM_TRY(stage_carried(w, carried[i], err));
    return w->card ? stage_card(w, err) : OBM_OK;
}

static obm_status publish_in(const obm__model_writer *w, char **temp, const char *name, obm_error *err) {
    char *path = obm__path_join(w->path, name);
    if (!path) return obm__fail_nomem(err, strlen(w->path));
    obm_status status = obm__file_publish(*temp, path, err);
    obm_free(path);
    if (status != OBM_OK) return status;
    obm_free(*temp);
    *temp = NULL;
    return OBM_OK;
}

static obm_status publish_small(obm__model_writer *w, obm_error *err) {
    for (size_t i = 0; i < w->n_small; i++) {
        small_file *s = &w->small[i];
        OBM_TRY(s->stale ? remove_in(w->path, s->name, err) : publish_in(w, &s->temp, s->name, err));
    }
    return OBM_OK;
}

/* The card is for people: it does not make a mixture of two models. */
static bool model_changes(const obm__model_writer *w) {
    for (size_t i = 0; i < w->n_small; i++) {
        if (strcmp(w->small[i].name, CARD) != 0) return true;
    }
    return false;
}

/* ---- the commit ---- */

/* The plain names where they are free; beside an old model's shards, names derived from the content. */
static obm_status name_shards(obm__model_writer *w, obm_error *err) {
    bool taken = false;
    for (size_t i = 0; i < w->n_shards && !taken; i++)
        if (!w->shards[i].published) OBM_TRY(exists_in(w->path, w->shards[i].name, &taken, err));
    if (w->n_shards == 1 || !taken) return OBM_OK;
    for (size_t i = 0; i < w->n_shards; i++) {
        if (w->shards[i].published) continue;
        char *name = shard_file_name(i, w->n_shards, w->shards[i].hash);
        if (!name) return obm__fail_nomem(err, 0);
        take_name(&w->shards[i], name);
    }
    return OBM_OK;
}

static obm_status publish_shard(const obm__model_writer *w, shard *s, obm_error *err) {
    if (s->published) return OBM_OK;
    char *path = obm__path_join(w->path, s->name);
    if (!path) return obm__fail_nomem(err, strlen(w->path));
    /* A file of that name and content is the old model's: after a failure it must stay. */
    bool ours = access(path, F_OK) != 0;
    obm_status status = obm__st_writer_publish(s->file, path, err);
    s->published = status == OBM_OK;
    s->ours = ours && status == OBM_OK;
    obm_free(path);
    return status;
}

static bool map_shard(const obm__model_writer *w, const shard *s, obm_json *map) {
    bool ok = true;
    for (size_t t = s->first; t < s->end; t++)
        ok = obm__json_set(map, w->tensors.items[t].name, obm__json_new_string(s->name)) && ok;
    return ok;
}

static obm_status stage_index(obm__model_writer *w, obm_error *err) {
    obm_json *root = obm__json_new_object(), *metadata = obm__json_new_object(), *map = obm__json_new_object();
    bool ok = obm__json_set(metadata, "total_size", obm__json_new_int((int64_t)w->tensors.bytes));
    for (size_t i = 0; i < w->n_shards; i++) ok = map_shard(w, &w->shards[i], map) && ok;
    ok = obm__json_set(root, "metadata", metadata) && ok;
    ok = obm__json_set(root, "weight_map", map) && ok;
    char *text = ok ? obm__json_text(root, 2) : NULL, *path = obm__path_join(w->path, OBM_INDEX_FILE);
    obm_status status =
        text && path ? obm__file_stage(path, text, strlen(text), &w->index_temp, err) : obm__fail_nomem(err, 0);
    obm__json_free(root);
    obm_free(text);
    obm_free(path);
    return status;
}

/* Under its plain name, which it will have where the file system has links. */
static obm_json *finished_record(const shard *s) {
    return obm__file_record(s->plain ? s->plain : s->name, obm__st_writer_size(s->file), s->hash);
}

/* Before the commit, after which nothing may fail that a disk can refuse. */
static obm_status stage_record(obm__model_writer *w, obm_error *err) {
    if (!w->job) return OBM_OK;
    obm_json *record = obm__json_new_object(), *shards = obm__json_new_array();
    bool ok = obm__json_set(record, "format", obm__json_new_string(OBM_FINISHED_FORMAT));
    ok = obm__json_set(record, "version", obm__json_new_int(OBM_UNFINISHED_VERSION)) && ok;
    ok = obm__json_set(record, "job", obm__json_copy(w->job)) && ok;
    for (size_t i = 0; i < w->n_shards; i++) ok = obm__json_append(shards, finished_record(&w->shards[i])) && ok;
    ok = obm__json_set(record, "shards", shards) && ok;
    ok = obm__json_set(record, "small", obm__json_copy(w->final_records)) && ok;
    char *text = ok ? obm__json_text(record, 1) : NULL, *path = obm__path_join(w->path, OBM_FINISHED_FILE);
    obm_status status =
        text && path ? obm__file_stage(path, text, strlen(text), &w->record_temp, err) : obm__fail_nomem(err, 0);
    obm__json_free(record);
    obm_free(text);
    obm_free(path);
    return status;
}

/* The index that is about to be replaced, NULL when there is none that can be read. */
static obm_json *old_index(const obm__model_writer *w) {
    char *path = obm__path_join(w->path, OBM_INDEX_FILE);
    obm_json *index = NULL;
    if (path && obm__json_load(path, &index, NULL) != OBM_OK) index = NULL;
    obm_free(path);
    return index;
}

static bool is_new_shard(const obm__model_writer *w, const char *name) {
    for (size_t i = 0; i < w->n_shards; i++) {
        if (!strcmp(w->shards[i].name, name)) return true;
    }
    return false;
}

static obm_status note_old_shards(obm__model_writer *w, obm_error *err) {
    obm_json *index = old_index(w);
    const obm_json *map = obm__json_get(index, "weight_map");
    bool ok = true;
    for (void *it = obm__json_first(map); it; it = obm__json_next(map, it)) {
        const char *name = obm__json_string(obm__json_value(it)), *last = NULL;
        size_t n = obm__json_size(w->old);
        if (n) last = obm__json_string(obm__json_at(w->old, n - 1));
        if (name && !(last && !strcmp(last, name))) ok = obm__json_append(w->old, obm__json_new_string(name)) && ok;
    }
    obm__json_free(index);
    return ok ? OBM_OK : obm__fail_nomem(err, 0);
}

/* After the commit nothing reads these; what cannot be removed only takes room. */
static void remove_old_shards(const obm__model_writer *w) {
    for (size_t i = 0; i < obm__json_size(w->old); i++) {
        const char *name = obm__json_string(obm__json_at(w->old, i));
        if (name && ends_with(name, ".safetensors") && !strchr(name, '/') && !is_new_shard(w, name))
            remove_in(w->path, name, NULL);
    }
}

/* The one file of a run that was killed after its commit: it is withdrawn like any other, but not lost. */
static obm_status take_back(const obm__model_writer *w, shard *s, obm_error *err) {
    char *temp, *path = obm__path_join(w->path, s->name);
    int fd = -1;
    if (!path) return obm__fail_nomem(err, strlen(w->path));
    obm_status status = obm__temp_create(path, &temp, &fd, err);
    if (status == OBM_OK) {
        close(fd);
        status = obm__file_publish(path, temp, err);
        if (status == OBM_OK) status = obm__st_writer_adopt(s->file, temp, err);
        s->published = status != OBM_OK;
        obm_free(temp);
    }
    obm_free(path);
    return status;
}

static obm_status withdraw_old(obm__model_writer *w, obm_error *err) {
    OBM_TRY(remove_in(w->path, OBM_INDEX_FILE, err));
    if (w->n_shards == 1 && w->shards[0].published) OBM_TRY(take_back(w, &w->shards[0], err));
    OBM_TRY(remove_in(w->path, OBM_ONE_FILE, err));
    return obm__directory_sync(w->path, err);
}

static obm_status commit(obm__model_writer *w, obm_error *err) {
    if (w->n_shards == 1) {
        OBM_TRY(publish_shard(w, &w->shards[0], err));
        w->committed = true;
        return remove_in(w->path, OBM_INDEX_FILE, err);
    }
    OBM_TRY(publish_in(w, &w->index_temp, OBM_INDEX_FILE, err));
    w->committed = true;
    return remove_in(w->path, OBM_ONE_FILE, err);
}

static obm_status switch_over(obm__model_writer *w, obm_error *err) {
    OBM_TRY(note_old_shards(w, err));
    if (w->n_shards > 1) {
        OBM_TRY(name_shards(w, err));
        OBM_TRY(stage_index(w, err));
    }
    OBM_TRY(stage_record(w, err));
    OBM_TRY(write_journal(w, true, err));
    for (size_t i = 0; w->n_shards > 1 && i < w->n_shards; i++) OBM_TRY(publish_shard(w, &w->shards[i], err));
    if (model_changes(w)) OBM_TRY(withdraw_old(w, err));
    OBM_TRY(publish_small(w, err));
    return commit(w, err);
}

/* ---- plain names ---- */

static bool link_in(const obm__model_writer *w, const char *from, const char *to) {
    char *a = obm__path_join(w->path, from), *b = obm__path_join(w->path, to);
    bool ok = a && b && (link(a, b) == 0 || (errno == EEXIST && unlink(b) == 0 && link(a, b) == 0));
    obm_free(a);
    obm_free(b);
    return ok;
}

static void swap_names(obm__model_writer *w) {
    for (size_t i = 0; i < w->n_shards; i++) {
        shard *s = &w->shards[i];
        char *name = s->name;
        if (!s->plain) continue;
        s->name = s->plain;
        s->plain = name;
    }
}

static void remove_plain(const obm__model_writer *w, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (w->shards[i].plain) remove_in(w->path, w->shards[i].plain, NULL);
}

/* No index names what stands under the plain names now.  A file system without links leaves the hashed ones: the model
 * is there either way, so nothing here is an error. */
static void name_plainly(obm__model_writer *w) {
    bool any = false, ok = true;
    size_t linked = 0;
    for (size_t i = 0; i < w->n_shards; i++) any |= w->shards[i].plain != NULL;
    if (!any) return;
    for (; linked < w->n_shards && ok; linked += ok)
        ok = !w->shards[linked].plain || link_in(w, w->shards[linked].name, w->shards[linked].plain);
    swap_names(w);
    ok = ok && obm__directory_sync(w->path, NULL) == OBM_OK && stage_index(w, NULL) == OBM_OK &&
         publish_in(w, &w->index_temp, OBM_INDEX_FILE, NULL) == OBM_OK;
    if (!ok) swap_names(w);
    remove_plain(w, linked); /* after a swap the hashed ones; else what was linked and no file beside */
}

obm_status obm__model_writer_finish(obm__model_writer *w, obm_error *err) {
    if (!w->shards || w->current < w->n_shards)
        return obm__fail(err, OBM_E_ARG, "%s: fewer bytes written than the %llu declared", w->path,
                         (unsigned long long)w->tensors.bytes);
    OBM_TRY(stage_small(w, err));
    OBM_TRY(switch_over(w, err));
    remove_old_shards(w);
    name_plainly(w);
    OBM_TRY(w->record_temp ? publish_in(w, &w->record_temp, OBM_FINISHED_FILE, err)
                           : remove_in(w->path, OBM_FINISHED_FILE, err)); /* another model's */
    OBM_TRY(remove_in(w->path, OBM_UNFINISHED_FILE, err));
    return obm__directory_sync(w->path, err);
}

/* ---- the end ---- */

/* A run to be resumed leaves its finished shards and the journal, if there are any. */
static bool leaves_shards(const obm__model_writer *w) {
    for (size_t i = 0; w->resume && w->shards && i < w->n_shards; i++) {
        if (w->shards[i].done) return true;
    }
    return false;
}

static void remove_own_files(obm__model_writer *w) {
    obm__unfinished u;
    for (size_t i = 0; w->shards && i < w->n_shards; i++) {
        if (w->shards[i].ours) remove_in(w->path, w->shards[i].name, NULL);
    }
    if (w->journaled && obm__unfinished_read(w->path, &u, NULL) == OBM_OK) {
        if (w->lock >= 0) obm__unfinished_remove(&u, NULL, NULL, true);
        obm__unfinished_clear(&u);
        remove_in(w->path, OBM_UNFINISHED_FILE, NULL);
    }
}

static void end_folder(obm__model_writer *w) {
    bool leave = !w->committed && leaves_shards(w);
    for (size_t i = 0; leave && i < w->n_shards; i++) {
        if (w->shards[i].done) obm__st_writer_leave(w->shards[i].file);
    }
    for (size_t i = 0; i < w->n_small; i++) {
        if (w->small[i].temp) unlink(w->small[i].temp);
        obm_free(w->small[i].temp);
    }
    if (w->index_temp) unlink(w->index_temp);
    obm_free(w->index_temp);
    if (w->record_temp) unlink(w->record_temp);
    obm_free(w->record_temp);
    free_shards(w->shards, w->n_shards); /* and the temporary files of shards that are not left */
    w->shards = NULL;
}

void obm__model_writer_free(obm__model_writer *w) {
    if (!w) return;
    if (!w->committed && !leaves_shards(w)) remove_own_files(w);
    end_folder(w);
    if (w->made_dir && !w->committed) (void)rmdir(w->path); /* fails where somebody else put something */
    if (w->lock >= 0) obm__directory_unlock(w->lock);
    obm__declared_free(&w->tensors);
    obm__json_free(w->job);
    obm__json_free(w->small_records);
    obm__json_free(w->old);
    obm__json_free(w->final_records);
    obm_free(w->path);
    obm_free(w->copy_from);
    obm_free(w->config);
    obm_free(w->card);
    obm_free(w);
}
