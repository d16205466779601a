/* Log-likelihoods of given continuations.  Arithmetic in f64 over f32 logits. */
#include "../text/text.h"
#include "model.h"

#include <math.h>
#include <string.h>

/* Rows of logits computed at a time: bounds the buffer, and still lets a block of the head serve many rows. */
#define SCORE_ROWS 64

/* ---- what is scored ---- */

typedef struct tokens {
    int32_t *ids;
    size_t n, first; /* ids[first ..] are scored; first >= 1 */
} tokens;

static bool has_prompt(const obm_prompt *p) { return p->ids ? p->n_ids > 0 : p->messages || (p->text && *p->text); }

static obm_status append(tokens *t, const int32_t *ids, size_t n, obm_error *err) {
    int32_t *all = obm__realloc(t->ids, t->n + n, sizeof *all);
    if (!all) return obm__fail_nomem(err, (t->n + n) * sizeof *all);
    if (n) memcpy(all + t->n, ids, n * sizeof *all);
    t->ids = all;
    t->n += n;
    return OBM_OK;
}

/* prompt + continuation as one text, so that the tokens at the seam are those a reader of the whole would see; what
 * comes after the prompt's own tokens is scored (lm-evaluation-harness does the same).  Where the whole starts with
 * other tokens than the prompt's, the seam lies inside a token, and the continuation is encoded on its own instead.
 * *done tells which. */
static obm_status encode_whole(const obm__prompter *how, const obm_score_item *item, tokens *t, bool *done,
                               obm_error *err) {
    char *text;
    bool special;
    int32_t *ids = NULL;
    size_t n;
    OBM_TRY(obm__prompt_text(how, &item->prompt, false, &text, &special, err));
    *done = false;
    if (!text) return OBM_OK;
    char *whole = obm__format("%s%s", text, item->continuation);
    obm_status status = whole ? obm_tokenizer_encode(how->tokenizer, whole, strlen(whole), special, &ids, &n, err)
                              : obm__fail_nomem(err, strlen(text));
    if (status == OBM_OK && n > t->n && !memcmp(ids, t->ids, t->n * sizeof *ids)) {
        *done = true;
        status = append(t, ids + t->n, n - t->n, err);
    }
    obm_free(text);
    obm_free(whole);
    obm_free(ids);
    return status;
}

static obm_status encode_apart(const obm__prompter *how, const char *text, bool special, tokens *t, obm_error *err) {
    int32_t *ids;
    size_t n;
    if (!how->tokenizer)
        return obm__fail(err, OBM_E_ARG, "%s: no tokenizer.json here, so continuations must be token ids%s",
                         obm_checkpoint_path(how->m->base), obm__tokenizer_hint(how->m->base->directory));
    OBM_TRY(obm_tokenizer_encode(how->tokenizer, text, strlen(text), special, &ids, &n, err));
    obm_status status = append(t, ids, n, err);
    obm_free(ids);
    return status;
}

static obm_status encode_item(const obm__prompter *how, const obm_score_item *item, tokens *t, obm_error *err) {
    bool whole = !has_prompt(&item->prompt), done = false;
    if (!whole) OBM_TRY(obm__prompt_ids(how, &item->prompt, false, &t->ids, &t->n, err));
    t->first = whole ? 1 : t->n;
    if (item->continuation_ids) return append(t, item->continuation_ids, item->n_continuation_ids, err);
    if (!whole && t->n) OBM_TRY(encode_whole(how, item, t, &done, err));
    return done ? OBM_OK : encode_apart(how, item->continuation, whole, t, err);
}

/* ---- scoring ---- */

typedef struct scorer {
    const tokens *t;
    size_t item;
    float *logits; /* (SCORE_ROWS, vocab) */
    double *out;   /* (n - first) */
    bool greedy;
} scorer;

/* What is left of the item before: another continuation of the same prompt goes on behind what they have in common. */
typedef struct past {
    obm__sequence *sequence; /* NULL: nothing */
    int32_t *ids;
    size_t n;      /* of them run */
    double *route; /* (tasks), NULL for a plain model */
} past;

static double log_probability(const float *logits, int64_t vocab, int32_t id, int32_t best) {
    double sum = 0, max = logits[best];
    for (int64_t i = 0; i < vocab; i++) sum += exp(logits[i] - max);
    return logits[id] - max - log(sum);
}

typedef struct row_job {
    const scorer *s;
    const obm_model *m;
    const obm__row *rows;
    const size_t *which;
    int32_t *best; /* (n) */
} row_job;

