/* Checkpoint and TaskVector: tensors by name. */
#include "obm_lua.h"

#include <string.h>

static obm_checkpoint *checkpoint_of(lua_State *L, int at) {
    return (obm_checkpoint *)obm_lua_box_check(L, at, OBM_LUA_CHECKPOINT)->p;
}

static void checkpoint_release(void *own) { obm_checkpoint_free(own); }

/* Pushes the opened checkpoint; on failure *err is set and nothing is usable. */
static obm_status checkpoint_open(lua_State *L, const char *path, obm_error *err) {
    obm_context *ctx = obm_lua_context(L);
    int context = lua_gettop(L);
    obm_lua_box *b = obm_lua_box_new(L, sizeof *b, OBM_LUA_CHECKPOINT, checkpoint_release);
    obm_lua_box_parent(L, b, 0, context);
    obm_checkpoint *c;
    obm_status status = obm_checkpoint_open(ctx, path, &c, err);
    if (status == OBM_OK)
        obm_lua_box_fill(b, c);
    else
        obm_lua_box_close(b);
    lua_remove(L, context);
    return status;
}

int obm_lua_checkpoint(lua_State *L) {
    obm_error err;
    return checkpoint_open(L, obm_lua_string(L, 1), &err) == OBM_OK ? 1 : obm_lua_fail(L, &err);
}

void obm_lua_checkpoint_borrow(lua_State *L, const obm_checkpoint *c, int owner) {
    obm_lua_box *b = obm_lua_box_new(L, sizeof *b, OBM_LUA_CHECKPOINT, NULL);
    obm_lua_box_parent(L, b, 0, owner);
    b->p = c;
}

/* checkpoint:get(name) -> tensor, a view */
static int checkpoint_get(lua_State *L) {
    obm_tensor t;
    obm_error err;
    if (obm_checkpoint_get(checkpoint_of(L, 1), obm_lua_string(L, 2), &t, &err) != OBM_OK) return obm_lua_fail(L, &err);
    obm_lua_tensor_view(L, &t, 1);
    return 1;
}

/* checkpoint[name]: the tensor, nil without one */
static int checkpoint_index(lua_State *L) {
    obm_tensor t;
    if (lua_type(L, 2) != LUA_TSTRING ||
        obm_checkpoint_get(checkpoint_of(L, 1), lua_tostring(L, 2), &t, NULL) != OBM_OK)
        return 0;
    obm_lua_tensor_view(L, &t, 1);
    return 1;
}

