/* Tokenizer: ids and back, chat templates. */
#include "obm_py.h"

typedef struct Tokenizer {
    PyObject_HEAD obm_tokenizer *own;
    const obm_tokenizer *t;
    PyObject *context, *owner;
} Tokenizer;

const obm_tokenizer *obm_py_tokenizer_get(PyObject *o) { return ((Tokenizer *)o)->t; }

static PyObject *tokenizer_wrap(obm_py_state *st, const obm_tokenizer *t, obm_tokenizer *own, PyObject *context,
                                PyObject *owner) {
    Tokenizer *self = PyObject_New(Tokenizer, st->tokenizer);
    if (!self) return NULL;
    self->t = t;
    self->own = own;
    self->context = context;
    self->owner = Py_XNewRef(owner);
    return (PyObject *)self;
}

PyObject *obm_py_tokenizer_borrow(obm_py_state *st, const obm_tokenizer *t, PyObject *owner) {
    return tokenizer_wrap(st, t, NULL, NULL, owner);
}

static PyObject *tokenizer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"path", NULL};
    PyObject *path, *context;
    if (!obm_py_parse(args, kwargs, "O&", names, obm_py_path, &path)) return NULL;
    obm_py_state *st = PyType_GetModuleState(type);
    obm_context *ctx = obm_py_context(st, &context);
    if (!ctx) return Py_DECREF(path), NULL;
    obm_tokenizer *t = NULL;
    obm_error err;
    obm_status status;
    const char *p = PyBytes_AsString(path);
    Py_BEGIN_ALLOW_THREADS;
    status = obm_tokenizer_open(ctx, p, &t, &err);
    Py_END_ALLOW_THREADS;
    Py_DECREF(path);
    PyObject *self = status == OBM_OK ? tokenizer_wrap(st, t, t, context, NULL) : obm_py_raise(st, &err);
    if (!self) {
        obm_tokenizer_free(t);
        Py_DECREF(context);
    }
    return self;
}

static void tokenizer_dealloc(PyObject *o) {
    Tokenizer *self = (Tokenizer *)o;
    PyTypeObject *type = Py_TYPE(o);
    obm_tokenizer_free(self->own);
    Py_XDECREF(self->context);
    Py_XDECREF(self->owner);
    PyObject_Free(o);
    Py_DECREF(type);
}

static PyObject *tokenizer_encode(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"text", "special", NULL};
    PyObject *string;
    Py_ssize_t len;
    int special = 1;
    if (!obm_py_parse(args, kwargs, "U|p:encode", names, &string, &special)) return NULL;
    const char *text = PyUnicode_AsUTF8AndSize(string, &len);
    if (!text) return NULL;
    int32_t *ids;
    size_t n;
    obm_error err;
    obm_status status;
    const obm_tokenizer *t = obm_py_tokenizer_get(o);
    Py_BEGIN_ALLOW_THREADS;
    status = obm_tokenizer_encode(t, text, (size_t)len, special, &ids, &n, &err);
    Py_END_ALLOW_THREADS;
    if (status != OBM_OK) return obm_py_raise(OBM_PY_STATE(o), &err);
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (size_t i = 0; list && i < n; i++) {
        if (PyList_SetItem(list, (Py_ssize_t)i, PyLong_FromLong(ids[i])) < 0 ||
            (i % 65536 == 0 && PyErr_CheckSignals() < 0))
            Py_CLEAR(list);
    }
    obm_free(ids);
    return list;
}

static PyObject *tokenizer_decode(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"ids", "skip_special", NULL};
    PyObject *given;
    int skip = 0;
    if (!obm_py_parse(args, kwargs, "O|p", names, &given, &skip)) return NULL;
    size_t n, len;
    int32_t *ids = obm_py_ids(given, &n);
    if (!ids) return NULL;
    char *text;
    obm_error err;
    obm_status status;
    const obm_tokenizer *t = obm_py_tokenizer_get(o);
    Py_BEGIN_ALLOW_THREADS;
    status = obm_tokenizer_decode(t, ids, n, skip, &text, &len, &err);
    Py_END_ALLOW_THREADS;
    PyMem_Free(ids);
    if (status != OBM_OK) return obm_py_raise(OBM_PY_STATE(o), &err);
    PyObject *s = PyUnicode_DecodeUTF8(text, (Py_ssize_t)len, "replace");
    obm_free(text);
    return s;
}

/* The built-in template; the package's apply_template tries the model's own Jinja first. */
static PyObject *tokenizer_builtin_template(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"messages", "add_generation", "name", NULL};
    PyObject *given;
    const char *name = NULL;
    int add = 1;
    if (!obm_py_parse(args, kwargs, "O|pz", names, &given, &add, &name)) return NULL;
    obm_py_prompts prompts;
    if (obm_py_prompts_from(given, &prompts) < 0) return NULL;
    PyObject *s = NULL;
    char *text;
    obm_error err;
    if (!prompts.single || !prompts.items[0].messages) {
        PyErr_SetString(PyExc_TypeError, "expected a list of messages ({\"role\": ..., \"content\": ...})");
    } else if (obm_tokenizer_builtin_template(obm_py_tokenizer_get(o), name, prompts.items[0].messages,
                                              prompts.items[0].n_messages, add, &text, &err) != OBM_OK) {
        obm_py_raise(OBM_PY_STATE(o), &err);
    } else {
        s = PyUnicode_FromString(text);
        obm_free(text);
    }
    obm_py_prompts_clear(&prompts);
    return s;
}

