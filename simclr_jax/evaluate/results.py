"""Results of evaluations: prints them as tables and saves them in `evaluation.json` of a run.

A result is plain data. Percentages are from 0 to 100.

  title       str
  columns     names of the columns
  rows        name -> for each column [mean, standard deviation], where the deviation, or both, may be None

Optional:

  interval    like `rows`: for each column the 95 % interval [low, high] of the mean, or None; see `interval`
  test_images int; if every row has a test set of its own, row -> int
  chance      {'majority', 'uniform'}: accuracy in % of always answering the most frequent class of the test images,
              and of answering one of the C classes at random; if every row has its own test set, row -> these
  notes       name -> sentence, such as a row and what is special about it
  settings    what was done: numbers of images, steps, learning rates, ...
  runs        the result of every single training
  class_names of the test images, if `runs` has confusion matrices

`save` adds:

  name        str, of the evaluation, such as 'knn'
  step        int, of the checkpoint
  checkpoint  int, checksum of the checkpoint
  data        'train' and 'test' -> {'fingerprint', 'images', 'split', 'dir'}; if every row has its own images,
              'ROW train' and 'ROW test'
  checksum    int, of all other entries, which shows whether somebody edited a number

Results of old versions may have only `title`, `columns`, `rows`, `step`, `notes`, `settings` and `runs`.
"""

import contextlib
import json
import math
import pathlib
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed, files, paths
from simclr_jax.runtime.checksum import crc32
from simclr_jax.runtime.text import printable
from simclr_jax.validation import check_json

Result = dict[str, Any]
FILE = 'evaluation.json'
LOCK = '.evaluation.lock'
WIDTH = 100  # of a printed table, in characters
CHANCE = {'majority': float, 'uniform': float}
RUN = {'top1?': float, 'parameters?': float, 'confusion?': [[float]]}
SHAPE = {  # of a result in the file, for `check_json`
  'title': str, 'columns': [str], 'rows': {str: [[(float, None)]]}, 'interval?': {str: [([float], None)]},
  'test_images?': (int, {str: int}), 'chance?': {str: (float, CHANCE)}, 'notes?': {str: str},
  'settings?': {str: object}, 'runs?': {str: object}, 'class_names?': [str], 'labels_per_class?': [int],
  'name?': str, 'step?': int, 'checkpoint?': (int, str), 'checksum?': int,
  'data?': {str: {'fingerprint?': int, 'images?': int, 'split?': str, 'dir?': str}},
}  # fmt: skip


def load(workdir: pathlib.Path, file: pathlib.Path | None = None) -> dict[str, Result]:
  """The saved results of a run; empty if there are none.

  Args:
    workdir: directory of the run.
    file: a file with results (default: `evaluation.json` of the run).

  Returns:
    Results by key. The key is the name of the evaluation; results of the same name on other data have the key
    'NAME, SPLIT (FINGERPRINT)'.

  Raises:
    ConfigError: the file is damaged.
  """
  path = file or workdir / FILE
  try:
    entries = files.read_json(path)
    check_json(entries, {str: SHAPE}, f'{path} is damaged: it')
    for name, result in entries.items():
      problem = _inconsistency(name, result)
      if problem:
        raise ConfigError(f'{path} is damaged: {name}: {problem}')
    return entries
  except FileNotFoundError:
    return {}
  except ConfigError as error:
    raise ConfigError(f'{error}; restore the file, or delete the file and evaluate again') from None


