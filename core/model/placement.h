/* The placement plan: which rows, planes and KV heads belong to which node and worker.  A pure function of a machine,
 * its workers and the shapes of a model; what acts on it is in placed.c. */
#ifndef OBM_PLACEMENT_H
#define OBM_PLACEMENT_H

#include "../sys/sys.h"

/* The matrices of a layer, in the order of obm__role, then the head. */
#define OBM_KINDS 8
#define OBM_KIND_HEAD 7
#define OBM_SLAB_ROWS 64

/* One kind of matrix: all layers have it in this shape. */
typedef struct obm__placed_kind {
    int64_t rows, cols, layers;
    uint64_t weight_bytes, plane_bytes; /* of one row, summed over the layers */
} obm__placed_kind;
typedef struct obm__placed_shapes {
    obm__placed_kind kind[OBM_KINDS];
    int64_t layers, heads, kv_heads, head_dim, hidden;
    size_t kv_size; /* bytes of an element of the KV cache */
} obm__placed_shapes;

typedef struct obm__placement {
    obm_numa asked, numa; /* numa: never AUTO */
    const char *reason;
    int nodes, home;         /* nodes: of the machine */
    double share[OBM_NODES]; /* of the rows; SHARD and ISOLATE */
    /* [rows[k][i], rows[k][i + 1]) of kind k belong to node i, the same of KV heads; SHARD and ISOLATE, heads also
     * REPLICATE. */
    int64_t rows[OBM_KINDS][OBM_NODES + 1];
    int64_t heads[OBM_NODES + 1];
    uint64_t weight_bytes[OBM_NODES], plane_bytes[OBM_NODES], kv_bytes[OBM_NODES]; /* held; the last per position */
    double remote_weights[OBM_NODES], remote_activations[OBM_NODES]; /* bytes per token, by workers of the node */
} obm__placement;
void obm__placement_plan(const obm__machine *m, const obm__workers *w, obm_numa asked, const obm__placed_shapes *s,
                         obm__placement *out);
/* True where rows have a fixed node. */
static inline bool obm__placement_cuts(const obm__placement *p) {
    return p->numa == OBM_NUMA_SHARD || p->numa == OBM_NUMA_ISOLATE;
}
/* True where KV heads have one, and rows have one or a copy at each reader. */
static inline bool obm__placement_local(const obm__placement *p) {
    return obm__placement_cuts(p) || p->numa == OBM_NUMA_REPLICATE;
}
/* The rows of a kind that worker w has if all workers of its node are equally quick for their speed. */
void obm__placement_rows(const obm__placement *p, const obm__workers *w, int worker, int kind, int64_t *first,
                         int64_t *end);
/* `n` units cut in proportion: at[i] = round(n * (share[0] + ... + share[i - 1])), at[nodes] = n. */
void obm__placement_cut(int64_t n, const double *share, int nodes, int64_t *at);
double obm__placement_bytes(const obm__placed_shapes *s); /* weights and planes that a token reads */
/* The plan as obm_model_plan gives it (placement_json.c); names (OBM_KINDS) of the tensors, which need no escapes.
 * NULL: out of memory. */
char *obm__placement_json(const obm__placement *p, const obm__machine *m, const obm__workers *w,
                          const obm__placed_shapes *s, const char *const *names);

#endif
