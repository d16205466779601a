/* The main job on synthetic models: compressing, prefill, decode.  Every figure stands next to a bound measured in turn
 * with it in the same run (a plain read of the same bytes, or sgemm of the same shapes), by the same number of threads.
 *
 * Usage: bench_main [--what compress|decode|behind|attention|memory|prefill|all] [--size tiny|0.1b|0.35b] [--threads N]
 * [--rounds N]
 */
#include "synthetic.h"

#include "model/model.h"

#include <cblas.h>

#define MAX_ROUNDS 99
#define PROMPT 512 /* tokens */
#define STEPS 9    /* tokens of a decode run; the first comes from the prompt */
#define PANEL 128  /* weight rows of one sgemm call */

/* Sizes that decode too fast for the clock take more steps. */
static const shape shapes[] = {
    {"tiny", 768, 192, 384, 4, 6, 129},
    {"0.1b", 32000, 768, 2048, 12, 12, STEPS},
    {"0.35b", 32000, 1024, 2816, 24, 16, STEPS},
};

typedef struct bench {
    obm_context *ctx;
    const shape *s;
    int rounds;
    char dir[64], base[96], expert[96], pack[96];
} bench;

/* ---- compress ---- */

static void bench_compress(bench *b) {
    double rate[MAX_ROUNDS], probe[MAX_ROUNDS], share[MAX_ROUNDS];
    struct stat st;
    char path[128];
    snprintf(path, sizeof path, "%s/model.safetensors", b->expert);
    need(!stat(path, &st), path);
    for (int r = -1; r < b->rounds; r++) {
        obm_error err;
        obm_expert e = OBM_INIT(obm_expert);
        obm_compress_options o = OBM_INIT(obm_compress_options);
        e.name = "task";
        e.path = b->expert;
        remove_folder(b->pack); /* to free a file that is replaced would be part of the time */
        double read = fresh_read_seconds(b->ctx, b->base) + fresh_read_seconds(b->ctx, b->expert), begin = seconds();
        check(obm_compress(b->ctx, b->base, &e, 1, &o, b->pack, NULL, NULL, &err), &err);
        double took = seconds() - begin;
        if (r < 0) continue; /* warms the page cache */
        rate[r] = (double)st.st_size / took * 1e-9;
        probe[r] = (double)st.st_size / read * 1e-9;
        share[r] = read / took;
    }
    printf("compress  %.0f MB expert: %.2f GB/s of expert bytes; base + expert only read: %.2f GB/s; share %.3f\n",
           (double)st.st_size * 1e-6, median(rate, b->rounds), median(probe, b->rounds), median(share, b->rounds));
}

/* ---- models ---- */

static double generate_seconds(bench *b, obm_model *m, size_t batch, size_t prompt, size_t tokens) {
    static int32_t ids[8][PROMPT];
    obm_prompt p[8];
    obm_completion c[8];
    obm_error err;
    obm_generate_options o = OBM_INIT(obm_generate_options);
    uint32_t state = 7;
    for (size_t i = 0; i < batch; i++) {
        for (size_t j = 0; j < prompt; j++) ids[i][j] = (int32_t)((uniform(&state) + 0.5f) * (float)(b->s->vocab - 1));
        p[i] = (obm_prompt){.ids = ids[i], .n_ids = prompt};
    }
    o.max_tokens = tokens;
    o.batch = batch;
    o.ignore_eos = true;
    double begin = seconds();
    check(obm_model_generate_batch(m, p, batch, &o, c, &err), &err);
    double took = seconds() - begin;
    for (size_t i = 0; i < batch; i++) obm_completion_clear(&c[i]);
    return took;
}

static double step_seconds(bench *b, obm_model *m, size_t batch, size_t steps) {
    double all = generate_seconds(b, m, batch, 8, steps + 1);
    return (all - generate_seconds(b, m, batch, 8, 1)) / (double)steps;
}

