"""How good samples are: `python -m diffrwkv.evaluate --suite=samples --workdir=DIR --judge=WORKDIR|hf:NAME ...`.

Samples of the run by any sampler, or the texts of a file (--texts), as a judge that reads from left to right finds
them, and how varied they are; beside the same of as much real text, the run's validation text or --real. Prints JSON
and keeps it in `<workdir>/evaluations/`; the same command again prints what is kept. docs/evaluation.md says which
number means what.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import diffrwkv
from diffrwkv import bars, evaluations, files, generation, judging, sampler_flags, sharding
from diffrwkv.canvas import canvases
from diffrwkv.cli.suites.samples import NUMBER
from diffrwkv.config import UserError
from diffrwkv.data import Reading, Tokenizer
from diffrwkv.data import evaluation as data
from diffrwkv.diffusion.sample_quality import NGRAMS
from diffrwkv.diffusion.samplers import SAMPLERS, Sampler
from diffrwkv.run import Opened, Run, opened


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts, and the tokens that their statistics are of; None: those that the judge makes of them."""

    texts: list[str]
    tokens: list[np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the texts come from that are judged.

    Attributes:
      name: of the result's file.
      settings: that they depend on; "num" is how many they are.
      tokenizer: that the validation text has.
      tokens: whether they come in tokens of this tokenizer.
      make: gives them, and what they cost.
    """

    name: str
    settings: dict[str, Any]
    tokenizer: Tokenizer | None
    tokens: bool
    make: Callable[[], tuple[Texts, dict[str, float]]]


def work(args: argparse.Namespace) -> None:
    """What the flags of `cli.suites.samples` say. Raises UserError for bad input, before any compute."""
    model = opened(args.workdir, args.model) if args.workdir or args.model else None
    sharding.start_cpu_devices(0 if model is None else model.config.train.cpu_devices, args.batch_size)
    mesh = sharding.make_mesh()
    judge = judging.load_judge(args.judge, mesh)
    window, stride = judging.windowing(judge, args.window, args.stride)
    version = judging.mauve_version()
    features = judge if args.features is None or version is None else judging.load_judge(args.features, mesh)
    if args.texts is not None:
        source = _of_file(args, judge, model)
    else:
        assert model is not None  # parse_arguments has seen to it
        source = _of_run(args, model, model.load(mesh, step=args.step, raw=args.raw))
    real, others, told = _real(args, model, source, twice=version is not None)
    settings = {
        "suite": "samples",
        **source.settings,
        "judge": judge.name,
        "judge_weights": judge.weights,
        "window": window,
        "stride": stride,
        "features": features.name,
        "features_weights": features.weights,
        "mauve_package": version,
        **told,
        "diffrwkv": diffrwkv.__version__,
    }
    if version is None:
        print("MAUVE is null: it needs mauve-text (pip install 'diffrwkv[mauve]').", file=sys.stderr)
    path = None if model is None else evaluations.path_of(model.folder, f"samples-{source.name}", settings)
    result = None if path is None else evaluations.kept(path, settings)
    if result is not None:
        print(f"Kept in {path}; remove it to judge anew.", file=sys.stderr)
    else:
        texts, cost = source.make()
        how = {"batch_size": args.batch_size, "progress": bars.shown()}
        sets = {"samples": texts}
        if real is not None:
            sets["text"] = _cut(real, texts, source.tokenizer)
        reference = sets.get("text") if others is None else _cut(others, texts, source.tokenizer)
        result = settings | {
            "tokens_are": "the run's" if source.tokens else "the judge's",
            "features_are": features.features_are,
            "device": jax.devices()[0].device_kind,
        }
        for key, some in sets.items():
            found = judging.figures(judge, some.texts, some.tokens, window=window, stride=stride, **how)
            found["mauve"] = None
            if reference is not None and reference is not some:
                found["mauve"] = judging.mauve(
                    features,
                    some.texts,
                    reference.texts,
                    window=window if features is judge else features.length,
                    batch_size=args.batch_size,
                )
            result[key] = found | (cost if key == "samples" else {})
        if path is not None:
            evaluations.keep(path, result)
    print(json.dumps(result, indent=2), flush=True)


# --- Samples ----------------------------------------------------------------------------------------


def _of_run(args: argparse.Namespace, model: Opened, run: Run) -> Source:
    """Samples of a run. Raises UserError for a sampler that does not fit it."""
    cfg, tokenizer, num = run.config, run.tokenizer, args.num or NUMBER
    sampler = sampler_flags.build(args, run)
    if note := generation.same_note(sampler, num):
        print(note, file=sys.stderr)
    rows = canvases(cfg, tokenizer, num=num, length=args.length)
    if (room := int((rows[0] == tokenizer.mask_id).sum())) < max(NGRAMS):
        raise UserError(f"Samples of {room} tokens have no distinct-{max(NGRAMS)}: raise --length.")
    how = {"seed": args.seed, "batch_size": min(args.batch_size, num), "stop_at_eos": args.stop_at_eos}

    def make():
        drawn, cost = draw(run, sampler, rows, progress=bars.shown(), **how)
        tokens = [
            _text_tokens(z[:n], tokenizer, stop_at_eos=False)  # where it stops, it has been cut
            for z, n in zip(drawn.tokens, drawn.lengths.tolist(), strict=True)
        ]
        return Texts([tokenizer.decode(row) for row in tokens], tokens), cost

    settings = {
        "data": cfg.data.name,
        "num": num,
        "length": len(rows[0]),
        "sampler": _told(sampler),
        **how,
        "step": run.step,
        "ema": not args.raw,
        "weights": model.weights_hash(run.step),
    }
    return Source(args.sampler or cfg.sampler.name, settings, tokenizer, True, make)


def _told(sampler: Any) -> str:
    """The sampler and its options that are not the defaults: "ancestral(num_steps=8)"."""
    options = []
    for field in dataclasses.fields(sampler):
        value = getattr(sampler, field.name)
        if dataclasses.is_dataclass(value):
            options.append(_told(value))
        elif value != field.default:
            options.append(f"{field.name}={value!r}")
    names = {cls: name for name, cls in SAMPLERS.items()}
    return f"{names.get(type(sampler), type(sampler).__name__)}({', '.join(options)})"


def draw(
    run: Run,
    sampler: Sampler,
    rows: Sequence[np.ndarray],
    *,
    seed: int = 0,
    batch_size: int = 16,
    stop_at_eos: bool = True,
    progress: bool = False,
) -> tuple[generation.Generation, dict[str, float]]:
    """Fills canvases, and what it costs, compiling left out.

    Returns:
      (`Generation`, {"passes": of the network for a sample, the mean; "seconds", "cpu_seconds": a sample's, the median
      over batches; "tokens_per_second": all tokens that were generated, over all seconds}).
    """
    how: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "stop_at_eos": stop_at_eos}
    full = [np.full_like(row, run.tokenizer.pad_id) for row in rows[:batch_size]]  # nothing to fill: it is compiled
    bar = bars.bar(len(rows), "sample", show=progress, compiles=True)
    next(generation.batches(run, sampler, full, **how))
    done, cpu, wall, tokens = [], [], [], 0
    filled = generation.batches(run, sampler, rows, **how)
    for first in range(0, len(rows), batch_size):
        clocks = time.process_time(), time.perf_counter()
        batch = next(filled)
        cpu.append((time.process_time() - clocks[0], len(batch.texts)))
        wall.append((time.perf_counter() - clocks[1], len(batch.texts)))
        done.append(batch)
        for row, n in zip(rows[first : first + batch_size], batch.lengths.tolist(), strict=True):
            tokens += int((row[:n] == run.tokenizer.mask_id).sum())
        bar.update(len(batch.texts))
    bar.close()
    joined = generation.join(done)
    cost = {
        "passes": float(joined.passes.mean()),
        "seconds": statistics.median(seconds / n for seconds, n in wall),
        "cpu_seconds": statistics.median(seconds / n for seconds, n in cpu),
        "tokens_per_second": tokens / sum(seconds for seconds, _ in wall),
    }
    return joined, cost


def _text_tokens(row: np.ndarray, tokenizer: Tokenizer, *, stop_at_eos: bool) -> np.ndarray:
    """A row's tokens of text, without specials; up to its first EOS if it stops there."""
    if len(row) and row[0] == tokenizer.bos_id:
        row = row[1:]
    if stop_at_eos and tokenizer.eos_id is not None and len(ends := np.flatnonzero(row == tokenizer.eos_id)):
        row = row[: ends[0]]
    specials = [i for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) if i is not None]
    return row[~np.isin(row, specials)]


