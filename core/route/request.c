/*
 * What a router is asked and what it answers: the request object with its lazy parts, the built-in router, callbacks.
 * Features are of the base alone, whatever route the model runs otherwise.
 */
#include "../model/model.h"
#include "../text/text.h"
#include "dynamic.h"

#include <math.h>
#include <string.h>

struct obm_request {
    obm_model *model;
    const obm_pack *pack;
    char *text;
    size_t length;
    int32_t *ids;
    size_t n_ids;
    obm_model_info info;
    float **features; /* (layers + 1), NULL until asked for */
    double *builtin;  /* NULL until asked for */
};

/* ---- what a router sees of a prompt ---- */

static obm_status join_user_turns(const obm_prompt *p, char **text, size_t *len, obm_error *err) {
    obm__buffer b = {0};
    bool first = true;
    for (size_t i = 0; i < p->n_messages; i++) {
        if (strcmp(p->messages[i].role, "user")) continue;
        if (!first) obm__buffer_text(&b, "\n");
        obm__buffer_text(&b, p->messages[i].content);
        first = false;
    }
    if (first) obm__buffer_text(&b, "");
    if (b.failed) {
        obm__buffer_free(&b);
        return obm__fail_nomem(err, 0);
    }
    *text = b.data;
    *len = b.size;
    return OBM_OK;
}

obm_status obm__prompt_user_text(const obm_tokenizer *t, const obm_prompt *p, char **text, size_t *len,
                                 obm_error *err) {
    if (p->messages) return join_user_turns(p, text, len, err);
    if (!p->text && p->ids && t) return obm_tokenizer_decode(t, p->ids, p->n_ids, true, text, len, err);
    const char *own = p->text ? p->text : "";
    char *copy = obm__strdup(own);
    if (!copy) return obm__fail_nomem(err, strlen(own));
    *text = copy;
    *len = strlen(own);
    return OBM_OK;
}

/* Moves the last OBM_ROUTER_TOKENS to the front. */
static size_t keep_last(int32_t *ids, size_t n) {
    if (n <= OBM_ROUTER_TOKENS) return n;
    memmove(ids, ids + n - OBM_ROUTER_TOKENS, OBM_ROUTER_TOKENS * sizeof *ids);
    return OBM_ROUTER_TOKENS;
}

obm_status obm__prompt_router_ids(const obm_model *m, const char *text, size_t len, int32_t **ids, size_t *n,
                                  obm_error *err) {
    const obm_tokenizer *t = obm_model_tokenizer(m);
    if (!t)
        return obm__fail(err, OBM_E_NOTFOUND, "%s: no tokenizer.json here, which routing a text needs%s",
                         obm_checkpoint_path(m->base), obm__tokenizer_hint(m->base->directory));
    OBM_TRY(obm_tokenizer_encode(t, text, len, false, ids, n, err));
    *n = keep_last(*ids, *n);
    return OBM_OK;
}

/* Without a tokenizer, a prompt of ids is routed by its ids and has no text. */
static obm_status take_ids(const obm_prompt *p, obm_request *r, obm_error *err) {
    r->ids = obm__alloc(p->n_ids, sizeof *r->ids);
    if (!r->ids) return obm__fail_nomem(err, p->n_ids * sizeof *r->ids);
    memcpy(r->ids, p->ids, p->n_ids * sizeof *r->ids);
    r->n_ids = keep_last(r->ids, p->n_ids);
    return OBM_OK;
}

static obm_status fill_request(obm_request *r, const obm_prompt *p, obm_error *err) {
    const obm_tokenizer *t = obm_model_tokenizer(r->model);
    OBM_TRY(obm__prompt_user_text(t, p, &r->text, &r->length, err));
    if (!t && !p->messages && !p->text && p->ids) return take_ids(p, r, err);
    return obm__prompt_router_ids(r->model, r->text, r->length, &r->ids, &r->n_ids, err);
}

static void clear_request(obm_request *r) {
    for (int64_t i = 0; r->features && i <= r->info.layers; i++) obm_free(r->features[i]);
    obm_free(r->features);
    obm_free(r->text);
    obm_free(r->ids);
    obm_free(r->builtin);
}

/* ---- the request, as callbacks see it ---- */

const char *obm_request_text(const obm_request *r) { return r->text; }

void obm_request_tokens(const obm_request *r, const int32_t **ids, size_t *n) {
    *ids = r->ids;
    *n = r->n_ids;
}

size_t obm_request_task_count(const obm_request *r) { return r->pack->n_experts; }

const char *obm_request_task_name(const obm_request *r, size_t task) {
    return task < r->pack->n_experts ? r->pack->experts[task].name : NULL;
}

obm_status obm_request_features(obm_request *r, int layer, const float **out, size_t *n, obm_error *err) {
    if (layer < 0 || layer > r->info.layers)
        return obm__fail(err, OBM_E_ARG, "request: layer %d, expected 0 to %lld", layer, (long long)r->info.layers);
    if (!r->features[layer]) {
        float *x = obm__calloc((size_t)r->info.hidden, sizeof *x);
        if (!x) return obm__fail_nomem(err, (size_t)r->info.hidden * sizeof *x);
        /* No token at all: the mean of nothing is taken as 0. */
        obm_status status = r->n_ids ? obm__model_pool(r->model, r->ids, r->n_ids, layer, x, err) : OBM_OK;
        if (status != OBM_OK) {
            obm_free(x);
            return status;
        }
        r->features[layer] = x;
    }
    *out = r->features[layer];
    *n = (size_t)r->info.hidden;
    return OBM_OK;
}

