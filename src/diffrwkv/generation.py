"""Generates text from a trained model: what the program `sample` and a notebook share.

    run = diffrwkv.load("runs/quickstart")
    generation = diffrwkv.generate(run, ["The ", "An "], max_new_tokens=64, temperature=0.8)
    print(generation.texts)

`generate` is four steps, each of use alone: `canvases` lays out what is given and what is blank, `build_sampler` makes
the sampler, `batches` fills the canvases, and `Generator` is where a compiled function comes from (model, sampler).
"""

import dataclasses
import numbers
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffrwkv import evaluate, sharding, traces
from diffrwkv.config import UserError
from diffrwkv.data import Tokenizer
from diffrwkv.diffusion import objectives, samplers
from diffrwkv.evaluate import Run

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
    """The run in a workdir, ready to generate from, as often as wanted: an `evaluate.Run`.

    Args:
      step: of the checkpoint; "best", or None for the newest.
      raw: the weights themselves, not their moving average.
      mesh: of `sharding.make_mesh`; None: all devices.

    Raises UserError for a missing or unreadable file.
    """
    return evaluate.load_run(Path(workdir), mesh or sharding.make_mesh(), step=step, raw=raw)


def generate(
    run: Run | str | os.PathLike,
    prompts: str | Sequence[str] | None = None,
    *,
    infill: str | Sequence[str] | None = None,
    num: int = 1,
    length: int | None = None,
    max_new_tokens: int | None = None,
    blank: str = "_",
    sampler: str | None = None,
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
      sampler: a name in `samplers.SAMPLERS`; None: the one of the run's config, with its options.
      guidance: towards what is given; see `samplers.Guided`.
      seed, start: see above.
      batch_size: sequences at a time. A last batch that is not full is filled up, not compiled anew.
      stop_at_eos: a text ends at the first EOS that is generated behind all that was given; False keeps the whole
        canvas. Tokenizers without an EOS never end a text.
      return_trace: also return the sequences after every step.
      watch: called before each network pass and at the end with the sequences of the batch, each int32 [its canvas]. It
        needs a run that was loaded on one device.
      options: of the sampler, such as num_steps or temperature.

    Raises UserError for what cannot be done, before any compute.
    """
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
    chosen = build_sampler(run.config, run.objective, name=sampler, guidance=guidance, **options)
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


# --- What is given, what is blank -------------------------------------------------------------------


def canvases(
    cfg: Any,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str] | None = None,
    *,
    infill: str | Sequence[str] | None = None,
    num: int = 1,
    length: int | None = None,
    max_new_tokens: int | None = None,
    blank: str = "_",
) -> list[np.ndarray]:
    """The canvases that `generate` fills for a run of the config `cfg`, each int32 [its length]; arguments as there.

    Raises UserError.
    """
    check_at_least_one(num=num, length=length, max_new_tokens=max_new_tokens)
    if prompts is not None and infill is not None:
        raise UserError("Prompts and infill exclude each other: put the prompt into the template.")
    if max_new_tokens is not None and (length is not None or infill is not None):
        raise UserError("max_new_tokens excludes length and infill: a canvas has one length.")
    if infill is not None and objectives.OBJECTIVES[cfg.diffusion.name].causal:
        raise UserError("infill needs a diffusion model: this one goes from left to right; use a prompt.")
    what, given = ("prompt", prompts) if infill is None else ("infill", infill)
    texts = [given] if given is None or isinstance(given, str) else list(given)
    if not texts:
        raise UserError(f"There is no {what} in the list: give one, or None to generate from nothing.")
    rows = []
    for i, text in enumerate(texts):
        row = canvas_row(
            tokenizer,
            length=length,
            default_length=cfg.data.length,
            max_new_tokens=max_new_tokens,
            **{what: text},
            blank=blank,
            bos=cfg.data.wrap,
            eos=cfg.data.wrap and cfg.data.packing == "concat",
            number=None if len(texts) == 1 else i + 1,
        )
        rows += [row] * num
    return rows


def canvas_row(
    tokenizer: Tokenizer,
    *,
    length: int | None,
    default_length: int,
    max_new_tokens: int | None = None,
    prompt: str | None = None,
    infill: str | None = None,
    blank: str = "_",
    bos: bool = False,
    eos: bool = False,
    number: int | None = None,
) -> np.ndarray:
    """What is given and what is to be generated, int32 [length]: tokens, and the mask id at blanks.

    Args:
      length: tokens in the row, BOS and EOS counted; None: as many as `max_new_tokens` needs, or the template's length,
        or else `default_length`.
      max_new_tokens: blanks behind the prompt.
      prompt: text at the beginning.
      infill: template; each `blank` character is one blank token.
      bos, eos: the first token is BOS, the last EOS, as in training with wrapping.
      number: of several prompts or templates, for the errors.

    Raises UserError for an empty or too long prompt or template, one without blanks, characters that the tokenizer does
    not have, or no room to generate.
    """
    given, what = (prompt, "prompt") if infill is None else (infill, "infill")
    what = what if number is None else f"{what} {number}"
    body = np.zeros(0, np.int32)
    if given is not None:
        if not isinstance(given, str):
            raise UserError(f"{what} must be a string, got {type(given).__name__}.")
        if not given:
            raise UserError(f"{what} is empty: give some text, or leave it out.")
        if len(blank) != 1:
            raise UserError(f"blank must be one character, got {blank!r}.")
        if infill is not None and blank not in infill:
            raise UserError(f"{what} has no blanks: write {blank!r} for each token to fill in.")
        parts = [given] if infill is None else re.split(f"({re.escape(blank)}+)", infill)
        try:
            body = np.concatenate(
                [
                    np.full(len(part), tokenizer.mask_id, np.int32)
                    if infill is not None and part.startswith(blank)
                    else tokenizer.encode(part)
                    for part in parts
                    if part
                ]
            )
        except ValueError as e:
            raise UserError(f"{what}: {e}.") from None
    extra = int(bos) + int(eos)
    if max_new_tokens is not None:
        length = len(body) + max_new_tokens + extra
    elif length is None:
        length = len(body) + extra if infill is not None else default_length
    room = length - extra - len(body)
    if room < 0 or (infill is None and room == 0):
        if given is None:
            raise UserError(f"length = {length} leaves nothing to generate: it needs at least {extra + 1}.")
        raise UserError(
            f"{what} has {len(body)} tokens, too many for length = {length}"
            f"{f' with {extra} for begin and end' if extra else ''}: shorten it or raise length."
        )
    begin = [np.int32(tokenizer.bos_id)] if bos else []
    end = [np.int32(tokenizer.eos_id)] if eos else []
    rest = np.full(room, tokenizer.mask_id, np.int32)
    return np.concatenate([begin, body, rest, end]).astype(np.int32)


def check_at_least_one(**counts: Any) -> None:
    """Raises UserError for a count that is neither None nor an integer of at least 1."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, numbers.Integral) or count < 1):
            raise UserError(f"{name} must be at least 1, and an integer, got {count!r}.")


# --- The sampler ------------------------------------------------------------------------------------


def build_sampler(
    cfg: Any, objective: Any, /, *, name: str | None = None, guidance: float = 0.0, **changes: Any
) -> Callable[..., samplers.Samples]:
    """The sampler of `config.sampler`, or `name` with its defaults, with these keyword arguments changed.

    Raises UserError for what the sampler refuses, for one that does not fit the objective, and for guidance of a model
    that goes from left to right.
    """
    options = cfg.sampler.to_dict()
    if name not in (None, options["name"]):
        options = {"name": name}
    options |= changes
    fitting = sorted(name for name, s in samplers.SAMPLERS.items() if s.causal == objective.causal)
    if options["name"] in samplers.SAMPLERS and options["name"] not in fitting:
        raise UserError(
            f"The sampler {options['name']!r} (--sampler or config.sampler.name) does not sample from "
            f"config.diffusion.name = {cfg.diffusion.name!r}: choose {' or '.join(map(repr, fitting))}."
        )
    if guidance and objective.causal:
        raise UserError("guidance needs a diffusion model: this one goes from left to right.")
    try:
        sampler = samplers.from_config(schedule=getattr(objective, "schedule", None), **options)
        return samplers.Guided(sampler, guidance) if guidance else sampler
    except (ValueError, TypeError) as e:
        raise UserError(f"{'config.sampler' if name is None else '--sampler'}: {e}") from e


def block_note(sampler: Any, row: np.ndarray, mask_id: int) -> str | None:
    """What to say when the sampler's blocks do not divide what is to be generated, int32 [L]."""
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
    sampler: Callable[..., samplers.Samples],
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
    if watch is not None and run.mesh.size > 1:
        raise UserError("watch needs one device: load the run on sharding.make_mesh(devices=jax.devices()[:1]).")
    generator, tokenizer = compiled(run, sampler), run.tokenizer
    longest = max(map(len, rows))
    width = -(-longest // LENGTH_STEP) * LENGTH_STEP
    padded = min(map(len, rows)) < width
    batch_size = min(len(rows), batch_size)
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


def text_length(tokens: np.ndarray, canvas: np.ndarray, tokenizer: Tokenizer) -> int:
    """Tokens of a filled canvas up to the first EOS that was generated behind all given text, that EOS counted.

    Args:
      tokens: int32, at least as long as the canvas.
      canvas: int32 [length].
    """
    blank = canvas == tokenizer.mask_id
    given = np.flatnonzero(~blank & (canvas != tokenizer.eos_id))
    ends = blank & (tokens[: len(canvas)] == tokenizer.eos_id)
    ends[: given[-1] + 1 if len(given) else 0] = False
    return int(np.argmax(ends)) + 1 if ends.any() else len(canvas)


def compiled(run: Run, sampler: Callable[..., samplers.Samples]) -> "Generator":
    """The run's generator for this sampler: the same one at every call, and what it has compiled with it."""
    if sampler not in run.generators:
        run.generators[sampler] = Generator(run.model, sampler, run.tokenizer, run.mesh)
    return run.generators[sampler]


@dataclasses.dataclass(eq=False)
class Generator:
    """(weights, canvas) -> samples: one compiled loop for each shape, the batch split over the devices of the mesh."""

    model: Any
    sampler: Any
    tokenizer: Tokenizer
    mesh: Mesh

    def __post_init__(self):
        mask_id = self.tokenizer.mask_id

        def diffuse(params, keys, canvas, valid, show, return_trace):
            def denoise(z, t):
                show(jnp.where(canvas == mask_id, z, canvas))  # guidance hides what is given, but not from us
                return self.model.apply({"params": params}, z, t, valid=valid)

            return self.sampler(denoise, keys, canvas, mask_id=mask_id, valid=valid, return_trace=return_trace)

        def go_on(params, keys, canvas, valid, show, return_trace):
            del valid  # padding is no blank, and nothing before it sees it

            def step(token, state):
                return self.model.apply({"params": params}, token, state=state, return_state=True)

            state = self.model.empty_state(*canvas.shape)
            return self.sampler(step, state, keys, canvas, mask_id=mask_id, return_trace=return_trace, on_step=show)

        def generate(params, keys, canvas, valid, return_trace, watched):
            def show(z):
                if watched:
                    jax.debug.callback(self._show, z, ordered=True)

            fill = go_on if self.sampler.causal else diffuse
            return fill(params, keys, canvas, valid, show, return_trace)

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
    ) -> samplers.Samples:
        """`samplers.Samples` of NumPy arrays.

        Args:
          canvas: int32 [B, L], the mask id where to generate, at padding the pad id.
          valid: bool [B, L], False at padding, which stands on the right; None where there is none.
          seed, start: row i has the key of (seed, start + i), so it does not depend on the batch.
          return_trace: also return the sequences after every step.
          watch: called with int32 [B, L] before each network pass, in order, and with the result; for a mesh of one
            device.
        """
        number = len(canvas)
        filled = -number % self.mesh.size  # rows without a mask cost no pass
        canvas = np.pad(canvas, ((0, filled), (0, 0)), constant_values=self.tokenizer.pad_id)
        keys = samplers.sequence_keys(seed, len(canvas), start)
        canvas = self._on_devices(canvas)
        if valid is not None:
            valid = self._on_devices(np.pad(valid, ((0, filled), (0, 0)), constant_values=True))
        self._watch = watch
        samples = self._generate(params, keys, canvas, valid, return_trace=return_trace, watched=watch is not None)
        tokens, passes, trace = jax.device_get(samples)
        if watch:
            jax.effects_barrier()
            watch(tokens)
        return samplers.Samples(tokens[:number], passes[:number], trace[:, :number] if return_trace else None)

    def _on_devices(self, x: np.ndarray) -> jax.Array:
        """The rows of x, split over the mesh."""
        return jax.make_array_from_callback(x.shape, sharding.batch_sharding(self.mesh), lambda index: x[index])

    def _show(self, z: Any) -> None:
        self._watch(np.asarray(z))
