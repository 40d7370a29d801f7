"""Supervised learning by cross-entropy: from scratch, the papers' baseline, or fine-tuning.

With `init_from`, the encoder and the first `head_layer` layers of its projection head are initialised with the
weights of a pretrained run; `fine_tune_after_block` freezes some of them.

Source: SimCLR (Chen et al. 2020a, appendix B.5); SimCLR v2 (Chen et al. 2020b, section 2), which keeps the first
layer of the head.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from simclr_jax import losses
from simclr_jax.errors import ConfigError
from simclr_jax.fields import Field, Range
from simclr_jax.methods import Method
from simclr_jax.models import classifier, encoders, mlp, network, resnet

PyTree = Any
Loss = tuple[jax.Array, dict[str, Any]]  # loss, metrics

FIELDS = {
  'head_layer': Field(
    0, 'layers of the projection head that are kept below the classifier', Range(0, 4)
  ),
  'fine_tune_after_block': Field(
    -1,
    '-1: all layers are trained; 0: all but the stem; 1 to 3: all after this group; 4: the encoder is frozen',
    Range(-1, 4),
  ),
}


def build(config: ml_collections.ConfigDict) -> Method:
  """f: the encoder; g: the first layers of its head; a dense layer; loss: cross-entropy."""
  return from_classifier(config, cross_entropy, needs_labels=True)


def cross_entropy(h: jax.Array, logits: jax.Array, batch: PyTree) -> Loss:
  """Loss in nats and `train_acc` of features h `[n, d]`, which are not used, and logits `[n, classes]`."""
  value, accuracy = losses.cross_entropy(logits, batch['label'])
  return value, {'train_acc': accuracy}


def from_classifier(
  config: ml_collections.ConfigDict,
  objective: Callable[[jax.Array, jax.Array, PyTree], Loss],
  **traits: Any,
) -> Method:
  """A method that trains the classifier of a recipe on one view of each image.

  Args:
    config: a recipe.
    objective: `objective(h, logits, batch) -> (loss, metrics)`, such as `cross_entropy`.
    traits: further attributes of the `Method`.

  Raises:
    ConfigError: the recipe has no classes, or keeps or freezes layers that its network does not have.
  """
  _check(config)
  frozen = config.fine_tune_after_block
  net = classifier.build(
    config.model,
    config.data.num_classes,
    config.head_layer,
    frozen,
    encoders.compute_dtype(config.dtype),
    config.rematerialize,
  )

  def init(rng, batch):
    net_key, head_key = jax.random.split(rng)
    initial = net.init(net_key, batch['views'][:, 0])
    params, frozen_params = initial['params'], {}
    if not config.init_from:
      kernel = params['classifier']['kernel']
      params['classifier']['kernel'] = 0.01 * jax.random.normal(head_key, kernel.shape)
    for name in list(params['encoder']):
      if frozen == 4 or (frozen >= 0 and resnet.is_frozen(name, frozen)):
        frozen_params[name] = params['encoder'].pop(name)
    return params, {'stats': initial['batch_stats'], 'frozen': frozen_params}

  def loss(params, state, batch, rng):
    del rng
    h, logits, stats = net.apply(_variables(params, state), batch['views'][:, 0], True)
    value, metrics = objective(h, logits, batch)
    metrics |= {
      'loss': value,
      'chance_loss': math.log(logits.shape[-1]),
      'embeddings': losses.l2_normalize(h)[:, None],
    }
    return value, ({**state, 'stats': stats}, metrics)

  return Method(
    init,
    loss,
    _encoder_variables,
    views=1,
    classifier=_variables,
    load_pretrained=_load_pretrained if config.init_from else None,
    **traits,
  )


def _check(config):
  if not config.data.num_classes:
    raise ConfigError(f'method={config.method} needs labels: set data.num_classes')
  layers = mlp.depth(config.model)
  if config.head_layer > layers:
    raise ConfigError(
      f'head_layer={config.head_layer}: the projection head has {layers} layers, see model.head_layers'
    )
  if config.model.encoder and config.fine_tune_after_block not in (-1, 4):
    raise ConfigError(
      f'fine_tune_after_block={config.fine_tune_after_block} is for ResNets; with model.encoder use -1 or 4'
    )


def _variables(params, state):
  """The variables of the classifier. Frozen parameters are in `state`, so that the optimizer does not see them."""
  all_params = {**params, 'encoder': {**state['frozen'], **params['encoder']}}
  return {'params': all_params, 'batch_stats': state['stats']}


def _encoder_variables(params, state):
  variables = _variables(params, state)
  return network.encoder(variables['params'], variables['batch_stats'])


def _load_pretrained(params, state, pretrained):
  """See `Method.load_pretrained`. A weight that the pretrained network lacks is None."""
  weights, stats = pretrained['params'], pretrained['batch_stats']
  new_params, new_stats = dict(params), {}
  for part in ('encoder', 'head'):
    new_params[part] = {k: weights[part].get(k) for k in params[part]}
    new_stats[part] = {k: stats[part].get(k) for k in state['stats'][part]}
  frozen_params = {k: weights['encoder'].get(k) for k in state['frozen']}
  return new_params, {'stats': new_stats, 'frozen': frozen_params}
