/* Bytes as the adapter_config.json of a LoRA folder and, behind a NUL, its adapter_model.safetensors (a sound one where
 * there is no NUL): refused with a message of one line, or opened, and then every task vector on a small base can be
 * read. */
#include "fuzz_fixture.h"

#include "delta/delta.h"

#define MAX_INPUT 16384
#define MAX_COUNT 64 /* elements of a tensor of the base */

static char folder[64], base_path[128], adapter_path[128], config_path[192], weights_path[192];
static obm_context *ctx;
static obm_checkpoint *base;
static char *sound; /* an adapter_model.safetensors */
static size_t sound_size;
static bool sound_there; /* it need not be written again */

/* ---- the folder: base.safetensors and adapter/ ---- */

typedef struct tensor {
    const char *name;
    int64_t rows, cols; /* cols 0: a vector */
} tensor;

static const tensor model[] = {{"model.embed_tokens.weight", 4, 3},
                               {"model.layers.0.mlp.down_proj.bias", 3, 0},
                               {"model.layers.0.mlp.down_proj.weight", 3, 5},
                               {"model.layers.0.self_attn.q_proj.weight", 2, 3}};
#define FACTORS "base_model.model.model.layers.0."
static const tensor factors[] = {{FACTORS "mlp.down_proj.lora_A.weight", 1, 5},
                                 {FACTORS "mlp.down_proj.lora_B.weight", 3, 1},
                                 {FACTORS "self_attn.q_proj.lora_A.weight", 2, 3},
                                 {FACTORS "self_attn.q_proj.lora_B.weight", 2, 2}};

/* Small finite numbers. */
static void write_tensors(const char *path, const tensor *t, size_t n) {
    obm__st_writer *w;
    need(obm__st_writer_new(path, &w, NULL));
    for (size_t i = 0; i < n; i++)
        need(obm__st_writer_declare(w, t[i].name, OBM_F32, t[i].cols ? 2 : 1, (int64_t[]){t[i].rows, t[i].cols}, NULL));
    need(obm__st_writer_begin(w, NULL));
    for (size_t i = 0; i < n; i++) {
        for (int64_t k = 0; k < t[i].rows * (t[i].cols ? t[i].cols : 1); k++) {
            float x = (float)(k - 3) / 8;
            need(obm__st_writer_write(w, &x, sizeof x, NULL));
        }
    }
    need(obm__st_writer_finish(w, NULL, NULL));
    obm__st_writer_free(w);
}

static void clean_up(void) {
    obm_checkpoint_free(base);
    obm_context_free(ctx);
    obm_free(sound);
    fuzz_folder_remove(folder);
}

static void make_folder(void) {
    fuzz_folder(folder);
    snprintf(base_path, sizeof base_path, "%s/base.safetensors", folder);
    snprintf(adapter_path, sizeof adapter_path, "%s/adapter", folder);
    snprintf(config_path, sizeof config_path, "%s/adapter_config.json", adapter_path);
    snprintf(weights_path, sizeof weights_path, "%s/" OBM_ADAPTER_WEIGHTS, adapter_path);
    ctx = fuzz_context();
    atexit(clean_up);
    need(obm__make_directory(adapter_path, NULL));
    write_tensors(base_path, model, 4);
    write_tensors(weights_path, factors, 4);
    need(obm_checkpoint_open(ctx, base_path, &base, NULL));
    need(obm__file_read(weights_path, &sound, &sound_size, NULL));
}

/* ---- the target ---- */

static void look(const obm_task_vector *v) {
    float d[MAX_COUNT];
    for (size_t i = 0; i < obm_task_vector_count(v); i++) {
        const obm__pair *p = &v->pairs[i];
        obm_error err = {0};
        if (obm_tensor_count(&p->base) > MAX_COUNT || p->extra_rows) continue;
        if (obm_task_vector_read(v, p->name, d, &err) != OBM_OK) check_error(&err);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    obm_checkpoint *adapter = NULL;
    obm_task_vector *v = NULL;
    obm_error err = {0};
    if (size > MAX_INPUT) return 0;
    if (!ctx) make_folder();
    const uint8_t *nul = size ? memchr(data, 0, size) : NULL;
    size_t first = nul ? (size_t)(nul - data) : size;
    put(config_path, data, first);
    if (nul || !sound_there)
        put(weights_path, nul ? (const char *)nul + 1 : sound, nul ? size - first - 1 : sound_size);
    sound_there = !nul;
    obm_status status = obm_checkpoint_open(ctx, adapter_path, &adapter, &err);
    if (status == OBM_OK) status = obm_task_vector_new(base, adapter, &v, &err);
    if (status == OBM_OK)
        look(v);
    else
        check_error(&err);
    if (status != OBM_OK && v) abort();
    obm_task_vector_free(v);
    obm_checkpoint_free(adapter);
    return 0;
}
