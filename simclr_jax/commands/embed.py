"""extract embeddings

Example:
  simclr-jax embed --workdir=runs/c10 --data=my_photographs --out=features.parquet

Without --data, the images of the run are used. The file contains features, float32 [n, d], names, and if they are known,
labels and names of the classes; a .npy file contains features only. Rerun an interrupted command to resume it.
"""

import argparse

from simclr_jax.commands import options

DETAILS = options.DATA_OVERRIDE


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser, 'a run, or an exported encoder')
  options.data(parser, required=False)
  parser.add_argument(
    '--split', choices=('train', 'test'), default='train', help='split of the data'
  )
  parser.add_argument(
    '--out',
    required=True,
    type=options.path,
    metavar='FILE',
    help='.npz, .npy, .csv or .parquet',
  )
  parser.add_argument(
    '--raw-names',
    action='store_true',
    help='in .csv, write names that begin with =, +, - or @ as they are; spreadsheet programs execute them',
  )


def run(args: argparse.Namespace) -> int:
  """Writes the file."""
  from simclr_jax import data, runs
  from simclr_jax.commands import common
  from simclr_jax.errors import ConfigError
  from simclr_jax.evaluate import embed
  from simclr_jax.runtime import distributed

  if args.raw_names and args.out.suffix != '.csv':
    raise ConfigError('--raw-names has an effect on .csv only')
  embed.check(args.out)
  encoder = runs.load_encoder(args.workdir)
  if args.data:
    common.check_overrides(args.overrides)
    recipe = common.recipe_with_data('simclr_images', args.data, args.overrides)
  else:
    recipe = common.recipe_of_run(args.workdir, args.overrides)
  splits = distributed.run_on_all(lambda: data.load_splits(recipe.data))
  common.describe(recipe, *splits)
  dataset = splits[0] if args.split == 'train' else splits[1]
  if dataset is None:
    dataset = data.load(recipe.data, args.split)  # explains what is missing
  if not len(dataset):
    raise ConfigError(f'the {args.split} split contains no images')
  data.check_same({'checksum of the images': dataset})
  embed.embed(encoder, dataset, args.out, args.raw_names)
  return 0
