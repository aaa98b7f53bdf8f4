"""The scoring of one request from a user's state, as a graph of plain tensors for other runtimes.

After the lookups the graph is a DenseGraph. For a model that generates sets it also returns the inputs
of SetGraph. It contains only PyTorch's own (aten) operators, so running it needs neither this package
nor TorchRec nor fbgemm.
"""

from __future__ import annotations

import dataclasses
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package
from torch.export import ExportedProgram

from ifa_torchrec.data import LogSchema
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.models.taken import TakenArch
from ifa_torchrec.serving.dense_graph import DenseGraph, graph_config, number_tensors, state_tensors
from ifa_torchrec.serving.errors import StateError
from ifa_torchrec.serving.graph_tensors import GraphTensor, columns_of, examples_of
from ifa_torchrec.serving.plain_tables import PlainPooledArch, plain_tables
from ifa_torchrec.serving.set_graph import SetGraph, related_tensors

FORMAT = "ifa-scoring-graph/4"


class ScoringGraph(nn.Module):
    """Computes one request's logits from plain tensors.

    It shares the model's tables. It copies the dense part, which is small, and uses the "reference"
    backend: plain formulae instead of custom operators that exist only in Python.

    Args:
        model: DLRM_IFA with interaction "ifa" and unsharded tables in float32, float16, or int8 from
            ``quantize_tables``.
        schema: the event log's schema, which names the features.

    Raises:
        ConfigError: the model has no user state.
        StateError: a table has another type or managed collisions.

    Attributes:
        inputs: one GraphTensor per argument of ``forward``, in order.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.serving import ScoringGraph
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2)))
        >>> graph = ScoringGraph(model, LogSchema(item_features={"item": 100}))
        >>> [given.name for given in graph.inputs]
        ['candidate_ids', 'context_ids', 'dense', 'candidate_dense', 'key_value', 'key_sum', 'count']
        >>> none, no_history = torch.empty(0), (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4))
        >>> graph(torch.tensor([[7], [9]]), none.long(), none, torch.empty(2, 0),
        ...     *no_history, torch.tensor([0])).shape
        torch.Size([2, 1])
    """

    def __init__(self, model: DLRM_IFA, schema: LogSchema) -> None:
        super().__init__()
        config = graph_config(model)
        if model.sequence_arch.managed:
            raise StateError(
                "a model with managed-collision tables cannot be exported; serve it with Scorer"
            )
        self.config, self.schema = config, schema
        keys = list(config.candidate_keys.values())
        self.tables = plain_tables(model.sequence_arch.embedding_collection, keys)
        self.projections = model.sequence_arch.projections
        self.context_arch = PlainPooledArch.of(model.sparse_arch)
        self.list_arch = PlainPooledArch.of(model.item_sparse_arch)
        self.dense = DenseGraph(model, schema)
        self.taken_arch = None if model.taken_arch is None else TakenArch(config)
        if self.taken_arch is not None and model.taken_arch is not None:
            self.taken_arch.load_state_dict(model.taken_arch.state_dict())
        self.inputs = _inputs(config, schema)
        self.eval()

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """
        Args:
            tensors: the tensors that ``inputs`` describes, in that order, without those that the model
                does not use. Ids are table rows; an id beyond its table is an error. A missing number
                is NaN.

                - candidate_ids: [M, item and candidate features] int64, M >= 1.
                - context_ids: [Fs] int64; dense: [F], and candidate_dense: [M, Fc], float32.
                - item_dense: [M, Fi], item_vectors: [M, V] float32, of the candidates' items.
                - context_list_NAME: [L] int64, the ids of a context list.
                - item_list_NAME: [L] int64, the ids of all candidates' lists, in any order;
                  item_list_NAME_candidate: [L] int64, the candidate of each id, 0 to M - 1.
                - candidate_item_ids: [M] int64, item numbers of the candidates, including new items
                  whose row is 0; only if an identity feature compares items.
                - key_value: [1, H, d_phi, d], key_sum: [1, H, d_phi] and count: [1] int64, one user's
                  state at the time of the request; zeros for a user without events.
                - identity_key: [U] int64, ascending, U >= 0; identity_sum: [U, L] and, if identity
                  heads have values, identity_value: [U, L, d]: the state's identity tables, if the
                  model has identity features. Rows that no candidate uses may be left out.

        Returns:
            Logits [M, T]. If the model generates sets, also the other inputs of SetGraph: query
            [M, T, D], key [M, D] and ids [M, F] int64.

        Raises:
            ValueError: the number of tensors is wrong.
        """
        names = [described.name for described in self.inputs]
        given = dict(zip(names, tensors, strict=True))
        ids = given["candidate_ids"]
        m = ids.shape[0]
        keys = self.config.candidate_keys.values()
        looked_up = zip(self.tables, ids.unbind(1), keys, strict=True)
        rows = reduce(torch.add, (self.projections(table(i), key) for table, i, key in looked_up))
        found = {"rows": rows, "context": self._context(given), "lists": self._lists(given, m)}
        described = self.dense.describe(given | {n: x for n, x in found.items() if x is not None})
        logits, compared = self.dense.set_arch(described), described.ids
        if self.taken_arch is None or compared is None:
            return logits
        related = self.taken_arch.related(described)
        return logits, related.query, related.key, compared

    def _context(self, given: dict[str, Tensor]) -> Tensor | None:
        """Rows of the context features and lists, [1, Fs, D]."""
        if self.context_arch is None:
            return None
        one = dict(zip(self.schema.context_features, given["context_ids"].split(1), strict=True))
        lists = {name: given[f"context_list_{name}"] for name in self.schema.context_lists}
        return self.context_arch({**one, **lists})

    def _lists(self, given: dict[str, Tensor], m: int) -> Tensor | None:
        """Pooled rows of the candidates' item lists, [M, Fl, D]."""
        if self.list_arch is None:
            return None
        names = self.schema.item_lists
        ids = {name: given[f"item_list_{name}"] for name in names}
        return self.list_arch(ids, {name: given[f"item_list_{name}_candidate"] for name in names}, m)


