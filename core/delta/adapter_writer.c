/* Writes a PEFT LoRA folder: adapter_model.safetensors and adapter_config.json, which comes last.  The header of the
 * first needs every rank, so factors go to a spool beside it until all are known, and memory does not grow with them.
 */
#include "delta.h"

#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

typedef struct factor_pair {
    char *module; /* owned */
    int64_t rank, rows, cols;
} factor_pair;

struct obm__adapter_writer {
    char *dir, *weights, *config, *spool;
    bool made; /* the folder did not exist */
    int lock, fd;
    obm_dtype dtype;
    factor_pair *pairs;
    size_t n, capacity;
};

/* ---- the folder ---- */

/* Whether a name is that of a file under a temporary name. */
static bool is_temporary(const char *name, const char *file) {
    return obm__temp_stem(name) == strlen(file) && !strncmp(name, file, strlen(file));
}

/* Only an adapter is replaced: *found is another file, owned.  Weights beside a config that has not got its name yet
 * are what a run left that was killed between its two renames. */
static obm_status look_inside(const char *dir, bool *adapter, char **found, obm_error *err) {
    bool config = false, weights = false, staged = false;
    obm_status status = OBM_OK;
    DIR *d = opendir(dir);
    if (!d) return obm__fail_errno(err, "cannot list %s", dir);
    for (struct dirent *e; status == OBM_OK && (e = readdir(d));) {
        bool ours = !strcmp(e->d_name, OBM_ADAPTER_CONFIG) || !strcmp(e->d_name, OBM_ADAPTER_WEIGHTS);
        config |= !strcmp(e->d_name, OBM_ADAPTER_CONFIG);
        weights |= !strcmp(e->d_name, OBM_ADAPTER_WEIGHTS);
        staged |= is_temporary(e->d_name, OBM_ADAPTER_CONFIG);
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..") || obm__temp_stem(e->d_name) || ours || *found)
            continue;
        if (!(*found = obm__strdup(e->d_name))) status = obm__fail_nomem(err, strlen(e->d_name));
    }
    closedir(d);
    *adapter = config || (weights && !staged);
    return status;
}

static obm_status check_folder(const char *dir, bool overwrite, obm_error *err) {
    bool adapter = false;
    char *found = NULL;
    if (!obm__file_exists(dir) && !obm__is_directory(dir)) return obm__check_parents(dir, err);
    if (!obm__is_directory(dir))
        return obm__fail(err, OBM_E_OCCUPIED, "%s is a file, expected a folder or nothing", dir);
    obm_status status = look_inside(dir, &adapter, &found, err);
    if (status == OBM_OK && !adapter && found)
        status = obm__fail(err, OBM_E_OCCUPIED, "%s holds %s and no adapter: it will not be replaced", dir, found);
    else if (status == OBM_OK && adapter && !overwrite)
        status = obm__fail(err, OBM_E_EXISTS, "%s holds an adapter, and overwriting was not asked for", dir);
    obm_free(found);
    return status;
}

/* What killed runs left: those at work hold the folder's lock, which is ours now.  Weights that lack their config go
 * first: without its temporary name they would look like somebody's. */
static obm_status remove_remains(const obm__adapter_writer *w, bool adapter, obm_error *err) {
    const char *dir = w->dir;
    obm_status status = OBM_OK;
    if (!adapter && unlink(w->weights) && errno != ENOENT) return obm__fail_errno(err, "cannot remove %s", w->weights);
    DIR *d = opendir(dir);
    if (!d) return obm__fail_errno(err, "cannot list %s", dir);
    for (struct dirent *e; status == OBM_OK && (e = readdir(d));) {
        if (!is_temporary(e->d_name, OBM_ADAPTER_CONFIG) && !is_temporary(e->d_name, OBM_ADAPTER_WEIGHTS)) continue;
        char *path = obm__path_join(dir, e->d_name);
        if (!path) status = obm__fail_nomem(err, strlen(dir));
        if (path && unlink(path) && errno != ENOENT) status = obm__fail_errno(err, "cannot remove %s", path);
        obm_free(path);
    }
    closedir(d);
    return status;
}

obm_status obm__adapter_writer_check(const char *dir, bool overwrite, const char *const *inputs, size_t n,
                                     obm_error *err) {
    OBM_TRY(check_folder(dir, overwrite, err));
    for (size_t i = 0; i < n; i++)
        if (obm__same_path(dir, inputs[i]))
            return obm__fail(err, OBM_E_ARG, "%.300s is an input, it cannot be the output", dir);
    return OBM_OK;
}