/* An exp for each id of the vocabulary. */
static void score_row(void *arg, size_t begin, size_t end, int worker) {
    const row_job *j = arg;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        const float *logits = j->s->logits + i * (size_t)j->m->vocab;
        size_t next = (size_t)j->rows[j->which[i]].position + 1;
        j->best[i] = obm__argmax(j->m->ctx->k, logits, j->m->vocab);
        j->s->out[next - j->s->t->first] = log_probability(logits, j->m->vocab, j->s->t->ids[next], j->best[i]);
    }
}

/* Rows which[0..n) predict the tokens after theirs. */
static obm_status score_rows(scorer *s, obm_model *m, const obm__row *rows, const size_t *which, size_t n,
                             obm_error *err) {
    int32_t best[SCORE_ROWS];
    OBM_TRY(obm__forward_logits(m, rows, which, n, s->logits, err));
    obm__place_rows(m, n, 1, score_row, &(row_job){s, m, rows, which, best});
    for (size_t i = 0; i < n; i++) {
        size_t next = (size_t)rows[which[i]].position + 1;
        OBM_TRY(obm__logits_check(m->ctx->k, s->logits + i * (size_t)m->vocab, m->vocab, next - 1, s->item, err));
        s->greedy = s->greedy && s->t->ids[next] == best[i];
    }
    return OBM_OK;
}

static obm_status visit(void *arg, obm_model *m, const obm__row *rows, size_t n, obm_error *err) {
    scorer *s = arg;
    size_t which[SCORE_ROWS], count = 0;
    for (size_t i = 0; i < n; i++) {
        size_t next = (size_t)rows[i].position + 1;
        if (!rows[i].sequence || next < s->t->first || next >= s->t->n) continue;
        which[count++] = i;
        if (count < SCORE_ROWS) continue;
        OBM_TRY(score_rows(s, m, rows, which, count, err));
        count = 0;
    }
    return count ? score_rows(s, m, rows, which, count, err) : OBM_OK;
}

static void forget(obm_model *m, past *p) {
    obm__sequence_free(m, p->sequence);
    obm_free(p->ids);
    obm_free(p->route);
    *p = (past){0};
}

/* The weights go: the next item's may need the room.  Without memory for it there is no past. */
static void remember(obm_model *m, past *p, obm__sequence *s, tokens *t, const double *route) {
    size_t tasks = obm__model_tasks(m);
    *p = (past){.sequence = s, .n = t->n - 1, .route = route ? obm__calloc(tasks, sizeof *route) : NULL};
    if (route && !p->route) {
        forget(m, p);
        return;
    }
    if (route) memcpy(p->route, route, tasks * sizeof *route);
    obm__sequence_cut(m, s, s->n_pages);
    p->ids = t->ids;
    t->ids = NULL;
}

/* The rows that predict what is scored have to run. */
static void continue_past(obm_model *m, past *p, const tokens *t, const double *route, obm__sequence *s) {
    size_t most = p->n < t->first - 1 ? p->n : t->first - 1, n = 0;
    if (!p->sequence || !obm__sequence_alike(m, p->sequence, s)) return;
    if (route && memcmp(route, p->route, obm__model_tasks(m) * sizeof *route)) return;
    while (n < most && t->ids[n] == p->ids[n]) n++;
    obm__sequence_continue(s, p->sequence, (int64_t)n);
}

/* The last token predicts nothing that is asked for, so it is not run. */
static obm_status run(obm_model *m, past *p, const double *route, tokens *t, scorer *s, obm_error *err) {
    obm__sequence *sequence = NULL;
    s->logits = obm__alloc((size_t)m->vocab * SCORE_ROWS, sizeof *s->logits);
    if (!s->logits) return obm__fail_nomem(err, (uint64_t)m->vocab * SCORE_ROWS * sizeof *s->logits);
    obm_status status = obm__sequence_new(m, route, m->kv, &sequence, err);
    if (status == OBM_OK) status = obm__model_check_ids(m, sequence->weights, t->ids, t->n, err);
    if (status == OBM_OK) status = obm__sequence_expect(m, sequence, (int64_t)t->n, err);
    if (status == OBM_OK) continue_past(m, p, t, route, sequence);
    forget(m, p);
    size_t done = sequence ? (size_t)sequence->length : 0;
    if (status == OBM_OK)
        status = obm__prefill(m, sequence, t->ids + done, t->n - 1 - done, false, m->config.layers, visit, s, err);
    if (status == OBM_OK)
        remember(m, p, sequence, t, route);
    else
        obm__sequence_free(m, sequence);
    obm_free(s->logits);
    return status;
}

