"""Weights of the original projects: names, layouts, files, and what is told about wrong ones."""

import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import save_file

from diffrwkv import weights
from diffrwkv.denoiser import Denoiser
from diffrwkv.weights import FORMATS, Entry, differences, read_state_dict, stack_layers, unstack_layers
from tests.golden_arrays import golden, relative_error


def filled(shapes, seed=0):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def mdlm_state(vocab=9, dim=8, layers=2, condition=6, head_dim=4, seed=0):
    """A state dict with the names and shapes of MDLM's models/dit.py, in its order."""
    shapes = {
        "vocab_embed.embedding": (vocab, dim),
        "sigma_map.mlp.0.weight": (condition, 256),
        "sigma_map.mlp.0.bias": (condition,),
        "sigma_map.mlp.2.weight": (condition, condition),
        "sigma_map.mlp.2.bias": (condition,),
        "rotary_emb.inv_freq": (head_dim // 2,),
    }
    for i in range(layers):
        b = f"blocks.{i}."
        shapes |= {b + "norm1.weight": (dim,), b + "attn_qkv.weight": (3 * dim, dim), b + "attn_out.weight": (dim, dim)}
        shapes |= {b + "norm2.weight": (dim,), b + "mlp.0.weight": (4 * dim, dim), b + "mlp.0.bias": (4 * dim,)}
        shapes |= {b + "mlp.2.weight": (dim, 4 * dim), b + "mlp.2.bias": (dim,)}
        shapes |= {b + "adaLN_modulation.weight": (6 * dim, condition), b + "adaLN_modulation.bias": (6 * dim,)}
    shapes |= {"output_layer.norm_final.weight": (dim,), "output_layer.linear.weight": (vocab, dim)}
    shapes |= {"output_layer.linear.bias": (vocab,)}
    shapes |= {"output_layer.adaLN_modulation.weight": (2 * dim, condition)}
    shapes |= {"output_layer.adaLN_modulation.bias": (2 * dim,)}
    frequencies = (10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    return filled(shapes, seed) | {"rotary_emb.inv_freq": frequencies}


def rwkv7_state(vocab=9, dim=8, layers=2, head_dim=4, ranks=(3, 5, 2, 7), unused=False):
    """A state dict with the names and shapes of RWKV-LM's RWKV-v7; `unused`: with layer 0's v0, v1, v2."""
    shapes = {"emb.weight": (vocab, dim), "blocks.0.ln0.weight": (dim,), "blocks.0.ln0.bias": (dim,)}
    for i in range(layers):
        b = f"blocks.{i}."
        shapes |= {f"{b}{norm}.{part}": (dim,) for norm in ("ln1", "ln2", "att.ln_x") for part in ("weight", "bias")}
        names = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a")
        shapes |= {b + "att." + name: (1, 1, dim) for name in names}
        shapes |= {b + "att.r_k": (dim // head_dim, head_dim), b + "ffn.x_k": (1, 1, dim)}
        for z, rank in zip("wavg", ranks, strict=True):
            if z != "v" or i or unused:
                shapes |= {f"{b}att.{z}1": (dim, rank), f"{b}att.{z}2": (rank, dim)}
        if i or unused:
            shapes[b + "att.v0"] = (1, 1, dim)
        shapes |= {f"{b}att.{name}.weight": (dim, dim) for name in ("receptance", "key", "value", "output")}
        shapes |= {b + "ffn.key.weight": (4 * dim, dim), b + "ffn.value.weight": (dim, 4 * dim)}
    return filled(shapes | {"ln_out.weight": (dim,), "ln_out.bias": (dim,), "head.weight": (vocab, dim)})


def shapes_of(model):
    """The parameters of a Denoiser as shapes."""
    example = jnp.zeros((1, 4), jnp.int32), jnp.zeros(1)
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *example))["params"]


FLA = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "ln_x": "g_norm"}


def fla_state(**options):
    """What flash-linear-attention's utils/convert_from_rwkv7.py makes of RWKV-LM's tensors: its names and shapes."""
    whole = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
    state = {}
    for name, value in rwkv7_state(**options).items():
        first, *rest = name.split(".")
        if first != "blocks":
            state[".".join([whole[first], *rest])] = value
            continue
        layer, part, *rest = rest
        part = {"att": "attn", "ffn": "ffn", "ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}[part]
        if part == "attn" and rest[0][0] in "wavg" and rest[0][1:] in ("0", "1", "2"):
            z, number = rest[0]
            rest = [f"{z}_lora.lora", {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[number]]
            value = value.reshape(-1) if number == "0" else np.ascontiguousarray(value.T)
        elif part == "attn":
            rest[0] = FLA.get(rest[0], rest[0])
        if rest[0] in ("k_k", "k_a") or (part == "ffn" and rest[0] == "x_k"):
            value = value.reshape(-1)
        state[".".join(["model.layers", layer, part, *rest])] = value
    return state


STATES = {"mdlm": mdlm_state, "rwkv7": rwkv7_state, "fla": fla_state}


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_changes_no_bit(name):
    state = STATES[name]()
    model, params = FORMATS[name].model(state), FORMATS[name].to_params(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes_of(Denoiser(**model)))
    chex.assert_trees_all_equal(FORMATS[name].to_state_dict(params, model), state)


@pytest.mark.parametrize("name", FORMATS)
def test_back_and_there_with_stacked_layers(name):
    state = STATES[name](layers=3)
    model, params = FORMATS[name].model(state), FORMATS[name].to_params(state)
    stacked = stack_layers(params, 3)
    chex.assert_trees_all_equal_shapes(stacked, shapes_of(Denoiser(scan_layers=True, **model)))
    chex.assert_trees_all_equal(FORMATS[name].to_state_dict(stacked, model | {"scan_layers": True}), state)


def test_two_projects_write_one_rwkv7():
    """Its names are the other's names for the same numbers, in any rank, with vectors of either shape."""
    options = {"dim": 16, "layers": 3, "head_dim": 8, "ranks": (1, 9, 2, 17)}
    theirs, flas = rwkv7_state(**options), fla_state(**options)
    params = FORMATS["rwkv7"].to_params(theirs)
    chex.assert_trees_all_equal(FORMATS["fla"].to_params(flas), params)
    model = FORMATS["rwkv7"].model(theirs)
    assert FORMATS["fla"].model(flas) == model
    chex.assert_trees_all_equal(FORMATS["fla"].to_state_dict(params, model), flas)
    for name, state in (("rwkv7", theirs), ("fla", flas)):
        for flat in (True, False):
            shaped = {
                key: value.reshape(-1) if flat else value.reshape(1, 1, -1)
                for key, value in state.items()
                if value.ndim in (1, 3)
            }
            chex.assert_trees_all_equal(FORMATS[name].to_params(state | shaped), params)
    first = {key: value for key, value in flas.items() if ".attn.x_" not in key}
    for i in range(3):
        own = [flas[f"model.layers.{i}.attn.x_{z}"] for z in "rwkvag"]
        first[f"model.layers.{i}.attn.x_x"] = np.stack(own).reshape(6, *((16,) if i else (1, 1, 16)))
    chex.assert_trees_all_equal(FORMATS["fla"].to_params(first), params)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 7])
def test_stacked_layers_are_the_denoisers(num_layers):
    """A pattern of two mixers, any rest: the same function, and unstacking is the inverse."""
    fields = {"dim": 8, "num_layers": num_layers, "channel_mixer": "mlp"}
    fields["pattern"] = "rwkv7,attention" if num_layers > 1 else "attention"
    fields |= {"mixers": {"rwkv7": {"head_dim": 4, "implementation": "reference"}, "attention": {"head_dim": 4}}}
    plain, scanned = (Denoiser(vocab_size=9, scan_layers=scan, **fields) for scan in (False, True))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes_of(plain))
    stacked = stack_layers(params, num_layers, min(2, num_layers))
    chex.assert_trees_all_equal_shapes(stacked, shapes_of(scanned))
    chex.assert_trees_all_equal(unstack_layers(stacked), params)
    if num_layers == 5:
        z = jnp.arange(7)[None]
        a, b = (jax.jit(m.apply)({"params": p}, z) for m, p in ((plain, params), (scanned, stacked)))
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_models_are_read_off_the_shapes():
    model = FORMATS["mdlm"].model(mdlm_state(vocab=11, dim=16, layers=3, condition=5, head_dim=8))
    assert (model["vocab_size"], model["dim"], model["num_layers"], model["condition_dim"]) == (11, 16, 3, 5)
    assert model["mixers"]["attention"]["head_dim"] == 8 and model["channel_mixers"]["mlp"]["expansion"] == 4
    state = {k: v for k, v in mdlm_state(dim=128, layers=1).items() if k != "rotary_emb.inv_freq"}
    assert FORMATS["mdlm"].model(state)["mixers"]["attention"]["head_dim"] == 64
    model = FORMATS["rwkv7"].model(rwkv7_state(vocab=11, dim=16, layers=3, head_dim=8, ranks=(1, 2, 3, 4)))
    assert (model["vocab_size"], model["dim"], model["num_layers"]) == (11, 16, 3)
    assert model["mixers"]["rwkv7"] == {
        "head_dim": 8,
        "lora_ranks": {"w": 1, "a": 2, "v": 3, "g": 4},
        "a_scale": 1.0,
    }


