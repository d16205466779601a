/*
 * Packs whose experts share vectors: one file holds a vector per matrix, made of the task vectors of all experts at
 * once, and each expert's file a mask of one bit per weight, made against the vector as it is stored.  Two passes over
 * base and experts, so that nothing here grows with the model: the first writes the shared file, the second, expert by
 * expert, the masks (pack_expert.c calls it for every matrix of that mode).
 *
 * Results do not depend on threads: every element stands for itself, and the sums of EMR's rescalers are joined as the
 * scales of planes are (blocks of OBM_BLOCK, rows, then matrices, each by obm__tree_sum).
 */
#include "pack_parts.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* Wang et al. choose lambda from 0.2, 0.3, 0.4, 0.5 and 0.6 by validation: the middle. */
#define TALL_LAMBDA 0.4
/* Elements of a window per thread. */
#define WINDOW OBM_STREAM_WINDOW

static const char *const methods[] = {"tall", "emr"};

/* ---- options ---- */

static obm_status parse_dtype(const char *text, int *out, obm_error *err) {
    obm_dtype dtype;
    *out = -1;
    if (!text || !*text) return OBM_OK;
    if (!obm__dtype_find(text, &dtype))
        return obm__fail(err, OBM_E_ARG, "shared_dtype %.32s, expected f32, bf16 or f16", text);
    *out = dtype;
    return OBM_OK;
}

obm_status obm__shared_options(const obm_compress_options *o, bool *wanted, obm__sharing *rule, int *dtype,
                               obm_error *err) {
    const char *method = OBM_OPT(o, obm_compress_options, shared, NULL),
               *text = OBM_OPT(o, obm_compress_options, shared_dtype, NULL);
    double lambda = OBM_OPT(o, obm_compress_options, tall_lambda, 0);
    bool tall = method && !strcmp(method, methods[0]), emr = method && !strcmp(method, methods[1]);
    *wanted = method && *method;
    if (*wanted && !tall && !emr)
        return obm__fail(err, OBM_E_ARG, "unknown shared vector \"%.40s\": tall or emr", method);
    if (!tall && lambda != 0) return obm__fail(err, OBM_E_ARG, "tall_lambda belongs to shared \"tall\"");
    if (!*wanted && text && *text)
        return obm__fail(err, OBM_E_ARG, "shared_dtype belongs to shared \"tall\" or \"emr\"");
    if (!isfinite(lambda) || lambda < 0)
        return obm__fail(err, OBM_E_ARG, "tall_lambda is %g, expected a number > 0", lambda);
    *rule = (obm__sharing){emr, tall && lambda == 0 ? TALL_LAMBDA : lambda};
    return parse_dtype(text, dtype, err);
}

/* ---- which tensors ---- */

/* One tensor, and the experts whose masks of it will be written. */
typedef struct unified {
    const obm__pair **pairs; /* (n experts at most) */
    size_t *who;             /* (n) */
    size_t n;
    obm_dtype dtype;
} unified;

typedef struct names {
    size_t *at; /* (n experts): the next pair of each */
} names;

static const obm__pair *pair_at(const obm__shared_job *j, const names *s, size_t expert) {
    const obm_task_vector *v = j->experts[expert].v;
    return s->at[expert] < v->count ? &v->pairs[s->at[expert]] : NULL;
}

/* Pairs are sorted by name, but an expert may have one that others lack: the head. */
static const char *next_name(const obm__shared_job *j, const names *s) {
    const char *least = NULL;
    for (size_t i = 0; i < j->n; i++) {
        const obm__pair *p = pair_at(j, s, i);
        if (p && (!least || strcmp(p->name, least) < 0)) least = p->name;
    }
    return least;
}

static obm_dtype stored_dtype(const obm__shared_job *j, const obm__pair *p) {
    if (j->dtype >= 0) return (obm_dtype)j->dtype;
    return p->base.dtype == OBM_F64 ? OBM_F32 : p->base.dtype;
}

