"""Parallelism and memory: sharded parameters (FSDP), gradient accumulation, rematerialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from simclr_jax import config, sharding, train_state
from simclr_jax.data import digits
from simclr_jax.errors import ConfigError
from simclr_jax.models import by_parts

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


@pytest.mark.parametrize('devices', [1, 8])
def test_blocks_in_parts_give_the_same_training(baseline, devices):
  """Breaks if BatchNorm of blocks that are computed in parts has other statistics, or loses their gradients."""
  ts, metrics = train_steps(devices=devices, rematerialize='parts')
  for a, b in zip(metrics, baseline[1], strict=True):
    for name in ('loss', 'grad_norm'):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
  assert_close(ts, baseline[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'model',
  [
    {'depth': 50, 'stem': 'imagenet', 'sk_ratio': 0.0625, 'se_ratio': 0.25},
    {'bn_groups': 4},
    {'bn_groups': 4, 'bn_layout': 'strided'},
  ],
)
def test_every_kind_of_block_in_parts_gives_the_same_gradients(model):
  """Breaks if a bottleneck, selective kernels, squeeze and excitation, ResNet-D, max-pooling or BatchNorm in groups
  is not the same in parts.
  """
  values = {f'model__{name}': value for name, value in model.items()}
  whole, parts = (train_steps(2, rematerialize=way, **values)[1] for way in ('false', 'parts'))
  for a, b in zip(whole, parts, strict=True):
    for name in ('loss', 'grad_norm'):
      np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=name)


@pytest.mark.parametrize('rows', [24, 7, 1])
def test_gradients_in_parts_against_float64(rows):
  """Breaks if values or derivatives in parts are not those of the whole batch, or rows are lost if 8 does not divide."""
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, y, kernel, weights = (
      jnp.asarray(rng.normal(size=s)) for s in ((rows, 5), (rows, 3), (5, 3), (rows, 3))
    )

    def loss(x, y, kernel, delay):
      z = by_parts.apply(lambda x, kernel: jnp.tanh(x @ kernel), delay(x), kernel)
      z = by_parts.evaluate(by_parts.apply(lambda z, y: z * z + y, z, delay(y)))
      mean = jnp.mean(z * z, axis=0)  # a statistic of all rows, which the next layer uses
      out = by_parts.apply(lambda z, x, mean: z / mean + x[:, :3], delay(z), delay(x), mean)
      return jnp.sum(by_parts.evaluate(out) * weights)

    of_parts, of_whole = (
      jax.value_and_grad(loss, (0, 1, 2))(x, y, kernel, delay)
      for delay in (by_parts.delay, lambda x: x)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), of_parts, of_whole)


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
