/* Task vectors, planes, policies and statistics, against plain references written here and in tests/reference. */
#include "delta_fixture.h"

/* ---- shared vectors ---- */

typedef struct vector_case {
    char name[64], scale[32];
    int64_t rows, cols;
    int planes, stored;
    long long bad; /* -1: no error expected */
    float *base, *expert, *alphas[OBM_MAX_PLANES], *value;
    uint8_t *signs[OBM_MAX_PLANES];
} vector_case;

static float *read_floats(char *text, size_t *n) {
    size_t capacity = strlen(text) / 2 + 1, count = 0;
    float *v = obm__alloc(capacity, sizeof *v);
    for (char *end, *at = text;; at = end) {
        float x = strtof(at, &end);
        if (end == at) break;
        v[count++] = x;
    }
    if (n) *n = count;
    return v;
}

static uint8_t *read_hex(const char *text) {
    size_t n = strcspn(text, " \n") / 2;
    uint8_t *out = obm__alloc(n, 1);
    for (size_t i = 0; i < n; i++) {
        char pair[3] = {text[2 * i], text[2 * i + 1], 0};
        out[i] = (uint8_t)strtol(pair, NULL, 16);
    }
    return out;
}

static void read_line(vector_case *c, char *word, char *rest) {
    if (!strcmp(word, "shape"))
        assert_int_equal(sscanf(rest, "%ld %ld", &c->rows, &c->cols), 2);
    else if (!strcmp(word, "scale"))
        sscanf(rest, "%31s", c->scale);
    else if (!strcmp(word, "planes"))
        c->planes = atoi(rest);
    else if (!strcmp(word, "stored"))
        c->stored = atoi(rest);
    else if (!strcmp(word, "base"))
        c->base = read_floats(rest, NULL);
    else if (!strcmp(word, "expert"))
        c->expert = read_floats(rest, NULL);
    else if (!strcmp(word, "value"))
        c->value = read_floats(rest, NULL);
    else if (!strcmp(word, "alpha"))
        c->alphas[rest[0] - '0'] = read_floats(rest + 1, NULL);
    else if (!strcmp(word, "sign"))
        c->signs[rest[0] - '0'] = read_hex(rest + 2);
    else if (!strcmp(word, "error"))
        c->bad = atoll(rest + strlen("VALUE "));
    else
        fail_msg("unknown line %s", word);
}

static void free_case(vector_case *c) {
    obm_free(c->base);
    obm_free(c->expert);
    obm_free(c->value);
    for (int i = 0; i < OBM_MAX_PLANES; i++) {
        obm_free(c->alphas[i]);
        obm_free(c->signs[i]);
    }
}

typedef struct memory_sink {
    uint8_t *bytes;
    size_t n;
} memory_sink;
static obm_status to_memory(void *user, const void *bytes, size_t n, int64_t rows_done, obm_error *err) {
    (void)rows_done;
    (void)err;
    memory_sink *m = user;
    memcpy(m->bytes + m->n, bytes, n);
    m->n += n;
    return OBM_OK;
}

static obm__pair matrix_pair(const float *base, const float *expert, int64_t rows, int64_t cols) {
    obm__pair p = {.name = "w", .cls = OBM_CLASS_MLP};
    p.base = p.expert = (obm_tensor){.dtype = OBM_F32, .ndim = 2, .shape = {rows, cols}};
    p.base.data = base;
    p.expert.data = expert;
    return p;
}

static void check_value(const obm_context *ctx, const vector_case *c, const obm__planes *p) {
    float *row = obm__alloc((size_t)c->cols, sizeof *row);
    for (int64_t r = 0; c->value && r < c->rows; r++) {
        const float *want = c->value + r * c->cols;
        obm__planes_read_row(ctx->k, p, r, 0, c->cols, row);
        assert_memory_equal(row, want, (size_t)c->cols * sizeof *row);
        int64_t from = c->cols / 3, n = c->cols - from - c->cols / 5; /* a part that begins inside a byte */
        obm__planes_read_row(ctx->k, p, r, from, n, row);
        assert_memory_equal(row, want + from, (size_t)n * sizeof *row);
    }
    obm_free(row);
}

