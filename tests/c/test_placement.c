/*
 * The placement planner on machines of synthetic descriptions and of XML files (tests/reference/make_topologies.py).
 * What is expected was counted by hand: n slabs of 64 rows, cut at the nearest slab to each node's share.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "model/placement.h"

#include <dirent.h>
#include <math.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define XML OBM_SOURCE_DIR "/tests/vectors/topologies/"

static obm_error err;

/* ---- machines ---- */

static obm__topology *read_machine(const char *text) {
    obm__topology *t = NULL;
    if (obm__topology_read(text, &t, &err) != OBM_OK) fail_msg("%s: %s", text, err.message);
    return t;
}

/* "memory GiB:cores ..." of the nodes, then " / " and the nodes of the cores, then " / " and their speeds unless all
 * are 100. */
static void check_machine(const char *text, const char *expected) {
    obm__topology *t = read_machine(text);
    const obm__machine *m = obm__topology_machine(t);
    char got[512];
    size_t n = 0;
    bool alike = true;
    for (int i = 0; i < m->n_nodes; i++)
        n += (size_t)snprintf(got + n, sizeof got - n, "%u=%llu:%d ", m->nodes[i].os,
                              (unsigned long long)(m->nodes[i].memory >> 30), m->nodes[i].cores);
    n += (size_t)snprintf(got + n, sizeof got - n, "/ ");
    for (int i = 0; i < m->n_cores; i++)
        n += (size_t)snprintf(got + n, sizeof got - n, "%u@%d ", m->cores[i].cpu, m->cores[i].node);
    for (int i = 0; i < m->n_cores; i++) alike &= m->cores[i].speed == 100;
    for (int i = 0; !alike && i < m->n_cores; i++)
        n += (size_t)snprintf(got + n, sizeof got - n, "%s%d ", i ? "" : "/ ", m->cores[i].speed);
    got[n - 1] = 0;
    assert_string_equal(got, expected);
    obm__topology_free(t);
}

static void machines(void **state) {
    (void)state;
    check_machine("numa:2(memory=2GiB) core:4 pu:2", "0=2:4 1=2:4 / 0@0 2@0 4@0 6@0 8@1 10@1 12@1 14@1");
    check_machine("numa:1(memory=8GiB) core:2 pu:1", "0=8:2 / 0@0 1@0");
    check_machine("numa:3(memory=1GiB) pu:2", "0=1:2 1=1:2 2=1:2 / 0@0 1@0 2@1 3@1 4@2 5@2"); /* no cores: its units */
    check_machine(XML "two-sockets.xml", "0=256:4 1=256:4 / 0@0 2@0 4@0 6@0 8@1 10@1 12@1 14@1");
    check_machine(XML "four-nodes.xml",
                  "0=64:3 1=64:3 2=64:3 3=64:3 / 0@0 1@0 2@0 3@1 4@1 5@1 6@2 7@2 8@2 9@3 10@3 11@3");
    check_machine(XML "uneven.xml", "0=256:4 1=256:2 / 0@0 2@0 4@0 6@0 8@1 10@1");
    check_machine(XML "memoryless.xml", "0=256:8 / 0@0 2@0 4@0 6@0 8@0 10@0 12@0 14@0");
    check_machine(XML "cxl.xml", "0=256:4 1=256:4 2=512:0 / 0@0 2@0 4@0 6@0 8@1 10@1 12@1 14@1");
    check_machine(XML "hbm.xml", "0=256:2 1=64:0 2=256:2 3=64:0 / 0@0 1@0 2@2 3@2");
    check_machine(XML "cpuset.xml", "0=256:2 1=256:1 / 3@0 6@0 8@1");
    check_machine(XML "mems.xml", "1=256:8 / 0@0 2@0 4@0 6@0 8@0 10@0 12@0 14@0");
    check_machine(XML "hybrid.xml", "0=32:4 1=32:4 / 0@0 1@0 2@0 3@0 4@1 5@1 6@1 7@1 / 100 100 50 50 50 50 50 50");
}

