/* Tiny random models for tests: written as a Hugging Face folder, and run by a plain f64 reference that shares no code with
 * the library.  Weights are multiples of 1/64, so F32, F16 and BF16 files hold the same model exactly. */
#ifndef TINY_MODEL_H
#define TINY_MODEL_H

#include "io/io.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct tiny {
    const char *type;
    int vocab, hidden, inter, layers, heads, kv_heads, dim, window, tied;
    obm_dtype dtype;
    unsigned seed;
    const char *extra;   /* more members of config.json, ",..." */
} tiny;

typedef struct tiny_tensor { char name[96]; int rows, cols; float *data; } tiny_tensor;   /* rows 0: a vector */
typedef struct tiny_weights { tiny_tensor t[64]; int n; } tiny_weights;

static unsigned tiny_random(unsigned *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

static inline void tiny_add(tiny_weights *w, unsigned *state, const char *name, int rows, int cols) {
    tiny_tensor *t = &w->t[w->n++];
    size_t count = (size_t)(rows ? rows : 1) * (size_t)cols;
    snprintf(t->name, sizeof t->name, "%s", name);
    t->rows = rows;
    t->cols = cols;
    t->data = malloc(count * sizeof *t->data);
    for (size_t i = 0; i < count; i++) t->data[i] = (float)((int)(tiny_random(state) % 41) - 20) / 64.0f + (rows ? 0 : 1);
}

static inline const float *tiny_get(const tiny_weights *w, const char *format, int layer) {
    char name[96];
    snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, format);
    for (int i = 0; i < w->n; i++)
        if (!strcmp(w->t[i].name, name) || !strcmp(w->t[i].name, format)) return w->t[i].data;
    return NULL;
}

static inline void tiny_weights_new(const tiny *c, tiny_weights *w) {
    unsigned state = c->seed;
    char name[96];
    w->n = 0;
    const struct { const char *name; int rows, cols; } layer[] = {
        {"self_attn.q_proj", c->heads * c->dim, c->hidden},    {"self_attn.k_proj", c->kv_heads * c->dim, c->hidden},
        {"self_attn.v_proj", c->kv_heads * c->dim, c->hidden}, {"self_attn.o_proj", c->hidden, c->heads * c->dim},
        {"mlp.gate_proj", c->inter, c->hidden},                {"mlp.up_proj", c->inter, c->hidden},
        {"mlp.down_proj", c->hidden, c->inter},                {"input_layernorm", 0, c->hidden},
        {"post_attention_layernorm", 0, c->hidden}};
    tiny_add(w, &state, "model.embed_tokens.weight", c->vocab, c->hidden);
    tiny_add(w, &state, "model.norm.weight", 0, c->hidden);
    if (!c->tied) tiny_add(w, &state, "lm_head.weight", c->vocab, c->hidden);
    for (int l = 0; l < c->layers; l++)
        for (size_t i = 0; i < sizeof layer / sizeof *layer; i++) {
            snprintf(name, sizeof name, "model.layers.%d.%s.weight", l, layer[i].name);
            tiny_add(w, &state, name, layer[i].rows, layer[i].cols);
        }
}

static inline void tiny_weights_free(tiny_weights *w) {
    for (int i = 0; i < w->n; i++) free(w->t[i].data);
    w->n = 0;
}

/* Exact for multiples of 1/64 below 2. */
static inline uint16_t tiny_f16(float x) {
    int exponent;
    float fraction = frexpf(fabsf(x), &exponent);   /* in [1/2, 1) */
    uint16_t sign = x < 0 ? 0x8000 : 0;
    if (x == 0) return sign;
    return (uint16_t)(sign | ((unsigned)(exponent - 1 + 15) << 10) | ((unsigned)lrintf(fraction * 2048) & 0x3ff));
}

static inline uint16_t tiny_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static inline int tiny_write_text(const char *dir, const char *name, const char *text) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    if (!f) return -1;
    fputs(text, f);
    return fclose(f);
}

