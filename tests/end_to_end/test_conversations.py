"""``--sft``: conversations through Megatron's own SFT tokenizer, planned, equal to one at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .conftest import LLAMA, Run
from .test_equality import UNEQUAL, assert_equal
from .test_multi_token_prediction import further_losses

WORDS = [f"w{number}" for number in range(200)]
MARKS = ["<unk>", "<SPECIAL_233>", "<SPECIAL_10>System", "<SPECIAL_11>User", "<SPECIAL_11>Assistant"]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer of 205 words."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    vocabulary = {word: number for number, word in enumerate([*MARKS, *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<SPECIAL_233>", eos_token="<SPECIAL_233>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty lines: some hold two conversations, one is longer than a sequence, one has no answer to learn."""
    generator = np.random.default_rng(11)

    def message(role: str, most: int = 9) -> dict[str, str]:
        return {"role": role, "content": " ".join(generator.choice(WORDS, generator.integers(1, most)))}

    lines = []
    for number in range(30):
        line = []
        for _ in range(1 + number % 3 // 2):
            line.append(message("system"))
            for _ in range(generator.integers(1, 4)):
                line += [message("user"), message("assistant", 60 if number == 5 else 9)]
        lines.append(line)
    lines[7] = [message("system"), message("user", 30)]
    path = tmp_path_factory.mktemp("conversations") / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def sft(tokenizer: Path, conversations: Path) -> tuple[str, ...]:
    return (
        *(*LLAMA, "--sft", "--tokenizer-type", "SFTTokenizer", "--tokenizer-model", str(tokenizer)),
        *("--sft-tokenizer-prompt-format", "nemotron-h-aligned", "--data-path", str(conversations)),
    )


def test_any_plan_equals_one_conversation_at_a_time(sft: tuple[str, ...], train: Callable, reference: Callable) -> None:
    """Further tokens too: of what is learned at the next one, less and less is left at each depth."""
    model = (*sft, "--mtp-num-layers", "2")
    run: Run = train(4, *model, plan=UNEQUAL, gradients=True)
    became = "40 conversations -> 39 sequences, longest 48 tokens; 1 with nothing to predict and skipped, "
    assert became + "1 longer than --seq-length (truncate)" in run.output
    expected = reference(1, *model)
    assert_equal(run, expected)
    assert further_losses(run) == pytest.approx(further_losses(expected), rel=1e-5)


def test_a_second_run_tokenises_nothing(sft: tuple[str, ...], train: Callable, conversations: Path) -> None:
    first = train(2, *sft, "--train-iters", "1", "--seed", "5", "--flexsp-solver-time-limit", "60")
    again = train(2, *sft, "--train-iters", "1", "--seed", "5", "--flexsp-solver-time-limit", "60")
    assert again.losses == first.losses
    assert "tokenising" not in again.output
    assert not list(conversations.parent.rglob("*.part"))


def test_a_bad_line_is_named(sft: tuple[str, ...], train: Callable, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "system", "content": "w1"}]}\n\n{"messages": 3}\n')
    with pytest.raises(pytest.fail.Exception, match=r"bad\.jsonl, line 3: expected .*messages"):
        train(2, *sft, "--data-path", str(path))
    assert not list(tmp_path.rglob("*.part"))


def test_pieces_of_conversations_are_refused(sft: tuple[str, ...], train: Callable) -> None:
    with pytest.raises(pytest.fail.Exception, match="--flexsp-overlong split with --sft"):
        train(1, *sft, "--flexsp-overlong", "split")
