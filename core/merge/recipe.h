/* Recipes: mergekit's YAML (or JSON) for the methods that are here, checked key by key. */
#ifndef OBM_RECIPE_H
#define OBM_RECIPE_H

#include "../io/json.h"
#include "merge.h"

/* YAML 1.1 text as a JSON tree (yaml.c).  FORMAT names `where`, line and column.  *out is owned. */
obm_status obm__yaml_parse(const char *text, size_t size, const char *where, obm_json **out, obm_error *err);

typedef struct obm__recipe_model {
    const char *ref;            /* as written; borrowed from the tree */
    const obm_json *parameters; /* nullable */
} obm__recipe_model;

typedef struct obm__recipe {
    obm_json *root;
    char *text; /* as given, for the model card */
    const obm__method *method;
    obm_profile profile;       /* never DEFAULT */
    const char *name, *base;   /* nullable */
    obm__recipe_model *models; /* the inputs of the method in order; the base only for methods without task vectors */
    size_t n_models;
    const obm_json *parameters; /* of the whole merge, nullable */
    bool has_dtype, has_out_dtype;
    obm_dtype dtype, out_dtype;
    uint64_t seed;
} obm__recipe;

/* Errors: FORMAT (syntax), NOTFOUND (unknown key, method or parameter, with a suggestion), ARG, UNSUPPORTED. */
obm_status obm__recipe_parse(const obm_context *ctx, const char *text, obm_profile profile, obm__recipe **out,
                             obm_error *err);
void obm__recipe_free(obm__recipe *r);

/* Where a tensor lies for gradients: the layer's share of the depth, 0 for what is in no layer (mergekit: embeddings,
 * final norm and head take the first value of a gradient), 1 in a model of one layer. */
double obm__recipe_depth(const char *tensor, int64_t n_layers);
/* The number in `model.layers.12.mlp...`, -1 without one. */
int64_t obm__layer_of(const char *tensor);
/* Room for every parameter of every model. */
size_t obm__recipe_params_capacity(const obm__recipe *r);
/* Resolves filters and gradients for one tensor.  Precedence: the model's own parameters, then the merge's. */
size_t obm__recipe_params(const obm__recipe *r, const char *tensor, double depth, obm_param *out);

#endif
