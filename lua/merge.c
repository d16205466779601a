/* Static merges: recipes to folders, tensors to tensors, the method table. */
#include "obm_lua.h"

/* merge(recipe text, out, {profile, directory, seed, shard_bytes, memory, overwrite, resume, dry_run,
 * method, progress}) ->
 * plan; init.lua makes the text out of a table or a file. */
int obm_lua_merge(lua_State *L) {
    lua_settop(L, 3);
    obm_lua_options(L, 3, "profile directory seed shard_bytes memory overwrite resume dry_run method progress");
    lua_newtable(L);
    const char *recipe = obm_lua_string(L, 1), *out = obm_lua_string(L, 2);
    obm_context *ctx = obm_lua_context(L);
    obm_merge_options options = OBM_INIT(obm_merge_options);
    options.profile = obm_lua_field_profile(L, 3, "profile");
    options.directory = obm_lua_field_string(L, 3, 4, "directory");
    options.has_seed = lua_getfield(L, 3, "seed") != LUA_TNIL;
    lua_pop(L, 1);
    options.seed = (uint64_t)obm_lua_field_integer(L, 3, "seed");
    options.shard_bytes = obm_lua_field_size(L, 3, "shard_bytes");
    options.memory = obm_lua_field_size(L, 3, "memory");
    options.overwrite = obm_lua_field_boolean(L, 3, "overwrite", false);
    options.resume = obm_lua_field_boolean(L, 3, "resume", false);
    bool dry_run = obm_lua_field_boolean(L, 3, "dry_run", false);
    obm_lua_call call;
    obm_lua_call_init(L, &call, 3, false);
    call.answers = true; /* a recipe is data */
    options.progress = obm_lua_progress;
    options.progress_user = &call;
    obm_lua_methods methods;
    lua_getfield(L, 3, "method");
    obm_lua_methods_init(L, 4, lua_gettop(L), &methods);
    obm_lua_methods_begin(&methods, &call);
    options.method = methods.method;
    options.methods = methods.specs;
    options.n_methods = methods.n;
    obm_plan plan = {0};
    obm_error err;
    void *held = lua_touserdata(L, 5);
    char **json = obm_lua_scratch(L, sizeof *json, obm_lua_clear_pointer);
    obm_lua_begin(&call, held);
    obm_status status = dry_run ? obm_merge_plan(ctx, recipe, &options, out, json, &err)
                                : obm_merge(ctx, recipe, &options, out, &plan, &err);
    int failed = obm_lua_end(&call, status, &err);
    if (failed) return failed;
    if (!dry_run) {
        obm_lua_push_plan(L, &plan);
        return 1;
    }
    lua_getfield(L, LUA_REGISTRYINDEX, "onebitmerge.json");
    lua_pushstring(L, *json);
    obm_lua_scratch_end(json);
    lua_call(L, 1, 1);
    return 1;
}

typedef struct param_list {
    obm_param *items;
    size_t n;
} param_list;

static double param_value(lua_State *L, const char *name) {
    if (lua_isboolean(L, -1)) return lua_toboolean(L, -1);
    if (lua_type(L, -1) != LUA_TNUMBER)
        luaL_error(L, "parameter %s: expected number, boolean or a sequence of those, found %s", name,
                   luaL_typename(L, -1));
    return lua_tonumber(L, -1);
}

/* Calls with items NULL count. */
static size_t read_params(lua_State *L, int at, int keep, obm_param *items) {
    size_t n = 0;
    for (lua_pushnil(L); lua_next(L, at); lua_pop(L, 1)) {
        if (lua_type(L, -2) != LUA_TSTRING)
            luaL_error(L, "params is a table of names to a number, or one number per model");
        const char *name = items ? obm_lua_keep(L, keep, lua_absindex(L, -2)) : lua_tostring(L, -2);
        if (lua_type(L, -1) != LUA_TTABLE) {
            double v = param_value(L, name);
            if (items) items[n] = (obm_param){name, -1, v};
            n++;
            continue;
        }
        lua_Integer count = luaL_len(L, -1);
        for (lua_Integer i = 0; i < count; i++, n++, lua_pop(L, 1)) {
            lua_geti(L, -1, i + 1);
            double v = param_value(L, name);
            if (items) items[n] = (obm_param){name, (int)i, v};
        }
    }
    return n;
}

/* A number is a global parameter, a sequence one value per model. */
static param_list params_from(lua_State *L, int at, int keep) {
    param_list p = {0};
    if (lua_isnil(L, at)) return p;
    luaL_checktype(L, at, LUA_TTABLE);
    p.n = read_params(L, at, keep, NULL);
    p.items = obm_lua_alloc(L, keep, p.n, sizeof *p.items);
    read_params(L, at, keep, p.items);
    return p;
}

