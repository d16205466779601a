/*
 * 1-bit planes of a task vector: d ~ sum over p of alpha_p * sign(r_p), r_0 = d, r_{p+1} = r_p - alpha_p * sign(r_p)
 * (BitDelta, arXiv 2402.10193, section 3.1 and its multi-mask fidelity study).  alpha = mean |r| minimises the squared
 * error for given signs; sign(0) = +1.  Streams over stripes of rows: nothing here grows with the matrix but its
 * scales.
 *
 * Order of every sum, so that any implementation can reproduce alpha to the bit: a segment (the columns of one row, or
 * of one group of a row) is cut into blocks of OBM_BLOCK; a block is obm_kernels.abs_sum (16 lanes); the blocks of a
 * segment are joined by obm__tree_sum; for a scale per matrix the rows are joined by obm__tree_sum.  alpha =
 * (float)(sum / count).
 */
#include "delta.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Elements of a stripe per thread: long enough to hide the barrier, short enough for a progress call every few ms. */
#define STRIPE (16 * OBM_TILE)

int64_t obm__row_bytes(int64_t cols) { return (cols / 64 + (cols % 64 != 0)) * 8; }

/* ---- scales ---- */

static int64_t groups_of(obm__scale s, int64_t cols) { return cols / s.group + (cols % s.group != 0); }

int64_t obm__scale_count(obm__scale s, int64_t rows, int64_t cols) {
    if (s.kind == OBM_SCALE_MATRIX) return 1;
    if (s.kind == OBM_SCALE_ROW) return rows;
    int64_t n;
    return __builtin_mul_overflow(rows, groups_of(s, cols), &n) ? -1 : n;
}

char *obm__scale_text(obm__scale s) {
    if (s.kind == OBM_SCALE_GROUP) return obm__format("group:%lld", (long long)s.group);
    return obm__strdup(s.kind == OBM_SCALE_ROW ? "row" : "matrix");
}

static bool parse_group(const char *text, int64_t *out) {
    if (*text < '1' || *text > '9') return false;
    int64_t n = 0;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || n > INT32_MAX) return false;
        n = n * 10 + (*text - '0');
    }
    *out = n;
    return n % 64 == 0 && n <= INT32_MAX;
}

obm_status obm__scale_parse(const char *text, obm__scale *out, obm_error *err) {
    obm__scale s = {OBM_SCALE_MATRIX, 0};
    if (!strcmp(text, "row")) {
        s.kind = OBM_SCALE_ROW;
    } else if (!strncmp(text, "group:", 6)) {
        s.kind = OBM_SCALE_GROUP;
        if (!parse_group(text + 6, &s.group)) {
            return obm__fail(err, OBM_E_ARG, "scale \"%s\": the group must be a positive multiple of 64 columns", text);
        }
    } else if (strcmp(text, "matrix")) {
        return obm__fail(err, OBM_E_ARG, "unknown scale \"%s\": matrix, row or group:N", text);
    }
    *out = s;
    return OBM_OK;
}

/* ---- compressing ---- */

typedef struct worker {
    float d[OBM_BLOCK], base[OBM_BLOCK];
    uint8_t bits[OBM_BLOCK / 8];
    double *partial; /* one per block of a segment */
} worker;

typedef struct plane_job {
    const obm_kernels *k;
    const obm__pair *pair;
    obm__scale scale;
    int plane;
    float *const *alphas;
    int64_t rows, cols, row_bytes;
    int64_t segment, segments; /* columns of a segment, segments of a row */
    int64_t stripe;            /* first row of the stripe in work */
    int64_t begin;             /* element of the matrix that the pair's data begin with */
    double *row_sums;          /* (rows), scale per matrix only */
    uint8_t *signs;            /* (rows of the stripe, row_bytes) */
    worker *workers;
    _Atomic int64_t bad; /* lowest index of a NaN or Inf, INT64_MAX for none */
} plane_job;

/* Subtracts the planes before this one; their signs are computed again, which is cheaper than keeping them. */
static void peel(const plane_job *job, int64_t scale_index, worker *w, int64_t n) {
    for (int q = 0; q < job->plane; q++) {
        job->k->sign_pack(w->bits, w->d, (size_t)n);
        job->k->sign_axpy(w->d, w->bits, -job->alphas[q][scale_index], (size_t)n);
    }
}

