"""One job of four real processes for all tests of the runtime that need them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def four_processes(torchrun: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the ranks saw; see four_processes.py."""
    folder = tmp_path_factory.mktemp("four_processes")
    torchrun(4, str(Path(__file__).parent / "four_processes.py"), str(folder), fresh=True)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(4)]
