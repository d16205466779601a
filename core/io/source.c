/* Where an input lies: a local path as it is, a name of the Hugging Face hub through the context's resolver.  Knows no
 * network and no cache. */
#include "io.h"

#include <errno.h>
#include <limits.h>
#include <string.h>

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

obm_status obm__source_find(const obm_context *ctx, const char *name, char **out, obm_error *err) {
    char found[PATH_MAX] = "";
    bool local = obm__source_is_local(name) || !obm__source_is_name(name);
    if (!local && !(ctx && ctx->resolve)) {
        errno = ENOENT;
        return obm__fail_errno(err,
                               "%s: a local path is needed here; names of the Hugging Face hub resolve in the Python "
                               "package and its command line only (pip install onebitmerge[hub])",
                               name);
    }
    if (!local) OBM_TRY(ctx->resolve(ctx->resolve_user, name, found, sizeof found, err));
    char *path = obm__strdup(local ? name : found);
    if (!path) return obm__fail_nomem(err, strlen(name));
    *out = path;
    return OBM_OK;
}
