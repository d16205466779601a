/* The opened pack, as the dynamic merge and the model read it. */
#ifndef OBM_PACK_H
#define OBM_PACK_H

#include "../delta/delta.h"

/* One tensor of one expert. */
typedef struct obm__pack_entry {
    obm_mode mode;
    obm__planes planes;        /* 1BIT */
    obm__masked masked;        /* MASK */
    obm_tensor full;           /* FULL: the expert's own tensor, own dtype, extra rows included; data NULL with factors */
    obm__lowrank lora;         /* FULL of an adapter: the task vector's factors; rank 0 without */
    obm_tensor extra;          /* 1BIT, MASK, DROP, SAME with extra vocabulary rows: those rows only; data NULL without */
    uint64_t bytes_pack, bytes_expert;
    uint64_t bytes_adapter;    /* the factors that it came from, 0 for a tensor of the expert's own */
} obm__pack_entry;

/* Text files of an expert.  The tokenizer's first two, then the template's three. */
typedef enum obm__text_file {
    OBM_TEXT_TOKENIZER,        /* tokenizer.json */
    OBM_TEXT_ADDED,            /* added_tokens.json */
    OBM_TEXT_CONFIG,           /* tokenizer_config.json */
    OBM_TEXT_SPECIAL,          /* special_tokens_map.json */
    OBM_TEXT_TEMPLATE,         /* chat_template.jinja */
    OBM_TEXT_GENERATION        /* generation_config.json */
} obm__text_file;
#define OBM_TEXT_FILES 6
const char *obm__text_file_name(obm__text_file f);

/* What an expert brings where it differs from the base; everything else is the base's. */
typedef struct obm__pack_text {
    char *paths[OBM_TEXT_FILES];   /* NULL: not here */
    bool tokenizer, template_;     /* tokenizer.json is its own; the template's files are its own, all of them */
    int32_t *eos; size_t n_eos;    /* NULL: the base's */
} obm__pack_text;

/* Whether a file is the expert's affair: its own, or none if paths lacks it.  Else it is the base's. */
bool obm__text_is_own(const obm__pack_text *t, obm__text_file f);
/* Other forms of a vocabulary, which say what tokenizer.json says: with the expert's own there are none.  NULL: the end. */
const char *obm__text_derived(size_t i);
bool obm__text_set_eos(const obm__pack_text *t, obm_json *config);   /* false: out of memory */

typedef struct obm__pack_expert {
    char *name, *policy;       /* policy as text */
    obm__safetensors *file;
    obm__pack_entry *entries;  /* (n_tensors), same order as obm_pack.tensors */
    obm__pack_text text;
    obm_json *record;          /* the expert's part of pack.json, borrowed */
} obm__pack_expert;

/* The union of the base's tensors and the experts' (an untied head of an expert of a tied base). */
typedef struct obm__pack_tensor_info {
    const char *name;
    obm_class cls;
    obm_tensor base;           /* the value that a missing delta leaves; a tied head views the embedding */
    bool in_base;              /* false: exists only because an expert has it */
} obm__pack_tensor_info;

typedef struct obm__router obm__router;   /* route/router.h */

/* Vectors that the masks of all experts apply to. */
typedef struct obm__pack_shared {
    obm__safetensors *file;    /* NULL: the pack has none */
    const obm_json *record;    /* the member "shared" of pack.json, borrowed */
    const char *method;        /* borrowed */
    double lambda;
} obm__pack_shared;

struct obm_pack {
    obm_context *ctx;
    char *path;
    obm_json *manifest;        /* pack.json */
    char manifest_xxh3[33];    /* of its bytes on disk when they were last read or written here */
    obm_checkpoint *base;      /* owned */
    obm__pack_tensor_info *tensors;   /* sorted by name */
    size_t n_tensors;
    obm__pack_expert *experts;
    size_t n_experts;
    obm__pack_shared shared;
    uint64_t revision;         /* how often experts were added, replaced or removed since it was opened */
    obm_pack_settings settings;
    obm__router *router;       /* NULL until trained */
    _Atomic int users;         /* calls that read it now, -1: it is being exchanged (pack_lock.c) */
    _Atomic int warned_of_other_expert;   /* so that a warning comes once (route/plan.c) */
};
/* obm_pack_open, with a look at the pulse now and then. */
obm_status obm__pack_open(obm_context *ctx, const char *path, const char *base_path, obm__pulse *pulse, obm_pack **out,
                          obm_error *err);
/* Index into tensors by the base's name or that in another layout, or SIZE_MAX. */
size_t obm__pack_find(const obm_pack *p, const char *name);
/* obm__map_check of the base's and the experts' files. */
obm_status obm__pack_check(const obm_pack *p, obm_error *err);
/* Hands the resident pages of the experts' files back: a fault maps cached neighbours too, so that reading the scales
 * alone may leave most of a file resident. */
void obm__pack_release_pages(const obm_pack *p);
/* Around calls that take their time over a pack, on any thread.  BUSY while it changes; no part of the pack's value. */
obm_status obm__pack_use(const obm_pack *p, obm_error *err);
void obm__pack_unuse(const obm_pack *p);
/* Around what changes the pack in memory; BUSY while somebody uses it. */
obm_status obm__pack_claim(obm_pack *p, obm_error *err);
void obm__pack_unclaim(obm_pack *p);
obm_status obm__pack_idle(obm_pack *p, obm_error *err);   /* BUSY as obm__pack_claim: before the work, not only after it */
/* Writes the manifest (the commit of every change). */
obm_status obm__pack_commit(obm_pack *p, obm_error *err);
/* router.safetensors in and out of the pack (pack_router.c calls these; route/ knows what the tensors mean).
 * tensors: named F32 arrays; report: JSON stored in pack.json under "router" (reference stolen). */
typedef struct obm__named_array { const char *name; const float *data; int32_t ndim; int64_t shape[2]; } obm__named_array;
obm_status obm__pack_write_router(obm_pack *p, const obm__named_array *arrays, size_t n, obm_json *report, obm_error *err);
obm_status obm__pack_read_router(const obm_pack *p, obm__safetensors **out /* NULL without router */, obm_error *err);

#endif
