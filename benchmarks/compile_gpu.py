"""Compiles the wkv7 kernels for an H200 without having one, down to machine code, and says what became of them.

    pip install -e '.[cuda]' nvidia-cuda-nvdisasm
    python -m benchmarks.compile_gpu

Nothing runs and nothing is timed. A row is a kernel: whether ptxas serialised its tensor-core products, each of which
then waits for the one before; registers and what is spilled of them, in bytes; shared memory; and, where nvdisasm is
installed, the instructions that a warp issues for one chunk, that is those of the loop over chunks. Rows go to
benchmarks/results/compile_gpu.jsonl. The compiler is the one inside jax's plugin, whatever else is installed.
"""

import argparse
import collections
import contextlib
import os
import pathlib
import re
import sys
import tempfile
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
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=pathlib.Path)
    args = p.parse_args()

    # The plugin reads these when it compiles; a program that is found in a cache is not compiled.
    dumps = {f"MOSAIC_GPU_DUMP_{x}": "1" for x in ("PTXAS", "SASS", "RESOURCES")}
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"} | dumps
    import jax
    from jax.experimental import topologies

    from benchmarks.measure import RESULTS, origin, write

    try:
        chips = topologies.get_topology_desc("h200", platform="cuda", target_config=H200, topology="1x1x1").devices
        from jax_cuda13_plugin import _versions
    except Exception as e:
        raise SystemExit(f"No compiler for a GPU: {e}\nInstall it: pip install -e '.[cuda]'") from e
    built = _versions.cuda_runtime_build_version()
    versions = {"ptxas": f"{built // 1000}.{built % 1000 // 10}"}

    rows = []
    for reverse in ((False,), (False, True)):
        for row in kernels(jax.sharding.SingleDeviceSharding(chips[0]), reverse):
            rows.append(row | origin() | versions)
            print(row, flush=True)
    if any(row["instructions"] is None for row in rows):
        print("Instructions are not counted: pip install nvidia-cuda-nvdisasm")
    write(args.out or RESULTS / "compile_gpu.jsonl", rows)


def kernels(there, reverse):
    """A row for forward, one for forward with the states saved, and one for backward."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.wkv7.pallas_gpu import wkv7_pallas_gpu

    batch, _, heads, size = SHAPE
    token = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=there)
    log_w = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=there)
    state = jax.ShapeDtypeStruct((batch, heads, size, size), jnp.float32, sharding=there)
    inputs = ((token, log_w, token, token, token, token),) * len(reverse), (state,) * len(reverse)

    def forward(tokens, states):
        return wkv7_pallas_gpu(tokens, states, reverse)

    def both(tokens, states):
        results, pull = jax.vjp(forward, tokens, states)
        return pull(results)

    named = (
        (forward, {"wkv7_forward": "wkv7 forward"}),
        (both, {"wkv7_forward": "wkv7 forward, states saved", "wkv7_backward": "wkv7 backward"}),
    )
    rows = []
    for run, names in named:
        start = time.perf_counter()
        with tempfile.TemporaryFile() as file:
            with printed_to(file):
                jax.jit(run).trace(*inputs).lower().compile()
            seconds = time.perf_counter() - start
            file.seek(0)
            found = figures(file.read().decode())
        for kernel, name in names.items():
            shape = dict(zip("BTHK", SHAPE, strict=True))
            row = {"program": name, "directions": len(reverse), **shape}
            rows.append(row | found[kernel] | {"compile_seconds": seconds})
    return rows


@contextlib.contextmanager
def printed_to(file):
    """What this process and its libraries print goes to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, old in zip((1, 2), kept, strict=True):
            os.dup2(old, descriptor)
            os.close(old)


def figures(text):
    """{kernel: its figures} of what a compilation printed.

    Raises:
      ValueError: no kernel in it, or one without ptxas's lines.
    """
    start = r"^ptxas info\s*: Compiling entry function '(\w+)_mosaic_gpu_kernel'"
    names = re.findall(start, text, re.MULTILINE)
    if not names:
        raise ValueError(f"The compiler told of no kernel; it printed: {text[:500]!r}")
    memory = re.findall(r"smem_scratch_bytes=(\d+)", text)
    parts = re.split(start, text, flags=re.MULTILINE)[2::2]
    found = {}
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not spilled or not registers:
            raise ValueError(f"ptxas told nothing of {name}: {part[:500]!r}")
        # (C7510, C7512) "wgmma.mma_async instructions are serialized due to ... in the function '...'"
        serialised = [line for line in text.splitlines() if "serialized" in line and f"'{name}_" in line]
        found[name] = {
            "serialised": bool(serialised),
            "reason": "; ".join(line.partition("serialized due to ")[2] or line for line in serialised),
            "registers": int(registers[1]),
            "spill_stores": int(spilled[1]),
            "spill_loads": int(spilled[2]),
            "shared_bytes": int(memory[i]) if len(memory) == len(names) else None,
            **instructions(part),
        }
    return found


# Names of machine instructions: of a warpgroup's products, conversions between types, and barriers.
KINDS = {"wgmma": {"HGMMA"}, "conversions": {"F2F", "F2FP", "F2I", "I2F", "I2FP"}, "barriers": {"BAR"}}


def instructions(text):
    """How many instructions the longest loop of a disassembled kernel has, and how many of some kinds."""
    names, labels, loops = [], {}, [(0, 0)]
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*)", line):
            names.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2]) if found[1] == "BRA" else None
            if target and target[0] in labels:
                loops.append((labels[target[0]], len(names)))
    if not names:
        return dict.fromkeys(("instructions", *KINDS))
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    counts = collections.Counter(names[first:last])
    return {"instructions": last - first} | {kind: sum(counts[x] for x in those) for kind, those in KINDS.items()}


if __name__ == "__main__":
    main()
