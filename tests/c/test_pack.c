/* Packs on disk: what is written, what opening refuses, and that every change is one step. */
#include "delta_fixture.h"

#include "io/pack.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/wait.h>

#define EMBED "model.embed_tokens.weight"
#define HEAD "lm_head.weight"
#define Q "model.layers.0.self_attn.q_proj.weight"
#define O "model.layers.0.self_attn.o_proj.weight"
#define UP "model.layers.0.mlp.up_proj.weight"
#define DOWN "model.layers.0.mlp.down_proj.weight"
#define NORM "model.norm.weight"

enum { T_EMBED, T_Q, T_O, T_UP, T_DOWN, T_NORM, N_BASE, T_HEAD = N_BASE, N_ALL };
static const int64_t shapes[N_ALL][2] = {{10, 70}, {70, 70}, {70, 70}, {90, 70}, {70, 90}, {70, 0}, {10, 70}};
static const char *const names[N_ALL] = {EMBED, Q, O, UP, DOWN, NORM, HEAD};

typedef struct world {
    obm_context *ctx;
    char *dir, *base, *chat, *math, *pack;
    float *values[3][N_ALL]; /* base, chat, math */
} world;

static size_t count_of(int t) { return (size_t)(shapes[t][0] * (shapes[t][1] ? shapes[t][1] : 1)); }

static fixture_tensor tensor_of(const world *w, int who, int t) {
    fixture_tensor f = {names[t], OBM_BF16, t == T_NORM ? 1 : 2, {shapes[t][0], shapes[t][1]}, w->values[who][t], NULL};
    return f;
}

/* The base is tied.  chat: o_proj equals the base's, two extra vocabulary rows.  math: f32, a head of its own. */
static void write_models(world *w) {
    fixture_tensor t[N_ALL];
    for (int i = 0; i < N_BASE; i++) t[i] = tensor_of(w, 0, i);
    w->base = fixture_model(w->ctx, w->dir, "base", t, N_BASE);
    for (int i = 0; i < N_BASE; i++) t[i] = tensor_of(w, 1, i);
    t[T_EMBED].shape[0] += 2;
    w->chat = fixture_model(w->ctx, w->dir, "chat", t, N_BASE);
    for (int i = 0; i < N_ALL; i++) {
        t[i] = tensor_of(w, 2, i);
        t[i].dtype = OBM_F32;
    }
    w->math = fixture_model(w->ctx, w->dir, "math", t, N_ALL);
}

static int setup_threads(void **state, int threads) {
    world *w = calloc(1, sizeof *w);
    w->ctx = fixture_context(threads);
    w->dir = fixture_folder();
    for (int who = 0; who < 3; who++) {
        for (int t = 0; t < N_ALL; t++)
            w->values[who][t] = fixture_values(count_of(t) + 140, (uint64_t)(1 + who * N_ALL + t));
    }
    memcpy(w->values[1][T_O], w->values[0][T_O], count_of(T_O) * sizeof(float));
    write_models(w);
    w->pack = obm__path_join(w->dir, "my.pack");
    *state = w;
    return 0;
}

static int setup(void **state) { return setup_threads(state, 2); }

/* For tests that fork: ASan's allocator does not survive a fork while another thread is inside it (glibc's does). */
static int setup_one_thread(void **state) { return setup_threads(state, 1); }

static int teardown(void **state) {
    world *w = *state;
    fixture_remove(w->dir);
    for (int who = 0; who < 3; who++) {
        for (int t = 0; t < N_ALL; t++) obm_free(w->values[who][t]);
    }
    obm_context_free(w->ctx);
    obm_free(w->dir);
    obm_free(w->base);
    obm_free(w->chat);
    obm_free(w->math);
    obm_free(w->pack);
    free(w);
    return 0;
}

static void two_experts(const world *w, obm_expert e[2]) {
    e[0] = e[1] = OBM_INIT(obm_expert);
    e[0].name = "chat";
    e[0].path = w->chat;
    e[1].name = "math";
    e[1].path = w->math;
    e[1].policy = "attention";
    e[1].scale = "group:64";
    e[1].planes = 2;
}

static obm_pack *compress(const world *w) {
    obm_expert e[2];
    obm_pack *p = NULL;
    two_experts(w, e);
    OK(obm_compress(w->ctx, w->base, e, 2, NULL, w->pack, NULL, &p, err));
    return p;
}

static float bf16(const world *w, float x) {
    uint16_t bits;
    w->ctx->k->f32_to_bf16(&bits, &x, 1);
    w->ctx->k->bf16_to_f32(&x, &bits, 1);
    return x;
}

/* ---- contents ---- */

/* Plain planes with one scale per group of `group` columns; few enough columns for one block, so alpha is one lane sum.
 */
static void plain_planes(const world *w, int who, int t, int64_t group, int planes, float *out) {
    int64_t rows = shapes[t][0], cols = shapes[t][1];
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t g = 0; g < cols; g += group) {
            int64_t n = cols - g < group ? cols - g : group;
            float d[256];
            for (int64_t i = 0; i < n; i++) {
                float e = w->values[who][t][r * cols + g + i];
                d[i] = (who == 1 ? bf16(w, e) : e) - bf16(w, w->values[0][t][r * cols + g + i]);
                out[r * cols + g + i] = 0;
            }
            for (int p = 0; p < planes; p++) {
                double lanes[16] = {0};
                for (int64_t i = 0; i < n; i++) lanes[i % 16] += fabs((double)d[i]);
                for (int step = 8; step > 0; step /= 2) {
                    for (int j = 0; j < step; j++) lanes[j] += lanes[j + step];
                }
                float alpha = (float)(lanes[0] / (double)n);
                for (int64_t i = 0; i < n; i++) {
                    float s = d[i] >= 0 ? alpha : -alpha;
                    out[r * cols + g + i] += s;
                    d[i] -= s;
                }
            }
        }
    }
}

static const obm__pack_entry *entry(const obm_pack *p, size_t task, const char *name) {
    return &p->experts[task].entries[obm__pack_find(p, name)];
}

static void check_planes(const world *w, const obm_pack *p, size_t task, int t, int64_t group, int planes) {
    const obm__pack_entry *e = entry(p, task, names[t]);
    int64_t cols = shapes[t][1];
    float *want = obm__alloc(count_of(t), sizeof *want), have[256];
    assert_int_equal(e->mode, OBM_MODE_1BIT);
    assert_int_equal(e->planes.n, planes);
    plain_planes(w, (int)task + 1, t, group, planes, want);
    for (int64_t r = 0; r < shapes[t][0]; r++) {
        obm__planes_read_row(w->ctx->k, &e->planes, r, 0, cols, have);
        assert_memory_equal(have, want + r * cols, (size_t)cols * sizeof *have);
        assert_int_equal(e->planes.signs[0][(r + 1) * e->planes.row_bytes - 1], 0); /* the padding */
    }
    obm_free(want);
}

static void check_full(const obm_pack *p, size_t task, const char *name, const char *expert_path) {
    obm_checkpoint *c;
    obm_tensor want;
    OK(obm_checkpoint_open(p->ctx, expert_path, &c, err));
    OK(obm_checkpoint_get(c, name, &want, err));
    const obm__pack_entry *e = entry(p, task, name);
    assert_int_equal(e->mode, OBM_MODE_FULL);
    assert_int_equal(e->full.dtype, want.dtype);
    assert_int_equal(e->full.shape[0], want.shape[0]);
    assert_memory_equal(e->full.data, want.data, obm__tensor_bytes(&want));
    obm_checkpoint_free(c);
}

