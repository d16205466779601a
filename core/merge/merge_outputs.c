/* The output tensors of a merge: which there are and from which slice, under which names its sources hold them, and
 * their shapes, dtypes and settings.  Reads headers only. */
#include "job.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- names ---- */

static const obm__input *input_of(const obm__job *j, const obm__slice_plan *p, size_t i) {
    return &j->inputs[p->inputs[i]];
}

static const obm__input *reference_of(const obm__job *j, const obm__slice_plan *p) {
    return input_of(j, p, p->reference);
}

static const obm__slice_plan *last_slice(const obm__job *j) { return &j->slices[j->recipe->n_slices - 1]; }

/* The name with its layer's number replaced by `layer`; owned. */
static char *rename_layer(const char *name, int64_t layer) {
    size_t n;
    const char *digits = obm__layer_digits(name, &n);
    if (!digits) return obm__strdup(name);
    return obm__format("%.*s%lld%s", (int)(digits - name), name, (long long)layer, digits + n);
}

/* What input i calls a tensor that the output calls `name`; owned. */
static char *source_name(const obm__slice_plan *p, size_t i, const char *name, int64_t layer) {
    return layer < 0 || p->slice->layers < 0 ? obm__strdup(name) : rename_layer(name, p->sources[i]->first + layer);
}

static bool is_written(const obm__job *j, const char *name) {
    return !obm__is_derived_buffer(name) && (!obm__is_head(name) || j->writes_head);
}

/* Whether the output has, from this slice, a tensor that its input i has; *layer within the slice.  What lies in front
 * of the layers is the first slice's, what lies behind them the last one's. */
static bool is_taken(const obm__job *j, const obm__slice_plan *p, size_t i, const obm__st_entry *e, int64_t *layer) {
    const obm__source *s = p->sources[i];
    *layer = obm__layer_of(e->name);
    if (!is_written(j, e->name)) return false;
    if (!j->recipe->sliced) return true;
    bool in_layers = *layer >= s->first && *layer < s->end;
    bool in_front = obm_class_of(e->name, e->t.ndim) == OBM_CLASS_EMBEDDING;
    if (*layer < 0) return p == (in_front ? j->slices : last_slice(j));
    *layer -= s->first;
    return in_layers;
}

static obm_status fail_missing(const obm__job *j, const obm__slice_plan *p, size_t i, const char *name,
                               const char *owner, size_t other, obm_error *err) {
    char where[96];
    return obm__fail(err, OBM_E_NOTFOUND, "%stensor %.200s of %.200s is not in %.200s",
                     obm__recipe_where(j->recipe, p->slice, p->sources[i], where, sizeof where), name, owner,
                     j->inputs[other].ref);
}

static obm_status check_extra_names(const obm__job *j, const obm__slice_plan *p, size_t i, obm_error *err) {
    const obm_checkpoint *model = input_of(j, p, i)->model, *reference = reference_of(j, p)->model;
    int64_t layer;
    for (size_t t = 0; t < model->count; t++) {
        const char *name = model->tensors[t]->name;
        if (!is_taken(j, p, i, model->tensors[t], &layer) || obm__is_head(name)) continue;
        char *theirs = source_name(p, p->reference, name, layer);
        if (!theirs) return obm__fail_nomem(err, strlen(name));
        bool found = obm__checkpoint_find(reference, theirs) != NULL;
        obm_free(theirs);
        if (!found) return fail_missing(j, p, i, name, p->refs[i], p->inputs[p->reference], err);
    }
    return OBM_OK;
}

static obm_status add_output(obm__job *j, const obm__slice_plan *p, const char *name, int64_t layer, obm_error *err) {
    bool numbered = j->recipe->sliced && layer >= 0;
    char *own = numbered ? rename_layer(name, p->first + layer) : obm__strdup(name);
    if (!own) return obm__fail_nomem(err, strlen(name));
    j->outputs[j->n_outputs++] = (obm__output){.name = own, .slice = p, .layer = layer};
    return OBM_OK;
}

