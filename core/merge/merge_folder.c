/* obm_merge: a recipe to a Hugging Face folder.  Plans first (names, shapes, settings, sizes; headers only), then
 * streams tensor by tensor, in tiles, through the model writer. */
#include "recipe.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_MEMORY ((uint64_t)2000000000)
/* A dry run's guess: bytes per second of a plain disk, and nanoseconds per element and model of one pass of one core.
 */
#define BYTES_PER_SECOND 1e9
#define PASS_NANOSECONDS 2.0

typedef struct output {
    const char *name;
    obm_dtype dtype;            /* written */
    bool copy;                  /* not a float tensor: carried over if all inputs agree */
    obm_tensor *tensors;        /* (n_inputs), views */
    const obm__lowrank **loras; /* (n_inputs): what an adapter adds, NULL without */
    obm__steps steps;
    obm__group group;
} output;

/* A model, and the adapter on it where the recipe has one. */
typedef struct input {
    obm_checkpoint *model, *adapter;
    obm_task_vector *v; /* of the adapter */
} input;

typedef struct job {
    obm_context *ctx;
    const obm__recipe *recipe;
    const char *directory;
    uint64_t memory, seed;
    input *inputs;              /* the base first where the method has one, then the models */
    const char **refs;          /* their names in the recipe, for messages */
    size_t n_inputs, reference; /* the input whose names, config and tokenizer count */
    bool has_base;
    bool writes_head; /* some input has a head of its own, so the result has one */
    int64_t n_layers;
    output *outputs;
    size_t n_outputs;
    obm_tensor *tensors;
    const obm__lowrank **loras;
    uint64_t tile; /* elements */
} job;

/* ---- inputs ---- */

/* In the recipe's folder, or a name of the hub.  Owned. */
static char *place_of(const job *j, const char *name) {
    char *path = j->directory && name[0] != '/' ? obm__path_join(j->directory, name) : obm__strdup(name);
    bool by_name = path && obm__source_is_name(name) && !obm__source_is_local(path) && !obm__source_is_local(name);
    if (!by_name || !j->ctx->resolve) return path;
    obm_free(path);
    return obm__strdup(name);
}

static obm_status open_path(const job *j, const char *ref, size_t n, obm_checkpoint **out, obm_error *err) {
    char *name = obm__strndup(ref, n), *path = name ? place_of(j, name) : NULL;
    obm_status status = path ? obm_checkpoint_open(j->ctx, path, out, err) : obm__fail_nomem(err, n);
    obm_free(name);
    obm_free(path);
    return status;
}

static bool is_here(const job *j, const char *ref) {
    char *path = place_of(j, ref);
    bool here = path && obm__source_is_local(path);
    obm_free(path);
    return here;
}

/* mergekit's MODEL+ADAPTER; a path that holds a + of its own is there as it stands. */
static obm_status open_sum(const job *j, const char *ref, const char *plus, input *in, obm_error *err) {
    if (strchr(plus + 1, '+') || plus == ref || !plus[1])
        return obm__fail(err, OBM_E_ARG, "recipe: \"%.300s\": expected MODEL or MODEL+ADAPTER", ref);
    OBM_TRY(open_path(j, ref, (size_t)(plus - ref), &in->model, err));
    OBM_TRY(open_path(j, plus + 1, strlen(plus + 1), &in->adapter, err));
    if (in->adapter->adapter) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "recipe: \"%.300s\": expected a LoRA adapter behind the +, found a model", ref);
}

/* An adapter by itself stands for the recipe's base with it. */
static obm_status add_base_below(const job *j, const char *ref, input *in, obm_error *err) {
    const char *base = j->recipe->base;
    if (!base || !strcmp(base, ref) || (strchr(base, '+') && !is_here(j, base)))
        return obm__fail(err, OBM_E_ARG, "recipe: %.300s is a LoRA adapter: write MODEL+%.300s", ref, ref);
    in->adapter = in->model;
    in->model = NULL;
    return open_path(j, base, strlen(base), &in->model, err);
}

static obm_status open_input(job *j, const char *ref, obm_error *err) {
    input *in = &j->inputs[j->n_inputs];
    const char *plus = is_here(j, ref) ? NULL : strchr(ref, '+');
    j->refs[j->n_inputs++] = ref;
    OBM_TRY(plus ? open_sum(j, ref, plus, in, err) : open_path(j, ref, strlen(ref), &in->model, err));
    if (!in->adapter && in->model->adapter) OBM_TRY(add_base_below(j, ref, in, err));
    OBM_TRY(obm__checkpoint_is_model(in->model, "the model below another", err));
    return in->adapter ? obm_task_vector_new(in->model, in->adapter, &in->v, err) : OBM_OK;
}

