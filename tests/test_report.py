"""The report's figures, without a run: what they name, and results that lack something."""

import base64
import re

import numpy as np
import pytest

from simclr_jax.data import Arrays
from simclr_jax.report import figures, page

DIGITS = Arrays(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3, dtype=np.int32))
ANIMALS = Arrays(DIGITS.images, DIGITS.labels, class_names=['cat', 'dog', '$e$ <mu>'])


def texts(uri):
  """What is written in a picture, with the place of each."""
  svg = base64.b64decode(uri.split(',')[1]).decode()
  found = re.findall(r'<text[^>]*?(?:translate\(|x=")([\d.]+)[ ",y=]+([\d.]+)[^>]*>([^<]+)', svg)
  return {text: (float(x), float(y)) for x, y, text in found}


def results(**more):
  return {'title': 'Some', 'step': 7, 'columns': ['6 a class'], 'settings': {}, **more}


@pytest.mark.parametrize('labels', [[6], [1, 10, 100]])
def test_label_curve(labels):
  """Breaks if a line has no name, two names meet, or one number of labels is not drawn."""
  rows = {'raw pixels': 40, 'from scratch': 41, 'fine-tuned': 42}
  rows = {name: [[mean, None]] * len(labels) for name, mean in rows.items()}
  found = texts(figures.label_curve(results(rows=rows, labels_per_class=labels)))
  names = ['raw pixels 40', 'from scratch 41', 'fine-tuned 42']
  heights = [found[name][1] for name in names]
  assert all(low - high > 10 for low, high in zip(heights, heights[1:]))
  assert 'labels a class' in found and {f'{n}' for n in labels} <= set(found)


def test_embedding_map():
  """Breaks if a cluster is not named, or a name is put where nothing is of its class."""
  rng = np.random.default_rng(0)
  labels = np.arange(90) % 3
  h = np.eye(3)[labels] + 0.1 * rng.normal(size=(90, 3))
  assert set(texts(figures.embedding_map(h, labels, ANIMALS.class_names))) == {
    'cat', 'dog', '$e$ &lt;mu&gt;',
  }  # fmt: skip
  mixed = figures.embedding_map(h, rng.permutation(np.arange(90)), [str(i) for i in range(90)])
  assert not texts(mixed)
  assert not texts(figures.embedding_map(h, None, []))


def test_class_colors():
  """Breaks if many classes share a colour."""
  labels = np.concatenate([np.arange(100), np.arange(30, 50)])
  colors = figures.class_colors(labels)
  assert list(colors) == list(range(30, 50)) and len(set(colors.values())) == 20


def test_names():
  """Breaks if a name that is no text, is long or missing cannot be drawn."""
  odd = Arrays(DIGITS.images, DIGITS.labels, class_names=['caf\udce9', 'a\n b', 20 * 'x'])
  assert page._names(odd, 5) == ['caf?', 'a b', 17 * 'x' + '…', '3', '4']
  assert page._names(DIGITS, 2) == ['0', '1']


def test_teacher_and_student(tmp_path):
  """Breaks if an older result, without the confusion matrices, is not drawn, or classes have no names."""
  rows = {'teacher': [[50.0, 2.0], [23.5, None]], 'student': [[51.0, None], [0.078, None]]}
  seeds = [{'confusion': np.diag([1, 2, 3]).tolist()}] * 2
  for runs in ({}, {'runs': {'teacher': seeds, 'student': seeds}}):
    found = texts(figures.teacher_student(results(rows=rows, **runs), ANIMALS.class_names))
    assert {
      'teacher 50.0, 24 million parameters', 'student 51.0, 0.078 million parameters', 'all',
    } <= set(found)  # fmt: skip
    assert ('dog' in found) == bool(runs)
  assert not list(page._distilled(tmp_path, ANIMALS))


def test_classes():
  """Breaks if the table or the matrix lacks names, or results without either are an error."""
  seeds = [{'top1': 0.5, 'confusion': np.ones((3, 3), int).tolist()}]
  runs = {'fine-tuned': {'1%': seeds}, 'raw pixels': {'1%': [{'top1': 0.5}]}}
  text = ''.join(page._classes(runs, ANIMALS))
  assert '<td>dog</td><td class="n">33.3</td>' in text and '&lt;mu&gt;' in text
  matrix = texts(figures.confusion(np.eye(3), ANIMALS.class_names))
  assert {'cat', 'dog', '$e$ &lt;mu&gt;', '100', 'is', 'taken for'} == set(matrix)
  many = [{'confusion': np.ones((21, 21), int).tolist()}]
  for without in ({}, {'fine-tuned': {'1%': [{'top1': 1}]}}, {'fine-tuned': {'1%': many}}):
    assert not list(page._classes(without, ANIMALS))


def test_curves():
  """Breaks if a panel without values is drawn, or one record is not."""
  found = figures.curves([{'step': 1, 'loss': 2.0, 'learning_rate': None}])
  assert set(found) == {'loss, nats'} and 'loss' in texts(found['loss, nats'])
