/*
 * What the files of the Lua module share.  Thin: check, call the core, convert the answer.
 *
 * A Lua error is a longjmp, so nothing that malloc made may be alive while a Lua function that can throw runs: buffers
 * are userdata (obm_lua_alloc, obm_lua_scratch), and what the core hands over as owned is put into a userdata that
 * exists already.
 */
#ifndef OBM_LUA_H
#define OBM_LUA_H

#include <lauxlib.h>
#include <lua.h>
#include <onebitmerge.h>

/* ---- handles ---- */

/* Head of every userdata.  A handle is freed when it is closed and nothing that it lent (tensors, a model's tokenizer,
 * ...) is alive; lent objects hold a reference and, as user values, the userdata of their parents. */
typedef struct obm_lua_box {
    const char *type;
    void *own;     /* what `release` frees; NULL when borrowed or freed */
    const void *p; /* what methods use; NULL when closed */
    void (*release)(void *own);
    struct obm_lua_box *parents[3];
    int refs;  /* children and running calls */
    int calls; /* running calls of this object and of its children */
    int views; /* of the children: tensors that point into this object's files */
    bool is_view;
} obm_lua_box;

/* Pushes a zeroed userdata of `size` bytes that starts with an obm_lua_box and is closed. */
void *obm_lua_box_new(lua_State *L, size_t size, const char *type, void (*release)(void *own));
void obm_lua_box_fill(obm_lua_box *b, void *own);
void obm_lua_box_parent(lua_State *L, obm_lua_box *b, int slot, int parent); /* b is on top of the stack */
void obm_lua_box_close(obm_lua_box *b);
void obm_lua_box_hold(obm_lua_box *b); /* while a call runs: not freed, whatever a callback closes */
void obm_lua_box_drop(obm_lua_box *b);
obm_lua_box *obm_lua_box_check(lua_State *L, int at, const char *type); /* raises when closed */

/* Metatable `type`: methods and fields by __index (then `index`, if any: name -> value), `meta` as they are, __gc and
 * __close. */
void obm_lua_type(lua_State *L, const char *type, const luaL_Reg *methods, const luaL_Reg *fields, const luaL_Reg *meta,
                  lua_CFunction index);

#define OBM_LUA_CONTEXT "onebitmerge.context"
#define OBM_LUA_TENSOR "onebitmerge.tensor"
#define OBM_LUA_CHECKPOINT "onebitmerge.checkpoint"
#define OBM_LUA_TASK_VECTOR "onebitmerge.task_vector"
#define OBM_LUA_PACK "onebitmerge.pack"
#define OBM_LUA_TOKENIZER "onebitmerge.tokenizer"
#define OBM_LUA_MODEL "onebitmerge.model"
#define OBM_LUA_STREAM "onebitmerge.stream"
#define OBM_LUA_REQUEST "onebitmerge.request"
#define OBM_LUA_REPORT "onebitmerge.router_report"

/* Pushes the default context; raises if there can be none. */
obm_context *obm_lua_context(lua_State *L);

/* ---- errors ---- */

/* nil, message, code name; wrong use (OBM_E_ARG) raises. */
int obm_lua_fail(lua_State *L, const obm_error *err);
int obm_lua_answer(lua_State *L, const obm_error *err); /* never raises */

/* ---- memory ---- */

void *obm_lua_alloc(lua_State *L, int keep, size_t n, size_t size); /* zeroed, anchored in the table at `keep` */
const char *obm_lua_keep(lua_State *L, int keep, int at);           /* the string at `at`, anchored; without NULs */
/* Pushes zeroed memory; `clear` runs on it once: at obm_lua_scratch_end, or when it is collected. */
void *obm_lua_scratch(lua_State *L, size_t size, void (*clear)(void *memory));
void obm_lua_scratch_end(void *memory);
void obm_lua_clear_pointer(void *memory); /* obm_free of the pointer that lies there */

/* ---- arguments ---- */

/* The string at `at` without NULs; raises. */
const char *obm_lua_string(lua_State *L, int at);
/* nil or a table with none but these keys ("a b c"); raises.  Sets nil to an empty table. */
void obm_lua_options(lua_State *L, int at, const char *known);
/* One field of the table at `at`; `*_or` values where it is nil.  They raise on a wrong type. */
const char *obm_lua_field_string(lua_State *L, int at, int keep, const char *name); /* NULL without */
double obm_lua_field_number(lua_State *L, int at, const char *name);
lua_Integer obm_lua_field_integer(lua_State *L, int at, const char *name);
size_t obm_lua_field_size(lua_State *L, int at, const char *name); /* >= 0 */
bool obm_lua_field_boolean(lua_State *L, int at, const char *name, bool otherwise);
obm_profile obm_lua_field_profile(lua_State *L, int at, const char *name);
obm_profile obm_lua_profile(lua_State *L, const char *name);
obm_dtype obm_lua_field_dtype(lua_State *L, int at, const char *name, obm_dtype other); /* f32 (nil) or other, f16 or bf16 */
obm_z12 obm_lua_field_z12(lua_State *L, int at); /* true, false, or a name */
/* A sequence of integers. */
const int32_t *obm_lua_ids(lua_State *L, int keep, int at, size_t *n);
void obm_lua_push_ids(lua_State *L, const int32_t *ids, size_t n);
void obm_lua_set_integer(lua_State *L, const char *key, uint64_t value);
void obm_lua_set_number(lua_State *L, const char *key, double value);
void obm_lua_set_string(lua_State *L, const char *key, const char *value);
void obm_lua_set_boolean(lua_State *L, const char *key, bool value);
void obm_lua_push_plan(lua_State *L, const obm_plan *p);