static int64_t scale_index(const plane_job *job, int64_t row, int64_t segment) {
    return job->scale.kind == OBM_SCALE_MATRIX ? 0 : row * job->segments + segment;
}

/* Elements [at, at + n) of the pair's, at most one block: signs out, sum |r| back. */
static double read_block(plane_job *job, int64_t at, int64_t n, int64_t index, uint8_t *bits, worker *w) {
    if (job->plane == 0 && obm__pair_is_bf16(job->pair))
        return job->k->sign_sum_bf16(bits, (const uint16_t *)job->pair->expert.data + at,
                                     (const uint16_t *)job->pair->base.data + at, (size_t)n);
    obm__pair_read(job->k, job->pair, at, n, w->d, w->base);
    peel(job, index, w, n);
    job->k->sign_pack(bits, w->d, (size_t)n);
    return job->k->abs_sum(w->d, (size_t)n);
}

/* The same of elements of the matrix. */
static double do_block(plane_job *job, int64_t at, int64_t n, int64_t index, uint8_t *bits, worker *w) {
    double sum = read_block(job, at - job->begin, n, index, bits, w);
    /* So few f32 cannot overflow an f64 sum, and peeling keeps NaN and Inf: only then is one among the differences. */
    if (!isfinite(sum)) {
        obm__pair_read(job->k, job->pair, at - job->begin, n, w->d, w->base);
        obm__note_bad(&job->bad, at + (int64_t)job->k->find_nonfinite(w->d, (size_t)n));
    }
    return sum;
}

static double do_segment(plane_job *job, int64_t row, int64_t segment, uint8_t *bits, worker *w) {
    int64_t begin = segment * job->segment, index = scale_index(job, row, segment);
    int64_t end = job->cols - begin < job->segment ? job->cols : begin + job->segment;
    size_t blocks = 0;
    for (int64_t at = begin; at < end; at += OBM_BLOCK) {
        int64_t n = end - at < OBM_BLOCK ? end - at : OBM_BLOCK;
        w->partial[blocks++] = do_block(job, row * job->cols + at, n, index, bits + at / 8, w);
    }
    double sum = obm__tree_sum(w->partial, blocks);
    if (job->scale.kind != OBM_SCALE_MATRIX) job->alphas[job->plane][index] = (float)(sum / (double)(end - begin));
    return sum;
}

static void set_shape(plane_job *job) {
    const obm_tensor *t = &job->pair->base;
    obm__scale scale = job->scale;
    job->rows = t->shape[0];
    job->cols = t->shape[1];
    job->row_bytes = obm__row_bytes(job->cols);
    job->segment = scale.kind == OBM_SCALE_GROUP && scale.group < job->cols ? scale.group : job->cols;
    job->segments = scale.kind == OBM_SCALE_GROUP ? groups_of(scale, job->cols) : 1;
}

static void do_rows(void *arg, size_t begin, size_t end, int id) {
    plane_job *job = arg;
    for (size_t i = begin; i < end; i++) {
        int64_t row = job->stripe + (int64_t)i;
        uint8_t *bits = job->signs + i * (size_t)job->row_bytes;
        memset(bits, 0, (size_t)job->row_bytes); /* the padding up to 64 columns */
        for (int64_t s = 0; s < job->segments; s++) {
            double sum = do_segment(job, row, s, bits, &job->workers[id]);
            if (job->row_sums) job->row_sums[row] = sum;
        }
    }
}

size_t obm__onebit_scratch(int64_t cols) {
    size_t bytes = sizeof(worker) + ((size_t)cols / OBM_BLOCK + 1) * sizeof(double);
    return (bytes + 63) / 64 * 64;
}

