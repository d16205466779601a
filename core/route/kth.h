/* The exact k-th magnitude of values that stream by (full tensors, and differences of task vectors), by counting on
 * bits. */
#ifndef OBM_KTH_H
#define OBM_KTH_H

#include "../sys/sys.h"

/*
 * Two passes over the same values: add all, turn, add all again, turn.  Afterwards the k largest magnitudes are those
 * above `threshold` and the first `equal` ones that are equal to it (ties go by lowest index).  Values must be finite.
 */
typedef struct obm__kth {
    uint64_t k;         /* wanted; at least the number of values: all are kept */
    int pass;           /* 0: upper 15 bits; 1: lower 16 bits of those in the bucket; 2: done */
    uint32_t prefix;    /* the bucket of the k-th magnitude */
    uint64_t above;     /* values in buckets above it */
    uint32_t threshold; /* f32 bits of the k-th magnitude, sign cleared */
    uint64_t equal;     /* how many with exactly these bits are kept, */
    uint64_t ties;      /* of this many */
    uint32_t *recent;   /* (65536) counts since the last flush */
    uint64_t *count;    /* (65536) */
    uint64_t pending;
} obm__kth;

obm_status obm__kth_begin(obm__kth *s, uint64_t k, obm_error *err);
void obm__kth_add(obm__kth *s, const obm_kernels *k, const float *x, size_t n);
void obm__kth_turn(obm__kth *s);
void obm__kth_end(obm__kth *s); /* frees; threshold and equal stay */

/* f32 bits with the sign cleared: they order like magnitudes. */
static inline uint32_t obm__magnitude_bits(float x) {
    union {
        float f;
        uint32_t u;
    } bits = {.f = x};
    return bits.u & 0x7fffffffu;
}

#endif
