/* Merge methods in Lua: the registry, what the core gets of it, and the call for a tile. */
#include "obm_lua.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* The registry of the module: name -> {function, options}, options as init.lua completed them. */
#define METHODS "onebitmerge.methods"

static double number_field(lua_State *L, int at, const char *name, double otherwise) {
    int type = lua_getfield(L, at, name);
    double v = type == LUA_TBOOLEAN ? lua_toboolean(L, -1) : type == LUA_TNIL ? otherwise : lua_tonumber(L, -1);
    if (type != LUA_TNIL && type != LUA_TBOOLEAN && type != LUA_TNUMBER)
        luaL_error(L, "%s: expected number, found %s", name, luaL_typename(L, -1));
    lua_pop(L, 1);
    return v;
}

static bool field_is(lua_State *L, int at, int keep, const char *name, const char *value) {
    const char *s = obm_lua_field_string(L, at, keep, name);
    return s && !strcmp(s, value);
}

/* One parameter: a table with the keys that methods() prints. */
static void read_param(lua_State *L, int keep, int at, obm_param_info *p) {
    p->name = obm_lua_field_string(L, at, keep, "name");
    p->doc = obm_lua_field_string(L, at, keep, "doc");
    if (!p->doc) p->doc = "";
    p->is_bool = field_is(L, at, keep, "type", "bool");
    p->scope = field_is(L, at, keep, "scope", "model") ? OBM_PARAM_PER_MODEL : OBM_PARAM_GLOBAL;
    p->required = obm_lua_field_boolean(L, at, "required", false);
    p->min = number_field(L, at, "min", p->is_bool ? 0 : -HUGE_VAL);
    p->max = number_field(L, at, "max", p->is_bool ? 1 : HUGE_VAL);
    p->dflt = number_field(L, at, "default", fmin(fmax(0, p->min), p->max));
}

static void read_params(lua_State *L, int keep, int options, obm_method_info *info) {
    if (lua_getfield(L, options, "params") == LUA_TTABLE) {
        int list = lua_gettop(L);
        info->n_params = (size_t)luaL_len(L, list);
        obm_param_info *params = obm_lua_alloc(L, keep, info->n_params, sizeof *params);
        for (size_t i = 0; i < info->n_params; i++, lua_pop(L, 1)) {
            if (lua_geti(L, list, (lua_Integer)i + 1) != LUA_TTABLE) luaL_error(L, "a parameter is a table");
            read_param(L, keep, lua_gettop(L), &params[i]);
        }
        info->params = params;
    }
    lua_pop(L, 1);
}

static obm_status merge_tile(void *user, const obm_merge_tile *tile, obm_error *err);

/* The entry on top of the stack; strings are anchored in `keep`.  Raises. */
static void read_entry(lua_State *L, int keep, const char *name, obm_lua_method *m) {
    m->spec = OBM_INIT(obm_custom_method);
    obm_method_info *info = &m->spec.info;
    info->name = name;
    lua_geti(L, -1, 2);
    int options = lua_gettop(L);
    read_params(L, keep, options, info);
    info->doc = obm_lua_field_string(L, options, keep, "doc");
    info->source = obm_lua_field_string(L, options, keep, "source");
    info->needs_base = obm_lua_field_boolean(L, options, "base", true);
    info->min_models = (int)number_field(L, options, "min_models", 1);
    info->max_models = (int)number_field(L, options, "max_models", 0);
    m->spec.whole_tensor = field_is(L, options, keep, "scope", "tensor");
    m->spec.merge = merge_tile;
    m->spec.user = m;
    lua_pop(L, 1);
}

static void push_registry(lua_State *L) {
    if (lua_getfield(L, LUA_REGISTRYINDEX, METHODS) == LUA_TTABLE) return;
    lua_pop(L, 1);
    lua_newtable(L);
    lua_pushvalue(L, -1);
    lua_setfield(L, LUA_REGISTRYINDEX, METHODS);
}

