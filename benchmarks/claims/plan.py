"""Which trainings the claims need, and the results so far."""

import importlib
import json
import pathlib
from collections.abc import Mapping

from benchmarks.claims.statistics import Claim
from benchmarks.claims.trainings import Setting, Training

HERE = pathlib.Path(__file__).parent
Result = Mapping[str, object]
Results = dict[tuple[str, int], Result]  # by key of the training, and seed


def claims() -> dict[str, Claim]:
  """All claims, by the name of their file, in the order of the papers."""
  folders = ('simclr', 'moco', 'simclrv2', 'protocols')
  files = [path for folder in folders for path in sorted((HERE / folder).glob('*.py'))]
  names = [f'{path.parent.name}.{path.stem}' for path in files]
  return {name: importlib.import_module(f'benchmarks.claims.{name}').CLAIM for name in names}


def read(path: pathlib.Path) -> Results:
  """The results so far."""
  lines = path.read_text().splitlines() if path.exists() else []
  return {(r['key'], r['seed']): r for r in map(json.loads, lines)}


def chosen(setting: Setting, results: Results) -> Training | None:
  """The training that represents a setting; None if a candidate has no result yet."""
  if isinstance(setting, Training):
    return setting
  scores = {}
  for candidate in setting.candidates:
    if (candidate.key, 0) not in results:
      return None
    scores[candidate] = results[candidate.key, 0]['metrics']['linear_validation']
  return max(scores, key=scores.get)


def jobs(claims: Mapping[str, Claim], results: Results, seeds: int) -> list[tuple[Training, int]]:
  """The trainings of the claims with their seeds, in the order in which they should run."""
  wanted: dict[tuple[Training, int], None] = {}
  for seed in range(seeds):
    for claim in claims.values():
      for setting in claim.settings.values() if seed < claim.seeds else ():
        trainings = (
          [chosen(setting, results)]
          if seed or isinstance(setting, Training)
          else setting.candidates
        )
        for training in filter(None, trainings):
          wanted |= dict.fromkeys((part, seed) for part in training.trainings())
  return list(wanted)
