/* Files: read-only mappings, whole reads, and writes that replace a file in one step. */
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- reading ---- */

/* O_NONBLOCK: opening a FIFO by mistake must fail, not wait for a writer; it has no effect on regular files. */
static obm_status open_regular(const char *path, int *fd, struct stat *st, obm_error *err) {
    int f = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (f < 0) return obm__fail_errno(err, "cannot open %s", path);
    if (fstat(f, st) != 0) {
        obm_status status = obm__fail_errno(err, "cannot examine %s", path);
        close(f);
        return status;
    }
    if (!S_ISREG(st->st_mode)) {
        close(f);
        return obm__fail(err, OBM_E_IO, "%s is %s, expected a file", path,
                         S_ISDIR(st->st_mode) ? "a folder" : "not a regular file");
    }
    *fd = f;
    return OBM_OK;
}

obm_status obm__map_open(const char *path, obm__map *out, obm_error *err) {
    int fd = -1;
    struct stat st;
    OBM_TRY(open_regular(path, &fd, &st, err));
    obm__map map = {NULL, (size_t)st.st_size, (uint64_t)st.st_dev, (uint64_t)st.st_ino};
    if (map.size > 0) {
        void *p = mmap(NULL, map.size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) {
            obm_status status = obm__fail_errno(err, "cannot map %s (%zu bytes)", path, map.size);
            close(fd);
            return status;
        }
        map.data = p;
    }
    close(fd);
    *out = map;
    return OBM_OK;
}

/* The inode of a mapped file is not given to another, so equal numbers mean the same file. */
obm_status obm__map_check(const obm__map *m, const char *path, obm_error *err) {
    struct stat st;
    if (stat(path, &st) != 0 || (uint64_t)st.st_dev != m->device || (uint64_t)st.st_ino != m->inode) return OBM_OK;
    if ((uint64_t)st.st_size >= m->size) return OBM_OK;
    return obm__fail(err, OBM_E_IO,
                     "%s: expected %zu bytes, as when it was opened, found %llu: a file in use is replaced by rename, "
                     "not rewritten",
                     path, m->size, (unsigned long long)st.st_size);
}

void obm__map_close(obm__map *m) {
    if (m->data) munmap((void *)m->data, m->size);
    *m = (obm__map){0};
}

/* Reads to the end rather than to st_size: the file may change between the two calls. */
static obm_status read_to_end(int fd, const char *path, obm__buffer *b, obm_error *err) {
    char chunk[16384];
    for (;;) {
        ssize_t n = read(fd, chunk, sizeof chunk);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return obm__fail_errno(err, "cannot read %s", path);
        obm__buffer_add(b, chunk, (size_t)n);
        if (b->failed) return obm__fail_nomem(err, b->size + (size_t)n);
        if (n == 0) return OBM_OK;
    }
}

obm_status obm__file_read(const char *path, char **text, size_t *size, obm_error *err) {
    int fd = -1;
    struct stat st;
    OBM_TRY(open_regular(path, &fd, &st, err));
    obm__buffer b = {0};
    obm_status status = read_to_end(fd, path, &b, err);
    close(fd);
    if (status != OBM_OK) {
        obm__buffer_free(&b);
        return status;
    }
    *text = b.data;
    if (size) *size = b.size;
    return OBM_OK;
}

obm_status obm__refuse_pointer(const void *bytes, size_t size, const char *where, obm_error *err) {
    static const char head[] = "version https://git-lfs";
    if (size < sizeof head - 1 || memcmp(bytes, head, sizeof head - 1)) return OBM_OK;
    return obm__fail(
        err, OBM_E_FORMAT,
        "%s: found a Git LFS pointer of %zu bytes in place of the file: fetch it with \"git lfs pull\", or "
        "download it again",
        where, size);
}

bool obm__file_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

