"""Figures and tables of the report, without a run: labels and names, and incomplete results."""

import base64
import json
import os
import re
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import TINY

from simclr_jax import cli
from simclr_jax.data import Arrays
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import knn, results
from simclr_jax.report import embeddings, evaluations, figures, page

DIGITS = Arrays(np.zeros((3, 8, 8, 3), np.uint8), np.arange(3, dtype=np.int32))
NAMES = ['cat', 'dog', '$e$ <mu>']


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
  xy = figures.tsne(np.eye(3)[labels] + 0.1 * rng.normal(size=(90, 3)))
  assert set(texts(figures.embedding_map(xy, labels, NAMES))) == {
    'cat', 'dog', '$e$ &lt;mu&gt;',
  }  # fmt: skip
  mixed = figures.embedding_map(xy, rng.permutation(np.arange(90)), [str(i) for i in range(90)])
  assert not texts(mixed)
  assert not texts(figures.embedding_map(xy, None, []))


def test_class_colors_of_many_classes():
  """Breaks if the 20 most frequent of many classes do not have different colours."""
  labels = np.concatenate([np.arange(100), np.arange(30, 50)])
  colors = figures.class_colors(labels)
  assert list(colors) == list(range(30, 50)) and len(set(colors.values())) == 20


def test_class_names_are_printable():
  """Breaks if a class name that is not valid text, is long or missing cannot be displayed."""
  odd = ['caf\udce9', 'a\n b', 20 * 'x', '\u202egpj']
  expected = [r'caf\xe9', 'a b', 17 * 'x' + '…', r'\u202egpj', '4']
  assert evaluations.printable(odd, 5) == expected
  assert evaluations.printable(DIGITS.class_names, 2) == ['0', '1']


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
  assert not list(evaluations.distillations(tmp_path, NAMES))


def test_accuracy_per_class_and_confusion_matrix():
  """Breaks if the table or the matrix lacks class names, or results without confusion matrices are an error."""
  seeds = [{'top1': 0.5, 'confusion': np.ones((3, 3), int).tolist()}]
  runs = {'fine-tuned': {'1%': seeds}, 'raw pixels': {'1%': [{'top1': 0.5}]}}
  text = ''.join(evaluations.per_class(runs, NAMES, '1%'))
  assert '<td>dog</td><td class="n">33.3</td>' in text and '&lt;mu&gt;' in text
  assert 'Accuracy per class, %, with 1% of the labels, over all seeds' in text
  matrix = texts(figures.confusion(np.eye(3), NAMES))
  assert {'cat', 'dog', '$e$ &lt;mu&gt;', '100', 'true class', 'predicted class'} == set(matrix)
  many = [{'confusion': np.ones((21, 21), int).tolist()}]
  for without in ({}, {'fine-tuned': {'1%': [{'top1': 1}]}}, {'fine-tuned': {'1%': many}}):
    assert not list(evaluations.per_class(without, NAMES, '1%'))


def test_curves_of_one_record():
  """Breaks if a panel without values is drawn, or a single record is not drawn."""
  panels = figures.curves([{'step': 1, 'loss': 2.0, 'learning_rate': None}])
  assert set(panels) == {'loss, nats'} and 'loss' in texts(panels['loss, nats'])


def test_results_with_intervals_chance_and_notes(tmp_path):
  """Breaks if a result on other data, its chance, interval or note, or the step of its checkpoint is not displayed."""
  rows = {'untrained': [[10.0, None]], 'pretrained': [[60.0, None]]}
  first = results.assess(result(rows=rows, title='kNN', columns=['top-1 %']), np.arange(50) % 5)
  about = {'step': 7, 'checkpoint': 'a', 'data': {'test': {'fingerprint': 1, 'dir': 'x/birds', 'split': 'test'}}}  # fmt: skip
  results.save(tmp_path, 'knn', first, about)
  other = {'test': {'fingerprint': 2, 'dir': 'x/<flowers>', 'split': 'val'}}
  results.save(tmp_path, 'knn', first, {**about, 'step': 9, 'data': other})
  page = ''.join(evaluations.sections(tmp_path, 9, []))
  assert 'kNN, birds/test (step 7; the newest checkpoint is of step 9)' in page
  assert 'kNN, &lt;flowers&gt;/val (step 9)' in page
  assert '60.0 [46.2, 72.4]' in page and '50 test images; chance 20.0 %' in page
  assert 'None yet' in ''.join(evaluations.sections(tmp_path / 'new', 9, []))


