"""Evaluations compared with scikit-learn and numpy; the encoder stays frozen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

from simclr_jax import config, encoder as encoders, losses, runs, sharding, train
from simclr_jax.data import Arrays, digits, labels as subsets, loader, order
from simclr_jax.evaluate import knn, lbfgs, logistic, metrics, probe
from simclr_jax.models import classifier, linear

ARCHITECTURE = config.architecture(config.load('simclr_digits', TINY))


@pytest.fixture(scope='module')
def encoder():
  return encoders.untrained(ARCHITECTURE)


@pytest.fixture(scope='module')
def data():
  train, test = digits.load(None, 'train'), digits.load(None, 'test')
  few = np.random.default_rng(0).permutation(len(train))[:600]
  return Arrays(train.images[few], train.labels[few]), Arrays(test.images[:200], test.labels[:200])


def blobs(n, seed):
  """Features and labels of 10 overlapping classes."""
  centres = np.random.default_rng(0).normal(size=(10, 24))
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 10, n)
  return (centres[labels] + 1.3 * rng.normal(size=(n, 24))).astype(np.float32), labels


@pytest.mark.parametrize('k', [1, 20, 200, 5000])
def test_knn_equals_scikit_learn(k):
  """Breaks if the similarity, the weights, k, or the blocks of queries change a prediction."""
  bank, labels = blobs(900, 1)
  queries, _ = blobs(333, 2)
  near = NearestNeighbors(n_neighbors=min(k, 900), metric='cosine').fit(bank.astype(np.float64))
  distance, index = near.kneighbors(queries.astype(np.float64))
  weight = np.exp((1 - distance) / 0.1)
  votes = np.zeros((333, 10))
  for i in range(333):
    np.add.at(votes[i], labels[index[i]], weight[i])
  np.testing.assert_array_equal(
    knn.predict(bank, labels, queries, k, 0.1, block=100), votes.argmax(1)
  )


def test_neighbours_are_sorted_by_similarity(monkeypatch):
  """Breaks if a block, a device or a padding row hides a neighbour, or ties are not in the order of
  the bank.
  """
  bank, _ = blobs(301, 1)
  bank[200] = bank[17]  # on another device
  queries, _ = blobs(33, 2)
  queries[0] = 3 * bank[17]
  unit = [
    np.float64(x) / np.linalg.norm(np.float64(x), axis=1, keepdims=True) for x in (queries, bank)
  ]
  expected = unit[0] @ unit[1].T
  for block, k in ((16, 1), (16, 25), (7, 301), (1000, 25)):
    monkeypatch.setattr(knn, 'BLOCK', block)
    similarity, index = knn.neighbours(bank, queries, k, block=10)
    np.testing.assert_allclose(similarity, -np.sort(-expected, 1)[:, :k], atol=1e-6)
    assert all(len(set(row)) == k for row in index)
    np.testing.assert_allclose(np.take_along_axis(expected, index, 1), similarity, atol=1e-6)
    if k > 1:
      assert list(index[0, :2]) == [17, 200]


def test_logistic_equals_scikit_learn_and_is_balanced():
  """Breaks if subsets are unbalanced, standardisation uses the test set, or draws are not seeded."""
  train, labels = blobs(900, 1)
  test, test_labels = blobs(300, 2)
  rows = logistic.label_efficiency(train, labels, test, test_labels, [1, 20], draws=3)
  assert [r['labels_per_class'] for r in rows] == [1, 20]
  scores = []
  for draw in range(3):
    subset = subsets.balanced_subset(labels, 20, draw)
    assert (np.bincount(labels[subset]) == 20).all() and len(set(subset)) == 200
    mean, std = train.mean(0), train.std(0)
    model = LogisticRegression(C=1 / 0.24, max_iter=1000, tol=1e-2)
    model.fit((train[subset] - mean) / std, labels[subset])
    scores.append(model.score((test - mean) / std, test_labels))
  np.testing.assert_allclose(rows[1]['mean'], np.mean(scores), atol=1e-3)
  np.testing.assert_allclose(rows[1]['std'], np.std(scores, ddof=1), atol=1e-3)
  assert rows == logistic.label_efficiency(train, labels, test, test_labels, [1, 20], draws=3)
  with pytest.raises(ValueError, match='fewer than 500'):
    logistic.label_efficiency(train, labels, test, test_labels, [500])


def test_logistic_with_fewer_examples_than_features():
  """Breaks if projecting the features on the span of the examples, to save time, changes the fit."""
  rng = np.random.default_rng(0)
  labels, test_labels = rng.integers(0, 3, 40), rng.integers(0, 3, 300)
  centres = rng.normal(size=(3, 100))
  x, test = (0.4 * centres[y] + rng.normal(size=(len(y), 100)) for y in (labels, test_labels))
  expected = LogisticRegression(max_iter=1000).fit(x, labels).score(test, test_labels)
  accuracy = logistic.accuracy(x, labels, test, test_labels, 1 / 100)
  assert abs(accuracy - expected) < 0.01


def test_features_do_not_depend_on_the_batch_size(encoder, data):
  """Breaks if padding, the batch size or the number of devices changes a feature."""
  images = data[0].images[:37]
  features = encoder(images, batch_size=64)
  assert features.shape == (37, 32) and features.dtype == np.float32
  np.testing.assert_allclose(encoder(images, batch_size=5), features, atol=1e-6)
  forward = classifier.forward(ARCHITECTURE)
  expected = forward(encoder.variables, jnp.asarray(images, jnp.float32) / 255)
  np.testing.assert_allclose(features, expected, atol=1e-5)
  with pytest.raises(ValueError, match='no images'):
    encoder(images[:0])


def test_features_of_another_image_size(encoder):
  """Breaks if images of another size than the recipe's are refused."""
  assert encoder(np.zeros((3, 50, 41, 3), np.uint8)).shape == (3, 32)


