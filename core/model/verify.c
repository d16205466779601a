/* Where the pages of a placed model really are: every part is looked up page by page and held against the plan. */
#include "model.h"

#include <unistd.h>

typedef struct tally {
    uint64_t bytes, remote, absent; /* absent: never touched, so nowhere yet */
    uint64_t at[OBM_NODES], other;  /* other: on a node that this process does not use */
} tally;

typedef struct census {
    obm_model *m;
    tally part[OBM_PLACED_PARTS];
    int *node; /* (pages) of the block at hand */
    size_t room;
} census;

/* Of one page's bytes [from, to), those of each node that reads them; without bounds nobody in particular does. */
static void count_page(const obm__placement *p, tally *t, const size_t *at, size_t from, size_t to, int node) {
    t->bytes += to - from;
    if (node == -2)
        t->absent += to - from;
    else if (node < 0)
        t->other += to - from;
    else
        t->at[node] += to - from;
    if (node == -2 || !obm__placement_local(p)) return;
    for (int i = 0; i < p->nodes; i++) {
        size_t a = at[i] > from ? at[i] : from, b = at[i + 1] < to ? at[i + 1] : to;
        if (a < b && i != node) t->remote += b - a;
    }
}

static obm_status count_block(census *c, obm__placed_part part, const char *data, size_t bytes, const size_t *at,
                              obm_error *err) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (bytes + page - 1) / page;
    if (pages > c->room) {
        obm_free(c->node);
        c->node = obm__alloc(pages, sizeof *c->node);
        c->room = c->node ? pages : 0;
        if (!c->node) return obm__fail_nomem(err, pages * sizeof *c->node);
    }
    if (obm__topology_find(c->m->ctx->topology, data, pages, c->node))
        return obm__fail_errno(err, "numa: the system does not say where pages are");
    for (size_t i = 0; i < pages; i++) {
        size_t from = i * page, to = from + page < bytes ? from + page : bytes;
        count_page(c->m->placement, &c->part[part], at, from, to, c->node[i]);
    }
    return OBM_OK;
}

/* What is spread over the nodes and read by the workers of n of them is in turn near to one of these and far from the
 * others. */
static uint64_t remote_share(const obm_model *m, uint64_t bytes) {
    uint64_t readers = 0;
    for (int i = 0; i < m->placement->nodes; i++) readers += obm__workers_count(&m->ctx->workers, i) > 0;
    return readers && obm__placement_local(m->placement) ? bytes / readers * (readers - 1) : 0;
}

/* Each copy is read by the workers of its node. */
static obm_status count_region(census *c, const obm__region *r, obm_error *err) {
    const obm__workers *w = &c->m->ctx->workers;
    size_t at[OBM_NODES + 1];
    if (r->copies == 1) OBM_TRY(count_block(c, r->part, r->data, r->bytes, r->at, err));
    if (r->shared) c->part[r->part].remote += remote_share(c->m, r->bytes);
    if (r->copies == 1) return OBM_OK;
    for (int i = 0; i < w->n; i++) {
        int node = w->at[i].node;
        if (i && w->at[i - 1].node == node) continue; /* workers stand node by node */
        for (int k = 0; k <= c->m->placement->nodes; k++) at[k] = k > node ? r->bytes : 0;
        OBM_TRY(
            count_block(c, r->part, (char *)r->data + obm__place_near_node(c->m, r->bytes, node), r->bytes, at, err));
    }
    return OBM_OK;
}

static obm_status count_kv(census *c, const obm__sequence *s, obm_error *err) {
    size_t at[OBM_NODES + 1];
    obm__kv_bounds(c->m, s->kv, at);
    for (size_t i = 0; i < s->n_pages; i++)
        OBM_TRY(count_block(c, OBM_PLACED_KV, s->pages[i]->data, obm__kv_page_bytes(c->m, s->kv), at, err));
    return OBM_OK;
}

/* A prompt as long as a page of the cache, so that all of it has been written to. */
static obm_status fill_cache(obm_model *m, obm__sequence *s, obm_error *err) {
    int32_t ids[OBM_TILE_TOKENS] = {0};
    size_t n = OBM_TILE_TOKENS;
    if ((int64_t)n > m->config.max_positions) n = (size_t)m->config.max_positions;
    OBM_TRY(obm__sequence_expect(m, s, (int64_t)n, err));
    return obm__prefill(m, s, ids, n, false, m->config.layers, NULL, NULL, err);
}

static obm_status count_all(census *c, obm_error *err) {
    obm__sequence *s = NULL;
    for (const obm__region *r = c->m->regions; r; r = r->next) OBM_TRY(count_region(c, r, err));
    for (const obm__overlay *o = c->m->overlays; o; o = o->next)
        if (o->region) OBM_TRY(count_region(c, o->region, err));
    OBM_TRY(obm__sequence_new(c->m, NULL, c->m->kv, &s, err));
    obm_status status = fill_cache(c->m, s, err);
    if (status == OBM_OK) status = count_kv(c, s, err);
    obm__sequence_free(c->m, s);
    return status;
}

/* ---- as JSON ---- */

static void add_tally(obm__buffer *b, const obm__placement *p, const char *name, const tally *t) {
    obm__buffer_printf(b, "\"%s\": {\"bytes\": %llu, \"nodes\": [", name, (unsigned long long)t->bytes);
    for (int i = 0; i < p->nodes; i++) obm__buffer_printf(b, "%s%llu", i ? ", " : "", (unsigned long long)t->at[i]);
    obm__buffer_printf(b, "], \"other\": %llu, \"absent\": %llu, \"remote_bytes\": ", (unsigned long long)t->other,
                       (unsigned long long)t->absent);
    if (obm__placement_local(p))
        obm__buffer_printf(b, "%llu}", (unsigned long long)t->remote);
    else
        obm__buffer_text(b, "null}");
}

static obm_status write_json(const census *c, char **json, obm_error *err) {
    static const char *const names[] = {"weights", "planes", "overlays", "kv"};
    const obm__placement *p = c->m->placement;
    obm__buffer b = {0};
    uint64_t remote = 0;
    obm__buffer_printf(&b, "{\"numa\": \"%s\", \"bound\": %s, ", p ? obm__numa_name(p->numa) : "off",
                       p && !c->m->bind_refused ? "true" : "false");
    for (int i = 0; p && i < OBM_PLACED_PARTS; i++) {
        add_tally(&b, p, names[i], &c->part[i]);
        obm__buffer_text(&b, ", ");
        remote += c->part[i].remote;
    }
    if (p && obm__placement_local(p))
        obm__buffer_printf(&b, "\"remote_bytes\": %llu}", (unsigned long long)remote);
    else
        obm__buffer_text(&b, "\"remote_bytes\": null}");
    if (b.failed) {
        obm__buffer_free(&b);
        return obm__fail_nomem(err, 1);
    }
    *json = b.data;
    return OBM_OK;
}

obm_status obm_model_verify_placement(obm_model *m, char **json, obm_error *err) {
    obm__pulse pulse = obm__pulse_new(m->ctx, NULL, NULL, "verify", 1);
    census c = {.m = m};
    OBM_TRY(obm__model_enter(m, &pulse, err));
    obm_status status = m->placement ? count_all(&c, err) : OBM_OK;
    if (status == OBM_OK) status = write_json(&c, json, err);
    obm_free(c.node);
    obm__model_leave(m);
    return status;
}