def export_scorer(model: DLRM_IFA, schema: LogSchema) -> ExportedProgram:
    """Export the scoring of one request, for any number of candidates and identity rows.

    ``torch.export.save`` writes the program, ``package_scorer`` compiles it.

    Args:
        model, schema: see ScoringGraph.

    Returns:
        ExportedProgram of aten operators that takes ScoringGraph.forward's arguments.

    Raises:
        ConfigError, StateError: see ScoringGraph.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.serving import export_scorer
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2)))
        >>> score = export_scorer(model, LogSchema(item_features={"item": 100})).module()
        >>> none, no_history = torch.empty(0), (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4))
        >>> score(torch.tensor([[7], [9], [11]]), none.long(), none, torch.empty(3, 0),
        ...     *no_history, torch.tensor([0])).shape
        torch.Size([3, 1])
    """
    graph = ScoringGraph(model, schema)
    example, sizes = examples_of(graph.inputs)
    with torch.no_grad():
        return torch.export.export(graph, example, dynamic_shapes={"tensors": sizes}, strict=False)


def package_scorer(program: ExportedProgram, path: Path) -> None:
    """Compile an exported program for this machine's processor with AOTInductor.

    A package assumes that its inputs are contiguous and does not check strides: it silently misreads,
    say, a column of a larger tensor. If AOTI_RUNTIME_CHECK_INPUTS=1 is set in the environment when a
    package first runs, it checks dtypes, shapes and strides, and throws on a mismatch.

    Args:
        program: from export_scorer.
        path: file to write; its name ends in .pt2. ``torch._inductor.aoti_load_package`` loads it.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.serving import export_scorer
        >>> from ifa_torchrec.serving.export import package_scorer
        >>> def package(model, schema):  # takes most of a minute
        ...     package_scorer(export_scorer(model, schema), Path("scorer.pt2"))
    """
    # Inductor assumes sizes of at least 2; its input check would refuse smaller ones, which work
    options = {"aot_inductor.check_lowerbound": False}
    aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def describe(model: DLRM_IFA, schema: LogSchema, version: str, vocabulary: str) -> dict[str, Any]:
    """Describe an exported graph, as JSON, for the author of a server that runs it.

    Args:
        model, schema: see ScoringGraph.
        version: the weights' version; the states must be of the same version.
        vocabulary: digest of the vocabulary that maps external ids to rows; the states must have been
            built with the same vocabulary.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.serving.export import describe
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2)))
        >>> about = describe(model, LogSchema(item_features={"item": 100}), "weights-1", "0a1b")
        >>> about["inputs"][0]
        {'name': 'candidate_ids', 'shape': ('M', 1), 'dtype': 'int64', 'columns': ('item',)}
    """
    config = graph_config(model)
    tasks = list(schema.tasks)
    inputs, outputs = _inputs(config, schema), [columns_of("logits", tasks, "float32", "M")]
    if config.candidate_set.generate:
        outputs += related_tensors(config)
    lists = {n: "ids in a list, 0 or more" for i in inputs for n in i.shape if str(n).startswith("L_")}
    sizes = {"M": "candidates, 1 or more", "U": "rows of the identity tables, 0 or more", **lists}
    tables = (schema.item_features, schema.candidate_features, schema.context_features)
    tables += (schema.context_lists, schema.item_lists)
    return {
        "format": FORMAT,
        "version": version,
        "vocabulary": vocabulary,
        "sizes": sizes,
        "inputs": [dataclasses.asdict(given) for given in inputs],
        "layout": "each input is contiguous (row-major) on the CPU; copy parts of larger tensors first",
        "outputs": [dataclasses.asdict(given) for given in outputs],
        "tasks": [dataclasses.asdict(task) for task in config.tasks],
        "scores": "a binary task's logit is the log odds; a regression task predicts scale.mean + "
        "scale.deviation * logit, and expm1 of that if scale.log",
        "table_rows": {name: rows for table in tables for name, rows in table.items()},
        "candidate_set": _candidate_set(model),
        "missing": "a missing number is NaN; an unknown or new id is row 0",
        "identity": {
            "features": list(config.ifa.identity_features),
            "buckets": config.ifa.num_identity_buckets,
            "key": "position in features * buckets + id mod buckets; ascending in identity_key. Id 0 is "
            "unknown and has no row; the item's ids are candidate_item_ids",
        },
    }


