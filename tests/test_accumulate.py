"""Gradient accumulation: the loss of the whole batch (gradient caching) or of micro-batches; moving averages, tables."""

import json
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
from common import records
from conftest import TINY

from simclr_jax import config, fields, methods, run_config, sharding, train, train_state
from simclr_jax.data import augment, digits, order
from simclr_jax.models import linear, network
from simclr_jax.models.norm import BatchNorm
from simclr_jax.runtime import checkpoint

SMALL = {**TINY, 'steps': '1', 'dtype': 'float32', 'batch_size': '64', 'learning_rate': '0.05',
         'optimizer': 'sgd', 'weight_decay': '0', 'model.width_multiplier': '0.25'}  # fmt: skip


def distance(a, b):
  """The relative distance of two trees, of all their entries together."""
  a, b = (np.concatenate([np.ravel(jax.device_get(x)) for x in jax.tree.leaves(t)]) for t in (a, b))
  return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64))


def by_part(x, parts):
  """The rows of x in the order of micro-batches: 0, p, 2p, ..., then 1, p + 1, ..."""
  return np.concatenate([x[j::parts] for j in range(parts)])


def one_step(devices, parts, **changes):
  """A step of the recipe `simclr_digits` with the images in the order of `parts` micro-batches.

  Returns: the loss; the gradient, as SGD with momentum and Adam keep it; the running averages; the checksum.
  """
  values = {**SMALL, **{k.replace('__', '.'): str(v) for k, v in changes.items()}}
  c = config.load('simclr_digits', values)
  mesh = sharding.make_mesh(jax.devices()[:devices])
  ts, step = train_state.build(c, digits.load(None, 'train'), mesh)
  rows = {k: by_part(np.asarray(v), parts) for k, v in step.loader(0).items()}
  with jax.set_mesh(mesh):
    new, metrics = step._program(
      ts, np.uint32(c.seed), None, step.loader.constants, sharding.put_batch(mesh, rows)
    )
  step.loader.close()
  return jax.device_get((metrics['loss'], new.opt_state, new.state, metrics['batch_hash']))


@pytest.mark.parametrize('devices', [8, pytest.param(1, marks=pytest.mark.slow)])
def test_micro_batches_give_the_step_of_the_whole_batch(devices):
  """Breaks if the loss lacks negatives of another micro-batch, a gradient gets the wrong rows or weight, or running
  averages are not the mean: a step in p micro-batches is that of the whole batch with p BatchNorm groups.
  """
  parts = one_step(devices, 1, accumulate_steps=2)
  whole = one_step(devices, 2, model__bn_groups=2)
  np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
  assert distance(parts[1], whole[1]) < 1e-5
  assert distance(parts[2], whole[2]) < 1e-5
  # The views are those of a step without accumulation, in the same order.
  same_order = one_step(devices, 1, model__bn_groups=2)
  assert parts[3] == same_order[3] != whole[3]
  # Other groups: the comparison above can fail.
  assert distance(same_order[1], whole[1]) > 0.01


def test_embeddings_are_gathered_once_per_step():
  """Breaks if micro-batches move images between devices, or gather their embeddings one by one."""
  c = config.load('simclr_digits', {**SMALL, 'accumulate_steps': '2'})
  ts, step = train_state.build(c, digits.load(None, 'train'), sharding.make_mesh(jax.devices()[:8]))
  program = step.lower(ts, 0).compile().as_text()
  step.loader.close()
  kinds = r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast'
  found = re.findall(rf'= (.*?) ({kinds})(?:-start)?\(', program)
  (gathered,) = (shape for shape, kind in found if kind != 'all-reduce')
  assert gathered.startswith('f32[128,16]')  # both views of 64 images


@pytest.mark.slow
def test_micro_batches_in_bfloat16():
  """Breaks if micro-batches round more than the step of the whole batch does in bfloat16."""
  parts = one_step(8, 1, accumulate_steps=2, dtype='bfloat16')
  whole = one_step(8, 2, model__bn_groups=2, dtype='bfloat16')
  exact = one_step(8, 2, model__bn_groups=2)
  for i in (0, 1, 2):
    assert 0 < distance(whole[i], exact[i]) < 0.2
    assert distance(parts[i], whole[i]) < distance(whole[i], exact[i])


