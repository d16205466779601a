/* Sequences and their KV cache: pages of 64 positions for all layers, which never move.  It does not attend. */
#include "model.h"

#include <string.h>

#define PART_UNIT 4096
/* From this size on a page of the cache is a mapping of its own: a head's part of it is few small pages of memory, each
 * of which the processor would have to look up for every token. */
#define MAPPED ((size_t)1 << 21)

static bool is_mapped(const obm_model *m, size_t bytes) { return m->placement || bytes >= MAPPED; }

/* Heads [first, end) of a page that lie together: all of them, or those of a node. */
static bool heads_at(const obm_model *m, int64_t kv_head, int64_t *first, int64_t *end) {
    const obm__placement *p = m->placement;
    *first = 0;
    *end = m->config.kv_heads;
    if (!p || !obm__placement_local(p)) return false;
    for (int i = 0; i < p->nodes; i++) {
        *first = p->heads[i];
        *end = p->heads[i + 1];
        if (kv_head < *end) break;
    }
    return true;
}

/* Of the parts of heads before `head`, each in whole pages of memory. */
static size_t parts_bytes(const obm_model *m, int64_t head, size_t kv_size) {
    const obm__config *c = &m->config;
    size_t bytes = 0, each = (size_t)(c->layers * 2 * OBM_TILE_TOKENS * c->head_dim) * kv_size;
    for (int64_t h = 0, first, end; h < head; h = end) {
        heads_at(m, h, &first, &end);
        bytes += ((size_t)(end - first) * each + PART_UNIT - 1) / PART_UNIT * PART_UNIT;
    }
    return bytes;
}

static bool page_bytes(const obm_model *m, obm_dtype kv, size_t *out) {
    const obm__config *c = &m->config;
    if (m->placement) {
        *out = parts_bytes(m, c->kv_heads, obm_dtype_size(kv));
        return true;
    }
    return obm__mul((size_t)c->layers * 2, (size_t)(c->kv_heads * c->head_dim), out) &&
           obm__mul(*out, OBM_TILE_TOKENS, out) && obm__mul(*out, obm_dtype_size(kv), out);
}

static obm_status check_kv(obm_dtype kv, obm_error *err) {
    if (kv == OBM_F32 || kv == OBM_F16) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "the KV cache can be F32 or F16, not %s", obm_dtype_name(kv));
}

/* Takes the reference to w, also on failure. */
static obm_status wrap(obm_model *m, obm__weights *w, obm_dtype kv, obm__sequence **out, obm_error *err) {
    obm__sequence *s = obm__calloc(1, sizeof *s);
    if (!s) {
        obm__weights_release(m, w);
        return obm__fail_nomem(err, sizeof *s);
    }
    *s = (obm__sequence){.weights = w, .kv = kv};
    *out = s;
    return OBM_OK;
}

obm_status obm__sequence_new(obm_model *m, const double *route, obm_dtype kv, obm__sequence **out, obm_error *err) {
    obm__weights *w;
    OBM_TRY(check_kv(kv, err));
    OBM_TRY(obm__weights_acquire(m, route, &w, err));
    return wrap(m, w, kv, out, err);
}

obm_status obm__sequence_admit(obm_model *m, const double *route, obm_dtype kv, obm__sequence **out, obm_error *err) {
    obm__weights *w;
    OBM_TRY(check_kv(kv, err));
    OBM_TRY(obm__weights_admit(m, route, &w, err));
    if (w) return wrap(m, w, kv, out, err);
    *out = NULL;
    return OBM_OK;
}

obm_status obm__sequence_expect(const obm_model *m, obm__sequence *s, int64_t positions, obm_error *err) {
    const obm__config *c = &m->config;
    bool needed = false;
    for (int r = 0; r < c->n_ropes; r++) needed |= obm__rope_needs_length(&c->ropes[r]);
    if (!needed) return OBM_OK;
    if (positions > c->max_positions) positions = c->max_positions;
    if (!s->frequencies) s->frequencies = obm__calloc((size_t)(c->n_ropes * m->pairs), sizeof *s->frequencies);
    if (!s->frequencies) return obm__fail_nomem(err, (uint64_t)(c->n_ropes * m->pairs) * sizeof *s->frequencies);
    for (int r = 0; r < c->n_ropes; r++) obm__rope_frequencies(&c->ropes[r], positions, s->frequencies + r * m->pairs);
    return OBM_OK;
}

static void drop_page(obm_model *m, obm__page *p, size_t bytes) {
    if (--p->users) return;
    if (is_mapped(m, bytes))
        obm__place_unmap(p->data, bytes);
    else
        obm_free(p->data);
    m->kv_bytes -= bytes;
    obm_free(p);
}

