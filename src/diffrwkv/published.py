"""What others published, told from its config.json: whose model it is, and the config that it needs here.

    found = published.read("hf:kuleshov-group/mdlm-owt")     # or a folder, or a file of weights
    cfg = published.experiment(found)                        # found.params are the Denoiser's

MDLM, BD3-LM, SEDD and Duo have one network with the same names. What tells them apart is the config.json alone: their
networks are told the time or not, and their outputs mean different things. What cannot be computed as its authors do is
refused, by name.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffrwkv import config, hub
from diffrwkv.denoiser import parse_pattern
from diffrwkv.weights import (
    FORMATS,
    INDEX,
    SUFFIXES,
    StateDict,
    read_state_dict,
    rotary_frequencies,
    stack_layers,
)

Config = Mapping[str, Any]  # of a config.json


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one project publishes.

    Attributes:
      format: of its weights, in `FORMATS`.
      settings: (its config.json, {} where there is none; the keyword arguments of the Denoiser) -> keys of our config
        and what they must be. Raises ValueError for what is not computed here as there.
      needs_config: its config.json says what the weights do not.
      tokenizers: ids, the mask's among them -> a specification.
      all_real: every id of it is a token, and none the mask: a row of zeros is added for that, which nothing reads.
    """

    format: str
    settings: Callable[[Config, Config], dict[str, Any]]
    tokenizers: Mapping[int, str]
    needs_config: bool = False
    all_real: Callable[[Config], bool] = lambda config: False


def _require(config: Config, **wanted: Any) -> None:
    """Raises ValueError where a key is there with another value."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"its config.json says {key} = {config[key]!r}, and only {value!r} is computed here")


def _length(config: Config, key: str = "model_length") -> dict[str, Any]:
    return {"data.length": int(config[key])} if key in config else {}


def _mdlm(config: Config, model: Config) -> dict[str, Any]:
    settings = {"diffusion.name": "mdlm", "data.wrap": True} | _length(config)
    if config.get("time_conditioning"):
        settings |= {"model.time_conditioning": True, "objectives.mdlm.clock": "sigma"}
    return settings


def _bd3lm(config: Config, model: Config) -> dict[str, Any]:
    _require(config, adaln=True, causal=False, time_conditioning=False)  # theirs is told one time for all blocks
    settings = _mdlm({}, model) | _length(config)
    size = int(config.get("block_size", 0))
    if size < 1 and config:
        raise ValueError("its config.json has no block_size")
    if config and config.get("cross_attn", True) and size < int(config.get("model_length", size + 1)):
        settings |= {"diffusion.layout": "blocks", "layouts.blocks.sizes": (size,)}
        settings |= {"layouts.blocks.causal_context": False, "layouts.blocks.keep_first": True}
    return settings


def _sedd(config: Config, model: Config) -> dict[str, Any]:
    graph, noise, network = (config.get(key) or {} for key in ("graph", "noise", "model"))
    kind = graph.get("type", "absorb")
    if kind not in ("absorb", "uniform"):
        raise ValueError(f"its config.json says graph.type = {kind!r}, and only 'absorb' and 'uniform' are known")
    _require(network, scale_by_sigma=kind == "absorb")
    settings = {
        "diffusion.name": f"sedd_{kind}",
        "model.time_conditioning": True,
        "sampler.name": "analytic",
    } | _length(network, "length")
    if "type" in noise:
        if noise["type"] not in ("loglinear", "geometric"):
            raise ValueError(
                f"its config.json says noise.type = {noise['type']!r}, and only 'loglinear' and 'geometric' are known"
            )
        settings["diffusion.schedule"] = noise["type"]
        if noise["type"] == "geometric":
            settings |= {f"schedules.geometric.{key}": float(noise[key]) for key in ("sigma_min", "sigma_max")}
    return settings


def _duo(config: Config, model: Config) -> dict[str, Any]:
    _require(config, causal=False)
    settings = {"diffusion.name": "duo", "model.time_conditioning": True, "objectives.duo.clock": "sigma"}
    return settings | {"data.wrap": True} | _length(config)


def _rwkv7(config: Config, model: Config) -> dict[str, Any]:
    return {"diffusion.name": "autoregressive", "sampler.name": "autoregressive"}


def _fla(config: Config, model: Config) -> dict[str, Any]:
    _require(config, attn=None, norm_first=True, norm_bias=True, hidden_act="sqrelu", norm_eps=1e-5)
    _require(config, tie_word_embeddings=False)
    if config.get("value_dim") not in (None, model["dim"], [model["dim"]] * model["num_layers"]):
        raise ValueError(
            f"its config.json says value_dim = {config['value_dim']!r}, and only hidden_size is computed here"
        )
    if (width := model["mixers"]["rwkv7"]["head_dim"]) != 64:  # there the norm's epsilon is head_dim times norm_eps
        raise ValueError(f"its heads are {width} wide, whose norm has another epsilon there than here: only 64 will do")
    return _rwkv7(config, model)


DIT_TOKENIZERS = {50258: "gpt2", 50259: "gpt2:50259"}
RWKV_TOKENIZERS = {65536: "world", 50304: "neox"}


def _sedd_uniform(config: Config) -> bool:
    return (config.get("graph") or {}).get("type") == "uniform"


KINDS = {
    # kuleshov-group/mdlm
    "mdlm": Kind("mdlm", _mdlm, DIT_TOKENIZERS),
    # kuleshov-group/bd3lms
    "bd3lm": Kind("mdlm", _bd3lm, DIT_TOKENIZERS, needs_config=True),
    # louaaron/Score-Entropy-Discrete-Diffusion
    "sedd": Kind("mdlm", _sedd, DIT_TOKENIZERS, needs_config=True, all_real=_sedd_uniform),
    # s-sahoo/duo: its ids beyond GPT-2's are tokens as well, which noise draws
    "duo": Kind("mdlm", _duo, DIT_TOKENIZERS, all_real=lambda config: True),
    # BlinkDL/RWKV-LM
    "rwkv7": Kind("rwkv7", _rwkv7, RWKV_TOKENIZERS),
    # fla-org/flash-linear-attention
    "fla": Kind("fla", _fla, RWKV_TOKENIZERS),
}
MODEL_TYPES = {"mdlm": "mdlm", "bd3lm": "bd3lm", "duo": "duo", "rwkv7": "fla", "rwkv7_fla": "fla"}
# Keys of a config.json that say what the shapes say too.
SAME = {
    "hidden_dim": "dim",
    "hidden_size": "dim",
    "n_blocks": "num_layers",
    "num_hidden_layers": "num_layers",
    "cond_dim": "condition_dim",
    "vocab_size": "vocab_size",
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A model that was read.

    Attributes:
      kind: in `KINDS`.
      name: of what it was read from.
      model: keyword arguments of the Denoiser, vocab_size included.
      params: its parameters, float32, layers unstacked.
      settings: other keys of our config and what they must be.
      tokenizer: a specification, or None where nothing says it.
    """

    kind: str
    name: str
    model: dict[str, Any]
    params: dict[str, Any]
    settings: dict[str, Any]
    tokenizer: str | None


