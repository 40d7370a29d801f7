"""Arguments that several commands share, and the types of arguments. This file does not import JAX."""

import argparse
import math
import os
import pathlib
import re

from simclr_jax.errors import ConfigError
from simclr_jax.runtime import paths

# What a run contains, and the names of evaluations: no name that a user chooses replaces it. In small letters, because
# some file systems do not distinguish capital ones.
OF_A_RUN = (
  'checkpoints', 'code', 'config.json', 'distill', 'encoder.json', 'evaluation.json', 'metrics', 'metrics.jsonl',
  'profile', 'report.html', 'setup.txt', 'test.json', 'transfer', 'variables',
)  # fmt: skip
EVALUATIONS = ('distillation', 'knn', 'knn z', 'label_efficiency', 'simclrv2', 'transfer')
LONGEST = 255  # bytes of a file name

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
    type=dataset,
    metavar='DATASET',
    help='a folder of images, or several joined by commas; a table of images (.csv); npz or npy files; a prepared TFDS '
    'data set, or its name; digits. --config.data.train_split and --config.data.test_split name the splits',
  )


def other_data(parser: argparse.ArgumentParser) -> None:
  """Adds --data for commands that otherwise use the images of the run."""
  parser.add_argument(
    '--data',
    type=dataset,
    metavar='DATASET',
    help='images, as for --data of pretrain (default: those of the run)',
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
    '--out',
    type=result_file,
    metavar='FILE',
    help='save the result in this .json file, not in the run',
  )


def name(text: str) -> str:
  """The name of a result, which is also that of a folder in the run."""
  if not re.fullmatch(r'[^\W_][\w .+=%-]*', text) or text != text.rstrip(' .') or len(text) > 80:
    raise argparse.ArgumentTypeError(
      f'{_short(text)} is not a name: use up to 80 letters, digits, spaces and _-.+=%, a letter or digit first'
    )
  lower = text.lower()
  if lower in (*OF_A_RUN, *EVALUATIONS) or lower.startswith('linear_'):
    raise argparse.ArgumentTypeError(f'{text!r} is the name of another evaluation or part of a run')
  return text


def check_folder(option: str, folder: pathlib.Path) -> None:
  """Checks that runs can be added to a folder.

  Args:
    option: the argument that names the folder.
    folder: the folder; it may be a run itself.

  Raises:
    ConfigError: it is a file, or a folder with other contents than runs.
  """
  if paths.is_remote(folder) or not folder.exists():
    return
  try:
    inside = list(folder.iterdir())
  except OSError as error:
    raise ConfigError(f'{option}: {folder} cannot be used: {error.strerror}') from None
  if inside and not any(is_run(p) for p in (folder, *inside)):
    raise ConfigError(f'{option}: {folder} contains other files, but no run: choose another name')


def is_run(folder: pathlib.Path) -> bool:
  """Whether a local folder was created by a training."""
  return any((folder / name).exists() for name in ('.lock', 'checkpoints'))


def path(text: str) -> pathlib.Path:
  """A local or gs:// path."""
  _check_parts(text)
  try:
    return paths.path(text)
  except ConfigError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


def result_file(text: str) -> pathlib.Path:
  """The path of a JSON file for results, which is no other file of a run."""
  file = path(text)
  if file.suffix != '.json':
    raise argparse.ArgumentTypeError(f'{_short(text)} is not a .json file')
  if file.name.lower() in OF_A_RUN and file.name != 'evaluation.json':
    raise argparse.ArgumentTypeError(f'{file.name} is the name of another file of a run')
  return file


def dataset(text: str) -> str:
  """A data set: paths or a name."""
  _check_parts(text)
  return text


def _check_parts(text):
  """Refuses what cannot be a path: nothing, which is often a variable of the shell that is not set, and long names."""
  if not text:
    raise argparse.ArgumentTypeError('the path is empty')
  long = [part for part in re.split('[/,]', text) if len(os.fsencode(part)) > LONGEST]
  if long:
    raise argparse.ArgumentTypeError(f'{_short(long[0])} is longer than names of files can be')


def _short(text):
  return repr(text if len(text) <= 60 else f'{text[:60]}...')


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
  parts = [t.strip() for t in text.split(',')]
  if not all(parts):
    raise argparse.ArgumentTypeError(f'{text!r} has an empty part')
  return parts


def dataset_list(text: str) -> list[str]:
  """Data sets separated by commas."""
  return [dataset(t) for t in string_list(text)]


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
