"""Options that make each mixer small, for the tests that walk `MIXERS`. A new mixer needs one line here.

All fit a model of width 32, with two heads or more. Operators run in their definition, which compiles fastest.
"""

MIXERS = {
    "attention": {"head_dim": 16},
    "bimamba2": {"head_dim": 16, "implementation": "reference"},
    "birwkv7": {"head_dim": 16, "implementation": "reference"},
    "causal_attention": {"head_dim": 16},
    "mamba2": {"head_dim": 16, "implementation": "reference"},
    "rwkv7": {"head_dim": 16, "implementation": "reference"},
}


def fast(name):
    """The same, with the form of the operator that is chosen where none is named."""
    return {option: value for option, value in MIXERS[name].items() if option != "implementation"}
