"""The `native` backend: C++ kernels on CPU, one pass over the rows.

The kernels (csrc/) do not depend on Python or PyTorch. They are built with the package by any C++
compiler, once per instruction set. When they are loaded, the processor's fastest instruction set is
selected, unless the environment variable IFA_KERNELS names another one or none. They take float32, and
bfloat16 inputs with float32 sums; the `torch` backend handles other dtypes. Blocks of rows are summed in
an order that does not depend on the number of threads: results are bitwise reproducible, and the sum of
a million events is off by less than 1e-6 of the largest. avx512_bf16, the default where available except
on Intel, rounds phi and the key's weight to bfloat16 in encode's forward of bfloat16 tokens: states are
off by up to 1 %.

They are called through ctypes. A TORCH_LIBRARY, even one on the stable ABI, is compiled against the
headers of PyTorch, so the package could only be built where that build's torch is already installed. A
C++ server links the same ``extern "C"`` functions, whose arguments ``_SIGNATURES`` lists.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.ops.arguments import (
    AttendArguments,
    AttendSoftmaxArguments,
    EncodeArguments,
    JoinedArguments,
    MatchArguments,
)
from ifa_torchrec.ops.checks import check_offset_values
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS

_MAPS = {"elu": 0, "relu": 1, "hedgehog": 2}
_DTYPES = (torch.float32, torch.bfloat16)
_TYPES = {"p": c_void_p, "n": c_int64, "i": c_int, "f": c_float}
_SIGNATURES = {
    "encode": "pipn pppi pp iiii pp i",
    "encode_backward": "pp pipn pppi pp iiii pppp i",
    "attend": "pipn ppp iiiif pp i",
    "attend_backward": "pp pipn ppp iiiif pppp i",
    "attend_softmax": "pipn ppp iiii pp i",
    "attend_softmax_backward": "pp pipn ppp iiii pppp i",
    "match": "pppippn pi pp ii pppp i",
    "match_backward": "ppnnpp pi pi pp ii pp i",
}
"""The arguments of csrc/'s kernels: pointers, int64, int, float."""
_VERSION = 4
"""Version of the signatures, the same as in csrc/isa_plain.cpp: kernels of another version would be
called with the wrong arguments. Increment it in both with every change."""


INSTRUCTION_SETS = ("plain", "avx2", "avx512", "avx512_bf16")
"""In ascending order; a processor that has one also has those before it."""


def load() -> tuple[ctypes.CDLL | None, str]:
    """Load the kernels for the processor and IFA_KERNELS.

    Returns:
        The library, or None; and the instruction set in use, or why there is none.

    Raises:
        ConfigError: IFA_KERNELS is not an instruction set, or not one that is available here.
    """
    wanted = os.environ.get("IFA_KERNELS", "")
    if wanted not in ("", "none", *INSTRUCTION_SETS):
        raise ConfigError(
            f"IFA_KERNELS must be one of {', '.join(INSTRUCTION_SETS)} or none, got {wanted!r}"
        )
    if wanted == "none":
        return None, "turned off by IFA_KERNELS=none"
    library, status = built()
    if not wanted:
        return library, status if library is None else library.ifa_default_instruction_set().decode()
    if library is None:
        raise ConfigError(f"IFA_KERNELS={wanted}: the kernels are {status}")
    usable = INSTRUCTION_SETS[: INSTRUCTION_SETS.index(status) + 1]
    if wanted not in usable:
        raise ConfigError(
            f"IFA_KERNELS={wanted}: this processor has {', '.join(usable)}; use one of these or none"
        )
    return library, wanted


def built() -> tuple[ctypes.CDLL | None, str]:
    """The library and the best instruction set, or why there is none."""
    spec = importlib.util.find_spec("ifa_torchrec.ops.kernels._native")
    if spec is None or spec.origin is None:
        return None, "not built: no C++ compiler with OpenMP was found when the package was installed"
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f"not loaded: {error}"
    if not hasattr(library, "ifa_signatures") or library.ifa_signatures() != _VERSION:
        return None, "not loaded: built from other sources; install the package again"
    for name in ("ifa_instruction_set", "ifa_default_instruction_set"):
        getattr(library, name).restype = ctypes.c_char_p
    return library, library.ifa_instruction_set().decode()


LIBRARY, STATUS = load()
"""The result of ``load`` at import."""


def serves(tokens: Tensor, state: Tensor | None = None) -> bool:
    """Whether the kernels are loaded and support tokens and a state of this device and dtype."""
    if state is not None and state.dtype == torch.float64:
        return False
    return tokens.device.type == "cpu" and tokens.dtype in _DTYPES and LIBRARY is not None


@cache
def _kernel(name: str, instruction_set: str) -> Any:
    kernel = getattr(LIBRARY, f"ifa_{name}_{instruction_set}")
    kernel.argtypes = [_TYPES[kind] for kind in _SIGNATURES[name].replace(" ", "")]
    kernel.restype = None
    return kernel


def _call(name: str, *arguments: Any) -> None:
    """Call a kernel: tensors become pointers, kept alive by ``arguments``; appends the thread count."""
    given = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    _kernel(name, STATUS)(*given, torch.get_num_threads())


