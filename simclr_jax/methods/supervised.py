"""Learning from labels by cross-entropy: from scratch, the papers' baseline, or fine-tuning.

With `init_from` the encoder, and with `head_layer` the first layers of its projection head, start from the
weights of a pretrained run, and all of them are trained except those that `fine_tune_after_block`
freezes. Source: SimCLR (Chen et al. 2020a, appendix B.5); SimCLR v2 (2020b, section 2) keeps the head's first
layer.
"""

import math

import jax
import ml_collections

from simclr_jax import losses
from simclr_jax.errors import ConfigError
from simclr_jax.fields import Field, Range
from simclr_jax.methods import Method
from simclr_jax.models import classifier, encoders, mlp, network, resnet

FIELDS = {
  'init_from': Field('', 'a run or an exported encoder to start from; empty: from scratch'),
  'head_layer': Field(0, 'layers of the projection head that are kept', Range(0, 4)),
  'fine_tune_after_block': Field(
    -1,
    '-1: all layers are trained; 0: all but the stem; 1 to 3: all after this group; 4: the encoder is frozen',
    Range(-1, 4),
  ),
}


def build(config: ml_collections.ConfigDict) -> Method:
  """f: the encoder; g: the first layers of its head; a dense layer; loss: cross-entropy."""
  return from_classifier(config, cross_entropy, needs_labels=True)


def cross_entropy(h, logits, batch):
  """Loss and metrics of features h `[n, d]` and logits `[n, classes]`."""
  value, accuracy = losses.cross_entropy(logits, batch['label'])
  return value, {'train_acc': accuracy}


def from_classifier(config: ml_collections.ConfigDict, objective, **traits) -> Method:
  """A method that trains the recipe's classifier on one view of each image.

  Args:
    config: the recipe.
    objective: `(h, logits, batch) -> (loss, metrics)`.
    traits: of the `Method`.
  """
  classes, kept, frozen = config.data.num_classes, config.head_layer, config.fine_tune_after_block
  if not classes:
    raise ConfigError(f'method={config.method} needs labels: set data.num_classes')
  if kept > mlp.depth(config.model):
    raise ConfigError(f'head_layer={kept}: the projection head has no such layer')
  if config.model.encoder and frozen not in (-1, 4):
    raise ConfigError(
      f'fine_tune_after_block={frozen} is for ResNets; with model.encoder use -1 or 4'
    )
  dtype = encoders.compute_dtype(config.dtype)
  net = classifier.build(config.model, classes, kept, frozen, dtype, config.rematerialize)

  def init(rng, batch):
    net_key, head_key = jax.random.split(rng)
    variables = net.init(net_key, batch['views'][:, 0])
    params, still = variables['params'], {}
    if not config.init_from:
      kernel = params['classifier']['kernel']
      params['classifier']['kernel'] = 0.01 * jax.random.normal(head_key, kernel.shape)
    for name in list(params['encoder']):
      if frozen == 4 or (frozen >= 0 and resnet.is_frozen(name, frozen)):
        still[name] = params['encoder'].pop(name)
    return params, {'stats': variables['batch_stats'], 'frozen': still}

  def variables(params, state):
    # Frozen parameters live in `state`, so that no optimizer sees them.
    whole = {**params, 'encoder': {**state['frozen'], **params['encoder']}}
    return {'params': whole, 'batch_stats': state['stats']}

  def encoder(params, state):
    found = variables(params, state)
    return network.encoder(found['params'], found['batch_stats'])

  def loss(params, state, batch, rng):
    del rng
    h, logits, stats = net.apply(variables(params, state), batch['views'][:, 0], True)
    value, metrics = objective(h, logits, batch)
    metrics |= {
      'loss': value,
      'chance_loss': math.log(logits.shape[-1]),
      'embeddings': losses.l2_normalize(h)[:, None],
    }
    return value, ({**state, 'stats': stats}, metrics)

  def load_pretrained(params, state, pretrained):
    weights, stats = pretrained['params'], pretrained['batch_stats']
    new_params, new_stats = dict(params), {}
    for part in ('encoder', 'head'):
      new_params[part] = {k: weights[part].get(k) for k in params[part]}
      new_stats[part] = {k: stats[part].get(k) for k in state['stats'][part]}
    still = {k: weights['encoder'].get(k) for k in state['frozen']}
    return new_params, {'stats': new_stats, 'frozen': still}

  return Method(
    init,
    loss,
    encoder,
    views=1,
    classifier=variables,
    load_pretrained=load_pretrained if config.init_from else None,
    **traits,
  )
