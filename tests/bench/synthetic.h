/* What the benchmarks of models share: folders of random weights, and the plain read of them that figures are held
 * against. */
#ifndef OBM_BENCH_SYNTHETIC_H
#define OBM_BENCH_SYNTHETIC_H

#include "bench.h"
#include "kernels.h"
#include "sys/sys.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct shape {
    const char *name;
    int64_t vocab, hidden, wide, layers, heads, steps;
} shape;

static inline void check(obm_status status, const obm_error *err) {
    if (status == OBM_OK) return;
    fprintf(stderr, "%s: %s\n", obm_status_name(status), err->message);
    exit(1);
}
static inline void need(bool ok, const char *what) {
    if (ok) return;
    perror(what);
    exit(1);
}

/* ---- synthetic folders ---- */

typedef struct tensor {
    char name[80];
    int64_t rows, cols;
} tensor; /* rows 0: a vector */

static inline int list_tensors(const shape *s, tensor *out) {
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

static inline int64_t elements(const tensor *t) { return (t->rows ? t->rows : 1) * t->cols; }

static inline FILE *create(const char *dir, const char *name) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    need(f, path);
    return f;
}

static inline void write_config(const shape *s, const char *dir) {
    FILE *f = create(dir, "config.json");
    fprintf(
        f,
        "{\"model_type\": \"llama\", \"vocab_size\": %lld, \"hidden_size\": %lld, \"intermediate_size\": %lld, "
        "\"num_hidden_layers\": %lld, \"num_attention_heads\": %lld, \"num_key_value_heads\": %lld, "
        "\"max_position_embeddings\": 65536, \"rms_norm_eps\": 1e-5, \"rope_theta\": 10000.0, \"hidden_act\": \"silu\", "
        "\"tie_word_embeddings\": true, \"torch_dtype\": \"bfloat16\"}\n",
        (long long)s->vocab, (long long)s->hidden, (long long)s->wide, (long long)s->layers, (long long)s->heads,
        (long long)s->heads);
    need(!fclose(f), dir);
}

static inline float uniform(uint32_t *state) {
    *state = *state * 1664525 + 1013904223;
    return (float)(*state >> 8) * 0x1p-24f - 0.5f;
}

/* The same base values for every folder; `moved` adds a task vector of a tenth of their size, by numbers of its own. */
static inline void write_values(FILE *f, const tensor *t, bool moved, uint32_t *state, uint32_t *own) {
    enum { BLOCK = 65536 };
    static float wide[BLOCK];
    static uint16_t narrow[BLOCK];
    const obm_kernels *k = obm_kernels_find("scalar");
    for (int64_t i = 0, left = elements(t); left > 0; left -= i) {
        i = left < BLOCK ? left : BLOCK;
        for (int64_t j = 0; j < i; j++) {
            float base = uniform(state) * 0.08f + (t->rows ? 0 : 1), delta = uniform(own) * 0.008f;
            wide[j] = moved ? base + delta : base;
        }
        k->f32_to_bf16(narrow, wide, (size_t)i);
        need(fwrite(narrow, 2, (size_t)i, f) == (size_t)i, "model.safetensors");
    }
}

/* moved: part of the names of the tensors that an expert changes ("": all), NULL: the base; which: of several experts. */
static inline void write_expert(const shape *s, const char *dir, const char *moved, uint32_t which) {
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
    uint32_t state = 1, own = which + 100;
    FILE *f = create(dir, "model.safetensors");
    need(fwrite(&size, 8, 1, f) == 1 && fwrite(header, 1, size, f) == size, dir);
    for (int i = 0; i < n; i++) write_values(f, &tensors[i], moved && strstr(tensors[i].name, moved), &state, &own);
    need(!fclose(f), dir);
}
static inline void write_folder(const shape *s, const char *dir, const char *moved) { write_expert(s, dir, moved, 1); }

static inline void remove_folder(const char *dir) {
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
static inline void read_blocks(void *arg, size_t begin, size_t end, int worker) {
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

static inline mapping map_weights(const char *dir) {
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

static inline double read_seconds(obm_context *ctx, mapping *m, int times) {
    double begin = seconds();
    for (int i = 0; i < times; i++) obm__parallel(ctx, m->size & ~(size_t)127, 1 << 18, read_blocks, m);
    return (seconds() - begin) / times;
}

/* With the faults of a fresh mapping: what any reader of mapped files pays. */
static inline double fresh_read_seconds(obm_context *ctx, const char *dir) {
    double begin = seconds();
    mapping m = map_weights(dir);
    read_seconds(ctx, &m, 1);
    munmap((void *)m.data, m.size);
    return seconds() - begin;
}

#endif
