"""Masked diffusion language models with a linear-cost denoiser.

From a trained run, or a model that comes with the package ("books"), to text:

    run = diffrwkv.load("runs/quickstart")
    print(diffrwkv.generate(run, ["The ", "An "], max_new_tokens=64, temperature=0.8).texts)
    print(diffrwkv.score(run, ["The cat sat.", "An apple fell."]))

And the parts to build with, each of use alone (docs/library.md):

    from diffrwkv import MDLM, Ancestral, BiRWKV7, Denoiser, Place, sequence_keys, wkv7
"""

import importlib
import sys

from diffrwkv import signals

if sys.argv[:1] == ["-m"]:  # a program of ours: a signal gets a word while it imports JAX, not a traceback
    signals.end_at_once()

__version__ = "0.1.0"

_PARTS = {  # where each name lives
    "diffrwkv.choosing": ["Choice", "choose"],
    "diffrwkv.denoiser": ["Denoiser"],
    "diffrwkv.diffusion.layouts": ["LAYOUTS", "Blocks", "Whole"],
    "diffrwkv.diffusion.objectives": ["MDLM", "OBJECTIVES"],
    "diffrwkv.diffusion.processes": ["PROCESSES", "Vocabulary"],
    "diffrwkv.diffusion.samplers": ["SAMPLERS", "Ancestral", "BlockCached", "Confidence", "sequence_keys"],
    "diffrwkv.diffusion.schedules": ["SCHEDULES"],
    "diffrwkv.generation": ["Generation", "generate", "load", "stream"],
    "diffrwkv.judging": ["judge"],
    "diffrwkv.mixers": ["CHANNEL_MIXERS", "MIXERS", "RWKV7", "BiRWKV7", "ChannelMix", "Place"],
    "diffrwkv.scoring": ["Score", "score"],
    "pallas_kernels.wkv7": ["wkv7"],
}

__all__ = sorted(name for names in _PARTS.values() for name in names)


def __getattr__(name):
    """The names above, imported when first asked for: `import diffrwkv` loads nothing, JAX included."""
    for module, names in _PARTS.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
