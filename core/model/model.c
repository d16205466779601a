/* A model as the caller holds it: opening, describing, logits, hidden states, features.  Generation is in generate.c.
 */
#include "../text/text.h"
#include "model.h"

#include <string.h>

/* ---- opening ---- */

static obm_status load_generation_config(const obm_checkpoint *c, obm_json **out, obm_error *err) {
    char *path = obm__path_join(c->directory, "generation_config.json");
    if (!path) return obm__fail_nomem(err, strlen(c->directory));
    *out = NULL;
    obm_status status = obm__file_exists(path) ? obm__json_load(path, out, err) : OBM_OK;
    obm_free(path);
    return status;
}

/* Before anything is allocated or looked up for each layer: none of them is without tensors. */
static obm_status check_layers(const obm_model *m, const char *where, obm_error *err) {
    size_t most = obm_checkpoint_count(m->base);
    if ((uint64_t)m->config.layers <= most) return OBM_OK;
    return obm__fail(err, OBM_E_FORMAT,
                     "%s: \"num_hidden_layers\": expected at most %zu, as there are tensors, found %lld", where, most,
                     (long long)m->config.layers);
}

obm_status obm__model_load_config(obm_model *m, obm_error *err) {
    const obm_checkpoint *c = m->base;
    obm_json *generation;
    if (!c->config)
        return obm__fail(err, OBM_E_FORMAT, "%s: no config.json here, so it cannot be run as a model: expected a Hugging Face folder, with the "
                         "config.json of the model that the weights belong to",
                         obm_checkpoint_path(c));
    OBM_TRY(load_generation_config(c, &generation, err));
    char *where = obm__path_join(c->directory, "config.json");
    obm_status status =
        where ? obm__config_parse(c->config, generation, where, &m->config, err) : obm__fail_nomem(err, 1);
    if (status == OBM_OK) status = check_layers(m, where, err);
    if (status == OBM_OK) m->config.tied = c->tied;
    if (status == OBM_OK) obm__checkpoint_warn_layers(c, "they are not run");
    obm_free(where);
    obm__json_free(generation);
    return status;
}

static obm_status load_tokenizer(obm_model *m, obm_error *err) {
    char *path = obm__path_join(m->base->directory, "tokenizer.json");
    if (!path) return obm__fail_nomem(err, strlen(m->base->directory));
    obm_status status =
        obm__file_exists(path) ? obm_tokenizer_open(m->ctx, m->base->directory, &m->tokenizer, err) : OBM_OK;
    obm_free(path);
    return status;
}

/* The logits' width: extra vocabulary rows of any expert count (they are masked under other routes). */
static int64_t widest_vocabulary(const obm_model *m) {
    int64_t vocab = m->config.vocab;
    size_t e = m->pack ? obm__pack_find(m->pack, m->config.arch->names[OBM_EMBEDDING]) : SIZE_MAX;
    for (size_t i = 0; e != SIZE_MAX && i < m->pack->n_experts; i++) {
        const obm__pack_entry *entry = &m->pack->experts[i].entries[e];
        int64_t rows = entry->full.data    ? entry->full.shape[0]
                       : entry->extra.data ? m->config.vocab + entry->extra.shape[0]
                                           : 0;
        if (rows > vocab) vocab = rows;
    }
    return vocab;
}

static void count_params(obm_model *m) {
    for (size_t i = 0; i < obm_checkpoint_count(m->base); i++) {
        const char *name;
        obm_tensor t;
        obm_checkpoint_at(m->base, i, &name, &t);
        uint64_t count = (uint64_t)obm_tensor_count(&t);
        m->params += count;
        m->base_bytes += count * obm_dtype_size(t.dtype);
    }
}

/* A quarter of the machine: the rest is for the base's pages, the cache and everybody else. */
static uint64_t default_budget(const obm_context *ctx) {
    obm_context_info info;
    obm_context_describe(ctx, &info);
    return info.memory_total ? info.memory_total / 4 : UINT64_MAX;
}

static obm_status load_rotation(obm_model *m, obm_error *err) {
    const obm__config *c = &m->config;
    for (int r = 0; r < c->n_ropes; r++) {
        int64_t pairs = obm__rope_pairs(&c->ropes[r]);
        if (pairs > m->pairs) m->pairs = pairs;
    }
    size_t count = (size_t)(c->n_ropes * m->pairs);
    m->frequencies = obm__calloc(count, sizeof *m->frequencies);
    if (!m->frequencies) return obm__fail_nomem(err, count * sizeof *m->frequencies);
    for (int r = 0; r < c->n_ropes; r++) obm__rope_frequencies(&c->ropes[r], 0, m->frequencies + r * m->pairs);
    return OBM_OK;
}

