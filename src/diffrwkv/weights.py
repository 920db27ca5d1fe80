"""Weights of the original authors' PyTorch models: their files, and their names and shapes for ours.

    state = read_state_dict("model.safetensors")
    model = Denoiser(**FORMATS["mdlm"].model(state))
    params = FORMATS["mdlm"].to_params(state)

`published` says what a file or folder of them is, from its config.json.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util

from diffrwkv import config
from diffrwkv.denoiser import Denoiser, parse_pattern
from diffrwkv.mixers import CHANNEL_MIXERS, MIXERS

StateDict = dict[str, np.ndarray]

# --- files --------------------------------------------------------------------------------------------------------

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", ".npz", *TORCH_SUFFIXES)
INDEX = "model.safetensors.index.json"  # which of several files has a tensor
WRAPPERS = ("backbone.", "model.", "module.", "_orig_mod.")  # of Lightning, of data parallelism, of torch.compile
OUTSIDE = ("sampling_eps_min", "sampling_eps_max")  # BD3-LM's range of mask rates: buffers, with no prefix


def read_state_dict(path: str | Path, *, ema: bool = False) -> StateDict:
    """The tensors of a file by name, in the file's order; bfloat16 comes as float32, all else as it is.

    A name's leading "backbone.", "model.", "module." or "_orig_mod." goes where all names share it, BD3-LM's two
    buffers aside. Of a Lightning checkpoint only "state_dict" is taken. Nothing but tensors is ever unpickled.

    Args:
      path: .npz, .safetensors, or .pt, .pth, .ckpt, .bin (need torch); or the
        "model.safetensors.index.json" of several.
      ema: take MDLM's moving average instead of the weights: the list `ema["shadow_params"]` of its Lightning
        checkpoints. It has no names. Its order is that of the module's parameters, which is the order of "state_dict"
        without buffers (here: names that end in "inv_freq", and BD3-LM's two); the number of tensors and each one's
        shape are checked, but two tensors of one shape that someone reordered would not be noticed.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: the library that reads it is not installed.
      ValueError: another suffix, a damaged file, one that is no state dict, or one without the average asked for.
    """
    path = config.at_home(path)
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}.")
    loaded = _load(path)
    state = loaded["state_dict"] if isinstance(loaded.get("state_dict"), Mapping) else loaded
    wrong = [str(name) for name, value in state.items() if not (isinstance(name, str) and hasattr(value, "shape"))]
    if wrong:
        raise ValueError(f"{path} is no state dict, as not all of it is tensors: {_some(wrong)}.")
    if ema:
        state = _with_average(path, loaded, state)
    inside = [name for name in state if name not in OUTSIDE]
    while prefix := next((p for p in WRAPPERS if inside and all(name.startswith(p) for name in inside)), None):
        state = {name if name in OUTSIDE else name.removeprefix(prefix): value for name, value in state.items()}
        inside = [name.removeprefix(prefix) for name in inside]
    return {name: _as_numpy(name, value) for name, value in state.items()}


def _load(path: Path) -> Mapping[str, Any]:
    """What a file holds, tensors in whatever type its library has."""
    try:
        if path.suffix == ".npz":
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # NumPy leaks a damaged one
                return {name: file[name] for name in file.files}
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "numpy") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        if path.name == INDEX:
            files = dict.fromkeys(config.read_json(path)["weight_map"].values())
            return {name: value for file in files for name, value in _load(path.with_name(file)).items()}
        if path.suffix in TORCH_SUFFIXES:
            torch = _torch(path)
            loaded = torch.load(path, weights_only=True, map_location="cpu")
            if not isinstance(loaded, Mapping):
                raise ValueError(f"it holds a {type(loaded).__name__}, not a dict of tensors")
            return loaded
    except ImportError:
        raise
    except Exception as e:  # whatever a damaged file makes the libraries raise
        why = " ".join(str(e).split())[:160]
        if type(e).__name__ == "UnpicklingError":
            why = (
                "it holds more than tensors, and running what is in it is not safe: load it in the project that wrote "
                'it, and save its "state_dict" (and "ema") alone'
            )
        raise ValueError(f"{path} cannot be read: {why}.") from e
    raise ValueError(f"{path.name} has no suffix of a file of weights: {', '.join(SUFFIXES)}.")


def _torch(path: Path) -> Any:
    try:
        return __import__("torch")
    except ImportError:
        raise ImportError(
            f"Reading {path.name} needs torch: pip install torch, or save the weights as .safetensors where it is "
            "installed."
        ) from None


def _as_numpy(name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):  # a tensor of torch, whose bfloat16 NumPy cannot take
        try:
            value = value.detach()
            value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
        except (AttributeError, TypeError, RuntimeError) as e:  # sparse, quantised, without data
            raise ValueError(f"{name} cannot be taken as an array: {' '.join(str(e).split())[:160]}.") from e
    return value.astype(np.float32) if value.dtype == jnp.bfloat16 else value


def _with_average(path: Path, loaded: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    try:
        average = loaded["ema"]["shadow_params"]
    except (KeyError, TypeError, IndexError):
        raise ValueError(f'{path} has no moving average ("ema" with its "shadow_params"): take its weights.') from None
    names = [name for name in state if not name.endswith("inv_freq") and name not in OUTSIDE]
    if len(average) != len(names):
        raise ValueError(f"{path}: its moving average has {len(average)} tensors for {len(names)} parameters.")
    for name, value in zip(names, average, strict=True):
        if tuple(value.shape) != tuple(state[name].shape):
            raise ValueError(
                f"{path}: its moving average is not in the order of its parameters: {tuple(value.shape)} stands where "
                f"{name} with {tuple(state[name].shape)} should."
            )
    return dict(state) | dict(zip(names, average, strict=True))


def write_state_dict(state: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Writes .safetensors or .npz, whole or not at all.

    Raises:
      OSError: it cannot be written.
      ValueError: another suffix.
    """
    path = config.at_home(path)
    temporary = path.with_name(path.stem + ".tmp" + path.suffix)
    try:
        if path.suffix == ".npz":
            arrays: dict[str, Any] = dict(state)
            np.savez(temporary, **arrays)
        elif path.suffix == ".safetensors":
            told = {"format": "pt"}  # what readers of the original look for
            temporary.touch()
            mode = temporary.stat().st_mode  # the library's own is for its owner alone
            try:
                safetensors.numpy.save_file(dict(state), temporary, metadata=told)
                temporary.chmod(mode)
            except safetensors.SafetensorError as e:
                raise OSError(f"{path} cannot be written: {e}.") from e
        else:
            raise ValueError(f"{path.name}: weights are written as .safetensors or .npz.")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- formats ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of theirs, and where it is among our parameters.

    Attributes:
      name: theirs.
      layout: "same"; "linear": torch's [out, in], ours [in, out]; "vector": theirs [1, 1, n], ours [n]; "heads":
        theirs [heads, head_dim], ours flat. A tensor of one axis is read with any axes of length 1 around it.
      paths: ours, joined by "/". Several of them share our last axis in equal parts.
    """

    name: str
    layout: str
    paths: tuple[str, ...]

    def ours(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Their tensor as ours, float32, one for each path."""
        x = np.asarray(tensor).astype(np.float32)
        x = x.T if self.layout == "linear" else x.reshape(-1) if self.layout in ("vector", "heads") else x
        return [np.ascontiguousarray(part) for part in np.split(x, len(self.paths), axis=-1)]

    def shape(self, part: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
        """The shape of their tensor, from that of each of ours."""
        *first, last = part
        last *= len(self.paths)
        match self.layout:
            case "linear":
                return (last, *first)
            case "vector":
                return (1, 1, last)
            case "heads":
                return (last // head_dim, head_dim)
        return (*first, last)

    def theirs(self, parts: list[np.ndarray], head_dim: int) -> np.ndarray:
        """Ours as their tensor, float32."""
        x = np.concatenate([np.asarray(part, np.float32) for part in parts], axis=-1)
        shape = self.shape(parts[0].shape, head_dim)
        return np.ascontiguousarray(x.T if self.layout == "linear" else x.reshape(shape))


def _linear(name: str, *paths: str, bias: bool = True) -> Iterator[Entry]:
    yield Entry(name + ".weight", "linear", tuple(p + "/kernel" for p in paths))
    if bias:
        yield Entry(name + ".bias", "same", tuple(p + "/bias" for p in paths))


def _norm(name: str, path: str, bias: bool = True) -> Iterator[Entry]:
    yield Entry(name + ".weight", "same", (path + "/scale",))
    if bias:
        yield Entry(name + ".bias", "same", (path + "/bias",))


def _mdlm_entries(num_layers: int) -> Iterator[Entry]:
    yield Entry("vocab_embed.embedding", "same", ("embedding",))
    yield from _linear("sigma_map.mlp.0", "time_embedding/hidden")
    yield from _linear("sigma_map.mlp.2", "time_embedding/out")
    for i in range(num_layers):
        theirs, ours = f"blocks.{i}.", f"block_{i}/"
        yield from _norm(theirs + "norm1", ours + "ln1", bias=False)
        yield from _linear(theirs + "attn_qkv", ours + "att/qkv", bias=False)
        yield from _linear(theirs + "attn_out", ours + "att/output", bias=False)
        yield from _norm(theirs + "norm2", ours + "ln2", bias=False)
        yield from _linear(theirs + "mlp.0", ours + "ffn/up")
        yield from _linear(theirs + "mlp.2", ours + "ffn/down")
        # (shift, scale, gate) of attention, then of the MLP
        yield from _linear(theirs + "adaLN_modulation", ours + "modulate1/linear", ours + "modulate2/linear")
    yield from _norm("output_layer.norm_final", "ln_out", bias=False)
    yield Entry("output_layer.linear.weight", "linear", ("head",))
    yield Entry("output_layer.linear.bias", "same", ("head_bias",))
    yield from _linear("output_layer.adaLN_modulation", "modulate_out/linear")


def _mdlm_model(state: Mapping[str, np.ndarray], num_layers: int) -> dict[str, Any]:
    vocab_size, dim = _matrix(state, "vocab_embed.embedding")
    head_dim = 64
    if (frequencies := state.get("rotary_emb.inv_freq")) is not None:
        head_dim = 2 * frequencies.size
        if not head_dim or not jnp.issubdtype(frequencies.dtype, jnp.floating):
            raise ValueError(f"rotary_emb.inv_freq must hold floating-point numbers, found {frequencies.dtype}.")
        expected = rotary_frequencies(head_dim)
        if not np.allclose(np.asarray(frequencies, np.float32), expected, rtol=1e-2):  # they may have been bfloat16
            raise ValueError("rotary_emb.inv_freq: rotary positions have another base than 10,000.")
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "num_layers": num_layers,
        "pattern": "attention",
        "mixers": {"attention": {"head_dim": head_dim, "rotary_base": 10_000.0}},
        "channel_mixer": "mlp",
        "channel_mixers": {"mlp": {"expansion": _matrix(state, "blocks.0.mlp.0.weight")[0] / dim}},
        "block": "dit",
        "time_conditioning": False,
        "condition_dim": _matrix(state, "sigma_map.mlp.0.weight")[0],
        "tie_embeddings": False,
    }


def rotary_frequencies(head_dim: int) -> np.ndarray:
    """MDLM's buffer "rotary_emb.inv_freq", float32 [head_dim / 2]."""
    return (10_000.0 ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def _mdlm_buffers(head_dim: int) -> StateDict:
    return {"rotary_emb.inv_freq": rotary_frequencies(head_dim)}


RWKV7_VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a")


def _rwkv7_entries(num_layers: int) -> Iterator[Entry]:
    yield Entry("emb.weight", "same", ("embedding",))
    yield from _norm("blocks.0.ln0", "ln0")
    for i in range(num_layers):
        theirs, ours = f"blocks.{i}.", f"block_{i}/"
        att, forward = theirs + "att.", ours + "att/forward/"
        yield from _norm(theirs + "ln1", ours + "ln1")
        yield from _norm(theirs + "ln2", ours + "ln2")
        for name in RWKV7_VECTORS:
            if name != "v0" or i:
                yield Entry(att + name, "vector", (forward + name,))
        yield Entry(att + "r_k", "heads", (forward + "r_k",))
        for name in (z + end for z in _loras(i) for end in "12"):
            yield Entry(att + name, "same", (forward + name,))
        for name in ("receptance", "key", "value", "output"):
            yield from _linear(att + name, f"{ours}att/{name}", bias=False)
        yield Entry(att + "ln_x.weight", "same", (forward + "ln_x_scale",))
        yield Entry(att + "ln_x.bias", "same", (forward + "ln_x_bias",))
        yield Entry(theirs + "ffn.x_k", "vector", (ours + "ffn/x_k",))
        yield from _linear(theirs + "ffn.key", ours + "ffn/key", bias=False)
        yield from _linear(theirs + "ffn.value", ours + "ffn/value", bias=False)
    yield from _norm("ln_out", "ln_out")
    yield Entry("head.weight", "linear", ("head",))


def _rwkv7_model(state: Mapping[str, np.ndarray], num_layers: int) -> dict[str, Any]:
    last = f"blocks.{num_layers - 1}.att."
    return _rwkv7_fields(
        num_layers,
        embedding=_matrix(state, "emb.weight"),
        ranks={z: _matrix(state, last + z + "1")[1] for z in _loras(num_layers - 1)},
        head_dim=_matrix(state, "blocks.0.att.r_k")[1],
        hidden=_matrix(state, "blocks.0.ffn.key.weight")[0],
    )


def _loras(layer: int) -> str:
    return "wavg" if layer else "wag"  # layer 0 has no v of an earlier layer to mix in


def _rwkv7_fields(
    num_layers: int, embedding: tuple[int, int], ranks: dict[str, int], head_dim: int, hidden: int
) -> dict[str, Any]:
    vocab_size, dim = embedding
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "num_layers": num_layers,
        "pattern": "rwkv7",
        "mixers": {"rwkv7": {"head_dim": head_dim, "lora_ranks": ranks, "a_scale": 1.0}},
        "channel_mixer": "rwkv7",
        "channel_mixers": {"rwkv7": {"expansion": hidden / dim, "shift": "previous"}},
        "block": "rwkv7",
        "time_conditioning": False,
        "tie_embeddings": False,
    }


FLA_PROJECTIONS = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output"}


def _fla_entries(num_layers: int) -> Iterator[Entry]:
    yield Entry("model.embeddings.weight", "same", ("embedding",))
    yield from _norm("model.layers.0.pre_norm", "ln0")
    for i in range(num_layers):
        theirs, ours = f"model.layers.{i}.", f"block_{i}/"
        att, forward = theirs + "attn.", ours + "att/forward/"
        yield from _norm(theirs + "attn_norm", ours + "ln1")
        yield from _norm(theirs + "ffn_norm", ours + "ln2")
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            yield Entry(att + name, "vector", (forward + name,))
        for name in ("k_k", "k_a"):
            yield Entry(att + name, "same", (forward + name,))
        yield Entry(att + "r_k", "heads", (forward + "r_k",))
        for z in _loras(i):
            yield Entry(f"{att}{z}_lora.lora.0.weight", "linear", (f"{forward}{z}1",))
            yield Entry(f"{att}{z}_lora.lora.2.weight", "linear", (f"{forward}{z}2",))
            if z != "g":
                yield Entry(f"{att}{z}_lora.lora.2.bias", "same", (f"{forward}{z}0",))
        for name, path in FLA_PROJECTIONS.items():
            yield from _linear(att + name, f"{ours}att/{path}", bias=False)
        yield Entry(att + "g_norm.weight", "same", (forward + "ln_x_scale",))
        yield Entry(att + "g_norm.bias", "same", (forward + "ln_x_bias",))
        yield Entry(theirs + "ffn.x_k", "same", (ours + "ffn/x_k",))
        yield from _linear(theirs + "ffn.key", ours + "ffn/key", bias=False)
        yield from _linear(theirs + "ffn.value", ours + "ffn/value", bias=False)
    yield from _norm("model.norm", "ln_out")
    yield Entry("lm_head.weight", "linear", ("head",))


def _fla_model(state: Mapping[str, np.ndarray], num_layers: int) -> dict[str, Any]:
    last = f"model.layers.{num_layers - 1}.attn."
    return _rwkv7_fields(
        num_layers,
        embedding=_matrix(state, "model.embeddings.weight"),
        ranks={z: _matrix(state, f"{last}{z}_lora.lora.0.weight")[0] for z in _loras(num_layers - 1)},
        head_dim=_matrix(state, "model.layers.0.attn.r_k")[1],
        hidden=_matrix(state, "model.layers.0.ffn.key.weight")[0],
    )


def _fla_today(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their first version had x_r ... x_g of a layer in one tensor x_x, [6, n] or [6, 1, 1, n]."""
    today: dict[str, np.ndarray] = {}
    for name, value in state.items():
        if name.endswith(".attn.x_x") and len(value.shape) and value.shape[0] == 6:
            today |= {f"{name.removesuffix('x')}{z}": value[i] for i, z in enumerate("rwkvag")}
        else:
            today[name] = value
    return today


def _matrix(state: Mapping[str, np.ndarray], name: str) -> tuple[int, int]:
    shape = tuple(state[name].shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} must have two dimensions, found {shape}.")
    return shape


@dataclasses.dataclass(frozen=True)
class Format:
    """How one project names and lays out its weights. The three methods are its use.

    Attributes:
      name: in FORMATS.
      mixer: ours that its layers have.
      entries: number of layers -> the tensors that there must be.
      read_model: (complete state dict, number of layers) -> keyword arguments of the Denoiser.
      optional: names that may be there as well, and are not needed.
      buffers: width of a head -> what is written beside the parameters.
      layers: what stands before the number of a layer in a name.
      today: (state dict) -> the same in the names of today, where a project has changed them.
    """

    name: str
    mixer: str
    entries: Callable[[int], Iterable[Entry]]
    read_model: Callable[[Mapping[str, np.ndarray], int], dict[str, Any]]
    optional: frozenset[str]
    buffers: Callable[[int], StateDict] = lambda head_dim: {}
    layers: str = "blocks."
    today: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] = lambda state: state

    def model(self, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The keyword arguments of the `Denoiser` that these weights need, vocab_size included.

        They are read off the shapes. "mdlm": head_dim is 64 unless "rotary_emb.inv_freq" is there to say it.
        time_conditioning is always False: weights do not show whether they were trained with it. What is published
        with a config.json says so (`published.read`).

        Raises:
          ValueError: names the keys that are missing and those that are too many.
        """
        state = self.today(state)
        return self.read_model(state, self._num_layers(state))

    def to_params(self, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The Denoiser's parameters, float32, layers unstacked (see `stack_layers`).

        Raises:
          ValueError: names the keys that are missing and those that are too many, or the tensor whose shape, dtype or
            numbers are wrong.
        """
        state = self.today(state)
        model = self.model(state)
        shapes = parameter_shapes(model)
        flat: dict[str, np.ndarray] = {}
        for entry in self.entries(model["num_layers"]):
            tensor, part = state[entry.name], shapes[entry.paths[0]]
            expected = entry.shape(part, model["mixers"][self.mixer]["head_dim"])
            if len(part) == 1 and entry.layout != "heads" and _long_axes(tensor.shape) == _long_axes(expected):
                tensor = tensor.reshape(expected)
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{entry.name} must have shape {expected}, found {tuple(tensor.shape)}.")
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                raise ValueError(f"{entry.name} must hold floating-point numbers, found {tensor.dtype}.")
            with np.errstate(over="ignore"):
                ours = entry.ours(tensor)
            if not all(np.isfinite(part).all() for part in ours):
                raise ValueError(f"{entry.name} holds numbers that are not finite in float32.")
            flat |= zip(entry.paths, ours, strict=True)
        return traverse_util.unflatten_dict(flat, sep="/")

    def to_state_dict(self, params: Mapping[str, Any], model: Mapping[str, Any]) -> StateDict:
        """The weights under their names, float32. What they do not use (layer 0's v0, v1, v2 of RWKV-7) is left out.

        Args:
          params: of the Denoiser, layers stacked or not.
          model: its keyword arguments, vocab_size included: shapes alone do not tell the width of a head.

        Raises:
          ValueError: names what this format has no place for, parameters or keyword arguments, or the parameter whose
            shape is wrong.
        """
        params = traverse_util.flatten_dict(unstack_layers(params), sep="/")
        entries = list(self.entries(_setting(model, ("num_layers",))))
        self._check_names(params, [path for entry in entries for path in entry.paths], "parameters")
        shapes = parameter_shapes(model)
        for path, value in params.items():
            if tuple(value.shape) != shapes[path]:
                raise ValueError(f"{path} must have shape {shapes[path]}, found {tuple(value.shape)}.")
        head_dim = _setting(model, ("mixers", self.mixer, "head_dim"))
        state = {e.name: e.theirs([params[path] for path in e.paths], head_dim) for e in entries}
        state |= self.buffers(head_dim)
        # predict_next shows in no weight, and the project's own network does without it
        if differing := differences(self.model(state) | {"predict_next": False}, model):
            told = ", ".join(f"{key} = {have!r} (not {need!r})" for key, (have, need) in differing.items())
            raise ValueError(f"The format {self.name!r} cannot hold a model with {told}.")
        return state

    def _num_layers(self, state: Mapping[str, Any]) -> int:
        """Of a complete state dict; raises ValueError for any other."""
        layer = re.compile(re.escape(self.layers) + r"(\d+)\.")
        layers = [int(match[1]) for name in state if (match := layer.match(name))]
        number = min(max(layers, default=0) + 1, len(state) + 1)  # a layer has several names: too many are missing some
        self._check_names(state, [entry.name for entry in self.entries(number)], "tensors")
        return number

    def _check_names(self, found: Mapping[str, Any], expected: list[str], what: str) -> None:
        known = set(expected)
        missing = [name for name in expected if name not in found]
        surplus = [name for name in found if name not in known and name not in self.optional]
        told = [f"{word} {_some(names)}" for word, names in (("missing", missing), ("surplus", surplus)) if names]
        if told:
            raise ValueError(f"These are not the {what} of a model of format {self.name!r}: {'; '.join(told)}.")


def _long_axes(shape: Iterable[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


FORMATS = {
    # kuleshov-group/mdlm, models/dit.py; so are the networks of BD3-LM, SEDD and Duo named
    "mdlm": Format(
        "mdlm", "attention", _mdlm_entries, _mdlm_model, frozenset({"rotary_emb.inv_freq", *OUTSIDE}), _mdlm_buffers
    ),
    # BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py
    "rwkv7": Format("rwkv7", "rwkv7", _rwkv7_entries, _rwkv7_model, frozenset(f"blocks.0.att.v{i}" for i in range(3))),
    # fla-org/flash-linear-attention, fla/models/rwkv7: the same network
    "fla": Format("fla", "rwkv7", _fla_entries, _fla_model, frozenset(), layers="model.layers.", today=_fla_today),
}


# --- models and their parameters ----------------------------------------------------------------------------------


def parameter_shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """{"block_0/att/...": shape} of the Denoiser with these keyword arguments, layers unstacked."""
    return dict(_shapes_of(_Named(model)))


class _Named(dict):
    """Keyword arguments as a key: what says the same in another order may have another hash, and is traced again."""

    def __hash__(self):  # type: ignore[override]
        return hash(repr(self))


@functools.lru_cache(maxsize=16)
def _shapes_of(model: _Named) -> dict[str, tuple[int, ...]]:
    denoiser = Denoiser(**(dict(model) | {"scan_layers": False}))
    example = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)
    params = nn.unbox(jax.eval_shape(denoiser.init, jax.random.key(0), *example))["params"]
    return {path: tuple(x.shape) for path, x in traverse_util.flatten_dict(params, sep="/").items()}


def _setting(model: Mapping[str, Any], key: tuple[str, ...]) -> Any:
    """One keyword argument of a Denoiser, or ("mixers", name, option), or its default."""
    if len(key) == 1:
        return model.get(key[0], Denoiser.__dataclass_fields__[key[0]].default)
    section, name, option = key
    default = {"mixers": MIXERS, "channel_mixers": CHANNEL_MIXERS}[section][name].__dataclass_fields__[option].default
    return dict(dict(model.get(section, {})).get(name, {})).get(option, default)


def differences(needed: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{"a.b": (value in model, needed value)} of what `model` has otherwise than `needed`.

    Both are keyword arguments of a Denoiser, vocab_size included. What `needed` does not name may be anything. A
    pattern is as good as another that gives the same layers, and ranks of low-rank maps as the rule that gives them.
    """
    keys: list[tuple[str, ...]] = []
    for section, value in needed.items():
        if section in ("mixers", "channel_mixers"):
            keys += [(section, name, option) for name, options in value.items() for option in options]
        else:
            keys.append((section,))
    pairs = {".".join(key): (_setting(model, key), _setting(needed, key)) for key in keys}
    differing = {key: (have, need) for key, (have, need) in pairs.items() if have != need}
    if "num_layers" not in differing and "pattern" in differing:
        layers = [parse_pattern(pattern, needed["num_layers"])[0] for pattern in differing["pattern"]]
        if layers[0] == layers[1]:
            del differing["pattern"]
    if (
        differing
        and all(key.endswith(".lora_ranks") for key in differing)
        and parameter_shapes(needed) == parameter_shapes(model)
    ):
        return {}
    return differing


def stack_layers(params: Mapping[str, Any], num_layers: int, period: int = 1) -> dict[str, Any]:
    """The parameters of `scan_layers=False` as those of `scan_layers=True`.

    Args:
      params: {"block_0": ..., "block_1": ..., and others}.
      num_layers: of the Denoiser.
      period: the number of layers after which its pattern begins anew (`denoiser.parse_pattern`).

    Returns:
      The same weights; layers of whole periods after the first one stand in `blocks`, one behind the other along a new
      leading axis of NumPy arrays.
    """
    repeats = num_layers // period - 1
    if repeats < 1:
        return dict(params)
    stacked = range(period, period * (repeats + 1))
    blocks = {
        f"block_{place}": jax.tree.map(lambda *x: np.stack(x), *(params[f"block_{i}"] for i in stacked[place::period]))
        for place in range(period)
    }
    rest = {name: value for name, value in params.items() if name not in {f"block_{i}" for i in stacked}}
    return rest | {"blocks": blocks}


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """What `stack_layers` was given, from what it returned; parameters without `blocks` as they are."""
    plain = {name: value for name, value in params.items() if name != "blocks"}
    blocks = params.get("blocks", {})
    for place in range(len(blocks)):
        stacked = blocks[f"block_{place}"]
        for repeat in range(jax.tree.leaves(stacked)[0].shape[0]):
            layer = len(blocks) * (repeat + 1) + place
            plain[f"block_{layer}"] = jax.tree.map(lambda x, repeat=repeat: x[repeat], stacked)
    return plain
