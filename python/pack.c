/* Pack: compress, open, change, account, export, train the router. */
#include "obm_py.h"

#include <string.h>

typedef struct Pack {
    PyObject_HEAD obm_pack *own; /* NULL when borrowed from a model */
    const obm_pack *p;
    PyObject *context, *owner;
} Pack;

const obm_pack *obm_py_pack_get(PyObject *o) { return ((Pack *)o)->p; }

static PyObject *pack_wrap(obm_py_state *st, const obm_pack *p, obm_pack *own, PyObject *context, PyObject *owner) {
    Pack *self = PyObject_New(Pack, st->pack);
    if (!self) return NULL;
    self->p = p;
    self->own = own;
    self->context = context;
    self->owner = Py_XNewRef(owner);
    return (PyObject *)self;
}

PyObject *obm_py_pack_borrow(obm_py_state *st, const obm_pack *p, PyObject *owner) {
    return pack_wrap(st, p, NULL, NULL, owner);
}

static PyObject *pack_own(obm_py_state *st, obm_pack *p, PyObject *context) {
    PyObject *self = pack_wrap(st, p, p, context, NULL);
    if (!self) {
        obm_pack_free(p);
        Py_DECREF(context);
    }
    return self;
}

static PyObject *pack_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", "base", NULL};
    PyObject *path = NULL, *base = NULL, *base_arg = Py_None, *context;
    if (!obm_py_parse(args, kwargs, "O&|O", names, obm_py_path, &path, &base_arg)) return NULL;
    obm_py_state *st = PyType_GetModuleState(type);
    obm_context *ctx = NULL;
    if (base_arg == Py_None || obm_py_path(base_arg, &base)) ctx = obm_py_context(st, &context);
    if (!ctx) {
        Py_DECREF(path);
        Py_XDECREF(base);
        return NULL;
    }
    obm_pack *p = NULL;
    obm_error err;
    obm_status status;
    const char *path_text = PyBytes_AsString(path), *base_text = base ? PyBytes_AsString(base) : NULL;
    Py_BEGIN_ALLOW_THREADS;
    status = obm_pack_open(ctx, path_text, base_text, &p, &err);
    Py_END_ALLOW_THREADS;
    Py_DECREF(path);
    Py_XDECREF(base);
    if (status == OBM_OK) return pack_own(st, p, context);
    Py_DECREF(context);
    return obm_py_raise(st, &err);
}

static void pack_dealloc(PyObject *o) {
    Pack *self = (Pack *)o;
    PyTypeObject *type = Py_TYPE(o);
    obm_pack_free(self->own);
    Py_XDECREF(self->context);
    Py_XDECREF(self->owner);
    PyObject_Free(o);
    Py_DECREF(type);
}

/* The pack to change, or an exception: a model's pack is in use. */
static obm_pack *pack_mutable(PyObject *o) {
    Pack *self = (Pack *)o;
    if (!self->own)
        PyErr_SetString(OBM_PY_STATE(o)->errors[-OBM_E_BUSY],
                        "this pack belongs to an open model: open it with Pack(path) to change it");
    return self->own;
}

/* ---- experts and options ---- */

typedef struct expert_args {
    obm_expert *items;
    size_t n;
    obm_map_rule **rules;
    PyObject *keep;
} expert_args;

static void experts_clear(expert_args *e) {
    for (size_t i = 0; e->rules && i < e->n; i++) PyMem_Free(e->rules[i]);
    PyMem_Free(e->rules);
    PyMem_Free(e->items);
    Py_CLEAR(e->keep);
    *e = (expert_args){0};
}

static int mode_from(obm_py_state *st, const char *name, obm_mode *out) {
    static const obm_mode modes[] = {OBM_MODE_1BIT, OBM_MODE_MASK, OBM_MODE_FULL, OBM_MODE_DROP};
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        if (strcmp(name, obm_mode_name(modes[i])) == 0) return *out = modes[i], 0;
    }
    PyErr_Format(st->errors[-OBM_E_ARG], "unknown mode \"%s\" (known: 1bit, mask, full, drop)", name);
    return -1;
}

