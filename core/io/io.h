/* Files: mapping, hashing, safetensors in and out, checkpoint folders.  Every field of a file is checked before use. */
#ifndef OBM_IO_H
#define OBM_IO_H

#include "../sys/sys.h"
#include "json.h"

/* ---- files (file.c) ---- */

typedef struct obm__map { const uint8_t *data; size_t size; } obm__map;   /* read-only mapping; size 0: data NULL */
obm_status obm__map_open(const char *path, obm__map *out, obm_error *err);
void obm__map_close(obm__map *m);
obm_status obm__file_read(const char *path, char **text, size_t *size, obm_error *err);   /* owned, NUL-terminated */
bool obm__file_exists(const char *path);
bool obm__is_directory(const char *path);
char *obm__path_join(const char *dir, const char *name);   /* owned */
/* Writes through a temporary name in the same folder, fsyncs, renames, fsyncs the folder: the old file or the new one. */
obm_status obm__file_write(const char *path, const void *bytes, size_t size, obm_error *err);
obm_status obm__make_directory(const char *path, obm_error *err);   /* with parents; existing is fine */

/* ---- hashes (hash.c): the only file that includes xxhash.h ---- */

typedef struct obm__xxh3 obm__xxh3;   /* streaming XXH3-128 */
obm__xxh3 *obm__xxh3_new(void);
void obm__xxh3_add(obm__xxh3 *h, const void *bytes, size_t n);
void obm__xxh3_end(obm__xxh3 *h, char out[33]);   /* hex, frees h */
void obm__xxh3_of(const void *bytes, size_t n, char out[33]);
void obm__sha256_of(const void *bytes, size_t n, char out[65]);

/* ---- safetensors (safetensors.c) ---- */

typedef struct obm__st_entry { char *name; obm_tensor t; } obm__st_entry;   /* t views the mapping */
typedef struct obm__safetensors {
    char *path;
    obm__map map;
    obm__st_entry *entries;   /* sorted by name (strcmp) */
    size_t count;
    obm_json *metadata;       /* __metadata__ or NULL */
} obm__safetensors;
obm_status obm__safetensors_open(const char *path, obm__safetensors **out, obm_error *err);
/* The checks without a file: used by open and by the fuzzer. */
obm_status obm__safetensors_parse(const uint8_t *data, size_t size, const char *where, obm__safetensors *out, obm_error *err);
void obm__safetensors_free(obm__safetensors *s);
const obm__st_entry *obm__safetensors_find(const obm__safetensors *s, const char *name);

/* Streaming writer: declare all tensors first (the header needs every offset), then write them in that order.  Goes to
 * PATH.tmp-<pid>; finish syncs and renames to PATH; abort (or free) removes it. */
typedef struct obm__st_writer obm__st_writer;
obm_status obm__st_writer_new(const char *path, obm__st_writer **out, obm_error *err);
obm_status obm__st_writer_declare(obm__st_writer *w, const char *name, obm_dtype dtype, int32_t ndim, const int64_t *shape, obm_error *err);
obm_status obm__st_writer_metadata(obm__st_writer *w, const char *key, const char *value, obm_error *err);
obm_status obm__st_writer_begin(obm__st_writer *w, obm_error *err);                          /* writes the header, 64-byte aligned data */
obm_status obm__st_writer_write(obm__st_writer *w, const void *bytes, size_t n, obm_error *err);   /* the next n bytes of the data part */
uint64_t obm__st_writer_size(const obm__st_writer *w);                                       /* of the whole file; after all declares */
obm_status obm__st_writer_finish(obm__st_writer *w, char xxh3[33] /* nullable */, obm_error *err);
void obm__st_writer_free(obm__st_writer *w);                                                 /* aborts if not finished */

/* ---- checkpoints (checkpoint.c) ---- */

struct obm_checkpoint {
    obm_context *ctx;
    char *path;               /* as given */
    char *directory;          /* the folder, or the folder of the single file */
    char *config_text;        /* NULL without config.json */
    obm_json *config;         /* parsed, NULL without */
    obm__safetensors **files;
    size_t n_files;
    const obm__st_entry **tensors;   /* all, sorted by name; borrowed from files */
    size_t count;
    bool tied;                /* no lm_head.weight here (or config says tied) and an embedding */
};
#define OBM_EMBEDDING_NAME "model.embed_tokens.weight"
#define OBM_HEAD_NAME "lm_head.weight"
const obm__st_entry *obm__checkpoint_find(const obm_checkpoint *c, const char *name);   /* NULL if absent */

/* ---- model folders out (model_writer.c) ---- */

/* A Hugging Face folder: shards, index, config, tokenizer files, model card.  The new state appears with the last rename
 * (index.json, or the single model.safetensors); a killed run leaves the old folder or none. */
typedef struct obm__model_writer obm__model_writer;
typedef struct obm__model_writer_options {
    uint64_t shard_bytes;       /* 0: 5e9 */
    bool overwrite;
    const char *copy_from;      /* folder whose config.json, tokenizer*, special_tokens_map.json, generation_config.json, ... are carried over */
    obm_json *config;           /* replaces config.json (borrowed, nullable) */
    const char *card;           /* text of README.md, nullable */
} obm__model_writer_options;
obm_status obm__model_writer_new(const char *path, const obm__model_writer_options *o, obm__model_writer **out, obm_error *err);
obm_status obm__model_writer_declare(obm__model_writer *w, const char *name, obm_dtype dtype, int32_t ndim, const int64_t *shape, obm_error *err);
obm_status obm__model_writer_begin(obm__model_writer *w, obm_error *err);
obm_status obm__model_writer_write(obm__model_writer *w, const void *bytes, size_t n, obm_error *err);   /* in order of declaration, any chunking */
uint64_t obm__model_writer_size(const obm__model_writer *w);
obm_status obm__model_writer_finish(obm__model_writer *w, obm_error *err);
void obm__model_writer_free(obm__model_writer *w);   /* aborts if not finished */

#endif