/* The tensors of the slice's reference, and the head where another input has one of its own. */
static obm_status list_slice(obm__job *j, const obm__slice_plan *p, obm_error *err) {
    const obm_checkpoint *reference = reference_of(j, p)->model;
    bool head = false;
    int64_t layer;
    for (size_t i = 0; i < p->n; i++) OBM_TRY(check_extra_names(j, p, i, err));
    for (size_t t = 0; t < reference->count; t++) {
        if (!is_taken(j, p, p->reference, reference->tensors[t], &layer)) continue;
        OBM_TRY(add_output(j, p, reference->tensors[t]->name, layer, err));
        head |= obm__is_head(reference->tensors[t]->name);
    }
    const char *name = obm__layout_head(reference->layout);
    return p == last_slice(j) && j->writes_head && !head ? add_output(j, p, name, -1, err) : OBM_OK;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const obm__output *)a)->name, ((const obm__output *)b)->name);
}

static obm_status list_outputs(obm__job *j, obm_error *err) {
    const obm__slice_plan *last = last_slice(j);
    for (size_t i = 0; i < last->n; i++) j->writes_head |= obm__input_has_head(input_of(j, last, i));
    size_t room = 0;
    for (size_t s = 0; s < j->recipe->n_slices; s++) room += reference_of(j, &j->slices[s])->model->count + 1;
    j->outputs = obm__calloc(room, sizeof *j->outputs);
    j->tensors = obm__calloc(room * j->widest, sizeof *j->tensors);
    j->changes = obm__calloc(room * j->widest, sizeof *j->changes);
    if (!j->outputs || !j->tensors || !j->changes)
        return obm__fail_nomem(err, room * (sizeof *j->outputs + j->widest * sizeof *j->tensors));
    for (size_t s = 0; s < j->recipe->n_slices; s++) OBM_TRY(list_slice(j, &j->slices[s], err));
    if (j->n_outputs) qsort(j->outputs, j->n_outputs, sizeof *j->outputs, by_name);
    if (j->n_outputs == 0)
        return obm__fail(err, OBM_E_NOTFOUND, "%.200s has no tensors to merge", j->inputs[j->donor].ref);
    return OBM_OK;
}

/* ---- shapes and dtypes ---- */

/* A row per token; as many as the result's vocabulary has, where the recipe builds one. */
static bool has_token_rows(const obm__job *j, const obm__output *o) {
    return j->vocabulary && (obm__same_place(o->name, OBM_EMBEDDING_NAME) || obm__is_head(o->name));
}

static bool same_shape(const obm__job *j, const obm__output *o, const obm_tensor *a, const obm_tensor *b) {
    int32_t from = has_token_rows(j, o) && a->ndim > 0;
    if (a->ndim != b->ndim) return false;
    return !memcmp(a->shape + from, b->shape + from, (size_t)(a->ndim - from) * sizeof *a->shape);
}

static obm_status fail_shape(const obm__job *j, const obm__output *o, size_t i, const obm_tensor *expected,
                             const char *owner, obm_error *err) {
    const obm__slice_plan *p = o->slice;
    obm_class cls = obm_class_of(o->name, expected->ndim);
    bool tokens = !j->vocabulary && (cls == OBM_CLASS_EMBEDDING || cls == OBM_CLASS_HEAD);
    bool width = expected->ndim == 2 && o->tensors[i].ndim == 2 && expected->shape[1] != o->tensors[i].shape[1];
    const char *hint = !tokens ? ""
                       : width ? ": models of another size, not fine-tunes of one base"
                               : ": the vocabularies must be the same, or tokenizer_source says which to take";
    char first[128], other[128], where[96];
    char *name = source_name(p, i, o->name, o->layer);
    obm__shape_text(expected, first, sizeof first);
    obm__shape_text(&o->tensors[i], other, sizeof other);
    obm__fail(err, OBM_E_SHAPE, "%s%.200s: shape %s in %.150s, %s in %.150s%s",
              obm__recipe_where(j->recipe, p->slice, p->sources[i], where, sizeof where), name ? name : o->name, first,
              owner, other, p->refs[i], hint);
    obm_free(name);
    return OBM_E_SHAPE;
}

