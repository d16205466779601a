/* Model and Stream: running, scoring, generating, routing. */
#include "obm_lua.h"

#include <string.h>

static obm_model *model_at(lua_State *L, int at) { return (obm_model *)obm_lua_box_check(L, at, OBM_LUA_MODEL)->p; }
static obm_model *model_of(lua_State *L) { return model_at(L, 1); }

static void model_release(void *own) { obm_model_free(own); }

/* model(path_or_pack, {base, kv, route_budget, materialise, z12, prefill, progress}) */
int obm_lua_model(lua_State *L) {
    lua_settop(L, 2);
    obm_lua_options(L, 2, "base kv route_budget materialise z12 prefill progress");
    lua_newtable(L);
    const int context = 4;
    bool from_pack = luaL_testudata(L, 1, OBM_LUA_PACK) != NULL;
    const obm_pack *pack = from_pack ? obm_lua_box_check(L, 1, OBM_LUA_PACK)->p : NULL;
    const char *path = from_pack ? NULL : obm_lua_string(L, 1);
    obm_model_options options = OBM_INIT(obm_model_options);
    options.base = obm_lua_field_string(L, 2, 3, "base");
    options.kv = obm_lua_field_dtype(L, 2, "kv", OBM_F16);
    options.route_budget = obm_lua_field_size(L, 2, "route_budget");
    options.materialise = obm_lua_field_boolean(L, 2, "materialise", false);
    options.z12 = obm_lua_field_z12(L, 2);
    options.prefill = obm_lua_field_dtype(L, 2, "prefill", OBM_BF16);
    obm_context *ctx = obm_lua_context(L);
    obm_lua_box *b = obm_lua_box_new(L, sizeof *b, OBM_LUA_MODEL, model_release);
    obm_lua_box_parent(L, b, 0, context);
    if (from_pack) obm_lua_box_parent(L, b, 1, 1);
    const int made = lua_gettop(L);
    obm_lua_call call;
    obm_lua_call_init(L, &call, 2, false);
    options.progress = obm_lua_progress;
    options.progress_user = &call;
    obm_model *m;
    obm_error err;
    obm_lua_begin(&call, lua_touserdata(L, from_pack ? 1 : context));
    obm_status status =
        from_pack ? obm_model_from_pack(ctx, pack, &options, &m, &err) : obm_model_open(ctx, path, &options, &m, &err);
    if (status == OBM_OK)
        obm_lua_box_fill(b, m);
    else
        obm_lua_box_close(b);
    int failed = obm_lua_end(&call, status, &err);
    if (failed) return failed;
    lua_settop(L, made);
    return 1;
}

static const obm_pack *pack_for_route(lua_State *L, const obm_model *m) {
    const obm_pack *pack = obm_model_pack(m);
    if (!pack) luaL_error(L, "route: this is a plain model, only packs have routes");
    return pack;
}

static int model_tokenizer(lua_State *L) {
    const obm_tokenizer *t = obm_model_tokenizer(model_of(L));
    if (t)
        obm_lua_tokenizer_borrow(L, t, 1);
    else
        lua_pushnil(L);
    return 1;
}

/* model:tokenizer_for(route) -> tokenizer, nil without: the expert's own under its hard route, else the base's */
static int model_tokenizer_for(lua_State *L) {
    const obm_model *m = model_of(L);
    obm_error err;
    double *w = NULL;
    lua_settop(L, 2);
    lua_newtable(L);
    if (!lua_isnil(L, 2)) {
        const obm_pack *pack = pack_for_route(L, m);
        w = obm_lua_weights_buffer(L, 3, pack);
        if (obm_lua_weights(L, 2, pack, w, &err) != OBM_OK) return obm_lua_fail(L, &err);
    }
    const obm_tokenizer *t = obm_model_tokenizer_for(m, w);
    if (t)
        obm_lua_tokenizer_borrow(L, t, 1);
    else
        lua_pushnil(L);
    return 1;
}

/* The pack it was made from, or a borrowed one; nil for a plain model. */
static int model_pack(lua_State *L) {
    const obm_pack *p = obm_model_pack(model_of(L));
    if (!p) return lua_pushnil(L), 1;
    if (lua_getiuservalue(L, 1, 2) == LUA_TUSERDATA) return 1;
    obm_lua_pack_borrow(L, p, 1);
    return 1;
}

