"""A run's data sets, built by megatron.core on every rank, and the samples of each of their batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core import num_microbatches_calculator
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_flexsp.errors import FlexSPError
from megatron_flexsp.megatron import releases
from megatron_flexsp.megatron.conversations import tokenization_of, tokenize_all
from megatron_flexsp.megatron.documents import DocumentDataset, DocumentDatasetConfig, SampleSource
from megatron_flexsp.megatron.mock_documents import MockDocuments, mock_lengths
from megatron_flexsp.megatron.packed_source import script_sources
from megatron_flexsp.megatron.sequences import DataSet, SequenceSource
from megatron_flexsp.megatron.settings import Settings


@dataclass(frozen=True)
class Sources:
    """Where the samples of each split come from; None for a split without any."""

    train: SequenceSource | None
    validation: tuple[SequenceSource | None, ...]
    """One, but for --multiple-validation-sets."""
    test: SequenceSource | None

    @property
    def parts(self) -> list[DataSet]:
        """The data sets behind all of them."""
        return [part for source in (self.train, *self.validation, self.test) if source for part in source.parts]


def build_sources(
    args: Any, settings: Settings, num_samples: tuple[int, int | None, int], provider: Callable[..., Any]
) -> Sources:
    """Train, validation and test documents, through megatron.core's builder; or the script's own packs.

    Collective over the world.

    Parameters
    ----------
    args, settings
        Megatron's validated arguments and the checked flags.
    num_samples
        How many samples each split must have; None for each document once.
    provider
        The script's ``train_valid_test_datasets_provider``.

    Raises
    ------
    FlexSPError
        Where documents can't be read, or none are left for validation.
    """
    if settings.samples == "packed":
        sources = Sources(*script_sources(args, provider, num_samples))
    else:
        train, validation, test = _build_datasets(args, settings, num_samples)
        sets = validation if isinstance(validation, list) else [validation]
        sources = Sources(_source(train), tuple(map(_source, sets)), _source(test))
    if (args.eval_iters or args.full_validation) and None in sources.validation:
        flag = "--full-validation" if args.full_validation else f"--eval-iters {args.eval_iters}"
        given = f"--split {args.split}" if args.split else "the data given for it"
        if settings.samples == "packed":
            given = "the script"
        otherwise = "take the flag out" if args.full_validation else "set --eval-iters 0"
        raise FlexSPError(
            f"validation is asked for ({flag}), but {given} leaves no documents for it: give it a part, or {otherwise}"
        )
    return sources


def _source(dataset: Any) -> SampleSource | None:
    return SampleSource(dataset) if dataset is not None and len(dataset) else None


def _build_datasets(args: Any, settings: Settings, num_samples: tuple[int, int | None, int]) -> Any:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    mock_documents = None
    if args.mock_data:
        blend = blend_per_split = None
        vocabulary = args.vocab_size or args.padded_vocab_size
        mock_documents = MockDocuments(mock_lengths(settings.mock_lengths, args.seq_length, args.seed), vocabulary)
    conversations = tokenize_conversations(args, blend, blend_per_split) if settings.sft else None
    config = DocumentDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        overlong=settings.overlong,
        mock_documents=mock_documents,
        conversations=conversations,
        object_storage_cache_path=args.object_storage_cache_path,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
    )
    try:
        return BlendedMegatronDatasetBuilder(DocumentDataset, list(num_samples), lambda: True, config).build()
    except Exception as error:
        # The builder wraps what goes wrong with mock data; the user's mistake is inside.
        if isinstance(error.__cause__, FlexSPError):
            raise error.__cause__ from None
        raise


def tokenize_conversations(args: Any, blend: Any, blend_per_split: Any) -> dict[str, str]:
    """Each file's tokenised conversations, made now where they are not there yet. Collective."""
    blends = [blend, *(blend_per_split or [])]
    paths = sorted({path for given in blends if given is not None for path in given[0]})
    releases.have_chat_templates_give_tokens(get_tokenizer())
    tokenizations = [tokenization_of(args, path, get_tokenizer()) for path in paths]
    tokenize_all(tokenizations)
    return {item.path: item.prefix for item in tokenizations}


def train_batch_size(consumed: int) -> int:
    """The global batch size once so many samples are consumed, ramp-up and schedules followed."""
    calculator = copy.deepcopy(num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR)
    calculator.update(consumed, False)
    return int(calculator.get_current_running_global_batch_size())


def evaluation_batch_size(consumed: int = 0) -> int:
    """The global batch size of validation and test."""
    args = get_args()
    return int(getattr(args, "eval_global_batch_size", None) or args.global_batch_size)
