/* The main job on synthetic models: compressing, prefill, decode.  Every figure stands next to a bound measured in turn
 * with it in the same run (a plain read of the same bytes, or sgemm of the same shapes), by the same number of threads.
 *
 * Usage: bench_main [--what compress|decode|prefill|all] [--size tiny|0.1b|0.35b] [--threads N] [--rounds N] */
#include "bench.h"
#include "sys/sys.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_ROUNDS 99
#define PROMPT 512 /* tokens */
#define STEPS 9    /* tokens of a decode run; the first comes from the prompt */
#define PANEL 128  /* weight rows of one sgemm call */

typedef struct shape {
    const char *name;
    int64_t vocab, hidden, wide, layers, heads, steps;
} shape;
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

static void check(obm_status status, const obm_error *err) {
    if (status == OBM_OK) return;
    fprintf(stderr, "%s: %s\n", obm_status_name(status), err->message);
    exit(1);
}
static void need(bool ok, const char *what) {
    if (ok) return;
    perror(what);
    exit(1);
}

/* ---- synthetic folders ---- */

typedef struct tensor {
    char name[80];
    int64_t rows, cols;
} tensor; /* rows 0: a vector */

static int list_tensors(const shape *s, tensor *out) {
    const struct {
        const char *name;
        int64_t rows, cols;
    } layer[] = {{"self_attn.q_proj", s->hidden, s->hidden}, {"self_attn.k_proj", s->hidden, s->hidden},
                 {"self_attn.v_proj", s->hidden, s->hidden}, {"self_attn.o_proj", s->hidden, s->hidden},
                 {"mlp.gate_proj", s->wide, s->hidden},      {"mlp.up_proj", s->wide, s->hidden},
                 {"mlp.down_proj", s->hidden, s->wide},      {"input_layernorm", 0, s->hidden},
                 {"post_attention_layernorm", 0, s->hidden}};
    int n = 0;
    out[n++] = (tensor){"model.embed_tokens.weight", s->vocab, s->hidden};
    out[n++] = (tensor){"model.norm.weight", 0, s->hidden};
    for (int l = 0; l < s->layers; l++)
        for (size_t i = 0; i < sizeof layer / sizeof *layer; i++, n++) {
            out[n] = (tensor){"", layer[i].rows, layer[i].cols};
            snprintf(out[n].name, sizeof out[n].name, "model.layers.%d.%s.weight", l, layer[i].name);
        }
    return n;
}

static int64_t elements(const tensor *t) { return (t->rows ? t->rows : 1) * t->cols; }

static FILE *create(const char *dir, const char *name) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    need(f, path);
    return f;
}

static void write_config(const shape *s, const char *dir) {
    FILE *f = create(dir, "config.json");
    fprintf(
        f,
        "{\"model_type\": \"llama\", \"vocab_size\": %lld, \"hidden_size\": %lld, \"intermediate_size\": %lld, "
        "\"num_hidden_layers\": %lld, \"num_attention_heads\": %lld, \"num_key_value_heads\": %lld, "
        "\"max_position_embeddings\": 2048, \"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, \"hidden_act\": \"silu\", "
        "\"tie_word_embeddings\": true, \"torch_dtype\": \"bfloat16\"}\n",
        (long long)s->vocab, (long long)s->hidden, (long long)s->wide, (long long)s->layers, (long long)s->heads,
        (long long)s->heads);
    need(!fclose(f), dir);
}

static float uniform(uint32_t *state) {
    *state = *state * 1664525 + 1013904223;
    return (float)(*state >> 8) * 0x1p-24f - 0.5f;
}

/* The same base values for every folder; `moved` adds a task vector of a tenth of their size. */
static void write_values(FILE *f, const tensor *t, bool moved, uint32_t *state) {
    enum { BLOCK = 65536 };
    static float wide[BLOCK];
    static uint16_t narrow[BLOCK];
    const obm_kernels *k = obm_kernels_find("scalar");
    for (int64_t i = 0, left = elements(t); left > 0; left -= i) {
        i = left < BLOCK ? left : BLOCK;
        for (int64_t j = 0; j < i; j++) {
            float base = uniform(state) * 0.08f + (t->rows ? 0 : 1), delta = uniform(state) * 0.008f;
            wide[j] = moved ? base + delta : base;
        }
        k->f32_to_bf16(narrow, wide, (size_t)i);
        need(fwrite(narrow, 2, (size_t)i, f) == (size_t)i, "model.safetensors");
    }
}