/* Of all threads, as taskset does to a program it begins: BLAS and sanitizers may have theirs already. */
static void bind_all(const cpu_set_t *set) {
    DIR *tasks = opendir("/proc/self/task");
    assert_non_null(tasks);
    for (struct dirent *e; (e = readdir(tasks));)
        if (e->d_name[0] != '.') assert_int_equal(sched_setaffinity(atoi(e->d_name), sizeof *set, set), 0);
    closedir(tasks);
}

/* Of this machine: the affinity that taskset or a batch system gave. */
static void affinity(void **state) {
    (void)state;
    cpu_set_t before, one;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    for (int cpu = 0, left = 4; cpu < CPU_SETSIZE && left; cpu++) {
        if (!CPU_ISSET(cpu, &before)) continue;
        left--;
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        bind_all(&one);
        obm__topology *t = obm__topology_new();
        bind_all(&before);
        assert_non_null(t);
        assert_int_equal(obm__topology_cores(t), 1);
        assert_int_equal(obm__topology_machine(t)->cores[0].cpu, cpu);
        obm__topology_free(t);
    }
}

static void refuse(const char *text, obm_status status, const char *message) {
    obm__topology *t = NULL;
    assert_int_equal(obm__topology_read(text, &t, &err), status);
    assert_null(t);
    if (!strstr(err.message, message)) fail_msg("%s", err.message);
}

static void no_machines(void **state) {
    (void)state;
    refuse("numa:2 core:x", OBM_E_ARG, "pu, the hardware threads of a core, comes last), found \"numa:2 core:x\"");
    refuse("", OBM_E_ARG, "topology: expected a file");
    refuse("/nowhere/machine.xml", OBM_E_IO, "cannot read /nowhere/machine.xml: No such file");
    refuse(OBM_SOURCE_DIR "/README.md", OBM_E_FORMAT, "README.md: expected a topology in hwloc's XML");
    refuse("numa:65 pu:1", OBM_E_UNSUPPORTED, "more than 64 NUMA nodes");
}

/* ---- workers ---- */

/* "MODE threads:" then cpu@node of each, "*" where any core will do. */
static void check_workers(const char *text, obm_numa numa, int threads, const char *expected) {
    obm__topology *t = read_machine(text);
    obm__workers w;
    char got[512];
    assert_int_equal(obm__workers_new(obm__topology_machine(t), numa, threads, &w, &err), OBM_OK);
    size_t n = (size_t)snprintf(got, sizeof got, "%s:", obm__numa_name(w.numa));
    for (int i = 0; i < w.n; i++)
        n += (size_t)(w.at[i].cpu < 0 ? snprintf(got + n, sizeof got - n, " *@%d", w.at[i].node)
                                      : snprintf(got + n, sizeof got - n, " %d@%d", w.at[i].cpu, w.at[i].node));
    assert_string_equal(got, expected);
    obm_free(w.at);
    obm__topology_free(t);
}

