/* The inputs of a merge: opened once each, whether the recipe says a path, a name of the hub, or MODEL+ADAPTER, and
 * assigned to the slices that take layers of them. */
#include "../model/config_compare.h"
#include "job.h"

#include <stdio.h>
#include <string.h>

/* ---- opening ---- */

static bool is_local(const char *path) { return obm__source_is_local(path) || obm__member_split(NULL, path); }

/* org/name, or org/name:task. */
static bool is_hub_name(const char *name) {
    char pack[256];
    const char *colon = strrchr(name, ':');
    size_t n = colon ? (size_t)(colon - name) : strlen(name);
    if (n >= sizeof pack) return false;
    memcpy(pack, name, n);
    pack[n] = 0;
    return obm__source_is_name(pack);
}

/* In the recipe's folder, or a name of the hub.  Owned. */
static char *place_of(const obm__job *j, const char *name) {
    char *path = j->directory && name[0] != '/' ? obm__path_join(j->directory, name) : obm__strdup(name);
    bool by_name = path && is_hub_name(name) && !is_local(path) && !is_local(name);
    if (!by_name || !j->ctx->resolve) return path;
    obm_free(path);
    return obm__strdup(name);
}

static bool is_here(const obm__job *j, const char *ref) {
    char *path = place_of(j, ref);
    bool here = path && is_local(path);
    obm_free(path);
    return here;
}

/* A local folder has no revisions: what stands behind its @ is dropped, as mergekit does. */
static void drop_revision(const obm__job *j, char *name) {
    char *at = strrchr(name, '@');
    if (!at || at == name || is_here(j, name)) return;
    *at = 0;
    bool here = is_here(j, name);
    if (here) obm__warn(j->ctx, "%s is a local folder: the revision %s is ignored", name, at + 1);
    if (!here) *at = '@';
}

/* The output of an earlier document of the recipe comes before files and hub names. */
static const obm__stage *find_part(const obm__job *j, const char *name) {
    for (size_t i = 0; i < j->n_parts; i++)
        if (j->parts[i].name && !strcmp(j->parts[i].name, name)) return &j->parts[i];
    return NULL;
}

static obm_status open_path(const obm__job *j, const char *ref, size_t n, obm_checkpoint **out, obm_error *err) {
    char *name = obm__strndup(ref, n);
    if (!name) return obm__fail_nomem(err, n);
    const obm__stage *part = find_part(j, name);
    if (part && !part->done) {
        *out = part->planned;
        obm_free(name);
        return OBM_OK;
    }
    if (!part) drop_revision(j, name);
    char *path = part ? obm__strdup(part->path) : place_of(j, name);
    obm_status status = path ? obm_checkpoint_open(j->ctx, path, out, err) : obm__fail_nomem(err, n);
    obm_free(name);
    obm_free(path);
    return status;
}

/* mergekit's MODEL+ADAPTER; a path that holds a + of its own is there as it stands. */
static obm_status open_sum(const obm__job *j, const char *ref, const char *plus, obm__input *in, obm_error *err) {
    if (strchr(plus + 1, '+') || plus == ref || !plus[1])
        return obm__fail(err, OBM_E_ARG, "recipe: \"%.300s\": expected MODEL or MODEL+ADAPTER", ref);
    OBM_TRY(open_path(j, ref, (size_t)(plus - ref), &in->model, err));
    OBM_TRY(open_path(j, plus + 1, strlen(plus + 1), &in->adapter, err));
    if (obm__checkpoint_is_change(in->adapter)) return OBM_OK;
    return obm__fail(err, OBM_E_ARG,
                     "recipe: \"%.300s\": expected a PEFT LoRA folder behind the + (adapter_config.json beside "
                     "adapter_model.safetensors), but %.200s has no adapter_config.json",
                     ref, in->adapter->directory);
}

/* A model by itself, which others can be put on. */
static bool is_plain(const obm__job *j, const char *base) {
    char *path = place_of(j, base);
    bool plain = path && !obm__member_split(j->ctx, path) && (!strchr(base, '+') || is_here(j, base));
    obm_free(path);
    return plain;
}

