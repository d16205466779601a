/*
 * Routers: which task is this prompt?  The built-in one is a multinomial logistic regression on mean-pooled hidden
 * states of the base; any callback can take its place.
 */
#ifndef OBM_ROUTER_H
#define OBM_ROUTER_H

#include "../io/pack.h"

/* What a router sees of a prompt: at most this many tokens, the last ones; the same in training. */
#define OBM_ROUTER_TOKENS 512

/* softmax(weight * ((x - mean) * scale) + bias), x the pooled features after `layer`.  Immutable, share freely. */
struct obm__router {
    int layer;
    int64_t width;       /* of the features */
    size_t tasks;        /* pack order */
    float *mean, *scale; /* (width): scale = 1 / standard deviation, 0 for a constant feature */
    float *weight;       /* (tasks, width) */
    float *bias;         /* (tasks) */
    obm_router_report report;
};
/* From the pack's router.safetensors and its report; *out NULL for a pack without one.  obm_pack_open calls it and
 * obm_pack_free frees it. */
obm_status obm__router_load(const obm_pack *p, obm__router **out, obm_error *err);
void obm__router_free(obm__router *r);
/* NOTFOUND, and what trains one. */
obm_status obm__fail_no_router(const obm_pack *p, obm_error *err);
/* features: (width) as obm_model_embed gives them; probabilities: (tasks), sum 1, computed in f64. */
void obm__router_probabilities(const obm__router *r, const float *features, double *probabilities);

size_t obm__router_argmax(const double *probabilities, size_t tasks); /* the first among equals */

/* ---- training (router.c) ---- */

/* Stratified by task, deterministic in the seed; at least one example of each task on either side.  Rows of the data.
 */
typedef struct obm__holdout_options {
    double holdout;
    uint64_t seed;
} obm__holdout_options;
typedef struct obm__holdout {
    uint32_t *train, *held;
    size_t n_train, n_held;
} obm__holdout;
obm_status obm__holdout_new(const uint32_t *label, size_t n, size_t tasks, const obm__holdout_options *o,
                            obm__holdout *out, obm_error *err);
void obm__holdout_clear(obm__holdout *s);
/* Accuracy, confusion and calibration of the held-out rows. */
void obm__router_measure(const obm__router *r, const float *features, const uint32_t *label, const obm__holdout *s,
                         obm_router_report *out);
/* Everything of obm_router_train that comes after the features, (n, width), and before the pack.  options as there. */
obm_status obm__router_fit(obm_context *ctx, const float *features, int64_t width, const uint32_t *label, size_t n,
                           size_t tasks, int layer, const obm_router_options *options, obm__router **out,
                           obm_error *err);

/* ---- requests (request.c) ---- */

/* The route of one prompt on a model that the caller holds already (no BUSY guard is entered): the built-in router's
 * one-hot argmax (fn NULL) or what the callback answers.  weights: (tasks); probabilities: (tasks) or NULL, the
 * built-in's (NaN where a callback routes and the pack has no router).  A callback's OBM_E_USER travels unchanged. */
obm_status obm__route_prompt(obm_model *m, const obm_prompt *prompt, obm_router_fn fn, void *user, double *weights,
                             double *probabilities, obm_error *err);
/* The same for a text as it is, of `len` bytes. */
obm_status obm__route_text(obm_model *m, const char *text, size_t len, obm_router_fn fn, void *user, double *weights,
                           obm_error *err);
/* The user's words in a prompt: user turns joined by "\n", else the text, else the decoded ids.  *text owned, *len
 * bytes. */
obm_status obm__prompt_user_text(const obm_tokenizer *t, const obm_prompt *prompt, char **text, size_t *len,
                                 obm_error *err);
/* The last OBM_ROUTER_TOKENS ids of that text by the base tokenizer, without the post-processor's tokens.  *ids owned.
 */
obm_status obm__prompt_router_ids(const obm_model *m, const char *text, size_t len, int32_t **ids, size_t *n,
                                  obm_error *err);

#endif