static int expert_map(obm_py_state *st, expert_args *e, size_t i, PyObject *map) {
    if (map == Py_None) return 0;
    if (!PyDict_Check(map))
        return PyErr_SetString(PyExc_TypeError, "map is a dict of globs to \"1bit\", \"mask\", \"full\" or \"drop\""),
               -1;
    e->rules[i] = PyMem_Calloc((size_t)PyDict_Size(map) + 1, sizeof **e->rules);
    if (!e->rules[i]) return PyErr_NoMemory(), -1;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(map, &at, &key, &value);) {
        const char *glob = PyUnicode_AsUTF8AndSize(key, NULL),
                   *mode = glob ? PyUnicode_AsUTF8AndSize(value, NULL) : NULL;
        obm_map_rule *rule = &e->rules[i][e->items[i].n_map];
        if (!mode || mode_from(st, mode, &rule->mode) < 0) return -1;
        rule->glob = glob;
        e->items[i].n_map++;
    }
    e->items[i].map = e->rules[i];
    return PyList_Append(e->keep, map);
}

/* expert: the tuple (name, path, policy, scale, planes, map) that the package makes of whatever the user gave. */
static int expert_from(obm_py_state *st, expert_args *e, size_t i, PyObject *expert) {
    obm_expert *x = &e->items[i];
    PyObject *path, *map;
    if (!PyArg_ParseTuple(expert, "sO&zziO", &x->name, obm_py_path, &path, &x->policy, &x->scale, &x->planes, &map))
        return -1;
    x->struct_size = sizeof *x;
    x->path = PyBytes_AsString(path);
    int rc = PyList_Append(e->keep, path) | PyList_Append(e->keep, expert);
    Py_DECREF(path);
    return rc < 0 ? -1 : expert_map(st, e, i, map);
}

static int experts_from(obm_py_state *st, PyObject *given, expert_args *e) {
    *e = (expert_args){.keep = PyList_New(0)};
    PyObject *list = obm_py_call_hook(st, "experts", Py_BuildValue("(O)", given));
    Py_ssize_t n = list ? PyList_Size(list) : -1;
    if (n >= 0) {
        e->items = PyMem_Calloc((size_t)n + 1, sizeof *e->items);
        e->rules = PyMem_Calloc((size_t)n + 1, sizeof *e->rules);
        if (!e->items || !e->rules)
            PyErr_NoMemory(), n = -1;
        else
            e->n = (size_t)n;
    }
    int rc = n < 0 || !e->keep || PyList_Append(e->keep, list) < 0 ? -1 : 0;
    for (size_t i = 0; rc == 0 && i < e->n; i++) rc = expert_from(st, e, i, PyList_GetItem(list, (Py_ssize_t)i));
    Py_XDECREF(list);
    if (rc < 0) experts_clear(e);
    return rc;
}

PyObject *obm_py_plan(const obm_plan *p) {
    return Py_BuildValue("{sK,sK,sK,sK,sK,sd}", "tensors", (unsigned long long)p->tensors, "tiles",
                         (unsigned long long)p->tiles, "bytes_read", (unsigned long long)p->bytes_read, "bytes_written",
                         (unsigned long long)p->bytes_written, "peak_memory", (unsigned long long)p->peak_memory,
                         "seconds", p->seconds);
}

/* _core.compress(base, experts, out, profile, overwrite, dry_run, progress, shared, tall_lambda, shared_dtype) -> Pack,
 * or the plan of a dry run */
PyObject *obm_py_compress(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"base",     "experts", "out",         "profile",      "overwrite", "dry_run",
                            "progress", "shared",  "tall_lambda", "shared_dtype", NULL};
    PyObject *base, *given, *out, *progress = Py_None, *context = NULL, *result = NULL;
    const char *profile = NULL;
    int overwrite = 0, dry_run = 0;
    obm_compress_options options = OBM_INIT(obm_compress_options);
    obm_py_state *st = PyModule_GetState(module);
    if (!obm_py_parse(args, kwargs, "O&OO&|zppOzdz", names, obm_py_path, &base, &given, obm_py_path,
                      &out, &profile, &overwrite, &dry_run, &progress, &options.shared,
                      &options.tall_lambda, &options.shared_dtype))
        return NULL;
    expert_args experts = {0};
    obm_py_call call;
    obm_context *ctx = NULL;
    if (obm_py_profile(st, profile, &options.profile) == 0 && obm_py_call_init(&call, st, progress) == 0 &&
        experts_from(st, given, &experts) == 0)
        ctx = obm_py_context(st, &context);
    if (ctx) {
        options.overwrite = overwrite;
        options.dry_run = dry_run;
        options.progress = obm_py_progress;
        options.progress_user = &call;
        obm_pack *pack = NULL;
        obm_plan plan = {0};
        obm_error err;
        const char *base_text = PyBytes_AsString(base), *out_text = PyBytes_AsString(out);
        obm_py_begin(&call);
        obm_status status = obm_compress(ctx, base_text, experts.items, experts.n, &options, out_text, &plan,
                                         dry_run ? NULL : &pack, &err);
        if (obm_py_end(&call, status, &err) == 0)
            result = dry_run ? obm_py_plan(&plan) : pack_own(st, pack, Py_NewRef(context));
    }
    Py_XDECREF(context);
    experts_clear(&experts);
    Py_DECREF(base);
    Py_DECREF(out);
    return result;
}

