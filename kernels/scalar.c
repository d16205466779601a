/* The specification of every kernel in portable C; it is meant to be read, not to be fast. */
#include "tables.h"

#include <math.h>
#include <string.h>

static uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float from_bits(uint32_t u) {
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

/* Inputs may lie anywhere: tensors of mapped files need not be aligned. */
static uint16_t half_at(const uint16_t *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return h;
}

static float float_at(const float *p) {
    float x;
    memcpy(&x, p, sizeof x);
    return x;
}

static float widen_bf16(uint16_t h) { return from_bits((uint32_t)h << 16); }

/* A NaN comes out quiet, as vcvtph2ps and fcvt do. */
static float widen_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ff;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
    if (exponent) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13); /* 112 = 127 - 15 */
    float magnitude = (float)mantissa * 0x1p-24f;                                   /* subnormal or zero: exact */
    return sign ? -magnitude : magnitude;
}

/* Round to nearest even: half of the last place minus one, plus the last place's own bit, carries exactly when it
 * should. */
static uint16_t narrow_bf16(float x) {
    uint32_t u = bits_of(x);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static uint16_t narrow_f16(float x) {
    uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (a >> 13 & 0x1ff));
    if (a >= 0x47800000) return (uint16_t)(sign | 0x7c00); /* >= 65536; 65520..65536 overflows by the carry below */
    if (a < 0x38800000) { /* below 2^-14, the smallest normal: adding 0.5 puts 2^-24 at the last place of the sum */
        uint32_t rounded = bits_of(from_bits(a) + 0.5f) - 0x3f000000;
        return (uint16_t)(sign | rounded);
    }
    uint32_t rebased = a - (112u << 23);
    return (uint16_t)(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

void obm__scalar_bf16_to_f32(float *dst, const uint16_t *src, size_t n) {
    for (size_t i = 0; i < n; i++) dst[i] = widen_bf16(half_at(src + i));
}

void obm__scalar_f16_to_f32(float *dst, const uint16_t *src, size_t n) {
    for (size_t i = 0; i < n; i++) dst[i] = widen_f16(half_at(src + i));
}

void obm__scalar_f32_to_bf16(uint16_t *dst, const float *src, size_t n) {
    for (size_t i = 0; i < n; i++) dst[i] = narrow_bf16(float_at(src + i));
}

void obm__scalar_f32_to_f16(uint16_t *dst, const float *src, size_t n) {
    for (size_t i = 0; i < n; i++) dst[i] = narrow_f16(float_at(src + i));
}

void obm__scalar_sub_f32(float *d, const float *a, const float *b, size_t n) {
    for (size_t i = 0; i < n; i++) d[i] = float_at(a + i) - float_at(b + i);
}

void obm__scalar_sub_bf16(float *d, const uint16_t *a, const uint16_t *b, size_t n) {
    for (size_t i = 0; i < n; i++) d[i] = widen_bf16(half_at(a + i)) - widen_bf16(half_at(b + i));
}

void obm__scalar_axpy_f32(float *y, float a, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float product = a * float_at(x + i);
        y[i] += product;
    }
}

void obm__scalar_mix_f32(float *out, const float *const *c, const double *w, size_t count, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double sum = w[0] * (double)c[0][i];
        for (size_t j = 1; j < count; j++) sum += w[j] * (double)c[j][i];
        out[i] = (float)sum;
    }
}

size_t obm__scalar_find_nonfinite(const float *x, size_t n) {
    size_t i = 0;
    while (i < n && (bits_of(float_at(x + i)) & 0x7fffffff) < 0x7f800000) i++;
    return i;
}

size_t obm__scalar_find_above(const float *x, float a, size_t n) {
    size_t i = 0;
    while (i < n && x[i] <= a) i++;
    return i;
}

double obm__scalar_abs_sum(const float *x, size_t n) {
    double lane[16] = {0};
    for (size_t i = 0; i < n; i++) lane[i % 16] += fabs((double)float_at(x + i));
    return obm__lane_sum(lane);
}

double obm__scalar_dot(const float *x, const float *y, size_t n) {
    double lane[16] = {0};
    for (size_t i = 0; i < n; i++) lane[i % 16] += (double)float_at(x + i) * (double)float_at(y + i);
    return obm__lane_sum(lane);
}

size_t obm__scalar_count_zero(const float *x, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += float_at(x + i) == 0;
    return count;
}

void obm__scalar_sign_pack(uint8_t *bits, const float *d, size_t n) {
    for (size_t byte = 0; byte < n / 8 + (n % 8 != 0); byte++) {
        unsigned value = 0;
        for (size_t i = byte * 8; i < n && i < byte * 8 + 8; i++) value |= (unsigned)(float_at(d + i) >= 0) << i % 8;
        bits[byte] = (uint8_t)value;
    }
}

