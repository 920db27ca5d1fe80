"""Weights of others into a workdir, and a workdir's weights out; cli/convert.py says how it is called.

`published` tells whose weights they are and what model they make, `weights` knows names and shapes, `releases` writes
and reads a model to give away, `hub` fetches and pushes it.
"""

if __name__ == "__main__":  # here, for the flags are read before JAX is imported
    from diffrwkv import cli

    cli.start("convert")

import argparse
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffrwkv import bars, checkpoint, config, generation, hub, published, releases, sharding
from diffrwkv.cli import convert as flags
from diffrwkv.config import UserError
from diffrwkv.data import Tokenizer, tokenizers
from diffrwkv.initial import refuse_other_model
from diffrwkv.run import build, load_data, load_run, record_run
from diffrwkv.weights import FORMATS, write_state_dict
from diffrwkv.workdir import make, named, read_metrics, read_record


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before anything is written."""
    work(flags.parse_arguments(arguments))


def work(args: argparse.Namespace) -> None:
    """What the flags say. Raises UserError for bad input, before anything is written."""
    try:
        if args.target == "hf":
            release(args)
        elif args.target:
            export_weights(args)
        else:
            import_weights(args)
    except (ValueError, OSError, ImportError) as e:
        raise UserError(str(e)) from e


def import_weights(args: argparse.Namespace) -> None:
    """--input: a workdir with the weights of others, or of a release of ours."""
    workdir = named(args.workdir)
    if (workdir / "config.json").exists() or (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a run already: take another --workdir.")
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise UserError(f"{workdir} is not an empty folder: take another --workdir, which is then made.")
    overrides = args.overrides
    experiment = config.parse([f"--config={args.config}", *overrides]) if args.config else None
    with bars.waiting(f"fetching {args.input}"):
        source = hub.local(args.input)
    if (source / releases.OWN).is_file():
        if args.config or args.source or args.ema:
            raise UserError(f"{args.input} says itself what it is: leave --config, --from and --ema out.")
        with bars.waiting(f"reading {args.input}"):
            given = releases.opened(source)
        kind, params, tokenizer = "diffrwkv", given.params, given.tokenizer
        cfg = config.parse(overrides, start=given.config)
        refuse_other_model(cfg, given.config.model.to_dict(), args.input)
        info = {"name": cfg.data.name, "tokenizer": tokenizer.name, "tokenizer_fingerprint": tokenizer.fingerprint}
        info |= {"vocab_size": tokenizer.vocab_size}
    else:
        given = None
        with bars.waiting(f"reading {args.input}"):
            found = published.read(source, kind=args.source, ema=args.ema, name=args.input)
        cfg = experiment or config.parse(overrides, start=published.experiment(found))
        refuse_other_model(cfg, found.model, args.input)
        refuse_other_objective(cfg, found)
        named_here = args.config or any(override.startswith("--config.data.tokenizer") for override in overrides)
        if found.tokenizer is None and not named_here:
            raise UserError(
                f"{args.input} has {found.model['vocab_size']} token ids, and nothing says of which tokenizer: name it "
                f"by --config.data.tokenizer=PATH/tokenizer.json:{found.model['vocab_size']}, or as config.py says."
            )
        tokenizer, info = find_tokenizer(cfg)
        if tokenizer.vocab_size != found.model["vocab_size"]:
            raise UserError(
                f"{args.input} has {found.model['vocab_size']} token ids, config.data.tokenizer = "
                f"{cfg.data.tokenizer!r} has {tokenizer.vocab_size} with the mask: choose the data and tokenizer that "
                "the weights were trained with."
            )
        kind, params = found.kind, published.stacked(found.params, cfg.model)
    _, objective = build(cfg, tokenizer)
    generation.build_sampler(cfg, objective)
    own = objective.init_state() if given is None else given.objective_state(objective)

    # Made beside its place and moved there whole: a run that was killed leaves nothing that loads.
    part = workdir.absolute().with_name(f".{workdir.absolute().name}.part")
    shutil.rmtree(part, ignore_errors=True)
    make(part)
    number = sum(x.size for x in jax.tree.leaves(params))
    with bars.waiting("writing the weights"), checkpoint.Checkpoints(part, keep=cfg.train.keep) as checkpoints:
        parts: dict[str, Any] = {"params": params, "ema": params, "step": jnp.int32(0)}
        parts |= {"objective": own} if own else {}
        checkpoints.save(0, parts, None)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    record_run(cfg, part, tokenizer, info, mesh, number)
    name = args.input if hub.is_model(args.input) else Path(args.input).name
    origin = {"format": kind, "file": os.fspath(name), "ema": args.ema}
    config.write_json(config.seal(read_record(part) | {"converted": origin}), part / "run.json")
    part.replace(workdir)
    print(f"{workdir}: {number:,} parameters of {kind} at step 0, for evaluate and sample.")


def refuse_other_objective(cfg: Any, found: published.Published) -> None:
    """Raises UserError, with the overrides to pass, unless the config's objective reads the output as it is meant."""
    flat = config.flatten(cfg)
    flat |= {"diffusion.schedule": config.chosen(flat).get("schedules")}  # by its name, or as the objective's own
    fixed = {k: v for k, v in found.settings.items() if k.startswith(("diffusion.", "objectives.", "schedules."))}
    wrong = {key: value for key, value in fixed.items() if flat[key] != value}
    if wrong:
        told = "; ".join(f"config.{key} is {flat[key]!r} and must be {value!r}" for key, value in wrong.items())
        flags = " ".join(f"--config.{key}={value}" for key, value in wrong.items())
        raise UserError(f"{found.name} is of {found.kind}, and does not fit the config: {told}. Pass {flags}.")


