"""SimCLR (Chen et al. 2020): two views of an image agree, all other images in the batch differ."""

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import losses
from simclr_jax.evaluate import probe
from simclr_jax.methods import Method
from simclr_jax.models import resnet
from simclr_jax.models.heads import ProjectionHead


def build(config: ml_collections.ConfigDict) -> Method:
  """f: ResNet with BatchNorm over the global batch; g: projection head; loss: NT-Xent."""
  dtype = resnet.compute_dtype(config.dtype)
  f = resnet.from_config(config.model, dtype)
  g = ProjectionHead(
    config.model.head, config.model.head_layers, config.model.head_dim, dtype=dtype
  )
  classes = config.data.num_classes

  def init(rng, batch):
    f_key, g_key = jax.random.split(rng)
    x = batch['views'][:, 0]
    h, f_vars = f.init_with_output(f_key, x, train=False)
    g_vars = g.init(g_key, h, train=False)
    params = {'encoder': f_vars['params'], 'head': g_vars.get('params', {})}
    if classes:
      params['probe'] = probe.init(h.shape[-1], classes)
    return params, {'encoder': f_vars['batch_stats'], 'head': g_vars.get('batch_stats', {})}

  def loss(params, state, batch, rng):
    del rng
    x = batch['views']  # [n, 2, h, w, 3]
    x = x.reshape(-1, *x.shape[2:])  # [2n, h, w, 3], rows 2i and 2i + 1 are views of image i
    h, f_new = _train(f, params['encoder'], state['encoder'], x)  # [2n, d]
    hiddens, g_new = _train(g, params['head'], state['head'], h)
    nt_xent, metrics = losses.nt_xent(hiddens[-1], config.temperature)
    metrics = {'loss': nt_xent, **metrics, 'h_std': jnp.std(h, axis=0).mean()}
    objective = config.loss_scale * nt_xent
    if classes:
      error, metrics['probe_acc'] = probe.online_loss(
        params['probe'], h, jnp.repeat(batch['label'], 2)
      )
      objective += error
    return objective, ({'encoder': f_new, 'head': g_new}, metrics)

  def encoder(params, state):
    return {'params': params['encoder'], 'batch_stats': state['encoder']}

  return Method(init, loss, encoder)


def _train(module, params, stats, x):
  """`module` in training mode: (output, new BatchNorm statistics)."""
  y, new = module.apply(
    {'params': params, 'batch_stats': stats}, x, train=True, mutable='batch_stats'
  )
  return y, new.get('batch_stats', stats)
