/* Between Python objects and the core: errors, callbacks, options, prompts, routes. */
#include "obm_py.h"

#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <time.h>

/* ---- errors ---- */

/* What asks for overwriting: in Python the argument; the command line registers its own. */
static PyObject *os_message(obm_py_state *st, const obm_error *err) {
    if (err->code != OBM_E_EXISTS) return PyUnicode_FromString(err->message);
    PyObject *ask = PyDict_GetItemString(st->hooks, "overwrite");
    if (!ask || ask == Py_None) return PyUnicode_FromFormat("%s; overwrite=True replaces it", err->message);
    return PyUnicode_FromFormat("%s; %S replaces it", err->message, ask);
}

static PyObject *raise_os(obm_py_state *st, const obm_error *err) {
    int code = err->code != OBM_E_IO ? EEXIST : err->os_errno ? err->os_errno : EIO;
    PyObject *text = os_message(st, err);
    PyObject *e = text ? PyObject_CallFunction(PyExc_OSError, "iO", code, text) : NULL;
    Py_XDECREF(text);
    if (!e) return NULL;
    PyErr_SetObject((PyObject *)Py_TYPE(e), e); /* OSError picks FileNotFoundError and so on by errno */
    Py_DECREF(e);
    return NULL;
}

PyObject *obm_py_raise(obm_py_state *st, const obm_error *err) {
    if (err->code == OBM_E_USER && PyErr_Occurred()) return NULL; /* what `interrupted` met */
    if (err->code == OBM_E_NOMEM) {
        PyErr_SetString(PyExc_MemoryError, err->message);
        return NULL;
    }
    if (err->code == OBM_E_IO || err->code == OBM_E_EXISTS || err->code == OBM_E_OCCUPIED) return raise_os(st, err);
    int i = -(int)err->code;
    PyObject *type = i >= 0 && i < 16 && st->errors[i] ? st->errors[i] : st->error;
    PyErr_SetString(type, err->message);
    return NULL;
}

/* The hook looks for the caller's line, behind the package's own. */
static void log_warning(void *user, const char *message) {
    PyGILState_STATE gil = PyGILState_Ensure();
    if (!PyErr_Occurred()) {
        PyObject *hook = obm_py_hook(user, "warn");
        PyObject *done = hook ? PyObject_CallFunction(hook, "s", message) : NULL;
        if (!done) PyErr_WriteUnraisable(NULL);
        Py_XDECREF(done);
    }
    PyGILState_Release(gil);
}

/* Ctrl-C, and what other signal handlers raise, in calls without a progress callback: the exception stays set in this
 * thread, and obm_py_raise leaves it as it is. */
static int interrupted(void *user) {
    (void)user;
    PyGILState_STATE gil = PyGILState_Ensure();
    int stop = PyErr_Occurred() || PyErr_CheckSignals() < 0;
    PyGILState_Release(gil);
    return stop;
}

/* The exception of the resolver as an error of the core; Ctrl-C waits for the next look at signals. */
static obm_status take_exception(const char *name, obm_error *err) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (PyErr_GivenExceptionMatches(type, PyExc_KeyboardInterrupt)) PyErr_SetInterrupt();
    PyObject *text = value ? PyObject_Str(value) : NULL;
    const char *message = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
    if (err) {
        err->code = OBM_E_IO;
        err->os_errno = PyErr_GivenExceptionMatches(type, PyExc_FileNotFoundError) ? ENOENT : EIO;
        PyOS_snprintf(err->message, sizeof err->message, "%.700s", message ? message : name);
    }
    PyErr_Clear();
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return OBM_E_IO;
}

static obm_status resolve_name(void *user, const char *name, char *path, size_t size, obm_error *err) {
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *hook = obm_py_hook(user, "resolve");
    PyObject *found = hook ? PyObject_CallFunction(hook, "s", name) : NULL;
    PyObject *bytes = found ? PyUnicode_EncodeFSDefault(found) : NULL;
    char *text = bytes ? PyBytes_AsString(bytes) : NULL;
    if (text && strlen(text) >= size) PyErr_SetString(PyExc_OSError, "the path in the cache is too long");
    obm_status status = text && strlen(text) < size ? OBM_OK : take_exception(name, err);
    if (status == OBM_OK) memcpy(path, text, strlen(text) + 1);
    Py_XDECREF(bytes);
    Py_XDECREF(found);
    PyGILState_Release(gil);
    return status;
}

