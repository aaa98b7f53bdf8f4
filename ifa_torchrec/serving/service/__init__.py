"""The HTTP service.

- ``messages``: requests and responses, and what is checked of them.
- ``bodies``: JSON or MessagePack, read and written.
- ``refusals``: what is refused, and what went wrong, as responses.
- ``routes``: what is done, by path.
- ``middleware``: what is done around every call.
- ``app``: create_app, which puts these together.
- ``logs``: lines of the log, text or JSON.
- ``connections``: what uvicorn is given, so that nobody keeps others out.
"""

from ifa_torchrec.errors import require

require("serve", "fastapi", "httptools", "msgpack", "pydantic", "uvicorn")

# ruff: noqa: E402 (what is not installed is named before an import fails on it)
from ifa_torchrec.serving.service.app import create_app

__all__ = ["create_app"]
