"""The application: routes, middleware and refusals put together."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ifa_torchrec.serving.live import LiveScorer
from ifa_torchrec.serving.service.middleware import CallMiddleware
from ifa_torchrec.serving.service.refusals import EXCEPTION_HANDLERS
from ifa_torchrec.serving.service.routes import add_routes


def create_app(
    live: LiveScorer, token: str | None = None, allowed_hosts: Sequence[str] = ("*",)
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        live: ranks, and adds events; close it after the last call.
        token: all but /healthz, /readyz and the page of /docs are for its bearers only; None for
            everyone. A route that is added is for its bearers only, too.
        allowed_hosts: names that calls may be addressed to (their Host header); "*" is any.

    Example:
        >>> import pandas as pd, tempfile
        >>> from pathlib import Path
        >>> from fastapi.testclient import TestClient
        >>> from ifa_torchrec import IFAConfig
        >>> from ifa_torchrec.commands.build_states import BuildStatesConfig, build_states
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> from ifa_torchrec.serving import Scorer, StateStore, open_key_value_store
        >>> from ifa_torchrec.serving.live import Limits, LiveScorer
        >>> from ifa_torchrec.serving.service import create_app
        >>> from ifa_torchrec.training.options import TrainConfig
        >>> from ifa_torchrec.training.run import load_run
        >>> from ifa_torchrec.training.trainer import train
        >>> folder = Path(tempfile.mkdtemp())
        >>> days = pd.date_range("2024-01-01", periods=4)
        >>> log = EventLog.from_pandas(folder / "log", schema=LogSchema(item_features={"item": 4}),
        ...     events=pd.DataFrame({"user": 1, "item": [1, 2, 1, 2], "time": days}),
        ...     requests={"train": pd.DataFrame({"user": [1], "time": days[3:], "candidates": [[1, 3]],
        ...                                      "exposed": [[True, True]], "label": [[1, 0]]})})
        >>> _ = train(TrainConfig(folder / "log", folder / "run", ifa=IFAConfig(8, num_heads=2)))
        >>> _ = build_states(BuildStatesConfig(folder / "run", str(folder / "states"), 4))
        >>> states = open_key_value_store(str(folder / "states"))
        >>> def load():
        ...     run = load_run(folder / "run", sharded=False)
        ...     return Scorer(run.dlrm, run.log, StateStore(states, run.version))
        >>> with LiveScorer(load, Limits()) as live:
        ...     client = TestClient(create_app(live))
        ...     request = {"user": 1, "candidates": [1, 3, "new"], "k": 2}
        ...     ranked = client.post("/rank", json={"requests": [request]}).json()["rankings"][0]
        ...     event = {"position": 4, "user": 1, "item": 2, "time": "2024-01-05T08:00:00Z"}
        ...     added = client.post("/events", json={"events": [event]}).json()
        >>> sorted(ranked), len(ranked["items"])
        (['as_of', 'items', 'logits', 'version'], 2)
        >>> added
        {'results': [{'status': 'taken', 'reason': None}]}
    """
    app = FastAPI(
        title="ifa_torchrec.serve",
        description="Ranks candidates by users' states, and adds events to the states.",
        exception_handlers=EXCEPTION_HANDLERS,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts, www_redirect=False)
    app.add_middleware(CallMiddleware, live=live, token=token, routes=app.routes)
    add_routes(app, live, with_token=token is not None)
    return app
