/*
 * Several tensors of an expert's file at once: workers take pieces in the order of the file, read base and expert once
 * (for the base's hash too), and write what they made to its place themselves; only the checksum of the file has to
 * see the bytes in order, and takes each piece as its turn comes.  One plane per matrix and whole tensors; nothing
 * that needs a second look at a tensor.
 *
 * Memory: a piece is one chunk of the base, its result at most a 16th of that, and no more than PENDING pieces per
 * thread are begun and not yet in the checksum; of base and expert a thread has one slice each.
 */
#include "pack_parts.h"

#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#define PENDING 3
/* Bytes that are done before another thread wakes up. */
#define ALONE ((uint64_t)1 << 20)
/* Elements of base and expert that fit the second-level cache, where reading leaves them for hash and arithmetic. */
#define SLICE ((int64_t)1 << 16)
/* Bytes of a slice of a whole tensor: the longer a write is, the larger the page cache's units are. */
#define COPIED ((size_t)512 << 10)

typedef struct part {
    const obm__stream_part *p;
    int64_t cols, row_bytes, elements; /* a row of a whole tensor is one element */
    int64_t chunk, slice;              /* elements of a piece, and of what is read at a time: whole rows */
    size_t pieces;
    uint64_t offset; /* in the file's data */
    size_t digest;   /* of the base's first chunk; SIZE_MAX: not to be hashed here */
    float *alphas;
    double *row_sums;
} part;

typedef struct piece {
    size_t part, index;
    int64_t begin, end; /* elements */
    int64_t passed;     /* of a whole tensor: elements before are in the checksum */
    uint8_t *signs;
    _Atomic int done;
} piece;

/* What a worker has to itself. */
typedef struct desk {
    uint8_t *base, *expert; /* (slice_bytes) each */
    void *scratch;          /* of obm__onebit_rows */
} desk;

typedef struct stream {
    obm_context *ctx;
    const obm__stream *given;
    obm__reader *reader;
    part *parts;
    piece *ring; /* (window) */
    size_t window, total;
    uint64_t bytes; /* of the expert, in all parts */
    uint8_t *desks; /* (threads, desk_bytes) */
    size_t slice_bytes, desk_bytes;
    atomic_flag lock; /* of what follows, up to the empty line */
    size_t next, part_next, index_next;
    obm_status status;
    obm_error error;

    _Atomic size_t failed_piece; /* the lowest: those before it go on, so that the error does not depend on threads */
    _Atomic int stop, committing;
    _Atomic size_t committed;
    _Atomic uint64_t done; /* bytes of the expert */
} stream;

static void lock(stream *s) {
    while (atomic_flag_test_and_set(&s->lock)) sched_yield();
}
static void unlock(stream *s) { atomic_flag_clear(&s->lock); }

/* Under the lock: what take() hands out afterwards must know. */
static void note_failure(stream *s, size_t piece_number, obm_status status, const obm_error *why) {
    if (piece_number < s->failed_piece) {
        s->failed_piece = piece_number;
        s->status = status;
        s->error = *why;
    }
    atomic_store(&s->stop, 1);
}

static void fail(stream *s, size_t piece_number, obm_status status, const obm_error *why) {
    lock(s);
    note_failure(s, piece_number, status, why);
    unlock(s);
}

static bool is_over(const stream *s, size_t number) {
    return atomic_load(&s->stop) && number > atomic_load(&s->failed_piece);
}

/* ---- pieces ---- */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static const void *element(const obm_tensor *t, int64_t i) {
    return (const uint8_t *)t->data + (size_t)i * obm_dtype_size(t->dtype);
}

static obm_status begin_part(stream *s, part *p, obm_error *err) {
    OBM_TRY(obm__task_vector_check(s->given->v, err));
    if (!p->p->planes) return OBM_OK;
    const obm_tensor *t = &p->p->pair->base;
    int64_t scales = obm__scale_count(p->p->scale, t->shape[0], p->cols);
    p->alphas = obm__calloc((size_t)scales, sizeof *p->alphas);
    if (!p->alphas) return obm__fail_nomem(err, (uint64_t)scales * sizeof *p->alphas);
    if (p->p->scale.kind != OBM_SCALE_MATRIX) return OBM_OK;
    p->row_sums = obm__calloc((size_t)t->shape[0], sizeof *p->row_sums);
    return p->row_sums ? OBM_OK : obm__fail_nomem(err, (uint64_t)t->shape[0] * sizeof *p->row_sums);
}

