"""Trainings that start from a pretrained run: fine-tuning with few labels, the same from scratch, distillation.

Every training is a run of its own, resumed, logged and checked as any other.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from simclr_jax import config as recipes, encoder, fields, runs, train
from simclr_jax.data import Dataset, labels as subsets
from simclr_jax.errors import Stopped
from simclr_jax.evaluate import logistic, metrics
from simclr_jax.evaluate.results import Result, mean_and_std
from simclr_jax.runtime import distributed, files, paths

Tests = dict[
  str, dict[str, list[dict[str, Any]]]
]  # row -> labels -> for each seed, what `test` returns


def recipe(
  spec: str, source: ml_collections.ConfigDict, overrides: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  """A recipe for the data and the network of another run.

  Args:
    spec: as of `config.load`; one whose name ends in `_small` also inherits the augmentation of that run.
    source: the recipe of the other run.
    overrides: fields that the user set; they have priority.
  """
  table = fields.of_recipe(source.method)
  values = {k: v for k, v in recipes.flatten(source).items() if table[k].inherited}
  values['model.bn_groups'] = 1  # groups belong to the batch of the pretraining
  if spec.endswith('_small'):
    values['augment.view1'] = source.augment.view1
  return recipes.load(spec, {**values, **overrides})


def with_labels(
  config: ml_collections.ConfigDict, dataset: Dataset, labels: str, seed: int
) -> tuple[ml_collections.ConfigDict, Dataset]:
  """The recipe with a subset of the labels of `dataset`, and the training set of this recipe."""
  config = config.copy_and_resolve_references()
  config.seed, config.data.label_seed, config.data.labels = seed, seed, labels
  config.data.num_classes = dataset.classes
  images = subsets.select(dataset, config.data)
  if config.data.unlabelled == 'drop':  # few images: the batch cannot be larger
    devices = jax.device_count()
    config.batch_size = min(config.batch_size, max(len(images) // devices, 1) * devices)
  recipes.check(config)
  return config.lock(), images


def run(
  config: ml_collections.ConfigDict, dataset: Dataset, workdir: pathlib.Path, command: str
) -> None:
  """Trains to the end, or resumes.

  Raises:
    Stopped: by a signal.
  """
  print(f'\n{workdir}', flush=True)
  code = train.pretrain(config, workdir, command, dataset, quiet=True)
  if code:
    raise Stopped(code)


def test(workdir: pathlib.Path, dataset: Dataset) -> dict[str, Any]:
  """Evaluates the classifier of a run on labelled images.

  Args:
    workdir: of the run; gets `test.json`.
    dataset: the images, each of which is evaluated once.

  Returns:
    `metrics.classification`, `confusion`, and `parameters`, their number.
  """
  classifier = runs.load_classifier(workdir)
  logits, truth = classifier.embed(dataset)
  result = {
    **metrics.classification(logits, truth),
    'confusion': metrics.confusion(logits, truth).tolist(),
    'parameters': sum(x.size for x in jax.tree.leaves(classifier.variables['params'])),
  }
  if distributed.is_main_process():
    files.write_json(workdir / 'test.json', result, indent=None)
  print(f'{workdir}: top-1 {result["top1"]:.1%}', flush=True)
  return result


def few_labels(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  test_images: Dataset,
  *,
  labels: Sequence[str],
  seeds: int,
  name: str,
  baselines: bool,
  command: str,
) -> Tests:
  """Fine-tunes a run with each of `labels`, for each seed, and tests it.

  Args:
    workdir: the pretrained run; the trainings go to `workdir/name`.
    config: the recipe of fine-tuning.
    dataset, test_images: labelled images.
    labels: as `data.labels`.
    seeds: how many; a seed is that of the labels, of the order and of the augmentation.
    name: of the folder.
    baselines: also the same network from scratch, and logistic regression on raw pixels, with the same
      labels.
    command: recorded.
  """
  starts = {'fine-tuned': str(paths.absolute(workdir))}
  if baselines:
    starts = {'from scratch': ''} | starts
    pixels = [encoder.raw_pixels(x) for x in (dataset, test_images)]
  tests: Tests = {}
  for text in labels:
    for seed in range(seeds):
      for row, start in starts.items():
        chosen, subset = with_labels(config, dataset, text, seed)
        _start_from(chosen, start)
        folder = workdir / name / f'{short(text)}-seed{seed}{"" if start else "-scratch"}'
        run(chosen, subset, folder, command)
        tests.setdefault(row, {}).setdefault(text, []).append(test(folder, test_images))
      if baselines:
        result = _pixels(dataset, text, seed, *pixels)
        tests.setdefault('raw pixels', {}).setdefault(text, []).append(result)
  return tests


def _start_from(config, start):
  """Sets the run that a recipe starts from; '' is from scratch, which neither keeps nor freezes layers."""
  with config.unlocked():
    config.init_from = start
    if not start:
      config.head_layer, config.fine_tune_after_block = 0, -1


def short(text: str) -> str:
  """`data.labels` as part of a folder's name."""
  return text.replace('%', 'pct').replace(' ', '')


def _pixels(dataset, text, seed, train_pixels, test_pixels):
  count = subsets.per_class(text, len(dataset), len(np.unique(dataset.labels)))
  chosen = subsets.balanced_subset(dataset.labels, count, seed)
  x, test_x = logistic.standardize(train_pixels[0], test_pixels[0])
  return {'top1': logistic.accuracy(x[chosen], train_pixels[1][chosen], test_x, test_pixels[1])}


def all_labels(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  test_images: Dataset,
  *,
  start: str,
  command: str,
) -> dict[str, Any]:
  """Trains with all labels, from the run `start` or ('') from scratch, and tests."""
  chosen, images = with_labels(config, dataset, '100%', 0)
  _start_from(chosen, start)
  run(chosen, images, workdir, command)
  return test(workdir, test_images)


def students(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset: Dataset,
  test_images: Dataset,
  *,
  teachers: Sequence[pathlib.Path],
  command: str,
) -> list[dict[str, Any]]:
  """Distils each of `teachers` into a student of its own, in `workdir/NAME_OF_TEACHER`, and tests it.

  Args:
    workdir: of the students.
    config: the recipe of distillation.
    dataset: the images; labels that a teacher did not see are hidden.
    test_images: labelled images to test on.
    teachers: fine-tuned runs.
    command: recorded.

  Returns:
    For each, what `test` returns.
  """
  tests = []
  for teacher in teachers:
    source = recipes.read_run(teacher)
    chosen, images = with_labels(
      config, dataset, source['data']['labels'] or '100%', source['seed']
    )
    with chosen.unlocked():
      chosen.teacher = str(paths.absolute(teacher))
    folder = workdir / teacher.name
    run(chosen, images, folder, command)
    tests.append(test(folder, test_images))
  return tests


def summary(tests: Tests, dataset: Dataset, title: str) -> Result:
  """What `few_labels` returned as a result to be saved: top-1 in %, mean and deviation over the seeds."""
  columns = list(next(iter(tests.values())))
  classes = len(np.unique(dataset.labels))
  counts = [subsets.per_class(c, len(dataset), classes) for c in columns]
  return {
    'title': title,
    'columns': [
      f'{c} ({n:,} per class)' if '%' in c else f'{n:,} per class' for c, n in zip(columns, counts)
    ],
    'rows': {
      row: [mean_and_std([100 * r['top1'] for r in results]) for results in by_labels.values()]
      for row, by_labels in tests.items()
    },
    'labels_per_class': counts,
    'settings': {'training_images': len(dataset)},
    'runs': tests,
  }
