/*
 * onebitmerge.h - 1-bit task vectors, routed merging and CPU inference.
 *
 * Somebody has a base LLM and K fine-tunes of it.  This library stores each fine-tune as a 1-bit task vector
 * (alpha * sign(expert - base)), decides per request which task it is, and runs
 *
 *     theta(x) = theta_base + d~_k + lambda * TIES({ d~_j : j != k }),     k = argmax Router(x),     d~ = alpha * sign(d)
 *
 * (Liu et al., "1bit-Merging: Dynamic Quantized Merging for Large Language Models", section 3.3).
 *
 * Conventions
 *   - Functions that can fail return obm_status; their outputs are untouched on failure, except where a comment says
 *     otherwise.  `err` comes last, belongs to the caller and may be NULL.
 *   - "owned": free it with the matching *_free (obm_free for plain buffers).  "borrowed": lives as long as the object it
 *     came from.  "view": never owns, the caller keeps the memory alive.
 *   - Strings are UTF-8 and NUL-terminated.  Shapes are given as (rows, cols), row-major.
 *   - Option structs start with struct_size (use OBM_INIT); NULL options mean the defaults that the comments state.  A size
 *     from another version of this header is understood: fields that a smaller one lacks have their defaults, and
 *     bytes that a larger one has beyond this version's must be zero (UNSUPPORTED).  The elements of an array are
 *     as far apart as the first one's struct_size.  Structs that are filled are not written beyond their struct_size.
 *   - Long work takes a progress callback; it is called on the caller's thread only; non-zero stops with OBM_E_USER.  What
 *     takes none asks the context's `interrupt`.  Either way a call returns within about 100 ms of the answer,
 *     but for LAPACK's decomposition of one matrix, which runs to its end.
 *
 * Sections: Version, Status, Context, Tensors, Checkpoints, Task vectors, Compression and packs, Routes, Routers,
 *           Static merges, Text, Models, Generation.
 */
#ifndef ONEBITMERGE_H
#define ONEBITMERGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__) && !defined(OBM_STATIC)
#define OBM_API __attribute__((visibility("default")))
#else
#define OBM_API
#endif

/* Zero-initialised option struct with its size filled in:  obm_model_options opt = OBM_INIT(obm_model_options);  */
#ifdef __cplusplus
#define OBM_INIT(type) type{sizeof(type)}
#else
#define OBM_INIT(type) ((type){.struct_size = sizeof(type)})
#endif

/* ---- Version ---------------------------------------------------------------------------------------------------- */

#define OBM_VERSION_MAJOR 0
#define OBM_VERSION_MINOR 1
#define OBM_VERSION_PATCH 0
#define OBM_ABI_VERSION 1

OBM_API const char *obm_version(void);   /* "0.1.0", static */
OBM_API int obm_abi_version(void);       /* OBM_ABI_VERSION of the library; bindings compare it with the header's */

/* ---- Status ----------------------------------------------------------------------------------------------------- */

typedef enum obm_status {
    OBM_OK = 0,
    OBM_E_NOMEM = -1,       /* out of memory */
    OBM_E_ARG = -2,         /* wrong use: an argument out of range, an unknown name */
    OBM_E_SHAPE = -3,       /* shapes do not fit */
    OBM_E_DTYPE = -4,       /* dtype not usable here */
    OBM_E_IO = -5,          /* the operating system refused: missing file, full disk, ... */
    OBM_E_FORMAT = -6,      /* a file is not what it should be */
    OBM_E_NOTFOUND = -7,    /* no tensor, expert, task of that name */
    OBM_E_UNSUPPORTED = -8, /* understood, but this build or version cannot do it */
    OBM_E_BUSY = -9,        /* an object that serves one call at a time is in use, or another process changes a folder */
    OBM_E_USER = -10,       /* a callback asked to stop; whatever it raised is the caller's to re-raise */
    OBM_E_EXISTS = -11,     /* the output exists and overwriting was not asked for: with it the call would go on */
    OBM_E_MISMATCH = -12,   /* a pack meets another base than the one it was made from, an expert's token ids contradict the
                             * base's or its architecture does, other remains than `resume` expects */
    OBM_E_VALUE = -13,      /* NaN or Inf where a number is needed */
    OBM_E_OCCUPIED = -14    /* what is there is not replaced, whether or not overwriting was asked for */
} obm_status;

#define OBM_ERROR_MESSAGE 768

/* Caller-owned; filled on failure.  `message` says what was expected, what came, and where. */
typedef struct obm_error {
    obm_status code;
    int os_errno;           /* errno for OBM_E_IO, else 0 */
    char message[OBM_ERROR_MESSAGE];
} obm_error;

OBM_API const char *obm_status_name(obm_status status);   /* "OK", "NOMEM", ...; static */
/* The index of the known name that a mistyped one was probably to be, by edit distance; n: none is near. */
OBM_API size_t obm_suggest(const char *name, const char *const *known, size_t n);
OBM_API void obm_free(void *p);   /* frees plain buffers returned as owned; NULL is a no-op */

/* Returns non-zero to stop.  `done` and `total` count bytes, items or tokens as `what` says ("compress", "train", ...). */
typedef int (*obm_progress_fn)(void *user, const char *what, uint64_t done, uint64_t total);
typedef void (*obm_log_fn)(void *user, const char *message);   /* one warning, no newline */

/* ---- Context ---------------------------------------------------------------------------------------------------- */

/* Threads, topology and kernels.  The calling thread works too and needs 512 KiB of stack (musl gives threads 128 KiB
 * unless they ask for more).  Thread-safe: many objects and threads may share one; when its workers are busy with
 * another caller's work, a call runs on its own thread alone, with the same result. */
typedef struct obm_context obm_context;

/* Writes the local path of an input that is a name, "org/name" or "org/name@revision", into path[size]; called where there is
 * no file or folder of that name, on the caller's thread.  On failure fills err. */
typedef obm_status (*obm_resolve_fn)(void *user, const char *name, char *path, size_t size, obm_error *err);

/* Asked on the caller's thread, about every 50 ms, by long calls that take no progress callback or were given none; non-zero
 * stops the call with OBM_E_USER.  A program's Ctrl-C handler sets a flag, and this says whether it is set. */
typedef int (*obm_interrupt_fn)(void *user);

/* Where weights and workers go on a machine with several NUMA nodes; on one node all are OFF. */
typedef enum obm_numa {
    OBM_NUMA_AUTO = 0,      /* shard where that is worth it, else isolate */
    OBM_NUMA_SHARD = 1,     /* each node holds and multiplies its own rows */
    OBM_NUMA_REPLICATE = 2, /* each node with workers holds all rows: that many times the memory */
    OBM_NUMA_ISOLATE = 3,   /* one node's memory and cores */
    OBM_NUMA_INTERLEAVE = 4,/* pages in turn over all nodes */
    OBM_NUMA_OFF = 5        /* the system decides */
} obm_numa;
/* By name: "auto", "shard", "replicate", "isolate", "interleave", "off".  Errors: ARG, which lists them. */
OBM_API obm_status obm_numa_find(const char *name, obm_numa *out, obm_error *err);

typedef struct obm_context_options {
    size_t struct_size;
    int64_t threads;        /* 0: one per core this process may use, no more than a control group's quota; at most 4096 */
    obm_log_fn log;         /* warnings; NULL: dropped */
    void *log_user;
    obm_resolve_fn resolve; /* names of checkpoints, models and packs that are no paths; NULL: they are an IO error */
    void *resolve_user;
    obm_interrupt_fn interrupt;   /* NULL: such calls run to their end */
    void *interrupt_user;
    obm_numa numa;          /* with workers on several nodes the thread that calls a model is one of them: it is bound to a core
                             * while the call lasts */
} obm_context_options;

