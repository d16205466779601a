/* The inside of reading a config.json, shared by config.c (sizes, layers), config_rope.c and config_keys.c. */
#ifndef OBM_CONFIG_H
#define OBM_CONFIG_H

#include "model.h"

typedef struct obm__reader {
    const obm_json *json;   /* an object */
    const char *where;
    obm_error *err;
} obm__reader;

bool obm__absent(const obm_json *v);   /* or null */
obm_status obm__wrong_kind(const obm__reader *r, const char *key, const char *expected);
/* A size in [1, 2^31]; dflt < 0: the key is needed. */
obm_status obm__read_size(const obm__reader *r, const char *key, int64_t dflt, int64_t *out);
/* A positive number; dflt < 0: the key is needed. */
obm_status obm__read_positive(const obm__reader *r, const char *key, double dflt, double *out);
obm_status obm__read_bool(const obm__reader *r, const char *key, bool dflt, bool *out);
/* UNSUPPORTED, with the key and its value. */
obm_status obm__refuse_key(const obm__reader *r, const char *key, const obm_json *v);

/* Refuses what would change results and is not understood (arch: of the config's model_type). */
obm_status obm__check_keys(const obm__reader *r, const obm__arch *arch);
obm_status obm__check_rope_keys(const obm__reader *r, const obm__arch *arch);
obm_status obm__check_outer_keys(const obm__reader *r, const obm_json *inner);
const char *obm__rope_type_name(obm__rope_type type);
const char *obm__activation_name(obm__activation activation);
/* c->ropes and n_ropes; may raise c->max_positions.  The layers are not looked at. */
obm_status obm__read_ropes(const obm__reader *r, obm__config *c);

#endif
