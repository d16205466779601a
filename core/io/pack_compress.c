/* obm_compress: a new pack from a base and its experts. */
#include "pack_parts.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef struct compression {
    obm_context *ctx;
    const obm_expert *given; /* (n), elements of given->struct_size bytes */
    obm_expert *experts;     /* (n) */
    size_t n;
    const obm_compress_options *options;
    const char *dir;
    bool dry_run, made_dir;
    int lock; /* of the output folder, while it is being written */
    obm_profile profile;
    obm_checkpoint *base;
    obm_checkpoint **checkpoints; /* (n) */
    obm__base_digests *digests;
    bool shares;
    obm__shared_job shared;
    obm_json *manifest, *before; /* before: the pack that is being replaced, NULL without */
    obm_plan plan;
} compression;

static obm_status read_experts(compression *c, obm_error *err) {
    if (c->n < 1 || c->n > OBM_PACK_MAX_TASKS) {
        return obm__fail(err, OBM_E_ARG, "%zu experts, a pack holds 1 to %d", c->n, OBM_PACK_MAX_TASKS);
    }
    if (!(c->experts = obm__calloc(c->n, sizeof *c->experts))) return obm__fail_nomem(err, c->n * sizeof *c->experts);
    OBM_TRY(obm__experts_read(c->given, c->n, c->experts, err));
    for (size_t i = 0; i < c->n; i++) {
        OBM_TRY(obm__expert_check(&c->experts[i], err));
        for (size_t j = 0; j < i; j++) {
            if (!strcmp(c->experts[i].name, c->experts[j].name)) {
                return obm__fail(err, OBM_E_ARG, "two experts are named %s", c->experts[i].name);
            }
        }
    }
    return OBM_OK;
}

/* ---- the output folder ---- */

/* Left-overs of a killed run have no manifest and do not count as contents. */
static bool holds_other_files(const char *dir) {
    bool other = false;
    DIR *d = opendir(dir);
    for (struct dirent *e; d && !other && (e = readdir(d));) {
        other = strcmp(e->d_name, ".") && strcmp(e->d_name, "..") && !obm__pack_owns(e->d_name);
    }
    if (d) closedir(d);
    return other;
}

static obm_status no_pack(const compression *c, obm_error *err) {
    return obm__fail(err, OBM_E_OCCUPIED, "%s exists and is not a pack: it will not be replaced", c->dir);
}

static obm_status check_output(const compression *c, obm_error *err) {
    bool overwrite = OBM_OPT(c->options, obm_compress_options, overwrite, false);
    if (access(c->dir, F_OK)) return obm__check_parents(c->dir, err);
    if (!obm__is_directory(c->dir)) return obm__fail(err, OBM_E_OCCUPIED, "%s exists and is no folder", c->dir);
    if (!holds_other_files(c->dir)) return OBM_OK;
    char *manifest = obm__path_join(c->dir, OBM_PACK_MANIFEST);
    if (!manifest) return obm__fail_nomem(err, strlen(c->dir));
    bool pack = obm__file_exists(manifest);
    obm_free(manifest);
    if (!pack) return no_pack(c, err);
    if (overwrite) return OBM_OK;
    return obm__fail(err, OBM_E_EXISTS, "%s exists already, and overwriting was not asked for", c->dir);
}

/* A pack beside the weights it is made from would pass for a pack above. */
static obm_status refuse_input_folder(const compression *c, const obm_checkpoint *input, const char *what,
                                      obm_error *err) {
    struct stat ours, theirs;
    if (stat(c->dir, &ours) || stat(input->directory, &theirs)) return OBM_OK;
    if (ours.st_dev != theirs.st_dev || ours.st_ino != theirs.st_ino) return OBM_OK;
    return obm__fail(err, OBM_E_OCCUPIED, "%s is the folder of %s itself: it will not be replaced", c->dir, what);
}

static obm_status refuse_inputs(const compression *c, obm_error *err) {
    OBM_TRY(refuse_input_folder(c, c->base, "the base", err));
    for (size_t i = 0; i < c->n; i++) {
        char what[80];
        snprintf(what, sizeof what, "expert %s", c->experts[i].name);
        OBM_TRY(refuse_input_folder(c, c->checkpoints[i], what, err));
    }
    return OBM_OK;
}

/* The pack that is being replaced tells which files a failed run must leave.  One that cannot be read names none. */
static obm_status read_before(compression *c, obm_error *err) {
    char *path = obm__path_join(c->dir, OBM_PACK_MANIFEST);
    if (!path) return obm__fail_nomem(err, strlen(c->dir));
    obm_status status = obm__file_exists(path) ? obm__json_load(path, &c->before, err) : OBM_OK;
    obm_free(path);
    if (status != OBM_OK) return status == OBM_E_FORMAT ? OBM_OK : status;
    const char *format = obm__json_string(obm__json_get(c->before, "format"));
    return c->before && !(format && !strcmp(format, OBM_PACK_FORMAT)) ? no_pack(c, err) : OBM_OK;
}

