"""Scores a trained denoiser: `python -m diffrwkv.evaluate --workdir=DIR [--draws=8] [--limit=N] [--raw] ...`.

Prints the validation NELBO in nats per token, bits per character of what was scored and the bound on perplexity, with
what was counted and two standard errors, of the draws and of the text, and writes the same to `<workdir>/eval.json`.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from diffrwkv import checkpoint, config, data, sharding
from diffrwkv.config import UserError
from diffrwkv.data import Dataset, Tokenizer
from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.likelihood import Likelihood
from diffrwkv.workdir import named

MOST_LOGITS = 2**34  # of a pass, 64 GiB in float32: more are refused before any memory is taken


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before any compute."""
    args = parse_arguments(arguments)
    workdir = named(args.workdir)
    cfg = config.load(workdir / "config.json")
    batch_size = args.batch_size or cfg.train.eval_batch_size
    sharding.start_cpu_devices(cfg.train.cpu_devices, batch_size)
    mesh = sharding.make_mesh()
    sharding.check_batch(batch_size, mesh, "--batch_size")
    run = load_run(workdir, mesh, step=args.step, raw=args.raw)
    if batch_size * cfg.data.length * run.tokenizer.vocab_size > MOST_LOGITS:
        raise UserError(
            f"--batch_size = {batch_size} is too large: sequences of {cfg.data.length} tokens, with "
            f"{run.tokenizer.vocab_size} logits for each, are more than {MOST_LOGITS:,} logits at a time."
        )
    objective = run.objective.validation
    if args.block_size is not None:
        if not isinstance(objective, objectives.BlockDiffusion):
            raise UserError(f"--block_size needs block diffusion, not config.diffusion.name = {cfg.diffusion.name!r}.")
        objective = dataclasses.replace(objective, blocks=(args.block_size,))
    if objective.causal and (args.draws is not None or args.seed is not None):
        print("--draws and --seed do nothing: a model from left to right has an exact likelihood.", file=sys.stderr)
    dataset = load_data(cfg, args.data_root, tokenizer=run.tokenizer)
    check_same_data(workdir, dataset)
    try:
        evaluator = Evaluator(
            run.model,
            objective,
            dataset,
            mesh,
            batch_size=batch_size,
            draws=args.draws or 8,
            limit=args.limit,
            split=args.split,
            seed=args.seed or 0,
            padded=is_padded(cfg),
        )
    except ValueError as e:  # a split that the data set lacks
        raise UserError(str(e)) from None
    result = evaluator(run.params, progress=sys.stderr.isatty())
    result |= {"step": run.step, "ema": not args.raw, "split": args.split, "seed": args.seed or 0}
    if isinstance(objective, objectives.BlockDiffusion):
        result |= {"block_size": objective.block(cfg.data.length)}
    result |= {"data": cfg.data.name}
    print(json.dumps(result, indent=2))
    if jax.process_index() == 0:
        config.write_json(result, workdir / "eval.json")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, checked. Raises UserError."""
    p = config.ArgumentParser(prog="python -m diffrwkv.evaluate", description=__doc__.split("\n\n")[1])
    p.add_argument("--workdir", required=True, help="folder that train wrote")
    p.add_argument("--draws", type=int, help="draws of (t, mask) per sequence (8)")
    p.add_argument("--split", default="validation", choices=("validation", "test", "train"))
    p.add_argument("--limit", type=int, help="only the first so many sequences")
    p.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")
    p.add_argument("--step", help="checkpoint: a step or 'best' (the newest)")
    seed = functools.partial(config.seed, name="--seed")
    p.add_argument("--seed", type=seed, help="of the noise (0)")
    p.add_argument("--batch_size", type=int, help="sequences at a time (config.train.eval_batch_size)")
    p.add_argument("--block_size", type=int, help="block diffusion: tokens in a block; 0: all")
    p.add_argument("--data_root", help="folder of the data, if not the one of training")
    args = p.parse_args(arguments)
    for name in ("draws", "limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.block_size is not None and args.block_size < 0:
        raise UserError(f"--block_size must be at least 0, got {args.block_size}.")
    if args.draws is not None and args.draws >= 2**31:
        raise UserError(f"--draws must be below {2**31}, got {args.draws}.")
    return args


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds, ready to use.

    Attributes:
      model, objective, tokenizer: built from config.json and tokenizer.json.
      params: float32 weights on the mesh; the moving average unless `raw` was asked for.
      step: of the checkpoint.
      config: the stored ConfigDict.
      mesh: that the params lie on.
      generators: what was compiled to generate from it, by sampler; `generation.compiled` fills it.
    """

    model: Denoiser
    objective: Any
    tokenizer: Tokenizer
    params: Any
    step: int
    config: Any
    mesh: Mesh
    generators: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)


