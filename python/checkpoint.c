/* Checkpoint and TaskVector: mappings from tensor names to tensors. */
#include "obm_py.h"

#include <string.h>

typedef struct Checkpoint {
    PyObject_HEAD obm_checkpoint *c;
    PyObject *context;
} Checkpoint;

static PyObject *checkpoint_wrap(obm_py_state *st, obm_checkpoint *c, PyObject *context) {
    Checkpoint *self = PyObject_New(Checkpoint, st->checkpoint);
    if (!self) return NULL;
    self->c = c;
    self->context = context;
    return (PyObject *)self;
}

static PyObject *checkpoint_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", NULL};
    PyObject *path, *context;
    if (!obm_py_parse(args, kwargs, "O&", names, obm_py_path, &path)) return NULL;
    obm_py_state *st = PyType_GetModuleState(type);
    obm_context *ctx = obm_py_context(st, &context);
    if (!ctx) return Py_DECREF(path), NULL;
    obm_checkpoint *c = NULL;
    obm_error err;
    obm_status status;
    const char *p = PyBytes_AsString(path);
    Py_BEGIN_ALLOW_THREADS;
    status = obm_checkpoint_open(ctx, p, &c, &err);
    Py_END_ALLOW_THREADS;
    Py_DECREF(path);
    PyObject *self = status == OBM_OK ? checkpoint_wrap(st, c, context) : obm_py_raise(st, &err);
    if (!self) {
        obm_checkpoint_free(c);
        Py_DECREF(context);
    }
    return self;
}

const obm_checkpoint *obm_py_checkpoint_get(PyObject *o) { return ((Checkpoint *)o)->c; }

static void checkpoint_dealloc(PyObject *o) {
    Checkpoint *self = (Checkpoint *)o;
    PyTypeObject *type = Py_TYPE(o);
    obm_checkpoint_free(self->c);
    Py_XDECREF(self->context);
    PyObject_Free(o);
    Py_DECREF(type);
}

static Py_ssize_t checkpoint_length(PyObject *o) { return (Py_ssize_t)obm_checkpoint_count(obm_py_checkpoint_get(o)); }

static PyObject *checkpoint_get(PyObject *o, PyObject *key) {
    const char *name = PyUnicode_Check(key) ? PyUnicode_AsUTF8AndSize(key, NULL) : NULL;
    if (!name) return PyErr_Occurred() ? NULL : (PyErr_SetString(PyExc_TypeError, "a tensor name is a str"), NULL);
    obm_tensor t;
    obm_error err;
    if (obm_checkpoint_get(obm_py_checkpoint_get(o), name, &t, &err) != OBM_OK)
        return obm_py_raise(OBM_PY_STATE(o), &err);
    return obm_py_tensor_view(OBM_PY_STATE(o), &t, o);
}

static int checkpoint_contains(PyObject *o, PyObject *key) {
    const char *name = PyUnicode_Check(key) ? PyUnicode_AsUTF8AndSize(key, NULL) : NULL;
    obm_tensor t;
    return name ? obm_checkpoint_get(obm_py_checkpoint_get(o), name, &t, NULL) == OBM_OK : PyErr_Occurred() ? -1 : 0;
}

static PyObject *checkpoint_keys(PyObject *o, PyObject *unused) {
    (void)unused;
    const obm_checkpoint *c = obm_py_checkpoint_get(o);
    Py_ssize_t n = (Py_ssize_t)obm_checkpoint_count(c);
    PyObject *keys = PyList_New(n);
    for (Py_ssize_t i = 0; keys && i < n; i++) {
        const char *name;
        obm_tensor t;
        obm_checkpoint_at(c, (size_t)i, &name, &t);
        PyObject *s = PyUnicode_FromString(name);
        if (!s || PyList_SetItem(keys, i, s) < 0) Py_CLEAR(keys);
    }
    return keys;
}