@pytest.mark.parametrize('cached', [True, False])
@pytest.mark.parametrize('protocol', ['simclr', 'moco'])
def test_linear_probe(encoder, data, protocol, cached):
  """Breaks if the probe does not learn, or the weights or BatchNorm statistics of the encoder
  change.
  """
  before = jax.tree.map(np.array, encoder.variables)
  steps, rate = [], {'simclr': 1.0, 'moco': 20.0}[protocol]

  def run(rates, **options):
    settings = probe.Settings(4, 100, rates, cached)
    return probe.train_linear(encoder, *data, probe.PROTOCOLS[protocol], settings, **options)

  result = run((rate,), progress=lambda step, total, loss: steps.append((step, total, loss)))
  jax.tree.map(np.testing.assert_array_equal, encoder.variables, before)
  assert steps[0][2] == pytest.approx(np.log(10), rel=0.02)  # chance: it starts close to zero
  assert steps[-1][:2] == (24, 24) and steps[-1][2] < steps[0][2]
  assert 0 <= result['top1'] <= result['top5'] <= 1 and result['images'] == 200
  if cached:
    head, again = result.pop('classifier'), run((rate,))
    jax.tree.map(np.testing.assert_array_equal, again.pop('classifier'), head)
    assert again == result
    swept = run((1e-4, rate, 1e30))  # the last one gives NaN
    scores = swept['held_out']
    # The final classifier is trained on all images.
    assert swept['train_images'] == 600 and len(set(scores.values())) > 1
    assert scores[str(swept['learning_rate'])] == max(scores.values())


