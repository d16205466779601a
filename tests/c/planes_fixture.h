/* Packs of tiny random models for tests that run them, and the merged weights by the plain elementwise rule in f64 over
 * the stored signs and scales.  No code of the runtime is used for what is expected. */
#ifndef PLANES_FIXTURE_H
#define PLANES_FIXTURE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "model/model.h"
#include "tiny_model.h"

#include <dirent.h>

#define MAX_TASKS 5

typedef struct expert_spec {
    const char *policy, *scale;
    int planes;
    const obm_map_rule *map;
    size_t n_map;
    int dtype;           /* 1 + its obm_dtype; 0: the base's */
    const char *same[4]; /* parts of the names of tensors that are the base's */
    int copy_of;         /* 1 + an earlier expert whose weights these are */
    int extra;           /* vocabulary rows beyond the base's */
    bool own_head;       /* although the base's is tied */
} expert_spec;

typedef struct world {
    tiny c;
    int tasks;
    expert_spec spec[MAX_TASKS];
    tiny_weights base, expert[MAX_TASKS];
    char *dir[MAX_TASKS + 1], *pack_dir;
    obm_context *ctx;
    obm_pack *pack;
    int32_t ids[210];
} world;

static const char *const task_names[MAX_TASKS] = {"chat", "math", "code", "law", "bio"};

static inline void check_ok(obm_status status, const obm_error *err) {
    if (status != OBM_OK) fail_msg("%s: %s", obm_status_name(status), err->message);
}

static inline size_t tiny_count(const tiny_tensor *t) { return (size_t)(t->rows ? t->rows : 1) * (size_t)t->cols; }

static inline tiny_tensor *tensor_named(const tiny_weights *w, const char *name) {
    for (int i = 0; i < w->n; i++)
        if (!strcmp(w->t[i].name, name)) return (tiny_tensor *)&w->t[i];
    return NULL;
}

static inline bool is_vocabulary(const char *name) { return strstr(name, "embed_tokens") || strstr(name, "lm_head"); }

static inline void copy_weights(const tiny_weights *from, tiny_weights *to) {
    *to = *from;
    for (int i = 0; i < to->n; i++) {
        to->t[i].data = malloc(tiny_count(&from->t[i]) * sizeof(float));
        memcpy(to->t[i].data, from->t[i].data, tiny_count(&from->t[i]) * sizeof(float));
    }
}

static inline void add_rows(tiny_tensor *t, int rows, unsigned *state) {
    size_t count = tiny_count(t), more = (size_t)rows * (size_t)t->cols;
    t->data = realloc(t->data, (count + more) * sizeof *t->data);
    for (size_t i = 0; i < more; i++) t->data[count + i] = (float)((int)(tiny_random(state) % 41) - 20) / 64.0f;
    t->rows += rows;
}

static inline bool is_same(const expert_spec *e, const char *name) {
    for (int i = 0; i < 4 && e->same[i]; i++)
        if (strstr(name, e->same[i])) return true;
    return false;
}

/* Deltas are multiples of 1/64 up to 3/64, so they and the weights are exact in every dtype. */
static inline void make_expert(world *w, int k) {
    const expert_spec *e = &w->spec[k];
    tiny_weights *out = &w->expert[k];
    unsigned state = 77 + w->c.seed * 31 + (unsigned)k * 1000003u;
    copy_weights(e->copy_of ? &w->expert[e->copy_of - 1] : &w->base, out);
    if (e->copy_of) return;
    if (e->own_head) {
        tiny_tensor *head = &out->t[out->n++], *embedding = tensor_named(out, "model.embed_tokens.weight");
        *head = *embedding;
        snprintf(head->name, sizeof head->name, "lm_head.weight");
        head->data = malloc(tiny_count(head) * sizeof *head->data);
        memcpy(head->data, embedding->data, tiny_count(head) * sizeof *head->data);
    }
    for (int i = 0; i < out->n; i++) {
        tiny_tensor *t = &out->t[i];
        if (!is_same(e, t->name))
            for (size_t j = 0; j < tiny_count(t); j++)
                t->data[j] += (float)((int)(tiny_random(&state) % 7) - 3) / 64.0f;
        if (e->extra && is_vocabulary(t->name)) add_rows(t, e->extra, &state);
    }
}