static obm_status has_mask(const obm__shared_job *j, size_t expert, const obm__pair *p, bool *out, obm_error *err) {
    obm_mode mode;
    bool same = p->expert.data && p->expert.data == p->base.data; /* an adapter leaves it alone */
    OBM_TRY(obm__policy_mode(&j->experts[expert].policy, p, &mode, err));
    *out = mode == OBM_MODE_MASK && !same;
    if (!*out || j->dry_run) return OBM_OK;
    OBM_TRY(obm__pair_is_same(j->ctx, p, j->ticker, &same, err));
    *out = !same;
    return OBM_OK;
}

/* The tensor of that name; the cursors move on.  u->n == 0: nobody has a mask of it. */
static obm_status collect(const obm__shared_job *j, names *s, const char *name, unified *u, obm_error *err) {
    u->n = 0;
    for (size_t i = 0; i < j->n; i++) {
        const obm__pair *p = pair_at(j, s, i);
        bool masked;
        if (!p || strcmp(p->name, name)) continue;
        s->at[i]++;
        OBM_TRY(has_mask(j, i, p, &masked, err));
        if (!masked) continue;
        u->who[u->n] = i;
        u->pairs[u->n++] = p;
    }
    if (u->n) u->dtype = stored_dtype(j, u->pairs[0]);
    return OBM_OK;
}

/* All such tensors, by name; the items' arrays are owned. */
typedef struct unified_list {
    unified *items;
    size_t n;
} unified_list;

static void list_free(unified_list *l) {
    for (size_t i = 0; i < l->n; i++) {
        obm_free(l->items[i].pairs);
        obm_free(l->items[i].who);
    }
    obm_free(l->items);
}

static obm_status list_fill(const obm__shared_job *j, names *s, unified_list *l, obm_error *err) {
    size_t room = 0;
    for (size_t i = 0; i < j->n; i++) room += j->experts[i].v->count;
    if (!(l->items = obm__calloc(room + 1, sizeof *l->items))) return obm__fail_nomem(err, room * sizeof *l->items);
    for (const char *name; (name = next_name(j, s));) {
        unified *u = &l->items[l->n++];
        u->pairs = obm__calloc(j->n, sizeof *u->pairs);
        u->who = obm__calloc(j->n, sizeof *u->who);
        if (!u->pairs || !u->who) return obm__fail_nomem(err, j->n * sizeof *u->pairs);
        OBM_TRY(collect(j, s, name, u, err));
        if (u->n) continue;
        obm_free(u->pairs);
        obm_free(u->who);
        *u = (unified){0};
        l->n--;
    }
    return OBM_OK;
}

static obm_status list_new(const obm__shared_job *j, unified_list *l, obm_error *err) {
    names s = {obm__calloc(j->n, sizeof *s.at)};
    obm_status status = s.at ? list_fill(j, &s, l, err) : obm__fail_nomem(err, j->n * sizeof *s.at);
    obm_free(s.at);
    return status;
}

/* ---- the vectors ---- */

typedef struct window {
    const obm__shared_job *j;
    const unified *u;
    int64_t first, n;    /* elements */
    uint8_t *out;        /* (window), stored */
    _Atomic int64_t bad; /* the lowest block with a NaN or Inf, INT64_MAX for none */
} window;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* False: the vector is not finite here. */
static bool unify_block(const window *w, int64_t begin, int64_t n, void *out) {
    const obm_kernels *k = w->j->ctx->k;
    const obm_tensor stored = {.data = out, .dtype = w->u->dtype, .ndim = 1, .shape = {n}};
    float x[OBM_BLOCK];
    if (!obm__shared_read(k, &w->j->rule, w->u->pairs, w->u->n, begin, n, x)) return false;
    obm__narrow(k, w->u->dtype, x, n, out);
    obm__widen(k, &stored, 0, n, x);
    return k->find_nonfinite(x, (size_t)n) == (size_t)n;
}