static void context_release(PyObject *capsule) {
    obm_context_free(PyCapsule_GetPointer(capsule, "onebitmerge.context"));
}

PyObject *obm_py_set_threads(obm_py_state *st, int64_t threads, obm_numa numa) {
    obm_context_options options = OBM_INIT(obm_context_options);
    options.threads = threads;
    options.numa = numa;
    options.log = log_warning;
    options.log_user = st;
    options.resolve = resolve_name;
    options.resolve_user = st;
    options.interrupt = interrupted;
    obm_context *ctx;
    obm_error err;
    if (obm_context_new(&options, &ctx, &err) != OBM_OK) return obm_py_raise(st, &err);
    PyObject *capsule = PyCapsule_New(ctx, "onebitmerge.context", context_release);
    if (!capsule) {
        obm_context_free(ctx);
        return NULL;
    }
    Py_XDECREF(st->context); /* objects that are open keep the old one */
    st->context = capsule;
    Py_RETURN_NONE;
}

obm_context *obm_py_context(obm_py_state *st, PyObject **capsule) {
    if (!st->context) {
        PyObject *none = obm_py_set_threads(st, 0, OBM_NUMA_AUTO);
        if (!none) return NULL;
        Py_DECREF(none);
    }
    if (capsule) *capsule = Py_NewRef(st->context);
    return PyCapsule_GetPointer(st->context, "onebitmerge.context");
}

/* ---- keywords ---- */

PyObject *obm_py_unknown_keyword(const char *name, char *const *known) {
    size_t n = 0;
    while (known[n]) n++;
    size_t near = obm_suggest(name, (const char *const *)known, n);
    PyObject *list = PyUnicode_FromString("");
    for (size_t i = 0; list && i < n; i++) {
        PyObject *longer = PyUnicode_FromFormat("%U%s%s", list, i ? ", " : "", known[i]);
        Py_DECREF(list);
        list = longer;
    }
    if (list)
        PyErr_Format(PyExc_TypeError, "unknown keyword \"%s\" (known: %U)%s%s%s", name, list,
                     near < n ? ", did you mean \"" : "", near < n ? known[near] : "", near < n ? "\"?" : "");
    Py_XDECREF(list);
    return NULL;
}

static bool is_known(const char *name, char *const *names) {
    for (; *names; names++)
        if (!strcmp(name, *names)) return true;
    return false;
}

int obm_py_parse(PyObject *args, PyObject *kwargs, const char *format, char **names, ...) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; kwargs && PyDict_Next(kwargs, &at, &key, &value);) {
        const char *name = PyUnicode_AsUTF8AndSize(key, NULL);
        if (!name) return 0;
        if (!is_known(name, names)) return obm_py_unknown_keyword(name, names), 0;
    }
    va_list more;
    va_start(more, names);
    int ok = PyArg_VaParseTupleAndKeywords(args, kwargs, format, names, more);
    va_end(more);
    return ok;
}

/* ---- small conversions ---- */

PyObject *obm_py_hook(obm_py_state *st, const char *name) {
    PyObject *hook = PyDict_GetItemString(st->hooks, name);
    if (!hook) PyErr_Format(PyExc_RuntimeError, "onebitmerge._core was imported without the package (no %s)", name);
    return hook;
}

PyObject *obm_py_call_hook(obm_py_state *st, const char *name, PyObject *args) {
    PyObject *hook = args ? obm_py_hook(st, name) : NULL;
    PyObject *result = hook ? PyObject_CallObject(hook, args) : NULL;
    Py_XDECREF(args);
    return result;
}

PyObject *obm_py_json(const char *text) {
    if (!text) Py_RETURN_NONE;
    PyObject *json = PyImport_ImportModule("json");
    PyObject *value = json ? PyObject_CallMethod(json, "loads", "s", text) : NULL;
    Py_XDECREF(json);
    return value;
}

PyObject *obm_py_numpy(PyObject *tensor) {
    if (!tensor) return NULL;
    PyObject *numpy = PyImport_ImportModule("numpy");
    PyObject *array = numpy ? PyObject_CallMethod(numpy, "asarray", "O", tensor) : NULL;
    Py_XDECREF(numpy);
    Py_DECREF(tensor);
    return array;
}

bool obm_py_set(PyObject *dict, const char *key, PyObject *value) {
    bool ok = value && PyDict_SetItemString(dict, key, value) == 0;
    Py_XDECREF(value);
    return ok;
}

