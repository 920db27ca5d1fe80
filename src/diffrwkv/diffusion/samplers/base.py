"""What every sampler is: how it is called, what it needs, and how it is watched."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from diffrwkv.array_types import Array, Keys, Tokens, Valid
from diffrwkv.diffusion.deferred import Network
from diffrwkv.diffusion.processes import Masked, Process
from diffrwkv.diffusion.samplers.keys import check_keys


class Samples(NamedTuple):
    """What a sampler returns.

    Attributes:
      tokens: int32 [B, L].
      passes: int32 [B], network passes that each sequence needed, whatever batch it rode in.
      trace: int32 [N + 1, B, L] or None: the canvas, then the sequence after each step. N is the sampler's number of
        steps; where it has none on a grid, L, and the entries after a sequence's last step repeat. The last entry
        equals `tokens`.
    """

    tokens: Tokens
    passes: Array
    trace: Array | None = None


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """A sampler is a frozen dataclass of its options: hashable, without arrays, so it may be a static argument.

        sampler = Ancestral(num_steps=64)
        process = Masked(Vocabulary(size, mask_id))

        @jax.jit
        def generate(params, keys, canvas):
            return sampler(process, lambda z, t: model.apply(params, z, t), keys, canvas)

        canvas = jnp.full((4, 256), mask_id).at[:, :len(prompt)].set(prompt)
        samples = generate(params, sequence_keys(seed, 4), canvas)

    Attributes:
      face: which face of the network it calls, a name in `diffrwkv.networks.FACES`. "denoise" is a function (z, t) ->
        output; the others are named tuples, explained where the sampler is.
      needs: the kind of process that it samples from, a subclass of `Process`; another is refused.
    """

    face: ClassVar[str] = "denoise"
    needs: ClassVar[type] = Masked

    def fits(self, process: Process) -> bool:
        """Whether it samples from this process."""
        return isinstance(process, self.needs)

    def refusal(self, process: Process) -> str:
        """The sentence that refuses a process that does not fit."""
        return f"{type(self).__name__} samples from {self.needs.__name__} processes, not {type(process).__name__}."

    def __call__(
        self,
        process: Process,
        network: Any,
        keys: Keys,
        canvas: Tokens,
        *,
        valid: Valid | None = None,
        return_trace: bool = False,
        on_step: Callable[[Array], None] | None = None,
    ) -> Samples:
        """Fills in the blanks of `canvas`. Put it inside `jax.jit`, as above, or it compiles anew each time.

        Args:
          process: what noise is, and what the network's output means.
          network: the network's face; of "denoise" (z int32 [B, L], t float32 [B]) -> output float [B, L, V]. t is the
            process's time; what a network is told in its place (`Process.condition`) is the face's business.
          keys: key array [B], one per sequence, from `sequence_keys`. A sequence's sample depends on its key, its
            canvas and the outputs for it alone: not on the batch, and not on padding to its right.
          canvas: int32 [B, L]; the mask id where to generate, a token where one is given, at any positions. Given
            tokens never change. A canvas without blanks comes back after 0 passes.
          valid: bool [B, L] or None. Where False nothing is generated. The network must know of it by itself.
          return_trace: also return the sequence after every step.
          on_step: called with the sequence, int32 [B, L], before each step's network pass.

        Returns:
          `Samples`. Where the network's output is not finite a token is `noise.NO_TOKEN`, -1.

        Raises:
          TypeError or ValueError for arguments that it cannot take, and for a process that it does not sample from.
        """
        if not self.fits(process):
            raise TypeError(self.refusal(process))
        check_call(keys, canvas, valid)
        return self._fill(process, network, keys, canvas, valid, return_trace, on_step)

    @abc.abstractmethod
    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step) -> Samples:
        """The call, its arguments checked. A sampler of the face "denoise" begins with `watched(network, on_step)`."""


@dataclasses.dataclass(frozen=True)
class Wrapper(Sampler):
    """A sampler that runs another one, of the face "denoise"; it samples from what that one does.

    Attributes:
      sampler: the other one.
    """

    sampler: Sampler

    def __post_init__(self):
        if getattr(self.sampler, "face", None) != "denoise":
            raise ValueError(
                f"{type(self).__name__} runs a sampler of the face 'denoise', not {type(self.sampler).__name__}."
            )

    def fits(self, process):
        return super().fits(process) and self.sampler.fits(process)

    def refusal(self, process):
        return super().refusal(process) if self.sampler.fits(process) else self.sampler.refusal(process)


def watched(
    denoise: Callable[[Tokens, Array], Any], on_step: Callable[[Array], None] | None
) -> Callable[[Tokens, Array], Any]:
    """The face "denoise", which shows z before each pass."""
    if on_step is None:
        return denoise
    if isinstance(denoise, Network):
        return Network(watched(denoise.deferred, on_step))

    def shown(z, t):
        on_step(z)
        return denoise(z, t)

    return shown


def check_call(keys: Keys, canvas: Tokens, valid: Valid | None) -> None:
    """Raises ValueError or TypeError for arguments that no sampler can take."""
    if canvas.ndim != 2 or 0 in canvas.shape:
        raise ValueError(f"The canvas must have shape [B, L] with B, L >= 1, got {canvas.shape}: nothing to generate.")
    if canvas.dtype != jnp.int32:
        raise TypeError(f"The canvas must be int32, got {canvas.dtype}.")
    if valid is not None and (valid.shape != canvas.shape or valid.dtype != jnp.bool_):
        raise ValueError(f"valid must be bool {canvas.shape}, got {valid.dtype} {valid.shape}.")
    check_keys(keys, canvas.shape[0])


__all__ = ["Sampler", "Samples", "Wrapper", "check_call", "watched"]
