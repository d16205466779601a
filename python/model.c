/* Model, Stream and Request: running, scoring, generating, routing. */
#include "obm_py.h"

#include <stdio.h>
#include <string.h>

typedef struct Model {
    PyObject_HEAD obm_model *m;
    PyObject *context, *pack_owner; /* the Pack it was made from, or NULL */
} Model;

static obm_model *model_get(PyObject *o) { return ((Model *)o)->m; }
static const obm_pack *model_pack_of(PyObject *o) { return obm_model_pack(model_get(o)); }

static PyObject *model_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", "base", "kv", "route_budget", "materialise", "z12", "progress", "prefill", NULL};
    PyObject *what, *base_arg = Py_None, *path = NULL, *base = NULL, *progress = Py_None, *z12 = NULL;
    const char *kv = "f32", *prefill = "f32";
    unsigned long long budget = 0;
    int materialise = 0;
    obm_py_state *st = PyType_GetModuleState(type);
    obm_model_options options = OBM_INIT(obm_model_options);
    if (!obm_py_parse(args, kwargs, "O|OsKpOOs", names, &what, &base_arg, &kv, &budget, &materialise,
                      &z12, &progress, &prefill))
        return NULL;
    obm_py_call call;
    if (obm_py_dtype(st, kv, OBM_F16, &options.kv) < 0 || obm_py_dtype(st, prefill, OBM_BF16, &options.prefill) < 0 || obm_py_z12(st, z12, &options.z12) < 0 ||
        obm_py_call_init(&call, st, progress) < 0)
        return NULL;
    bool from_pack = Py_TYPE(what) == st->pack;
    if (!from_pack && !obm_py_path(what, &path)) return NULL;
    PyObject *context = NULL;
    obm_context *ctx = base_arg == Py_None || obm_py_path(base_arg, &base) ? obm_py_context(st, &context) : NULL;
    Model *self = ctx ? PyObject_New(Model, type) : NULL;
    if (self) {
        self->m = NULL;
        self->context = Py_NewRef(context);
        self->pack_owner = from_pack ? Py_NewRef(what) : NULL;
        options.base = base ? PyBytes_AsString(base) : NULL;
        options.route_budget = budget;
        options.materialise = materialise;
        options.progress = obm_py_progress;
        options.progress_user = &call;
        const char *path_text = path ? PyBytes_AsString(path) : NULL;
        const obm_pack *pack = from_pack ? obm_py_pack_get(what) : NULL;
        obm_error err;
        obm_py_begin(&call);
        obm_status status = from_pack ? obm_model_from_pack(ctx, pack, &options, &self->m, &err)
                                      : obm_model_open(ctx, path_text, &options, &self->m, &err);
        if (obm_py_end(&call, status, &err) < 0) Py_CLEAR(self);
    }
    Py_XDECREF(context);
    Py_XDECREF(path);
    Py_XDECREF(base);
    return (PyObject *)self;
}

static void model_dealloc(PyObject *o) {
    Model *self = (Model *)o;
    PyTypeObject *type = Py_TYPE(o);
    obm_model_free(self->m);
    Py_XDECREF(self->pack_owner);
    Py_XDECREF(self->context);
    PyObject_Free(o);
    Py_DECREF(type);
}

static PyObject *model_tokenizer(PyObject *o, void *unused) {
    (void)unused;
    const obm_tokenizer *t = obm_model_tokenizer(model_get(o));
    if (!t) Py_RETURN_NONE;
    return obm_py_tokenizer_borrow(OBM_PY_STATE(o), t, o);
}

static PyObject *model_pack(PyObject *o, void *unused) {
    (void)unused;
    Model *self = (Model *)o;
    if (self->pack_owner) return Py_NewRef(self->pack_owner);
    const obm_pack *p = model_pack_of(o);
    if (!p) Py_RETURN_NONE;
    return obm_py_pack_borrow(OBM_PY_STATE(o), p, o);
}

static const char *prefill_name(const obm_model_info *i) { return i->prefill == OBM_BF16 ? "bf16" : "f32"; }

static PyObject *model_info(PyObject *o, void *unused) {
    (void)unused;
    obm_model_info i;
    obm_model_describe(model_get(o), &i);
    return Py_BuildValue("{ss,sL,sL,sL,sL,sL,sL,sL,sL,sL,sO,sK,sK,sK,sK,sK,ss}", "architecture", i.architecture, "vocab",
                         (long long)i.vocab, "hidden", (long long)i.hidden, "intermediate", (long long)i.intermediate,
                         "layers", (long long)i.layers, "heads", (long long)i.heads, "kv_heads", (long long)i.kv_heads,
                         "head_dim", (long long)i.head_dim, "max_positions", (long long)i.max_positions,
                         "sliding_window", (long long)i.sliding_window, "tied", i.tied ? Py_True : Py_False, "params",
                         (unsigned long long)i.params, "bytes", (unsigned long long)i.bytes, "z12_bytes",
                         (unsigned long long)i.z12_bytes, "z12_plain", (unsigned long long)i.z12_plain, "z12_to_come",
                         (unsigned long long)i.z12_to_come, "prefill", prefill_name(&i));
}

static PyObject *model_memory(PyObject *o, void *unused) {
    (void)unused;
    obm_model_memory m;
    obm_model_account(model_get(o), &m);
    return Py_BuildValue("{sK,sK,sK,sK,sK}", "base", (unsigned long long)m.base, "planes", (unsigned long long)m.planes,
                         "overlays", (unsigned long long)m.overlays, "kv", (unsigned long long)m.kv, "scratch",
                         (unsigned long long)m.scratch);
}

