/*
 * Several tensors of an expert's file at once: workers take pieces in the order of the file, read base and expert once
 * (for the base's hash too), and write what they made to its place themselves; only the checksum of the file has to
 * see the bytes in order, and takes each piece as its turn comes.  One plane per matrix and whole tensors; nothing
 * that needs a second look at a tensor.
 *
 * Memory: a piece is one chunk of the base, its result at most a 16th of that, and no more than PENDING pieces per
 * thread are begun and not yet in the checksum.
 */
#include "pack_parts.h"

#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#define PENDING 3
/* Bytes that are done before another thread wakes up. */
#define ALONE ((uint64_t)1 << 20)
#define WINDOW OBM_STREAM_WINDOW
/* Elements of base and expert that fit the second-level cache, where hashing leaves them for the arithmetic. */
#define SLICE ((int64_t)1 << 16)

typedef struct part {
    const obm__stream_part *p;
    int64_t cols, row_bytes, elements; /* a row of a whole tensor is one element */
    int64_t chunk;                     /* elements of a piece */
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

typedef struct stream {
    obm_context *ctx;
    const obm__stream *given;
    part *parts;
    piece *ring; /* (window) */
    size_t window, total;
    uint64_t bytes;   /* of the expert, in all parts */
    uint8_t *scratch; /* (threads, scratch_bytes) */
    size_t scratch_bytes;
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

/* The hash of one chunk of the base, as far as it is read. */
typedef struct hashing {
    obm__xxh3 *h;
    const uint8_t *at, *end;
} hashing;

static void hash_to(hashing *h, const uint8_t *to) {
    if (!h->h || to <= h->at) return;
    if (to > h->end) to = h->end;
    obm__xxh3_add(h->h, h->at, (size_t)(to - h->at));
    h->at = to;
}

/* Elements [begin, end) of whole tensors: the first that is not finite, INT64_MAX if all are. */
static int64_t find_bad(const obm_kernels *k, const obm__pair *p, int64_t begin, int64_t end) {
    float d[OBM_BLOCK], scratch[OBM_BLOCK];
    int64_t in_base = obm_tensor_count(&p->base);
    for (int64_t at = begin, n; at < end; at += n) {
        n = least(end - at, OBM_BLOCK);
        int64_t paired = in_base < at ? 0 : least(in_base - at, n);
        obm__pair_read(k, p, at, paired, d, scratch);
        obm__widen(k, &p->expert, at + paired, n - paired, d + paired);
        int64_t bad = (int64_t)k->find_nonfinite(d, (size_t)n);
        if (bad < n) return at + bad;
    }
    return INT64_MAX;
}

/* Rows of signs or whole elements of one slice. */
static int64_t work_slice(const stream *s, const part *p, piece *q, int64_t begin, int64_t end, int worker) {
    const obm_kernels *k = s->ctx->k;
    if (!p->p->planes) return find_bad(k, p->p->pair, p->p->begin + begin, p->p->begin + end);
    int64_t first = (begin + p->cols - 1) / p->cols, last = (end + p->cols - 1) / p->cols;
    int64_t from = (q->begin + p->cols - 1) / p->cols;
    return obm__onebit_rows(k, p->p->pair, p->p->scale, p->alphas, p->row_sums, first, last,
                            q->signs + (first - from) * p->row_bytes, s->scratch + (size_t)worker * s->scratch_bytes);
}

/* The callback is the caller's thread's, which is worker 0. */
static obm_status look(const stream *s, obm_error *err) {
    obm__pulse *t = s->given->ticker;
    uint64_t done = s->given->ticks + atomic_load(&s->done);
    if (t && done > t->done && done <= t->total) t->done = done;
    return obm__pulse_check(t, err);
}

/* Elements of a whole tensor into the checksum, which is this piece's turn. */
static void pass_elements(const stream *s, const part *p, piece *q, int64_t end) {
    const obm_tensor *t = &p->p->pair->expert;
    for (int64_t to; q->passed < end; q->passed = to) {
        int64_t from = p->p->begin;
        to = least(q->passed + WINDOW, end);
        obm__tensor_populate(t, from + q->passed, to - q->passed);
        obm__st_writer_pass(s->given->writer, element(t, from + q->passed),
                            (size_t)(to - q->passed) * obm_dtype_size(t->dtype));
        obm__tensor_release(t, from + q->passed, to - q->passed);
    }
}

/* While earlier pieces are missing the pages go, and are read once more when the turn comes: less often than not. */
static obm_status write_elements(const stream *s, size_t number, const part *p, piece *q, int64_t begin, int64_t end,
                                 obm_error *err) {
    const obm_tensor *t = &p->p->pair->expert;
    size_t size = obm_dtype_size(t->dtype);
    OBM_TRY(obm__st_writer_put(s->given->writer, p->offset + (uint64_t)begin * size, element(t, p->p->begin + begin),
                               (size_t)(end - begin) * size, err));
    if (atomic_load(&s->committed) == number)
        pass_elements(s, p, q, end);
    else
        obm__tensor_release(t, p->p->begin + begin, end - begin);
    return OBM_OK;
}

static obm_status work_window(stream *s, size_t number, int64_t begin, int64_t end, hashing *h, int worker,
                              obm_error *err) {
    piece *q = &s->ring[number % s->window];
    const part *p = &s->parts[q->part];
    const obm__pair *pair = p->p->pair;
    int64_t in_base = least(end, obm_tensor_count(&pair->base) - p->p->begin), from = p->p->begin;
    obm__tensor_populate(&pair->base, from + begin, in_base - begin);
    obm__tensor_populate(&pair->expert, from + begin, end - begin);
    for (int64_t at = begin; at < end; at += SLICE) {
        int64_t to = least(at + SLICE, end);
        if (at < in_base) hash_to(h, element(&pair->base, from + least(to, in_base)));
        int64_t bad = work_slice(s, p, q, at, to, worker);
        if (bad != INT64_MAX) return obm__fail_nonfinite(err, pair, bad);
    }
    if (p->p->planes)
        obm__tensor_release(&pair->expert, begin, end - begin);
    else
        OBM_TRY(write_elements(s, number, p, q, begin, end, err));
    if (p->pieces > 1) obm__tensor_release(&pair->base, from + begin, in_base - begin);
    atomic_fetch_add(&s->done, (uint64_t)(end - begin) * obm_dtype_size(pair->expert.dtype));
    return worker ? OBM_OK : look(s, err);
}

static obm_status begin_piece(const part *p, piece *q, hashing *h, obm_error *err) {
    const obm_tensor *base = &p->p->pair->base;
    *h = (hashing){0};
    if (p->digest != SIZE_MAX && q->begin <= obm_tensor_count(base)) {
        h->at = element(base, q->begin);
        h->end = element(base, least(q->begin + p->chunk, obm_tensor_count(base)));
        if (h->at < h->end || q->begin == 0) h->h = obm__xxh3_new();
        if (!h->h && (h->at < h->end || q->begin == 0)) return obm__fail_nomem(err, 0);
    }
    if (!p->p->planes) return OBM_OK;
    int64_t rows = (q->end + p->cols - 1) / p->cols - (q->begin + p->cols - 1) / p->cols;
    q->signs = obm__alloc((size_t)rows, (size_t)p->row_bytes);
    return q->signs ? OBM_OK : obm__fail_nomem(err, (uint64_t)rows * (uint64_t)p->row_bytes);
}

static obm_status write_signs(const stream *s, const part *p, const piece *q, obm_error *err) {
    int64_t first = (q->begin + p->cols - 1) / p->cols, last = (q->end + p->cols - 1) / p->cols;
    return obm__st_writer_put(s->given->writer, p->offset + (uint64_t)(first * p->row_bytes), q->signs,
                              (size_t)((last - first) * p->row_bytes), err);
}

static obm_status work(stream *s, size_t number, int worker, obm_error *err) {
    piece *q = &s->ring[number % s->window];
    const part *p = &s->parts[q->part];
    const obm__pair *pair = p->p->pair;
    hashing h;
    obm_status status = begin_piece(p, q, &h, err);
    for (int64_t at = q->begin; status == OBM_OK && at < q->end && !is_over(s, number); at += WINDOW) {
        int64_t to = least(at + WINDOW, q->end);
        status = work_window(s, number, at, to, &h, worker, err);
    }
    bool whole = status == OBM_OK && !is_over(s, number); /* else the signs are not all there */
    if (whole && p->p->planes) status = write_signs(s, p, q, err);
    if (h.h && whole && status == OBM_OK) {
        hash_to(&h, h.end);
        obm__base_digests_put(s->given->digests, p->digest + q->index, h.h);
        h.h = NULL;
    }
    if (h.h) obm__xxh3_end(h.h, NULL);
    int64_t in_base = obm_tensor_count(&pair->base);
    int64_t first = p->p->begin + q->begin;
    obm__tensor_release(&pair->base, first, least(p->p->begin + q->end, in_base) - first);
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

static obm_status commit_piece(const stream *s, piece *q, obm_error *err) {
    part *p = &s->parts[q->part];
    if (!p->p->planes) {
        pass_elements(s, p, q, q->end);
        return OBM_OK;
    }
    int64_t rows = (q->end + p->cols - 1) / p->cols - (q->begin + p->cols - 1) / p->cols;
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
static void commit(stream *s) {
    while (has_turn(s) && !atomic_exchange(&s->committing, 1)) {
        while (has_turn(s)) {
            size_t at = atomic_load(&s->committed);
            piece *q = &s->ring[at % s->window];
            obm_error err;
            obm_status status = commit_piece(s, q, &err);
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
    for (size_t number; take(s, &number); commit(s)) {
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

static void set_part(const obm__stream *g, const obm__stream_part *p, uint64_t offset, part *out) {
    const obm_tensor *base = &p->pair->base, *t = p->planes ? base : &p->pair->expert;
    *out = (part){.p = p, .offset = offset, .cols = 1, .digest = SIZE_MAX};
    out->elements = obm_tensor_count(t) - p->begin;
    out->chunk = (int64_t)(OBM_BASE_CHUNK / obm_dtype_size(base->dtype));
    out->pieces = out->elements > 0 ? (size_t)((out->elements - 1) / out->chunk + 1) : 1;
    if (p->planes) out->cols = t->shape[1];
    if (p->planes) out->row_bytes = obm__row_bytes(out->cols);
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
    s->ring = obm__calloc(s->window, sizeof *s->ring);
    if (!s->parts || !s->ring) return obm__fail_nomem(err, g->n * sizeof *s->parts);
    for (size_t i = 0; i < g->n; i++) {
        part *p = &s->parts[i];
        set_part(g, &g->parts[i], offset, p);
        offset += part_bytes(p);
        s->bytes += (uint64_t)p->elements * obm_dtype_size(p->p->pair->expert.dtype);
        s->total += p->pieces;
        if (p->p->planes && p->cols > cols) cols = p->cols;
    }
    s->scratch_bytes = obm__onebit_scratch(cols);
    s->scratch = obm__alloc((size_t)s->ctx->threads, s->scratch_bytes);
    return s->scratch ? OBM_OK : obm__fail_nomem(err, (uint64_t)s->ctx->threads * s->scratch_bytes);
}

static void clear(stream *s) {
    for (size_t i = 0; s->parts && i < s->given->n; i++) {
        obm_free(s->parts[i].alphas);
        obm_free(s->parts[i].row_sums);
    }
    for (size_t i = 0; s->ring && i < s->window; i++) obm_free(s->ring[i].signs);
    obm_free(s->parts);
    obm_free(s->ring);
    obm_free(s->scratch);
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

uint64_t obm__stream_memory(const obm_context *ctx) {
    return (uint64_t)ctx->threads * (PENDING * (OBM_BASE_CHUNK / 16) + obm__onebit_scratch(1));
}
