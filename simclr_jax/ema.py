"""The key encoder: a copy of the network that follows it as an exponential moving average.

Source: He et al. 2020 (MoCo), section 3.2.
"""

from typing import Any

import jax
import optax

from simclr_jax import losses
from simclr_jax.models.tower import Tower

PyTree = Any


def start(params: PyTree, stats: PyTree) -> PyTree:
  """A copy of a network: `params` without the online probe, and BatchNorm statistics of its own."""
  return {'params': {k: params[k] for k in ('encoder', 'head')}, 'stats': stats}


def follow(key: PyTree, params: PyTree, momentum: float) -> PyTree:
  """theta_k <- m theta_k + (1 - m) theta_q (MoCo, equation 2); parameters only, not statistics."""
  query = {k: jax.lax.stop_gradient(params[k]) for k in key['params']}
  return {**key, 'params': optax.incremental_update(query, key['params'], 1 - momentum)}


def encode(net: Tower, key: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
  """Keys of images x `[n, h, w, 3]`: unit rows `[n, d]` without a gradient; and the new key encoder.

  It is in training mode: batch statistics normalise, its own running averages move.
  """
  hiddens, stats = net.apply(key['params'], key['stats'], x)
  return jax.lax.stop_gradient(losses.l2_normalize(hiddens[-1])), {**key, 'stats': stats}