static PyObject *model_repr(PyObject *o) {
    obm_model_info i;
    obm_model_describe(model_get(o), &i);
    char packed[64] = "", more[64] = "";
    if (i.z12_plain)
        snprintf(packed, sizeof packed, ", z12: %llu MB of bf16 in %llu MB",
                 (unsigned long long)(i.z12_plain / 1000000), (unsigned long long)(i.z12_bytes / 1000000));
    if (i.z12_to_come)
        snprintf(more, sizeof more, "%s %llu MB of bf16 to come", i.z12_plain ? "," : ", z12:",
                 (unsigned long long)(i.z12_to_come / 1000000));
    return PyUnicode_FromFormat(
        "Model(%s, %lld layers, hidden %lld, vocab %lld, %llu parameters, %zd tasks%s%s%s)", i.architecture,
        (long long)i.layers, (long long)i.hidden, (long long)i.vocab, (unsigned long long)i.params,
        model_pack_of(o) ? (Py_ssize_t)obm_pack_task_count(model_pack_of(o)) : (Py_ssize_t)0, packed, more,
        i.prefill == OBM_BF16 ? ", prefill bf16" : "");
}

/* ---- routes ---- */

/* None: NULL (the caller's default).  Owned (PyMem); *failed on an exception. */
static double *route_weights(PyObject *o, PyObject *route, bool *failed) {
    *failed = false;
    if (!route || route == Py_None) return NULL;
    const obm_pack *pack = model_pack_of(o);
    *failed = true;
    if (!pack) {
        PyErr_SetString(OBM_PY_STATE(o)->errors[-OBM_E_ARG], "route: this is a plain model, only packs have routes");
        return NULL;
    }
    double *w = PyMem_Calloc(obm_pack_task_count(pack) + 1, sizeof *w);
    if (!w) return (double *)PyErr_NoMemory();
    if (obm_py_weights(OBM_PY_STATE(o), pack, route, w) < 0) return PyMem_Free(w), NULL;
    *failed = false;
    return w;
}

static bool is_auto(PyObject *route) {
    if (!route || route == Py_None) return true;
    return PyUnicode_Check(route) && PyUnicode_CompareWithASCIIString(route, "auto") == 0;
}

static PyObject *model_tokenizer_for(PyObject *o, PyObject *route) {
    bool failed;
    double *w = route_weights(o, route, &failed);
    if (failed) return NULL;
    const obm_tokenizer *t = obm_model_tokenizer_for(model_get(o), w);
    PyMem_Free(w);
    if (!t) Py_RETURN_NONE;
    return obm_py_tokenizer_borrow(OBM_PY_STATE(o), t, o);
}

/* ---- logits, hidden, embed ---- */

static PyObject *run(PyObject *o, PyObject *given, int layer, obm_run_options *options, PyObject *route) {
    bool failed;
    size_t n;
    int32_t *ids = obm_py_ids(given, &n);
    if (!ids) return NULL;
    double *w = route_weights(o, route, &failed);
    if (failed) return PyMem_Free(ids), NULL;
    obm_model *m = model_get(o);
    obm_model_info info;
    obm_model_describe(m, &info);
    int64_t shape[2] = {(int64_t)n, layer < 0 ? info.vocab : info.hidden};
    bool all = layer >= 0 || options->all;
    float *data;
    PyObject *t = all ? obm_py_tensor_new(OBM_PY_STATE(o), 2, shape, &data)
                      : obm_py_tensor_new(OBM_PY_STATE(o), 1, shape + 1, &data);
    options->route = w;
    obm_error err;
    obm_status status = OBM_OK;
    if (t) {
        Py_BEGIN_ALLOW_THREADS;
        status = layer < 0 ? obm_model_logits(m, ids, n, options, data, &err)
                           : obm_model_hidden(m, ids, n, layer, options, data, &err);
        Py_END_ALLOW_THREADS;
    }
    PyMem_Free(ids);
    PyMem_Free(w);
    if (status == OBM_OK) return obm_py_numpy(t);
    Py_DECREF(t);
    return obm_py_raise(OBM_PY_STATE(o), &err);
}

static PyObject *model_logits(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"ids", "all", "route", "decode", "kv", NULL};
    PyObject *ids, *route = Py_None;
    int all = 1, decode = 0;
    const char *kv = "f32";
    obm_run_options options = OBM_INIT(obm_run_options);
    if (!obm_py_parse(args, kwargs, "O|pOps", names, &ids, &all, &route, &decode, &kv)) return NULL;
    if (obm_py_dtype(OBM_PY_STATE(o), kv, OBM_F16, &options.kv) < 0) return NULL;
    options.all = all;
    options.decode = decode;
    return run(o, ids, -1, &options, route);
}

static PyObject *model_hidden(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"ids", "layer", "route", NULL};
    PyObject *ids, *route = Py_None;
    int layer;
    obm_run_options options = OBM_INIT(obm_run_options);
    if (!obm_py_parse(args, kwargs, "Oi|O", names, &ids, &layer, &route)) return NULL;
    if (layer < 0)
        return PyErr_Format(OBM_PY_STATE(o)->errors[-OBM_E_ARG], "layer: expected at least 0, found %d", layer);
    return run(o, ids, layer, &options, route);
}

