/* Memory, errors, the context, the thread pool, the guard, fixed sums, BLAS, dtypes and classes. */
#include "sys/sys.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

extern int openblas_get_num_threads(void);
extern void openblas_set_num_threads(int n);

static obm_context *context(int threads) {
    obm_context_options o = OBM_INIT(obm_context_options);
    o.threads = threads;
    obm_context *ctx = NULL;
    obm_error err;
    if (obm_context_new(&o, &ctx, &err) != OBM_OK) fail_msg("%s", err.message);
    return ctx;
}

/* ---- stacks ---- */

static _Atomic size_t least_stack;

static void measure_stack(void *arg, size_t begin, size_t end, int worker) {
    pthread_attr_t attributes;
    size_t bytes = 0;
    (void)arg, (void)begin, (void)end;
    usleep(1000); /* leaves some for the others */
    if (!worker) return;
    assert_int_equal(pthread_getattr_np(pthread_self(), &attributes), 0);
    assert_int_equal(pthread_attr_getstacksize(&attributes, &bytes), 0);
    pthread_attr_destroy(&attributes);
    if (!least_stack || bytes < least_stack) least_stack = bytes;
}

/* Where threads have as little as musl's by default, ours ask for what kernels need. */
static void test_stacks(void **unused) {
    (void)unused;
    pthread_attr_t before, little;
    assert_int_equal(pthread_getattr_default_np(&before), 0);
    assert_int_equal(pthread_attr_init(&little), 0);
    assert_int_equal(pthread_attr_setstacksize(&little, 128 << 10), 0);
    assert_int_equal(pthread_setattr_default_np(&little), 0);
    obm_context *ctx = context(3);
    least_stack = 0;
    while (!least_stack) obm__parallel(ctx, 30, 1, measure_stack, NULL);
    assert_true(least_stack >= 1 << 20);
    obm_context_free(ctx);
    assert_int_equal(pthread_setattr_default_np(&before), 0);
    pthread_attr_destroy(&before);
    pthread_attr_destroy(&little);
}

/* ---- errors and memory ---- */

static void test_memory_of_workers(void **unused) {
    (void)unused;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    assert_int_equal(obm__whole_pages(0), 0);
    assert_int_equal(obm__whole_pages(1), page);
    assert_int_equal(obm__whole_pages(page), page);
    assert_true(obm__whole_pages(SIZE_MAX - 1) == SIZE_MAX);
    char *p = obm__alloc_workers(3, obm__whole_pages(page + 1));
    assert_int_equal((uintptr_t)p % page, 0);
    memset(p, 1, 6 * page);
    obm_free(p);
    obm_free(obm__alloc_workers(0, 0));
    assert_null(obm__alloc_workers(SIZE_MAX / 2, page));
    assert_null(obm__alloc_workers(2, SIZE_MAX));
}

static void test_errors(void **unused) {
    (void)unused;
    obm_error err;
    assert_int_equal(obm__fail(NULL, OBM_E_ARG, "nobody reads %d", 1), OBM_E_ARG);
    assert_int_equal(obm__fail(&err, OBM_E_SHAPE, "expected %d, found %d", 3, 4), OBM_E_SHAPE);
    assert_int_equal(err.code, OBM_E_SHAPE);
    assert_string_equal(err.message, "expected 3, found 4");
    assert_int_equal(err.os_errno, 0);
    errno = ENOENT;
    assert_int_equal(obm__fail_errno(&err, "cannot open %s", "x"), OBM_E_IO);
    assert_string_equal(err.message, "cannot open x: No such file or directory");
    assert_int_equal(err.os_errno, ENOENT);
    assert_string_equal(obm_status_name(OBM_E_VALUE), "VALUE");
    assert_string_equal(obm_status_name((obm_status)-99), "UNKNOWN");
    assert_string_equal(obm_status_name((obm_status)1), "UNKNOWN");
    /* A cut message ends with a whole character. */
    char text[2 * OBM_ERROR_MESSAGE];
    for (size_t shift = 0; shift < 3; shift++) {
        memset(text, 'a', shift);
        for (size_t i = shift; i + 3 < sizeof text; i += 3) memcpy(text + i, "\xe2\x82\xac\0", 4);
        obm__fail(&err, OBM_E_IO, "%s", text);
        size_t n = strlen(err.message);
        assert_true(n > OBM_ERROR_MESSAGE - 5 && n < OBM_ERROR_MESSAGE);
        assert_int_equal((n - shift) % 3, 0);
        assert_memory_equal(err.message, text, n);
    }
}