/* The next piece in the order of the file; false when there is none. */
static bool take(stream *s, size_t *number) {
    obm_error err;
    obm_status status = OBM_OK;
    lock(s);
    bool found = s->next < s->total && !atomic_load(&s->stop);
    if (found) {
        *number = s->next++;
        while (s->index_next == s->parts[s->part_next].pieces) s->part_next++, s->index_next = 0;
        part *p = &s->parts[s->part_next];
        if (s->index_next == 0) status = begin_part(s, p, &err);
        if (status != OBM_OK) note_failure(s, *number, status, &err);
    }
    size_t in_part = s->part_next, index = found ? s->index_next++ : 0;
    unlock(s);
    if (!found || status != OBM_OK) return false;
    while (*number - atomic_load(&s->committed) >= s->window && !is_over(s, *number))
        nanosleep(&(struct timespec){0, 50000}, NULL);
    if (is_over(s, *number)) return false;
    piece *q = &s->ring[*number % s->window];
    const part *p = &s->parts[in_part];
    q->part = in_part;
    q->index = index;
    q->begin = (int64_t)index * p->chunk;
    q->end = least(q->begin + p->chunk, p->elements);
    q->passed = q->begin;
    q->signs = NULL;
    return true;
}

/* ---- work on one piece ---- */

static desk desk_of(const stream *s, int worker) {
    uint8_t *at = s->desks + (size_t)worker * s->desk_bytes;
    return (desk){at, at + s->slice_bytes, at + 2 * s->slice_bytes};
}

static obm_status read_elements(const stream *s, const obm_tensor *t, int64_t begin, int64_t n, void *to,
                                obm_error *err) {
    return n <= 0 ? OBM_OK
                  : obm__reader_get(s->reader, element(t, begin), (size_t)n * obm_dtype_size(t->dtype), to, err);
}

/* n elements of a whole tensor, the first `paired` of which the base has too: the first that is not finite, INT64_MAX
 * if all are. */
static int64_t find_bad(const obm_kernels *k, const obm__pair *p, int64_t paired, int64_t n) {
    float d[OBM_BLOCK], scratch[OBM_BLOCK];
    for (int64_t at = 0, m; at < n; at += m) {
        m = least(n - at, OBM_BLOCK);
        int64_t both = paired < at ? 0 : least(paired - at, m);
        obm__pair_read(k, p, at, both, d, scratch);
        obm__widen(k, &p->expert, at + both, m - both, d + both);
        int64_t bad = (int64_t)k->find_nonfinite(d, (size_t)m);
        if (bad < m) return at + bad;
    }
    return INT64_MAX;
}

/* The callback is the caller's thread's, which is worker 0. */
static obm_status look(const stream *s, obm_error *err) {
    obm__pulse *t = s->given->ticker;
    uint64_t done = s->given->ticks + atomic_load(&s->done);
    if (t && done > t->done && done <= t->total) t->done = done;
    return obm__pulse_check(t, err);
}

static obm_status note_done(stream *s, const part *p, int64_t elements, int worker, obm_error *err) {
    atomic_fetch_add(&s->done, (uint64_t)elements * obm_dtype_size(p->p->pair->expert.dtype));
    return worker ? OBM_OK : look(s, err);
}

/* Elements of a whole tensor into the checksum, in this piece's turn, read once more; `buffer` holds a slice. */
static obm_status pass_elements(const stream *s, const part *p, piece *q, int64_t end, uint8_t *buffer,
                                obm_error *err) {
    const obm_tensor *t = &p->p->pair->expert;
    while (q->passed < end) {
        int64_t n = least(end - q->passed, p->slice);
        OBM_TRY(read_elements(s, t, p->p->begin + q->passed, n, buffer, err));
        obm__st_writer_pass(s->given->writer, buffer, (size_t)n * obm_dtype_size(t->dtype));
        q->passed += n;
    }
    return OBM_OK;
}

/* While earlier pieces are missing a slice is not kept for its turn: it is read once more then, less often than not. */
static obm_status write_elements(const stream *s, size_t number, const part *p, piece *q, int64_t begin, int64_t n,
                                 const desk *d, obm_error *err) {
    size_t size = obm_dtype_size(p->p->pair->expert.dtype);
    uint64_t at = p->offset + (uint64_t)begin * size;
    OBM_TRY(obm__st_writer_put(s->given->writer, at, d->expert, (size_t)n * size, err));
    if (atomic_load(&s->committed) != number) return OBM_OK;
    OBM_TRY(pass_elements(s, p, q, begin, d->base, err));
    obm__st_writer_pass(s->given->writer, d->expert, (size_t)n * size);
    q->passed = begin + n;
    return OBM_OK;
}

