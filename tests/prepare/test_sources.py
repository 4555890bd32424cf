"""Sources yield each document once, in order, and refuse what is not a document, naming file and line."""

import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.prepare import JsonLines, StandardLibrary


def texts(path: Path, key: str = "text") -> list[bytes]:
    return [record.text for record in JsonLines((path,), key)]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.booleans())
def test_json_lines_yield_the_bytes_of_every_text(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "part.jsonl"
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=ascii_only) + "\n" for text in documents]
    path.write_text("".join(lines), encoding="utf-8", newline="")
    assert texts(path) == [text.encode() for text in documents]


def test_json_lines_take_several_files_in_the_order_given(tmp_path: Path) -> None:
    first, second = tmp_path / "z.jsonl", tmp_path / "a.jsonl"
    first.write_text('{"body": "one"}\n\n{"body": ""}', encoding="utf-8")
    second.write_text('{"body": "two"}\r\n', encoding="utf-8")
    source = JsonLines((first, second), key="body")
    assert [record.text for record in source] == [b"one", b"", b"two"]
    assert source.total_bytes == first.stat().st_size + second.stat().st_size


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'text': 1}", "not JSON"),
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "expected a JSON object, found an array"),
        (b'{"body": "a"}', "no key 'text' (found 'body')"),
        (b'{"text": 3}', "'text' must be a string, found a number"),
        (b'{"text": null}', "'text' must be a string, found null"),
        (rb'{"text": "\ud800"}', "half a surrogate pair"),
    ],
)
def test_json_lines_reject_a_bad_line_with_its_place(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "part.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(FlexSPError) as refusal:
        texts(path)
    assert str(refusal.value).startswith(f"{path}, line 3: ")
    assert reason in str(refusal.value)


def test_json_lines_reject_a_missing_file(tmp_path: Path) -> None:
    source = JsonLines((tmp_path / "none.jsonl",))
    with pytest.raises(FlexSPError, match=r"cannot read .*none\.jsonl: No such file"):
        list(source)
    with pytest.raises(FlexSPError, match=r"cannot read .*none\.jsonl: No such file"):
        _ = source.total_bytes


def test_standard_library_is_every_source_file_but_third_party_ones(tmp_path: Path) -> None:
    for name in (
        "b.py",
        "a/z.py",
        "a/data.txt",
        "site-packages/x.py",
        "dist-packages/x.py",
        "a/__pycache__/x.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name, encoding="utf-8")
    source = StandardLibrary(tmp_path)
    assert [record.text for record in source] == [b"a/z.py", b"b.py"]
    assert source.total_bytes == len("a/z.py" + "b.py")


def test_standard_library_of_this_python_has_a_long_tail() -> None:
    assert StandardLibrary().root == Path(sysconfig.get_path("stdlib"))
    sizes = sorted(len(record.text) for record in StandardLibrary())
    assert len(sizes) > 500
    assert sizes[-1] > 10 * sizes[len(sizes) // 2] > 0
