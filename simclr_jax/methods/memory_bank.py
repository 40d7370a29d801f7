"""The memory bank that MoCo is compared with: one stored feature per image of the data set.

One view of each image is the query. The positive is the row of this image in the bank; the negatives are rows drawn
with replacement, which may include the positive.

Source: Wu et al. 2018 (InstDisc), with MoCo's loss and evaluation (He et al. 2020, figure 2b).
"""

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import losses, sharding
from simclr_jax.fields import Choices, Field, Range
from simclr_jax.methods import Method
from simclr_jax.models import network

FIELDS = {
  # Below 0.02, exp(1 / T) overflows float32.
  'temperature': Field(0.07, 'softmax temperature: similarities are divided by it', Range(0.02)),
  'loss': Field(
    'info_nce', 'nce: the loss of InstDisc, whose constant Z is estimated from the first batch',
    Choices('info_nce', 'nce'),
  ),
  'negatives': Field(65536, 'number of rows of the bank that are drawn as negatives', Range(1)),
  'negatives_per': Field(
    'batch', 'batch: all queries share one draw; example: one draw per query, which takes batch_size times '
    'the memory and replicates the bank',
    Choices('batch', 'example'),
  ),
  'bank_momentum': Field(0.5, 'momentum of the rows of the bank', Range(0.0, 1.0)),
}  # fmt: skip


def build(config: ml_collections.ConfigDict) -> Method:
  """f, g: encoder and projection head; loss: InfoNCE or NCE with rows of the bank, which get no gradient."""
  net = network.build(config)
  examples, d = config.data.examples, network.output_size(config)
  rows = examples + -examples % config.batch_size  # divisible by the number of devices

  def init(rng, batch):
    net_key, bank_key = jax.random.split(rng)
    params, stats = net.init(net_key, batch['views'][:, 0])
    limit = (d / 3) ** -0.5  # rows of expected length 1, not normalised
    bank = jax.random.uniform(bank_key, (rows, d), minval=-limit, maxval=limit)
    return params, {'stats': stats, 'bank': bank, 'Z': jnp.zeros(())}

  def loss(params, state, batch, rng):
    n, bank, Z = len(batch['views']), state['bank'], state['Z']
    index = sharding.replicate(batch['index'])
    outputs, stats = net.apply(params, state['stats'], batch['views'][:, 0])
    v = losses.l2_normalize(outputs[-1])  # [n, d]
    shape = (config.negatives,) if config.negatives_per == 'batch' else (n, config.negatives)
    drawn = jax.random.randint(rng, shape, 0, examples)
    old = sharding.replicate(bank[index])  # [n, d]
    positives, negatives = sharding.shard_rows(old), bank[drawn]  # [n, d], [K, d] or [n, K, d]
    if config.loss == 'info_nce':
      value, metrics = losses.info_nce(v, positives, negatives, config.temperature)
    else:
      value, Z, metrics = losses.nce(v, positives, negatives, config.temperature, examples, Z)

    metrics = {
      'loss': value,
      **metrics,
      'features': outputs[0],
      'embeddings': jnp.stack([v, losses.l2_normalize(positives)], axis=1),
      'entries': {'index': index, 'v': jax.lax.stop_gradient(v)},
    }
    return value, ({'stats': stats, 'Z': Z, **update(state, metrics['entries'])}, metrics)

  def update(state, entries):
    bank, index, v = state['bank'], *(sharding.replicate(entries[k]) for k in ('index', 'v'))
    new = config.bank_momentum * sharding.replicate(bank[index]) + (1 - config.bank_momentum) * v
    new = losses.l2_normalize(new)
    # A batch that spans two epochs may contain an image twice. Only the later row is written: the index of the
    # earlier one is out of bounds, and mode='drop' ignores it.
    repeated = jnp.triu(index[:, None] == index[None, :], k=1).any(axis=1)
    return {'bank': bank.at[jnp.where(repeated, rows, index)].set(new, mode='drop')}

  def encoder(params, state):
    return network.encoder(params, state['stats'])

  return Method(
    init, loss, encoder, views=1, contrastive=True, sharded_state=('bank',), update=update
  )
