/* A merge of folders being planned and run: inputs (merge_inputs.c), output tensors (merge_outputs.c), and the run
 * itself (merge_folder.c). */
#ifndef OBM_JOB_H
#define OBM_JOB_H

#include "../io/pack.h"
#include "recipe.h"

/* A model, and the adapter on it where the recipe has one. */
typedef struct obm__input {
    const char *ref; /* its name in the recipe, for messages */
    obm_checkpoint *model, *adapter;
    obm_task_vector *v; /* of the adapter */
    int64_t layers;
} obm__input;

/* The inputs of one slice: the base first where the method has one, then the models. */
typedef struct obm__slice_plan {
    const obm__slice *slice;
    const obm__source **sources; /* (n), owned; as are: */
    size_t *inputs;              /* (n) */
    const char **refs;           /* (n), for messages */
    size_t n, reference;         /* the input whose names and shapes count */
    bool has_base;
    int64_t first; /* its first layer in the output */
} obm__slice_plan;

typedef struct obm__output {
    char *name; /* owned */
    const obm__slice_plan *slice;
    obm_dtype dtype;           /* written */
    bool copy;                 /* not a float tensor: carried over if all inputs agree */
    int64_t layer;             /* within the slice, -1: in none */
    obm_tensor *tensors;       /* (slice->n), views */
    const obm__pair **changes; /* (slice->n): what an adapter or a pack changes, NULL without */
    obm__steps steps;
    obm__group group;
    obm__rows *rows; /* of a built vocabulary, else NULL; the shapes of `tensors` are then the result's; owned */
} obm__output;

typedef struct obm__vocabulary obm__vocabulary;

/* The output of one document of a recipe that others refer to. */
typedef struct obm__stage {
    const char *name;
    char *path;              /* where it is, or will be; owned */
    obm_checkpoint *planned; /* its headers without data, for those that are planned before it is there; owned */
    bool done;
    char *tokenizer; /* its tokenizer.json as planned, nullable; owned */
} obm__stage;

typedef struct obm__job {
    obm_context *ctx;
    const obm__recipe *recipe;
    const char *directory;
    const obm__stage *parts; /* (n_parts), borrowed */
    size_t n_parts;
    uint64_t memory, seed;
    obm__input *inputs;      /* each once, in the order of their first mention; the recipe's base first */
    size_t n_inputs, donor;  /* the input whose config and tokenizer count */
    obm__slice_plan *slices; /* (recipe->n_slices) */
    size_t widest;           /* inputs of a slice at most */
    bool writes_head;        /* some input of the last slice has a head of its own, so the result has one */
    int64_t n_layers;
    obm__output *outputs;
    size_t n_outputs;
    obm__vocabulary *vocabulary; /* NULL: the donor's, which all inputs have */
    obm_tensor *tensors;         /* (n_outputs, widest), of each output's inputs */
    const obm__pair **changes;   /* (n_outputs, widest) */
    uint64_t tile;               /* elements */
    uint64_t kept;               /* bytes of inputs that may stay mapped from pass to pass */
} obm__job;

/* Opens every model that the recipe names, and assigns them to its slices. */
obm_status obm__job_open(obm__job *j, obm_error *err);
/* Names, shapes, dtypes and settings of all output tensors. */
obm_status obm__job_outputs(obm__job *j, obm_error *err);
/* Warns of configs that differ; after the outputs, whose errors about shapes say more of models of another size. */
obm_status obm__job_compare_configs(const obm__job *j, obm_error *err);
/* Warns of filters in the recipe's settings that are in no tensor's name. */
void obm__job_warn_filters(const obm__job *j);
/* Name of an output's tensor in the i-th input of its slice; owned, NULL: out of memory. */
char *obm__output_source_name(const obm__output *o, size_t i);
/* Whether the statistics of the method are over all tensors at once. */
bool obm__job_whole_model(const obm__job *j);
void obm__job_clear(obm__job *j);