/* c: nullable. */
static obm_status work_elements(stream *s, size_t number, const part *p, obm__base_chunk *c, int worker,
                                obm_error *err) {
    piece *q = &s->ring[number % s->window];
    desk d = desk_of(s, worker);
    obm__pair slice = *p->p->pair;
    int64_t from = p->p->begin, in_base = obm_tensor_count(&slice.base);
    slice.base.data = d.base;
    slice.expert.data = d.expert;
    for (int64_t at = q->begin, n; at < q->end && !is_over(s, number); at += n) {
        n = least(p->slice, q->end - at);
        int64_t paired = in_base < from + at ? 0 : least(in_base - from - at, n);
        OBM_TRY(read_elements(s, &p->p->pair->base, from + at, paired, d.base, err));
        OBM_TRY(read_elements(s, &p->p->pair->expert, from + at, n, d.expert, err));
        if (c) obm__base_chunk_add(c, d.base, (size_t)paired * obm_dtype_size(slice.base.dtype));
        int64_t bad = find_bad(s->ctx->k, &slice, paired, n);
        if (bad != INT64_MAX) return obm__fail_nonfinite(err, p->p->pair, from + at + bad);
        OBM_TRY(write_elements(s, number, p, q, at, n, &d, err));
        OBM_TRY(note_done(s, p, n, worker, err));
    }
    return OBM_OK;
}

/* The rows that begin in a piece are its own, wherever they end. */
static int64_t first_row(const part *p, const piece *q) { return (q->begin + p->cols - 1) / p->cols; }
static int64_t last_row(const part *p, const piece *q) { return (q->end + p->cols - 1) / p->cols; }

/* Elements of the base into its chunk, which ends where the piece does. */
static void hash_rows(const part *p, const piece *q, obm__base_chunk *c, const void *bytes, int64_t begin,
                      int64_t end) {
    end = least(end, q->end);
    if (c && begin < end) obm__base_chunk_add(c, bytes, (size_t)(end - begin) * obm_dtype_size(p->p->pair->base.dtype));
}

static obm_status work_rows(stream *s, size_t number, const part *p, obm__base_chunk *c, int worker, obm_error *err) {
    const piece *q = &s->ring[number % s->window];
    desk d = desk_of(s, worker);
    obm__pair slice = *p->p->pair;
    int64_t from = first_row(p, q), to = last_row(p, q), head = least(from * p->cols, q->end);
    slice.base.data = d.base;
    slice.expert.data = d.expert;
    if (c) OBM_TRY(read_elements(s, &p->p->pair->base, q->begin, head - q->begin, d.base, err));
    hash_rows(p, q, c, d.base, q->begin, head);
    for (int64_t row = from, end; row < to && !is_over(s, number); row = end) {
        end = least(row + p->slice / p->cols, to);
        int64_t at = row * p->cols, n = (end - row) * p->cols;
        OBM_TRY(read_elements(s, &p->p->pair->base, at, n, d.base, err));
        OBM_TRY(read_elements(s, &p->p->pair->expert, at, n, d.expert, err));
        hash_rows(p, q, c, d.base, at, at + n);
        int64_t bad = obm__onebit_rows(s->ctx->k, &slice, p->p->scale, p->alphas, p->row_sums, row, end,
                                       q->signs + (row - from) * p->row_bytes, d.scratch);
        if (bad != INT64_MAX) return obm__fail_nonfinite(err, p->p->pair, bad);
        OBM_TRY(note_done(s, p, n, worker, err));
    }
    if (is_over(s, number)) return OBM_OK; /* the signs are not all there */
    return obm__st_writer_put(s->given->writer, p->offset + (uint64_t)(from * p->row_bytes), q->signs,
                              (size_t)((to - from) * p->row_bytes), err);
}

static obm_status begin_piece(const stream *s, const part *p, piece *q, obm__base_chunk **c, obm_error *err) {
    /* Extra rows of the expert may begin where a chunk would. */
    bool hashed = p->digest != SIZE_MAX && (q->begin < obm_tensor_count(&p->p->pair->base) || q->begin == 0);
    if (hashed) OBM_TRY(obm__base_chunk_new(s->given->digests, p->digest + q->index, c, err));
    if (!p->p->planes) return OBM_OK;
    int64_t rows = last_row(p, q) - first_row(p, q);
    q->signs = obm__alloc((size_t)rows, (size_t)p->row_bytes);
    return q->signs ? OBM_OK : obm__fail_nomem(err, (uint64_t)rows * (uint64_t)p->row_bytes);
}