double obm__scalar_sign_sum_bf16(uint8_t *bits, const uint16_t *a, const uint16_t *b, size_t n) {
    float d[16];
    double lane[16] = {0};
    for (size_t i = 0; i < n; i += 16) {
        size_t m = n - i < 16 ? n - i : 16;
        obm__scalar_sub_bf16(d, a + i, b + i, m);
        obm__scalar_sign_pack(bits + i / 8, d, m);
        for (size_t j = 0; j < m; j++) lane[j] += fabs((double)d[j]);
    }
    return obm__lane_sum(lane);
}

void obm__scalar_sign_axpy(float *y, const uint8_t *bits, float alpha, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] += bits[i / 8] >> i % 8 & 1 ? alpha : -alpha;
}

void obm__scalar_magnitude_histogram(uint32_t *histogram, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) histogram[bits_of(float_at(x + i)) >> 16 & 0x7fff]++;
}

/* ---- static merges ---- */

static int is_finite(float x) { return (bits_of(x) & 0x7fffffff) < 0x7f800000; }

size_t obm__scalar_delta_bf16(float *d, const uint16_t *a, const uint16_t *b, int round, uint32_t least, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float x = widen_bf16(half_at(a + i));
        if (b) x -= widen_bf16(half_at(b + i));
        if (round) x = widen_bf16(narrow_bf16(x));
        if (!is_finite(x)) return i;
        d[i] = (bits_of(x) & 0x7fffffff) >= least ? x : 0;
    }
    return n;
}

void obm__scalar_count_from(uint32_t *counts, const uint32_t *from, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < 8; k++) counts[k] += (bits_of(float_at(x + i)) & 0x7fffffff) >= from[k];
}

void obm__scalar_low_histogram(uint32_t *histogram, uint32_t high, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t u = bits_of(float_at(x + i));
        if ((u >> 16 & 0x7fff) == high) histogram[u & 0xffff]++;
    }
}

void obm__scalar_lows_f32(uint16_t *out, size_t *found, size_t *zeros, uint32_t high, const float *x, size_t n) {
    *found = *zeros = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t u = bits_of(float_at(x + i));
        if ((u >> 16 & 0x7fff) != high) continue;
        if ((uint16_t)u)
            out[(*found)++] = (uint16_t)u;
        else
            ++*zeros;
    }
}

void obm__scalar_keep_from(float *x, uint32_t least, size_t n) {
    for (size_t i = 0; i < n; i++)
        if ((bits_of(x[i]) & 0x7fffffff) < least) x[i] = 0;
}

void obm__scalar_agree_f32(float *out, const obm__agreement *m, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float sum = 0, mixed = 0, divisor = 0;
        for (size_t t = 0; t < m->count; t++) {
            float vote = m->deltas[t * m->stride + i] * m->votes[t];
            sum += vote;
        }
        if (sum == 0) sum = m->zero_sign;
        for (size_t t = 0; t < m->count; t++) {
            float d = m->deltas[t * m->stride + i], vote = d * m->votes[t], product = d * m->weights[t];
            if (vote == 0 || (bits_of(vote) ^ bits_of(sum)) >> 31) continue;
            mixed += product;
            divisor += m->weights[t];
        }
        if (m->normalize) mixed /= divisor == 0 ? 1 : divisor;
        mixed *= m->lambda;
        out[i] = m->base ? m->base[i] + mixed : mixed;
    }
}

void obm__scalar_sum_f32(float *out, const obm__agreement *m, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float mixed = 0;
        for (size_t t = 0; t < m->count; t++) {
            float product = m->deltas[t * m->stride + i] * m->weights[t];
            mixed += product;
        }
        mixed /= m->divisor;
        mixed *= m->lambda;
        out[i] = m->base ? m->base[i] + mixed : mixed;
    }
}

size_t obm__scalar_store_bf16(uint16_t *out, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        out[i] = narrow_bf16(float_at(x + i));
        if (!is_finite(widen_bf16(out[i]))) return i;
    }
    return n;
}

size_t obm__scalar_count_bf16(uint32_t *counts, const uint16_t *from, const uint16_t *a, const uint16_t *b, int round,
                              size_t n) {
    for (size_t i = 0; i < n; i++) {
        float d;
        if (!obm__scalar_delta_bf16(&d, a + i, b ? b + i : b, round, 0, 1)) return i;
        for (size_t k = 0; k < 8; k++) counts[k] += (bits_of(d) >> 16 & 0x7fff) >= from[k];
    }
    return n;
}

size_t obm__scalar_lows_bf16(uint16_t *out, size_t *found, size_t *zeros, uint32_t high, const uint16_t *a,
                             const uint16_t *b, size_t n) {
    *found = *zeros = 0;
    for (size_t i = 0; i < n; i++) {
        float d;
        if (!obm__scalar_delta_bf16(&d, a + i, b ? b + i : b, 0, 0, 1)) return i;
        uint16_t low = (uint16_t)bits_of(d);
        if ((bits_of(d) >> 16 & 0x7fff) != high) continue;
        if (low)
            out[(*found)++] = low;
        else
            ++*zeros;
    }
    return n;
}

