"""Optimizers and schedules compared with float64 numpy and with published values."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from simclr_jax import config, optim
from simclr_jax.errors import ConfigError


def recipe(**values):
  """A recipe with these fields."""
  c = config.load('simclr_cifar10')
  with c.unlocked(), c.ignore_type():
    c.update(values)
  return c


def test_lars_against_numpy():
  """Breaks if weight decay is added after the norms are computed, biases are adapted, or a zero
  norm divides by zero.
  """
  rng = np.random.default_rng(0)
  params = {
    'kernel': rng.normal(size=(4, 3)), 'zero': np.zeros((3, 2)), 'no_gradient': rng.normal(size=(2, 2)),
    'bias': rng.normal(size=3), 'scale': np.ones(3),
  }  # fmt: skip
  grads = [jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(3)]
  for g in grads:
    g['no_gradient'] = np.zeros((2, 2))
  rate, decay, momentum, trust_coefficient = [0.5, 1.0, 0.25], 1e-2, 0.9, 1e-3

  c = recipe(optimizer='lars', weight_decay=decay, momentum=momentum)
  rates = jnp.array(rate, jnp.float32)
  optimizer = optim.build(c, lambda step: rates[step])
  ours = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  opt_state = optimizer.init(ours)
  for g in grads:
    g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
    updates, opt_state = optimizer.update(g, opt_state, ours)
    ours = optax.apply_updates(ours, updates)

  velocity = {k: np.zeros_like(p) for k, p in params.items()}
  for lr, grad in zip(rate, grads):
    for k in params:
      g = grad[k]
      ratio = 1.0
      if k not in ('bias', 'scale'):
        g = g + decay * params[k]
        w_norm, g_norm = np.linalg.norm(params[k]), np.linalg.norm(g)
        if w_norm > 0 and g_norm > 0:
          ratio = trust_coefficient * w_norm / g_norm
      velocity[k] = momentum * velocity[k] + lr * ratio * g
      params[k] = params[k] - velocity[k]
  for k in params:
    np.testing.assert_allclose(ours[k], params[k], rtol=1e-5, atol=1e-7, err_msg=k)


@pytest.mark.parametrize(
  'values, examples, steps, warmup, peak, at_1, at_half',
  [
    # ImageNet, 100 epochs, square-root scaling
    (dict(batch_size=4096, epochs=100, learning_rate=0.075, learning_rate_scaling='sqrt',
          warmup_epochs=10.0), 1281167, 31279, 3127, 4.8, 0.00153502, 2.8167555),
    # CIFAR-10, 1000 epochs, linear scaling
    (dict(batch_size=512, epochs=1000, learning_rate=1.0, learning_rate_scaling='linear',
          warmup_epochs=10.0), 50000, 97657, 976, 2.0, 0.00204918, 1.0158727),
    # ImageNet linear evaluation, no warm-up
    (dict(batch_size=4096, epochs=90, learning_rate=0.1, learning_rate_scaling='linear',
          warmup_epochs=0.0), 1281167, 28151, 0, 1.6, 1.6, 0.8000447),
  ],
)  # fmt: skip
def test_cosine_schedule(values, examples, steps, warmup, peak, at_1, at_half):
  """Breaks if the number of steps, the learning rate scaling, the warm-up or the cosine decay
  changes.
  """
  c = recipe(**values)
  assert optim.train_steps(c, examples) == steps
  assert optim.warmup_steps(c, examples) == warmup
  rate = optim.schedule(c, examples)

  def expected(t):
    if t < warmup:
      return t / warmup * peak
    decay_steps = steps - warmup
    return 0.5 * peak * (1 + np.cos(np.pi * min(t - warmup, decay_steps) / decay_steps))

  for t in (0, 1, max(warmup - 1, 0), warmup, steps // 2, steps - 1, steps):
    np.testing.assert_allclose(rate(t), expected(t), rtol=2e-6, atol=1e-6)
  np.testing.assert_allclose(rate(warmup), peak, rtol=1e-6)
  np.testing.assert_allclose(rate(1), at_1, rtol=1e-5)
  np.testing.assert_allclose(rate(steps // 2), at_half, rtol=1e-5)
  if warmup:
    assert rate(0) == 0


def test_steps_override_epochs():
  """Breaks if `steps` is ignored."""
  assert optim.train_steps(recipe(steps=7), 50000) == 7


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lars'])
def test_no_weight_decay_on_vectors_and_the_probe(name):
  """Breaks if weight decay is applied to BatchNorm, biases or the online probe."""
  c = recipe(optimizer=name, weight_decay=0.1)
  optimizer = optim.build(c, lambda step: 0.1)
  params = {
    'encoder': {'kernel': jnp.ones((2, 2)), 'scale': jnp.ones(2)},
    'probe': jnp.ones((2, 2)),
  }
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  assert (updates['encoder']['kernel'] < 0).all()
  assert not updates['encoder']['scale'].any()
  assert not updates['probe'].any()
  assert isinstance(c, ml_collections.ConfigDict)


def test_moco_schedules():
  """Breaks if the learning rate changes within an epoch, at another epoch, or by another factor."""
  examples = 1_281_167
  v1, v2 = (optim.schedule(config.load(f'moco_imagenet:{v}'), examples) for v in ('v1', 'v2'))

  def last_step(epoch):  # the last step whose first image is of this epoch
    return ((epoch + 1) * examples - 1) // 256

  for epoch, expected in (
    (0, 0.03),
    (119, 0.03),
    (120, 0.003),
    (159, 0.003),
    (160, 3e-4),
    (199, 3e-4),
  ):
    np.testing.assert_allclose(v1(last_step(epoch)), expected, rtol=1e-6)
  for epoch, expected in ((0, 0.03), (1, 0.02999815), (100, 0.015), (199, 1.8505e-6)):
    np.testing.assert_allclose(v2(last_step(epoch)), expected, rtol=1e-4)
  assert v2(last_step(0)) != v2(last_step(0) + 1) == v2(last_step(1))
  assert v2(0) == v2(last_step(0))

  cifar10 = optim.schedule(config.load('moco_cifar10'), 50_000)
  np.testing.assert_allclose(cifar10(0), 0.059996, rtol=1e-4)  # this recipe counts epochs from 1
  assert cifar10(199 * 50_000 // 512) > 0 == cifar10(199 * 50_000 // 512 + 1)


def test_multistep_without_decay_epochs():
  """Breaks if an empty list of epochs fails instead of keeping the learning rate constant."""
  rate = optim.schedule(config.load('moco_imagenet', {'decay_epochs': ''}), 1_281_167)
  np.testing.assert_allclose(rate(1_000_000), 0.03)


def test_learning_rate_of_zero_is_refused():
  """Breaks if a run of one epoch with MoCo's CIFAR schedule silently trains at learning rate 0."""
  with pytest.raises(ConfigError, match='schedule_first_epoch=1'):
    optim.schedule(config.load('moco_cifar10', {'steps': '50'}), 50_000)


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_weight_decay_and_momentum(nesterov):
  """Breaks if MoCo's weight decay excludes BatchNorm and biases, or is applied after the momentum."""
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(4, 3)), 'bias': rng.normal(size=3)}
  c = recipe(optimizer='nesterov' if nesterov else 'sgd', weight_decay=0.1, weight_decay_on='all')
  rates = [0.5, 0.2, 0.1]
  optimizer = optim.build(c, lambda step: jnp.array(rates)[step])
  ours = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  opt_state = optimizer.init(ours)
  velocity = jax.tree.map(np.zeros_like, params)
  for rate in rates:
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    updates, opt_state = optimizer.update(
      jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads), opt_state, ours
    )
    ours = optax.apply_updates(ours, updates)
    for k, g in grads.items():
      g = g + 0.1 * params[k]
      velocity[k] = 0.9 * velocity[k] + g
      params[k] = params[k] - rate * (g + 0.9 * velocity[k] if nesterov else velocity[k])
  for k in params:
    np.testing.assert_allclose(ours[k], params[k], rtol=1e-5)


