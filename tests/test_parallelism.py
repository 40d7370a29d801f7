"""Parallelism and memory: sharded parameters (FSDP), gradient accumulation, rematerialisation."""

import jax
import numpy as np
import pytest
from conftest import TINY

from simclr_jax import config, sharding, train_state
from simclr_jax.data import digits
from simclr_jax.errors import ConfigError

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
