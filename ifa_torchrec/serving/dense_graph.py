"""The scoring of one request after the table lookups, as a graph of plain tensors for compilers.

It traces CandidateArch and SetArch themselves; no formula is duplicated.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.data import LogSchema
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.models.archs import CandidateArch, Candidates, Lookups, SetArch
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.modules import InteractionFidelityAttention, UserState
from ifa_torchrec.serving.graph_tensors import GraphTensor, columns_of


class DenseGraph(nn.Module):
    """Computes one request's logits from its table rows, its numbers and a user state.

    It copies the model's dense part, which is small, and uses the "reference" backend: plain formulae
    instead of custom operators that exist only in Python.

    Args:
        model: DLRM_IFA with interaction "ifa".
        schema: the event log's schema, which names the features.

    Raises:
        ConfigError: the model has no user state.

    Attributes:
        inputs: one GraphTensor per argument of ``forward``, in order.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.serving.dense_graph import DenseGraph
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2)))
        >>> graph = DenseGraph(model, LogSchema(item_features={"item": 100}))
        >>> [given.name for given in graph.inputs]
        ['rows', 'candidate_ids', 'dense', 'candidate_dense', 'key_value', 'key_sum', 'count']
        >>> none, no_history = torch.empty(0), (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4))
        >>> graph(torch.randn(2, 8), torch.tensor([[7], [9]]), none, torch.empty(2, 0),
        ...     *no_history, torch.tensor([0])).shape
        torch.Size([2, 1])
    """

    def __init__(self, model: DLRM_IFA, schema: LogSchema) -> None:
        super().__init__()
        self.config = config = graph_config(model)
        plain = dataclasses.replace(config.ifa, backend="reference")
        context = len(schema.context_features) + len(schema.context_lists)
        self.candidate_arch = CandidateArch(config, context, InteractionFidelityAttention(plain))
        self.set_arch = SetArch(
            dataclasses.replace(config, ifa=plain),
            self.candidate_arch.num_vectors,
            self.candidate_arch.out_features,
        )
        for name in ("candidate_arch", "set_arch"):
            getattr(self, name).load_state_dict(getattr(model, name).state_dict())
        self.inputs = _inputs(config, schema)
        self.eval()

    def forward(self, *tensors: Tensor) -> Tensor:
        """
        Args:
            tensors: the tensors that ``inputs`` describes, in that order, without those that the model
                does not use. Tensors that ScoringGraph.forward takes too are documented there; the
                others, float32, are

                - rows: [M, D], the sum of the table rows of each candidate's ids.
                - context: [1, Fs, D], rows of the context features, then of the context lists.
                - lists: [M, Fl, D], pooled rows of the candidates' item lists.

        Returns:
            Logits [M, T].
        """
        names = [described.name for described in self.inputs]
        return self.set_arch(self.describe(dict(zip(names, tensors, strict=True))))

    def describe(self, given: dict[str, Tensor]) -> Candidates:
        """Describe each candidate on its own, before the candidates attend to each other.

        Args:
            given: the tensors of ``forward``, by name.
        """
        ids = given["candidate_ids"]
        m = ids.shape[0]
        features = RankingFeatures(
            dense_features=given["dense"][None],
            context_features=KeyedJaggedTensor.empty(),  # already looked up
            sequence_features=self._ids(ids),
            candidate_dense=given["candidate_dense"],
            history_age=given["dense"].new_empty(0),
            item_dense=given.get("item_dense"),
            item_vectors=given.get("item_vectors"),
            candidate_items=torch.arange(m),
            candidate_item_ids=given.get("candidate_item_ids"),
        )
        candidates = JaggedTensor(given["rows"], offsets=_offsets(m))
        lookups = Lookups(given.get("context"), given.get("lists"), None, candidates)
        return self.candidate_arch.attend(lookups, features, self._state(given))

    def _state(self, given: dict[str, Tensor]) -> UserState:
        dense = given["key_value"], given["key_sum"], given["count"]
        if "identity_key" not in given:
            return UserState(*dense)
        key, total = given["identity_key"], given["identity_sum"]
        return UserState(
            *dense,
            _offsets(key.shape[0]),
            key,
            given.get("identity_value", total[..., None][..., :0]),
            total,
            self.candidate_arch.ifa.config.identity_key_range,
        )

    def _ids(self, candidate_ids: Tensor) -> KeyedJaggedTensor:
        """The candidates' ids as a KeyedJaggedTensor, without reading a size from a tensor."""
        m, features = candidate_ids.shape
        return KeyedJaggedTensor(
            list(self.config.candidate_keys.values()),
            candidate_ids.T.flatten(),
            lengths=torch.ones(features, dtype=torch.int64) * m,
            stride=1,
            length_per_key=[m] * features,
            offset_per_key=[m * i for i in range(features + 1)],
        )