static int checkpoint_keys(lua_State *L) {
    const obm_checkpoint *c = checkpoint_of(L, 1);
    lua_newtable(L);
    for (size_t i = 0; i < obm_checkpoint_count(c); i++) {
        const char *name;
        obm_tensor t;
        obm_checkpoint_at(c, i, &name, &t);
        lua_pushstring(L, name);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

static int checkpoint_len(lua_State *L) {
    lua_pushinteger(L, (lua_Integer)obm_checkpoint_count(checkpoint_of(L, 1)));
    return 1;
}

static int checkpoint_path(lua_State *L) {
    lua_pushstring(L, obm_checkpoint_path(checkpoint_of(L, 1)));
    return 1;
}

/* config.json as a table (init.lua reads the text); nil without one. */
static int checkpoint_config(lua_State *L) {
    const char *text = obm_checkpoint_config(checkpoint_of(L, 1));
    if (!text) return lua_pushnil(L), 1;
    lua_getfield(L, LUA_REGISTRYINDEX, "onebitmerge.json");
    lua_pushstring(L, text);
    lua_call(L, 1, 1);
    return 1;
}

static int checkpoint_tied(lua_State *L) {
    lua_pushboolean(L, obm_checkpoint_is_tied(checkpoint_of(L, 1)));
    return 1;
}

static int checkpoint_adapter(lua_State *L) {
    lua_pushboolean(L, obm_checkpoint_is_adapter(checkpoint_of(L, 1)));
    return 1;
}

static int checkpoint_sha256(lua_State *L) {
    char hex[65];
    obm_error err;
    if (obm_checkpoint_sha256(checkpoint_of(L, 1), obm_lua_string(L, 2), hex, &err) != OBM_OK)
        return obm_lua_fail(L, &err);
    lua_pushstring(L, hex);
    return 1;
}

/* checkpoint:z12(name, rows) -> {weights, escapes, fits} */
static int checkpoint_z12(lua_State *L) {
    obm_z12_counts z;
    obm_error err;
    int64_t rows = lua_isnoneornil(L, 3) ? 16 : luaL_checkinteger(L, 3);
    if (obm_checkpoint_z12(checkpoint_of(L, 1), obm_lua_string(L, 2), rows, &z, &err) != OBM_OK)
        return obm_lua_fail(L, &err);
    lua_newtable(L);
    obm_lua_set_integer(L, "weights", z.weights);
    obm_lua_set_integer(L, "escapes", z.escapes);
    obm_lua_set_boolean(L, "fits", z.fits);
    return 1;
}

static int checkpoint_check_layers(lua_State *L) {
    obm_checkpoint_check_layers(checkpoint_of(L, 1));
    return 0;
}

static const luaL_Reg checkpoint_methods[] = {{"keys", checkpoint_keys},
                                              {"get", checkpoint_get},
                                              {"sha256", checkpoint_sha256},
                                              {"z12", checkpoint_z12},
                                              {"check_layers", checkpoint_check_layers},
                                              {"path", checkpoint_path},
                                              {"config", checkpoint_config},
                                              {"tied", checkpoint_tied},
                                              {"adapter", checkpoint_adapter},
                                              {NULL, NULL}};
static const luaL_Reg checkpoint_meta[] = {{"__len", checkpoint_len}, {NULL, NULL}};

/* ---- TaskVector ---- */

static obm_task_vector *vector_of(lua_State *L, int at) {
    return (obm_task_vector *)obm_lua_box_check(L, at, OBM_LUA_TASK_VECTOR)->p;
}

static void vector_release(void *own) { obm_task_vector_free(own); }

/* A checkpoint as it is, a path opened, in place. */
static obm_status as_checkpoint(lua_State *L, int at, obm_error *err) {
    if (luaL_testudata(L, at, OBM_LUA_CHECKPOINT)) return obm_lua_box_check(L, at, OBM_LUA_CHECKPOINT), OBM_OK;
    obm_status status = checkpoint_open(L, obm_lua_string(L, at), err);
    lua_replace(L, at);
    return status;
}

/* task_vector(base, expert): checkpoints or paths */
int obm_lua_task_vector(lua_State *L) {
    obm_error err;
    lua_settop(L, 2);
    if (as_checkpoint(L, 1, &err) != OBM_OK || as_checkpoint(L, 2, &err) != OBM_OK) return obm_lua_fail(L, &err);
    obm_lua_context(L);
    obm_lua_box *b = obm_lua_box_new(L, sizeof *b, OBM_LUA_TASK_VECTOR, vector_release);
    for (int i = 0; i < 3; i++) obm_lua_box_parent(L, b, i, i + 1);
    obm_task_vector *v;
    if (obm_task_vector_new(checkpoint_of(L, 1), checkpoint_of(L, 2), &v, &err) != OBM_OK) {
        obm_lua_box_close(b);
        return obm_lua_fail(L, &err);
    }
    obm_lua_box_fill(b, v);
    return 1;
}

static obm_context *context_of(lua_State *L) {
    lua_getiuservalue(L, 1, 3);
    obm_context *ctx = (obm_context *)((obm_lua_box *)lua_touserdata(L, -1))->p;
    lua_pop(L, 1);
    return ctx;
}

static int vector_keys(lua_State *L) {
    const obm_task_vector *v = vector_of(L, 1);
    lua_newtable(L);
    for (size_t i = 0; i < obm_task_vector_count(v); i++) {
        const char *name;
        obm_tensor base, expert;
        obm_task_vector_at(v, i, &name, &base, &expert);
        lua_pushstring(L, name);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

static int vector_len(lua_State *L) {
    lua_pushinteger(L, (lua_Integer)obm_task_vector_count(vector_of(L, 1)));
    return 1;
}

/* Shape of the base's side; false without such a tensor. */
static bool find_base(const obm_task_vector *v, const char *name, obm_tensor *base) {
    for (size_t i = 0; i < obm_task_vector_count(v); i++) {
        const char *at;
        obm_tensor expert;
        obm_task_vector_at(v, i, &at, base, &expert);
        if (strcmp(at, name) == 0) return true;
    }
    *base = (obm_tensor){.dtype = OBM_F32};
    return false;
}

/* vector:get(name) -> tensor, f32 */
static int vector_get(lua_State *L) {
    const obm_task_vector *v = vector_of(L, 1);
    const char *name = obm_lua_string(L, 2);
    obm_tensor base;
    obm_error err;
    find_base(v, name, &base); /* an unknown name gets its error from the core below */
    float *data = obm_lua_tensor_new(L, base.ndim, base.shape);
    return obm_task_vector_read(v, name, data, &err) == OBM_OK ? 1 : obm_lua_fail(L, &err);
}

/* vector[name]: nil without such a tensor; other failures raise */
static int vector_index(lua_State *L) {
    if (lua_type(L, 2) != LUA_TSTRING) return 0;
    int n = vector_get(L);
    if (n == 1) return 1;
    if (strcmp(lua_tostring(L, -1), obm_status_name(OBM_E_NOTFOUND)) == 0) return 0;
    lua_pop(L, 1);
    return lua_error(L);
}

static void push_stats(lua_State *L, const obm_delta_stats *s) {
    lua_newtable(L);
    obm_lua_set_integer(L, "tensors", s->tensors);
    obm_lua_set_integer(L, "params", s->params);
    obm_lua_set_integer(L, "zeros", s->zeros);
    obm_lua_set_number(L, "base_norm", s->base_norm);
    obm_lua_set_number(L, "delta_norm", s->delta_norm);
    obm_lua_set_number(L, "relative_norm", s->relative_norm);
    obm_lua_set_number(L, "zero_share", s->zero_share);
    obm_lua_set_number(L, "onebit_error_matrix", s->onebit_error_matrix);
    obm_lua_set_number(L, "onebit_error_row", s->onebit_error_row);
}

/* vector:stats{progress} -> {class = stats} */
static int vector_stats(lua_State *L) {
    const obm_task_vector *v = vector_of(L, 1);
    obm_lua_options(L, 2, "progress");
    obm_context *ctx = context_of(L);
    obm_delta_stats stats[OBM_CLASS_COUNT];
    obm_error err;
    obm_lua_call call;
    obm_lua_call_init(L, &call, 2, false);
    obm_lua_begin(&call, lua_touserdata(L, 1));
    obm_status status = obm_task_vector_stats(ctx, v, obm_lua_progress, &call, stats, &err);
    int failed = obm_lua_end(&call, status, &err);
    if (failed) return failed;
    lua_newtable(L);
    for (int c = 0; c < OBM_CLASS_COUNT; c++) {
        if (!stats[c].tensors) continue;
        push_stats(L, &stats[c]);
        lua_setfield(L, -2, obm_class_name((obm_class)c));
    }
    return 1;
}

static int vector_tensor_stats(lua_State *L) {
    const obm_task_vector *v = vector_of(L, 1);
    obm_delta_stats stats;
    obm_error err;
    if (obm_task_vector_tensor_stats(context_of(L), v, obm_lua_string(L, 2), &stats, &err) != OBM_OK)
        return obm_lua_fail(L, &err);
    push_stats(L, &stats);
    return 1;
}

/* vector:compare(other, {progress}) -> {class = {params, cosine, sign_agreement}} */
static int vector_compare(lua_State *L) {
    const obm_task_vector *v = vector_of(L, 1), *other = vector_of(L, 2);
    obm_lua_options(L, 3, "progress");
    obm_context *ctx = context_of(L);
    obm_delta_pair pairs[OBM_CLASS_COUNT];
    obm_error err;
    obm_lua_call call;
    obm_lua_call_init(L, &call, 3, false);
    obm_lua_box_hold(lua_touserdata(L, 2));
    obm_lua_begin(&call, lua_touserdata(L, 1));
    obm_status status = obm_task_vector_compare(ctx, v, other, obm_lua_progress, &call, pairs, &err);
    obm_lua_box_drop(lua_touserdata(L, 2));
    int failed = obm_lua_end(&call, status, &err);
    if (failed) return failed;
    lua_newtable(L);
    for (int c = 0; c < OBM_CLASS_COUNT; c++) {
        if (!pairs[c].params) continue;
        lua_newtable(L);
        obm_lua_set_integer(L, "params", pairs[c].params);
        obm_lua_set_number(L, "cosine", pairs[c].cosine);
        obm_lua_set_number(L, "sign_agreement", pairs[c].sign_agreement);
        lua_setfield(L, -2, obm_class_name((obm_class)c));
    }
    return 1;
}

static const luaL_Reg task_vector_methods[] = {{"keys", vector_keys},       {"get", vector_get},
                                               {"stats", vector_stats},     {"tensor_stats", vector_tensor_stats},
                                               {"compare", vector_compare}, {NULL, NULL}};
static const luaL_Reg vector_meta[] = {{"__len", vector_len}, {NULL, NULL}};

void obm_lua_open_checkpoint(lua_State *L) {
    obm_lua_type(L, OBM_LUA_CHECKPOINT, checkpoint_methods, NULL, checkpoint_meta, checkpoint_index);
    obm_lua_type(L, OBM_LUA_TASK_VECTOR, task_vector_methods, NULL, vector_meta, vector_index);
}
