"""Multilayer perceptrons: projection heads and predictors."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax.models.layers import Dense
from simclr_jax.models.norm import BatchNorm

NORMS = ('all', 'hidden', 'none', 'all_last_plain')


class MLP(nn.Module):
  """Dense layers with a ReLU after each but the last.

  `norm` selects where batch normalisation is applied:

  - 'all': after every layer, the last without offset (beta); no biases. The heads of SimCLR, v1 with 2 layers, v2 with
    3 (Chen et al. 2020a, 2020b).
  - 'none': nowhere; all layers have biases. The heads of MoCo, v1 with 1 layer, v2 with 2 (He et al. 2020; Chen et al.
    2020c).
  - 'hidden': after every layer but the last, which has a bias (BYOL, Barlow Twins, VICReg).
  - 'all_last_plain': after every layer, the last without scale and offset (SimSiam, MoCo v3).

  Kernels are initialised as in SimCLR's code for 'all', and as in torch.nn.Linear otherwise.

  Attributes:
    layers: number of dense layers; 0: the identity.
    dim: size of the output z.
    hidden: width of the hidden layers; 0: the width of the input.
    norm: see above.
    groups: as for `norm.BatchNorm`.
    layout: as for `norm.BatchNorm`.
    dtype: dtype of the matrix products.
    keep: number of layers that are built, from the first; None: all.
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
    """Features h `[n, d]` -> `[h, hidden 1, ..., z]`: the hidden layers after their ReLU, and z `[n, dim]`."""
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
  """The projection head of a recipe's `model` part; `dtype` and `keep` as for `MLP`."""
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
