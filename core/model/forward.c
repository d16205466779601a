/* The transformer pass, top to bottom.  Matrices come from linear.c, the cache from attention.c. */
#include "model.h"

#include <math.h>
#include <string.h>

/* ---- buffers ---- */

void obm__scratch_free(obm__scratch *s) {
    void *all[] = {s->weights, s->x,        s->normed,  s->q,      s->mixed,       s->k,      s->v,      s->gate,
                   s->up,      s->cosine,   s->sine,    s->panels, s->packed,      s->products, s->scores, s->widened,
                   s->strips,  s->unpacked, s->rounded, s->tables, s->table_bytes, s->tiles,  s->parts,  s->sums};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) obm_free(all[i]);
    *s = (obm__scratch){0};
}

/* a * b values of `each` bytes, NULL with *err set. */
static void *take(obm__scratch *s, size_t a, size_t b, size_t each, obm_error *err) {
    size_t count;
    void *p = obm__mul(a, b, &count) ? obm__alloc(count, each) : NULL;
    if (p)
        s->bytes += count * each;
    else
        obm__fail_nomem(err, (uint64_t)a * b * each);
    return p;
}

/* Zeroed: the pages are then there, on the caller's node, before workers share them. */
static obm_status resize(obm__scratch *s, float **p, size_t a, size_t b, obm_error *err) {
    obm_free(*p);
    *p = take(s, a, b, sizeof **p, err);
    if (!*p) return OBM_E_NOMEM;
    memset(*p, 0, a * b * sizeof **p);
    return OBM_OK;
}

/* Columns of the widest matrix. */
static size_t widest_input(const obm__config *c) {
    int64_t q = c->heads * c->head_dim, widest = c->hidden > q ? c->hidden : q;
    return (size_t)(c->intermediate > widest ? c->intermediate : widest);
}

static obm_status grow_strips(obm_model *m, obm_error *err) {
    obm__scratch *s = &m->scratch;
    if (m->signs) s->strips = take(s, (size_t)m->ctx->threads, OBM_STRIP_BYTES, sizeof *s->strips, err);
    return m->signs && !s->strips ? OBM_E_NOMEM : OBM_OK;
}

static obm_status grow_unpacked(obm_model *m, size_t widest, obm_error *err) {
    obm__scratch *s = &m->scratch;
    if (!m->z12 || m->z12_beside) return OBM_OK;
    s->unpacked = take(s, (size_t)m->ctx->threads, OBM__Z12_UNPACKED * widest, sizeof *s->unpacked, err);
    return s->unpacked ? OBM_OK : OBM_E_NOMEM;
}

static obm_status grow_rounded(obm_model *m, size_t rows, size_t widest, obm_error *err) {
    obm__scratch *s = &m->scratch;
    if (m->prefill != OBM_BF16) return OBM_OK;
    s->rounded = take(s, rows, widest, sizeof *s->rounded, err);
    return s->rounded ? OBM_OK : OBM_E_NOMEM;
}

/* A worker scores all heads that read the same keys together. */
static size_t score_rows(const obm_model *m) {
    return (size_t)m->ctx->threads * (size_t)(m->config.heads / m->config.kv_heads);
}

