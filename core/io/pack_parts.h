/* How the files of a pack are taken apart and put together; only the pack_*.c files look in here.  FORMAT.md has the bytes. */
#ifndef OBM_PACK_PARTS_H
#define OBM_PACK_PARTS_H

#include "pack.h"

#define OBM_PACK_MANIFEST "pack.json"
#define OBM_PACK_PARTIAL ".obm-partial"   /* a file whose contents, and so whose name, are not known yet */
#define OBM_PACK_FORMAT "onebitmerge pack"
#define OBM_PACK_VERSION 1
#define OBM_PACK_VERSION_SHARED 2   /* of a pack with shared vectors, and of no other */
/* Routes, reports and confusion tables are sized for this many tasks. */
#define OBM_PACK_MAX_TASKS OBM_MAX_REPORT_TASKS

/* A pulse with the options' callback, which is borrowed. */
obm__pulse obm__compress_pulse(const obm_context *ctx, const obm_compress_options *options, const char *what, uint64_t total);
/* Reports now; t nullable.  What is done never goes back, and never beyond the total. */
obm_status obm__tick(obm__pulse *t, uint64_t done, obm_error *err);

/* ---- the base (pack_base.c) ---- */

struct obm__base_digests;

/* The "base" member: where it lies, seen from the folder `dir` (which exists), and its fingerprint with full hashes. */
obm_status obm__base_record(obm_context *ctx, const obm_checkpoint *base, const char *dir, struct obm__base_digests *known,
                            obm__pulse *ticker, obm_json **out, obm_error *err);
/* Full hashes are trees of one level over chunks of so many bytes, so that one large tensor keeps all threads busy. */
#define OBM_BASE_CHUNK ((size_t)16 << 20)
/* The hashes of the chunks, filled by whoever reads the base anyway; obm__base_record (where they are nullable) then reads only
 * what is left. */
typedef struct obm__base_digests obm__base_digests;
obm_status obm__base_digests_new(const obm_checkpoint *base, obm__base_digests **out, obm_error *err);
void obm__base_digests_free(obm__base_digests *d);
/* The number of a tensor's first chunk, for the caller to hash all of them; SIZE_MAX where that has been left to somebody. */
size_t obm__base_digests_take(obm__base_digests *d, const char *tensor);
/* The hash of one of these chunks, and the sample of a tensor that is one chunk, from its bytes as they come by in order.  Any
 * thread; end: these were all bytes, frees. */
typedef struct obm__base_chunk obm__base_chunk;
obm_status obm__base_chunk_new(obm__base_digests *d, size_t chunk, obm__base_chunk **out, obm_error *err);
void obm__base_chunk_add(obm__base_chunk *c, const void *bytes, size_t n);
void obm__base_chunk_end(obm__base_chunk *c);
void obm__base_chunk_free(obm__base_chunk *c);
uint64_t obm__base_memory(const obm_context *ctx, const obm_checkpoint *base);   /* resident while hashing, about */
/* path NULL: the record's relative path, then the absolute one.  Does not check the fingerprint. */
obm_status obm__base_open(obm_context *ctx, const obm_json *record, const char *pack_path, const char *path,
                          obm_checkpoint **out, obm_error *err);
/* MISMATCH names the first tensor that differs.  full: whole contents instead of the samples (ticker nullable otherwise). */
obm_status obm__base_check(obm_context *ctx, const obm_checkpoint *base, const obm_json *record, const char *pack_path, bool full,
                           obm__pulse *ticker, obm_error *err);

/* Text from a file for a message: control characters become '?', at most size - 1 bytes.  Returns buf. */
const char *obm__printable(const char *s, char *buf, size_t size);

/* ---- JSON fields (pack_json.c); all errors are FORMAT and name `where` and the key ---- */

obm_status obm__field(const obm_json *object, const char *key, obm_json_kind kind, const char *where, const obm_json **out,
                      obm_error *err);
obm_status obm__field_string(const obm_json *object, const char *key, const char *where, const char **out, obm_error *err);
obm_status obm__field_int(const obm_json *object, const char *key, int64_t min, int64_t max, const char *where, int64_t *out,
                          obm_error *err);
obm_status obm__field_real(const obm_json *object, const char *key, const char *where, double *out, obm_error *err);
/* "dtype" and "shape" of a record into *out (data NULL); the byte count fits in 63 bits. */
obm_status obm__field_tensor(const obm_json *object, const char *where, obm_tensor *out, obm_error *err);
bool obm__put_tensor(obm_json *object, const obm_tensor *t);
/* A path, or null where JSON cannot hold it (not UTF-8) or there is none; NULL without memory. */
obm_json *obm__path_value(const char *path);
/* Checks such a record; *path owned. */
obm_status obm__file_of(const obm_json *record, const char *dir, const char *where, char **path, uint64_t *bytes,
                        const char **xxh3, obm_error *err);
