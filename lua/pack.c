/* Pack: compress, open, change, account, routes, export, train the router. */
#include "obm_lua.h"

#include <stdlib.h>
#include <string.h>

static const obm_pack *pack_of(lua_State *L) { return obm_lua_box_check(L, 1, OBM_LUA_PACK)->p; }

static void pack_release(void *own) { obm_pack_free(own); }

static obm_lua_box *pack_new(lua_State *L, int context) {
    obm_lua_box *b = obm_lua_box_new(L, sizeof *b, OBM_LUA_PACK, pack_release);
    obm_lua_box_parent(L, b, 0, context);
    return b;
}

/* pack(path, base) */
int obm_lua_pack(lua_State *L) {
    const char *path = obm_lua_string(L, 1), *base = lua_isnoneornil(L, 2) ? NULL : obm_lua_string(L, 2);
    lua_settop(L, 2);
    obm_context *ctx = obm_lua_context(L);
    obm_lua_box *b = pack_new(L, 3);
    obm_pack *p;
    obm_error err;
    if (obm_pack_open(ctx, path, base, &p, &err) != OBM_OK) {
        obm_lua_box_close(b);
        return obm_lua_fail(L, &err);
    }
    obm_lua_box_fill(b, p);
    return 1;
}

void obm_lua_pack_borrow(lua_State *L, const obm_pack *p, int owner) {
    obm_lua_box *b = obm_lua_box_new(L, sizeof *b, OBM_LUA_PACK, NULL);
    obm_lua_box_parent(L, b, 0, owner);
    b->p = p;
}

/* ---- experts ---- */

static obm_mode mode_from(lua_State *L, const char *name) {
    static const obm_mode modes[] = {OBM_MODE_1BIT, OBM_MODE_MASK, OBM_MODE_FULL, OBM_MODE_DROP};
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        if (strcmp(name, obm_mode_name(modes[i])) == 0) return modes[i];
    }
    return luaL_error(L, "unknown mode \"%s\" (known: 1bit, mask, full, drop)", name);
}

static size_t count_keys(lua_State *L, int at) {
    size_t n = 0;
    for (lua_pushnil(L); lua_next(L, at); lua_pop(L, 1)) n++;
    return n;
}

static int by_glob(const void *a, const void *b) {
    return strcmp(((const obm_map_rule *)a)->glob, ((const obm_map_rule *)b)->glob);
}

static void rules_in_order(lua_State *L, int keep, int at, size_t n, obm_map_rule *rules) {
    for (size_t i = 0; i < n; i++) {
        if (lua_geti(L, at, (lua_Integer)i + 1) != LUA_TTABLE) luaL_error(L, "a rule of map is { glob, mode }");
        lua_geti(L, -1, 1);
        rules[i].glob = obm_lua_keep(L, keep, lua_gettop(L));
        lua_geti(L, -2, 2);
        rules[i].mode = mode_from(L, obm_lua_string(L, lua_gettop(L)));
        lua_pop(L, 3);
    }
}

/* map: { [glob] = mode } is tried in the order of the globs' bytes, { { glob, mode }, ... } in its own. */
static void expert_map(lua_State *L, int keep, int at, obm_expert *x) {
    size_t n = (size_t)lua_rawlen(L, at);
    x->n_map = n ? n : count_keys(L, at);
    obm_map_rule *rules = obm_lua_alloc(L, keep, x->n_map, sizeof *rules);
    x->map = rules;
    if (n) return rules_in_order(L, keep, at, n, rules);
    size_t i = 0;
    for (lua_pushnil(L); lua_next(L, at); lua_pop(L, 1)) {
        if (lua_type(L, -2) != LUA_TSTRING)
            luaL_error(L, "map is a table of globs to \"1bit\", \"mask\", \"full\" or \"drop\"");
        rules[i].glob = obm_lua_keep(L, keep, lua_absindex(L, -2));
        rules[i++].mode = mode_from(L, obm_lua_string(L, lua_gettop(L)));
    }
    qsort(rules, x->n_map, sizeof *rules, by_glob);
}