static obm_status work(stream *s, size_t number, int worker, obm_error *err) {
    piece *q = &s->ring[number % s->window];
    const part *p = &s->parts[q->part];
    obm__base_chunk *c = NULL;
    obm_status status = begin_piece(s, p, q, &c, err);
    if (status == OBM_OK) status = (p->p->planes ? work_rows : work_elements)(s, number, p, c, worker, err);
    if (c && status == OBM_OK && !is_over(s, number))
        obm__base_chunk_end(c);
    else
        obm__base_chunk_free(c);
    return status;
}

/* ---- the checksum, in order ---- */

static obm_status end_plane(const stream *s, part *p, obm_error *err) {
    const obm_tensor *t = &p->p->pair->base;
    int64_t scales = obm__scale_count(p->p->scale, t->shape[0], p->cols);
    size_t bytes = (size_t)scales * sizeof(float);
    uint64_t at = p->offset + (uint64_t)(t->shape[0] * p->row_bytes);
    if (p->row_sums) *p->alphas = obm__onebit_alpha(p->row_sums, t->shape[0], p->cols);
    OBM_TRY(obm__st_writer_put(s->given->writer, at, p->alphas, bytes, err));
    obm__st_writer_pass(s->given->writer, p->alphas, bytes);
    bool zero = true;
    for (int64_t i = 0; i < scales; i++) zero = zero && p->alphas[i] == 0;
    s->given->empty[p - s->parts] = zero;
    obm_free(p->alphas);
    obm_free(p->row_sums);
    p->alphas = NULL;
    p->row_sums = NULL;
    return OBM_OK;
}

static obm_status commit_piece(const stream *s, piece *q, int worker, obm_error *err) {
    part *p = &s->parts[q->part];
    if (!p->p->planes) return pass_elements(s, p, q, q->end, desk_of(s, worker).expert, err);
    int64_t rows = last_row(p, q) - first_row(p, q);
    obm__st_writer_pass(s->given->writer, q->signs, (size_t)(rows * p->row_bytes));
    obm_free(q->signs);
    q->signs = NULL;
    return q->index + 1 == p->pieces ? end_plane(s, p, err) : OBM_OK;
}

/* Also after a failure: up to that piece, which is never done, others may wait for room. */
static bool has_turn(stream *s) {
    size_t at = atomic_load(&s->committed);
    return at < s->total && atomic_load(&s->ring[at % s->window].done);
}

/* Looked at again after letting go: who finished meanwhile has left its piece to us. */
static void commit(stream *s, int worker) {
    while (has_turn(s) && !atomic_exchange(&s->committing, 1)) {
        while (has_turn(s)) {
            size_t at = atomic_load(&s->committed);
            piece *q = &s->ring[at % s->window];
            obm_error err;
            obm_status status = commit_piece(s, q, worker, &err);
            if (status != OBM_OK) fail(s, at, status, &err);
            atomic_store(&q->done, 0);
            atomic_store(&s->committed, at + 1);
        }
        atomic_store(&s->committing, 0);
    }
}

static void run_pieces(void *arg, size_t begin, size_t end, int worker) {
    stream *s = arg;
    (void)begin, (void)end; /* whoever comes works to the end */
    for (size_t number; take(s, &number); commit(s, worker)) {
        obm_error err;
        obm_status status = work(s, number, worker, &err);
        if (status == OBM_OK && !worker)
            status = obm__tick(s->given->ticker, s->given->ticks + atomic_load(&s->done), &err);
        if (status != OBM_OK)
            fail(s, number, status, &err);
        else
            atomic_store(&s->ring[number % s->window].done, 1);
    }
}

/* ---- the whole ---- */

static size_t widest(const obm__pair *p) {
    size_t base = obm_dtype_size(p->base.dtype), expert = obm_dtype_size(p->expert.dtype);
    return base > expert ? base : expert;
}

static int64_t slice_rows(int64_t cols) { return cols < SLICE ? SLICE / cols : 1; }

/* A slice of rows of so many columns and bytes; at least one of a whole tensor. */
static size_t slice_bytes(int64_t cols, size_t row) {
    size_t bytes = (size_t)slice_rows(cols) * row;
    return bytes < COPIED ? COPIED : (bytes + 63) / 64 * 64;
}