/* A change by itself stands for the recipe's base with it; an expert of a pack knows its base, too. */
static obm_status add_base_below(const obm__job *j, const char *ref, obm__input *in, obm_error *err) {
    const char *base = j->recipe->base;
    bool found = base && !obm__recipe_same_ref(base, ref) && is_plain(j, base);
    if (!found && !in->model->member)
        return obm__fail(err, OBM_E_ARG, "recipe: %.300s is a LoRA adapter: write MODEL+%.300s", ref, ref);
    in->adapter = in->model;
    in->model = NULL;
    return found ? open_path(j, base, strlen(base), &in->model, err) : obm__member_base(in->adapter, &in->model, err);
}

/* Whether a base is the pack's shows in its contents, which an output does not have yet while all is planned. */
static obm_status check_below(const obm__job *j, const obm__input *in, obm_error *err) {
    bool planned = false;
    for (size_t i = 0; i < j->n_parts; i++) planned |= j->parts[i].planned == in->model;
    if (!planned || !in->adapter || !in->adapter->member) return OBM_OK;
    return obm__fail(err, OBM_E_UNSUPPORTED,
                     "recipe: %.300s goes with the base of its pack, not with the output of another document", in->ref);
}

/* What names of tensors have room for; sums over slices stay far from overflow. */
#define MAX_LAYERS 99999999

/* Layers of the model as its config counts them, else (or beyond all reason) its tensors. */
static int64_t count_layers(const obm_checkpoint *c) {
    int64_t n = 0;
    if (obm__json_int(obm__json_get(obm__checkpoint_text_config(c), "num_hidden_layers"), &n) && n > 0 &&
        n <= MAX_LAYERS)
        return n;
    n = 0;
    for (size_t i = 0; i < c->count; i++) {
        int64_t layer = obm__layer_of(c->tensors[i]->name);
        if (layer >= n) n = layer + 1;
    }
    return n;
}

static obm_status open_input(obm__job *j, const char *ref, obm_error *err) {
    obm__input *in = &j->inputs[j->n_inputs++];
    const char *plus = is_here(j, ref) ? NULL : strchr(ref, '+');
    in->ref = ref;
    OBM_TRY(plus ? open_sum(j, ref, plus, in, err) : open_path(j, ref, strlen(ref), &in->model, err));
    if (!in->adapter && obm__checkpoint_is_change(in->model)) OBM_TRY(add_base_below(j, ref, in, err));
    OBM_TRY(obm__checkpoint_is_model(in->model, "the model below another", err));
    OBM_TRY(check_below(j, in, err));
    in->layers = count_layers(in->model);
    return in->adapter ? obm_task_vector_new(in->model, in->adapter, &in->v, err) : OBM_OK;
}

/* The same reference is the same input, however many slices take layers of it. */
static obm_status find_input(obm__job *j, const char *ref, size_t *out, obm_error *err) {
    for (size_t i = 0; i < j->n_inputs; i++) {
        if (!obm__recipe_same_ref(j->inputs[i].ref, ref)) continue;
        *out = i;
        return OBM_OK;
    }
    *out = j->n_inputs;
    return open_input(j, ref, err);
}

/* ---- slices ---- */

static obm_status add_source(obm__job *j, obm__slice_plan *p, const obm__source *s, obm_error *err) {
    size_t i = p->n;
    char where[96];
    OBM_TRY(find_input(j, s->ref, &p->inputs[i], err));
    const obm__input *in = &j->inputs[p->inputs[i]];
    p->sources[i] = s;
    p->refs[i] = s->ref;
    p->n++;
    if (s->end <= in->layers) return OBM_OK;
    return obm__fail(err, OBM_E_ARG,
                     "%slayer_range: %.200s has layers [0, %lld), expected a part of it, found [%lld, %lld)",
                     obm__recipe_where(j->recipe, p->slice, s, where, sizeof where), s->ref, (long long)in->layers,
                     (long long)s->first, (long long)s->end);
}

