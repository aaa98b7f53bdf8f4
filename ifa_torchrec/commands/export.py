"""Export a trained model's scoring as one file that servers without this package can load.

    ifa export --run runs/mine
    ifa export --run runs/mine --out scorer.pt2
    ifa export --run runs/mine --out scorer.pt2 --package --int8
    ifa export --run runs/mine --bundle runs/bundle

Without --out it compiles the dense part, everything after the table lookups, for this machine's
processor into the run; that takes a minute and makes `ifa serve --compiled` faster.

With --bundle it writes a folder with everything that `ifa serve` needs, and no events of the log.

With --out it writes a program that scores one request from a user's state, tables included. For a model
that generates sets (--candidate-set.generate) there is a second file, scorer.set.pt2, one step of
generating a set: from the first program's outputs and the candidates taken so far it computes the gain
of each other candidate. Without --package the files are for torch.export.load. With --package they are
compiled for this machine's processor; torch::inductor::AOTIModelPackageLoader loads them in C++, and
torch._inductor.aoti_load_package in Python.
scorer.json, next to them, describes the inputs. A package refuses ids beyond their tables, but does not
check shapes, dtypes or strides: pass contiguous tensors, and set AOTI_RUNTIME_CHECK_INPUTS=1 in its
environment while you test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from ifa_torchrec.errors import ConfigError, writing
from ifa_torchrec.serving import export_scorer, quantize_tables
from ifa_torchrec.serving.compiled import DENSE_FILE, check_weights, compile_dense
from ifa_torchrec.serving.export import describe, package_scorer
from ifa_torchrec.serving.set_graph import export_set_graph
from ifa_torchrec.training.bundle import write_bundle
from ifa_torchrec.training.run import load_run

_TABLES = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True)
class ExportConfig:
    """Options of ``ifa export``."""

    run: Path
    """Folder of a training run (its --out)."""
    out: Path | None = None
    """File to write, NAME.pt2; NAME.json is written next to it, and NAME.set.pt2 for a model that
    generates sets. By default the dense part is compiled into the run, for ``ifa serve --compiled`` on
    processors like this one."""
    bundle: Path | None = None
    """Folder to write, for ``ifa serve --bundle`` on machines without the log: weights, schema, items
    and vocabulary, and the compiled dense part if the run has it; no events, and no user ids."""
    package: bool = False
    """Compile with AOTInductor; needs a C++ compiler on this machine, but not where it is loaded."""
    int8: bool = False
    """Round the tables to 8 bits."""

    def __post_init__(self) -> None:
        if self.out is None and (self.package or self.int8):
            raise ConfigError("--package and --int8 apply to the file of --out; give --out")
        if self.out is not None and self.bundle is not None:
            raise ConfigError("--bundle and --out exclude each other; call ifa export once for each")
        if self.out is not None and self.out.suffix != ".pt2":
            raise ConfigError(f"--out {self.out}: the name must end in .pt2")


def export(config: ExportConfig) -> dict[str, Any]:
    """Export a run's best checkpoint, or its last if nothing was validated.

    Returns:
        The contents of NAME.json: ``describe``'s entries, and "files", "tables", "runtime" and "torch".
        Without ``out`` only files, runtime and torch; with ``bundle`` the contents of bundle.json.

    Raises:
        CheckpointError: the run has no checkpoint.
        StateError: a model of this kind cannot be exported.
        ConfigError: there is no C++ compiler.
        ExistsError: the bundle's folder exists already.
        WriteError: OUT or the bundle cannot be written.
    """
    if config.bundle is not None:
        run = load_run(config.run, sharded=False)
        compiled = [file for file in [config.run / DENSE_FILE] if file.exists()]
        for file in compiled:  # it may be from an earlier best step
            check_weights(run.dlrm, run.log.schema, file)
        return write_bundle(run, config.bundle, compiled)
    if config.package or config.out is None:
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ConfigError(
                "no C++ compiler found; install g++ or set the environment variable CXX"
            ) from error
    run = load_run(config.run, sharded=False)
    if config.out is None:
        _write(partial(compile_dense, run.dlrm, run.log.schema), config.run / DENSE_FILE)
        return {"files": [DENSE_FILE], "runtime": "AOTInductor", "torch": torch.__version__}
    model = quantize_tables(run.dlrm) if config.int8 else run.dlrm
    programs = {config.out: export_scorer(model, run.log.schema)}
    if model.config.candidate_set.generate:
        programs[config.out.with_suffix(".set.pt2")] = export_set_graph(model)
    for out, program in programs.items():
        _write(partial(package_scorer if config.package else torch.export.save, program), out)
    description = {
        **describe(model, run.log.schema, run.version, run.log.vocabulary.digest),
        "files": [out.name for out in programs],
        "tables": "int8" if config.int8 else _TABLES[run.config.table_dtype],
        "runtime": "AOTInductor" if config.package else "torch.export",
        "torch": torch.__version__,
    }
    about = config.out.with_suffix(".json")
    with writing(about):
        about.write_text(json.dumps(description, indent=2))
    return description


def _write(write: Callable[[Path], None], out: Path) -> None:
    """Write a file atomically."""
    draft = out.with_name(f".{out.name}")
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            write(draft)
            draft.rename(out)
    finally:
        draft.unlink(missing_ok=True)


def main(config: Annotated[ExportConfig, tyro.conf.arg(name="")]) -> None:
    """The command; its help is the top of this file."""
    description = export(config)
    print(json.dumps(description, indent=2))
    dist.destroy_process_group()


main.__doc__ = __doc__
