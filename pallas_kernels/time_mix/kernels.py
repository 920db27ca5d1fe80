"""The pieces around WKV-7 with a kernel forward and one backward where the program is lowered for a TPU or a GPU.

The choice stands inside of each pass, so that what is kept between them, the inputs, does not depend on it. Where no
kernel runs, the forward pass is that of reference.py, and the backward pass that of fused.py.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.partition import independent
from pallas_kernels.time_mix import fused, low_rank, pallas_gpu, pallas_tpu, tiles
from pallas_kernels.time_mix.low_rank import LowRank, pull, values
from pallas_kernels.time_mix.reference import (
    finish_reference,
    operands_reference,
    token_mixes_reference,
)

LAUNCHES = {"pallas_tpu": pallas_tpu.launch, "pallas_gpu": pallas_gpu.launch}
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "cuda"}


# Under jit, so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("name", "plan", "interpret"))
def run(name, plan, tokens, vectors, *, interpret=False):
    """A plan of tiles.py in one kernel.

    Args:
      name: "pallas_tpu" or "pallas_gpu".
      tokens: arrays [B, T, D], behind the first of which a LowRank may stand for its values; the last one may be
        [B, T, 1].
      vectors: [D] each, or rows of such.
      interpret: run the kernel's program on any platform, slowly, for tests.

    Returns:
      (the results [B, T, D], the sums over all tokens, float32 [D] each).
    """
    width = tokens[0].shape[-1]
    head = plan.head_dim or width  # what several devices must not cut
    shapes, tree = jax.tree.flatten(tokens)

    def split(x):
        return x.reshape(*x.shape[:-1], -1, head) if x.shape[-1] == width else x[..., None]

    def flat(x):
        return x.reshape(*x.shape[:-2], -1)

    def pieces(x):
        """The arrays of a token, as they are split over devices, and the letters of their axes."""
        if isinstance(x, LowRank):
            return [(x.hidden, "bt_")] + [(up.reshape(len(up), -1, head), "_gk") for up in x.ups]
        return [(split(x), "btgk" if x.shape[-1] == width else "bt__")]

    def launch(*arrays):
        cut = arrays[0].shape[2:]
        given = [x if letters == "bt_" else flat(x) for x, letters in zip(arrays, taken, strict=True)]
        found = LAUNCHES[name](plan, interpret, tree.unflatten(given[: len(shapes)]), given[len(shapes) :])
        return tuple(x.reshape(*x.shape[:-1], *cut) for x in found)

    inputs = [piece for x in tokens for piece in pieces(x)]
    inputs += [(split(x.astype(jnp.float32).reshape(-1, width)), "vgk") for x in vectors]
    arrays, taken = zip(*inputs, strict=True)
    given = ["btgk"] * len(plan.results) + ["bpvgk"] * bool(plan.terms)
    found = independent(launch, taken, given)(*arrays)
    results, sums = found[: len(plan.results)], found[len(plan.results) :]
    return tuple(map(flat, results)), tuple(jnp.sum(sums[0], (0, 1)).reshape(-1, width)) if sums else ()


def _choose(forms, plain, kernel, *inputs):
    """`kernel` by its name where one of these runs, or where one is named; else `plain`.

    Args:
      forms: names of kernels that take these inputs; or one name, "named:" before it, for that kernel alone; or
        "interpreted:" for its program on any platform; or "fused" for `plain` alone.
    """
    if forms == "fused":
        return plain(*inputs)
    if isinstance(forms, str):
        how, name = forms.split(":")
        return kernel(functools.partial(run, name, interpret=how == "interpreted"), *inputs)
    on = {PLATFORMS[name]: functools.partial(kernel, functools.partial(run, name)) for name in forms}
    return jax.lax.platform_dependent(*inputs, default=plain, **on)


# Token shift.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def token_mixes_kernel(x, mu, sides, forms, carry=None):
    """As `token_mixes`; a carry for "fused" alone."""

    def kernel(run, x, mu, carry):
        del carry
        plan = tiles.token_mixes_plan(sides, len(mu), x.dtype)
        mixes, _ = run(plan, (x,), (mu.astype(x.dtype),))
        return _by_mix(mixes, len(sides))

    return _choose(forms, functools.partial(token_mixes_reference, sides=sides), kernel, x, mu, carry)


def _by_mix(flat, ways):
    return tuple(tuple(flat[i : i + ways]) for i in range(0, len(flat), ways))


def _token_mixes_backward(sides, forms, kept, d):
    def kernel(run, x, mu, carry, d):
        del carry
        plan = tiles.token_mixes_backward_plan(sides, len(mu), x.dtype)
        (d_x,), d_mu = run(plan, (x, *jax.tree.leaves(d)), (mu.astype(x.dtype),))
        return d_x, jnp.stack(d_mu).reshape(mu.shape).astype(mu.dtype), None

    return _choose(forms, functools.partial(fused.token_mixes_backward, sides=sides), kernel, *kept, d)


def _token_mixes_forward(x, mu, sides, forms, carry):
    return token_mixes_kernel(x, mu, sides, forms, carry), (x, mu, carry)


token_mixes_kernel.defvjp(_token_mixes_forward, _token_mixes_backward)


# The operator's inputs.


def _flat(x):
    """[B, T, H, K] -> [B, T, D]."""
    return x.reshape(*x.shape[:2], -1)


def _column(valid):
    """What a kernel takes of valid: [B, T, 1], or nothing."""
    return () if valid is None else (valid.astype(jnp.float32)[..., None],)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def operands_kernel(k, v, raw, blend, vectors, valid, head_dim, a_scale, forms):
    """As `operands_reference`."""

    def plain(*arrays):
        return operands_reference(*arrays, head_dim, a_scale)

    def kernel(run, k, v, raw, blend, vectors, valid):
        tokens, constants = _operands_inputs(k, v, raw, blend, vectors)
        plan = tiles.operands_plan(v.dtype, head_dim, a_scale, blend is not None, valid is not None)
        results, _ = run(plan, (*tokens, *_column(valid)), constants)
        return tuple(x.reshape(*x.shape[:2], -1, head_dim) for x in results)

    return _choose(forms, plain, kernel, k, v, raw, blend, vectors, valid)


def _operands_inputs(k, v, raw, blend, vectors):
    """Arrays or LowRank, and vectors."""
    first, v0 = ((), ()) if blend is None else ((blend[0],), (blend[1],))
    return (k, v, *low_rank.tokens(raw), *first), (*vectors, *v0)


def _operands_forward(k, v, raw, blend, vectors, valid, *static):
    arrays = k, v, raw, blend, vectors, valid
    return operands_kernel(*arrays, *static), arrays


def _operands_backward(head_dim, a_scale, forms, kept, d):
    plain = functools.partial(fused.operands_backward, head_dim=head_dim, a_scale=a_scale)
    raw = kept[2]
    dtypes = [x.dtype for x in jax.eval_shape(values, raw)]

    def kernel(run, k, v, raw, blend, vectors, valid, d):
        tokens, constants = _operands_inputs(k, v, raw, blend, vectors)
        first = () if blend is None else (blend[0].dtype,)
        plan = tiles.operands_backward_plan(
            (k.dtype, v.dtype, *dtypes, *first), head_dim, a_scale, blend is not None, valid is not None
        )
        results, sums = run(plan, (*tokens, *map(_flat, d), *_column(valid)), constants)
        sums = tuple(x.astype(y.dtype) for x, y in zip(sums, constants, strict=True))
        d_blend = None if blend is None else (results[-1], sums[4])
        return *results[:2], tuple(results[2 : 2 + len(dtypes)]), d_blend, sums[:4]

    d_k, d_v, d_values, *rest = _choose(forms, plain, kernel, *kept, d)
    return d_k, d_v, pull(raw, d_values), *rest, None


operands_kernel.defvjp(_operands_forward, _operands_backward)


# The finish.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def finish_kernel(sides, vectors, merge, forms):
    """As `finish_reference`."""

    def kernel(run, sides, vectors, merge):
        inputs, constants, head_dim = _finish_inputs(sides, vectors, merge)
        dtype = jax.eval_shape(values, sides[-1][-1])[0].dtype
        ((y,), _) = run(tiles.finish_plan(dtype, head_dim, len(sides), merge is not None), inputs, constants)
        return y

    return _choose(forms, finish_reference, kernel, sides, vectors, merge)


def _finish_inputs(sides, vectors, merge):
    """Arrays [B, T, D] or LowRank, vectors and head_dim."""
    inputs = [x for *heads, gate in sides for x in (*map(_flat, heads), *low_rank.tokens(gate))]
    constants = [x for three in vectors for x in three]
    if merge is not None:
        inputs += low_rank.tokens(merge[0])
        constants.append(merge[1])
    return inputs, constants, sides[0][0].shape[-1]


def _finish_forward(sides, vectors, merge, forms):
    return finish_kernel(sides, vectors, merge, forms), (sides, vectors, merge)


def _finish_backward(forms, kept, d):
    def kernel(run, sides, vectors, merge, d):
        inputs, constants, head_dim = _finish_inputs(sides, vectors, merge)
        gates = [gate for *_, gate in sides] + ([] if merge is None else [merge[0]])
        gates = [x for gate in gates for x in jax.eval_shape(values, gate)]
        like = [x for (*heads, _), gate in zip(sides, gates, strict=False) for x in (*heads, gate)]
        like += gates[len(sides) :]
        plan = tiles.finish_backward_plan(tuple(x.dtype for x in like), head_dim, len(sides), merge is not None)
        results, sums = run(plan, (*inputs, d), constants)
        results = [x.reshape(y.shape) for x, y in zip(results, like, strict=True)]
        sums = [x.astype(y.dtype) for x, y in zip(sums, constants, strict=True)]
        d_sides = tuple(tuple(results[5 * i : 5 * i + 5]) for i in range(len(sides)))
        d_vectors = tuple(tuple(sums[3 * i : 3 * i + 3]) for i in range(len(sides)))
        return d_sides, d_vectors, None if merge is None else (results[-1], sums[-1])

    sides, _, merge = kept
    d_sides, d_vectors, d_merge = _choose(forms, fused.finish_backward, kernel, *kept, d)
    d_sides = tuple((*x, pull(gate, (d_gate,))) for (*x, d_gate), (*_, gate) in zip(d_sides, sides, strict=True))
    if merge is not None:
        d_merge = pull(merge[0], d_merge[:1]), d_merge[1]
    return d_sides, d_vectors, d_merge


finish_kernel.defvjp(_finish_forward, _finish_backward)