static obm_status open_inputs(job *j, obm_error *err) {
    const obm__recipe *r = j->recipe;
    size_t n = r->n_models + 1;
    j->inputs = obm__calloc(n, sizeof *j->inputs);
    j->refs = obm__calloc(n, sizeof *j->refs);
    if (!j->inputs || !j->refs) return obm__fail_nomem(err, n * (sizeof *j->inputs + sizeof *j->refs));
    j->has_base = r->base && obm__method_takes_base(r->method);
    if (j->has_base) OBM_TRY(open_input(j, r->base, err));
    for (size_t i = 0; i < r->n_models; i++) {
        if (!j->has_base && r->base && !strcmp(r->models[i].ref, r->base)) j->reference = j->n_inputs;
        OBM_TRY(open_input(j, r->models[i].ref, err));
    }
    return OBM_OK;
}

static const char *model_type(const obm_checkpoint *c) {
    return obm__json_string(obm__json_get(c->config, "model_type"));
}

static obm_status check_architectures(const job *j, obm_error *err) {
    const char *first = model_type(j->inputs[j->reference].model);
    for (size_t i = 0; i < j->n_inputs; i++) {
        const char *type = model_type(j->inputs[i].model);
        if (first && type && strcmp(first, type))
            return obm__fail(err, OBM_E_ARG,
                             "%.200s is a %.40s model, %.200s a %.40s: only models of one architecture merge",
                             j->refs[j->reference], first, j->refs[i], type);
    }
    return OBM_OK;
}

/* ---- names ---- */

static bool is_changed(const obm__pair *p) { return p && (p->lora || p->expert.data != p->base.data); }

static const obm__pair *pair_of(const input *in, const char *name) { return obm__task_vector_find(in->v, name, NULL); }

/* An adapter on the embedding or head of a tied model unties the two (delta/adapter.c). */
static bool has_own_head(const input *in) {
    if (!in->v) return !in->model->tied && obm__checkpoint_find(in->model, OBM_HEAD_NAME);
    const obm__pair *head = pair_of(in, OBM_HEAD_NAME);
    return head && (!in->model->tied || is_changed(head) || is_changed(pair_of(in, OBM_EMBEDDING_NAME)));
}

/* A tied input's head is its embedding, whatever else its files hold. */
static const char *stands_for(const input *in, const char *name) {
    bool tied = !strcmp(name, OBM_HEAD_NAME) && !has_own_head(in);
    return tied && obm__checkpoint_find(in->model, OBM_EMBEDDING_NAME) ? OBM_EMBEDDING_NAME : name;
}

static bool find_tensor(const input *in, const char *name, obm_tensor *t, const obm__lowrank **lora) {
    name = stands_for(in, name);
    const obm__pair *p = in->v ? pair_of(in, name) : NULL;
    const obm__st_entry *e = in->v ? NULL : obm__checkpoint_find(in->model, name);
    if (p) *t = p->lora ? p->base : p->expert;
    if (p) *lora = p->lora;
    if (e) *t = e->t;
    return p || e;
}

static bool is_written(const job *j, const char *name) {
    return !obm__is_derived_buffer(name) && (strcmp(name, OBM_HEAD_NAME) || j->writes_head);
}

static obm_status check_extra_names(const job *j, obm_error *err) {
    const obm_checkpoint *reference = j->inputs[j->reference].model;
    for (size_t i = 0; i < j->n_inputs; i++) {
        for (size_t t = 0; t < j->inputs[i].model->count; t++) {
            const char *name = j->inputs[i].model->tensors[t]->name;
            if (is_written(j, name) && strcmp(name, OBM_HEAD_NAME) && !obm__checkpoint_find(reference, name))
                return obm__fail(err, OBM_E_NOTFOUND, "tensor %.200s of %.200s is not in %.200s", name, j->refs[i],
                                 j->refs[j->reference]);
        }
    }
    return OBM_OK;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const output *)a)->name, ((const output *)b)->name);
}