@pytest.mark.parametrize('devices', [1, 8])
def test_uncached_probe_trains_on_frozen_features(encoder, data, devices):
  """Breaks if the encoder is not in evaluation mode while a probe trains on augmented images.

  The first gradient is compared, in float64, with that of the features which `Encoder` computes for the same crops. The
  BatchNorm statistics are unlike those of any batch, so that training mode gives other features.
  """
  rng = np.random.default_rng(0)
  stats = jax.tree.map(lambda x: rng.uniform(0.5, 2, x.shape), encoder.variables['batch_stats'])
  frozen = dataclasses.replace(encoder, variables={**encoder.variables, 'batch_stats': stats})
  flipped = dataclasses.replace(probe.PROTOCOLS['simclr'], pipeline='resize | flip(p=1)')
  settings, mesh = probe.Settings(seed=3), sharding.make_mesh(jax.devices()[:devices])
  n, rates = 64, (256.0 / 64, 2 * 256.0 / 64)  # the steps are the gradient, and twice the gradient
  step = probe.training_step(frozen, flipped, optax.sgd(1.0), rates, n, settings, mesh)
  kernel = np.float32(rng.normal(size=(2, 32, 10)))
  heads = {'kernel': kernel, 'bias': jnp.zeros((2, 10))}
  batches = loader.for_training(data[0], 3, n, (flipped.pipeline,), 32, mesh)
  state = sharding.put_replicated(mesh, (heads, optax.sgd(1.0).init(heads)))
  variables = sharding.put_replicated(mesh, frozen.variables)
  (new, _), _ = step(state, variables, batches.constants, batches(0))
  batches.close()

  index = order.rows(3, 0, n, len(data[0]))['index']
  h = np.float64(frozen(data[0].images[index][:, :, ::-1]))  # the crops are the flipped images
  y = np.eye(10)[data[0].labels[index]]
  for i, factor in enumerate((1, 2)):
    z = h @ np.float64(kernel[i])
    p = np.exp(z - z.max(1, keepdims=True))
    expected = factor * h.T @ (p / p.sum(1, keepdims=True) - y) / n
    moved = np.float64(kernel[i]) - np.float64(new['kernel'][i])
    np.testing.assert_allclose(moved, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('name', ['simclr', 'moco'])
def test_linear_probe_follows_its_protocol(encoder, data, name):
  """Breaks if the learning rate, its schedule, the momentum or the mean over the batch differs from
  the protocol.
  """
  train, test = data
  protocol = probe.PROTOCOLS[name]
  rate = protocol.learning_rate / 10
  settings = probe.Settings(3, 64, (rate,), cached=True, seed=5)
  result = probe.train_linear(encoder, train, test, protocol, settings)
  h, labels = (np.float64(x) for x in encoder.embed(train))
  kernel = protocol.kernel_std * np.float64(jax.random.normal(jax.random.key(5), (32, 10)))
  head = np.concatenate([kernel, np.zeros((1, 10))])
  velocity, steps = np.zeros_like(head), 3 * 600 // 64
  for i in range(steps):
    index = order.rows(5, i, 64, 600)['index']
    x, y = np.c_[h[index], np.ones(64)], np.eye(10)[labels[index].astype(int)]
    z = x @ head
    p = np.exp(z - z.max(1, keepdims=True))
    gradient = x.T @ (p / p.sum(1, keepdims=True) - y) / 64
    step_rate = rate * 64 / 256
    if name == 'simclr':
      step_rate *= 0.5 * (1 + np.cos(np.pi * i / steps))
    else:
      step_rate *= 0.1 ** ((i >= round(0.6 * steps)) + (i >= round(0.8 * steps)))
    velocity = gradient + 0.9 * velocity
    head -= step_rate * (gradient + 0.9 * velocity if name == 'simclr' else velocity)
  test_h, test_labels = encoder.embed(test)
  logits = np.c_[test_h, np.ones(len(test_h))] @ head
  assert result['top1'] == pytest.approx(metrics.top_k(logits, test_labels), abs=0.011)
  assert result['calibration_error'] == pytest.approx(
    metrics.calibration_error(logits, test_labels), abs=0.02
  )


def features_data(x, labels):
  """A data set whose images are not needed, because the features are known."""
  return Arrays(np.zeros((len(x), 1, 1, 3), np.uint8), np.int32(labels))


def probe_features(train, test, protocol='sgd', **settings):
  """The result of a probe on (features, labels)."""
  sets = [features_data(*part) for part in (train, test)]
  return probe.train_linear(
    None, *sets, probe.PROTOCOLS[protocol], probe.Settings(cached=True, **settings),
    features=(train, test),
  )  # fmt: skip


def test_standardised_probe_is_folded_into_the_classifier():
  """Breaks if the classifier is not that of the original features, or a dead feature reaches it."""
  x, labels = blobs(300, 1)
  x = np.c_[x * np.logspace(-2, 4, 24) + 50, np.full(300, 3.7)].astype(np.float32)
  settings = {'epochs': 2, 'learning_rates': (0.1,)}
  head = probe_features((x, labels), (x, labels), **settings)['classifier']
  mean, std = np.float64(x).mean(0), np.float64(x).std(0)
  z = (np.float64(x) - mean)[:, :24] / std[:24]
  scaled = probe_features((np.float32(z), labels), (np.float32(z), labels), **settings)[
    'classifier'
  ]
  expected = z @ np.float64(scaled['kernel']) + scaled['bias']
  logits = np.float64(x) @ np.float64(head['kernel']) + head['bias']
  assert head['kernel'].shape == (25, 10) and not head['kernel'][24].any()
  np.testing.assert_allclose(logits, expected, atol=2e-3)
  assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_default_probe_does_not_depend_on_the_scale(scale):
  """Breaks if features of another scale are underfitted: the best logistic regression is the reference."""
  (x, labels), (test, test_labels) = blobs(600, 1), blobs(1000, 2)
  shift = np.linspace(-3, 3, 24, dtype=np.float32)
  result = probe_features(
    (scale * (x + shift), labels), (scale * (test + shift), test_labels), epochs=60
  )
  z, test_z = logistic.standardize(x, test)
  weights = lbfgs.SWEEP[::-4]
  best = max(
    metrics.top_k(lbfgs.logits(w, test_z), test_labels) for w in lbfgs.path(z, labels, weights, 10)
  )
  assert best > 0.6 and result['top1'] > best - 0.015
  assert len(result['held_out']) == 11 and result['train_images'] == 600


@pytest.mark.slow
@pytest.mark.parametrize('name', ['untrained', 'pretrained', 'raw pixels'])
def test_default_probe_is_within_a_point_of_logistic_regression(name, tmp_path):
  """Breaks if the probe underfits a real encoder: L-BFGS with the L2 strength that is best on the test images."""
  parts = [digits.load(None, split) for split in ('train', 'test')]
  recipe = config.load('simclr_digits', {**TINY, 'model.width_multiplier': '0.25', 'steps': '100'})
  if name == 'pretrained':
    assert train.pretrain(recipe, tmp_path, quiet=True) == 0
    embed = runs.load_encoder(tmp_path).embed
  else:
    untrained = encoders.untrained(config.architecture(recipe))
    embed = untrained.embed if name == 'untrained' else encoders.raw_pixels
  # The images of the two splits differ in kind, so that overfitting pays on one of them: both are mixed.
  x, labels = (np.concatenate(both) for both in zip(*map(embed, parts)))
  if name == 'raw pixels':
    x = x.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4, 5)).reshape(len(x), -1)  # smaller, for the time
  order_ = np.random.default_rng(0).permutation(len(x))
  rest, held_out = order_[:-2500], order_[-2500:]
  result = probe_features((x[rest], labels[rest]), (x[held_out], labels[held_out]))
  z, test = logistic.standardize(x[rest], x[held_out])
  weights = lbfgs.SWEEP[12:37:3][::-1]  # 0.001 to 1,000
  best = max(
    metrics.top_k(lbfgs.logits(w, test), labels[held_out])
    for w in lbfgs.path(z, labels[rest], weights, 10)
  )
  assert best > 0.2 and result['top1'] >= best - 0.01


