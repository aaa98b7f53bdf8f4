"""Reading an untrusted checkpoint: its metadata and its non-tensor entries are pickles."""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from ifa_torchrec.distributed.errors import CheckpointError, DamagedError

_EXTRA_STATE = "_extra_state"
"""Suffix of the state_dict key under which a module saves its configuration."""


class _Unpickler(pickle.Unpickler):
    """Unpickles DCP's metadata, and only its types: a pickle can name any function and call it."""

    _ALLOWED = (
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):
            return _path  # the folder it was saved to, which is not used
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise CheckpointError(f"it names {module}.{name}")


def _path(*parts: str) -> str:
    return "/".join(parts)


class CheckpointReader(dcp.FileSystemReader):
    """Reads a checkpoint without trusting its metadata.

    Args:
        path: the checkpoint's folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """DCP's metadata; only the types that DCP writes are allowed.

        Raises:
            CheckpointError: it names another type or function, which could run code.
            DamagedError: it is not what was written.
        """
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _Unpickler(stream).load()
        except CheckpointError as error:
            raise CheckpointError(
                f"{file} is not plain tensor metadata: {error}, which could run code; do not use this "
                "folder, unless a newer version of torch wrote it"
            ) from error
        except (MemoryError, OSError):
            raise
        except Exception as error:  # unpickling garbage raises many types
            raise DamagedError(f".metadata: {type(error).__name__}: {error}") from error
        if not isinstance(metadata, Metadata):
            raise DamagedError(f".metadata is a {type(metadata).__name__}, not DCP's Metadata")
        return metadata


class CheckpointPlanner(dcp.DefaultLoadPlanner):
    """Reports which weights differ, and loads non-tensor entries without trusting them.

    Args:
        path: the checkpoint's folder, for error messages.
        grow: whether the model's weights may have more rows than the saved ones. The modules'
            configurations are then not compared.

    Attributes:
        grown: saved number of rows by name, for each weight that has more rows now; loading leaves its
            extra rows unchanged.
    """

    def __init__(self, path: Path, grow: bool = False) -> None:
        super().__init__()
        self._path, self._grow = path, grow
        self.grown: dict[str, int] = {}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        wrong = [f"{name} is not in it" for name in sorted(self.state_dict.keys() - saved.keys())]
        for name in self.state_dict.keys() & saved.keys():
            if isinstance(value := saved[name], TensorStorageMetadata):
                size = list(self.state_dict[name].size())
                if self._grow and size[1:] == list(value.size)[1:] and size > list(value.size):
                    self.grown[name] = value.size[0]
                    # DCP reads the overlap of the saved and the current shards
                    saved[name] = dataclasses.replace(value, size=torch.Size(size))
                elif size != list(value.size):
                    wrong.append(f"{name} has shape {list(value.size)}, the model's {size}")
        self._refuse(wrong)
        plan = super().create_local_plan()
        if not self._grow:
            return plan
        # the configuration of a module that has grown differs: keep the module's own
        read = [item for item in plan.items if not item.dest_index.fqn.endswith(_EXTRA_STATE)]
        return dataclasses.replace(plan, items=read)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        assert self.metadata is not None
        read = {item.storage_index.fqn for plan in global_plan for item in plan.items}
        # a rank may have no shard of a table; what is not a weight is read only to resume training
        left = [n for n in self.metadata.state_dict_metadata if n.startswith("model.") and n not in read]
        left = [name for name in left if not (self._grow and name.endswith(_EXTRA_STATE))]
        self._refuse([f"the model has no {name}" for name in left])
        return super().create_global_plan(global_plan)

    def _refuse(self, wrong: list[str]) -> None:
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"{self._path} is of another model: {'; '.join(sorted(wrong)[:3])}{more}; use the "
                "options, the log and the sharding types that it was trained with"
            )

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self._path}: {read_item.dest_index.fqn} contains more than data and could run code; "
                "do not use this folder"
            ) from error
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)
