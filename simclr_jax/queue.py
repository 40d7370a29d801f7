"""MoCo's dictionary: a ring of the newest keys, the same on every device.

Source: He et al. 2020 (MoCo), section 3.1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import losses

PyTree = Any


def start(rng: jax.Array, size: int, d: int) -> PyTree:
  """`rows` `[size, d]`, random unit vectors; `pointer`, where the next key goes; `filled`, how many are keys."""
  rows = losses.l2_normalize(jax.random.normal(rng, (size, d)))
  return {'rows': rows, 'pointer': jnp.zeros((), jnp.int32), 'filled': jnp.zeros((), jnp.int32)}


def push(queue: PyTree, keys: jax.Array) -> PyTree:
  """Writes keys `[n, d]`, in order, over the oldest rows; any n, also one that does not divide the size.

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


def figures(queue: PyTree, n: int) -> dict[str, jax.Array]:
  """`queue_age`: of its oldest key, in steps of n keys; `queue_filled`: share of rows that are keys;
  `queue_norm`: mean length of the rows, which should be 1."""
  return {
    'queue_age': queue['filled'] / n,
    'queue_filled': queue['filled'] / len(queue['rows']),
    'queue_norm': jnp.mean(jnp.linalg.norm(queue['rows'], axis=1)),
  }
