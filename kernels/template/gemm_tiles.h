/*
 * gemm of bf16 by AMX: one instruction multiplies 16 vectors of 16 pairs by 16 pairs of 16 rows.  Vectors, halves of packed
 * strips and results are such tiles where they lie.  32 rows by up to 32 vectors: tiles 0 to 3 are sums, 4 and 5 vectors,
 * 6 and 7 the halves of a strip.  For AVX-512 with AMX; gemm_pairs does it where the system hands out no tiles.
 */
enum { TILE = 16, TILE_BYTES = 64 /* of a row */, TILE_TOKENS = 2 * TILE };

/* What LDTILECFG reads. */
typedef struct tile_shapes {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_shapes;

/* gcc's intrinsics do not say that they read memory: what was stored for them is declared as seen. */
#define TILE_SOURCE(p) __asm__ volatile("" : : "r"(p) : "memory")

/* For 1 to 32 vectors at a time; tiles are the thread's, until they are released. */
FN_TILES static void tiles_begin(size_t tokens) {
    _Alignas(64) tile_shapes s = {.palette = 1};
    const size_t first = tokens < TILE ? tokens : TILE, rows[8] = {first,          first, tokens - first, tokens - first,
                                                                   first, tokens - first, TILE,           TILE};
    for (size_t i = 0; i < 8; i++) {
        s.rows[i] = (uint8_t)rows[i];
        s.bytes[i] = rows[i] ? TILE_BYTES : 0;
    }
    TILE_SOURCE(&s);
    _tile_loadconfig(&s);
}

/* 16 pairs of columns. */
FN_TILES static inline void tiles_step(const uint32_t *x, size_t ldx, const uint32_t *w, size_t second, int both) {
    _tile_loadd(4, x, ldx * sizeof *x);
    _tile_loadd(6, w, TILE_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + second, TILE_BYTES);
    _tile_dpbf16ps(1, 4, 7);
    if (!both) return;
    _tile_loadd(5, x + TILE * ldx, ldx * sizeof *x);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

/* Fewer than 16 pairs, with zeros behind them: an element's sums take the same steps whatever it is computed beside. */
FN_TILES static void tiles_rest(const uint32_t *x, size_t ldx, size_t tokens, const uint32_t *w, size_t second, size_t n) {
    _Alignas(64) uint32_t vectors[TILE_TOKENS * TILE], halves[2 * TILE * TILE] = {0};
    for (size_t t = 0; t < tokens; t++)
        _mm512_store_si512(vectors + t * TILE, _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), x + t * ldx));
    memcpy(halves, w, n * TILE_BYTES);
    memcpy(halves + TILE * TILE, w + second, n * TILE_BYTES);
    TILE_SOURCE(vectors);
    TILE_SOURCE(halves);
    tiles_step(vectors, TILE, halves, TILE * TILE, tokens > TILE);
}

FN_TILES static void tiles_block(float *y, size_t ldy, const uint32_t *w, size_t second, const uint32_t *x, size_t ldx,
                                 size_t tokens, size_t n, int add) {
    const int both = tokens > TILE;
    float *lower = y + TILE * ldy;
    const size_t stride = ldy * sizeof *y;
    if (add) {
        _tile_loadd(0, y, stride);
        _tile_loadd(1, y + TILE, stride);
        if (both) {
            _tile_loadd(2, lower, stride);
            _tile_loadd(3, lower + TILE, stride);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (both) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    size_t j = 0;
    for (; j + TILE <= n; j += TILE) tiles_step(x + j, ldx, w + j * OBM__GEMM_HALF, second, both);
    if (j < n) tiles_rest(x + j, ldx, tokens, w + j * OBM__GEMM_HALF, second, n - j);
    _tile_stored(0, y, stride);
    _tile_stored(1, y + TILE, stride);
    if (both) {
        _tile_stored(2, lower, stride);
        _tile_stored(3, lower + TILE, stride);
    }
}

/* `group` vectors at a time, which divides them; a strip's block of columns stays in the nearest cache. */
FN_TILES static void tiles_all(float *y, size_t ldy, const uint32_t *packed, size_t strips, const uint32_t *x, size_t ldx,
                               size_t tokens, size_t n, size_t group) {
    tiles_begin(group);
    for (size_t first = 0, count; first < n; first += count) {
        count = n - first < OBM__GEMM_BLOCK ? n - first : OBM__GEMM_BLOCK;
        for (size_t r = 0; r < strips * OBM__GEMM_ROWS; r += OBM__GEMM_ROWS)
            for (size_t t = 0; t < tokens; t += group)
                tiles_block(y + t * ldy + r, ldy, packed + r * n + first * OBM__GEMM_HALF, OBM__GEMM_HALF * n,
                            x + t * ldx + first, ldx, group, count, first > 0);
    }
    _tile_release();
}

static void gemm_tiles(float *y, size_t ldy, const uint32_t *packed, size_t strips, const uint32_t *x, size_t ldx,
                       size_t tokens, size_t n) {
    if (!n || !obm__tiles_allowed()) {
        gemm_pairs(y, ldy, packed, strips, x, ldx, tokens, n);
        return;
    }
    const size_t rest = tokens % TILE_TOKENS, whole = tokens - rest;
    if (whole) tiles_all(y, ldy, packed, strips, x, ldx, whole, n, TILE_TOKENS);
    if (rest) tiles_all(y + whole * ldy, ldy, packed, strips, x + whole * ldx, ldx, rest, n, rest);
}