/* Reads the environment once: ONEBITMERGE_ISA lowers the instruction set ("scalar", "avx2", "avx512", "amx", "neon"; an unknown
 * or unsupported name is OBM_E_ARG), ONEBITMERGE_THREADS gives the default of `threads`, ONEBITMERGE_NUMA
 * that of `numa` by name.  Errors: NOMEM, ARG, UNSUPPORTED.  *out is owned. */
OBM_API obm_status obm_context_new(const obm_context_options *options, obm_context **out, obm_error *err);
OBM_API void obm_context_free(obm_context *ctx);   /* after everything that was opened with it */

typedef struct obm_context_info {
    const char *isa;            /* in use */
    const char *isa_available;  /* comma-separated, best last */
    const char *blas;           /* name, version and core of the BLAS, "OpenBLAS 0.3.21 Zen" */
    const char *topology;       /* one line: packages, NUMA nodes, cores, caches */
    const char *compiler;
    int threads, cores, nodes;
    uint64_t memory_total, memory_free;   /* bytes */
    bool prefill_bf16;          /* the CPU multiplies bf16: obm_model_options.prefill = OBM_BF16 gains */
    bool z12_auto;              /* the kernels in use gain by 12 bits per weight: OBM_Z12_AUTO packs where there is room */
} obm_context_info;
OBM_API void obm_context_describe(const obm_context *ctx, obm_context_info *out);   /* strings borrowed from ctx */

/* ---- Tensors ---------------------------------------------------------------------------------------------------- */

typedef enum obm_dtype {
    OBM_F32 = 0, OBM_F16 = 1, OBM_BF16 = 2, OBM_F64 = 3, OBM_U8 = 4, OBM_I8 = 5, OBM_I16 = 6, OBM_I32 = 7, OBM_I64 = 8,
    OBM_BOOL = 9, OBM_U16 = 10, OBM_U32 = 11, OBM_U64 = 12, OBM_F8_E4M3 = 13, OBM_F8_E5M2 = 14
} obm_dtype;
#define OBM_DTYPE_COUNT 15
OBM_API const char *obm_dtype_name(obm_dtype dtype);   /* safetensors' names: "F32", "BF16", ... */
OBM_API size_t obm_dtype_size(obm_dtype dtype);        /* bytes per element */

#define OBM_MAX_DIM 8
/* A by-value view; row-major, contiguous. */
typedef struct obm_tensor {
    const void *data;
    obm_dtype dtype;
    int32_t ndim;
    int64_t shape[OBM_MAX_DIM];
} obm_tensor;
OBM_API int64_t obm_tensor_count(const obm_tensor *t);   /* elements; -1: negative or overflowing shape */
/* Widens elements [begin, begin + n) of an F32, F16, BF16 or F64 tensor.  Errors: DTYPE, ARG (range). */
OBM_API obm_status obm_tensor_read_f32(const obm_tensor *t, int64_t begin, int64_t n, float *out, obm_error *err);

/* design.md calls this the module class; policies and reports are by class. */
typedef enum obm_class {
    OBM_CLASS_ATTENTION = 0,   /* q, k, v, o */
    OBM_CLASS_MLP = 1,         /* gate, up, down */
    OBM_CLASS_EMBEDDING = 2,
    OBM_CLASS_HEAD = 3,
    OBM_CLASS_NORM = 4,
    OBM_CLASS_BIAS = 5,
    OBM_CLASS_OTHER = 6        /* matrices of no known name: no policy binarises them, only a map rule does */
} obm_class;
#define OBM_CLASS_COUNT 7
OBM_API const char *obm_class_name(obm_class cls);          /* "attention", ... */
OBM_API obm_class obm_class_of(const char *tensor_name, int32_t ndim);   /* by the names of the LLaMA family; 1-D: bias or norm;
                                                            * OTHER for what sees or hears ("vision_tower.", ...) */

/* ---- Checkpoints ------------------------------------------------------------------------------------------------ */

/* A Hugging Face folder (config.json, one or many *.safetensors), a PEFT LoRA folder (adapter_config.json,
 * adapter_model.safetensors), a single .safetensors file, or one expert of a pack, PACK:task (the pack's folder, a colon, the
 * expert's name); memory-mapped; no tensor is read before it is used.  While it is open its files must not be cut short or
 * rewritten in place (the system answers with SIGBUS); replacing them by rename, as every writer of this library does, is
 * safe.  Immutable, share freely. */
typedef struct obm_checkpoint obm_checkpoint;

/* Errors: IO, FORMAT (file, byte offset or key, expected, found), UNSUPPORTED (torch .bin, GGUF,
 * adapters other than LoRA or with settings that are not understood), ARG (the folder of a pack: the message lists its
 * experts), NOTFOUND (PACK:task without such an expert), NOMEM.  *out is owned. */
OBM_API obm_status obm_checkpoint_open(obm_context *ctx, const char *path, obm_checkpoint **out, obm_error *err);
OBM_API void obm_checkpoint_free(obm_checkpoint *c);
OBM_API const char *obm_checkpoint_path(const obm_checkpoint *c);       /* borrowed */
OBM_API const char *obm_checkpoint_config(const obm_checkpoint *c);     /* text of config.json, NULL without; borrowed */
/* No head in its files, whatever config.json says: it is the embedding. */
OBM_API bool obm_checkpoint_is_tied(const obm_checkpoint *c);
/* A PEFT LoRA folder; its tensors have the adapter's names. */
OBM_API bool obm_checkpoint_is_adapter(const obm_checkpoint *c);
OBM_API size_t obm_checkpoint_count(const obm_checkpoint *c);
/* Tensors in the order of their names.  i < count.  *name borrowed, *t a view into the mapping. */
OBM_API void obm_checkpoint_at(const obm_checkpoint *c, size_t i, const char **name, obm_tensor *t);
OBM_API obm_status obm_checkpoint_get(const obm_checkpoint *c, const char *name, obm_tensor *t, obm_error *err); /* NOTFOUND */
/* SHA-256 of one tensor's bytes as 64 hex digits + NUL. */
OBM_API obm_status obm_checkpoint_sha256(const obm_checkpoint *c, const char *name, char out[65], obm_error *err);
/* How well 12 bits per weight (obm_model_options.z12) would hold a matrix, by `rows` rows of it that lie evenly (0: all): how
 * many weights they have, how many of them need an escape of 8 bytes, and whether that is few enough (1 %) for a model to
 * pack it.  All 0 where the tensor is no bf16 matrix.  Errors: NOTFOUND, IO, ARG (rows < 0), NOMEM. */
typedef struct obm_z12_counts { uint64_t weights, escapes; bool fits; } obm_z12_counts;
OBM_API obm_status obm_checkpoint_z12(const obm_checkpoint *c, const char *name, int64_t rows, obm_z12_counts *out,
                                      obm_error *err);
/* Warns of tensors in layers that config.json does not count, which no model runs; silent without a config. */
OBM_API void obm_checkpoint_check_layers(const obm_checkpoint *c);

/* ---- Task vectors ----------------------------------------------------------------------------------------------- */

/* d = expert - base, lazily, in f32, tensor by tensor.  Borrows both checkpoints.  Immutable, share freely. */
typedef struct obm_task_vector obm_task_vector;

/* Names are matched, dtypes may differ, shapes must agree except for extra vocabulary rows of the expert (embedding and
 * head).  A tied side is understood.  An expert that is a LoRA adapter: d = scaling * B A, or the tensor that replaces the
 * base's minus it, and 0 elsewhere; an adapter on the embedding or head of a tied base unties the expert, as it does while
 * it runs.  An expert of a pack, PACK:task: what the pack stores, the sum of the planes where that is 1-bit and 0 where it is
 * dropped; the base must be the pack's (MISMATCH names the first tensor that differs).  Errors: SHAPE (names tensor and both
 * shapes), NOTFOUND (a tensor missing on one side), DTYPE, ARG (the base is an adapter or an expert of a pack), UNSUPPORTED and
 * FORMAT (tensors of an adapter or of a pack), NOMEM. */
