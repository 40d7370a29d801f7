"""Batch normalisation whose statistics do not depend on the number of devices."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax.models import by_parts

LAYOUTS = ('contiguous', 'strided')


class BatchNorm(nn.Module):
  """Batch normalisation of `groups` equal parts of the global batch.

  With `groups=1`, the statistics are those of the global batch on all devices (SimCLR's cross-replica BatchNorm), and
  the layer equals `flax.linen.BatchNorm`. With `groups=g`, each group of n / g examples is normalised with its own
  statistics, as on g GPUs without synchronisation; the running averages are updated with the mean over the groups.

  The variance is E[x^2] - E[x]^2, in float32.

  Attributes:
    groups: number of groups; divides the batch size.
    layout: 'contiguous': group i is the i-th block of n / g rows, as GPUs split a batch; devices that hold entire
      groups do not communicate. 'strided': group i has the rows i, i + g, i + 2g, ... (SplitBatchNorm of MoCo's
      CIFAR-10 demo).
    momentum: decay of the running averages: new = momentum * old + (1 - momentum) * batch.
    epsilon: added to the variance.
    unbiased: whether the running variance is the unbiased one, multiplied by m / (m - 1) for m values per channel and
      group. It is in PyTorch, it is not in SimCLR.
    use_bias: whether the layer has the learned parameter beta (offset).
    use_scale: whether the layer has the learned parameter gamma (scale).
    scale_init: initialiser of gamma.
    dtype: dtype of the output.
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
  def __call__(self, x: by_parts.Array, train: bool) -> by_parts.Array:
    """Normalises x `[n, ..., c]`: with batch statistics if `train`, which updates `batch_stats`, else with these.

    Statistics of an x that is delayed are computed now, its normalisation is delayed.
    """
    if self.layout not in LAYOUTS:
      raise ValueError(f'BatchNorm layout {self.layout!r} is not one of {LAYOUTS}')
    c = x.shape[-1]
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (c,), jnp.float32)
    running_var = self.variable('batch_stats', 'var', jnp.ones, (c,), jnp.float32)

    delayed = isinstance(x, by_parts.Delayed)
    if train:
      x = by_parts.evaluate(x)
      y = x.astype(jnp.float32)
      if x.shape[0] % self.groups:
        raise ValueError(f'a batch of {x.shape[0]} does not split into {self.groups} groups')
      size = x.shape[0] // self.groups
      contiguous = self.layout == 'contiguous'
      rows = (self.groups, size) if contiguous else (size, self.groups)
      y = y.reshape(*rows, *x.shape[1:])

      values = size * math.prod(x.shape[1:-1])
      mean, mean_square = _sums((y, y * y), 1 if contiguous else 0) / values  # [g, c]
      var = jnp.maximum(mean_square - mean * mean, 0.0)
      if not self.is_initializing():
        sample_var = var * (values / max(values - 1, 1)) if self.unbiased else var
        for running, batch in ((running_mean, mean), (running_var, sample_var)):
          running.value = self.momentum * running.value + (1 - self.momentum) * batch.mean(axis=0)
      shape = (self.groups, 1) if contiguous else (1, self.groups)
      mean, var = (v.reshape(*shape, *[1] * (x.ndim - 2), c) for v in (mean, var))
    else:
      mean, var = running_mean.value, running_var.value

    # The backward pass of one multiply-add per value takes half as long as that of (y - mean) * factor + beta.
    factor = jax.lax.rsqrt(var + self.epsilon)
    if self.use_scale:
      factor = factor * self.param('scale', self.scale_init, (c,), jnp.float32)
    offset = -mean * factor
    if self.use_bias:
      offset = offset + self.param('bias', nn.initializers.zeros, (c,), jnp.float32)

    def normalised(x, factor, offset):
      return (x.astype(jnp.float32) * factor + offset).astype(self.dtype)

    if not train:
      return by_parts.apply(normalised, x, factor, offset)
    if not delayed:
      y = _multiply_add(y, factor, offset, 1 if contiguous else 0)
      return y.astype(self.dtype).reshape(x.shape)
    if self.groups == 1:
      return by_parts.apply(normalised, by_parts.delay(x), factor[0], offset[0])
    of_rows = [
      jnp.broadcast_to(v, (*rows, *v.shape[2:])).reshape(-1, *v.shape[2:]) for v in (factor, offset)
    ]
    return by_parts.apply(normalised, *map(by_parts.delay, (x, *of_rows)))


def _sums(arrays, axis):
  """Sums over rows, axis 0 or 1, and pixels of arrays `[g, n, ..., c]` or `[n, g, ..., c]`: `[len(arrays), g, c]`.

  The sums over pixels come first, which takes half the time on a CPU; a GPU stacks them to add all rows in one kernel.
  """
  pixels = tuple(range(2, arrays[0].ndim - 1))
  return jnp.stack([jnp.sum(x, pixels) for x in arrays]).sum(1 + axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _multiply_add(y, factor, offset, axis):
  """`y * factor + offset`, whose backward pass adds both gradients by `_sums`."""
  return y * factor + offset


def _forward(y, factor, offset, axis):
  return _multiply_add(y, factor, offset, axis), (y, factor)


def _backward(axis, saved, dz):
  y, factor = saved
  dfactor, doffset = _sums((y * dz, dz), axis)
  return dz * factor, dfactor.reshape(factor.shape), doffset.reshape(factor.shape)


_multiply_add.defvjp(_forward, _backward)