static inline void write_world(world *w, obm_expert *experts) {
    obm_error err;
    tiny_weights_new(&w->c, &w->base);
    w->dir[0] = tiny_folder();
    if (tiny_write(&w->c, &w->base, w->dir[0], &err)) fail_msg("%s", err.message);
    for (int k = 0; k < w->tasks; k++) {
        const expert_spec *e = &w->spec[k];
        tiny c = w->c;
        make_expert(w, k);
        c.vocab += e->extra;
        if (e->dtype) c.dtype = (obm_dtype)(e->dtype - 1);
        if (e->own_head) c.tied = 0;
        w->dir[k + 1] = tiny_folder();
        if (tiny_write(&c, &w->expert[k], w->dir[k + 1], &err)) fail_msg("%s", err.message);
        experts[k] = OBM_INIT(obm_expert);
        experts[k].name = task_names[k];
        experts[k].path = w->dir[k + 1];
        experts[k].policy = e->policy;
        experts[k].scale = e->scale;
        experts[k].planes = e->planes;
        experts[k].map = e->map;
        experts[k].n_map = e->n_map;
    }
}

/* c, tasks and spec are set.  Nothing is trimmed: density 1. */
static inline void open_world(world *w, int threads) {
    obm_error err;
    obm_context_options options = OBM_INIT(obm_context_options);
    obm_expert experts[MAX_TASKS];
    options.threads = threads;
    check_ok(obm_context_new(&options, &w->ctx, &err), &err);
    write_world(w, experts);
    w->pack_dir = tiny_folder();
    obm_compress_options compress = OBM_INIT(obm_compress_options);
    compress.overwrite = true;
    check_ok(obm_compress(w->ctx, w->dir[0], experts, (size_t)w->tasks, &compress, w->pack_dir, NULL, &w->pack, &err),
             &err);
    w->pack->settings.density = 1;
    unsigned state = 5;
    for (size_t i = 0; i < sizeof w->ids / sizeof *w->ids; i++)
        w->ids[i] = (int32_t)(tiny_random(&state) % (unsigned)w->c.vocab);
}

static inline void remove_folder(char *dir) {
    DIR *d = opendir(dir);
    struct dirent *e;
    char path[1024];
    while (d && (e = readdir(d))) {
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) unlink(path);
    }
    if (d) closedir(d);
    rmdir(dir);
    free(dir);
}

static inline void close_world(world *w) {
    obm_pack_free(w->pack);
    obm_context_free(w->ctx);
    tiny_weights_free(&w->base);
    for (int k = 0; k < w->tasks; k++) tiny_weights_free(&w->expert[k]);
    for (int k = 0; k <= w->tasks; k++) remove_folder(w->dir[k]);
    remove_folder(w->pack_dir);
}

static inline obm_model *open_model(const world *w, bool materialise, uint64_t budget) {
    obm_model_options options = OBM_INIT(obm_model_options);
    obm_model *m;
    obm_error err;
    options.materialise = materialise;
    options.route_budget = budget;
    check_ok(obm_model_from_pack(w->ctx, w->pack, &options, &m, &err), &err);
    return m;
}

/* ---- one token behind many ---- */

enum { FAR = 2070 }; /* three parts of 1024 positions; pages of 64 */

/* Keys and values of FAR positions that are made up: the same whatever the layout of a page. */
static inline void fill_far(const obm_model *m, const obm__sequence *s) {
    size_t n = (size_t)(OBM_TILE_TOKENS * m->config.head_dim);
    for (size_t page = 0; page < s->n_pages; page++)
        for (int64_t layer = 0; layer < m->config.layers; layer++)
            for (int which = 0; which < 2; which++)
                for (int64_t head = 0; head < m->config.kv_heads; head++) {
                    unsigned state = (unsigned)(((page * 64 + (size_t)layer) * 2 + (size_t)which) * 64 + (size_t)head);
                    void *at = obm__kv_at(m, s, (int64_t)page, layer, which, head);
                    for (size_t i = 0; i < n; i++) {
                        float x = (float)((int)(tiny_random(&state) % 129) - 64) / 64.0f;
                        if (s->kv == OBM_F16)
                            ((uint16_t *)at)[i] = tiny_f16(x);
                        else
                            ((float *)at)[i] = x;
                    }
                }
}

