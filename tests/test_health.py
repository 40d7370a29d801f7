"""The health figures against numpy, and the sentences in the situations they describe."""

import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import config, diagnostics, health


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_figures_equal_their_definitions():
  """Breaks if the diagonal counts in uniformity, or the rank is taken of a centred matrix."""
  rng = np.random.default_rng(0)
  z = unit(rng.normal(size=(40, 2, 6)))
  found = health.embedding_metrics(jnp.asarray(z, jnp.float32))
  first = z[:, 0]
  pairs = [np.exp(-2 * np.sum((a - b) ** 2)) for i, a in enumerate(first) for b in first[:i]]
  np.testing.assert_allclose(found['uniformity'], np.log(np.mean(pairs)), rtol=1e-5)
  np.testing.assert_allclose(
    found['alignment'], np.mean(np.sum((z[:, 0] - z[:, 1]) ** 2, axis=1)), rtol=1e-5
  )
  np.testing.assert_allclose(found['z_std'], first.std(axis=0).mean() * np.sqrt(6), rtol=1e-5)
  share = np.linalg.svd(first, compute_uv=False)
  share = share / share.sum() + 1e-7
  np.testing.assert_allclose(found['rank'], np.exp(-np.sum(share * np.log(share))), rtol=1e-4)


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_rank_counts_directions(rank):
  """Breaks if unused directions count."""
  z = np.zeros((64, 1, 16), np.float32)
  z[np.arange(64), 0, np.arange(64) % rank] = 1
  found = health.embedding_metrics(jnp.asarray(z))
  np.testing.assert_allclose(found['rank'], rank, rtol=1e-3)
  assert 'alignment' not in found  # of one view there is none


def test_spread_from_collapse_to_even():
  """Breaks if collapse does not read 0 and an even sphere not 1."""
  even = unit(np.random.default_rng(0).normal(size=(1000, 1, 32)))
  assert abs(health.embedding_metrics(jnp.asarray(even, jnp.float32))['z_std'] - 1) < 0.02
  one_point = jnp.broadcast_to(even[:1], even.shape).astype(jnp.float32)
  found = health.embedding_metrics(one_point)
  assert found['z_std'] < 1e-3 and abs(found['uniformity']) < 1e-5 and found['rank'] < 1.01


def recipe(spec='moco_cifar10', examples=50_000, **changes):
  changes = {k.replace('__', '.'): v for k, v in changes.items()}
  return config.with_examples(config.load(spec, changes), examples)


FINE = {'loss': 5.0, 'chance_loss': 8.3, 'z_std': 0.9, 'rank': 60.0, 'queue_filled': 1.0}
CASES = {
  # The last record of a run often lacks the figures of the embeddings.
  'collapse': (recipe(), [{**FINE, 'step': 500, 'z_std': 0.01}, {'step': 507, 'loss': 5.0}]),
  'not_finite': (recipe(), [{**FINE, 'step': 500}, {'step': 501, 'loss': None, 'z_std': None}]),
  'data_wait': (
    recipe(),
    [{**FINE, 'step': s, 'data_wait': 0.0 if s < 3 else 0.4} for s in range(9)],
  ),
  'stuck': (recipe(), [{**FINE, 'step': s, 'loss': 8.3} for s in range(100, 500, 100)]),
  'queue_filling': (recipe(), [{**FINE, 'step': 5, 'queue_filled': 0.5}]),
  'queue_norm': (recipe(), [{**FINE, 'step': 5, 'queue_norm': 0.5}]),
  'first_loss': (recipe('moco_imagenet:v2', 1_281_167), [{**FINE, 'step': 1, 'loss': 11.0}]),
  'queue_size': (recipe(examples=2000), []),
  'stem': (recipe(model__stem='imagenet'), []),
  'bn_groups': (recipe(model__bn_groups='1'), []),
}


@pytest.mark.parametrize('name', CASES)
def test_each_finding(name):
  """Breaks if a situation is not named, or another one is."""
  found = diagnostics.findings(*CASES[name])
  assert list(found) == [name] and len(found[name]) > 40


def test_keys_an_epoch():
  """Breaks if a queue that one epoch fills is called too large: symmetric MoCo makes 2 keys an image."""
  assert 'queue_size' in diagnostics.findings(recipe(examples=3000), [])
  assert not diagnostics.findings(recipe('moco_cifar10:symmetric', examples=3000), [])


@pytest.mark.parametrize(
  'records',
  [
    [],
    [{**FINE, 'step': 500}],
    [{'step': 10, 'knn_acc': 0.3}],
    [{**FINE, 'step': 20, 'z_std': 0.01, 'rank': 1.5}],  # a fresh network
    [{**FINE, 'step': 150, 'loss': 8.3}],  # not yet
    [{**FINE, 'step': s, 'loss': 8.3} for s in (100, 200, 300)] + [{**FINE, 'step': 400}],
  ],
)
def test_nothing_is_said_of_a_healthy_run(records):
  """Breaks if a normal run is called ill."""
  assert diagnostics.findings(recipe(), records) == {}
