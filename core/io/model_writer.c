/* Model folders out: shards, their index, config, tokenizer files and model card.  Knows nothing about the tensors'
 * meaning.
 *
 * How the new state appears.  Readers (obm_checkpoint_open and transformers alike) take model.safetensors if it is
 * there, else the index.  Everything is first written and synced under temporary names; then shards get final names
 * that nothing refers to yet, then the small files are renamed, and last comes the commit:
 *
 *     one shard       rename of model.safetensors (an old index and its shards are removed afterwards)
 *     several         rename of the index; where an old model.safetensors stands before it, the removal of that
 *
 * Weights and config.json are two files, and no order of renames switches both at once.  So when an existing model is
 * replaced by one whose config or tokenizer differs, the old commit file is removed before the small files change: a
 * run killed between the two leaves a folder without a model, which every reader refuses, never the weights of one with
 * the config of the other. */
#include "io.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ONE_FILE "model.safetensors"
#define INDEX_FILE "model.safetensors.index.json"
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

typedef struct {
    char *name;
    obm_dtype dtype;
    int32_t ndim;
    int64_t shape[OBM_MAX_DIM];
    uint64_t bytes;
    size_t shard;
} declared;
typedef struct {
    obm__st_writer *file;
    char *name;
    char hash[33];
    uint64_t bytes;
    bool ours;
} shard;
/* A small file in transit: staged under temp, or to be removed because the new model has none. */
typedef struct {
    const char *name;
    char *temp;
    bool stale;
} small_file;

