"""The mesh, and where each array lies on it.

Two axes: "data" splits the batch, "fsdp" splits the batch and the parameters. One device is the mesh (1, 1).
"""

import functools
import math
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffrwkv.config import UserError

AXES = ("data", "fsdp")

# Logical axis of a parameter or activation -> mesh axis. A name that is not here is not split.
RULES = (("batch", AXES), ("embed", "fsdp"))


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_memory() -> int | None:
    """Bytes of memory that the processes of this machine (or of this container) may have; None where nobody says."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not POSIX
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(memory, int(text)) if text.isdigit() else memory


def device_memory(mesh: Mesh) -> int | None:
    """Bytes that one device of the mesh has; its part of the host's on a CPU; None where nobody says."""
    device = mesh.local_devices[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    memory = host_memory() if device.platform == "cpu" else None
    return None if memory is None else memory // len(mesh.local_devices)


PATIENCE = 300  # seconds that a process waits for the coordinator
_HOSTS = (
    "--config.train.hosts.coordinator=HOST:PORT --config.train.hosts.num_processes=N --config.train.hosts.process_id=I"
)


def check_hosts(multihost: bool, coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Raises UserError for a config.train.hosts of which something is missing, or which nobody asks for."""
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if not multihost:
        raise UserError("config.train.hosts does nothing without --config.train.multihost=true: say both, or neither.")
    if missing:
        raise UserError(f"config.train.hosts.{missing[0]} is missing: give each process {_HOSTS}.")
    if not re.fullmatch(r"([^\s:/\[\]]+|\[[0-9a-fA-F:.%\w]+\]):\d{1,5}", str(coordinator)):
        raise UserError(
            f"config.train.hosts.coordinator must be HOST:PORT of process 0, as 10.0.0.1:12345, got {coordinator!r}."
        )
    if process_id is not None and num_processes is not None and process_id >= num_processes:
        raise UserError(
            f"config.train.hosts.process_id = {process_id} is none of {num_processes} processes: they are 0 to "
            f"{num_processes - 1}."
        )


def join_processes(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """`jax.distributed.initialize`, for several hosts; it waits for all of them.

    Args:
      coordinator: "HOST:PORT" of process 0; None, as the others then are: a launcher that JAX knows says it.

    Raises UserError where nothing says who the others are, and where nothing answers at the coordinator's address. For
    others than process 0 XLA waits five minutes by itself, and ends the program with words of its own.
    """
    if coordinator is not None and process_id:
        _wait_for(coordinator)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as e:
        reason = " ".join(str(e).split()).rstrip(".")
        raise UserError(
            f"config.train.multihost cannot reach other processes ({reason}): start all of them with a launcher that "
            f"JAX knows (Cloud TPU, Slurm, Open MPI, Kubernetes), or give each {_HOSTS}, or leave it out for a single "
            "one."
        ) from None


def _wait_for(coordinator: str) -> None:
    """Returns once something listens there. Raises UserError."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except socket.gaierror as e:
            raise UserError(f"config.train.hosts.coordinator: no host is called {host!r} ({e.strerror}).") from None
        except (OSError, OverflowError) as e:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"Nothing answers at config.train.hosts.coordinator={coordinator} ({e}): start process 0 there, on "
                    "a port that is free, and open between the hosts."
                ) from None
        time.sleep(0.5)


def start_cpu_devices(requested: int, batch: int) -> None:
    """Makes a CPU look like several devices; must run before the first JAX computation.

    One XLA device hardly uses a second core for these programs; with the batch split over as many
    virtual devices as cores, a training step ran 1.9 times faster on two. Does nothing to other
    platforms, nor where XLA_FLAGS already chose a number, nor after JAX has started.

    Args:
      requested: the number of devices; 0 takes the largest number of cores that divides `batch`.
      batch: sequences that are split over the devices; where several batches are, their greatest common divisor.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    count = requested or max(n for n in range(1, cpu_cores() + 1) if batch % n == 0)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # the backend runs already: a test or a notebook chose
        pass


def make_mesh(data: int = -1, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of axes ("data", "fsdp") over all devices, or over those given.

    Args:
      data, fsdp: devices along the axis; -1 in one of them takes what the other leaves.

    Raises UserError when the two do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp]
    if shape.count(-1) == 1 and min(shape) == -1:
        i = shape.index(-1)
        shape[i] = len(devices) // max(shape[1 - i], 1)
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise UserError(
            f"A mesh of data={data} x fsdp={fsdp} does not fit {len(devices)} devices: choose "
            "config.train.mesh.data and .fsdp so that they multiply to it (-1: the rest)."
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(batch: int, mesh: Mesh, what: str) -> None:
    """Raises UserError unless `batch` sequences split evenly over the devices of the mesh."""
    if batch % mesh.size:
        raise UserError(
            f"{what} = {batch} sequences do not split over {mesh.size} devices: make it a multiple of {mesh.size}."
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Rows held by this process [b, ...] -> global arrays [b * processes, ...] split over the mesh."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def split_rows(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Rows that every process holds whole, [B, ...], split over the mesh."""
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])


def over(mesh: Mesh, fun: Callable) -> Callable:
    """`fun`, to be jitted, with the mesh in context while it is traced: kernels cannot be split over it otherwise."""

    @functools.wraps(fun)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fun(*args, **kwargs)

    return traced


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a parameter tree with logical names (nn.with_logical_partitioning), unboxed.

    A dimension that its mesh axis does not divide stays whole.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)

    def fit(spec: PartitionSpec, x: Any) -> NamedSharding:
        def size(axis):
            return math.prod(mesh.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,)))

        axes = [a if a is None or n % size(a) == 0 else None for a, n in zip(spec, x.shape, strict=False)]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(fit, specs, nn.unbox(boxed), is_leaf=lambda s: isinstance(s, PartitionSpec))


def follow(tree: Any, params: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameter tree, such as an optimizer's state.

    Args:
      tree: arrays or shapes; a leaf whose path ends in a parameter's path is laid as that parameter.
      params: the parameters' shardings.
    """
    known = {tuple(map(str, path)): s for path, s in jax.tree_util.tree_leaves_with_path(params)}

    def find(path, leaf):
        names = tuple(map(str, path))
        for i in range(len(names)):
            if names[i:] in known and leaf.shape:
                return known[names[i:]]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, tree)