static void unify_blocks(void *arg, size_t begin, size_t end, int worker) {
    window *w = arg;
    (void)worker;
    size_t size = obm_dtype_size(w->u->dtype);
    for (size_t b = begin; b < end; b++) {
        int64_t at = (int64_t)b * OBM_BLOCK, n = least(w->n - at, OBM_BLOCK);
        if (!unify_block(w, w->first + at, n, w->out + (size_t)at * size)) obm__note_bad(&w->bad, w->first + at);
    }
}

/* Whose element it was that the block from `begin` on is no number for. */
static obm_status fail_block(const window *w, int64_t begin, obm_error *err) {
    const obm_kernels *k = w->j->ctx->k;
    uint8_t out[sizeof(float)];
    for (int64_t at = begin; at < w->first + w->n; at++) {
        for (size_t i = 0; i < w->u->n; i++) {
            float d, scratch;
            obm_error why;
            obm__pair_read(k, w->u->pairs[i], at, 1, &d, &scratch);
            if (isfinite(d)) continue;
            obm__fail_nonfinite(&why, w->u->pairs[i], at);
            return obm__fail(err, OBM_E_VALUE, "expert %s: %.640s", w->j->experts[w->u->who[i]].name, why.message);
        }
        if (unify_block(w, at, 1, out)) continue;
        return obm__fail(err, OBM_E_VALUE, "tensor %s: the shared vector overflows %s at index %lld",
                         w->u->pairs[0]->name, obm_dtype_name(w->u->dtype), (long long)at);
    }
    return obm__fail(err, OBM_E_VALUE, "tensor %s: a file changed while it was read", w->u->pairs[0]->name);
}

static void populate(const window *w) {
    obm__tensor_populate(&w->u->pairs[0]->base, w->first, w->n);
    for (size_t i = 0; i < w->u->n; i++)
        if (w->u->pairs[i]->expert.data) obm__tensor_populate(&w->u->pairs[i]->expert, w->first, w->n);
}

static uint64_t release(const window *w) {
    uint64_t bytes = 0;
    obm__tensor_release(&w->u->pairs[0]->base, w->first, w->n);
    for (size_t i = 0; i < w->u->n; i++) {
        const obm__pair *p = w->u->pairs[i];
        if (p->expert.data) obm__tensor_release(&p->expert, w->first, w->n);
        bytes += (uint64_t)w->n * obm_dtype_size(p->expert.dtype);
    }
    return bytes;
}

static int64_t window_size(const obm_context *ctx) { return (int64_t)ctx->threads * WINDOW; }

static obm_status unify(const obm__shared_job *j, const unified *u, obm__st_writer *f, uint8_t *out, uint64_t *done,
                        obm_error *err) {
    int64_t total = obm_tensor_count(&u->pairs[0]->base), step = window_size(j->ctx);
    for (size_t i = 0; i < u->n; i++) OBM_TRY(obm__task_vector_check(j->experts[u->who[i]].v, err));
    for (int64_t at = 0; at < total; at += step) {
        window w = {.j = j, .u = u, .first = at, .n = least(total - at, step), .out = out, .bad = INT64_MAX};
        populate(&w);
        obm__parallel(j->ctx, (size_t)((w.n - 1) / OBM_BLOCK + 1), 4, unify_blocks, &w);
        if (w.bad != INT64_MAX) return fail_block(&w, w.bad, err);
        OBM_TRY(obm__st_writer_write(f, out, (size_t)w.n * obm_dtype_size(u->dtype), err));
        *done += release(&w);
        OBM_TRY(obm__tick(j->ticker, *done, err));
    }
    return OBM_OK;
}

/* ---- the file ---- */

static obm_tensor shape_of(const unified *u) {
    obm_tensor t = u->pairs[0]->base;
    t.data = NULL;
    t.dtype = u->dtype;
    return t;
}

