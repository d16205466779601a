/* Weights under a route: the base's mapping where nothing changes, materialised tensors elsewhere.  It computes no
 * merge: core/route does. */
#include "model.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* Above this share of deltas lost by rounding to the base's dtype a materialised tensor stays f32. */
#define MAX_LOST_SHARE 0.01

/* ---- building one tensor ---- */

typedef struct builder {
    obm_model *m;
    obm__weights *w;
    const obm__route_plan *plan;   /* NULL: the base alone */
    obm_error *err;
} builder;

/* "model.layers.{}.x" with the layer in place of {}. */
static void tensor_name(const char *pattern, int64_t layer, char *buf, size_t size) {
    const char *hole = strstr(pattern, "{}");
    if (hole) snprintf(buf, size, "%.*s%lld%s", (int)(hole - pattern), pattern, (long long)layer, hole + 2);
    else snprintf(buf, size, "%s", pattern);
}

/* Takes p over (NULL: out of memory), also on failure. */
static obm_status own(builder *b, void *p, size_t bytes) {
    void **owned = p ? obm__realloc(b->w->owned, b->w->n_owned + 1, sizeof *owned) : NULL;
    if (owned) b->w->owned = owned;
    if (!owned) {
        obm_free(p);
        return obm__fail_nomem(b->err, bytes);
    }
    b->w->owned[b->w->n_owned++] = p;
    b->w->bytes += bytes;
    return OBM_OK;
}

static obm_status own_new(builder *b, size_t count, size_t size, void **out) {
    void *p = obm__alloc(count, size);
    OBM_TRY(own(b, p, count * size));
    *out = p;
    return OBM_OK;
}

static bool is_vector(obm__role role) { return role >= OBM_Q_BIAS && role != OBM_EMBEDDING && role != OBM_HEAD; }

