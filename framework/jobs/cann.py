"""The CANN of this machine: where its environment script points, and which version that is."""

from __future__ import annotations

import os
import re
from pathlib import Path

_FILES = ("ascend_toolkit_install.info", "*-linux/ascend_toolkit_install.info", "version.cfg")
_VERSION = re.compile(r"^(?:version|toolkit_installed_version)=\[?([0-9][\w.]*)", re.MULTILINE)


def cann_home() -> Path | None:
    """Return the toolkit's folder, as its set_env.sh exports it; None without one."""
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    return Path(home) if home else None


def cann_version() -> str | None:
    """Return the installed version (`8.0.RC3`); None where there is no CANN, or its files do not say."""
    home = cann_home()
    if home is None:
        return None
    for pattern in _FILES:
        for path in sorted(home.glob(pattern)):
            found = _VERSION.search(path.read_text(encoding="utf-8", errors="replace"))
            if found:
                return found[1]
    return None