bool obm__is_directory(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* ---- paths ---- */

bool obm__same_path(const char *a, const char *b) {
    char first[PATH_MAX], second[PATH_MAX];
    return realpath(a, first) && realpath(b, second) && !strcmp(first, second);
}

char *obm__path_join(const char *dir, const char *name) {
    size_t n = strlen(dir);
    return obm__format(n == 0 || dir[n - 1] == '/' ? "%s%s" : "%s/%s", dir, name);
}

char *obm__path_directory(const char *path) {
    const char *slash = strrchr(path, '/');
    if (!slash) return obm__strdup(".");
    return obm__strndup(path, slash == path ? 1 : (size_t)(slash - path));
}

/* ---- writing ---- */

obm_status obm__temp_create(const char *path, char **name, int *fd, obm_error *err) {
    for (int i = 0; i < 10000; i++) {
        char *temp = obm__format("%s.tmp-%ld-%d", path, (long)getpid(), i);
        if (!temp) return obm__fail_nomem(err, strlen(path));
        int f = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (f >= 0) {
            *name = temp;
            *fd = f;
            return OBM_OK;
        }
        obm_status status = errno == EEXIST ? OBM_OK : obm__fail_errno(err, "cannot create %s", temp);
        obm_free(temp);
        OBM_TRY(status);
    }
    return obm__fail(err, OBM_E_IO, "cannot create a temporary file beside %s: every name is taken", path);
}

size_t obm__temp_stem(const char *name) {
    const char *mark = NULL;
    for (const char *p = name; (p = strstr(p, ".tmp-")); p++) mark = p;
    if (!mark) return 0;
    const char *digits = mark + 5;
    size_t pid = strspn(digits, "0123456789");
    if (!pid || digits[pid] != '-') return 0;
    size_t n = strspn(digits + pid + 1, "0123456789");
    return n && !digits[pid + 1 + n] ? (size_t)(mark - name) : 0;
}

obm_status obm__fd_write(int fd, const char *path, const void *bytes, size_t n, obm_error *err) {
    const char *p = bytes;
    while (n > 0) {
        /* Linux writes at most 2^31 - 4096 bytes in one call; smaller pieces also keep signals answered. */
        ssize_t done = write(fd, p, n < (1u << 30) ? n : (1u << 30));
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return obm__fail_errno(err, "cannot write %s", path);
        p += done;
        n -= (size_t)done;
    }
    return OBM_OK;
}

obm_status obm__fd_write_at(int fd, const char *path, const void *bytes, size_t n, uint64_t offset, obm_error *err) {
    const char *p = bytes;
    while (n > 0) {
        ssize_t done = pwrite(fd, p, n < (1u << 30) ? n : (1u << 30), (off_t)offset);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return obm__fail_errno(err, "cannot write %s", path);
        p += done;
        n -= (size_t)done;
        offset += (uint64_t)done;
    }
    return OBM_OK;
}

obm_status obm__fd_read_at(int fd, const char *path, void *bytes, size_t n, uint64_t offset, size_t *got,
                           obm_error *err) {
    size_t at = 0;
    while (at < n) {
        size_t piece = n - at < (1u << 30) ? n - at : (1u << 30);
        ssize_t done = pread(fd, (char *)bytes + at, piece, (off_t)(offset + at));
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return obm__fail_errno(err, "cannot read %s", path);
        if (done == 0) break;
        at += (size_t)done;
    }
    *got = at;
    return OBM_OK;
}

/* Linux; elsewhere, where the file system cannot, or a signal comes, writes find their blocks one by one.  Never
 * posix_fallocate, which in such a case writes it all. */
obm_status obm__fd_reserve(int fd, const char *path, uint64_t size, obm_error *err) {
#ifdef __linux__
    if (!size || fallocate(fd, 0, 0, (off_t)size) == 0) return OBM_OK;
    if (errno == ENOSPC || errno == EDQUOT || errno == EFBIG) return obm__fail_errno(err, "cannot write %s", path);
#else
    (void)fd, (void)path, (void)size, (void)err;
#endif
    return OBM_OK;
}

/* Linux; elsewhere the sync in the end writes it all. */
void obm__fd_start_sync(int fd, uint64_t offset, uint64_t n) {
#ifdef __linux__
    (void)sync_file_range(fd, (off_t)offset, (off_t)n, SYNC_FILE_RANGE_WRITE);
#else
    (void)fd, (void)offset, (void)n;
#endif
}

obm_status obm__fd_seal(int fd, const char *path, obm_error *err) {
    obm_status status = fsync(fd) == 0 ? OBM_OK : obm__fail_errno(err, "cannot sync %s", path);
    if (close(fd) != 0 && status == OBM_OK) status = obm__fail_errno(err, "cannot close %s", path);
    return status;
}

static obm_status open_directory(const char *dir, int *fd, obm_error *err) {
    *fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return *fd < 0 ? obm__fail_errno(err, "cannot open %s", dir) : OBM_OK;
}

obm_status obm__directory_sync(const char *dir, obm_error *err) {
    int fd = -1;
    OBM_TRY(open_directory(dir, &fd, err));
    /* EINVAL: the file system has nothing to sync for folders. */
    obm_status status = fsync(fd) == 0 || errno == EINVAL ? OBM_OK : obm__fail_errno(err, "cannot sync %s", dir);
    close(fd);
    return status;
}

/* The holder of the lock may have removed the folder, and another have made a new one, between our open and our lock.
 */
static bool is_still(const char *dir, int fd) {
    struct stat ours, now;
    return fstat(fd, &ours) == 0 && stat(dir, &now) == 0 && ours.st_dev == now.st_dev && ours.st_ino == now.st_ino;
}

/* flock belongs to the open file, so it also keeps apart two threads, and the kernel drops it with the process.  NFS
 * answers EBADF: it locks only what is open for writing, which a folder cannot be. */
static obm_status take_lock(const char *dir, int fd, obm_error *err) {
    int failed;
    do failed = flock(fd, LOCK_EX | LOCK_NB);
    while (failed && errno == EINTR);
    if (failed && (errno == EBADF || errno == ENOLCK || errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL))
        return obm__fail(err, OBM_E_UNSUPPORTED, "cannot lock %s: its file system has no locks for folders", dir);
    if (failed && errno != EWOULDBLOCK) return obm__fail_errno(err, "cannot lock %s", dir);
    if (failed || !is_still(dir, fd)) return obm__fail(err, OBM_E_BUSY, "%s is being written by another process", dir);
    return OBM_OK;
}

obm_status obm__directory_lock(const char *dir, int *lock, obm_error *err) {
    int fd = -1;
    OBM_TRY(open_directory(dir, &fd, err));
    obm_status status = take_lock(dir, fd, err);
    if (status == OBM_OK)
        *lock = fd;
    else
        close(fd);
    return status;
}

/* Explicitly: a child that was forked meanwhile holds the same open file, and closing ours would leave it locked. */
void obm__directory_unlock(int lock) {
    (void)flock(lock, LOCK_UN);
    close(lock);
}

static obm_status sync_parent(const char *path, obm_error *err) {
    char *dir = obm__path_directory(path);
    if (!dir) return obm__fail_nomem(err, strlen(path));
    obm_status status = obm__directory_sync(dir, err);
    obm_free(dir);
    return status;
}

/* Everything that can fail comes before the rename: after it readers see the new file, and a caller that heard of a
 * failure would take back what the new file refers to.  A sync that fails there leaves the rename to the system. */
obm_status obm__file_publish(const char *temp, const char *path, obm_error *err) {
    char *dir = obm__path_directory(path);
    int fd = -1;
    obm_status status = dir ? open_directory(dir, &fd, err) : obm__fail_nomem(err, strlen(path));
    obm_free(dir);
    OBM_TRY(status);
    if (rename(temp, path) != 0)
        status = obm__fail_errno(err, "cannot rename %s to %s", temp, path);
    else
        (void)fsync(fd);
    close(fd);
    return status;
}

obm_status obm__file_stage(const char *path, const void *bytes, size_t size, char **temp, obm_error *err) {
    char *name;
    int fd = -1;
    OBM_TRY(obm__temp_create(path, &name, &fd, err));
    obm_status status = obm__fd_write(fd, name, bytes, size, err);
    obm_status sealed = obm__fd_seal(fd, name, status == OBM_OK ? err : NULL);
    if (status == OBM_OK) status = sealed;
    if (status != OBM_OK) {
        unlink(name);
        obm_free(name);
        return status;
    }
    *temp = name;
    return OBM_OK;
}

obm_status obm__file_write(const char *path, const void *bytes, size_t size, obm_error *err) {
    char *temp;
    OBM_TRY(obm__file_stage(path, bytes, size, &temp, err));
    obm_status status = obm__file_publish(temp, path, err);
    if (status != OBM_OK) unlink(temp);
    obm_free(temp);
    return status;
}

static obm_status make_one(const char *path, obm_error *err) {
    if (mkdir(path, 0777) == 0) return sync_parent(path, err);
    if (errno == EEXIST && obm__is_directory(path)) return OBM_OK;
    return obm__fail_errno(err, "cannot create folder %s", path);
}

obm_status obm__check_parents(const char *path, obm_error *err) {
    char *p = obm__strdup(path), *slash;
    if (!p) return obm__fail_nomem(err, strlen(path));
    obm_status status = OBM_OK;
    while ((slash = strrchr(p, '/')) && slash > p) {
        *slash = 0;
        if (access(p, F_OK) != 0) continue;
        if (!obm__is_directory(p))
            status = obm__fail(err, OBM_E_OCCUPIED, "%s: %s is a file, expected a folder or nothing", path, p);
        break;
    }
    obm_free(p);
    return status;
}

obm_status obm__make_directory(const char *path, obm_error *err) {
    if (obm__is_directory(path)) return OBM_OK;
    char *p = obm__strdup(path);
    if (!p) return obm__fail_nomem(err, strlen(path));
    size_t n = strlen(p);
    while (n > 1 && p[n - 1] == '/') p[--n] = 0;
    obm_status status = OBM_OK;
    for (char *at = p + 1; n > 0 && *at && status == OBM_OK; at++) {
        if (*at != '/' || at[-1] == '/') continue;
        *at = 0;
        if (!obm__is_directory(p)) status = make_one(p, err);
        *at = '/';
    }
    if (status == OBM_OK) status = make_one(p, err);
    obm_free(p);
    return status;
}
