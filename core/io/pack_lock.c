/* One change of a pack at a time, whoever makes it: a lock on the pack's folder, and the check that the pack on disk is
 * still the one that was opened.  Leaves no file behind and changes nothing itself. */
#include "pack_parts.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static obm_status held(const char *dir, obm_error *err) {
    return obm__fail(err, OBM_E_BUSY, "pack %s is being changed by another process", dir);
}

/* The holder of the lock may have removed the folder, and another have made a new one, between our open and our lock. */
static bool is_still(const char *dir, int fd) {
    struct stat ours, now;
    return fstat(fd, &ours) == 0 && stat(dir, &now) == 0 && ours.st_dev == now.st_dev && ours.st_ino == now.st_ino;
}

/* flock belongs to the open file, so it also keeps apart two threads, and the kernel drops it with the process. */
static obm_status take(const char *dir, int fd, obm_error *err) {
    int failed;
    do failed = flock(fd, LOCK_EX | LOCK_NB);
    while (failed && errno == EINTR);
    if (failed && errno != EWOULDBLOCK) return obm__fail_errno(err, "cannot lock %s", dir);
    return failed || !is_still(dir, fd) ? held(dir, err) : OBM_OK;
}

obm_status obm__pack_lock(const char *dir, int *lock, obm_error *err) {
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return obm__fail_errno(err, "cannot open %s", dir);
    obm_status status = take(dir, fd, err);
    if (status == OBM_OK)
        *lock = fd;
    else
        close(fd);
    return status;
}

/* Explicitly: a child that was forked meanwhile holds the same open file, and closing ours would leave it locked. */
void obm__pack_unlock(int lock) {
    (void)flock(lock, LOCK_UN);
    close(lock);
}

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
