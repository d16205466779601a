/* Attention of prompts: up to 64 queries of a sequence against its keys, both products as GEMM.  Scores never leave the
 * caches: a step takes 256 positions, and sums of earlier steps shrink where a larger score turns up (Milakov and
 * Gimelshein 2018, Online normalizer calculation for softmax).
 *
 * Steps begin at multiples of 256 positions.  What a query does not see has weight 0, and 0 times a finite number
 * changes no sum, so its result depends on its own position, and not on which other queries are in the tile. */
#include "model.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define STEP 256
#define LANES 16 /* scores are padded to whole vectors */

typedef struct tile {
    const obm_model *m;
    const obm__sequence *s;
    int64_t layer, kv_head, window;
    int64_t first, end;     /* positions of the queries */
    int64_t from;           /* of this step: the first one, */
    size_t n;               /* and how many */
    size_t dim, wide, span; /* wide: dim in whole strips */
    float *keys, *values;   /* packed for GEMM: (n / 32, 2, dim, 16), (wide / 32, 2, n, 16) */
    float *widened;         /* (64, dim) */
    float *scores;          /* (64, STEP) */
    float *sums, *products; /* (span, 64, wide): of the steps so far, and of this one */
    float *largest;         /* (span, 64) of the scores so far */
    float *factors;         /* (64): what a new largest score makes of the sums so far */
    double *totals;         /* (span, 64) of the weights so far */
} tile;

static size_t strips_of(size_t n) { return (n + OBM__GEMM_ROWS - 1) / OBM__GEMM_ROWS; }

static size_t group_of(const obm_model *m) { return (size_t)(m->config.heads / m->config.kv_heads); }

size_t obm__tile_floats(const obm_model *m) {
    size_t dim = (size_t)m->config.head_dim, wide = strips_of(dim) * OBM__GEMM_ROWS,
           rows = group_of(m) * OBM_TILE_TOKENS;
    return STEP * (dim + wide) + OBM_TILE_TOKENS * (dim + STEP + 1) + rows * (2 * wide + 3);
}

/* Totals first, since they are twice as wide. */
static void place_buffers(tile *t, float *at) {
    size_t rows = t->span * OBM_TILE_TOKENS;
    t->totals = (double *)(void *)at;
    t->largest = at + 2 * rows;
    t->factors = t->largest + rows;
    t->scores = t->factors + OBM_TILE_TOKENS;
    t->widened = t->scores + OBM_TILE_TOKENS * STEP;
    t->keys = t->widened + OBM_TILE_TOKENS * t->dim;
    t->values = t->keys + STEP * t->dim;
    t->sums = t->values + STEP * t->wide;
    t->products = t->sums + rows * t->wide;
}

/* ---- keys and values of a step ---- */

/* Positions from p on to the end of the page or the step, in f32; p begins a page. */
static const float *load_page(const tile *t, int which, int64_t p, size_t *rows) {
    const void *page = obm__kv_at(t->m, t->s, p / OBM_TILE_TOKENS, t->layer, which, t->kv_head);
    size_t left = t->n - (size_t)(p - t->from);
    *rows = left < OBM_TILE_TOKENS ? left : OBM_TILE_TOKENS;
    if (t->s->kv == OBM_F32) return page;
    t->m->ctx->k->f16_to_f32(t->widened, page, *rows * t->dim);
    return t->widened;
}

static void pack_keys(const tile *t) {
    size_t rows;
    for (size_t at = 0; at < t->n; at += rows) {
        const float *keys = load_page(t, 0, t->from + (int64_t)at, &rows);
        for (size_t r = 0; r < rows; r += OBM__GEMM_ROWS)
            t->m->ctx->k->gemm_pack(t->keys + (at + r) * t->dim, keys + r * t->dim, t->dim,
                                    rows - r < OBM__GEMM_ROWS ? rows - r : OBM__GEMM_ROWS, t->dim);
    }
}

