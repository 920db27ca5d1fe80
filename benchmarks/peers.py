"""Other people's RWKV-7 operators with the arguments of ours, for `benchmarks.wkv7`. Optional: both are causal only.

jla: jax-linear-attention 0.1.0 (Apache-2.0; pinned to jax 0.11.2, Python >= 3.12). Its Mosaic GPU kernels for Hopper,
    called as its own layer calls them (jla/layers/rwkv7.py): the promise log_w >= -0.61 selects their fast mode. They
    need bfloat16 r, k, v and heads of 64 or 128, and raise ValueError where they cannot run.
fla: fla-core 0.6.0 of flash-linear-attention (MIT; torch, Triton), `fla.ops.rwkv7.chunk_rwkv7`, called as its own layer
    calls it (fla/layers/rwkv7.py): safe gates, bounded from below, chunks of 64 tokens, whose triangular systems it
    solves by products in float16.
fla_exact: the same function with its own defaults: chunks of 16 tokens, any gate.

    pip install jax-linear-attention fla-core        # fla-core also needs torch, triton and einops
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Name: what must be importable for it.
PEERS = {"jla": "jla.ops", "fla": "fla.ops.rwkv7", "fla_exact": "fla.ops.rwkv7"}
FLA_LAYER = {"safe_gate": True, "lower_bound": -math.exp(-0.5), "chunk_size": 64}  # RWKV-7's log decay is above it


class Pass(NamedTuple):
    """Something to be timed.

    Attributes:
      run: starts it and returns its result.
      wait: waits for such a result.
      arrays: the result as ((out, state) of each side, gradients of each side) of JAX arrays.
      memory: XLA's account of it, if XLA runs it.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    arrays: Callable[[Any], Any]
    memory: Any = None


def available(names) -> dict[str, Any]:
    """{name: its version} of those that can be imported; a line is printed for each other."""
    found = {}
    for name in names:
        try:
            importlib.import_module(PEERS[name])
            found[name] = importlib.import_module(PEERS[name].partition(".")[0]).__version__
        except Exception as error:  # a GPU library that does not load raises whatever it likes
            print(f"{name}: left out, {PEERS[name]} cannot be imported: {error}", flush=True)
    return found


def jla(r, log_w, k, v, a, b, *, implementation="mosaic_gpu"):
    """(out, final state) by jax-linear-attention."""
    from jla.ops import linear_attention

    options = {"scale": 1.0, "lower_bound": -0.61, "output_final_state": True}
    return linear_attention("rwkv7", r, k, v, w=log_w, a=a, b=b, impl=implementation, **options)


def fla_pass(direction, inputs, cotangents, options=FLA_LAYER) -> Pass:
    """A pass of flash-linear-attention over inputs {"r": [B, T, H, K], ...}, which torch gets without a copy.

    Args:
      direction: "forward" or "forward+backward".
      cotangents: (of out, of the state).
      options: of chunk_rwkv7.
    """
    import torch
    from fla.ops.rwkv7 import chunk_rwkv7

    jax.block_until_ready((inputs, cotangents))
    tensors = {name: torch.from_dlpack(x).detach() for name, x in inputs.items()}
    given = tuple(torch.from_dlpack(x) for x in cotangents)
    on_gpu = given[0].is_cuda
    backward = direction == "forward+backward"
    for x in tensors.values():
        x.requires_grad_(backward)
    op = functools.partial(
        chunk_rwkv7,
        **{"w" if name == "log_w" else name: x for name, x in tensors.items()},
        scale=1.0,
        output_final_state=True,
        **options,
    )

    def run():
        with torch.set_grad_enabled(backward):
            result = op()
            return result, torch.autograd.grad(result, list(tensors.values()), given) if backward else ()

    def wait(result):
        if on_gpu:
            torch.cuda.synchronize()

    def arrays(result):
        wait(result)
        outputs, gradients = ([jnp.from_dlpack(x.detach().contiguous()) for x in part] for part in result)
        return (tuple(outputs),), (dict(zip(tensors, gradients, strict=True)),) if backward else ()

    return Pass(run, wait, arrays)
