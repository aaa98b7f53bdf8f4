"""The scoring of one request from a user's state, as a graph of plain tensors for other runtimes.

Behind the lookups the graph is CandidateArch and SetArch themselves, traced; no formula is written a
second time. What it contains are PyTorch's own operators (aten), so that nothing of this package, of
TorchRec or of fbgemm is needed to run it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrec.modules.embedding_configs import DataType
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ifa_torchrec.batch import RankingFeatures
from ifa_torchrec.data import LogSchema
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.models.archs import CandidateArch, SetArch
from ifa_torchrec.modules import IFAConfig, InteractionFidelityAttention, UserState
from ifa_torchrec.serving.errors import StateError

FORMAT = "ifa-scoring-graph/1"


@dataclass(frozen=True)
class GraphInput:
    """A tensor that a scoring graph takes.

    Args:
        name: of ``ScoringGraph.forward``'s argument.
        shape: numbers; "M" where it is the number of candidates, "U" that of identity rows.
        dtype: "int64" or "float32".
        columns: names of the last dimension's entries, where they have names.

    Example:
        >>> from ifa_torchrec.serving.export import GraphInput
        >>> GraphInput("candidate_ids", ("M", 2), "int64", ("item", "category")).shape
        ('M', 2)
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    columns: tuple[str, ...] = ()


