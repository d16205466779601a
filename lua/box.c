/* Handles, metatables, scratch memory and errors: what all types of the module have in common. */
#include "obm_lua.h"

#include <string.h>

/* ---- handles ---- */

void *obm_lua_box_new(lua_State *L, size_t size, const char *type, void (*release)(void *own)) {
    obm_lua_box *b = lua_newuserdatauv(L, size, 3);
    memset(b, 0, size);
    b->type = type;
    b->release = release;
    luaL_setmetatable(L, type);
    return b;
}

void obm_lua_box_fill(obm_lua_box *b, void *own) { b->p = b->own = own; }

void obm_lua_box_parent(lua_State *L, obm_lua_box *b, int slot, int parent) {
    obm_lua_box *up = lua_touserdata(L, parent);
    lua_pushvalue(L, parent);
    lua_setiuservalue(L, -2, slot + 1);
    b->parents[slot] = up;
    up->refs++;
}

static void free_if_unused(obm_lua_box *b) {
    if (b->p || b->refs || !b->own) return;
    void *own = b->own;
    b->own = NULL;
    b->release(own);
}

static void settle(obm_lua_box *b);

static void release_parents(obm_lua_box *b) {
    for (int i = 0; i < 3; i++) {
        obm_lua_box *up = b->parents[i];
        if (!up) continue;
        b->parents[i] = NULL;
        if (b->is_view) up->views--;
        up->refs--;
        settle(up);
    }
}

/* Children first: what lends to this object may be freed only after it. */
static void settle(obm_lua_box *b) {
    free_if_unused(b);
    if (!b->p && !b->own && !b->refs) release_parents(b);
}

void obm_lua_box_close(obm_lua_box *b) {
    b->p = NULL;
    settle(b);
}

static void count_call(obm_lua_box *b, int change) {
    b->calls += change;
    for (int i = 0; i < 3; i++) {
        if (b->parents[i]) count_call(b->parents[i], change);
    }
}

void obm_lua_box_hold(obm_lua_box *b) {
    b->refs++;
    count_call(b, 1);
}

void obm_lua_box_drop(obm_lua_box *b) {
    count_call(b, -1);
    b->refs--;
    settle(b);
}

obm_lua_box *obm_lua_box_check(lua_State *L, int at, const char *type) {
    obm_lua_box *b = luaL_checkudata(L, at, type);
    luaL_argcheck(L, b->p, at, "the object is closed");
    return b;
}

/* The type is an upvalue, so that no other userdata can be passed in its place. */
static int box_close(lua_State *L) {
    obm_lua_box_close(luaL_checkudata(L, 1, lua_tostring(L, lua_upvalueindex(1))));
    return 0;
}

/* Upvalues: methods, fields, the function behind both or nil. */
static int box_index(lua_State *L) {
    lua_pushvalue(L, 2);
    if (lua_gettable(L, lua_upvalueindex(1)) != LUA_TNIL) return 1;
    lua_pushvalue(L, 2);
    if (lua_gettable(L, lua_upvalueindex(2)) == LUA_TNIL) lua_pushvalue(L, lua_upvalueindex(3));
    if (lua_isnil(L, -1)) return 1;
    lua_pushvalue(L, 1);
    lua_pushvalue(L, 2);
    lua_call(L, 2, 1);
    return 1;
}

static void push_functions(lua_State *L, const luaL_Reg *list) {
    lua_newtable(L);
    if (list) luaL_setfuncs(L, list, 0);
}

void obm_lua_type(lua_State *L, const char *type, const luaL_Reg *methods, const luaL_Reg *fields, const luaL_Reg *meta,
                  lua_CFunction index) {
    luaL_newmetatable(L, type);
    if (meta) luaL_setfuncs(L, meta, 0);
    push_functions(L, methods);
    push_functions(L, fields);
    if (index)
        lua_pushcfunction(L, index);
    else
        lua_pushnil(L);
    lua_pushcclosure(L, box_index, 3);
    lua_setfield(L, -2, "__index");
    lua_pushstring(L, type);
    lua_pushcclosure(L, box_close, 1);
    lua_pushvalue(L, -1);
    lua_setfield(L, -3, "__gc");
    lua_setfield(L, -2, "__close");
    lua_pop(L, 1);
}

/* ---- errors ---- */

int obm_lua_fail(lua_State *L, const obm_error *err) {
    return err->code == OBM_E_ARG ? luaL_error(L, "%s", err->message) : obm_lua_answer(L, err);
}

int obm_lua_answer(lua_State *L, const obm_error *err) {
    lua_pushnil(L);
    lua_pushfstring(L, "%s%s", err->message, err->code == OBM_E_EXISTS ? "; overwrite = true replaces it" : "");
    lua_pushstring(L, obm_status_name(err->code));
    return 3;
}

