"""Data parallelism: same results on one device and on eight, and only the expected communication."""

import collections
import re

import jax
import numpy as np
import pytest
from conftest import TINY

from simclr_jax import config, data, sharding, train_state
from simclr_jax.data import augment, order

VIEW = 'simclr_crop(0.2, 1) | simclr_jitter(1, p=0.8) | grayscale(p=0.5) | simclr_blur(p=0.5)'


@pytest.fixture(scope='module')
def recipe():
  """A small recipe with all augmentations of SimCLR."""
  return config.load('simclr_digits', {**TINY, 'augment.view1': VIEW, 'learning_rate': '0.001'})


@pytest.fixture(scope='module')
def train(recipe):
  """The training images."""
  return data.load(recipe.data, 'train')


@pytest.fixture(scope='module')
def runs(recipe, train):
  """Ten steps on 1 and on 8 devices: {devices: (metrics, final state, step, state on devices)}."""
  results = {}
  for devices in (1, 8):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    state, step = train_state.build(recipe, train, mesh)
    all_metrics = []
    for i in range(10):
      state, metrics = step(state, i)
      all_metrics.append({k: float(v) for k, v in metrics.items()})
    results[devices] = all_metrics, jax.device_get(state), step, state
  return results


def test_losses_do_not_depend_on_the_number_of_devices(runs):
  """Breaks if augmentation, BatchNorm, negatives or gradients depend on the number of devices."""
  one, eight = (
    np.array([[m['loss'], m['contrastive_acc'], m['contrastive_acc_n']] for m in runs[d][0]])
    for d in (1, 8)
  )
  np.testing.assert_allclose(eight[:, 0], one[:, 0], rtol=1e-5)
  np.testing.assert_allclose(eight, one, rtol=1e-5)
  assert len(set(one[:, 0])) == 10


def test_views_do_not_depend_on_the_number_of_devices(recipe, train):
  """Breaks if an augmentation depends on the device or on the position in the device's part of the
  batch.
  """
  rows = order.rows(recipe.seed, 3, recipe.batch_size, len(train))
  views = []
  for devices in (1, 8):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    batch = sharding.put_batch(mesh, {'images': train.images[rows['index']], **rows})
    draw = jax.jit(
      lambda b: augment.views(
        b['images'],
        b['epoch'],
        b['position'],
        augment.pipelines(recipe.augment, 2),
        recipe.seed,
        recipe.image_size,
      )
    )
    views.append(np.asarray(draw(batch)))
  # With other vector lengths, rounding differs.
  np.testing.assert_allclose(views[1], views[0], atol=2e-6)


def test_batch_norm_statistics_are_of_the_global_batch(runs):
  """Breaks if BatchNorm uses the statistics of each device's part of the batch."""
  one, eight = runs[1][1].state, runs[8][1].state
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eight, one)


def test_state_is_replicated(runs):
  """Breaks if an array of the state is on one device or sharded."""
  for leaf in jax.tree.leaves(runs[8][3]):
    assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8


def test_collectives_of_the_compiled_step(runs, recipe):
  """Breaks if images are moved between devices, or the embeddings are gathered more than once."""
  _, _, step, state = runs[8]
  program = step.lower(state, 0).compile().as_text()
  kinds = r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast'
  collectives = re.findall(rf'= \(?(\w+\[[\d,]*\]).*? ({kinds})(?:-start)?\(', program)
  count = collections.Counter(kind for _, kind in collectives)
  assert set(count) == {'all-gather', 'all-reduce'}, count
  assert count['all-gather'] == 1
  gathered = next(shape for shape, kind in collectives if kind == 'all-gather')
  assert gathered == f'f32[{2 * recipe.batch_size},{recipe.model.head_dim}]'