class ScoringGraph(nn.Module):
    """One request's logits, a function of plain tensors.

    It shares the model's tables. Of the dense part, which is small, it has a copy with the backend
    "reference": plain formulae, where the other backends have operators that only Python knows.

    Args:
        model: DLRM_IFA of interaction "ifa" whose tables are whole on this process, float32 or int8
            from ``quantize_tables``.
        schema: the event log's, which names the features.

    Raises:
        ValueError: the model has no user state.
        StateError: candidates see each other, or its tables are of another type.

    Attributes:
        inputs: a GraphInput for each argument of ``forward``, in order.

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
        >>> none, no_history = torch.empty(0), torch.zeros(1, 2, 4, 5)
        >>> graph(torch.tensor([[7], [9]]), none.long(), none, torch.empty(2, 0),
        ...     no_history[..., 1:], no_history[..., 0], torch.tensor([0])).shape
        torch.Size([2, 1])
    """

    def __init__(self, model: DLRM_IFA, schema: LogSchema) -> None:
        super().__init__()
        config = model.config
        ifa = model.candidate_arch.ifa.config
        if model.sequence_arch.managed:
            raise StateError("tables of managed collisions cannot be exported; serve them with Scorer")
        if config.candidate_set.attention != "none":
            raise StateError(
                f"candidate_set {config.candidate_set.attention!r}: a model whose candidates see each "
                "other cannot be exported, its attention among them takes sizes from tensors; serve it "
                "with Scorer"
            )
        self.item_tables = _tables(
            model.sequence_arch.embedding_collection, [f"candidate_{f}" for f in schema.item_features]
        )
        self.context_tables = nn.ModuleList()
        if model.sparse_arch is not None:
            bags = model.sparse_arch.embedding_bag_collection
            self.context_tables = _tables(bags, schema.context_features)
        plain = dataclasses.replace(ifa, backend="reference")
        self.candidate_arch = CandidateArch(
            config, len(schema.context_features), InteractionFidelityAttention(plain)
        )
        self.set_arch = SetArch(
            config, self.candidate_arch.num_vectors, self.candidate_arch.out_features
        )
        self.candidate_arch.load_state_dict(model.candidate_arch.state_dict())
        self.set_arch.load_state_dict(model.set_arch.state_dict())
        self.inputs = _inputs(ifa, schema)
        self.eval()

    def forward(
        self,
        candidate_ids: Tensor,
        context_ids: Tensor,
        dense: Tensor,
        candidate_dense: Tensor,
        key_value: Tensor,
        key_sum: Tensor,
        count: Tensor,
        identity_key: Tensor | None = None,
        identity_value: Tensor | None = None,
        identity_sum: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            candidate_ids: [M, item features] int64, M >= 1; an id beyond its table is an error.
            context_ids: [Fs] int64.
            dense: [F], and candidate_dense: [M, Fc], float32.
            key_value: [1, H, d_phi, d], key_sum: [1, H, d_phi] and count: [1] int64, one user's
                state at the time of the request; zeros for a user without events.
            identity_key: [U] int64, ascending, U >= 0; with identity_value: [U, L, d] and
                identity_sum: [U, L] the state's tables, where there are identity features. Rows that
                no candidate asks for may be left out.

        Returns:
            Logits [M, T].
        """
        m = candidate_ids.shape[0]
        looked_up = zip(self.item_tables, candidate_ids.unbind(1), strict=True)
        tokens = reduce(torch.add, (table(rows) for table, rows in looked_up))
        context = None
        if len(self.context_tables):
            looked_up = zip(self.context_tables, context_ids.unbind(0), strict=True)
            context = torch.stack([table(row) for table, row in looked_up])[None]
        identity: dict[str, Any] = {}
        if identity_key is not None:
            identity = {
                "identity_offsets": _offsets(identity_key.shape[0]),
                "identity_key": identity_key,
                "identity_value": identity_value,
                "identity_sum": identity_sum,
                "identity_key_range": self.candidate_arch.ifa.config.identity_key_range,
            }
        features = RankingFeatures(
            dense_features=dense[None],
            context_features=KeyedJaggedTensor.empty(),  # they are looked up already
            sequence_features=self._ids(candidate_ids),
            candidate_dense=candidate_dense,
            history_age=dense.new_empty(0),
        )
        candidates = JaggedTensor(tokens, offsets=_offsets(m))
        state = UserState(key_value, key_sum, count, **identity)
        return self.set_arch(self.candidate_arch.attend(context, state, candidates, features))

    def _ids(self, candidate_ids: Tensor) -> KeyedJaggedTensor:
        """The candidates' ids, and no history's; no size is read from a tensor."""
        config = self.candidate_arch.config
        m, features = candidate_ids.shape
        return KeyedJaggedTensor(
            [prefix + f for prefix in config.prefixes for f in config.item_features],
            candidate_ids.T.flatten(),
            lengths=torch.tensor([0, 1]).repeat_interleave(features) * m,
            stride=1,
            length_per_key=[0] * features + [m] * features,
            offset_per_key=[0] * features + [m * i for i in range(features + 1)],
        )


def export_scorer(model: DLRM_IFA, schema: LogSchema) -> ExportedProgram:
    """Export the scoring of one request, for any number of candidates and of identity rows.

    ``torch.export.save`` writes it, ``torch._inductor.aoti_compile_and_package`` compiles it.

    Args:
        model, schema: as ScoringGraph's.

    Returns:
        ExportedProgram with ScoringGraph.forward's arguments, of aten operators.

    Raises:
        StateError: as ScoringGraph.

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
        >>> none, no_history = torch.empty(0), torch.zeros(1, 2, 4, 5)
        >>> score(torch.tensor([[7], [9], [11]]), none.long(), none, torch.empty(3, 0),
        ...     no_history[..., 1:], no_history[..., 0], torch.tensor([0])).shape
        torch.Size([3, 1])
    """
    graph = ScoringGraph(model, schema)
    sizes = {"M": Dim("M", min=1), "U": Dim("U", min=0)}
    example, dynamic = [], []
    for given in graph.inputs:
        # sizes of 0 and 1 would be taken for constants
        shape = [{"M": 3, "U": 5}[size] if isinstance(size, str) else size for size in given.shape]
        example.append(torch.zeros(shape, dtype=getattr(torch, given.dtype)))
        dynamic.append({i: sizes[size] for i, size in enumerate(given.shape) if size in sizes})
    with torch.no_grad():
        return torch.export.export(graph, tuple(example), dynamic_shapes=tuple(dynamic), strict=False)


def describe(model: DLRM_IFA, schema: LogSchema, version: str) -> dict[str, Any]:
    """What the author of a server has to know of an exported graph; to be written as JSON.

    Args:
        model, schema: as ScoringGraph's.
        version: of the weights; the states must be of the same.

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
        >>> about = describe(model, LogSchema(item_features={"item": 100}), version="weights-1")
        >>> about["inputs"][0]
        {'name': 'candidate_ids', 'shape': ('M', 1), 'dtype': 'int64', 'columns': ('item',)}
    """
    config = model.config.ifa
    tasks = list(schema.tasks)
    return {
        "format": FORMAT,
        "version": version,
        "sizes": {"M": "candidates, 1 or more", "U": "rows of the identity tables, 0 or more"},
        "inputs": [dataclasses.asdict(given) for given in _inputs(config, schema)],
        "output": {"name": "logits", "shape": ["M", len(tasks)], "dtype": "float32", "columns": tasks},
        "table_rows": {**schema.item_features, **schema.context_features},
        "identity": {
            "features": list(config.identity_features),
            "buckets": config.identity_buckets,
            "key": "place in features * buckets + id mod buckets; ascending in identity_key. Id 0 is "
            f"unknown and has no row, but for {model.config.item_features[0]!r}, whose id 0 is an item",
        },
    }


class _Int8Table(nn.Module):
    """A quantised table, read without fbgemm: its rows are 4 bytes, scale and bias in float16, then
    the D values, then what aligns them."""

    values: Tensor
    scale_bias: Tensor

    def __init__(self, packed: Tensor, dim: int) -> None:
        super().__init__()
        self.register_buffer("values", packed[:, 4 : 4 + dim].contiguous())
        self.register_buffer("scale_bias", packed[:, :4].contiguous().view(torch.float16))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [*ids.shape, D] float32."""
        scale, bias = F.embedding(ids, self.scale_bias).float().split(1, dim=-1)
        return F.embedding(ids, self.values).float() * scale + bias


def _tables(collection: Any, features: Iterable[str]) -> nn.ModuleList:
    """The table of each feature, from a collection of float or int8 tables."""
    if hasattr(collection, "embedding_bags"):
        configs, tables = collection.embedding_bag_configs(), collection.embedding_bags
    else:
        configs, tables = collection.embedding_configs(), collection.embeddings
    result = {}
    for config in configs:
        weight = tables[config.name].weight
        if config.data_type == DataType.FP32:
            table = nn.Embedding.from_pretrained(weight)
        elif config.data_type == DataType.INT8:
            table = _Int8Table(weight, config.embedding_dim)
        else:
            raise StateError(
                f"table {config.name!r} of {config.data_type.value} cannot be exported; "
                "float32 and int8 can"
            )
        result |= dict.fromkeys(config.feature_names, table)
    return nn.ModuleList(result[feature] for feature in features)


def _inputs(config: IFAConfig, schema: LogSchema) -> tuple[GraphInput, ...]:
    items, contexts = tuple(schema.item_features), tuple(schema.context_features)
    dense, candidate_dense = tuple(schema.dense_features), tuple(schema.candidate_dense)
    d, heads, half_lives = config.head_width, config.num_heads, len(config.identity_half_lives)
    inputs = (
        GraphInput("candidate_ids", ("M", len(items)), "int64", items),
        GraphInput("context_ids", (len(contexts),), "int64", contexts),
        GraphInput("dense", (len(dense),), "float32", dense),
        GraphInput("candidate_dense", ("M", len(candidate_dense)), "float32", candidate_dense),
        GraphInput("key_value", (1, heads, config.feature_width, d), "float32"),
        GraphInput("key_sum", (1, heads, config.feature_width), "float32"),
        GraphInput("count", (1,), "int64"),
    )
    if not config.identity_features:
        return inputs
    return (
        *inputs,
        GraphInput("identity_key", ("U",), "int64"),
        GraphInput("identity_value", ("U", half_lives, d), "float32"),
        GraphInput("identity_sum", ("U", half_lives), "float32"),
    )


def _offsets(rows: int) -> Tensor:
    """[0, rows], of the rows of the one request; no size is read from a tensor."""
    return torch.arange(2) * rows