static obm_status write_all(const obm__shared_job *j, const unified_list *l, obm__st_writer *w, obm_error *err) {
    size_t bytes = (size_t)window_size(j->ctx) * sizeof(float);
    uint64_t done = j->ticker->done;
    OBM_TRY(obm__st_writer_metadata(w, "format", OBM_PACK_FORMAT, err));
    for (size_t i = 0; i < l->n; i++) {
        obm_tensor t = shape_of(&l->items[i]);
        OBM_TRY(obm__st_writer_declare(w, l->items[i].pairs[0]->name, t.dtype, t.ndim, t.shape, err));
    }
    OBM_TRY(obm__st_writer_begin(w, err));
    uint8_t *out = obm__alloc(1, bytes);
    obm_status status = out ? OBM_OK : obm__fail_nomem(err, bytes);
    for (size_t i = 0; status == OBM_OK && i < l->n; i++) status = unify(j, &l->items[i], w, out, &done, err);
    obm_free(out);
    return status;
}

static obm_status write_file(obm__shared_job *j, const unified_list *l, obm_json **record, obm_error *err) {
    char xxh3[33], *name = NULL;
    uint64_t bytes = 0;
    obm__st_writer *w;
    OBM_TRY(obm__pack_writer(j->dir, "shared", &w, err));
    obm_status status = write_all(j, l, w, err);
    if (status == OBM_OK) status = obm__pack_publish(w, j->dir, "shared", xxh3, &bytes, &name, err);
    obm__st_writer_free(w);
    char *path = status == OBM_OK ? obm__path_join(j->dir, name) : NULL;
    if (status == OBM_OK) status = path ? obm__safetensors_open(path, &j->file, err) : obm__fail_nomem(err, 0);
    if (status == OBM_OK && !(*record = obm__file_record(name, bytes, xxh3))) status = obm__fail_nomem(err, 0);
    obm_free(path);
    obm_free(name);
    return status;
}

static bool put_rule(const obm__shared_job *j, const unified_list *l, obm_json *r) {
    obm_json *tensors = obm__json_new_object();
    bool ok = obm__json_set(r, "method", obm__json_new_string(methods[j->rule.emr]));
    if (!j->rule.emr) ok = obm__json_set(r, "lambda", obm__json_new_real(j->rule.lambda)) && ok;
    for (size_t i = 0; tensors && i < l->n; i++) {
        obm_json *t = obm__json_new_object();
        obm_tensor shape = shape_of(&l->items[i]);
        ok = t && obm__put_tensor(t, &shape) && ok;
        ok = obm__json_set(tensors, l->items[i].pairs[0]->name, t) && ok;
    }
    return obm__json_set(r, "tensors", tensors) && ok;
}

static void add_to_plan(const obm__shared_job *j, const unified_list *l) {
    uint64_t window = (uint64_t)window_size(j->ctx);
    for (size_t i = 0; i < l->n; i++) {
        const unified *u = &l->items[i];
        obm_tensor t = shape_of(u);
        uint64_t read = obm__tensor_bytes(&u->pairs[0]->base), n = (uint64_t)obm_tensor_count(&t);
        for (size_t k = 0; k < u->n; k++) read += n * obm_dtype_size(u->pairs[k]->expert.dtype);
        uint64_t part = n > window ? window : n, memory = window * sizeof(float) + (n ? read / n * part : 0);
        j->plan->tensors++;
        j->plan->tiles += obm__pieces(n, window);
        j->plan->bytes_read += read;
        j->plan->bytes_written += obm__tensor_bytes(&t);
        if (memory > j->plan->peak_memory) j->plan->peak_memory = memory;
    }
}

static obm_status open_experts(obm__shared_job *j, const obm_expert *experts, obm_checkpoint *const *checkpoints,
                               size_t n, obm_profile profile, obm_error *err) {
    if (!(j->experts = obm__calloc(n, sizeof *j->experts))) return obm__fail_nomem(err, n * sizeof *j->experts);
    for (j->n = 0; j->n < n;) {
        obm__shared_expert *x = &j->experts[j->n++];
        char *text = NULL;
        x->name = experts[j->n - 1].name;
        OBM_TRY(obm__policy_parse(&experts[j->n - 1], profile, true, &x->policy, &text, err));
        obm_free(text);
        OBM_TRY(obm_task_vector_new(j->base, checkpoints[j->n - 1], &x->v, err));
    }
    return OBM_OK;
}

