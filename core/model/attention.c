/* Causal attention over the paged cache: grouped queries, sliding windows, q and k norms.  A row sees its own sequence
 * only. */
#include "model.h"

#include <math.h>
#include <string.h>

typedef struct attention_job {
    obm_model *m;
    const obm__row *rows;
    int64_t layer;
    size_t n, span; /* rows or tiles; heads of an item, which read the same keys */
    bool placed;    /* heads have nodes */
    bool tiled;
} attention_job;

/* ---- rotate and store ---- */

static void store(const obm_model *m, const obm__row *row, int64_t layer, int which, int64_t kv_head, const float *x) {
    int64_t dim = m->config.head_dim, slot = row->position % OBM_TILE_TOKENS;
    void *page = obm__kv_at(m, row->sequence, row->position / OBM_TILE_TOKENS, layer, which, kv_head); // (64, head_dim)
    if (row->sequence->kv == OBM_F16)
        m->ctx->k->f32_to_f16((uint16_t *)page + slot * dim, x, (size_t)dim);
    else
        memcpy((float *)page + slot * dim, x, (size_t)dim * sizeof *x);
}

/* x: (heads, head_dim) of one row; over each head, or over all of them. */
static void norm_heads(const obm_model *m, const float *weight, int64_t heads, float *x) {
    int64_t dim = m->config.head_dim;
    if (!weight) return;
    if (m->config.arch->has & OBM_HAS_WHOLE_QK_NORM) {
        obm__rms_norm(m, x, weight, heads * dim, x);
        return;
    }
    for (int64_t h = 0; h < heads; h++) obm__rms_norm(m, x + h * dim, weight, dim, x + h * dim);
}

/* x: (heads, head_dim) of row i. */
static void rotate(const attention_job *j, size_t i, int64_t heads, float *x) {
    const obm_model *m = j->m;
    int rope = m->config.layer[j->layer].rope;
    if (rope < 0) return;
    size_t at = ((size_t)rope * m->scratch.rows + i) * (size_t)m->pairs; // (ropes, rows, pairs)
    size_t pairs = (size_t)obm__rope_pairs(&m->config.ropes[rope]);
    for (int64_t h = 0; h < heads; h++)
        m->ctx->k->rotate(x + h * m->config.head_dim, m->scratch.cosine + at, m->scratch.sine + at, pairs);
}

static void rotate_and_store(void *arg, size_t begin, size_t end, int worker) {
    const attention_job *j = arg;
    const obm__config *c = &j->m->config;
    const obm__scratch *s = &j->m->scratch;
    int64_t dim = c->head_dim;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        const obm__weights *w = s->weights[i];
        if (!w) continue;
        float *q = s->q + (int64_t)i * c->heads * dim;    // (heads, head_dim)
        float *k = s->k + (int64_t)i * c->kv_heads * dim; // (kv_heads, head_dim)
        float *v = s->v + (int64_t)i * c->kv_heads * dim; // (kv_heads, head_dim)
        norm_heads(j->m, obm__weights_at(w, j->layer, OBM_Q_NORM)->data, c->heads, q);
        norm_heads(j->m, obm__weights_at(w, j->layer, OBM_K_NORM)->data, c->kv_heads, k);
        rotate(j, i, c->heads, q);
        rotate(j, i, c->kv_heads, k);
        for (int64_t h = 0; h < c->kv_heads; h++) {
            store(j->m, &j->rows[i], j->layer, 0, h, k + h * dim);
            store(j->m, &j->rows[i], j->layer, 1, h, v + h * dim);
        }
    }
}

/* ---- attend ---- */

/* Positions of a step.  Before each, as many of the page that comes next are asked for: its part of a head lies far
 * from this one's, where no processor looks by itself, and one that waits for too many lines forgets further requests.
 */
#define STRIP 8

/* The keys or the values of a head at positions [from, to), strip by strip, none of which crosses a page. */
typedef struct strips {
    const attention_job *j;
    const obm__sequence *s;
    int which; /* 0: keys, 1: values */
    int64_t kv_head, from, to;
    const char *page, *next; /* the head's part of this page and of the one that is asked for, NULL: none is */
} strips;

/* In the page behind `page`; of the last one the first values, which follow the keys. */
static const char *next_part(const strips *w, int64_t page) {
    const obm_model *m = w->j->m;
    if (page < (w->to - 1) / OBM_TILE_TOKENS) return obm__kv_at(m, w->s, page + 1, w->j->layer, w->which, w->kv_head);
    return w->which ? NULL : obm__kv_at(m, w->s, w->from / OBM_TILE_TOKENS, w->j->layer, 1, w->kv_head);
}

