"""The parts of MoCo: the EMA (momentum) encoder, the queue of keys, and shuffling BatchNorm.

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
SHUFFLES = ('permute', 'transpose', 'none')  # see `shuffle`

# The EMA encoder: a network whose parameters are an exponential moving average of the trained ones (section 3.2).


def init_ema(params: PyTree, stats: PyTree) -> PyTree:
  """The initial EMA encoder: `params` of the network without the online probe, and BatchNorm statistics `stats`."""
  return {'params': {k: params[k] for k in ('encoder', 'head')}, 'stats': stats}


def update_ema(ema: PyTree, params: PyTree, momentum: float) -> PyTree:
  """theta_k <- m theta_k + (1 - m) theta_q (equation 2), m = `momentum`; BatchNorm statistics do not change."""
  query = {k: jax.lax.stop_gradient(params[k]) for k in ema['params']}
  return {**ema, 'params': optax.incremental_update(query, ema['params'], 1 - momentum)}


def encode(net: Network, ema: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
  """Encodes images as keys, in training mode: BatchNorm uses batch statistics and updates the running averages.

  Args:
    net: the network.
    ema: the EMA encoder.
    x: images `[n, h, w, c]` in [0, 1].

  Returns:
    Keys, float32 `[n, d]`, unit rows without a gradient; and the EMA encoder with new BatchNorm statistics.
  """
  outputs, stats = net.apply(ema['params'], ema['stats'], x)
  return jax.lax.stop_gradient(losses.l2_normalize(outputs[-1])), {**ema, 'stats': stats}


# The queue: a ring buffer of the newest keys, the same on every device (section 3.1).


def init_queue(rng: jax.Array, size: int, d: int) -> PyTree:
  """The initial queue.

  Returns:
    `rows`, float32 `[size, d]`, random unit vectors; `pointer`, int32 `[]`, index of the oldest row, which the next
    key replaces; `filled`, int32 `[]`, number of rows that are keys.
  """
  rows = losses.l2_normalize(jax.random.normal(rng, (size, d)))
  return {'rows': rows, 'pointer': jnp.zeros((), jnp.int32), 'filled': jnp.zeros((), jnp.int32)}


def enqueue(queue: PyTree, keys: jax.Array) -> PyTree:
  """Replaces the oldest rows by keys `[n, d]`, in order; n need not divide the size of the queue.

  `keys` must be replicated (`sharding.replicate`). If there are more keys than rows, only the last keys are written.
  """
  size, n = len(queue['rows']), len(keys)
  first = max(n - size, 0)
  index = (queue['pointer'] + np.arange(first, n, dtype=np.int32)) % size
  return {
    'rows': queue['rows'].at[index].set(keys[first:], unique_indices=True),
    'pointer': (queue['pointer'] + n) % size,
    'filled': jnp.minimum(queue['filled'] + n, size),
  }


def queue_metrics(queue: PyTree, n: int) -> dict[str, jax.Array]:
  """Metrics of the queue, float32 scalars.

  Args:
    queue: the queue.
    n: number of keys that a step enqueues.

  Returns:
    `queue_age`, the age of the oldest key in steps; `queue_filled`, the fraction of the rows that are keys;
    `queue_norm`, the mean norm of the rows, which should be 1.
  """
  return {
    'queue_age': queue['filled'] / n,
    'queue_filled': queue['filled'] / len(queue['rows']),
    'queue_norm': jnp.mean(jnp.linalg.norm(queue['rows'], axis=1)),
  }


# Shuffling BatchNorm: keys are normalised in other groups than their queries. Otherwise a network can recognise the
# positive by the statistics of its BatchNorm group instead of by its content (section 3.3).


def draw_permutation(
  kind: str, batch: PyTree, rng: jax.Array, direction: int = 0
) -> jax.Array | None:
  """The permutation of the keys for kind='permute', int32 `[n]`; None for other kinds.

  The permutation is random, or `batch['permutation'][direction]` if the batch has one, so that recorded runs can be
  replayed. `direction` is 0, and 1 for the second loss term of symmetric MoCo.
  """
  if kind != 'permute':
    return None
  if 'permutation' in batch:
    return batch['permutation'][direction]
  return jax.random.permutation(jax.random.fold_in(rng, direction), len(batch['views']))


def shuffle(kind: str, x: jax.Array, groups: int, permutation: jax.Array | None) -> jax.Array:
  """The rows of x in the order in which the EMA encoder gets them.

  Args:
    kind: 'permute', as in the paper: row i of the result is x[permutation[i]]; x is replicated on every device, as
      in MoCo's code, which takes 150 MB for 256 images of 224 pixels in float32. 'transpose': the rows of each
      BatchNorm group are distributed over all groups in a fixed order; compiles to one all-to-all. 'none': x itself.
    x: `[n, ...]`.
    groups: number of BatchNorm groups.
    permutation: int `[n]`, for 'permute' only.
  """
  if kind == 'permute':
    return sharding.shard_rows(sharding.replicate(x)[permutation])
  if kind == 'transpose':
    return sharding.shard_rows(_transpose(x, groups))
  return x


def unshuffle(kind: str, x: jax.Array, groups: int, permutation: jax.Array | None) -> jax.Array:
  """The inverse of `shuffle`, with the same arguments. The result is replicated, as `enqueue` requires."""
  x = sharding.replicate(x)
  if kind == 'permute':
    assert permutation is not None
    return x[jnp.argsort(permutation)]
  if kind == 'transpose':
    return _transpose(x, len(x) // groups)
  return x


def _transpose(x, groups):
  """Rows `[g, n/g]` -> `[n/g, g]`, flattened. The inverse has n/g groups."""
  return jnp.swapaxes(x.reshape(groups, -1, *x.shape[1:]), 0, 1).reshape(x.shape)
