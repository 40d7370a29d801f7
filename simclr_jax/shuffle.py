"""Shuffling BatchNorm: which examples are normalised together, mixed anew for the keys.

Without it a network can recognise a positive by the statistics of its BatchNorm group instead of by
its content (He et al. 2020, section 3.3 and appendix A.9).
"""

from typing import Any

import jax
import jax.numpy as jnp

from simclr_jax import sharding

PyTree = Any

KINDS = ('permute', 'transpose', 'none')


def draw(kind: str, batch: PyTree, rng: jax.Array, direction: int = 0) -> jax.Array | None:
  """The order of the keys for 'permute', int32 `[n]`: `batch['permutation'][direction]` if it is given,
  so that recorded runs can be replayed, else a random one."""
  if kind != 'permute':
    return None
  if 'permutation' in batch:
    return batch['permutation'][direction]
  return jax.random.permutation(jax.random.fold_in(rng, direction), len(batch['views']))


def forward(kind: str, x: jax.Array, groups: int, permutation: jax.Array | None) -> jax.Array:
  """Rows of x `[n, ...]` in the order in which the key encoder sees them.

  'permute' is the paper's: row i of the result is x[permutation[i]]. Every device gets the whole x,
  as in MoCo's code, in float32: 150 MB for 256 images of 224 pixels. 'transpose' deals the rows of
  each BatchNorm group out to all groups in turn, always in the same way, and compiles to one
  all-to-all. 'none' leaves x as it is.
  """
  if kind == 'permute':
    return sharding.by_rows(sharding.replicate(x)[permutation])
  if kind == 'transpose':
    return sharding.by_rows(_deal(x, groups))
  return x


def back(kind: str, x: jax.Array, groups: int, permutation: jax.Array | None) -> jax.Array:
  """Undoes `forward`. The result is whole on every device, as the queue needs it."""
  x = sharding.replicate(x)
  if kind == 'permute':
    return x[jnp.argsort(permutation)]
  if kind == 'transpose':
    return _deal(x, len(x) // groups)
  return x


def _deal(x, groups):
  """[g, n/g, ...] -> [n/g, g, ...], flattened; its inverse is itself with n/g for g."""
  return jnp.swapaxes(x.reshape(groups, -1, *x.shape[1:]), 0, 1).reshape(x.shape)
