/* The tables by name, and the scalar entries that faster tables fall back to for what they do not speed up and for
 * tails. */
#ifndef OBM_KERNEL_TABLES_H
#define OBM_KERNEL_TABLES_H

#include "kernels.h"

extern const obm_kernels obm__kernels_scalar;
#if defined(__x86_64__)
extern const obm_kernels obm__kernels_avx2;
extern const obm_kernels obm__kernels_avx512;
#elif defined(__aarch64__)
extern const obm_kernels obm__kernels_neon;
#endif

void obm__scalar_bf16_to_f32(float *dst, const uint16_t *src, size_t n);
void obm__scalar_f16_to_f32(float *dst, const uint16_t *src, size_t n);
void obm__scalar_f32_to_bf16(uint16_t *dst, const float *src, size_t n);
void obm__scalar_f32_to_f16(uint16_t *dst, const float *src, size_t n);
void obm__scalar_sub_f32(float *d, const float *a, const float *b, size_t n);
void obm__scalar_sub_bf16(float *d, const uint16_t *a, const uint16_t *b, size_t n);
void obm__scalar_axpy_f32(float *y, float a, const float *x, size_t n);
size_t obm__scalar_find_nonfinite(const float *x, size_t n);
double obm__scalar_abs_sum(const float *x, size_t n);
double obm__scalar_dot(const float *x, const float *y, size_t n);
size_t obm__scalar_count_zero(const float *x, size_t n);
void obm__scalar_sign_pack(uint8_t *bits, const float *d, size_t n);
void obm__scalar_sign_axpy(float *y, const uint8_t *bits, float alpha, size_t n);
void obm__scalar_magnitude_histogram(uint32_t *histogram, const float *x, size_t n);
void obm__scalar_rows_bf16(float *y, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t n);
void obm__scalar_rows_f16(float *y, const uint16_t *w, size_t ld, size_t rows, const float *x, size_t n);
void obm__scalar_rows_f32(float *y, const float *w, size_t ld, size_t rows, const float *x, size_t n);

/* Steps 8, 4, 2, 1 of the reduction tree that kernels.h states; destroys lane. */
static inline double obm__lane_sum(double lane[16]) {
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++) lane[j] += lane[j + step];
    return lane[0];
}

#endif