/* What lies from position p on, (rows, head_dim) at *at; 0 rows behind the last one. */
static size_t next_strip(strips *w, int64_t p, const void **at) {
    const attention_job *j = w->j;
    int64_t page = p / OBM_TILE_TOKENS, end = (p / STRIP + 1) * STRIP;
    size_t size = (size_t)j->m->config.head_dim * obm_dtype_size(w->s->kv), slot = (size_t)(p % OBM_TILE_TOKENS) * size;
    if (p >= w->to) return 0;
    if (p == w->from || !slot) {
        w->page = obm__kv_at(j->m, w->s, page, j->layer, w->which, w->kv_head);
        w->next = next_part(w, page);
    }
    size_t rows = (size_t)((end < w->to ? end : w->to) - p);
    for (size_t i = 0; w->next && i < rows * size; i += 64) __builtin_prefetch(w->next + slot + i, 0, 2);
    *at = w->page + slot;
    return rows;
}

/* scores[h][p - from] = q[h] . k[p] for p in [from, to), page by page: heads of a group share what they read. */
static void score_keys(const attention_job *j, const obm__sequence *s, int64_t kv_head, int64_t from, int64_t to,
                       const float *q, float *scores, size_t ld) {
    const obm_kernels *k = j->m->ctx->k;
    size_t dim = (size_t)j->m->config.head_dim, rows;
    strips w = {.j = j, .s = s, .which = 0, .kv_head = kv_head, .from = from, .to = to};
    const void *keys;
    for (int64_t p = from; (rows = next_strip(&w, p, &keys)) > 0; p += (int64_t)rows)
        for (size_t h = 0; h < j->span; h++) {
            float *out = scores + h * ld + (p - from);
            if (s->kv == OBM_F16)
                k->rows_f16(out, keys, dim, rows, q + h * dim, dim);
            else
                k->rows_f32(out, keys, dim, rows, q + h * dim, dim);
        }
}

/* In place; the sum in f64, so that a long context costs no accuracy. */
static void softmax(const obm_kernels *k, float *x, int64_t n, float scale, float cap) {
    double sum = 0;
    for (int64_t i = 0; cap > 0 && i < n; i++) x[i] = obm__soft_cap(x[i] * scale, cap);
    float max = k->scale_max(x, cap > 0 ? 1 : scale, (size_t)n);
    for (int64_t i = 0; i < n; i += 4096) sum += k->exp_sum(x + i, max, (size_t)(n - i < 4096 ? n - i : 4096));
    (void)k->scale_max(x, (float)(1 / sum), (size_t)n);
}

/* out[h] = sum_p weights[h][p - from] * v[p], p increasing. */
static void mix_values(const attention_job *j, const obm__sequence *s, int64_t kv_head, int64_t from, int64_t to,
                       const float *weights, size_t ld, float *widened, float *out) {
    const obm_kernels *k = j->m->ctx->k;
    size_t dim = (size_t)j->m->config.head_dim, rows;
    strips w = {.j = j, .s = s, .which = 1, .kv_head = kv_head, .from = from, .to = to};
    const void *values;
    memset(out, 0, j->span * dim * sizeof *out);
    for (int64_t p = from; (rows = next_strip(&w, p, &values)) > 0; p += (int64_t)rows) {
        if (s->kv == OBM_F16) {
            k->f16_to_f32(widened, values, rows * dim);
            values = widened;
        }
        for (size_t h = 0; h < j->span; h++)
            k->mix_rows(out + h * dim, weights + h * ld + (p - from), values, dim, rows, dim);
    }
}

/* (rows, heads / span); in prompts, and where heads have nodes, (kv_heads, rows, heads of a group / span): the heads of
 * a node one after the other, and what reads the same keys together.  *head: the first of `span`.  Rows of prompts are
 * tiles. */
static size_t find_row(const attention_job *j, size_t item, int64_t *head) {
    size_t heads = (size_t)j->m->config.heads / j->span, group = heads / (size_t)j->m->config.kv_heads;
    size_t at = item % heads, row = item / heads;
    if (j->placed || j->tiled) {
        at = item / (j->n * group) * group + item % group;
        row = item / group % j->n;
    }
    *head = (int64_t)(at * j->span);
    return row;
}

