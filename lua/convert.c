/* Arguments: options, ids, routes, prompts from Lua values.  Checks types only; ranges are the core's business. */
#include "obm_lua.h"

#include <stdint.h>
#include <string.h>

/* ---- options ---- */

const char *obm_lua_string(lua_State *L, int at) {
    size_t len;
    const char *s = luaL_checklstring(L, at, &len);
    if (strlen(s) != len) luaL_error(L, "a text holds a NUL character");
    return s;
}

static bool is_known(const char *known, const char *name) {
    size_t len = strlen(name);
    for (const char *at = known; (at = strstr(at, name)); at += len) {
        if ((at == known || at[-1] == ' ') && (at[len] == ' ' || !at[len])) return len > 0;
    }
    return false;
}

#define MAX_OPTIONS 32

/* known: names with spaces between; the suggestion ends the message. */
static void unknown_option(lua_State *L, const char *name, const char *known) {
    const char *names[MAX_OPTIONS];
    size_t n = 0;
    luaL_checkstack(L, MAX_OPTIONS + 4, "options");
    for (const char *p = known; *p && n < MAX_OPTIONS; p += strspn(p, " ")) {
        size_t length = strcspn(p, " ");
        names[n++] = lua_pushlstring(L, p, length);
        p += length;
    }
    size_t near = obm_suggest(name, names, n);
    const char *hint = near < n ? lua_pushfstring(L, ", did you mean \"%s\"?", names[near]) : "";
    luaL_error(L, "unknown option %s (known: %s)%s", name, known, hint);
}

void obm_lua_options(lua_State *L, int at, const char *known) {
    if (lua_isnoneornil(L, at)) {
        lua_settop(L, at > lua_gettop(L) ? at : lua_gettop(L));
        lua_newtable(L);
        lua_replace(L, at);
    }
    luaL_checktype(L, at, LUA_TTABLE);
    for (lua_pushnil(L); lua_next(L, at); lua_pop(L, 1)) {
        if (lua_type(L, -2) != LUA_TSTRING || !is_known(known, lua_tostring(L, -2)))
            unknown_option(L, luaL_tolstring(L, -2, NULL), known);
    }
}

static void wrong_type(lua_State *L, const char *name, const char *expected) {
    luaL_error(L, "option %s: expected %s, found %s", name, expected, luaL_typename(L, -1));
}

const char *obm_lua_field_string(lua_State *L, int at, int keep, const char *name) {
    const char *s = NULL;
    if (lua_getfield(L, at, name) != LUA_TNIL) {
        if (lua_type(L, -1) != LUA_TSTRING) wrong_type(L, name, "string");
        s = obm_lua_keep(L, keep, lua_gettop(L));
    }
    lua_pop(L, 1);
    return s;
}

double obm_lua_field_number(lua_State *L, int at, const char *name) {
    if (lua_getfield(L, at, name) != LUA_TNIL && lua_type(L, -1) != LUA_TNUMBER) wrong_type(L, name, "number");
    double v = lua_tonumber(L, -1);
    lua_pop(L, 1);
    return v;
}

lua_Integer obm_lua_field_integer(lua_State *L, int at, const char *name) {
    int is_integer = 1;
    lua_Integer v = lua_getfield(L, at, name) == LUA_TNIL ? 0 : lua_tointegerx(L, -1, &is_integer);
    if (!is_integer || lua_type(L, -1) == LUA_TSTRING) wrong_type(L, name, "integer");
    lua_pop(L, 1);
    return v;
}

size_t obm_lua_field_size(lua_State *L, int at, const char *name) {
    lua_Integer v = obm_lua_field_integer(L, at, name);
    if (v < 0) luaL_error(L, "%s must be >= 0, found %I", name, (LUAI_UACINT)v);
    return (size_t)v;
}

bool obm_lua_field_boolean(lua_State *L, int at, const char *name, bool otherwise) {
    int type = lua_getfield(L, at, name);
    if (type != LUA_TNIL && type != LUA_TBOOLEAN) wrong_type(L, name, "boolean");
    bool v = type == LUA_TNIL ? otherwise : lua_toboolean(L, -1);
    lua_pop(L, 1);
    return v;
}

