"""How likely a run finds texts: `python -m diffrwkv.evaluate --workdir=DIR [--data NAME|PATH ...] [--draws=8] ...`.

Prints the NELBO in nats per token of the run's own validation text, bits per character of what was scored and the bound
on perplexity, with what was counted and two standard errors, of the draws and of the text, and writes the same to
`<workdir>/eval.json`. With --data it does so for other texts, sets that others report or files, one after another, a
line of JSON each: docs/evaluation.md says what the numbers mean. Each is kept in `<workdir>/evaluations/`, and the same
command again goes on behind those that are there.
"""

import argparse
import dataclasses
import json
import sys
from typing import Any

import jax

import diffrwkv
from diffrwkv import bars, config, evaluations, sharding
from diffrwkv.config import UserError
from diffrwkv.data import Reading
from diffrwkv.data import evaluation as texts
from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.diffusion.likelihood import metrics
from diffrwkv.diffusion.objectives import Objective
from diffrwkv.evaluations import finite
from diffrwkv.evaluator import Evaluator, line_of
from diffrwkv.run import Opened, Run, is_padded, opened
from diffrwkv.scoring import bounding, check_logits, is_exact


def work(args: argparse.Namespace) -> None:
    """What the flags of `cli.suites.likelihood` say. Raises UserError for bad input, before any compute."""
    model = opened(args.workdir, args.model)
    cfg = model.config
    batch_size = args.batch_size or cfg.train.eval_batch_size
    sharding.start_cpu_devices(cfg.train.cpu_devices, batch_size)
    mesh = sharding.make_mesh()
    sharding.check_batch(batch_size, mesh, "--batch_size")
    run = model.load(mesh, step=args.step, raw=args.raw)
    length = args.length or cfg.data.length
    check_logits(run, batch_size, length, "--batch_size")
    objective = bounding(run, args.block_size)
    options = {"batch_size": batch_size, "draws": args.draws or 8, "limit": args.limit, "seed": args.seed or 0}
    if is_exact(objective):
        if args.draws is not None or args.seed is not None:
            what = "a model from left to right has" if objective.causal else "masked blocks of one token have"
            print(f"--draws and --seed do nothing: {what} an exact likelihood.", file=sys.stderr)
        options |= {"draws": 1, "seed": 0}
    told = {"step": run.step, "ema": not args.raw}
    if isinstance(objective.layout, Blocks):
        told["block_size"] = objective.layout.block(length)
    if args.data:
        evaluate_texts(args, model, run, objective, options, told)
    else:
        evaluate_split(args, model, run, objective, options, told)


def evaluate_split(
    args: argparse.Namespace,
    model: Opened,
    run: Run,
    objective: Objective,
    options: dict[str, Any],
    told: dict[str, Any],
) -> None:
    """A split of the data that the run was trained with."""
    dataset = model.own_data(args.data_root, "--data")
    split = args.split or "validation"
    try:
        evaluator = Evaluator(
            run.model, objective, dataset, run.mesh, split=split, padded=is_padded(run.config), **options
        )
    except ValueError as e:  # a split that the data set lacks
        raise UserError(str(e)) from None
    result = evaluator(run.params, progress=bars.shown())
    result |= {"split": split, "seed": options["seed"], **told, "data": run.config.data.name}
    print(f"{split}: {line_of(result, is_exact(objective))}", file=sys.stderr, flush=True)
    print(json.dumps(result, indent=2))
    if jax.process_index() == 0:
        model.folder.mkdir(parents=True, exist_ok=True)
        config.write_json(result, model.folder / "eval.json")


# --- Other texts ------------------------------------------------------------------------------------


def evaluate_texts(
    args: argparse.Namespace,
    model: Opened,
    run: Run,
    objective: Objective,
    options: dict[str, Any],
    told: dict[str, Any],
) -> None:
    """Each text that --data names, all of which are read before the first is scored."""
    cfg = run.config.data
    wrap = cfg.wrap if args.wrap is None else args.wrap
    how = {
        "length": args.length or cfg.length,
        "wrap": wrap,
        "packing": args.packing or cfg.packing,
        "group": args.group,
        "eos": not args.no_eos,
    }
    if how["length"] > cfg.length:
        print(f"Rows of {how['length']} tokens: the model was trained on {cfg.length}.", file=sys.stderr)
    asked = {"split": args.split, "detokenizer": args.detokenizer, "each_line": args.each_line}
    all_read: list[tuple[texts.Text, texts.Rows, Reading]] = []
    for name in args.data:
        reading = Reading(args.text_key or cfg.text_key, cfg.on_error, cfg.max_document_bytes)
        try:
            text = texts.read(name, args.data_root or cfg.root, reading=reading, **asked)
            keep_first = objective.layout.keep_first
            rows = texts.cut(text, run.tokenizer, limit=options["limit"], keep_first=keep_first, **how)
        except (ValueError, OSError, ImportError, RuntimeError) as e:
            message = str(e)
            raise UserError(message if name in message else f"{name}: {message}") from None
        all_read.append((dataclasses.replace(text, documents=()), rows, reading))  # they are not needed any more

    weights = model.weights_hash(run.step)
    for text, rows, reading in all_read:
        skipped = sum(entry["records"] for entry in reading.skipped.values())
        settings = {
            "data": text.name,
            "split": text.split,
            "detokenizer": text.detokenizer,
            "documents": rows.documents,
            "documents_sha256": text.sha256,
            "records_skipped": skipped,
            **how,
            **options,
            **told,
            "weights": weights,
            "diffrwkv": diffrwkv.__version__,
        }
        path = evaluations.path_of(model.folder, text.name, settings)
        result = evaluations.kept(path, settings)
        if result is not None:
            print(f"{text.name}: kept in {path}; remove it to score the text again.", file=sys.stderr)
        else:
            print(
                f"{text.name}: {rows.documents:,} documents, detokenizer {text.detokenizer}, {rows.dropped:,} tokens "
                f"dropped{f', {skipped:,} bad records left out' * bool(skipped)}.",
                file=sys.stderr,
                flush=True,
            )
            evaluator = Evaluator(
                run.model, objective, rows.dataset, run.mesh, padded=how["packing"] == "document", **options
            )
            scored = evaluator(run.params, progress=bars.shown())
            words = rows.counted.words
            result = {
                **settings,
                **scored,
                "tokens_dropped": rows.dropped,
                "words": words,
                "word_ppl": finite(metrics(scored["nelbo"] * scored["tokens"] / words)["ppl"]) if words else None,
                "ppl": finite(scored["ppl"]),
            }
            evaluations.keep(path, result)
        print(f"{text.name}: {line_of(result, is_exact(objective))}", file=sys.stderr, flush=True)
        print(json.dumps(result), flush=True)
