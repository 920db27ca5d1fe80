"""A run: what its workdir holds, read, checked, built and recorded. Every program starts from here."""

import dataclasses
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

import diffrwkv
from diffrwkv import checkpoint, config, data, evaluations, optim, releases, sharding
from diffrwkv.config import UserError
from diffrwkv.data import Dataset, Tokenizer, manifest
from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.objectives import Objective
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.workdir import has_checkpoints, named, read_record

MOST_LOGITS = 2**34  # of a pass, 64 GiB in float32: more are refused before any memory is taken


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds, ready to use.

    Attributes:
      model, tokenizer: built from config.json and tokenizer.json.
      objective: of config.json, with what it learned.
      params: float32 weights on the mesh; the moving average unless `raw` was asked for.
      step: of the checkpoint.
      config: the stored ConfigDict.
      mesh: that the params lie on.
      learned: the state of the objective.
      generators: what was compiled to generate from it, by sampler; `generation.compiled` fills it.
    """

    model: Denoiser
    objective: Objective
    tokenizer: Tokenizer
    params: Any
    step: int
    config: Any
    mesh: Mesh
    learned: Any = dataclasses.field(default_factory=dict, repr=False, compare=False)
    generators: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A trained model of which no weight is on a device yet: a workdir's, or one that was released.

    Attributes:
      name: as it was given.
      config: the stored ConfigDict.
      tokenizer: of its ids.
      data: what was recorded of the text that it was trained with; {} where nothing was.
      source: the workdir, or what was released.
    """

    name: str
    config: Any
    tokenizer: Tokenizer
    data: Mapping[str, Any]
    source: Path | releases.Release = dataclasses.field(repr=False)

    @property
    def folder(self) -> Path:
        """Where programs keep what they find of it: the workdir, or one in the cache for these weights."""
        if isinstance(self.source, Path):
            return self.source
        slug = re.sub(r"[^A-Za-z0-9_.]+", "-", self.name).strip("-.")[-60:]
        return manifest.cache_root() / "models" / f"{slug}-{self.source.sha256[:8]}"

    def load(self, mesh: Mesh, *, step: str | int | None = None, raw: bool = False) -> Run:
        """As `load_run`."""
        if isinstance(self.source, Path):
            return load_run(self.source, mesh, step=step, raw=raw)
        return _of_release(self.name, self.source, mesh, step=step, raw=raw)

    def own_data(self, root: str | None, flag: str, length: int | None = None) -> Dataset:
        """The data that it was trained with, in rows of `length` tokens (None: as then).

        Args:
          root: where they lie; None: as config.data says.
          flag: that names other text, for those who have not got them.

        Raises UserError where they are not there, or not the same, or nothing says of a release which they are.
        """
        if not self.data:
            raise UserError(f"Nothing says which text {self.name} was trained with: name one by {flag}.")
        cfg = self.config.copy_and_resolve_references()
        cfg.data.length = length or cfg.data.length
        try:
            dataset = load_data(cfg, root, tokenizer=self.tokenizer)
        except UserError as e:
            if isinstance(self.source, Path):
                raise
            raise UserError(
                f"The text that {self.name} was trained with is not here; {flag} names another. ({e})"
            ) from e
        check_same_data(self.name, self.data, dataset)
        return dataset

    def weights_hash(self, step: int) -> str | None:
        """A hash of the weights; None where training has removed them since they were read."""
        source = self.source
        return evaluations.weights_hash(source, step) if isinstance(source, Path) else source.sha256


def opened(workdir: str | None, model: str | None = None) -> Opened:
    """What --workdir or --model names, one of the two.

    Raises UserError for a missing or unreadable file.
    """
    if model is None:
        folder = named(workdir or "")
        cfg, tokenizer = config.load(folder / "config.json"), load_tokenizer(folder)
        return Opened(str(folder), cfg, tokenizer, read_record(folder)["data"], folder)
    release = _read_release(model)
    return Opened(model, release.config, release.tokenizer, release.data, release)


