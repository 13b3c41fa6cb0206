"""Keep credentials out of messages, logs and run directories."""

from __future__ import annotations

import os
import re

MASK = "***"
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
_USERINFO = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@'\"]+@")
_KNOWN_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|pypi-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,})")
_PARAMETER = re.compile(
    r"(?P<name>(?:token|secret|password|passwd|api_?key|access_?key|signature|sig)\s*[=:]\s*)[^\s&'\",;]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<name>(?:Authorization:\s*)?(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_SHORTEST = 8  # shorter values of such variables would blank ordinary words


def mask_secrets(text: str) -> str:
    """Mask user:password@ in URLs, tokens, and values of secret environment variables."""
    text = _USERINFO.sub(rf"\g<scheme>{MASK}@", text)
    text = _KNOWN_TOKEN.sub(MASK, text)
    text = _PARAMETER.sub(rf"\g<name>{MASK}", text)
    text = _BEARER.sub(rf"\g<name>{MASK}", text)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST and not value.startswith("/") and value in text:
            text = text.replace(value, MASK)
    return text