# The operators can be called without ops.encode and the other functions, for example from an exported
# graph. So every tensor that a kernel reads or writes is checked or allocated here with the sizes that
# the kernel is given.


def _given(x: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """The tensor as a kernel reads it: contiguous, with this shape and dtype."""
    if x is None:
        return None
    if x.shape != shape or x.device.type != "cpu":
        raise ValueError(f"a tensor must be {list(shape)} on cpu, got {list(x.shape)} on {x.device}")
    return x.to(dtype).contiguous()


def _weights(weights: Tensor | None, rows: int, heads: int) -> tuple[Tensor | None, int]:
    """The kernels' arguments for event weights [rows, heads] or [rows]: the weights and column count."""
    if weights is None or weights.ndim == 1:
        return _given(weights, rows), 1
    return _given(weights, rows, heads), heads


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for a kernel to fill, independent of the default dtype and device."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _grad_weights(weights: Tensor | None) -> Tensor:
    """Memory for the gradient of event weights; empty without them, which becomes a null pointer."""
    return _empty(0) if weights is None else _empty(*weights.shape)


def _tokens(tokens: Tensor) -> tuple[Tensor, int]:
    """The kernels' arguments for tokens [rows, D]: the tokens, and whether they are bfloat16."""
    if tokens.dtype not in _DTYPES or tokens.device.type != "cpu":
        raise ValueError(
            f"tokens must be float32 or bfloat16 on cpu, got {tokens.dtype} on {tokens.device}"
        )
    return tokens.contiguous(), int(tokens.dtype == torch.bfloat16)


def _offsets(offsets: Tensor, rows: int) -> tuple[Tensor, int]:
    """The kernels' arguments for offsets: the offsets and B."""
    offsets = offsets.to("cpu", torch.int64).contiguous()
    check_offset_values("offsets", offsets, rows)  # always: the kernels index memory with them
    return offsets, len(offsets) - 1


def _sizes(tokens: Tensor, weight: Tensor, feature_map: str) -> tuple[int, int, int, int]:
    """The kernels' arguments for a projection [H, d, D]: D, H, d and the feature map."""
    heads, width, dim = weight.shape
    entries = (dim + 16) * heads * (width + 16)
    state = FEATURE_MAPS[feature_map].expansion * heads * (width + 16) ** 2
    if tokens.shape[1] != dim or entries > 2**27 or state >= 2**31:  # sizes are int in csrc
        raise ValueError(
            f"a projection [H, d, D] must have D = {tokens.shape[1]} and less than 2^27 entries, got "
            f"{list(weight.shape)}"
        )
    return dim, heads, width, _MAPS[feature_map]


# ------------------------------------------------------------------------------------- encode


def encode(given: EncodeArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.encode``."""
    history, offsets, key_weight, value_weight, weights, ages, decay, feature_map = given
    rows, heads, width, dim = len(history), *key_weight.shape
    bounds, requests = _offsets(offsets, rows)
    features = width * FEATURE_MAPS[feature_map].expansion
    key_value = _empty(requests, heads, features, width)
    key_sum = _empty(requests, heads, features)
    _call(
        "encode",
        *(*_tokens(history), bounds, requests),
        *(_given(key_weight, heads, width, dim), _given(value_weight, heads, width, dim)),
        *(*_weights(weights, rows, heads), _given(ages, rows), _given(decay, heads)),
        *(*_sizes(history, key_weight, feature_map), key_value, key_sum),
    )
    return key_value, key_sum


def encode_backward(
    grad_key_value: Tensor, grad_key_sum: Tensor, given: EncodeArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of history, key_weight, value_weight and weights."""
    history, offsets, key_weight, value_weight, weights, ages, decay, feature_map = given
    rows, heads, width, dim = len(history), *key_weight.shape
    bounds, requests = _offsets(offsets, rows)
    features = width * FEATURE_MAPS[feature_map].expansion
    grad_history = _empty(*history.shape, dtype=history.dtype)
    grad_key, grad_value = _empty(heads, width, dim), _empty(heads, width, dim)
    grad_weights = _grad_weights(weights)
    _call(
        "encode_backward",
        _given(grad_key_value, requests, heads, features, width),
        _given(grad_key_sum, requests, heads, features),
        *(*_tokens(history), bounds, requests),
        *(_given(key_weight, heads, width, dim), _given(value_weight, heads, width, dim)),
        *(*_weights(weights, rows, heads), _given(ages, rows), _given(decay, heads)),
        *_sizes(history, key_weight, feature_map),
        *(grad_history, grad_key, grad_value, grad_weights),
    )
    return (
        grad_history,
        grad_key.to(key_weight.dtype),
        grad_value.to(value_weight.dtype),
        grad_weights if weights is None else grad_weights.to(weights.dtype),
    )


# ------------------------------------------------------------------------------------- attend


def attend(given: AttendArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.attend``."""
    candidates, offsets, query_weight, key_value, key_sum, feature_map, eps = given
    rows, heads, width, dim = len(candidates), *query_weight.shape
    bounds, requests = _offsets(offsets, rows)
    features = width * FEATURE_MAPS[feature_map].expansion
    out, normalizer = _empty(rows, heads, width), _empty(rows, heads)
    _call(
        "attend",
        *(*_tokens(candidates), bounds, requests, _given(query_weight, heads, width, dim)),
        _given(key_value, requests, heads, features, width),
        _given(key_sum, requests, heads, features),
        *(*_sizes(candidates, query_weight, feature_map), eps, out, normalizer),
    )
    return out, normalizer


def attend_backward(
    grad_out: Tensor, grad_normalizer: Tensor, given: AttendArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of candidates, query_weight, key_value and key_sum."""
    candidates, offsets, query_weight, key_value, key_sum, feature_map, eps = given
    rows, heads, width, dim = len(candidates), *query_weight.shape
    bounds, requests = _offsets(offsets, rows)
    features = width * FEATURE_MAPS[feature_map].expansion
    grad_candidates = _empty(*candidates.shape, dtype=candidates.dtype)
    grad_query = _empty(heads, width, dim)
    grad_key_value = _empty(requests, heads, features, width)
    grad_key_sum = _empty(requests, heads, features)
    _call(
        "attend_backward",
        *(_given(grad_out, rows, heads, width), _given(grad_normalizer, rows, heads)),
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


# ----------------------------------------------------------------------------- attend_softmax


def _summaries(given: AttendSoftmaxArguments) -> tuple[Any, ...]:
    """The kernels' arguments from the candidates up to the number of summaries R."""
    candidates, offsets, query_weight, mean, log_weight = given
    heads, width, dim = query_weight.shape
    bounds, requests = _offsets(offsets, len(candidates))
    summaries = mean.shape[2]
    return (
        *(*_tokens(candidates), bounds, requests, _given(query_weight, heads, width, dim)),
        _given(mean, requests, heads, summaries, width),
        _given(log_weight, requests, heads, summaries),
        *_sizes(candidates, query_weight, "relu")[:3],
        summaries,
    )


def attend_softmax(given: AttendSoftmaxArguments) -> tuple[Tensor, Tensor]:
    """See ``ifa_torchrec.ops.attend_softmax``."""
    rows, (heads, width, _) = len(given.candidates), given.query_weight.shape
    out, log_sum = _empty(rows, heads, width), _empty(rows, heads)
    _call("attend_softmax", *_summaries(given), out, log_sum)
    return out, log_sum


def attend_softmax_backward(
    grad_out: Tensor, grad_log_sum: Tensor, given: AttendSoftmaxArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of candidates, query_weight, summaries and log_weight."""
    candidates, _, query_weight, mean, log_weight = given
    rows, (heads, width, dim) = len(candidates), query_weight.shape
    grad_candidates = _empty(*candidates.shape, dtype=candidates.dtype)
    grad_query = _empty(heads, width, dim)
    grad_mean, grad_log_weight = _empty(*mean.shape), _empty(*log_weight.shape)
    _call(
        "attend_softmax_backward",
        *(_given(grad_out, rows, heads, width), _given(grad_log_sum, rows, heads)),
        *(*_summaries(given), grad_candidates, grad_query, grad_mean, grad_log_weight),
    )
    return (
        grad_candidates,
        grad_query.to(query_weight.dtype),
        grad_mean.to(mean.dtype),
        grad_log_weight.to(log_weight.dtype),
    )


# -------------------------------------------------------------------------------------- match


def match(given: MatchArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``ops.match``; also returns the join: candidate_first [M] and event_candidate [N]."""
    candidate_buckets, candidate_offsets, history, history_buckets, history_offsets = given[:5]
    weights, ages, decay = given[5:]
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
        *(*_weights(weights, events, rates), _given(ages, events), _given(decay, rates)),
        *(dim, rates, token_sum, weight_sum, candidate_first, event_candidate),
    )
    return token_sum, weight_sum, candidate_first, event_candidate


def match_backward(
    grad_token: Tensor, grad_weight: Tensor, given: JoinedArguments
) -> tuple[Tensor, Tensor]:
    """The gradients of history and weights."""
    candidate_first, event_candidate, history, weights, ages, decay = given
    rates, candidates, (events, dim) = len(decay), len(candidate_first), history.shape
    for joined, least in ((candidate_first, 0), (event_candidate, -1)):
        if len(joined) and not least <= joined.min() <= joined.max() < candidates:
            raise ValueError(f"the join must have rows from {least} to {candidates - 1}, got {joined}")
    grad_history = _empty(*history.shape, dtype=history.dtype)
    grad_weights = _grad_weights(weights)
    _call(
        "match_backward",
        # copies, since the kernel adds in place
        _given(grad_token.clone(), candidates, rates, dim),
        *(_given(grad_weight.clone(), candidates, rates), candidates, events),
        _given(candidate_first, candidates, dtype=torch.int64),
        *(_given(event_candidate, events, dtype=torch.int64), *_tokens(history)),
        *(*_weights(weights, events, rates), _given(ages, events), _given(decay, rates)),
        *(dim, rates, grad_history, grad_weights),
    )
    return grad_history, grad_weights if weights is None else grad_weights.to(weights.dtype)
