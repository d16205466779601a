/* A fresh folder per test program, and an independent few-line safetensors writer: header text and data as given. */
#ifndef OBM_TEST_IO_FIXTURE_H
#define OBM_TEST_IO_FIXTURE_H

#include "io/io.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char fixture_dir[64];

static inline int fixture_make(void **state) {
    (void)state;
    strcpy(fixture_dir, "/tmp/obm-test-XXXXXX");
    return mkdtemp(fixture_dir) ? 0 : -1;
}

static inline int fixture_unlink(const char *path, const struct stat *st, int flag, struct FTW *ftw) {
    (void)st, (void)flag, (void)ftw;
    return remove(path);
}

static inline int fixture_remove_tree(const char *path) { return nftw(path, fixture_unlink, 16, FTW_DEPTH | FTW_PHYS); }

static inline int fixture_remove(void **state) {
    (void)state;
    return fixture_remove_tree(fixture_dir);
}

/* Path inside the fixture's folder; four at a time. */
static inline const char *in_dir(const char *name) {
    static char paths[4][512];
    static int next;
    char *p = paths[next = (next + 1) % 4];
    snprintf(p, sizeof paths[0], "%s/%s", fixture_dir, name);
    return p;
}

static inline void put_file(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f) != 0) abort();
}

static inline void put_text(const char *path, const char *text) { put_file(path, text, strlen(text)); }

/* Length, header, then n bytes: data, or 0, 1, 2, ... when it is NULL.  Free the result. */
static inline uint8_t *build_safetensors(const char *header, size_t header_size, const void *data, size_t n,
                                         size_t *size) {
    uint8_t *bytes = malloc(8 + header_size + n + 1);
    if (!bytes) abort();
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)((uint64_t)header_size >> 8 * i);
    memcpy(bytes + 8, header, header_size);
    for (size_t i = 0; i < n; i++) bytes[8 + header_size + i] = data ? ((const uint8_t *)data)[i] : (uint8_t)i;
    *size = 8 + header_size + n;
    return bytes;
}

static inline void put_safetensors(const char *path, const char *header, const void *data, size_t n) {
    size_t size;
    uint8_t *bytes = build_safetensors(header, strlen(header), data, n, &size);
    put_file(path, bytes, size);
    free(bytes);
}

#endif