int obm_py_path(PyObject *o, PyObject **bytes) { return PyUnicode_FSConverter(o, bytes); }

int obm_py_profile(obm_py_state *st, const char *name, obm_profile *out) {
    static const char *const names[] = {"default", "paper", "mergekit"};
    for (int i = 0; i < 3; i++) {
        if (!name || strcmp(name, names[i]) == 0) return *out = (obm_profile)i, 0;
    }
    PyErr_Format(st->errors[-OBM_E_ARG], "unknown profile \"%s\" (known: default, paper, mergekit)", name);
    return -1;
}

int obm_py_dtype(obm_py_state *st, const char *name, obm_dtype other, obm_dtype *out) {
    static const struct {
        const char *name;
        obm_dtype dtype;
    } names[] = {{"f32", OBM_F32},  {"float32", OBM_F32},   {"F32", OBM_F32},
                 {"f16", OBM_F16},  {"float16", OBM_F16},   {"F16", OBM_F16},
                 {"bf16", OBM_BF16}, {"bfloat16", OBM_BF16}, {"BF16", OBM_BF16}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        obm_dtype dtype = names[i].dtype;
        if ((dtype == OBM_F32 || dtype == other) && strcmp(name, names[i].name) == 0) return *out = dtype, 0;
    }
    PyErr_Format(st->errors[-OBM_E_ARG], "unknown dtype \"%s\" (known: f32, %s)", name, other == OBM_F16 ? "f16" : "bf16");
    return -1;
}

/* ---- long calls ---- */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int obm_py_call_init(obm_py_call *c, obm_py_state *st, PyObject *progress) {
    *c = (obm_py_call){.state = st};
    if (!progress || progress == Py_None || progress == Py_False) return 0;
    if (progress == Py_True) return (c->progress = obm_py_hook(st, "progress_bar")) ? 0 : -1;
    if (!PyCallable_Check(progress)) {
        PyErr_SetString(PyExc_TypeError, "progress must be True, None or a callable (what, done, total)");
        return -1;
    }
    c->progress = progress;
    return 0;
}

void obm_py_begin(obm_py_call *c) { c->saved = PyEval_SaveThread(); }

int obm_py_end(obm_py_call *c, obm_status status, const obm_error *err) {
    PyEval_RestoreThread(c->saved);
    c->saved = NULL;
    Py_CLEAR(c->rendered);
    if (c->raised[0]) {
        PyErr_Restore(c->raised[0], c->raised[1], c->raised[2]);
        c->raised[0] = c->raised[1] = c->raised[2] = NULL;
        return -1;
    }
    if (status == OBM_OK) return 0;
    obm_py_raise(c->state, err);
    return -1;
}

/* The first exception counts; later callbacks of the same call must not run Python code any more. */
int obm_py_stash(obm_py_call *c) {
    PyErr_Fetch(&c->raised[0], &c->raised[1], &c->raised[2]);
    return 1;
}

int obm_py_progress(void *user, const char *what, uint64_t done, uint64_t total) {
    obm_py_call *c = user;
    if (c->raised[0]) return 1;
    double t = now();
    if (t - c->last < 0.03 && done != total) return 0;
    c->last = t;
    PyEval_RestoreThread(c->saved);
    int stop = PyErr_CheckSignals() < 0;
    if (!stop && c->progress) {
        PyObject *r =
            PyObject_CallFunction(c->progress, "sKK", what, (unsigned long long)done, (unsigned long long)total);
        stop = !r;
        Py_XDECREF(r);
    }
    if (stop) obm_py_stash(c);
    c->saved = PyEval_SaveThread();
    return stop;
}

/* Also what the core would refuse without knowing whose answer it is. */
static int check_route(obm_py_state *st, const obm_pack *pack, const double *weights) {
    obm_error err;
    char *text = NULL;
    if (obm_pack_format_route(pack, weights, &text, &err) != OBM_OK) return obm_py_raise(st, &err), -1;
    obm_free(text);
    return 0;
}

/* The exception about a router's answer says which router it was, and what it was asked.  One of the answer's own that
 * is not made of a text stays as it is. */
