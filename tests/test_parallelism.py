"""How a step is laid out: split parameters, parts of a batch, activations computed twice."""

import jax
import numpy as np
import pytest
from conftest import TINY

from simclr_jax import config, methods, sharding, train_state
from simclr_jax.data import augment, digits, order
from simclr_jax.errors import ConfigError

SMALL = {**TINY, 'steps': '3', 'dtype': 'float32', 'batch_size': '64', 'learning_rate': '0.05',
         'warmup_epochs': '0', 'model.width_multiplier': '0.25'}  # fmt: skip


def after(steps=3, devices=8, recipe='simclr_digits', **values):
  """The state, and the metrics of every step."""
  c = config.load(recipe, {**SMALL, **{k.replace('__', '.'): str(v) for k, v in values.items()}})
  mesh = sharding.make_mesh(jax.devices()[:devices])
  ts, step = train_state.build(c, digits.load(None, 'train'), mesh)
  found = []
  for i in range(steps):
    ts, metrics = step(ts, i)
    found.append(jax.device_get(metrics))
  step.loader.close()
  return ts, found


def close(a, b, tolerance):
  a, b = ([jax.device_get(x) for x in jax.tree.leaves((t.params, t.state))] for t in (a, b))
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope='module')
def plain():
  return after()


def test_split_parameters_give_the_same_training(plain, monkeypatch):
  """Breaks if a device trains its part alone, or nothing is split."""
  monkeypatch.setattr(sharding, 'SMALL', 256)
  ts, metrics = after(sharding='fsdp')
  for a, b in zip(metrics, plain[1], strict=True):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
  close(ts, plain[0], 1e-4)
  for tree in (ts.params, ts.opt_state):
    sizes = [(x.size, x.addressable_shards[0].data.size) for x in jax.tree.leaves(tree)]
    whole, here = map(sum, zip(*sizes))
    assert here < whole / 6  # of 8 devices


def test_activations_computed_twice_change_nothing(plain):
  """Breaks if a block's gradient or its statistics are those of other activations."""
  ts, metrics = after(rematerialize='true')
  np.testing.assert_allclose([m['loss'] for m in metrics], [m['loss'] for m in plain[1]], rtol=1e-5)
  close(ts, plain[0], 1e-4)


def test_parts_of_a_batch():
  """Breaks if a part has other rows, the gradients are summed, or statistics do not go on."""
  values = {**SMALL, 'accumulate_steps': '2', 'optimizer': 'sgd', 'weight_decay': '0', 'steps': '1'}
  c = config.load('simclr_digits', values)
  images = digits.load(None, 'train')
  ts, step = train_state.build(c, images)
  params, state = jax.device_get((ts.params, ts.state))
  new, metrics = step(ts, 0)
  step.loader.close()

  c = config.with_examples(c, len(images))
  method = methods.build(c)
  rows = order.rows(c.seed, 0, c.batch_size, len(images))

  @jax.jit
  def gradient(state, pixels, part):
    views = augment.views(
      pixels, part['epoch'], part['position'], augment.pipelines(c.augment, 2), np.uint32(c.seed),
      c.image_size,
    )  # fmt: skip
    batch = {'views': views, 'label': part['label'], 'index': part['index']}
    return jax.grad(method.loss, has_aux=True)(params, state, batch, None)

  total, losses = jax.tree.map(np.zeros_like, params), []
  for i in range(2):
    part = {k: v[i::2] for k, v in rows.items()}  # of 64, on 8 devices: 4 rows of each
    part['label'] = images.labels[part['index']]
    grads, (state, found) = gradient(state, images.images[part['index']], part)
    total = jax.tree.map(lambda t, g: t + g / 2, total, grads)
    losses.append(found['loss'])
  np.testing.assert_allclose(metrics['loss'], np.mean(losses), rtol=1e-5)
  rate = float(metrics['learning_rate'])
  for name in ('encoder', 'head'):
    moved = jax.tree.map(
      lambda a, b: (a - b) / rate, params[name], jax.device_get(new.params[name])
    )
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(total[name]), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-3)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new.state), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_parts_that_do_not_fit(capsys):
  """Breaks if a part smaller than the devices or the groups is found out by the compiler."""
  with pytest.raises(ConfigError, match='not divisible by accumulate_steps=3'):
    config.load('simclr_digits', {**SMALL, 'accumulate_steps': '3'})
  c = config.load('simclr_digits', {**SMALL, 'accumulate_steps': '16'})
  with pytest.raises(
    ConfigError, match='accumulate_steps=16 is not divisible by the number of devices'
  ):
    config.check_against(c, digits.load(None, 'train'), 8, 0, 3)