static void test_memory(void **unused) {
    (void)unused;
    size_t out;
    assert_true(obm__mul(3, 5, &out) && out == 15);
    assert_false(obm__mul(SIZE_MAX, 2, &out));
    assert_true(obm__add(SIZE_MAX - 1, 1, &out) && out == SIZE_MAX);
    assert_false(obm__add(SIZE_MAX, 1, &out));
    assert_null(obm__alloc(SIZE_MAX / 2, 3));
    assert_null(obm__alloc(SIZE_MAX, 1)); /* the padding to 64 overflows */
    assert_null(obm__calloc(SIZE_MAX / 2, 3));
    assert_null(obm__realloc(NULL, SIZE_MAX / 2, 3));
    assert_null(obm__strndup("", SIZE_MAX));
    float *p = obm__alloc(7, sizeof *p);
    assert_non_null(p);
    assert_int_equal((uintptr_t)p % 64, 0);
    obm_free(p);
    void *empty = obm__alloc(0, 8);
    assert_non_null(empty);
    obm_free(empty);
    obm_free(NULL);
    char *s = obm__format("%s-%d", "x", 42);
    assert_string_equal(s, "x-42");
    obm_free(s);
}

static void test_buffer(void **unused) {
    (void)unused;
    obm__buffer b = {0};
    for (int i = 0; i < 1000; i++) obm__buffer_printf(&b, "%d,", i);
    obm__buffer_add(&b, "a\0b", 3);
    obm__buffer_text(&b, "end");
    assert_false(b.failed);
    assert_int_equal(b.size, 10 * 2 + 90 * 3 + 900 * 4 + 6);
    assert_memory_equal(b.data, "0,1,2,3,", 8);
    assert_memory_equal(b.data + b.size - 6, "a\0bend", 7);
    size_t size = b.size;
    obm__buffer_add(&b, "x", SIZE_MAX); /* too long to exist: fails and stays failed */
    assert_true(b.failed);
    obm__buffer_text(&b, "y");
    assert_int_equal(b.size, size);
    obm__buffer_free(&b);
    assert_null(b.data);
    assert_false(b.failed);
}

/* ---- context ---- */

static void collect(void *user, const char *message) { strcat(user, message); }

static void test_context(void **unused) {
    (void)unused;
    char log[256] = "";
    obm_context_options o = OBM_INIT(obm_context_options);
    o.threads = 3;
    o.log = collect;
    o.log_user = log;
    obm_context *ctx;
    obm_error err;
    assert_int_equal(obm_context_new(&o, &ctx, &err), OBM_OK);
    obm_context_info info;
    obm_context_describe(ctx, &info);
    assert_int_equal(info.threads, 3);
    assert_true(info.cores >= 1 && info.nodes >= 1);
    assert_true(info.memory_total > info.memory_free && info.memory_free > 0);
    assert_true(obm__memory_limit() > 1 << 20);
    assert_non_null(strstr(info.isa_available, info.isa));
    assert_memory_equal(info.isa_available, "scalar", 6);
    assert_memory_equal(info.blas, "OpenBLAS ", 9);
    assert_non_null(strstr(info.topology, "core"));
    obm__warn(ctx, "disk %d%% full", 93);
    assert_string_equal(log, "disk 93% full");
    obm_context_free(ctx);
    obm_context_free(NULL);
    obm__warn(NULL, "nowhere");
    /* An older caller's struct ends before log. */
    o.struct_size = offsetof(obm_context_options, log);
    assert_int_equal(obm_context_new(&o, &ctx, &err), OBM_OK);
    obm__warn(ctx, "dropped");
    assert_string_equal(log, "disk 93% full");
    obm_context_free(ctx);
}

static void expect_refused(const char *name, const char *value, const char *part) {
    obm_context *ctx = (obm_context *)(void *)&ctx;
    const obm_context *before = ctx;
    obm_error err;
    setenv(name, value, 1);
    assert_int_equal(obm_context_new(NULL, &ctx, &err), OBM_E_ARG);
    unsetenv(name);
    if (!strstr(err.message, part)) fail_msg("%s", err.message);
    assert_ptr_equal(ctx, before);
}

