"""Results of evaluations: prints them as tables and saves them in `evaluation.json` of a run.

A result is plain data: `title`; `columns`, their names; `rows`: name -> for each column [mean, standard deviation],
where the deviation, or both, may be None; and optionally `notes` (row -> sentence), `settings`, `runs`.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from simclr_jax.errors import ConfigError
from simclr_jax.runtime import distributed, files

Result = dict[str, Any]
FILE = 'evaluation.json'


def load(workdir: pathlib.Path) -> dict[str, Result]:
  """The saved results of a run, by name; empty if there are none.

  Raises:
    ConfigError: `evaluation.json` is damaged.
  """
  path = workdir / FILE
  try:
    return json.loads(path.read_text()) if path.exists() else {}
  except ValueError:
    raise ConfigError(f'{path} is damaged: delete it and evaluate again') from None


def save(workdir: pathlib.Path, name: str, result: Result, step: int) -> Result:
  """Saves a result, replacing an earlier one of the same name, and prints its table. All processes must call it.

  Args:
    workdir: directory of the run.
    name: name of the evaluation.
    result: the result; `step` is added to it.
    step: the step of the checkpoint that was evaluated.

  Returns:
    The result.

  Raises:
    ConfigError: `evaluation.json` is damaged.
  """
  result['step'] = step
  if distributed.is_main_process():
    files.write_json(workdir / FILE, {**load(workdir), name: result})
  distributed.barrier(FILE)
  print(table(result), flush=True)
  return result


def table(result: Result) -> str:
  """The table of a result, which has a `step`, as plain text."""
  width = max(len(name) for name in result['rows'])
  widths = [max(16, len(column) + 2) for column in result['columns']]
  lines = [
    f'{result["title"]} (step {result["step"]:,})',
    ' ' * width + ''.join(f'{c:>{w}}' for c, w in zip(result['columns'], widths)),
  ]
  for name, cells in result['rows'].items():
    lines.append(f'{name:{width}}' + ''.join(f'{cell(*c):>{w}}' for c, w in zip(cells, widths)))
  lines += [f'{name}: {text}' for name, text in result.get('notes', {}).items()]
  return '\n'.join(lines)


def cell(mean: float | None, std: float | None) -> str:
  """A cell of the table: the mean and, if there is one, the standard deviation; 'missing' without a mean."""
  if mean is None:
    return 'missing'
  if std is None:
    return f'{mean:.2g}' if 0 < mean < 1 else f'{mean:.1f}'
  return f'{mean:.1f} ± {std:.1f}'


def mean_and_std(values: Sequence[float]) -> list[float | None]:
  """[mean, standard deviation (n - 1)]; the deviation of a single value is None."""
  return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None]


def over_seeds(seeds: int) -> str:
  """The end of a title, such as ', mean over 5 seeds'; empty for one seed."""
  return f', mean over {seeds} seeds' if seeds > 1 else ''
