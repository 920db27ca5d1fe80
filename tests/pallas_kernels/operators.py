"""The operators as what they have in common, a recurrence over tokens: for tests that ask the same of each."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from pallas_kernels import ssd, wkv7
from pallas_kernels.ssd import shapes as ssd_shapes
from pallas_kernels.ssd.chunked import ssd_associative
from pallas_kernels.wkv7 import shapes as wkv7_shapes
from pallas_kernels.wkv7.chunked import wkv7_associative
from pallas_kernels.wkv7.split import split
from tests.pallas_kernels import float64_ssd, float64_wkv7

FORMS = ("reference", "chunked", "associative")  # those that run anywhere; the kernels have files of their own


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """A recurrence: its public function, and what its arrays are called.

    op takes the inputs by name. out, reads, writes and like_out name the output, the input that only reads the state,
    those whose zeros leave it alone, and the one that is shaped as the output is. draw(shape, kind, dtype=, seed=)
    makes inputs of one of `kinds` and an initial_state; loop is the definition in float64; associative is the form
    itself, which takes segments. `small` is a shape, not a multiple of any chunk.
    """

    op: Callable[..., Any]
    names: tuple[str, ...]
    out: str
    reads: str
    writes: tuple[str, ...]
    like_out: str
    kinds: tuple[str, ...]
    draw: Callable[..., dict[str, Any]]
    loop: Callable[..., dict[str, np.ndarray]]
    associative: Callable[..., Any]
    small: tuple[int, ...]

    def shape(self, length, batch=2):
        """`small` of another length and batch."""
        return (batch, length, *self.small[2:])

    def arguments(self, kind="random", shape=None, dtype="float32"):
        """Inputs by name, the initial state, and cotangents of the output and of the final state."""
        # NumPy arrays: what JAX did to them outside of a jit would be compiled, operation by operation.
        shape = shape or self.small
        inputs = jax.tree.map(np.asarray, self.draw(shape, kind, dtype=dtype))
        state = inputs.pop("initial_state")
        d_out = np.asarray(self.draw(shape, dtype=dtype, seed=1)[self.like_out])
        return inputs, state, d_out, np.float32(0.3) * state[:, ::-1]

    @functools.cache  # noqa: B019  there are two operators
    def run(self, form, reverse=False, **options):
        """(inputs, state, cotangents) -> the output, "final" and, as "d..." and "state", all gradients, compiled.

        form: an implementation, with "/C" for a chunk size; "None" is the default; "segmented" is "associative" in
        three segments of `small`; "split" is wkv7's "chunked" with the time axis in five parts.
        """
        implementation, _, size = form.partition("/")
        names = self.names

        def op(inputs, state):
            if form == "segmented":
                tokens = [inputs[name] for name in names]
                segment = max(16, tokens[0].shape[1] // 4)
                return self.associative(*tokens, state, reverse, chunk_size=4, segment=segment, **options)
            if form == "split":
                whole = lambda ways, states: (
                    self.op(*ways[0], initial_state=states[0], reverse=reverse, implementation="chunked"),
                )
                ways = (tuple(inputs[name] for name in names),)
                return split(whole, ways, (state,), (reverse,), 5, 16)[0]
            return self.op(
                **inputs,
                initial_state=state,
                reverse=reverse,
                implementation=None if implementation == "None" else implementation,
                chunk_size=int(size) if size else None,
                **options,
            )

        @jax.jit
        def everything(inputs, state, d_out, d_final):
            (out, final), pull = jax.vjp(op, inputs, state)
            gradients, d_state = pull((out.dtype.type(1) * d_out, d_final))
            return {self.out: out, "final": final, "state": d_state} | {f"d{x}": gradients[x] for x in names}

        return everything


def flip(arguments):
    """The arguments with the time axis turned."""
    inputs, state, d_out, d_final = arguments
    return {name: x[:, ::-1] for name, x in inputs.items()}, state, d_out[:, ::-1], d_final


def _draw_wkv7(shape, kind="random", **options):
    return wkv7_shapes.random_inputs(shape[:4], kind, value_size=shape[4], **options)


WKV7 = Operator(
    op=functools.partial(wkv7.wkv7, mild=True),  # as the models call it
    names=float64_wkv7.NAMES,
    out="out",
    reads="r",
    writes=("log_w", "k", "v", "a", "b"),
    like_out="v",
    kinds=wkv7_shapes.KINDS,
    draw=_draw_wkv7,
    loop=float64_wkv7.token_loop,
    associative=functools.partial(wkv7_associative, mild=True),
    small=(2, 37, 2, 8, 5),
)
SSD = Operator(
    op=ssd.ssd,
    names=float64_ssd.NAMES,
    out="y",
    reads="c",
    writes=("x", "log_a"),
    like_out="x",
    kinds=ssd_shapes.KINDS,
    draw=ssd_shapes.random_inputs,
    loop=float64_ssd.token_loop,
    associative=ssd_associative,
    small=(2, 37, 4, 8, 2, 5),
)
OPERATORS = {"wkv7": WKV7, "ssd": SSD}


def wkv7_and_gradients(op, tokens, states, d_outs, d_finals):
    """Per direction what float64_wkv7.token_loop returns, of op(tokens, states) -> (out, final state) of each."""
    results, pull = jax.vjp(op, tokens, states)
    d_tokens, d_states = pull(tuple(zip(d_outs, d_finals, strict=True)))
    return [
        {"out": out, "final": final, "state": d_state} | {f"d{x}": y for x, y in zip(WKV7.names, d, strict=True)}
        for (out, final), d, d_state in zip(results, d_tokens, d_states, strict=True)
    ]


def check_mapped(loss, tokens, state, d_out):
    """Gradients under remat, of a batch of four whole and as two mapped pairs: a mapped axis is a part of the batch."""
    apart = lambda tree: jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), tree)
    gradient = jax.grad(jax.checkpoint(loss), (0, 1))
    both = jax.jit(lambda *z: (gradient(*z), jax.vmap(gradient)(*map(apart, z))))
    whole, mapped = both(tokens, state, d_out)
    jax.tree.map(np.testing.assert_array_equal, mapped, apart(whole))


def lowered_for_hopper(op, *arguments):
    """The program of op(*arguments), arrays or their shapes, for a GPU that is not here, as text."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(op).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