static void check_contents(const world *w, const obm_pack *p) {
    assert_int_equal(obm_pack_task_count(p), 2);
    assert_string_equal(obm_pack_task_name(p, 0), "chat");
    assert_string_equal(obm_pack_policy(p, 0), "linear, scale row, planes 1");
    assert_string_equal(obm_pack_policy(p, 1), "attention, scale group:64, planes 2");
    assert_int_equal(obm_pack_tensor_count(p), N_ALL);
    check_planes(w, p, 0, T_Q, 70, 1);
    check_planes(w, p, 0, T_UP, 70, 1);
    check_planes(w, p, 0, T_DOWN, 90, 1);
    check_planes(w, p, 1, T_Q, 64, 2);
    check_planes(w, p, 1, T_O, 64, 2);
    assert_int_equal(entry(p, 0, O)->mode, OBM_MODE_SAME);
    assert_int_equal(entry(p, 0, O)->bytes_pack, 0);
    check_full(p, 0, EMBED, w->chat);
    check_full(p, 0, NORM, w->chat);
    check_full(p, 1, UP, w->math);
    check_full(p, 1, HEAD, w->math);
    assert_int_equal(entry(p, 0, EMBED)->full.shape[0], 12);
}

static void test_contents(void **state) {
    world *w = *state;
    obm_pack *p = compress(w), *again = NULL;
    check_contents(w, p);
    obm_pack_free(p);
    OK(obm_pack_open(w->ctx, w->pack, NULL, &again, err));
    check_contents(w, again);
    OK(obm_pack_verify(again, NULL, NULL, err));
    obm_pack_free(again);
}

static void test_tied_base(void **state) {
    world *w = *state;
    obm_pack *p = compress(w);
    size_t head = obm__pack_find(p, HEAD), embedding = obm__pack_find(p, EMBED);
    assert_false(p->tensors[head].in_base);
    assert_true(p->tensors[embedding].in_base);
    assert_ptr_equal(p->tensors[head].base.data, p->tensors[embedding].base.data);
    /* chat is tied: under it the head is its embedding, at no cost */
    assert_int_equal(p->experts[0].entries[head].mode, OBM_MODE_FULL);
    assert_ptr_equal(p->experts[0].entries[head].full.data, p->experts[0].entries[embedding].full.data);
    assert_int_equal(p->experts[0].entries[head].bytes_pack, 0);
    obm_pack_free(p);
}

static void test_accounting(void **state) {
    world *w = *state;
    obm_pack *p = compress(w);
    obm_class_bytes b[OBM_CLASS_COUNT];
    obm_pack_tensor t;
    uint64_t stored = 0;
    obm_pack_bytes(p, 0, b);
    assert_int_equal(b[OBM_CLASS_ATTENTION].tensors, 2);
    assert_int_equal(b[OBM_CLASS_ATTENTION].params, 2 * 4900);
    assert_int_equal(b[OBM_CLASS_ATTENTION].bytes_expert, 2 * 2 * 4900);
    assert_int_equal(b[OBM_CLASS_ATTENTION].bytes_pack, 70 * 16 + 70 * 4);
    assert_int_equal(b[OBM_CLASS_MLP].bytes_pack, 90 * 16 + 90 * 4 + 70 * 16 + 70 * 4);
    assert_int_equal(b[OBM_CLASS_EMBEDDING].bytes_pack, 12 * 70 * 2);
    assert_int_equal(b[OBM_CLASS_HEAD].tensors, 0);
    obm_pack_bytes(p, 1, b);
    assert_int_equal(b[OBM_CLASS_ATTENTION].bytes_pack, 2 * 2 * (70 * 16 + 70 * 2 * 4));
    assert_int_equal(b[OBM_CLASS_HEAD].bytes_pack, 4 * 700);
    for (int c = 0; c < OBM_CLASS_COUNT; c++) stored += b[c].bytes_pack;
    const obm__safetensors *f = p->experts[1].file;
    for (size_t i = 0; i < f->count; i++) stored -= obm__tensor_bytes(&f->entries[i].t);
    assert_int_equal(stored, 0);
    assert_int_equal(obm_pack_base_bytes(p), 2 * (700 + 2 * 4900 + 2 * 6300 + 70));
    obm_pack_tensor_at(p, 1, obm__pack_find(p, Q), &t);
    assert_string_equal(t.name, Q);
    assert_int_equal(t.planes, 2);
    assert_int_equal(t.n_scales, 140);
    assert_int_equal(t.row_bytes, 16);
    assert_non_null(t.signs[1]);
    obm_pack_free(p);
}

/* ---- threads ---- */

static char *file_text(const char *dir, const char *name, size_t *n) {
    char *path = obm__path_join(dir, name), *text;
    OK(obm__file_read(path, &text, n, err));
    obm_free(path);
    return text;
}

static int compare_text(const void *a, const void *b) { return strcmp(a, b); }

static size_t list(const char *dir, char files[16][128]) {
    size_t n = 0;
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d));) {
        if (e->d_name[0] == '.') continue;
        assert_true(n < 16 && strlen(e->d_name) < 128);
        strcpy(files[n++], e->d_name);
    }
    closedir(d);
    qsort(files, n, 128, compare_text);
    return n;
}

static void same_folders(const char *a, const char *b) {
    char fa[16][128], fb[16][128];
    size_t n = list(a, fa);
    assert_int_equal(n, list(b, fb));
    for (size_t i = 0; i < n; i++) {
        size_t na, nb;
        assert_string_equal(fa[i], fb[i]);
        char *ta = file_text(a, fa[i], &na), *tb = file_text(b, fb[i], &nb);
        assert_int_equal(na, nb);
        assert_memory_equal(ta, tb, na);
        obm_free(ta);
        obm_free(tb);
    }
}

static void test_threads(void **state) {
    world *w = *state;
    obm_expert e[2];
    two_experts(w, e);
    obm_pack_free(compress(w));
    for (int threads = 1; threads <= 5; threads += 4) {
        obm_context *ctx = fixture_context(threads);
        char *other = obm__format("%s/threads-%d", w->dir, threads);
        OK(obm_compress(ctx, w->base, e, 2, NULL, other, NULL, NULL, err));
        same_folders(w->pack, other);
        obm_free(other);
        obm_context_free(ctx);
    }
}

/* ---- options of compress ---- */

static void test_exists_and_overwrite(void **state) {
    world *w = *state;
    obm_expert e[2];
    char files[16][128];
    obm_compress_options o = OBM_INIT(obm_compress_options);
    obm_pack *p = NULL;
    two_experts(w, e);
    obm_pack_free(compress(w));
    FAILS(obm_compress(w->ctx, w->base, e, 2, NULL, w->pack, NULL, &p, err), OBM_E_EXISTS, "my.pack exists");
    o.overwrite = true;
    OK(obm_compress(w->ctx, w->base, e, 1, &o, w->pack, NULL, &p, err));
    assert_int_equal(obm_pack_task_count(p), 1);
    assert_int_equal(list(w->pack, files), 2);
    obm_pack_free(p);
    FAILS(obm_compress(w->ctx, w->base, e, 1, NULL, w->base, NULL, NULL, err), OBM_E_OCCUPIED, "base exists");
}

static void keeps(const world *w, const char *out, const char *file, const char *part) {
    obm_expert e[2];
    obm_compress_options o = OBM_INIT(obm_compress_options);
    char before[16][128], after[16][128];
    two_experts(w, e);
    o.overwrite = true;
    size_t n = list(out, before);
    FAILS(obm_compress(w->ctx, w->base, e, 2, &o, out, NULL, NULL, err), OBM_E_OCCUPIED, part);
    assert_int_equal(list(out, after), n);
    for (size_t i = 0; i < n; i++) assert_string_equal(after[i], before[i]);
    char *path = obm__path_join(out, file);
    assert_true(obm__file_exists(path));
    obm_free(path);
}

/* Overwriting replaces packs, never what merely lies where the pack should go. */
static void test_overwrite_replaces_packs_only(void **state) {
    world *w = *state;
    char *other = obm__path_join(w->dir, "other"), *note = obm__path_join(other, "note.txt"),
         *manifest = obm__path_join(w->base, "pack.json"), *foreign = obm__path_join(other, "pack.json");
    OK(obm__make_directory(other, err));
    OK(obm__file_write(note, "x", 1, err));
    keeps(w, other, "note.txt", "other exists and is not a pack: it will not be replaced");
    OK(obm__file_write(foreign, "{\"name\": \"left-pad\"}", 20, err));
    keeps(w, other, "pack.json", "other exists and is not a pack");
    keeps(w, w->base, "model.safetensors", "base exists and is not a pack");
    keeps(w, w->math, "model.safetensors", "math exists and is not a pack");
    OK(obm__file_write(manifest, "{}", 2, err));
    keeps(w, w->base, "model.safetensors", "is the folder of the base itself");
    obm_free(other);
    obm_free(note);
    obm_free(manifest);
    obm_free(foreign);
}