obm_status obm_request_builtin(obm_request *r, const double **out, obm_error *err) {
    const obm__router *router = r->pack->router;
    const float *features;
    size_t n;
    if (!router) return obm__fail_no_router(r->pack, err);
    if (!r->builtin) {
        OBM_TRY(obm_request_features(r, router->layer, &features, &n, err));
        if ((int64_t)n != router->width)
            return obm__fail(err, OBM_E_FORMAT, "pack %s: its router reads %lld features, the base has %zu",
                             r->pack->path, (long long)router->width, n);
        double *probabilities = obm__calloc(router->tasks, sizeof *probabilities);
        if (!probabilities) return obm__fail_nomem(err, router->tasks * sizeof *probabilities);
        obm__router_probabilities(router, features, probabilities);
        /* Softmax: one NaN is all NaN.  An infinite feature may also end as a task's logit of -Inf, which is silent. */
        if (r->pack->ctx->k->find_nonfinite(features, n) < n || isnan(probabilities[0])) {
            obm_free(probabilities);
            return obm__fail(err, OBM_E_VALUE, "pack %s: its router sees hidden states that are not finite",
                             r->pack->path);
        }
        r->builtin = probabilities;
    }
    *out = r->builtin;
    return OBM_OK;
}

/* ---- answers ---- */

static obm_status ask_builtin(obm_request *r, double *weights, obm_error *err) {
    const double *probabilities;
    OBM_TRY(obm_request_builtin(r, &probabilities, err));
    weights[obm__router_argmax(probabilities, r->pack->n_experts)] = 1;
    return OBM_OK;
}

/* What a callback raised is its own: only a failure that came without a message gets one. */
static obm_status ask_callback(obm_request *r, obm_router_fn fn, void *user, double *weights, obm_error *err) {
    obm_error own = {0};
    obm_status status = fn(user, r, weights, &own);
    if (status == OBM_OK) return obm__route_check(r->pack, weights, err);
    if (own.message[0]) {
        if (err) *err = own;
        return status;
    }
    return obm__fail(err, status, "the router callback failed (%s)", obm_status_name(status));
}

static obm_status fill_probabilities(obm_request *r, double *probabilities, obm_error *err) {
    const double *builtin = NULL;
    if (r->pack->router) OBM_TRY(obm_request_builtin(r, &builtin, err));
    for (size_t k = 0; k < r->pack->n_experts; k++) probabilities[k] = builtin ? builtin[k] : NAN;
    return OBM_OK;
}

static obm_status open_request(obm_model *m, obm_request *r, obm_error *err) {
    *r = (obm_request){.model = m, .pack = obm_model_pack(m)};
    if (!r->pack) return obm__fail(err, OBM_E_ARG, "routing needs a pack, and this is a plain model");
    if (r->pack->n_experts > OBM_ROUTE_TASKS)
        return obm__fail(err, OBM_E_UNSUPPORTED, "pack %s has %zu experts, routes take at most %d", r->pack->path,
                         r->pack->n_experts, OBM_ROUTE_TASKS);
    obm_model_describe(m, &r->info);
    r->features = obm__calloc((size_t)r->info.layers + 1, sizeof *r->features);
    return r->features ? OBM_OK : obm__fail_nomem(err, (size_t)r->info.layers * sizeof *r->features);
}

static obm_status ask(obm_request *r, obm_router_fn fn, void *user, double *weights, double *probabilities,
                      obm_error *err) {
    double answer[OBM_ROUTE_TASKS] = {0};
    OBM_TRY(fn ? ask_callback(r, fn, user, answer, err) : ask_builtin(r, answer, err));
    if (probabilities) OBM_TRY(fill_probabilities(r, probabilities, err));
    memcpy(weights, answer, r->pack->n_experts * sizeof *weights);
    return OBM_OK;
}

obm_status obm__route_prompt(obm_model *m, const obm_prompt *prompt, obm_router_fn fn, void *user, double *weights,
                             double *probabilities, obm_error *err) {
    obm_request r;
    obm_status status = open_request(m, &r, err);
    if (status == OBM_OK) status = fill_request(&r, prompt, err);
    if (status == OBM_OK) status = ask(&r, fn, user, weights, probabilities, err);
    clear_request(&r);
    return status;
}

obm_status obm__route_text(obm_model *m, const char *text, size_t len, obm_router_fn fn, void *user, double *weights,
                           obm_error *err) {
    obm_request r;
    obm_status status = open_request(m, &r, err);
    if (status == OBM_OK) {
        r.text = obm__strndup(text, len);
        r.length = len;
        status = r.text ? obm__prompt_router_ids(m, text, len, &r.ids, &r.n_ids, err) : obm__fail_nomem(err, len);
    }
    if (status == OBM_OK) status = ask(&r, fn, user, weights, NULL, err);
    clear_request(&r);
    return status;
}

obm_status obm_model_route(obm_model *m, const obm_prompt *prompt, obm_router_fn fn, void *user, double *weights,
                           double *probabilities, obm_error *err) {
    obm__pulse pulse = obm__pulse_new(m->ctx, NULL, NULL, "route", 1);
    OBM_TRY(obm__model_enter(m, &pulse, err));
    obm_status status = obm__route_prompt(m, prompt, fn, user, weights, probabilities, err);
    obm__model_leave(m);
    return status;
}
