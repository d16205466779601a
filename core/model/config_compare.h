/* Whether a fine-tune's config.json computes what its base's does. */
#ifndef OBM_CONFIG_COMPARE_H
#define OBM_CONFIG_COMPARE_H

#include "../io/io.h"

/* Errors: MISMATCH (another architecture, known to this library or not). */
obm_status obm__configs_same_architecture(const obm_checkpoint *base, const obm_checkpoint *other, obm_error *err);
/* Warns of what in `other`'s config.json makes the same weights compute something else than `base`'s does (RoPE, norms,
 * heads, windows, multipliers): whatever is made of both models follows `base`.  Defaults and spellings of one meaning
 * are equal.  whole: they have the same layers, not slices of each other's.  Quiet where one has no config.json.
 * Errors: MISMATCH (another architecture, known to this library or not), NOMEM. */
obm_status obm__configs_compare(const obm_checkpoint *base, const obm_checkpoint *other, bool whole, obm_error *err);

#endif
