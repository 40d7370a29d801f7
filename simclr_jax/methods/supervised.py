"""Learning from labels by cross-entropy: from scratch, the papers' baseline, or fine-tuning.

With `init_from` the encoder, and with `head_layer` the first layers of its projection head, begin with
the weights of a pretrained run, and all of them are trained but those that `fine_tune_after_block`
freezes. Source: SimCLR (Chen et al. 2020a, appendix B.5); SimCLR v2 (2020b, section 2) keeps the head's first
layer.
"""

import math

import jax
import ml_collections

from simclr_jax import losses
from simclr_jax.errors import ConfigError
from simclr_jax.methods import Method
from simclr_jax.models import classifier, heads, resnet

FIELDS = {
  'init_from': ('', None),  # a run or an exported encoder; empty: from scratch
  'head_layer': (0, (0, 4)),  # the layers of the projection head that are kept
  # -1: all is trained. 0: but the stem; 1 to 3: but the groups up to this one; 4: the encoder is frozen.
  'fine_tune_after_block': (-1, (-1, 4)),
}


def build(config: ml_collections.ConfigDict) -> Method:
  """f: ResNet; g: the first layers of its head; a dense layer; loss: cross-entropy."""
  net, init, variables = network(config)

  def loss(params, state, batch, rng):
    del rng
    h, logits, stats = net.apply(variables(params, state), batch['views'][:, 0], True)
    value, accuracy = losses.cross_entropy(logits, batch['label'])
    return value, ({**state, 'stats': stats}, figures(value, accuracy, h, logits))

  return Method(
    init,
    loss,
    encoder=lambda params, state: encoder(variables(params, state)),
    views=1,
    needs_labels=True,
    start=starter(config),
    classifier=variables,
  )


def network(config: ml_collections.ConfigDict):
  """The recipe's `classifier.Classifier`, `init` as of a method, `variables(params, state)`.

  What is frozen lives in `state['frozen']`, so that no optimizer sees it.
  """
  classes, kept, frozen = config.data.num_classes, config.head_layer, config.fine_tune_after_block
  if not classes:
    raise ConfigError(f'method={config.method} needs labels: set data.num_classes')
  if kept > heads.count(config.model.head, config.model.head_layers):
    raise ConfigError(f'head_layer={kept}: the projection head has no such layer')
  dtype = resnet.compute_dtype(config.dtype)
  net = classifier.build(config.model, classes, kept, frozen, dtype, config.rematerialize)

  def init(rng, batch):
    net_key, head_key = jax.random.split(rng)
    fresh = net.init(net_key, batch['views'][:, 0])
    params, still = fresh['params'], {}
    if not config.init_from:
      kernel = params['classifier']['kernel']
      params['classifier']['kernel'] = 0.01 * jax.random.normal(head_key, kernel.shape)
    for name in list(params['encoder']):
      if resnet.is_frozen(name, frozen):
        still[name] = params['encoder'].pop(name)
    return params, {'stats': fresh['batch_stats'], 'frozen': still}

  def variables(params, state):
    whole = {**params, 'encoder': {**state['frozen'], **params['encoder']}}
    return {'params': whole, 'batch_stats': state['stats']}

  return net, init, variables


def starter(config: ml_collections.ConfigDict):
  """A function that puts the pretrained weights into fresh (params, state), or None."""
  if not config.init_from:
    return None

  def start(params, state):
    from simclr_jax.interop import orbax  # which needs to know the methods

    given = orbax.load_tower(config.init_from, head=config.head_layer > 0)
    new = {'stats': {}, 'frozen': {}}
    for name in state['frozen']:
      new['frozen'][name] = given['params']['encoder'].get(name)
    params = dict(params)
    for part in ('encoder', 'head'):
      params[part] = {k: given['params'][part].get(k) for k in params[part]}
      new['stats'][part] = {k: given['batch_stats'][part].get(k) for k in state['stats'][part]}
    return params, new

  return start


def encoder(variables):
  """The part of a classifier's variables that is the encoder's."""
  return {key: part['encoder'] for key, part in variables.items()}


def figures(value, accuracy, h, logits):
  """The metrics of a classifier: features h `[n, d]`, logits `[n, classes]`."""
  return {
    'loss': value,
    'train_acc': accuracy,
    'chance_loss': math.log(logits.shape[-1]),
    'embeddings': losses.l2_normalize(h)[:, None],
  }