static PyObject *model_embed(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"texts", "layer", "progress", NULL};
    PyObject *texts, *progress = Py_None;
    int layer = 0;
    if (!obm_py_parse(args, kwargs, "O|iO", names, &texts, &layer, &progress)) return NULL;
    obm_py_state *st = OBM_PY_STATE(o);
    obm_py_call call;
    obm_py_prompts prompts;
    if (obm_py_call_init(&call, st, progress) < 0 || obm_py_prompts_from(texts, &prompts) < 0) return NULL;
    obm_model_info info;
    obm_model_describe(model_get(o), &info);
    int64_t shape[2] = {(int64_t)prompts.n, info.hidden};
    float *data;
    PyObject *t = obm_py_tensor_new(st, 2, shape, &data);
    if (t) {
        obm_error err;
        obm_model *m = model_get(o);
        obm_py_begin(&call);
        obm_status status = obm_model_embed(m, prompts.items, prompts.n, layer, obm_py_progress, &call, data, &err);
        if (obm_py_end(&call, status, &err) < 0) Py_CLEAR(t);
    }
    obm_py_prompts_clear(&prompts);
    return obm_py_numpy(t);
}

static PyObject *model_verify_placement(PyObject *o, PyObject *unused) {
    (void)unused;
    obm_py_call call;
    if (obm_py_call_init(&call, OBM_PY_STATE(o), Py_None) < 0) return NULL;
    obm_model *m = model_get(o);
    char *json = NULL;
    obm_error err;
    obm_py_begin(&call);
    obm_status status = obm_model_verify_placement(m, &json, &err);
    PyObject *result = obm_py_end(&call, status, &err) < 0 ? NULL : obm_py_json(json);
    obm_free(json);
    return result;
}

/* ---- generation ---- */

typedef struct generation {
    obm_generate_options options;
    obm_py_call call;
    double *routes;
    bool *routed;
    const char **stop;
    PyObject *keep;
} generation;

static void generation_clear(generation *g) {
    PyMem_Free(g->routes);
    PyMem_Free(g->routed);
    PyMem_Free(g->stop);
    Py_CLEAR(g->keep);
}

static int stop_strings(generation *g, PyObject *stop) {
    if (!stop || stop == Py_None) return 0;
    PyObject *list = PyUnicode_Check(stop) ? Py_BuildValue("[O]", stop) : PySequence_List(stop);
    if (!list) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) PyErr_SetString(PyExc_TypeError, "stop is a str or a list of str");
        return -1;
    }
    g->keep = list;
    size_t n = (size_t)PyList_Size(list);
    g->stop = PyMem_Calloc(n + 1, sizeof *g->stop);
    if (!g->stop) return PyErr_NoMemory(), -1;
    for (size_t i = 0; i < n; i++) {
        PyObject *s = PyList_GetItem(list, (Py_ssize_t)i);
        g->stop[i] = PyUnicode_Check(s) ? PyUnicode_AsUTF8AndSize(s, NULL) : NULL;
        if (!g->stop[i]) {
            if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "stop is a str or a list of str");
            return -1;
        }
    }
    g->options.stop = g->stop;
    g->options.n_stop = n;
    return 0;
}

/* One route for all, or a list with one per prompt; None and "auto" leave a row to the router. */
static int routes_from(PyObject *o, generation *g, PyObject *route, const obm_py_prompts *prompts) {
    const obm_pack *pack = model_pack_of(o);
    bool many = PyList_Check(route) && !prompts->single;
    if (!many && is_auto(route)) return 0;
    if (!pack)
        return PyErr_SetString(OBM_PY_STATE(o)->errors[-OBM_E_ARG],
                               "route: this is a plain model, only packs have routes"),
               -1;
    size_t tasks = obm_pack_task_count(pack), n = many ? (size_t)PyList_Size(route) : 1;
    if (many && n != prompts->n)
        return PyErr_Format(PyExc_ValueError, "%zd routes for %zd prompts", (Py_ssize_t)n, (Py_ssize_t)prompts->n), -1;
    g->routes = PyMem_Calloc(n * tasks + 1, sizeof *g->routes);
    g->routed = PyMem_Calloc(n + 1, sizeof *g->routed);
    if (!g->routes || !g->routed) return PyErr_NoMemory(), -1;
    for (size_t i = 0; i < n; i++) {
        PyObject *item = many ? PyList_GetItem(route, (Py_ssize_t)i) : route;
        if (is_auto(item)) continue;
        g->routed[i] = true;
        if (obm_py_weights(OBM_PY_STATE(o), pack, item, g->routes + i * tasks) < 0) return -1;
    }
    g->options.routes = g->routes;
    g->options.routed = g->routed;
    g->options.n_routes = n;
    return 0;
}