static obm_status grow_rows(obm_model *m, size_t rows, obm_error *err) {
    const obm__config *c = &m->config;
    obm__scratch *s = &m->scratch;
    size_t hidden = (size_t)c->hidden, q = (size_t)(c->heads * c->head_dim), kv = (size_t)(c->kv_heads * c->head_dim);
    size_t wide = (size_t)c->intermediate, widest = widest_input(c), threads = (size_t)m->ctx->threads;
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
    OBM_TRY(resize(s, &s->cosine, rows * (size_t)c->n_ropes, (size_t)m->pairs, err));
    OBM_TRY(resize(s, &s->sine, rows * (size_t)c->n_ropes, (size_t)m->pairs, err));
    s->panel_size = OBM_BLOCK_ROWS * widest;
    s->widest = widest;
    OBM_TRY(resize(s, &s->panels, threads, s->panel_size, err));
    OBM_TRY(resize(s, &s->packed, threads, s->panel_size, err));
    OBM_TRY(resize(s, &s->products, threads, OBM_TILE_TOKENS * OBM_BLOCK_ROWS, err));
    OBM_TRY(grow_strips(m, err));
    OBM_TRY(grow_unpacked(m, widest, err));
    OBM_TRY(grow_rounded(m, rows, widest, err));
    OBM_TRY(resize(s, &s->widened, threads, OBM_TILE_TOKENS * (size_t)c->head_dim, err));
    OBM_TRY(resize(s, &s->tiles, threads, obm__tile_floats(m), err));
    OBM_TRY(resize(s, &s->scores, score_rows(m), OBM_PART_POSITIONS, err));
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

/* Of rows that decode, which are cut into parts; half as many more than are needed, since contexts grow. */
static obm_status grow_parts(obm_model *m, size_t need, obm_error *err) {
    obm__scratch *s = &m->scratch;
    size_t heads = (size_t)m->config.heads, n = need + need / 2, old = s->part_rows * heads;
    s->bytes -= old * (sizeof *s->parts + (size_t)m->config.head_dim * sizeof *s->sums);
    s->part_rows = 0;
    obm_free(s->parts);
    s->parts = obm__calloc(n * heads, sizeof *s->parts);
    if (!s->parts) return obm__fail_nomem(err, (uint64_t)(n * heads) * sizeof *s->parts);
    OBM_TRY(resize(s, &s->sums, n * heads, (size_t)m->config.head_dim, err));
    s->bytes += n * heads * sizeof *s->parts;
    s->part_rows = n;
    return OBM_OK;
}

static obm_status reserve(obm_model *m, const obm__row *rows, size_t n, bool tiled, obm_error *err) {
    int64_t positions = 0;
    for (size_t i = 0; i < n; i++)
        if (rows[i].sequence && rows[i].position >= positions) positions = rows[i].position + 1;
    if (n > m->scratch.rows) OBM_TRY(grow_rows(m, n, err));
    size_t need = n * ((size_t)positions / OBM_PART_POSITIONS + 1);
    return tiled || need <= m->scratch.part_rows ? OBM_OK : grow_parts(m, need, err);
}

/* ---- pieces ---- */

/* Between two blocks. */
typedef struct join_job {
    const obm_model *m;
    int64_t layer;   /* of both norms: the block's own, and the next one's */
    obm__role after; /* norm of the output of the block that was run; OBM_ROLES: none was */
    int64_t next;
    obm__role before;    /* norm of the next block's input; OBM_ROLES: nothing comes */
    const size_t *which; /* NULL: all */
} join_job;

/* Row-wise work: as many rows as outweigh a hand-over between threads (about 2 us), none split. */
static size_t row_grain(int64_t width) { return width < 4096 ? (size_t)(4096 / width) : 1; }

/* The sum of squares in f64, blocks of the kernel's limit. */
void obm__rms_norm(const obm_model *m, const float *x, const float *weight, int64_t n, float *out) {
    double sum = 0;
    for (int64_t i = 0; i < n; i += 4096) {
        size_t count = (size_t)(n - i < 4096 ? n - i : 4096);
        sum += m->ctx->k->dot(x + i, x + i, count);
    }
    float scale = 1.0f / sqrtf((float)(sum / (double)n) + m->config.norm_eps);
    m->ctx->k->norm_mul(out, x, weight, scale, m->config.arch->norm_offset, (size_t)n);
}

/* out = norm(x), or x where the architecture has no such norm. */
static void norm_row(const obm_model *m, const obm__weights *w, int64_t layer, obm__role role, const float *x,
                     float *out) {
    const float *weight = obm__weights_at(w, layer, role)->data;
    if (weight)
        obm__rms_norm(m, x, weight, m->config.hidden, out);
    else if (out != x)
        memcpy(out, x, (size_t)m->config.hidden * sizeof *out);
}

/* x += norm(normed), the output of the block before; normed[i] = norm(x[which[i]]), the input of the next. */
static void join_rows(void *arg, size_t begin, size_t end, int worker) {
    const join_job *j = arg;
    const obm__scratch *s = &j->m->scratch;
    int64_t hidden = j->m->config.hidden;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        size_t row = j->which ? j->which[i] : i;
        const obm__weights *w = s->weights[row];
        float *x = s->x + (int64_t)row * hidden, *normed = s->normed + (int64_t)i * hidden;
        if (!w) continue;
        if (j->after != OBM_ROLES) {
            norm_row(j->m, w, j->layer, j->after, normed, normed);
            j->m->ctx->k->axpy_f32(x, j->m->config.residual_multiplier, normed, (size_t)hidden);
        }
        if (j->before != OBM_ROLES) norm_row(j->m, w, j->next, j->before, x, normed);
    }
}

