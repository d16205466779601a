/* Overlays: the tensors that do not run on planes, materialised for one route or for all routes that agree on them.  It
 * computes no merge: core/route does. */
#include "model.h"

#include <stdatomic.h>
#include <string.h>

/* Above this share of deltas lost by rounding to the base's dtype a materialised tensor stays f32. */
#define MAX_LOST_SHARE 0.01

/* ---- materialising ---- */

typedef struct merge_job {
    const obm_kernels *k;
    const obm__route_plan *plan;
    size_t tensor;
    const obm_tensor *base;
    int64_t rows, cols, block; /* rows per block */
    size_t first;              /* block of the current slice */
    int64_t base_count;        /* elements of the base; those after it are extra vocabulary rows */
    float *merged;             /* (rows, cols) */
    uint16_t *rounded;         /* per worker: (block, cols) */
    uint8_t *narrowed;         /* (rows, cols) in the base's dtype */
    _Atomic uint64_t changed, lost;
    _Atomic int failed;
    obm_error err;
} merge_job;

/* Rounding loses a delta when the result is the base's value again; an extra row has no base and loses any change of
 * value. */
static void count_lost(merge_job *j, int64_t begin, int64_t n, uint16_t *rounded) {
    const float *merged = j->merged + begin;
    obm_tensor view = {.data = rounded, .dtype = j->base->dtype, .ndim = 1, .shape = {n}};
    uint64_t changed = 0, lost = 0;
    obm__narrow(j->k, j->base->dtype, merged, n, rounded);
    for (int64_t i = 0; i < n; i += 256) {
        float kept[256], old[256];
        int64_t count = n - i < 256 ? n - i : 256, left = j->base_count - begin - i;
        int64_t known = left < 0 ? 0 : left < count ? left : count;
        obm__widen(j->k, &view, i, count, kept);
        if (known) obm__widen(j->k, j->base, begin + i, known, old);
        for (int64_t c = 0; c < count; c++) {
            bool moved = c >= known || merged[i + c] != old[c];
            changed += moved;
            lost += moved && (c >= known ? kept[c] != merged[i + c] : kept[c] == old[c]);
        }
    }
    atomic_fetch_add(&j->changed, changed);
    atomic_fetch_add(&j->lost, lost);
}

static void merge_blocks(void *arg, size_t begin, size_t end, int worker) {
    merge_job *j = arg;
    for (size_t b = begin + j->first; b < end + j->first && !atomic_load(&j->failed); b++) {
        int64_t row = (int64_t)b * j->block, n = j->rows - row < j->block ? j->rows - row : j->block;
        obm_error err;
        if (obm__route_rows(j->plan, j->tensor, row, n, j->merged + row * j->cols, &err) != OBM_OK) {
            if (!atomic_exchange(&j->failed, 1)) j->err = err;
            return;
        }
        if (j->rounded)
            count_lost(j, row * j->cols, n * j->cols, j->rounded + (size_t)worker * (size_t)(j->block * j->cols));
    }
}

static void narrow_tiles(void *arg, size_t begin, size_t end, int worker) {
    const merge_job *j = arg;
    size_t size = obm_dtype_size(j->base->dtype);
    (void)worker;
    for (size_t tile = begin; tile < end; tile++) {
        int64_t at = (int64_t)tile * OBM_TILE, left = j->rows * j->cols - at;
        obm__narrow(j->k, j->base->dtype, j->merged + at, left < OBM_TILE ? left : OBM_TILE,
                    j->narrowed + (size_t)at * size);
    }
}

/* Tiles between two looks at the pulse, per thread. */
#define NARROW_TILES 64

static obm_status narrow_all(obm_model *m, merge_job *j, const _Atomic int *stop, obm_error *err) {
    size_t tiles = ((size_t)(j->rows * j->cols) + OBM_TILE - 1) / OBM_TILE;
    if (!stop)
        return obm__parallel_slices(m->ctx, tiles, 1, NARROW_TILES * (size_t)m->ctx->threads, narrow_tiles, j,
                                    m->pulse, err);
    for (size_t tile = 0; tile < tiles && !atomic_load(stop); tile++) narrow_tiles(j, tile, tile + 1, 0);
    return atomic_load(stop) ? obm__fail(err, OBM_E_USER, "stopped") : OBM_OK;
}

/* merged stays f32 or goes to the base's dtype: design.md, "Precision of dense results". */
static obm_status keep_merged(obm_model *m, merge_job *j, bool vector, const _Atomic int *stop, obm__matrix *out,
                              obm_error *err) {
    size_t count = (size_t)(j->rows * j->cols), size = obm_dtype_size(j->base->dtype);
    if (vector || j->base->dtype == OBM_F32 || (double)j->lost > MAX_LOST_SHARE * (double)j->changed) {
        *out = (obm__matrix){.data = j->merged, .dtype = OBM_F32, .rows = j->rows, .cols = j->cols};
        j->merged = NULL;
        return OBM_OK;
    }
    j->narrowed = obm__alloc(count, size);
    if (!j->narrowed) return obm__fail_nomem(err, count * size);
    OBM_TRY(narrow_all(m, j, stop, err));
    *out = (obm__matrix){.data = j->narrowed, .dtype = j->base->dtype, .rows = j->rows, .cols = j->cols};
    j->narrowed = NULL;
    return OBM_OK;
}

