/* The base's bf16 matrices in 12 bits per weight (z12, kernels/kernels.h): packed when the model is opened, instead of
 * being read from the mapping.  Runs ask for rows and get the same bits; only the bytes that a step reads become fewer.
 */
#include "model.h"

#include <string.h>

#define CHUNK_ROWS 64
/* Chunks of a worker between two looks at the pulse: some 10 ms. */
#define CHUNKS_AT_ONCE 8
/* A matrix with more escapes stays as it is: they cost more than the packing saves. */
#define ESCAPES_AT_MOST 0.01
/* Escapes of one chunk that are looked at before its matrix is given up. */
#define CHUNK_ROOM(weights) ((weights) / 16 + 64)

typedef struct chunk {
    obm__z12_escape *escapes;
    size_t n;
} chunk;

typedef struct pack_job {
    const obm_kernels *k;
    const obm__matrix *w;
    obm__z12 *z;
    chunk *chunks;
    _Atomic int failed, crowded; /* out of memory; too many escapes */
} pack_job;

static size_t row_bytes(const obm__z12 *z) { return z->blocks * OBM__Z12_BYTES; }

/* first_escape of a row holds its count until all chunks are done. */
static bool pack_rows(const pack_job *j, size_t first, size_t rows, obm__z12_escape *escapes, size_t room, size_t *n) {
    const obm__z12 *z = j->z;
    *n = 0;
    for (size_t row = first; row < first + rows; row++) {
        size_t found = j->k->z12_encode(z->codes + row * row_bytes(z), z->tables + row * OBM__Z12_TABLE, escapes + *n,
                                        room - *n, (const uint16_t *)j->w->data + row * z->cols, z->cols);
        if (found > room - *n) return false;
        z->first_escape[row] = (uint32_t)found;
        *n += found;
    }
    return true;
}

static void pack_chunks(void *arg, size_t begin, size_t end, int worker) {
    pack_job *j = arg;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        size_t first = i * CHUNK_ROWS, rows = j->z->rows - first < CHUNK_ROWS ? j->z->rows - first : CHUNK_ROWS;
        size_t room = CHUNK_ROOM(rows * j->z->cols), n = 0;
        obm__z12_escape *escapes = obm__alloc(room, sizeof *escapes), *kept = NULL;
        if (!escapes) j->failed = 1;
        bool fits = escapes && pack_rows(j, first, rows, escapes, room, &n);
        if (escapes && !fits) j->crowded = 1;
        if (fits && n && !(kept = obm__alloc(n, sizeof *kept))) j->failed = 1;
        if (kept) memcpy(kept, escapes, n * sizeof *kept);
        j->chunks[i] = (chunk){kept, kept ? n : 0};
        obm_free(escapes);
    }
}

static void clear(obm_model *m, obm__z12 *z) {
    obm__place_free(m, z->codes);
    obm__place_free(m, z->tables);
    obm_free(z->escapes);
    obm_free(z->first_escape);
    *z = (obm__z12){0};
}

/* Counts become places. */
static void place_escapes(obm__z12 *z) {
    uint32_t at = 0;
    for (size_t row = 0; row <= z->rows; row++) {
        uint32_t n = row < z->rows ? z->first_escape[row] : 0;
        z->first_escape[row] = at;
        at += n;
    }
}

static bool is_worth_it(uint64_t escapes, uint64_t weights) {
    return (double)escapes <= ESCAPES_AT_MOST * (double)weights;
}

/* False: the matrix stays plain. */
static bool join_escapes(pack_job *j, size_t chunks, uint64_t *bytes) {
    obm__z12 *z = j->z;
    size_t n = 0, at = 0;
    for (size_t i = 0; i < chunks; i++) n += j->chunks[i].n;
    if (j->crowded || !is_worth_it(n, z->rows * z->cols)) return false;
    z->escapes = obm__alloc(n + 1, sizeof *z->escapes);
    if (!z->escapes) {
        j->failed = 1;
        return false;
    }
    for (size_t i = 0; i < chunks; at += j->chunks[i++].n)
        if (j->chunks[i].n) memcpy(z->escapes + at, j->chunks[i].escapes, j->chunks[i].n * sizeof *z->escapes);
    place_escapes(z);
    *bytes += n * sizeof *z->escapes;
    return true;
}

/* Codes and tables lie with their rows; an index of four bytes per row, and the few escapes, do not. */
static bool alloc(obm_model *m, int kind, const obm__matrix *w, obm__z12 *z, uint64_t *bytes) {
    *z = (obm__z12){.rows = (size_t)w->rows, .cols = (size_t)w->cols, .blocks = ((size_t)w->cols + 63) / 64};
    z->codes = obm__place_alloc(m, OBM_PLACED_WEIGHTS, kind, 1, z->rows, row_bytes(z));
    z->tables = obm__place_alloc(m, OBM_PLACED_WEIGHTS, kind, 1, z->rows, OBM__Z12_TABLE);
    z->first_escape = obm__calloc(z->rows + 1, sizeof *z->first_escape);
    *bytes = z->rows * (row_bytes(z) + OBM__Z12_TABLE + sizeof *z->first_escape);
    return z->codes && z->tables && z->first_escape;
}