obm_status obm__adapter_writer_new(const char *dir, obm_dtype dtype, obm__adapter_writer **out, obm_error *err) {
    obm_status status;
    bool adapter = false;
    char *found = NULL;
    obm__adapter_writer *w = obm__calloc(1, sizeof *w);
    if (!w) return obm__fail_nomem(err, sizeof *w);
    w->lock = w->fd = -1;
    w->dtype = dtype;
    w->dir = obm__strdup(dir);
    w->weights = obm__path_join(dir, OBM_ADAPTER_WEIGHTS);
    w->config = obm__path_join(dir, OBM_ADAPTER_CONFIG);
    if (!w->dir || !w->weights || !w->config) OBM_GO(obm__fail_nomem(err, strlen(dir)));
    w->made = !obm__is_directory(dir);
    OBM_GO(obm__make_directory(dir, err));
    OBM_GO(obm__directory_lock(dir, &w->lock, err));
    OBM_GO(look_inside(dir, &adapter, &found, err));
    OBM_GO(remove_remains(w, adapter, err));
    OBM_GO(obm__temp_create(w->weights, &w->spool, &w->fd, err));
    *out = w;
    w = NULL;
done:
    obm_free(found);
    obm__adapter_writer_free(w);
    return status;
}

void obm__adapter_writer_free(obm__adapter_writer *w) {
    if (!w) return;
    if (w->fd >= 0) close(w->fd);
    if (w->spool) unlink(w->spool);
    if (w->lock >= 0) obm__directory_unlock(w->lock);
    if (w->made) rmdir(w->dir); /* fails, as it should, once something is in it */
    for (size_t i = 0; i < w->n; i++) obm_free(w->pairs[i].module);
    obm_free(w->pairs);
    obm_free(w->dir);
    obm_free(w->weights);
    obm_free(w->config);
    obm_free(w->spool);
    obm_free(w);
}

/* ---- factors ---- */

static uint64_t bytes_of(const obm__adapter_writer *w, const factor_pair *p, bool b) {
    return (uint64_t)p->rank * (uint64_t)(b ? p->rows : p->cols) * obm_dtype_size(w->dtype);
}

obm_status obm__adapter_writer_add(obm__adapter_writer *w, const char *tensor, int64_t rank, int64_t rows, int64_t cols,
                                   const void *a, const void *b, obm_error *err) {
    if (w->n == w->capacity) {
        size_t capacity = w->capacity ? 2 * w->capacity : 64;
        factor_pair *pairs = obm__realloc(w->pairs, capacity, sizeof *pairs);
        if (!pairs) return obm__fail_nomem(err, capacity * sizeof *pairs);
        w->pairs = pairs;
        w->capacity = capacity;
    }
    factor_pair *p = &w->pairs[w->n];
    *p = (factor_pair){obm__strndup(tensor, strlen(tensor) - strlen(".weight")), rank, rows, cols};
    if (!p->module) return obm__fail_nomem(err, strlen(tensor));
    w->n++;
    OBM_TRY(obm__fd_write(w->fd, w->spool, a, bytes_of(w, p, false), err));
    return obm__fd_write(w->fd, w->spool, b, bytes_of(w, p, true), err);
}

static obm_status declare(const obm__adapter_writer *w, obm__st_writer *st, const factor_pair *p, bool b,
                          obm_error *err) {
    char *name = obm__format("base_model.model.%s.lora_%c.weight", p->module, b ? 'B' : 'A');
    if (!name) return obm__fail_nomem(err, strlen(p->module));
    int64_t shape[2] = {b ? p->rows : p->rank, b ? p->rank : p->cols};
    obm_status status = obm__st_writer_declare(st, name, w->dtype, 2, shape, err);
    obm_free(name);
    return status;
}

static obm_status write_weights(const obm__adapter_writer *w, const obm__map *spool, obm__st_writer *st,
                                obm_error *err) {
    uint64_t at = 0;
    OBM_TRY(obm__st_writer_metadata(st, "format", "pt", err));
    for (size_t i = 0; i < 2 * w->n; i++) OBM_TRY(declare(w, st, &w->pairs[i / 2], i % 2, err));
    OBM_TRY(obm__st_writer_begin(st, err));
    for (size_t i = 0; i < 2 * w->n; i++) {
        uint64_t bytes = bytes_of(w, &w->pairs[i / 2], i % 2);
        OBM_TRY(obm__st_writer_write(st, spool->data + at, bytes, err));
        obm__pages_release(spool->data + at, bytes);
        at += bytes;
    }
    return obm__st_writer_seal(st, NULL, err);
}