static void split_heads(const attention_job *j, obm__lanes *out) {
    const obm__config *c = &j->m->config;
    const obm__placement *p = j->m->placement;
    size_t each = j->n * (size_t)(c->heads / c->kv_heads) / j->span;
    *out = (obm__lanes){.n = j->placed ? p->nodes : 1};
    if (!j->placed) out->end[0] = j->n * (size_t)c->heads / j->span;
    for (int i = 0; j->placed && i < p->nodes; i++) {
        out->begin[i] = (size_t)p->heads[i] * each;
        out->end[i] = (size_t)p->heads[i + 1] * each;
    }
}

static void attend(void *arg, size_t begin, size_t end, int worker) {
    const attention_job *j = arg;
    const obm__config *c = &j->m->config;
    const obm__scratch *s = &j->m->scratch;
    float *scores = s->scores + (size_t)worker * s->positions * (size_t)(c->heads / c->kv_heads);
    float *widened = s->widened + (size_t)worker * OBM_TILE_TOKENS * (size_t)c->head_dim;
    int64_t window = c->layer[j->layer].window;
    for (size_t item = begin; item < end; item++) {
        int64_t head, group = c->heads / c->kv_heads;
        size_t i = find_row(j, item, &head);
        const obm__row *row = &j->rows[i];
        int64_t kv_head = head / group;
        if (!row->sequence) continue;
        int64_t to = row->position + 1, from = window && to > window ? to - window : 0;
        int64_t at = ((int64_t)i * c->heads + head) * c->head_dim; // (rows, heads, head_dim)
        score_keys(j, row->sequence, kv_head, from, to, s->q + at, scores, s->positions);
        for (size_t h = 0; h < j->span; h++)
            softmax(j->m->ctx->k, scores + h * s->positions, to - from, c->attention_scale, c->attention_cap);
        mix_values(j, row->sequence, kv_head, from, to, scores, s->positions, widened, s->mixed + at);
    }
}

/* As many as leave four items for each worker: results do not depend on it. */
static size_t choose_span(const obm_model *m, size_t n) {
    size_t heads = (size_t)m->config.heads, span = heads / (size_t)m->config.kv_heads, group = span;
    while (span > 1 && (group % span || n * heads / span < 4 * (size_t)m->ctx->threads)) span--;
    return span;
}

static void attend_tiles(void *arg, size_t begin, size_t end, int worker) {
    const attention_job *j = arg;
    for (size_t item = begin; item < end; item++) {
        int64_t head;
        size_t first = find_row(j, item, &head) * OBM_TILE_TOKENS, stop = first + OBM_TILE_TOKENS, last;
        while (first < stop && !j->rows[first].sequence) first++;
        for (last = first; last < stop && j->rows[last].sequence;) last++;
        if (first < last) obm__attend_tile(j->m, j->rows, first, last - first, j->layer, head, j->span, worker);
    }
}

/* Positions that the row farthest in its sequence sees. */
static int64_t most_seen(const obm_model *m, const obm__row *rows, size_t n, int64_t layer) {
    int64_t seen = 1, window = m->config.layer[layer].window;
    for (size_t i = 0; i < n; i++)
        if (rows[i].sequence && rows[i].position >= seen) seen = rows[i].position + 1;
    return window && seen > window ? window : seen;
}

obm_status obm__attention_run(obm_model *m, const obm__row *rows, size_t n, bool tiled, int64_t layer, obm_error *err) {
    const obm__config *c = &m->config;
    attention_job j = {.m = m, .rows = rows, .layer = layer, .n = tiled ? n / OBM_TILE_TOKENS : n, .tiled = tiled};
    j.span = choose_span(m, j.n);
    j.placed = m->placement && obm__placement_local(m->placement);
    obm__place_rows(m, n, 8, rotate_and_store, &j);
    size_t items = j.n * (size_t)c->heads / j.span, threads = (size_t)m->ctx->threads;
    /* A row is counted tenfold: scores and mixing stream the cache, with less arithmetic per byte than GEMM. */
    double per_row = 4.0 * (double)most_seen(m, rows, n, layer) * (double)c->head_dim * (double)j.span;
    double slice = OBM_SLICE_FLOPS / (per_row * (tiled ? OBM_TILE_TOKENS : 10));
    size_t step = slice < (double)threads ? threads : slice < (double)items ? (size_t)slice : items;
    size_t grain = !tiled && j.span < 4 ? 4 / j.span : 1;
    obm__lanes whole;
    split_heads(&j, &whole);
    return obm__parallel_parts(m->ctx, &whole, (items + step - 1) / step, grain, tiled ? attend_tiles : attend, &j,
                               m->pulse, err);
}
