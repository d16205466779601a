/* Task vectors as bit masks over one vector that several models share: making the vector and the masks, and reading a
 * model's task vector back.  Where they are stored is the pack's affair (io/pack_shared.c). */
#include "delta.h"

#include <math.h>
#include <string.h>

/* ---- reading ---- */

static float keep_if(float x, unsigned on) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits &= 0u - on;
    memcpy(&x, &bits, sizeof x);
    return x;
}

void obm__mask_apply(const uint8_t *bits, int64_t first, float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = keep_if(x[i], bits[(first + i) >> 3] >> ((first + i) & 7) & 1u);
}

void obm__masked_read(const obm_kernels *k, const obm__masked *m, int64_t begin, int64_t n, float *d) {
    obm__widen(k, &m->shared, begin, n, d);
    for (int64_t at = 0, piece; at < n; at += piece) {
        int64_t row = (begin + at) / m->cols, col = (begin + at) % m->cols;
        const uint8_t *bits = m->bits + row * m->row_bytes;
        piece = m->cols - col < n - at ? m->cols - col : n - at;
        for (int64_t i = 0; i < piece; i++) d[at + i] *= m->scaling;
        obm__mask_apply(bits, col, d + at, piece);
    }
}

void obm__masked_release(const obm__masked *m, int64_t begin, int64_t n) {
    if (n <= 0) return;
    int64_t first = begin / m->cols, end = (begin + n - 1) / m->cols + 1;
    obm__tensor_release(&m->shared, begin, n);
    obm__pages_release(m->bits + first * m->row_bytes, (size_t)((end - first) * m->row_bytes));
}

/* ---- making ---- */

/* The sum of the task vectors, in the order of the experts (Wang et al., arXiv 2405.07813, section 3), and the largest
 * magnitude on either side of 0. */
typedef struct sums {
    float sum[OBM_BLOCK], most[OBM_BLOCK], least[OBM_BLOCK];
} sums;

static bool add_pair(const obm_kernels *k, const obm__pair *p, bool emr, int64_t begin, int64_t n, sums *s) {
    float d[OBM_BLOCK], scratch[OBM_BLOCK];
    obm__pair_read(k, p, begin, n, d, scratch);
    if (k->find_nonfinite(d, (size_t)n) < (size_t)n) return false;
    k->axpy_f32(s->sum, 1.0f, d, (size_t)n);
    for (int64_t i = 0; emr && i < n; i++) {
        s->most[i] = d[i] > s->most[i] ? d[i] : s->most[i];
        s->least[i] = d[i] < s->least[i] ? d[i] : s->least[i];
    }
    return true;
}

bool obm__shared_read(const obm_kernels *k, const obm__sharing *s, const obm__pair *const *pairs, size_t count,
                      int64_t begin, int64_t n, float *out) {
    sums all = {0};
    for (size_t i = 0; i < count; i++)
        if (!add_pair(k, pairs[i], s->emr, begin, n, &all)) return false;
    /* sgn(sum) * the largest magnitude of that sign (Huang et al., arXiv 2405.17461, section 3.2); a sum of 0 elects
     * none */
    for (int64_t i = 0; i < n && s->emr; i++) out[i] = all.sum[i] > 0 ? all.most[i] : all.sum[i] < 0 ? all.least[i] : 0;
    if (!s->emr) memcpy(out, all.sum, (size_t)n * sizeof *out);
    return k->find_nonfinite(all.sum, (size_t)n) == (size_t)n;
}

/* Which elements are a model's own is as good as random to a branch predictor, hence no branches. */
static uint8_t tall_byte(const obm__sharing *s, const float *d, const float *shared, int64_t n) {
    unsigned byte = 0;
    for (int64_t i = 0; i < n; i++) {
        double own = fabs((double)d[i]), rest = fabs((double)shared[i] - (double)d[i]);
        byte |= (unsigned)(own > s->lambda * rest) << i;
    }
    return (uint8_t)byte;
}

static uint8_t emr_byte(const float *d, const float *shared, int64_t n) {
    unsigned byte = 0;
    for (int64_t i = 0; i < n; i++)
        byte |=
            (((unsigned)(d[i] > 0) & (unsigned)(shared[i] > 0)) | ((unsigned)(d[i] < 0) & (unsigned)(shared[i] < 0)))
            << i;
    return (uint8_t)byte;
}

void obm__mask_pack(const obm__sharing *s, const float *d, const float *shared, int64_t n, uint8_t *bits) {
    for (int64_t at = 0; at < n; at += 8) {
        int64_t m = n - at < 8 ? n - at : 8;
        bits[at / 8] = s->emr ? emr_byte(d + at, shared + at, m) : tall_byte(s, d + at, shared + at, m);
    }
}