void obm__sequence_cut(obm_model *m, obm__sequence *s, size_t pages) {
    size_t bytes = obm__kv_page_bytes(m, s->kv);
    while (s->n_pages > pages) drop_page(m, s->pages[--s->n_pages], bytes);
    if (s->length > (int64_t)(s->n_pages * OBM_TILE_TOKENS)) s->length = (int64_t)(s->n_pages * OBM_TILE_TOKENS);
    obm__weights_release(m, s->weights);
    s->weights = NULL;
}

void obm__sequence_free(obm_model *m, obm__sequence *s) {
    if (!s) return;
    obm__sequence_cut(m, s, 0);
    obm_free(s->pages);
    obm_free(s->frequencies);
    obm_free(s);
}

size_t obm__kv_page_bytes(const obm_model *m, obm_dtype kv) {
    size_t bytes = 0;
    (void)page_bytes(m, kv, &bytes);
    return bytes;
}

void obm__kv_bounds(const obm_model *m, obm_dtype kv, size_t *at) {
    const obm__placement *p = m->placement;
    for (int i = 0; i <= p->nodes; i++)
        at[i] = obm__placement_local(p) ? parts_bytes(m, p->heads[i], obm_dtype_size(kv)) : 0;
}

static void *map_page(obm_model *m, obm_dtype kv, size_t bytes) {
    size_t at[OBM_NODES + 1];
    if (!m->placement) return is_mapped(m, bytes) ? obm__map_huge(bytes) : obm__alloc(bytes, 1);
    obm__kv_bounds(m, kv, at);
    return obm__place_map(m, bytes, at);
}

static obm__page *new_page(obm_model *m, obm_dtype kv, size_t bytes) {
    obm__page *p = obm__alloc(1, sizeof *p);
    if (!p) return NULL;
    *p = (obm__page){.data = map_page(m, kv, bytes), .users = 1};
    if (p->data) return p;
    obm_free(p);
    return NULL;
}

static obm_status make_room(obm__sequence *s, size_t pages, obm_error *err) {
    if (pages <= s->capacity) return OBM_OK;
    obm__page **all = obm__realloc(s->pages, pages * 2, sizeof *all);
    if (!all) return obm__fail_nomem(err, pages * 2 * sizeof *all);
    s->pages = all;
    s->capacity = pages * 2;
    return OBM_OK;
}

obm_status obm__sequence_reserve(obm_model *m, obm__sequence *s, int64_t positions, obm_error *err) {
    size_t need = (size_t)((positions + OBM_TILE_TOKENS - 1) / OBM_TILE_TOKENS), bytes;
    if (!page_bytes(m, s->kv, &bytes)) return obm__fail_nomem(err, UINT64_MAX);
    OBM_TRY(make_room(s, need, err));
    while (s->n_pages < need) {
        obm__page *page = new_page(m, s->kv, bytes);
        if (!page) return obm__fail_nomem(err, bytes);
        s->pages[s->n_pages++] = page;
        m->kv_bytes += bytes;
    }
    return OBM_OK;
}

/* ---- prompts that begin alike ---- */

bool obm__sequence_alike(const obm_model *m, const obm__sequence *a, const obm__sequence *b) {
    size_t bytes = (size_t)(m->config.n_ropes * m->pairs) * sizeof *a->frequencies;
    if (a->kv != b->kv || !a->frequencies != !b->frequencies) return false;
    return !a->frequencies || !memcmp(a->frequencies, b->frequencies, bytes);
}

obm_status obm__sequence_share(obm__sequence *s, const obm__sequence *from, size_t pages, obm_error *err) {
    OBM_TRY(make_room(s, pages, err));
    for (; s->n_pages < pages; s->n_pages++) {
        s->pages[s->n_pages] = from->pages[s->n_pages];
        s->pages[s->n_pages]->users++;
    }
    s->length = (int64_t)(pages * OBM_TILE_TOKENS);
    return OBM_OK;
}

void obm__sequence_continue(obm__sequence *s, obm__sequence *from, int64_t length) {
    obm__sequence all = *from;
    from->pages = s->pages;
    from->n_pages = s->n_pages;
    from->capacity = s->capacity;
    from->length = 0;
    s->pages = all.pages;
    s->n_pages = all.n_pages;
    s->capacity = all.capacity;
    s->length = length;
}

/* ---- where values lie ---- */

void *obm__kv_at(const obm_model *m, const obm__sequence *s, int64_t page, int64_t layer, int which, int64_t kv_head) {
    const obm__config *c = &m->config;
    int64_t first, end;
    size_t before = heads_at(m, kv_head, &first, &end) ? parts_bytes(m, first, obm_dtype_size(s->kv)) : 0;
    size_t block = (size_t)((layer * 2 + which) * (end - first) + kv_head - first); // (layers, 2, heads, 64, head_dim)
    return (char *)s->pages[page]->data + before + block * OBM_TILE_TOKENS * (size_t)c->head_dim * obm_dtype_size(s->kv);
}