static obm_status find_tensor(const obm__job *j, obm__output *o, size_t i, obm_error *err) {
    const obm__slice_plan *p = o->slice;
    char where[96], *name = source_name(p, i, o->name, o->layer);
    if (!name) return obm__fail_nomem(err, strlen(o->name));
    obm_status status = OBM_OK;
    if (!obm__input_find(input_of(j, p, i), name, &o->tensors[i], &o->changes[i]))
        status =
            obm__fail(err, OBM_E_NOTFOUND, "%stensor %.200s is not in %.200s",
                      obm__recipe_where(j->recipe, p->slice, p->sources[i], where, sizeof where), name, p->refs[i]);
    obm_free(name);
    return status;
}

static obm_status match_tensors(const obm__job *j, obm__output *o, obm_error *err) {
    const obm__slice_plan *p = o->slice;
    for (size_t i = 0; i < p->n; i++) OBM_TRY(find_tensor(j, o, i, err));
    const obm_tensor *first = &o->tensors[p->reference];
    for (size_t i = 0; i < p->n; i++) {
        const obm_tensor *t = &o->tensors[i];
        if (!same_shape(j, o, t, first)) return fail_shape(j, o, i, first, p->refs[p->reference], err);
        if (t->dtype != first->dtype && !(obm__is_float(first->dtype) && obm__is_float(t->dtype)))
            return obm__fail(err, OBM_E_DTYPE, "%.200s: %s in %.150s, %s in %.150s", o->name,
                             obm_dtype_name(first->dtype), p->refs[p->reference], obm_dtype_name(t->dtype), p->refs[i]);
    }
    o->copy = !obm__is_float(first->dtype);
    return OBM_OK;
}

/* ---- slices of several models ---- */

char *obm__output_source_name(const obm__output *o, size_t i) { return source_name(o->slice, i, o->name, o->layer); }

/* The donor's tensor that stands for one of a slice: of the same layer, or of its first where it has not as many. */
static bool donor_tensor(const obm__job *j, const char *name, int64_t layer, obm_tensor *out) {
    const obm__pair *change = NULL;
    if (obm__input_find(&j->inputs[j->donor], name, out, &change)) return true;
    char *first = layer >= 0 ? rename_layer(name, 0) : NULL;
    bool found = first && obm__input_find(&j->inputs[j->donor], first, out, &change);
    obm_free(first);
    return found;
}

/* A layer of another model works only if it has the shapes that the donor's config says. */
static obm_status check_fit(const obm__job *j, const obm__output *o, obm_error *err) {
    const obm__slice_plan *p = o->slice;
    obm_tensor t;
    if (!j->recipe->sliced || p->inputs[p->reference] == j->donor || obm__is_head(o->name)) return OBM_OK;
    char *name = source_name(p, p->reference, o->name, o->layer);
    if (!name) return obm__fail_nomem(err, strlen(o->name));
    obm_status status = OBM_OK;
    if (!donor_tensor(j, name, o->layer, &t))
        status = fail_missing(j, p, p->reference, name, p->refs[p->reference], j->donor, err);
    else if (!same_shape(j, o, &t, &o->tensors[p->reference]))
        status = fail_shape(j, o, p->reference, &t, j->inputs[j->donor].ref, err);
    obm_free(name);
    return status;
}

/* And if it lacks nothing that the donor's layers have. */
static obm_status check_complete(const obm__job *j, const obm__slice_plan *p, obm_error *err) {
    const obm_checkpoint *donor = j->inputs[j->donor].model, *own = reference_of(j, p)->model;
    if (!j->recipe->sliced || own == donor) return OBM_OK;
    for (size_t t = 0; t < donor->count; t++) {
        const char *name = donor->tensors[t]->name;
        if (obm__layer_of(name) != 0 || obm__is_derived_buffer(name)) continue;
        char *theirs = source_name(p, p->reference, name, 0);
        if (!theirs) return obm__fail_nomem(err, strlen(name));
        bool found = obm__checkpoint_find(own, theirs) != NULL;
        obm_free(theirs);
        if (!found)
            return fail_missing(j, p, p->reference, name, j->inputs[j->donor].ref, p->inputs[p->reference], err);
    }
    return OBM_OK;
}

/* ---- settings ---- */

static obm_dtype written_dtype(const obm__recipe *r, const obm_tensor *reference) {
    if (r->has_out_dtype) return r->out_dtype;
    if (r->has_dtype) return r->dtype;
    return reference->dtype == OBM_F64 ? OBM_F32 : reference->dtype;
}

