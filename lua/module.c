/* The module onebitmerge.core: types and module functions; init.lua puts the sugar on top. */
#include "obm_lua.h"

static int module_info(lua_State *L) {
    obm_context_info i;
    obm_context_describe(obm_lua_context(L), &i);
    lua_newtable(L);
    obm_lua_set_string(L, "version", obm_version());
    obm_lua_set_string(L, "isa", i.isa);
    obm_lua_set_string(L, "isa_available", i.isa_available);
    obm_lua_set_string(L, "blas", i.blas);
    obm_lua_set_string(L, "topology", i.topology);
    obm_lua_set_string(L, "compiler", i.compiler);
    obm_lua_set_integer(L, "threads", (uint64_t)i.threads);
    obm_lua_set_integer(L, "cores", (uint64_t)i.cores);
    obm_lua_set_integer(L, "nodes", (uint64_t)i.nodes);
    obm_lua_set_integer(L, "memory_total", i.memory_total);
    obm_lua_set_integer(L, "memory_free", i.memory_free);
    obm_lua_set_boolean(L, "prefill_bf16", i.prefill_bf16);
    obm_lua_set_boolean(L, "z12_auto", i.z12_auto);
    return 1;
}

static int module_class_of(lua_State *L) {
    lua_pushstring(L, obm_class_name(obm_class_of(obm_lua_string(L, 1), (int32_t)luaL_optinteger(L, 2, 2))));
    return 1;
}

/* _register(name, value): what init.lua lends to the C side: "json" reads JSON, "progress_bar" is what progress = true
 * means. */
static int module_register(lua_State *L) {
    lua_pushfstring(L, "onebitmerge.%s", luaL_checkstring(L, 1));
    lua_pushvalue(L, 2);
    lua_settable(L, LUA_REGISTRYINDEX);
    return 0;
}

/* _metatable(type name): for init.lua's __tostring functions. */
static int module_metatable(lua_State *L) {
    lua_pushfstring(L, "onebitmerge.%s", luaL_checkstring(L, 1));
    lua_gettable(L, LUA_REGISTRYINDEX);
    return 1;
}

static const luaL_Reg module_functions[] = {{"checkpoint", obm_lua_checkpoint},
                                            {"task_vector", obm_lua_task_vector},
                                            {"compress", obm_lua_compress},
                                            {"pack", obm_lua_pack},
                                            {"model", obm_lua_model},
                                            {"tokenizer", obm_lua_tokenizer},
                                            {"merge", obm_lua_merge},
                                            {"merge_tensors", obm_lua_merge_tensors},
                                            {"register_method", obm_lua_register_method},
                                            {"methods", obm_lua_list_methods},
                                            {"extract_lora", obm_lua_extract_lora},
                                            {"plan", obm_lua_plan},
                                            {"info", module_info},
                                            {"set_threads", obm_lua_set_threads},
                                            {"class_of", module_class_of},
                                            {"_register", module_register},
                                            {"_metatable", module_metatable},
                                            {NULL, NULL}};

__attribute__((visibility("default"))) int luaopen_onebitmerge_core(lua_State *L) {
    luaL_checkversion(L);
    if (obm_abi_version() != OBM_ABI_VERSION)
        return luaL_error(L, "onebitmerge: the library has ABI %d, this module was built for %d", obm_abi_version(),
                          OBM_ABI_VERSION);
    obm_lua_open_box(L);
    obm_lua_open_tensor(L);
    obm_lua_open_checkpoint(L);
    obm_lua_open_pack(L);
    obm_lua_open_tokenizer(L);
    obm_lua_open_model(L);
    obm_lua_open_request(L);
    luaL_newlib(L, module_functions);
    lua_pushstring(L, obm_version());
    lua_setfield(L, -2, "version");
    return 1;
}
