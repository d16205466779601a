/* Planes read back: their scales and values, in f32 as FORMAT.md defines them and in f64 for what is rounded once.  How
 * planes are made is onebit.c's. */
#include "delta.h"

#include <string.h>

/* Columns of f64 at a time. */
#define PIECE 512

static int64_t groups_per_row(const obm__planes *p) { return obm__scale_count(p->scale, 1, p->cols); }

float obm__planes_alpha(const obm__planes *p, int plane, int64_t row, int64_t col) {
    const float *alpha = p->alphas[plane];
    switch (p->scale.kind) {
    case OBM_SCALE_MATRIX:
        return alpha[0];
    case OBM_SCALE_ROW:
        return alpha[row];
    case OBM_SCALE_GROUP:
        break;
    }
    return alpha[row * groups_per_row(p) + col / p->scale.group];
}

int64_t obm__planes_span(const obm__planes *p, int64_t col) {
    int64_t rest = p->cols - col;
    if (p->scale.kind != OBM_SCALE_GROUP) return rest;
    int64_t group = p->scale.group - col % p->scale.group;
    return group < rest ? group : rest;
}

static bool sign_bit(const uint8_t *row, int64_t col) { return row[col >> 3] >> (col & 7) & 1; }

void obm__planes_read_f64(const obm__planes *p, int64_t row, int64_t col, int64_t n, double *out) {
    memset(out, 0, (size_t)n * sizeof *out);
    for (int plane = 0; plane < p->n; plane++) {
        const uint8_t *signs = p->signs[plane] + row * p->row_bytes;
        for (int64_t i = 0, m; i < n; i += m) {
            double alpha = obm__planes_alpha(p, plane, row, col + i);
            m = obm__planes_span(p, col + i);
            if (m > n - i) m = n - i;
            for (int64_t j = i; j < i + m; j++) out[j] += sign_bit(signs, col + j) ? alpha : -alpha;
        }
    }
}

/* y[i] += sign of bit (col + i) times alpha; whole bytes go to the kernel. */
static void add_signs(const obm_kernels *k, float *y, const uint8_t *bits, int64_t col, float alpha, int64_t n) {
    int64_t i = 0;
    for (; i < n && (col + i) % 8; i++) y[i] += bits[(col + i) / 8] >> ((col + i) % 8) & 1 ? alpha : -alpha;
    if (i < n) k->sign_axpy(y + i, bits + (col + i) / 8, alpha, (size_t)(n - i));
}

static void add_plane(const obm_kernels *k, const obm__planes *p, int plane, int64_t row, int64_t col, int64_t n,
                      float *out) {
    const uint8_t *bits = p->signs[plane] + row * p->row_bytes;
    const float *alphas = p->alphas[plane];
    if (p->scale.kind != OBM_SCALE_GROUP) {
        add_signs(k, out, bits, col, alphas[p->scale.kind == OBM_SCALE_ROW ? row : 0], n);
        return;
    }
    int64_t group = p->scale.group;
    alphas += row * groups_per_row(p);
    for (int64_t at = col, end = col + n, next; at < end; at = next) {
        next = (at / group + 1) * group < end ? (at / group + 1) * group : end;
        add_signs(k, out + (at - col), bits, at, alphas[at / group], next - at);
    }
}

void obm__planes_read_row(const obm_kernels *k, const obm__planes *p, int64_t row, int64_t col, int64_t n, float *out) {
    memset(out, 0, (size_t)n * sizeof *out);
    for (int plane = 0; plane < p->n; plane++) add_plane(k, p, plane, row, col, n, out);
}

/* A sum of two f32 in f64, rounded to f32, is their f32 sum: twice 24 bits and two more fit in f64's 53. */
void obm__planes_add_row(const obm_kernels *k, const obm__planes *p, int64_t row, int64_t col, int64_t n, float *x) {
    double d[PIECE];
    if (p->n == 1) add_plane(k, p, 0, row, col, n, x);
    for (int64_t at = 0, m; p->n > 1 && at < n; at += m) {
        m = n - at < PIECE ? n - at : PIECE;
        obm__planes_read_f64(p, row, col + at, m, d);
        for (int64_t i = 0; i < m; i++) x[at + i] = (float)(x[at + i] + d[i]);
    }
}
