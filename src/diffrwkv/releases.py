"""A model as a folder of the hub, written and read: weights, config.json, diffrwkv.json, a card.

What is written can be read again to the last bit: diffrwkv.json holds the whole config, the tokenizer and what the
objective learned. Where another project's class has the same network, names and config.json are that class's, so that
it loads them too: MDLM's and BD3-LM's Transformer, and flash-linear-attention's RWKV-7. Else names are ours.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import diffrwkv
from diffrwkv import config, files, hub, published
from diffrwkv.data import Tokenizer, tokenizers
from diffrwkv.diffusion.objectives import Objective
from diffrwkv.weights import (
    FORMATS,
    SUFFIXES,
    StateDict,
    parameter_shapes,
    read_state_dict,
    unstack_layers,
    write_state_dict,
)

OWN = "diffrwkv.json"
WEIGHTS = "model.safetensors"
LOCAL = (("data", "root"), ("train", "compilation_cache"), ("train", "init_from"))  # what is said of no release


@dataclasses.dataclass(frozen=True)
class Release:
    """A model that can be run.

    Attributes:
      config: the ConfigDict.
      tokenizer: of its ids.
      params: as config.model has them, float32.
      objective: the leaves of its objective's state, [] for none; `objective_state` makes it of them.
      step: of the training.
      data: what was recorded of the text that it was trained with; {} where nothing was.
      file: of the weights.
    """

    config: Any
    tokenizer: Tokenizer
    params: dict[str, Any]
    objective: list[Any]
    step: int
    data: Mapping[str, Any]
    file: Path

    @functools.cached_property
    def sha256(self) -> str:
        """Of the weights' file, read when it is first asked for."""
        return files.file_sha256(self.file)

    def objective_state(self, objective: Objective) -> Any:
        """The state of the objective that config names, as it was; as it begins where nothing was learned.

        Raises ValueError where it is not of that objective.
        """
        state = objective.init_state()
        leaves, tree = jax.tree.flatten(state)
        if not self.objective:
            return state
        given = [np.asarray(value, leaf.dtype) for value, leaf in zip(self.objective, leaves, strict=True)]
        if any(value.shape != leaf.shape for value, leaf in zip(given, leaves, strict=True)):
            raise ValueError(f"{OWN} has not the state of config.diffusion.name = {self.config.diffusion.name!r}.")
        return jax.tree.unflatten(tree, [jnp.asarray(value) for value in given])


def is_release(source: str | os.PathLike) -> bool:
    """Whether it is a model of the hub, a folder with the config.json of a published model, or a file of weights."""
    if hub.is_model(source):
        return True
    path = config.at_home(source)
    return config.of_others(path / "config.json") or (path.is_file() and path.suffix in SUFFIXES)


def opened(source: str | os.PathLike) -> Release:
    """The model of a folder, a file or the hub, ours or another's.

    Raises:
      ValueError: it is none that can be run here: the sentence says why.
      OSError, ImportError, RuntimeError: something is missing that it needs.
    """
    path = hub.local(source)
    if (path / OWN).is_file():
        return _own(path)
    found = published.read(path, name=os.fspath(source))
    cfg = published.experiment(found)
    if found.tokenizer is None:
        raise ValueError(
            f"{source} has {found.model['vocab_size']} token ids, and nothing says of which tokenizer: make a workdir "
            "of it by python -m diffrwkv.convert, with --config.data.tokenizer=PATH/tokenizer.json."
        )
    tokenizer = tokenizers.make(found.tokenizer, root=cfg.data.root)
    params = published.stacked(found.params, cfg.model)
    return Release(cfg, tokenizer, params, [], 0, {}, published.weights_in(path))