static PyObject *iter_of(PyObject *list) {
    PyObject *it = list ? PyObject_GetIter(list) : NULL;
    Py_XDECREF(list);
    return it;
}

static PyObject *checkpoint_iter(PyObject *o) { return iter_of(checkpoint_keys(o, NULL)); }

static PyObject *checkpoint_path(PyObject *o, void *unused) {
    (void)unused;
    return PyUnicode_DecodeFSDefault(obm_checkpoint_path(obm_py_checkpoint_get(o)));
}

static PyObject *checkpoint_config(PyObject *o, void *unused) {
    (void)unused;
    return obm_py_json(obm_checkpoint_config(obm_py_checkpoint_get(o)));
}

static PyObject *checkpoint_tied(PyObject *o, void *unused) {
    (void)unused;
    return PyBool_FromLong(obm_checkpoint_is_tied(obm_py_checkpoint_get(o)));
}

static PyObject *checkpoint_adapter(PyObject *o, void *unused) {
    (void)unused;
    return PyBool_FromLong(obm_checkpoint_is_adapter(obm_py_checkpoint_get(o)));
}

static PyObject *checkpoint_sha256(PyObject *o, PyObject *arg) {
    const char *name = PyUnicode_AsUTF8AndSize(arg, NULL);
    if (!name) return NULL;
    char hex[65];
    obm_error err;
    obm_status status;
    const obm_checkpoint *c = obm_py_checkpoint_get(o);
    Py_BEGIN_ALLOW_THREADS;
    status = obm_checkpoint_sha256(c, name, hex, &err);
    Py_END_ALLOW_THREADS;
    return status == OBM_OK ? PyUnicode_FromString(hex) : obm_py_raise(OBM_PY_STATE(o), &err);
}

static PyObject *checkpoint_z12(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"name", "rows", NULL};
    const char *name;
    long long rows = 16;
    if (!obm_py_parse(args, kwargs, "s|L", names, &name, &rows)) return NULL;
    const obm_checkpoint *c = obm_py_checkpoint_get(o);
    obm_z12_counts z;
    obm_error err;
    obm_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = obm_checkpoint_z12(c, name, rows, &z, &err);
    Py_END_ALLOW_THREADS;
    if (status != OBM_OK) return obm_py_raise(OBM_PY_STATE(o), &err);
    return Py_BuildValue("{sK,sK,sO}", "weights", (unsigned long long)z.weights, "escapes",
                         (unsigned long long)z.escapes, "fits", z.fits ? Py_True : Py_False);
}

static PyObject *checkpoint_check_layers(PyObject *o, PyObject *unused) {
    (void)unused;
    obm_checkpoint_check_layers(obm_py_checkpoint_get(o));
    Py_RETURN_NONE;
}

static PyObject *checkpoint_repr(PyObject *o) {
    const obm_checkpoint *c = obm_py_checkpoint_get(o);
    return PyUnicode_FromFormat("Checkpoint(\"%s\", %zd tensors)", obm_checkpoint_path(c),
                                (Py_ssize_t)obm_checkpoint_count(c));
}