static void let_go(compression *c) {
    if (c->made_dir) (void)rmdir(c->dir); /* it stays when there is a pack in it by now */
    obm__pack_unlock(c->lock);
}

/* The folder is looked at again under the lock: another run may have made a pack there since the first look. */
static obm_status take_output(compression *c, obm_error *err) {
    OBM_TRY(refuse_inputs(c, err));
    c->made_dir = access(c->dir, F_OK) != 0;
    OBM_TRY(obm__make_directory(c->dir, err));
    OBM_TRY(obm__pack_lock(c->dir, &c->lock, err));
    obm_status status = check_output(c, err);
    if (status == OBM_OK) status = read_before(c, err);
    if (status != OBM_OK) let_go(c);
    return status;
}

/* ---- steps ---- */

static obm_status open_all(compression *c, const char *base_path, uint64_t *bytes, obm_error *err) {
    OBM_TRY(obm_checkpoint_open(c->ctx, base_path, &c->base, err));
    OBM_TRY(obm__checkpoint_is_model(c->base, "a base", err));
    if (!c->base->config && obm__is_directory(c->base->path))
        obm__warn(c->ctx, "%s has no config.json: the pack cannot be run, nor can what is exported of it",
                  c->base->path);
    obm__checkpoint_warn_layers(c->base, "the pack keeps their differences, but no model of it runs them");
    for (size_t i = 0; i < c->n; i++) {
        OBM_TRY(obm__expert_open(c->ctx, &c->experts[i], &c->checkpoints[i], err));
        *bytes += obm__expert_bytes(c->base, c->checkpoints[i]);
    }
    return OBM_OK;
}

/* *record: NULL where nothing is shared and in a dry run. */
static obm_status share(compression *c, obm__pulse *ticker, uint64_t bytes, obm_json **record, obm_error *err) {
    if (!c->shares) return OBM_OK;
    obm__shared_job *j = &c->shared;
    j->ctx = c->ctx;
    j->base = c->base;
    j->dir = c->dir;
    j->dry_run = c->dry_run;
    j->ticker = ticker;
    j->plan = &c->plan;
    OBM_TRY(obm__shared_write(j, c->experts, c->checkpoints, c->n, c->profile, record, err));
    return c->dry_run ? OBM_OK : obm__tick(ticker, bytes, err);
}

static obm_status add_experts(compression *c, obm_json *list, uint64_t bytes, obm_json **shared, obm_error *err) {
    uint64_t done = c->shares ? bytes : 0;
    obm__pulse ticker = obm__compress_pulse(c->ctx, c->options, "compress", bytes + done);
    OBM_TRY(share(c, &ticker, bytes, shared, err));
    for (size_t i = 0; i < c->n; i++) {
        obm_json *record = NULL;
        obm__expert_request r = {.ctx = c->ctx,
                                 .base = c->base,
                                 .expert = &c->experts[i],
                                 .profile = c->profile,
                                 .dir = c->dir,
                                 .dry_run = c->dry_run,
                                 .ticker = &ticker,
                                 .digests = c->digests,
                                 .plan = &c->plan,
                                 .shared = c->shares ? &c->shared : NULL,
                                 .v = c->shares ? c->shared.experts[i].v : NULL};
        ticker.done = done;
        OBM_TRY(obm__expert_write(&r, c->checkpoints[i], &record, err));
        if (!c->dry_run && !obm__json_append(list, record)) return obm__fail_nomem(err, 0);
        done += obm__expert_bytes(c->base, c->checkpoints[i]);
        if (!c->dry_run) OBM_TRY(obm__tick(&ticker, done, err));
    }
    return OBM_OK;
}

static bool put_head(obm_json *m, bool shares) {
    int version = shares ? OBM_PACK_VERSION_SHARED : OBM_PACK_VERSION;
    bool ok = obm__json_set(m, "format", obm__json_new_string(OBM_PACK_FORMAT));
    ok = obm__json_set(m, "version", obm__json_new_int(version)) && ok;
    char *generator = obm__format("onebitmerge %s", obm_version());
    ok = generator && obm__json_set(m, "generator", obm__json_new_string(generator)) && ok;
    obm_free(generator);
    return ok;
}