static inline void tiny_write_config(const tiny *c, const char *dir) {
    char text[2048], window[64] = "";
    if (c->window) snprintf(window, sizeof window, ",\"sliding_window\":%d", c->window);
    else if (!strcmp(c->type, "mistral")) snprintf(window, sizeof window, ",\"sliding_window\":null");
    bool own = c->extra && strstr(c->extra, "max_position_embeddings");
    const char *positions = own ? "" : "\"max_position_embeddings\":200,";
    snprintf(text, sizeof text,
             "{\"model_type\":\"%s\",\"vocab_size\":%d,\"hidden_size\":%d,\"intermediate_size\":%d,\"num_hidden_layers\":%d,"
             "\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,%s"
             "\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,\"tie_word_embeddings\":%s,\"eos_token_id\":2%s%s}",
             c->type, c->vocab, c->hidden, c->inter, c->layers, c->heads, c->kv_heads, c->dim, positions, c->tied ? "true" : "false", window,
             c->extra ? c->extra : "");
    tiny_write_text(dir, "config.json", text);
}

static inline obm_status tiny_write_tensor(obm__st_writer *w, const tiny_tensor *t, obm_dtype dtype, obm_error *err) {
    size_t count = (size_t)(t->rows ? t->rows : 1) * (size_t)t->cols;
    if (dtype == OBM_F32) return obm__st_writer_write(w, t->data, count * 4, err);
    uint16_t *half = malloc(count * sizeof *half);
    for (size_t i = 0; i < count; i++) half[i] = dtype == OBM_F16 ? tiny_f16(t->data[i]) : tiny_bf16(t->data[i]);
    obm_status status = obm__st_writer_write(w, half, count * 2, err);
    free(half);
    return status;
}

/* Writes the folder; returns 0 on success. */
static inline int tiny_write(const tiny *c, const tiny_weights *w, const char *dir, obm_error *err) {
    char path[512];
    obm__st_writer *writer;
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    tiny_write_config(c, dir);
    if (obm__st_writer_new(path, &writer, err)) return -1;
    int bad = 0;
    for (int i = 0; i < w->n; i++) {
        int64_t matrix[2] = {w->t[i].rows, w->t[i].cols}, vector[1] = {w->t[i].cols};
        bad |= obm__st_writer_declare(writer, w->t[i].name, c->dtype, w->t[i].rows ? 2 : 1, w->t[i].rows ? matrix : vector, err);
    }
    bad |= obm__st_writer_begin(writer, err);
    for (int i = 0; i < w->n && !bad; i++) bad |= tiny_write_tensor(writer, &w->t[i], c->dtype, err);
    if (!bad) bad |= obm__st_writer_finish(writer, NULL, err);
    obm__st_writer_free(writer);
    return bad;
}

/* ---- the reference: one token after the other, f64, loops only ---- */

static inline void ref_matmul(const float *w, const double *x, int rows, int cols, double *y) {
    for (int r = 0; r < rows; r++) {
        y[r] = 0;
        for (int j = 0; j < cols; j++) y[r] += (double)w[r * cols + j] * x[j];
    }
}

static inline void ref_norm(const float *w, const double *x, int n, double *y) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    for (int i = 0; i < n; i++) y[i] = w[i] * x[i] / sqrt(sum / n + 1e-5);
}

static inline void ref_rope(double *x, int dim, int position) {
    for (int i = 0; i < dim / 2; i++) {
        double angle = position / pow(10000.0, 2.0 * i / dim), a = x[i], b = x[i + dim / 2];
        x[i] = a * cos(angle) - b * sin(angle);
        x[i + dim / 2] = b * cos(angle) + a * sin(angle);
    }
}