def _inconsistency(name, result) -> str:
  """What parts of a result do not fit together; empty if they do."""
  if result.get('checksum') not in (None, _checksum(result)):
    return 'it was edited, its checksum does not match'
  if name.split(',')[0] != result.get('name', name).split(',')[0]:
    return f'it is the result {result["name"]!r}'
  columns, rows = len(result['columns']), result['rows']
  for row, cells in rows.items():
    ends = intervals(result, row)
    if len(cells) != columns or any(len(cell) != 2 for cell in cells):
      return f'the row {row!r} does not have {columns} cells of two numbers'
    if len(ends) != columns or any(e is not None and len(e) != 2 for e in ends):
      return f'the row {row!r} does not have {columns} intervals'
  levels = result.get('chance') or {}
  single = levels.keys() == CHANCE.keys()
  if levels and single == isinstance(result.get('test_images'), dict):
    return 'chance is not that of the test images'
  for level in [levels] if single else levels.values():
    if not isinstance(level, dict) or not 0 < level['uniform'] <= 100:
      return 'chance is not from 0 to 100 %'
  counts = result.get('labels_per_class', [1] * columns)
  if len(counts) != columns or any(n < 1 for n in counts):
    return f'labels_per_class are not {columns} positive numbers'
  if result.get('name', name) == 'distillation' and not {'teacher', 'student'} <= rows.keys():
    return 'teacher or student is missing'
  return _inconsistent_runs(result.get('runs', {}))


def _checksum(result):
  content = {name: value for name, value in result.items() if name != 'checksum'}
  return crc32(json.dumps(content, sort_keys=True))


def _inconsistent_runs(runs) -> str:
  """What is wrong with the results of single trainings: of each row a list, or lists by number of labels."""
  classes = set()
  for row, tests in runs.items():
    for part in tests.values() if isinstance(tests, dict) else [tests]:
      check_json(part, [RUN], f'the runs of {row!r}')
      for matrix in (test['confusion'] for test in part if 'confusion' in test):
        classes |= {len(matrix), *map(len, matrix)}
  return 'the confusion matrices are not square or of several sizes' if len(classes) > 1 else ''


def check(workdir: pathlib.Path, file: pathlib.Path | None = None) -> None:
  """Raises ConfigError if results cannot be saved: call this function before an evaluation.

  Args:
    workdir, file: as for `save`.
  """
  load(workdir, file)
  path = file or workdir / FILE
  if paths.is_remote(path):
    return
  try:
    with tempfile.TemporaryFile(dir=path.parent):
      pass
  except OSError as error:
    fix = 'name another --out=FILE' if file else 'save the result elsewhere with --out=FILE'
    raise ConfigError(f'{path.parent} cannot be written ({error.strerror}): {fix}') from None


def save(
  workdir: pathlib.Path,
  name: str,
  result: Result,
  about: Mapping[str, Any],
  file: pathlib.Path | None = None,
) -> Result:
  """Prints the table of a result, then saves the result. All processes must call it.

  An earlier result of the same name on the same data is replaced. Results on other data are kept. Several processes may
  save results of a run at the same time.

  Args:
    workdir: directory of the run.
    name: name of the evaluation.
    result: the result.
    about: the fields that are added to the result: `step`, `checkpoint`, `data`.
    file: the file to save it in (default: `evaluation.json` of the run).

  Returns:
    The result with these fields.

  Raises:
    ConfigError: the file is damaged.
    OSError: the file cannot be written.
  """
  result = _finite({**result, 'name': name, **about})
  result['checksum'] = _checksum(result)
  with contextlib.suppress(OSError, ValueError):  # a broken stdout must not lose the result
    print('\n' + table(result), flush=True)
  path, failure = file or workdir / FILE, ''
  if distributed.is_main_process():
    try:
      with contextlib.ExitStack() as stack:
        if not paths.is_remote(path):
          with contextlib.suppress(OSError):  # better without a lock than not saved
            stack.enter_context(files.locked(path.with_name(LOCK)))
        files.write_json(path, _merged(load(workdir, file), name, result))
    except (OSError, ConfigError) as error:
      failure = f'the table was not saved: {error}'
  failure = distributed.gather(failure)[0]
  if failure:
    raise OSError(failure)
  return result