static obm_status make_manifest(compression *c, uint64_t bytes, obm_error *err) {
    obm_pack_settings settings;
    obm_json *base = NULL, *list = NULL, *shared = NULL;
    obm__pulse ticker = obm__compress_pulse(c->ctx, c->options, "fingerprint", obm__checkpoint_bytes(c->base));
    obm__settings_default(c->profile, &settings);
    if (c->shares) settings.lambda = 0; /* what a mask leaves of the shared vector is the expert, in both papers */
    if (!(c->manifest = obm__json_new_object()) || !put_head(c->manifest, c->shares)) return obm__fail_nomem(err, 0);
    if (!(list = obm__json_new_array())) return obm__fail_nomem(err, 0);
    obm_status status = obm__base_digests_new(c->base, &c->digests, err);
    if (status == OBM_OK) status = add_experts(c, list, bytes, &shared, err);
    if (status == OBM_OK) status = obm__base_record(c->ctx, c->base, c->dir, c->digests, &ticker, &base, err);
    bool ok = base && obm__json_set(c->manifest, "base", base);
    ok = ok && obm__json_set(c->manifest, "settings", obm__settings_record(&settings));
    if (shared) ok = obm__json_set(c->manifest, "shared", shared) && ok;
    ok = obm__json_set(c->manifest, "experts", list) && ok;
    ok = ok && obm__json_set(c->manifest, "router", obm__json_new_null());
    return status != OBM_OK ? status : ok ? OBM_OK : obm__fail_nomem(err, 0);
}

/* Loading before the commit proves that what was written can be read. */
static obm_status write_pack(compression *c, uint64_t bytes, obm_pack **out, obm_error *err) {
    obm_pack *pack = NULL;
    OBM_TRY(take_output(c, err));
    obm_status status = make_manifest(c, bytes, err);
    if (status == OBM_OK) status = obm__pack_load(c->ctx, c->dir, c->manifest, c->base, &pack, err);
    if (status == OBM_OK) status = obm__manifest_write(c->dir, c->manifest, pack->manifest_xxh3, err);
    if (status != OBM_OK) {
        obm__pack_unload(pack);
        obm__pack_clean(c->dir, c->before);
        let_go(c);
        return status;
    }
    obm__pack_unlock(c->lock);
    c->base = NULL; /* the pack's now, and so is the manifest */
    c->manifest = NULL;
    if (out)
        *out = pack;
    else
        obm_pack_free(pack);
    return OBM_OK;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static obm_status run(compression *c, const char *base_path, obm_plan *plan, obm_pack **out, obm_error *err) {
    double begin = now();
    uint64_t bytes = 0;
    if (!(c->checkpoints = obm__calloc(c->n, sizeof(*c->checkpoints))))
        return obm__fail_nomem(err, c->n * sizeof(*c->checkpoints));
    OBM_TRY(open_all(c, base_path, &bytes, err));
    if (c->dry_run) {
        OBM_TRY(refuse_inputs(c, err));
        OBM_TRY(read_before(c, err));
    }
    uint64_t hashing = obm__base_memory(c->ctx, c->base);
    OBM_TRY(c->dry_run ? add_experts(c, NULL, bytes, NULL, err) : write_pack(c, bytes, out, err));
    /* A guess for a dry run: a gigabyte a second, a common SSD's reading speed, which is what bounds this. */
    c->plan.seconds = c->dry_run ? (double)(c->plan.bytes_read + c->plan.bytes_written) / 1e9 : now() - begin;
    if (c->plan.peak_memory < hashing) c->plan.peak_memory = hashing;
    if (plan) *plan = c->plan;
    return OBM_OK;
}

obm_status obm_compress(obm_context *ctx, const char *base_path, const obm_expert *experts, size_t n,
                        const obm_compress_options *options, const char *out_path, obm_plan *plan, obm_pack **out,
                        obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_compress_options, options, err));
    compression c = {.ctx = ctx, .given = experts, .n = n, .options = options, .dir = out_path};
    c.dry_run = OBM_OPT(options, obm_compress_options, dry_run, false);
    c.profile = OBM_OPT(options, obm_compress_options, profile, OBM_PROFILE_DEFAULT);
    if ((unsigned)c.profile > OBM_PROFILE_MERGEKIT)
        return obm__fail(err, OBM_E_ARG, "unknown profile %d", (int)c.profile);
    OBM_TRY(obm__shared_options(options, &c.shares, &c.shared.rule, &c.shared.dtype, err));
    if (!out_path || !*out_path) return obm__fail(err, OBM_E_ARG, "no output path");
    obm_status status = read_experts(&c, err);
    if (status == OBM_OK) status = check_output(&c, err);
    if (status == OBM_OK) status = run(&c, base_path, plan, out, err);
    obm__shared_free(&c.shared);
    for (size_t i = 0; c.checkpoints && i < n; i++) obm_checkpoint_free(c.checkpoints[i]);
    obm_free(c.checkpoints);
    obm_free(c.experts);
    obm__base_digests_free(c.digests);
    obm_checkpoint_free(c.base);
    obm__json_free(c.manifest);
    obm__json_free(c.before);
    return status;
}
