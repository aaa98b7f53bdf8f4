"""Builds the native kernels; everything else is in pyproject.toml.

They need only a C++17 compiler with OpenMP, no Python or PyTorch headers. If the build fails, the
package is installed without them.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("ifa_torchrec/ops/kernels/csrc")

setup(
    ext_modules=[
        Extension(
            "ifa_torchrec.ops.kernels._native",
            sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            extra_compile_args=[
                *("-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden"),
                *("-Wno-psabi", "-Wno-unknown-pragmas"),
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
