"""The `native` backend: C++ kernels, one pass over the rows, as custom operators.

The kernels (csrc/) know nothing of Python or PyTorch: they are built with the package by any C++
compiler, once for each instruction set, and the best that the processor has is taken at run time.
Float32, and bfloat16 inputs with float32 sums; on CPU. What they do not serve is the `torch`
backend's. Sums are of blocks of rows, in an order that does not depend on the number of threads:
results are the same to the bit at every run, and a million events' sum is off by less than 1e-6 of
the largest. Where the processor multiplies bfloat16, phi and the key's weight are rounded to it in
encode's forward of bfloat16 tokens: states are off by up to 1 %.

Operators (shapes static given the inputs', as the `torch` backend's):

    ifa::native_encode  history, offsets, Wk, Wv, ... -> S [B, H, d_phi, d], z [B, H, d_phi]
    ifa::native_attend  candidates, offsets, Wq, S, z -> out [M, H, d], matched [M, H]
    ifa::native_match   candidates' and events' buckets, ... -> token_sum [M, L, D],
                        weight_sum [M, L]; candidate_first [M], event_candidate [N]: the join
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ifa_torchrec.ops import torch_backend
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS

_MAPS = {"elu": 0, "relu": 1, "hedgehog": 2}
_DTYPES = (torch.float32, torch.bfloat16)
_TYPES = {"p": c_void_p, "n": c_int64, "i": c_int, "f": c_float}
_SIGNATURES = {
    "encode": "pipn ppppp iiii pp i",
    "encode_backward": "pp pipn ppppp iiii pppp i",
    "attend": "pipn ppp iiiif pp i",
    "attend_backward": "pp pipn ppp iiiif pppp i",
    "match": "pppippn ppp ii pppp i",
    "match_backward": "ppnnpp pi ppp ii pp i",
}
"""The arguments of csrc/'s kernels: pointers, int64, int, float."""


def _load() -> tuple[ctypes.CDLL | None, str]:
    spec = importlib.util.find_spec("ifa_torchrec.ops.native._kernels")
    if spec is None or spec.origin is None:
        return None, "not built: no C++ compiler with OpenMP was found when the package was installed"
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"not loaded: {error}"
    library.ifa_instruction_set.restype = ctypes.c_char_p
    return library, library.ifa_instruction_set().decode()


LIBRARY, STATUS = _load()
"""The kernels, None where there are none; and their instruction set, or why there are none."""


def serves(tokens: Tensor) -> bool:
    """Are the kernels there, and for tokens of this device and dtype?"""
    return tokens.device.type == "cpu" and tokens.dtype in _DTYPES and LIBRARY is not None


@cache
def _kernel(name: str) -> Any:
    kernel = getattr(LIBRARY, f"ifa_{name}_{STATUS}")
    kernel.argtypes = [_TYPES[kind] for kind in _SIGNATURES[name].replace(" ", "")]
    kernel.restype = None
    return kernel


def _call(name: str, *arguments: Any) -> None:
    """Tensors become pointers; the number of threads is added."""
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    _kernel(name)(*given, torch.get_num_threads())


