"""The evaluations of a run in its report."""

import pathlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from simclr_jax.evaluate import results
from simclr_jax.evaluate.results import Result
from simclr_jax.report import figures
from simclr_jax.report.markup import banner, figure, table, text
from simclr_jax.runtime import text as texts

MAX_CLASSES = 20  # more classes are not listed, since nobody could read them
FIRST = ('simclrv2', 'linear_sgd', 'knn')  # the order of the evaluations on the page


def sections(workdir: pathlib.Path, step: int, class_names: Sequence[str]) -> Iterator[str]:
  """All results of a run, and those of students in folders below.

  Args:
    workdir: of the run.
    step: of its checkpoint; results of other steps are marked.
    class_names: of the test images, for results that do not record them.
  """
  found = results.load(workdir)
  names = [result.get('name', key) for key, result in found.items()]
  if not found:
    command = f'simclr-jax knn --workdir={shlex.quote(str(workdir))}'
    yield (
      '<h2>Evaluations</h2><p>None yet. With labelled images, the quickest is '
      f'<code>{text(command)}</code>; <code>probe</code> and <code>finetune</code> take longer.</p>'
    )
  order = [FIRST.index(name) if name in FIRST else len(FIRST) for name in names]
  for _, name, result in sorted(zip(order, names, found.values()), key=lambda item: item[0]):
    yield _heading(result, step)
    yield _if_complete(_evaluation, name, result, class_names)
  for path in sorted(workdir.glob('*/evaluation.json')):
    yield from distillations(path.parent, class_names)


def _if_complete(draw: Callable[..., Iterable[str]], *args: Any) -> str:
  """The HTML `draw(*args)` of a result; a sentence if somebody edited the result so that its parts do not fit."""
  try:
    return ''.join(draw(*args))
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
    return banner('This result cannot be drawn, because parts of it were edited: evaluate again.')


def _evaluation(name: str, result: Result, class_names: Sequence[str]) -> Iterator[str]:
  """The table of an evaluation; with few labels also the accuracy by number of labels and by class."""
  if name == 'distillation':
    yield _distillation(result, class_names)
    return
  if name != 'label_efficiency' and 'labels_per_class' not in result:
    yield result_table(result)
    return
  caption = _error_bars(result)
  curve = figure(figures.label_curve(result), 'Accuracy against labels', '', caption)
  yield f'<div class="row">{result_table(result)}{curve}</div>'
  tests = result.get('runs', {})
  columns = list(tests.get('fine-tuned', {}))
  if columns:
    most = columns[int(np.argmax(result['labels_per_class']))]
    yield from per_class(tests, result.get('class_names', class_names), most)


def per_class(tests: Mapping[str, Any], class_names: Sequence[str], labels: str) -> Iterator[str]:
  """Accuracy per class and the confusion matrix of fine-tuning with the most labels.

  Args:
    tests: `downstream.Tests`.
    class_names: of the test images.
    labels: the column of `tests` to show.
  """
  counts = {
    name: np.sum([r['confusion'] for r in by_labels[labels]], axis=0)
    for name, by_labels in tests.items()
    if 'confusion' in by_labels.get(labels, [{}])[0]
  }
  if 'fine-tuned' not in counts or len(counts['fine-tuned']) > MAX_CLASSES:
    return
  names = printable(class_names, len(counts['fine-tuned']))
  rows = {
    name: [f'{100 * n[c, c] / n[c].sum():.1f}' if n[c].any() else 'no image' for n in counts.values()]
    for c, name in enumerate(names)
  }  # fmt: skip
  caption = f'Accuracy per class, %, with {results.amount(labels)}, over all seeds'
  matrix = figure(figures.confusion(counts['fine-tuned'], names), 'Confusion matrix', '',
                  'Fine-tuned: predictions (columns) by true class (rows), in % of the row.',
                  f'min-width: {30 * len(names)}px')  # fmt: skip
  yield f'<div class="row">{table(list(counts), rows, caption, "evaluation")}{matrix}</div>'


def distillations(workdir: pathlib.Path, class_names: Sequence[str]) -> Iterator[str]:
  """Teachers and students, if there are students in `workdir`."""
  for key, result in results.load(workdir).items():
    if result.get('name', key) == 'distillation':
      place = {**result, 'title': f'{result["title"]}, {workdir.name}/'}
      yield _heading(place, result.get('step', 0))
      yield _if_complete(_distillation, result, class_names)


def _distillation(result: Result, class_names: Sequence[str]) -> str:
  """The table of teacher and student, and their accuracy overall and per class."""
  students = result.get('runs', {}).get('student')
  classes = len(students[0]['confusion']) if students else 0
  names = printable(result.get('class_names', class_names), classes)
  names = names if classes <= MAX_CLASSES else []
  caption = 'Accuracy on held-out images' + (', overall and per class. ' if names else '. ')
  drawn = figure(figures.teacher_student(result, names), 'Teacher and student', '',
                 caption + _error_bars(result))  # fmt: skip
  return f'<div class="row">{result_table(result)}{drawn}</div>'


def _heading(result, step):
  """The heading of a result; it says if the result is not of the newest checkpoint."""
  of = result.get('step', 0)
  yours = '' if of == step else f'; the newest checkpoint is of step {step:,}'
  return f'<h2>{text(results.titled(result))} (step {of:,}{yours})</h2>'


def result_table(result: Result) -> str:
  """The table of a result with its test images, chance and notes."""
  rows = {
    name: [
      results.cell(c[0], c[1], ends) for c, ends in zip(cells, results.intervals(result, name))
    ]
    for name, cells in result['rows'].items()
  }
  lines = [f'<p class="context">{text(line)}.</p>' for line in results.context(result)]
  notes = [
    f'<p class="note">{text(name)}: {text(sentence)}.</p>'
    for name, sentence in result.get('notes', {}).items()
  ]
  drawn = table(result['columns'], rows, css='evaluation')
  return f'<div class="result">{drawn}{"".join(lines + notes)}</div>'


def _error_bars(result: Result) -> str:
  spread = any(std is not None for cells in result['rows'].values() for _, std in cells)
  return 'Error bars: one standard deviation over random subsets or seeds.' if spread else ''


def printable(class_names: Sequence[str], count: int) -> list[str]:
  """Names of the first classes, short and printable; the index of a class without a name."""
  names = [texts.printable(' '.join(n.split())) for n in class_names[:count]]
  names = [n if len(n) <= 18 else f'{n[:17]}…' for n in names]
  return names + [str(c) for c in range(len(names), count)]
