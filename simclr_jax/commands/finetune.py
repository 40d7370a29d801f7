"""fine-tune on a small labelled subset and evaluate

Example:
  simclr-jax finetune --workdir=runs/c10 --labels=1%,10% --seeds=5 --baselines

Each fine-tuning run has its own directory, such as RUN/finetune/1pct-seed0. Rerun the same command to resume it.
--config.FIELD=VALUE sets fields of its recipe, for instance head_layer (layers of the projection head that are kept),
fine_tune_after_block (layers that are frozen), steps, learning_rate.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from simclr_jax import config as recipes
from simclr_jax.commands import options

DETAILS = options.DATA_OVERRIDE


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser, 'the pretrained run')
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
  parser.add_argument('--name', default='finetune', help='output subdirectory')
  options.baselines(parser, 'also train from scratch, and logistic regression on raw pixels')


def check(args: argparse.Namespace) -> None:
  """Checks the recipe and its fields."""
  recipes.load(args.config, args.overrides)


def run(args: argparse.Namespace) -> int:
  """Fine-tunes and evaluates."""
  from simclr_jax import run_config

  data_dir = {k: v for k, v in args.overrides.items() if k == 'data.dir'}
  finetune(
    args.workdir,
    run_config.load(args.workdir, data_dir),
    args.config,
    args.overrides,
    labels=args.labels,
    seeds=args.seeds,
    name=args.name,
    baselines=args.baselines,
    command=args.command,
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
) -> dict[str, Any]:
  """Fine-tunes a run with few labels; prints and saves a table with the accuracy by number of labels.

  Args:
    workdir, source: directory and recipe of the pretrained run.
    spec, overrides: the recipe of the fine-tuning.
    labels, seeds, command, name, baselines: as for `downstream.few_labels`.

  Returns:
    The saved result.
  """
  from simclr_jax import downstream
  from simclr_jax.commands import common
  from simclr_jax.evaluate import results

  train, test = common.labelled(source)
  recipe = downstream.recipe(spec, source, overrides)
  tests = downstream.few_labels(
    workdir, recipe, train, test,
    labels=labels, seeds=seeds, name=name, baselines=baselines, command=command,
  )  # fmt: skip
  title = f'Fine-tuning with few labels, top-1 %{results.over_seeds(seeds)}'
  result = downstream.summary(tests, train, title)
  result['settings'] |= {'recipe': spec, 'seeds': seeds, 'test_images': len(test)}
  return results.save(workdir, name, result, common.step_of(workdir))
