/* A merge of folders being planned and run: inputs (merge_inputs.c), output tensors (merge_outputs.c), and the run
 * itself (merge_folder.c). */
#ifndef OBM_JOB_H
#define OBM_JOB_H

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
    obm_dtype dtype;            /* written */
    bool copy;                  /* not a float tensor: carried over if all inputs agree */
    int64_t layer;              /* within the slice, -1: in none */
    obm_tensor *tensors;        /* (slice->n), views */
    const obm__lowrank **loras; /* (slice->n): what an adapter adds, NULL without */
    obm__steps steps;
    obm__group group;
} obm__output;

typedef struct obm__job {
    obm_context *ctx;
    const obm__recipe *recipe;
    const char *directory;
    uint64_t memory, seed;
    obm__input *inputs;      /* each once, in the order of their first mention; the recipe's base first */
    size_t n_inputs, donor;  /* the input whose config and tokenizer count */
    obm__slice_plan *slices; /* (recipe->n_slices) */
    size_t widest;           /* inputs of a slice at most */
    bool writes_head;        /* some input of the last slice has a head of its own, so the result has one */
    int64_t n_layers;
    obm__output *outputs;
    size_t n_outputs, capacity;
    obm_tensor *tensors;        /* (capacity, widest) */
    const obm__lowrank **loras; /* (capacity, widest) */
    uint64_t tile;              /* elements */
} obm__job;

/* Opens every model that the recipe names, and assigns them to its slices. */
obm_status obm__job_open(obm__job *j, obm_error *err);
/* Names, shapes, dtypes and settings of all output tensors. */
obm_status obm__job_outputs(obm__job *j, obm_error *err);
/* Whether the statistics of the method are over all tensors at once. */
bool obm__job_whole_model(const obm__job *j);
void obm__job_clear(obm__job *j);

bool obm__input_has_head(const obm__input *in); /* of its own, not the embedding */
bool obm__input_find(const obm__input *in, const char *name, obm_tensor *t, const obm__lowrank **lora);
/* The name without its layer's number replaced by `layer`; owned. */
char *obm__layer_rename(const char *name, int64_t layer);

#endif