/* The same of a text file. */
obm_status obm__text_file_of(const obm_json *record, const char *dir, const char *where, char **path, uint64_t *bytes,
                             const char **xxh3, obm_error *err);
obm_json *obm__settings_record(const obm_pack_settings *s);
obm_status obm__settings_parse(const obm_json *manifest, const char *where, obm_pack_settings *out, obm_error *err);
obm_status obm__settings_check(const obm_pack_settings *s, obm_error *err);
void obm__settings_default(obm_profile profile, obm_pack_settings *out);

/* ---- shared vectors and masks (pack_shared.c) ---- */

/* One expert while the shared vectors are being made. */
typedef struct obm__shared_expert {
    const char *name;
    obm_task_vector *v;        /* owned */
    obm__policy policy;
} obm__shared_expert;
typedef struct obm__shared_job {
    obm_context *ctx;
    const obm_checkpoint *base;
    const char *dir;
    bool dry_run;
    obm__pulse *ticker;        /* takes obm__expert_bytes of all experts */
    obm_plan *plan;            /* added to */
    obm__sharing rule;
    int dtype;                 /* obm_dtype; -1: the base's, per tensor */
    obm__shared_expert *experts; /* (n), owned */
    size_t n;
    obm__safetensors *file;    /* what was written; NULL in a dry run */
} obm__shared_job;
/* Whether `shared` is asked for, and how.  Errors: ARG. */
obm_status obm__shared_options(const obm_compress_options *o, bool *wanted, obm__sharing *rule, int *dtype, obm_error *err);
/* The task vectors of all experts and the file of what they share; *record (owned; untouched in a dry run) is the pack's
 * "shared".  Free the job also after a failure. */
obm_status obm__shared_write(obm__shared_job *j, const obm_expert *experts, obm_checkpoint *const *checkpoints, size_t n,
                             obm_profile profile, obm_json **record, obm_error *err);
void obm__shared_free(obm__shared_job *j);

/* One matrix of one expert: its bits go to the writer.  sums: of |d| and |mask * shared|, set; 0 without EMR. */
typedef struct obm__mask_sums { double own, shared; } obm__mask_sums;
obm_status obm__mask_write(const obm__shared_job *j, const obm__pair *pair, obm__st_writer *w, uint64_t ticks,
                           obm__mask_sums *sums, obm_error *err);
uint64_t obm__mask_memory(const obm_context *ctx, int64_t rows, int64_t cols);

/* The member "shared" of a pack of version 2, checked against its file; out is cleared with obm__shared_close, also after a
 * failure.  Nothing without it in version 1. */
obm_status obm__shared_load(const obm_json *manifest, const char *dir, const char *where, obm__pack_shared *out, obm_error *err);
void obm__shared_close(obm__pack_shared *s);

/* ---- writing one expert (pack_expert.c) ---- */

/* Whether the expert's rows are the base's, value for value, where it has a tensor of its own.  Errors: those of the ticker
 * (nullable). */
obm_status obm__pair_is_same(obm_context *ctx, const obm__pair *p, obm__pulse *ticker, bool *same, obm_error *err);

typedef struct obm__expert_request {
    obm_context *ctx;
    const obm_checkpoint *base;
    const obm_expert *expert;
    obm_profile profile;
    const char *dir;           /* of the pack */
    bool dry_run;
    obm__pulse *ticker;       /* total is set by the caller: obm__expert_bytes of all */
    obm__base_digests *digests; /* nullable: takes hashes of what is read of the base */
    obm_plan *plan;            /* added to */
    const obm__shared_job *shared; /* NULL: no masks */
    obm_task_vector *v;        /* borrowed; NULL: it is made */
} obm__expert_request;
/* The caller's array, whose elements may be of another size, into one of ours: (n).  Strings and maps stay borrowed. */
obm_status obm__experts_read(const obm_expert *given, size_t n, obm_expert *own, obm_error *err);
bool obm__is_task_name(const char *s);
obm_status obm__expert_check(const obm_expert *e, obm_error *err);   /* name and fields, before anything is read */
/* Its checkpoint.  ARG for one that a pack holds already: a plane of planes would pass for the model's own. */
obm_status obm__expert_open(obm_context *ctx, const obm_expert *e, obm_checkpoint **out, obm_error *err);
uint64_t obm__checkpoint_bytes(const obm_checkpoint *c);
uint64_t obm__expert_bytes(const obm_checkpoint *base, const obm_checkpoint *expert);   /* what its progress counts */
/* Compresses into a file of the folder; *record (owned; untouched in a dry run) is its member of "experts". */
obm_status obm__expert_write(const obm__expert_request *r, const obm_checkpoint *checkpoint, obm_json **record, obm_error *err);
/* A writer for a file of the pack, and its end: the file gets its content-derived name "<stem>-<16 hex digits>.safetensors",
 * *name owned.  The writer is the caller's to free. */
