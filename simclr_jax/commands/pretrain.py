"""train an encoder without labels

Examples:
  simclr-jax pretrain --data=my_photographs
  simclr-jax pretrain --config=simclr_cifar10 --workdir=runs/c10 \\
      --config.epochs=200 --config.data.dir=$HOME/tensorflow_datasets
  simclr-jax pretrain --workdir=runs/c10 --extend --config.epochs=400

Without --config, a recipe is suggested by the number and size of the images, and printed. Folders are searched
recursively. Without a test split, a fifth of each class is held out for evaluations (--config.data.holdout). Rerun the
same command to resume from the latest checkpoint; --workdir=RUN alone resumes, too.

--extend continues a complete run with more epochs or steps. --config.init_from=RUN starts a new run from the weights of
another run or of an exported encoder.

`simclr-jax recipes` lists the built-in recipes. --config.FIELD=VALUE sets a field of the recipe, for instance
--config.batch_size=256, --config.model.depth=50, --config.augment.view1="moco_v2 | solarize(p=0.2)".
`simclr-jax fields` lists all fields.
"""

import argparse
import pathlib
import shlex
from collections.abc import Mapping
from typing import Any

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
  parser.add_argument(
    '--extend',
    nargs='?',
    const=0,
    type=options.positive,
    metavar='EPOCHS',
    help='continue a complete run for EPOCHS more epochs, or up to --config.epochs or --config.steps',
  )


def check(args: argparse.Namespace) -> None:
  """Checks the arguments, the recipe and its fields."""
  if not (args.data or args.config or _is_run(args.workdir)):
    args.parser.error('--data or --config is required, or the --workdir of a run')
  if not (args.data or args.workdir):
    args.parser.error('--workdir=RUN is required without --data')
  lengths = {'epochs', 'steps'} & args.overrides.keys()
  if args.extend == 0 and not lengths:
    args.parser.error(
      '--extend needs the new length: --extend=EPOCHS, --config.epochs or --config.steps'
    )
  if args.extend and lengths:
    args.parser.error(
      f'--extend={args.extend} and --config.{min(lengths)} are two lengths: set one'
    )
  if args.config:
    recipes.load(args.config, args.overrides)


def run(args: argparse.Namespace) -> int:
  """Trains, or resumes."""
  from simclr_jax import train
  from simclr_jax.commands import common

  images = (None, None)
  workdir = args.workdir or default_workdir(args.data, args.overrides)
  if args.config:
    config = common.recipe_with_data(args.config, args.data, args.overrides)
  elif _is_run(workdir):
    config = _of_run(workdir, args)
  else:
    config, images = suggested(args.data, args.overrides)
  return train.pretrain(
    config, workdir, args.command, images[0], test=images[1], extend=args.extend is not None
  )


def _is_run(workdir):
  from simclr_jax import run_config

  return workdir is not None and run_config.is_run(workdir)


def _of_run(workdir, args):
  """The recipe of the run with the data set and the fields of the command line."""
  from simclr_jax import run_config
  from simclr_jax.data import discover

  fields = discover.fields(args.data, args.overrides) if args.data else {}
  config = run_config.load(workdir, {**fields, **args.overrides})
  if not args.extend:
    return config
  attempts = run_config.record(workdir).get('extended', [])
  before = attempts[-1] if attempts and not _complete(workdir, config) else config
  if config.steps:
    steps = args.extend * config.data.examples // config.batch_size
    return run_config.load(workdir, {**fields, **args.overrides, 'steps': before['steps'] + steps})
  epochs = before['epochs'] + args.extend
  return run_config.load(workdir, {**fields, **args.overrides, 'epochs': epochs})


def _complete(workdir, config):
  from simclr_jax import optim
  from simclr_jax.runtime import checkpoint

  return checkpoint.last_step(workdir / 'checkpoints') >= optim.train_steps(
    config, config.data.examples
  )


def default_workdir(dataset: str, overrides: Mapping[str, Any] | None = None) -> pathlib.Path:
  """The directory of the run on a data set without --workdir: runs/NAME, or runs/NAME-2, ... if runs/NAME has others.

  Args:
    dataset: the value of --data.
    overrides: fields that the user set.
  """
  from simclr_jax.data import discover

  fields = discover.fields(dataset, overrides)
  name = discover.name_of(dataset)
  number = 1
  while True:
    workdir = pathlib.Path('runs', name if number == 1 else f'{name}-{number}')
    other = _data_of(workdir)
    if other is None or _same_place(other, fields):
      if number > 1:
        print(f'runs/{name} has a run on other data, so this run is {workdir}')
      return workdir
    number += 1


def _data_of(workdir):
  """The `data` part of the recipe of a run; None if there is no run."""
  from simclr_jax import run_config

  return run_config.record(workdir)['config'].get('data', {}) if _is_run(workdir) else None


def _same_place(other, fields):
  from simclr_jax.runtime import paths

  new = {k.removeprefix('data.'): v for k, v in fields.items()}
  return all(
    other.get(k, '') == (paths.absolute_list(new[k]) if k in ('dir', 'table') else new[k])
    for k in ('source', 'name', 'dir', 'table')
    if k in new
  )


def suggested(dataset, overrides):
  """A recipe that suits the images, printed as arguments, and the images.

  Args:
    dataset: the value of --data.
    overrides: fields that the user set; they have priority.

  Returns:
    The recipe, and the training and test images.
  """
  from simclr_jax import data
  from simclr_jax.data import discover, suggest

  data_fields = discover.fields(dataset, overrides)
  data_overrides = {k: v for k, v in overrides.items() if k.startswith('data.')}
  images = data.load_splits(recipes.load('simclr_images', {**data_fields, **data_overrides}).data)
  name, values = suggest.recipe(images[0])
  arguments = [f'--config={name}', *(f'--config.{k}={v}' for k, v in values.items())]
  print(
    f'recipe: {shlex.join(arguments)} (for a median side of {suggest.median_side(images[0])} px)'
  )
  return recipes.load(name, {**values, **data_fields, **overrides}), images
