"""One device and eight give the same training; the step talks between devices no more than stated."""

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
  return config.load('simclr_digits', {**TINY, 'augment.view1': VIEW, 'learning_rate': '0.001'})


@pytest.fixture(scope='module')
def train(recipe):
  return data.load(recipe.data, 'train')


@pytest.fixture(scope='module')
def runs(recipe, train):
  """Ten steps on 1 and on 8 devices: {devices: (losses, final state)}."""
  found = {}
  for devices in (1, 8):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    state, step = train_state.build(recipe, train, mesh)
    losses = []
    for i in range(10):
      state, metrics = step(state, i)
      losses.append({k: float(v) for k, v in metrics.items()})
    found[devices] = losses, jax.device_get(state), step, state
  return found


def test_loss_curve_is_the_same(runs):
  """Breaks if augmentation, BatchNorm, negatives or gradients depend on the number of devices."""
  one, eight = (
    np.array([[m['loss'], m['contrastive_acc'], m['contrastive_acc_n']] for m in runs[d][0]])
    for d in (1, 8)
  )
  np.testing.assert_allclose(eight[:, 0], one[:, 0], rtol=1e-5)
  np.testing.assert_allclose(eight, one, rtol=1e-5)
  assert len(set(one[:, 0])) == 10


def test_pixels_are_the_same(recipe, train):
  """Breaks if an augmentation depends on the device or on the place in the device's batch."""
  rows = order.rows(recipe.seed, 3, recipe.batch_size, len(train))
  found = []
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
    found.append(np.asarray(draw(batch)))
  np.testing.assert_allclose(
    found[1], found[0], atol=2e-6
  )  # another vector length, another rounding


def test_batch_norm_statistics_are_the_same(runs):
  """Breaks if BatchNorm sees a device's part of the batch only."""
  one, eight = runs[1][1].state, runs[8][1].state
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), eight, one)


def test_parameters_are_replicated(runs):
  """Breaks if a leaf of the state ends up on one device or split."""
  for leaf in jax.tree.leaves(runs[8][3]):
    assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8


def test_collectives_of_the_compiled_step(runs, recipe):
  """Breaks if images move between devices, or the embeddings are gathered more than once."""
  _, _, step, state = runs[8]
  text = step.lower(state, 0).compile().as_text()
  kinds = r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast'
  found = re.findall(rf'= \(?(\w+\[[\d,]*\]).*? ({kinds})(?:-start)?\(', text)
  count = collections.Counter(kind for _, kind in found)
  assert set(count) == {'all-gather', 'all-reduce'}, count
  assert count['all-gather'] == 1
  gathered = next(shape for shape, kind in found if kind == 'all-gather')
  assert gathered == f'f32[{2 * recipe.batch_size},{recipe.model.head_dim}]'