obm_status obm__shared_write(obm__shared_job *j, const obm_expert *experts, obm_checkpoint *const *checkpoints,
                             size_t n, obm_profile profile, obm_json **record, obm_error *err) {
    unified_list l = {0};
    obm_json *r = NULL;
    obm_status status = open_experts(j, experts, checkpoints, n, profile, err);
    if (status == OBM_OK) status = list_new(j, &l, err);
    if (status == OBM_OK && !l.n)
        status = obm__fail(err, OBM_E_ARG, "shared vectors: no expert's policy makes a matrix that differs a mask");
    if (status == OBM_OK) add_to_plan(j, &l);
    if (status == OBM_OK && !j->dry_run) status = write_file(j, &l, &r, err);
    if (r && !put_rule(j, &l, r)) {
        obm__json_free(r);
        r = NULL;
        status = obm__fail_nomem(err, 0);
    }
    if (r) *record = r;
    list_free(&l);
    return status;
}

void obm__shared_free(obm__shared_job *j) {
    for (size_t i = 0; j->experts && i < j->n; i++) obm_task_vector_free(j->experts[i].v);
    obm_free(j->experts);
    obm__safetensors_free(j->file);
}

/* ---- masks ---- */

typedef struct mask_job {
    const obm_kernels *k;
    const obm__sharing *rule;
    const obm__pair *pair;
    const obm_tensor *shared;
    int64_t rows, cols, row_bytes, first;
    uint8_t *bits;    /* (rows of the stripe, row_bytes) */
    double *own, *of; /* (rows): sums of |d| and of |mask * shared| */
    double *partial;  /* (threads, 2, blocks of a row) */
    size_t blocks;
    _Atomic int64_t bad; /* lowest index of a NaN or Inf */
} mask_job;

static double masked_sum(const obm_kernels *k, const uint8_t *bits, float *x, int64_t n) {
    obm__mask_apply(bits, 0, x, n);
    return k->abs_sum(x, (size_t)n);
}

static void mask_row(mask_job *m, int64_t row, uint8_t *bits, double *own, double *of) {
    float d[OBM_BLOCK], x[OBM_BLOCK];
    size_t b = 0;
    for (int64_t at = 0, n; at < m->cols; at += n, b++) {
        n = least(m->cols - at, OBM_BLOCK);
        obm__pair_read(m->k, m->pair, row * m->cols + at, n, d, x);
        obm__widen(m->k, m->shared, row * m->cols + at, n, x);
        int64_t bad = (int64_t)m->k->find_nonfinite(d, (size_t)n);
        if (bad < n) obm__note_bad(&m->bad, row * m->cols + at + bad);
        obm__mask_pack(m->rule, d, x, n, bits + at / 8);
        own[b] = m->rule->emr ? m->k->abs_sum(d, (size_t)n) : 0;
        of[b] = m->rule->emr ? masked_sum(m->k, bits + at / 8, x, n) : 0;
    }
    m->own[row] = obm__tree_sum(own, b);
    m->of[row] = obm__tree_sum(of, b);
}

static void mask_rows(void *arg, size_t begin, size_t end, int worker) {
    mask_job *m = arg;
    double *own = m->partial + (size_t)worker * 2 * m->blocks;
    for (size_t i = begin; i < end; i++) {
        uint8_t *bits = m->bits + i * (size_t)m->row_bytes;
        memset(bits, 0, (size_t)m->row_bytes); /* the padding up to 64 columns */
        mask_row(m, m->first + (int64_t)i, bits, own, own + m->blocks);
    }
}

