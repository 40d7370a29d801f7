"""measure the features on other data sets

Example:
  simclr-jax transfer --workdir=runs/c10 --to=cifar100,dtd,my_labelled_photographs --baselines

Logistic regression (L-BFGS, L2 strength chosen from 45 values on a validation split) and, with --finetune, also
fine-tuning with all labels. The metric of Pets, Flowers, Caltech-101 and Aircraft is the mean accuracy per class, as
published, that of VOC 2007 is mAP, of all others top-1. Data sets that are not available are reported as "missing".
"""

import pathlib
import re

from simclr_jax import config as recipes
from simclr_jax.commands import options


def add_arguments(parser):
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


def check(args):
  """Finds errors in the arguments, the recipe and its fields."""
  if args.overrides and not args.finetune:
    args.parser.error('--config.FIELD=VALUE needs --finetune')
  recipes.load(args.config, args.overrides)


def run(args) -> int:
  """Evaluates, prints and saves the table."""
  from simclr_jax.commands import common
  from simclr_jax.evaluate import results

  source = recipes.of_run(args.workdir)
  encoders = common.encoders(args.workdir, args.baselines)
  pixels = {'raw pixels': None} if args.baselines else {}
  starts = {'from scratch': ''} if args.baselines else {}
  starts = {**starts, 'fine-tuned': str(args.workdir)} if args.finetune else {}
  columns = [*pixels, *encoders, *starts]
  rows, notes, sizes = {}, {}, {}
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
  """The last part of a path that is not a version; all of it, if there is a row of that name already."""
  path = pathlib.PurePosixPath(dataset.rstrip('/'))
  short = path.parent.name if re.fullmatch(r'\d+\.\d+\.\d+', path.name) else path.name
  return dataset if any(row.startswith(f'{short} (') for row in rows) else short


def _evaluate(args, source, dataset, short, encoders, starts):
  """One data set: the name of its row, metric by column, a note, and the numbers of images (None: missing)."""
  from simclr_jax.errors import ConfigError
  from simclr_jax.evaluate import transfer
  from simclr_jax.runtime import distributed

  try:
    task = distributed.run_on_all(lambda: transfer.load(dataset, args.data_dir))
  except ConfigError as error:
    return f'{short} ({transfer.metric(dataset)})', {}, f'missing: {error}', None
  metrics, note = transfer.linear(encoders, task), ''
  if starts and task.metric == transfer.MAP:
    note = 'not fine-tuned: it has several labels per image'
  else:
    for column, start in starts.items():
      metrics[column] = _fine_tuned(args, source, short, task, start)
  return f'{short} ({task.metric})', metrics, note, [len(task.train), len(task.test)]


def _fine_tuned(args, source, short, task, start):
  """The metric after training with all labels, from the run `start` or ('') from scratch."""
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
