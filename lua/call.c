/* Long calls: progress and router callbacks, what they raise, and requests. */
#include "obm_lua.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int push_callback(lua_State *L, int at, const char *name) {
    int type = lua_getfield(L, at, name);
    if (type == LUA_TNIL || (type == LUA_TBOOLEAN && !lua_toboolean(L, -1))) return 0;
    if (type == LUA_TBOOLEAN) lua_getfield(L, LUA_REGISTRYINDEX, "onebitmerge.progress_bar"), lua_replace(L, -2);
    int place = lua_gettop(L);
    if (lua_type(L, place) != LUA_TFUNCTION && luaL_getmetafield(L, place, "__call") == LUA_TNIL)
        luaL_error(L, "option %s: expected function, found %s", name, luaL_typename(L, place));
    lua_settop(L, place);
    return place;
}

void obm_lua_call_init(lua_State *L, obm_lua_call *c, int at, bool with_router) {
    luaL_checkstack(L, 16, "callbacks");
    *c = (obm_lua_call){.L = L};
    if (at) c->progress = push_callback(L, at, "progress");
    if (at && with_router) {
        if (lua_getfield(L, at, "router") == LUA_TBOOLEAN)
            luaL_error(L, "option router: expected function, found boolean");
        lua_pop(L, 1);
        c->router = push_callback(L, at, "router");
    }
    lua_pushnil(L);
    c->raised = lua_gettop(L);
}

void obm_lua_begin(obm_lua_call *c, obm_lua_box *held) {
    c->held = held;
    if (held) obm_lua_box_hold(held);
}

int obm_lua_end(obm_lua_call *c, obm_status status, const obm_error *err) {
    lua_State *L = c->L;
    bool closed = c->held && !c->held->p;
    if (c->held) obm_lua_box_drop(c->held);
    c->held = NULL;
    if (c->failed) {
        c->failed = false;
        lua_pushvalue(L, c->raised);
        return lua_error(L);
    }
    if (status != OBM_OK) return c->answers ? obm_lua_answer(L, err) : obm_lua_fail(L, err);
    return closed ? luaL_error(L, "a callback closed the object that was at work") : 0;
}

/* The first error counts; later callbacks of the same call must not run Lua code any more. */
bool obm_lua_run(obm_lua_call *c, lua_CFunction body, int callback, void *arguments) {
    lua_State *L = c->L;
    if (c->failed || !lua_checkstack(L, 8)) return false;
    lua_pushcfunction(L, body);
    if (callback)
        lua_pushvalue(L, callback);
    else
        lua_pushnil(L);
    lua_pushlightuserdata(L, arguments);
    if (lua_pcall(L, 2, 0, 0) == LUA_OK) return true;
    lua_replace(L, c->raised);
    c->failed = true;
    return false;
}

typedef struct progress_arguments {
    const char *what;
    uint64_t done, total;
} progress_arguments;

/* Also without a callback: the call of a C function is where a hook that waits gets to run.  The lua program's Ctrl-C
 * is such a hook of the main thread; a call inside a coroutine runs to its end first. */
static int progress_body(lua_State *L) {
    const progress_arguments *a = lua_touserdata(L, 2);
    if (lua_isnil(L, 1)) return 0;
    lua_settop(L, 1);
    lua_pushstring(L, a->what);
    lua_pushinteger(L, (lua_Integer)a->done);
    lua_pushinteger(L, (lua_Integer)a->total);
    lua_call(L, 3, 0);
    return 0;
}

int obm_lua_progress(void *user, const char *what, uint64_t done, uint64_t total) {
    obm_lua_call *c = user;
    double t = now();
    if (t - c->last < 0.03 && done != total) return c->failed;
    c->last = t;
    progress_arguments a = {what, done, total};
    return !obm_lua_run(c, progress_body, c->progress, &a);
}

/* ---- routers ---- */

typedef struct router_arguments {
    obm_lua_call *call;
    obm_request *request;
    double *weights;
    obm_status status;
    obm_error *err;
} router_arguments;

/* The answer at 1 as weights; also checked for what the core would refuse without knowing whose answer it is. */
static int answer_body(lua_State *L) {
    router_arguments *a = lua_touserdata(L, 2);
    char *text = NULL;
    a->status = obm_lua_weights(L, 1, a->call->pack, a->weights, a->err);
    if (a->status == OBM_OK) a->status = obm_pack_format_route(a->call->pack, a->weights, &text, a->err);
    obm_free(text);
    return 0;
}

#define ASKED 60 /* bytes of the text, cut at a character */

/* Pushes "router FILE:LINE, asked about "TEXT": ", which stands before what is wrong with its answer; of what was written
 * in C, or is called by way of a metatable, no place is known. */
static const char *push_router(lua_State *L, int router, const obm_request *request) {
    lua_Debug where = {.linedefined = -1};
    const char *text = obm_request_text(request);
    size_t n = strlen(text);
    if (lua_isfunction(L, router)) {
        lua_pushvalue(L, router);
        lua_getinfo(L, ">S", &where);
    }
    if (n > ASKED)
        for (n = ASKED; n && ((unsigned char)text[n] & 0xC0) == 0x80;) n--;
    const char *asked = lua_pushlstring(L, text, n), *more = text[n] ? "..." : "";
    if (where.linedefined < 0) return lua_pushfstring(L, "router, asked about \"%s%s\": ", asked, more);
    return lua_pushfstring(L, "router %s:%d, asked about \"%s%s\": ", where.short_src, where.linedefined, asked, more);
}

