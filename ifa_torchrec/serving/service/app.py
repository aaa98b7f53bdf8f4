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
        >>> import numpy as np, tempfile
        >>> from fastapi.testclient import TestClient
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.data import LogSchema
        >>> from ifa_torchrec.serving import Scorer, StateLayout, StateStore, open_key_value_store
        >>> from ifa_torchrec.serving.live import Limits, LiveScorer
        >>> from ifa_torchrec.serving.service import create_app
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2)))
        >>> lmdb = open_key_value_store(tempfile.mkdtemp())
        >>> layout = StateLayout.of(model.candidate_arch.ifa)
        >>> StateStore.begin(lmdb, "weights-1", layout, position=0).finish()
        >>> def load():  # Scorer has an example with a model that was trained
        ...     store = StateStore(lmdb, "weights-1")
        ...     return Scorer(model, LogSchema({"item": 100}), {"item": np.arange(100)}, store)
        >>> with LiveScorer(load, Limits()) as live:
        ...     client = TestClient(create_app(live))
        ...     event = {"position": 0, "user": 1, "item": 2, "time": "2024-01-05T08:00:00Z"}
        ...     added = client.post("/events", json={"events": [event]}).json()
        ...     request = {"user": 1, "candidates": [0, 2, 1], "k": 2}
        ...     ranked = client.post("/rank", json={"requests": [request]}).json()["rankings"][0]
        >>> added
        {'new': 1, 'duplicates': 0}
        >>> sorted(ranked), len(ranked["items"])
        (['as_of', 'items', 'logits', 'version'], 2)
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