static void write_folder(const shape *s, const char *dir, bool moved) {
    static tensor tensors[512];
    static char header[65536];
    int n = list_tensors(s, tensors), used = 0;
    uint64_t offset = 0;
    need(!mkdir(dir, 0755), dir);
    write_config(s, dir);
    for (int i = 0; i < n; i++) {
        char rows[32] = "";
        uint64_t bytes = 2 * (uint64_t)elements(&tensors[i]);
        if (tensors[i].rows) snprintf(rows, sizeof rows, "%lld,", (long long)tensors[i].rows);
        used += snprintf(header + used, sizeof header - (size_t)used,
                         "%s\"%s\":{\"dtype\":\"BF16\",\"shape\":[%s%lld],\"data_offsets\":[%llu,%llu]}", i ? "," : "{",
                         tensors[i].name, rows, (long long)tensors[i].cols, (unsigned long long)offset,
                         (unsigned long long)(offset + bytes));
        offset += bytes;
    }
    used += snprintf(header + used, sizeof header - (size_t)used, "}%*s", 8 - (used + 1) % 8, "");
    uint64_t size = (uint64_t)used;
    uint32_t state = 1;
    FILE *f = create(dir, "model.safetensors");
    need(fwrite(&size, 8, 1, f) == 1 && fwrite(header, 1, size, f) == size, dir);
    for (int i = 0; i < n; i++) write_values(f, &tensors[i], moved, &state);
    need(!fclose(f), dir);
}

static void remove_folder(const char *dir) {
    char command[160];
    snprintf(command, sizeof command, "rm -rf '%s'", dir);
    if (system(command)) fprintf(stderr, "cannot remove %s\n", dir);
}

/* ---- bounds ---- */

typedef struct mapping {
    const char *data;
    size_t size;
    _Atomic uint64_t sink;
} mapping;

/* Four streams, as the kernels that take four rows at a time. */
static void read_blocks(void *arg, size_t begin, size_t end, int worker) {
    typedef uint64_t lanes __attribute__((vector_size(32)));
    mapping *m = arg;
    size_t quarter = (end - begin) / 128;
    const lanes *p = (const void *)(m->data + begin), *q = p + quarter, *u = q + quarter, *v = u + quarter;
    lanes a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i < quarter; i++) a ^= p[i], b ^= q[i], c ^= u[i], d ^= v[i];
    a ^= b ^ c ^ d;
    (void)worker;
    m->sink ^= a[0] ^ a[1] ^ a[2] ^ a[3];
}

static mapping map_weights(const char *dir) {
    char path[128];
    struct stat st;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    int fd = open(path, O_RDONLY);
    need(fd >= 0 && !fstat(fd, &st), path);
    void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    need(p != MAP_FAILED, path);
    close(fd);
    return (mapping){.data = p, .size = (size_t)st.st_size};
}

static double read_seconds(bench *b, mapping *m, int times) {
    double begin = seconds();
    for (int i = 0; i < times; i++) obm__parallel(b->ctx, m->size & ~(size_t)127, 1 << 18, read_blocks, m);
    return (seconds() - begin) / times;
}

/* With the faults of a fresh mapping: what any reader of mapped files pays. */
static double fresh_read_seconds(bench *b, const char *dir) {
    double begin = seconds();
    mapping m = map_weights(dir);
    read_seconds(b, &m, 1);
    munmap((void *)m.data, m.size);
    return seconds() - begin;
}

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
        o.overwrite = true;
        double read = fresh_read_seconds(b, b->base) + fresh_read_seconds(b, b->expert), begin = seconds();
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

