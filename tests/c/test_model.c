/* The forward pass against a plain f64 reference and against transformers, and what must be equal to the bit. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "model/model.h"
#include "tiny_model.h"

#define T 83   /* over a tile, not a multiple of anything */

static const tiny shapes[] = {
    {"llama", 71, 24, 37, 2, 4, 2, 6, 0, 1, OBM_F32, 1, NULL}, /* tied, groups of 2 */
    {"llama", 131, 30, 45, 2, 6, 2, 10, 0, 0, OBM_F32, 2,
     NULL}, /* untied, head_dim != hidden / heads, more than a panel */
    {"mistral", 53, 20, 33, 2, 4, 1, 8, 7, 0, OBM_F32, 3, NULL}, /* short window, groups of 4 */
    {"mistral", 53, 18, 29, 2, 3, 3, 6, 0, 1, OBM_F32, 4, NULL}, /* no window, no groups */
};
#define N_SHAPES (sizeof shapes / sizeof *shapes)

typedef struct fixture {
    tiny c;
    tiny_weights w;
    char *dir;
    obm_context *ctx;
    obm_model *m;
    int32_t ids[T];
} fixture;

static void check_ok(obm_status status, const obm_error *err) {
    if (status != OBM_OK) fail_msg("%s: %s", obm_status_name(status), err->message);
}

static obm_context *new_context(int threads) {
    obm_context_options options = OBM_INIT(obm_context_options);
    obm_context *ctx;
    obm_error err;
    options.threads = threads;
    check_ok(obm_context_new(&options, &ctx, &err), &err);
    return ctx;
}

static void open_fixture(fixture *f, const tiny *shape, obm_dtype dtype, int threads) {
    obm_error err;
    f->c = *shape;
    f->c.dtype = dtype;
    tiny_weights_new(&f->c, &f->w);
    f->dir = tiny_folder();
    assert_non_null(f->dir);
    if (tiny_write(&f->c, &f->w, f->dir, &err)) fail_msg("%s", err.message);
    f->ctx = new_context(threads);
    check_ok(obm_model_open(f->ctx, f->dir, NULL, &f->m, &err), &err);
    unsigned state = 99;
    for (int i = 0; i < T; i++) f->ids[i] = (int32_t)(tiny_random(&state) % (unsigned)shape->vocab);
}

static void close_fixture(fixture *f) {
    obm_model_free(f->m);
    obm_context_free(f->ctx);
    tiny_weights_free(&f->w);
    tiny_remove(f->dir);
}

static float *logits_of(obm_model *m, const int32_t *ids, size_t n, const obm_run_options *options) {
    obm_model_info info;
    obm_error err;
    obm_model_describe(m, &info);
    float *out = malloc(n * (size_t)info.vocab * sizeof *out);
    check_ok(obm_model_logits(m, ids, n, options, out, &err), &err);
    return out;
}

static float *all_logits(obm_model *m, const int32_t *ids, size_t n, bool decode, obm_dtype kv) {
    obm_run_options options = OBM_INIT(obm_run_options);
    options.all = true;
    options.decode = decode;
    options.kv = kv;
    return logits_of(m, ids, n, &options);
}

/* max |a - b| / max |b| */
static double distance(const float *a, const double *b, size_t n) {
    double worst = 0, scale = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs(a[i] - b[i]);
        if (!(d <= worst)) worst = d;   /* keeps NaN */
        if (fabs(b[i]) > scale) scale = fabs(b[i]);
    }
    return worst / scale;
}

static double distance_f32(const float *a, const float *b, size_t n) {
    double *wide = malloc(n * sizeof *wide);
    for (size_t i = 0; i < n; i++) wide[i] = b[i];
    double d = distance(a, wide, n);
    free(wide);
    return d;
}

/* f32 carries 6e-8 per operation; sums of at most 45 products in 2 layers and the norms amplify it by at most a few
 * hundred. */
#define F32_BOUND 1e-4
/* A key or value rounded to f16 is off by 2^-11 = 5e-4 of itself; errors average out over 83 positions, not over a
 * window of 7. */
#define F16_BOUND 2e-2

static void matches_the_reference(void **state) {
    (void)state;
    const obm_dtype dtypes[] = {OBM_F32, OBM_F16, OBM_BF16};
    for (size_t s = 0; s < N_SHAPES; s++)
        for (size_t d = 0; d < 3; d++) {
            fixture f;
            open_fixture(&f, &shapes[s], dtypes[d], 2);
            size_t count = (size_t)(T * f.c.vocab);
            double *expected = malloc(count * sizeof *expected);
            tiny_reference(&f.c, &f.w, f.ids, T, expected, NULL);
            for (int decode = 0; decode < 2; decode++) {
                float *got = all_logits(f.m, f.ids, T, decode, OBM_F32),
                      *half = all_logits(f.m, f.ids, T, decode, OBM_F16);
                assert_true(distance(got, expected, count) < F32_BOUND);
                assert_true(distance(half, expected, count) < F16_BOUND);
                assert_true(distance(half, expected, count) > 0);
                free(got);
                free(half);
            }
            free(expected);
            close_fixture(&f);
        }
}

static void decode_agrees_with_prefill(void **state) {
    (void)state;
    for (size_t s = 0; s < N_SHAPES; s++) {
        fixture f;
        open_fixture(&f, &shapes[s], OBM_BF16, 1);
        float *a = all_logits(f.m, f.ids, T, false, OBM_F32), *b = all_logits(f.m, f.ids, T, true, OBM_F32);
        assert_true(distance_f32(a, b, (size_t)(T * f.c.vocab)) <
                    1e-5); /* two summation orders of the same f32 products */
        free(a);
        free(b);
        close_fixture(&f);
    }
}

