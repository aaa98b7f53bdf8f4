"""Commands read a log from a bucket of moto's server, which speaks S3 over HTTP on this machine."""

from __future__ import annotations

import math
import re
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from toy import BUSY_USER, Toy

from ifa_torchrec import IFAConfig
from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
from ifa_torchrec.commands.data import Report
from ifa_torchrec.commands.evaluate import EvaluateConfig, evaluate
from ifa_torchrec.commands.explain import ExplainConfig, explain
from ifa_torchrec.data import EventLog, LogError, RankingDataset
from ifa_torchrec.errors import ConfigError
from ifa_torchrec.training.options import TrainConfig, read_options
from ifa_torchrec.training.trainer import train

pytestmark = pytest.mark.slow

IFA = IFAConfig(8, num_heads=2)


@pytest.fixture(scope="module")
def options() -> Generator[str]:
    """The server's part of a URI."""
    server = pytest.importorskip("moto.server", reason="the extra `dev` is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    running.stop()


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("IFA_LOG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def parts(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    path = tmp_path_factory.mktemp("parts") / "log"
    return EventLog.from_pandas(path, toy.events, toy.schema, toy.items, toy.requests, parts=3)


def copied(log: Path, bucket: str, options: str) -> str:
    """The URI of a log in a new bucket."""
    files, place = pafs.FileSystem.from_uri(f"s3://{bucket}/logs{options}&allow_bucket_creation=true")
    files.create_dir(bucket)
    for file in sorted(log.rglob("*")):
        name = file.relative_to(log)
        if file.is_file() and ".columns" not in name.parts:
            with files.open_output_stream(f"{place}/may/{name}") as stream:
                stream.write(file.read_bytes())
    return f"s3://{bucket}/logs/may{options}"


@pytest.fixture(scope="module")
def uri(parts: EventLog, options: str) -> str:
    return copied(parts.path, "shop", options)


def test_commands(uri: str, parts: EventLog, tmp_path: Path) -> None:
    assert EventLog(uri).fingerprint() == parts.fingerprint()
    run = tmp_path / "run"
    result = train(TrainConfig(uri, run, ifa=IFA, max_requests=8))
    assert math.isfinite(result["loss"])
    assert read_options(run).data == uri
    there, here = evaluate(EvaluateConfig(run)), evaluate(EvaluateConfig(run, data=parts.path))
    assert (there["gauc"], there["ne"]) == (here["gauc"], here["ne"])
    requests = RankingDataset(parts, "test").requests
    mine = int(np.flatnonzero(np.asarray(requests["user"]) == BUSY_USER)[-1])
    texts = [explain(ExplainConfig(run, request=mine, data=data)) for data in (None, parts.path)]
    assert texts[0] == texts[1]
    assert build_states(BuildStatesConfig(run, str(tmp_path / "states"), 0))["users"] > 0
    with pytest.raises(ConfigError, match="--out"):
        Report(uri).write()
    assert "<h1>may</h1>" in Report(uri, tmp_path / "may.html").write().read_text()


def test_errors_name_the_place(parts: EventLog, options: str) -> None:
    def refused(uri: str, *words: str) -> None:
        pattern = "".join(f"(?=.*{re.escape(word)})" for word in words)
        with pytest.raises(LogError, match=pattern):
            EventLog(uri)

    refused(f"s3://nobodys/logs/may{options}", "s3://nobodys/logs/may", "no such bucket")
    uri = copied(parts.path, "damaged", options)
    refused(uri.replace("may", "june"), "s3://damaged/logs/june", "no such log")
    files, place = pafs.FileSystem.from_uri(uri)
    part = "events/part-00001.parquet"
    with files.open_output_stream(f"{place}/{part}") as stream:
        stream.write(b"other")
    refused(uri, f"s3://damaged/logs/may/{part}: not the part", "SHA-256")
    files.delete_file(f"{place}/{part}")
    refused(uri, f"s3://damaged/logs/may/{part}: the file is missing")


def test_no_access(uri: str) -> None:
    from moto.core import set_initial_no_auth_action_count

    @set_initial_no_auth_action_count(0)
    def ask() -> None:
        EventLog(uri)

    with pytest.raises(LogError, match=r"s3://shop/logs/may.*no access; set credentials"):
        ask()
