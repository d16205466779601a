/*
 * The plane kernels: byte transposes, tables, and sums by byte shuffles.  Derivations are in kernels.h.
 *
 *   FN, NAME(op), V, VL, SET1, LOAD, STORE, ADD as in elementwise.h
 *   SIGNED_AT(a, word, l)        SIGNED by bits l .. l + VL - 1 of 32
 *   MAX_ABS(m, v)                the larger magnitude of each lane by its bits (NaN above all)
 *   group_tables(tables, x, z)   512 bytes for 64 columns quantised as z says; returns sum |q|
 *
 *   B, BL                        vector of bytes in lanes of 16, its length, a divisor of 64
 *   EACH_B(X)                    X(0) X(1) ... X(64 / BL - 1)
 *   LOAD_B(p) STORE_B(p, v) XOR_B(a, b) ADD_B(a, b)   ADD_B: byte by byte
 *   LOW_NIBBLE(v) HIGH_NIBBLE(v) of every byte
 *   TABLE_B(p)                   16 bytes, in every lane
 *   LOOKUP(t, i)                 t[i] for every byte i < 16, lane by lane
 *   ZIP_LOW(a, b) ZIP_HIGH(a, b) bytes alternately from the lower or upper halves of each lane
 *   GATHER_B(p, d)               lane l = the 16 bytes at p + l * d
 *   SCATTER_B(p, d, v)           the opposite
 *   STORE_PAIRS(p, even, odd)    16-bit words alternately: even[0], odd[0], even[1], ...
 */

/* ---- layout: 16 x 16 bytes are transposed in each lane by four rounds of zipping rows i and i + 8 ---- */

#define PLANE_ZIP(i, to, from)                 \
    to[2 * i] = ZIP_LOW(from[i], from[i + 8]); \
    to[2 * i + 1] = ZIP_HIGH(from[i], from[i + 8]);
#define PLANE_ROUND(to, from) \
    PLANE_ZIP(0, to, from)    \
    PLANE_ZIP(1, to, from)    \
    PLANE_ZIP(2, to, from)    \
    PLANE_ZIP(3, to, from) PLANE_ZIP(4, to, from) PLANE_ZIP(5, to, from) PLANE_ZIP(6, to, from) PLANE_ZIP(7, to, from)
#define PLANE_TRANSPOSE(a, b) \
    PLANE_ROUND(b, a)         \
    PLANE_ROUND(a, b)         \
    PLANE_ROUND(b, a)         \
    PLANE_ROUND(a, b)
#define PLANE_EACH_16(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

/* 16 byte columns of 64 rows. */
FN static inline void NAME(strip_in)(uint8_t *block, const uint8_t *rows, size_t stride) {
    for (size_t r = 0; r < OBM__PLANE_ROWS; r += BL) {
        B a[16], b[16];
#define X(i) a[i] = GATHER_B(rows + (r + i) * stride, 16 * stride);
        PLANE_EACH_16(X)
#undef X
        PLANE_TRANSPOSE(a, b)
#define X(i) STORE_B(block + i * OBM__PLANE_ROWS + r, a[i]);
        PLANE_EACH_16(X)
#undef X
    }
}

FN static inline void NAME(strip_out)(uint8_t *rows, size_t stride, const uint8_t *block) {
    for (size_t r = 0; r < OBM__PLANE_ROWS; r += BL) {
        B a[16], b[16];
#define X(i) a[i] = LOAD_B(block + i * OBM__PLANE_ROWS + r);
        PLANE_EACH_16(X)
#undef X
        PLANE_TRANSPOSE(a, b)
#define X(i) SCATTER_B(rows + (r + i) * stride, 16 * stride, a[i]);
        PLANE_EACH_16(X)
#undef X
    }
}

/* Missing rows and the last 8 byte columns go through a zeroed copy. */
FN static void NAME(plane_repack)(uint8_t *block, const uint8_t *rows, size_t stride, size_t n_rows, size_t n_bytes) {
    size_t c = 0;
    if (n_rows == OBM__PLANE_ROWS)
        for (; c + 16 <= n_bytes; c += 16) NAME(strip_in)(block + c * OBM__PLANE_ROWS, rows + c, stride);
    for (; c < n_bytes; c += 16) {
        uint8_t part[OBM__PLANE_ROWS * 16] = {0}, turned[16 * OBM__PLANE_ROWS];
        size_t width = n_bytes - c < 16 ? n_bytes - c : 16;
        for (size_t r = 0; r < n_rows; r++) memcpy(part + r * 16, rows + r * stride + c, width);
        NAME(strip_in)(turned, part, 16);
        memcpy(block + c * OBM__PLANE_ROWS, turned, width * OBM__PLANE_ROWS);
    }
}

FN static void NAME(plane_unpack)(uint8_t *rows, size_t stride, const uint8_t *block, size_t n_bytes) {
    size_t c = 0;
    for (; c + 16 <= n_bytes; c += 16) NAME(strip_out)(rows + c, stride, block + c * OBM__PLANE_ROWS);
    if (c < n_bytes) {
        uint8_t part[16 * OBM__PLANE_ROWS] = {0}, turned[OBM__PLANE_ROWS * 16];
        memcpy(part, block + c * OBM__PLANE_ROWS, (n_bytes - c) * OBM__PLANE_ROWS);
        NAME(strip_out)(turned, 16, part);
        for (size_t r = 0; r < OBM__PLANE_ROWS; r++) memcpy(rows + r * stride + c, turned + r * 16, n_bytes - c);
    }
}