static void threads_do_not_matter(void **state) {
    (void)state;
    const int threads[] = {1, 2, 5};
    for (size_t s = 0; s < N_SHAPES; s++)
        for (int decode = 0; decode < 2; decode++) {
            float *first = NULL;
            for (int t = 0; t < 3; t++) {
                fixture f;
                open_fixture(&f, &shapes[s], OBM_BF16, threads[t]);
                float *got = all_logits(f.m, f.ids, T, decode, OBM_F32);
                if (first) assert_memory_equal(got, first, (size_t)(T * f.c.vocab) * sizeof *got);
                if (first) free(got);
                else first = got;
                close_fixture(&f);
            }
            free(first);
        }
}

static void the_last_row_is_the_last_of_all(void **state) {
    (void)state;
    fixture f;
    open_fixture(&f, &shapes[1], OBM_F16, 2);
    float *all = all_logits(f.m, f.ids, T, false, OBM_F32), *last = logits_of(f.m, f.ids, T, NULL);
    assert_memory_equal(last, all + (T - 1) * f.c.vocab, (size_t)f.c.vocab * sizeof *last);
    free(all);
    free(last);
    close_fixture(&f);
}

/* ---- chunks and neighbours ---- */

typedef struct taken { float *out; size_t n; } taken;

static obm_status take_logits(void *arg, obm_model *m, const obm__row *rows, size_t n, obm_error *err) {
    taken *t = arg;
    for (size_t i = 0; i < n; i++) {
        if (!rows[i].sequence) continue;
        OBM_TRY(obm__forward_logits(m, rows, &i, 1, t->out + t->n * (size_t)m->vocab, err));
        t->n++;
    }
    return OBM_OK;
}

static void chunks_of_a_prompt_do_not_matter(void **state) {
    (void)state;
    const size_t cuts[][3] = {{1, 2, T}, {37, 64, T}, {63, 65, T}, {64, 70, T}};
    for (size_t s = 0; s < N_SHAPES; s++) {
        fixture f;
        obm_error err;
        open_fixture(&f, &shapes[s], OBM_BF16, 2);
        float *whole = all_logits(f.m, f.ids, T, false, OBM_F32), *out = malloc((size_t)(T * f.c.vocab) * sizeof *out);
        for (size_t c = 0; c < sizeof cuts / sizeof *cuts; c++) {
            obm__sequence *q;
            taken t = {out, 0};
            check_ok(obm__sequence_new(f.m, NULL, OBM_F32, &q, &err), &err);
            for (size_t i = 0, from = 0; i < 3; from = cuts[c][i++])
                check_ok(
                    obm__prefill(f.m, q, f.ids + from, cuts[c][i] - from, false, f.c.layers, take_logits, &t, &err),
                    &err);
            obm__sequence_free(f.m, q);
            assert_int_equal(t.n, T);
            assert_memory_equal(out, whole, (size_t)(T * f.c.vocab) * sizeof *out);
        }
        free(whole);
        free(out);
        close_fixture(&f);
    }
}

/* ---- prompts of several steps of attention, which takes 256 positions at a time ---- */

#define LONG 613
#define POSITIONS ",\"max_position_embeddings\":640"

/* The window of the first ends between two steps, and in the middle of one; the second has groups of 6, more rows than a
 * strip and dimensions that fill no vector. */
static const tiny long_shapes[] = {
    {"mistral", 53, 20, 33, 2, 4, 2, 8, 300, 0, OBM_F32, 6, POSITIONS},
    {"llama", 53, 24, 37, 2, 6, 1, 38, 0, 1, OBM_F32, 7, POSITIONS},
    {"mistral", 53, 18, 29, 2, 3, 3, 64, 65, 1, OBM_F32, 8, POSITIONS},
};
/* Under valgrind all would take long. */
#define VALGRIND (getenv("ONEBITMERGE_TEST_STRIDE") != NULL)
#define N_LONG (VALGRIND ? 1 : sizeof long_shapes / sizeof *long_shapes)

static void long_ids(const tiny *c, int32_t *ids) {
    unsigned state = 5;
    for (int i = 0; i < LONG; i++) ids[i] = (int32_t)(tiny_random(&state) % (unsigned)c->vocab);
}

static void long_prompts_match_the_reference(void **state) {
    (void)state;
    for (size_t s = 0; s < N_LONG; s++) {
        fixture f;
        int32_t ids[LONG];
        open_fixture(&f, &long_shapes[s], OBM_BF16, 2);
        long_ids(&f.c, ids);
        size_t count = (size_t)(LONG * f.c.vocab);
        double *expected = malloc(count * sizeof *expected);
        tiny_reference(&f.c, &f.w, ids, LONG, expected, NULL);
        float *got = all_logits(f.m, ids, LONG, false, OBM_F32), *half = all_logits(f.m, ids, LONG, false, OBM_F16);
        assert_true(distance(got, expected, count) < F32_BOUND);
        assert_true(distance(half, expected, count) < F16_BOUND && distance(half, expected, count) > 0);
        free(got);
        free(half);
        free(expected);
        close_fixture(&f);
    }
}