# --- Texts ------------------------------------------------------------------------------------------


def _read(name: str, args: argparse.Namespace, model: Opened | None, flag: str) -> data.Text:
    key = "text" if model is None else model.config.data.text_key
    try:
        return data.read(name, args.data_root, each_line=args.each_line, reading=Reading(args.text_key or key))
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        message = str(e).rstrip(".")
        raise UserError(message + "." if name in message else f"{flag}={name}: {message}.") from None


def _of_file(args: argparse.Namespace, judge: judging.Judge, model: Opened | None) -> Source:
    """The texts of a file. Raises UserError where they are too few, or the judge cannot read them."""
    text = _read(args.texts, args, model, "--texts")
    texts = list(text.documents)[: args.num]
    if len(texts) < 2:
        told = " (--each_line takes each line for one)" * (not args.each_line)
        raise UserError(f"--texts={args.texts} has one text, and standard errors need at least 2{told}.")
    if args.num is not None and args.num > len(texts):
        raise UserError(f"--texts={args.texts} has {len(texts)} texts, and --num = {args.num} are wanted.")
    judging.check_long_enough([judge.encode(each) for each in texts])
    settings = {"data": args.texts, "documents_sha256": files.digest(texts), "num": len(texts)}
    tokenizer = None if model is None else model.tokenizer
    return Source(Path(args.texts).name, settings, tokenizer, False, lambda: (Texts(texts), {}))


