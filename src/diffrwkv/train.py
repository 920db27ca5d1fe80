"""Trains a denoiser: `python -m diffrwkv.train --config=NAME|FILE.py --workdir=DIR [--config.a.b=VALUE ...]`.

Run the same command again to go on where it stopped, to the last bit. `run` is the whole story, from top to bottom.
"""

if __name__ == "__main__":  # here, for the flags are read before JAX is imported
    from diffrwkv import cli

    cli.start("train")

import argparse
import contextlib
import functools
import math
import os
import signal
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from diffrwkv import bars, checkpoint, config, data, generation, initial, metrics, sharding
from diffrwkv.canvas import canvas_row
from diffrwkv.cli import train as flags
from diffrwkv.config import UserError
from diffrwkv.denoiser import count_parameters, parse_pattern
from diffrwkv.evaluator import Evaluator, errors, over
from diffrwkv.run import (
    abstract_params,
    build,
    check_same_data,
    check_same_run,
    is_padded,
    load_data,
    load_tokenizer,
    make_optimizer,
    record_run,
    started_from,
)
from diffrwkv.train_step import State, abstract_state, init_state, make_train_step
from diffrwkv.workdir import has_checkpoints, held, making, read_record

NO_TOKENIZER = data.tokenizers.Char("?!")  # to build what a config names before there is one


