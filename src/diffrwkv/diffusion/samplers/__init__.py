"""Samplers: each takes a denoiser function, a key per sequence, and a canvas with masks to fill."""

from diffrwkv.diffusion.samplers.ancestral import Ancestral, Samples
from diffrwkv.diffusion.samplers.keys import sequence_keys

SAMPLERS = {"ancestral": Ancestral}

__all__ = ["SAMPLERS", "Ancestral", "Samples", "from_config", "sequence_keys"]


def from_config(name, *, schedule, **options):
    """The sampler `name` of `SAMPLERS` with its options, under the objective's `schedule`."""
    if name not in SAMPLERS:
        choices = ", ".join(sorted(SAMPLERS))
        raise ValueError(f"No sampler is called {name!r}; choose one of {choices}.")
    return SAMPLERS[name](schedule=schedule, **options)