static void check_case(obm_context *ctx, const vector_case *c) {
    obm__scale scale;
    OK(obm__scale_parse(c->scale, &scale, err));
    obm__pair pair = matrix_pair(c->base, c->expert, c->rows, c->cols);
    obm__planes planes = {.rows = c->rows, .cols = c->cols, .row_bytes = obm__row_bytes(c->cols), .scale = scale};
    int64_t n = obm__scale_count(scale, c->rows, c->cols);
    size_t bytes = (size_t)(c->rows * planes.row_bytes);
    float *alphas[OBM_MAX_PLANES] = {0};
    uint8_t *signs[OBM_MAX_PLANES] = {0};
    int stored = 0;
    for (int p = 0; p < c->planes; p++) {
        alphas[p] = obm__calloc((size_t)n, sizeof(float));
        signs[p] = obm__calloc(bytes, 1);
        memory_sink sink = {signs[p], 0};
        bool zero;
        if (c->bad >= 0) {
            char index[96];
            snprintf(index, sizeof index, "tensor w: NaN or Inf in expert - base at index %lld (", c->bad);
            FAILS(obm__onebit_plane(ctx, &pair, scale, p, alphas, to_memory, &sink, &zero, err), OBM_E_VALUE, index);
            break;
        }
        OK(obm__onebit_plane(ctx, &pair, scale, p, alphas, to_memory, &sink, &zero, err));
        assert_int_equal(sink.n, bytes);
        if (stored == p && !zero) stored++;
        if (p >= c->stored) continue;
        if (memcmp(alphas[p], c->alphas[p], (size_t)n * sizeof(float))) fail_msg("%s: alphas of plane %d", c->name, p);
        if (memcmp(signs[p], c->signs[p], bytes)) fail_msg("%s: signs of plane %d", c->name, p);
        planes.alphas[p] = alphas[p];
        planes.signs[p] = signs[p];
    }
    if (stored != c->stored) fail_msg("%s: %d planes kept, expected %d", c->name, stored, c->stored);
    planes.n = stored;
    check_value(ctx, c, &planes);
    for (int p = 0; p < OBM_MAX_PLANES; p++) {
        obm_free(alphas[p]);
        obm_free(signs[p]);
    }
}

static int check_vectors(obm_context *ctx) {
    FILE *f = fopen(OBM_SOURCE_DIR "/tests/vectors/onebit.txt", "r");
    assert_non_null(f);
    char *line = NULL;
    size_t capacity = 0;
    int cases = 0;
    vector_case c = {.bad = -1};
    while (getline(&line, &capacity, f) > 0) {
        size_t word = strcspn(line, " \n");
        char *rest = line + word + (line[word] == ' ');
        line[word] = 0;
        if (line[0] == '#') continue;
        if (!strcmp(line, "case")) {
            sscanf(rest, "%63s", c.name);
        } else if (!strcmp(line, "end")) {
            check_case(ctx, &c);
            free_case(&c);
            c = (vector_case){.bad = -1};
            cases++;
        } else {
            read_line(&c, line, rest);
        }
    }
    free(line);
    fclose(f);
    return cases;
}

static void test_vectors(void **unused) {
    (void)unused;
    for (int threads = 1; threads <= 5; threads += 2) {
        obm_context *ctx = fixture_context(threads);
        assert_int_equal(check_vectors(ctx), 26);
        obm_context_free(ctx);
    }
}

