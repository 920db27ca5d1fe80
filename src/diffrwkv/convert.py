"""Weights of the original authors' PyTorch models, into a workdir and back.

    python -m diffrwkv.convert --from=mdlm --input=model.safetensors --config=experiments/x.py --workdir=DIR
    python -m diffrwkv.convert --to=mdlm --workdir=DIR --output=model.safetensors

The first makes a workdir of the config that `evaluate` and `sample` take like one that `train` wrote, with the given
weights as the weights and as their average (no optimiser's state, so `train` does not go on from it). The second writes
a workdir's average (--raw: the weights themselves) under the original's names. Inputs: .safetensors, .npz, and torch's
.pt, .pth, .ckpt, .bin. Formats: "mdlm", the Transformer of kuleshov-group/mdlm (models/dit.py); "rwkv7", the language
model of BlinkDL/RWKV-LM (RWKV-v7/train_temp).

In a program of one's own:

    state = read_state_dict("model.safetensors")
    model = Denoiser(**FORMATS["mdlm"].model(state))
    params = FORMATS["mdlm"].to_params(state)
"""

if __name__ == "__main__":  # here, for the flags are read before JAX is imported
    from diffrwkv import cli

    cli.start("convert")

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffrwkv import bars, checkpoint, config, generation, sharding
from diffrwkv.cli import convert as flags
from diffrwkv.config import UserError
from diffrwkv.data import Tokenizer, tokenizers
from diffrwkv.denoiser import parse_pattern
from diffrwkv.initial import refuse_other_model
from diffrwkv.run import build, load_data, load_run, record_run
from diffrwkv.weights import FORMATS, read_state_dict, stack_layers, write_state_dict
from diffrwkv.workdir import make, named, read_record


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before anything is written."""
    work(flags.parse_arguments(arguments))


def work(args: argparse.Namespace) -> None:
    """What the flags say. Raises UserError for bad input, before anything is written."""
    try:
        if args.source:
            import_weights(args)
        else:
            export_weights(args)
    except (ValueError, OSError, ImportError) as e:
        raise UserError(str(e)) from e


def import_weights(args: argparse.Namespace) -> None:
    """--from: a workdir of the config with the weights of a file."""
    workdir = named(args.workdir)
    if (workdir / "config.json").exists() or (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds a run already: take another --workdir.")
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise UserError(f"{workdir} is not an empty folder: take another --workdir, which is then made.")
    cfg = config.parse([f"--config={args.config}", *args.overrides])
    layout = FORMATS[args.source]
    with bars.waiting(f"reading {args.input}"):
        state = read_state_dict(args.input, ema=args.ema)
    needed = layout.model(state)
    params = layout.to_params(state)
    refuse_other_model(cfg, needed, args.input)
    tokenizer, info = find_tokenizer(cfg)
    if tokenizer.vocab_size != needed["vocab_size"]:
        raise UserError(
            f"{args.input} has {needed['vocab_size']} token ids, config.data.tokenizer = {cfg.data.tokenizer!r} has "
            f"{tokenizer.vocab_size} with the mask: choose the data and tokenizer that the weights were trained with."
        )
    _, objective = build(cfg, tokenizer)
    generation.build_sampler(cfg, objective)
    if cfg.model.scan_layers:
        _, period = parse_pattern(cfg.model.pattern, cfg.model.num_layers)
        params = stack_layers(params, cfg.model.num_layers, len(period))

    # Made beside its place and moved there whole: a run that was killed leaves nothing that loads.
    part = workdir.absolute().with_name(f".{workdir.absolute().name}.part")
    shutil.rmtree(part, ignore_errors=True)
    make(part)
    params = jax.tree.map(jnp.asarray, params)
    number = sum(x.size for x in jax.tree.leaves(params))
    with bars.waiting("writing the weights"), checkpoint.Checkpoints(part, keep=cfg.train.keep) as checkpoints:
        parts: dict[str, Any] = {"params": params, "ema": params, "step": jnp.int32(0)}
        parts |= {"objective": own} if (own := objective.init_state()) else {}
        checkpoints.save(0, parts, None)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    record_run(cfg, part, tokenizer, info, mesh, number)
    origin = {"format": args.source, "file": Path(args.input).name, "ema": args.ema}
    config.write_json(config.seal(read_record(part) | {"converted": origin}), part / "run.json")
    part.replace(workdir)
    print(f"{workdir}: {number:,} parameters at step 0, for evaluate and sample.")


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