static void join(obm_model *m, size_t n, join_job j) {
    j.m = m;
    obm__place_rows(m, n, row_grain(m->config.hidden), join_rows, &j);
}

/* gate = silu(gate) * up, (rows, intermediate), or with the tanh form of GELU (Hendrycks and Gimpel 2016). */
static void activate_rows(void *arg, size_t begin, size_t end, int worker) {
    const obm_model *m = arg;
    const obm__scratch *s = &m->scratch;
    int64_t width = m->config.intermediate;
    (void)worker;
    for (size_t row = begin; row < end; row++) {
        if (!s->weights[row]) continue;
        float *gate = s->gate + (int64_t)row * width;
        const float *up = s->up + (int64_t)row * width;
        if (m->config.activation == OBM_GELU_TANH)
            m->ctx->k->gelu_mul(gate, up, (size_t)width);
        else
            m->ctx->k->silu_mul(gate, up, (size_t)width);
    }
}

static void gate_rows(obm_model *m, size_t n) {
    obm__place_rows(m, n, row_grain(8 * m->config.intermediate), activate_rows, m);
}

static void start_rotation(obm_model *m, const obm__row *row, size_t i) {
    obm__scratch *s = &m->scratch;
    const float *frequencies = row->sequence->frequencies ? row->sequence->frequencies : m->frequencies;
    for (int r = 0; r < m->config.n_ropes; r++) {
        size_t at = ((size_t)r * s->rows + i) * (size_t)m->pairs; // (ropes, rows, pairs)
        obm__rope_table(&m->config.ropes[r], frequencies + r * m->pairs, row->position, s->cosine + at, s->sine + at);
    }
}

static obm_status start_rows(obm_model *m, const obm__row *rows, size_t n, obm_error *err) {
    obm__scratch *s = &m->scratch;
    int64_t hidden = m->config.hidden;
    for (size_t i = 0; i < n; i++) {
        s->weights[i] = rows[i].sequence ? rows[i].sequence->weights : NULL;
        if (!rows[i].sequence) continue;
        float *x = s->x + (int64_t)i * hidden;
        OBM_TRY(obm__weights_embed(m, s->weights[i], rows[i].id, x, err));
        for (int64_t h = 0; h < hidden && m->embedding_scale != 1; h++) x[h] *= m->embedding_scale;
        start_rotation(m, &rows[i], i);
    }
    return OBM_OK;
}

/* ---- the pass ---- */

