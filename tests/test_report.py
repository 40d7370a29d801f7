"""Figures and tables of the report, without a run: labels and names, and incomplete results."""

import base64
import re

import numpy as np
import pytest

from simclr_jax.data import Arrays
from simclr_jax.report import figures, page

DIGITS = Arrays(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3, dtype=np.int32))
NAMES = ['cat', 'dog', '$e$ <mu>']
ANIMALS = Arrays(DIGITS.images, DIGITS.labels, class_names=NAMES)


def texts(uri):
  """The texts of an SVG figure and their positions."""
  svg = base64.b64decode(uri.split(',')[1]).decode()
  matches = re.findall(r'<text[^>]*?(?:translate\(|x=")([\d.]+)[ ",y=]+([\d.]+)[^>]*>([^<]+)', svg)
  return {text: (float(x), float(y)) for x, y, text in matches}


def result(**fields):
  return {'title': 'Title', 'step': 7, 'columns': ['6 per class'], 'settings': {}, **fields}


@pytest.mark.parametrize('labels', [[6], [1, 10, 100]])
def test_label_curve_names_lines_and_ticks(labels):
  """Breaks if a line has no label, two labels overlap, or a number of labels has no tick."""
  means = {'raw pixels': 40, 'from scratch': 41, 'fine-tuned': 42}
  rows = {name: [[mean, None]] * len(labels) for name, mean in means.items()}
  positions = texts(figures.label_curve(result(rows=rows, labels_per_class=labels)))
  names = ['raw pixels 40', 'from scratch 41', 'fine-tuned 42']
  heights = [positions[name][1] for name in names]
  assert all(low - high > 10 for low, high in zip(heights, heights[1:]))
  assert 'labels per class' in positions and {f'{n}' for n in labels} <= set(positions)


def test_embedding_map_names_clusters():
  """Breaks if a cluster has no label, or a label is placed where its class is not the majority."""
  rng = np.random.default_rng(0)
  labels = np.arange(90) % 3
  h = np.eye(3)[labels] + 0.1 * rng.normal(size=(90, 3))
  assert set(texts(figures.embedding_map(h, labels, NAMES))) == {
    'cat', 'dog', '$e$ &lt;mu&gt;',
  }  # fmt: skip
  mixed = figures.embedding_map(h, rng.permutation(np.arange(90)), [str(i) for i in range(90)])
  assert not texts(mixed)
  assert not texts(figures.embedding_map(h, None, []))


def test_class_colors_of_many_classes():
  """Breaks if the 20 most frequent of many classes do not have different colours."""
  labels = np.concatenate([np.arange(100), np.arange(30, 50)])
  colors = figures.class_colors(labels)
  assert list(colors) == list(range(30, 50)) and len(set(colors.values())) == 20


def test_class_names_are_printable():
  """Breaks if a class name that is not valid text, is long or missing cannot be displayed."""
  odd = Arrays(DIGITS.images, DIGITS.labels, class_names=['caf\udce9', 'a\n b', 20 * 'x'])
  assert page._class_names(odd, 5) == ['caf?', 'a b', 17 * 'x' + '…', '3', '4']
  assert page._class_names(DIGITS, 2) == ['0', '1']


def test_teacher_and_student(tmp_path):
  """Breaks if a result of an old version, without confusion matrices, is not drawn, or classes have no names."""
  rows = {'teacher': [[50.0, 2.0], [23.5, None]], 'student': [[51.0, None], [0.078, None]]}
  seeds = [{'confusion': np.diag([1, 2, 3]).tolist()}] * 2
  for runs in ({}, {'runs': {'teacher': seeds, 'student': seeds}}):
    labels = texts(figures.teacher_student(result(rows=rows, **runs), NAMES))
    assert {
      'teacher 50.0, 24 million parameters', 'student 51.0, 0.078 million parameters', 'all',
    } <= set(labels)  # fmt: skip
    assert ('dog' in labels) == bool(runs)
  assert not list(page._distillation(tmp_path, ANIMALS))


def test_accuracy_per_class_and_confusion_matrix():
  """Breaks if the table or the matrix lacks class names, or results without confusion matrices are an error."""
  seeds = [{'top1': 0.5, 'confusion': np.ones((3, 3), int).tolist()}]
  runs = {'fine-tuned': {'1%': seeds}, 'raw pixels': {'1%': [{'top1': 0.5}]}}
  text = ''.join(page._per_class(runs, ANIMALS))
  assert '<td>dog</td><td class="n">33.3</td>' in text and '&lt;mu&gt;' in text
  assert 'Accuracy per class, %, with 1% of the labels, over all seeds' in text
  matrix = texts(figures.confusion(np.eye(3), NAMES))
  assert {'cat', 'dog', '$e$ &lt;mu&gt;', '100', 'true class', 'predicted class'} == set(matrix)
  many = [{'confusion': np.ones((21, 21), int).tolist()}]
  for without in ({}, {'fine-tuned': {'1%': [{'top1': 1}]}}, {'fine-tuned': {'1%': many}}):
    assert not list(page._per_class(without, ANIMALS))


def test_curves_of_one_record():
  """Breaks if a panel without values is drawn, or a single record is not drawn."""
  panels = figures.curves([{'step': 1, 'loss': 2.0, 'learning_rate': None}])
  assert set(panels) == {'loss, nats'} and 'loss' in texts(panels['loss, nats'])
