"""SimCLR (Chen et al. 2020a): the two views of an image are positives, all other images in the batch negatives.

SimCLR v2 (Chen et al. 2020b) has a deeper projection head and, with `queue_size`, a memory: outputs of an EMA copy of
the network for earlier batches are additional negatives. The released code of v2 lacks the memory. Here the EMA
network encodes both views, and both outputs are enqueued after the loss is computed.
"""

import jax
import ml_collections

from simclr_jax import blockwise, losses, sharding
from simclr_jax.errors import ConfigError
from simclr_jax.fields import Choices, Field, Range
from simclr_jax.methods import Method, joined
from simclr_jax.models import network
from simclr_jax.momentum import (
  encode as encode_keys,
  enqueue,
  init_ema,
  init_queue,
  queue_metrics,
  update_ema,
)

FIELDS = {
  # Alternatives to NT-Xent: those of the paper's table 4, and the pairwise margin loss of Hadsell et al. 2006.
  'loss': Field(
    'nt_xent', 'the contrastive loss',
    Choices('nt_xent', 'nt_logistic', 'margin_triplet', 'pairwise_margin'),
  ),
  'temperature': Field(0.1, 'softmax temperature: similarities are divided by it', Range(1e-3)),
  'hidden_norm': Field(
    True, 'nt_xent: similarities are cosines; false: dot products of the outputs of the head, as in table 5 of the paper',
    Choices(False, True),
  ),
  'margin': Field(0.8, 'margin of the margin losses', Range(0.0, 2.0)),
  'semi_hard': Field(
    False, 'nt_logistic, margin_triplet: use only the semi-hard negative of each anchor',
    Choices(False, True),
  ),
  'loss_scale': Field(1.0, 'factor on the loss that is minimised', Range(1e-6)),
  'queue_size': Field(0, 'number of keys in the memory of SimCLR v2; 0: no memory', Range(0)),
  'key_momentum': Field(0.999, 'momentum of the EMA encoder of the memory', Range(0.0, 1.0)),
}  # fmt: skip


def build(config: ml_collections.ConfigDict) -> Method:
  """f: encoder with BatchNorm over the global batch; g: projection head; loss: NT-Xent."""
  if config.queue_size and config.loss != 'nt_xent':
    raise ConfigError(
      f'queue_size={config.queue_size}: the memory is for loss=nt_xent only; set queue_size=0'
    )
  if not config.hidden_norm and (config.loss != 'nt_xent' or config.queue_size):
    raise ConfigError('hidden_norm=false is for loss=nt_xent without a memory: set queue_size=0')
  net = network.build(config)
  memory = config.queue_size > 0

  def contrast(z, negatives):
    if config.loss == 'nt_xent':
      return losses.nt_xent(z, config.temperature, config.hidden_norm, negatives)
    if config.loss == 'nt_logistic':
      return losses.nt_logistic(z, config.temperature, config.semi_hard)
    if config.loss == 'margin_triplet':
      return losses.margin_triplet(z, config.margin, config.semi_hard)
    return losses.pairwise_margin(z, config.margin)

  def init(rng, batch):
    net_key, queue_key = jax.random.split(rng)
    params, stats = net.init(net_key, batch['views'][:, 0])
    state = {'stats': stats}
    if memory:
      state['key'] = init_ema(params, stats)
      state['queue'] = init_queue(queue_key, config.queue_size, network.output_size(config))
    return params, state

  def encode(params, state, batch, rng):
    del rng
    n, views = batch['views'].shape[:2]
    x = batch['views'].reshape(n * views, *batch['views'].shape[2:])  # rows 2i, 2i + 1: image i
    outputs, stats = net.apply(params, state['stats'], x)
    new, extras = {**state, 'stats': stats}, {'features': outputs[0]}
    if memory:
      key = update_ema(state['key'], params, config.key_momentum)
      k, new['key'] = encode_keys(net, key, x)
      extras['entries'] = k.reshape(n, views, -1)
    return outputs[-1], (new, extras)  # [2n, d]

  def objective(z, state):
    value, metrics = contrast(z, state['queue']['rows'] if memory else None)
    if memory:
      metrics |= queue_metrics(state['queue'], 2 * config.batch_size)
    rows = metrics.pop('z') if config.hidden_norm else losses.l2_normalize(metrics.pop('z'))
    metrics |= {'loss': value, 'embeddings': rows.reshape(len(z) // 2, 2, -1)}
    return config.loss_scale * value, metrics

  def update(state, entries):
    keys = sharding.replicate(entries.reshape(-1, entries.shape[-1]))
    return {'queue': enqueue(state['queue'], keys)}

  def encoder(params, state):
    return network.encoder(params, state['stats'])

  def notes(devices):
    if config.loss != 'nt_xent':
      return []
    parts = 1 if config.accumulate_negatives == 'batch' else config.accumulate_steps
    return blockwise.notes(2 * config.batch_size // parts, config.queue_size, devices)

  written = update if memory else None
  return Method(
    init, joined(encode, objective, written), encoder, joint_views=2, contrastive=True, ema_state=('key',),
    update=written, encode=encode, objective=objective, notes=notes,
  )  # fmt: skip
