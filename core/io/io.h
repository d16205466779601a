/* Files: mapping, hashing, safetensors in and out, checkpoint folders.  Every field of a file is checked before use. */
#ifndef OBM_IO_H
#define OBM_IO_H

#include "../sys/sys.h"
#include "json.h"

/* ---- files (file.c) ---- */

/* A read-only mapping; size 0: data NULL.  The bytes are the file's: when somebody cuts the file short while it is
 * mapped, reading beyond its new end raises SIGBUS.  A library must not own that signal, and reading everything through
 * read() would give up the shared pages that let a model start at once.  So the rule is the callers': model files are
 * replaced by rename (which keeps the mapped file alive), never rewritten in place.  Everything written here does so.
 * What is cheap is done: every pass over a file, and every call of a model, begins with obm__map_check, so that only a
 * file that is cut during the pass can still raise the signal. */
typedef struct obm__map {
    const uint8_t *data;
    size_t size;
    uint64_t device, inode; /* of the file, to tell it from another that has its name by now */
} obm__map;
obm_status obm__map_open(const char *path, obm__map *out, obm_error *err);
/* IO when the mapped file, if it still has that name, is shorter than the mapping; one stat(). */
obm_status obm__map_check(const obm__map *m, const char *path, obm_error *err);
void obm__map_close(obm__map *m);
/* owned, NUL-terminated; size nullable */
obm_status obm__file_read(const char *path, char **text, size_t *size, obm_error *err);
/* FORMAT where the bytes are what Git LFS leaves in place of a file that was not fetched; OK for any others. */
obm_status obm__refuse_pointer(const void *bytes, size_t size, const char *where, obm_error *err);
bool obm__file_exists(const char *path);
bool obm__is_directory(const char *path);
bool obm__same_path(const char *a, const char *b);       /* both are there, and one file or folder */
char *obm__path_join(const char *dir, const char *name); /* owned */
char *obm__path_directory(const char *path);             /* owned; "." for a bare name */
/* Writes through a temporary name in the same folder, fsyncs, renames, fsyncs the folder: the old file or the
 * new one. */
obm_status obm__file_write(const char *path, const void *bytes, size_t size, obm_error *err);
/* Where nothing is yet, whether obm__make_directory could: OCCUPIED names a part of the path that is a file. */
obm_status obm__check_parents(const char *path, obm_error *err);
obm_status obm__make_directory(const char *path, obm_error *err); /* with parents; existing is fine */
/* The steps of obm__file_write, for writers that publish several files together.  Temporary names are
 * PATH.tmp-<pid>-<n>, in the folder of PATH, and never end in ".safetensors" or ".json"; *name and *temp are owned. */
obm_status obm__temp_create(const char *path, char **name, int *fd, obm_error *err);
obm_status obm__fd_write(int fd, const char *path, const void *bytes, size_t n, obm_error *err); /* all n bytes */
obm_status obm__fd_write_at(int fd, const char *path, const void *bytes, size_t n, uint64_t offset, obm_error *err);
/* *got < n: the file ends there. */
obm_status obm__fd_read_at(int fd, const char *path, void *bytes, size_t n, uint64_t offset, size_t *got,
                           obm_error *err);
/* Blocks for a new file whose size is known, which is its size from then on: writes into it find their place, and a
 * disk that is too full says so before the first of them. */
obm_status obm__fd_reserve(int fd, const char *path, uint64_t size, obm_error *err);
/* The disk begins to write the range now instead of in the sync at the end. */
void obm__fd_start_sync(int fd, uint64_t offset, uint64_t n);
obm_status obm__fd_seal(int fd, const char *path, obm_error *err); /* fsync and close, also on failure */
/* written and synced */
obm_status obm__file_stage(const char *path, const void *bytes, size_t size, char **temp, obm_error *err);
obm_status obm__file_publish(const char *temp, const char *path, obm_error *err); /* rename, then sync the folder */
obm_status obm__directory_sync(const char *dir, obm_error *err);
/* The length of FILE in a temporary name FILE.tmp-<pid>-<n>, 0 for any other name. */
size_t obm__temp_stem(const char *name);
/* Keeps other writers, of this process too, out of a folder; the lock goes with the process and leaves no file behind.
 * BUSY when somebody has it, UNSUPPORTED where the file system has no locks. */