static void bench_decode(bench *b, obm_model *m, size_t batch) {
    double rate[MAX_ROUNDS], probe[MAX_ROUNDS], share[MAX_ROUNDS];
    mapping w = map_weights(b->base);
    size_t steps = (size_t)b->s->steps - 1;
    read_seconds(b->ctx, &w, 1);
    for (int r = -1; r < b->rounds; r++) {
        double read = read_seconds(b->ctx, &w, 3), step = step_seconds(b, m, batch, steps);
        if (r < 0) continue;
        rate[r] = (double)batch / step;
        probe[r] = (double)w.size / read * 1e-9;
        share[r] = read / step;
    }
    printf("decode    batch %zu: %.1f tokens/s; %.0f MB of weights a step, read %.1f GB/s; share of read %.3f\n", batch,
           median(rate, b->rounds), (double)w.size * 1e-6, median(probe, b->rounds), median(share, b->rounds));
    munmap((void *)w.data, w.size);
}

/* The packed base beside the plain one, in turn. */
static void bench_z12(bench *b, obm_model *plain, size_t batch) {
    double rate[MAX_ROUNDS], share[MAX_ROUNDS], begin = seconds();
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_model_memory before, after;
    obm_error err;
    obm_model *packed;
    o.z12 = OBM_Z12_ON;
    check(obm_model_open(b->ctx, b->base, &o, &packed, &err), &err);
    double opened = seconds() - begin;
    size_t steps = (size_t)b->s->steps - 1;
    for (int r = -1; r < b->rounds; r++) {
        double base = step_seconds(b, plain, batch, steps), step = step_seconds(b, packed, batch, steps);
        if (r < 0) continue;
        rate[r] = (double)batch / step;
        share[r] = base / step;
    }
    obm_model_account(plain, &before);
    obm_model_account(packed, &after);
    printf("decode    batch %zu, z12: %.1f tokens/s; %.2f times plain bf16; %.3f of its bytes, opened in %.2f s\n",
           batch, median(rate, b->rounds), median(share, b->rounds), (double)after.base / (double)before.base, opened);
    obm_model_free(packed);
}

/* Packed behind the tokens: what the steps before, while and behind take against the plain ones, in turn. */
static void bench_behind(bench *b, obm_model *plain) {
    static const size_t steps[] = {192, 128, 64};
    double share[3][MAX_ROUNDS];
    for (int r = 0; r < b->rounds; r++) {
        obm_error err;
        obm_model *m;
        check(obm_model_open(b->ctx, b->base, NULL, &m, &err), &err);
        for (int i = 0; i < 3; i++) {
            double base = generate_seconds(b, plain, 1, 8, steps[i] + 1);
            share[i][r] = base / generate_seconds(b, m, 1, 8, steps[i] + 1);
        }
        obm_model_free(m);
    }
    printf("decode    batch 1, z12 behind the tokens, times plain bf16: the first 192 %.2f, the next 128 %.2f, then "
           "%.2f\n",
           median(share[0], b->rounds), median(share[1], b->rounds), median(share[2], b->rounds));
}

/* ---- attention: one token after many, whose keys and values are random ---- */

static obm__sequence *long_sequence(obm_model *m, int64_t length) {
    obm__sequence *s;
    obm_error err;
    uint32_t state = 5;
    check(obm__sequence_new(m, NULL, OBM_F16, &s, &err), &err);
    check(obm__sequence_reserve(m, s, length + 1, &err), &err);
    size_t count = obm__kv_page_bytes(m, OBM_F16) / 2;
    for (size_t p = 0; p < s->n_pages; p++)
        for (size_t i = 0; i < count; i++) /* halves between 0.06 and 0.5 */
            ((uint16_t *)s->pages[p]->data)[i] = (uint16_t)(0x2c00 + (state = state * 1664525 + 1013904223) % 0xc00);
    return s;
}

static double token_seconds(obm_model *m, obm__sequence *s, int64_t length) {
    obm_error err;
    const int32_t id = 1;
    s->length = length;
    double begin = seconds();
    check(obm__prefill(m, s, &id, 1, true, m->config.layers, NULL, NULL, &err), &err);
    return seconds() - begin;
}

