/* Merge methods in Python: the module's registry, what the core gets of it, and the call for a tile. */
#include "obm_py.h"

#include <string.h>

/* An entry of the registry is the tuple that _api.py makes: (name, function, parameters, whole tensor, base, doc,
 * source, min_models, max_models), each parameter a tuple (name, doc, per model, required, default, min, max, bool). */

static int read_param(PyObject *o, obm_param_info *p) {
    int per_model, required, is_bool;
    if (!PyTuple_Check(o)) return PyErr_SetString(PyExc_TypeError, "a parameter is a tuple"), -1;
    if (!PyArg_ParseTuple(o, "ssppdddp", &p->name, &p->doc, &per_model, &required, &p->dflt, &p->min, &p->max,
                          &is_bool))
        return -1;
    p->scope = per_model ? OBM_PARAM_PER_MODEL : OBM_PARAM_GLOBAL;
    p->required = required;
    p->is_bool = is_bool;
    return 0;
}

static float *tile_memory(void *user, size_t floats);
static obm_status merge_tile(void *user, const obm_merge_tile *tile, obm_error *err);

/* Strings and the function belong to the entry. */
static int read_entry(obm_py_state *st, PyObject *entry, obm_py_method *m) {
    int whole, base;
    PyObject *params;
    obm_method_info *info = &m->spec.info;
    *m = (obm_py_method){.spec = OBM_INIT(obm_custom_method)};
    if (!PyTuple_Check(entry)) return PyErr_SetString(PyExc_TypeError, "a method is a tuple"), -1;
    if (!PyArg_ParseTuple(entry, "sOO!ppssii", &info->name, &m->function, &PyTuple_Type, &params, &whole, &base,
                          &info->doc, &info->source, &info->min_models, &info->max_models))
        return -1;
    Py_ssize_t n = PyTuple_Size(params);
    m->params = PyMem_Calloc((size_t)n + 1, sizeof *m->params);
    if (!m->params) return PyErr_NoMemory(), -1;
    for (Py_ssize_t i = 0; i < n; i++)
        if (read_param(PyTuple_GetItem(params, i), &m->params[i]) < 0) return -1;
    info->params = m->params;
    info->n_params = (size_t)n;
    info->needs_base = base;
    m->spec.whole_tensor = whole;
    m->spec.merge = merge_tile;
    m->spec.memory = tile_memory;
    m->spec.user = m;
    m->entry = Py_NewRef(entry);
    obm_error err;
    return obm_custom_method_check(&m->spec, &err) == OBM_OK ? 0 : (obm_py_raise(st, &err), -1);
}

static void clear_method(obm_py_method *m) {
    PyMem_Free(m->params);
    Py_CLEAR(m->entry);
    Py_CLEAR(m->buffer);
}

/* register_method(*entry), or (name, None): forgets it */
PyObject *obm_py_register_method(PyObject *module, PyObject *entry) {
    obm_py_state *st = PyModule_GetState(module);
    if (PyTuple_Size(entry) == 2 && PyTuple_GetItem(entry, 1) == Py_None) {
        PyObject *name = PyTuple_GetItem(entry, 0);
        if (PyDict_DelItem(st->methods, name) == 0) Py_RETURN_NONE;
        PyErr_Clear();
        return PyErr_Format(st->errors[-OBM_E_NOTFOUND], "no method %R is registered", name);
    }
    obm_py_method m = {0};
    int rc = read_entry(st, entry, &m);
    if (rc == 0) rc = PyDict_SetItemString(st->methods, m.spec.info.name, entry);
    clear_method(&m);
    if (rc < 0) return NULL;
    Py_RETURN_NONE;
}

/* ---- lists for one call ---- */

static int add_entry(obm_py_state *st, obm_py_methods *list, PyObject *entry) {
    obm_py_method *m = &list->items[list->n];
    list->specs[list->n++] = &m->spec;
    return read_entry(st, entry, m);
}

/* A callable by itself, under the name it has. */
static int add_callable(obm_py_state *st, obm_py_methods *list, PyObject *callable) {
    PyObject *entry = obm_py_call_hook(st, "method_entry", PyTuple_Pack(1, callable));
    int rc = entry ? add_entry(st, list, entry) : -1;
    if (rc == 0) list->method = list->items[list->n - 1].spec.info.name;
    Py_XDECREF(entry);
    return rc;
}