/* ---- tables ---- */

/* The largest magnitude's bits among n (a multiple of VL) elements. */
FN static inline uint32_t NAME(largest)(const float *x, size_t n) {
    V m = SET1(0);
    uint32_t bits[VL], largest = 0;
    float lanes[VL];
    for (size_t i = 0; i < n; i += VL) m = MAX_ABS(m, LOAD(x + i));
    STORE(lanes, m);
    memcpy(bits, lanes, sizeof bits);
    for (size_t i = 0; i < VL; i++) largest = bits[i] > largest ? bits[i] : largest;
    return largest;
}

FN static void NAME(tile_tables)(uint8_t *tables, float *scale, int32_t *abs_sums, const float *x, size_t cols) {
    size_t whole = cols / OBM__PLANE_GROUP, groups = whole + (cols % OBM__PLANE_GROUP != 0);
    float end[OBM__PLANE_GROUP] = {0}, m;
    memcpy(end, x + whole * OBM__PLANE_GROUP, cols % OBM__PLANE_GROUP * sizeof *x);
    uint32_t bits = NAME(largest)(x, whole * OBM__PLANE_GROUP), last = NAME(largest)(end, OBM__PLANE_GROUP);
    if (last > bits) bits = last;
    if (!bits || bits >= 0x7f800000) {
        *scale = bits ? NAN : 0;
        memset(abs_sums, 0, groups * sizeof *abs_sums);
        memset(tables, 0, groups * 8 * OBM__PLANE_TABLE);
        return;
    }
    memcpy(&m, &bits, sizeof m);
    obm__quantiser z = obm__quantise(m);
    *scale = z.scale;
    for (size_t g = 0; g < groups; g++)
        abs_sums[g] = group_tables(tables + g * 8 * OBM__PLANE_TABLE, g < whole ? x + g * OBM__PLANE_GROUP : end, z);
}

FN static void NAME(plane_tables)(uint8_t *tables, float *scales, int32_t *abs_sums, const float *x, size_t cols) {
    for (size_t i = 0; i < cols; i += OBM__PLANE_TILE) NAME(tile_tables)
    (tables + i / 8 * OBM__PLANE_TABLE, scales + i / OBM__PLANE_TILE, abs_sums + i / OBM__PLANE_GROUP, x + i,
     cols - i < OBM__PLANE_TILE ? cols - i : OBM__PLANE_TILE);
}

/* ---- sums ---- */

typedef uint16_t NAME(words) __attribute__((vector_size(BL)));

#define PLANE_FAR(p, o) __builtin_prefetch((const void *)((uintptr_t)(p) + (o)), 0, 3)

#define PLANE_NAME NAME(sums_1)
#define PLANE_FETCH(o) LOAD_B(p0 + (o))
#define PLANE_PREFETCH(o) PLANE_FAR(p0, o);
#include "plane_sums.h"

#define PLANE_NAME NAME(sums_3)
#define PLANE_FETCH(o) XOR_B(XOR_B(LOAD_B(p0 + (o)), LOAD_B(p1 + (o))), LOAD_B(p2 + (o)))
#define PLANE_PREFETCH(o) PLANE_FAR(p0, o), PLANE_FAR(p1, o), PLANE_FAR(p2, o);
#include "plane_sums.h"

FN static inline B NAME(xored)(const uint8_t *const *planes, int n, size_t o) {
    B v = LOAD_B(planes[0] + o);
    for (int i = 1; i < n; i++) v = XOR_B(v, LOAD_B(planes[i] + o));
    return v;
}
#define PLANE_NAME NAME(sums_n)
#define PLANE_FETCH(o) NAME(xored)(planes, n, o)
#define PLANE_PREFETCH(o) \
    for (int i = 0; i < n; i++) PLANE_FAR(planes[i], o);
#include "plane_sums.h"

FN static void NAME(plane_sums)(int32_t *sums, const uint8_t *const *planes, int n, size_t n_bytes,
                                const uint8_t *tables, const int32_t *abs_sums, const void *ahead) {
    int32_t total = 0;
    for (size_t g = 0; g < n_bytes / 8; g++) total += abs_sums[g];
    uintptr_t line = (uintptr_t)(ahead ? ahead : planes[0]);
    (n == 1   ? NAME(sums_1)
     : n == 3 ? NAME(sums_3)
              : NAME(sums_n))(sums, planes, n, n_bytes, tables, total, line, ahead ? 64 : 0);
}

/* ---- adding to dense rows ---- */

/* Pieces past the word are removed by the compiler. */
#define PLANE_PIECE(l) \
    if (l < 32) STORE(y + j + l, ADD(LOAD(y + j + l), SIGNED_AT(c, word, (l & 31))));

FN static void NAME(plane_add)(float *y, const uint8_t *const *bits, int n, float c, size_t cols) {
    const uint8_t *rest[7];
    size_t j = 0;
    for (; j + 32 <= cols; j += 32) {
        uint32_t word = 0;
        for (int p = 0; p < n; p++) {
            uint32_t part;
            memcpy(&part, bits[p] + j / 8, sizeof part);
            word ^= part;
        }
        PLANE_PIECE(0)
        PLANE_PIECE(VL)
        PLANE_PIECE(2 * VL)
        PLANE_PIECE(3 * VL)
    }
    for (int p = 0; p < n; p++) rest[p] = bits[p] + j / 8;
    obm__scalar_plane_add(y + j, rest, n, c, cols - j);
}
