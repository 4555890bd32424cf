"""Finds the command that starts training among a shell script's commands, and reads its arguments."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_flexsp.convert.arguments import Argument, Job, Value, values_taken
from megatron_flexsp.convert.megatron_flags import all_flags
from megatron_flexsp.convert.rules import OTHER_MODELS
from megatron_flexsp.convert.shell import Command, Script
from megatron_flexsp.convert.shell_values import Array, Piece, Word, within
from megatron_flexsp.convert.shell_values import words as words_of
from megatron_flexsp.convert.text import MAIN_FILE, Span, line_of

RUN_MODULE = "megatron_flexsp.run"

_TRAINING_FLAGS = {
    "--micro-batch-size", "--global-batch-size", "--train-iters", "--train-samples", "--seq-length", "--num-layers",
    "--lr", "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--lr-decay-style",
}  # fmt: skip
_FEWEST_FLAGS = 3
"""Of those a training command has three; others may have one or two."""

_TOOLS = re.compile(
    r"generat|inference|convert|hf2|2hf|2mcore|2megatron|megatron2|checkpoint|ckpt|preprocess|server|eval|quantiz|prune|export|merge|split|benchmark|text_gen"
    r"|validate|mmlu|annotate|retriev|feature_extract|(^|/)(tasks|tools)/",
    re.IGNORECASE,
)


_TUNING = re.compile(r"(^|_)(finetune|sft|dpo|rlhf|reward|ppo|grpo)(_|\.)")
"""Scripts whose data sets FlexSP would replace by something else."""


@dataclass(frozen=True)
class Launch:
    """A command that starts a training script."""

    job: Job
    command: Command
    script: int
    """Which of the command's words is the script."""
    text: CommandText


@dataclass(frozen=True)
class Other:
    """A command that starts another Python script."""

    line: int
    script: str
    refused: str | None
    """Why it can't be converted, if it trains; None where there is nothing to convert."""


def find_launches(script: Script, data: bytes) -> tuple[list[Launch], list[Other]]:
    """The training commands of a script, each once, and what else it starts."""
    launches: dict[object, Launch] = {}
    others: dict[Other, None] = {}
    for command in script.commands:
        place = _script_place(command.words)
        if place is None:
            continue
        name = command.words[place].pattern.split("\0")[-1].strip("'\"")
        found = _launch(script, command, place, name, data)
        if isinstance(found, Other):
            others[found] = None
        elif found is not None:
            launches.setdefault((found.text.own(place), tuple(word.pattern for word in command.words)), found)
    return list(launches.values()), list(others)


def find_variables(script: Script, data: bytes) -> Launch | None:
    """The arguments that a script only holds in variables, for another one to start training with."""
    held: dict[tuple[Span, ...], Word] = {}
    for variable in script.variables.values():
        elements = variable.elements if isinstance(variable, Array) else ()
        listed = [Word(element.value, element.conditions) for element in elements]
        if not isinstance(variable, Array):
            listed = words_of(within(variable, (), quoted=False))
        first = listed[0].pattern.partition("=")[0] if listed else ""
        if first in all_flags() or first.startswith("--flexsp"):
            # A variable that is made of others has their words once more.
            held.update({tuple(part.chain[-1] for part in word.parts if part.chain): word for word in listed})
    if not held:
        return None
    listed = list(held.values())
    text = CommandText(listed, data)
    arguments, unseen = read_arguments(text, 0, 1)
    flags = {argument.flag for argument in arguments}
    trains = len(flags & _TRAINING_FLAGS) >= _FEWEST_FLAGS and flags & {"--lr", "--train-iters", "--train-samples"}
    if not trains or "--seq-length" not in flags:
        return None
    job = Job(tuple(arguments), line=1, script=None, launched=True, unseen=tuple(dict.fromkeys(unseen)))
    return Launch(job, Command(tuple(listed), (), 1, script.variables), 0, text)


