/* obm_merge: a recipe to a Hugging Face folder.  Plans first (headers only), then streams tensor by tensor, in tiles,
 * through the model writer. */
#include "job.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_MEMORY ((uint64_t)2000000000)
/* A dry run's guess: bytes per second of a plain disk, nanoseconds per element and model of one pass of one core, and
 * per element, model and row or column (of which there are fewer) of decompositions: opcm took 0.8 where iso_c took 0.4
 * and wudi 0.6. */
#define BYTES_PER_SECOND 1e9
#define PASS_NANOSECONDS 2.0
#define DENSE_NANOSECONDS 0.8

/* ---- sizes ---- */

/* Whether magnitudes are selected that have bits below those of bf16. */
static bool may_list(const obm__group *g) {
    bool trims = g->steps->mask == OBM_MASK_MAGNITUDE || g->steps->mask == OBM_MASK_OUTLIERS;
    bool rounded = g->work == OBM_BF16 && g->steps->round_deltas;
    return (trims && !rounded) || (g->steps->method->custom && g->steps->method->custom->score);
}

/* Everything but the two output tiles: scratch of the passes, histograms, per-block records of the largest tensor. */
static uint64_t own_memory(const obm__job *j) {
    uint64_t threads = (uint64_t)j->ctx->threads, models = j->recipe->n_models, largest = 0, own = 0, made = 0, count = 0;
    bool lists = false;
    for (size_t i = 0; i < j->n_outputs; i++) {
        const obm__group *g = &j->outputs[i].group;
        const obm__custom *custom = j->recipe->method->custom;
        const obm__rows *rows = j->outputs[i].rows;
        if (rows) made += obm__rows_made(rows) * rows->cols * sizeof(float);
        if (j->outputs[i].copy) continue;
        uint64_t bytes = custom && custom->bytes ? custom->bytes(g) : 0;
        if (g->steps->mask == OBM_MASK_RANKED) bytes += obm__ranked_bytes(g, j->ctx->threads);
        if (bytes > own) own = bytes;
        if (g->count > largest) largest = g->count;
        count += g->count;
        lists = lists || may_list(g);
    }
    uint64_t listed = obm__job_whole_model(j) ? count : largest;
    if (lists) own += obm__select_bytes(listed, models);
    uint64_t blocks = largest / OBM_MERGE_BLOCK + 1;
    return threads * (obm__group_scratch(models) + (65536 + 3 * OBM_MERGE_BLOCK) * 4) + 65536 * 8 +
           blocks * models * (j->recipe->method->mask == OBM_MASK_OUTLIERS ? 4 : 3) * 8 + own + made;
}

/* Those that one span touches, which the option counts and the process does not own. */
static uint64_t input_pages(const obm__job *j) {
    uint64_t largest = 0;
    for (size_t i = 0; i < j->n_outputs; i++)
        if (!j->outputs[i].copy && j->outputs[i].group.count > largest) largest = j->outputs[i].group.count;
    return (largest < OBM_MERGE_SPAN ? largest : OBM_MERGE_SPAN) * j->widest * 4;
}

static uint64_t fixed_memory(const obm__job *j) { return own_memory(j) + input_pages(j); }

/* A tile of 16-bit values is written while the second-level caches still have much of it.  Masks by rank are of whole
 * rows, which a tile should not cut too often. */
#define MERGE_TILE ((uint64_t)1 << 20)

static uint64_t largest_tile(const obm__job *j) {
    return j->recipe->method->mask == OBM_MASK_RANKED ? OBM_MERGE_SPAN : MERGE_TILE;
}

/* Bytes of a tensor's inputs that stay mapped from one pass to the next: far more than any matrix in circulation has,
 * far less than address space. */
#define MAX_KEPT ((uint64_t)2 << 30)

static uint64_t input_bytes(const obm__output *o) {
    uint64_t bytes = 0;
    for (size_t t = 0; t < o->slice->n; t++) bytes += obm__tensor_bytes(&o->tensors[t]);
    return bytes;
}

/* Bytes of an element in the two output tiles. */
static uint64_t tile_bytes(const obm__job *j) {
    size_t most = 1;
    for (size_t i = 0; i < j->n_outputs; i++) {
        size_t size = obm_dtype_size(j->outputs[i].dtype);
        if (!j->outputs[i].copy && size > most) most = size;
    }
    return 2 * most;
}

/* Rounded up to blocks, which tiles begin with. */
static uint64_t largest_output(const obm__job *j) {
    uint64_t largest = OBM_MERGE_BLOCK;
    for (size_t i = 0; i < j->n_outputs; i++) {
        uint64_t blocks = j->outputs[i].group.count / OBM_MERGE_BLOCK + 1;
        if (!j->outputs[i].copy && blocks * OBM_MERGE_BLOCK > largest) largest = blocks * OBM_MERGE_BLOCK;
    }
    return largest;
}

