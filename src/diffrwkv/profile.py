"""Speed of the denoisers: `python -m diffrwkv.profile [--names NAME ...] [--lengths L ...] [--output=NAME] ...`.

Measures, on whatever device this is, how long a pass takes over length and batch, and how many tokens a second each way
of decoding gives: passes over the whole text, blocks from an exact state, blocks with frozen keys and values, and left
to right. Prints tables with a fit of a L² + b L + c and the length from which a linear denoiser is faster than
attention, beside analytic operations, bytes and state and XLA's own counts. With --output it writes NAME.jsonl, a
measurement a line, and NAME.md, NAME.html and NAME.svg from it. The weights are random: no time depends on them.

The form is that of DiffuMamba's figures and tables (arXiv 2511.15927), with more than one batch size.
"""

if __name__ == "__main__":  # here, for the flags are read before JAX is imported
    from diffrwkv import cli

    cli.start("profile")

import argparse
import concurrent.futures
import dataclasses
import functools
import html
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffrwkv import charts, cli, config, metrics, presets, timing
from diffrwkv.cli import profile as flags
from diffrwkv.config import UserError
from diffrwkv.denoiser import Denoiser, cast_matrices, count_parameters, parse_pattern
from diffrwkv.diffusion import objectives, samplers
from diffrwkv.diffusion.processes import Masked, NextToken, Vocabulary
from diffrwkv.networks import face

Row = dict[str, Any]

ATTENTION = ("attention", "causal_attention")
# Of each mixer, and of its other option that names a form: the definition, or attention without a fused kernel (on a
# CPU that is what runs anyhow).
PLAIN = {
    "attention": "xla",
    "causal_attention": "xla",
    "bimamba2": "reference",
    "mamba2": "reference",
    "birwkv7": "reference",
    "birwkv7.time_mix": "reference",
    "rwkv7": "reference",
    "rwkv7.time_mix": "reference",
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of a pass beside that in plain forms
PASSES = 2  # over a whole text, that are timed of all that decoding it takes
STEPS = 16  # of one token from left to right, likewise
METHODS = ("full", "block", "frozen", "ar")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and of which size the denoisers are."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    batch: tuple[int, ...]
    size: str = "peer"
    dim: int | None = None
    layers: int | None = None
    vocab_size: int | None = None
    scan_layers: bool = False
    dtype: str = "float32"
    use: tuple[tuple[str, str], ...] = ()
    tokens_per_pass: tuple[int, ...] = (8, 16)
    block: int = 32
    what: tuple[str, ...] = ("pass", "decode")
    seconds: float = 1.0
    most_seconds: float = 120.0

    def told_size(self) -> str:
        """The size, and what is another than the size has it."""
        own = {"dim": self.dim, "layers": self.layers}
        return ", ".join([self.size, *(f"{key} {value}" for key, value in own.items() if value is not None)])


# --- What is measured ---------------------------------------------------------------------------


def build(
    name: str,
    size: str = "peer",
    *,
    dim: int | None = None,
    layers: int | None = None,
    vocab_size: int | None = None,
    scan_layers: bool = False,
    dtype: str = "float32",
    use: Mapping[str, str] | None = None,
) -> Denoiser:
    """A backbone of `presets.BACKBONES` at a size of `presets.SIZES`.

    Args:
      dim: another width, with the options of no size.
      layers, vocab_size: instead of the size's.
      scan_layers: compile one layer for all.
      use: {one of PLAIN: its form}, which fails where it cannot run; others take what they take in a model.
    """
    c = config.base()
    presets.configure(c, name, size)
    if dim:  # the size's options fit its own width
        c = config.base()
        c.model.update(presets.BACKBONES[name])
        c.model.dim, c.model.num_layers = dim, presets.SIZES[size][name]["num_layers"]
    if layers:
        c.model.num_layers = layers
    c.model.scan_layers, c.model.dtype = scan_layers, dtype
    name_forms(c.model, use or {})
    return Denoiser(vocab_size or presets.SIZES[size]["vocab_size"], **c.model.to_dict())


def name_forms(model: Any, use: Mapping[str, str]) -> None:
    """Sets the forms that `use` of `build` names in a config's section `model`."""
    for choice, form in use.items():
        mixer, option = _option(choice)
        model.mixers[mixer][option] = form


def _option(choice: str) -> tuple[str, str]:
    """The mixer and its option that one of PLAIN names."""
    mixer, _, option = choice.partition(".")
    return mixer, option or "implementation"


def random_weights(model: Denoiser) -> Any:
    """Weights as generation has them, nowhere zero: initial ones, each a little off."""
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.zeros(1)))["params"]
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), params)
    return cast_matrices(model, params)