def _own(folder: Path) -> Release:
    path = folder / OWN
    try:
        told = config.read_sealed(path)
        cfg = config.restored(told["config"])
        tokenizer = Tokenizer.from_json(told["tokenizer"])
        layout, step = told["layout"], int(told["step"])
        objective, data = list(told["objective"]), dict(told["data"])
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{path} is not the description of a model ({e}).") from e
    state = read_state_dict(folder / WEIGHTS)
    model = cfg.model.to_dict() | {"vocab_size": tokenizer.vocab_size}
    params = FORMATS[layout].to_params(state) if layout in FORMATS else _from_own_names(state, model)
    shapes = {path: tuple(x.shape) for path, x in traverse_util.flatten_dict(params, sep="/").items()}
    if shapes != parameter_shapes(model):
        raise ValueError(f"{folder / WEIGHTS} has not the weights of the model that {path} describes.")
    params = published.stacked(params, cfg.model)
    return Release(cfg, tokenizer, params, objective, step, data, folder / WEIGHTS)


def _own_names(params: Mapping[str, Any]) -> StateDict:
    """{"block_0.att.forward.w0": array}: our paths with dots, layers unstacked, float32."""
    flat = traverse_util.flatten_dict(unstack_layers(params), sep=".")
    return {name: np.asarray(value, np.float32) for name, value in flat.items()}


