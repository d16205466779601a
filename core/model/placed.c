/* Acting on a placement plan: memory that is bound before it is touched, filled and read by the workers of its node,
 * and the count of where its pages are.  Which rows go where is decided in placement.c. */
#include "model.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE_PAGE ((size_t)2 << 20)

static size_t page_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }
static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

static bool cuts(const obm_model *m) { return m->placement && obm__placement_cuts(m->placement); }
static bool replicates(const obm_model *m) { return m->placement && m->placement->numa == OBM_NUMA_REPLICATE; }

obm_status obm__place_model(obm_model *m, bool z12, obm_error *err) {
    obm__placed_shapes shapes;
    if (m->ctx->workers.numa == OBM_NUMA_OFF) return OBM_OK;
    OBM_TRY(obm__placed_shapes_of(m, z12, &shapes, err));
    m->placement = obm__alloc(1, sizeof *m->placement);
    if (!m->placement) return obm__fail_nomem(err, sizeof *m->placement);
    obm__placement_plan(obm__topology_machine(m->ctx->topology), &m->ctx->workers, m->ctx->numa, &shapes, m->placement);
    return OBM_OK;
}

/* ---- memory ---- */

/* Once per model: containers and sandboxes often refuse, and then the first touch decides, which is by the same
 * workers. */
static void warn_refused(obm_model *m) {
    if (m->bind_refused) return;
    m->bind_refused = true;
    const char *why = errno == ENODEV ? "the topology is not this machine's" : strerror(errno);
    obm__warn(m->ctx, "numa %s: memory cannot be bound to nodes here (%s): pages lie where they are touched first",
              obm__numa_name(m->placement->numa), why);
}

/* A page belongs to the node of its first byte; at NULL: to all nodes in turn. */
static int bind_bytes(const obm_model *m, char *data, size_t bytes, const size_t *at) {
    int failed = 0;
    if (!at) return obm__topology_place(m->ctx->topology, data, round_up(bytes, page_size()), -1);
    for (int i = 0; i < m->placement->nodes && !failed; i++) {
        size_t from = round_up(at[i], page_size()), to = round_up(at[i + 1], page_size());
        if (from < to) failed = obm__topology_place(m->ctx->topology, data + from, to - from, i);
    }
    return failed;
}

static void bind(obm_model *m, char *data, size_t bytes, const size_t *at) {
    if (bind_bytes(m, data, bytes, obm__placement_local(m->placement) ? at : NULL)) warn_refused(m);
}

/* Large mappings start at a huge page: what is mapped too much around it is given back. */
char *obm__map_huge(size_t bytes) {
    size_t more = bytes >= HUGE_PAGE ? HUGE_PAGE : 0, all;
    bytes = obm__whole_pages(bytes); /* what is behind them can only be given back from a page's first byte on */
    if (!obm__add(bytes, more, &all)) return NULL;
    char *at = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return NULL;
    if (!more) return at;
    size_t before = (HUGE_PAGE - (uintptr_t)at % HUGE_PAGE) % HUGE_PAGE;
    if (before) munmap(at, before);
    if (more - before) munmap(at + before + bytes, more - before);
    (void)madvise(at + before, bytes, MADV_HUGEPAGE); /* a kernel without them is as good, only slower */
    return at + before;
}

void *obm__place_map(obm_model *m, size_t bytes, const size_t *at) {
    char *data = obm__map_huge(bytes);
    if (data) bind(m, data, bytes, at);
    return data;
}

void obm__place_unmap(void *data, size_t bytes) {
    if (data) munmap(data, round_up(bytes, page_size()));
}

/* ---- rows ---- */

/* at[i]: the first item of node i where an item is `per_item` rows of a kind, of `items`. */
static void item_bounds(const obm__placement *p, int kind, int64_t per_item, size_t items, size_t *at) {
    const int64_t *rows = p->rows[kind];
    for (int i = 0; i <= p->nodes; i++) {
        size_t item = (size_t)((rows[i] + per_item - 1) / per_item);
        at[i] =
            rows[i] == rows[p->nodes] || item > items ? items : item; /* rows that only some routes have: the last's */
    }
}