/* Gemma's sqrt(hidden) is rounded to the dtype of the embedding in the file, as transformers does and as it was trained:
 * 55.5 instead of 55.43 in bf16. */
static float embedding_scale(const obm_model *m, const obm__weights *base) {
    const obm__config *c = &m->config;
    float scale = c->embedding_multiplier;
    uint8_t rounded[sizeof scale];
    obm_tensor t = {.data = rounded, .dtype = obm__weights_at(base, 0, OBM_EMBEDDING)->dtype, .ndim = 1, .shape = {1}};
    if (!(c->arch->has & OBM_HAS_SCALED_EMBEDDING)) return scale;
    scale = sqrtf((float)c->hidden);
    obm__narrow(m->ctx->k, t.dtype, &scale, 1, rounded);
    obm__widen(m->ctx->k, &t, 0, 1, &scale);
    return scale;
}

static obm_status choose_prefill(obm_model *m, obm_dtype prefill, obm_error *err) {
    if (prefill != OBM_F32 && prefill != OBM_BF16)
        return obm__fail(err, OBM_E_ARG, "prefill can be F32 or BF16, not %s", obm_dtype_name(prefill));
    m->prefill = obm_kernels_pairs_gain(m->ctx->k) ? prefill : OBM_F32;
    if (m->prefill != prefill)
        obm__warn(m->ctx, "prefill in bf16: %s has no products of bf16 here (AVX512-BF16); prompts stay f32", m->ctx->k->isa);
    return OBM_OK;
}

static obm_status prepare(obm_model *m, const obm_model_options *options, obm_error *err) {
    m->tasks = obm__model_tasks(m);
    m->revision = m->pack ? m->pack->revision : 0;
    m->kv = OBM_OPT(options, obm_model_options, kv, OBM_F32);
    m->route_budget = OBM_OPT(options, obm_model_options, route_budget, 0);
    if (!m->route_budget) m->route_budget = default_budget(m->ctx);
    m->materialise = OBM_OPT(options, obm_model_options, materialise, false);
    if (m->kv != OBM_F32 && m->kv != OBM_F16)
        return obm__fail(err, OBM_E_ARG, "the KV cache can be F32 or F16, not %s", obm_dtype_name(m->kv));
    OBM_TRY(choose_prefill(m, OBM_OPT(options, obm_model_options, prefill, OBM_F32), err));
    OBM_TRY(obm__model_load_config(m, err));
    OBM_TRY(load_tokenizer(m, err));
    OBM_TRY(obm__model_load_texts(m, err));
    m->vocab = widest_vocabulary(m);
    count_params(m);
    if (m->pack) OBM_TRY(obm__model_find_tensors(m, err));
    obm_z12 z12 = OBM_OPT(options, obm_model_options, z12, OBM_Z12_AUTO);
    OBM_TRY(obm__z12_check(z12, err));
    OBM_TRY(obm__place_model(m, z12 == OBM_Z12_ON, err));
    obm__place_caller(m);
    /* checks every tensor the config asks for; freed with the model */
    OBM_TRY(obm__weights_acquire(m, NULL, &m->base_alone, err));
    /* a head_dim that fits the tensors is no larger than they are */
    OBM_TRY(load_rotation(m, err));
    m->embedding_scale = embedding_scale(m, m->base_alone);
    if (z12 == OBM_Z12_ON) OBM_TRY(obm__z12_load(m, err));
    if (z12 == OBM_Z12_AUTO) obm__z12_auto(m);
    OBM_TRY(obm__place_weights(m, err));
    return m->pack && !m->materialise ? obm__signs_load(m, err) : obm__pulse_done(m->pulse, 1, err);
}

static obm__pulse open_pulse(const obm_context *ctx, const obm_model_options *o) {
    return obm__pulse_new(ctx, OBM_OPT(o, obm_model_options, progress, NULL),
                          OBM_OPT(o, obm_model_options, progress_user, NULL), "open", 1);
}

/* Takes ownership of m. */
static obm_status finish_open(obm_model *m, const obm_model_options *options, obm__pulse *pulse, obm_model **out,
                              obm_error *err) {
    obm_status status = obm__model_enter(m, pulse, err);
    if (status == OBM_OK) {
        status = prepare(m, options, err);
        obm__model_leave(m);
    }
    if (status == OBM_OK) *out = m;
    else obm_model_free(m);
    return status;
}

