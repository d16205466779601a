/* Tensor: memory with a dtype and a shape; elements, tables and raw bytes out, all of them in.  The core computes. */
#include "obm_lua.h"

#include <stdint.h>
#include <string.h>
#include <strings.h>

typedef struct tensor {
    obm_lua_box box;
    obm_tensor t;
} tensor;

static tensor *check(lua_State *L) { return (tensor *)obm_lua_box_check(L, 1, OBM_LUA_TENSOR); }

void obm_lua_tensor_view(lua_State *L, const obm_tensor *t, int owner) {
    owner = lua_absindex(L, owner);
    tensor *self = obm_lua_box_new(L, sizeof *self, OBM_LUA_TENSOR, NULL);
    obm_lua_box_parent(L, &self->box, 0, owner);
    self->box.is_view = true;
    self->box.parents[0]->views++;
    self->t = *t;
    self->box.p = &self->t;
}

obm_lua_box *obm_lua_tensor_lend(lua_State *L, const float *data, int64_t n) {
    tensor *self = obm_lua_box_new(L, sizeof *self, OBM_LUA_TENSOR, NULL);
    self->t = (obm_tensor){.dtype = OBM_F32, .ndim = 1, .shape = {n}, .data = data};
    self->box.p = &self->t;
    return &self->box;
}

/* The memory lies behind the head, so that the collector knows its size. */
static tensor *tensor_alloc(lua_State *L, obm_tensor t) {
    int64_t n = obm_tensor_count(&t);
    if (n < 0 || (uint64_t)n > (SIZE_MAX / 2 - sizeof(tensor)) / obm_dtype_size(t.dtype))
        luaL_error(L, "not enough memory");
    tensor *self = obm_lua_box_new(L, sizeof *self + (size_t)n * obm_dtype_size(t.dtype), OBM_LUA_TENSOR, NULL);
    t.data = self + 1;
    self->t = t;
    self->box.p = &self->t;
    return self;
}

float *obm_lua_tensor_new(lua_State *L, int32_t ndim, const int64_t *shape) {
    obm_tensor t = {.dtype = OBM_F32, .ndim = ndim};
    for (int i = 0; i < ndim; i++) t.shape[i] = shape[i];
    return (float *)(tensor_alloc(L, t) + 1);
}

/* ---- elements out ---- */

static bool push_integer(lua_State *L, const obm_tensor *t, int64_t i) {
    const unsigned char *at = (const unsigned char *)t->data + (size_t)i * obm_dtype_size(t->dtype);
    union {
        int8_t i8;
        int16_t i16;
        int32_t i32;
        int64_t i64;
        uint8_t u8;
        uint16_t u16;
        uint32_t u32;
        uint64_t u64;
    } v;
    memcpy(&v, at, obm_dtype_size(t->dtype)); /* a mapped file guarantees no alignment */
    switch (t->dtype) {
    case OBM_U8:
        lua_pushinteger(L, v.u8);
        return true;
    case OBM_I8:
        lua_pushinteger(L, v.i8);
        return true;
    case OBM_I16:
        lua_pushinteger(L, v.i16);
        return true;
    case OBM_U16:
        lua_pushinteger(L, v.u16);
        return true;
    case OBM_I32:
        lua_pushinteger(L, v.i32);
        return true;
    case OBM_U32:
        lua_pushinteger(L, v.u32);
        return true;
    case OBM_I64:
        lua_pushinteger(L, v.i64);
        return true;
    case OBM_U64:
        lua_pushinteger(L, (lua_Integer)v.u64);
        return true;
    case OBM_BOOL:
        lua_pushboolean(L, v.u8);
        return true;
    default:
        return false;
    }
}

static obm_status push_element(lua_State *L, const obm_tensor *t, int64_t i, obm_error *err) {
    if (push_integer(L, t, i)) return OBM_OK;
    if (t->dtype == OBM_F64) {
        double v;
        memcpy(&v, (const char *)t->data + (size_t)i * sizeof v, sizeof v);
        lua_pushnumber(L, v);
        return OBM_OK;
    }
    float v;
    obm_status status = obm_tensor_read_f32(t, i, 1, &v, err);
    if (status == OBM_OK) lua_pushnumber(L, v);
    return status;
}

