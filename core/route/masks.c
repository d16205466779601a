/*
 * The coefficients of hard routes, computed once, and the routes that are made of them.  One matrix at a time; all
 * matrices of a pack at once are in masks_pack.c.
 *
 * theta(k) - theta_base = d~_k + lambda * TIES(others) is split: d~_k has the scales of its own planes as coefficients,
 * exactly, and only the remainder goes through the table of sign patterns.  Under onto_base that table is over the
 * others' planes alone; under recomputed the others are d~_j - d~_k and all planes are in it.  With lambda = 0 there is
 * no table: coefficients are scales, and those that the pack holds in the same layout are not even copied.
 *
 * A table of 2^n patterns per row costs far more than a route switch may, and hard routes never change, so their
 * coefficients are kept: computed in f64, rounded once to f32, and run with as they are.  A soft route adds up what the
 * hard routes run with, w_k c(k) in f64, and rounds that once: the mixture is the mixture of the very models that run.
 * (Keeping the f64 values, so that c(w) too would be the exact sum rounded once, doubles the bytes that a switch reads
 * to gain less than 2^-24 of sum_k w_k |c(k)|; the fixed point of the planes' activations is 2^-12.)
 */
#include "masks.h"

#include "plan.h"

#include <math.h>
#include <string.h>

/* Rows (or groups) side by side: enough for vector instructions, few enough for 256 patterns in the L2 cache. */
#define LANES 32
/* A weighted sum of f32 values, each off by 2^-25 of its size or less, may be 0 when it is below this share of their
 * sizes. */
#define CANCELLED 0x1p-24

/* A product of signs, by the planes of the matrix: ascending, zero behind n, so that equal masks are equal bytes. */
typedef struct mask {
    uint16_t n, plane[OBM_PATTERN_PLANES - 1];
} mask;

typedef struct term {
    mask mask;
    float *c; /* (groups, c_rows), owned: those that the pack maps would keep the planes around them resident too */
} term;

typedef struct hard_route {
    obm_run run;
    int n;
    term terms[OBM_ROUTE_MASKS];
} hard_route;

/* A route's masks before they become bits over its planes. */
typedef struct mask_list {
    int n;
    mask mask[OBM_ROUTE_MASKS];
    const float *c[OBM_ROUTE_MASKS];
} mask_list;

/* Where all tasks together take few enough masks, what mixtures look up in place of comparing masks. */
typedef struct mixture {
    mask_list all;
    obm__route_masks given;
    const float *
        *c; /* (all.n, n_tasks), NULL where a task has no such mask; itself NULL: more masks than a run takes */
} mixture;

struct obm__coefficients {
    const obm_pack *pack;
    size_t tensor;
    double lambda;
    obm_reading reading;
    size_t n_tasks;
    obm__coefficient_shape shape;
    size_t n_planes;
    obm__plane_ref *planes;
    hard_route *hard; /* (n_tasks) */
    mixture mix;
    const _Atomic int *stop; /* NULL once it is filled */
};

/* ---- masks ---- */

static int compare_masks(const mask *a, const mask *b) {
    if (a->n != b->n) return a->n < b->n ? -1 : 1;
    for (int i = 0; i < a->n; i++) {
        if (a->plane[i] != b->plane[i]) return a->plane[i] < b->plane[i] ? -1 : 1;
    }
    return 0;
}

static mask single(size_t plane) { return (mask){.n = 1, .plane = {(uint16_t)plane}}; }

/* ---- which planes, and how their scales lie ---- */

static bool is_absent(const obm__planes *p, int plane) {
    int64_t n = obm__scale_count(p->scale, p->rows, p->cols), i = 0;
    while (i < n && p->alphas[plane][i] == 0) i++;
    return i == n;
}

static bool has_planes(const obm__pack_entry *e) { return e->mode == OBM_MODE_1BIT && e->planes.n > 0; }