/* Columns of the values are the rows of GEMM: nothing is transposed, 16 columns at a time move as they lie. */
static void pack_columns(const tile *t, size_t at, const float *values, size_t rows) {
    size_t half = OBM__GEMM_HALF;
    for (size_t c = 0; c < t->wide; c += half) {
        float *to = t->values + c * t->n + at * half;
        size_t there = t->dim < c ? 0 : t->dim - c < half ? t->dim - c : half;
        for (size_t r = 0; there == half && r < rows; r++) memcpy(to + r * half, values + r * t->dim + c, 64);
        for (size_t r = 0; there < half && r < rows; r++) {
            memset(to + r * half, 0, 64);
            memcpy(to + r * half, values + r * t->dim + c, there * sizeof *to);
        }
    }
}

static void pack_values(const tile *t) {
    size_t rows;
    for (size_t at = 0; at < t->n; at += rows) {
        const float *values = load_page(t, 1, t->from + (int64_t)at, &rows);
        pack_columns(t, at, values, rows);
    }
}

/* ---- weights ---- */

/* What the query at position p sees of the step: [*begin, *end). */
static void find_seen(const tile *t, int64_t p, size_t *begin, size_t *end) {
    int64_t from = t->window && p + 1 > t->window ? p + 1 - t->window : 0, left = p + 1 - t->from;
    *end = left < (int64_t)t->n ? (size_t)left : t->n;
    *begin = from <= t->from ? 0 : from - t->from < (int64_t)*end ? (size_t)(from - t->from) : *end;
}

/* The scores x of one query become weights, relative to the largest so far. */
static void weigh(const tile *t, size_t head, size_t i, float *x) {
    const obm__config *c = &t->m->config;
    const obm_kernels *k = t->m->ctx->k;
    size_t begin, end, padded = (t->n + LANES - 1) / LANES * LANES;
    float scale = c->attention_scale, *largest = t->largest + head * OBM_TILE_TOKENS + i, before = *largest;
    double *total = t->totals + head * OBM_TILE_TOKENS + i;
    find_seen(t, t->first + (int64_t)i, &begin, &end);
    if (c->attention_cap > 0) {
        for (size_t j = begin; j < end; j++) x[j] = obm__soft_cap(x[j] * scale, c->attention_cap);
        scale = 1;
    }
    for (size_t j = 0; j < begin; j++) x[j] = -INFINITY;
    for (size_t j = end; j < padded; j++) x[j] = -INFINITY;
    float max = k->scale_max(x, scale, padded);
    *largest = max > before ? max : before;
    t->factors[i] = 1;
    if (*largest > before) {
        t->factors[i] = before;
        k->exp_sum(t->factors + i, *largest, 1);
    }
    *total = *total * (double)t->factors[i] + k->exp_sum(x, *largest, padded);
}

/* ---- a step ---- */

/* Weight 0 hides what is finite alone.  Where it is not, each query has values of its own: what it does not see is 0.
 */
static void mix_apart(const tile *t, float *products) {
    size_t begin, end, n = (size_t)(t->end - t->first);
    for (size_t i = 0; i < n; i++) {
        pack_values(t);
        find_seen(t, t->first + (int64_t)i, &begin, &end);
        for (size_t c = 0; c < t->wide; c += OBM__GEMM_HALF) {
            float *at = t->values + c * t->n;
            memset(at, 0, begin * OBM__GEMM_HALF * sizeof *at);
            memset(at + end * OBM__GEMM_HALF, 0, (t->n - end) * OBM__GEMM_HALF * sizeof *at);
        }
        t->m->ctx->k->gemm(products + i * t->wide, t->wide, t->values, t->wide / OBM__GEMM_ROWS, t->scores + i * STEP,
                           STEP, 1, t->n);
    }
    pack_values(t);
}