/* register_method(name, function, options), or (name, nil): forgets it */
int obm_lua_register_method(lua_State *L) {
    lua_settop(L, 3);
    const char *name = obm_lua_string(L, 1);
    push_registry(L);
    if (lua_isnil(L, 2)) {
        if (lua_getfield(L, 4, name) == LUA_TNIL) return luaL_error(L, "no method \"%s\" is registered", name);
        lua_pushnil(L);
        lua_setfield(L, 4, name);
        return 0;
    }
    luaL_checktype(L, 2, LUA_TFUNCTION);
    luaL_checktype(L, 3, LUA_TTABLE);
    lua_newtable(L); /* 5: keep */
    lua_createtable(L, 2, 0);
    lua_pushvalue(L, 2);
    lua_rawseti(L, -2, 1);
    lua_pushvalue(L, 3);
    lua_rawseti(L, -2, 2);
    obm_lua_method m = {0};
    obm_error err;
    read_entry(L, 5, name, &m);
    if (obm_custom_method_check(&m.spec, &err) != OBM_OK) return luaL_error(L, "%s", err.message);
    lua_setfield(L, 4, name);
    return 0;
}

/* ---- lists for one call ---- */

static void add_method(lua_State *L, int keep, obm_lua_methods *list, const char *name) {
    obm_lua_method *m = &list->items[list->n];
    read_entry(L, keep, name, m);
    list->specs[list->n++] = &m->spec;
    lua_geti(L, -1, 1);
    lua_rawseti(L, list->functions, (lua_Integer)list->n);
    m->index = (int)list->n;
}

/* A function by itself. */
static void add_function(lua_State *L, int keep, obm_lua_methods *list, int function) {
    lua_createtable(L, 2, 0);
    lua_pushvalue(L, function);
    lua_rawseti(L, -2, 1);
    lua_newtable(L);
    lua_rawseti(L, -2, 2);
    add_method(L, keep, list, "custom");
    lua_pop(L, 1);
    list->method = "custom";
}

void obm_lua_methods_init(lua_State *L, int keep, int method, obm_lua_methods *list) {
    *list = (obm_lua_methods){0};
    method = method ? lua_absindex(L, method) : 0;
    lua_newtable(L);
    list->functions = lua_gettop(L);
    push_registry(L);
    int registry = lua_gettop(L);
    size_t n = 1;
    for (lua_pushnil(L); lua_next(L, registry); lua_pop(L, 1)) n++;
    list->items = obm_lua_alloc(L, keep, n, sizeof *list->items);
    list->specs = obm_lua_alloc(L, keep, n, sizeof *list->specs);
    for (lua_pushnil(L); lua_next(L, registry); lua_pop(L, 1))
        add_method(L, keep, list, obm_lua_keep(L, keep, lua_gettop(L) - 1));
    lua_settop(L, list->functions);
    if (method && lua_type(L, method) == LUA_TFUNCTION)
        add_function(L, keep, list, method);
    else if (method && !lua_isnil(L, method))
        list->method = obm_lua_string(L, method);
}

void obm_lua_methods_begin(obm_lua_methods *list, obm_lua_call *call) {
    for (size_t i = 0; i < list->n; i++) list->items[i].call = call;
    for (size_t i = 0; i < list->n; i++) list->items[i].functions = list->functions;
}

const obm_custom_method *obm_lua_methods_find(const obm_lua_methods *list) {
    for (size_t i = list->n; i-- > 0;)
        if (list->method && !strcmp(list->specs[i]->info.name, list->method)) return list->specs[i];
    return NULL;
}

/* ---- one tile ---- */

typedef struct tile_arguments {
    const obm_lua_method *method;
    const obm_merge_tile *tile;
    obm_status status;
    obm_error *err;
} tile_arguments;

static void push_value(lua_State *L, const obm_param_info *p, double value) {
    if (p->is_bool)
        lua_pushboolean(L, value != 0);
    else
        lua_pushnumber(L, value);
}

