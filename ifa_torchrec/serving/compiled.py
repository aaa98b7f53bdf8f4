"""The dense part of a model compiled for a processor, and the model's own tables looked up before it.

``ifa export`` compiles, into the run; ``ifa serve --compiled`` takes it from there. The tables are not
in the package, so it is small, and whatever shares the tables shares them still.
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

_Loader: Any = AOTIModelPackageLoader  # its types lack what is called
_REMEDY = "compile it anew (ifa export --run RUN)"
DENSE_FILE = "dense.pt2"
"""The compiled dense part in a run's folder."""


def compile_dense(model: DLRM_IFA, schema: LogSchema, path: Path) -> None:
    """Compile a model's dense part for this machine's processor, by AOTInductor.

    Args:
        model: DLRM_IFA of interaction "ifa".
        schema: the event log's.
        path: to write, a name that ends in .pt2.

    Raises:
        ConfigError: the model has no user state.
        StateError: its tables are of managed collisions.

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
        # Inductor never assumes a size below 2, and its check of the inputs would refuse what runs well
        "aot_inductor.check_lowerbound": False,
        "aot_inductor.metadata": _made_for(graph),
    }
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def check_weights(model: DLRM_IFA, schema: LogSchema, package: Path) -> None:
    """Refuse a package of other weights, for whichever machine it is.

    Args:
        model, schema, package: as of ``CompiledDense``.

    Raises:
        StateError: it is of others, or cannot be read.

    Example:
        >>> from ifa_torchrec.serving.compiled import check_weights
        >>> def check(run):  # a training run whose dense part was compiled
        ...     check_weights(run.dlrm, run.log.schema, run.config.out / "dense.pt2")
    """
    _check_metadata(package, {"weights": _made_for(DenseGraph(model, schema))["weights"]})


def _check_metadata(package: Path, wanted: dict[str, str]) -> None:
    try:
        found: dict[str, str] = _Loader.load_metadata_from_package(str(package), "model")
    except RuntimeError as error:
        raise StateError(f"{package}: it cannot be loaded ({error}); {_REMEDY}") from error
    for name, value in wanted.items():
        if found.get(name) != value:
            raise StateError(f"{package}: it is of {name} {found.get(name)!r}, not {value!r}; {_REMEDY}")


class CompiledDense:
    """Logits of requests from their states, by a compiled dense part.

    Args:
        model: DLRM_IFA of interaction "ifa", its tables whole on this process, float32, float16 or int8.
        schema: the event log's.
        items: the columns of the log's items.
        package: what ``compile_dense`` wrote. It is machine code, and runs as it is loaded: take it only
            from who may run code here.

    Raises:
        StateError: the package is of other weights, another version of torch or another processor, or
            cannot be read; or the model's tables are of another type, or of managed collisions.

    Example:
        >>> from ifa_torchrec.serving import Scorer
        >>> from ifa_torchrec.serving.compiled import CompiledDense
        >>> def scorer_of(run, store):  # a training run whose dense part is compiled
        ...     compiled = CompiledDense(
        ...         run.dlrm, run.log.schema, run.log.items, run.config.out / "dense.pt2")
        ...     return Scorer(run.dlrm, run.log, store, compiled=compiled)
    """

    def __init__(self, model: DLRM_IFA, schema: LogSchema, items: Columns, package: Path) -> None:
        _check_tables(model)
        if not package.exists():
            raise StateError(f"{package} is not there; ifa export --run RUN writes it")
        graph = DenseGraph(model, schema)
        _check_metadata(package, _made_for(graph))  # before its code is loaded, which runs then
        try:
            loaded: Any = aoti_load_package(str(package)).loader
        except RuntimeError as error:
            raise StateError(f"{package}: it cannot be loaded ({error}); {_REMEDY}") from error
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
            encoded: B requests for M candidates.
            state: of their B users, at the requests' times.

        Returns:
            Logits [M, T] float32, of each candidate beside its set.
        """
        given = self._looked_up(encoded) | self._numbers(encoded)
        given |= {"key_value": state.key_value, "key_sum": state.key_sum, "count": state.count}
        rows: list[int] = []
        if state.identity_offsets is not None:
            offsets, key, value, weight = state.identity_tables()
            given |= {"identity_key": key, "identity_value": value, "identity_sum": weight}
            rows = np.diff(offsets.numpy()).tolist()
        candidates = encoded.lengths.tolist()
        if len(candidates) == 1:  # nothing to split, which would take as long as the graph
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
        """What the tables have of the requests' ids."""
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
        """What the requests and the items have of numbers."""
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
    """What an arch has of lists of ids, [rows, features, D]."""
    of_row = {name: tensor(np.repeat(np.arange(rows), lengths)) for name, (_, lengths) in lists.items()}
    return arch({name: tensor(values) for name, (values, _) in lists.items()}, of_row, rows)


def _check_tables(model: DLRM_IFA) -> None:
    if model.sequence_arch.managed:
        raise StateError(
            "tables of managed collisions cannot be compiled around; serve without --compiled"
        )


def _processor() -> str:
    """This machine's, with a digest of all that it can: a compiler takes what it finds."""
    told = Path("/proc/cpuinfo")
    text = told.read_text() if told.exists() else platform.processor()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    known = " ".join(sorted((flags[1] if flags else text).split()))
    digest = hashlib.sha256(known.encode()).hexdigest()
    return f"{torch.backends.cpu.get_cpu_capability()} {digest[:8]}"


def _made_for(graph: nn.Module) -> dict[str, str]:
    """What a package of this graph is bound to, here."""
    digest = hashlib.sha256(repr([graph.config, graph.inputs]).encode())
    for name, weights in graph.state_dict().items():
        digest.update(name.encode() + weights.detach().contiguous().numpy().tobytes())
    return {
        "weights": digest.hexdigest()[:16],
        "torch": torch.__version__,
        "processor": _processor(),
    }
