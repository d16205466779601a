/* What the files of the CPython extension share.  Thin: parse, call the core without the GIL, convert the answer. */
#ifndef OBM_PY_H
#define OBM_PY_H

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <onebitmerge.h>

/* Module state.  Types are final (no BASETYPE), so PyType_GetModuleState(Py_TYPE(self)) finds it from any object. */
typedef struct obm_py_state {
    PyObject *error;      /* onebitmerge.Error */
    PyObject *errors[16]; /* -status -> exception class, NULL: the base class or a built-in */
    PyObject *context;    /* capsule of the default context, made at first use */
    PyObject *hooks;      /* dict: what the Python side of the package registers (result classes, reprs) */
    PyObject *methods;    /* dict: merge methods by name */
    PyTypeObject *tensor, *checkpoint, *task_vector, *pack, *tokenizer, *model, *stream, *request;
} obm_py_state;
#define OBM_PY_STATE(self) ((obm_py_state *)PyType_GetModuleState(Py_TYPE(self)))

/* ---- convert.c ---- */
PyObject *obm_py_raise(obm_py_state *st, const obm_error *err); /* returns NULL with the exception set */
obm_context *obm_py_context(obm_py_state *st, PyObject **capsule /* new reference */);
PyObject *obm_py_set_threads(obm_py_state *st, int64_t threads, obm_numa numa); /* a new default context */
PyObject *obm_py_hook(obm_py_state *st, const char *name);                      /* borrowed; NULL with an exception */
PyObject *obm_py_call_hook(obm_py_state *st, const char *name,
                           PyObject *args /* stolen tuple, may be NULL with exception */);
PyObject *obm_py_json(const char *text);               /* json.loads; None for NULL */
PyObject *obm_py_numpy(PyObject *tensor /* stolen */); /* numpy.asarray(tensor), without a copy */
bool obm_py_set(PyObject *dict, const char *key, PyObject *value /* stolen */);

/* One long call: the GIL is released between begin and end; callbacks come back on the same thread and take it for
 * their own time.  An exception from a callback (or Ctrl-C) waits in here and is re-raised unchanged by obm_py_end. */
typedef struct obm_py_prompts obm_py_prompts;
typedef struct obm_py_call {
    obm_py_state *state;
    PyThreadState *saved;
    PyObject *progress;   /* borrowed: callable or NULL */
    PyObject *router;     /* borrowed: callable or NULL */
    const obm_pack *pack; /* names of the router's answers */
    PyObject *model;      /* borrowed: lends its tokenizers to templates */
    const obm_py_prompts *prompts;
    size_t n_prompts;   /* where the messages of a template come from */
    PyObject *rendered; /* the text that the core is copying */
    PyObject *raised[3];
    double last; /* seconds, when signals were looked at last */
} obm_py_call;
int obm_py_call_init(obm_py_call *c, obm_py_state *st, PyObject *progress); /* -1 with an exception */
void obm_py_begin(obm_py_call *c);
int obm_py_end(obm_py_call *c, obm_status status, const obm_error *err); /* 0, or -1 with the exception set */
int obm_py_stash(obm_py_call *c); /* keeps the exception that is set for obm_py_end; 1 */
int obm_py_progress(void *call, const char *what, uint64_t done, uint64_t total);
obm_status obm_py_router(void *call, obm_request *request, double *weights, obm_error *err);
/* The tokenizer's own Jinja template, where jinja2 is installed; else it is left to the built-in ones. */
obm_status obm_py_render(void *call, const obm_tokenizer *t, const obm_message *messages, size_t n, const char **text,
                         obm_error *err);

/* Arguments. */
/* PyArg_ParseTupleAndKeywords, whose error about an unknown keyword has the known ones and the one that may be meant.
 */
int obm_py_parse(PyObject *args, PyObject *kwargs, const char *format, char **names, ...);
PyObject *obm_py_unknown_keyword(const char *name, char *const *known); /* sets it; NULL */
int obm_py_path(PyObject *o, PyObject **bytes); /* converter "O&": str or os.PathLike -> bytes */
int obm_py_profile(obm_py_state *st, const char *name, obm_profile *out);
int obm_py_dtype(obm_py_state *st, const char *name, obm_dtype other, obm_dtype *out); /* f32 or other, f16 or bf16 */
int32_t *obm_py_ids(PyObject *o, size_t *n); /* owned (PyMem); NULL with an exception */
/* weights[task count] from a name, an index, a dict or a sequence; 0, or -1 with an exception. */
int obm_py_weights(obm_py_state *st, const obm_pack *pack, PyObject *o, double *weights);
PyObject *obm_py_route_dict(const obm_pack *pack, const double *weights); /* {task: weight}, zeros left out */

