/* The context: kernels, topology and threads, chosen once.  The environment is read here and nowhere else. */
#include "sys.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_THREADS 4096

/* "scalar,avx2" */
static void list_isas(char *buf, size_t size) {
    size_t used = 0;
    buf[0] = 0;
    for (const obm_kernels *const *k = obm_kernels_list(); *k && used < size; k++)
        used += (size_t)snprintf(buf + used, size - used, "%s%s", used ? "," : "", (*k)->isa);
}

static obm_status choose_kernels(obm_context *ctx, obm_error *err) {
    const char *wanted = getenv("ONEBITMERGE_ISA");
    list_isas(ctx->available, sizeof ctx->available);
    if (wanted && *wanted) {
        ctx->k = obm_kernels_find(wanted);
        if (ctx->k) return OBM_OK;
        return obm__fail(err, OBM_E_ARG, "ONEBITMERGE_ISA: \"%.64s\" is not available here (available: %s)", wanted,
                         ctx->available);
    }
    for (const obm_kernels *const *k = obm_kernels_list(); *k; k++) ctx->k = *k;
    return OBM_OK;
}

obm_status obm__threads_check(int64_t wanted, obm_error *err) {
    if (wanted >= 0 && wanted <= MAX_THREADS) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "threads: expected 0 (one per core) to %d, found %lld", MAX_THREADS,
                     (long long)wanted);
}

obm_status obm__numa_check(obm_numa wanted, obm_error *err) {
    if ((unsigned)wanted <= OBM_NUMA_OFF) return OBM_OK;
    return obm__fail(err, OBM_E_ARG, "numa: expected 0 (auto) to %d (off), found %d", OBM_NUMA_OFF, (int)wanted);
}

static obm_status choose_threads(int64_t wanted, int *threads, obm_error *err) {
    OBM_TRY(obm__threads_check(wanted, err));
    const char *text = getenv("ONEBITMERGE_THREADS");
    if (!wanted && text && *text) {
        char *end;
        errno = 0;
        long value = strtol(text, &end, 10);
        if (errno || *end || value < 1 || value > MAX_THREADS)
            return obm__fail(err, OBM_E_ARG, "ONEBITMERGE_THREADS: expected 1 to %d, found \"%.64s\"", MAX_THREADS,
                             text);
        wanted = value;
    }
    *threads = (int)wanted;
    return OBM_OK;
}

/* The option, else the environment, else auto. */
static obm_status choose_numa(obm_numa wanted, obm_numa *out, obm_error *err) {
    const char *text = getenv("ONEBITMERGE_NUMA");
    *out = wanted;
    OBM_TRY(obm__numa_check(wanted, err));
    if (wanted != OBM_NUMA_AUTO || !text || !*text) return OBM_OK;
    if (obm_numa_find(text, out, NULL) == OBM_OK) return OBM_OK;
    return obm__fail(err, OBM_E_ARG,
                     "ONEBITMERGE_NUMA: expected auto, shard, replicate, isolate, interleave or off, found \"%.64s\"",
                     text);
}

#define GROUP_PATH ((size_t)4352) /* a path and what stands before it */

/* Up to two numbers: how many were there.  "max" and negative ones are no limits, and no numbers here. */
static int read_numbers(const char *folder, const char *name, uint64_t n[2]) {
    char path[2 * GROUP_PATH];
    long long values[2] = {-1, -1};
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "re");
    int found = f ? fscanf(f, "%lld %lld", &values[0], &values[1]) : 0;
    if (f) fclose(f);
    for (int i = 0; i < found; i++) {
        if (values[i] < 0) return i;
        n[i] = (uint64_t)values[i];
    }
    return found < 0 ? 0 : found;
}

static uint64_t memory_one(const char *folder) {
    uint64_t n[2];
    return read_numbers(folder, "memory.limit_in_bytes", n) ? n[0] : UINT64_MAX;
}

static uint64_t memory_two(const char *folder) {
    uint64_t n[2];
    return read_numbers(folder, "memory.max", n) ? n[0] : UINT64_MAX;
}

