/* Memory: overflow-checked sizes, aligned blocks, and the growing buffer. */
#include "sys.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool obm__mul(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }
bool obm__add(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }

void obm_free(void *p) { free(p); }

void *obm__alloc(size_t count, size_t size) {
    size_t bytes, padded;
    if (!obm__mul(count, size, &bytes) || !obm__add(bytes, 63, &padded)) return NULL;
    padded &= ~(size_t)63;
    return aligned_alloc(64, padded ? padded : 64);
}

size_t obm__whole_pages(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), padded;
    return obm__add(bytes, page - 1, &padded) ? padded / page * page : SIZE_MAX;
}

void *obm__alloc_workers(size_t workers, size_t bytes) {
    size_t all, page = (size_t)sysconf(_SC_PAGESIZE);
    if (!obm__mul(workers, bytes, &all) || (all = obm__whole_pages(all)) == SIZE_MAX) return NULL;
    return aligned_alloc(page, all ? all : page);
}

void *obm__calloc(size_t count, size_t size) {
    size_t bytes;
    return obm__mul(count, size, &bytes) ? calloc(1, bytes ? bytes : 1) : NULL;
}

void *obm__realloc(void *p, size_t count, size_t size) {
    size_t bytes;
    if (!obm__mul(count, size, &bytes)) return NULL;
    return realloc(p, bytes ? bytes : 1);
}

char *obm__strndup(const char *s, size_t n) {
    size_t bytes;
    if (!obm__add(n, 1, &bytes)) return NULL;
    char *copy = malloc(bytes);
    if (!copy) return NULL;
    if (n) memcpy(copy, s, n);
    copy[n] = 0;
    return copy;
}

char *obm__strdup(const char *s) { return obm__strndup(s, strlen(s)); }

char *obm__format(const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    char *s = n < 0 ? NULL : malloc((size_t)n + 1);
    if (!s) return NULL;
    va_start(args, format);
    vsnprintf(s, (size_t)n + 1, format, args);
    va_end(args);
    return s;
}

/* Room for n more bytes and the terminating NUL that `data` always has. */
static bool buffer_reserve(obm__buffer *b, size_t n) {
    size_t need;
    if (b->failed || !obm__add(b->size, n, &need) || !obm__add(need, 1, &need)) return !(b->failed = true);
    if (need <= b->capacity) return true;
    size_t capacity = b->capacity ? b->capacity : 64;
    while (capacity < need) {
        if (!obm__mul(capacity, 2, &capacity)) return !(b->failed = true);
    }
    char *data = realloc(b->data, capacity);
    if (!data) return !(b->failed = true);
    b->data = data;
    b->capacity = capacity;
    return true;
}

void obm__buffer_add(obm__buffer *b, const void *bytes, size_t n) {
    if (!buffer_reserve(b, n)) return;
    if (n) memcpy(b->data + b->size, bytes, n);
    b->size += n;
    b->data[b->size] = 0;
}

void obm__buffer_text(obm__buffer *b, const char *s) { obm__buffer_add(b, s, strlen(s)); }

void obm__buffer_printf(obm__buffer *b, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (n < 0) {
        b->failed = true;
        return;
    }
    if (!buffer_reserve(b, (size_t)n)) return;
    va_start(args, format);
    vsnprintf(b->data + b->size, (size_t)n + 1, format, args);
    va_end(args);
    b->size += (size_t)n;
}

void obm__buffer_free(obm__buffer *b) {
    free(b->data);
    *b = (obm__buffer){0};
}