/* The reference's tensors, and the head where another input has one of its own; in the order of their names. */
static obm_status list_outputs(job *j, obm_error *err) {
    const obm_checkpoint *reference = j->inputs[j->reference].model;
    for (size_t i = 0; i < j->n_inputs; i++) j->writes_head |= has_own_head(&j->inputs[i]);
    OBM_TRY(check_extra_names(j, err));
    size_t capacity = reference->count + 1;
    j->outputs = obm__calloc(capacity, sizeof *j->outputs);
    j->tensors = obm__calloc(capacity * j->n_inputs, sizeof *j->tensors);
    j->loras = obm__calloc(capacity * j->n_inputs, sizeof *j->loras);
    if (!j->outputs || !j->tensors || !j->loras)
        return obm__fail_nomem(err, capacity * (sizeof *j->outputs + j->n_inputs * sizeof *j->tensors));
    bool head = false;
    for (size_t t = 0; t < reference->count; t++) {
        const char *name = reference->tensors[t]->name;
        if (!is_written(j, name)) continue;
        j->outputs[j->n_outputs++].name = name;
        head |= !strcmp(name, OBM_HEAD_NAME);
    }
    if (j->writes_head && !head) j->outputs[j->n_outputs++].name = OBM_HEAD_NAME;
    if (j->n_outputs) qsort(j->outputs, j->n_outputs, sizeof *j->outputs, by_name);
    if (j->n_outputs == 0)
        return obm__fail(err, OBM_E_NOTFOUND, "%.200s has no tensors to merge", j->refs[j->reference]);
    return OBM_OK;
}

static int64_t count_layers(const job *j) {
    int64_t n = 0;
    if (obm__json_int(obm__json_get(j->inputs[j->reference].model->config, "num_hidden_layers"), &n) && n > 0) return n;
    for (size_t i = 0; i < j->n_outputs; i++) {
        int64_t layer = obm__layer_of(j->outputs[i].name);
        if (layer >= n) n = layer + 1;
    }
    return n;
}

/* ---- shapes and dtypes ---- */

static obm_status fail_shape(const job *j, const output *o, size_t i, obm_error *err) {
    const obm_tensor *a = &o->tensors[j->reference], *b = &o->tensors[i];
    obm_class cls = obm_class_of(o->name, a->ndim);
    const char *hint = cls == OBM_CLASS_EMBEDDING || cls == OBM_CLASS_HEAD ? ": the vocabularies must be the same" : "";
    char first[128], other[128];
    obm__shape_text(a, first, sizeof first);
    obm__shape_text(b, other, sizeof other);
    return obm__fail(err, OBM_E_SHAPE, "%.200s: shape %s in %.150s, %s in %.150s%s", o->name, first,
                     j->refs[j->reference], other, j->refs[i], hint);
}

static obm_status match_tensors(const job *j, output *o, obm_error *err) {
    for (size_t i = 0; i < j->n_inputs; i++) {
        if (!find_tensor(&j->inputs[i], o->name, &o->tensors[i], &o->loras[i]))
            return obm__fail(err, OBM_E_NOTFOUND, "tensor %.200s is not in %.200s", o->name, j->refs[i]);
    }
    const obm_tensor *first = &o->tensors[j->reference];
    for (size_t i = 0; i < j->n_inputs; i++) {
        const obm_tensor *t = &o->tensors[i];
        if (t->ndim != first->ndim || memcmp(t->shape, first->shape, (size_t)t->ndim * sizeof *t->shape))
            return fail_shape(j, o, i, err);
        if (t->dtype != first->dtype && !(obm__is_float(first->dtype) && obm__is_float(t->dtype)))
            return obm__fail(err, OBM_E_DTYPE, "%.200s: %s in %.150s, %s in %.150s", o->name,
                             obm_dtype_name(first->dtype), j->refs[j->reference], obm_dtype_name(t->dtype), j->refs[i]);
    }
    o->copy = !obm__is_float(first->dtype);
    return OBM_OK;
}

static obm_dtype written_dtype(const obm__recipe *r, const obm_tensor *reference) {
    if (r->has_out_dtype) return r->out_dtype;
    if (r->has_dtype) return r->dtype;
    return reference->dtype == OBM_F64 ? OBM_F32 : reference->dtype;
}

/* ---- settings ---- */

static obm_status resolve_steps(const job *j, output *o, obm_error *err) {
    const obm__recipe *r = j->recipe;
    obm_param *params = obm__alloc(obm__recipe_params_capacity(r), sizeof *params);
    if (!params) return obm__fail_nomem(err, obm__recipe_params_capacity(r) * sizeof *params);
    size_t n = obm__recipe_params(r, o->name, obm__recipe_depth(o->name, j->n_layers), params);
    obm_error why;
    obm_status status = obm__steps_new(r->method, r->profile, r->n_models, params, n, j->seed, &o->steps, &why);
    if (status != OBM_OK) obm__fail(err, status, "%.200s: %.500s", o->name, why.message);
    obm_free(params);
    return status;
}