def _script_place(words: Sequence[Word]) -> int | None:
    for place, word in enumerate(words):
        if re.search(r"\.py['\"]?$", word.pattern) and not word.pattern.startswith("-"):
            before = words[place - 1].pattern if place else ""
            if not (before.startswith("--") and "=" not in before and before not in _SWITCHES):
                return place
    return None


_SWITCHES = ("--no-python", "--no_python", "--module", "--standalone", "--use_env", "--use-env", "--", "--cpu")


def _launch(script: Script, command: Command, place: int, name: str, data: bytes) -> Launch | Other | None:
    words = command.words
    text = CommandText(words, data)
    line = command.line if (own := text.own(place)) is None else line_of(data, own.start)
    arguments, unseen = read_arguments(text, place + 1, line)
    flags = {argument.flag for argument in arguments}
    base = name.rsplit("/", 1)[-1]
    program_place, program = _program(words[:place])
    trains = "pretrain_gpt" in base or (
        len(flags & _TRAINING_FLAGS) >= _FEWEST_FLAGS
        and bool(flags & {"--lr", "--train-iters", "--train-samples", "--save"})
    )
    known_trainer = re.match(r"(pretrain|finetune|train)_", base) is not None
    if not trains and not (known_trainer and (flags or unseen) and program != "") and program != "deepspeed":
        return Other(line, base, None)
    if not known_trainer and "gpt" not in base and _TOOLS.search(name):
        return Other(line, base, None)
    parts = re.split(r"[^a-z0-9]+", name.lower().removesuffix(".py"))
    model = next((part for part in parts if part in OTHER_MODELS), None)
    if model is not None and "pretrain_gpt" not in base:
        return Other(
            line, base, "it doesn't train a GPT: FlexSP runs GPT's forward step on the documents of a Megatron data set"
        )
    if _TUNING.search(base):
        return Other(
            line,
            base,
            "it has data sets of its own: where their samples have cu_seqlens, add --flexsp --flexsp-samples packed to "
            "its arguments by hand",
        )
    if program in ("deepspeed", "accelerate", "horovodrun", "colossalai"):
        return Other(
            line, base, f"{program} starts it with its own engine or process layout: start it with torchrun instead"
        )
    if program == "itself":
        return Other(line, base, "it is started by itself: put `python` or `torchrun` before it")
    head = words[program_place:place] if program_place is not None else words[:place]
    launched = any(RUN_MODULE in word.pattern for word in words[:place])
    module = next((word for word in head if word.text and word.text.startswith("torch.distributed.")), None)
    job = Job(
        arguments=tuple(arguments),
        line=line,
        script=base,
        launched=launched,
        ranks=_ranks(script, words[:place], program, module),
        unseen=tuple(dict.fromkeys(unseen)),
    )
    return Launch(job, command, place, text)


def _program(words: Sequence[Word]) -> tuple[int | None, str]:
    """The last word before the script that names what runs it."""
    for place in range(len(words) - 1, -1, -1):
        name = words[place].pattern.rsplit("/", 1)[-1]
        if re.fullmatch(r"python[\d.]*|torchrun|deepspeed|accelerate|horovodrun|colossalai", name):
            return place, name if not name.startswith("python") else "python"
    if any("\0" in word.pattern for word in words):
        return None, ""
    return None, "itself"


class CommandText:
    """Where the words of a command stand in the file."""

    def __init__(self, words: Sequence[Word], data: bytes) -> None:
        self.words = tuple(words)
        self.data = data
        self._counts = Counter(span for word in words for span in set(word.places()))

    def own(self, number: int) -> Span | None:
        """The outermost place where a word stands alone, rather than in a variable that holds others too."""
        return next((span for span in self.words[number].places() if self._counts[span] == 1), None)

    def enclosing(self, number: int) -> list[Span]:
        """Every place of a word, outermost first."""
        return self.words[number].places()

    def source(self, number: int) -> str:
        """How the file puts a word."""
        span = self.own(number)
        if span is not None and span.file == MAIN_FILE:
            return self.data[span.start : span.end].decode("utf-8", "replace")
        return self.words[number].text or "(not in this file)"

    def line(self, number: int, otherwise: int) -> int:
        """The line that a word's letters stand on."""
        places = [span for span in self.words[number].places() if span.file == MAIN_FILE]
        return line_of(self.data, places[-1].start) if places else otherwise


