"""SimCLR (Chen et al. 2020): two views of an image agree, all other images in the batch differ.

Version 2 (Chen et al. 2020, "Big self-supervised models...") has a deeper head, and with `queue_size`
its memory: the outputs of a slowly moving copy of the network, for the last images seen, are further
negatives. The released code leaves the memory out; here the copy sees both views, and the queue gets
both of its outputs after the loss was computed.
"""

import jax
import ml_collections

from simclr_jax import ema, losses, queue, sharding
from simclr_jax.errors import ConfigError
from simclr_jax.methods import Method
from simclr_jax.models import tower

FIELDS = {
  # All but the first are the alternatives of the paper's table 4, and the classic one.
  'loss': ('nt_xent', ('nt_xent', 'nt_logistic', 'margin_triplet', 'pairwise_margin')),
  'temperature': (0.1, (1e-3, None)),
  'margin': (0.8, (0.0, 2.0)),  # of the margin losses
  # nt_logistic, margin_triplet: only the semi-hard negative of each anchor.
  'semi_hard': (False, (False, True)),
  'loss_scale': (1.0, (1e-6, None)),
  'queue_size': (0, (0, None)),  # of the memory; 0: none
  'key_momentum': (0.999, (0.0, 1.0)),
}


def build(config: ml_collections.ConfigDict) -> Method:
  """f: ResNet with BatchNorm over the global batch; g: projection head; loss: NT-Xent."""
  if config.queue_size and config.loss != 'nt_xent':
    raise ConfigError(f'queue_size={config.queue_size}: the memory is for loss=nt_xent only')
  net = tower.build(config)
  memory = config.queue_size > 0

  def contrast(z, negatives):
    if config.loss == 'nt_xent':
      return losses.nt_xent(z, config.temperature, negatives=negatives)
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
      state['key'] = ema.start(params, stats)
      state['queue'] = queue.start(queue_key, config.queue_size, tower.output_size(config))
    return params, state

  def loss(params, state, batch, rng):
    del rng
    n, views = batch['views'].shape[:2]
    x = batch['views'].reshape(n * views, *batch['views'].shape[2:])  # rows 2i, 2i + 1: image i
    hiddens, stats = net.apply(params, state['stats'], x)
    new, negatives = {'stats': stats}, None
    if memory:
      key = ema.follow(state['key'], params, config.key_momentum)
      k, new['key'] = ema.encode(net, key, x)
      negatives = state['queue']['rows']
      new['queue'] = queue.push(state['queue'], sharding.replicate(k))
    value, metrics = contrast(hiddens[-1], negatives)
    z = metrics.pop('z')  # [2n, d]
    if memory:
      metrics |= queue.figures(state['queue'], len(z))
    metrics |= {
      'loss': value,
      'features': hiddens[0],
      'embeddings': z.reshape(n, views, -1),
    }
    return config.loss_scale * value, (new, metrics)

  return Method(init, loss, encoder=lambda params, state: tower.encoder(params, state['stats']))
