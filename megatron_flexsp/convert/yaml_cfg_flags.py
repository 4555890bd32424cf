"""The keys of a file for Megatron's ``--yaml-cfg`` as flags: what Megatron makes of each, and what no flag says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_flexsp.convert.megatron_flags import DIFFERS, Flag, flags_by_name, names_of_flags

_TRUE, _FALSE, _NULL = ("true", "yes", "on"), ("false", "no", "off"), ("", "~", "null")

_OTHER_NAMES = {
    "num_moe_experts": "num_experts",
    "fp8_param": "fp8_param_gather",
    "fp4_param": "fp4_param_gather",
    "use_te_rng_tracker": "te_rng_tracker",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
}
"""Fields of the model's configuration whose flag sets an attribute of another name."""

_SET_BY_MEGATRON = frozenset({
    "params_dtype", "pipeline_dtype", "batch_p2p_comm", "deallocate_pipeline_outputs", "variable_seq_lengths",
    "virtual_pipeline_model_parallel_size", "inference_sampling_seed", "yaml_cfg", "rank", "world_size", "local_rank",
    "data_parallel_size", "transformer_pipeline_model_parallel_size", "consumed_train_samples", "padded_vocab_size",
    "consumed_valid_samples", "skipped_train_samples",
})  # fmt: skip
"""Megatron works these out from other settings, whatever a file says."""

_UNUSED = {
    "tp_comm_atomic_ag": "of --tp-comm-overlap, which FlexSP runs without",
    "tp_comm_atomic_rs": "of --tp-comm-overlap, which FlexSP runs without",
    "cuda_graph_use_single_mempool": "of CUDA graphs, which FlexSP runs without",
    "batch_p2p_sync": "no flag changes it, and it matters to old releases of PyTorch alone",
    "fp8_interval": "Transformer Engine no longer reads it",
    "lazy_mpu_init": "Megatron no longer reads it",
    "async_tensor_model_parallel_allreduce": "Megatron no longer reads it",
    "delay_grad_reduce": "Megatron no longer reads it",
    "retriever_seq_length": "Megatron no longer reads it",
}
"""Keys that have a meaning but change nothing here."""


@dataclass(frozen=True)
class Setting:
    """A key of the file."""

    name: str
    value: Any
    """ruamel's node."""
    line: int

    @property
    def text(self) -> str:
        if self.value.id == "mapping":
            return "a section"
        return str(self.value.value) if self.value.id == "scalar" else f"[{', '.join(self.words)}]"

    @property
    def plain(self) -> str | None:
        """The value's letters in lower case, where no quotes make a string of it."""
        return self.text.lower() if self.value.id == "scalar" and self.value.style is None else None

    @property
    def is_null(self) -> bool:
        return self.plain in _NULL

    @property
    def truth(self) -> bool | None:
        """As Python takes it where it is a switch; None for what is none."""
        if self.plain in _TRUE or self.plain == "1":
            return True
        return False if self.plain in (*_FALSE, *_NULL, "0") else None

    @property
    def says_nothing(self) -> bool:
        return self.truth is False or self.text in ("", "[]")

    @property
    def words(self) -> list[str]:
        """The values of a list, or the one value, as they stand in the file."""
        if self.value.id == "sequence":
            return [str(item.value) if item.id == "scalar" else "..." for item in self.value.value]
        return [str(self.value.value)]


@dataclass
class Translation:
    flags: dict[int, list[str]] = field(default_factory=dict)
    """What stands on each of the list's lines, by the file's line that says it."""
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def say(self, setting: Setting, flags: Iterable[str], why: str | None = None) -> None:
        flags = list(flags)
        if flags:
            self.flags.setdefault(setting.line, []).extend(flags)
        if why is not None:
            self.reasons.append(f"line {setting.line}: {setting.name}: {setting.text or 'null'} became {why}")

    def refuse(self, setting: Setting, why: str) -> None:
        self.problems.append(f"line {setting.line}: {setting.name}: {setting.text or 'null'}: {why}")


def translate(settings: list[Setting]) -> Translation:
    """All keys as flags, in the file's order."""
    translation = Translation()
    known = _each_once(settings, translation)
    for rule in _RULES:
        rule(known, translation)
    at_default: list[str] = []
    left_out: dict[str, list[str]] = {}
    for setting in known.values():
        why = _left_out(setting)
        if why is not None:
            left_out.setdefault(why, []).append(setting.name)
        elif not _one(setting, translation):
            at_default.append(setting.name)
    if at_default:
        translation.notes.append(
            f"{len(at_default)} keys have the value that Megatron takes by itself, and need no flag"
        )
    for why, names in left_out.items():
        translation.notes.append(f"left out: {', '.join(names)}: {why}")
    return translation


