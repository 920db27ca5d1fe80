"""The weights that a run starts from, `config.train.init_from`: another run's, or those of a file that convert reads;
here, or on the hub ("hf:OWNER/NAME").

They are taken by the names that the network has, so that all of it that is not a matter of training must be the same;
what is not is refused. One thing may differ: a network from left to right becomes one that sees both sides, and is at
first the one that it was.

    rwkv7 -> birwkv7                     the reverse direction is a copy of the forward one; its output gate
                                         sigmoid(x_g g1) g2 is zero, for g2 is, and so is all that it adds
    channel mix "previous" -> "both"     the following token's mix x_k_next is zero

Such a network reads its logits at the token before (`config.model.predict_next`); in blocks of one token it is then the
network from left to right, to rounding.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffrwkv import hub
from diffrwkv.config import UserError
from diffrwkv.data import Tokenizer
from diffrwkv.denoiser import BLOCKS, parse_pattern
from diffrwkv.files import file_sha256
from diffrwkv.run import load_run
from diffrwkv.weights import FORMATS, differences, read_state_dict, stack_layers, unstack_layers

# What of config.model may be otherwise than in the source: how it is trained and computed, and where its logits stand.
FREE = ("dropout", "dtype", "predict_next", "remat", "scan_layers")


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to start from.

    Attributes:
      path: as it was given.
      model: keyword arguments of the Denoiser that they need, vocab_size included; what is not named may be anything.
      params: float32, layers unstacked.
      predicts_next: a position's output is about the token after it.
      tokenizer: that they were trained with; None for a file, which has none.
      origin: what run.json says of them, JSON types.
    """

    path: str
    model: Mapping[str, Any]
    params: Mapping[str, Any]
    predicts_next: bool
    tokenizer: Tokenizer | None
    origin: Mapping[str, Any]


def read(cfg: Any, mesh: Mesh) -> Source:
    """The source that `config.train.init_from` names, made to fit `config.model`.

    Raises UserError for what is neither a run nor weights, and for a network that they are not of.
    """
    try:
        path = hub.local(cfg.train.init_from)
    except (ValueError, ImportError) as e:
        raise UserError(f"config.train.init_from: {e}") from e
    source = _run(cfg, path, mesh) if path.is_dir() else _file(cfg, path)
    source = adapted(source, cfg.model.to_dict())
    refuse_other_model(cfg, source.model, source.path)
    if source.tokenizer is not None and cfg.data.tokenizer != source.tokenizer.name:
        raise UserError(
            f"{source.path} was trained with the tokenizer {source.tokenizer.name!r}, and config.data.tokenizer is "
            f"{cfg.data.tokenizer!r}: set it to the former."
        )
    return source


def _run(cfg: Any, path: Path, mesh: Mesh) -> Source:
    raw = cfg.train.init_raw
    run = load_run(path, mesh, raw=raw)
    origin = {"workdir": str(path), "step": run.step, "weights": "params" if raw else "ema"}
    return Source(
        str(path),
        needed(run.config.model.to_dict() | {"vocab_size": run.tokenizer.vocab_size}),
        unstack_layers(jax.tree.map(_whole, run.params)),
        run.objective.causal or run.model.predict_next,
        run.tokenizer,
        origin,
    )