/* ---- changes ---- */

static PyObject *pack_add(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"name", "expert", "progress", "overwrite", NULL};
    PyObject *name, *expert, *progress = Py_None;
    int overwrite = 0;
    obm_pack *p = pack_mutable(o);
    if (!p || !obm_py_parse(args, kwargs, "OO|Op", names, &name, &expert, &progress, &overwrite))
        return NULL;
    obm_py_state *st = OBM_PY_STATE(o);
    obm_py_call call;
    expert_args e = {0};
    PyObject *given = obm_py_call_init(&call, st, progress) < 0 ? NULL : PyDict_New();
    int rc = given && PyDict_SetItem(given, name, expert) == 0 ? experts_from(st, given, &e) : -1;
    Py_XDECREF(given);
    if (rc < 0) return NULL;
    obm_compress_options options = OBM_INIT(obm_compress_options);
    options.progress = obm_py_progress;
    options.progress_user = &call;
    options.overwrite = overwrite;
    obm_error err;
    obm_py_begin(&call);
    obm_status status = obm_pack_add(p, e.items, &options, &err);
    rc = obm_py_end(&call, status, &err);
    experts_clear(&e);
    return rc < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *pack_remove(PyObject *o, PyObject *arg) {
    obm_pack *p = pack_mutable(o);
    const char *name = p ? PyUnicode_AsUTF8AndSize(arg, NULL) : NULL;
    if (!name) return NULL;
    obm_error err;
    if (obm_pack_remove(p, name, &err) != OBM_OK) return obm_py_raise(OBM_PY_STATE(o), &err);
    Py_RETURN_NONE;
}

static PyObject *pack_adopt(PyObject *o, PyObject *arg) {
    PyObject *path = NULL;
    obm_pack *p = pack_mutable(o);
    if (!p || !obm_py_path(arg, &path)) return NULL;
    obm_status status;
    obm_error err;
    Py_BEGIN_ALLOW_THREADS status = obm_pack_adopt(p, PyBytes_AsString(path), &err);
    Py_END_ALLOW_THREADS Py_DECREF(path);
    if (status != OBM_OK) return obm_py_raise(OBM_PY_STATE(o), &err);
    Py_RETURN_NONE;
}

static const char *const reading_names[] = {"onto_base", "recomputed"};
static const char *const profile_names[] = {"default", "paper", "mergekit"};

static PyObject *pack_settings(PyObject *o, void *unused) {
    (void)unused;
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    obm_pack_get_settings(obm_py_pack_get(o), &s);
    return Py_BuildValue("{sd,ss,ss,sd}", "lambda", s.lambda, "reading", reading_names[s.reading], "profile",
                         profile_names[s.profile], "density", s.density);
}

static PyObject *pack_set(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"lambda_", "reading", "profile", "density", NULL};
    PyObject *lambda = Py_None, *density = Py_None;
    const char *reading = NULL, *profile = NULL;
    obm_pack *p = pack_mutable(o);
    if (!p || !obm_py_parse(args, kwargs, "|OzzO", names, &lambda, &reading, &profile, &density))
        return NULL;
    obm_py_state *st = OBM_PY_STATE(o);
    obm_pack_settings s = OBM_INIT(obm_pack_settings);
    obm_pack_get_settings(p, &s);
    if (lambda != Py_None) s.lambda = PyFloat_AsDouble(lambda);
    if (density != Py_None) s.density = PyFloat_AsDouble(density);
    if (PyErr_Occurred() || (profile && obm_py_profile(st, profile, &s.profile) < 0)) return NULL;
    if (reading) {
        int r = strcmp(reading, "onto_base") == 0 ? 0 : strcmp(reading, "recomputed") == 0 ? 1 : -1;
        if (r < 0)
            return PyErr_Format(st->errors[-OBM_E_ARG], "unknown reading \"%s\" (known: onto_base, recomputed)",
                                reading);
        s.reading = (obm_reading)r;
    }
    obm_error err;
    if (obm_pack_set_settings(p, &s, &err) != OBM_OK) return obm_py_raise(st, &err);
    Py_RETURN_NONE;
}

