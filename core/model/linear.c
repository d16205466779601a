/* Linear layers: the one place that asks for the rows of a matrix under a route.  It keeps no state. */
#include "model.h"

#include <math.h>
#include <string.h>

#define SHARE_FLOPS 1e5 /* least work of a worker: a few us, more than the hand-over costs */

typedef struct linear_job {
    obm_model *m;
    const obm__weights *const *weights; /* (n) */
    size_t n;
    int64_t layer;
    const obm__linear *layers;
    size_t count;
    const float *x;      /* (n, cols) */
    uint16_t *rounded;   /* (n, cols): x as bf16, for matrices that are multiplied so; NULL: none is */
    obm__lanes items;    /* node after node, in a node layer after layer */
    size_t *first_item;  /* (nodes, 4): items of layer l at a node: [first_item[l], first_item[l + 1]) */
    size_t *first_block; /* (nodes, 4): of its rows, in items of the layer */
    int64_t cols;
} linear_job;

static const obm__linear *find_item(const linear_job *j, size_t item, int64_t *row) {
    int node = 0;
    size_t l = 0;
    while (item >= j->items.end[node]) node++;
    const size_t *first = j->first_item + node * 4;
    while (item >= first[l + 1]) l++;
    *row = (int64_t)(item - first[l] + j->first_block[node * 4 + (int)l]) * OBM_BLOCK_ROWS;
    return &j->layers[l];
}

static const float *find_bias(const linear_job *j, const obm__weights *w, obm__role role) {
    return role < OBM_Q_BIAS ? obm__weights_at(w, j->layer, (obm__role)(role + OBM_Q_BIAS))->data : NULL;
}

static const void *matrix_row(const obm__matrix *w, int64_t row) {
    return (const char *)w->data + (size_t)row * (size_t)w->cols * obm_dtype_size(w->dtype);
}

/* ---- the copy of a matrix that is near a worker, where there are several ---- */

typedef struct near_copy {
    obm__matrix matrix;
    obm__z12 z12;
    obm__terms terms;
    obm__signs signs;
} near_copy;

static const obm__matrix *find_near(const linear_job *j, const obm__matrix *w, int worker, near_copy *c) {
    const obm_model *m = j->m;
    if (!obm__place_near(m, 1, worker)) return w;
    c->matrix = *w;
    if (w->z12) {
        c->z12 = *w->z12;
        c->z12.codes += obm__place_near(m, w->z12->rows * w->z12->blocks * OBM__Z12_BYTES, worker);
        c->z12.tables += obm__place_near(m, w->z12->rows * OBM__Z12_TABLE, worker);
        c->matrix.z12 = &c->z12;
    } else if (w->origin) {
        size_t bytes = (size_t)(w->rows * w->cols) * obm_dtype_size(w->dtype);
        c->matrix.data = (const char *)w->data + obm__place_near(m, bytes, worker);
    }
    if (w->terms) {
        c->terms = *w->terms;
        c->signs = *w->terms->signs;
        c->signs.blocks += obm__place_near(m, obm__signs_bytes(&c->signs), worker);
        c->terms.signs = &c->signs;
        c->matrix.terms = &c->terms;
    }
    return &c->matrix;
}

/* ---- row path: the vectors of one matrix against a block of its rows, then against the planes of the same rows ----
 */

static uint16_t *worker_rows(const linear_job *j, int worker) {
    const obm__scratch *s = &j->m->scratch;
    return s->unpacked ? s->unpacked + (size_t)worker * OBM__Z12_UNPACKED * s->widest : NULL;
}

/* One vector waits for memory, several wait for arithmetic, of which unpacking is more: they read bf16 where it is. */
static const obm__z12 *packed_for(const linear_job *j, const obm__matrix *w, size_t tokens) {
    return tokens > 1 && j->m->z12_beside ? NULL : obm__matrix_packed(w);
}

