/* The placement plan, and whether several nodes are worth their traffic.  It touches no memory and no thread. */
#include "placement.h"

#include <math.h>
#include <string.h>

/* ---- the cost of one token ---- */

/*
 * Time of a token = bytes of the slowest node / its bandwidth + what the nodes have to exchange.  None of this was
 * measured on a machine with several sockets; the sources are:
 *   - one core reads 24 GB/s (measured, one thread of a Zen 3); a node reads no more than the 204.8 GB/s of eight
 *     channels of DDR4-3200 (8 x 3200 MT/s x 8 bytes);
 *   - a barrier over sockets costs about 1.5 us more than one inside a socket: two transfers of a cache line each way
 *     at 130-200 ns, in a tree of two levels; five barriers a layer, two behind the last;
 *   - the other nodes read the input of each product once: a line in flight takes 200 ns, and a core keeps about ten
 *     in flight.
 * Published results of sharding over sockets are 1.4 to 2.1 times one socket for models that are large (ktransformers
 * V0.2: 1.40; llama.cpp pull requests 1556: 1.76, 14969: 1.65, 14232: 1.55), and 0.21 times for a small one (vLLM over
 * QPI).  A wrong "shard" loses more than a wrong "isolate", so the model must promise half as much again.
 */
#define CORE_BANDWIDTH 24e9
#define NODE_BANDWIDTH 204.8e9
#define BARRIER_SECONDS 1.5e-6
#define BARRIERS_PER_LAYER 5
#define LINE_SECONDS 20e-9
#define WORTH 1.5
/* Of a node's memory: the rest is the system's and everybody else's. */
#define MEMORY_SHARE 0.9

static double kind_bytes(const obm__placed_kind *k) {
    return (double)k->rows * (double)(k->weight_bytes + k->plane_bytes);
}

double obm__placement_bytes(const obm__placed_shapes *s) {
    double bytes = 0;
    for (int k = 0; k < OBM_KINDS; k++) bytes += kind_bytes(&s->kind[k]);
    return bytes;
}

static double node_bandwidth(const obm__workers *w, int node) {
    return fmin(CORE_BANDWIDTH * obm__workers_count(w, node), NODE_BANDWIDTH);
}

/* Inputs of the products of a token, each once: q, k and v share one, and so do gate and up. */
static double input_floats(const obm__placed_shapes *s) {
    double layer =
        (double)s->kind[0].cols + (double)s->kind[3].cols + (double)s->kind[4].cols + (double)s->kind[6].cols;
    return (double)s->layers * layer + (double)s->kind[OBM_KIND_HEAD].cols;
}

static double token_seconds(const obm__workers *w, const obm__placed_shapes *s, const double *share, int nodes) {
    double slowest = 0, exchange = 0;
    int taking = 0;
    for (int i = 0; i < nodes; i++) {
        if (share[i] <= 0) continue;
        slowest = fmax(slowest, share[i] * obm__placement_bytes(s) / node_bandwidth(w, i));
        taking++;
    }
    if (taking > 1)
        exchange = BARRIER_SECONDS * (BARRIERS_PER_LAYER * (double)s->layers + 2) + LINE_SECONDS * input_floats(s) / 16;
    return slowest + exchange;
}

/* ---- shares ---- */

static double room(const obm__machine *m, int node) {
    return m->nodes[node].memory ? MEMORY_SHARE * (double)m->nodes[node].memory : INFINITY;
}

/* In proportion to the speed of a node's workers; a node without room for its part takes what it has room for, and the
 * others share the rest.  Without room for everything, by speed alone. */
static void share_rows(const obm__machine *m, const obm__workers *w, double bytes, double *share) {
    double speed[OBM_NODES] = {0}, left = 1, of = 0;
    bool full[OBM_NODES] = {false};
    for (int i = 0; i < w->n; i++) speed[w->at[i].node] += w->at[i].speed;
    for (int i = 0; i < m->n_nodes; i++) of += speed[i];
    for (bool again = true; again;) {
        again = false;
        for (int i = 0; i < m->n_nodes; i++) {
            if (!full[i]) share[i] = of > 0 ? left * speed[i] / of : 0;
            if (full[i] || share[i] <= 0 || share[i] * bytes <= room(m, i)) continue;
            full[i] = again = true;
            share[i] = room(m, i) / bytes;
            left -= share[i];
            of -= speed[i];
            break; /* the others' parts have grown */
        }
    }
    double sum = 0;
    for (int i = 0; i < m->n_nodes; i++) sum += share[i];
    if (sum > 0.999999) return;
    of = 0;
    for (int i = 0; i < m->n_nodes; i++) of += speed[i];
    for (int i = 0; i < m->n_nodes; i++) share[i] = speed[i] / of;
}

static void share_home(const obm__workers *w, int nodes, double *share) {
    for (int i = 0; i < nodes; i++) share[i] = i == w->home;
}

