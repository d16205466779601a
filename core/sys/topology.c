/* Cores, nodes and caches that this process may use, or those of a machine described by a file, by hwloc.  What goes
 * where is decided elsewhere. */
#include "sys.h"

#include <errno.h>
#include <hwloc.h>
#include <hwloc/distances.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct obm__topology {
    hwloc_topology_t hwloc;
    hwloc_cpuset_t allowed;
    hwloc_nodeset_t memory; /* nodes that the memory policy allows */
    int nodes, packages;
    obm__machine machine;
    hwloc_obj_t node[OBM_NODES]; /* of the machine's nodes */
};

/* The administrator's set (cgroup) and the affinity of the process (taskset, numactl, a batch system). */
static hwloc_cpuset_t allowed_set(hwloc_topology_t hwloc) {
    hwloc_cpuset_t set = hwloc_bitmap_dup(hwloc_topology_get_allowed_cpuset(hwloc)), bound = hwloc_bitmap_alloc();
    if (set && bound &&
        (!hwloc_get_cpubind(hwloc, bound, HWLOC_CPUBIND_PROCESS) ||
         !hwloc_get_cpubind(hwloc, bound, HWLOC_CPUBIND_THREAD)) &&
        hwloc_bitmap_intersects(set, bound))
        hwloc_bitmap_and(set, set, bound);
    hwloc_bitmap_free(bound);
    return set;
}

static int count_allowed(const obm__topology *t, hwloc_obj_type_t type) {
    int count = 0;
    for (hwloc_obj_t o = NULL; (o = hwloc_get_next_obj_by_type(t->hwloc, type, o));)
        count += hwloc_bitmap_intersects(o->cpuset, t->allowed);
    return count;
}

/* What numactl --membind and the like leave; all nodes where there is no such policy. */
static hwloc_nodeset_t memory_set(hwloc_topology_t hwloc) {
    hwloc_membind_policy_t policy;
    hwloc_nodeset_t set = hwloc_bitmap_dup(hwloc_topology_get_allowed_nodeset(hwloc)), bound = hwloc_bitmap_alloc();
    if (set && bound && hwloc_topology_is_thissystem(hwloc) &&
        !hwloc_get_membind(hwloc, bound, &policy, HWLOC_MEMBIND_THREAD | HWLOC_MEMBIND_BYNODESET) &&
        policy == HWLOC_MEMBIND_BIND && hwloc_bitmap_intersects(set, bound))
        hwloc_bitmap_and(set, set, bound);
    hwloc_bitmap_free(bound);
    return set;
}

/* ---- nodes ---- */

static hwloc_obj_t next_node(const obm__topology *t, hwloc_obj_t o) {
    while ((o = hwloc_get_next_obj_by_type(t->hwloc, HWLOC_OBJ_NUMANODE, o)))
        if (hwloc_bitmap_isset(t->memory, o->os_index)) return o;
    return NULL;
}

static bool any_memory(const obm__topology *t) {
    for (hwloc_obj_t o = NULL; (o = next_node(t, o));)
        if (o->attr->numanode.local_memory) return true;
    return false;
}

static bool list_nodes(obm__topology *t) {
    bool known = any_memory(t); /* some containers hide all sizes: then no node is without memory */
    obm__machine *m = &t->machine;
    for (hwloc_obj_t o = NULL; (o = next_node(t, o));) {
        uint64_t memory = o->attr->numanode.local_memory;
        if (known && !memory) continue;
        if (m->n_nodes == OBM_NODES) return false;
        t->node[m->n_nodes] = o;
        m->nodes[m->n_nodes++] = (obm__node){.os = o->os_index, .memory = memory};
    }
    return m->n_nodes > 0;
}

/* Of the nodes that a processing unit calls its own, that of the fewest units (memory of a whole package or machine,
 * like CXL's, is further away), and of several (HBM beside DRAM) the first: systems count the nodes of their cores
 * first. -1: none has memory. */
static int own_node(const obm__topology *t, unsigned cpu) {
    int best = -1, fewest = INT_MAX;
    for (int i = 0; i < t->machine.n_nodes; i++) {
        int units = hwloc_bitmap_weight(t->node[i]->cpuset);
        bool before = units < fewest || (units == fewest && t->machine.nodes[i].os < t->machine.nodes[best].os);
        if (!hwloc_bitmap_isset(t->node[i]->cpuset, cpu) || !before) continue;
        best = i;
        fewest = units;
    }
    return best;
}

static hwloc_obj_t node_of(const obm__topology *t, unsigned cpu) {
    for (hwloc_obj_t o = NULL; (o = hwloc_get_next_obj_by_type(t->hwloc, HWLOC_OBJ_NUMANODE, o));)
        if (hwloc_bitmap_isset(o->cpuset, cpu)) return o;
    return NULL;
}