static void chunks_and_threads_of_long_prompts_do_not_matter(void **state) {
    (void)state;
    const size_t cuts[][4] = {{1, 256, 300, LONG}, {255, 257, 511, LONG}, {64, 320, 512, LONG}, {100, 101, 612, LONG}};
    for (size_t s = 0; s < N_LONG; s++)
        for (int threads = 1; threads <= 5; threads += 4) {
            fixture f;
            obm_error err;
            int32_t ids[LONG];
            open_fixture(&f, &long_shapes[s], OBM_BF16, threads);
            long_ids(&f.c, ids);
            size_t bytes = (size_t)(LONG * f.c.vocab) * sizeof(float);
            float *whole = all_logits(f.m, ids, LONG, false, OBM_F16), *out = malloc(bytes);
            for (size_t c = 0; c < sizeof cuts / sizeof *cuts; c++) {
                obm__sequence *q;
                taken t = {out, 0};
                check_ok(obm__sequence_new(f.m, NULL, OBM_F16, &q, &err), &err);
                for (size_t i = 0, from = 0; i < 4; from = cuts[c][i++])
                    check_ok(obm__prefill(f.m, q, ids + from, cuts[c][i] - from, false, f.c.layers, take_logits, &t, &err),
                             &err);
                obm__sequence_free(f.m, q);
                assert_int_equal(t.n, LONG);
                assert_memory_equal(out, whole, bytes);
            }
            free(whole);
            free(out);
            close_fixture(&f);
        }
}

/* The last layer's attention once more, over a cache in which one position is not finite: it does not reach those who do
 * not see it. */
static void check_reach(fixture *f, int which, int64_t position) {
    enum { N = 320 };
    obm_error err;
    obm__sequence *q;
    obm__row rows[N];
    int32_t ids[LONG];
    int64_t layer = f->c.layers - 1, window = f->c.window ? f->c.window : N;
    size_t dim = (size_t)f->c.dim, row = (size_t)f->c.heads * dim;
    long_ids(&f->c, ids);
    check_ok(obm__sequence_new(f->m, NULL, OBM_F32, &q, &err), &err);
    check_ok(obm__prefill(f->m, q, ids, N, false, f->c.layers, NULL, NULL, &err), &err);
    float *mixed = f->m->scratch.mixed, *before = malloc(N * row * sizeof *before);
    memcpy(before, mixed, N * row * sizeof *before);
    float *at = (float *)obm__kv_at(f->m, q, position / OBM_TILE_TOKENS, layer, which, 0) + position % OBM_TILE_TOKENS * f->c.dim;
    for (size_t i = 0; i < dim; i++) at[i] = which ? INFINITY : NAN;
    for (int64_t i = 0; i < N; i++) rows[i] = (obm__row){q, i, ids[i]};
    for (size_t first = 0; first < N; first += OBM_TILE_TOKENS)
        obm__attend_tile(f->m, rows, first, OBM_TILE_TOKENS, layer, 0, 1, 0);
    for (int64_t i = 0; i < N; i++) {
        const float *now = mixed + (size_t)i * row;
        if (i < position || i >= position + window) assert_memory_equal(now, before + (size_t)i * row, row * sizeof *now);
        for (size_t j = 0; i >= position && i < position + window && j < dim; j++) assert_true(!isfinite(now[j]));
    }
    free(before);
    obm__sequence_free(f->m, q);
}

static void what_is_not_finite_reaches_those_who_see_it(void **state) {
    (void)state;
    const int64_t positions[] = {0, 33, 100, 255, 256, 319};
    for (size_t s = 0; s < N_LONG; s++) {
        fixture f;
        open_fixture(&f, &long_shapes[s], OBM_BF16, 1);
        for (int which = 0; which < 2; which++)
            for (size_t p = 0; p < sizeof positions / sizeof *positions; p++) check_reach(&f, which, positions[p]);
        close_fixture(&f);
    }
}

/* Two prompts of different lengths in the tiles of one call. */
static void neighbouring_tiles_do_not_matter(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    open_fixture(&f, &shapes[1], OBM_BF16, 2);
    obm__sequence *a, *b;
    obm__row rows[2 * OBM_TILE_TOKENS] = {0};
    check_ok(obm__sequence_new(f.m, NULL, OBM_F32, &a, &err), &err);
    check_ok(obm__sequence_new(f.m, NULL, OBM_F32, &b, &err), &err);
    check_ok(obm__sequence_reserve(f.m, a, 40, &err), &err);
    check_ok(obm__sequence_reserve(f.m, b, 13, &err), &err);
    for (int i = 0; i < 40; i++) rows[i] = (obm__row){a, i, f.ids[i]};
    for (int i = 0; i < 13; i++) rows[OBM_TILE_TOKENS + i] = (obm__row){b, i, f.ids[T - 1 - i]};
    check_ok(obm__forward(f.m, rows, 2 * OBM_TILE_TOKENS, true, f.c.layers, &err), &err);
    float *out = malloc((size_t)(2 * f.c.vocab) * sizeof *out);
    const size_t which[] = {39, OBM_TILE_TOKENS + 12};
    check_ok(obm__forward_logits(f.m, rows, which, 2, out, &err), &err);
    int32_t other[13];
    for (int i = 0; i < 13; i++) other[i] = f.ids[T - 1 - i];
    float *alone_a = logits_of(f.m, f.ids, 40, NULL), *alone_b = logits_of(f.m, other, 13, NULL);
    assert_memory_equal(out, alone_a, (size_t)f.c.vocab * sizeof *out);
    assert_memory_equal(out + f.c.vocab, alone_b, (size_t)f.c.vocab * sizeof *out);
    free(out);
    free(alone_a);
    free(alone_b);
    obm__sequence_free(f.m, a);
    obm__sequence_free(f.m, b);
    close_fixture(&f);
}

