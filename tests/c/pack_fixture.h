/* Packs made by hand in memory, and an independent plain reference of the dynamic merge over them (no code of core/).
 */
#ifndef PACK_FIXTURE_H
#define PACK_FIXTURE_H

#include "route/dynamic.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

typedef struct fixture {
    obm_pack pack;
    obm_checkpoint base; /* without tensors */
    void *owned[512];
    size_t n_owned;
    uint64_t state;
    int warnings;
} fixture;

static inline void *fixture_own(fixture *f, size_t bytes) {
    void *p = calloc(1, bytes ? bytes : 1);
    assert_non_null(p);
    assert_true(f->n_owned < 512);
    f->owned[f->n_owned++] = p;
    return p;
}

static inline double fixture_random(fixture *f) {
    f->state = f->state * 6364136223846793005u + 1442695040888963407u;
    return (double)(f->state >> 40) / 16777216.0 * 2 - 1;
}

static inline void fixture_count_warning(void *user, const char *message) {
    (void)message;
    ((fixture *)user)->warnings++;
}

static inline fixture *fixture_new(size_t tasks, size_t tensors, int threads) {
    static const char *const names[] = {"chat", "math", "code", "law", "bio", "art"};
    fixture *f = calloc(1, sizeof *f);
    assert_non_null(f);
    f->state = 7 + tasks;
    obm_context_options o = OBM_INIT(obm_context_options);
    o.threads = threads;
    o.log = fixture_count_warning;
    o.log_user = f;
    assert_int_equal(obm_context_new(&o, &f->pack.ctx, NULL), OBM_OK);
    f->pack.base = &f->base;
    f->pack.path = fixture_own(f, 16);
    strcpy(f->pack.path, "by-hand.pack");
    f->pack.tensors = fixture_own(f, tensors * sizeof *f->pack.tensors);
    f->pack.experts = fixture_own(f, tasks * sizeof *f->pack.experts);
    f->pack.n_experts = tasks;
    f->pack.settings = (obm_pack_settings){sizeof f->pack.settings, 0.3, OBM_READING_ONTO_BASE, OBM_PROFILE_DEFAULT, 1};
    for (size_t k = 0; k < tasks; k++) {
        f->pack.experts[k].name = fixture_own(f, 16);
        strcpy(f->pack.experts[k].name, names[k]);
        f->pack.experts[k].entries = fixture_own(f, tensors * sizeof(obm__pack_entry));
        for (size_t t = 0; t < tensors; t++) f->pack.experts[k].entries[t].mode = OBM_MODE_SAME;
    }
    return f;
}

static inline void fixture_free(fixture *f) {
    obm_context_free(f->pack.ctx);
    for (size_t i = 0; i < f->n_owned; i++) free(f->owned[i]);
    free(f);
}

static inline obm_tensor fixture_floats(fixture *f, int64_t rows, int64_t cols, double size) {
    float *x = fixture_own(f, (size_t)(rows * cols) * sizeof *x);
    for (int64_t i = 0; i < rows * cols; i++) x[i] = (float)(size * fixture_random(f));
    obm_tensor t = {.data = x, .dtype = OBM_F32, .ndim = 2, .shape = {rows, cols}};
    return t;
}

/* Tensors have to be added in the order of their names. */
static inline size_t fixture_tensor(fixture *f, const char *name, int64_t rows, int64_t cols) {
    size_t t = f->pack.n_tensors++;
    f->pack.tensors[t] = (obm__pack_tensor_info){name, obm_class_of(name, 2), fixture_floats(f, rows, cols, 1), true};
    return t;
}

static inline obm__pack_entry *fixture_entry(fixture *f, size_t task, size_t tensor) {
    return &f->pack.experts[task].entries[tensor];
}

