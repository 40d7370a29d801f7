"""write an HTML report of a run

A self-contained file with curves, augmented views, a map of the embeddings, nearest neighbours, evaluations, recipe and
versions.
"""

import argparse

from simclr_jax.commands import options

DETAILS = options.DATA_OVERRIDE


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser)
  parser.add_argument(
    '--out', type=options.path, metavar='FILE', help='output file (default: RUN/report.html)'
  )


def run(args: argparse.Namespace) -> int:
  """Writes the report."""
  from simclr_jax.commands import common
  from simclr_jax.report import page

  out = args.out or args.workdir / 'report.html'
  config = common.recipe_of_run(args.workdir, args.overrides)
  for sentence in page.write(args.workdir, config, out):
    print(sentence)
  print(f'wrote {out}')
  return 0