static void write_limit(const char *dir, const char *name, const char *text) {
    char path[160];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    for (char *slash = path + strlen(dir) + 1; (slash = strchr(slash, '/')); *slash++ = '/') {
        *slash = 0;
        mkdir(path, 0700);
    }
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

/* A group is limited by every group that it is in. */
static void test_memory_groups(void **state) {
    (void)state;
    char dir[] = "/tmp/obm-groups-XXXXXX", command[64], groups[64];
    assert_non_null(mkdtemp(dir));
    snprintf(groups, sizeof groups, "%s/groups", dir);
    write_limit(dir, "memory.max", "max\n");
    write_limit(dir, "a/memory.max", "5000\n");
    write_limit(dir, "a/b/memory.max", "7000\n");
    write_limit(dir, "a/b/c/memory.max", "max\n");
    write_limit(dir, "d/memory.max", "8000\n");
    write_limit(dir, "memory/memory.limit_in_bytes", "9223372036854771712\n");
    write_limit(dir, "memory/x/memory.limit_in_bytes", "6000\n");
    write_limit(dir, "memory/x/y/memory.limit_in_bytes", "9223372036854771712\n");
    const struct {
        const char *groups;
        uint64_t limit;
    } cases[] = {
        {"0::/\n", 9223372036854771712u},
        {"0::/a/b/c\n", 5000},
        {"0::/d\n", 8000},
        {"0::/a", 5000},
        {"0::/d/gone/e\n", 8000},
        {"0::/../elsewhere\n", 9223372036854771712u},
        {"9:name=systemd:/x\n4:cpu,memory:/x/y\n0::/d\n", 6000},
        {"4:cpu,memory_other:/x/y\n", 9223372036854771712u},
        {"no groups", 9223372036854771712u},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_limit(dir, "groups", cases[i].groups);
        if (obm__group_limit(groups, dir) != cases[i].limit) fail_msg("%s", cases[i].groups);
    }
    assert_true(obm__group_limit("/nowhere", "/nowhere") == UINT64_MAX);
    write_limit(dir, "memory.max", "4000\n");
    assert_int_equal(obm__group_limit("/nowhere", dir), 4000);
    snprintf(command, sizeof command, "rm -r %s", dir);
    assert_int_equal(system(command), 0);
}

/* Whole processors of the least quota on the way up. */
static void test_processor_groups(void **state) {
    (void)state;
    char dir[] = "/tmp/obm-quotas-XXXXXX", command[64], groups[64];
    assert_non_null(mkdtemp(dir));
    snprintf(groups, sizeof groups, "%s/groups", dir);
    write_limit(dir, "cpu.max", "max 100000\n");
    write_limit(dir, "a/cpu.max", "350000 100000\n");
    write_limit(dir, "a/b/cpu.max", "800000 100000\n");
    write_limit(dir, "c/cpu.max", "20000 100000\n");
    write_limit(dir, "d/cpu.max", "100000\n");
    write_limit(dir, "e/cpu.max", "100000 0\n");
    write_limit(dir, "cpu/cpu.cfs_quota_us", "-1\n");
    write_limit(dir, "cpu/cpu.cfs_period_us", "100000\n");
    write_limit(dir, "cpu/x/cpu.cfs_quota_us", "250000\n");
    write_limit(dir, "cpu/x/cpu.cfs_period_us", "50000\n");
    const struct {
        const char *groups;
        uint64_t processors;
    } cases[] = {
        {"0::/\n", UINT64_MAX},
        {"0::/a\n", 3},
        {"0::/a/b\n", 3},
        {"0::/c\n", 1},
        {"0::/d\n", UINT64_MAX},
        {"0::/e\n", UINT64_MAX},
        {"4:memory,cpu:/x\n0::/\n", 5},
        {"4:cpu,cpuacct:/x\n0::/a\n", 3},
        {"4:cpuset:/x\n", UINT64_MAX},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_limit(dir, "groups", cases[i].groups);
        if (obm__group_processors(groups, dir) != cases[i].processors) fail_msg("%s", cases[i].groups);
    }
    assert_true(obm__group_processors("/nowhere", "/nowhere") == UINT64_MAX);
    snprintf(command, sizeof command, "rm -r %s", dir);
    assert_int_equal(system(command), 0);
}

static void test_environment(void **unused) {
    (void)unused;
    char *isa = getenv("ONEBITMERGE_ISA"), *threads = getenv("ONEBITMERGE_THREADS");
    isa = isa ? strdup(isa) : NULL;
    threads = threads ? strdup(threads) : NULL;
    unsetenv("ONEBITMERGE_ISA");
    unsetenv("ONEBITMERGE_THREADS");
    expect_refused("ONEBITMERGE_ISA", "mmx", "available: scalar");
    expect_refused("ONEBITMERGE_THREADS", "0", "1 to");
    expect_refused("ONEBITMERGE_THREADS", "2x", "\"2x\"");
    expect_refused("ONEBITMERGE_THREADS", "99999999999999999999", "1 to");
    setenv("ONEBITMERGE_ISA", "scalar", 1);
    setenv("ONEBITMERGE_THREADS", "3", 1);
    obm_context *ctx = context(0);
    assert_string_equal(ctx->k->isa, "scalar");
    assert_int_equal(ctx->threads, 3);
    obm_context_free(ctx);
    ctx = context(2); /* the option wins */
    assert_int_equal(ctx->threads, 2);
    obm_context_free(ctx);
    unsetenv("ONEBITMERGE_ISA");
    unsetenv("ONEBITMERGE_THREADS");
    ctx = context(0);
    uint64_t quota = obm__group_processors("/proc/self/cgroup", "/sys/fs/cgroup");
    int cores = obm__topology_cores(ctx->topology);
    assert_int_equal(ctx->threads, quota < (uint64_t)cores ? (int)quota : cores);
    for (int i = 0; i < ctx->threads; i++) assert_int_equal(ctx->workers.at[i].cpu < 0, quota < (uint64_t)cores);
    obm_context_free(ctx);
    obm_context_options o = OBM_INIT(obm_context_options);
    obm_error err;
    o.threads = -1;
    assert_int_equal(obm_context_new(&o, &ctx, &err), OBM_E_ARG);
    if (isa) setenv("ONEBITMERGE_ISA", isa, 1);
    if (threads) setenv("ONEBITMERGE_THREADS", threads, 1);
    free(isa);
    free(threads);
}

/* ---- threads ---- */

typedef struct cover {
    _Atomic int *hits;
    size_t n, grain;
    int threads;
    _Atomic int bad, workers_seen[8];
} cover;

static void mark(void *arg, size_t begin, size_t end, int worker) {
    cover *c = arg;
    if (begin >= end || end > c->n || begin % c->grain || (end % c->grain && end != c->n)) c->bad = 1;
    if (worker < 0 || worker >= c->threads)
        c->bad = 1;
    else
        c->workers_seen[worker] = 1;
    for (size_t i = begin; i < end; i++) c->hits[i]++;
}

static void test_parallel(void **unused) {
    (void)unused;
    static const int counts[] = {1, 2, 5};
    static const size_t sizes[] = {0, 1, 2, 7, 64, 1000, 4097}, grains[] = {1, 3, 64, 5000};
    for (size_t t = 0; t < 3; t++) {
        obm_context *ctx = context(counts[t]);
        for (size_t s = 0; s < 7; s++)
            for (size_t g = 0; g < 4; g++) {
                _Atomic int *hits = calloc(sizes[s] + 1, sizeof *hits);
                cover c = {.hits = hits, .n = sizes[s], .grain = grains[g], .threads = counts[t]};
                obm__parallel(ctx, c.n, c.grain, mark, &c);
                assert_false(c.bad);
                for (size_t i = 0; i < c.n; i++) assert_int_equal(hits[i], 1);
                free((void *)hits);
            }
        obm_context_free(ctx);
    }
}

static void add_range(void *arg, size_t begin, size_t end, int worker) {
    (void)worker;
    size_t sum = 0;
    for (size_t i = begin; i < end; i++) sum += i;
    atomic_fetch_add((_Atomic size_t *)arg, sum);
}

/* Many small jobs, back to back and with pauses long enough for workers to park. */
static void test_parallel_often(void **unused) {
    (void)unused;
    obm_context *ctx = context(2);
    for (int i = 0; i < 3000; i++) {
        _Atomic size_t sum = 0;
        obm__parallel(ctx, 100, 1, add_range, (void *)&sum);
        assert_int_equal(sum, 4950);
        if (i % 300 == 0) usleep(2000);
    }
    obm_context_free(ctx);
}

/* Both workers must come in before either leaves, so this hangs if the pool never starts a second thread. */
static void meet(void *arg, size_t begin, size_t end, int worker) {
    (void)begin;
    (void)end;
    _Atomic int *seen = arg;
    seen[worker] = 1;
    while (!seen[0] || !seen[1]) usleep(100);
}
static void test_really_parallel(void **unused) {
    (void)unused;
    obm_context *ctx = context(2);
    _Atomic int seen[2] = {0, 0};
    obm__parallel(ctx, 2, 1, meet, (void *)seen);
    assert_true(seen[0] && seen[1]);
    obm_context_free(ctx);
}

/* Workers finish long after the caller: it must wait for them, spinning (2 threads on 2 cores) or parked (5). */
static void slow_mark(void *arg, size_t begin, size_t end, int worker) {
    _Atomic int *done = arg;
    usleep(worker ? 4000 : 500);
    for (size_t i = begin; i < end; i++) done[i] = 1;
}
static void test_waits_for_workers(void **unused) {
    (void)unused;
    for (int threads = 2; threads <= 5; threads += 3) {
        obm_context *ctx = context(threads);
        for (int i = 0; i < 10; i++) {
            _Atomic int done[8] = {0};
            obm__parallel(ctx, 8, 1, slow_mark, (void *)done);
            for (int j = 0; j < 8; j++) assert_int_equal(done[j], 1);
        }
        obm_context_free(ctx);
    }
}

/* Both meet; the one that is told to keeps the other waiting; each says how long it would spin. */
typedef struct pace {
    obm_context *ctx;
    int slow; /* worker; -1: none */
    _Atomic int seen[2], spins[2];
} pace;
static void keep_pace(void *arg, size_t begin, size_t end, int worker) {
    pace *p = arg;
    (void)begin;
    (void)end;
    p->spins[worker] = obm__pool_spins(p->ctx->pool, worker);
    p->seen[worker] = 1;
    while (!p->seen[0] || !p->seen[1]) usleep(1);
    if (worker == p->slow) usleep(3000);
}
static void run_paced(pace *p, int jobs) {
    for (int i = 0; i < jobs; i++) {
        p->seen[0] = p->seen[1] = 0;
        obm__parallel(p->ctx, 2, 1, keep_pace, p);
    }
}

/* A worker that waited in vain 64 times parks at once, and tries again later; the other goes on as before or not. */
static void test_spins_no_longer_in_vain(void **unused) {
    (void)unused;
    for (int slow = 0; slow < 2; slow++) {
        pace p = {.ctx = context(2), .slow = -1};
        run_paced(&p, 1);
        int spins = p.spins[1 - slow];
        if (obm__topology_cores(p.ctx->topology) < 2) assert_int_equal(spins, 0);
        else assert_true(spins > 0);
        p.slow = slow;
        run_paced(&p, 150); /* whenever the last judgement was: 64 waits of one kind, and 64 more */
        assert_int_equal(p.spins[1 - slow], 0);
        p.slow = -1;
        bool again = false;
        for (int i = 0; i < 1100; i++) {
            run_paced(&p, 1);
            again = again || p.spins[1 - slow];
        }
        assert_int_equal(again, spins > 0);
        obm_context_free(p.ctx);
    }
}

typedef struct nested {
    obm_context *ctx;
    _Atomic size_t sum;
    _Atomic int bad;
} nested;
static void outer(void *arg, size_t begin, size_t end, int worker) {
    nested *n = arg;
    (void)worker;
    for (size_t i = begin; i < end; i++) {
        _Atomic size_t sum = 0;
        obm__parallel(n->ctx, 50, 1, add_range, (void *)&sum);
        if (sum != 1225) n->bad = 1;
        n->sum += sum;
    }
}
static void test_nested(void **unused) {
    (void)unused;
    nested n = {.ctx = context(3)};
    obm__parallel(n.ctx, 40, 1, outer, &n);
    assert_int_equal(n.sum, 40 * 1225);
    assert_false(n.bad);
    obm_context_free(n.ctx);
}

static void *caller(void *arg) {
    nested *n = arg;
    for (int i = 0; i < 500; i++) {
        _Atomic size_t sum = 0;
        obm__parallel(n->ctx, 64, 1, add_range, (void *)&sum);
        if (sum != 2016) n->bad = 1;
    }
    return NULL;
}
/* Several threads share one context: whoever finds the pool busy works alone. */
static void test_shared_context(void **unused) {
    (void)unused;
    nested n = {.ctx = context(2)};
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) assert_int_equal(pthread_create(&threads[i], NULL, caller, &n), 0);
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    assert_false(n.bad);
    obm_context_free(n.ctx);
}

