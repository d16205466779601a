/* The dynamic merge, element by element and row by row.  What a route asks of each tensor is decided in plan.c. */
#include "kth.h"
#include "plan.h"

#include <string.h>

/* ---- the rule ---- */

double obm__ties_remainder(const double *d, size_t n) {
    double sum = 0, kept = 0;
    size_t agreeing = 0;
    for (size_t i = 0; i < n; i++) sum += d[i];
    if (sum == 0) return 0;
    for (size_t i = 0; i < n; i++) {
        if (sum > 0 ? d[i] > 0 : d[i] < 0) {
            kept += d[i];
            agreeing++;
        }
    }
    return kept / (double)agreeing;
}

/* x * sum > 0 says that x is no zero and agrees (f32 magnitudes cannot underflow in the product), and adding 0 for the
 * others changes no bit. */
void obm__ties_columns(const double *d, size_t count, int64_t stride, int64_t n, double *out) {
    double sum[OBM_ROUTE_CHUNK], agreeing[OBM_ROUTE_CHUNK];
    for (int64_t i = 0; i < n; i++) sum[i] = agreeing[i] = out[i] = 0;
    for (size_t j = 0; j < count; j++) {
        for (int64_t i = 0; i < n; i++) sum[i] += d[(int64_t)j * stride + i];
    }
    for (size_t j = 0; j < count; j++) {
        for (int64_t i = 0; i < n; i++) {
            double x = d[(int64_t)j * stride + i];
            bool agrees = x * sum[i] > 0;
            out[i] += agrees ? x : 0.0;
            agreeing[i] += agrees ? 1.0 : 0.0;
        }
    }
    for (int64_t i = 0; i < n; i++) out[i] = agreeing[i] > 0 ? out[i] / agreeing[i] : 0.0;
}

/* What expert j adds to the remainder of a route to expert k. */
static double other_delta(const obm__merge_rule *rule, double other, double routed) {
    return rule->reading == OBM_READING_RECOMPUTED ? other - routed : other;
}

/* theta(k) - theta_base: the routed expert as it is, and the others as the reading takes them. */
static double routed_delta(const obm__merge_rule *rule, const double *d, size_t k) {
    if (rule->lambda == 0) return d[k];
    double others[OBM_ROUTE_TASKS];
    size_t n = 0;
    for (size_t j = 0; j < rule->n_tasks; j++) {
        if (j != k) others[n++] = other_delta(rule, d[j], d[k]);
    }
    return d[k] + rule->lambda * obm__ties_remainder(others, n);
}

double obm__merged_delta(const double *d, size_t n_tasks, const double *weights, double lambda, obm_reading reading) {
    obm__merge_rule rule = {.n_tasks = n_tasks, .weights = weights, .lambda = lambda, .reading = reading};
    double sum = 0;
    for (size_t k = 0; k < n_tasks; k++) {
        if (weights[k] != 0) sum += weights[k] * routed_delta(&rule, d, k);
    }
    return sum;
}

/* ---- the rule over a chunk of columns, with trims: the same operations in the same order, element for element ---- */

typedef struct chunk {
    double d[OBM_ROUTE_TASKS][OBM_ROUTE_CHUNK];      /* of every expert; only the first n_tasks are touched */
    double others[OBM_ROUTE_TASKS][OBM_ROUTE_CHUNK]; /* the remainder of the route at hand */
    double ties[OBM_ROUTE_CHUNK], sum[OBM_ROUTE_CHUNK];
    float base[OBM_ROUTE_CHUNK];
} chunk;

static bool keeps(const obm__route_cut *cut, double x, int64_t index) {
    uint32_t bits = obm__magnitude_bits((float)x);
    return bits > cut->threshold || (bits == cut->threshold && index <= cut->last);
}

/* The others of expert k at elements [index, index + n); returns how many. */
static size_t collect_others(const obm__merge_rule *rule, const obm__route_cut *cuts, size_t k, int64_t index,
                             int64_t n, chunk *c) {
    size_t count = 0;
    for (size_t j = 0; j < rule->n_tasks; j++) {
        if (j == k) continue;
        double *x = c->others[count++];
        const obm__route_cut *cut = cuts ? &cuts[obm__route_cut_index(rule, k, j)] : NULL;
        for (int64_t i = 0; i < n; i++) x[i] = other_delta(rule, c->d[j][i], c->d[k][i]);
        for (int64_t i = 0; cut && cut->active && i < n; i++) x[i] = keeps(cut, x[i], index + i) ? x[i] : 0;
    }
    return count;
}