static void test_dry_run(void **state) {
    world *w = *state;
    obm_expert e[2];
    obm_compress_options o = OBM_INIT(obm_compress_options);
    obm_plan plan = {0}, real = {0};
    obm_pack *p = NULL;
    two_experts(w, e);
    o.dry_run = true;
    OK(obm_compress(w->ctx, w->base, e, 2, &o, w->pack, &plan, &p, err));
    assert_null(p);
    assert_false(obm__is_directory(w->pack));
    assert_int_equal(plan.tensors, N_BASE + N_ALL);
    assert_true(plan.bytes_written > 0 && plan.bytes_read > plan.bytes_written && plan.peak_memory > 0);
    OK(obm_compress(w->ctx, w->base, e, 2, NULL, w->pack, &real, NULL, err));
    assert_int_equal(real.bytes_read, plan.bytes_read);
}

static int stop_at(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)what;
    assert_true(done <= total);
    return (*(int *)user)-- == 0;
}

static void test_stopping_leaves_nothing(void **state) {
    world *w = *state;
    obm_expert e[2];
    obm_compress_options o = OBM_INIT(obm_compress_options);
    two_experts(w, e);
    o.progress = stop_at;
    int stops = 0, before;
    for (before = 0; before < 200; before++) {
        int left = before;
        obm_error err;
        o.progress_user = &left;
        obm_status s = obm_compress(w->ctx, w->base, e, 2, &o, w->pack, NULL, NULL, &err);
        if (s == OBM_OK) break;
        assert_int_equal(s, OBM_E_USER);
        assert_false(obm__is_directory(w->pack));
        stops++;
    }
    assert_true(stops > 5 && before < 200);
}

static void refuse(const world *w, const obm_expert *e, size_t n, obm_status status, const char *part) {
    FAILS(obm_compress(w->ctx, w->base, e, n, NULL, w->pack, NULL, NULL, err), status, part);
    assert_false(obm__is_directory(w->pack));
}

static void test_refusals(void **state) {
    world *w = *state;
    obm_expert e[2];
    two_experts(w, e);
    e[1].name = "chat";
    refuse(w, e, 2, OBM_E_ARG, "two experts are named chat");
    e[1].name = "a b";
    refuse(w, e, 2, OBM_E_ARG, "task name \"a b\"");
    e[1].name = "base";
    refuse(w, e, 2, OBM_E_ARG, "reserved");
    e[1].name = "law";
    e[1].policy = "paper";
    refuse(w, e, 2, OBM_E_ARG, "chat, math and code only");
    refuse(w, e, 0, OBM_E_ARG, "0 experts");
    e[1].policy = NULL;
    e[1].path = "/nowhere/at/all";
    refuse(w, e, 2, OBM_E_IO, "/nowhere/at/all");
    const obm_map_rule norms = {"*norm*", OBM_MODE_1BIT};
    e[0].map = &norms;
    e[0].n_map = 1;
    refuse(w, e, 1, OBM_E_ARG, NORM);
    fixture_tensor t[N_BASE];
    for (int i = 0; i < N_BASE; i++) t[i] = tensor_of(w, 1, i);
    w->values[1][T_NORM][5] = NAN;
    char *path = fixture_model(w->ctx, w->dir, "nan", t, N_BASE);
    two_experts(w, e);
    e[0].path = path;
    refuse(w, e, 1, OBM_E_VALUE, "tensor " NORM ": NaN or Inf in expert - base at index 5");
    obm_free(path);
}

/* Planes that turn out empty are found only while writing; the file must come out without them. */
static void test_planes_that_vanish(void **state) {
    world *w = *state;
    fixture_tensor t[N_BASE];
    obm_expert e[1] = {OBM_INIT(obm_expert)};
    obm_pack *p;
    for (size_t i = 0; i < count_of(T_Q); i++) w->values[1][T_Q][i] = bf16(w, w->values[0][T_Q][i] < 0 ? -1.0f : 1.0f);
    for (size_t i = 0; i < count_of(T_Q); i++) w->values[0][T_Q][i] = 0;
    for (size_t i = 0; i < count_of(T_UP); i++) { /* -0 is another value than 0, but there is no difference */
        w->values[0][T_UP][i] = 0;
        w->values[1][T_UP][i] = -0.0f;
    }
    for (size_t i = 0; i < count_of(T_O); i++)
        w->values[1][T_O][i] = w->values[0][T_O][i] = bf16(w, w->values[0][T_O][i]);
    for (int i = 0; i < N_BASE; i++) t[i] = tensor_of(w, 0, i);
    char *base = fixture_model(w->ctx, w->dir, "zero", t, N_BASE);
    for (int i = 0; i < N_BASE; i++) t[i] = tensor_of(w, 1, i);
    t[T_O].dtype = OBM_F32; /* as trainers store what they left alone */
    char *expert = fixture_model(w->ctx, w->dir, "signs", t, N_BASE);
    e[0].name = "x";
    e[0].path = expert;
    e[0].planes = 3;
    OK(obm_compress(w->ctx, base, e, 1, NULL, w->pack, NULL, &p, err));
    assert_int_equal(entry(p, 0, Q)->planes.n, 1);
    assert_true(entry(p, 0, Q)->planes.alphas[0][3] == 1.0f);
    assert_int_equal(entry(p, 0, UP)->mode, OBM_MODE_1BIT);
    assert_int_equal(entry(p, 0, UP)->planes.n, 0);
    assert_int_equal(entry(p, 0, UP)->bytes_pack, 0);
    assert_int_equal(entry(p, 0, DOWN)->planes.n, 3);
    assert_int_equal(entry(p, 0, O)->mode, OBM_MODE_SAME);
    OK(obm_pack_verify(p, NULL, NULL, err));
    obm_pack_free(p);
    obm_free(base);
    obm_free(expert);
}

/* One expert with a dropped matrix, 1-bit embeddings and two extra rows. */
static obm_pack *compress_mapped(const world *w) {
    const obm_map_rule map[] = {{"*q_proj*", OBM_MODE_DROP}, {"*embed*", OBM_MODE_1BIT}};
    obm_expert e = OBM_INIT(obm_expert);
    obm_pack *p;
    e.name = "chat";
    e.path = w->chat;
    e.map = map;
    e.n_map = 2;
    OK(obm_compress(w->ctx, w->base, &e, 1, NULL, w->pack, NULL, &p, err));
    return p;
}

static void test_map_drop_and_extra_rows(void **state) {
    world *w = *state;
    obm_pack *p = compress_mapped(w);
    assert_int_equal(entry(p, 0, Q)->mode, OBM_MODE_DROP);
    check_planes(w, p, 0, T_EMBED, 70, 1);
    const obm_tensor *extra = &entry(p, 0, EMBED)->extra;
    assert_int_equal(extra->shape[0], 2);
    for (int i = 0; i < 140; i++) {
        float x;
        obm__widen(w->ctx->k, extra, i, 1, &x);
        assert_true(x == bf16(w, w->values[1][T_EMBED][700 + i]));
    }
    assert_int_equal(p->n_tensors, N_BASE);
    obm_pack_free(p);
}

/* As a checkpoint, PACK:task: a dropped matrix is the base's, a 1-bit one f32(base + d~), with the expert's rows behind
 * it. */
