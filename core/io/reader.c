/*
 * Copies of what checkpoints map, read from the files again.  Into a small buffer that is used again and again this
 * takes less time than the faults of fresh pages, several threads do not meet in one address space, nothing stays
 * resident, and a file that was cut short is an error instead of a signal.
 */
#include "io.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct source {
    const obm__safetensors *file;
    int fd; /* -1: only the mapping is left */
} source;

struct obm__reader {
    size_t n;
    source sources[];
};

/* Not another file that has taken the name since. */
static int open_again(const obm__safetensors *file) {
    struct stat st;
    int fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return -1;
    if (!fstat(fd, &st) && (uint64_t)st.st_dev == file->map.device && (uint64_t)st.st_ino == file->map.inode) return fd;
    close(fd);
    return -1;
}

obm_status obm__reader_new(const obm_checkpoint *const *checkpoints, size_t n, obm__reader **out, obm_error *err) {
    size_t files = 0;
    for (size_t i = 0; i < n; i++) files += checkpoints[i]->n_files;
    size_t bytes = sizeof(obm__reader) + files * sizeof(source);
    obm__reader *r = obm__calloc(1, bytes);
    if (!r) return obm__fail_nomem(err, bytes);
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < checkpoints[i]->n_files; j++) {
            const obm__safetensors *file = checkpoints[i]->files[j];
            r->sources[r->n++] = (source){file, open_again(file)};
        }
    *out = r;
    return OBM_OK;
}

void obm__reader_free(obm__reader *r) {
    if (!r) return;
    for (size_t i = 0; i < r->n; i++)
        if (r->sources[i].fd >= 0) close(r->sources[i].fd);
    obm_free(r);
}

/* macOS has neither the call nor the name. */
static void advise_random(int fd) {
#ifdef POSIX_FADV_RANDOM
    (void)posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
#else
    (void)fd;
#endif
}

void obm__reader_scattered(const obm__reader *r) {
    for (size_t i = 0; i < r->n; i++)
        if (r->sources[i].fd >= 0) advise_random(r->sources[i].fd);
}

static const source *find(const obm__reader *r, const void *data) {
    uintptr_t at = (uintptr_t)data;
    for (size_t i = 0; i < r->n; i++) {
        uintptr_t begin = (uintptr_t)r->sources[i].file->map.data;
        if (at >= begin && at - begin < r->sources[i].file->map.size) return &r->sources[i];
    }
    return NULL;
}

obm_status obm__reader_get(const obm__reader *r, const void *data, size_t n, void *to, obm_error *err) {
    if (!n) return OBM_OK;
    const source *s = find(r, data);
    if (!s || s->fd < 0) {
        memcpy(to, data, n);
        if (s) obm__pages_release(data, n);
        return OBM_OK;
    }
    uint64_t offset = (uint64_t)((const uint8_t *)data - s->file->map.data);
    size_t got;
    OBM_TRY(obm__fd_read_at(s->fd, s->file->path, to, n, offset, &got, err));
    if (got == n) return OBM_OK;
    OBM_TRY(obm__map_check(&s->file->map, s->file->path, err));
    return obm__fail(err, OBM_E_IO, "%s: expected %zu bytes at %llu, found %zu", s->file->path, n,
                     (unsigned long long)offset, got);
}
