/* Encoding of z12 on x86, 32 columns at a time: packing words to bytes works inside 128-bit lanes, which gives the
 * layout's order, and bytes that share their upper half are looked up together.  For AVX2 and AVX-512 alike. */
FN static inline __m256i NAME(z12_low)(__m256i *high, const uint16_t *w) {
    __m256i a = LOAD_256(w), b = LOAD_256(w + 16), low = _mm256_set1_epi16(255);
    *high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    return _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
}

FN static int NAME(z12_encode_block)(uint8_t *out, const uint16_t *w, const obm__z12_index *index) {
    const __m256i low = _mm256_set1_epi8(15), beyond = _mm256_set1_epi8(0x70);
    __m256i high[2], code[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    _mm256_storeu_si256((__m256i *)(void *)out, NAME(z12_low)(&high[0], w));
    _mm256_storeu_si256((__m256i *)(void *)(out + 32), NAME(z12_low)(&high[1], w + 32));
    for (size_t i = 0; i < index->n; i++) {
        __m256i upper = _mm256_set1_epi8((char)(index->upper[i] << 4));
        __m256i codes = _mm256_broadcastsi128_si256(LOAD_128(index->code + 16 * index->upper[i]));
        for (int half = 0; half < 2; half++) { /* with another upper half the sum's sign is set, which looks up 0 */
            __m256i at = _mm256_adds_epu8(_mm256_xor_si256(high[half], upper), beyond);
            code[half] = _mm256_or_si256(code[half], _mm256_shuffle_epi8(codes, at));
        }
    }
    __m256i both = _mm256_slli_epi16(_mm256_and_si256(code[1], low), 4); /* no bit crosses to the next byte */
    _mm256_storeu_si256((__m256i *)(void *)(out + 64), _mm256_or_si256(both, _mm256_and_si256(code[0], low)));
    return _mm256_movemask_epi8(_mm256_slli_epi16(_mm256_and_si256(code[0], code[1]), 3)) != -1;
}

FN static size_t NAME(z12_encode)(uint8_t *codes, uint8_t *table, obm__z12_escape *escapes, size_t room,
                                  const uint16_t *w, size_t cols) {
    return obm__z12_encode_by(NAME(z12_encode_block), codes, table, escapes, room, w, cols);
}