def test_a_layer_zero_with_its_unused_tensors_and_a_single_layer():
    for layers in (1, 2):
        with_them, without = (rwkv7_state(layers=layers, unused=unused) for unused in (True, False))
        with_them |= without
        layout = FORMATS["rwkv7"]
        chex.assert_trees_all_equal(layout.to_params(with_them), layout.to_params(without))
        assert set(layout.to_state_dict(layout.to_params(with_them), layout.model(with_them))) == set(without)


def rwkv7_golden():
    """(The arrays; the weights that they are of.)"""
    arrays = golden("rwkv7_lm_C64_L2_V19.npz")
    return arrays, {name[6:]: value for name, value in arrays.items() if name.startswith("param.")}


def test_the_rwkv7_language_model_gives_its_own_logits():
    arrays, state = rwkv7_golden()
    model, params = FORMATS["rwkv7"].model(state), FORMATS["rwkv7"].to_params(state)
    assert model["mixers"]["rwkv7"]["head_dim"] == 64
    logits = jax.jit(Denoiser(**model).apply)({"params": params}, jnp.asarray(arrays["idx"]))
    assert relative_error(logits, arrays["logits"]) < 1e-5
    written = FORMATS["rwkv7"].to_state_dict(params, model)
    chex.assert_trees_all_equal(written, state)
    as_fla = FORMATS["fla"].to_state_dict(params, model)
    chex.assert_trees_all_equal(FORMATS["fla"].to_params(as_fla), params)


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_files_keep_names_and_bits(tmp_path, suffix):
    state, path = mdlm_state(), tmp_path / ("model" + suffix)
    weights.write_state_dict(state, path)
    chex.assert_trees_all_equal(read_state_dict(path), state)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode, "others may read it who may read other files"


