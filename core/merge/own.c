/* Merge methods of the caller: a description becomes a row of the method table, and the pass over the elements hands
 * its function one tile after the other.  The workers read the tile's task vectors and write its result; the function
 * runs in between, alone, on the caller's thread, as Lua and Python need it. */
#include "merge.h"

#include <stdio.h>

/* A mebibyte per lane: long against a call into an interpreter (tens of microseconds), short enough for the last-level
 * cache. */
#define TILE ((uint64_t)1 << 18)

/* ---- descriptions ---- */

static bool is_word(const char *name, const char *extra) {
    size_t n = name ? strlen(name) : 0;
    for (size_t i = 0; i < n; i++) {
        char c = name[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
        if (!letter && !((c >= '0' && c <= '9') || (c && strchr(extra, c)))) return false;
    }
    return n > 0 && n < 64;
}

static obm_status check_param(const obm_method_info *info, size_t i, obm_error *err) {
    const obm_param_info *p = &info->params[i];
    if (!is_word(p->name, ""))
        return obm__fail(err, OBM_E_ARG, "%s: a parameter's name is 1 to 63 letters, digits and _, found \"%.64s\"",
                         info->name, p->name ? p->name : "");
    if (!strcmp(p->name, "scope"))
        return obm__fail(err, OBM_E_ARG, "%s: a parameter of a custom method cannot be named scope", info->name);
    if (!(p->min <= p->dflt && p->dflt <= p->max) || !isfinite(p->dflt))
        return obm__fail(err, OBM_E_ARG, "%s: %s: expected a default in [%g, %g], found %g", info->name, p->name,
                         p->min, p->max, p->dflt);
    for (size_t j = 0; j < i; j++)
        if (!strcmp(info->params[j].name, p->name))
            return obm__fail(err, OBM_E_ARG, "%s: the parameter %s is listed twice", info->name, p->name);
    return OBM_OK;
}

/* Messages that list a method's parameters take so many. */
#define MAX_PARAMS 32

obm_status obm_custom_method_check(const obm_custom_method *m, obm_error *err) {
    const obm__method *built_in;
    OBM_TRY(OBM_CHECK(obm_custom_method, m, err));
    const obm_method_info *info = m ? &m->info : NULL;
    if (!info || !is_word(info->name, "-."))
        return obm__fail(err, OBM_E_ARG, "a method's name is 1 to 63 letters, digits, _, - and ., found \"%.64s\"",
                         info && info->name ? info->name : "");
    if (obm__method_find(info->name, &built_in, NULL) == OBM_OK)
        return obm__fail(err, OBM_E_ARG, "%s is a built-in method: name yours otherwise", info->name);
    if (!m->merge) return obm__fail(err, OBM_E_ARG, "%s: a method needs a function", info->name);
    if (info->min_models < 0 || info->max_models < 0 || (info->max_models && info->max_models < info->min_models))
        return obm__fail(err, OBM_E_ARG, "%s: expected 0 <= min_models <= max_models (0: any), found %d and %d",
                         info->name, info->min_models, info->max_models);
    if (info->n_params > MAX_PARAMS)
        return obm__fail(err, OBM_E_ARG, "%s: at most %d parameters, found %zu", info->name, MAX_PARAMS,
                         info->n_params);
    for (size_t i = 0; i < info->n_params; i++) OBM_TRY(check_param(info, i, err));
    return OBM_OK;
}

/* ---- one tile ---- */

typedef struct tile {
    const obm_kernels *k;
    const obm__group *g;
    uint64_t begin;
    size_t count;
    float *vectors, *base, *result; /* (n_models, count), (count) or NULL, (count) */
    float *lanes;                   /* (workers, 2, OBM_MERGE_BLOCK) */
    obm_dtype dtype;
    char *out; /* of the element at `begin` */
    _Atomic uint64_t bad;
} tile;

static const obm_custom_method *spec_of(const obm__group *g) {
    return ((const obm__own *)(const void *)g->steps->method)->spec;
}

static size_t tile_lanes(const obm__group *g) { return g->steps->n + 1 + (g->base != NULL); }

static size_t block_length(const tile *t, size_t at) {
    return t->count - at < OBM_MERGE_BLOCK ? t->count - at : OBM_MERGE_BLOCK;
}

static void load_blocks(void *arg, size_t first, size_t last, int worker) {
    tile *t = arg;
    float *scratch = t->lanes + (size_t)worker * 2 * OBM_MERGE_BLOCK;
    for (size_t b = first; b < last; b++) {
        size_t at = b * OBM_MERGE_BLOCK, n = block_length(t, at);
        float *base = t->base ? t->base + at : NULL;
        obm__group_base(t->k, t->g, t->begin + at, n, base, scratch);
        for (size_t i = 0; i < t->g->steps->n; i++) {
            size_t bad =
                obm__group_delta(t->k, t->g, i, t->begin + at, n, base, t->vectors + i * t->count + at, scratch);
            if (bad < n) obm__note_lowest(&t->bad, t->begin + at + bad);
        }
        memset(t->result + at, 0, n * sizeof *t->result);
    }
}

/* The function may have written over its base, so the base is read again. */
static void store_blocks(void *arg, size_t first, size_t last, int worker) {
    tile *t = arg;
    float *base = t->lanes + (size_t)worker * 2 * OBM_MERGE_BLOCK, *scratch = base + OBM_MERGE_BLOCK;
    for (size_t b = first; b < last; b++) {
        size_t at = b * OBM_MERGE_BLOCK, n = block_length(t, at);
        obm__group_base(t->k, t->g, t->begin + at, n, base, scratch);
        for (size_t j = 0; j < n; j++) scratch[j] = t->g->base ? base[j] + t->result[at + j] : t->result[at + j];
        size_t bad = obm__store_block(t->k, t->dtype, scratch, n, t->out + at * obm_dtype_size(t->dtype));
        if (bad < n) obm__note_lowest(&t->bad, t->begin + at + bad);
    }
}

static obm_status over_blocks(const obm__run *run, tile *t, obm__range_fn fn, obm_error *err) {
    t->bad = UINT64_MAX;
    obm__parallel(run->ctx, (t->count + OBM_MERGE_BLOCK - 1) / OBM_MERGE_BLOCK, 1, fn, t);
    return t->bad == UINT64_MAX ? OBM_OK : obm__group_bad(t->k, t->g, t->bad, err);
}

static obm_status call_function(const tile *t, obm_error *err) {
    const obm__group *g = t->g;
    const obm_custom_method *m = spec_of(g);
    const obm_tensor *first = &g->models[0];
    obm_merge_tile given = {.tensor = g->name,
                            .ndim = first->ndim,
                            .shape = first->shape,
                            .begin = t->begin,
                            .count = t->count,
                            .n_models = g->steps->n,
                            .vectors = t->vectors,
                            .base = t->base,
                            .values = g->steps->values,
                            .out = t->result};
    obm_error own = {0};
    obm_status status = m->merge(m->user, &given, &own);
    if (status != OBM_OK)
        return own.message[0]
                   ? obm__fail(err, status, "%s", own.message)
                   : obm__fail(err, status, "%s: stopped by the method %s", obm__group_name(g), m->info.name);
    size_t bad = t->k->find_nonfinite(t->result, t->count);
    if (bad == t->count) return OBM_OK;
    return obm__fail(err, OBM_E_VALUE, "%s: the method %s gave NaN or Inf at index %llu", obm__group_name(g),
                     m->info.name, (unsigned long long)(t->begin + bad));
}

/* Reads elements [begin, begin + count) into the caller's memory, or into `memory` (tile_lanes, count), and lets the
 * function merge them. */
static obm_status merge_tile(const obm__run *run, tile *t, float *memory, obm_error *err) {
    const obm_custom_method *m = spec_of(t->g);
    size_t floats = tile_lanes(t->g) * t->count;
    if (m->memory) memory = m->memory(m->user, floats);
    if (!memory) return obm__fail_nomem(err, floats * sizeof(float));
    t->vectors = memory;
    t->base = t->g->base ? memory + t->g->steps->n * t->count : NULL;
    t->result = memory + (tile_lanes(t->g) - 1) * t->count;
    OBM_TRY(over_blocks(run, t, load_blocks, err));
    return call_function(t, err);
}

/* ---- a tensor ---- */

typedef struct buffers {
    float *tile, *lanes;
} buffers;

static void buffers_free(const obm__run *run, buffers *b) {
    obm__desks_free(run->ctx, b->lanes);
    obm_free(b->tile);
}

static obm_status buffers_new(const obm__run *run, const obm__group *g, uint64_t count, buffers *b, obm_error *err) {
    size_t lanes = 2 * OBM_MERGE_BLOCK * sizeof(float), tile = 0;
    *b = (buffers){0};
    if (!spec_of(g)->memory && !obm__mul(tile_lanes(g), (size_t)count, &tile)) return obm__fail_nomem(err, UINT64_MAX);
    b->lanes = obm__desks_new(run->ctx, lanes);
    b->tile = tile ? obm__alloc(tile, sizeof *b->tile) : NULL;
    if (b->lanes && (b->tile || !tile)) return OBM_OK;
    buffers_free(run, b);
    return obm__fail_nomem(err, (uint64_t)run->ctx->threads * lanes + tile * sizeof(float));
}

/* The merged vector of a whole tensor. */
static obm_status form(const obm__run *run, obm__group *g, obm_error *err) {
    buffers b;
    if (!spec_of(g)->whole_tensor) return OBM_OK;
    OBM_TRY(buffers_new(run, g, g->count, &b, err));
    tile t = {.k = run->ctx->k, .g = g, .count = (size_t)g->count, .lanes = b.lanes};
    obm_status status = merge_tile(run, &t, b.tile, err);
    float *kept = status == OBM_OK ? obm__alloc(t.count, sizeof *kept) : NULL;
    if (kept) memcpy(kept, t.result, t.count * sizeof *kept);
    if (status == OBM_OK && !kept) status = obm__fail_nomem(err, g->count * sizeof *kept);
    g->formed = kept;
    obm__group_release(g, 0, g->count);
    buffers_free(run, &b);
    return status == OBM_OK ? obm__run_report(run, err) : status;
}

static obm_status run_tiles(const obm__run *run, const obm__group *g, const buffers *b, uint64_t begin, uint64_t n,
                            obm_dtype dtype, char *out, obm_error *err) {
    for (uint64_t done = 0; done < n;) {
        size_t count = (size_t)(n - done < TILE ? n - done : TILE);
        tile t = {.k = run->ctx->k, .g = g, .begin = begin + done, .count = count, .lanes = b->lanes, .dtype = dtype};
        t.out = out + done * obm_dtype_size(dtype);
        t.result = g->formed ? g->formed + t.begin : NULL;
        if (!g->formed) OBM_TRY(merge_tile(run, &t, b->tile, err));
        OBM_TRY(over_blocks(run, &t, store_blocks, err));
        obm__group_release(g, t.begin, count);
        OBM_TRY(obm__run_report(run, err));
        done += count;
    }
    return OBM_OK;
}

static obm_status run_range(const obm__run *run, const obm__group *g, uint64_t begin, uint64_t n, obm_dtype dtype,
                            void *out, obm_error *err) {
    buffers b;
    OBM_TRY(buffers_new(run, g, g->formed ? 0 : n < TILE ? n : TILE, &b, err));
    obm_status status = run_tiles(run, g, &b, begin, n, dtype, out, err);
    buffers_free(run, &b);
    return status;
}

static uint64_t bytes(const obm__group *g) {
    uint64_t whole = spec_of(g)->whole_tensor, count = whole || g->count < TILE ? g->count : TILE;
    return (tile_lanes(g) + whole) * count * sizeof(float);
}

static const obm__custom custom = {.form = form, .bytes = bytes, .run = run_range};

obm_status obm__own_new(const obm_custom_method *spec, obm__own *out, obm_error *err) {
    OBM_TRY(obm_custom_method_check(spec, err));
    *out = (obm__own){.row = {.info = spec->info, .deltas = spec->info.needs_base, .custom = &custom}, .spec = spec};
    if (spec->info.min_models == 0) out->row.info.min_models = 1;
    if (!out->row.info.doc) out->row.info.doc = "a method of the caller's own";
    if (!out->row.info.source) out->row.info.source = "not built in";
    return OBM_OK;
}
