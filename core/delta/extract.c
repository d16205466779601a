/* A LoRA adapter out of a fine-tune: the truncated singular value decomposition of every linear weight's task vector.
 * What no LoRA factor can hold (norms, biases, embeddings, heads) is reported, not written. */
#include "delta.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

/* Elements of a block of the walk that reads d. */
#define READ (1 << 14)
/* Blocks of each thread between two looks at the pulse: some milliseconds. */
#define SLICE 64
/* A dry run's guess: a decomposition takes about 22 m n min(m, n) operations, of which one core does some 10^10 a
 * second. */
#define SVD_FLOPS 22.0
#define FLOPS_PER_SECOND 1e10
#define BYTES_PER_SECOND 1e9

typedef struct work {
    obm_context *ctx;
    const obm_lora_options *options;
    obm_task_vector *v;
    int64_t rank;
    double energy;
    obm_dtype dtype;
    obm__adapter_writer *out;
    obm_lora_matrix *rows; /* (v->count) at most; names borrowed from v */
    size_t n;
    obm__pulse pulse;
} work;

/* What peft puts its layers on and the classes know by name. */
static bool is_linear(const obm__pair *p) {
    size_t n = strlen(p->name), suffix = strlen(".weight");
    return (p->cls == OBM_CLASS_ATTENTION || p->cls == OBM_CLASS_MLP) && obm__pair_is_matrix(p) && n > suffix &&
           !strcmp(p->name + n - suffix, ".weight");
}

/* ---- options ---- */

static obm_status read_dtype(const char *name, obm_dtype *out, obm_error *err) {
    *out = OBM_F32;
    if (!name || obm__dtype_find(name, out)) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "dtype: expected f32, bf16 or f16, found \"%.40s\"", name);
}

static obm_status read_options(work *w, obm_error *err) {
    w->rank = OBM_OPT(w->options, obm_lora_options, rank, 0);
    w->energy = OBM_OPT(w->options, obm_lora_options, energy, 0);
    if (w->rank < 0) return obm__fail(err, OBM_E_ARG, "rank: expected 1 or more, found %lld", (long long)w->rank);
    if (!(w->energy >= 0 && w->energy <= 1))
        return obm__fail(err, OBM_E_ARG, "energy: expected a number in (0, 1], found %g", w->energy);
    if ((w->rank > 0) == (w->energy > 0))
        return obm__fail(err, OBM_E_ARG, "an adapter is cut by rank or by energy: expected one of them, found %s",
                         w->rank ? "both" : "neither");
    return read_dtype(OBM_OPT(w->options, obm_lora_options, dtype, NULL), &w->dtype, err);
}

/* ---- reading d ---- */

typedef struct reading {
    const obm_kernels *k;
    const obm__pair *p;
    int64_t count;
    float *scratch; /* (workers, 2, READ) */
    double *out;    /* NULL: only whether there is anything */
    _Atomic int64_t bad;
    _Atomic bool any;
} reading;

static void read_range(void *arg, size_t first, size_t last, int worker) {
    reading *r = arg;
    float *d = r->scratch + (size_t)worker * 2 * READ, *scratch = d + READ;
    for (size_t i = first; i < last; i++) {
        int64_t begin = (int64_t)i * READ, n = r->count - begin < READ ? r->count - begin : READ;
        obm__pair_read(r->k, r->p, begin, n, d, scratch);
        int64_t bad = (int64_t)r->k->find_nonfinite(d, (size_t)n);
        if (bad < n) obm__note_bad(&r->bad, begin + bad);
        bool any = false;
        for (int64_t j = 0; j < n; j++) any |= d[j] != 0;
        if (any) r->any = true;
        for (int64_t j = 0; r->out && j < n; j++) r->out[begin + j] = d[j];
    }
}

static void release(const obm__pair *p) {
    obm__pages_release(p->base.data, obm__tensor_bytes(&p->base));
    if (p->expert.data) obm__pages_release(p->expert.data, obm__tensor_bytes(&p->expert));
}

static obm_status read_delta(work *w, const obm__pair *p, double *out, bool *any, obm_error *err) {
    reading r = {.k = w->ctx->k, .p = p, .count = obm_tensor_count(&p->base), .out = out, .bad = INT64_MAX};
    OBM_TRY(obm__task_vector_check(w->v, err));
    r.scratch = obm__alloc((size_t)w->ctx->threads * 2 * READ, sizeof *r.scratch);
    if (!r.scratch) return obm__fail_nomem(err, (uint64_t)w->ctx->threads * 2 * READ * sizeof *r.scratch);
    obm_status status = obm__parallel_slices(w->ctx, (size_t)((r.count + READ - 1) / READ), 1,
                                             (size_t)w->ctx->threads * SLICE, read_range, &r, &w->pulse, err);
    obm_free(r.scratch);
    release(p);
    *any = r.any || p->extra_rows > 0;
    return status != OBM_OK || r.bad == INT64_MAX ? status : obm__fail_nonfinite(err, p, r.bad);
}

