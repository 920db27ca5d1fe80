"""Generates text from a trained model: what the program `sample` and a notebook share.

    run = diffrwkv.load("runs/quickstart")
    generation = diffrwkv.generate(run, ["The ", "An "], max_new_tokens=64, temperature=0.8)
    print(generation.texts)

`generate` is four steps, each of use alone: `canvas.canvases` lays out what is given and what is blank, `build_sampler`
makes the sampler, `batches` fills the canvases, and `Generator` is where a compiled function comes from (model,
sampler); `networks` is how a sampler with a state sees the model.
"""

import codecs
import dataclasses
import itertools
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffrwkv import bars, config, denoiser, sharding, shipped, traces
from diffrwkv.canvas import BLANK, MOST_TOKENS, canvas_row, canvases, check_most, text_length
from diffrwkv.config import UserError, check_at_least_one
from diffrwkv.data import Tokenizer
from diffrwkv.diffusion import samplers
from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.diffusion.noise import NO_TOKEN
from diffrwkv.diffusion.objectives import Objective
from diffrwkv.diffusion.processes import Process
from diffrwkv.networks import face
from diffrwkv.run import MOST_LOGITS, Run, load_run
from diffrwkv.workdir import named

# Canvases are padded to a multiple of this, so that prompts of other lengths seldom need another compilation.
LENGTH_STEP = 32


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated, for B sequences on canvases of at most L tokens.

    Attributes:
      texts: B strings, what was given among them.
      tokens: int32 [B, L], BOS and EOS among them; the tokenizer's `pad_id` from a sequence's length on.
      lengths: int32 [B], tokens of each sequence: its canvas, or up to the EOS that ended it.
      passes: int32 [B], network passes that each sequence needed, whatever batch it rode in.
      trace: int32 [N + 1, B, L] or None: the canvases, then the sequences after each of the sampler's N steps. It is
        not cut at an EOS.
      tokenizer: of the ids.
    """

    texts: list[str]
    tokens: np.ndarray
    lengths: np.ndarray
    passes: np.ndarray
    trace: np.ndarray | None
    tokenizer: Tokenizer = dataclasses.field(repr=False)

    def save_trace(self, path: str | os.PathLike) -> None:
        """Writes the denoising as an .html page or a .gif (see traces.py).

        Raises UserError without a trace, and for a path that cannot be written.
        """
        if self.trace is None:
            raise UserError("There is no trace to save: generate with return_trace=True.")
        traces.write(path, self.trace, self.lengths, self.tokenizer)


def load(
    workdir: str | os.PathLike, *, step: str | int | None = None, raw: bool = False, mesh: Mesh | None = None
) -> Run:
    """The run in a workdir, ready to generate from, as often as wanted: a `run.Run`.

    Args:
      workdir: of `train`; or a model that was released: one that comes with the package, by its name ("books"); a
        folder that `convert --to=hf` wrote, one of MDLM, BD3-LM, SEDD, Duo or RWKV-7, a file of such weights, or one on
        the hub, "hf:OWNER/NAME" (the extra `hub`).
      step: of the checkpoint; "best", or None for the newest.
      raw: the weights themselves, not their moving average.
      mesh: of `sharding.make_mesh`; None: all devices.

    Raises UserError for a missing or unreadable file.
    """
    return load_run(named(shipped.path_of(workdir)), mesh or sharding.make_mesh(), step=step, raw=raw)


def generate(
    run: Run | str | os.PathLike,
    prompts: str | Sequence[str] | None = None,
    *,
    infill: str | Sequence[str] | None = None,
    num: int = 1,
    length: int | None = None,
    max_new_tokens: int | None = None,
    blank: str = BLANK,
    sampler: str | None = None,
    block_size: int | None = None,
    frozen_cache: str | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    start: int = 0,
    batch_size: int = 16,
    stop_at_eos: bool = True,
    return_trace: bool = False,
    watch: Callable[[list[np.ndarray]], None] | None = None,
    **options: Any,
) -> Generation:
    """Texts that begin with the prompts, or fill in the templates, or begin with nothing.

    Sequence i of the result depends on (seed, start + i), its canvas and the model alone: not on the other prompts, nor
    on the batch size. (Up to rounding: where two tokens are all but equal, another shape may decide otherwise.)

    Args:
      run: what `load` returns, or a workdir, which is then loaded anew at each call. A run keeps what was compiled for
        it: another call with as many sequences, of about the same length, begins at once.
      prompts: one text or several, of any lengths; None: nothing is given.
      infill: one template or several, in place of prompts: each `blank` character is one token to fill in.
      num: sequences for each prompt or template; they follow each other in the result.
      length: tokens in each canvas, BOS and EOS counted; None: what `max_new_tokens` asks for, else the template's
        length, else that of training (config.data.length).
      max_new_tokens: tokens to generate behind each prompt, in place of `length`.
      sampler: a name in `samplers.SAMPLERS`; None: the one of the run's config.
      block_size: tokens at a time, from the exact state of those before them, for models of block diffusion; 0: all at
        once; None: the first of config.layouts.blocks.sizes. The sampler's options are then about one block.
      frozen_cache: "prefix" or "dual", Fast-dLLM's approximate caches for models of attention alone, in blocks of
        `block_size` (None: 32); see `samplers.FrozenCache`.
      guidance: towards what is given; see `samplers.Guided`.
      seed, start: see above.
      batch_size: sequences at a time. A last batch that is not full is filled up, not compiled anew.
      stop_at_eos: a text ends at the first EOS that is generated behind all that was given; False keeps the whole
        canvas. Tokenizers without an EOS never end a text.
      return_trace: also return the sequences after every step.
      watch: called before each network pass and at the end with the sequences of the batch, each int32 [its canvas]. It
        needs a run that was loaded on one device.
      options: of the sampler, such as num_steps or temperature, in place of those of the run's config.

    Raises UserError for what cannot be done, before any compute.
    """
    config.seed(seed)
    if not isinstance(run, Run):
        run = load(run)
    rows = canvases(
        run.config,
        run.tokenizer,
        prompts,
        infill=infill,
        num=num,
        length=length,
        max_new_tokens=max_new_tokens,
        blank=blank,
    )
    chosen = build_sampler(
        run.config,
        run.objective,
        name=sampler,
        block_size=block_size,
        frozen_cache=frozen_cache,
        stop_id=run.tokenizer.eos_id if stop_at_eos else None,
        guidance=guidance,
        **options,
    )
    filled = batches(
        run,
        chosen,
        rows,
        seed=seed,
        start=start,
        batch_size=batch_size,
        stop_at_eos=stop_at_eos,
        return_trace=return_trace,
        watch=watch,
    )
    return join(list(filled))


def stream(
    run: Run | str | os.PathLike,
    prompt: str | None = None,
    *,
    length: int | None = None,
    sampler: str | None = None,
    block_size: int | None = None,
    seed: int = 0,
    start: int = 0,
    stop_at_eos: bool = True,
    **options: Any,
) -> Iterator[str]:
    """One text, yielded as it is generated, block after block; without a length it has no end.

    For models of block diffusion. The tokens are those of `generate`. With recurrent mixers memory and the time of a
    block are the same however long the text already is; with attention the cache needs a length.

        for piece in diffrwkv.stream(run, "The ", length=100_000):
            print(piece, end="", flush=True)

    Args:
      run, prompt, sampler, block_size, seed, start, options: as for `generate`, for the sequence `start`.
      length: tokens, the prompt's counted; rounded up to whole blocks.
      stop_at_eos: an EOS that is generated ends the text.

    Yields:
      strings that together are the text, the prompt among it. No more is held back than the bytes of one unfinished
      character.

    Raises UserError for what cannot be done, before any compute.
    """
    config.seed(seed)
    run = run if isinstance(run, Run) else load(run)
    check_at_least_one(length=length)
    check_most(MOST_TOKENS, length=length)
    chosen = build_sampler(run.config, run.objective, name=sampler, block_size=block_size, **options)
    if chosen.face == "window":
        raise UserError("A stream has one block after another, this sampler several at once: use generate.")
    if not isinstance(chosen, samplers.BlockCached):
        raise UserError(
            "A stream needs a model of block diffusion and a block_size of at least 1: train one with "
            "experiments/NAME.py:birwkv@16, or use generate."
        )
    tokenizer, block = run.tokenizer, chosen.block
    bos = run.config.data.wrap
    given = canvas_row(tokenizer, length=None, default_length=0, max_new_tokens=1, prompt=prompt, bos=bos)[:-1]
    if length is not None and length <= len(given):
        raise UserError(f"The prompt has {len(given)} tokens, too many for length = {length}: raise length.")
    if length is None and _needs_room(run.model):
        raise UserError("The model has attention, whose cache has a size: say how long the text may become (length).")
    blocks = itertools.count() if length is None else range(-(-length // block))
    return _stream(run, chosen, given, blocks, seed, start, tokenizer.eos_id if stop_at_eos else None)


def _stream(run, sampler, given, blocks, seed, start, stop_id):
    block, tokenizer = sampler.block, run.tokenizer
    next_block = compiled_stream(run, sampler)
    room = block if isinstance(blocks, itertools.count) else len(blocks) * block
    # Where it lies after a block, or the second block would be compiled anew.
    state = jax.device_put(run.model.empty_state(1, room), sharding.replicated(run.mesh))
    keys = samplers.sequence_keys(seed, 1, start)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for n in blocks:
        here = given[n * block : (n + 1) * block]
        canvas = np.full((1, block), tokenizer.mask_id, np.int32)
        canvas[0, : len(here)] = here
        tokens, state = next_block(run.params, state, keys, np.int32(n), canvas)
        tokens = np.asarray(tokens)[0]
        _refuse_what_was_no_law(tokens)
        ends = np.flatnonzero(tokens[len(here) :] == stop_id) if stop_id is not None else np.zeros(0, np.intp)
        if len(ends):
            tokens = tokens[: len(here) + ends[0] + 1]
        if piece := decoder.decode(tokenizer.decode_bytes(tokens)):
            yield piece
        if len(ends):
            break
    if rest := decoder.decode(b"", final=True):
        yield rest


def compiled_stream(run: Run, sampler: samplers.BlockCached) -> Callable[..., Any]:
    """(params, state, keys [1], number, canvas [1, block]) -> (tokens [1, block], state), kept with the run."""

    def next_block(params, state, keys, number, canvas):
        network = face(run.model, run.objective, params, sampler)
        samples, state = sampler.next_block(run.objective.process, network, state, keys, number, canvas)
        return samples.tokens, state

    key = ("stream", sampler)
    if key not in run.generators:
        run.generators[key] = jax.jit(sharding.over(run.mesh, next_block), donate_argnums=1)
    return run.generators[key]


def _refuse_what_was_no_law(tokens: np.ndarray) -> None:
    """Raises UserError where a token could not be drawn."""
    if number := int((tokens == NO_TOKEN).sum()):
        raise UserError(
            f"The network's output was not finite where {number} of {tokens.size} tokens were to be drawn, so there is "
            "no text: its weights or its states overflow. Try a shorter text, config.model.dtype = 'float32' for "
            "'float16', an earlier --step; with a_scale above 1 states may grow with the length."
        )


def _needs_room(model: denoiser.Denoiser) -> bool:
    """Whether the state of a text grows with it."""
    shapes = [jax.tree.map(jnp.shape, jax.eval_shape(lambda n=n: model.empty_state(1, n))) for n in (1, 2)]
    return shapes[0] != shapes[1]


# What a terminal obeys rather than shows: C0 but for tab and newline, DEL, C1; and what reorders the text around it.
CONTROLS = [*range(0x00, 0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in CONTROLS}


def printable(text: str) -> str:
    """Generated text for a terminal: control characters and bidirectional overrides are escaped, as "\\x1b"."""
    return text.translate(ESCAPES)


# --- The sampler ------------------------------------------------------------------------------------


def build_sampler(
    cfg: Any,
    objective: Objective,
    /,
    *,
    name: str | None = None,
    block_size: int | None = None,
    frozen_cache: str | None = None,
    stop_id: int | None = None,
    guidance: float = 0.0,
    **changes: Any,
) -> samplers.Sampler:
    """The sampler `config.sampler.name`, or `name`, with the options of `config.samplers` and these changes.

    A model of block diffusion is sampled block after block (`samplers.BlockCached`), in blocks of `block_size` or the
    first of config.layouts.blocks.sizes, and a sequence ends with the block that generates `stop_id`.

    Raises UserError for what the sampler refuses, for one that does not fit the objective, for guidance of a model that
    goes from left to right, and for blocks of one that was not trained with them.
    """
    layout, process = objective.layout, objective.process
    in_blocks = isinstance(layout, Blocks)
    if frozen_cache is not None:
        if in_blocks or objective.causal:
            raise UserError("frozen_cache is for diffusion of whole sequences: this model has an exact state.")
        if not attention_alone(cfg):
            raise UserError(f"frozen_cache needs attention in every layer, not {cfg.model.pattern!r}.")
        if cfg.model.channel_mixer != "mlp":
            raise UserError(f"frozen_cache needs channel_mixer = 'mlp', not {cfg.model.channel_mixer!r}.")
    elif block_size is not None and not in_blocks:
        raise UserError(
            f"block_size needs a model of block diffusion, not of config.diffusion.layout = {cfg.diffusion.layout!r}: "
            "leave it out, or train one (experiments/NAME.py:birwkv@16)."
        )
    if block_size is not None and (not isinstance(block_size, numbers.Integral) or block_size < 0):
        raise UserError(f"block_size must be an integer of at least 0 (0: the whole canvas), got {block_size!r}.")
    block = (layout.sizes[0] if block_size is None else block_size) if isinstance(layout, Blocks) else 0
    asked = f"config.samplers.{cfg.sampler.name}" if name is None else "--sampler"
    name = cfg.sampler.name if name is None else name
    fitting = sorted(name for name, cls in samplers.SAMPLERS.items() if fits(cls, process, block))
    if isinstance(name, str) and name in samplers.SAMPLERS and name not in fitting:
        cut = f"blocks of {block}" if block else "one part"
        raise UserError(
            f"The sampler {name!r} (--sampler or config.sampler.name) does not sample from "
            f"config.diffusion.name = {cfg.diffusion.name!r} in {cut}: choose {' or '.join(map(repr, fitting))}."
        )
    if guidance and objective.causal:
        raise UserError("guidance needs a diffusion model: this one goes from left to right.")
    try:
        sampler = samplers.from_config(name, **{**cfg.samplers.to_dict().get(name, {}), **changes})
        hash(sampler)  # what is compiled is kept by it: an option that is a list is told here
        if sampler.face == "window":
            if guidance:
                raise ValueError(f"{name!r} has no guidance: leave it out, or take another sampler.")
            if own := {"block", "stop_id"} & set(changes):
                raise ValueError(f"{' and '.join(sorted(own))} of {name!r} follow from block_size and stop_at_eos.")
            windowed: Any = sampler  # all of this face have both fields
            return dataclasses.replace(windowed, block=block, stop_id=stop_id)
        sampler = samplers.Guided(sampler, guidance) if guidance else sampler
        if frozen_cache is not None:
            sampler = samplers.FrozenCache(sampler, 32 if block_size is None else block_size, frozen_cache)
        elif block:
            sampler = samplers.BlockCached(sampler, block, stop_id)
        if not sampler.fits(process):
            raise ValueError(f"guidance and frozen_cache are for masked diffusion, not {cfg.diffusion.name!r}.")
        return sampler
    except (ValueError, TypeError) as e:
        raise UserError(f"{asked}: {e}") from e


def fits(cls: type[samplers.Sampler], process: Process, block: int = 0) -> bool:
    """Whether a sampler of this class can fill a whole canvas, or one block after another where `block` is not 0."""
    return isinstance(process, cls.needs) and (cls.face != "window" or block > 0)


def attention_alone(cfg: Any) -> bool:
    """Whether every layer of the model is one of attention: `frozen_cache` needs that."""
    return set(denoiser.parse_pattern(cfg.model.pattern, cfg.model.num_layers)[0]) == {"attention"}


def same_note(sampler: Any, num: int) -> str | None:
    """What to say when several samples of a canvas are one and the same, for nothing is drawn."""
    sampler = getattr(sampler, "sampler", sampler)
    orders = isinstance(sampler, samplers.Ancestral | samplers.FirstHitting | samplers.ReMDM)  # drawn at random
    if num == 1 or getattr(sampler, "temperature", 1.0) != 0 or orders or getattr(sampler, "score", None) == "random":
        return None
    return f"temperature = 0 draws nothing: the {num} samples of each prompt are the same, whatever the seed."


def block_note(sampler: Any, row: np.ndarray, mask_id: int) -> str | None:
    """What to say when the sampler's blocks do not divide what is to be generated, int32 [L]."""
    if sampler.face in ("block", "frozen", "window"):
        last = len(row) % sampler.block
        note = f"blocks of {sampler.block} do not divide the {len(row)} tokens: the last block is padded, from {last}."
        return note if last else None
    sampler = sampler.sampler if isinstance(sampler, samplers.Guided) else sampler
    block, blanks = getattr(sampler, "block", None), np.flatnonzero(row == mask_id)
    if isinstance(sampler, samplers.ICE):
        blanks = blanks[: -sampler.answer_length]  # its blocks hold the thinking only
    if not block or not len(blanks):
        return None
    positions = int(blanks[-1] - blanks[0]) + 1
    if not (last := positions % block):
        return None
    return f"block = {block} does not divide the {positions} positions to fill: the last block is padded, from {last}."


