"""The backbones of the comparison, at sizes matched in parameters.

`configure(c, "bimamba", "peer")` sets the model of a config, and the objective and sampler that go with it; experiments
name them `experiments/x.py:bimamba`. docs/results.md has what each costs.
"""

import re
from typing import Any

# What a backbone changes in config.model. Widths and depths are SIZES'.
BACKBONES: dict[str, dict[str, Any]] = {
    # bidirectional RWKV-7, and the same with an attention layer in every five
    "birwkv": {},
    "birwkv_hybrid": {"pattern": "attention,birwkv7*4"},
    # MDLM's Transformer (arXiv 2406.07524)
    "dit": {"pattern": "attention", "channel_mixer": "mlp", "block": "dit"},
    # DiffuMamba and DiffuMamba-H (arXiv 2511.15927): two Mamba-2 added, MLP ratio 2, one attention layer in every five
    "bimamba": {
        "pattern": "bimamba2",
        "channel_mixer": "mlp",
        "channel_mixers": {"mlp": {"expansion": 2.0}},
        "block": "dit",
    },
    "bimamba_hybrid": {
        "pattern": "attention,bimamba2*4",
        "channel_mixer": "mlp",
        "channel_mixers": {"mlp": {"expansion": 2.0}},
        "block": "dit",
    },
    # left to right: MDLM's autoregressive Transformer, and RWKV-7 as upstream
    "ar_transformer": {"pattern": "causal_attention", "channel_mixer": "mlp", "block": "transformer"},
    "ar_rwkv": {"pattern": "rwkv7", "channel_mixers": {"rwkv7": {"shift": "previous"}}},
}

AUTOREGRESSIVE = ("ar_rwkv", "ar_transformer")


def _depths(vocab_size: int, dim: int, **num_layers: int) -> dict[str, Any]:
    return {"vocab_size": vocab_size} | {name: {"dim": dim, "num_layers": n} for name, n in num_layers.items()}


# The vocabulary that a size is matched for, and what it sets in config.model for each backbone. "peer" stays under
# 1.30 M, where MDLM's Transformer of the comparison has 1,285,826; "tiny" is 10 M, "small" GPT-2 small's class (170 M);
# the last three are DiffuMamba's. Depth is what meets the size at the common width.
SIZES: dict[str, dict[str, Any]] = {
    "peer": {
        "vocab_size": 66,
        "birwkv": {"dim": 128, "num_layers": 4},
        "birwkv_hybrid": {
            "dim": 120,
            "num_layers": 5,
            "mixers": {"attention": {"head_dim": 30}, "birwkv7": {"head_dim": 60}},
        },
        "dit": {"dim": 128, "num_layers": 4, "mixers": {"attention": {"head_dim": 32}}},
        "bimamba": {"dim": 96, "num_layers": 4},
        "bimamba_hybrid": {
            "dim": 96,
            "num_layers": 5,
            "mixers": {"attention": {"head_dim": 32}, "bimamba2": {"state_size": 96}},
        },
        "ar_transformer": {"dim": 128, "num_layers": 6, "mixers": {"causal_attention": {"head_dim": 32}}},
        "ar_rwkv": {"dim": 128, "num_layers": 5},
    },
    "tiny": _depths(
        4096,
        256,
        birwkv=8,
        birwkv_hybrid=9,
        dit=8,
        bimamba=6,
        bimamba_hybrid=7,
        ar_transformer=10,
        ar_rwkv=9,
    ),
    "small": _depths(
        50258,
        768,
        birwkv=12,
        birwkv_hybrid=12,
        dit=12,
        bimamba=9,
        bimamba_hybrid=10,
        ar_transformer=13,
        ar_rwkv=12,
    ),
    "240m": _depths(
        50258,
        1024,
        birwkv=10,
        birwkv_hybrid=10,
        dit=10,
        bimamba=8,
        bimamba_hybrid=9,
        ar_transformer=11,
        ar_rwkv=10,
    ),
    "500m": _depths(
        50258,
        1280,
        birwkv=17,
        birwkv_hybrid=17,
        dit=18,
        bimamba=13,
        bimamba_hybrid=15,
        ar_transformer=19,
        ar_rwkv=18,
    ),
    "1300m": _depths(
        50258,
        2048,
        birwkv=20,
        birwkv_hybrid=20,
        dit=21,
        bimamba=16,
        bimamba_hybrid=18,
        ar_transformer=22,
        ar_rwkv=21,
    ),
}


