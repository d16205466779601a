/* Low-rank task vectors: d = scaling * B A (Hu et al., "LoRA", arXiv 2106.09685, section 4.1), any part of it, without
 * the whole. */
#include "delta.h"

#include <string.h>

/* Elements of d at a time: the sums and a piece of a factor stay in the first-level cache. */
#define PIECE 512
/* Ranks at a time, of the factor that is read one element per rank. */
#define RANKS 64
#define LANES 8

/*
 * To the bit: d[r][c] = (float)(scaling * s), s = the sum over i = 0, 1, ... of B[r][i] * A[i][c] in f64 from 0,
 * factors widened (F64: rounded) to f32 first.  A product of two f32 is exact in f64, so that a fused multiply-add
 * changes nothing: every ISA, tile and thread count gives the same bits.
 */

/* sums[j] += f * x[j]; both hold a multiple of LANES. */
static void add_scaled(double *sums, double f, const float *x, int64_t n) {
    for (int64_t j = 0; j < n; j += LANES)
        for (int q = 0; q < LANES; q++) sums[j + q] += f * (double)x[j + q];
}

/* Columns [col, col + n) of a row: A by rows. */
static void sum_rows(const obm_kernels *k, const obm__lowrank *l, int64_t row, int64_t col, int64_t n, double *sums) {
    float b[RANKS], a[PIECE];
    int64_t padded = (n + LANES - 1) / LANES * LANES;
    memset(a, 0, sizeof a);
    for (int64_t at = 0; at < l->rank; at += RANKS) {
        int64_t m = l->rank - at < RANKS ? l->rank - at : RANKS;
        obm__widen(k, &l->b, row * l->rank + at, m, b);
        for (int64_t i = 0; i < m; i++) {
            obm__widen(k, &l->a, (at + i) * l->cols + col, n, a);
            add_scaled(sums, (double)b[i], a, padded);
        }
    }
}

/* The same of the transposed product: element (row, c) is the dot product of B's row c and A's column `row`. */
static void sum_columns(const obm_kernels *k, const obm__lowrank *l, int64_t row, int64_t col, int64_t n,
                        double *sums) {
    float a[RANKS], b[RANKS];
    for (int64_t at = 0; at < l->rank; at += RANKS) {
        int64_t m = l->rank - at < RANKS ? l->rank - at : RANKS;
        for (int64_t i = 0; i < m; i++) obm__widen(k, &l->a, (at + i) * l->rows + row, 1, &a[i]);
        for (int64_t c = 0; c < n; c++) {
            double sum = sums[c];
            obm__widen(k, &l->b, (col + c) * l->rank + at, m, b);
            for (int64_t i = 0; i < m; i++) sum += (double)a[i] * (double)b[i];
            sums[c] = sum;
        }
    }
}

void obm__lowrank_read(const obm_kernels *k, const obm__lowrank *l, int64_t begin, int64_t n, float *d) {
    double sums[PIECE];
    for (int64_t done = 0, m; done < n; done += m) {
        int64_t row = (begin + done) / l->cols, col = (begin + done) % l->cols;
        m = n - done < l->cols - col ? n - done : l->cols - col;
        if (m > PIECE) m = PIECE;
        memset(sums, 0, sizeof sums);
        (l->transposed ? sum_columns : sum_rows)(k, l, row, col, m, sums);
        for (int64_t i = 0; i < m; i++) d[done + i] = (float)(l->scaling * sums[i]);
    }
}

uint64_t obm__lowrank_bytes(const obm__lowrank *l) { return obm__tensor_bytes(&l->a) + obm__tensor_bytes(&l->b); }

obm_status obm__lowrank_check(const obm__lowrank *l, const char *name, const obm_tensor *base, obm_error *err) {
    char a[160], b[160], want[160];
    bool matrices = l->a.ndim == 2 && l->b.ndim == 2 && base->ndim == 2;
    int64_t in = l->transposed ? base->shape[0] : base->shape[1], out = l->transposed ? base->shape[1] : base->shape[0];
    if (matrices && l->a.shape[0] == l->rank && l->b.shape[1] == l->rank && l->a.shape[1] == in &&
        l->b.shape[0] == out && obm__is_float(l->a.dtype) && obm__is_float(l->b.dtype) && obm__is_float(base->dtype))
        return OBM_OK;
    return obm__fail(
        err, OBM_E_SHAPE,
        "tensor %s of shape %s %s: expected LoRA factors of rank %lld, A (rank, %s), B (%s, rank), found A "
        "%s %s, B %s %s",
        name, obm__shape_text(base, want, sizeof want), obm_dtype_name(base->dtype), (long long)l->rank,
        l->transposed ? "rows" : "columns", l->transposed ? "columns" : "rows", obm__shape_text(&l->a, a, sizeof a),
        obm_dtype_name(l->a.dtype), obm__shape_text(&l->b, b, sizeof b), obm_dtype_name(l->b.dtype));
}
