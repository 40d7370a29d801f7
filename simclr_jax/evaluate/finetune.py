"""Fine-tuning a pretrained encoder with few labels, and the same from scratch; distilling the result.

Every training is a run of its own below the pretraining's: it is resumed, logged and checked as any other.
"""

import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from simclr_jax import config as recipes, distributed, paths, stopping, train
from simclr_jax.data import labels as subsets
from simclr_jax.evaluate import features, logistic, metrics
from simclr_jax.interop import orbax

# Fields that say which labels a training may see: not those of the pretraining.
LABELS = ('data.labels', 'data.label_seed', 'data.unlabelled', 'data.examples', 'data.num_classes')


def recipe(
  spec: str, source: ml_collections.ConfigDict, overrides: dict[str, str]
) -> ml_collections.ConfigDict:
  """A recipe for the data and the network of another run.

  Args:
    spec: as of `config.load`; one whose name ends in `_small` takes its augmentation from that run, too.
    source: the recipe of the other run.
    overrides: fields that the user set; they come last.
  """
  same = ('image_size', 'dtype', 'augment.eval')
  fields = {
    k: str(v)
    for k, v in recipes.flatten(source).items()
    if (k.startswith(('data.', 'model.')) or k in same) and k not in LABELS
  }
  fields['model.bn_groups'] = '1'  # of the pretraining's batch
  if spec.endswith('_small'):
    fields['augment.view1'] = source.augment.view1
  return recipes.load(spec, {**fields, **overrides})


def with_labels(
  config: ml_collections.ConfigDict, dataset, labels: str, seed: int
) -> tuple[ml_collections.ConfigDict, Any]:
  """The recipe with these labels of `dataset`, and the training set that it means."""
  config = config.copy_and_resolve_references()
  config.seed, config.data.label_seed, config.data.labels = seed, seed, labels
  config.data.num_classes = dataset.classes
  chosen = subsets.keep(dataset, config.data)
  if config.data.unlabelled == 'drop':  # few images: a batch cannot be larger
    devices = jax.device_count()
    config.batch_size = min(config.batch_size, max(len(chosen) // devices, 1) * devices)
  recipes.check(config)
  return config.lock(), chosen


def run(config: ml_collections.ConfigDict, dataset, workdir: pathlib.Path, command: str) -> None:
  """Trains to the end, or goes on.

  Raises:
    stopping.Stopped: by a signal.
  """
  print(f'\n{workdir}', flush=True)
  code = train.pretrain(config, workdir, command, dataset, quiet=True)
  if code:
    raise stopping.Stopped(code)


def test(workdir: pathlib.Path, dataset) -> dict[str, Any]:
  """The classifier of a run on labelled images.

  Args:
    workdir: of the run; gets `test.json`.
    dataset: all of it is looked at, every image once.

  Returns:
    `metrics.classification`, `confusion`, and `parameters`, how many there are.
  """
  classifier = orbax.load_classifier(workdir)
  logits, truth = classifier.embed(dataset)
  result = metrics.classification(logits, truth)
  result['confusion'] = metrics.confusion(logits, truth).tolist()
  result['parameters'] = sum(x.size for x in jax.tree.leaves(classifier.variables['params']))
  if distributed.leader():
    (workdir / 'test.json').write_text(json.dumps(result) + '\n')
  return result


def few_labels(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset,
  held_out,
  labels: list[str],
  seeds: int,
  name: str,
  baselines: bool,
  command: str,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
  """Fine-tunes a run with each of `labels`, for each seed, and tests it.

  Args:
    workdir: the pretrained run; the trainings go to `workdir/name`.
    config: the recipe of fine-tuning.
    dataset, held_out: labelled images to train with, and to test on.
    labels: as `data.labels`.
    seeds: how many; a seed is that of the labels, of the order and of the augmentation.
    name: of the folder, and of what is kept.
    baselines: also the same network from scratch, and logistic regression on raw pixels, with the same
      labels.
    command: recorded.

  Returns:
    name of the row -> labels -> for each seed, what `test` returns.
  """
  starts = {'fine-tuned': str(paths.absolute(workdir))}
  if baselines:
    starts = {'from scratch': ''} | starts
    pixels = [features.raw_pixels(x) for x in (dataset, held_out)]
  found = {}
  for text in labels:
    for seed in range(seeds):
      for row, start in starts.items():
        chosen, subset = with_labels(config, dataset, text, seed)
        with chosen.unlocked():
          chosen.init_from = start
          if not start:
            chosen.head_layer, chosen.fine_tune_after_block = 0, -1
        folder = workdir / name / f'{short(text)}-seed{seed}{"" if start else "-scratch"}'
        run(chosen, subset, folder, command)
        result = test(folder, held_out)
        found.setdefault(row, {}).setdefault(text, []).append(result)
        print(f'top-1 {result["top1"]:.1%}', flush=True)
      if baselines:
        result = _pixels(dataset, text, seed, *pixels)
        found.setdefault('raw pixels', {}).setdefault(text, []).append(result)
  return found


def short(text: str) -> str:
  """`data.labels` as part of a folder's name."""
  return text.replace('%', 'pct').replace(' ', '')


def _pixels(dataset, text, seed, known, held_out):
  count = subsets.per_class(text, len(dataset), len(np.unique(dataset.labels)))
  chosen = subsets.subset(dataset.labels, count, seed)
  x, test_x = logistic.standardize(known[0], held_out[0])
  return {'top1': logistic.accuracy(x[chosen], known[1][chosen], test_x, held_out[1])}


def students(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  dataset,
  held_out,
  teachers: list[pathlib.Path],
  command: str,
) -> list[dict[str, Any]]:
  """Distils each of `teachers` into a student of its own, in `workdir/NAME_OF_TEACHER`, and tests it.

  Args:
    workdir: of the students.
    config: the recipe of distillation.
    dataset: the images; labels that a teacher did not see are hidden.
    held_out: labelled images to test on.
    teachers: workdirs of fine-tuned runs.
    command: recorded.

  Returns:
    For each, what `test` returns.
  """
  found = []
  for teacher in teachers:
    taught = recipes.read_run(teacher)
    text, seed = taught['data']['labels'] or '100%', taught['seed']
    chosen, images = with_labels(config, dataset, text, seed)
    with chosen.unlocked():
      chosen.teacher = str(paths.absolute(teacher))
    folder = workdir / teacher.name
    run(chosen, images, folder, command)
    result = test(folder, held_out)
    print(f'top-1 {result["top1"]:.1%}', flush=True)
    found.append(result)
  return found


def summary(
  found: dict[str, dict[str, list[dict[str, Any]]]], dataset, title: str
) -> dict[str, Any]:
  """What `few_labels` returned as a result to be kept: top-1 in %, mean and deviation over the seeds."""
  columns = list(next(iter(found.values())))
  classes = len(np.unique(dataset.labels))
  counts = [subsets.per_class(c, len(dataset), classes) for c in columns]
  rows = {
    row: [spread([100 * r['top1'] for r in results]) for results in by_labels.values()]
    for row, by_labels in found.items()
  }
  return {
    'title': title,
    'columns': [f'{c} ({n:,} a class)' if '%' in c else f'{n:,} a class' for c, n in zip(columns, counts)],
    'rows': rows,
    'labels_per_class': counts,
    'settings': {'training_images': len(dataset)},
    'runs': found,
  }  # fmt: skip


def spread(values: list[float]) -> list[float | None]:
  """[mean, standard deviation (n - 1)], the latter None for one value."""
  return [float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None]