static obm_status open_local(obm_model *m, const char *path, const char *base, obm__pulse *pulse, obm_error *err) {
    char *manifest = obm__path_join(path, "pack.json");
    if (!manifest) return obm__fail_nomem(err, strlen(path));
    bool is_pack = obm__file_exists(manifest);
    obm_free(manifest);
    if (is_pack) {
        OBM_TRY(obm__pack_open(m->ctx, path, base, pulse, &m->own_pack, err));
        m->pack = m->own_pack;
        m->base = obm_pack_base(m->pack);
        return OBM_OK;
    }
    if (base) return obm__fail(err, OBM_E_ARG, "%s: a base applies to a pack, and there is no pack.json here", path);
    OBM_TRY(obm_checkpoint_open(m->ctx, path, &m->own_checkpoint, err));
    m->base = m->own_checkpoint;
    if (m->base->member)
        return obm__fail(err, OBM_E_ARG,
                         "%s is an expert of a pack: it runs as a route of it; open %s and give the route %s (generate "
                         "%s --route %s)",
                         path, m->base->member->pack, m->base->member->task, m->base->member->pack,
                         m->base->member->task);
    return obm__checkpoint_is_model(m->base, "a model to run", err);
}

obm_status obm__model_open_files(obm_model *m, const char *name, const char *base, obm__pulse *pulse, obm_error *err) {
    char *path;
    OBM_TRY(obm__source_find(m->ctx, name, &path, err));
    obm_status status = open_local(m, path, base, pulse, err);
    obm_free(path);
    return status;
}

obm_status obm_model_open(obm_context *ctx, const char *path, const obm_model_options *options, obm_model **out,
                          obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_model_options, options, err));
    obm_model *m = obm__calloc(1, sizeof *m);
    if (!m) return obm__fail_nomem(err, sizeof *m);
    m->ctx = ctx;
    obm__pulse pulse = open_pulse(ctx, options);
    obm_status status =
        obm__model_open_files(m, path, OBM_OPT(options, obm_model_options, base, NULL), &pulse, err);
    if (status == OBM_OK) return finish_open(m, options, &pulse, out, err);
    obm_model_free(m);
    return status;
}

obm_status obm_model_from_pack(obm_context *ctx, const obm_pack *pack, const obm_model_options *options,
                               obm_model **out, obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_model_options, options, err));
    if (OBM_OPT(options, obm_model_options, base, NULL))
        return obm__fail(err, OBM_E_ARG, "the pack is open already: its base cannot be changed here");
    obm_model *m = obm__calloc(1, sizeof *m);
    if (!m) return obm__fail_nomem(err, sizeof *m);
    m->ctx = ctx;
    m->pack = pack;
    m->base = obm_pack_base(pack);
    obm__pulse pulse = open_pulse(ctx, options);
    return finish_open(m, options, &pulse, out, err);
}

void obm_model_free(obm_model *m) {
    if (!m) return;
    obm__weights_free_all(m);
    obm__signs_free_all(m);
    obm__z12_free_all(m);
    obm__place_free_all(m);
    obm__coefficients_release(m->hard_routes);
    obm__planes_route_free(m->spare);
    obm__scratch_free(&m->scratch);
    obm__model_free_texts(m);
    obm__config_clear(&m->config);
    obm_free(m->frequencies);
    obm_free(m->tensors);
    if (m->tokenizer) obm_tokenizer_free(m->tokenizer);
    if (m->own_pack) obm_pack_free(m->own_pack);
    if (m->own_checkpoint) obm_checkpoint_free(m->own_checkpoint);
    obm_free(m);
}

static obm_status check_files(const obm_model *m, obm_error *err) {
    return m->pack ? obm__pack_check(m->pack, err) : obm__checkpoint_check(m->base, err);
}

obm_status obm__model_resume(obm_model *m, obm_error *err) {
    if (m->pack) OBM_TRY(obm__pack_use(m->pack, err));
    m->uses_pack = m->pack != NULL;
    obm__place_caller(m);
    return OBM_OK;
}

void obm__model_pause(obm_model *m) {
    if (m->uses_pack) obm__pack_unuse(m->pack);
    m->uses_pack = false;
    obm__place_leave(m);
}

obm_status obm__model_enter(obm_model *m, obm__pulse *pulse, obm_error *err) {
    OBM_TRY(obm__guard_enter(&m->guard, "the model", err));
    obm_status status = obm__model_resume(m, err);
    if (status == OBM_OK) status = check_files(m, err);
    if (status != OBM_OK) {
        obm__model_pause(m);
        obm__guard_leave(&m->guard);
        return status;
    }
    m->pulse = pulse;
    m->decoding = false;
    return OBM_OK;
}

