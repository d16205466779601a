/* The base's bf16 matrices in 12 bits per weight (z12, kernels/kernels.h): packed when the model is opened, or behind
 * its first tokens, a share at every step.  Runs ask for rows and get the same bits, so a matrix changes over between
 * two steps; only the bytes that a step reads become fewer.
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

/* A matrix on its way, and where those come from that go on behind the tokens. */
struct obm__packing {
    const obm_kernels *k;
    const obm__matrix *w;
    obm__z12 z;
    int kind;
    chunk *chunks;
    size_t n, done; /* chunks: all, packed */
    uint64_t bytes;
    _Atomic int failed, crowded; /* out of memory; too many escapes */
    size_t matrix, steps,
        wait;       /* the next one, or the one on its way; steps of one token so far, and before it begins */
    uint64_t share; /* bytes of bf16 to pack behind a step */
};

static size_t row_bytes(const obm__z12 *z) { return z->blocks * OBM__Z12_BYTES; }

/* Of a matrix in z12_pages; all begin at a cache line. */
static size_t code_bytes(const obm__matrix *w) {
    return ((size_t)w->rows * (((size_t)w->cols + 63) / 64) * OBM__Z12_BYTES + 63) / 64 * 64;
}

static uint64_t plain_bytes(const obm__matrix *w) { return (uint64_t)(w->rows * w->cols) * 2; }
static bool takes(const obm__matrix *w) { return w->data && w->dtype == OBM_BF16; }

/* first_escape of a row holds its count until all chunks are done. */
static bool pack_rows(const obm__packing *j, size_t first, size_t rows, obm__z12_escape *escapes, size_t room,
                      size_t *n) {
    const obm__z12 *z = &j->z;
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

/* Item: a chunk behind those that are done. */
static void pack_chunks(void *arg, size_t begin, size_t end, int worker) {
    obm__packing *j = arg;
    (void)worker;
    for (size_t i = j->done + begin; i < j->done + end; i++) {
        size_t first = i * CHUNK_ROWS, rows = j->z.rows - first < CHUNK_ROWS ? j->z.rows - first : CHUNK_ROWS;
        size_t room = CHUNK_ROOM(rows * j->z.cols), n = 0;
        obm__z12_escape *escapes = obm__alloc(room, sizeof *escapes), *kept = NULL;
        if (!escapes) j->failed = 1;
        bool fits = escapes && pack_rows(j, first, rows, escapes, room, &n);
        if (escapes && !fits) j->crowded = 1;
        if (fits && n && !(kept = obm__alloc(n, sizeof *kept))) j->failed = 1;
        if (kept) memcpy(kept, escapes, n * sizeof *kept);
        obm_free(j->chunks[i].escapes); /* of an attempt that was stopped */
        j->chunks[i] = (chunk){kept, kept ? n : 0};
        obm_free(escapes);
    }
}

/* ---- what is asked for ---- */

obm_status obm_z12_find(const char *name, obm_z12 *out, obm_error *err) {
    static const char *const names[] = {"auto", "on", "off"};
    for (int i = 0; i < 3; i++) {
        if (strcmp(name, names[i])) continue;
        *out = (obm_z12)i;
        return OBM_OK;
    }
    return obm__fail(err, OBM_E_ARG, "z12: expected auto, on or off, found \"%.64s\"", name);
}

obm_status obm__z12_check(obm_z12 wanted, obm_error *err) {
    if ((unsigned)wanted <= OBM_Z12_OFF) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "z12: expected 0 (auto) to %d (off), found %d", OBM_Z12_OFF, (int)wanted);
}

/* ---- memory ---- */

static const obm__matrix *find_matrix(const obm_model *m, size_t i, obm__role *role) {
    int64_t layer;
    *role = obm__matrix_role(m, i, &layer);
    return obm__weights_at(m->base_alone, layer, *role);
}

