/* Running on sign planes: how they lie in memory, and y += (sum over masks of c_M times the XOR of planes) x.  Which
 * masks a route has is decided in core/route, the arithmetic on bits is in kernels/. */
#include "model.h"

#include "../route/plan.h"

#include <string.h>

#define TILE_BYTES (OBM__PLANE_TILE / 8)

/* ---- loading ---- */

/* All planes of one matrix in pack order. */
typedef struct plane_list {
    size_t n;
    obm__plane_ref *at;
} plane_list;

static const uint8_t *plane_signs(const obm__plane_ref *p) { return p->from->signs[p->plane]; }

static const uint8_t *block_at(const obm__signs *s, size_t block, size_t plane) {
    return s->blocks + (block * s->n + plane) * (size_t)s->row_bytes * OBM__PLANE_ROWS;
}

typedef struct repack_job {
    const obm_kernels *k;
    const plane_list *planes;
    obm__signs *signs;
} repack_job;

static void repack_blocks(void *arg, size_t begin, size_t end, int worker) {
    const repack_job *j = arg;
    const obm__signs *s = j->signs;
    (void)worker;
    for (size_t block = begin; block < end; block++) {
        int64_t row = (int64_t)block * OBM__PLANE_ROWS;
        size_t rows = (size_t)(s->rows - row < OBM__PLANE_ROWS ? s->rows - row : OBM__PLANE_ROWS);
        size_t bytes = (size_t)s->row_bytes;
        for (size_t p = 0; p < s->n; p++)
            j->k->plane_repack((uint8_t *)block_at(s, block, p),
                               plane_signs(&j->planes->at[p]) + (size_t)(s->first + row) * bytes, bytes, rows, bytes);
    }
}

/* Columns from `col` on over which no plane's alpha changes. */
static int64_t shared_span(const plane_list *planes, int64_t col) {
    int64_t span = INT64_MAX;
    for (size_t p = 0; p < planes->n; p++) {
        int64_t own = obm__planes_span(planes->at[p].from, col);
        if (own < span) span = own;
    }
    return span;
}

/* Fills s->segments (NULL: counts): spans are cut where the scale of the activations changes. */
static void cut_segments(const plane_list *planes, obm__signs *s) {
    size_t n = 0;
    for (int64_t col = 0, width; col < s->cols; col += width) {
        width = shared_span(planes, col);
        size_t at = (size_t)col / 8, end = (size_t)(col + width + 63) / 64 * 8;
        for (size_t stop; at < end; at = stop, n++) {
            stop = (at / TILE_BYTES + 1) * TILE_BYTES;
            if (stop > end) stop = end;
            if (s->segments) s->segments[n] = (obm__segment){at, stop - at};
        }
    }
    s->n_segments = n;
}

/* The rows of a role in its tensor; a head is whole, and tied it may be any length. */
static void place_signs(const obm_model *m, obm__role role, const plane_list *planes, obm__signs *s) {
    const obm__planes *p = planes->at[0].from;
    int64_t whole, cols;
    *s = (obm__signs){.n = planes->n, .rows = p->rows, .cols = p->cols, .row_bytes = p->row_bytes};
    if (role == OBM_HEAD) return;
    obm__config_place(&m->config, role, &s->first, &whole);
    obm__config_shape(&m->config, role, &s->rows, &cols);
}

/* Bytes between two looks at the pulse, per thread: a ms or two, some tens from a file that is not in memory. */
#define REPACK_BYTES ((size_t)1 << 20)

static obm_status fill_signs(obm_model *m, obm__role role, const plane_list *planes, obm__signs *s, obm_error *err) {
    size_t bytes = 0;
    place_signs(m, role, planes, s);
    size_t blocks = ((size_t)s->rows + OBM__PLANE_ROWS - 1) / OBM__PLANE_ROWS;
    bool fits = obm__mul(blocks * OBM__PLANE_ROWS, (size_t)s->row_bytes, &bytes) && obm__mul(bytes, s->n, &bytes);
    cut_segments(planes, s);
    s->segments = obm__calloc(s->n_segments, sizeof *s->segments);
    int kind = obm__role_kind(role);
    s->blocks = fits
                    ? obm__place_alloc(m, OBM_PLACED_PLANES, kind, OBM__PLANE_ROWS, blocks, blocks ? bytes / blocks : 0)
                    : NULL;
    if (!s->segments || !s->blocks) return obm__fail_nomem(err, bytes);
    cut_segments(planes, s);
    size_t slice = (size_t)m->ctx->threads * REPACK_BYTES / (bytes / blocks) + 1;
    OBM_TRY(obm__place_slices(m, kind, OBM__PLANE_ROWS, blocks, slice, repack_blocks,
                              &(repack_job){m->ctx->k, planes, s}, err));
    OBM_TRY(obm__place_spread(m, s->blocks, err));
    m->signs_bytes += bytes;
    for (size_t p = 0; p < s->n; p++) /* runs do not look at the file's pages again */
        obm__pages_release(plane_signs(&planes->at[p]) + s->first * s->row_bytes, (size_t)(s->rows * s->row_bytes));
    return OBM_OK;
}