static void bench_attention(bench *b, obm_model *m) {
    static const int64_t lengths[] = {1024, 8192, 32767};
    mapping w = map_weights(b->base);
    obm__pulse pulse = {0};
    obm_error err;
    check(obm__model_enter(m, &pulse, &err), &err);
    obm__sequence *s = long_sequence(m, lengths[2]);
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
        double took[MAX_ROUNDS], rate[MAX_ROUNDS], share[MAX_ROUNDS];
        double bytes = (double)obm__kv_page_bytes(m, OBM_F16) / OBM_TILE_TOKENS * (double)lengths[l];
        for (int r = -1; r < b->rounds; r++) {
            double read = (double)w.size / read_seconds(b->ctx, &w, 3);
            double first = token_seconds(m, s, 0), step = token_seconds(m, s, lengths[l]);
            if (r < 0) continue;
            took[r] = step * 1e3;
            rate[r] = bytes / (step - first) * 1e-9;
            share[r] = bytes / (step - first) / read;
        }
        printf("attention position %lld, f16: %.2f ms a token; %.0f MB of keys and values at %.1f GB/s; share of read "
               "%.3f\n",
               (long long)lengths[l], median(took, b->rounds), bytes * 1e-6, median(rate, b->rounds),
               median(share, b->rounds));
    }
    obm__sequence_free(m, s);
    obm__model_leave(m);
    munmap((void *)w.data, w.size);
}

/* ---- memory: what a long context takes ---- */

/* Of this process: the base is mapped and does not count, unless it is copied or packed. */
static double anonymous_bytes(void) {
    FILE *file = fopen("/proc/self/status", "r");
    char line[128];
    long kb = 0;
    need(file, "/proc/self/status");
    while (fgets(line, sizeof line, file) && sscanf(line, "RssAnon: %ld", &kb) != 1) {
    }
    fclose(file);
    return (double)kb * 1024;
}

static void bench_memory(obm_model *m) {
    static const int64_t positions[] = {4096, 32768};
    obm__pulse pulse = {0};
    obm_error err;
    check(obm__model_enter(m, &pulse, &err), &err);
    for (size_t i = 0; i < sizeof positions / sizeof *positions; i++) {
        obm__sequence *s = long_sequence(m, positions[i] - 1);
        token_seconds(m, s, positions[i] - 1);
        double kv = (double)s->n_pages * (double)obm__kv_page_bytes(m, OBM_F16), all = anonymous_bytes();
        printf("memory    %lld positions, f16: RssAnon %.0f MB, of it %.0f MB keys and values\n",
               (long long)positions[i], all * 1e-6, kv * 1e-6);
        obm__sequence_free(m, s);
    }
    obm__model_leave(m);
}

/* ---- prefill ---- */

typedef struct gemm {
    const float *x, *w;
    float *y;
    int64_t cols;
} gemm;

static void gemm_panels(void *arg, size_t begin, size_t end, int worker) {
    const gemm *g = arg;
    for (size_t i = begin; i < end; i++)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, PROMPT, PANEL, (blasint)g->cols, 1, g->x, (blasint)g->cols,
                    g->w + (int64_t)i * PANEL * g->cols, (blasint)g->cols, 0, g->y + (size_t)worker * PROMPT * PANEL,
                    PANEL);
}

/* One layer's matrices in f32, whole panels; returns seconds for as many operations as the layer has. */
static double gemm_seconds(bench *b, const float *x, const float *w, float *y) {
    const int64_t h = b->s->hidden, f = b->s->wide, rows[] = {h, h, h, h, f, f, h}, cols[] = {h, h, h, h, h, h, f};
    double flops = 0, wanted = 0, begin = seconds();
    obm__blas_enter();
    for (int i = 0; i < 7; i++) {
        gemm g = {x, w, y, cols[i]};
        int64_t panels = (rows[i] + PANEL - 1) / PANEL;
        obm__parallel(b->ctx, (size_t)panels, 1, gemm_panels, &g);
        flops += (double)(panels * PANEL * cols[i]);
        wanted += (double)(rows[i] * cols[i]);
    }
    obm__blas_leave();
    return (seconds() - begin) * wanted / flops;
}

