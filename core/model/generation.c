/* One running sequence: routing, prefill, drawing tokens, stop strings.  It does not know its neighbours. */
#include "generation.h"

#include "../text/text.h"

#include <string.h>

/* ---- settings ---- */

static obm_status copy_stops(obm__settings *s, const char *const *stop, size_t n, obm_error *err) {
    s->stop = obm__calloc(n, sizeof *s->stop);
    s->stop_len = obm__calloc(n, sizeof *s->stop_len);
    if (!s->stop || !s->stop_len) return obm__fail_nomem(err, n * sizeof *s->stop);
    for (s->n_stop = 0; s->n_stop < n; s->n_stop++) {
        if (!stop[s->n_stop] || !*stop[s->n_stop])
            return obm__fail(err, OBM_E_ARG, "stop string %zu is empty", s->n_stop);
        s->stop[s->n_stop] = obm__strdup(stop[s->n_stop]);
        if (!s->stop[s->n_stop]) return obm__fail_nomem(err, strlen(stop[s->n_stop]));
        s->stop_len[s->n_stop] = strlen(stop[s->n_stop]);
    }
    return OBM_OK;
}

static obm_status check_routes(const obm_model *m, const obm_generate_options *o, size_t n_prompts, obm_error *err) {
    size_t n_routes = OBM_OPT(o, obm_generate_options, n_routes, 0);
    bool routed = OBM_OPT(o, obm_generate_options, routes, NULL) != NULL;
    bool asks = OBM_OPT(o, obm_generate_options, router, NULL) || OBM_OPT(o, obm_generate_options, route_every, 0);
    if (!m->pack && (routed || asks))
        return obm__fail(err, OBM_E_ARG, "routes and routers apply to a pack, and this is a plain model");
    if (routed && n_routes != 1 && n_routes != n_prompts)
        return obm__fail(err, OBM_E_ARG, "expected one route, or one for each of the %zu prompts, found %zu", n_prompts,
                         n_routes);
    return OBM_OK;
}

obm_status obm__settings_init(obm__settings *s, const obm_model *m, const obm_generate_options *o, size_t n_prompts,
                              obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_generate_options, o, err));
    *s = (obm__settings){.options = o,
                         .max_tokens = OBM_OPT(o, obm_generate_options, max_tokens, 0),
                         .ignore_eos = OBM_OPT(o, obm_generate_options, ignore_eos, false),
                         .chat = OBM_OPT(o, obm_generate_options, chat, false),
                         .route_every = OBM_OPT(o, obm_generate_options, route_every, 0),
                         .router = OBM_OPT(o, obm_generate_options, router, NULL),
                         .router_user = OBM_OPT(o, obm_generate_options, router_user, NULL)};
    size_t n_stop = OBM_OPT(o, obm_generate_options, n_stop, 0);
    obm__sampler probe;
    const char *name = OBM_OPT(o, obm_generate_options, template_name, NULL);
    if (!s->max_tokens) s->max_tokens = 256;
    if (name) OBM_TRY(obm__template_find(name, &s->template_name, err));
    OBM_TRY(check_routes(m, o, n_prompts, err));
    OBM_TRY(obm__sampler_init(&probe, m->ctx->k, o, 0, 1, err)); /* ranges are refused before any work */
    obm__sampler_clear(&probe);
    obm_status status = n_stop ? copy_stops(s, o->stop, n_stop, err) : OBM_OK;
    if (status != OBM_OK) obm__settings_clear(s);
    return status;
}

void obm__settings_clear(obm__settings *s) {
    for (size_t i = 0; i < s->n_stop; i++) obm_free(s->stop[i]);
    obm_free(s->stop);
    obm_free(s->stop_len);
    *s = (obm__settings){0};
}

/* ---- text and stop strings ---- */

/* Where the first stop string that is complete begins, looking at bytes from `from` on as if they came one by one (so
 * that token boundaries do not matter); of several that end together the longest.  SIZE_MAX: none. */
