"""Batch normalisation whose statistics do not depend on how many devices compute them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
  """Batch normalisation over `groups` equal, contiguous parts of the global batch.

  With `groups=1` the statistics are those of the whole batch on all devices (SimCLR's
  cross-replica BatchNorm) and the layer equals `flax.linen.BatchNorm`. With `groups=g` each part of
  n / g examples is normalised by its own statistics, as g GPUs without synchronisation would do;
  the running averages take the mean over the groups.

  Variance is E[x^2] - E[x]^2 in float32, biased, also in the running average (SimCLR's
  SyncBatchNormalization).

  Attributes:
    groups: number of parts; divides the batch.
    momentum: the share of the old running average that a step keeps.
    epsilon: added to the variance.
    use_bias, use_scale: whether the layer has the learned offset beta and factor gamma.
    scale_init: initialiser of gamma.
    dtype: of the output.
  """

  groups: int = 1
  momentum: float = 0.9
  epsilon: float = 1e-5
  use_bias: bool = True
  use_scale: bool = True
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Normalises `x` `[n, ..., c]`; updates `batch_stats` when `train`."""
    c = x.shape[-1]
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (c,), jnp.float32)
    running_var = self.variable('batch_stats', 'var', jnp.ones, (c,), jnp.float32)

    y = x.astype(jnp.float32)
    if train:
      if x.shape[0] % self.groups:
        raise ValueError(f'a batch of {x.shape[0]} does not split into {self.groups} groups')
      y = y.reshape(self.groups, -1, *x.shape[1:])  # [g, n/g, ..., c]

      def average(v):  # -> [g, c]; over the pixels first: half the time on a CPU
        return jnp.mean(jnp.mean(v, axis=range(2, v.ndim - 1)), axis=1)

      mean = average(y)
      var = jnp.maximum(average(y * y) - mean * mean, 0.0)
      if not self.is_initializing():
        for running, batch in ((running_mean, mean), (running_var, var)):
          running.value = self.momentum * running.value + (1 - self.momentum) * batch.mean(axis=0)
      mean, var = (v.reshape(self.groups, *[1] * (x.ndim - 1), c) for v in (mean, var))
    else:
      mean, var = running_mean.value, running_var.value

    # One multiply-add a value costs the backward pass half of what (y - mean) * factor + beta does.
    factor = jax.lax.rsqrt(var + self.epsilon)
    if self.use_scale:
      factor = factor * self.param('scale', self.scale_init, (c,), jnp.float32)
    offset = -mean * factor
    if self.use_bias:
      offset = offset + self.param('bias', nn.initializers.zeros, (c,), jnp.float32)
    y = y * factor + offset
    return y.reshape(x.shape).astype(self.dtype)