static PyMethodDef checkpoint_methods[] = {
    {"keys", checkpoint_keys, METH_NOARGS, "keys() -> list of str\n\nTensor names, sorted."},
    {"sha256", checkpoint_sha256, METH_O, "sha256(name) -> str\n\nSHA-256 of one tensor's bytes, hex."},
    {"z12", (PyCFunction)(void (*)(void))checkpoint_z12, METH_VARARGS | METH_KEYWORDS,
     "z12(name, rows=16) -> {weights, escapes, fits}\n\nHow well 12 bits per weight (Model(z12=True)) would hold a matrix, by rows "
     "of it that lie evenly (0: all): how many weights they have, how many of them need an escape, and whether that is few "
     "enough (1 %) for a model to pack it.  0, 0 and False where the tensor is no bf16 matrix."},
    {"check_layers", checkpoint_check_layers, METH_NOARGS,
     "check_layers() -> None\n\nWarns of tensors in layers that config.json does not count, which no model runs."},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef checkpoint_getset[] = {
    {"path", checkpoint_path, NULL, "as given", NULL},
    {"config", checkpoint_config, NULL, "config.json as a dict, or None", NULL},
    {"tied", checkpoint_tied, NULL, "no head of its own: lm_head is the embedding", NULL},
    {"adapter", checkpoint_adapter, NULL, "a PEFT LoRA folder: its tensors have the adapter's names", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot checkpoint_slots[] = {
    {Py_tp_new, checkpoint_new},
    {Py_tp_dealloc, checkpoint_dealloc},
    {Py_tp_repr, checkpoint_repr},
    {Py_tp_iter, checkpoint_iter},
    {Py_tp_methods, checkpoint_methods},
    {Py_tp_getset, checkpoint_getset},
    {Py_mp_length, checkpoint_length},
    {Py_mp_subscript, checkpoint_get},
    {Py_sq_contains, checkpoint_contains},
    {Py_tp_doc, "Checkpoint(path)\n\nA Hugging Face folder, a PEFT LoRA folder, one .safetensors "
                "file or an expert of a pack (PACK:task), memory-mapped; ckpt[name] is a Tensor "
                "(a view)."},
    {0, NULL}};
PyType_Spec obm_py_checkpoint_spec = {"onebitmerge.Checkpoint", sizeof(Checkpoint), 0, Py_TPFLAGS_DEFAULT,
                                      checkpoint_slots};

/* ---- TaskVector ---- */

typedef struct TaskVector {
    PyObject_HEAD obm_task_vector *v;
    PyObject *base, *expert; /* Checkpoints */
    PyObject *context;
} TaskVector;

/* A Checkpoint as it is, a path opened. */
static PyObject *as_checkpoint(obm_py_state *st, PyObject *o) {
    if (Py_TYPE(o) == st->checkpoint) return Py_NewRef(o);
    return PyObject_CallFunctionObjArgs((PyObject *)st->checkpoint, o, NULL);
}

static PyObject *task_vector_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"base", "expert", NULL};
    PyObject *base, *expert;
    if (!obm_py_parse(args, kwargs, "OO", names, &base, &expert)) return NULL;
    obm_py_state *st = PyType_GetModuleState(type);
    TaskVector *self = PyObject_New(TaskVector, type);
    if (!self) return NULL;
    self->v = NULL;
    self->context = self->expert = NULL;
    self->base = as_checkpoint(st, base);
    if (self->base) self->expert = as_checkpoint(st, expert);
    obm_error err;
    if (!self->expert || !obm_py_context(st, &self->context)) return Py_DECREF(self), NULL;
    if (obm_task_vector_new(obm_py_checkpoint_get(self->base), obm_py_checkpoint_get(self->expert), &self->v, &err) !=
        OBM_OK) {
        Py_DECREF(self);
        return obm_py_raise(st, &err);
    }
    return (PyObject *)self;
}

static void task_vector_dealloc(PyObject *o) {
    TaskVector *self = (TaskVector *)o;
    PyTypeObject *type = Py_TYPE(o);
    obm_task_vector_free(self->v);
    Py_XDECREF(self->base);
    Py_XDECREF(self->expert);
    Py_XDECREF(self->context);
    PyObject_Free(o);
    Py_DECREF(type);
}

static obm_context *context_of(PyObject *capsule) { return PyCapsule_GetPointer(capsule, "onebitmerge.context"); }

static Py_ssize_t task_vector_length(PyObject *o) { return (Py_ssize_t)obm_task_vector_count(((TaskVector *)o)->v); }

static PyObject *task_vector_keys(PyObject *o, PyObject *unused) {
    (void)unused;
    Py_ssize_t n = task_vector_length(o);
    PyObject *keys = PyList_New(n);
    for (Py_ssize_t i = 0; keys && i < n; i++) {
        const char *name;
        obm_tensor b, e;
        obm_task_vector_at(((TaskVector *)o)->v, (size_t)i, &name, &b, &e);
        PyObject *s = PyUnicode_FromString(name);
        if (!s || PyList_SetItem(keys, i, s) < 0) Py_CLEAR(keys);
    }
    return keys;
}

static PyObject *task_vector_iter(PyObject *o) { return iter_of(task_vector_keys(o, NULL)); }

/* Shape of the base's side; false without such a tensor. */
static bool find_base(const obm_task_vector *v, const char *name, obm_tensor *base) {
    for (size_t i = 0; i < obm_task_vector_count(v); i++) {
        const char *at;
        obm_tensor expert;
        obm_task_vector_at(v, i, &at, base, &expert);
        if (strcmp(at, name) == 0) return true;
    }
    *base = (obm_tensor){.dtype = OBM_F32};
    return false;
}

static PyObject *task_vector_get(PyObject *o, PyObject *key) {
    const obm_task_vector *v = ((TaskVector *)o)->v;
    const char *name = PyUnicode_Check(key) ? PyUnicode_AsUTF8AndSize(key, NULL) : NULL;
    if (!name) return PyErr_Occurred() ? NULL : (PyErr_SetString(PyExc_TypeError, "a tensor name is a str"), NULL);
    obm_tensor base;
    find_base(v, name, &base); /* an unknown name gets its error from the core below */
    float *data;
    PyObject *t = obm_py_tensor_new(OBM_PY_STATE(o), base.ndim, base.shape, &data);
    if (!t) return NULL;
    obm_error err;
    obm_status status;
    Py_BEGIN_ALLOW_THREADS;
    status = obm_task_vector_read(v, name, data, &err);
    Py_END_ALLOW_THREADS;
    if (status == OBM_OK) return t;
    Py_DECREF(t);
    return obm_py_raise(OBM_PY_STATE(o), &err);
}

static PyObject *stats_dict(const obm_delta_stats *s) {
    return Py_BuildValue("{sK,sK,sK,sd,sd,sd,sd,sd,sd}", "tensors", (unsigned long long)s->tensors, "params",
                         (unsigned long long)s->params, "zeros", (unsigned long long)s->zeros, "base_norm",
                         s->base_norm, "delta_norm", s->delta_norm, "relative_norm", s->relative_norm, "zero_share",
                         s->zero_share, "onebit_error_matrix", s->onebit_error_matrix, "onebit_error_row",
                         s->onebit_error_row);
}

static PyObject *task_vector_stats(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"progress", NULL};
    PyObject *progress = Py_None;
    if (!obm_py_parse(args, kwargs, "|O", names, &progress)) return NULL;
    TaskVector *self = (TaskVector *)o;
    obm_py_call call;
    if (obm_py_call_init(&call, OBM_PY_STATE(o), progress) < 0) return NULL;
    obm_delta_stats stats[OBM_CLASS_COUNT];
    obm_error err;
    obm_context *ctx = context_of(self->context);
    obm_py_begin(&call);
    obm_status status = obm_task_vector_stats(ctx, self->v, obm_py_progress, &call, stats, &err);
    if (obm_py_end(&call, status, &err) < 0) return NULL;
    PyObject *d = PyDict_New();
    for (int c = 0; d && c < OBM_CLASS_COUNT; c++) {
        if (stats[c].tensors && !obm_py_set(d, obm_class_name((obm_class)c), stats_dict(&stats[c]))) Py_CLEAR(d);
    }
    return d;
}

