/* Recipes of several documents, as mergekit-multi has them: who takes whose output, in which order they run, and where
 * the outputs go.
 *
 * The document without a name is the result, and those with names are parts, which lie in a folder beside the result
 * while the merge runs.  Where all have names, all are results, in folders of their names. */
#include "job.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define WHERE OBM_RECIPE_WHERE
#define PARTS_SUFFIX ".onebitmerge-parts"

/* ---- references ---- */

/* Length of the model's name in MODEL[+ADAPTER]; documents have no revisions. */
static size_t name_length(const char *ref) { return strcspn(ref, "+"); }

static size_t find_name(obm__recipe *const *recipes, size_t n, const char *ref) {
    for (size_t i = 0; i < n; i++) {
        const char *name = recipes[i]->name;
        if (name && strlen(name) == name_length(ref) && !strncmp(name, ref, strlen(name))) return i;
    }
    return n;
}

typedef struct order {
    obm__recipe **from; /* (n), as written */
    size_t n, *sorted, n_sorted;
    char *state; /* (n): 0 not seen, 1 being visited, 2 done */
} order;

static obm_status visit(order *o, size_t i, obm_error *err);

static obm_status visit_ref(order *o, size_t i, const char *ref, obm_error *err) {
    size_t other = ref ? find_name(o->from, o->n, ref) : o->n;
    if (other == o->n) return OBM_OK;
    if (o->state[other] == 1)
        return obm__fail(err, OBM_E_ARG, WHERE ": document \"%.64s\" needs \"%.64s\", which needs it too",
                         o->from[i]->name ? o->from[i]->name : "", o->from[other]->name);
    return visit(o, other, err);
}

static obm_status visit(order *o, size_t i, obm_error *err) {
    const obm__recipe *r = o->from[i];
    if (o->state[i] == 2) return OBM_OK;
    o->state[i] = 1;
    OBM_TRY(visit_ref(o, i, r->base, err));
    OBM_TRY(visit_ref(o, i, r->tokenizer.model, err));
    for (size_t s = 0; s < r->n_slices; s++) {
        OBM_TRY(visit_ref(o, i, r->slices[s].base.ref, err));
        for (size_t m = 0; m < r->slices[s].n_models; m++) OBM_TRY(visit_ref(o, i, r->slices[s].models[m].ref, err));
    }
    o->state[i] = 2;
    o->sorted[o->n_sorted++] = i;
    return OBM_OK;
}

static obm_status sort_documents(obm__documents *d, obm_error *err) {
    order o = {.from = obm__alloc(d->n, sizeof *o.from),
               .n = d->n,
               .sorted = obm__calloc(d->n, sizeof *o.sorted),
               .state = obm__calloc(d->n, 1)};
    obm_status status = o.from && o.sorted && o.state ? OBM_OK : obm__fail_nomem(err, d->n * sizeof *o.from);
    if (status == OBM_OK) memcpy(o.from, d->recipes, d->n * sizeof *o.from);
    for (size_t i = 0; status == OBM_OK && i < d->n; i++) status = visit(&o, i, err);
    for (size_t i = 0; status == OBM_OK && i < d->n; i++) d->recipes[i] = o.from[o.sorted[i]];
    obm_free(o.from);
    obm_free(o.sorted);
    obm_free(o.state);
    return status;
}

/* ---- reading ---- */

static bool is_folder_name(const char *s) {
    return strcmp(s, ".") && strcmp(s, "..") && !strpbrk(s, "/@+") && strlen(s) < 200;
}

static obm_status check_names(const obm__documents *d, obm_error *err) {
    size_t nameless = 0;
    for (size_t i = 0; i < d->n; i++) {
        const char *name = d->recipes[i]->name;
        if (!name && nameless++) return obm__fail(err, OBM_E_ARG, WHERE ": more than one document without a \"name\"");
        if (!name) continue;
        if (!is_folder_name(name))
            return obm__fail(err, OBM_E_ARG, WHERE ": name: expected the name of a folder, found \"%.64s\"", name);
        if (find_name(d->recipes, i, name) < i)
            return obm__fail(err, OBM_E_ARG, WHERE ": two documents have the name \"%.64s\"", name);
    }
    return OBM_OK;
}

static obm_status read_documents(const obm_context *ctx, const char *text, const obm_json *list, obm_profile profile,
                                 const obm__recipe_methods *methods, obm__documents *d, obm_error *err) {
    size_t n = obm__json_size(list);
    d->recipes = obm__calloc(n, sizeof *d->recipes);
    d->parts = obm__calloc(n, sizeof *d->parts);
    if (!d->recipes || !d->parts) return obm__fail_nomem(err, n * (sizeof *d->recipes + sizeof *d->parts));
    for (; d->n < n; d->n++) {
        obm_json *root = obm__json_copy(obm__json_at(list, d->n));
        if (!root) return obm__fail_nomem(err, strlen(text));
        OBM_TRY(obm__recipe_read(ctx, text, root, profile, methods, &d->recipes[d->n], err));
    }
    return OBM_OK;
}

static obm_status place_parts(obm__documents *d, const char *out_path, obm_error *err) {
    bool result = false;
    size_t length = strlen(out_path);
    while (length > 1 && out_path[length - 1] == '/') length--;
    for (size_t i = 0; i < d->n; i++) result |= !d->recipes[i]->name;
    if (d->n > 1 && result) {
        d->folder = obm__format("%.*s" PARTS_SUFFIX, (int)length, out_path);
        if (!d->folder) return obm__fail_nomem(err, length);
    }
    for (size_t i = 0; i < d->n; i++) {
        const char *name = d->n > 1 ? d->recipes[i]->name : NULL;
        d->parts[i].name = name;
        d->parts[i].path = name ? obm__path_join(d->folder ? d->folder : out_path, name) : obm__strdup(out_path);
        if (!d->parts[i].path) return obm__fail_nomem(err, length);
    }
    return OBM_OK;
}

