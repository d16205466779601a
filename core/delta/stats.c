/* Statistics of task vectors by class and tensor.  Sums are f64 in the fixed order of onebit.c (blocks of a row, rows
 * of a tensor, tensors by name), so they do not depend on threads.  Extra vocabulary rows have no base and are left
 * out. */
#include "delta.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Sums of one row, or of one tensor after the join. */
enum { SUM_A, SUM_B, SUM_C, SUM_ERROR, SUMS };

typedef struct scan_worker {
    float x[OBM_BLOCK], y[OBM_BLOCK], scratch[OBM_BLOCK];
    uint8_t bits_x[OBM_BLOCK / 8], bits_y[OBM_BLOCK / 8];
    double *partial[3]; /* one per block of a row */
} scan_worker;

typedef struct scan {
    const obm_kernels *k;
    const obm__pair *a, *b; /* b: the second task vector of a comparison, else NULL */
    int64_t rows, cols;
    double *sums[SUMS]; /* (rows) each */
    uint64_t *counts;   /* (rows): zeros, or agreeing signs */
    scan_worker *workers;
    int threads;
    _Atomic int64_t bad;
} scan;

static void check(scan *s, const float *x, int64_t begin, size_t n) {
    size_t bad = s->k->find_nonfinite(x, n);
    if (bad < n) obm__note_bad(&s->bad, begin + (int64_t)bad);
}

/* A: theta^2, B: d^2, C: |d|; count: zeros. */
static uint64_t stats_block(scan *s, scan_worker *w, int64_t begin, size_t n, size_t block) {
    obm__pair_read(s->k, s->a, begin, (int64_t)n, w->x, w->scratch);
    obm__widen(s->k, &s->a->base, begin, (int64_t)n, w->y);
    check(s, w->x, begin, n);
    w->partial[SUM_A][block] = s->k->dot(w->y, w->y, n);
    w->partial[SUM_B][block] = s->k->dot(w->x, w->x, n);
    w->partial[SUM_C][block] = s->k->abs_sum(w->x, n);
    return s->k->count_zero(w->x, n);
}

/* A: a*a, B: b*b, C: a*b; count: equal signs. */
static uint64_t compare_block(scan *s, scan_worker *w, int64_t begin, size_t n, size_t block) {
    obm__pair_read(s->k, s->a, begin, (int64_t)n, w->x, w->scratch);
    obm__pair_read(s->k, s->b, begin, (int64_t)n, w->y, w->scratch);
    check(s, w->x, begin, n);
    check(s, w->y, begin, n);
    w->partial[SUM_A][block] = s->k->dot(w->x, w->x, n);
    w->partial[SUM_B][block] = s->k->dot(w->y, w->y, n);
    w->partial[SUM_C][block] = s->k->dot(w->x, w->y, n);
    s->k->sign_pack(w->bits_x, w->x, n);
    s->k->sign_pack(w->bits_y, w->y, n);
    uint64_t differ = 0;
    for (size_t i = 0; i < (n + 7) / 8; i++) differ += (uint64_t)__builtin_popcount(w->bits_x[i] ^ w->bits_y[i]);
    return n - differ;
}

/* ||d - alpha sign d||^2 = sum d^2 - 2 alpha sum |d| + n alpha^2; rounding may leave it a little below 0. */
static double onebit_error(double squares, double absolute, double n) {
    double alpha = n > 0 ? (double)(float)(absolute / n) : 0;
    double e = squares - 2 * alpha * absolute + n * alpha * alpha;
    return e > 0 ? e : 0;
}

static void scan_rows(void *arg, size_t begin, size_t end, int id) {
    scan *s = arg;
    scan_worker *w = &s->workers[id];
    for (size_t row = begin; row < end; row++) {
        size_t blocks = 0;
        uint64_t count = 0;
        for (int64_t at = 0; at < s->cols; at += OBM_BLOCK, blocks++) {
            size_t n = (size_t)(s->cols - at < OBM_BLOCK ? s->cols - at : OBM_BLOCK);
            int64_t first = (int64_t)row * s->cols + at;
            count += s->b ? compare_block(s, w, first, n, blocks) : stats_block(s, w, first, n, blocks);
        }
        for (int i = 0; i < 3; i++) s->sums[i][row] = obm__tree_sum(w->partial[i], blocks);
        s->sums[SUM_ERROR][row] = onebit_error(s->sums[SUM_B][row], s->sums[SUM_C][row], (double)s->cols);
        s->counts[row] = count;
    }
}

