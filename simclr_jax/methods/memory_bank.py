"""The memory bank that MoCo is compared to: one stored feature per image of the data set.

Source: Wu et al. 2018 (InstDisc), with MoCo's loss and evaluation (He et al. 2020, figure 2b). One view
of each image is a query; its positive is the bank's row of the same image, its negatives are rows
drawn with replacement, the positive's own not excluded.
"""

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import losses, sharding
from simclr_jax.fields import Choices, Field, Range
from simclr_jax.methods import Method
from simclr_jax.models import network

FIELDS = {
  # Below 0.02, exp(1 / T) is not a float32 any more.
  'temperature': Field(0.07, 'divides the similarities', Range(0.02)),
  'loss': Field(
    'info_nce', "nce: InstDisc's, with the constant Z of the first batch",
    Choices('info_nce', 'nce'),
  ),
  'negatives': Field(65536, 'rows of the bank that are drawn as negatives', Range(1)),
  'negatives_per': Field(
    'batch', 'one draw per batch; or one per example: n times the memory, the whole bank on each device',
    Choices('batch', 'example'),
  ),
  'bank_momentum': Field(0.5, 'share of its old value that a row keeps', Range(0.0, 1.0)),
}  # fmt: skip


def build(config: ml_collections.ConfigDict) -> Method:
  """f, g: ResNet and head; loss: InfoNCE or NCE against rows of the bank, which get no gradient."""
  net = network.build(config)
  examples, d = config.data.examples, network.output_size(config)
  rows = examples + -examples % config.batch_size  # divisible by the devices, as the batch is

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

    new = config.bank_momentum * old + (1 - config.bank_momentum) * sharding.replicate(v)
    new = losses.l2_normalize(jax.lax.stop_gradient(new))
    # An image may stand in a batch twice, at the end of one pass and the start of the next: the
    # later row wins, the earlier one is written past the end, which is nowhere.
    repeated = jnp.triu(index[:, None] == index[None, :], k=1).any(axis=1)
    bank = bank.at[jnp.where(repeated, rows, index)].set(new, mode='drop')
    metrics = {
      'loss': value,
      **metrics,
      'features': outputs[0],
      'embeddings': jnp.stack([v, losses.l2_normalize(positives)], axis=1),
    }
    return value, ({'stats': stats, 'bank': bank, 'Z': Z}, metrics)

  def encoder(params, state):
    return network.encoder(params, state['stats'])

  return Method(init, loss, encoder, views=1, contrastive=True, sharded_state=('bank',))