static void run_child(obm_context *ctx) {
    _Atomic size_t sum = 0;
    obm__parallel(ctx, 1000, 1, add_range, (void *)&sum);
    obm_context_free(ctx);
    _exit(sum == 499500 ? 0 : 1);
}

/* The parent's context in a child, its workers running before the fork and not.  Not while they start: that would leave
 * ASan's allocator locked in the child. */
static void test_fork(void **unused) {
    (void)unused;
    for (int started = 0; started < 2; started++) {
        obm_context *ctx = context(2);
        _Atomic int seen[2] = {0, 0};
        _Atomic size_t sum = 0;
        if (started) obm__parallel(ctx, 2, 1, meet, (void *)seen);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (!pid) run_child(ctx);
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        sum = 0;
        obm__parallel(ctx, 1000, 1, add_range, (void *)&sum);
        assert_int_equal(sum, 499500);
        obm_context_free(ctx);
    }
}

static void test_guard(void **unused) {
    (void)unused;
    obm__guard g = {0};
    obm_error err;
    assert_int_equal(obm__guard_enter(&g, "model", &err), OBM_OK);
    assert_int_equal(obm__guard_enter(&g, "model", &err), OBM_E_BUSY);
    assert_string_equal(err.message, "model is in use: one call at a time");
    assert_int_equal(obm__guard_enter(&g, "model", NULL), OBM_E_BUSY);
    obm__guard_leave(&g);
    assert_int_equal(obm__guard_enter(&g, "model", &err), OBM_OK);
    obm__guard_leave(&g);
}

