/* Checkpoints: which files of a folder hold the weights, and their tensors as one sorted list.  Headers only are read;
 * tensors stay in the mappings.  Says nothing about architectures, nor what the tensors of an adapter mean. */
#include "io.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define ONE_FILE "model.safetensors"
#define INDEX_FILE "model.safetensors.index.json"

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}

/* ---- lists of tensors ---- */

static int by_name(const void *a, const void *b) {
    return strcmp((*(const obm__st_entry *const *)a)->name, (*(const obm__st_entry *const *)b)->name);
}

static const char *name_of(const void *entry) { return (*(const obm__st_entry *const *)entry)->name; }

size_t obm__checkpoint_index(const obm_checkpoint *c, const char *name) {
    const obm__st_entry *const *found =
        obm__find_named(name, c->layout, c->tensors, c->count, sizeof *c->tensors, name_of);
    return found ? (size_t)(found - c->tensors) : SIZE_MAX;
}

const obm__st_entry *obm__checkpoint_find(const obm_checkpoint *c, const char *name) {
    size_t i = obm__checkpoint_index(c, name);
    return i == SIZE_MAX ? NULL : c->tensors[i];
}

static obm_status reserve_tensors(obm_checkpoint *c, size_t n, obm_error *err) {
    c->tensors = obm__calloc(n, sizeof *c->tensors);
    return c->tensors ? OBM_OK : obm__fail_nomem(err, n * sizeof *c->tensors);
}

/* The file a tensor of the list lies in. */
static const obm__safetensors *file_of(const obm_checkpoint *c, const obm__st_entry *e) {
    size_t i = 0;
    while (i + 1 < c->n_files && !(e >= c->files[i]->entries && e < c->files[i]->entries + c->files[i]->count)) i++;
    return c->files[i];
}

/* Without an index every tensor of every file counts, and no two files may hold the same one. */
static obm_status list_all(obm_checkpoint *c, obm_error *err) {
    size_t n = 0;
    for (size_t i = 0; i < c->n_files; i++) n += c->files[i]->count;
    OBM_TRY(reserve_tensors(c, n, err));
    for (size_t i = 0; i < c->n_files; i++) {
        for (size_t j = 0; j < c->files[i]->count; j++) c->tensors[c->count++] = &c->files[i]->entries[j];
    }
    if (n > 1) qsort(c->tensors, n, sizeof *c->tensors, by_name);
    for (size_t i = 1; i < n; i++) {
        if (!strcmp(c->tensors[i - 1]->name, c->tensors[i]->name))
            return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s is in two files (%s, %s) and there is no " INDEX_FILE,
                             c->path, c->tensors[i]->name, file_of(c, c->tensors[i - 1])->path,
                             file_of(c, c->tensors[i])->path);
    }
    return OBM_OK;
}

static obm_status add_file(obm_checkpoint *c, const char *path, obm_error *err) {
    obm__safetensors **files = obm__realloc(c->files, c->n_files + 1, sizeof *files);
    if (!files) return obm__fail_nomem(err, (c->n_files + 1) * sizeof *files);
    c->files = files;
    OBM_TRY(obm__safetensors_open(path, &files[c->n_files], err));
    c->n_files++;
    return OBM_OK;
}

static obm_status add_file_in_folder(obm_checkpoint *c, const char *name, obm_error *err) {
    char *path = obm__path_join(c->directory, name);
    if (!path) return obm__fail_nomem(err, strlen(name));
    obm_status status = add_file(c, path, err);
    obm_free(path);
    return status;
}

/* ---- folders with an index ---- */

/* The folder's own files only: an index from elsewhere must not reach into other folders. */
static bool safe_file_name(const char *name) { return name && *name && !strpbrk(name, "/\\") && !strstr(name, ".."); }