static obm_status open_slice(obm__job *j, obm__slice_plan *p, obm_error *err) {
    const obm__slice *s = p->slice;
    size_t n = s->n_models + 1;
    p->sources = obm__calloc(n, sizeof *p->sources);
    p->inputs = obm__calloc(n, sizeof *p->inputs);
    p->refs = obm__calloc(n, sizeof *p->refs);
    if (!p->sources || !p->inputs || !p->refs)
        return obm__fail_nomem(err, n * (sizeof *p->sources + sizeof *p->inputs + sizeof *p->refs));
    p->has_base = s->base.ref != NULL;
    if (p->has_base) OBM_TRY(add_source(j, p, &s->base, err));
    for (size_t i = 0; i < s->n_models; i++) {
        OBM_TRY(add_source(j, p, &s->models[i], err));
        if (!p->has_base && p->inputs[i] == j->donor) p->reference = i;
    }
    if (p->n > j->widest) j->widest = p->n;
    return OBM_OK;
}

static obm_status open_slices(obm__job *j, obm_error *err) {
    const obm__recipe *r = j->recipe;
    size_t n = 1;
    for (size_t i = 0; i < r->n_slices; i++) n += r->slices[i].n_models + 1;
    j->inputs = obm__calloc(n, sizeof *j->inputs);
    j->slices = obm__calloc(r->n_slices, sizeof *j->slices);
    if (!j->inputs || !j->slices) return obm__fail_nomem(err, n * sizeof *j->inputs + r->n_slices * sizeof *j->slices);
    if (r->base) OBM_TRY(open_input(j, r->base, err));
    for (size_t i = 0; i < r->n_slices; i++) {
        j->slices[i].slice = &r->slices[i];
        j->slices[i].first = j->n_layers;
        OBM_TRY(open_slice(j, &j->slices[i], err));
        if (r->sliced) j->n_layers += r->slices[i].layers;
    }
    if (!r->sliced) j->n_layers = j->inputs[j->donor].layers;
    return OBM_OK;
}

/* ---- their small files ---- */

obm__texts obm__input_texts(const obm__input *in) {
    const obm_pack *pack = in->v ? in->v->pack : NULL;
    return (obm__texts){in->model->directory, pack ? &pack->experts[0].text : NULL};
}

bool obm__texts_find(const obm__texts *t, const char *name, char **path) {
    const obm__pack_text *own = t->own;
    *path = NULL;
    for (size_t i = 0; own && own->tokenizer && obm__text_derived(i); i++)
        if (!strcmp(obm__text_derived(i), name)) return true;
    for (int f = 0; own && f < OBM_TEXT_FILES; f++) {
        if (strcmp(obm__text_file_name((obm__text_file)f), name) || !obm__text_is_own(own, (obm__text_file)f)) continue;
        return !own->paths[f] || (*path = obm__strdup(own->paths[f]));
    }
    return (*path = obm__path_join(t->directory, name)) != NULL;
}

/* Of a model that is none of the inputs. */
static obm_status find_elsewhere(const obm__job *j, const char *ref, char *name, char **directory, obm_error *err) {
    const obm__stage *part = find_part(j, name);
    if (!part) drop_revision(j, name);
    char *path = part ? obm__strdup(part->path) : place_of(j, name);
    if (!path) return obm__fail_nomem(err, strlen(ref));
    obm_status status = obm__member_split(j->ctx, path)
                            ? obm__fail(err, OBM_E_ARG, "recipe: tokenizer: %.200s is not among the models", ref)
                            : obm__source_find(j->ctx, path, directory, err);
    obm_free(path);
    return status;
}

obm_status obm__job_find_texts(const obm__job *j, const char *ref, obm__texts *out, char **directory,
                               const obm_checkpoint **model, obm_error *err) {
    *model = NULL;
    *out = (obm__texts){0};
    for (size_t i = 0; i < j->n_inputs; i++) {
        if (!obm__recipe_same_ref(j->inputs[i].ref, ref)) continue;
        *model = j->inputs[i].model;
        *out = obm__input_texts(&j->inputs[i]);
    }
    char *name = obm__strndup(ref, is_here(j, ref) ? strlen(ref) : strcspn(ref, "+"));
    if (!name) return obm__fail_nomem(err, strlen(ref));
    const obm__stage *part = find_part(j, name);
    if (part && !part->done) *model = part->planned;
    obm_status status = OBM_OK;
    if (!*model)
        status = find_elsewhere(j, ref, name, directory, err);
    else if (!(*directory = obm__strdup((*model)->directory)))
        status = obm__fail_nomem(err, strlen(ref));
    obm_free(name);
    if (status == OBM_OK) out->directory = *directory;
    return status;
}

