/* Encoding of z12 on x86, 32 columns at a time: packing words to bytes works inside 128-bit lanes, which gives the
 * layout's order, and the table is searched by comparing with all of its 16 bytes.  For AVX2 and AVX-512 alike. */
FN static inline __m256i NAME(z12_low)(__m256i *high, const uint16_t *w) {
    __m256i a = LOAD_256(w), b = LOAD_256(w + 16), low = _mm256_set1_epi16(255);
    *high = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    return _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
}

FN static int NAME(z12_encode_block)(uint8_t *out, const uint16_t *w, const uint8_t *table, const uint8_t *code) {
    __m256i high[2], index[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, found[2] = {index[0], index[0]};
    _mm256_storeu_si256((__m256i *)(void *)out, NAME(z12_low)(&high[0], w));
    _mm256_storeu_si256((__m256i *)(void *)(out + 32), NAME(z12_low)(&high[1], w + 32));
    (void)code;
    for (int i = 15; i >= 0; i--) { /* a table with fewer than 16 bytes ends with zeros: the first entry wins */
        __m256i byte = _mm256_set1_epi8((char)table[i]), number = _mm256_set1_epi8((char)i);
        for (int half = 0; half < 2; half++) {
            __m256i equal = _mm256_cmpeq_epi8(high[half], byte);
            found[half] = _mm256_or_si256(found[half], equal);
            index[half] = _mm256_blendv_epi8(index[half], number, equal);
        }
    }
    __m256i both = _mm256_or_si256(index[0], _mm256_slli_epi16(index[1], 4)); /* indices are below 16: no bit crosses */
    _mm256_storeu_si256((__m256i *)(void *)(out + 64), both);
    return _mm256_movemask_epi8(_mm256_and_si256(found[0], found[1])) != -1;
}

FN static size_t NAME(z12_encode)(uint8_t *codes, uint8_t *table, obm__z12_escape *escapes, size_t room,
                                  const uint16_t *w, size_t cols) {
    return obm__z12_encode_by(NAME(z12_encode_block), codes, table, escapes, room, w, cols);
}