def test_duplicates_are_named():
  """Breaks if images with the same pixels are not found, or others are."""
  rng = np.random.default_rng(0)
  small = rng.random((30, 12)).astype(np.float32)
  small[[7, 29]] = small[3] + 1e-4
  assert embeddings.duplicates(small).tolist() == [3 if i in (7, 29) else i for i in range(30)]
  named = ''.join(embeddings._named(embeddings.duplicates(small), [f'<{i}>' for i in range(30)]))
  assert '2 of these images look the same' in named and '&lt;7&gt; = &lt;3&gt;' in named
  assert not ''.join(embeddings._named(np.arange(30), []))


def test_leave_one_out():
  """Breaks if an image votes for itself, duplicates included, or other neighbours vote."""
  rng = np.random.default_rng(0)
  h = rng.normal(size=(60, 5)).astype(np.float32)
  h[40:] = h[:20]  # duplicates precede or follow the image itself
  labels = rng.integers(0, 3, 60)
  z = h / np.linalg.norm(h.astype(np.float64), axis=1, keepdims=True)
  s = z @ z.T
  np.fill_diagonal(s, -np.inf)
  right = 0
  for i in range(60):
    near = np.argsort(-s[i], kind='stable')[:7]
    votes = np.bincount(labels[near], np.exp(s[i, near] / 0.1), 3)
    right += votes.argmax() == labels[i]
  assert knn.leave_one_out(h, labels, 7) == pytest.approx(right / 60)


@pytest.mark.parametrize('kind', ['unfinished', 'no labels', 'no images'])
def test_report_of_any_run(tmp_path, kind, capsys):
  """Breaks if a run that stopped, or whose images have no labels or are gone, has no report or hides that."""
  images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
  np.savez(tmp_path / 'train.npz', images=images)
  fields = [
    f'--config.{k}={v}'
    for k, v in {**TINY, 'batch_size': 8, 'steps': 3, 'checkpoint_every_steps': 2}.items()
  ]
  run, data = tmp_path / 'run', f'--data={tmp_path / "train.npz"}'
  assert cli.main(['pretrain', '--config=simclr_digits', data, f'--workdir={run}', *fields]) == 0
  if kind == 'unfinished':
    shutil.rmtree(max((run / 'checkpoints').iterdir(), key=lambda p: int(p.name)))
  if kind == 'no images':
    (tmp_path / 'train.npz').unlink()
  capsys.readouterr()
  assert cli.main(['report', f'--workdir={run}']) == 0
  page, printed = (run / 'report.html').read_text(), capsys.readouterr().out
  assert ('Unfinished: curves and embeddings are of step 2 of 3' in page) == (kind == 'unfinished')
  assert ('No augmented views and no embeddings' in page) == (kind == 'no images')
  assert ('class="banner"' in page) == (kind != 'no labels') == (printed[:5] != 'wrote')
  assert ('Embedding map' in page) == (kind != 'no images')
  assert '<summary>Recipe</summary>' in page and 'leave-one-out' not in page


def test_collapsed_embeddings_are_one_point():
  """Breaks if a report of a collapsed or diverged encoder, which is needed most, cannot be written."""
  for h in (np.ones((40, 6)), np.full((40, 6), np.nan)):
    xy = figures.tsne(h)
    assert xy.shape == (40, 2) and not xy.any()
    assert figures.embedding_map(xy, np.arange(40) % 2, NAMES).startswith('data:image/svg')


def test_unsorted_labels_are_drawn_in_order():
  """Breaks if the axis of labels is reversed, or the matrix is of the fewest labels."""
  rows = {'fine-tuned': [[90.0, None], [10.0, None]]}
  positions = texts(figures.label_curve(result(rows=rows, labels_per_class=[300, 1])))
  assert 'fine-tuned 90' in positions and positions['1'][0] < positions['300'][0]


def test_a_distillation_beside_the_pretraining(tmp_path):
  """Breaks if students in the directory of the run itself stop the report."""
  rows = {'teacher': [[50.0, 2.0], [380.0, None]], 'student': [[51.0, None], [0.078, None]]}
  seeds = [{'confusion': np.diag([1, 2, 3]).tolist()}] * 2
  entry = result(rows=rows, columns=['top-1 %', 'parameters, millions'], runs={'teacher': seeds, 'student': seeds})  # fmt: skip
  results.save(tmp_path, 'distillation', entry, {'step': 7, 'checkpoint': 'a', 'data': {}})
  assert 'Teacher and student' in ''.join(evaluations.sections(tmp_path, 7, NAMES))
  assert 'teacher 50.0, 380 million parameters' in texts(figures.teacher_student(entry, NAMES))


