"""What MoCo adds to a network: the EMA (momentum) encoder, the queue of keys, and shuffling BatchNorm.

Source: He et al. 2020 (MoCo), sections 3.1 to 3.3 and appendix A.9.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import losses, sharding
from simclr_jax.models.network import Network

PyTree = Any

SHUFFLES = ('permute', 'transpose', 'none')


# The EMA encoder: a copy of the network that follows it as an exponential moving average (section 3.2).


def init_ema(params: PyTree, stats: PyTree) -> PyTree:
  """A copy of a network: `params` without the online probe, and BatchNorm statistics of its own."""
  return {'params': {k: params[k] for k in ('encoder', 'head')}, 'stats': stats}


def update_ema(ema: PyTree, params: PyTree, momentum: float) -> PyTree:
  """theta_k <- m theta_k + (1 - m) theta_q (equation 2); parameters only, not statistics."""
  query = {k: jax.lax.stop_gradient(params[k]) for k in ema['params']}
  return {**ema, 'params': optax.incremental_update(query, ema['params'], 1 - momentum)}


def encode(net: Network, ema: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
  """Keys of images x `[n, h, w, c]`: unit rows `[n, d]` without a gradient; and the new EMA encoder.

  The EMA encoder is in training mode: batch statistics normalise, its own running averages are updated.
  """
  outputs, stats = net.apply(ema['params'], ema['stats'], x)
  return jax.lax.stop_gradient(losses.l2_normalize(outputs[-1])), {**ema, 'stats': stats}


# The queue: a ring buffer of the newest keys, the same on every device (section 3.1).


def init_queue(rng: jax.Array, size: int, d: int) -> PyTree:
  """`rows` `[size, d]`, random unit vectors; `pointer`, where the next key goes; `filled`, how many are keys."""
  rows = losses.l2_normalize(jax.random.normal(rng, (size, d)))
  return {'rows': rows, 'pointer': jnp.zeros((), jnp.int32), 'filled': jnp.zeros((), jnp.int32)}


def enqueue(queue: PyTree, keys: jax.Array) -> PyTree:
  """Writes keys `[n, d]`, in order, over the oldest rows; n need not divide the size of the queue.

  `keys` must be whole on every device (`sharding.replicate`).
  """
  size, n = len(queue['rows']), len(keys)
  kept = min(n, size)  # of more keys than rows, the last ones stay
  place = (queue['pointer'] + np.arange(n - kept, n, dtype=np.int32)) % size
  return {
    'rows': queue['rows'].at[place].set(keys[n - kept :], unique_indices=True),
    'pointer': (queue['pointer'] + n) % size,
    'filled': jnp.minimum(queue['filled'] + n, size),
  }


def queue_metrics(queue: PyTree, n: int) -> dict[str, jax.Array]:
  """`queue_age`: of its oldest key, in steps of n keys; `queue_filled`: share of rows that are keys;
  `queue_norm`: mean length of the rows, which should be 1."""
  return {
    'queue_age': queue['filled'] / n,
    'queue_filled': queue['filled'] / len(queue['rows']),
    'queue_norm': jnp.mean(jnp.linalg.norm(queue['rows'], axis=1)),
  }


# Shuffling BatchNorm: for the keys, other examples are normalised together. Without it a network can recognise
# a positive by the statistics of its BatchNorm group instead of by its content (section 3.3).


def draw_permutation(
  kind: str, batch: PyTree, rng: jax.Array, direction: int = 0
) -> jax.Array | None:
  """The order of the keys for 'permute', int32 `[n]`: `batch['permutation'][direction]` if there is one,
  so that recorded runs can be replayed, otherwise a random one."""
  if kind != 'permute':
    return None
  if 'permutation' in batch:
    return batch['permutation'][direction]
  return jax.random.permutation(jax.random.fold_in(rng, direction), len(batch['views']))


def shuffle(kind: str, x: jax.Array, groups: int, permutation: jax.Array | None) -> jax.Array:
  """Rows of x `[n, ...]` in the order in which the EMA encoder sees them.

  'permute' is the paper's: row i of the result is x[permutation[i]]. Every device gets the whole x,
  as in MoCo's code, in float32: 150 MB for 256 images of 224 pixels. 'transpose' deals the rows of
  each BatchNorm group out to all groups in turn, always in the same way, and compiles to one
  all-to-all. 'none' leaves x as it is.
  """
  if kind == 'permute':
    return sharding.shard_rows(sharding.replicate(x)[permutation])
  if kind == 'transpose':
    return sharding.shard_rows(_deal(x, groups))
  return x


def unshuffle(kind: str, x: jax.Array, groups: int, permutation: jax.Array | None) -> jax.Array:
  """Undoes `shuffle`. The result is whole on every device, as the queue needs it."""
  x = sharding.replicate(x)
  if kind == 'permute':
    return x[jnp.argsort(permutation)]
  if kind == 'transpose':
    return _deal(x, len(x) // groups)
  return x


def _deal(x, groups):
  """[g, n/g, ...] -> [n/g, g, ...], flattened; its inverse is itself with n/g for g."""
  return jnp.swapaxes(x.reshape(groups, -1, *x.shape[1:]), 0, 1).reshape(x.shape)