void obm__place_split(const obm_model *m, int kind, int64_t per_item, size_t items, obm__lanes *out) {
    size_t at[OBM_NODES + 1] = {0, items};
    out->n = cuts(m) ? m->placement->nodes : 1;
    if (cuts(m)) item_bounds(m->placement, kind, per_item, items, at);
    for (int i = 0; i < out->n; i++) {
        out->begin[i] = at[i];
        out->end[i] = at[i + 1];
    }
}

obm_status obm__place_slices(obm_model *m, int kind, int64_t per_item, size_t items, size_t size, obm__range_fn fn,
                             void *arg, obm_error *err) {
    obm__lanes whole;
    obm__place_split(m, kind, per_item, items, &whole);
    if (replicates(m)) {
        whole = (obm__lanes){.n = m->placement->nodes};
        whole.end[m->placement->home] = items; /* the first copy is home's */
    }
    return obm__parallel_parts(m->ctx, &whole, (items + size - 1) / size, 1, fn, arg, m->pulse, err);
}

void obm__place_rows(const obm_model *m, size_t n, size_t grain, obm__range_fn fn, void *arg) {
    if (!m->placement || m->placement->numa != OBM_NUMA_ISOLATE) {
        obm__parallel(m->ctx, n, grain, fn, arg);
        return;
    }
    obm__lanes s = {.n = m->placement->nodes};
    s.end[m->placement->home] = n;
    obm__parallel_lanes(m->ctx, &s, grain, fn, arg);
}

/* ---- copies ---- */

/* From copy to copy: each begins where a mapping of its own would. */
static size_t stride_of(size_t bytes) {
    return round_up(bytes ? bytes : 1, bytes < HUGE_PAGE ? page_size() : HUGE_PAGE);
}

static int copy_of(const obm_model *m, int node) {
    return (node - m->placement->home + m->placement->nodes) % m->placement->nodes;
}

size_t obm__place_near_node(const obm_model *m, size_t bytes, int node) {
    return replicates(m) ? (size_t)copy_of(m, node) * stride_of(bytes) : 0;
}

size_t obm__place_near(const obm_model *m, size_t bytes, int worker) {
    return obm__place_near_node(m, bytes, m->ctx->workers.at[worker].node);
}

static uint64_t count_readers(const obm_model *m) {
    uint64_t n = 0;
    for (int i = 0; i < m->placement->nodes; i++) n += obm__workers_count(&m->ctx->workers, i) > 0;
    return n;
}

uint64_t obm__place_more(const obm_model *m, obm__placed_part part) {
    uint64_t bytes = 0;
    for (const obm__region *r = m->regions; r; r = r->next)
        if (r->copies > 1 && r->part == part) bytes += (count_readers(m) - 1) * r->bytes;
    return bytes;
}

/* One mapping; the copies of nodes without workers are never touched, and so take no memory. */
static char *map_copies(obm_model *m, size_t bytes) {
    size_t stride = stride_of(bytes), all, at[OBM_NODES + 1];
    char *data = obm__mul(stride, (size_t)m->placement->nodes, &all) ? obm__map_huge(all) : NULL;
    for (int i = 0; data && i < m->placement->nodes; i++) {
        for (int k = 0; k <= m->placement->nodes; k++) at[k] = k > i ? stride : 0;
        bind(m, data + obm__place_near_node(m, bytes, i), stride, at);
    }
    return data;
}

typedef struct spread_job {
    const obm_model *m;
    char *data;
    size_t bytes, pieces; /* of a copy */
} spread_job;

#define SPREAD_BYTES ((size_t)1 << 20)

/* Item: a piece of a copy, node after node. */
static void copy_pieces(void *arg, size_t begin, size_t end, int worker) {
    const spread_job *j = arg;
    (void)worker;
    for (size_t item = begin; item < end; item++) {
        size_t at = item % j->pieces * SPREAD_BYTES, n = j->bytes - at < SPREAD_BYTES ? j->bytes - at : SPREAD_BYTES;
        char *copy = j->data + obm__place_near_node(j->m, j->bytes, (int)(item / j->pieces));
        memcpy(copy + at, j->data + at, n);
    }
}

