"""The linear classifier of the probes: a dict of two arrays."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import losses

PyTree = Any
Array = TypeVar('Array', jax.Array, np.ndarray)


def init(d: int, classes: int) -> PyTree:
  """A zero-initialised classifier: `kernel` `[d, classes]` and `bias` `[classes]`, float32."""
  return {'kernel': jnp.zeros((d, classes)), 'bias': jnp.zeros((classes,))}


def logits(head: PyTree, h: Array) -> Array:
  """Logits, float32 `[n, classes]`, of features h `[n, d]`; head and h are both of JAX or both of numpy."""
  return h.astype(jnp.float32) @ head['kernel'] + head['bias']


def online_loss(head: PyTree, h: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`losses.cross_entropy` of the online probe: h `[n, d]` gets no gradient, so the encoder is not affected."""
  return losses.cross_entropy(logits(head, jax.lax.stop_gradient(h)), label)
