/* Task vectors as bit masks over one vector that several models share: making the vector and the masks, and reading a
 * model's task vector back.  Where they are stored is the pack's affair (io/pack_shared.c). */
#include "delta.h"

#include <math.h>
#include <string.h>

/* ---- reading ---- */

void obm__masked_read(const obm_kernels *k, const obm__masked *m, int64_t begin, int64_t n, float *d) {
    obm__widen(k, &m->shared, begin, n, d);
    for (int64_t at = 0, piece; at < n; at += piece) {
        int64_t row = (begin + at) / m->cols, col = (begin + at) % m->cols;
        const uint8_t *bits = m->bits + row * m->row_bytes;
        piece = m->cols - col < n - at ? m->cols - col : n - at;
        for (int64_t i = 0; i < piece; i++)
            d[at + i] = bits[(col + i) >> 3] >> ((col + i) & 7) & 1 ? m->scaling * d[at + i] : 0;
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

static bool add_pair(const obm_kernels *k, const obm__pair *p, int64_t begin, int64_t n, sums *s) {
    float d[OBM_BLOCK], scratch[OBM_BLOCK];
    obm__pair_read(k, p, begin, n, d, scratch);
    if (k->find_nonfinite(d, (size_t)n) < (size_t)n) return false;
    for (int64_t i = 0; i < n; i++) {
        s->sum[i] += d[i];
        s->most[i] = d[i] > s->most[i] ? d[i] : s->most[i];
        s->least[i] = d[i] < s->least[i] ? d[i] : s->least[i];
    }
    return true;
}

bool obm__shared_read(const obm_kernels *k, const obm__sharing *s, const obm__pair *const *pairs, size_t count,
                      int64_t begin, int64_t n, float *out) {
    sums all = {0};
    for (size_t i = 0; i < count; i++)
        if (!add_pair(k, pairs[i], begin, n, &all)) return false;
    /* sgn(sum) * the largest magnitude of that sign (Huang et al., arXiv 2405.17461, section 3.2); a sum of 0 elects
     * none */
    for (int64_t i = 0; i < n && s->emr; i++) out[i] = all.sum[i] > 0 ? all.most[i] : all.sum[i] < 0 ? all.least[i] : 0;
    if (!s->emr) memcpy(out, all.sum, (size_t)n * sizeof *out);
    return k->find_nonfinite(all.sum, (size_t)n) == (size_t)n;
}

static bool is_tall(const obm__sharing *s, float d, float shared) {
    return fabs((double)d) > s->lambda * fabs((double)shared - (double)d);
}

void obm__mask_pack(const obm_kernels *k, const obm__sharing *s, const float *d, const float *shared, int64_t n,
                    uint8_t *bits) {
    float kept[OBM_BLOCK]; /* signs: + is kept */
    for (int64_t i = 0; i < n && s->emr; i++)
        kept[i] = (d[i] > 0 && shared[i] > 0) || (d[i] < 0 && shared[i] < 0) ? 1 : -1;
    for (int64_t i = 0; i < n && !s->emr; i++) kept[i] = is_tall(s, d[i], shared[i]) ? 1 : -1;
    k->sign_pack(bits, kept, (size_t)n);
}
