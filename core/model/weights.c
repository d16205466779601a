/* The routes that a model keeps: finding, admitting beside others, dropping.  What a route's weights are is decided in
 * prepare.c. */
#include "model.h"

#include <stdatomic.h>
#include <string.h>

/* Mixtures kept for another request: enough for those that a caller names, few against what the router makes. */
#define KEPT_MIXTURES 16

static bool is_base(const double *route, size_t tasks) {
    for (size_t i = 0; route && i < tasks; i++)
        if (route[i] != 0) return false;
    return true;
}

/* lambda and the reading may be changed on a pack that is open: routes made before that are not found again. */
static bool is_current(const obm_model *m, const obm__weights *w) {
    return !w->route || obm__same_settings(&w->settings, &m->pack->settings);
}

static obm__weights *find(obm_model *m, const double *route) {
    for (obm__weights *w = m->routes; w; w = w->next) {
        if (!is_current(m, w)) continue;
        if (route ? w->route && !memcmp(w->route, route, m->tasks * sizeof *route) : !w->route) return w;
    }
    return NULL;
}

/* ---- memory ---- */

static bool uses(const obm__weights *w, const obm__overlay *o) {
    for (size_t i = 0; i < w->n_overlays; i++)
        if (w->overlays[i] == o) return true;
    return false;
}

/* True if a sequence runs a route, other than `except`, that needs the overlay. */
static bool in_use(const obm_model *m, const obm__overlay *o, const obm__weights *except) {
    for (const obm__weights *w = m->routes; w; w = w->next)
        if (w->route && w->refs && w != except && uses(w, o)) return true;
    return false;
}

/* Bytes of routes that sequences run, without `except`; an overlay that two of them share counts once. */
static uint64_t bytes_in_use(const obm_model *m, const obm__weights *except) {
    uint64_t bytes = 0;
    for (const obm__weights *w = m->routes; w; w = w->next)
        if (w->route && w->refs && w != except) bytes += w->bytes + w->terms_bytes;
    for (const obm__overlay *o = m->overlays; o; o = o->next)
        if (in_use(m, o, except)) bytes += o->bytes;
    return bytes;
}

/* What running w takes beyond what runs already. */
static uint64_t bytes_more(const obm_model *m, const obm__weights *w) {
    uint64_t bytes = w->bytes + w->terms_bytes;
    for (size_t i = 0; i < w->n_overlays; i++)
        if (!in_use(m, w->overlays[i], w)) bytes += w->overlays[i]->bytes;
    return bytes;
}

static void count_bytes(obm_model *m, const obm__weights *w, bool comes) {
    m->overlay_bytes += comes ? w->bytes : -w->bytes;
    m->terms_bytes += comes ? w->terms_bytes : -w->terms_bytes;
}

/* The base alone is never dropped: it is the mapping.  Routes of older settings go first. */
static bool goes_before(const obm_model *m, const obm__weights *a, const obm__weights *b) {
    bool current = is_current(m, a);
    return current != is_current(m, b) ? !current : a->used < b->used;
}

/* A mixture of tasks that has no matrices of its own. */
static bool is_light(const obm__weights *w) {
    return w->hard_routes && !w->n_overlays && obm__route_hard(w->route, w->tasks) == SIZE_MAX;
}

static void drop(obm_model *m, obm__weights **at) {
    obm__weights *w = *at;
    *at = w->next;
    count_bytes(m, w, false);
    obm__weights_free(m, w);
}

/* The memory of its coefficients serves the next route. */
static void drop_light(obm_model *m, obm__weights **at) {
    obm__planes_route_free(m->spare);
    m->spare = (*at)->masks;
    m->terms_bytes -= (*at)->terms_bytes;
    (*at)->terms_bytes = 0;
    (*at)->masks = NULL;
    drop(m, at);
}

/* The next to go among routes that do not run; NULL: none. */
static obm__weights **choose_idle(obm_model *m, bool light, size_t *count) {
    obm__weights **first = NULL;
    *count = 0;
    for (obm__weights **at = &m->routes; *at; at = &(*at)->next) {
        if (!(*at)->route || (*at)->refs || (light && !is_light(*at))) continue;
        ++*count;
        if (!first || goes_before(m, *at, *first)) first = at;
    }
    return first;
}

/* Drops routes that do not run until `needed` more bytes fit. */
static void make_room(obm_model *m, uint64_t needed) {
    for (;;) {
        size_t count;
        obm__weights **first = choose_idle(m, false, &count);
        uint64_t held = m->overlay_bytes + m->terms_bytes;
        bool over = needed > m->route_budget || held > m->route_budget - needed;
        if (over) {
            obm__planes_route_free(m->spare);
            m->spare = NULL;
        }
        if (!first || (!over && is_current(m, *first))) return;
        drop(m, first);
    }
}

/* Besides, few mixtures are kept: they are made again faster than the system gives new memory. */
static void evict(obm_model *m, uint64_t needed) {
    make_room(m, needed);
    for (;;) {
        size_t count;
        obm__weights **first = choose_idle(m, true, &count);
        if (count <= KEPT_MIXTURES) return;
        drop_light(m, first);
    }
}