static int model_info(lua_State *L) {
    obm_model_info i;
    obm_model_describe(model_of(L), &i);
    const struct {
        const char *name;
        int64_t value;
    } sizes[] = {{"vocab", i.vocab},
                 {"hidden", i.hidden},
                 {"intermediate", i.intermediate},
                 {"layers", i.layers},
                 {"heads", i.heads},
                 {"kv_heads", i.kv_heads},
                 {"head_dim", i.head_dim},
                 {"max_positions", i.max_positions},
                 {"sliding_window", i.sliding_window},
                 {"params", (int64_t)i.params},
                 {"bytes", (int64_t)i.bytes},
                 {"z12_bytes", (int64_t)i.z12_bytes},
                 {"z12_plain", (int64_t)i.z12_plain},
                 {"z12_to_come", (int64_t)i.z12_to_come}};
    lua_newtable(L);
    obm_lua_set_string(L, "architecture", i.architecture);
    obm_lua_set_boolean(L, "tied", i.tied);
    obm_lua_set_string(L, "prefill", i.prefill == OBM_BF16 ? "bf16" : "f32");
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
        obm_lua_set_integer(L, sizes[k].name, (uint64_t)sizes[k].value);
    return 1;
}

static int model_memory(lua_State *L) {
    obm_model_memory m;
    obm_model_account(model_of(L), &m);
    lua_newtable(L);
    obm_lua_set_integer(L, "base", m.base);
    obm_lua_set_integer(L, "planes", m.planes);
    obm_lua_set_integer(L, "overlays", m.overlays);
    obm_lua_set_integer(L, "kv", m.kv);
    obm_lua_set_integer(L, "scratch", m.scratch);
    return 1;
}

/* ---- routes ---- */

static bool is_auto(lua_State *L, int at) {
    if (lua_isnoneornil(L, at) || (lua_isboolean(L, at) && !lua_toboolean(L, at))) return true;
    return lua_type(L, at) == LUA_TSTRING && strcmp(lua_tostring(L, at), "auto") == 0;
}

/* The field `route` of the table at `at`: NULL where there is none. */
static obm_status route_field(lua_State *L, const obm_model *m, int keep, int at, double **weights, obm_error *err) {
    obm_status status = OBM_OK;
    if (lua_getfield(L, at, "route") != LUA_TNIL) {
        const obm_pack *pack = pack_for_route(L, m);
        *weights = obm_lua_weights_buffer(L, keep, pack);
        status = obm_lua_weights(L, -1, pack, *weights, err);
    }
    lua_pop(L, 1);
    return status;
}

/* ---- logits, hidden, embed ---- */

/* layer -1: logits */
static int run(lua_State *L, int layer, int at, obm_run_options *options) {
    obm_model *m = model_of(L);
    lua_newtable(L);
    int keep = lua_gettop(L);
    size_t n;
    obm_error err;
    double *weights = NULL;
    const int32_t *ids = obm_lua_ids(L, keep, 2, &n);
    if (route_field(L, m, keep, at, &weights, &err) != OBM_OK) return obm_lua_fail(L, &err);
    options->route = weights;
    obm_model_info info;
    obm_model_describe(m, &info);
    int64_t shape[2] = {(int64_t)n, layer < 0 ? info.vocab : info.hidden};
    bool all = layer >= 0 || options->all;
    float *data = all ? obm_lua_tensor_new(L, 2, shape) : obm_lua_tensor_new(L, 1, shape + 1);
    obm_status status = layer < 0 ? obm_model_logits(m, ids, n, options, data, &err)
                                  : obm_model_hidden(m, ids, n, layer, options, data, &err);
    return status == OBM_OK ? 1 : obm_lua_fail(L, &err);
}

/* model:logits(ids, {all = true, route, decode = false, kv = "f32"}) -> (T, vocab), or (vocab,) of the last position */
static int model_logits(lua_State *L) {
    lua_settop(L, 3);
    obm_lua_options(L, 3, "all route decode kv");
    obm_run_options options = OBM_INIT(obm_run_options);
    options.all = obm_lua_field_boolean(L, 3, "all", true);
    options.decode = obm_lua_field_boolean(L, 3, "decode", false);
    options.kv = obm_lua_field_dtype(L, 3, "kv", OBM_F16);
    return run(L, -1, 3, &options);
}