static obm_status load_tensor(obm_model *m, size_t tensor, obm__role role, obm__signs *s, obm_error *err) {
    size_t n = tensor == SIZE_MAX ? 0 : obm__planes_list(m->pack, tensor, NULL);
    if (!n) return OBM_OK;
    plane_list list = {n, obm__calloc(n, sizeof *list.at)};
    if (!list.at) return obm__fail_nomem(err, n * sizeof *list.at);
    obm__planes_list(m->pack, tensor, list.at);
    obm_status status = fill_signs(m, role, &list, s, err);
    obm_free(list.at);
    return status;
}

obm_status obm__signs_load(obm_model *m, obm_error *err) {
    size_t count = obm__matrix_count(m);
    m->signs = obm__calloc(count, sizeof *m->signs);
    if (!m->signs) return obm__fail_nomem(err, count * sizeof *m->signs);
    if (m->pulse) m->pulse->total = count;
    for (size_t i = 0; i < count; i++) {
        int64_t layer;
        obm__role role = obm__matrix_role(m, i, &layer);
        OBM_TRY(load_tensor(m, obm__model_tensor(m, layer, role), role, &m->signs[i], err));
        OBM_TRY(obm__pulse_done(m->pulse, i + 1, err));
    }
    obm__pack_release_pages(m->pack);
    return OBM_OK;
}

size_t obm__signs_bytes(const obm__signs *s) {
    size_t blocks = ((size_t)s->rows + OBM__PLANE_ROWS - 1) / OBM__PLANE_ROWS;
    return blocks * OBM__PLANE_ROWS * (size_t)s->row_bytes * s->n;
}

void obm__signs_free_all(obm_model *m) {
    for (size_t i = 0; m->signs && i < obm__matrix_count(m); i++) {
        obm__place_free(m, m->signs[i].blocks);
        obm_free(m->signs[i].segments);
    }
    obm_free(m->signs);
    m->signs = NULL;
}

const obm__signs *obm__signs_of(const obm_model *m, int64_t layer, obm__role role) {
    bool runs = m->signs && (role < OBM_MATRIX_ROLES || role == OBM_HEAD);
    if (!runs) return NULL;
    const obm__signs *s =
        &m->signs[role == OBM_HEAD ? obm__matrix_count(m) - 1 : (size_t)(layer * OBM_MATRIX_ROLES + role)];
    return s->blocks ? s : NULL;
}

/* ---- the coefficients of a route ---- */

void obm__coefficients_release(obm__hard_routes *h) {
    if (!h || --h->refs) return;
    obm__coefficient_cache_free(h->cache);
    obm_free(h);
}

static obm_status hard_routes_new(const obm_pack *p, obm__pulse *pulse, obm__hard_routes **out, obm_error *err) {
    obm__hard_routes *h = obm__calloc(1, sizeof *h);
    if (!h) return obm__fail_nomem(err, sizeof *h);
    *h = (obm__hard_routes){.settings = p->settings, .refs = 1};
    obm_status status = obm__coefficient_cache_new(p, pulse, &h->cache, err);
    if (status == OBM_OK)
        *out = h;
    else
        obm_free(h);
    return status;
}

obm_status obm__coefficients_acquire(obm_model *m, obm__hard_routes **out, obm_error *err) {
    if (!m->hard_routes || !obm__same_settings(&m->hard_routes->settings, &m->pack->settings)) {
        obm__hard_routes *h = NULL;
        OBM_TRY(hard_routes_new(m->pack, m->pulse, &h, err));
        obm__pack_release_pages(m->pack);
        obm__coefficients_release(m->hard_routes);
        m->hard_routes = h;
    }
    m->hard_routes->refs++;
    *out = m->hard_routes;
    return OBM_OK;
}

