/* Causal attention over the paged cache: grouped queries, sliding windows, q and k norms.  A row sees its own sequence
 * only. */
#include "model.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define SHARE_FLOPS 1e5 /* least work of a worker, as in linear.c */

typedef struct attention_job {
    obm_model *m;
    const obm__row *rows;
    int64_t layer;
    size_t n, parts, span; /* rows or tiles; parts of a row at most; heads of an item, which read the same keys */
    bool placed;           /* heads have nodes */
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

/* A row's keys and values are cut at multiples of this, and the parts are joined in order.  So there are items for all
 * workers where heads are few, and the second cache holds what the heads of a group read. */
#define PART OBM_PART_POSITIONS

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
                       const float *q, float *scores) {
    const obm_kernels *k = j->m->ctx->k;
    size_t dim = (size_t)j->m->config.head_dim, rows;
    strips w = {.j = j, .s = s, .which = 0, .kv_head = kv_head, .from = from, .to = to};
    const void *keys;
    for (int64_t p = from; (rows = next_strip(&w, p, &keys)) > 0; p += (int64_t)rows)
        for (size_t h = 0; h < j->span; h++) {
            float *out = scores + h * PART + (p - from);
            if (s->kv == OBM_F16)
                k->rows_f16(out, keys, dim, rows, q + h * dim, dim);
            else
                k->rows_f32(out, keys, dim, rows, q + h * dim, dim);
        }
}

/* Scores become weights, relative to the largest. */
static obm__part weigh(const attention_job *j, float *x, size_t n) {
    const obm_kernels *k = j->m->ctx->k;
    float scale = j->m->config.attention_scale, cap = j->m->config.attention_cap;
    for (size_t i = 0; cap > 0 && i < n; i++) x[i] = obm__soft_cap(x[i] * scale, cap);
    obm__part part = {.largest = k->scale_max(x, cap > 0 ? 1 : scale, n)};
    if (part.largest < -FLT_MAX) part.largest = -FLT_MAX; /* weights of -Inf are 0 where another part has others */
    part.total = k->exp_sum(x, part.largest, n);
    return part;
}

/* out[h] = sum_p weights[h][p - from] * v[p], p increasing; out: (span, parts, head_dim). */
static void mix_values(const attention_job *j, const obm__sequence *s, int64_t kv_head, int64_t from, int64_t to,
                       const float *weights, float *widened, float *out) {
    const obm_kernels *k = j->m->ctx->k;
    size_t dim = (size_t)j->m->config.head_dim, rows;
    strips w = {.j = j, .s = s, .which = 1, .kv_head = kv_head, .from = from, .to = to};
    const void *values;
    for (size_t h = 0; h < j->span; h++) memset(out + h * j->parts * dim, 0, dim * sizeof *out);
    for (int64_t p = from; (rows = next_strip(&w, p, &values)) > 0; p += (int64_t)rows) {
        if (s->kv == OBM_F16) {
            k->f16_to_f32(widened, values, rows * dim);
            values = widened;
        }
        for (size_t h = 0; h < j->span; h++)
            k->mix_rows(out + h * j->parts * dim, weights + h * PART + (p - from), values, dim, rows, dim);
    }
}

/* The positions that row i sees: [*from, *to). */
static void find_seen(const attention_job *j, size_t i, int64_t *from, int64_t *to) {
    int64_t window = j->m->config.layer[j->layer].window;
    *to = j->rows[i].position + 1;
    *from = window && *to > window ? *to - window : 0;
}

static size_t count_parts(const attention_job *j, size_t i) {
    int64_t from, to;
    find_seen(j, i, &from, &to);
    return (size_t)((to - 1) / PART - from / PART + 1);
}

/* out += e(largest of the part - largest of all) * sums of the part, part by part, then by the total of the weights.
 * Without sums: out has those of the one part. */