/* A full tensor near the base; quantised so that magnitudes of the differences repeat. */
static inline void fixture_full(fixture *f, size_t task, size_t tensor, int64_t extra_rows) {
    const obm_tensor *base = &f->pack.tensors[tensor].base;
    obm_tensor full = fixture_floats(f, base->shape[0] + extra_rows, base->shape[1], 0.1);
    float *x = (float *)full.data;
    for (int64_t i = 0; i < base->shape[0] * base->shape[1]; i++)
        x[i] = ((const float *)base->data)[i] + (float)(round(x[i] * 160) / 1024);
    *fixture_entry(f, task, tensor) = (obm__pack_entry){.mode = OBM_MODE_FULL, .full = full, .bytes_expert = 4};
}

static inline void fixture_planes(fixture *f, size_t task, size_t tensor, int n, obm__scale_kind kind, int64_t group) {
    const obm_tensor *base = &f->pack.tensors[tensor].base;
    obm__planes p = {.rows = base->shape[0], .cols = base->shape[1], .n = n, .scale = {kind, group}};
    p.row_bytes = (p.cols + 63) / 64 * 8;
    int64_t per_row = kind == OBM_SCALE_GROUP ? (p.cols + group - 1) / group : 1;
    int64_t scales = kind == OBM_SCALE_MATRIX ? 1 : p.rows * per_row;
    for (int i = 0; i < n; i++) {
        uint8_t *signs = fixture_own(f, (size_t)(p.rows * p.row_bytes));
        for (int64_t r = 0; r < p.rows; r++) {
            for (int64_t c = 0; c < p.cols; c++)
                if (fixture_random(f) > 0) signs[r * p.row_bytes + c / 8] |= (uint8_t)(1 << c % 8);
        }
        float *alphas = fixture_own(f, (size_t)scales * sizeof *alphas);
        for (int64_t s = 0; s < scales; s++) alphas[s] = (float)((0.02 + 0.01 * fixture_random(f)) / (1 << i));
        p.signs[i] = signs;
        p.alphas[i] = alphas;
    }
    *fixture_entry(f, task, tensor) = (obm__pack_entry){.mode = OBM_MODE_1BIT, .planes = p, .bytes_expert = 4};
}

/* ---- the plain reference ---- */

/* Positive and negative values apart: the heavier side wins and its mean is taken. */
static inline double reference_ties(const double *d, size_t n) {
    double plus = 0, minus = 0;
    int n_plus = 0, n_minus = 0;
    for (size_t i = 0; i < n; i++) {
        if (d[i] > 0) plus += d[i], n_plus++;
        if (d[i] < 0) minus -= d[i], n_minus++;
    }
    if (plus == minus) return 0;
    return plus > minus ? plus / n_plus : -minus / n_minus;
}

static inline double reference_delta(const fixture *f, size_t task, size_t tensor, int64_t row, int64_t col) {
    const obm__pack_entry *e = &f->pack.experts[task].entries[tensor];
    const obm_tensor *base = &f->pack.tensors[tensor].base;
    int64_t at = row * base->shape[1] + col;
    double d = 0;
    if (e->mode == OBM_MODE_FULL) return ((const float *)e->full.data)[at] - ((const float *)base->data)[at];
    for (int p = 0; e->mode == OBM_MODE_1BIT && p < e->planes.n; p++) {
        int64_t per_row = 1, group = 0;
        if (e->planes.scale.kind == OBM_SCALE_GROUP) {
            per_row = (e->planes.cols + e->planes.scale.group - 1) / e->planes.scale.group;
            group = col / e->planes.scale.group;
        }
        double alpha = e->planes.alphas[p][e->planes.scale.kind == OBM_SCALE_MATRIX ? 0 : row * per_row + group];
        bool plus = e->planes.signs[p][row * e->planes.row_bytes + col / 8] & 1 << col % 8;
        d += plus ? alpha : -alpha;
    }
    return d;
}

typedef struct magnitude {
    double size;
    size_t at;
} magnitude;
static inline int by_magnitude(const void *a, const void *b) {
    const magnitude *x = a, *y = b;
    if (x->size != y->size) return x->size > y->size ? -1 : 1;
    return x->at < y->at ? -1 : 1;
}

