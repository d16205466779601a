/* Bytes as the model.safetensors.index.json of a folder with two sound shards: refused with a message of one line that
 * names the folder, or opened, and then the tensors are sorted, found by name and can be read. */
#include "fuzz_fixture.h"

#define MAX_INPUT 16384

static char folder[64], index_path[128];
static obm_context *ctx;

static void clean_up(void) {
    obm_context_free(ctx);
    fuzz_folder_remove(folder);
}

static void write_shard(const char *name, const char *const *tensors, size_t n) {
    char path[128];
    obm__st_writer *w;
    const uint8_t bytes[12] = {0};
    snprintf(path, sizeof path, "%s/%s", folder, name);
    need(obm__st_writer_new(path, &w, NULL));
    for (size_t i = 0; i < n; i++) need(obm__st_writer_declare(w, tensors[i], OBM_F16, 2, (int64_t[]){2, 3}, NULL));
    need(obm__st_writer_begin(w, NULL));
    for (size_t i = 0; i < n; i++) need(obm__st_writer_write(w, bytes, sizeof bytes, NULL));
    need(obm__st_writer_finish(w, NULL, NULL));
    obm__st_writer_free(w);
}

static void make_folder(void) {
    fuzz_folder(folder);
    snprintf(index_path, sizeof index_path, "%s/model.safetensors.index.json", folder);
    ctx = fuzz_context();
    atexit(clean_up);
    write_shard("a.safetensors", (const char *const[]){"a", "b"}, 2);
    write_shard("b.safetensors", (const char *const[]){"b", "c"}, 2);
}

static void check(const obm_checkpoint *c) {
    for (size_t i = 0; i < obm_checkpoint_count(c); i++) {
        const char *name, *last = "";
        obm_tensor t;
        float x[6];
        obm_checkpoint_at(c, i, &name, &t);
        if (i > 0) obm_checkpoint_at(c, i - 1, &last, NULL);
        if ((i > 0 && strcmp(last, name) >= 0) || !obm__checkpoint_find(c, name)) abort();
        if (obm_tensor_read_f32(&t, 0, 6, x, NULL) != OBM_OK) abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    obm_checkpoint *c = NULL;
    obm_error err = {0};
    if (size > MAX_INPUT) return 0;
    if (!ctx) make_folder();
    put(index_path, data, size);
    if (obm_checkpoint_open(ctx, folder, &c, &err) != OBM_OK) {
        check_error(&err);
        if (c || !strstr(err.message, folder)) abort();
        return 0;
    }
    check(c);
    obm_checkpoint_free(c);
    return 0;
}