static void multiply_rows(const linear_job *j, const obm__matrix *w, int64_t row, int64_t rows, const float *x,
                          size_t tokens, float *y, size_t ldy, uint16_t *unpacked) {
    const obm_kernels *k = j->m->ctx->k;
    const obm__z12 *packed = packed_for(j, w, tokens);
    const void *data = matrix_row(w, row);
    size_t cols = (size_t)w->cols, n = (size_t)rows;
    if (packed)
        k->batch_z12(y, ldy, packed, (size_t)row, n, x, cols, tokens, unpacked);
    else if (w->dtype == OBM_BF16)
        k->batch_bf16(y, ldy, data, cols, n, x, cols, tokens, cols);
    else if (w->dtype == OBM_F16)
        k->batch_f16(y, ldy, data, cols, n, x, cols, tokens, cols);
    else
        k->batch_f32(y, ldy, data, cols, n, x, cols, tokens, cols);
}

/* Sequences from i on that multiply with the very same matrix; the kernels' results do not depend on the grouping. */
static size_t same_matrix(const linear_job *j, size_t i, obm__role role) {
    const obm__matrix *w = obm__weights_at(j->weights[i], j->layer, role);
    size_t end = i + 1;
    while (end < j->n && j->weights[end]) {
        const obm__matrix *other = obm__weights_at(j->weights[end], j->layer, role);
        if (other->data != w->data || other->rows != w->rows || other->dtype != w->dtype) break;
        end++;
    }
    return end - i;
}

/* The next rows of the base, which the planes ask for while they compute: memory must not rest. */
static size_t rows_ahead(const obm__matrix *w, const obm__z12 *packed, int64_t row, const void **ahead) {
    int64_t next = row + OBM_BLOCK_ROWS, left = w->rows - next < OBM_BLOCK_ROWS ? w->rows - next : OBM_BLOCK_ROWS;
    if (left <= 0) return 0;
    if (packed) {
        size_t block = packed->blocks * OBM__Z12_BYTES; /* of one row */
        *ahead = packed->codes + (size_t)next * block;
        return (size_t)left * block;
    }
    *ahead = matrix_row(w, next);
    return (size_t)(left * w->cols) * obm_dtype_size(w->dtype);
}

static void finish_rows(const linear_job *j, const obm__linear *l, size_t i, size_t tokens, int64_t row, int64_t there,
                        int64_t rows, int worker) {
    float *y = l->y + (int64_t)i * l->ld;
    near_copy copy;
    const obm__matrix *w = find_near(j, obm__weights_at(j->weights[i], j->layer, l->role), worker, &copy);
    const void *ahead = NULL;
    size_t ahead_bytes = rows_ahead(w, packed_for(j, w, tokens), row, &ahead);
    if (w->terms && there > 0)
        obm__terms_multiply(j->m->ctx->k, w->terms, &j->m->scratch.tables[i], row, there, ahead, ahead_bytes, y + row);
    for (int64_t r = there; r < rows; r++) y[row + r] = -INFINITY; /* ids that only another route has */
    const float *bias = find_bias(j, j->weights[i], l->role);
    for (int64_t r = 0; bias && r < there; r++) y[row + r] += bias[row + r];
}

static void row_block(const linear_job *j, const obm__linear *l, size_t i, size_t tokens, int64_t row, int worker) {
    near_copy copy;
    const obm__matrix *w = find_near(j, obm__weights_at(j->weights[i], j->layer, l->role), worker, &copy);
    int64_t rows = l->ld - row < OBM_BLOCK_ROWS ? l->ld - row : OBM_BLOCK_ROWS;
    int64_t there = w->rows - row < 0 ? 0 : w->rows - row < rows ? w->rows - row : rows;
    multiply_rows(j, w, row, there, j->x + (int64_t)i * w->cols, tokens, l->y + (int64_t)i * l->ld + row, (size_t)l->ld,
                  worker_rows(j, worker));
    for (size_t t = i; t < i + tokens; t++) finish_rows(j, l, t, tokens, row, there, rows, worker);
}

