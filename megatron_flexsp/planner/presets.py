"""The cost models that ship with the package."""

from pathlib import Path

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.planner.cost_model import CostModel

_FOLDER = Path(__file__).parent / "cost_models"


def preset_names() -> tuple[str, ...]:
    """Names of the cost models that ship with the package, for ``load_cost_model``."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_cost_model(name_or_path: str | Path) -> CostModel:
    """A shipped cost model by its name, or one from a JSON file.

    Raises
    ------
    FlexSPError
        If it is neither a preset nor a readable cost model.
    """
    if str(name_or_path) in preset_names():
        return CostModel.load(_FOLDER / f"{name_or_path}.json")
    if not Path(name_or_path).exists():
        raise FlexSPError(
            f"{name_or_path} is neither a file nor a preset ({', '.join(preset_names())})",
            "measure a cost model with `flexsp profile`",
        )
    return CostModel.load(name_or_path)
