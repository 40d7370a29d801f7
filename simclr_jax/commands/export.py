"""export the encoder weights

The folder contains variables/, an Orbax checkpoint of params and batch_stats, and encoder.json with architecture,
preprocessing and provenance. docs/export.md shows how to read them without this package.
"""

import argparse

from simclr_jax.commands import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser)
  parser.add_argument('--to', choices=('orbax',), default='orbax', help='export format')
  parser.add_argument(
    '--out', required=True, type=options.path, metavar='DIR', help='output folder, new or empty'
  )


def run(args: argparse.Namespace) -> int:
  """Writes the folder."""
  from simclr_jax import runs
  from simclr_jax.commands import common
  from simclr_jax.interop import orbax

  common.recipe_of_run(args.workdir, args.overrides)
  orbax.export(runs.load_encoder(args.workdir), args.out)
  print(f'wrote {args.out}')
  return 0