/* Three sequences of different lengths decode together as each does alone. */
static void neighbours_in_decoding_do_not_matter(void **state) {
    (void)state;
    for (size_t s = 0; s < N_SHAPES; s++) {
        fixture f;
        obm_error err;
        open_fixture(&f, &shapes[s], OBM_BF16, 2);
        const size_t length[3] = {1, 30, 70}, steps = 5;
        size_t row = (size_t)f.c.vocab;
        float *together = malloc(3 * row * sizeof *together), *alone = malloc(3 * steps * row * sizeof *alone);
        obm__sequence *q[3];
        for (int pass = 0; pass < 2; pass++) {
            for (int i = 0; i < 3; i++) {
                check_ok(obm__sequence_new(f.m, NULL, OBM_F32, &q[i], &err), &err);
                check_ok(obm__prefill(f.m, q[i], f.ids, length[i], false, f.c.layers, NULL, NULL, &err), &err);
                taken t = {alone + (size_t)i * steps * row, 0};
                if (pass == 0)
                    check_ok(obm__prefill(f.m, q[i], f.ids, steps, true, f.c.layers, take_logits, &t, &err), &err);
            }
            for (size_t step = 0; pass == 1 && step < steps; step++) {
                obm__row rows[3];
                const size_t which[] = {0, 1, 2};
                for (int i = 0; i < 3; i++) {
                    check_ok(obm__sequence_reserve(f.m, q[i], q[i]->length + 1, &err), &err);
                    rows[i] = (obm__row){q[i], q[i]->length++, f.ids[step]};
                }
                check_ok(obm__forward(f.m, rows, 3, false, f.c.layers, &err), &err);
                check_ok(obm__forward_logits(f.m, rows, which, 3, together, &err), &err);
                for (size_t i = 0; i < 3; i++)
                    assert_memory_equal(together + i * row, alone + (i * steps + step) * row, row * sizeof *alone);
            }
            for (int i = 0; i < 3; i++) obm__sequence_free(f.m, q[i]);
        }
        free(together);
        free(alone);
        close_fixture(&f);
    }
}

/* ---- decoding in parts of 1024 positions ---- */

#define FAR 2070

/* The logits of the token that follows `length` of ids, in a step of `n` sequences of which it is number `at`. */
static void far_step(fixture *f, const int32_t *ids, const int64_t *length, size_t n, size_t at, float *out) {
    obm_error err;
    obm__sequence *q[3];
    obm__row rows[3];
    for (size_t i = 0; i < n; i++) {
        check_ok(obm__sequence_new(f->m, NULL, OBM_F16, &q[i], &err), &err);
        check_ok(obm__prefill(f->m, q[i], ids, (size_t)length[i], false, f->c.layers, NULL, NULL, &err), &err);
        check_ok(obm__sequence_reserve(f->m, q[i], length[i] + 1, &err), &err);
        rows[i] = (obm__row){q[i], length[i], ids[length[i]]};
    }
    check_ok(obm__forward(f->m, rows, n, false, f->c.layers, &err), &err);
    check_ok(obm__forward_logits(f->m, rows, &at, 1, out, &err), &err);
    for (size_t i = 0; i < n; i++) obm__sequence_free(f->m, q[i]);
}

/* As in a prompt, within what the order of sums makes; the same bits beside other sequences and with other threads. */
static void parts_of_a_context_do_not_matter(void **state) {
    (void)state;
    const int64_t lengths[] = {1100, FAR - 1, 5, 1023, 1024, 2048};
    const size_t n_lengths = VALGRIND ? 2 : 6;
    const int most_threads = VALGRIND ? 3 : 5;
    for (size_t s = 0; s < N_LONG; s++) {
        float alone[6][64], got[64], *prompt = malloc((size_t)(FAR * long_shapes[s].vocab) * sizeof *prompt);
        for (int threads = 1; threads <= most_threads; threads += 2) {
            fixture f;
            obm_error err;
            obm__sequence *q;
            int32_t ids[FAR];
            unsigned random = 5;
            open_fixture(&f, &long_shapes[s], OBM_BF16, threads);
            size_t vocab = (size_t)f.c.vocab;
            for (int i = 0; i < FAR; i++) ids[i] = (int32_t)(tiny_random(&random) % (unsigned)vocab);
            taken t = {prompt, 0};
            check_ok(obm__sequence_new(f.m, NULL, OBM_F16, &q, &err), &err);
            if (threads == 1)
                check_ok(obm__prefill(f.m, q, ids, FAR, false, f.c.layers, take_logits, &t, &err), &err);
            obm__sequence_free(f.m, q);
            for (size_t i = 0; i < n_lengths; i++) {
                far_step(&f, ids, &lengths[i], 1, 0, threads == 1 ? alone[i] : got);
                if (threads > 1) assert_memory_equal(got, alone[i], vocab * sizeof *got);
                assert_true(distance_f32(alone[i], prompt + (size_t)lengths[i] * vocab, vocab) < 1e-4);
                const int64_t all[] = {FAR - 1, lengths[i], 1500};
                far_step(&f, ids, all, 3, 1, got);
                assert_memory_equal(got, alone[i], vocab * sizeof *got);
            }
            close_fixture(&f);
        }
        free(prompt);
    }
}

