/* Generation: many prompts through a fixed number of slots, or one prompt as a stream. */
#include "generation.h"

#include <string.h>

/* ---- batches ---- */

typedef struct batch {
    obm_model *m;
    const obm_prompt *prompts;
    size_t n, next, done;          /* prompts: all, started, finished */
    obm__settings settings;
    obm__pulse pulse;
    obm__generation **slots;       /* [size], running ones first */
    obm__generation *waiting;      /* prompt `next`, not admitted yet; NULL */
    size_t refused_at;             /* sequences that ran when there was no room for it; SIZE_MAX: worth a try */
    size_t *index;                 /* prompt of each slot */
    obm__generation **ended;       /* [size]: finished ones whose prompts others may share, the latest at the end */
    size_t n_ended;
    size_t size, running, ready;   /* ready: running ones whose weights are there, before those that wait for a route */
    float *logits;                 /* (size, vocab) */
    obm_completion *out;           /* [n] */
} batch;

/* ---- prompts that begin alike ---- */

/* With pages of the one that has most in common, of those that run or have ended. */
static obm_status reserve_pages(batch *b, obm__generation *g, obm_error *err) {
    obm__generation *best = NULL;
    size_t pages = 0;
    for (size_t i = 0; i < b->running + b->n_ended; i++) {
        obm__generation *from = i < b->running ? b->slots[i] : b->ended[i - b->running];
        size_t common = obm__generation_common(b->m, g, from);
        if (common > pages) pages = common, best = from;
    }
    return obm__generation_reserve(b->m, g, best, pages, err);
}

/* Another one has all that it could give. */
static bool is_superfluous(const obm__generation *g) {
    return !g->shared || g->sequence->pages[g->shared - 1]->users > 1;
}

static void drop_ended(batch *b, size_t i) {
    obm__generation_free(b->m, b->ended[i]);
    memmove(b->ended + i, b->ended + i + 1, (--b->n_ended - i) * sizeof *b->ended);
}

/* Of each route's last one all of its prompt is kept, of those before it what they have shared: of no more than there are
 * slots. */
static void keep_ended(batch *b, obm__generation *g) {
    for (size_t i = b->n_ended; i-- > 0;) {
        if (!obm__generation_same_route(b->m, g, b->ended[i])) continue;
        obm__generation_cut(b->m, b->ended[i], b->ended[i]->shared);
        if (is_superfluous(b->ended[i])) drop_ended(b, i);
    }
    obm__generation_cut(b->m, g, SIZE_MAX);
    if (b->n_ended == b->size) drop_ended(b, 0);
    b->ended[b->n_ended++] = g;
}

static void leave(batch *b, obm__generation *g) {
    if (b->next < b->n && g->sequence)
        keep_ended(b, g);
    else
        obm__generation_free(b->m, g);
}

/* ---- slots ---- */

/* Finished sequences leave; the last running one takes the free place. */
static obm_status collect(batch *b, obm_error *err) {
    for (size_t i = 0; i < b->running;) {
        if (!b->slots[i]->finished) {
            i++;
            continue;
        }
        OBM_TRY(obm__generation_take(b->m, b->slots[i], &b->out[b->index[i]], err));
        leave(b, b->slots[i]);
        b->running--;
        b->slots[i] = b->slots[b->running];
        b->index[i] = b->index[b->running];
        if (b->ready > b->running) b->ready = b->running;
        OBM_TRY(obm__pulse_done(&b->pulse, ++b->done, err));
    }
    return OBM_OK;
}

/* The next prompt, if its route fits; it waits in its slot, encoded and routed, until it does. */
static obm_status admit_waiting(batch *b, bool *admitted, obm_error *err) {
    if (!b->waiting) OBM_TRY(obm__generation_new(b->m, &b->settings, &b->prompts[b->next], b->next, &b->waiting, err));
    return obm__generation_admit(b->m, b->waiting, admitted, err);
}

static obm_status admit_next(batch *b, bool *admitted, obm_error *err) {
    obm_status status = admit_waiting(b, admitted, err);
    if (status != OBM_OK) return b->n > 1 ? obm__fail_at("prompt", b->next, status, err) : status;
    b->refused_at = *admitted || b->m->building ? SIZE_MAX : b->running;
    if (!*admitted) return OBM_OK;
    OBM_TRY(reserve_pages(b, b->waiting, err));
    b->slots[b->running] = b->waiting;
    b->waiting = NULL;
    b->index[b->running++] = b->next++;
    return OBM_OK;
}