/* By the firmware's latencies, where there are any. */
static int nearest_by_latency(const obm__topology *t, hwloc_obj_t from) {
    struct hwloc_distances_s *d;
    unsigned n = 1;
    int best = -1;
    uint64_t least = UINT64_MAX;
    if (!from ||
        hwloc_distances_get_by_type(t->hwloc, HWLOC_OBJ_NUMANODE, &n, &d, HWLOC_DISTANCES_KIND_MEANS_LATENCY, 0) ||
        n < 1)
        return -1;
    int row = hwloc_distances_obj_index(d, from);
    for (int i = 0; row >= 0 && i < t->machine.n_nodes; i++) {
        int col = hwloc_distances_obj_index(d, t->node[i]);
        uint64_t value = col < 0 ? UINT64_MAX : d->values[(unsigned)row * d->nbobjs + (unsigned)col];
        if (value < least) best = i, least = value;
    }
    hwloc_distances_release(t->hwloc, d);
    return best;
}

/* Else the one that shares the innermost part of the machine. */
static int nearest_by_place(const obm__topology *t, hwloc_obj_t pu) {
    int best = 0, deepest = -1;
    for (int i = 0; i < t->machine.n_nodes; i++) {
        int depth = hwloc_get_common_ancestor_obj(t->hwloc, pu, t->node[i]->parent)->depth;
        if (depth > deepest) best = i, deepest = depth;
    }
    return best;
}

static int home_of(const obm__topology *t, unsigned cpu) {
    int own = own_node(t, cpu);
    if (own >= 0) return own;
    int near = nearest_by_latency(t, node_of(t, cpu));
    return near >= 0 ? near : nearest_by_place(t, hwloc_get_pu_obj_by_os_index(t->hwloc, cpu));
}

/* ---- cores ---- */

static int kind_frequency(hwloc_topology_t hwloc, unsigned kind, hwloc_cpuset_t cpus) {
    unsigned n;
    struct hwloc_info_s *infos;
    int efficiency;
    if (hwloc_cpukinds_get_info(hwloc, kind, cpus, &efficiency, &n, &infos, 0)) return 0;
    for (unsigned i = 0; i < n; i++)
        if (!strcmp(infos[i].name, "FrequencyMaxMHz")) return atoi(infos[i].value);
    return 0;
}

/* Percent of the fastest kind; 100 for all unless the system says it of every kind. */
static void read_speeds(obm__topology *t) {
    int n = hwloc_cpukinds_get_nr(t->hwloc, 0), fastest = 0;
    hwloc_cpuset_t set = hwloc_bitmap_alloc();
    for (int i = 0; set && i < n; i++) {
        int mhz = kind_frequency(t->hwloc, (unsigned)i, set);
        if (mhz <= 0)
            fastest = INT32_MAX;
        else if (mhz > fastest)
            fastest = mhz;
    }
    for (int i = 0; set && fastest > 0 && fastest < INT32_MAX && i < n; i++) {
        int speed = (int)((int64_t)kind_frequency(t->hwloc, (unsigned)i, set) * 100 / fastest);
        for (int c = 0; c < t->machine.n_cores; c++)
            if (hwloc_bitmap_isset(set, t->machine.cores[c].cpu)) t->machine.cores[c].speed = speed > 0 ? speed : 1;
    }
    hwloc_bitmap_free(set);
}

/* First allowed processing unit of every core; machines that report no cores have them as processing units. */
static bool list_cores(obm__topology *t) {
    hwloc_obj_type_t type = count_allowed(t, HWLOC_OBJ_CORE) ? HWLOC_OBJ_CORE : HWLOC_OBJ_PU;
    obm__machine *m = &t->machine;
    hwloc_cpuset_t both = hwloc_bitmap_alloc();
    m->cores = obm__calloc((size_t)count_allowed(t, type), sizeof *m->cores);
    if (!both || !m->cores) {
        hwloc_bitmap_free(both);
        return false;
    }
    for (hwloc_obj_t o = NULL; (o = hwloc_get_next_obj_by_type(t->hwloc, type, o));) {
        hwloc_bitmap_and(both, o->cpuset, t->allowed);
        if (hwloc_bitmap_iszero(both)) continue;
        unsigned cpu = (unsigned)hwloc_bitmap_first(both);
        m->cores[m->n_cores++] = (obm__core){.cpu = cpu, .node = home_of(t, cpu), .speed = 100};
    }
    hwloc_bitmap_free(both);
    read_speeds(t);
    for (int i = 0; i < m->n_cores; i++) {
        m->nodes[m->cores[i].node].cores++;
        m->nodes[m->cores[i].node].speed += m->cores[i].speed;
    }
    return m->n_cores > 0;
}

