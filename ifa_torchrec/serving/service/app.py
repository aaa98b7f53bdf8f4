"""The application: routes, middleware and error responses put together."""

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
        live: ranks candidates and adds events; close it after the last call.
        token: bearer token that calls must have, except to /healthz, /readyz, /docs and /openapi.json;
            None lets everyone call. Routes that you add also need the token.
        allowed_hosts: host names that calls may be addressed to (their Host header); "*" is any.

    Example:
        >>> import pandas as pd, tempfile
        >>> from fastapi.testclient import TestClient
        >>> from torchrec import EmbeddingCollection, EmbeddingConfig
        >>> from ifa_torchrec import DLRM_IFA, DLRM_IFAConfig, IFAConfig
        >>> from ifa_torchrec.data import EventLog, LogSchema
        >>> from ifa_torchrec.serving import Scorer, StateLayout, StateStore, open_key_value_store
        >>> from ifa_torchrec.serving.live import Limits, LiveScorer
        >>> from ifa_torchrec.serving.service import create_app
        >>> log = EventLog.from_pandas(tempfile.mkdtemp() + "/log", schema=LogSchema({"item": 100}),
        ...     events=pd.DataFrame({"user": [1], "item": [2], "time": [pd.Timestamp(2024, 1, 1)]}))
        >>> tables = EmbeddingCollection(tables=[EmbeddingConfig(
        ...     name="item", embedding_dim=8, num_embeddings=100,
        ...     feature_names=["history_item", "candidate_item"])])
        >>> model = DLRM_IFA(None, tables, DLRM_IFAConfig(("item",), ifa=IFAConfig(8, num_heads=2)))
        >>> states = open_key_value_store(tempfile.mkdtemp())
        >>> layout = StateLayout.of(model.candidate_arch.ifa)
        >>> StateStore.begin(states, "weights-1", layout, 0, vocabulary=log.vocabulary.digest).finish()
        >>> def load():  # Scorer has an example with a trained model
        ...     return Scorer(model, log, StateStore(states, "weights-1"))
        >>> with LiveScorer(load, Limits()) as live:
        ...     client = TestClient(create_app(live))
        ...     event = {"position": 0, "user": 1, "item": 2, "time": "2024-01-05T08:00:00Z"}
        ...     added = client.post("/events", json={"events": [event]}).json()
        ...     request = {"user": 1, "candidates": [1, 3, "new"], "k": 2}
        ...     ranked = client.post("/rank", json={"requests": [request]}).json()["rankings"][0]
        >>> added
        {'results': [{'status': 'taken', 'reason': None}]}
        >>> sorted(ranked), len(ranked["items"])
        (['as_of', 'items', 'logits', 'predictions', 'version'], 2)
    """
    app = FastAPI(
        title="ifa serve",
        description="Ranks candidates from user states, and adds events to the states.",
        exception_handlers=EXCEPTION_HANDLERS,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts, www_redirect=False)
    app.add_middleware(CallMiddleware, live=live, token=token, routes=app.routes)
    add_routes(app, live, with_token=token is not None)
    return app
