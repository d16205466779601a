/* Resident pages of a mapping: asking for them before a tensor is read, and handing them back once a tensor has been
 * read, so that memory does not grow with the model. */
#include "io.h"

#include <sys/mman.h>
#include <unistd.h>

void obm__pages_release(const void *data, size_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)data + page - 1) & ~(page - 1), end = ((uintptr_t)data + size) & ~(page - 1);
    /* Whole pages only: a neighbour may still be in use.  A refusal costs memory, not correctness. */
    if (end > begin) (void)madvise((void *)begin, end - begin, MADV_DONTNEED);
}

/* Linux maps the neighbours of a page that faults along with it, where they are in memory: this many bytes by default.
 * MADV_POPULATE_READ does the same and then looks at every page once more: whole merges took 9 to 16 % longer with it.
 * What comes with no neighbour faults when it is read. */
#define FAULT_AROUND ((size_t)64 << 10)

void obm__pages_populate(const void *data, size_t size) {
#ifdef __linux__
    const volatile char *at = data, *end = at + size;
    while (at < end) {
        (void)*at;
        at += FAULT_AROUND - (uintptr_t)at % FAULT_AROUND;
    }
#else
    (void)data, (void)size;
#endif
}

static const void *element(const obm_tensor *t, int64_t i) {
    return (const char *)t->data + (size_t)i * obm_dtype_size(t->dtype);
}

void obm__tensor_release(const obm_tensor *t, int64_t begin, int64_t n) {
    if (n > 0) obm__pages_release(element(t, begin), (size_t)n * obm_dtype_size(t->dtype));
}

void obm__tensor_populate(const obm_tensor *t, int64_t begin, int64_t n) {
    if (n > 0) obm__pages_populate(element(t, begin), (size_t)n * obm_dtype_size(t->dtype));
}
