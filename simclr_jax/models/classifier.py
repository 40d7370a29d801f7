"""Classifiers for fine-tuning and distillation: an encoder, the first layers of its head, and a linear classifier."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simclr_jax.models import encoders, linear, mlp
from simclr_jax.models.network import apply_train, forward_z

PyTree = Any


class Classifier(NamedTuple):
  """An encoder with a classifier, as two pure functions.

  The variables are `params`, with the keys 'encoder', 'head' and 'classifier', and `batch_stats`, the running
  averages of BatchNorm, with the keys 'encoder' and 'head'.

  Attributes:
    init: `init(rng, x) -> variables`; the linear classifier is zero-initialised.
    apply: `apply(variables, x, train) -> (h, logits, batch_stats)`: images x `[n, h, w, c]` in [0, 1], features h
      `[n, d]`, logits float32 `[n, classes]`, and the new running averages.
  """

  init: Callable[[jax.Array, jax.Array], PyTree]
  apply: Callable[[PyTree, jax.Array, bool], tuple[jax.Array, jax.Array, PyTree]]


def build(
  config: Any,
  classes: int,
  head_layer: int = 0,
  frozen: int = -1,
  dtype: Any = jnp.float32,
  rematerialize: str = 'false',
) -> Classifier:
  """The classifier of a recipe.

  Args:
    config: the `model` part of the recipe.
    classes: number of classes.
    head_layer: number of layers of the projection head below the classifier; SimCLR v2 keeps 1.
    frozen: as for `resnet.ResNet`; 4 freezes the entire encoder.
    dtype: dtype of the convolutions and of the matrix products in the head; the linear classifier is float32.
    rematerialize: as for `resnet.ResNet`.

  Raises:
    ConfigError: as for `encoders.build`.
  """
  f = encoders.build(config, dtype, frozen, rematerialize)
  g = mlp.head(config, dtype, keep=head_layer)

  def init(rng, x):
    f_key, g_key = jax.random.split(rng)
    h, f_vars = f.init_with_output(f_key, x, train=False)
    outputs, g_vars = g.init_with_output(g_key, h, train=False)
    return {
      'params': {
        'encoder': f_vars['params'],
        'head': g_vars.get('params', {}),
        'classifier': linear.init(outputs[-1].shape[-1], classes),
      },
      'batch_stats': {
        'encoder': f_vars.get('batch_stats', {}),
        'head': g_vars.get('batch_stats', {}),
      },
    }

  def apply(variables, x, train):
    params, stats = variables['params'], variables['batch_stats']
    h, f_stats = apply_train(f, params['encoder'], stats['encoder'], x, train and frozen < 4)
    outputs, g_stats = apply_train(g, params['head'], stats['head'], h, train)
    logits = linear.logits(params['classifier'], outputs[-1])
    return h, logits, {'encoder': f_stats, 'head': g_stats}

  return Classifier(init, apply)


def forward(
  architecture: dict[str, Any], dtype: Any = jnp.float32
) -> Callable[[PyTree, jax.Array], jax.Array]:
  """The forward pass of an architecture, in evaluation mode: BatchNorm uses its running averages.

  Args:
    architecture: see `config.architecture`.
    dtype: dtype of the convolutions.

  Returns:
    `forward(variables, x)`: images x float32 `[n, h, w, c]` in [0, 1] -> features `[n, d]`, or if the architecture has
    'classes', logits `[n, classes]`; if 'features' is 'z', the output of the projection head.
  """
  if architecture.get('features') == 'z':
    return forward_z(architecture, dtype)
  if 'classes' in architecture:
    net = build(architecture, architecture['classes'], architecture['head_layer'], dtype=dtype)
    return lambda variables, x: net.apply(variables, x, False)[1]
  encoder = encoders.build(architecture, dtype)

  def encode(variables, x):
    return encoder.apply(variables, x, train=False)

  return encode