/* Large enough for several stripes of several threads. */
static void test_planes_do_not_depend_on_threads(void **unused) {
    (void)unused;
    const int64_t rows = 700, cols = 3001;
    float *base = fixture_values((size_t)(rows * cols), 1), *expert = fixture_values((size_t)(rows * cols), 2);
    const char *const scales[] = {"matrix", "row", "group:192"};
    for (size_t s = 0; s < 3; s++) {
        obm__scale scale;
        OK(obm__scale_parse(scales[s], &scale, err));
        obm__pair pair = matrix_pair(base, expert, rows, cols);
        size_t n = (size_t)obm__scale_count(scale, rows, cols), bytes = (size_t)(rows * obm__row_bytes(cols));
        float *first[2] = {NULL, NULL};
        uint8_t *first_signs[2] = {NULL, NULL};
        for (int threads = 1; threads <= 5; threads += threads == 1 ? 1 : 3) {
            obm_context *ctx = fixture_context(threads);
            float *alphas[2];
            for (int p = 0; p < 2; p++) {
                uint8_t *signs = obm__calloc(bytes, 1);
                memory_sink sink = {signs, 0};
                bool zero;
                alphas[p] = obm__calloc(n, sizeof(float));
                OK(obm__onebit_plane(ctx, &pair, scale, p, alphas, to_memory, &sink, &zero, err));
                if (threads == 1) {
                    first[p] = alphas[p];
                    first_signs[p] = signs;
                    continue;
                }
                assert_memory_equal(alphas[p], first[p], n * sizeof(float));
                assert_memory_equal(signs, first_signs[p], bytes);
                obm_free(signs);
            }
            for (int p = 0; p < 2 && threads > 1; p++) obm_free(alphas[p]);
            obm_context_free(ctx);
        }
        for (int p = 0; p < 2; p++) {
            obm_free(first[p]);
            obm_free(first_signs[p]);
        }
    }
    obm_free(base);
    obm_free(expert);
}

static void test_scale_parse(void **unused) {
    (void)unused;
    obm__scale s;
    OK(obm__scale_parse("group:128", &s, err));
    assert_int_equal(s.kind, OBM_SCALE_GROUP);
    assert_int_equal(obm__scale_count(s, 3, 300), 9);
    OK(obm__scale_parse("row", &s, err));
    assert_int_equal(obm__scale_count(s, 3, 300), 3);
    OK(obm__scale_parse("matrix", &s, err));
    assert_int_equal(obm__scale_count(s, 3, 300), 1);
    FAILS(obm__scale_parse("group:100", &s, err), OBM_E_ARG, "multiple of 64");
    FAILS(obm__scale_parse("group:0", &s, err), OBM_E_ARG, "multiple of 64");
    FAILS(obm__scale_parse("group:-64", &s, err), OBM_E_ARG, "multiple of 64");
    FAILS(obm__scale_parse("group:64x", &s, err), OBM_E_ARG, "multiple of 64");
    FAILS(obm__scale_parse("group:99999999999999999999", &s, err), OBM_E_ARG, "multiple of 64");
    FAILS(obm__scale_parse("column", &s, err), OBM_E_ARG, "matrix, row or group:N");
}

/* ---- pairing ---- */

#define EMBED "model.embed_tokens.weight"
#define HEAD "lm_head.weight"
#define Q "model.layers.0.self_attn.q_proj.weight"
#define UP "model.layers.0.mlp.up_proj.weight"
#define NORM "model.norm.weight"

typedef struct world {
    obm_context *ctx;
    char *dir;
    float *a, *b;
} world;

static int setup(void **state) {
    world *w = calloc(1, sizeof *w);
    w->ctx = fixture_context(2);
    w->dir = fixture_folder();
    w->a = fixture_values(4096, 11);
    w->b = fixture_values(4096, 12);
    *state = w;
    return 0;
}

static int teardown(void **state) {
    world *w = *state;
    fixture_remove(w->dir);
    obm_context_free(w->ctx);
    obm_free(w->dir);
    obm_free(w->a);
    obm_free(w->b);
    free(w);
    return 0;
}

static obm_checkpoint *model(const world *w, const char *name, const fixture_tensor *t, size_t n) {
    char *path = fixture_model(w->ctx, w->dir, name, t, n);
    obm_checkpoint *c = NULL;
    OK(obm_checkpoint_open(w->ctx, path, &c, err));
    obm_free(path);
    return c;
}

