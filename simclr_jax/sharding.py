"""Where arrays live: one mesh axis, 'data', over all devices of all processes."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

PyTree = Any


def make_mesh(devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A 1-D mesh over `devices` (default: all of them).

  The axis type is Auto: the compiler propagates shardings, so models are written as for one device.
  """
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def replicate(x: jax.Array) -> jax.Array:
  """Inside jit: every device gets the whole of `x`. Without a mesh in scope, `x` itself."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, P())


def put_replicated(mesh: jax.sharding.Mesh, tree: PyTree) -> PyTree:
  """Host arrays -> global arrays, the whole of each on every device of `mesh`."""
  return jax.device_put(tree, NamedSharding(mesh, P()))


def put_batch(mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's rows of a batch -> global arrays with their rows split over `mesh`."""
  rows = NamedSharding(mesh, P('data'))
  return {k: jax.make_array_from_process_local_data(rows, v) for k, v in batch.items()}