static PyObject *task_vector_tensor_stats(PyObject *o, PyObject *arg) {
    TaskVector *self = (TaskVector *)o;
    const char *name = PyUnicode_AsUTF8AndSize(arg, NULL);
    if (!name) return NULL;
    obm_delta_stats stats;
    obm_error err;
    obm_status status;
    obm_context *ctx = context_of(self->context);
    Py_BEGIN_ALLOW_THREADS;
    status = obm_task_vector_tensor_stats(ctx, self->v, name, &stats, &err);
    Py_END_ALLOW_THREADS;
    return status == OBM_OK ? stats_dict(&stats) : obm_py_raise(OBM_PY_STATE(o), &err);
}

static PyObject *task_vector_compare(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"other", "progress", NULL};
    PyObject *other, *progress = Py_None;
    TaskVector *self = (TaskVector *)o;
    if (!obm_py_parse(args, kwargs, "O!|O", names, Py_TYPE(o), &other, &progress)) return NULL;
    obm_py_call call;
    if (obm_py_call_init(&call, OBM_PY_STATE(o), progress) < 0) return NULL;
    obm_delta_pair pairs[OBM_CLASS_COUNT];
    obm_error err;
    obm_context *ctx = context_of(self->context);
    const obm_task_vector *b = ((TaskVector *)other)->v;
    obm_py_begin(&call);
    obm_status status = obm_task_vector_compare(ctx, self->v, b, obm_py_progress, &call, pairs, &err);
    if (obm_py_end(&call, status, &err) < 0) return NULL;
    PyObject *d = PyDict_New();
    for (int c = 0; d && c < OBM_CLASS_COUNT; c++) {
        if (pairs[c].params &&
            !obm_py_set(d, obm_class_name((obm_class)c),
                        Py_BuildValue("{sK,sd,sd}", "params", (unsigned long long)pairs[c].params, "cosine",
                                      pairs[c].cosine, "sign_agreement", pairs[c].sign_agreement)))
            Py_CLEAR(d);
    }
    return d;
}

