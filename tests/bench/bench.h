/* What the benchmarks share: the clock, medians, the command line, and the lines that say where a number comes from. */
#ifndef OBM_BENCH_H
#define OBM_BENCH_H

#include "onebitmerge.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static inline double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static inline double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, ascending);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

static inline void print_processor(void) {
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "model name", 10) && strchr(line, ':')) {
            printf("machine   %s", strchr(line, ':') + 2);
            break;
        }
    if (f) fclose(f);
}

/* Machine, build, ISA, threads and load: what belongs above figures. */
static inline void print_head(obm_context *ctx) {
    obm_context_info info;
    double load[3] = {0};
    obm_context_describe(ctx, &info);
    if (getloadavg(load, 3) < 1) load[0] = -1;
    print_processor();
    printf("topology  %s\nbuild     onebitmerge %s, %s, %s\nisa       %s\nthreads   %d, load before %.1f\n",
           info.topology, obm_version(), info.compiler, info.blas, info.isa, info.threads, load[0]);
}

static inline long number(int argc, char **argv, const char *name, long dflt) {
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], name)) return strtol(argv[i + 1], NULL, 10);
    return dflt;
}
static inline const char *text(int argc, char **argv, const char *name, const char *dflt) {
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], name)) return argv[i + 1];
    return dflt;
}

#endif
