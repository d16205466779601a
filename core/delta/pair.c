/* One row of a task vector read: the difference to the base, or the expert's own values, in f32, any part of it without
 * the whole. */
#include "delta.h"

#include <string.h>

typedef struct part {
    int64_t row, col, n;
} part;

/* The piece of a row that begins at element `at` of a matrix, at most `rest` long. */
static part part_at(const obm__planes *p, int64_t at, int64_t rest) {
    part t = {at / p->cols, at % p->cols, p->cols - at % p->cols};
    if (t.n > rest) t.n = rest;
    return t;
}

/* d of what has no tensor of its own. */
static void read_change(const obm_kernels *k, const obm__pair *p, int64_t begin, int64_t n, float *d) {
    if (p->lora) {
        obm__lowrank_read(k, p->lora, begin, n, d);
    } else if (p->masked) {
        obm__masked_read(k, p->masked, begin, n, d);
    } else if (p->planes) {
        for (int64_t at = 0; at < n;) {
            part t = part_at(p->planes, begin + at, n - at);
            obm__planes_read_row(k, p->planes, t.row, t.col, t.n, d + at);
            at += t.n;
        }
    } else {
        memset(d, 0, (size_t)n * sizeof *d);
    }
}

bool obm__pair_is_bf16(const obm__pair *p) {
    bool even = ((uintptr_t)p->base.data | (uintptr_t)p->expert.data) % 2 == 0;
    return p->expert.data && p->base.dtype == OBM_BF16 && p->expert.dtype == OBM_BF16 && even;
}

void obm__pair_read(const obm_kernels *k, const obm__pair *p, int64_t begin, int64_t n, float *d, float *scratch) {
    if (!p->expert.data) {
        read_change(k, p, begin, n, d);
        return;
    }
    if (obm__pair_is_bf16(p)) {
        k->sub_bf16(d, (const uint16_t *)p->expert.data + begin, (const uint16_t *)p->base.data + begin, (size_t)n);
        return;
    }
    obm__widen(k, &p->expert, begin, n, d);
    obm__widen(k, &p->base, begin, n, scratch);
    k->sub_f32(d, d, scratch, (size_t)n);
}

/* ---- the expert's own values ---- */

/* How many of elements [begin, begin + n) lie in the base's rows. */
static int64_t in_base(const obm__pair *p, int64_t begin, int64_t n) {
    int64_t rest = obm_tensor_count(&p->base) - begin;
    return rest < 0 ? 0 : rest < n ? rest : n;
}

static void add_change(const obm_kernels *k, const obm__pair *p, int64_t begin, int64_t n, float *x, float *scratch) {
    if (p->lora || p->masked) {
        read_change(k, p, begin, n, scratch);
        for (int64_t i = 0; i < n; i++) x[i] += scratch[i];
    }
    for (int64_t at = 0; p->planes && at < n;) {
        part t = part_at(p->planes, begin + at, n - at);
        obm__planes_add_row(k, p->planes, t.row, t.col, t.n, x + at);
        at += t.n;
    }
}

void obm__pair_values(const obm_kernels *k, const obm__pair *p, int64_t begin, int64_t n, float *out, float *scratch) {
    if (p->expert.data) {
        obm__widen(k, &p->expert, begin, n, out);
        return;
    }
    int64_t own = in_base(p, begin, n);
    obm__widen(k, &p->base, begin, own, out);
    add_change(k, p, begin, own, out, scratch);
    if (own < n) obm__widen(k, p->extra, begin + own - obm_tensor_count(&p->base), n - own, out + own);
}

static void release_planes(const obm__planes *p, int64_t begin, int64_t n) {
    size_t row = (size_t)p->row_bytes, first = (size_t)(begin / p->cols), end = (size_t)((begin + n - 1) / p->cols + 1);
    for (int i = 0; i < p->n && n > 0; i++) obm__pages_release(p->signs[i] + first * row, (end - first) * row);
}

void obm__pair_release(const obm__pair *p, int64_t begin, int64_t n) {
    if (p->expert.data) {
        obm__tensor_release(&p->expert, begin, n);
        return;
    }
    int64_t own = in_base(p, begin, n);
    obm__tensor_release(&p->base, begin, own);
    if (p->planes) release_planes(p->planes, begin, own);
    if (p->masked) obm__masked_release(p->masked, begin, own);
    if (p->extra) obm__tensor_release(p->extra, begin + own - obm_tensor_count(&p->base), n - own);
}