size_t obm__planes_list(const obm_pack *p, size_t tensor, obm__plane_ref *out) {
    size_t n = 0;
    for (size_t k = 0; k < p->n_experts; k++) {
        const obm__pack_entry *e = obm__route_entry(p, k, tensor);
        for (int i = 0; has_planes(e) && i < e->planes.n; i++, n++)
            if (out) out[n] = (obm__plane_ref){k, i, is_absent(&e->planes, i), &e->planes};
    }
    return n;
}

static obm_status list_planes(obm__coefficients *c, obm_error *err) {
    size_t n = obm__planes_list(c->pack, c->tensor, NULL);
    c->planes = obm__calloc(n + 1, sizeof *c->planes);
    if (!c->planes) return obm__fail_nomem(err, n * sizeof *c->planes);
    c->n_planes = obm__planes_list(c->pack, c->tensor, c->planes);
    return OBM_OK;
}

static int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

/* The coarsest layout in which every coefficient is one number: rows if any plane has them, and groups that no plane's
 * group crosses. */
static void find_shape(obm__coefficients *c) {
    obm__coefficient_shape s = {.c_rows = 1};
    obm__tensor_rows(&c->pack->tensors[c->tensor].base, &s.rows, &s.cols);
    for (size_t i = 0; i < c->n_planes; i++) {
        obm__scale scale = c->planes[i].from->scale;
        if (scale.kind != OBM_SCALE_MATRIX) s.c_rows = s.rows;
        if (scale.kind == OBM_SCALE_GROUP) s.group = common_divisor(s.group, scale.group);
    }
    if (!s.group || s.group > s.cols) s.group = s.cols;
    s.groups = (s.cols + s.group - 1) / s.group;
    s.count = (size_t)(s.groups * s.c_rows); /* no larger than the matrix */
    c->shape = s;
}

/* alpha[i] = the scale of a plane at coefficients [at, at + n) of one group. */
static void read_alphas(const obm__coefficients *c, const obm__plane_ref *p, int64_t at, int64_t n, double *alpha) {
    const obm__coefficient_shape *s = &c->shape;
    int64_t row = at % s->c_rows, col = at / s->c_rows * s->group;
    for (int64_t i = 0; i < n; i++) alpha[i] = obm__planes_alpha(p->from, p->plane, row + i, col);
}

/* ---- the terms of a hard route while they are being found ---- */

static obm_status too_large(const obm__coefficients *c, obm_error *err) {
    return obm__fail(err, OBM_E_VALUE, "tensor %s: a coefficient of its planes is too large for f32 under this route",
                     c->pack->tensors[c->tensor].name);
}

static void drop_terms(hard_route *h) {
    for (int i = 0; i < h->n; i++) obm_free(h->terms[i].c);
    h->n = 0;
}

/* The term of a mask, new ones full of zeros; *out NULL: there are OBM_ROUTE_MASKS already. */
static obm_status term_of(const obm__coefficients *c, hard_route *h, const mask *m, term **out, obm_error *err) {
    *out = NULL;
    for (int i = 0; i < h->n; i++)
        if (!compare_masks(&h->terms[i].mask, m)) *out = &h->terms[i];
    if (*out || h->n == OBM_ROUTE_MASKS) return OBM_OK;
    float *values = obm__calloc(c->shape.count, sizeof *values);
    if (!values) return obm__fail_nomem(err, c->shape.count * sizeof *values);
    *out = &h->terms[h->n++];
    **out = (term){*m, values};
    return OBM_OK;
}

static obm_status store(const obm__coefficients *c, term *t, int64_t at, int64_t n, const double *value,
                        obm_error *err) {
    for (int64_t i = 0; i < n; i++) {
        t->c[at + i] = (float)value[i];
        if (!isfinite(t->c[at + i])) return too_large(c, err);
    }
    return OBM_OK;
}

static void sort_terms(hard_route *h) {
    for (int i = 1; i < h->n; i++) {
        term t = h->terms[i];
        int j = i;
        for (; j > 0 && compare_masks(&t.mask, &h->terms[j - 1].mask) < 0; j--) h->terms[j] = h->terms[j - 1];
        h->terms[j] = t;
    }
}