/* merge_tensors(method, models, base, params, {profile, seed}) -> tensor, f32 */
int obm_lua_merge_tensors(lua_State *L) {
    lua_settop(L, 5);
    if (lua_type(L, 1) != LUA_TFUNCTION) obm_lua_string(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    obm_lua_options(L, 5, "profile seed");
    lua_newtable(L);
    const int keep = 6;
    size_t n = (size_t)luaL_len(L, 2);
    obm_tensor *models = obm_lua_alloc(L, keep, n, sizeof *models), base;
    for (size_t i = 0; i < n; i++, lua_pop(L, 1)) {
        lua_geti(L, 2, (lua_Integer)i + 1);
        models[i] = obm_lua_tensor_import(L, keep, -1);
    }
    bool has_base = !lua_isnil(L, 3);
    if (has_base) base = obm_lua_tensor_import(L, keep, 3);
    if (!n && !has_base) return luaL_argerror(L, 2, "no models");
    param_list params = params_from(L, 4, keep);
    obm_profile profile = obm_lua_field_profile(L, 5, "profile");
    uint64_t seed = (uint64_t)obm_lua_field_integer(L, 5, "seed");
    obm_context *ctx = obm_lua_context(L);
    const obm_tensor *shape = n ? &models[0] : &base;
    float *out = obm_lua_tensor_new(L, shape->ndim, shape->shape);
    int result = lua_gettop(L);
    obm_lua_methods methods;
    obm_lua_call call;
    obm_lua_methods_init(L, keep, 1, &methods);
    obm_lua_call_init(L, &call, 0, false);
    obm_lua_methods_begin(&methods, &call);
    const obm_custom_method *own = obm_lua_methods_find(&methods);
    obm_error err;
    obm_lua_begin(&call, NULL);
    obm_status status = own ? obm_merge_tensors_custom(ctx, own, profile, has_base ? &base : NULL, models, n,
                                                       params.items, params.n, seed, out, &err)
                            : obm_merge_tensors(ctx, methods.method, profile, has_base ? &base : NULL, models, n,
                                                params.items, params.n, seed, out, &err);
    int failed = obm_lua_end(&call, status, &err);
    if (failed) return failed;
    lua_settop(L, result);
    return 1;
}

static void push_param(lua_State *L, const obm_param_info *p) {
    lua_newtable(L);
    obm_lua_set_string(L, "name", p->name);
    obm_lua_set_string(L, "doc", p->doc);
    obm_lua_set_string(L, "scope", p->scope == OBM_PARAM_GLOBAL ? "global" : "model");
    obm_lua_set_boolean(L, "required", p->required);
    obm_lua_set_number(L, "default", p->dflt);
    obm_lua_set_number(L, "min", p->min);
    obm_lua_set_number(L, "max", p->max);
    obm_lua_set_string(L, "type", p->is_bool ? "bool" : "number");
}

static void push_method(lua_State *L, const obm_method_info *m) {
    lua_newtable(L);
    obm_lua_set_string(L, "name", m->name);
    obm_lua_set_string(L, "doc", m->doc);
    obm_lua_set_string(L, "source", m->source);
    obm_lua_set_boolean(L, "needs_base", m->needs_base);
    obm_lua_set_integer(L, "min_models", (uint64_t)m->min_models);
    obm_lua_set_integer(L, "max_models", (uint64_t)m->max_models);
    lua_newtable(L);
    for (size_t j = 0; j < m->n_params; j++) {
        push_param(L, &m->params[j]);
        lua_rawseti(L, -2, (lua_Integer)j + 1);
    }
    lua_setfield(L, -2, "params");
}

/* methods() -> list of {name, doc, source, needs_base, min_models, max_models, params}: the built-in ones, then those
 * that are registered */
int obm_lua_list_methods(lua_State *L) {
    obm_lua_methods own;
    lua_settop(L, 0);
    lua_newtable(L);
    lua_newtable(L);
    for (size_t i = 0; i < obm_method_count(); i++) {
        push_method(L, obm_method_at(i));
        lua_rawseti(L, 2, (lua_Integer)i + 1);
    }
    obm_lua_methods_init(L, 1, 0, &own);
    for (size_t i = 0; i < own.n; i++) {
        push_method(L, &own.specs[i]->info);
        lua_rawseti(L, 2, (lua_Integer)(obm_method_count() + i) + 1);
    }
    lua_settop(L, 2);
    return 1;
}