/* q: (rows, heads, head_dim) from the tile's first query on; apart: some value is not finite. */
static void attend_step(const tile *t, size_t head, const float *q, bool apart) {
    const obm_kernels *k = t->m->ctx->k;
    size_t rows = (size_t)(t->end - t->first), ld = (size_t)t->m->config.heads * t->dim;
    float *products = t->products + head * OBM_TILE_TOKENS * t->wide;
    const float *sums = t->sums + head * OBM_TILE_TOKENS * t->wide;
    k->gemm(t->scores, STEP, t->keys, strips_of(t->n), q, ld, rows, t->dim);
    for (size_t i = 0; i < rows; i++) weigh(t, head, i, t->scores + i * STEP);
    if (apart)
        mix_apart(t, products);
    else
        k->gemm(products, t->wide, t->values, t->wide / OBM__GEMM_ROWS, t->scores, STEP, rows, t->n);
    for (size_t i = 0; i < rows; i++) k->axpy_f32(products + i * t->wide, t->factors[i], sums + i * t->wide, t->wide);
}

/* Whether a query sees a part of the step only, and not all of it is finite. */
static bool is_apart(const tile *t) {
    size_t begin, end, last_begin, last_end, size = t->wide * t->n;
    find_seen(t, t->first, &begin, &end);
    find_seen(t, t->end - 1, &last_begin, &last_end);
    if (!last_begin && end == t->n) return false;
    return t->m->ctx->k->find_nonfinite(t->values, size) < size;
}

/* 0 + x: so no sum is -0, whose sign would depend on zeros that others see. */
static void store_sums(const tile *t, size_t head, float *out) {
    size_t ld = (size_t)t->m->config.heads * t->dim;
    for (size_t i = 0; i < (size_t)(t->end - t->first); i++) {
        size_t row = head * OBM_TILE_TOKENS + i;
        memset(out + i * ld, 0, t->dim * sizeof *out);
        t->m->ctx->k->axpy_f32(out + i * ld, (float)(1 / t->totals[row]), t->sums + row * t->wide, t->dim);
    }
}

void obm__attend_tile(const obm_model *m, const obm__row *rows, size_t first, size_t n, int64_t layer, int64_t head,
                      size_t span, int worker) {
    const obm__config *c = &m->config;
    tile t = {.m = m, .s = rows[first].sequence, .layer = layer, .window = c->layer[layer].window, .span = span};
    t.kv_head = head / (int64_t)group_of(m);
    t.first = rows[first].position;
    t.end = t.first + (int64_t)n;
    t.dim = (size_t)c->head_dim;
    t.wide = strips_of(t.dim) * OBM__GEMM_ROWS;
    place_buffers(&t, m->scratch.tiles + (size_t)worker * obm__tile_floats(m));
    for (size_t i = 0; i < span * OBM_TILE_TOKENS; i++) {
        t.largest[i] = -FLT_MAX;
        t.totals[i] = 0;
    }
    memset(t.sums, 0, span * OBM_TILE_TOKENS * t.wide * sizeof *t.sums);
    size_t at = (first * (size_t)c->heads + (size_t)head) * t.dim; // (rows, heads, head_dim)
    int64_t begin = t.window && t.first + 1 > t.window ? t.first + 1 - t.window : 0, next;
    for (t.from = begin / OBM_TILE_TOKENS * OBM_TILE_TOKENS; t.from < t.end; t.from = next) {
        next = (t.from / STEP + 1) * STEP;
        t.n = (size_t)((next < t.end ? next : t.end) - t.from);
        pack_keys(&t);
        pack_values(&t);
        bool apart = is_apart(&t);
        for (size_t h = 0; h < span; h++) attend_step(&t, h, m->scratch.q + at + h * t.dim, apart);
        float *sums = t.sums;
        t.sums = t.products;
        t.products = sums;
    }
    for (size_t h = 0; h < span; h++) store_sums(&t, h, m->scratch.mixed + at + h * t.dim);
}