static void run_rows(void *arg, size_t begin, size_t end, int worker) {
    const linear_job *j = arg;
    for (size_t item = begin; item < end; item++) {
        int64_t row;
        const obm__linear *l = find_item(j, item, &row);
        for (size_t i = 0, tokens; i < j->n; i += tokens) {
            tokens = j->weights[i] ? same_matrix(j, i, l->role) : 1;
            if (j->weights[i]) row_block(j, l, i, tokens, row, worker);
        }
    }
}

/* ---- tables of the vectors that meet planes, shared by the layers of a call ---- */

static bool meets_planes(const linear_job *j, size_t i) {
    for (size_t l = 0; j->weights[i] && l < j->count; l++)
        if (obm__weights_at(j->weights[i], j->layer, j->layers[l].role)->terms) return true;
    return false;
}

static size_t tiles_of(int64_t cols) { return ((size_t)cols + OBM__PLANE_TILE - 1) / OBM__PLANE_TILE; }

/* Item: one tile of one vector. */
static void build_tables(void *arg, size_t begin, size_t end, int worker) {
    const linear_job *j = arg;
    size_t tiles = tiles_of(j->cols);
    (void)worker;
    for (size_t item = begin; item < end; item++) {
        size_t i = item / tiles, tile = item % tiles, first = tile * OBM__PLANE_TILE, left = (size_t)j->cols - first;
        const obm__tables *t = &j->m->scratch.tables[i];
        if (!meets_planes(j, i)) continue;
        j->m->ctx->k->plane_tables(t->bytes + first / 8 * OBM__PLANE_TABLE, t->scales + tile,
                                   t->sums + first / OBM__PLANE_GROUP, j->x + i * (size_t)j->cols + first,
                                   left < OBM__PLANE_TILE ? left : OBM__PLANE_TILE);
    }
}

static obm_status prepare_tables(linear_job *j, obm_error *err) {
    size_t i = 0;
    while (i < j->n && !meets_planes(j, i)) i++;
    if (i == j->n) return OBM_OK;
    OBM_TRY(obm__scratch_tables(j->m, j->n, err));
    obm__place_rows(j->m, j->n * tiles_of(j->cols), 1, build_tables, j);
    return OBM_OK;
}

/* ---- tiled path: GEMM of (64 tokens, 64 weight rows, cols); the last panel of a matrix may have fewer rows ---- */

static int64_t panel_rows(const obm__matrix *w, int64_t row) {
    return w->rows - row < OBM_BLOCK_ROWS ? w->rows - row : OBM_BLOCK_ROWS;
}

static void widen_packed(const obm_kernels *k, const obm__z12 *w, size_t row, size_t rows, float *panel,
                         uint16_t *unpacked) {
    for (size_t r = 0, n; r < rows; r += n) {
        n = rows - r < OBM__Z12_UNPACKED ? rows - r : OBM__Z12_UNPACKED;
        k->z12_unpack(unpacked, w->cols, w, row + r, n);
        k->bf16_to_f32(panel + r * w->cols, unpacked, n * w->cols);
    }
}

/* Rows of the matrix in f32, (rows, cols), with what the route adds: where they are, or in `wide`. */
static const float *widen_panel(const linear_job *j, const obm__matrix *w, int64_t row, int worker, float *wide) {
    const obm_kernels *k = j->m->ctx->k;
    int64_t rows = panel_rows(w, row);
    size_t count = (size_t)(rows * w->cols);
    const void *data = matrix_row(w, row);
    const obm__z12 *packed = packed_for(j, w, OBM_TILE_TOKENS);
    if (w->dtype == OBM_F32 && !w->terms) return data;
    if (packed)
        widen_packed(k, packed, (size_t)row, (size_t)rows, wide, worker_rows(j, worker));
    else if (w->dtype == OBM_BF16)
        k->bf16_to_f32(wide, data, count);
    else if (w->dtype == OBM_F16)
        k->f16_to_f32(wide, data, count);
    else
        memcpy(wide, data, count * sizeof *wide);
    if (w->terms) obm__terms_add(k, w->terms, row, rows, wide, j->m->scratch.strips + (size_t)worker * OBM_STRIP_BYTES);
    return wide;
}

