/* Masks by rank: an element's chance to stay grows with the rank of its magnitude in its row.
 *
 * With ranks r = 0 .. n - 1 of |d| in a row of n, ascending, equal magnitudes in the order of their indices,
 *
 *     p = density - epsilon + 2 * epsilon * r / (n - 1)          (n = 1: p = density)
 *
 * (Deep et al., DELLA-Merging, arXiv 2406.11617, section 3.1; a 1-D tensor is one row).  Draws are those of random.c.
 */
#include "merge.h"

struct obm__ranked {
    uint64_t at, until, cols;
    size_t span;     /* elements that `factors` holds per model */
    float *factors;  /* (n_models, span) */
    uint32_t *words; /* (workers, 4, cols): keys and indices, and what sorting moves them to */
    const obm_kernels *k;
    const obm__group *g;
    float *lanes;
    _Atomic uint64_t bad;
};

static uint64_t span_of(uint64_t count) { return count < OBM_MERGE_SPAN ? count : OBM_MERGE_SPAN; }

uint64_t obm__ranked_bytes(const obm__group *g, int threads) {
    return g->steps->n * span_of(g->count) * sizeof(float) + (uint64_t)threads * 16 * obm__group_cols(g);
}

obm_status obm__ranked_new(const obm__run *run, const obm__group *g, uint64_t count, obm__ranked **out,
                           obm_error *err) {
    obm__ranked *r = obm__calloc(1, sizeof *r);
    if (!r) return obm__fail_nomem(err, sizeof *r);
    r->span = (size_t)span_of(count);
    r->cols = obm__group_cols(g);
    r->factors = obm__alloc(g->steps->n * r->span, sizeof *r->factors);
    r->words = obm__alloc((size_t)run->ctx->threads * 4 * (size_t)r->cols, sizeof *r->words);
    if (r->factors && r->words) {
        *out = r;
        return OBM_OK;
    }
    obm__ranked_free(r);
    return obm__fail_nomem(err, obm__ranked_bytes(g, run->ctx->threads));
}

void obm__ranked_free(obm__ranked *r) {
    if (!r) return;
    obm_free(r->factors);
    obm_free(r->words);
    obm_free(r);
}

/* Stable sort of n (key, index) pairs by their keys, 8 bits at a time; bits that all keys share take no pass.  Returns
 * the indices. */
static const uint32_t *sort_pairs(uint32_t *words, size_t n) {
    uint32_t *from = words, *to = words + 2 * n;
    for (int shift = 0; shift < 32; shift += 8) {
        size_t start[257] = {0};
        for (size_t j = 0; j < n; j++) start[(from[j] >> shift & 255) + 1]++;
        if (start[(from[0] >> shift & 255) + 1] == n) continue;
        for (size_t i = 0; i < 256; i++) start[i + 1] += start[i];
        for (size_t j = 0; j < n; j++) {
            size_t at = start[from[j] >> shift & 255]++;
            to[at] = from[j];
            to[n + at] = from[n + j];
        }
        uint32_t *swap = from;
        from = to;
        to = swap;
    }
    return from + n;
}

/* Keys of one row; returns the first index that is not finite, UINT64_MAX if all are. */
static uint64_t read_row(const obm__ranked *r, obm__block *b, size_t model, uint64_t row, uint32_t *words) {
    size_t cols = (size_t)r->cols;
    for (size_t j = 0; j < cols; j += b->n) {
        b->begin = row * cols + j;
        b->n = cols - j < OBM_MERGE_BLOCK ? cols - j : OBM_MERGE_BLOCK;
        if (!obm__group_is_plain(b->g, model)) obm__group_base(b->k, b->g, b->begin, b->n, b->base, b->scratch);
        size_t bad = obm__group_delta(b->k, b->g, model, b->begin, b->n, b->base, b->mixed, b->scratch);
        if (bad < b->n) return b->begin + bad;
        for (size_t i = 0; i < b->n; i++) {
            words[j + i] = obm__bits_of(b->mixed[i]) & 0x7fffffffu;
            words[cols + j + i] = (uint32_t)(j + i);
        }
    }
    return UINT64_MAX;
}

static void draw_row(const obm__ranked *r, size_t model, uint64_t row, const uint32_t *order) {
    const obm__steps *s = r->g->steps;
    size_t cols = (size_t)r->cols;
    uint64_t key = obm__random_key(s->seed, r->g->name, model);
    double epsilon = obm__steps_value(s, "epsilon", model), least = s->density[model] - epsilon;
    for (size_t rank = 0; rank < cols; rank++) {
        uint64_t element = row * cols + order[rank];
        if (element < r->at || element >= r->until) continue;
        double keep = cols == 1 ? s->density[model] : least + 2 * epsilon * ((double)rank / (double)(cols - 1));
        bool stays = obm__random_draw(key, element) < obm__random_limit(keep);
        float factor = s->rescale == OBM_RESCALE_INVERSE_DENSITY ? (float)(1 / keep) : 1.0f;
        r->factors[model * r->span + (size_t)(element - r->at)] = stays ? factor : 0.0f;
    }
}

static bool has_ranks(const obm__steps *s, size_t model) { return s->density[model] > 0 && s->density[model] < 1; }

static void rank_rows(void *arg, size_t first, size_t last, int worker) {
    obm__ranked *r = arg;
    obm__block b = obm__block_of(r->lanes, r->k, r->g, worker);
    uint32_t *words = r->words + (size_t)worker * 4 * (size_t)r->cols;
    for (size_t i = first; i < last; i++) {
        uint64_t row = r->at / r->cols + i;
        for (size_t m = 0; m < r->g->steps->n; m++) {
            if (!has_ranks(r->g->steps, m)) continue;
            uint64_t bad = read_row(r, &b, m, row, words);
            if (bad != UINT64_MAX) {
                obm__note_lowest(&r->bad, bad);
            } else {
                draw_row(r, m, row, sort_pairs(words, (size_t)r->cols));
            }
        }
    }
}

obm_status obm__ranked_fill(const obm__run *run, obm__ranked *r, const obm__group *g, uint64_t at, uint64_t until,
                            float *lanes, obm_error *err) {
    r->at = at;
    r->until = until;
    r->k = run->ctx->k;
    r->g = g;
    r->lanes = lanes;
    r->bad = UINT64_MAX;
    obm__parallel(run->ctx, (size_t)((until - 1) / r->cols - at / r->cols + 1), 1, rank_rows, r);
    return r->bad == UINT64_MAX ? OBM_OK : obm__group_bad(r->k, g, r->bad, err);
}

void obm__ranked_apply(const obm__ranked *r, const obm__group *g, size_t model, uint64_t offset, float *d, size_t n) {
    if (!has_ranks(g->steps, model)) {
        if (g->steps->density[model] <= 0) memset(d, 0, n * sizeof *d);
        return;
    }
    const float *factor = r->factors + model * r->span + offset;
    for (size_t j = 0; j < n; j++) d[j] *= factor[j];
}