static size_t find_stop(const obm__generation *g, size_t from) {
    for (size_t end = from + 1; end <= g->text.size; end++) {
        size_t longest = 0;
        for (size_t i = 0; i < g->settings->n_stop; i++) {
            size_t len = g->settings->stop_len[i];
            if (len > longest && len <= end && !memcmp(g->text.data + end - len, g->settings->stop[i], len))
                longest = len;
        }
        if (longest) return end - longest;
    }
    return SIZE_MAX;
}

/* Bytes at the end that may be the beginning of a stop string. */
static size_t held_back(const obm__generation *g) {
    size_t held = 0;
    for (size_t i = 0; i < g->settings->n_stop; i++) {
        size_t len = g->settings->stop_len[i] - 1;
        for (len = len < g->text.size ? len : g->text.size; len > held; len--)
            if (!memcmp(g->text.data + g->text.size - len, g->settings->stop[i], len)) held = len;
    }
    return held;
}

static void end(obm__generation *g, obm_finish finish) {
    g->finished = true;
    g->finish = finish;
}

static obm_status add_text(obm__generation *g, const char *text, size_t len, obm_error *err) {
    size_t before = g->text.size;
    obm__buffer_add(&g->text, text, len);
    if (g->text.failed) return obm__fail_nomem(err, len);
    size_t stop = find_stop(g, before);
    if (stop != SIZE_MAX) {
        g->text.size = stop;
        g->text.data[stop] = 0;
        end(g, OBM_FINISH_STOP);
    }
    g->safe = g->text.size - (g->finished ? 0 : held_back(g));
    return OBM_OK;
}

static obm_status flush_text(obm__generation *g, obm_error *err) {
    const char *text;
    size_t len;
    if (!g->decoder) return OBM_OK;
    OBM_TRY(obm__decode_stream_flush(g->decoder, &text, &len, err));
    OBM_TRY(add_text(g, text, len, err));
    g->safe = g->text.size;
    return OBM_OK;
}

/* ---- tokens ---- */

static bool is_eos(const obm__model_text *words, int32_t id) {
    for (size_t i = 0; i < words->n_eos; i++)
        if (words->eos[i] == id) return true;
    return false;
}

static obm_status append_id(obm__generation *g, int32_t id, obm_error *err) {
    if (g->n_ids == g->capacity) {
        int32_t *ids = obm__realloc(g->ids, g->capacity * 2 + 16, sizeof *ids);
        if (!ids) return obm__fail_nomem(err, (g->capacity * 2 + 16) * sizeof *ids);
        g->ids = ids;
        g->capacity = g->capacity * 2 + 16;
    }
    g->ids[g->n_ids++] = id;
    return OBM_OK;
}

typedef struct draw_job {
    const obm_model *m;
    obm__generation *const *g;
    float *logits; /* (n, vocab): those that follow the last token of each */
} draw_job;

static void draw_rows(void *arg, size_t begin, size_t end, int worker) {
    const draw_job *j = arg;
    size_t vocab = (size_t)j->m->vocab;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        obm__generation *g = j->g[i];
        float *own = j->logits + i * vocab;
        bool fit = obm__logits_check(g->sampler.k, own, j->m->vocab, 0, 0, NULL) == OBM_OK;
        g->drawn = fit ? obm__sample(&g->sampler, own, g->ids, g->n_ids, g->n_ids - g->n_prompt) : -1;
    }
}

/* A row each: with a temperature, drawing takes an exp for every id. */
static void draw(const obm_model *m, obm__generation *const *g, size_t n, float *logits) {
    obm__place_rows(m, n, 1, draw_rows, &(draw_job){m, g, logits});
}