/* Products of bf16 are for weights that are bf16: with what a route adds, a weight takes 24 bits. */
static bool takes_pairs(const linear_job *j, const obm__matrix *w) {
    return j->rounded && w->dtype == OBM_BF16 && !w->terms;
}

/* Rows of the matrix as pairs of columns, (rows, cols / 2): where they are, or in `unpacked`. */
static const void *find_pairs(const linear_job *j, const obm__matrix *w, int64_t row, void *unpacked) {
    const obm__z12 *packed = packed_for(j, w, OBM_TILE_TOKENS);
    if (!packed) return matrix_row(w, row);
    j->m->ctx->k->z12_unpack(unpacked, w->cols, packed, (size_t)row, (size_t)panel_rows(w, row));
    return unpacked;
}

/* The panel as GEMM takes it: strips of 32 rows in halves, (strips, 2, cols, 16), or so of pairs of columns. */
static const float *load_panel(const linear_job *j, const obm__matrix *w, int64_t row, int worker) {
    const obm__scratch *s = &j->m->scratch;
    size_t cols = (size_t)w->cols, rows = (size_t)panel_rows(w, row);
    float *packed = s->packed + (size_t)worker * s->panel_size, *room = s->panels + (size_t)worker * s->panel_size;
    const float *wide;
    if (takes_pairs(j, w)) {
        wide = find_pairs(j, w, row, room);
        cols /= 2;
    } else
        wide = widen_panel(j, w, row, worker, room);
    for (size_t r = 0; r < rows; r += OBM__GEMM_ROWS)
        j->m->ctx->k->gemm_pack(packed + r * cols, wide + r * cols, cols,
                                rows - r < OBM__GEMM_ROWS ? rows - r : OBM__GEMM_ROWS, cols);
    return packed;
}

/* The rows of a tile that hold tokens stand together: [*begin, *end); false where there are none. */
static bool find_tokens(const linear_job *j, size_t first, size_t *begin, size_t *end) {
    size_t stop = first + OBM_TILE_TOKENS;
    *begin = first;
    while (*begin < stop && !j->weights[*begin]) ++*begin;
    *end = *begin;
    while (*end < stop && j->weights[*end]) ++*end;
    return *begin < *end;
}

/* product: (tokens, 64) -> rows [begin, end) of y, with the bias. */
static void store_product(const linear_job *j, const obm__linear *l, size_t begin, size_t end, int64_t row,
                          int64_t rows, const float *product) {
    const float *bias = find_bias(j, j->weights[begin], l->role);
    for (size_t i = begin; i < end; i++, product += OBM_BLOCK_ROWS) {
        float *y = l->y + (int64_t)i * l->ld + row;
        memcpy(y, product, (size_t)rows * sizeof *y);
        for (int64_t r = 0; bias && r < rows; r++) y[r] += bias[row + r];
    }
}

static void multiply_panel(const linear_job *j, const obm__matrix *w, const float *panel, size_t rows, size_t from, size_t to,
                           float *product) {
    const obm_kernels *k = j->m->ctx->k;
    size_t strips = (rows + OBM__GEMM_ROWS - 1) / OBM__GEMM_ROWS, cols = (size_t)w->cols;
    if (takes_pairs(j, w))
        k->gemm_pairs(product, OBM_BLOCK_ROWS, (const uint32_t *)(const void *)panel, strips,
                      (const uint32_t *)(const void *)(j->rounded + from * cols), cols / 2, to - from, cols / 2);
    else
        k->gemm(product, OBM_BLOCK_ROWS, panel, strips, j->x + from * cols, cols, to - from, cols);
}