size_t obm__scalar_sizes_bf16(uint16_t *out, uint16_t *most, const uint16_t *a, const uint16_t *b, int round,
                              size_t n) {
    *most = 0;
    for (size_t i = 0; i < n; i++) {
        float d;
        if (!obm__scalar_delta_bf16(&d, a + i, b ? b + i : b, round, 0, 1)) return i;
        out[i] = bits_of(d) >> 16 & 0x7fff;
        if (out[i] > *most) *most = out[i];
    }
    return n;
}

obm__tile obm__tile_behind(const obm__tile *t, size_t i, obm__tile_rest *room) {
    obm__tile rest = *t;
    for (size_t m = 0; m < t->count; m++) {
        room->models[m] = t->models[m] + i;
        if (t->keep) room->keep[m] = t->keep[m] ? t->keep[m] + i / 8 : NULL;
    }
    rest.models = room->models;
    if (t->keep) rest.keep = room->keep;
    if (t->base) rest.base = t->base + i;
    return rest;
}

/* The masked deltas of element i; 0: one of them is not finite. */
static int tile_deltas(const obm__tile *t, size_t i, float *d) {
    for (size_t m = 0; m < t->count; m++) {
        const uint8_t *keep = t->keep ? t->keep[m] : NULL;
        const uint16_t *base = t->base ? t->base + i : NULL;
        if (!obm__scalar_delta_bf16(d + m, t->models[m] + i, base, t->round, t->least[m], 1)) return 0;
        if (keep && !(keep[i / 8] >> i % 8 & 1)) d[m] = 0;
        if (t->factors) d[m] *= t->factors[m];
    }
    return 1;
}

size_t obm__scalar_merge_bf16(uint16_t *out, const obm__tile *t, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float d[OBM__TILE_MODELS], base, mixed;
        obm__agreement m = {d,         t->count, 1, t->weights, t->votes, NULL, t->lambda, t->zero_sign, t->normalize,
                            t->divisor};
        if (!tile_deltas(t, i, d)) return i;
        if (t->base) base = widen_bf16(half_at(t->base + i)), m.base = &base;
        (t->agree ? obm__scalar_agree_f32 : obm__scalar_sum_f32)(&mixed, &m, 1);
        if (!obm__scalar_store_bf16(out + i, &mixed, 1)) return i;
    }
    return n;
}

size_t obm__scalar_vote_bf16(int64_t *votes, const obm__tile *t, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float d[OBM__TILE_MODELS], sum = 0;
        if (!tile_deltas(t, i, d)) return i;
        for (size_t m = 0; m < t->count; m++) {
            float vote = d[m] * t->votes[m];
            sum += vote;
        }
        *votes += (sum > 0) - (sum < 0);
    }
    return n;
}

static uint64_t mixed_draw(uint64_t z) {
    z = (z ^ z >> 30) * OBM__MIX_FIRST;
    z = (z ^ z >> 27) * OBM__MIX_SECOND;
    return z ^ z >> 31;
}

void obm__scalar_random_bits(uint8_t *bits, uint64_t state, uint64_t limit, size_t n) {
    memset(bits, 0, (n + 7) / 8);
    for (size_t i = 0; i < n; i++) {
        state += OBM__GOLDEN;
        bits[i / 8] |= (uint8_t)((mixed_draw(state) >> 11 < limit) << i % 8);
    }
}

void obm__scalar_random_tops(uint32_t *out, uint64_t state, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = (uint32_t)(mixed_draw(state += OBM__GOLDEN) >> 32);
}

void obm__scalar_random_highs(uint16_t *out, uint64_t state, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = (uint16_t)(mixed_draw(state += OBM__GOLDEN) >> 48);
}

void obm__scalar_choose_sizes(uint8_t *kept, uint8_t *open, const uint16_t *highs, const uint16_t *sizes,
                              const obm__choice *c, size_t n) {
    memset(kept, 0, (n + 7) / 8);
    memset(open, 0, (n + 7) / 8);
    for (size_t i = 0; i < n; i++) {
        unsigned at = (highs[i] > c->from ? (unsigned)highs[i] - c->from : 0) * c->step >> 16;
        if (at > 15) at = 15;
        unsigned stays = sizes[i] >= c->keep[at], goes = sizes[i] < c->drop[at];
        kept[i / 8] |= (uint8_t)(stays << i % 8);
        open[i / 8] |= (uint8_t)(!(stays | goes) << i % 8);
    }
}

