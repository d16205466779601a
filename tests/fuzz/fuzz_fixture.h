/* What the fuzz targets share: what has to succeed, what an error has to be, and a fresh folder with a context. */
#ifndef FUZZ_FIXTURE_H
#define FUZZ_FIXTURE_H

#include "io/io.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static inline void need(obm_status status) {
    if (status != OBM_OK) abort();
}

/* A message of one line. */
static inline void check_error(const obm_error *err) {
    if (!err->message[0] || strchr(err->message, '\n')) abort();
}

static inline void put(const char *path, const void *bytes, size_t n) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f)) abort();
}

static inline obm_context *fuzz_context(void) {
    obm_context_options o = OBM_INIT(obm_context_options);
    obm_context *ctx = NULL;
    o.threads = 1;
    need(obm_context_new(&o, &ctx, NULL));
    return ctx;
}

static inline void fuzz_folder(char folder[64]) {
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, 64, "%.40s/obm-fuzz-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(folder)) abort();
}

static inline int fuzz_remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw) {
    (void)st;
    (void)kind;
    (void)ftw;
    return remove(path);
}
static inline void fuzz_folder_remove(const char *folder) { nftw(folder, fuzz_remove_one, 16, FTW_DEPTH | FTW_PHYS); }

#endif
