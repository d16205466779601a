/* Rotary position embedding: default frequencies and LLaMA 3.1's scaling, computed in f32 as transformers does. */
#include "model.h"

#include <math.h>

/* Long wavelengths (beyond the trained context / low_freq_factor) are stretched by `factor`, short ones are kept, those
 * between are interpolated.  (Grattafiori et al., "The Llama 3 Herd of Models", section 3.4.3; transformers'
 * _compute_llama3_parameters.) */
static float scale_llama3(const obm__rope *r, float f) {
    const float pi = 3.14159265358979323846f;
    float wavelength = 2 * pi / f, positions = (float)r->original_positions;
    float low = (float)r->low_freq_factor, high = (float)r->high_freq_factor, factor = (float)r->factor;
    if (wavelength > positions / low) return f / factor;
    if (wavelength < positions / high) return f;
    float smooth = (positions / wavelength - low) / (high - low);
    return (1 - smooth) * f / factor + smooth * f;
}

void obm__rope_frequencies(const obm__rope *r, int64_t head_dim, float *out) {
    for (int64_t i = 0; i < head_dim / 2; i++) {
        float f = 1.0f / powf((float)r->theta, (float)(2 * i) / (float)head_dim);
        out[i] = r->llama3 ? scale_llama3(r, f) : f;
    }
}

void obm__rope_table(const float *frequencies, int64_t half, int64_t position, float *cosine, float *sine) {
    for (int64_t i = 0; i < half; i++) {
        float angle = (float)position * frequencies[i];
        cosine[i] = cosf(angle);
        sine[i] = sinf(angle);
    }
}

void obm__rope_apply(float *x, const float *cosine, const float *sine, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}
