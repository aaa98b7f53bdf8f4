"""Checks of the operators' arguments, made once before any backend runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ifa_torchrec.ops.autocast import as_autocast
from ifa_torchrec.ops.feature_maps import FEATURE_MAPS
from ifa_torchrec.ops.jagged import checkable

_FLOATS = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
_OPTIONAL = ("weights", "ages")
_WITHOUT_GRADIENT = ("ages", "decay")
_TOKENS = ("history", "candidates")


def checked(
    shapes: dict[str, str], given: tuple[Tensor | None, ...], feature_map: str | None = None
) -> list[Tensor]:
    """Check the tensors of a call: one device, and sizes that agree. Integers become int64.

    Args:
        shapes: the shape of each argument by name, in order: "H d D", or "N | N H" where either is
            allowed; a letter is the same size wherever it appears.
        given: the call's tensors, in the same order.
        feature_map: for encode and attend.

    Returns:
        The tensors, None for an optional one that is not given. Ages and decay are detached, since no
        backend computes gradients for them. Tokens are cast by ``as_autocast``.

    Raises:
        ValueError: an argument does not fit; the message says which, and what would be right.
        TypeError: an argument is not a tensor.
    """
    if feature_map is not None and feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {sorted(FEATURE_MAPS)}, got {feature_map!r}")
    sizes: dict[str, tuple[int, str]] = {}  # of each letter, with the argument that defined it
    device = None
    result = []
    for (name, letters), x in zip(shapes.items(), given, strict=True):
        if x is None and name in _OPTIONAL:
            result.append(x)
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        integer = name.endswith(("offsets", "buckets"))
        if x.dtype not in (_INTEGERS if integer else _FLOATS):
            wanted = "integers" if integer else "float32, float64, bfloat16 or float16"
            raise ValueError(f"{name} must be {wanted}, got {x.dtype}")
        if x.layout != torch.strided:
            raise ValueError(f"{name} must be dense (torch.strided), got {x.layout}")
        device = device or x.device
        if x.device != device:
            raise ValueError(f"{name} must be on {device}, like the other tensors, got {x.device}")
        forms = [form.split() for form in letters.split(" | ")]
        must_be = f"{name} must be " + " or ".join(f"[{', '.join(form)}]" for form in forms)
        shape = next((form for form in forms if len(form) == x.ndim), None)
        if shape is None:
            raise ValueError(f"{must_be}, got {list(x.shape)}")
        for letter, size in zip(shape, x.shape, strict=True):
            if letter == "B+1":
                letter, size = "B", size - 1
                if guard_or_false(size < 0):
                    raise ValueError(f"{name} must be [B + 1], got {list(x.shape)}")
            if letter == "d_phi" and feature_map is not None:
                width = sizes["d"][0] * FEATURE_MAPS[feature_map].expansion
                sizes.setdefault(letter, (width, f"feature_map {feature_map!r}"))
            if letter in ("H", "d", "D", "R") and guard_or_false(size < 1):
                raise ValueError(f"{must_be}, {letter} > 0, got {list(x.shape)}")
            wanted, by = sizes.setdefault(letter, (size, name))
            # sizes unknown to a trace pass here; the operators check again when they run
            if guard_or_false(size != wanted):
                raise ValueError(f"{must_be} with {letter} = {wanted} as in {by}, got {list(x.shape)}")
        if integer:
            x = x.to(torch.int64)
        if name in _TOKENS:
            x = as_autocast(x)
        result.append(x.detach() if name in _WITHOUT_GRADIENT else x)
    return result


def check_offsets(name: str, offsets: Tensor, rows: int) -> None:
    """Raise a ValueError if offsets do not rise from 0 to the number of rows.

    Only CPU values are checked, since reading them on a GPU waits for the device, and nothing is
    checked while tracing (torch.compile, torch.export, FakeTensorMode).

    Args:
        name: of the argument.
        offsets: [B + 1] int64.
        rows: the number of rows that they divide among requests.

    Raises:
        ValueError: they do not rise from 0 to ``rows``.
    """
    if checkable(offsets) and type(offsets) is Tensor:
        check_offset_values(name, offsets, rows)


def check_offset_values(name: str, offsets: Tensor, rows: int) -> None:
    """Like ``check_offsets``, but always, for offsets on the CPU that a kernel reads next."""
    bounds = offsets.detach().numpy()  # ten times as fast as tensors for a few numbers
    if bounds[0] != 0 or bounds[-1] != rows or (bounds[1:] < bounds[:-1]).any():
        raise ValueError(f"{name} must rise from 0 to {rows}, the number of rows, got {offsets}")


def check_eps(eps: float) -> None:
    """Raise a ValueError if float32 cannot divide by eps.

    Raises:
        ValueError: eps is not between 1.2e-38, the smallest normal float32, and 3.4e38.
    """
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= eps <= limits.max:
        raise ValueError(f"eps must be from {limits.tiny} to {limits.max}, the float32 range, got {eps}")