obm_status obm__place_spread(obm_model *m, void *data, obm_error *err) {
    const obm__region *r = m->regions;
    while (r && r->data != data) r = r->next;
    if (!r || r->copies == 1 || !r->bytes) return OBM_OK;
    spread_job j = {.m = m, .data = data, .bytes = r->bytes, .pieces = (r->bytes + SPREAD_BYTES - 1) / SPREAD_BYTES};
    obm__lanes whole = {.n = m->placement->nodes};
    for (int i = 0; i < whole.n; i++) {
        bool reads = i != m->placement->home && obm__workers_count(&m->ctx->workers, i) > 0;
        whole.begin[i] = (size_t)i * j.pieces;
        whole.end[i] = whole.begin[i] + (reads ? j.pieces : 0);
    }
    return obm__parallel_parts(m->ctx, &whole, j.pieces / 32 + 1, 1, copy_pieces, &j, m->pulse, err);
}

/* ---- blocks of rows ---- */

void *obm__place_alloc(obm_model *m, obm__placed_part part, int kind, int64_t per_item, size_t items,
                       size_t item_bytes) {
    size_t bytes, at[OBM_NODES + 1] = {0};
    if (!obm__mul(items, item_bytes, &bytes)) return NULL;
    if (!m->placement) return obm__alloc(bytes, 1);
    obm__region *r = obm__calloc(1, sizeof *r);
    if (!r) return NULL;
    if (cuts(m)) item_bounds(m->placement, kind, per_item, items, at);
    for (int i = 0; i <= m->placement->nodes; i++) r->at[i] = at[i] * item_bytes;
    r->part = part;
    r->bytes = bytes;
    r->copies = replicates(m) ? m->placement->nodes : 1;
    r->data = replicates(m) ? map_copies(m, bytes) : obm__place_map(m, bytes ? bytes : 1, r->at);
    if (!r->data) {
        obm_free(r);
        return NULL;
    }
    r->next = m->regions;
    m->regions = r;
    return r->data;
}

void obm__place_free(obm_model *m, void *data) {
    obm__region **at = &m->regions;
    while (*at && (*at)->data != data) at = &(*at)->next;
    obm__region *r = *at;
    if (!r) {
        obm_free(data);
        return;
    }
    *at = r->next;
    obm__place_unmap(r->data, r->copies > 1 ? (size_t)r->copies * stride_of(r->bytes) : r->bytes ? r->bytes : 1);
    obm_free(r);
}

void obm__place_free_all(obm_model *m) {
    while (m->regions) obm__place_free(m, m->regions->data);
    obm_free(m->placement);
    m->placement = NULL;
}

/* ---- overlays ---- */

/* A fused tensor holds the rows of several kinds: cut where one of them is cut it would be right for none. */
static bool is_cut(const obm_model *m, obm__role role, int64_t rows) {
    if (!cuts(m) || (role >= OBM_MATRIX_ROLES && role != OBM_HEAD)) return false;
    int kind = obm__role_kind(role);
    return kind == OBM_KIND_HEAD || rows == m->placement->rows[kind][m->placement->nodes];
}

/* Refused binding was warned of when the weights were placed; then the first touch decides here too. */
obm__region *obm__place_overlay(const obm_model *m, obm__role role, int64_t rows, size_t row_bytes) {
    size_t bytes, at[OBM_NODES + 1] = {0};
    obm__region *r = obm__mul((size_t)rows, row_bytes, &bytes) ? obm__calloc(1, sizeof *r) : NULL;
    if (!r) return NULL;
    *r = (obm__region){.bytes = bytes, .copies = 1, .part = OBM_PLACED_OVERLAYS, .shared = !is_cut(m, role, rows)};
    if (!r->shared) item_bounds(m->placement, obm__role_kind(role), 1, (size_t)rows, at);
    for (int i = 0; i <= m->placement->nodes; i++) r->at[i] = at[i] * row_bytes;
    r->data = obm__map_huge(bytes ? bytes : 1);
    if (!r->data) {
        obm_free(r);
        return NULL;
    }
    (void)bind_bytes(m, r->data, bytes ? bytes : 1, r->shared ? NULL : r->at);
    return r;
}