static uint64_t count_to_come(const obm_model *m) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < obm__matrix_count(m); i++) {
        obm__role role;
        const obm__matrix *w = find_matrix(m, i, &role);
        if (takes(w)) bytes += plain_bytes(w);
    }
    return bytes;
}

/* Codes of all matrices in a row, so that small ones too lie in huge pages: without them a step reads 1.2 times as fast
 * as bf16, with them 1.3 times (AVX2 on Zen 3).  Where rows have places, each matrix has its own. */
static bool map_codes(obm_model *m) {
    size_t bytes = 0;
    for (size_t i = 0; i < obm__matrix_count(m); i++) {
        obm__role role;
        const obm__matrix *w = find_matrix(m, i, &role);
        if (takes(w)) bytes += code_bytes(w);
    }
    m->z12_room = m->placement ? 0 : bytes;
    m->z12_pages = m->z12_room ? obm__map_huge(m->z12_room) : NULL;
    return m->z12_pages || !m->z12_room;
}

static void clear(obm_model *m, obm__z12 *z) {
    if (m->placement) obm__place_free(m, z->codes);
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
static bool join_escapes(obm__packing *j) {
    obm__z12 *z = &j->z;
    size_t n = 0, at = 0;
    for (size_t i = 0; i < j->n; i++) n += j->chunks[i].n;
    if (j->failed || j->crowded || !is_worth_it(n, z->rows * z->cols)) return false;
    z->escapes = obm__alloc(n + 1, sizeof *z->escapes);
    if (!z->escapes) {
        j->failed = 1;
        return false;
    }
    for (size_t i = 0; i < j->n; at += j->chunks[i++].n)
        if (j->chunks[i].n) memcpy(z->escapes + at, j->chunks[i].escapes, j->chunks[i].n * sizeof *z->escapes);
    place_escapes(z);
    j->bytes += n * sizeof *z->escapes;
    return true;
}

/* ---- a matrix: begun, packed, taken ---- */

/* Codes and tables lie with their rows; an index of four bytes per row, and the few escapes, do not. */
static bool begin(obm_model *m, obm__packing *j, obm__role role, const obm__matrix *w) {
    obm__z12 *z = &j->z;
    j->k = m->ctx->k;
    j->w = w;
    j->kind = obm__role_kind(role);
    j->n = ((size_t)w->rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    j->done = 0;
    j->failed = j->crowded = 0;
    *z = (obm__z12){.rows = (size_t)w->rows, .cols = (size_t)w->cols, .blocks = ((size_t)w->cols + 63) / 64};
    z->codes = m->placement ? obm__place_alloc(m, OBM_PLACED_WEIGHTS, j->kind, 1, z->rows, row_bytes(z))
                            : (uint8_t *)m->z12_pages + m->z12_used;
    z->tables = obm__place_alloc(m, OBM_PLACED_WEIGHTS, j->kind, 1, z->rows, OBM__Z12_TABLE);
    z->first_escape = obm__calloc(z->rows + 1, sizeof *z->first_escape);
    j->chunks = obm__calloc(j->n, sizeof *j->chunks);
    j->bytes = z->rows * (row_bytes(z) + OBM__Z12_TABLE + sizeof *z->first_escape);
    return z->codes && z->tables && z->first_escape && j->chunks;
}

static void drop(obm_model *m, obm__packing *j) {
    for (size_t i = 0; j->chunks && i < j->n; i++) obm_free(j->chunks[i].escapes);
    obm_free(j->chunks);
    j->chunks = NULL;
    clear(m, &j->z);
}

/* The next `count` chunks; all of them where rows have places, whose workers pack them. */
static obm_status pack_next(obm_model *m, obm__packing *j, size_t count, obm_error *err) {
    size_t slice = (size_t)m->ctx->threads * CHUNKS_AT_ONCE;
    if (m->placement)
        OBM_TRY(obm__place_slices(m, j->kind, CHUNK_ROWS, j->n, slice, pack_chunks, j, err));
    else
        OBM_TRY(obm__parallel_slices(m->ctx, count, 1, slice, pack_chunks, j, m->pulse, err));
    j->done += count;
    return OBM_OK;
}

/* From the next step on runs read what is packed, if it is worth it. */
static obm_status take(obm_model *m, obm__packing *j, size_t i, obm_error *err) {
    obm_status status = OBM_OK;
    bool packed = join_escapes(j);
    if (packed) status = obm__place_spread(m, j->z.codes, err);
    if (packed && status == OBM_OK) status = obm__place_spread(m, j->z.tables, err);
    if (packed && status == OBM_OK) {
        m->z12[i] = j->z;
        j->z = (obm__z12){0};
        m->z12_used += code_bytes(j->w);
        m->z12_bytes += j->bytes;
        m->z12_saved += plain_bytes(j->w);
        if (m->placement) ((obm__matrix *)j->w)->z12 = &m->z12[i];
    }
    bool failed = j->failed;
    drop(m, j);
    return failed ? obm__fail_nomem(err, j->bytes) : status;
}

/* Routes copy these matrices: what they point to fills up later. */
static obm_status point_to_packed(obm_model *m, obm_error *err) {
    size_t count = obm__matrix_count(m);
    m->z12 = obm__calloc(count, sizeof *m->z12);
    if (!m->z12) return obm__fail_nomem(err, count * sizeof *m->z12);
    if (!map_codes(m)) return obm__fail_nomem(err, m->z12_room);
    for (size_t i = 0; i < count && !m->placement; i++) {
        obm__role role;
        obm__matrix *w = (obm__matrix *)find_matrix(m, i, &role);
        if (takes(w)) w->z12 = &m->z12[i];
    }
    return OBM_OK;
}

static obm_status pack_matrix(obm_model *m, obm__packing *j, size_t i, obm_error *err) {
    obm__role role;
    const obm__matrix *w = find_matrix(m, i, &role);
    if (!takes(w)) return OBM_OK;
    obm_status status = begin(m, j, role, w) ? OBM_OK : obm__fail_nomem(err, j->bytes);
    if (status == OBM_OK) status = pack_next(m, j, j->n, err);
    if (status == OBM_OK) return take(m, j, i, err);
    drop(m, j);
    return status;
}

/* Nothing remains of matrices that were packed and not taken. */
static void release_rest(obm_model *m) {
    if (m->z12_pages) obm__pages_release(m->z12_pages + m->z12_used, m->z12_room - m->z12_used);
}

/* ---- when the model is opened ---- */

/* Copies of the NUMA nodes are packed or not; else the mapping is there as well, if memory has room for both. */
static bool fits_beside(const obm_model *m) {
    obm_context_info info;
    uint64_t limit = obm__memory_limit();
    obm_context_describe(m->ctx, &info);
    if (limit > info.memory_free) limit = info.memory_free;
    return !m->placement && m->base_bytes / 4 * 7 <= limit / 4 * 3;
}

obm_status obm__z12_load(obm_model *m, obm_error *err) {
    obm__packing j = {0};
    if (!count_to_come(m))
        obm__warn(m->ctx, "%s: no matrix of the base is bf16: none is held in 12 bits per weight",
                  obm_checkpoint_path(m->base));
    m->z12_beside = fits_beside(m);
    OBM_TRY(point_to_packed(m, err));
    for (size_t i = 0; i < obm__matrix_count(m); i++) {
        OBM_TRY(pack_matrix(m, &j, i, err));
        /* Of files, not of w: a tensor that the file does not keep aligned is a copy on the heap. */
        if (!m->z12_beside) obm__checkpoint_release_pages(m->base);
    }
    release_rest(m);
    return OBM_OK;
}

/* ---- behind the tokens ---- */

/* Packing takes as long as 15 to 50 steps, the more the longer the system needs to give new pages, and saves a quarter
 * of each step from then on.  Who has decoded as many tokens as it takes has lost at most twice what was best, whenever
 * the text ends. */
#define STEPS_BEFORE 192
/* Steps over which it is spread. */
#define STEPS_WHILE 128

void obm__z12_end(obm_model *m) {
    if (m->packing) drop(m, m->packing);
    obm_free(m->packing);
    m->packing = NULL;
    m->z12_to_come = 0;
    release_rest(m);
}

static void give_up(obm_model *m) {
    obm__warn(m->ctx, "%s: no memory to hold more matrices in 12 bits per weight: %.0f MB stay bf16",
              obm_checkpoint_path(m->base), (double)m->z12_to_come * 1e-6);
    obm__z12_end(m);
}

void obm__z12_begin(obm_model *m, size_t steps_before, size_t steps_while) {
    m->z12_to_come = count_to_come(m);
    m->packing = m->z12_to_come ? obm__calloc(1, sizeof *m->packing) : NULL;
    if (!m->z12_to_come) return;
    if (!m->packing || point_to_packed(m, NULL) != OBM_OK) {
        give_up(m);
        return;
    }
    m->z12_beside = true;
    m->packing->wait = steps_before;
    m->packing->share = m->z12_to_come / steps_while + 1;
}

static bool is_worth_beginning(const obm_model *m) {
    return obm_kernels_z12_gains(m->ctx->k) && m->base_bytes > 2 * obm__topology_cache(m->ctx->topology) && fits_beside(m);
}

void obm__z12_auto(obm_model *m) {
    if (is_worth_beginning(m)) obm__z12_begin(m, STEPS_BEFORE, STEPS_WHILE);
}

/* Some chunks of the matrix at hand, at least one for each thread; no memory for them ends it all, quietly for the
 * caller. */
static obm_status pack_some(obm_model *m, uint64_t *left, obm_error *err) {
    obm__packing *j = m->packing;
    obm__role role;
    const obm__matrix *w = find_matrix(m, j->matrix, &role);
    if (!j->chunks && !begin(m, j, role, w)) return obm__fail_nomem(err, j->bytes);
    uint64_t chunk = (uint64_t)CHUNK_ROWS * (uint64_t)w->cols * 2, count = *left / chunk;
    if (count < (uint64_t)m->ctx->threads) count = (uint64_t)m->ctx->threads;
    if (count > j->n - j->done) count = j->n - j->done;
    OBM_TRY(pack_next(m, j, (size_t)count, err));
    *left -= count * chunk < *left ? count * chunk : *left;
    if (j->done < j->n && !j->failed && !j->crowded) return OBM_OK;
    OBM_TRY(take(m, j, j->matrix++, err));
    m->z12_to_come -= plain_bytes(w);
    return OBM_OK;
}

obm_status obm__z12_step(obm_model *m, size_t tokens, obm_error *err) {
    obm__packing *j = m->packing;
    obm__role role;
    if (!j || tokens != 1 || j->steps++ < j->wait) return OBM_OK;
    if (j->steps == j->wait + 1 && !fits_beside(m)) { /* others may have taken the memory since the model was opened */
        give_up(m);
        return OBM_OK;
    }
    for (uint64_t left = j->share; left;) {
        while (j->matrix < obm__matrix_count(m) && !takes(find_matrix(m, j->matrix, &role))) j->matrix++;
        if (j->matrix == obm__matrix_count(m)) {
            obm__z12_end(m);
            return OBM_OK;
        }
        obm_status status = pack_some(m, &left, err);
        if (status == OBM_OK) continue;
        if (status != OBM_E_NOMEM) return status;
        give_up(m);
        return OBM_OK;
    }
    return OBM_OK;
}

void obm__z12_free_all(obm_model *m) {
    obm__z12_end(m);
    for (size_t i = 0; m->z12 && i < obm__matrix_count(m); i++) clear(m, &m->z12[i]);
    obm_free(m->z12);
    obm__place_unmap(m->z12_pages, m->z12_room);
    m->z12 = NULL;
    m->z12_pages = NULL;
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
