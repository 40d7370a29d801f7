"""Logistic regression on all devices, and its use on other data sets."""

import io
import json

import numpy as np
import pytest
from conftest import TINY
from sklearn.linear_model import LogisticRegression

from simclr_jax import cli, config, train
from simclr_jax.data import digits
from simclr_jax.evaluate import lbfgs, metrics, transfer


def blobs(n, seed, classes=4, d=12):
  """Overlapping classes."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, n)
  centres = np.random.default_rng(99).normal(size=(classes, d))
  return np.float32(centres[labels] + 1.5 * rng.normal(size=(n, d))), labels


def test_fits_equal_scikit_learn(monkeypatch):
  """Breaks if the penalty has another scale, reaches the bias, or rows that only fill up count."""
  monkeypatch.setattr(lbfgs, 'TOLERANCE', 1e-7)
  x, labels = blobs(301, 1)
  weights = np.array([1000.0, 30.0, 1.0])
  for weight, w in zip(weights, lbfgs.path(x, labels, weights, 4, steps=1000)):
    model = LogisticRegression(C=1 / weight, max_iter=10_000, tol=1e-10).fit(np.float64(x), labels)
    ours, theirs = lbfgs.logits(w, x), model.decision_function(x)
    ours, theirs = (z - z.mean(1, keepdims=True) for z in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_several_labels_an_image_are_regressions_of_one_against_the_rest(monkeypatch):
  """Breaks if the classes share a softmax, or rows that only fill up count."""
  monkeypatch.setattr(lbfgs, 'TOLERANCE', 1e-7)
  x, _ = blobs(301, 1)
  positive = np.random.default_rng(3).normal(size=(301, 3)) + x[:, :3] > 0.5
  (w,) = lbfgs.path(x, positive, np.array([10.0]), 3, steps=1000)
  for c in range(3):
    model = LogisticRegression(C=0.1, max_iter=10_000, tol=1e-10).fit(np.float64(x), positive[:, c])
    ours, theirs = lbfgs.logits(w, x)[:, c], model.decision_function(x)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_a_data_set_with_several_labels_an_image(tmp_path, monkeypatch):
  """Breaks if the labels are not those of the images, or it is not measured by mean average precision."""
  tfds = pytest.importorskip('tensorflow_datasets')
  from test_records import jpeg, tfds_writes

  parts = {
    'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
    'labels': tfds.features.Sequence(tfds.features.ClassLabel(num_classes=3)),
  }
  given = [[i % 3] if i % 2 else [i % 3, (i + 1) % 3] for i in range(30)]
  splits = {'train': range(15), 'validation': range(15, 20), 'test': range(20, 30)}
  where = tfds_writes(tmp_path, 'voclike', parts, {
    name: [{'image': io.BytesIO(jpeg(i)), 'labels': given[i]} for i in which]
    for name, which in splits.items()
  })  # fmt: skip
  task = transfer.load(str(where))
  assert task.metric == transfer.MAP == transfer.metric('voc/2007')
  assert (len(task.train), len(task.test)) == (20, 10)
  for truth, which, part in zip(task.truth, (range(20), range(20, 30)), (task.train, task.test)):
    # TFDS writes its examples in an order of its own: the pictures tell which is which.
    pictures = [e['bytes'] for e in part.iterate_once().as_numpy_iterator()]
    number = {jpeg(i): i for i in which}
    assert [set(np.flatnonzero(row)) for row in truth] == [set(given[number[p]]) for p in pictures]
  monkeypatch.setattr(lbfgs, 'SWEEP', np.array([1e-1, 1e2]))
  assert 0 < transfer.linear({'raw pixels': None}, task)['raw pixels'] <= 1


def test_the_regularisation_is_chosen_without_the_test_images(monkeypatch):
  """Breaks if the best weight is not that of the held-out images, or the last fit leaves some out."""
  monkeypatch.setattr(lbfgs, 'SWEEP', np.array([1.0, 1e2, 1e6]))
  x, labels = blobs(200, 1)
  test, test_labels = blobs(500, 2)
  scores, weight = lbfgs.sweep_l2(x, labels, test)
  assert scores.shape == (500, 4) and weight in lbfgs.SWEEP and weight < 1e6
  model = LogisticRegression(C=1 / weight, max_iter=10_000, tol=1e-8).fit(x, labels)
  agree = np.mean(scores.argmax(1) == model.predict(test))
  assert agree > 0.99
  plain = model.score(test, test_labels)
  assert metrics.top_k(scores, test_labels) == pytest.approx(plain, abs=0.01)


def test_transfer(tmp_path, capsys, monkeypatch):
  """Breaks if a data set is measured by the wrong number, or a missing one is passed over."""
  monkeypatch.setattr(lbfgs, 'SWEEP', np.array([1e-1, 1e2]))
  for split in ('train', 'test'):
    found = digits.load(None, split).sample(200)
    np.savez(tmp_path / f'{split}.npz', images=found.images, labels=found.labels)
  run = tmp_path / 'run'
  recipe = config.load('simclr_digits', {**TINY, 'steps': '2', 'model.depth': '8'})
  assert train.pretrain(recipe, run, quiet=True) == 0
  nowhere = tmp_path / 'nowhere'
  argv = ['transfer', f'--workdir={run}', f'--to={tmp_path}/train.npz,{nowhere}', '--finetune',
          '--baselines', '--config.steps=2']  # fmt: skip
  assert cli.main(argv) == 0
  out = capsys.readouterr().out
  kept = json.loads((run / 'evaluation.json').read_text())['transfer']
  assert kept['columns'] == ['raw pixels', 'untrained', 'pretrained', 'from scratch', 'fine-tuned']
  assert [c[0] for c in kept['rows']['nowhere (top-1)']] == [None] * 5
  assert 'missing' in out and str(nowhere) in kept['notes']['nowhere (top-1)']
  assert all(0 <= c[0] <= 100 for c in kept['rows']['train.npz (top-1)'])
  assert kept['settings']['images'] == {'train.npz (top-1)': [200, 200]}
  with pytest.raises(SystemExit, match='2'):
    cli.main([*argv[:3], '--config.steps=2'])
  assert '--config.* is for --finetune' in capsys.readouterr().err
  for what, how in (('oxford_iiit_pet:4.0.0', 'mean per class'), ('cifar10', 'top-1')):
    assert transfer.metric(what) == how