/* ---- one matrix ---- */

static double square(const double *s, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += s[i] * s[i];
    return sum;
}

/* By rank, or the least that keeps the share of ||d||^2; never a direction that is rounding. */
static size_t choose_rank(const work *w, const obm__svd *d) {
    size_t most = obm__svd_rank(d), r = 0;
    double total = square(d->s, d->k), kept = 0;
    if (w->rank) return (uint64_t)w->rank < most ? (size_t)w->rank : most;
    while (r < most && (w->energy >= 1 || kept < w->energy * total)) {
        kept += d->s[r] * d->s[r];
        r++;
    }
    return r;
}

static obm_status narrow(const work *w, const obm__pair *p, float *x, size_t n, void *out, obm_error *err) {
    for (size_t i = 0; i < n && w->dtype == OBM_F16; i++)
        if (!(fabsf(x[i]) <= 65504.0f))
            return obm__fail(err, OBM_E_VALUE, "%s: a LoRA factor of %g is too large for f16", p->name, (double)x[i]);
    obm__narrow(w->ctx->k, w->dtype, x, (int64_t)n, out);
    return OBM_OK;
}

/* A = sqrt(S) V^T (rank, in), B = U sqrt(S) (out, rank): both of one size, which is kindest to 16-bit factors. */
static obm_status write_factors(const work *w, const obm__pair *p, const obm__svd *d, size_t r, obm_error *err) {
    size_t m = d->m, n = d->n, size = obm_dtype_size(w->dtype);
    float *x = obm__alloc(r * (m + n), sizeof *x);
    char *bytes = obm__alloc(r * (m + n), size);
    obm_status status = x && bytes ? OBM_OK : obm__fail_nomem(err, r * (m + n) * (sizeof *x + size));
    for (size_t i = 0; status == OBM_OK && i < r; i++) {
        double root = sqrt(d->s[i]);
        for (size_t j = 0; j < n; j++) x[i * n + j] = (float)(root * d->vt[i * n + j]);
        for (size_t j = 0; j < m; j++) x[r * n + j * r + i] = (float)(root * d->u[j * d->k + i]);
    }
    if (status == OBM_OK) status = narrow(w, p, x, r * (m + n), bytes, err);
    if (status == OBM_OK)
        status = obm__adapter_writer_add(w->out, p->name, (int64_t)r, (int64_t)m, (int64_t)n, bytes,
                                         bytes + r * n * size, err);
    obm_free(x);
    obm_free(bytes);
    return status;
}

static obm_status extract_matrix(work *w, const obm__pair *p, obm_error *err) {
    obm__svd d;
    bool any;
    obm_lora_matrix row = {.name = p->name, .rows = p->base.shape[0], .cols = p->base.shape[1]};
    OBM_TRY(obm__svd_new((size_t)row.rows, (size_t)row.cols, p->name, &d, err));
    obm_status status = read_delta(w, p, d.a, &any, err);
    if (status == OBM_OK && any) status = obm__svd_run(&d, p->name, err);
    if (status == OBM_OK && any) {
        size_t r = choose_rank(w, &d);
        double total = square(d.s, d.k);
        row.rank = (int64_t)r;
        row.norm = sqrt(total);
        row.energy = square(d.s, r) / total;
        w->rows[w->n++] = row;
        status = write_factors(w, p, &d, r, err);
    }
    obm__svd_free(&d);
    return status;
}

static obm_status note_rest(work *w, const obm__pair *p, obm_error *err) {
    bool any = false;
    obm_lora_matrix row = {.name = p->name};
    if (!obm__is_float(p->base.dtype)) return OBM_OK;
    obm__tensor_rows(&p->base, &row.rows, &row.cols);
    OBM_TRY(read_delta(w, p, NULL, &any, err));
    if (any) w->rows[w->n++] = row;
    return OBM_OK;
}

/* ---- the whole ---- */

static obm_status extract_all(work *w, obm_error *err) {
    size_t left = 0;
    for (size_t i = 0; i < w->v->count; i++) {
        const obm__pair *p = &w->v->pairs[i];
        OBM_TRY(is_linear(p) ? extract_matrix(w, p, err) : note_rest(w, p, err));
        OBM_TRY(obm__pulse_done(&w->pulse, w->pulse.done + obm__tensor_bytes(&p->base), err));
    }
    for (size_t i = 0; i < w->n; i++) left += w->rows[i].rank == 0;
    if (left == w->n)
        return obm__fail(err, OBM_E_VALUE, "%.300s and %.300s do not differ in a linear weight: nothing to extract",
                         w->v->base->path, w->v->expert->path);
    if (left)
        obm__warn(w->ctx, "%zu tensors differ and are not in the adapter: LoRA factors stand for linear weights only",
                  left);
    return OBM_OK;
}