void obm__sum_sizes_rest(double *sums, double lane[2][16], const uint16_t *sizes, const uint8_t *keep, size_t n) {
    for (size_t i = 0; i < n; i++) {
        double x = (double)widen_bf16(sizes[i]);
        lane[0][i % 16] += x;
        lane[1][i % 16] += keep[i / 8] >> i % 8 & 1 ? x : 0;
    }
    sums[0] = obm__lane_sum(lane[0]);
    sums[1] = obm__lane_sum(lane[1]);
}

void obm__scalar_sum_sizes(double *sums, const uint16_t *sizes, const uint8_t *keep, size_t n) {
    double lane[2][16] = {{0}};
    obm__sum_sizes_rest(sums, lane, sizes, keep, n);
}

static float widen_bf16_at(const uint16_t *p) { return widen_bf16(half_at(p)); }
static float widen_f16_at(const uint16_t *p) { return widen_f16(half_at(p)); }

static float sum_of_lanes(const float *lane /* 8 */) {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

/* Eight lanes, so that the rounding error grows with n / 8 and a compiler can use whatever vectors the baseline has. */
#define ROWS(name, type, at)                                                                            \
    void name(float *y, const type *w, size_t ld, size_t rows, const float *x, size_t n) {              \
        for (size_t r = 0; r < rows; r++) {                                                             \
            float lane[8] = {0};                                                                        \
            size_t j = 0;                                                                               \
            for (; j + 8 <= n; j += 8)                                                                  \
                for (size_t l = 0; l < 8; l++) lane[l] += at(w + r * ld + j + l) * float_at(x + j + l); \
            for (; j < n; j++) lane[j % 8] += at(w + r * ld + j) * float_at(x + j);                     \
            y[r] = sum_of_lanes(lane);                                                                  \
        }                                                                                               \
    }
ROWS(obm__scalar_rows_bf16, uint16_t, widen_bf16_at)
ROWS(obm__scalar_rows_f16, uint16_t, widen_f16_at)
ROWS(obm__scalar_rows_f32, float, float_at)

#define BATCH(name, type, rows_of)                                                                            \
    static void name(float *y, size_t ldy, const type *w, size_t ld, size_t rows, const float *x, size_t ldx, \
                     size_t tokens, size_t n) {                                                               \
        for (size_t t = 0; t < tokens; t++) rows_of(y + t * ldy, w, ld, rows, x + t * ldx, n);                \
    }
BATCH(batch_bf16, uint16_t, obm__scalar_rows_bf16)
BATCH(batch_f16, uint16_t, obm__scalar_rows_f16)
BATCH(batch_f32, float, obm__scalar_rows_f32)

/* n: an integer, -126 to 127. */
static float power_of_two(float n) { return from_bits((uint32_t)((int)n + 127) << 23); }

static float exponential(float x) {
    if (x != x) return x;
    x = x < OBM__EXP_LEAST ? OBM__EXP_LEAST : x > OBM__EXP_MOST ? OBM__EXP_MOST : x;
    float n = fmaf(x, OBM__EXP_LOG2E, OBM__EXP_MAGIC) - OBM__EXP_MAGIC;
    float half = fmaf(n, 0.5f, OBM__EXP_MAGIC) - OBM__EXP_MAGIC;
    float r = fmaf(n, -OBM__EXP_LN2_LOW, fmaf(n, -OBM__EXP_LN2, x)), p = fmaf(1.0f / 5040, r, 1.0f / 720);
    p = fmaf(p, r, 1.0f / 120);
    p = fmaf(p, r, 1.0f / 24);
    p = fmaf(p, r, 1.0f / 6);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1);
    p = fmaf(p, r, 1);
    return p * power_of_two(half) * power_of_two(n - half);
}

void obm__scalar_silu_mul(float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) gate[i] = gate[i] / (1 + exponential(0 - gate[i])) * up[i];
}

void obm__scalar_gelu_mul(float *gate, const float *up, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float x = gate[i], slope = fmaf(x * x, OBM__GELU_CUBE, OBM__GELU_SLOPE);
        gate[i] = x / (1 + exponential(x * slope)) * up[i];
    }
}

static double exp_sum(float *x, float max, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = exponential(x[i] - max);
    return obm__scalar_abs_sum(x, n);
}

float obm__scalar_scale_max(float *x, float scale, size_t n) {
    float max = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        x[i] *= scale;
        max = x[i] > max ? x[i] : max;
    }
    return max;
}

/* The second of a pair lies `apart` behind the first: vectors leave the last pairs to this. */
void obm__scalar_rotate(float *x, size_t apart, const float *cosine, const float *sine, size_t pairs) {
    for (size_t i = 0; i < pairs; i++) {
        float a = x[i], b = x[i + apart];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + apart] = b * cosine[i] + a * sine[i];
    }
}

static void rotate(float *x, const float *cosine, const float *sine, size_t pairs) {
    obm__scalar_rotate(x, pairs, cosine, sine, pairs);
}