def test_lars_decays_but_does_not_adapt_the_classifier():
  """Breaks if LARS adapts the learning rate of the supervised classifier, or excludes its kernel
  from weight decay.
  """
  c = recipe(optimizer='lars', weight_decay=0.1)
  optimizer = optim.build(c, lambda step: 1.0)
  params = {k: {'kernel': jnp.full((2, 2), 3.0)} for k in ('encoder', 'classifier')}
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates['classifier']['kernel'], -1.3, rtol=1e-6)
  np.testing.assert_allclose(updates['encoder']['kernel'], -0.003, rtol=1e-5)  # 0.001 |w| / |g| g


def test_optimizer_groups_have_learning_rates_of_their_own():
  """Breaks if the learning rate of a group is not its factor times that of the recipe, or decays
  although it is constant.
  """
  values = {'optimizer': 'sgd', 'momentum': 0.0, 'weight_decay': 0.0, 'schedule': 'cosine',
            'learning_rate': 0.2, 'learning_rate_scaling': 'linear', 'batch_size': 512}  # fmt: skip
  c = recipe(**values, warmup_epochs=0.0, steps=10)
  rate = optim.schedule(c, 50_000)
  groups = {
    'predictor': optim.Group(constant_rate=True),
    'fast': optim.Group(rate_factor=10.0),
    'both': optim.Group(0.5, constant_rate=True),
  }
  optimizer = optim.build(c, rate, groups)
  params = {k: {'kernel': jnp.ones((2, 2))} for k in ('encoder', *groups)}
  opt_state, grads = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
  for step in range(10):
    updates, opt_state = optimizer.update(grads, opt_state, params)
    step_rate = 0.4 * 0.5 * (1 + np.cos(np.pi * step / 10))
    expected = {'encoder': step_rate, 'predictor': 0.4, 'fast': 10 * step_rate, 'both': 0.2}
    for key, value in expected.items():
      np.testing.assert_allclose(updates[key]['kernel'], -value, rtol=1e-5, err_msg=key)


def test_norms():
  """Breaks if norms of arrays that are stacked come in another order."""
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=s).astype(np.float32) for s in ((3, 4), (5,), (3, 4), (), (5,), (4, 3))]
  expected = [np.linalg.norm(x.astype(np.float64)) for x in arrays]
  np.testing.assert_allclose(optim.norms(arrays), expected, rtol=1e-6)