/* A prompt's are the same at position 0 and 32000; a step's grow by what joins its parts, one for 1024 positions. */
static void buffers_of_long_contexts(void **state) {
    (void)state;
    enum { CONTEXT = 32768, SOME = 64 };
    for (size_t s = 0; s < N_LONG; s++) {
        fixture f;
        obm_error err;
        obm__sequence *q;
        const int32_t ids[SOME] = {1};
        open_fixture(&f, &long_shapes[s], OBM_BF16, 2);
        check_ok(obm__sequence_new(f.m, NULL, OBM_F16, &q, &err), &err);
        check_ok(obm__prefill(f.m, q, ids, SOME, false, f.c.layers, NULL, NULL, &err), &err);
        uint64_t first = f.m->scratch.bytes;
        check_ok(obm__sequence_reserve(f.m, q, CONTEXT, &err), &err);
        assert_int_equal(f.m->kv_bytes, CONTEXT / 64 * obm__kv_page_bytes(f.m, OBM_F16));
        assert_int_equal(obm__kv_page_bytes(f.m, OBM_F16), 64 * 2 * 2 * f.c.layers * f.c.kv_heads * f.c.dim);
        for (size_t i = 1; i < q->n_pages; i++) memset(q->pages[i]->data, 0, obm__kv_page_bytes(f.m, OBM_F16));
        q->length = CONTEXT - 2 * SOME;
        check_ok(obm__prefill(f.m, q, ids, SOME, false, f.c.layers, NULL, NULL, &err), &err);
        assert_int_equal(f.m->scratch.bytes, first);
        check_ok(obm__prefill(f.m, q, ids, 1, true, f.c.layers, NULL, NULL, &err), &err);
        uint64_t parts = CONTEXT / OBM_PART_POSITIONS, each = sizeof(obm__part) + (size_t)f.c.dim * sizeof(float);
        uint64_t more = parts * (size_t)f.c.heads * each;
        assert_in_range(f.m->scratch.bytes - first, more, more * 3 / 2);
        obm__sequence_free(f.m, q);
        assert_int_equal(f.m->kv_bytes, 0);
        close_fixture(&f);
    }
}

/* ---- hidden states ---- */

static void hidden_states(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    open_fixture(&f, &shapes[1], OBM_F32, 2);
    size_t H = (size_t)f.c.hidden;
    float *out = malloc(T * H * sizeof *out), *pooled = malloc(H * sizeof *pooled);
    double *expected = malloc(T * H * sizeof *expected), *logits = malloc((size_t)(T * f.c.vocab) * sizeof *logits);
    tiny_reference(&f.c, &f.w, f.ids, T, logits, expected);
    check_ok(obm_model_hidden(f.m, f.ids, T, f.c.layers, NULL, out, &err), &err);
    assert_true(distance(out, expected, T * H) < F32_BOUND);
    for (int layer = 0; layer <= f.c.layers; layer++) {
        check_ok(obm_model_hidden(f.m, f.ids, T, layer, NULL, out, &err), &err);
        check_ok(obm__model_pool(f.m, f.ids, T, layer, pooled, &err), &err);
        for (size_t h = 0; h < H; h++) {
            double sum = 0;
            for (size_t t = 0; t < T; t++) sum += out[t * H + h];
            assert_true(pooled[h] == (float)(sum / T));
        }
    }
    check_ok(obm_model_hidden(f.m, f.ids, T, 0, NULL, out, &err), &err);
    for (size_t t = 0; t < T; t++)
        assert_memory_equal(out + t * H, f.w.t[0].data + (size_t)f.ids[t] * H, H * sizeof *out);
    check_ok(obm__model_pool(f.m, f.ids, 0, 0, pooled, &err), &err);
    assert_true(pooled[0] == 0);
    assert_int_equal(obm_model_hidden(f.m, f.ids, T, 3, NULL, out, &err), OBM_E_ARG);
    free(out);
    free(pooled);
    free(expected);
    free(logits);
    close_fixture(&f);
}

/* ---- transformers ---- */

static void compare_with_transformers(const char *name) {
    char path[512];
    obm_error err;
    obm_model *m;
    obm__safetensors *expected;
    obm_context *ctx = new_context(2);
    snprintf(path, sizeof path, OBM_SOURCE_DIR "/tests/vectors/models/%s-expected.safetensors", name);
    check_ok(obm__safetensors_open(path, &expected, &err), &err);
    snprintf(path, sizeof path, OBM_SOURCE_DIR "/tests/vectors/models/%s", name);
    check_ok(obm_model_open(ctx, path, NULL, &m, &err), &err);
    const obm_tensor *ids = &obm__safetensors_find(expected, "ids")->t,
                     *logits = &obm__safetensors_find(expected, "logits")->t;
    size_t n = (size_t)ids->shape[0], count = n * (size_t)logits->shape[1];
    int32_t *tokens = malloc(n * sizeof *tokens);
    memcpy(tokens, ids->data, n * sizeof *tokens);
    for (int decode = 0; decode < 2; decode++) {
        float *got = all_logits(m, tokens, n, decode, OBM_F32);
        double worst = 0;
        for (size_t i = 0; i < count; i++) {
            float want;
            memcpy(&want, (const char *)logits->data + i * sizeof want, sizeof want);
            if (!(fabs(got[i] - want) <= worst)) worst = fabs(got[i] - want);
        }
        if (!(worst <= 2e-4)) fail_msg("%s: max |diff| is %g", name, worst);
        free(got);
    }
    free(tokens);
    obm__safetensors_free(expected);
    obm_model_free(m);
    obm_context_free(ctx);
}

static void matches_transformers(void **state) {
    (void)state;
    const char *names[] = {"llama-tied", "llama-untied-bias", "llama3-rope", "llama3-rope-v5", "mistral-window",
                           "mistral-full", "smollm3", "qwen2-window", "qwen2-yarn", "qwen3",
                           "gemma2", "gemma3", "gemma3-vision", "phi3", "granite",
                           "olmo2"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) compare_with_transformers(names[i]);
}

/* ---- config.json ---- */

#define SIZES                                                                                                      \
    ",\"vocab_size\":9,\"hidden_size\":8,\"intermediate_size\":5,\"num_hidden_layers\":1,\"num_attention_heads\":2"
#define OTHER SIZES ",\"num_key_value_heads\":2"
#define OTHER_GEMMA3 "\"model_type\":\"gemma3_text\"" OTHER
#define BASIC "\"model_type\":\"llama\"" SIZES