static size_t desk_bytes(size_t slice, int64_t cols) { return obm__whole_pages(2 * slice + obm__onebit_scratch(cols)); }

static void set_part(const obm__stream *g, const obm__stream_part *p, uint64_t offset, part *out) {
    const obm_tensor *base = &p->pair->base, *t = p->planes ? base : &p->pair->expert;
    *out = (part){.p = p, .offset = offset, .cols = 1, .digest = SIZE_MAX};
    out->elements = obm_tensor_count(t) - p->begin;
    out->chunk = (int64_t)(OBM_BASE_CHUNK / obm_dtype_size(base->dtype));
    out->pieces = out->elements > 0 ? (size_t)((out->elements - 1) / out->chunk + 1) : 1;
    if (p->planes) out->cols = t->shape[1];
    if (p->planes) out->row_bytes = obm__row_bytes(out->cols);
    out->slice = p->planes ? slice_rows(out->cols) * out->cols : (int64_t)(COPIED / widest(p->pair));
    if (g->digests && p->begin == 0) out->digest = obm__base_digests_take(g->digests, p->pair->name);
}

static uint64_t part_bytes(const part *p) {
    if (!p->p->planes) return (uint64_t)p->elements * obm_dtype_size(p->p->pair->expert.dtype);
    int64_t rows = p->p->pair->base.shape[0];
    return (uint64_t)(rows * p->row_bytes) + (uint64_t)obm__scale_count(p->p->scale, rows, p->cols) * sizeof(float);
}

static obm_status set_up(stream *s, obm_error *err) {
    const obm__stream *g = s->given;
    uint64_t offset = obm__st_writer_written(g->writer);
    int64_t cols = 1;
    s->parts = obm__calloc(g->n, sizeof *s->parts);
    s->window = (size_t)s->ctx->threads * PENDING;
    s->slice_bytes = COPIED;
    s->ring = obm__calloc(s->window, sizeof *s->ring);
    if (!s->parts || !s->ring) return obm__fail_nomem(err, g->n * sizeof *s->parts);
    for (size_t i = 0; i < g->n; i++) {
        part *p = &s->parts[i];
        set_part(g, &g->parts[i], offset, p);
        offset += part_bytes(p);
        s->bytes += (uint64_t)p->elements * obm_dtype_size(p->p->pair->expert.dtype);
        s->total += p->pieces;
        if (!p->p->planes) continue;
        size_t bytes = slice_bytes(p->cols, (size_t)p->cols * widest(p->p->pair));
        if (bytes > s->slice_bytes) s->slice_bytes = bytes;
        if (p->cols > cols) cols = p->cols;
    }
    s->desk_bytes = desk_bytes(s->slice_bytes, cols);
    s->desks = obm__desks_new(s->ctx, s->desk_bytes);
    if (!s->desks) return obm__fail_nomem(err, (uint64_t)s->ctx->threads * s->desk_bytes);
    return obm__reader_new((const obm_checkpoint *const[]){g->v->base, g->v->expert}, 2, &s->reader, err);
}

static void clear(stream *s) {
    for (size_t i = 0; s->parts && i < s->given->n; i++) {
        obm_free(s->parts[i].alphas);
        obm_free(s->parts[i].row_sums);
    }
    for (size_t i = 0; s->ring && i < s->window; i++) obm_free(s->ring[i].signs);
    obm_free(s->parts);
    obm_free(s->ring);
    obm__desks_free(s->ctx, s->desks);
    obm__reader_free(s->reader);
}

obm_status obm__stream_run(obm_context *ctx, const obm__stream *given, obm_error *err) {
    stream s = {.ctx = ctx, .given = given, .failed_piece = SIZE_MAX, .lock = ATOMIC_FLAG_INIT};
    obm_status status = set_up(&s, err);
    if (status == OBM_OK) {
        if (s.bytes < ALONE)
            run_pieces(&s, 0, 1, 0);
        else
            obm__parallel(ctx, (size_t)ctx->threads, 1, run_pieces, &s);
        status = s.status;
        if (status != OBM_OK && err) *err = s.error;
    }
    clear(&s);
    return status;
}

uint64_t obm__stream_memory(const obm_context *ctx, int64_t cols, size_t row) {
    return (uint64_t)ctx->threads * (PENDING * (OBM_BASE_CHUNK / 16) + desk_bytes(slice_bytes(cols, row), cols));
}