static void test_member(void **state) {
    world *w = *state;
    obm_checkpoint *base, *member;
    obm_task_vector *v;
    obm_pack *p = compress_mapped(w);
    char *ref = obm__format("%s:chat", w->pack);
    OK(obm_checkpoint_open(w->ctx, w->base, &base, err));
    OK(obm_checkpoint_open(w->ctx, ref, &member, err));
    OK(obm_task_vector_new(base, member, &v, err));
    assert_int_equal(v->count, N_BASE);
    float got[90 * 70], want[90 * 70], d[90 * 70], scratch[90 * 70];
    for (int t = 0; t < N_BASE; t++) {
        const obm__pair *pair = obm__task_vector_find(v, names[t], NULL);
        const obm__planes *planes = &entry(p, 0, names[t])->planes;
        int64_t n = (int64_t)count_of(t), cols = shapes[t][1], extra = t == T_EMBED ? 140 : 0;
        for (int64_t i = 0; i < n + extra; i++) {
            bool own = i >= n || entry(p, 0, names[t])->mode == OBM_MODE_FULL;
            want[i] = bf16(w, w->values[own ? 1 : 0][t][i]);
            d[i] = t == T_NORM && i < n ? want[i] - bf16(w, w->values[0][t][i]) : 0;
            if (own || !planes->n) continue;
            float alpha = planes->alphas[0][i / cols];
            d[i] = planes->signs[0][i / cols * planes->row_bytes + i % cols / 8] >> (i % cols % 8) & 1 ? alpha : -alpha;
            want[i] += d[i];
        }
        obm__pair_values(w->ctx->k, pair, 0, n + extra, got, scratch);
        assert_memory_equal(got, want, (size_t)(n + extra) * sizeof *got);
        obm__pair_values(w->ctx->k, pair, n - 3, 3 + extra, got, scratch); /* across the border */
        assert_memory_equal(got, want + n - 3, (size_t)(3 + extra) * sizeof *got);
        obm__pair_read(w->ctx->k, pair, 1, n - 1, got, scratch);
        assert_memory_equal(got, d + 1, (size_t)(n - 1) * sizeof *got);
        obm__pair_release(pair, 0, n + extra);
    }
    obm_task_vector_free(v);
    obm_checkpoint_free(member);
    obm_checkpoint_free(base);
    obm_pack_free(p);
    obm_free(ref);
    FAILS(obm_checkpoint_open(w->ctx, w->pack, &member, err), OBM_E_ARG, "my.pack:chat (it has chat)");
}

static void keep_warning(void *user, const char *message) {
    strncat(user, message, 1000);
    strncat(user, "\n", 2);
}

/* Matrices whose names no class knows: policies leave them alone and say so, map rules decide. */
static void test_unknown_matrices_stay_full(void **state) {
    world *w = *state;
    char heard[4096] = "";
    static const char *const unknown[3] = {"model.layers.0.mlp.gate.weight", "model.layers.1.mixer.in_proj.weight", UP};
    fixture_tensor base[3], chat[3];
    for (int i = 0; i < 3; i++) {
        base[i] = tensor_of(w, 0, T_UP);
        chat[i] = tensor_of(w, 1, T_UP);
        base[i].name = chat[i].name = unknown[i];
    }
    w->ctx->log = keep_warning;
    w->ctx->log_user = heard;
    char *base_path = fixture_model(w->ctx, w->dir, "odd", base, 3),
         *path = fixture_model(w->ctx, w->dir, "odd-chat", chat, 3);
    obm_expert e = OBM_INIT(obm_expert);
    obm_pack *p;
    e.name = "chat";
    e.path = path;
    OK(obm_compress(w->ctx, base_path, &e, 1, NULL, w->pack, NULL, &p, err));
    assert_int_equal(entry(p, 0, unknown[0])->mode, OBM_MODE_FULL);
    assert_int_equal(entry(p, 0, unknown[1])->mode, OBM_MODE_FULL);
    assert_int_equal(entry(p, 0, UP)->mode, OBM_MODE_1BIT);
    obm_class_bytes bytes[OBM_CLASS_COUNT];
    obm_pack_bytes(p, 0, bytes);
    assert_int_equal(bytes[OBM_CLASS_OTHER].tensors, 2);
    assert_int_equal(bytes[OBM_CLASS_OTHER].bytes_pack, bytes[OBM_CLASS_OTHER].bytes_expert);
    obm_pack_free(p);
    assert_string_equal(
        heard, "expert chat: 2 matrices of no known module class stay full (model.layers.0.mlp.gate.weight); a map "
               "rule can decide otherwise\n");
    heard[0] = 0;
    const obm_map_rule map[] = {{"*in_proj*", OBM_MODE_1BIT}};
    obm_compress_options o = OBM_INIT(obm_compress_options);
    o.overwrite = true;
    e.map = map;
    e.n_map = 1;
    OK(obm_compress(w->ctx, base_path, &e, 1, &o, w->pack, NULL, &p, err));
    assert_int_equal(entry(p, 0, unknown[1])->mode, OBM_MODE_1BIT);
    obm_pack_free(p);
    assert_non_null(strstr(heard, "1 matrix of no known module class stays full"));
    heard[0] = 0;
    e.policy = "full";
    OK(obm_compress(w->ctx, base_path, &e, 1, &o, w->pack, NULL, &p, err));
    obm_pack_free(p);
    assert_string_equal(heard, "");
    obm_free(base_path);
    obm_free(path);
}

/* ---- memory ---- */

static size_t mapped_now(void) {
    char line[256];
    size_t kb = 0;
    FILE *f = fopen("/proc/self/status", "r");
    assert_non_null(f);
    while (fgets(line, sizeof line, f)) sscanf(line, "RssFile: %zu", &kb);
    fclose(f);
    return kb * 1024;
}

static int watch_memory(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)what;
    (void)done;
    (void)total;
    size_t now = mapped_now(), *most = user;
    if (now > *most) *most = now;
    return 0;
}

/* Base and expert are read into buffers; what is mapped is looked at one tensor after the other, in the first page (are
 * both the same?) and at the samples of one that is longer than a chunk, and is then let go: pages that a fault maps
 * along, up to 2 MiB where the kernel keeps files in huge pages, in either file, on two threads; as much again for code
 * that runs for the first time. */
#define RESIDENT (2 * 2 * 2 * 2 * ((size_t)1 << 20))

/* 4 matrices of 16 MiB on either side; what stays resident is a window of them. */
static void test_resident_memory_is_bounded(void **state) {
    world *w = *state;
    const int64_t side = 2896;
    float *base = fixture_values((size_t)(side * side), 3), *expert = fixture_values((size_t)(side * side), 4);
    static const char *const many[] = {EMBED, Q, UP, DOWN};
    fixture_tensor tb[4], te[4];
    obm_expert e[1] = {OBM_INIT(obm_expert)};
    obm_compress_options o = OBM_INIT(obm_compress_options);
    size_t before, most = 0;
    for (int i = 0; i < 4; i++) {
        tb[i] = (fixture_tensor){many[i], OBM_BF16, 2, {side, side}, base, NULL};
        te[i] = (fixture_tensor){many[i], OBM_BF16, 2, {side, side}, expert, NULL};
    }
    char *b = fixture_model(w->ctx, w->dir, "wide", tb, 4), *x = fixture_model(w->ctx, w->dir, "wide-x", te, 4);
    e[0].name = "x";
    e[0].path = x;
    o.progress = watch_memory;
    o.progress_user = &most;
    before = mapped_now();
    OK(obm_compress(w->ctx, b, e, 1, &o, w->pack, NULL, NULL, err));
    assert_true(most > 0);
    if (most > before + RESIDENT) fail_msg("%zu bytes of 134 MB stay mapped", most - before);
    obm_free(base);
    obm_free(expert);
    obm_free(b);
    obm_free(x);
}

/* ---- the router's file ---- */

static obm_json *router_report(void) {
    static const char text[] =
        "{\"layer\": 0, \"tasks\": [\"chat\", \"math\"], \"n_train\": 4, \"n_held_out\": 2, \"accuracy\": 1.0,"
        " \"calibration_error\": 0.0, \"confusion\": [[1, 0], [0, 1]]}";
    obm_json *v = NULL;
    OK(obm__json_parse(text, strlen(text), "report", &v, err));
    return v;
}