/* ---- the routed expert itself (onto_base, or lambda 0): its planes with their scales ---- */

static obm_status expand_scales(const obm__coefficients *c, const obm__plane_ref *p, term *t, obm_error *err) {
    double alpha[LANES];
    for (int64_t at = 0, n; at < (int64_t)c->shape.count; at += n) {
        n = c->shape.c_rows - at % c->shape.c_rows;
        if (n > LANES) n = LANES;
        read_alphas(c, p, at, n, alpha);
        OBM_TRY(store(c, t, at, n, alpha, err));
    }
    return OBM_OK;
}

static obm_status add_own_planes(const obm__coefficients *c, size_t task, hard_route *h, obm_error *err) {
    for (size_t i = 0; i < c->n_planes; i++) {
        const obm__plane_ref *p = &c->planes[i];
        mask own = single(i);
        term *t;
        if (p->task != task || p->absent) continue;
        OBM_TRY(term_of(c, h, &own, &t, err));
        if (t) OBM_TRY(expand_scales(c, p, t, err));
    }
    return OBM_OK;
}

/* ---- the remainder: tables of LANES coefficients side by side ---- */

typedef struct table {
    size_t n; /* planes in the table */
    size_t plane[OBM_PATTERN_PLANES];
    double alpha[OBM_PATTERN_PLANES][LANES];
    double d[OBM_ROUTE_TASKS][LANES], others[OBM_ROUTE_TASKS][LANES];
    double value[OBM_PATTERNS][LANES]; /* lambda * TIES(others), then its coefficients */
} table;

/* False: more planes than a table takes. */
static bool choose_planes(const obm__coefficients *c, size_t task, table *t) {
    t->n = 0;
    for (size_t i = 0; i < c->n_planes; i++) {
        bool in_table = c->reading == OBM_READING_RECOMPUTED || c->planes[i].task != task;
        if (!in_table || c->planes[i].absent) continue;
        if (t->n == OBM_PATTERN_PLANES) return false;
        t->plane[t->n++] = i;
    }
    return true;
}

/* The K task-vector values of one pattern; experts without planes here stay 0. */
static void values_of(const obm__coefficients *c, unsigned pattern, int64_t n, table *t) {
    memset(t->d, 0, c->n_tasks * sizeof t->d[0]);
    for (size_t i = 0; i < t->n; i++) {
        double *d = t->d[c->planes[t->plane[i]].task], sign = pattern >> i & 1 ? 1.0 : -1.0;
        for (int64_t j = 0; j < n; j++) d[j] += sign * t->alpha[i][j];
    }
}

static void tabulate(const obm__coefficients *c, size_t task, int64_t n, table *t) {
    unsigned count = 1u << t->n;
    for (unsigned pattern = count / 2; pattern < count; pattern++) {
        size_t others = 0;
        double *v = t->value[pattern], *negated = t->value[count - 1 - pattern];
        values_of(c, pattern, n, t);
        for (size_t j = 0; j < c->n_tasks; j++) {
            if (j == task) continue;
            double *x = t->others[others++];
            for (int64_t i = 0; i < n; i++)
                x[i] = c->reading == OBM_READING_RECOMPUTED ? t->d[j][i] - t->d[task][i] : t->d[j][i];
        }
        obm__ties_columns(t->others[0], others, LANES, n, v);
        for (int64_t i = 0; i < n; i++) {
            v[i] *= c->lambda;
            negated[i] = -v[i];
        }
    }
}

/* From values to coefficients of d~_k + remainder, where the table has k's planes (recomputed); what is below the noise
 * of its row is 0. */
static void transform(const obm__coefficients *c, size_t task, int64_t n, table *t) {
    double noise[LANES] = {0};
    unsigned count = 1u << t->n;
    for (unsigned pattern = count / 2; pattern < count; pattern++) {
        for (int64_t i = 0; i < n; i++) noise[i] = fmax(noise[i], fabs(t->value[pattern][i]));
    }
    obm__pattern_transform(t->value[0], (int)t->n, LANES);
    for (size_t p = 0; p < t->n; p++) {
        if (c->planes[t->plane[p]].task != task) continue;
        for (int64_t i = 0; i < n; i++) {
            t->value[1u << p][i] += t->alpha[p][i];
            noise[i] += fabs(t->alpha[p][i]);
        }
    }
    for (unsigned m = 1; m < count; m++) {
        for (int64_t i = 0; i < n; i++)
            if (fabs(t->value[m][i]) <= noise[i] * OBM_PATTERN_NOISE) t->value[m][i] = 0;
    }
}

