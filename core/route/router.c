/*
 * The built-in router: training with a held-out split, its report, and its way into the pack and back.
 *
 * The model that is stored is the one that was fitted on the training part and measured on the held-out part: the
 * report is about this model, not about a better-fed sibling that nobody measured.
 */
#include "router.h"

#include "regression.h"

#include <math.h>
#include <string.h>

#define DEFAULT_L2 1e-2
#define DEFAULT_HOLDOUT 0.2
#define CALIBRATION_BINS 10

void obm__router_free(obm__router *r) {
    if (!r) return;
    obm_free(r->mean);
    obm_free(r->scale);
    obm_free(r->weight);
    obm_free(r->bias);
    obm_free(r);
}

static obm_status router_alloc(int64_t width, size_t tasks, obm__router **out, obm_error *err) {
    obm__router *r = obm__calloc(1, sizeof *r);
    if (!r) return obm__fail_nomem(err, sizeof *r);
    *r = (obm__router){.width = width, .tasks = tasks};
    r->mean = obm__alloc((size_t)width, sizeof *r->mean);
    r->scale = obm__alloc((size_t)width, sizeof *r->scale);
    r->weight = obm__alloc(tasks, (size_t)width * sizeof *r->weight);
    r->bias = obm__alloc(tasks, sizeof *r->bias);
    if (!r->mean || !r->scale || !r->weight || !r->bias) {
        obm__router_free(r);
        return obm__fail_nomem(err, tasks * (size_t)width * sizeof *r->weight);
    }
    *out = r;
    return OBM_OK;
}

void obm__router_probabilities(const obm__router *r, const float *features, double *probabilities) {
    obm__regression_apply(features, (size_t)r->width, r->tasks, r->mean, r->scale, r->weight, r->bias, probabilities);
}

size_t obm__router_argmax(const double *probabilities, size_t tasks) {
    size_t best = 0;
    for (size_t k = 1; k < tasks; k++) {
        if (probabilities[k] > probabilities[best]) best = k;
    }
    return best;
}

/* ---- the split ---- */

