/* obm_merge_tensors: one tensor across models in memory, by the name of a method. */
#include "merge.h"

#include <string.h>

static obm_status check_tensor(const obm_tensor *t, const obm_tensor *first, const char *what, obm_error *err) {
    if (t->ndim < 0 || t->ndim > OBM_MAX_DIM)
        return obm__fail(err, OBM_E_SHAPE, "%s: %d dimensions, at most %d", what, t->ndim, OBM_MAX_DIM);
    if (!obm__is_float(t->dtype))
        return obm__fail(err, OBM_E_DTYPE, "%s: a merge needs F32, F16, BF16 or F64, found %s", what,
                         obm_dtype_name(t->dtype));
    if (t->ndim == first->ndim && !memcmp(t->shape, first->shape, (size_t)t->ndim * sizeof *t->shape)) return OBM_OK;
    char a[128], b[128];
    obm__shape_text(first, a, sizeof a);
    obm__shape_text(t, b, sizeof b);
    return obm__fail(err, OBM_E_SHAPE, "%s: expected the shape %s of the first tensor, found %s", what, a, b);
}

static obm_status check_inputs(const obm__method *m, const obm_tensor *base, const obm_tensor *models, size_t n,
                               obm_error *err) {
    const obm_method_info *info = &m->info;
    OBM_TRY(obm__method_check_count(m, n, "", err));
    if (info->needs_base && !base) return obm__fail(err, OBM_E_ARG, "%s needs a base", info->name);
    if (!obm__method_takes_base(m) && base)
        return obm__fail(err, OBM_E_ARG, "%s has no base: pass it as one of the models", info->name);
    const obm_tensor *first = base ? base : models;
    OBM_TRY(check_tensor(first, first, base ? "base" : "model 0", err));
    for (size_t i = 0; i < n; i++) {
        obm__model_name what;
        OBM_TRY(check_tensor(&models[i], first, obm__model_label(NULL, i, what), err));
    }
    return OBM_OK;
}

/* Into a buffer of its own first: `out` stays as it was when a value turns out not to be finite. */
static obm_status merge_group(const obm__run *run, obm__group *g, float *out, obm_error *err) {
    float *merged = obm__alloc((size_t)g->count, sizeof *merged);
    if (!merged) return obm__fail_nomem(err, g->count * sizeof *merged);
    obm_status status = obm__statistics(run, g, 1, err);
    if (status == OBM_OK) status = obm__group_form(run, g, err);
    if (status == OBM_OK) status = obm__group_run(run, g, 0, g->count, OBM_F32, merged, err);
    if (status == OBM_OK) memcpy(out, merged, (size_t)g->count * sizeof *merged);
    obm_free(merged);
    obm__group_clear(g);
    return status;
}

static obm_status merge_by(obm_context *ctx, const obm__method *m, obm_profile profile, const obm_tensor *base,
                           const obm_tensor *models, size_t n, const obm_param *params, size_t n_params, uint64_t seed,
                           float *out, obm_error *err) {
    obm__steps steps;
    OBM_TRY(check_inputs(m, base, models, n, err));
    OBM_TRY(obm__steps_new(m, profile == OBM_PROFILE_PAPER ? profile : OBM_PROFILE_MERGEKIT, n, NULL, params, n_params,
                           seed, &steps, err));
    obm__group g = {.name = "",
                    .base = base,
                    .models = models,
                    .steps = &steps,
                    .count = (uint64_t)obm_tensor_count(&models[0]),
                    .work = obm__group_common_dtype(base, models, n)};
    obm__pulse pulse = obm__pulse_new(ctx, NULL, NULL, "merge", 0);
    obm_status status = merge_group(&(obm__run){ctx, pulse.fn, pulse.user, pulse.what, 0, 0}, &g, out, err);
    obm__steps_free(&steps);
    return status;
}

obm_status obm_merge_tensors(obm_context *ctx, const char *method, obm_profile profile, const obm_tensor *base,
                             const obm_tensor *models, size_t n, const obm_param *params, size_t n_params,
                             uint64_t seed, float *out, obm_error *err) {
    const obm__method *m;
    OBM_TRY(obm__method_find(method, &m, err));
    return merge_by(ctx, m, profile, base, models, n, params, n_params, seed, out, err);
}

obm_status obm_merge_tensors_custom(obm_context *ctx, const obm_custom_method *method, obm_profile profile,
                                    const obm_tensor *base, const obm_tensor *models, size_t n, const obm_param *params,
                                    size_t n_params, uint64_t seed, float *out, obm_error *err) {
    obm__own own;
    OBM_TRY(obm__own_new(method, &own, err));
    return merge_by(ctx, &own.row, profile, base, models, n, params, n_params, seed, out, err);
}