/* k, v: (layers, T, kv_heads * dim) */
static inline void ref_attention(const tiny *c, const double *q, const double *k, const double *v, int position, double *out) {
    int width = c->kv_heads * c->dim, from = c->window && position + 1 > c->window ? position + 1 - c->window : 0;
    double scores[1024];
    for (int h = 0; h < c->heads; h++) {
        int kv = h / (c->heads / c->kv_heads);
        double max = -1e300, sum = 0;
        for (int p = from; p <= position; p++) {
            scores[p] = 0;
            for (int i = 0; i < c->dim; i++) scores[p] += q[h * c->dim + i] * k[p * width + kv * c->dim + i] / sqrt(c->dim);
            max = fmax(max, scores[p]);
        }
        for (int p = from; p <= position; p++) sum += scores[p] = exp(scores[p] - max);
        for (int i = 0; i < c->dim; i++) {
            out[h * c->dim + i] = 0;
            for (int p = from; p <= position; p++) out[h * c->dim + i] += scores[p] / sum * v[p * width + kv * c->dim + i];
        }
    }
}

/* logits: (n, vocab); hidden: (n, hidden) after the last layer, nullable. */
static inline void tiny_reference(const tiny *c, const tiny_weights *w, const int32_t *ids, int n, double *logits, double *hidden) {
    int width = c->kv_heads * c->dim, H = c->hidden;
    double *k = calloc((size_t)(c->layers * n * width), sizeof *k), *v = calloc((size_t)(c->layers * n * width), sizeof *v);
    double x[256], y[256], q[256], a[256], gate[512], up[512];
    for (int t = 0; t < n; t++) {
        for (int i = 0; i < H; i++) x[i] = tiny_get(w, "model.embed_tokens.weight", 0)[ids[t] * H + i];
        for (int l = 0; l < c->layers; l++) {
            double *kl = k + l * n * width, *vl = v + l * n * width;
            ref_norm(tiny_get(w, "input_layernorm", l), x, H, y);
            ref_matmul(tiny_get(w, "self_attn.q_proj", l), y, c->heads * c->dim, H, q);
            ref_matmul(tiny_get(w, "self_attn.k_proj", l), y, width, H, kl + t * width);
            ref_matmul(tiny_get(w, "self_attn.v_proj", l), y, width, H, vl + t * width);
            for (int h = 0; h < c->heads; h++) ref_rope(q + h * c->dim, c->dim, t);
            for (int h = 0; h < c->kv_heads; h++) ref_rope(kl + t * width + h * c->dim, c->dim, t);
            ref_attention(c, q, kl, vl, t, a);
            ref_matmul(tiny_get(w, "self_attn.o_proj", l), a, H, c->heads * c->dim, y);
            for (int i = 0; i < H; i++) x[i] += y[i];
            ref_norm(tiny_get(w, "post_attention_layernorm", l), x, H, y);
            ref_matmul(tiny_get(w, "mlp.gate_proj", l), y, c->inter, H, gate);
            ref_matmul(tiny_get(w, "mlp.up_proj", l), y, c->inter, H, up);
            for (int i = 0; i < c->inter; i++) gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
            ref_matmul(tiny_get(w, "mlp.down_proj", l), gate, H, c->inter, y);
            for (int i = 0; i < H; i++) x[i] += y[i];
        }
        if (hidden) memcpy(hidden + t * H, x, (size_t)H * sizeof *x);
        ref_norm(tiny_get(w, "model.norm.weight", 0), x, H, y);
        ref_matmul(tiny_get(w, c->tied ? "model.embed_tokens.weight" : "lm_head.weight", 0), y, c->vocab, H, logits + t * c->vocab);
    }
    free(k);
    free(v);
}

/* A fresh folder; the caller removes it with tiny_remove. */
static inline char *tiny_folder(void) {
    const char *base = getenv("TMPDIR");
    char *dir = malloc(512);
    snprintf(dir, 512, "%s/obm-test-XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(dir)) {
        free(dir);
        return NULL;
    }
    return dir;
}

static inline void tiny_remove(char *dir) {
    const char *files[] = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"};
    char path[600];
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, files[i]);
        unlink(path);
    }
    rmdir(dir);
    free(dir);
}

#endif
