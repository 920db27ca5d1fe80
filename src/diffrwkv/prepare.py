"""Turns text into tokenised shards that `config.data.name` can name; cli/prepare.py says how it is called.

The input is streamed, never held in memory. The output is a folder of .npy shards with a manifest.json (tokenizer,
counts, hashes). A run that was stopped goes on where it was when the same command is run again; a folder that is
finished is checked, and shards that are damaged are made again.
"""

from __future__ import annotations

if __name__ == "__main__":  # here, for the flags are read before JAX is imported
    from diffrwkv import cli

    cli.start("prepare")

import argparse
import json
import os
import sys
from pathlib import Path

from diffrwkv import config
from diffrwkv.cli import prepare as flags
from diffrwkv.config import UserError
from diffrwkv.data import manifest as manifests
from diffrwkv.data import shards, sources, splits, tokenizers
from diffrwkv.data.readers import total_skipped


def check_output(output: Path, name: str, root: str | None) -> None:
    """Raises UserError if the folder cannot be made or written, or lies in the folder that is read."""
    for place in (output, *output.absolute().parents):
        if place.is_dir():
            break
        if os.path.lexists(place):
            raise UserError(f"--output={output}: {place} is not a folder; name another one.")
    if not os.access(place, os.W_OK | os.X_OK) and not (output / manifests.MANIFEST).is_file():
        raise UserError(f"--output={output}: {place} may not be written; name another folder.")
    for base in (Path(), sources.data_root(root)):
        read = base / Path(os.path.expanduser(name))
        if name not in sources.DATASETS and read.is_dir():
            if output.resolve().is_relative_to(read.resolve()):
                raise UserError(f"--output={output} is inside of --input={name}, which is read; name another folder.")
            return


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError."""
    work(flags.parse_arguments(arguments))


def work(args: argparse.Namespace) -> None:
    """What the flags say. Raises UserError."""

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        tokenizers.parse(args.tokenizer)
        output = config.at_home(args.output, "--output=")
        check_output(output, args.input, args.root)
        if os.access(output / manifests.LOCK, os.W_OK):  # refuse before the text is read
            with manifests.locked(output):
                pass
        plan = sources.plan(
            args.input,
            args.root,
            text_key=args.text_key,
            validation=args.validation,
            validation_fraction=args.validation_fraction,
            max_documents=args.max_documents,
            on_error=args.on_error,
            max_document_bytes=args.max_document_bytes,
        )
        manifest = shards.prepare(
            output,
            plan,
            args.tokenizer,
            shard_tokens=args.shard_tokens,
            command=args.command,
            root=args.root,
            progress=True,
            tell=tell,
        )
    except (ValueError, OSError, ImportError, RuntimeError, OverflowError) as error:
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error
    except KeyboardInterrupt:
        tell("Stopped; the same command goes on where it was.")
        raise
    info = {**manifest["info"], **manifest["splits"], "skipped": total_skipped(manifest["skipped"])}
    tell(splits.summary(info))
    keys = ("documents", "characters", "tokens")
    counts = {split: {key: entry[key] for key in keys} for split, entry in manifest["splits"].items()}
    print(json.dumps({"output": args.output, "tokenizer": manifest["tokenizer_name"], **counts}))