static void push_parameters(lua_State *L, const obm_lua_method *m, const obm_merge_tile *t) {
    const obm_method_info *info = &m->spec.info;
    lua_createtable(L, 0, (int)info->n_params);
    for (size_t i = 0; i < info->n_params; i++) {
        const obm_param_info *p = &info->params[i];
        const double *values = t->values + i * t->n_models;
        if (p->scope == OBM_PARAM_GLOBAL) {
            push_value(L, p, values[0]);
        } else {
            lua_createtable(L, (int)t->n_models, 0);
            for (size_t j = 0; j < t->n_models; j++) {
                push_value(L, p, values[j]);
                lua_rawseti(L, -2, (lua_Integer)j + 1);
            }
        }
        lua_setfield(L, -2, p->name);
    }
}

/* Pushes the tile; lent gets the n_models + 1 tensors that end with the call, NULL for what is not there. */
static void push_tile(lua_State *L, const obm_lua_method *m, const obm_merge_tile *t, obm_lua_box **lent) {
    lua_createtable(L, 0, 6);
    obm_lua_set_string(L, "tensor", t->tensor);
    obm_lua_set_integer(L, "begin", t->begin + 1);
    lua_createtable(L, t->ndim, 0);
    for (int i = 0; i < t->ndim; i++) {
        lua_pushinteger(L, t->shape[i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "shape");
    lua_createtable(L, (int)t->n_models, 0);
    for (size_t i = 0; i < t->n_models; i++) {
        lent[i] = obm_lua_tensor_lend(L, t->vectors + i * t->count, (int64_t)t->count);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    lua_setfield(L, -2, "vectors");
    if (t->base) lent[t->n_models] = obm_lua_tensor_lend(L, t->base, (int64_t)t->count);
    if (t->base) lua_setfield(L, -2, "base");
    push_parameters(L, m, t);
    lua_setfield(L, -2, "parameters");
}

static obm_status wrong_answer(const tile_arguments *a, obm_status code, const char *found) {
    obm_error *e = a->err;
    e->code = code;
    snprintf(e->message, sizeof e->message,
             "%.200s: the method %s gave %.64s, expected a tensor of F32 and shape (%zu)",
             a->tile->tensor[0] ? a->tile->tensor : "the tensor", a->method->spec.info.name, found, a->tile->count);
    return code;
}

static obm_status take_answer(lua_State *L, const tile_arguments *a) {
    if (lua_isnil(L, -1)) return wrong_answer(a, OBM_E_DTYPE, "nothing");
    obm_lua_box *b = luaL_testudata(L, -1, OBM_LUA_TENSOR);
    if (!b || !b->p) return wrong_answer(a, OBM_E_DTYPE, b ? "a closed tensor" : luaL_typename(L, -1));
    const obm_tensor *t = b->p;
    if (t->dtype != OBM_F32) return wrong_answer(a, OBM_E_DTYPE, obm_dtype_name(t->dtype));
    char shape[64];
    snprintf(shape, sizeof shape, "%d dimensions and %lld elements", t->ndim, (long long)obm_tensor_count(t));
    if (t->ndim != 1 || (size_t)t->shape[0] != a->tile->count) return wrong_answer(a, OBM_E_SHAPE, shape);
    memmove(a->tile->out, t->data, a->tile->count * sizeof *a->tile->out);
    return OBM_OK;
}

static int tile_body(lua_State *L) {
    tile_arguments *a = lua_touserdata(L, 2);
    size_t n = a->tile->n_models + 1;
    obm_lua_box **lent = lua_newuserdatauv(L, n * sizeof *lent, 0);
    memset(lent, 0, n * sizeof *lent);
    lua_rawgeti(L, 1, a->method->index);
    push_tile(L, a->method, a->tile, lent);
    int status = lua_pcall(L, 1, 1, 0);
    if (status == LUA_OK) a->status = take_answer(L, a);
    for (size_t i = 0; i < n; i++)
        if (lent[i]) obm_lua_box_close(lent[i]); /* the next tile has the same memory */
    return status == LUA_OK ? 0 : lua_error(L);
}

static obm_status merge_tile(void *user, const obm_merge_tile *tile, obm_error *err) {
    obm_lua_method *m = user;
    obm_error own;
    tile_arguments a = {m, tile, OBM_OK, err ? err : &own};
    return obm_lua_run(m->call, tile_body, m->functions, &a) ? a.status : OBM_E_USER;
}