/* c->sum = theta(w) - theta_base of elements [index, index + n). */
static void merge_chunk(const obm__merge_rule *rule, const obm__route_cut *cuts, int64_t index, int64_t n, chunk *c) {
    memset(c->sum, 0, sizeof c->sum);
    for (size_t k = 0; k < rule->n_tasks; k++) {
        double w = rule->weights[k], lambda = rule->lambda;
        if (w == 0) continue;
        if (lambda != 0)
            obm__ties_columns(c->others[0], collect_others(rule, cuts, k, index, n, c), OBM_ROUTE_CHUNK, n, c->ties);
        if (lambda != 0)
            for (int64_t i = 0; i < n; i++) c->sum[i] += w * (c->d[k][i] + lambda * c->ties[i]);
        else
            for (int64_t i = 0; i < n; i++) c->sum[i] += w * c->d[k][i];
    }
}

/* ---- reading base and task vectors ---- */

void obm__route_read_base(const obm__route_plan *r, size_t tensor, int64_t row, int64_t col, int64_t n, float *out) {
    obm__widen(r->pack->ctx->k, &r->pack->tensors[tensor].base, row * r->tensors[tensor].cols + col, n, out);
}

void obm__route_read(const obm__route_plan *r, size_t task, size_t tensor, int64_t row, int64_t col, int64_t n,
                     const float *base, double *out) {
    const obm__pack_entry *e = obm__route_entry(r->pack, task, tensor);
    bool comes_in = obm__route_involves(&r->rule, task);
    if (comes_in && e->mode == OBM_MODE_1BIT) {
        obm__planes_read_f64(&e->planes, row, col, n, out);
    } else if (comes_in && obm__entry_is_dense(e)) {
        float d[OBM_ROUTE_CHUNK];
        int64_t at = row * r->tensors[tensor].cols + col;
        if (e->mode == OBM_MODE_MASK) {
            obm__masked_read(r->pack->ctx->k, &e->masked, at, n, d);
        } else if (e->lora.rank) {
            obm__lowrank_read(r->pack->ctx->k, &e->lora, at, n, d);
        } else {
            obm__widen(r->pack->ctx->k, &e->full, at, n, d);
            r->pack->ctx->k->sub_f32(d, d, base, (size_t)n);
        }
        for (int64_t i = 0; i < n; i++) out[i] = d[i];
    } else {
        memset(out, 0, (size_t)n * sizeof *out);
    }
}

/* ---- rows ---- */

/* theta = theta_base + v(pattern), rounded once.  `previous` avoids a new table where the alphas have not changed. */
typedef struct pattern_table {
    bool filled;
    float alpha[OBM_PATTERN_PLANES];
    double value[OBM_PATTERNS];
} pattern_table;

static void tabulate(const obm__route_plan *r, const obm__plane_set *s, int64_t row, int64_t col,
                     pattern_table *table) {
    float alpha[OBM_PATTERN_PLANES];
    obm__plane_set_alphas(s, row, col, alpha);
    size_t size = (size_t)s->n * sizeof *alpha;
    if (table->filled && !memcmp(alpha, table->alpha, size)) return;
    memcpy(table->alpha, alpha, size);
    table->filled = true;
    obm__pattern_values(&r->rule, s, alpha, table->value);
}

static void row_by_patterns(const obm__route_plan *r, size_t tensor, int64_t row, pattern_table *table, float *out) {
    const obm__route_tensor *t = &r->tensors[tensor];
    uint8_t pattern[OBM_ROUTE_CHUNK];
    for (int64_t col = 0, n; col < t->cols; col += n) {
        n = obm__plane_set_span(&t->planes, col);
        if (n > OBM_ROUTE_CHUNK) n = OBM_ROUTE_CHUNK;
        tabulate(r, &t->planes, row, col, table);
        obm__plane_set_patterns(&t->planes, row, col, n, pattern);
        obm__route_read_base(r, tensor, row, col, n, out + col);
        for (int64_t i = 0; i < n; i++) out[col + i] = (float)(out[col + i] + table->value[pattern[i]]);
    }
}