/* ---- routes and prompts ---- */

/* weights[task count] from a name, an index (from 1), a table of weights by name, or a sequence of all weights. */
obm_status obm_lua_weights(lua_State *L, int at, const obm_pack *pack, double *weights, obm_error *err);
double *obm_lua_weights_buffer(lua_State *L, int keep, const obm_pack *pack);
void obm_lua_push_route(lua_State *L, const obm_pack *pack,
                        const double *weights); /* {task = weight}, zeros left out; or nil */

typedef struct obm_lua_prompts {
    obm_prompt *items;
    size_t n;
    bool single;
} obm_lua_prompts;
void obm_lua_prompts_from(lua_State *L, int keep, int at, obm_lua_prompts *out);

/* ---- long calls ---- */

/* Callbacks run on the thread of the call, protected; what they raise waits at `raised` for obm_lua_end. */
typedef struct obm_lua_call {
    lua_State *L;
    int progress, router, raised; /* places on the stack; 0: none */
    const obm_pack *pack;         /* names of the router's answers */
    obm_lua_box *held;            /* kept alive against a callback that closes it */
    bool failed;
    bool answers; /* ARG is returned as other failures are: what is wrong stands in data, not in the program */
    double last;  /* seconds, when the progress callback ran last */
} obm_lua_call;

/* Pushes the callbacks of the options at `at` (0: none) and a place for an error. */
void obm_lua_call_init(lua_State *L, obm_lua_call *c, int at, bool with_router);
void obm_lua_begin(obm_lua_call *c, obm_lua_box *held);
/* 0, or the number of values pushed for a failure; re-raises what a callback raised. */
int obm_lua_end(obm_lua_call *c, obm_status status, const obm_error *err);
/* Calls body(callback at the place, or nil; arguments as light userdata), protected; false once something was raised.
 */
bool obm_lua_run(obm_lua_call *c, lua_CFunction body, int callback, void *arguments);
int obm_lua_progress(void *call, const char *what, uint64_t done, uint64_t total);
obm_status obm_lua_router(void *call, obm_request *request, double *weights, obm_error *err);
void obm_lua_request_push(lua_State *L, obm_request *r, const obm_pack *pack, obm_request ***slot);

/* ---- method.c: merge methods in Lua ---- */

typedef struct obm_lua_method {
    obm_custom_method spec; /* its `user` is this struct */
    obm_lua_call *call;
    int functions, index; /* place of the list of functions, and where in it */
} obm_lua_method;
typedef struct obm_lua_methods {
    obm_lua_method *items; /* those that are registered, then a function by itself */
    const obm_custom_method **specs;
    size_t n;
    int functions;
    const char *method; /* the name that was asked for; NULL without */
} obm_lua_methods;
/* method: the place of nil, a name or a function; 0: none.  Pushes the list of functions, which has to stay; all else
 * is anchored in `keep`.  Raises. */
void obm_lua_methods_init(lua_State *L, int keep, int method, obm_lua_methods *list);
void obm_lua_methods_begin(obm_lua_methods *list, obm_lua_call *call);
const obm_custom_method *obm_lua_methods_find(const obm_lua_methods *list); /* NULL: no method of ours has the name */
int obm_lua_register_method(lua_State *L);

/* ---- one file per type ---- */

void obm_lua_tensor_view(lua_State *L, const obm_tensor *t, int owner);
/* Pushes a tensor (n) over memory that is not Lua's: close the box before the memory goes. */
obm_lua_box *obm_lua_tensor_lend(lua_State *L, const float *data, int64_t n);
float *obm_lua_tensor_new(lua_State *L, int32_t ndim, const int64_t *shape);
obm_tensor obm_lua_tensor_import(lua_State *L, int keep, int at);
void obm_lua_checkpoint_borrow(lua_State *L, const obm_checkpoint *c, int owner);
void obm_lua_pack_borrow(lua_State *L, const obm_pack *p, int owner);
void obm_lua_tokenizer_borrow(lua_State *L, const obm_tokenizer *t, int owner);
int obm_lua_set_threads(lua_State *L);
void obm_lua_open_box(lua_State *L);
void obm_lua_open_request(lua_State *L);
void obm_lua_open_tensor(lua_State *L);
void obm_lua_open_checkpoint(lua_State *L);
void obm_lua_open_pack(lua_State *L);
void obm_lua_open_tokenizer(lua_State *L);
void obm_lua_open_model(lua_State *L);
int obm_lua_checkpoint(lua_State *L);
int obm_lua_task_vector(lua_State *L);
int obm_lua_pack(lua_State *L);
int obm_lua_compress(lua_State *L);
int obm_lua_tokenizer(lua_State *L);
int obm_lua_model(lua_State *L);
int obm_lua_merge(lua_State *L);
int obm_lua_merge_tensors(lua_State *L);
int obm_lua_list_methods(lua_State *L);
int obm_lua_plan(lua_State *L);
obm_numa obm_lua_numa(lua_State *L, const char *name); /* NULL: auto; raises */
int obm_lua_extract_lora(lua_State *L);

#endif