static void pair_up(const world *w, const fixture_tensor *b, size_t nb, const fixture_tensor *e, size_t ne,
                    obm_checkpoint **base, obm_checkpoint **expert, obm_task_vector **v) {
    *base = model(w, "base", b, nb);
    *expert = model(w, "expert", e, ne);
    OK(obm_task_vector_new(*base, *expert, v, err));
}

static void drop(obm_checkpoint *base, obm_checkpoint *expert, obm_task_vector *v) {
    obm_task_vector_free(v);
    obm_checkpoint_free(base);
    obm_checkpoint_free(expert);
}

static float round_to(const world *w, obm_dtype dtype, float x) {
    uint8_t bytes[8];
    float back;
    obm_tensor t = {.data = bytes, .dtype = dtype, .ndim = 1, .shape = {1}};
    if (dtype == OBM_F64) return x;
    obm__narrow(w->ctx->k, dtype, &x, 1, bytes);
    obm__widen(w->ctx->k, &t, 0, 1, &back);
    return back;
}

static void test_differences(void **state) {
    const world *w = *state;
    const obm_dtype types[] = {OBM_F32, OBM_BF16, OBM_F16, OBM_F64};
    for (size_t i = 0; i < 4; i++) {
        for (size_t j = 0; j < 4; j++) {
            /* An odd byte first: what follows in the file is not aligned. */
            const fixture_tensor b[] = {{"a.bias", OBM_U8, 1, {1}, NULL, "x"}, {Q, types[i], 2, {3, 5}, w->a, NULL}};
            const fixture_tensor e[] = {{"a.bias", OBM_U8, 1, {1}, NULL, "x"}, {Q, types[j], 2, {3, 5}, w->b, NULL}};
            obm_checkpoint *base, *expert;
            obm_task_vector *v;
            float d[15];
            pair_up(w, b, 2, e, 2, &base, &expert, &v);
            assert_int_equal(obm_task_vector_count(v), 2);
            OK(obm_task_vector_read(v, Q, d, err));
            for (int k = 0; k < 15; k++)
                assert_true(d[k] == round_to(w, types[j], w->b[k]) - round_to(w, types[i], w->a[k]));
            OK(obm_task_vector_read(v, "a.bias", d, err));
            assert_true(d[0] == 0);
            FAILS(obm_task_vector_read(v, "nothing", d, err), OBM_E_NOTFOUND, "nothing");
            drop(base, expert, v);
        }
    }
}

static void expect_refusal(const world *w, const fixture_tensor *b, size_t nb, const fixture_tensor *e, size_t ne,
                           obm_status status, const char *part) {
    obm_checkpoint *base = model(w, "base", b, nb), *expert = model(w, "expert", e, ne);
    obm_task_vector *v = NULL;
    FAILS(obm_task_vector_new(base, expert, &v, err), status, part);
    assert_null(v);
    drop(base, expert, NULL);
}

static void test_refusals(void **state) {
    const world *w = *state;
    const fixture_tensor b[] = {{UP, OBM_F32, 2, {4, 6}, w->a, NULL}, {Q, OBM_F32, 2, {4, 4}, w->a, NULL}};
    fixture_tensor e[] = {b[0], b[1]};
    e[0].shape[1] = 5;
    expect_refusal(w, b, 2, e, 2, OBM_E_SHAPE, "tensor " UP ": expert has shape (4, 5), base has (4, 6)");
    e[0].shape[1] = 6;
    e[0].shape[0] = 5; /* extra rows are for vocabularies only */
    expect_refusal(w, b, 2, e, 2, OBM_E_SHAPE, "(5, 6)");
    expect_refusal(w, b, 2, b, 1, OBM_E_NOTFOUND, "tensor " Q " is in ");
    expect_refusal(w, b, 1, b, 2, OBM_E_NOTFOUND, "tensor " Q " is in ");
    const fixture_tensor bi[] = {{"ids", OBM_I32, 1, {2}, NULL, "12345678"}},
                         ei[] = {{"ids", OBM_I32, 1, {2}, NULL, "12345679"}};
    expect_refusal(w, bi, 1, ei, 1, OBM_E_DTYPE, "tensor ids: I32");
    const fixture_tensor small[] = {{EMBED, OBM_F32, 2, {4, 6}, w->a, NULL}},
                         fewer[] = {{EMBED, OBM_F32, 2, {3, 6}, w->a, NULL}};
    expect_refusal(w, small, 1, fewer, 1, OBM_E_SHAPE, "(3, 6)");
}

