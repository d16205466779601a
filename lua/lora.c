/* LoRA adapters out of fine-tunes. */
#include "obm_lua.h"

static void push_matrix(lua_State *L, const obm_lora_matrix *m) {
    lua_newtable(L);
    obm_lua_set_string(L, "name", m->name);
    obm_lua_set_integer(L, "rows", (uint64_t)m->rows);
    obm_lua_set_integer(L, "cols", (uint64_t)m->cols);
    obm_lua_set_integer(L, "rank", (uint64_t)m->rank);
    obm_lua_set_number(L, "norm", m->norm);
    obm_lua_set_number(L, "energy", m->energy);
}

/* extract_lora(base, expert, out, {rank, energy, dtype, base_name, overwrite, dry_run, progress}) -> list of matrices,
 * or the plan of a dry run */
int obm_lua_extract_lora(lua_State *L) {
    lua_settop(L, 4);
    obm_lua_options(L, 4, "rank energy dtype base_name overwrite dry_run progress");
    lua_newtable(L);
    const char *base = obm_lua_string(L, 1), *expert = obm_lua_string(L, 2), *out = obm_lua_string(L, 3);
    obm_context *ctx = obm_lua_context(L);
    obm_lora_options options = OBM_INIT(obm_lora_options);
    options.rank = obm_lua_field_integer(L, 4, "rank");
    options.energy = obm_lua_field_number(L, 4, "energy");
    options.dtype = obm_lua_field_string(L, 4, 5, "dtype");
    options.base_name = obm_lua_field_string(L, 4, 5, "base_name");
    options.overwrite = obm_lua_field_boolean(L, 4, "overwrite", false);
    options.dry_run = obm_lua_field_boolean(L, 4, "dry_run", false);
    obm_lua_call call;
    obm_lua_call_init(L, &call, 4, false);
    options.progress = obm_lua_progress;
    options.progress_user = &call;
    obm_lora_matrix **matrices = obm_lua_scratch(L, sizeof *matrices, obm_lua_clear_pointer);
    obm_plan plan = {0};
    size_t n = 0;
    obm_error err;
    obm_lua_begin(&call, lua_touserdata(L, 6));
    int failed =
        obm_lua_end(&call, obm_extract_lora(ctx, base, expert, &options, out, &plan, matrices, &n, &err), &err);
    if (failed) return failed;
    if (options.dry_run) {
        obm_lua_push_plan(L, &plan);
        return 1;
    }
    lua_createtable(L, (int)n, 0);
    for (size_t i = 0; i < n; i++) {
        push_matrix(L, &(*matrices)[i]);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    obm_lua_scratch_end(matrices);
    return 1;
}
