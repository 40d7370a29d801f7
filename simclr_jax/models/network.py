"""The network of the contrastive methods: an encoder f and a projection head g."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax.models import encoders, linear, mlp

PyTree = Any


class Network(NamedTuple):
  """An encoder and its projection head, as two pure functions.

  Attributes:
    init: `init(rng, x) -> (params, stats)`, both with the keys 'encoder' and 'head'; `stats` are the
      running averages of BatchNorm. With `data.num_classes`, `params` also has the online 'probe'.
    apply: `apply(params, stats, x) -> (outputs, stats)` in training mode: images x `[n, h, w, c]` in
      [0, 1]; `outputs` is `[h, ..., z]`: the features `[n, d]`, the hidden layers of the head, and its output.
  """

  init: Callable[[jax.Array, jax.Array], tuple[PyTree, PyTree]]
  apply: Callable[[PyTree, PyTree, jax.Array], tuple[list[jax.Array], PyTree]]


def build(config: ml_collections.ConfigDict) -> Network:
  """The network of a recipe.

  Raises:
    ConfigError: as for `encoders.build`.
  """
  dtype = encoders.compute_dtype(config.dtype)
  f = encoders.build(config.model, dtype, rematerialize=config.rematerialize)
  g = mlp.head(config.model, dtype)

  def init(rng, x):
    f_key, g_key = jax.random.split(rng)
    h, f_vars = f.init_with_output(f_key, x, train=False)
    g_vars = g.init(g_key, h, train=False)
    params = {'encoder': f_vars['params'], 'head': g_vars.get('params', {})}
    stats = {'encoder': f_vars.get('batch_stats', {}), 'head': g_vars.get('batch_stats', {})}
    if config.data.num_classes:
      params['probe'] = linear.init(h.shape[-1], config.data.num_classes)
    return params, stats

  def apply(params, stats, x):
    h, f_new = apply_train(f, params['encoder'], stats['encoder'], x)
    outputs, g_new = apply_train(g, params['head'], stats['head'], h)
    return outputs, {'encoder': f_new, 'head': g_new}

  return Network(init, apply)


def apply_train(
  module: nn.Module, params: PyTree, stats: PyTree, x: jax.Array, train: bool = True
) -> tuple[Any, PyTree]:
  """Applies a flax module to x.

  Args:
    module: called as `module(x, train=train)`.
    params, stats: its parameters, and running averages of BatchNorm; `stats` is `{}` without BatchNorm.
    x: the input.
    train: whether BatchNorm uses batch statistics and updates the running averages.

  Returns:
    The output of the module, and the new running averages.
  """
  variables = {'params': params} | ({'batch_stats': stats} if stats else {})
  y, new = module.apply(variables, x, train=train, mutable='batch_stats')
  return y, new.get('batch_stats', stats)


def projection(params: PyTree, stats: PyTree) -> PyTree:
  """The variables of encoder and projection head, for `forward_z`; `params` and `stats` as of `Network`."""
  parts = ('encoder', 'head')
  return {'params': {k: params[k] for k in parts}, 'batch_stats': {k: stats[k] for k in parts}}


def forward_z(
  architecture: dict[str, Any], dtype: Any = jnp.float32
) -> Callable[[PyTree, jax.Array], jax.Array]:
  """The forward pass of encoder and projection head, in evaluation mode.

  Args:
    architecture: see `config.architecture`.
    dtype: dtype of convolutions and matrix products.

  Returns:
    `forward(variables, x)`: variables of `projection`, images x `[n, h, w, c]` in [0, 1] -> z `[n, d]`, not normalised.
  """
  f, g = encoders.build(architecture, dtype), mlp.head(architecture, dtype)

  def forward(variables, x):
    params, stats = variables['params'], variables['batch_stats']
    h, _ = apply_train(f, params['encoder'], stats['encoder'], x, train=False)
    outputs, _ = apply_train(g, params['head'], stats['head'], h, train=False)
    return outputs[-1]

  return forward


def output_size(config: ml_collections.ConfigDict) -> int:
  """The size d of the output z `[n, d]` of the head; without a head, the size of the features."""
  if config.model.head != 'none':
    return config.model.head_dim
  f, size = encoders.build(config.model), config.image_size
  x = jax.ShapeDtypeStruct((1, size, size, config.data.channels), jnp.float32)
  shapes, _ = jax.eval_shape(lambda x: f.init_with_output(jax.random.key(0), x, train=False), x)
  return shapes.shape[-1]


def encoder(params: PyTree, stats: PyTree) -> PyTree:
  """The flax variables of the encoder, for evaluation and export: `params` and, with BatchNorm, `batch_stats`."""
  if not stats['encoder']:
    return {'params': params['encoder']}
  return {'params': params['encoder'], 'batch_stats': stats['encoder']}
