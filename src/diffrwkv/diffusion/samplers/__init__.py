"""Samplers: each takes a process, a network, a key per sequence, and a canvas with blanks to fill.

A sampler is a frozen dataclass of its options, called as `base.Sampler` says, whatever it is. Two things it says of
itself: `needs`, the kind of process that it samples from, and `face`, what it calls of the network:

    "denoise"  (z, t) -> output, of the whole canvas at once
    "step"     `StepFns`: one token after another, from the state of those before it
    "block"    `BlockFns`: one block after another, from the state of those before it
    "window"   `WindowFns`: several blocks at once
    "frozen"   `FrozenFns`: one block after another, keys and values of the rest as they were

One file and one line in `SAMPLERS` for each. Three are wrappers of one of the face "denoise": `Guided` has that face
too, `BlockCached` fills block after block from an exact state, and `FrozenCache` from approximate keys and values, for
models that were not trained for it.
"""

import dataclasses
from typing import Any

from diffrwkv.diffusion.samplers.analytic import Analytic
from diffrwkv.diffusion.samplers.ancestral import Ancestral
from diffrwkv.diffusion.samplers.autoregressive import Autoregressive, StepFns
from diffrwkv.diffusion.samplers.base import Sampler, Samples
from diffrwkv.diffusion.samplers.blocks import BlockCached, BlockFns
from diffrwkv.diffusion.samplers.confidence import Confidence
from diffrwkv.diffusion.samplers.entropy_bound import EntropyBound
from diffrwkv.diffusion.samplers.euler import Euler
from diffrwkv.diffusion.samplers.first_hitting import FirstHitting
from diffrwkv.diffusion.samplers.flow_euler import FlowEuler
from diffrwkv.diffusion.samplers.frozen import CACHES, FrozenCache, FrozenFns
from diffrwkv.diffusion.samplers.guidance import Guided
from diffrwkv.diffusion.samplers.ice import ICE
from diffrwkv.diffusion.samplers.keys import sequence_keys
from diffrwkv.diffusion.samplers.pipelined import Pipelined, WindowFns
from diffrwkv.diffusion.samplers.prophet import Prophet
from diffrwkv.diffusion.samplers.psi import Psi
from diffrwkv.diffusion.samplers.remdm import ReMDM

SAMPLERS: dict[str, type[Sampler]] = {
    "analytic": Analytic,
    "ancestral": Ancestral,
    "autoregressive": Autoregressive,
    "confidence": Confidence,
    "entropy_bound": EntropyBound,
    "euler": Euler,
    "first_hitting": FirstHitting,
    "flow_euler": FlowEuler,
    "ice": ICE,
    "pipelined": Pipelined,
    "prophet": Prophet,
    "psi": Psi,
    "remdm": ReMDM,
}

__all__ = [
    "CACHES",
    "SAMPLERS",
    "ICE",
    "Analytic",
    "Ancestral",
    "Autoregressive",
    "BlockCached",
    "BlockFns",
    "Confidence",
    "EntropyBound",
    "Euler",
    "FirstHitting",
    "FlowEuler",
    "FrozenCache",
    "FrozenFns",
    "Guided",
    "Pipelined",
    "Prophet",
    "Psi",
    "ReMDM",
    "Sampler",
    "Samples",
    "StepFns",
    "WindowFns",
    "from_config",
    "sequence_keys",
]


def from_config(name: str, **options: Any) -> Sampler:
    """The sampler `name` of `SAMPLERS` with its options. Raises ValueError for an unknown name or option."""
    if not isinstance(name, str) or name not in SAMPLERS:
        choices = ", ".join(sorted(SAMPLERS))
        raise ValueError(f"No sampler is called {name!r}; choose one of {choices}.")
    sampler = SAMPLERS[name]
    known = [f.name for f in dataclasses.fields(sampler)]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"The sampler {name!r} has no option {', '.join(unknown)}; it has {', '.join(known)}.")
    return sampler(**options)