def _real(
    args: argparse.Namespace, model: Opened | None, source: Source, *, twice: bool
) -> tuple[Texts | None, Texts | None, dict[str, Any]]:
    """(Real texts, as many other ones that MAUVE compares with, what they are), spread over all that there is.

    None for the others where they are not wanted (`twice`), or there are not as many.
    """
    num: int = source.settings["num"]
    tokenizer: Any = source.tokenizer  # there is one wherever it is used
    told: dict[str, Any]
    if args.real is not None:
        text = _read(args.real, args, model, "--real")
        available, what = len(text.documents), f"--real={args.real} has {len(text.documents)} texts"
        told = {"real": args.real, "real_sha256": text.sha256}

        def get(i):
            if not source.tokens:
                return text.documents[i], None
            try:
                return text.documents[i], tokenizer.encode(text.documents[i])
            except ValueError as e:
                raise UserError(f"--real={args.real}, text {i + 1}: {e}.") from None

    elif model is not None:
        dataset = model.own_data(args.data_root, "--real", args.length)
        rows = dataset.validation
        available, what = len(rows), f"{len(rows)} rows of {rows.length} tokens validate {model.name}"
        told = {"real": "validation", "real_sha256": dataset.info["validation"]["sha256"], "real_length": rows.length}

        def get(i):
            tokens = _text_tokens(rows[i][rows.valid(i)], tokenizer, stop_at_eos=args.stop_at_eos)
            return tokenizer.decode(tokens), tokens if source.tokens else None

    else:
        print("There is no real text beside these: name some with --real, or a run with --workdir.", file=sys.stderr)
        return None, None, {"real": None}
    if available < num:
        raise UserError(f"{what}, and as many are wanted as there are samples, {num}: take fewer (--num).")
    sets = 2 if twice and available >= 2 * num else 1
    if twice and sets == 1:
        print(f"{what}: too few for MAUVE of real text itself, which needs {2 * num}.", file=sys.stderr)
    # The first are the same whether or not there are others, which depends on what is installed.
    places = [np.linspace(0, available - 1, num).astype(int)]
    if sets == 2:
        rest = np.setdiff1d(np.arange(available), places[0])
        places.append(rest[np.linspace(0, len(rest) - 1, num).astype(int)])
    chosen = [[get(i) for i in those.tolist()] for those in places]
    made = [Texts([t for t, _ in some], [x for _, x in some] if source.tokens else None) for some in chosen]
    return made[0], made[1] if sets == 2 else None, told


def _cut(real: Texts, samples: Texts, tokenizer: Tokenizer | None) -> Texts:
    """Each real text no longer than the sample in its place, by the tokens that both have, else by characters."""
    if real.tokens is None or samples.tokens is None or tokenizer is None:
        return Texts([text[: len(sample)] for text, sample in zip(real.texts, samples.texts, strict=True)])
    tokens = [row[: len(sample)] for row, sample in zip(real.tokens, samples.tokens, strict=True)]
    return Texts([tokenizer.decode(row) for row in tokens], tokens)


# --- Flags ------------------------------------------------------------------------------------------