/* A quarter of the slots is awaited, so that prompts come in together. */
static obm_status refill(batch *b, obm_error *err) {
    if (b->running && (b->size - b->running) * 4 < b->size) return OBM_OK;
    if (b->waiting && b->running >= b->refused_at) return OBM_OK; /* preparing a route takes time: not at every step */
    size_t first = b->running;
    bool admitted = true;
    b->m->decoding = b->ready > 0;
    while (b->running < b->size && b->next < b->n && admitted) {
        OBM_TRY(admit_next(b, &admitted, err));
        OBM_TRY(obm__pulse_check(&b->pulse, err));
    }
    OBM_TRY(obm__generation_prefill(b->m, b->slots + first, b->running - first, b->logits, err));
    return collect(b, err);
}

static void swap_slots(batch *b, size_t i, size_t j) {
    obm__generation *g = b->slots[i];
    size_t index = b->index[i];
    b->slots[i] = b->slots[j];
    b->index[i] = b->index[j];
    b->slots[j] = g;
    b->index[j] = index;
}

/* Those whose next route is not there yet stand last and wait; when all wait, the first is built right here. */
static obm_status reroute(batch *b, obm_error *err) {
    size_t ready = 0;
    b->m->decoding = b->ready > 0 && b->running > 1;
    for (size_t i = 0; i < b->running; i++) {
        bool is_ready;
        OBM_TRY(obm__generation_reroute(b->m, b->slots[i], &is_ready, err));
        if (is_ready) swap_slots(b, i, ready++);
    }
    b->ready = ready;
    return OBM_OK;
}

static obm_status run_batch(batch *b, obm_error *err) {
    while (b->done < b->n) {
        OBM_TRY(refill(b, err));
        OBM_TRY(reroute(b, err));
        if (!b->ready) continue;
        OBM_TRY(obm__generation_step(b->m, b->slots, b->ready, b->logits, err));
        OBM_TRY(collect(b, err));
    }
    return OBM_OK;
}

static obm_status start_batch(batch *b, const obm_generate_options *o, obm_error *err) {
    b->pulse = obm__pulse_new(b->m->ctx, OBM_OPT(o, obm_generate_options, progress, NULL),
                              OBM_OPT(o, obm_generate_options, progress_user, NULL), "generate", b->n);
    b->size = OBM_OPT(o, obm_generate_options, batch, 0);
    if (!b->size) b->size = 8;
    if (b->size > b->n) b->size = b->n;
    b->refused_at = SIZE_MAX;
    OBM_TRY(obm__settings_init(&b->settings, b->m, o, b->n, err));
    size_t count;
    b->slots = obm__calloc(b->size, sizeof *b->slots);
    b->ended = obm__calloc(b->size, sizeof *b->ended);
    b->index = obm__calloc(b->size, sizeof *b->index);
    b->out = obm__calloc(b->n, sizeof *b->out);
    b->logits = obm__mul(b->size, (size_t)b->m->vocab, &count) ? obm__alloc(count, sizeof *b->logits) : NULL;
    if (!b->slots || !b->ended || !b->index || !b->out || !b->logits)
        return obm__fail_nomem(err, (uint64_t)b->size * (uint64_t)b->m->vocab * 4);
    return OBM_OK;
}

static void clear_batch(batch *b) {
    for (size_t i = 0; i < b->running; i++) obm__generation_free(b->m, b->slots[i]);
    for (size_t i = 0; i < b->n_ended; i++) obm__generation_free(b->m, b->ended[i]);
    obm__generation_free(b->m, b->waiting);
    for (size_t i = 0; b->out && i < b->n; i++) obm_completion_clear(&b->out[i]);
    obm__settings_clear(&b->settings);
    obm_free(b->slots);
    obm_free(b->ended);
    obm_free(b->index);
    obm_free(b->out);
    obm_free(b->logits);
}

obm_status obm_model_generate_batch(obm_model *m, const obm_prompt *prompts, size_t n,
                                    const obm_generate_options *options, obm_completion *out, obm_error *err) {
    batch b = {.m = m, .prompts = prompts, .n = n};
    OBM_TRY(obm__model_enter(m, &b.pulse, err));
    obm_status status = start_batch(&b, options, err);
    if (status == OBM_OK) status = run_batch(&b, err);
    if (status == OBM_OK && n) {
        memcpy(out, b.out, n * sizeof *out);
        memset(b.out, 0, n * sizeof *out);   /* they are the caller's now */
    }
    clear_batch(&b);
    obm__model_leave(m);
    return status;
}

void obm_completion_clear(obm_completion *c) {
    if (!c) return;
    obm_free(c->text);
    obm_free(c->ids);
    obm_free(c->route);
    obm_free(c->routes);
    obm_free(c->route_tokens);
    *c = (obm_completion){0};
}

/* ---- streams ---- */

struct obm_stream {
    obm_model *m;
    obm__settings settings;
    obm__pulse pulse;
    obm__generation *g;
    float *logits;            /* (vocab) */
    size_t given;             /* bytes handed out */
    bool holds_model;
    obm_completion result;    /* views into g */
};

