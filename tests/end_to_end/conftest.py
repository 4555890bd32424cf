"""Megatron jobs on the CPU: a small data set, a small model, losses and gradients of a run."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

_MODEL = """
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 48
    --max-position-embeddings 128 --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion
    --tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 8
"""
LLAMA = ("--position-embedding-type", "rope", "--normalization", "RMSNorm", "--swiglu")
_TRAINING = """
    --micro-batch-size 1 --global-batch-size 12 --train-iters 5 --lr 1e-2 --lr-decay-style constant
    --calculate-per-token-loss --split 100,0,0 --eval-iters 0 --eval-interval 1000 --log-interval 1
    --init-method-std 0.1
"""
JOB = (_MODEL + _TRAINING).split()

TRANSFORMER_ENGINE = ("--transformer-impl", "transformer_engine")
"""Runs on its stand-in, which every run with this argument finds."""

LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+) .*?grad norm: ([0-9.]+)")


@dataclass
class Run:
    """What a job printed and saved."""

    output: str
    folder: Path

    @property
    def losses(self) -> dict[int, float]:
        """The printed loss of each iteration."""
        found = {int(step): float(loss) for step, loss, _ in LOSS.findall(self.output)}
        assert found, self.output
        return found

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Every parameter's gradient on the first step, by model-parallel rank and name."""
        tensors = {}
        files = sorted((self.folder / "wgrads" / "iter_0000001").glob("*.pth"))
        assert files, self.output
        for file in files:
            for chunk, parameters in torch.load(file).items():
                for name, gradient in parameters.items():
                    # Wrappers differ; the name from the model on does not.
                    tensors[f"{file.stem}/{chunk}/{name.removeprefix('module.')}"] = gradient
        return tensors


def environment_of(arguments: Sequence[str], megatron: Path | None = None) -> dict[str, str]:
    """What a run with these arguments needs in its environment; ``megatron`` is a folder with another release."""
    first = [str(ROOT / "tests" / "stand_ins")] if "transformer_engine" in arguments else []
    first += [] if megatron is None else [str(megatron)]
    if not first:
        return {}
    return {"PYTHONPATH": os.pathsep.join([*first, str(ROOT), os.environ.get("PYTHONPATH", "")])}


def written_documents(prefix: Path, lengths: list[int], seed: int) -> Path:
    """Write a data set of documents of these lengths; its prefix comes back."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(torch.from_numpy(generator.integers(0, 256, length)), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a data set of 60 documents of 2 to 120 tokens, three of them longer than a sequence may be."""
    lengths = [*np.random.default_rng(7).integers(2, 40, 57).tolist(), 120, 97, 50]
    return written_documents(tmp_path_factory.mktemp("documents") / "small", lengths, seed=7)


@pytest.fixture(scope="session")
def even_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of an even number of tokens to predict: sequence parallelism takes no odd ones without packs."""
    lengths = [2 * half + 1 for half in range(1, 23)] * 3
    return written_documents(tmp_path_factory.mktemp("documents") / "even", lengths, seed=8)


@pytest.fixture(scope="session")
def write_documents(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[int]], Path]:
    """Write a data set of documents of these lengths and return its prefix."""
    return lambda lengths: written_documents(tmp_path_factory.mktemp("documents") / "documents", lengths, seed=8)


@pytest.fixture
def train(torchrun: Callable, documents: Path, tmp_path: Path) -> Callable[..., Run]:
    """Run a job with FlexSP, under a prescribed plan if one is given, else under the planner's own."""

    def run(
        nproc: int,
        *arguments: str,
        plan: str | None = None,
        gradients: bool = False,
        kept: bool = False,
        megatron: Path | None = None,
        script: dict[str, str] | None = None,
        **options: object,
    ) -> Run:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        environment = environment_of(arguments, megatron) | (script or {})
        if plan is not None:
            environment["FLEXSP_TEST_PLAN"] = plan
        if kept:
            environment["FLEXSP_TEST_KEPT"] = "1"
        saving: list[str] = []
        if gradients:
            environment["FLEXSP_TEST_NO_CHECKPOINT"] = "1"
            saving = ["--save", str(folder), "--save-interval", "5", "--save-wgrads-interval", "1"]
        result = torchrun(
            nproc,
            *("-m", "megatron_flexsp.run", "--cpu", str(HERE / "prescribed.py")),
            *(*JOB, "--data-path", str(documents), *saving),
            *("--flexsp", "--flexsp-max-tokens-per-rank", "4096", *arguments),
            env=environment,
            **options,
        )
        return Run(result.stdout + result.stderr, folder)

    return run


@pytest.fixture(scope="session")
def reference(torchrun: Callable, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The unpacked run of a model and a model-parallel layout, started once for each."""
    known: dict[tuple[int, tuple[str, ...], Path | None, bool], Run] = {}

    def run(nproc: int, *arguments: str, megatron: Path | None = None, packs: bool = False) -> Run:
        key = (nproc, arguments, megatron, packs)
        if key not in known:
            folder = tmp_path_factory.mktemp("reference")
            result = torchrun(
                nproc,
                str(HERE / "unpacked.py"),
                *(*JOB, "--data-path", str(documents)),
                *("--save", str(folder), "--save-interval", "5", "--save-wgrads-interval", "1", *arguments),
                env=environment_of(arguments, megatron) | ({"FLEXSP_TEST_PACKS": "1"} if packs else {}),
            )
            known[key] = Run(result.stdout + result.stderr, folder)
        return known[key]

    return run
