"""What a measurement on an accelerator is judged by: the machine's ceilings.

python -m benchmarks.accelerators       # the ceilings of this machine
"""

import functools

import jax
import jax.numpy as jnp

from diffrwkv.timing import burst, calls_for

# Dense bfloat16 TFLOP/s and GB/s of memory by `device_kind`, from the vendors' data sheets. Beside a measurement only:
# H100 SXM 80 GB and H200 SXM, nvidia.com/en-us/data-center/{h100,h200} (half of what they print with sparsity);
# v5e and v6e, docs.cloud.google.com/tpu/docs/{v5e,v6e}.
DATASHEET = {
    "NVIDIA H100 80GB HBM3": (989, 3350),
    "NVIDIA H200": (989, 4800),
    "TPU v5 lite": (197, 819),
    "TPU v6 lite": (918, 1638),
}


@functools.cache
def ceilings(product: int = 8192, copied: int = 2**29) -> dict:
    """What this machine reaches on random bfloat16: TFLOP/s of a square matrix product, GB/s of a copy (both ways).

    The data sheet's numbers are beside them where DATASHEET has the device.
    """
    key_x, key_y, key_z = jax.random.split(jax.random.key(0), 3)
    x, y = (jax.random.normal(key, (product, product), jnp.bfloat16) for key in (key_x, key_y))
    z = jax.random.normal(key_z, (copied,), jnp.bfloat16)

    def seconds(op, *arguments):
        run = jax.jit(op).lower(*arguments).compile()
        timed = functools.partial(run, *arguments), jax.block_until_ready
        calls = calls_for(*timed)
        return min(burst(*timed, calls) for _ in range(3))

    sheet = DATASHEET.get(jax.devices()[0].device_kind, (None, None))
    return {
        "tflops": 2e-12 * product**3 / seconds(jnp.matmul, x, y),
        "gb_s": 4e-9 * copied / seconds(jnp.negative, z),  # a negation is a copy that XLA cannot leave out
        "datasheet_tflops": sheet[0],
        "datasheet_gb_s": sheet[1],
    }


def describe(found: dict) -> str:
    """One line on `ceilings`."""
    text = f"ceilings measured here: {found['tflops']:,.3g} TFLOP/s, {found['gb_s']:,.4g} GB/s"
    if found["datasheet_tflops"]:
        text += f" (data sheet: {found['datasheet_tflops']:,}, {found['datasheet_gb_s']:,})"
    return text


if __name__ == "__main__":
    print(jax.devices()[0].device_kind, describe(ceilings()))
