"""Triton's interpreter without three costs that are most of its time."""

import sys
from dataclasses import replace


def speed_up():
    """Take the costs out where the interpreter has been imported; nothing else about it changes.

    Every launch replaces triton.language by the interpreter's own functions and puts it back, and every call of a device
    function looks for what is still to be replaced: here it is replaced once. Every operation builds a table of NumPy's
    dtypes anew: here one is kept. Every sum and product of integers is computed a second time to see whether it overflows,
    and what was seen is dropped unless the interpreter debugs: here it is not computed.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    names = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "tl", "interpreter_builder")
    if interpreter is None or not all(hasattr(interpreter, name) for name in names):
        return  # not imported, or another version of Triton
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    tl, dtypes = interpreter.tl, {}
    replace_all, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype

    def replace_missing(fn):
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if not modules or any(tl.core.is_builtin(module.load) for module in modules):
            replace_all(fn)
        return interpreter._LangPatchScope()  # with nothing to put back

    def numpy_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        key = "pointer" if isinstance(element, tl.pointer_type) else element.name
        if key not in dtypes:
            dtypes[key] = dtype_of(dtype)
        return dtypes[key]

    interpreter._patch_lang, interpreter._get_np_dtype = replace_missing, numpy_dtype