static void name_router(obm_py_call *c, obm_request *request) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyObject *said = value ? PyObject_Str(value) : NULL;
    PyObject *args = said ? Py_BuildValue("(OsO)", c->router, obm_request_text(request), said) : NULL;
    PyObject *text = args ? obm_py_call_hook(c->state, "router_said", args) : NULL;
    PyObject *named = text ? PyObject_CallFunctionObjArgs(type, text, NULL) : NULL;
    if (named && (PyObject *)Py_TYPE(named) == type) {
        Py_DECREF(value);
        value = Py_NewRef(named);
    }
    PyErr_Restore(type, value, trace);
    Py_XDECREF(named);
    Py_XDECREF(text);
    Py_XDECREF(said);
}

static int take_answer(obm_py_call *c, obm_request *request, PyObject *answer, double *weights) {
    if (obm_py_weights(c->state, c->pack, answer, weights) == 0 && check_route(c->state, c->pack, weights) == 0)
        return 0;
    name_router(c, request);
    return -1;
}

obm_status obm_py_router(void *user, obm_request *request, double *weights, obm_error *err) {
    obm_py_call *c = user;
    (void)err;
    if (c->raised[0]) return OBM_E_USER;
    PyEval_RestoreThread(c->saved);
    PyObject *r = obm_py_request_new(c->state, request, c->pack);
    PyObject *answer = r ? PyObject_CallFunctionObjArgs(c->router, r, NULL) : NULL;
    int failed = !answer || take_answer(c, request, answer, weights) < 0;
    if (failed) obm_py_stash(c);
    if (r) obm_py_request_end(r);
    Py_XDECREF(answer);
    Py_XDECREF(r);
    c->saved = PyEval_SaveThread();
    return failed ? OBM_E_USER : OBM_OK;
}

/* ---- ids, routes ---- */

/* An integer; NumPy's arrays have __index__ too. */
static bool is_index(PyObject *o) { return PyIndex_Check(o) && !PySequence_Check(o); }

static int32_t *ids_from_buffer(PyObject *o, size_t *n) {
    Py_buffer b;
    if (PyObject_GetBuffer(o, &b, PyBUF_ND | PyBUF_FORMAT) < 0) return NULL;
    char kind = b.format && b.format[0] ? b.format[strlen(b.format) - 1] : 'B';
    size_t count = b.itemsize ? (size_t)(b.len / b.itemsize) : 0;
    int32_t *ids = NULL;
    if (b.ndim != 1 || !strchr("ilq", kind) || (b.itemsize != 4 && b.itemsize != 8)) {
        PyErr_SetString(PyExc_TypeError, "ids must be a flat sequence of integers (int32 or int64)");
    } else if (!(ids = PyMem_Malloc(count * sizeof *ids + 1))) {
        PyErr_NoMemory();
    } else {
        for (size_t i = 0; i < count; i++) {
            int64_t v = b.itemsize == 4 ? ((const int32_t *)b.buf)[i] : ((const int64_t *)b.buf)[i];
            ids[i] = v < -1 || v > INT32_MAX ? -1 : (int32_t)v; /* -1: the core reports it as out of range */
        }
        *n = count;
    }
    PyBuffer_Release(&b);
    return ids;
}

int32_t *obm_py_ids(PyObject *o, size_t *n) {
    if (PyObject_CheckBuffer(o) && !PyBytes_Check(o)) {
        int32_t *ids = ids_from_buffer(o, n);
        if (ids || PyErr_ExceptionMatches(PyExc_TypeError) || PyErr_ExceptionMatches(PyExc_MemoryError)) return ids;
        PyErr_Clear(); /* no buffer after all (NumPy refuses strided arrays with ValueError): item by item */
    }
    Py_ssize_t count = PySequence_Check(o) && !PyUnicode_Check(o) ? PySequence_Size(o) : -1;
    if (count < 0) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "ids must be a sequence of integers");
        return NULL;
    }
    int32_t *ids = PyMem_Malloc((size_t)count * sizeof *ids + 1);
    if (!ids) return (int32_t *)PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(o, i);
        PyObject *index = item ? PyNumber_Index(item) : NULL;
        long long v = index ? PyLong_AsLongLong(index) : -1;
        Py_XDECREF(index);
        Py_XDECREF(item);
        if (v == -1 && PyErr_Occurred()) return PyMem_Free(ids), NULL;
        ids[i] = v < -1 || v > INT32_MAX ? -1 : (int32_t)v;
    }
    *n = (size_t)count;
    return ids;
}

