"""classify the test images by their nearest training images

Each of the k nearest neighbours votes with weight exp(s / temperature), where s is its cosine similarity. Needs labels.
The result is added to RUN/evaluation.json and to the report.
"""

import argparse

from simclr_jax.commands import options

DETAILS = options.DATA_OVERRIDE


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser)
  parser.add_argument(
    '--k', type=options.positive, default=200, help='number of nearest neighbours'
  )
  parser.add_argument(
    '--temperature',
    type=options.above_zero,
    default=0.1,
    help='temperature of the neighbour weights',
  )
  options.baselines(parser, 'also evaluate raw pixels and the untrained encoder')


def run(args: argparse.Namespace) -> int:
  """Evaluates; prints and saves the table."""
  from simclr_jax.commands import common
  from simclr_jax.evaluate import knn, results

  train, test = common.labelled(common.recipe_of_run(args.workdir, args.overrides))
  encoders = common.encoders(args.workdir, args.baselines)
  rows = {}
  for name, embed in common.features(encoders, args.baselines).items():
    top1 = knn.accuracy(*embed(train), *embed(test), args.k, args.temperature)
    rows[name] = [[100 * top1, None]]
  settings = {
    'k': args.k,
    'temperature': args.temperature,
    'bank': len(train),
    'queries': len(test),
  }
  result = {
    'title': f'kNN, k = {args.k}, temperature {args.temperature:g}',
    'columns': ['top-1 %'],
    'rows': rows,
    'settings': settings,
  }
  results.save(args.workdir, 'knn', result, encoders['pretrained'].provenance['step'])
  return 0
