"""A job's Megatron arguments, whatever file they stand in: flags with their values, where they are, when they hold."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_flexsp.convert.shell_values import Condition


@dataclass(frozen=True)
class Value:
    """What follows a flag."""

    text: str | None
    """What Megatron most likely gets; None where the file doesn't say."""

    source: str
    """How the file puts it: ``4``, ``$SEQ_LENGTH``."""

    fixed: bool = True
    """Whether the file alone decides it, and not the environment or a condition."""

    place: object = field(default=None, compare=False)
    """For the front end that made it."""

    @property
    def number(self) -> int | None:
        try:
            return int(self.text or "")
        except ValueError:
            return None

    @property
    def literal(self) -> bool:
        """Whether the number itself stands there."""
        return self.fixed and self.source == self.text


@dataclass(frozen=True)
class Argument:
    flag: str
    values: tuple[Value, ...]
    line: int
    conditions: tuple[Condition, ...] = ()
    place: object = field(default=None, compare=False)

    @property
    def likely(self) -> bool:
        return all(condition.likely for condition in self.conditions)

    @property
    def written(self) -> str:
        """As the file has it, for people."""
        return " ".join([self.flag, *(value.source for value in self.values)])

    @property
    def when(self) -> str:
        """Where it stands and, if it has one, its condition, for people."""
        condition = self.conditions[-1] if self.conditions else None
        return f"line {self.line}" + (f" (where {condition.text})" if condition is not None else "")


@dataclass(frozen=True)
class _Known:
    """How Megatron reads a flag that matters here."""

    name: str
    kind: str = "on"
    """``on`` and ``off`` take no value; ``int``, ``float`` and ``str`` one, ``list`` one or more."""
    default: object = None