/* Everything after the prompts; names match the keys of surface.md in all languages. */
static int generation_from(PyObject *o, PyObject *args, PyObject *kwargs, generation *g, PyObject **prompts_out,
                           obm_py_prompts *prompts) {
    static char *names[] = {"prompts",     "route",    "router", "max_tokens",         "temperature",
                            "top_k",       "top_p",    "min_p",  "repetition_penalty", "seed",
                            "stop",        "chat",     "batch",  "ignore_eos",         "progress",
                            "route_every", "template", NULL};
    PyObject *given, *route = Py_None, *router = Py_None, *stop = Py_None, *progress = Py_None;
    Py_ssize_t max_tokens = 0, top_k = 0, batch = 0, route_every = 0;
    unsigned long long seed = 0;
    int chat = 0, ignore_eos = 0;
    memset(g, 0, sizeof *g);
    obm_generate_options *opt = &g->options;
    opt->struct_size = sizeof *opt;
    if (!obm_py_parse(args, kwargs, "O|$OOndndddKOpnpOnz", names, &given, &route, &router, &max_tokens,
                      &opt->temperature, &top_k, &opt->top_p, &opt->min_p, &opt->repetition_penalty,
                      &seed, &stop, &chat, &batch, &ignore_eos, &progress, &route_every,
                      &opt->template_name))
        return -1;
    if (max_tokens < 0 || top_k < 0 || batch < 0 || route_every < 0)
        return PyErr_SetString(OBM_PY_STATE(o)->errors[-OBM_E_ARG],
                               "max_tokens, top_k, batch and route_every must be >= 0"),
               -1;
    opt->route_every = (size_t)route_every;
    opt->max_tokens = (size_t)max_tokens;
    opt->top_k = (size_t)top_k;
    opt->batch = (size_t)batch;
    opt->seed = seed;
    opt->chat = chat;
    opt->ignore_eos = ignore_eos;
    obm_py_state *st = OBM_PY_STATE(o);
    if (obm_py_call_init(&g->call, st, progress) < 0) return -1;
    opt->progress = obm_py_progress;
    opt->progress_user = &g->call;
    if (router != Py_None) {
        if (!PyCallable_Check(router))
            return PyErr_SetString(PyExc_TypeError, "router must be a callable (request) -> route"), -1;
        g->call.router = router;
        opt->router = obm_py_router;
        opt->router_user = &g->call;
    }
    g->call.pack = model_pack_of(o);
    g->call.model = o;
    opt->render = obm_py_render;
    opt->render_user = &g->call;
    int rc = obm_py_prompts_from(given, prompts);
    if (rc == 0 && (routes_from(o, g, route, prompts) < 0 || stop_strings(g, stop) < 0)) {
        obm_py_prompts_clear(prompts);
        rc = -1;
    }
    if (rc < 0) generation_clear(g);
    *prompts_out = given;
    return rc;
}

/* [(tokens generated before, {task: weight}), ...], or None. */
static PyObject *routes_list(const obm_pack *pack, const obm_completion *c) {
    if (!c->routes) Py_RETURN_NONE;
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < c->n_routes; i++) {
        PyObject *route = obm_py_route_dict(pack, c->routes + i * c->n_route);
        PyObject *item = route ? Py_BuildValue("(nN)", (Py_ssize_t)c->route_tokens[i], route) : NULL;
        if (!item || PyList_Append(list, item) < 0) Py_CLEAR(list);
        Py_XDECREF(item);
    }
    return list;
}

static PyObject *completion_object(PyObject *o, const obm_completion *c) {
    PyObject *ids = PyList_New((Py_ssize_t)c->n_ids);
    for (size_t i = 0; ids && i < c->n_ids; i++) {
        if (PyList_SetItem(ids, (Py_ssize_t)i, PyLong_FromLong(c->ids[i])) < 0) Py_CLEAR(ids);
    }
    PyObject *text = PyUnicode_DecodeUTF8(c->text ? c->text : "", (Py_ssize_t)c->text_len, "replace");
    PyObject *route = obm_py_route_dict(model_pack_of(o), c->route);
    PyObject *routes = routes_list(model_pack_of(o), c);
    bool made = text && ids && route && routes;
    return obm_py_call_hook(OBM_PY_STATE(o), "Completion",
                            made ? Py_BuildValue("(NNNsnN)", text, ids, route,
                                                 c->finish == OBM_FINISH_STOP ? "stop" : "length",
                                                 (Py_ssize_t)c->n_prompt, routes)
                                 : NULL);
}

static PyObject *model_generate(PyObject *o, PyObject *args, PyObject *kwargs) {
    generation g;
    obm_py_prompts prompts;
    PyObject *given, *result = NULL;
    if (generation_from(o, args, kwargs, &g, &given, &prompts) < 0) return NULL;
    obm_completion *out = PyMem_Calloc(prompts.n + 1, sizeof *out);
    if (out) {
        obm_error err;
        obm_model *m = model_get(o);
        g.call.prompts = &prompts;
        g.call.n_prompts = 1;
        obm_py_begin(&g.call);
        obm_status status = obm_model_generate_batch(m, prompts.items, prompts.n, &g.options, out, &err);
        if (obm_py_end(&g.call, status, &err) == 0) {
            result = prompts.single ? completion_object(o, &out[0]) : PyList_New(0);
            for (size_t i = 0; result && !prompts.single && i < prompts.n; i++) {
                PyObject *c = completion_object(o, &out[i]);
                if (!c || PyList_Append(result, c) < 0) Py_CLEAR(result);
                Py_XDECREF(c);
            }
            for (size_t i = 0; i < prompts.n; i++) obm_completion_clear(&out[i]);
        }
        PyMem_Free(out);
    }
    obm_py_prompts_clear(&prompts);
    generation_clear(&g);
    return result;
}

/* ---- Stream ---- */

typedef struct Stream {
    PyObject_HEAD obm_stream *s;
    PyObject *model, *router, *progress; /* references that the options point to */
    generation *g;
    obm_py_prompts prompts;
    bool running; /* inside next(): other threads, and what the callbacks do, must keep off */
} Stream;

static bool stream_is_free(Stream *self) {
    if (self->running)
        PyErr_SetString(OBM_PY_STATE((PyObject *)self)->errors[-OBM_E_BUSY], "the stream is inside next()");
    return !self->running;
}