/* A thread that still builds would look at a pack that may change from now on. */
void obm__model_leave(obm_model *m) {
    obm__weights_cancel(m);
    m->pulse = NULL;
    obm__model_pause(m);
    obm__guard_leave(&m->guard);
}

/* ---- describing ---- */

void obm_model_describe(const obm_model *m, obm_model_info *out) {
    const obm__config *c = &m->config;
    *out = (obm_model_info){.architecture = c->arch->model_type,
                            .vocab = m->vocab,
                            .hidden = c->hidden,
                            .intermediate = c->intermediate,
                            .layers = c->layers,
                            .heads = c->heads,
                            .kv_heads = c->kv_heads,
                            .head_dim = c->head_dim,
                            .max_positions = c->max_positions,
                            .sliding_window = c->window,
                            .tied = c->tied,
                            .params = m->params,
                            .bytes = m->base_bytes,
                            .z12_bytes = m->z12_bytes,
                            .z12_plain = m->z12_saved,
                            .z12_to_come = m->z12_to_come,
                            .prefill = m->prefill};
}

const obm_pack *obm_model_pack(const obm_model *m) { return m->pack; }
const obm_tokenizer *obm_model_tokenizer(const obm_model *m) { return m->tokenizer; }
size_t obm__model_tasks(const obm_model *m) { return m->pack ? m->pack->n_experts : 0; }

void obm_model_account(const obm_model *m, obm_model_memory *out) {
    uint64_t coefficients = m->hard_routes ? obm__coefficient_cache_bytes(m->hard_routes->cache) : 0;
    if (m->spare) coefficients += obm__planes_route_bytes(m->spare);
    uint64_t plain = m->base_bytes - (m->z12_beside ? 0 : m->z12_saved);
    uint64_t base = plain + m->z12_bytes + obm__place_more(m, OBM_PLACED_WEIGHTS);
    *out = (obm_model_memory){.base = base,
                              .planes = m->signs_bytes + m->terms_bytes + coefficients +
                                        obm__place_more(m, OBM_PLACED_PLANES),
                              .overlays = m->overlay_bytes,
                              .kv = m->kv_bytes,
                              .scratch = m->scratch.bytes};
}

/* ---- logits and hidden states ---- */

obm_status obm__model_check_ids(const obm_model *m, const obm__weights *w, const int32_t *ids, size_t n,
                                obm_error *err) {
    int64_t vocab = obm__weights_vocab(w);
    if (!n) return obm__fail(err, OBM_E_ARG, "expected at least one token id, found none");
    if (n > (uint64_t)m->config.max_positions)
        return obm__fail(err, OBM_E_ARG,
                         "%zu tokens are more than the %lld positions of the model (max_position_embeddings)", n,
                         (long long)m->config.max_positions);
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            return obm__fail(err, OBM_E_ARG, "token id %d at index %zu is outside the vocabulary of %lld", ids[i], i,
                             (long long)vocab);
    return OBM_OK;
}

/* Copies what one chunk computed into the caller's array. */
typedef struct collector {
    bool logits, all;
    size_t total;     /* tokens of the prompt */
    float *out;
} collector;

static obm_status collect(void *arg, obm_model *m, const obm__row *rows, size_t n, obm_error *err) {
    collector *c = arg;
    size_t which[OBM_CHUNK_ROWS], count = 0;
    for (size_t i = 0; i < n; i++)
        if (rows[i].sequence && (c->all || rows[i].position + 1 == (int64_t)c->total)) which[count++] = i;
    if (!count) return OBM_OK;
    size_t width = (size_t)(c->logits ? m->vocab : m->config.hidden);
    float *out = c->out + (c->all ? (size_t)rows[which[0]].position * width : 0);
    if (c->logits) return obm__forward_logits(m, rows, which, count, out, err);
    for (size_t i = 0; i < count; i++) memcpy(out + i * width, m->scratch.x + which[i] * width, width * sizeof *out);
    return OBM_OK;
}

