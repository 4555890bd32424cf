"""Pretrain a GPT with Megatron, for people who have the wheel (`pip install megatron-core`) and not the source tree.

Takes Megatron's own arguments and follows the conventions of Megatron-LM's `pretrain_gpt.py`: module-level `loss_func`,
`forward_step` and `train_valid_test_datasets_provider`. Works with megatron-core 0.17.1 and later.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets import utils as dataset_utils
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, get_timers, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

try:
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
except ImportError:  # Megatron 0.17, whose `pretrain` parses the command line itself
    parse_and_validate_args = None

Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def model_provider(
    pre_process: bool = True, post_process: bool = True, config: Any = None, vp_stage: int | None = None, **groups: Any
) -> GPTModel:
    """Build this pipeline stage's part of the model from Megatron's arguments."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    layers = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=args.transformer_impl == "transformer_engine",
        normalization=args.normalization,
        qk_l2_norm=args.qk_l2_norm,
        vp_stage=vp_stage,
    )
    further = None
    if args.mtp_num_layers:
        # The layers that predict further tokens are like the model's last one, which another stage may have.
        kind: dict[str, Any] = {"use_transformer_engine": args.transformer_impl == "transformer_engine"}
        like = get_gpt_decoder_layer_specs(config, normalization=args.normalization, qk_l2_norm=args.qk_l2_norm, **kind)
        further = get_gpt_mtp_block_spec(config, like[-1], vp_stage=vp_stage, **kind)
    return GPTModel(
        config=config,
        transformer_layer_spec=layers,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        mtp_block_spec=further,
        vp_stage=vp_stage,
        **groups,
    )


def loss_func(loss_mask: torch.Tensor, output_tensor: torch.Tensor, model: GPTModel | None = None) -> Loss:
    """Sum the losses of the unmasked tokens; return the sum, the number of tokens and both for the log."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            loss,
            lambda loss: ~torch.isfinite(loss),
            "found NaN or Inf in local forward loss",
            tolerance=0.0,
            fatal=True,
        )
    return loss, num_tokens, {"lm loss": torch.cat([loss.detach().clone().view(1), num_tokens.view(1)])}


def get_batch(data_iterator: Iterator[dict[str, Any]] | None) -> dict[str, Any]:
    """This rank's part of the next micro-batch; empty on pipeline stages that see no tokens."""
    if data_iterator is None:
        return {}
    batch = {key: value.cuda(non_blocking=True) for key, value in next(data_iterator).items()}
    if mpu.get_context_parallel_world_size() == 1:
        return batch
    options = {} if parse_and_validate_args is None else {"is_hybrid_cp": False}
    return get_batch_on_this_cp_rank(batch, cp_group=mpu.get_context_parallel_group(), **options)


def forward_step(data_iterator: Any, model: GPTModel) -> tuple[torch.Tensor, Callable[[torch.Tensor], Loss]]:
    """Run one micro-batch forward; return the output (a loss for each token) and the function that reduces it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    inputs = [batch.get(name) for name in ("tokens", "position_ids", "attention_mask")]
    loss_mask: Any = batch.get("loss_mask")
    output = model(*inputs, labels=batch.get("labels"), loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask, model=model)


def train_valid_test_datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build the three datasets on the ranks that read tokens: all of the first and the last pipeline stage."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    is_built_here = partial(is_first_or_last_pipeline_stage, vp_stage)
    return BlendedMegatronDatasetBuilder(dataset, num_samples, is_built_here, config).build()


# Every tensor-parallel rank reads for itself, so nothing has to be broadcast.
train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def main() -> None:
    """Parse the command line and train."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        # The wheel brings the compiled helpers but no Makefile; Megatron would run `make` and exit.
        dataset_utils.compile_helpers = lambda: None
    defaults = {"tokenizer_type": "GPT2BPETokenizer"}
    # By name: the position of these arguments differs between Megatron's releases.
    training = {
        "train_valid_test_dataset_provider": train_valid_test_datasets_provider,
        "model_provider": model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    if parse_and_validate_args is None:
        pretrain(**training, args_defaults=defaults)
    else:
        args = parse_and_validate_args(args_defaults=defaults)
        pretrain(pretrain_cfg_container_from_args(args), **training)


if __name__ == "__main__":
    main()