static bool is_expert_key(const char *key) {
    static const char *const known[] = {"name", "path", "policy", "scale", "planes", "map"};
    for (size_t i = 0; key && i < sizeof known / sizeof *known; i++) {
        if (strcmp(key, known[i]) == 0) return true;
    }
    return false;
}

/* A path, or { path, policy =, scale =, planes =, map = }. */
static void expert_from(lua_State *L, int keep, int at, obm_expert *x) {
    x->struct_size = sizeof *x;
    if (lua_type(L, at) == LUA_TSTRING) {
        x->path = obm_lua_keep(L, keep, at);
        return;
    }
    if (lua_type(L, at) != LUA_TTABLE)
        luaL_error(L, "an expert is a path or a table { path, policy = ... }, found %s", luaL_typename(L, at));
    lua_pushnil(L);
    while (lua_next(L, at)) {
        lua_pop(L, 1);
        if (lua_isinteger(L, -1)) continue;
        if (lua_type(L, -1) != LUA_TSTRING || !is_expert_key(lua_tostring(L, -1)))
            luaL_error(L, "an expert has no %s (known: name, path, policy, scale, planes, map)",
                       luaL_tolstring(L, -1, NULL));
    }
    x->path = obm_lua_field_string(L, at, keep, "path");
    if (!x->path && lua_geti(L, at, 1) != LUA_TSTRING) luaL_error(L, "an expert's path is missing");
    if (!x->path) x->path = obm_lua_keep(L, keep, lua_gettop(L)), lua_pop(L, 1);
    const char *name = obm_lua_field_string(L, at, keep, "name");
    if (name) x->name = name;
    x->policy = obm_lua_field_string(L, at, keep, "policy");
    x->scale = obm_lua_field_string(L, at, keep, "scale");
    x->planes = (int)obm_lua_field_integer(L, at, "planes");
    int type = lua_getfield(L, at, "map");
    if (type != LUA_TNIL && type != LUA_TTABLE)
        luaL_error(L, "map is a table of globs to \"1bit\", \"full\" or \"drop\"");
    if (type == LUA_TTABLE) expert_map(L, keep, lua_gettop(L), x);
    lua_pop(L, 1);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const obm_expert *)a)->name, ((const obm_expert *)b)->name);
}

/* { name = expert } in the order of the names' bytes, { { name =, path = }, ... } in its own. */
static obm_expert *experts_from(lua_State *L, int keep, int at, size_t *n) {
    luaL_checktype(L, at, LUA_TTABLE);
    size_t sequence = (size_t)lua_rawlen(L, at), i = 0;
    *n = sequence ? sequence : count_keys(L, at);
    obm_expert *experts = obm_lua_alloc(L, keep, *n, sizeof *experts);
    for (; sequence && i < *n; i++, lua_pop(L, 1)) {
        lua_geti(L, at, (lua_Integer)i + 1);
        expert_from(L, keep, lua_gettop(L), &experts[i]);
        if (!experts[i].name) luaL_error(L, "expert %I of the list has no name", (lua_Integer)i + 1);
    }
    if (sequence) return experts;
    for (lua_pushnil(L); lua_next(L, at); lua_pop(L, 1)) {
        if (lua_type(L, -2) != LUA_TSTRING)
            luaL_error(L, "experts is a table of names to a path or a table { path, policy = ... }");
        experts[i].name = obm_lua_keep(L, keep, lua_absindex(L, -2));
        expert_from(L, keep, lua_gettop(L), &experts[i++]);
    }
    qsort(experts, *n, sizeof *experts, by_name);
    return experts;
}

static const char *path_of_base(lua_State *L) {
    if (!luaL_testudata(L, 1, OBM_LUA_CHECKPOINT)) return obm_lua_string(L, 1);
    return obm_checkpoint_path(obm_lua_box_check(L, 1, OBM_LUA_CHECKPOINT)->p);
}