static void test_vocabulary_and_ties(void **state) {
    const world *w = *state;
    const fixture_tensor tied[] = {{EMBED, OBM_F32, 2, {4, 6}, w->a, NULL}};
    const fixture_tensor untied[] = {{EMBED, OBM_F32, 2, {6, 6}, w->b, NULL},
                                     {HEAD, OBM_F32, 2, {6, 6}, w->b + 36, NULL}};
    obm_checkpoint *base, *expert;
    obm_task_vector *v;
    const char *name;
    obm_tensor tb, te;
    float d[36];

    pair_up(w, tied, 1, untied, 2, &base, &expert, &v);
    assert_int_equal(obm_task_vector_count(v), 2);
    obm_task_vector_at(v, 0, &name, &tb, &te);
    assert_string_equal(name, HEAD);
    assert_int_equal(tb.shape[0], 4);
    assert_int_equal(te.shape[0], 6);
    OK(obm_task_vector_read(v, HEAD, d, err)); /* the base's head is its embedding */
    for (int k = 0; k < 24; k++) assert_true(d[k] == w->b[36 + k] - w->a[k]);
    drop(base, expert, v);

    const fixture_tensor base_own[] = {{EMBED, OBM_F32, 2, {4, 6}, w->a, NULL},
                                       {HEAD, OBM_F32, 2, {4, 6}, w->a + 24, NULL}};
    const fixture_tensor expert_tied[] = {{EMBED, OBM_F32, 2, {4, 6}, w->b, NULL}};
    pair_up(w, base_own, 2, expert_tied, 1, &base, &expert, &v);
    OK(obm_task_vector_read(v, HEAD, d, err)); /* the expert's head is its embedding */
    for (int k = 0; k < 24; k++) assert_true(d[k] == w->b[k] - w->a[24 + k]);
    drop(base, expert, v);

    pair_up(w, tied, 1, tied, 1, &base, &expert, &v);
    assert_int_equal(obm_task_vector_count(v), 1);
    drop(base, expert, v);
}

static void test_rotary_buffer_may_be_absent(void **state) {
    const world *w = *state;
    const fixture_tensor b[] = {{"model.layers.0.self_attn.rotary_emb.inv_freq", OBM_F32, 1, {4}, w->a, NULL},
                                {Q, OBM_F32, 2, {4, 4}, w->a, NULL}};
    obm_checkpoint *base, *expert;
    obm_task_vector *v;
    pair_up(w, b, 2, b + 1, 1, &base, &expert, &v);
    assert_int_equal(obm_task_vector_count(v), 1);
    drop(base, expert, v);
}

static void test_nonfinite(void **state) {
    const world *w = *state;
    float bad[16];
    memcpy(bad, w->b, sizeof bad);
    bad[9] = NAN;
    bad[12] = INFINITY;
    const fixture_tensor b[] = {{Q, OBM_F32, 2, {4, 4}, w->a, NULL}}, e[] = {{Q, OBM_F32, 2, {4, 4}, bad, NULL}};
    obm_checkpoint *base, *expert;
    obm_task_vector *v;
    float d[16];
    obm_delta_stats stats[OBM_CLASS_COUNT];
    pair_up(w, b, 1, e, 1, &base, &expert, &v);
    FAILS(obm_task_vector_read(v, Q, d, err), OBM_E_VALUE,
          "tensor " Q ": NaN or Inf in expert - base at index 9 (row 2, column 1)");
    FAILS(obm_task_vector_stats(w->ctx, v, NULL, NULL, stats, err), OBM_E_VALUE, "index 9");
    drop(base, expert, v);
}

/* ---- statistics ---- */

typedef struct plain {
    double base2, d2, abs, error_matrix, error_row, ab, other2;
    uint64_t zeros, agree, params;
} plain;

