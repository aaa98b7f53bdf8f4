"""Descriptions of an exported graph's input and output tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import Dim


@dataclass(frozen=True)
class GraphTensor:
    """An input or output tensor of a graph.

    Args:
        name: the name that the documentation uses.
        shape: sizes; "M" is the number of candidates, "U" of identity rows, "K" of taken candidates,
            and "L_NAME" of ids in a list.
        dtype: "int64", "float32" or "bool".
        columns: names of the last dimension's entries, if they have names.

    Example:
        >>> from ifa_torchrec.serving.graph_tensors import GraphTensor
        >>> GraphTensor("candidate_ids", ("M", 2), "int64", ("item", "category")).shape
        ('M', 2)
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    columns: tuple[str, ...] = ()


def columns_of(name: str, columns: Iterable[str], dtype: str, *rows: str) -> GraphTensor:
    """A GraphTensor whose last dimension has a name for each entry.

    Example:
        >>> from ifa_torchrec.serving.graph_tensors import columns_of
        >>> columns_of("dense", ["age", "price"], "float32").shape
        (2,)
    """
    columns = tuple(columns)
    return GraphTensor(name, (*rows, len(columns)), dtype, columns)


def examples_of(inputs: Iterable[GraphTensor]) -> tuple[tuple[Tensor, ...], tuple[dict[int, Dim], ...]]:
    """An example and the dynamic dimensions of each input, as torch.export takes them. "M" is at least
    1, other dynamic sizes at least 0.

    Example:
        >>> from ifa_torchrec.serving.graph_tensors import GraphTensor, examples_of
        >>> (example,), (sizes,) = examples_of([GraphTensor("key", ("M", 8), "float32")])
        >>> example.shape, list(sizes)
        (torch.Size([3, 8]), [0])
    """
    sizes: dict[str, Dim] = {}
    example: list[Tensor] = []
    dynamic: list[dict[int, Dim]] = []
    for given in inputs:
        named = {i: n for i, n in enumerate(given.shape) if isinstance(n, str)}
        sizes |= {n: Dim(n, min=int(n == "M")) for n in named.values() if n not in sizes}
        # torch.export would treat sizes of 0 and 1 as constants
        shape = [3 + list(sizes).index(n) if isinstance(n, str) else n for n in given.shape]
        example.append(torch.zeros(shape, dtype=getattr(torch, given.dtype)))
        dynamic.append({i: sizes[n] for i, n in named.items()})
    return tuple(example), tuple(dynamic)
