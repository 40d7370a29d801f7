"""NT-Xent in blocks: the loss, gradient and metrics of the whole matrix, and of float64; memory; collectives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import blockwise, losses, sharding
from simclr_jax.losses import l2_normalize


def pairs(n, d=16, noise=0.8):
  """Projections `[2n, d]`; the views of an image are near each other."""
  z = np.random.default_rng(0).normal(size=(n, 2, d))
  z[:, 1] = z[:, 0] + noise * z[:, 1]
  return z.reshape(2 * n, d).astype(np.float32)


def memory_of(k, d=16):
  return np.asarray(l2_normalize(np.random.default_rng(1).normal(size=(k, d)).astype(np.float32)))


def float64(z, temperature, normalize=True, memory=None):
  """Loss, gradient, and the two accuracies of NT-Xent, from its definition."""
  z = np.asarray(z, np.float64)
  norm = np.linalg.norm(z, axis=1, keepdims=True) if normalize else np.ones((len(z), 1))
  u, row = z / norm, np.arange(len(z))
  columns = u if memory is None else np.concatenate([u, np.asarray(memory, np.float64)])
  s = u @ columns.T / temperature
  s[row, row] = -np.inf
  log_denominator = np.log(np.exp(s - s.max(1, keepdims=True)).sum(1)) + s.max(1)
  g = np.exp(s - log_denominator[:, None])
  g[row, row ^ 1] -= 1
  d_u = (g @ columns + g[:, : len(z)].T @ u) / (len(z) * temperature)
  gradient = (d_u - normalize * (d_u * u).sum(1, keepdims=True) * u) / norm
  accuracy = np.mean(s.argmax(1) == row ^ 1)
  accuracy_n = np.mean(s[0::2, 1 : len(z) : 2].argmax(1) == row[: len(z) // 2])
  return np.mean(log_denominator - s[row, row ^ 1]), gradient, accuracy, accuracy_n


def loss_and_gradient(monkeypatch, block, z, *args, **kwargs):
  """Of `losses.nt_xent`, with blocks of this many rows; 0: the whole matrix."""
  monkeypatch.setattr(blockwise, 'block_rows', lambda *_: block)
  f = jax.jit(jax.value_and_grad(lambda z: losses.nt_xent(z, *args, **kwargs), has_aux=True))
  (value, metrics), gradient = f(z)
  return value, gradient, metrics


def error(a, b):
  """The relative error of `a`, of all its entries together."""
  return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


CASES = [(4, 3, 0), (4, 8, 5), (100, 7, 0), (100, 64, 33), (100, 500, 0)]
LARGE = pytest.param(4096, 1000, 0, marks=pytest.mark.slow)


@pytest.mark.parametrize('normalize', [True, False])
@pytest.mark.parametrize(('n', 'block', 'k'), [*CASES, LARGE])
def test_blocks_give_the_loss_of_the_whole_matrix(monkeypatch, n, block, k, normalize):
  """Breaks if a block lacks a negative or the term of the candidates in the gradient, the last block, which is
  shorter, counts rows that do not exist, or the memory gets another weight.
  """
  z, memory = pairs(n), memory_of(k) if k else None
  if not normalize:
    z = 0.3 * z
  dense, blocks = (loss_and_gradient(monkeypatch, b, z, 0.5, normalize, memory) for b in (0, block))
  expected = float64(z, 0.5, normalize, memory)
  for value, gradient, metrics in (dense, blocks):
    assert abs(value - expected[0]) < 1e-6 * expected[0]
    assert error(gradient, expected[1]) < 1e-6
    accuracies = (metrics['contrastive_acc'], metrics['contrastive_acc_n'])
    np.testing.assert_allclose(accuracies, expected[2:], atol=1e-6)
  assert 0 < expected[2] <= expected[3]
  assert error(blocks[1], np.asarray(dense[1])) < 1e-6
  assert blocks[2].keys() == dense[2].keys()
  assert blocks[2]['chance_loss'] == dense[2]['chance_loss']


@pytest.mark.parametrize('block', [0, 3])
def test_ties_are_those_of_argmax(monkeypatch, block):
  """Breaks if collapsed projections, whose similarities are all equal, count as hits: only the first candidate does."""
  _, _, metrics = loss_and_gradient(monkeypatch, block, np.ones((8, 4), np.float32), 0.1)
  # Candidate 0 is the first maximum, of row 0 candidate 1; of the second views, candidate 1.
  np.testing.assert_allclose(metrics['contrastive_acc'], 2 / 8)
  np.testing.assert_allclose(metrics['contrastive_acc_n'], 1 / 4)


def test_low_temperature_and_zero_rows(monkeypatch):
  """Breaks if blocks overflow at a low temperature, or projections of all zeros make the gradient NaN."""
  z = pairs(20)
  value, gradient, _ = loss_and_gradient(monkeypatch, 7, z, 0.02)
  assert abs(value - float64(z, 0.02)[0]) < 1e-6 and error(gradient, float64(z, 0.02)[1]) < 5e-6
  zeros = jnp.zeros((8, 4)).at[0].set(1.0)
  assert np.isfinite(loss_and_gradient(monkeypatch, 3, zeros, 0.1)[1]).all()


def on_eight_devices(monkeypatch, block):
  """The compiled loss and gradient of 24 rows on each of eight devices, and its arguments."""
  monkeypatch.setattr(blockwise, 'block_rows', lambda *_: block)
  mesh = sharding.make_mesh(jax.devices()[:8])
  by_row, replicated = jax.NamedSharding(mesh, jax.P('data')), jax.NamedSharding(mesh, jax.P())
  arguments = jax.device_put(pairs(96), by_row), jax.device_put(memory_of(33), replicated)

  def loss(z, memory):
    value, metrics = losses.nt_xent(z, 0.2, negatives=memory)
    return value, {k: v for k, v in metrics.items() if k != 'z'}

  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), out_shardings=(replicated, by_row))
  with jax.set_mesh(mesh):
    return gradient.lower(*arguments).compile(), arguments


def test_rows_on_eight_devices(monkeypatch):
  """Breaks if a device has only its own rows as candidates, or takes its rows for the first ones."""
  program, arguments = on_eight_devices(monkeypatch, 7)
  (value, metrics), gradient = program(*arguments)
  expected = float64(pairs(96), 0.2, memory=memory_of(33))
  assert abs(value - expected[0]) < 1e-6 * expected[0] and error(gradient, expected[1]) < 1e-6
  accuracies = (metrics['contrastive_acc'], metrics['contrastive_acc_n'])
  np.testing.assert_allclose(accuracies, expected[2:], atol=1e-6)


@pytest.mark.parametrize('block', [0, 7])
def test_collectives(monkeypatch, block):
  """Breaks if embeddings are gathered more than once, or a block is communicated: the gradient of the candidates is
  summed once.
  """
  program, _ = on_eight_devices(monkeypatch, block)
  kinds = r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast'
  found = re.findall(rf'= (.*?) ({kinds})(?:-start)?\(', program.as_text())
  moved = [(kind, x) for shapes, kind in found for x in re.findall(r'\w+\[\d+,.*?\]', shapes)]
  assert sorted(moved) == [('all-gather', 'f32[192,16]'), ('all-reduce', 'f32[192,16]')]
  assert {kind for _, kind in found} == {'all-gather', 'all-reduce'}


def temporaries(rows):
  """Bytes of temporaries of loss and gradient of projections `[rows, 128]`, by the compiler's count."""
  z = jax.ShapeDtypeStruct((rows, 128), np.float32)
  program = jax.jit(jax.grad(lambda z: losses.nt_xent(z, 0.1)[0])).lower(z).compile()
  return program.memory_analysis().temp_size_in_bytes


def test_memory_is_that_of_a_block():
  """Breaks if a matrix `[2n, 2n]` is allocated where blocks are due, in the forward or in the backward pass."""
  assert temporaries(32_768) < 200 * 2**20  # the matrix has 4 GiB
  assert temporaries(131_072) < 600 * 2**20  # the matrix has 64 GiB; [2n, 128] has 64 MiB


def test_blocks_are_chosen_by_the_memory_of_a_device():
  """Breaks if a small batch is computed in blocks, more devices need more blocks, or a memory is not counted."""
  assert blockwise.block_rows(8192, 8192, 1) == 0
  assert blockwise.block_rows(16_384, 16_384, 1) == 512
  assert blockwise.block_rows(16_384, 16_384, 8) == 0
  assert blockwise.block_rows(8192, 8192 + 65_536, 1) == 113
  assert blockwise.block_rows(4, 2**30, 1) == 1