static int weight_of(obm_py_state *st, const obm_pack *pack, PyObject *name, PyObject *value, double *weights) {
    const char *task = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, NULL) : NULL;
    if (!task) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "the keys of a route are task names");
        return -1;
    }
    double w = PyFloat_AsDouble(value);
    if (w == -1 && PyErr_Occurred()) return -1;
    size_t n = obm_pack_task_count(pack);
    for (size_t i = 0; i < n; i++) {
        if (strcmp(obm_pack_task_name(pack, i), task) == 0) return weights[i] = w, 0;
    }
    double *unused = PyMem_Malloc((n + 1) * sizeof *unused); /* the core words the error */
    if (!unused) return PyErr_NoMemory(), -1;
    obm_error err;
    obm_status status = obm_pack_parse_route(pack, task, unused, &err);
    PyMem_Free(unused);
    if (status == OBM_OK)
        PyErr_Format(st->errors[-OBM_E_NOTFOUND], "no task \"%s\" in the pack", task);
    else
        obm_py_raise(st, &err);
    return -1;
}

int obm_py_weights(obm_py_state *st, const obm_pack *pack, PyObject *o, double *weights) {
    obm_error err;
    size_t n = obm_pack_task_count(pack);
    if (PyUnicode_Check(o)) {
        const char *text = PyUnicode_AsUTF8AndSize(o, NULL);
        if (!text) return -1;
        if (obm_pack_parse_route(pack, text, weights, &err) == OBM_OK) return 0;
        return obm_py_raise(st, &err), -1;
    }
    for (size_t i = 0; i < n; i++) weights[i] = 0;
    if (PyDict_Check(o)) {
        PyObject *key, *value;
        for (Py_ssize_t at = 0; PyDict_Next(o, &at, &key, &value);) {
            if (weight_of(st, pack, key, value, weights) < 0) return -1;
        }
        return 0;
    }
    if (is_index(o)) {
        Py_ssize_t i = PyNumber_AsSsize_t(o, PyExc_IndexError);
        if (i == -1 && PyErr_Occurred()) return -1;
        if (i < 0 || (size_t)i >= n) {
            PyErr_Format(st->errors[-OBM_E_ARG], "task index %zd is outside 0..%zd", i, (Py_ssize_t)n - 1);
            return -1;
        }
        return weights[i] = 1, 0;
    }
    Py_ssize_t given = PySequence_Check(o) ? PySequence_Size(o) : -1;
    if (given != (Py_ssize_t)n) {
        const char *form = "a route is a task name, an index, a dict of weights, or one weight per task";
        if (!PyErr_Occurred() && given >= 0)
            PyErr_Format(PyExc_ValueError, "%s: found %zd weights for %zd tasks", form, given, (Py_ssize_t)n);
        if (!PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "%s; found %R", form, (PyObject *)Py_TYPE(o));
        return -1;
    }
    for (size_t i = 0; i < n; i++) {
        PyObject *item = PySequence_GetItem(o, (Py_ssize_t)i);
        weights[i] = item ? PyFloat_AsDouble(item) : -1;
        Py_XDECREF(item);
        if (PyErr_Occurred()) return -1;
    }
    return 0;
}

PyObject *obm_py_route_dict(const obm_pack *pack, const double *weights) {
    if (!pack || !weights) Py_RETURN_NONE;
    PyObject *d = PyDict_New();
    for (size_t i = 0; d && i < obm_pack_task_count(pack); i++) {
        if (weights[i] == 0) continue;
        if (!obm_py_set(d, obm_pack_task_name(pack, i), PyFloat_FromDouble(weights[i]))) Py_CLEAR(d);
    }
    return d;
}

/* ---- prompts ---- */

static void *prompts_block(obm_py_prompts *p, size_t bytes) {
    void *block = PyMem_Calloc(1, bytes + 1);
    void **blocks = block ? PyMem_Realloc(p->blocks, (p->n_blocks + 1) * sizeof *blocks) : NULL;
    if (!blocks) return PyMem_Free(block), PyErr_NoMemory();
    p->blocks = blocks;
    p->blocks[p->n_blocks++] = block;
    return block;
}