static float *filled(size_t n) {
    uint32_t state = 3;
    float *p = obm__alloc(n, sizeof *p);
    need(p, "memory");
    for (size_t i = 0; i < n; i++) p[i] = uniform(&state);
    return p;
}

/* The linear layers of a prompt alone, as a pass runs them, panels widened and packed; the scratch has room for it
 * after such a prompt. */
static double linear_seconds(const bench *b, obm_model *m, const obm__weights *const *w) {
    const obm__scratch *s = &m->scratch;
    const int64_t h = b->s->hidden, f = b->s->wide;
    const obm__linear qkv[] = {{OBM_Q, s->q, h}, {OBM_K, s->k, h}, {OBM_V, s->v, h}}, o[] = {{OBM_O, s->normed, h}};
    const obm__linear gate_up[] = {{OBM_GATE, s->gate, f}, {OBM_UP, s->up, f}}, down[] = {{OBM_DOWN, s->normed, h}};
    obm_error err;
    double begin = seconds();
    for (int64_t l = 0; l < b->s->layers; l++) {
        check(obm__linear_run(m, w, PROMPT, true, l, qkv, 3, s->normed, &err), &err);
        check(obm__linear_run(m, w, PROMPT, true, l, o, 1, s->mixed, &err), &err);
        check(obm__linear_run(m, w, PROMPT, true, l, gate_up, 2, s->normed, &err), &err);
        check(obm__linear_run(m, w, PROMPT, true, l, down, 1, s->gate, &err), &err);
    }
    return seconds() - begin;
}

/* Values do not grow from layer to layer: each begins with `mixed`, which no linear layer writes. */
static double layers_seconds(const bench *b, obm_model *m) {
    const obm__weights *w[PROMPT];
    obm__sequence *s;
    obm__pulse pulse = {0};
    obm_error err;
    check(obm__model_enter(m, &pulse, &err), &err);
    check(obm__sequence_new(m, NULL, OBM_F16, &s, &err), &err);
    for (size_t i = 0; i < PROMPT; i++) w[i] = s->weights;
    need(m->scratch.rows >= PROMPT, "scratch");
    for (size_t i = 0; i < PROMPT * (size_t)b->s->hidden; i++) m->scratch.normed[i] = m->scratch.mixed[i] = 1;
    for (size_t i = 0; i < PROMPT * (size_t)b->s->wide; i++) m->scratch.gate[i] = 1;
    double took = linear_seconds(b, m, w);
    obm__sequence_free(m, s);
    obm__model_leave(m);
    return took;
}

/* b->base once more, with prompts in bf16; NULL where they gain nothing. */
static obm_model *open_rounded(const bench *b) {
    obm_model *m = NULL;
    obm_model_options o = OBM_INIT(obm_model_options);
    obm_context_info info;
    obm_error err;
    o.z12 = OBM_Z12_OFF;
    o.prefill = OBM_BF16;
    obm_context_describe(b->ctx, &info);
    if (info.prefill_bf16) check(obm_model_open(b->ctx, b->base, &o, &m, &err), &err);
    return m;
}

