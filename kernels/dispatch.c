/* Which tables this CPU and operating system can run.  The policy (environment, user's choice) is the context's. */
#include "tables.h"

#include <stdatomic.h>
#include <string.h>

static const obm_kernels *const *detect(void) {
    static const obm_kernels *const tables[] = {&obm__kernels_scalar, NULL};
    return tables;
}

const obm_kernels *const *obm_kernels_list(void) {
    static _Atomic(const obm_kernels *const *) found;
    const obm_kernels *const *list = atomic_load_explicit(&found, memory_order_acquire);
    if (!list) {
        list = detect();   /* two threads may both do this; they store the same pointer */
        atomic_store_explicit(&found, list, memory_order_release);
    }
    return list;
}

const obm_kernels *obm_kernels_find(const char *isa) {
    for (const obm_kernels *const *k = obm_kernels_list(); *k; k++)
        if (!strcmp((*k)->isa, isa)) return *k;
    return NULL;
}