static void bench_decode(bench *b, obm_model *m, size_t batch) {
    double rate[MAX_ROUNDS], probe[MAX_ROUNDS], share[MAX_ROUNDS];
    mapping w = map_weights(b->base);
    size_t steps = (size_t)b->s->steps - 1;
    read_seconds(b, &w, 1);
    for (int r = -1; r < b->rounds; r++) {
        double read = read_seconds(b, &w, 3), all = generate_seconds(b, m, batch, 8, steps + 1);
        double step = (all - generate_seconds(b, m, batch, 8, 1)) / (double)steps;
        if (r < 0) continue;
        rate[r] = (double)batch / step;
        probe[r] = (double)w.size / read * 1e-9;
        share[r] = read / step;
    }
    printf("decode    batch %zu: %.1f tokens/s; %.0f MB of weights a step, read %.1f GB/s; share of read %.3f\n", batch,
           median(rate, b->rounds), (double)w.size * 1e-6, median(probe, b->rounds), median(share, b->rounds));
    munmap((void *)w.data, w.size);
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
        obm__sgemm_nt(PROMPT, PANEL, g->cols, 1, g->x, g->cols, g->w + (int64_t)i * PANEL * g->cols, g->cols, 0,
                      g->y + (size_t)worker * PROMPT * PANEL, PANEL);
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

static void bench_prefill(bench *b, obm_model *m) {
    double rate[MAX_ROUNDS], probe[MAX_ROUNDS], share[MAX_ROUNDS];
    const shape *s = b->s;
    obm_context_info info;
    obm_context_describe(b->ctx, &info);
    float *x = filled(PROMPT * (size_t)s->wide), *w = filled((size_t)((s->wide + PANEL) * (s->hidden + PANEL)));
    float *y = filled(PROMPT * PANEL * (size_t)info.threads);
    double flops = 2.0 * PROMPT * (double)(s->layers * (4 * s->hidden * s->hidden + 3 * s->hidden * s->wide));
    for (int r = -1; r < b->rounds; r++) {
        double gemm = 0, took = generate_seconds(b, m, 1, PROMPT, 1);
        for (int64_t l = 0; l < s->layers; l++) gemm += gemm_seconds(b, x, w, y);
        if (r < 0) continue;
        rate[r] = flops / took * 1e-9;
        probe[r] = flops / gemm * 1e-9;
        share[r] = gemm / took;
    }
    printf("prefill   %d tokens: %.1f GFLOP/s of linear layers (attention, norms and head take time, count no work); "
           "sgemm %.1f GFLOP/s; share %.3f\n",
           PROMPT, median(rate, b->rounds), median(probe, b->rounds), median(share, b->rounds));
    obm_free(x);
    obm_free(w);
    obm_free(y);
}

/* ---- main ---- */

static void print_head(const bench *b) {
    obm_context_info info;
    double load[3] = {0};
    obm_context_describe(b->ctx, &info);
    if (getloadavg(load, 3) < 1) load[0] = -1;
    print_processor();
    printf("topology  %s\nbuild     onebitmerge %s, %s, %s\nisa       %s\n", info.topology, obm_version(),
           info.compiler, info.blas, info.isa);
    printf("threads   %d, load before %.1f\nmodel     %s, bf16; medians of %d interleaved rounds\n", info.threads,
           load[0], b->s->name, b->rounds);
}

static void run(bench *b, const char *what) {
    bool all = !strcmp(what, "all");
    write_folder(b->s, b->base, false);
    if (all || !strcmp(what, "compress")) {
        write_folder(b->s, b->expert, true);
        bench_compress(b);
    }
    obm_error err;
    obm_model *m;
    check(obm_model_open(b->ctx, b->base, NULL, &m, &err), &err);
    if (all || !strcmp(what, "decode")) {
        bench_decode(b, m, 1);
        bench_decode(b, m, 8);
    }
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
    if (!b.s || b.rounds < 7 || b.rounds > MAX_ROUNDS || !strstr(" compress decode prefill all ", what))
        return fprintf(stderr,
                       "usage: %s [--what compress|decode|prefill|all] [--size tiny|0.1b|0.35b] [--threads N] "
                       "[--rounds 7..%d]\n",
                       argv[0], MAX_ROUNDS),
               2;
    o.threads = (int)number(argc, argv, "--threads", 0);
    check(obm_context_new(&o, &b.ctx, &err), &err);
    need(mkdtemp(b.dir), b.dir);
    snprintf(b.base, sizeof b.base, "%s/base", b.dir);
    snprintf(b.expert, sizeof b.expert, "%s/expert", b.dir);
    snprintf(b.pack, sizeof b.pack, "%s/pack", b.dir);
    print_head(&b);
    run(&b, what);
    remove_folder(b.dir);
    obm_context_free(b.ctx);
    return 0;
}
