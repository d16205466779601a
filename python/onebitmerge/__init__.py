"""onebitmerge: 1-bit task vectors, routed merging and CPU inference of fine-tuned LLMs.

    pack = compress("base", {"chat": "chat-model", "math": "math-model"}, out="my.pack")
    pack.train_router(texts, labels)
    Model("my.pack").generate("Tom has 3 apples ...")

Errors: Error and its subclasses, OSError, MemoryError.  Every long call releases the GIL, takes progress=True (a tqdm bar),
a callable (what, done, total) or None, and stops at Ctrl-C.
"""

__all__ = ["ArgumentError", "BusyError", "Checkpoint", "Completion", "DtypeError", "Error", "Expert", "FormatError", "MismatchError",
           "Model", "NonFiniteError", "NotFoundError", "Pack", "RouterReport", "Score", "ShapeError", "TaskVector", "Tensor", "Tile",
           "Tokenizer", "Tuning", "UnsupportedError", "class_of", "compress", "extract_lora", "info", "merge", "merge_tensors", "methods",
           "plan", "register_method", "set_threads", "tune", "__version__"]


def __getattr__(name):
    """The C core and what it links load at the first use, so that the command line is in charge (of Ctrl-C, of OpenBLAS's
    environment) before they do."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from onebitmerge import _api
    globals()[name] = getattr(_api, name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *__all__})