def load_run(workdir: Path, mesh: Mesh, *, step: str | int | None = None, raw: bool = False) -> Run:
    """Reads a workdir, or a model that was released (`releases.opened`).

    Args:
      workdir: a folder, a file of weights, or "hf:OWNER/NAME".
      step: a step's number, "best", or None for the newest readable one.
      raw: the weights themselves, not their average.

    Raises UserError for a missing or unreadable file, or a tokenizer that is not the checkpoint's.
    """
    if releases.is_release(workdir):
        return _of_release(str(workdir), _read_release(workdir), mesh, step=step, raw=raw)
    cfg = config.load(workdir / "config.json")
    tokenizer = load_tokenizer(workdir)
    model, objective = build(cfg, tokenizer)
    boxed = abstract_params(model, cfg.data.length)
    shardings = sharding.param_shardings(boxed, mesh)
    weights = "params" if raw else "ema"
    abstract = {weights: checkpoint.abstract_like(nn.unbox(boxed), shardings)}
    if own := jax.eval_shape(objective.init_state):
        whole = sharding.replicated(mesh)
        abstract["objective"] = checkpoint.abstract_like(own, jax.tree.map(lambda _: whole, own))
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        if step == "best":
            number = checkpoints.best_step()
            if number is None:
                raise UserError(f"No checkpoint in {workdir} has a validation NELBO: name a --step.")
        elif step is None:
            number = None
        else:
            try:
                number = int(step)
            except ValueError:
                raise UserError(f"--step must be a number or 'best', got {step!r}.") from None
        number, parts = checkpoints.restore_parts(abstract, number)
    learned = parts.get("objective", {})
    return Run(model, objective.settled(learned), tokenizer, parts[weights], number, cfg, mesh, learned)


def _read_release(source: str | os.PathLike) -> releases.Release:
    try:
        return releases.opened(source)
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        raise UserError(str(e)) from e


def _of_release(name: str, release: releases.Release, mesh: Mesh, *, step: str | int | None, raw: bool) -> Run:
    if step is not None or raw:
        raise UserError(f"{name} has one set of weights: leave --step and --raw out.")
    cfg, tokenizer = release.config, release.tokenizer
    model, objective = build(cfg, tokenizer)
    try:
        learned = release.objective_state(objective)
    except (ValueError, TypeError) as e:
        raise UserError(f"{name}: {e}") from e
    if mesh.size == 1:  # what there is to know of the axes takes half a second
        places = sharding.replicated(mesh)
    else:
        places = sharding.param_shardings(abstract_params(model, cfg.data.length), mesh)
    params = jax.device_put(release.params, places)
    return Run(model, objective.settled(learned), tokenizer, params, release.step, cfg, mesh, learned)


def load_tokenizer(workdir: Path) -> Tokenizer:
    """`<workdir>/tokenizer.json`. Raises UserError unless it is the one that the run was trained with."""
    path = workdir / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_json(config.read_json(path))
    except FileNotFoundError:
        raise UserError(f"No tokenizer.json in {workdir}: without it token ids have no meaning.") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}).") from None
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise UserError(f"{path} is not a tokenizer ({e}).") from None
    trained = read_record(workdir)["data"]["tokenizer_fingerprint"]
    if trained != tokenizer.fingerprint:
        raise UserError(
            f"{path} is not the tokenizer that this checkpoint was trained with: put the original file back "
            f"(fingerprint {trained[:12]}, this one has {tokenizer.fingerprint[:12]})."
        )
    return tokenizer


def load_data(cfg: Any, root: str | None = None, tokenizer: Tokenizer | None = None) -> Dataset:
    """`data.load(**config.data)`, its errors as UserError; `root` and `tokenizer` replace the config's."""
    arguments = cfg.data.to_dict()
    if root is not None:
        arguments["root"] = root
    if tokenizer is not None:
        arguments["tokenizer"] = tokenizer
    try:
        return data.load(**arguments)
    except (ValueError, OSError, ImportError, RuntimeError) as e:
        raise UserError(str(e)) from e


def check_same_data(name: str | os.PathLike, trained: Mapping[str, Any], dataset: Dataset) -> None:
    """Raises UserError when the text or its tokens are not those that the run was trained with.

    Args:
      name: of the run.
      trained: what is recorded of its data.
    """
    for key, what in (("tokenizer_fingerprint", "tokenizer"), ("sha256", "text")):
        old, new = trained.get(key), dataset.info.get(key)
        if old is not None and old != new:
            raise UserError(
                f"The {what} of data set {dataset.info['name']!r} is not the one that {name} was trained with "
                f"({old[:12]} then, {str(new)[:12]} now): restore the data, or take another --workdir."
            )
    for split in ("train", "validation"):  # one text can be divided in many ways
        old, new = (info.get(split, {}).get("sha256") for info in (trained, dataset.info))
        if old is not None and old != new:
            raise UserError(
                f"Data set {dataset.info['name']!r} is divided in another way than when {name} was trained with it: "
                f"its {split} text is not the same. Restore the data, or take another --workdir."
            )


