"""MoCo (He et al. 2020; version 2: Chen et al. 2020): a query finds its key among a queue of others.

The key encoder is an exponential moving average (EMA) of the query encoder, so keys of earlier batches stay
comparable and the number of negatives does not depend on the batch size.
"""

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import losses, sharding
from simclr_jax.fields import Choices, Field, Range
from simclr_jax.methods import Method
from simclr_jax.models import network
from simclr_jax.momentum import (
  draw_permutation,
  encode,
  enqueue,
  init_ema,
  init_queue,
  queue_metrics,
  shuffle,
  unshuffle,
  update_ema,
)

FIELDS = {
  'temperature': Field(0.07, 'divides the similarities', Range(1e-3)),
  'queue_size': Field(65536, 'keys in the queue', Range(1)),
  'key_momentum': Field(0.999, 'momentum of the EMA encoder', Range(0.0, 1.0)),
  'symmetric': Field(
    False, 'each view is a query once; the published loss takes the first only',
    Choices(False, True),
  ),
  'shuffle': Field(
    'permute', 'how BatchNorm groups are mixed for the keys', Choices('permute', 'transpose', 'none')
  ),
}  # fmt: skip


def build(config: ml_collections.ConfigDict) -> Method:
  """f, g: ResNet and a head without BatchNorm; BatchNorm in groups; loss: InfoNCE (equation 1)."""
  return from_network(network.build(config), config)


def from_network(net: network.Network, config: ml_collections.ConfigDict) -> Method:
  """`build` for a network of your own, with z of size `network.output_size(config)`.

  `batch['permutation']`, int32 `[directions, n]`, replaces the drawn one of 'permute': row 0 orders
  the second views, row 1, if symmetric, the first views.
  """
  groups = config.model.bn_groups
  directions = [(0, 1), (1, 0)] if config.symmetric else [(0, 1)]

  def init(rng, batch):
    net_key, queue_key = jax.random.split(rng)
    params, stats = net.init(net_key, batch['views'][:, 0])
    return params, {
      'stats': stats,
      'key': init_ema(params, stats),
      'queue': init_queue(queue_key, config.queue_size, network.output_size(config)),
    }

  def loss(params, state, batch, rng):
    views = batch['views']  # [n, 2, h, w, 3]
    stats = state['stats']
    key = update_ema(state['key'], params, config.key_momentum)
    negatives = state['queue']['rows']
    results, features, embeddings, new_keys = [], [], [], []
    for i, (query_view, key_view) in enumerate(directions):
      permutation = draw_permutation(config.shuffle, batch, rng, i)
      outputs, stats = net.apply(params, stats, views[:, query_view])
      q = losses.l2_normalize(outputs[-1])  # [n, d]
      x = shuffle(config.shuffle, views[:, key_view], groups, permutation)
      k, key = encode(net, key, x)
      k = unshuffle(config.shuffle, k, groups, permutation)  # [n, d]
      results.append(losses.info_nce(q, sharding.shard_rows(k), negatives, config.temperature))
      features.append(outputs[0])
      embeddings.append(jnp.stack([q, k], axis=1))
      new_keys.insert(0, k)  # those of the first views come first, as in the CIFAR demo
    values, metrics = zip(*results)
    metrics = {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}
    metrics |= {
      'loss': sum(values) / len(values),
      **queue_metrics(state['queue'], len(directions) * len(views)),
      'features': jnp.stack(features, axis=1).reshape(-1, features[0].shape[-1]),
      'embeddings': embeddings[0],
    }
    new = {
      'stats': stats,
      'key': key,
      'queue': enqueue(state['queue'], jnp.concatenate(new_keys)),
    }
    return sum(values), (new, metrics)

  def encoder(params, state):
    return network.encoder(params, state['stats'])

  return Method(init, loss, encoder, contrastive=True, ema_state=('key',))
