"""What each backbone of `diffrwkv.presets` is at each size, counted from shapes: parameters, operations, bytes.

    python -m benchmarks.presets

Writes benchmarks/results/presets.json, one row for a size and a backbone. No array is made, and layers are scanned, so
that the largest traces as fast as the smallest. `length` is the tokens of a sequence, LENGTHS. The fields:

    parameters              all of them
    embedding_parameters    the embedding, the output matrix and its bias
    other_parameters        the rest
    train_flops_per_token   floating-point operations of a training step per token: 6 N, N counting matrices without the
                            embedding look-up (`metrics.model_flops_per_token`), and 3 times what the mixers do beyond
                            their matrices in a forward pass (`Denoiser.flops`). adaLN's matrices count like the others,
                            though without time conditioning they act once in a pass.
    weight_bytes_per_token  of a pass over one sequence: each weight but the embedding table is read once, as bfloat16:
                            2 (parameters - embedding table) / length
    state_bytes_per_token   what the mixers hold of the other positions, over length: keys and values of attention in
                            bfloat16; the recurrences' float32 states and the bfloat16 inputs that their shift or
                            convolution takes over, in both directions where there are two

The two byte counts are no traffic measurement: activations and what a kernel reads twice are left out.
"""

import json

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.measure import RESULTS, commit
from diffrwkv import config, metrics, presets
from diffrwkv.denoiser import Denoiser, count_parameters
from diffrwkv.profile import state_bytes

LENGTHS = {"peer": 256}  # others: 1024


def model(size, name, **changes):
    """The denoiser of a size and backbone, with scanned layers and bfloat16 activations."""
    c = config.base()
    presets.configure(c, name, size)
    options = c.model.to_dict() | {"scan_layers": True, "dtype": "bfloat16"} | changes
    return Denoiser(presets.SIZES[size]["vocab_size"], **options)


def shapes(denoiser):
    """Its parameters, as shapes; they do not depend on the length."""
    return nn.unbox(jax.eval_shape(denoiser.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])


def row(size, name):
    """One row of the result file."""
    denoiser, length = model(size, name), LENGTHS.get(size, 1024)
    params = shapes(denoiser)
    total = count_parameters(params)
    ends = sum(params[key].size for key in ("embedding", "head", "head_bias") if key in params)
    return {
        "size": size,
        "name": name,
        "dim": denoiser.dim,
        "num_layers": denoiser.num_layers,
        "vocab_size": denoiser.vocab_size,
        "length": length,
        "parameters": total,
        "embedding_parameters": ends,
        "other_parameters": total - ends,
        "train_flops_per_token": metrics.model_flops_per_token(params) + 3 * denoiser.flops(length),
        "weight_bytes_per_token": 2 * (total - params["embedding"].size) / length,
        "state_bytes_per_token": state_bytes(denoiser, length) / length,
    }


def main():
    rows = [row(size, name) for size in presets.SIZES for name in presets.BACKBONES]
    lines = ",\n    ".join(json.dumps(r) for r in rows)
    head = json.dumps({"commit": commit(), "command": "python -m benchmarks.presets"})[1:-1]
    path = RESULTS / "presets.json"
    path.write_text(f'{{\n  {head},\n  "rows": [\n    {lines}\n  ]\n}}\n')
    print(f"{len(rows)} rows: {path}")


if __name__ == "__main__":
    main()