def canvas(model: Denoiser, batch: int, length: int) -> jax.Array:
    """int32 [B, L]: random tokens, half of them masked."""
    key_tokens, key_masks = jax.random.split(jax.random.key(length))
    z = jax.random.randint(key_tokens, (batch, length), 0, model.vocab_size - 1)
    return jnp.where(jax.random.bernoulli(key_masks, 0.5, z.shape), model.vocab_size - 1, z)


def compile_pass(model: Denoiser, params: Any, z: jax.Array) -> Any:
    """The pass over such a canvas, compiled: (params, z) -> logits."""
    return jax.jit(lambda params, z: model.apply({"params": params}, z)).lower(params, z).compile()


def counted(model: Denoiser, params: Any, batch: int, length: int) -> Row:
    """What a pass takes, counted from shapes.

    Returns:
      flops: 2 for each weight of a matrix and position, the embedding left out, and what the mixers do beyond their
        matrices as their definition has it (`Denoiser.flops`). adaLN's matrices act once in a pass, for the denoisers
        here are not conditioned on time.
      bytes: the least that must move: each weight but the embedding table once; the embeddings that are looked up; the
        residual stream, read and written by both halves of each layer; the logits.
      intensity: flops over bytes.
      state_bytes: what the mixers hold of a text of this length (`state_bytes`).
    """
    positions = batch * length
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embedding"].nbytes
    stream = 4 * positions * model.dim
    each = metrics.model_flops_per_token(for_each_position(params)) / 3
    once = metrics.model_flops_per_token(params) / 3 - each
    flops = once + positions * (each + model.flops(length))
    moved = weights + stream * (1 + 4 * model.num_layers) + 4 * positions * model.vocab_size
    return {
        "flops": flops,
        "bytes": moved,
        "intensity": flops / moved,
        "state_bytes": batch * state_bytes(model, length),
    }