static bool all_zero(const double *x, int64_t n) {
    bool any = false;
    for (int64_t i = 0; i < n; i++) any |= x[i] != 0;
    return !any;
}

static mask mask_of(const table *t, unsigned bits) {
    mask m = {0};
    for (size_t i = 0; i < t->n; i++)
        if (bits >> i & 1) m.plane[m.n++] = (uint16_t)t->plane[i];
    return m;
}

/* *fits false: a mask more than a run takes. */
static obm_status store_masks(const obm__coefficients *c, const table *t, int64_t at, int64_t n, hard_route *h,
                              bool *fits, obm_error *err) {
    for (unsigned bits = 1; bits < 1u << t->n; bits++) {
        if (!__builtin_parity(bits) || all_zero(t->value[bits], n)) continue;
        mask m = mask_of(t, bits);
        term *to;
        OBM_TRY(term_of(c, h, &m, &to, err));
        *fits = to != NULL;
        if (!to) return OBM_OK;
        OBM_TRY(store(c, to, at, n, t->value[bits], err));
    }
    return OBM_OK;
}

static obm_status add_remainder(const obm__coefficients *c, size_t task, table *t, hard_route *h, bool *fits,
                                obm_error *err) {
    *fits = choose_planes(c, task, t);
    if (!t->n) return OBM_OK;
    for (int64_t at = 0, n; *fits && at < (int64_t)c->shape.count; at += n) {
        if (c->stop && *c->stop) return obm__fail(err, OBM_E_USER, "stopped");
        n = c->shape.c_rows - at % c->shape.c_rows;
        if (n > LANES) n = LANES;
        for (size_t p = 0; p < t->n; p++) read_alphas(c, &c->planes[t->plane[p]], at, n, t->alpha[p]);
        tabulate(c, task, n, t);
        transform(c, task, n, t);
        OBM_TRY(store_masks(c, t, at, n, h, fits, err));
    }
    return OBM_OK;
}

/* ---- hard routes ---- */

static bool full_comes_in(const obm__coefficients *c, size_t task) {
    for (size_t j = 0; j < c->n_tasks; j++) {
        bool comes_in = j == task || c->lambda != 0;
        if (comes_in && obm__entry_is_dense(obm__route_entry(c->pack, j, c->tensor))) return true;
    }
    return false;
}

static obm_status fill_hard(const obm__coefficients *c, size_t task, table *t, hard_route *h, obm_error *err) {
    bool fits = true, own = c->reading == OBM_READING_ONTO_BASE || c->lambda == 0;
    if (full_comes_in(c, task)) {
        h->run = OBM_RUN_OVERLAY;
        return OBM_OK;
    }
    if (own) OBM_TRY(add_own_planes(c, task, h, err));
    if (c->lambda != 0) OBM_TRY(add_remainder(c, task, t, h, &fits, err));
    if (!fits) drop_terms(h);
    h->run = !fits ? OBM_RUN_OVERLAY : h->n ? OBM_RUN_PLANES : OBM_RUN_BASE;
    sort_terms(h);
    return OBM_OK;
}

static obm_status fill_mixture(obm__coefficients *c, obm_error *err);

static obm_status fill(obm__coefficients *c, obm_error *err) {
    OBM_TRY(list_planes(c, err));
    find_shape(c);
    c->hard = obm__calloc(c->n_tasks, sizeof *c->hard);
    if (!c->hard) return obm__fail_nomem(err, c->n_tasks * sizeof *c->hard);
    table *t = obm__alloc(1, sizeof *t);
    if (!t) return obm__fail_nomem(err, sizeof *t);
    obm_status status = OBM_OK;
    for (size_t k = 0; status == OBM_OK && k < c->n_tasks; k++) status = fill_hard(c, k, t, &c->hard[k], err);
    obm_free(t);
    return status == OBM_OK ? fill_mixture(c, err) : status;
}

