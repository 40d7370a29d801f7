"""Multilayer perceptrons on features: projection heads and predictors."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax.models.layers import Dense
from simclr_jax.models.norm import BatchNorm

NORMS = ('all', 'hidden', 'none', 'all_last_plain')


class MLP(nn.Module):
  """Dense layers; all but the last end in a ReLU.

  With norm='all', SimCLR's head g(h): no biases, batch normalisation after every layer, without offset (beta)
  after the last. v1 has 2 layers, v2 has 3. Source: Chen et al. 2020a, 2020b.

  With norm='none', MoCo's: biases and no normalisation, initialised as torch.nn.Linear is. v1 has 1 layer, v2
  has 2. Source: He et al. 2020; Chen et al. 2020c.

  norm='hidden' leaves the last layer a plain linear one with a bias (BYOL, Barlow Twins, VICReg);
  norm='all_last_plain' gives the last normalisation neither scale nor offset (SimSiam, MoCo v3). Both are
  initialised as torch.nn.Linear is.

  Attributes:
    layers: number of dense layers; 0 is the identity.
    dim: size of the output z.
    hidden: width of the hidden layers; 0: that of the input.
    norm: where batch normalisation is, see above.
    groups, layout: of the batch normalisation.
    dtype: of the matrix products.
    keep: how many of the layers there are, from the first; None: all.
  """

  layers: int = 2
  dim: int = 128
  hidden: int = 0
  norm: str = 'all'
  groups: int = 1
  layout: str = 'contiguous'
  dtype: Any = jnp.float32
  keep: int | None = None

  @nn.compact
  def __call__(self, h: jax.Array, train: bool) -> list[jax.Array]:
    """`h` `[n, d]` -> `[h, hidden 1, ..., z]`, hidden layers after their ReLU, z `[n, dim]`."""
    if self.norm not in NORMS:
      raise ValueError(f'MLP norm {self.norm!r} is not one of {NORMS}')
    outputs = [h]
    for i in range(1, 1 + (self.layers if self.keep is None else self.keep)):
      last = i == self.layers
      x = self._dense(i, last, outputs[-1])
      if self.norm.startswith('all') or (self.norm == 'hidden' and not last):
        plain = last and self.norm == 'all_last_plain'
        norm = BatchNorm(
          self.groups, self.layout, use_bias=not last, use_scale=not plain, dtype=self.dtype,
          name=f'bn{i}',
        )  # fmt: skip
        x = norm(x, train)
      outputs.append(x if last else nn.relu(x))
    return outputs

  def _dense(self, i, last, x):
    width = x.shape[-1]

    def torch_linear(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, -(width**-0.5), width**-0.5)

    dense = Dense(
      self.dim if last else self.hidden or width,
      use_bias=self.norm == 'none' or (self.norm == 'hidden' and last),
      kernel_init=nn.initializers.normal(0.01) if self.norm == 'all' else torch_linear,
      bias_init=torch_linear,
      dtype=self.dtype,
      name=f'dense{i}',
    )
    return dense(x)


def depth(config: Any) -> int:
  """The number of dense layers in the head of a recipe's `model` part."""
  return {'none': 0, 'linear': 1, 'mlp': config['head_layers']}[config['head']]


def head(config: Any, dtype: Any = jnp.float32, keep: int | None = None) -> MLP:
  """The projection head of a recipe's `model` part."""
  return MLP(
    layers=depth(config),
    dim=config['head_dim'],
    hidden=config['head_hidden'],
    norm=config['head_norm'],
    groups=config['bn_groups'],
    layout=config['bn_layout'],
    keep=keep,
    dtype=dtype,
  )