static PyObject *pack_verify(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"progress", NULL};
    PyObject *progress = Py_None;
    obm_py_call call;
    if (!obm_py_parse(args, kwargs, "|O", names, &progress)) return NULL;
    if (obm_py_call_init(&call, OBM_PY_STATE(o), progress) < 0) return NULL;
    const obm_pack *p = obm_py_pack_get(o);
    obm_error err;
    obm_py_begin(&call);
    obm_status status = obm_pack_verify(p, obm_py_progress, &call, &err);
    return obm_py_end(&call, status, &err) < 0 ? NULL : Py_NewRef(Py_None);
}

/* ---- what is in it ---- */

static PyObject *pack_tasks(PyObject *o, void *unused) {
    (void)unused;
    const obm_pack *p = obm_py_pack_get(o);
    Py_ssize_t n = (Py_ssize_t)obm_pack_task_count(p);
    PyObject *tasks = PyList_New(n);
    for (Py_ssize_t i = 0; tasks && i < n; i++) {
        PyObject *s = PyUnicode_FromString(obm_pack_task_name(p, (size_t)i));
        if (!s || PyList_SetItem(tasks, i, s) < 0) Py_CLEAR(tasks);
    }
    return tasks;
}

static PyObject *pack_path(PyObject *o, void *unused) {
    (void)unused;
    return PyUnicode_DecodeFSDefault(obm_pack_path(obm_py_pack_get(o)));
}

/* Opened on its own: changing the pack reloads it, and a borrowed base would go with the old one. */
static PyObject *pack_base(PyObject *o, void *unused) {
    (void)unused;
    PyObject *path = PyUnicode_DecodeFSDefault(obm_checkpoint_path(obm_pack_base(obm_py_pack_get(o))));
    PyObject *base = path ? PyObject_CallFunctionObjArgs((PyObject *)OBM_PY_STATE(o)->checkpoint, path, NULL) : NULL;
    Py_XDECREF(path);
    return base;
}

static PyObject *pack_base_bytes(PyObject *o, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(obm_pack_base_bytes(obm_py_pack_get(o)));
}

static PyObject *pack_shared(PyObject *o, void *unused) {
    (void)unused;
    obm_pack_shared_info s;
    if (!obm_pack_shared(obm_py_pack_get(o), &s)) Py_RETURN_NONE;
    return Py_BuildValue("{ss,sd,sK,sK}", "method", s.method, "lambda", s.lambda, "tensors",
                         (unsigned long long)s.tensors, "bytes", (unsigned long long)s.bytes);
}

static int task_index(PyObject *o, PyObject *name, size_t *out) {
    const obm_pack *p = obm_py_pack_get(o);
    double *w = PyMem_Calloc(obm_pack_task_count(p) + 1, sizeof *w);
    if (!w) return PyErr_NoMemory(), -1;
    int rc = obm_py_weights(OBM_PY_STATE(o), p, name, w);
    for (*out = 0; rc == 0 && *out < obm_pack_task_count(p) && w[*out] == 0;) ++*out;
    if (rc == 0 && *out == obm_pack_task_count(p)) {
        PyErr_Format(OBM_PY_STATE(o)->errors[-OBM_E_NOTFOUND], "%R is not a task of the pack", name);
        rc = -1;
    }
    PyMem_Free(w);
    return rc;
}

static PyObject *pack_bytes(PyObject *o, PyObject *arg) {
    size_t task;
    if (task_index(o, arg, &task) < 0) return NULL;
    obm_class_bytes b[OBM_CLASS_COUNT];
    obm_pack_bytes(obm_py_pack_get(o), task, b);
    PyObject *d = PyDict_New();
    for (int c = 0; d && c < OBM_CLASS_COUNT; c++) {
        if (b[c].tensors && !obm_py_set(d, obm_class_name((obm_class)c),
                                        Py_BuildValue("{sK,sK,sK,sK,sK}", "tensors", (unsigned long long)b[c].tensors,
                                                      "params", (unsigned long long)b[c].params, "bytes_expert",
                                                      (unsigned long long)b[c].bytes_expert, "bytes_pack",
                                                      (unsigned long long)b[c].bytes_pack, "bytes_adapter",
                                                      (unsigned long long)b[c].bytes_adapter)))
            Py_CLEAR(d);
    }
    return d;
}

