"""Reading a checkpoint without trust: its metadata is a pickle, and so is what is no tensor."""

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

_OF_ITSELF = "_extra_state"
"""How the name ends under which a module keeps its configuration."""


class _Unpickler(pickle.Unpickler):
    """Of DCP's metadata: a pickle can name any function, and have it called."""

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
            return _path  # where it was saved, which nobody reads
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise CheckpointError(f"it names {module}.{name}")


def _path(*parts: str) -> str:
    return "/".join(parts)


class CheckpointReader(dcp.FileSystemReader):
    """Reads a checkpoint whose metadata it does not trust.

    Args:
        path: the checkpoint's folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """DCP's metadata, of the kinds that DCP writes alone.

        Raises:
            CheckpointError: it names anything else, which could run code.
            DamagedError: it is not what was written.
        """
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = _Unpickler(stream).load()
        except CheckpointError as error:
            raise CheckpointError(
                f"{file} is no metadata of tensors: {error}, which could run code; do not use this "
                "folder, unless a newer version of torch wrote it"
            ) from error
        except (MemoryError, OSError):
            raise
        except Exception as error:  # of many kinds
            raise DamagedError(f".metadata: {type(error).__name__}: {error}") from error
        if not isinstance(metadata, Metadata):
            raise DamagedError(f".metadata holds a {type(metadata).__name__}")
        return metadata


class CheckpointPlanner(dcp.DefaultLoadPlanner):
    """Says which weights differ, and loads what is no tensor without trust.

    Args:
        path: the checkpoint's folder, for errors.
        grow: whether what the model has may have more rows than what was saved. What its modules say of
            their configuration is then not compared.

    Attributes:
        grown: what has more, and how many rows were saved; the others are left as they were.
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
                    # DCP reads what the parts of both have in common
                    saved[name] = dataclasses.replace(value, size=torch.Size(size))
                elif size != list(value.size):
                    wrong.append(f"{name} is {list(value.size)}, the model's {size}")
        self._refuse(wrong)
        plan = super().create_local_plan()
        if not self._grow:
            return plan
        # a module that has grown says so of itself, and keeps that
        read = [item for item in plan.items if not item.dest_index.fqn.endswith(_OF_ITSELF)]
        return dataclasses.replace(plan, items=read)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        assert self.metadata is not None
        read = {item.storage_index.fqn for plan in global_plan for item in plan.items}
        # a table need not lie on every rank; what is no weight is read only to go on training
        left = [n for n in self.metadata.state_dict_metadata if n.startswith("model.") and n not in read]
        left = [name for name in left if not (self._grow and name.endswith(_OF_ITSELF))]
        self._refuse([f"the model has no {name}" for name in left])
        return super().create_global_plan(global_plan)

    def _refuse(self, wrong: list[str]) -> None:
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"{self._path} is of another model: {'; '.join(sorted(wrong)[:3])}{more}; give the "
                "options, the log and the kinds of sharding that it was trained with"
            )

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self._path}: {read_item.dest_index.fqn} is more than data, which could run code; do "
                "not use this folder"
            ) from error
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], loaded)