static int64_t stripe_rows(const obm_context *ctx, int64_t rows, int64_t cols) {
    int64_t n = window_size(ctx) / (cols ? cols : 1);
    return n < 1 ? 1 : least(n, rows);
}

static size_t blocks_of(int64_t cols) { return (size_t)(cols / OBM_BLOCK + 1); }

uint64_t obm__mask_memory(const obm_context *ctx, int64_t rows, int64_t cols) {
    return (uint64_t)stripe_rows(ctx, rows, cols) * (uint64_t)obm__row_bytes(cols) +
           2 * sizeof(double) * ((uint64_t)rows + (uint64_t)ctx->threads * blocks_of(cols));
}

static obm_status mask_stripes(mask_job *m, const obm__shared_job *j, obm__st_writer *w, uint64_t ticks,
                               obm_error *err) {
    int64_t stripe = stripe_rows(j->ctx, m->rows, m->cols);
    size_t grain = (size_t)(OBM_TILE / 4 / m->cols) + 1, size = obm_dtype_size(m->pair->expert.dtype);
    for (m->first = 0; m->first < m->rows; m->first += stripe) {
        int64_t n = least(stripe, m->rows - m->first), begin = m->first * m->cols;
        obm__parallel(j->ctx, (size_t)n, grain, mask_rows, m);
        if (m->bad != INT64_MAX) return obm__fail_nonfinite(err, m->pair, m->bad);
        OBM_TRY(obm__st_writer_write(w, m->bits, (size_t)(n * m->row_bytes), err));
        obm__tensor_release(&m->pair->base, begin, n * m->cols);
        if (m->pair->expert.data) obm__tensor_release(&m->pair->expert, begin, n * m->cols);
        obm__tensor_release(m->shared, begin, n * m->cols);
        OBM_TRY(obm__tick(j->ticker, ticks + (uint64_t)((begin + n * m->cols)) * size, err));
    }
    return OBM_OK;
}

/* The tensor must still be the one that the shared vector was made of. */
static obm_status find_shared(const obm__shared_job *j, const obm__pair *p, const obm_tensor **out, obm_error *err) {
    const obm__st_entry *e = obm__safetensors_find(j->file, p->name);
    if (!e) return obm__fail(err, OBM_E_MISMATCH, "tensor %s: the expert changed while it was read", p->name);
    OBM_TRY(obm__map_check(&j->file->map, j->file->path, err));
    *out = &e->t;
    return OBM_OK;
}

obm_status obm__mask_write(const obm__shared_job *j, const obm__pair *pair, obm__st_writer *w, uint64_t ticks,
                           obm__mask_sums *sums, obm_error *err) {
    mask_job m = {.k = j->ctx->k, .rule = &j->rule, .pair = pair, .bad = INT64_MAX};
    OBM_TRY(find_shared(j, pair, &m.shared, err));
    m.rows = pair->base.shape[0];
    m.cols = pair->base.shape[1];
    m.row_bytes = obm__row_bytes(m.cols);
    m.blocks = blocks_of(m.cols);
    m.bits = obm__alloc((size_t)stripe_rows(j->ctx, m.rows, m.cols), (size_t)m.row_bytes);
    m.own = obm__calloc((size_t)m.rows, sizeof *m.own);
    m.of = obm__calloc((size_t)m.rows, sizeof *m.of);
    m.partial = obm__calloc((size_t)j->ctx->threads * 2 * m.blocks, sizeof *m.partial);
    bool room = m.bits && m.own && m.of && m.partial;
    obm_status status =
        room ? mask_stripes(&m, j, w, ticks, err) : obm__fail_nomem(err, obm__mask_memory(j->ctx, m.rows, m.cols));
    if (status == OBM_OK)
        *sums = (obm__mask_sums){obm__tree_sum(m.own, (size_t)m.rows), obm__tree_sum(m.of, (size_t)m.rows)};
    obm_free(m.bits);
    obm_free(m.own);
    obm_free(m.of);
    obm_free(m.partial);
    return status;
}

