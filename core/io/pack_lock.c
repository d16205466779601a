/* One change of a pack at a time, whoever makes it: a lock on the pack's folder, and the check that the pack on disk is
 * still the one that was opened; and none while calls of this process read it.  Leaves no file behind and changes
 * nothing itself. */
#include "pack_parts.h"

#include <stdatomic.h>
#include <string.h>

obm_status obm__pack_lock(const char *dir, int *lock, obm_error *err) {
    obm_status status = obm__directory_lock(dir, lock, err);
    if (status != OBM_E_BUSY) return status;
    return obm__fail(err, OBM_E_BUSY, "pack %s is being changed by another process", dir);
}

void obm__pack_unlock(int lock) { obm__directory_unlock(lock); }

static obm_status check_unchanged(const obm_pack *p, obm_error *err) {
    char *path = obm__path_join(p->path, OBM_PACK_MANIFEST), *text = NULL, now[33] = "";
    size_t size;
    if (!path) return obm__fail_nomem(err, strlen(p->path));
    obm_status status = obm__file_exists(path) ? obm__file_read(path, &text, &size, err) : OBM_OK;
    if (text) obm__xxh3_of(text, size, now);
    obm_free(text);
    obm_free(path);
    OBM_TRY(status);
    if (!strcmp(now, p->manifest_xxh3)) return OBM_OK;
    return obm__fail(err, OBM_E_BUSY, "pack %s was changed by another process since it was opened: open it again",
                     p->path);
}

obm_status obm__pack_begin(const obm_pack *p, int *lock, obm_error *err) {
    int taken;
    OBM_TRY(obm__pack_lock(p->path, &taken, err));
    obm_status status = check_unchanged(p, err);
    if (status == OBM_OK)
        *lock = taken;
    else
        obm__pack_unlock(taken);
    return status;
}

/* ---- in memory ---- */

/* The count is no part of the pack's value, so a const pack may be counted. */
static _Atomic int *users_of(const obm_pack *p) { return &((obm_pack *)p)->users; }

obm_status obm__pack_use(const obm_pack *p, obm_error *err) {
    int n = atomic_load(users_of(p));
    do {
        if (n < 0) return obm__fail(err, OBM_E_BUSY, "pack %s is being changed by another thread", p->path);
    } while (!atomic_compare_exchange_weak(users_of(p), &n, n + 1));
    return OBM_OK;
}

void obm__pack_unuse(const obm_pack *p) { atomic_fetch_sub(users_of(p), 1); }

obm_status obm__pack_claim(obm_pack *p, obm_error *err) {
    int nobody = 0;
    if (atomic_compare_exchange_strong(users_of(p), &nobody, -1)) return OBM_OK;
    return obm__fail(err, OBM_E_BUSY, "pack %s is in use by a call that is running", p->path);
}

void obm__pack_unclaim(obm_pack *p) { atomic_store(users_of(p), 0); }

obm_status obm__pack_idle(obm_pack *p, obm_error *err) {
    OBM_TRY(obm__pack_claim(p, err));
    obm__pack_unclaim(p);
    return OBM_OK;
}
