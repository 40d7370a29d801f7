"""fine-tune on a small labelled subset and evaluate

Example:
  simclr-jax finetune --workdir=runs/c10 --labels=1%,10% --seeds=5

Each fine-tuning run has its own directory, such as RUN/finetune/1pct-seed0. Rerun the same command to resume it.
--config.FIELD=VALUE sets fields of its recipe, for instance head_layer (layers of the projection head that are kept),
fine_tune_after_block (layers that are frozen), steps, learning_rate; --config.data.* also selects the images.
The baseline from scratch has its own optimizer, length and augmentation: AdamW with learning rate 0.003 and warm-up,
twice as many steps, or 30 epochs if that is more, crops of at least half of the image.
"""

import argparse
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from simclr_jax import config as recipes
from simclr_jax.commands import options
from simclr_jax.errors import ConfigError

DETAILS = options.DATA_OVERRIDE
# Fields that the command sets itself -> how.
RESERVED = {
  'seed': 'the seeds are 0 to N - 1 with --seeds=N',
  'data.label_seed': 'the seeds are 0 to N - 1 with --seeds=N',
  'data.labels': 'use --labels',
  'data.num_classes': 'the classes of the data set are counted',
  'data.examples': 'the images are counted',
  'init_from': 'the run to start from is --workdir',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser, 'the pretrained run, or an exported encoder')
  options.other_data(parser)
  parser.add_argument(
    '--config', metavar='RECIPE', default='finetune_small', help='recipe of the fine-tuning'
  )
  parser.add_argument(
    '--labels',
    type=options.string_list,
    default='1%,10%',
    metavar='N,P%,...',
    help='labels per class, or label fractions',
  )
  parser.add_argument('--seeds', type=options.positive, default=1, help='number of random seeds')
  parser.add_argument('--name', type=options.name, default='finetune', help='output subdirectory')
  options.baselines(
    parser,
    'also train from scratch, and logistic regression on raw pixels and on the untrained encoder',
  )
  options.scratch(parser, 'see above')


def check(args: argparse.Namespace) -> None:
  """Checks the recipe and its fields."""
  if (args.scratch_steps or args.scratch_learning_rate) and not args.baselines:
    args.parser.error(
      '--scratch-steps and --scratch-learning-rate have no effect with --no-baselines'
    )
  options.check_folder(f'--name={args.name}', args.workdir / args.name)
  check_fields(args.config, args.overrides, RESERVED)


def check_fields(spec: str, overrides: Mapping[str, Any], reserved: Mapping[str, str]) -> None:
  """Checks the recipe of a command, and that each field that the user set has an effect.

  Args:
    spec, overrides: the recipe and its fields, as for `config.load`.
    reserved: fields that the command sets itself -> what to use instead.

  Raises:
    ConfigError: a field has no effect, or as for `config.load`.
  """
  for field in overrides:
    if field in reserved:
      raise ConfigError(f'--config.{field} cannot be set here: {reserved[field]}')
  config = recipes.load(spec, overrides)
  if 'epochs' in overrides and 'steps' not in overrides and config.steps:
    raise ConfigError(
      f'--config.epochs has no effect, because {spec} sets steps={config.steps}: use --config.steps, '
      'or add --config.steps=0'
    )


def data_fields(overrides: Mapping[str, Any]) -> dict[str, Any]:
  """The overrides that select the images, for the recipe of the run whose data is used; all its labels are."""
  return {'data.labels': '', **{k: v for k, v in overrides.items() if k.startswith('data.')}}


def run(args: argparse.Namespace) -> int:
  """Fine-tunes and evaluates."""
  from simclr_jax.commands import common

  finetune(
    args.workdir,
    common.recipe_with_images(args.workdir, data_fields(args.overrides), args.data),
    args.config,
    args.overrides,
    labels=args.labels,
    seeds=args.seeds,
    name=args.name,
    baselines=args.baselines,
    command=args.command,
    scratch_steps=args.scratch_steps,
    scratch_learning_rate=args.scratch_learning_rate,
  )
  return 0


def finetune(
  workdir: pathlib.Path,
  source: ml_collections.ConfigDict,
  spec: str,
  overrides: Mapping[str, Any],
  *,
  labels: Sequence[str],
  seeds: int,
  command: str,
  name: str = 'finetune',
  baselines: bool = False,
  scratch_steps: int = 0,
  scratch_learning_rate: float = 0.0,
) -> dict[str, Any]:
  """Fine-tunes a run with few labels; prints and saves a table with the accuracy by number of labels.

  Args:
    workdir, source: directory and recipe of the pretrained run.
    spec, overrides: the recipe of the fine-tuning.
    labels, seeds, command, name, baselines: as for `downstream.few_labels`.
    scratch_steps, scratch_learning_rate: of the baseline from scratch; 0: the default.

  Returns:
    The saved result.
  """
  from simclr_jax import downstream, runs
  from simclr_jax.commands import common
  from simclr_jax.data import labels as subsets
  from simclr_jax.evaluate import results

  results.check(workdir)
  train, test = common.labelled(source)
  count = functools.partial(subsets.per_class, examples=len(train), classes=train.classes)
  labels = sorted(dict.fromkeys(labels), key=count)
  recipe = downstream.recipe(spec, source, overrides)
  scratch = downstream.Scratch(scratch_steps, scratch_learning_rate)
  extent: dict[str, Any] = {
    'labels': labels, 'seeds': seeds, 'baselines': baselines, 'scratch': scratch,
    'least_epochs': downstream.least_epochs(spec, overrides),
  }  # fmt: skip
  print(downstream.plan(workdir, recipe, train, **extent), flush=True)
  tests = downstream.few_labels(workdir, recipe, train, test, name=name, command=command, **extent)
  folder = '' if name == 'finetune' else f', {name}/'
  title = f'Fine-tuning with few labels, top-1 %{results.over_seeds(seeds)}{folder}'
  result = downstream.summary(tests, train, test, title)
  result['settings'] |= {'recipe': spec, 'seeds': seeds, 'test_images': len(test)}
  about = common.about(source, runs.load_encoder(workdir), train, test)
  return results.save(workdir, name, result, about)