static void stream_end(Stream *self) {
    obm_stream_free(self->s);
    self->s = NULL;
    if (!self->g) return;
    generation_clear(self->g);
    PyMem_Free(self->g);
    self->g = NULL;
    obm_py_prompts_clear(&self->prompts);
}

static PyObject *model_stream(PyObject *o, PyObject *args, PyObject *kwargs) {
    obm_py_state *st = OBM_PY_STATE(o);
    PyObject *given;
    generation *g = PyMem_Calloc(1, sizeof *g);
    if (!g) return PyErr_NoMemory();
    obm_py_prompts prompts;
    if (generation_from(o, args, kwargs, g, &given, &prompts) < 0) return PyMem_Free(g), NULL;
    Stream *self = prompts.single ? PyObject_New(Stream, st->stream) : NULL;
    if (!self) {
        if (!prompts.single) PyErr_SetString(PyExc_TypeError, "stream takes one prompt; generate takes a list");
        generation_clear(g);
        obm_py_prompts_clear(&prompts);
        PyMem_Free(g);
        return NULL;
    }
    *self = (Stream){.ob_base = self->ob_base, .model = Py_NewRef(o), .g = g, .prompts = prompts};
    self->router = Py_XNewRef(g->call.router);
    self->progress = Py_XNewRef(g->call.progress);
    obm_error err;
    obm_model *m = model_get(o);
    g->call.prompts = &self->prompts;
    g->call.n_prompts = 1;
    obm_py_begin(&g->call);
    obm_status status = obm_stream_open(m, self->prompts.items, &g->options, &self->s, &err);
    if (obm_py_end(&g->call, status, &err) < 0) Py_CLEAR(self);
    return (PyObject *)self;
}

static PyObject *stream_next(PyObject *o) {
    Stream *self = (Stream *)o;
    if (!stream_is_free(self) || !self->s) return NULL; /* without an exception: StopIteration */
    const char *text = NULL;
    size_t len = 0;
    obm_error err;
    self->running = true;
    obm_py_begin(&self->g->call);
    obm_status status = obm_stream_next(self->s, &text, &len, &err);
    int rc = obm_py_end(&self->g->call, status, &err);
    self->running = false;
    if (rc < 0) return NULL;
    return text ? PyUnicode_DecodeUTF8(text, (Py_ssize_t)len, "replace") : NULL;
}

static PyObject *stream_result(PyObject *o, void *unused) {
    (void)unused;
    Stream *self = (Stream *)o;
    if (!stream_is_free(self)) return NULL;
    if (!self->s) return PyErr_SetString(PyExc_ValueError, "the stream is closed"), NULL;
    return completion_object(self->model, obm_stream_result(self->s));
}

static PyObject *stream_close(PyObject *o, PyObject *unused) {
    (void)unused;
    if (!stream_is_free((Stream *)o)) return NULL;
    stream_end((Stream *)o);
    Py_RETURN_NONE;
}

static PyObject *stream_self(PyObject *o) { return Py_NewRef(o); }

static void stream_dealloc(PyObject *o) {
    Stream *self = (Stream *)o;
    PyTypeObject *type = Py_TYPE(o);
    stream_end(self);
    Py_XDECREF(self->router);
    Py_XDECREF(self->progress);
    Py_XDECREF(self->model);
    PyObject_Free(o);
    Py_DECREF(type);
}

static PyMethodDef stream_methods[] = {
    {"close", stream_close, METH_NOARGS, "close()\n\nFree the model for the next caller."}, {NULL, NULL, 0, NULL}};
