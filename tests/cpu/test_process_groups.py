"""What gloo does in NCCL's place, between two ranks."""

import json
from collections.abc import Callable
from pathlib import Path


def test_tensors_are_gathered_in_turn_and_together(torchrun: Callable, tmp_path: Path) -> None:
    torchrun(2, str(Path(__file__).parent / "gather_on_two_ranks.py"), str(tmp_path), fresh=True)
    whole = [[[1.0] * size] * 2 + [[2.0] * size] * 2 for size in (3, 5)]
    for rank in range(2):
        seen = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert seen.pop("sums") == [[3.0, 3.0]] * 2
        assert seen == dict.fromkeys(("in turn", "waited for", "together", "together, waited for"), whole)