OBM_API obm_status obm_task_vector_new(const obm_checkpoint *base, const obm_checkpoint *expert, obm_task_vector **out,
                                       obm_error *err);
OBM_API void obm_task_vector_free(obm_task_vector *v);
OBM_API size_t obm_task_vector_count(const obm_task_vector *v);
/* *base and *expert are views; the expert's may have more rows (extra vocabulary).  Where LoRA factors or planes change the
 * tensor the expert's data is NULL; its dtype is the base's. */
OBM_API void obm_task_vector_at(const obm_task_vector *v, size_t i, const char **name, obm_tensor *base, obm_tensor *expert);
/* out: (rows, cols) of the base's shape, f32.  Errors: NOTFOUND, VALUE (NaN or Inf in d: names tensor and index; out is
 * then written in part). */
OBM_API obm_status obm_task_vector_read(const obm_task_vector *v, const char *name, float *out, obm_error *err);

typedef struct obm_delta_stats {
    uint64_t tensors, params;
    uint64_t zeros;                    /* exact zeros in d */
    double base_norm, delta_norm;      /* L2 */
    double relative_norm;              /* ||d|| / ||theta_base|| */
    double zero_share;                 /* zeros / params */
    double onebit_error_matrix;        /* ||d - alpha sign d|| / ||d||, one alpha per matrix; NaN for d = 0 */
    double onebit_error_row;           /* the same, one alpha per row */
} obm_delta_stats;
/* out[OBM_CLASS_COUNT]: by class, tensors = 0 where there is none.  Errors: VALUE, USER, NOMEM. */
OBM_API obm_status obm_task_vector_stats(obm_context *ctx, const obm_task_vector *v, obm_progress_fn progress, void *user,
                                         obm_delta_stats *out, obm_error *err);
OBM_API obm_status obm_task_vector_tensor_stats(obm_context *ctx, const obm_task_vector *v, const char *name,
                                                obm_delta_stats *out, obm_error *err);
typedef struct obm_delta_pair {
    uint64_t params;
    double cosine;            /* <a, b> / (||a|| ||b||); NaN if one is 0 */
    double sign_agreement;    /* share of elements with sign(a) == sign(b), sign(0) = +1 */
} obm_delta_pair;
/* Two task vectors of one base, by class.  out[OBM_CLASS_COUNT]. */
OBM_API obm_status obm_task_vector_compare(obm_context *ctx, const obm_task_vector *a, const obm_task_vector *b,
                                           obm_progress_fn progress, void *user, obm_delta_pair *out, obm_error *err);

/* Estimates of a dry run, which refuses what the run would (an output that exists and is not to be overwritten, an input
 * as output).  tiles: the pieces that are worked out one after the other.  peak_memory: of a merge the process's own; pages of
 * the files that are mapped meanwhile come on top, and the system may take them back. */
typedef struct obm_plan { uint64_t tensors, tiles, bytes_read, bytes_written, peak_memory; double seconds; } obm_plan;

/* ---- LoRA adapters out of task vectors ---------------------------------------------------------------------------- */

typedef struct obm_lora_options {
    size_t struct_size;
    int64_t rank;               /* of every matrix, as far as it has that many directions; 0: by energy */
    double energy;              /* (0, 1]: the least rank that keeps this share of ||d||^2; 0: by rank.  One of the two. */
    const char *dtype;          /* of the factors: NULL or "f32", "bf16", "f16" */
    const char *base_name;      /* what the adapter calls its base; NULL: base_path */
    bool overwrite;             /* an adapter in the folder is replaced */
    bool dry_run;               /* plan only: nothing is read but headers, nothing is written */
    obm_progress_fn progress;   /* bytes of the base's tensors */
    void *progress_user;
} obm_lora_options;
/* A tensor in which the expert differs: its shape (1-D: one row), the rank of its factors, ||d|| and the share of
 * ||d||^2 that they keep (before they are rounded to their dtype).  Rank 0, energy and norm 0: not in the adapter,
 * since LoRA factors stand for linear weights (attention and MLP) only: norms, biases, embeddings, heads, tensors of
 * unknown names. */
typedef struct obm_lora_matrix { const char *name; int64_t rows, cols, rank; double norm, energy; } obm_lora_matrix;
/* The singular value decomposition of every linear weight's d, truncated, as a PEFT folder (adapter_config.json,
 * adapter_model.safetensors) with lora_alpha = r, so that B A is d.  One matrix is in memory at a time, as f64: up to
 * 14 times its bytes as f32 with the room of LAPACK.  expert_path may be a LoRA folder (to lower its rank).  matrices
 * (nullable) gets *n rows in the order of names: owned, one obm_free, their names in the same block.  plan nullable,
 * filled in a dry run too.
 * Errors: those of opening checkpoints and task vectors, ARG, EXISTS, OCCUPIED, BUSY, VALUE (NaN or Inf; nothing to extract; a
 * decomposition that does not converge: names the tensor), UNSUPPORTED (beyond LAPACK's sizes), IO, USER. */
OBM_API obm_status obm_extract_lora(obm_context *ctx, const char *base_path, const char *expert_path,
                                    const obm_lora_options *options, const char *out_path, obm_plan *plan,
                                    obm_lora_matrix **matrices, size_t *n, obm_error *err);

/* ---- Compression and packs -------------------------------------------------------------------------------------- */

typedef enum obm_mode { OBM_MODE_1BIT = 0, OBM_MODE_FULL = 1, OBM_MODE_DROP = 2, OBM_MODE_SAME = 3, OBM_MODE_MASK = 4 } obm_mode;
OBM_API const char *obm_mode_name(obm_mode mode);   /* "1bit", "full", "drop", "same", "mask" */
/* onto_base: theta_base + d~_k + lambda TIES(others).  recomputed: the others are d~_j - d~_k (delta.md, R3). */
typedef enum obm_reading { OBM_READING_ONTO_BASE = 0, OBM_READING_RECOMPUTED = 1 } obm_reading;
typedef enum obm_profile { OBM_PROFILE_DEFAULT = 0, OBM_PROFILE_PAPER = 1, OBM_PROFILE_MERGEKIT = 2 } obm_profile;

/* One row of an own policy: the first glob that matches a tensor's name decides its mode (MASK with obm_compress_options.shared
 * only). */
typedef struct obm_map_rule { const char *glob; obm_mode mode; } obm_map_rule;

typedef struct obm_expert {
    size_t struct_size;
    const char *name;        /* task name: letters, digits, _ and -; unique in the pack */
    const char *path;        /* checkpoint folder or file, or a LoRA folder: its full tensors are kept as the factors; no PACK:task */
    const char *policy;      /* "linear" (default), "attention", "mlp", "paper", "full"; paper goes by the names chat, math, code */
    const char *scale;       /* "row" (default; "matrix" under paper), "matrix", "group:N" with N a multiple of 64 */
    int planes;              /* 0 = 1; n planes iterate on the residual */
    const obm_map_rule *map; /* before the policy */
    size_t n_map;
} obm_expert;

typedef struct obm_compress_options {
    size_t struct_size;
    bool overwrite;             /* an existing pack is replaced (atomically) */
    bool dry_run;               /* plan and report only; nothing is read but headers, nothing is written; *out stays NULL */
    obm_profile profile;        /* DEFAULT: lambda 0.3, MERGEKIT trims; PAPER: lambda 1 and the paper's policy and trim */
    obm_progress_fn progress;   /* bytes of expert tensors; twice those with `shared` */
    void *progress_user;
    /* NULL: the matrices of a policy become 1-bit planes.  Else one vector per matrix is stored for all experts, and for each
     * expert a mask of one bit per weight: d~_t = scaling_t * mask_t * shared.  "tall": shared = the sum of the task vectors,
     * mask_t = |d_t| > tall_lambda |shared - d_t|, scaling 1 (Wang et al., arXiv 2405.07813, equation 3).  "emr": the
     * elected sign with the largest magnitude of that sign, mask_t where d_t has it, scaling_t = sum |d_t| / sum |mask_t shared|
     * over all its masked matrices (Huang et al., arXiv 2405.17461, section 3.2).  The pack's lambda is 0 then, as in both papers,
     * until it is set.  Such matrices run as overlays, and such a pack takes no more experts.  For obm_compress only. */
    const char *shared;
    double tall_lambda;         /* 0: 0.4 */
    const char *shared_dtype;   /* the shared vectors': NULL: the base's, per tensor (F64: F32); "f32", "bf16", "f16" */
} obm_compress_options;

