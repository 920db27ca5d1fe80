"""The weights that a run starts from, `config.train.init_from`: another run's, a release's, or what others published.

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

from diffrwkv import hub, published, releases
from diffrwkv.config import UserError
from diffrwkv.data import Tokenizer
from diffrwkv.denoiser import BLOCKS, parse_pattern
from diffrwkv.diffusion.objectives import Objective
from diffrwkv.files import file_sha256
from diffrwkv.run import load_run
from diffrwkv.weights import differences, stack_layers, unstack_layers

HOW = ("implementation", "time_mix")  # options of a mixer: which form of an operator runs
# What of config.model may be otherwise than in the source: how it is trained and computed, how it reads, and where its
# logits stand.
FREE = ("dropout", "dtype", "predict_next", "reading", "remat", "scan_layers")


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights to start from.

    Attributes:
      path: as it was given.
      model: keyword arguments of the Denoiser that they need, vocab_size included; what is not named may be anything.
      params: float32, layers unstacked.
      predicts_next: a position's output is about the token after it.
      clock: "t" or "sigma", what the network was told where it is told the time.
      tokenizer: that they were trained with; None where others published them.
      tokenizer_name: its specification, or None where nothing says it.
      origin: what run.json says of them, JSON types.
    """

    path: str
    model: Mapping[str, Any]
    params: Mapping[str, Any]
    predicts_next: bool
    clock: str
    tokenizer: Tokenizer | None
    tokenizer_name: str | None
    origin: Mapping[str, Any]


def read(cfg: Any, mesh: Mesh) -> Source:
    """The source that `config.train.init_from` names, made to fit `config.model`.

    Raises UserError for what is neither a run nor weights, and for a network that they are not of.
    """
    given = cfg.train.init_from
    try:
        path = hub.local(given)
        ours = (path / "checkpoints").exists() or (path / releases.OWN).is_file()
        source = _run(cfg, path, mesh) if ours else _published(cfg, given, path)
    except (ValueError, OSError, ImportError) as e:
        convert = " Or make a workdir of it by convert, which has this flag, and start from that." * (
            "--from=" in str(e)
        )
        raise UserError(f"config.train.init_from: {e}{convert}") from e
    source = adapted(source, cfg.model.to_dict())
    refuse_other_model(cfg, source.model, source.path)
    named = {cfg.data.tokenizer, *filter(None, [source.tokenizer_name])}
    if len(named) > 1 and not any("/" in name for name in named):
        raise UserError(
            f"{source.path} was trained with the tokenizer {source.tokenizer_name!r}, and config.data.tokenizer is "
            f"{cfg.data.tokenizer!r}: set it to the former."
        )
    return source


def _run(cfg: Any, path: Path, mesh: Mesh) -> Source:
    raw = cfg.train.init_raw
    run = load_run(path, mesh, raw=raw)
    return Source(
        path=str(path),
        model=needed(run.config.model.to_dict() | {"vocab_size": run.tokenizer.vocab_size}),
        params=unstack_layers(jax.tree.map(_whole, run.params)),
        predicts_next=run.objective.causal or run.model.predict_next,
        clock=_clock(run.objective),
        tokenizer=run.tokenizer,
        tokenizer_name=run.tokenizer.name,
        origin={"workdir": str(path), "step": run.step, "weights": "params" if raw else "ema"},
    )


def _whole(x: jax.Array) -> np.ndarray:
    """All of an array that several processes may have parts of."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def _clock(objective: Objective) -> str:
    """What a network that is told the time is told: "t" or "sigma"."""
    return getattr(objective.process, "clock", "t")


def _published(cfg: Any, given: str, path: Path) -> Source:
    if cfg.train.init_raw:
        raise UserError("config.train.init_raw is about a workdir, which has two kinds of weights: leave it out.")
    found = published.read(path, name=given)
    file = published.weights_in(path)
    name = found.settings["diffusion.name"]
    score = name.startswith("sedd")
    return Source(
        path=given,
        model=found.model,
        params=found.params,
        predicts_next=name == "autoregressive",
        clock="sigma" if score else found.settings.get(f"objectives.{name}.clock", "t"),
        tokenizer=None,
        tokenizer_name=found.tokenizer,
        origin={"file": given, "format": found.kind, "sha256": file_sha256(file)},
    )


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
        return {name: {k: v for k, v in model[section][name].items() if k not in HOW} for name in names}

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


def check_clock(source: Source, time_conditioning: bool, objective: Objective) -> None:
    """Raises UserError where the network is told the time, and would be told it in another measure than the source."""
    if time_conditioning and source.clock != _clock(objective):
        raise UserError(
            f"{source.path} was told the time as {source.clock!r}, and the objective here tells it as "
            f"{_clock(objective)!r}: set config.objectives.NAME.clock to the former, or take an objective that has it."
        )


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
    """Gates alone: that of the merge is one half, and the merge a sum, whatever is drawn; that of a seed is zero."""
    return path.rsplit("/", 1)[-1] in ("m0", "m1", "m2", "seed_gate")


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
