"""What is specific to the memory bank, end-to-end, SimCLR's memory and the supervised baseline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import config, losses, methods, optim, train_state
from simclr_jax.data import Arrays
from simclr_jax.errors import ConfigError
from simclr_jax.models import network

N = 8  # batch size
SMALL = {
  'batch_size': str(N),
  'image_size': '8',
  'model.depth': '8',
  'model.stem': 'cifar',
  'model.width_multiplier': '0.0625',
  'model.head_dim': '6',
  'data.num_classes': '4',
}


def small(spec, **changes):
  """A recipe with a small network, for 21 images."""
  return config.with_examples(config.load(spec, {**SMALL, **changes}), 21)


@functools.cache
def batch(views=2):
  """A batch of random images."""
  rng = np.random.default_rng(0)
  return {
    'views': jnp.asarray(rng.random((N, views, 8, 8, 3)), jnp.float32),
    'label': jnp.arange(N) % 4,
    'index': jnp.array([3, 20, 7, 0, 11, 2, 5, 9]),
  }


def start(recipe):
  """The method of a recipe, its initial params and state, and its compiled loss."""
  method = methods.build(recipe)
  data = batch(method.views)
  params, state = jax.jit(method.init)(jax.random.key(0), data)
  return method, params, state, jax.jit(method.loss)


BANK = {'model.bn_groups': '2', 'negatives': '30'}


def test_bank_update_changes_only_the_rows_of_the_batch():
  """Breaks if the row of another image is updated, the momentum is applied to the wrong term, or a
  row is not normalised.
  """
  recipe = small('memory_bank_imagenet', **BANK, bank_momentum='0.3')
  method, params, state, loss = start(recipe)
  data = batch(1)
  _, (new, metrics) = loss(params, state, data, jax.random.key(1))
  assert state['bank'].shape == (24, 6)  # 21 images, padded to a multiple of the batch size
  raw = methods.module('memory_bank').build(recipe).loss(params, state, data, jax.random.key(1))
  v = np.asarray(raw[1][1]['embeddings'][:, 0], np.float64)
  old, index = np.asarray(state['bank'], np.float64), np.asarray(data['index'])
  expected = old.copy()
  for i, row in enumerate(index):
    average = 0.3 * old[row] + 0.7 * v[i]
    expected[row] = average / np.linalg.norm(average)
  np.testing.assert_allclose(new['bank'], expected, atol=1e-6)
  assert not np.allclose(new['bank'][index], old[index], atol=0.1)


def test_bank_is_initialised_as_in_the_paper():
  """Breaks if the initial rows are normalised, or their expected squared norm is not 1."""
  recipe = small('memory_bank_imagenet', **BANK, **{'model.head_dim': '128'})
  _, _, state, _ = start(recipe)
  lengths = np.linalg.norm(state['bank'], axis=1)
  assert abs(np.mean(lengths**2) - 1) < 0.06 and np.std(lengths) > 0.01
  assert np.abs(state['bank']).max() <= (128 / 3) ** -0.5


def test_bank_update_with_the_same_image_twice():
  """Breaks if, of two updates of one row, another than the last one is written, which may depend on
  the hardware.
  """
  method, params, state, loss = start(small('memory_bank_imagenet', **BANK))
  data = {**batch(1), 'index': jnp.array([3, 20, 3, 0, 11, 2, 5, 3])}
  _, (twice, _) = loss(params, state, data, jax.random.key(1))
  distinct = {**data, 'index': jnp.array([6, 20, 8, 0, 11, 2, 5, 3])}
  _, (once, _) = loss(params, state, distinct, jax.random.key(1))
  # Row 3 is the positive of three queries in the first batch, of one in the second; v is the same.
  np.testing.assert_array_equal(twice['bank'][3], once['bank'][3])
  np.testing.assert_array_equal(twice['bank'][6], state['bank'][6])


@pytest.mark.parametrize('spec', ['memory_bank_imagenet:info_nce', 'memory_bank_imagenet:nce'])
@pytest.mark.parametrize('per', ['batch', 'example'])
def test_bank_loss_with_the_drawn_negatives(spec, per):
  """Breaks if padding rows are drawn as negatives, the positive is not the image's own row, or the
  negatives get a gradient.
  """
  recipe = small(spec, **BANK, negatives_per=per)
  method, params, state, loss = start(recipe)
  state = {**state, 'bank': state['bank'].at[21:].set(jnp.nan)}
  rng = jax.random.key(1)
  raw = methods.module('memory_bank').build(recipe).loss(params, state, batch(1), rng)[1][1]
  v, positives = raw['embeddings'][:, 0], state['bank'][batch()['index']]
  negatives = jax.random.randint(rng, (30,) if per == 'batch' else (N, 30), 0, 21)
  if recipe.loss == 'info_nce':
    expected = losses.info_nce(v, positives, state['bank'][negatives], recipe.temperature)[0]
  else:
    expected, Z, _ = losses.nce(v, positives, state['bank'][negatives], recipe.temperature, 21, 0.0)
    _, (new, _) = loss(params, state, batch(1), rng)
    np.testing.assert_allclose(new['Z'], Z, rtol=1e-5)
  np.testing.assert_allclose(raw['loss'], expected, rtol=1e-6)
  gradient = jax.grad(lambda s: method.loss(params, {**state, 'bank': s}, batch(1), rng)[0])
  assert np.isfinite(raw['loss'])
  rows = np.asarray(gradient(jnp.nan_to_num(state['bank'])))
  is_positive = np.isin(np.arange(24), batch()['index'])
  assert not rows[~is_positive].any()  # the negatives are constants


@pytest.mark.parametrize('shared', ['true', 'false'])
def test_end_to_end_trains_both_encoders(shared):
  """Breaks if the keys get no gradient, or the second encoder does not start as a copy with
  gradients of its own.
  """
  recipe = small('end_to_end_imagenet', **{'model.bn_groups': '2'}, shared_encoder=shared)
  method, params, state, loss = start(recipe)
  grads, _ = jax.grad(method.loss, has_aux=True)(params, state, batch(), jax.random.key(1))
  assert ('key' in params) == (shared == 'false')
  if shared == 'false':
    for part in ('encoder', 'head'):
      jax.tree.map(np.testing.assert_array_equal, params[part], params['key'][part])
      norms = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), grads['key'][part])
      assert all(n > 0 for n in jax.tree.leaves(norms))
      key, query = jax.tree.leaves(grads['key'][part]), jax.tree.leaves(grads[part])
      assert any((a != b).any() for a, b in zip(key, query))


def test_end_to_end_gradient_through_the_shuffle():
  """Breaks if shuffling loses or permutes the gradients of the keys: with one BatchNorm group it
  has no effect.
  """
  gradients = []
  for kind in ('none', 'permute', 'transpose'):
    recipe = small('end_to_end_imagenet', **{'model.bn_groups': '1', 'shuffle': kind})
    method, params, state, _ = start(recipe)
    gradients.append(
      jax.grad(method.loss, has_aux=True)(params, state, batch(), jax.random.key(1))[0]
    )
  for gradient in gradients[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradients[0], gradient)
  recipe = small('end_to_end_imagenet', **{'model.bn_groups': '2'})
  method, params, state, loss = start(recipe)
  order = np.random.default_rng(0).permutation(N)
  losses_by_order = [
    loss(params, state, {**batch(), 'permutation': jnp.asarray([o])}, jax.random.key(1))[0]
    for o in (np.arange(N), order)
  ]
  assert abs(losses_by_order[0] - losses_by_order[1]) > 1e-4  # with two groups it has an effect


def test_simclr_memory():
  """Breaks if the keys in the memory are not from the EMA encoder, or are added before the loss is
  computed.
  """
  recipe = small('simclr_digits', queue_size='20')  # 16 keys per step: full in the second step
  with recipe.unlocked():
    recipe.key_momentum = 0.5
  method, params, state, loss = start(recipe)
  value, (new, metrics) = loss(params, state, batch(), jax.random.key(1))
  plain = small('simclr_digits')
  raw = methods.module('simclr').build(plain).loss(params, {'stats': state['stats']}, batch(), None)
  z = raw[1][1]['embeddings'].reshape(2 * N, -1)
  np.testing.assert_allclose(
    metrics['loss'],
    losses.nt_xent(z, recipe.temperature, negatives=state['queue']['rows'])[0],
    rtol=1e-5,
  )
  # The EMA encoder still equals the network, so its keys are the projections of the network.
  np.testing.assert_allclose(new['queue']['rows'][: 2 * N], z, atol=1e-5)
  np.testing.assert_array_equal(new['queue']['rows'][2 * N :], state['queue']['rows'][2 * N :])
  assert int(new['queue']['pointer']) == 16
  moved = jax.tree.map(lambda p: p + 1, params)
  _, (later, _) = loss(moved, new, batch(), jax.random.key(1))
  for part in ('encoder', 'head'):
    jax.tree.map(
      lambda k, p: np.testing.assert_allclose(k, p + 0.5, rtol=1e-5),
      later['key']['params'][part],
      params[part],
    )
  assert int(later['queue']['pointer']) == 12


def test_data_that_a_method_cannot_use_is_refused():
  """Breaks if a method trains without the labels that it needs, or silently ignores a second view."""
  images = np.zeros((21, 8, 8, 3), np.uint8)
  unlabelled = Arrays(images, np.full(21, -1, np.int32))
  with pytest.raises(ConfigError, match='needs labels'):
    train_state.build(small('supervised_imagenet'), unlabelled)
  with pytest.raises(ConfigError, match='memory_bank uses view1 only'):
    recipe = small('memory_bank_imagenet', **BANK, **{'augment.view2': 'moco_v2'})
    train_state.build(recipe, unlabelled)
  with pytest.raises(ConfigError, match='for loss=nt_xent only'):
    methods.build(small('simclr_losses:margin_triplet', queue_size='20'))


@pytest.mark.parametrize('spec', ['moco_cifar10', 'memory_bank_imagenet', 'simclr_imagenet:v2'])
def test_without_a_projection_head(spec):
  """Breaks if queue or bank have the dimension of a projection head when there is none."""
  recipe = small(spec, **{'model.head': 'none', 'model.bn_groups': '1', 'model.sk_ratio': '0'})
  method = methods.build(recipe)
  params, state = jax.eval_shape(method.init, jax.random.key(0), batch(method.views))
  jax.eval_shape(method.loss, params, state, batch(method.views), jax.random.key(0))


def test_simclr_without_a_memory():
  """Breaks if SimCLR with queue_size=0 keeps a queue."""
  _, _, state, _ = start(small('simclr_digits'))
  assert set(state) == {'stats'}


def test_supervised_needs_labels_and_learns_from_them():
  """Breaks if the baseline runs without classes, has an online probe, or ignores the labels."""
  with pytest.raises(ConfigError, match='set data.num_classes'):
    methods.build(small('supervised_imagenet', **{'data.num_classes': '0'}))
  recipe = small('supervised_imagenet', learning_rate='3', warmup_epochs='0')
  method, params, state, loss = start(recipe)
  assert set(params) == {'encoder', 'head', 'classifier'}
  optimizer = optim.build(recipe, lambda step: 0.1)
  opt_state, loss_values = optimizer.init(params), []
  step = jax.jit(jax.grad(method.loss, has_aux=True))
  for i in range(40):
    grads, (state, metrics) = step(params, state, batch(1), jax.random.key(i))
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = jax.tree.map(jnp.add, params, updates)
    loss_values.append(float(metrics['loss']))
  np.testing.assert_allclose(loss_values[0], np.log(4), atol=0.05)
  assert loss_values[-1] < 0.2 * loss_values[0] and metrics['train_acc'] == 1


def test_similarities_of_simclr_can_be_dot_products():
  """Breaks if hidden_norm=false normalises the outputs of the head, or the metrics get rows that are not unit rows."""
  recipe = small('simclr_digits', hidden_norm='false', temperature='10')
  _, params, state, loss = start(recipe)
  value, (_, metrics) = loss(params, state, batch(), jax.random.key(1))
  views = batch()['views'].reshape(2 * N, 8, 8, 3)
  z = np.asarray(network.build(recipe).apply(params, state['stats'], views)[0][-1], np.float64)
  logits = z @ z.T / 10
  np.fill_diagonal(logits, -np.inf)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  expected = -np.mean([log_p[i, i ^ 1] for i in range(2 * N)])
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
  norms = np.linalg.norm(metrics['embeddings'], axis=-1)
  np.testing.assert_allclose(norms, 1, rtol=1e-5)


@pytest.mark.parametrize('field', [{'loss': 'nt_logistic'}, {'queue_size': '20'}])
def test_dot_products_are_for_nt_xent_without_a_memory(field):
  with pytest.raises(ConfigError, match='hidden_norm=false'):
    methods.build(small('simclr_digits', hidden_norm='false', **field))