static PyObject *pack_policy(PyObject *o, PyObject *arg) {
    size_t task;
    if (task_index(o, arg, &task) < 0) return NULL;
    return PyUnicode_FromString(obm_pack_policy(obm_py_pack_get(o), task));
}

static PyObject *pack_text(PyObject *o, PyObject *arg) {
    size_t task;
    if (task_index(o, arg, &task) < 0) return NULL;
    return PyUnicode_FromString(obm_pack_text(obm_py_pack_get(o), task));
}

/* A copy: changing the pack ends the views into its files. */
static PyObject *copy_of(PyObject *o, const void *data, obm_dtype dtype, int64_t rows, int64_t cols) {
    obm_tensor t = {.data = data, .dtype = dtype, .ndim = cols ? 2 : 1, .shape = {rows, cols}};
    PyObject *view = obm_py_numpy(obm_py_tensor_view(OBM_PY_STATE(o), &t, o));
    PyObject *copy = view ? PyObject_CallMethod(view, "copy", NULL) : NULL;
    Py_XDECREF(view);
    return copy;
}

static PyObject *plane_arrays(PyObject *o, const obm_pack_tensor *t) {
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < t->planes; i++) {
        PyObject *pair = Py_BuildValue("(NN)", copy_of(o, t->signs[i], OBM_U8, t->rows, t->row_bytes),
                                       copy_of(o, t->scales[i], OBM_F32, t->n_scales, 0));
        if (!pair || PyList_Append(list, pair) < 0) Py_CLEAR(list);
        Py_XDECREF(pair);
    }
    return list;
}

static PyObject *mask_pair(PyObject *o, const obm_pack_tensor *t) {
    if (!t->mask) Py_RETURN_NONE;
    return Py_BuildValue("(Nd)", copy_of(o, t->mask, OBM_U8, t->rows, t->row_bytes), t->scaling);
}

/* tensors(task) -> list of dicts; planes as (signs, scales), a mask as (bits, scaling) */
static PyObject *pack_tensors(PyObject *o, PyObject *arg) {
    size_t task;
    if (task_index(o, arg, &task) < 0) return NULL;
    const obm_pack *p = obm_py_pack_get(o);
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < obm_pack_tensor_count(p); i++) {
        obm_pack_tensor t;
        obm_pack_tensor_at(p, task, i, &t);
        PyObject *d = Py_BuildValue("{ss,ss,ss,sK,sL,sL,sL,sN,sN}", "name", t.name, "class", obm_class_name(t.cls),
                                    "mode", obm_mode_name(t.mode), "bytes", (unsigned long long)t.bytes_pack, "rows",
                                    (long long)t.rows, "cols", (long long)t.cols, "rank", (long long)t.rank, "planes",
                                    plane_arrays(o, &t), "mask", mask_pair(o, &t));
        if (!d || PyList_Append(list, d) < 0) Py_CLEAR(list);
        Py_XDECREF(d);
    }
    return list;
}

static PyObject *run_dict(const obm_tensor_run *r) {
    return Py_BuildValue("{ss,ss,sn,ss,ss,si,si,sn}", "name", r->name, "class", obm_class_name(r->cls), "planes",
                         (Py_ssize_t)r->planes, "hard", obm_run_name(r->hard), "soft", obm_run_name(r->soft),
                         "hard_masks", r->hard_masks, "soft_masks", r->soft_masks, "overlays", (Py_ssize_t)r->overlays);
}

/* runs() -> list of dicts, one per tensor of the pack */
static PyObject *pack_runs(PyObject *o, PyObject *ignored) {
    (void)ignored;
    const obm_pack *p = obm_py_pack_get(o);
    size_t n = obm_pack_tensor_count(p);
    obm_tensor_run *runs = PyMem_Calloc(n + 1, sizeof *runs);
    if (!runs) return PyErr_NoMemory();
    obm_error err;
    obm_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = obm_pack_runs(p, runs, &err);
    Py_END_ALLOW_THREADS;
    PyObject *list = status == OBM_OK ? PyList_New(0) : obm_py_raise(OBM_PY_STATE(o), &err);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *d = run_dict(&runs[i]);
        if (!d || PyList_Append(list, d) < 0) Py_CLEAR(list);
        Py_XDECREF(d);
    }
    PyMem_Free(runs);
    return list;
}