def load_run(workdir: Path, mesh: Mesh, *, step: str | None = None, raw: bool = False) -> Run:
    """Reads a workdir.

    Args:
      step: a step's number, "best", or None for the newest readable one.
      raw: the weights themselves, not their average.

    Raises UserError for a missing or unreadable file, or a tokenizer that is not the checkpoint's.
    """
    cfg = config.load(workdir / "config.json")
    tokenizer = load_tokenizer(workdir)
    model, objective = build(cfg, tokenizer)
    boxed = abstract_params(model, cfg.data.length)
    shardings = sharding.param_shardings(boxed, mesh)
    abstract = checkpoint.abstract_like(nn.unbox(boxed), shardings)
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        if step == "best":
            number = checkpoints.best_step()
            if number is None:
                raise UserError(f"No checkpoint in {workdir} has a validation NELBO: name a --step.")
        elif step is None:
            number = None
        else:
            try:
                number = int(step)
            except ValueError:
                raise UserError(f"--step must be a number or 'best', got {step!r}.") from None
        number, params = checkpoints.restore_weights("params" if raw else "ema", abstract, number)
    return Run(model, objective, tokenizer, params, number, cfg, mesh)


def load_tokenizer(workdir: Path) -> Tokenizer:
    """`<workdir>/tokenizer.json`. Raises UserError unless it is the one that the run was trained with."""
    path = workdir / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_json(config.read_json(path))
    except FileNotFoundError:
        raise UserError(f"No tokenizer.json in {workdir}: without it token ids have no meaning.") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}).") from None
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise UserError(f"{path} is not a tokenizer ({e}).") from None
    trained = read_record(workdir)["data"]["tokenizer_fingerprint"]
    if trained != tokenizer.fingerprint:
        raise UserError(
            f"{path} is not the tokenizer that this checkpoint was trained with: put the original file back "
            f"(fingerprint {trained[:12]}, this one has {tokenizer.fingerprint[:12]})."
        )
    return tokenizer


def read_record(workdir: Path) -> dict[str, Any]:
    """`<workdir>/run.json`: versions, devices and the data's description. Raises UserError."""
    path = workdir / "run.json"
    try:
        record = config.read_sealed(path)
        if "tokenizer_fingerprint" not in record.get("data", {}):
            raise ValueError("it does not say which tokenizer the run has")
    except FileNotFoundError:
        raise UserError(
            f"No run.json in {workdir}, which says what data and tokenizer its checkpoints are of: put it back, or "
            "take another --workdir."
        ) from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}).") from None
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is not the record of a run ({e}).") from None
    return record