static void test_router_file(void **state) {
    world *w = *state;
    const float four[] = {1, 2, 3, 4};
    const obm__named_array arrays[] = {
        {"mean", four, 1, {2, 0}}, {"scale", four, 1, {2, 0}}, {"weight", four, 2, {2, 2}}, {"bias", four, 1, {2, 0}}};
    obm_pack *p = compress(w);
    obm__safetensors *file = NULL;
    char files[16][128];
    obm_expert e[2];
    obm_compress_options o = OBM_INIT(obm_compress_options);
    OK(obm__pack_read_router(p, &file, err));
    assert_null(file);
    OK(obm__pack_write_router(p, arrays, 4, router_report(), err));
    OK(obm__pack_write_router(p, arrays, 4, router_report(), err)); /* the same contents again: the same file */
    assert_int_equal(list(w->pack, files), 4);
    OK(obm_pack_verify(p, NULL, NULL, err));
    obm_pack_free(p);
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    OK(obm__pack_read_router(p, &file, err));
    const obm__st_entry *weight = obm__safetensors_find(file, "weight");
    assert_non_null(weight);
    assert_memory_equal(weight->t.data, four, sizeof four);
    obm__safetensors_free(file);
    assert_non_null(p->router);
    two_experts(w, e);
    e[0].policy = "mlp";
    o.overwrite = true;
    OK(obm_pack_add(p, &e[0], &o, err)); /* the tasks stay, so does the router */
    assert_non_null(p->router);
    OK(obm_pack_remove(p, "math", err));
    assert_null(p->router);
    assert_int_equal(list(w->pack, files), 2);
    obm_pack_free(p);
}

/* ---- settings ---- */

static void test_settings(void **state) {
    world *w = *state;
    obm_pack *p = compress(w);
    obm_pack_settings s = OBM_INIT(obm_pack_settings), back = s;
    obm_pack_get_settings(p, &s);
    assert_true(s.lambda == 0.3 && s.density == 1 && s.profile == OBM_PROFILE_MERGEKIT &&
                s.reading == OBM_READING_ONTO_BASE);
    s.lambda = 0.125;
    s.reading = OBM_READING_RECOMPUTED;
    s.profile = OBM_PROFILE_PAPER;
    s.density = 0.5;
    OK(obm_pack_set_settings(p, &s, err));
    s.lambda = -1;
    FAILS(obm_pack_set_settings(p, &s, err), OBM_E_ARG, "lambda is -1");
    s.lambda = NAN;
    FAILS(obm_pack_set_settings(p, &s, err), OBM_E_ARG, "lambda");
    s.lambda = 1;
    s.density = 0;
    FAILS(obm_pack_set_settings(p, &s, err), OBM_E_ARG, "density is 0");
    obm_pack_free(p);
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    obm_pack_get_settings(p, &back);
    assert_true(back.lambda == 0.125 && back.density == 0.5 && back.profile == OBM_PROFILE_PAPER &&
                back.reading == OBM_READING_RECOMPUTED);
    obm_pack_free(p);
    obm_compress_options o = OBM_INIT(obm_compress_options);
    obm_expert e[2];
    two_experts(w, e);
    o.overwrite = true;
    o.profile = OBM_PROFILE_PAPER;
    OK(obm_compress(w->ctx, w->base, e, 2, &o, w->pack, NULL, &p, err));
    obm_pack_get_settings(p, &back);
    assert_true(back.lambda == 1 && back.density == 0.2 && back.profile == OBM_PROFILE_PAPER);
    assert_string_equal(obm_pack_policy(p, 0), "paper, scale matrix, planes 1");
    obm_pack_free(p);
}

/* ---- adding and removing ---- */

static void test_add_and_remove(void **state) {
    world *w = *state;
    obm_expert e[2];
    obm_pack *p = NULL;
    char files[16][128];
    two_experts(w, e);
    OK(obm_compress(w->ctx, w->base, e, 1, NULL, w->pack, NULL, &p, err));
    static const char *const strays[] = {"chat.obm-partial.tmp-12-0", "pack.json.tmp-999999999-7"};
    static const char *const theirs[] = {"note.txt",           "old-0123456789abcdef.safetensors",
                                         "pack.json.tmp-12",   "pack.json.tmp-12-0~",
                                         "my.obm-partial.txt", ".obm-partial.tmp-1-1"};
    char hash[33], stray[600], *path;
    obm__xxh3_of("x", 1, hash);
    snprintf(stray, sizeof stray, "%s/old-%.16s.safetensors", w->pack, hash);
    OK(obm__file_write(stray, "x", 1, err));
    for (size_t i = 0; i < 8; i++) {
        path = obm__path_join(w->pack, i < 2 ? strays[i] : theirs[i - 2]);
        OK(obm__file_write(path, "x", 1, err));
        obm_free(path);
    }
    OK(obm_pack_add(p, &e[1], NULL, err));
    assert_false(obm__file_exists(stray)); /* a killed run's left-over */
    for (size_t i = 0; i < 8; i++) {
        path = obm__path_join(w->pack, i < 2 ? strays[i] : theirs[i - 2]);
        assert_true(obm__file_exists(path) == (i >= 2)); /* somebody else's files */
        (void)remove(path);
        obm_free(path);
    }
    check_contents(w, p);
    FAILS(obm_pack_add(p, &e[1], NULL, err), OBM_E_EXISTS, "math already");
    obm_compress_options again = OBM_INIT(obm_compress_options);
    again.overwrite = true;
    OK(obm_pack_add(p, &e[1], &again, err));
    check_contents(w, p);
    e[0].name = "law";
    e[0].path = "/nowhere";
    FAILS(obm_pack_add(p, &e[0], NULL, err), OBM_E_IO, "/nowhere");
    check_contents(w, p);
    obm_pack_free(p);
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    check_contents(w, p);
    FAILS(obm_pack_remove(p, "law", err), OBM_E_NOTFOUND, "no expert law");
    OK(obm_pack_remove(p, "chat", err));
    assert_int_equal(obm_pack_task_count(p), 1);
    assert_string_equal(obm_pack_task_name(p, 0), "math");
    FAILS(obm_pack_remove(p, "math", err), OBM_E_ARG, "last");
    assert_int_equal(list(w->pack, files), 2);
    obm_pack_free(p);
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    assert_int_equal(obm_pack_task_count(p), 1);
    obm_pack_free(p);
}

static void test_replacing_an_expert(void **state) {
    world *w = *state;
    obm_pack *p = compress(w);
    obm_expert e[2];
    obm_compress_options o = OBM_INIT(obm_compress_options);
    char files[16][128];
    two_experts(w, e);
    e[0].policy = "mlp";
    o.overwrite = true;
    OK(obm_pack_add(p, &e[0], &o, err));
    assert_string_equal(obm_pack_task_name(p, 0), "chat");
    assert_string_equal(obm_pack_policy(p, 0), "mlp, scale row, planes 1");
    assert_int_equal(entry(p, 0, Q)->mode, OBM_MODE_FULL);
    assert_int_equal(list(w->pack, files), 3);
    obm_pack_free(p);
}

/* Stands before the system's: what cannot be linked is copied. */
static bool no_links;
int link(const char *from, const char *to) {
    if (!no_links) return linkat(AT_FDCWD, from, AT_FDCWD, to, 0);
    errno = EXDEV;
    return -1;
}