def read_arguments(text: CommandText, first: int, line: int) -> tuple[list[Argument], list[str]]:
    """Flags with what follows them from word ``first`` on, and the variables that may hold more of them."""
    arguments: list[Argument] = []
    unseen: list[str] = []
    values: list[int] = []
    flag: int | None = None

    def close() -> None:
        if flag is not None:
            arguments.append(_argument(text, flag, values, line))

    for number in range(first, len(text.words)):
        word = text.words[number]
        if re.match(r"--?[A-Za-z]", word.pattern):
            close()
            flag, values = number, []
        elif _holds_arguments(word, text.source(number)):
            unseen.append(text.source(number))
        elif flag is not None and not _is_full(text.words[flag].pattern, len(values)):
            values.append(number)
    close()
    return arguments, unseen


def _holds_arguments(word: Word, source: str) -> bool:
    """Whether a word that nobody knows may be any number of arguments."""
    pieces = [part for part in word.parts if isinstance(part, Piece)]
    if any(piece.caller for piece in pieces):
        return True
    unset = word.pattern == "\0" and any(piece.environment and not piece.quoted for piece in pieces)
    return unset and re.search(r"ARG|OPT|FLAG|EXTRA|PARAM|CONFIG|\[[@*]\]", source, re.IGNORECASE) is not None


def _is_full(flag: str, values: int) -> bool:
    taken = values_taken(flag)
    return "=" in flag or (taken is not None and values >= taken)


def _argument(text: CommandText, number: int, values: Sequence[int], line: int) -> Argument:
    flag = text.words[number]
    name, equals, rest = flag.pattern.partition("=")
    read = [Value(text.words[v].text, text.source(v), text.words[v].fixed, v) for v in values]
    if equals:
        source = text.source(number).strip("\"'").partition("=")[2]
        read = [Value(None if "\0" in rest else rest, source, flag.fixed, number)]
    return Argument(name, tuple(read), text.line(number, line), flag.conditions, number)


def _ranks(script: Script, words: Sequence[Word], program: str, module: Word | None) -> int | None:
    """All processes of the job, as far as the launcher's arguments or the batch system's say."""
    if program == "torchrun" or module is not None:
        per_node = _option(words, r"--nproc[-_]per[-_]node")
        nodes = _option(words, r"--nnodes")
        return per_node * nodes if per_node and nodes else None
    tasks = _option(words, r"--ntasks|-n", default=0)
    nodes = _option(words, r"--nodes|-N", default=0)
    per_node = _option(words, r"--ntasks-per-node", default=0)
    directives = script.directives
    tasks = tasks or _directive(directives, r"(?:--ntasks[= ]|-n ?)(\d+)")
    nodes = nodes or _directive(directives, r"(?:--nodes[= ]|-N ?)(\d+)")
    per_node = per_node or _directive(directives, r"--ntasks-per-node[= ](\d+)")
    if tasks:
        return tasks
    return nodes * per_node if nodes and per_node else None


def _directive(directives: str, pattern: str) -> int:
    found = re.findall(rf"#SBATCH\s.*?{pattern}", directives)
    return int(found[-1]) if found else 0


def _option(words: Sequence[Word], pattern: str, default: int = 1) -> int | None:
    """A launcher option's number; None if it is there and not known."""
    for place, word in enumerate(words):
        match = re.fullmatch(rf"(?:{pattern})(?:=(.*))?", word.pattern)
        if match:
            text = match[1] if match[1] is not None else (words[place + 1].text if place + 1 < len(words) else None)
            return int(text) if text is not None and text.isdigit() else None
    return default