/* Blocks between two looks at the pulse, per thread: about 10 ms each. */
#define BLOCKS_PER_LOOK 16

/* stop not NULL: on this thread alone, beside sequences that run, until it is set. */
static obm_status merge_all(obm_model *m, merge_job *j, const _Atomic int *stop, obm_error *err) {
    size_t blocks = (size_t)((j->rows + j->block - 1) / j->block);
    size_t step = stop ? 1 : BLOCKS_PER_LOOK * (size_t)m->ctx->threads;
    for (j->first = 0; j->first < blocks; j->first += step) {
        size_t n = blocks - j->first < step ? blocks - j->first : step;
        if (stop)
            merge_blocks(j, 0, n, 0);
        else
            obm__parallel(m->ctx, n, 1, merge_blocks, j);
        if (j->failed) return obm__fail(err, j->err.code, "%s", j->err.message);
        if (stop && atomic_load(stop)) return obm__fail(err, OBM_E_USER, "stopped");
        if (!stop) OBM_TRY(obm__pulse_check(m->pulse, err));
    }
    return OBM_OK;
}

obm_status obm__overlay_fill(obm_model *m, const obm__route_plan *plan, size_t tensor, const obm_tensor *shape,
                             bool vector, const _Atomic int *stop, obm__matrix *out, obm_error *err) {
    const obm_tensor *base = &m->pack->tensors[tensor].base;
    merge_job j = {.k = m->ctx->k, .plan = plan, .tensor = tensor, .base = base};
    j.rows = vector ? 1 : shape->shape[0];
    j.cols = vector ? shape->shape[0] : shape->shape[1];
    j.block = j.cols < OBM_TILE ? OBM_TILE / j.cols : 1;
    j.base_count = obm_tensor_count(base);
    bool narrow = base->dtype != OBM_F32 && !vector;
    size_t count = (size_t)(j.rows * j.cols);
    j.merged = obm__alloc(count, sizeof *j.merged);
    if (narrow) j.rounded = obm__alloc((size_t)(j.block * j.cols) * (size_t)m->ctx->threads, sizeof *j.rounded);
    obm_status status = j.merged && (!narrow || j.rounded) ? merge_all(m, &j, stop, err)
                                                           : obm__fail_nomem(err, count * sizeof *j.merged);
    if (status == OBM_OK) status = keep_merged(m, &j, vector, stop, out, err);
    obm_free(j.narrowed);
    obm_free(j.merged);
    obm_free(j.rounded);
    return status;
}

/* ---- shared between routes ---- */

obm_status obm__overlay_new(const obm_model *m, size_t tensor, int64_t rows, const double *route, obm__overlay **out,
                            obm_error *err) {
    obm__overlay *o = obm__calloc(1, sizeof *o);
    double *copy = obm__calloc(m->tasks, sizeof *copy);
    if (!o || !copy) {
        obm_free(o);
        obm_free(copy);
        return obm__fail_nomem(err, sizeof *o + m->tasks * sizeof *copy);
    }
    memcpy(copy, route, m->tasks * sizeof *copy);
    *o = (obm__overlay){.tensor = tensor, .rows = rows, .route = copy, .settings = m->pack->settings};
    *out = o;
    return OBM_OK;
}

bool obm__same_settings(const obm_pack_settings *a, const obm_pack_settings *b) {
    return a->lambda == b->lambda && a->reading == b->reading && a->profile == b->profile && a->density == b->density;
}

obm__overlay *obm__overlay_find(const obm_model *m, size_t tensor, int64_t rows, const double *route) {
    for (obm__overlay *o = m->overlays; o; o = o->next)
        if (o->tensor == tensor && o->rows == rows && !memcmp(o->route, route, m->tasks * sizeof *route) &&
            obm__same_settings(&o->settings, &m->pack->settings))
            return o;
    return NULL;
}

void obm__overlay_keep(obm_model *m, obm__overlay *o) {
    o->bytes = (uint64_t)(o->matrix.rows * o->matrix.cols) * obm_dtype_size(o->matrix.dtype);
    o->next = m->overlays;
    m->overlays = o;
    m->overlay_bytes += o->bytes;
}

void obm__overlay_free(obm__overlay *o) {
    if (!o) return;
    obm_free((void *)o->matrix.data);
    obm_free(o->route);
    obm_free(o);
}

void obm__overlay_release(obm_model *m, obm__overlay *o) {
    if (--o->refs) return;
    obm__overlay **at = &m->overlays;
    while (*at != o) at = &(*at)->next;
    *at = o->next;
    m->overlay_bytes -= o->bytes;
    obm__overlay_free(o);
}