/* model:hidden(ids, layer, {route}) -> (T, hidden) */
static int model_hidden(lua_State *L) {
    lua_settop(L, 4);
    lua_Integer layer = luaL_checkinteger(L, 3);
    obm_lua_options(L, 4, "route");
    if (layer < 0 || layer > INT32_MAX)
        return luaL_error(L, "layer: expected 0 to %d, found %I", INT32_MAX, (LUAI_UACINT)layer);
    obm_run_options options = OBM_INIT(obm_run_options);
    return run(L, (int)layer, 4, &options);
}

/* model:embed(texts, {layer = 0, progress}) -> (n, hidden) */
static int model_embed(lua_State *L) {
    obm_model *m = model_of(L);
    lua_settop(L, 3);
    obm_lua_options(L, 3, "layer progress");
    lua_newtable(L);
    obm_lua_prompts prompts;
    obm_lua_prompts_from(L, 4, 2, &prompts);
    int layer = (int)obm_lua_field_integer(L, 3, "layer");
    obm_lua_call call;
    obm_lua_call_init(L, &call, 3, false);
    obm_model_info info;
    obm_model_describe(m, &info);
    int64_t shape[2] = {(int64_t)prompts.n, info.hidden};
    float *data = obm_lua_tensor_new(L, 2, shape);
    obm_error err;
    obm_lua_begin(&call, lua_touserdata(L, 1));
    int failed = obm_lua_end(
        &call, obm_model_embed(m, prompts.items, prompts.n, layer, obm_lua_progress, &call, data, &err), &err);
    return failed ? failed : 1;
}

/* verify_placement() -> table */
static int model_verify_placement(lua_State *L) {
    obm_model *m = model_of(L);
    lua_settop(L, 1);
    obm_lua_call call;
    obm_lua_call_init(L, &call, 0, false);
    char **json = obm_lua_scratch(L, sizeof *json, obm_lua_clear_pointer);
    obm_error err;
    obm_lua_begin(&call, lua_touserdata(L, 1));
    int failed = obm_lua_end(&call, obm_model_verify_placement(m, json, &err), &err);
    if (failed) return failed;
    lua_getfield(L, LUA_REGISTRYINDEX, "onebitmerge.json");
    lua_pushstring(L, *json);
    obm_lua_scratch_end(json);
    lua_call(L, 1, 1);
    return 1;
}

/* ---- generation ---- */

#define GENERATE_OPTIONS                                                                                        \
    "route router max_tokens temperature top_k top_p min_p repetition_penalty seed stop chat batch ignore_eos " \
    "progress route_every template"

static void stop_strings(lua_State *L, int at, int keep, obm_generate_options *o) {
    int type = lua_getfield(L, at, "stop");
    if (type == LUA_TSTRING) {
        const char **stop = obm_lua_alloc(L, keep, 1, sizeof *stop);
        *stop = obm_lua_keep(L, keep, lua_gettop(L));
        o->stop = stop;
        o->n_stop = 1;
    } else if (type == LUA_TTABLE) {
        size_t n = (size_t)luaL_len(L, -1);
        const char **stop = obm_lua_alloc(L, keep, n, sizeof *stop);
        for (size_t i = 0; i < n; i++, lua_pop(L, 1)) {
            if (lua_geti(L, -1, (lua_Integer)i + 1) != LUA_TSTRING)
                luaL_error(L, "option stop: expected strings, found %s", luaL_typename(L, -1));
            stop[i] = obm_lua_keep(L, keep, lua_gettop(L));
        }
        o->stop = stop;
        o->n_stop = n;
    } else if (type != LUA_TNIL) {
        luaL_error(L, "option stop: expected string or list of strings, found %s", luaL_typename(L, -1));
    }
    lua_pop(L, 1);
}

