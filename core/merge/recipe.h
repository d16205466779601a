/* Recipes: mergekit's YAML (or JSON) for the methods that are here, checked key by key. */
#ifndef OBM_RECIPE_H
#define OBM_RECIPE_H

#include "../io/json.h"
#include "merge.h"

/* YAML 1.1 text as a JSON tree (yaml.c).  FORMAT names `where`, line and column.  *out is owned. */
obm_status obm__yaml_parse(const char *text, size_t size, const char *where, obm_json **out, obm_error *err);

/* The same for text of several documents (---), as a list; empty ones do not count. */
obm_status obm__yaml_parse_all(const char *text, size_t size, const char *where, obm_json **out, obm_error *err);

/* One model among the sources of a slice. */
typedef struct obm__source {
    const char *ref;            /* as written; borrowed from the tree */
    const obm_json *parameters; /* nullable */
    size_t index;               /* in the recipe's list, for messages */
    int64_t first, end;         /* layers [first, end) where the recipe says so, else 0 and -1: all */
} obm__source;

/* A run of layers of the result, or with `models` the whole of it. */
typedef struct obm__slice {
    obm__source *models; /* the inputs of the method in order; the base only for methods without task vectors; owned */
    size_t n_models;
    obm__source base;                     /* what task vectors start from; ref NULL without */
    const obm_json *parameters, *modules; /* of the slice, of the module it is in; nullable */
    int64_t layers;                       /* -1: all */
} obm__slice;

/* Where the row of a token comes from that a model lacks, or of any token with `force`. */
typedef enum { OBM_TOKEN_DEFAULT, OBM_TOKEN_ZERO, OBM_TOKEN_OF_MODEL, OBM_TOKEN_OTHER } obm__token_kind;
typedef struct obm__token_rule {
    const char *token;
    obm__token_kind kind;
    const char *model; /* of this model's row of the token, or of another of its tokens: */
    const char *other; /* nullable, then: */
    int64_t other_id;
    bool force;
} obm__token_rule;

/* The result's tokenizer. */
typedef struct obm__recipe_tokenizer {
    bool set, unite;        /* not set: the donor's, whose vocabulary all models must have */
    const char *model;      /* nullable: the base's */
    obm__token_rule *rules; /* owned */
    size_t n_rules;
    int64_t pad; /* rows are a multiple of it, 0: any */
} obm__recipe_tokenizer;

typedef struct obm__recipe {
    obm_json *root, *refs; /* refs: those that are given as mappings, written out */
    char *text;            /* as given, for the model card */
    const obm__method *method;
    obm__own *own; /* (n_own), owned: methods of the caller */
    size_t n_own;
    obm_profile profile;     /* never DEFAULT */
    const char *name, *base; /* nullable */
    const char *sliced;      /* where the slices are listed, "slices" or "modules.default.slices"; NULL for `models` */
    obm__slice *slices;      /* owned */
    size_t n_slices, n_models;  /* n_models: the most that a slice has */
    const obm_json *parameters; /* of the whole merge, nullable */
    bool has_dtype, has_out_dtype;
    obm_dtype dtype, out_dtype;
    uint64_t seed;
    obm__recipe_tokenizer tokenizer;
    const char *chat_template; /* auto, a name, or Jinja; nullable */
} obm__recipe;

/* Errors: FORMAT (syntax), ARG (unknown key, method or parameter, with a suggestion; values), UNSUPPORTED.  Of several
 * the first decides, and the message has all that fit. */
obm_status obm__recipe_parse(const obm_context *ctx, const char *text, obm_profile profile, obm__recipe **out,
                             obm_error *err);
/* Methods of the caller, of which `merge_method` may be one; `method` (nullable) takes its place. */
typedef struct obm__recipe_methods {
    const char *method;
    const obm_custom_method *const *items;
    size_t n;
} obm__recipe_methods;
/* One document of several; root is owned by the recipe whatever it returns. */
obm_status obm__recipe_read(const obm_context *ctx, const char *text, obm_json *root, obm_profile profile,
                            const obm__recipe_methods *methods, obm__recipe **out, obm_error *err);
