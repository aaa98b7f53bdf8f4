"""One step of set generation, each candidate's gain given those taken, as a graph of plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models import DLRM_IFA
from ifa_torchrec.models.config import DLRM_IFAConfig
from ifa_torchrec.models.taken import TakenArch
from ifa_torchrec.modules.candidate_set import Related
from ifa_torchrec.serving.graph_tensors import GraphTensor, columns_of, examples_of


def related_tensors(config: DLRM_IFAConfig) -> tuple[GraphTensor, ...]:
    """For a model that generates sets, ScoringGraph's outputs besides the logits, which SetGraph takes.

    Example:
        >>> from ifa_torchrec import DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.serving.set_graph import related_tensors
        >>> [given.shape for given in related_tensors(DLRM_IFAConfig(("item",), ifa=IFAConfig(8)))]
        [('M', 1, 8), ('M', 8), ('M', 1)]
    """
    dim, tasks = config.ifa.embedding_dim, config.num_tasks
    return (
        GraphTensor("query", ("M", tasks, dim), "float32"),
        GraphTensor("key", ("M", dim), "float32"),
        columns_of("ids", config.item_names, "int64", "M"),
    )


class SetGraph(nn.Module):
    """One step of generating a request's set: each candidate's logits and gain, given those taken.

    Its inputs are ScoringGraph's outputs for the request, so a set of k candidates costs one ranking and
    k of these steps.

    Args:
        model: DLRM_IFA that was trained to generate sets.

    Attributes:
        inputs, outputs: one GraphTensor per argument and per result of ``forward``.

    Raises:
        ConfigError: the model was not trained to generate sets.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.modules import CandidateSetConfig
        >>> from ifa_torchrec.serving.set_graph import SetGraph
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2),
        ...     candidate_set=CandidateSetConfig(generate=True)))
        >>> step = SetGraph(model)
        >>> [given.name for given in step.inputs]
        ['logits', 'query', 'key', 'ids', 'taken']
        >>> logits, gain = step(torch.zeros(3, 1), torch.randn(3, 1, 8), torch.randn(3, 8),
        ...     torch.tensor([[5], [6], [7]]), torch.tensor([2]))
        >>> logits.shape, gain.shape
        (torch.Size([3, 1]), torch.Size([3]))
    """

    def __init__(self, model: DLRM_IFA) -> None:
        super().__init__()
        if model.taken_arch is None:
            raise ConfigError(
                "SetGraph: the model was not trained to generate sets; train it with ifa train "
                "--candidate-set.generate"
            )
        self.tasks = model.config.tasks
        self.taken_arch = TakenArch(model.config)
        self.taken_arch.load_state_dict(model.taken_arch.state_dict())
        logits = columns_of("logits", (task.name for task in self.tasks), "float32", "M")
        taken = GraphTensor("taken", ("K",), "int64")
        self.inputs = (logits, *related_tensors(model.config), taken)
        self.outputs = (logits, GraphTensor("gain", ("M",), "float32"))
        self.eval()

    def forward(
        self, logits: Tensor, query: Tensor, key: Tensor, ids: Tensor, taken: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: [M, T], query: [M, T, D], key: [M, D] and ids: [M, F], from ScoringGraph.
            taken: [K] int64, indices 0 to M - 1 of the taken candidates, each once, K >= 0.

        Returns:
            Logits [M, T] given those taken (DLRM_IFA.logits_given), and the gain [M] of adding each
            candidate to the set (DLRM_IFA.set_gain), which is meaningless for candidates already taken.
        """
        nothing = torch.zeros_like(ids[:, 0])
        related = Related(query, key, nothing[:2], nothing, ids)
        return self.taken_arch.step(logits, related, taken, self.tasks)


def export_set_graph(model: DLRM_IFA) -> ExportedProgram:
    """Export SetGraph, for any number of candidates and of taken candidates.

    Args:
        model: see SetGraph.

    Returns:
        ExportedProgram of aten operators that takes SetGraph.forward's arguments.

    Raises:
        ConfigError: see SetGraph.

    Example:
        >>> import torch
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.modules import CandidateSetConfig
        >>> from ifa_torchrec.serving.set_graph import export_set_graph
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2),
        ...     candidate_set=CandidateSetConfig(generate=True)))
        >>> step = export_set_graph(model).module()
        >>> none, ids = torch.empty(0).long(), torch.tensor([[5], [6]])
        >>> step(torch.zeros(2, 1), torch.zeros(2, 1, 8), torch.zeros(2, 8), ids, none)[1].tolist()
        [0.5, 0.5]
    """
    graph = SetGraph(model)
    example, sizes = examples_of(graph.inputs)
    with torch.no_grad():
        return torch.export.export(graph, example, dynamic_shapes=sizes, strict=False)