@pytest.mark.slow
def test_losses_of_micro_batches():
  """Breaks if a micro-batch has the wrong rows, gradients are summed instead of averaged, or running
  averages of BatchNorm do not follow once, by the mean of the micro-batches.
  """
  values = {**SMALL, 'accumulate_steps': '2', 'accumulate_negatives': 'micro_batch'}
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
  layout: str

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(5, (3, 3), use_bias=False)(x)
    return nn.relu(BatchNorm(self.groups, self.layout)(x, train=True)).mean(axis=(1, 2))


def small_method(monkeypatch, method, accumulate, groups, layout='strided', **values):
  """A method with a network that compiles in a second, and `groups` BatchNorm groups."""
  f, g = Features(groups, layout), nn.Dense(4)

  def init(rng, x):
    h, v = f.init_with_output(rng, x)
    stats = {'encoder': v['batch_stats'], 'head': {}}
    params = {'encoder': v['params'], 'head': g.init(rng, h)['params'], 'probe': linear.init(5, 3)}
    return params, stats

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


def labels(n):
  """Labels of some of the images, not equally many in all micro-batches."""
  return np.where(np.arange(n) ** 2 % 7 < 3, np.arange(n) % 3, -1)


def initial(method, views):
  """Parameters and state as after some training: key and query encoder differ."""
  params, state = jax.jit(method.init)(jax.random.key(0), {'views': views})
  return jax.tree.map(lambda p: p + 0.3 * np.sin(np.arange(p.size)).reshape(p.shape), params), state


def accumulated(method, params, state, views, parts, index=None):
  """Mean gradient and next state of a step in micro-batches."""
  rows = {'views': views, 'index': np.arange(len(views)) if index is None else index}
  rows['label'] = np.arange(len(views)) % 3
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
        params, state, {'views': views, 'label': np.arange(16) % 3}, jax.random.key(0)
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
    monkeypatch, 'simclr', parts, 1, queue_size=64, key_momentum=0.9, batch_size=6 * parts,
    accumulate_negatives='micro_batch',
  )  # fmt: skip
  views = images(6)
  params, state = initial(method, views)
  one = jax.jit(method.loss)(
    params, state, {'views': views, 'label': np.arange(6) % 3}, jax.random.key(0)
  )[1][0]
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
      batch = {'views': views, 'index': index, 'label': np.arange(8) % 3}
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


def cached(method, params, state, views, parts):
  """Gradient, next state and metrics of a step whose loss sees the whole batch."""
  rows = {'views': views, 'label': labels(len(views))}
  ts = train_state.TrainState(np.int32(0), params, state, ())

  def encode(params, rows, key):
    z, (new, extras) = method.encode(params, ts.state, rows, key)
    return z, (new, extras, (rows['label'], np.zeros(len(rows['label']), np.uint32)))

  def step(ts):
    return train_state._cached(encode, parts, method, ts, rows, jax.random.key(0))

  return jax.device_get(jax.jit(step)(ts))


OBJECTIVES = [
  ('simclr', {}),
  ('simclr', {'queue_size': 100, 'key_momentum': 0.9, 'loss_scale': 2.0}),
  ('simclr', {'loss': 'nt_logistic', 'semi_hard': True}),
  ('simclr', {'loss': 'margin_triplet'}),
  ('simclr', {'loss': 'pairwise_margin'}),
  ('end_to_end', {'shuffle': 'none'}),
  ('end_to_end', {'shuffle': 'none', 'shared_encoder': True}),
]