obm_status obm__coefficients_new(const obm_pack *p, size_t tensor, const _Atomic int *stop, obm__coefficients **out,
                                 obm_error *err) {
    bool any = false;
    *out = NULL;
    if (p->n_experts > OBM_ROUTE_TASKS)
        return obm__fail(err, OBM_E_UNSUPPORTED, "pack %s has %zu experts, routes take at most %d", p->path,
                         p->n_experts, OBM_ROUTE_TASKS);
    for (size_t k = 0; k < p->n_experts; k++) any |= has_planes(obm__route_entry(p, k, tensor));
    if (!any) return OBM_OK;
    obm__coefficients *c = obm__calloc(1, sizeof *c);
    if (!c) return obm__fail_nomem(err, sizeof *c);
    c->pack = p;
    c->tensor = tensor;
    c->lambda = p->settings.lambda;
    c->reading = p->settings.reading;
    c->n_tasks = p->n_experts;
    c->stop = stop;
    obm_status status = fill(c, err);
    c->stop = NULL;
    if (status == OBM_OK)
        *out = c;
    else
        obm__coefficients_free(c);
    return status;
}

void obm__coefficients_free(obm__coefficients *c) {
    if (!c) return;
    for (size_t k = 0; c->hard && k < c->n_tasks; k++) drop_terms(&c->hard[k]);
    obm_free(c->hard);
    obm_free(c->mix.c);
    obm_free(c->planes);
    obm_free(c);
}

const obm__plane_ref *obm__coefficients_planes(const obm__coefficients *c, size_t *n) {
    *n = c->n_planes;
    return c->planes;
}

const obm__coefficient_shape *obm__coefficients_shape(const obm__coefficients *c) { return &c->shape; }

size_t obm__coefficients_bytes(const obm__coefficients *c) {
    size_t bytes = sizeof *c + c->n_planes * sizeof *c->planes + c->n_tasks * sizeof *c->hard;
    if (c->mix.c) bytes += (size_t)c->mix.all.n * c->n_tasks * sizeof *c->mix.c;
    for (size_t k = 0; k < c->n_tasks; k++) {
        for (int i = 0; i < c->hard[k].n; i++)
            bytes += c->shape.count * sizeof(float);
    }
    return bytes;
}

/* ---- routes ---- */

/* Keeps the order of compare_masks; false: full. */
static bool list_add(mask_list *list, const mask *m) {
    int at = 0;
    while (at < list->n && compare_masks(&list->mask[at], m) < 0) at++;
    if (at < list->n && !compare_masks(&list->mask[at], m)) return true;
    if (list->n == OBM_ROUTE_MASKS) return false;
    memmove(&list->mask[at + 1], &list->mask[at], (size_t)(list->n - at) * sizeof *m);
    list->mask[at] = *m;
    list->n++;
    return true;
}

/* The masks of all hard routes with a weight. */
static obm_run union_of(const obm__coefficients *c, const double *weights, mask_list *list) {
    list->n = 0;
    for (size_t k = 0; k < c->n_tasks; k++) {
        if (weights[k] == 0) continue;
        if (c->hard[k].run == OBM_RUN_OVERLAY) return OBM_RUN_OVERLAY;
        for (int i = 0; i < c->hard[k].n; i++)
            if (!list_add(list, &c->hard[k].terms[i].mask)) return OBM_RUN_OVERLAY;
    }
    return list->n ? OBM_RUN_PLANES : OBM_RUN_BASE;
}

/* The place of a plane in the result's list, put in where it is missing; -1: the list is full. */
static int place_of(obm__route_masks *out, size_t plane) {
    int at = 0;
    while (at < out->n_planes && out->plane[at] != plane) at++;
    if (at == OBM_ROUTE_MASKS) return -1;
    if (at == out->n_planes) out->plane[out->n_planes++] = plane;
    return at;
}

