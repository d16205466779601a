/* The transformer pass, top to bottom.  Matrices come from linear.c, the cache from attention.c. */
#include "model.h"

#include <math.h>
#include <string.h>

#define PANEL_ROWS 128

/* ---- buffers ---- */

void obm__scratch_free(obm__scratch *s) {
    void *all[] = {s->weights, s->x,    s->normed, s->q,        s->mixed,  s->k,       s->v,      s->gate,       s->up,
                   s->cosine,  s->sine, s->panels, s->products, s->scores, s->widened, s->strips, s->tables, s->table_bytes};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) obm_free(all[i]);
    *s = (obm__scratch){0};
}

/* Zeroed: empty rows of a tile are read by GEMM (and their results thrown away). */
static obm_status resize(obm__scratch *s, float **p, size_t a, size_t b, obm_error *err) {
    size_t count;
    obm_free(*p);
    *p = obm__mul(a, b, &count) ? obm__alloc(count, sizeof **p) : NULL;
    if (!*p) return obm__fail_nomem(err, (uint64_t)a * b * sizeof **p);
    memset(*p, 0, count * sizeof **p);
    s->bytes += count * sizeof **p;
    return OBM_OK;
}

/* Columns of the widest matrix. */
static size_t widest_input(const obm__config *c) {
    int64_t q = c->heads * c->head_dim, widest = c->hidden > q ? c->hidden : q;
    return (size_t)(c->intermediate > widest ? c->intermediate : widest);
}

static obm_status grow_strips(obm_model *m, obm_error *err) {
    size_t bytes = (size_t)m->ctx->threads * OBM_STRIP_BYTES;
    if (!m->signs) return OBM_OK;
    m->scratch.strips = obm__alloc(bytes, 1);
    if (!m->scratch.strips) return obm__fail_nomem(err, bytes);
    m->scratch.bytes += bytes;
    return OBM_OK;
}

static obm_status grow_rows(obm_model *m, size_t rows, obm_error *err) {
    const obm__config *c = &m->config;
    obm__scratch *s = &m->scratch;
    size_t hidden = (size_t)c->hidden, q = (size_t)(c->heads * c->head_dim), kv = (size_t)(c->kv_heads * c->head_dim);
    size_t wide = (size_t)c->intermediate, widest = widest_input(c), threads = (size_t)m->ctx->threads;
    size_t positions = s->positions;
    obm__scratch_free(s);
    s->weights = obm__calloc(rows, sizeof *s->weights);
    if (!s->weights) return obm__fail_nomem(err, rows * sizeof *s->weights);
    OBM_TRY(resize(s, &s->x, rows, hidden, err));
    OBM_TRY(resize(s, &s->normed, rows, hidden, err));
    OBM_TRY(resize(s, &s->q, rows, q, err));
    OBM_TRY(resize(s, &s->mixed, rows, q, err));
    OBM_TRY(resize(s, &s->k, rows, kv, err));
    OBM_TRY(resize(s, &s->v, rows, kv, err));
    OBM_TRY(resize(s, &s->gate, rows, wide, err));
    OBM_TRY(resize(s, &s->up, rows, wide, err));
    OBM_TRY(resize(s, &s->cosine, rows, (size_t)c->head_dim / 2, err));
    OBM_TRY(resize(s, &s->sine, rows, (size_t)c->head_dim / 2, err));
    s->panel_size = PANEL_ROWS * widest;
    OBM_TRY(resize(s, &s->panels, threads, s->panel_size, err));
    OBM_TRY(resize(s, &s->products, threads, OBM_TILE_TOKENS * PANEL_ROWS, err));
    OBM_TRY(grow_strips(m, err));
    OBM_TRY(resize(s, &s->widened, threads, OBM_TILE_TOKENS * (size_t)c->head_dim, err));
    OBM_TRY(resize(s, &s->scores, threads, positions, err));
    s->positions = positions;
    s->rows = rows;
    return OBM_OK;
}

/* One vector's: tables, the scales of its tiles, the sums of its groups; each part in whole cache lines. */
static size_t table_parts(const obm__config *c, size_t *scales, size_t *sums) {
    size_t groups = (widest_input(c) + OBM__PLANE_GROUP - 1) / OBM__PLANE_GROUP;
    size_t tiles = (widest_input(c) + OBM__PLANE_TILE - 1) / OBM__PLANE_TILE;
    *scales = groups * OBM__PLANE_GROUP / 8 * OBM__PLANE_TABLE;
    *sums = *scales + (tiles * sizeof(float) + 63) / 64 * 64;
    return *sums + (groups * sizeof(int32_t) + 63) / 64 * 64;
}

