/* A batch block by block of rows, the end of batch.h and batch_wide.h.
 *
 *   BATCH_MOST                       rows of a block, from tokens and n
 *   BATCH_AHEAD                      rows from those that are multiplied to those that are asked for
 */
FN static void BATCH_ALL(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t ldx,
                         size_t tokens, size_t n) {
    _Alignas(64) float room[BATCH_ROOM];
    size_t most = BATCH_MOST;
    NAME(batch_ask) ask = {0, 0, ld * sizeof *w, ROWS_STEP * sizeof *w, BATCH_AHEAD};
    if (BATCH_FITS(tokens, n)) BATCH_ORDER(room, x, ldx, tokens, n);
    for (size_t r = 0, count; r < rows; r += count) {
        count = rows - r < most ? rows - r : most;
        ask.at = (uintptr_t)(w + r * ld);
        BATCH_BLOCK(y + r, ldy, w + r * ld, ld, count, x, ldx, tokens, n, room, ask);
    }
}

FN static void BATCH_NAME(float *y, size_t ldy, const ROWS_TYPE *w, size_t ld, size_t rows, const float *x, size_t ldx,
                          size_t tokens, size_t n) {
    if (tokens > 1) BATCH_ALL(y, ldy, w, ld, rows, x, ldx, tokens, n);
    if (tokens == 1) ROWS_NAME(y, w, ld, rows, x, n);
}
