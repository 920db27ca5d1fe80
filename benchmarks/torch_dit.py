"""MDLM's Transformer in PyTorch, beside ours on the same machine: a pass over the length, and a training step.

    pip install torch
    taskset -c 0 python -m benchmarks.torch_dit

MDLM's own code needs a GPU (its attention is flash-attn). This is the same network written anew on PyTorch's own
attention, at the peers' size (presets, "peer"), so that what a well-kept framework makes of it on a CPU stands beside
our figures. Its weights are ours by the names of MDLM's files (`diffrwkv.convert`), and before a time is taken its
logits are compared with our denoiser's. Passes are timed as `benchmarks.denoiser` times them, steps (16 sequences of
256, dropout 0.1, MDLM's loss, AdamW, clipping, average of the weights) as `benchmarks.train_step` does. One thread:
PyTorch's threads wait busily, which counts as CPU time. Rows go to benchmarks/results/torch_cpu.jsonl.
"""

import argparse
import functools
import pathlib
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from benchmarks.measure import RESULTS, origin, write
from diffrwkv import config, presets
from diffrwkv.convert import FORMATS
from diffrwkv.denoiser import Denoiser

NAME = "DiT in PyTorch"
BATCH, LENGTH, DROPOUT = 16, 256, 0.1  # of the peers' recipe


class DiT(torch.nn.Module):
    """Logits [B, L, V] of tokens [B, L] int64; the parameters have the names of MDLM's files, with _ for a dot."""

    def __init__(self, state, num_layers, head_dim):
        super().__init__()
        for name, value in state.items():
            tensor = torch.from_numpy(np.array(value))
            if name == "rotary_emb.inv_freq":
                self.register_buffer("inverse_frequencies", tensor)
            else:
                self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(tensor))
        self.num_layers, self.head_dim = num_layers, head_dim

    def linear(self, name, x):
        return functional.linear(x, getattr(self, name + "_weight"), getattr(self, name + "_bias", None))

    def norm(self, name, x):
        return functional.layer_norm(x, x.shape[-1:], getattr(self, name + "_weight"))

    def dropped(self, x):
        return functional.dropout(x, DROPOUT, self.training)

    def condition(self):
        """Of the time 0: MDLM's denoiser is not told the time, and yet modulated."""
        features = self.sigma_map_mlp_0_weight.shape[1]
        zero = torch.cat([torch.ones(1, features // 2), torch.zeros(1, features // 2)], dim=-1)  # cosines, sines
        hidden = functional.silu(self.linear("sigma_map_mlp_0", zero))
        return functional.silu(self.linear("sigma_map_mlp_2", hidden))

    def attention(self, name, x):
        batch, length, dim = x.shape
        qkv = self.linear(name + "attn_qkv", x).view(batch, length, 3, dim // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, L, K] each
        angles = torch.arange(length)[:, None] * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()

        def turned(y):
            first, second = y.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        out = functional.scaled_dot_product_attention(turned(q), turned(k), v)
        return self.linear(name + "attn_out", out.transpose(1, 2).reshape(batch, length, dim))

    def forward(self, tokens):
        x = self.vocab_embed_embedding[tokens]
        condition = self.condition()
        for i in range(self.num_layers):
            name = f"blocks_{i}_"
            parts = self.linear(name + "adaLN_modulation", condition)[:, None].chunk(6, dim=-1)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
            h = self.norm(name + "norm1", x) * (1 + scale) + shift
            x = x + gate * self.dropped(self.attention(name, h))
            h = self.norm(name + "norm2", x) * (1 + scale_mlp) + shift_mlp
            h = functional.gelu(self.linear(name + "mlp_0", h), approximate="tanh")
            x = x + gate_mlp * self.dropped(self.linear(name + "mlp_2", h))
        shift, scale = self.linear("output_layer_adaLN_modulation", condition)[:, None].chunk(2, dim=-1)
        x = self.norm("output_layer_norm_final", x) * (1 + scale) + shift
        return self.linear("output_layer_linear", x)


def build():
    """(our denoiser, its parameters, the twin with the same ones)."""
    cfg = config.base()
    presets.configure(cfg, "dit", "peer")
    options = {"vocab_size": presets.SIZES["peer"]["vocab_size"], **cfg.model.to_dict()}
    model = Denoiser(**options)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
    keys = iter(jax.random.split(jax.random.key(1), 999))
    params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), params)  # no gate is zero
    state = FORMATS["mdlm"].to_state_dict(params, options)
    return model, params, DiT(state, model.num_layers, options["mixers"]["attention"]["head_dim"])


def check(model, params, twin):
    """The relative difference of the twin's logits from ours; ends the program where it is not rounding."""
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 100))
    ours = np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(tokens, jnp.int32)))
    with torch.no_grad():
        theirs = twin.eval()(torch.from_numpy(tokens)).numpy()
    error = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    if not error < 1e-5:
        raise SystemExit(f"The twin's logits differ from the denoiser's by {error:.1e}: no time is reported.")
    return error


def timed(run, repeats):
    """Wall and CPU seconds of each of `repeats` calls, after one that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    return zip(*seconds, strict=True)


def a_pass(twin, length):
    tokens = torch.from_numpy(np.random.default_rng(length).integers(0, 66, (1, length)))
    return functools.partial(torch.no_grad()(twin.eval()), tokens)


def a_step(twin, mask_id):
    """A training step: MDLM's loss under the log-linear schedule, on random text of the peers' shape."""
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    average = [p.detach().clone() for p in twin.parameters()]
    text = torch.from_numpy(np.random.default_rng(0).integers(0, mask_id, (BATCH, LENGTH)))
    twin.train()

    def step():
        t = 1e-3 + (1 - 1e-3) * ((torch.rand(1) + torch.arange(BATCH) / BATCH) % 1)
        masked = torch.rand(BATCH, LENGTH) < t[:, None]
        logits = twin(torch.where(masked, mask_id, text))
        logits[..., mask_id] = -torch.inf
        log_p = torch.log_softmax(logits, dim=-1).gather(-1, text[..., None])[..., 0]
        loss = -(log_p * masked / t[:, None]).sum() / (BATCH * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, list(twin.parameters()), 1e-3)
        if not torch.isfinite(loss):
            raise SystemExit("The twin's loss is not finite: no time is reported.")

    return torch.enable_grad()(step)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    p.add_argument("--repeats", type=int, default=7, help="of the longest, and three times as many steps")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS / "torch_cpu.jsonl")
    args = p.parse_args()
    torch.set_num_threads(1)
    model, params, twin = build()
    error = check(model, params, twin)
    rows = []

    def add(row):
        rows.append({"name": NAME, **row, "error": error, "torch": torch.__version__, **origin()})
        print({key: row[key] for key in row if key != "name"}, flush=True)
        write(args.out, rows)

    for length in sorted(args.lengths):
        wall, cpu = timed(a_pass(twin, length), args.repeats * max(args.lengths) // length)
        add({"length": length, "milliseconds": 1e3 * min(cpu), "wall_ms": 1e3 * statistics.median(wall)})
    wall, cpu = timed(a_step(twin, model.vocab_size - 1), 3 * args.repeats)
    fields = {"cpu_seconds": min(cpu), "median_cpu_seconds": statistics.median(cpu)}
    add({"devices": 1, "wall_seconds": statistics.median(wall), **fields})


if __name__ == "__main__":
    main()