def configure(c: Any, choice: str, size: str) -> None:
    """Sets config.model, and what goes with it in config.diffusion, config.layouts and config.sampler; other keys stay.

    Args:
      choice: BACKBONE[/SIZE][@BLOCKS][~OBJECTIVE]: a backbone; another size than `size`; the layout "blocks", of so
        many tokens ("16", or "4,16,64"), 0 for the whole text; a name in `objectives.OBJECTIVES`. A backbone from left
        to right has the objective "autoregressive" and takes neither of the last two.

    Raises ValueError naming the choices for a backbone, a size or an objective that there is none of.
    """
    if not isinstance(choice, str):
        raise ValueError(f"a backbone is named by text such as 'dit' or 'birwkv/tiny@16~mdlm', got {choice!r}.")
    choice, tilde, objective = choice.partition("~")
    choice, at, blocks = choice.partition("@")
    backbone, slash, other = choice.partition("/")
    size = other if slash else size
    if backbone not in BACKBONES:
        raise ValueError(f"no backbone is called {backbone!r}: choose one of {', '.join(BACKBONES)}.")
    if not isinstance(size, str) or size not in SIZES:
        raise ValueError(f"no size is called {size!r}: choose one of {', '.join(SIZES)}.")
    c.model.update(BACKBONES[backbone])
    c.model.update(SIZES[size][backbone])
    if backbone in AUTOREGRESSIVE:
        if at or tilde:
            what = "block diffusion" if at else "a diffusion objective"
            raise ValueError(f"{backbone} goes from left to right: {what} needs another backbone.")
        c.diffusion.name = c.sampler.name = "autoregressive"
    if tilde:
        take_objective(c, objective)
        if c.diffusion.name == "autoregressive":
            raise ValueError(f"{objective!r} goes from left to right: choose one of {', '.join(AUTOREGRESSIVE)}.")
    if at:
        diffuse_blocks(c, blocks)


def take_objective(c: Any, name: str) -> None:
    """Sets config.diffusion.name, a sampler of its process, and time conditioning where the network must know the time.

    Raises ValueError naming the choices for an objective that there is none of.
    """
    from diffrwkv.diffusion.objectives import OBJECTIVES  # here, for they need JAX
    from diffrwkv.diffusion.samplers import SAMPLERS

    if name not in OBJECTIVES:
        raise ValueError(f"no objective is called {name!r}: choose one of {', '.join(sorted(OBJECTIVES))}.")
    process = OBJECTIVES[name].process
    fitting = [sampler for sampler, cls in SAMPLERS.items() if issubclass(process, cls.needs)]
    c.diffusion.name = name
    c.sampler.name = "ancestral" if "ancestral" in fitting else fitting[0]
    if process.needs_time:
        c.model.time_conditioning = True
    if name == "sedd_uniform":  # its authors' noise begins at 1e-4
        c.schedules.geometric.sigma_min = 1e-4


def diffuse_blocks(c: Any, blocks: str) -> None:
    """Sets the layout "blocks".

    Args:
      blocks: "16", or "4,16,64".

    Raises ValueError for what is no list of lengths.
    """
    if not isinstance(blocks, str) or not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", blocks):
        raise ValueError(f"blocks are numbers of tokens such as 16 or 4,16,64, got {blocks!r}.")
    c.diffusion.layout = "blocks"
    c.layouts.blocks.sizes = tuple(int(block) for block in blocks.split(","))
