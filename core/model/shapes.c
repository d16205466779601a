/* A model's sizes for the placement plan, from its config and the headers of its files; and the plan of a model that is
 * not opened.  It reads no weights. */
#include "model.h"

/* Of the tensor that a role's rows are in: a tied head is the embedding. */
static const char *name_pattern(const obm_model *m, obm__role role) {
    const obm__config *c = &m->config;
    return c->arch->names[role == OBM_HEAD && !obm__config_has(c, role) ? OBM_EMBEDDING : role];
}

/* z12: 96 bytes for 64 columns, 16 of a table, 4 of an index of escapes (kernels.h). */
static uint64_t row_bytes(const obm_tensor *t, int64_t cols, bool z12) {
    if (z12 && t->dtype == OBM_BF16) return (uint64_t)((cols + 63) / 64) * 96 + 16 + 4;
    return (uint64_t)cols * obm_dtype_size(t->dtype);
}

static uint64_t plane_bytes(const obm_model *m, int64_t layer, obm__role role, int64_t cols) {
    size_t tensor = m->pack ? obm__model_tensor(m, layer, role) : SIZE_MAX;
    return tensor == SIZE_MAX ? 0 : obm__planes_list(m->pack, tensor, NULL) * (uint64_t)((cols + 63) / 64) * 8;
}

static obm_status add_matrix(const obm_model *m, int64_t layer, obm__role role, bool z12, obm__placed_kind *k,
                             obm_error *err) {
    char name[256];
    obm__tensor_name(name_pattern(m, role), layer, name, sizeof name);
    const obm__st_entry *e = obm__checkpoint_find(m->base, name);
    if (!e) return obm__fail(err, OBM_E_NOTFOUND, "%s: tensor \"%s\" is missing", obm_checkpoint_path(m->base), name);
    k->layers++;
    k->weight_bytes += row_bytes(&e->t, k->cols, z12);
    if (!m->materialise) k->plane_bytes += plane_bytes(m, layer, role, k->cols);
    return OBM_OK;
}

obm_status obm__placed_shapes_of(const obm_model *m, bool z12, obm__placed_shapes *out, obm_error *err) {
    const obm__config *c = &m->config;
    *out = (obm__placed_shapes){.layers = c->layers,
                                .heads = c->heads,
                                .kv_heads = c->kv_heads,
                                .head_dim = c->head_dim,
                                .hidden = c->hidden,
                                .kv_size = obm_dtype_size(m->kv)};
    for (int kind = 0; kind < OBM_KINDS; kind++)
        obm__config_shape(c, obm__kind_role(kind), &out->kind[kind].rows, &out->kind[kind].cols);
    for (size_t i = 0; i < obm__matrix_count(m); i++) {
        int64_t layer;
        obm__role role = obm__matrix_role(m, i, &layer);
        OBM_TRY(add_matrix(m, layer, role, z12, &out->kind[obm__role_kind(role)], err));
    }
    return OBM_OK;
}

/* ---- the plan of a model ---- */

static obm_status read_shapes(obm_model *m, const char *path, const obm_model_plan_options *o, obm__placed_shapes *out,
                              obm_error *err) {
    obm__pulse pulse = obm__pulse_new(m->ctx, NULL, NULL, "plan", 1);
    m->kv = OBM_OPT(o, obm_model_plan_options, kv, OBM_F32);
    if (m->kv != OBM_F32 && m->kv != OBM_F16)
        return obm__fail(err, OBM_E_ARG, "the KV cache can be F32 or F16, not %s", obm_dtype_name(m->kv));
    OBM_TRY(obm__model_open_files(m, path, OBM_OPT(o, obm_model_plan_options, base, NULL), &pulse, err));
    OBM_TRY(obm__model_load_config(m, err));
    m->tasks = obm__model_tasks(m);
    if (m->pack) OBM_TRY(obm__model_find_tensors(m, err));
    obm_z12 z12 = OBM_OPT(o, obm_model_plan_options, z12, OBM_Z12_AUTO);
    OBM_TRY(obm__z12_check(z12, err));
    return obm__placed_shapes_of(m, z12 == OBM_Z12_ON, out, err);
}

static obm_status plan_on(const obm_model *m, const obm__machine *machine, const obm_model_plan_options *o,
                          const obm__placed_shapes *s, char **json, obm_error *err) {
    obm_numa numa = OBM_OPT(o, obm_model_plan_options, numa, OBM_NUMA_AUTO);
    int threads = (int)OBM_OPT(o, obm_model_plan_options, threads, 0);
    const char *names[OBM_KINDS];
    obm__workers workers;
    if (!threads && machine == obm__topology_machine(m->ctx->topology))
        threads = obm__workers_within(machine, numa, m->ctx->quota);
    obm__placement *p = obm__alloc(1, sizeof *p);
    if (!p) return obm__fail_nomem(err, sizeof *p);
    for (int kind = 0; kind < OBM_KINDS; kind++) names[kind] = name_pattern(m, obm__kind_role(kind));
    obm_status status = obm__workers_new(machine, numa, threads, &workers, err);
    if (status == OBM_OK) {
        obm__placement_plan(machine, &workers, numa, s, p);
        char *text = obm__placement_json(p, machine, &workers, s, names);
        obm_free(workers.at);
        if (text)
            *json = text;
        else
            status = obm__fail_nomem(err, 1);
    }
    obm_free(p);
    return status;
}

static obm_status check_plan(const obm_model_plan_options *o, obm_error *err) {
    OBM_TRY(OBM_CHECK(obm_model_plan_options, o, err));
    OBM_TRY(obm__numa_check(OBM_OPT(o, obm_model_plan_options, numa, OBM_NUMA_AUTO), err));
    return obm__threads_check(OBM_OPT(o, obm_model_plan_options, threads, 0), err);
}

static obm_status read_machine(const obm_context *ctx, const char *text, obm__topology **own, const obm__machine **out,
                               obm_error *err) {
    if (text) OBM_TRY(obm__topology_read(text, own, err));
    *out = obm__topology_machine(text ? *own : ctx->topology);
    return OBM_OK;
}

obm_status obm_model_plan(obm_context *ctx, const char *path, const obm_model_plan_options *options, char **json,
                          obm_error *err) {
    OBM_TRY(check_plan(options, err));
    obm__topology *own = NULL;
    const obm__machine *machine;
    OBM_TRY(read_machine(ctx, OBM_OPT(options, obm_model_plan_options, topology, NULL), &own, &machine, err));
    obm_model *m = obm__calloc(1, sizeof *m);
    obm__placed_shapes shapes;
    obm_status status = m ? OBM_OK : obm__fail_nomem(err, sizeof *m);
    if (m) {
        m->ctx = ctx;
        status = read_shapes(m, path, options, &shapes, err);
        if (status == OBM_OK) status = plan_on(m, machine, options, &shapes, json, err);
        obm_model_free(m);
    }
    obm__topology_free(own);
    return status;
}
