"""``flexsp prepare`` as a user runs it: real processes, exit codes, and what is printed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_flexsp.cli import main


def flexsp(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_flexsp.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)


def test_prepares_json_lines_and_prints_the_lengths(tmp_path: Path) -> None:
    part = tmp_path / "part.jsonl"
    documents = ["x" * length for length in (0, 10, 100, 1000, 5000)]
    part.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents), encoding="utf-8")
    prefix = tmp_path / "out" / "web [1]"
    done = flexsp("prepare", "--jsonl", str(part), "--json-key", "body", "--output-prefix", str(prefix))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["web [1].bin", "web [1].idx"]
    assert "4 documents, 6,114 tokens, 1 empty documents left out" in done.stdout
    assert "longest 5,001" in done.stdout
    assert "8,192" in done.stdout
    assert f"--data-path '{prefix}' --tokenizer-type NullTokenizer --vocab-size 257" in done.stdout


def test_a_bad_line_is_one_line_on_stderr_and_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tmp_path / "part.jsonl"
    part.write_text('{"text": "a"}\n{"text": 7}\n', encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        main(["prepare", "--jsonl", str(part), "--output-prefix", str(tmp_path / "set")])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last_line = printed.err.splitlines()[-1]  # torch may have logged something before
    assert last_line == f"flexsp: {part}, line 2: 'text' must be a string, found a number"
    assert "Traceback" not in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["part.jsonl"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    pipe, out = tmp_path / "pipe.jsonl", tmp_path / "out"
    os.mkfifo(pipe)
    out.mkdir()
    command = [sys.executable, "-m", "megatron_flexsp.cli", "prepare", "--jsonl", str(pipe)]
    process = subprocess.Popen(
        [*command, "--output-prefix", str(out / "set")],
        stderr=subprocess.DEVNULL,
        # A shell starts background jobs, and so these tests may have been started, with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        with pipe.open("w") as writer:  # opens once the other side reads
            writer.write('{"text": "a"}\n')
            writer.flush()
            assert list(out.iterdir()), "a temporary file is being written"
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.wait()
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--stdlib or --jsonl FILES"),
        (["--jsonl"], "--jsonl needs at least one file"),
        (["--stdlib", "a.jsonl"], "--stdlib takes no files, got a.jsonl"),
    ],
)
def test_rejects_a_call_without_one_source(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["prepare", "--output-prefix", "set", *arguments])
    assert left.value.code == 2
    assert reason in capsys.readouterr().err