def load_data(cfg: Any, root: str | None = None, tokenizer: Tokenizer | None = None) -> Dataset:
    """`data.load(**config.data)`, its errors as UserError; `root` and `tokenizer` replace the config's."""
    arguments = cfg.data.to_dict()
    if root is not None:
        arguments["root"] = root
    if tokenizer is not None:
        arguments["tokenizer"] = tokenizer
    try:
        return data.load(**arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        raise UserError(str(e)) from e


def check_same_data(workdir: Path, dataset: Dataset) -> None:
    """Raises UserError when the text or its tokens are not those that the run was trained with."""
    trained = read_record(workdir)["data"]
    for key, what in (("tokenizer_fingerprint", "tokenizer"), ("sha256", "text")):
        old, new = trained.get(key), dataset.info.get(key)
        if old is not None and old != new:
            raise UserError(
                f"The {what} of data set {dataset.info['name']!r} is not the one that {workdir} was trained with "
                f"({old[:12]} then, {new[:12]} now): restore the data, or take another --workdir."
            )
    for split in ("train", "validation"):  # one text can be divided in many ways
        old, new = (info.get(split, {}).get("sha256") for info in (trained, dataset.info))
        if old is not None and old != new:
            raise UserError(
                f"Data set {dataset.info['name']!r} is divided in another way than when {workdir} was trained with it: "
                f"its {split} text is not the same. Restore the data, or take another --workdir."
            )


def build(cfg: Any, tokenizer: Tokenizer) -> tuple[Denoiser, Any]:
    """(denoiser, objective) of a config; their errors as UserError."""
    try:
        model = Denoiser(vocab_size=tokenizer.vocab_size, **cfg.model.to_dict())
        objective = objectives.from_config(mask_id=tokenizer.mask_id, **cfg.diffusion.to_dict())
        sees_later = not model.causal
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(str(e)) from e
    if objective.causal and sees_later:
        raise UserError(
            f"config.diffusion.name = {cfg.diffusion.name!r} predicts the next token, but config.model sees it: take a "
            'causal pattern ("rwkv7", "causal_attention", "mamba2") and channel_mixers.rwkv7.shift = "previous".'
        )
    return model, objective


def abstract_params(model: Denoiser, length: int) -> Any:
    """Shapes of the parameters with their logical axis names (boxed), without computing anything."""
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    times = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        return jax.eval_shape(model.init, jax.random.key(0), tokens, times)["params"]
    except (ValueError, TypeError) as e:
        raise UserError(f"config.model: {e}") from e


def is_padded(cfg: Any) -> bool:
    """Whether training rows can have padding, so that the network must be told what is valid."""
    return cfg.data.packing == "document"


class Evaluator:
    """The NELBO of any weights on the same text under the same noise, so that two results compare.

    Times are low-discrepancy over all sequences of a draw, in an order of their own in each draw (a sequence's place in
    the text says nothing about its time). The noise depends on `seed`, the draw and the batch size, on nothing else.

    Args:
      batch_size: sequences at a time, over all devices.
      draws: independent (t, mask) per sequence.
      limit: only the first so many sequences; None or 0: all.
      padded: pass `valid` to the network.

    Raises ValueError for a split that the data set lacks, UserError for a part of one without a single character.
    """

    def __init__(
        self,
        model: Denoiser,
        objective: Any,
        dataset: Dataset,
        mesh: Mesh,
        *,
        batch_size: int,
        draws: int = 1,
        limit: int | None = None,
        split: str = "validation",
        seed: int = 0,
        padded: bool = False,
    ):
        self._searches = objective.search_mask_rates
        objective = objective.validation
        self._objective, self._dataset, self._mesh = objective, dataset, mesh
        self._batch_size, self._draws, self._key = batch_size, draws, jax.random.key(config.seed(seed))
        if objective.causal:  # no noise: every draw would be the same
            self._draws = 1
        self._batches = data.validation_batches(
            dataset,
            batch_size=batch_size,
            limit=limit or None,
            split=split,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.num_sequences = self._batches.num_chunks
        keep_first = getattr(objective, "keep_first", False)
        self._characters, tokens = count_scored(dataset, split, self.num_sequences, keep_first=keep_first)
        if not self._characters:
            raise UserError(
                f"The {self.num_sequences} sequences of the {split} split that are to be scored hold no character: "
                "score more of them (--limit, config.train.eval_limit)."
            )
        self._characters_per_token = self._characters / tokens

        def score(params, tokens, valid, t, key):
            def denoise(z, t, **blocks):
                return model.apply({"params": params}, z, t, valid=valid if padded else None, **blocks)

            loss = objective.loss(denoise, key, tokens, t, valid)
            if not self._searches:
                return loss.nats, loss.tokens, None
            rates = jnp.where(valid.any(axis=1)[:, None], objective.schedule.mask_probability(t), jnp.nan)
            return loss.nats, loss.tokens, (rates, objective.block_nats(loss))

        self._score = jax.jit(sharding.over(mesh, score), out_shardings=sharding.replicated(mesh))

    def __call__(
        self, params: Any, *, progress: bool = False, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """`Likelihood.result` of the weights, with the "characters" that were scored and "characters_per_token".

        Also "mask_rates" if the objective searches them: those at which a block's loss varies least. None as soon as
        `stop`, asked before each batch, says so.
        """
        from tqdm import tqdm

        rows = sharding.batch_sharding(self._mesh)
        scores = []
        bar = tqdm(total=self._draws * len(self._batches), desc="evaluate", disable=not progress)
        for draw in range(self._draws):
            key = jax.random.fold_in(self._key, draw)
            times = self._times(jax.random.fold_in(key, 2**31))
            for i, batch in enumerate(self._batches):
                if stop():
                    bar.close()
                    return None
                t = times[i * self._batch_size : (i + 1) * self._batch_size]
                arrays = sharding.global_batch(batch, self._mesh)
                t = jax.make_array_from_callback(t.shape, rows, lambda index, t=t: t[index])
                scored = self._score(params, arrays["tokens"], arrays["valid"], t, jax.random.fold_in(key, i))
                scores.append((draw, scored))
                if progress:
                    jax.block_until_ready(scored)
                bar.update()
        bar.close()
        likelihood = Likelihood()
        for draw, (nats, tokens, _) in scores:
            likelihood.add(np.asarray(nats), np.asarray(tokens), draw=draw)
        result = likelihood.result(self._characters_per_token)
        result |= {"characters": self._characters, "characters_per_token": self._characters_per_token}
        if self._searches:
            pairs = [np.stack([np.asarray(x).reshape(-1) for x in blocks]) for _, (*_, blocks) in scores]
            rates, nats = np.concatenate(pairs, axis=1)
            result["mask_rates"] = objectives.least_variance(rates, nats)  # NaN, the filling rows, is in no range
        return result

    def _times(self, key: jax.Array) -> np.ndarray:
        """float32 [batches * batch_size, ...]: the times of each sequence; 1 for the filling rows."""
        k_times, k_order = jax.random.split(key)
        t = np.asarray(self._objective.times(k_times, self.num_sequences, self._dataset.length))
        t = t[np.asarray(jax.random.permutation(k_order, self.num_sequences))]
        filled = len(self._batches) * self._batch_size - len(t)
        return np.concatenate([t, np.ones((filled, *t.shape[1:]), np.float32)])


def count_scored(dataset: Dataset, split: str, number: int, *, keep_first: bool = False) -> tuple[int, int]:
    """(characters, tokens) of what is scored in the first `number` sequences of a split.

    Of a whole split they are what `data.load` counted. Of a part of one the tokens are decoded: BOS, EOS and padding
    are no characters, the blank lines between documents are, and a character whose bytes stand in two sequences counts
    where it begins.

    Args:
      keep_first: the first token of a sequence is not scored (block diffusion's `keep_first`).
    """
    source = getattr(dataset, split)
    if number == len(source) and not keep_first:
        return dataset.info[split]["chunk_characters"], dataset.info[split]["tokens"]
    characters = tokens = 0
    for i in range(number):
        scored = source.valid(i) & (np.arange(source.length) >= keep_first)
        encoded = np.frombuffer(dataset.tokenizer.decode_bytes(source[i][scored]), np.uint8)
        characters += np.count_nonzero(encoded & 0xC0 != 0x80)  # bytes that begin a character
        tokens += np.count_nonzero(scored)
    return int(characters), int(tokens)


def errors(result: Mapping[str, Any]) -> str:
    """The two standard errors of a NELBO, for people: "± 0.0012 of the draws, ± 0.0200 of the text"; "" for neither."""
    kinds = {"draws": result["nelbo_se_draws"], "text": result["nelbo_se_text"]}
    return ", ".join(f"± {error:.4f} of the {kind}" for kind, error in kinds.items() if error is not None)

if __name__ == "__main__":
    config.run_program(main)
