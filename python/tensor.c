/* Tensor: memory with a dtype and a shape; buffer protocol and DLPack out, both in.  Never computes. */
#include "obm_py.h"

#include <stdlib.h>
#include <string.h>

typedef struct Tensor {
    PyObject_HEAD obm_tensor t;
    Py_ssize_t shape[OBM_MAX_DIM], strides[OBM_MAX_DIM];
    PyObject *owner; /* keeps a view's memory alive */
    void *memory;    /* own memory, writable */
} Tensor;

static Tensor *tensor_alloc(obm_py_state *st) { return PyObject_New(Tensor, st->tensor); }

static PyObject *tensor_fill(Tensor *self, const obm_tensor *t, PyObject *owner, void *memory) {
    self->t = *t;
    self->owner = Py_XNewRef(owner);
    self->memory = memory;
    Py_ssize_t stride = (Py_ssize_t)obm_dtype_size(t->dtype);
    for (int i = t->ndim - 1; i >= 0; i--) {
        self->shape[i] = (Py_ssize_t)t->shape[i];
        self->strides[i] = stride;
        stride *= self->shape[i];
    }
    return (PyObject *)self;
}

PyObject *obm_py_tensor_view(obm_py_state *st, const obm_tensor *t, PyObject *owner) {
    Tensor *self = tensor_alloc(st);
    return self ? tensor_fill(self, t, owner, NULL) : NULL;
}

PyObject *obm_py_tensor_new(obm_py_state *st, int32_t ndim, const int64_t *shape, float **data) {
    obm_tensor t = {.dtype = OBM_F32, .ndim = ndim};
    for (int i = 0; i < ndim; i++) t.shape[i] = shape[i];
    int64_t n = obm_tensor_count(&t);
    float *memory =
        n >= 0 && (uint64_t)n < PY_SSIZE_T_MAX / sizeof(float) ? calloc((size_t)n + 1, sizeof(float)) : NULL;
    if (!memory) return PyErr_NoMemory();
    t.data = *data = memory;
    Tensor *self = tensor_alloc(st);
    if (!self) return free(memory), NULL;
    return tensor_fill(self, &t, NULL, memory);
}

const obm_tensor *obm_py_tensor_get(PyObject *o) { return &((Tensor *)o)->t; }

static void tensor_dealloc(PyObject *o) {
    Tensor *self = (Tensor *)o;
    PyTypeObject *type = Py_TYPE(o);
    free(self->memory);
    Py_XDECREF(self->owner);
    PyObject_Free(o);
    Py_DECREF(type);
}

/* ---- buffer protocol ---- */

static const char *buffer_format(obm_dtype d) {
    static const char *const formats[OBM_DTYPE_COUNT] = {
        [OBM_F32] = "f", [OBM_F16] = "e", [OBM_F64] = "d",  [OBM_U8] = "B",  [OBM_I8] = "b",  [OBM_I16] = "h",
        [OBM_I32] = "i", [OBM_I64] = "q", [OBM_BOOL] = "?", [OBM_U16] = "H", [OBM_U32] = "I", [OBM_U64] = "Q"};
    return d < OBM_DTYPE_COUNT ? formats[d] : NULL;
}

static int tensor_getbuffer(PyObject *o, Py_buffer *view, int flags) {
    Tensor *self = (Tensor *)o;
    view->obj = NULL;
    if (!buffer_format(self->t.dtype)) {
        PyErr_Format(PyExc_BufferError,
                     "the buffer protocol has no %s; np.asarray(t) widens it, torch.from_dlpack(t) keeps it",
                     obm_dtype_name(self->t.dtype));
        return -1;
    }
    if ((flags & PyBUF_WRITABLE) && !self->memory) {
        PyErr_SetString(PyExc_BufferError, "the tensor is a read-only view");
        return -1;
    }
    *view = (Py_buffer){.buf = (void *)self->t.data,
                        .obj = Py_NewRef(o),
                        .itemsize = (Py_ssize_t)obm_dtype_size(self->t.dtype),
                        .readonly = !self->memory,
                        .ndim = self->t.ndim};
    view->len = (Py_ssize_t)obm_tensor_count(&self->t) * view->itemsize;
    view->format = flags & PyBUF_FORMAT ? (char *)buffer_format(self->t.dtype) : NULL;
    view->shape = flags & PyBUF_ND ? self->shape : NULL;
    view->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? self->strides : NULL;
    return 0;
}