/* ---- routes ---- */

static double *weights_for(PyObject *o, PyObject *route) {
    const obm_pack *p = obm_py_pack_get(o);
    double *w = PyMem_Calloc(obm_pack_task_count(p) + 1, sizeof *w);
    if (!w) return (double *)PyErr_NoMemory();
    if (obm_py_weights(OBM_PY_STATE(o), p, route, w) == 0) return w;
    PyMem_Free(w);
    return NULL;
}

static PyObject *pack_parse_route(PyObject *o, PyObject *arg) {
    double *w = weights_for(o, arg);
    PyObject *d = w ? obm_py_route_dict(obm_py_pack_get(o), w) : NULL;
    PyMem_Free(w);
    return d;
}

static PyObject *pack_format_route(PyObject *o, PyObject *arg) {
    double *w = weights_for(o, arg);
    if (!w) return NULL;
    char *text;
    obm_error err;
    obm_status status = obm_pack_format_route(obm_py_pack_get(o), w, &text, &err);
    PyMem_Free(w);
    if (status != OBM_OK) return obm_py_raise(OBM_PY_STATE(o), &err);
    PyObject *s = PyUnicode_FromString(text);
    obm_free(text);
    return s;
}

static PyObject *pack_materialise(PyObject *o, PyObject *args) {
    PyObject *route, *result = NULL;
    const char *name;
    if (!PyArg_ParseTuple(args, "Os", &route, &name)) return NULL;
    double *w = weights_for(o, route);
    if (!w) return NULL;
    const obm_pack *p = obm_py_pack_get(o);
    obm_tensor shape;
    obm_error err;
    obm_status status = obm_pack_route_shape(p, w, name, &shape, &err);
    float *data;
    if (status == OBM_OK) result = obm_py_tensor_new(OBM_PY_STATE(o), shape.ndim, shape.shape, &data);
    if (result) {
        Py_BEGIN_ALLOW_THREADS;
        status = obm_pack_materialise(p, w, name, data, &err);
        Py_END_ALLOW_THREADS;
    }
    PyMem_Free(w);
    if (status != OBM_OK) {
        Py_XDECREF(result);
        return obm_py_raise(OBM_PY_STATE(o), &err);
    }
    return obm_py_numpy(result);
}

static PyObject *export_dict(const obm_export_report *r) {
    PyObject *d = obm_py_plan(&r->plan);
    if (d && (!obm_py_set(d, "changed", PyLong_FromUnsignedLongLong(r->changed)) ||
              !obm_py_set(d, "lost", PyLong_FromUnsignedLongLong(r->lost))))
        Py_CLEAR(d);
    return d;
}

static PyObject *pack_export(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"route", "out", "dtype", "shard_bytes", "overwrite", "dry_run", "progress", NULL};
    PyObject *route, *out, *progress = Py_None, *result = NULL;
    unsigned long long shard = 0;
    int overwrite = 0, dry_run = 0;
    obm_export_options options = OBM_INIT(obm_export_options);
    if (!obm_py_parse(args, kwargs, "OO&|zKppO", names, &route, obm_py_path, &out, &options.dtype,
                      &shard, &overwrite, &dry_run, &progress))
        return NULL;
    obm_py_call call;
    double *w = obm_py_call_init(&call, OBM_PY_STATE(o), progress) < 0 ? NULL : weights_for(o, route);
    if (w) {
        options.shard_bytes = shard;
        options.overwrite = overwrite;
        options.dry_run = dry_run;
        options.progress = obm_py_progress;
        options.progress_user = &call;
        obm_export_report report = {0};
        obm_error err;
        const obm_pack *p = obm_py_pack_get(o);
        const char *out_text = PyBytes_AsString(out);
        obm_py_begin(&call);
        obm_status status = obm_pack_export(p, w, &options, out_text, &report, &err);
        if (obm_py_end(&call, status, &err) == 0) result = export_dict(&report);
    }
    PyMem_Free(w);
    Py_DECREF(out);
    return result;
}

/* ---- the router ---- */

