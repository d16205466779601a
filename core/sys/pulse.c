/* Progress and Ctrl-C inside long calls: one callback at a bounded rate, on the caller's thread, and work cut into
 * slices between which it is asked. */
#include "sys.h"

#include <time.h>

#define PERIOD_NS 50000000u   /* half of the 100 ms in which a long call must notice Ctrl-C */

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The context's interrupt in the form of a progress callback. */
static int ask_context(void *user, const char *what, uint64_t done, uint64_t total) {
    const obm_context *ctx = user;
    (void)what, (void)done, (void)total;
    return ctx->interrupt(ctx->interrupt_user);
}

obm__pulse obm__pulse_new(const obm_context *ctx, obm_progress_fn fn, void *user, const char *what, uint64_t total) {
    if (!fn && ctx && ctx->interrupt) {
        fn = ask_context;
        user = (void *)ctx;
    }
    return (obm__pulse){.fn = fn, .user = user, .what = what, .total = total};
}

static obm_status report(obm__pulse *p, uint64_t time, obm_error *err) {
    p->last = time;
    if (!p->fn(p->user, p->what, p->done, p->total)) return OBM_OK;
    return obm__fail(err, OBM_E_USER, p->fn == ask_context ? "%s: interrupted" : "%s: stopped by the progress callback",
                     p->what);
}

obm_status obm__pulse_check(obm__pulse *p, obm_error *err) {
    if (!p || !p->fn) return OBM_OK;
    uint64_t time = now();
    return time - p->last < PERIOD_NS ? OBM_OK : report(p, time, err);
}

obm_status obm__pulse_done(obm__pulse *p, uint64_t done, obm_error *err) {
    if (!p) return OBM_OK;
    p->done = done;
    return p->fn ? report(p, now(), err) : OBM_OK;
}

/* ---- slices ---- */

/* Part k of n of the items of every node. */
static void part_of(const obm__lanes *s, size_t k, size_t n, obm__lanes *out) {
    out->n = s->n;
    for (int i = 0; i < s->n; i++) {
        size_t items = s->end[i] - s->begin[i], each = items / n,
               more = items % n; /* the first `more` parts have one more */
        out->begin[i] = s->begin[i] + each * k + (k < more ? k : more);
        out->end[i] = out->begin[i] + each + (k < more);
    }
}

obm_status obm__parallel_parts(obm_context *ctx, const obm__lanes *whole, size_t parts, size_t grain, obm__range_fn fn,
                               void *arg, obm__pulse *pulse, obm_error *err) {
    obm__lanes part;
    for (size_t k = 0; k < parts; k++) {
        part_of(whole, k, parts, &part);
        obm__parallel_lanes(ctx, &part, grain, fn, arg);
        OBM_TRY(obm__pulse_check(pulse, err));
    }
    return OBM_OK;
}

obm_status obm__parallel_slices(obm_context *ctx, size_t n, size_t grain, size_t size, obm__range_fn fn, void *arg,
                                obm__pulse *pulse, obm_error *err) {
    obm__lanes whole = {.n = 1, .end = {n}};
    return obm__parallel_parts(ctx, &whole, n / size + (n % size != 0), grain, fn, arg, pulse, err);
}

/* ---- long items ---- */

obm_status obm__watched(void (*fn)(void *), void *arg, _Atomic int *stop, obm__pulse *pulse, obm_error *err) {
    obm_status status;
    obm__task *task;
    bool done;
    if (!pulse || !pulse->fn) {
        fn(arg);
        return OBM_OK;
    }
    OBM_TRY(obm__task_start(fn, arg, &task, err));
    do {
        done = obm__task_wait(task, 10);
        status = obm__pulse_check(pulse, err);
    } while (!done && status == OBM_OK);
    if (status != OBM_OK) *stop = 1;
    obm__task_join(task);
    return status;
}