obm_z12 obm_lua_field_z12(lua_State *L, int at) {
    int type = lua_getfield(L, at, "z12");
    if (type != LUA_TNIL && type != LUA_TBOOLEAN && type != LUA_TSTRING) wrong_type(L, "z12", "boolean or string");
    obm_z12 v = type == LUA_TBOOLEAN ? lua_toboolean(L, -1) ? OBM_Z12_ON : OBM_Z12_OFF : OBM_Z12_AUTO;
    obm_error err;
    if (type == LUA_TSTRING && obm_z12_find(lua_tostring(L, -1), &v, &err) != OBM_OK) luaL_error(L, "%s", err.message);
    lua_pop(L, 1);
    return v;
}

obm_profile obm_lua_field_profile(lua_State *L, int at, const char *name) {
    static const char *const names[] = {"default", "paper", "mergekit"};
    int type = lua_getfield(L, at, name);
    if (type != LUA_TNIL && type != LUA_TSTRING) wrong_type(L, name, "string");
    const char *profile = type == LUA_TNIL ? names[0] : lua_tostring(L, -1);
    for (int i = 0; i < 3; i++) {
        if (strcmp(profile, names[i]) == 0) return lua_pop(L, 1), (obm_profile)i;
    }
    return luaL_error(L, "unknown profile \"%s\" (known: default, paper, mergekit)", profile);
}

obm_dtype obm_lua_field_dtype(lua_State *L, int at, const char *field, obm_dtype other) {
    static const struct {
        const char *name;
        obm_dtype dtype;
    } names[] = {{"f32", OBM_F32},  {"float32", OBM_F32},   {"F32", OBM_F32},
                 {"f16", OBM_F16},  {"float16", OBM_F16},   {"F16", OBM_F16},
                 {"bf16", OBM_BF16}, {"bfloat16", OBM_BF16}, {"BF16", OBM_BF16}};
    int type = lua_getfield(L, at, field);
    if (type != LUA_TNIL && type != LUA_TSTRING) wrong_type(L, field, "string");
    const char *name = type == LUA_TNIL ? "f32" : lua_tostring(L, -1);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        obm_dtype dtype = names[i].dtype;
        if ((dtype == OBM_F32 || dtype == other) && strcmp(name, names[i].name) == 0) return lua_pop(L, 1), dtype;
    }
    return luaL_error(L, "unknown dtype \"%s\" (known: f32, %s)", name, other == OBM_F16 ? "f16" : "bf16");
}

/* ---- ids ---- */

const int32_t *obm_lua_ids(lua_State *L, int keep, int at, size_t *n) {
    at = lua_absindex(L, at);
    if (lua_type(L, at) != LUA_TTABLE)
        luaL_error(L, "ids: expected a sequence of integers, found %s", luaL_typename(L, at));
    *n = (size_t)luaL_len(L, at);
    int32_t *ids = obm_lua_alloc(L, keep, *n, sizeof *ids);
    for (size_t i = 0; i < *n; i++) {
        int is_integer;
        lua_geti(L, at, (lua_Integer)i + 1);
        lua_Integer v = lua_tointegerx(L, -1, &is_integer);
        if (!is_integer || lua_type(L, -1) != LUA_TNUMBER)
            luaL_error(L, "ids: expected integers, found %s", luaL_typename(L, -1));
        ids[i] = v < -1 || v > INT32_MAX ? -1 : (int32_t)v; /* -1: the core reports it as out of range */
        lua_pop(L, 1);
    }
    return ids;
}