/* A whole text has no prompt: the router sees the text itself. */
static obm_status choose_route(obm_model *m, const obm_score_item *item, double *route, obm_error *err) {
    size_t tasks = obm__model_tasks(m);
    if (item->route) {
        memcpy(route, item->route, tasks * sizeof *route);
        return OBM_OK;
    }
    obm_prompt whole = {.text = item->continuation};
    if (!item->continuation) whole = (obm_prompt){.ids = item->continuation_ids, .n_ids = item->n_continuation_ids};
    return obm__route_prompt(m, has_prompt(&item->prompt) ? &item->prompt : &whole, NULL, NULL, route, NULL, err);
}

static void summarise(obm_score *out, bool greedy) {
    out->logprob = 0;
    for (size_t i = 0; i < out->n; i++) out->logprob += out->token_logprobs[i];
    out->perplexity = exp(-out->logprob / (double)out->n);
    out->is_greedy = greedy;
}

static obm_status check_item(const obm_model *m, const obm_score_item *item, obm_error *err) {
    if (item->route && !m->pack)
        return obm__fail(err, OBM_E_ARG, "a route applies to a pack, and this is a plain model");
    if (!item->continuation_ids && !item->continuation)
        return obm__fail(err, OBM_E_ARG, "the continuation has neither text nor ids");
    return OBM_OK;
}

static obm_status nothing_to_score(const obm_score_item *item, const tokens *t, obm_error *err) {
    if (t->n && !has_prompt(&item->prompt))
        return obm__fail(err, OBM_E_ARG, "the prompt is empty: nothing comes before the only token to score");
    return obm__fail(err, OBM_E_ARG, "the continuation has no tokens to score");
}

/* The route comes first: it decides what the item's ids are. */
static obm_status score_item(obm_model *m, past *p, const obm_score_item *item, size_t index,
                             const obm_score_options *o, obm_score *out, obm_error *err) {
    tokens t = {0};
    obm_score r = {.n_route = obm__model_tasks(m)};
    obm__prompter how = {m, NULL, OBM_OPT(o, obm_score_options, render, NULL),
                         OBM_OPT(o, obm_score_options, render_user, NULL), NULL};
    obm_status status;
    OBM_GO(check_item(m, item, err));
    r.route = m->pack ? obm__calloc(r.n_route, sizeof *r.route) : NULL;
    if (m->pack && !r.route) OBM_GO(obm__fail_nomem(err, r.n_route * sizeof *r.route));
    if (m->pack) OBM_GO(choose_route(m, item, r.route, err));
    how.tokenizer = obm_model_tokenizer_for(m, r.route);
    OBM_GO(encode_item(&how, item, &t, err));
    if (t.n <= t.first) OBM_GO(nothing_to_score(item, &t, err));
    r.n = t.n - t.first;
    r.token_logprobs = obm__calloc(r.n, sizeof *r.token_logprobs);
    if (!r.token_logprobs) OBM_GO(obm__fail_nomem(err, r.n * sizeof *r.token_logprobs));
    scorer s = {.t = &t, .item = index, .out = r.token_logprobs, .greedy = true};
    OBM_GO(run(m, p, r.route, &t, &s, err));
    summarise(&r, s.greedy);
    *out = r;
    r = (obm_score){0};
done:
    obm_score_clear(&r);
    obm_free(t.ids);
    return status;
}

obm_status obm_model_score(obm_model *m, const obm_score_item *items, size_t n, const obm_score_options *options,
                           obm_score *out, obm_error *err) {
    obm__pulse pulse = obm__pulse_new(m->ctx, OBM_OPT(options, obm_score_options, progress, NULL),
                                      OBM_OPT(options, obm_score_options, progress_user, NULL), "score", n);
    OBM_TRY(OBM_CHECK(obm_score_options, options, err));
    obm_score *scores = obm__calloc(n, sizeof *scores);
    if (!scores) return obm__fail_nomem(err, n * sizeof *scores);
    obm_status status = obm__model_enter(m, &pulse, err);
    past p = {0};
    if (status == OBM_OK) {
        for (size_t i = 0; i < n && status == OBM_OK; i++) {
            status = obm__fail_at("item", i, score_item(m, &p, &items[i], i, options, &scores[i], err), err);
            if (status == OBM_OK) status = obm__pulse_done(&pulse, i + 1, err);
        }
        forget(m, &p);
        obm__model_leave(m);
    }
    for (size_t i = 0; i < n; i++) {
        if (status == OBM_OK)
            out[i] = scores[i];
        else
            obm_score_clear(&scores[i]);
    }
    obm_free(scores);
    return status;
}

void obm_score_clear(obm_score *s) {
    if (!s) return;
    obm_free(s->token_logprobs);
    obm_free(s->route);
    *s = (obm_score){0};
}