# Flags that the table of refusals or a rule reads, with Megatron 0.19's defaults; the tests hold them to Megatron.
KNOWN = {
    "--yaml-cfg": _Known("yaml_cfg", "str"),
    "--context-parallel-size": _Known("context_parallel_size", "int", 1),
    "--hybrid-context-parallel": _Known("hybrid_context_parallel"),
    "--dynamic-context-parallel": _Known("dynamic_context_parallel"),
    "--sequence-packing-scheduler": _Known("sequence_packing_scheduler", "str"),
    "--use-varlen-dataset": _Known("use_varlen_dataset"),
    "--calculate-per-token-loss": _Known("calculate_per_token_loss"),
    "--micro-batch-size": _Known("micro_batch_size", "int"),
    "--eval-micro-batch-size": _Known("eval_micro_batch_size", "int"),
    "--cuda-graph-impl": _Known("cuda_graph_impl", "str", "none"),
    "--enable-cuda-graph": _Known("enable_cuda_graph"),
    "--external-cuda-graph": _Known("external_cuda_graph"),
    "--mtp-hsm": _Known("mtp_hsm"),
    "--multi-latent-attention": _Known("multi_latent_attention"),
    "--experimental-attention-variant": _Known("experimental_attention_variant", "str"),
    "--linear-attention-type": _Known("linear_attention_type", "str"),
    "--enable-hyper-connections": _Known("enable_hyper_connections"),
    "--enable-mhc-connections": _Known("enable_mhc_connections"),
    "--rotary-base-per-layer": _Known("rotary_base_per_layer", "list"),
    "--moe-n-hash-layers": _Known("moe_n_hash_layers", "int", 0),
    "--expert-tensor-parallel-num-weight-shards": _Known("expert_tensor_parallel_num_weight_shards", "int"),
    "--hybrid-layer-pattern": _Known("hybrid_layer_pattern", "str"),
    "--hybrid-override-pattern": _Known("hybrid_override_pattern", "str"),
    "--is-hybrid-model": _Known("is_hybrid_model"),
    "--use-megatron-fsdp": _Known("use_megatron_fsdp"),
    "--use-torch-fsdp2": _Known("use_torch_fsdp2"),
    "--attention-dropout": _Known("attention_dropout", "float", 0.1),
    "--hidden-dropout": _Known("hidden_dropout", "float", 0.1),
    "--transformer-impl": _Known("transformer_impl", "str", "transformer_engine"),
    "--window-size": _Known("window_size", "str"),
    "--fp8-format": _Known("fp8", "str"),
    "--fp8-recipe": _Known("fp8_recipe", "str", "delayed"),
    "--fp8-param-gather": _Known("fp8_param_gather"),
    "--te-precision-config-file": _Known("te_precision_config_file", "str"),
    "--kitchen-config-file": _Known("kitchen_config_file", "str"),
    "--kitchen-recipe-number": _Known("kitchen_recipe_number", "int"),
    "--fp4-format": _Known("fp4", "str"),
    "--softmax-type": _Known("softmax_type", "str", "vanilla"),
    "--qk-clip": _Known("qk_clip"),
    "--log-max-attention-logit": _Known("log_max_attention_logit"),
    "--position-embedding-type": _Known("position_embedding_type", "str", "learned_absolute"),
    "--sft": _Known("sft"),
    "--fim-data": _Known("fim_data"),
    "--perform-rl-step": _Known("perform_rl_step"),
    "--eod-mask-loss": _Known("eod_mask_loss"),
    "--tp-comm-overlap": _Known("tp_comm_overlap"),
    "--ddp-average-in-collective": _Known("ddp_average_in_collective"),
    "--dataloader-type": _Known("dataloader_type", "str"),
    "--spec": _Known("spec", "list"),
    "--use-kitchen-attention": _Known("use_kitchen_attention"),
    "--use-legacy-models": _Known("use_legacy_models"),
    "--logits-load-dir": _Known("logits_load_dir", "str"),
    "--logits-save-dir": _Known("logits_save_dir", "str"),
    "--tensor-parallel-num-weight-shards": _Known("tensor_parallel_num_weight_shards", "int"),
    "--inprocess-restart": _Known("inprocess_restart"),
    "--no-align-grad-reduce": _Known("align_grad_reduce", "off", True),
    "--disable-align-grad-reduce": _Known("align_grad_reduce", "off", True),
    "--defer-embedding-wgrad-compute": _Known("defer_embedding_wgrad_compute"),
    "--cpu-offloading-retain-pinned-cpu-buffers": _Known("cpu_offloading_retain_pinned_cpu_buffers"),
    "--fine-grained-activation-offloading": _Known("fine_grained_activation_offloading"),
    "--iterations-to-skip": _Known("iterations_to_skip", "list", []),
    "--full-validation": _Known("full_validation"),
    "--multiple-validation-sets": _Known("multiple_validation_sets"),
    "--num-layers-per-virtual-pipeline-stage": _Known("num_layers_per_virtual_pipeline_stage", "int"),
    "--num-virtual-stages-per-pipeline-rank": _Known("num_virtual_stages_per_pipeline_rank", "int"),
    "--phase-transition-iterations": _Known("phase_transition_iterations", "str"),
    "--num-experts": _Known("num_experts", "int"),
    "--moe-router-load-balancing-type": _Known("moe_router_load_balancing_type", "list", "aux_loss"),
    "--moe-token-dispatcher-type": _Known("moe_token_dispatcher_type", "str", "allgather"),
    "--moe-flex-dispatcher-backend": _Known("moe_flex_dispatcher_backend", "str", "deepep"),
    "--recompute-granularity": _Known("recompute_granularity", "str"),
    "--recompute-activations": _Known("recompute_activations"),
    "--recompute-modules": _Known("recompute_modules", "list"),
    "--moe-layer-recompute": _Known("moe_layer_recompute"),
    "--cpu-offloading-num-layers": _Known("cpu_offloading_num_layers", "int", 0),
    "--distribute-saved-activations": _Known("distribute_saved_activations"),
    "--mtp-use-repeated-layer": _Known("mtp_use_repeated_layer"),
    "--overlap-grad-reduce": _Known("overlap_grad_reduce"),
    "--flexsp-recompute": _Known("flexsp_recompute"),
    "--moe-expert-capacity-factor": _Known("moe_expert_capacity_factor", "float"),
    "--moe-expert-rank-capacity-factor": _Known("moe_expert_rank_capacity_factor", "float"),
    "--moe-input-jitter-eps": _Known("moe_input_jitter_eps", "float"),
    "--moe-enable-routing-replay": _Known("moe_enable_routing_replay"),
    "--overlap-moe-expert-parallel-comm": _Known("overlap_moe_expert_parallel_comm"),
    "--moe-hybridep-pad-uneven-dispatch-inputs": _Known("moe_hybridep_pad_uneven_dispatch_inputs"),
    "--tensor-model-parallel-size": _Known("tensor_model_parallel_size", "int", 1),
    "--pipeline-model-parallel-size": _Known("pipeline_model_parallel_size", "int", 1),
    "--sequence-parallel": _Known("sequence_parallel"),
    "--num-attention-heads": _Known("num_attention_heads", "int"),
}