static void bench_prefill(bench *b, obm_model *m) {
    double bf16[MAX_ROUNDS], bf16_alone[MAX_ROUNDS], rate[MAX_ROUNDS], probe[MAX_ROUNDS], share[MAX_ROUNDS], alone[MAX_ROUNDS];
    const shape *s = b->s;
    obm_context_info info;
    obm_context_describe(b->ctx, &info);
    float *x = filled(PROMPT * (size_t)s->wide), *w = filled((size_t)((s->wide + PANEL) * (s->hidden + PANEL)));
    float *y = filled(PROMPT * PANEL * (size_t)info.threads);
    obm_model *rounded = open_rounded(b);
    double flops = 2.0 * PROMPT * (double)(s->layers * (4 * s->hidden * s->hidden + 3 * s->hidden * s->wide));
    for (int r = -1; r < b->rounds; r++) {
        double gemm = 0, took = generate_seconds(b, m, 1, PROMPT, 1);
        double layers = layers_seconds(b, m);
        for (int64_t l = 0; l < s->layers; l++) gemm += gemm_seconds(b, x, w, y);
        double rounded_took = rounded ? generate_seconds(b, rounded, 1, PROMPT, 1) : 1;
        double rounded_layers = rounded ? layers_seconds(b, rounded) : 1;
        if (r < 0) continue;
        rate[r] = flops / took * 1e-9;
        bf16[r] = took / rounded_took;
        bf16_alone[r] = layers / rounded_layers;
        probe[r] = flops / gemm * 1e-9;
        share[r] = gemm / took;
        alone[r] = gemm / layers;
    }
    printf("prefill   %d tokens: %.1f GFLOP/s of linear layers (attention, norms and head take time, count no work); "
           "sgemm %.1f GFLOP/s; share %.3f, of the linear layers alone %.3f\n",
           PROMPT, median(rate, b->rounds), median(probe, b->rounds), median(share, b->rounds),
           median(alone, b->rounds));
    if (rounded)
        printf("prefill   prompts in bf16: %.3f times as fast, the linear layers alone %.3f times\n", median(bf16, b->rounds),
               median(bf16_alone, b->rounds));
    obm_model_free(rounded);
    obm_free(x);
    obm_free(w);
    obm_free(y);
}

/* ---- main ---- */

static void run(bench *b, const char *what) {
    bool all = !strcmp(what, "all");
    write_folder(b->s, b->base, NULL);
    if (all || !strcmp(what, "compress")) {
        write_folder(b->s, b->expert, "");
        bench_compress(b);
    }
    obm_error err;
    obm_model *m;
    obm_model_options plain = OBM_INIT(obm_model_options);
    plain.z12 = OBM_Z12_OFF;
    check(obm_model_open(b->ctx, b->base, &plain, &m, &err), &err);
    if (all || !strcmp(what, "decode")) {
        bench_decode(b, m, 1);
        bench_decode(b, m, 8);
        bench_z12(b, m, 1);
        bench_z12(b, m, 8);
    }
    if (all || !strcmp(what, "behind")) {
        bench_behind(b, m);
    }
    if (all || !strcmp(what, "attention")) bench_attention(b, m);
    if (all || !strcmp(what, "memory")) bench_memory(m);
    if (all || !strcmp(what, "prefill")) bench_prefill(b, m);
    obm_model_free(m);
}

int main(int argc, char **argv) {
    bench b = {.rounds = (int)number(argc, argv, "--rounds", 7), .dir = "/tmp/obm-bench-XXXXXX"};
    const char *size = text(argc, argv, "--size", "0.1b"), *what = text(argc, argv, "--what", "all");
    obm_context_options o = OBM_INIT(obm_context_options);
    obm_error err;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (!strcmp(shapes[i].name, size)) b.s = &shapes[i];
    if (!b.s || b.rounds < 7 || b.rounds > MAX_ROUNDS ||
        !strstr(" compress decode behind attention memory prefill all ", what))
        return fprintf(
                   stderr,
                   "usage: %s [--what compress|decode|behind|attention|memory|prefill|all] [--size tiny|0.1b|0.35b] "
                   "[--threads N] [--rounds 7..%d]\n",
                   argv[0], MAX_ROUNDS),
               2;
    o.threads = (int)number(argc, argv, "--threads", 0);
    check(obm_context_new(&o, &b.ctx, &err), &err);
    need(mkdtemp(b.dir), b.dir);
    snprintf(b.base, sizeof b.base, "%s/base", b.dir);
    snprintf(b.expert, sizeof b.expert, "%s/expert", b.dir);
    snprintf(b.pack, sizeof b.pack, "%s/pack", b.dir);
    print_head(b.ctx);
    printf("model     %s, bf16; medians of %d interleaved rounds\n", b.s->name, b.rounds);
    run(&b, what);
    remove_folder(b.dir);
    obm_context_free(b.ctx);
    return 0;
}