def _each_once(settings: list[Setting], translation: Translation) -> dict[str, Setting]:
    """Every setting by the attribute that its flag sets."""
    known: dict[str, Setting] = {}
    for setting in settings:
        name = setting.name.replace("-", "_")
        name = _OTHER_NAMES.get(name, name)
        if name not in flags_by_name():
            name = names_of_flags().get(name, name)
        before = known.setdefault(name, setting)
        if before.text != setting.text:
            translation.refuse(
                setting, f"line {before.line} has {before.name}: {before.text or 'null'}. Leave one of them"
            )
    return known


def _left_out(setting: Setting) -> str | None:
    name = setting.name
    if name in _SET_BY_MEGATRON:
        return "worked out by Megatron itself"
    if name in _UNUSED:
        return _UNUSED[name]
    if name not in flags_by_name() and name not in _OTHER_NAMES and name not in names_of_flags():
        return "unknown to Megatron from 0.17 on, and off" if setting.says_nothing else None
    return None


def _one(setting: Setting, translation: Translation) -> bool:
    """Write down a setting; false if Megatron takes its value without being told."""
    name = _OTHER_NAMES.get(setting.name, setting.name.replace("-", "_"))
    name = name if name in flags_by_name() else names_of_flags().get(name, name)
    rows = flags_by_name().get(name)
    if name.startswith("flexsp") and rows is None:
        translation.say(setting, _flexsp(setting))
    elif setting.value.id == "mapping":
        translation.refuse(setting, "Megatron has no flag for a section of its own")
    elif rows is None:
        translation.refuse(
            setting,
            "Megatron (0.17 and newer) has neither a flag nor a setting of this name. If your training script reads "
            "it, take it out here and give it to the script as a flag; if it is a slip, mend it",
        )
    elif _is_default(setting, rows):
        return False
    elif rows[0].how == "field":
        translation.refuse(setting, "Megatron has no flag for it, so only a change of its code sets it")
    elif rows[0].is_switch:
        _switch(setting, rows, translation)
    else:
        _valued(setting, rows[0], translation)
    return True


def _flexsp(setting: Setting) -> list[str]:
    flag = "--" + setting.name.replace("_", "-")
    if setting.truth is not None:
        return [flag] if setting.truth else []
    return [" ".join([flag, *map(_quoted, setting.words)])]


def _is_default(setting: Setting, rows: tuple[Flag, ...]) -> bool:
    """Whether all rows, which may be of different releases, have this value without any flag."""
    return all(_equals(setting, row) for row in rows)


def _equals(setting: Setting, row: Flag) -> bool:
    default = row.default
    if default is DIFFERS or setting.value.id == "mapping":
        return False
    if row.is_switch or isinstance(default, bool):
        return setting.truth is bool(default)
    if default is None:
        return setting.is_null or setting.text == ""
    if isinstance(default, list):
        return setting.value.id == "sequence" and setting.words == [str(item) for item in default]
    if isinstance(default, int | float) and setting.plain is not None:
        try:
            return float(setting.text) == default
        except ValueError:
            return False
    return setting.value.id == "scalar" and not setting.is_null and setting.text == str(default)


def _switch(setting: Setting, rows: tuple[Flag, ...], translation: Translation) -> None:
    if setting.truth is None:
        translation.refuse(setting, f"{rows[0].flag} is a switch: true or false")
        return
    wanted = "on" if setting.truth else "off"
    row = next((row for row in rows if row.how in (wanted, "both")), None)
    if row is None:
        translation.refuse(setting, f"{rows[0].flag} is the only flag, and it says the opposite")
        return
    flag = "--no-" + row.flag[2:] if row.how == "both" and not setting.truth else row.flag
    translation.say(setting, [flag])
    _note_releases(row, flag, translation)


def _note_releases(row: Flag, flag: str, translation: Translation) -> None:
    if row.releases:
        translation.notes.append(f"{flag}: only Megatron {row.releases.replace(',', ', ')} has it")