def graph_config(model: DLRM_IFA) -> DLRM_IFAConfig:
    """The model's configuration for its graphs. Its ``ifa`` is the interaction module's own
    configuration, which may differ from ``model.config.ifa``.

    Raises:
        ConfigError: the model has no user state.

    Example:
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import (
        ...     DLRM_IFA, DLRM_IFAConfig, IFAConfig, InteractionFidelityAttention)
        >>> from ifa_torchrec.serving.dense_graph import graph_config
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> config = DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2))
        >>> own = InteractionFidelityAttention(IFAConfig(8, num_heads=4))
        >>> graph_config(DLRM_IFA(None, tables, config, own)).ifa.num_heads
        4
    """
    return dataclasses.replace(model.config, ifa=model.candidate_arch.ifa.config)


def _inputs(config: DLRM_IFAConfig, schema: LogSchema) -> tuple[GraphTensor, ...]:
    """The inputs of a DenseGraph."""
    dim = config.ifa.embedding_dim
    of_candidate = (*schema.item_features, *schema.candidate_features)
    given = [
        GraphTensor("rows", ("M", dim), "float32"),
        columns_of("candidate_ids", of_candidate, "int64", "M"),
    ]
    if context := len(schema.context_features) + len(schema.context_lists):
        given.append(GraphTensor("context", (1, context, dim), "float32"))
    if schema.item_lists:
        given.append(GraphTensor("lists", ("M", len(schema.item_lists), dim), "float32"))
    return (*given, *number_tensors(schema), *state_tensors(config))


def number_tensors(schema: LogSchema) -> list[GraphTensor]:
    """The numeric inputs of a scoring graph, for the request and for its candidates.

    Example:
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.serving.dense_graph import number_tensors
        >>> [given.name for given in number_tensors(LogSchema(item_features={"item": 3}))]
        ['dense', 'candidate_dense']
    """
    vectors = [f"{name}_{i}" for name, n in schema.item_vectors.items() for i in range(n)]
    given = [
        columns_of("dense", schema.dense_features, "float32"),
        columns_of("candidate_dense", schema.candidate_dense, "float32", "M"),
    ]
    if schema.item_dense:
        given.append(columns_of("item_dense", schema.item_dense, "float32", "M"))
    if vectors:
        given.append(columns_of("item_vectors", vectors, "float32", "M"))
    return given


def state_tensors(config: DLRM_IFAConfig) -> list[GraphTensor]:
    """The state inputs of a scoring graph, and the candidates' item ids that it compares with them.

    Example:
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.serving.dense_graph import state_tensors
        >>> [given.name for given in state_tensors(DLRM_IFAConfig(("item",), ifa=IFAConfig(8)))]
        ['key_value', 'key_sum', 'count']
    """
    ifa, given = config.ifa, list[GraphTensor]()
    if config.item_names[0] in ifa.identity_features:
        given.append(GraphTensor("candidate_item_ids", ("M",), "int64"))
    d, heads, half_lives = ifa.head_width, ifa.num_heads, len(ifa.identity_head_half_lives)
    given += [
        GraphTensor("key_value", (1, heads, ifa.feature_width, d), "float32"),
        GraphTensor("key_sum", (1, heads, ifa.feature_width), "float32"),
        GraphTensor("count", (1,), "int64"),
    ]
    if ifa.identity_features:
        given += [
            GraphTensor("identity_key", ("U",), "int64"),
            GraphTensor("identity_sum", ("U", half_lives), "float32"),
        ]
        if ifa.identity_width:  # otherwise the tables have no values
            shape = ("U", half_lives, ifa.identity_width)
            given.append(GraphTensor("identity_value", shape, "float32"))
    return given


def _offsets(rows: int) -> Tensor:
    """Offsets [0, rows] of a single request, without reading a size from a tensor."""
    return torch.arange(2) * rows
