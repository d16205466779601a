/* What the kernel tests share: buffers that end at an unmapped page, pseudo-random inputs, the loop over the tables
 * that this machine can run. */
#ifndef OBM_KERNEL_FIXTURE_H
#define OBM_KERNEL_FIXTURE_H

#include "kernels.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

/* ---- buffers that end at a guard page ---- */

typedef struct guarded {
    uint8_t *map, *end;
    size_t mapped;
} guarded;

static inline guarded guarded_new(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), data = (bytes + page - 1) / page * page + page;
    guarded g = {.mapped = data + page};
    g.map = mmap(NULL, g.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(g.map != MAP_FAILED);
    g.end = g.map + data;
    assert_int_equal(mprotect(g.end, page, PROT_NONE), 0);
    return g;
}
static inline void *at_end(const guarded *g, size_t bytes) { return g->end - bytes; }
static inline void guarded_free(guarded *g) { munmap(g->map, g->mapped); }

/* ---- inputs ---- */

static uint64_t state = 88172645463325252u;
static inline uint64_t next_random(void) { /* xorshift64* (Vigna, 2016) */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717u;
}
static inline float from_bits(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline uint32_t bits_of(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
static inline float uniform(void) { return (float)((double)(next_random() >> 11) * 0x1p-52 - 1); }

enum { PLAIN = 1, ZEROS = 2, DENORMALS = 4, INFINITE = 8, NOT_A_NUMBER = 16 };
static inline float draw(int kinds) {
    unsigned pick = (unsigned)(next_random() % 16);
    if ((kinds & ZEROS) && pick < 3) return pick & 1 ? 0.0f : -0.0f;
    if ((kinds & DENORMALS) && pick == 3) return from_bits((uint32_t)next_random() & 0x807fffff);
    if ((kinds & INFINITE) && pick == 4) return next_random() & 1 ? INFINITY : -INFINITY;
    if ((kinds & NOT_A_NUMBER) && pick == 5) return from_bits((uint32_t)next_random() | 0x7fa00000);
    return uniform() * (pick == 6 ? 1e6f : 0.02f);
}
static inline void fill(float *x, size_t n, int kinds) {
    for (size_t i = 0; i < n; i++) x[i] = draw(kinds);
}

static inline const obm_kernels *scalar_table(void) { return obm_kernels_find("scalar"); }

/* ONEBITMERGE_TEST_ISA=name, only that table, is for emulators, under which the others would take most of the time. */
static inline bool table_wanted(const obm_kernels *k) {
    const char *only = getenv("ONEBITMERGE_TEST_ISA");
    assert_true(!only || obm_kernels_find(only));
    return !only || !strcmp(only, k->isa);
}
#define EACH_TABLE(k)                                                                    \
    for (const obm_kernels *const *p_ = obm_kernels_list(), *k; (k = *p_) != NULL; p_++) \
        if (table_wanted(k))

#endif
