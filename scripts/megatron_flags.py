"""Write the table of Megatron's flags that ``flexsp convert`` reads ``--yaml-cfg`` files by.

python scripts/megatron_flags.py 0.17=FOLDER 0.18=FOLDER ... > megatron_flexsp/convert/megatron_flags.txt

Each folder holds a ``megatron`` package; its parser is asked, and the fields of its transformer's configuration.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_HEAD = """\
# Megatron's arguments: name, how the flag takes it, default, flag; then the releases that have it, if not all.
# How: on and off take no value, "both" is --x or --no-x, one and many take values; a field has no flag.
# Default: JSON, or ? where it differs between releases. Made by scripts/megatron_flags.py.
"""

_ASK = """
import argparse, dataclasses, enum, json
from megatron.core.transformer import MLATransformerConfig
from megatron.training import arguments

def plain(value):
    if isinstance(value, enum.Enum):
        return value.name
    try:
        json.dumps(value)
    except TypeError:
        return None
    return value

rows = []
parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
kinds = {"_StoreTrueAction": "on", "_StoreFalseAction": "off", "BooleanOptionalAction": "both"}
for action in parser._actions:
    flag = next((flag for flag in action.option_strings if flag.startswith("--")), None)
    if flag is not None and action.dest != "help":
        how = kinds.get(type(action).__name__, "one" if action.nargs is None else "many")
        rows.append((action.dest, how, flag, plain(action.default)))
flags = {row[0] for row in rows}
for field in dataclasses.fields(MLATransformerConfig):
    if field.name not in flags:
        default = field.default if field.default is not dataclasses.MISSING else None
        rows.append((field.name, "field", "-", plain(default)))
print("\\n" + json.dumps(rows))
"""


def arguments_of(folder: str) -> list[tuple[str, str, str, Any]]:
    """Name, how, flag and default of every argument of the Megatron there."""
    environment = {**os.environ, "PYTHONPATH": str(Path(folder).resolve()), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", _ASK], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


def table(releases: dict[str, str]) -> str:
    """The table of releases, by their names and folders."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for release, folder in releases.items():
        for name, how, flag, default in arguments_of(folder):
            found.setdefault((name, how, flag), {})[release] = default
    lines = []
    for (name, how, flag), defaults in sorted(found.items()):
        texts = {json.dumps(default, separators=(",", ":")) for default in defaults.values()}
        default = texts.pop() if len(texts) == 1 else "?"
        some = [",".join(defaults)] if len(defaults) < len(releases) else []
        lines.append(" ".join([name, how, default.replace(" ", "\\u0020"), flag, *some]))
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table(dict(word.split("=", 1) for word in sys.argv[1:])))
