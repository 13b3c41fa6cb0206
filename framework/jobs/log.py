"""The run directory's log.txt: what the terminal was told and what it was spared, with times."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from framework.recipe.secrets import mask_secrets

_OURS, _WARNINGS = "framework", "py.warnings"


class _Masked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return mask_secrets(super().format(record))


def open_log(path: Path) -> None:
    """Write our records and the libraries' warnings to a file from now on, in place of an earlier run's."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Masked("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name in (_OURS, _WARNINGS):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):  # of an earlier run of a sweep
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger(_OURS).setLevel(logging.INFO)


def note(text: str) -> None:
    """Tell the terminal, on standard error, and the log."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    for line in filter(None, text.splitlines()):
        logging.getLogger(_OURS).info(line)
