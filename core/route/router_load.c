/* Reads the router back from a pack.  Every shape, number and name is checked against the pack before it is believed.
 */
#include "router.h"

#include <math.h>
#include <string.h>

/* ---- the arrays ---- */

static obm_status bad_array(const obm__safetensors *f, const char *name, const char *expected, obm_error *err) {
    return obm__fail(err, OBM_E_FORMAT, "%s: router tensor %s: expected %s", f->path, name, expected);
}

/* *out owned; dimensions of 0 take what the file has. */
static obm_status read_array(obm_context *ctx, const obm__safetensors *f, const char *name, int64_t rows, int64_t cols,
                             float **out, obm_error *err) {
    const obm__st_entry *e = obm__safetensors_find(f, name);
    char expected[96] = "F32 (";
    size_t at = strlen(expected);
    obm__buffer b = {0};
    if (rows) obm__buffer_printf(&b, "%lld, ", (long long)rows);
    obm__buffer_printf(&b, "%lld)", (long long)cols);
    if (b.data && b.size < sizeof expected - at) memcpy(expected + at, b.data, b.size + 1);
    obm__buffer_free(&b);
    if (!e) return bad_array(f, name, "it to be there", err);
    const obm_tensor *t = &e->t;
    bool fits = rows ? t->ndim == 2 && t->shape[0] == rows && t->shape[1] == cols : t->ndim == 1 && t->shape[0] == cols;
    if (t->dtype != OBM_F32 || !fits) return bad_array(f, name, expected, err);
    size_t n = (size_t)obm_tensor_count(t);
    float *x = obm__alloc(n, sizeof *x);
    if (!x) return obm__fail_nomem(err, n * sizeof *x);
    memcpy(x, t->data, n * sizeof *x);
    *out = x;
    return ctx->k->find_nonfinite(x, n) == n ? OBM_OK : bad_array(f, name, "finite numbers", err);
}

static obm_status read_arrays(const obm_pack *p, const obm__safetensors *f, obm__router *r, obm_error *err) {
    const obm__st_entry *mean = obm__safetensors_find(f, "mean");
    if (!mean || mean->t.ndim != 1 || mean->t.shape[0] < 1) return bad_array(f, "mean", "a vector of features", err);
    r->width = mean->t.shape[0];
    r->tasks = p->n_experts;
    OBM_TRY(read_array(p->ctx, f, "mean", 0, r->width, &r->mean, err));
    OBM_TRY(read_array(p->ctx, f, "scale", 0, r->width, &r->scale, err));
    OBM_TRY(read_array(p->ctx, f, "weight", (int64_t)r->tasks, r->width, &r->weight, err));
    return read_array(p->ctx, f, "bias", 0, (int64_t)r->tasks, &r->bias, err);
}

/* ---- the report ---- */

static bool read_size(const obm_json *report, const char *key, size_t *out) {
    int64_t n;
    if (!obm__json_int(obm__json_get(report, key), &n) || n < 0) return false;
    *out = (size_t)n;
    return true;
}

static bool read_share(const obm_json *report, const char *key, double *out) {
    return obm__json_real(obm__json_get(report, key), out) && *out >= 0 && *out <= 1;
}

static bool read_confusion(const obm_json *rows, obm_router_report *r) {
    if (obm__json_kind(rows) != OBM_JSON_ARRAY || obm__json_size(rows) != r->tasks) return false;
    for (size_t i = 0; i < r->tasks; i++) {
        const obm_json *row = obm__json_at(rows, i);
        if (obm__json_kind(row) != OBM_JSON_ARRAY || obm__json_size(row) != r->tasks) return false;
        for (size_t j = 0; j < r->tasks; j++) {
            int64_t n;
            if (!obm__json_int(obm__json_at(row, j), &n) || n < 0 || n > UINT32_MAX) return false;
            r->confusion[i][j] = (uint32_t)n;
        }
    }
    return true;
}

/* The router answers by position: another order of tasks would be another router. */
static bool same_tasks(const obm_pack *p, const obm_json *names) {
    if (obm__json_kind(names) != OBM_JSON_ARRAY || obm__json_size(names) != p->n_experts) return false;
    for (size_t k = 0; k < p->n_experts; k++) {
        const char *name = obm__json_string(obm__json_at(names, k));
        if (!name || strcmp(name, p->experts[k].name)) return false;
    }
    return true;
}

static obm_status bad_report(const obm_pack *p, const char *key, const char *expected, obm_error *err) {
    return obm__fail(err, OBM_E_FORMAT, "%s/pack.json: router.report.%s: expected %s", p->path, key, expected);
}

static obm_status read_report(const obm_pack *p, obm__router *r, obm_error *err) {
    const obm_json *report = obm__json_get(obm__json_get(p->manifest, "router"), "report");
    int64_t layer;
    r->report.tasks = r->tasks;
    if (!obm__json_int(obm__json_get(report, "layer"), &layer) || layer < 0 || layer > 100000)
        return bad_report(p, "layer", "a layer number", err);
    r->layer = r->report.layer = (int)layer;
    if (!same_tasks(p, obm__json_get(report, "tasks")))
        return bad_report(p, "tasks", "the pack's experts in their order", err);
    if (!read_size(report, "n_train", &r->report.n_train)) return bad_report(p, "n_train", "a count", err);
    if (!read_size(report, "n_held_out", &r->report.n_held_out)) return bad_report(p, "n_held_out", "a count", err);
    if (!read_share(report, "accuracy", &r->report.accuracy))
        return bad_report(p, "accuracy", "a number from 0 to 1", err);
    if (!read_share(report, "calibration_error", &r->report.calibration_error))
        return bad_report(p, "calibration_error", "a number from 0 to 1", err);
    if (!read_confusion(obm__json_get(report, "confusion"), &r->report))
        return bad_report(p, "confusion", "a square table of counts", err);
    return OBM_OK;
}

obm_status obm__router_load(const obm_pack *p, obm__router **out, obm_error *err) {
    obm__safetensors *file = NULL;
    OBM_TRY(obm__pack_read_router(p, &file, err));
    if (!file) {
        *out = NULL;
        return OBM_OK;
    }
    obm_status status = OBM_OK;
    obm__router *r = NULL;
    if (p->n_experts > OBM_MAX_REPORT_TASKS) status = bad_report(p, "tasks", "at most 64", err);
    if (status == OBM_OK && !(r = obm__calloc(1, sizeof *r))) status = obm__fail_nomem(err, sizeof *r);
    if (status == OBM_OK) status = read_arrays(p, file, r, err);
    if (status == OBM_OK) status = read_report(p, r, err);
    obm__safetensors_free(file);
    if (status == OBM_OK)
        *out = r;
    else
        obm__router_free(r);
    return status;
}