/* A fixed order: 2^53 + 1 rounds back to 2^53, so that each grouping has its own sum. */
static void test_tree_sum(void **unused) {
    (void)unused;
    const double big = 9007199254740992.0, p[] = {big, 1, 1, 1, 1, -big, 1};
    assert_true(obm__tree_sum(p, 0) == 0);
    assert_true(obm__tree_sum(p, 1) == big);
    /* 7 = 3 + 4: big + (1 + 1), (1 + 1) + (-big + 1) */
    assert_true(obm__tree_sum(p, 7) == (big + 2) + (2 + (-big + 1)));
    assert_true(obm__tree_sum(p, 3) == big + 2);
    assert_true(obm__tree_sum(p, 4) == (big + 1) + 2);
}

/* ---- BLAS ---- */

static void test_blas_threads(void **unused) {
    (void)unused;
    int original = openblas_get_num_threads();
    openblas_set_num_threads(2);
    obm__blas_enter();
    assert_int_equal(openblas_get_num_threads(), 1);
    obm__blas_enter();
    obm__blas_leave();
    assert_int_equal(openblas_get_num_threads(), 1);
    obm__blas_leave();
    assert_int_equal(openblas_get_num_threads(), 2);
    double one = 1, c = 0;
    obm__dgemm(false, true, 1, 1, 1, 1, &one, 1, &one, 1, 0, &c, 1);
    assert_int_equal(openblas_get_num_threads(), 2);
    obm__blas_enter();
    openblas_set_num_threads(3); /* somebody else's wish survives */
    obm__blas_leave();
    assert_int_equal(openblas_get_num_threads(), 3);
    openblas_set_num_threads(original);
}

