"""MoCo (He et al. 2020; v2: Chen et al. 2020c): a query is matched to its key among a queue of negatives.

The key encoder is an exponential moving average (EMA) of the query encoder, so that keys of earlier batches stay
comparable and the number of negatives does not depend on the batch size.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from simclr_jax import losses, sharding
from simclr_jax.errors import ConfigError
from simclr_jax.fields import Choices, Field, Range
from simclr_jax.methods import Method, warm_start
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
  'temperature': Field(0.07, 'softmax temperature: similarities are divided by it', Range(1e-3)),
  'queue_size': Field(65536, 'number of keys in the queue', Range(1)),
  'key_momentum': Field(0.999, 'momentum of the EMA encoder', Range(0.0, 1.0)),
  'symmetric': Field(
    False, 'whether both views are queries; in the published loss only the first view is',
    Choices(False, True),
  ),
  'shuffle': Field(
    'permute', 'how keys are shuffled over BatchNorm groups', Choices('permute', 'transpose', 'none')
  ),
  'init_state': Field(
    False, 'resume the training of init_from, a MoCo checkpoint of PyTorch: key encoder, queue, momentum, epoch',
    Choices(False, True),
  ),
}  # fmt: skip


def build(config: ml_collections.ConfigDict) -> Method:
  """f, g: encoder and projection head of the recipe; loss: InfoNCE (equation 1)."""
  return from_network(network.build(config), config)


def from_network(net: network.Network, config: ml_collections.ConfigDict) -> Method:
  """`build` with another network.

  Args:
    net: its output z has the size `network.output_size(config)`.
    config: a recipe.

  Returns:
    The method. For shuffle=permute, its `loss` uses `batch['permutation']`, int32 `[directions, n]`, instead of a
    random permutation if the batch has this key: row 0 permutes the second views, row 1, if symmetric, the first.
  """
  if config.get('init_state') and not config.init_from:
    raise ConfigError('init_state=true needs init_from, the MoCo checkpoint to resume')
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
    results, features, embeddings, keys = [], [], [], []
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
      keys.append(k)
    values, each = [value for value, _ in results], [metrics for _, metrics in results]
    metrics = {name: sum(m[name] for m in each) / len(each) for name in each[0]}
    metrics |= {
      'loss': sum(values) / len(values),
      **queue_metrics(state['queue'], len(directions) * config.accumulate_steps * len(views)),
      'features': jnp.stack(features, axis=1).reshape(-1, features[0].shape[-1]),
      'embeddings': embeddings[0],
      'entries': jnp.stack(keys, axis=1),  # [n, directions, d]
    }
    new = {'stats': stats, 'key': key, **update(state, metrics['entries'])}
    return sum(values), (new, metrics)

  def update(state, entries):
    # Keys of the first views come first, as in the CIFAR-10 demo.
    keys = sharding.replicate(entries)[:, ::-1].swapaxes(0, 1).reshape(-1, entries.shape[-1])
    return {'queue': enqueue(state['queue'], keys)}

  def encoder(params, state):
    return network.encoder(params, state['stats'])

  return Method(
    init, loss, encoder, contrastive=True, ema_state=('key',), update=update,
    load_pretrained=_load_pretrained if config.init_from else None,
  )  # fmt: skip


def _load_pretrained(params, state, pretrained):
  """`Method.load_pretrained`; with the state of a training, the key encoder and the queue are those of this training."""
  params, state = warm_start(params, state, pretrained, ema=('key',))
  training = pretrained.get('training')
  if not training:
    return params, state
  key = {'params': training['key']['params'], 'stats': training['key']['batch_stats']}
  size = np.int32(len(training['queue']))
  queue = {'rows': training['queue'], 'pointer': np.int32(training['pointer']), 'filled': size}
  return params, {**state, 'key': key, 'queue': queue}