obm_status obm__directory_lock(const char *dir, int *lock, obm_error *err);
void obm__directory_unlock(int lock);

/* The local path of an input, owned: the name itself, or what the context's resolver makes of org/name[@revision] where
 * there is no such path (source.c).  Errors: those of the resolver; IO without one. */
obm_status obm__source_find(const obm_context *ctx, const char *name, char **out, obm_error *err);
/* IO where a name that is a single word is no path. */
obm_status obm__source_check(const char *name, obm_error *err);
bool obm__source_is_local(const char *path);
bool obm__source_is_name(const char *s); /* has the form org/name or org/name@revision */

/* Drops the whole pages inside [data, data + size) of a read-only file mapping from resident memory (pages.c); they are
 * read again when touched. */
void obm__pages_release(const void *data, size_t size);
/* Maps the pages of a range that is about to be read, all in one go instead of a fault for every few. */
void obm__pages_populate(const void *data, size_t size);

/* Both of elements [begin, begin + n) of a tensor that is mapped. */
void obm__tensor_release(const obm_tensor *t, int64_t begin, int64_t n);
void obm__tensor_populate(const obm_tensor *t, int64_t begin, int64_t n);

/* Progress inside of io: n bytes more are done; a failure stops the work and is handed on. */
typedef obm_status (*obm__tick_fn)(void *user, uint64_t bytes, obm_error *err);

/* ---- hashes (hash.c): the only file that includes xxhash.h ---- */

typedef struct obm__xxh3 obm__xxh3; /* streaming XXH3-128 */
obm__xxh3 *obm__xxh3_new(void);     /* NULL: out of memory */
void obm__xxh3_add(obm__xxh3 *h, const void *bytes, size_t n);
void obm__xxh3_end(obm__xxh3 *h, char out[33]); /* canonical big-endian hex; frees h; out NULL: frees only */
void obm__xxh3_of(const void *bytes, size_t n, char out[33]);
/* A whole file, whose pages do not stay resident; tick nullable, out untouched on failure. */
obm_status obm__map_xxh3(const obm__map *m, obm__tick_fn tick, void *user, char out[33], obm_error *err);
/* pulse (nullable) is looked at now and then. */
obm_status obm__sha256_of(const void *bytes, size_t n, obm__pulse *pulse, char out[65], obm_error *err);

/* ---- safetensors (safetensors.c) ---- */

/* t views the mapping, and t.data may have any alignment: read it by memcpy, unaligned loads, obm__widen or the
 * kernels. */
typedef struct obm__st_entry {
    char *name;
    obm_tensor t;
} obm__st_entry;
typedef struct obm__safetensors {
    char *path;
    obm__map map;
    obm__st_entry *entries; /* sorted by name (strcmp) */
    size_t count;
    obm_json *metadata; /* __metadata__ or NULL */
} obm__safetensors;
obm_status obm__safetensors_open(const char *path, obm__safetensors **out, obm_error *err);
/* The checks without a file: used by open and by the fuzzer. */
obm_status obm__safetensors_parse(const uint8_t *data, size_t size, const char *where, obm__safetensors *out,
                                  obm_error *err);
void obm__safetensors_free(obm__safetensors *s);
const obm__st_entry *obm__safetensors_find(const obm__safetensors *s, const char *name);

/* Tensors to be written, back to back in this order; zero-initialised, items owned. */
typedef struct obm__declared {
    char *name;
    obm_dtype dtype;
    int32_t ndim;
    int64_t shape[OBM_MAX_DIM];
    uint64_t begin, end; /* bytes, from the first tensor on */
} obm__declared;
typedef struct obm__declared_list {
    obm__declared *items;
    size_t count, capacity;
    uint64_t bytes;
} obm__declared_list;
/* ARG for what obm__st_bytes refuses and beyond 2^63 bytes; `where` is for messages. */
obm_status obm__declare(obm__declared_list *l, const char *where, const char *name, obm_dtype dtype, int32_t ndim,
                        const int64_t *shape, obm_error *err);
void obm__declared_free(obm__declared_list *l);

/* Streaming writer: declare all tensors first (the header needs every offset), then write them in that order.  Goes to
 * a temporary name beside PATH; finish syncs and renames to PATH; free before that removes it. */