obm_status obm__documents_read(const obm_context *ctx, const char *text, obm_profile profile,
                               const obm__recipe_methods *methods, const char *out_path, obm__documents *out,
                               obm_error *err) {
    obm__documents d = {0};
    obm_json *list;
    OBM_TRY(obm__yaml_parse_all(text, strlen(text), WHERE, &list, err));
    obm_status status = read_documents(ctx, text, list, profile, methods, &d, err);
    obm__json_free(list);
    if (status == OBM_OK && d.n > 1) status = check_names(&d, err);
    if (status == OBM_OK && d.n > 1) status = sort_documents(&d, err);
    if (status == OBM_OK) status = place_parts(&d, out_path ? out_path : "", err);
    if (status == OBM_OK) {
        *out = d;
    } else {
        obm__documents_free(&d);
    }
    return status;
}

/* ---- parts ---- */

static obm_status copy_headers(const obm__job *j, obm__safetensors *s, obm_checkpoint *c, obm_error *err) {
    s->entries = obm__calloc(j->n_outputs, sizeof *s->entries);
    c->tensors = obm__calloc(j->n_outputs, sizeof *c->tensors);
    if (!s->entries || !c->tensors) return obm__fail_nomem(err, j->n_outputs * sizeof *s->entries);
    for (size_t i = 0; i < j->n_outputs; i++) {
        const obm__output *o = &j->outputs[i];
        obm__st_entry *e = &s->entries[s->count++];
        e->name = obm__strdup(o->name);
        if (!e->name) return obm__fail_nomem(err, strlen(o->name));
        e->t = o->tensors[0];
        e->t.dtype = o->dtype;
        e->t.data = NULL;
        c->tensors[c->count++] = e;
    }
    return OBM_OK;
}

/* The tokenizer of a planned output, for documents that build theirs from it. */
static obm_status plan_tokenizer(const obm__job *j, obm__stage *part, obm_error *err) {
    const obm_checkpoint *donor = j->inputs[j->donor].model;
    const char *text = j->vocabulary ? obm__vocabulary_tokenizer(j->vocabulary) : NULL;
    for (size_t i = 0; !text && i < j->n_parts; i++)
        if (j->parts[i].planned == donor) text = j->parts[i].tokenizer;
    if (text) {
        part->tokenizer = obm__strdup(text);
        return part->tokenizer ? OBM_OK : obm__fail_nomem(err, strlen(text));
    }
    obm__texts texts = obm__input_texts(&j->inputs[j->donor]);
    char *path;
    if (!obm__texts_find(&texts, "tokenizer.json", &path)) return obm__fail_nomem(err, strlen(donor->directory));
    obm_status status = path && obm__file_exists(path) ? obm__file_read(path, &part->tokenizer, NULL, err) : OBM_OK;
    obm_free(path);
    return status;
}

obm_status obm__documents_plan_part(const obm__job *j, const obm_json *config, obm__stage *part, obm_error *err) {
    obm_checkpoint *c = obm__calloc(1, sizeof *c);
    if (!c) return obm__fail_nomem(err, sizeof *c);
    c->ctx = j->ctx;
    c->path = obm__strdup(part->path);
    c->directory = obm__strdup(part->path);
    c->config = config ? obm__json_copy(config) : NULL;
    c->tied = !j->writes_head;
    c->layout = j->inputs[j->donor].model->layout;
    c->files = obm__calloc(1, sizeof *c->files);
    if (c->files) c->files[0] = obm__calloc(1, sizeof *c->files[0]);
    c->n_files = c->files && c->files[0];
    if (c->n_files) c->files[0]->path = obm__strdup(part->path);
    obm_status status = c->path && c->directory && c->n_files && c->files[0]->path && (c->config || !config)
                            ? copy_headers(j, c->files[0], c, err)
                            : obm__fail_nomem(err, strlen(part->path));
    if (status == OBM_OK) status = plan_tokenizer(j, part, err);
    if (status == OBM_OK) {
        part->planned = c;
    } else {
        obm_checkpoint_free(c);
    }
    return status;
}

/* A folder that the merge made; what is not a plain file in it is not the merge's. */
static void remove_folder(const char *path) {
    DIR *dir = opendir(path);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        char *file = obm__path_join(path, e->d_name);
        if (file && strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) (void)unlink(file);
        obm_free(file);
    }
    if (dir) closedir(dir);
    (void)rmdir(path);
}

/* Only what this run has written: the others may be another run's, at work or to be resumed. */
void obm__documents_remove_parts(const obm__documents *d) {
    if (!d->folder) return;
    for (size_t i = 0; i < d->n; i++)
        if (d->parts[i].name && d->parts[i].done) remove_folder(d->parts[i].path);
    (void)rmdir(d->folder);
}

void obm__documents_free(obm__documents *d) {
    for (size_t i = 0; d->recipes && i < d->n; i++) obm__recipe_free(d->recipes[i]);
    for (size_t i = 0; d->parts && i < d->n; i++) {
        obm_checkpoint_free(d->parts[i].planned);
        obm_free(d->parts[i].path);
        obm_free(d->parts[i].tokenizer);
    }
    obm_free(d->recipes);
    obm_free(d->parts);
    obm_free(d->folder);
}