/* Files of an index are few (hundreds at most), so a linear search over them is enough. */
static obm_status indexed_file(obm_checkpoint *c, const char *name, obm__safetensors **out, obm_error *err) {
    for (size_t i = 0; i < c->n_files; i++) {
        const char *slash = strrchr(c->files[i]->path, '/');
        if (strcmp(slash ? slash + 1 : c->files[i]->path, name) != 0) continue;
        *out = c->files[i];
        return OBM_OK;
    }
    OBM_TRY(add_file_in_folder(c, name, err));
    *out = c->files[c->n_files - 1];
    return OBM_OK;
}

static obm_status list_entry(obm_checkpoint *c, const char *index, const char *name, const obm_json *v,
                             obm_error *err) {
    const char *file = obm__json_string(v);
    if (!safe_file_name(file))
        return obm__fail(err, OBM_E_FORMAT,
                         "%s: weight_map.%s: expected the name of a file in this folder, found %s%s%s", index, name,
                         file ? "\"" : "", file ? file : obm__json_kind_name(v), file ? "\"" : "");
    obm__safetensors *s;
    OBM_TRY(indexed_file(c, file, &s, err));
    const obm__st_entry *e = obm__safetensors_find(s, name);
    if (!e) return obm__fail(err, OBM_E_FORMAT, "%s: tensor %s is not in %s", index, name, s->path);
    c->tensors[c->count++] = e;
    return OBM_OK;
}

static obm_status list_indexed(obm_checkpoint *c, const char *index, const obm_json *root, obm_error *err) {
    const obm_json *map = obm__json_get(root, "weight_map");
    if (!map || obm__json_kind(map) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: weight_map: expected an object, found %s", index,
                         obm__json_kind_name(map));
    OBM_TRY(reserve_tensors(c, obm__json_size(map), err));
    for (void *it = obm__json_first(map); it; it = obm__json_next(map, it))
        OBM_TRY(list_entry(c, index, obm__json_key(it), obm__json_value(it), err));
    if (c->count > 1) qsort(c->tensors, c->count, sizeof *c->tensors, by_name);
    return OBM_OK;
}

static obm_status open_indexed(obm_checkpoint *c, const char *index, obm_error *err) {
    obm_json *root;
    OBM_TRY(obm__json_load(index, &root, err));
    obm_status status = list_indexed(c, index, root, err);
    obm__json_free(root);
    return status;
}

/* ---- folders without one ---- */

typedef struct {
    char **names;
    size_t count;
} name_list;

