/* Static merges: recipes to folders, tensors to tensors, the method table. */
#include "obm_py.h"

#include <string.h>

PyObject *obm_py_merge(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"recipe",    "out",     "profile",  "directory", "seed",   "shard_bytes", "memory",
                            "overwrite", "dry_run", "progress", "resume",    "method", NULL};
    const char *recipe, *profile = NULL;
    PyObject *out, *directory_arg = Py_None, *directory = NULL, *seed = Py_None, *progress = Py_None, *context = NULL,
                   *method = Py_None, *result = NULL;
    unsigned long long shard = 0, memory = 0;
    int overwrite = 0, dry_run = 0, resume = 0;
    obm_py_state *st = PyModule_GetState(module);
    obm_merge_options options = OBM_INIT(obm_merge_options);
    if (!obm_py_parse(args, kwargs, "sO&|zOOKKppOpO", names, &recipe, obm_py_path, &out, &profile,
                      &directory_arg, &seed, &shard, &memory, &overwrite, &dry_run, &progress, &resume,
                      &method))
        return NULL;
    obm_py_call call;
    obm_py_methods methods = {0};
    if (seed != Py_None) {
        options.seed = PyLong_AsUnsignedLongLong(seed);
        options.has_seed = true;
    }
    bool ok = !PyErr_Occurred() && (directory_arg == Py_None || obm_py_path(directory_arg, &directory)) &&
              obm_py_profile(st, profile, &options.profile) == 0 && obm_py_call_init(&call, st, progress) == 0 &&
              obm_py_methods_init(&methods, st, method) == 0;
    obm_context *ctx = ok ? obm_py_context(st, &context) : NULL;
    if (ctx) {
        options.directory = directory ? PyBytes_AsString(directory) : NULL;
        options.shard_bytes = shard;
        options.memory = memory;
        options.overwrite = overwrite;
        options.resume = resume;
        options.progress = obm_py_progress;
        options.progress_user = &call;
        options.method = methods.method;
        options.methods = methods.specs;
        options.n_methods = methods.n;
        obm_plan plan = {0};
        char *json = NULL;
        obm_error err;
        const char *out_text = PyBytes_AsString(out);
        obm_py_methods_begin(&methods, &call);
        obm_py_begin(&call);
        obm_status status = dry_run ? obm_merge_plan(ctx, recipe, &options, out_text, &json, &err)
                                    : obm_merge(ctx, recipe, &options, out_text, &plan, &err);
        if (obm_py_end(&call, status, &err) == 0) result = dry_run ? obm_py_json(json) : obm_py_plan(&plan);
        obm_free(json);
    }
    obm_py_methods_clear(&methods);
    Py_XDECREF(context);
    Py_XDECREF(directory);
    Py_DECREF(out);
    return result;
}

typedef struct param_list {
    obm_param *items;
    size_t n, capacity;
    PyObject *keep;
} param_list;

static int param_add(param_list *p, const char *name, int model, double value) {
    if (p->n == p->capacity) {
        size_t capacity = p->capacity ? 2 * p->capacity : 8;
        obm_param *items = PyMem_Realloc(p->items, capacity * sizeof *items);
        if (!items) return PyErr_NoMemory(), -1;
        p->items = items;
        p->capacity = capacity;
    }
    p->items[p->n++] = (obm_param){name, model, value};
    return 0;
}

/* A number is a global parameter, a list one value per model. */
static int params_from(PyObject *dict, param_list *p) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; dict && PyDict_Next(dict, &at, &key, &value);) {
        const char *name = PyUnicode_AsUTF8AndSize(key, NULL);
        if (!name || PyList_Append(p->keep, key) < 0) return -1;
        if (PyNumber_Check(value)) {
            double v = PyFloat_AsDouble(value);
            if (PyErr_Occurred() || param_add(p, name, -1, v) < 0) return -1;
            continue;
        }
        Py_ssize_t n = PySequence_Size(value);
        if (n < 0) return -1;
        for (Py_ssize_t i = 0; i < n; i++) {
            PyObject *item = PySequence_GetItem(value, i);
            double v = item ? PyFloat_AsDouble(item) : 0;
            Py_XDECREF(item);
            if (PyErr_Occurred() || param_add(p, name, (int)i, v) < 0) return -1;
        }
    }
    return 0;
}