def test_warning_about_the_rate_of_a_protocol():
  """Breaks if a rate that is far too low is not reported, or a good one is."""
  x, labels = blobs(500, 1)
  small = probe.rate_warning((1e-3 * x, labels), probe.PROTOCOLS['simclr'], 10)
  assert 'far from the best' in small and '--protocol=sgd' in small
  assert probe.rate_warning((x, labels), probe.PROTOCOLS['simclr'], 10) == ''
  assert probe.rate_warning((x[:5], labels[:5]), probe.PROTOCOLS['simclr'], 10) == ''


def test_probe_on_very_few_images():
  """Breaks if the sweep needs more images than there are."""
  x, labels = np.float32([[0, 1], [1, 0]]), np.int32([0, 1])
  result = probe_features((x, labels), (x, labels), epochs=50)
  assert result['train_images'] == 2 and result['steps'] == 50


def test_many_classes_need_little_memory():
  """Breaks if a table of queries x classes or classes x classes is made: that would be 80 GB."""
  rng = np.random.default_rng(0)
  bank, labels = np.float32(rng.normal(size=(3000, 8))), rng.integers(0, 10_000_000, 3000)
  labels[-1] = 9_999_999
  assert (knn.predict(bank, labels, bank, 1) == labels).all()
  scores = np.float32(rng.normal(size=(20, 100_000)))
  truth = np.arange(20) * 4999
  assert metrics.mean_per_class(scores, truth) == np.mean(scores.argmax(1) == truth)


