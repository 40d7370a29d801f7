"""LARS and the schedule against float64 numpy, and SimCLR's own figures."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from simclr_jax import config, optim


def recipe(**values):
  c = config.load('simclr_cifar10')
  with c.unlocked(), c.ignore_type():
    c.update(values)
  return c


def test_three_lars_steps():
  """Breaks if decay comes after the norms, a mask is lost, or a zero norm divides by zero."""
  rng = np.random.default_rng(0)
  params = {
    'kernel': rng.normal(size=(4, 3)), 'zero': np.zeros((3, 2)), 'still': rng.normal(size=(2, 2)),
    'bias': rng.normal(size=3), 'scale': np.ones(3),
  }  # fmt: skip
  grads = [jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(3)]
  for g in grads:
    g['still'] = np.zeros((2, 2))
  rate, decay, momentum, trust = [0.5, 1.0, 0.25], 1e-2, 0.9, 1e-3

  c = recipe(optimizer='lars', weight_decay=decay, momentum=momentum)
  rates = jnp.array(rate, jnp.float32)
  optimizer = optim.build(c, lambda step: rates[step])
  ours = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  slots = optimizer.init(ours)
  for g in grads:
    g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
    updates, slots = optimizer.update(g, slots, ours)
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
          ratio = trust * w_norm / g_norm
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
def test_schedule(values, examples, steps, warmup, peak, at_1, at_half):
  """Breaks if the number of steps, the scaling or either part of the schedule changes."""
  c = recipe(**values)
  assert optim.train_steps(c, examples) == steps
  assert optim.warmup_steps(c, examples) == warmup
  rate = optim.schedule(c, examples)

  def formula(t):
    if t < warmup:
      return t / warmup * peak
    span = steps - warmup
    return 0.5 * peak * (1 + np.cos(np.pi * min(t - warmup, span) / span))

  for t in (0, 1, max(warmup - 1, 0), warmup, steps // 2, steps - 1, steps):
    np.testing.assert_allclose(rate(t), formula(t), rtol=2e-6, atol=1e-6)
  np.testing.assert_allclose(rate(warmup), peak, rtol=1e-6)
  np.testing.assert_allclose(rate(1), at_1, rtol=1e-5)
  np.testing.assert_allclose(rate(steps // 2), at_half, rtol=1e-5)
  if warmup:
    assert rate(0) == 0


def test_steps_override_epochs():
  """Breaks if `steps` is ignored."""
  assert optim.train_steps(recipe(steps=7), 50000) == 7


@pytest.mark.parametrize('name', ['sgd', 'adamw', 'lars'])
def test_vectors_are_not_decayed_and_the_probe_is_apart(name):
  """Breaks if weight decay reaches BatchNorm or biases, or the probe follows the recipe's rate."""
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