static int by_string(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

static void free_names(name_list *l) {
    for (size_t i = 0; i < l->count; i++) obm_free(l->names[i]);
    obm_free(l->names);
}

static obm_status add_name(name_list *l, const char *name, obm_error *err) {
    char **names = obm__realloc(l->names, l->count + 1, sizeof *names);
    if (names) l->names = names;
    if (!names || !(names[l->count] = obm__strdup(name))) return obm__fail_nomem(err, strlen(name));
    l->count++;
    return OBM_OK;
}

/* Sorted, because the order of a folder differs between file systems. */
static obm_status list_folder(const char *directory, name_list *out, obm_error *err) {
    DIR *dir = opendir(directory);
    if (!dir) return obm__fail_errno(err, "cannot read folder %s", directory);
    obm_status status = OBM_OK;
    for (struct dirent *e; status == OBM_OK && (e = readdir(dir));) status = add_name(out, e->d_name, err);
    closedir(dir);
    if (status == OBM_OK && out->count > 1) qsort(out->names, out->count, sizeof *out->names, by_string);
    return status;
}

static bool torch_file(const char *name) {
    return ends_with(name, ".bin") || ends_with(name, ".pth") || ends_with(name, ".pt") || ends_with(name, ".ckpt");
}

/* Opening a pickle runs code out of the file, so such files are named, never read. */
static obm_status refuse_torch(const char *path, const char *name, obm_error *err) {
    return obm__fail(err, OBM_E_UNSUPPORTED,
                     "%s: %s holds pickled torch weights, which are not read; convert them in Python: "
                     "from transformers import AutoModelForCausalLM; "
                     "AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT), or for one file: "
                     "import torch, safetensors.torch; safetensors.torch.save_file({k: v.contiguous().clone() for k, v "
                     "in torch.load(IN, weights_only=True).items()}, OUT)",
                     path, name);
}

static obm_status refuse_gguf(const char *path, const char *name, obm_error *err) {
    return obm__fail(err, OBM_E_UNSUPPORTED,
                     "%s: %s is a GGUF file, which is not read; convert it in Python: from transformers import "
                     "AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME)"
                     ".save_pretrained(OUT)",
                     path, name);
}

/* name-00001-of-00003.safetensors: one of several, so that a folder without their index is incomplete. */
static bool shard_name(const char *name) {
    size_t n = strlen(name), tail = strlen("-00001-of-00003.safetensors");
    if (n < tail || !ends_with(name, ".safetensors")) return false;
    const char *s = name + n - tail;
    return s[0] == '-' && strspn(s + 1, "0123456789") == 5 && !strncmp(s + 6, "-of-", 4) &&
           strspn(s + 10, "0123456789") == 5 && strncmp(s + 10, "00001", 5) != 0;
}

/* "config.json, shards/ and 3 more": what there is instead. */
static void describe_folder(const obm_checkpoint *c, const name_list *l, char *buf, size_t size) {
    size_t used = 0, shown = 0, more = 0;
    snprintf(buf, size, "an empty folder");
    for (size_t i = 0; i < l->count; i++) {
        char *path = l->names[i][0] == '.' ? NULL : obm__path_join(c->directory, l->names[i]);
        if (!path) continue;
        if (shown == 4 || strlen(l->names[i]) + used + 40 > size)
            more++;
        else
            used += (size_t)snprintf(buf + used, size - used, "%s%s%s", shown++ ? ", " : "", l->names[i],
                                     obm__is_directory(path) ? "/" : "");
        obm_free(path);
    }
    if (more) snprintf(buf + used, size - used, " and %zu more", more);
}

static obm_status open_listed(obm_checkpoint *c, const name_list *l, obm_error *err) {
    const char *torch = NULL, *gguf = NULL;
    for (size_t i = 0; i < l->count; i++) {
        const char *name = l->names[i];
        if (torch_file(name)) torch = name;
        if (ends_with(name, ".gguf")) gguf = name;
        if (!ends_with(name, ".safetensors")) continue;
        if (shard_name(name))
            return obm__fail(err, OBM_E_FORMAT, "%s: %s is one of several files, and " INDEX_FILE " is missing",
                             c->path, name);
        OBM_TRY(add_file_in_folder(c, name, err));
    }
    if (c->n_files > 0) return list_all(c, err);
    if (torch) return refuse_torch(c->path, torch, err);
    if (gguf) return refuse_gguf(c->path, gguf, err);
    char found[240];
    describe_folder(c, l, found, sizeof found);
    return obm__fail(err, OBM_E_FORMAT,
                     "%s: no weights here: expected " ONE_FILE ", " INDEX_FILE " or other .safetensors files, found %s",
                     c->path, found);
}

static obm_status open_unindexed(obm_checkpoint *c, obm_error *err) {
    name_list names = {0};
    obm_status status = list_folder(c->directory, &names, err);
    if (status == OBM_OK) status = open_listed(c, &names, err);
    free_names(&names);
    return status;
}

/* model.safetensors counts before the index, as in transformers; the writer's commits rely on that order. */
static obm_status open_weights(obm_checkpoint *c, obm_error *err) {
    char *one = obm__path_join(c->directory, ONE_FILE), *index = obm__path_join(c->directory, INDEX_FILE);
    obm_status status = OBM_OK;
    if (!one || !index) {
        status = obm__fail_nomem(err, strlen(c->directory));
    } else if (obm__file_exists(one)) {
        status = add_file(c, one, err);
        if (status == OBM_OK) status = list_all(c, err);
    } else if (obm__file_exists(index)) {
        status = open_indexed(c, index, err);
    } else {
        status = open_unindexed(c, err);
    }
    obm_free(one);
    obm_free(index);
    return status;
}

/* ---- adapters ---- */

static obm_status open_adapter(obm_checkpoint *c, obm_error *err) {
    char *path = obm__path_join(c->directory, OBM_ADAPTER_WEIGHTS),
         *torch = obm__path_join(c->directory, "adapter_model.bin");
    obm_status status;
    OBM_GO(path && torch ? OBM_OK : obm__fail_nomem(err, strlen(c->directory)));
    OBM_GO(obm__adapter_load(c->directory, &c->adapter, err));
    if (!obm__file_exists(path) && obm__file_exists(torch))
        OBM_GO(obm__fail(err, OBM_E_UNSUPPORTED,
                         "%s: adapter_model.bin holds pickled torch weights, which are not read; convert them in "
                         "Python: import torch, safetensors.torch; safetensors.torch.save_file(torch.load("
                         "\"adapter_model.bin\", weights_only=True), \"" OBM_ADAPTER_WEIGHTS "\")",
                         c->path));
    OBM_GO(add_file(c, path, err));
    OBM_GO(list_all(c, err));
    if (c->count == 0) status = obm__fail(err, OBM_E_FORMAT, "%s: an adapter without tensors", path);
done:
    obm_free(path);
    obm_free(torch);
    return status;
}

static obm_status open_folder(obm_checkpoint *c, obm_error *err) {
    bool adapter;
    OBM_TRY(obm__member_refuse(c->directory, err));
    if (!obm__adapter_here(c->directory, &adapter)) return obm__fail_nomem(err, strlen(c->directory));
    return adapter ? open_adapter(c, err) : open_weights(c, err);
}

obm_status obm__checkpoint_is_model(const obm_checkpoint *c, const char *what, obm_error *err) {
    if (!obm__checkpoint_is_change(c)) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "%s is %s: it can be an expert, not %s", c->path,
                     c->adapter ? "a LoRA adapter (adapter_config.json)" : "an expert of a pack", what);
}