PyObject *obm_py_router_report(obm_py_state *st, const obm_router_report *r, const obm_pack *pack) {
    PyObject *rows = PyList_New(0);
    for (size_t i = 0; rows && i < r->tasks; i++) {
        PyObject *row = PyList_New(0);
        for (size_t j = 0; row && j < r->tasks; j++) {
            PyObject *n = PyLong_FromUnsignedLong(r->confusion[i][j]);
            if (!n || PyList_Append(row, n) < 0) Py_CLEAR(row);
            Py_XDECREF(n);
        }
        if (!row || PyList_Append(rows, row) < 0) Py_CLEAR(rows);
        Py_XDECREF(row);
    }
    if (!rows) return NULL;
    PyObject *names = PyList_New(0);
    for (size_t i = 0; names && i < obm_pack_task_count(pack); i++) {
        PyObject *s = PyUnicode_FromString(obm_pack_task_name(pack, i));
        if (!s || PyList_Append(names, s) < 0) Py_CLEAR(names);
        Py_XDECREF(s);
    }
    if (!names) return Py_DECREF(rows), NULL;
    return obm_py_call_hook(st, "RouterReport",
                            Py_BuildValue("(ddNNinn)", r->accuracy, r->calibration_error, rows, names, r->layer,
                                          (Py_ssize_t)r->n_train, (Py_ssize_t)r->n_held_out));
}

static const char **label_list(PyObject *labels, size_t n) {
    if (PySequence_Size(labels) != (Py_ssize_t)n) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "%zd texts but %zd labels", (Py_ssize_t)n, PySequence_Size(labels));
        return NULL;
    }
    const char **list = PyMem_Calloc(n + 1, sizeof *list);
    if (!list) return (const char **)PyErr_NoMemory();
    for (size_t i = 0; i < n; i++) {
        PyObject *s = PySequence_GetItem(labels, (Py_ssize_t)i);
        list[i] = s && PyUnicode_Check(s) ? PyUnicode_AsUTF8AndSize(s, NULL) : NULL;
        Py_XDECREF(s); /* the sequence holds it */
        if (!list[i]) {
            if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "labels are task names (str)");
            return PyMem_Free(list), NULL;
        }
    }
    return list;
}

static PyObject *pack_train_router(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"texts", "labels", "layer", "l2", "holdout", "seed", "progress", NULL};
    PyObject *texts, *labels, *progress = Py_None, *result = NULL;
    obm_router_options options = OBM_INIT(obm_router_options);
    unsigned long long seed = 0;
    obm_pack *p = pack_mutable(o);
    if (!p || !obm_py_parse(args, kwargs, "OO|iddKO", names, &texts, &labels, &options.layer,
                            &options.l2, &options.holdout, &seed, &progress))
        return NULL;
    obm_py_state *st = OBM_PY_STATE(o);
    obm_py_call call;
    obm_py_prompts prompts;
    if (obm_py_call_init(&call, st, progress) < 0 || obm_py_prompts_from(texts, &prompts) < 0) return NULL;
    PyObject *kept = PySequence_List(labels);
    const char **list = kept ? label_list(kept, prompts.n) : NULL;
    obm_router_report *report = PyMem_Calloc(1, sizeof *report);
    if (list && report) {
        options.seed = seed;
        options.progress = obm_py_progress;
        options.progress_user = &call;
        obm_error err;
        obm_py_begin(&call);
        obm_status status = obm_router_train(p, prompts.items, list, prompts.n, &options, report, &err);
        if (obm_py_end(&call, status, &err) == 0) result = obm_py_router_report(st, report, p);
    }
    PyMem_Free(report);
    PyMem_Free(list);
    Py_XDECREF(kept);
    obm_py_prompts_clear(&prompts);
    return result;
}

static PyObject *pack_router_report(PyObject *o, PyObject *unused) {
    (void)unused;
    obm_router_report *report = PyMem_Calloc(1, sizeof *report);
    if (!report) return PyErr_NoMemory();
    obm_error err;
    PyObject *result = obm_pack_router_report(obm_py_pack_get(o), report, &err) == OBM_OK
                           ? obm_py_router_report(OBM_PY_STATE(o), report, obm_py_pack_get(o))
                           : obm_py_raise(OBM_PY_STATE(o), &err);
    PyMem_Free(report);
    return result;
}

static PyObject *pack_repr(PyObject *o) {
    return obm_py_call_hook(OBM_PY_STATE(o), "pack_repr", Py_BuildValue("(O)", o));
}
static PyObject *pack_html(PyObject *o, PyObject *unused) {
    (void)unused;
    return obm_py_call_hook(OBM_PY_STATE(o), "pack_html", Py_BuildValue("(O)", o));
}

