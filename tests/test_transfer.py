"""Transfer to other data sets, and the logistic regression on all devices that it uses."""

import io
import json
import re
import types

import numpy as np
import pytest
from conftest import TINY
from sklearn.linear_model import LogisticRegression

from simclr_jax import cli, config, downstream, train
from simclr_jax.commands import transfer as command
from simclr_jax.data import digits
from simclr_jax.evaluate import lbfgs, metrics, transfer


def blobs(n, seed, classes=4, d=12):
  """Features and labels of overlapping classes."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, n)
  centres = np.random.default_rng(99).normal(size=(classes, d))
  return np.float32(centres[labels] + 1.5 * rng.normal(size=(n, d))), labels


def test_lbfgs_against_scikit_learn(monkeypatch):
  """Breaks if the L2 penalty has another scale or includes the bias, or padding rows change the
  fit.
  """
  monkeypatch.setattr(lbfgs, 'TOLERANCE', 1e-7)
  x, labels = blobs(301, 1)
  weights = np.array([1000.0, 30.0, 1.0])
  for weight, w in zip(weights, lbfgs.path(x, labels, weights, 4, steps=1000)):
    model = LogisticRegression(C=1 / weight, max_iter=10_000, tol=1e-10).fit(np.float64(x), labels)
    ours, theirs = lbfgs.logits(w, x), model.decision_function(x)
    ours, theirs = (z - z.mean(1, keepdims=True) for z in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_multilabel_lbfgs_is_one_against_the_rest(monkeypatch):
  """Breaks if the classes share a softmax, or padding rows change the fit."""
  monkeypatch.setattr(lbfgs, 'TOLERANCE', 1e-7)
  x, _ = blobs(301, 1)
  positive = np.random.default_rng(3).normal(size=(301, 3)) + x[:, :3] > 0.5
  (w,) = lbfgs.path(x, positive, np.array([10.0]), 3, steps=1000)
  for c in range(3):
    model = LogisticRegression(C=0.1, max_iter=10_000, tol=1e-10).fit(np.float64(x), positive[:, c])
    ours, theirs = lbfgs.logits(w, x)[:, c], model.decision_function(x)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.slow
def test_transfer_to_a_multilabel_data_set(tmp_path, monkeypatch):
  """Breaks if labels are assigned to the wrong images, or the metric is not mAP."""
  tfds = pytest.importorskip('tensorflow_datasets')
  from test_records import jpeg, write_with_tfds

  features = {
    'image': tfds.features.Image(shape=(None, None, 3), encoding_format='jpeg'),
    'labels': tfds.features.Sequence(tfds.features.ClassLabel(num_classes=3)),
  }
  labels = [[i % 3] if i % 2 else [i % 3, (i + 1) % 3] for i in range(30)]
  splits = {'train': range(15), 'validation': range(15, 20), 'test': range(20, 30)}
  folder = write_with_tfds(tmp_path, 'voclike', features, {
    name: [{'image': io.BytesIO(jpeg(i)), 'labels': labels[i]} for i in indices]
    for name, indices in splits.items()
  })  # fmt: skip
  task = transfer.load(str(folder))
  assert task.metric == transfer.MAP == transfer.metric('voc/2007')
  assert (len(task.train), len(task.test)) == (20, 10)
  parts = zip(task.truth, (range(20), range(20, 30)), (task.train, task.test))
  for truth, indices, dataset in parts:
    # TFDS shuffles the examples that it writes: they are identified by their images.
    images = [e['bytes'] for e in dataset.iterate_once().as_numpy_iterator()]
    number = {jpeg(i): i for i in indices}
    assert [set(np.flatnonzero(row)) for row in truth] == [set(labels[number[p]]) for p in images]
  monkeypatch.setattr(lbfgs, 'SWEEP', np.array([1e-1, 1e2]))
  assert 0 < transfer.linear({'raw pixels': None}, task)['raw pixels'] <= 1


def test_l2_strength_is_chosen_on_a_validation_split(monkeypatch):
  """Breaks if the L2 strength is not that of the best validation accuracy, or the last fit does not
  use all training images.
  """
  monkeypatch.setattr(lbfgs, 'SWEEP', np.array([1.0, 1e2, 1e6]))
  x, labels = blobs(200, 1)
  test, test_labels = blobs(500, 2)
  scores, weight = lbfgs.sweep_l2(x, labels, test)
  assert scores.shape == (500, 4) and weight in lbfgs.SWEEP and weight < 1e6
  model = LogisticRegression(C=1 / weight, max_iter=10_000, tol=1e-8).fit(x, labels)
  agreement = np.mean(scores.argmax(1) == model.predict(test))
  assert agreement > 0.99
  expected = model.score(test, test_labels)
  assert metrics.top_k(scores, test_labels) == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
def test_transfer_command(tmp_path, capsys, monkeypatch):
  """Breaks if a data set is evaluated with the wrong metric, or a missing one is not reported."""
  monkeypatch.setattr(lbfgs, 'SWEEP', np.array([1e-1, 1e2]))
  for split in ('train', 'test'):
    subset = digits.load(None, split).sample(200)
    np.savez(tmp_path / f'{split}.npz', images=subset.images, labels=subset.labels)
  run = tmp_path / 'run'
  recipe = config.load('simclr_digits', {**TINY, 'steps': '2', 'model.depth': '8'})
  assert train.pretrain(recipe, run, quiet=True) == 0
  nowhere = tmp_path / 'nowhere'
  argv = ['transfer', f'--workdir={run}', f'--to={tmp_path}/train.npz,{nowhere}', '--finetune',
          '--baselines', '--config.steps=2']  # fmt: skip
  assert cli.main(argv) == 0
  output = capsys.readouterr().out
  result = json.loads((run / 'evaluation.json').read_text())['transfer']
  columns = ['raw pixels', 'untrained', 'pretrained', 'from scratch', 'fine-tuned']
  assert result['columns'] == columns
  assert [c[0] for c in result['rows']['nowhere (top-1)']] == [None] * 5
  assert 'missing' in output and str(nowhere) in result['notes']['nowhere (top-1)']
  assert all(0 <= c[0] <= 100 for c in result['rows']['train.npz (top-1)'])
  assert result['settings']['images'] == {'train.npz (top-1)': [200, 200]}
  with pytest.raises(SystemExit, match='2'):
    cli.main([*argv[:3], '--config.steps=2'])
  assert '--config.FIELD=VALUE needs --finetune' in capsys.readouterr().err
  with pytest.raises(SystemExit, match='2'):
    cli.main([*argv[:2], f'--to={tmp_path}/train.npz', '--data-dir=/data'])
  assert '--data-dir has no effect' in capsys.readouterr().err
  assert cli.main([*argv, '--config.seed=1']) == 2
  assert '--config.seed cannot be set here' in capsys.readouterr().err
  for name, metric in (('oxford_iiit_pet:4.0.0', 'mean per class'), ('cifar10', 'top-1')):
    assert transfer.metric(name) == metric


@pytest.mark.parametrize('name', ['..', '/', 'a/../..', '.hidden', 'a\nb', 'x' * 200, 'ds:1.0.0'])
def test_folder_of_a_data_set(name, tmp_path, monkeypatch):
  """Breaks if the name of a data set leads out of the folder of the fine-tuned runs."""
  used = []
  monkeypatch.setattr(downstream, 'recipe', lambda *_: None)
  monkeypatch.setattr(
    downstream, 'all_labels', lambda folder, *_, **__: used.append(folder) or {'top1': 1.0}
  )
  task = types.SimpleNamespace(location={}, train=None, test=None, metric='top-1')
  args = types.SimpleNamespace(workdir=tmp_path, config='finetune_small', overrides={}, command='')
  for start in ('', str(tmp_path)):
    command._fine_tuned(args, None, command._short_name(name, {}), task, start)
  assert {folder.parent for folder in used} == {tmp_path / 'transfer'}
  assert all(re.fullmatch(r'\w[\w.-]{0,90}', folder.name) for folder in used)
