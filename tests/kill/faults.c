/* Preloaded into the sweep: counts the calls that change files under one folder, and lets the process die before the
 * n-th of them, the disk be full after so many bytes, or the file system be read-only (a folder's mode does not keep
 * root out).  Does nothing until it is armed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096];
static _Atomic long calls, written;
static long die_at, full_at = -1;
static int read_only, no_reserve;
static _Atomic char reserved[1024]; /* by descriptor: its bytes are counted already */

/* kill_at 0 and disk -1: only count.  Every path that starts with `prefix` counts. */
void faults_arm(const char *prefix, long kill_at, long disk) {
    snprintf(folder, sizeof folder, "%s", prefix);
    calls = written = 0;
    die_at = kill_at;
    full_at = disk;
    read_only = no_reserve = 0;
}
/* After arming: every change is refused. */
void faults_read_only(void) { read_only = 1; }
/* After arming: the file system cannot reserve blocks, so it is a write that finds the disk full. */
void faults_no_reserve(void) { no_reserve = 1; }
long faults_calls(void) { return calls; }
long faults_written(void) { return written; }

static int is_ours(const char *path) { return folder[0] && path && !strncmp(path, folder, strlen(folder)); }

static int is_our_file(int fd) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return is_ours(path);
}

static void count(int ours) {
    if (ours && ++calls == die_at) raise(SIGKILL);
}

static int refuses(int ours) {
    if (!ours || !read_only) return 0;
    errno = EROFS;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int open_any(int (*real)(const char *, int, ...), const char *path, int flags, mode_t mode) {
    int changes = (flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)) && is_ours(path);
    count((flags & O_CREAT) && changes);
    if (refuses(changes)) return -1;
    int fd = real(path, flags, mode);
    if (fd >= 0 && fd < (int)sizeof reserved) reserved[fd] = 0;
    return fd;
}

#define OPEN(name)                                                \
    int name(const char *path, int flags, ...) {                  \
        va_list args;                                             \
        va_start(args, flags);                                    \
        mode_t mode = flags & O_CREAT ? va_arg(args, mode_t) : 0; \
        va_end(args);                                             \
        return open_any(REAL(name), path, flags, mode);           \
    }
OPEN(open)
OPEN(open64)

static int is_reserved(int fd) { return fd >= 0 && fd < (int)sizeof reserved && reserved[fd]; }

/* How many of n bytes the disk has room for; 0: it is full. */
static size_t room_for(size_t n) {
    if (full_at < 0 || written + (long)n <= full_at) return n;
    return full_at > written ? (size_t)(full_at - written) : 0;
}

static size_t begin_write(int fd, int *ours, size_t n) {
    *ours = is_our_file(fd);
    count(*ours);
    *ours = *ours && !is_reserved(fd);
    size_t room = *ours ? room_for(n) : n;
    if (n && !room) errno = ENOSPC;
    return room;
}

static ssize_t end_write(int ours, ssize_t done) {
    if (ours && done > 0) written += done;
    return done;
}

ssize_t write(int fd, const void *bytes, size_t n) {
    int ours;
    size_t room = begin_write(fd, &ours, n);
    return n && !room ? -1 : end_write(ours, REAL(write)(fd, bytes, room));
}

#define PWRITE(name)                                                                   \
    ssize_t name(int fd, const void *bytes, size_t n, off_t offset) {                  \
        int ours;                                                                      \
        size_t room = begin_write(fd, &ours, n);                                       \
        return n && !room ? -1 : end_write(ours, REAL(name)(fd, bytes, room, offset)); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

static int reserve(int (*real)(int, int, off_t, off_t), int fd, int mode, off_t offset, off_t n) {
    int ours = is_our_file(fd);
    count(ours);
    if (ours && (no_reserve || room_for((size_t)n) < (size_t)n)) {
        errno = no_reserve ? EOPNOTSUPP : ENOSPC;
        return -1;
    }
    int failed = real(fd, mode, offset, n);
    if (!failed && ours && fd < (int)sizeof reserved) {
        reserved[fd] = 1;
        written += n;
    }
    return failed;
}

#define FALLOCATE(name) \
    int name(int fd, int mode, off_t offset, off_t n) { return reserve(REAL(name), fd, mode, offset, n); }
FALLOCATE(fallocate)
FALLOCATE(fallocate64)

int fsync(int fd) {
    count(is_our_file(fd));
    return 0; /* a process that dies loses nothing it has written */
}

int rename(const char *from, const char *to) {
    count(is_ours(to));
    if (refuses(is_ours(to))) return -1;
    return REAL(rename)(from, to);
}

int link(const char *from, const char *to) {
    count(is_ours(to));
    if (refuses(is_ours(to))) return -1;
    return REAL(link)(from, to);
}

int unlink(const char *path) {
    count(is_ours(path));
    if (refuses(is_ours(path))) return -1;
    return REAL(unlink)(path);
}

int mkdir(const char *path, mode_t mode) {
    count(is_ours(path));
    if (refuses(is_ours(path))) return -1;
    return REAL(mkdir)(path, mode);
}

int rmdir(const char *path) {
    count(is_ours(path));
    if (refuses(is_ours(path))) return -1;
    return REAL(rmdir)(path);
}