void obm__scalar_norm_mul(float *out, const float *x, const float *weight, float scale, float offset, size_t n) {
    for (size_t i = 0; i < n; i++) out[i] = (weight[i] + offset) * (x[i] * scale);
}

static void mix_rows(float *out, const float *w, const float *rows, size_t ld, size_t count, size_t n) {
    for (size_t p = 0; p < count; p++) obm__scalar_axpy_f32(out, w[p], rows + p * ld, n);
}

void obm__scalar_gemm_pack_half(float *packed, const float *rows, size_t ld, size_t n_rows, size_t n) {
    for (size_t j = 0; j < n; j++)
        for (size_t r = 0; r < OBM__GEMM_HALF; r++)
            packed[j * OBM__GEMM_HALF + r] = r < n_rows ? float_at(rows + r * ld + j) : 0;
}

void obm__scalar_gemm_pack(float *packed, const float *rows, size_t ld, size_t n_rows, size_t n) {
    size_t above = n_rows > OBM__GEMM_HALF ? n_rows - OBM__GEMM_HALF : 0;
    obm__scalar_gemm_pack_half(packed, rows, ld, n_rows, n);
    obm__scalar_gemm_pack_half(packed + OBM__GEMM_HALF * n, above ? rows + OBM__GEMM_HALF * ld : rows, ld, above, n);
}

/* Without fma: in portable C it may be a call for each. */
static void gemm_block(float *y, const float *packed, const float *x, size_t n) {
    float sums[OBM__GEMM_HALF] = {0};
    for (size_t j = 0; j < n; j++)
        for (size_t r = 0; r < OBM__GEMM_HALF; r++) sums[r] += packed[j * OBM__GEMM_HALF + r] * float_at(x + j);
    for (size_t r = 0; r < OBM__GEMM_HALF; r++) y[r] += sums[r];
}

static void gemm(float *y, size_t ldy, const float *packed, size_t strips, const float *x, size_t ldx, size_t tokens,
                 size_t n) {
    for (size_t s = 0; s < strips * 2; s++)
        for (size_t t = 0; t < tokens; t++) {
            float *to = y + t * ldy + s * OBM__GEMM_HALF;
            memset(to, 0, OBM__GEMM_HALF * sizeof *to);
            for (size_t j = 0; j < n; j += OBM__GEMM_BLOCK)
                gemm_block(to, packed + (s * n + j) * OBM__GEMM_HALF, x + t * ldx + j,
                           n - j < OBM__GEMM_BLOCK ? n - j : OBM__GEMM_BLOCK);
        }
}
static void pairs_block(float *y, const uint32_t *packed, const uint32_t *x, size_t n) {
    float sums[OBM__GEMM_HALF] = {0};
    for (size_t j = 0; j < n; j++)
        for (size_t r = 0; r < OBM__GEMM_HALF; r++) {
            uint32_t w = packed[j * OBM__GEMM_HALF + r];
            sums[r] += from_bits(w & 0xffff0000) * from_bits(x[j] & 0xffff0000);
            sums[r] += from_bits(w << 16) * from_bits(x[j] << 16);
        }
    for (size_t r = 0; r < OBM__GEMM_HALF; r++) y[r] += sums[r];
}
void obm__scalar_gemm_pairs(float *y, size_t ldy, const uint32_t *packed, size_t strips, const uint32_t *x, size_t ldx,
                            size_t tokens, size_t n) {
    for (size_t s = 0; s < strips * 2; s++)
        for (size_t t = 0; t < tokens; t++) {
            float *to = y + t * ldy + s * OBM__GEMM_HALF;
            memset(to, 0, OBM__GEMM_HALF * sizeof *to);
            for (size_t j = 0; j < n; j += OBM__GEMM_BLOCK)
                pairs_block(to, packed + (s * n + j) * OBM__GEMM_HALF, x + t * ldx + j,
                            n - j < OBM__GEMM_BLOCK ? n - j : OBM__GEMM_BLOCK);
        }
}

void obm__scalar_plane_repack(uint8_t *block, const uint8_t *rows, size_t stride, size_t n_rows, size_t n_bytes) {
    for (size_t c = 0; c < n_bytes; c++)
        for (size_t r = 0; r < OBM__PLANE_ROWS; r++)
            block[c * OBM__PLANE_ROWS + r] = r < n_rows ? rows[r * stride + c] : 0;
}

void obm__scalar_plane_unpack(uint8_t *rows, size_t stride, const uint8_t *block, size_t n_bytes) {
    for (size_t c = 0; c < n_bytes; c++)
        for (size_t r = 0; r < OBM__PLANE_ROWS; r++) rows[r * stride + c] = block[c * OBM__PLANE_ROWS + r];
}

static int positive_part(int q) { return q > 0 ? q : 0; }