/* Where the small files of a model are: in a folder, but for those that an expert brings in its pack.  Views. */
typedef struct obm__texts {
    const char *directory;
    const obm__pack_text *own; /* nullable */
} obm__texts;
obm__texts obm__input_texts(const obm__input *in);
/* *path owned, NULL if there can be no such file, else it need not be there; false: out of memory. */
bool obm__texts_find(const obm__texts *t, const char *name, char **path);
/* Those of the model of a reference; *model is the input or planned document it is, else NULL.  *directory is what
 * out->directory is, owned. */
obm_status obm__job_find_texts(const obm__job *j, const char *ref, obm__texts *out, char **directory,
                               const obm_checkpoint **model, obm_error *err);
bool obm__input_has_head(const obm__input *in); /* of its own, not the embedding */
/* Rows of its embedding where they are not the model's below it, else 0. */
int64_t obm__input_own_rows(const obm__input *in);
/* *change: its values are to be read from there, t has shape and dtype alone; else untouched. */
bool obm__input_find(const obm__input *in, const char *name, obm_tensor *t, const obm__pair **change);
/* ---- vocabularies (vocabulary.c) ---- */

/* From the inputs' tokenizers, by the recipe's rules.  Errors: NOTFOUND (a tokenizer, a token), FORMAT, UNSUPPORTED. */
obm_status obm__vocabulary_new(const obm__job *j, obm__vocabulary **out, obm_error *err);
void obm__vocabulary_free(obm__vocabulary *v, size_t n_inputs);
size_t obm__vocabulary_rows_count(const obm__vocabulary *v);
obm__texts obm__vocabulary_texts(const obm__vocabulary *v); /* whose tokenizer files the result takes */
bool obm__vocabulary_changed(const obm__vocabulary *v);     /* but for these two: */
const char *obm__vocabulary_tokenizer(const obm__vocabulary *v);
const char *obm__vocabulary_config(const obm__vocabulary *v); /* nullable: that folder's */
/* Of which token is which row of which input, for a record of the job. */
void obm__vocabulary_hash(const obm__vocabulary *v, size_t n_inputs, char out[33]);
/* The rows of an output that has one per token, whose tensors then take the result's shape; *out untouched where they
 * are the inputs' own, all in place. */
obm_status obm__vocabulary_rows(const obm__job *j, const obm__vocabulary *v, obm__output *o, obm__rows **out,
                                obm_error *err);

/* ---- small files (carried.c, chat.c) ---- */

typedef struct obm__carried {
    const char *instead[16][2], *texts[3][2]; /* as obm__model_writer_options has them */
    size_t n_instead, n_texts, n_owned;
    char *owned[24];
} obm__carried;
obm_status obm__carried_new(const obm__job *j, obm__carried *out, obm_error *err);
void obm__carried_clear(obm__carried *c);
/* The Jinja text that the recipe asks for; *out owned, NULL where the files keep what they have. */
obm_status obm__chat_template(const obm__job *j, char **out, obm_error *err);

/* ---- several documents (documents.c) ---- */

/* The documents of a recipe in an order in which each comes after those it refers to. */
typedef struct obm__documents {
    obm__recipe **recipes; /* (n), in this order */
    obm__stage *parts;     /* (n): the output of each; a name of NULL for the one without */
    size_t n;
    char *folder; /* holds parts that are removed in the end; NULL without */
} obm__documents;
/* *out untouched on failure.  Errors: those of reading a recipe, and ARG (names that are no folders, twice or missing;
 * documents that need each other). */
obm_status obm__documents_read(const obm_context *ctx, const char *text, obm_profile profile,
                               const obm__recipe_methods *methods, const char *out_path, obm__documents *out,
                               obm_error *err);
/* The headers of a planned output; config is copied. */
obm_status obm__documents_plan_part(const obm__job *j, const obm_json *config, obm__stage *part, obm_error *err);
void obm__documents_remove_parts(const obm__documents *d);
void obm__documents_free(obm__documents *d);

#endif