obm_status obm__scratch_tables(obm_model *m, size_t n, obm_error *err) {
    obm__scratch *s = &m->scratch;
    size_t scales, sums, each = table_parts(&m->config, &scales, &sums);
    if (n <= s->table_rows) return OBM_OK;
    s->bytes -= s->table_rows * (each + sizeof *s->tables);
    s->table_rows = 0;
    obm_free(s->tables);
    obm_free(s->table_bytes);
    s->tables = obm__calloc(n, sizeof *s->tables);
    s->table_bytes = obm__alloc(n, each);
    if (!s->tables || !s->table_bytes) return obm__fail_nomem(err, (uint64_t)n * each);
    for (size_t i = 0; i < n; i++) {
        uint8_t *at = (uint8_t *)s->table_bytes + i * each;
        s->tables[i] = (obm__tables){at, (float *)(at + scales), (int32_t *)(at + sums)};
    }
    s->table_rows = n;
    s->bytes += n * (each + sizeof *s->tables);
    return OBM_OK;
}

static obm_status reserve(obm_model *m, const obm__row *rows, size_t n, obm_error *err) {
    obm__scratch *s = &m->scratch;
    int64_t positions = 0;
    for (size_t i = 0; i < n; i++)
        if (rows[i].sequence && rows[i].position >= positions) positions = rows[i].position + 1;
    if (n > s->rows) OBM_TRY(grow_rows(m, n, err));
    if ((size_t)positions <= s->positions) return OBM_OK;
    size_t want = ((size_t)positions + 1023) / 1024 * 1024;
    s->bytes -= s->positions * (size_t)m->ctx->threads * sizeof *s->scores;
    s->positions = 0;
    OBM_TRY(resize(s, &s->scores, (size_t)m->ctx->threads, want, err));
    s->positions = want;
    return OBM_OK;
}

/* ---- pieces ---- */

typedef struct norm_job {
    const obm_model *m;
    int64_t layer;
    obm__role role;
    const size_t *which;   /* NULL: all */
    bool add;              /* x += normed first: the residual of the block before */
} norm_job;

/* Row-wise work: as many rows as outweigh a hand-over between threads (about 2 us), none split. */
static size_t row_grain(int64_t width) { return width < 4096 ? (size_t)(4096 / width) : 1; }

/* Zhang and Sennrich 2019: x / sqrt(mean(x^2) + eps) * weight.  The sum of squares in f64, blocks of the kernel's
 * limit. */
static void rms_norm(const obm_kernels *k, const float *x, const float *weight, int64_t n, float eps, float *out) {
    double sum = 0;
    for (int64_t i = 0; i < n; i += 4096) {
        size_t count = (size_t)(n - i < 4096 ? n - i : 4096);
        sum += k->dot(x + i, x + i, count);
    }
    float scale = 1.0f / sqrtf((float)(sum / (double)n) + eps);
    for (int64_t i = 0; i < n; i++) out[i] = weight[i] * (x[i] * scale);
}

/* normed[i] = norm(x[which[i]]), or x += normed and normed = norm(x) in one go over all rows. */
static void norm_rows(void *arg, size_t begin, size_t end, int worker) {
    const norm_job *j = arg;
    const obm__scratch *s = &j->m->scratch;
    int64_t hidden = j->m->config.hidden;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        size_t row = j->which ? j->which[i] : i;
        if (!s->weights[row]) continue;
        const float *weight = obm__weights_at(s->weights[row], j->layer, j->role)->data;
        float *x = s->x + (int64_t)row * hidden, *normed = s->normed + (int64_t)i * hidden;
        if (j->add) j->m->ctx->k->axpy_f32(x, 1, normed, (size_t)hidden);
        rms_norm(j->m->ctx->k, x, weight, hidden, j->m->config.norm_eps, normed);
    }
}

static void norm(obm_model *m, size_t n, int64_t layer, obm__role role, const size_t *which, bool add) {
    norm_job j = {m, layer, role, which, add};
    obm__parallel(m->ctx, n, row_grain(m->config.hidden), norm_rows, &j);
}

/* x += y, (rows, hidden) */
static void add_rows(void *arg, size_t begin, size_t end, int worker) {
    const obm_model *m = arg;
    int64_t hidden = m->config.hidden;
    (void)worker;
    m->ctx->k->axpy_f32(m->scratch.x + (int64_t)begin * hidden, 1, m->scratch.normed + (int64_t)begin * hidden,
                        (end - begin) * (size_t)hidden);
}