static void workers(void **state) {
    const char *two = XML "two-sockets.xml", *all = " 0@0 2@0 4@0 6@0 8@1 10@1 12@1 14@1";
    char text[128];
    (void)state;
    const obm_numa modes[] = {OBM_NUMA_AUTO, OBM_NUMA_SHARD, OBM_NUMA_REPLICATE, OBM_NUMA_INTERLEAVE, OBM_NUMA_OFF};
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        snprintf(text, sizeof text, "%s:%s", obm__numa_name(modes[i]), all);
        check_workers(two, modes[i], 0, text);
    }
    check_workers(two, OBM_NUMA_ISOLATE, 0, "isolate: 0@0 2@0 4@0 6@0");
    check_workers(two, OBM_NUMA_ISOLATE, 6, "isolate: 0@0 2@0 4@0 6@0 *@0 *@0");
    check_workers(two, OBM_NUMA_AUTO, 3, "isolate: 0@0 2@0 4@0"); /* one node has cores enough */
    check_workers(two, OBM_NUMA_AUTO, 5, "auto: 0@0 2@0 4@0 8@1 10@1");
    check_workers(two, OBM_NUMA_SHARD, 3, "shard: 0@0 2@0 8@1");
    check_workers(two, OBM_NUMA_SHARD, 1, "shard: 0@0");
    check_workers(two, OBM_NUMA_SHARD, 10, "shard: 0@0 2@0 4@0 6@0 *@0 8@1 10@1 12@1 14@1 *@1");
    check_workers(two, OBM_NUMA_OFF, 10, "off: 0@0 2@0 4@0 6@0 8@1 10@1 12@1 14@1 *@0 *@0");
    check_workers(XML "uneven.xml", OBM_NUMA_SHARD, 3, "shard: 0@0 2@0 8@1");
    check_workers(XML "hybrid.xml", OBM_NUMA_SHARD, 5, "shard: 0@0 1@0 2@0 4@1 5@1");
    check_workers(XML "memoryless.xml", OBM_NUMA_SHARD, 2, "off: 0@0 2@0");
    check_workers(XML "cxl.xml", OBM_NUMA_SHARD, 2, "shard: 0@0 8@1");
    check_workers(XML "cpuset.xml", OBM_NUMA_SHARD, 0, "shard: 3@0 6@0 8@1");
    check_workers(XML "mems.xml", OBM_NUMA_AUTO, 3, "off: 0@0 2@0 4@0");
    check_workers("numa:1 core:2 pu:2", OBM_NUMA_ISOLATE, 0, "off: 0@0 2@0");
}

/* The node with more cores is home, and worker 0 (the caller) is there, whatever its number. */
static void home(void **state) {
    (void)state;
    obm__core cores[] = {{0, 0, 100}, {1, 1, 100}, {2, 1, 100}};
    obm__machine m = {.n_nodes = 2, .n_cores = 3, .nodes = {{0, 1, 1, 100}, {1, 1, 2, 200}}, .cores = cores};
    obm__workers w;
    assert_int_equal(obm__workers_new(&m, OBM_NUMA_SHARD, 0, &w, &err), OBM_OK);
    assert_int_equal(w.home, 1);
    assert_int_equal(w.at[0].cpu, 1);
    assert_int_equal(w.at[1].cpu, 2);
    assert_int_equal(w.at[2].cpu, 0);
    obm_free(w.at);
    assert_int_equal(obm__workers_within(&m, OBM_NUMA_AUTO, 0), 0);
    assert_int_equal(obm__workers_within(&m, OBM_NUMA_SHARD, 3), 3);
    assert_int_equal(obm__workers_within(&m, OBM_NUMA_ISOLATE, 3), 2); /* all of the node */
    assert_int_equal(obm__workers_within(&m, OBM_NUMA_ISOLATE, 1), 1);
    /* only another node has memory at hand and cores: a mode of several nodes is one of one */
    m.nodes[0].cores = m.nodes[0].speed = 0;
    m.cores++, m.n_cores--;
    assert_int_equal(obm__workers_new(&m, OBM_NUMA_SHARD, 0, &w, &err), OBM_OK);
    assert_int_equal(w.numa, OBM_NUMA_ISOLATE);
    obm_free(w.at);
    assert_int_equal(obm__workers_new(&m, OBM_NUMA_AUTO, 0, &w, &err), OBM_OK);
    assert_int_equal(w.numa, OBM_NUMA_OFF);
    obm_free(w.at);
}

/* ---- plans ---- */

