/* Which tables this CPU and operating system can run.  The policy (environment, user's choice) is the context's. */
#include "tables.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>

/* XCR0: which register files the operating system saves.  Bits 1-2: xmm, ymm; bits 5-7: opmask, zmm low, zmm high;
 * bits 17-18: shapes of tiles, tiles. */
static unsigned saved_state(void) {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

enum { FMA = 1 << 12, POPCNT = 1 << 23, OSXSAVE = 1 << 27, F16C = 1 << 29, AVX2 = 1 << 5 };
enum { AVX512F = 1 << 16, AVX512DQ = 1 << 17, AVX512BW = 1 << 30 };
#define AVX512VL (1u << 31)
enum { AVX512_BF16 = 1 << 5 };                       /* in eax of the second part of leaf 7 */
enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24 };     /* in edx of its first part */
enum { MASKS_AND_ZMM = 0xe6, TILES = 3 << 17 };      /* in XCR0 */

#if defined(__linux__)
/* Tiles are 8 KiB of state, which signals push too: Linux wants to be asked, and refuses a process that has an alternative
 * stack for signals that is too small for them.  By hand: this folder stands on what ISO C has of libc. */
static int ask_for_tiles(void) {
    enum { ARCH_PRCTL = 158, ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"((long)ARCH_PRCTL), "D"((long)ARCH_REQ_XCOMP_PERM), "S"((long)TILE_DATA)
                     : "rcx", "r11", "memory");
    return !result;
}
#else
static int ask_for_tiles(void) { return 0; }
#endif

int obm__tiles_allowed(void) {
    enum { NOT_ASKED, ALLOWED, REFUSED };
    static _Atomic int answer;
    int known = atomic_load_explicit(&answer, memory_order_relaxed);
    if (known == NOT_ASKED) { /* of two threads that both ask the first has the answer of both: bits depend on it */
        int now = ask_for_tiles() ? ALLOWED : REFUSED;
        if (atomic_compare_exchange_strong(&answer, &known, now)) known = now;
    }
    return known == ALLOWED;
}

static const obm_kernels *const *detect(void) {
    static const obm_kernels *const tables[][5] = {
        {&obm__kernels_scalar, NULL},
        {&obm__kernels_scalar, &obm__kernels_avx2, NULL},
        {&obm__kernels_scalar, &obm__kernels_avx2, &obm__kernels_avx512, NULL},
        {&obm__kernels_scalar, &obm__kernels_avx2, &obm__kernels_avx512_bf16, NULL},
        {&obm__kernels_scalar, &obm__kernels_avx2, &obm__kernels_avx512_bf16, &obm__kernels_amx, NULL},
    };
    const unsigned leaf1 = FMA | POPCNT | OSXSAVE | F16C, leaf7 = AVX512F | AVX512DQ | AVX512BW | AVX512VL;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & leaf1) != leaf1) return tables[0];
    unsigned state = saved_state();
    if ((state & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & AVX2)) return tables[0];
    if ((state & MASKS_AND_ZMM) != MASKS_AND_ZMM || (b & leaf7) != leaf7) return tables[1];
    int tiles = (state & TILES) == TILES && (d & AMX_TILE) && (d & AMX_BF16);
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return tables[2];
    return tiles ? tables[4] : tables[3];
}

int obm_kernels_z12_gains(const obm_kernels *k) { return k != &obm__kernels_scalar; }
#elif defined(__aarch64__)
int obm_kernels_z12_gains(const obm_kernels *k) {
    (void)k;
    return 0;
}
static const obm_kernels *const *detect(void) {
    static const obm_kernels *const tables[] = {&obm__kernels_scalar, &obm__kernels_neon, NULL};
    return tables; /* Advanced SIMD is part of the armv8-a baseline */
}
#else
int obm_kernels_z12_gains(const obm_kernels *k) {
    (void)k;
    return 0;
}
static const obm_kernels *const *detect(void) {
    static const obm_kernels *const tables[] = {&obm__kernels_scalar, NULL};
    return tables;
}
#endif

int obm_kernels_pairs_gain(const obm_kernels *k) { return k->gemm_pairs != obm__scalar_gemm_pairs; }

const obm_kernels *const *obm_kernels_list(void) {
    static _Atomic(const obm_kernels *const *) found;
    const obm_kernels *const *list = atomic_load_explicit(&found, memory_order_acquire);
    if (!list) {
        list = detect(); /* two threads may both do this; they store the same pointer */
        atomic_store_explicit(&found, list, memory_order_release);
    }
    return list;
}

const obm_kernels *obm_kernels_find(const char *isa) {
    for (const obm_kernels *const *k = obm_kernels_list(); *k; k++)
        if (!strcmp((*k)->isa, isa)) return *k;
    return NULL;
}