static PyObject *task_vector_repr(PyObject *o) {
    TaskVector *self = (TaskVector *)o;
    return PyUnicode_FromFormat("TaskVector(\"%s\" - \"%s\", %zd tensors)",
                                obm_checkpoint_path(obm_py_checkpoint_get(self->expert)),
                                obm_checkpoint_path(obm_py_checkpoint_get(self->base)), task_vector_length(o));
}

static PyMethodDef task_vector_methods[] = {
    {"keys", task_vector_keys, METH_NOARGS, "keys() -> list of str"},
    {"stats", (PyCFunction)(void (*)(void))task_vector_stats, METH_VARARGS | METH_KEYWORDS,
     "stats(progress=None) -> dict\n\nBy module class: params, relative_norm, zero_share, onebit_error_matrix, "
     "onebit_error_row, ..."},
    {"tensor_stats", task_vector_tensor_stats, METH_O, "tensor_stats(name) -> dict\n\nThe same for one tensor."},
    {"compare", (PyCFunction)(void (*)(void))task_vector_compare, METH_VARARGS | METH_KEYWORDS,
     "compare(other, progress=None) -> dict\n\nBy module class: cosine and sign_agreement of two task vectors of one "
     "base."},
    {NULL, NULL, 0, NULL}};
static PyType_Slot task_vector_slots[] = {
    {Py_tp_new, task_vector_new},
    {Py_tp_dealloc, task_vector_dealloc},
    {Py_tp_repr, task_vector_repr},
    {Py_tp_iter, task_vector_iter},
    {Py_tp_methods, task_vector_methods},
    {Py_mp_length, task_vector_length},
    {Py_mp_subscript, task_vector_get},
    {Py_tp_doc,
     "TaskVector(base, expert)\n\nexpert - base, tensor by tensor, in float32, computed when v[name] asks for it.  "
     "Checkpoints or paths; the expert may be a LoRA folder or PACK:task."},
    {0, NULL}};
PyType_Spec obm_py_task_vector_spec = {"onebitmerge.TaskVector", sizeof(TaskVector), 0, Py_TPFLAGS_DEFAULT,
                                       task_vector_slots};