static obm__placed_shapes shapes_of(int64_t layers, int64_t hidden, int64_t wide, int64_t heads, int64_t kv_heads,
                                    int64_t vocab) {
    int64_t dim = hidden / heads;
    const int64_t size[OBM_KINDS][2] = {{hidden, hidden}, {kv_heads * dim, hidden}, {kv_heads * dim, hidden},
                                        {hidden, hidden}, {wide, hidden},           {wide, hidden},
                                        {hidden, wide},   {vocab, hidden}};
    obm__placed_shapes s = {
        .layers = layers, .heads = heads, .kv_heads = kv_heads, .head_dim = dim, .hidden = hidden, .kv_size = 4};
    for (int k = 0; k < OBM_KINDS; k++) {
        int64_t n = k == OBM_KIND_HEAD ? 1 : layers;
        s.kind[k] = (obm__placed_kind){size[k][0], size[k][1], n, (uint64_t)(n * size[k][1] * 2), 0};
    }
    return s;
}
/* 1.1 G parameters (TinyLlama): q and o 32 slabs, k and v 8 heads of one slab, gate and up 88, down 32, head 500. */
static obm__placed_shapes middle(void) { return shapes_of(22, 2048, 5632, 32, 8, 32000); }

static obm__placement plan_for(const char *text, obm_numa numa, int threads, const obm__placed_shapes *s) {
    obm__topology *t = read_machine(text);
    const obm__machine *m = obm__topology_machine(t);
    obm__workers w;
    obm__placement p;
    assert_int_equal(obm__workers_new(m, numa, threads, &w, &err), OBM_OK);
    obm__placement_plan(m, &w, numa, s, &p);
    obm_free(w.at);
    obm__topology_free(t);
    return p;
}

/* bounds: of q, k, gate and head, in slabs, for every node but the last. */
static void check_cut(const char *text, int nodes, const int64_t (*bounds)[4]) {
    const int kinds[] = {0, 1, 4, 7};
    obm__placed_shapes s = middle();
    obm__placement p = plan_for(text, OBM_NUMA_SHARD, 0, &s);
    assert_int_equal(p.numa, OBM_NUMA_SHARD);
    assert_int_equal(p.nodes, nodes);
    for (int k = 0; k < 4; k++) {
        const int64_t *rows = p.rows[kinds[k]];
        assert_int_equal(rows[0], 0);
        for (int i = 1; i < nodes; i++) assert_int_equal(rows[i], bounds[i - 1][k] * 64);
        assert_int_equal(rows[nodes], s.kind[kinds[k]].rows);
    }
    for (int i = 0; i <= nodes; i++) {
        assert_int_equal(p.heads[i] * 64, p.rows[1][i]); /* K and V with their heads */
        assert_memory_equal(p.rows[1], p.rows[2], sizeof p.rows[1]);
        assert_memory_equal(p.rows[0], p.rows[3], sizeof p.rows[0]);
        assert_memory_equal(p.rows[4], p.rows[5], sizeof p.rows[4]);
        assert_memory_equal(p.rows[0], p.rows[6], sizeof p.rows[0]);
    }
}

static void cuts(void **state) {
    (void)state;
    check_cut(XML "two-sockets.xml", 2, (const int64_t[][4]){{16, 4, 44, 250}});
    check_cut("numa:2 core:4 pu:2", 2, (const int64_t[][4]){{16, 4, 44, 250}});
    check_cut(XML "four-nodes.xml", 4, (const int64_t[][4]){{8, 2, 22, 125}, {16, 4, 44, 250}, {24, 6, 66, 375}});
    check_cut(XML "uneven.xml", 2, (const int64_t[][4]){{21, 5, 59, 333}}); /* 2/3: 21.3, 5.3, 58.7, 333.3 */
    check_cut(XML "hybrid.xml", 2, (const int64_t[][4]){{19, 5, 53, 300}}); /* 3/5: 19.2, 4.8, 52.8, 300 */
    check_cut(XML "cpuset.xml", 2, (const int64_t[][4]){{21, 5, 59, 333}}); /* 2 and 1 cores are 4 and 2 */
    check_cut(XML "cxl.xml", 3, (const int64_t[][4]){{16, 4, 44, 250}, {32, 8, 88, 500}});
    check_cut(XML "hbm.xml", 4, (const int64_t[][4]){{16, 4, 44, 250}, {16, 4, 44, 250}, {32, 8, 88, 500}});
    check_cut("numa:3 core:1 pu:1", 3,
              (const int64_t[][4]){{11, 3, 29, 167}, {21, 5, 59, 333}}); /* 10.7 2.7 29.3 166.7 */
}