/* ---- reading ---- */

/* Of a topology that is loaded. */
static bool describe_machine(obm__topology *t) {
    t->allowed = allowed_set(t->hwloc);
    t->memory = memory_set(t->hwloc);
    if (!t->allowed || !t->memory || !list_nodes(t) || !list_cores(t)) return false;
    int nodes = count_allowed(t, HWLOC_OBJ_NUMANODE), packages = count_allowed(t, HWLOC_OBJ_PACKAGE);
    t->nodes = nodes ? nodes : 1;
    t->packages = packages ? packages : 1;
    return true;
}

static obm__topology *topology_init(void) {
    obm__topology *t = obm__calloc(1, sizeof *t);
    if (t && hwloc_topology_init(&t->hwloc)) {
        obm_free(t);
        return NULL;
    }
    return t;
}

obm__topology *obm__topology_new(void) {
    obm__topology *t = topology_init();
    if (t && !hwloc_topology_load(t->hwloc) && describe_machine(t)) return t;
    obm__topology_free(t);
    return NULL;
}

/* Names that end in .xml are files, and so is what is there under the name. */
static obm_status choose_source(obm__topology *t, const char *text, obm_error *err) {
    size_t n = strlen(text);
    bool named = n > 4 && !strcmp(text + n - 4, ".xml");
    if (named || !access(text, F_OK)) {
        if (access(text, R_OK)) return obm__fail_errno(err, "cannot read %s", text);
        if (!hwloc_topology_set_xml(t->hwloc, text)) return OBM_OK;
        return obm__fail(err, OBM_E_FORMAT, "%s: expected a topology in hwloc's XML", text);
    }
    if (!hwloc_topology_set_synthetic(t->hwloc, text)) return OBM_OK;
    return obm__fail(
        err, OBM_E_ARG,
        "topology: expected a file of hwloc's XML or a description like \"numa:2 core:4 pu:2\" (from the outside "
        "in; pu, the hardware threads of a core, comes last), found \"%.128s\"",
        text);
}

static obm_status read_topology(obm__topology *t, const char *text, obm_error *err) {
    OBM_TRY(choose_source(t, text, err));
    if (hwloc_topology_load(t->hwloc))
        return obm__fail(err, OBM_E_FORMAT, "%s: expected a topology in hwloc's XML", text);
    if (describe_machine(t)) return OBM_OK;
    if (t->machine.n_nodes == OBM_NODES)
        return obm__fail(err, OBM_E_UNSUPPORTED, "topology: more than %d NUMA nodes", OBM_NODES);
    return obm__fail(err, OBM_E_FORMAT, "topology: expected cores and nodes that may be used, found none");
}

obm_status obm__topology_read(const char *text, obm__topology **out, obm_error *err) {
    obm__topology *t = topology_init();
    if (!t) return obm__fail_nomem(err, sizeof *t);
    obm_status status = read_topology(t, text, err);
    if (status == OBM_OK)
        *out = t;
    else
        obm__topology_free(t);
    return status;
}

void obm__topology_free(obm__topology *t) {
    if (!t) return;
    hwloc_bitmap_free(t->allowed);
    hwloc_bitmap_free(t->memory);
    hwloc_topology_destroy(t->hwloc);
    obm_free(t->machine.cores);
    obm_free(t);
}

const obm__machine *obm__topology_machine(const obm__topology *t) {
    static obm__core core = {.speed = 100};
    static const obm__machine unknown = {
        .n_nodes = 1, .n_cores = 1, .nodes = {{.cores = 1, .speed = 100}}, .cores = &core};
    return t ? &t->machine : &unknown;
}

int obm__topology_cores(const obm__topology *t) { return t ? t->machine.n_cores : 1; }
int obm__topology_nodes(const obm__topology *t) { return t ? t->nodes : 1; }

static uint64_t cache_kib(const obm__topology *t, hwloc_obj_type_t type) {
    hwloc_obj_t o = hwloc_get_obj_by_type(t->hwloc, type, 0);
    return o ? o->attr->cache.size / 1024 : 0;
}

uint64_t obm__topology_cache(const obm__topology *t) {
    int n = t ? hwloc_get_nbobjs_by_type(t->hwloc, HWLOC_OBJ_L3CACHE) : 0;
    return n > 0 ? (uint64_t)n * cache_kib(t, HWLOC_OBJ_L3CACHE) * 1024 : 0;
}