def for_each_position(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters without those of adaLN."""
    inside = {key: for_each_position(x) if isinstance(x, Mapping) else x for key, x in params.items()}
    return {key: x for key, x in inside.items() if not key.startswith(("time_embedding", "modulate"))}


DIRECTIONS = {"bimamba2": 2, "birwkv7": 2}  # empty_state gives the forward one


def state_bytes(model: Denoiser, length: int) -> int:
    """Bytes that the mixers of all layers hold of a sequence: keys and values of attention; the recurrences' states and
    what their shift or convolution takes over, in both directions where there are two.
    """
    total = 0
    names, _ = parse_pattern(model.pattern, model.num_layers)
    for name, (mixer, _) in zip(names, model.parts(), strict=True):
        arrays = jax.tree.leaves(jax.eval_shape(lambda mixer=mixer: mixer.empty_state(1, length)))
        held = sum(x.size * x.dtype.itemsize for x in arrays if x.ndim > 1)  # the cache's counter left out
        total += DIRECTIONS.get(name, 1) * held
    return total


def xla_counts(compiled: Any) -> Row:
    """XLA's own account of a program: operations, bytes that its instructions touch, and memory.

    The body of a loop, such as a recurrence over chunks or attention over blocks of queries, counts once, however often
    it runs; so `xla_flops` is no check of `flops` where there is one. On some devices XLA keeps no account.
    """
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    whole = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "xla_flops": cost.get("flops"),
        "xla_bytes": cost.get("bytes accessed"),
        "temporary_mb": memory.temp_size_in_bytes / 2**20,
        "peak_mb": whole / 2**20,
    }


# --- Ways of decoding ---------------------------------------------------------------------------


class Decoding(NamedTuple):
    """What is timed of a way of decoding: `run()` gives `Samples` of `tokens` tokens each, after `passes` passes."""

    run: Callable[[], samplers.Samples]
    tokens: int
    passes: int


class Decoder:
    """A denoiser's ways of decoding, one of METHODS each; their programs are kept, one for all lengths and batches.

    Only as much of a text is generated as says what the rest costs: all passes over a whole text cost the same; a
    block, and a token from left to right, are timed at the text's end, from the state of what stands before it.
    """

    def __init__(self, model: Denoiser, params: Any, block: int):
        self._model, self._params, self._block = model, params, block
        self._mask = model.vocab_size - 1
        self._programs: dict[Any, Any] = {}

    def ways(self) -> list[str]:
        """The METHODS that the denoiser can be decoded by."""
        model = self._model
        if model.causal:
            return ["ar"]
        mixers = set(parse_pattern(model.pattern, model.num_layers)[0])
        return ["full", "block", *(["frozen"] if mixers == {"attention"} and model.channel_mixer == "mlp" else [])]

    def full(self, batch: int, length: int, per_pass: int) -> Decoding:
        """`Confidence` over the whole text, whose last blanks PASSES passes fill."""
        passes = max(1, min(PASSES, length // per_pass))
        z = self._text(batch, length, passes * per_pass)
        return self._filled(samplers.Confidence(num_steps=passes), z, passes * per_pass, passes)

    def frozen(self, batch: int, length: int, per_pass: int) -> Decoding:
        """The text's last block, with the keys and values of all others frozen: Fast-dLLM's dual cache."""
        passes = self._block // per_pass
        sampler = samplers.FrozenCache(samplers.Confidence(num_steps=passes), self._block)
        return self._filled(sampler, self._text(batch, length, self._block), self._block, 1 + passes)

    def block(self, batch: int, length: int, per_pass: int) -> Decoding:
        """The text's last block from the exact state of the text before it, and the state past it."""
        passes = self._block // per_pass
        next_block, read = self._kept(passes, lambda: block_step(self._model, self._block, passes))
        before, keys = self._text(batch, length - self._block), samplers.sequence_keys(0, batch)
        state = self._model.empty_state(batch, length)
        if before.size:
            state = jax.block_until_ready(read(self._params, before, state))
        number = np.int32(length // self._block - 1)

        def run():
            done, after = next_block(self._params, state, keys, number)
            jax.block_until_ready(after)
            return done

        return Decoding(run, self._block, passes)

    def ar(self, batch: int, length: int, per_pass: int = 1) -> Decoding:
        """The text's last tokens, one after another."""
        steps = min(STEPS, length)
        read, write = self._kept("ar", self._left_to_right)
        state, before = self._model.empty_state(batch, length), self._text(batch, length - steps)
        if before.size:
            state = jax.block_until_ready(read(self._params, before, state))
        blank = self._text(batch, steps, steps)
        return Decoding(lambda: write(self._params, state, blank), steps, steps)

    def _filled(self, sampler: samplers.Sampler, z: jax.Array, tokens: int, passes: int) -> Decoding:
        def program():
            objective = _diffusion(self._model, objectives.Whole())

            @jax.jit
            def fill(params, z):
                network = face(self._model, objective, params, sampler)
                return sampler(objective.process, network, samplers.sequence_keys(0, len(z)), z)

            return fill

        fill = self._kept(sampler, program)
        return Decoding(lambda: fill(self._params, z), tokens, passes)

    def _left_to_right(self):
        model, process = self._model, NextToken(Vocabulary(self._mask + 1, self._mask))
        objective, sampler = objectives.Objective(process, objectives.Whole()), samplers.Autoregressive()

        @jax.jit
        def read(params, z, state):
            return model.apply({"params": params}, z, state=state, method="with_state")[1]

        @jax.jit
        def write(params, state, blank):
            network = face(model, objective, params, sampler)._replace(start=lambda batch, room: state)
            return sampler(process, network, samplers.sequence_keys(0, len(blank)), blank)

        return read, write

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def _text(self, batch: int, length: int, blanks: int = 0) -> jax.Array:
        """int32 [B, L]: random tokens, and so many blanks at the end."""
        z = jax.random.randint(jax.random.key(length), (batch, length), 0, self._mask)
        return z.at[:, length - blanks :].set(self._mask)


def _diffusion(model: Denoiser, layout: Any) -> Any:
    return objectives.Diffusion(Masked(Vocabulary(model.vocab_size, model.vocab_size - 1)), layout)


def block_step(
    model: Denoiser, block: int, passes: int, temperature: float = 0.0
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Block diffusion from a state, as `BlockCached` does it.

    Returns:
      ((params, state, keys [B], number of the block) -> (`Samples` of it, the state past it);
      (params, tokens int32 [B, L], state) -> the state past them, L a multiple of `block`). Both are jitted.
    """
    objective = _diffusion(model, objectives.Blocks((block,)))
    sampler = samplers.BlockCached(samplers.Confidence(num_steps=passes, temperature=temperature), block)

    @jax.jit
    def next_block(params, state, keys, number):
        network = face(model, objective, params, sampler)
        blank = jnp.full((len(keys), block), model.vocab_size - 1, jnp.int32)
        return sampler.next_block(objective.process, network, state, keys, number, blank)

    @jax.jit
    def read(params, tokens, state):
        return face(model, objective, params, sampler).context(tokens, state, None)

    return next_block, read


# --- Measuring ----------------------------------------------------------------------------------


def measure(options: Options, say: Callable[[str], None] = print) -> Iterator[Row]:
    """Yields a row for each measurement, as it is made; a length that fails, for want of memory say, has its reason.

    Raises UserError for options that no denoiser has, before any compute; and where a pass differs from one in plain
    forms: no time of it means anything.
    """
    models = {name: _model(name, options) for name in options.names}
    for name, model in models.items():
        params = random_weights(model)
        about = {
            "name": name,
            "pattern": model.pattern,
            "causal": model.causal,
            "parameters": count_parameters(params),
            "size": options.told_size(),
            "dim": model.dim,
            "layers": model.num_layers,
            "vocab_size": model.vocab_size,
            "dtype": options.dtype,
            "use": dict(options.use),
            "error": check(name, model, params, min(options.lengths)),
            "device": timing.device_name(),
            "jax": jax.__version__,
        }
        decoder = Decoder(model, params, options.block)
        for batch in options.batch:
            for row in _of_batch(model, params, decoder, batch, options):
                say(told(about | row))
                yield about | row


def _model(name: str, options: Options) -> Denoiser:
    own = {key: getattr(options, key) for key in ("dim", "layers", "vocab_size", "scan_layers", "dtype")}
    try:
        model = build(name, options.size, use=dict(options.use), **own)
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32), jnp.zeros(1))
    except (ValueError, TypeError) as e:
        raise UserError(f"{name}: {e}") from e
    return model


def check(name: str, model: Denoiser, params: Any, length: int, compiled: Any = None) -> float:
    """How far a pass is from one in plain forms (PLAIN). Raises UserError when that is too far.

    `compiled`: the pass over `canvas(model, 1, length)`, where there is one already.
    """
    z = canvas(model, 1, length)
    mixers = {key: dict(value) for key, value in dict(model.mixers).items()}
    for choice, form in PLAIN.items():
        mixer, option = _option(choice)
        if mixer in parse_pattern(model.pattern, model.num_layers)[0]:
            mixers[mixer] = mixers.get(mixer, {}) | {option: form}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # compilers work outside of Python's lock
        plain_pass = pool.submit(compile_pass, model.clone(mixers=mixers), params, z)
        fast = (compiled or compile_pass(model, params, z))(params, z)
        plain = plain_pass.result()(params, z)
    error = float(jnp.linalg.norm(fast - plain) / jnp.linalg.norm(plain))
    if not error < TOLERANCE[model.dtype]:
        raise UserError(f"{name}: a pass is {error:.1e} off its definition: no time is measured.")
    return error


def _of_batch(model: Denoiser, params: Any, decoder: Decoder, batch: int, options: Options) -> Iterator[Row]:
    known: dict[int, float] = {}  # {length: seconds of a pass}
    for length in sorted(options.lengths):
        at: Row = {"kind": "pass", "batch": batch, "length": length, "milliseconds": None}
        expected = _expected(known, length)

        def unless_late(passes: float, run: Callable[[], Row], expected: float = expected) -> Row:
            if passes * expected > options.most_seconds:
                return {"failed": f"not run: it would take about {passes * expected:,.0f} s at a time"}
            return _attempt(run)

        row = at | unless_late(1, functools.partial(one_pass, model, params, batch, length, options.seconds))
        if row["milliseconds"]:
            known[length] = 1e-3 * row["milliseconds"]
        if "pass" in options.what:
            yield row
        if "decode" not in options.what:
            continue
        for method in decoder.ways():
            passes = {"full": PASSES, "frozen": 2}.get(method, 1)  # over the text, about
            for per_pass in [1] if method == "ar" else options.tokens_per_pass:
                about = {"kind": "decode", "method": method, "tokens_per_pass": per_pass, "passes": length // per_pass}
                about |= {"block": options.block} if method in ("block", "frozen") else {}
                run = functools.partial(decode, decoder, method, batch, length, per_pass, options.seconds)
                yield at | about | unless_late(passes, run)


def _attempt(run: Callable[[], Row]) -> Row:
    try:
        return run()
    except (RuntimeError, ValueError, NotImplementedError) as problem:  # memory, or a form that cannot run here
        return {"milliseconds": None, "failed": " ".join(str(problem).split())[:300]}


def _expected(known: Mapping[int, float], length: int) -> float:
    """Seconds of a pass over so many tokens, as it has grown so far, and by the square at first; 0 for the first."""
    if not known:
        return 0.0
    lengths = sorted(known)
    last = lengths[-1]
    power = 2.0
    if len(lengths) > 1:
        power = np.log(known[last] / known[lengths[-2]]) / np.log(last / lengths[-2])
    return float(known[last] * (length / last) ** min(2.0, max(1.0, power)))


def one_pass(model: Denoiser, params: Any, batch: int, length: int, seconds: float) -> Row:
    """The fields of a row on a pass: its time, and what it takes by our account and by XLA's."""
    z = canvas(model, batch, length)
    compiled = compile_pass(model, params, z)
    time = timing.latency(lambda: compiled(params, z), seconds=seconds)
    fields = {**time, "tokens_per_second": 1e3 * z.size / time["milliseconds"]}
    return fields | counted(model, params, batch, length) | xla_counts(compiled)


def decode(decoder: Decoder, method: str, batch: int, length: int, per_pass: int, seconds: float) -> Row:
    """The fields of a row on decoding a text of this length by one of METHODS: tokens a second over the batch.

    Raises RuntimeError where the sampler did other work than is reported.
    """
    decoding = getattr(decoder, method)(batch, length, per_pass)
    done = decoding.run()  # compiles
    if set(done.passes.tolist()) != {decoding.passes}:
        raise RuntimeError(f"the sampler took {done.passes.tolist()} passes, not {decoding.passes}")
    time = timing.latency(decoding.run, seconds=seconds)
    speed = 1e3 * batch * decoding.tokens / time["milliseconds"]
    return time | {"tokens": decoding.tokens, "timed_passes": decoding.passes, "tokens_per_second": speed}


def told(row: Row) -> str:
    """A line on a measurement."""
    what = row["name"] if row["kind"] == "pass" else f"{row['name']}, {row['method']}, p {row['tokens_per_pass']}"
    where = f"{what:28} B {row['batch']:2} L {row['length']:7,}"
    if not row["milliseconds"]:
        return f"{where}  no time: {row['failed']}"
    return f"{where}  {row['milliseconds']:10.2f} ms  {row['tokens_per_second']:12,.0f} tokens/s"


# --- What the rows say --------------------------------------------------------------------------


def fit(lengths: Sequence[int], milliseconds: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, c), none below 0, of the a L² + b L + c whose relative errors have the least squares.

    Of three numbers each set that may be above 0 is tried: the best one without a negative number solves it.

    Raises ValueError for fewer than three lengths.
    """
    if len(set(lengths)) < 3:
        raise ValueError(f"a fit of three numbers needs three lengths, got {sorted(set(lengths))}.")
    unit = max(lengths)
    x = np.array(lengths, np.float64) / unit
    columns = np.stack([x**2, x, np.ones_like(x)], 1) / np.array(milliseconds, np.float64)[:, None]
    best, least = np.zeros(3), np.inf
    for size in (1, 2, 3):
        for chosen in map(list, itertools.combinations(range(3), size)):
            found = np.linalg.lstsq(columns[:, chosen], np.ones(len(x)), rcond=None)[0]
            error = float(np.square(columns[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[chosen] = found
    return float(best[0] / unit**2), float(best[1] / unit), float(best[2])


def crossover(linear: Mapping[int, float], attention: Mapping[int, float]) -> tuple[float | None, str]:
    """From which length on `linear` is faster: (it, how that is known), both {length: milliseconds}.

    Between two measured lengths, on straight lines in the logarithms ("measured"); the shortest, where it is faster at
    all ("or less"); beyond the longest, where the fits cross ("by the fits"); None, where they never do.
    """
    lengths = sorted(set(linear) & set(attention))
    if not lengths:
        return None, "no common length"
    lead = [np.log(linear[n] / attention[n]) for n in lengths]
    behind = [i for i, x in enumerate(lead) if x > 0]
    if not behind:
        return float(lengths[0]), "or less"
    last = behind[-1]
    if last + 1 < len(lengths):
        one, two = np.log(lengths[last]), np.log(lengths[last + 1])
        return float(np.exp(one + (two - one) * lead[last] / (lead[last] - lead[last + 1]))), "measured"
    if len(lengths) < 3:
        return None, "not up to the longest"
    ours, theirs = (fit(lengths, [times[n] for n in lengths]) for times in (linear, attention))
    roots = np.roots(np.trim_zeros(np.subtract(theirs, ours), "f"))
    beyond = [float(r.real) for r in roots if abs(r.imag) < 1e-9 * abs(r) and r.real > lengths[-1]]
    return (max(beyond), "by the fits") if beyond and theirs[0] > ours[0] else (None, "never, by the fits")


class Table(NamedTuple):
    """A table of cells that are text already; the first `left` columns are names."""

    head: list[str]
    rows: list[list[str]]
    left: int


def report(rows: Sequence[Row]) -> str:
    """The tables of measurements, as Markdown; a section for each device, size, vocabulary and precision."""
    parts = []
    for about, group in _groups(rows):
        parts += [f"**{about}**", *(charts.markdown_table(*table) for table in _tables(group))]
    return "\n\n".join(parts) + "\n"


def page(rows: Sequence[Row]) -> str:
    """The same and the plots, as an HTML page that needs nothing from elsewhere."""

    def cell(text: str) -> tuple[str, float | None]:
        try:
            return text, float(text.replace(",", ""))
        except ValueError:
            return text, None

    parts = []
    for about, group in _groups(rows):
        parts.append(f"<h2>{html.escape(about)}</h2>")
        parts += [charts.html_table(t.head, [[*map(cell, row)] for row in t.rows]) for t in _tables(group)]
    return charts.page("Speed of the denoisers", [*parts, chart(rows)])


def _tables(rows: Sequence[Row]) -> list[Table]:
    return [table for table in (_latencies(rows), _decoding(rows), _counts(rows)) if table.rows]


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        about = f"{_place(row)}, {row['dtype']}, vocabulary of {row['vocab_size']:,}, jax {row['jax']}"
        groups.setdefault(about, []).append(row)
    return list(groups.items())


def _place(row: Row) -> str:
    """The device and the size."""
    return ", ".join([row["device"], *([f"size {row['size']}"] if "size" in row else [])])


def _times(rows: Sequence[Row], kind: str, field: str) -> dict[tuple, dict[int, float | None]]:
    """{(batch, name, method, tokens per pass): {length: the field, None where there is no time}}."""
    out: dict[tuple, dict[int, float | None]] = {}
    for row in rows:
        if row["kind"] == kind:
            key = (row["batch"], row["name"], row.get("method"), row.get("tokens_per_pass"))
            out.setdefault(key, {})[row["length"]] = row[field] if row["milliseconds"] else None
    return dict(sorted(out.items(), key=lambda item: item[0][0]))


def _yardsticks(rows: Sequence[Row]) -> dict[bool, str]:
    """{whether it is causal: the name of the backbone of attention alone}."""
    found: dict[bool, str] = {}
    for row in rows:
        if {part.partition("*")[0].strip() for part in row["pattern"].split(",")} <= set(ATTENTION):
            found.setdefault(row["causal"], row["name"])
    return found


def _latencies(rows: Sequence[Row]) -> Table:
    times = _times(rows, "pass", "milliseconds")
    lengths = sorted({n for each in times.values() for n in each})
    causal, yardsticks = {row["name"]: row["causal"] for row in rows}, _yardsticks(rows)
    body = []
    for (batch, name, *_), each in times.items():
        known = {n: ms for n, ms in each.items() if ms}
        cells = [_shown(each, n, lambda ms: f"{ms:,.1f}" if ms >= 10 else f"{ms:.2f}") for n in lengths]
        fitted = "{:.2e}, {:.2e}, {:.3g}".format(*fit(list(known), list(known.values()))) if len(known) > 2 else ""
        other = yardsticks.get(causal[name])
        faster = ""
        if other not in (None, name) and (batch, other, None, None) in times:
            attention = {n: ms for n, ms in times[batch, other, None, None].items() if ms}
            at, how = crossover(known, attention)
            faster = how if at is None else f"{at:,.0f}" + ("" if how == "measured" else f" {how}")
        body.append([str(batch), name, *cells, fitted, faster])
    head = ["batch", "ms of a pass over", *(f"{n:,}" for n in lengths), "a, b, c", "faster than attention from"]
    return Table(head, body, left=2)


def _shown(each: Mapping[int, float | None], length: int, show: Callable[[float], str]) -> str:
    if length not in each:
        return ""
    value = each[length]
    return "no time" if value is None else show(value)


def _decoding(rows: Sequence[Row]) -> Table:
    speeds = _times(rows, "decode", "tokens_per_second")
    lengths = sorted({n for each in speeds.values() for n in each})
    body = []
    for batch, name, method, p in sorted(speeds, key=lambda key: (key[0], METHODS.index(key[2]), key[3])):
        cells = [_shown(speeds[batch, name, method, p], n, "{:,.0f}".format) for n in lengths]
        body.append([str(batch), method, str(p), name, *cells])
    head = ["batch", "decoding", "tokens a pass", "tokens/s for a text of", *(f"{n:,}" for n in lengths)]
    return Table(head, body, left=4)


def _counts(rows: Sequence[Row]) -> Table:
    """Operations, bytes and state of a pass at the shortest and the longest length of the first batch size."""
    known = [row for row in rows if row["kind"] == "pass" and "flops" in row]
    batch = min((row["batch"] for row in known), default=1)
    body = []
    for name in dict.fromkeys(row["name"] for row in known):
        own = sorted((r for r in known if r["name"] == name and r["batch"] == batch), key=lambda r: r["length"])
        for r in [own[0], own[-1]] if len(own) > 1 else own:
            xla = {key: "" if r[key] is None else f"{1e-6 * r[key]:,.4g}" for key in ("xla_flops", "xla_bytes")}
            body.append(
                [
                    name,
                    f"{r['length']:,}",
                    f"{r['parameters'] / 1e6:,.2f}",
                    f"{r['flops'] / 1e6:,.4g}",
                    xla["xla_flops"],
                    f"{r['bytes'] / 1e6:,.4g}",
                    xla["xla_bytes"],
                    f"{r['intensity']:,.0f}",
                    f"{r['state_bytes'] / 1e3:,.4g}",
                    f"{r['peak_mb']:,.0f}",
                    f"{1e-6 * r['flops'] / r['milliseconds']:,.3g}",
                ]
            )
    head = ["one pass, batch " + str(batch), "length", "M parameters", "MFLOP", "XLA's", "least MB moved", "XLA's"]
    head += ["FLOP/byte", "KB state", "peak MiB", "GFLOP/s reached"]
    return Table(head, body, left=1)


def chart(rows: Sequence[Row]) -> str:
    """Plots as SVG over length: time of a pass, tokens a second of each way of decoding, with most tokens in a pass.

    A panel for each of them and each device, size and batch; a denoiser has one colour in all. Those that see both
    sides and those from left to right have panels of their own.
    """
    panels = []
    groups = _groups(rows)
    for _, group in groups:
        place = f", {_place(group[0])}" if len(groups) > 1 else ""
        times, speeds = _times(group, "pass", "milliseconds"), _times(group, "decode", "tokens_per_second")
        causal = {row["name"]: row["causal"] for row in group}
        most = max((key[3] for key in speeds if key[2] != "ar"), default=1)
        frames: dict[tuple[int, str, str], list[charts.Series]] = {}
        for (batch, name, _, _), each in times.items():
            what = "a pass from left to right" if causal[name] else "a pass"
            frames.setdefault((batch, what, "ms"), []).append(charts.Series(name, _points(each)))
        for (batch, name, method, p), each in speeds.items():
            if method == "ar" or p == most:
                what = method if method == "ar" else f"{method}, {p} tokens a pass"
                frames.setdefault((batch, what, "tokens/s"), []).append(charts.Series(name, _points(each)))
        for (batch, what, unit), series in sorted(frames.items(), key=lambda item: item[0][0]):
            panels.append(charts.Panel("length", unit, series, f"{what}, batch {batch}{place}", "log2", "log10"))
    return charts.svg(panels)


def _points(each: Mapping[int, float | None]) -> list[tuple[float, float]]:
    return [(float(n), value) for n, value in sorted(each.items()) if value]


# --- The program --------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """The program. Raises UserError for bad input, before any compute."""
    work(flags.parse_arguments(arguments))


def work(args: argparse.Namespace) -> None:
    """What the flags say. Raises UserError for bad input, before any compute."""
    output = None if args.output is None else charts.output(args.output)
    if args.show:
        rows = read(*(config.at_home(path, "--show=") for path in args.show))
    else:
        rows = []
        file = None if output is None else output.with_name(output.name + ".jsonl")
        if file is not None:
            charts.write(file, "", mode="a")  # it can be written
            if args.append:
                read(file)  # it holds measurements
        origin = {"command": " ".join([cli.called("profile"), *sys.argv[1:]])}
        for row in measure(options(args), say=lambda line: print(line, file=sys.stderr, flush=True)):
            rows.append(row | origin)
            if file is not None:
                first = len(rows) == 1 and not args.append  # what the file held is kept until there is something new
                charts.write(file, json.dumps(rows[-1], allow_nan=False) + "\n", mode="w" if first else "a")
        if file is not None:
            rows = read(file)
    text = report(rows)
    print(text, end="")
    if output is not None:
        charts.write(output.with_name(output.name + ".svg"), chart(rows))
        charts.write(output.with_name(output.name + ".md"), f"{text}\n![speed over length]({output.name}.svg)\n")
        charts.write(output.with_name(output.name + ".html"), page(rows))


def options(args: argparse.Namespace) -> Options:
    """What the flags say is to be measured."""
    return Options(
        names=tuple(dict.fromkeys(args.names)),
        lengths=tuple(sorted(set(args.lengths))),
        batch=tuple(sorted(set(args.batch))),
        use=tuple(tuple(choice.split("=", 1)) for choice in args.use),
        tokens_per_pass=tuple(sorted(set(args.tokens_per_pass))),
        block=args.block_size,
        what=tuple(args.what),
        **{
            key: getattr(args, key)
            for key in ("size", "dim", "layers", "vocab_size", "scan_layers", "dtype", "seconds", "most_seconds")
        },
    )


def read(*paths: Path) -> list[Row]:
    """The rows of files that the program wrote, of two of one thing the later. Raises UserError.

    Other forms of an operator (--use), other blocks and scanned layers make no other thing.
    """
    rows: dict[Any, Row] = {}
    for path in paths:
        try:
            for row in map(json.loads, path.read_text().splitlines()):
                told = tuple(row[key] for key in ("device", "dtype", "vocab_size", "jax", "name", "pattern", "causal"))
                own = (row["kind"], row["batch"], row["length"], row.get("method"), row.get("tokens_per_pass"))
                rows[(*told, row.get("size"), *own)] = row
                if row["milliseconds"] is None and "failed" not in row:
                    raise ValueError("a row has neither a time nor a reason")
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror or e}).") from None
        except KeyError as e:
            raise UserError(f"{path} holds no measurements of diffrwkv.profile (a row has no {e}).") from None
        except (ValueError, TypeError) as e:
            raise UserError(f"{path} holds no measurements of diffrwkv.profile ({e}).") from None
    return list(rows.values())