def _inputs(config: DLRM_IFAConfig, schema: LogSchema) -> tuple[GraphTensor, ...]:
    of_candidate = (*schema.item_features, *schema.candidate_features)
    given = [
        columns_of("candidate_ids", of_candidate, "int64", "M"),
        columns_of("context_ids", schema.context_features, "int64"),
        *number_tensors(schema),
    ]
    for name in schema.context_lists:
        given.append(GraphTensor(f"context_list_{name}", (f"L_{name}",), "int64"))
    for name in schema.item_lists:
        for end in ("", "_candidate"):
            given.append(GraphTensor(f"item_list_{name}{end}", (f"L_{name}",), "int64"))
    return (*given, *state_tensors(config))


def _candidate_set(model: DLRM_IFA) -> dict[str, Any]:
    config = model.config.candidate_set
    about: dict[str, Any] = {"attention": config.attention, "generate": config.generate}
    if config.generate:
        graph = SetGraph(model)
        about |= {
            "inputs": [dataclasses.asdict(given) for given in graph.inputs],
            "outputs": [dataclasses.asdict(given) for given in graph.outputs],
            "sizes": {"M": "candidates, 1 or more", "K": "candidates that are taken, 0 or more"},
            "taken": "indices of the candidates in the set, 0 to M - 1, each once; the other inputs are "
            "the scoring graph's outputs. To generate a set of k, start with nothing taken and k times "
            "take the remaining candidate with the largest gain given those taken",
        }
    return about