HOSTILE = [
  '</script><script>alert(1)</script>',
  '"><img src=x onerror=alert(1)>',
  "' onload='x",
  '$\\frac',
  'a\x00b\x1b[2J',
]


def test_names_from_files_are_text():
  """Breaks if a name in a result becomes HTML or a formula, or makes a figure that is no valid XML."""
  rows = {name: [[50.0, 1.0], [60.0, None]] for name in HOSTILE}
  fields = {'columns': HOSTILE[:2], 'labels_per_class': [1, 2], 'notes': {HOSTILE[0]: HOSTILE[1]}}
  seeds = [{'top1': 0.5, 'confusion': np.eye(5).tolist()}]
  runs = {'fine-tuned': {'1': seeds, '2': seeds}}
  one = result(rows=rows, **fields, class_names=HOSTILE, runs=runs)
  one['title'] = HOSTILE[0]
  page = evaluations._heading(one, 7) + ''.join(
    evaluations._evaluation('label_efficiency', one, ())
  )
  matrix = figures.confusion(np.eye(5), evaluations.printable(HOSTILE, 5))
  curve = figures.label_curve(one)
  assert '<script' not in page and '<img src=x' not in page and '\x00' not in page
  assert '&lt;script&gt;' in page and r'a\x00b\x1b[2J' in page
  for uri in (matrix, curve):
    ElementTree.fromstring(base64.b64decode(uri.split(',')[1]))
  assert '$\\frac' in texts(matrix) and '$\\frac 60' in texts(curve)


@pytest.mark.parametrize(
  'name, fields',
  [
    ('label_efficiency', {'columns': ['few']}),
    ('label_efficiency', {'runs': {'fine-tuned': []}}),
    ('finetune', {'labels_per_class': [3], 'runs': {'fine-tuned': {'3': [], '4': []}}}),
    ('distillation', {}),
    ('distillation', {'runs': {'student': [{}]}}),
  ],
)
def test_results_with_parts_that_do_not_fit(name, fields, tmp_path):
  """Breaks if an edited result makes the report impossible."""
  edited = result(rows={'teacher': [[1.0, None]], 'student': [[1.0, None]]}, **fields)
  (tmp_path / 'evaluation.json').write_text(json.dumps({name: edited, 'knn': result(rows={})}))
  page = ''.join(evaluations.sections(tmp_path, 7, NAMES))
  assert page.count('<h2>') == 2 and page.count('cannot be drawn') <= 1


def test_only_a_report_is_replaced(tmp_path):
  """Breaks if --out replaces a file of another kind, or refuses a report."""
  out = tmp_path / 'page.html'
  page.check_out(out)
  for content in ('', page.START + 'run</title>'):
    out.write_text(content)
    page.check_out(out)
  for content in ('{}', '<!doctype html><html lang="en"><title>Mine</title>'):
    out.write_text(content)
    with pytest.raises(ConfigError, match='is no report'):
      page.check_out(out)
  os.mkfifo(tmp_path / 'pipe.html')
  for name in ('config.json', 'checkpoints', 'no/page.html', 'pipe.html', '.html'):
    with pytest.raises(ConfigError, match='--out|no regular file'):
      page.check_out(tmp_path / name)
  assert out.read_text() == content


def test_long_curves_are_thinned():
  """Breaks if a long training makes a page that no browser opens, or thinning changes a curve."""
  points = np.stack([np.arange(1, 10_001), np.arange(1, 10_001) * 2.0], 1)
  thinned = figures._thinned(points)
  assert thinned.shape == (1000, 2)
  np.testing.assert_allclose(thinned[:, 1], 2 * thinned[:, 0])
  assert thinned[0, 0] == 5.5 and thinned[-1, 0] == 9995.5
  assert figures._thinned(points[:1000]) is not None and len(figures._thinned(points[:999])) == 999
  odd = figures._thinned(points[:1001])
  assert len(odd) == 1000 and odd[:, 0].sum() == pytest.approx(sum(range(1, 1002)), rel=0.01)