/* Gradients run over the layers of a slice; what is in no layer takes their first value. */
static double depth_of(const obm__job *j, const obm__output *o) {
    if (!j->recipe->sliced) return obm__recipe_depth(o->name, j->n_layers);
    if (o->layer < 0) return 0;
    int64_t layers = o->slice->slice->layers;
    return layers > 1 ? (double)o->layer / (double)(layers - 1) : 1;
}

/* Filters of a model look at the name that the tensor has there. */
static obm_status resolve_names(const obm__output *o, char **names, obm_error *err) {
    const obm__slice_plan *p = o->slice;
    for (size_t i = p->has_base; i < p->n; i++) {
        names[i - p->has_base] = source_name(p, i, o->name, o->layer);
        if (!names[i - p->has_base]) return obm__fail_nomem(err, strlen(o->name));
    }
    return OBM_OK;
}

static obm_status resolve_steps(const obm__job *j, obm__output *o, obm_error *err) {
    const obm__recipe *r = j->recipe;
    const obm__slice *s = o->slice->slice;
    size_t room = obm__recipe_params_capacity(r);
    obm_param *params = obm__alloc(room, sizeof *params);
    char **names = obm__calloc(s->n_models + 1, sizeof *names);
    obm_status status = params && names ? resolve_names(o, names, err) : obm__fail_nomem(err, room * sizeof *params);
    if (status == OBM_OK) {
        size_t n = obm__recipe_params(r, s, o->name, (const char *const *)names, depth_of(j, o), params);
        obm_error why;
        status = obm__steps_new(r->method, r->profile, s->n_models, o->slice->refs + o->slice->has_base, params, n,
                                j->seed, &o->steps, &why);
        if (status != OBM_OK) obm__fail(err, status, "%.200s: %.500s", o->name, why.message);
    }
    for (size_t i = 0; names && i < s->n_models; i++) obm_free(names[i]);
    obm_free(names);
    obm_free(params);
    return status;
}

/* A sum with an adapter or with planes has the precision of f32, whatever the tensor below it has. */
static obm_dtype working_dtype(const obm__job *j, const obm__output *o) {
    const obm__recipe *r = j->recipe;
    const obm__slice_plan *p = o->slice;
    if (r->has_dtype) return r->dtype == OBM_F64 ? OBM_F32 : r->dtype;
    for (size_t i = 0; i < p->n; i++)
        if (o->changes[i]) return OBM_F32;
    return obm__group_common_dtype(p->has_base ? &o->tensors[0] : NULL, o->tensors + p->has_base, p->slice->n_models);
}

static obm_status plan_output(obm__job *j, obm__output *o, obm_error *err) {
    const obm__slice_plan *p = o->slice;
    OBM_TRY(match_tensors(j, o, err));
    OBM_TRY(check_fit(j, o, err));
    const obm_tensor *base = p->has_base ? &o->tensors[0] : NULL, *models = o->tensors + p->has_base;
    o->dtype = o->copy ? o->tensors[p->reference].dtype : written_dtype(j->recipe, &o->tensors[p->reference]);
    if (o->copy) return OBM_OK;
    if (has_token_rows(j, o) && o->tensors[0].ndim > 0)
        OBM_TRY(obm__vocabulary_rows(j, j->vocabulary, o, &o->rows, err));
    OBM_TRY(resolve_steps(j, o, err));
    o->group = (obm__group){.name = o->name,
                            .base = base,
                            .models = models,
                            .base_change = p->has_base ? o->changes[0] : NULL,
                            .changes = o->changes + p->has_base,
                            .rows = o->rows,
                            .base_label = p->refs[0],
                            .work = working_dtype(j, o),
                            .count = (uint64_t)obm_tensor_count(&o->tensors[0]),
                            .mapped = true,
                            .steps = &o->steps};
    return OBM_OK;
}

static bool has_density(const obm__steps *s) { return s->mask == OBM_MASK_MAGNITUDE || s->mask == OBM_MASK_OUTLIERS; }