static void run_panels(void *arg, size_t begin, size_t end, int worker) {
    const linear_job *j = arg;
    float *product = j->m->scratch.products + (size_t)worker * OBM_TILE_TOKENS * OBM_BLOCK_ROWS;
    for (size_t item = begin; item < end; item++) {
        int64_t row;
        const obm__linear *l = find_item(j, item, &row);
        const obm__matrix *loaded = NULL;
        const float *panel = NULL;
        for (size_t first = 0, from, to; first < j->n; first += OBM_TILE_TOKENS) {
            if (!find_tokens(j, first, &from, &to)) continue;
            const obm__matrix *w = obm__weights_at(j->weights[from], j->layer, l->role);
            if (!loaded || w->data != loaded->data || w->terms != loaded->terms) {
                near_copy copy;
                panel = load_panel(j, find_near(j, w, worker, &copy), row, worker);
            }
            loaded = w;
            int64_t rows = panel_rows(w, row);
            multiply_panel(j, w, panel, (size_t)rows, from, to, product);
            store_product(j, l, from, to, row, rows, product);
        }
    }
}

static void round_rows(void *arg, size_t begin, size_t end, int worker) {
    const linear_job *j = arg;
    size_t cols = (size_t)j->cols;
    (void)worker;
    for (size_t i = begin; i < end; i++)
        if (j->weights[i]) j->m->ctx->k->f32_to_bf16(j->rounded + i * cols, j->x + i * cols, cols);
}

/* Activations as bf16 where prompts are multiplied so: once for all layers of the call. */
static void round_activations(linear_job *j) {
    j->rounded = j->cols % 2 ? NULL : j->m->scratch.rounded;
    if (j->rounded) obm__place_rows(j->m, j->n, 1, round_rows, j);
}

/* ---- both ---- */

/* Where the items of each layer begin. */
static void place_items(linear_job *j) {
    obm__lanes of[3];
    size_t items = 0;
    for (size_t l = 0; l < j->count; l++)
        obm__place_split(j->m, obm__role_kind(j->layers[l].role), OBM_BLOCK_ROWS,
                         (size_t)((j->layers[l].ld + OBM_BLOCK_ROWS - 1) / OBM_BLOCK_ROWS), &of[l]);
    j->items.n = of[0].n;
    for (int node = 0; node < j->items.n; node++) {
        j->items.begin[node] = items;
        for (size_t l = 0; l < j->count; l++) {
            j->first_item[node * 4 + (int)l] = items;
            j->first_block[node * 4 + (int)l] = of[l].begin[node];
            items += of[l].end[node] - of[l].begin[node];
        }
        j->first_item[node * 4 + (int)j->count] = j->items.end[node] = items;
    }
}

/* Slices keep the time between two looks at the pulse short; items do not depend on the slicing. */
static obm_status run_slices(linear_job *j, obm__range_fn fn, double item_flops, obm_error *err) {
    size_t total = j->items.end[j->items.n - 1], threads = (size_t)j->m->ctx->threads;
    double items = OBM_SLICE_FLOPS / item_flops;
    size_t grain = SHARE_FLOPS > item_flops ? (size_t)(SHARE_FLOPS / item_flops) : 1;
    size_t slice = items < (double)threads ? threads : items < (double)total ? (size_t)items : total;
    return obm__parallel_parts(j->m->ctx, &j->items, (total + slice - 1) / slice, grain, fn, j, j->m->pulse, err);
}

obm_status obm__linear_run(obm_model *m, const obm__weights *const *weights, size_t n, bool tiled, int64_t layer,
                           const obm__linear *layers, size_t count, const float *x, obm_error *err) {
    size_t first_item[OBM_NODES * 4], first_block[OBM_NODES * 4];
    linear_job j = {.m = m,
                    .weights = weights,
                    .n = n,
                    .layer = layer,
                    .layers = layers,
                    .count = count,
                    .x = x,
                    .first_item = first_item,
                    .first_block = first_block};
    int64_t rows;
    obm__config_shape(&m->config, layers[0].role, &rows, &j.cols);
    place_items(&j);
    double item_flops = 2.0 * (double)n * OBM_BLOCK_ROWS * (double)j.cols;
    if (tiled)
        round_activations(&j);
    else
        OBM_TRY(prepare_tables(&j, err));
    return run_slices(&j, tiled ? run_panels : run_rows, item_flops, err);
}