static void scan_clear(scan *s) {
    for (int i = 0; i < SUMS; i++) obm_free(s->sums[i]);
    obm_free(s->counts);
    for (int t = 0; s->workers && t < s->threads; t++) {
        for (int i = 0; i < 3; i++) obm_free(s->workers[t].partial[i]);
    }
    obm_free(s->workers);
}

static bool scan_alloc(scan *s) {
    size_t blocks = (size_t)(s->cols / OBM_BLOCK) + 1;
    for (int i = 0; i < SUMS; i++) {
        if (!(s->sums[i] = obm__calloc((size_t)s->rows, sizeof(double)))) return false;
    }
    s->counts = obm__calloc((size_t)s->rows, sizeof *s->counts);
    s->workers = obm__calloc((size_t)s->threads, sizeof *s->workers);
    if (!s->counts || !s->workers) return false;
    for (int t = 0; t < s->threads; t++) {
        for (int i = 0; i < 3; i++) {
            if (!(s->workers[t].partial[i] = obm__calloc(blocks, sizeof(double)))) return false;
        }
    }
    return true;
}

/* What one tensor adds to its class. */
typedef struct totals {
    uint64_t tensors, params, count;
    double sums[SUMS], error_matrix;
} totals;

static void scan_join(const scan *s, totals *t) {
    double joined[SUMS];
    for (int i = 0; i < SUMS; i++) {
        joined[i] = obm__tree_sum(s->sums[i], (size_t)s->rows);
        t->sums[i] += joined[i];
    }
    for (int64_t r = 0; r < s->rows; r++) t->count += s->counts[r];
    double n = (double)s->rows * (double)s->cols;
    t->tensors++;
    t->params += (uint64_t)(s->rows * s->cols);
    t->error_matrix += onebit_error(joined[SUM_B], joined[SUM_C], n);
}

/* Elements between two looks at the pulse, per thread: some tens of ms at most. */
#define SLICE ((int64_t)64 * OBM_TILE)

static obm_status scan_tensor(obm_context *ctx, const obm__pair *a, const obm__pair *b, obm__pulse *pulse, totals *t,
                              obm_error *err) {
    if (!obm__is_float(a->base.dtype)) return OBM_OK;
    scan s = {.k = ctx->k, .a = a, .b = b, .threads = ctx->threads, .bad = INT64_MAX};
    obm__tensor_rows(&a->base, &s.rows, &s.cols);
    obm_status status = OBM_OK;
    if (!scan_alloc(&s)) {
        status = obm__fail_nomem(err, (uint64_t)s.rows * 5 * sizeof(double));
    } else {
        int64_t cols = s.cols ? s.cols : 1;
        status = obm__parallel_slices(ctx, (size_t)s.rows, (size_t)(OBM_TILE / 4 / cols) + 1,
                                      (size_t)(ctx->threads * SLICE / cols) + 1, scan_rows, &s, pulse, err);
        if (status == OBM_OK && s.bad != INT64_MAX) status = obm__fail_nonfinite(err, a, s.bad);
    }
    if (status == OBM_OK) scan_join(&s, t);
    scan_clear(&s);
    return status;
}

static void finish_stats(const totals *t, obm_delta_stats *out) {
    *out = (obm_delta_stats){.tensors = t->tensors, .params = t->params, .zeros = t->count};
    out->base_norm = sqrt(t->sums[SUM_A]);
    out->delta_norm = sqrt(t->sums[SUM_B]);
    out->relative_norm = out->base_norm > 0 ? out->delta_norm / out->base_norm : NAN;
    out->zero_share = t->params ? (double)t->count / (double)t->params : 0;
    out->onebit_error_matrix = t->sums[SUM_B] > 0 ? sqrt(t->error_matrix / t->sums[SUM_B]) : NAN;
    out->onebit_error_row = t->sums[SUM_B] > 0 ? sqrt(t->sums[SUM_ERROR] / t->sums[SUM_B]) : NAN;
}