/* ---- the mode ---- */

static obm_numa settle_auto(const obm__machine *m, const obm__workers *w, const obm__placed_shapes *s,
                            const char **reason) {
    double shared[OBM_NODES], alone[OBM_NODES];
    share_rows(m, w, obm__placement_bytes(s), shared);
    share_home(w, m->n_nodes, alone);
    *reason = "the model does not fit into one node's memory";
    if (obm__placement_bytes(s) > room(m, w->home)) return OBM_NUMA_SHARD;
    bool worth = token_seconds(w, s, alone, m->n_nodes) >= WORTH * token_seconds(w, s, shared, m->n_nodes);
    *reason = worth ? "a token of this model takes longer to read on one node than several need to exchange"
                    : "so small a model would lose more to the exchange between nodes than it gains";
    return worth ? OBM_NUMA_SHARD : OBM_NUMA_ISOLATE;
}

static void choose_mode(const obm__machine *m, const obm__workers *w, const obm__placed_shapes *s, obm__placement *p) {
    p->numa = w->numa;
    if (p->numa == OBM_NUMA_AUTO) {
        p->numa = settle_auto(m, w, s, &p->reason);
        return;
    }
    if (p->asked == p->numa)
        p->reason = "as asked";
    else if (p->numa == OBM_NUMA_OFF)
        p->reason = m->n_nodes == 1 ? "one NUMA node" : "one NUMA node with cores";
    else
        p->reason = p->asked == OBM_NUMA_AUTO ? "one node has cores for all threads" : "one NUMA node with cores";
}

/* ---- cuts ---- */

void obm__placement_cut(int64_t n, const double *share, int nodes, int64_t *at) {
    double sum = 0;
    at[0] = 0;
    for (int i = 0; i < nodes; i++) {
        sum += share[i];
        int64_t next = share[i] > 0 ? (int64_t)floor((double)n * sum + 0.5) : at[i];
        at[i + 1] = next > n ? n : next < at[i] ? at[i] : next;
    }
    for (int i = nodes; i > 0 && at[i] < n; i--) { /* shares that end a rounding error below 1 */
        at[i] = n;
        if (share[i - 1] > 0) break;
    }
}

static int64_t whole_slabs(int64_t rows, int64_t at) {
    int64_t slab = (at + OBM_SLAB_ROWS / 2) / OBM_SLAB_ROWS * OBM_SLAB_ROWS;
    return slab > rows ? rows : slab;
}

static bool is_key_or_value(int kind) { return kind == 1 || kind == 2; }

/* Rows of K and V lie with their heads, as far as slabs allow; the others are cut on their own. */
static void cut_rows(const obm__placed_shapes *s, obm__placement *p) {
    obm__placement_cut(s->kv_heads, p->share, p->nodes, p->heads);
    for (int k = 0; k < OBM_KINDS; k++) {
        int64_t rows = s->kind[k].rows, *at = p->rows[k];
        if (is_key_or_value(k)) {
            for (int i = 0; i <= p->nodes; i++) at[i] = whole_slabs(rows, p->heads[i] * s->head_dim);
            for (int i = 0; i <= p->nodes; i++)
                if (p->heads[i] == s->kv_heads) at[i] = rows;
            continue;
        }
        obm__placement_cut((rows + OBM_SLAB_ROWS - 1) / OBM_SLAB_ROWS, p->share, p->nodes, at);
        for (int i = 0; i <= p->nodes; i++) at[i] = at[i] * OBM_SLAB_ROWS > rows ? rows : at[i] * OBM_SLAB_ROWS;
    }
}

void obm__placement_rows(const obm__placement *p, const obm__workers *w, int worker, int kind, int64_t *first,
                         int64_t *end) {
    int node = w->at[worker].node;
    double before = 0, all = 0;
    for (int i = 0; i < w->n; i++) {
        if (w->at[i].node != node) continue;
        if (i < worker) before += w->at[i].speed;
        all += w->at[i].speed;
    }
    int64_t from = p->rows[kind][node], rows = p->rows[kind][node + 1] - from;
    double slabs = (double)((rows + OBM_SLAB_ROWS - 1) / OBM_SLAB_ROWS);
    int64_t a = (int64_t)floor(slabs * before / all + 0.5) * OBM_SLAB_ROWS;
    int64_t b = (int64_t)floor(slabs * (before + w->at[worker].speed) / all + 0.5) * OBM_SLAB_ROWS;
    *first = from + (a < rows ? a : rows);
    *end = from + (b < rows ? b : rows);
}

/* ---- bytes ---- */

static uint64_t kv_bytes(const obm__placed_shapes *s, int64_t heads) {
    return (uint64_t)(heads * s->head_dim * s->layers * 2) * s->kv_size;
}