/* c_M of a segment for rows [row, ...): one per row, or a single one (c_rows is 1). */
static const float *coefficients_at(const obm__terms *t, int mask, const obm__segment *g, int64_t row) {
    const obm__coefficient_shape *s = t->shape;
    int64_t group = s->groups == 1 ? 0 : (int64_t)g->first * 8 / s->group;
    return t->masks->c[mask] + (s->c_rows == 1 ? group : group * s->c_rows + t->signs->first + row);
}

/* ---- one vector ---- */

/* y[r] += c_r * (scale * sum_r), rounded in this order on every ISA. */
static void add_sums(const obm__terms *t, const float *c, float scale, const int32_t *sums, int64_t rows, float *y) {
    if (t->shape->c_rows == 1)
        for (int64_t r = 0; r < rows; r++) y[r] += c[0] * (scale * (float)sums[r]);
    else
        for (int64_t r = 0; r < rows; r++) y[r] += c[r] * (scale * (float)sums[r]);
}

/* The planes of a mask inside one block, from byte column `first` on. */
static int find_streams(const obm__terms *t, uint8_t mask, size_t block, size_t first, const uint8_t **streams) {
    int n = 0;
    for (int i = 0; i < t->masks->n_planes; i++)
        if (mask >> i & 1) streams[n++] = block_at(t->signs, block, t->masks->plane[i]) + first * OBM__PLANE_ROWS;
    return n;
}

void obm__terms_multiply(const obm_kernels *k, const obm__terms *t, const obm__tables *x, int64_t row, int64_t rows,
                         const void *ahead, size_t ahead_bytes, float *y) {
    const uint8_t *streams[OBM_ROUTE_MASKS];
    int32_t sums[OBM__PLANE_ROWS];
    size_t asked = 0;
    for (int mask = 0; mask < t->masks->n; mask++) {
        for (size_t i = 0; i < t->signs->n_segments; i++) {
            const obm__segment *g = &t->signs->segments[i];
            int n = find_streams(t, t->masks->mask[mask], (size_t)row / OBM__PLANE_ROWS, g->first, streams);
            size_t wanted = g->count * 64; /* a cache line of the next rows for each byte column */
            bool more = asked + wanted <= ahead_bytes;
            k->plane_sums(sums, streams, n, g->count, x->bytes + g->first * OBM__PLANE_TABLE, x->sums + g->first / 8,
                          more ? (const char *)ahead + asked : NULL);
            asked += wanted;
            add_sums(t, coefficients_at(t, mask, g, row), x->scales[g->first / TILE_BYTES], sums, rows, y);
        }
    }
}

/* ---- panels ---- */

/* strip: (n_planes, 64, count) packed rows of one block and segment. */
static void add_strip(const obm_kernels *k, const obm__terms *t, const obm__segment *g, int64_t row, int64_t rows,
                      const uint8_t *strip, float *panel) {
    int64_t cols = t->signs->cols, first = (int64_t)g->first * 8, left = cols - first, width = (int64_t)g->count * 8;
    const uint8_t *bits[OBM_ROUTE_MASKS];
    for (int64_t r = 0; r < rows; r++) {
        for (int mask = 0; mask < t->masks->n; mask++) {
            const float *c = coefficients_at(t, mask, g, row);
            int n = 0;
            for (int i = 0; i < t->masks->n_planes; i++)
                if (t->masks->mask[mask] >> i & 1)
                    bits[n++] = strip + ((size_t)i * OBM__PLANE_ROWS + (size_t)r) * g->count;
            k->plane_add(panel + r * cols + first, bits, n, c[t->shape->c_rows == 1 ? 0 : r],
                         (size_t)(left < width ? left : width));
        }
    }
}

void obm__terms_add(const obm_kernels *k, const obm__terms *t, int64_t row, int64_t rows, float *panel,
                    uint8_t *strip) {
    for (int64_t done = 0, n; done < rows; done += n) {
        size_t block = (size_t)(row + done) / OBM__PLANE_ROWS;
        n = rows - done < OBM__PLANE_ROWS ? rows - done : OBM__PLANE_ROWS;
        for (size_t s = 0; s < t->signs->n_segments; s++) {
            const obm__segment *g = &t->signs->segments[s];
            for (int i = 0; i < t->masks->n_planes; i++)
                k->plane_unpack(strip + (size_t)i * OBM__PLANE_ROWS * g->count, g->count,
                                block_at(t->signs, block, t->masks->plane[i]) + g->first * OBM__PLANE_ROWS, g->count);
            add_strip(k, t, g, row + done, n, strip, panel + done * t->signs->cols);
        }
    }
}