/* z->codes stays NULL where the matrix is not packed. */
static obm_status pack_matrix(obm_model *m, int kind, obm__matrix *w, obm__z12 *z, obm_error *err) {
    size_t chunks = ((size_t)w->rows + CHUNK_ROWS - 1) / CHUNK_ROWS, plain = (size_t)(w->rows * w->cols) * 2;
    uint64_t bytes = 0;
    pack_job j = {.k = m->ctx->k, .w = w, .z = z, .chunks = obm__calloc(chunks, sizeof *j.chunks)};
    bool there = j.chunks && alloc(m, kind, w, z, &bytes), packed = false;
    obm_status status = OBM_OK;
    if (there)
        status = obm__place_slices(m, kind, CHUNK_ROWS, chunks, (size_t)m->ctx->threads * CHUNKS_AT_ONCE, pack_chunks,
                                   &j, err);
    if (there && status == OBM_OK && !j.failed) packed = join_escapes(&j, chunks, &bytes);
    for (size_t i = 0; j.chunks && i < chunks; i++) obm_free(j.chunks[i].escapes);
    obm_free(j.chunks);
    if (packed) status = obm__place_spread(m, z->codes, err);
    if (packed && status == OBM_OK) status = obm__place_spread(m, z->tables, err);
    if (packed && status == OBM_OK) {
        w->z12 = z;
        m->z12_bytes += bytes;
        m->z12_saved += plain;
        return OBM_OK;
    }
    clear(m, z);
    if (status != OBM_OK) return status;
    return there && !j.failed ? OBM_OK : obm__fail_nomem(err, plain / 4 * 3);
}

obm_status obm__z12_load(obm_model *m, obm_error *err) {
    size_t count = obm__matrix_count(m);
    m->z12 = obm__calloc(count, sizeof *m->z12);
    if (!m->z12) return obm__fail_nomem(err, count * sizeof *m->z12);
    for (size_t i = 0; i < count; i++) {
        int64_t layer;
        obm__role role = obm__matrix_role(m, i, &layer);
        obm__matrix *w = (obm__matrix *)obm__weights_at(m->base_alone, layer, role);
        if (w->data && w->dtype == OBM_BF16) OBM_TRY(pack_matrix(m, obm__role_kind(role), w, &m->z12[i], err));
        /* Of files, not of w: a tensor that the file does not keep aligned is a copy on the heap. */
        obm__checkpoint_release_pages(m->base);
    }
    return OBM_OK;
}

void obm__z12_free_all(obm_model *m) {
    for (size_t i = 0; m->z12 && i < obm__matrix_count(m); i++) clear(m, &m->z12[i]);
    obm_free(m->z12);
    m->z12 = NULL;
}

/* ---- what packing a checkpoint would give ---- */

obm_status obm_checkpoint_z12(const obm_checkpoint *c, const char *name, int64_t rows, obm_z12_counts *out,
                              obm_error *err) {
    obm_tensor t;
    *out = (obm_z12_counts){0};
    if (rows < 0) return obm__fail(err, OBM_E_ARG, "rows: expected 0 (all) or more, found %lld", (long long)rows);
    OBM_TRY(obm_checkpoint_get(c, name, &t, err));
    if (t.ndim != 2 || t.dtype != OBM_BF16 || !t.shape[0] || !t.shape[1]) return OBM_OK;
    size_t all = (size_t)t.shape[0], cols = (size_t)t.shape[1];
    size_t taken = !rows || (uint64_t)rows > all ? all : (size_t)rows, blocks = (cols + 63) / 64;
    uint16_t *row = obm__alloc(cols, sizeof *row); /* files do not always keep tensors aligned */
    uint8_t *codes = obm__alloc(blocks, OBM__Z12_BYTES), table[OBM__Z12_TABLE];
    obm__z12_escape none;
    for (size_t i = 0; row && codes && i < taken; i++) {
        memcpy(row, (const uint8_t *)t.data + all / taken * i * cols * sizeof *row, cols * sizeof *row);
        out->escapes += c->ctx->k->z12_encode(codes, table, &none, 0, row, cols);
        out->weights += cols;
    }
    out->fits = is_worth_it(out->escapes, out->weights);
    bool there = row && codes;
    obm_free(row);
    obm_free(codes);
    return there ? OBM_OK : obm__fail_nomem(err, cols * sizeof *row + blocks * OBM__Z12_BYTES);
}