# --- Filling in -------------------------------------------------------------------------------------


def batches(
    run: Run,
    sampler: samplers.Sampler,
    rows: Sequence[np.ndarray],
    *,
    seed: int = 0,
    start: int = 0,
    batch_size: int = 16,
    stop_at_eos: bool = True,
    return_trace: bool = False,
    watch: Callable[[list[np.ndarray]], None] | None = None,
) -> Iterator[Generation]:
    """Fills canvases of any lengths, int32 [length] each, and yields the batches as they are done.

    All batches have one shape: they are padded on the right, and the last one with sequences that need no pass. The
    other arguments and the errors are those of `generate`. A canvas without masks comes back after 0 passes.
    """
    check_at_least_one(batch_size=batch_size)
    if not isinstance(start, numbers.Integral) or start < 0:
        raise UserError(f"start must be an integer of at least 0, got {start!r}.")
    config.seed(seed)
    config.seed(start + len(rows), "start, with the number of texts,")
    if watch is not None and run.mesh.size > 1:
        raise UserError("watch needs one device: load the run on sharding.make_mesh(devices=jax.devices()[:1]).")
    tokenizer = run.tokenizer
    if isinstance(sampler, samplers.Guided) and any((row == tokenizer.mask_id).all() for row in rows):
        raise UserError("Guidance is towards what is given, and nothing is: give a prompt or a template.")
    longest = max(map(len, rows))
    width = -(-longest // LENGTH_STEP) * LENGTH_STEP
    padded = min(map(len, rows)) < width
    batch_size = min(len(rows), batch_size)
    in_parts = sampler.face in ("block", "step", "window")  # few logits at a time
    if batch_size * width * (1 if in_parts else tokenizer.vocab_size) > MOST_LOGITS:
        what = "tokens" if in_parts else f"logits, {tokenizer.vocab_size} for each token,"
        raise UserError(
            f"A batch of {batch_size} texts of {width} tokens is too large: at most {MOST_LOGITS:,} {what} "
            "are taken at a time. Lower batch_size or length."
        )
    generator = compiled(run, sampler)
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        canvas = np.full((batch_size, width), tokenizer.pad_id, np.int32)
        valid = np.ones(canvas.shape, bool)
        for i, row in enumerate(part):
            canvas[i, : len(row)] = row
            valid[i, len(row) :] = False

        def show(z, part=part):
            watch([z[i, : len(row)] for i, row in enumerate(part)])

        samples = generator(
            run.params,
            canvas,
            valid if padded else None,
            seed=seed,
            start=start + first,
            return_trace=return_trace,
            watch=show if watch else None,
        )
        tokens, number = samples.tokens[: len(part), :longest], len(part)
        lengths = np.array([len(row) for row in part], np.int32)
        if stop_at_eos and tokenizer.eos_id is not None:
            lengths = np.array([text_length(z, row, tokenizer) for z, row in zip(tokens, part, strict=True)], np.int32)
        tokens = np.where(np.arange(longest) < lengths[:, None], tokens, np.int32(tokenizer.pad_id))
        yield Generation(
            texts=[tokenizer.decode(z[:n]) for z, n in zip(tokens, lengths, strict=True)],
            tokens=tokens,
            lengths=lengths,
            passes=samples.passes[:number],
            trace=samples.trace[:, :number, :longest] if return_trace else None,
            tokenizer=tokenizer,
        )


def filled(
    run: Run,
    sampler: samplers.Sampler,
    rows: Sequence[np.ndarray],
    *,
    seed: int = 0,
    batch_size: int = 16,
    stop_at_eos: bool = True,
    progress: bool = False,
) -> list[np.ndarray]:
    """Each canvas filled: int32 [its length, or up to its EOS], in the order of the rows.

    For canvases of many lengths, in few compilations: those of about one length are filled together. The sequence of a
    row has the seed and the place in that order for noise. The other arguments and the errors are those of `generate`.
    """
    results: list[np.ndarray] = [np.zeros(0, np.int32)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    bar = bars.bar(len(rows), "fill", show=progress, compiles=True)
    done = 0
    for _, group in itertools.groupby(order, key=lambda i: -(-len(rows[i]) // LENGTH_STEP)):
        numbers = list(group)
        given = np.where(rows[numbers[0]] == run.tokenizer.mask_id, run.tokenizer.pad_id, rows[numbers[0]])
        whole = [rows[i] for i in numbers] + [given] * (-len(numbers) % batch_size)  # without blanks: no pass
        options: dict[str, Any] = {"seed": seed, "start": done, "batch_size": batch_size, "stop_at_eos": stop_at_eos}
        parts = batches(run, sampler, whole, **options)
        texts = (tokens[:length] for part in parts for tokens, length in zip(part.tokens, part.lengths, strict=True))
        for i, text in zip(numbers, texts, strict=False):  # what fills the last batch stands behind them
            results[i] = text
            bar.update()
        done += len(numbers)
    bar.close()
    return results


def join(parts: Sequence[Generation]) -> Generation:
    """One Generation of all batches of a call."""
    return Generation(
        texts=[text for part in parts for text in part.texts],
        tokens=np.concatenate([part.tokens for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        passes=np.concatenate([part.passes for part in parts]),
        trace=None if parts[0].trace is None else np.concatenate([part.trace for part in parts], axis=1),
        tokenizer=parts[0].tokenizer,
    )


def compiled(run: Run, sampler: samplers.Sampler) -> "Generator":
    """The run's generator for this sampler: the same one at every call, and what it has compiled with it."""
    if sampler not in run.generators:
        run.generators[sampler] = Generator(run.model, run.objective, sampler, run.tokenizer, run.mesh)
    return run.generators[sampler]


@dataclasses.dataclass(eq=False)
class Generator:
    """(weights, canvas) -> samples: one compiled loop for each shape, the batch split over the devices of the mesh."""

    model: denoiser.Denoiser
    objective: Objective
    sampler: samplers.Sampler
    tokenizer: Tokenizer
    mesh: Mesh

    def __post_init__(self):
        def generate(params, state, keys, canvas, valid, return_trace, watched):
            objective = self.objective if state is None else self.objective.settled(state)
            network = face(self.model, objective, params, self.sampler, valid)
            show = (lambda z: jax.debug.callback(self._show, z, ordered=True)) if watched else None
            options = {"valid": valid, "return_trace": return_trace, "on_step": show}
            return self.sampler(objective.process, network, keys, canvas, **options)

        self._watch: Callable[[np.ndarray], None] | None = None  # of the call that runs
        self._generate = jax.jit(
            sharding.over(self.mesh, generate),
            static_argnames=("return_trace", "watched"),
            out_shardings=sharding.replicated(self.mesh),
        )

    def __call__(
        self,
        params: Any,
        canvas: np.ndarray,
        valid: np.ndarray | None = None,
        *,
        seed: int,
        start: int = 0,
        return_trace: bool = False,
        watch: Callable[[np.ndarray], None] | None = None,
        state: Any = None,
    ) -> samplers.Samples:
        """`samplers.Samples` of NumPy arrays.

        Args:
          canvas: int32 [B, L], the mask id where to generate, at padding the pad id.
          valid: bool [B, L], False at padding, which stands on the right; None where there is none.
          seed, start: row i has the key of (seed, start + i), so it does not depend on the batch.
          return_trace: also return the sequences after every step.
          watch: called with int32 [B, L] before each network pass, in order, and with the result; for a mesh of one
            device.
          state: of an objective that is not settled yet, as while it is trained; else None.
        """
        number = len(canvas)
        filled = -number % self.mesh.size  # rows without a mask cost no pass
        canvas = np.pad(canvas, ((0, filled), (0, 0)), constant_values=self.tokenizer.pad_id)
        keys = samplers.sequence_keys(seed, len(canvas), start)
        rows, real = sharding.split_rows(canvas, self.mesh), None
        if valid is not None:
            real = sharding.split_rows(np.pad(valid, ((0, filled), (0, 0)), constant_values=True), self.mesh)
        self._watch = watch
        samples = self._generate(params, state, keys, rows, real, return_trace=return_trace, watched=watch is not None)
        tokens, passes, trace = jax.device_get(samples)
        _refuse_what_was_no_law(tokens)
        if watch:
            jax.effects_barrier()
            watch(tokens)
        return samplers.Samples(tokens[:number], passes[:number], trace[:, :number] if return_trace else None)

    def _show(self, z: Any) -> None:
        if self._watch is not None:
            self._watch(np.asarray(z))
