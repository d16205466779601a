/* The module _core: types, exceptions, module functions. */
#include "obm_py.h"

static const struct {
    obm_status code;
    const char *name;
    const char *builtin;
    const char *doc;
} exceptions[] = {
    {OBM_E_ARG, "ArgumentError", "ValueError", "Wrong use: an argument out of range, an unknown name."},
    {OBM_E_SHAPE, "ShapeError", "ValueError", "Shapes do not fit."},
    {OBM_E_DTYPE, "DtypeError", "TypeError", "A dtype that is not usable here."},
    {OBM_E_FORMAT, "FormatError", "ValueError", "A file is not what it should be."},
    {OBM_E_NOTFOUND, "NotFoundError", "LookupError", "No tensor, expert or task of that name."},
    {OBM_E_UNSUPPORTED, "UnsupportedError", "NotImplementedError", "Understood, but this version cannot do it."},
    {OBM_E_BUSY, "BusyError", "RuntimeError",
     "An object that serves one call at a time is in use, or another process changes the pack."},
    {OBM_E_MISMATCH, "MismatchError", "ValueError", "A pack meets another base than its own."},
    {OBM_E_VALUE, "NonFiniteError", "ValueError", "NaN or Inf where a number is needed."},
};

static int add_exceptions(PyObject *module, obm_py_state *st) {
    st->error = PyErr_NewExceptionWithDoc(
        "onebitmerge.Error", "What the core reports; OSError and MemoryError are raised as such.", NULL, NULL);
    if (!st->error || PyModule_AddObjectRef(module, "Error", st->error) < 0) return -1;
    PyObject *builtins = PyImport_ImportModule("builtins");
    for (size_t i = 0; builtins && i < sizeof exceptions / sizeof *exceptions; i++) {
        PyObject *second = PyObject_GetAttrString(builtins, exceptions[i].builtin);
        PyObject *bases = second ? Py_BuildValue("(ON)", st->error, second) : NULL;
        char name[64];
        PyOS_snprintf(name, sizeof name, "onebitmerge.%s", exceptions[i].name);
        PyObject *e = bases ? PyErr_NewExceptionWithDoc(name, exceptions[i].doc, bases, NULL) : NULL;
        Py_XDECREF(bases);
        st->errors[-exceptions[i].code] = e;
        if (!e || PyModule_AddObjectRef(module, exceptions[i].name, e) < 0) Py_CLEAR(builtins);
    }
    if (!builtins) return -1;
    Py_DECREF(builtins);
    return 0;
}

static int add_types(PyObject *module, obm_py_state *st) {
    struct {
        PyType_Spec *spec;
        PyTypeObject **slot;
    } types[] = {{&obm_py_tensor_spec, &st->tensor},           {&obm_py_checkpoint_spec, &st->checkpoint},
                 {&obm_py_task_vector_spec, &st->task_vector}, {&obm_py_pack_spec, &st->pack},
                 {&obm_py_tokenizer_spec, &st->tokenizer},     {&obm_py_model_spec, &st->model},
                 {&obm_py_stream_spec, &st->stream},           {&obm_py_request_spec, &st->request}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        *types[i].slot = (PyTypeObject *)PyType_FromModuleAndSpec(module, types[i].spec, NULL);
        if (!*types[i].slot || PyModule_AddType(module, *types[i].slot) < 0) return -1;
    }
    return 0;
}

static PyObject *module_register(PyObject *module, PyObject *args) {
    obm_py_state *st = PyModule_GetState(module);
    const char *name;
    PyObject *hook;
    if (!PyArg_ParseTuple(args, "sO", &name, &hook) || PyDict_SetItemString(st->hooks, name, hook) < 0) return NULL;
    Py_RETURN_NONE;
}

/* _unknown_keyword(name, known): for functions of the package that Python calls itself */
static PyObject *module_unknown_keyword(PyObject *module, PyObject *args) {
    char *known[33] = {NULL};
    const char *name;
    PyObject *names;
    (void)module;
    if (!PyArg_ParseTuple(args, "sO!", &name, &PyTuple_Type, &names)) return NULL;
    Py_ssize_t n = PyTuple_Size(names);
    for (Py_ssize_t i = 0; i < n && i < 32; i++) {
        known[i] = (char *)PyUnicode_AsUTF8AndSize(PyTuple_GetItem(names, i), NULL);
        if (!known[i]) return NULL;
    }
    return obm_py_unknown_keyword(name, known);
}

static PyObject *module_set_threads(PyObject *module, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"n", "numa", NULL};
    obm_py_state *st = PyModule_GetState(module);
    long long n;
    const char *mode = "auto";
    obm_numa numa;
    if (!obm_py_parse(args, kwargs, "L|s", names, &n, &mode) || obm_py_numa(st, mode, &numa))
        return NULL;
    return obm_py_set_threads(st, n, numa);
}

static PyObject *module_info(PyObject *module, PyObject *unused) {
    (void)unused;
    obm_context *ctx = obm_py_context(PyModule_GetState(module), NULL);
    if (!ctx) return NULL;
    obm_context_info i;
    obm_context_describe(ctx, &i);
    return Py_BuildValue("{ss,ss,ss,ss,ss,ss,si,si,si,sK,sK,sO,sO}", "version", obm_version(), "isa", i.isa, "isa_available",
                         i.isa_available, "blas", i.blas, "topology", i.topology, "compiler", i.compiler, "threads",
                         i.threads, "cores", i.cores, "nodes", i.nodes, "memory_total",
                         (unsigned long long)i.memory_total, "memory_free", (unsigned long long)i.memory_free,
                         "prefill_bf16", i.prefill_bf16 ? Py_True : Py_False, "z12_auto",
                         i.z12_auto ? Py_True : Py_False);
}

