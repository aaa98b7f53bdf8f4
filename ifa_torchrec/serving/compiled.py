"""Serves a model with its dense part compiled for this processor, and lookups in its own tables.

``ifa export`` writes the compiled package into the run, and ``ifa serve --compiled`` loads it from
there. The package does not contain the tables, so it is small, and processes still share the tables.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._aoti import AOTIModelPackageLoader
from torch._inductor import aoti_compile_and_package, aoti_load_package

from ifa_torchrec.data import LogSchema
from ifa_torchrec.data.batches import lists_of, stacked, tensor
from ifa_torchrec.data.schema import Columns
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.modules import UserState
from ifa_torchrec.serving.catalogue import EncodedRequests
from ifa_torchrec.serving.dense_graph import DenseGraph
from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.graph_tensors import examples_of
from ifa_torchrec.serving.plain_tables import PlainPooledArch, plain_tables

_Loader: Any = AOTIModelPackageLoader  # its type stubs lack load_metadata_from_package
_REMEDY = "compile it again (ifa export --run RUN)"
DENSE_FILE = "dense.pt2"
"""File name of the compiled dense part in a run's folder."""


def compile_dense(model: DLRM_IFA, schema: LogSchema, path: Path) -> None:
    """Compile a model's dense part for this machine's processor with AOTInductor.

    Args:
        model: DLRM_IFA with interaction "ifa".
        schema: the event log's schema.
        path: file to write; its name ends in .pt2.

    Raises:
        ConfigError: the model has no user state.
        StateError: the model has managed-collision tables.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.serving.compiled import compile_dense
        >>> def compile_it(model, schema):  # takes a minute, and a C++ compiler
        ...     compile_dense(model, schema, Path("dense.pt2"))
    """
    _check_tables(model)
    graph = DenseGraph(model, schema)
    example, sizes = examples_of(graph.inputs)
    with torch.no_grad():
        program = torch.export.export(graph, example, dynamic_shapes={"tensors": sizes}, strict=False)
    options = {
        # Inductor assumes sizes of at least 2; its input check would refuse smaller ones, which work
        "aot_inductor.check_lowerbound": False,
        "aot_inductor.metadata": _made_for(graph),
    }
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def check_weights(model: DLRM_IFA, schema: LogSchema, package: Path) -> None:
    """Refuse a package compiled from other weights; the machine is not checked.

    Args:
        model, schema, package: see ``CompiledDense``.

    Raises:
        StateError: the package was compiled from other weights, or cannot be read.

    Example:
        >>> from ifa_torchrec.serving.compiled import check_weights
        >>> def check(run):  # a training run with a compiled dense part
        ...     check_weights(run.dlrm, run.log.schema, run.config.out / "dense.pt2")
    """
    _check_metadata(package, {"weights": _made_for(DenseGraph(model, schema))["weights"]})


def _check_metadata(package: Path, wanted: dict[str, str]) -> None:
    try:
        found: dict[str, str] = _Loader.load_metadata_from_package(str(package), "model")
    except RuntimeError as error:
        raise StateError(f"{package} cannot be loaded ({error}); {_REMEDY}") from error
    for name, value in wanted.items():
        if found.get(name) != value:
            raise StateError(
                f"{package} was compiled for {name} {found.get(name)!r}, expected {value!r}; {_REMEDY}"
            )