/* ---- opening ---- */

static obm_status read_config(obm_checkpoint *c, obm_error *err) {
    char *path = obm__path_join(c->directory, "config.json");
    if (!path) return obm__fail_nomem(err, strlen(c->directory));
    obm_status status = OBM_OK;
    size_t size = 0;
    if (!obm__file_exists(path)) goto done;
    OBM_GO(obm__file_read(path, &c->config_text, &size, err));
    OBM_GO(obm__json_parse(c->config_text, size, path, &c->config, err));
    if (obm__json_kind(c->config) != OBM_JSON_OBJECT)
        status = obm__fail(err, OBM_E_FORMAT, "%s: expected an object, found %s", path, obm__json_kind_name(c->config));
done:
    obm_free(path);
    return status;
}

/* tie_word_embeddings is not asked, like in transformers 5: a head that is in the files counts, though config.json (or
 * the architecture by default) ties it.  Without one the embedding serves as head: there is nothing else. */
static bool detect_tied(const obm_checkpoint *c) {
    return obm__checkpoint_find(c, OBM_EMBEDDING_NAME) && !obm__checkpoint_find(c, OBM_HEAD_NAME);
}

/* The one that has the embedding. */
static int detect_layout(const obm_checkpoint *c) {
    for (int i = OBM_LAYOUTS - 1; i > 0; i--) {
        const char *name = obm__layout_embedding(i);
        const obm__st_entry *e = obm__checkpoint_find(c, name);
        if (e && !strcmp(e->name, name)) return i;
    }
    return 0;
}

/* ---- models with a text model inside ---- */

#define TEXT_CONFIG "text_config"

const obm_json *obm__checkpoint_text_config(const obm_checkpoint *c) {
    const obm_json *inner = obm__json_get(c->config, TEXT_CONFIG);
    return inner && obm__json_kind(inner) == OBM_JSON_OBJECT ? inner : c->config;
}

/* Behind "model.layers." in the file's own layout, -1 for any other name. */
static int64_t layer_of(const obm_checkpoint *c, const char *name) {
    const char *body = obm__layout_body(c->layout), layers[] = "layers.";
    size_t n = strlen(body), digits;
    if (strncmp(name, body, n) || strncmp(name + n, layers, strlen(layers))) return -1;
    name += n + strlen(layers);
    digits = strspn(name, "0123456789");
    return digits && digits < 10 && name[digits] == '.' ? strtol(name, NULL, 10) : -1;
}