/* A pack: the compressed experts, the router, the merge settings and the fingerprint of the base.  core/FORMAT.md has the
 * bytes.  Immutable apart from the functions that say "changes the pack"; share freely. */
typedef struct obm_pack obm_pack;

/* An expert's own tokenizer, chat template and eos ids come along where they differ from the base's, and apply under its
 * hard route.  Ids inside the base's vocabulary rows have to stand for the base's tokens (MISMATCH names id and both);
 * other merges are the expert's affair.
 *
 * Compresses n experts of the base at base_path into the folder `out_path`, streaming: resident memory is bounded by tiles,
 * not by the model.  plan (nullable) is filled in a dry run.  *out (nullable) gets the opened pack, owned.
 * Overwriting replaces a pack; a folder that holds anything else is OCCUPIED.  BUSY: another process is writing there.
 * Errors: those of opening checkpoints and task vectors, EXISTS, OCCUPIED, BUSY, ARG, IO, USER. */
OBM_API obm_status obm_compress(obm_context *ctx, const char *base_path, const obm_expert *experts, size_t n,
                                const obm_compress_options *options, const char *out_path, obm_plan *plan, obm_pack **out,
                                obm_error *err);

/* base_path NULL: as the pack says (relative path, then absolute).  The base's fingerprint is checked: MISMATCH names the
 * first tensor that differs. */
OBM_API obm_status obm_pack_open(obm_context *ctx, const char *path, const char *base_path, obm_pack **out, obm_error *err);
OBM_API void obm_pack_free(obm_pack *p);
OBM_API const char *obm_pack_path(const obm_pack *p);
OBM_API const obm_checkpoint *obm_pack_base(const obm_pack *p);   /* borrowed */
/* Checksums of every file and the full hash of the base.  Errors: FORMAT names the file, MISMATCH the tensor. */
OBM_API obm_status obm_pack_verify(const obm_pack *p, obm_progress_fn progress, void *user, obm_error *err);
/* Change the pack, on disk and in *p, atomically.  Everything that changes a pack locks its folder meanwhile: BUSY when
 * another process (or another obm_pack of this one) is changing it, or has changed it since this one was opened, and while
 * a call that takes its time over the pack runs, on this thread (a callback) or another: that of a model, say. */
OBM_API obm_status obm_pack_add(obm_pack *p, const obm_expert *expert, const obm_compress_options *options, obm_error *err);
OBM_API obm_status obm_pack_remove(obm_pack *p, const char *name, obm_error *err);   /* drops the router too: its tasks changed */
/* Takes the experts and the settings of another pack, which stays as it is, in one step.  It has to be of the same base, with
 * the same tasks in the same order (MISMATCH), so the router stays.  Files are linked, or copied where they cannot be.  Errors: those of
 * opening a pack, MISMATCH, ARG, IO, NOMEM, BUSY; USER by the context's interrupt. */
OBM_API obm_status obm_pack_adopt(obm_pack *p, const char *path, obm_error *err);

typedef struct obm_pack_settings {
    size_t struct_size;
    double lambda;          /* >= 0 */
    obm_reading reading;
    obm_profile profile;    /* of the trim of full tensors */
    double density;         /* of that trim, (0, 1] */
} obm_pack_settings;
/* out: struct_size is the caller's. */
OBM_API void obm_pack_get_settings(const obm_pack *p, obm_pack_settings *out);
OBM_API obm_status obm_pack_set_settings(obm_pack *p, const obm_pack_settings *settings, obm_error *err);  /* changes the pack */

OBM_API size_t obm_pack_task_count(const obm_pack *p);
OBM_API const char *obm_pack_task_name(const obm_pack *p, size_t task);   /* borrowed */
typedef struct obm_class_bytes { uint64_t tensors, params, bytes_expert, bytes_pack, bytes_adapter; } obm_class_bytes;
/* One expert by class: bytes as the full expert tensors, as the pack stores them, and of the LoRA factors that they came from
 * (0 for a full checkpoint).  out[OBM_CLASS_COUNT]. */
OBM_API void obm_pack_bytes(const obm_pack *p, size_t task, obm_class_bytes *out);
OBM_API uint64_t obm_pack_base_bytes(const obm_pack *p);
typedef struct obm_pack_shared_info {
    const char *method;           /* "tall", "emr"; borrowed */
    double lambda;                /* of tall's masks, else 0 */
    uint64_t tensors, bytes;      /* the shared vectors, which obm_pack_bytes counts for no expert */
} obm_pack_shared_info;
/* False: the pack has no shared vectors; out is untouched. */
OBM_API bool obm_pack_shared(const obm_pack *p, obm_pack_shared_info *out);
OBM_API const char *obm_pack_policy(const obm_pack *p, size_t task);      /* as text, "linear, scale row, planes 1"; borrowed */
/* Which of "tokenizer, template, eos" the expert brings itself, as text; "": all are the base's.  Static. */
OBM_API const char *obm_pack_text(const obm_pack *p, size_t task);
OBM_API size_t obm_pack_tensor_count(const obm_pack *p);
typedef struct obm_pack_tensor {
    const char *name;
    obm_class cls;
    obm_mode mode;
    int planes;
    int64_t n_scales;             /* per plane */
    const float *scales[8];       /* plane -> n_scales alphas, borrowed */
    const uint8_t *signs[8];      /* plane -> (rows, row_bytes), LSB first, bit 1 = +, borrowed */
    int64_t rows, cols, row_bytes;
    uint64_t bytes_pack;
    int64_t rank;                 /* of the LoRA factors that a full tensor is kept as, 0 without */
    const uint8_t *mask;          /* MASK: (rows, row_bytes), LSB first, bit 1 = shared vector times scaling; borrowed */
    double scaling;               /* MASK: what the shared vector is multiplied by where a bit is 1; else 0 */
} obm_pack_tensor;
OBM_API void obm_pack_tensor_at(const obm_pack *p, size_t task, size_t i, obm_pack_tensor *out);

/* ---- Routes ----------------------------------------------------------------------------------------------------- */

/* A route is one weight per task (pack order), finite and >= 0; one-hot is the paper's, all zero is the base alone.
 * theta(w) = theta_base + sum_k w_k (theta(k) - theta_base). */

/* "chat", "2", "chat=.7,math=.3", "base".  weights[obm_pack_task_count].  Errors: ARG, NOTFOUND (lists the tasks). */
OBM_API obm_status obm_pack_parse_route(const obm_pack *p, const char *text, double *weights, obm_error *err);
/* The other way: "chat" for one-hot, "chat=0.7,math=0.3", "base".  *out owned. */
OBM_API obm_status obm_pack_format_route(const obm_pack *p, const double *weights, char **out, obm_error *err);

/* Materialises one tensor under a route: out = (rows, cols) f32 of the merged tensor (with the routed expert's extra
 * vocabulary rows under its hard route: ask obm_pack_route_shape first).  VALUE: the route makes a value NaN or Inf
 * (names tensor and index; out is then written). */
OBM_API obm_status obm_pack_route_shape(const obm_pack *p, const double *weights, const char *name, obm_tensor *shape, obm_error *err);
OBM_API obm_status obm_pack_materialise(const obm_pack *p, const double *weights, const char *name, float *out, obm_error *err);