#define KW(f) (PyCFunction)(void (*)(void)) f, METH_VARARGS | METH_KEYWORDS
static PyMethodDef pack_methods[] = {
    {"add", KW(pack_add),
     "add(name, expert, progress=None, overwrite=False)\n\nCompress one more expert into the pack (atomic). expert: a "
     "path, (path, policy) or Expert."},
    {"adopt", pack_adopt, METH_O,
     "adopt(path)\n\nTake the experts and the settings of another pack of the same base and tasks; the router stays."},
    {"remove", pack_remove, METH_O, "remove(name)\n\nDrop an expert; the router goes too, its tasks changed."},
    {"set", KW(pack_set),
     "set(lambda_=None, reading=None, profile=None, density=None)\n\nChange the merge settings on disk."},
    {"verify", KW(pack_verify),
     "verify(progress=None)\n\nChecksums of every file and the full hash of the base; raises on the first difference."},
    {"bytes", pack_bytes, METH_O,
     "bytes(task) -> dict\n\nBy module class: tensors, params, bytes_expert, bytes_pack, bytes_adapter."},
    {"policy", pack_policy, METH_O, "policy(task) -> str"},
    {"text", pack_text, METH_O,
     "text(task) -> str\n\nWhich of \"tokenizer, template, eos\" the expert brings itself; \"\": all are the base's."},
    {"tensors", pack_tensors, METH_O,
     "tensors(task) -> list of dict\n\nname, class, mode, bytes, rows, cols, planes [(signs, scales), ...] and mask "
     "(bits, scaling) or None, as "
     "NumPy arrays."},
    {"runs", pack_runs, METH_NOARGS,
     "runs() -> list of dict\n\nHow each tensor comes about while a model runs: name, class, planes (of all experts), "
     "hard and soft (\"base\", \"planes\" or \"overlay\": the costliest of the hard routes, and a mixture of all "
     "tasks), hard_masks and soft_masks (most that is read), overlays (hard routes under which it is materialised)."},
    {"parse_route", pack_parse_route, METH_O,
     "parse_route(route) -> dict\n\n\"chat=.7,math=.3\" -> {\"chat\": .7, \"math\": .3}"},
    {"format_route", pack_format_route, METH_O, "format_route(route) -> str"},
    {"materialise", pack_materialise, METH_VARARGS,
     "materialise(route, name) -> ndarray\n\nThe merged tensor under a route, float32."},
    {"export", KW(pack_export),
     "export(route, out, dtype=None, shard_bytes=0, overwrite=False, dry_run=False, progress=None) -> dict\n\n"
     "Write the dense Hugging Face folder of one route."},
    {"train_router", KW(pack_train_router),
     "train_router(texts, labels, layer=0, l2=0, holdout=0, seed=0, progress=None) -> RouterReport\n\n"
     "Multinomial logistic regression on mean-pooled hidden states after `layer` of the base; stored in the pack."},
    {"router_report", pack_router_report, METH_NOARGS, "router_report() -> RouterReport"},
    {"_repr_html_", pack_html, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef pack_getset[] = {{"tasks", pack_tasks, NULL, "task names in pack order", NULL},
                                    {"path", pack_path, NULL, "the folder", NULL},
                                    {"base", pack_base, NULL, "the base Checkpoint", NULL},
                                    {"base_bytes", pack_base_bytes, NULL, "bytes of the base's tensors", NULL},
                                    {"shared", pack_shared, NULL,
                                     "method, lambda, tensors, bytes of the vectors that "
                                     "masks apply to; None without",
                                     NULL},
                                    {"settings", pack_settings, NULL, "lambda, reading, profile, density", NULL},
                                    {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot pack_slots[] = {
    {Py_tp_new, pack_new},
    {Py_tp_dealloc, pack_dealloc},
    {Py_tp_repr, pack_repr},
    {Py_tp_methods, pack_methods},
    {Py_tp_getset, pack_getset},
    {Py_tp_doc, "Pack(path, base=None)\n\nCompressed experts of one base, their router and merge settings."},
    {0, NULL}};
PyType_Spec obm_py_pack_spec = {"onebitmerge.Pack", sizeof(Pack), 0, Py_TPFLAGS_DEFAULT, pack_slots};