static void row_by_elements(const obm__route_plan *r, size_t tensor, int64_t row, chunk *c, float *out) {
    const obm__route_tensor *t = &r->tensors[tensor];
    for (int64_t col = 0, n; col < t->cols; col += n) {
        n = t->cols - col < OBM_ROUTE_CHUNK ? t->cols - col : OBM_ROUTE_CHUNK;
        obm__route_read_base(r, tensor, row, col, n, c->base);
        for (size_t j = 0; j < r->rule.n_tasks; j++) obm__route_read(r, j, tensor, row, col, n, c->base, c->d[j]);
        merge_chunk(&r->rule, t->cuts, row * t->cols + col, n, c);
        for (int64_t i = 0; i < n; i++) out[col + i] = (float)(c->base[i] + c->sum[i]);
    }
}

static void widen_rows(const obm__route_plan *r, const obm_tensor *from, int64_t row, int64_t cols, int64_t n,
                       float *out) {
    obm__widen(r->pack->ctx->k, from, row * cols, n * cols, out);
}

static obm_status base_rows(const obm__route_plan *r, size_t tensor, int64_t row, int64_t n, float *out,
                            obm_error *err) {
    const obm__route_tensor *t = &r->tensors[tensor];
    switch (t->kind) {
    case OBM_ROUTE_BASE:
        widen_rows(r, &r->pack->tensors[tensor].base, row, t->cols, n, out);
        break;
    case OBM_ROUTE_EXPERT:
        widen_rows(r, &obm__route_entry(r->pack, r->hard, tensor)->full, row, t->cols, n, out);
        break;
    case OBM_ROUTE_PATTERNS: {
        pattern_table table = {.filled = false};
        for (int64_t i = 0; i < n; i++) row_by_patterns(r, tensor, row + i, &table, out + i * t->cols);
        break;
    }
    case OBM_ROUTE_ELEMENTS: {
        chunk *c = obm__alloc(1, sizeof *c);
        if (!c) return obm__fail_nomem(err, sizeof *c);
        for (int64_t i = 0; i < n; i++) row_by_elements(r, tensor, row + i, c, out + i * t->cols);
        obm_free(c);
    }
    }
    return OBM_OK;
}

obm_status obm__route_rows(const obm__route_plan *r, size_t tensor, int64_t row, int64_t n, float *out,
                           obm_error *err) {
    const obm__route_tensor *t = &r->tensors[tensor];
    int64_t own = row >= t->rows ? 0 : row + n > t->rows ? t->rows - row : n;
    if (own > 0) OBM_TRY(base_rows(r, tensor, row, own, out, err));
    if (own == n) return OBM_OK;
    int64_t first = t->extra_first + (row + own - t->rows);
    widen_rows(r, t->extra, first, t->cols, n - own, out + own * t->cols);
    return OBM_OK;
}

typedef struct row_job {
    const obm__route_plan *plan;
    size_t tensor;
    float *out;
    _Atomic int failed;
} row_job;

static void run_rows(void *arg, size_t begin, size_t end, int worker) {
    row_job *job = arg;
    (void)worker;
    float *out = job->out + begin * (size_t)job->plan->tensors[job->tensor].cols;
    if (obm__route_rows(job->plan, job->tensor, (int64_t)begin, (int64_t)(end - begin), out, NULL) != OBM_OK)
        job->failed = 1;
}

/* Elements between two looks at the pulse, per thread: the elementwise rule takes some tens of ms for them. */
#define SLICE ((int64_t)1 << 19)

obm_status obm__route_materialise(const obm__route_plan *r, size_t tensor, obm__pulse *pulse, float *out,
                                  obm_error *err) {
    const obm__route_tensor *t = &r->tensors[tensor];
    obm_context *ctx = r->pack->ctx;
    row_job job = {.plan = r, .tensor = tensor, .out = out};
    size_t slice = (size_t)(ctx->threads * SLICE / (t->cols ? t->cols : 1)) + 1;
    OBM_TRY(obm__parallel_slices(ctx, (size_t)(t->rows + t->n_extra), 1, slice, run_rows, &job, pulse, err));
    /* Running out of memory is the only way in which rows fail. */
    return job.failed ? obm__fail_nomem(err, sizeof(chunk)) : OBM_OK;
}

obm__route_kind obm__route_kind_of(const obm__route_plan *r, size_t tensor) { return r->tensors[tensor].kind; }
