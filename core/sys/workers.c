/* Which core a worker has and which node it belongs to: a pure function of machine, mode and number.  It binds nothing.
 */
#include "sys.h"

#include <string.h>

static const char *const modes[] = {"auto", "shard", "replicate", "isolate", "interleave", "off"};
#define MODES ((int)(sizeof modes / sizeof *modes))

const char *obm__numa_name(obm_numa numa) { return modes[numa]; }

obm_status obm_numa_find(const char *name, obm_numa *out, obm_error *err) {
    for (int i = 0; i < MODES; i++) {
        if (strcmp(name, modes[i])) continue;
        *out = (obm_numa)i;
        return OBM_OK;
    }
    return obm__fail(err, OBM_E_ARG,
                     "numa: expected auto, shard, replicate, isolate, interleave or off, found \"%.64s\"", name);
}

/* Of the fastest cores together; the first of equals. */
static int best_node(const obm__machine *m) {
    int best = 0;
    for (int i = 1; i < m->n_nodes; i++)
        if (m->nodes[i].speed > m->nodes[best].speed) best = i;
    return best;
}

static int nodes_with_cores(const obm__machine *m) {
    int n = 0;
    for (int i = 0; i < m->n_nodes; i++) n += m->nodes[i].cores > 0;
    return n;
}

/* Auto with no more workers than one node has cores keeps to that node; whether a model is small enough to leave the
 * others out is known when it is opened.  Where there is nothing to choose between, nothing is done. */
static obm_numa settle(const obm__machine *m, obm_numa wanted, int threads, int home) {
    if (wanted == OBM_NUMA_OFF || m->n_nodes == 1) return OBM_NUMA_OFF;
    bool spread = nodes_with_cores(m) > 1;
    if (wanted == OBM_NUMA_AUTO && !spread)
        return OBM_NUMA_OFF; /* memory that no core has at hand: the system spills */
    if (wanted == OBM_NUMA_AUTO && threads && threads <= m->nodes[home].cores) return OBM_NUMA_ISOLATE;
    if (wanted == OBM_NUMA_AUTO || wanted == OBM_NUMA_SHARD || wanted == OBM_NUMA_REPLICATE)
        return spread ? wanted : OBM_NUMA_ISOLATE;
    return wanted;
}

/* Cores of a node that get a worker: as many as its part of all speed, the best node first where it does not come out
 * even. */
static void share_workers(const obm__machine *m, int threads, int home, int *count) {
    int left = threads, total = 0;
    for (int i = 0; i < m->n_nodes; i++) total += m->nodes[i].speed;
    for (int i = 0; i < m->n_nodes; i++) {
        count[i] = (int)((int64_t)threads * m->nodes[i].speed / total);
        if (count[i] > m->nodes[i].cores && threads <= m->n_cores) count[i] = m->nodes[i].cores;
        left -= count[i];
    }
    for (int i = home, any = m->n_nodes; left > 0; i = (i + 1) % m->n_nodes) {
        bool room = m->nodes[i].cores && (count[i] < m->nodes[i].cores || threads > m->n_cores);
        if (room)
            count[i]++, left--, any = m->n_nodes;
        else if (!--any)
            break;
    }
}

/* The next `count` workers on cores of the node; those beyond its cores may run on any of them. */
static void take_cores(const obm__machine *m, int node, int count, obm__workers *w) {
    for (int c = 0; c < m->n_cores && count > 0; c++) {
        if (m->cores[c].node != node) continue;
        w->at[w->n++] = (obm__worker_place){node, (int)m->cores[c].cpu, m->cores[c].speed};
        count--;
    }
    for (; count > 0; count--) w->at[w->n++] = (obm__worker_place){node, -1, 100};
}

/* As they come: worker i on core i, those beyond the cores anywhere. */
static void take_all(const obm__machine *m, int threads, obm__workers *w) {
    for (int i = 0; i < threads; i++)
        w->at[w->n++] = i < m->n_cores ? (obm__worker_place){m->cores[i].node, (int)m->cores[i].cpu, m->cores[i].speed}
                                       : (obm__worker_place){0, -1, 100};
}

int obm__workers_within(const obm__machine *m, obm_numa wanted, int quota) {
    int cores = m->nodes[best_node(m)].cores;
    return wanted == OBM_NUMA_ISOLATE && cores < quota ? cores : quota;
}

obm_status obm__workers_new(const obm__machine *m, obm_numa wanted, int threads, obm__workers *out, obm_error *err) {
    int count[OBM_NODES] = {0}, home = best_node(m);
    obm_numa numa = settle(m, wanted, threads, home);
    if (!threads) threads = numa == OBM_NUMA_ISOLATE ? m->nodes[home].cores : m->n_cores;
    *out = (obm__workers){.numa = numa, .home = home, .at = obm__calloc((size_t)threads, sizeof *out->at)};
    if (!out->at) return obm__fail_nomem(err, (uint64_t)threads * sizeof *out->at);
    if (numa == OBM_NUMA_OFF) {
        take_all(m, threads, out);
        return OBM_OK;
    }
    if (numa == OBM_NUMA_ISOLATE)
        count[home] = threads;
    else
        share_workers(m, threads, home, count);
    take_cores(m, home, count[home], out); /* the caller is worker 0: at home, where everybody's buffers are */
    for (int i = 0; i < m->n_nodes; i++)
        if (i != home) take_cores(m, i, count[i], out);
    return OBM_OK;
}

int obm__workers_count(const obm__workers *w, int node) {
    int n = 0;
    for (int i = 0; i < w->n; i++) n += w->at[i].node == node;
    return n;
}