def find_tokenizer(cfg: Any) -> tuple[Tokenizer, dict[str, Any]]:
    """(tokenizer, what run.json says of the data) of a config; the data are read only for one that is made from them.

    Raises UserError when neither can be had.
    """
    kind, _ = tokenizers.parse(cfg.data.tokenizer)
    if kind in ("char", "bpe"):
        dataset = load_data(cfg)
        return dataset.tokenizer, dict(dataset.info)
    try:
        tokenizer = tokenizers.make(cfg.data.tokenizer, root=cfg.data.root)
    except (ValueError, ImportError, RuntimeError) as e:
        raise UserError(str(e)) from e
    info = {"name": cfg.data.name, "tokenizer": tokenizer.name, "tokenizer_fingerprint": tokenizer.fingerprint}
    return tokenizer, info | {"vocab_size": tokenizer.vocab_size}


def export_weights(args: argparse.Namespace) -> None:
    """--to: a file with the weights of a workdir."""
    output = config.at_home(args.output, "--output=")
    if output.suffix not in (".safetensors", ".npz"):
        raise UserError(f"--output={output}: weights are written as .safetensors or .npz.")
    if output.is_dir():
        raise UserError(f"--output={output} is a folder: name a file.")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}.")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    run = load_run(named(args.workdir), mesh, step=args.step, raw=args.raw)
    model = run.config.model.to_dict() | {"vocab_size": run.tokenizer.vocab_size}
    state = FORMATS[args.target].to_state_dict(jax.device_get(run.params), model)
    with bars.waiting("writing the weights"):
        write_state_dict(state, output)
    number = sum(math.prod(x.shape) for x in jax.tree.leaves(run.params))
    print(f"{output}: {number:,} parameters of step {run.step}.")


def release(args: argparse.Namespace) -> None:
    """--to=hf: a folder that is a model of the hub."""
    output = config.at_home(args.output, "--output=")
    if args.push is not None:
        hub.check_name(args.push)
    workdir = named(args.workdir)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output={output} is not an empty folder: take another one, which is then made.")
    run = load_run(workdir, sharding.make_mesh(devices=jax.devices()[:1]), step=args.step, raw=args.raw)
    lines = read_metrics(workdir / "metrics.jsonl")
    scored = [line for line in lines if line["step"] <= run.step and "val/nelbo" in line]
    scores = {f"validation NELBO, nats a token, at step {line['step']}": line["val/nelbo"] for line in scored[-1:]}
    kind = releases.write(
        output,
        cfg=run.config,
        tokenizer=run.tokenizer,
        params=run.params,
        objective=run.learned,
        step=run.step,
        record=read_record(workdir),
        scores=scores,
        dtype=args.dtype,
    )
    print(f"{output}: the model of step {run.step}, in names of {kind}.")
    if args.push is not None:
        print(f"{hub.push(output, args.push)}: uploaded.")