_MORE_SWITCHES = frozenset({
    "--flexsp", "--reset-position-ids", "--reset-attention-mask", "--delay-wgrad-compute",
    "--dataloader-inter-document-masking",
})  # fmt: skip
_MORE_LISTS = frozenset({"--cp-comm-type", "--hierarchical-context-parallel-sizes", "--rampup-batch-size"})
_MORE_SINGLE = frozenset({
    "--max-seqlen-per-dp-cp-rank", "--global-batch-size", "--eval-global-batch-size", "--train-samples",
    "--lr-decay-samples", "--lr-warmup-samples", "--seq-length", "--train-iters",
    "--recompute-method", "--recompute-num-layers", "--flexsp-max-tokens-per-rank",
})  # fmt: skip


def values_taken(flag: str) -> int | None:
    """How many values a flag takes, where that matters here; None for any number."""
    known = KNOWN.get(flag)
    if flag in _MORE_SWITCHES or (known is not None and known.kind in ("on", "off")):
        return 0
    if flag in _MORE_LISTS or (known is not None and known.kind == "list"):
        return None
    return 1 if known is not None or flag in _MORE_SINGLE else None


def namespace(arguments: Iterable[Argument]) -> argparse.Namespace:
    """What Megatron's parser would make of the flags that matter here; of two, the later counts.

    A value that the file doesn't tell is taken for one that does no harm where Megatron has a number by default, and
    for something that switches the feature on where it has none.
    """
    args = argparse.Namespace(**{known.name: known.default for known in KNOWN.values()})
    for argument in arguments:
        known = KNOWN.get(argument.flag)
        if known is not None:
            setattr(args, known.name, _read(known, argument.values))
    return args


def _read(known: _Known, values: Sequence[Value]) -> object:
    if known.kind in ("on", "off"):
        return known.kind == "on"
    texts = [value.text for value in values if value.text is not None]
    if known.kind == "list":
        return texts or ["unknown"]
    if not texts:
        unknown = {"str": "unknown", "int": 2, "float": 0.5}[known.kind]
        return unknown if known.default in (None, 0.1) else known.default
    if known.kind == "str":
        return None if texts[0] in ("None", "null") and known.default is None else texts[0]
    try:
        return int(texts[0]) if known.kind == "int" else float(texts[0])
    except ValueError:
        return known.default  # Megatron will say that it is no number


@dataclass(frozen=True)
class Job:
    """One training command, or a file that holds the arguments of one."""

    arguments: tuple[Argument, ...]
    line: int
    script: str | None
    """The training script's name; None for a file of arguments alone."""
    launched: bool
    """Whether FlexSP's launcher starts it already; True where the file doesn't start anything."""
    ranks: int | None = None
    """All processes of the job as the file stands; None where it doesn't say."""
    unseen: tuple[str, ...] = ()
    """Variables that the file doesn't set and that may hold more arguments."""
    place: object = field(default=None, compare=False)

    def last(self, flag: str) -> Argument | None:
        """The one that counts, as the file stands."""
        return next(
            (argument for argument in reversed(self.arguments) if argument.flag == flag and argument.likely), None
        )

    def value(self, flag: str) -> Value | None:
        """What it gives."""
        argument = self.last(flag)
        return argument.values[0] if argument is not None and argument.values else None

    def number(self, flag: str, default: int | None = None) -> int | None:
        """What it gives as a number; the default where it isn't there, None where the file doesn't tell."""
        argument = self.last(flag)
        if argument is None:
            return default
        return argument.values[0].number if argument.values else None

    def certain(self, flag: str) -> bool:
        """Whether it is there under all conditions."""
        return any(argument.flag == flag and not argument.conditions for argument in self.arguments)