const char *obm__topology_describe(const obm__topology *t, char *buf, size_t size) {
    if (!t) {
        snprintf(buf, size, "unknown");
        return buf;
    }
    uint64_t l2 = cache_kib(t, HWLOC_OBJ_L2CACHE), l3 = cache_kib(t, HWLOC_OBJ_L3CACHE);
    snprintf(buf, size, "%d package%s, %d NUMA node%s, %d core%s, L2 %llu KiB, L3 %llu MiB", t->packages,
             t->packages == 1 ? "" : "s", t->nodes, t->nodes == 1 ? "" : "s", t->machine.n_cores,
             t->machine.n_cores == 1 ? "" : "s", (unsigned long long)l2, (unsigned long long)l3 / 1024);
    return buf;
}

/* ---- binding ---- */

/* hwloc answers calls about another machine's topology as if it had done what they ask for. */
static bool is_here(const obm__topology *t) {
    if (t && hwloc_topology_is_thissystem(t->hwloc)) return true;
    errno = ENODEV;
    return false;
}

static int bind_thread(const obm__topology *t, const obm__workers *w, int worker, hwloc_cpuset_t set) {
    const obm__worker_place *place = &w->at[worker];
    if (place->cpu >= 0)
        hwloc_bitmap_only(set, (unsigned)place->cpu);
    else if (w->numa == OBM_NUMA_OFF)
        return -1;
    for (int c = 0; place->cpu < 0 && c < t->machine.n_cores; c++)
        if (t->machine.cores[c].node == place->node) hwloc_bitmap_set(set, t->machine.cores[c].cpu);
    return hwloc_set_cpubind(t->hwloc, set, HWLOC_CPUBIND_THREAD);
}

int obm__topology_bind(const obm__topology *t, const obm__workers *w, int worker) {
    hwloc_cpuset_t set = is_here(t) ? hwloc_bitmap_alloc() : NULL;
    if (!set) return -1;
    int result = bind_thread(t, w, worker, set);
    hwloc_bitmap_free(set);
    return result;
}

void *obm__topology_save(const obm__topology *t) {
    hwloc_cpuset_t set = is_here(t) ? hwloc_bitmap_alloc() : NULL;
    if (!set || !hwloc_get_cpubind(t->hwloc, set, HWLOC_CPUBIND_THREAD)) return set;
    hwloc_bitmap_free(set);
    return NULL;
}

void obm__topology_restore(const obm__topology *t, void *saved) {
    if (!saved) return;
    (void)hwloc_set_cpubind(t->hwloc, saved, HWLOC_CPUBIND_THREAD);
    hwloc_bitmap_free(saved);
}

void obm__topology_unbind(const obm__topology *t) {
    if (is_here(t)) (void)hwloc_set_cpubind(t->hwloc, t->allowed, HWLOC_CPUBIND_THREAD);
}

/* ---- memory ---- */

/* Not strict: strict pages that find their node full end the process, these go to another node, and are counted there.
 */
int obm__topology_place(const obm__topology *t, void *at, size_t bytes, int node) {
    hwloc_nodeset_t set = is_here(t) ? hwloc_bitmap_alloc() : NULL;
    if (!set) return -1;
    for (int i = 0; i < t->machine.n_nodes; i++)
        if (node < 0 || i == node) hwloc_bitmap_set(set, t->machine.nodes[i].os);
    int result = hwloc_set_area_membind(
        t->hwloc, at, bytes, set, node < 0 ? HWLOC_MEMBIND_INTERLEAVE : HWLOC_MEMBIND_BIND, HWLOC_MEMBIND_BYNODESET);
    hwloc_bitmap_free(set);
    return result;
}

static int node_of_status(const obm__topology *t, int status) {
    for (int i = 0; i < t->machine.n_nodes; i++)
        if (status >= 0 && t->machine.nodes[i].os == (unsigned)status) return i;
    return status == -ENOENT || status == -EFAULT ? -2 : -1;
}

/* One system call for many pages, where hwloc asks for each: a model has millions. */
int obm__topology_find(const obm__topology *t, const void *at, size_t pages, int *node) {
    enum { AT_ONCE = 512 };
    void *address[AT_ONCE];
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (!is_here(t)) return -1;
    for (size_t done = 0, n; done < pages; done += n) {
        n = pages - done < AT_ONCE ? pages - done : AT_ONCE;
        for (size_t i = 0; i < n; i++) address[i] = (char *)at + (done + i) * page;
        if (syscall(SYS_move_pages, 0, n, address, NULL, node + done, 0)) return -1;
        for (size_t i = 0; i < n; i++) node[done + i] = node_of_status(t, node[done + i]);
    }
    return 0;
}
