"""Log lines: text for a person, or JSON for a machine. A record's `fields` are its structured part."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

FORMATS = ("text", "json")


def set_up(level: str, style: str) -> None:
    """Everything to standard error, in `style` (one of FORMATS)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_is_of_use)
    handler.setFormatter(
        JsonFormatter() if style == "json" else TextFormatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(style == "json")


def log_fields(logger: logging.Logger, level: int, message: str, fields: dict[str, Any]) -> None:
    """Logs `message` with `fields`, which are `key=value` in text and keys of the object in JSON."""
    logger.log(level, message, extra={"fields": fields})


def _is_of_use(record: logging.LogRecord) -> bool:
    """False for what gRPC logs, with a traceback, whenever a caller has gone before its answer was sent, or sends
    metadata that is no UTF-8: callers must not be able to fill the log with that."""
    kind = record.exc_info[0] if record.exc_info else None
    noise = kind is not None and kind.__name__ in ("ExecuteBatchError", "UnicodeDecodeError")
    return not (noise and record.name.startswith("grpc."))


class TextFormatter(logging.Formatter):
    """One line, with `key=value` after the message."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        fields: dict[str, Any] = getattr(record, "fields", {})
        return " ".join([line, *(f"{key}={_plain(value)}" for key, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _plain(value: Any) -> str:
    text = str(value)
    # repr: a request's text must not be able to write lines of its own into the log.
    return text if text and text.isprintable() and not any(c in text for c in " '\"=") else repr(text)
