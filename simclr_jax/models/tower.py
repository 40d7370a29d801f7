"""What the methods train: an encoder f with a projection head g on it, as two pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections

from simclr_jax.models import heads, linear, resnet

PyTree = Any


class Tower(NamedTuple):
  """An encoder and its head.

  Attributes:
    init: `init(rng, x) -> (params, stats)`, both with the keys 'encoder' and 'head'; `stats` are the
      running averages of BatchNorm. With `data.num_classes`, params has the online 'probe' too.
    apply: `apply(params, stats, x) -> (hiddens, stats)` in training mode: images x `[n, h, w, 3]` in
      [0, 1]; hiddens is `[h, ..., z]`, the features `[n, d]`, the head's hidden layers, its output.
  """

  init: Callable[[jax.Array, jax.Array], tuple[PyTree, PyTree]]
  apply: Callable[[PyTree, PyTree, jax.Array], tuple[list[jax.Array], PyTree]]


def build(config: ml_collections.ConfigDict) -> Tower:
  """The tower of a recipe."""
  dtype = resnet.compute_dtype(config.dtype)
  f = resnet.from_config(config.model, dtype, rematerialize=config.rematerialize)
  g = heads.from_config(config.model, dtype)

  def init(rng, x):
    f_key, g_key = jax.random.split(rng)
    h, f_vars = f.init_with_output(f_key, x, train=False)
    g_vars = g.init(g_key, h, train=False)
    params = {'encoder': f_vars['params'], 'head': g_vars.get('params', {})}
    stats = {'encoder': f_vars['batch_stats'], 'head': g_vars.get('batch_stats', {})}
    if config.data.num_classes:
      params['probe'] = linear.init(h.shape[-1], config.data.num_classes)
    return params, stats

  def apply(params, stats, x):
    h, f_new = _train(f, params['encoder'], stats['encoder'], x)
    hiddens, g_new = _train(g, params['head'], stats['head'], h)
    return hiddens, {'encoder': f_new, 'head': g_new}

  return Tower(init, apply)


def output_size(config: ml_collections.ConfigDict) -> int:
  """d of z `[n, d]`, the head's output, or without a head of the features."""
  if config.model.head != 'none':
    return config.model.head_dim
  blocks, bottleneck = resnet.DEPTHS[config.model.depth]
  return int(64 * config.model.width_multiplier) * 2 ** (len(blocks) - 1) * (4 if bottleneck else 1)


def _train(module, params, stats, x):
  y, new = module.apply(
    {'params': params, 'batch_stats': stats}, x, train=True, mutable='batch_stats'
  )
  return y, new.get('batch_stats', stats)


def encoder(params: PyTree, stats: PyTree) -> PyTree:
  """The variables of f, for evaluation and export."""
  return {'params': params['encoder'], 'batch_stats': stats['encoder']}
