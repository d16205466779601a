/* Tensors whose rows are those of others: what a merge reads where the result's vocabulary is not its inputs'. */
#include "merge.h"

/* Columns that one worker sums at a time; a multiple of a cache line of every dtype. */
#define COLUMNS 256

void obm__rows_read(const obm_kernels *k, const obm__rows *r, size_t input, uint64_t begin, size_t n, float *out,
                    float *scratch) {
    for (size_t done = 0; done < n;) {
        uint64_t at = begin + done, row = at / r->cols, col = at % r->cols;
        size_t part = r->cols - col < n - done ? (size_t)(r->cols - col) : n - done;
        const obm__row *from = &r->maps[input * r->rows + row];
        if (from->kind == OBM_ROW_ZERO) {
            memset(out + done, 0, part * sizeof *out);
        } else if (from->kind == OBM_ROW_MADE) {
            memcpy(out + done, r->made + from->row * r->cols + col, part * sizeof *out);
        } else {
            int64_t first = (int64_t)(from->row * r->cols + col);
            const obm__pair *change = r->changes[from->input];
            if (change)
                obm__pair_values(k, change, first, (int64_t)part, out + done, scratch);
            else
                obm__widen(k, &r->sources[from->input], first, (int64_t)part, out + done);
        }
        done += part;
    }
}

/* ---- rows that are means ---- */

typedef struct filling {
    const obm_kernels *k;
    obm__rows *rows;
    obm_context *ctx;
    _Atomic int stop;
} filling;

/* mean of what the inputs have at this row of their maps */
static void mean_of_inputs(const filling *f, uint64_t row, uint64_t col, size_t n, float *out, float *x,
                           float *scratch) {
    obm__rows *r = f->rows;
    memset(out, 0, n * sizeof *out);
    size_t count = 0;
    for (size_t i = 0; i < r->n; i++) {
        if (r->maps[i * r->rows + row].kind != OBM_ROW_INPUT) continue;
        obm__rows_read(f->k, r, i, row * r->cols + col, n, x, scratch);
        for (size_t c = 0; c < n; c++) out[c] += x[c];
        count++;
    }
    for (size_t c = 0; c < n; c++) out[c] /= (float)count;
}

/* The mean of all rows in front of the padding (Hewitt, Initializing New Word Embeddings for Pretrained Language
 * Models, 2021). */
static void mean_of_rows(const filling *f, size_t input, uint64_t col, size_t n, float *out, float *x, float *scratch) {
    obm__rows *r = f->rows;
    double sum[COLUMNS] = {0};
    for (uint64_t row = 0; row < r->filled && !f->stop; row++) {
        obm__rows_read(f->k, r, input, row * r->cols + col, n, x, scratch);
        for (size_t c = 0; c < n; c++) sum[c] += x[c];
    }
    for (size_t c = 0; c < n; c++) out[c] = (float)(sum[c] / (double)r->filled);
}

static void fill_columns(void *arg, size_t first, size_t last, int worker) {
    (void)worker;
    const filling *f = arg;
    obm__rows *r = f->rows;
    float x[COLUMNS], scratch[COLUMNS];
    for (size_t b = first; b < last; b++) {
        uint64_t col = (uint64_t)b * COLUMNS;
        size_t n = r->cols - col < COLUMNS ? (size_t)(r->cols - col) : COLUMNS;
        for (size_t m = 0; m < r->n_means && !f->stop; m++)
            mean_of_inputs(f, r->means[m], col, n, r->made + m * r->cols + col, x, scratch);
        for (size_t i = 0; r->rows > r->filled && i < r->n; i++)
            mean_of_rows(f, i, col, n, r->made + (r->n_means + i) * r->cols + col, x, scratch);
    }
}

uint64_t obm__rows_made(const obm__rows *r) { return r->n_means + (r->rows > r->filled ? r->n : 0); }

static void fill_all(void *arg) {
    filling *f = arg;
    obm__parallel(f->ctx, (size_t)((f->rows->cols + COLUMNS - 1) / COLUMNS), 1, fill_columns, f);
}

obm_status obm__rows_fill(const obm__run *run, obm__rows *r, obm_error *err) {
    uint64_t made = obm__rows_made(r);
    if (r->made || made == 0) return OBM_OK;
    r->made = obm__alloc((size_t)made, (size_t)r->cols * sizeof *r->made);
    if (!r->made) return obm__fail_nomem(err, made * r->cols * sizeof *r->made);
    filling f = {.k = run->ctx->k, .rows = r, .ctx = run->ctx};
    obm__pulse pulse = obm__pulse_new(run->ctx, run->progress, run->user, run->what, run->total);
    pulse.done = run->done;
    obm_status status = obm__watched(fill_all, &f, &f.stop, &pulse, err);
    if (status == OBM_OK) return OBM_OK;
    obm_free(r->made);
    r->made = NULL;
    return status;
}

void obm__rows_free(obm__rows *r) {
    if (!r) return;
    obm_free(r->sources);
    obm_free(r->changes);
    obm_free(r->maps);
    obm_free(r->means);
    obm_free(r->made);
    obm_free(r);
}
