"""What an experiment needs, without running it: `python -m diffrwkv.plan --config=NAME|FILE.py [--compile] ...`.

Shapes come from `jax.eval_shape`, so no array is ever made; `cli/plan.py` says how operations are counted.
"""

if __name__ == "__main__":  # here, for the flags are read before JAX is imported
    from diffrwkv import cli

    cli.start("plan")

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffrwkv import bars, metrics, sharding
from diffrwkv.cli import plan as flags
from diffrwkv.data import tokenizers
from diffrwkv.data.tokenizers import Tokenizer
from diffrwkv.run import abstract_params, build, make_optimizer
from diffrwkv.train_step import abstract_state, make_train_step

UTILISATION = 0.35  # of the peak; what well-tuned training reaches, and an assumption here
SEQUENCES = 8, 16  # of the steps that --compile compiles


def nominal_tokenizer(spec: str) -> Tokenizer:
    """A tokenizer of the right size without the data: 65 characters for char, GPT-2's number of ids for gpt2."""
    kind, size = tokenizers.parse(spec)
    if kind == "char":
        return tokenizers.Char("".join(map(chr, range(32, 32 + 65))), specials=False)
    tokenizer = tokenizers.Byte()
    tokenizer.vocab_size = {"byte": 259, "gpt2": 50258}.get(kind) or size or 0
    tokenizer.mask_id = tokenizer.vocab_size - 1
    return tokenizer


def describe(cfg: Any) -> dict[str, int | float]:
    """Sizes from shapes: parameters, those in matrices, bytes of state, tokens and operations in a step."""
    model, _ = build(cfg, nominal_tokenizer(cfg.data.tokenizer))
    params = nn.unbox(abstract_params(model, cfg.data.length))
    tx, _ = make_optimizer(cfg, params)
    state = abstract_state(params, tx)
    tokens = cfg.train.batch_size * cfg.data.length
    flops = metrics.model_flops_per_token(params)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "matrix_parameters": int(flops / 6),
        "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        "tokens_per_step": tokens,
        "flops_per_step": flops * tokens,
    }


def step_memory(cfg: Any, sequences: int) -> tuple[int, float]:
    """(bytes of temporary memory, XLA's count of operations) of a step on so many sequences, by compiling it here."""
    model, objective = build(cfg, nominal_tokenizer(cfg.data.tokenizer))
    params = nn.unbox(abstract_params(model, cfg.data.length))
    tx, _ = make_optimizer(cfg, params)
    state = abstract_state(params, tx)
    step = make_train_step(model, objective, tx, jax.random.key(0), ema_decay=cfg.train.ema_decay)
    shape = (sequences, cfg.data.length)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32), "valid": jax.ShapeDtypeStruct(shape, jnp.bool_)}
    number = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, number).compile()
    memory: Any = compiled.memory_analysis()  # a CPU tells it
    return memory.temp_size_in_bytes, (compiled.cost_analysis() or {}).get("flops", 0.0)


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input."""
    work(flags.parse_arguments(arguments))


def work(args: argparse.Namespace) -> None:
    """What the flags say. Raises UserError for bad input."""
    cfg = args.config
    d = describe(cfg)
    print(f"parameters               {d['parameters'] / 1e6:.2f} M, {d['matrix_parameters'] / 1e6:.2f} M in matrices")
    print(f"training state           {d['state_bytes'] / 2**30:.2f} GiB (weights, average, two moments; float32)")
    in_run = d["tokens_per_step"] * cfg.train.num_steps
    print(f"tokens in a step         {d['tokens_per_step']:,}; in the run {in_run:,}")
    print(f"operations in a step     {d['flops_per_step'] / 1e12:.4g} TFLOP")
    for device, peak in metrics.PEAK_FLOPS.items():
        seconds = d["flops_per_step"] / (peak * UTILISATION)
        days = seconds * cfg.train.num_steps / 86400
        print(f"  one {device:12} at {UTILISATION:.0%}  {seconds:8.3g} s a step, {days:8.3g} days for the run")
    if args.compile:
        sharding.start_cpu_devices(1, 1)
        few, many = SEQUENCES
        with bars.waiting("compiling two steps"):
            (least, least_flops), (most, most_flops) = step_memory(cfg, few), step_memory(cfg, many)
        more, flops = (most - least) / (many - few), (most_flops - least_flops) / (many - few)
        told = f"{least / 2**30:.3g} GiB for {few} sequences, {more / 2**30:.3g} GiB for each more"
        print(f"temporary memory         {told}")
        print(f"XLA's count, a sequence  {flops / 1e12:.4g} TFLOP (loop bodies count once)")
