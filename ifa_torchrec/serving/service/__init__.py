"""The HTTP service.

- ``messages``: the models of requests and responses, and their checks.
- ``bodies``: reading and writing bodies as JSON or MessagePack.
- ``refusals``: errors as responses.
- ``routes``: what each path does.
- ``middleware``: what happens around every call.
- ``app``: create_app, which puts these together.
- ``logs``: log lines as text or JSON.
- ``connections``: limits on connections, so that no client can lock others out.
- ``workers``: several processes on one port.
"""

from ifa_torchrec.errors import require

require("serve", "fastapi", "httptools", "msgpack", "pydantic", "uvicorn")

# ruff: noqa: E402 (missing packages are named before an import fails)
from ifa_torchrec.serving.service.app import create_app

__all__ = ["create_app"]