static void fill(double *x, size_t n, uint32_t seed) {
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525 + 1013904223;
        x[i] = (double)(int32_t)seed * 0x1p-31;
    }
}

static void check_dgemm(int64_t m, int64_t n, int64_t k, double alpha, double beta) {
    int64_t lda = k + 3, ldb = k + 1, ldc = n + 5;
    double *a = malloc((size_t)(m * lda) * 8), *b = malloc((size_t)(n * ldb) * 8), *c = malloc((size_t)(m * ldc) * 8);
    double *before = malloc((size_t)(m * ldc) * 8);
    fill(a, (size_t)(m * lda), 1);
    fill(b, (size_t)(n * ldb), 2);
    fill(c, (size_t)(m * ldc), 3);
    memcpy(before, c, (size_t)(m * ldc) * 8);
    obm__dgemm(false, true, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < ldc; j++) {
            double sum = 0;
            for (int64_t l = 0; j < n && l < k; l++) sum += a[i * lda + l] * b[j * ldb + l];
            double expected = j < n ? alpha * sum + beta * before[i * ldc + j] : before[i * ldc + j];
            if (fabs(c[i * ldc + j] - expected) > (j < n ? 1e-15 * (double)(k + 4) : 0))
                fail_msg("dgemm %lld %lld", (long long)i, (long long)j);
        }
    free(a);
    free(b);
    free(c);
    free(before);
}

/* A process of its own: the limit cannot be raised again, and what was possible once is remembered. */
static int blas_check_under_a_limit(void) {
    obm_error err;
    unsigned long pages = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (!f || fscanf(f, "%lu", &pages) != 1) return 1;
    fclose(f);
    rlim_t limit = pages * (rlim_t)sysconf(_SC_PAGESIZE) + ((rlim_t)400 << 20);
    if (setrlimit(RLIMIT_AS, &(struct rlimit){limit, limit})) return 2;
    if (obm__blas_check(4, &err) != OBM_E_NOMEM) return 3;
    if (!strstr(err.message, "OpenBLAS needs 576 MiB of address space for 4 threads")) return 4;
    if (obm__blas_check(2, &err) != OBM_OK) return 5;
    if (obm__blas_check(1, &err) != OBM_OK) return 6;
    return obm__blas_check(5, &err) == OBM_E_NOMEM && strstr(err.message, "432 MiB") ? 0 : 7;
}