static obm_status run(obm_model *m, const int32_t *ids, size_t n, int64_t layers, const obm_run_options *options,
                      collector *c, obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_run_options, options, err));
    obm__pulse pulse = obm__pulse_new(m->ctx, NULL, NULL, c->logits ? "logits" : "hidden", n);
    obm__sequence *s = NULL;
    const double *route = OBM_OPT(options, obm_run_options, route, NULL);
    if (route && !m->pack) return obm__fail(err, OBM_E_ARG, "a route applies to a pack, and this is a plain model");
    OBM_TRY(obm__model_enter(m, &pulse, err));
    obm_status status = obm__sequence_new(m, route, OBM_OPT(options, obm_run_options, kv, m->kv), &s, err);
    if (status == OBM_OK) status = obm__model_check_ids(m, s->weights, ids, n, err);
    if (status == OBM_OK) status = obm__sequence_expect(m, s, (int64_t)n, err);
    if (status == OBM_OK)
        status = obm__prefill(m, s, ids, n, OBM_OPT(options, obm_run_options, decode, false), layers, collect, c, err);
    obm__sequence_free(m, s);
    obm__model_leave(m);
    return status;
}

obm_status obm_model_logits(obm_model *m, const int32_t *ids, size_t n, const obm_run_options *options, float *out,
                            obm_error *err) {
    collector c = {.logits = true, .all = OBM_OPT(options, obm_run_options, all, false), .total = n, .out = out};
    return run(m, ids, n, m->config.layers, options, &c, err);
}

static obm_status check_layer(const obm_model *m, int layer, obm_error *err) {
    if (layer >= 0 && layer <= m->config.layers) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "layer: expected 0 (embeddings) to %lld, found %d", (long long)m->config.layers,
                     layer);
}

obm_status obm_model_hidden(obm_model *m, const int32_t *ids, size_t n, int layer, const obm_run_options *options,
                            float *out, obm_error *err) {
    collector c = {.all = true, .total = n, .out = out};
    OBM_TRY(check_layer(m, layer, err));
    return run(m, ids, n, layer, options, &c, err);
}

/* ---- features ---- */

static obm_status add_hidden(void *arg, obm_model *m, const obm__row *rows, size_t n, obm_error *err) {
    double *sum = arg;
    (void)err;
    for (size_t i = 0; i < n; i++)
        for (int64_t h = 0; rows[i].sequence && h < m->config.hidden; h++)
            sum[h] += m->scratch.x[(int64_t)i * m->config.hidden + h];
    return OBM_OK;
}

obm_status obm__model_pool(obm_model *m, const int32_t *ids, size_t n, int layer, float *out, obm_error *err) {
    obm__sequence *s = NULL;
    size_t hidden = (size_t)m->config.hidden;
    OBM_TRY(check_layer(m, layer, err));
    double *sum = obm__calloc(hidden, sizeof *sum);
    if (!sum) return obm__fail_nomem(err, hidden * sizeof *sum);
    obm_status status = obm__sequence_new(m, NULL, OBM_F32, &s, err);
    if (status == OBM_OK && n) status = obm__model_check_ids(m, s->weights, ids, n, err);
    if (status == OBM_OK && n) status = obm__sequence_expect(m, s, (int64_t)n, err);
    if (status == OBM_OK && n) status = obm__prefill(m, s, ids, n, false, layer, add_hidden, sum, err);
    for (size_t h = 0; status == OBM_OK && h < hidden; h++) out[h] = n ? (float)(sum[h] / (double)n) : 0.0f;
    obm__sequence_free(m, s);
    obm_free(sum);
    return status;
}

/* The ids that the router sees: the user's words by the base tokenizer. */
static obm_status embed_one(obm_model *m, const obm_prompt *prompt, int layer, float *out, obm_error *err) {
    char *text = NULL;
    int32_t *ids = NULL;
    size_t len, n;
    obm_status status = obm__prompt_user_text(m->tokenizer, prompt, &text, &len, err);
    if (status == OBM_OK) status = obm__prompt_router_ids(m, text, len, &ids, &n, err);
    if (status == OBM_OK) status = obm__model_pool(m, ids, n, layer, out, err);
    obm_free(ids);
    obm_free(text);
    return status;
}

obm_status obm_model_embed(obm_model *m, const obm_prompt *prompts, size_t n, int layer, obm_progress_fn progress,
                           void *user, float *out, obm_error *err) {
    obm__pulse pulse = obm__pulse_new(m->ctx, progress, user, "embed", n);
    if (!m->tokenizer)
        return obm__fail(err, OBM_E_ARG, "%s: no tokenizer.json here%s", obm_checkpoint_path(m->base),
                         obm__tokenizer_hint(m->base->directory));
    OBM_TRY(obm__model_enter(m, &pulse, err));
    obm_status status = OBM_OK;
    for (size_t i = 0; i < n && status == OBM_OK; i++) {
        status = embed_one(m, &prompts[i], layer, out + i * (size_t)m->config.hidden, err);
        if (status == OBM_OK) status = obm__pulse_done(&pulse, i + 1, err);
    }
    obm__model_leave(m);
    return status;
}