/* One route for all, or a sequence with one per prompt of a list; false and "auto" leave a row to the router. */
static obm_status routes_from(lua_State *L, const obm_model *m, int at, int keep, const obm_lua_prompts *prompts,
                              obm_generate_options *o, obm_error *err) {
    lua_getfield(L, at, "route");
    int given = lua_gettop(L);
    bool many = !prompts->single && lua_type(L, given) == LUA_TTABLE && lua_rawlen(L, given) > 0;
    if (!many && is_auto(L, given)) return lua_pop(L, 1), OBM_OK;
    const obm_pack *pack = pack_for_route(L, m);
    size_t tasks = obm_pack_task_count(pack), n = many ? (size_t)lua_rawlen(L, given) : 1;
    if (many && n != prompts->n)
        luaL_error(L, "%I routes for %I prompts (\"auto\" or false leaves one to the router)", (lua_Integer)n,
                   (lua_Integer)prompts->n);
    double *routes = obm_lua_alloc(L, keep, n * tasks, sizeof *routes);
    bool *routed = obm_lua_alloc(L, keep, n, sizeof *routed);
    obm_status status = OBM_OK;
    for (size_t i = 0; status == OBM_OK && i < n; i++) {
        if (many)
            lua_rawgeti(L, given, (lua_Integer)i + 1);
        else
            lua_pushvalue(L, given);
        routed[i] = !is_auto(L, -1);
        if (routed[i]) status = obm_lua_weights(L, -1, pack, routes + i * tasks, err);
        lua_settop(L, given);
    }
    lua_settop(L, given - 1);
    o->routes = routes;
    o->routed = routed;
    o->n_routes = n;
    return status;
}

/* model and prompts at 1 and 2, options at 3, the table that anchors everything at 4; names match the keys of the
 * shell. */
static obm_status generation_from(lua_State *L, const obm_model *m, obm_generate_options *o, obm_lua_prompts *prompts,
                                  obm_error *err) {
    const int at = 3, keep = 4;
    o->struct_size = sizeof *o;
    o->max_tokens = obm_lua_field_size(L, at, "max_tokens");
    o->temperature = obm_lua_field_number(L, at, "temperature");
    o->top_k = obm_lua_field_size(L, at, "top_k");
    o->top_p = obm_lua_field_number(L, at, "top_p");
    o->min_p = obm_lua_field_number(L, at, "min_p");
    o->repetition_penalty = obm_lua_field_number(L, at, "repetition_penalty");
    o->seed = (uint64_t)obm_lua_field_integer(L, at, "seed");
    o->batch = obm_lua_field_size(L, at, "batch");
    o->ignore_eos = obm_lua_field_boolean(L, at, "ignore_eos", false);
    o->chat = obm_lua_field_boolean(L, at, "chat", false);
    o->route_every = obm_lua_field_size(L, at, "route_every");
    o->template_name = obm_lua_field_string(L, at, keep, "template");
    stop_strings(L, at, keep, o);
    obm_lua_prompts_from(L, keep, 2, prompts);
    return routes_from(L, m, at, keep, prompts, o, err);
}

static void use_callbacks(obm_lua_call *call, obm_generate_options *o, const obm_model *m) {
    o->progress = obm_lua_progress;
    o->progress_user = call;
    o->router = call->router ? obm_lua_router : NULL;
    o->router_user = call;
    call->pack = obm_model_pack(m);
}

static void push_text(lua_State *L, const obm_completion *c) {
    lua_pushlstring(L, c->text ? c->text : "", c->text_len);
}