/* What was drawn.  An end-of-sequence id is part of the ids and not of the text. */
static obm_status accept_drawn(obm_model *m, obm__generation *g, const float *logits, obm_error *err) {
    const char *text;
    size_t len, step = g->n_ids - g->n_prompt;
    if (g->drawn < 0)
        return obm__logits_check(g->sampler.k, logits, m->vocab, g->n_ids - 1, (size_t)g->sampler.stream, err);
    OBM_TRY(append_id(g, g->drawn, err));
    if (!g->settings->ignore_eos && is_eos(g->words, g->drawn)) {
        end(g, OBM_FINISH_STOP);
        return flush_text(g, err);
    }
    if (g->decoder) {
        OBM_TRY(obm__decode_stream_push(g->decoder, g->drawn, &text, &len, err));
        OBM_TRY(add_text(g, text, len, err));
        if (g->finished) return OBM_OK;
    }
    bool full = g->n_ids >= (size_t)m->config.max_positions;
    if (step + 1 < g->settings->max_tokens && !full) return OBM_OK;
    if (full && step + 1 < g->settings->max_tokens && !m->warned_of_length++)
        obm__warn(m->ctx,
                  "the %lld positions of the model (max_position_embeddings) are used up after a prompt of %zu tokens and "
                  "%zu new ones: the text ends there",
                  (long long)m->config.max_positions, g->n_prompt, step + 1);
    end(g, OBM_FINISH_LENGTH);
    return flush_text(g, err);
}

/* ---- start ---- */

static obm_status choose_route(obm_model *m, obm__generation *g, const obm_prompt *prompt, size_t index,
                               obm_error *err) {
    const obm_generate_options *o = g->settings->options;
    size_t tasks = obm__model_tasks(m);
    if (!m->pack) return OBM_OK;
    g->route = obm__calloc(tasks, sizeof *g->route);
    if (!g->route) return obm__fail_nomem(err, tasks * sizeof *g->route);
    const double *routes = OBM_OPT(o, obm_generate_options, routes, NULL);
    const bool *routed = OBM_OPT(o, obm_generate_options, routed, NULL);
    size_t row = routes && o->n_routes > 1 ? index : 0;
    if (routes && (!routed || routed[row])) {
        memcpy(g->route, routes + row * tasks, tasks * sizeof *routes);
        return obm__reroute_start(m, g, prompt, true, err);
    }
    OBM_TRY(obm__route_prompt(m, prompt, g->settings->router, g->settings->router_user, g->route, NULL, err));
    return obm__reroute_start(m, g, prompt, false, err);
}

static obm_status note_first_route(const obm_model *m, obm__generation *g, obm_error *err) {
    size_t tasks = obm__model_tasks(m);
    if (!g->route) return OBM_OK;
    g->first_route = obm__calloc(tasks, sizeof *g->first_route);
    if (!g->first_route) return obm__fail_nomem(err, tasks * sizeof *g->first_route);
    memcpy(g->first_route, g->route, tasks * sizeof *g->route);
    return OBM_OK;
}

/* The route comes first: it decides what the prompt's ids are. */
static obm_status start(obm_model *m, obm__generation *g, const obm_prompt *prompt, size_t index, obm_error *err) {
    const obm_generate_options *o = g->settings->options;
    OBM_TRY(choose_route(m, g, prompt, index, err));
    OBM_TRY(note_first_route(m, g, err));
    g->words = obm__model_text_for(m, g->route);
    const obm_tokenizer *t = g->words->tokenizer;
    const obm__prompter how = {m, t, OBM_OPT(o, obm_generate_options, render, NULL),
                               OBM_OPT(o, obm_generate_options, render_user, NULL), g->settings->template_name};
    if (g->settings->n_stop && !t)
        return obm__fail(err, OBM_E_ARG, "%s: stop strings need a tokenizer.json", obm_checkpoint_path(m->base));
    OBM_TRY(obm__prompt_ids(&how, prompt, g->settings->chat, &g->ids, &g->n_ids, err));
    g->n_prompt = g->capacity = g->n_ids;
    OBM_TRY(obm__sampler_init(&g->sampler, m->ctx->k, o, index, m->vocab, err));
    return t ? obm__decode_stream_new(t, true, &g->decoder, err) : OBM_OK;
}