static void plain_stats(const float *a, const float *b, int64_t rows, int64_t cols, plain *p) {
    double total = 0;
    for (int64_t i = 0; i < rows * cols; i++) total += fabs((double)(b[i] - a[i]));
    double alpha = total / (double)(rows * cols);
    for (int64_t r = 0; r < rows; r++) {
        double sum = 0;
        for (int64_t c = 0; c < cols; c++) sum += fabs((double)(b[r * cols + c] - a[r * cols + c]));
        for (int64_t c = 0; c < cols; c++) {
            double x = a[r * cols + c], d = b[r * cols + c] - a[r * cols + c], row_alpha = sum / (double)cols;
            p->base2 += x * x;
            p->d2 += d * d;
            p->zeros += d == 0;
            p->params++;
            p->error_matrix += (fabs(d) - alpha) * (fabs(d) - alpha);
            p->error_row += (fabs(d) - row_alpha) * (fabs(d) - row_alpha);
        }
    }
}

static void near(double have, double want, double tolerance) {
    if (!(fabs(have - want) <= tolerance * fabs(want))) fail_msg("%.17g, expected %.17g", have, want);
}

static int count_calls(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)what;
    assert_true(done <= total);
    return --*(int *)user < 0;
}

static void test_stats(void **state) {
    world *w = *state;
    for (int i = 0; i < 40; i++) w->b[i * 7] = w->a[i * 7];
    const fixture_tensor b[] = {{UP, OBM_F32, 2, {20, 30}, w->a, NULL},
                                {"model.layers.1.mlp.up_proj.weight", OBM_F32, 2, {10, 5}, w->a + 700, NULL},
                                {Q, OBM_F32, 2, {9, 9}, w->a, NULL},
                                {NORM, OBM_F32, 1, {33}, w->a, NULL}};
    fixture_tensor e[4];
    memcpy(e, b, sizeof e);
    for (int i = 0; i < 4; i++) e[i].values = w->b + (b[i].values - w->a);
    obm_checkpoint *base, *expert;
    obm_task_vector *v;
    obm_delta_stats s[OBM_CLASS_COUNT], one;
    plain mlp = {0}, norm = {0};
    pair_up(w, b, 4, e, 4, &base, &expert, &v);
    plain_stats(w->a, w->b, 20, 30, &mlp);
    plain_stats(w->a + 700, w->b + 700, 10, 5, &mlp);
    plain_stats(w->a, w->b, 1, 33, &norm);
    OK(obm_task_vector_stats(w->ctx, v, NULL, NULL, s, err));
    const obm_delta_stats *m = &s[OBM_CLASS_MLP];
    assert_int_equal(m->tensors, 2);
    assert_int_equal(m->params, 650);
    assert_int_equal(m->zeros, mlp.zeros);
    near(m->base_norm, sqrt(mlp.base2), 1e-14);
    near(m->delta_norm, sqrt(mlp.d2), 1e-14);
    near(m->relative_norm, sqrt(mlp.d2 / mlp.base2), 1e-14);
    near(m->zero_share, (double)mlp.zeros / 650, 1e-14);
    near(m->onebit_error_matrix, sqrt(mlp.error_matrix / mlp.d2), 1e-12);
    near(m->onebit_error_row, sqrt(mlp.error_row / mlp.d2), 1e-12);
    assert_int_equal(s[OBM_CLASS_NORM].zeros, norm.zeros);
    near(s[OBM_CLASS_NORM].onebit_error_row, sqrt(norm.error_row / norm.d2), 1e-12);
    assert_int_equal(s[OBM_CLASS_HEAD].tensors, 0);
    OK(obm_task_vector_tensor_stats(w->ctx, v, NORM, &one, err));
    assert_memory_equal(&one, &s[OBM_CLASS_NORM], sizeof one);
    FAILS(obm_task_vector_tensor_stats(w->ctx, v, "x", &one, err), OBM_E_NOTFOUND, "x");
    for (int threads = 1; threads <= 5; threads += 4) {
        obm_context *ctx = fixture_context(threads);
        obm_delta_stats again[OBM_CLASS_COUNT];
        OK(obm_task_vector_stats(ctx, v, NULL, NULL, again, err));
        assert_memory_equal(&again[OBM_CLASS_MLP], m, sizeof *m);
        obm_context_free(ctx);
    }
    int calls = 2;
    FAILS(obm_task_vector_stats(w->ctx, v, count_calls, &calls, s, err), OBM_E_USER, "progress");
    drop(base, expert, v);
}

