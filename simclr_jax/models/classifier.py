"""What fine-tuning and distillation train: an encoder, the first layers of its head, a linear classifier."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simclr_jax.models import heads, resnet

PyTree = Any
PARTS = ('encoder', 'head', 'classifier')


class Classifier(NamedTuple):
  """An encoder with a classifier.

  Variables are `params`, with the keys `PARTS`, and `batch_stats`, with the first two.

  Attributes:
    init: `init(rng, x) -> variables`; the classifier's kernel and bias are 0.
    apply: `apply(variables, x, train) -> (h, logits, batch_stats)`: images x `[n, h, w, 3]` in [0, 1],
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
    frozen, rematerialize: as of `resnet.ResNet`.
    dtype: of convolutions and of the head's products; the classifier's are float32.
  """
  f = resnet.from_config(config, dtype, frozen, rematerialize)
  g = heads.from_config(config, dtype, keep=head_layer)

  def init(rng, x):
    f_key, g_key = jax.random.split(rng)
    h, f_vars = f.init_with_output(f_key, x, train=False)
    hiddens, g_vars = g.init_with_output(g_key, h, train=False)
    kernel = jnp.zeros((hiddens[-1].shape[-1], classes))
    return {
      'params': {
        'encoder': f_vars['params'],
        'head': g_vars.get('params', {}),
        'classifier': {'kernel': kernel, 'bias': jnp.zeros(classes)},
      },
      'batch_stats': {'encoder': f_vars['batch_stats'], 'head': g_vars.get('batch_stats', {})},
    }

  def apply(variables, x, train):
    params, stats = variables['params'], variables['batch_stats']

    def run(module, part, x):
      given = {'params': params[part], 'batch_stats': stats[part]}
      y, new = module.apply(given, x, train=train, mutable='batch_stats')
      return y, new.get('batch_stats', stats[part])

    h, f_stats = run(f, 'encoder', x)
    hiddens, g_stats = run(g, 'head', h)
    top = params['classifier']
    logits = hiddens[-1].astype(jnp.float32) @ top['kernel'] + top['bias']
    return h, logits, {'encoder': f_stats, 'head': g_stats}

  return Classifier(init, apply)