/* How a tensor comes about while a model runs: the base's own; base plus planes, where every expert that comes in is 1-bit
 * (or has nothing) and a route takes at most 8 masks (products of the planes' signs); or materialised for the route. */
typedef enum obm_run { OBM_RUN_BASE = 0, OBM_RUN_PLANES = 1, OBM_RUN_OVERLAY = 2 } obm_run;
OBM_API const char *obm_run_name(obm_run run);   /* "base", "planes", "overlay" */
typedef struct obm_tensor_run {
    const char *name;             /* borrowed */
    obm_class cls;
    size_t planes;                /* of all experts */
    obm_run hard, soft;           /* the costliest under a hard route; under a route that mixes all tasks */
    int hard_masks, soft_masks;   /* most that a hard route reads; that mixture */
    size_t overlays;              /* hard routes under which it is an overlay */
} obm_tensor_run;
/* Every tensor under the pack's settings; out[obm_pack_tensor_count].  Reads scales, no signs.  Errors: NOMEM; VALUE: lambda
 * makes a coefficient too large for f32; UNSUPPORTED: more experts than routes take. */
OBM_API obm_status obm_pack_runs(const obm_pack *p, obm_tensor_run *out, obm_error *err);

typedef struct obm_export_options {
    size_t struct_size;
    const char *dtype;          /* NULL: the base's, per tensor; "f32", "bf16", "f16" */
    uint64_t shard_bytes;       /* 0: 5e9 */
    bool overwrite, dry_run;
    obm_progress_fn progress;
    void *progress_user;
} obm_export_options;
/* changed: elements that the route changes in f32; lost: those of them that the output dtype rounds back to the base's. */
typedef struct obm_export_report { obm_plan plan; uint64_t changed, lost; } obm_export_report;
/* Writes the dense Hugging Face folder of one route.  report nullable.  VALUE names the tensor and index of a value that
 * is NaN or Inf under the route, or too large for the dtype; ARG: the output is the folder of the base, the pack or an
 * expert. */
OBM_API obm_status obm_pack_export(const obm_pack *p, const double *weights, const obm_export_options *options,
                                   const char *out_path, obm_export_report *report, obm_error *err);

/* ---- Text ------------------------------------------------------------------------------------------------------- */

/* tokenizer.json with a BPE model: byte-level, or over characters with byte fallback.  Immutable, share freely. */
typedef struct obm_tokenizer obm_tokenizer;
typedef struct obm_message { const char *role, *content; } obm_message;   /* views */

OBM_API obm_status obm_tokenizer_open(obm_context *ctx, const char *path /* folder or tokenizer.json */, obm_tokenizer **out, obm_error *err);
OBM_API void obm_tokenizer_free(obm_tokenizer *t);
OBM_API size_t obm_tokenizer_size(const obm_tokenizer *t);                       /* ids are < size */
OBM_API const char *obm_tokenizer_piece(const obm_tokenizer *t, int32_t id);     /* as in the file, NULL if none; borrowed */
OBM_API int32_t obm_tokenizer_id(const obm_tokenizer *t, const char *piece);     /* -1 if none */
/* text: UTF-8 of `len` bytes (may hold NUL).  special: add the post-processor's tokens; special tokens in the text are
 * always recognised, as the tokenizers library does.  *ids owned, *n.  Errors: FORMAT (not UTF-8), NOMEM. */
OBM_API obm_status obm_tokenizer_encode(const obm_tokenizer *t, const char *text, size_t len, bool special, int32_t **ids,
                                        size_t *n, obm_error *err);
/* *text owned, NUL-terminated, *len its bytes.  Errors: ARG (an id out of range). */
OBM_API obm_status obm_tokenizer_decode(const obm_tokenizer *t, const int32_t *ids, size_t n, bool skip_special, char **text,
                                        size_t *len, obm_error *err);
/* The built-in template that the model's own is (compared as a whole): "llama2", "mistral", "llama3", "llama3.1",
 * "chatml", "gemma", "gemma3", "phi3", "phi4", "phi4mini", "granite", "olmo2"; NULL: without one, or of another kind.
 * Static. */
OBM_API const char *obm_tokenizer_template_name(const obm_tokenizer *t);
/* Renders messages with a built-in template by name, or with the one that the model's own is (name NULL).  add_generation: append
 * the opening of the assistant's turn.  *text owned.  Errors: UNSUPPORTED (name NULL and the template is none of the built-in
 * ones), ARG (no such name; roles in an order that the template refuses). */
OBM_API obm_status obm_tokenizer_builtin_template(const obm_tokenizer *t, const char *name, const obm_message *messages, size_t n,
                                                  bool add_generation, char **text, obm_error *err);
/* The same with name NULL. */
OBM_API obm_status obm_tokenizer_apply_template(const obm_tokenizer *t, const obm_message *messages, size_t n,
                                                bool add_generation, char **text, obm_error *err);
/* bos_token and eos_token of tokenizer_config.json as text, NULL without; borrowed. */
OBM_API const char *obm_tokenizer_bos(const obm_tokenizer *t);
OBM_API const char *obm_tokenizer_eos(const obm_tokenizer *t);
/* The model's own Jinja source, NULL without; borrowed.  Python renders it with jinja2. */
OBM_API const char *obm_tokenizer_template(const obm_tokenizer *t);

/* ---- Models ----------------------------------------------------------------------------------------------------- */

/* A Hugging Face folder or a pack, ready to run.  One thread at a time; a second gets OBM_E_BUSY. */
typedef struct obm_model obm_model;

/* bf16 matrices of the base in 12 bits per weight, without loss: the same bits come out, and a step of one token reads 3/4 of
 * the bytes.  Where memory has room for both (7/4 of the base in 3/4 of what is free) and rows have no places on several
 * NUMA nodes, prompts and batches go on reading the mapping, whose pages the system may take back; else they unpack
 * first, which takes them longer, and nothing but the packed matrices stays in memory. */
typedef enum obm_z12 {
    OBM_Z12_AUTO = 0,   /* both, packed behind the tokens once a model has decoded 192 of them alone: a share behind each of the
                         * next 128, which run slower for it.  Only where it gains: with AVX2 or
                         * AVX-512, of models beyond the caches, with room for both, without places.  Without memory in
                         * the middle of it the rest stays as it is, and the context's log says so */
    OBM_Z12_ON = 1,     /* packed while the model is opened */
    OBM_Z12_OFF = 2
} obm_z12;
/* By name: "auto", "on", "off".  Errors: ARG, which lists them. */
OBM_API obm_status obm_z12_find(const char *name, obm_z12 *out, obm_error *err);

typedef struct obm_model_options {
    size_t struct_size;
    const char *base;           /* overrides where the pack's base lies */
    obm_dtype kv;               /* OBM_F32 (default) or OBM_F16 */
    uint64_t route_budget;      /* bytes that routes may hold beyond base and signs (materialised tensors, coefficients):
                                 * least recently used go first, also the limit of the routes that one batch runs at a
                                 * time (at least one); 0: a quarter of the memory */
    bool materialise;           /* dense weights for every route, instead of running on the sign planes */
    obm_progress_fn progress;   /* while it is opened ("open"): matrices made ready to run on planes */
    void *progress_user;
    obm_z12 z12;
    obm_dtype prefill;          /* OBM_F32 (default), or OBM_BF16: where the CPU has AVX512-BF16, activations of prompts are
                                 * rounded to bf16 (by up to 2^-9 of each) where they meet weights that are bf16; sums stay
                                 * f32.  Prompts are then up to 1.8 times as fast, scores and what routers see are rounded
                                 * with them; tokens after them, and matrices that run on planes, are as ever.  On another CPU they stay f32, and the log says so */
} obm_model_options;
OBM_API obm_status obm_model_open(obm_context *ctx, const char *path, const obm_model_options *options, obm_model **out, obm_error *err);
/* From a pack that is open already; borrows it. */
OBM_API obm_status obm_model_from_pack(obm_context *ctx, const obm_pack *pack, const obm_model_options *options, obm_model **out, obm_error *err);
OBM_API void obm_model_free(obm_model *m);

