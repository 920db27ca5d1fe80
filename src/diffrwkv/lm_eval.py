"""EleutherAI's harness: `python -m diffrwkv.lm_eval --workdir=DIR --tasks=NAME,NAME [--include_path=DIR] ...`.

Runs tasks of lm-evaluation-harness (the extra `lm-eval`) on a run of ours, prints their table and keeps the numbers in
`<workdir>/evaluations/`. Tasks are the harness's own, which it downloads, and those of YAML files in --include_path,
whose data can be files (dataset_path: json). docs/evaluation.md says which numbers are bounds.
"""

if __name__ == "__main__":  # here, for the flags are read before JAX is imported
    from diffrwkv import cli

    cli.start("lm_eval")

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

import diffrwkv
from diffrwkv import bars, choosing, config, evaluations, sharding
from diffrwkv.canvas import canvas_row
from diffrwkv.cli import lm_eval as flags
from diffrwkv.cli.lm_eval import BATCH_SIZE
from diffrwkv.config import UserError
from diffrwkv.diffusion.processes import Masked
from diffrwkv.diffusion.samplers import Sampler
from diffrwkv.generation import build_sampler, filled
from diffrwkv.run import Run, opened
from diffrwkv.scoring import Item, bounding, check_draws, is_exact, score

NEW_TOKENS = 256  # at most, where a task does not say
GREEDY: dict[str, Any] = {
    "rule": "steps",
    "score": "probability",
    "block": None,
    "threshold": None,
    "factor": None,
    "temperature": 0.0,
}
COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one thing
BOOTSTRAP = 1000  # resamples for the errors of perplexities