/* gate = silu(gate) * up, (rows, intermediate) */
static void swiglu_rows(void *arg, size_t begin, size_t end, int worker) {
    const obm_model *m = arg;
    const obm__scratch *s = &m->scratch;
    int64_t width = m->config.intermediate;
    (void)worker;
    for (size_t row = begin; row < end; row++) {
        if (!s->weights[row]) continue;
        float *gate = s->gate + (int64_t)row * width;
        const float *up = s->up + (int64_t)row * width;
        for (int64_t i = 0; i < width; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

static obm_status start_rows(obm_model *m, const obm__row *rows, size_t n, obm_error *err) {
    obm__scratch *s = &m->scratch;
    int64_t half = m->config.head_dim / 2, hidden = m->config.hidden;
    for (size_t i = 0; i < n; i++) {
        s->weights[i] = rows[i].sequence ? rows[i].sequence->weights : NULL;
        if (!rows[i].sequence) {
            memset(s->x + (int64_t)i * hidden, 0, (size_t)hidden * sizeof *s->x);
            memset(s->normed + (int64_t)i * hidden, 0, (size_t)hidden * sizeof *s->x);
            continue;
        }
        OBM_TRY(obm__weights_embed(m, s->weights[i], rows[i].id, s->x + (int64_t)i * hidden, err));
        obm__rope_table(m->frequencies, half, rows[i].position, s->cosine + (int64_t)i * half,
                        s->sine + (int64_t)i * half);
    }
    return OBM_OK;
}

/* ---- the pass ---- */

obm_status obm__forward(obm_model *m, const obm__row *rows, size_t n, bool tiled, int64_t layers, obm_error *err) {
    const obm__config *c = &m->config;
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, wide = c->intermediate;
    OBM_TRY(reserve(m, rows, n, err));
    obm__scratch *s = &m->scratch;
    const obm__weights *const *w = s->weights;

    OBM_TRY(start_rows(m, rows, n, err));                                          // x (n, hidden)
    for (int64_t layer = 0; layer < layers; layer++) {
        norm(m, n, layer, OBM_ATTENTION_NORM, NULL, layer > 0);                    // x += down; normed (n, hidden)
        const obm__linear qkv[] = {{OBM_Q, s->q, q}, {OBM_K, s->k, kv}, {OBM_V, s->v, kv}};
        OBM_TRY(obm__linear_run(m, w, n, tiled, layer, qkv, 3, s->normed, err));
        OBM_TRY(obm__attention_run(m, rows, n, layer, err));                       // mixed (n, heads * head_dim)
        const obm__linear o[] = {{OBM_O, s->normed, c->hidden}};
        OBM_TRY(obm__linear_run(m, w, n, tiled, layer, o, 1, s->mixed, err));
        norm(m, n, layer, OBM_MLP_NORM, NULL, true);                               // x += o; normed
        const obm__linear gate_up[] = {{OBM_GATE, s->gate, wide}, {OBM_UP, s->up, wide}};
        OBM_TRY(obm__linear_run(m, w, n, tiled, layer, gate_up, 2, s->normed, err));
        obm__parallel(m->ctx, n, row_grain(8 * wide), swiglu_rows, m);           // gate (n, intermediate)
        const obm__linear down[] = {{OBM_DOWN, s->normed, c->hidden}};
        OBM_TRY(obm__linear_run(m, w, n, tiled, layer, down, 1, s->gate, err));
    }
    if (layers > 0) obm__parallel(m->ctx, n, row_grain(c->hidden), add_rows, m);   // x += down
    return OBM_OK;
}

obm_status obm__forward_logits(obm_model *m, const obm__row *rows, const size_t *which, size_t n, float *out,
                               obm_error *err) {
    const obm__weights **weights = obm__calloc(n, sizeof *weights);
    if (!weights) return obm__fail_nomem(err, n * sizeof *weights);
    for (size_t i = 0; i < n; i++) weights[i] = rows[which[i]].sequence->weights;
    norm(m, n, 0, OBM_FINAL_NORM, which, false);                                   // normed (n, hidden)
    const obm__linear head[] = {{OBM_HEAD, out, m->vocab}};
    obm_status status = obm__linear_run(m, weights, n, false, 0, head, 1, m->scratch.normed, err);
    obm_free(weights);
    return status;
}

/* ---- prompts ---- */

size_t obm__fill_tiles(obm__sequence *s, const int32_t *ids, size_t n, obm__row *rows, size_t room, size_t *n_rows) {
    size_t first = (size_t)(s->length % OBM_TILE_TOKENS), take = room - first < n ? room - first : n;
    *n_rows = (first + take + OBM_TILE_TOKENS - 1) / OBM_TILE_TOKENS * OBM_TILE_TOKENS;
    memset(rows, 0, *n_rows * sizeof *rows);
    for (size_t i = 0; i < take; i++) rows[first + i] = (obm__row){s, s->length + (int64_t)i, ids[i]};
    return take;
}

obm_status obm__prefill(obm_model *m, obm__sequence *s, const int32_t *ids, size_t n, bool decode, int64_t layers,
                        obm__visit_fn visit, void *arg, obm_error *err) {
    obm__row rows[OBM_CHUNK_ROWS];
    if (layers > 0) OBM_TRY(obm__sequence_reserve(m, s, s->length + (int64_t)n, err));
    for (size_t done = 0; done < n;) {
        size_t take = 1, n_rows = 1;
        if (decode) rows[0] = (obm__row){s, s->length, ids[done]};
        else take = obm__fill_tiles(s, ids + done, n - done, rows, OBM_CHUNK_ROWS, &n_rows);
        OBM_TRY(obm__forward(m, rows, n_rows, !decode, layers, err));
        if (visit) OBM_TRY(visit(arg, m, rows, n_rows, err));
        s->length += (int64_t)take;
        done += take;
    }
    return OBM_OK;
}