/* A NumPy array of the whole tensor: a view, or for bf16 a widened copy (f32, exact). */
static PyObject *array_of(PyObject *o) {
    Tensor *self = (Tensor *)o;
    if (buffer_format(self->t.dtype)) return obm_py_numpy(PyMemoryView_FromObject(o));
    float *data;
    PyObject *wide = obm_py_tensor_new(OBM_PY_STATE(o), self->t.ndim, self->t.shape, &data);
    obm_error err;
    if (wide && obm_tensor_read_f32(&self->t, 0, obm_tensor_count(&self->t), data, &err) != OBM_OK) {
        Py_DECREF(wide);
        return obm_py_raise(OBM_PY_STATE(o), &err);
    }
    return obm_py_numpy(wide);
}

/* numpy asks for this where the buffer protocol refused.  copy: True always, False never (an error where one is
 * needed). */
static PyObject *tensor_array(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"dtype", "copy", NULL};
    PyObject *dtype = Py_None, *copy = Py_None;
    if (!obm_py_parse(args, kwargs, "|OO", names, &dtype, &copy)) return NULL;
    bool widens = !buffer_format(((Tensor *)o)->t.dtype), copied = widens;
    PyObject *array = copy == Py_False && widens ? NULL : array_of(o);
    if (array && dtype != Py_None) {
        PyObject *cast =
            PyObject_CallMethod(array, "astype", "OssOO", dtype, "K", "unsafe", Py_True, Py_False); /* copy=False */
        copied = copied || cast != array;
        Py_DECREF(array);
        array = cast;
    }
    if (copy == Py_False && (copied || !array) && !PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "this NumPy array of a %s tensor needs a copy",
                     obm_dtype_name(((Tensor *)o)->t.dtype));
        Py_CLEAR(array);
    } else if (copy == Py_True && array && !copied) {
        PyObject *fresh = PyObject_CallMethod(array, "copy", NULL);
        Py_DECREF(array);
        array = fresh;
    }
    return array;
}

static PyObject *tensor_numpy(PyObject *o, PyObject *unused) {
    (void)unused;
    return obm_py_numpy(Py_NewRef(o));
}

/* ---- DLPack (the struct layout of dmlc/dlpack, versions 0 and 1) ---- */

typedef struct {
    int32_t device_type, device_id;
} dl_device;
typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} dl_dtype;
typedef struct {
    void *data;
    dl_device device;
    int32_t ndim;
    dl_dtype dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dl_tensor;
typedef struct dl_managed {
    dl_tensor t;
    void *context;
    void (*deleter)(struct dl_managed *);
} dl_managed;
typedef struct dl_versioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct dl_versioned *);
    uint64_t flags;
    dl_tensor t;
} dl_versioned;
enum { DL_CPU = 1, DL_READ_ONLY = 1, DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 };

static int dl_dtype_of(obm_dtype d, dl_dtype *out) {
    static const struct {
        uint8_t code, bits;
    } table[OBM_DTYPE_COUNT] = {[OBM_F32] = {DL_FLOAT, 32}, [OBM_F16] = {DL_FLOAT, 16}, [OBM_BF16] = {DL_BFLOAT, 16},
                                [OBM_F64] = {DL_FLOAT, 64}, [OBM_U8] = {DL_UINT, 8},    [OBM_I8] = {DL_INT, 8},
                                [OBM_I16] = {DL_INT, 16},   [OBM_I32] = {DL_INT, 32},   [OBM_I64] = {DL_INT, 64},
                                [OBM_BOOL] = {DL_BOOL, 8},  [OBM_U16] = {DL_UINT, 16},  [OBM_U32] = {DL_UINT, 32},
                                [OBM_U64] = {DL_UINT, 64}};
    if (d >= OBM_DTYPE_COUNT || !table[d].bits) return -1;
    *out = (dl_dtype){table[d].code, table[d].bits, 1};
    return 0;
}

