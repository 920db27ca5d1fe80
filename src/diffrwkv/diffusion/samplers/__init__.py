"""Samplers: each takes a denoiser as a function, one key per sequence, and a canvas with masks where to generate."""

from diffrwkv.diffusion.samplers.ancestral import Ancestral, Samples
from diffrwkv.diffusion.samplers.keys import sequence_keys

SAMPLERS = {"ancestral": Ancestral}

__all__ = ["SAMPLERS", "Ancestral", "Samples", "from_config", "sequence_keys"]


def from_config(name, *, schedule, **options):
    """The sampler `name` of `SAMPLERS`, under the objective's `schedule` (a Schedule), with its own options."""
    if name not in SAMPLERS:
        raise ValueError(f"No sampler is called {name!r}; choose one of {', '.join(sorted(SAMPLERS))}.")
    return SAMPLERS[name](schedule=schedule, **options)