/* Heads of 80 columns do not end at slabs: rows of K at the nearest one; 3 heads on 4 nodes leave one without. */
static void odd_heads(void **state) {
    (void)state;
    obm__placed_shapes s = shapes_of(2, 640, 100, 8, 3, 130);
    obm__placement p = plan_for("numa:2 core:1 pu:1", OBM_NUMA_SHARD, 0, &s);
    const int64_t heads[] = {0, 2, 3}, k[] = {0, 192, 240}, gate[] = {0, 64, 100}, head[] = {0, 128, 130};
    assert_memory_equal(p.heads, heads, sizeof heads);
    assert_memory_equal(p.rows[1], k, sizeof k); /* 160 is nearest to 128 and 192: upwards */
    assert_memory_equal(p.rows[4], gate, sizeof gate);
    assert_memory_equal(p.rows[7], head, sizeof head); /* 3 slabs: 1.5 goes up */
    p = plan_for("numa:4 core:1 pu:1", OBM_NUMA_SHARD, 0, &s);
    const int64_t heads4[] = {0, 1, 2, 2, 3}, k4[] = {0, 64, 192, 192, 240};
    assert_memory_equal(p.heads, heads4, sizeof heads4); /* 0.75, 1.5, 2.25, 3 */
    assert_memory_equal(p.rows[1], k4, sizeof k4);
}

static void worker_rows(void **state) {
    (void)state;
    obm__placed_shapes s = middle();
    obm__topology *t = read_machine(XML "hybrid.xml");
    obm__workers w;
    obm__placement p;
    assert_int_equal(obm__workers_new(obm__topology_machine(t), OBM_NUMA_SHARD, 0, &w, &err), OBM_OK);
    obm__placement_plan(obm__topology_machine(t), &w, OBM_NUMA_SHARD, &s, &p);
    /* 19 slabs of q for speeds 100 100 50 50: 6.3, 12.7, 15.8, 19; the other 13 for four equals: 3.25, 6.5, 9.75, 13 */
    const int64_t bounds[] = {0, 6, 13, 16, 19, 22, 26, 29, 32};
    for (int i = 0; i < 8; i++) {
        int64_t first, end;
        obm__placement_rows(&p, &w, i, 0, &first, &end);
        assert_int_equal(first, bounds[i] * 64);
        assert_int_equal(end, bounds[i + 1] * 64);
    }
    obm_free(w.at);
    obm__topology_free(t);
}

/* A node that lacks the memory takes what it has room for (9/10 of it), and the others the rest by their cores. */
static void little_memory(void **state) {
    (void)state;
    obm__placed_shapes s = middle();
    obm__core cores[] = {{0, 0, 100}, {1, 1, 100}, {2, 2, 100}};
    obm__machine m = {.n_nodes = 3, .n_cores = 3, .cores = cores};
    for (unsigned i = 0; i < 3; i++) m.nodes[i] = (obm__node){i, i ? (uint64_t)1 << 36 : 200000000, 1, 100};
    obm__workers w;
    obm__placement p;
    assert_int_equal(obm__workers_new(&m, OBM_NUMA_SHARD, 0, &w, &err), OBM_OK);
    obm__placement_plan(&m, &w, OBM_NUMA_SHARD, &s, &p);
    double bytes = obm__placement_bytes(&s);
    assert_true(fabs(p.share[0] - 0.9 * 2e8 / bytes) < 1e-12);
    assert_true(fabs(p.share[1] - (1 - p.share[0]) / 2) < 1e-12);
    assert_true(fabs(p.share[2] - p.share[1]) < 1e-12);
    assert_true(fabs((double)p.weight_bytes[0] - 1.8e8) < 0.02 * bytes);
    /* no room anywhere: by cores, the system has to find it */
    for (int i = 0; i < 3; i++) m.nodes[i].memory = 1000;
    obm__placement_plan(&m, &w, OBM_NUMA_SHARD, &s, &p);
    for (int i = 0; i < 3; i++) assert_true(fabs(p.share[i] - 1.0 / 3) < 1e-12);
    obm_free(w.at);
}

