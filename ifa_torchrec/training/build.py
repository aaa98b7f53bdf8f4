"""Builds the model that a training's options and a log's features describe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    ManagedCollisionModule,
    MCHManagedCollisionModule,
)

from ifa_torchrec.batch import Scale
from ifa_torchrec.data import LogSchema
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.models import DLRM_IFA, DLRM_IFAConfig
from ifa_torchrec.modules import Task
from ifa_torchrec.training.options import TrainConfig

EVICTION_INTERVAL = 10
"""Steps between the times when managed collisions give rows to new ids."""
MOST_GATE_VALUES = 64
"""An event feature with at most this many values gates by default."""


def build_model(
    schema: LogSchema, config: TrainConfig, scales: Mapping[str, Scale] | None = None
) -> DLRM_IFA:
    """The model for a log: one table per id feature, on the meta device until it is sharded.

    Args:
        schema: the log's schema.
        config: the training's options.
        scales: how numbers are standardised, by column (EventLog.scales).

    Raises:
        ConfigError: an option names something that is not in the log.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> from ifa_torchrec.training.build import build_model
        >>> schema = LogSchema(item_features={"item": 100}, context_features={"store": 5})
        >>> model = build_model(schema, TrainConfig(data=Path("log"), out=Path("run")))
        >>> model.sequence_arch.embedding_collection.embedding_configs()[0].num_embeddings
        100
    """
    model = model_config(schema, config, scales or {})
    table: dict[str, Any] = {
        "embedding_dim": config.ifa.embedding_dim,
        "init_fn": partial(nn.init.uniform_, a=-config.table_init, b=config.table_init),
        "data_type": DataType(config.table_dtype.upper()),
    }
    meta = torch.device("meta")

    def bags(rows: dict[str, int]) -> EmbeddingBagCollection | None:
        tables = [
            EmbeddingBagConfig(name=f"{f}_table", num_embeddings=n, feature_names=[f], **table)
            for f, n in rows.items()
        ]
        return EmbeddingBagCollection(tables=tables, device=meta) if tables else None

    rows = {**schema.item_features, **schema.event_features, **schema.candidate_features}
    sides = model.history_keys, model.candidate_keys
    sequences = [
        EmbeddingConfig(
            name=f"{f}_table",
            num_embeddings=n,
            feature_names=[keys[f] for keys in sides if f in keys],
            **table,
        )
        for f, n in rows.items()
        if any(f in keys for keys in sides)  # a model without histories does not use event features
    ]
    tables = EmbeddingCollection(tables=sequences, device=meta)
    context, lists = bags(schema.context_features | schema.context_lists), bags(schema.item_lists)
    return DLRM_IFA(
        context if lists is None else (context, lists),
        _managed(tables, config.managed_rows) if config.managed_rows else tables,
        model,
    )


def model_config(schema: LogSchema, config: TrainConfig, scales: Mapping[str, Scale]) -> DLRM_IFAConfig:
    """The configuration of the model for a log.

    Args:
        schema, config, scales: as for ``build_model``.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> from ifa_torchrec.training.build import model_config
        >>> schema = LogSchema(item_features={"item": 100}, event_features={"action": 5})
        >>> model_config(schema, TrainConfig(data=Path("log"), out=Path("run")), {}).history_keys
        {'item': 'history_item', 'action': 'history_action'}
    """
    dense = {
        "dense_features": schema.dense_features,
        "candidate_dense": schema.candidate_dense,
        "item_dense": schema.item_dense,
        "history_dense": schema.event_dense,
    }
    return DLRM_IFAConfig(
        item_features=tuple(schema.item_features),
        dense_in_features=len(schema.dense_features),
        candidate_dense_in_features=len(schema.candidate_dense),
        item_dense_in_features=len(schema.item_dense),
        event_dense_in_features=len(schema.event_dense),
        event_features=tuple(schema.event_features),
        candidate_features=tuple(schema.candidate_features),
        item_vectors=schema.item_vectors,
        scales={name: tuple(scales.get(c, Scale()) for c in columns) for name, columns in dense.items()},
        interaction=config.interaction,
        ifa=dataclasses.replace(config.ifa, gates=gates_of(schema, config)),
        recent_length=config.recent_length,
        search_feature=config.search_feature,
        candidate_set=config.candidate_set,
        over_arch_layer_sizes=config.over_arch_layer_sizes,
        dropout=config.dropout,
        num_tasks=len(schema.tasks),
        tasks=tasks_of(schema, config, scales),
    )


def gates_of(schema: LogSchema, config: TrainConfig) -> dict[str, int]:
    """The event features that gate the model's heads, with their numbers of values.

    Args:
        schema: the log's schema.
        config: the training's options, with --gate.

    Raises:
        ConfigError: --gate names something that is not an event feature.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.training.build import gates_of
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> schema = LogSchema({"item": 100}, event_features={"action": 5, "shop": 1000})
        >>> gates_of(schema, TrainConfig(Path("log"), Path("run")))
        {'action': 5}
    """
    features, names = schema.event_features, config.gate
    if names is None:
        return {name: values for name, values in features.items() if values <= MOST_GATE_VALUES}
    for name in names:
        if name not in features:
            raise ConfigError(
                f"--gate {name}: no such event feature; the event features are {list(features)}"
            )
    return {name: features[name] for name in names}


def tasks_of(schema: LogSchema, config: TrainConfig, scales: Mapping[str, Scale]) -> tuple[Task, ...]:
    """The model's tasks, in the order of the log's tasks.

    Args:
        schema: the log's schema.
        config: the training's options, with the tasks' weights.
        scales: scales of regression tasks, by name; a task without one is not standardised.

    Raises:
        ConfigError: --task-weights or --rank-by names something that is not a task, or a weight is out
            of range.

    Example:
        >>> from pathlib import Path
        >>> from ifa_torchrec.batch import Scale
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.training.build import tasks_of
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> schema = LogSchema({"item": 100}, tasks={"click": "binary", "watch": "regression"})
        >>> config = TrainConfig(Path("log"), Path("run"), rank_by={"click": 1.0, "watch": 0.5})
        >>> click, watch = tasks_of(schema, config, {"watch": Scale(30.0, 12.0)})
        >>> watch.kind, watch.weight, watch.rank, watch.scale.mean
        ('regression', 1.0, 0.5, 30.0)
    """
    for option, weights in (("task-weights", config.task_weights), ("rank-by", config.rank_by)):
        for name in weights:
            if name not in schema.tasks:
                raise ConfigError(f"--{option} {name}: no such task; the tasks are {list(schema.tasks)}")
    if config.rank_by and not any(config.rank_by.values()):
        raise ConfigError(
            "--rank-by: all weights are 0; give at least one other weight, or leave the option out"
        )
    return tuple(
        Task(
            name,
            kind,
            weight=config.task_weights.get(name, 1.0),
            rank=config.rank_by.get(name, 0.0),
            scale=scales.get(name, Scale()),
        )
        for name, kind in schema.tasks.items()
    )


def _managed(tables: EmbeddingCollection, rows: dict[str, int]) -> ManagedCollisionEmbeddingCollection:
    """Managed-collision tables with the given numbers of rows; other tables keep one row per id, and one
    for ids not seen yet."""
    configs = {table.name: table for table in tables.embedding_configs()}
    for name, count in rows.items():
        if name not in configs or not 2 <= count <= configs[name].num_embeddings:
            ids = {name: table.num_embeddings for name, table in configs.items()}
            raise ConfigError(
                f"--managed-rows: {name} {count}: give an item table and a number of rows from 2 to its "
                f"number of ids; the tables and their ids are {ids}"
            )
    managed = [
        dataclasses.replace(table, num_embeddings=rows.get(name, table.num_embeddings + 1))
        for name, table in configs.items()
    ]
    modules: dict[str, ManagedCollisionModule] = {
        table.name: MCHManagedCollisionModule(
            zch_size=table.num_embeddings,
            device=torch.device("cpu"),
            eviction_policy=DistanceLFU_EvictionPolicy(),
            eviction_interval=EVICTION_INTERVAL,
            input_hash_size=configs[table.name].num_embeddings,
            buckets=dist.get_world_size()
            if dist.is_initialized()
            else 1,  # each rank manages its own ids
        )
        for table in managed
    }
    return ManagedCollisionEmbeddingCollection(
        EmbeddingCollection(tables=managed, device=torch.device("meta")),
        ManagedCollisionCollection(modules, managed),
    )