/* UTF-8 of a str, kept alive by p->keep.  A NUL inside would cut it, so it is refused here. */
static const char *keep_text(obm_py_prompts *p, PyObject *o) {
    if (!PyUnicode_Check(o)) {
        PyErr_Format(PyExc_TypeError, "expected a str, found %R", (PyObject *)Py_TYPE(o));
        return NULL;
    }
    Py_ssize_t size;
    const char *s = PyUnicode_AsUTF8AndSize(o, &size);
    if (!s) return NULL;
    if ((size_t)size != strlen(s)) {
        PyErr_SetString(PyExc_ValueError, "a prompt holds a NUL character");
        return NULL;
    }
    return PyList_Append(p->keep, o) < 0 ? NULL : s;
}

static const char *message_field(obm_py_prompts *p, PyObject *message, const char *key) {
    PyObject *value =
        PyMapping_Check(message) && !PyUnicode_Check(message) ? PyMapping_GetItemString(message, key) : NULL;
    if (!value) {
        PyErr_Format(PyExc_TypeError, "a message is a dict with \"role\" and \"content\" (missing: %s)", key);
        return NULL;
    }
    const char *s = NULL;
    if (PyUnicode_Check(value))
        s = keep_text(p, value);
    else
        PyErr_Format(PyExc_TypeError, "\"%s\" of a message: expected a str, found %R", key, (PyObject *)Py_TYPE(value));
    Py_DECREF(value);
    return s;
}

static int prompt_ids(obm_py_prompts *p, PyObject *o, obm_prompt *out) {
    size_t n;
    int32_t *ids = obm_py_ids(o, &n);
    if (!ids) return -1;
    int32_t *copy = prompts_block(p, (n ? n : 1) * sizeof *ids);
    if (copy && n) memcpy(copy, ids, n * sizeof *ids);
    PyMem_Free(ids);
    if (!copy) return -1;
    out->ids = copy;
    out->n_ids = n;
    return 0;
}

static int prompt_messages(obm_py_prompts *p, PyObject *o, obm_prompt *out, PyObject **source) {
    bool list = PySequence_Check(o) && !PyUnicode_Check(o) && !PyBytes_Check(o) && !PyDict_Check(o);
    Py_ssize_t n = list ? PySequence_Size(o) : 0;
    if (n < 0) return -1;
    if (!n)
        return PyErr_Format(PyExc_TypeError, "messages: expected a list of {\"role\", \"content\"}, found %s%R",
                            list ? "an empty " : "", (PyObject *)Py_TYPE(o)),
               -1;
    obm_message *messages = prompts_block(p, (size_t)n * sizeof *messages);
    if (!messages) return -1;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *m = PySequence_GetItem(o, i);
        if (m) messages[i].role = message_field(p, m, "role");
        if (m && messages[i].role) messages[i].content = message_field(p, m, "content");
        Py_XDECREF(m);
        if (!messages[i].content) return -1;
    }
    out->messages = messages;
    out->n_messages = (size_t)n;
    *source = o;
    return PyList_Append(p->keep, o);
}

static int is_messages(PyObject *o) {
    if (!PyList_Check(o) && !PyTuple_Check(o)) return 0;
    if (PySequence_Size(o) < 1) return 0;
    PyObject *first = PySequence_GetItem(o, 0);
    int yes = first && PyDict_Check(first) && PyDict_GetItemString(first, "role") != NULL;
    Py_XDECREF(first);
    return yes;
}

static int is_ids(PyObject *o) {
    if (PyBytes_Check(o) || PyByteArray_Check(o)) return 0; /* text that was not decoded, not ids */
    if (PyObject_CheckBuffer(o)) return 1;
    if ((!PyList_Check(o) && !PyTuple_Check(o)) || PySequence_Size(o) < 1) return 0;
    PyObject *first = PySequence_GetItem(o, 0);
    int yes = first && is_index(first);
    Py_XDECREF(first);
    return yes;
}

static int prompt_from(obm_py_prompts *p, PyObject *o, obm_prompt *out, PyObject **source) {
    if (PyUnicode_Check(o)) return (out->text = keep_text(p, o)) ? 0 : -1;
    if (is_messages(o)) return prompt_messages(p, o, out, source);
    if (is_ids(o)) return prompt_ids(p, o, out);
    if (PyDict_Check(o)) {
        PyObject *v;
        if ((v = PyDict_GetItemString(o, "ids"))) return prompt_ids(p, v, out);
        if ((v = PyDict_GetItemString(o, "messages"))) return prompt_messages(p, v, out, source);
        if ((v = PyDict_GetItemString(o, "prompt")) || (v = PyDict_GetItemString(o, "text")))
            return (out->text = keep_text(p, v)) ? 0 : -1;
    }
    PyErr_SetString(PyExc_TypeError,
                    "a prompt is a str, a list of messages, a list of ids, or a dict with one of \"prompt\", "
                    "\"text\", \"messages\", \"ids\"");
    return -1;
}