typedef struct obm_model_plan_options {
    size_t struct_size;
    const char *topology;   /* another machine: the path of hwloc's XML (lstopo machine.xml), or a synthetic description as
                             * hwloc has it, "numa:2 core:4 pu:2"; NULL: this machine, as far as this process may use it */
    obm_numa numa;
    int64_t threads;        /* 0: one per core; at most 4096 */
    const char *base;       /* overrides where the pack's base lies */
    obm_z12 z12;            /* ON: as in obm_model_options; AUTO is OFF, rows with places are not packed behind tokens */
    obm_dtype kv;           /* OBM_F32 or OBM_F16 */
} obm_model_plan_options;
/* Where a model's rows, planes and KV heads would lie and which worker would read them; only its config and the headers of
 * its files are read.  *json: owned text of one object,
 *   numa, asked (names of modes), reason (why this mode), threads, home (the node of buffers and of the caller)
 *   nodes: [{os_index, memory, cores, workers, weight_bytes, plane_bytes, kv_bytes (per position), kv_heads: [first, end),
 *     remote_bytes}]
 *   workers: [{cpu (null: not bound to one), node (index in nodes)}]
 *   matrices: [{role, name ("{}": each layer), layers, rows, cols, bytes (weights and planes of all layers),
 *     nodes: [[first, end) rows of each node], workers: [...]}]; null where rows have no fixed place, empty ranges at
 *     nodes that hold none
 *   weight_bytes_per_token, remote_weight_bytes_per_token, remote_activation_bytes_per_token, remote_bytes_per_token
 * remote: what workers read from (or write to) another node's memory for one token of one sequence.  Rows of a matrix are
 * cut at multiples of 64.  Inside a node rows are handed out as workers come: a worker's are those it would have if all were
 * equally quick.  Errors: those of obm_model_open; ARG, IO, FORMAT, UNSUPPORTED (of the topology). */
OBM_API obm_status obm_model_plan(obm_context *ctx, const char *path, const obm_model_plan_options *options, char **json,
                                  obm_error *err);

typedef struct obm_model_info {
    const char *architecture;            /* "llama", ... */
    int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, max_positions, sliding_window /* 0: none */;
    bool tied;
    uint64_t params, bytes;              /* of the base */
    uint64_t z12_bytes, z12_plain;       /* of its matrices in 12 bits per weight: now, and as bf16 */
    uint64_t z12_to_come;                /* as bf16, of those that will be, behind next tokens */
    obm_dtype prefill;                   /* of prompts: BF16 where that was asked for and the CPU has products of it, else F32 */
} obm_model_info;
OBM_API void obm_model_describe(const obm_model *m, obm_model_info *out);
OBM_API const obm_pack *obm_model_pack(const obm_model *m);             /* NULL for a plain model; borrowed */
OBM_API const obm_tokenizer *obm_model_tokenizer(const obm_model *m);   /* the base's, NULL without a tokenizer.json; borrowed */
/* What prompts are encoded and rendered with under a route (weights over the tasks; NULL: the base): the expert's own under
 * its hard route where it brings one, else the base's.  Routers always see the base's ids.  Borrowed. */
OBM_API const obm_tokenizer *obm_model_tokenizer_for(const obm_model *m, const double *route);

/* What resident memory is made of, bytes: the base's tensors, signs and the coefficients of prepared routes, materialised
 * tensors, KV cache, buffers.  Where rows are replicated, base and planes count the copy of every node that has workers. */
typedef struct obm_model_memory { uint64_t base, planes, overlays, kv, scratch; } obm_model_memory;
OBM_API void obm_model_account(const obm_model *m, obm_model_memory *out);

/* Looks where the pages of an open model are: its weights, planes, the tensors that prepared routes materialised (overlays),
 * and the cache of a prompt that is run for it. *json: owned text of one object, numa (the mode in force), bound (false: the
 * system refused to bind memory, which the log was told), weights, planes, overlays, kv: {bytes, nodes: [bytes on each
 * node], other (nodes that are not used here), absent (not in memory), remote_bytes (read by workers of another node; null
 * where rows have no fixed place)}, remote_bytes of all.  With numa "off" nothing is placed and the parts are left out.
 * Overlays are cut as the base's rows are.  Where rows are replicated, and of a tensor that holds several matrices in one,
 * there is one copy, spread over the nodes: (n - 1) / n of it is remote to n nodes with workers.  An untied embedding and
 * buffers are not placed, and not counted.  Errors: BUSY; IO where the system does not say (sandboxes); those of running a
 * model. */
OBM_API obm_status obm_model_verify_placement(obm_model *m, char **json, obm_error *err);

/* A prompt in one of three forms; what runs is the first that is there of: ids, messages (rendered with the chat template),
 * text (chat: wrapped as one user turn).  What a router sees is the first of: messages, text, the decoded ids; so a caller
 * that renders a template itself passes its ids together with the messages.  Views. */
typedef struct obm_prompt {
    const char *text;
    const obm_message *messages; size_t n_messages;
    const int32_t *ids; size_t n_ids;
    bool chat;
} obm_prompt;

typedef struct obm_run_options {
    size_t struct_size;
    const double *route;        /* weights over the tasks, or NULL: plain models, and the base alone for packs */
    bool all;                   /* every position, not the last */
    bool decode;                /* feed token by token through the decode path */
    obm_dtype kv;               /* OBM_F32 or OBM_F16 */
} obm_run_options;
/* out: (T, vocab) with `all`, else (vocab,), f32.  T = n.  Errors: ARG (an id out of range, T = 0, too long).  Logits
 * that are NaN or Inf are given as they are, so that one can look; generating and scoring refuse them (VALUE). */
OBM_API obm_status obm_model_logits(obm_model *m, const int32_t *ids, size_t n, const obm_run_options *options, float *out, obm_error *err);
/* Hidden states after layer `layer` (0 = embeddings, layers = before the final norm).  out: (T, hidden) f32. */
OBM_API obm_status obm_model_hidden(obm_model *m, const int32_t *ids, size_t n, int layer, const obm_run_options *options, float *out, obm_error *err);
/* Mean-pooled hidden states after `layer` of the base, of the last 512 tokens of each prompt's user text.  out: (n, hidden). */
OBM_API obm_status obm_model_embed(obm_model *m, const obm_prompt *prompts, size_t n, int layer, obm_progress_fn progress, void *user,
                                   float *out, obm_error *err);

/* ---- Routers ---------------------------------------------------------------------------------------------------- */

/* What a router sees of one request; valid during the callback.  Text: the user turns joined by newlines, no template
 * (ids are decoded first); tokens: the base tokenizer's, the last 512. */
typedef struct obm_request obm_request;
OBM_API const char *obm_request_text(const obm_request *r);                                  /* borrowed */
OBM_API void obm_request_tokens(const obm_request *r, const int32_t **ids, size_t *n);       /* borrowed */
OBM_API size_t obm_request_task_count(const obm_request *r);
OBM_API const char *obm_request_task_name(const obm_request *r, size_t task);
/* Mean-pooled hidden states after `layer` of the base; computed on demand, kept.  *out: (hidden) f32, borrowed. */
OBM_API obm_status obm_request_features(obm_request *r, int layer, const float **out, size_t *n, obm_error *err);
/* The built-in router's probabilities, (tasks); NOTFOUND if the pack has no router. */
OBM_API obm_status obm_request_builtin(obm_request *r, const double **out, obm_error *err);

/* Fills weights[obm_request_task_count]; return OBM_OK, or OBM_E_USER to stop the whole call (or any error, with err). */
typedef obm_status (*obm_router_fn)(void *user, obm_request *request, double *weights, obm_error *err);