/* low: U & 127 of 16 entries, U >> 7 of them 32 bytes on, after the low limbs of the byte's other half. */
static void nibble_table(uint8_t *low, const int *q /* 4 */) {
    for (int e = 0; e < 16; e++) {
        int u = 0;
        for (int k = 0; k < 4; k++) u += e >> k & 1 ? positive_part(q[k]) : positive_part(-q[k]);
        low[e] = (uint8_t)(u & 127);
        low[32 + e] = (uint8_t)(u >> 7);
    }
}

/* One tile; x has cols <= 2048 elements. */
static void tile_tables(uint8_t *tables, float *scale, int32_t *abs_sums, const float *x, size_t cols) {
    uint32_t m = 0; /* magnitudes order as their bits do, and NaN comes after all of them */
    int q[OBM__PLANE_TILE] = {0};
    for (size_t i = 0; i < cols; i++) {
        uint32_t magnitude = bits_of(float_at(x + i)) & 0x7fffffff;
        if (magnitude > m) m = magnitude;
    }
    *scale = m ? NAN : 0;
    if (m && m < 0x7f800000) {
        obm__quantiser z = obm__quantise(from_bits(m));
        for (size_t i = 0; i < cols; i++) q[i] = (int)rintf(float_at(x + i) * z.lift * z.steps);
        *scale = z.scale;
    }
    for (size_t g = 0; g * OBM__PLANE_GROUP < cols; g++) {
        abs_sums[g] = 0;
        for (size_t i = g * OBM__PLANE_GROUP; i < (g + 1) * OBM__PLANE_GROUP; i += 4) {
            nibble_table(tables + i / 8 * OBM__PLANE_TABLE + i % 8 * 4, q + i);
            for (size_t k = i; k < i + 4; k++) abs_sums[g] += positive_part(q[k]) + positive_part(-q[k]);
        }
    }
}

void obm__scalar_plane_tables(uint8_t *tables, float *scales, int32_t *abs_sums, const float *x, size_t cols) {
    for (size_t i = 0; i < cols; i += OBM__PLANE_TILE)
        tile_tables(tables + i / 8 * OBM__PLANE_TABLE, scales + i / OBM__PLANE_TILE, abs_sums + i / OBM__PLANE_GROUP,
                    x + i, cols - i < OBM__PLANE_TILE ? cols - i : OBM__PLANE_TILE);
}

void obm__scalar_plane_sums(int32_t *sums, const uint8_t *const *planes, int n, size_t n_bytes, const uint8_t *tables,
                            const int32_t *abs_sums, const void *ahead) {
    (void)ahead;
    int32_t total = 0;
    for (size_t g = 0; g < n_bytes / 8; g++) total += abs_sums[g];
    for (size_t r = 0; r < OBM__PLANE_ROWS; r++) {
        int32_t u = 0;
        for (size_t c = 0; c < n_bytes; c++) {
            const uint8_t *low = tables + c * OBM__PLANE_TABLE, *high = low + 32; /* limbs */
            unsigned byte = 0;
            for (int i = 0; i < n; i++) byte ^= planes[i][c * OBM__PLANE_ROWS + r];
            unsigned a = byte & 15, b = 16 + (byte >> 4);
            u += low[a] + low[b] + (high[a] + high[b]) * 128;
        }
        sums[r] = 2 * u - total;
    }
}

void obm__scalar_plane_add(float *y, const uint8_t *const *bits, int n, float c, size_t cols) {
    for (size_t i = 0; i < cols; i++) {
        unsigned byte = 0;
        for (int p = 0; p < n; p++) byte ^= bits[p][i / 8];
        y[i] += byte >> i % 8 & 1 ? c : -c;
    }
}

/* ---- z12 ---- */

/* Where 8 columns of a half lie in it. */
static const uint8_t z12_place[4] = {0, 16, 8, 24};

/* The 16 most frequent bytes; of equally frequent ones the smaller first. */
static size_t rank_bytes(uint8_t *table, const uint32_t *count) {
    uint64_t best[OBM__Z12_TABLE + 1]; /* count and 255 - byte, falling */
    size_t n = 0;
    for (unsigned b = 0; b < 256; b++) {
        uint64_t key = (uint64_t)count[b] << 8 | (255 - b);
        if (!count[b] || (n == OBM__Z12_TABLE && key < best[n - 1])) continue;
        size_t at = n;
        for (; at && best[at - 1] < key; at--) best[at] = best[at - 1];
        best[at] = key;
        n += n < OBM__Z12_TABLE;
    }
    memset(table, 0, OBM__Z12_TABLE);
    for (size_t i = 0; i < n; i++) table[i] = (uint8_t)(255 - (best[i] & 255));
    return n;
}

