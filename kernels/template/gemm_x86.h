/* Packing for gemm on x86: blocks of 8 rows by 8 columns are transposed in registers.  For AVX2 and AVX-512 alike. */
FN static inline void NAME(transpose8)(float *out, const float *in, size_t ld) {
    __m256 r[8], s[8];
    for (size_t i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(in + i * ld);
    for (size_t i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (size_t i = 0; i < 8; i += 4)
        for (size_t k = 0; k < 2; k++) {
            r[i + 2 * k] = _mm256_shuffle_ps(s[i + k], s[i + 2 + k], 0x44);
            r[i + 2 * k + 1] = _mm256_shuffle_ps(s[i + k], s[i + 2 + k], 0xee);
        }
    for (size_t i = 0; i < 4; i++) { /* r[i]: columns i and i + 4 of rows 0..3, r[i + 4]: of rows 4..7 */
        _mm256_storeu_ps(out + i * OBM__GEMM_HALF, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(out + (i + 4) * OBM__GEMM_HALF, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

FN static void NAME(gemm_pack)(float *packed, const float *rows, size_t ld, size_t n_rows, size_t n) {
    const size_t half = OBM__GEMM_HALF;
    for (size_t first = 0; first < OBM__GEMM_ROWS; first += half, packed += half * n) {
        size_t j = 0, there = n_rows < first ? 0 : n_rows - first;
        const float *from = rows + (there ? first : 0) * ld;
        for (; there >= half && j + 8 <= n; j += 8)
            for (size_t r = 0; r < half; r += 8) NAME(transpose8)(packed + j * half + r, from + r * ld + j, ld);
        obm__scalar_gemm_pack_half(packed + j * half, from + j, ld, there, n - j);
    }
}