static PyObject *tokenizer_apply_template(PyObject *o, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"messages", "add_generation", NULL};
    PyObject *messages;
    int add = 1;
    if (!obm_py_parse(args, kwargs, "O|p", names, &messages, &add)) return NULL;
    PyObject *text = obm_py_call_hook(OBM_PY_STATE(o), "render_template",
                                      Py_BuildValue("(OOO)", o, messages, add ? Py_True : Py_False));
    if (text != Py_None) return text;
    Py_DECREF(text);
    return PyObject_CallMethod(o, "builtin_template", "Oi", messages, add);
}

static PyObject *tokenizer_piece(PyObject *o, PyObject *arg) {
    long id = PyLong_AsLong(arg);
    if (id == -1 && PyErr_Occurred()) return NULL;
    const char *piece = id < 0 || id > INT32_MAX ? NULL : obm_tokenizer_piece(obm_py_tokenizer_get(o), (int32_t)id);
    if (!piece) Py_RETURN_NONE;
    return PyUnicode_FromString(piece);
}

static PyObject *tokenizer_id(PyObject *o, PyObject *arg) {
    const char *piece = PyUnicode_AsUTF8AndSize(arg, NULL);
    if (!piece) return NULL;
    int32_t id = obm_tokenizer_id(obm_py_tokenizer_get(o), piece);
    if (id < 0) Py_RETURN_NONE;
    return PyLong_FromLong(id);
}

static PyObject *text_or_none(const char *s) {
    if (!s) Py_RETURN_NONE;
    return PyUnicode_FromString(s);
}

static PyObject *tokenizer_template(PyObject *o, void *unused) {
    (void)unused;
    return text_or_none(obm_tokenizer_template(obm_py_tokenizer_get(o)));
}

static PyObject *tokenizer_template_name(PyObject *o, void *unused) {
    (void)unused;
    return text_or_none(obm_tokenizer_template_name(obm_py_tokenizer_get(o)));
}

static PyObject *tokenizer_bos(PyObject *o, void *unused) {
    (void)unused;
    return text_or_none(obm_tokenizer_bos(obm_py_tokenizer_get(o)));
}

static PyObject *tokenizer_eos(PyObject *o, void *unused) {
    (void)unused;
    return text_or_none(obm_tokenizer_eos(obm_py_tokenizer_get(o)));
}

static Py_ssize_t tokenizer_length(PyObject *o) { return (Py_ssize_t)obm_tokenizer_size(obm_py_tokenizer_get(o)); }

static PyObject *tokenizer_repr(PyObject *o) { return PyUnicode_FromFormat("Tokenizer(%zd ids)", tokenizer_length(o)); }

#define KW(f) (PyCFunction)(void (*)(void)) f, METH_VARARGS | METH_KEYWORDS
static PyMethodDef tokenizer_methods[] = {
    {"encode", KW(tokenizer_encode),
     "encode(text, special=True) -> list of int\n\nspecial: add the post-processor's tokens."},
    {"decode", KW(tokenizer_decode), "decode(ids, skip_special=False) -> str"},
    {"apply_template", KW(tokenizer_apply_template),
     "apply_template(messages, add_generation=True) -> str\n\nThe model's own template where jinja2 is installed, else "
     "the built-in one."},
    {"builtin_template", KW(tokenizer_builtin_template),
     "builtin_template(messages, add_generation=True, name=None) -> str\n\nname: llama2, mistral, llama3, llama3.1, "
     "chatml, qwen3, gemma, gemma3, phi3, phi4, phi4mini, granite, olmo2; None: the one that the model's own is."},
    {"piece", tokenizer_piece, METH_O, "piece(id) -> str or None\n\nAs in tokenizer.json."},
    {"id", tokenizer_id, METH_O, "id(piece) -> int or None"},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef tokenizer_getset[] = {
    {"template", tokenizer_template, NULL, "the model's own Jinja chat template, or None", NULL},
    {"template_name", tokenizer_template_name, NULL, "the built-in template that the model's own is, or None", NULL},
    {"bos", tokenizer_bos, NULL, "tokenizer_config.json's bos_token, or None", NULL},
    {"eos", tokenizer_eos, NULL, "tokenizer_config.json's eos_token, or None", NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot tokenizer_slots[] = {
    {Py_tp_new, tokenizer_new},
    {Py_tp_dealloc, tokenizer_dealloc},
    {Py_tp_repr, tokenizer_repr},
    {Py_tp_methods, tokenizer_methods},
    {Py_tp_getset, tokenizer_getset},
    {Py_mp_length, tokenizer_length},
    {Py_tp_doc, "Tokenizer(path)\n\ntokenizer.json of a folder, or the file itself."},
    {0, NULL}};
PyType_Spec obm_py_tokenizer_spec = {"onebitmerge.Tokenizer", sizeof(Tokenizer), 0, Py_TPFLAGS_DEFAULT,
                                     tokenizer_slots};