def test_bfloat16_is_widened(tmp_path):
    values = np.asarray([1.0, -2.5, 3e38, 1e-30])
    save_file({"a": values.astype(jnp.bfloat16), "b": values}, tmp_path / "x.safetensors")
    state = read_state_dict(tmp_path / "x.safetensors")
    assert state["a"].dtype == np.float32 and state["b"].dtype == np.float64
    np.testing.assert_array_equal(state["a"], values.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("suffix", weights.TORCH_SUFFIXES)
def test_files_of_torch(tmp_path, suffix):
    torch = pytest.importorskip("torch")
    state, path = mdlm_state(), tmp_path / ("model" + suffix)
    tensors = {"module.model." + name: torch.from_numpy(value) for name, value in state.items()}
    torch.save(tensors, path)
    read = read_state_dict(path)
    assert list(read) == list(state)
    chex.assert_trees_all_equal(read, state)
    torch.save({name: value.bfloat16().requires_grad_() for name, value in tensors.items()}, path)
    chex.assert_trees_all_close(read_state_dict(path), state, rtol=1e-2)


def test_a_lightning_checkpoint_and_its_average(tmp_path):
    torch = pytest.importorskip("torch")
    state, average, path = mdlm_state(), mdlm_state(seed=1), tmp_path / "last.ckpt"
    parameters = [torch.from_numpy(v) for name, v in average.items() if name != "rotary_emb.inv_freq"]
    whole = {"state_dict": {"backbone." + name: torch.from_numpy(v) for name, v in state.items()}, "global_step": 3}
    torch.save(whole | {"ema": {"decay": 0.9, "shadow_params": parameters}}, path)
    chex.assert_trees_all_equal(read_state_dict(path), state)
    chex.assert_trees_all_equal(read_state_dict(path, ema=True), average)
    torch.save(whole | {"ema": {"shadow_params": parameters[:-1]}}, path)
    with pytest.raises(ValueError, match="29 tensors for 30 parameters"):
        read_state_dict(path, ema=True)
    torch.save(whole | {"ema": {"shadow_params": parameters[1:] + parameters[:1]}}, path)
    with pytest.raises(ValueError, match=r"\(6, 256\) stands where backbone.vocab_embed.embedding with \(9, 8\)"):
        read_state_dict(path, ema=True)
    torch.save(whole, path)
    with pytest.raises(ValueError, match="no moving average"):
        read_state_dict(path, ema=True)
    torch.save({"model": whole, "epoch": 3}, path)
    with pytest.raises(ValueError, match="not all of it is tensors: model, epoch"):
        read_state_dict(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="holds a list"):
        read_state_dict(path)
    torch.save({"state_dict": {}, "hyper_parameters": Hyper()}, path)
    with pytest.raises(ValueError, match="more than tensors"):
        read_state_dict(path)


class Hyper:
    """What a checkpoint should not make us run."""


def test_a_shared_prefix_goes_and_others_stay(tmp_path):
    path = tmp_path / "x.npz"
    for names, expected in (
        (["backbone.a", "backbone.b"], ["a", "b"]),
        (["_orig_mod.module.a"], ["a"]),
        (["model.a", "b"], ["model.a", "b"]),
        (["blocks.a", "blocks.b"], ["blocks.a", "blocks.b"]),
        (["sampling_eps_min", "backbone.a"], ["sampling_eps_min", "a"]),
        (["backbone.a", "sampling_eps_max", "b"], ["backbone.a", "sampling_eps_max", "b"]),
    ):
        np.savez(path, **{name: np.zeros(1) for name in names})
        assert list(read_state_dict(path)) == expected


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "x.ckpt"])
def test_damaged_files(tmp_path, name):
    pytest.importorskip("torch" if name == "x.ckpt" else "numpy")
    (tmp_path / name).write_bytes(b"PK\x03\x04 and nothing of what follows")
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_state_dict(tmp_path / name)


