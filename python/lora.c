/* LoRA adapters out of fine-tunes. */
#include "obm_py.h"

static PyObject *matrix_list(const obm_lora_matrix *m, size_t n) {
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < n; i++) {
        PyObject *d =
            Py_BuildValue("{ss,sL,sL,sL,sd,sd}", "name", m[i].name, "rows", (long long)m[i].rows, "cols",
                          (long long)m[i].cols, "rank", (long long)m[i].rank, "norm", m[i].norm, "energy", m[i].energy);
        if (!d || PyList_Append(list, d) < 0) Py_CLEAR(list);
        Py_XDECREF(d);
    }
    return list;
}

/* None is what the options have without it. */
static bool read_cut(PyObject *rank, PyObject *energy, obm_lora_options *o) {
    if (rank != Py_None) o->rank = PyLong_AsLongLong(rank);
    if (!PyErr_Occurred() && energy != Py_None) o->energy = PyFloat_AsDouble(energy);
    return !PyErr_Occurred();
}

PyObject *obm_py_extract_lora(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"base",      "expert",    "out",     "rank",     "energy", "dtype",
                            "base_name", "overwrite", "dry_run", "progress", NULL};
    PyObject *base = NULL, *expert = NULL, *out = NULL, *rank = Py_None, *energy = Py_None, *progress = Py_None,
             *context = NULL, *result = NULL;
    int overwrite = 0, dry_run = 0;
    obm_py_state *st = PyModule_GetState(module);
    obm_lora_options options = OBM_INIT(obm_lora_options);
    if (!obm_py_parse(args, kwargs, "O&O&O&|OOzzppO", names, obm_py_path, &base, obm_py_path, &expert,
                      obm_py_path, &out, &rank, &energy, &options.dtype, &options.base_name, &overwrite,
                      &dry_run, &progress))
        return NULL;
    obm_py_call call;
    bool ok = read_cut(rank, energy, &options) && obm_py_call_init(&call, st, progress) == 0;
    obm_context *ctx = ok ? obm_py_context(st, &context) : NULL;
    if (ctx) {
        options.overwrite = overwrite;
        options.dry_run = dry_run;
        options.progress = obm_py_progress;
        options.progress_user = &call;
        obm_lora_matrix *matrices = NULL;
        size_t n = 0;
        obm_plan plan = {0};
        obm_error err;
        const char *base_text = PyBytes_AsString(base), *expert_text = PyBytes_AsString(expert),
                   *out_text = PyBytes_AsString(out);
        obm_py_begin(&call);
        obm_status status =
            obm_extract_lora(ctx, base_text, expert_text, &options, out_text, &plan, &matrices, &n, &err);
        if (obm_py_end(&call, status, &err) == 0) result = dry_run ? obm_py_plan(&plan) : matrix_list(matrices, n);
        obm_free(matrices);
    }
    Py_XDECREF(context);
    Py_DECREF(base);
    Py_DECREF(expert);
    Py_DECREF(out);
    return result;
}
