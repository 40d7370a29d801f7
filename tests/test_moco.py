"""MoCo compared with a float64 implementation in numpy; its queue, shuffling and first loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simclr_jax import (
  config as recipes,
  data,
  fields,
  losses,
  momentum,
  optim,
  sharding,
  train_state,
)
from simclr_jax.data import augment, order
from simclr_jax.methods import moco
from simclr_jax.models import network
from simclr_jax.models.norm import BatchNorm

# A training step in numpy: 3x3 convolution, BatchNorm in groups, ReLU, average pool, linear layer.

N, SIZE, CHANNELS, DIM, K, GROUPS = 8, 6, 5, 4, 20, 2
T, M, RATE, DECAY, MOMENTUM = 0.2, 0.9, 0.1, 1e-2, 0.9
MEMBERS = {'contiguous': [[0, 1, 2, 3], [4, 5, 6, 7]], 'strided': [[0, 2, 4, 6], [1, 3, 5, 7]]}


class NumpyMoCo:
  """MoCo's training step in float64 with explicit gradients; `p` and `k` are the weights of query
  and key encoder.
  """

  def __init__(self, p, p_stats, k, k_stats, rows, layout, unbiased, symmetric):
    self.p, self.k, self.rows = p, k, rows
    self.stats = {'p': p_stats, 'k': k_stats}
    self.members, self.unbiased, self.symmetric = MEMBERS[layout], unbiased, symmetric
    self.velocity = {name: np.zeros_like(w) for name, w in p.items()}
    self.pointer = 0

  def forward(self, encoder, x):
    w = getattr(self, encoder)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = {(i, j): padded[:, i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)}
    a = sum(patch @ w['conv'][ij] for ij, patch in patches.items())  # [n, h, w, c]
    normal, deviation, means, variances = np.empty_like(a), [], [], []
    for rows in self.members:
      mean, var = a[rows].mean(axis=(0, 1, 2)), a[rows].var(axis=(0, 1, 2))
      deviation.append(np.sqrt(var + 1e-5))
      normal[rows] = (a[rows] - mean) / deviation[-1]
      means.append(mean)
      values = len(rows) * SIZE * SIZE
      variances.append(var * values / (values - 1) if self.unbiased else var)
    old = self.stats[encoder]
    self.stats[encoder] = {
      'mean': 0.9 * old['mean'] + 0.1 * np.mean(means, axis=0),
      'var': 0.9 * old['var'] + 0.1 * np.mean(variances, axis=0),
    }
    y = w['gamma'] * normal + w['beta']
    h = np.maximum(y, 0).mean(axis=(1, 2))
    u = h @ w['dense'] + w['bias']
    length = np.linalg.norm(u, axis=1, keepdims=True)
    return u / length, (patches, normal, deviation, y, h, length)

  def backward(self, q, d_q, activations):
    patches, normal, deviation, y, h, length = activations
    w = self.p
    d_u = (d_q - q * (q * d_q).sum(axis=1, keepdims=True)) / length
    d_y = (d_u @ w['dense'].T)[:, None, None, :] / SIZE**2 * (y > 0)
    d_normal = d_y * w['gamma']
    d_a = np.empty_like(y)
    for rows, sd in zip(self.members, deviation):
      d, x = d_normal[rows], normal[rows]
      d_a[rows] = (d - d.mean(axis=(0, 1, 2)) - x * (d * x).mean(axis=(0, 1, 2))) / sd
    d_conv = np.empty_like(w['conv'])
    for ij, patch in patches.items():
      d_conv[ij] = np.einsum('nhwc,nhwd->cd', patch, d_a)
    return {
      'conv': d_conv,
      'gamma': (d_y * normal).sum(axis=(0, 1, 2)),
      'beta': d_y.sum(axis=(0, 1, 2)),
      'dense': h.T @ d_u,
      'bias': d_u.sum(axis=0),
    }

  def step(self, views, permutations):
    self.k = {name: M * self.k[name] + (1 - M) * self.p[name] for name in self.p}
    outputs = {'logits': [], 'losses': [], 'keys': []}
    grads = {name: np.zeros_like(w) for name, w in self.p.items()}
    first, second = views[:, 0], views[:, 1]
    pairs = [(first, second), (second, first)] if self.symmetric else [(first, second)]
    for (x_q, x_k), permutation in zip(pairs, permutations):
      q, activations = self.forward('p', x_q)
      shuffled, _ = self.forward('k', x_k[permutation])
      k = np.empty_like(shuffled)
      k[permutation] = shuffled
      logits = np.concatenate([(q * k).sum(axis=1)[:, None], q @ self.rows.T], axis=1) / T
      p = np.exp(logits - logits.max(axis=1, keepdims=True))
      p /= p.sum(axis=1, keepdims=True)
      outputs['losses'].append(-np.log(p[:, 0]).mean())
      d_logits = (p - np.eye(1 + K)[0]) / (N * T)
      d_q = d_logits[:, :1] * k + d_logits[:, 1:] @ self.rows
      for name, g in self.backward(q, d_q, activations).items():
        grads[name] += g
      outputs['logits'].append(logits)
      outputs['keys'].append(k)
    for name in self.p:
      self.velocity[name] = MOMENTUM * self.velocity[name] + grads[name] + DECAY * self.p[name]
    self.p = {name: w - RATE * self.velocity[name] for name, w in self.p.items()}
    # With the symmetric loss, the keys of the first views are computed in the second direction.
    for row in np.concatenate(outputs['keys'][::-1]):
      self.rows[self.pointer] = row
      self.pointer = (self.pointer + 1) % K
    return outputs, grads


class Features(nn.Module):
  """The same encoder in flax."""

  layout: str = 'contiguous'
  unbiased: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(CHANNELS, (3, 3), padding=1, use_bias=False, name='conv')(x)
    x = BatchNorm(GROUPS, self.layout, unbiased=self.unbiased, name='norm')(x, train=True)
    return nn.relu(x).mean(axis=(1, 2))


def small_network(**kwargs):
  """The encoder with a linear head, as a `Network`."""
  f, g = Features(**kwargs), nn.Dense(DIM)

  def init(rng, x):
    h, v = f.init_with_output(rng, x)
    params = {'encoder': v['params'], 'head': g.init(rng, h)['params']}
    return params, {'encoder': v['batch_stats'], 'head': {}}

  def apply(params, stats, x):
    v = {'params': params['encoder'], 'batch_stats': stats['encoder']}
    h, new = f.apply(v, x, mutable='batch_stats')
    z = g.apply({'params': params['head']}, h)
    return [h, z], {'encoder': new['batch_stats'], 'head': {}}

  return network.Network(init, apply)


def small_recipe(**values):
  """The recipe of the numpy implementation."""
  c = fields.recipe('moco')
  c.model.bn_groups, c.model.head_dim = GROUPS, DIM
  c.temperature, c.queue_size, c.key_momentum = T, K, M
  c.optimizer, c.learning_rate, c.learning_rate_scaling = 'sgd', RATE, 'none'
  c.schedule, c.weight_decay, c.weight_decay_on = 'multistep', DECAY, 'all'
  c.momentum, c.batch_size = MOMENTUM, N
  c.update(values)
  return c


def draw_views(seed, n=N):
  return jnp.asarray(np.random.default_rng(seed).uniform(size=(n, 2, SIZE, SIZE, 3)), jnp.float32)


def perturbed(method, seed=0):
  """Initial parameters and state plus noise, as if after some training: no zeros or ones, key and
  query encoder differ.
  """
  params, state = method.init(jax.random.key(seed), {'views': draw_views(seed)})
  rng = np.random.default_rng(seed)

  def shake(tree):
    return jax.tree.map(lambda x: x + 0.2 * rng.uniform(size=x.shape).astype(np.float32), tree)

  key = {name: shake(tree) for name, tree in state['key'].items()}
  return shake(params), {**state, 'stats': shake(state['stats']), 'key': key}


def weights(params):
  """Parameters as `NumpyMoCo` has them."""
  leaves = {
    'conv': params['encoder']['conv']['kernel'],
    'gamma': params['encoder']['norm']['scale'],
    'beta': params['encoder']['norm']['bias'],
    'dense': params['head']['kernel'],
    'bias': params['head']['bias'],
  }
  return {name: np.array(w, np.float64) for name, w in leaves.items()}


def averages(stats):
  """BatchNorm statistics as `NumpyMoCo` has them."""
  return {name: np.array(s, np.float64) for name, s in stats['encoder']['norm'].items()}


@pytest.mark.parametrize(
  'symmetric, layout, unbiased, devices',
  [(False, 'contiguous', False, 1), (False, 'strided', True, 8), (True, 'contiguous', True, 8),
   (True, 'strided', False, 1)],
)  # fmt: skip
def test_five_steps_against_numpy(symmetric, layout, unbiased, devices):
  """Breaks if any number of a step differs from the definition in the papers.

  Compares logits, loss, accuracies and gradients; query and key encoder with their BatchNorm statistics; the queue, which
  wraps around. Weight decay is applied before momentum.
  """
  c = small_recipe(symmetric=symmetric)
  method = moco.from_network(small_network(layout=layout, unbiased=unbiased), c)
  params, state = perturbed(method)
  optimizer = optim.build(c, optim.schedule(c, N))
  opt_state = optimizer.init(params)
  reference = NumpyMoCo(
    weights(params), averages(state['stats']),
    weights(state['key']['params']), averages(state['key']['stats']),
    np.array(state['queue']['rows'], np.float64), layout, unbiased, symmetric,
  )  # fmt: skip

  @jax.jit
  def step(params, state, opt_state, batch):
    gradient = jax.value_and_grad(method.loss, has_aux=True)
    (objective, (state, metrics)), grads = gradient(params, state, batch, jax.random.key(0))
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), state, opt_state, grads, objective, metrics

  def close(ours, theirs, quantity):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=f'{quantity}, step {i}')

  rng = np.random.default_rng(1)
  mesh = sharding.make_mesh(jax.devices()[:devices])
  with jax.set_mesh(mesh):
    for i in range(5):
      views = draw_views(10 + i)
      permutations = np.stack([rng.permutation(N) for _ in range(2)])
      batch = sharding.put_batch(mesh, {'views': views})
      batch |= sharding.put_replicated(mesh, {'permutation': permutations.astype(np.int32)})
      rows = np.asarray(state['queue']['rows'])
      params, state, opt_state, grads, objective, metrics = step(params, state, opt_state, batch)
      expected, expected_grads = reference.step(np.asarray(views, np.float64), permutations)

      q, k = np.asarray(metrics['embeddings']).swapaxes(0, 1)  # embeddings of the first direction
      logits = np.concatenate([(q * k).sum(axis=1)[:, None], q @ rows.T], axis=1) / T
      close(logits, expected['logits'][0], 'logits')
      close(objective, sum(expected['losses']), 'objective')
      close(metrics['loss'], np.mean(expected['losses']), 'loss')
      harder = [np.sum(x[:, 1:] > x[:, :1], axis=1) for x in expected['logits']]
      close(metrics['contrastive_acc'], np.mean(np.equal(harder, 0)), 'accuracy')
      close(metrics['contrastive_acc5'], np.mean(np.less(harder, 5)), 'accuracy of five')
      for ours, theirs, quantity in (
        (weights(grads), expected_grads, 'gradient'),
        (weights(params), reference.p, 'query'),
        (weights(state['key']['params']), reference.k, 'key'),
        (averages(state['stats']), reference.stats['p'], 'statistics of the query'),
        (averages(state['key']['stats']), reference.stats['k'], 'statistics of the key'),
      ):
        for name in theirs:
          close(ours[name], theirs[name], f'{quantity}: {name}')
      close(state['queue']['rows'], reference.rows, 'queue')
      assert int(state['queue']['pointer']) == reference.pointer


def test_key_encoder_starts_as_a_copy():
  """Breaks if the key encoder is not initialised as a copy of the query encoder, or copies the
  online probe, too.
  """
  net = small_network()

  def init(rng, x):
    params, stats = net.init(rng, x)
    return {**params, 'probe': {'kernel': jnp.ones((2, 2))}}, stats

  method = moco.from_network(net._replace(init=init), small_recipe())
  params, state = method.init(jax.random.key(3), {'views': draw_views(3)})
  network = {k: v for k, v in params.items() if k != 'probe'}
  jax.tree.map(np.testing.assert_array_equal, state['key']['params'], network)
  jax.tree.map(np.testing.assert_array_equal, state['key']['stats'], state['stats'])
  np.testing.assert_allclose(np.linalg.norm(state['queue']['rows'], axis=1), 1, rtol=1e-6)
  assert abs(state['queue']['rows'].mean()) < 0.2  # random directions


@pytest.mark.parametrize('symmetric', [False, True])
def test_no_gradient_reaches_the_keys(symmetric):
  """Breaks if the key encoder, the queue or the moving average gets a gradient."""
  net = small_network()
  method = moco.from_network(net, small_recipe(symmetric=symmetric))
  params, state = perturbed(method)
  batch = {'views': draw_views(4)}

  @jax.jit
  @jax.grad
  def gradient(inputs):
    key_params, rows, query = inputs
    key = {**state['key'], 'params': key_params}
    s = {**state, 'key': key, 'queue': {**state['queue'], 'rows': rows}}
    return method.loss(query, s, batch, jax.random.key(0))[0]

  key, rows, query = gradient((state['key']['params'], state['queue']['rows'], params))
  for leaf in jax.tree.leaves((key, rows)):
    np.testing.assert_array_equal(leaf, 0)
  assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(query))

  # The stop_gradient of the keys hides from the loss whether the average has one.
  through = jax.grad(lambda p: optax.tree.sum(momentum.update_ema(state['key'], p, M)['params']))
  for leaf in jax.tree.leaves(through(params)):
    np.testing.assert_array_equal(leaf, 0)


def test_key_encoder_update():
  """Breaks if the key encoder of a step is not m key + (1 - m) query, with the query encoder from before
  its update; or if its BatchNorm statistics are averaged with those of the query encoder.
  """
  net, c = small_network(), small_recipe(shuffle='none')
  method = moco.from_network(net, c)
  params, state = perturbed(method)
  batch = {'views': draw_views(5)}
  _, (new, metrics) = method.loss(params, state, batch, jax.random.key(0))

  old = state['key']
  key = jax.tree.map(lambda k, q: M * k + (1 - M) * q, old['params'], params)
  assert not np.allclose(key['head']['kernel'], old['params']['head']['kernel'], atol=1e-3)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
  jax.tree.map(close, new['key']['params'], key)
  outputs, stats = net.apply(key, old['stats'], batch['views'][:, 1])
  close(metrics['embeddings'][:, 1], losses.l2_normalize(outputs[-1]))
  jax.tree.map(close, new['key']['stats'], stats)

  shifted = {**state, 'stats': jax.tree.map(lambda s: s + 100, state['stats'])}
  _, (shifted_result, _) = method.loss(params, shifted, batch, jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, shifted_result['key'], new['key'])
  assert shifted_result['stats']['encoder']['norm']['mean'].min() > 80


@pytest.mark.parametrize('symmetric', [False, True])
def test_negatives_are_keys_of_earlier_steps(symmetric):
  """Breaks if the keys of a step are in the queue when its loss is computed, or when the second
  half of the symmetric loss is.
  """
  c = small_recipe(symmetric=symmetric, queue_size=16)  # as many rows as two views of a batch
  method = moco.from_network(small_network(), c)
  params, state = perturbed(method)
  batch = {'views': draw_views(6)}
  old_rows = state['queue']['rows']
  loss, (new, metrics) = method.loss(params, state, batch, jax.random.key(0))
  q, k = metrics['embeddings'].swapaxes(0, 1)
  expected, _ = losses.info_nce(q, k, old_rows, T)
  with_new_keys, _ = losses.info_nce(q, k, new['queue']['rows'], T)
  assert abs(with_new_keys - expected) > 0.1
  if symmetric:
    swapped = moco.from_network(small_network(), small_recipe(queue_size=16))
    flipped = {'views': batch['views'][:, ::-1]}
    rng = jax.random.key(0)
    flipped['permutation'] = momentum.draw_permutation('permute', batch, rng, 1)[None]
    expected += swapped.loss(params, state, flipped, rng)[0]
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  new_rows = slice(8, 16) if symmetric else slice(0, 8)
  np.testing.assert_allclose(new['queue']['rows'][new_rows], k, rtol=1e-6)


# The queue, alone and in training.


@pytest.mark.parametrize('size', [1, 7, 8])
def test_queue_against_a_list(size):
  """Breaks if keys are lost or misplaced when their number does not divide the queue's size, or
  exceeds it.
  """
  ours = momentum.init_queue(jax.random.key(0), size, 3)
  rows, pointer, total = [list(r) for r in np.asarray(ours['rows'])], 0, 0
  rng = np.random.default_rng(size)
  for n in (3, 1, 8, 5, 7, 20, 2, 14, 4):
    keys = rng.normal(size=(n, 3)).astype(np.float32)
    ours = jax.jit(momentum.enqueue)(ours, keys)
    for key in keys:
      rows[pointer] = list(key)
      pointer = (pointer + 1) % size
    total += n
    np.testing.assert_array_equal(ours['rows'], np.array(rows))
    assert (int(ours['pointer']), int(ours['filled'])) == (pointer, min(total, size))


# The learning rate is small so that rounding does not change the sign of an activation: one device and
# eight may then differ after the ReLU.
DIGITS = {
  'data.source': 'digits', 'data.num_classes': '10', 'model.depth': '8',
  'model.width_multiplier': '0.125', 'model.head_dim': '16', 'model.stem': 'strided',
  'batch_size': '32', 'steps': '10', 'learning_rate': '0.01', 'queue_size': '100',
  'schedule_first_epoch': '0', 'model.bn_groups': '8', 'log_every_steps': '5',
  'augment.view1': 'torch_crop(0.2,1)|flip',
}  # fmt: skip


@pytest.fixture(scope='module')
def digits():
  """The recipe and the training images.

  With this seed, no input of a ReLU is so near to 0 that rounding decides its gradient. One that is changes the gradient
  by 1e-4 to 1e-2.
  """
  c = recipes.load('moco_cifar10', {**DIGITS, 'seed': '1'})
  return c, data.load(c.data, 'train')


@pytest.fixture(scope='module')
def trainings(digits):
  """Five steps on 1 and on 8 devices: {devices: (initial state, [(metrics, queue), ...])}."""
  c, train = digits
  results = {}
  for devices in (1, 8):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    ts, step = train_state.build(c, train, mesh)
    initial = jax.device_get(ts)
    steps = []
    for i in range(5):
      ts, metrics = step(ts, i)
      steps.append(jax.device_get((metrics, ts.state['queue'])))
    results[devices] = initial, steps
  return results


def test_keys_are_enqueued_in_the_order_of_the_batch(digits, trainings):
  """Breaks if each device enqueues its keys separately, or the keys are not unshuffled."""
  c, train = digits
  initial, steps = trainings[8]
  rows = order.rows(c.seed, 0, c.batch_size, len(train))
  views = jax.jit(lambda x, rows: augment.views(
    x, rows['epoch'], rows['position'], augment.pipelines(c.augment, 2), c.seed, c.image_size
  ))(train.images[rows['index']], rows)  # fmt: skip
  rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(c.seed), 2), 0)
  permutation = np.asarray(momentum.draw_permutation('permute', {'views': views}, rng))
  assert sorted(permutation) == list(range(32)) and (permutation != np.arange(32)).any()
  key = initial.state['key']
  apply = jax.jit(network.build(c).apply)
  shuffled = losses.l2_normalize(apply(key['params'], key['stats'], views[permutation, 1])[0][-1])
  keys = np.empty_like(shuffled)
  keys[permutation] = shuffled
  np.testing.assert_allclose(steps[0][1]['rows'][:32], keys, atol=1e-5)
  np.testing.assert_array_equal(steps[0][1]['rows'][32:], initial.state['queue']['rows'][32:])


def test_training_does_not_depend_on_the_number_of_devices(trainings):
  """Breaks if loss, shuffling or queue depend on the number of devices."""
  norms = {float(metrics['param_norm']) for metrics, _ in trainings[1][1]}
  assert len(norms) == 5  # every step changes the parameters
  for (one, one_queue), (eight, eight_queue) in zip(trainings[1][1], trainings[8][1]):
    for name in ('loss', 'contrastive_acc', 'contrastive_acc5'):
      np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(eight_queue['rows'], one_queue['rows'], atol=1e-5)
    assert int(eight_queue['pointer']) == int(one_queue['pointer'])


def test_queue_during_training(trainings):
  """Breaks if keys are not normalised, the queue does not wrap around, or its metrics are wrong."""
  steps = trainings[8][1]
  pointers = []
  for i, (metrics, queue) in enumerate(steps):
    np.testing.assert_allclose(np.linalg.norm(queue['rows'], axis=1), 1, rtol=1e-5)
    pointers.append(int(queue['pointer']))
    # The metrics describe the queue from which the negatives of the step came.
    np.testing.assert_allclose(metrics['queue_filled'], min(32 * i, 100) / 100)
    np.testing.assert_allclose(metrics['queue_age'], min(32 * i, 100) / 32)
    np.testing.assert_allclose(metrics['queue_norm'], 1, rtol=1e-5)
    np.testing.assert_allclose(metrics['chance_loss'], np.log(101), rtol=1e-6)
  assert pointers == [32, 64, 96, 28, 60]
  np.testing.assert_array_equal(steps[4][1]['rows'][60:96], steps[2][1]['rows'][60:96])


def test_loss_rises_while_the_queue_fills():
  """Breaks if keys do not replace the random initial rows of the queue, or `queue_filled` and
  `queue_age` are wrong.
  """
  c = small_recipe(queue_size=32, learning_rate=0.0)
  method = moco.from_network(small_network(), c)
  params, state = method.init(jax.random.key(8), {'views': draw_views(8)})
  step = jax.jit(method.loss)
  values = []
  for i in range(6):
    _, (state, metrics) = step(params, state, {'views': draw_views(20 + i)}, jax.random.key(i))
    values.append([float(metrics[k]) for k in ('loss', 'queue_filled', 'queue_age')])
  loss, filled, age = np.transpose(values)
  np.testing.assert_allclose(filled, [0, 0.25, 0.5, 0.75, 1, 1])
  np.testing.assert_allclose(age, [0, 1, 2, 3, 4, 4])
  assert (np.diff(loss[:5]) > 0.02).all(), loss
  assert abs(loss[5] - loss[4]) < 0.02, loss


# Shuffling BatchNorm.


@pytest.mark.parametrize('groups', [2, 3, 4])
@pytest.mark.parametrize('kind', momentum.SHUFFLES)
def test_unshuffle_inverts_shuffle(kind, groups):
  """Breaks if the keys are not in the order of their queries after unshuffling."""
  x = np.random.default_rng(groups).normal(size=(24, 2, 3)).astype(np.float32)
  permutation = momentum.draw_permutation(kind, {'views': x}, jax.random.key(groups))
  shuffled = momentum.shuffle(kind, x, groups, permutation)
  np.testing.assert_array_equal(momentum.unshuffle(kind, shuffled, groups, permutation), x)
  assert np.array_equal(shuffled, x) == (kind == 'none')
  np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(x, axis=0))


@pytest.mark.parametrize('groups', [2, 3, 4])
def test_transpose_spreads_every_group(groups):
  """Breaks if more members of a BatchNorm group stay together than n / groups^2, rounded up."""
  old = np.repeat(np.arange(groups), 24 // groups)  # the group of each row before shuffling
  new = momentum.shuffle('transpose', old[:, None], groups, None).reshape(groups, -1)
  for members in new:
    share = np.bincount(members, minlength=groups)
    assert len(members) == 24 // groups and np.ptp(share) <= 1 and share.min() >= 1


def test_permutations_are_drawn_or_given():
  """Breaks if two steps or directions have the same permutation, or a given permutation is not
  used.
  """
  batch = {'views': np.zeros((24, 1))}
  drawn = [
    tuple(np.asarray(momentum.draw_permutation('permute', batch, jax.random.key(step), direction)))
    for step in (0, 1)
    for direction in (0, 1)
  ]
  assert len(set(drawn)) == 4
  recorded = np.stack([np.arange(24)[::-1], np.roll(np.arange(24), 5)]).astype(np.int32)
  for direction in (0, 1):
    used = momentum.draw_permutation(
      'permute', {**batch, 'permutation': recorded}, jax.random.key(0), direction
    )
    np.testing.assert_array_equal(used, recorded[direction])


@pytest.mark.parametrize('layout', list(MEMBERS))
@pytest.mark.parametrize('kind', momentum.SHUFFLES)
def test_shuffle_changes_the_batch_norm_groups(kind, layout):
  """Breaks if the keys are normalised in the same BatchNorm groups as their queries.

  One image is made bright; the keys that change are in its BatchNorm group.
  """
  net = small_network(layout=layout)
  method = moco.from_network(net, small_recipe(shuffle=kind))
  params, state = perturbed(method)
  permutation = np.array([[3, 1, 6, 0, 2, 5, 7, 4]], np.int32)

  def embeddings(views):
    batch = {'views': views, 'permutation': permutation}
    return method.loss(params, state, batch, jax.random.key(0))[1][1]['embeddings']

  views = draw_views(7)
  bright = views.at[0].multiply(3.0)
  changed = np.abs(embeddings(bright) - embeddings(views)).max(axis=-1) > 1e-6  # [n, 2]
  of_query, of_key = (set(np.flatnonzero(c)) for c in changed.T)
  assert of_query == set(MEMBERS[layout][0])
  shuffled_order = {
    'none': range(8),
    'transpose': [0, 4, 1, 5, 2, 6, 3, 7],
    'permute': permutation[0],
  }
  examples = list(shuffled_order[kind])
  group = next(g for g in MEMBERS[layout] if examples.index(0) in g)
  assert of_key == {examples[position] for position in group}
  assert (of_key == of_query) == (kind == 'none')


# The published recipes.


@pytest.fixture
def photographs(test_data):
  """16 photographs of different kinds, uint8 `[16, 256, 256, 3]`."""
  image = pytest.importorskip('PIL.Image')
  ops = pytest.importorskip('PIL.ImageOps')
  files = sorted(test_data.glob('*/test/*/*.jpg'))
  if len(files) < 16:
    pytest.skip(f'{test_data} has no photographs: */test/CLASS/*.jpg')
  selected = files[:: len(files) // 16][:16]
  return np.stack([ops.fit(image.open(f).convert('RGB'), (256, 256)) for f in selected])


@pytest.mark.slow
@pytest.mark.parametrize('variant', ['v1', 'v2'])
def test_first_loss_of_the_published_recipes(variant, photographs):
  """Breaks if the temperature, queue or initialisation of a recipe changes its first loss.

  An untrained ResNet-50 maps all photographs close together, so that a key is easily found among random rows.
  """
  c = recipes.load(
    f'moco_imagenet:{variant}',
    {'model.bn_groups': '2', 'batch_size': '16', 'data.num_classes': '0'},
  )
  low, high = c.first_loss
  assert (low, high) == {'v1': (0, 0.5), 'v2': (6.2, 6.7)}[variant]
  net = network.build(c)
  net = net._replace(apply=jax.jit(net.apply))  # compiled once for queries and keys
  method = moco.from_network(net, c)
  params, state = method.init(jax.random.key(0), {'views': jnp.zeros((2, 2, 32, 32, 3))})
  assert state['queue']['rows'].shape == (65536, 128)
  index = np.arange(16)
  views = jax.jit(
    lambda x: augment.views(x, 0 * index, index, augment.pipelines(c.augment, 2), c.seed, c.image_size)
  )(photographs)  # fmt: skip
  _, (_, metrics) = method.loss(params, state, {'views': views}, jax.random.key(1))
  assert low < metrics['loss'] < high
