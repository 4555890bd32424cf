"""Write docs/flags.md from the parser: ``python scripts/flags_page.py > docs/flags.md``. A test compares them."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_flexsp.megatron.arguments import add_flexsp_arguments

_HEAD = """\
# Flags

Beside Megatron's own, on the command line of `python -m megatron_flexsp.run`. Without `--flexsp` none of them does
anything. This page is made from the parser by `python scripts/flags_page.py > docs/flags.md`.

| flag | meaning | default |
|---|---|---|
"""


def flags_page() -> str:
    """The page, in Markdown."""
    parser = add_flexsp_arguments(argparse.ArgumentParser(add_help=False))
    rows = []
    for action in parser._actions:
        (flag,) = action.option_strings
        values = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else "")
        default = "" if action.default in (None, False) else f"`{action.default}`"
        rows.append(
            f"| `{flag}{f' {values}' if values else ''}` | {(action.help or '') % vars(action)} | {default} |\n"
        )
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(flags_page())