def check_same_run(cfg: Any, workdir: Path) -> bool:
    """Whether the workdir holds a run already. Raises UserError when its config differs where it must not."""
    if has_checkpoints(workdir):
        for name, what in (("config.json", "under what config"), ("run.json", "on what data")):
            if not (workdir / name).exists():
                raise UserError(
                    f"{workdir} has checkpoints but no {name}, which says {what} they were trained: put it back, or "
                    "take another --workdir."
                )
    if not (workdir / "config.json").exists():
        return False
    changed = config.differences(config.load(workdir / "config.json"), cfg)
    refused = [f"config.{k}: {a!r} there, {b!r} here" for k, (a, b) in changed.items() if not config.resumable(k)]
    if refused:
        raise UserError(
            f"{workdir} was written by another config ({'; '.join(refused)}): take another --workdir, or set "
            "these keys back."
        )
    for k, (a, b) in changed.items():
        print(f"Going on with config.{k} = {b!r}, which was {a!r}.", flush=True)
    if "train.num_steps" in changed and cfg.optim.schedule != "constant":
        print(f"The {cfg.optim.schedule} schedule is stretched to the new number of steps.", flush=True)
    return True


def started_from(workdir: Path) -> Mapping[str, Any] | None:
    """What run.json says of the weights that the run started from (`initial.Source.origin`); None: random ones."""
    return read_record(workdir).get("initial") if (workdir / "run.json").exists() else None


def record_run(
    cfg: Any,
    workdir: Path,
    tokenizer: Tokenizer,
    info: Mapping[str, Any],
    mesh: Mesh,
    parameters: int,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, tokenizer.json and run.json (data, versions, devices, and `started_from`)."""
    config.save(cfg, workdir / "config.json")
    config.write_json(tokenizer.to_json(), workdir / "tokenizer.json")
    record = {
        "data": dict(info),
        "parameters": parameters,
        "devices": {"kind": jax.devices()[0].device_kind, "count": mesh.size, "mesh": dict(mesh.shape)},
        "versions": {
            "diffrwkv": diffrwkv.__version__,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "python": platform.python_version(),
        },
    }
    if origin is not None:
        record["initial"] = dict(origin)
    config.write_json(config.seal(record), workdir / "run.json")


def build(cfg: Any, tokenizer: Tokenizer) -> tuple[Denoiser, Objective]:
    """(denoiser, objective) of a config; their errors as UserError."""
    try:
        model = Denoiser(vocab_size=tokenizer.vocab_size, **cfg.model.to_dict())
        vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.mask_id)
        objective = objectives.from_config(vocabulary, **cfg.diffusion.to_dict(), sections=cfg.to_dict())
        sees_later = not model.causal
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(str(e)) from e
    if objective.causal and sees_later:
        raise UserError(
            f"config.diffusion.name = {cfg.diffusion.name!r} predicts the next token, but config.model sees it: take a "
            'causal pattern ("rwkv7", "causal_attention", "mamba2"), channel_mixers.rwkv7.shift = "previous" and '
            'reading = "once".'
        )
    if objective.causal and model.predict_next:
        raise UserError(
            f"config.diffusion.name = {cfg.diffusion.name!r} shifts the text itself: set config.model.predict_next = "
            "False."
        )
    if objective.process.needs_time and not model.time_conditioning:
        raise UserError(
            f"config.diffusion.name = {cfg.diffusion.name!r} needs a network that is told the time: set "
            "config.model.time_conditioning = True."
        )
    return model, objective


def abstract_params(model: Denoiser, length: int) -> Any:
    """Shapes of the parameters with their logical axis names (boxed), without computing anything."""
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    times = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        return jax.eval_shape(model.init, jax.random.key(0), tokens, times)["params"]
    except (ValueError, TypeError) as e:
        raise UserError(f"config.model: {e}") from e


def make_optimizer(cfg: Any, abstract: Any) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """`optim.make_optimizer(..., **config.optim)`, its errors as UserError."""
    try:
        return optim.make_optimizer(abstract, cfg.train.num_steps, **cfg.optim.to_dict())
    except (ValueError, TypeError) as e:
        raise UserError(f"config.optim: {e}") from e


def is_padded(cfg: Any) -> bool:
    """Whether training rows can have padding, so that the network must be told what is valid."""
    return cfg.data.packing == "document"