static void test_adopting(void **state) {
    world *w = *state;
    const float four[] = {1, 2, 3, 4};
    const obm__named_array arrays[] = {
        {"mean", four, 1, {2, 0}}, {"scale", four, 1, {2, 0}}, {"weight", four, 2, {2, 2}}, {"bias", four, 1, {2, 0}}};
    obm_pack *p = compress(w), *other = NULL;
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    obm_expert e[2];
    char files[16][128], *path = obm__path_join(w->dir, "other.pack"),
                         *swapped = obm__path_join(w->dir, "swapped.pack");
    OK(obm__pack_write_router(p, arrays, 4, router_report(), err));
    two_experts(w, e);
    e[0].policy = "mlp";
    OK(obm_compress(w->ctx, w->base, e, 2, NULL, path, NULL, &other, err));
    obm_pack_get_settings(other, &s);
    s.lambda = 0.125;
    OK(obm_pack_set_settings(other, &s, err));
    FAILS(obm_pack_adopt(p, NULL, err), OBM_E_ARG, "no pack to take the experts of");
    /* Somebody else's file under the name and of the length of one that is to come: it is not taken for that. */
    const char *coming =
        obm__json_string(obm__json_get(obm__json_at(obm__json_get(other->manifest, "experts"), 0), "file"));
    char *from = obm__path_join(path, coming), *to = obm__path_join(w->pack, coming), *text;
    size_t size;
    OK(obm__file_read(from, &text, &size, err));
    text[size - 1] = (char)~text[size - 1];
    OK(obm__file_write(to, text, size, err));
    obm_free(text);
    obm_free(from);
    obm_free(to);
    OK(obm_pack_adopt(p, path, err));
    for (int again = 0; again < 2; again++) { /* as it is now, and as it is on disk */
        assert_string_equal(obm_pack_policy(p, 0), "mlp, scale row, planes 1");
        assert_int_equal(entry(p, 0, Q)->mode, OBM_MODE_FULL);
        obm_pack_get_settings(p, &s);
        assert_true(s.lambda == 0.125);
        assert_non_null(p->router);
        assert_int_equal(list(w->pack, files), 4);
        OK(obm_pack_verify(p, NULL, NULL, err));
        obm_pack_free(p);
        OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    }
    OK(obm_pack_verify(other, NULL, NULL, err));
    obm_expert turned[2] = {e[1], e[0]};
    OK(obm_compress(w->ctx, w->base, turned, 2, NULL, swapped, NULL, NULL, err));
    FAILS(obm_pack_adopt(p, swapped, err), OBM_E_MISMATCH, "expected the tasks of pack");
    FAILS(obm_pack_adopt(p, w->dir, err), OBM_E_FORMAT, "has no pack.json");
    assert_int_equal(list(w->pack, files), 4);
    OK(obm_pack_verify(p, NULL, NULL, err));
    obm_pack_free(other);
    obm_pack_free(p);
    obm_free(path);
    obm_free(swapped);
}

static void test_adopting_copies(void **state) {
    no_links = true;
    test_adopting(state);
    no_links = false;
}

/* ---- several processes ---- */

#define RIVALS 4

/* Runs fn in RIVALS processes that start together; statuses[i] is what it returned.  A context of its own: threads do
 * not survive fork. */
static void race(const world *w, obm_status (*fn)(const world *, obm_context *, int), obm_status *statuses) {
    int gate[2];
    pid_t pids[RIVALS];
    assert_int_equal(pipe(gate), 0);
    for (int i = 0; i < RIVALS; i++) {
        pids[i] = fork();
        assert_true(pids[i] >= 0);
        if (pids[i]) continue;
        char c;
        obm_context *ctx = NULL;
        obm_context_options o = OBM_INIT(obm_context_options);
        o.threads = 1;
        close(gate[1]);
        obm_status s = obm_context_new(&o, &ctx, NULL);
        if (s == OBM_OK && read(gate[0], &c, 1) == 0) s = fn(w, ctx, i);
        _exit(-s);
    }
    close(gate[0]);
    close(gate[1]);
    for (int i = 0; i < RIVALS; i++) {
        int end;
        assert_int_equal(waitpid(pids[i], &end, 0), pids[i]);
        assert_true(WIFEXITED(end));
        statuses[i] = (obm_status)-WEXITSTATUS(end);
    }
}

static obm_status add_rival(const world *w, obm_context *ctx, int i) {
    char name[8];
    obm_expert e = OBM_INIT(obm_expert);
    obm_pack *p = NULL;
    snprintf(name, sizeof name, "n%d", i);
    e.name = name;
    e.path = w->math;
    obm_status s = obm_pack_open(ctx, w->pack, NULL, &p, NULL);
    if (s == OBM_OK) s = obm_pack_add(p, &e, NULL, NULL);
    obm_pack_free(p);
    return s;
}

/* The pack holds what was there and each expert whose adding succeeded, and no other file. */
static void test_parallel_adding(void **state) {
    world *w = *state;
    obm_status s[RIVALS];
    char files[16][128];
    for (int round = 0; round < 4; round++) {
        obm_pack *p = NULL;
        size_t added = 0;
        fixture_remove(w->pack);
        obm_pack_free(compress(w));
        race(w, add_rival, s);
        OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
        OK(obm_pack_verify(p, NULL, NULL, err));
        for (int i = 0; i < RIVALS; i++) {
            char name[8];
            size_t at = 0;
            snprintf(name, sizeof name, "n%d", i);
            while (at < obm_pack_task_count(p) && strcmp(obm_pack_task_name(p, at), name)) at++;
            assert_true(s[i] == OBM_OK || s[i] == OBM_E_BUSY);
            assert_int_equal(at < obm_pack_task_count(p), s[i] == OBM_OK);
            added += s[i] == OBM_OK;
        }
        assert_true(added >= 1);
        assert_int_equal(obm_pack_task_count(p), 2 + added);
        assert_int_equal(list(w->pack, files), 3 + added);
        obm_pack_free(p);
    }
}

static obm_status compress_rival(const world *w, obm_context *ctx, int i) {
    obm_expert e[2];
    two_experts(w, e);
    return obm_compress(ctx, w->base, e, (size_t)(1 + i % 2), NULL, w->pack, NULL, NULL, NULL);
}

static void test_parallel_creation(void **state) {
    world *w = *state;
    obm_status s[RIVALS];
    char files[16][128];
    for (int round = 0; round < 4; round++) {
        obm_pack *p = NULL;
        int made = 0;
        fixture_remove(w->pack);
        race(w, compress_rival, s);
        for (int i = 0; i < RIVALS; i++) {
            assert_true(s[i] == OBM_OK || s[i] == OBM_E_BUSY || s[i] == OBM_E_EXISTS);
            made += s[i] == OBM_OK;
        }
        assert_int_equal(made, 1);
        OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
        OK(obm_pack_verify(p, NULL, NULL, err));
        assert_int_equal(list(w->pack, files), 1 + obm_pack_task_count(p));
        obm_pack_free(p);
    }
}

/* Every kind of change is refused with this message, and changes nothing. */
static void nothing_changes(const world *w, obm_pack *p, const char *part) {
    const float four[] = {1, 2, 3, 4};
    const obm__named_array mean = {"mean", four, 1, {4, 0}};
    char before[16][128], after[16][128];
    obm_pack_settings settings = OBM_INIT(obm_pack_settings);
    obm_expert e[2];
    size_t n = list(w->pack, before), size, size_now;
    char *text = file_text(w->pack, "pack.json", &size);
    two_experts(w, e);
    e[0].name = "law";
    obm_pack_get_settings(p, &settings);
    settings.lambda += 0.25;
    FAILS(obm_pack_add(p, &e[0], NULL, err), OBM_E_BUSY, part);
    FAILS(obm_pack_remove(p, "chat", err), OBM_E_BUSY, part);
    FAILS(obm_pack_set_settings(p, &settings, err), OBM_E_BUSY, part);
    FAILS(obm__pack_write_router(p, &mean, 1, router_report(), err), OBM_E_BUSY, part);
    assert_int_equal(list(w->pack, after), n);
    for (size_t i = 0; i < n; i++) assert_string_equal(after[i], before[i]);
    char *now = file_text(w->pack, "pack.json", &size_now);
    assert_int_equal(size, size_now);
    assert_memory_equal(text, now, size);
    obm_free(text);
    obm_free(now);
}

static void test_locked(void **state) {
    world *w = *state;
    obm_pack *p = compress(w);
    obm_expert e[2];
    obm_compress_options o = OBM_INIT(obm_compress_options);
    int fd = open(w->pack, O_RDONLY | O_DIRECTORY);
    assert_int_equal(flock(fd, LOCK_EX | LOCK_NB), 0);
    nothing_changes(w, p, "my.pack is being changed by another process");
    two_experts(w, e);
    o.overwrite = true;
    FAILS(obm_compress(w->ctx, w->base, e, 1, &o, w->pack, NULL, NULL, err), OBM_E_BUSY, "is being changed");
    check_contents(w, p);
    close(fd);
    OK(obm_pack_remove(p, "chat", err));
    FAILS(obm_pack_remove(p, "math", err), OBM_E_ARG, "last"); /* failures give the lock back too */
    e[0].path = "/nowhere";
    FAILS(obm_pack_add(p, &e[0], NULL, err), OBM_E_IO, "/nowhere");
    int left = 2;
    two_experts(w, e);
    o.progress = stop_at;
    o.progress_user = &left;
    FAILS(obm_pack_add(p, &e[0], &o, err), OBM_E_USER, "");
    left = 2;
    FAILS(obm_compress(w->ctx, w->base, e, 1, &o, w->pack, NULL, NULL, err), OBM_E_USER, "");
    OK(obm_pack_add(p, &e[0], NULL, err));
    obm_pack_free(p);
}