def _whole(x: jax.Array) -> np.ndarray:
    """All of an array that several processes may have parts of."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def _file(cfg: Any, path: Path) -> Source:
    if cfg.train.init_raw:
        raise UserError("config.train.init_raw chooses between the weights of a workdir: a file has one kind of them.")
    try:
        state = read_state_dict(path)
        name, model = _format(path, state)
        params = FORMATS[name].to_params(state)
    except (ValueError, OSError, ImportError) as e:
        raise UserError(f"config.train.init_from: {e}") from e
    origin = {"file": str(path), "format": name, "sha256": file_sha256(path)}
    causal = FORMATS[name].mixer == "rwkv7"
    return Source(str(path), model, params, causal, None, origin)


def _format(path: Path, state: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """(the name of the format that the tensors are in, the network that they need). Raises ValueError for none."""
    why = []
    for name, layout in FORMATS.items():
        try:
            return name, layout.model(state)
        except ValueError as e:
            why.append(str(e))
    raise ValueError(f"{path} is of no format that is read. {' '.join(why)}")


def needed(model: Mapping[str, Any]) -> dict[str, Any]:
    """What another network must have to take the weights of this one; both are keyword arguments of a Denoiser.

    Args:
      model: all of them, vocab_size included.
    """
    layers, _ = parse_pattern(model["pattern"], model["num_layers"])
    kept = {k: v for k, v in model.items() if k not in (*FREE, "mixers", "channel_mixers")}
    if not (model["time_conditioning"] or BLOCKS[model["block"]].constant_condition):
        del kept["condition_dim"]

    def options(section: str, names: Any) -> dict[str, Any]:
        return {name: {k: v for k, v in model[section][name].items() if k != "implementation"} for name in names}

    return kept | {
        "mixers": options("mixers", sorted(set(layers))),
        "channel_mixers": options("channel_mixers", [model["channel_mixer"]]),
    }


def adapted(source: Source, model: Mapping[str, Any]) -> Source:
    """The source for a network that sees both sides where its own sees what is before; else the source as it is.

    Args:
      model: keyword arguments of that network's Denoiser.

    Raises UserError for a network whose two directions cannot be told apart.
    """
    need, params = dict(source.model), dict(source.params)
    if need["num_layers"] != model["num_layers"]:
        return source
    theirs, ours = (parse_pattern(m["pattern"], need["num_layers"])[0] for m in (need, model))
    both = [i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair == ("rwkv7", "birwkv7")]
    notes = []
    if both:
        own = model["mixers"]["birwkv7"]
        if own["share"] == "all":
            raise UserError(
                f"{source.path} has one direction, and config.model.mixers.birwkv7.share = 'all' ties the second to "
                "it, which could not begin at zero: take 'projections' or 'none'."
            )
        layers = ["birwkv7" if i in both else name for i, name in enumerate(theirs)]
        mixers = {name: options for name, options in need["mixers"].items() if name in layers}
        mixers["birwkv7"] = need["mixers"]["rwkv7"] | {"merge": own["merge"], "share": own["share"]}
        need |= {"pattern": ",".join(layers), "mixers": mixers}
        for i in both:
            layer = params[f"block_{i}"]
            params[f"block_{i}"] = layer | {"att": _with_reverse(layer["att"], own["share"])}
        notes.append("a reverse direction with its gate at zero")
    shift = need["channel_mixers"].get("rwkv7", {}).get("shift")
    if shift == "previous" and model["channel_mixers"]["rwkv7"]["shift"] == "both":
        mixer = need["channel_mixers"]["rwkv7"] | {"shift": "both"}
        need["channel_mixers"] = need["channel_mixers"] | {"rwkv7": mixer}
        for name in [name for name in params if name.startswith("block_")]:
            ffn = params[name]["ffn"]
            params[name] = params[name] | {"ffn": ffn | {"x_k_next": np.zeros_like(ffn["x_k"])}}
        notes.append("a channel mix whose following token weighs zero")
    if not notes:
        return source
    origin = dict(source.origin) | {"adapted": notes}
    return dataclasses.replace(source, model=need, params=params, origin=origin)


def _with_reverse(att: Mapping[str, Any], share: str) -> dict[str, Any]:
    """The parameters of a `BiRWKV7` but for its merge's gate, from those of an `RWKV7`."""
    forward = dict(att["forward"])
    new = {"forward": forward, "backward": forward | {"g2": np.zeros_like(forward["g2"])}, "output": att["output"]}
    for name in ("receptance", "key", "value"):
        for prefix in ("forward_", "backward_") if share == "none" else ("",):
            new[prefix + name] = att[name]
    return new


