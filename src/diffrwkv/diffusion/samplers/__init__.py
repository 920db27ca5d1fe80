"""Samplers: each takes a function, a key per sequence, and a canvas with masks to fill.

A sampler is a frozen dataclass of its options. With `causal = False` it is called as `(denoise_fn, keys, canvas, *,
mask_id, ...)` and its `schedule` is the objective's; with `causal = True` as `(step_fn, state, keys, canvas, *,
mask_id, ...)`, for models that predict the next token. `Guided` wraps one of the former, and `BlockCached` fills block
after block with one, from an exact state; `FrozenCache` does from approximate keys and values, for models that were not
trained for it; `Pipelined` does by itself, several blocks at once.
"""

import dataclasses

from diffrwkv.diffusion.samplers.ancestral import Ancestral
from diffrwkv.diffusion.samplers.autoregressive import Autoregressive
from diffrwkv.diffusion.samplers.blocks import BlockCached, BlockFns
from diffrwkv.diffusion.samplers.common import Samples
from diffrwkv.diffusion.samplers.confidence import Confidence
from diffrwkv.diffusion.samplers.first_hitting import FirstHitting
from diffrwkv.diffusion.samplers.frozen import CACHES, FrozenCache, FrozenFns
from diffrwkv.diffusion.samplers.guidance import Guided
from diffrwkv.diffusion.samplers.ice import ICE
from diffrwkv.diffusion.samplers.keys import sequence_keys
from diffrwkv.diffusion.samplers.pipelined import Pipelined, WindowFns
from diffrwkv.diffusion.samplers.prophet import Prophet
from diffrwkv.diffusion.samplers.remdm import ReMDM

SAMPLERS = {
    "ancestral": Ancestral,
    "autoregressive": Autoregressive,
    "confidence": Confidence,
    "first_hitting": FirstHitting,
    "ice": ICE,
    "prophet": Prophet,
    "remdm": ReMDM,
}

__all__ = [
    "CACHES",
    "SAMPLERS",
    "ICE",
    "Ancestral",
    "Autoregressive",
    "BlockCached",
    "BlockFns",
    "Confidence",
    "FirstHitting",
    "FrozenCache",
    "FrozenFns",
    "Guided",
    "Pipelined",
    "Prophet",
    "ReMDM",
    "Samples",
    "WindowFns",
    "from_config",
    "sequence_keys",
]


def from_config(name, *, schedule=None, **options):
    """The sampler `name` of `SAMPLERS` with its options, under the objective's `schedule` if it takes one.

    `schedule` None: the log-linear one. Raises ValueError for an unknown name or option.
    """
    if name not in SAMPLERS:
        choices = ", ".join(sorted(SAMPLERS))
        raise ValueError(f"No sampler is called {name!r}; choose one of {choices}.")
    sampler = SAMPLERS[name]
    known = [f.name for f in dataclasses.fields(sampler) if f.name != "schedule"]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"The sampler {name!r} has no option {', '.join(unknown)}; it has {', '.join(known)}.")
    if schedule is not None and not sampler.causal:
        options["schedule"] = schedule
    return sampler(**options)