typedef struct obm_router_options {
    size_t struct_size;
    int layer;                  /* 0 = embeddings */
    double l2;                  /* 0: 1e-2 */
    double holdout;             /* 0: 0.2 of each task is held out for the report */
    uint64_t seed;              /* of the split */
    obm_progress_fn progress;
    void *progress_user;
} obm_router_options;

#define OBM_MAX_REPORT_TASKS 64
typedef struct obm_router_report {
    int layer;
    size_t tasks, n_train, n_held_out;
    double accuracy;            /* held out */
    double calibration_error;   /* expected calibration error, 10 bins, held out */
    uint32_t confusion[OBM_MAX_REPORT_TASKS][OBM_MAX_REPORT_TASKS];   /* [true][predicted], held out */
} obm_router_report;

/* Multinomial logistic regression (L2, standardised features, L-BFGS) on obm_model_embed features; changes the pack.
 * task[i] names the task of prompts[i]; every task of the pack needs >= 2 examples.  Errors: ARG, NOTFOUND, USER. */
OBM_API obm_status obm_router_train(obm_pack *p, const obm_prompt *prompts, const char *const *task, size_t n,
                                    const obm_router_options *options, obm_router_report *report, obm_error *err);
OBM_API obm_status obm_pack_router_report(const obm_pack *p, obm_router_report *out, obm_error *err);   /* NOTFOUND: untrained */
/* Built-in (fn NULL) or own router on one prompt.  weights[task_count]: the route (argmax one-hot for the built-in);
 * probabilities[task_count] nullable, the built-in's. */
OBM_API obm_status obm_model_route(obm_model *m, const obm_prompt *prompt, obm_router_fn fn, void *user, double *weights,
                                   double *probabilities, obm_error *err);

/* ---- Generation ------------------------------------------------------------------------------------------------- */

/* Renders messages in the template of t (obm_tokenizer_template), for callers that can run Jinja; called once the route is
 * known.  *text: borrowed until the next call of this or the end of the call that was given it; NULL: the built-in template
 * is to be used.  OBM_E_USER, or any error with err, stops the whole call. */
typedef obm_status (*obm_render_fn)(void *user, const obm_tokenizer *t, const obm_message *messages, size_t n, const char **text,
                                    obm_error *err);

typedef struct obm_generate_options {
    size_t struct_size;
    const double *routes;       /* (n_routes, tasks): one row for all prompts or one each; NULL: the router decides */
    size_t n_routes;
    const bool *routed;         /* nullable, (n_routes): false = this row is to be filled by the router */
    obm_router_fn router;       /* NULL: the pack's own */
    void *router_user;
    size_t max_tokens;          /* 0: 256 */
    double temperature;         /* 0: greedy */
    size_t top_k;               /* 0: off */
    double top_p;               /* 0 or 1: off */
    double min_p;               /* 0: off */
    double repetition_penalty;  /* 0 or 1: off */
    uint64_t seed;              /* prompt i of a batch draws from (seed, i): results do not depend on the batching */
    const char *const *stop; size_t n_stop;   /* stop strings; not part of the text */
    size_t batch;               /* sequences decoded together; 0: 8 */
    bool ignore_eos;
    bool chat;                  /* text prompts are one user turn in the route's chat template */
    obm_progress_fn progress;   /* prompts done */
    void *progress_user;
    obm_render_fn render;       /* NULL: the built-in templates */
    void *render_user;
    size_t route_every;         /* the router is asked again after each so many generated tokens; 0: once, on the prompt */
    const char *template_name;  /* the built-in chat template to render with, whatever the model's own is; NULL: the model's own.
                                 * ARG lists the names */
} obm_generate_options;
/* Routing again (route_every): the router sees what it saw of the prompt, then (for messages and chat prompts after a
 * newline) the text generated so far, of all that the last 512 tokens; without a tokenizer the ids.  Its answer holds from
 * the next token on; keys and values of earlier tokens stay, and so do the tokenizer and the ids that end the text.  A route
 * whose tensors have to be materialised first makes its own sequence wait and no other.  A last token that the new route's
 * vocabulary lacks is still run under the old route.  Prompts whose route is given keep it.  A router that a stream
 * calls again must be there until the stream ends. */

typedef enum obm_finish { OBM_FINISH_STOP = 0, OBM_FINISH_LENGTH = 1 } obm_finish;   /* eos or stop string; max_tokens or context end */

/* Called with whole UTF-8 characters as they come; non-zero stops with OBM_E_USER. */
typedef int (*obm_text_fn)(void *user, const char *text, size_t len);
/* One prompt, streamed.  options NULL: defaults (greedy, 256 tokens, the text as it is: set `chat` for a chat turn). */
OBM_API obm_status obm_model_generate(obm_model *m, const char *prompt, const obm_generate_options *options, obm_text_fn on_text,
                                      void *user, obm_error *err);

typedef struct obm_completion {
    char *text; size_t text_len;
    int32_t *ids; size_t n_ids;       /* generated ids, without the prompt */
    double *route; size_t n_route;    /* weights used (the last ones, with route_every), NULL for a plain model */
    size_t n_prompt;                  /* prompt tokens */
    obm_finish finish;
    double *routes; size_t n_routes;  /* (n_routes, n_route): with route_every all that were taken, in order; else NULL */
    size_t *route_tokens;             /* (n_routes): how many tokens were generated before each took over; the first has 0 */
} obm_completion;
/* out[n]; each owned, release with obm_completion_clear.  Results do not depend on batch or on the neighbours; where prompts of
 * one route begin alike, whole pages of 64 positions are computed once. */
OBM_API obm_status obm_model_generate_batch(obm_model *m, const obm_prompt *prompts, size_t n, const obm_generate_options *options,
                                            obm_completion *out, obm_error *err);
OBM_API void obm_completion_clear(obm_completion *c);

/* A pull-style stream of one prompt.  One thread at a time; the model is busy until it is freed or has ended. */
typedef struct obm_stream obm_stream;
OBM_API obm_status obm_stream_open(obm_model *m, const obm_prompt *prompt, const obm_generate_options *options, obm_stream **out, obm_error *err);
/* *text borrowed until the next call; NULL at the end. */
OBM_API obm_status obm_stream_next(obm_stream *s, const char **text, size_t *len, obm_error *err);
OBM_API const obm_completion *obm_stream_result(const obm_stream *s);   /* so far; borrowed */
OBM_API void obm_stream_free(obm_stream *s);

typedef struct obm_score_item {
    obm_prompt prompt;                       /* empty text and no ids: score `continuation` as a whole text from its second token on */
    const char *continuation;                /* or ids: */
    const int32_t *continuation_ids; size_t n_continuation_ids;
    const double *route;                     /* NULL: the router on the prompt (packs) */
} obm_score_item;
typedef struct obm_score {
    double logprob;             /* sum, natural logarithm */
    double perplexity;          /* exp(-logprob / tokens) */
    bool is_greedy;             /* every token was the argmax */
    double *token_logprobs; size_t n;   /* owned: obm_score_clear */
    double *route; size_t n_route;
} obm_score;
typedef struct obm_score_options {
    size_t struct_size;
    obm_progress_fn progress;   /* items done */
    void *progress_user;
    obm_render_fn render;       /* NULL: the built-in templates */
    void *render_user;
} obm_score_options;
/* out[n].  Lower log-likelihood arithmetic in f64 over f32 logits.  Text is encoded as the item's route has it.  What an item has in
 * common with the one before, from the start and under the same route, is not computed again: choices of a prompt stand together. */
OBM_API obm_status obm_model_score(obm_model *m, const obm_score_item *items, size_t n, const obm_score_options *options,
                                   obm_score *out, obm_error *err);
OBM_API void obm_score_clear(obm_score *s);

/* ---- Static merges ---------------------------------------------------------------------------------------------- */

