"""Parallelism and memory: sharded parameters (FSDP), gradient accumulation, rematerialisation."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from conftest import TINY

from simclr_jax import config, fields, methods, sharding, train_state
from simclr_jax.data import augment, digits, order
from simclr_jax.errors import ConfigError
from simclr_jax.models import network
from simclr_jax.models.norm import BatchNorm

SMALL = {**TINY, 'steps': '3', 'dtype': 'float32', 'batch_size': '64', 'learning_rate': '0.05',
         'warmup_epochs': '0', 'model.width_multiplier': '0.25'}  # fmt: skip


def train_steps(steps=3, devices=8, recipe='simclr_digits', **values):
  """Trains some steps: the state after them, and the metrics of every step."""
  c = config.load(recipe, {**SMALL, **{k.replace('__', '.'): str(v) for k, v in values.items()}})
  mesh = sharding.make_mesh(jax.devices()[:devices])
  ts, step = train_state.build(c, digits.load(None, 'train'), mesh)
  all_metrics = []
  for i in range(steps):
    ts, metrics = step(ts, i)
    all_metrics.append(jax.device_get(metrics))
  step.loader.close()
  return ts, all_metrics


def assert_close(a, b, tolerance):
  """Compares params and state of two `TrainState`s."""
  a, b = ([jax.device_get(x) for x in jax.tree.leaves((t.params, t.state))] for t in (a, b))
  for x, y in zip(a, b, strict=True):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope='module')
def baseline():
  """Three steps with replicated parameters, without accumulation and rematerialisation."""
  return train_steps()


def test_fsdp_gives_the_same_training(baseline, monkeypatch):
  """Breaks if FSDP changes the results, or does not shard parameters and optimizer state."""
  monkeypatch.setattr(sharding, 'MIN_SHARD_SIZE', 256)
  ts, metrics = train_steps(sharding='fsdp')
  for a, b in zip(metrics, baseline[1], strict=True):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
  assert_close(ts, baseline[0], 1e-4)
  for tree in (ts.params, ts.opt_state):
    sizes = [(x.size, x.addressable_shards[0].data.size) for x in jax.tree.leaves(tree)]
    total, on_device = map(sum, zip(*sizes))
    assert on_device < total / 6  # with 8 devices


@pytest.mark.slow
def test_rematerialisation_gives_the_same_training(baseline):
  """Breaks if rematerialisation changes gradients or BatchNorm statistics."""
  ts, metrics = train_steps(rematerialize='true')
  np.testing.assert_allclose(
    [m['loss'] for m in metrics], [m['loss'] for m in baseline[1]], rtol=1e-5
  )
  assert_close(ts, baseline[0], 1e-4)


@pytest.mark.slow
def test_gradient_accumulation():
  """Breaks if a micro-batch has the wrong rows, gradients are summed instead of averaged, or running
  averages of BatchNorm do not follow once, by the mean of the micro-batches.
  """
  values = {**SMALL, 'accumulate_steps': '2', 'optimizer': 'sgd', 'weight_decay': '0', 'steps': '1'}
  c = config.load('simclr_digits', values)
  data = digits.load(None, 'train')
  ts, step = train_state.build(c, data)
  params, state = jax.device_get((ts.params, ts.state))
  new, metrics = step(ts, 0)
  step.loader.close()

  c = config.with_examples(c, len(data))
  method = methods.build(c)
  rows = order.rows(c.seed, 0, c.batch_size, len(data))

  @jax.jit
  def gradient(state, pixels, part):
    views = augment.views(
      pixels, part['epoch'], part['position'], augment.pipelines(c.augment, 2), np.uint32(c.seed),
      c.image_size,
    )  # fmt: skip
    batch = {'views': views, 'label': part['label'], 'index': part['index']}
    return jax.grad(method.loss, has_aux=True)(params, state, batch, None)

  total, losses, states = jax.tree.map(np.zeros_like, params), [], []
  for i in range(2):
    part = {k: v[i::2] for k, v in rows.items()}  # 32 of 64 rows: 4 per device
    part['label'] = data.labels[part['index']]
    grads, (part_state, part_metrics) = gradient(state, data.images[part['index']], part)
    total = jax.tree.map(lambda t, g: t + g / 2, total, grads)
    losses.append(part_metrics['loss'])
    states.append(part_state)
  np.testing.assert_allclose(metrics['loss'], np.mean(losses), rtol=1e-5)
  rate = float(metrics['learning_rate'])
  for name in ('encoder', 'head'):
    mean_gradient = jax.tree.map(
      lambda a, b: (a - b) / rate, params[name], jax.device_get(new.params[name])
    )
    for a, b in zip(jax.tree.leaves(mean_gradient), jax.tree.leaves(total[name]), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-3)
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *states)
  for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(new.state), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


class Features(nn.Module):
  """A convolution and BatchNorm."""

  groups: int

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(5, (3, 3), use_bias=False)(x)
    return nn.relu(BatchNorm(self.groups, 'strided')(x, train=True)).mean(axis=(1, 2))


def small_method(monkeypatch, method, accumulate, groups, **values):
  """A method with a network that compiles in a second, and `groups` BatchNorm groups."""
  f, g = Features(groups), nn.Dense(4)

  def init(rng, x):
    h, v = f.init_with_output(rng, x)
    stats = {'encoder': v['batch_stats'], 'head': {}}
    return {'encoder': v['params'], 'head': g.init(rng, h)['params']}, stats

  def apply(params, stats, x):
    v = {'params': params['encoder'], 'batch_stats': stats['encoder']}
    h, new = f.apply(v, x, mutable='batch_stats')
    z = g.apply({'params': params['head']}, h)
    return [h, z], {'encoder': new['batch_stats'], 'head': {}}

  monkeypatch.setattr(network, 'build', lambda config: network.Network(init, apply))
  c = fields.recipe(method)
  c.update({'accumulate_steps': accumulate, **values})
  c.model.head_dim, c.model.bn_groups, c.data.examples = 4, groups, 30
  return methods.build(c)


def images(n, views=2):
  return np.random.default_rng(0).uniform(size=(n, views, 6, 6, 3)).astype(np.float32)


def initial(method, views):
  """Parameters and state as after some training: key and query encoder differ."""
  params, state = jax.jit(method.init)(jax.random.key(0), {'views': views})
  return jax.tree.map(lambda p: p + 0.3 * np.sin(np.arange(p.size)).reshape(p.shape), params), state


def accumulated(method, params, state, views, parts, index=None):
  """Mean gradient and next state of a step in micro-batches."""
  rows = {'views': views, 'index': np.arange(len(views)) if index is None else index}
  ts = train_state.TrainState(np.int32(0), params, state, ())

  def gradient(params, state, batch, key):
    grads, (state, metrics) = jax.grad(method.loss, has_aux=True)(params, state, batch, key)
    return grads, (state, {**metrics, 'batch_hash': np.uint32(0)})

  def step(ts):
    return train_state._accumulated(gradient, parts, method, ts, rows, jax.random.key(0))

  return jax.device_get(jax.jit(step)(ts)[:2])


def close(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('parts', [2, 4])
@pytest.mark.parametrize('symmetric', [False, True])
def test_moco_does_not_depend_on_accumulation(monkeypatch, parts, symmetric):
  """Breaks if the key encoder, a running average, the queue or the gradient of a step depends on the number of
  micro-batches: with one BatchNorm group per micro-batch, the loss does not.
  """
  views, results = images(16), []
  for accumulate, groups in ((1, parts), (parts, 1)):
    method = small_method(
      monkeypatch, 'moco', accumulate, groups, shuffle='none', symmetric=symmetric, queue_size=40,
      key_momentum=0.9, batch_size=16,
    )  # fmt: skip
    params, state = initial(method, views)
    if accumulate == 1:
      grads, (new, _) = jax.jit(jax.grad(method.loss, has_aux=True))(
        params, state, {'views': views}, jax.random.key(0)
      )
      results.append((grads, new))
    else:
      results.append(accumulated(method, params, state, views, parts))
  close(results[1], results[0])
  key = jax.tree.map(
    lambda k, q: 0.9 * k + 0.1 * q,
    state['key']['params'],
    {k: params[k] for k in ('encoder', 'head')},
  )
  close(results[1][1]['key']['params'], key)
  assert int(results[1][1]['queue']['filled']) == (32 if symmetric else 16)


@pytest.mark.parametrize('parts', [2, 4])
def test_simclr_with_memory_follows_once_per_step(monkeypatch, parts):
  """Breaks if EMA encoder or running averages move once per micro-batch, or the memory loses keys: equal
  micro-batches leave what a step of one of them leaves, and the keys of all.
  """
  method = small_method(
    monkeypatch, 'simclr', parts, 1, queue_size=64, key_momentum=0.9, batch_size=6 * parts
  )
  views = images(6)
  params, state = initial(method, views)
  one = jax.jit(method.loss)(params, state, {'views': views}, jax.random.key(0))[1][0]
  repeated = np.repeat(views, parts, axis=0)  # rows j, j + parts, ... are the 6 images
  _, new = accumulated(method, params, state, repeated, parts)
  close([new['stats'], new['key']], [one['stats'], one['key']])
  assert int(new['queue']['pointer']) == 12 * parts
  keys = np.repeat(np.reshape(one['queue']['rows'][:12], (6, 2, -1)), parts, axis=0)
  close(new['queue']['rows'][: 12 * parts], keys.reshape(12 * parts, -1))


@pytest.mark.parametrize('parts', [2, 4])
def test_memory_bank_does_not_depend_on_accumulation(monkeypatch, parts):
  """Breaks if a row of the bank is not that of a step without accumulation, also for an image that is in the batch
  twice.
  """
  views, index, results = images(8, 1), np.array([3, 9, 1, 3, 0, 3, 7, 9]), []
  for accumulate, groups in ((1, parts), (parts, 1)):
    method = small_method(
      monkeypatch, 'memory_bank', accumulate, groups, negatives=7, batch_size=8, loss='info_nce'
    )
    params, state = initial(method, views)
    if accumulate == 1:
      batch = {'views': views, 'index': index}
      results.append(jax.jit(method.loss)(params, state, batch, jax.random.key(0))[1][0])
    else:
      results.append(accumulated(method, params, state, views, parts, index)[1])
  close(results[1], results[0])


def own_method():
  """A method of a user: a centre that follows the features, a ring buffer without `update`, a frozen array."""

  def loss(params, state, batch, rng):
    h = batch['views'].mean((1, 2, 3))
    ring, n = state['ring'], len(h)
    index = (ring['pointer'] + np.arange(n)) % len(ring['rows'])
    new = {
      'centre': 0.9 * state['centre'] + 0.1 * h.mean(0),
      'ring': {'rows': ring['rows'].at[index].set(h), 'pointer': ring['pointer'] + n},
      'frozen': state['frozen'],
    }
    value = (params['w'] * h.mean(0)).sum()
    return value, (new, {'loss': value, 'embeddings': h[:, None]})

  return methods.Method(None, loss, None)


@pytest.mark.parametrize('parts', [1, 2, 3])
def test_state_of_own_methods(parts):
  """Breaks if a moving average of a user's own method moves once per micro-batch, a ring buffer is averaged, or an
  array that never changes is rounded.
  """
  views = np.random.default_rng(0).uniform(size=(12, 1, 4, 4, 3)).astype(np.float32)
  frozen = np.random.default_rng(1).normal(size=50).astype(np.float32)
  state = {
    'centre': np.ones(3, np.float32), 'frozen': frozen,
    'ring': {'rows': np.zeros((20, 3), np.float32), 'pointer': np.int32(0)},
  }  # fmt: skip
  _, new = accumulated(own_method(), {'w': np.ones(3, np.float32)}, state, views, parts)
  h = views.mean((1, 2, 3))
  np.testing.assert_allclose(new['centre'], 0.9 + 0.1 * h.mean(0), rtol=1e-6)
  np.testing.assert_array_equal(new['frozen'], frozen)
  assert new['ring']['pointer'] == 12
  in_parts = h.reshape(-1, parts, 3).swapaxes(0, 1).reshape(-1, 3)
  np.testing.assert_allclose(new['ring']['rows'][:12], in_parts, rtol=1e-6)


def test_indivisible_accumulate_steps_are_refused(capsys):
  """Breaks if a batch size that is not divisible by accumulate_steps and the devices is only refused by
  the compiler.
  """
  with pytest.raises(ConfigError, match='not divisible by accumulate_steps=3'):
    config.load('simclr_digits', {**SMALL, 'accumulate_steps': '3'})
  c = config.load('simclr_digits', {**SMALL, 'accumulate_steps': '16'})
  with pytest.raises(
    ConfigError, match='accumulate_steps=16 is not divisible by the number of devices'
  ):
    config.check_against(c, digits.load(None, 'train'), 8, 0, 3)