static PyGetSetDef stream_getset[] = {{"result", stream_result, NULL, "the Completion so far", NULL},
                                      {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot stream_slots[] = {{Py_tp_dealloc, stream_dealloc},
                                     {Py_tp_iter, stream_self},
                                     {Py_tp_iternext, stream_next},
                                     {Py_tp_methods, stream_methods},
                                     {Py_tp_getset, stream_getset},
                                     {Py_tp_doc, "Pieces of text as they are generated; never splits a character."},
                                     {0, NULL}};
PyType_Spec obm_py_stream_spec = {"onebitmerge.Stream", sizeof(Stream), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, stream_slots};

/* ---- scoring, routing ---- */

static PyObject *score_object(PyObject *o, const obm_score *s) {
    PyObject *list = PyList_New((Py_ssize_t)s->n);
    for (size_t i = 0; list && i < s->n; i++) {
        if (PyList_SetItem(list, (Py_ssize_t)i, PyFloat_FromDouble(s->token_logprobs[i])) < 0) Py_CLEAR(list);
    }
    PyObject *route = obm_py_route_dict(model_pack_of(o), s->route);
    return obm_py_call_hook(OBM_PY_STATE(o), "Score",
                            list && route ? Py_BuildValue("(dNOdN)", s->logprob, list,
                                                          s->is_greedy ? Py_True : Py_False, s->perplexity, route)
                                          : NULL);
}

/* items: a list of (prompt, continuation or None, route or None); the package's score() makes it. */
static PyObject *model_score_items(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"items", "progress", NULL};
    PyObject *given, *progress = Py_None, *result = NULL;
    if (!obm_py_parse(args, kwargs, "O|O", names, &given, &progress)) return NULL;
    obm_py_state *st = OBM_PY_STATE(o);
    obm_py_call call;
    PyObject *items = obm_py_call_init(&call, st, progress) < 0 ? NULL : PySequence_List(given);
    if (!items) return NULL;
    size_t n = (size_t)PyList_Size(items);
    obm_score_item *in = PyMem_Calloc(n + 1, sizeof *in);
    obm_py_prompts *prompts = PyMem_Calloc(n + 1, sizeof *prompts);
    obm_score *out = PyMem_Calloc(n + 1, sizeof *out);
    double **routes = PyMem_Calloc(n + 1, sizeof *routes);
    int32_t **ids = PyMem_Calloc(n + 1, sizeof *ids);
    bool ok = in && prompts && out && routes && ids;
    if (!ok) PyErr_NoMemory();
    for (size_t i = 0; ok && i < n; i++) {
        PyObject *item = PyList_GetItem(items, (Py_ssize_t)i), *prompt, *continuation = Py_None, *route = Py_None;
        bool failed;
        if (!PyTuple_Check(item) || PyTuple_Size(item) < 1 || PyTuple_Size(item) > 3) {
            ok = (PyErr_Format(PyExc_TypeError,
                               "score item %zd: expected (prompt, continuation) or (prompt, continuation, route), "
                               "None where there is none, found %R",
                               (Py_ssize_t)i, item),
                  false);
            break;
        }
        ok = PyArg_ParseTuple(item, "O|OO", &prompt, &continuation, &route) &&
             obm_py_prompts_from(prompt, &prompts[i]) == 0;
        if (ok && !prompts[i].single) ok = (PyErr_SetString(PyExc_TypeError, "a score item has one prompt"), false);
        if (!ok) break;
        in[i].prompt = prompts[i].items[0];
        if (PyUnicode_Check(continuation))
            ok = (in[i].continuation = PyUnicode_AsUTF8AndSize(continuation, NULL)) != NULL;
        else if (continuation != Py_None)
            ok = (in[i].continuation_ids = ids[i] = obm_py_ids(continuation, &in[i].n_continuation_ids)) != NULL;
        if (ok && !is_auto(route)) {
            in[i].route = routes[i] = route_weights(o, route, &failed);
            ok = !failed;
        }
    }
    if (ok) {
        obm_error err;
        obm_model *m = model_get(o);
        obm_score_options options = OBM_INIT(obm_score_options);
        options.progress = obm_py_progress;
        options.render = obm_py_render;
        options.progress_user = options.render_user = &call;
        call.model = o;
        call.prompts = prompts;
        call.n_prompts = n;
        obm_py_begin(&call);
        obm_status status = obm_model_score(m, in, n, &options, out, &err);
        ok = obm_py_end(&call, status, &err) == 0;
        result = ok ? PyList_New(0) : NULL;
        for (size_t i = 0; result && i < n; i++) {
            PyObject *s = score_object(o, &out[i]);
            if (!s || PyList_Append(result, s) < 0) Py_CLEAR(result);
            Py_XDECREF(s);
        }
        for (size_t i = 0; ok && i < n; i++) obm_score_clear(&out[i]);
    }
    for (size_t i = 0; i < n && prompts && routes && ids; i++) {
        obm_py_prompts_clear(&prompts[i]);
        PyMem_Free(routes[i]);
        PyMem_Free(ids[i]);
    }
    PyMem_Free(in), PyMem_Free(prompts), PyMem_Free(out), PyMem_Free(routes), PyMem_Free(ids);
    Py_DECREF(items);
    return result;
}

static PyObject *model_score(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"prompt", "continuation", "route", NULL};
    PyObject *prompt, *continuation = Py_None, *route = Py_None;
    if (!obm_py_parse(args, kwargs, "O|OO", names, &prompt, &continuation, &route)) return NULL;
    if (PyList_Check(prompt) && PyList_Size(prompt) > 0 && PyTuple_Check(PyList_GetItem(prompt, 0)))
        return PyErr_SetString(PyExc_TypeError, "score takes one prompt and its continuation; a list of (prompt, "
                                                "continuation) or (prompt, continuation, route) goes to score_items"),
               NULL;
    /* One argument is a whole text: scored from its second token on. */
    PyObject *item = continuation == Py_None ? Py_BuildValue("([(sOO)])", "", prompt, route)
                                             : Py_BuildValue("([(OOO)])", prompt, continuation, route);
    PyObject *list = item ? model_score_items(o, item, NULL) : NULL;
    Py_XDECREF(item);
    PyObject *score = list ? Py_NewRef(PyList_GetItem(list, 0)) : NULL;
    Py_XDECREF(list);
    return score;
}

