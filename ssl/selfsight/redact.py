"""Secrets stay out of what leaves us: lines on a terminal, errors, tracebacks, report.html.

A signed URL keeps its scheme, host and path, which say where it is; user, password, query and fragment, which open it, become `***`.
"""

import re
from pathlib import Path
from typing import Any

HIDDEN = "***"
_NAMES = (
    r"(?:(?:access|auth|session|security|refresh|id|hf|sas|api|bearer)[_-])?token|(?:client[_-]?|aws[_-])?secret(?:[_-]?access)?(?:[_-]?key)?"
    r"|passw(?:or)?d|sig|signature|credentials?|(?:api|access|account|private|shared[_-]?access|x)[_-]?key(?:[_-]id)?"
)
_URL = re.compile(
    r"""(?P<scheme>\b[a-z][a-z0-9+.-]*://)
        (?P<user>[^\s/'"<>]*@|[^\s/:'"<>]+:(?!\d+(?:[/\s]|$))[^\s@'"<>]*@)?  # a password may hold an unescaped slash
        (?P<path>[^\s?#'"<>]*)
        (?P<query>[?#][^\s'"<>]*(?<![:;,.)\]]))?""",
    re.I | re.X,
)
# With a colon alone it is prose, or a recipe's class_token.
_PAIR = re.compile(
    rf"""(?<![A-Za-z0-9])(?<!class_)(?<!mask_)(?P<name>{_NAMES})(?P<equals>\s?=\s?|["']\s*:\s*)"""
    r"""(?:"[^"\n]*"|'[^'\n]*'|[^\s&;,'"<>]+)""",
    re.I,
)
_SAID = re.compile(r"\b(?P<name>(?:bearer|password:|secret:|api[_-]?key:)\s+)[^\s,;'\"<>]+", re.I)
_SHAPES = re.compile(
    r"\b(?:(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}|hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|sk-[\w-]{20,}|AIza[\w-]{35}|ya29\.[\w-]{20,}|eyJ[\w-]{10,}\.[\w-]{4,}\.[\w-]+)"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def redact(text: str) -> str:
    """The text without user, password, query and fragment of URLs, and without what looks like a key or token.

    Control characters become `?`: the name of a file must not paint the terminal.
    """
    text = _URL.sub(_plain_url, _CONTROL.sub("?", text))
    text = _PAIR.sub(rf"\g<name>\g<equals>{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, _SAID.sub(rf"\g<name>{HIDDEN}", text))


def redact_tree(value: Any) -> Any:
    """The same for every text in nested mappings and lists: what is published, or sent to a tracker."""
    if isinstance(value, dict):
        return {key: redact_tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def without_home(value: Any) -> Any:
    """A home folder as `~`, which whoever loads data understands, and a run's folder by its name alone."""
    if isinstance(value, dict):
        named = {key: Path(inner).name for key, inner in value.items() if key == "run_dir" and isinstance(inner, str)}
        return {key: without_home(inner) for key, inner in value.items()} | named
    if isinstance(value, list | tuple):
        return [without_home(inner) for inner in value]
    home = str(Path.home())
    if isinstance(value, str) and len(home) > 1:
        return re.sub(rf"(?<![\w.~/-]){re.escape(home)}(?![\w.-])", "~", value)
    return value


def _plain_url(match: re.Match[str]) -> str:
    user, query = match["user"], match["query"]
    shown = f"{match['scheme']}{HIDDEN + '@' if user else ''}{match['path']}"
    return f"{shown}{query[0]}{HIDDEN}" if query else shown