/* 16 cores read min(16 * 24, 204.8) = 204.8 GB/s. */
static void automatic(void **state) {
    (void)state;
    const char *big = "numa:2(memory=64GiB) core:16 pu:2";
    obm__placed_shapes small = shapes_of(30, 576, 1536, 9, 3, 49152), s = middle(),
                       large = shapes_of(32, 4096, 11008, 32, 32, 32000);
    /* 269 MB: 1.31 ms on one node; 0.66 ms, 0.228 ms of barriers and 0.124 ms of inputs on two: 1.3 times as fast */
    obm__placement p = plan_for(big, OBM_NUMA_AUTO, 0, &small);
    assert_int_equal(p.numa, OBM_NUMA_ISOLATE);
    assert_non_null(strstr(p.reason, "lose more to the exchange"));
    assert_int_equal(p.weight_bytes[1], 0);
    assert_int_equal(p.weight_bytes[0], (uint64_t)obm__placement_bytes(&small));
    assert_int_equal(p.heads[1], 3);
    /* 2.07 GB: 10.1 ms against 5.05 + 0.168 + 0.33: 1.8 times */
    assert_int_equal(plan_for(big, OBM_NUMA_AUTO, 0, &s).numa, OBM_NUMA_SHARD);
    assert_int_equal(plan_for(big, OBM_NUMA_AUTO, 0, &large).numa, OBM_NUMA_SHARD);
    assert_int_equal(plan_for(big, OBM_NUMA_AUTO, 16, &large).numa,
                     OBM_NUMA_ISOLATE); /* no more threads than a node's cores */
    p = plan_for("numa:2(memory=128MiB) core:16 pu:2", OBM_NUMA_AUTO, 0, &small);
    assert_int_equal(p.numa, OBM_NUMA_SHARD);
    assert_non_null(strstr(p.reason, "does not fit"));
    p = plan_for("numa:1 core:16 pu:1", OBM_NUMA_AUTO, 0, &large);
    assert_int_equal(p.numa, OBM_NUMA_OFF);
    assert_string_equal(p.reason, "one NUMA node");
    assert_int_equal(p.remote_weights[0] + p.remote_activations[0], 0);
}

/* On every kind of machine; a core reads 24 GB/s, so that middle() takes 86.2 ms / cores and small 11.2 ms / cores. */
static void automatic_machines(void **state) {
    (void)state;
    obm__placed_shapes small = shapes_of(30, 576, 1536, 9, 3, 49152), s = middle();
    const struct {
        const char *machine;
        const obm__placed_shapes *s;
        obm_numa numa;
    } rows[] = {
        {XML "two-sockets.xml", &s, OBM_NUMA_SHARD},     /* 21.5 ms; 10.8 + 0.5: 1.9 times as fast */
        {XML "two-sockets.xml", &small, OBM_NUMA_SHARD}, /* 2.80 ms; 1.40 + 0.35: 1.6 */
        {XML "four-nodes.xml", &s, OBM_NUMA_SHARD},      /* 28.7 ms; 7.2 + 0.5: 3.7 */
        {XML "uneven.xml", &s, OBM_NUMA_ISOLATE},        /* 21.5 ms; 14.4 + 0.5: 1.45 */
        {XML "cpuset.xml", &s, OBM_NUMA_ISOLATE},        /* 43.1 ms; 28.7 + 0.5: 1.48 */
        {XML "hybrid.xml", &s, OBM_NUMA_SHARD},          /* 21.5 ms; 3/5 of it 12.9 + 0.5: 1.6 */
        {XML "hybrid.xml", &small, OBM_NUMA_ISOLATE},    /* 2.80 ms; 1.68 + 0.35: 1.4 */
        {XML "cxl.xml", &s, OBM_NUMA_SHARD},             /* as two-sockets, and a node that gets nothing */
        {XML "hbm.xml", &s, OBM_NUMA_SHARD},
        {XML "memoryless.xml", &s, OBM_NUMA_OFF},
        {XML "mems.xml", &s, OBM_NUMA_OFF},
        {"numa:1 core:4 pu:2", &s, OBM_NUMA_OFF},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        obm__placement p = plan_for(rows[i].machine, OBM_NUMA_AUTO, 0, rows[i].s);
        if (p.numa != rows[i].numa) fail_msg("%s: %s", rows[i].machine, obm__numa_name(p.numa));
        for (int node = 0; node < p.nodes; node++) {
            bool empty = p.numa == OBM_NUMA_SHARD ? p.share[node] == 0 : node != p.home;
            assert_int_equal(p.weight_bytes[node] == 0, empty);
        }
    }
}