def read(
    source: str | os.PathLike, *, kind: str | None = None, ema: bool = False, name: str | None = None
) -> Published:
    """The model of a file, of a folder, or of the hub.

    Args:
      source: a file that `read_state_dict` takes, a folder with config.json and weights, "hf:OWNER/NAME", or
        "hf:OWNER/NAME/FILE". Beside a file its config.json is read too.
      kind: in `KINDS`, for weights without a config.json whose names do not say it.
      ema: as of `read_state_dict`.
      name: to tell it by, in place of the source.

    Raises:
      ValueError: nothing that is known, or not computed here as there: the sentence says which.
      OSError: a file is missing or cannot be read.
      ImportError: the library that reads it is not installed.
    """
    path = hub.local(source)
    file = weights_in(path)
    told = _config_beside(file, alone=not path.is_dir())
    state = read_state_dict(file, ema=ema)
    name = name or os.fspath(source)
    kind = _kind(name, told, state, kind)
    entry = KINDS[kind]
    network = told.get("model", {}) if kind == "sedd" else told
    if entry.format == "mdlm" and "rotary_emb.inv_freq" not in state and "n_heads" in network:
        width = int(network.get("hidden_dim", network.get("hidden_size", 0))) // int(network["n_heads"])
        state = state | {"rotary_emb.inv_freq": rotary_frequencies(width)}
    layout = FORMATS[entry.format]
    try:
        model, params = layout.model(state), layout.to_params(state)
        for key, ours in SAME.items():
            if key in network and network[key] != model[ours]:
                raise ValueError(f"its config.json says {key} = {network[key]!r}, and its weights {model[ours]!r}")
        if entry.format == "mdlm" and "n_heads" in network:
            heads = model["dim"] // model["mixers"]["attention"]["head_dim"]
            if heads != network["n_heads"]:
                raise ValueError(f"its config.json says n_heads = {network['n_heads']!r}, and its weights {heads!r}")
        settings = entry.settings(told, model)
    except (TypeError, KeyError) as e:
        raise ValueError(f"{name}: its config.json is none of {kind}'s ({type(e).__name__}: {e}).") from e
    except ValueError as e:
        raise ValueError(f"{name} cannot be taken as a model of {kind}: {str(e).rstrip('.')}.") from e
    model |= {"time_conditioning": settings.pop("model.time_conditioning", False)}
    if entry.all_real(told):
        model, params = model | {"vocab_size": model["vocab_size"] + 1}, _with_a_row(params)
    tokenizer = entry.tokenizers.get(model["vocab_size"])
    if tokenizer is None and (file.parent / "tokenizer.json").is_file():
        tokenizer = f"{file.parent / 'tokenizer.json'}:{model['vocab_size']}"
    return Published(kind, name, model, params, settings, tokenizer)


