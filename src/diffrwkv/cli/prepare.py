r"""Turns text into tokenised shards that `config.data.name` can name.

    diffrwkv prepare --input books/ --tokenizer bpe:4096 --output books-bpe4096
    diffrwkv prepare --input openwebtext --tokenizer gpt2 \
        --output $DIFFRWKV_DATA/openwebtext-gpt2
    diffrwkv prepare --input hf:Salesforce/wikitext:wikitext-103-raw-v1 \
        --tokenizer gpt2 --output wikitext103-gpt2

The input is a data set's name, a file, a folder or a pattern of text, JSON (.jsonl, .json, ...),
.csv, .tsv or .parquet files, plain or compressed (.gz, .xz, .zst, .bz2, .zip), or a Hugging Face
data set, `hf:NAME` or `hf:NAME:CONFIG` (`pip install 'diffrwkv[hf]'`). It is streamed, never
held in memory. The output is a folder of .npy shards with a manifest.json (tokenizer, counts,
hashes). A run that was stopped goes on where it was when the same command is run again; a folder
that is finished is checked, and shards that are damaged are made again.
"""

import argparse
import math
import shlex
import sys

from diffrwkv import cli, config
from diffrwkv.config import UserError
from diffrwkv.data import shards, sources, tokenizers
from diffrwkv.data.readers import Reading

MOST_SHARD_TOKENS = 1 << 28  # a shard is held in memory while it is made


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked, and the whole as `command`. Raises UserError."""
    p = config.ArgumentParser(
        prog=cli.called("prepare"), formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    p.add_argument("--input", required=True, help="data set name, path, pattern, or hf:NAME")
    p.add_argument("--output", required=True, help="folder for the shards and their manifest")
    p.add_argument("--tokenizer", required=True, help=tokenizers.FORMS)
    p.add_argument("--root", help="data folder ($DIFFRWKV_DATA, else ~/.cache/diffrwkv)")
    p.add_argument("--text_key", default="text", help="key or column of the text in JSON, csv and parquet (text)")
    p.add_argument(
        "--on_error",
        default="stop",
        choices=("stop", "skip"),
        help="what a bad record does: stop, or be left out and counted (stop)",
    )
    p.add_argument(
        "--max_document_bytes",
        type=int,
        default=Reading.max_document_bytes,
        help=f"a longer record is refused ({Reading.max_document_bytes})",
    )
    p.add_argument("--validation", help="data set name or path to validate on instead of a part")
    p.add_argument(
        "--validation_fraction",
        type=float,
        default=0.1,
        help="part at the end that validates, if nothing else does (0.1)",
    )
    p.add_argument(
        "--shard_tokens",
        type=int,
        default=shards.SHARD_TOKENS,
        help=f"tokens per shard, about ({shards.SHARD_TOKENS})",
    )
    p.add_argument("--max_documents", type=int, help="take only the first so many documents")
    arguments = sys.argv[1:] if arguments is None else arguments
    args = p.parse_args(arguments)
    args.command = shlex.join(["python", "-m", "diffrwkv.prepare", *arguments])
    for name in ("input", "output", "tokenizer", "text_key", "root", "validation"):
        value = getattr(args, name)
        if value is not None and (not value.strip() or "\0" in value):
            raise UserError(f"--{name} is empty, or no text: give it a value.")
    for name in ("max_document_bytes", "max_documents", "shard_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    if args.shard_tokens > MOST_SHARD_TOKENS:
        raise UserError(f"--shard_tokens must be at most {MOST_SHARD_TOKENS}, got {args.shard_tokens}.")
    if not (math.isfinite(args.validation_fraction) and 0 < args.validation_fraction < 1):
        raise UserError(f"--validation_fraction must be between 0 and 1, got {args.validation_fraction}.")
    return args


def check(args: argparse.Namespace) -> None:
    """What else can be seen at once. Raises UserError."""
    try:
        tokenizers.parse(args.tokenizer)
        for name in filter(None, (args.input, args.validation)):
            sources.check_name(name, args.root)
    except ValueError as e:
        raise UserError(str(e)) from None
