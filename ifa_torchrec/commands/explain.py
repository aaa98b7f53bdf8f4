"""Show which events weighed most for the top candidate of a request.

    ifa explain --run runs/mine --split test --request 0 --picture why.png

Needs a run with interaction "ifa". An event's weight is its share of the candidate's attention, averaged
over the heads (attention_weights); within a head the shares sum to 1 over the history.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import torch.distributed as dist
import tyro
from torchrec.sparse.jagged_tensor import JaggedTensor

from ifa_torchrec.commands.command_line import check_picture
from ifa_torchrec.commands.explain_picture import draw_explanation, head_names
from ifa_torchrec.data import RankingDataset
from ifa_torchrec.data.vocabulary import Ids
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.modules import predictions, ranking_score
from ifa_torchrec.training.run import Run, load_run


@dataclass(frozen=True)
class ExplainConfig:
    """Options of ``ifa explain``."""

    run: Path
    """Folder of a training run (its --out)."""
    split: str = "test"
    """Split of the request."""
    request: int = 0
    """Number of the request in its split."""
    events: int = 10
    """How many events to show."""
    data: str | Path | None = None
    """Event log, a folder or a URI; by default the log that the run was trained on."""
    picture: Path | None = None
    """Also draw the events on a time line per head, to this .png, .svg or .pdf file. Needs the extra
    `demo`."""

    def __post_init__(self) -> None:
        if self.events < 1:
            raise ConfigError(f"--events must be at least 1, got {self.events}")
        check_picture(self.picture)


@torch.no_grad()
def explain(config: ExplainConfig) -> str:
    """The top candidate and the events that weighed most for it, as text, and as a picture if asked.

    Raises:
        ConfigError: the run's interaction is not "ifa", or the request does not exist or has no history.
        WriteError: the picture cannot be written.
    """
    run, dataset = _with_request(config)
    batch = dataset[[config.request]].to(run.device)
    model = run.dlrm
    model.eval()

    # attention_weights needs the inputs of the model's interaction: record them in a hook
    ifa = model.candidate_arch.ifa
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = ifa.register_forward_pre_hook(
        lambda module, given, named: caught.append((given, named)), with_kwargs=True
    )
    logits = model(batch).cpu()
    hook.remove()
    tasks = model.config.tasks
    top = int(ranking_score(logits, tasks).argmax())
    (candidates, history, age, history_ids, candidate_ids), named = caught[0]
    # only the top candidate: weights of a million events by 10,000 candidates take 40 GB per head
    one = JaggedTensor(candidates.values()[[top]], lengths=torch.ones_like(candidates.lengths()))
    compared = None if candidate_ids is None else candidate_ids[[top]]
    weights = ifa.attention_weights(one, history, age, history_ids, compared, **named)
    by_head = weights[0][0].cpu()
    weight = by_head.mean(-1)

    names, item, ids = run.log.item_names(), run.log.schema.item, batch.sequence_features
    # item numbers, which new items have as well; table rows if the batch has none
    history_items, candidate_items = batch.history_item_ids, batch.candidate_item_ids
    history_items = ids[f"history_{item}"].values() if history_items is None else history_items
    candidate_items = ids[f"candidate_{item}"].values() if candidate_items is None else candidate_items
    ranked = weight.argsort(descending=True, stable=True)
    order, ages = ranked[: config.events], batch.history_age.cpu()
    labels = [names[number] for number in history_items.cpu()[order].tolist()]
    rows = pd.DataFrame(
        {
            "weight": [f"{share:.4f}" for share in weight[order].tolist()],
            "days before": [f"{age:.1f}" for age in ages[order].tolist()],
            **{
                name: _labels(run.log.vocabulary[name], ids[f"history_{name}"].values().cpu()[order])
                for name in run.log.schema.event_features
            },
            "event": labels,
        }
    )
    predicted = predictions(logits[[top]], tasks)[0].tolist()
    values = "; ".join(
        f"{task.name} {label:.4g}, predicted {value:.4g}"
        for task, label, value in zip(tasks, batch.labels[top].tolist(), predicted, strict=True)
    )
    head = (
        f"top of {len(logits)} candidates: {names[int(candidate_items[top])]} ({values}); "
        f"{len(history_items)} events in the history"
    )
    if config.picture is not None and dist.get_rank() == 0:
        heads = head_names(ifa.config)
        draw_explanation(config.picture, head, heads, labels, ages[ranked], by_head[ranked])
    return f"{head}\n{rows.to_string(index=False)}"


def _with_request(config: ExplainConfig) -> tuple[Run, RankingDataset]:
    """Load the run and the split, and check that it has the request."""
    run = load_run(config.run, config.data)
    if run.config.interaction != "ifa":
        raise ConfigError(
            f"{config.run}: ifa explain needs interaction 'ifa', got {run.config.interaction!r}"
        )
    dataset = run.dataset(config.split)
    if not 0 <= config.request < len(dataset):
        raise ConfigError(
            f"--request {config.request}: {config.split} has requests 0 to {len(dataset) - 1}"
        )
    if dataset.history_lengths[config.request] == 0:
        raise ConfigError(f"--request {config.request} has no history, so nothing to explain")
    return run, dataset


def _labels(known: Ids, rows: torch.Tensor) -> list[str]:
    """The labels of an id feature's values: their external ids, or their rows if ids are hashed."""
    numbers = rows.tolist()
    pairs = zip(numbers, known.at(numbers), strict=True)
    return [str(row if i is None else i) if row else "unknown" for row, i in pairs]


def main(config: Annotated[ExplainConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    text = explain(config)
    if dist.get_rank() == 0:
        print(text)
    dist.destroy_process_group()


main.__doc__ = __doc__