void obm_lua_push_ids(lua_State *L, const int32_t *ids, size_t n) {
    lua_createtable(L, (int)(n < INT32_MAX ? n : 0), 0);
    for (size_t i = 0; i < n; i++) {
        lua_pushinteger(L, ids[i]);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
}

/* ---- results ---- */

void obm_lua_set_integer(lua_State *L, const char *key, uint64_t value) {
    lua_pushinteger(L, (lua_Integer)value);
    lua_setfield(L, -2, key);
}

void obm_lua_set_number(lua_State *L, const char *key, double value) {
    lua_pushnumber(L, value);
    lua_setfield(L, -2, key);
}

void obm_lua_set_string(lua_State *L, const char *key, const char *value) {
    lua_pushstring(L, value);
    lua_setfield(L, -2, key);
}

void obm_lua_set_boolean(lua_State *L, const char *key, bool value) {
    lua_pushboolean(L, value);
    lua_setfield(L, -2, key);
}

void obm_lua_push_plan(lua_State *L, const obm_plan *p) {
    lua_newtable(L);
    obm_lua_set_integer(L, "tensors", p->tensors);
    obm_lua_set_integer(L, "tiles", p->tiles);
    obm_lua_set_integer(L, "bytes_read", p->bytes_read);
    obm_lua_set_integer(L, "bytes_written", p->bytes_written);
    obm_lua_set_integer(L, "peak_memory", p->peak_memory);
    obm_lua_set_number(L, "seconds", p->seconds);
}

/* ---- routes ---- */

double *obm_lua_weights_buffer(lua_State *L, int keep, const obm_pack *pack) {
    return obm_lua_alloc(L, keep, obm_pack_task_count(pack), sizeof(double));
}

static obm_status weight_of_name(const obm_pack *pack, const char *task, double value, double *weights, double *unused,
                                 obm_error *err) {
    for (size_t i = 0; i < obm_pack_task_count(pack); i++) {
        if (strcmp(obm_pack_task_name(pack, i), task) == 0) return weights[i] = value, OBM_OK;
    }
    obm_status status = obm_pack_parse_route(pack, task, unused, err); /* the core words the error */
    if (status != OBM_OK) return status;
    *err = (obm_error){.code = OBM_E_NOTFOUND};
    strcpy(err->message, "a key of a route is one task's name");
    return OBM_E_NOTFOUND;
}

static obm_status weights_by_name(lua_State *L, int at, const obm_pack *pack, double *weights, obm_error *err) {
    double *unused = lua_newuserdatauv(L, (obm_pack_task_count(pack) + 1) * sizeof *unused, 0);
    for (lua_pushnil(L); lua_next(L, at); lua_pop(L, 1)) {
        if (lua_type(L, -2) != LUA_TSTRING || lua_type(L, -1) != LUA_TNUMBER)
            luaL_error(L, "a route's table has task names as keys and numbers as values, found [%s] = %s",
                       luaL_typename(L, -2), luaL_typename(L, -1));
        obm_status status = weight_of_name(pack, lua_tostring(L, -2), lua_tonumber(L, -1), weights, unused, err);
        if (status != OBM_OK) return status;
    }
    return OBM_OK;
}

static void weights_in_order(lua_State *L, int at, size_t n, double *weights) {
    if (lua_rawlen(L, at) != n)
        luaL_error(L, "a route as a sequence has one weight per task: expected %I, found %I", (lua_Integer)n,
                   (lua_Integer)lua_rawlen(L, at));
    for (size_t i = 0; i < n; i++) {
        if (lua_rawgeti(L, at, (lua_Integer)i + 1) != LUA_TNUMBER)
            luaL_error(L, "a weight is a number, found %s", luaL_typename(L, -1));
        weights[i] = lua_tonumber(L, -1);
        lua_pop(L, 1);
    }
}

obm_status obm_lua_weights(lua_State *L, int at, const obm_pack *pack, double *weights, obm_error *err) {
    at = lua_absindex(L, at);
    size_t n = obm_pack_task_count(pack);
    if (lua_type(L, at) == LUA_TSTRING) return obm_pack_parse_route(pack, obm_lua_string(L, at), weights, err);
    memset(weights, 0, n * sizeof *weights);
    if (lua_isinteger(L, at)) {
        lua_Integer i = lua_tointeger(L, at);
        if (i < 1 || (size_t)i > n) luaL_error(L, "task index %I is outside 1..%I", i, (lua_Integer)n);
        weights[i - 1] = 1;
        return OBM_OK;
    }
    if (lua_type(L, at) != LUA_TTABLE)
        luaL_error(L,
                   "a route is a task name, an index from 1, a table of weights by task name, or a sequence of %I "
                   "weights; found %s",
                   (lua_Integer)n, luaL_typename(L, at));
    if (lua_rawlen(L, at) == 0) return weights_by_name(L, at, pack, weights, err);
    weights_in_order(L, at, n, weights);
    return OBM_OK;
}

void obm_lua_push_route(lua_State *L, const obm_pack *pack, const double *weights) {
    if (!pack || !weights) return lua_pushnil(L);
    lua_newtable(L);
    for (size_t i = 0; i < obm_pack_task_count(pack); i++) {
        if (weights[i] != 0) obm_lua_set_number(L, obm_pack_task_name(pack, i), weights[i]);
    }
}

/* ---- prompts ---- */

static const char *message_field(lua_State *L, int keep, const char *key) {
    if (lua_type(L, -1) != LUA_TTABLE || lua_getfield(L, -1, key) != LUA_TSTRING)
        luaL_error(L, "a message is a table with the texts role and content (missing: %s)", key);
    const char *s = obm_lua_keep(L, keep, lua_gettop(L));
    lua_pop(L, 1);
    return s;
}

static void prompt_messages(lua_State *L, int keep, int at, obm_prompt *out) {
    size_t n = lua_type(L, at) == LUA_TTABLE ? (size_t)luaL_len(L, at) : 0;
    if (!n)
        luaL_error(L, "messages: expected a list of {role, content}, found %s",
                   lua_type(L, at) == LUA_TTABLE ? "an empty table" : luaL_typename(L, at));
    obm_message *messages = obm_lua_alloc(L, keep, n, sizeof *messages);
    for (size_t i = 0; i < n; i++) {
        lua_geti(L, at, (lua_Integer)i + 1);
        messages[i].role = message_field(L, keep, "role");
        messages[i].content = message_field(L, keep, "content");
        lua_pop(L, 1);
    }
    out->messages = messages;
    out->n_messages = n;
}

enum { PROMPT_LIST, PROMPT_TEXT, PROMPT_MESSAGES, PROMPT_IDS, PROMPT_FIELDS };
static const char *const prompt_fields[] = {"ids", "messages", "prompt", "text"};

static int prompt_kind(lua_State *L, int at) {
    if (lua_type(L, at) == LUA_TSTRING) return PROMPT_TEXT;
    if (lua_type(L, at) != LUA_TTABLE) return PROMPT_LIST;
    for (int i = 0; i < 4; i++) {
        int type = lua_getfield(L, at, prompt_fields[i]);
        lua_pop(L, 1);
        if (type != LUA_TNIL) return PROMPT_FIELDS;
    }
    int top = lua_gettop(L), kind = PROMPT_LIST;
    if (lua_geti(L, at, 1) == LUA_TNUMBER)
        kind = PROMPT_IDS;
    else if (lua_type(L, -1) == LUA_TTABLE && lua_getfield(L, -1, "role") != LUA_TNIL)
        kind = PROMPT_MESSAGES;
    lua_settop(L, top);
    return kind;
}

static void prompt_by_field(lua_State *L, int keep, int at, obm_prompt *out) {
    int i = 0;
    while (lua_getfield(L, at, prompt_fields[i]) == LUA_TNIL) lua_pop(L, 1), i++;
    int value = lua_gettop(L);
    if (i == 0)
        out->ids = obm_lua_ids(L, keep, value, &out->n_ids);
    else if (i == 1)
        prompt_messages(L, keep, value, out);
    else if (lua_type(L, value) == LUA_TSTRING)
        out->text = obm_lua_keep(L, keep, value);
    else
        luaL_error(L, "%s: expected string, found %s", prompt_fields[i], luaL_typename(L, value));
    lua_settop(L, value - 1);
}

static void prompt_from(lua_State *L, int keep, int at, obm_prompt *out) {
    switch (prompt_kind(L, at)) {
    case PROMPT_TEXT:
        out->text = obm_lua_keep(L, keep, at);
        break;
    case PROMPT_MESSAGES:
        prompt_messages(L, keep, at, out);
        break;
    case PROMPT_IDS:
        out->ids = obm_lua_ids(L, keep, at, &out->n_ids);
        break;
    case PROMPT_FIELDS:
        prompt_by_field(L, keep, at, out);
        break;
    default:
        luaL_error(L,
                   "a prompt is a string, a list of messages, a list of ids, or a table with one of prompt, text, "
                   "messages, ids; found %s",
                   luaL_typename(L, at));
    }
}

void obm_lua_prompts_from(lua_State *L, int keep, int at, obm_lua_prompts *out) {
    at = lua_absindex(L, at);
    keep = lua_absindex(L, keep);
    luaL_checkstack(L, 16, "prompts");
    out->single = prompt_kind(L, at) != PROMPT_LIST;
    if (!out->single && lua_type(L, at) != LUA_TTABLE) prompt_from(L, keep, at, NULL); /* raises */
    out->n = out->single ? 1 : (size_t)luaL_len(L, at);
    out->items = obm_lua_alloc(L, keep, out->n, sizeof *out->items);
    if (out->single) return prompt_from(L, keep, at, out->items);
    for (size_t i = 0; i < out->n; i++) {
        lua_geti(L, at, (lua_Integer)i + 1);
        prompt_from(L, keep, lua_gettop(L), &out->items[i]);
        lua_pop(L, 1);
    }
}
