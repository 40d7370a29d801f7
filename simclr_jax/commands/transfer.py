"""evaluate the features on other data sets

Example:
  simclr-jax transfer --workdir=runs/c10 --to=cifar100,dtd,my_labelled_photographs

Logistic regression (L-BFGS, L2 strength chosen from 45 values on a validation split) on the features, on raw pixels and
on the features of the untrained encoder; with --finetune, also fine-tuning with all labels. As published, the metric is
mean accuracy per class for Pets, Flowers, Caltech-101 and Aircraft, mAP for VOC 2007, and top-1 for other data sets.
Without a test split, a fifth of each class is held out. Data sets that are not available are reported as "missing"; if
all are, the exit code is 1.
"""

import argparse
import functools
import pathlib
import re

from simclr_jax import config as recipes
from simclr_jax.commands import finetune, options
from simclr_jax.runtime.text import printable

RECIPE = 'finetune_small'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser)
  parser.add_argument(
    '--to',
    required=True,
    type=options.dataset_list,
    metavar='DATASET,...',
    help='data sets, as for --data of pretrain',
  )
  parser.add_argument('--data-dir', default='', metavar='DIR', help='data_dir of TFDS')
  parser.add_argument('--finetune', action='store_true', help='also fine-tune on each data set')
  parser.add_argument(
    '--config', metavar='RECIPE', help=f'recipe for --finetune (default: {RECIPE})'
  )
  options.baselines(
    parser, 'also raw pixels and the untrained encoder; with --finetune, training from scratch'
  )
  options.out(parser)


def check(args: argparse.Namespace) -> None:
  """Checks the arguments, the recipe and its fields."""
  if args.overrides and not args.finetune:
    args.parser.error('--config.FIELD=VALUE needs --finetune')
  if args.config and not args.finetune:
    args.parser.error('--config has no effect without --finetune')
  if args.data_dir and all(d == 'digits' or pathlib.Path(d).exists() for d in args.to):
    args.parser.error('--data-dir has no effect: no data set of --to is one of TFDS')
  if args.finetune:
    options.check_folder(f'--workdir={args.workdir}', args.workdir / 'transfer')
  args.config = args.config or RECIPE
  finetune.check_fields(args.config, args.overrides, finetune.RESERVED)


def run(args: argparse.Namespace) -> int:
  """Evaluates on each data set; prints and saves the table."""
  import sys

  from simclr_jax import run_config
  from simclr_jax.commands import common
  from simclr_jax.errors import ExitCode
  from simclr_jax.evaluate import results

  source = run_config.load(args.workdir)
  results.check(args.workdir, args.out)
  encoders = common.encoders(args.workdir, args.baselines)
  pixels = {'raw pixels': None} if args.baselines else {}
  starts = {'from scratch': ''} if args.baselines else {}
  starts = {**starts, 'fine-tuned': str(args.workdir)} if args.finetune else {}
  columns = [*pixels, *encoders, *starts]
  trainings = f' and {len(starts)} trainings' if starts else ''
  print(
    f'transfer to {len(args.to)} data set{"s" * (len(args.to) > 1)}: {len(pixels) + len(encoders)} sweeps of logistic regression{trainings} '
    'on each',
    flush=True,
  )
  table = _Table(columns)
  for dataset in dict.fromkeys(args.to):
    print(f'\n{printable(dataset)}', flush=True)
    name = _short_name(dataset, table.rows)
    _evaluate(args, source, dataset, name, {**pixels, **encoders}, starts, table)
  if not table.data:
    print('simclr-jax: error: no data set of --to could be evaluated', file=sys.stderr)
    return ExitCode.ERROR
  about = {**common.checkpoint(encoders['pretrained']), 'data': table.data}
  results.save(args.workdir, 'transfer', table.result(), about, args.out)
  return 0


class _Table:
  """The rows of the table as far as they are known."""

  def __init__(self, columns):
    self.columns = columns
    self.rows, self.intervals, self.notes = {}, {}, {}
    self.chance, self.test_images, self.images, self.data = {}, {}, {}, {}

  def add(self, row, scores, note, task=None):
    """Adds a row: column -> metric, 0 to 1; a note, or ''; `transfer.Task`, None if the data set is missing."""
    from simclr_jax.evaluate import metrics, results, transfer

    percent = {c: 100 * score for c, score in scores.items()}
    self.rows[row] = [[percent.get(c), None] for c in self.columns]
    notes = [note] if note else []
    if task:
      self.images[row] = [len(task.train), len(task.test)]
      self.test_images[row] = len(task.test)
    if task and task.metric != transfer.MAP:
      labels = task.truth[1]
      n = len(labels) if task.metric == 'top-1' else metrics.effective_images(labels)
      ends = {c: results.interval(p, n) for c, p in percent.items()}
      self.intervals[row] = [ends.get(c) for c in self.columns]
      self.chance[row] = results.chance(labels, task.test.classes)
      for own in (('raw pixels', 'untrained', 'pretrained'), ('from scratch', 'fine-tuned')):
        known = {c: (percent[c], ends[c]) for c in own if c in percent}
        notes += [f'{k}: {v}' for k, v in results.comparison(known).items()]
    if notes:
      self.notes[row] = '; '.join(notes)

  def result(self):
    """The result, see `evaluate.results`."""
    fine_tuned = ' and fine-tuning' * ('fine-tuned' in self.columns)
    return {
      'title': f'Transfer: logistic regression on frozen features{fine_tuned}, %',
      'columns': self.columns,
      'rows': self.rows,
      'interval': self.intervals,
      'test_images': self.test_images,
      'chance': self.chance,
      'notes': self.notes,
      'settings': {'images': self.images},
    }


