"""The documentation says what the code does, and its links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("patches/*.md")])


def test_the_flags_page_is_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "flags_page.py"))["flags_page"]()
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == page, (
        "run: python scripts/flags_page.py > docs/flags.md"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_are_named_exist(page: Path) -> None:
    known = set(re.findall(r"--flexsp[a-z-]*", (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")))
    named = set(re.findall(r"--flexsp[a-z-]*", page.read_text(encoding="utf-8")))
    assert named <= known