int64_t obm__onebit_rows(const obm_kernels *k, const obm__pair *pair, obm__scale scale, float *alphas, double *row_sums,
                         int64_t first, int64_t last, uint8_t *signs, void *scratch) {
    worker *w = scratch;
    plane_job job = {.k = k, .pair = pair, .scale = scale, .alphas = &alphas, .stripe = first, .row_sums = row_sums};
    w->partial = (double *)(w + 1);
    job.workers = w;
    job.signs = signs;
    job.bad = INT64_MAX;
    set_shape(&job);
    job.begin = first * job.cols;
    if (last > first) do_rows(&job, 0, (size_t)(last - first), 0);
    return job.bad;
}

float obm__onebit_alpha(const double *row_sums, int64_t rows, int64_t cols) {
    return (float)(obm__tree_sum(row_sums, (size_t)rows) / ((double)rows * (double)cols));
}

static int64_t stripe_rows(const obm_context *ctx, int64_t rows, int64_t cols) {
    int64_t n = (int64_t)ctx->threads * STRIPE / (cols ? cols : 1);
    return n < 1 ? 1 : n < rows ? n : rows;
}

uint64_t obm__onebit_memory(const obm_context *ctx, int64_t rows, int64_t cols) {
    uint64_t worker_bytes = sizeof(worker) + ((uint64_t)cols / OBM_BLOCK + 1) * sizeof(double);
    return (uint64_t)stripe_rows(ctx, rows, cols) * (uint64_t)obm__row_bytes(cols) +
           (uint64_t)ctx->threads * worker_bytes + (uint64_t)rows * sizeof(double);
}

static void job_clear(plane_job *job, int threads) {
    for (int i = 0; job->workers && i < threads; i++) obm_free(job->workers[i].partial);
    obm_free(job->workers);
    obm_free(job->signs);
    obm_free(job->row_sums);
}

static bool job_alloc(plane_job *job, const obm_context *ctx) {
    size_t blocks = (size_t)(job->segment / OBM_BLOCK + 1);
    job->signs = obm__alloc((size_t)stripe_rows(ctx, job->rows, job->cols), (size_t)job->row_bytes);
    job->workers = obm__calloc((size_t)ctx->threads, sizeof *job->workers);
    if (!job->signs || !job->workers) return false;
    for (int i = 0; i < ctx->threads; i++) {
        if (!(job->workers[i].partial = obm__calloc(blocks, sizeof(double)))) return false;
    }
    if (job->scale.kind != OBM_SCALE_MATRIX) return true;
    return (job->row_sums = obm__calloc((size_t)job->rows, sizeof(double))) != NULL;
}

static obm_status run_stripes(plane_job *job, obm_context *ctx, obm__sink_fn sink, void *user, obm_error *err) {
    int64_t stripe = stripe_rows(ctx, job->rows, job->cols);
    size_t grain = (size_t)(OBM_TILE / 4 / (job->cols ? job->cols : 1)) + 1;
    for (job->stripe = 0; job->stripe < job->rows; job->stripe += stripe) {
        int64_t n = job->rows - job->stripe < stripe ? job->rows - job->stripe : stripe;
        obm__parallel(ctx, (size_t)n, grain, do_rows, job);
        if (job->bad != INT64_MAX) return obm__fail_nonfinite(err, job->pair, job->bad);
        OBM_TRY(sink(user, job->signs, (size_t)(n * job->row_bytes), job->stripe + n, err));
    }
    return OBM_OK;
}

static bool all_zero(const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (x[i] != 0) return false;
    }
    return true;
}

obm_status obm__onebit_plane(obm_context *ctx, const obm__pair *pair, obm__scale scale, int plane, float *const *alphas,
                             obm__sink_fn sink, void *user, bool *zero, obm_error *err) {
    plane_job job = {.k = ctx->k, .pair = pair, .scale = scale, .plane = plane, .alphas = alphas, .bad = INT64_MAX};
    set_shape(&job);
    obm_status status = job_alloc(&job, ctx) ? run_stripes(&job, ctx, sink, user, err)
                                             : obm__fail_nomem(err, obm__onebit_memory(ctx, job.rows, job.cols));
    if (status == OBM_OK) {
        if (job.row_sums) alphas[plane][0] = obm__onebit_alpha(job.row_sums, job.rows, job.cols);
        *zero = all_zero(alphas[plane], obm__scale_count(scale, job.rows, job.cols));
    }
    job_clear(&job, ctx->threads);
    return status;
}
