/* Coefficients of all matrices of a pack, routes over them, and what `pack show` says of them.  The arithmetic is in
 * masks.c. */
#include "masks.h"

#include "plan.h"

#include <string.h>

struct obm__coefficient_cache {
    const obm_pack *pack;
    obm__coefficients **at; /* (n_tensors) */
    size_t n;
};

struct obm__planes_route {
    const obm_pack *pack;
    obm__route_masks *at; /* (n_tensors) */
    size_t *first;        /* (n_tensors) where a matrix's room begins */
    size_t n;
    float *room;
    size_t n_room;
};

/* ---- the cache ---- */

/* Matrices fail independently; the first in order is reported, whatever the partition. */
typedef struct failure {
    obm_status status;
    obm_error err;
} failure;

typedef struct fill_job {
    obm__coefficient_cache *cache;
    failure *failed; /* (n) */
    _Atomic int stop;
} fill_job;

static void run_fill(void *arg, size_t begin, size_t end, int worker) {
    fill_job *job = arg;
    (void)worker;
    for (size_t t = begin; t < end; t++)
        job->failed[t].status =
            obm__coefficients_new(job->cache->pack, t, &job->stop, &job->cache->at[t], &job->failed[t].err);
}

static void fill_all(void *arg) {
    fill_job *job = arg;
    obm__parallel(job->cache->pack->ctx, job->cache->n, 1, run_fill, job);
}

static obm_status first_failure(const failure *failed, size_t n, obm_error *err) {
    for (size_t t = 0; t < n; t++) {
        if (failed[t].status == OBM_OK) continue;
        if (err) *err = failed[t].err;
        return failed[t].status;
    }
    return OBM_OK;
}

static obm_status fill_cache(obm__coefficient_cache *s, obm__pulse *pulse, obm_error *err) {
    fill_job job = {.cache = s, .failed = obm__calloc(s->n + 1, sizeof *job.failed)};
    s->at = obm__calloc(s->n + 1, sizeof *s->at);
    obm_status status = OBM_OK;
    if (!s->at || !job.failed) {
        status = obm__fail_nomem(err, s->n * sizeof *job.failed);
    } else {
        status = obm__watched(fill_all, &job, &job.stop, pulse, err);
        if (status == OBM_OK) status = first_failure(job.failed, s->n, err);
    }
    obm_free(job.failed);
    return status;
}

obm_status obm__coefficient_cache_new(const obm_pack *p, obm__pulse *pulse, obm__coefficient_cache **out,
                                      obm_error *err) {
    obm__coefficient_cache *s = obm__calloc(1, sizeof *s);
    if (!s) return obm__fail_nomem(err, sizeof *s);
    s->pack = p;
    s->n = p->n_tensors;
    obm_status status = fill_cache(s, pulse, err);
    if (status != OBM_OK) {
        obm__coefficient_cache_free(s);
        return status;
    }
    *out = s;
    return OBM_OK;
}

void obm__coefficient_cache_free(obm__coefficient_cache *s) {
    if (!s) return;
    for (size_t t = 0; s->at && t < s->n; t++) obm__coefficients_free(s->at[t]);
    obm_free(s->at);
    obm_free(s);
}

const obm__coefficients *obm__coefficient_cache_at(const obm__coefficient_cache *s, size_t tensor) {
    return s->at[tensor];
}

size_t obm__coefficient_cache_bytes(const obm__coefficient_cache *s) {
    size_t bytes = sizeof *s + s->n * sizeof *s->at;
    for (size_t t = 0; t < s->n; t++) bytes += s->at[t] ? obm__coefficients_bytes(s->at[t]) : 0;
    return bytes;
}

/* ---- a route ---- */

/* Below this many coefficients waking the workers costs more than they save. */
#define ALONE 65536

typedef struct route_job {
    const obm__coefficient_cache *cache;
    const double *weights;
    obm__planes_route *route;
    _Atomic int failed;
} route_job;

