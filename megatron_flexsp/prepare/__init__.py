"""Text to an ordinary Megatron data set, byte by byte: what a first run trains on.

No tokenizer has to be downloaded: a document's tokens are its UTF-8 bytes and an end-of-document token.
"""

from megatron_flexsp.prepare.dataset import MEGATRON_TOKENIZER_ARGUMENTS, DatasetSummary, write_dataset
from megatron_flexsp.prepare.sources import JsonLines, Record, Source, StandardLibrary

__all__ = [
    "MEGATRON_TOKENIZER_ARGUMENTS",
    "DatasetSummary",
    "JsonLines",
    "Record",
    "Source",
    "StandardLibrary",
    "write_dataset",
]