static double sum(const double *x, int n) {
    double all = 0;
    for (int i = 0; i < n; i++) all += x[i];
    return all;
}

static void remote(void **state) {
    (void)state;
    const char *two = XML "two-sockets.xml";
    obm__placed_shapes s = middle();
    double bytes = obm__placement_bytes(&s), kv = 22 * 2 * 8 * 64 * 4;
    /* parameters of the matrices, counted once more: 2 (q, o) + 2 * 1/4 (k, v) of 2048^2, three of 2048 * 5632, and the
     * head */
    assert_true(bytes == 2.0 * (22 * (2.5 * 2048 * 2048 + 3.0 * 2048 * 5632) + 32000.0 * 2048));
    obm__placement p = plan_for(two, OBM_NUMA_SHARD, 0, &s);
    assert_true(sum(p.remote_weights, 2) == 0);
    assert_true(p.remote_activations[0] == 0);
    /* inputs: hidden for qkv, o, gate/up and head, 5632 for down; half the results; half the heads' q and output; half
     * of k, v */
    double inputs = 4.0 * (22 * (3 * 2048 + 5632) + 2048),
           results = 4.0 * (22 * (2048 + 2 * 512 + 2048 + 2 * 5632 + 2048) + 32000);
    assert_true(fabs(p.remote_activations[1] - (inputs + (results + 2 * 4.0 * 22 * 2048 + kv) / 2)) < 1);
    assert_int_equal(p.kv_bytes[0], (uint64_t)kv / 2);
    assert_true(p.weight_bytes[0] + p.weight_bytes[1] == (uint64_t)bytes);
    p = plan_for(two, OBM_NUMA_REPLICATE, 0, &s);
    assert_true(sum(p.remote_weights, 2) == 0);
    assert_true(p.weight_bytes[0] == (uint64_t)bytes && p.weight_bytes[1] == (uint64_t)bytes);
    p = plan_for(two, OBM_NUMA_INTERLEAVE, 0, &s);
    assert_true(fabs(sum(p.remote_weights, 2) - bytes / 2) < 1);
    p = plan_for(XML "four-nodes.xml", OBM_NUMA_INTERLEAVE, 0, &s);
    assert_true(fabs(sum(p.remote_weights, 4) - bytes * 3 / 4) < 1);
    p = plan_for(XML "uneven.xml", OBM_NUMA_OFF, 0, &s); /* all counted at home, a third of the workers elsewhere */
    assert_true(fabs(sum(p.remote_weights, 2) - bytes / 3) < 1);
    p = plan_for(two, OBM_NUMA_ISOLATE, 0, &s);
    assert_true(sum(p.remote_weights, 2) + sum(p.remote_activations, 2) == 0);
}

