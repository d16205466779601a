/* Merges by recipes, for the tests of them: a fresh folder, a context that keeps its warnings, results and refusals. */
#ifndef RECIPE_FIXTURE_H
#define RECIPE_FIXTURE_H

#include "delta_fixture.h"

#include "merge/recipe.h"

static char *folder, warnings[4096]; /* the warnings of the last merge, one a line */
static obm_context *ctx;

static inline void keep_warning(void *user, const char *message) {
    (void)user;
    snprintf(warnings + strlen(warnings), sizeof warnings - strlen(warnings), "%s\n", message);
}

static inline obm_context *new_context(int threads) {
    obm_context_options options = OBM_INIT(obm_context_options);
    obm_context *c = NULL;
    options.threads = threads;
    options.log = keep_warning;
    OK(obm_context_new(&options, &c, err));
    return c;
}

static inline int setup(void **state) {
    (void)state;
    folder = fixture_folder();
    ctx = new_context(2);
    return 0;
}

static inline int teardown(void **state) {
    (void)state;
    obm_context_free(ctx);
    fixture_remove(folder);
    obm_free(folder);
    return 0;
}

static inline char *in_folder(const char *name) { return obm__path_join(folder, name); }

/* options NULL: the defaults. */
static inline obm_status merge_with(const char *recipe, const char *out, obm_merge_options *options, obm_plan *plan,
                                    obm_error *err) {
    obm_merge_options defaults = OBM_INIT(obm_merge_options);
    if (!options) options = &defaults;
    options->directory = folder;
    char *path = in_folder(out);
    warnings[0] = 0;
    obm_status status = obm_merge(ctx, recipe, options, path, plan, err);
    obm_free(path);
    return status;
}

static inline obm_checkpoint *merged_with(const char *recipe, const char *out, obm_merge_options *options) {
    obm_checkpoint *c = NULL;
    OK(merge_with(recipe, out, options, NULL, err));
    char *path = in_folder(out);
    OK(obm_checkpoint_open(ctx, path, &c, err));
    obm_free(path);
    return c;
}

/* In the place of what is there; out NULL: plans only. */
static inline obm_status merge_to(const char *recipe, const char *out, obm_plan *plan, obm_error *err) {
    obm_merge_options options = OBM_INIT(obm_merge_options);
    options.overwrite = true;
    options.dry_run = out == NULL;
    return merge_with(recipe, out ? out : "never", &options, plan, err);
}

static inline obm_checkpoint *merged(const char *recipe, const char *out) {
    obm_merge_options options = OBM_INIT(obm_merge_options);
    options.overwrite = true;
    return merged_with(recipe, out, &options);
}

/* While planning. */
static inline void expect_error(const char *recipe, obm_status status, const char *part) {
    FAILS(merge_to(recipe, NULL, NULL, err), status, part);
}

#endif