def test_files_that_nobody_reads(tmp_path):
    with pytest.raises(FileNotFoundError, match="No file"):
        read_state_dict(tmp_path / "x.npz")
    (tmp_path / "x.bmp").touch()
    with pytest.raises(ValueError, match="no suffix of a file of weights"):
        read_state_dict(tmp_path / "x.bmp")
    with pytest.raises(ValueError, match=".safetensors or .npz"):
        weights.write_state_dict({}, tmp_path / "x.pt")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pt").touch()
    with pytest.raises(ImportError, match="x.pt needs torch: pip install torch"):
        read_state_dict(tmp_path / "x.pt")


# --- what is told about wrong weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_missing_and_surplus_names_are_told(name):
    layout, state = FORMATS[name], STATES[name](layers=3)
    second = f"{layout.layers}1."
    partial = {k: v for k, v in state.items() if not k.startswith(second)} | {"norm": np.zeros(2)}
    with pytest.raises(ValueError, match=rf"missing {second}\S+, .* and \d+ more; surplus norm\."):
        layout.to_params(partial)
    key = next(iter(state))
    with pytest.raises(ValueError, match=f"missing {key}.$"):
        layout.model({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=r"surplus a0, a1, a2, a3, a4, a5, a6, a7 and 1 more\."):
        layout.model(state | {f"a{i}": np.zeros(1) for i in range(9)})
    for other in set(FORMATS) - {name}:
        with pytest.raises(ValueError, match=f"of format '{name}': missing .* more; surplus .* more"):
            layout.to_params(STATES[other]())


def test_wrong_shapes_and_numbers_are_told():
    state = mdlm_state()
    for name, value, message in (
        ("blocks.1.mlp.2.bias", np.zeros(7), r"blocks.1.mlp.2.bias must have shape \(8,\), found \(7,\)"),
        ("blocks.1.attn_out.weight", np.zeros((8, 8), np.int8), "blocks.1.attn_out.weight must hold floating"),
        ("vocab_embed.embedding", np.zeros(9), r"vocab_embed.embedding must have two dimensions, found \(9,\)"),
        ("rotary_emb.inv_freq", np.ones(2), "another base"),
    ):
        with pytest.raises(ValueError, match=message):
            FORMATS["mdlm"].to_params(state | {name: value})
    with pytest.raises(ValueError, match=r"blocks.1.att.w0 must have shape \(1, 1, 8\), found \(4, 2\)"):
        FORMATS["rwkv7"].to_params(rwkv7_state() | {"blocks.1.att.w0": np.zeros((4, 2))})
    with pytest.raises(ValueError, match=r"blocks.1.att.w2 must have shape \(1, 8\), found \(8,\)"):
        FORMATS["rwkv7"].to_params(rwkv7_state(ranks=(1, 5, 2, 7)) | {"blocks.1.att.w2": np.zeros(8)})


def test_numbers_that_are_not_finite_are_told():
    for name in FORMATS:
        state = STATES[name](layers=1)
        last = list(state)[-1]
        for bad in (np.nan, np.inf, -np.inf, 1e300):
            value = state[last].astype(np.float64)
            value.flat[-1] = bad
            with pytest.raises(ValueError, match=f"{last} holds numbers that are not finite in float32"):
                FORMATS[name].to_params(state | {last: value})


def odd(random, value):
    """One of many things that a tensor of a file can be instead."""
    shapes = [(), (0,), value.shape[::-1], (*value.shape, 1), (1, *value.shape), (value.size,), (7,), (0, 8), (2, 3, 4)]
    dtypes = ["int8", "uint16", "int64", "bool", "float16", "float64", "complex64", "U3", "S2", "datetime64[s]", "V4"]
    dtypes += [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int4, np.dtype([("a", "f4")])]
    match random.integers(4):
        case 0:
            return np.zeros(shapes[random.integers(len(shapes))], np.float32)
        case 1:
            return np.zeros(value.shape, dtypes[random.integers(len(dtypes))])
        case 2:
            return np.full(value.shape, random.choice([np.nan, np.inf, 3e38, 1e-45, -0.0]), np.float32)
    return value[..., : random.integers(value.shape[-1] + 1)] if value.ndim else value


@pytest.mark.parametrize("name", FORMATS)
def test_odd_tensors_are_taken_or_told(name):
    random, layout = np.random.default_rng(0), FORMATS[name]
    names = ["blocks.99999999999.att.w0", "blocks.-1.x", "", "blocks.٣.x", "a" * 1000, "blocks.0"]
    told = 0
    for _ in range(150):
        state = STATES[name](layers=1)
        for key in random.choice(list(state), random.integers(1, 3), replace=False):
            match random.integers(8):
                case 0:
                    del state[key]
                case 1:
                    state[names[random.integers(len(names))]] = state[key]
                case _:
                    state[key] = odd(random, state[key])
        try:
            params = layout.to_params(state)
        except ValueError as e:
            assert str(e) and len(str(e)) < 4000
            told += 1
        else:
            for value in jax.tree.leaves(params):
                assert value.dtype == np.float32 and np.isfinite(value).all()
    assert told > 75


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_damaged_files_are_told(tmp_path, suffix):
    random, path = np.random.default_rng(0), tmp_path / f"x{suffix}"
    weights.write_state_dict({"a": np.arange(6.0), "b": np.ones((2, 3), np.float32)}, path)
    whole = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        match random.integers(3):
            case 0:
                del damaged[random.integers(len(whole)) :]
            case 1:
                for at in random.integers(len(whole), size=random.integers(1, 5)):
                    damaged[at] = random.integers(256)
            case 2:
                at = random.integers(len(whole))
                damaged[at:at] = bytes(random.integers(256, size=9, dtype=np.uint8))
        path.write_bytes(damaged)
        try:
            state = read_state_dict(path)
        except ValueError as e:
            assert "cannot be read" in str(e) or "no state dict" in str(e)
        else:
            assert all(isinstance(value, np.ndarray) for value in state.values())


@pytest.mark.parametrize("content", ["pickle", "array"])
def test_what_is_no_file_of_weights_is_told(tmp_path, content):
    if content == "pickle":
        np.savez(tmp_path / "x.npz", a=np.array([Hyper()], object))
    else:
        np.save(tmp_path / "x.npy", np.zeros(3))
        (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="x.npz cannot be read"):
        read_state_dict(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    library = np if suffix == ".npz" else safetensors.numpy
    path = tmp_path / f"x{suffix}"
    weights.write_state_dict({"a": np.zeros(2)}, path)

    def full(*arguments, **more):
        (tmp_path / f"x.tmp{suffix}").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library, "savez" if suffix == ".npz" else "save_file", full)
    with pytest.raises(OSError, match="No space"):
        weights.write_state_dict({"a": np.ones(2)}, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and not read_state_dict(path)["a"].any()


def test_models_that_a_format_cannot_hold_are_told():
    state = mdlm_state()
    layout = FORMATS["mdlm"]
    model, params = layout.model(state), layout.to_params(state)
    other = model | {"mixers": {"attention": {"head_dim": 4, "rotary_base": 500.0}}}
    with pytest.raises(ValueError, match=r"mixers.attention.rotary_base = 500.0 \(not 10000.0\)"):
        layout.to_state_dict(params, other)
    with pytest.raises(ValueError, match=r"predict_next = True \(not False\)"):  # weights alone do not show it
        layout.to_state_dict(params, model | {"predict_next": True})
    with pytest.raises(ValueError, match=r"missing block_1/att/qkv/kernel, \S+; surplus more"):
        layout.to_state_dict({**params, "block_1": {**params["block_1"], "att": {}}, "more": np.zeros(1)}, model)
    with pytest.raises(ValueError, match=r"embedding must have shape \(9, 8\), found \(8, 8\)"):
        layout.to_state_dict(params | {"embedding": np.zeros((8, 8))}, model)


def test_settings_that_come_to_the_same_are_no_difference():
    needed = FORMATS["mdlm"].model(mdlm_state())
    assert differences(needed, needed | {"pattern": "attention*2", "dropout": 0.1, "scan_layers": True}) == {}
    assert differences(needed, needed | {"dim": 16, "block": "rwkv7"}) == {"dim": (16, 8), "block": ("rwkv7", "dit")}
    needed = FORMATS["rwkv7"].model(rwkv7_state(dim=32, head_dim=16, ranks=(32, 32, 32, 32)))
    by_rule = needed | {"mixers": {"rwkv7": {"head_dim": 16, "lora_ranks": {}}}}
    assert differences(needed, by_rule) == {}
    other = needed | {"mixers": {"rwkv7": {"head_dim": 16, "lora_ranks": {"w": 8}}}}
    assert list(differences(needed, other)) == ["mixers.rwkv7.lora_ranks"]


def test_an_entry_is_its_own_inverse():
    random = np.random.default_rng(0)
    for layout, shape in (("same", (2, 6)), ("linear", (6, 2)), ("vector", (1, 1, 6)), ("heads", (3, 2))):
        for paths in (("a",), ("a", "b")):
            entry, x = Entry("x", layout, paths), random.normal(size=shape).astype(np.float32)
            parts = entry.ours(x)
            assert len(parts) == len(paths) and entry.shape(parts[0].shape, 2) == shape
            np.testing.assert_array_equal(entry.theirs(parts, 2), x)