int obm_py_methods_init(obm_py_methods *list, obm_py_state *st, PyObject *method) {
    size_t n = (size_t)PyDict_Size(st->methods) + 1;
    *list =
        (obm_py_methods){.items = PyMem_Calloc(n, sizeof *list->items), .specs = PyMem_Calloc(n, sizeof *list->specs)};
    if (!list->items || !list->specs) return PyErr_NoMemory(), -1;
    PyObject *name, *entry;
    for (Py_ssize_t at = 0; PyDict_Next(st->methods, &at, &name, &entry);)
        if (add_entry(st, list, entry) < 0) return -1;
    if (method == Py_None) return 0;
    if (PyUnicode_Check(method)) return (list->method = PyUnicode_AsUTF8AndSize(method, NULL)) ? 0 : -1;
    if (PyCallable_Check(method)) return add_callable(st, list, method);
    PyErr_Format(PyExc_TypeError, "method: expected a name or a callable, found %R", (PyObject *)Py_TYPE(method));
    return -1;
}

void obm_py_methods_begin(obm_py_methods *list, obm_py_call *call) {
    for (size_t i = 0; i < list->n; i++) list->items[i].call = call;
}

void obm_py_methods_clear(obm_py_methods *list) {
    for (size_t i = 0; i < list->n; i++) clear_method(&list->items[i]);
    PyMem_Free(list->items);
    PyMem_Free((void *)list->specs);
    *list = (obm_py_methods){0};
}

const obm_custom_method *obm_py_methods_find(const obm_py_methods *list) {
    for (size_t i = list->n; i-- > 0;)
        if (list->method && !strcmp(list->specs[i]->info.name, list->method)) return list->specs[i];
    return NULL;
}

/* ---- one tile ---- */

/* The arrays that the function sees lie in here.  What it keeps of them stays as it is: the next tile gets other
 * memory. */
static float *tile_memory(void *user, size_t floats) {
    obm_py_method *m = user;
    obm_py_call *c = m->call;
    float *data = NULL;
    if (c->raised[0]) return NULL;
    PyEval_RestoreThread(c->saved);
    bool fits =
        m->buffer && Py_REFCNT(m->buffer) == 1 && obm_tensor_count(obm_py_tensor_get(m->buffer)) == (int64_t)floats;
    if (fits) {
        data = m->data;
    } else {
        Py_CLEAR(m->buffer);
        m->buffer = obm_py_tensor_new(c->state, 1, &(int64_t){(int64_t)floats}, &data);
        m->data = data;
        if (!m->buffer) {
            data = NULL;
            obm_py_stash(c);
        }
    }
    c->saved = PyEval_SaveThread();
    return data;
}

static PyObject *value_of(const obm_param_info *p, double value) {
    return p->is_bool ? PyBool_FromLong(value != 0) : PyFloat_FromDouble(value);
}

static PyObject *values_of(const obm_param_info *p, const double *values, size_t n) {
    if (p->scope == OBM_PARAM_GLOBAL) return value_of(p, values[0]);
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *v = value_of(p, values[i]);
        if (!v || PyList_Append(list, v) < 0) Py_CLEAR(list);
        Py_XDECREF(v);
    }
    return list;
}

static PyObject *parameters_of(const obm_py_method *m, const obm_merge_tile *t) {
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict && i < m->spec.info.n_params; i++)
        if (!obm_py_set(dict, m->params[i].name, values_of(&m->params[i], t->values + i * t->n_models, t->n_models)))
            Py_CLEAR(dict);
    return dict;
}

static PyObject *shape_of(const obm_merge_tile *t) {
    PyObject *shape = PyTuple_New(t->ndim);
    for (int i = 0; shape && i < t->ndim; i++) {
        PyObject *n = PyLong_FromLongLong(t->shape[i]);
        if (!n || PyTuple_SetItem(shape, i, n) < 0) Py_CLEAR(shape);
    }
    return shape;
}

static obm_status merge_tile(void *user, const obm_merge_tile *t, obm_error *err) {
    obm_py_method *m = user;
    obm_py_call *c = m->call;
    (void)err;
    if (c->raised[0]) return OBM_E_USER;
    PyEval_RestoreThread(c->saved);
    PyObject *parameters = parameters_of(m, t), *shape = parameters ? shape_of(t) : NULL;
    PyObject *args = shape ? Py_BuildValue("(OsOsOKnnOO)", m->function, m->spec.info.name, m->buffer, t->tensor, shape,
                                           (unsigned long long)t->begin, (Py_ssize_t)t->count, (Py_ssize_t)t->n_models,
                                           t->base ? Py_True : Py_False, parameters)
                           : NULL;
    PyObject *done = obm_py_call_hook(c->state, "merge_tile", args);
    obm_status status = done ? OBM_OK : OBM_E_USER;
    if (!done) obm_py_stash(c);
    Py_XDECREF(done);
    Py_XDECREF(shape);
    Py_XDECREF(parameters);
    c->saved = PyEval_SaveThread();
    return status;
}