/* A sum with an adapter has the precision of f32, whatever the tensor below it has. */
static obm_dtype working_dtype(const job *j, const output *o) {
    const obm__recipe *r = j->recipe;
    if (r->has_dtype) return r->dtype;
    for (size_t i = 0; i < j->n_inputs; i++)
        if (o->loras[i]) return OBM_F32;
    return obm__group_common_dtype(j->has_base ? &o->tensors[0] : NULL, o->tensors + j->has_base, r->n_models);
}

static obm_status plan_output(job *j, output *o, obm_error *err) {
    const obm__recipe *r = j->recipe;
    OBM_TRY(match_tensors(j, o, err));
    const obm_tensor *base = j->has_base ? &o->tensors[0] : NULL, *models = o->tensors + j->has_base;
    o->dtype = o->copy ? o->tensors[j->reference].dtype : written_dtype(r, &o->tensors[j->reference]);
    if (o->copy) return OBM_OK;
    OBM_TRY(resolve_steps(j, o, err));
    o->group = (obm__group){.name = o->name,
                            .base = base,
                            .models = models,
                            .base_lora = j->has_base ? o->loras[0] : NULL,
                            .loras = o->loras + j->has_base,
                            .base_label = j->refs[0],
                            .labels = j->refs + j->has_base,
                            .work = working_dtype(j, o),
                            .count = (uint64_t)obm_tensor_count(&o->tensors[0]),
                            .mapped = true,
                            .steps = &o->steps};
    return OBM_OK;
}

static bool has_density(const obm__steps *s) { return s->mask == OBM_MASK_MAGNITUDE || s->mask == OBM_MASK_OUTLIERS; }

/* What selects over the whole model is one number. */
static obm_status check_scope_values(const output *o, const output *first, obm_error *err) {
    static const char *const names[] = {"gamma", "select_topk", "select_weights_only"};
    for (size_t i = 0; o->steps.model_scope && i < OBM_COUNT(names); i++)
        for (size_t m = 0; m < o->steps.n; m++)
            if (obm__steps_value(&o->steps, names[i], m) != obm__steps_value(&first->steps, names[i], m))
                return obm__fail(err, OBM_E_ARG,
                                 "recipe: a selection over the whole model takes one %s, but it differs in %.150s and "
                                 "%.150s (scope: tensor allows it)",
                                 names[i], first->name, o->name);
    return OBM_OK;
}