typedef struct obm__st_writer obm__st_writer;
obm_status obm__st_writer_new(const char *path, obm__st_writer **out, obm_error *err);
obm_status obm__st_writer_declare(obm__st_writer *w, const char *name, obm_dtype dtype, int32_t ndim,
                                  const int64_t *shape, obm_error *err);
obm_status obm__st_writer_metadata(obm__st_writer *w, const char *key, const char *value, obm_error *err);
obm_status obm__st_writer_begin(obm__st_writer *w, obm_error *err); /* writes the header, 64-byte aligned data */
/* the next n bytes of the data part */
obm_status obm__st_writer_write(obm__st_writer *w, const void *bytes, size_t n, obm_error *err);
/* The same in two halves, for several threads at once: `put` writes at an offset of the data part, any thread and
 * order; `pass` takes the same bytes, once they are put, into the checksum and the count, in order. */
obm_status obm__st_writer_put(const obm__st_writer *w, uint64_t offset, const void *bytes, size_t n, obm_error *err);
void obm__st_writer_pass(obm__st_writer *w, const void *bytes, size_t n);
uint64_t obm__st_writer_written(const obm__st_writer *w); /* bytes of the data part */
/* of the whole file; after all declares; before begin 0 without memory */
uint64_t obm__st_writer_size(const obm__st_writer *w);
obm_status obm__st_writer_finish(obm__st_writer *w, char xxh3[33] /* nullable */, obm_error *err);
void obm__st_writer_free(obm__st_writer *w); /* aborts if not finished */
/* finish in two steps, for files that appear together: seal syncs the temporary file, publish renames it to `path`
 * (NULL: the writer's own). */
obm_status obm__st_writer_seal(obm__st_writer *w, char xxh3[33] /* nullable */, obm_error *err);
obm_status obm__st_writer_publish(obm__st_writer *w, const char *path, obm_error *err);
/* Takes a file that another writer of the same tensors sealed; instead of begin, write and seal. */
obm_status obm__st_writer_adopt(obm__st_writer *w, const char *temp, obm_error *err);
const char *obm__st_writer_temp(const obm__st_writer *w); /* NULL before begin and after publish; borrowed */
void obm__st_writer_leave(obm__st_writer *w);             /* a sealed file stays under its temporary name after free */
/* Bytes of a tensor's data; ARG when it cannot be written. */
obm_status obm__st_bytes(const char *name, obm_dtype dtype, int32_t ndim, const int64_t *shape, uint64_t *out,
                         obm_error *err);

/* ---- PEFT adapters (adapter.c) ---- */

/* adapter_config.json, checked: nothing in it changes the weights but what is here. */
typedef struct obm__adapter {
    char *path, *text;
    obm_json *root;
    int64_t rank;
    double alpha;
    bool rslora;                                  /* scaling = alpha / sqrt(r) instead of alpha / r */
    bool transposed;                              /* fan_in_fan_out: the base's matrices are (in, out) */
    bool keeps_tie;                               /* ensure_weight_tying */
    const obm_json *rank_pattern, *alpha_pattern; /* objects or NULL; borrowed from root */
} obm__adapter;
obm_status obm__adapter_load(const char *directory, obm__adapter **out, obm_error *err);
void obm__adapter_free(obm__adapter *a);
bool obm__adapter_here(const char *directory, bool *out); /* false: out of memory */
#define OBM_ADAPTER_CONFIG "adapter_config.json"
#define OBM_ADAPTER_WEIGHTS "adapter_model.safetensors"

/* ---- an expert of a pack, PACK:task (pack_member.c) ---- */

typedef struct obm__member {
    char *pack, *task;      /* the pack's folder; which of its experts */
    obm_json *manifest;     /* pack.json */
    const obm_json *record; /* the expert's part of it */
    size_t index;
} obm__member;
/* The length of PACK where `name` is PACK:task, PACK is a folder (or a name that the context resolves), and there is
 * nothing of the whole name; else 0. */
size_t obm__member_split(const obm_context *ctx, const char *name);
/* *file: the expert's, nothing in it is checked but its length; owned, as is *out.  NOTFOUND lists the pack's experts.
 */
