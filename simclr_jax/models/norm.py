"""Batch normalisation whose statistics do not depend on how many devices compute them."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

LAYOUTS = ('contiguous', 'strided')


class BatchNorm(nn.Module):
  """Batch normalisation over `groups` equal parts of the global batch.

  With `groups=1` the statistics are those of the whole batch on all devices (SimCLR's
  cross-replica BatchNorm) and the layer equals `flax.linen.BatchNorm`. With `groups=g` each part of
  n / g examples is normalised by its own statistics, as g GPUs without synchronisation would do;
  the running averages take the mean over the groups.

  Variance is E[x^2] - E[x]^2 in float32.

  Attributes:
    groups: number of parts; divides the batch.
    layout: 'contiguous', where group i holds the i-th run of n / g rows, as GPUs split a batch (to
      normalise, devices that hold whole groups need not communicate); or 'strided', where it holds the rows i,
      i + g, i + 2g ... (SplitBatchNorm of MoCo's CIFAR-10 demo).
    momentum: the share of the old running average that a step keeps.
    epsilon: added to the variance.
    unbiased: whether the running variance is that of a sample, n / (n - 1) times the one that
      normalises, n being the values of a channel in a group. PyTorch does so, SimCLR does not.
    use_bias, use_scale: whether the layer has the learned offset beta and factor gamma.
    scale_init: initialiser of gamma.
    dtype: of the output.
  """

  groups: int = 1
  layout: str = 'contiguous'
  momentum: float = 0.9
  epsilon: float = 1e-5
  unbiased: bool = False
  use_bias: bool = True
  use_scale: bool = True
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Normalises `x` `[n, ..., c]`; updates `batch_stats` when `train`."""
    if self.layout not in LAYOUTS:
      raise ValueError(f'BatchNorm layout {self.layout!r} is not one of {LAYOUTS}')
    c = x.shape[-1]
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (c,), jnp.float32)
    running_var = self.variable('batch_stats', 'var', jnp.ones, (c,), jnp.float32)

    y = x.astype(jnp.float32)
    if train:
      if x.shape[0] % self.groups:
        raise ValueError(f'a batch of {x.shape[0]} does not split into {self.groups} groups')
      members = x.shape[0] // self.groups
      contiguous = self.layout == 'contiguous'
      rows = (self.groups, members) if contiguous else (members, self.groups)
      y = y.reshape(*rows, *x.shape[1:])

      def average(v):  # -> [g, c]; over the pixels first: half the time on a CPU
        pixels = range(2, v.ndim - 1)
        return jnp.mean(jnp.mean(v, axis=pixels), axis=1 if contiguous else 0)

      mean = average(y)
      var = jnp.maximum(average(y * y) - mean * mean, 0.0)
      if not self.is_initializing():
        values = members * math.prod(x.shape[1:-1])
        sample_var = var * (values / max(values - 1, 1)) if self.unbiased else var
        for running, batch in ((running_mean, mean), (running_var, sample_var)):
          running.value = self.momentum * running.value + (1 - self.momentum) * batch.mean(axis=0)
      shape = (self.groups, 1) if contiguous else (1, self.groups)
      mean, var = (v.reshape(*shape, *[1] * (x.ndim - 2), c) for v in (mean, var))
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
