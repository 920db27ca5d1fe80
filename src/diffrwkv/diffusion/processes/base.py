"""What a process is: the law of the noise, and what a network's output says of the clean text under it."""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffrwkv.array_types import (
    Array,
    DType,
    Keys,
    Law,
    Logits,
    Noised,
    OneKey,
    PerToken,
    Positions,
    TokenKeys,
    Tokens,
    TokenTimes,
)
from diffrwkv.checks import TOKEN, VOCABULARY, check_choice
from diffrwkv.diffusion.deferred import Deferred
from diffrwkv.diffusion.noise import draw_law
from diffrwkv.diffusion.schedules import LogLinear, Schedule

MOST_SIGMA = 69.0  # what a network is told where nothing is left of the text: e^-69 is nothing
LEAST = 2.0**-100  # of a probability whose log is taken; a schedule may say 0 at its ends
# of a rate, infinite or unknown where alpha_t is 0 or 1; elsewhere t and 1 - t are more than its inverse
MOST_RATE = 2.0**24
CLOCKS = ("t", "sigma")
NEVER = 2**32 - 1  # folded into a sequence's key for the noise at t = 1: no position and no step has this number


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The token ids of a model.

    Attributes:
      size: V, how many ids there are, the mask's among them; as many logits has a network.
      mask_id: marks the blanks of a canvas. It is never generated, and no clean text has it.
    """

    size: int
    mask_id: int

    def __post_init__(self):
        VOCABULARY.check("a vocabulary's size", self.size)
        TOKEN.check("mask_id", self.mask_id)
        if self.mask_id >= self.size:
            raise ValueError(f"mask_id must be below the vocabulary's size, {self.size}, got {self.mask_id}.")

    @property
    def real(self) -> int:
        """N, how many tokens a text can have: all but the mask."""
        return self.size - 1

    def tokens(self) -> Array:
        """int32 [V], every id."""
        return jnp.arange(self.size, dtype=jnp.int32)

    def is_mask(self) -> Array:
        """bool [V], True at the mask."""
        return self.tokens() == self.mask_id

    def one_hot(self, x: Array, dtype: DType = jnp.float32) -> Array:
        """[..., V] of tokens [...]."""
        return jax.nn.one_hot(x, self.size, dtype=dtype)

    def without_mask(self, logits: Array) -> Array:
        """The logits [..., V] in float32, -inf at the mask."""
        return jnp.where(self.is_mask(), -jnp.inf, logits.astype(jnp.float32))

    def uniform(self, key: OneKey, shape: tuple[int, ...]) -> Array:
        """Tokens of the shape, each real one as likely as another, int32."""
        drawn = jax.random.randint(key, shape, 0, self.real, jnp.int32)
        return drawn + (drawn >= self.mask_id)

    def check_output(self, output: Array | Deferred, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless a network's output is [*shape, V]."""
        if output.shape != (*shape, self.size):
            raise ValueError(
                f"The denoiser must return {(*shape, self.size)}, one number for each id of the vocabulary, got "
                f"{output.shape}."
            )


class Process(abc.ABC):
    """What noise is, and what a network's output means. z is int32 [B, L], or float [B, L, V] where the noise is.

    Subclasses are frozen dataclasses without arrays, so that one can be a static argument. Times (t, and s < t) are
    float32 that broadcast to [B, L]: [B, 1], or [B, L] for one of each token.

    Attributes:
      vocabulary: of the tokens.
      needs_time: the network must be conditioned on the time.
      causal: the network must see no later position.
      bound: the sum of `nats` bounds -log p(x); else it is a loss to train by and no more.
      apart: `nats` of a position asks for that position's output, x, z and t alone, and is 0 where nothing is `noised`.
        Then the network's output can be made where it is asked for (`deferred.Deferred`), of some positions at a time.
        It is said of one `nats` and one `noised`: a subclass that has another one is not `apart` until it says so too.
    """

    vocabulary: Vocabulary
    needs_time: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    bound: ClassVar[bool] = True
    apart: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        said, *about = (next(c for c in cls.__mro__ if name in vars(c)) for name in ("apart", "nats", "noised"))
        if any(c not in said.__mro__ for c in about):  # what was said was not of these
            cls.apart = False

    def condition(self, t: Array) -> Array:
        """What the network is told of the time t, of t's shape."""
        return t

    @abc.abstractmethod
    def noise(self, key: OneKey, x: Tokens, t: TokenTimes, free: Positions | None = None) -> Noised:
        """z_t ~ q(. | x).

        Args:
          key: one key of `jax.random.key`.
          x: int32 [B, L], clean tokens.
          t: times.
          free: bool [B, L] or None; False where a token must stay (padding, a prompt).
        """

    def noised(self, z: Noised) -> Positions:
        """bool [B, L]: where z may differ from the clean text, as far as one can see."""
        return jnp.ones(z.shape[:2], bool)

    @abc.abstractmethod
    def nats(self, output: Logits, x: Tokens, z: Noised, t: TokenTimes) -> PerToken:
        """The integrand of the bound on -log p(x): float32 [B, L], whose mean over t and z_t, summed, is the bound.

        Args:
          output: float [B, L, V], the network's.
          x: int32 [B, L], clean tokens.
          z: the noised ones.
          t: times.
        """

    def nats_before(self, x: Tokens, t: Array) -> PerToken | None:
        """What the integral from the earliest time t on lacks, where that is not left out: float32 [B, L], an upper
        bound on -log p(x_i | z_t) in the mean over z_t.
        """
        del x, t
        return None