obm_status obm__member_open(obm_context *ctx, const char *name, obm__member **out, obm__safetensors **file,
                            obm_error *err);
void obm__member_free(obm__member *m);
/* Where the pack says that its base is; nothing is compared. */
obm_status obm__member_base(const obm_checkpoint *c, obm_checkpoint **out, obm_error *err);
/* ARG for the folder of a pack, and how its experts are named; OK for any other. */
obm_status obm__member_refuse(const char *directory, obm_error *err);

/* ---- names (layout.c) ---- */

/* Names in the core are those of a text model by itself; tensors in files may lie elsewhere ("language_model.model."
 * for "model.").  Layout 0 is the former. */
#define OBM_LAYOUTS 3
#define OBM_EMBEDDING_NAME "model.embed_tokens.weight"
#define OBM_HEAD_NAME "lm_head.weight"
const char *obm__layout_embedding(int layout);
const char *obm__layout_body(int layout); /* what the names of the text model's tensors begin with, but the head's */
const char *obm__layout_head(int layout);
bool obm__is_head(const char *name);                /* in any layout */
bool obm__same_place(const char *a, const char *b); /* one tensor or module, but for the layout */
/* The item of a sorted array that has this name, else the one that has it in `layout`; NULL: none. */
typedef const char *(*obm__name_fn)(const void *item);
const void *obm__find_named(const char *name, int layout, const void *items, size_t count, size_t size,
                            obm__name_fn name_of);

/* ---- checkpoints (checkpoint.c) ---- */

struct obm_checkpoint {
    obm_context *ctx;
    char *path;        /* as given */
    char *directory;   /* the folder, or the folder of the single file */
    char *config_text; /* NULL without config.json */
    obm_json *config;  /* parsed, NULL without */
    obm__safetensors **files;
    size_t n_files;
    const obm__st_entry **tensors; /* all, sorted by name; borrowed from files */
    size_t count;
    int layout;            /* of its names */
    bool tied;             /* an embedding and no head of its own, whatever config.json says */
    obm__adapter *adapter; /* NULL for a model; else the tensors are an adapter's own, under its names */
    obm__member *member;   /* NULL for a model; else the tensors are what a pack stores of an expert, under its names */
};
/* It says what an expert changes, not what a model is: an adapter, or an expert of a pack. */
static inline bool obm__checkpoint_is_change(const obm_checkpoint *c) { return c->adapter || c->member; }
/* ARG where such a one cannot stand for `what`, "a base" or "a model". */
obm_status obm__checkpoint_is_model(const obm_checkpoint *c, const char *what, obm_error *err);
/* obm__map_check of all its files; passes call it before they read. */
obm_status obm__checkpoint_check(const obm_checkpoint *c, obm_error *err);
/* Hands the resident pages of all its files back. */
void obm__checkpoint_release_pages(const obm_checkpoint *c);
/* By its own name or that in another layout; NULL if absent. */
const obm__st_entry *obm__checkpoint_find(const obm_checkpoint *c, const char *name);
size_t obm__checkpoint_index(const obm_checkpoint *c, const char *name); /* in tensors; SIZE_MAX if absent */
/* What config.json says about the text model: its "text_config", or all of it; NULL without config. */
const obm_json *obm__checkpoint_text_config(const obm_checkpoint *c);
/* Warns of tensors of layers that config.json does not count (layers that predict further tokens, or a config of
 * another model); `outcome` says what becomes of them. */
void obm__checkpoint_warn_layers(const obm_checkpoint *c, const char *outcome);
/* Sets a key there, in a copy of such a config.json; takes value over, NULL is fine.  false: out of memory. */
bool obm__text_config_set(obm_json *config, const char *key, obm_json *value);
/* Makes it say that the head is a tensor of its own. */
bool obm__config_untie(obm_json *config);
/* XXH3 over the config and every tensor's name, dtype, shape and sampled contents, as a pack knows its base
 * (pack_base.c).  tick nullable. */
obm_status obm__checkpoint_fingerprint(obm_context *ctx, const obm_checkpoint *c, obm__tick_fn tick, void *user,
                                       char out[33], obm_error *err);

/* ---- copies of what checkpoints map (reader.c) ---- */