void obm__recipe_free(obm__recipe *r);

/* Where a tensor lies for gradients: the layer's share of the depth, 0 for what is in no layer (mergekit: embeddings,
 * final norm and head take the first value of a gradient), 1 in a model of one layer. */
double obm__recipe_depth(const char *tensor, int64_t n_layers);
/* Where the number (*n digits, below 10^8) stands in `model.layers.12.mlp...`; NULL without one. */
const char *obm__layer_digits(const char *tensor, size_t *n);
/* That number, -1 without one and outside of the text model. */
int64_t obm__layer_of(const char *tensor);
/* Room for every parameter of every model of a slice. */
size_t obm__recipe_params_capacity(const obm__recipe *r);
/* Resolves filters and gradients for one tensor.  inputs: its names in the slice's models, in whose layers it has other
 * numbers; NULL: the same name.  Precedence: the parameters of the model, the slice, the module, the merge. */
size_t obm__recipe_params(const obm__recipe *r, const obm__slice *s, const char *tensor, const char *const *inputs,
                          double depth, obm_param *out);
/* "recipe: slices[1].sources[0]: " in front of what is wrong with a source, "" where there are no slices. */
const char *obm__recipe_where(const obm__recipe *r, const obm__slice *s, const obm__source *source, char *buf,
                              size_t size);

/* ---- reading (recipe.c, recipe_models.c) ---- */

#define OBM_RECIPE_WHERE "recipe"
static inline bool obm__recipe_is_set(const obm_json *v) { return v && obm__json_kind(v) != OBM_JSON_NULL; }
bool obm__recipe_same_ref(const char *a, const char *b);
/* Reading goes on behind a fault, so that one message tells all of them: OBM_JOIN(f(..., OBM_OWN)) in a function that
 * has `status` and `err`. */
obm_status obm__recipe_join(obm_status before, obm_error *err, obm_status status, const obm_error *own);
#define OBM_OWN (&own_)
#define OBM_JOIN(call)                                       \
    do {                                                     \
        obm_error own_ = {0};                                \
        obm_status one_ = (call);                            \
        status = obm__recipe_join(status, err, one_, &own_); \
        if (one_ == OBM_E_NOMEM) return status;              \
    } while (0)
/* ARG with a suggestion for each key of `object` that is not among `keys`. */
obm_status obm__recipe_check_keys(const obm_json *object, const char *where, const char *const *keys, size_t n,
                                  obm_error *err);
obm_status obm__recipe_check_parameters(const obm_context *ctx, const obm__method *m, const obm_json *v, bool of_model,
                                        const char *where, obm_error *err);
/* *out NULL where the key is absent; ARG unless it is text. */
obm_status obm__recipe_text(const obm_json *object, const char *where, const char *key, const char **out,
                            obm_error *err);
/* A reference to a model, as text or as mergekit's mapping {model: {path, revision}, lora: {path, revision}}; *out NULL
 * where v is absent, else borrowed from r. */
obm_status obm__recipe_ref(const obm_context *ctx, obm__recipe *r, const obm_json *v, const char *where,
                           const char **out, obm_error *err);
/* ARG for unknown keys; those of `ignored` are ones that mergekit does not read either, and warn. */
obm_status obm__recipe_check_ignored(const obm_context *ctx, const obm_json *object, const char *where,
                                     const char *const *keys, size_t n, const char *const *ignored, size_t n_ignored,
                                     obm_error *err);
/* `models`, `slices` or `modules` into r->slices. */
obm_status obm__recipe_read_models(const obm_context *ctx, obm__recipe *r, obm_error *err);

obm_status obm__recipe_read_tokenizer(const obm_context *ctx, obm__recipe *r, obm_error *err);
/* Built-in chat templates (chat.c): the i-th name, and the Jinja text of one; NULL if there is none. */
const char *obm__chat_name(size_t i);
const char *obm__chat_named(const char *name);

#endif
