"""Text, tokenizers and batches.

`load` turns a data set's name or a path into chunks of tokens; `train_iterator` and
`validation_batches` feed from them. Nothing here knows the model or the diffusion.
"""

from diffrwkv.data.batches import train_iterator, validation_batches
from diffrwkv.data.chunks import Dataset
from diffrwkv.data.datasets import DATASETS
from diffrwkv.data.download import data_root
from diffrwkv.data.load import load
from diffrwkv.data.readers import Reading
from diffrwkv.data.splits import summary
from diffrwkv.data.tokenizers import TOKENIZERS, Tokenizer

__all__ = [
    "DATASETS",
    "TOKENIZERS",
    "Dataset",
    "Reading",
    "Tokenizer",
    "data_root",
    "load",
    "summary",
    "train_iterator",
    "validation_batches",
]