int obm_py_prompts_from(PyObject *o, obm_py_prompts *out) {
    *out = (obm_py_prompts){.keep = PyList_New(0)};
    if (!out->keep) return -1;
    out->single = PyUnicode_Check(o) || PyDict_Check(o) || is_messages(o) || is_ids(o);
    Py_ssize_t n = out->single ? 1 : PySequence_Check(o) ? PySequence_Size(o) : -1;
    if (n < 0 && !PyErr_Occurred())
        PyErr_Format(PyExc_TypeError, "expected a prompt or a list of prompts, found %R", (PyObject *)Py_TYPE(o));
    if (n >= 0) out->items = prompts_block(out, (size_t)n * sizeof *out->items);
    if (out->items) out->messages = prompts_block(out, (size_t)n * sizeof *out->messages);
    int rc = out->items && out->messages ? 0 : -1;
    for (Py_ssize_t i = 0; rc == 0 && i < n; i++) {
        PyObject *item = out->single ? Py_NewRef(o) : PySequence_GetItem(o, i);
        rc = item ? prompt_from(out, item, &out->items[i], &out->messages[i]) : -1;
        if (item && rc == 0) rc = PyList_Append(out->keep, item);
        Py_XDECREF(item);
    }
    out->n = n > 0 ? (size_t)n : 0;
    if (rc < 0) obm_py_prompts_clear(out);
    return rc;
}

void obm_py_prompts_clear(obm_py_prompts *p) {
    for (size_t i = 0; i < p->n_blocks; i++) PyMem_Free(p->blocks[i]);
    PyMem_Free(p->blocks);
    Py_CLEAR(p->keep);
    *p = (obm_py_prompts){0};
}

/* ---- templates ---- */

/* The messages as they were given: a template may look at more than role and content. */
static PyObject *given_messages(const obm_py_call *c, const obm_message *messages) {
    for (size_t k = 0; k < c->n_prompts; k++) {
        for (size_t i = 0; i < c->prompts[k].n; i++) {
            if (c->prompts[k].items[i].messages == messages) return Py_NewRef(c->prompts[k].messages[i]);
        }
    }
    return NULL;
}

/* A text that is one user turn. */
static PyObject *plain_messages(const obm_message *messages, size_t n) {
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *m = Py_BuildValue("{ss,ss}", "role", messages[i].role, "content", messages[i].content);
        if (!m || PyList_Append(list, m) < 0) Py_CLEAR(list);
        Py_XDECREF(m);
    }
    return list;
}

static int render(obm_py_call *c, const obm_tokenizer *t, const obm_message *messages, size_t n, const char **text) {
    PyObject *list = given_messages(c, messages);
    if (!list) list = plain_messages(messages, n);
    PyObject *tokenizer = list ? obm_py_tokenizer_borrow(c->state, t, c->model) : NULL;
    PyObject *args = tokenizer ? Py_BuildValue("(OO)", tokenizer, list) : NULL;
    Py_CLEAR(c->rendered);
    c->rendered = args ? obm_py_call_hook(c->state, "render_template", args) : NULL;
    Py_XDECREF(tokenizer);
    Py_XDECREF(list);
    if (!c->rendered) return -1;
    if (c->rendered == Py_None) return *text = NULL, 0;
    Py_ssize_t size;
    const char *s = PyUnicode_AsUTF8AndSize(c->rendered, &size);
    if (!s) return -1;
    if ((size_t)size != strlen(s)) return PyErr_SetString(PyExc_ValueError, "a prompt holds a NUL character"), -1;
    return *text = s, 0;
}

obm_status obm_py_render(void *user, const obm_tokenizer *t, const obm_message *messages, size_t n, const char **text,
                         obm_error *err) {
    obm_py_call *c = user;
    (void)err;
    if (c->raised[0]) return OBM_E_USER;
    PyEval_RestoreThread(c->saved);
    int failed = render(c, t, messages, n, text) < 0;
    if (failed) obm_py_stash(c);
    c->saved = PyEval_SaveThread();
    return failed ? OBM_E_USER : OBM_OK;
}