/* Sets field routes: a list of { token = tokens generated before, route = {task = weight} }. */
static void set_routes(lua_State *L, const obm_pack *pack, const obm_completion *c) {
    if (!c->routes) return;
    lua_newtable(L);
    for (size_t i = 0; i < c->n_routes; i++) {
        lua_createtable(L, 0, 2);
        obm_lua_set_integer(L, "token", c->route_tokens[i]);
        obm_lua_push_route(L, pack, c->routes + i * c->n_route);
        lua_setfield(L, -2, "route");
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    lua_setfield(L, -2, "routes");
}

static void push_completion_info(lua_State *L, const obm_model *m, const obm_completion *c) {
    lua_createtable(L, 0, 6);
    set_routes(L, obm_model_pack(m), c);
    obm_lua_push_route(L, obm_model_pack(m), c->route);
    lua_setfield(L, -2, "route");
    obm_lua_push_ids(L, c->ids, c->n_ids);
    lua_setfield(L, -2, "ids");
    obm_lua_set_string(L, "finish_reason", c->finish == OBM_FINISH_STOP ? "stop" : "length");
    obm_lua_set_integer(L, "prompt_tokens", c->n_prompt);
}

typedef struct completions {
    size_t n;
    obm_completion items[];
} completions;

static void completions_clear(void *memory) {
    completions *c = memory;
    for (size_t i = 0; i < c->n; i++) obm_completion_clear(&c->items[i]);
}

static int push_completions(lua_State *L, const obm_model *m, const completions *c, bool single) {
    if (single) {
        push_text(L, &c->items[0]);
        push_completion_info(L, m, &c->items[0]);
        return 2;
    }
    lua_newtable(L);
    for (size_t i = 0; i < c->n; i++) {
        push_completion_info(L, m, &c->items[i]);
        push_text(L, &c->items[i]);
        lua_setfield(L, -2, "text");
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

/* model:generate(prompt, options) -> text, info;  model:generate(list, options) -> list of info with text */
static int model_generate(lua_State *L) {
    obm_model *m = model_of(L);
    lua_settop(L, 3);
    obm_lua_options(L, 3, GENERATE_OPTIONS);
    lua_newtable(L);
    obm_generate_options options = {0};
    obm_lua_prompts prompts;
    obm_error err;
    if (generation_from(L, m, &options, &prompts, &err) != OBM_OK) return obm_lua_fail(L, &err);
    obm_lua_call call;
    obm_lua_call_init(L, &call, 3, true);
    use_callbacks(&call, &options, m);
    completions *c = obm_lua_scratch(L, sizeof *c + prompts.n * sizeof *c->items, completions_clear);
    c->n = prompts.n;
    obm_lua_begin(&call, lua_touserdata(L, 1));
    int failed =
        obm_lua_end(&call, obm_model_generate_batch(m, prompts.items, prompts.n, &options, c->items, &err), &err);
    if (failed) return failed;
    int results = push_completions(L, m, c, prompts.single);
    obm_lua_scratch_end(c);
    return results;
}

/* ---- Stream ---- */

/* User values: 1 the model, 2 the options (callbacks), 3 what the options point to. */
typedef struct stream {
    obm_lua_box box;
    obm_generate_options options;
    obm_lua_call call;
} stream;

static void stream_release(void *own) { obm_stream_free(own); }

/* As io.lines: what fails raises, because a for loop has no place for nil, message, code. */
static int raise_failure(lua_State *L) {
    lua_pop(L, 1);
    return lua_error(L);
}

/* model:stream(prompt, options) -> iterator, nil, nil, iterator: the for loop calls it, and closes it on every way out
 */
static int model_stream(lua_State *L) {
    obm_model *m = model_of(L);
    lua_settop(L, 3);
    obm_lua_options(L, 3, GENERATE_OPTIONS);
    lua_newtable(L);
    stream *self = obm_lua_box_new(L, sizeof *self, OBM_LUA_STREAM, stream_release);
    obm_lua_box_parent(L, &self->box, 0, 1);
    lua_pushvalue(L, 3);
    lua_setiuservalue(L, 5, 2);
    lua_pushvalue(L, 4);
    lua_setiuservalue(L, 5, 3);
    obm_lua_prompts prompts;
    obm_error err;
    if (generation_from(L, m, &self->options, &prompts, &err) != OBM_OK) return obm_lua_fail(L, &err), raise_failure(L);
    if (!prompts.single) return luaL_argerror(L, 2, "stream takes one prompt; generate takes a list");
    obm_lua_call_init(L, &self->call, 3, true);
    use_callbacks(&self->call, &self->options, m);
    obm_stream *s = NULL;
    obm_lua_begin(&self->call, lua_touserdata(L, 1));
    obm_status status = obm_stream_open(m, prompts.items, &self->options, &s, &err);
    if (status == OBM_OK)
        obm_lua_box_fill(&self->box, s);
    else
        obm_lua_box_close(&self->box);
    int failed = obm_lua_end(&self->call, status, &err);
    if (failed) return raise_failure(L);
    lua_pushvalue(L, 5);
    lua_pushnil(L);
    lua_pushnil(L);
    lua_pushvalue(L, 5);
    return 4;
}

/* The next piece, nil at the end. */
static int stream_next(lua_State *L) {
    stream *self = luaL_checkudata(L, 1, OBM_LUA_STREAM);
    if (!self->box.p) return lua_pushnil(L), 1;
    lua_settop(L, 1);
    lua_getiuservalue(L, 1, 2);
    const obm_pack *pack = self->call.pack;
    obm_lua_call_init(L, &self->call, 2, true); /* of this thread of Lua, which need not be the one that opened it */
    self->call.pack = pack;
    const char *text = NULL;
    size_t len = 0;
    obm_error err;
    obm_lua_begin(&self->call, &self->box);
    obm_status status = obm_stream_next((obm_stream *)self->box.p, &text, &len, &err);
    int failed = obm_lua_end(&self->call, status, &err);
    if (failed) return raise_failure(L);
    if (text)
        lua_pushlstring(L, text, len);
    else
        lua_pushnil(L);
    return 1;
}

/* stream:result() -> text, info: so far */
static int stream_result(lua_State *L) {
    obm_lua_box *b = obm_lua_box_check(L, 1, OBM_LUA_STREAM);
    lua_getiuservalue(L, 1, 1);
    const obm_model *m = ((obm_lua_box *)lua_touserdata(L, -1))->own; /* lent to the stream, even if closed */
    const obm_completion *c = obm_stream_result(b->p);
    push_text(L, c);
    push_completion_info(L, m, c);
    return 2;
}

/* stream:close(): frees the model for the next call */
static int stream_close(lua_State *L) {
    obm_lua_box_close(luaL_checkudata(L, 1, OBM_LUA_STREAM));
    return 0;
}

static const luaL_Reg stream_methods[] = {{"close", stream_close}, {"result", stream_result}, {NULL, NULL}};
static const luaL_Reg stream_meta[] = {{"__call", stream_next}, {NULL, NULL}};

/* ---- scoring, routing ---- */

typedef struct scores {
    size_t n;
    obm_score items[];
} scores;

static void scores_clear(void *memory) {
    scores *s = memory;
    for (size_t i = 0; i < s->n; i++) obm_score_clear(&s->items[i]);
}

static void push_score(lua_State *L, const obm_model *m, const obm_score *s) {
    lua_createtable(L, 0, 5);
    obm_lua_set_number(L, "logprob", s->logprob);
    obm_lua_set_number(L, "perplexity", s->perplexity);
    obm_lua_set_boolean(L, "is_greedy", s->is_greedy);
    lua_createtable(L, (int)(s->n < INT32_MAX ? s->n : 0), 0);
    for (size_t i = 0; i < s->n; i++) {
        lua_pushnumber(L, s->token_logprobs[i]);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    lua_setfield(L, -2, "token_logprobs");
    obm_lua_push_route(L, obm_model_pack(m), s->route);
    lua_setfield(L, -2, "route");
}

/* prompt, continuation and route lie on the stack from `at` on. */
static obm_status score_item(lua_State *L, const obm_model *m, int keep, int at, obm_score_item *out, obm_error *err) {
    obm_lua_prompts prompts;
    if (is_auto(L, at + 1) &&
        lua_type(L, at + 1) != LUA_TSTRING) { /* one text as a whole: scored from its second token on */
        lua_pushvalue(L, at);
        lua_replace(L, at + 1);
        lua_pushstring(L, "");
        lua_replace(L, at);
    }
    obm_lua_prompts_from(L, keep, at, &prompts);
    if (!prompts.single) luaL_error(L, "a score item has one prompt");
    out->prompt = prompts.items[0];
    if (lua_type(L, at + 1) == LUA_TSTRING)
        out->continuation = obm_lua_keep(L, keep, at + 1);
    else
        out->continuation_ids = obm_lua_ids(L, keep, at + 1, &out->n_continuation_ids);
    if (is_auto(L, at + 2)) return OBM_OK;
    const obm_pack *pack = pack_for_route(L, m);
    double *weights = obm_lua_weights_buffer(L, keep, pack);
    out->route = weights;
    return obm_lua_weights(L, at + 2, pack, weights, err);
}

/* Pushes the scratch with the scores, or a failure. */
static int score(lua_State *L, obm_model *m, const obm_score_item *items, size_t n, int options, scores **out) {
    obm_lua_call call;
    obm_error err;
    obm_lua_call_init(L, &call, options, false);
    scores *s = *out = obm_lua_scratch(L, sizeof *s + n * sizeof *s->items, scores_clear);
    s->n = n;
    obm_score_options o = OBM_INIT(obm_score_options);
    o.progress = obm_lua_progress;
    o.progress_user = &call;
    obm_lua_begin(&call, lua_touserdata(L, 1));
    return obm_lua_end(&call, obm_model_score(m, items, n, &o, s->items, &err), &err);
}

/* A field of an item by name, or by place: items are { prompt, continuation, route } or have these keys. */
static void push_item_field(lua_State *L, int at, const char *name, int place) {
    if (lua_getfield(L, at, name) != LUA_TNIL) return;
    lua_pop(L, 1);
    lua_geti(L, at, place);
}

/* model:score_items(items, {progress}) -> list of scores */
static int model_score_items(lua_State *L) {
    obm_model *m = model_of(L);
    lua_settop(L, 3);
    luaL_checktype(L, 2, LUA_TTABLE);
    obm_lua_options(L, 3, "progress");
    lua_newtable(L);
    size_t n = (size_t)luaL_len(L, 2);
    obm_error err;
    obm_score_item *items = obm_lua_alloc(L, 4, n, sizeof *items);
    for (size_t i = 0; i < n; i++, lua_settop(L, 4)) {
        if (lua_geti(L, 2, (lua_Integer)i + 1) != LUA_TTABLE)
            luaL_error(L, "a score item is a table { prompt, continuation, route }");
        push_item_field(L, 5, "prompt", 1);
        push_item_field(L, 5, "continuation", 2);
        push_item_field(L, 5, "route", 3);
        if (score_item(L, m, 4, 6, &items[i], &err) != OBM_OK) return obm_lua_fail(L, &err);
    }
    scores *s;
    int failed = score(L, m, items, n, 3, &s);
    if (failed) return failed;
    lua_newtable(L);
    for (size_t i = 0; i < n; i++) {
        push_score(L, m, &s->items[i]);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    obm_lua_scratch_end(s);
    return 1;
}

/* model:score(prompt, continuation, {route}) -> score; without continuation the prompt is a whole text */
static int model_score(lua_State *L) {
    obm_model *m = model_of(L);
    lua_settop(L, 4);
    obm_lua_options(L, 4, "route");
    lua_newtable(L);
    lua_pushvalue(L, 2);
    lua_pushvalue(L, 3);
    lua_getfield(L, 4, "route");
    obm_score_item item = {0};
    obm_error err;
    if (score_item(L, m, 5, 6, &item, &err) != OBM_OK) return obm_lua_fail(L, &err);
    scores *s;
    int failed = score(L, m, &item, 1, 0, &s);
    if (failed) return failed;
    push_score(L, m, &s->items[0]);
    obm_lua_scratch_end(s);
    return 1;
}

/* model:route(prompt, {router}) -> weights, and the built-in router's probabilities unless an own router is given */
static int model_route(lua_State *L) {
    obm_model *m = model_of(L);
    lua_settop(L, 3);
    if (lua_isfunction(L, 3)) {
        lua_createtable(L, 0, 1);
        lua_insert(L, 3);
        lua_setfield(L, 3, "router");
    }
    obm_lua_options(L, 3, "router");
    lua_newtable(L);
    const obm_pack *pack = pack_for_route(L, m);
    obm_lua_prompts prompts;
    obm_lua_prompts_from(L, 4, 2, &prompts);
    if (prompts.n != 1) return luaL_argerror(L, 2, "route takes one prompt");
    double *weights = obm_lua_weights_buffer(L, 4, pack), *probabilities = obm_lua_weights_buffer(L, 4, pack);
    obm_lua_call call;
    obm_lua_call_init(L, &call, 3, true);
    call.pack = pack;
    bool own = call.router != 0;
    obm_error err;
    obm_lua_begin(&call, lua_touserdata(L, 1));
    obm_status status = obm_model_route(m, prompts.items, own ? obm_lua_router : NULL, &call, weights,
                                        own ? NULL : probabilities, &err);
    int failed = obm_lua_end(&call, status, &err);
    if (failed) return failed;
    obm_lua_push_route(L, pack, weights);
    obm_lua_push_route(L, pack, own ? NULL : probabilities);
    return 2;
}

static const luaL_Reg model_methods[] = {{"generate", model_generate},
                                         {"stream", model_stream},
                                         {"logits", model_logits},
                                         {"hidden", model_hidden},
                                         {"verify_placement", model_verify_placement},
                                         {"embed", model_embed},
                                         {"score", model_score},
                                         {"score_items", model_score_items},
                                         {"route", model_route},
                                         {"tokenizer", model_tokenizer},
                                         {"tokenizer_for", model_tokenizer_for},
                                         {"pack", model_pack},
                                         {"info", model_info},
                                         {"memory", model_memory},
                                         {NULL, NULL}};

void obm_lua_open_model(lua_State *L) {
    obm_lua_type(L, OBM_LUA_MODEL, model_methods, NULL, NULL, NULL);
    obm_lua_type(L, OBM_LUA_STREAM, stream_methods, NULL, stream_meta, NULL);
}