void obm__checkpoint_warn_layers(const obm_checkpoint *c, const char *outcome) {
    const char *first = NULL;
    int64_t layers;
    size_t more = 0;
    if (!obm__json_int(obm__json_get(obm__checkpoint_text_config(c), "num_hidden_layers"), &layers)) return;
    if (layers < 1) return; /* which the model refuses */
    for (size_t i = 0; i < c->count; i++) {
        if (layer_of(c, c->tensors[i]->name) < layers) continue;
        more += first != NULL;
        if (!first) first = c->tensors[i]->name;
    }
    char others[48] = "lies";
    if (more) snprintf(others, sizeof others, "and %zu more lie", more);
    if (first)
        obm__warn(c->ctx, "%s: tensor %s %s beyond the %lld layers (num_hidden_layers) of config.json: %s", c->path,
                  first, others, (long long)layers, outcome);
}

void obm_checkpoint_check_layers(const obm_checkpoint *c) {
    obm__checkpoint_warn_layers(c, "they are listed, but no model runs them");
}

bool obm__text_config_set(obm_json *config, const char *key, obm_json *value) {
    const obm_json *inner = obm__json_get(config, TEXT_CONFIG);
    if (!inner || obm__json_kind(inner) != OBM_JSON_OBJECT) return obm__json_set(config, key, value);
    obm_json *copy = obm__json_copy(inner);
    bool ok = obm__json_set(copy, key, value);
    return obm__json_set(config, TEXT_CONFIG, copy) && ok;
}

bool obm__config_untie(obm_json *config) {
    static const char key[] = "tie_word_embeddings";
    return obm__json_set(config, key, obm__json_new_bool(false)) &&
           obm__text_config_set(config, key, obm__json_new_bool(false));
}

static obm_status open_file(obm_checkpoint *c, obm_error *err) {
    if (torch_file(c->path)) return refuse_torch(c->path, "the file", err);
    if (ends_with(c->path, ".gguf")) return refuse_gguf(c->path, "the file", err);
    OBM_TRY(add_file(c, c->path, err));
    return list_all(c, err);
}

static obm_status open_member(obm_checkpoint *c, const char *name, obm_error *err) {
    c->files = obm__calloc(1, sizeof *c->files);
    if (!c->files) return obm__fail_nomem(err, sizeof *c->files);
    OBM_TRY(obm__member_open(c->ctx, name, &c->member, &c->files[0], err));
    c->n_files = 1;
    c->path = obm__strdup(name);
    c->directory = obm__strdup(c->member->pack);
    return c->path && c->directory ? list_all(c, err) : obm__fail_nomem(err, strlen(name));
}

#ifdef __APPLE__
#define st_ctim st_ctimespec
#endif

/* Which index is there, zeros for none. */
static struct stat index_stamp(const char *directory) {
    struct stat st;
    char *path = obm__path_join(directory, INDEX_FILE);
    if (!path || stat(path, &st)) memset(&st, 0, sizeof st);
    obm_free(path);
    return st;
}

static bool same_stamp(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino && a->st_size == b->st_size &&
           a->st_ctim.tv_sec == b->st_ctim.tv_sec && a->st_ctim.tv_nsec == b->st_ctim.tv_nsec;
}

/* *replaced: the shards may be of two models, or of none. */
static obm_status open_model(obm_checkpoint *c, bool *replaced, obm_error *err) {
    struct stat before = index_stamp(c->directory);
    obm_status status = open_folder(c, err);
    if (status == OBM_OK) status = read_config(c, err);
    struct stat after = index_stamp(c->directory);
    *replaced = !same_stamp(&before, &after);
    return status;
}