/* The cache and the weights go before the model does: whoever takes it next may be another thread. */
static void let_go(obm_stream *s) {
    if (!s->holds_model) return;
    if (s->g) obm__sequence_free(s->m, s->g->sequence);
    if (s->g) s->g->sequence = NULL;
    obm__model_leave(s->m);
    s->holds_model = false;
}

static obm_status open_stream(obm_stream *s, const obm_prompt *prompt, const obm_generate_options *o, obm_error *err) {
    OBM_TRY(obm__model_enter(s->m, &s->pulse, err));
    s->holds_model = true;
    s->pulse = obm__pulse_new(s->m->ctx, OBM_OPT(o, obm_generate_options, progress, NULL),
                              OBM_OPT(o, obm_generate_options, progress_user, NULL), "generate", 1);
    OBM_TRY(obm__settings_init(&s->settings, s->m, o, 1, err));
    s->logits = obm__alloc((size_t)s->m->vocab, sizeof *s->logits);
    if (!s->logits) return obm__fail_nomem(err, (uint64_t)s->m->vocab * sizeof *s->logits);
    bool admitted;   /* always: nothing else runs */
    OBM_TRY(obm__generation_new(s->m, &s->settings, prompt, 0, &s->g, err));
    OBM_TRY(obm__generation_admit(s->m, s->g, &admitted, err));
    OBM_TRY(obm__generation_reserve(s->m, s->g, NULL, 0, err));
    OBM_TRY(obm__generation_prefill(s->m, &s->g, 1, s->logits, err));
    s->settings.options = NULL;   /* the caller's struct may go now */
    return OBM_OK;
}

obm_status obm_stream_open(obm_model *m, const obm_prompt *prompt, const obm_generate_options *options,
                           obm_stream **out, obm_error *err) {
    obm_stream *s = obm__calloc(1, sizeof *s);
    if (!s) return obm__fail_nomem(err, sizeof *s);
    s->m = m;
    obm_status status = open_stream(s, prompt, options, err);
    if (status != OBM_OK) {
        obm_stream_free(s);
        return status;
    }
    obm__model_pause(m);
    *out = s;
    return OBM_OK;
}

static obm_status next_text(obm_stream *s, const char **text, size_t *len, obm_error *err) {
    obm__generation *g = s->g;
    if (!g->finished) OBM_TRY(obm__weights_check(s->m, err));
    while (!g->finished && g->safe == s->given) {
        bool ready;   /* always: nothing else runs */
        OBM_TRY(obm__generation_reroute(s->m, g, &ready, err));
        OBM_TRY(obm__generation_step(s->m, &s->g, 1, s->logits, err));
    }
    *text = g->safe > s->given ? g->text.data + s->given : NULL;
    *len = g->safe - s->given;
    s->given = g->safe;
    if (*text) return OBM_OK;
    let_go(s);
    return obm__pulse_done(&s->pulse, 1, err);
}

obm_status obm_stream_next(obm_stream *s, const char **text, size_t *len, obm_error *err) {
    if (!s->g->finished) OBM_TRY(obm__model_resume(s->m, err));
    obm_status status = next_text(s, text, len, err);
    if (s->holds_model) obm__model_pause(s->m);
    return status;
}

const obm_completion *obm_stream_result(const obm_stream *s) {
    obm_stream *view = (obm_stream *)s;   /* `result` is a cache of views, not state */
    const obm__generation *g = s->g;
    view->result = (obm_completion){.text = g->text.data,
                                    .text_len = g->safe,
                                    .ids = g->ids + g->n_prompt,
                                    .n_ids = g->n_ids - g->n_prompt,
                                    .route = g->route,
                                    .n_route = g->route ? obm__model_tasks(s->m) : 0,
                                    .n_prompt = g->n_prompt,
                                    .finish = g->finish,
                                    .routes = g->reroute.routes,
                                    .n_routes = g->reroute.n,
                                    .route_tokens = g->reroute.tokens};
    return &s->result;
}

void obm_stream_free(obm_stream *s) {
    if (!s) return;
    let_go(s);
    obm__generation_free(s->m, s->g);
    obm__settings_clear(&s->settings);
    obm_free(s->logits);
    obm_free(s);
}

obm_status obm_model_generate(obm_model *m, const char *prompt, const obm_generate_options *options,
                              obm_text_fn on_text, void *user, obm_error *err) {
    obm_prompt p = {.text = prompt};
    obm_stream *s;
    const char *text;
    size_t len;
    OBM_TRY(obm_stream_open(m, &p, options, &s, err));
    obm_status status;
    while ((status = obm_stream_next(s, &text, &len, err)) == OBM_OK && text)
        if (on_text && on_text(user, text, len)) {
            status = obm__fail(err, OBM_E_USER, "generate: stopped by the text callback");
            break;
        }
    obm_stream_free(s);
    return status;
}
