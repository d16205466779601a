/* The parameters of planes.h that AVX2 and AVX-512 share: tables are built in 256-bit vectors by both, since their
 * parts are small and 512 bits would have to cross lanes. */

/* Entries 0..7 (low) and 8..15 (high) of two nibbles' tables, a nibble in each lane.  z holds max(-q, 0) of four
 * columns, then max(q, 0), in 16-bit words; the mask of column k picks word k or k + 4 by bit k of the entry.  Bit 3 is
 * constant in each half. */
FN static inline void nibble_tables(uint8_t *tables, __m256i z) {
#define WORDS(a, b, c, d, e, f, g, h) _mm256_setr_epi16(a, b, c, d, e, f, g, h, a, b, c, d, e, f, g, h)
#define WORD(i) ((i)*2 | ((i)*2 + 1) << 8)
    const __m256i m0 = WORDS(WORD(0), WORD(4), WORD(0), WORD(4), WORD(0), WORD(4), WORD(0), WORD(4));
    const __m256i m1 = WORDS(WORD(1), WORD(1), WORD(5), WORD(5), WORD(1), WORD(1), WORD(5), WORD(5));
    const __m256i m2 = WORDS(WORD(2), WORD(2), WORD(2), WORD(2), WORD(6), WORD(6), WORD(6), WORD(6));
    const __m256i m3 = _mm256_set1_epi16(WORD(3)), m7 = _mm256_set1_epi16(WORD(7)), limb = _mm256_set1_epi16(127);
#undef WORD
#undef WORDS
    __m256i two = _mm256_add_epi16(_mm256_shuffle_epi8(z, m0), _mm256_shuffle_epi8(z, m1));
    __m256i three = _mm256_add_epi16(two, _mm256_shuffle_epi8(z, m2));
    __m256i low = _mm256_add_epi16(three, _mm256_shuffle_epi8(z, m3));
    __m256i high = _mm256_add_epi16(three, _mm256_shuffle_epi8(z, m7));
    __m256i limb0 = _mm256_packus_epi16(_mm256_and_si256(low, limb), _mm256_and_si256(high, limb));
    __m256i limb1 = _mm256_packus_epi16(_mm256_srli_epi16(low, 7), _mm256_srli_epi16(high, 7));
    _mm256_storeu_si256((__m256i *)(void *)tables, limb0);
    _mm256_storeu_si256((__m256i *)(void *)(tables + 32), limb1);
}

FN static inline __m256i quantise8(const float *x, obm__quantiser z) {
    __m256 lifted = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(z.lift));
    return _mm256_cvtps_epi32(_mm256_mul_ps(lifted, _mm256_set1_ps(z.steps)));
}

/* 16 columns at a time.  packs leaves columns 0-3, 8-11 in the lower lane and 4-7, 12-15 in the upper one: joining the
 * lower 64 bits of both lanes gives the two nibbles of the first byte, the upper ones those of the second. */
FN static int32_t group_tables(uint8_t *tables, const float *x, obm__quantiser z) {
    __m256i sum = _mm256_setzero_si256();
    for (size_t i = 0; i < OBM__PLANE_GROUP; i += 16, tables += 2 * OBM__PLANE_TABLE) {
        __m256i q = _mm256_packs_epi32(quantise8(x + i, z), quantise8(x + i + 8, z));
        __m256i plus = _mm256_max_epi16(q, _mm256_setzero_si256()), minus = _mm256_sub_epi16(plus, q);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(plus, minus), _mm256_set1_epi16(1)));
        nibble_tables(tables, _mm256_unpacklo_epi64(minus, plus));
        nibble_tables(tables + OBM__PLANE_TABLE, _mm256_unpackhi_epi64(minus, plus));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
