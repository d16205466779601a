/* The only door to OpenBLAS and the LAPACK in it.  Everything runs on the calling thread; the library's own threads are
 * not used. */
#include "sys.h"

#include <cblas.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

/*
 * OpenBLAS keeps one thread count for the process, shared with every other user of the library (NumPy may be one), and
 * the versions in distributions have no per-thread setting.  So the count of our users must be process-wide as well.  A
 * spin lock is enough: a few instructions are done under it, since lowering the count and raising it back starts no
 * threads.
 */
static atomic_flag lock = ATOMIC_FLAG_INIT;
static int users, saved;

static void take_lock(void) {
    while (atomic_flag_test_and_set_explicit(&lock, memory_order_acquire)) sched_yield();
}

void obm__blas_enter(void) {
    take_lock();
    if (!users++) {
        saved = openblas_get_num_threads();
        if (saved != 1) openblas_set_num_threads(1);
    }
    atomic_flag_clear_explicit(&lock, memory_order_release);
}

void obm__blas_leave(void) {
    take_lock();
    /* A count that is no longer 1 was set by somebody else on purpose: it stays. */
    if (!--users && saved != 1 && openblas_get_num_threads() == 1) openblas_set_num_threads(saved);
    atomic_flag_clear_explicit(&lock, memory_order_release);
}

/*
 * Every concurrent caller gets a buffer from OpenBLAS, which tries forever where it cannot have one (ulimit -v).
 * BUFFER_SIZE is 32 << 22 bytes on x86-64 and ARM64; 16 MiB are for the worker's own stack.  What OpenBLAS has
 * allocated once it keeps, so the highest count that was possible is remembered.
 */
#define BLAS_SPACE (((size_t)32 << 22) + ((size_t)16 << 20))

obm_status obm__blas_check(int threads, obm_error *err) {
    static _Atomic int possible;
    int before = atomic_load_explicit(&possible, memory_order_relaxed);
    if (threads <= before) return OBM_OK;
    size_t bytes = (size_t)(threads - before) * BLAS_SPACE;
    void *p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        return obm__fail(
            err, OBM_E_NOMEM,
            "out of memory: OpenBLAS needs %zu MiB of address space for %d threads (a limit like ulimit -v "
            "is too low; fewer threads need less)",
            bytes >> 20, threads);
    }
    munmap(p, bytes);
    atomic_store_explicit(&possible, threads, memory_order_relaxed);
    return OBM_OK;
}

void obm__dgemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, double alpha, const double *a,
                int64_t lda, const double *b, int64_t ldb, double beta, double *c, int64_t ldc) {
    obm__blas_enter();
    cblas_dgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans,
                (blasint)m, (blasint)n, (blasint)k, alpha, a, (blasint)lda, b, (blasint)ldb, beta, c, (blasint)ldc);
    obm__blas_leave();
}

/* ---- LAPACK ----
 *
 * By its Fortran names: they are in every OpenBLAS that has LAPACK, while Debian's has no LAPACKE.  Fortran passes the
 * lengths of strings behind the arguments.  A row-major matrix is its transpose in column-major order. */

extern void dgesdd_(const char *job, const blasint *m, const blasint *n, double *a, const blasint *lda, double *s,
                    double *u, const blasint *ldu, double *vt, const blasint *ldvt, double *work, const blasint *lwork,
                    blasint *iwork, blasint *info, size_t job_length);
extern void dsyevd_(const char *job, const char *uplo, const blasint *n, double *a, const blasint *lda, double *w,
                    double *work, const blasint *lwork, blasint *iwork, const blasint *liwork, blasint *info,
                    size_t job_length, size_t uplo_length);
extern void dposv_(const char *uplo, const blasint *n, const blasint *columns, double *a, const blasint *lda, double *b,
                   const blasint *ldb, blasint *info, size_t uplo_length);

/* A^T = V S U^T.  Job O overwrites the larger of the two factors' places, the other one has a place of its own. */
int obm__dgesdd(int64_t m, int64_t n, double *a, double *s, double *small, double *work, int64_t n_work,
                int32_t *integers) {
    _Static_assert(sizeof(blasint) == sizeof(int32_t), "the LAPACK of this OpenBLAS has 64-bit integers");
    blasint rows = (blasint)n, cols = (blasint)m, k = rows < cols ? rows : cols, size = (blasint)n_work, info = 0;
    obm__blas_enter();
    dgesdd_("O", &rows, &cols, a, &rows, s, small, &k, small, &k, work, &size, integers, &info, 1);
    obm__blas_leave();
    return (int)info;
}

int obm__dsyevd(int64_t n, double *a, double *w, double *work, int64_t n_work, int32_t *integers, int64_t n_integers) {
    blasint order = (blasint)n, size = (blasint)n_work, n_iwork = (blasint)n_integers, info = 0;
    obm__blas_enter();
    dsyevd_("V", "L", &order, a, &order, w, work, &size, integers, &n_iwork, &info, 1, 1);
    obm__blas_leave();
    return (int)info;
}

int obm__dposv(int64_t n, int64_t m, double *c, double *x) {
    blasint order = (blasint)n, columns = (blasint)m, info = 0;
    obm__blas_enter();
    dposv_("L", &order, &columns, c, &order, x, &order, &info, 1);
    obm__blas_leave();
    return (int)info;
}

/* openblas_get_config() is "OpenBLAS 0.3.21 NO_LAPACKE ...": the first two words are name and version. */
const char *obm__blas_describe(char *buf, size_t size) {
    const char *config = openblas_get_config(), *end = strchr(config, ' ');
    if (end) end = strchr(end + 1, ' ');
    int n = end ? (int)(end - config) : (int)strlen(config);
    snprintf(buf, size, "%.*s %s", n, config, openblas_get_corename());
    return buf;
}