/* compress(base, experts, {out, profile, overwrite, dry_run, progress, shared, tall_lambda, shared_dtype}) -> pack, or
 * the plan of a dry run */
int obm_lua_compress(lua_State *L) {
    lua_settop(L, 3);
    obm_lua_options(L, 3, "out profile overwrite dry_run progress shared tall_lambda shared_dtype");
    lua_newtable(L);
    const int keep = 4, context = 5;
    const char *base = path_of_base(L), *out = obm_lua_field_string(L, 3, keep, "out");
    if (!out) return luaL_error(L, "compress needs the option out, the folder of the pack");
    obm_context *ctx = obm_lua_context(L);
    obm_compress_options options = OBM_INIT(obm_compress_options);
    size_t n;
    obm_expert *experts = experts_from(L, keep, 2, &n);
    options.profile = obm_lua_field_profile(L, 3, "profile");
    options.overwrite = obm_lua_field_boolean(L, 3, "overwrite", false);
    options.shared = obm_lua_field_string(L, 3, keep, "shared");
    options.tall_lambda = obm_lua_field_number(L, 3, "tall_lambda");
    options.shared_dtype = obm_lua_field_string(L, 3, keep, "shared_dtype");
    options.dry_run = obm_lua_field_boolean(L, 3, "dry_run", false);
    obm_lua_call call;
    obm_lua_call_init(L, &call, 3, false);
    options.progress = obm_lua_progress;
    options.progress_user = &call;
    obm_lua_box *b = pack_new(L, context);
    obm_plan plan = {0};
    obm_pack *pack = NULL;
    obm_error err;
    obm_lua_begin(&call, lua_touserdata(L, context));
    obm_status status = obm_compress(ctx, base, experts, n, &options, out, &plan, options.dry_run ? NULL : &pack, &err);
    if (pack)
        obm_lua_box_fill(b, pack);
    else
        obm_lua_box_close(b);
    int failed = obm_lua_end(&call, status, &err);
    if (failed) return failed;
    if (options.dry_run) obm_lua_push_plan(L, &plan);
    return 1;
}

/* ---- changes ---- */

static int busy(lua_State *L, const char *message) {
    obm_error err = {.code = OBM_E_BUSY};
    strcpy(err.message, message);
    return obm_lua_fail(L, &err);
}

/* The pack to change, or NULL with the failure pushed: a model's own pack is in use. */
static obm_pack *pack_to_change(lua_State *L) {
    obm_lua_box *b = obm_lua_box_check(L, 1, OBM_LUA_PACK);
    if (!b->own)
        busy(L, "this pack belongs to an open model: open it with pack(path) to change it");
    else if (b->calls)
        busy(L, "this pack is in use by a call that is running");
    return b->calls ? NULL : b->own;
}

/* Adding and removing map the files anew: tensors that look into the old ones must be gone. */
static bool has_views(lua_State *L) {
    obm_lua_box *b = lua_touserdata(L, 1);
    if (b->views) lua_gc(L, LUA_GCCOLLECT);
    if (b->views) busy(L, "tensors of this pack are in use: let go of what pack:tensors() returned to change it");
    return b->views != 0;
}

static int done(lua_State *L, obm_lua_call *call, obm_status status, const obm_error *err) {
    int failed = obm_lua_end(call, status, err);
    if (failed) return failed;
    lua_pushboolean(L, 1);
    return 1;
}