/* Never refused: the base, what runs already, and the only one. */
static bool fits(const obm_model *m, const obm__weights *known, uint64_t bytes) {
    uint64_t others = bytes_in_use(m, known);
    if (!others || (known && (!known->route || known->refs))) return true;
    return others <= m->route_budget && bytes <= m->route_budget - others;
}

/* ---- getting a route ---- */

/* Frees b. */
static obm_status keep(obm_model *m, obm__build *b, obm__weights **out, obm_error *err) {
    obm__weights *w;
    obm_status status = obm__build_keep(b, &w, err);
    obm__build_free(b);
    if (status != OBM_OK) return status;
    w->used = ++m->clock; /* not the first to go, should it have to wait for room */
    w->next = m->routes;
    m->routes = w;
    count_bytes(m, w, true);
    *out = w;
    return OBM_OK;
}

/* What keeping b will take: its overlays, and the coefficients that it holds already. */
static uint64_t bytes_of(const obm__build *b) { return b->needed + b->w->bytes + b->w->terms_bytes; }

static obm_status build_now(obm_model *m, obm__build *b, obm__weights **out, obm_error *err) {
    evict(m, bytes_of(b));
    obm_status status = obm__build_run(b, NULL, err);
    if (status == OBM_OK) return keep(m, b, out, err);
    obm__build_free(b);
    return status;
}

static obm__weights *take(obm_model *m, obm__weights *w) {
    w->refs++;
    w->used = ++m->clock;
    evict(m, 0);
    return w;
}

obm_status obm__weights_check(const obm_model *m, obm_error *err) {
    if (!m->pack || m->pack->revision == m->revision) return OBM_OK;
    return obm__fail(err, OBM_E_ARG,
                     "%s: experts were added, replaced or removed since the model was opened: open it again",
                     m->pack->path);
}

obm_status obm__weights_acquire(obm_model *m, const double *route, obm__weights **out, obm_error *err) {
    OBM_TRY(obm__weights_check(m, err));
    if (is_base(route, m->tasks)) route = NULL;
    obm__weights *w = find(m, route);
    obm__build *b;
    if (!w) {
        OBM_TRY(obm__build_new(m, route, &b, err));
        OBM_TRY(build_now(m, b, &w, err));
    }
    *out = take(m, w);
    return OBM_OK;
}

/* ---- beside sequences that run ---- */

static void build_beside(void *arg) {
    obm__build *b = arg;
    if (b->m->placement) obm__topology_unbind(b->m->ctx->topology);
    b->status = obm__build_run(b, &b->stop, &b->error);
}

void obm__weights_cancel(obm_model *m) {
    if (!m->building) return;
    atomic_store(&m->building->stop, 1);
    obm__task_join(m->building->task);
    obm__build_free(m->building);
    m->building = NULL;
}

/* Takes what the other thread has finished, waiting for it if nothing is being decoded. */
static obm_status collect(obm_model *m, obm_error *err) {
    obm__build *b = m->building;
    obm__weights *w;
    while (!obm__task_wait(b->task, m->decoding ? 0 : 10)) {
        if (m->decoding) return OBM_OK;
        OBM_TRY(obm__pulse_check(m->pulse, err));
    }
    obm__task_join(b->task);
    m->building = NULL;
    if (b->status == OBM_OK) return keep(m, b, &w, err);
    obm_status status = obm__fail(err, b->error.code, "%s", b->error.message);
    obm__build_free(b);
    return status;
}

static obm_status start_beside(obm_model *m, obm__build *b, obm_error *err) {
    evict(m, bytes_of(b));
    obm_status status = obm__task_start(build_beside, b, &b->task, err);
    if (status == OBM_OK)
        m->building = b;
    else
        obm__build_free(b);
    return status;
}

/* A route that is not there yet: built now where that takes no overlays, or nothing waits for it. */
static obm_status admit_new(obm_model *m, const double *route, obm__weights **out, obm_error *err) {
    obm__build *b;
    *out = NULL;
    OBM_TRY(obm__build_new(m, route, &b, err));
    if (!fits(m, NULL, bytes_of(b))) {
        obm__build_free(b);
        return OBM_OK;
    }
    return b->n_pending && m->decoding ? start_beside(m, b, err) : build_now(m, b, out, err);
}

obm_status obm__weights_admit(obm_model *m, const double *route, obm__weights **out, obm_error *err) {
    OBM_TRY(obm__weights_check(m, err));
    if (is_base(route, m->tasks)) route = NULL;
    *out = NULL;
    obm__weights *w = find(m, route);
    if (!w && m->building) {
        OBM_TRY(collect(m, err));
        if (m->building) return OBM_OK;
        w = find(m, route);
    }
    if (!w) OBM_TRY(admit_new(m, route, &w, err));
    if (w && fits(m, w, bytes_more(m, w))) *out = take(m, w);
    return OBM_OK;
}

void obm__weights_release(obm_model *m, obm__weights *w) {
    if (!w) return;
    w->refs--;
    evict(m, 0);
}

void obm__weights_free_all(obm_model *m) {
    obm__weights_cancel(m);
    while (m->routes) {
        obm__weights *next = m->routes->next;
        obm__weights_free(m, m->routes);
        m->routes = next;
    }
}