static void test_changed_since_opened(void **state) {
    world *w = *state;
    obm_pack *p = compress(w), *q = NULL;
    OK(obm_pack_open(w->ctx, w->pack, NULL, &q, err));
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    obm_pack_get_settings(q, &s);
    s.lambda = 0.75;
    OK(obm_pack_set_settings(q, &s, err));
    nothing_changes(w, p, "my.pack was changed by another process since it was opened: open it again");
    OK(obm_pack_remove(q, "chat", err)); /* its own changes it knows */
    OK(obm_pack_set_settings(q, &s, err));
    obm_pack_free(p);
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    obm_pack_get_settings(p, &s);
    assert_true(s.lambda == 0.75);
    OK(obm_pack_set_settings(p, &s, err));
    obm_pack_free(p);
    obm_pack_free(q);
}

static int die(void *user, const char *what, uint64_t done, uint64_t total) {
    (void)what;
    (void)total;
    if (done > 0 && (*(int *)user)-- == 0) raise(SIGKILL);
    return 0;
}

/* A killed run leaves the pack as it was, unlocked, and the next change takes its stray files away. */
static void test_killed(void **state) {
    world *w = *state;
    obm_expert e[2];
    char files[16][128];
    two_experts(w, e);
    obm_pack *p = compress(w);
    pid_t pid = fork();
    if (!pid) {
        int left = 2;
        obm_pack *q = NULL;
        obm_compress_options o = OBM_INIT(obm_compress_options);
        o.progress = die;
        o.progress_user = &left;
        o.overwrite = true;
        e[0].policy = "mlp";
        if (obm_pack_open(fixture_context(1), w->pack, NULL, &q, NULL) == OBM_OK)
            (void)obm_pack_add(q, &e[0], &o, NULL);
        _exit(1);
    }
    int end;
    assert_int_equal(waitpid(pid, &end, 0), pid);
    assert_true(WIFSIGNALED(end));
    assert_int_equal(list(w->pack, files), 4);
    check_contents(w, p);
    e[1].name = "law";
    OK(obm_pack_add(p, &e[1], NULL, err));
    assert_int_equal(list(w->pack, files), 4);
    obm_pack_free(p);
}

/* ---- the base ---- */

static void move(const char *from, const char *to) { assert_int_equal(rename(from, to), 0); }

static void test_where_the_base_lies(void **state) {
    world *w = *state;
    obm_pack *p = compress(w);
    obm_pack_free(p);
    char *moved = obm__path_join(w->dir, "elsewhere"), *sub = obm__path_join(w->dir, "sub"),
         *pack = obm__path_join(sub, "p");
    OK(obm__make_directory(sub, err));
    move(w->pack, pack); /* the relative path leads nowhere now, the absolute one does */
    OK(obm_pack_open(w->ctx, pack, NULL, &p, err));
    obm_pack_free(p);
    move(pack, w->pack);
    move(w->base, moved);
    FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_IO, "give its place with base=");
    OK(obm_pack_open(w->ctx, w->pack, moved, &p, err));
    obm_pack_free(p);
    obm_free(moved);
    obm_free(sub);
    obm_free(pack);
}

static void wrong_base(world *w, const fixture_tensor *t, size_t n, const char *part) {
    char *path = fixture_model(w->ctx, w->dir, "wrong", t, n);
    obm_pack *p = NULL;
    FAILS(obm_pack_open(w->ctx, w->pack, path, &p, err), OBM_E_MISMATCH, part);
    assert_null(p);
    obm_free(path);
}

static void test_wrong_base(void **state) {
    world *w = *state;
    fixture_tensor t[N_ALL];
    obm_pack_free(compress(w));
    for (int i = 0; i < N_BASE; i++) t[i] = tensor_of(w, 0, i);
    wrong_base(w, t, N_BASE - 1, "tensor " NORM " is missing");
    t[T_UP].dtype = OBM_F32;
    wrong_base(w, t, N_BASE, "tensor " UP " has dtype F32, expected BF16");
    t[T_UP].dtype = OBM_BF16;
    t[T_DOWN].shape[0] = 90;
    t[T_DOWN].shape[1] = 70;
    wrong_base(w, t, N_BASE, "tensor " DOWN " has shape (90, 70), expected (70, 90)");
    t[T_DOWN] = tensor_of(w, 0, T_DOWN);
    t[T_O].values = w->values[2][T_O];
    t[T_Q].values = w->values[2][T_Q];
    wrong_base(w, t, N_BASE, "tensor " O " has other contents");
    t[T_O] = tensor_of(w, 0, T_O);
    t[T_Q] = tensor_of(w, 0, T_Q);
    t[T_HEAD] = tensor_of(w, 0, T_HEAD);
    wrong_base(w, t, N_ALL, "tensor " HEAD " is unknown to the pack");
}

/* A difference between the samples of a large tensor passes open and is caught by verify. */
static void test_verify_reads_everything(void **state) {
    world *w = *state;
    const int64_t rows = 600, cols = 600; /* 720 kB in bf16; 256 KiB are sampled */
    float *base = fixture_values((size_t)(rows * cols), 3), *expert = fixture_values((size_t)(rows * cols), 4);
    fixture_tensor tb = {UP, OBM_BF16, 2, {rows, cols}, base, NULL}, te = {UP, OBM_BF16, 2, {rows, cols}, expert, NULL};
    obm_expert e[1] = {OBM_INIT(obm_expert)};
    obm_pack *p = NULL;
    char *b = fixture_model(w->ctx, w->dir, "large", &tb, 1), *x = fixture_model(w->ctx, w->dir, "large-x", &te, 1);
    e[0].name = "x";
    e[0].path = x;
    OK(obm_compress(w->ctx, b, e, 1, NULL, w->pack, NULL, &p, err));
    OK(obm_pack_verify(p, NULL, NULL, err));
    obm_pack_free(p);
    base[3000] += 1; /* byte 6000: between the first block (0 to 4095) and the second (from 11363 on) */
    obm_free(b);
    b = fixture_model(w->ctx, w->dir, "large", &tb, 1);
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    FAILS(obm_pack_verify(p, NULL, NULL, err), OBM_E_MISMATCH, "tensor " UP " has other contents");
    obm_pack_free(p);
    base[100] += 1;
    obm_free(b);
    b = fixture_model(w->ctx, w->dir, "large", &tb, 1);
    FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_MISMATCH, "tensor " UP " has other contents");
    obm_free(base);
    obm_free(expert);
    obm_free(b);
    obm_free(x);
}

/* ---- damage ---- */

