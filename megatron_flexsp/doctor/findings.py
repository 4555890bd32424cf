"""What the doctor found: one line for each check, with its remedy, and never with a secret."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_flexsp.errors import FlexSPError

SCHEMA = "flexsp.doctor/1"

Status = Literal["ok", "warning", "error"]

# "--tokenizer-model" and "--max-tokens" hold no secret: whole words only.
_SECRET_NAME = re.compile(r"(?:^|[-_])(?:key|token|secret|passwd|password|credentials?|authorization)(?:$|[-_])", re.I)
_SHORTEST_SECRET = 6


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    check: str
    """What was looked at; stable, for those who read the JSON."""

    status: Status
    found: str
    remedy: str = ""
    """What to do about it; empty where there is nothing to do."""


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, remedy: str) -> Finding:
    """The job runs, but not as it might, or it could not be looked at."""
    return Finding(check, "warning", found, remedy)


def error(check: str, found: str, remedy: str) -> Finding:
    """The job would not run."""
    return Finding(check, "error", found, remedy)


def refused(check: str, problem: FlexSPError, remedy: str = "") -> Finding:
    """The job would not run: what this package says of it. ``remedy`` is for a problem that has none of its own."""
    return error(check, problem.found, problem.remedy or remedy)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if anything is an error, else 0."""
    return int(any(finding.status == "error" for finding in findings))


def as_json(findings: Sequence[Finding]) -> dict[str, object]:
    """The object that ``--json`` prints."""
    return {"schema": SCHEMA, "findings": [asdict(finding) for finding in findings]}


def without_secrets(
    findings: Iterable[Finding], words: Sequence[str], environment: Mapping[str, str] = os.environ
) -> list[Finding]:
    """The findings with every secret that the command line or the environment holds replaced by ``***``."""
    secrets = sorted(_secrets(words, environment), key=len, reverse=True)
    if not secrets:
        return list(findings)
    pattern = re.compile("|".join(map(re.escape, secrets)))
    return [
        Finding(item.check, item.status, pattern.sub("***", item.found), pattern.sub("***", item.remedy))
        for item in findings
    ]


def _secrets(words: Sequence[str], environment: Mapping[str, str]) -> set[str]:
    """Values whose name says that they are not for everyone."""
    named = list(environment.items())
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        if not equals and position + 1 < len(words):
            value = words[position + 1]
        named.append((name, value))
    return {
        value
        for name, value in named
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and not value.startswith("-")
    }