static void invert_table(obm__z12_index *index, const uint8_t *table, size_t n) {
    unsigned seen = 0;
    memset(index->code, 0, sizeof index->code);
    index->n = 0;
    for (size_t i = 0; i < n || !i; i++) { /* the first one also of a row without columns */
        unsigned upper = table[i] >> 4;
        index->code[table[i]] = (uint8_t)(16 + i);
        if (!(seen >> upper & 1)) index->upper[index->n++] = (uint8_t)upper;
        seen |= 1u << upper;
    }
}

/* Four tables: neighbours mostly have the same byte, and increments of one counter wait for each other. */
static void count_high_bytes(uint32_t *count, const uint16_t *w, size_t cols) {
    uint32_t part[4][256] = {{0}};
    size_t j = 0;
    for (; j + 4 <= cols; j += 4)
        for (size_t i = 0; i < 4; i++) part[i][half_at(w + j + i) >> 8]++;
    for (; j < cols; j++) part[0][half_at(w + j) >> 8]++;
    for (size_t b = 0; b < 256; b++) count[b] = part[0][b] + part[1][b] + part[2][b] + part[3][b];
}

typedef struct z12_sink {
    obm__z12_escape *out;
    size_t n, room;
} z12_sink;

static void list_escapes(z12_sink *s, const uint16_t *w, const obm__z12_index *index, size_t block) {
    for (size_t col = 0; col < OBM__Z12_COLUMNS; col++) {
        uint16_t value = half_at(w + col);
        if (index->code[value >> 8]) continue;
        if (s->n < s->room) s->out[s->n] = (obm__z12_escape){(uint32_t)block, (uint8_t)col, value};
        s->n++;
    }
}

int obm__scalar_z12_block(uint8_t *out, const uint16_t *w, const obm__z12_index *index) {
    unsigned known = 16;
    for (size_t q = 0; q < 32; q++) {
        size_t at = z12_place[q / 8] + q % 8;
        unsigned first = half_at(w + q), second = half_at(w + 32 + q);
        unsigned low = index->code[first >> 8], high = index->code[second >> 8];
        out[at] = (uint8_t)first;
        out[32 + at] = (uint8_t)second;
        out[OBM__Z12_COLUMNS + at] = (uint8_t)((low & 15) | (high & 15) << 4);
        known &= low & high;
    }
    return !known;
}

/* What is behind the last column has the table's first byte. */
size_t obm__z12_encode_by(obm__z12_block_fn encode_block, uint8_t *codes, uint8_t *table, obm__z12_escape *escapes,
                          size_t room, const uint16_t *w, size_t cols) {
    obm__z12_index index;
    uint32_t count[256];
    z12_sink sink = {escapes, 0, room};
    count_high_bytes(count, w, cols);
    invert_table(&index, table, rank_bytes(table, count));
    for (size_t first = 0; first < cols; first += OBM__Z12_COLUMNS, codes += OBM__Z12_BYTES) {
        const uint16_t *from = w + first;
        uint16_t end[OBM__Z12_COLUMNS];
        if (cols - first < OBM__Z12_COLUMNS) {
            for (size_t j = 0; j < OBM__Z12_COLUMNS; j++)
                end[j] = first + j < cols ? half_at(from + j) : (uint16_t)(table[0] << 8);
            from = end;
        }
        if (encode_block(codes, from, &index)) list_escapes(&sink, from, &index, first / OBM__Z12_COLUMNS);
    }
    return sink.n;
}

size_t obm__scalar_z12_encode(uint8_t *codes, uint8_t *table, obm__z12_escape *escapes, size_t room, const uint16_t *w,
                              size_t cols) {
    return obm__z12_encode_by(obm__scalar_z12_block, codes, table, escapes, room, w, cols);
}

/* 64 columns of one row, escapes not yet in place. */
static void decode_block(uint16_t *out, const uint8_t *p, const uint8_t *table) {
    for (size_t q = 0; q < 32; q++) {
        size_t at = z12_place[q / 8] + q % 8;
        unsigned index = p[OBM__Z12_COLUMNS + at];
        out[q] = (uint16_t)(p[at] | table[index & 15] << 8);
        out[32 + q] = (uint16_t)(p[32 + at] | table[index >> 4] << 8);
    }
}

/* 64 columns of a row with their escapes, of which *next is the first. */
static void decode_row_block(uint16_t *out, const obm__z12 *w, size_t row, size_t block, uint32_t *next) {
    decode_block(out, w->codes + (row * w->blocks + block) * OBM__Z12_BYTES, w->tables + row * OBM__Z12_TABLE);
    for (; *next < w->first_escape[row + 1] && w->escapes[*next].block == block; ++*next)
        out[w->escapes[*next].col] = w->escapes[*next].value;
}