/* route(prompt, router=None) -> (weights dict, probabilities dict or None) */
static PyObject *model_route(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"prompt", "router", NULL};
    PyObject *given, *router = Py_None, *result = NULL;
    if (!obm_py_parse(args, kwargs, "O|O", names, &given, &router)) return NULL;
    obm_py_state *st = OBM_PY_STATE(o);
    const obm_pack *pack = model_pack_of(o);
    if (!pack)
        return PyErr_SetString(st->errors[-OBM_E_ARG], "route: this is a plain model, only packs have routes"), NULL;
    if (router != Py_None && !PyCallable_Check(router))
        return PyErr_SetString(PyExc_TypeError, "router must be a callable"), NULL;
    obm_py_call call;
    obm_py_prompts prompts;
    if (obm_py_call_init(&call, st, NULL) < 0 || obm_py_prompts_from(given, &prompts) < 0) return NULL;
    call.router = router;
    call.pack = pack;
    size_t tasks = obm_pack_task_count(pack);
    double *w = PyMem_Calloc(2 * tasks + 1, sizeof *w);
    if (w && prompts.n == 1) {
        obm_error err;
        obm_model *m = model_get(o);
        bool own = router != Py_None;
        obm_py_begin(&call);
        obm_status status =
            obm_model_route(m, prompts.items, own ? obm_py_router : NULL, &call, w, own ? NULL : w + tasks, &err);
        if (obm_py_end(&call, status, &err) == 0)
            result = Py_BuildValue("(NN)", obm_py_route_dict(pack, w),
                                   own ? Py_NewRef(Py_None) : obm_py_route_dict(pack, w + tasks));
    } else if (w) {
        PyErr_SetString(PyExc_TypeError, "route takes one prompt");
    } else {
        PyErr_NoMemory();
    }
    PyMem_Free(w);
    obm_py_prompts_clear(&prompts);
    return result;
}

#define KW(f) (PyCFunction)(void (*)(void)) f, METH_VARARGS | METH_KEYWORDS
#define GENERATE_ARGS                                                                                            \
    "*, route=None, router=None, max_tokens=0, temperature=0, top_k=0, top_p=0, min_p=0, repetition_penalty=0, " \
    "seed=0, "                                                                                                   \
    "stop=None, chat=False, batch=0, ignore_eos=False, progress=None, route_every=0, template=None)"