/* Statistics of the whole model have one density per model, not one per tensor. */
static obm_status check_scopes(const job *j, obm_error *err) {
    const output *first = NULL;
    for (size_t i = 0; i < j->n_outputs; i++) {
        const output *o = &j->outputs[i];
        if (o->copy) continue;
        if (!first) first = o;
        if (o->steps.model_scope != first->steps.model_scope)
            return obm__fail(err, OBM_E_ARG,
                             "recipe: scope must be the same for all tensors, it differs in %.150s and %.150s",
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

/* ---- sizes ---- */

/* Everything but the output tile: scratch of the passes, histograms, per-block records of the largest tensor, and the
 * pages of the inputs that one span touches. */
static uint64_t fixed_memory(const job *j) {
    uint64_t threads = (uint64_t)j->ctx->threads, models = j->recipe->n_models, largest = 0, own = 0;
    for (size_t i = 0; i < j->n_outputs; i++) {
        const obm__group *g = &j->outputs[i].group;
        const obm__custom *custom = j->recipe->method->custom;
        if (j->outputs[i].copy) continue;
        uint64_t bytes = custom && custom->bytes ? custom->bytes(g) : 0;
        if (g->steps->mask == OBM_MASK_RANKED) bytes += obm__ranked_bytes(g, j->ctx->threads);
        if (bytes > own) own = bytes;
        if (g->count > largest) largest = g->count;
    }
    uint64_t blocks = largest / OBM_MERGE_BLOCK + 1, span = largest < OBM_MERGE_SPAN ? largest : OBM_MERGE_SPAN;
    return threads * (obm__group_scratch(models) + (65536 + 3 * OBM_MERGE_BLOCK) * 4) + 65536 * 8 +
           blocks * models * (j->recipe->method->mask == OBM_MASK_OUTLIERS ? 4 : 3) * 8 + own + span * j->n_inputs * 4;
}

static obm_status choose_tile(job *j, obm_error *err) {
    uint64_t fixed = fixed_memory(j), least = fixed + 4 * OBM_MERGE_BLOCK;
    if (j->memory < least)
        return obm__fail(err, OBM_E_ARG, "memory: this merge needs at least %llu bytes, found %llu",
                         (unsigned long long)least, (unsigned long long)j->memory);
    uint64_t elements = (j->memory - fixed) / 4 / OBM_MERGE_BLOCK * OBM_MERGE_BLOCK;
    j->tile = elements < OBM_MERGE_SPAN ? elements : OBM_MERGE_SPAN;
    return OBM_OK;
}

static bool whole_model(const job *j) {
    for (size_t i = 0; i < j->n_outputs; i++)
        if (!j->outputs[i].copy) return j->outputs[i].steps.model_scope;
    return false;
}

/* Passes over a tensor, as far as a guess of the time needs them. */
static double pass_count(const obm__steps *s) {
    double trims = s->mask == OBM_MASK_MAGNITUDE  ? 2
                   : s->mask == OBM_MASK_OUTLIERS ? 4
                   : s->mask == OBM_MASK_RANKED   ? 8
                                                  : 0;
    return 1 + trims + (s->rescale == OBM_RESCALE_L1) + (s->method->custom && s->method->custom->prepare);
}

static obm_plan sizes(const job *j) {
    obm_plan p = {.tensors = j->n_outputs, .peak_memory = fixed_memory(j) + 4 * j->tile};
    double passes = 0;
    for (size_t i = 0; i < j->n_outputs; i++) {
        const output *o = &j->outputs[i];
        for (size_t t = 0; t < j->n_inputs; t++) p.bytes_read += obm__tensor_bytes(&o->tensors[t]);
        p.bytes_written += (uint64_t)obm_tensor_count(&o->tensors[0]) * obm_dtype_size(o->dtype);
        if (!o->copy) passes += (double)o->group.count * (double)o->steps.n * pass_count(&o->steps);
    }
    if (whole_model(j)) p.bytes_read *= 3; /* the statistics read everything before the merge does */
    p.seconds = (double)(p.bytes_read + p.bytes_written) / BYTES_PER_SECOND +
                passes * PASS_NANOSECONDS * 1e-9 / j->ctx->threads;
    return p;
}

static obm_status plan_job(job *j, obm_error *err) {
    OBM_TRY(open_inputs(j, err));
    OBM_TRY(check_architectures(j, err));
    OBM_TRY(list_outputs(j, err));
    j->n_layers = count_layers(j);
    for (size_t i = 0; i < j->n_outputs; i++) {
        j->outputs[i].tensors = j->tensors + i * j->n_inputs;
        j->outputs[i].loras = j->loras + i * j->n_inputs;
        OBM_TRY(plan_output(j, &j->outputs[i], err));
    }
    OBM_TRY(check_scopes(j, err));
    return choose_tile(j, err);
}

/* ---- config and model card ---- */

static const char *config_dtype(obm_dtype dtype) {
    return dtype == OBM_F32 ? "float32" : dtype == OBM_F16 ? "float16" : dtype == OBM_BF16 ? "bfloat16" : NULL;
}

/* The dtype that all written float tensors share, NULL if they differ. */
static const char *common_config_dtype(const job *j) {
    const output *first = NULL;
    for (size_t i = 0; i < j->n_outputs; i++) {
        const output *o = &j->outputs[i];
        if (o->copy) continue;
        if (!first) first = o;
        if (o->dtype != first->dtype) return NULL;
    }
    return first ? config_dtype(first->dtype) : NULL;
}

/* The reference's config with what the merge changed; *out is owned, NULL without a config. */
static obm_status build_config(const job *j, obm_json **out, obm_error *err) {
    const obm_json *source = j->inputs[j->reference].model->config;
    *out = NULL;
    if (!source) return OBM_OK;
    obm_json *config = obm__json_copy(source);
    const char *dtype = common_config_dtype(j);
    bool fine = config != NULL, tied = false;
    /* transformers renamed torch_dtype to dtype; the file keeps the name it has. */
    if (fine && dtype && obm__json_get(config, "dtype"))
        fine = obm__json_set(config, "dtype", obm__json_new_string(dtype));
    if (fine && dtype && (obm__json_get(config, "torch_dtype") || !obm__json_get(config, "dtype")))
        fine = obm__json_set(config, "torch_dtype", obm__json_new_string(dtype));
    obm__json_bool(obm__json_get(config, "tie_word_embeddings"), &tied);
    /* transformers ties by default where the key is absent, so a written head needs an explicit false. */
    if (fine && j->writes_head && (tied || !obm__json_get(config, "tie_word_embeddings")))
        fine = obm__json_set(config, "tie_word_embeddings", obm__json_new_bool(false));
    if (fine) {
        *out = config;
        return OBM_OK;
    }
    obm__json_free(config);
    return obm__fail_nomem(err, 0);
}

/* A fence longer than any run of backquotes in the recipe. */
static void add_recipe(obm__buffer *b, const char *text) {
    size_t longest = 2, run = 0;
    for (const char *p = text; *p; p++) {
        run = *p == '`' ? run + 1 : 0;
        if (run > longest) longest = run;
    }
    for (size_t i = 0; i <= longest; i++) obm__buffer_add(b, "`", 1);
    obm__buffer_text(b, "yaml\n");
    obm__buffer_text(b, text);
    obm__buffer_text(b, text[0] && text[strlen(text) - 1] == '\n' ? "" : "\n");
    for (size_t i = 0; i <= longest; i++) obm__buffer_add(b, "`", 1);
    obm__buffer_text(b, "\n");
}

static char *build_card(const job *j) {
    const obm__recipe *r = j->recipe;
    obm__buffer b = {0};
    obm__buffer_text(&b, "---\nlibrary_name: transformers\ntags:\n- merge\n- onebitmerge\n---\n");
    obm__buffer_printf(&b, "# %s\n\n", r->name ? r->name : "Merged model");
    obm__buffer_printf(&b, "Merged with onebitmerge %s by %s (%s; %s), profile %s, random seed %llu.\n\n",
                       obm_version(), r->method->info.name, r->method->info.doc, r->method->info.source,
                       r->profile == OBM_PROFILE_PAPER ? "paper" : "mergekit", (unsigned long long)j->seed);
    for (size_t i = 0; i < j->n_inputs; i++)
        obm__buffer_printf(&b, "- %s%s\n", j->refs[i], i == 0 && j->has_base ? " (base)" : "");
    obm__buffer_text(&b, "\n");
    add_recipe(&b, r->text);
    if (!b.failed) return b.data;
    obm__buffer_free(&b);
    return NULL;
}

/* ---- the job, for resuming ---- */

static obm_status job_tick(void *user, uint64_t bytes, obm_error *err) {
    obm__run *run = user;
    run->done += bytes;
    if (run->done > run->total) run->done = run->total; /* files have headers, which `total` does not count */
    return obm__run_report(run, err);
}

static obm_status put_input(const job *j, obm__run *run, const obm_checkpoint *c, const char *what, size_t i,
                            obm_json *out, obm_error *err) {
    char print[33];
    OBM_TRY(obm__checkpoint_fingerprint(j->ctx, c, job_tick, run, print, err));
    char *key = obm__format("%s %zu %s", what, i, j->refs[i]);
    bool ok = key && obm__json_set(out, key, obm__json_new_string(print));
    obm_free(key);
    return ok ? OBM_OK : obm__fail_nomem(err, 0);
}

static obm_status put_inputs(const job *j, obm__run *run, obm_json *out, obm_error *err) {
    for (size_t i = 0; i < j->n_inputs; i++) {
        const input *in = &j->inputs[i];
        OBM_TRY(put_input(j, run, in->model, "input", i, out, err));
        if (in->adapter) OBM_TRY(put_input(j, run, in->adapter, "adapter", i, out, err));
    }
    return OBM_OK;
}

/* Keys are words of the message that says what differs.  ISAs agree within a bound only, so the kernels count; threads
 * and memory do not. */
static bool put_options(const job *j, const obm_merge_options *options, obm_json *out) {
    uint64_t shard_bytes = OBM_OPT(options, obm_merge_options, shard_bytes, 0);
    char *seed = obm__format("%llu", (unsigned long long)j->seed);
    char *bytes = obm__format("%llu", (unsigned long long)shard_bytes);
    bool ok = seed && bytes;
    ok = ok && obm__json_set(out, "library version", obm__json_new_string(obm_version()));
    ok = ok && obm__json_set(out, "kernels", obm__json_new_string(j->ctx->k->isa));
    ok = ok && obm__json_set(out, "profile",
                             obm__json_new_string(j->recipe->profile == OBM_PROFILE_PAPER ? "paper" : "mergekit"));
    ok = ok && obm__json_set(out, "random seed", obm__json_new_string(seed));
    ok = ok && obm__json_set(out, "shard size", obm__json_new_string(shard_bytes ? bytes : "default"));
    for (void *it = obm__json_first(j->recipe->root); ok && it; it = obm__json_next(j->recipe->root, it)) {
        char *key = obm__format("recipe %s", obm__json_key(it));
        ok = key && obm__json_set(out, key, obm__json_copy(obm__json_value(it)));
        obm_free(key);
    }
    obm_free(seed);
    obm_free(bytes);
    return ok;
}

/* What decides the bytes of the shards; *out is owned. */
static obm_status build_job(const job *j, const obm_merge_options *options, obm__run *run, obm_json **out,
                            obm_error *err) {
    obm_json *record = obm__json_new_object();
    obm_status status =
        record && put_options(j, options, record) ? put_inputs(j, run, record, err) : obm__fail_nomem(err, 0);
    if (status == OBM_OK)
        *out = record;
    else
        obm__json_free(record);
    return status;
}

/* ---- the merge ---- */

static obm_status write_copy(const job *j, const output *o, obm__model_writer *w, obm_error *err) {
    const obm_tensor *t = &o->tensors[j->reference];
    uint64_t bytes = obm__tensor_bytes(t);
    for (size_t i = 0; i < j->n_inputs; i++)
        if (bytes && memcmp(t->data, o->tensors[i].data, bytes))
            return obm__fail(err, OBM_E_DTYPE, "%.200s: %s tensors cannot be merged, and %.150s and %.150s differ",
                             o->name, obm_dtype_name(t->dtype), j->refs[j->reference], j->refs[i]);
    OBM_TRY(obm__model_writer_write(w, t->data, bytes, err));
    for (size_t i = 0; i < j->n_inputs; i++) obm__pages_release(o->tensors[i].data, bytes);
    return OBM_OK;
}

static obm_status write_merged(const job *j, output *o, obm__run *run, obm__model_writer *w, char *tile,
                               obm_error *err) {
    size_t size = obm_dtype_size(o->dtype);
    if (!o->group.cuts) OBM_TRY(obm__statistics(run, &o->group, 1, err));
    for (uint64_t at = 0; at < o->group.count; at += j->tile) {
        uint64_t n = o->group.count - at < j->tile ? o->group.count - at : j->tile;
        OBM_TRY(obm__group_run(run, &o->group, at, n, o->dtype, tile, err));
        OBM_TRY(obm__model_writer_write(w, tile, (size_t)n * size, err));
        run->done += n * size;
    }
    return obm__run_report(run, err);
}

/* Statistics over the concatenation of all tensors, in the order of their names. */
static obm_status model_statistics(job *j, const obm__run *run, obm_error *err) {
    obm__group *groups = obm__alloc(j->n_outputs, sizeof *groups);
    if (!groups) return obm__fail_nomem(err, j->n_outputs * sizeof *groups);
    size_t n = 0;
    for (size_t i = 0; i < j->n_outputs; i++)
        if (!j->outputs[i].copy) groups[n++] = j->outputs[i].group;
    obm_status status = obm__statistics(run, groups, n, err);
    n = 0;
    for (size_t i = 0; i < j->n_outputs; i++)
        if (!j->outputs[i].copy) j->outputs[i].group = groups[n++];
    obm_free(groups);
    return status;
}

static obm_status check_inputs(const job *j, obm_error *err) {
    for (size_t i = 0; i < j->n_inputs; i++) {
        const input *in = &j->inputs[i];
        OBM_TRY(in->v ? obm__task_vector_check(in->v, err) : obm__checkpoint_check(in->model, err));
    }
    return OBM_OK;
}

static obm_status write_outputs(job *j, obm__run *run, obm__model_writer *w, obm_error *err) {
    char *tile = obm__alloc(j->tile, sizeof(float));
    if (!tile) return obm__fail_nomem(err, j->tile * sizeof(float));
    obm_status status = check_inputs(j, err);
    bool any = false;
    for (size_t i = 0; i < j->n_outputs; i++) any |= !obm__model_writer_has(w, i);
    if (status == OBM_OK && any && whole_model(j)) status = model_statistics(j, run, err);
    for (size_t i = 0; status == OBM_OK && i < j->n_outputs; i++) {
        output *o = &j->outputs[i];
        if (!obm__model_writer_has(w, i)) status = check_inputs(j, err);
        if (status == OBM_OK && !obm__model_writer_has(w, i))
            status = o->copy ? write_copy(j, o, w, err) : write_merged(j, o, run, w, tile, err);
        if (!o->copy) obm__group_clear(&o->group);
    }
    obm_free(tile);
    return status;
}

static obm_status declare_outputs(const job *j, obm__model_writer *w, obm_error *err) {
    for (size_t i = 0; i < j->n_outputs; i++) {
        const output *o = &j->outputs[i];
        OBM_TRY(obm__model_writer_declare(w, o->name, o->dtype, o->tensors[0].ndim, o->tensors[0].shape, err));
    }
    return obm__model_writer_begin(w, err);
}

/* Replacing an input while it is read would be the end of it. */
static obm_status check_out_path(const job *j, const char *out_path, obm_error *err) {
    char out[PATH_MAX], in[PATH_MAX];
    if (!realpath(out_path, out)) return OBM_OK;
    for (size_t i = 0; i < 2 * j->n_inputs; i++) {
        const obm_checkpoint *c = i % 2 ? j->inputs[i / 2].adapter : j->inputs[i / 2].model;
        if (c && realpath(c->directory, in) && !strcmp(in, out))
            return obm__fail(err, OBM_E_ARG, "%.300s is an input of the merge, it cannot be the output", out_path);
    }
    return OBM_OK;
}

static obm_status write_folder(job *j, const obm_merge_options *options, const char *out_path, uint64_t total,
                               obm_error *err) {
    const obm_checkpoint *reference = j->inputs[j->reference].model;
    obm__run run = {j->ctx,
                    OBM_OPT(options, obm_merge_options, progress, NULL),
                    OBM_OPT(options, obm_merge_options, progress_user, NULL),
                    "merge",
                    0,
                    total};
    obm__model_writer *w = NULL;
    obm_json *config = NULL, *record = NULL;
    obm_status status;
    char *card = build_card(j);
    if (!card) return obm__fail_nomem(err, strlen(j->recipe->text));
    OBM_GO(check_out_path(j, out_path, err));
    OBM_GO(obm__model_writer_check(out_path, OBM_OPT(options, obm_merge_options, overwrite, false), err));
    OBM_GO(build_config(j, &config, err));
    OBM_GO(build_job(j, options, &run, &record, err));
    obm__model_writer_options o = {.shard_bytes = OBM_OPT(options, obm_merge_options, shard_bytes, 0),
                                   .overwrite = OBM_OPT(options, obm_merge_options, overwrite, false),
                                   .copy_from = reference->config ? reference->directory : NULL,
                                   .config = config,
                                   .card = card,
                                   .job = record,
                                   .resume = OBM_OPT(options, obm_merge_options, resume, false),
                                   .tick = job_tick,
                                   .user = &run};
    OBM_GO(obm__model_writer_new(out_path, &o, &w, err));
    OBM_GO(declare_outputs(j, w, err));
    OBM_GO(write_outputs(j, &run, w, err));
    OBM_GO(obm__model_writer_finish(w, err));
done:
    obm__model_writer_free(w);
    obm__json_free(config);
    obm__json_free(record);
    obm_free(card);
    return status;
}

static void free_job(job *j) {
    for (size_t i = 0; j->outputs && i < j->n_outputs; i++) {
        obm__group_clear(&j->outputs[i].group);
        obm__steps_free(&j->outputs[i].steps);
    }
    for (size_t i = 0; i < j->n_inputs; i++) {
        obm_task_vector_free(j->inputs[i].v);
        obm_checkpoint_free(j->inputs[i].adapter);
        obm_checkpoint_free(j->inputs[i].model);
    }
    obm_free(j->outputs);
    obm_free(j->tensors);
    obm_free(j->loras);
    obm_free(j->inputs);
    obm_free(j->refs);
}

obm_status obm_merge(obm_context *ctx, const char *recipe, const obm_merge_options *options, const char *out_path,
                     obm_plan *plan, obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_merge_options, options, err));
    obm__recipe *r;
    OBM_TRY(obm__recipe_parse(ctx, recipe, OBM_OPT(options, obm_merge_options, profile, OBM_PROFILE_DEFAULT), &r, err));
    uint64_t memory = OBM_OPT(options, obm_merge_options, memory, 0);
    job j = {.ctx = ctx,
             .recipe = r,
             .directory = OBM_OPT(options, obm_merge_options, directory, NULL),
             .memory = memory ? memory : DEFAULT_MEMORY,
             .seed = r->seed};
    if (OBM_OPT(options, obm_merge_options, has_seed, false)) j.seed = options->seed;
    obm_plan planned = {0};
    obm_status status = plan_job(&j, err);
    if (status == OBM_OK) planned = sizes(&j);
    if (status == OBM_OK && !OBM_OPT(options, obm_merge_options, dry_run, false))
        status = write_folder(&j, options, out_path, planned.bytes_written, err);
    if (status == OBM_OK && plan) *plan = planned;
    free_job(&j);
    obm__recipe_free(r);
    return status;
}