@pytest.mark.parametrize(('method', 'values'), OBJECTIVES)
@pytest.mark.parametrize(('parts', 'groups'), [(4, 1), (2, 3)])
def test_objectives_see_the_whole_batch(monkeypatch, method, values, parts, groups):
  """Breaks if a loss, its gradient, a metric, the online probe, a running average or the memory depends on the
  number of micro-batches, with equal BatchNorm groups.
  """
  views, results = images(24), []
  for accumulate, g in ((1, parts * groups), (parts, groups)):
    m = small_method(monkeypatch, method, accumulate, g, 'contiguous', batch_size=24, **values)
    params, state = initial(m, views)
    if accumulate > 1:
      results.append(cached(m, params, state, views, parts))
      continue
    batch = {'views': by_part(views, parts), 'label': by_part(labels(24), parts)}
    value, (new, metrics) = jax.jit(m.loss)(params, state, batch, None)
    grads = jax.jit(jax.grad(lambda *a, m=m: m.loss(*a)[0]))(params, state, batch, None)
    if 'queue' in new:
      keys = np.reshape(new['queue']['rows'][:48], (24, -1))
      ordered = keys[np.argsort(by_part(np.arange(24), parts))].reshape(48, -1)
      new['queue']['rows'] = new['queue']['rows'].at[:48].set(ordered)
    results.append((grads, new, metrics))
  (grads, new, metrics), (part_grads, part_new, part_metrics) = results
  close(part_grads, grads)
  close(part_new, new)
  for name in ('loss', 'contrastive_acc', 'contrastive_acc_n', 'probe_acc', 'queue_age'):
    assert (name in metrics) == (name in part_metrics)
    np.testing.assert_allclose(part_metrics.get(name, 0), metrics.get(name, 0), rtol=1e-5)
  assert len(part_metrics['embeddings']) == 24


def old_run(workdir, **values):
  """A run of a version that knew no `accumulate_negatives`."""
  c = config.load('simclr_digits', {**SMALL, **values, 'accumulate_negatives': 'micro_batch'})
  assert train.pretrain(c, workdir, quiet=True, progress=False) == 0
  path = workdir / 'config.json'
  contents = json.loads(path.read_text())
  del contents['config']['accumulate_negatives'], contents['checksum']
  path.write_text(json.dumps(contents))
  for path in workdir.glob('checkpoints/*/_CHECKPOINT_METADATA'):
    metadata = json.loads(path.read_text())
    del metadata['custom_metadata']['config']['accumulate_negatives']
    del metadata['custom_metadata'][checkpoint.CHECKSUM]
    path.write_text(json.dumps(metadata))


@pytest.mark.slow
def test_an_old_run_keeps_its_negatives(tmp_path):
  """Breaks if a run of an older version, which had the negatives of a micro-batch, goes on with those of the batch."""
  values = {'accumulate_steps': '2', 'steps': '4', 'checkpoint_every_steps': '2'}
  old_run(tmp_path / 'run', **values)
  expected = records(tmp_path / 'run')
  for path in tmp_path.glob('run/checkpoints/4'):
    path.rename(tmp_path / 'removed')
  c = config.load('simclr_digits', {**SMALL, **values})
  assert c.accumulate_negatives == 'batch'
  assert train.pretrain(c, tmp_path / 'run', quiet=True, progress=False) == 0
  resumed = records(tmp_path / 'run')[-2:]
  assert resumed == expected[-2:] and [r['step'] for r in resumed] == [3, 4]
  assert run_config.load(tmp_path / 'run').accumulate_negatives == 'micro_batch'


def test_what_is_said_before_training():
  """Breaks if a user is not told which images a loss and BatchNorm see, or that a large batch is computed in blocks."""

  def notes(spec, devices=1, **values):
    c = config.load(spec, {k.replace('__', '.'): str(v) for k, v in values.items()})
    return methods.notes(config.with_examples(c, 100_000), devices)

  assert notes('simclr_cifar10') == notes('moco_cifar10') == []
  large = {'batch_size': 16_384, 'accumulate_steps': 4}
  blocks, accumulation = notes('simclr_cifar10', **large)
  assert 'NT-Xent of 32,768 views in blocks of 256 rows' in blocks and '4 GiB' in blocks
  assert accumulation == (
    'accumulate_steps=4: micro-batches of 4,096 images; the loss sees all 16,384 images of a step, BatchNorm '
    'normalises 4 groups of 4,096 images'
  )
  assert len(notes('simclr_cifar10', devices=64, **large)) == 1
  (alone,) = notes('simclr_cifar10', accumulate_negatives='micro_batch', **large)
  (moco,) = notes('moco_cifar10', accumulate_steps=2)
  for sentence in (alone, moco):
    assert 'the loss sees one micro-batch' in sentence
  assert '16 groups of' in moco