static obm_status parse(const char *text, obm__config *out, obm_error *err) {
    obm_json *json;
    check_ok(obm__json_parse(text, strlen(text), "config.json", &json, err), err);
    obm_status status = obm__config_parse(json, NULL, "config.json", out, err);
    obm__json_free(json);
    return status;
}

static void config_refuses(void **state) {
    (void)state;
    static const struct { const char *text; obm_status status; const char *names;
    } bad[] = {
        {"{}", OBM_E_FORMAT, "model_type"},
        {"{\"model_type\":\"gpt2\"}", OBM_E_UNSUPPORTED, "llama, mistral"},
        {"{\"model_type\":\"llama\"}", OBM_E_FORMAT, "vocab_size"},
        {"{" BASIC ",\"hidden_act\":\"gelu\"}", OBM_E_UNSUPPORTED, "hidden_act"},
        {"{" BASIC ",\"hidden_activation\":\"gelu\"}", OBM_E_UNSUPPORTED, "hidden_activation"},
        {"{" BASIC ",\"scale_depth\":1.4}", OBM_E_UNSUPPORTED, "\"scale_depth\": 1.4"},
        {"{" BASIC ",\"logits_scaling\":8}", OBM_E_UNSUPPORTED, "logits_scaling"},
        {"{" BASIC ",\"attn_logit_softcapping\":50}", OBM_E_UNSUPPORTED, "attn_logit_softcapping"},
        {"{" BASIC ",\"no_rope_layers\":[1]}", OBM_E_UNSUPPORTED, "no_rope_layers"},
        {"{" BASIC ",\"use_sliding_window\":true}", OBM_E_UNSUPPORTED, "use_sliding_window"},
        {"{" BASIC ",\"text_config\":{\"a\":1}}", OBM_E_UNSUPPORTED, "text_config"},
        {"{" BASIC ",\"partial_rotary_factor\":0.5}", OBM_E_UNSUPPORTED, "partial_rotary_factor"},
        {"{" BASIC ",\"rope_interleaved\":true}", OBM_E_UNSUPPORTED, "rope_interleaved"},
        {"{" BASIC ",\"quantization_config\":{\"bits\":4}}", OBM_E_UNSUPPORTED, "quantization_config"},
        {"{" BASIC ",\"rope_scaling\":{\"type\":\"linear\"}}", OBM_E_FORMAT, "factor"},
        {"{" BASIC ",\"rope_scaling\":{\"type\":\"mrope\"}}", OBM_E_UNSUPPORTED, "mrope"},
        {"{" BASIC ",\"rope_scaling\":{\"type\":\"default\",\"mrope_section\":[1]}}", OBM_E_UNSUPPORTED, "mrope_section"},
        {"{" BASIC ",\"rope_parameters\":{\"full_attention\":{\"rope_theta\":2}}}", OBM_E_UNSUPPORTED, "full_attention"},
        {"{" BASIC ",\"rope_parameters\":{\"rope_type\":\"longrope\",\"factor\":2}}", OBM_E_FORMAT, "short_factor"},
        {"{" BASIC ",\"rope_parameters\":{\"rope_type\":\"longrope\",\"short_factor\":[1],\"long_factor\":[1,2]}}", OBM_E_FORMAT,
         "short_factor"},
        {"{" BASIC ",\"rope_parameters\":{\"rope_type\":\"longrope\",\"short_factor\":[1,2],\"long_factor\":[1,-2]}}",
         OBM_E_FORMAT, "long_factor"},
        {"{" BASIC ",\"rope_parameters\":{\"rope_type\":\"default\",\"partial_rotary_factor\":0.25}}",
         OBM_E_UNSUPPORTED, "partial_rotary_factor"},
        {"{" BASIC ",\"rope_parameters\":{\"rope_type\":\"llama3\"}}", OBM_E_FORMAT, "factor"},
        {"{" BASIC ",\"rope_scaling\":3}", OBM_E_FORMAT, "rope_scaling"},
        {"{" BASIC ",\"num_key_value_heads\":3}", OBM_E_FORMAT, "num_key_value_heads"},
        {"{" BASIC ",\"head_dim\":3}", OBM_E_FORMAT, "head_dim"},
        {"{" BASIC ",\"head_dim\":-2}", OBM_E_FORMAT, "head_dim"},
        {"{" BASIC ",\"rms_norm_eps\":0}", OBM_E_FORMAT, "rms_norm_eps"},
        {"{" BASIC ",\"attention_bias\":\"yes\"}", OBM_E_FORMAT, "attention_bias"},
        {"{" BASIC ",\"eos_token_id\":\"2\"}", OBM_E_FORMAT, "eos_token_id"},
        {"{" BASIC ",\"layer_types\":[\"sliding_attention\"]}", OBM_E_UNSUPPORTED, "layer_types"},
        {"{" BASIC ",\"layer_types\":[\"full_attention\",\"full_attention\"]}", OBM_E_FORMAT, "layer_types"},
        {"{\"model_type\":\"qwen2\"" OTHER ",\"layer_types\":[\"sliding_attention\"]}", OBM_E_FORMAT, "sliding window"},
        {"{\"model_type\":\"qwen3\"" OTHER ",\"layer_types\":[\"chunked_attention\"]}", OBM_E_UNSUPPORTED, "chunked_attention"},
        {"{\"model_type\":\"smollm3\"" OTHER ",\"no_rope_layers\":[1,0]}", OBM_E_FORMAT, "no_rope_layers"},
        {"{\"model_type\":\"gemma2\"" OTHER ",\"use_bidirectional_attention\":true}", OBM_E_UNSUPPORTED,
         "use_bidirectional_attention"},
        {"{\"model_type\":\"gemma3_text\"" OTHER ",\"rope_parameters\":{\"rope_type\":\"default\"}}", OBM_E_FORMAT,
         "sliding_attention"},
        {"{\"model_type\":\"gemma3\"" OTHER "}", OBM_E_FORMAT, "\"text_config\": expected an object, found nothing"},
        {"{\"model_type\":\"gemma3\",\"text_config\":[{" BASIC "}]}", OBM_E_FORMAT, "text_config"},
        {"{\"model_type\":\"gemma3\",\"text_config\":{\"model_type\":\"gemma3\",\"text_config\":{}}}", OBM_E_UNSUPPORTED,
         "inside of another"},
        {"{\"model_type\":\"gemma3\",\"text_config\":{\"model_type\":\"gpt2\"" SIZES "}}", OBM_E_UNSUPPORTED, "gpt2"},
        {"{\"model_type\":\"gemma3\",\"hidden_size\":9,\"text_config\":{\"model_type\":\"gemma3_text\"" OTHER "}}",
         OBM_E_UNSUPPORTED, "\"hidden_size\": 9"},
        {"{\"model_type\":\"gemma3\",\"quantization_config\":{\"bits\":4},\"text_config\":{" OTHER_GEMMA3 "}}",
         OBM_E_UNSUPPORTED, "quantization_config"},
        {"{\"model_type\":\"gemma3\",\"text_config\":{" OTHER_GEMMA3 ",\"scale_depth\":2}}", OBM_E_UNSUPPORTED,
         "scale_depth"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        obm__config c;
        obm_error err;
        obm_status status = parse(bad[i].text, &c, &err);
        if (status != bad[i].status || !strstr(err.message, bad[i].names))
            fail_msg("%s: %s: %s", bad[i].text, obm_status_name(status), status ? err.message : "");
    }
}

static void config_reads(void **state) {
    (void)state;
    obm__config c;
    obm_error err;
    check_ok(
        parse(
            "{" BASIC
            ",\"rope_theta\":5e5,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,"
            "\"high_freq_factor\":4,\"original_max_position_embeddings\":8192},\"eos_token_id\":[3,4],\"sliding_"
            "window\":5,"
            "\"hidden_act\":\"silu\",\"tie_word_embeddings\":true,\"partial_rotary_factor\":1.0,\"pretraining_tp\":1}",
            &c, &err),
        &err);
    assert_int_equal(c.kv_heads, 2);
    assert_int_equal(c.head_dim, 4);
    assert_int_equal(c.window, 0);   /* LLaMA has none, whatever the file says */
    assert_int_equal(c.max_positions, 2048);
    assert_true(c.tied && c.ropes[0].type == OBM_ROPE_LLAMA3 && c.ropes[0].theta == 5e5 && c.ropes[0].original_positions == 8192);
    assert_int_equal(c.n_eos, 2);
    assert_int_equal(c.eos[1], 4);
    obm__config_clear(&c);
    check_ok(parse("{\"model_type\":\"mistral\",\"vocab_size\":9,\"hidden_size\":32,\"intermediate_size\":5,\"num_"
                   "hidden_layers\":1,"
                   "\"num_attention_heads\":8,\"rope_parameters\":{\"rope_theta\":7.0,\"rope_type\":\"default\"}}",
                   &c, &err),
             &err);
    assert_int_equal(c.window, 4096);
    assert_int_equal(c.kv_heads, 8);
    assert_true(c.ropes[0].theta == 7 && c.ropes[0].type == OBM_ROPE_DEFAULT && !c.n_eos);
    obm__config_clear(&c);
}

/* The keys and sizes of Gemma 3 4B as it is published: most are left to defaults. */
static void config_of_a_model_that_sees(void **state) {
    (void)state;
    obm__config c;
    obm_error err;
    check_ok(parse("{\"architectures\":[\"Gemma3ForConditionalGeneration\"],\"boi_token_index\":255999,"
                   "\"eoi_token_index\":256000,\"eos_token_id\":[1,106],\"image_token_index\":262144,"
                   "\"initializer_range\":0.02,\"mm_tokens_per_image\":256,\"model_type\":\"gemma3\","
                   "\"hidden_size\":2560,\"text_config\":{\"hidden_size\":2560,\"intermediate_size\":10240,"
                   "\"num_hidden_layers\":34,\"rope_scaling\":{\"factor\":8.0,\"rope_type\":\"linear\"},"
                   "\"sliding_window\":1024},\"vision_config\":{\"hidden_size\":1152,\"model_type\":\"siglip\"}}",
                   &c, &err),
             &err);
    assert_string_equal(c.arch->model_type, "gemma3_text");
    assert_int_equal(c.vocab, 262208);
    assert_int_equal(c.heads, 8);
    assert_int_equal(c.kv_heads, 4);
    assert_int_equal(c.head_dim, 256);
    assert_int_equal(c.window, 1024);
    assert_int_equal(c.layer[4].window, 1024);
    assert_int_equal(c.layer[5].window, 0);
    assert_true(c.tied && c.n_ropes == 2 && c.ropes[0].type == OBM_ROPE_LINEAR && c.ropes[0].factor == 8);
    assert_true(c.ropes[0].theta == 1e6 && c.ropes[1].theta == 1e4 && c.ropes[1].type == OBM_ROPE_DEFAULT);
    assert_int_equal(c.n_eos, 2);
    assert_int_equal(c.eos[1], 106);
    obm__config_clear(&c);
}

/* The files decide about the head, whatever config.json says: as in transformers 5. */
static void files_decide_about_the_head(void **state) {
    (void)state;
    for (int tied = 0; tied < 2; tied++) {
        fixture f;
        obm_error err;
        open_fixture(&f, &shapes[tied ? 0 : 1], OBM_F32, 1);
        float *before = all_logits(f.m, f.ids, T, false, OBM_F32);
        obm_model_free(f.m);
        f.c.tied = !tied;
        tiny_write_config(&f.c, f.dir);
        check_ok(obm_model_open(f.ctx, f.dir, NULL, &f.m, &err), &err);
        float *after = all_logits(f.m, f.ids, T, false, OBM_F32);
        assert_memory_equal(after, before, (size_t)(T * f.c.vocab) * sizeof *after);
        f.c.tied = tied;
        free(before);
        free(after);
        close_fixture(&f);
    }
}

/* ---- errors ---- */

static void wrong_ids_are_refused(void **state) {
    (void)state;
    fixture f;
    obm_error err;
    float out[131];
    int32_t many[201] = {0};
    open_fixture(&f, &shapes[0], OBM_F32, 1);
    const int32_t negative[] = {1, -1}, large[] = {1, 71};
    assert_int_equal(obm_model_logits(f.m, negative, 2, NULL, out, &err), OBM_E_ARG);
    assert_int_equal(obm_model_logits(f.m, large, 2, NULL, out, &err), OBM_E_ARG);
    assert_non_null(strstr(err.message, "71"));
    assert_int_equal(obm_model_logits(f.m, large, 0, NULL, out, &err), OBM_E_ARG);
    assert_int_equal(obm_model_logits(f.m, many, 201, NULL, out, &err), OBM_E_ARG);
    obm_run_options options = OBM_INIT(obm_run_options);
    double route[1] = {1};
    options.route = route;
    assert_int_equal(obm_model_logits(f.m, many, 1, &options, out, &err), OBM_E_ARG);
    options.route = NULL;
    options.kv = OBM_BF16;
    assert_int_equal(obm_model_logits(f.m, many, 1, &options, out, &err), OBM_E_ARG);
    check_ok(obm_model_logits(f.m, many, 200, NULL, out, &err), &err);   /* and the model still works */
    close_fixture(&f);
}

static obm_status open_broken(const tiny *shape, const tiny_weights *w, obm_error *err) {
    char *dir = tiny_folder();
    obm_model *m = NULL;
    obm_context *ctx = new_context(1);
    if (tiny_write(shape, w, dir, err)) fail_msg("%s", err->message);
    obm_status status = obm_model_open(ctx, dir, NULL, &m, err);
    assert_true(status == OBM_OK || !m);
    obm_model_free(m);
    obm_context_free(ctx);
    tiny_remove(dir);
    return status;
}

static void broken_folders_are_refused(void **state) {
    (void)state;
    obm_error err;
    tiny_weights w;
    tiny c = shapes[1];
    tiny_weights_new(&c, &w);
    snprintf(w.t[5].name, sizeof w.t[5].name, "something.else");
    assert_int_equal(open_broken(&c, &w, &err), OBM_E_NOTFOUND);
    assert_non_null(strstr(err.message, "model.layers.0.self_attn.v_proj.weight"));
    tiny_weights_free(&w);
    tiny_weights_new(&c, &w);
    c.inter++;
    assert_int_equal(open_broken(&c, &w, &err), OBM_E_SHAPE);
    assert_non_null(strstr(err.message, "mlp.gate_proj"));
    c.inter--;
    c.extra = ",\"attention_bias\":true";
    assert_int_equal(open_broken(&c, &w, &err), OBM_E_NOTFOUND);
    assert_non_null(strstr(err.message, "bias"));
    tiny_weights_free(&w);
}

static void describes_itself(void **state) {
    (void)state;
    fixture f;
    obm_model_info info;
    obm_model_memory memory;
    open_fixture(&f, &shapes[2], OBM_BF16, 1);
    obm_model_describe(f.m, &info);
    assert_string_equal(info.architecture, "mistral");
    assert_int_equal(info.sliding_window, 7);
    assert_int_equal(info.vocab, 53);
    size_t params = 0;
    for (int i = 0; i < f.w.n; i++) params += (size_t)(f.w.t[i].rows ? f.w.t[i].rows : 1) * (size_t)f.w.t[i].cols;
    assert_int_equal(info.params, params);
    assert_int_equal(info.bytes, params * 2);
    free(logits_of(f.m, f.ids, T, NULL));
    obm_model_account(f.m, &memory);
    assert_true(memory.base == params * 2 && memory.kv == 0 && memory.scratch > 0);
    close_fixture(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_reference),
        cmocka_unit_test(decode_agrees_with_prefill),
        cmocka_unit_test(threads_do_not_matter),
        cmocka_unit_test(the_last_row_is_the_last_of_all),
        cmocka_unit_test(chunks_of_a_prompt_do_not_matter),
        cmocka_unit_test(long_prompts_match_the_reference),
        cmocka_unit_test(chunks_and_threads_of_long_prompts_do_not_matter),
        cmocka_unit_test(what_is_not_finite_reaches_those_who_see_it),
        cmocka_unit_test(neighbouring_tiles_do_not_matter),
        cmocka_unit_test(neighbours_in_decoding_do_not_matter),
        cmocka_unit_test(parts_of_a_context_do_not_matter),
        cmocka_unit_test(buffers_of_long_contexts),
        cmocka_unit_test(hidden_states),
        cmocka_unit_test(matches_transformers),
        cmocka_unit_test(config_refuses),
        cmocka_unit_test(config_reads),
        cmocka_unit_test(config_of_a_model_that_sees),
        cmocka_unit_test(files_decide_about_the_head),
        cmocka_unit_test(wrong_ids_are_refused),
        cmocka_unit_test(broken_folders_are_refused),
        cmocka_unit_test(describes_itself),
    };
    return cmocka_run_group_tests_name("model", tests, NULL, NULL);
}