/* Passes over a tensor, as far as a guess of the time needs them. */
static double pass_count(const obm__steps *s) {
    double trims = s->mask == OBM_MASK_MAGNITUDE  ? 2
                   : s->mask == OBM_MASK_OUTLIERS ? 4
                   : s->mask == OBM_MASK_RANKED   ? 8
                                                  : 0;
    return 1 + trims + (s->rescale == OBM_RESCALE_L1) +
           (s->method->custom && (s->method->custom->prepare || s->method->custom->form));
}

static bool may_keep(const obm__output *o) { return !o->copy && !o->rows && pass_count(&o->steps) > 1; }

/* Statistics of the whole model have all tensors' inputs mapped, or none. */
static uint64_t model_bytes(const obm__job *j) {
    uint64_t sum = 0;
    for (size_t i = 0; i < j->n_outputs; i++)
        if (may_keep(&j->outputs[i])) sum += input_bytes(&j->outputs[i]);
    return sum;
}

static obm_status choose_tile(obm__job *j, obm_error *err) {
    uint64_t fixed = fixed_memory(j), each = tile_bytes(j), least = fixed + each * OBM_MERGE_BLOCK;
    if (j->memory < least)
        return obm__fail(err, OBM_E_ARG,
                         "memory: this merge needs at least %.1fMB (%llu bytes), found %llu bytes; %.1fMB of that are for "
                         "pages of its inputs, which a plan's peak memory does not count",
                         ceil((double)least / 1e5) / 10, (unsigned long long)least, (unsigned long long)j->memory,
                         (double)input_pages(j) / 1e6);
    uint64_t elements = (j->memory - fixed) / each / OBM_MERGE_BLOCK * OBM_MERGE_BLOCK;
    uint64_t most = largest_tile(j), largest = largest_output(j);
    if (most > largest) most = largest;
    j->tile = elements < most ? elements : most;
    j->kept = j->memory - fixed - each * j->tile;
    if (j->kept > MAX_KEPT) j->kept = MAX_KEPT;
    if (obm__job_whole_model(j) && model_bytes(j) > j->kept) j->kept = 0;
    return OBM_OK;
}

/* Of one core, per element and model. */
static double nanoseconds(const obm__group *g) {
    const obm__custom *custom = g->steps->method->custom;
    double own = g->steps->method->cost;
    if (custom && custom->form && !custom->run && obm__dense_is_matrix(g))
        own += DENSE_NANOSECONDS * (double)obm__dense_size_of(g).k;
    return own + PASS_NANOSECONDS * pass_count(g->steps);
}

/* Several passes map the inputs once, where they may: as much time as one of the passes takes. */
static bool keeps_inputs(const obm__job *j, const obm__output *o) {
    return may_keep(o) && input_bytes(o) <= j->kept;
}

static obm_plan sizes(const obm__job *j) {
    obm_plan p = {.tensors = j->n_outputs, .peak_memory = own_memory(j) + tile_bytes(j) * j->tile};
    double work = 0;
    for (size_t i = 0; i < j->n_outputs; i++) {
        const obm__output *o = &j->outputs[i];
        p.bytes_read += input_bytes(o);
        uint64_t count = (uint64_t)obm_tensor_count(&o->tensors[0]);
        p.bytes_written += count * obm_dtype_size(o->dtype);
        p.tiles += o->copy ? 1 : obm__pieces(count, j->tile);
        if (!o->copy) work += (double)o->group.count * (double)o->steps.n * nanoseconds(&o->group);
    }
    if (obm__job_whole_model(j)) p.bytes_read *= 3; /* the statistics read everything before the merge does */
    p.seconds = (double)(p.bytes_read + p.bytes_written) / BYTES_PER_SECOND + work * 1e-9 / j->ctx->threads;
    return p;
}

static obm_status plan_job(obm__job *j, obm_error *err) {
    OBM_TRY(obm__job_open(j, err));
    OBM_TRY(obm__job_outputs(j, err));
    OBM_TRY(obm__job_compare_configs(j, err));
    return choose_tile(j, err);
}

/* ---- config and model card ---- */

static const char *config_dtype(obm_dtype dtype) {
    return dtype == OBM_F32    ? "float32"
           : dtype == OBM_F16  ? "float16"
           : dtype == OBM_BF16 ? "bfloat16"
           : dtype == OBM_F64  ? "float64"
                               : NULL;
}