obm_status obm__pack_writer(const char *dir, const char *stem, obm__st_writer **out, obm_error *err);
obm_status obm__pack_publish(obm__st_writer *w, const char *dir, const char *stem, char xxh3[33], uint64_t *bytes, char **name,
                             obm_error *err);

/* ---- several tensors of its file at once (pack_stream.c) ---- */

/* Elements that a thread works on between two looks at the others; rows that are longer are not streamed. */
#define OBM_STREAM_WINDOW ((int64_t)1 << 20)
typedef struct obm__stream_part {
    const obm__pair *pair; /* not in factors */
    bool planes;           /* signs and scales of one plane; else the elements of the expert from `begin` on, as they are */
    obm__scale scale;
    int64_t begin;
} obm__stream_part;
typedef struct obm__stream {
    obm__st_writer *writer;
    const obm_task_vector *v;
    const obm__stream_part *parts; /* (n) what is next in the file, in its order */
    size_t n;
    bool *empty;                   /* (n): the plane is all 0 */
    obm__base_digests *digests;    /* nullable */
    obm__pulse *ticker;
    uint64_t ticks;                /* where its count stands */
} obm__stream;
/* Errors: VALUE, NOMEM, IO, those of the ticker. */
obm_status obm__stream_run(obm_context *ctx, const obm__stream *s, obm_error *err);
/* Buffers, but for scales and sums of rows; row: bytes of a row, 0 for whole tensors. */
uint64_t obm__stream_memory(const obm_context *ctx, int64_t cols, size_t row);

/* ---- the experts' texts (pack_text.c) ---- */

/* Compares the expert's tokenizer, template and eos with the base's, stores what differs in `dir` (dry_run: only checks) and
 * says so in *record, owned: NULL where nothing differs.  MISMATCH: token ids that contradict the base's. */
obm_status obm__text_write(const obm__expert_request *r, const obm_checkpoint *expert, obm_json **record, uint64_t *bytes,
                           obm_error *err);
/* The "text" member of an expert (nullable), checked; out is cleared with obm__text_clear, also after a failure. */
obm_status obm__text_load(const obm_json *record, const char *dir, const char *where, const char *task, obm__pack_text *out,
                          obm_error *err);
void obm__text_clear(obm__pack_text *t);
bool obm__text_owns(const char *file);                                /* a name that obm__text_write gives */
bool obm__text_names(const obm_json *record, const char *file);      /* record: the "text" member, nullable */
/* The record of one file, NULL without. */
const obm_json *obm__text_record(const obm_json *record, obm__text_file f);

/* ---- the opened pack (pack_load.c) ---- */

/* Checks the manifest against the base and the files.  On success the pack owns manifest and base. */
obm_status obm__pack_load(obm_context *ctx, const char *path, obm_json *manifest, obm_checkpoint *base, obm_pack **out, obm_error *err);
/* With one expert alone, without settings and router: everything but that expert's part of the manifest is left unread. */
obm_status obm__pack_load_one(obm_context *ctx, const char *path, obm_json *manifest, size_t expert, obm_checkpoint *base,
                              obm_pack **out, obm_error *err);
/* The file of an expert's record, whose length is checked; nothing in it is but what safetensors asks. */
obm_status obm__pack_open_file(const char *dir, const obm_json *record, const char *where, obm__safetensors **out, obm_error *err);
/* pack.json of a folder, parsed; its format and version are checked.  xxh3 of its bytes. */
obm_status obm__manifest_read(const char *dir, obm_json **out, char xxh3[33], obm_error *err);
/* Frees everything but manifest and base. */
void obm__pack_unload(obm_pack *p);

/* ---- one change at a time (pack_lock.c) ---- */

/* Locks the folder of a pack for a change; BUSY when somebody else has it.  The lock goes with the process. */
obm_status obm__pack_lock(const char *dir, int *lock, obm_error *err);
void obm__pack_unlock(int lock);
/* The same for an opened pack; BUSY also when pack.json is not the one that was opened. */
obm_status obm__pack_begin(const obm_pack *p, int *lock, obm_error *err);

/* ---- changes (pack_change.c) ---- */

/* The commit, then the clean-up; xxh3 of the new pack.json.  The lock is held. */
obm_status obm__manifest_write(const char *dir, const obm_json *manifest, char xxh3[33], obm_error *err);
bool obm__pack_owns(const char *file);   /* a name that this library gives */
void obm__pack_clean(const char *dir, const obm_json *manifest);   /* removes files of ours that the manifest does not name */

#endif
