"""train an encoder without labels

Examples:
  simclr-jax pretrain --data=my_photographs
  simclr-jax pretrain --config=simclr_cifar10 --workdir=runs/c10 \\
      --config.epochs=200 --config.data.dir=$HOME/tensorflow_datasets

Without --config, a recipe is suggested by the number and size of the images, and printed. Folders are searched
recursively; sub-folders named train and test are the splits. Rerun the same command to resume from the latest
checkpoint.

`simclr-jax recipes` lists the built-in recipes. --config.FIELD=VALUE sets a field of the recipe, for instance
--config.batch_size=256, --config.model.depth=50, --config.augment.view1="moco_v2 | solarize(p=0.2)".
`simclr-jax fields` lists all fields.
"""

import argparse
import pathlib
import shlex

from simclr_jax import config as recipes
from simclr_jax.commands import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.data(parser, required=False)
  parser.add_argument(
    '--config', metavar='RECIPE', help='a built-in recipe, or the path of one; RECIPE:VARIANT'
  )
  parser.add_argument(
    '--workdir',
    type=options.path,
    metavar='RUN',
    help='run directory; resumed if it already contains a run (default: runs/NAME_OF_DATA)',
  )


def check(args: argparse.Namespace) -> None:
  """Checks the arguments, the recipe and its fields."""
  if not (args.data or args.config):
    args.parser.error('--data or --config is required')
  if not (args.data or args.workdir):
    args.parser.error('--workdir=RUN is required without --data')
  if args.config:
    recipes.load(args.config, args.overrides)


def run(args: argparse.Namespace) -> int:
  """Trains, or resumes."""
  from simclr_jax import run_config, train
  from simclr_jax.commands import common

  workdir = args.workdir or _default_workdir(args.data)
  if args.config:
    config = common.recipe_with_data(args.config, args.data, args.overrides)
  elif (workdir / 'config.json').exists():
    from simclr_jax.data import discover

    config = run_config.load(workdir, {**discover.fields(args.data), **args.overrides})
  else:
    config = _suggested(args.data, args.overrides)
  return train.pretrain(config, workdir, args.command)


def _default_workdir(dataset):
  return pathlib.Path('runs', pathlib.Path(dataset).expanduser().resolve().name.split('.')[0])


def _suggested(dataset, overrides):
  """A recipe that suits the images; prints the arguments that select it."""
  import jax

  from simclr_jax import data
  from simclr_jax.data import discover, suggest

  data_fields = discover.fields(dataset)
  data_overrides = {k: v for k, v in overrides.items() if k.startswith('data.')}
  images = data.load(recipes.load('simclr_images', {**data_fields, **data_overrides}).data, 'train')
  accelerators = 0 if jax.default_backend() == 'cpu' else jax.device_count()
  name, suggested = suggest.recipe(images, accelerators)
  values = {**suggested, **{k: v for k, v in data_fields.items() if v}}
  arguments = [f'--config={name}', *(f'--config.{k}={v}' for k, v in values.items())]
  print(f'{len(images):,} images, median side {suggest.median_side(images)} px; using recipe')
  print(f'  {shlex.join(arguments)}', flush=True)
  return recipes.load(name, {**suggested, **data_fields, **overrides})