def _finite(value):
  """Plain data as JSON represents it: keys are strings, and numbers that are not finite are None."""
  if isinstance(value, dict):
    return {str(k): _finite(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _merged(entries, name, result):
  """The saved results with a new one, which replaces that of the same name and data."""
  old = entries.get(name)
  if old and 'data' not in old:  # saved by an old version: on which data is unknown
    entries = {**entries, f'{name}, data not recorded': {**old, 'name': name}}
    old = None
  key = name if old is None or _same_data(old, result) else f'{name}, {_data_of(result)}'
  return {**entries, key: result}


def _same_data(old, new):
  """Whether the new result is on the data of the old one, or on that and more."""
  return _fingerprints(old).items() <= _fingerprints(new).items()


def _fingerprints(result):
  return {split: about.get('fingerprint') for split, about in (result.get('data') or {}).items()}


def _data_of(result):
  """The test images as text, such as 'flowers/test (0a1b2c3d)'; the fingerprint includes the training images."""
  parts = result['data'].values()
  number = 0
  for part in parts:
    number = (31 * number + int(part.get('fingerprint') or 0)) % 2**32
  folders = dict.fromkeys(pathlib.PurePosixPath(str(p.get('dir', ''))).name for p in parts)
  return f'{_place(result) or "+".join(folders)} ({number:08x})'


def _place(result):
  """Folder and split of the test images, such as 'flowers/test'; '' if they are not recorded."""
  test = (result.get('data') or {}).get('test') or {}
  folder = pathlib.PurePosixPath(str(test.get('dir', ''))).name
  return '/'.join(str(x) for x in (folder, test.get('split')) if x)


def assess(
  result: Result,
  labels: np.ndarray,
  images: Sequence[float | None] | None = None,
  classes: int | None = None,
) -> Result:
  """Adds the number of test images, chance and 95 % intervals to a result on one test set, and compares its rows.

  Args:
    result: `rows` in %.
    labels: classes of the test images, int `[n]`.
    images: for each column, the number of images that its accuracies are means over; None: no accuracy. By default n
      for every column.
    classes: number of classes; None: of those that occur in `labels`.

  Returns:
    The result with `test_images`, `chance`, `interval` and, if a baseline is as good as the encoder, a note.
  """
  sizes = [len(labels)] * len(result['columns']) if images is None else images
  intervals = {
    name: [n and interval(mean, n) for (mean, _), n in zip(cells, sizes)]
    for name, cells in result['rows'].items()
  }
  added = {'test_images': len(labels), 'chance': chance(labels, classes), 'interval': intervals}
  notes = dict(result.get('notes', {}))
  for i, column in enumerate(result['columns']):
    if i and 'labels_per_class' not in result:  # other metrics than the first say the same
      break
    rows = {name: (cells[i][0], intervals[name][i]) for name, cells in result['rows'].items()}
    several = f', {column}' if len(result.get('labels_per_class', ())) > 1 else ''
    notes |= {name + several: sentence for name, sentence in comparison(rows).items()}
  return {**result, **added, 'notes': notes}


def comparison(accuracies: Mapping[str, tuple[float | None, Any]]) -> dict[str, str]:
  """A note if the pretrained encoder is not better than a baseline.

  Args:
    accuracies: row -> accuracy in %, and its interval [low, high] or None. 'fine-tuned' or 'pretrained' is compared
      with all other rows.

  Returns:
    The note; empty if the accuracy is above the interval of every baseline, or nothing can be compared.
  """
  own = next((row for row in ('fine-tuned', 'pretrained') if row in accuracies), None)
  known = {row: (mean, ends) for row, (mean, ends) in accuracies.items() if mean is not None}
  if own not in known or own is None:
    return {}
  mean, ends = known.pop(own)
  others = {row: m for row, (m, e) in known.items() if e is not None and mean <= e[1]}
  if not others or ends is None:
    return {}
  best = max(others, key=lambda row: others[row])
  return {
    'pretraining does not help here': f'{own} {mean:.1f} %, {best} {others[best]:.1f} %; the difference is '
    f'{"negative" if mean < others[best] else "not larger than the 95 % interval"}'
  }


def chance(labels: np.ndarray, classes: int | None = None) -> dict[str, float]:
  """`chance` of a result, see above; arguments as for `assess`."""
  counts = np.unique(labels, return_counts=True)[1]
  most = 100 * float(counts.max() / counts.sum())
  return {'majority': most, 'uniform': 100 / (classes or len(counts))}


def interval(percent: float | None, images: float) -> list[float] | None:
  """The 95 % Wilson interval of an accuracy.

  Args:
    percent: the accuracy, 0 to 100; None: unknown.
    images: number of test images.

  Returns:
    [low, high] in %; None if the accuracy is unknown.
  """
  if percent is None or not np.isfinite(percent):
    return None
  z, p = 1.959964, min(max(percent / 100, 0.0), 1.0)
  middle = p + z**2 / (2 * images)
  half = z * np.sqrt(p * (1 - p) / images + z**2 / (4 * images**2))
  low, high = ((middle + sign * half) / (1 + z**2 / images) for sign in (-1, 1))
  return [100 * max(float(low), 0.0), 100 * min(float(high), 1.0)]


def table(result: Result) -> str:
  """A result as plain text of at most 100 columns, if its names permit."""
  title = f'{titled(result)} (step {result.get("step", 0):,})'
  lines = [printable(line) for line in (title, *context(result))]
  cells = {
    printable(name): [cell(c[0], c[1], ends) for c, ends in zip(row, intervals(result, name))]
    for name, row in result['rows'].items()
  }
  first = max(map(len, cells), default=0)
  columns = list(map(printable, result['columns']))
  widths = [
    max(len(column), *(len(row[i]) for row in cells.values()), 8) + 2
    for i, column in enumerate(columns)
  ]
  start = 0
  while start < len(columns):
    end = start + 1
    while end < len(columns) and first + sum(widths[start : end + 1]) <= WIDTH:
      end += 1
    block = slice(start, end)
    lines += [_line('', columns[block], first, widths[block])]
    lines += [_line(name, row[block], first, widths[block]) for name, row in cells.items()]
    start = end
  notes = [printable(f'{name}: {text}') for name, text in result.get('notes', {}).items()]
  wrap: Any = {'subsequent_indent': '  ', 'break_long_words': False, 'break_on_hyphens': False}
  return '\n'.join(lines + [textwrap.fill(note, WIDTH, **wrap) for note in notes])


def _line(name, texts, first, widths):
  return f'{name:{first}}' + ''.join(f'{text:>{width}}' for text, width in zip(texts, widths))


def titled(result: Result) -> str:
  """The title of a result with folder and split of its test images."""
  place = _place(result)
  return result['title'] + f', {place}' * bool(place)


def intervals(result: Result, row: str) -> Sequence[Sequence[float] | None]:
  """The interval of each cell of a row, or None."""
  return result.get('interval', {}).get(row) or [None] * len(result['columns'])


def context(result: Result) -> list[str]:
  """Lines with the number of test images and chance."""
  images, levels = result.get('test_images'), result.get('chance') or {}
  if images is None:
    return []
  if isinstance(images, dict):
    return [
      f'{row}: {_context_text(n, levels.get(row), any(intervals(result, row)))}'
      for row, n in images.items()
    ]
  return [_context_text(images, levels, result.get('interval'))]


def _context_text(images, levels, has_interval):
  text = f'{images:,} test images'
  if levels:
    classes = round(100 / levels['uniform'])
    text += f'; chance {levels["majority"]:.1f} % (most frequent class), {levels["uniform"]:.2g} % (1 of {classes:,} classes)'
  return text + '; [95 % interval]' * bool(has_interval)


def cell(mean: float | None, std: float | None, ends: Sequence[float] | None = None) -> str:
  """A cell of the table.

  Args:
    mean: 'missing' is returned if it is None.
    std: standard deviation, or None.
    ends: the ends of the interval, or None.
  """
  if mean is None:
    return 'missing'
  text = f'{mean:.2g}' if std is None and ends is None and 0 < mean < 1 else f'{mean:.1f}'
  text += '' if std is None else f' ± {std:.1f}'
  return text if ends is None else f'{text} [{ends[0]:.1f}, {ends[1]:.1f}]'


def mean_and_std(values: Sequence[float]) -> list[float | None]:
  """[mean, standard deviation (n - 1)]; the deviation of a single value is None."""
  return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None]


def amount(labels: str) -> str:
  """`data.labels` as text: '1% of the labels', '2 labels per class'."""
  if '%' in labels:
    return f'{labels} of the labels'
  return f'{labels} label{"s" * (labels != "1")} per class'


def over_seeds(seeds: int) -> str:
  """The end of a title, such as ', mean over 5 seeds'; empty for one seed."""
  return f', mean over {seeds} seeds' if seeds > 1 else ''
