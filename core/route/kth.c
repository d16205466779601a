/* Exact selection of the k-th magnitude in two counting passes over streamed values.  Does not decide what to do with
 * it. */
#include "kth.h"

#include <string.h>

enum { BUCKETS = 65536 };

obm_status obm__kth_begin(obm__kth *s, uint64_t k, obm_error *err) {
    *s = (obm__kth){.k = k};
    s->recent = obm__calloc(BUCKETS, sizeof *s->recent);
    s->count = obm__calloc(BUCKETS, sizeof *s->count);
    if (s->recent && s->count) return OBM_OK;
    obm__kth_end(s);
    return obm__fail_nomem(err, BUCKETS * (sizeof *s->recent + sizeof *s->count));
}

void obm__kth_end(obm__kth *s) {
    obm_free(s->recent);
    obm_free(s->count);
    s->recent = NULL;
    s->count = NULL;
}

static void flush(obm__kth *s) {
    for (size_t i = 0; i < BUCKETS; i++) s->count[i] += s->recent[i];
    memset(s->recent, 0, BUCKETS * sizeof *s->recent);
    s->pending = 0;
}

void obm__kth_add(obm__kth *s, const obm_kernels *k, const float *x, size_t n) {
    /* 32-bit counters are what the kernel has; a bucket of a 70B model can hold more. */
    if (s->pending + n > UINT32_MAX) flush(s);
    s->pending += n;
    if (s->pass == 0) {
        k->magnitude_histogram(s->recent, x, n);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = obm__magnitude_bits(x[i]);
        if (bits >> 16 == s->prefix) s->recent[bits & 0xffff]++;
    }
}

/* The bucket, from the top, in which the count reaches `rank`; *above: how many lie over it.  BUCKETS if it never does.
 */
static uint32_t find_bucket(const uint64_t *count, uint64_t rank, uint64_t *above) {
    uint64_t seen = 0;
    for (uint32_t i = BUCKETS; i-- > 0;) {
        if (seen + count[i] >= rank) {
            *above = seen;
            return i;
        }
        seen += count[i];
    }
    *above = seen;
    return BUCKETS;
}

void obm__kth_turn(obm__kth *s) {
    uint64_t above;
    flush(s);
    uint32_t bucket = find_bucket(s->count, s->k - s->above, &above);
    uint64_t held = bucket < BUCKETS ? s->count[bucket] : 0;
    memset(s->count, 0, BUCKETS * sizeof *s->count);
    if (s->pass == 0 && bucket < BUCKETS) {
        s->prefix = bucket;
        s->above = above;
    } else if (s->pass == 0) {
        /* Fewer values than k: every value is at or above +0, and no tie is refused. */
        s->prefix = UINT32_MAX;
        s->equal = s->ties = UINT64_MAX;
    } else if (s->prefix != UINT32_MAX) {
        s->threshold = s->prefix << 16 | bucket;
        s->equal = s->k - s->above - above;
        s->ties = held;
    }
    s->pass++;
}