def run(cfg: Any, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains to config.train.num_steps, from the newest checkpoint of the workdir if it has one.

    Returns the last line of metrics.jsonl. Raises UserError for a bad config or workdir before any compute, and when
    the loss stops being finite, and when another process has the workdir. SIGTERM or SIGINT once the step is compiled:
    saves, and exits with status 0; before, nothing is caught.
    """
    train = cfg.train
    clock = metrics.Clock()

    # --- Config ---------------------------------------------------------------------------------
    check(cfg)

    # --- Devices --------------------------------------------------------------------------------
    if train.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(config.at_home(train.compilation_cache)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if train.multihost:
        sharding.join_processes(**train.hosts)
    microbatch = train.batch_size // train.accumulate
    sharding.start_cpu_devices(train.cpu_devices, math.gcd(microbatch, train.eval_batch_size))
    mesh = sharding.make_mesh(**train.mesh)
    sharding.check_batch(microbatch, mesh, "config.train.batch_size / config.train.accumulate")
    sharding.check_batch(train.eval_batch_size, mesh, "config.train.eval_batch_size")
    check_memory(cfg, mesh)
    first = jax.process_index() == 0

    with contextlib.ExitStack() as stack:
        workdir = stack.enter_context(making(workdir))
        if first:
            stack.enter_context(held(workdir))
        continues = check_same_run(cfg, workdir)

        # --- Weights to start from --------------------------------------------------------------
        source, own = None, None  # the tokenizer of the weights is that of the run
        if train.init_from and has_checkpoints(workdir):
            own = load_tokenizer(workdir)
        elif train.init_from:
            source = initial.read(cfg, mesh)
            own = source.tokenizer

        # --- Data -------------------------------------------------------------------------------
        dataset = load_data(cfg, tokenizer=own)
        tokenizer = dataset.tokenizer
        if source is not None:
            initial.check_tokenizer(source, tokenizer)
        if continues and (workdir / "run.json").exists():
            check_same_data(workdir, read_record(workdir)["data"], dataset)
        batches = data.train_iterator(
            dataset,
            batch_size=train.batch_size,
            seed=cfg.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=train.data_workers,
        )

        # --- Model, objective, optimiser, state -------------------------------------------------
        model, objective = build(cfg, tokenizer)
        if source is not None:
            initial.check_clock(source, model.time_conditioning, objective)
        sampler = generation.build_sampler(cfg, objective)
        boxed = abstract_params(model, cfg.data.length)
        tx, learning_rate = make_optimizer(cfg, nn.unbox(boxed))
        init_key, train_key = jax.random.split(jax.random.key(cfg.seed))
        init = functools.partial(init_state, model, tx, cfg.data.length, objective=objective)
        abstract = abstract_state(nn.unbox(boxed), tx, objective=objective)
        shardings = sharding.follow(abstract, sharding.param_shardings(boxed, mesh), mesh)
        abstract = checkpoint.abstract_like(abstract, shardings)
        parameters = sum(x.size for x in jax.tree.leaves(nn.unbox(boxed)))

        # --- Checkpoint: start, or go on --------------------------------------------------------
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir, keep=train.keep))
        restored = checkpoints.restore(abstract)
        if restored is None:
            start, state = 0, jax.jit(sharding.over(mesh, init), out_shardings=shardings)(init_key)
            if source is not None:
                state |= {part: initial.put(source, cfg.model.to_dict(), state[part]) for part in ("params", "ema")}
        else:
            start, state, iterator_state = restored
            batches.set_state(iterator_state)
        if first:
            origin = source.origin if source is not None else started_from(workdir)
            record_run(cfg, workdir, tokenizer, dataset.info, mesh, parameters, origin)
        writer = metrics.Writer(
            workdir,
            start,
            state=checkpoints.metrics(start) if restored else None,
            tensorboard=train.tensorboard,
            wandb_project=train.wandb_project,
            config=cfg.to_dict(),
        )
        stack.callback(writer.close)
        clock.go_on_from(writer.last)
        say = functools.partial(print, flush=True) if first else (lambda *_: None)
        say(
            f"{cfg.data.name}: {dataset.info['train']['tokens']:,} training tokens, "
            f"{tokenizer.vocab_size} ids ({tokenizer.name}); {parameters:,} parameters on "
            f"{mesh.size} x {jax.devices()[0].device_kind}"
        )
        say(data.summary(dataset.info))
        if source is not None:
            say("\n".join(initial.summary(source, model.predict_next, objective.causal)))
        if start >= train.num_steps:
            say(f"{workdir} is at step {start} already, config.train.num_steps = {train.num_steps}.")
            return writer.last
        if start:
            say(f"Going on from step {start}.")

        # --- The step, compiled -----------------------------------------------------------------
        step_fn = make_train_step(
            model,
            objective,
            tx,
            train_key,
            ema_decay=train.ema_decay,
            accumulate=train.accumulate,
            padded=is_padded(cfg),
            mesh=mesh,
        )
        rows = sharding.batch_sharding(mesh)
        whole = sharding.replicated(mesh)
        shape = (train.batch_size, cfg.data.length)
        example = {
            "tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
            "valid": jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows),
        }
        if dataset.prompted:
            example["scored"] = example["valid"]
        compiling = time.perf_counter()
        with bars.waiting("compiling the step"):
            compiled = (
                jax.jit(
                    step_fn,
                    donate_argnums=0,
                    in_shardings=(shardings, rows, whole),
                    out_shardings=(shardings, whole),
                )
                .lower(abstract, example, jax.ShapeDtypeStruct((), jnp.int32))
                .compile()
            )
        compile_seconds = time.perf_counter() - compiling
        say(f"Compiled the step in {compile_seconds:.1f} s.")

        bounds = objective.process.bound
        if not bounds:
            say(f"config.diffusion.name = {cfg.diffusion.name!r} bounds no likelihood: nothing is evaluated.")
        if objective.causal and train.eval_draws > 1:
            say("config.train.eval_draws does nothing: a model from left to right has an exact likelihood.")

        # --- What happens between steps ---------------------------------------------------------
        evaluator = Evaluator(
            model,
            objective,
            dataset,
            mesh,
            batch_size=train.eval_batch_size,
            draws=train.eval_draws,
            limit=train.eval_limit,
            padded=is_padded(cfg),
        )
        generator = generation.Generator(model, objective, sampler, tokenizer, mesh)
        canvas = canvas_row(
            tokenizer,
            length=None,
            default_length=cfg.data.length,
            bos=cfg.data.wrap,
            eos=cfg.data.wrap and cfg.data.packing == "concat",
        )
        canvas = np.tile(canvas, (max(train.num_samples, 1), 1))
        interrupted = stack.enter_context(Interruption())
        peak = metrics.peak_flops(jax.devices()[0])
        flops_per_token = metrics.model_flops_per_token(nn.unbox(boxed))
        tokens_per_step = train.batch_size * cfg.data.length
        bar = progress_bar(start, train.num_steps, first)
        stack.callback(bar.close)
        history, logged = [], start
        counted = over(evaluator.num_sequences, evaluator.num_draws, exact=objective.causal)

        def due(every, step):
            return step == train.num_steps or (every > 0 and step % every == 0)

        def validate(step, state, stop=lambda: False):
            """(state, values of the line), or None when told to stop."""
            shown = first and bars.shown()
            if (result := evaluator(state["ema"], state.get("objective"), progress=shown, stop=stop)) is None:
                return None
            refuse_lost_validation(result["nelbo"], step, checkpoints)
            line = {f"val/{k}": result[k] for k in ("nelbo", "nelbo_se_draws", "nelbo_se_text", "bpc", "ppl")}
            if "objective" in state:
                own, told = objective.validated(state["objective"], result.get("observed"))
                state, line = state | {"objective": jax.device_put(own, whole)}, line | told
            return state, line

        if bounds and start and due(train.eval_every, start) and checkpoints.nelbo(start) is None:
            # a signal came before this step was evaluated: what follows may depend on it
            if (validated := validate(start, state, interrupted.raised)) is None:
                bar.write(f"Stopped by a signal: still at step {start}; the same command goes on from there.")
                sys.exit(0)
            state, line = validated
            writer.write(start, line)
            report(bar, start, train.num_steps, line, counted)
        clock.begin()

        # --- The loop ---------------------------------------------------------------------------
        for step in range(start + 1, train.num_steps + 1):
            batch = sharding.global_batch(next(batches), mesh)
            state, measured = compiled(state, batch, np.int32(step - 1))
            history.append(measured)
            if len(history) > 2:  # the device stays two steps ahead of us at most: a signal is heard soon
                jax.block_until_ready(history[-3])
            bar.update()

            checkpoints.check()
            last = step == train.num_steps
            stop = interrupted(checkpoints, step) and not last  # the last step's evaluation has no later chance

            line = {}
            evaluates = bounds and due(train.eval_every, step) and not stop
            if due(train.log_every, step) or evaluates or stop or due(train.checkpoint_every, step):
                refuse_divergence(state, step, checkpoints)
            if due(train.log_every, step):
                values = jax.device_get(history)
                line |= {k: float(np.mean([v[k] for v in values], dtype=np.float64)) for k in values[0]}
                speed = (step - logged) * tokens_per_step / clock.lap()
                line |= {"train/learning_rate": learning_rate(step - 1), "tokens_per_second": speed}
                line |= {"tokens": step * tokens_per_step, **clock.totals()}
                if logged == start:
                    line["compile_seconds"] = compile_seconds
                if peak:
                    line["mfu"] = speed * flops_per_token / (peak * mesh.size)
                history, logged = [], step
            with clock.pause():
                if evaluates:
                    validated = validate(step, state, (lambda: False) if last else interrupted.raised)
                    if validated is None:
                        stop = True
                    else:
                        state = validated[0]
                        line |= validated[1]
                if line:  # before the checkpoint: a line that is too much is dropped, one that is missing stays so
                    writer.write(step, line)
                    report(bar, step, train.num_steps, line, counted)
                if due(train.checkpoint_every, step) or stop:
                    checkpoints.save(step, state, batches.get_state(), line.get("val/nelbo"), writer.state())
                if due(train.sample_every, step) and train.sample_every and train.num_samples and not stop:
                    try:
                        with bars.waiting("drawing samples"):
                            drawn = generator(state["ema"], canvas, seed=0, state=state.get("objective"))
                    except UserError as e:  # training goes on: its own loss says whether it may
                        bar.write(f"No sample at step {step}: {e}")
                        continue
                    tokens = np.asarray(drawn.tokens)
                    texts = [tokenizer.decode(row) for row in tokens]
                    writer.write_text(step, "samples", "\n\n---\n\n".join(texts))
                    for i, text in enumerate(texts):
                        bar.write(f"--- sample {i} at step {step} ---\n{generation.printable(text)}")
            if stop:
                checkpoints.wait()
                bar.write(f"Stopped by a signal: saved at step {step}; the same command goes on from there.")
                sys.exit(0)
        return writer.last


def check(cfg: Any) -> None:
    """Raises UserError for a config that no run can have. Builds what it names, touches no device and no data."""
    config.check_values(cfg)
    if cfg.train.batch_size % cfg.train.accumulate:
        raise UserError(
            f"config.train.batch_size = {cfg.train.batch_size} is not a multiple of config.train.accumulate = "
            f"{cfg.train.accumulate}."
        )
    sharding.check_hosts(cfg.train.multihost, **cfg.train.hosts)
    if cfg.train.init_raw and not cfg.train.init_from:
        raise UserError("config.train.init_raw does nothing without config.train.init_from: name a workdir there.")
    most = 8 * sharding.cpu_cores()
    if cfg.train.data_workers > most:
        raise UserError(
            f"config.train.data_workers = {cfg.train.data_workers} processes are too many for this machine's "
            f"{sharding.cpu_cores()} cores: take at most {most}."
        )
    _, objective = build(cfg, NO_TOKENIZER)
    generation.build_sampler(cfg, objective)
    make_optimizer(cfg, {})
    if cfg.optim.warmup_steps > cfg.train.num_steps:
        print(
            f"The learning rate only warms up: config.optim.warmup_steps = {cfg.optim.warmup_steps} is more than "
            f"config.train.num_steps = {cfg.train.num_steps}.",
            flush=True,
        )


def check_memory(cfg: Any, mesh: Mesh) -> None:
    """Raises UserError where the devices cannot hold what training keeps at the very least, before any of it is made.

    Counted are weights, average and both moments (16 bytes a parameter, those of the vocabulary left out) and what the
    layers read: of all of them for a training step, whose backward pass reads it again, of one for evaluation.
    """
    memory = sharding.device_memory(mesh)
    if memory is None:
        return
    parameters = least_parameters(cfg)
    rows = max(cfg.train.batch_size // cfg.train.accumulate * cfg.model.num_layers, cfg.train.eval_batch_size)
    inputs = jnp.dtype(cfg.model.dtype).itemsize * rows * cfg.data.length * cfg.model.dim
    needed = 16 * parameters / mesh.shape["fsdp"] + inputs / mesh.size
    if needed > memory:
        raise UserError(
            f"Training needs at least {needed / 2**30:,.1f} GiB on each device, which has {memory / 2**30:,.1f}: "
            f"{parameters:,} parameters, and sequences of {cfg.data.length:,} tokens. Lower config.model.dim, "
            "config.model.num_layers, config.data.length, config.train.batch_size or config.train.eval_batch_size, or "
            "raise config.train.accumulate or config.train.mesh.fsdp."
        )


def least_parameters(cfg: Any) -> int:
    """The number of parameters but for the vocabulary's and a last period that is not whole.

    From two short models: many layers take long to trace.
    """
    model, _ = build(cfg, NO_TOKENIZER)
    period = len(parse_pattern(model.pattern, model.num_layers)[1])

    def count(num_layers):
        return count_parameters(abstract_params(model.clone(num_layers=num_layers, scan_layers=False), 1))

    one = count(period)
    repeats = model.num_layers // period - 1
    return one + repeats * (count(2 * period) - one) if repeats else one


def refuse_divergence(state: State, step: int, checkpoints: checkpoint.Checkpoints) -> None:
    """Raises UserError if a step up to this one was not finite; waits for the device. Nothing is saved after it."""
    done = int(state["step"])
    if done != step:
        raise UserError(_stopped(f"The loss or its gradient was not finite at step {done + 1}", checkpoints))


def refuse_lost_validation(nelbo: float, step: int, checkpoints: checkpoint.Checkpoints) -> None:
    """Raises UserError for a validation NELBO that is not finite: nothing is written or saved of such weights."""
    if not math.isfinite(nelbo):
        raise UserError(_stopped(f"The validation NELBO was {nelbo} at step {step}", checkpoints))


def _stopped(what: str, checkpoints: checkpoint.Checkpoints) -> str:
    checkpoints.wait()
    saved = checkpoints.steps()
    kept = f"the checkpoint of step {saved[-1]} is kept" if saved else "there was no checkpoint yet"
    return (
        f"{what}: training stopped, {kept}. Lower config.optim.learning_rate or config.optim.clip_norm, or lengthen "
        "config.optim.warmup_steps."
    )


class Interruption:
    """A context in which SIGTERM and SIGINT only raise a flag; a second SIGINT interrupts as usual.

    Called with (checkpoints, step) it tells whether to stop. With several processes the scheduler's signal goes through
    jax.distributed, so that all of them stop after the same step.
    """

    def __init__(self):
        self._raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._raise)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raised(self) -> bool:
        """Whether this process alone has been told to stop; with several, only a call tells."""
        return self._raised

    def _raise(self, number: int, frame: Any) -> None:
        self._raised = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])

    def __call__(self, checkpoints: checkpoint.Checkpoints, step: int) -> bool:
        return self._raised if jax.process_count() == 1 else checkpoints.reached_preemption(step)


def progress_bar(start: int, total: int, active: bool) -> Any:
    """tqdm on the first process, if stderr is a terminal; `write` prints to stdout on the first process anyway."""
    from tqdm import tqdm

    class Bar(tqdm):
        def write(self, text: str) -> None:  # an instance's, so that the other processes stay silent
            if active:
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    return Bar(initial=start, total=total, unit="step", disable=not (active and sys.stderr.isatty()), smoothing=0.05)


def report(bar: Any, step: int, total: int, line: dict[str, Any], counted: str) -> None:
    """One line for people; `counted` is what a validation is over."""
    parts = [f"step {step}/{total}"]
    if "train/loss" in line:
        parts.append(f"loss {line['train/loss']:.4f}  grad {line['train/grad_norm']:.2f}")
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
        bar.set_postfix(loss=f"{line['train/loss']:.3f}", tokens_s=f"{line['tokens_per_second']:,.0f}")
    if "mfu" in line:
        parts.append(f"mfu {line['mfu']:.1%}")
    if "val/nelbo" in line:
        uncertainty = errors({k.removeprefix("val/"): v for k, v in line.items()})
        parts.append(f"validation nelbo {line['val/nelbo']:.4f} {uncertainty}".rstrip())
        parts.append(f"bpc {line['val/bpc']:.4f}  ppl {line['val/ppl']:.2f}  {counted}")
    bar.write("  ".join(parts))


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input."""
    work(flags.parse_arguments(arguments))


def work(args: argparse.Namespace) -> None:
    """What the flags say. Raises UserError for bad input."""
    run(args.config, args.workdir)