/* SplitMix64 (Steele, Lea & Flood, Fast splittable pseudorandom number generators, figure 17). */
static uint64_t next_random(uint64_t *state) {
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static void shuffle(uint32_t *items, size_t n, uint64_t *state) {
    for (size_t i = n; i > 1; i--) {
        size_t j = (size_t)(next_random(state) % i);
        uint32_t swap = items[i - 1];
        items[i - 1] = items[j];
        items[j] = swap;
    }
}

static size_t held_out_of(size_t n, double holdout) {
    size_t held = (size_t)(holdout * (double)n + 0.5);
    if (held < 1) return 1;
    return held < n ? held : n - 1;
}

/* Task by task: shuffled by (seed, task), the first share is held out.  train and held: room for n each. */
static void split_task(const uint32_t *label, size_t n, uint32_t task, const obm__holdout_options *o, uint32_t *scratch,
                       obm__holdout *s) {
    size_t count = 0;
    uint64_t state = o->seed + task * 0x9e3779b97f4a7c15u;
    for (size_t i = 0; i < n; i++) {
        if (label[i] == task) scratch[count++] = (uint32_t)i;
    }
    shuffle(scratch, count, &state);
    size_t held = held_out_of(count, o->holdout);
    for (size_t i = 0; i < count; i++) {
        if (i < held)
            s->held[s->n_held++] = scratch[i];
        else
            s->train[s->n_train++] = scratch[i];
    }
}

obm_status obm__holdout_new(const uint32_t *label, size_t n, size_t tasks, const obm__holdout_options *o,
                            obm__holdout *out, obm_error *err) {
    obm__holdout s = {.train = obm__calloc(n, sizeof *s.train), .held = obm__calloc(n, sizeof *s.held)};
    uint32_t *scratch = obm__calloc(n, sizeof *scratch);
    if (!s.train || !s.held || !scratch) {
        obm__holdout_clear(&s);
        obm_free(scratch);
        return obm__fail_nomem(err, n * sizeof *scratch);
    }
    for (size_t k = 0; k < tasks; k++) split_task(label, n, (uint32_t)k, o, scratch, &s);
    obm_free(scratch);
    *out = s;
    return OBM_OK;
}

void obm__holdout_clear(obm__holdout *s) {
    obm_free(s->train);
    obm_free(s->held);
    *s = (obm__holdout){0};
}

/* ---- the report ---- */

/* Expected calibration error (Guo et al., On calibration of modern neural networks, equation 3): examples by confidence
 * in ten equal bins, |accuracy - mean confidence| weighted by their share. */
typedef struct calibration {
    double confidence[CALIBRATION_BINS];
    size_t correct[CALIBRATION_BINS], count[CALIBRATION_BINS];
} calibration;

static void calibration_add(calibration *c, double confidence, bool correct) {
    int bin = (int)(confidence * CALIBRATION_BINS);
    if (bin >= CALIBRATION_BINS) bin = CALIBRATION_BINS - 1;
    c->confidence[bin] += confidence;
    c->correct[bin] += correct;
    c->count[bin]++;
}

static double calibration_error(const calibration *c, size_t n) {
    double sum = 0;
    for (int i = 0; i < CALIBRATION_BINS; i++) sum += fabs((double)c->correct[i] - c->confidence[i]);
    return n ? sum / (double)n : 0;
}

void obm__router_measure(const obm__router *r, const float *features, const uint32_t *label, const obm__holdout *s,
                         obm_router_report *out) {
    calibration c = {{0}, {0}, {0}};
    double probabilities[OBM_MAX_REPORT_TASKS];
    size_t correct = 0;
    *out = (obm_router_report){.layer = r->layer, .tasks = r->tasks, .n_train = s->n_train, .n_held_out = s->n_held};
    for (size_t i = 0; i < s->n_held; i++) {
        uint32_t at = s->held[i];
        obm__router_probabilities(r, features + (size_t)at * (size_t)r->width, probabilities);
        size_t predicted = obm__router_argmax(probabilities, r->tasks);
        bool right = predicted == label[at];
        out->confusion[label[at]][predicted]++;
        correct += right;
        calibration_add(&c, probabilities[predicted], right);
    }
    out->accuracy = s->n_held ? (double)correct / (double)s->n_held : 0;
    out->calibration_error = calibration_error(&c, s->n_held);
}

obm_status obm__router_fit(obm_context *ctx, const float *features, int64_t width, const uint32_t *label, size_t n,
                           size_t tasks, int layer, const obm_router_options *options, obm__router **out,
                           obm_error *err) {
    double l2 = OBM_OPT(options, obm_router_options, l2, 0), holdout = OBM_OPT(options, obm_router_options, holdout, 0);
    obm__holdout_options how = {holdout == 0 ? DEFAULT_HOLDOUT : holdout,
                                OBM_OPT(options, obm_router_options, seed, 0)};
    obm__pulse pulse = obm__pulse_new(ctx, OBM_OPT(options, obm_router_options, progress, NULL),
                                      OBM_OPT(options, obm_router_options, progress_user, NULL), "train", 0);
    obm__regression_options o = {l2 == 0 ? DEFAULT_L2 : l2, pulse.fn, pulse.user};
    obm__router *r = NULL;
    obm__holdout split = {0};
    OBM_TRY(router_alloc(width, tasks, &r, err));
    r->layer = layer;
    obm_status status = obm__holdout_new(label, n, tasks, &how, &split, err);
    if (status == OBM_OK) {
        obm__examples e = {features, label, split.train, split.n_train, (size_t)width, tasks};
        obm__standardise(&e, r->mean, r->scale);
        status = obm__regression_fit(ctx, &e, r->mean, r->scale, &o, r->weight, r->bias, err);
    }
    if (status == OBM_OK) obm__router_measure(r, features, label, &split, &r->report);
    obm__holdout_clear(&split);
    if (status == OBM_OK)
        *out = r;
    else
        obm__router_free(r);
    return status;
}

/* ---- checks of what the caller gave ---- */

static obm_status check_options(const obm_router_options *options, obm_error *err) {
    double l2 = OBM_OPT(options, obm_router_options, l2, 0), holdout = OBM_OPT(options, obm_router_options, holdout, 0);
    if (!(l2 >= 0) || isinf(l2))
        return obm__fail(err, OBM_E_ARG, "router: l2 is %g, expected a finite number >= 0", l2);
    if (!(holdout >= 0 && holdout < 1))
        return obm__fail(err, OBM_E_ARG, "router: holdout is %g, expected 0 <= holdout < 1", holdout);
    return OBM_OK;
}

static obm_status label_of(const obm_pack *p, const char *task, size_t example, uint32_t *label, obm_error *err) {
    for (size_t k = 0; task && k < p->n_experts; k++) {
        if (strcmp(p->experts[k].name, task)) continue;
        *label = (uint32_t)k;
        return OBM_OK;
    }
    return obm__fail(err, OBM_E_NOTFOUND, "router: example %zu is of task %.64s, which pack %s does not have", example,
                     task ? task : "NULL", p->path);
}

static obm_status fill_labels(const obm_pack *p, const char *const *task, size_t n, uint32_t *label, obm_error *err) {
    size_t count[OBM_MAX_REPORT_TASKS] = {0};
    for (size_t i = 0; i < n; i++) {
        OBM_TRY(label_of(p, task[i], i, &label[i], err));
        count[label[i]]++;
    }
    for (size_t k = 0; k < p->n_experts; k++) {
        if (count[k] < 2)
            return obm__fail(err, OBM_E_ARG, "router: task %s has %zu examples, expected at least 2",
                             p->experts[k].name, count[k]);
    }
    return OBM_OK;
}

/* ---- into the pack ---- */

static obm_json *confusion_json(const obm_router_report *r) {
    obm_json *rows = obm__json_new_array();
    for (size_t i = 0; i < r->tasks; i++) {
        obm_json *row = obm__json_new_array();
        bool ok = true;
        for (size_t j = 0; j < r->tasks; j++) ok = obm__json_append(row, obm__json_new_int(r->confusion[i][j])) && ok;
        if (!obm__json_append(rows, row) || !ok) {
            obm__json_free(rows);
            return NULL;
        }
    }
    return rows;
}

static obm_json *tasks_json(const obm_pack *p) {
    obm_json *names = obm__json_new_array();
    for (size_t k = 0; k < p->n_experts; k++) {
        if (obm__json_append(names, obm__json_new_string(p->experts[k].name))) continue;
        obm__json_free(names);
        return NULL;
    }
    return names;
}

static obm_json *report_json(const obm_pack *p, const obm__router *r) {
    const obm_router_report *report = &r->report;
    obm_json *o = obm__json_new_object();
    bool ok = obm__json_set(o, "layer", obm__json_new_int(r->layer));
    ok &= obm__json_set(o, "tasks", tasks_json(p));
    ok &= obm__json_set(o, "n_train", obm__json_new_int((int64_t)report->n_train));
    ok &= obm__json_set(o, "n_held_out", obm__json_new_int((int64_t)report->n_held_out));
    ok &= obm__json_set(o, "accuracy", obm__json_new_real(report->accuracy));
    ok &= obm__json_set(o, "calibration_error", obm__json_new_real(report->calibration_error));
    ok &= obm__json_set(o, "confusion", confusion_json(report));
    if (ok) return o;
    obm__json_free(o);
    return NULL;
}

static obm_status store(obm_pack *p, const obm__router *r, obm_error *err) {
    obm__named_array arrays[] = {
        {"bias", r->bias, 1, {(int64_t)r->tasks}},
        {"mean", r->mean, 1, {r->width}},
        {"scale", r->scale, 1, {r->width}},
        {"weight", r->weight, 2, {(int64_t)r->tasks, r->width}},
    };
    obm_json *report = report_json(p, r);
    if (!report) return obm__fail_nomem(err, 0);
    return obm__pack_write_router(p, arrays, sizeof arrays / sizeof *arrays, report, err);
}

/* *features owned, (n, *width). */
static obm_status collect_features(const obm_pack *p, const obm_prompt *prompts, size_t n, int layer,
                                   const obm_router_options *o, float **features, int64_t *width, obm_error *err) {
    obm_model *m;
    obm_model_info info;
    obm_model_options how = OBM_INIT(obm_model_options);
    how.progress = OBM_OPT(o, obm_router_options, progress, NULL);
    how.progress_user = OBM_OPT(o, obm_router_options, progress_user, NULL);
    OBM_TRY(obm_model_open(p->ctx, p->base->path, &how, &m, err));
    obm_model_describe(m, &info);
    float *x = obm__alloc(n, (size_t)info.hidden * sizeof *x);
    size_t count = n * (size_t)info.hidden, bad = count;
    obm_status status = x ? obm_model_embed(m, prompts, n, layer, OBM_OPT(o, obm_router_options, progress, NULL),
                                            OBM_OPT(o, obm_router_options, progress_user, NULL), x, err)
                          : obm__fail_nomem(err, n * (size_t)info.hidden * sizeof *x);
    obm_model_free(m);
    if (status == OBM_OK) bad = p->ctx->k->find_nonfinite(x, count);
    if (status == OBM_OK && bad < count)
        status = obm__fail(err, OBM_E_VALUE, "router: example %zu: the base's hidden states are not finite",
                           bad / (size_t)info.hidden);
    if (status != OBM_OK) {
        obm_free(x);
        return status;
    }
    *features = x;
    *width = info.hidden;
    return OBM_OK;
}

static obm_status train(obm_pack *p, const obm_prompt *prompts, const char *const *task, size_t n,
                        const obm_router_options *o, uint32_t *label, obm__router **out, obm_error *err) {
    int layer = OBM_OPT(o, obm_router_options, layer, 0);
    float *features;
    int64_t width;
    OBM_TRY(fill_labels(p, task, n, label, err));
    OBM_TRY(collect_features(p, prompts, n, layer, o, &features, &width, err));
    obm_status status = obm__router_fit(p->ctx, features, width, label, n, p->n_experts, layer, o, out, err);
    obm_free(features);
    return status;
}

static obm_status train_in_use(obm_pack *p, const obm_prompt *prompts, const char *const *task, size_t n,
                               const obm_router_options *o, uint32_t *label, obm__router **out, obm_error *err) {
    OBM_TRY(obm__pack_use(p, err));
    obm_status status = train(p, prompts, task, n, o, label, out, err);
    obm__pack_unuse(p);
    return status;
}

/* Takes r over on success. */
static obm_status exchange(obm_pack *p, uint64_t revision, obm__router *r, obm_error *err) {
    OBM_TRY(obm__pack_claim(p, err));
    obm_status status = p->revision == revision
                            ? store(p, r, err)
                            : obm__fail(err, OBM_E_BUSY, "pack %s was changed while its router was trained", p->path);
    if (status == OBM_OK) {
        obm__router_free(p->router);
        p->router = r;
    }
    obm__pack_unclaim(p);
    return status;
}

obm_status obm_router_train(obm_pack *p, const obm_prompt *prompts, const char *const *task, size_t n,
                            const obm_router_options *options, obm_router_report *report, obm_error *err) {
    obm__router *r = NULL;
    OBM_TRY(OBM_CHECK(obm_router_options, options, err));
    OBM_TRY(check_options(options, err));
    if (n > UINT32_MAX) return obm__fail(err, OBM_E_ARG, "router: %zu examples, expected at most %u", n, UINT32_MAX);
    if (p->n_experts > OBM_MAX_REPORT_TASKS)
        return obm__fail(err, OBM_E_UNSUPPORTED, "router: %zu tasks, at most %d are possible", p->n_experts,
                         OBM_MAX_REPORT_TASKS);
    OBM_TRY(obm__pack_idle(p, err));
    uint64_t revision = p->revision;
    uint32_t *label = obm__calloc(n, sizeof *label);
    if (!label) return obm__fail_nomem(err, n * sizeof *label);
    obm_status status = train_in_use(p, prompts, task, n, options, label, &r, err);
    obm_free(label);
    if (status == OBM_OK) status = exchange(p, revision, r, err);
    if (status != OBM_OK) {
        obm__router_free(r);
        return status;
    }
    if (report) *report = r->report;
    return OBM_OK;
}

obm_status obm__fail_no_router(const obm_pack *p, obm_error *err) {
    return obm__fail(
        err, OBM_E_NOTFOUND,
        "pack %.300s has no router: `onebitmerge router train PACK --data FILE` trains one (train_router in "
        "Python and Lua, obm_router_train in C); without one, give a route or a router of your own",
        p->path);
}

obm_status obm_pack_router_report(const obm_pack *p, obm_router_report *out, obm_error *err) {
    if (!p->router) return obm__fail_no_router(p, err);
    *out = p->router->report;
    return OBM_OK;
}
