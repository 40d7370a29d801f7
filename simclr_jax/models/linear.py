"""A linear classifier on features, as two arrays: what the probes train."""

from typing import Any

import jax
import jax.numpy as jnp

from simclr_jax import losses

PyTree = Any


def init(d: int, classes: int) -> PyTree:
  """A classifier of zeros: kernel `[d, classes]` and bias."""
  return {'kernel': jnp.zeros((d, classes)), 'bias': jnp.zeros((classes,))}


def logits(head: PyTree, h: jax.Array) -> jax.Array:
  """Of features `[n, d]`: float32 `[n, classes]`."""
  return h.astype(jnp.float32) @ head['kernel'] + head['bias']


def online_loss(head: PyTree, h: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`losses.cross_entropy` of a probe that trains along with the encoder and must not touch it."""
  return losses.cross_entropy(logits(head, jax.lax.stop_gradient(h)), label)
