"""Compiles the wkv7 kernels for an H200 without having one, down to machine code: registers and spills, by ptxas.

    pip install -e '.[cuda]'
    python -m benchmarks.compile_gpu

Nothing runs. For each launch ptxas prints registers, stack (spilled registers) and warnings: "wgmma serialized" would
mean that the products of a kernel wait for each other.
"""

import os
import time

# What the compiler must know of the device, as XLA dumps it on one; figures of NVIDIA's data sheet and programming
# guide for compute capability 9.0.
H200 = """
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 device_address_bits: 64
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 151397597184
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""
SHAPE = (8, 4096, 12, 64)


def main():
    os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from pallas_kernels.wkv7.pallas_gpu import wkv7_pallas_gpu

    try:
        chips = topologies.get_topology_desc("h200", platform="cuda", target_config=H200, topology="1x1x1").devices
    except Exception as e:
        raise SystemExit(f"No compiler for a GPU: {e}\nInstall it: pip install -e '.[cuda]'") from e
    there = jax.sharding.SingleDeviceSharding(chips[0])
    batch, _, heads, size = SHAPE
    token = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=there)
    log_w = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=there)
    state = jax.ShapeDtypeStruct((batch, heads, size, size), jnp.float32, sharding=there)
    for reverse in ((False,), (False, True)):
        inputs = ((token, log_w, token, token, token, token),) * len(reverse), (state,) * len(reverse)

        def forward(tokens, states, reverse=reverse):
            return wkv7_pallas_gpu(tokens, states, reverse)

        def both(tokens, states, forward=forward):
            results, pull = jax.vjp(forward, tokens, states)
            return pull(results)

        for name, run in (("forward", forward), ("forward and backward", both)):
            start = time.perf_counter()
            jax.jit(run).trace(*inputs).lower().compile()
            print(f"{name}, reverse {reverse}: compiled in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