/* The dtype that all written float tensors share, NULL if they differ. */
static const char *common_config_dtype(const obm__job *j) {
    const obm__output *first = NULL;
    for (size_t i = 0; i < j->n_outputs; i++) {
        const obm__output *o = &j->outputs[i];
        if (o->copy) continue;
        if (!first) first = o;
        if (o->dtype != first->dtype) return NULL;
    }
    return first ? config_dtype(first->dtype) : NULL;
}

static int64_t donor_layers(const obm__job *j) { return j->inputs[j->donor].layers; }

/* A list with an entry per layer, for the layers that the output has; NULL: out of memory. */
static obm_json *list_by_layer(const obm__job *j, const char *key) {
    obm_json *list = obm__json_new_array();
    bool ok = list != NULL;
    for (size_t s = 0; s < j->recipe->n_slices; s++) {
        const obm__slice_plan *p = &j->slices[s];
        const obm__source *source = p->sources[p->reference];
        const obm_json *own = obm__json_get(obm__checkpoint_text_config(j->inputs[p->inputs[p->reference]].model), key);
        for (int64_t layer = source->first; ok && layer < source->end; layer++) {
            const obm_json *value = obm__json_at(own, (size_t)layer);
            ok = obm__json_append(list, value ? obm__json_copy(value) : obm__json_new_null());
        }
    }
    if (ok) return list;
    obm__json_free(list);
    return NULL;
}

/* The number of layers and what lists them.  mergekit leaves the lists as they are, which transformers refuses. */
static bool set_layers(const obm__job *j, obm_json *config) {
    static const char *const lists[] = {"layer_types", "no_rope_layers"};
    if (!j->recipe->sliced) return true;
    const obm_json *donor = obm__checkpoint_text_config(j->inputs[j->donor].model);
    bool fine = obm__text_config_set(config, "num_hidden_layers", obm__json_new_int(j->n_layers));
    for (size_t i = 0; fine && i < OBM_COUNT(lists); i++) {
        const obm_json *old = obm__json_get(donor, lists[i]);
        if (obm__json_kind(old) == OBM_JSON_ARRAY && (int64_t)obm__json_size(old) == donor_layers(j))
            fine = obm__text_config_set(config, lists[i], list_by_layer(j, lists[i]));
    }
    return fine;
}

/* transformers renamed torch_dtype to dtype; the file keeps the name it has. */
static bool set_dtype(obm_json *config, const char *dtype) {
    bool fine = true;
    if (dtype && obm__json_get(config, "dtype")) fine = obm__json_set(config, "dtype", obm__json_new_string(dtype));
    if (fine && dtype && (obm__json_get(config, "torch_dtype") || !obm__json_get(config, "dtype")))
        fine = obm__json_set(config, "torch_dtype", obm__json_new_string(dtype));
    return fine;
}