static void write_bytes(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

static void test_truncation(void **state) {
    world *w = *state;
    char files[16][128];
    obm_pack_free(compress(w));
    size_t n = list(w->pack, files);
    assert_int_equal(n, 3);
    for (size_t i = 0; i < n; i++) {
        size_t size;
        char *text = file_text(w->pack, files[i], &size), *path = obm__path_join(w->pack, files[i]);
        for (size_t k = 0; k < 90; k++) {
            obm_pack *p = NULL;
            obm_error err;
            write_bytes(path, text, k < 30 ? k : k < 60 ? size - 1 - (k - 30) : size * (k - 60) / 30);
            obm_status s = obm_pack_open(w->ctx, w->pack, NULL, &p, &err);
            if (s == OBM_OK) { /* pack.json ends in white space, which may go */
                assert_string_equal(files[i], "pack.json");
                assert_true(k >= 30 && k < 32);
                obm_pack_free(p);
            } else if (!strstr(err.message, w->pack)) {
                fail_msg("does not name the pack: %s", err.message);
            }
        }
        write_bytes(path, text, size);
        obm_free(text);
        obm_free(path);
    }
    obm_pack *p = NULL;
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    obm_pack_free(p);
}

static void test_flipped_byte_is_found_by_verify(void **state) {
    world *w = *state;
    char files[16][128];
    obm_pack *p = NULL;
    size_t size;
    obm_pack_free(compress(w));
    list(w->pack, files);
    char *text = file_text(w->pack, files[0], &size), *path = obm__path_join(w->pack, files[0]);
    text[size - 9] ^= 1;
    write_bytes(path, text, size);
    OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
    FAILS(obm_pack_verify(p, NULL, NULL, err), OBM_E_FORMAT, files[0]);
    obm_pack_free(p);
    obm_free(text);
    obm_free(path);
}

/* Writes pack.json with the first `from` replaced by `to`. */
static void edit(const world *w, const char *from, const char *to) {
    size_t size;
    char *text = file_text(w->pack, "pack.json", &size), *path = obm__path_join(w->pack, "pack.json");
    char *at = strstr(text, from);
    if (!at) fail_msg("pack.json has no %s", from);
    *at = 0;
    char *edited = obm__format("%s%s%s", text, to, at + strlen(from));
    write_bytes(path, edited, strlen(edited));
    obm_free(edited);
    obm_free(text);
    obm_free(path);
}

static void test_hostile_manifests(void **state) {
    world *w = *state;
    static const struct {
        const char *from, *to, *part;
        obm_status status;
    } edits[] = {
        {"\"version\": 1", "\"version\": 2", "\"shared\": expected an object", OBM_E_FORMAT},
        {"\"version\": 1", "\"version\": 3", "version 3", OBM_E_UNSUPPORTED},
        {"\"mode\": \"1bit\"", "\"mode\": \"mask\", \"scaling\": 1", "the pack has no shared vectors", OBM_E_FORMAT},
        {"\"version\": 1", "\"version\": \"1\"", "\"version\": expected an integer", OBM_E_FORMAT},
        {"onebitmerge pack", "something", "\"format\" is \"something\"", OBM_E_FORMAT},
        {"\"lambda\": 0.", "\"lambda\": -0.", "lambda", OBM_E_FORMAT},
        {"\"density\": 1.0", "\"density\": 1e999", "", OBM_E_FORMAT},
        {"onto_base", "elsewhere", "\"reading\" is \"elsewhere\"", OBM_E_FORMAT},
        {"\"file\": \"chat-", "\"file\": \"../chat-", "expected the name of a .safetensors file in the pack",
         OBM_E_FORMAT},
        {"\"name\": \"math\"", "\"name\": \"chat\"", "two experts are named chat", OBM_E_FORMAT},
        {"\"name\": \"math\"", "\"name\": \"\"", "task name", OBM_E_FORMAT},
        {"\"mode\": \"1bit\"", "\"mode\": \"2bit\"", "unknown mode", OBM_E_FORMAT},
        {"\"mode\": \"1bit\"", "\"mode\": \"full\"", "is missing", OBM_E_FORMAT},
        {"\"mode\": \"1bit\"", "\"mode\": \"same\"", "pack.json accounts for", OBM_E_FORMAT},
        {"\"planes\": 2", "\"planes\": 9", "\"planes\" is 9", OBM_E_FORMAT},
        {"\"planes\": 2", "\"planes\": 1", "pack.json accounts for", OBM_E_FORMAT},
        {"\"scale\": \"group:64\"", "\"scale\": \"row\"", "expected F32 (70)", OBM_E_FORMAT},
        {"\"scale\": \"row\"", "\"scale\": \"group:1\"", "multiple of 64", OBM_E_FORMAT},
        {"\"experts\": [", "\"experts\": [1, ", "an expert: expected an object, found an integer", OBM_E_FORMAT},
        {"\"experts\"", "\"exports\"", "\"experts\": expected an array", OBM_E_FORMAT},
        {"\"absolute\"", "\"nothing\"", "", OBM_OK},
        {"\"sample\"", "\"simple\"", "\"sample\": expected a string", OBM_E_FORMAT},
        {"{", "[{", "pack.json", OBM_E_FORMAT},
    };
    obm_pack_free(compress(w));
    size_t size;
    char *text = file_text(w->pack, "pack.json", &size), *path = obm__path_join(w->pack, "pack.json");
    char *ref = obm__format("%s:chat", w->pack);
    obm_checkpoint *base, *member;
    OK(obm_checkpoint_open(w->ctx, w->base, &base, err));
    for (size_t i = 0; i < sizeof edits / sizeof *edits; i++) {
        obm_pack *p = NULL;
        edit(w, edits[i].from, edits[i].to);
        if (edits[i].status == OBM_OK)
            OK(obm_pack_open(w->ctx, w->pack, NULL, &p, err));
        else
            FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), edits[i].status, edits[i].part);
        obm_pack_free(p);
        /* One expert alone is as careful about all that it reads. */
        if (obm_checkpoint_open(w->ctx, ref, &member, NULL) == OBM_OK) {
            obm_task_vector *v = NULL;
            obm_status status = obm_task_vector_new(base, member, &v, NULL);
            assert_true(status == OBM_OK || status == edits[i].status);
            obm_task_vector_free(v);
            obm_checkpoint_free(member);
        }
        write_bytes(path, text, size);
    }
    obm_checkpoint_free(base);
    obm_free(ref);
    obm_free(text);
    obm_free(path);
}

static void test_hostile_scale(void **state) {
    world *w = *state;
    char files[16][128];
    obm_pack *p = compress(w);
    size_t size,
        offset = (size_t)((const uint8_t *)&entry(p, 0, Q)->planes.alphas[0][2] - p->experts[0].file->map.data);
    const float bad[] = {NAN, INFINITY, -1.0f};
    obm_pack_free(p);
    list(w->pack, files);
    char *text = file_text(w->pack, files[0], &size), *path = obm__path_join(w->pack, files[0]);
    for (int i = 0; i < 3; i++) {
        memcpy(text + offset, &bad[i], sizeof bad[i]);
        write_bytes(path, text, size);
        FAILS(obm_pack_open(w->ctx, w->pack, NULL, &p, err), OBM_E_FORMAT, "tensor " Q ".scale.0[2] is ");
    }
    obm_free(text);
    obm_free(path);
}

static void test_no_pack(void **state) {
    world *w = *state;
    obm_pack *p = NULL;
    FAILS(obm_pack_open(w->ctx, w->base, NULL, &p, err), OBM_E_FORMAT, "is no pack");
    FAILS(obm_pack_open(w->ctx, "/nowhere", NULL, &p, err), OBM_E_IO, "/nowhere");
}

int main(void) {
#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)
#define FORKING_TEST(f) cmocka_unit_test_setup_teardown(f, setup_one_thread, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_contents),
        TEST(test_tied_base),
        TEST(test_accounting),
        TEST(test_threads),
        TEST(test_exists_and_overwrite),
        TEST(test_overwrite_replaces_packs_only),
        TEST(test_dry_run),
        TEST(test_stopping_leaves_nothing),
        TEST(test_refusals),
        TEST(test_planes_that_vanish),
        TEST(test_map_drop_and_extra_rows),
        TEST(test_member),
        TEST(test_unknown_matrices_stay_full),
        TEST(test_settings),
        TEST(test_add_and_remove),
        TEST(test_replacing_an_expert),
        TEST(test_adopting),
        TEST(test_adopting_copies),
        FORKING_TEST(test_parallel_adding),
        FORKING_TEST(test_parallel_creation),
        TEST(test_locked),
        TEST(test_changed_since_opened),
        FORKING_TEST(test_killed),
        TEST(test_where_the_base_lies),
        TEST(test_wrong_base),
        TEST(test_verify_reads_everything),
        TEST(test_truncation),
        TEST(test_flipped_byte_is_found_by_verify),
        TEST(test_hostile_manifests),
        TEST(test_hostile_scale),
        TEST(test_no_pack),
        TEST(test_router_file),
        TEST(test_resident_memory_is_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
