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
    obm__role role;
    bool vector;
    const obm_tensor *base;
    int64_t rows, cols, block; /* rows per block */
    int64_t base_count;        /* elements of the base; those after it are extra vocabulary rows */
    float *merged;             /* (rows, cols), in region's memory if there is one */
    obm__region *region;
    uint16_t *rounded; /* per worker: (block, cols) */
    uint8_t *narrowed; /* (rows, cols) in the base's dtype */
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
    for (size_t b = begin; b < end && !atomic_load(&j->failed); b++) {
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

static void narrow_blocks(void *arg, size_t begin, size_t end, int worker) {
    const merge_job *j = arg;
    int64_t row = (int64_t)begin * j->block,
            last = (int64_t)end * j->block < j->rows ? (int64_t)end * j->block : j->rows;
    (void)worker;
    obm__narrow(j->k, j->base->dtype, j->merged + row * j->cols, (last - row) * j->cols,
                j->narrowed + (size_t)(row * j->cols) * obm_dtype_size(j->base->dtype));
}

/* Blocks between two looks at the pulse, per thread: about 10 ms each to merge, less than 1 to narrow. */
#define BLOCKS_PER_LOOK 16
#define NARROWED_PER_LOOK 256

/* stop not NULL: on this thread alone, beside sequences that run, until it is set. */
static obm_status run_blocks(obm_model *m, merge_job *j, size_t per_look, obm__range_fn fn, const _Atomic int *stop,
                             obm_error *err) {
    size_t blocks = (size_t)((j->rows + j->block - 1) / j->block), size = per_look * (size_t)m->ctx->threads;
    if (!stop) return obm__place_overlay_slices(m, j->role, j->rows, j->block, blocks, size, fn, j, err);
    for (size_t b = 0; b < blocks && !atomic_load(stop) && !atomic_load(&j->failed); b++) fn(j, b, b + 1, 0);
    return atomic_load(stop) ? obm__fail(err, OBM_E_USER, "stopped") : OBM_OK;
}

static obm_status merge_all(obm_model *m, merge_job *j, const _Atomic int *stop, obm_error *err) {
    obm_status status = run_blocks(m, j, BLOCKS_PER_LOOK, merge_blocks, stop, err);
    return j->failed ? obm__fail(err, j->err.code, "%s", j->err.message) : status;
}

/* Rows for the nodes that read them; a vector is everybody's. */
static void *new_rows(const obm_model *m, const merge_job *j, size_t size, obm__region **region, obm_error *err) {
    size_t count = (size_t)(j->rows * j->cols);
    void *data = NULL;
    if (!m->placement || j->vector)
        data = obm__alloc(count, size);
    else if ((*region = obm__place_overlay(m, j->role, j->rows, (size_t)j->cols * size)))
        data = (*region)->data;
    if (!data) obm__fail_nomem(err, count * size);
    return data;
}

static void free_rows(void *data, obm__region *region) {
    if (!region) obm_free(data);
    obm__place_overlay_free(region);
}

/* merged stays f32 or goes to the base's dtype: design.md, "Precision of dense results". */
static obm_status keep_merged(obm_model *m, merge_job *j, const _Atomic int *stop, obm__matrix *out,
                              obm__region **region, obm_error *err) {
    obm_dtype dtype = j->base->dtype;
    obm__region *narrow = NULL;
    if (j->vector || dtype == OBM_F32 || (double)j->lost > MAX_LOST_SHARE * (double)j->changed) {
        *out = (obm__matrix){.data = j->merged, .dtype = OBM_F32, .rows = j->rows, .cols = j->cols};
        if (region) *region = j->region;
        j->merged = NULL;
        j->region = NULL;
        return OBM_OK;
    }
    j->narrowed = new_rows(m, j, obm_dtype_size(dtype), &narrow, err);
    if (!j->narrowed) return OBM_E_NOMEM;
    obm_status status = run_blocks(m, j, NARROWED_PER_LOOK, narrow_blocks, stop, err);
    if (status != OBM_OK) {
        free_rows(j->narrowed, narrow);
        return status;
    }
    *out = (obm__matrix){.data = j->narrowed, .dtype = dtype, .rows = j->rows, .cols = j->cols};
    if (region) *region = narrow;
    return OBM_OK;
}

obm_status obm__overlay_fill(obm_model *m, const obm__route_plan *plan, size_t tensor, obm__role role,
                             const obm_tensor *shape, const _Atomic int *stop, obm__matrix *out, obm__region **region,
                             obm_error *err) {
    const obm_tensor *base = &m->pack->tensors[tensor].base;
    merge_job j = {.k = m->ctx->k, .plan = plan, .tensor = tensor, .role = role, .base = base, .vector = !region};
    j.rows = j.vector ? 1 : shape->shape[0];
    j.cols = j.vector ? shape->shape[0] : shape->shape[1];
    j.block = j.cols < OBM_TILE ? OBM_TILE / j.cols : 1;
    j.base_count = obm_tensor_count(base);
    bool narrow = base->dtype != OBM_F32 && !j.vector;
    size_t room = (size_t)(j.block * j.cols) * (size_t)m->ctx->threads;
    j.merged = new_rows(m, &j, sizeof *j.merged, &j.region, err);
    obm_status status = j.merged ? OBM_OK : OBM_E_NOMEM;
    if (status == OBM_OK && narrow && !(j.rounded = obm__alloc(room, sizeof *j.rounded)))
        status = obm__fail_nomem(err, room * sizeof *j.rounded);
    if (status == OBM_OK) status = merge_all(m, &j, stop, err);
    if (status == OBM_OK) status = keep_merged(m, &j, stop, out, region, err);
    free_rows(j.merged, j.region);
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
    free_rows((void *)o->matrix.data, o->region);
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