static obm_status route_one(const route_job *job, size_t t, obm_error *err) {
    if (!job->cache->at[t]) return OBM_OK;
    float *room = job->route->room ? job->route->room + job->route->first[t] : NULL;
    return obm__coefficients_route(job->cache->at[t], job->weights, room, &job->route->at[t], err);
}

static void run_route(void *arg, size_t begin, size_t end, int worker) {
    route_job *job = arg;
    (void)worker;
    for (size_t t = begin; t < end; t++)
        if (route_one(job, t, NULL) != OBM_OK) job->failed = 1;
}

/* Memory that is large enough stays. */
static obm_status make_room(route_job *job, obm_error *err) {
    obm__planes_route *r = job->route;
    size_t n = 0;
    for (size_t t = 0; t < r->n; t++) {
        r->first[t] = n;
        size_t own = job->cache->at[t] ? obm__coefficients_room(job->cache->at[t], job->weights) : 0;
        if (!obm__add(n, own, &n)) return obm__fail_nomem(err, UINT64_MAX);
    }
    if (n <= r->n_room) return OBM_OK;
    obm_free(r->room);
    r->n_room = 0;
    r->room = obm__alloc(n, sizeof *r->room);
    if (!r->room) return obm__fail_nomem(err, n * sizeof *r->room);
    r->n_room = n;
    return OBM_OK;
}

static obm_status fill_route(route_job *job, obm_error *err) {
    obm_context *ctx = job->cache->pack->ctx;
    size_t n = job->route->n;
    OBM_TRY(make_room(job, err));
    if (job->route->n_room < ALONE)
        run_route(job, 0, n, 0);
    else
        obm__parallel(ctx, n, 1, run_route, job);
    /* Once more for the message of the first that failed. */
    for (size_t t = 0; job->failed && t < n; t++) OBM_TRY(route_one(job, t, err));
    return OBM_OK;
}

static obm_status route_alloc(const obm__coefficient_cache *s, obm__planes_route **out, obm_error *err) {
    size_t n = s->n;
    obm__planes_route *r = obm__calloc(1, sizeof *r);
    if (!r) return obm__fail_nomem(err, sizeof *r);
    r->pack = s->pack;
    r->n = n;
    r->at = obm__calloc(n + 1, sizeof *r->at);
    r->first = obm__calloc(n + 1, sizeof *r->first);
    *out = r;
    if (r->at && r->first) return OBM_OK;
    obm__planes_route_free(r);
    return obm__fail_nomem(err, n * sizeof *r->at);
}

obm_status obm__planes_route_renew(obm__planes_route *old, const obm__coefficient_cache *s, const double *weights,
                                   obm__planes_route **out, obm_error *err) {
    obm__planes_route *r = old && old->pack == s->pack && old->n == s->n ? old : NULL;
    if (old && !r) obm__planes_route_free(old);
    if (!r) OBM_TRY(route_alloc(s, &r, err)); /* an old one has entries where a new one has: nothing to clear */
    route_job job = {.cache = s, .weights = weights, .route = r};
    obm_status status = obm__route_check(s->pack, weights, err);
    if (status == OBM_OK) status = fill_route(&job, err);
    if (status == OBM_OK)
        *out = r;
    else
        obm__planes_route_free(r);
    return status;
}

void obm__planes_route_free(obm__planes_route *r) {
    if (!r) return;
    obm_free(r->at);
    obm_free(r->first);
    obm_free(r->room);
    obm_free(r);
}

const obm__route_masks *obm__planes_route_at(const obm__planes_route *r, size_t tensor) { return &r->at[tensor]; }

size_t obm__planes_route_bytes(const obm__planes_route *r) {
    return sizeof *r + r->n * (sizeof *r->at + sizeof *r->first) + r->n_room * sizeof *r->room;
}

/* ---- how the tensors of a pack run ---- */

const char *obm_run_name(obm_run run) {
    static const char *const names[] = {"base", "planes", "overlay"};
    return run >= OBM_RUN_BASE && run <= OBM_RUN_OVERLAY ? names[run] : "unknown";
}

