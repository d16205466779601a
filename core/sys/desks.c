/* Scratch of a context's workers.  Where they are on several nodes, each one's lies on its own: bound to it, and kept
 * from one use to the next, since mapping and binding take longer than a small tensor's pass. */
#include "sys.h"

#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

/* In a page of its own in front of desks that are mapped. */
struct obm__desks {
    size_t each, all; /* bytes of a worker, and of the mapping */
};

static size_t page_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }

static char *first_desk(obm__desks *d) { return (char *)d + page_size(); }

static void unmap(obm__desks *d) {
    if (d) munmap(d, d->all);
}

/* Neighbours of one node together.  Where the system refuses, the first touch decides, which is by the same workers; a
 * huge page would be one touch for many of them. */
static void bind_desks(const obm_context *ctx, obm__desks *d) {
    const obm__workers *w = &ctx->workers;
    bool refused = false;
    for (int i = 0, end; i < w->n; i = end) {
        for (end = i + 1; end < w->n && w->at[end].node == w->at[i].node;) end++;
        char *at = first_desk(d) + (size_t)i * d->each;
        refused |= obm__topology_place(ctx->topology, at, (size_t)(end - i) * d->each, w->at[i].node) != 0;
    }
    if (refused) (void)madvise(d, d->all, MADV_NOHUGEPAGE);
}

static obm__desks *map_desks(const obm_context *ctx, size_t each) {
    size_t all;
    if (!obm__mul((size_t)ctx->threads, each, &all) || !obm__add(all, page_size(), &all)) return NULL;
    obm__desks *d = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (d == MAP_FAILED) return NULL;
    *d = (obm__desks){each, all};
    if (each) bind_desks(ctx, d);
    return d;
}

void *obm__desks_new(obm_context *ctx, size_t each) {
    if (ctx->workers.numa == OBM_NUMA_OFF) return obm__alloc_workers((size_t)ctx->threads, each);
    obm__desks *d = atomic_exchange(&ctx->spare_desks, NULL);
    if (d && d->each != each) {
        unmap(d);
        d = NULL;
    }
    if (!d) d = map_desks(ctx, each);
    return d ? first_desk(d) : NULL;
}

void obm__desks_free(obm_context *ctx, void *desks) {
    if (!desks || ctx->workers.numa == OBM_NUMA_OFF)
        obm_free(desks);
    else
        unmap(atomic_exchange(&ctx->spare_desks, (obm__desks *)(void *)((char *)desks - page_size())));
}

void obm__desks_clear(obm_context *ctx) { unmap(atomic_exchange(&ctx->spare_desks, NULL)); }