typedef enum obm_param_scope { OBM_PARAM_GLOBAL = 0, OBM_PARAM_PER_MODEL = 1 } obm_param_scope;
typedef struct obm_param_info {
    const char *name, *doc;
    obm_param_scope scope;
    bool required;
    double dflt, min, max;      /* booleans are 0 and 1 */
    bool is_bool;
} obm_param_info;
typedef struct obm_method_info {
    const char *name, *doc, *source;   /* source: paper, section */
    const obm_param_info *params; size_t n_params;
    bool needs_base;
    int min_models, max_models;        /* without the base; max 0: any */
} obm_method_info;
OBM_API size_t obm_method_count(void);
OBM_API const obm_method_info *obm_method_at(size_t i);   /* static */

typedef struct obm_param { const char *name; int model; /* -1: global */ double value; } obm_param;
/* Merges n tensors of one shape: out (count elements) f32.  base nullable where the method allows.  profile as in recipes.
 * Errors: NOTFOUND (method, parameter: lists the known ones), ARG, SHAPE, VALUE. */
OBM_API obm_status obm_merge_tensors(obm_context *ctx, const char *method, obm_profile profile, const obm_tensor *base,
                                     const obm_tensor *models, size_t n, const obm_param *params, size_t n_params, uint64_t seed,
                                     float *out, obm_error *err);

/* A part of one tensor in the hands of a method of the caller's, row-major. */
typedef struct obm_merge_tile {
    const char *tensor;                  /* its name, "" in obm_merge_tensors_custom */
    int32_t ndim; const int64_t *shape;  /* of the whole tensor */
    uint64_t begin; size_t count;        /* elements [begin, begin + count) */
    size_t n_models;
    float *vectors;                      /* (n_models, count): task vectors, or the weights without a base; free to overwrite */
    const float *base;                   /* (count), NULL without a base */
    const double *values;                /* (n_params, n_models); a parameter of the whole merge is the same in each model */
    float *out;                          /* (count), zeros: takes the merged task vector (the base is added to it), or weights */
} obm_merge_tile;
/* A status other than OK ends the merge with it and *err. */
typedef obm_status (*obm_merge_fn)(void *user, const obm_merge_tile *tile, obm_error *err);
/* A merge method of the caller's: called on the caller's thread, tile after tile, in the order of a tensor's elements.
 * Task vectors are rounded and parameters are resolved (gradients, filters, defaults) as those of the built-in methods.
 * With info.needs_base it gets task vectors, else the weights themselves.  What it gives must be finite. */
typedef struct obm_custom_method {
    size_t struct_size;
    obm_method_info info;       /* name: letters, digits, `_`, `-`, `.`, other than a built-in's; doc and source nullable */
    bool whole_tensor;          /* one tile per tensor; else its size is not defined, and must not matter */
    obm_merge_fn merge;
    /* Nullable: memory for `floats` floats, asked for before every tile, in use until `merge` returns; NULL: none left.
     * vectors, base (if any) and out lie in it one after the other. */
    float *(*memory)(void *user, size_t floats);
    void *user;
} obm_custom_method;
/* What every function that takes a method checks of it.  Errors: ARG. */
OBM_API obm_status obm_custom_method_check(const obm_custom_method *m, obm_error *err);
/* obm_merge_tensors by a method of the caller's. */
OBM_API obm_status obm_merge_tensors_custom(obm_context *ctx, const obm_custom_method *method, obm_profile profile,
                                            const obm_tensor *base, const obm_tensor *models, size_t n, const obm_param *params,
                                            size_t n_params, uint64_t seed, float *out, obm_error *err);

/* Arithmetic for methods written in a language without arrays: out[i] = op(args[0][i], ...) in f32.  op: add sub mul div min
 * max; lt le eq (1 or 0); where (a != 0: b, else c); neg abs sign sqrt exp log tanh.  args: floats of one shape, or without
 * dimensions: a number for all elements.  *shape_of (nullable) tells whose shape the result has; out NULL: nothing else is
 * done.  Errors: NOTFOUND (op), ARG (number of args), SHAPE, DTYPE. */
OBM_API obm_status obm_tensor_compute(const char *op, const obm_tensor *args, size_t n, size_t *shape_of, float *out,
                                      obm_error *err);
/* Sum of a[i] * b[i] in f64, over a fixed tree; shapes as above. */
OBM_API obm_status obm_tensor_dot(const obm_tensor *a, const obm_tensor *b, double *out, obm_error *err);

typedef struct obm_merge_options {
    size_t struct_size;
    obm_profile profile;        /* DEFAULT: the recipe's `profile` key, else mergekit */
    const char *directory;      /* relative paths of the recipe start here; NULL: the working directory */
    uint64_t seed; bool has_seed;   /* overrides the recipe's random_seed; 0 by default */
    uint64_t shard_bytes;       /* 0: 5e9 */
    uint64_t memory;            /* budget of tiles and buffers, bytes; 0: 2e9 */
    bool overwrite, dry_run;
    obm_progress_fn progress;
    void *progress_user;
    /* Goes on where a killed merge of the same recipe, options and inputs into the same folder ended: its finished shards
     * are checked (size, XXH3) and kept, the rest is computed, and the folder is the same byte for byte.  MISMATCH, which
     * says what differs, for another merge's remains, unless `overwrite` is set too; a folder without remains is a first
     * run.  A finished shard that is damaged is computed again, or where it has its final name already refused by name
     * (EXISTS) unless `overwrite` is set too.  And a run with `resume` that fails or is stopped keeps its finished shards,
     * where others take back all.  A folder where the same merge is finished already is verified (size and XXH3 of every file but
     * the card, by the record onebitmerge-finished.json, which every merge leaves) and left as it is: OK, and the log says so;
     * MISMATCH, or EXISTS with the damaged file's name, unless `overwrite` is set. */
    bool resume;
    const char *method;         /* in place of merge_method in all of the recipe; nullable */
    /* Methods that merge_method may name besides the built-in ones, borrowed.  Of one only the name counts for `resume`. */
    const obm_custom_method *const *methods; size_t n_methods;
} obm_merge_options;
/* recipe: mergekit's YAML (or JSON) as text.  A model is a path, MODEL+ADAPTER with a LoRA folder behind the +, or such a
 * folder alone, which stands for base_model with it; base + d is taken in f32.  So is that of an expert of a pack, PACK:task;
 * without a base_model, or with one that is no model by itself, it stands on the pack's own base.  Writes a Hugging Face folder; plan nullable, filled in a dry run and after.
 * Of several documents (---) each may take the outputs of others by their `name`: the one without a name is written to
 * out_path and the others beside it while the merge runs; where all have names, to out_path/NAME.  With tokenizer_source
 * or tokenizer the vocabulary is built as mergekit does it: embedding, head and vocab_size follow.
 * Fails while planning, before a tensor byte is read, for what is wrong with the recipe (ARG: unknown keys, with a
 * suggestion, methods, parameters, values; the message has all faults that fit) and for what is unsupported; BUSY while another
 * call writes to the folder.  What a killed run left there is removed, without `resume` all of it. */
OBM_API obm_status obm_merge(obm_context *ctx, const char *recipe, const obm_merge_options *options, const char *out_path,
                             obm_plan *plan, obm_error *err);
/* What a dry run of obm_merge has to tell, whatever options say of one.  *json: owned text of one object,
 *   tensors, tiles, bytes_read, bytes_written, peak_memory, seconds (as obm_plan has them: sums over the documents, of the memory
 *     the most)
 *   documents: [{name (null without), output (its folder, null if it is not UTF-8), kept (false: taken back once the result is there), the same
 *     six keys, files: [{file, bytes, there}]}] in the order in which they run; files are those of the weights.  there:
 *     with `resume`, the shard of a killed run of the same merge is finished, has been checked, and will be kept.
 * Errors: those of obm_merge while planning. */
OBM_API obm_status obm_merge_plan(obm_context *ctx, const char *recipe, const obm_merge_options *options,
                                  const char *out_path, char **json, obm_error *err);

#ifdef __cplusplus
}
#endif
#endif