static void test_blas_check(void **state) {
    (void)state;
    pid_t child = fork();
    assert_true(child >= 0);
    if (!child) _exit(blas_check_under_a_limit());
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

static void test_dgemm(void **unused) {
    (void)unused;
    check_dgemm(1, 1, 1, 1, 0);
    check_dgemm(3, 5, 7, 0.5, 2);
    check_dgemm(64, 128, 200, 1, 0);
    check_dgemm(65, 33, 129, -1, 1);
}

/* Panels of one product by several workers at once: the same bits as one after the other. */
typedef struct panels {
    const double *a, *b;
    double *c;
} panels;
enum { PANEL_ROWS = 128, PANELS = 16, TILE = 64, DEPTH = 192 };
static void panel_range(void *arg, size_t begin, size_t end, int worker) {
    panels *p = arg;
    (void)worker;
    for (size_t i = begin; i < end; i++)
        obm__dgemm(false, true, PANEL_ROWS, TILE, DEPTH, 1, p->a + i * PANEL_ROWS * DEPTH, DEPTH, p->b, DEPTH, 0,
                   p->c + i * PANEL_ROWS * TILE, TILE);
}
static void test_dgemm_concurrent(void **unused) {
    (void)unused;
    size_t na = (size_t)PANELS * PANEL_ROWS * DEPTH, nc = (size_t)PANELS * PANEL_ROWS * TILE;
    double *a = malloc(na * 8), *b = malloc(TILE * DEPTH * 8), *expected = malloc(nc * 8), *c = malloc(nc * 8);
    fill(a, na, 7);
    fill(b, TILE * DEPTH, 8);
    panels serial = {a, b, expected}, p = {a, b, c};
    panel_range(&serial, 0, PANELS, 0);
    obm_context *ctx = context(4);
    int before = openblas_get_num_threads();
    for (int i = 0; i < 30; i++) {
        memset(c, 0xff, nc * 8);
        obm__parallel(ctx, PANELS, 1, panel_range, &p);
        assert_memory_equal(c, expected, nc * 8);
    }
    assert_int_equal(openblas_get_num_threads(), before);
    obm_context_free(ctx);
    free(a);
    free(b);
    free(c);
    free(expected);
}

/* ---- topology, dtypes, classes ---- */

static void test_topology(void **unused) {
    (void)unused;
    char text[256];
    obm__topology *t = obm__topology_new();
    assert_non_null(t);
    int cores = obm__topology_cores(t);
    assert_true(cores >= 1 && cores <= sysconf(_SC_NPROCESSORS_CONF));
    assert_true(obm__topology_nodes(t) >= 1);
    assert_non_null(strstr(obm__topology_describe(t, text, sizeof text), "NUMA node"));
    obm__worker_place places[] = {{0, -1, 100}}; /* beyond the cores */
    obm__workers workers = {.numa = OBM_NUMA_OFF, .n = 1, .at = places};
    assert_int_not_equal(obm__topology_bind(t, &workers, 0), 0);
    assert_int_not_equal(obm__topology_bind(NULL, &workers, 0), 0);
    obm__topology_free(t);
    assert_int_equal(obm__topology_cores(NULL), 1);
    assert_int_equal(obm__topology_machine(NULL)->n_cores, 1);
    assert_string_equal(obm__topology_describe(NULL, text, sizeof text), "unknown");
    obm__topology_free(NULL);
}

static void test_dtypes(void **unused) {
    (void)unused;
    static const struct {
        obm_dtype dtype;
        const char *name;
        size_t size;
    } all[] = {
        {OBM_F32, "F32", 4}, {OBM_F16, "F16", 2},         {OBM_BF16, "BF16", 2},       {OBM_F64, "F64", 8},
        {OBM_U8, "U8", 1},   {OBM_I8, "I8", 1},           {OBM_I16, "I16", 2},         {OBM_I32, "I32", 4},
        {OBM_I64, "I64", 8}, {OBM_BOOL, "BOOL", 1},       {OBM_U16, "U16", 2},         {OBM_U32, "U32", 4},
        {OBM_U64, "U64", 8}, {OBM_F8_E4M3, "F8_E4M3", 1}, {OBM_F8_E5M2, "F8_E5M2", 1},
    };
    for (size_t i = 0; i < OBM_DTYPE_COUNT; i++) {
        assert_string_equal(obm_dtype_name(all[i].dtype), all[i].name);
        assert_int_equal(obm_dtype_size(all[i].dtype), all[i].size);
    }
    assert_int_equal(obm_dtype_size((obm_dtype)99), 0);
    assert_string_equal(obm_dtype_name((obm_dtype)-1), "UNKNOWN");
    obm_tensor t = {.ndim = 3, .shape = {2, 3, 4}};
    assert_int_equal(obm_tensor_count(&t), 24);
    t.ndim = 0;
    assert_int_equal(obm_tensor_count(&t), 1);
    t = (obm_tensor){.ndim = 2, .shape = {INT64_MAX, 2}};
    assert_int_equal(obm_tensor_count(&t), -1);
    t = (obm_tensor){.ndim = 3, .shape = {0, 5, 7}};
    assert_int_equal(obm_tensor_count(&t), 0);
    t = (obm_tensor){.ndim = 2, .shape = {3, -1}};
    assert_int_equal(obm_tensor_count(&t), -1);
    t.ndim = OBM_MAX_DIM + 1;
    assert_int_equal(obm_tensor_count(&t), -1);
}

static void expect_read(obm_dtype dtype, const void *data) {
    float out[2] = {0, 0};
    obm_tensor t = {.data = data, .dtype = dtype, .ndim = 1, .shape = {3}};
    obm_error err;
    assert_int_equal(obm_tensor_read_f32(&t, 1, 2, out, &err), OBM_OK);
    assert_true(out[0] == -2 && out[1] == 0.5f);
    out[0] = 9;
    assert_int_equal(obm_tensor_read_f32(&t, 2, 2, out, &err), OBM_E_ARG);
    assert_int_equal(obm_tensor_read_f32(&t, -1, 1, out, &err), OBM_E_ARG);
    assert_int_equal(obm_tensor_read_f32(&t, 1, INT64_MAX, out, &err), OBM_E_ARG);
    assert_true(out[0] == 9);
    assert_int_equal(obm_tensor_read_f32(&t, 3, 0, out, &err), OBM_OK);
}

static void test_read_f32(void **unused) {
    (void)unused;
    expect_read(OBM_F32, (float[]){1, -2, 0.5f});
    expect_read(OBM_F64, (double[]){1, -2, 0.5});
    expect_read(OBM_F16, (uint16_t[]){0x3c00, 0xc000, 0x3800});
    expect_read(OBM_BF16, (uint16_t[]){0x3f80, 0xc000, 0x3f00});
    obm_tensor t = {.data = "abc", .dtype = OBM_U8, .ndim = 1, .shape = {3}};
    float out;
    obm_error err;
    assert_int_equal(obm_tensor_read_f32(&t, 0, 1, &out, &err), OBM_E_DTYPE);
    assert_non_null(strstr(err.message, "U8"));
}

static void test_classes(void **unused) {
    (void)unused;
    static const struct {
        const char *name;
        int32_t ndim;
        obm_class cls;
    } cases[] = {
        {"model.embed_tokens.weight", 2, OBM_CLASS_EMBEDDING},
        {"lm_head.weight", 2, OBM_CLASS_HEAD},
        {"model.norm.weight", 1, OBM_CLASS_NORM},
        {"model.layers.0.input_layernorm.weight", 1, OBM_CLASS_NORM},
        {"model.layers.0.post_attention_layernorm.weight", 1, OBM_CLASS_NORM},
        {"model.layers.0.self_attn.q_norm.weight", 1, OBM_CLASS_NORM},
        {"model.layers.11.self_attn.q_proj.weight", 2, OBM_CLASS_ATTENTION},
        {"model.layers.11.self_attn.k_proj.weight", 2, OBM_CLASS_ATTENTION},
        {"model.layers.11.self_attn.v_proj.weight", 2, OBM_CLASS_ATTENTION},
        {"model.layers.11.self_attn.o_proj.weight", 2, OBM_CLASS_ATTENTION},
        {"model.layers.11.self_attn.qkv_proj.weight", 2, OBM_CLASS_ATTENTION},
        {"model.layers.11.self_attn.q_proj.bias", 1, OBM_CLASS_BIAS},
        {"model.layers.3.mlp.gate_proj.weight", 2, OBM_CLASS_MLP},
        {"model.layers.3.mlp.up_proj.weight", 2, OBM_CLASS_MLP},
        {"model.layers.3.mlp.down_proj.weight", 2, OBM_CLASS_MLP},
        {"model.layers.3.mlp.gate_up_proj.weight", 2, OBM_CLASS_MLP},
        {"model.layers.3.mlp.down_proj.bias", 1, OBM_CLASS_BIAS},
        {"a", 1, OBM_CLASS_NORM},
        {"model.layers.0.self_attn.rotary_emb.inv_freq", 1, OBM_CLASS_NORM},
        {"w", 2, OBM_CLASS_OTHER},
        {"", 2, OBM_CLASS_OTHER},
        {"q_proj.weight", 2, OBM_CLASS_ATTENTION},
        {"model.layers.0.mlp.gate.weight", 2, OBM_CLASS_OTHER},
        {"model.layers.0.mlp.experts.3.up_proj.weight", 2, OBM_CLASS_MLP},
        {"model.layers.0.block_sparse_moe.gate.weight", 2, OBM_CLASS_OTHER},
        {"model.layers.0.self_attn.q_proj.weight_scale", 2, OBM_CLASS_OTHER},
        {"model.layers.0.self_attn.q_proj.lora_A", 2, OBM_CLASS_OTHER},
        {"my.q_proj_2.weight", 2, OBM_CLASS_OTHER},
        {"transformer.h.0.attn.c_attn.weight", 2, OBM_CLASS_OTHER},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        if (obm_class_of(cases[i].name, cases[i].ndim) != cases[i].cls) fail_msg("%s", cases[i].name);
    assert_string_equal(obm_class_name(OBM_CLASS_MLP), "mlp");
    assert_string_equal(obm_class_name(OBM_CLASS_BIAS), "bias");
    assert_string_equal(obm_class_name(OBM_CLASS_OTHER), "other");
    assert_string_equal(obm_class_name((obm_class)OBM_CLASS_COUNT), "unknown");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_memory_of_workers),
        cmocka_unit_test(test_stacks),
        cmocka_unit_test(test_buffer),
        cmocka_unit_test(test_context),
        cmocka_unit_test(test_environment),
        cmocka_unit_test(test_memory_groups),
        cmocka_unit_test(test_processor_groups),
        cmocka_unit_test(test_parallel),
        cmocka_unit_test(test_parallel_often),
        cmocka_unit_test(test_really_parallel),
        cmocka_unit_test(test_waits_for_workers),
        cmocka_unit_test(test_spins_no_longer_in_vain),
        cmocka_unit_test(test_nested),
        cmocka_unit_test(test_shared_context),
        cmocka_unit_test(test_fork),
        cmocka_unit_test(test_guard),
        cmocka_unit_test(test_tree_sum),
        cmocka_unit_test(test_blas_threads),
        cmocka_unit_test(test_blas_check),
        cmocka_unit_test(test_dgemm),
        cmocka_unit_test(test_dgemm_concurrent),
        cmocka_unit_test(test_topology),
        cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_read_f32),
        cmocka_unit_test(test_classes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
