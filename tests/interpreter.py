"""Triton's kernels without a GPU: its interpreter, which runs them on CPU tensors.

Imported ahead of the kernels. Triton 3.9's interpreter multiplies the bits of bfloat16 as integers, and
looks through all of the language at each call of a function: here it does neither.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the kernels run."""
INTERPRETED = TRITON and DEVICE == "cpu"

if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"

    import triton.language as tl
    from triton.runtime import interpreter

    _create_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return _create_dot(self, *wide, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    _patch_lang, _patched = interpreter._patch_lang, {}

    def patch_lang(function: Any) -> Any:
        module = function.__module__
        if module not in _patched:
            _patch_lang(function)
            _patched[module] = interpreter._LangPatchScope()  # of nothing: what is set up stays so
        return _patched[module]

    interpreter._patch_lang = patch_lang