/* pack:add(name, expert, {overwrite, progress}) */
static int pack_add(lua_State *L) {
    lua_settop(L, 4);
    obm_pack *p = pack_to_change(L);
    if (!p || has_views(L)) return 3;
    obm_lua_options(L, 4, "overwrite progress");
    lua_newtable(L);
    obm_expert expert = {.name = obm_lua_string(L, 2)};
    expert_from(L, 5, 3, &expert);
    expert.name = obm_lua_string(L, 2);
    obm_compress_options options = OBM_INIT(obm_compress_options);
    options.overwrite = obm_lua_field_boolean(L, 4, "overwrite", false);
    obm_lua_call call;
    obm_lua_call_init(L, &call, 4, false);
    options.progress = obm_lua_progress;
    options.progress_user = &call;
    obm_error err;
    obm_lua_begin(&call, lua_touserdata(L, 1));
    return done(L, &call, obm_pack_add(p, &expert, &options, &err), &err);
}

static int pack_remove(lua_State *L) {
    obm_pack *p = pack_to_change(L);
    if (!p || has_views(L)) return 3;
    obm_error err;
    if (obm_pack_remove(p, obm_lua_string(L, 2), &err) != OBM_OK) return obm_lua_fail(L, &err);
    lua_pushboolean(L, 1);
    return 1;
}

/* pack:adopt(path) */
static int pack_adopt(lua_State *L) {
    obm_pack *p = pack_to_change(L);
    if (!p || has_views(L)) return 3;
    obm_error err;
    if (obm_pack_adopt(p, obm_lua_string(L, 2), &err) != OBM_OK) return obm_lua_fail(L, &err);
    lua_pushboolean(L, 1);
    return 1;
}

static const char *const reading_names[] = {"onto_base", "recomputed"};
static const char *const profile_names[] = {"default", "paper", "mergekit"};

static int pack_settings(lua_State *L) {
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    obm_pack_get_settings(pack_of(L), &s);
    lua_newtable(L);
    obm_lua_set_number(L, "lambda", s.lambda);
    obm_lua_set_string(L, "reading", reading_names[s.reading]);
    obm_lua_set_string(L, "profile", profile_names[s.profile]);
    obm_lua_set_number(L, "density", s.density);
    return 1;
}

static bool given(lua_State *L, const char *name) {
    bool is = lua_getfield(L, 2, name) != LUA_TNIL;
    lua_pop(L, 1);
    return is;
}

/* pack:set{lambda, reading, profile, density} */
static int pack_set(lua_State *L) {
    obm_pack *p = pack_to_change(L);
    if (!p) return 3;
    lua_settop(L, 2);
    obm_lua_options(L, 2, "lambda reading profile density");
    lua_newtable(L);
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    obm_pack_get_settings(p, &s);
    if (given(L, "lambda")) s.lambda = obm_lua_field_number(L, 2, "lambda");
    if (given(L, "density")) s.density = obm_lua_field_number(L, 2, "density");
    if (given(L, "profile")) s.profile = obm_lua_field_profile(L, 2, "profile");
    const char *reading = obm_lua_field_string(L, 2, 3, "reading");
    if (reading) {
        int r = strcmp(reading, "onto_base") == 0 ? 0 : strcmp(reading, "recomputed") == 0 ? 1 : -1;
        if (r < 0) return luaL_error(L, "unknown reading \"%s\" (known: onto_base, recomputed)", reading);
        s.reading = (obm_reading)r;
    }
    obm_error err;
    if (obm_pack_set_settings(p, &s, &err) != OBM_OK) return obm_lua_fail(L, &err);
    lua_pushboolean(L, 1);
    return 1;
}

/* pack:verify{progress} -> true */
static int pack_verify(lua_State *L) {
    const obm_pack *p = pack_of(L);
    lua_settop(L, 2);
    obm_lua_options(L, 2, "progress");
    obm_lua_call call;
    obm_lua_call_init(L, &call, 2, false);
    obm_error err;
    obm_lua_begin(&call, lua_touserdata(L, 1));
    return done(L, &call, obm_pack_verify(p, obm_lua_progress, &call, &err), &err);
}

/* ---- what is in it ---- */