static void join_parts(const attention_job *j, const obm__part *parts, const float *sums, size_t n, float *out) {
    const obm_kernels *k = j->m->ctx->k;
    size_t dim = (size_t)j->m->config.head_dim;
    float largest = -INFINITY;
    double total = 0;
    for (size_t i = 0; i < n; i++) largest = parts[i].largest > largest ? parts[i].largest : largest;
    for (size_t i = 0; i < n; i++) {
        float factor = parts[i].largest;
        k->exp_sum(&factor, largest, 1);
        total += (double)factor * parts[i].total;
        if (sums) k->axpy_f32(out, factor, sums + i * dim, dim);
    }
    (void)k->scale_max(out, (float)(1 / total), dim);
}

/* (rows, parts, heads / span); in prompts, and where heads have nodes, (kv_heads, rows, parts, heads of a group /
 * span): the heads of a node one after the other, and what reads the same keys together.  *head: the first of `span`.
 * Rows of prompts are tiles. */
static size_t find_row(const attention_job *j, size_t item, int64_t *head, size_t *part) {
    size_t heads = (size_t)j->m->config.heads / j->span, group = heads / (size_t)j->m->config.kv_heads;
    size_t n = j->n * j->parts, at = item % heads, row = item / heads;
    if (j->placed || j->tiled) {
        at = item / (n * group) * group + item % group;
        row = item / group % n;
    }
    *head = (int64_t)(at * j->span);
    *part = row % j->parts;
    return row / j->parts;
}

static void split_heads(const attention_job *j, obm__lanes *out) {
    const obm__config *c = &j->m->config;
    const obm__placement *p = j->m->placement;
    size_t each = j->n * j->parts * (size_t)(c->heads / c->kv_heads) / j->span;
    *out = (obm__lanes){.n = j->placed ? p->nodes : 1};
    if (!j->placed) out->end[0] = each * (size_t)c->kv_heads;
    for (int i = 0; j->placed && i < p->nodes; i++) {
        out->begin[i] = (size_t)p->heads[i] * each;
        out->end[i] = (size_t)p->heads[i + 1] * each;
    }
}

/* The sums and weights of a part; where a row may have one only, its result. */
static void attend_part(const attention_job *j, size_t i, int64_t head, size_t part, int worker) {
    const obm__config *c = &j->m->config;
    const obm__scratch *s = &j->m->scratch;
    const obm__row *row = &j->rows[i];
    int64_t group = c->heads / c->kv_heads, from, to;
    float *scores = s->scores + (size_t)worker * (size_t)group * PART;
    float *widened = s->widened + (size_t)worker * OBM_TILE_TOKENS * (size_t)c->head_dim;
    find_seen(j, i, &from, &to);
    int64_t begin = (from / PART + (int64_t)part) * PART, end = begin + PART;
    begin = begin > from ? begin : from;
    end = end < to ? end : to;
    size_t at = (i * (size_t)c->heads + (size_t)head) * j->parts, dim = (size_t)c->head_dim; // (rows, heads, parts)
    float *out = (j->parts > 1 ? s->sums : s->mixed) + at * dim;
    score_keys(j, row->sequence, head / group, begin, end, s->q + (i * (size_t)c->heads + (size_t)head) * dim, scores);
    for (size_t h = 0; h < j->span; h++)
        s->parts[at + h * j->parts + part] = weigh(j, scores + h * PART, (size_t)(end - begin));
    mix_values(j, row->sequence, head / group, begin, end, scores, widened, out + part * dim);
    for (size_t h = 0; j->parts == 1 && h < j->span; h++) join_parts(j, s->parts + at + h, NULL, 1, out + h * dim);
}

static void attend(void *arg, size_t begin, size_t end, int worker) {
    const attention_job *j = arg;
    for (size_t item = begin; item < end; item++) {
        int64_t head;
        size_t part, i = find_row(j, item, &head, &part);
        if (j->rows[i].sequence && part < count_parts(j, i)) attend_part(j, i, head, part, worker);
    }
}