static obm_status open_parts(obm_checkpoint *c, const char *name, bool *replaced, obm_error *err) {
    if (obm__member_split(c->ctx, name)) return open_member(c, name, err);
    OBM_TRY(obm__source_check(name, err));
    OBM_TRY(obm__source_find(c->ctx, name, &c->path, err));
    const char *path = c->path;
    bool folder = obm__is_directory(path);
    c->directory = folder ? obm__strdup(path) : obm__path_directory(path);
    if (!c->directory) return obm__fail_nomem(err, strlen(path));
    if (!folder) OBM_TRY(open_file(c, err));
    OBM_TRY(folder ? open_model(c, replaced, err) : read_config(c, err));
    c->layout = detect_layout(c);
    c->tied = detect_tied(c);
    return OBM_OK;
}

#define MOST_OPENS 16

/* A model that replaces another has the same names for its shards: where the index changed meanwhile, once more. */
obm_status obm_checkpoint_open(obm_context *ctx, const char *path, obm_checkpoint **out, obm_error *err) {
    for (int i = 1;; i++) {
        bool replaced = false;
        obm_checkpoint *c = obm__calloc(1, sizeof *c);
        if (!c) return obm__fail_nomem(err, sizeof *c);
        c->ctx = ctx;
        obm_status status = open_parts(c, path, &replaced, err);
        if (status == OBM_OK && !replaced) {
            *out = c;
            return OBM_OK;
        }
        obm_checkpoint_free(c);
        if (!replaced) return status;
        if (i == MOST_OPENS)
            return obm__fail(err, OBM_E_IO, "%s: its index was replaced %d times while the model was opened", path, i);
    }
}

void obm_checkpoint_free(obm_checkpoint *c) {
    if (!c) return;
    for (size_t i = 0; i < c->n_files; i++) obm__safetensors_free(c->files[i]);
    obm_free(c->files);
    obm_free(c->tensors);
    obm__json_free(c->config);
    obm__adapter_free(c->adapter);
    obm__member_free(c->member);
    obm_free(c->config_text);
    obm_free(c->directory);
    obm_free(c->path);
    obm_free(c);
}

/* ---- access ---- */

obm_status obm__checkpoint_check(const obm_checkpoint *c, obm_error *err) {
    for (size_t i = 0; i < c->n_files; i++) OBM_TRY(obm__map_check(&c->files[i]->map, c->files[i]->path, err));
    return OBM_OK;
}

void obm__checkpoint_release_pages(const obm_checkpoint *c) {
    for (size_t i = 0; i < c->n_files; i++) obm__pages_release(c->files[i]->map.data, c->files[i]->map.size);
}

const char *obm_checkpoint_path(const obm_checkpoint *c) { return c->path; }
const char *obm_checkpoint_config(const obm_checkpoint *c) { return c->config_text; }
bool obm_checkpoint_is_tied(const obm_checkpoint *c) { return c->tied; }
bool obm_checkpoint_is_adapter(const obm_checkpoint *c) { return c->adapter != NULL; }
size_t obm_checkpoint_count(const obm_checkpoint *c) { return c->count; }

void obm_checkpoint_at(const obm_checkpoint *c, size_t i, const char **name, obm_tensor *t) {
    if (name) *name = c->tensors[i]->name;
    if (t) *t = c->tensors[i]->t;
}

obm_status obm_checkpoint_get(const obm_checkpoint *c, const char *name, obm_tensor *t, obm_error *err) {
    const obm__st_entry *e = obm__checkpoint_find(c, name);
    if (!e) return obm__fail(err, OBM_E_NOTFOUND, "%s: no tensor %s", c->path, name);
    const obm__safetensors *file = file_of(c, e);
    OBM_TRY(obm__map_check(&file->map, file->path, err));
    *t = e->t;
    return OBM_OK;
}

obm_status obm_checkpoint_sha256(const obm_checkpoint *c, const char *name, char out[65], obm_error *err) {
    obm_tensor t;
    OBM_TRY(obm_checkpoint_get(c, name, &t, err));
    obm__pulse pulse = obm__pulse_new(c->ctx, NULL, NULL, "sha256", 1);
    return obm__sha256_of(t.data, (size_t)obm_tensor_count(&t) * obm_dtype_size(t.dtype), &pulse, out, err);
}