static void shape_text(const obm_tensor *t, char *buf, size_t size) {
    size_t used = 0;
    buf[0] = 0;
    for (int32_t i = 0; i < t->ndim && used < size; i++)
        used += (size_t)snprintf(buf + used, size - used, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
}

static obm_status check_tensor(builder *b, const char *name, const obm_tensor *t, const obm_tensor *expected,
                               bool may_grow) {
    bool fits = t->ndim == expected->ndim &&
                (may_grow ? t->shape[0] >= expected->shape[0] : t->shape[0] == expected->shape[0]) &&
                (t->ndim < 2 || t->shape[1] == expected->shape[1]);
    if (!fits) {
        char want[48], found[128];
        shape_text(expected, want, sizeof want);
        shape_text(t, found, sizeof found);
        return obm__fail(b->err, OBM_E_SHAPE, "%s: tensor \"%s\": config.json asks for shape (%s), found (%s)",
                         obm_checkpoint_path(b->m->base), name, want, found);
    }
    if (t->dtype != OBM_F32 && t->dtype != OBM_F16 && t->dtype != OBM_BF16)
        return obm__fail(b->err, OBM_E_DTYPE, "%s: tensor \"%s\": expected F32, F16 or BF16, found %s",
                         obm_checkpoint_path(b->m->base), name, obm_dtype_name(t->dtype));
    return OBM_OK;
}

/* A view of t; a copy where the file does not keep it aligned to its elements (the kernels load whole elements). */
static obm_status use_tensor(builder *b, const obm_tensor *t, bool vector, obm__matrix *out) {
    int64_t count = obm_tensor_count(t);
    *out = (obm__matrix){t->data, t->dtype, vector ? 1 : t->shape[0], vector ? t->shape[0] : t->shape[1]};
    void *copy;
    if (vector && t->dtype != OBM_F32) {
        OBM_TRY(own_new(b, (size_t)count, sizeof(float), &copy));
        obm__widen(b->m->ctx->k, t, 0, count, copy);
        out->dtype = OBM_F32;
    } else if ((uintptr_t)t->data % obm_dtype_size(t->dtype)) {
        OBM_TRY(own_new(b, (size_t)count, obm_dtype_size(t->dtype), &copy));
        memcpy(copy, t->data, (size_t)count * obm_dtype_size(t->dtype));
    } else {
        return OBM_OK;
    }
    out->data = copy;
    return OBM_OK;
}

/* ---- materialising ---- */

typedef struct merge_job {
    const obm_kernels *k;
    const obm__route_plan *plan;
    size_t tensor;
    const obm_tensor *base;
    int64_t rows, cols, block;     /* rows per block */
    size_t first;                  /* block of the current slice */
    int64_t base_count;            /* elements of the base; those after it are extra vocabulary rows */
    float *merged;                 /* (rows, cols) */
    uint16_t *rounded;             /* per worker: (block, cols) */
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

/* merged stays f32 or goes to the base's dtype: design.md, "Precision of dense results". */
static obm_status keep_merged(builder *b, merge_job *j, bool vector, obm__matrix *out) {
    size_t count = (size_t)(j->rows * j->cols);
    void *data;
    if (vector || j->base->dtype == OBM_F32 || (double)j->lost > MAX_LOST_SHARE * (double)j->changed) {
        *out = (obm__matrix){j->merged, OBM_F32, j->rows, j->cols};
        j->merged = NULL;
        return own(b, (void *)out->data, count * sizeof(float));
    }
    OBM_TRY(own_new(b, count, obm_dtype_size(j->base->dtype), &data));
    obm__narrow(b->m->ctx->k, j->base->dtype, j->merged, (int64_t)count, data);
    *out = (obm__matrix){data, j->base->dtype, j->rows, j->cols};
    return OBM_OK;
}

/* Blocks between two looks at the pulse, per thread: about 10 ms each. */
#define BLOCKS_PER_LOOK 16

static obm_status merge_all(builder *b, merge_job *j) {
    size_t blocks = (size_t)((j->rows + j->block - 1) / j->block), step = BLOCKS_PER_LOOK * (size_t)b->m->ctx->threads;
    for (j->first = 0; j->first < blocks; j->first += step) {
        obm__parallel(b->m->ctx, blocks - j->first < step ? blocks - j->first : step, 1, merge_blocks, j);
        if (j->failed) return obm__fail(b->err, j->err.code, "%s", j->err.message);
        OBM_TRY(obm__pulse_check(b->m->pulse, b->err));
    }
    return OBM_OK;
}

/* shape: of the tensor under the route. */
static obm_status materialise(builder *b, size_t tensor, const obm_tensor *shape, bool vector, obm__matrix *out) {
    const obm_tensor *base = &b->m->pack->tensors[tensor].base;
    merge_job j = {.k = b->m->ctx->k, .plan = b->plan, .tensor = tensor, .base = base};
    j.rows = vector ? 1 : shape->shape[0];
    j.cols = vector ? shape->shape[0] : shape->shape[1];
    j.block = j.cols < OBM_TILE ? OBM_TILE / j.cols : 1;
    j.base_count = obm_tensor_count(base);
    bool narrow = base->dtype != OBM_F32 && !vector;
    size_t count = (size_t)(j.rows * j.cols);
    j.merged = obm__alloc(count, sizeof *j.merged);
    if (narrow) j.rounded = obm__alloc((size_t)(j.block * j.cols) * (size_t)b->m->ctx->threads, sizeof *j.rounded);
    obm_status status =
        j.merged && (!narrow || j.rounded) ? merge_all(b, &j) : obm__fail_nomem(b->err, count * sizeof *j.merged);
    if (status == OBM_OK) status = keep_merged(b, &j, vector, out);
    obm_free(j.merged);
    obm_free(j.rounded);
    return status;
}

/* ---- building all ---- */

static void expected_shape(const obm__config *c, obm__role role, obm_tensor *t) {
    int64_t rows, cols;
    obm__config_shape(c, role, &rows, &cols);
    *t = is_vector(role) ? (obm_tensor){.ndim = 1, .shape = {cols}} : (obm_tensor){.ndim = 2, .shape = {rows, cols}};
}

static obm_status base_tensor(builder *b, const char *name, const obm_tensor *expected, bool vector, obm__matrix *out) {
    const obm__st_entry *e = obm__checkpoint_find(b->m->base, name);
    if (!e)
        return obm__fail(b->err, OBM_E_NOTFOUND, "%s: tensor \"%s\" is missing", obm_checkpoint_path(b->m->base), name);
    OBM_TRY(check_tensor(b, name, &e->t, expected, false));
    return use_tensor(b, &e->t, vector, out);
}

/* Sets *done when the route has its own version of the tensor. */
static obm_status route_tensor(builder *b, const char *name, const obm_tensor *expected, bool vector, obm__matrix *out,
                               bool *done) {
    size_t i = b->plan ? obm__pack_find(b->m->pack, name) : SIZE_MAX;
    obm_tensor shape;
    bool exists;
    *done = false;
    if (i == SIZE_MAX || !obm__route_changes(b->plan, i)) return OBM_OK;
    OBM_TRY(obm__route_shape(b->plan, i, &shape, &exists));
    if (!exists) return OBM_OK;
    shape.dtype = OBM_F32;
    OBM_TRY(check_tensor(b, name, &shape, expected, !vector));
    *done = true;
    return materialise(b, i, &shape, vector, out);
}

static obm_status build_tensor(builder *b, int64_t layer, obm__role role) {
    const obm__config *c = &b->m->config;
    obm__matrix *out = (obm__matrix *)obm__weights_at(b->w, layer, role);
    char name[256];
    obm_tensor expected;
    bool done;
    if (!c->arch->names[role] || (role != OBM_HEAD && !obm__config_has(c, role))) return OBM_OK;
    tensor_name(c->arch->names[role], layer, name, sizeof name);
    expected_shape(c, role, &expected);
    OBM_TRY(route_tensor(b, name, &expected, is_vector(role), out, &done));
    if (done) return OBM_OK;
    if (obm__config_has(c, role)) return base_tensor(b, name, &expected, is_vector(role), out);
    *out = *obm__weights_at(b->w, 0, OBM_EMBEDDING);   /* a tied head */
    return OBM_OK;
}

/* Ids that the embedding has and the head lacks (or the other way round) could not be run. */
static obm_status check_vocabulary(builder *b) {
    int64_t in = obm__weights_at(b->w, 0, OBM_EMBEDDING)->rows, head = obm__weights_at(b->w, 0, OBM_HEAD)->rows;
    if (in == head) return OBM_OK;
    return obm__fail(b->err, OBM_E_SHAPE, "%s: the embedding has %lld rows under this route, the head %lld",
                     obm_checkpoint_path(b->m->base), (long long)in, (long long)head);
}

static obm_status build_all(builder *b) {
    for (int64_t layer = 0; layer < b->w->layers; layer++)
        for (int role = 0; role < OBM_LAYER_ROLES; role++) OBM_TRY(build_tensor(b, layer, (obm__role)role));
    for (int role = OBM_LAYER_ROLES; role < OBM_ROLES; role++) OBM_TRY(build_tensor(b, 0, (obm__role)role));
    return check_vocabulary(b);
}

static void weights_free(obm__weights *w) {
    if (!w) return;
    for (size_t i = 0; i < w->n_owned; i++) obm_free(w->owned[i]);
    obm_free(w->owned);
    obm_free(w->tensors);
    obm_free(w->route);
    obm_free(w);
}

static obm_status build(obm_model *m, const double *route, obm__weights **out, obm_error *err) {
    size_t tasks = obm__model_tasks(m), count;
    obm__weights *w = obm__calloc(1, sizeof *w);
    obm__route_plan *plan = NULL;
    obm_status status = OBM_OK;
    if (w) {
        w->layers = m->config.layers;
        if (obm__mul((size_t)w->layers, OBM_LAYER_ROLES, &count))
            w->tensors = obm__calloc(count + OBM_ROLES, sizeof *w->tensors);
        w->route = route ? obm__calloc(tasks, sizeof *w->route) : NULL;
    }
    if (!w || !w->tensors || (route && !w->route)) OBM_GO(obm__fail_nomem(err, sizeof *w));
    if (route) {
        memcpy(w->route, route, tasks * sizeof *route);
        w->settings = m->pack->settings;
        OBM_GO(obm__route_plan_new(m->pack, route, &plan, err));
    }
    OBM_GO(build_all(&(builder){m, w, plan, err}));
    *out = w;
    w = NULL;
done:
    obm__route_plan_free(plan);
    weights_free(w);
    return status;
}

/* ---- the LRU ---- */

static bool is_base(const double *route, size_t tasks) {
    for (size_t i = 0; route && i < tasks; i++)
        if (route[i] != 0) return false;
    return true;
}

/* lambda and the reading may be changed on a pack that is open: routes made before that are not found again. */
static bool is_current(const obm_model *m, const obm__weights *w) {
    if (!w->route) return true;
    const obm_pack_settings *a = &w->settings, *b = &m->pack->settings;
    return a->lambda == b->lambda && a->reading == b->reading && a->profile == b->profile && a->density == b->density;
}

static obm__weights *find(obm_model *m, const double *route) {
    for (obm__weights *w = m->routes; w; w = w->next) {
        if (!is_current(m, w)) continue;
        if (route ? w->route && !memcmp(w->route, route, m->tasks * sizeof *route) : !w->route) return w;
    }
    return NULL;
}

/* The base alone is never dropped: it is the mapping.  Routes of older settings go first. */
static bool goes_before(const obm_model *m, const obm__weights *a, const obm__weights *b) {
    bool current = is_current(m, a);
    return current != is_current(m, b) ? !current : a->used < b->used;
}

/* Drops routes that do not run until `needed` more bytes fit. */
static void evict(obm_model *m, uint64_t needed) {
    for (;;) {
        obm__weights **first = NULL;
        for (obm__weights **at = &m->routes; *at; at = &(*at)->next)
            if ((*at)->route && !(*at)->refs && (!first || goes_before(m, *at, *first))) first = at;
        bool over = needed > m->route_budget || m->overlay_bytes > m->route_budget - needed;
        if (!first || (!over && is_current(m, *first))) return;
        obm__weights *w = *first;
        *first = w->next;
        m->overlay_bytes -= w->bytes;
        weights_free(w);
    }
}

static obm_status build_and_keep(obm_model *m, const double *route, obm__weights **out, obm_error *err) {
    obm__weights *w;
    if (route) evict(m, m->largest_route);
    OBM_TRY(build(m, route, &w, err));
    w->next = m->routes;
    m->routes = w;
    m->overlay_bytes += w->bytes;
    if (route && w->bytes > m->largest_route) m->largest_route = w->bytes;
    *out = w;
    return OBM_OK;
}

obm_status obm__weights_acquire(obm_model *m, const double *route, obm__weights **out, obm_error *err) {
    if (m->pack && m->pack->n_experts != m->tasks)
        return obm__fail(err, OBM_E_ARG, "%s: experts were added or removed since the model was opened: open it again",
                         m->pack->path);
    if (is_base(route, m->tasks)) route = NULL;
    obm__weights *w = find(m, route);
    if (!w) OBM_TRY(build_and_keep(m, route, &w, err));
    w->refs++;
    w->used = ++m->clock;
    evict(m, 0);
    *out = w;
    return OBM_OK;
}

/* Bytes of routes that sequences run, without `except`. */
static uint64_t bytes_in_use(const obm_model *m, const obm__weights *except) {
    uint64_t bytes = 0;
    for (const obm__weights *w = m->routes; w; w = w->next)
        if (w->route && w->refs && w != except) bytes += w->bytes;
    return bytes;
}

/* Never refused: the base, what runs already, and the only one. */
static bool fits(const obm_model *m, const obm__weights *known, uint64_t bytes) {
    uint64_t others = bytes_in_use(m, known);
    if (!others || (known && (!known->route || known->refs))) return true;
    return others <= m->route_budget && bytes <= m->route_budget - others;
}

obm_status obm__weights_admit(obm_model *m, const double *route, obm__weights **out, obm_error *err) {
    obm__weights *w = find(m, is_base(route, m->tasks) ? NULL : route);
    *out = NULL;
    if (!fits(m, w, w ? w->bytes : m->largest_route)) return OBM_OK;
    bool known = w != NULL;
    OBM_TRY(obm__weights_acquire(m, route, &w, err));
    *out = w;
    if (known) return OBM_OK;
    w->refs--;   /* a new one may turn out larger than any before */
    bool stays = fits(m, w, w->bytes);
    w->refs++;
    if (stays) return OBM_OK;
    obm__weights_release(m, w);
    *out = NULL;
    return OBM_OK;
}

void obm__weights_release(obm_model *m, obm__weights *w) {
    if (!w) return;
    w->refs--;
    evict(m, 0);
}

void obm__weights_free_all(obm_model *m) {
    while (m->routes) {
        obm__weights *next = m->routes->next;
        weights_free(m->routes);
        m->routes = next;
    }
}
