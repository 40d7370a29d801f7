"""The end-to-end mechanism that MoCo is compared with: the key encoder is trained by gradient; negatives are in-batch.

Source: He et al. 2020 (MoCo), figure 2a and section 4.1.
"""

import jax.numpy as jnp
import ml_collections

from simclr_jax import losses, sharding
from simclr_jax.fields import Choices, Field, Range
from simclr_jax.methods import Method, joined
from simclr_jax.models import network
from simclr_jax.momentum import draw_permutation, shuffle, unshuffle

FIELDS = {
  'temperature': Field(0.07, 'softmax temperature: similarities are divided by it', Range(1e-3)),
  'shuffle': Field(
    'permute', 'how keys are shuffled over BatchNorm groups', Choices('permute', 'transpose', 'none')
  ),
  'shared_encoder': Field(
    False, 'one network for queries and keys; otherwise two networks with equal initial weights',
    Choices(False, True),
  ),
}  # fmt: skip


def build(config: ml_collections.ConfigDict) -> Method:
  """f, g for queries and f, g for keys, both with gradients; loss: InfoNCE with the n - 1 other keys as negatives."""
  net = network.build(config)
  groups = config.model.bn_groups

  def init(rng, batch):
    params, stats = net.init(rng, batch['views'][:, 0])
    state = {'stats': stats}
    if not config.shared_encoder:
      params['key'] = {k: params[k] for k in ('encoder', 'head')}
      state['key'] = stats
    return params, state

  def encode(params, state, batch, rng):
    views = batch['views']  # [n, 2, h, w, 3]
    permutation = draw_permutation(config.shuffle, batch, rng)
    outputs, stats = net.apply(params, state['stats'], views[:, 0])
    q = losses.l2_normalize(outputs[-1])  # [n, d]
    x = shuffle(config.shuffle, views[:, 1], groups, permutation)
    if config.shared_encoder:
      key_outputs, stats = net.apply(params, stats, x)
      new = {'stats': stats}
    else:
      key_outputs, key_stats = net.apply(params['key'], state['key'], x)
      new = {'stats': stats, 'key': key_stats}
    k = losses.l2_normalize(key_outputs[-1])
    k = unshuffle(config.shuffle, k, groups, permutation)  # [n, d], replicated
    return (q, k), (new, {'features': outputs[0]})

  def objective(z, state):
    del state
    q, k = z[0], sharding.replicate(z[1])
    value, metrics = losses.info_nce_in_batch(q, k, config.temperature)
    embeddings = jnp.stack([q, sharding.shard_rows(k)], axis=1)
    return value, {'loss': value, **metrics, 'embeddings': embeddings}

  def encoder(params, state):
    return network.encoder(params, state['stats'])

  return Method(
    init, joined(encode, objective), encoder, contrastive=True, encode=encode, objective=objective
  )
