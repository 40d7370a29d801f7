"""Device mesh and placement of arrays: one mesh axis, 'data', over all devices of all processes."""

from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

PyTree = Any
MIN_SHARD_SIZE = 2**14  # number of elements; smaller arrays are replicated


def make_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A 1-D mesh over `devices` (default: all devices).

  The devices of a slice are neighbours in the mesh, so that most of a reduction stays inside the slices and little
  crosses the data centre's network between them. The axis type is Auto: the compiler propagates shardings, so that
  models are written as for one device.
  """
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if slices > 1:
    placed = mesh_utils.create_hybrid_device_mesh((len(devices) // slices,), (slices,), devices)
    return jax.sharding.Mesh(placed, ('data',), axis_types=(AxisType.Auto,))
  return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Options of XLA for a training step: GPUs sum gradients in few all-reduces of up to 1 GiB, and not one by one."""
  if mesh.devices.flat[0].platform in ('gpu', 'cuda'):
    return {'xla_gpu_all_reduce_combine_threshold_bytes': 2**30}
  return {}


def devices_for(rows: int) -> list[jax.Device]:
  """The most devices that share a batch of `rows` rows equally: all, or in a single process the first of them.

  A batch of few images stays the same on any number of devices, and so does the result.
  """
  devices = jax.devices()
  if jax.process_count() > 1:
    return devices
  return devices[: max(n for n in range(1, len(devices) + 1) if rows % n == 0)]


def replicate(x: jax.Array) -> jax.Array:
  """Replicates `x` on every device. For use inside jit; without a mesh in scope, `x` is returned unchanged."""
  return _constrain(x, P())


def shard_rows(x: jax.Array) -> jax.Array:
  """Splits the rows of `x` over the devices. For use inside jit; without a mesh in scope, `x` is returned unchanged."""
  return _constrain(x, P('data'))


def _constrain(x, spec):
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def split(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> NamedSharding:
  """FSDP sharding of a parameter: split along the longest axis whose length is divisible by the number of devices.

  Small arrays, and arrays without such an axis, are replicated.
  """
  axes = [i for i, size in enumerate(shape) if size % mesh.size == 0]
  if not axes or np.prod(shape) < MIN_SHARD_SIZE:
    return NamedSharding(mesh, P())
  longest = max(axes, key=lambda i: shape[i])
  return NamedSharding(mesh, P(*[None] * longest, 'data'))


def put_replicated(mesh: jax.sharding.Mesh, tree: PyTree) -> PyTree:
  """Puts host arrays on every device of `mesh`, replicated."""
  return jax.tree.map(lambda x: put(x, NamedSharding(mesh, P())), tree)


def put_batch(mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Splits the rows of a batch over the devices of `mesh`; every process passes the entire batch."""
  return {k: put(v, NamedSharding(mesh, P('data'))) for k, v in batch.items()}


def local_rows(mesh: jax.sharding.Mesh, rows: int) -> np.ndarray:
  """Indices of the rows that are on the devices of this process, int `[n]`, ascending; `rows`: rows of the batch."""
  parts = NamedSharding(mesh, P('data')).addressable_devices_indices_map((rows,)).values()
  return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def put_local_rows(
  mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray], rows: int
) -> dict[str, jax.Array]:
  """Splits the rows of a batch over the devices of `mesh`; every process passes its `local_rows` only.

  Args:
    mesh: the devices.
    batch: the local rows of each array.
    rows: number of rows of the entire batch.
  """
  by_row = NamedSharding(mesh, P('data'))
  if jax.process_count() == 1:
    return jax.device_put(batch, by_row)
  return {
    k: jax.make_array_from_process_local_data(by_row, v, (rows, *v.shape[1:]))
    for k, v in batch.items()
  }


def put(x: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
  """A global array with this sharding; x is a global array, or an array that every process has in full."""
  if jax.process_count() == 1:
    return jax.device_put(x, sharding)
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return jax.jit(lambda x: x, out_shardings=sharding)(x)
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])