/* t:totable() -> all elements, flat */
static int tensor_totable(lua_State *L) {
    const obm_tensor *t = &check(L)->t;
    int64_t n = obm_tensor_count(t);
    obm_error err;
    lua_createtable(L, (int)(n < INT32_MAX ? n : 0), 0);
    for (int64_t i = 0; i < n; i++) {
        if (push_element(L, t, i, &err) != OBM_OK) return obm_lua_fail(L, &err);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

static size_t bytes_of(const obm_tensor *t) { return (size_t)obm_tensor_count(t) * obm_dtype_size(t->dtype); }

static int tensor_tostring(lua_State *L) {
    const obm_tensor *t = &check(L)->t;
    lua_pushlstring(L, t->data ? t->data : "", bytes_of(t));
    return 1;
}

static int tensor_shape(lua_State *L) {
    const obm_tensor *t = &check(L)->t;
    lua_createtable(L, t->ndim, 0);
    for (int i = 0; i < t->ndim; i++) {
        lua_pushinteger(L, t->shape[i]);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

static int tensor_dtype(lua_State *L) {
    lua_pushstring(L, obm_dtype_name(check(L)->t.dtype));
    return 1;
}

static int tensor_nbytes(lua_State *L) {
    lua_pushinteger(L, (lua_Integer)bytes_of(&check(L)->t));
    return 1;
}

static int tensor_len(lua_State *L) {
    lua_pushinteger(L, obm_tensor_count(&check(L)->t));
    return 1;
}

/* t[i]: the i-th element, row-major, from 1; nil outside, as a table has it */
static int tensor_element(lua_State *L) {
    const obm_tensor *t = &check(L)->t;
    lua_Integer i = lua_tointeger(L, 2);
    obm_error err;
    if (!lua_isinteger(L, 2) || i < 1 || i > obm_tensor_count(t)) return 0;
    if (push_element(L, t, i - 1, &err) != OBM_OK) return luaL_error(L, "%s", err.message);
    return 1;
}

/* ---- tensors in ---- */

static obm_dtype check_dtype(lua_State *L, const char *name) {
    for (int d = 0; d < OBM_DTYPE_COUNT; d++) {
        if (strcasecmp(name, obm_dtype_name((obm_dtype)d)) == 0) return (obm_dtype)d;
    }
    return luaL_error(L, "unknown dtype \"%s\" (known: F32, F16, BF16, F64, ...)", name);
}

static void read_shape(lua_State *L, int at, obm_tensor *t) {
    if (lua_getfield(L, at, "shape") != LUA_TTABLE)
        luaL_error(L, "a tensor as a table has shape, dtype and data (missing: shape)");
    lua_Integer ndim = luaL_len(L, -1);
    if (ndim > OBM_MAX_DIM) luaL_error(L, "a tensor has at most %d dimensions", OBM_MAX_DIM);
    t->ndim = (int32_t)ndim;
    for (int i = 0; i < t->ndim; i++) {
        lua_geti(L, -1, i + 1);
        t->shape[i] = luaL_checkinteger(L, -1);
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    if (obm_tensor_count(t) < 0) luaL_error(L, "a tensor's shape is negative or too large");
}

static void read_numbers(lua_State *L, int at, const obm_tensor *t, void *out) {
    if (t->dtype != OBM_F32 && t->dtype != OBM_F64)
        luaL_error(L, "data of dtype %s is a string of raw bytes; numbers make F32 or F64", obm_dtype_name(t->dtype));
    int64_t n = obm_tensor_count(t);
    if (luaL_len(L, at) != n)
        luaL_error(L, "a tensor's data has %I numbers, its shape %I", luaL_len(L, at), (lua_Integer)n);
    for (int64_t i = 0; i < n; i++) {
        if (lua_geti(L, at, i + 1) != LUA_TNUMBER)
            luaL_error(L, "a tensor's data are numbers, found %s", luaL_typename(L, -1));
        double v = lua_tonumber(L, -1);
        if (t->dtype == OBM_F64)
            ((double *)out)[i] = v;
        else
            ((float *)out)[i] = (float)v;
        lua_pop(L, 1);
    }
}

obm_tensor obm_lua_tensor_import(lua_State *L, int keep, int at) {
    at = lua_absindex(L, at);
    if (luaL_testudata(L, at, OBM_LUA_TENSOR)) return ((tensor *)obm_lua_box_check(L, at, OBM_LUA_TENSOR))->t;
    if (lua_type(L, at) != LUA_TTABLE)
        luaL_error(L, "expected a tensor or a table with shape, dtype and data, found %s", luaL_typename(L, at));
    const char *dtype = obm_lua_field_string(L, at, keep, "dtype");
    obm_tensor t = {.dtype = dtype ? check_dtype(L, dtype) : OBM_F32};
    read_shape(L, at, &t);
    size_t bytes, expected = bytes_of(&t);
    int type = lua_getfield(L, at, "data");
    void *memory = obm_lua_alloc(L, keep, expected, 1);
    if (type == LUA_TSTRING) {
        const char *data = lua_tolstring(L, -1, &bytes);
        if (bytes != expected)
            luaL_error(L, "a tensor's data has %I bytes, its shape and dtype need %I", (lua_Integer)bytes,
                       (lua_Integer)expected);
        memcpy(memory, data, bytes);
    } else if (type == LUA_TTABLE) {
        read_numbers(L, lua_gettop(L), &t, memory);
    } else {
        luaL_error(L, "a tensor's data is a string of raw bytes or a table of numbers, found %s", luaL_typename(L, -1));
    }
    lua_pop(L, 1);
    t.data = memory;
    return t;
}

/* ---- arithmetic ---- */

/* A number is a tensor without dimensions; its memory is anchored in `keep`. */
static obm_tensor operand(lua_State *L, int keep, int at) {
    if (lua_type(L, at) != LUA_TNUMBER) return obm_lua_tensor_import(L, keep, at);
    float *memory = obm_lua_alloc(L, keep, 1, sizeof *memory);
    *memory = (float)lua_tonumber(L, at);
    return (obm_tensor){.dtype = OBM_F32, .data = memory};
}

/* Upvalues: the operation and its number of arguments, which `-t` passes twice.  Raises: an operator has no place for
 * nil, message, code. */
static int tensor_compute(lua_State *L) {
    const char *op = lua_tostring(L, lua_upvalueindex(1));
    int n = (int)lua_tointeger(L, lua_upvalueindex(2));
    obm_tensor args[3];
    lua_settop(L, n);
    lua_newtable(L);
    for (int i = 0; i < n; i++) args[i] = operand(L, n + 1, i + 1);
    size_t shape_of;
    obm_error err;
    if (obm_tensor_compute(op, args, (size_t)n, &shape_of, NULL, &err) != OBM_OK)
        return luaL_error(L, "%s", err.message);
    float *out = obm_lua_tensor_new(L, args[shape_of].ndim, args[shape_of].shape);
    if (obm_tensor_compute(op, args, (size_t)n, NULL, out, &err) != OBM_OK) return luaL_error(L, "%s", err.message);
    return 1;
}

/* t:dot(u) -> number, f64; u may be a number, so t:dot(1) is the sum */
static int tensor_dot(lua_State *L) {
    lua_settop(L, 2);
    lua_newtable(L);
    obm_tensor a = operand(L, 3, 1), b = operand(L, 3, 2);
    double sum;
    obm_error err;
    if (obm_tensor_dot(&a, &b, &sum, &err) != OBM_OK) return luaL_error(L, "%s", err.message);
    lua_pushnumber(L, sum);
    return 1;
}

static const struct {
    const char *name, *op;
    int n;
} arithmetic[] = {{"__add", "add", 2}, {"__sub", "sub", 2}, {"__mul", "mul", 2},   {"__div", "div", 2},
                  {"__unm", "neg", 1}, {"min", "min", 2},   {"max", "max", 2},     {"lt", "lt", 2},
                  {"le", "le", 2},     {"eq", "eq", 2},     {"where", "where", 3}, {"abs", "abs", 1},
                  {"sign", "sign", 1}, {"sqrt", "sqrt", 1}, {"exp", "exp", 1},     {"log", "log", 1},
                  {"tanh", "tanh", 1}};

/* Operators into the metatable, names into the table of methods, which is the first upvalue of __index. */
static void add_arithmetic(lua_State *L) {
    luaL_getmetatable(L, OBM_LUA_TENSOR);
    lua_getfield(L, -1, "__index");
    lua_getupvalue(L, -1, 1);
    for (size_t i = 0; i < sizeof arithmetic / sizeof *arithmetic; i++) {
        lua_pushstring(L, arithmetic[i].op);
        lua_pushinteger(L, arithmetic[i].n);
        lua_pushcclosure(L, tensor_compute, 2);
        lua_setfield(L, arithmetic[i].name[0] == '_' ? -4 : -2, arithmetic[i].name);
    }
    lua_pushcfunction(L, tensor_dot);
    lua_setfield(L, -2, "dot");
    lua_pop(L, 3);
}

static const luaL_Reg tensor_methods[] = {{"totable", tensor_totable}, {"tostring", tensor_tostring}, {NULL, NULL}};
static const luaL_Reg tensor_fields[] = {
    {"shape", tensor_shape}, {"dtype", tensor_dtype}, {"nbytes", tensor_nbytes}, {NULL, NULL}};
static const luaL_Reg tensor_meta[] = {{"__len", tensor_len}, {NULL, NULL}};

void obm_lua_open_tensor(lua_State *L) {
    obm_lua_type(L, OBM_LUA_TENSOR, tensor_methods, tensor_fields, tensor_meta, tensor_element);
    add_arithmetic(L);
}
