/* Cores, nodes and caches that this process may use, by hwloc.  It places no memory. */
#include "sys.h"

#include <hwloc.h>
#include <stdio.h>

struct obm__topology {
    hwloc_topology_t hwloc;
    hwloc_cpuset_t allowed;
    int cores, nodes, packages;
    unsigned *cpus; /* [cores]: one processing unit per core */
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

/* First allowed processing unit of every core; machines that report no cores have them as processing units. */
static bool list_cores(obm__topology *t) {
    hwloc_obj_type_t type = count_allowed(t, HWLOC_OBJ_CORE) ? HWLOC_OBJ_CORE : HWLOC_OBJ_PU;
    int count = count_allowed(t, type);
    hwloc_cpuset_t both = hwloc_bitmap_alloc();
    t->cpus = obm__calloc((size_t)count, sizeof *t->cpus);
    if (!both || !t->cpus) {
        hwloc_bitmap_free(both);
        return false;
    }
    for (hwloc_obj_t o = NULL; (o = hwloc_get_next_obj_by_type(t->hwloc, type, o));) {
        hwloc_bitmap_and(both, o->cpuset, t->allowed);
        if (!hwloc_bitmap_iszero(both)) t->cpus[t->cores++] = (unsigned)hwloc_bitmap_first(both);
    }
    hwloc_bitmap_free(both);
    return t->cores > 0;
}

obm__topology *obm__topology_new(void) {
    obm__topology *t = obm__calloc(1, sizeof *t);
    if (!t) return NULL;
    if (hwloc_topology_init(&t->hwloc)) {
        obm_free(t);
        return NULL;
    }
    if (hwloc_topology_load(t->hwloc) || !(t->allowed = allowed_set(t->hwloc)) || !list_cores(t)) {
        obm__topology_free(t);
        return NULL;
    }
    int nodes = count_allowed(t, HWLOC_OBJ_NUMANODE), packages = count_allowed(t, HWLOC_OBJ_PACKAGE);
    t->nodes = nodes ? nodes : 1;
    t->packages = packages ? packages : 1;
    return t;
}

void obm__topology_free(obm__topology *t) {
    if (!t) return;
    hwloc_bitmap_free(t->allowed);
    hwloc_topology_destroy(t->hwloc);
    obm_free(t->cpus);
    obm_free(t);
}

int obm__topology_cores(const obm__topology *t) { return t ? t->cores : 1; }
int obm__topology_nodes(const obm__topology *t) { return t ? t->nodes : 1; }

static uint64_t cache_kib(const obm__topology *t, hwloc_obj_type_t type) {
    hwloc_obj_t o = hwloc_get_obj_by_type(t->hwloc, type, 0);
    return o ? o->attr->cache.size / 1024 : 0;
}

const char *obm__topology_describe(const obm__topology *t, char *buf, size_t size) {
    if (!t) {
        snprintf(buf, size, "unknown");
        return buf;
    }
    uint64_t l2 = cache_kib(t, HWLOC_OBJ_L2CACHE), l3 = cache_kib(t, HWLOC_OBJ_L3CACHE);
    snprintf(buf, size, "%d package%s, %d NUMA node%s, %d core%s, L2 %llu KiB, L3 %llu MiB", t->packages,
             t->packages == 1 ? "" : "s", t->nodes, t->nodes == 1 ? "" : "s", t->cores, t->cores == 1 ? "" : "s",
             (unsigned long long)l2, (unsigned long long)l3 / 1024);
    return buf;
}

int obm__topology_pin(const obm__topology *t, int worker) {
    if (!t || worker < 0 || worker >= t->cores) return -1;
    hwloc_cpuset_t one = hwloc_bitmap_alloc();
    if (!one) return -1;
    hwloc_bitmap_only(one, t->cpus[worker]);
    int result = hwloc_set_cpubind(t->hwloc, one, HWLOC_CPUBIND_THREAD);
    hwloc_bitmap_free(one);
    return result;
}