/* What selects over the whole model is one number. */
static obm_status check_scope_values(const obm__output *o, const obm__output *first, obm_error *err) {
    static const char *const names[] = {"gamma", "select_topk", "select_weights_only", "variant", "ratio", "quantile"};
    for (size_t i = 0; o->steps.model_scope && i < OBM_COUNT(names); i++)
        for (size_t m = 0; m < o->steps.n; m++)
            if (obm__steps_value(&o->steps, names[i], m) != obm__steps_value(&first->steps, names[i], m))
                return obm__fail(err, OBM_E_ARG,
                                 "recipe: a selection over the whole model takes one %s, but it differs in %.150s and "
                                 "%.150s (scope: tensor allows it)",
                                 names[i], first->name, o->name);
    return OBM_OK;
}

static bool same_models(const obm__slice_plan *a, const obm__slice_plan *b) {
    return a == b || (a->n == b->n && !memcmp(a->inputs, b->inputs, a->n * sizeof *a->inputs));
}

/* Statistics of the whole model have one density per model, not one per tensor. */
static obm_status check_scopes(const obm__job *j, obm_error *err) {
    const obm__output *first = NULL;
    for (size_t i = 0; i < j->n_outputs; i++) {
        const obm__output *o = &j->outputs[i];
        if (o->copy) continue;
        if (!first) first = o;
        if (o->steps.model_scope != first->steps.model_scope)
            return obm__fail(err, OBM_E_ARG,
                             "recipe: scope must be the same for all tensors, it differs in %.150s and %.150s",
                             first->name, o->name);
        if (o->steps.model_scope && !same_models(o->slice, first->slice))
            return obm__fail(err, OBM_E_ARG,
                             "recipe: statistics over the whole model take the same models in every slice, but "
                             "%.150s and %.150s have others (scope: tensor allows it)",
                             first->name, o->name);
        OBM_TRY(check_scope_values(o, first, err));
        for (size_t m = 0; o->steps.model_scope && has_density(&o->steps) && m < o->steps.n; m++)
            if (o->steps.density[m] != first->steps.density[m])
                return obm__fail(err, OBM_E_ARG,
                                 "recipe: a trim over the whole model takes one density per model, but %.150s has %g "
                                 "and %.150s %g (scope: tensor allows it)",
                                 first->name, first->steps.density[m], o->name, o->steps.density[m]);
    }
    return OBM_OK;
}

bool obm__job_whole_model(const obm__job *j) {
    for (size_t i = 0; i < j->n_outputs; i++)
        if (!j->outputs[i].copy) return j->outputs[i].steps.model_scope;
    return false;
}

obm_status obm__job_outputs(obm__job *j, obm_error *err) {
    OBM_TRY(list_outputs(j, err));
    for (size_t s = 0; s < j->recipe->n_slices; s++) OBM_TRY(check_complete(j, &j->slices[s], err));
    for (size_t i = 0; i < j->n_outputs; i++) {
        j->outputs[i].tensors = j->tensors + i * j->widest;
        j->outputs[i].changes = j->changes + i * j->widest;
        OBM_TRY(plan_output(j, &j->outputs[i], err));
    }
    return check_scopes(j, err);
}

/* Frees a checkpoint unless it is a part's. */
static void close_checkpoint(const obm__job *j, obm_checkpoint *c) {
    for (size_t i = 0; i < j->n_parts; i++)
        if (c && j->parts[i].planned == c) return;
    obm_checkpoint_free(c);
}

void obm__job_clear(obm__job *j) {
    for (size_t i = 0; j->outputs && i < j->n_outputs; i++) {
        obm__group_clear(&j->outputs[i].group);
        obm__steps_free(&j->outputs[i].steps);
        obm__rows_free(j->outputs[i].rows);
        obm_free(j->outputs[i].name);
    }
    for (size_t i = 0; j->slices && i < j->recipe->n_slices; i++) {
        obm_free(j->slices[i].sources);
        obm_free(j->slices[i].inputs);
        obm_free(j->slices[i].refs);
    }
    for (size_t i = 0; i < j->n_inputs; i++) {
        obm_task_vector_free(j->inputs[i].v);
        close_checkpoint(j, j->inputs[i].adapter);
        close_checkpoint(j, j->inputs[i].model);
    }
    obm__vocabulary_free(j->vocabulary, j->n_inputs);
    obm_free(j->outputs);
    obm_free(j->tensors);
    obm_free(j->changes);
    obm_free(j->slices);
    obm_free(j->inputs);
    *j = (obm__job){0};
}
