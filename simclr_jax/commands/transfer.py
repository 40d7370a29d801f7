"""evaluate the features on other data sets

Example:
  simclr-jax transfer --workdir=runs/c10 --to=cifar100,dtd,my_labelled_photographs --baselines

Logistic regression (L-BFGS, L2 strength chosen from 45 values on a validation split); with --finetune, also
fine-tuning with all labels. As published, the metric is mean accuracy per class for Pets, Flowers, Caltech-101 and
Aircraft, mAP for VOC 2007, and top-1 for other data sets. Data sets that are not available are reported as "missing".
"""

import argparse
import pathlib
import re

from simclr_jax import config as recipes
from simclr_jax.commands import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser)
  parser.add_argument(
    '--to',
    required=True,
    type=options.string_list,
    metavar='DATASET,...',
    help='data sets, as for --data of pretrain',
  )
  parser.add_argument('--data-dir', default='', metavar='DIR', help='data_dir of TFDS')
  parser.add_argument('--finetune', action='store_true', help='also fine-tune on each data set')
  parser.add_argument(
    '--config', metavar='RECIPE', default='finetune_small', help='recipe for --finetune'
  )
  options.baselines(
    parser, 'also raw pixels and the untrained encoder; with --finetune, training from scratch'
  )


def check(args: argparse.Namespace) -> None:
  """Checks the arguments, the recipe and its fields."""
  if args.overrides and not args.finetune:
    args.parser.error('--config.FIELD=VALUE needs --finetune')
  recipes.load(args.config, args.overrides)


def run(args: argparse.Namespace) -> int:
  """Evaluates on each data set; prints and saves the table."""
  from simclr_jax import run_config
  from simclr_jax.commands import common
  from simclr_jax.evaluate import results

  source = run_config.load(args.workdir)
  encoders = common.encoders(args.workdir, args.baselines)
  pixels = {'raw pixels': None} if args.baselines else {}
  starts = {'from scratch': ''} if args.baselines else {}
  starts = {**starts, 'fine-tuned': str(args.workdir)} if args.finetune else {}
  columns = [*pixels, *encoders, *starts]
  rows: dict[str, list[list[float | None]]] = {}
  notes, sizes = {}, {}
  for dataset in args.to:
    print(f'\n{dataset}', flush=True)
    name, metrics, note, size = _evaluate(
      args, source, dataset, _short_name(dataset, rows), {**pixels, **encoders}, starts
    )
    rows[name] = [[100 * metrics[c], None] if c in metrics else [None, None] for c in columns]
    if note:
      notes[name] = note
      print(note, flush=True)
    if size:
      sizes[name] = size
      print('  '.join(f'{c} {100 * metrics[c]:.1f}' for c in metrics), flush=True)
  result = {
    'title': 'Transfer: logistic regression on frozen features, %',
    'columns': columns,
    'rows': rows,
    'notes': notes,
    'settings': {'images': sizes},
  }
  step = encoders['pretrained'].provenance['step']
  results.save(args.workdir, 'transfer', result, step)
  return 0


def _short_name(dataset, rows):
  """The last part of a path that is not a version; the entire path, if there is already a row of this name."""
  path = pathlib.PurePosixPath(dataset.rstrip('/'))
  short = path.parent.name if re.fullmatch(r'\d+\.\d+\.\d+', path.name) else path.name
  return dataset if any(row.startswith(f'{short} (') for row in rows) else short


def _evaluate(args, source, dataset, short, encoders, starts):
  """Evaluates on one data set.

  Returns:
    The name of the row; column -> metric, 0 to 1; a note, or ''; numbers of training and test images, None if the data
    set is missing.
  """
  from simclr_jax.errors import ConfigError
  from simclr_jax.evaluate import transfer
  from simclr_jax.runtime import distributed

  try:
    task = distributed.run_on_all(lambda: transfer.load(dataset, args.data_dir))
  except ConfigError as error:
    return f'{short} ({transfer.metric(dataset)})', {}, f'missing: {error}', None
  metrics, note = transfer.linear(encoders, task), ''
  if starts and task.metric == transfer.MAP:
    note = 'not fine-tuned: images have several labels'
  else:
    for column, start in starts.items():
      metrics[column] = _fine_tuned(args, source, short, task, start)
  return f'{short} ({task.metric})', metrics, note, [len(task.train), len(task.test)]


def _fine_tuned(args, source, short, task, start):
  """The metric after fine-tuning with all labels, from the run `start`, or if it is '', from scratch."""
  from simclr_jax import downstream
  from simclr_jax.runtime import paths

  fields = {**task.location, 'data.test_split': '', **args.overrides}
  recipe = downstream.recipe(args.config, source, fields)
  name = re.sub(r'[:/]+', '-', short.strip('/'))
  folder = args.workdir / 'transfer' / (name if start else f'{name}-scratch')
  start = start and str(paths.absolute(paths.path(start)))
  test = downstream.all_labels(
    folder, recipe, task.train, task.test, start=start, command=args.command
  )
  return test['mean_per_class' if task.metric == 'mean per class' else 'top1']