/* ---- the config ---- */

/* alpha = rank everywhere, so that the scaling is 1: the factors are the task vector as it is. */
static bool fill_patterns(const obm__adapter_writer *w, int64_t rank, obm_json *config) {
    obm_json *ranks = obm__json_new_object(), *alphas = obm__json_new_object(), *modules = obm__json_new_array();
    bool ok = ranks && alphas && modules;
    for (size_t i = 0; ok && i < w->n; i++) {
        const factor_pair *p = &w->pairs[i];
        ok = obm__json_append(modules, obm__json_new_string(p->module));
        if (!ok || p->rank == rank) continue;
        ok = obm__json_set(ranks, p->module, obm__json_new_int(p->rank)) &&
             obm__json_set(alphas, p->module, obm__json_new_int(p->rank));
    }
    ok = obm__json_set(config, "rank_pattern", ranks) && ok;
    ok = obm__json_set(config, "alpha_pattern", alphas) && ok;
    return obm__json_set(config, "target_modules", modules) && ok;
}

static char *config_text(const obm__adapter_writer *w, const char *base) {
    int64_t rank = 0;
    for (size_t i = 0; i < w->n; i++) rank = w->pairs[i].rank > rank ? w->pairs[i].rank : rank;
    obm_json *c = obm__json_new_object();
    bool ok = c && obm__json_set(c, "peft_type", obm__json_new_string("LORA")) &&
              obm__json_set(c, "task_type", obm__json_new_string("CAUSAL_LM")) &&
              obm__json_set(c, "base_model_name_or_path", obm__json_new_string(base)) &&
              obm__json_set(c, "r", obm__json_new_int(rank)) &&
              obm__json_set(c, "lora_alpha", obm__json_new_int(rank)) && fill_patterns(w, rank, c) &&
              obm__json_set(c, "lora_dropout", obm__json_new_real(0)) &&
              obm__json_set(c, "bias", obm__json_new_string("none")) &&
              obm__json_set(c, "fan_in_fan_out", obm__json_new_bool(false)) &&
              obm__json_set(c, "use_rslora", obm__json_new_bool(false)) &&
              obm__json_set(c, "init_lora_weights", obm__json_new_bool(true)) &&
              obm__json_set(c, "inference_mode", obm__json_new_bool(true));
    char *text = ok ? obm__json_text(c, 2) : NULL;
    obm__json_free(c);
    return text;
}

/* Between the two renames there is no config, hence no adapter: old factors never run under new ranks.  The config
 * waits under its temporary name, by which the next run knows what a killed one left. */
static obm_status publish(const obm__adapter_writer *w, obm__st_writer *st, const char *base, obm_error *err) {
    char *text = config_text(w, base);
    if (!text)
        return obm__json_can_hold(base) ? obm__fail_nomem(err, 0)
                                        : obm__fail(err, OBM_E_ARG, "%s: the name of the base is not UTF-8", w->config);
    char *staged = NULL;
    obm_status status = obm__file_stage(w->config, text, strlen(text), &staged, err);
    obm_free(text);
    OBM_TRY(status);
    if (unlink(w->config) && errno != ENOENT) status = obm__fail_errno(err, "cannot replace %s", w->config);
    if (status == OBM_OK) status = obm__st_writer_publish(st, NULL, err);
    if (status == OBM_OK) status = obm__file_publish(staged, w->config, err);
    if (status != OBM_OK) unlink(staged);
    obm_free(staged);
    return status;
}

obm_status obm__adapter_writer_finish(obm__adapter_writer *w, const char *base, obm_error *err) {
    obm__map spool = {0};
    obm__st_writer *st = NULL;
    obm_status status;
    int fd = w->fd;
    w->fd = -1;
    /* The sync is for its error: what the disk did not take must not be read back from the mapping as if it had. */
    OBM_GO(obm__fd_seal(fd, w->spool, err));
    OBM_GO(obm__map_open(w->spool, &spool, err));
    OBM_GO(obm__st_writer_new(w->weights, &st, err));
    OBM_GO(write_weights(w, &spool, st, err));
    OBM_GO(publish(w, st, base, err));
    w->made = false;
done:
    obm__st_writer_free(st);
    obm__map_close(&spool);
    return status;
}
