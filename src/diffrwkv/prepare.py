r"""Turns text into tokenised shards that ``config.data.name`` can name.

    python -m diffrwkv.prepare --input books/ --tokenizer bpe:4096 --output books-bpe4096
    python -m diffrwkv.prepare --input openwebtext --tokenizer gpt2 \
        --output $DIFFRWKV_DATA/openwebtext-gpt2
    python -m diffrwkv.prepare --input hf:Salesforce/wikitext:wikitext-103-raw-v1 \
        --tokenizer gpt2 --output wikitext103-gpt2

The input is a data set's name, a file, a folder or a pattern of text, JSON (.jsonl, .json, ...),
.csv, .tsv or .parquet files, plain or compressed (.gz, .xz, .zst, .bz2, .zip), or a Hugging Face
data set, ``hf:NAME`` or ``hf:NAME:CONFIG`` (``pip install 'diffrwkv[hf]'``). It is streamed, never
held in memory. The
output is a folder of .npy shards with a manifest.json (tokenizer, counts, hashes). A run that was
stopped goes on where it was when the same command is run again; shards that are done are checked by
their hash.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from absl import app, flags

from diffrwkv.data import shards, sources, splits, tokenizers
from diffrwkv.data.readers import Reading, total_skipped

_INPUT = flags.DEFINE_string(
    "input", None, "Data set name, path, pattern, or hf:NAME.", required=True
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder for the shards and their manifest.", required=True
)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, f"{tokenizers.FORMS}.", required=True)
_ROOT = flags.DEFINE_string(
    "root", None, "Data folder; default $DIFFRWKV_DATA, else ~/.cache/diffrwkv."
)
_TEXT_KEY = flags.DEFINE_string(
    "text_key", "text", "Key or column of the text in JSON, csv and parquet."
)
_ON_ERROR = flags.DEFINE_enum(
    "on_error", "stop", ["stop", "skip"], "What a bad record does: stop, or be left out and counted."
)
_MAX_DOCUMENT_BYTES = flags.DEFINE_integer(
    "max_document_bytes", Reading.max_document_bytes, "A longer record is refused.", lower_bound=1
)
_VALIDATION = flags.DEFINE_string(
    "validation", None, "Data set name or path to validate on instead of a part."
)
_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.1, "Part at the end that validates, if nothing else does."
)
_SHARD_TOKENS = flags.DEFINE_integer(
    "shard_tokens", shards.SHARD_TOKENS, "Tokens per shard, about.", lower_bound=1
)
_MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents", None, "Take only the first so many documents.", lower_bound=1
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; every setting is a --flag")
    try:
        tokenizers.parse(_TOKENIZER.value)
        plan = sources.plan(
            _INPUT.value,
            _ROOT.value,
            text_key=_TEXT_KEY.value,
            validation=_VALIDATION.value,
            validation_fraction=_FRACTION.value,
            max_documents=_MAX_DOCUMENTS.value,
            on_error=_ON_ERROR.value,
            max_document_bytes=_MAX_DOCUMENT_BYTES.value,
        )
        manifest = shards.prepare(
            Path(_OUTPUT.value).expanduser(),
            plan,
            _TOKENIZER.value,
            shard_tokens=_SHARD_TOKENS.value,
            command=shlex.join(["python", "-m", "diffrwkv.prepare", *sys.argv[1:]]),
            root=_ROOT.value,
            progress=True,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"prepare: {error}")
    info = {**manifest["info"], **manifest["splits"], "skipped": total_skipped(manifest.get("skipped", {}))}
    print(splits.summary(info), file=sys.stderr)
    keys = ("documents", "characters", "tokens")
    counts = {
        split: {key: entry[key] for key in keys} for split, entry in manifest["splits"].items()
    }
    print(json.dumps({"output": _OUTPUT.value, "tokenizer": manifest["tokenizer_name"], **counts}))


def cli() -> None:
    """The entry point of ``python -m diffrwkv.prepare``."""
    app.run(main)


if __name__ == "__main__":
    cli()