/* One block for both forms: the consumer's struct, the shape, and the memory or the reference behind it. */
typedef struct {
    union {
        dl_managed old;
        dl_versioned now;
    } m;
    int64_t shape[OBM_MAX_DIM];
    PyObject *keep;
    void *copy;
} dl_block;

static void dl_release(dl_block *b) {
    PyGILState_STATE gil = PyGILState_Ensure();
    Py_XDECREF(b->keep);
    free(b->copy);
    free(b);
    PyGILState_Release(gil);
}
static void dl_delete_old(dl_managed *m) { dl_release((dl_block *)m); }
static void dl_delete_versioned(dl_versioned *m) { dl_release((dl_block *)m); }

/* A capsule that nobody consumed ("used_..." marks the others) still owns its tensor. */
static void dl_capsule_release(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        dl_managed *m = PyCapsule_GetPointer(capsule, "dltensor");
        m->deleter(m);
    } else if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dl_versioned *m = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        m->deleter(m);
    }
}

static PyObject *tensor_dlpack(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
    if (!obm_py_parse(args, kwargs, "|$OOOO", names, &stream, &version, &device, &copy)) return NULL;
    Tensor *self = (Tensor *)o;
    dl_dtype dtype;
    if (stream != Py_None || dl_dtype_of(self->t.dtype, &dtype) < 0) {
        PyErr_Format(PyExc_BufferError, "DLPack here: CPU tensors without a stream, not %s",
                     obm_dtype_name(self->t.dtype));
        return NULL;
    }
    bool versioned = false;
    if (version != Py_None) {
        PyObject *major = PySequence_GetItem(version, 0);
        long v = major ? PyLong_AsLong(major) : -1;
        Py_XDECREF(major);
        if (v == -1 && PyErr_Occurred()) return NULL;
        versioned = v >= 1;
    }
    dl_block *b = calloc(1, sizeof *b);
    if (!b) return PyErr_NoMemory();
    /* The old form cannot say "read-only": a consumer that writes into a mapped file would crash, so it gets a copy. */
    bool read_only = !self->memory, copies = copy == Py_True || (read_only && !versioned);
    dl_tensor t = {
        .data = (void *)self->t.data, .device = {DL_CPU, 0}, .ndim = self->t.ndim, .dtype = dtype, .shape = b->shape};
    memcpy(b->shape, self->t.shape, sizeof b->shape);
    if (copies) {
        size_t bytes = (size_t)obm_tensor_count(&self->t) * obm_dtype_size(self->t.dtype);
        b->copy = t.data = malloc(bytes + 1);
        if (!b->copy) return free(b), PyErr_NoMemory();
        memcpy(b->copy, self->t.data, bytes);
    } else {
        b->keep = Py_NewRef(o);
    }
    if (versioned)
        b->m.now = (dl_versioned){1, 0, b, dl_delete_versioned, read_only && !copies ? DL_READ_ONLY : 0, t};
    else
        b->m.old = (dl_managed){t, b, dl_delete_old};
    PyObject *capsule = PyCapsule_New(b, versioned ? "dltensor_versioned" : "dltensor", dl_capsule_release);
    if (!capsule) dl_release(b);
    return capsule;
}

static PyObject *tensor_dlpack_device(PyObject *o, PyObject *unused) {
    (void)o, (void)unused;
    return Py_BuildValue("(ii)", DL_CPU, 0);
}

/* ---- import ---- */

typedef struct {
    Py_buffer buffer;
} held_buffer;
static void held_buffer_release(PyObject *capsule) {
    held_buffer *h = PyCapsule_GetPointer(capsule, "onebitmerge.buffer");
    PyBuffer_Release(&h->buffer);
    PyMem_Free(h);
}

static int dtype_from_format(const char *format, Py_ssize_t itemsize, obm_dtype *out) {
    char kind = format && *format ? format[strlen(format) - 1] : 'B';
    if (format && strlen(format) == 2 && !strchr("<=@", format[0])) return -1;
    static const struct {
        char kind;
        Py_ssize_t size;
        obm_dtype d;
    } table[] = {{'f', 4, OBM_F32}, {'e', 2, OBM_F16}, {'d', 8, OBM_F64}, {'B', 1, OBM_U8},  {'b', 1, OBM_I8},
                 {'h', 2, OBM_I16}, {'i', 4, OBM_I32}, {'l', 8, OBM_I64}, {'q', 8, OBM_I64}, {'?', 1, OBM_BOOL}};
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (table[i].kind == kind && table[i].size == itemsize) return *out = table[i].d, 0;
    }
    return -1;
}