/* A list of prompts with everything they point to. */
struct obm_py_prompts {
    obm_prompt *items;
    PyObject **messages; /* of the items with messages what was given, borrowed; else NULL */
    size_t n;
    PyObject *keep; /* list of objects that own the text */
    void **blocks;
    size_t n_blocks; /* PyMem blocks */
    bool single;     /* one prompt was given, not a list of them */
};
int obm_py_prompts_from(PyObject *o, obm_py_prompts *out);
void obm_py_prompts_clear(obm_py_prompts *p);

/* ---- tensor.c ---- */
extern PyType_Spec obm_py_tensor_spec;
/* A view of memory that `owner` keeps alive. */
PyObject *obm_py_tensor_view(obm_py_state *st, const obm_tensor *t, PyObject *owner);
/* A new f32 tensor with its own memory; *data to be filled. */
PyObject *obm_py_tensor_new(obm_py_state *st, int32_t ndim, const int64_t *shape, float **data);
const obm_tensor *obm_py_tensor_get(PyObject *tensor);
/* A tensor out of anything with the buffer protocol or DLPack; *holder (new reference) keeps it alive. */
int obm_py_tensor_import(obm_py_state *st, PyObject *o, obm_tensor *out, PyObject **holder);

/* ---- one file per type ---- */
extern PyType_Spec obm_py_checkpoint_spec, obm_py_task_vector_spec, obm_py_pack_spec, obm_py_tokenizer_spec,
    obm_py_model_spec, obm_py_stream_spec, obm_py_request_spec;
const obm_checkpoint *obm_py_checkpoint_get(PyObject *o);
PyObject *obm_py_tokenizer_borrow(obm_py_state *st, const obm_tokenizer *t, PyObject *owner);
const obm_tokenizer *obm_py_tokenizer_get(PyObject *o);
const obm_pack *obm_py_pack_get(PyObject *o);
PyObject *obm_py_pack_borrow(obm_py_state *st, const obm_pack *p, PyObject *owner);
PyObject *obm_py_request_new(obm_py_state *st, obm_request *r, const obm_pack *pack);
void obm_py_request_end(PyObject *o); /* the callback is over: the object answers nothing any more */
PyObject *obm_py_router_report(obm_py_state *st, const obm_router_report *r, const obm_pack *pack);
PyObject *obm_py_compress(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *obm_py_merge(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *obm_py_merge_tensors(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *obm_py_plan_model(PyObject *module, PyObject *args, PyObject *kwargs);
int obm_py_z12(obm_py_state *st, PyObject *value, obm_z12 *out); /* True, False or a name; 0, or -1 with an exception */
int obm_py_numa(obm_py_state *st, const char *name, obm_numa *out); /* 0, or -1 with an exception */
PyObject *obm_py_extract_lora(PyObject *module, PyObject *args, PyObject *kwargs);
PyObject *obm_py_plan(const obm_plan *p); /* as a dict */
PyObject *obm_py_list_methods(PyObject *module, PyObject *args);

/* ---- method.c: merge methods in Python ---- */
typedef struct obm_py_method {
    obm_custom_method spec; /* its `user` is this struct */
    obm_param_info *params; /* owned (PyMem) */
    PyObject *entry;        /* owns the strings and the function */
    PyObject *function;     /* borrowed */
    PyObject *buffer;       /* Tensor: memory of the tile */
    float *data;            /* of the buffer */
    obm_py_call *call;
} obm_py_method;
typedef struct obm_py_methods {
    obm_py_method *items; /* those that are registered, then a callable by itself */
    const obm_custom_method **specs;
    size_t n;
    const char *method; /* the name that was asked for; NULL without */
} obm_py_methods;
/* method: None, a name or a callable.  Clear it whatever it returns (-1 with an exception). */
int obm_py_methods_init(obm_py_methods *list, obm_py_state *st, PyObject *method);
void obm_py_methods_begin(obm_py_methods *list, obm_py_call *call);
const obm_custom_method *obm_py_methods_find(const obm_py_methods *list); /* NULL: no method of ours has the name */
void obm_py_methods_clear(obm_py_methods *list);
PyObject *obm_py_register_method(PyObject *module, PyObject *entry);

#endif