class Reversible(Process):
    """A process whose law of z_s given z_t and the clean token is known, position by position."""

    @abc.abstractmethod
    def start(self, keys: Keys, canvas: Tokens, blank: Positions) -> Tokens:
        """z at t = 1: int32 [B, L], noise where `blank`, the canvas elsewhere.

        Args:
          keys: key array [B], one per sequence; a position's noise depends on its sequence's key and its index alone.
          canvas: int32 [B, L].
          blank: bool [B, L].
        """

    @abc.abstractmethod
    def predict(self, output: Logits, z: Tokens, t: TokenTimes) -> Law:
        """log p(x_i | z_t), of every position apart: float32 [B, L, V], -inf where it is 0; at the mask always."""

    @abc.abstractmethod
    def forward_law(self, log_p: Law, s: TokenTimes) -> Law:
        """log q(z_s), x being drawn from exp(log_p): float32 [B, L, V]. It sums to 1 if that law does."""

    @abc.abstractmethod
    def reverse_law(self, log_p: Law, z: Tokens, t: TokenTimes, s: TokenTimes) -> Law:
        """log q(z_s | z_t), the clean token being drawn from exp(log_p), `predict`'s: float32 [B, L, V], normalised.

        This is exact for one position: sum over x of p(x | z_t) q(z_s | z_t, x).
        """

    def reverse(self, keys: TokenKeys, z: Tokens, log_p: Law, t: TokenTimes, s: TokenTimes) -> Tokens:
        """One draw of `reverse_law`: int32 [B, L]; keys: key array [B, L]."""
        return draw_law(keys, self.reverse_law(log_p, z, t, s))


class Scheduled(Reversible):
    """A process in which every token is noised alike, as a schedule says.

    Attributes:
      schedule: alpha_t is 1 where all of the text is there, and 0 where none of it is; in between as the process says.
    """

    schedule: Schedule


class Scored(Scheduled):
    """A process with a score, p_t(z with y at i) / p_t(z): it has the steps of SEDD (arXiv 2310.16834).

    Attributes:
      output: what the network's output is; "score" is one of the choices.
      clock: what a network that is conditioned on the time is told of it: "t", or "sigma", the total noise, as MDLM's
        and Duo's own are. One whose output is a score is told sigma, as SEDD's is.
    """

    output: str
    clock: str

    def condition(self, t: Array) -> Array:
        """t; or sigma(t), where alpha_t = 0 a finite one."""
        told = self.output == "score" or self.clock == "sigma"
        return jnp.minimum(self.schedule.sigma(t), MOST_SIGMA) if told else t

    @abc.abstractmethod
    def score(self, output: Logits, z: Tokens, t: TokenTimes) -> Array:
        """log of p_t(z_i -> y) / p_t(z), float32 [B, L, V], 0 at y = z_i."""

    @abc.abstractmethod
    def euler_law(self, output: Logits, z: Tokens, t: TokenTimes, s: TokenTimes) -> Array:
        """The law of z_s after an Euler step from t, float32 [B, L, V]; entries below 0 are cut off, it sums to 1."""

    @abc.abstractmethod
    def analytic_law(self, output: Logits, z: Tokens, t: TokenTimes, s: TokenTimes) -> Array:
        """The law of z_s by Tweedie's formula (arXiv 2310.16834, section 4.2), float32 [B, L, V], not normalised."""


def start_keys(keys: Keys, length: int) -> TokenKeys:
    """Key array [B, L] for the noise at t = 1, of keys [B] of sequences: a longer canvas does not change them."""
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(NEVER))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(own, jnp.arange(length, dtype=jnp.uint32))


def log(probability: Array) -> Array:
    """A finite log, of what may be 0."""
    return jnp.log(jnp.maximum(probability, LEAST))


def finite_rate(rate: Array) -> Array:
    """The rate, a large one where it is infinite or unknown."""
    return jnp.where(jnp.abs(rate) < MOST_RATE, rate, MOST_RATE)


def check_schedule(process: Process) -> None:
    """Raises TypeError unless the process has a Schedule."""
    schedule = getattr(process, "schedule", None)
    if not isinstance(schedule, Schedule):
        name = type(process).__name__
        raise TypeError(f"{name}'s schedule must be a Schedule, got {type(schedule).__name__}.")


def check_two_tokens(process: Process) -> None:
    """Raises ValueError unless a token can be taken for another one."""
    if process.vocabulary.real < 2:
        name = type(process).__name__
        raise ValueError(
            f"{name} needs 2 tokens beside the mask, got {process.vocabulary.real}: take a larger vocabulary."
        )


def check_outputs(process: Scored, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless what the process takes the output for is one of the choices, and it has a clock."""
    check_choice(f"{type(process).__name__}'s output", process.output, choices)
    check_choice("clock", process.clock, CLOCKS)


__all__ = [
    "LogLinear",
    "Process",
    "Reversible",
    "Schedule",
    "Scheduled",
    "Scored",
    "Vocabulary",
    "check_outputs",
    "check_schedule",
    "check_two_tokens",
    "finite_rate",
    "log",
    "start_keys",
]
