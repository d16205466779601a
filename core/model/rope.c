/* Rotary position embedding (Su et al. 2021): frequencies of all kinds, computed in f32 in the order of transformers'
 * modeling_rope_utils, and the tables of a position.  Which kind a model has is config_rope.c's. */
#include "model.h"

#define PI 3.14159265358979323846

int64_t obm__rope_pairs(const obm__rope *r) { return r->dim / 2; }

bool obm__rope_needs_length(const obm__rope *r) { return r->type == OBM_ROPE_DYNAMIC || r->type == OBM_ROPE_LONGROPE; }

/* theta^(2i / dim) */
static float wavelength(const obm__rope *r, float theta, int64_t i) {
    return powf(theta, (float)(2 * i) / (float)r->dim);
}

/* Long wavelengths (beyond the trained context / low_freq_factor) are stretched by `factor`, short ones are kept, those
 * between are interpolated.  (Grattafiori et al., "The Llama 3 Herd of Models", section 3.4.3.) */
static float scale_llama3(const obm__rope *r, float f) {
    float length = 2 * (float)PI / f, positions = (float)r->original_positions;
    float low = (float)r->low_freq_factor, high = (float)r->high_freq_factor, factor = (float)r->factor;
    if (length > positions / low) return f / factor;
    if (length < positions / high) return f;
    float smooth = (positions / length - low) / (high - low);
    return (1 - smooth) * f / factor + smooth * f;
}

/* "NTK-aware" scaling by the length at hand: theta grows so that the longest wavelength is stretched by as much as the
 * sequence is longer than the trained context, and the shortest hardly. */
static float dynamic_theta(const obm__rope *r, int64_t positions) {
    float trained = (float)r->original_positions, length = (float)positions > trained ? (float)positions : trained;
    float stretch = (float)r->factor * length / trained - ((float)r->factor - 1);
    return (float)r->theta * powf(stretch, (float)((double)r->dim / (double)(r->dim - 2)));
}

/* The pair that turns `turns` times in the trained context. */
static double turning_pair(const obm__rope *r, double turns) {
    return (double)r->dim * log(r->original_positions / (turns * 2 * PI)) / (2 * log(r->theta));
}

/* How much of pair i is interpolated: 0 below the pair that turns beta_fast times, 1 above that of beta_slow, a ramp
 * between.  (Peng et al. 2023, YaRN, section 3.2.) */
static float yarn_ramp(const obm__rope *r, int64_t i) {
    double low = turning_pair(r, r->beta_fast), high = turning_pair(r, r->beta_slow);
    if (r->truncate) low = floor(low), high = ceil(high);
    low = low > 0 ? low : 0;
    high = high < (double)(r->dim - 1) ? high : (double)(r->dim - 1);
    if (low == high) high += 0.001;
    float ramp = ((float)i - (float)low) / (float)(high - low);
    return ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
}

static float yarn(const obm__rope *r, int64_t i) {
    float length = wavelength(r, (float)r->theta, i), kept = 1 - yarn_ramp(r, i);
    return 1.0f / ((float)r->factor * length) * (1 - kept) + 1.0f / length * kept;
}

static float frequency(const obm__rope *r, int64_t positions, int64_t i) {
    float f = 1.0f / wavelength(r, (float)r->theta, i);
    switch (r->type) {
    case OBM_ROPE_LINEAR:
        return f / (float)r->factor;
    case OBM_ROPE_DYNAMIC:
        return 1.0f / wavelength(r, dynamic_theta(r, positions), i);
    case OBM_ROPE_LLAMA3:
        return scale_llama3(r, f);
    case OBM_ROPE_YARN:
        return yarn(r, i);
    case OBM_ROPE_LONGROPE: {
        const float *by = (double)positions > r->original_positions ? r->long_factor : r->short_factor;
        return 1.0f / (by[i] * wavelength(r, (float)r->theta, i));
    }
    default:
        return f;
    }
}

void obm__rope_frequencies(const obm__rope *r, int64_t positions, float *out) {
    for (int64_t i = 0; i < obm__rope_pairs(r); i++) out[i] = frequency(r, positions, i);
}

void obm__rope_table(const obm__rope *r, const float *frequencies, int64_t position, float *cosine, float *sine) {
    for (int64_t i = 0; i < obm__rope_pairs(r); i++) {
        float angle = (float)position * frequencies[i];
        cosine[i] = cosf(angle) * r->attention_factor;
        sine[i] = sinf(angle) * r->attention_factor;
    }
}
