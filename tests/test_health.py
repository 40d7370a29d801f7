"""The metrics of embeddings compared with numpy, and the diagnostics of runs with each problem."""

import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import config, diagnostics, health


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_embedding_metrics_against_numpy():
  """Breaks if uniformity includes the diagonal, or the rank is that of a centred matrix."""
  rng = np.random.default_rng(0)
  z = unit(rng.normal(size=(40, 2, 6)))
  metrics = health.embedding_metrics(jnp.asarray(z, jnp.float32))
  first = z[:, 0]
  pairs = [np.exp(-2 * np.sum((a - b) ** 2)) for i, a in enumerate(first) for b in first[:i]]
  np.testing.assert_allclose(metrics['uniformity'], np.log(np.mean(pairs)), rtol=1e-5)
  np.testing.assert_allclose(
    metrics['alignment'], np.mean(np.sum((z[:, 0] - z[:, 1]) ** 2, axis=1)), rtol=1e-5
  )
  np.testing.assert_allclose(metrics['z_std'], first.std(axis=0).mean() * np.sqrt(6), rtol=1e-5)
  share = np.linalg.svd(first, compute_uv=False)
  share = share / share.sum() + 1e-7
  np.testing.assert_allclose(metrics['rank'], np.exp(-np.sum(share * np.log(share))), rtol=1e-4)


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_rank_is_the_number_of_directions(rank):
  """Breaks if dimensions that no embedding uses increase the rank."""
  z = np.zeros((64, 1, 16), np.float32)
  z[np.arange(64), 0, np.arange(64) % rank] = 1
  metrics = health.embedding_metrics(jnp.asarray(z))
  np.testing.assert_allclose(metrics['rank'], rank, rtol=1e-3)
  assert 'alignment' not in metrics  # needs two views


def test_z_std_of_collapsed_and_uniform_embeddings():
  """Breaks if z_std is not 0 for collapsed embeddings, or not 1 for uniform ones."""
  uniform = unit(np.random.default_rng(0).normal(size=(1000, 1, 32)))
  assert abs(health.embedding_metrics(jnp.asarray(uniform, jnp.float32))['z_std'] - 1) < 0.02
  one_point = jnp.broadcast_to(uniform[:1], uniform.shape).astype(jnp.float32)
  collapsed = health.embedding_metrics(one_point)
  assert collapsed['z_std'] < 1e-3
  assert abs(collapsed['uniformity']) < 1e-5 and collapsed['rank'] < 1.01


def recipe(spec='moco_cifar10', examples=50_000, **changes):
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  return config.with_examples(config.load(spec, changes), examples)


HEALTHY = {'loss': 5.0, 'chance_loss': 8.3, 'z_std': 0.9, 'rank': 60.0, 'queue_filled': 1.0}
CASES = {
  # The last record of a run often lacks the metrics of the embeddings.
  'collapse': (recipe(), [{**HEALTHY, 'step': 500, 'z_std': 0.01}, {'step': 507, 'loss': 5.0}]),
  'not_finite': (recipe(), [{**HEALTHY, 'step': 500}, {'step': 501, 'loss': None, 'z_std': None}]),
  'data_wait': (
    recipe(),
    [{**HEALTHY, 'step': s, 'data_wait': 0.0 if s < 3 else 0.4} for s in range(9)],
  ),
  'stuck': (recipe(), [{**HEALTHY, 'step': s, 'loss': 8.3} for s in range(100, 500, 100)]),
  'queue_filling': (recipe(), [{**HEALTHY, 'step': 5, 'queue_filled': 0.5}]),
  'queue_norm': (recipe(), [{**HEALTHY, 'step': 5, 'queue_norm': 0.5}]),
  'first_loss': (recipe('moco_imagenet:v2', 1_281_167), [{**HEALTHY, 'step': 1, 'loss': 11.0}]),
  'queue_size': (recipe(examples=2000), []),
  'stem': (recipe(model__stem='imagenet'), []),
  'bn_groups': (recipe(model__bn_groups='1'), []),
}


@pytest.mark.parametrize('name', CASES)
def test_each_problem_is_detected(name):
  """Breaks if a problem is not detected, or another one is reported."""
  findings = diagnostics.findings(*CASES[name])
  assert list(findings) == [name] and len(findings[name]) > 40


def test_queue_size_is_compared_with_keys_per_epoch():
  """Breaks if a queue that one epoch fills is reported as too large: symmetric MoCo adds 2 keys per
  image.
  """
  assert 'queue_size' in diagnostics.findings(recipe(examples=3000), [])
  assert not diagnostics.findings(recipe('moco_cifar10:symmetric', examples=3000), [])


@pytest.mark.parametrize(
  'records',
  [
    [],
    [{**HEALTHY, 'step': 500}],
    [{'step': 10, 'knn_acc': 0.3}],
    [{**HEALTHY, 'step': 20, 'z_std': 0.01, 'rank': 1.5}],  # an untrained network
    [{**HEALTHY, 'step': 150, 'loss': 8.3}],  # too early to report
    [{**HEALTHY, 'step': s, 'loss': 8.3} for s in (100, 200, 300)] + [{**HEALTHY, 'step': 400}],
  ],
)
def test_no_problems_in_a_healthy_run(records):
  """Breaks if a problem is reported for a normal run."""
  assert diagnostics.findings(recipe(), records) == {}