/* merge_tensors(method, models, base=None, profile=None, seed=0, **parameters) -> ndarray */
PyObject *obm_py_merge_tensors(PyObject *module, PyObject *args, PyObject *kwargs) {
    obm_py_state *st = PyModule_GetState(module);
    static char *names[] = {"method", "models", "base", "params", "profile", "seed", NULL};
    const char *profile_name = NULL;
    PyObject *method, *given, *base = Py_None, *dict = NULL, *context = NULL, *result = NULL;
    unsigned long long seed = 0;
    obm_profile profile;
    if (!obm_py_parse(args, kwargs, "OO|OO!zK", names, &method, &given, &base, &PyDict_Type, &dict,
                      &profile_name, &seed) ||
        obm_py_profile(st, profile_name, &profile) < 0)
        return NULL;
    PyObject *models = PySequence_List(given);
    size_t n = models ? (size_t)PyList_Size(models) : 0;
    obm_tensor *views = PyMem_Calloc(n + 2, sizeof *views);
    param_list params = {.keep = PyList_New(0)};
    obm_py_methods methods = {0};
    obm_py_call call;
    bool ok = models && views && params.keep && params_from(dict, &params) == 0 &&
              obm_py_methods_init(&methods, st, method) == 0 && obm_py_call_init(&call, st, NULL) == 0;
    for (size_t i = 0; ok && i < n + (base != Py_None); i++) {
        PyObject *holder = NULL;
        ok = obm_py_tensor_import(st, i < n ? PyList_GetItem(models, (Py_ssize_t)i) : base, &views[i], &holder) == 0 &&
             PyList_Append(params.keep, holder) == 0;
        Py_XDECREF(holder);
    }
    obm_context *ctx = ok ? obm_py_context(st, &context) : NULL;
    if (ctx) {
        const obm_tensor *shape = n ? &views[0] : &views[n];
        float *data;
        result = obm_py_tensor_new(st, shape->ndim, shape->shape, &data);
        const obm_custom_method *own = obm_py_methods_find(&methods);
        const obm_tensor *base_view = base == Py_None ? NULL : &views[n];
        obm_error err;
        if (result) {
            obm_py_methods_begin(&methods, &call);
            obm_py_begin(&call);
            obm_status status = own ? obm_merge_tensors_custom(ctx, own, profile, base_view, views, n, params.items,
                                                               params.n, seed, data, &err)
                                    : obm_merge_tensors(ctx, methods.method, profile, base_view, views, n, params.items,
                                                        params.n, seed, data, &err);
            if (obm_py_end(&call, status, &err) < 0) Py_CLEAR(result);
        }
    }
    obm_py_methods_clear(&methods);
    Py_XDECREF(context);
    Py_XDECREF(models);
    Py_XDECREF(params.keep);
    PyMem_Free(params.items);
    PyMem_Free(views);
    return obm_py_numpy(result);
}

static PyObject *param_dict(const obm_param_info *p) {
    return Py_BuildValue("{ss,ss,ss,sO,sd,sd,sd,ss}", "name", p->name, "doc", p->doc, "scope",
                         p->scope == OBM_PARAM_GLOBAL ? "global" : "model", "required",
                         p->required ? Py_True : Py_False, "default", p->dflt, "min", p->min, "max", p->max, "type",
                         p->is_bool ? "bool" : "number");
}

static PyObject *method_dict(const obm_method_info *m) {
    PyObject *params = PyList_New(0);
    for (size_t j = 0; params && j < m->n_params; j++) {
        PyObject *p = param_dict(&m->params[j]);
        if (!p || PyList_Append(params, p) < 0) Py_CLEAR(params);
        Py_XDECREF(p);
    }
    return params ? Py_BuildValue("{ss,ss,ss,sO,si,si,sN}", "name", m->name, "doc", m->doc, "source", m->source,
                                  "needs_base", m->needs_base ? Py_True : Py_False, "min_models", m->min_models,
                                  "max_models", m->max_models, "params", params)
                  : NULL;
}

static int append_method(PyObject *list, const obm_method_info *m) {
    PyObject *d = method_dict(m);
    int rc = d ? PyList_Append(list, d) : -1;
    Py_XDECREF(d);
    return rc;
}

/* The built-in ones, then those that are registered. */
PyObject *obm_py_list_methods(PyObject *module, PyObject *args) {
    (void)args;
    obm_py_methods own = {0};
    PyObject *list = PyList_New(0);
    int rc = list ? obm_py_methods_init(&own, PyModule_GetState(module), Py_None) : -1;
    for (size_t i = 0; rc == 0 && i < obm_method_count(); i++) rc = append_method(list, obm_method_at(i));
    for (size_t i = 0; rc == 0 && i < own.n; i++) rc = append_method(list, &own.specs[i]->info);
    obm_py_methods_clear(&own);
    if (rc < 0) Py_CLEAR(list);
    return list;
}