static void z12_unpack(uint16_t *out, size_t ld, const obm__z12 *w, size_t row, size_t rows) {
    for (size_t r = 0; r < rows; r++) {
        uint32_t next = w->first_escape[row + r];
        for (size_t block = 0; block < w->blocks; block++) {
            uint16_t part[OBM__Z12_COLUMNS];
            size_t first = block * OBM__Z12_COLUMNS, n = w->cols - first;
            decode_row_block(part, w, row + r, block, &next);
            memcpy(out + r * ld + first, part, (n < OBM__Z12_COLUMNS ? n : OBM__Z12_COLUMNS) * sizeof *out);
        }
    }
}

static void rows_z12(float *y, const obm__z12 *w, size_t row, size_t rows, const float *x) {
    for (size_t r = 0; r < rows; r++) {
        uint32_t next = w->first_escape[row + r];
        float lane[8] = {0};
        for (size_t block = 0; block < w->blocks; block++) {
            uint16_t part[OBM__Z12_COLUMNS];
            size_t first = block * OBM__Z12_COLUMNS;
            decode_row_block(part, w, row + r, block, &next);
            for (size_t j = first; j < w->cols && j < first + OBM__Z12_COLUMNS; j++)
                lane[j % 8] += widen_bf16(part[j - first]) * float_at(x + j);
        }
        y[r] = sum_of_lanes(lane);
    }
}

static void batch_z12(float *y, size_t ldy, const obm__z12 *w, size_t row, size_t rows, const float *x, size_t ldx,
                      size_t tokens, uint16_t *unpacked) {
    (void)unpacked;
    for (size_t t = 0; t < tokens; t++) rows_z12(y + t * ldy, w, row, rows, x + t * ldx);
}

const obm_kernels obm__kernels_scalar = {
    .isa = "scalar",
    .bf16_to_f32 = obm__scalar_bf16_to_f32,
    .f16_to_f32 = obm__scalar_f16_to_f32,
    .f32_to_bf16 = obm__scalar_f32_to_bf16,
    .f32_to_f16 = obm__scalar_f32_to_f16,
    .sub_f32 = obm__scalar_sub_f32,
    .sub_bf16 = obm__scalar_sub_bf16,
    .axpy_f32 = obm__scalar_axpy_f32,
    .mix_f32 = obm__scalar_mix_f32,
    .find_nonfinite = obm__scalar_find_nonfinite,
    .find_above = obm__scalar_find_above,
    .abs_sum = obm__scalar_abs_sum,
    .sign_sum_bf16 = obm__scalar_sign_sum_bf16,
    .dot = obm__scalar_dot,
    .count_zero = obm__scalar_count_zero,
    .sign_pack = obm__scalar_sign_pack,
    .sign_axpy = obm__scalar_sign_axpy,
    .magnitude_histogram = obm__scalar_magnitude_histogram,
    .delta_bf16 = obm__scalar_delta_bf16,
    .count_from = obm__scalar_count_from,
    .low_histogram = obm__scalar_low_histogram,
    .lows_f32 = obm__scalar_lows_f32,
    .keep_from = obm__scalar_keep_from,
    .agree_f32 = obm__scalar_agree_f32,
    .sum_f32 = obm__scalar_sum_f32,
    .store_bf16 = obm__scalar_store_bf16,
    .count_bf16 = obm__scalar_count_bf16,
    .lows_bf16 = obm__scalar_lows_bf16,
    .sizes_bf16 = obm__scalar_sizes_bf16,
    .merge_bf16 = obm__scalar_merge_bf16,
    .vote_bf16 = obm__scalar_vote_bf16,
    .random_bits = obm__scalar_random_bits,
    .random_tops = obm__scalar_random_tops,
    .random_highs = obm__scalar_random_highs,
    .choose_sizes = obm__scalar_choose_sizes,
    .sum_sizes = obm__scalar_sum_sizes,
    .rows_bf16 = obm__scalar_rows_bf16,
    .rows_f16 = obm__scalar_rows_f16,
    .rows_f32 = obm__scalar_rows_f32,
    .batch_bf16 = batch_bf16,
    .batch_f16 = batch_f16,
    .batch_f32 = batch_f32,
    .silu_mul = obm__scalar_silu_mul,
    .gelu_mul = obm__scalar_gelu_mul,
    .exp_sum = exp_sum,
    .scale_max = obm__scalar_scale_max,
    .rotate = rotate,
    .norm_mul = obm__scalar_norm_mul,
    .mix_rows = mix_rows,
    .gemm_pack = obm__scalar_gemm_pack,
    .gemm = gemm,
    .gemm_pairs = obm__scalar_gemm_pairs,
    .z12_encode = obm__scalar_z12_encode,
    .z12_unpack = z12_unpack,
    .rows_z12 = rows_z12,
    .batch_z12 = batch_z12,
    .plane_repack = obm__scalar_plane_repack,
    .plane_unpack = obm__scalar_plane_unpack,
    .plane_tables = obm__scalar_plane_tables,
    .plane_sums = obm__scalar_plane_sums,
    .plane_add = obm__scalar_plane_add,
};
