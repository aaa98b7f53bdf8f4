"""Training in bfloat16, with a compiled dense part, and with gradient clipping."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ifa_torchrec import IFAConfig
from ifa_torchrec.data import EventLog
from ifa_torchrec.distributed import OptimizerConfig
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.training.options import TrainConfig
from ifa_torchrec.training.precision import check_precision, tf32_where_asked
from ifa_torchrec.training.run import load_run
from ifa_torchrec.training.trainer import train

SOFTMAX = IFAConfig(16, num_heads=1, feature_map="hedgehog", readout="softmax")


@pytest.fixture
def config(log: EventLog, tmp_path: Path) -> TrainConfig:
    """Six batches, with the defaults of ``ifa train``."""
    options = {"max_requests": 8, "warmup_steps": 2, "validate": False}
    return TrainConfig(log.path, tmp_path / "run", ifa=SOFTMAX, **options)


def trained(config: TrainConfig, out: str, **changes) -> tuple[dict[str, float], dict]:
    """The result and the weights of a training."""
    config = dataclasses.replace(config, out=config.out / out, **changes)
    return train(config), load_run(config.out, sharded=False).model.state_dict()


def test_bfloat16_trains_to_about_the_same(config):
    result, weights = trained(config, "bf16", precision="bf16")
    expected, in_float32 = trained(config, "fp32")
    assert result["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert result["loss"] != expected["loss"]
    for name, weight in weights.items():
        assert weight.dtype == in_float32[name].dtype


def test_precision_may_change_where_a_run_goes_on(config):
    train(config)
    assert train(dataclasses.replace(config, resume=True, precision="bf16"))["steps"] == 6
    assert json.loads((config.out / "config.json").read_text())["precision"] == "bf16"


def test_tf32_is_for_gpus(config):
    with pytest.raises(ConfigError, match=r"--precision tf32 needs .*got device cpu; give fp32 or bf16"):
        check_precision("tf32", torch.device("cpu"))
    check_precision("tf32", torch.device("cuda"))
    before = torch.backends.cuda.matmul.fp32_precision
    with tf32_where_asked("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    for precision in ("fp32", "bf16"):
        with tf32_where_asked(precision):
            assert torch.backends.cuda.matmul.fp32_precision == before


def test_a_clipped_gradient_has_the_norm_and_its_direction(config, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def noted(self, *given, **options):
        gradients = [
            p.grad.flatten() for g in self.param_groups for p in g["params"] if p.grad is not None
        ]
        norms.append(float(torch.cat(gradients).norm()))
        return step(self, *given, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    clip = OptimizerConfig(clip_norm=0.05)
    trained(config, "clipped", optimizers=clip)
    assert max(norms) == pytest.approx(0.05, rel=1e-3)
    norms.clear()
    trained(config, "free")
    assert max(norms) > 0.1
    for norm in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="clip_norm must be above 0"):
            OptimizerConfig(clip_norm=norm)


def test_a_clipped_run_goes_on_where_it_was(config):
    config = dataclasses.replace(config, optimizers=OptimizerConfig(clip_norm=0.05))
    train(config)
    assert train(dataclasses.replace(config, resume=True))["steps"] == 6