def _with_a_row(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with one more id."""
    rows = {"embedding": 0, "head": 1, "head_bias": 0}
    return params | {
        name: np.pad(params[name], [(0, int(axis == at)) for axis in range(params[name].ndim)])
        for name, at in rows.items()
        if name in params
    }


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder; a file itself. Raises ValueError where there is none, or several."""
    if not folder.is_dir():
        return folder
    for name in ("model.safetensors", INDEX, "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) != 1:
        found = ", ".join(path.name for path in files[:8]) or "none"
        raise ValueError(
            f"{folder} must have one file of weights, such as model.safetensors; it has {found}: name the file."
        )
    return files[0]


def _config_beside(file: Path, *, alone: bool) -> dict[str, Any]:
    """The config.json in a file's folder, or {}; one of something else beside a file that was named is left alone."""
    path = file.parent / "config.json"
    if not path.is_file():
        return {}
    try:
        told = config.read_json(path)
    except (ValueError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} cannot be read ({e}).") from None
    return {} if alone and "model_type" not in told and "graph" not in told else told


def _kind(name: str, told: Config, state: StateDict, kind: str | None) -> str:
    """Whose model it is. Raises ValueError where nothing says so, or two things do."""
    published = None
    if "graph" in told and isinstance(told.get("model"), Mapping):
        published = "sedd"
    elif told:
        model_type = str(told.get("model_type", ""))
        published = MODEL_TYPES.get(model_type.lower())
        if published is None:
            raise ValueError(
                f"{name} is a model of another kind: its config.json says model_type = {model_type!r}, and known are "
                f"{', '.join(MODEL_TYPES)}, and SEDD's."
            )
    elif "emb.weight" in state:
        published = "rwkv7"
    elif "model.embeddings.weight" in state:
        published = "fla"
    if published and kind not in (None, published):
        raise ValueError(f"{name} is a model of {published}, not of {kind}: leave --from={kind} out.")
    if published:
        return published
    if kind is None:
        shared = [each for each, entry in KINDS.items() if entry.format == "mdlm"]
        raise ValueError(
            f"{name} has no config.json beside it that says whose model it is, and {', '.join(shared)} name their "
            f"weights alike: put it there, or say --from={'|'.join(shared)}."
        )
    return kind


def experiment(found: Published) -> Any:
    """The ConfigDict that the model needs: `base` with its sizes, objective and tokenizer.

    Raises ValueError where the kind's config.json would have to say more.
    """
    if KINDS[found.kind].needs_config and "data.length" not in found.settings:
        raise ValueError(
            f"{found.name}: a model of {found.kind} needs its config.json beside the weights, or an experiment "
            "(--config=FILE) that says the same."
        )
    changes: dict[str, Any] = dict(found.settings)
    for key, value in found.model.items():
        if key in ("mixers", "channel_mixers"):
            changes |= {f"model.{key}.{name}.{option}": v for name, o in value.items() for option, v in o.items()}
        elif key != "vocab_size":
            changes[f"model.{key}"] = value
    if found.tokenizer is not None:
        changes["data.tokenizer"] = found.tokenizer
    return config.changed(changes)


def stacked(params: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Parameters with layers unstacked as those of config.model, float32 arrays of JAX."""
    if model.scan_layers:
        _, period = parse_pattern(model.pattern, model.num_layers)
        params = stack_layers(params, model.num_layers, len(period))
    return {name: _as_jax(value) for name, value in params.items()}


def _as_jax(value: Any) -> Any:
    return {k: _as_jax(v) for k, v in value.items()} if isinstance(value, Mapping) else jnp.asarray(value)