def refuse_other_model(cfg: Any, needed: Mapping[str, Any], path: str) -> None:
    """Raises UserError, with the overrides to pass, unless config.model is the one that the weights need."""
    needed = {key: value for key, value in needed.items() if key != "vocab_size"}
    try:
        wrong = differences(needed | {"vocab_size": 2}, cfg.model.to_dict() | {"vocab_size": 2})
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"config.model: {e}") from e
    if not wrong:
        return
    told = "; ".join(f"config.model.{key} is {have!r} and must be {need!r}" for key, (have, need) in wrong.items())
    flags = " ".join(f"--config.model.{key}={need}" for key, (_, need) in wrong.items() if not isinstance(need, dict))
    hint = f"pass {flags}" if flags else ""
    if in_file := [f"c.model.{key} = {need!r}" for key, (_, need) in wrong.items() if isinstance(need, dict)]:
        hint += f"{' and ' if hint else ''}write {', '.join(in_file)} into the config file"
    raise UserError(f"{path} does not fit the config: {told}. To take these weights, {hint}.")


def check_tokenizer(source: Source, tokenizer: Tokenizer) -> None:
    """Raises UserError unless the ids mean what they meant, as far as the source says: a file says how many there are.

    Args:
      tokenizer: of the data.
    """
    if source.tokenizer is not None and source.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{source.path} was trained with another tokenizer {tokenizer.name!r} than the one of the data: prepare "
            "them with the tokenizer.json of that run."
        )
    if source.model["vocab_size"] != tokenizer.vocab_size:
        raise UserError(
            f"{source.path} has {source.model['vocab_size']} token ids, config.data.tokenizer = {tokenizer.name!r} has "
            f"{tokenizer.vocab_size} with the mask: choose the tokenizer that the weights were trained with."
        )


def put(source: Source, model: Mapping[str, Any], params: Any) -> Any:
    """`params` with the source's values: of their shapes, dtypes and shardings. What the source lacks stays.

    Args:
      model: keyword arguments of the Denoiser that the params are of.
      params: jax.Arrays, as the Denoiser was initialised.

    Raises UserError for a parameter that is not the source's in its shape, and for one of the source that there is no
    place for.
    """
    theirs = dict(source.params)
    if model["scan_layers"]:
        _, period = parse_pattern(model["pattern"], model["num_layers"])
        theirs = stack_layers(theirs, model["num_layers"], len(period))
    values = traverse_util.flatten_dict(theirs, sep="/")
    ours = traverse_util.flatten_dict(params, sep="/")
    fresh = sorted(path for path in ours if path not in values)
    if unknown := sorted(set(values) - set(ours)) or [path for path in fresh if not _may_be_new(path)]:
        raise UserError(f"{source.path} does not fit config.model: of {unknown[0]} only one of them knows.")
    for path, value in values.items():
        if value.shape != ours[path].shape:
            raise UserError(f"{source.path}: {path} has shape {value.shape}, config.model wants {ours[path].shape}.")
    placed = {path: _place(values[path], x) if path in values else x for path, x in ours.items()}
    return traverse_util.unflatten_dict(placed, sep="/")


def _may_be_new(path: str) -> bool:
    """The gate of the merge alone: it is one half, and the merge a sum, whatever is drawn for it."""
    return path.rsplit("/", 1)[-1] in ("m0", "m1", "m2")


def _place(value: np.ndarray, like: jax.Array) -> jax.Array:
    value = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(like.shape, like.sharding, value.__getitem__)


def summary(source: Source, predict_next: bool, causal: bool) -> list[str]:
    """What is said of it at the start: where the weights are from, and what they must learn anew.

    Args:
      predict_next, causal: of the network and the objective that are to be trained.
    """
    number = sum(math.prod(x.shape) for x in jax.tree.leaves(dict(source.params)))
    of = f"step {source.origin['step']}" if "step" in source.origin else f"format {source.origin['format']!r}"
    lines = [f"Starting from {source.path} ({of}; {number:,} parameters)."]
    lines += [f"It gets {note}." for note in source.origin.get("adapted", [])]
    if source.predicts_next and not (predict_next or causal):
        lines.append(
            "Its output is about the next token, and must learn to be about its own: config.model.predict_next = True "
            "would leave it where it is."
        )
    if not source.predicts_next and (predict_next or causal):
        lines.append("Its output is about its own token, and must learn to be about the next.")
    return lines