def _from_own_names(state: StateDict, model: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ValueError unless the names are the model's."""
    wanted = {name.replace("/", ".") for name in parameter_shapes(model)}
    if wrong := sorted(wanted ^ set(state)):
        raise ValueError(f"{WEIGHTS} has not the tensors of the model: {', '.join(wrong[:8])} are missing or too many.")
    return traverse_util.unflatten_dict({k: v.astype(np.float32) for k, v in state.items()}, sep=".")


# --- writing ------------------------------------------------------------------------------------------------------


def write(
    folder: Path,
    *,
    cfg: Any,
    tokenizer: Tokenizer,
    params: Mapping[str, Any],
    objective: Any,
    step: int,
    record: Mapping[str, Any],
    scores: Mapping[str, float],
    dtype: str = "float32",
) -> str:
    """Writes the folder, whole or not at all; returns whose class it is, or "diffrwkv".

    Args:
      folder: a new one, or an empty one.
      params: as config.model has them.
      objective: the state of the objective.
      record: the run's run.json.
      scores: what the card says of it.
      dtype: of the weights in the file, "bfloat16" or "float32"; what reads them makes float32 of either.

    Raises:
      ValueError: the folder holds something.
      OSError: it cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: take another --output, which is then made.")
    params = jax.device_get(params)
    model = cfg.model.to_dict() | {"vocab_size": tokenizer.vocab_size}
    kind, state, outer = _as_theirs(cfg, model, params) or ("diffrwkv", _own_names(params), {})
    layout = published.KINDS[kind].format if kind in published.KINDS else "diffrwkv"
    outer = outer or {"model_type": "diffrwkv", "architectures": ["Denoiser"]}
    outer |= {"torch_dtype": dtype}
    state = {name: x.astype(dtype) if x.dtype == np.float32 else x for name, x in state.items()}
    public = cfg.copy_and_resolve_references()
    for section, key in LOCAL:
        public[section][key] = None
    told = {
        "version": diffrwkv.__version__,
        "layout": layout,
        "step": step,
        "config": public.to_dict(),
        "tokenizer": tokenizer.to_json(),
        "objective": [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(objective)],
        "data": record["data"],
    }
    part = folder.absolute().with_name(f".{folder.absolute().name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_state_dict(state, part / WEIGHTS)
        config.write_json(outer, part / "config.json")
        config.write_json(config.seal(told), part / OWN)
        (part / "README.md").write_text(_card(folder.name, kind, cfg, tokenizer, state, step, record, scores))
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return kind


def _as_theirs(cfg: Any, model: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[str, StateDict, Any] | None:
    """(kind, tensors, config.json) where another project's class computes the same; None where none does."""
    layouts = cfg.layouts.to_dict()
    dim, layers = model["dim"], model["num_layers"]
    try:
        if cfg.diffusion.name == "mdlm":
            state = FORMATS["mdlm"].to_state_dict(params, model)
            heads = dim // model["mixers"]["attention"]["head_dim"]
            sizes = {"hidden_dim": dim, "cond_dim": model["condition_dim"], "n_blocks": layers, "n_heads": heads}
            sizes |= {"vocab_size": model["vocab_size"], "model_length": cfg.data.length, "dropout": model["dropout"]}
            outer = sizes | {"time_conditioning": False}
            state = {"backbone." + name: value for name, value in state.items()}
            if cfg.diffusion.layout == "whole":
                return "mdlm", state, _of_class("mdlm", "MDLM", "kuleshov-group/mdlm-owt") | outer
            blocks = layouts.get("blocks", {})
            if cfg.diffusion.layout == "blocks" and not blocks["causal_context"] and len(blocks["sizes"]) == 1:
                low, high = cfg.objectives.mdlm.mask_rates
                buffers = {"sampling_eps_min": low, "sampling_eps_max": high}
                state |= {name: np.array(value, np.float32) for name, value in buffers.items()}
                outer |= {"block_size": blocks["sizes"][0], "cross_attn": True, "adaln": True, "causal": False}
                outer |= {"attn_backend": "sdpa", "var_min": True} | buffers
                return "bd3lm", state, _of_class("bd3lm", "BD3LM", "kuleshov-group/bd3lm-owt-block_size16") | outer
        if cfg.diffusion.name == "autoregressive" and model["mixers"]["rwkv7"]["head_dim"] == 64:
            state = FORMATS["fla"].to_state_dict(params, model)
            ranks = FORMATS["fla"].model(state)["mixers"]["rwkv7"]["lora_ranks"]
            hidden = state["model.layers.0.ffn.key.weight"].shape[0]
            outer = {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"]}
            outer |= {"vocab_size": model["vocab_size"], "hidden_size": dim, "num_hidden_layers": layers}
            outer |= {"hidden_ratio": hidden / dim, "intermediate_size": hidden, "head_dim": 64}
            names = {"w": "decay", "a": "a", "v": "v", "g": "gate"}
            outer |= {f"{names[z]}_low_rank_dim": rank for z, rank in ranks.items()}
            outer |= {"value_dim": [dim] * layers, "hidden_act": "sqrelu", "norm_first": True, "norm_bias": True}
            return "fla", state, outer | {"norm_eps": 1e-5, "attn": None, "tie_word_embeddings": False}
    except ValueError:  # the format has no place for it
        pass
    return None


def _of_class(model_type: str, name: str, home: str) -> dict[str, Any]:
    """What lets transformers take the class from the repository of its authors (trust_remote_code)."""
    places = {
        "AutoConfig": f"configuration_{model_type}.{name}Config",
        "AutoModelForMaskedLM": f"modeling_{model_type}.{name}",
    }
    auto_map = {auto: f"{home}--{place}" for auto, place in places.items()}
    return {"model_type": model_type, "architectures": [name], "auto_map": auto_map}


def _card(
    title: str,
    kind: str,
    cfg: Any,
    tokenizer: Tokenizer,
    state: StateDict,
    step: int,
    record: Mapping[str, Any],
    scores: Mapping[str, float],
) -> str:
    """README.md with front matter."""
    data = record["data"]
    tags = ["diffrwkv", "jax", cfg.diffusion.name]
    lines = ["---", "library_name: diffrwkv", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    lines += ["---", "", f"# {title}", ""]
    number = record.get("parameters", sum(int(np.prod(x.shape)) for x in state.values()))
    lines += [
        f"A model of diffrwkv: {number:,} parameters, {cfg.model.num_layers} layers "
        f"`{cfg.model.pattern}` of width {cfg.model.dim}, trained for {step:,} steps by the objective "
        f"`{cfg.diffusion.name}` in the layout `{cfg.diffusion.layout}`.",
        "",
        "```python",
        "import diffrwkv",
        "",
        'run = diffrwkv.load("FOLDER")  # or "hf:OWNER/NAME"',
        'print(diffrwkv.generate(run, "The ", max_new_tokens=64).texts[0])',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| data | `{data.get('name')}` |",
        f"| tokenizer | `{tokenizer.name}`, {tokenizer.vocab_size:,} ids, the last of them the mask |",
        f"| length | {cfg.data.length} tokens |",
        *(f"| {name} | {value:.4g} |" for name, value in scores.items()),
        "",
    ]
    if kind != "diffrwkv":
        lines += [
            f"Names and config.json are those of the class that `{kind}` has in PyTorch, which computes the same.",
            "",
        ]
    return "\n".join(lines)