obm_status obm__generation_new(obm_model *m, const obm__settings *s, const obm_prompt *prompt, size_t index,
                               obm__generation **out, obm_error *err) {
    obm__generation *g = obm__calloc(1, sizeof *g);
    if (!g) return obm__fail_nomem(err, sizeof *g);
    g->settings = s;
    obm_status status = start(m, g, prompt, index, err);
    if (status == OBM_OK)
        *out = g;
    else
        obm__generation_free(m, g);
    return status;
}

void obm__generation_free(obm_model *m, obm__generation *g) {
    if (!g) return;
    obm__sequence_free(m, g->sequence);
    obm__sampler_clear(&g->sampler);
    if (g->decoder) obm__decode_stream_free(g->decoder);
    obm__buffer_free(&g->text);
    obm__reroute_clear(&g->reroute);
    obm_free(g->route);
    obm_free(g->first_route);
    obm_free(g->ids);
    obm_free(g);
}

obm_status obm__generation_admit(obm_model *m, obm__generation *g, bool *admitted, obm_error *err) {
    OBM_TRY(obm__sequence_admit(m, g->route, m->kv, &g->sequence, err));
    *admitted = g->sequence != NULL;
    if (!*admitted) return OBM_OK;
    OBM_TRY(obm__model_check_ids(m, g->sequence->weights, g->ids, g->n_ids, err));
    size_t longest = g->n_prompt + g->settings->max_tokens - 1; /* the last token is not run */
    return obm__sequence_expect(m, g->sequence, longest < INT64_MAX ? (int64_t)longest : INT64_MAX, err);
}

/* ---- prompts that begin alike ---- */

bool obm__generation_same_route(const obm_model *m, const obm__generation *a, const obm__generation *b) {
    return !m->pack || !memcmp(a->first_route, b->first_route, obm__model_tasks(m) * sizeof *a->first_route);
}

/* The last token has to run, for its logits. */
size_t obm__generation_common(const obm_model *m, const obm__generation *g, const obm__generation *from) {
    size_t n = g->n_prompt - 1 < from->n_prompt ? g->n_prompt - 1 : from->n_prompt, i = 0, pages;
    if (!from->sequence || !obm__generation_same_route(m, g, from)) return 0;
    if (!obm__sequence_alike(m, g->sequence, from->sequence)) return 0;
    while (i < n && g->ids[i] == from->ids[i]) i++;
    pages = i / OBM_TILE_TOKENS;
    return pages < from->sequence->n_pages ? pages : from->sequence->n_pages;
}

obm_status obm__generation_reserve(obm_model *m, obm__generation *g, obm__generation *from, size_t pages, obm_error *err) {
    g->shared = pages;
    if (from) OBM_TRY(obm__sequence_share(g->sequence, from->sequence, pages, err));
    if (from && from->shared < pages) from->shared = pages;
    return obm__sequence_reserve(m, g->sequence, (int64_t)g->n_prompt, err);
}

void obm__generation_cut(obm_model *m, obm__generation *g, size_t pages) {
    if (pages > g->n_prompt / OBM_TILE_TOKENS) pages = g->n_prompt / OBM_TILE_TOKENS;
    obm__sequence_cut(m, g->sequence, pages);
}

/* ---- prefill ---- */

/* Tiles of several prompts in one forward call: a panel of weights is loaded and converted once for all of them. */
typedef struct chunk {
    obm__row rows[OBM_CHUNK_ROWS];
    size_t n;
    size_t last[OBM_CHUNK_ROWS / OBM_TILE_TOKENS]; /* rows that end a prompt */
    obm__generation *ended[OBM_CHUNK_ROWS / OBM_TILE_TOKENS];
    size_t n_ended;
} chunk;