typedef struct report_job {
    const obm_pack *pack;
    obm__route_plan **plans; /* (n_experts + 1): the hard routes, and one of all experts */
    double *weights;         /* (n_experts + 1, n_experts) */
    obm_tensor_run *out;
    failure *failed; /* (n_tensors) */
    _Atomic int stop;
} report_job;

static obm_run run_under(const report_job *job, const obm__coefficients *c, size_t tensor, size_t route, int *masks) {
    *masks = 0;
    if (!obm__route_changes(job->plans[route], tensor)) return OBM_RUN_BASE;
    if (!c) return OBM_RUN_OVERLAY;
    return obm__coefficients_masks(c, job->weights + route * job->pack->n_experts, masks);
}

static obm_status report_tensor(report_job *job, size_t t, obm_error *err) {
    obm__coefficients *c;
    size_t n = job->pack->n_experts;
    OBM_TRY(obm__coefficients_new(job->pack, t, &job->stop, &c, err));
    obm_tensor_run r = {.name = job->pack->tensors[t].name, .cls = job->pack->tensors[t].cls};
    if (c) obm__coefficients_planes(c, &r.planes);
    for (size_t k = 0; k < n; k++) {
        int masks;
        obm_run run = run_under(job, c, t, k, &masks);
        r.overlays += run == OBM_RUN_OVERLAY;
        if (run > r.hard) r.hard = run;
        if (masks > r.hard_masks) r.hard_masks = masks;
    }
    r.soft = run_under(job, c, t, n, &r.soft_masks);
    obm__coefficients_free(c);
    job->out[t] = r;
    return OBM_OK;
}

static void run_report(void *arg, size_t begin, size_t end, int worker) {
    report_job *job = arg;
    (void)worker;
    for (size_t t = begin; t < end; t++) job->failed[t].status = report_tensor(job, t, &job->failed[t].err);
}

static void report_tensors(void *arg) {
    report_job *job = arg;
    obm__parallel(job->pack->ctx, job->pack->n_tensors, 1, run_report, job);
}

static obm_status plan_routes(report_job *job, obm_error *err) {
    size_t n = job->pack->n_experts;
    for (size_t route = 0; route <= n; route++) {
        double *weights = job->weights + route * n;
        for (size_t k = 0; k < n; k++) weights[k] = route == k ? 1 : route == n ? 1.0 / (double)n : 0;
        OBM_TRY(obm__route_plan_new(job->pack, weights, OBM_ROUTE_NONE, NULL, &job->plans[route], err));
    }
    return OBM_OK;
}

static obm_status report_all(const obm_pack *p, obm_tensor_run *out, obm_error *err) {
    size_t n = p->n_experts;
    obm__pulse pulse = obm__pulse_new(p->ctx, NULL, NULL, "runs", 1);
    report_job job = {.pack = p,
                      .plans = obm__calloc(n + 1, sizeof *job.plans),
                      .weights = obm__calloc((n + 1) * (n + 1), sizeof *job.weights),
                      .out = out,
                      .failed = obm__calloc(p->n_tensors + 1, sizeof *job.failed)};
    obm_status status = OBM_OK;
    if (!job.plans || !job.weights || !job.failed) OBM_GO(obm__fail_nomem(err, p->n_tensors * sizeof *job.failed));
    OBM_GO(plan_routes(&job, err));
    OBM_GO(obm__watched(report_tensors, &job, &job.stop, &pulse, err));
    status = first_failure(job.failed, p->n_tensors, err);
done:
    for (size_t i = 0; job.plans && i <= n; i++) obm__route_plan_free(job.plans[i]);
    obm_free(job.plans);
    obm_free(job.weights);
    obm_free(job.failed);
    return status;
}

obm_status obm_pack_runs(const obm_pack *p, obm_tensor_run *out, obm_error *err) {
    OBM_TRY(obm__pack_use(p, err));
    obm_status status = report_all(p, out, err);
    obm__pack_unuse(p);
    return status;
}
