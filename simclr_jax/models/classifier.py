"""What fine-tuning and distillation train: an encoder, the first layers of its head, a linear classifier."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simclr_jax.models import encoders, mlp
from simclr_jax.models.network import apply_train

PyTree = Any


class Classifier(NamedTuple):
  """An encoder with a classifier.

  Variables are `params`, with the keys 'encoder', 'head' and 'classifier', and `batch_stats`, with the first two.

  Attributes:
    init: `init(rng, x) -> variables`; the classifier's kernel and bias are 0.
    apply: `apply(variables, x, train) -> (h, logits, batch_stats)`: images x `[n, h, w, c]` in [0, 1],
      features `[n, d]`, logits `[n, classes]` and the new running averages.
  """

  init: Callable[[jax.Array, jax.Array], PyTree]
  apply: Callable[[PyTree, jax.Array, bool], tuple[jax.Array, jax.Array, PyTree]]


def build(
  config: Any,
  classes: int,
  head_layer: int = 0,
  frozen: int = -1,
  dtype: Any = jnp.float32,
  rematerialize: bool = False,
) -> Classifier:
  """The classifier of a recipe's `model` part.

  Args:
    config: the `model` part.
    classes: how many.
    head_layer: how many layers of the projection head stay below the classifier; SimCLR v2 keeps 1.
    frozen, rematerialize: as of `resnet.ResNet`; with 4 all of the encoder is frozen.
    dtype: of convolutions and of the products in the head; those of the classifier are float32.
  """
  f = encoders.build(config, dtype, frozen, rematerialize)
  g = mlp.head(config, dtype, keep=head_layer)

  def init(rng, x):
    f_key, g_key = jax.random.split(rng)
    h, f_vars = f.init_with_output(f_key, x, train=False)
    outputs, g_vars = g.init_with_output(g_key, h, train=False)
    kernel = jnp.zeros((outputs[-1].shape[-1], classes))
    return {
      'params': {
        'encoder': f_vars['params'],
        'head': g_vars.get('params', {}),
        'classifier': {'kernel': kernel, 'bias': jnp.zeros(classes)},
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
    top = params['classifier']
    logits = outputs[-1].astype(jnp.float32) @ top['kernel'] + top['bias']
    return h, logits, {'encoder': f_stats, 'head': g_stats}

  return Classifier(init, apply)


def forward(
  architecture: dict[str, Any], dtype: Any = jnp.float32
) -> Callable[[PyTree, jax.Array], jax.Array]:
  """`forward(variables, x)` of `config.architecture`: x float32 `[n, h, w, c]` in [0, 1] -> h `[n, d]`.

  BatchNorm uses its running statistics. With 'classes' in `architecture`, logits are returned.
  `dtype` is that of the convolutions.
  """
  if 'classes' in architecture:
    net = build(architecture, architecture['classes'], architecture['head_layer'], dtype=dtype)
    return lambda variables, x: net.apply(variables, x, False)[1]
  return functools.partial(encoders.build(architecture, dtype).apply, train=False)
