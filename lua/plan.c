/* Placement plans. */
#include "obm_lua.h"

obm_numa obm_lua_numa(lua_State *L, const char *name) {
    obm_numa numa = OBM_NUMA_AUTO;
    obm_error err;
    if (name && obm_numa_find(name, &numa, &err) != OBM_OK) luaL_error(L, "%s", err.message);
    return numa;
}

/* plan(model, {topology, numa, threads, base, z12, kv}) -> table */
int obm_lua_plan(lua_State *L) {
    lua_settop(L, 2);
    obm_lua_options(L, 2, "topology numa threads base z12 kv");
    lua_newtable(L);
    const char *path = obm_lua_string(L, 1);
    obm_context *ctx = obm_lua_context(L);
    obm_model_plan_options o = OBM_INIT(obm_model_plan_options);
    o.topology = obm_lua_field_string(L, 2, 3, "topology");
    o.numa = obm_lua_numa(L, obm_lua_field_string(L, 2, 3, "numa"));
    o.threads = obm_lua_field_integer(L, 2, "threads");
    o.base = obm_lua_field_string(L, 2, 3, "base");
    o.z12 = obm_lua_field_z12(L, 2);
    o.kv = obm_lua_field_dtype(L, 2, "kv", OBM_F16);
    char **json = obm_lua_scratch(L, sizeof *json, obm_lua_clear_pointer);
    obm_error err;
    if (obm_model_plan(ctx, path, &o, json, &err) != OBM_OK) return obm_lua_fail(L, &err);
    lua_getfield(L, LUA_REGISTRYINDEX, "onebitmerge.json");
    lua_pushstring(L, *json);
    obm_lua_scratch_end(json);
    lua_call(L, 1, 1);
    return 1;
}
