"""classify the test images by their nearest training images

Each of the k nearest neighbours votes with weight exp(s / temperature), where s is its cosine similarity. Raw pixels and
the untrained encoder are evaluated in the same way. Needs labels.
The result is added to RUN/evaluation.json and to the report.
"""

import argparse

from simclr_jax.commands import options

DETAILS = options.DATA_OVERRIDE


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser, 'a run, or an exported encoder')
  options.other_data(parser)
  parser.add_argument(
    '--k', type=options.positive, default=200, help='number of nearest neighbours'
  )
  parser.add_argument(
    '--temperature',
    type=options.above_zero,
    default=0.1,
    help='temperature of the neighbour weights',
  )
  parser.add_argument(
    '--features',
    choices=('h', 'z'),
    default='h',
    help='features: h, of the encoder, or z, of the projection head, as in the CIFAR-10 demo of MoCo',
  )
  options.baselines(
    parser, 'also evaluate raw pixels and the untrained encoder (default: with --features=h)', None
  )
  options.out(parser)


def check(args: argparse.Namespace) -> None:
  """Checks the arguments."""
  if args.features == 'z' and args.baselines:
    args.parser.error(
      '--features=z has no baselines, because raw pixels have no projection head: leave --baselines away'
    )
  if args.baselines is None:
    args.baselines = args.features == 'h'


def run(args: argparse.Namespace) -> int:
  """Evaluates; prints and saves the table."""
  import numpy as np

  from simclr_jax import runs
  from simclr_jax.commands import common
  from simclr_jax.evaluate import knn, results

  config = common.recipe_of_run(args.workdir, args.overrides, args.data)
  results.check(args.workdir, args.out)
  if args.features == 'z':
    encoders = {'pretrained': runs.load_projection(args.workdir)}
  else:
    encoders = common.encoders(args.workdir, args.baselines)
  train, test = common.labelled(config)
  k = min(args.k, len(train))
  if k < args.k:
    print(f'k = {k}: there are only {k:,} training images')
  smallest = int(np.bincount(train.labels)[np.unique(train.labels)].min())
  if k > smallest:
    print(
      f'k = {k} is more than the {smallest:,} training images of the smallest class: a lower --k may suit them better'
    )
  embeds = common.features(encoders, args.baselines, train, test)
  common.announce(
    f'kNN of {len(test):,} among {len(train):,} images, features of {", ".join(embeds)}',
    common.embedding_seconds(encoders, train, test),
  )
  rows = {}
  for name, embed in embeds.items():
    top1 = knn.accuracy(*embed(train), *embed(test), k, args.temperature)
    rows[name] = [[100 * top1, None]]
  settings = {
    'features': args.features,
    'k': k,
    'temperature': args.temperature,
    'bank': len(train),
    'queries': len(test),
  }
  result = {
    'title': f'kNN{" on z" if args.features == "z" else ""}, k = {k}, temperature {args.temperature:g}',
    'columns': ['top-1 %'],
    'rows': rows,
    'settings': settings,
  }
  result = results.assess(result, test.labels, classes=test.classes)
  about = common.about(config, encoders['pretrained'], train, test)
  results.save(args.workdir, 'knn' if args.features == 'h' else 'knn z', result, about, args.out)
  return 0
