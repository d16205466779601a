/* arcee_fusion: the model's value where its change matters much, else the base's.
 *
 * The importance of an element is |x - b| times the divergence of its row, KL(softmax(x) + 1e-8, softmax(b) + 1e-8); it
 * passes from median + 1.5 * (third - first quartile) on, quantile q being element floor(q (n - 1)) in ascending order.
 * All quantiles are exact; mergekit samples tensors of more than a million elements. */
#include "merge.h"

#define SMALL 1e-8

typedef struct rows {
    uint64_t cols;
    double *kl; /* (rows) */
} rows;

typedef struct softmax {
    double top, sum;
} softmax;

static void see(softmax *m, const float *x, size_t n) {
    for (size_t j = 0; j < n; j++) {
        if (x[j] > m->top) {
            m->sum *= exp(m->top - x[j]);
            m->top = x[j];
        }
        m->sum += exp(x[j] - m->top);
    }
}

static double share(const softmax *m, float x) { return exp(x - m->top) / m->sum + SMALL; }

static size_t load_piece(obm__block *b, uint64_t begin, uint64_t left) {
    b->begin = begin;
    b->n = left < OBM_MERGE_BLOCK ? (size_t)left : OBM_MERGE_BLOCK;
    return obm__block_load(b);
}

static uint64_t divergence(obm__block *b, const obm__part *part, void *arg) {
    const rows *r = arg;
    uint64_t start = part->row * r->cols;
    softmax x = {-INFINITY, 0}, base = x;
    double kl = 0;
    for (uint64_t col = 0; col < r->cols; col += b->n) {
        size_t bad = load_piece(b, start + col, r->cols - col);
        if (bad < b->n) return b->begin + bad;
        see(&x, obm__block_delta(b, 0), b->n);
        see(&base, b->base, b->n);
        obm__row_release(b, start, r->cols);
    }
    for (uint64_t col = 0; col < r->cols; col += b->n) {
        load_piece(b, start + col, r->cols - col);
        for (size_t j = 0; j < b->n; j++) {
            double p = share(&x, obm__block_delta(b, 0)[j]), q = share(&base, b->base[j]);
            kl += p * log(p / q);
        }
        obm__row_release(b, start, r->cols);
    }
    r->kl[part->row] = fmax(kl, 0); /* it is never negative but by rounding */
    return UINT64_MAX;
}

/* stats: the threshold, then the divergence of each row. */
static void score(const obm__block *b, float least, float *out) {
    (void)least;
    uint64_t cols = obm__group_cols(b->g);
    for (size_t j = 0; j < b->n; j++) {
        float change = obm__block_delta(b, 0)[j] - b->base[j];
        out[j] = (float)(fabs((double)change) * b->g->stats[1 + (b->begin + j) / cols]);
    }
}

static obm_status find_threshold(const obm__run *run, obm__group *g, obm_error *err) {
    float q[3];
    for (int i = 0; i < 3; i++) {
        uint64_t ascending = (uint64_t)((i + 1) * 0.25 * (double)(g->count - 1));
        OBM_TRY(obm__select_value(run, g, 1, OBM_BY_SCORE, g->count - ascending, &q[i], err));
    }
    g->stats[0] = q[1] + 1.5f * (q[2] - q[0]);
    return OBM_OK;
}

static obm_status prepare_one(const obm__run *run, obm__group *g, obm_error *err) {
    uint64_t n = obm__group_rows(g);
    g->stats = obm__calloc(1 + n, sizeof *g->stats);
    if (!g->stats) return obm__fail_nomem(err, (1 + n) * sizeof *g->stats);
    if (g->count == 0) return OBM_OK;
    rows r = {obm__group_cols(g), g->stats + 1};
    OBM_TRY(obm__group_parts(run, g, n, r.cols, false, divergence, &r, err));
    return find_threshold(run, g, err);
}

static obm_status prepare(const obm__run *run, obm__group *groups, size_t n_groups, obm_error *err) {
    for (size_t i = 0; i < n_groups; i++) OBM_TRY(prepare_one(run, &groups[i], err));
    return OBM_OK;
}

static void merge(const obm__block *b) {
    const float *x = obm__block_delta(b, 0);
    score(b, 0, b->sum);
    for (size_t j = 0; j < b->n; j++) b->mixed[j] = b->sum[j] >= b->g->stats[0] ? x[j] : b->base[j];
}

static uint64_t bytes(const obm__group *g) { return (1 + obm__group_rows(g)) * sizeof(double); }

static const obm__custom custom = {.prepare = prepare, .score = score, .merge = merge, .bytes = bytes};

const obm__method obm__method_arcee_fusion = {
    .info = {"arcee_fusion", "the model's values where their change is important, else the base's", "as in mergekit",
             NULL, 0, true, 1, 1},
    .cost = 70,
    .custom = &custom,
};