typedef struct obm__reader obm__reader;
/* The checkpoints' files are opened again, where they still are under their names. */
obm_status obm__reader_new(const obm_checkpoint *const *checkpoints, size_t n, obm__reader **out, obm_error *err);
void obm__reader_free(obm__reader *r);
/* A few bytes here and there are about to be read: the system does not read their neighbours ahead. */
void obm__reader_scattered(const obm__reader *r);
/* n bytes at `data`, in a mapping of one of them; any thread.  IO also for a file that has become shorter. */
obm_status obm__reader_get(const obm__reader *r, const void *data, size_t n, void *to, obm_error *err);

/* ---- model folders out (model_writer.c) ---- */

obm_json *obm__file_record(const char *name, uint64_t bytes, const char *xxh3); /* {"file", "bytes", "xxh3"}; owned, NULL: no memory */

/* A Hugging Face folder: shards, index, config, tokenizer files, model card.  The new state appears with the last
 * rename (index.json, or the single model.safetensors); a killed run leaves the old folder or none, and beside it what
 * the next run with `resume` goes on with and any other run removes (unfinished.h). */
typedef struct obm__model_writer obm__model_writer;
typedef struct obm__model_writer_options {
    uint64_t shard_bytes; /* 0: 5e9 */
    bool overwrite;
    const char *copy_from; /* folder whose config.json, tokenizer*, special_tokens_map.json, generation_config.json, ...
                              are carried over */
    const char *const (*instead)[2]; /* (n_instead), borrowed until the writer is freed: name of such a file, and the
                                        path to carry it over from, NULL: the model has none */
    size_t n_instead;
    const char *const (*texts)[2]; /* (n_texts), borrowed likewise: name of such a file, and what it holds */
    size_t n_texts;
    obm_json *config;    /* replaces config.json (borrowed, nullable) */
    const char *card;    /* text of README.md, nullable; a table of the shards' checksums follows it */
    const obm_json *job; /* a flat object; what decides the bytes of all shards (borrowed, nullable) */
    bool resume;         /* keep the finished shards of a killed run of the same job, and leave one's own on failure */
    obm__tick_fn tick;   /* while files are checked for resuming; nullable */
    void *user;
} obm__model_writer_options;
obm_status obm__model_writer_new(const char *path, const obm__model_writer_options *o, obm__model_writer **out,
                                 obm_error *err);
obm_status obm__model_writer_declare(obm__model_writer *w, const char *name, obm_dtype dtype, int32_t ndim,
                                     const int64_t *shape, obm_error *err);
/* Whether a writer would refuse the folder for what it holds, without a look at what a killed run left: for callers
 * that work before they write. */
obm_status obm__model_writer_check(const char *path, bool overwrite, obm_error *err);
/* Whether the folder holds what this writer would write, by the record that one of the same job left: nothing is to be
 * done then.  Size and XXH3 of every file but the card are looked at, with `tick`.  Only with `resume`.  Unless
 * overwriting, MISMATCH names what differs in another job, EXISTS a file that is damaged. */
obm_status obm__model_writer_finished(const obm__model_writer *w, bool *finished, obm_error *err);
/* Whether a finished writer of a job left its record: what `resume` is to look at before it refuses the folder. */
bool obm__model_writer_recorded(const char *path);
/* Locks the folder (BUSY), refuses one that holds something (EXISTS) or, resuming, another job (MISMATCH). */
obm_status obm__model_writer_begin(obm__model_writer *w, obm_error *err);
/* The tensor's bytes are there from a killed run: it is not written again. */
bool obm__model_writer_has(const obm__model_writer *w, size_t tensor);
/* in order of declaration without those, any chunking */
obm_status obm__model_writer_write(obm__model_writer *w, const void *bytes, size_t n, obm_error *err);
uint64_t obm__model_writer_size(const obm__model_writer *w);
/* The shards as [{file, bytes}], before anything is written; *out is owned.  fit: IO where there is no room for
 * them. */
obm_status obm__model_writer_files(const obm__model_writer *w, bool fit, obm_json **out, obm_error *err);
obm_status obm__model_writer_finish(obm__model_writer *w, obm_error *err);
void obm__model_writer_free(obm__model_writer *w); /* aborts if not finished */

#endif
