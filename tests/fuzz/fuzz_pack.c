/* Bytes as the pack.json of a folder whose other files are sound: refused with a message of one line, or opened, and
 * then everything that the pack shows can be read. */
#include "fuzz_fixture.h"

#include "io/pack.h"

#define MAX_INPUT 65536

static char folder[64], pack_path[128], manifest_path[160];
static obm_context *ctx;

/* ---- the folder: base/, chat.safetensors, math.safetensors, router.safetensors; of a pack with shared vectors
 * mask-chat.safetensors, mask-math.safetensors, shared.safetensors ---- */

typedef struct tensor {
    const char *name;
    obm_dtype dtype;
    int32_t ndim;
    int64_t shape[2];
} tensor;

static const tensor model[] = {{"model.embed_tokens.weight", OBM_BF16, 2, {3, 8}},
                               {"model.layers.0.self_attn.q_proj.weight", OBM_BF16, 2, {4, 70}},
                               {"model.layers.0.mlp.up_proj.weight", OBM_F32, 2, {5, 8}},
                               {"model.norm.weight", OBM_F32, 1, {8}}};
static const tensor router[] = {
    {"mean", OBM_F32, 1, {2}}, {"scale", OBM_F32, 1, {2}}, {"weight", OBM_F32, 2, {2, 2}}, {"bias", OBM_F32, 1, {2}}};

/* Every byte below 0x40: small finite numbers in any dtype. */
static void write_tensors(const char *path, const tensor *t, size_t n, uint8_t salt) {
    obm__st_writer *w;
    need(obm__st_writer_new(path, &w, NULL));
    for (size_t i = 0; i < n; i++) need(obm__st_writer_declare(w, t[i].name, t[i].dtype, t[i].ndim, t[i].shape, NULL));
    need(obm__st_writer_begin(w, NULL));
    for (size_t i = 0; i < n; i++) {
        int64_t count = t[i].shape[0] * (t[i].ndim == 2 ? t[i].shape[1] : 1);
        for (int64_t k = 0; k < count * (int64_t)obm_dtype_size(t[i].dtype); k++) {
            uint8_t byte = (uint8_t)((k * 37 + salt * 11) & 0x3f);
            need(obm__st_writer_write(w, &byte, 1, NULL));
        }
    }
    need(obm__st_writer_finish(w, NULL, NULL));
    obm__st_writer_free(w);
}

static void clean_up(void) {
    obm_context_free(ctx);
    fuzz_folder_remove(folder);
}

/* The experts' files get fixed names, so that the corpus can name them. */
static void settle(const char *stem, const obm__safetensors *file) {
    char to[192];
    snprintf(to, sizeof to, "%s/%s.safetensors", pack_path, stem);
    if (rename(file->path, to)) abort();
}

/* The manifest of this pack with the names that settle() gives is corpus/pack/shared. */
static void make_shared(const char *base, const obm_expert *e) {
    char path[160];
    obm_pack *p;
    obm_compress_options o = OBM_INIT(obm_compress_options);
    o.shared = "emr";
    snprintf(path, sizeof path, "%s/masks", folder);
    need(obm_compress(ctx, base, e, 2, &o, path, NULL, &p, NULL));
    settle("mask-chat", p->experts[0].file);
    settle("mask-math", p->experts[1].file);
    settle("shared", p->shared.file);
    obm_pack_free(p);
}

static void make_folder(void) {
    char base[128], chat[128], math[128], path[192];
    obm_expert e[2] = {OBM_INIT(obm_expert), OBM_INIT(obm_expert)};
    obm_pack *p;
    fuzz_folder(folder);
    snprintf(base, sizeof base, "%s/base.safetensors", folder);
    snprintf(chat, sizeof chat, "%s/chat.safetensors", folder);
    snprintf(math, sizeof math, "%s/math.safetensors", folder);
    snprintf(pack_path, sizeof pack_path, "%s/pack", folder);
    snprintf(manifest_path, sizeof manifest_path, "%s/pack.json", pack_path);
    ctx = fuzz_context();
    atexit(clean_up);
    write_tensors(base, model, 4, 0);
    write_tensors(chat, model, 4, 1);
    write_tensors(math, model, 4, 2);
    e[0].name = "chat";
    e[0].path = chat;
    e[1].name = "math";
    e[1].path = math;
    e[1].policy = "attention";
    e[1].scale = "group:64";
    e[1].planes = 2;
    need(obm_compress(ctx, base, e, 2, NULL, pack_path, NULL, &p, NULL));
    settle("chat", p->experts[0].file);
    settle("math", p->experts[1].file);
    obm_pack_free(p);
    snprintf(path, sizeof path, "%s/router.safetensors", pack_path);
    write_tensors(path, router, 4, 3);
    make_shared(base, e);
}

/* ---- the target ---- */

static void look(const obm_pack *p) {
    obm_class_bytes bytes[OBM_CLASS_COUNT];
    obm_pack_tensor t;
    float row[128];
    for (size_t k = 0; k < obm_pack_task_count(p); k++) {
        obm_pack_bytes(p, k, bytes);
        if (!obm_pack_task_name(p, k)[0] || !obm_pack_policy(p, k)) abort();
        for (size_t i = 0; i < obm_pack_tensor_count(p); i++) {
            const obm__pack_entry *e = &p->experts[k].entries[i];
            obm_pack_tensor_at(p, k, i, &t);
            for (int64_t r = 0; e->mode == OBM_MODE_1BIT && r < t.rows; r++)
                obm__planes_read_row(ctx->k, &e->planes, r, 0, t.cols, row);
            for (int64_t r = 0; e->mode == OBM_MODE_MASK && r < t.rows; r++)
                obm__masked_read(ctx->k, &e->masked, r * t.cols, t.cols, row);
            if (e->full.data && obm_tensor_count(&e->full) > 0)
                obm__widen(ctx->k, &e->full, obm_tensor_count(&e->full) - 1, 1, row);
            if (e->extra.data && obm_tensor_count(&e->extra) > 0)
                obm__widen(ctx->k, &e->extra, obm_tensor_count(&e->extra) - 1, 1, row);
        }
    }
    (void)obm_pack_verify(p, NULL, NULL, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size > MAX_INPUT) return 0;
    if (!ctx) make_folder();
    put(manifest_path, data, size);
    obm_pack *p = NULL;
    obm_error err = {0};
    if (obm_pack_open(ctx, pack_path, NULL, &p, &err) != OBM_OK) {
        check_error(&err);
        if (p) abort();
        return 0;
    }
    look(p);
    obm_pack_free(p);
    return 0;
}
