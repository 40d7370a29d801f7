"""Arguments that several commands share, and the types of arguments. This file does not import JAX."""

import argparse
import math
import pathlib

from simclr_jax.errors import ConfigError
from simclr_jax.runtime import paths

DATA_OVERRIDE = (
  'The data is read from where the run read it; --config.data.dir=DIR sets another folder.'
)


def workdir(parser: argparse.ArgumentParser, help: str = 'run directory') -> None:
  """Adds --workdir."""
  parser.add_argument('--workdir', required=True, type=path, metavar='RUN', help=help)


def data(parser: argparse.ArgumentParser, required: bool) -> None:
  """Adds --data."""
  parser.add_argument(
    '--data',
    required=required,
    metavar='DATASET',
    help='a folder of images, or several joined by commas; a table of images (.csv); npz or npy files; a prepared TFDS '
    'data set, or its name; digits. --config.data.train_split and --config.data.test_split name the splits',
  )


def baselines(parser: argparse.ArgumentParser, help: str, default: bool | None = True) -> None:
  """Adds --baselines, which is on, and --no-baselines."""
  parser.add_argument(
    '--baselines', action=argparse.BooleanOptionalAction, default=default, help=help
  )


def scratch(parser: argparse.ArgumentParser, default: str) -> None:
  """Adds --scratch-steps and --scratch-learning-rate; `default`: where the help describes the defaults."""
  parser.add_argument(
    '--scratch-steps',
    type=positive,
    default=0,
    metavar='N',
    help=f'steps of the baseline from scratch (default: {default})',
  )
  parser.add_argument(
    '--scratch-learning-rate',
    type=above_zero,
    default=0.0,
    metavar='RATE',
    help=f'learning rate of the baseline from scratch (default: {default})',
  )


def out(parser: argparse.ArgumentParser) -> None:
  """Adds --out for the results of a run that cannot be written."""
  parser.add_argument(
    '--out', type=path, metavar='FILE', help='save the result in this JSON file, not in the run'
  )


def path(text: str) -> pathlib.Path:
  """A local or gs:// path."""
  try:
    return paths.path(text)
  except ConfigError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


def path_list(text: str) -> list[pathlib.Path]:
  """Paths separated by commas."""
  return [path(t) for t in text.split(',')]


def positive(text: str) -> int:
  """An integer of at least 1."""
  try:
    value = int(text)
  except ValueError:
    raise argparse.ArgumentTypeError(f'{text!r} is not an integer') from None
  if value < 1:
    raise argparse.ArgumentTypeError(f'{text} is below 1')
  return value


def positive_list(text: str) -> list[int]:
  """Integers of at least 1, separated by commas."""
  return [positive(t) for t in text.split(',')]


def string_list(text: str) -> list[str]:
  """Strings separated by commas."""
  return [t.strip() for t in text.split(',')]


def above_zero(text: str) -> float:
  """A finite number above 0."""
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f'{text!r} is not a number above 0')
  return value


def above_zero_list(text: str) -> tuple[float, ...]:
  """Finite numbers above 0, separated by commas."""
  return tuple(above_zero(t) for t in text.split(','))