static void test_compare(void **state) {
    world *w = *state;
    float *c = fixture_values(4096, 13);
    const fixture_tensor b[] = {{UP, OBM_F32, 2, {1, 4096}, w->a, NULL}},
                         x[] = {{UP, OBM_F32, 2, {1, 4096}, w->b, NULL}}, y[] = {{UP, OBM_F32, 2, {1, 4096}, c, NULL}};
    obm_checkpoint *base, *first, *second = model(w, "second", y, 1);
    obm_task_vector *v, *u;
    obm_delta_pair p[OBM_CLASS_COUNT];
    pair_up(w, b, 1, x, 1, &base, &first, &v);
    OK(obm_task_vector_new(base, second, &u, err));
    OK(obm_task_vector_compare(w->ctx, v, u, NULL, NULL, p, err));
    double ab = 0, aa = 0, bb = 0;
    int agree = 0;
    for (int i = 0; i < 4096; i++) {
        double d1 = w->b[i] - w->a[i], d2 = c[i] - w->a[i];
        ab += d1 * d2;
        aa += d1 * d1;
        bb += d2 * d2;
        agree += (d1 >= 0) == (d2 >= 0);
    }
    near(p[OBM_CLASS_MLP].cosine, ab / sqrt(aa * bb), 1e-12);
    near(p[OBM_CLASS_MLP].sign_agreement, agree / 4096.0, 1e-14);
    assert_int_equal(p[OBM_CLASS_MLP].params, 4096);
    assert_true(isnan(p[OBM_CLASS_NORM].cosine));
    OK(obm_task_vector_compare(w->ctx, v, v, NULL, NULL, p, err));
    near(p[OBM_CLASS_MLP].cosine, 1, 1e-12);
    assert_true(p[OBM_CLASS_MLP].sign_agreement == 1);
    obm_task_vector_free(u);
    obm_checkpoint_free(second);
    drop(base, first, v);
    obm_free(c);
}

/* ---- policies ---- */

static obm_mode mode_of(const obm__policy *p, const char *name, int32_t ndim) {
    obm__pair pair = {
        .name = name, .cls = obm_class_of(name, ndim), .base = {.dtype = OBM_BF16, .ndim = ndim, .shape = {2, 2, 2}}};
    obm_mode mode = OBM_MODE_SAME;
    OK(obm__policy_mode(p, &pair, &mode, err));
    return mode;
}

static void check_policy(const char *task, const char *preset, obm_profile profile, const char *want_text,
                         const char *want) {
    static const char *const names[] = {Q, UP, EMBED, HEAD, NORM};
    obm_expert e = OBM_INIT(obm_expert);
    obm__policy p;
    char *text = NULL;
    e.name = task;
    e.policy = preset;
    OK(obm__policy_parse(&e, profile, false, &p, &text, err));
    assert_string_equal(text, want_text);
    for (int i = 0; i < 5; i++) {
        obm_mode mode = mode_of(&p, names[i], i == 4 ? 1 : 2);
        if (mode != (want[i] == '1' ? OBM_MODE_1BIT : OBM_MODE_FULL))
            fail_msg("%s under %s: %s", names[i], text, obm_mode_name(mode));
    }
    obm_free(text);
}