/* Whole processors; of less than one, one. */
static uint64_t processors(uint64_t quota, uint64_t period) { return quota / period ? quota / period : 1; }

static uint64_t quota_one(const char *folder) {
    uint64_t quota[2], period[2];
    bool limited = read_numbers(folder, "cpu.cfs_quota_us", quota) && read_numbers(folder, "cpu.cfs_period_us", period);
    return limited && period[0] ? processors(quota[0], period[0]) : UINT64_MAX;
}

static uint64_t quota_two(const char *folder) {
    uint64_t n[2];
    return read_numbers(folder, "cpu.max", n) == 2 && n[1] ? processors(n[0], n[1]) : UINT64_MAX;
}

/* What groups limit, and how versions 1 and 2 say so. */
typedef struct controller {
    const char *name;
    uint64_t (*one)(const char *folder), (*two)(const char *folder);
} controller;

/* From the group up to the root.  Inside a container the path may be the host's, of which only the root is there. */
static uint64_t limit_upwards(const char *root, const char *group, uint64_t (*read)(const char *)) {
    char path[GROUP_PATH];
    uint64_t least = UINT64_MAX;
    size_t root_length = strlen(root);
    if ((size_t)snprintf(path, sizeof path, "%s%s", root, group) >= sizeof path) path[root_length] = 0;
    for (size_t length = strlen(path);; path[length] = 0) {
        uint64_t limit = read(path);
        if (limit < least) least = limit;
        if (length <= root_length) return least;
        while (length > root_length && path[length - 1] != '/') length--;
        if (length > root_length) length--;
    }
}

/* Lines of number:controllers:path; version 2 has no controllers in the middle. */
static uint64_t least_limit(const char *groups, const char *mount, const controller *what) {
    char line[GROUP_PATH], own[GROUP_PATH];
    snprintf(own, sizeof own, "%s/%s", mount, what->name);
    uint64_t one = limit_upwards(own, "", what->one), two = limit_upwards(mount, "", what->two);
    uint64_t least = one < two ? one : two;
    FILE *f = fopen(groups, "re");
    while (f && fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path) continue;
        *path = 0;
        bool is_it = false;
        for (char *rest = controllers + 1, *c; (c = strsep(&rest, ","));) is_it |= !strcmp(c, what->name);
        uint64_t limit = UINT64_MAX;
        if (is_it) limit = limit_upwards(own, path + 1, what->one);
        if (!controllers[1]) limit = limit_upwards(mount, path + 1, what->two);
        if (limit < least) least = limit;
    }
    if (f) fclose(f);
    return least;
}

#define GROUPS "/proc/self/cgroup"
#define GROUPS_MOUNT "/sys/fs/cgroup"

uint64_t obm__group_limit(const char *groups, const char *mount) {
    return least_limit(groups, mount, &(controller){"memory", memory_one, memory_two});
}

uint64_t obm__group_processors(const char *groups, const char *mount) {
    return least_limit(groups, mount, &(controller){"cpu", quota_one, quota_two});
}

uint64_t obm__memory_limit(void) { return obm__group_limit(GROUPS, GROUPS_MOUNT); }

/* More threads than a container's quota of processor time would all be stopped together for the rest of each period.
 * Which cores are free for that time is the system's to know: other containers count from the first core too. */
static void keep_quota(obm_context *ctx) {
    uint64_t most = obm__group_processors(GROUPS, GROUPS_MOUNT);
    if (most < (uint64_t)obm__topology_cores(ctx->topology)) ctx->quota = (int)most;
}

static obm_status choose_workers(obm_context *ctx, int64_t wanted_threads, obm_numa wanted, obm_error *err) {
    int threads = 0;
    OBM_TRY(choose_threads(wanted_threads, &threads, err));
    OBM_TRY(choose_numa(wanted, &ctx->numa, err));
    keep_quota(ctx);
    const obm__machine *machine = obm__topology_machine(ctx->topology);
    if (!threads) threads = obm__workers_within(machine, ctx->numa, ctx->quota);
    OBM_TRY(obm__workers_new(machine, ctx->numa, threads, &ctx->workers, err));
    ctx->threads = ctx->workers.n;
    for (int i = 0; ctx->quota && i < ctx->threads; i++) ctx->workers.at[i].cpu = -1;
    return OBM_OK;
}