class Answers:
    """What the harness asks of a model, of a run of ours; `harness_model` makes it a model of the harness.

    The requests have `args`, `task_name` and `doc_id`.

    Args:
      run: what `load` returns.
      draws, seed, block_size, length, batch_size: as of `choose`.
      progress: show bars on stderr.

    Raises UserError where the run bounds no likelihood, or for an odd number of draws.
    """

    def __init__(
        self,
        run: Run,
        *,
        draws: int = config.ANSWER_DRAWS,
        seed: int = 0,
        block_size: int | None = None,
        length: int | None = None,
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
    ):
        super().__init__()
        self.run = run
        self.options: dict[str, Any] = {"draws": draws, "seed": seed, "block_size": block_size, "length": length}
        self.options |= {"batch_size": batch_size, "progress": progress}
        objective = bounding(run, block_size)
        check_draws(draws, is_exact(objective))
        self.fills = is_exact(objective) or type(objective.process) is Masked

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool | None]]:
        """[(log p of the continuation or its bound, whether it is what the model fills in)].

        Blanks at a context's end move to the continuation. The second is None where the noise is no mask; a task that
        looks at it is refused.
        """
        if not self.fills:
            of = Counter((r.task_name, r.doc_id) for r in requests)
            alone = next((r for r in requests if of[r.task_name, r.doc_id] == 1), None)
            if alone is not None:
                raise UserError(
                    f"The task {alone.task_name!r} asks what the model fills in, which is known of masks and from left "
                    "to right: leave it out for this model."
                )
        items = []
        for i, request in enumerate(requests, 1):
            context, continuation = choosing.moved(*request.args)
            items.append(Item(context, continuation, f"continuation {i}", f"context {i}"))
        found = choosing.answers(self.run, items, greedy=self.fills, **self.options)
        return [(-a.nats, a.greedy) for a in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of each text or its bound, in windows as `score` has them."""
        texts = [request.args[0] for request in requests]
        scores = iter(score(self.run, [text for text in texts if text], **self.options))
        return [-next(scores).nats if text else 0.0 for text in texts]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What follows each context, up to the first of the strings that end it.

        Where nothing is drawn (do_sample is False, or the temperature 0) masks are filled the surest first, a pass for
        each token; else the run's own sampler takes the temperature, top_p and top_k of the task.
        """
        asked = [self._asked(dict(request.args[1])) for request in requests]
        rows, starts = [], []
        for i, (request, (number, _, _)) in enumerate(zip(requests, asked, strict=True), 1):
            row, start = self._canvas(request.args[0], number, i)
            rows.append(row)
            starts.append(start)
        longest, trained = max(map(len, rows), default=0), self.run.config.data.length
        if longest > trained:
            print(f"Rows of up to {longest} tokens: the model was trained on {trained}.", file=sys.stderr)
        texts = [""] * len(requests)
        for key in dict.fromkeys((number, how) for number, how, _ in asked):
            own = [i for i, (number, how, _) in enumerate(asked) if (number, how) == key]
            options = {k: self.options[k] for k in ("seed", "batch_size", "progress")}
            done = filled(self.run, self._sampler(*key), [rows[i] for i in own], **options)
            for i, tokens in zip(own, done, strict=True):
                text = self.run.tokenizer.decode(tokens[starts[i] : starts[i] + key[0]])
                ends = [at for until in asked[i][2] if until and (at := text.find(until)) >= 0]
                texts[i] = text[: min(ends, default=len(text))]
        return texts

    def _asked(self, options: dict[str, Any]) -> tuple[int, tuple[tuple[str, Any], ...] | None, tuple[str, ...]]:
        """(New tokens, the sampler's options or None for the surest tokens, what ends a text)."""
        until = options.pop("until", None) or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        counts = [options.pop(name) for name in COUNTS if options.get(name) is not None]
        number = int(counts[0]) if counts else min(NEW_TOKENS, self.run.config.data.length // 2)
        drawn = options.pop("do_sample", False) and options.get("temperature", 1.0) != 0
        if number < 1:
            raise UserError(f"A task asks for {number} new tokens: at least 1 is needed.")
        if not drawn:
            return number, None, until
        known = ("temperature", "top_p", "top_k")
        return number, tuple((k, options[k]) for k in known if options.get(k) is not None), until

    def _canvas(self, context: str, number: int, i: int) -> tuple[np.ndarray, int]:
        """(The context and blanks behind it, where these begin)."""
        cfg, tokenizer = self.run.config, self.run.tokenizer
        ends = {"bos": cfg.data.wrap, "eos": cfg.data.wrap and cfg.data.packing == "concat"}
        blank = canvas_row(tokenizer, length=None, default_length=0, max_new_tokens=number, **ends)
        try:
            given = tokenizer.encode(context)
        except ValueError as e:
            raise UserError(f"context {i}: {e}.") from None
        if self.options["length"] is not None:
            room = self.options["length"] - len(blank)
            if room < 0:
                raise UserError(f"--length = {self.options['length']} is too small for {number} new tokens: raise it.")
            given = given[max(0, len(given) - room) :]
        first = int(ends["bos"])
        row = np.concatenate([blank[:first], given, blank[first:]]).astype(np.int32)
        return row, first + len(given)

    def _sampler(self, number: int, how: tuple[tuple[str, Any], ...] | None) -> Sampler:
        run, cut = self.run, {"block_size": self.options["block_size"], "stop_id": self.run.tokenizer.eos_id}
        if how is not None:
            return build_sampler(run.config, run.objective, **cut, **dict(how))
        if run.objective.causal:
            return build_sampler(run.config, run.objective, name="autoregressive", **cut, temperature=0.0)
        if type(run.objective.process) is Masked:
            return build_sampler(run.config, run.objective, name="confidence", **cut, **GREEDY, num_steps=number)
        print("This noise has no surest tokens: the run's own sampler draws.", file=sys.stderr)
        return build_sampler(run.config, run.objective, **cut)


def _harness() -> Any:
    """The package. Raises UserError where it is not installed."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork a process that has started JAX
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as e:
        raise UserError(f"lm-evaluation-harness is needed ({e}): pip install 'diffrwkv[lm-eval]'") from None
    return lm_eval


def harness_model(run: Run, **options: Any) -> Any:
    """A model of the harness, `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`.

    Args:
      options: of `Answers`.

    Raises UserError without the package, and as `Answers` does.
    """
    return type("DiffRWKV", (Answers, _harness().api.model.LM), {})(run, **options)


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before any compute."""
    work(flags.parse_arguments(arguments))


def work(args: argparse.Namespace) -> None:
    """What the flags say. Raises UserError for bad input, before any compute."""
    lm_eval = _harness()
    opened_model = opened(args.workdir, args.model)
    names = [name.strip() for name in args.tasks.split(",")]
    manager = lm_eval.tasks.TaskManager(include_path=args.include_path)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"No task is called {unknown[0]!r}: name some of the harness's or of --include_path, as --tasks=piqa,boolq."
        )
    sharding.start_cpu_devices(opened_model.config.train.cpu_devices, args.batch_size)
    mesh = sharding.make_mesh()
    sharding.check_batch(args.batch_size, mesh, "--batch_size")
    run = opened_model.load(mesh, step=args.step, raw=args.raw)
    options = {k: getattr(args, k) for k in ("draws", "seed", "block_size", "length", "batch_size")}
    model = harness_model(run, **options, progress=bars.shown())
    settings = {
        "suite": "lm_eval",
        "tasks": names,
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        **options,
        "step": run.step,
        "ema": not args.raw,
        "weights": opened_model.weights_hash(run.step),
        "diffrwkv": diffrwkv.__version__,
        "lm_eval": lm_eval.__version__,
    }
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
        random_seed=args.seed,
        numpy_random_seed=args.seed,
        fewshot_random_seed=args.seed,
    )
    result = {**settings, "results": {task: _numbers(each) for task, each in found["results"].items()}}
    evaluations.keep(evaluations.path_of(opened_model.folder, "lm_eval-" + "-".join(names), settings), result)
    print(lm_eval.utils.make_table(found))
    print(json.dumps(result), flush=True)


def _numbers(of_task: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task, named "acc" where the harness writes "acc,none", "acc,FILTER" where it filters."""
    numbers = {key.removesuffix(",none"): x for key, x in of_task.items() if key != "sample_len"}
    return {
        key: float(x)
        for key, x in numbers.items()
        if isinstance(x, int | float | np.number) and not isinstance(x, bool) and math.isfinite(x)
    }
