"""The service's files in docs/launch/service: the dashboard's metrics and the command exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tyro
import yaml

from ifa_torchrec.commands.serve import ServeConfig
from ifa_torchrec.serving.live import STAGES, Limits, Metrics
from ifa_torchrec.serving.service import create_app

FOLDER = Path(__file__).parents[2] / "docs" / "launch" / "service"
ENDINGS = {
    "counter": ["_total"],
    "gauge": [""],
    "histogram": ["_bucket", "_sum", "_count"],
    "info": ["_info"],
}


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def test_the_dashboard_asks_for_metrics_that_there_are_and_for_all():
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    panels = dashboard["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    asked += [of["query"] for of in dashboard["templating"]["list"]]
    named = {name for text in asked for name in re.findall(r"\bifa_\w+", text)}
    there = {
        metric.name: {metric.name + ending for ending in ENDINGS[metric.type]}
        for metric in Metrics()._registry.collect()
    }
    assert named <= set().union(*there.values())
    assert [name for name, samples in there.items() if not samples & named] == []
    assert len({panel["id"] for panel in panels}) == len(panels) and all(asked)
    assert len({tuple(panel["gridPos"].values()) for panel in panels}) == len(panels)
    for text in asked[:-2]:
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}")


def test_the_dashboard_s_labels_are_those_of_the_metrics():
    text = (FOLDER / "dashboard.json").read_text()
    labels = {name: metric._labelnames for name, metric in vars(Metrics()).items() if name[0] != "_"}
    by = {name for found in re.findall(r"sum by \(([^)]*)\)", text) for name in found.split(", ")}
    known = {label for names in labels.values() for label in names}
    assert by <= known | {"le", "instance", "stage"}
    metrics = Metrics()
    for stage in STAGES:
        metrics.stage(stage, 0.001)
        assert f'ifa_stage_seconds_count{{stage="{stage}"}} 1.0' in metrics.text().decode()


def test_the_deployment_runs_a_command_that_there_is_and_asks_for_paths_that_there_are():
    deployment, service = manifest("deployment.yaml"), manifest("service.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["ifa", "serve"]
    config = tyro.cli(ServeConfig, args=container["args"])
    assert config.host == "0.0.0.0" and config.log == "json"
    (port,) = container["ports"]
    assert port["containerPort"] == config.port
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    app = create_app(SimpleNamespace(limits=Limits(), metrics=Metrics()), "secret")
    paths = {route.path for route in app.routes}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        assert get["path"] in paths and get["port"] == port["name"]
    # without a token it refuses to listen on all addresses
    assert "IFA_TOKEN" in [variable["name"] for variable in container["env"]]
    ends = config.drain + config.limits.timeout + 5
    assert pod["terminationGracePeriodSeconds"] > ends
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {*mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    assert any(config.run.is_relative_to(path) for path in mounts)


def test_kustomize_is_given_files_that_there_are_and_the_image():
    kustomization = manifest("kustomization.yaml")
    given = [*kustomization["resources"], *kustomization["configMapGenerator"][0]["files"]]
    assert {*given, "kustomization.yaml"} == {file.name for file in FOLDER.iterdir()}
    assert kustomization["labels"][0]["includeSelectors"]
    image = manifest("deployment.yaml")["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == "ifa-torchrec"  # the name in an overlay's `images`
