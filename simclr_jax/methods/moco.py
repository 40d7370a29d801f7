"""MoCo (He et al. 2020; version 2: Chen et al. 2020): a query finds its key among a queue of others.

The key encoder follows the query encoder slowly, so keys of earlier batches stay comparable and the
number of negatives does not depend on the batch size.
"""

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import ema, losses, queue, sharding, shuffle
from simclr_jax.methods import Method
from simclr_jax.models import tower

FIELDS = {
  'temperature': (0.07, (1e-3, None)),
  'queue_size': (65536, (1, None)),
  'key_momentum': (0.999, (0.0, 1.0)),
  # Each view is a query once; the published loss takes the first only.
  'symmetric': (False, (False, True)),
  'shuffle': ('permute', shuffle.KINDS),  # how BatchNorm's groups are mixed for the keys
}


def build(config: ml_collections.ConfigDict) -> Method:
  """f, g: ResNet and a head without BatchNorm; BatchNorm in groups; loss: InfoNCE (equation 1)."""
  return from_tower(tower.build(config), config)


def from_tower(net: tower.Tower, config: ml_collections.ConfigDict) -> Method:
  """`build` for a network of your own, with z of size `tower.output_size(config)`.

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
      'key': ema.start(params, stats),
      'queue': queue.start(queue_key, config.queue_size, tower.output_size(config)),
    }

  def loss(params, state, batch, rng):
    views = batch['views']  # [n, 2, h, w, 3]
    stats = state['stats']
    key = ema.follow(state['key'], params, config.key_momentum)
    negatives = state['queue']['rows']
    results, features, embeddings, new_keys = [], [], [], []
    for i, (query_view, key_view) in enumerate(directions):
      permutation = shuffle.draw(config.shuffle, batch, rng, i)
      hiddens, stats = net.apply(params, stats, views[:, query_view])
      q = losses.l2_normalize(hiddens[-1])  # [n, d]
      x = shuffle.forward(config.shuffle, views[:, key_view], groups, permutation)
      k, key = ema.encode(net, key, x)
      k = shuffle.back(config.shuffle, k, groups, permutation)  # [n, d]
      results.append(losses.info_nce(q, sharding.by_rows(k), negatives, config.temperature))
      features.append(hiddens[0])
      embeddings.append(jnp.stack([q, k], axis=1))
      new_keys.insert(0, k)  # those of the first views come first, as in the CIFAR demo
    values, metrics = zip(*results)
    metrics = {name: sum(m[name] for m in metrics) / len(metrics) for name in metrics[0]}
    metrics |= {
      'loss': sum(values) / len(values),
      **queue.figures(state['queue'], len(directions) * len(views)),
      'features': jnp.stack(features, axis=1).reshape(-1, features[0].shape[-1]),
      'embeddings': embeddings[0],
    }
    new = {
      'stats': stats,
      'key': key,
      'queue': queue.push(state['queue'], jnp.concatenate(new_keys)),
    }
    return sum(values), (new, metrics)

  return Method(init, loss, encoder=lambda params, state: tower.encoder(params, state['stats']))
