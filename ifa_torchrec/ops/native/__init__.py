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
from ifa_torchrec.ops.checks import check_offsets
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


def serves(tokens: Tensor, state: Tensor | None = None) -> bool:
    """Are the kernels there, and for tokens and a state of this device and dtype?"""
    if state is not None and state.dtype == torch.float64:
        return False
    return tokens.device.type == "cpu" and tokens.dtype in _DTYPES and LIBRARY is not None


@cache
def _kernel(name: str) -> Any:
    kernel = getattr(LIBRARY, f"ifa_{name}_{STATUS}")
    kernel.argtypes = [_TYPES[kind] for kind in _SIGNATURES[name].replace(" ", "")]
    kernel.restype = None
    return kernel


def _call(name: str, *arguments: Any) -> None:
    """Tensors become pointers, kept alive by ``arguments``; the number of threads is added."""
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    _kernel(name)(*given, torch.get_num_threads())


# The operators can be called past ops.encode and its like, from an exported graph for one. What the
# kernels read and write is therefore made here, each tensor for the sizes that the kernel is told.


def _given(x: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """As a kernel reads it: contiguous, of this shape and dtype."""
    if x is None:
        return None
    if x.shape != shape or x.device.type != "cpu":
        raise ValueError(f"a tensor must be {list(shape)} on cpu, got {list(x.shape)} on {x.device}")
    return x.to(dtype).contiguous()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """For a kernel to fill, whatever the default dtype and device."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _tokens(tokens: Tensor) -> tuple[Tensor, int]:
    """The kernels' arguments of tokens [rows, D]: them, and whether they are bfloat16."""
    if tokens.dtype not in _DTYPES or tokens.device.type != "cpu":
        raise ValueError(
            f"tokens must be float32 or bfloat16 on cpu, got {tokens.dtype} on {tokens.device}"
        )
    return tokens.contiguous(), int(tokens.dtype == torch.bfloat16)


def _offsets(offsets: Tensor, rows: int) -> tuple[Tensor, int]:
    """The kernels' arguments of offsets: them, and B."""
    offsets = offsets.to("cpu", torch.int64).contiguous()
    check_offsets("offsets", offsets, rows)
    return offsets, len(offsets) - 1


def _sizes(tokens: Tensor, weight: Tensor, feature_map: str) -> tuple[int, int, int, int]:
    """The kernels' arguments of a projection [H, d, D]: D, H, d and the feature map."""
    heads, width, dim = weight.shape
    if tokens.shape[1] != dim or (dim + 16) * heads * (width + 16) > 2**27:  # sizes are int in csrc
        raise ValueError(
            f"a projection [H, d, D] must have D = {tokens.shape[1]} and not 2^27 entries, got "
            f"{list(weight.shape)}"
        )
    return dim, heads, width, _MAPS[feature_map]


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
    rows, heads, width, dim = len(history), *key_weight.shape
    bounds, requests = _offsets(offsets, rows)
    features = width * FEATURE_MAPS[feature_map].expansion
    key_value = _empty(requests, heads, features, width)
    key_sum = _empty(requests, heads, features)
    _call(
        "encode",
        *(*_tokens(history), bounds, requests),
        *(_given(key_weight, heads, width, dim), _given(value_weight, heads, width, dim)),
        *(_given(weights, rows), _given(ages, rows), _given(decay, heads)),
        *(*_sizes(history, key_weight, feature_map), key_value, key_sum),
    )
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
    rows, heads, width, dim = len(history), *key_weight.shape
    bounds, requests = _offsets(offsets, rows)
    features = width * FEATURE_MAPS[feature_map].expansion
    grad_history = _empty(*history.shape, dtype=history.dtype)
    grad_key, grad_value = _empty(heads, width, dim), _empty(heads, width, dim)
    grad_weights = _empty(0 if weights is None else rows)
    _call(
        "encode_backward",
        _given(grad_key_value, requests, heads, features, width),
        _given(grad_key_sum, requests, heads, features),
        *(*_tokens(history), bounds, requests),
        *(_given(key_weight, heads, width, dim), _given(value_weight, heads, width, dim)),
        *(_given(weights, rows), _given(ages, rows), _given(decay, heads)),
        *_sizes(history, key_weight, feature_map),
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
    return torch_backend.like(history, key_weight, value_weight, grad_weights)


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
    rows, heads, width, dim = len(candidates), *query_weight.shape
    bounds, requests = _offsets(offsets, rows)
    features = width * FEATURE_MAPS[feature_map].expansion
    out, matched = _empty(rows, heads, width), _empty(rows, heads)
    _call(
        "attend",
        *(*_tokens(candidates), bounds, requests, _given(query_weight, heads, width, dim)),
        _given(key_value, requests, heads, features, width),
        _given(key_sum, requests, heads, features),
        *(*_sizes(candidates, query_weight, feature_map), eps, out, matched),
    )
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
    rows, heads, width, dim = len(candidates), *query_weight.shape
    bounds, requests = _offsets(offsets, rows)
    features = width * FEATURE_MAPS[feature_map].expansion
    grad_candidates = _empty(*candidates.shape, dtype=candidates.dtype)
    grad_query = _empty(heads, width, dim)
    grad_key_value = _empty(requests, heads, features, width)
    grad_key_sum = _empty(requests, heads, features)
    _call(
        "attend_backward",
        *(_given(grad_out, rows, heads, width), _given(grad_matched, rows, heads)),
        *(*_tokens(candidates), bounds, requests, _given(query_weight, heads, width, dim)),
        _given(key_value, requests, heads, features, width),
        _given(key_sum, requests, heads, features),
        *(*_sizes(candidates, query_weight, feature_map), eps),
        *(grad_candidates, grad_query, grad_key_value, grad_key_sum),
    )
    return (
        grad_candidates,
        grad_query.to(query_weight.dtype),
        grad_key_value.to(key_value.dtype),
        grad_key_sum.to(key_sum.dtype),
    )


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
    rates, candidates, (events, dim) = len(decay), len(candidate_buckets), history.shape
    int64 = torch.int64
    offsets, requests = _offsets(candidate_offsets, candidates)
    event_offsets, _ = _offsets(history_offsets, events)
    token_sum, weight_sum = _empty(candidates, rates, dim), _empty(candidates, rates)
    candidate_first, event_candidate = _empty(candidates, dtype=int64), _empty(events, dtype=int64)
    _call(
        "match",
        *(_given(candidate_buckets, candidates, dtype=int64), offsets, *_tokens(history)),
        _given(history_buckets, events, dtype=int64),
        *(_given(event_offsets, requests + 1, dtype=int64), requests),
        *(_given(weights, events), _given(ages, events), _given(decay, rates)),
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
    first = candidate_buckets.new_empty(candidate_buckets.shape, dtype=torch.int64)
    return *sums, first, history_buckets.new_empty(history_buckets.shape, dtype=torch.int64)


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
    rates, candidates, (events, dim) = len(decay), len(candidate_first), history.shape
    for joined, least in ((candidate_first, 0), (event_candidate, -1)):
        if len(joined) and not least <= joined.min() <= joined.max() < candidates:
            raise ValueError(f"the join must be of rows from {least} to {candidates - 1}, got {joined}")
    grad_history = _empty(*history.shape, dtype=history.dtype)
    grad_weights = _empty(0 if weights is None else events)
    _call(
        "match_backward",
        # copies, since the kernel adds up in place
        _given(grad_token.clone(), candidates, rates, dim),
        *(_given(grad_weight.clone(), candidates, rates), candidates, events),
        _given(candidate_first, candidates, dtype=torch.int64),
        *(_given(event_candidate, events, dtype=torch.int64), *_tokens(history)),
        *(_given(weights, events), _given(ages, events), _given(decay, rates)),
        *(dim, rates, grad_history, None if weights is None else grad_weights),
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
) -> tuple[Tensor, ...]:
    grad_weights = history.new_empty(0, dtype=torch.float32) if weights is None else weights
    return torch_backend.like(history, grad_weights)


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