static int import_buffer(PyObject *o, obm_tensor *out, PyObject **holder) {
    held_buffer *h = PyMem_Malloc(sizeof *h);
    if (!h) return PyErr_NoMemory(), -1;
    if (PyObject_GetBuffer(o, &h->buffer, PyBUF_STRIDES | PyBUF_FORMAT) < 0) return PyMem_Free(h), -1;
    Py_buffer *b = &h->buffer;
    obm_tensor t = {.data = b->buf, .ndim = b->ndim};
    const char *why = NULL;
    if (b->ndim > OBM_MAX_DIM)
        why = "a tensor has at most 8 dimensions";
    else if (dtype_from_format(b->format, b->itemsize, &t.dtype) < 0)
        why = "this element type is not supported";
    else if (!PyBuffer_IsContiguous(b, 'C'))
        why = "the array is not contiguous; use np.ascontiguousarray";
    for (int i = 0; !why && i < b->ndim; i++) t.shape[i] = b->shape[i];
    *holder = why ? NULL : PyCapsule_New(h, "onebitmerge.buffer", held_buffer_release);
    if (*holder) return *out = t, 0;
    if (why) PyErr_SetString(PyExc_ValueError, why);
    PyBuffer_Release(b);
    PyMem_Free(h);
    return -1;
}

static int dl_read(const dl_tensor *d, obm_tensor *out) {
    obm_tensor t = {.data = (const char *)d->data + d->byte_offset, .ndim = d->ndim};
    if (d->device.device_type != DL_CPU || d->ndim > OBM_MAX_DIM || d->ndim < 0 || d->dtype.lanes != 1) {
        PyErr_SetString(PyExc_ValueError, "DLPack: expected a CPU tensor of at most 8 dimensions");
        return -1;
    }
    int64_t stride = 1;
    for (int i = d->ndim - 1; i >= 0; i--) {
        t.shape[i] = d->shape[i];
        if (d->strides && d->shape[i] > 1 && d->strides[i] != stride) {
            PyErr_SetString(PyExc_ValueError, "DLPack: the tensor is not contiguous; call .contiguous() first");
            return -1;
        }
        stride *= d->shape[i];
    }
    for (int i = 0; i < OBM_DTYPE_COUNT; i++) {
        dl_dtype x;
        if (dl_dtype_of((obm_dtype)i, &x) == 0 && x.code == d->dtype.code && x.bits == d->dtype.bits) {
            t.dtype = (obm_dtype)i;
            return *out = t, 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "DLPack: element type (code %d, %d bits) is not supported", d->dtype.code,
                 d->dtype.bits);
    return -1;
}

static void dl_used_release(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "used_dltensor")) {
        dl_managed *m = PyCapsule_GetPointer(capsule, "used_dltensor");
        if (m->deleter) m->deleter(m);
    } else {
        dl_versioned *m = PyCapsule_GetPointer(capsule, "used_dltensor_versioned");
        if (m && m->deleter) m->deleter(m);
    }
}

static int import_dlpack(PyObject *o, obm_tensor *out, PyObject **holder) {
    PyObject *capsule = PyObject_CallMethod(o, "__dlpack__", NULL);
    if (!capsule) return -1;
    const char *name = PyCapsule_GetName(capsule);
    bool versioned = name && strcmp(name, "dltensor_versioned") == 0;
    void *m = name && (versioned || strcmp(name, "dltensor") == 0) ? PyCapsule_GetPointer(capsule, name) : NULL;
    const dl_tensor *t = !m ? NULL : versioned ? &((dl_versioned *)m)->t : &((dl_managed *)m)->t;
    int rc = t ? dl_read(t, out) : -1;
    if (!t && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "__dlpack__ did not return a DLPack capsule");
    if (rc == 0) {
        /* Consumed: the tensor is now owned by a capsule of our own, released with it. */
        const char *used = versioned ? "used_dltensor_versioned" : "used_dltensor";
        *holder = PyCapsule_New(m, used, dl_used_release);
        if (*holder) PyCapsule_SetName(capsule, used);
        if (*holder) PyCapsule_SetDestructor(capsule, NULL);
        rc = *holder ? 0 : -1;
    }
    Py_DECREF(capsule);
    return rc;
}

