/* One running sequence: prompt in, tokens and text out.  generate.c runs many of them together. */
#ifndef OBM_GENERATION_H
#define OBM_GENERATION_H

#include "../text/stream.h"
#include "model.h"

/* Options of a whole call, checked; owns its copies of the stop strings. */
typedef struct obm__settings {
    const obm_generate_options *options;   /* the caller's; read only while a sequence starts */
    size_t max_tokens;
    char **stop; size_t *stop_len; size_t n_stop;
    bool ignore_eos, chat;
    size_t route_every;
    obm_router_fn router; void *router_user;
    const char *template_name;   /* static; NULL: the model's own chat template */
} obm__settings;
obm_status obm__settings_init(obm__settings *s, const obm_model *m, const obm_generate_options *options, size_t n_prompts, obm_error *err);
void obm__settings_clear(obm__settings *s);

/* Routing again while a sequence runs (reroute.c). */
typedef struct obm__reroute {
    bool on;                       /* the router is asked again */
    obm__buffer said;              /* what it saw of the prompt */
    double *next;                  /* (tasks): its last answer */
    bool switching;                /* which has not taken over yet */
    size_t asked;                  /* tokens generated at the last question */
    double *routes;                /* (n, tasks): taken so far */
    size_t *tokens;                /* (n): generated before each */
    size_t n;
} obm__reroute;

typedef struct obm__generation {
    const obm__settings *settings;
    obm__sequence *sequence;       /* NULL until admitted */
    obm__sampler sampler;
    obm__decode_stream *decoder;   /* NULL without a tokenizer */
    double *route;                 /* (tasks), NULL for a plain model */
    double *first_route;           /* the same, of the prompt */
    const obm__model_text *words;  /* tokenizer and eos of the route */
    int32_t *ids;                  /* prompt, then generated */
    size_t n_ids, n_prompt, capacity;
    int32_t drawn;                 /* the token of this step; -1: its logits are not finite */
    size_t shared;                 /* first pages of the cache that another prompt had or took */
    obm__buffer text;
    size_t safe;                   /* bytes of text that no stop string can take back */
    bool finished;
    obm_finish finish;
    obm__reroute reroute;
} obm__generation;
/* Encodes and routes prompt `index`; no memory of the model is taken yet.  *out is owned. */
obm_status obm__generation_new(obm_model *m, const obm__settings *s, const obm_prompt *prompt, size_t index,
                               obm__generation **out, obm_error *err);
/* Prepares the weights of its route.  *admitted false: they do not fit the route budget beside those in use; ask again
 * later. */
obm_status obm__generation_admit(obm_model *m, obm__generation *g, bool *admitted, obm_error *err);
/* Of their prompts. */
bool obm__generation_same_route(const obm_model *m, const obm__generation *a, const obm__generation *b);
/* Whole pages of the cache that the prompt of g, which is admitted, has in common with that of `from` and can share. */
size_t obm__generation_common(const obm_model *m, const obm__generation *g, const obm__generation *from);
/* Room for the prompt: that many pages are those of `from` (NULL: none are), which is prefilled before g, or in the same
 * call and further in front. */
obm_status obm__generation_reserve(obm_model *m, obm__generation *g, obm__generation *from, size_t pages, obm_error *err);
/* Of a finished one first pages of its prompt alone remain, which others can share. */
void obm__generation_cut(obm_model *m, obm__generation *g, size_t pages);
/* Prefills n sequences with room together, from where their prompts are their own, and draws the first token of each. */
obm_status obm__generation_prefill(obm_model *m, obm__generation *const *g, size_t n, float *logits /* (n, vocab) */,
                                   obm_error *err);
void obm__generation_free(obm_model *m, obm__generation *g);
/* Decodes one token for each of n unfinished sequences in one forward call. */
obm_status obm__generation_step(obm_model *m, obm__generation *const *g, size_t n, float *logits /* (n, vocab) */,
                                obm_error *err);
/* Before a step: asks the router again where that is due and lets its answer take over.  *ready false: the new route's
 * weights are on their way, or do not fit beside those in use; the sequence holds no weights meanwhile and must not step. */
obm_status obm__generation_reroute(obm_model *m, obm__generation *g, bool *ready, obm_error *err);
/* Notes the first route, and what the router saw of the prompt. */
obm_status obm__reroute_start(obm_model *m, obm__generation *g, const obm_prompt *prompt, bool fixed, obm_error *err);
void obm__reroute_clear(obm__reroute *r);
/* Moves the results out. */
obm_status obm__generation_take(obm_model *m, obm__generation *g, obm_completion *out, obm_error *err);

#endif