def _floats(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous float32."""
    return [None if x is None else x.to(torch.float32).contiguous() for x in tensors]


def _rows(tokens: Tensor, offsets: Tensor) -> tuple[Tensor, int, Tensor, int]:
    """The kernels' arguments of jagged rows: tokens, whether they are bfloat16, offsets, B."""
    offsets = offsets.to(torch.int64).contiguous()
    ends = offsets[0].item(), offsets[-1].item()
    if ends != (0, len(tokens)) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to {len(tokens)}, the number of rows, got {offsets}")
    return tokens.contiguous(), int(tokens.dtype == torch.bfloat16), offsets, len(offsets) - 1


# ------------------------------------------------------------------------------------- encode


@torch.library.custom_op("ifa::native_encode", mutates_args=())
def encode_op(
    history: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    rows = _rows(history, offsets)
    heads, width, dim = key_weight.shape
    features = width * FEATURE_MAPS[feature_map].expansion
    key_value = torch.empty(rows[-1], heads, features, width)
    key_sum = torch.empty(rows[-1], heads, features)
    given = _floats(key_weight, value_weight, weights, ages, decay)
    _call("encode", *rows, *given, dim, heads, width, _MAPS[feature_map], key_value, key_sum)
    return key_value, key_sum


@encode_op.register_fake
def _(
    history: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    heads, width, _ = key_weight.shape
    shape = (offsets.shape[0] - 1, heads, width * FEATURE_MAPS[feature_map].expansion)
    float32 = torch.float32
    return history.new_empty(*shape, width, dtype=float32), history.new_empty(shape, dtype=float32)


@torch.library.custom_op("ifa::native_encode_backward", mutates_args=())
def encode_backward_op(
    grad_key_value: Tensor,
    grad_key_sum: Tensor,
    history: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
    feature_map: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, width, dim = key_weight.shape
    given = _floats(key_weight, value_weight, weights, ages, decay)
    grad_history = torch.empty_like(history, memory_format=torch.contiguous_format)
    grad_key, grad_value = torch.empty(heads, width, dim), torch.empty(heads, width, dim)
    grad_weights = torch.empty(0 if weights is None else len(weights))
    _call(
        "encode_backward",
        *_floats(grad_key_value, grad_key_sum),
        *_rows(history, offsets),
        *given,
        *(dim, heads, width, _MAPS[feature_map]),
        *(grad_history, grad_key, grad_value, None if weights is None else grad_weights),
    )
    return (
        grad_history,
        grad_key.to(key_weight.dtype),
        grad_value.to(value_weight.dtype),
        grad_weights if weights is None else grad_weights.to(weights.dtype),
    )


@encode_backward_op.register_fake
def _(
    grad_key_value: Tensor,
    grad_key_sum: Tensor,
    history: Tensor,
    offsets: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    weights: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    grad_weights = history.new_empty(0, dtype=torch.float32) if weights is None else weights
    return tuple(torch.empty_like(x) for x in (history, key_weight, value_weight, grad_weights))


def _encode_autograd(
    ctx: Any, grad_key_value: Tensor, grad_key_sum: Tensor
) -> tuple[Tensor | None, ...]:
    grad_history, grad_key, grad_value, grad_weights = torch.ops.ifa.native_encode_backward(
        grad_key_value, grad_key_sum, *ctx.saved_tensors, ctx.feature_map
    )
    if ctx.saved_tensors[4] is None:
        grad_weights = None
    return grad_history, None, grad_key, grad_value, grad_weights, None, None, None


encode_op.register_autograd(_encode_autograd, setup_context=torch_backend.encode_setup)


encode = torch.ops.ifa.native_encode
"""See ``ifa_torchrec.ops.encode``."""


# ------------------------------------------------------------------------------------- attend


@torch.library.custom_op("ifa::native_attend", mutates_args=())
def attend_op(
    candidates: Tensor,
    offsets: Tensor,
    query_weight: Tensor,
    key_value: Tensor,
    key_sum: Tensor,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    heads, width, dim = query_weight.shape
    out = torch.empty(len(candidates), heads, width)
    matched = torch.empty(len(candidates), heads)
    given = _floats(query_weight, key_value, key_sum)
    sizes = (dim, heads, width, _MAPS[feature_map], eps)
    _call("attend", *_rows(candidates, offsets), *given, *sizes, out, matched)
    return out, matched


@torch.library.custom_op("ifa::native_attend_backward", mutates_args=())
def attend_backward_op(
    grad_out: Tensor,
    grad_matched: Tensor,
    candidates: Tensor,
    offsets: Tensor,
    query_weight: Tensor,
    key_value: Tensor,
    key_sum: Tensor,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads, width, dim = query_weight.shape
    given = _floats(query_weight, key_value, key_sum)
    grad_candidates = torch.empty_like(candidates, memory_format=torch.contiguous_format)
    grad_query = torch.empty(heads, width, dim)
    grad_key_value = torch.empty_like(key_value, memory_format=torch.contiguous_format)
    grad_key_sum = torch.empty_like(key_sum, memory_format=torch.contiguous_format)
    _call(
        "attend_backward",
        *_floats(grad_out, grad_matched),
        *_rows(candidates, offsets),
        *given,
        *(dim, heads, width, _MAPS[feature_map], eps),
        *(grad_candidates, grad_query, grad_key_value, grad_key_sum),
    )
    return grad_candidates, grad_query.to(query_weight.dtype), grad_key_value, grad_key_sum


attend_op.register_fake(torch_backend.attend_fake)
attend_backward_op.register_fake(torch_backend.attend_backward_fake)
attend_op.register_autograd(
    partial(torch_backend.attend_autograd, torch.ops.ifa.native_attend_backward),
    setup_context=torch_backend.attend_setup,
)
attend = torch.ops.ifa.native_attend
"""See ``ifa_torchrec.ops.attend``."""


# -------------------------------------------------------------------------------------- match


@torch.library.custom_op("ifa::native_match", mutates_args=())
def match_op(
    candidate_buckets: Tensor,
    candidate_offsets: Tensor,
    history: Tensor,
    history_buckets: Tensor,
    history_offsets: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rates, dim, candidates = len(decay), history.shape[1], len(candidate_buckets)
    token_sum, weight_sum = torch.empty(candidates, rates, dim), torch.empty(candidates, rates)
    candidate_first = torch.empty(candidates, dtype=torch.int64)
    event_candidate = torch.empty(len(history), dtype=torch.int64)
    buckets, _, offsets, requests = _rows(candidate_buckets, candidate_offsets)
    tokens, is_bfloat16, event_offsets, _ = _rows(history, history_offsets)
    given = _floats(weights, ages, decay)
    _call(
        "match",
        *(buckets, offsets, tokens, is_bfloat16, history_buckets.contiguous(), event_offsets, requests),
        *given,
        *(dim, rates, token_sum, weight_sum, candidate_first, event_candidate),
    )
    return token_sum, weight_sum, candidate_first, event_candidate


@match_op.register_fake
def _(
    candidate_buckets: Tensor,
    candidate_offsets: Tensor,
    history: Tensor,
    history_buckets: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = torch_backend.match_fake(
        candidate_buckets, candidate_offsets, history, history_buckets, *rest
    )
    return *sums, torch.empty_like(candidate_buckets), torch.empty_like(history_buckets)


@torch.library.custom_op("ifa::native_match_backward", mutates_args=())
def match_backward_op(
    grad_token: Tensor,
    grad_weight: Tensor,
    candidate_first: Tensor,
    event_candidate: Tensor,
    history: Tensor,
    weights: Tensor | None,
    ages: Tensor | None,
    decay: Tensor,
) -> tuple[Tensor, Tensor]:
    grad_history = torch.empty_like(history, memory_format=torch.contiguous_format)
    grad_weights = torch.empty(0 if weights is None else len(weights))
    rows, events = len(candidate_first), len(event_candidate)
    given = _floats(weights, ages, decay)
    # the kernel adds up in place
    upstream = [x.to(torch.float32, copy=True).contiguous() for x in (grad_token, grad_weight)]
    _call(
        "match_backward",
        *(*upstream, rows, events, candidate_first, event_candidate),
        *(history.contiguous(), int(history.dtype == torch.bfloat16), *given),
        *(history.shape[1], len(decay), grad_history, None if weights is None else grad_weights),
    )
    return grad_history, grad_weights if weights is None else grad_weights.to(weights.dtype)


@match_backward_op.register_fake
def _(
    grad_token: Tensor,
    grad_weight: Tensor,
    candidate_first: Tensor,
    event_candidate: Tensor,
    history: Tensor,
    weights: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    grad_weights = history.new_empty(0, dtype=torch.float32) if weights is None else weights
    return torch.empty_like(history), torch.empty_like(grad_weights)


def _match_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, history, _, _, weights, ages, decay = inputs
    ctx.save_for_backward(*output[2:], history, weights, ages, decay)


def _match_autograd(
    ctx: Any, grad_token: Tensor, grad_weight: Tensor, *_: Any
) -> tuple[Tensor | None, ...]:
    grad_history, grad_weights = torch.ops.ifa.native_match_backward(
        grad_token, grad_weight, *ctx.saved_tensors
    )
    if ctx.saved_tensors[3] is None:
        grad_weights = None
    return None, None, grad_history, None, None, grad_weights, None, None


match_op.register_autograd(_match_autograd, setup_context=_match_setup)


def match(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.match``."""
    token_sum, weight_sum, *_ = torch.ops.ifa.native_match(*arguments)
    return token_sum, weight_sum