static void test_presets(void **unused) {
    (void)unused;
    check_policy("chat", NULL, OBM_PROFILE_DEFAULT, "linear, scale row, planes 1", "11fff");
    check_policy("law", "attention", OBM_PROFILE_DEFAULT, "attention, scale row, planes 1", "1ffff");
    check_policy("law", "mlp", OBM_PROFILE_MERGEKIT, "mlp, scale row, planes 1", "f1fff");
    check_policy("law", "full", OBM_PROFILE_DEFAULT, "full, scale row, planes 1", "fffff");
    check_policy("chat", NULL, OBM_PROFILE_PAPER, "paper, scale matrix, planes 1", "f1fff");
    check_policy("math", "paper", OBM_PROFILE_DEFAULT, "paper, scale matrix, planes 1", "1ffff");
    check_policy("code", "paper", OBM_PROFILE_DEFAULT, "paper, scale matrix, planes 1", "1ffff");
}

static void test_maps_and_errors(void **unused) {
    (void)unused;
    const obm_map_rule map[] = {
        {"model.layers.0.*_proj.weight", OBM_MODE_DROP}, {"*embed*", OBM_MODE_1BIT}, {"*norm*", OBM_MODE_1BIT}};
    obm_expert e = OBM_INIT(obm_expert);
    obm__policy p;
    char *text = NULL;
    e.name = "law";
    e.scale = "group:64";
    e.planes = 2;
    e.map = map;
    e.n_map = 3;
    OK(obm__policy_parse(&e, OBM_PROFILE_DEFAULT, false, &p, &text, err));
    assert_string_equal(
        text, "linear, scale group:64, planes 2, map model.layers.0.*_proj.weight=drop *embed*=1bit *norm*=1bit");
    obm_free(text);
    assert_int_equal(mode_of(&p, Q, 2), OBM_MODE_DROP);
    assert_int_equal(mode_of(&p, EMBED, 2), OBM_MODE_1BIT);
    assert_int_equal(mode_of(&p, HEAD, 2), OBM_MODE_FULL);
    obm__pair norm = {.name = NORM, .cls = OBM_CLASS_NORM, .base = {.dtype = OBM_BF16, .ndim = 1, .shape = {2}}};
    obm_mode mode;
    FAILS(obm__policy_mode(&p, &norm, &mode, err), OBM_E_ARG, "matches tensor " NORM " of shape (2)");
    obm_map_rule wrong = {"*", OBM_MODE_SAME};
    e.map = &wrong;
    e.n_map = 1;
    FAILS(obm__policy_parse(&e, OBM_PROFILE_DEFAULT, false, &p, &text, err), OBM_E_ARG, "1bit, mask, full or drop");
    e.n_map = 0;
    e.policy = "paper";
    FAILS(obm__policy_parse(&e, OBM_PROFILE_DEFAULT, false, &p, &text, err), OBM_E_ARG, "chat, math and code only");
    e.policy = "none";
    FAILS(obm__policy_parse(&e, OBM_PROFILE_DEFAULT, false, &p, &text, err), OBM_E_ARG, "unknown policy \"none\"");
    e.policy = NULL;
    e.planes = 9;
    FAILS(obm__policy_parse(&e, OBM_PROFILE_DEFAULT, false, &p, &text, err), OBM_E_ARG, "9 planes");
    e.planes = 1;
    e.scale = "half";
    FAILS(obm__policy_parse(&e, OBM_PROFILE_DEFAULT, false, &p, &text, err), OBM_E_ARG, "unknown scale");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_vectors),
        cmocka_unit_test(test_planes_do_not_depend_on_threads),
        cmocka_unit_test(test_scale_parse),
        cmocka_unit_test_setup_teardown(test_differences, setup, teardown),
        cmocka_unit_test_setup_teardown(test_refusals, setup, teardown),
        cmocka_unit_test_setup_teardown(test_vocabulary_and_ties, setup, teardown),
        cmocka_unit_test_setup_teardown(test_rotary_buffer_may_be_absent, setup, teardown),
        cmocka_unit_test_setup_teardown(test_nonfinite, setup, teardown),
        cmocka_unit_test_setup_teardown(test_stats, setup, teardown),
        cmocka_unit_test_setup_teardown(test_compare, setup, teardown),
        cmocka_unit_test(test_presets),
        cmocka_unit_test(test_maps_and_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
