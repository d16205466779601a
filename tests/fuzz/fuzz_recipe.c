/* Bytes as a recipe: refused with a message of one line, or read, and then every setting of every tensor is a number in
 * its parameter's range. */
#include "fuzz_fixture.h"

#include "merge/recipe.h"

#include <math.h>

#define MAX_INPUT 16384

static obm_context *ctx;

static void stop(void) { obm_context_free(ctx); }

static void start(void) {
    ctx = fuzz_context();
    atexit(stop);
}

static const obm_param_info *info_of(const obm__recipe *r, const char *name) {
    for (size_t i = 0; i < r->method->info.n_params; i++)
        if (!strcmp(r->method->info.params[i].name, name)) return &r->method->info.params[i];
    abort();
}

static void check_params(const obm__recipe *r, const obm__slice *s, const char *tensor) {
    size_t room = obm__recipe_params_capacity(r);
    obm_param *params = malloc((room ? room : 1) * sizeof *params);
    if (!params) abort();
    size_t n = obm__recipe_params(r, s, tensor, NULL, obm__recipe_depth(tensor, 3), params);
    if (n > room) abort();
    for (size_t i = 0; i < n; i++) {
        const obm_param_info *info = info_of(r, params[i].name);
        double x = params[i].value;
        if (!isfinite(x) || x < info->min || x > info->max || params[i].model >= (int)s->n_models) abort();
    }
    free(params);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const tensors[] = {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight",
                                          "model.layers.99.self_attn.q_proj.weight", ""};
    obm_json *tree = NULL;
    obm__recipe *r = NULL;
    obm_error err = {0};
    if (size > MAX_INPUT) return 0;
    if (!ctx) start();
    if (obm__yaml_parse((const char *)data, size, "fuzz", &tree, &err) != OBM_OK) {
        if (tree) abort();
        check_error(&err);
    }
    obm__json_free(tree);
    char *text = malloc(size + 1);
    if (!text) abort();
    memcpy(text, data, size);
    text[size] = 0;
    if (obm__recipe_parse(ctx, text, OBM_PROFILE_DEFAULT, &r, &err) != OBM_OK) {
        if (r) abort();
        check_error(&err);
    } else {
        for (size_t s = 0; s < r->n_slices; s++)
            for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) check_params(r, &r->slices[s], tensors[i]);
        obm__recipe_free(r);
    }
    free(text);
    return 0;
}