#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#else
#define COMPILER "gcc " __VERSION__
#endif

static void fill_info(obm_context *ctx) {
    ctx->info = (obm_context_info){
        .isa = ctx->k->isa,
        .isa_available = ctx->available,
        .blas = obm__blas_describe(ctx->blas, sizeof ctx->blas),
        .topology = obm__topology_describe(ctx->topology, ctx->topology_text, sizeof ctx->topology_text),
        .compiler = COMPILER,
        .threads = ctx->threads,
        .cores = obm__topology_cores(ctx->topology),
        .nodes = obm__topology_nodes(ctx->topology),
        .prefill_bf16 = obm_kernels_pairs_gain(ctx->k),
        .z12_auto = obm_kernels_z12_gains(ctx->k),
    };
}

obm_status obm_context_new(const obm_context_options *options, obm_context **out, obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_context_options, options, err));
    obm_context *ctx = obm__calloc(1, sizeof *ctx);
    if (!ctx) return obm__fail_nomem(err, sizeof *ctx);
    obm_status status;
    ctx->log = OBM_OPT(options, obm_context_options, log, NULL);
    ctx->log_user = OBM_OPT(options, obm_context_options, log_user, NULL);
    ctx->resolve = OBM_OPT(options, obm_context_options, resolve, NULL);
    ctx->resolve_user = OBM_OPT(options, obm_context_options, resolve_user, NULL);
    ctx->interrupt = OBM_OPT(options, obm_context_options, interrupt, NULL);
    ctx->interrupt_user = OBM_OPT(options, obm_context_options, interrupt_user, NULL);
    OBM_GO(choose_kernels(ctx, err));
    ctx->topology = obm__topology_new();
    if (!ctx->topology) obm__warn(ctx, "the machine's cores and nodes cannot be read: one thread is used");
    OBM_GO(choose_workers(ctx, OBM_OPT(options, obm_context_options, threads, 0),
                          OBM_OPT(options, obm_context_options, numa, OBM_NUMA_AUTO), err));
    ctx->pool = obm__pool_new(ctx->topology, &ctx->workers);
    if (!ctx->pool) OBM_GO(obm__fail_nomem(err, (uint64_t)ctx->threads * 64));
    fill_info(ctx);
    *out = ctx;
    return OBM_OK;
done:
    obm_context_free(ctx);
    return status;
}

void obm_context_free(obm_context *ctx) {
    if (!ctx) return;
    obm__pool_free(ctx->pool);
    obm__desks_clear(ctx);
    obm__topology_free(ctx->topology);
    obm_free(ctx->workers.at);
    obm_free(ctx);
}

/* MemAvailable counts what the kernel can take back from its caches, which sysinfo() does not. */
static void read_memory(uint64_t *total, uint64_t *available) {
    *total = *available = 0;
    FILE *f = fopen("/proc/meminfo", "re");
    if (!f) return;
    char line[128];
    unsigned long long kib;
    while (fgets(line, sizeof line, f)) {
        if (sscanf(line, "MemTotal: %llu", &kib) == 1) *total = kib * 1024;
        if (sscanf(line, "MemAvailable: %llu", &kib) == 1) *available = kib * 1024;
    }
    fclose(f);
}

void obm_context_describe(const obm_context *ctx, obm_context_info *out) {
    *out = ctx->info;
    read_memory(&out->memory_total, &out->memory_free);
}

void obm__warn(const obm_context *ctx, const char *format, ...) {
    if (!ctx || !ctx->log) return;
    char message[OBM_ERROR_MESSAGE];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    ctx->log(ctx->log_user, message);
}
