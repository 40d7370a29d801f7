"""Layers compared with flax's, and kernel gradients compared with sums in float64."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.models.layers import Conv, Dense, kernel_gradient, relu


def loop_kernel_gradient(x, dy, size, stride, before):
  """The gradient of a kernel as a sum over its positions, in float64; `before`: zeros above and on the left."""
  x = np.pad(np.float64(x), ((0, 0), *((zeros, size) for zeros in before), (0, 0)))
  rows, columns = dy.shape[1:3]
  grad = np.zeros((size, size, x.shape[-1], dy.shape[-1]))
  for i in range(size):
    for j in range(size):
      patch = x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
      grad[i, j] = np.einsum('nhwc,nhwd->cd', patch, np.float64(dy))
  return grad


@pytest.mark.parametrize(
  'size, stride, sides, padding, before',
  [
    (3, 1, (8, 6), 'symmetric', (1, 1)),
    (3, 2, (7, 8), 'symmetric', (1, 1)),
    (1, 2, (6, 5), 'symmetric', (0, 0)),
    (7, 2, (9, 10), 'symmetric', (3, 3)),
    (3, 1, (8, 7), 'same', (1, 1)),
    (3, 2, (7, 8), 'same', (1, 0)),
    (1, 2, (6, 5), 'same', (0, 0)),
    (7, 2, (9, 10), 'same', (3, 2)),
  ],
)
def test_kernel_gradient(size, stride, sides, padding, before):
  """Breaks if the matrix product that TPUs use differs from the kernel gradient, rounds to bfloat16, or ignores the
  padding.
  """
  rng = np.random.default_rng(0)
  layer = Conv(5, size, stride, dtype=jnp.bfloat16, padding=padding)
  x = jnp.asarray(rng.normal(size=(4, *sides, 3)), jnp.bfloat16)
  variables = layer.init(jax.random.key(0), x)
  y, vjp = jax.vjp(lambda v: layer.apply(v, x), variables)
  dy = jnp.asarray(rng.normal(size=y.shape), jnp.bfloat16)
  expected = loop_kernel_gradient(x, dy, size, stride, before)
  exact = kernel_gradient(x, dy, size, stride, padding)
  for grad in (exact, vjp(dy)[0]['params']['kernel']):
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('platform, dtype', [('tpu', 'f32'), ('cpu', 'f32'), ('cuda', 'bf16')])
def test_dtype_of_gradients_on_each_platform(platform, dtype):
  """Breaks if TPUs round the gradients of kernels and biases, or GPUs get a convolution that cuDNN
  does not support.
  """
  layer = Conv(5, 3, use_bias=True, dtype=jnp.bfloat16)
  x = jnp.zeros((4, 8, 8, 3), jnp.bfloat16)
  gradient = jax.jit(jax.grad(lambda v: layer.apply(v, x).astype(jnp.float32).sum()))
  traced = gradient.trace(layer.init(jax.random.key(0), x))
  program = traced.lower(lowering_platforms=(platform,)).as_text()
  results = re.findall(r'stablehlo.convolution.* -> tensor<3x3x3x5x(\w+)>', program)
  assert results == [dtype]
  assert set(re.findall(r'stablehlo.reduce.* -> tensor<5x(\w+)>', program)) == {'f32'}


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('ours, theirs, shape', [
  (
    Conv(6, 3, 2, use_bias=True),
    nn.Conv(6, (3, 3), (2, 2), padding=[(1, 1)] * 2),
    (2, 8, 8, 4),
  ),
  (Dense(6), nn.Dense(6), (8, 4)),
])  # fmt: skip
def test_against_flax(ours, theirs, shape, dtype):
  """Breaks if initial parameters, outputs or gradients differ."""
  ours, theirs = ours.clone(dtype=dtype), theirs.clone(dtype=dtype)
  x = jax.random.normal(jax.random.key(1), shape, dtype)

  def run(layer):
    variables = layer.init(jax.random.key(0), x)
    y, vjp = jax.vjp(layer.apply, variables, x)
    return variables, y, vjp(jnp.cos(y))

  for x, y in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs)), strict=True):
    assert x.dtype == y.dtype
    tolerance = 2**-7 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('sides', [(8, 10), (9, 7), (8, 7)])
@pytest.mark.parametrize('size, stride', [(7, 2), (3, 2), (3, 1), (1, 2)])
def test_same_padding_against_flax(size, stride, sides):
  """Breaks if outputs or gradients differ from flax's SAME, for even or odd sizes."""
  x = jax.random.normal(jax.random.key(1), (2, *sides, 4))
  theirs = nn.Conv(6, (size, size), (stride, stride), padding='SAME', use_bias=False)
  variables = theirs.init(jax.random.key(0), x)
  ours = Conv(6, size, stride, padding='same')

  def run(layer):
    y, vjp = jax.vjp(layer.apply, variables, x)
    return y, vjp(jnp.cos(y))

  for a, b in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_dense_kernel_gradient_is_float32():
  """Breaks if the gradient of a dense kernel is rounded to bfloat16."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(64, 7)), jnp.bfloat16)
  dy = jnp.asarray(rng.normal(size=(64, 5)), jnp.bfloat16)
  layer = Dense(5, use_bias=False, dtype=jnp.bfloat16)
  _, vjp = jax.vjp(lambda v: layer.apply(v, x), layer.init(jax.random.key(0), x))
  expected = np.float64(x).T @ np.float64(dy)
  np.testing.assert_allclose(vjp(dy)[0]['params']['kernel'], expected, rtol=1e-5, atol=1e-5)


def test_relu_equals_that_of_flax():
  """Breaks if the gradient at 0 is not 0, or a value changes."""
  x = jnp.array([-1.0, 0.0, 2.0])
  for ours, flax in zip(jax.vjp(relu, x)[1](x + 3), jax.vjp(nn.relu, x)[1](x + 3)):
    np.testing.assert_array_equal(ours, flax)
  np.testing.assert_array_equal(relu(x), nn.relu(x))