static int pack_tasks(lua_State *L) {
    const obm_pack *p = pack_of(L);
    lua_newtable(L);
    for (size_t i = 0; i < obm_pack_task_count(p); i++) {
        lua_pushstring(L, obm_pack_task_name(p, i));
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

static int pack_path(lua_State *L) {
    lua_pushstring(L, obm_pack_path(pack_of(L)));
    return 1;
}

static int pack_base(lua_State *L) {
    obm_lua_checkpoint_borrow(L, obm_pack_base(pack_of(L)), 1);
    return 1;
}

static int pack_base_bytes(lua_State *L) {
    lua_pushinteger(L, (lua_Integer)obm_pack_base_bytes(pack_of(L)));
    return 1;
}

/* The task at stack place 2: a name or an index from 1.  0: failed, the values are pushed. */
static int task_at(lua_State *L, const obm_pack *p, size_t *task) {
    obm_error err;
    lua_settop(L, 2);
    lua_newtable(L);
    double *w = obm_lua_weights_buffer(L, 3, p);
    if (obm_lua_weights(L, 2, p, w, &err) != OBM_OK) return obm_lua_fail(L, &err);
    for (size_t i = 0; i < obm_pack_task_count(p); i++) {
        if (w[i] != 0) return *task = i, 0;
    }
    err = (obm_error){.code = OBM_E_NOTFOUND};
    strcpy(err.message, "this route has no task");
    return obm_lua_fail(L, &err);
}

/* pack:bytes(task) -> {class = {tensors, params, bytes_expert, bytes_pack, bytes_adapter}} */
static int pack_bytes(lua_State *L) {
    const obm_pack *p = pack_of(L);
    size_t task;
    int failed = task_at(L, p, &task);
    if (failed) return failed;
    obm_class_bytes b[OBM_CLASS_COUNT];
    obm_pack_bytes(p, task, b);
    lua_newtable(L);
    for (int c = 0; c < OBM_CLASS_COUNT; c++) {
        if (!b[c].tensors) continue;
        lua_newtable(L);
        obm_lua_set_integer(L, "tensors", b[c].tensors);
        obm_lua_set_integer(L, "params", b[c].params);
        obm_lua_set_integer(L, "bytes_expert", b[c].bytes_expert);
        obm_lua_set_integer(L, "bytes_pack", b[c].bytes_pack);
        obm_lua_set_integer(L, "bytes_adapter", b[c].bytes_adapter);
        lua_setfield(L, -2, obm_class_name((obm_class)c));
    }
    return 1;
}

static int pack_policy(lua_State *L) {
    const obm_pack *p = pack_of(L);
    size_t task;
    int failed = task_at(L, p, &task);
    if (failed) return failed;
    lua_pushstring(L, obm_pack_policy(p, task));
    return 1;
}

/* pack:text(task) -> "tokenizer, template, eos": what of these the expert brings itself */
static int pack_text(lua_State *L) {
    const obm_pack *p = pack_of(L);
    size_t task;
    int failed = task_at(L, p, &task);
    if (failed) return failed;
    lua_pushstring(L, obm_pack_text(p, task));
    return 1;
}

/* Each plane is { signs, scales }: tensors that look into the pack. */
static void push_planes(lua_State *L, const obm_pack_tensor *t) {
    lua_newtable(L);
    for (int i = 0; i < t->planes; i++) {
        obm_tensor signs = {.data = t->signs[i], .dtype = OBM_U8, .ndim = 2, .shape = {t->rows, t->row_bytes}};
        obm_tensor scales = {.data = t->scales[i], .dtype = OBM_F32, .ndim = 1, .shape = {t->n_scales}};
        lua_newtable(L);
        obm_lua_tensor_view(L, &signs, 1);
        lua_rawseti(L, -2, 1);
        obm_lua_tensor_view(L, &scales, 1);
        lua_rawseti(L, -2, 2);
        lua_rawseti(L, -2, i + 1);
    }
}

/* pack:shared() -> {method, lambda, tensors, bytes} of the vectors that masks apply to, nil without */
static int pack_shared(lua_State *L) {
    obm_pack_shared_info s;
    if (!obm_pack_shared(pack_of(L), &s)) {
        lua_pushnil(L);
        return 1;
    }
    lua_newtable(L);
    obm_lua_set_string(L, "method", s.method);
    obm_lua_set_number(L, "lambda", s.lambda);
    obm_lua_set_integer(L, "tensors", s.tensors);
    obm_lua_set_integer(L, "bytes", s.bytes);
    return 1;
}

static void set_mask(lua_State *L, const obm_pack_tensor *t) {
    obm_tensor bits = {.data = t->mask, .dtype = OBM_U8, .ndim = 2, .shape = {t->rows, t->row_bytes}};
    if (!t->mask) return;
    obm_lua_tensor_view(L, &bits, 1);
    lua_setfield(L, -2, "mask");
    obm_lua_set_number(L, "scaling", t->scaling);
}

/* pack:tensors(task) -> list of {name, class, mode, bytes, rows, cols, rank, planes, mask, scaling} */
static int pack_tensors(lua_State *L) {
    const obm_pack *p = pack_of(L);
    size_t task;
    int failed = task_at(L, p, &task);
    if (failed) return failed;
    lua_newtable(L);
    for (size_t i = 0; i < obm_pack_tensor_count(p); i++) {
        obm_pack_tensor t;
        obm_pack_tensor_at(p, task, i, &t);
        lua_newtable(L);
        obm_lua_set_string(L, "name", t.name);
        obm_lua_set_string(L, "class", obm_class_name(t.cls));
        obm_lua_set_string(L, "mode", obm_mode_name(t.mode));
        obm_lua_set_integer(L, "bytes", t.bytes_pack);
        obm_lua_set_integer(L, "rows", (uint64_t)t.rows);
        obm_lua_set_integer(L, "cols", (uint64_t)t.cols);
        obm_lua_set_integer(L, "rank", (uint64_t)t.rank);
        push_planes(L, &t);
        lua_setfield(L, -2, "planes");
        set_mask(L, &t);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

/* pack:runs() -> list of {name, class, planes, hard, soft, hard_masks, soft_masks, overlays} */
static int pack_runs(lua_State *L) {
    const obm_pack *p = pack_of(L);
    size_t n = obm_pack_tensor_count(p);
    obm_tensor_run *runs = lua_newuserdatauv(L, (n + 1) * sizeof *runs, 0);
    obm_error err;
    if (obm_pack_runs(p, runs, &err) != OBM_OK) return obm_lua_fail(L, &err);
    lua_newtable(L);
    for (size_t i = 0; i < n; i++) {
        lua_newtable(L);
        obm_lua_set_string(L, "name", runs[i].name);
        obm_lua_set_string(L, "class", obm_class_name(runs[i].cls));
        obm_lua_set_integer(L, "planes", runs[i].planes);
        obm_lua_set_string(L, "hard", obm_run_name(runs[i].hard));
        obm_lua_set_string(L, "soft", obm_run_name(runs[i].soft));
        obm_lua_set_integer(L, "hard_masks", (uint64_t)runs[i].hard_masks);
        obm_lua_set_integer(L, "soft_masks", (uint64_t)runs[i].soft_masks);
        obm_lua_set_integer(L, "overlays", runs[i].overlays);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

/* ---- routes ---- */

/* pack:parse_route(route) -> {task = weight} */
static int pack_parse_route(lua_State *L) {
    const obm_pack *p = pack_of(L);
    obm_error err;
    lua_settop(L, 2);
    lua_newtable(L);
    double *w = obm_lua_weights_buffer(L, 3, p);
    if (obm_lua_weights(L, 2, p, w, &err) != OBM_OK) return obm_lua_fail(L, &err);
    obm_lua_push_route(L, p, w);
    return 1;
}

static int pack_format_route(lua_State *L) {
    const obm_pack *p = pack_of(L);
    obm_error err;
    lua_settop(L, 2);
    lua_newtable(L);
    double *w = obm_lua_weights_buffer(L, 3, p);
    char **text = obm_lua_scratch(L, sizeof *text, obm_lua_clear_pointer);
    if (obm_lua_weights(L, 2, p, w, &err) != OBM_OK || obm_pack_format_route(p, w, text, &err) != OBM_OK)
        return obm_lua_fail(L, &err);
    lua_pushstring(L, *text);
    obm_lua_scratch_end(text);
    return 1;
}

/* pack:materialise(route, name) -> tensor, f32 */
static int pack_materialise(lua_State *L) {
    const obm_pack *p = pack_of(L);
    const char *name = obm_lua_string(L, 3);
    obm_error err;
    obm_tensor shape;
    lua_settop(L, 3);
    lua_newtable(L);
    double *w = obm_lua_weights_buffer(L, 4, p);
    if (obm_lua_weights(L, 2, p, w, &err) != OBM_OK || obm_pack_route_shape(p, w, name, &shape, &err) != OBM_OK)
        return obm_lua_fail(L, &err);
    float *data = obm_lua_tensor_new(L, shape.ndim, shape.shape);
    return obm_pack_materialise(p, w, name, data, &err) == OBM_OK ? 1 : obm_lua_fail(L, &err);
}

/* pack:export(route, out, {dtype, shard_bytes, overwrite, dry_run, progress}) -> report */
static int pack_export(lua_State *L) {
    const obm_pack *p = pack_of(L);
    const char *out = obm_lua_string(L, 3);
    lua_settop(L, 4);
    obm_lua_options(L, 4, "dtype shard_bytes overwrite dry_run progress");
    lua_newtable(L);
    obm_error err;
    double *w = obm_lua_weights_buffer(L, 5, p);
    if (obm_lua_weights(L, 2, p, w, &err) != OBM_OK) return obm_lua_fail(L, &err);
    obm_export_options options = OBM_INIT(obm_export_options);
    options.dtype = obm_lua_field_string(L, 4, 5, "dtype");
    options.shard_bytes = obm_lua_field_size(L, 4, "shard_bytes");
    options.overwrite = obm_lua_field_boolean(L, 4, "overwrite", false);
    options.dry_run = obm_lua_field_boolean(L, 4, "dry_run", false);
    obm_lua_call call;
    obm_lua_call_init(L, &call, 4, false);
    options.progress = obm_lua_progress;
    options.progress_user = &call;
    obm_export_report report = {0};
    obm_lua_begin(&call, lua_touserdata(L, 1));
    int failed = obm_lua_end(&call, obm_pack_export(p, w, &options, out, &report, &err), &err);
    if (failed) return failed;
    obm_lua_push_plan(L, &report.plan);
    obm_lua_set_integer(L, "changed", report.changed);
    obm_lua_set_integer(L, "lost", report.lost);
    return 1;
}

/* ---- the router ---- */

static void push_report(lua_State *L, const obm_router_report *r) {
    lua_newtable(L);
    luaL_setmetatable(L, OBM_LUA_REPORT);
    obm_lua_set_number(L, "accuracy", r->accuracy);
    obm_lua_set_number(L, "calibration_error", r->calibration_error);
    obm_lua_set_integer(L, "layer", (uint64_t)r->layer);
    obm_lua_set_integer(L, "n_train", r->n_train);
    obm_lua_set_integer(L, "n_held_out", r->n_held_out);
    lua_newtable(L);
    for (size_t i = 0; i < r->tasks; i++) {
        lua_newtable(L);
        for (size_t j = 0; j < r->tasks; j++) {
            lua_pushinteger(L, r->confusion[i][j]);
            lua_rawseti(L, -2, (lua_Integer)j + 1);
        }
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    lua_setfield(L, -2, "confusion");
    lua_pushcfunction(L, pack_tasks);
    lua_pushvalue(L, 1);
    lua_call(L, 1, 1);
    lua_setfield(L, -2, "tasks");
}

static const char **labels_from(lua_State *L, int keep, int at, size_t n) {
    luaL_checktype(L, at, LUA_TTABLE);
    if ((size_t)luaL_len(L, at) != n) luaL_error(L, "%I texts but %I labels", (lua_Integer)n, luaL_len(L, at));
    const char **labels = obm_lua_alloc(L, keep, n, sizeof *labels);
    for (size_t i = 0; i < n; i++, lua_pop(L, 1)) {
        if (lua_geti(L, at, (lua_Integer)i + 1) != LUA_TSTRING)
            luaL_error(L, "labels are task names, found %s", luaL_typename(L, -1));
        labels[i] = obm_lua_keep(L, keep, lua_gettop(L));
    }
    return labels;
}

/* pack:train_router(texts, labels, {layer, l2, holdout, seed, progress}) -> report */
static int pack_train_router(lua_State *L) {
    obm_pack *p = pack_to_change(L);
    if (!p) return 3;
    lua_settop(L, 4);
    obm_lua_options(L, 4, "layer l2 holdout seed progress");
    lua_newtable(L);
    obm_lua_prompts prompts;
    obm_lua_prompts_from(L, 5, 2, &prompts);
    const char **labels = labels_from(L, 5, 3, prompts.n);
    obm_router_options options = OBM_INIT(obm_router_options);
    options.layer = (int)obm_lua_field_integer(L, 4, "layer");
    options.l2 = obm_lua_field_number(L, 4, "l2");
    options.holdout = obm_lua_field_number(L, 4, "holdout");
    options.seed = (uint64_t)obm_lua_field_integer(L, 4, "seed");
    obm_lua_call call;
    obm_lua_call_init(L, &call, 4, false);
    options.progress = obm_lua_progress;
    options.progress_user = &call;
    obm_router_report *report = obm_lua_alloc(L, 5, 1, sizeof *report);
    obm_error err;
    obm_lua_begin(&call, lua_touserdata(L, 1));
    int failed =
        obm_lua_end(&call, obm_router_train(p, prompts.items, labels, prompts.n, &options, report, &err), &err);
    if (failed) return failed;
    push_report(L, report);
    return 1;
}

static int pack_router_report(lua_State *L) {
    const obm_pack *p = pack_of(L);
    obm_router_report *report = lua_newuserdatauv(L, sizeof *report, 0);
    obm_error err;
    if (obm_pack_router_report(p, report, &err) != OBM_OK) return obm_lua_fail(L, &err);
    push_report(L, report);
    return 1;
}

static const luaL_Reg pack_methods[] = {{"add", pack_add},
                                        {"remove", pack_remove},
                                        {"adopt", pack_adopt},
                                        {"set", pack_set},
                                        {"settings", pack_settings},
                                        {"verify", pack_verify},
                                        {"tasks", pack_tasks},
                                        {"path", pack_path},
                                        {"base", pack_base},
                                        {"base_bytes", pack_base_bytes},
                                        {"shared", pack_shared},
                                        {"bytes", pack_bytes},
                                        {"policy", pack_policy},
                                        {"text", pack_text},
                                        {"tensors", pack_tensors},
                                        {"runs", pack_runs},
                                        {"parse_route", pack_parse_route},
                                        {"format_route", pack_format_route},
                                        {"materialise", pack_materialise},
                                        {"export", pack_export},
                                        {"train_router", pack_train_router},
                                        {"router_report", pack_router_report},
                                        {NULL, NULL}};

void obm_lua_open_pack(lua_State *L) {
    obm_lua_type(L, OBM_LUA_PACK, pack_methods, NULL, NULL, NULL);
    luaL_newmetatable(L, OBM_LUA_REPORT);
    lua_pop(L, 1);
}