/* Item: one head of one row. */
static void join_heads(void *arg, size_t begin, size_t end, int worker) {
    const attention_job *j = arg;
    const obm__scratch *s = &j->m->scratch;
    size_t heads = (size_t)j->m->config.heads, dim = (size_t)j->m->config.head_dim;
    (void)worker;
    for (size_t item = begin; item < end; item++) {
        size_t i = item / heads;
        float *out = s->mixed + item * dim;
        if (!j->rows[i].sequence) continue;
        memset(out, 0, dim * sizeof *out);
        join_parts(j, s->parts + item * j->parts, s->sums + item * j->parts * dim, count_parts(j, i), out);
    }
}

static void attend_tiles(void *arg, size_t begin, size_t end, int worker) {
    const attention_job *j = arg;
    for (size_t item = begin; item < end; item++) {
        int64_t head;
        size_t part, first = find_row(j, item, &head, &part) * OBM_TILE_TOKENS, stop = first + OBM_TILE_TOKENS, last;
        while (first < stop && !j->rows[first].sequence) first++;
        for (last = first; last < stop && j->rows[last].sequence;) last++;
        if (first < last) obm__attend_tile(j->m, j->rows, first, last - first, j->layer, head, j->span, worker);
    }
}

/* As many as leave four items for each worker: results do not depend on it. */
static size_t choose_span(const obm_model *m, size_t n) {
    size_t heads = (size_t)m->config.heads, span = heads / (size_t)m->config.kv_heads, group = span;
    while (span > 1 && (group % span || n * heads / span < 4 * (size_t)m->ctx->threads)) span--;
    return span;
}

/* Positions of an item at most, and parts of a row. */
static double plan_items(attention_job *j) {
    int64_t most = 1, from, to;
    for (size_t i = 0; i < (j->tiled ? j->n * OBM_TILE_TOKENS : j->n); i++) {
        if (!j->rows[i].sequence) continue;
        find_seen(j, i, &from, &to);
        most = to - from > most ? to - from : most;
        if (!j->tiled && count_parts(j, i) > j->parts) j->parts = count_parts(j, i);
    }
    j->span = choose_span(j->m, j->n * j->parts);
    return (double)(j->tiled || most < PART ? most : PART);
}

static obm_status attend_all(attention_job *j, double seen, obm_error *err) {
    const obm__config *c = &j->m->config;
    size_t items = j->n * j->parts * (size_t)c->heads / j->span, threads = (size_t)j->m->ctx->threads;
    /* A row is counted tenfold: scores and mixing stream the cache, with less arithmetic per byte than GEMM. */
    double flops = 4.0 * seen * (double)c->head_dim * (double)j->span * (j->tiled ? OBM_TILE_TOKENS : 10);
    double slice = OBM_SLICE_FLOPS / flops;
    size_t step = slice < (double)threads ? threads : slice < (double)items ? (size_t)slice : items;
    obm__lanes whole;
    split_heads(j, &whole);
    return obm__parallel_parts(j->m->ctx, &whole, (items + step - 1) / step, (size_t)(SHARE_FLOPS / flops) + 1,
                               j->tiled ? attend_tiles : attend, j, j->m->pulse, err);
}

obm_status obm__attention_run(obm_model *m, const obm__row *rows, size_t n, bool tiled, int64_t layer, obm_error *err) {
    attention_job j = {.m = m, .rows = rows, .layer = layer, .n = n, .parts = 1, .tiled = tiled};
    size_t heads = (size_t)m->config.heads, dim = (size_t)m->config.head_dim;
    obm__place_rows(m, n, 8, rotate_and_store, &j);
    if (tiled) j.n = n / OBM_TILE_TOKENS;
    j.placed = m->placement && obm__placement_local(m->placement);
    OBM_TRY(attend_all(&j, plan_items(&j), err));
    if (j.parts > 1) obm__place_rows(m, n * heads, 4096 / (j.parts * dim) + 1, join_heads, &j);
    return OBM_OK;
}
