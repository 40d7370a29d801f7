"""Batch normalisation compared with flax and numpy, and its communication in the compiled program."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from simclr_jax import sharding
from simclr_jax.models.norm import BatchNorm

SHAPE = (12, 3, 2, 5)  # n, height, width, c
ROWS = {  # the rows of 3 groups
  'contiguous': [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
  'strided': [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]],
}


def draw(seed, shape=SHAPE):
  """Random activations."""
  return np.random.default_rng(seed).normal(1.0, 2.0, shape).astype(np.float32)


def variables(seed):
  """Random parameters and running statistics."""
  scale, bias, mean, var = np.random.default_rng(seed).uniform(0.5, 1.5, (4, SHAPE[-1]))
  return {'params': {'scale': scale, 'bias': bias}, 'batch_stats': {'mean': mean, 'var': var}}


def test_batch_norm_against_flax():
  """Breaks if outputs or running statistics differ from flax.linen.BatchNorm, in training or
  evaluation.
  """
  x = draw(0)
  ours, theirs = BatchNorm(), nn.BatchNorm(momentum=0.9, epsilon=1e-5)
  initial = ours.init(jax.random.key(1), x, train=True)
  expected = theirs.init(jax.random.key(1), x, use_running_average=False)
  jax.tree.map(np.testing.assert_array_equal, initial, dict(expected))
  v = variables(1)
  y, new = ours.apply(v, x, train=True, mutable='batch_stats')
  z, expected = theirs.apply(v, x, use_running_average=False, mutable='batch_stats')
  np.testing.assert_allclose(y, z, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new, dict(expected))
  y = ours.apply(v, x, train=False)
  np.testing.assert_allclose(y, theirs.apply(v, x, use_running_average=True), atol=1e-5)


@pytest.mark.parametrize('unbiased', [False, True])
@pytest.mark.parametrize('shape', [SHAPE, (12, 5)], ids=['images', 'vectors'])
@pytest.mark.parametrize('layout', list(ROWS))
def test_groups_against_numpy(layout, shape, unbiased):
  """Breaks if rows are in the wrong group, the running statistics are not the mean over the groups, or
  the variance is unbiased where it must not be, or with another count.
  """
  x, v = draw(2, shape), variables(3)
  norm = BatchNorm(groups=3, layout=layout, unbiased=unbiased)
  y, new = norm.apply(v, x, train=True, mutable='batch_stats')
  p, old, axes = v['params'], v['batch_stats'], tuple(range(len(shape) - 1))
  means, variances = [], []
  for rows in ROWS[layout]:
    part = x[rows].astype(np.float64)
    normalised = (part - part.mean(axes)) / np.sqrt(part.var(axes) + 1e-5)
    np.testing.assert_allclose(y[np.array(rows)], normalised * p['scale'] + p['bias'], atol=1e-5)
    means.append(part.mean(axes))
    variances.append(part.var(axes, ddof=int(unbiased)))
  stats = new['batch_stats']
  np.testing.assert_allclose(stats['mean'], 0.9 * old['mean'] + 0.1 * np.mean(means, 0), rtol=1e-5)
  np.testing.assert_allclose(
    stats['var'], 0.9 * old['var'] + 0.1 * np.mean(variances, 0), rtol=1e-5
  )


@pytest.mark.parametrize('layout', list(ROWS))
def test_gradient_with_groups(layout):
  """Breaks if a gradient crosses groups, or does not pass through the batch statistics."""
  x, v, weight = draw(4), variables(5), draw(6)
  norm = BatchNorm(groups=3, layout=layout)
  one_group = nn.BatchNorm(momentum=0.9, epsilon=1e-5)

  def ours(params, x):
    y, _ = norm.apply({**v, 'params': params}, x, train=True, mutable='batch_stats')
    return jnp.sum(y * weight)

  def theirs(params, x):
    total = 0.0
    for rows in map(np.array, ROWS[layout]):
      y, _ = one_group.apply(
        {**v, 'params': params}, x[rows], use_running_average=False, mutable='batch_stats'
      )
      total += jnp.sum(y * weight[rows])
    return total

  gradients, expected = (jax.grad(f, (0, 1))(v['params'], x) for f in (ours, theirs))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, expected
  )


@pytest.mark.parametrize('groups, communicates', [(1, True), (4, True), (8, False), (16, False)])
def test_groups_within_devices_do_not_communicate(groups, communicates):
  """Breaks if BatchNorm communicates between 8 devices although each group is on one device.

  With 1 and 4 groups it must communicate: this shows that the pattern matches the compiler's collectives.
  """
  mesh = sharding.make_mesh(jax.devices()[:8])
  norm, v = BatchNorm(groups), variables(7)

  def forward_and_back(x):
    y, vjp = jax.vjp(lambda x: norm.apply(v, x, train=True, mutable='batch_stats')[0], x)
    return y, vjp(y**2)[0]

  by_row = NamedSharding(mesh, P('data'))
  f = jax.jit(forward_and_back, in_shardings=by_row, out_shardings=by_row)
  program = f.lower(jax.ShapeDtypeStruct((32, 4, 4, 5), jnp.float32)).compile().as_text()
  collectives = r'all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter'
  assert bool(re.search(collectives, program)) == communicates


def test_invalid_groups_are_refused():
  """Breaks if a batch that is not divisible by the groups, or a misspelt layout, is accepted."""
  with pytest.raises(ValueError, match='a batch of 10 does not split into 3 groups'):
    BatchNorm(3).apply(variables(8), jnp.zeros((10, 5)), train=True, mutable='batch_stats')
  with pytest.raises(ValueError, match="layout 'striped'"):
    BatchNorm(layout='striped').apply(variables(8), jnp.zeros((12, 5)), train=False)