static int take_answer(lua_State *L, router_arguments *a) {
    lua_pushcfunction(L, answer_body);
    lua_pushvalue(L, -2);
    lua_pushlightuserdata(L, a);
    int raised = lua_pcall(L, 2, 0, 0);
    if (raised == LUA_OK && a->status == OBM_OK) return 0;
    if (raised != LUA_OK && lua_type(L, -1) != LUA_TSTRING) return lua_error(L);
    const char *said = raised == LUA_OK ? lua_pushstring(L, a->err->message) : lua_tostring(L, -1);
    const char *text = lua_pushfstring(L, "%s%s", push_router(L, 1, a->request), said);
    if (raised != LUA_OK) return lua_error(L);
    snprintf(a->err->message, sizeof a->err->message, "%s", text);
    return 0;
}

static int router_body(lua_State *L) {
    router_arguments *a = lua_touserdata(L, 2);
    obm_request **slot;
    obm_lua_request_push(L, a->request, a->call->pack, &slot);
    lua_pushvalue(L, 1);
    lua_pushvalue(L, -2);
    int status = lua_pcall(L, 1, 1, 0);
    *slot = NULL; /* a request that the router kept answers nothing any more */
    if (status != LUA_OK) return lua_error(L);
    return take_answer(L, a);
}

obm_status obm_lua_router(void *user, obm_request *request, double *weights, obm_error *err) {
    obm_lua_call *c = user;
    obm_error own;
    router_arguments a = {c, request, weights, OBM_OK, err ? err : &own};
    return obm_lua_run(c, router_body, c->router, &a) ? a.status : OBM_E_USER;
}

/* ---- Request: what a router sees, valid during its call ---- */

typedef struct request {
    obm_lua_box box;
    obm_request *r;
    const obm_pack *pack;
} request;

void obm_lua_request_push(lua_State *L, obm_request *r, const obm_pack *pack, obm_request ***slot) {
    request *self = obm_lua_box_new(L, sizeof *self, OBM_LUA_REQUEST, NULL);
    self->r = r;
    self->pack = pack;
    *slot = &self->r;
}

static obm_request *check(lua_State *L, const obm_pack **pack) {
    request *self = luaL_checkudata(L, 1, OBM_LUA_REQUEST);
    if (!self->r) luaL_error(L, "a request is valid only while the router runs");
    if (pack) *pack = self->pack;
    return self->r;
}

static int request_text(lua_State *L) {
    lua_pushstring(L, obm_request_text(check(L, NULL)));
    return 1;
}

static int request_tokens(lua_State *L) {
    const int32_t *ids;
    size_t n;
    obm_request_tokens(check(L, NULL), &ids, &n);
    obm_lua_push_ids(L, ids, n);
    return 1;
}

static int request_tasks(lua_State *L) {
    obm_request *r = check(L, NULL);
    lua_newtable(L);
    for (size_t i = 0; i < obm_request_task_count(r); i++) {
        lua_pushstring(L, obm_request_task_name(r, i));
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

/* NULL where the pack has no router: the field is nil then. */
static const double *probabilities(lua_State *L, obm_request *r) {
    const double *p;
    obm_error err;
    if (obm_request_builtin(r, &p, &err) == OBM_OK) return p;
    if (err.code != OBM_E_NOTFOUND) luaL_error(L, "%s", err.message);
    return NULL;
}

static int request_builtin(lua_State *L) {
    obm_request *r = check(L, NULL);
    const double *p = probabilities(L, r);
    if (!p) return 0;
    size_t best = 0;
    for (size_t i = 1; i < obm_request_task_count(r); i++) {
        if (p[i] > p[best]) best = i;
    }
    lua_pushstring(L, obm_request_task_name(r, best));
    return 1;
}

static int request_probabilities(lua_State *L) {
    const obm_pack *pack;
    obm_request *r = check(L, &pack);
    obm_lua_push_route(L, pack, probabilities(L, r));
    return 1;
}

/* request:features(layer) -> tensor; a copy, the features die with the request */
static int request_features(lua_State *L) {
    obm_request *r = check(L, NULL);
    const float *x;
    size_t n;
    obm_error err;
    if (obm_request_features(r, (int)luaL_optinteger(L, 2, 0), &x, &n, &err) != OBM_OK) return obm_lua_fail(L, &err);
    float *out = obm_lua_tensor_new(L, 1, &(int64_t){(int64_t)n});
    for (size_t i = 0; i < n; i++) out[i] = x[i];
    return 1;
}

static const luaL_Reg request_methods[] = {{"features", request_features}, {NULL, NULL}};
static const luaL_Reg request_fields[] = {{"text", request_text},
                                          {"tokens", request_tokens},
                                          {"tasks", request_tasks},
                                          {"builtin", request_builtin},
                                          {"probabilities", request_probabilities},
                                          {NULL, NULL}};

void obm_lua_open_request(lua_State *L) {
    obm_lua_type(L, OBM_LUA_REQUEST, request_methods, request_fields, NULL, NULL);
}