/* Zeroes all but the max(1, floor(density * n)) largest magnitudes of d, the first ones among equals. */
static inline void reference_trim(double *d, size_t n, double density) {
    if (density >= 1 || !n) return;
    magnitude *m = calloc(n, sizeof *m);
    assert_non_null(m);
    for (size_t i = 0; i < n; i++) m[i] = (magnitude){fabs(d[i]), i};
    qsort(m, n, sizeof *m, by_magnitude);
    size_t keep = (size_t)(density * (double)n);
    for (size_t i = keep ? keep : 1; i < n; i++) d[m[i].at] = 0;
    free(m);
}

/* All tensors under a route, end to end; *offsets: where each begins.  Owned by the caller. */
static inline float *reference_route(const fixture *f, const double *weights, size_t *offsets) {
    const obm_pack *p = &f->pack;
    size_t tasks = p->n_experts, total = 0;
    for (size_t t = 0; t < p->n_tensors; t++) {
        offsets[t] = total;
        total += (size_t)(p->tensors[t].base.shape[0] * p->tensors[t].base.shape[1]);
    }
    offsets[p->n_tensors] = total;
    double *d = calloc(tasks * total, sizeof *d), *sum = calloc(total, sizeof *sum);
    double *others = calloc(tasks * total, sizeof *others), *packed = calloc(total, sizeof *packed);
    float *out = calloc(total, sizeof *out);
    assert_true(d && sum && others && packed && out);
    for (size_t j = 0; j < tasks; j++) {
        for (size_t t = 0; t < p->n_tensors; t++) {
            int64_t cols = p->tensors[t].base.shape[1];
            for (size_t i = offsets[t]; i < offsets[t + 1]; i++) {
                int64_t at = (int64_t)(i - offsets[t]);
                d[j * total + i] = reference_delta(f, j, t, at / cols, at % cols);
            }
        }
    }
    bool recomputed = p->settings.reading == OBM_READING_RECOMPUTED, model = p->settings.profile == OBM_PROFILE_PAPER;
    for (size_t k = 0; k < tasks; k++) {
        if (weights[k] == 0) continue;
        size_t n = 0;
        for (size_t j = 0; j < tasks; j++) {
            if (j == k) continue;
            double *x = others + n++ * total;
            for (size_t i = 0; i < total; i++) x[i] = d[j * total + i] - (recomputed ? d[k * total + i] : 0);
            size_t held = 0;
            for (size_t t = 0; t < p->n_tensors; t++) {
                bool full = p->experts[j].entries[t].mode == OBM_MODE_FULL ||
                            (recomputed && p->experts[k].entries[t].mode == OBM_MODE_FULL);
                if (!full) continue;
                size_t count = offsets[t + 1] - offsets[t];
                if (!model) reference_trim(x + offsets[t], count, p->settings.density);
                memcpy(packed + held, x + offsets[t], count * sizeof *x);
                held += count;
            }
            if (!model) continue;
            reference_trim(packed, held, p->settings.density);
            held = 0;
            for (size_t t = 0; t < p->n_tensors; t++) {
                bool full = p->experts[j].entries[t].mode == OBM_MODE_FULL ||
                            (recomputed && p->experts[k].entries[t].mode == OBM_MODE_FULL);
                if (!full) continue;
                size_t count = offsets[t + 1] - offsets[t];
                memcpy(x + offsets[t], packed + held, count * sizeof *x);
                held += count;
            }
        }
        for (size_t i = 0; i < total; i++) {
            double v[8];
            for (size_t j = 0; j < n; j++) v[j] = others[j * total + i];
            sum[i] += weights[k] * (d[k * total + i] + p->settings.lambda * reference_ties(v, n));
        }
    }
    for (size_t t = 0; t < p->n_tensors; t++) {
        for (size_t i = offsets[t]; i < offsets[t + 1]; i++)
            out[i] = (float)(((const float *)p->tensors[t].base.data)[i - offsets[t]] + sum[i]);
    }
    free(d), free(sum), free(others), free(packed);
    return out;
}

#endif
