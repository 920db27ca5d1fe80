"""GenMD4: each token's schedule is learned (arXiv 2406.04329, section 6; google-deepmind/md4 b9fbf29, genmd4.py)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from diffrwkv.checks import POSITIVE
from diffrwkv.diffusion.objectives.base import Timed
from diffrwkv.diffusion.processes.token_masked import TokenMasked
from diffrwkv.diffusion.schedules import POWER


@dataclasses.dataclass(frozen=True)
class GenMD4(Timed):
    """The bound of `TokenMasked`, minimised by the network's weights and by the powers of its schedules alike.

    The powers change which tokens a draw masks, too. That part of their gradient is REINFORCE's: two draws at one time,
    each the other's baseline, hence two passes of the network in a training step, of which the mean is the loss.
    Beside the integral the bound has what is left before time_eps (`TokenMasked.nats_before`), of every token.

    Its state: {"w": float32 [V], softplus of which are the powers; "optimiser": Adam's}.

    Attributes:
      time_eps, low_discrepancy: as of `Timed`.
      power: of all tokens, before they are learned; 1 is the linear schedule.
      power_rate: the learning rate of w.
    """

    process: TokenMasked
    power: float = 1.0
    power_rate: float = 3e-4

    def __post_init__(self):
        super().__post_init__()
        POWER.check("power", self.power)
        POSITIVE.check("power_rate", self.power_rate)
        if not isinstance(self.process, TokenMasked):
            raise TypeError(f"GenMD4 needs the process TokenMasked, not {type(self.process).__name__}.")

    # --- its state ----------------------------------------------------------------------------------

    def init_state(self):
        w = jnp.full(self.process.vocabulary.size, math.log(math.expm1(self.power)), jnp.float32)
        return {"w": w, "optimiser": self._adam.init(w)}

    def learned(self, state):
        return {"w": state["w"]}

    def update(self, state, gradient, step):
        del step
        change, optimiser = self._adam.update(gradient["w"], state["optimiser"])
        return {"w": state["w"] + change, "optimiser": optimiser}

    def settled(self, state):
        w = jax.nn.softplus(jnp.asarray(state["w"]))
        powers = w if isinstance(w, jax.core.Tracer) else tuple(w.tolist())
        return dataclasses.replace(self, process=dataclasses.replace(self.process, powers=powers))

    @property
    def _adam(self):
        return optax.adam(self.power_rate, b2=0.999)

    # --- the loss -----------------------------------------------------------------------------------

    def loss(self, denoise_fn, key, x, t, valid=None, *, state=None, step=None):
        if state is not None:
            return self.settled(state).loss(denoise_fn, key, x, t, valid, step=step)
        if step is None:
            return self._draw(denoise_fn, key, x, t, valid)[0]
        (a, log_q_a), (b, log_q_b) = (self._draw(denoise_fn, k, x, t, valid) for k in jax.random.split(key))
        apart = jax.lax.stop_gradient(self.layout.sums(a.token_nats - b.token_nats))
        reinforce = (apart * self.layout.sums(log_q_a - log_q_b)).sum(axis=1) / 2
        mean = jax.tree.map(lambda a, b: (a + b) / 2, (a.nats, a.token_nats), (b.nats, b.token_nats))
        nats = mean[0] + reinforce - jax.lax.stop_gradient(reinforce)
        return a._replace(nats=nats, token_nats=mean[1], noised=a.noised | b.noised)

    def _draw(self, denoise_fn, key, x, t, valid):
        """(The loss of one draw, log q(z | x) of its tokens)."""
        z, counted = self.noised(key, x, t, valid)
        output = denoise_fn(z, self.process.condition(t), **self.layout.network(x))
        t = self.layout.of_tokens(t, x.shape[1])
        log_q = jnp.where(counted, self.process.log_noise(x, z, t), 0.0)
        return self.loss_at(output, x, z, t, counted), log_q