/* ---- reading ---- */

static obm_status check_tensor(const obm__safetensors *file, const char *where, const char *name,
                               const obm_json *record, obm_error *err) {
    obm_tensor want;
    char have[160], expected[160];
    if (obm__json_kind(record) != OBM_JSON_OBJECT)
        return obm__fail(err, OBM_E_FORMAT, "%s: shared: tensor %.200s: expected an object, found %s", where, name,
                         obm__json_kind_name(record));
    OBM_TRY(obm__field_tensor(record, where, &want, err));
    const obm__st_entry *e = obm__safetensors_find(file, name);
    if (!e) return obm__fail(err, OBM_E_FORMAT, "%s: tensor %.200s is missing", file->path, name);
    if (!obm__is_float(want.dtype))
        return obm__fail(err, OBM_E_FORMAT, "%s: shared: tensor %.200s has a dtype that is no float", where, name);
    bool same = e->t.dtype == want.dtype && e->t.ndim == want.ndim &&
                !memcmp(e->t.shape, want.shape, (size_t)want.ndim * sizeof *want.shape);
    if (same) return OBM_OK;
    return obm__fail(err, OBM_E_FORMAT, "%s: tensor %.200s is %s %s, expected %s %s", file->path, name,
                     obm_dtype_name(e->t.dtype), obm__shape_text(&e->t, have, sizeof have), obm_dtype_name(want.dtype),
                     obm__shape_text(&want, expected, sizeof expected));
}

static obm_status check_tensors(const obm__pack_shared *s, const char *where, obm_error *err) {
    const obm_json *tensors;
    OBM_TRY(obm__field(s->record, "tensors", OBM_JSON_OBJECT, where, &tensors, err));
    for (void *it = obm__json_first(tensors); it; it = obm__json_next(tensors, it))
        OBM_TRY(check_tensor(s->file, where, obm__json_key(it), obm__json_value(it), err));
    if (s->file->count == obm__json_size(tensors)) return OBM_OK;
    return obm__fail(err, OBM_E_FORMAT, "%s: %zu tensors, pack.json accounts for %zu", s->file->path, s->file->count,
                     obm__json_size(tensors));
}

static obm_status parse_rule(obm__pack_shared *s, const char *where, obm_error *err) {
    char shown[40];
    OBM_TRY(obm__field_string(s->record, "method", where, &s->method, err));
    bool tall = !strcmp(s->method, methods[0]);
    if (!tall && strcmp(s->method, methods[1]))
        return obm__fail(err, OBM_E_FORMAT, "%s: \"method\" is \"%s\", expected \"tall\" or \"emr\"", where,
                         obm__printable(s->method, shown, sizeof shown));
    if (!tall) return OBM_OK;
    OBM_TRY(obm__field_real(s->record, "lambda", where, &s->lambda, err));
    if (isfinite(s->lambda) && s->lambda >= 0) return OBM_OK;
    return obm__fail(err, OBM_E_FORMAT, "%s: shared: \"lambda\" is %g, expected a number >= 0", where, s->lambda);
}

obm_status obm__shared_load(const obm_json *manifest, const char *dir, const char *where, obm__pack_shared *out,
                            obm_error *err) {
    int64_t version;
    OBM_TRY(obm__field_int(manifest, "version", 1, OBM_PACK_VERSION_SHARED, where, &version, err));
    if (version != OBM_PACK_VERSION_SHARED) return OBM_OK;
    OBM_TRY(obm__field(manifest, "shared", OBM_JSON_OBJECT, where, &out->record, err));
    OBM_TRY(parse_rule(out, where, err));
    OBM_TRY(obm__pack_open_file(dir, out->record, where, &out->file, err));
    return check_tensors(out, where, err);
}

void obm__shared_close(obm__pack_shared *s) {
    obm__safetensors_free(s->file);
    *s = (obm__pack_shared){0};
}
