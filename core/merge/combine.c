/* Merges that are combinations of their inputs: inner products in one pass, factors from them alone, then the sum.
 *
 * Whatever stays in the span of the inputs and depends on their lengths and angles only (spherical interpolation, means
 * on the sphere, Model Stock) needs nothing else, so no vector has to fit into memory.  Products and sums are f64; the
 * factors are rounded to f32, and so is each step of the sum over the models. */
#include "merge.h"

#include <stdio.h>

/* stats: the kind, how many vectors, how many inputs each combines, then the factors (vectors, inputs). */
#define HEAD 3

typedef struct gather {
    size_t n, pairs;
    uint64_t cols; /* of the matrix whose rows or columns are the vectors */
    double *gram;  /* (vectors, pairs) */
} gather;

static bool has_base_vector(const obm__group *g) { return g->base && !g->steps->deltas; }
static size_t input_count(const obm__group *g) { return g->steps->n + has_base_vector(g); }

static const float *input(const obm__block *b, size_t i) {
    if (!has_base_vector(b->g)) return obm__block_delta(b, i);
    return i == 0 ? b->base : obm__block_delta(b, i - 1);
}

static uint64_t columns_of(const obm__group *g, obm__vector kind) {
    const obm_tensor *t = &g->models[0];
    if (kind == OBM_VECTOR_COLUMN) return t->ndim && t->shape[0] ? g->count / (uint64_t)t->shape[0] : g->count;
    return obm__group_cols(g);
}

static uint64_t vector_count(const obm__group *g, obm__vector kind) {
    if (kind == OBM_VECTOR_TENSOR || g->count == 0) return 1;
    return kind == OBM_VECTOR_ROW ? obm__group_rows(g) : columns_of(g, kind);
}

uint64_t obm__combine_bytes(const obm__group *g) {
    uint64_t n = input_count(g), rows = vector_count(g, OBM_VECTOR_ROW), columns = vector_count(g, OBM_VECTOR_COLUMN);
    return (rows > columns ? rows : columns) * (n + n * (n + 1) / 2) * sizeof(double);
}

static void add_products(const obm__block *b, size_t n, double *sums) {
    for (size_t i = 0, p = 0; i < n; i++)
        for (size_t j = 0; j <= i; j++, p++) sums[p] += b->k->dot(input(b, i), input(b, j), b->n);
}

static void tensor_products(const obm__block *b, const void *arg, double *sums) {
    add_products(b, ((const gather *)arg)->n, sums);
}

static uint64_t row_products(obm__block *b, const obm__part *part, void *arg) {
    const gather *at = arg;
    for (uint64_t col = 0; col < part->cols; col += b->n) {
        b->begin = part->row * at->cols + col;
        b->n = part->cols - col < OBM_MERGE_BLOCK ? (size_t)(part->cols - col) : OBM_MERGE_BLOCK;
        size_t bad = obm__block_load(b);
        if (bad < b->n) return b->begin + bad;
        add_products(b, at->n, at->gram + part->row * at->pairs);
        obm__row_release(b, part->row * at->cols, at->cols);
    }
    return UINT64_MAX;
}

static uint64_t column_products(obm__block *b, const obm__part *part, void *arg) {
    const gather *at = arg;
    b->n = (size_t)part->cols;
    for (uint64_t row = part->row; row < part->row + part->rows; row++) {
        b->begin = row * at->cols + part->col;
        size_t bad = obm__block_load(b);
        if (bad < b->n) return b->begin + bad;
        for (size_t i = 0, p = 0; i < at->n; i++) {
            for (size_t j = 0; j <= i; j++, p++) {
                const float *x = input(b, i), *y = input(b, j);
                double *sum = at->gram + part->col * at->pairs + p;
                for (size_t c = 0; c < b->n; c++) sum[c * at->pairs] += (double)x[c] * (double)y[c];
            }
        }
    }
    return UINT64_MAX;
}

static obm_status gather_products(const obm__run *run, const obm__group *g, obm__vector kind, gather *at,
                                  obm_error *err) {
    if (kind == OBM_VECTOR_TENSOR) return obm__group_sums(run, g, at->pairs, tensor_products, at, at->gram, err);
    bool columns = kind == OBM_VECTOR_COLUMN;
    if (g->count == 0) return OBM_OK;
    return obm__group_parts(run, g, g->count / at->cols, at->cols, columns, columns ? column_products : row_products,
                            at, err);
}

