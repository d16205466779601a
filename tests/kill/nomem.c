/* Preloaded into Python and Lua: the n-th allocation that the library itself makes fails (core and binding, not the
 * interpreter, not jansson, which cannot tell lack of memory from bad text).  Armed by nomem_arm, which Python calls
 * through ctypes, and Lua by asking for the environment variable NOMEM_ARM:n; NOMEM_CALLS tells how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *__libc_malloc(size_t n);
void *__libc_calloc(size_t count, size_t size);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t alignment, size_t n);

static _Atomic long calls;
static _Atomic long fail_at;
static uintptr_t begin, end; /* of the library's code */

static int look(struct dl_phdr_info *info, size_t size, void *user) {
    (void)size;
    (void)user;
    if (!strstr(info->dlpi_name, "/onebitmerge/_core") && !strstr(info->dlpi_name, "/onebitmerge/core.so") &&
        !strstr(info->dlpi_name, "/onebitmerge.so"))
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD || !(info->dlpi_phdr[i].p_flags & PF_X)) continue;
        begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
        end = begin + info->dlpi_phdr[i].p_memsz;
    }
    return 1;
}

/* at 0: only counts.  Returns 0 where the library is not there. */
int nomem_arm(long at) {
    if (!begin) dl_iterate_phdr(look, NULL);
    calls = 0;
    fail_at = at;
    return begin != 0;
}
long nomem_calls(void) { return calls; }

static int fails(void *caller) {
    uintptr_t at = (uintptr_t)caller;
    return at >= begin && at < end && ++calls == fail_at;
}

char *getenv(const char *name) {
    static char text[32];
    if (!strncmp(name, "NOMEM_ARM:", 10)) return nomem_arm(strtol(name + 10, NULL, 10)) ? "armed" : NULL;
    if (strcmp(name, "NOMEM_CALLS")) return ((__typeof__(&getenv))dlsym(RTLD_NEXT, "getenv"))(name);
    snprintf(text, sizeof text, "%ld", nomem_calls());
    return text;
}

void *malloc(size_t n) { return fails(__builtin_return_address(0)) ? NULL : __libc_malloc(n); }
void *calloc(size_t count, size_t size) {
    return fails(__builtin_return_address(0)) ? NULL : __libc_calloc(count, size);
}
void *realloc(void *p, size_t n) { return fails(__builtin_return_address(0)) ? NULL : __libc_realloc(p, n); }
void *aligned_alloc(size_t alignment, size_t n) {
    return fails(__builtin_return_address(0)) ? NULL : __libc_memalign(alignment, n);
}