/* As many tiles of g as there is room for; true when its prompt is in. */
static bool add_tiles(chunk *c, obm__generation *g) {
    obm__sequence *s = g->sequence;
    size_t done = (size_t)s->length, n_rows;
    size_t take = obm__fill_tiles(s, g->ids + done, g->n_prompt - done, c->rows + c->n, OBM_CHUNK_ROWS - c->n, &n_rows);
    s->length += (int64_t)take;
    if (done + take == g->n_prompt) {
        c->last[c->n_ended] = c->n + done % OBM_TILE_TOKENS + take - 1;
        c->ended[c->n_ended++] = g;
    }
    c->n += n_rows;
    return done + take == g->n_prompt;
}

/* The head runs for the last tokens only. */
static obm_status run_chunk(obm_model *m, const chunk *c, float *logits, obm_error *err) {
    OBM_TRY(obm__forward(m, c->rows, c->n, true, m->config.layers, err));
    if (!c->n_ended) return OBM_OK;
    OBM_TRY(obm__forward_logits(m, c->rows, c->last, c->n_ended, logits, err));
    draw(m, c->ended, c->n_ended, logits);
    for (size_t i = 0; i < c->n_ended; i++)
        OBM_TRY(accept_drawn(m, c->ended[i], logits + i * (size_t)m->vocab, err));
    return OBM_OK;
}

obm_status obm__generation_prefill(obm_model *m, obm__generation *const *g, size_t n, float *logits, obm_error *err) {
    for (size_t i = 0; i < n;) {
        chunk c;
        c.n = c.n_ended = 0;
        while (i < n && c.n < OBM_CHUNK_ROWS)
            if (add_tiles(&c, g[i])) i++;
        OBM_TRY(run_chunk(m, &c, logits, err));
    }
    return OBM_OK;
}

/* ---- step ---- */

obm_status obm__generation_step(obm_model *m, obm__generation *const *g, size_t n, float *logits, obm_error *err) {
    obm__row *rows = obm__calloc(n, sizeof *rows);
    size_t *which = obm__calloc(n, sizeof *which);
    obm_status status = OBM_OK;
    if (!rows || !which) OBM_GO(obm__fail_nomem(err, n * sizeof *rows));
    OBM_GO(obm__z12_step(m, n, err));
    for (size_t i = 0; i < n; i++) {
        obm__sequence *s = g[i]->sequence;
        OBM_GO(obm__sequence_reserve(m, s, s->length + 1, err));
        rows[i] = (obm__row){s, s->length, g[i]->ids[g[i]->n_ids - 1]};
        which[i] = i;
    }
    OBM_GO(obm__forward(m, rows, n, false, m->config.layers, err));
    OBM_GO(obm__forward_logits(m, rows, which, n, logits, err));
    draw(m, g, n, logits);
    for (size_t i = 0; i < n; i++) {
        g[i]->sequence->length += g[i]->drawn >= 0; /* a stream that is asked again fails again */
        OBM_GO(accept_drawn(m, g[i], logits + i * (size_t)m->vocab, err));
    }
done:
    obm_free(rows);
    obm_free(which);
    return status;
}

obm_status obm__generation_take(obm_model *m, obm__generation *g, obm_completion *out, obm_error *err) {
    obm_completion c = {
        .text_len = g->text.size, .n_ids = g->n_ids - g->n_prompt, .n_prompt = g->n_prompt, .finish = g->finish};
    c.text = obm__strndup(g->text.data ? g->text.data : "", g->text.size);
    c.ids = obm__calloc(c.n_ids, sizeof *c.ids);
    if (!c.text || !c.ids) {
        obm_completion_clear(&c);
        return obm__fail_nomem(err, c.text_len + c.n_ids * sizeof *c.ids);
    }
    memcpy(c.ids, g->ids + g->n_prompt, c.n_ids * sizeof *c.ids);
    c.route = g->route;
    c.n_route = g->route ? obm__model_tasks(m) : 0;
    g->route = NULL;
    c.routes = g->reroute.routes;
    c.route_tokens = g->reroute.tokens;
    c.n_routes = g->reroute.n;
    g->reroute.routes = NULL;
    g->reroute.tokens = NULL;
    *out = c;
    return OBM_OK;
}