def _valued(setting: Setting, row: Flag, translation: Translation) -> None:
    if setting.is_null:
        if row.default is not DIFFERS and row.default != []:
            without = f"Megatron takes {row.default} without it"
            translation.refuse(
                setting, f"{row.flag} can't be told to be nothing; {without}. Take the key out, or set it"
            )
        return
    if setting.truth is not None and setting.plain not in ("0", "1"):
        if setting.truth is False and row.default is None:
            return  # as good as nothing
        if row.name != "onnx_safe":
            translation.refuse(setting, f"{row.flag} takes a value")
            return
    words = setting.words
    if row.how == "many" and setting.value.id == "scalar":
        words = setting.text.split()
    elif row.how == "one" and setting.value.id == "sequence":
        words = [f"[{','.join(words)}]" if row.name.endswith("_freq") else ",".join(words)]
    translation.say(setting, [" ".join([row.flag, *map(_quoted, words)])])
    _note_releases(row, row.flag, translation)


def _quoted(word: str) -> str:
    """As bash reads it; ``${NAME}`` stays a variable, which it is for Megatron in such a file too."""
    if re.fullmatch(r"[\w./:,=@%+-]+", word):
        return word
    if re.search(r"\$\{\w+\}", word) and re.fullmatch(r"(?:\$\{\w+\}|[\w ./:,=@%+-])+", word):
        return f'"{word}"'
    return shlex.quote(word)


def _activation(known: dict[str, Setting], translation: Translation) -> None:
    """``activation_func`` decides, and ``swiglu`` and its like outside of the section are only printed."""
    function = known.pop("activation_func", None)
    if function is None:
        return
    others = {name: known.pop(name, None) for name in ("swiglu", "squared_relu", "quick_geglu", "openai_gelu")}
    gated, fused = known.pop("gated_linear_unit", None), known.pop("bias_activation_fusion", None)
    flag = {"swiglu": "--swiglu", "squaredrelu": "--squared-relu", "gelu": None}.get(function.text, "")
    if flag == "":
        translation.refuse(function, "Megatron takes swiglu, squaredrelu or gelu in such a file")
        return
    translation.say(function, [] if flag is None else [flag], flag or "no flag: it is Megatron's own choice")
    for name, setting in others.items():
        if setting is not None and setting.truth and flag != "--" + name.replace("_", "-"):
            translation.notes.append(
                f"line {setting.line}: {name}: {setting.text} left out: activation_func on line {function.line} decides"
            )
    if flag == "--swiglu":
        return  # gated, and --no-bias-swiglu-fusion is its switch for fusion
    if gated is not None and gated.truth:
        translation.refuse(gated, f"no flag makes a gated {function.text}")
    if fused is not None and not fused.truth:
        translation.say(fused, ["--no-bias-gelu-fusion"], "--no-bias-gelu-fusion")
        known.pop("bias_gelu_fusion", None)


def _query_groups(known: dict[str, Setting], translation: Translation) -> None:
    """The model's configuration has the number alone; on the command line it needs a switch."""
    groups, switch = known.pop("num_query_groups", None), known.pop("group_query_attention", None)
    if groups is not None and not groups.is_null:
        flags = ["--group-query-attention", f"--num-query-groups {_quoted(groups.text)}"]
        translation.say(groups, flags, " ".join(flags))
    elif switch is not None and switch.truth:
        translation.notes.append(
            f"line {switch.line}: group_query_attention: {switch.text} left out: without num_query_groups each head "
            "has keys and values of its own"
        )


def _first_weights(known: dict[str, Setting], translation: Translation) -> None:
    for name in ("init_method", "embedding_init_method", "output_layer_init_method"):
        setting = known.pop(name, None)
        if setting is None or setting.is_null:
            continue
        if name == "init_method" and setting.text == "xavier_uniform":
            known.pop("init_method_xavier_uniform", None)
            translation.say(setting, ["--init-method-xavier-uniform"], "--init-method-xavier-uniform")
        else:
            translation.refuse(setting, "no flag chooses it")


def _layer_norm(known: dict[str, Setting], translation: Translation) -> None:
    """The configuration's field says the opposite of the flag."""
    persist = known.pop("persist_layer_norm", None)
    if persist is not None:
        known.pop("no_persist_layer_norm", None)
        if not persist.truth:
            translation.say(persist, ["--no-persist-layer-norm"], "--no-persist-layer-norm")


def _overlapped_transfers(known: dict[str, Setting], translation: Translation) -> None:
    """Only interleaved pipelines have a choice; for others Megatron switches it off."""
    stage = known.get("num_layers_per_virtual_pipeline_stage")
    if stage is None or stage.is_null:
        known.pop("overlap_p2p_comm", None)


_RULES: tuple[Callable[[dict[str, Setting], Translation], None], ...] = (
    _activation,
    _query_groups,
    _first_weights,
    _layer_norm,
    _overlapped_transfers,
)
"""Keys that aren't simply the attribute of a flag; each rule takes away those that it has dealt with."""
