"""Placement of arrays: one mesh axis, 'data', over all devices of all processes."""

from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

PyTree = Any
SMALL = 2**14  # elements; smaller arrays are not split


def make_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A 1-D mesh over `devices` (default: all of them).

  The devices of a slice are neighbours; of several slices, which only the data centre's network
  connects, one comes after the other, so that most of a reduction stays inside them. The axis type is
  Auto: the compiler propagates shardings, so models are written as for one device.
  """
  devices = jax.devices() if devices is None else devices
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if slices > 1:
    placed = mesh_utils.create_hybrid_device_mesh((len(devices) // slices,), (slices,), devices)
    return jax.sharding.Mesh(placed, ('data',), axis_types=(AxisType.Auto,))
  return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def replicate(x: jax.Array) -> jax.Array:
  """Inside jit: every device gets the whole of `x`. Without a mesh in scope, `x` itself."""
  return _constrain(x, P())


def shard_rows(x: jax.Array) -> jax.Array:
  """Inside jit: the rows of `x` are split over the devices. Without a mesh in scope, `x` itself."""
  return _constrain(x, P('data'))


def _constrain(x, spec):
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def split(mesh: jax.sharding.Mesh, shape: tuple[int, ...]) -> NamedSharding:
  """FSDP sharding of an array of parameters: split along the longest axis that divides evenly.

  Small arrays, and those without such an axis, are whole on every device.
  """
  axes = [i for i, size in enumerate(shape) if size % mesh.size == 0]
  if not axes or np.prod(shape) < SMALL:
    return NamedSharding(mesh, P())
  longest = max(axes, key=lambda i: shape[i])
  return NamedSharding(mesh, P(*[None] * longest, 'data'))


def put_replicated(mesh: jax.sharding.Mesh, tree: PyTree) -> PyTree:
  """Host arrays -> global arrays, the whole of each on every device of `mesh`."""
  return jax.tree.map(lambda x: put(x, NamedSharding(mesh, P())), tree)


def put_batch(mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """A batch that every process has whole -> global arrays with their rows split over `mesh`."""
  return {k: put(v, NamedSharding(mesh, P('data'))) for k, v in batch.items()}


def local_rows(mesh: jax.sharding.Mesh, rows: int) -> np.ndarray:
  """Which rows of a batch of `rows` are on the devices of this process, in order."""
  parts = NamedSharding(mesh, P('data')).addressable_devices_indices_map((rows,)).values()
  return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def put_local_rows(
  mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray], rows: int
) -> dict[str, jax.Array]:
  """The `local_rows` of a batch on every process -> global arrays of `rows` rows."""
  by_row = NamedSharding(mesh, P('data'))
  if jax.process_count() == 1:
    return jax.device_put(batch, by_row)
  return {
    k: jax.make_array_from_process_local_data(by_row, v, (rows, *v.shape[1:]))
    for k, v in batch.items()
  }


def put(x: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
  """An array that every process has whole, or a global array -> a global array with this sharding."""
  if jax.process_count() == 1:
    return jax.device_put(x, sharding)
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return jax.jit(lambda x: x, out_shardings=sharding)(x)
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])
