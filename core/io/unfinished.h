/* What a killed writer of a model folder left, for the next one: files to go on with, files to remove.  And what a
 * finished one left, for one that is asked to go on. */
#ifndef OBM_UNFINISHED_H
#define OBM_UNFINISHED_H

#include "io.h"

#define OBM_ONE_FILE "model.safetensors"
#define OBM_INDEX_FILE "model.safetensors.index.json"
/* The journal of a writer at work: which job it does, which shards are finished, and, once the switch to the new model
 * begins, which files get which contents.  Removed when the model is there. */
#define OBM_UNFINISHED_FILE "onebitmerge-unfinished.json"
#define OBM_UNFINISHED_FORMAT "onebitmerge unfinished model"
#define OBM_UNFINISHED_VERSION 1
/* What a merge leaves beside its model: the job, and name, size and XXH3 of every file of the model but the card. */
#define OBM_FINISHED_FILE "onebitmerge-finished.json"
#define OBM_FINISHED_FORMAT "onebitmerge finished model"

typedef struct obm__unfinished {
    const char *dir;   /* borrowed */
    obm_json *journal; /* NULL without; of a finished model its record */
    bool finished;
    obm_json *index;   /* of the model that is in the folder, NULL without */
    bool model;        /* there is a model: an index, or the one file */
} obm__unfinished;

/* FORMAT for a journal that is none. */
obm_status obm__unfinished_read(const char *dir, obm__unfinished *out, obm_error *err);
void obm__unfinished_clear(obm__unfinished *u);
/* A plain shard's name with its content's hash; owned. */
char *obm__unfinished_hashed_name(const char *plain, const char *xxh3);
/* The record of a finished model in place of the journal: none where there is a journal or no model. */
obm_status obm__finished_read(const char *dir, obm__unfinished *out, obm_error *err);
/* EXISTS names the first of its files that is not what the record says. */
obm_status obm__finished_check(const obm__unfinished *u, obm__tick_fn tick, void *user, obm_error *err);
/* MISMATCH names the first member of the jobs that differs; a NULL job is nobody's. */
obm_status obm__unfinished_same_job(const obm__unfinished *u, const obm_json *job, obm_error *err);
/* A file that stands for shard `i`, whose plain name is `name`: with the journal's size, which must be `bytes`, and its
 * XXH3.  *file owned, NULL without such a file; published: it has a final name, of which it may have two. */
typedef struct obm__finished_shard {
    char *file, hash[33];
    bool published;
} obm__finished_shard;
obm_status obm__unfinished_shard(const obm__unfinished *u, size_t i, const char *name, uint64_t bytes,
                                 obm__tick_fn tick, void *user, obm__finished_shard *out, obm_error *err);
/* A file that a dead writer left: a temporary name of a model folder, or name, size and XXH3 as the journal has them
 * while no index refers to it.  The folder is locked by the caller. */
bool obm__unfinished_owns(const obm__unfinished *u, const char *name);
/* Whether the journal says that a finished shard got this name, whatever the file is by now. */
bool obm__unfinished_names(const obm__unfinished *u, const char *name);
/* Removes those that keep() does not claim; config, tokenizer and card only with `small`, and never a model's. */
void obm__unfinished_remove(const obm__unfinished *u, bool (*keep)(const void *user, const char *name),
                            const void *user, bool small);
/* What the folder's temporary files occupy, or the one of that name; those with other names none. */
uint64_t obm__unfinished_bytes(const char *dir, const char *name);
/* config.json, the tokenizer's files, README.md: what a model folder holds besides weights (model_writer.c). */
bool obm__is_small_file(const char *name);

#endif