static PyMethodDef model_methods[] = {
    {"generate", KW(model_generate),
     "generate(prompts, " GENERATE_ARGS " -> Completion or list\n\n"
     "prompts: a str, a list of messages ({\"role\", \"content\"}), a list of ids, or a list of those.  chat: wrap a "
     "str as one user turn.\n"
     "route: \"auto\" (the pack's router, the default), a task, {task: weight}, or a list with one per prompt; router: "
     "a callable\n"
     "(Request) -> task name, index, dict or weights.  max_tokens 0: 256; batch 0: 8; temperature 0: greedy; top_k, "
     "top_p, min_p and\n"
     "repetition_penalty 0: off.  seed: prompt i draws from (seed, i), whatever the batch.  stop: a str or a list; not "
     "part of the text.\n"
     "route_every: where the router decides, ask it again after each so many generated tokens, with the text so far; "
     "0: once.\n"
     "template: the built-in chat template of that name, whatever the model's own is.\n"
     "A Completion is a str with .route (the last), .routes (with route_every: [(tokens generated before, route), "
     "...]), "
     ".ids,\n"
     ".finish_reason (\"stop\" or \"length\") and .prompt_tokens.\n"
     "Raises Error, what a router or progress raises, KeyboardInterrupt; BusyError if the model is in use: one call at "
     "a time."},
    {"stream", KW(model_stream), "stream(prompt, " GENERATE_ARGS " -> iterator of str"},
    {"logits", KW(model_logits),
     "logits(ids, all=True, route=None, decode=False, kv=\"f32\") -> ndarray\n\n(T, vocab) float32; (vocab,) of the "
     "last position with all=False."},
    {"hidden", KW(model_hidden),
     "hidden(ids, layer, route=None) -> ndarray\n\n(T, hidden) float32 after `layer`; 0 = embeddings."},
    {"verify_placement", model_verify_placement, METH_NOARGS,
     "verify_placement() -> dict\n\nWhere the pages of weights, planes and KV cache are, by NUMA node, and how many "
     "bytes "
     "are read from another node."},
    {"embed", KW(model_embed),
     "embed(texts, layer=0, progress=None) -> ndarray\n\n(n, hidden): mean-pooled hidden states of the base, what the "
     "router sees."},
    {"score", KW(model_score),
     "score(prompt, continuation=None, route=None) -> Score\n\nWithout continuation the prompt is a whole text."},
    {"score_items", KW(model_score_items),
     "score_items(items, progress=None) -> list of Score\n\nitems: (prompt, continuation or None, route or None), the "
     "last ones may be left out."},
    {"route", KW(model_route), "route(prompt, router=None) -> (weights, probabilities)"},
    {"tokenizer_for", model_tokenizer_for, METH_O,
     "tokenizer_for(route) -> Tokenizer or None\n\nWhat prompts are encoded and rendered with under a route: the "
     "expert's own under its hard route where it brings one, else the base's (None, soft routes)."},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef model_getset[] = {
    {"tokenizer", model_tokenizer, NULL, "the base's Tokenizer, or None; see tokenizer_for", NULL},
    {"pack", model_pack, NULL, "Pack, or None for a plain model", NULL},
    {"info", model_info, NULL, "dict of sizes", NULL},
    {"memory", model_memory, NULL, "resident bytes: base, planes, overlays, kv, scratch", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot model_slots[] = {
    {Py_tp_new, model_new},
    {Py_tp_dealloc, model_dealloc},
    {Py_tp_repr, model_repr},
    {Py_tp_methods, model_methods},
    {Py_tp_getset, model_getset},
    {Py_tp_doc, "Model(path, base=None, kv=\"f32\", route_budget=0, materialise=False, z12=\"auto\", "
                "progress=None, prefill=\"f32\")\n\n"
                "A Hugging Face folder, a pack folder, or an open Pack, ready to run.  A pack "
                "runs on the base and its sign planes; what cannot (an overlay) and everything "
                "with materialise=True is written out densely per route, within route_budget "
                "bytes (0: a quarter of the memory).  z12: bf16 matrices of the base in 12 bits per weight, without "
                "loss: the same bits come out and a step of one token reads 3/4 of the bytes.  \"auto\" packs them "
                "behind the first tokens where that is faster and memory has room for both, \"on\" or True while the "
                "model is opened, \"off\" or False not.  prefill: \"bf16\" rounds activations of prompts to bf16 where they "
                "meet bf16 weights, for up to 1.8 times the speed where info()[\"prefill_bf16\"]; elsewhere they stay f32, "
                "with a warning."},
    {0, NULL}};
PyType_Spec obm_py_model_spec = {"onebitmerge.Model", sizeof(Model), 0, Py_TPFLAGS_DEFAULT, model_slots};

/* ---- Request: what a router sees, valid during its call ---- */

typedef struct Request {
    PyObject_HEAD obm_request *r; /* NULL after the call */
    const obm_pack *pack;
} Request;

PyObject *obm_py_request_new(obm_py_state *st, obm_request *r, const obm_pack *pack) {
    Request *self = PyObject_New(Request, st->request);
    if (!self) return NULL;
    self->r = r;
    self->pack = pack;
    return (PyObject *)self;
}

void obm_py_request_end(PyObject *o) { ((Request *)o)->r = NULL; }

static obm_request *request_get(PyObject *o) {
    obm_request *r = ((Request *)o)->r;
    if (!r) PyErr_SetString(PyExc_ValueError, "a request is valid only while the router runs");
    return r;
}

static PyObject *request_text(PyObject *o, void *unused) {
    (void)unused;
    obm_request *r = request_get(o);
    return r ? PyUnicode_FromString(obm_request_text(r)) : NULL;
}

static PyObject *request_tokens(PyObject *o, void *unused) {
    (void)unused;
    obm_request *r = request_get(o);
    if (!r) return NULL;
    const int32_t *ids;
    size_t n;
    obm_request_tokens(r, &ids, &n);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        if (PyList_SetItem(list, (Py_ssize_t)i, PyLong_FromLong(ids[i])) < 0) Py_CLEAR(list);
    }
    return list;
}

static PyObject *request_features(PyObject *o, PyObject *args) {
    int layer = 0;
    obm_request *r = request_get(o);
    if (!r || !PyArg_ParseTuple(args, "|i", &layer)) return NULL;
    const float *x;
    size_t n;
    obm_error err;
    if (obm_request_features(r, layer, &x, &n, &err) != OBM_OK) return obm_py_raise(OBM_PY_STATE(o), &err);
    int64_t shape[1] = {(int64_t)n};
    float *data;
    PyObject *t = obm_py_tensor_new(OBM_PY_STATE(o), 1, shape, &data);
    if (t) memcpy(data, x, n * sizeof *x); /* the features die with the request */
    return obm_py_numpy(t);
}

static const double *request_builtin_of(PyObject *o) {
    obm_request *r = request_get(o);
    const double *p;
    obm_error err;
    if (!r) return NULL;
    if (obm_request_builtin(r, &p, &err) != OBM_OK) return (const double *)obm_py_raise(OBM_PY_STATE(o), &err);
    return p;
}

static PyObject *request_builtin(PyObject *o, void *unused) {
    (void)unused;
    const double *p = request_builtin_of(o);
    if (!p) return NULL;
    size_t best = 0, n = obm_request_task_count(((Request *)o)->r);
    for (size_t i = 1; i < n; i++) {
        if (p[i] > p[best]) best = i;
    }
    return PyUnicode_FromString(obm_request_task_name(((Request *)o)->r, best));
}

static PyObject *request_probabilities(PyObject *o, void *unused) {
    (void)unused;
    const double *p = request_builtin_of(o);
    return p ? obm_py_route_dict(((Request *)o)->pack, p) : NULL;
}

static PyObject *request_tasks(PyObject *o, void *unused) {
    (void)unused;
    obm_request *r = request_get(o);
    PyObject *list = r ? PyList_New(0) : NULL;
    for (size_t i = 0; list && i < obm_request_task_count(r); i++) {
        PyObject *s = PyUnicode_FromString(obm_request_task_name(r, i));
        if (!s || PyList_Append(list, s) < 0) Py_CLEAR(list);
        Py_XDECREF(s);
    }
    return list;
}

static void request_dealloc(PyObject *o) {
    PyTypeObject *type = Py_TYPE(o);
    PyObject_Free(o);
    Py_DECREF(type);
}

static PyMethodDef request_methods[] = {
    {"features", request_features, METH_VARARGS,
     "features(layer=0) -> ndarray\n\nMean-pooled hidden states after `layer` of the base."},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef request_getset[] = {
    {"text", request_text, NULL, "the user turns, joined by newlines", NULL},
    {"tokens", request_tokens, NULL, "the last 512 ids", NULL},
    {"tasks", request_tasks, NULL, "task names", NULL},
    {"builtin", request_builtin, NULL, "the built-in router's answer: a task name", NULL},
    {"probabilities", request_probabilities, NULL, "the built-in router's probabilities, {task: p}", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot request_slots[] = {{Py_tp_dealloc, request_dealloc},
                                      {Py_tp_methods, request_methods},
                                      {Py_tp_getset, request_getset},
                                      {Py_tp_doc, "What a router is asked about; valid only while the router runs."},
                                      {0, NULL}};
PyType_Spec obm_py_request_spec = {"onebitmerge.Request", sizeof(Request), 0,
                                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, request_slots};