struct obm__model_writer {
    char *path, *copy_from, *config, *card;
    uint64_t shard_bytes, data_bytes;
    declared *tensors;
    size_t count, capacity;
    shard *shards; /* NULL before begin */
    size_t n_shards, current;
    uint64_t left; /* bytes that the current shard still needs */
    small_file small[N_CARRIED + 1];
    size_t n_small;
    char *index_temp;
    bool committed;
    bool made_dir; /* the folder is this writer's: an unfinished one goes again */
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

static obm_status holds_weights(const char *dir, bool *found, obm_error *err) {
    DIR *d = opendir(dir);
    if (!d) return obm__fail_errno(err, "cannot read folder %s", dir);
    *found = false;
    for (struct dirent *e; !*found && (e = readdir(d));) {
        size_t n = strlen(e->d_name);
        *found = n > 12 && !strcmp(e->d_name + n - 12, ".safetensors");
    }
    closedir(d);
    return OBM_OK;
}

static obm_status refuse_existing(const char *path, bool overwrite, obm_error *err) {
    if (access(path, F_OK) != 0) return OBM_OK;
    if (!obm__is_directory(path))
        return obm__fail(err, OBM_E_EXISTS, "%s is a file, expected a folder or nothing", path);
    if (overwrite) return OBM_OK;
    bool found = false;
    OBM_TRY(holds_weights(path, &found, err));
    if (found)
        return obm__fail(err, OBM_E_EXISTS, "%s holds a model, and overwriting was not asked for", path);
    for (size_t i = 0; i <= N_CARRIED; i++) {
        const char *name = i < N_CARRIED ? carried[i] : CARD;
        OBM_TRY(exists_in(path, name, &found, err));
        if (found)
            return obm__fail(err, OBM_E_EXISTS, "%s holds a %s, and overwriting was not asked for", path, name);
    }
    return OBM_OK;
}

/* ---- declaring ---- */

static bool copy_options(obm__model_writer *w, const char *path, const obm__model_writer_options *o) {
    w->shard_bytes = o && o->shard_bytes ? o->shard_bytes : DEFAULT_SHARD_BYTES;
    w->path = obm__strdup(path);
    bool ok = w->path != NULL;
    if (o && o->copy_from) ok = (w->copy_from = obm__strdup(o->copy_from)) && ok;
    if (o && o->config) ok = (w->config = obm__json_text(o->config, 2)) && ok;
    if (o && o->card) ok = (w->card = obm__strdup(o->card)) && ok;
    return ok;
}

obm_status obm__model_writer_new(const char *path, const obm__model_writer_options *o, obm__model_writer **out,
                                 obm_error *err) {
    OBM_TRY(refuse_existing(path, o && o->overwrite, err));
    obm__model_writer *w = obm__calloc(1, sizeof *w);
    if (!w) return obm__fail_nomem(err, sizeof *w);
    if (!copy_options(w, path, o)) {
        obm__model_writer_free(w);
        return obm__fail_nomem(err, 0);
    }
    *out = w;
    return OBM_OK;
}

static obm_status grow(obm__model_writer *w, obm_error *err) {
    if (w->count < w->capacity) return OBM_OK;
    size_t capacity = w->capacity ? 2 * w->capacity : 64;
    declared *tensors = obm__realloc(w->tensors, capacity, sizeof *tensors);
    if (!tensors) return obm__fail_nomem(err, capacity * sizeof *tensors);
    w->tensors = tensors;
    w->capacity = capacity;
    return OBM_OK;
}

obm_status obm__model_writer_declare(obm__model_writer *w, const char *name, obm_dtype dtype, int32_t ndim,
                                     const int64_t *shape, obm_error *err) {
    if (w->shards) return obm__fail(err, OBM_E_ARG, "%s: tensor %s declared after writing began", w->path, name);
    uint64_t bytes;
    OBM_TRY(obm__st_bytes(name, dtype, ndim, shape, &bytes, err));
    if (bytes > INT64_MAX - w->data_bytes)
        return obm__fail(err, OBM_E_ARG, "%s: more than 2^63 bytes declared", w->path);
    OBM_TRY(grow(w, err));
    declared d = {obm__strdup(name), dtype, ndim, {0}, bytes, 0};
    if (!d.name) return obm__fail_nomem(err, strlen(name));
    for (int32_t i = 0; i < ndim; i++) d.shape[i] = shape[i];
    w->tensors[w->count++] = d;
    w->data_bytes += bytes;
    return OBM_OK;
}

/* ---- shards ---- */

/* Tensors fill a shard until the next one would pass the limit; a tensor larger than the limit has a shard of its own,
 * and empty ones never open a shard. */
static size_t assign_shards(declared *tensors, size_t count, uint64_t limit) {
    size_t at = 0;
    uint64_t filled = 0;
    for (size_t i = 0; i < count; i++) {
        if (filled > 0 && tensors[i].bytes > 0 && (tensors[i].bytes > limit || filled > limit - tensors[i].bytes)) {
            at++;
            filled = 0;
        }
        tensors[i].shard = at;
        filled += tensors[i].bytes;
    }
    return at + 1;
}

static char *shard_file_name(size_t i, size_t n, const char *hash) {
    if (n == 1) return obm__strdup(ONE_FILE);
    return hash ? obm__format("model-%.16s-%05zu-of-%05zu.safetensors", hash, i + 1, n)
                : obm__format("model-%05zu-of-%05zu.safetensors", i + 1, n);
}

static void free_shards(shard *shards, size_t n) {
    for (size_t i = 0; shards && i < n; i++) {
        obm__st_writer_free(shards[i].file);
        obm_free(shards[i].name);
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
    return obm__st_writer_metadata(s->file, "format", "pt", err);
}

/* Also used for the size of a dry run, so it touches no file. */
static obm_status make_shards(const obm__model_writer *w, shard **out, size_t *out_n, obm_error *err) {
    size_t n = assign_shards(w->tensors, w->count, w->shard_bytes);
    shard *shards = obm__calloc(n, sizeof *shards);
    if (!shards) return obm__fail_nomem(err, n * sizeof *shards);
    obm_status status = OBM_OK;
    for (size_t i = 0; i < n; i++) OBM_GO(make_shard(w, &shards[i], i, n, err));
    for (size_t i = 0; i < w->count; i++) {
        const declared *d = &w->tensors[i];
        OBM_GO(obm__st_writer_declare(shards[d->shard].file, d->name, d->dtype, d->ndim, d->shape, err));
        shards[d->shard].bytes += d->bytes;
    }
    *out = shards;
    *out_n = n;
    return OBM_OK;
done:
    free_shards(shards, n);
    return status;
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

static int by_string(const void *a, const void *b) { return strcmp(*(const char *const *)a, *(const char *const *)b); }

/* Each shard's header finds its own doubles; this finds those across shards. */
static obm_status check_names(const obm__model_writer *w, obm_error *err) {
    const char **names = obm__calloc(w->count, sizeof *names);
    if (!names) return obm__fail_nomem(err, w->count * sizeof *names);
    for (size_t i = 0; i < w->count; i++) names[i] = w->tensors[i].name;
    if (w->count > 1) qsort(names, w->count, sizeof *names, by_string);
    obm_status status = OBM_OK;
    for (size_t i = 1; i < w->count && status == OBM_OK; i++) {
        if (!strcmp(names[i - 1], names[i]))
            status = obm__fail(err, OBM_E_ARG, "%s: tensor %s declared twice", w->path, names[i]);
    }
    obm_free(names);
    return status;
}

static obm_status begin_shard(obm__model_writer *w, obm_error *err) {
    w->left = w->shards[w->current].bytes;
    return obm__st_writer_begin(w->shards[w->current].file, err);
}

/* Seals the shards that are full, up to the next one that needs bytes. */
static obm_status advance(obm__model_writer *w, obm_error *err) {
    while (w->current < w->n_shards && w->left == 0) {
        shard *s = &w->shards[w->current];
        OBM_TRY(obm__st_writer_seal(s->file, s->hash, err));
        if (++w->current < w->n_shards) OBM_TRY(begin_shard(w, err));
    }
    return OBM_OK;
}

obm_status obm__model_writer_begin(obm__model_writer *w, obm_error *err) {
    if (w->shards) return obm__fail(err, OBM_E_ARG, "%s: writing has begun already", w->path);
    OBM_TRY(check_names(w, err));
    w->made_dir = access(w->path, F_OK) != 0;
    OBM_TRY(obm__make_directory(w->path, err));
    OBM_TRY(make_shards(w, &w->shards, &w->n_shards, err));
    OBM_TRY(begin_shard(w, err));
    return advance(w, err);
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

static obm_status stage(obm__model_writer *w, const char *name, const char *text, size_t size, obm_error *err) {
    char *path = obm__path_join(w->path, name), *temp = NULL;
    if (!path) return obm__fail_nomem(err, strlen(w->path));
    obm_status status = OBM_OK;
    if (!same_content(path, text, size)) status = obm__file_stage(path, text, size, &temp, err);
    obm_free(path);
    if (temp) w->small[w->n_small++] = (small_file){name, temp, false};
    return status;
}

/* A file that the old model has and the new one lacks (a chat template, say) would be read as the new one's. */
static obm_status mark_stale(obm__model_writer *w, const char *name, obm_error *err) {
    bool found = false;
    OBM_TRY(exists_in(w->path, name, &found, err));
    if (found) w->small[w->n_small++] = (small_file){name, NULL, true};
    return OBM_OK;
}

static obm_status stage_carried(obm__model_writer *w, const char *name, obm_error *err) {
    char *source = obm__path_join(w->copy_from, name), *text;
    size_t size;
    if (!source) return obm__fail_nomem(err, strlen(w->copy_from));
    obm_status status = OBM_OK;
    if (!obm__file_exists(source)) {
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

static obm_status stage_small(obm__model_writer *w, obm_error *err) {
    if (w->config) OBM_TRY(stage(w, carried[0], w->config, strlen(w->config), err));
    for (size_t i = w->config ? 1 : 0; w->copy_from && i < N_CARRIED; i++) OBM_TRY(stage_carried(w, carried[i], err));
    return w->card ? stage(w, CARD, w->card, strlen(w->card), err) : OBM_OK;
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
    for (size_t i = 0; i < w->n_shards && !taken; i++) OBM_TRY(exists_in(w->path, w->shards[i].name, &taken, err));
    if (w->n_shards == 1 || !taken) return OBM_OK;
    for (size_t i = 0; i < w->n_shards; i++) {
        char *name = shard_file_name(i, w->n_shards, w->shards[i].hash);
        if (!name) return obm__fail_nomem(err, 0);
        obm_free(w->shards[i].name);
        w->shards[i].name = name;
    }
    return OBM_OK;
}

static obm_status publish_shard(const obm__model_writer *w, shard *s, obm_error *err) {
    char *path = obm__path_join(w->path, s->name);
    if (!path) return obm__fail_nomem(err, strlen(w->path));
    /* A file of that name and content is the old model's: after a failure it must stay. */
    bool ours = access(path, F_OK) != 0;
    obm_status status = obm__st_writer_publish(s->file, path, err);
    s->ours = ours && status == OBM_OK;
    obm_free(path);
    return status;
}

static obm_status stage_index(obm__model_writer *w, obm_error *err) {
    obm_json *root = obm__json_new_object(), *metadata = obm__json_new_object(), *map = obm__json_new_object();
    bool ok = obm__json_set(metadata, "total_size", obm__json_new_int((int64_t)w->data_bytes));
    for (size_t i = 0; i < w->count; i++)
        ok = obm__json_set(map, w->tensors[i].name, obm__json_new_string(w->shards[w->tensors[i].shard].name)) && ok;
    ok = obm__json_set(root, "metadata", metadata) && ok;
    ok = obm__json_set(root, "weight_map", map) && ok;
    char *text = ok ? obm__json_text(root, 2) : NULL, *path = obm__path_join(w->path, INDEX_FILE);
    obm_status status =
        text && path ? obm__file_stage(path, text, strlen(text), &w->index_temp, err) : obm__fail_nomem(err, 0);
    obm__json_free(root);
    obm_free(text);
    obm_free(path);
    return status;
}

/* The index that is about to be replaced, NULL when there is none that can be read. */
static obm_json *old_index(const obm__model_writer *w) {
    char *path = obm__path_join(w->path, INDEX_FILE);
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

/* After the commit nothing reads these; what cannot be removed only takes room. */
static void remove_old_shards(const obm__model_writer *w, const obm_json *index) {
    const obm_json *map = obm__json_get(index, "weight_map");
    for (void *it = obm__json_first(map); it; it = obm__json_next(map, it)) {
        const char *name = obm__json_string(obm__json_value(it));
        if (name && *name && !strchr(name, '/') && !is_new_shard(w, name)) remove_in(w->path, name, NULL);
    }
}

static obm_status withdraw_old(const obm__model_writer *w, obm_error *err) {
    OBM_TRY(remove_in(w->path, INDEX_FILE, err));
    OBM_TRY(remove_in(w->path, ONE_FILE, err));
    return obm__directory_sync(w->path, err);
}

static obm_status commit(obm__model_writer *w, obm_error *err) {
    if (w->n_shards == 1) {
        OBM_TRY(publish_shard(w, &w->shards[0], err));
        w->committed = true;
        return remove_in(w->path, INDEX_FILE, err);
    }
    OBM_TRY(publish_in(w, &w->index_temp, INDEX_FILE, err));
    w->committed = true;
    return remove_in(w->path, ONE_FILE, err);
}

static obm_status switch_over(obm__model_writer *w, obm_error *err) {
    if (w->n_shards > 1) {
        OBM_TRY(name_shards(w, err));
        OBM_TRY(stage_index(w, err));
        for (size_t i = 0; i < w->n_shards; i++) OBM_TRY(publish_shard(w, &w->shards[i], err));
    }
    if (model_changes(w)) OBM_TRY(withdraw_old(w, err));
    OBM_TRY(publish_small(w, err));
    return commit(w, err);
}

obm_status obm__model_writer_finish(obm__model_writer *w, obm_error *err) {
    if (!w->shards || w->current < w->n_shards)
        return obm__fail(err, OBM_E_ARG, "%s: fewer bytes written than the %llu declared", w->path,
                         (unsigned long long)w->data_bytes);
    OBM_TRY(stage_small(w, err));
    obm_json *old = old_index(w);
    obm_status status = switch_over(w, err);
    if (status == OBM_OK) {
        remove_old_shards(w, old);
        status = obm__directory_sync(w->path, err);
    }
    obm__json_free(old);
    return status;
}

void obm__model_writer_free(obm__model_writer *w) {
    if (!w) return;
    for (size_t i = 0; w->shards && !w->committed && i < w->n_shards; i++) {
        if (w->shards[i].ours) remove_in(w->path, w->shards[i].name, NULL);
    }
    for (size_t i = 0; i < w->n_small; i++) {
        if (w->small[i].temp) unlink(w->small[i].temp);
        obm_free(w->small[i].temp);
    }
    if (w->index_temp) unlink(w->index_temp);
    obm_free(w->index_temp);
    free_shards(w->shards, w->n_shards);
    if (w->made_dir && !w->committed) (void)rmdir(w->path); /* fails where somebody else put something */
    for (size_t i = 0; i < w->count; i++) obm_free(w->tensors[i].name);
    obm_free(w->tensors);
    obm_free(w->path);
    obm_free(w->copy_from);
    obm_free(w->config);
    obm_free(w->card);
    obm_free(w);
}