/* Two of four nodes have a worker: the others hold nothing. */
static void replicas(void **state) {
    (void)state;
    const char *const names[OBM_KINDS] = {"a", "b", "c", "d", "e", "f", "g", "h"};
    obm__placed_shapes s = middle();
    obm__topology *t = read_machine("numa:4 core:1 pu:1");
    const obm__machine *m = obm__topology_machine(t);
    obm__workers w;
    obm__placement p;
    assert_int_equal(obm__workers_new(m, OBM_NUMA_REPLICATE, 2, &w, &err), OBM_OK);
    obm__placement_plan(m, &w, OBM_NUMA_REPLICATE, &s, &p);
    const int64_t heads[] = {0, 4, 8, 8, 8};
    assert_memory_equal(p.heads, heads, sizeof heads);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(p.weight_bytes[i], i < 2 ? (uint64_t)obm__placement_bytes(&s) : 0);
        assert_int_equal(p.kv_bytes[i], i < 2 ? 22 * 2 * 4 * 64 * 4 : 0);
    }
    char *json = obm__placement_json(&p, m, &w, &s, names), expected[64];
    assert_non_null(json);
    for (int k = 0; k < OBM_KINDS; k++) {
        int rows = (int)s.kind[k].rows;
        snprintf(expected, sizeof expected, "\"nodes\": [[0, %d], [0, %d], [0, 0], [0, 0]], \"w", rows, rows);
        assert_non_null(strstr(strstr(json, names[k]), expected));
    }
    assert_non_null(strstr(json, "\"kv_heads\": [0, 4]"));
    assert_non_null(strstr(json, "\"kv_heads\": [4, 8]"));
    obm_free(json);
    obm_free(w.at);
    obm__topology_free(t);
}

static void planes(void **state) {
    (void)state;
    obm__placed_shapes s = middle();
    for (int k = 0; k < 7; k++) s.kind[k].plane_bytes = (uint64_t)(22 * s.kind[k].cols / 8 * 3);
    obm__placement p = plan_for(XML "uneven.xml", OBM_NUMA_SHARD, 0, &s);
    uint64_t q = (uint64_t)22 * 2048 / 8 * 3; /* of a row with 2048 columns, in three planes; a row of down has 5632 */
    assert_int_equal(p.plane_bytes[0], 64 * (21 + 5 + 5 + 21 + 59 + 59) * q + 64 * 21 * (q * 5632 / 2048));
}

/* Bounds rise, cover everything and are slabs, whatever the shares. */
static void any_shares(void **state) {
    (void)state;
    unsigned seed = 7;
    for (int round = 0; round < 2000; round++) {
        double share[OBM_NODES], all = 0;
        int64_t at[OBM_NODES + 1];
        int nodes = 1 + rand_r(&seed) % OBM_NODES;
        for (int i = 0; i < nodes; i++) all += share[i] = rand_r(&seed) % 4;
        if (all == 0) all = share[0] = 1;
        for (int i = 0; i < nodes; i++) share[i] /= all;
        int64_t n = rand_r(&seed) % 2000;
        obm__placement_cut(n, share, nodes, at);
        assert_int_equal(at[0], 0);
        assert_int_equal(at[nodes], n);
        double before = 0;
        for (int i = 0; i < nodes; i++) {
            assert_true(at[i + 1] >= at[i]);
            if (share[i] == 0) assert_int_equal(at[i + 1], at[i]);
            assert_true(fabs((double)at[i] - (double)n * before) <= 0.5 + 1e-6);
            before += share[i];
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(machines),
                                       cmocka_unit_test(affinity),
                                       cmocka_unit_test(no_machines),
                                       cmocka_unit_test(workers),
                                       cmocka_unit_test(home),
                                       cmocka_unit_test(cuts),
                                       cmocka_unit_test(odd_heads),
                                       cmocka_unit_test(worker_rows),
                                       cmocka_unit_test(little_memory),
                                       cmocka_unit_test(automatic),
                                       cmocka_unit_test(automatic_machines),
                                       cmocka_unit_test(remote),
                                       cmocka_unit_test(replicas),
                                       cmocka_unit_test(planes),
                                       cmocka_unit_test(any_shares)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