def test_votes_of_equal_weight_go_to_the_lowest_class():
  """Breaks if the order of neighbours decides between classes."""
  bank = np.float32([[1, 0], [1, 0], [0, 1]])
  assert list(knn.predict(bank, np.array([7, 3, 5]), bank[:1], 2)) == [3]


def test_effective_images():
  """Breaks if the variance of the mean per class is not that of as many images."""
  assert metrics.effective_images(np.repeat([0, 1, 4], 50)) == pytest.approx(150)
  labels = np.repeat([0, 1], [90, 10])
  rng = np.random.default_rng(0)
  means = [rng.binomial(n, 0.5, 20_000) / n for n in (90, 10)]
  assert np.var(np.mean(means, axis=0)) == pytest.approx(
    0.25 / metrics.effective_images(labels), rel=0.03
  )


def test_cross_entropy():
  """Breaks if rows without a label contribute to the loss or the accuracy."""
  x, labels = blobs(500, 3)
  head = linear.init(24, 10)
  loss, accuracy = losses.cross_entropy(linear.logits(head, x), labels)
  np.testing.assert_allclose(loss, np.log(10), rtol=1e-5)
  logits = np.random.default_rng(0).normal(size=(24, 10)).astype(np.float32)
  head = {'kernel': jnp.asarray(logits), 'bias': jnp.arange(10.0)}
  masked = np.where(np.arange(500) < 100, -1, labels)
  loss, accuracy = losses.cross_entropy(linear.logits(head, x), masked)
  z = x[100:].astype(np.float64) @ logits + np.arange(10.0)
  p = (
    z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
  )
  np.testing.assert_allclose(loss, -p[np.arange(400), labels[100:]].mean(), rtol=1e-5)
  np.testing.assert_allclose(accuracy, (z.argmax(1) == labels[100:]).mean(), rtol=1e-6)


def test_online_probe_sends_no_gradient_to_the_encoder():
  """Breaks if the gradient of the probe reaches the features."""
  head = {'kernel': jnp.ones((24, 10)), 'bias': jnp.arange(10.0)}
  x, labels = blobs(50, 4)
  gradient = jax.grad(lambda h: linear.online_loss(head, h, labels)[0])(jnp.asarray(x))
  assert not gradient.any()
  unlabelled = linear.online_loss(head, jnp.asarray(x), np.full(50, -1))
  assert unlabelled[0] == 0 and unlabelled[1] == 0
