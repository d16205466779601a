/* Small checkpoints for the tests of task vectors and packs: written with the library's own writer into a fresh folder. */
#ifndef DELTA_FIXTURE_H
#define DELTA_FIXTURE_H

#include "delta/delta.h"

#include <ftw.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define OK(expr)                                                                                                       \
    do {                                                                                                               \
        obm_error e_ = {0};                                                                                            \
        obm_error *err = &e_;                                                                                          \
        obm_status s_ = (expr);                                                                                        \
        if (s_ != OBM_OK) fail_msg("%s: %s: %s", #expr, obm_status_name(s_), e_.message);                              \
    } while (0)
/* The call fails with `status` and a message that holds `part`. */
#define FAILS(expr, status_, part)                                                                                     \
    do {                                                                                                               \
        obm_error e_ = {0};                                                                                            \
        obm_error *err = &e_;                                                                                          \
        obm_status s_ = (expr);                                                                                        \
        if (s_ != (status_)) fail_msg("%s: %s (%s), expected %s", #expr, obm_status_name(s_), e_.message, obm_status_name(status_)); \
        if (!strstr(e_.message, part)) fail_msg("%s: \"%s\" does not hold \"%s\"", #expr, e_.message, part);           \
    } while (0)

static inline int fixture_remove_one(const char *path, const struct stat *st, int kind, struct FTW *ftw) {
    (void)st;
    (void)kind;
    (void)ftw;
    return remove(path);
}
static inline void fixture_remove(const char *path) { nftw(path, fixture_remove_one, 16, FTW_DEPTH | FTW_PHYS); }

static inline char *fixture_folder(void) {
    const char *tmp = getenv("TMPDIR");
    char *path = obm__format("%s/obm-test-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(path)) fail_msg("mkdtemp %s", path);
    return path;
}

static inline obm_context *fixture_context(int threads) {
    obm_context_options o = OBM_INIT(obm_context_options);
    obm_context *ctx = NULL;
    o.threads = threads;
    OK(obm_context_new(&o, &ctx, err));
    return ctx;
}

/* One tensor to write; values (f32, narrowed to dtype) or, where NULL, raw bytes. */
typedef struct fixture_tensor {
    const char *name;
    obm_dtype dtype;
    int32_t ndim;
    int64_t shape[3];
    const float *values;
    const void *raw;
} fixture_tensor;

static inline void fixture_write_file(const obm_context *ctx, const char *path, const fixture_tensor *t, size_t n) {
    obm__st_writer *w;
    OK(obm__st_writer_new(path, &w, err));
    for (size_t i = 0; i < n; i++) OK(obm__st_writer_declare(w, t[i].name, t[i].dtype, t[i].ndim, t[i].shape, err));
    OK(obm__st_writer_begin(w, err));
    for (size_t i = 0; i < n; i++) {
        obm_tensor view = {.dtype = t[i].dtype, .ndim = t[i].ndim};
        memcpy(view.shape, t[i].shape, sizeof t[i].shape);
        size_t bytes = obm__tensor_bytes(&view);
        void *data = obm__calloc(bytes, 1); /* values of other dtypes than floats stay 0 */
        if (t[i].raw) memcpy(data, t[i].raw, bytes);
        else if (t[i].dtype == OBM_F64)
            for (int64_t k = 0; k < obm_tensor_count(&view); k++) ((double *)data)[k] = (double)t[i].values[k];
        else obm__narrow(ctx->k, t[i].dtype, t[i].values, obm_tensor_count(&view), data);
        OK(obm__st_writer_write(w, data, bytes, err));
        obm_free(data);
    }
    OK(obm__st_writer_finish(w, NULL, err));
    obm__st_writer_free(w);
}

/* DIR/NAME as a folder with model.safetensors and a config.json; owned path. */
static inline char *fixture_model(const obm_context *ctx, const char *dir, const char *name, const fixture_tensor *t, size_t n) {
    char *folder = obm__path_join(dir, name);
    OK(obm__make_directory(folder, err));
    char *file = obm__path_join(folder, "model.safetensors"), *config = obm__path_join(folder, "config.json");
    fixture_write_file(ctx, file, t, n);
    OK(obm__file_write(config, "{\"model_type\": \"llama\"}", 23, err));
    obm_free(file);
    obm_free(config);
    return folder;
}

/* A small generator of its own (xorshift64*), so that fixtures do not depend on libc. */
static inline float fixture_random(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((double)(*state * 0x2545F4914F6CDD1Dull >> 40) / (1 << 24) - 0.5);
}
static inline float *fixture_values(size_t n, uint64_t seed) {
    float *v = obm__alloc(n, sizeof *v);
    uint64_t state = seed * 0x9E3779B97F4A7C15ull + 1;
    for (size_t i = 0; i < n; i++) v[i] = fixture_random(&state);
    return v;
}

#endif