static bool list_planes_of(const mask_list *list, obm__route_masks *out) {
    for (int i = 0; i < list->n; i++) {
        for (int j = 0; j < list->mask[i].n; j++)
            if (place_of(out, list->mask[i].plane[j]) < 0) return false;
    }
    for (int i = 1; i < out->n_planes; i++) {
        size_t plane = out->plane[i];
        int j = i;
        for (; j > 0 && plane < out->plane[j - 1]; j--) out->plane[j] = out->plane[j - 1];
        out->plane[j] = plane;
    }
    return true;
}

static void give(const mask_list *list, obm__route_masks *out) {
    *out = (obm__route_masks){.run = list->n ? OBM_RUN_PLANES : OBM_RUN_BASE};
    if (!list_planes_of(list, out)) {
        *out = (obm__route_masks){.run = OBM_RUN_OVERLAY};
        return;
    }
    out->n = list->n;
    for (int i = 0; i < list->n; i++) {
        out->c[i] = list->c[i];
        for (int j = 0; j < list->mask[i].n; j++)
            out->mask[i] |= (uint8_t)(1u << place_of(out, list->mask[i].plane[j]));
    }
}

obm_run obm__coefficients_masks(const obm__coefficients *c, const double *weights, int *n) {
    mask_list list;
    obm_run run = union_of(c, weights, &list);
    *n = run == OBM_RUN_PLANES ? list.n : 0;
    return run;
}

/* True if the mixture's mask comes in under these weights. */
static bool has_mask(const obm__coefficients *c, const double *weights, int mask) {
    const float *const *own = c->mix.c + (size_t)mask * c->n_tasks;
    for (size_t k = 0; k < c->n_tasks; k++)
        if (weights[k] != 0 && own[k]) return true;
    return false;
}

size_t obm__coefficients_room(const obm__coefficients *c, const double *weights) {
    mask_list list = {0};
    if (obm__route_hard(weights, c->n_tasks) != SIZE_MAX) return 0;
    if (!c->mix.c) return union_of(c, weights, &list) == OBM_RUN_PLANES ? (size_t)list.n * c->shape.count : 0;
    for (int i = 0; i < c->mix.all.n; i++) list.n += has_mask(c, weights, i);
    return (size_t)list.n * c->shape.count;
}

static const float *scales_of(const hard_route *h, const mask *m) {
    for (int i = 0; i < h->n; i++)
        if (!compare_masks(&h->terms[i].mask, m)) return h->terms[i].c;
    return NULL;
}

static obm_status fill_mixture(obm__coefficients *c, obm_error *err) {
    double every[OBM_ROUTE_TASKS];
    mixture *x = &c->mix;
    for (size_t k = 0; k < c->n_tasks; k++) every[k] = 1;
    if (union_of(c, every, &x->all) != OBM_RUN_PLANES) return OBM_OK;
    give(&x->all, &x->given);
    if (x->given.run != OBM_RUN_PLANES) return OBM_OK;
    x->c = obm__calloc((size_t)x->all.n * c->n_tasks, sizeof *x->c);
    if (!x->c) return obm__fail_nomem(err, (size_t)x->all.n * c->n_tasks * sizeof *x->c);
    for (int i = 0; i < x->all.n; i++) {
        for (size_t k = 0; k < c->n_tasks; k++)
            x->c[(size_t)i * c->n_tasks + k] = scales_of(&c->hard[k], &x->all.mask[i]);
    }
    return OBM_OK;
}

/* What tasks with a weight add to one mask, tasks in order. */
typedef struct addends {
    size_t n;
    double weight[OBM_ROUTE_TASKS];
    const float *c[OBM_ROUTE_TASKS];
} addends;

