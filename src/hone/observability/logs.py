"""Structured logs: one JSON line per record in the process's own file, a short line on the console."""

import logging
import sys
import time
from pathlib import Path

from hone.observability import jsonlines

FIELDS = "fields"
OURS = ("hone", "__main__")
"""The loggers of this process that are ours: a module that is run as a program has the second name."""


def configure(process: str, folder: Path | None = None, *, console: bool = True, level: int = logging.INFO) -> None:
    """Send the log records of this process to `folder`/logs/<process>.log and, if wanted, to standard error.

    Call once, at the start of a process. Records of hone carry their values as `logger.info("what", extra=fields(...))`.
    """
    handlers: list[logging.Handler] = []
    if folder is not None:
        path = folder / "logs" / f"{process}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_handler(logging.FileHandler(path, encoding="utf-8"), _JsonLines(process)))
    if console:
        handlers.append(_handler(logging.StreamHandler(sys.stderr), _Console(process)))
    for name in OURS:
        _attach(logging.getLogger(name), handlers, level)


def fields(**values: object) -> dict[str, dict[str, object]]:
    """The `extra` argument that attaches values to a log record."""
    return {FIELDS: values}


def _attach(logger: logging.Logger, handlers: list[logging.Handler], level: int) -> None:
    logger.setLevel(level)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    for handler in handlers:
        logger.addHandler(handler)


def _handler(handler: logging.Handler, formatter: logging.Formatter) -> logging.Handler:
    handler.setFormatter(formatter)
    return handler


class _JsonLines(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return jsonlines.encode(line)


class _Console(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        values = " ".join(f"{key}={_short(value)}" for key, value in getattr(record, FIELDS, {}).items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        line = f"{clock} {self._process:<12} {mark}{record.getMessage()} {values}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