static PyObject *module_class_of(PyObject *module, PyObject *args) {
    (void)module;
    const char *name;
    int ndim = 2;
    if (!PyArg_ParseTuple(args, "s|i", &name, &ndim)) return NULL;
    return PyUnicode_FromString(obm_class_name(obm_class_of(name, ndim)));
}

#define KW(f) (PyCFunction)(void (*)(void)) f, METH_VARARGS | METH_KEYWORDS
static PyMethodDef module_methods[] = {
    {"compress", KW(obm_py_compress),
     "compress(base, experts, out, profile=None, overwrite=False, dry_run=False, progress=None) -> Pack"},
    {"merge", KW(obm_py_merge), "merge(recipe_text, out, ...) -> dict"},
    {"merge_tensors", KW(obm_py_merge_tensors),
     "merge_tensors(method, models, base=None, params={}, profile=None, seed=0) -> ndarray\n\n"
     "Merge tensors of one shape; float32.  method: a name or a callable (tile), see register_method.\n"
     "params: a number is global, a sequence one value per model."},
    {"register_method", obm_py_register_method, METH_VARARGS, "register_method(name, function, ...)"},
    {"methods", obm_py_list_methods, METH_NOARGS,
     "methods() -> list of dict\n\nEvery merge method, the built-in ones, then those that are registered: name, doc, "
     "source, needs_base, min_models,\nmax_models, params."},
    {"extract_lora", KW(obm_py_extract_lora),
     "extract_lora(base, expert, out, rank=None, energy=None, dtype=None, base_name=None, overwrite=False, "
     "dry_run=False, progress=None) -> list of dict\n\n"
     "A fine-tune's linear weights as a PEFT LoRA folder, cut by rank or by energy; the plan with dry_run.\n"
     "One dict for every tensor that differs: name, rows, cols, rank (0: it is not in the adapter), norm (of the task "
     "vector),\nenergy (the share of norm^2 that is kept).\n\n"
     "Errors: ArgumentError (not exactly one of rank and energy, or out of range), FileExistsError (an adapter in the "
     "folder,\nwithout overwrite), NonFiniteError (NaN or Inf, nothing to extract)."},
    {"plan", KW(obm_py_plan_model),
     "plan(model, topology=None, numa=\"auto\", threads=0, base=None, z12=\"auto\", kv=\"f32\") -> dict\n\nWhere a "
     "model's "
     "rows, "
     "planes and KV heads would lie on a machine with NUMA nodes, and what workers read from other nodes for a token.\n"
     "numa: auto, shard, replicate, isolate, interleave, off; kv: f32, f16."},
    {"info", module_info, METH_NOARGS, "info() -> dict\n\nVersion, ISA, BLAS, topology, threads, memory."},
    {"set_threads", KW(module_set_threads),
     "set_threads(n, numa=\"auto\")\n\nThreads of objects opened from now on (0: one per core), and where they and a "
     "model's memory go on a machine with\nseveral NUMA nodes: auto, shard, replicate, isolate, interleave, off."},
    {"class_of", module_class_of, METH_VARARGS, "class_of(tensor_name, ndim=2) -> str\n\nThe module class."},
    {"_register", module_register, METH_VARARGS, NULL},
    {"_unknown_keyword", module_unknown_keyword, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static int module_exec(PyObject *module) {
    obm_py_state *st = PyModule_GetState(module);
    if (obm_abi_version() != OBM_ABI_VERSION) {
        PyErr_Format(PyExc_ImportError, "onebitmerge: the library has ABI %d, this module was built for %d",
                     obm_abi_version(), OBM_ABI_VERSION);
        return -1;
    }
    st->hooks = PyDict_New();
    st->methods = PyDict_New();
    if (!st->hooks || !st->methods || add_exceptions(module, st) < 0 || add_types(module, st) < 0) return -1;
    return PyModule_AddStringConstant(module, "__version__", obm_version());
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    obm_py_state *st = PyModule_GetState(module);
    Py_VISIT(st->hooks);
    Py_VISIT(st->methods);
    Py_VISIT(st->error);
    return 0;
}

static int module_clear(PyObject *module) {
    obm_py_state *st = PyModule_GetState(module);
    Py_CLEAR(st->hooks);
    Py_CLEAR(st->methods);
    Py_CLEAR(st->context);
    Py_CLEAR(st->error);
    for (size_t i = 0; i < sizeof st->errors / sizeof *st->errors; i++) Py_CLEAR(st->errors[i]);
    PyTypeObject **types[] = {&st->tensor,    &st->checkpoint, &st->task_vector, &st->pack,
                              &st->tokenizer, &st->model,      &st->stream,      &st->request};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) Py_CLEAR(*types[i]);
    return 0;
}

static void module_free(void *module) { module_clear(module); }

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};
static PyModuleDef module_def = {PyModuleDef_HEAD_INIT, "onebitmerge._core", NULL,
                                 sizeof(obm_py_state),  module_methods,      module_slots,
                                 module_traverse,       module_clear,        module_free};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&module_def); }
