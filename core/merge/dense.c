/* Whole matrices for the methods on LAPACK: one task vector at a time as f64, and the merged one back as f32.  What
 * such a method holds is a few copies of one matrix, whatever the number of models and tensors. */
#include "merge.h"

bool obm__dense_is_matrix(const obm__group *g) {
    obm_class cls = obm_class_of(g->name, g->models[0].ndim);
    return g->models[0].ndim == 2 && g->count > 0 && cls != OBM_CLASS_EMBEDDING && cls != OBM_CLASS_HEAD &&
           cls != OBM_CLASS_NORM && cls != OBM_CLASS_BIAS;
}

obm__dense_size obm__dense_size_of(const obm__group *g) {
    size_t m = (size_t)g->models[0].shape[0], n = (size_t)g->models[0].shape[1];
    return (obm__dense_size){m, n, m < n ? m : n};
}

/* ---- in ---- */

typedef struct load {
    const obm_kernels *k;
    const obm__group *g;
    size_t model;
    double factor;
    bool add;
    uint64_t at, until;
    float *block; /* (workers, 3, OBM_MERGE_BLOCK) */
    double *out;
    _Atomic uint64_t bad;
} load;

static void load_range(void *arg, size_t first, size_t last, int worker) {
    load *w = arg;
    float *base = w->block + (size_t)worker * 3 * OBM_MERGE_BLOCK, *d = base + OBM_MERGE_BLOCK,
          *scratch = d + OBM_MERGE_BLOCK;
    for (size_t i = first; i < last; i++) {
        uint64_t begin = w->at + (uint64_t)i * OBM_MERGE_BLOCK;
        size_t n = w->until - begin < OBM_MERGE_BLOCK ? (size_t)(w->until - begin) : OBM_MERGE_BLOCK;
        obm__group_base(w->k, w->g, begin, n, base, scratch);
        size_t bad = obm__group_delta(w->k, w->g, w->model, begin, n, base, d, scratch);
        if (bad < n) obm__note_lowest(&w->bad, begin + bad);
        double *out = w->out + begin;
        for (size_t j = 0; j < n; j++) out[j] = (w->add ? out[j] : 0) + w->factor * (double)d[j];
    }
}

obm_status obm__dense_load(const obm__run *run, const obm__group *g, size_t model, double factor, bool add, double *out,
                           obm_error *err) {
    size_t each = 3 * OBM_MERGE_BLOCK * sizeof(float);
    load w = {.k = run->ctx->k, .g = g, .model = model, .factor = factor, .add = add, .out = out, .bad = UINT64_MAX};
    w.block = obm__desks_new(run->ctx, each);
    if (!w.block) return obm__fail_nomem(err, (uint64_t)run->ctx->threads * each);
    obm_status status = OBM_OK;
    for (w.at = 0; status == OBM_OK && w.at < g->count; w.at = w.until) {
        w.until = g->count - w.at < OBM_MERGE_SPAN ? g->count : w.at + OBM_MERGE_SPAN;
        obm__parallel(run->ctx, (size_t)((w.until - w.at + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK), 1, load_range, &w);
        status = w.bad == UINT64_MAX ? obm__run_report(run, err) : obm__group_bad(w.k, g, w.bad, err);
        obm__group_release(g, w.at, w.until - w.at);
    }
    obm__desks_free(run->ctx, w.block);
    return status;
}

/* ---- in between ---- */

static obm_status look(void *user, obm_error *err) { return obm__run_report(user, err); }

obm_status obm__dense_multiply(const obm__run *run, const obm__product *p, obm_error *err) {
    return obm__multiply(run->ctx, p, look, (void *)(uintptr_t)run, err);
}

obm_status obm__dense_polar(const obm__run *run, const obm__group *g, obm__svd *d, size_t m, size_t n, double *x,
                            obm_error *err) {
    return obm__polar(run->ctx, d, m, n, x, obm__group_name(g), look, (void *)(uintptr_t)run, err);
}

void obm__dense_take(const obm__svd *d, size_t first, size_t count, size_t all, double *u, double *vt, double *s) {
    size_t rank = obm__svd_rank(d);
    for (size_t i = 0; i < count && i < rank; i++) {
        s[first + i] = d->s[i];
        memcpy(vt + (first + i) * d->n, d->vt + i * d->n, d->n * sizeof *vt);
        for (size_t row = 0; row < d->m; row++) u[row * all + first + i] = d->u[row * d->k + i];
    }
}

/* ---- out ---- */

obm_status obm__dense_form(obm__group *g, const double *x, obm_error *err) {
    g->formed = obm__alloc((size_t)g->count, sizeof *g->formed);
    if (!g->formed) return obm__fail_nomem(err, g->count * sizeof *g->formed);
    for (uint64_t i = 0; i < g->count; i++) g->formed[i] = (float)x[i];
    return OBM_OK;
}

void obm__dense_add(const obm__block *b, double factor) {
    const float *d = b->g->formed + b->begin;
    for (size_t j = 0; j < b->n; j++) b->mixed[j] = (float)(b->base[j] + factor * (double)d[j]);
}

void obm__dense_merge(const obm__block *b) {
    const obm__steps *s = b->g->steps;
    if (b->g->formed) {
        obm__dense_add(b, s->lambda);
        return;
    }
    for (size_t j = 0; j < b->n; j++) {
        double sum = 0;
        for (size_t i = 0; i < s->n; i++) sum += (double)s->weight[i] * (double)obm__block_delta(b, i)[j];
        b->mixed[j] = (float)(b->base[j] + (double)s->lambda * (sum / (double)s->n));
    }
}