obm_status obm__forward(obm_model *m, const obm__row *rows, size_t n, bool tiled, int64_t layers, obm_error *err) {
    const obm__config *c = &m->config;
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim, wide = c->intermediate;
    OBM_TRY(reserve(m, rows, n, tiled, err));
    obm__scratch *s = &m->scratch;
    const obm__weights *const *w = s->weights;

    OBM_TRY(start_rows(m, rows, n, err)); // x (n, hidden)
    join(m, n, (join_job){.after = OBM_ROLES, .before = layers ? OBM_ATTENTION_NORM : OBM_ROLES});
    for (int64_t layer = 0; layer < layers; layer++) {
        bool last = layer + 1 == layers;
        const obm__linear qkv[] = {{OBM_Q, s->q, q}, {OBM_K, s->k, kv}, {OBM_V, s->v, kv}};
        OBM_TRY(obm__linear_run(m, w, n, tiled, layer, qkv, 3, s->normed, err));
        OBM_TRY(obm__attention_run(m, rows, n, tiled, layer, err)); // mixed (n, heads * head_dim)
        const obm__linear o[] = {{OBM_O, s->normed, c->hidden}};
        OBM_TRY(obm__linear_run(m, w, n, tiled, layer, o, 1, s->mixed, err));
        join(m, n, (join_job){NULL, layer, OBM_ATTENTION_POST_NORM, layer, OBM_MLP_NORM, NULL}); // x += o
        const obm__linear gate_up[] = {{OBM_GATE, s->gate, wide}, {OBM_UP, s->up, wide}};
        OBM_TRY(obm__linear_run(m, w, n, tiled, layer, gate_up, 2, s->normed, err));
        gate_rows(m, n); // gate (n, intermediate)
        const obm__linear down[] = {{OBM_DOWN, s->normed, c->hidden}};
        OBM_TRY(obm__linear_run(m, w, n, tiled, layer, down, 1, s->gate, err));
        obm__role next = last ? OBM_ROLES : OBM_ATTENTION_NORM;
        join(m, n, (join_job){NULL, layer, OBM_MLP_POST_NORM, layer + 1, next, NULL}); // x += down
    }
    return OBM_OK;
}

/* out: (n, vocab), count values in all; masked ids stay at -inf. */
typedef struct logits_job {
    const obm_model *m;
    float *out;
    size_t count;
} logits_job;

/* Values of an item, and items that outweigh a hand-over. */
#define BENT 64
#define BENT_GRAIN 16

static void bend_logits(void *arg, size_t begin, size_t end, int worker) {
    const logits_job *j = arg;
    const obm__config *c = &j->m->config;
    size_t stop = end * BENT < j->count ? end * BENT : j->count;
    (void)worker;
    for (size_t i = begin * BENT; i < stop; i++) {
        if (j->out[i] == -INFINITY) continue;
        j->out[i] /= c->logit_divisor;
        if (c->logit_cap > 0) j->out[i] = obm__soft_cap(j->out[i], c->logit_cap);
    }
}

obm_status obm__forward_logits(obm_model *m, const obm__row *rows, const size_t *which, size_t n, float *out,
                               obm_error *err) {
    const obm__weights **weights = obm__calloc(n, sizeof *weights);
    size_t count = n * (size_t)m->vocab;
    if (!weights) return obm__fail_nomem(err, n * sizeof *weights);
    for (size_t i = 0; i < n; i++) weights[i] = rows[which[i]].sequence->weights;
    join(m, n, (join_job){.after = OBM_ROLES, .before = OBM_FINAL_NORM, .which = which}); // normed (n, hidden)
    const obm__linear head[] = {{OBM_HEAD, out, m->vocab}};
    obm_status status = obm__linear_run(m, weights, n, false, 0, head, 1, m->scratch.normed, err);
    if (status == OBM_OK && (m->config.logit_cap > 0 || m->config.logit_divisor != 1))
        obm__place_rows(m, (count + BENT - 1) / BENT, BENT_GRAIN, bend_logits, &(logits_job){m, out, count});
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
        if (decode)
            rows[0] = (obm__row){s, s->length, ids[done]};
        else
            take = obm__fill_tiles(s, ids + done, n - done, rows, OBM_CHUNK_ROWS, &n_rows);
        OBM_TRY(obm__forward(m, rows, n_rows, !decode, layers, err));
        if (visit) OBM_TRY(visit(arg, m, rows, n_rows, err));
        s->length += (int64_t)take;
        done += take;
    }
    return OBM_OK;
}