/* ---- what must agree ---- */

static obm_status check_architectures(const obm__job *j, obm_error *err) {
    const obm__input *donor = &j->inputs[j->donor];
    if (!donor->model->config && obm__is_directory(donor->model->path))
        obm__warn(j->ctx, "%s has no config.json, nor will the result: it is tensors, not a model that can be run",
                  donor->ref);
    if (!j->recipe->sliced) obm__checkpoint_warn_layers(donor->model, "they are merged, but no model runs them");
    for (size_t i = 0; i < j->n_inputs; i++) {
        if (j->inputs[i].model != donor->model)
            OBM_TRY(obm__configs_same_architecture(donor->model, j->inputs[i].model, err));
        if (j->recipe->sliced && j->inputs[i].model->layout != donor->model->layout)
            return obm__fail(
                err, OBM_E_UNSUPPORTED,
                "%.200s has %s, %.200s has %s: slices of models that name their tensors differently are not "
                "supported",
                donor->ref, obm__layout_embedding(donor->model->layout), j->inputs[i].ref,
                obm__layout_embedding(j->inputs[i].model->layout));
    }
    return OBM_OK;
}

obm_status obm__job_compare_configs(const obm__job *j, obm_error *err) {
    const obm_checkpoint *donor = j->inputs[j->donor].model;
    for (size_t i = 0; i < j->n_inputs; i++)
        if (j->inputs[i].model != donor)
            OBM_TRY(obm__configs_compare(donor, j->inputs[i].model, !j->recipe->sliced, err));
    return OBM_OK;
}

obm_status obm__job_open(obm__job *j, obm_error *err) {
    OBM_TRY(open_slices(j, err));
    OBM_TRY(check_architectures(j, err));
    return j->recipe->tokenizer.set ? obm__vocabulary_new(j, &j->vocabulary, err) : OBM_OK;
}

/* ---- tensors of an input ---- */

static bool is_a_change(const obm__pair *p) { return p->lora || p->planes || p->masked || p->extra; }

static bool is_changed(const obm__pair *p) { return p && (is_a_change(p) || p->expert.data != p->base.data); }

static const obm__pair *pair_of(const obm__input *in, const char *name) {
    return obm__task_vector_find(in->v, name, NULL);
}

/* An adapter on the embedding or head of a tied model unties the two (delta/adapter.c). */
bool obm__input_has_head(const obm__input *in) {
    if (!in->v) return !in->model->tied && obm__checkpoint_find(in->model, OBM_HEAD_NAME);
    const obm__pair *head = pair_of(in, OBM_HEAD_NAME);
    return head && (!in->model->tied || is_changed(head) || is_changed(pair_of(in, OBM_EMBEDDING_NAME)));
}

int64_t obm__input_own_rows(const obm__input *in) {
    const obm__pair *p = in->v ? pair_of(in, OBM_EMBEDDING_NAME) : NULL;
    return p && p->extra_rows ? p->expert.shape[0] : 0;
}

/* A tied input's head is its embedding, whatever else its files hold. */
static const char *stands_for(const obm__input *in, const char *name) {
    bool tied = obm__is_head(name) && !obm__input_has_head(in);
    return tied && obm__checkpoint_find(in->model, OBM_EMBEDDING_NAME) ? OBM_EMBEDDING_NAME : name;
}

bool obm__input_find(const obm__input *in, const char *name, obm_tensor *t, const obm__pair **change) {
    name = stands_for(in, name);
    const obm__pair *p = in->v ? pair_of(in, name) : NULL;
    const obm__st_entry *e = in->v ? NULL : obm__checkpoint_find(in->model, name);
    if (p) *t = p->expert;
    if (p && is_a_change(p)) *change = p;
    if (e) *t = e->t;
    return p || e;
}
