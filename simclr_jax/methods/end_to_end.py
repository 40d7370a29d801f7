"""The end-to-end mechanism that MoCo is compared to: keys are trained too, negatives are the batch.

Source: He et al. 2020 (MoCo), figure 2a and section 4.1.
"""

import jax.numpy as jnp
import ml_collections

from simclr_jax import losses, sharding, shuffle
from simclr_jax.methods import Method
from simclr_jax.models import tower

FIELDS = {
  'temperature': (0.07, (1e-3, None)),
  'shuffle': ('permute', shuffle.KINDS),  # how BatchNorm's groups are mixed for the keys
  # One network for queries and keys; otherwise two that start equal.
  'shared_encoder': (False, (False, True)),
}


def build(config: ml_collections.ConfigDict) -> Method:
  """Two encoders with gradients; for a query, the keys of the n - 1 other images are the negatives."""
  net = tower.build(config)
  groups = config.model.bn_groups

  def init(rng, batch):
    params, stats = net.init(rng, batch['views'][:, 0])
    state = {'stats': stats}
    if not config.shared_encoder:
      params['key'] = {k: params[k] for k in ('encoder', 'head')}
      state['key'] = stats
    return params, state

  def loss(params, state, batch, rng):
    views = batch['views']  # [n, 2, h, w, 3]
    permutation = shuffle.draw(config.shuffle, batch, rng)
    hiddens, stats = net.apply(params, state['stats'], views[:, 0])
    q = losses.l2_normalize(hiddens[-1])  # [n, d]
    x = shuffle.forward(config.shuffle, views[:, 1], groups, permutation)
    if config.shared_encoder:
      key_hiddens, stats = net.apply(params, stats, x)
      new = {'stats': stats}
    else:
      key_hiddens, key_stats = net.apply(params['key'], state['key'], x)
      new = {'stats': stats, 'key': key_stats}
    k = losses.l2_normalize(key_hiddens[-1])
    k = shuffle.back(config.shuffle, k, groups, permutation)  # [n, d], whole on every device
    value, metrics = losses.info_nce_in_batch(q, k, config.temperature)
    metrics = {
      'loss': value,
      **metrics,
      'features': hiddens[0],
      'embeddings': jnp.stack([q, sharding.by_rows(k)], axis=1),
    }
    return value, (new, metrics)

  return Method(init, loss, encoder=lambda params, state: tower.encoder(params, state['stats']))
