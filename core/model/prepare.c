/* Prepares the weights of a route: decides for each tensor whether the base's is taken, an expert's, the base and
 * planes, rows by token, or an overlay.  Which routes are kept is decided in weights.c. */
#include "model.h"

#include "../route/plan.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* ---- taking tensors as they are ---- */

/* "model.layers.{}.x" with the layer in place of {}. */
void obm__tensor_name(const char *pattern, int64_t layer, char *buf, size_t size) {
    const char *hole = strstr(pattern, "{}");
    if (hole)
        snprintf(buf, size, "%.*s%lld%s", (int)(hole - pattern), pattern, (long long)layer, hole + 2);
    else
        snprintf(buf, size, "%s", pattern);
}

/* Takes p over (NULL: out of memory), also on failure. */
static obm_status own(obm__build *b, void *p, size_t bytes) {
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

static obm_status own_new(obm__build *b, size_t count, size_t size, void **out) {
    void *p = obm__alloc(count, size);
    OBM_TRY(own(b, p, count * size));
    *out = p;
    return OBM_OK;
}

static bool is_vector(obm__role role) { return role >= OBM_Q_BIAS && role != OBM_EMBEDDING && role != OBM_HEAD; }

static obm_status check_tensor(obm__build *b, const char *name, const obm_tensor *t, const obm_tensor *expected,
                               bool may_grow) {
    bool fits = t->ndim == expected->ndim &&
                (may_grow ? t->shape[0] >= expected->shape[0] : t->shape[0] == expected->shape[0]) &&
                (t->ndim < 2 || t->shape[1] == expected->shape[1]);
    if (!fits) {
        char want[48], found[128];
        return obm__fail(b->err, OBM_E_SHAPE, "%s: tensor \"%s\": config.json asks for shape %s, found %s",
                         obm_checkpoint_path(b->m->base), name, obm__shape_text(expected, want, sizeof want),
                         obm__shape_text(t, found, sizeof found));
    }
    if (t->dtype != OBM_F32 && t->dtype != OBM_F16 && t->dtype != OBM_BF16)
        return obm__fail(b->err, OBM_E_DTYPE, "%s: tensor \"%s\": expected F32, F16 or BF16, found %s%s",
                         obm_checkpoint_path(b->m->base), name, obm_dtype_name(t->dtype),
                         t->dtype == OBM_F64
                             ? ": a merge converts it, of a recipe with merge_method: passthrough, this "
                               "model alone under models, and dtype: bfloat16 or float32"
                             : "");
    return OBM_OK;
}

/* A view of t; a copy where the file does not keep it aligned to its elements (the kernels load whole elements). */
static obm_status use_tensor(obm__build *b, const obm_tensor *t, bool vector, obm__matrix *out) {
    int64_t count = obm_tensor_count(t);
    *out = (obm__matrix){.data = t->data,
                         .dtype = t->dtype,
                         .rows = vector ? 1 : t->shape[0],
                         .cols = vector ? t->shape[0] : t->shape[1]};
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

/* Of the whole tensor. */
static void expected_shape(const obm__config *c, obm__role role, obm_tensor *t) {
    int64_t first, rows, cols;
    obm__config_shape(c, role, &rows, &cols);
    obm__config_place(c, role, &first, &rows);
    *t = is_vector(role) ? (obm_tensor){.ndim = 1, .shape = {cols}} : (obm_tensor){.ndim = 2, .shape = {rows, cols}};
}

/* The role's rows of a tensor. */
static obm_tensor slice_tensor(const obm__config *c, obm__role role, const obm_tensor *whole) {
    obm_tensor t = *whole;
    int64_t first, rows, cols;
    if (role >= OBM_MATRIX_ROLES) return t;
    obm__config_shape(c, role, &rows, &cols);
    obm__config_place(c, role, &first, &t.shape[0]);
    t.data = (const char *)whole->data + (size_t)(first * cols) * obm_dtype_size(t.dtype);
    t.shape[0] = rows;
    return t;
}

static obm__matrix slice_matrix(const obm__config *c, obm__role role, const obm__matrix *whole) {
    obm_tensor t = {.data = whole->data, .dtype = whole->dtype, .ndim = 2, .shape = {whole->rows, whole->cols}};
    obm__matrix m = *whole;
    t = slice_tensor(c, role, &t);
    m.data = t.data;
    m.rows = t.shape[0];
    return m;
}

static obm_status base_tensor(obm__build *b, const char *name, obm__role role, obm__matrix *out) {
    const obm__st_entry *e = obm__checkpoint_find(b->m->base, name);
    obm_tensor expected;
    if (!e)
        return obm__fail(b->err, OBM_E_NOTFOUND, "%s: tensor \"%s\" is missing", obm_checkpoint_path(b->m->base), name);
    expected_shape(&b->m->config, role, &expected);
    OBM_TRY(check_tensor(b, name, &e->t, &expected, false));
    obm_tensor t = slice_tensor(&b->m->config, role, &e->t);
    return use_tensor(b, &t, is_vector(role), out);
}

/* ---- what a route makes of a tensor ---- */

static size_t find_tensor(const obm_model *m, int64_t layer, obm__role role) {
    char name[256];
    if (!m->config.arch->names[role]) return SIZE_MAX;
    obm__tensor_name(m->config.arch->names[role], layer, name, sizeof name);
    size_t i = obm__pack_find(m->pack, name);
    bool tied = role == OBM_HEAD && i == SIZE_MAX;
    return tied ? obm__pack_find(m->pack, m->config.arch->names[OBM_EMBEDDING]) : i;
}

obm_status obm__model_find_tensors(obm_model *m, obm_error *err) {
    size_t layers = (size_t)m->config.layers * OBM_LAYER_ROLES, n = layers + OBM_ROLES - OBM_LAYER_ROLES;
    m->tensors = obm__calloc(n, sizeof *m->tensors);
    if (!m->tensors) return obm__fail_nomem(err, n * sizeof *m->tensors);
    for (size_t i = 0; i < n; i++)
        m->tensors[i] = i < layers ? find_tensor(m, (int64_t)(i / OBM_LAYER_ROLES), (obm__role)(i % OBM_LAYER_ROLES))
                                   : find_tensor(m, 0, (obm__role)(i - layers + OBM_LAYER_ROLES));
    return OBM_OK;
}

size_t obm__model_tensor(const obm_model *m, int64_t layer, obm__role role) {
    return m->tensors[obm__role_index(m->config.layers, layer, role)];
}

static bool is_runnable(obm_dtype dtype) { return dtype == OBM_F32 || dtype == OBM_F16 || dtype == OBM_BF16; }

/* Filled once the other tensors are decided, perhaps on another thread. */
static obm_status add_pending(obm__build *b, obm__pending p) {
    obm__pending *pending = obm__realloc(b->pending, b->n_pending + 1, sizeof *pending);
    if (!pending) return obm__fail_nomem(b->err, (b->n_pending + 1) * sizeof *pending);
    b->pending = pending;
    b->pending[b->n_pending++] = p;
    return OBM_OK;
}

static obm_status reference(obm__build *b, obm__overlay *o) {
    for (size_t i = 0; i < b->w->n_overlays; i++)
        if (b->w->overlays[i] == o) return OBM_OK;
    obm__overlay **overlays = obm__realloc(b->w->overlays, b->w->n_overlays + 1, sizeof *overlays);
    if (!overlays) return obm__fail_nomem(b->err, (b->w->n_overlays + 1) * sizeof *overlays);
    b->w->overlays = overlays;
    b->w->overlays[b->w->n_overlays++] = o;
    o->refs++;
    return OBM_OK;
}

/* That of another role of the same tensor. */
static obm__overlay *find_pending(const obm__build *b, size_t tensor) {
    for (size_t i = b->n_pending; i-- > 0;)
        if (b->pending[i].overlay && b->pending[i].tensor == tensor) return b->pending[i].overlay;
    return NULL;
}

static obm_status new_overlay(obm__build *b, obm__pending p, const double *route) {
    OBM_TRY(obm__overlay_new(b->m, p.tensor, p.shape.shape[0], route, &p.overlay, b->err));
    b->needed += (uint64_t)obm_tensor_count(&p.shape) * obm_dtype_size(b->m->pack->tensors[p.tensor].base.dtype);
    obm_status status = add_pending(b, p);
    if (status != OBM_OK) obm__overlay_free(p.overlay);
    return status;
}

/* One that another route has already, or one of our own to be filled. */
static obm_status take_overlay(obm__build *b, size_t tensor, const obm_tensor *shape, obm__role role,
                               obm__matrix *out) {
    obm__pending p = {.tensor = tensor, .shape = *shape, .role = role, .out = out};
    p.overlay = find_pending(b, tensor);
    p.shared = p.overlay != NULL;
    if (p.shared) return add_pending(b, p);
    double *route = obm__calloc(b->m->tasks, sizeof *route);
    if (!route) return obm__fail_nomem(b->err, b->m->tasks * sizeof *route);
    obm__route_effective(b->w->plan, tensor, route);
    obm__overlay *o = obm__overlay_find(b->m, tensor, shape->shape[0], route);
    obm_status status = OBM_OK;
    if (o) {
        OBM_GO(reference(b, o));
        *out = slice_matrix(&b->m->config, role, &o->matrix);
        goto done;
    }
    status = new_overlay(b, p, route);
done:
    obm_free(route);
    return status;
}

/* Coefficients of the route for all matrices with planes. */
static obm_status take_coefficients(obm__build *b) {
    obm__weights *w = b->w;
    size_t n = (size_t)w->layers * OBM_MATRIX_ROLES + 1;
    if (!b->m->signs) return OBM_OK;
    OBM_TRY(obm__coefficients_acquire(b->m, &w->hard_routes, b->err));
    bool hard = obm__route_hard(w->route, w->tasks) != SIZE_MAX; /* needs no memory of its own */
    obm__planes_route *spare = hard ? NULL : b->m->spare;
    if (spare) b->m->spare = NULL;
    OBM_TRY(obm__planes_route_renew(spare, w->hard_routes->cache, w->route, &w->masks, b->err));
    w->terms = obm__calloc(n, sizeof *w->terms);
    if (!w->terms) return obm__fail_nomem(b->err, n * sizeof *w->terms);
    w->terms_bytes = obm__planes_route_bytes(w->masks) + n * sizeof *w->terms;
    return OBM_OK;
}

/* The base's matrix, and what is added on planes; false: it does not run on them. */
static bool take_planes(obm__build *b, size_t tensor, int64_t layer, obm__role role, obm__matrix *out) {
    obm__weights *w = b->w;
    const obm__signs *signs = w->masks ? obm__signs_of(b->m, layer, role) : NULL;
    const obm__route_masks *masks = signs ? obm__planes_route_at(w->masks, tensor) : NULL;
    if (!masks || masks->run == OBM_RUN_OVERLAY) return false;
    *out = *obm__weights_at(b->m->base_alone, layer, role);
    if (!masks->n) return true;
    obm__terms *t = &w->terms[role == OBM_HEAD ? w->layers * OBM_MATRIX_ROLES : layer * OBM_MATRIX_ROLES + role];
    const obm__coefficients *all = obm__coefficient_cache_at(w->hard_routes->cache, tensor);
    *t = (obm__terms){signs, masks, obm__coefficients_shape(all)};
    out->terms = t;
    return true;
}

/* True if the head is a tensor of its own under this route, so that rows of the embedding are all that is asked for. */
static bool has_own_head(const obm__build *b) {
    size_t head = obm__pack_find(b->m->pack, b->m->config.arch->names[OBM_HEAD]);
    obm_tensor shape;
    bool exists = false;
    if (head != SIZE_MAX) obm__route_shape(b->w->plan, head, &shape, &exists);
    return exists || obm__config_has(&b->m->config, OBM_HEAD);
}

static void merge_by_token(obm__build *b, size_t tensor, const obm_tensor *shape, obm__matrix *out) {
    *out = (obm__matrix){.dtype = OBM_F32, .rows = shape->shape[0], .cols = shape->shape[1], .by_token = true};
    b->w->embedding = tensor;
    b->trims |= obm__route_kind_of(b->w->plan, tensor) == OBM_ROUTE_ELEMENTS;
}

static obm_status changed_matrix(obm__build *b, size_t tensor, const obm_tensor *shape, int64_t layer, obm__role role,
                                 obm__matrix *out) {
    obm__route_kind kind = obm__route_kind_of(b->w->plan, tensor);
    const obm_tensor *own = kind == OBM_ROUTE_EXPERT ? obm__route_own(b->w->plan, tensor) : NULL;
    bool grows = shape->shape[0] > b->m->pack->tensors[tensor].base.shape[0];
    if (own && is_runnable(own->dtype)) {
        obm_tensor t = slice_tensor(&b->m->config, role, own);
        return use_tensor(b, &t, false, out);
    }
    if (kind == OBM_ROUTE_PATTERNS && !grows && take_planes(b, tensor, layer, role, out)) return OBM_OK;
    if (role == OBM_EMBEDDING && !b->m->materialise && (b->head_has_planes || has_own_head(b))) {
        merge_by_token(b, tensor, shape, out);
        return OBM_OK;
    }
    b->trims |= kind == OBM_ROUTE_ELEMENTS;
    return take_overlay(b, tensor, shape, role, out);
}

/* Sets *done when the route has its own version of the tensor. */
static obm_status route_tensor(obm__build *b, const char *name, int64_t layer, obm__role role, obm__matrix *out,
                               bool *done) {
    size_t i = b->w->plan ? obm__pack_find(b->m->pack, name) : SIZE_MAX;
    obm_tensor shape, expected;
    bool exists;
    *done = false;
    if (i == SIZE_MAX || !obm__route_changes(b->w->plan, i)) return OBM_OK;
    OBM_TRY(obm__route_shape(b->w->plan, i, &shape, &exists));
    if (!exists) return OBM_OK;
    shape.dtype = OBM_F32;
    expected_shape(&b->m->config, role, &expected);
    OBM_TRY(check_tensor(b, name, &shape, &expected, role == OBM_EMBEDDING || role == OBM_HEAD));
    *done = true;
    if (!is_vector(role)) return changed_matrix(b, i, &shape, layer, role, out);
    b->trims |= obm__route_kind_of(b->w->plan, i) == OBM_ROUTE_ELEMENTS;
    return add_pending(b, (obm__pending){.tensor = i, .shape = shape, .vector = true, .role = role, .out = out});
}

/* A tied head is the embedding.  Where the route only adds planes to that, they are added here, and rows are all that
 * the embedding itself is asked for; else the head is whatever becomes of the embedding. */
static obm_status tie_head(obm__build *b, obm__matrix *out) {
    size_t i = b->w->plan ? obm__pack_find(b->m->pack, b->m->config.arch->names[OBM_EMBEDDING]) : SIZE_MAX;
    bool planes = false, exists;
    obm_tensor shape;
    if (i != SIZE_MAX && !b->m->materialise && obm__route_kind_of(b->w->plan, i) == OBM_ROUTE_PATTERNS) {
        OBM_TRY(obm__route_shape(b->w->plan, i, &shape, &exists));
        planes = shape.shape[0] == b->m->pack->tensors[i].base.shape[0] &&
                 take_planes(b, obm__model_tensor(b->m, 0, OBM_HEAD), 0, OBM_HEAD, out);
    }
    b->head_has_planes = planes;
    b->ties_head = !planes;
    return OBM_OK;
}

/* The two ways of nearly all tensors, without looking for names: a switch of routes has microseconds for all of them.
 */
static bool decide_quickly(obm__build *b, int64_t layer, obm__role role, obm__matrix *out) {
    if (!b->w->plan || role == OBM_HEAD || role == OBM_EMBEDDING) return false;
    size_t i = obm__model_tensor(b->m, layer, role);
    if (i == SIZE_MAX || !obm__route_changes(b->w->plan, i)) {
        *out = *obm__weights_at(b->m->base_alone, layer, role);
        return true;
    }
    return obm__route_kind_of(b->w->plan, i) == OBM_ROUTE_PATTERNS && take_planes(b, i, layer, role, out);
}

/* The base's own matrix is packed or placed already. */
static void share_packed(const obm__build *b, int64_t layer, obm__role role, obm__matrix *w) {
    const obm__matrix *base = b->m->base_alone ? obm__weights_at(b->m->base_alone, layer, role) : NULL;
    if (base && (base->data == w->data || base->origin == w->data) && base->rows == w->rows) *w = *base;
}

static obm_status decide_tensor(obm__build *b, int64_t layer, obm__role role) {
    const obm__config *c = &b->m->config;
    obm__matrix *out = (obm__matrix *)obm__weights_at(b->w, layer, role);
    char name[256];
    bool done;
    if (decide_quickly(b, layer, role, out)) return OBM_OK;
    if (!c->arch->names[role] || (role != OBM_HEAD && !obm__config_has(c, role))) return OBM_OK;
    obm__tensor_name(c->arch->names[role], layer, name, sizeof name);
    OBM_TRY(route_tensor(b, name, layer, role, out, &done));
    if (done) return OBM_OK;
    if (!obm__config_has(c, role)) return tie_head(b, out);
    OBM_TRY(base_tensor(b, name, role, out));
    share_packed(b, layer, role, out);
    return OBM_OK;
}

/* The head before the embedding, which depends on it. */
static obm_status decide_all(obm__build *b) {
    for (int64_t layer = 0; layer < b->w->layers; layer++)
        for (int role = 0; role < OBM_LAYER_ROLES; role++) OBM_TRY(decide_tensor(b, layer, (obm__role)role));
    OBM_TRY(decide_tensor(b, 0, OBM_HEAD));
    OBM_TRY(decide_tensor(b, 0, OBM_EMBEDDING));
    return decide_tensor(b, 0, OBM_FINAL_NORM);
}

/* ---- a whole route ---- */

void obm__weights_free(obm_model *m, obm__weights *w) {
    if (!w) return;
    for (size_t i = 0; i < w->n_overlays; i++) obm__overlay_release(m, w->overlays[i]);
    for (size_t i = 0; i < w->n_owned; i++) obm_free(w->owned[i]);
    obm__route_plan_free(w->plan);
    obm__planes_route_free(w->masks);
    obm__coefficients_release(w->hard_routes);
    obm_free(w->overlays);
    obm_free(w->terms);
    obm_free(w->owned);
    obm_free(w->tensors);
    obm_free(w->route);
    obm_free(w);
}

static obm__weights *weights_new(const obm_model *m, bool routed) {
    obm__weights *w = obm__calloc(1, sizeof *w);
    size_t count;
    if (!w) return NULL;
    w->layers = m->config.layers;
    w->tasks = m->tasks;
    if (obm__mul((size_t)w->layers, OBM_LAYER_ROLES, &count))
        w->tensors = obm__calloc(count + OBM_ROLES, sizeof *w->tensors);
    w->route = routed ? obm__calloc(m->tasks, sizeof *w->route) : NULL;
    if (w->tensors && (w->route || !routed)) return w;
    obm_free(w->tensors);
    obm_free(w->route);
    obm_free(w);
    return NULL;
}

void obm__build_free(obm__build *b) {
    if (!b) return;
    for (size_t i = 0; i < b->n_pending; i++) {
        if (!b->pending[i].overlay)
            obm_free((void *)b->pending[i].filled.data);
        else if (!b->pending[i].shared && !b->pending[i].overlay->refs)
            obm__overlay_free(b->pending[i].overlay);
    }
    obm__weights_free(b->m, b->w);
    obm_free(b->pending);
    obm_free(b);
}

obm_status obm__build_new(obm_model *m, const double *route, obm__build **out, obm_error *err) {
    obm__build *b = obm__calloc(1, sizeof *b);
    obm_status status = OBM_OK;
    if (!b) return obm__fail_nomem(err, sizeof *b);
    b->m = m;
    b->err = err;
    b->w = weights_new(m, route != NULL);
    if (!b->w) OBM_GO(obm__fail_nomem(err, sizeof *b->w));
    if (route) {
        memcpy(b->w->route, route, m->tasks * sizeof *route);
        b->w->settings = m->pack->settings;
        OBM_GO(obm__route_plan_new(m->pack, route, OBM_ROUTE_NONE, NULL, &b->w->plan, err));
        OBM_GO(take_coefficients(b));
    }
    OBM_GO(decide_all(b));
    *out = b;
    b = NULL;
done:
    obm__build_free(b);
    return status;
}

obm_status obm__build_run(obm__build *b, const _Atomic int *stop, obm_error *err) {
    if (b->trims) OBM_TRY(obm__route_plan_trim(b->w->plan, stop ? NULL : b->m->pulse, stop, err));
    for (size_t i = 0; i < b->n_pending; i++) {
        obm__pending *p = &b->pending[i];
        if (p->shared) continue;
        obm__route_plan plan = *b->w->plan; /* an overlay has the same bits whichever of its routes comes first */
        if (p->overlay) plan.rule.weights = p->overlay->route;
        obm__overlay *o = p->overlay;
        obm__role role = p->role == OBM_EMBEDDING && b->ties_head ? OBM_HEAD : p->role; /* which reads all of it */
        OBM_TRY(obm__overlay_fill(b->m, &plan, p->tensor, role, &p->shape, stop, o ? &o->matrix : &p->filled,
                                  o ? &o->region : NULL, err));
    }
    return OBM_OK;
}

static obm_status keep_pending(obm__build *b, obm__pending *p) {
    if (!p->overlay) {
        *p->out = p->filled;
        p->filled.data = NULL; /* own() frees it on failure */
        return own(b, (void *)p->out->data, (size_t)p->out->cols * sizeof(float));
    }
    if (!p->shared) {
        OBM_TRY(reference(b, p->overlay));
        obm__overlay_keep(b->m, p->overlay);
    }
    *p->out = slice_matrix(&b->m->config, p->role, &p->overlay->matrix);
    return OBM_OK;
}

/* Ids that the embedding has and the head lacks (or the other way round) could not be run. */
static obm_status check_vocabulary(obm__build *b) {
    int64_t in = obm__weights_at(b->w, 0, OBM_EMBEDDING)->rows, head = obm__weights_at(b->w, 0, OBM_HEAD)->rows;
    if (in == head) return OBM_OK;
    return obm__fail(b->err, OBM_E_SHAPE, "%s: the embedding has %lld rows under this route, the head %lld",
                     obm_checkpoint_path(b->m->base), (long long)in, (long long)head);
}

obm_status obm__build_keep(obm__build *b, obm__weights **out, obm_error *err) {
    b->err = err;
    for (size_t i = 0; i < b->n_pending; i++) OBM_TRY(keep_pending(b, &b->pending[i]));
    if (b->ties_head) {
        obm__matrix *head = (obm__matrix *)obm__weights_at(b->w, 0, OBM_HEAD);
        *head = *obm__weights_at(b->w, 0, OBM_EMBEDDING);
        share_packed(b, 0, OBM_HEAD, head);
    }
    OBM_TRY(check_vocabulary(b));
    *out = b->w;
    b->w = NULL;
    return OBM_OK;
}

obm_status obm__weights_embed(const obm_model *m, const obm__weights *w, int32_t id, float *out, obm_error *err) {
    const obm__matrix *e = obm__weights_at(w, 0, OBM_EMBEDDING);
    if (e->by_token) return obm__route_rows(w->plan, w->embedding, id, 1, out, err);
    obm_tensor t = {.data = e->data, .dtype = e->dtype, .ndim = 2, .shape = {e->rows, e->cols}};
    obm__widen(m->ctx->k, &t, id * e->cols, e->cols, out);
    return OBM_OK;
}