/* Factors of all vectors; square: (n, n). */
static obm_status mix_vectors(obm__group *g, const gather *at, uint64_t vectors, obm__mix_fn mix, double *square,
                              obm_error *err) {
    obm_error why;
    for (uint64_t v = 0; v < vectors; v++) {
        for (size_t i = 0, p = 0; i < at->n; i++)
            for (size_t j = 0; j <= i; j++, p++)
                square[i * at->n + j] = square[j * at->n + i] = at->gram[v * at->pairs + p];
        obm_status status = mix(g->steps, square, at->n, g->stats + HEAD + v * at->n, &why);
        if (status != OBM_OK) return obm__fail(err, status, "%s%s%.500s", g->name, g->name[0] ? ": " : "", why.message);
    }
    return OBM_OK;
}

static obm_status combine_group(const obm__run *run, obm__group *g, obm__vector kind, obm__mix_fn mix, obm_error *err) {
    gather at = {.n = input_count(g), .cols = columns_of(g, kind)};
    at.pairs = at.n * (at.n + 1) / 2;
    if (at.pairs > OBM_MAX_SUMS)
        return obm__fail(err, OBM_E_UNSUPPORTED, "%s takes at most 63 models, found %zu", g->steps->method->info.name,
                         g->steps->n);
    uint64_t vectors = vector_count(g, kind), bytes = obm__combine_bytes(g);
    g->stats = obm__calloc(HEAD + vectors * at.n, sizeof *g->stats);
    at.gram = obm__calloc(vectors * at.pairs + at.n * at.n, sizeof *at.gram);
    if (!g->stats || !at.gram) {
        obm_free(at.gram);
        return obm__fail_nomem(err, bytes);
    }
    g->stats[0] = kind;
    g->stats[1] = (double)at.cols;
    g->stats[2] = (double)at.n;
    obm_status status = gather_products(run, g, kind, &at, err);
    if (status == OBM_OK) status = mix_vectors(g, &at, vectors, mix, at.gram + vectors * at.pairs, err);
    obm_free(at.gram);
    return status;
}

obm_status obm__combine(const obm__run *run, obm__group *groups, size_t n_groups, obm__vector kind, obm__mix_fn mix,
                        obm_error *err) {
    for (size_t i = 0; i < n_groups; i++) OBM_TRY(combine_group(run, &groups[i], kind, mix, err));
    return OBM_OK;
}

/* Elements [from, to) of the block, all of one vector. */
static void add_run(const obm__block *b, const double *factors, size_t n, size_t from, size_t to) {
    for (size_t i = 0; i < n; i++) b->k->axpy_f32(b->mixed + from, (float)factors[i], input(b, i) + from, to - from);
}

static void add_columns(const obm__block *b, const double *factors, size_t n, uint64_t cols) {
    for (size_t i = 0; i < n; i++) {
        const float *x = input(b, i);
        uint64_t col = b->begin % cols;
        for (size_t j = 0; j < b->n; j++) {
            b->mixed[j] += (float)factors[col * n + i] * x[j];
            if (++col == cols) col = 0;
        }
    }
}

void obm__combine_merge(const obm__block *b) {
    const double *stats = b->g->stats, *factors = stats + HEAD;
    obm__vector kind = (obm__vector)stats[0];
    uint64_t cols = (uint64_t)stats[1];
    size_t n = (size_t)stats[2];
    memset(b->mixed, 0, b->n * sizeof *b->mixed);
    if (kind == OBM_VECTOR_COLUMN) {
        add_columns(b, factors, n, cols);
    } else if (kind == OBM_VECTOR_TENSOR) {
        add_run(b, factors, n, 0, b->n);
    } else {
        for (size_t j = 0; j < b->n;) {
            uint64_t row = (b->begin + j) / cols, left = (row + 1) * cols - (b->begin + j);
            size_t to = left < b->n - j ? j + (size_t)left : b->n;
            add_run(b, factors + row * n, n, j, to);
            j = to;
        }
    }
    for (size_t j = 0; b->g->base && b->g->steps->deltas && j < b->n; j++) b->mixed[j] = b->base[j] + b->mixed[j];
}
