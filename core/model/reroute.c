/* Routing again while a sequence runs: asking the router and letting its answer take over.  When that happens is
 * decided by the number of generated tokens alone, so that neighbours and the time a route takes to build change no
 * result. */
#include "generation.h"

#include <string.h>

void obm__reroute_clear(obm__reroute *r) {
    obm__buffer_free(&r->said);
    obm_free(r->next);
    obm_free(r->routes);
    obm_free(r->tokens);
}

static size_t generated(const obm__generation *g) { return g->n_ids - g->n_prompt; }

/* g->route holds from the next token on. */
static obm_status note_route(const obm_model *m, obm__generation *g, obm_error *err) {
    obm__reroute *r = &g->reroute;
    size_t tasks = obm__model_tasks(m), count;
    if (!obm__mul(r->n + 1, tasks, &count)) return obm__fail_nomem(err, UINT64_MAX);
    double *routes = obm__realloc(r->routes, count, sizeof *routes);
    if (routes) r->routes = routes;
    size_t *tokens = routes ? obm__realloc(r->tokens, r->n + 1, sizeof *tokens) : NULL;
    if (!tokens) return obm__fail_nomem(err, count * sizeof *routes);
    r->tokens = tokens;
    memcpy(r->routes + r->n * tasks, g->route, tasks * sizeof *routes);
    r->tokens[r->n++] = generated(g);
    return OBM_OK;
}

static obm_status keep_said(const obm_model *m, obm__generation *g, const obm_prompt *prompt, obm_error *err) {
    char *text;
    size_t len;
    OBM_TRY(obm__prompt_user_text(m->tokenizer, prompt, &text, &len, err));
    obm__buffer_add(&g->reroute.said, text, len);
    obm_free(text);
    if (prompt->messages || prompt->chat || g->settings->chat) obm__buffer_text(&g->reroute.said, "\n");
    return g->reroute.said.failed ? obm__fail_nomem(err, len) : OBM_OK;
}

obm_status obm__reroute_start(obm_model *m, obm__generation *g, const obm_prompt *prompt, bool fixed, obm_error *err) {
    obm__reroute *r = &g->reroute;
    if (!g->settings->route_every) return OBM_OK;
    OBM_TRY(note_route(m, g, err));
    if (fixed) return OBM_OK;
    r->next = obm__calloc(obm__model_tasks(m), sizeof *r->next);
    if (!r->next) return obm__fail_nomem(err, obm__model_tasks(m) * sizeof *r->next);
    if (m->tokenizer) OBM_TRY(keep_said(m, g, prompt, err));
    r->on = true;
    return OBM_OK;
}

/* ---- asking ---- */

static obm_status ask_text(obm_model *m, const obm__generation *g, double *answer, obm_error *err) {
    obm__buffer text = {0};
    obm__buffer_add(&text, g->reroute.said.data, g->reroute.said.size);
    obm__buffer_add(&text, g->text.data, g->text.size);
    obm_status status = text.failed ? obm__fail_nomem(err, g->reroute.said.size + g->text.size)
                                    : obm__route_text(m, text.data ? text.data : "", text.size, g->settings->router,
                                                      g->settings->router_user, answer, err);
    obm__buffer_free(&text);
    return status;
}

static obm_status ask_again(obm_model *m, obm__generation *g, obm_error *err) {
    obm__reroute *r = &g->reroute;
    const obm_prompt ids = {.ids = g->ids, .n_ids = g->n_ids};
    double answer[OBM_ROUTE_TASKS];
    if (m->tokenizer)
        OBM_TRY(ask_text(m, g, answer, err));
    else
        OBM_TRY(obm__route_prompt(m, &ids, g->settings->router, g->settings->router_user, answer, NULL, err));
    size_t bytes = obm__model_tasks(m) * sizeof *answer;
    memcpy(r->next, answer, bytes);
    r->switching = memcmp(r->next, g->route, bytes) != 0;
    r->asked = generated(g);
    return OBM_OK;
}

/* ---- taking over ---- */

/* Routes only add rows to the base's vocabulary, so that most ids need no look at the route. */
static obm_status knows_id(const obm_model *m, const double *route, int32_t id, bool *known, obm_error *err) {
    obm__route_plan *plan;
    obm_tensor shape;
    bool exists;
    size_t i = obm__model_tensor(m, 0, OBM_EMBEDDING);
    *known = id < m->config.vocab;
    if (*known || i == SIZE_MAX) return OBM_OK;
    OBM_TRY(obm__route_plan_new(m->pack, route, OBM_ROUTE_NONE, NULL, &plan, err));
    obm_status status = obm__route_shape(plan, i, &shape, &exists);
    obm__route_plan_free(plan);
    if (status != OBM_OK) return obm__fail(err, status, "the embedding has no shape under this route");
    *known = exists && id < shape.shape[0];
    return OBM_OK;
}

/* The old weights go before the new ones come: sequences that wait for each other's room would wait for ever. */
static obm_status take_over(obm_model *m, obm__generation *g, bool *ready, obm_error *err) {
    obm__reroute *r = &g->reroute;
    obm__weights *w;
    obm__weights_release(m, g->sequence->weights);
    g->sequence->weights = NULL;
    OBM_TRY(obm__weights_admit(m, r->next, &w, err));
    *ready = w != NULL;
    if (!w) return OBM_OK;
    g->sequence->weights = w;
    memcpy(g->route, r->next, obm__model_tasks(m) * sizeof *g->route);
    r->switching = false;
    return note_route(m, g, err);
}

obm_status obm__generation_reroute(obm_model *m, obm__generation *g, bool *ready, obm_error *err) {
    obm__reroute *r = &g->reroute;
    bool known = true;
    *ready = true;
    if (!r->on) return OBM_OK;
    if (generated(g) != r->asked && generated(g) % g->settings->route_every == 0) OBM_TRY(ask_again(m, g, err));
    if (!r->switching) return OBM_OK;
    if (g->sequence->weights) OBM_TRY(knows_id(m, r->next, g->ids[g->n_ids - 1], &known, err));
    return known ? take_over(m, g, ready, err) : OBM_OK;
}
