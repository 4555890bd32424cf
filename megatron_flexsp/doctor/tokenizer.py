"""A job's tokenizer: are its files there, and how large is its vocabulary? It is not loaded."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megatron_flexsp.doctor.findings import Finding, error, ok, warning


def examine_tokenizer(args: argparse.Namespace) -> Iterator[Finding]:
    """Whether the files that a tokenizer needs are there; it is not loaded."""
    kind = args.tokenizer_type or "GPT2BPETokenizer"
    if kind.startswith("Null"):
        if args.vocab_size is None:
            yield error("tokenizer", f"{kind} without --vocab-size", "give the size of the vocabulary")
        else:
            yield ok("tokenizer", f"{kind}, {args.vocab_size:,} tokens")
        return
    if kind in ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase"):
        needed = {"--vocab-file": args.vocab_file}
        if kind == "GPT2BPETokenizer":
            needed["--merge-file"] = args.merge_file
    else:
        needed = {"--tokenizer-model": args.tokenizer_model}
    for flag, path in needed.items():
        if path is None:
            yield error("tokenizer", f"{kind} without {flag}", "give it, or another --tokenizer-type")
        elif not os.path.exists(path):
            if kind in ("HuggingFaceTokenizer", "SFTTokenizer") and _is_hub_name(path):
                yield from _examine_hub_name(path)
            else:
                yield error("tokenizer", f"{flag} {path} is not there", "correct the path")
        else:
            yield ok("tokenizer", f"{kind}: {path}")


def _is_hub_name(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _examine_hub_name(name: str) -> Iterator[Finding]:
    """A name on the Hugging Face hub: the ranks must reach it, or find it in the cache."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    if os.path.isdir(os.path.join(cache, "models--" + name.replace("/", "--"))):
        yield ok("tokenizer", f"{name} in the cache {cache}")
    else:
        yield warning(
            "tokenizer",
            f"{name} is not in the cache {cache}, so every rank asks the Hugging Face hub for it",
            "download it before the job starts if its nodes reach no internet; or is it a path that is not there?",
        )


def vocabulary_size(args: argparse.Namespace) -> int | None:
    """The vocabulary that the model will have, padded as Megatron pads it; None where only the tokenizer knows."""
    if getattr(args, "padded_vocab_size", None):
        return int(args.padded_vocab_size)
    size = args.vocab_size or _counted(args.vocab_file) or _counted(args.tokenizer_model)
    if size is None:
        return None
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-int(size) // multiple) * multiple


def _counted(path: str | None) -> int | None:
    """Tokens of a vocabulary in JSON, or in the folder of a Hugging Face tokenizer."""
    if path is None:
        return None
    with suppress(OSError, ValueError, AttributeError, KeyError):
        if not os.path.isdir(path):
            return len(json.loads(Path(path).read_text(encoding="utf-8")))
        tokenizer = json.loads(Path(path, "tokenizer.json").read_text(encoding="utf-8"))
        ids = [*tokenizer["model"]["vocab"].values(), *(item["id"] for item in tokenizer.get("added_tokens", ()))]
        return max(ids) + 1
    return None