/* ---- memory ---- */

void *obm_lua_alloc(lua_State *L, int keep, size_t n, size_t size) {
    keep = lua_absindex(L, keep);
    if (size && n > (SIZE_MAX / 2) / size) luaL_error(L, "not enough memory");
    void *memory = lua_newuserdatauv(L, n * size + 1, 0);
    memset(memory, 0, n * size + 1);
    lua_rawseti(L, keep, (lua_Integer)lua_rawlen(L, keep) + 1);
    return memory;
}

const char *obm_lua_keep(lua_State *L, int keep, int at) {
    keep = lua_absindex(L, keep);
    const char *s = obm_lua_string(L, at);
    lua_pushvalue(L, at);
    lua_rawseti(L, keep, (lua_Integer)lua_rawlen(L, keep) + 1);
    return s;
}

typedef struct scratch {
    void (*clear)(void *);
    long double align;
} scratch; /* aligned as malloc's memory is */

void *obm_lua_scratch(lua_State *L, size_t size, void (*clear)(void *memory)) {
    scratch *s = lua_newuserdatauv(L, sizeof *s + size, 0);
    memset(s, 0, sizeof *s + size);
    s->clear = clear;
    luaL_setmetatable(L, "onebitmerge.scratch");
    return s + 1;
}

static void scratch_clear(scratch *s) {
    void (*clear)(void *) = s->clear;
    s->clear = NULL;
    if (clear) clear(s + 1);
}

void obm_lua_scratch_end(void *memory) { scratch_clear((scratch *)memory - 1); }

void obm_lua_clear_pointer(void *memory) { obm_free(*(void **)memory); }

static int scratch_gc(lua_State *L) {
    scratch_clear(luaL_checkudata(L, 1, "onebitmerge.scratch"));
    return 0;
}

/* ---- the default context ---- */

/* Standard Lua's channel for warnings: shown by `lua -W` or warn("@on"). */
static void log_warning(void *user, const char *message) {
    lua_State *L = user;
    lua_warning(L, "onebitmerge: ", 1);
    lua_warning(L, message, 0);
}

/* The lua program's Ctrl-C is a hook of the main thread, with these masks, that raises an error; it gets to run once
 * the call has returned, also one inside a coroutine. */
static int interrupted(void *user) {
    lua_State *L = user;
    const int all = LUA_MASKCALL | LUA_MASKRET | LUA_MASKLINE | LUA_MASKCOUNT;
    return lua_gethook(L) && lua_gethookmask(L) == all && lua_gethookcount(L) == 1;
}

static void context_release(void *own) { obm_context_free(own); }

static obm_context *context_new(lua_State *L, int64_t threads, obm_numa numa) {
    obm_lua_box *b = obm_lua_box_new(L, sizeof *b, OBM_LUA_CONTEXT, context_release);
    obm_context_options options = OBM_INIT(obm_context_options);
    options.threads = threads;
    options.numa = numa;
    options.log = log_warning;
    lua_rawgeti(L, LUA_REGISTRYINDEX, LUA_RIDX_MAINTHREAD);
    options.log_user = options.interrupt_user = lua_tothread(L, -1);
    options.interrupt = interrupted;
    lua_pop(L, 1);
    obm_context *ctx;
    obm_error err;
    if (obm_context_new(&options, &ctx, &err) != OBM_OK) luaL_error(L, "%s", err.message);
    obm_lua_box_fill(b, ctx);
    lua_pushvalue(L, -1);
    lua_setfield(L, LUA_REGISTRYINDEX, "onebitmerge.default"); /* objects that are open keep the old one */
    return ctx;
}

obm_context *obm_lua_context(lua_State *L) {
    if (lua_getfield(L, LUA_REGISTRYINDEX, "onebitmerge.default") == LUA_TUSERDATA)
        return (obm_context *)((obm_lua_box *)lua_touserdata(L, -1))->p;
    lua_pop(L, 1);
    return context_new(L, 0, OBM_NUMA_AUTO);
}

int obm_lua_set_threads(lua_State *L) {
    lua_Integer n = luaL_checkinteger(L, 1);
    context_new(L, n, obm_lua_numa(L, lua_isnoneornil(L, 2) ? NULL : obm_lua_string(L, 2)));
    lua_pushboolean(L, 1);
    return 1;
}

void obm_lua_open_box(lua_State *L) {
    obm_lua_type(L, OBM_LUA_CONTEXT, NULL, NULL, NULL, NULL);
    luaL_newmetatable(L, "onebitmerge.scratch");
    lua_pushcfunction(L, scratch_gc);
    lua_setfield(L, -2, "__gc");
    lua_pop(L, 1);
}
