/* Where an input lies: a local path as it is, a name of the Hugging Face hub through the context's resolver.  Knows no
 * network and no cache. */
#include "io.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static bool is_word(const char *s, size_t n) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.";
    return n > 0 && n <= 96 && s[0] != '.' && s[0] != '-' && strspn(s, letters) >= n;
}

bool obm__source_is_name(const char *s) {
    const char *slash = strchr(s, '/'), *at = strchr(s, '@');
    if (!slash || (at && (at < slash || !at[1] || strchr(at + 1, '@')))) return false;
    size_t n = at ? (size_t)(at - slash - 1) : strlen(slash + 1);
    return is_word(s, (size_t)(slash - s)) && is_word(slash + 1, n);
}

bool obm__source_is_local(const char *path) { return obm__is_directory(path) || obm__file_exists(path); }

/* `models/chta` has the form of a name, too. */
static void hint_at_folder(const char *name, obm_error *err) {
    char *folder = obm__strndup(name, strcspn(name, "/"));
    if (err && folder && obm__is_directory(folder)) {
        size_t n = strlen(err->message);
        snprintf(err->message + n, sizeof err->message - n, " (and the folder %s that is here has no %s)", folder,
                 strchr(name, '/') + 1);
    }
    obm_free(folder);
}

/* People who mean the hub leave out the owner. */
obm_status obm__source_check(const char *name, obm_error *err) {
    struct stat st;
    if (strpbrk(name, "/:") || stat(name, &st) == 0) return OBM_OK;
    return obm__fail_errno(err, "cannot open %s (names of the Hugging Face hub have the form owner/name)", name);
}

obm_status obm__source_find(const obm_context *ctx, const char *name, char **out, obm_error *err) {
    char found[PATH_MAX] = "";
    bool local = obm__source_is_local(name) || !obm__source_is_name(name);
    if (!local && !(ctx && ctx->resolve)) {
        errno = ENOENT;
        obm_status status =
            obm__fail_errno(err,
                            "%s: a local path is needed here; names of the Hugging Face hub resolve in the Python "
                            "package and its command line only (pip install onebitmerge[hub])",
                            name);
        hint_at_folder(name, err);
        return status;
    }
    obm_status status = local ? OBM_OK : ctx->resolve(ctx->resolve_user, name, found, sizeof found, err);
    if (status != OBM_OK) {
        hint_at_folder(name, err);
        return status;
    }
    char *path = obm__strdup(local ? name : found);
    if (!path) return obm__fail_nomem(err, strlen(name));
    *out = path;
    return OBM_OK;
}