static void count_cut(const obm__placed_shapes *s, obm__placement *p) {
    for (int i = 0; i < p->nodes; i++) {
        for (int k = 0; k < OBM_KINDS; k++) {
            uint64_t rows = (uint64_t)(p->rows[k][i + 1] - p->rows[k][i]);
            p->weight_bytes[i] += rows * s->kind[k].weight_bytes;
            p->plane_bytes[i] += rows * s->kind[k].plane_bytes;
        }
        p->kv_bytes[i] = kv_bytes(s, p->heads[i + 1] - p->heads[i]);
    }
}

/* A part of everything. */
static void count_part(const obm__placed_shapes *s, obm__placement *p, int node, double part, double kv_part) {
    double weights = 0, planes = 0;
    for (int k = 0; k < OBM_KINDS; k++) {
        weights += (double)s->kind[k].rows * (double)s->kind[k].weight_bytes;
        planes += (double)s->kind[k].rows * (double)s->kind[k].plane_bytes;
    }
    p->weight_bytes[node] = (uint64_t)(weights * part);
    p->plane_bytes[node] = (uint64_t)(planes * part);
    p->kv_bytes[node] = (uint64_t)((double)kv_bytes(s, s->kv_heads) * kv_part);
}

/* Activations lie at home.  Workers elsewhere read the input of each product once for the whole node, whose cache then
 * has it (a replica would move the same bytes), and write their results; for each of their heads they read q and write
 * what attention mixed, and the caller writes k and v into their cache.  part: of rows and heads, at the node. */
static double activation_bytes(const obm__placed_shapes *s, double part) {
    double results = 0, heads = (double)(s->layers * s->heads * s->head_dim);
    for (int k = 0; k < OBM_KINDS; k++) results += (double)s->kind[k].rows * (double)s->kind[k].layers * sizeof(float);
    return input_floats(s) * sizeof(float) +
           part * (results + 2 * heads * sizeof(float) + (double)kv_bytes(s, s->kv_heads));
}

/* Where rows are handed out to whoever comes: each node reads its workers' part of everything, of which `here` is
 * local. */
static void count_anywhere(const obm__workers *w, const obm__placed_shapes *s, obm__placement *p, const double *here) {
    double speed = 0;
    for (int i = 0; i < w->n; i++) speed += w->at[i].speed;
    for (int i = 0; i < w->n; i++) {
        int node = w->at[i].node;
        p->remote_weights[node] += w->at[i].speed / speed * obm__placement_bytes(s) * (1 - here[node]);
    }
    for (int i = 0; i < p->nodes; i++) {
        double part = 0;
        for (int j = 0; j < w->n; j++) part += w->at[j].node == i ? w->at[j].speed / speed : 0;
        if (i != p->home && part > 0) p->remote_activations[i] = activation_bytes(s, part);
    }
}

/* What nothing has placed counts as if it all lay at home: the file cache keeps pages where they were read. */
static void count_all(const obm__machine *m, const obm__workers *w, const obm__placed_shapes *s, obm__placement *p) {
    double here[OBM_NODES];
    for (int i = 0; i < m->n_nodes; i++)
        here[i] = p->numa == OBM_NUMA_REPLICATE ? 1 : p->numa == OBM_NUMA_INTERLEAVE ? 1.0 / m->n_nodes : i == p->home;
    if (!obm__placement_cuts(p)) {
        for (int i = 0; i < p->nodes; i++) {
            double part = 1.0 / m->n_nodes;
            if (p->numa == OBM_NUMA_OFF) part = i == p->home;
            if (p->numa == OBM_NUMA_REPLICATE) part = obm__workers_count(w, i) > 0;
            count_part(s, p, i, part, part);
            if (p->numa == OBM_NUMA_REPLICATE) p->kv_bytes[i] = kv_bytes(s, p->heads[i + 1] - p->heads[i]);
        }
        count_anywhere(w, s, p, here);
        return;
    }
    count_cut(s, p);
    for (int i = 0; i < p->nodes; i++)
        if (i != p->home && p->share[i] > 0) p->remote_activations[i] = activation_bytes(s, p->share[i]);
}

void obm__placement_plan(const obm__machine *m, const obm__workers *w, obm_numa asked, const obm__placed_shapes *s,
                         obm__placement *p) {
    memset(p, 0, sizeof *p);
    p->asked = asked;
    p->nodes = m->n_nodes;
    p->home = w->home;
    choose_mode(m, w, s, p);
    if (p->numa == OBM_NUMA_ISOLATE)
        share_home(w, m->n_nodes, p->share);
    else
        share_rows(m, w, p->numa == OBM_NUMA_REPLICATE ? 0 : obm__placement_bytes(s), p->share);
    if (obm__placement_cuts(p)) cut_rows(s, p);
    if (p->numa == OBM_NUMA_REPLICATE) obm__placement_cut(s->kv_heads, p->share, p->nodes, p->heads);
    count_all(m, w, s, p);
}