def _short_name(dataset, rows):
  """The last part of a path that is not a version; the entire path, if there is already a row of this name."""
  local = pathlib.Path(dataset)
  path = pathlib.PurePosixPath(str(local.resolve()) if local.is_dir() else dataset.rstrip('/'))
  short = path.parent.name if re.fullmatch(r'\d+\.\d+\.\d+', path.name) else path.name
  return dataset if not short or any(row.startswith(f'{short} (') for row in rows) else short


def _evaluate(args, source, dataset, short, encoders, starts, table):
  """Evaluates on one data set and adds the row to the table."""
  from simclr_jax.commands import common
  from simclr_jax.errors import ConfigError
  from simclr_jax.evaluate import transfer
  from simclr_jax.runtime import distributed

  row = f'{short} ({transfer.metric(dataset)})'
  channels = source.data.channels
  try:
    task = distributed.run_on_all(lambda: transfer.load(dataset, args.data_dir, channels))
  except ConfigError as error:
    table.add(row, {}, f'missing: {error}')
    print(f'missing: {printable(error)}', flush=True)
    return
  config = recipes.load('simclr_images', task.location)
  common.describe(config, task.train, task.test)
  real = {name: e for name, e in encoders.items() if e}
  try:
    common.announce(
      f'features of {len(encoders)} rows', common.embedding_seconds(real, task.train, task.test)
    )
    scores, notes = _linear(encoders, task)
    if starts and task.metric == transfer.MAP:
      notes.append('not fine-tuned: images have several labels')
    else:
      for column, start in starts.items():
        scores[column], unfitted = _fine_tuned(args, source, short, task, start)
        notes += [f'{column}: {text}' for text in unfitted]
  except ConfigError as error:  # the results on the other data sets are not lost
    table.add(row, {}, f'not evaluated: {error}')
    print(f'not evaluated: {printable(error)}', flush=True)
    return
  row = f'{short} ({task.metric})'
  table.add(row, scores, '; '.join(notes), task)
  parts = common.images(config.data, task.train, task.test)
  table.data |= {f'{row} {split}': part for split, part in parts.items()}
  print('  '.join(f'{c} {100 * scores[c]:.1f}' for c in scores), flush=True)


def _linear(encoders, task):
  """Column -> metric of logistic regression, and a note about fits that did not converge, if there are any."""
  from simclr_jax.evaluate import lbfgs, transfer
  from simclr_jax.runtime.progress import Bar

  unfinished: dict[str, int] = {}
  fits = 2 * len(lbfgs.SWEEP)
  scores: dict[str, float] = {}
  for name, encoder in encoders.items():
    most = fits if encoder else fits // transfer.PIXEL_SWEEP
    with Bar(most, f'logistic regression on {name}', 'fit') as bar:
      scores |= transfer.linear({name: encoder}, task, functools.partial(_show, bar), unfinished)
  rows = ', '.join(unfinished)
  note = f'L-BFGS stopped after {lbfgs.STEPS} steps, before convergence: {rows}'
  return scores, [note] * bool(unfinished)


def _show(bar, _, fits):
  """Moves the bar to this number of fits."""
  bar.to(fits)


def _fine_tuned(args, source, short, task, start):
  """The metric after fine-tuning with all labels, from the run `start`, or if it is '', from scratch, and notes."""
  from simclr_jax import downstream
  from simclr_jax.runtime import paths

  fields = {**task.location, 'data.test_split': '', **args.overrides}
  recipe = downstream.recipe(args.config, source, fields)
  name = re.sub(r'[^\w .+=%@-]+', '-', short).strip(' .-')[:80] or 'data'
  folder = args.workdir / 'transfer' / (name if start else f'{name}-scratch')
  start = start and str(paths.absolute(paths.path(start)))
  test = downstream.all_labels(
    folder, recipe, task.train, task.test, start=start, command=args.command,
    least_epochs=downstream.least_epochs(args.config, args.overrides),
  )  # fmt: skip
  metric = test['mean_per_class' if task.metric == 'mean per class' else 'top1']
  return metric, downstream.unfitted([test])