/* The donor's config with what the merge changed; *out is owned, NULL without a config. */
static obm_status build_config(const obm__job *j, obm_json **out, obm_error *err) {
    const obm_json *source = j->inputs[j->donor].model->config;
    *out = NULL;
    if (!source) return OBM_OK;
    obm_json *config = obm__json_copy(source);
    const obm__input *donor = &j->inputs[j->donor];
    const obm__pack_text *own = obm__input_texts(donor).own;
    size_t rows = j->vocabulary ? obm__vocabulary_rows_count(j->vocabulary) : (size_t)obm__input_own_rows(donor);
    bool fine = config && set_dtype(config, common_config_dtype(j)) && set_layers(j, config);
    if (fine && rows) fine = obm__text_config_set(config, "vocab_size", obm__json_new_int((int64_t)rows));
    if (fine && own && own->eos) fine = obm__text_set_eos(own, config);
    /* transformers ties by default where the key is absent, so a written head needs an explicit false. */
    if (fine && j->writes_head) fine = obm__config_untie(config);
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

static char *build_card(const obm__job *j) {
    const obm__recipe *r = j->recipe;
    bool is_base = r->base && obm__method_takes_base(r->method);
    obm__buffer b = {0};
    obm__buffer_text(&b, "---\nlibrary_name: transformers\ntags:\n- merge\n- onebitmerge\n---\n");
    obm__buffer_printf(&b, "# %s\n\n", r->name ? r->name : "Merged model");
    obm__buffer_printf(&b, "Merged with onebitmerge %s by %s (%s; %s), profile %s, random seed %llu.\n\n",
                       obm_version(), r->method->info.name, r->method->info.doc, r->method->info.source,
                       r->profile == OBM_PROFILE_PAPER ? "paper" : "mergekit", (unsigned long long)j->seed);
    for (size_t i = 0; i < j->n_inputs; i++)
        obm__buffer_printf(&b, "- %s%s\n", j->inputs[i].ref, i == 0 && is_base ? " (base)" : "");
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

static obm_status put_input(const obm__job *j, obm__run *run, const obm_checkpoint *c, const char *what, size_t i,
                            obm_json *out, obm_error *err) {
    char print[33];
    OBM_TRY(obm__checkpoint_fingerprint(j->ctx, c, job_tick, run, print, err));
    char *key = obm__format("%s %zu %s", what, i, j->inputs[i].ref);
    bool ok = key && obm__json_set(out, key, obm__json_new_string(print));
    obm_free(key);
    return ok ? OBM_OK : obm__fail_nomem(err, 0);
}

static obm_status put_inputs(const obm__job *j, obm__run *run, obm_json *out, obm_error *err) {
    for (size_t i = 0; i < j->n_inputs; i++) {
        const obm__input *in = &j->inputs[i];
        OBM_TRY(put_input(j, run, in->model, "input", i, out, err));
        if (in->adapter) OBM_TRY(put_input(j, run, in->adapter, "adapter", i, out, err));
    }
    return OBM_OK;
}

/* Tiles multiply prompts: all that a merge calls is the same without them. */
static const char *kernels_of(const obm_context *ctx) { return strcmp(ctx->k->isa, "amx") ? ctx->k->isa : "avx512"; }

/* Keys are words of the message that says what differs.  ISAs agree within a bound only, so the kernels count; threads
 * and memory do not. */
static bool put_options(const obm__job *j, const obm_merge_options *options, obm_json *out) {
    uint64_t shard_bytes = OBM_OPT(options, obm_merge_options, shard_bytes, 0);
    char *seed = obm__format("%llu", (unsigned long long)j->seed);
    char *bytes = obm__format("%llu", (unsigned long long)shard_bytes);
    bool ok = seed && bytes;
    ok = ok && obm__json_set(out, "library version", obm__json_new_string(obm_version()));
    ok = ok && obm__json_set(out, "kernels", obm__json_new_string(kernels_of(j->ctx)));
    ok = ok && obm__json_set(out, "profile",
                             obm__json_new_string(j->recipe->profile == OBM_PROFILE_PAPER ? "paper" : "mergekit"));
    ok = ok && obm__json_set(out, "random seed", obm__json_new_string(seed));
    ok = ok && obm__json_set(out, "shard size", obm__json_new_string(shard_bytes ? bytes : "default"));
    if (ok && j->vocabulary) {
        char hash[33];
        obm__vocabulary_hash(j->vocabulary, j->n_inputs, hash);
        ok = obm__json_set(out, "tokens of the inputs", obm__json_new_string(hash));
    }
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
static obm_status build_job(const obm__job *j, const obm_merge_options *options, obm__run *run, obm_json **out,
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

static obm_status write_copy(const obm__output *o, obm__model_writer *w, obm_error *err) {
    const obm__slice_plan *p = o->slice;
    const obm_tensor *t = &o->tensors[p->reference];
    uint64_t bytes = obm__tensor_bytes(t);
    for (size_t i = 0; i < p->n; i++)
        if (bytes && memcmp(t->data, o->tensors[i].data, bytes))
            return obm__fail(err, OBM_E_DTYPE, "%.200s: %s tensors cannot be merged, and %.150s and %.150s differ",
                             o->name, obm_dtype_name(t->dtype), p->refs[p->reference], p->refs[i]);
    OBM_TRY(obm__model_writer_write(w, t->data, bytes, err));
    for (size_t i = 0; i < p->n; i++) obm__pages_release(o->tensors[i].data, bytes);
    return OBM_OK;
}

/* Writing, hashing and syncing one tile beside the work on the next. */
typedef struct writing {
    obm__model_writer *w;
    char *tiles[2];
    int current; /* the tile that is not being written */
    obm__task *task;
    const void *bytes;
    size_t n;
    obm_status status;
    obm_error error;
} writing;

/* Less than this is written sooner than a thread starts. */
#define WRITTEN_AT_ONCE ((size_t)256 << 10)

static void write_tile(void *arg) {
    writing *x = arg;
    x->status = obm__model_writer_write(x->w, x->bytes, x->n, &x->error);
}

static obm_status finish_writing(writing *x, obm_error *err) {
    if (!x->task) return OBM_OK;
    obm__task_join(x->task);
    x->task = NULL;
    if (x->status != OBM_OK && err) *err = x->error;
    return x->status;
}

/* The current tile is the other one afterwards. */
static obm_status start_writing(writing *x, size_t n, obm_error *err) {
    OBM_TRY(finish_writing(x, err));
    x->bytes = x->tiles[x->current];
    x->n = n;
    x->current = !x->current;
    if (n >= WRITTEN_AT_ONCE && obm__task_start(write_tile, x, &x->task, NULL) == OBM_OK) return OBM_OK;
    return obm__model_writer_write(x->w, x->bytes, n, err);
}

typedef struct mapping {
    const obm__group *g;
    uint64_t at;
} mapping;

static void populate_range(void *arg, size_t begin, size_t end, int worker) {
    const mapping *m = arg;
    (void)worker;
    obm__group_populate(m->g, SIZE_MAX, m->at + begin, m->at + end);
}

static obm_status map_inputs(const obm__job *j, const obm__run *run, obm__group *g, obm_error *err) {
    for (mapping m = {.g = g}; m.at < g->count; m.at += OBM_MERGE_SPAN) {
        uint64_t n = g->count - m.at < OBM_MERGE_SPAN ? g->count - m.at : OBM_MERGE_SPAN;
        obm__parallel(j->ctx, (size_t)n, OBM_MERGE_SPAN / 8, populate_range, &m);
        OBM_TRY(obm__run_report(run, err));
    }
    g->held = true;
    return OBM_OK;
}

static obm_status write_merged(const obm__job *j, obm__output *o, obm__run *run, writing *x, obm_error *err) {
    size_t size = obm_dtype_size(o->dtype);
    if (!o->group.held && keeps_inputs(j, o)) OBM_TRY(map_inputs(j, run, &o->group, err));
    if (!o->group.cuts) OBM_TRY(obm__statistics(run, &o->group, 1, err));
    OBM_TRY(obm__group_form(run, &o->group, err));
    for (uint64_t at = 0; at < o->group.count; at += j->tile) {
        uint64_t n = o->group.count - at < j->tile ? o->group.count - at : j->tile;
        OBM_TRY(obm__group_run(run, &o->group, at, n, o->dtype, x->tiles[x->current], err));
        if (o->group.held) obm__group_drop(&o->group, at, n);
        OBM_TRY(start_writing(x, (size_t)n * size, err));
        run->done += n * size;
    }
    return obm__run_report(run, err);
}

/* Statistics over the concatenation of all tensors, in the order of their names. */
static obm_status model_statistics(obm__job *j, const obm__run *run, obm_error *err) {
    obm__group *groups = obm__alloc(j->n_outputs, sizeof *groups);
    if (!groups) return obm__fail_nomem(err, j->n_outputs * sizeof *groups);
    size_t n = 0;
    obm_status status = OBM_OK;
    for (size_t i = 0; i < j->n_outputs; i++) {
        obm__output *o = &j->outputs[i];
        if (status == OBM_OK && keeps_inputs(j, o)) status = map_inputs(j, run, &o->group, err);
        if (!o->copy) groups[n++] = o->group;
    }
    if (status == OBM_OK) status = obm__statistics(run, groups, n, err);
    n = 0;
    for (size_t i = 0; i < j->n_outputs; i++)
        if (!j->outputs[i].copy) j->outputs[i].group = groups[n++];
    obm_free(groups);
    return status;
}

static obm_status check_inputs(const obm__job *j, obm_error *err) {
    for (size_t i = 0; i < j->n_inputs; i++) {
        const obm__input *in = &j->inputs[i];
        OBM_TRY(in->v ? obm__task_vector_check(in->v, err) : obm__checkpoint_check(in->model, err));
    }
    return OBM_OK;
}

static obm_status write_outputs(obm__job *j, obm__run *run, obm__model_writer *w, obm_error *err) {
    size_t each = (size_t)tile_bytes(j);
    char *tiles = obm__alloc(j->tile, each);
    if (!tiles) return obm__fail_nomem(err, j->tile * each);
    writing x = {.w = w, .tiles = {tiles, tiles + j->tile * each / 2}};
    obm_status status = check_inputs(j, err);
    bool any = false;
    for (size_t i = 0; i < j->n_outputs; i++) any |= !obm__model_writer_has(w, i);
    for (size_t i = 0; status == OBM_OK && any && i < j->n_outputs; i++)
        if (j->outputs[i].rows) status = obm__rows_fill(run, j->outputs[i].rows, err);
    if (status == OBM_OK && any && obm__job_whole_model(j)) status = model_statistics(j, run, err);
    for (size_t i = 0; status == OBM_OK && i < j->n_outputs; i++) {
        obm__output *o = &j->outputs[i];
        if (!obm__model_writer_has(w, i)) status = check_inputs(j, err);
        if (status == OBM_OK && !obm__model_writer_has(w, i))
            status = o->copy ? finish_writing(&x, err) : write_merged(j, o, run, &x, err);
        if (status == OBM_OK && o->copy && !obm__model_writer_has(w, i)) status = write_copy(o, w, err);
        if (!o->copy) obm__group_clear(&o->group);
    }
    obm_status written = finish_writing(&x, status == OBM_OK ? err : NULL);
    obm_free(tiles);
    return status == OBM_OK ? written : status;
}

static obm_status declare_outputs(const obm__job *j, obm__model_writer *w, obm_error *err) {
    for (size_t i = 0; i < j->n_outputs; i++) {
        const obm__output *o = &j->outputs[i];
        OBM_TRY(obm__model_writer_declare(w, o->name, o->dtype, o->tensors[0].ndim, o->tensors[0].shape, err));
    }
    return OBM_OK;
}

/* Replacing an input while it is read would be the end of it. */
static obm_status check_out_path(const obm__job *j, const char *out_path, obm_error *err) {
    for (size_t i = 0; i < 2 * j->n_inputs; i++) {
        const obm_checkpoint *c = i % 2 ? j->inputs[i / 2].adapter : j->inputs[i / 2].model;
        if (c && obm__same_path(out_path, c->directory))
            return obm__fail(err, OBM_E_ARG, "%.300s is an input of the merge, it cannot be the output", out_path);
    }
    return OBM_OK;
}

/* What a finished merge wrote is not looked at here: `resume` has to know the job before it can tell. */
static bool may_be_finished(const obm_merge_options *options, const char *out_path) {
    return OBM_OPT(options, obm_merge_options, resume, false) && obm__model_writer_recorded(out_path);
}

static obm_status check_folder(const obm__job *j, const obm_merge_options *options, const char *out_path,
                               bool overwrite, obm_error *err) {
    OBM_TRY(check_out_path(j, out_path, err));
    return obm__model_writer_check(out_path, overwrite || may_be_finished(options, out_path), err);
}

/* overwrite: whatever the options say, for a folder that is the merge's own. */
static obm_status write_folder(obm__job *j, const obm_merge_options *options, const char *out_path, bool overwrite,
                               obm__run *run, obm_error *err) {
    const obm_checkpoint *reference = j->inputs[j->donor].model;
    obm__model_writer *w = NULL;
    obm__carried files = {0};
    obm_json *config = NULL, *record = NULL;
    bool finished;
    obm_status status;
    char *card = build_card(j);
    if (!card) return obm__fail_nomem(err, strlen(j->recipe->text));
    OBM_GO(check_folder(j, options, out_path, overwrite, err));
    OBM_GO(build_config(j, &config, err));
    OBM_GO(obm__carried_new(j, &files, err));
    OBM_GO(build_job(j, options, run, &record, err));
    obm__model_writer_options o = {.shard_bytes = OBM_OPT(options, obm_merge_options, shard_bytes, 0),
                                   .overwrite = overwrite,
                                   .copy_from = reference->config ? reference->directory : NULL,
                                   .instead = (const char *const(*)[2])files.instead,
                                   .n_instead = files.n_instead,
                                   .texts = (const char *const(*)[2])files.texts,
                                   .n_texts = files.n_texts,
                                   .config = config,
                                   .card = card,
                                   .job = record,
                                   .resume = OBM_OPT(options, obm_merge_options, resume, false),
                                   .tick = job_tick,
                                   .user = run};
    OBM_GO(obm__model_writer_new(out_path, &o, &w, err));
    OBM_GO(declare_outputs(j, w, err));
    OBM_GO(obm__model_writer_finished(w, &finished, err));
    if (finished) {
        obm__warn(j->ctx,
                  "%s: this merge is finished already (size and checksum of every file verified); nothing was written",
                  out_path);
        goto done;
    }
    OBM_GO(obm__model_writer_begin(w, err));
    OBM_GO(write_outputs(j, run, w, err));
    OBM_GO(obm__model_writer_finish(w, err));
done:
    obm__model_writer_free(w);
    obm__carried_clear(&files);
    obm__json_free(config);
    obm__json_free(record);
    obm_free(card);
    return status;
}

/* ---- documents ---- */

static obm__job new_job(obm_context *ctx, const obm_merge_options *options, const obm__documents *d, size_t i) {
    uint64_t memory = OBM_OPT(options, obm_merge_options, memory, 0);
    obm__job j = {.ctx = ctx,
                  .recipe = d->recipes[i],
                  .directory = OBM_OPT(options, obm_merge_options, directory, NULL),
                  .parts = d->parts,
                  .n_parts = d->n > 1 ? i : 0, /* those before it */
                  .memory = memory ? memory : DEFAULT_MEMORY,
                  .seed = d->recipes[i]->seed};
    if (OBM_OPT(options, obm_merge_options, has_seed, false)) j.seed = options->seed;
    return j;
}

static obm_status plan_part(const obm__job *j, obm__stage *part, obm_error *err) {
    obm_json *config;
    OBM_TRY(build_config(j, &config, err));
    obm_status status = obm__documents_plan_part(j, config, part, err);
    obm__json_free(config);
    return status;
}

static void add_plan(obm_plan *sum, const obm_plan *p) {
    sum->tensors += p->tensors;
    sum->tiles += p->tiles;
    sum->bytes_read += p->bytes_read;
    sum->bytes_written += p->bytes_written;
    sum->seconds += p->seconds;
    if (p->peak_memory > sum->peak_memory) sum->peak_memory = p->peak_memory;
}

static bool put_plan(const obm_plan *p, obm_json *out) {
    bool ok = obm__json_set(out, "tensors", obm__json_new_int((int64_t)p->tensors));
    ok = obm__json_set(out, "tiles", obm__json_new_int((int64_t)p->tiles)) && ok;
    ok = obm__json_set(out, "bytes_read", obm__json_new_int((int64_t)p->bytes_read)) && ok;
    ok = obm__json_set(out, "bytes_written", obm__json_new_int((int64_t)p->bytes_written)) && ok;
    ok = obm__json_set(out, "peak_memory", obm__json_new_int((int64_t)p->peak_memory)) && ok;
    return obm__json_set(out, "seconds", obm__json_new_real(p->seconds)) && ok;
}

static bool takes_part(const obm__job *j) {
    for (size_t i = 0; i < j->n_inputs; i++)
        for (size_t p = 0; p < j->n_parts; p++)
            if (j->inputs[i].model == j->parts[p].planned) return true;
    return false;
}

/* Whether a document's folder may be replaced: those that are taken back in the end are the merge's own. */
static bool overwrites(const obm_merge_options *options, const obm__documents *d, size_t i) {
    return (d->folder && d->parts[i].name) || OBM_OPT(options, obm_merge_options, overwrite, false);
}

/* Refuses what the run would.  Which of the files are there already is asked of jobs whose inputs are; of others what
 * is still to be written, and whether it fits, is known to the run alone. */
static obm_status list_files(const obm__job *j, const obm_merge_options *options, obm__run *run, const char *path,
                             bool overwrite, obm_json **out, obm_error *err) {
    obm__model_writer *w = NULL;
    obm_json *record = NULL;
    bool resumes = OBM_OPT(options, obm_merge_options, resume, false), resume = resumes && !takes_part(j);
    if (resume) OBM_TRY(build_job(j, options, run, &record, err));
    bool later = takes_part(j) && may_be_finished(options, path);
    obm__model_writer_options o = {.shard_bytes = OBM_OPT(options, obm_merge_options, shard_bytes, 0),
                                   .overwrite = overwrite || later,
                                   .job = record,
                                   .resume = resume,
                                   .tick = job_tick,
                                   .user = run};
    obm_status status = obm__model_writer_new(path, &o, &w, err);
    if (status == OBM_OK) status = declare_outputs(j, w, err);
    if (status == OBM_OK) status = obm__model_writer_files(w, resume || !resumes, out, err);
    obm__model_writer_free(w);
    obm__json_free(record);
    return status;
}

/* One document of obm_merge_plan. */
static obm_status add_report(const obm__job *j, const obm_merge_options *options, const obm__documents *d, size_t i,
                             const obm_plan *plan, obm__run *run, obm_json *list, obm_error *err) {
    const obm__stage *part = &d->parts[i];
    obm_json *files;
    OBM_TRY(list_files(j, options, run, part->path, overwrites(options, d, i), &files, err));
    obm_json *record = obm__json_new_object();
    const char *name = d->recipes[i]->name;
    obm_json *path = obm__json_new_string(part->path); /* JSON has none that is not UTF-8 */
    bool ok = obm__json_set(record, "files", files);
    ok = obm__json_set(record, "name", name ? obm__json_new_string(name) : obm__json_new_null()) && ok;
    ok = obm__json_set(record, "output", path ? path : obm__json_new_null()) && ok;
    ok = obm__json_set(record, "kept", obm__json_new_bool(!d->folder || !part->name)) && ok;
    ok = put_plan(plan, record) && ok;
    if (obm__json_append(list, record) && ok) return OBM_OK;
    return obm__fail_nomem(err, d->n);
}

/* Every document is planned before the first is run: outputs of others stand there as headers without data. */
static obm_status plan_documents(obm_context *ctx, const obm_merge_options *options, obm__documents *d, obm__job *jobs,
                                 bool dry_run, obm_plan *plan, obm__run *run, obm_json *report, obm_error *err) {
    for (size_t i = 0; i < d->n; i++) {
        jobs[i] = new_job(ctx, options, d, i);
        OBM_TRY(plan_job(&jobs[i], err));
        obm__job_warn_filters(&jobs[i]);
        obm_plan one = sizes(&jobs[i]);
        add_plan(plan, &one);
        if (dry_run) OBM_TRY(check_folder(&jobs[i], options, d->parts[i].path, overwrites(options, d, i), err));
        if (report) OBM_TRY(add_report(&jobs[i], options, d, i, &one, run, report, err));
        if (d->n > 1 && d->parts[i].name) OBM_TRY(plan_part(&jobs[i], &d->parts[i], err));
    }
    return OBM_OK;
}

static obm_status run_documents(const obm_merge_options *options, obm__documents *d, obm__job *jobs, obm__run *run,
                                obm_error *err) {
    for (size_t i = 0; i < d->n; i++) {
        obm__stage *part = &d->parts[i];
        if (takes_part(&jobs[i])) { /* which is there by now */
            obm__job_clear(&jobs[i]);
            jobs[i] = new_job(run->ctx, options, d, i);
            OBM_TRY(plan_job(&jobs[i], err));
        }
        OBM_TRY(write_folder(&jobs[i], options, part->path, overwrites(options, d, i), run, err));
        part->done = true;
    }
    return OBM_OK;
}

/* report: a list of documents for a dry run, else NULL. */
static obm_status merge_documents(obm_context *ctx, const obm_merge_options *options, obm__documents *d, obm_plan *plan,
                                  obm_json *report, obm_error *err) {
    obm__pulse pulse = obm__pulse_new(ctx, OBM_OPT(options, obm_merge_options, progress, NULL),
                                      OBM_OPT(options, obm_merge_options, progress_user, NULL), "merge", 0);
    obm__run run = {.ctx = ctx, .progress = pulse.fn, .user = pulse.user, .what = pulse.what};
    bool dry_run = report || OBM_OPT(options, obm_merge_options, dry_run, false);
    obm__job *jobs = obm__calloc(d->n, sizeof *jobs);
    if (!jobs) return obm__fail_nomem(err, d->n * sizeof *jobs);
    obm_status status = plan_documents(ctx, options, d, jobs, dry_run, plan, &run, report, err);
    run.total = plan->bytes_written;
    if (status == OBM_OK && !dry_run) status = run_documents(options, d, jobs, &run, err);
    if (!dry_run && (status == OBM_OK || !OBM_OPT(options, obm_merge_options, resume, false)))
        obm__documents_remove_parts(d);
    for (size_t i = 0; i < d->n; i++) obm__job_clear(&jobs[i]);
    obm_free(jobs);
    return status;
}

static obm_status merge_recipe(obm_context *ctx, const char *recipe, const obm_merge_options *options,
                               const char *out_path, obm_plan *plan, obm_json *report, obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_merge_options, options, err));
    obm__documents d;
    obm_plan planned = {0};
    obm__recipe_methods methods = {OBM_OPT(options, obm_merge_options, method, NULL),
                                   OBM_OPT(options, obm_merge_options, methods, NULL),
                                   OBM_OPT(options, obm_merge_options, n_methods, 0)};
    OBM_TRY(obm__documents_read(ctx, recipe, OBM_OPT(options, obm_merge_options, profile, OBM_PROFILE_DEFAULT),
                                &methods, out_path, &d, err));
    obm_status status = merge_documents(ctx, options, &d, &planned, report, err);
    if (status == OBM_OK && plan) *plan = planned;
    obm__documents_free(&d);
    return status;
}

obm_status obm_merge(obm_context *ctx, const char *recipe, const obm_merge_options *options, const char *out_path,
                     obm_plan *plan, obm_error *err) {
    return merge_recipe(ctx, recipe, options, out_path, plan, NULL, err);
}

static obm_status report_text(const obm_plan *plan, const obm_json *documents, char **json, obm_error *err) {
    obm_json *report = obm__json_new_object();
    bool ok = put_plan(plan, report);
    ok = obm__json_set(report, "documents", obm__json_copy(documents)) && ok;
    char *text = ok ? obm__json_text(report, 0) : NULL;
    obm__json_free(report);
    if (!text) return obm__fail_nomem(err, 0);
    *json = text;
    return OBM_OK;
}

obm_status obm_merge_plan(obm_context *ctx, const char *recipe, const obm_merge_options *options, const char *out_path,
                          char **json, obm_error *err) {
    obm_plan plan;
    obm_json *documents = obm__json_new_array();
    obm_status status =
        documents ? merge_recipe(ctx, recipe, options, out_path, &plan, documents, err) : obm__fail_nomem(err, 0);
    if (status == OBM_OK) status = report_text(&plan, documents, json, err);
    obm__json_free(documents);
    return status;
}