static obm_plan plan_of(const work *w) {
    obm_plan plan = {0};
    for (size_t i = 0; i < w->v->count; i++) {
        const obm__pair *p = &w->v->pairs[i];
        plan.bytes_read += 2 * (uint64_t)obm__tensor_bytes(&p->base);
        if (!is_linear(p)) continue;
        uint64_t m = (uint64_t)p->base.shape[0], n = (uint64_t)p->base.shape[1], k = m < n ? m : n;
        uint64_t r = w->rank && (uint64_t)w->rank < k ? (uint64_t)w->rank : k, size = obm_dtype_size(w->dtype);
        uint64_t memory = obm__svd_bytes(m, n) + r * (m + n) * (sizeof(float) + size);
        plan.tensors += 2;
        plan.tiles++;
        plan.bytes_written += r * (m + n) * size;
        plan.seconds += SVD_FLOPS * (double)m * (double)n * (double)k / FLOPS_PER_SECOND;
        if (memory > plan.peak_memory) plan.peak_memory = memory;
    }
    plan.peak_memory += (uint64_t)w->ctx->threads * 2 * READ * sizeof(float);
    plan.seconds += (double)(plan.bytes_read + 2 * plan.bytes_written) / BYTES_PER_SECOND;
    return plan;
}

/* Rows and their names in one block. */
static obm_status hand_over(const work *w, obm_lora_matrix **out, size_t *n, obm_error *err) {
    size_t bytes = w->n * sizeof **out, at = bytes;
    for (size_t i = 0; i < w->n; i++) bytes += strlen(w->rows[i].name) + 1;
    char *block = obm__calloc(bytes, 1);
    if (!block) return obm__fail_nomem(err, bytes);
    *out = (obm_lora_matrix *)(void *)block;
    *n = w->n;
    memcpy(block, w->rows, at);
    for (size_t i = 0; i < w->n; i++) {
        (*out)[i].name = block + at;
        size_t length = strlen(w->rows[i].name) + 1;
        memcpy(block + at, w->rows[i].name, length);
        at += length;
    }
    return OBM_OK;
}

static obm_status run(work *w, const char *base_path, const char *out_path, obm_plan *plan, obm_lora_matrix **matrices,
                      size_t *n, obm_error *err) {
    const char *inputs[] = {w->v->base->directory, w->v->expert->directory};
    const char *name = OBM_OPT(w->options, obm_lora_options, base_name, NULL);
    OBM_TRY(
        obm__adapter_writer_check(out_path, OBM_OPT(w->options, obm_lora_options, overwrite, false), inputs, 2, err));
    obm_plan planned = plan_of(w);
    if (OBM_OPT(w->options, obm_lora_options, dry_run, false)) {
        if (plan) *plan = planned;
        return OBM_OK;
    }
    w->pulse = obm__pulse_new(w->ctx, OBM_OPT(w->options, obm_lora_options, progress, NULL),
                              OBM_OPT(w->options, obm_lora_options, progress_user, NULL), "extract", 0);
    for (size_t i = 0; i < w->v->count; i++) w->pulse.total += obm__tensor_bytes(&w->v->pairs[i].base);
    w->rows = obm__calloc(w->v->count, sizeof *w->rows);
    if (!w->rows) return obm__fail_nomem(err, w->v->count * sizeof *w->rows);
    OBM_TRY(obm__adapter_writer_new(out_path, w->dtype, &w->out, err));
    OBM_TRY(extract_all(w, err));
    obm_lora_matrix *rows = NULL;
    size_t count = 0;
    if (matrices) OBM_TRY(hand_over(w, &rows, &count, err));
    obm_status status = obm__adapter_writer_finish(w->out, name ? name : base_path, err);
    if (status != OBM_OK) {
        obm_free(rows);
        return status;
    }
    if (matrices) *matrices = rows;
    if (matrices) *n = count;
    if (plan) *plan = planned;
    return OBM_OK;
}

obm_status obm_extract_lora(obm_context *ctx, const char *base_path, const char *expert_path,
                            const obm_lora_options *options, const char *out_path, obm_plan *plan,
                            obm_lora_matrix **matrices, size_t *n, obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_lora_options, options, err));
    work w = {.ctx = ctx, .options = options};
    obm_checkpoint *base = NULL, *expert = NULL;
    obm_status status;
    OBM_GO(read_options(&w, err));
    OBM_GO(obm_checkpoint_open(ctx, base_path, &base, err));
    OBM_GO(obm_checkpoint_open(ctx, expert_path, &expert, err));
    OBM_GO(obm_task_vector_new(base, expert, &w.v, err));
    OBM_GO(run(&w, base_path, out_path, plan, matrices, n, err));
done:
    obm__adapter_writer_free(w.out);
    obm_free(w.rows);
    obm_task_vector_free(w.v);
    obm_checkpoint_free(expert);
    obm_checkpoint_free(base);
    return status;
}