/* mask: of the mixture's, or -1 and m is looked for. */
static void find_addends(const obm__coefficients *c, const double *weights, int mask, const struct mask *m,
                         addends *out) {
    out->n = 0;
    for (size_t k = 0; k < c->n_tasks; k++) {
        if (weights[k] == 0) continue;
        const float *own = mask < 0 ? scales_of(&c->hard[k], m) : c->mix.c[(size_t)mask * c->n_tasks + k];
        if (!own) continue;
        out->weight[out->n] = weights[k];
        out->c[out->n++] = own;
    }
}

/* True if the sum is 0 everywhere: where tasks cancel, rounding to f32 may leave a trace of what they add. */
static bool cancels(const addends *a, size_t count, const float *sum) {
    for (size_t i = 0; i < count; i++) {
        double size = 0;
        for (size_t j = 0; sum[i] != 0 && j < a->n; j++) size += a->weight[j] * fabs((double)a->c[j][i]);
        if (fabs((double)sum[i]) > size * CANCELLED) return false;
    }
    return true;
}

/* mix_f32 of one coefficient, in place: a call would take longer. */
static float mix_number(const addends *a) {
    double sum = a->weight[0] * (double)a->c[0][0];
    for (size_t j = 1; j < a->n; j++) sum += a->weight[j] * (double)a->c[j][0];
    return (float)sum;
}

/* One mask of a mixture into room; *zero: it cancels. */
static obm_status mix_one(const obm__coefficients *c, const addends *a, float *room, bool *zero, obm_error *err) {
    const obm_kernels *k = c->pack->ctx->k;
    if (c->shape.count == 1) {
        *room = mix_number(a);
        if (!isfinite(*room)) return too_large(c, err);
        *zero = cancels(a, 1, room);
        return OBM_OK;
    }
    k->mix_f32(room, a->c, a->weight, a->n, c->shape.count);
    if (k->find_nonfinite(room, c->shape.count) < c->shape.count) return too_large(c, err);
    *zero = cancels(a, c->shape.count, room);
    return OBM_OK;
}

/* All masks of the mixture are there: nothing has to be put in order again. */
static obm_status mix_all(const obm__coefficients *c, const double *weights, float *room, obm__route_masks *out,
                          bool *done, obm_error *err) {
    addends a;
    bool zero = false;
    *out = c->mix.given;
    *done = false;
    for (int i = 0; i < out->n; i++, room += c->shape.count) {
        find_addends(c, weights, i, NULL, &a);
        if (!a.n) return OBM_OK;
        OBM_TRY(mix_one(c, &a, room, &zero, err));
        if (zero) return OBM_OK;
        out->c[i] = room;
    }
    *done = true;
    return OBM_OK;
}

static obm_status soft_route(const obm__coefficients *c, const double *weights, float *room, obm__route_masks *out,
                             obm_error *err) {
    mask_list all, used = {0};
    addends a;
    bool done = false, zero;
    if (c->mix.c) OBM_TRY(mix_all(c, weights, room, out, &done, err));
    if (done) return OBM_OK;
    *out = (obm__route_masks){.run = union_of(c, weights, &all)};
    if (out->run != OBM_RUN_PLANES) return OBM_OK;
    for (int i = 0; i < all.n; i++, room += c->shape.count) {
        find_addends(c, weights, -1, &all.mask[i], &a);
        OBM_TRY(mix_one(c, &a, room, &zero, err));
        if (zero) continue;
        used.mask[used.n] = all.mask[i];
        used.c[used.n++] = room;
    }
    give(&used, out);
    return OBM_OK;
}

obm_status obm__coefficients_route(const obm__coefficients *c, const double *weights, float *room,
                                   obm__route_masks *out, obm_error *err) {
    size_t hard = obm__route_hard(weights, c->n_tasks);
    if (hard == SIZE_MAX) return soft_route(c, weights, room, out, err);
    const hard_route *h = &c->hard[hard];
    mask_list list = {.n = h->n};
    *out = (obm__route_masks){.run = h->run};
    if (h->run != OBM_RUN_PLANES) return OBM_OK;
    for (int i = 0; i < h->n; i++) {
        list.mask[i] = h->terms[i].mask;
        list.c[i] = h->terms[i].c;
    }
    give(&list, out);
    return OBM_OK;
}