/* The logits of the base, (vocab), for `id` behind them; look (nullable) sees the sequence before it goes. */
static inline obm_status run_far(obm_model *m, obm_dtype kv, int32_t id,
                                 void (*look)(const obm_model *, const obm__sequence *), float *out, obm_error *err) {
    obm__sequence *s = NULL;
    obm__pulse pulse = {0};
    size_t which = 0;
    OBM_TRY(obm__model_enter(m, &pulse, err));
    obm_status status = obm__sequence_new(m, NULL, kv, &s, err);
    if (status == OBM_OK) status = obm__sequence_reserve(m, s, FAR + 1, err);
    if (status == OBM_OK) {
        obm__row row = {s, FAR, id};
        fill_far(m, s);
        status = obm__forward(m, &row, 1, false, m->config.layers, err);
        if (status == OBM_OK) status = obm__forward_logits(m, &row, &which, 1, out, err);
        if (look) look(m, s);
    }
    obm__sequence_free(m, s);
    obm__model_leave(m);
    return status;
}

/* The logits of the base behind a prompt, as prefill="bf16" has them where the CPU has such products: the kernel is in every
 * table.  The model's buffers are made anew, with room for that. */
static inline obm_status run_pairs(obm_model *m, const int32_t *ids, size_t n, float *out, obm_error *err) {
    obm_run_options r = OBM_INIT(obm_run_options);
    obm_dtype prefill = m->prefill;
    r.kv = m->kv;
    obm__scratch_free(&m->scratch);
    m->prefill = OBM_BF16;
    obm_status status = obm_model_logits(m, ids, n, &r, out, err);
    m->prefill = prefill;
    return status;
}

/* ---- what is expected ---- */

static inline double plain_ties(const double *d, int n) {
    double sum = 0, kept = 0;
    int agreeing = 0;
    for (int i = 0; i < n; i++) sum += d[i];
    for (int i = 0; i < n; i++)
        if (sum != 0 && d[i] * sum > 0) {
            kept += d[i];
            agreeing++;
        }
    return agreeing ? kept / agreeing : 0;
}

/* theta(w) - theta_base of one element (design.md, "Dynamic merge"). */
static inline double plain_rule(const world *w, const double *route, const double *d) {
    const obm_pack_settings *s = &w->pack->settings;
    double sum = 0;
    for (int k = 0; k < w->tasks; k++) {
        double others[MAX_TASKS];
        int n = 0;
        for (int j = 0; j < w->tasks; j++)
            if (j != k) others[n++] = d[j] - (s->reading == OBM_READING_RECOMPUTED ? d[k] : 0);
        sum += route[k] * (d[k] + s->lambda * plain_ties(others, n));
    }
    return sum;
}

/* A tied expert's head is its embedding. */
static inline const char *name_of_expert(const world *w, int k, const char *name) {
    return tensor_named(&w->expert[k], name) ? name : "model.embed_tokens.weight";
}

static inline const tiny_tensor *base_tensor(const world *w, const char *name) {
    const tiny_tensor *t = tensor_named(&w->base, name);
    return t ? t : tensor_named(&w->base, "model.embed_tokens.weight");
}

static inline double plain_alpha(const obm__planes *p, int plane, int64_t row, int64_t col) {
    if (p->scale.kind == OBM_SCALE_MATRIX) return p->alphas[plane][0];
    if (p->scale.kind == OBM_SCALE_ROW) return p->alphas[plane][row];
    return p->alphas[plane][row * ((p->cols + p->scale.group - 1) / p->scale.group) + col / p->scale.group];
}

