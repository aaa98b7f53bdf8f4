"""Which events weighed most for the top candidate of a request.

    ifa explain --run runs/mine --split test --request 0 --picture why.png

For runs whose interaction is "ifa". An event's weight is its share in what the candidate finds,
averaged over the heads (attention_weights); within a head the shares sum to 1 over the history.
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
    """Event log, a folder or a URI; by default the one the run was trained on."""
    picture: Path | None = None
    """Draw the events on a time line too, head by head, into this .png, .svg or .pdf. Needs the extra
    `demo`."""

    def __post_init__(self) -> None:
        if self.events < 1:
            raise ConfigError(f"--events must be at least 1, got {self.events}")
        if self.picture is not None and self.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"--picture {self.picture}: its name must end in .png, .svg or .pdf")


@torch.no_grad()
def explain(config: ExplainConfig) -> str:
    """The top candidate and the events that weighed most for it, as text, and as a picture if asked.

    Raises:
        ConfigError: the run has another interaction, or the request does not exist or has no history.
        WriteError: the picture cannot be written.
    """
    run, dataset = _with_request(config)
    batch = dataset[[config.request]].to(run.device)
    model = run.dlrm
    model.eval()

    # attention_weights wants what the model hands to its interaction: catch it on the way
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
    # of the one candidate: a million events by 10,000 candidates would be 40 GB a head
    one = JaggedTensor(candidates.values()[[top]], lengths=torch.ones_like(candidates.lengths()))
    compared = None if candidate_ids is None else candidate_ids[[top]]
    weights = ifa.attention_weights(one, history, age, history_ids, compared, **named)
    by_head = weights[0][0].cpu()
    weight = by_head.mean(-1)

    names, item, ids = run.log.item_names(), run.log.schema.item, batch.sequence_features
    bought, chosen = batch.history_item_ids, batch.candidate_item_ids  # of new items their numbers
    bought = ids[f"history_{item}"].values() if bought is None else bought
    chosen = ids[f"candidate_{item}"].values() if chosen is None else chosen
    ranked = weight.argsort(descending=True, stable=True)
    order, ages = ranked[: config.events], batch.history_age.cpu()
    called = [names[number] for number in bought.cpu()[order].tolist()]
    rows = pd.DataFrame(
        {
            "weight": [f"{share:.4f}" for share in weight[order].tolist()],
            "days before": [f"{age:.1f}" for age in ages[order].tolist()],
            **{
                name: _called(run.log.vocabulary[name], ids[f"history_{name}"].values().cpu()[order])
                for name in run.log.schema.event_features
            },
            "event": called,
        }
    )
    said = predictions(logits[[top]], tasks)[0].tolist()
    told = "; ".join(
        f"{task.name} {label:.4g}, predicted {value:.4g}"
        for task, label, value in zip(tasks, batch.labels[top].tolist(), said, strict=True)
    )
    head = (
        f"top of {len(logits)} candidates: {names[int(chosen[top])]} ({told}); "
        f"{len(bought)} events in the history"
    )
    if config.picture is not None and dist.get_rank() == 0:
        heads = head_names(ifa.config)
        draw_explanation(config.picture, head, heads, called, ages[ranked], by_head[ranked])
    return f"{head}\n{rows.to_string(index=False)}"


def _with_request(config: ExplainConfig) -> tuple[Run, RankingDataset]:
    """The run, and the split, which has the request."""
    run = load_run(config.run, config.data)
    if run.config.interaction != "ifa":
        raise ConfigError(
            f"{config.run} was trained with {run.config.interaction!r}; only 'ifa' explains"
        )
    dataset = run.dataset(config.split)
    if not 0 <= config.request < len(dataset):
        raise ConfigError(
            f"--request {config.request}: {config.split} has requests 0 to {len(dataset) - 1}"
        )
    if dataset.history_lengths[config.request] == 0:
        raise ConfigError(f"--request {config.request} has no history to explain by")
    return run, dataset


def _called(known: Ids, rows: torch.Tensor) -> list[str]:
    """What to call the values of an id feature: their external ids; of hashed ones the rows."""
    numbers = rows.tolist()
    called = zip(numbers, known.at(numbers), strict=True)
    return [str(row if i is None else i) if row else "unknown" for row, i in called]


def main(config: Annotated[ExplainConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    text = explain(config)
    if dist.get_rank() == 0:
        print(text)
    dist.destroy_process_group()


main.__doc__ = __doc__
