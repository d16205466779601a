/* Placement plans. */
#include "obm_py.h"

static obm_status plan_without_gil(obm_context *ctx, const char *path, const obm_model_plan_options *o, char **json,
                                   obm_error *err) {
    obm_status status;
    Py_BEGIN_ALLOW_THREADS status = obm_model_plan(ctx, path, o, json, err);
    Py_END_ALLOW_THREADS return status;
}

int obm_py_numa(obm_py_state *st, const char *name, obm_numa *out) {
    obm_error err;
    if (obm_numa_find(name, out, &err) == OBM_OK) return 0;
    obm_py_raise(st, &err);
    return -1;
}

/* What equals True or False: 0 and 1 do, and NumPy's. */
static int read_switch(PyObject *value, obm_z12 *out) {
    int on = PyObject_RichCompareBool(value, Py_True, Py_EQ);
    int off = on ? 0 : PyObject_RichCompareBool(value, Py_False, Py_EQ);
    *out = on > 0 ? OBM_Z12_ON : OBM_Z12_OFF;
    if (on > 0 || off > 0) return 0;
    PyErr_Clear(); /* arrays compare to arrays */
    PyErr_Format(PyExc_TypeError, "z12: expected True, False or a str, found %R", value);
    return -1;
}

int obm_py_z12(obm_py_state *st, PyObject *value, obm_z12 *out) {
    obm_error err;
    if (!value) return *out = OBM_Z12_AUTO, 0;
    if (!PyUnicode_Check(value)) return read_switch(value, out);
    const char *name = PyUnicode_AsUTF8AndSize(value, NULL);
    if (!name) return -1;
    if (obm_z12_find(name, out, &err) == OBM_OK) return 0;
    obm_py_raise(st, &err);
    return -1;
}

PyObject *obm_py_plan_model(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"model", "topology", "numa", "threads", "base", "z12", "kv", NULL};
    PyObject *path = NULL, *topology = Py_None, *base = Py_None, *topology_bytes = NULL, *base_bytes = NULL,
             *context = NULL, *result = NULL, *z12 = NULL;
    const char *numa = "auto", *kv = "f32";
    long long threads = 0;
    obm_py_state *st = PyModule_GetState(module);
    obm_model_plan_options o = OBM_INIT(obm_model_plan_options);
    if (!obm_py_parse(args, kwargs, "O&|OsLOOs", names, obm_py_path, &path, &topology, &numa, &threads,
                      &base, &z12, &kv))
        return NULL;
    bool ok = (topology == Py_None || obm_py_path(topology, &topology_bytes)) &&
              (base == Py_None || obm_py_path(base, &base_bytes)) && obm_py_numa(st, numa, &o.numa) == 0 &&
              obm_py_dtype(st, kv, OBM_F16, &o.kv) == 0 && obm_py_z12(st, z12, &o.z12) == 0;
    obm_context *ctx = ok ? obm_py_context(st, &context) : NULL;
    if (ctx) {
        o.topology = topology_bytes ? PyBytes_AsString(topology_bytes) : NULL;
        o.base = base_bytes ? PyBytes_AsString(base_bytes) : NULL;
        o.threads = threads;
        char *json = NULL;
        obm_error err;
        obm_status status = plan_without_gil(ctx, PyBytes_AsString(path), &o, &json, &err);
        result = status == OBM_OK ? obm_py_json(json) : obm_py_raise(st, &err);
        obm_free(json);
    }
    Py_XDECREF(context);
    Py_XDECREF(topology_bytes);
    Py_XDECREF(base_bytes);
    Py_DECREF(path);
    return result;
}
