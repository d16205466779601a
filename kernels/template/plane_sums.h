/*
 * One loop of plane_sums, included by planes.h for each way of reading the planes.
 *
 * The two lookups of a limb add up to at most 254, in a byte.  As 16-bit words: W sums the words t = even + 256 * odd
 * (mod 2^16), H sums t >> 8, the odd rows; the even ones are W - 256 * H.  Both are at most 256 * 254 < 2^16, which is
 * why a call has at most 256 byte columns.  Limb after limb, so that with AVX2 the 8 sums, 4 index vectors, two tables,
 * a lookup and the nibble mask are its 16 registers.
 *
 *   PLANE_NAME                       the function
 *   PLANE_FETCH(o)                   B at offset o: the XOR of the planes
 *   PLANE_PREFETCH(o)                asks for the line at offset o of each plane
 */
#define PLANE_ZERO(i) NAME(words) w0_##i = {0}, h0_##i = w0_##i, w1_##i = w0_##i, h1_##i = w0_##i;
#define PLANE_SPLIT(i)                                     \
    B low_##i = PLANE_FETCH(c * OBM__PLANE_ROWS + i * BL); \
    B high_##i = HIGH_NIBBLE(low_##i);                     \
    low_##i = LOW_NIBBLE(low_##i);
#define PLANE_LOOKUP(i, w, h)                                                                 \
    {                                                                                         \
        NAME(words) t = (NAME(words))ADD_B(LOOKUP(first, low_##i), LOOKUP(second, high_##i)); \
        w##_##i += t;                                                                         \
        h##_##i += t >> 8;                                                                    \
    }
#define PLANE_LIMB_0(i) PLANE_LOOKUP(i, w0, h0)
#define PLANE_LIMB_1(i) PLANE_LOOKUP(i, w1, h1)
#define PLANE_STORE(i)                                                   \
    STORE_PAIRS(limb0 + i * BL, (B)(w0_##i - (h0_##i << 8)), (B)h0_##i); \
    STORE_PAIRS(limb1 + i * BL, (B)(w1_##i - (h1_##i << 8)), (B)h1_##i);

/* ahead moves by step, 0 where nothing is wanted; the planes themselves are asked for 1 KiB ahead. */
FN static void PLANE_NAME(int32_t *sums, const uint8_t *const *planes, int n, size_t n_bytes, const uint8_t *tables,
                          int32_t total, uintptr_t ahead, size_t step) {
    uint16_t limb0[OBM__PLANE_ROWS], limb1[OBM__PLANE_ROWS];
    const uint8_t *p0 = planes[0], *p1 = planes[n > 1], *p2 = planes[n > 1 ? 2 : 0];
    (void)p0, (void)p1, (void)p2;
    EACH_B(PLANE_ZERO)
    for (size_t c = 0; c < n_bytes; c++, tables += OBM__PLANE_TABLE, ahead += step) {
        EACH_B(PLANE_SPLIT)
        B first = TABLE_B(tables), second = TABLE_B(tables + 16);
        EACH_B(PLANE_LIMB_0)
        first = TABLE_B(tables + 32), second = TABLE_B(tables + 48);
        EACH_B(PLANE_LIMB_1)
        PLANE_PREFETCH(c * OBM__PLANE_ROWS + 1024)
        __builtin_prefetch((const void *)ahead, 0, 2);
    }
    EACH_B(PLANE_STORE)
    for (size_t r = 0; r < OBM__PLANE_ROWS; r++) sums[r] = 2 * (limb0[r] + limb1[r] * 128) - total;
}

#undef PLANE_ZERO
#undef PLANE_SPLIT
#undef PLANE_LOOKUP
#undef PLANE_LIMB_0
#undef PLANE_LIMB_1
#undef PLANE_STORE
#undef PLANE_NAME
#undef PLANE_FETCH
#undef PLANE_PREFETCH
