"""A wheel and an sdist are built, and the wheel works in an environment without the clone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from ifa_torchrec.ops.kernels import native

ROOT = Path(__file__).parents[1]
UV = [sys.executable, "-m", "uv"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.LIBRARY is None, reason=f"the kernels are {native.STATUS}"),
]


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command; if it fails, so does the test, and shows the output."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel built from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    # a copy, since setuptools leaves files behind, and without the kernels built in the clone
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ifa_torchrec", "torchx_components"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    # this environment has everything that the build needs: nothing is downloaded
    run(
        *UV,
        "build",
        "--offline",
        "--no-build-isolation",
        "--python",
        sys.executable,
        "-o",
        out,
        cwd=source,
    )
    return out


@pytest.fixture(scope="module")
def python(built, tmp_path_factory) -> Path:
    """The interpreter of a new environment with the wheel; its dependencies are this environment's."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    interpreter = home / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(*UV, "pip", "install", "--offline", "--no-deps", "--python", interpreter, wheel, cwd=home)
    (packages,) = home.glob("lib/python*/site-packages")
    # .pth files in a folder that a .pth file adds are not read, so the clone stays out
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return interpreter


def test_the_wheel_has_the_package_the_components_and_the_kernels(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("ifa_torchrec/ops/kernels/_native.") for name in names)
    for root in ("ifa_torchrec", "torchx_components"):
        wanted = {str(file.relative_to(ROOT)) for file in (ROOT / root).rglob("*.py")}
        assert wanted <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ifa_torchrec", "torchx_components"}


def test_the_sdist_has_the_kernels_sources(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        names = {Path(*Path(name).parts[1:]) for name in files.getnames()}
    sources = {file.relative_to(ROOT) for file in (ROOT / "ifa_torchrec/ops/kernels/csrc").iterdir()}
    assert sources and sources <= names
    assert not any(name.suffix == ".so" for name in names)


def test_the_wheel_works_from_an_empty_folder(python, tmp_path):
    script = """
import ifa_torchrec
assert ifa_torchrec.ops.encode and ifa_torchrec.data  # without a further import
import torch, torchx_components
from importlib.metadata import entry_points
from torchrec.sparse.jagged_tensor import JaggedTensor

tokens = JaggedTensor(torch.randn(5, 8), lengths=torch.tensor([3, 2]))
config = ifa_torchrec.IFAConfig(8, num_heads=2, backend="native")
print(ifa_torchrec.InteractionFidelityAttention(config)(tokens, tokens).values().shape)
print({point.name: point.value for point in entry_points(group="torchx.components")}["ifa"])
print(ifa_torchrec.__file__, torchx_components.__file__)
"""
    shape, entry, files = run(python, "-c", script, cwd=tmp_path).splitlines()
    assert (shape, entry) == ("torch.Size([5, 8])", "torchx_components")
    home = str(python.parents[1])
    assert all(file.startswith(home) for file in files.split())


def test_the_wheels_kernels_are_reported(python, tmp_path):
    printed = run(python, "-m", "ifa_torchrec", "backends", cwd=tmp_path)
    assert "native    available" in printed
