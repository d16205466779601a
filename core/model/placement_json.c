/* A placement plan as the JSON text that people and scripts get.  It decides nothing. */
#include "placement.h"

#include <math.h>

static void add_int(obm__buffer *b, const char *key, double value) {
    obm__buffer_printf(b, ", \"%s\": %.0f", key, round(value));
}

static void add_range(obm__buffer *b, bool first, int64_t from, int64_t to) {
    obm__buffer_printf(b, "%s[%lld, %lld]", first ? "" : ", ", (long long)from, (long long)to);
}

/* Of an auto that keeps to one node: the others' workers rest. */
static bool works(const obm__placement *p, const obm__worker_place *w) {
    return p->numa != OBM_NUMA_ISOLATE || w->node == p->home;
}

static int count_working(const obm__placement *p, const obm__workers *w, int node) {
    return p->numa == OBM_NUMA_ISOLATE && node != p->home ? 0 : obm__workers_count(w, node);
}

static void add_node(obm__buffer *b, const obm__placement *p, const obm__machine *m, const obm__workers *w, int i) {
    obm__buffer_printf(b, "%s{\"os_index\": %u", i ? ", " : "", m->nodes[i].os);
    add_int(b, "memory", (double)m->nodes[i].memory);
    add_int(b, "cores", m->nodes[i].cores);
    add_int(b, "workers", count_working(p, w, i));
    add_int(b, "weight_bytes", (double)p->weight_bytes[i]);
    add_int(b, "plane_bytes", (double)p->plane_bytes[i]);
    add_int(b, "kv_bytes", (double)p->kv_bytes[i]);
    obm__buffer_text(b, ", \"kv_heads\": ");
    if (obm__placement_local(p))
        add_range(b, true, p->heads[i], p->heads[i + 1]);
    else
        obm__buffer_text(b, "null");
    add_int(b, "remote_bytes", p->remote_weights[i] + p->remote_activations[i]);
    obm__buffer_text(b, "}");
}

static void add_workers(obm__buffer *b, const obm__placement *p, const obm__workers *w) {
    const char *comma = "";
    for (int i = 0; i < w->n; i++) {
        if (!works(p, &w->at[i])) continue;
        if (w->at[i].cpu < 0)
            obm__buffer_printf(b, "%s{\"cpu\": null, \"node\": %d}", comma, w->at[i].node);
        else
            obm__buffer_printf(b, "%s{\"cpu\": %d, \"node\": %d}", comma, w->at[i].cpu, w->at[i].node);
        comma = ", ";
    }
}

/* A replica has all rows, and there is one where somebody reads it; without a fixed place there is nothing to tell. */
static void add_node_rows(obm__buffer *b, const obm__placement *p, const obm__workers *w, int kind, int64_t rows) {
    if (!obm__placement_local(p)) {
        obm__buffer_text(b, ", \"nodes\": null");
        return;
    }
    obm__buffer_text(b, ", \"nodes\": [");
    for (int i = 0; i < p->nodes; i++) {
        if (obm__placement_cuts(p))
            add_range(b, !i, p->rows[kind][i], p->rows[kind][i + 1]);
        else
            add_range(b, !i, 0, obm__workers_count(w, i) ? rows : 0);
    }
    obm__buffer_text(b, "]");
}

static void add_worker_rows(obm__buffer *b, const obm__placement *p, const obm__workers *w, int kind) {
    bool first = true;
    if (!obm__placement_cuts(p)) {
        obm__buffer_text(b, ", \"workers\": null");
        return;
    }
    obm__buffer_text(b, ", \"workers\": [");
    for (int i = 0; i < w->n; i++) {
        int64_t from, to;
        if (!works(p, &w->at[i])) continue;
        obm__placement_rows(p, w, i, kind, &from, &to);
        add_range(b, first, from, to);
        first = false;
    }
    obm__buffer_text(b, "]");
}

static void add_kind(obm__buffer *b, const obm__placement *p, const obm__workers *w, const obm__placed_kind *k,
                     int kind, const char *name) {
    static const char *const roles[OBM_KINDS] = {"q", "k", "v", "o", "gate", "up", "down", "head"};
    obm__buffer_printf(b, "%s{\"role\": \"%s\", \"name\": \"%s\"", kind ? ", " : "", roles[kind], name);
    add_int(b, "layers", (double)k->layers);
    add_int(b, "rows", (double)k->rows);
    add_int(b, "cols", (double)k->cols);
    add_int(b, "bytes", (double)k->rows * (double)(k->weight_bytes + k->plane_bytes));
    add_node_rows(b, p, w, kind, k->rows);
    add_worker_rows(b, p, w, kind);
    obm__buffer_text(b, "}");
}

static void add_totals(obm__buffer *b, const obm__placement *p, const obm__placed_shapes *s) {
    double weights = 0, activations = 0;
    for (int i = 0; i < p->nodes; i++) {
        weights += p->remote_weights[i];
        activations += p->remote_activations[i];
    }
    add_int(b, "weight_bytes_per_token", obm__placement_bytes(s));
    add_int(b, "remote_weight_bytes_per_token", weights);
    add_int(b, "remote_activation_bytes_per_token", activations);
    add_int(b, "remote_bytes_per_token", weights + activations);
}

char *obm__placement_json(const obm__placement *p, const obm__machine *m, const obm__workers *w,
                          const obm__placed_shapes *s, const char *const *names) {
    obm__buffer b = {0};
    int working = 0;
    for (int i = 0; i < p->nodes; i++) working += count_working(p, w, i);
    obm__buffer_printf(&b, "{\"numa\": \"%s\", \"asked\": \"%s\", \"reason\": \"%s\"", obm__numa_name(p->numa),
                       obm__numa_name(p->asked), p->reason);
    add_int(&b, "threads", working);
    add_int(&b, "home", p->home);
    obm__buffer_text(&b, ", \"nodes\": [");
    for (int i = 0; i < p->nodes; i++) add_node(&b, p, m, w, i);
    obm__buffer_text(&b, "], \"workers\": [");
    add_workers(&b, p, w);
    obm__buffer_text(&b, "], \"matrices\": [");
    for (int k = 0; k < OBM_KINDS; k++) add_kind(&b, p, w, &s->kind[k], k, names[k]);
    obm__buffer_text(&b, "]");
    add_totals(&b, p, s);
    obm__buffer_text(&b, "}");
    if (!b.failed) return b.data;
    obm__buffer_free(&b);
    return NULL;
}
