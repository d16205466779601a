/* Tokenizer: ids and back, the built-in chat template. */
#include "obm_lua.h"

static const obm_tokenizer *check(lua_State *L) { return obm_lua_box_check(L, 1, OBM_LUA_TOKENIZER)->p; }

static void release(void *own) { obm_tokenizer_free(own); }

int obm_lua_tokenizer(lua_State *L) {
    const char *path = obm_lua_string(L, 1);
    lua_settop(L, 1);
    obm_context *ctx = obm_lua_context(L);
    obm_lua_box *b = obm_lua_box_new(L, sizeof *b, OBM_LUA_TOKENIZER, release);
    obm_lua_box_parent(L, b, 0, 2);
    obm_tokenizer *t;
    obm_error err;
    if (obm_tokenizer_open(ctx, path, &t, &err) != OBM_OK) {
        obm_lua_box_close(b);
        return obm_lua_fail(L, &err);
    }
    obm_lua_box_fill(b, t);
    return 1;
}

void obm_lua_tokenizer_borrow(lua_State *L, const obm_tokenizer *t, int owner) {
    obm_lua_box *b = obm_lua_box_new(L, sizeof *b, OBM_LUA_TOKENIZER, NULL);
    obm_lua_box_parent(L, b, 0, owner);
    b->p = t;
}

/* tokenizer:encode(text, {special = true}) -> ids; the text may hold NULs */
static int tokenizer_encode(lua_State *L) {
    const obm_tokenizer *t = check(L);
    size_t len, n;
    const char *text = luaL_checklstring(L, 2, &len);
    obm_lua_options(L, 3, "special");
    bool special = obm_lua_field_boolean(L, 3, "special", true);
    int32_t **ids = obm_lua_scratch(L, sizeof *ids, obm_lua_clear_pointer);
    obm_error err;
    if (obm_tokenizer_encode(t, text, len, special, ids, &n, &err) != OBM_OK) return obm_lua_fail(L, &err);
    obm_lua_push_ids(L, *ids, n);
    obm_lua_scratch_end(ids);
    return 1;
}

/* tokenizer:decode(ids, {skip_special = false}) -> text */
static int tokenizer_decode(lua_State *L) {
    const obm_tokenizer *t = check(L);
    obm_lua_options(L, 3, "skip_special");
    bool skip = obm_lua_field_boolean(L, 3, "skip_special", false);
    lua_newtable(L);
    size_t n, len;
    const int32_t *ids = obm_lua_ids(L, -1, 2, &n);
    char **text = obm_lua_scratch(L, sizeof *text, obm_lua_clear_pointer);
    obm_error err;
    if (obm_tokenizer_decode(t, ids, n, skip, text, &len, &err) != OBM_OK) return obm_lua_fail(L, &err);
    lua_pushlstring(L, *text, len);
    obm_lua_scratch_end(text);
    return 1;
}

/* tokenizer:apply_template(messages, {add_generation = true, name = nil}) -> text; the template that is built in */
static int tokenizer_apply_template(lua_State *L) {
    const obm_tokenizer *t = check(L);
    obm_lua_options(L, 3, "add_generation name");
    bool add = obm_lua_field_boolean(L, 3, "add_generation", true);
    lua_newtable(L);
    const char *name = obm_lua_field_string(L, 3, lua_gettop(L), "name");
    obm_lua_prompts prompts;
    obm_lua_prompts_from(L, -1, 2, &prompts);
    if (!prompts.single || !prompts.items[0].messages)
        return luaL_argerror(L, 2, "a list of messages expected ({ role = ..., content = ... })");
    char **text = obm_lua_scratch(L, sizeof *text, obm_lua_clear_pointer);
    obm_error err;
    if (obm_tokenizer_builtin_template(t, name, prompts.items[0].messages, prompts.items[0].n_messages, add, text,
                                       &err) != OBM_OK)
        return obm_lua_fail(L, &err);
    lua_pushstring(L, *text);
    obm_lua_scratch_end(text);
    return 1;
}

/* nil for an id without a piece */
static int tokenizer_piece(lua_State *L) {
    const obm_tokenizer *t = check(L);
    lua_Integer id = luaL_checkinteger(L, 2);
    lua_pushstring(L, id < 0 || id > INT32_MAX ? NULL : obm_tokenizer_piece(t, (int32_t)id));
    return 1;
}

static int tokenizer_id(lua_State *L) {
    int32_t id = obm_tokenizer_id(check(L), obm_lua_string(L, 2));
    if (id < 0)
        lua_pushnil(L);
    else
        lua_pushinteger(L, id);
    return 1;
}

static int tokenizer_template_name(lua_State *L) {
    lua_pushstring(L, obm_tokenizer_template_name(check(L)));
    return 1;
}

static int tokenizer_template(lua_State *L) {
    lua_pushstring(L, obm_tokenizer_template(check(L)));
    return 1;
}

static int tokenizer_bos(lua_State *L) {
    lua_pushstring(L, obm_tokenizer_bos(check(L)));
    return 1;
}

static int tokenizer_eos(lua_State *L) {
    lua_pushstring(L, obm_tokenizer_eos(check(L)));
    return 1;
}

static int tokenizer_len(lua_State *L) {
    lua_pushinteger(L, (lua_Integer)obm_tokenizer_size(check(L)));
    return 1;
}

static const luaL_Reg tokenizer_methods[] = {{"encode", tokenizer_encode},
                                             {"decode", tokenizer_decode},
                                             {"apply_template", tokenizer_apply_template},
                                             {"builtin_template", tokenizer_apply_template},
                                             {"piece", tokenizer_piece},
                                             {"id", tokenizer_id},
                                             {"template", tokenizer_template},
                                             {"template_name", tokenizer_template_name},
                                             {"bos", tokenizer_bos},
                                             {"eos", tokenizer_eos},
                                             {NULL, NULL}};
static const luaL_Reg tokenizer_meta[] = {{"__len", tokenizer_len}, {NULL, NULL}};

void obm_lua_open_tokenizer(lua_State *L) {
    obm_lua_type(L, OBM_LUA_TOKENIZER, tokenizer_methods, NULL, tokenizer_meta, NULL);
}