int obm_py_tensor_import(obm_py_state *st, PyObject *o, obm_tensor *out, PyObject **holder) {
    if (Py_TYPE(o) == st->tensor) {
        *out = ((Tensor *)o)->t;
        *holder = Py_NewRef(o);
        return 0;
    }
    if (PyObject_CheckBuffer(o)) return import_buffer(o, out, holder);
    if (PyObject_HasAttrString(o, "__dlpack__")) return import_dlpack(o, out, holder);
    PyErr_Format(PyExc_TypeError, "expected an array (buffer protocol or DLPack), found %R", (PyObject *)Py_TYPE(o));
    return -1;
}

/* ---- attributes ---- */

static PyObject *tensor_shape(PyObject *o, void *unused) {
    (void)unused;
    const obm_tensor *t = obm_py_tensor_get(o);
    PyObject *shape = PyTuple_New(t->ndim);
    for (int i = 0; shape && i < t->ndim; i++) {
        if (PyTuple_SetItem(shape, i, PyLong_FromLongLong(t->shape[i])) < 0) Py_CLEAR(shape);
    }
    return shape;
}

static PyObject *tensor_dtype(PyObject *o, void *unused) {
    (void)unused;
    return PyUnicode_FromString(obm_dtype_name(obm_py_tensor_get(o)->dtype));
}

static PyObject *tensor_nbytes(PyObject *o, void *unused) {
    (void)unused;
    const obm_tensor *t = obm_py_tensor_get(o);
    return PyLong_FromLongLong(obm_tensor_count(t) * (int64_t)obm_dtype_size(t->dtype));
}

static Py_ssize_t tensor_length(PyObject *o) {
    const obm_tensor *t = obm_py_tensor_get(o);
    if (t->ndim > 0) return (Py_ssize_t)t->shape[0];
    PyErr_SetString(PyExc_TypeError, "a scalar tensor has no length");
    return -1;
}

static PyObject *tensor_repr(PyObject *o) {
    PyObject *shape = tensor_shape(o, NULL);
    PyObject *repr =
        shape ? PyUnicode_FromFormat("Tensor(%s, shape=%R)", obm_dtype_name(obm_py_tensor_get(o)->dtype), shape) : NULL;
    Py_XDECREF(shape);
    return repr;
}

static PyMethodDef tensor_methods[] = {
    {"numpy", tensor_numpy, METH_NOARGS,
     "numpy() -> ndarray\n\nWithout a copy; bf16, which NumPy lacks, is widened to float32."},
    {"__array__", (PyCFunction)(void (*)(void))tensor_array, METH_VARARGS | METH_KEYWORDS, "For numpy.asarray."},
    {"__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS,
     "For from_dlpack of torch, jax, numpy."},
    {"__dlpack_device__", tensor_dlpack_device, METH_NOARGS, "(1, 0): the CPU."},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef tensor_getset[] = {{"shape", tensor_shape, NULL, "tuple of int", NULL},
                                      {"dtype", tensor_dtype, NULL, "\"F32\", \"BF16\", ...", NULL},
                                      {"nbytes", tensor_nbytes, NULL, "bytes", NULL},
                                      {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot tensor_slots[] = {
    {Py_tp_dealloc, tensor_dealloc},
    {Py_tp_repr, tensor_repr},
    {Py_tp_methods, tensor_methods},
    {Py_tp_getset, tensor_getset},
    {Py_sq_length, tensor_length},
    {Py_bf_getbuffer, tensor_getbuffer},
    {Py_tp_doc, "A tensor of a checkpoint or a result; np.asarray(t), torch.from_dlpack(t)."},
    {0, NULL}};
PyType_Spec obm_py_tensor_spec = {"onebitmerge.Tensor", sizeof(Tensor), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, tensor_slots};