static inline int plain_sign(const obm__planes *p, int plane, int64_t row, int64_t col) {
    return p->signs[plane][row * p->row_bytes + col / 8] >> (col % 8) & 1 ? 1 : -1;
}

static inline const obm__pack_entry *entry_of(const world *w, int k, const char *name) {
    return &w->pack->experts[k].entries[obm__pack_find(w->pack, name_of_expert(w, k, name))];
}

/* What an expert has in one tensor. */
typedef struct delta_ref {
    const obm__pack_entry *entry;
    const float *own, *base;
    int64_t cols;
} delta_ref;

static inline void find_deltas(const world *w, const char *name, delta_ref *out) {
    const tiny_tensor *base = base_tensor(w, name);
    for (int k = 0; k < w->tasks; k++) {
        const tiny_tensor *own = tensor_named(&w->expert[k], name_of_expert(w, k, name));
        out[k] = (delta_ref){entry_of(w, k, name), own->data, base->data, base->cols};
    }
}

static inline double plain_delta(const delta_ref *r, int64_t row, int64_t col) {
    const obm__pack_entry *e = r->entry;
    double d = 0;
    if (e->mode == OBM_MODE_FULL) return (double)r->own[row * r->cols + col] - r->base[row * r->cols + col];
    for (int i = 0; e->mode == OBM_MODE_1BIT && i < e->planes.n; i++)
        d += plain_alpha(&e->planes, i, row, col) * plain_sign(&e->planes, i, row, col);
    return d;
}

/* The expert that is routed to alone, with weight 1, or -1. */
static inline int hard_of(const world *w, const double *route) {
    int hard = -1;
    for (int k = 0; k < w->tasks; k++) {
        if (route[k] == 0) continue;
        if (hard >= 0 || route[k] != 1) return -1;
        hard = k;
    }
    return hard;
}

/* An expert's own head is there when that expert comes in. */
static inline bool plain_head_exists(const world *w, const double *route) {
    for (int k = 0; k < w->tasks; k++) {
        bool others = false;
        for (int j = 0; j < w->tasks; j++) others |= j != k && route[j] != 0;
        if (w->spec[k].own_head && (route[k] != 0 || (others && w->pack->settings.lambda != 0))) return true;
    }
    return false;
}

static inline void plain_tensor(const world *w, const double *route, const char *name, tiny_tensor *out) {
    const tiny_tensor *base = base_tensor(w, name);
    int hard = hard_of(w, route), rows = base->rows ? base->rows : 1;
    const tiny_tensor *own = hard >= 0 ? tensor_named(&w->expert[hard], name_of_expert(w, hard, name)) : NULL;
    delta_ref deltas[MAX_TASKS];
    find_deltas(w, name, deltas);
    snprintf(out->name, sizeof out->name, "%s", name);
    out->rows = own ? own->rows : base->rows;
    out->cols = base->cols;
    out->data = malloc(tiny_count(out) * sizeof *out->data);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < base->cols; c++) {
            double d[MAX_TASKS];
            for (int k = 0; k < w->tasks; k++) d[k] = plain_delta(&deltas[k], r, c);
            out->data[r * base->cols + c] = (float)(base->data[r * base->cols + c] + plain_rule(w, route, d));
        }
    size_t known = (size_t)rows * (size_t)base->cols;
    if (own && tiny_count(out) > known)
        memcpy(out->data + known, own->data + known, (tiny_count(out) - known) * sizeof *out->data);
}

/* The merged weights, and the config that fits them. */
static inline void plain_weights(const world *w, const double *route, tiny *c, tiny_weights *out) {
    *c = w->c;
    out->n = 0;
    for (int i = 0; i < w->base.n; i++) plain_tensor(w, route, w->base.t[i].name, &out->t[out->n++]);
    if (c->tied && plain_head_exists(w, route)) {
        c->tied = 0;
        plain_tensor(w, route, "lm_head.weight", &out->t[out->n++]);
    }
    c->vocab = tensor_named(out, "model.embed_tokens.weight")->rows;
}

#endif
