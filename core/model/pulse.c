/* Progress and Ctrl-C inside long calls: one callback at a bounded rate, on the caller's thread. */
#include "model.h"

#include <time.h>

#define PERIOD_NS 50000000u   /* half of the 100 ms in which a long call must notice Ctrl-C */

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static obm_status report(obm__pulse *p, uint64_t time, obm_error *err) {
    p->last = time;
    if (!p->fn(p->user, p->what, p->done, p->total)) return OBM_OK;
    return obm__fail(err, OBM_E_USER, "%s: stopped by the progress callback", p->what);
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