static uint64_t float_bytes(const obm_task_vector *v) {
    uint64_t n = 0;
    for (size_t i = 0; i < v->count; i++) n += obm__tensor_bytes(&v->pairs[i].expert);
    return n;
}

obm_status obm_task_vector_stats(obm_context *ctx, const obm_task_vector *v, obm_progress_fn progress, void *user,
                                 obm_delta_stats *out, obm_error *err) {
    totals t[OBM_CLASS_COUNT] = {0};
    obm__pulse pulse = obm__pulse_new(ctx, progress, user, "stats", float_bytes(v));
    for (size_t i = 0; i < v->count; i++) {
        const obm__pair *p = &v->pairs[i];
        OBM_TRY(obm__task_vector_check(v, err));
        OBM_TRY(scan_tensor(ctx, p, NULL, &pulse, &t[p->cls], err));
        OBM_TRY(obm__pulse_done(&pulse, pulse.done + obm__tensor_bytes(&p->expert), err));
    }
    for (int c = 0; c < OBM_CLASS_COUNT; c++) finish_stats(&t[c], &out[c]);
    return OBM_OK;
}

obm_status obm_task_vector_tensor_stats(obm_context *ctx, const obm_task_vector *v, const char *name,
                                        obm_delta_stats *out, obm_error *err) {
    const obm__pair *p = obm__task_vector_find(v, name, err);
    if (!p) return OBM_E_NOTFOUND;
    totals t = {0};
    obm__pulse pulse = obm__pulse_new(ctx, NULL, NULL, "stats", 1);
    OBM_TRY(obm__task_vector_check(v, err));
    OBM_TRY(scan_tensor(ctx, p, NULL, &pulse, &t, err));
    finish_stats(&t, out);
    return OBM_OK;
}

static obm_status compare_tensor(obm_context *ctx, const obm__pair *a, const obm_task_vector *vb, obm__pulse *pulse,
                                 totals *t, obm_error *err) {
    const obm__pair *b = obm__task_vector_find(vb, a->name, NULL);
    if (!b) return OBM_OK; /* a head of its own on one side only */
    char have[160], want[160];
    if (a->base.ndim != b->base.ndim ||
        memcmp(a->base.shape, b->base.shape, (size_t)a->base.ndim * sizeof *a->base.shape)) {
        return obm__fail(err, OBM_E_SHAPE, "tensor %s: the bases of the two task vectors have shapes %s and %s",
                         a->name, obm__shape_text(&a->base, have, sizeof have),
                         obm__shape_text(&b->base, want, sizeof want));
    }
    if (!obm__is_float(b->base.dtype)) return OBM_OK;
    return scan_tensor(ctx, a, b, pulse, t, err);
}

obm_status obm_task_vector_compare(obm_context *ctx, const obm_task_vector *a, const obm_task_vector *b,
                                   obm_progress_fn progress, void *user, obm_delta_pair *out, obm_error *err) {
    totals t[OBM_CLASS_COUNT] = {0};
    obm__pulse pulse = obm__pulse_new(ctx, progress, user, "compare", float_bytes(a));
    for (size_t i = 0; i < a->count; i++) {
        OBM_TRY(obm__task_vector_check(a, err));
        OBM_TRY(obm__task_vector_check(b, err));
        OBM_TRY(compare_tensor(ctx, &a->pairs[i], b, &pulse, &t[a->pairs[i].cls], err));
        OBM_TRY(obm__pulse_done(&pulse, pulse.done + obm__tensor_bytes(&a->pairs[i].expert), err));
    }
    for (int c = 0; c < OBM_CLASS_COUNT; c++) {
        double norms = sqrt(t[c].sums[SUM_A]) * sqrt(t[c].sums[SUM_B]);
        out[c] = (obm_delta_pair){.params = t[c].params, .cosine = norms > 0 ? t[c].sums[SUM_C] / norms : NAN};
        out[c].sign_agreement = t[c].params ? (double)t[c].count / (double)t[c].params : NAN;
    }
    return OBM_OK;
}