class CompiledDense:
    """Computes requests' logits from user states with a compiled dense part.

    Args:
        model: DLRM_IFA with interaction "ifa" and unsharded tables in float32, float16 or int8.
        schema: the event log's schema.
        items: the columns of the log's items.
        package: the file that ``compile_dense`` wrote. It is machine code that runs when it is loaded:
            load it only from sources that may run code here.

    Raises:
        StateError: the package does not exist, cannot be read, or was compiled from other weights, by
            another torch version or for another processor; or a table has another type or managed
            collisions.

    Example:
        >>> from ifa_torchrec.serving import Scorer
        >>> from ifa_torchrec.serving.compiled import CompiledDense
        >>> def scorer_of(run, store):  # a training run with a compiled dense part
        ...     compiled = CompiledDense(
        ...         run.dlrm, run.log.schema, run.log.items, run.config.out / "dense.pt2")
        ...     return Scorer(run.dlrm, run.log, store, compiled=compiled)
    """

    def __init__(self, model: DLRM_IFA, schema: LogSchema, items: Columns, package: Path) -> None:
        _check_tables(model)
        if not package.exists():
            raise StateError(f"{package} does not exist; write it with ifa export --run RUN")
        graph = DenseGraph(model, schema)
        _check_metadata(package, _made_for(graph))  # before loading, which runs the package's code
        try:
            loaded: Any = aoti_load_package(str(package)).loader
        except RuntimeError as error:
            raise StateError(f"{package} cannot be loaded ({error}); {_REMEDY}") from error
        self._run, self._schema, self._items = loaded.run, schema, items
        self._names = [given.name for given in graph.inputs]
        self._per_candidate = {given.name for given in graph.inputs if given.shape[:1] == ("M",)}
        keys = model.config.candidate_keys
        self._features, self._keys = list(keys), list(keys.values())
        self._tables = plain_tables(model.sequence_arch.embedding_collection, self._keys)
        self._projections = model.sequence_arch.projections
        self._context_arch = PlainPooledArch.of(model.sparse_arch)
        self._list_arch = PlainPooledArch.of(model.item_sparse_arch)

    @torch.no_grad()
    def logits(self, encoded: EncodedRequests, state: UserState) -> Tensor:
        """
        Args:
            encoded: B requests with M candidates in total.
            state: their users' states at the requests' times.

        Returns:
            Logits [M, T] float32, each candidate's given the candidate set of its request.
        """
        given = self._looked_up(encoded) | self._numbers(encoded)
        given |= {"key_value": state.key_value, "key_sum": state.key_sum, "count": state.count}
        rows: list[int] = []
        if state.identity_offsets is not None:
            offsets, key, value, weight = state.identity_tables()
            given |= {"identity_key": key, "identity_value": value, "identity_sum": weight}
            rows = np.diff(offsets.numpy()).tolist()
        candidates = encoded.lengths.tolist()
        if len(candidates) == 1:  # skip the splits, which would take as long as the graph
            given["dense"] = given["dense"][0]
            return self._run([given[name] for name in self._names])[0]
        columns: list[Iterable[Tensor]] = []
        for name in self._names:
            if name == "dense":
                columns.append(given[name].unbind())
            elif name.startswith("identity_"):
                columns.append(given[name].split(rows))
            else:
                columns.append(given[name].split(candidates if name in self._per_candidate else 1))
        parts = [self._run(list(inputs))[0] for inputs in zip(*columns, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _looked_up(self, encoded: EncodedRequests) -> dict[str, Tensor]:
        """The tables' rows for the requests' ids, and the candidate ids."""
        ids = [encoded.ids[name] for name in self._features]
        found = zip(self._tables, map(tensor, ids), self._keys, strict=True)
        rows = reduce(torch.add, (self._projections(table(i), key) for table, i, key in found))
        given = {"rows": rows, "candidate_ids": stacked(ids, 0)}
        if self._context_arch is not None:
            given["context"] = _pooled(self._context_arch, encoded.context, len(encoded.lengths))
        if self._list_arch is not None:
            names, described = self._schema.item_lists, encoded.described
            lists = {name: lists_of(self._items, name, described) for name in names}
            given["lists"] = _pooled(self._list_arch, lists, len(described))
        return given

    def _numbers(self, encoded: EncodedRequests) -> dict[str, Tensor]:
        """The numbers of the requests and of the candidates' items."""
        items, schema, described = self._items, self._schema, encoded.described
        given = {"dense": encoded.dense, "candidate_dense": encoded.candidate_dense}
        given["candidate_item_ids"] = torch.from_numpy(encoded.items)
        if schema.item_dense:
            given["item_dense"] = stacked([items[name][described] for name in schema.item_dense], 0)
        if schema.item_vectors:
            vectors = [items[name][described] for name in schema.item_vectors]
            given["item_vectors"] = tensor(np.concatenate(vectors, axis=1, dtype=np.float32))
        return given


def _pooled(arch: PlainPooledArch, lists: dict[str, tuple[np.ndarray, np.ndarray]], rows: int) -> Tensor:
    """Each row's pooled lists of ids, [rows, features, D]."""
    of_row = {name: tensor(np.repeat(np.arange(rows), lengths)) for name, (_, lengths) in lists.items()}
    return arch({name: tensor(values) for name, (values, _) in lists.items()}, of_row, rows)


def _check_tables(model: DLRM_IFA) -> None:
    if model.sequence_arch.managed:
        raise StateError(
            "a model with managed-collision tables cannot be served with --compiled; leave it out"
        )


def _processor() -> str:
    """This machine's processor, with a digest of its features: the compiler uses all it finds."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    known = " ".join(sorted((flags[1] if flags else text).split()))
    digest = hashlib.sha256(known.encode()).hexdigest()
    return f"{torch.backends.cpu.get_cpu_capability()} {digest[:8]}"


def _made_for(graph: nn.Module) -> dict[str, str]:
    """Metadata that binds a package to this graph's weights, torch version and processor."""
    digest = hashlib.sha256(repr([graph.config, graph.inputs]).encode())
    for name, weights in graph.state_dict().items():
        digest.update(name.encode() + weights.detach().contiguous().numpy().tobytes())
    return {
        "weights": digest.hexdigest()[:16],
        "torch": torch.__version__,
        "processor": _processor(),
    }
