"""The service's log lines: text, or JSON for log collectors."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Literal

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """One line of JSON per record: time (UTC), level, logger, message, and the traceback if any.

    Example:
        >>> import json, logging
        >>> from ifa_torchrec.serving.service.logs import JsonFormatter
        >>> record = logging.LogRecord("ifa", logging.INFO, "", 0, "weights %s serve", ("a",), None)
        >>> line = json.loads(JsonFormatter().format(record))
        >>> line["level"], line["message"]
        ('INFO', 'weights a serve')
    """

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as(kind: LogFormat) -> None:
    """Set the format of this process's log, which goes to stderr.

    Args:
        kind: "text", or "json", which also turns Python warnings into JSON lines.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", force=True)
    if kind == "json":
        logging.captureWarnings(True)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
