"""Multiple choice: `python -m diffrwkv.evaluate --suite=choices --workdir=DIR --data FILE ... [--last_word] ...`.

Scores the choices of each question of files of JSON lines, also compressed, and prints a line of JSON for each file:
how often the right choice is the likeliest, also per byte, with standard errors. With --last_word the lines are
passages, of which the last word is filled in and scored. Each result is kept in `<workdir>/evaluations/`, with a line
for each question beside it, and the same command again goes on behind those that are there. What the numbers mean is
told in docs/evaluation.md.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import diffrwkv
from diffrwkv import bars, choosing, evaluations, files, sharding
from diffrwkv.choosing import Question
from diffrwkv.config import UserError
from diffrwkv.data.readers import json_objects
from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.diffusion.likelihood import metrics
from diffrwkv.diffusion.processes import Masked
from diffrwkv.evaluations import finite
from diffrwkv.run import Run, opened
from diffrwkv.scoring import Item, bounding, check_draws, check_logits, is_exact, laid_out


def work(args: argparse.Namespace) -> None:
    """What the flags of `cli.suites.choices` say. Raises UserError for bad input, before any compute."""
    model = opened(args.workdir, args.model)
    cfg = model.config
    sharding.start_cpu_devices(cfg.train.cpu_devices, args.batch_size)
    mesh = sharding.make_mesh()
    sharding.check_batch(args.batch_size, mesh, "--batch_size")
    run = model.load(mesh, step=args.step, raw=args.raw)
    objective = bounding(run, args.block_size)
    exact = is_exact(objective)
    check_draws(args.draws, exact)
    if args.last_word and not (exact or type(objective.process) is Masked):
        raise UserError(
            f"--last_word fills in masks, or from left to right: config.diffusion.name = {cfg.diffusion.name!r} has "
            "other noise; score choices instead."
        )
    sets = [(name, _read(name, args)) for name in args.data]
    for _, asked in sets:
        items = [item for one in asked for item in (one.items() if isinstance(one, Question) else [one])]
        windows, _ = laid_out(run, objective, items, args.length)
        check_logits(run, args.batch_size, max(len(window.row) for window in windows), "--batch_size")  # of all sets
    options = {"draws": args.draws, "seed": args.seed, "block_size": args.block_size, "length": args.length}
    options |= {"batch_size": args.batch_size}
    told = {"step": run.step, "ema": not args.raw, "weights": model.weights_hash(run.step)}
    for name, asked in sets:
        settings = {
            "suite": "choices",
            "data": name,
            "questions": len(asked),
            "questions_sha256": files.digest([_plain(one) for one in asked]),
            "last_word": args.last_word,
            **options,
            **({"draws": 1, "seed": 0} if exact else {}),
            "block_size": objective.layout.sizes[0] if isinstance(objective.layout, Blocks) else None,
            **told,
            "diffrwkv": diffrwkv.__version__,
        }
        path = evaluations.path_of(model.folder, Path(name).name, settings)
        result = evaluations.kept(path, settings)
        if result is not None:
            print(f"{name}: kept in {path}; remove it to score the file again.", file=sys.stderr)
        else:
            what = "passages" if args.last_word else "questions"
            print(f"{name}: {len(asked):,} {what}.", file=sys.stderr, flush=True)
            found, rows = (_last_words if args.last_word else _choices)(run, asked, options)
            result = {**settings, **found, "exact": exact}
            evaluations.keep_rows(path, rows)
            evaluations.keep(path, result)
        print(json.dumps(result), flush=True)


def _read(name: str, args: argparse.Namespace) -> list[Any]:
    """The questions of a file, or the last words of its passages. Raises UserError."""
    asked: list[Any] = []
    try:
        for where, record in json_objects(Path(name)):
            if args.limit is not None and len(asked) == args.limit:
                break
            if args.last_word:
                if "text" not in record:
                    raise UserError(f"{where} has no passage under 'text'; it has: {', '.join(record) or 'nothing'}.")
                asked.append(choosing.last_word(record["text"], where))
            else:
                hint = " With --last_word the last word of each 'text' is scored." * (set(record) == {"text"})
                try:
                    asked.append(choosing.question(record, where, args.between))
                except UserError as e:
                    raise UserError(f"{e}{hint}") from None
    except (ValueError, OSError, ImportError) as e:
        message = str(e)
        raise UserError(message if name in message else f"{name}: {message}") from None
    if not asked:
        raise UserError(f"{name} has no question in it: name another file.")
    return asked


def _plain(one: Question | Item) -> Any:
    """What of a question or an item is scored, as JSON."""
    return [one.prompt, one.text] if isinstance(one, Item) else [one.prompts, one.texts, one.sizes, one.gold]


Found = tuple[dict[str, Any], list[dict[str, Any]]]  # of a file, and of each of its questions


def _choices(run: Run, questions: Sequence[Question], options: dict[str, Any]) -> Found:
    choices = choosing.choose(run, questions, **options, progress=bars.shown())
    rows = [dataclasses.asdict(c) | {"picked": c.picked, "picked_norm": c.picked_norm} for c in choices]
    return choosing.accuracy(choices), rows


def _last_words(run: Run, items: Sequence[Item], options: dict[str, Any]) -> Found:
    answers = choosing.answers(run, items, **options, greedy=True, progress=bars.shown())
    nats = np.array([a.nats for a in answers])
    acc, acc_se = choosing.share([bool(a.greedy) for a in answers])
    mean, se = choosing.share(nats.tolist())
    tokens = sum(a.tokens for a in answers)
    found = {
        "acc": acc,
        "acc_se": acc_se,
        "nats": mean,
        "nats_se": se,
        "nats_se_draws": math.sqrt(sum(a.error**2 for a in answers)) / len(answers),
        "ppl": finite(metrics(mean)["ppl"]),
        "tokens": tokens,
        "nelbo": float(nats.sum()) / tokens,
    }
    return found, [{"word": i.text.strip()} | dataclasses.asdict(a) for i, a in zip(items, answers, strict=True)]