void obm__place_overlay_free(obm__region *r) {
    if (!r) return;
    obm__place_unmap(r->data, r->bytes ? r->bytes : 1);
    obm_free(r);
}

obm_status obm__place_overlay_slices(obm_model *m, obm__role role, int64_t rows, int64_t per_item, size_t items,
                                     size_t size, obm__range_fn fn, void *arg, obm_error *err) {
    obm__lanes whole = {.n = 1, .end = {items}};
    if (is_cut(m, role, rows)) obm__place_split(m, obm__role_kind(role), per_item, items, &whole);
    return obm__parallel_parts(m->ctx, &whole, (items + size - 1) / size, 1, fn, arg, m->pulse, err);
}

/* ---- weights ---- */

typedef struct copy_job {
    const obm__matrix *from;
    char *to;
} copy_job;

static void copy_slabs(void *arg, size_t begin, size_t end, int worker) {
    const copy_job *j = arg;
    size_t row = (size_t)j->from->cols * obm_dtype_size(j->from->dtype), rows = (size_t)j->from->rows;
    size_t first = begin * OBM_SLAB_ROWS, last = end * OBM_SLAB_ROWS < rows ? end * OBM_SLAB_ROWS : rows;
    (void)worker;
    memcpy(j->to + first * row, (const char *)j->from->data + first * row, (last - first) * row);
}

/* Bytes between two looks at the pulse: some 10 ms each worker. */
#define COPY_BYTES ((size_t)32 << 20)

static obm_status place_matrix(obm_model *m, int kind, obm__matrix *w, obm_error *err) {
    size_t slabs = ((size_t)w->rows + OBM_SLAB_ROWS - 1) / OBM_SLAB_ROWS;
    size_t rows = (size_t)w->rows, row = (size_t)w->cols * obm_dtype_size(w->dtype);
    copy_job j = {.from = w, .to = obm__place_alloc(m, OBM_PLACED_WEIGHTS, kind, 1, rows, row)};
    if (!j.to) return obm__fail_nomem(err, rows * row);
    OBM_TRY(
        obm__place_slices(m, kind, OBM_SLAB_ROWS, slabs, COPY_BYTES / (OBM_SLAB_ROWS * row) + 1, copy_slabs, &j, err));
    w->origin = w->data;
    w->data = j.to;
    return obm__place_spread(m, j.to, err);
}

/* What is packed is placed already.  A tied embedding is read where the head is. */
obm_status obm__place_weights(obm_model *m, obm_error *err) {
    obm__matrix *embedding = (obm__matrix *)obm__weights_at(m->base_alone, 0, OBM_EMBEDDING);
    for (size_t i = 0; m->placement && i < obm__matrix_count(m); i++) {
        int64_t layer;
        obm__role role = obm__matrix_role(m, i, &layer);
        obm__matrix *w = (obm__matrix *)obm__weights_at(m->base_alone, layer, role);
        if (!w->data || w->z12) continue;
        OBM_TRY(place_matrix(m, obm__role_kind(role), w, err));
        if (role == OBM_HEAD && embedding->data == w->origin) *embedding = *w;
        obm__checkpoint_release_pages(m->base);
    }
    return OBM_OK;
}

/* ---- the calling thread ---- */

void obm__place_caller(obm_model *m) {
    if (!m->placement || m->caller_bound) return;
    m->caller_bound = obm__topology_save(m->ctx->topology);
    if (m->caller_bound && !obm__topology_bind(m->ctx->topology, &m->ctx->workers, 0)) return;
    if (!m->thread_refused)
        obm__warn(m->ctx, "numa %s: threads cannot be bound to cores here: rows may be read by another node's",
                  obm__numa_name(m->placement->numa));
    m->thread_refused = true;
}

void obm__place_leave(obm_model *m) {
    obm__topology_restore(m->ctx->topology, m->caller_bound);
    m->caller_bound = NULL;
}
