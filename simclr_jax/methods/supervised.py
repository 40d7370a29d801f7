"""The supervised baseline: the same encoder, trained with labels by cross-entropy."""

import math

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import losses
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import probe
from simclr_jax.methods import Method
from simclr_jax.models import tower

FIELDS = {}


def build(config: ml_collections.ConfigDict) -> Method:
  """f: ResNet; on it one dense layer, kernel N(0, 0.01) and bias 0; loss: cross-entropy."""
  classes = config.data.num_classes
  if not classes:
    raise ConfigError('method=supervised needs labels: set data.num_classes')
  net = tower.build(config)

  def init(rng, batch):
    net_key, head_key = jax.random.split(rng)
    params, stats = net.init(net_key, batch['views'][:, 0])
    d = len(params.pop('probe')['kernel'])
    kernel = 0.01 * jax.random.normal(head_key, (d, classes))
    params['classifier'] = {'kernel': kernel, 'bias': jnp.zeros(classes)}
    return params, {'stats': stats}

  def loss(params, state, batch, rng):
    del rng
    hiddens, stats = net.apply(params, state['stats'], batch['views'][:, 0])
    value, accuracy = probe.loss(params['classifier'], hiddens[0], batch['label'])
    metrics = {
      'loss': value,
      'train_acc': accuracy,
      'chance_loss': math.log(classes),
      'embeddings': losses.l2_normalize(hiddens[0])[:, None],
    }
    return value, ({'stats': stats}, metrics)

  return Method(
    init,
    loss,
    encoder=lambda params, state: tower.encoder(params, state['stats']),
    views=1,
    needs_labels=True,
  )
