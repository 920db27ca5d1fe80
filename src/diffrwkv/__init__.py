"""Masked diffusion language models with a linear-cost denoiser.

From a trained run to text:

    run = diffrwkv.load("runs/quickstart")
    print(diffrwkv.generate(run, ["The ", "An "], max_new_tokens=64, temperature=0.8).texts)
    print(diffrwkv.score(run, ["The cat sat.", "An apple fell."]))
"""

import importlib
import sys

from diffrwkv import signals

if sys.argv[:1] == ["-m"]:  # a program of ours: a signal gets a word while it imports JAX, not a traceback
    signals.end_at_once()

__version__ = "0.1.0"

__all__ = ["Choice", "Generation", "Score", "choose", "generate", "judge", "load", "score", "stream"]


def __getattr__(name):
    """The names above, imported when first asked for: `import diffrwkv` loads nothing, JAX included."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = {"Choice": "choosing", "choose": "choosing", "Score": "scoring", "judge": "judging", "score": "scoring"}
    return getattr(importlib.import_module(f"diffrwkv.{where.get(name, 'generation')}"), name)


def __dir__():
    return sorted([*globals(), *__all__])
