"""write an HTML report of a run

A self-contained file with evaluations, curves, diagnostics, wall-clock times, maps of the embeddings, kNN, duplicates,
nearest neighbours, augmented views, recipe and versions. It is also written without the images of the run.
"""

import argparse
import pathlib
from typing import TYPE_CHECKING

from simclr_jax.commands import options

if TYPE_CHECKING:
  import ml_collections

DETAILS = options.DATA_OVERRIDE


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser, 'a run, or an exported encoder')
  options.other_data(parser)
  parser.add_argument(
    '--out', type=options.path, metavar='FILE', help='output file (default: RUN/report.html)'
  )


def run(args: argparse.Namespace) -> int:
  """Writes the report."""
  from simclr_jax.commands import common

  config = common.recipe_of_run(args.workdir, args.overrides, args.data)
  write(args.workdir, config, args.out or args.workdir / 'report.html')
  return 0


def write(workdir: pathlib.Path, config: 'ml_collections.ConfigDict', out: pathlib.Path) -> None:
  """Writes a report, and prints what is missing and where it is; arguments and errors as for `page.write`."""
  from simclr_jax.report import page

  for sentence in page.write(workdir, config, out):
    print(sentence)
  print(f'wrote {out}')
