"""The evaluations as a user calls them: on a run, printed as a table, kept in `evaluation.json`."""

import json
import pathlib
from typing import Any

import ml_collections

from simclr_jax import config as recipes, data, distributed, stopping, train as training
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import (
  features,
  finetune as tuning,
  knn,
  logistic,
  probe,
  transfer as transferring,
)
from simclr_jax.interop import orbax


def linear_probe(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  protocol: str,
  epochs: int | None,
  batch_size: int | None,
  learning_rates: tuple[float, ...],
  cached: bool,
  seeds: int,
  baselines: bool,
) -> dict[str, Any]:
  """The linear evaluation of a run (`probe.train_linear`), by encoder, over so many seeds."""
  train, test = _labelled(config)
  scores = {}
  encoders = _encoders(workdir, baselines)
  for name, encoder in encoders.items():
    print(f'linear probe on the {name} encoder', flush=True)

    def show(step, total, loss):
      print(f'  step {step}/{total}  loss {loss:.4f}', flush=True)

    for seed in range(seeds):
      found = probe.train_linear(
        encoder, train, test, probe.PROTOCOLS[protocol], epochs, batch_size, learning_rates, cached,
        seed, show,
      )  # fmt: skip
      scores.setdefault(name, []).append(found)
      for rate, accuracy in found.get('held_out', {}).items():
        print(f'  learning rate {rate}: {accuracy:.1%} of the held-out images')
  settings = scores['pretrained'][0]
  by = {'top-1 %': 'top1', 'top-5 %': 'top5', 'mean per class %': 'mean_per_class'}
  by = {column: key for column, key in by.items() if key in settings}
  cut = ', cached features' if cached else ''
  title = {'simclr': 'SimCLR', 'moco': 'MoCo'}[protocol]
  result = {
    'title': f"Linear probe, {title}'s protocol, {settings['epochs']} epochs{cut}{_over(seeds)}",
    'columns': list(by),
    'rows': {
      name: [tuning.spread([100 * s[key] for s in found]) for key in by.values()]
      for name, found in scores.items()
    },
    'settings': settings | {'seeds': seeds},
  }
  name = f'linear_{protocol}{"_cached" if cached else ""}'
  return _keep(workdir, name, result, encoders['pretrained'])


def nearest_neighbours(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  k: int,
  temperature: float,
  baselines: bool,
) -> dict[str, Any]:
  """Weighted kNN of a run (`knn.accuracy`), top-1 by features."""
  train, test = _labelled(config)
  rows, encoders = {}, _encoders(workdir, baselines)
  for name, embed in _features(encoders, baselines).items():
    top1 = knn.accuracy(*embed(train), *embed(test), k, temperature)
    rows[name] = [[100 * top1, None]]
  result = {
    'title': f'kNN, k = {k}, temperature {temperature:g}',
    'columns': ['top-1 %'],
    'rows': rows,
    'settings': {'k': k, 'temperature': temperature, 'bank': len(train), 'queries': len(test)},
  }
  return _keep(workdir, 'knn', result, encoders['pretrained'])


def label_efficiency(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  labels_per_class: list[int],
  draws: int,
  baselines: bool,
) -> dict[str, Any]:
  """Logistic regression with few labels (`logistic.label_efficiency`), by features."""
  train, test = _labelled(config)
  rows, encoders = {}, _encoders(workdir, baselines)
  for name, embed in _features(encoders, baselines).items():
    try:
      found = logistic.label_efficiency(*embed(train), *embed(test), labels_per_class, draws)
    except ValueError as error:
      raise ConfigError(f'--labels: {error}') from None
    rows[name] = [[100 * r['mean'], 100 * r['std']] for r in found]
  result = {
    'title': f'Logistic regression with few labels, accuracy % over {draws} draws',
    'columns': [f'{n} a class' for n in labels_per_class],
    'rows': rows,
    'settings': {'draws': draws, 'test_images': len(test), 'regularization': 0.01},
  }
  return _keep(workdir, 'label_efficiency', result, encoders['pretrained'])


def finetune(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  spec: str,
  overrides: dict[str, str],
  labels: list[str],
  seeds: int,
  name: str,
  baselines: bool,
  command: str,
) -> dict[str, Any]:
  """Fine-tuning of a run with few labels (`finetune.few_labels`), top-1 by beginning and labels.

  Args:
    workdir, config: the run, and its recipe.
    spec, overrides: the recipe of fine-tuning.
    labels, seeds, name, baselines, command: as of `finetune.few_labels`.
  """
  train, test = _labelled(config)
  recipe = tuning.recipe(spec, config, overrides)
  found = tuning.few_labels(workdir, recipe, train, test, labels, seeds, name, baselines, command)
  result = tuning.summary(found, train, f'Fine-tuning with few labels, top-1 %{_over(seeds)}')
  result['settings'] |= {'recipe': spec, 'seeds': seeds, 'test_images': len(test)}
  return _keep(workdir, name, result, orbax.load_encoder(workdir))


def distill(
  teachers: list[pathlib.Path],
  workdir: pathlib.Path,
  spec: str,
  overrides: dict[str, str],
  command: str,
) -> dict[str, Any]:
  """Distillation of fine-tuned runs (`finetune.students`): their students against them, top-1.

  Args:
    teachers: one or, of several seeds, several.
    workdir: of the students.
    spec, overrides: the recipe of distillation.
    command: recorded.
  """
  source = config_of(teachers[0], {'data.labels': ''})  # all images
  train, test = _labelled(source)
  recipe = tuning.recipe(spec, source, overrides)
  workdir.mkdir(parents=True, exist_ok=True)
  learned = tuning.students(workdir, recipe, train, test, teachers, command)
  taught = [tuning.test(t, test) for t in teachers]
  rows = {'teacher': taught, 'student': learned}
  result = {
    'title': f'Distillation, {len(train):,} images{_over(len(teachers))}',
    'columns': ['top-1 %', 'parameters, millions'],
    'rows': {
      name: [tuning.spread([100 * r['top1'] for r in found]), [found[0]['parameters'] / 1e6, None]]
      for name, found in rows.items()
    },
    'settings': {'recipe': spec, 'test_images': len(test)},
    'runs': rows,
  }
  return _keep(workdir, 'distillation', result, orbax.load_encoder(workdir / teachers[0].name))


def simclrv2(
  workdir: pathlib.Path,
  pretraining: ml_collections.ConfigDict,
  finetuning: str,
  distillation: str,
  student: dict[str, str],
  labels: str,
  seeds: int,
  command: str,
) -> dict[str, Any]:
  """SimCLR v2 in one go: pretrain, fine-tune with few labels, distil; every stage goes on where it stopped.

  Args:
    workdir: of the pretraining; the others are below it.
    pretraining: its recipe.
    finetuning, distillation: the other recipes' names.
    student: fields of the last one, for a student of another size.
    labels: as of `data.labels`.
    seeds: of fine-tuning and distillation.
    command: recorded.

  Raises:
    stopping.Stopped: by a signal.
  """
  code = training.pretrain(pretraining, workdir, command)
  if code:
    raise stopping.Stopped(code)
  config = config_of(workdir, {'data.dir': pretraining.data.dir})
  finetune(workdir, config, finetuning, {}, [labels], seeds, 'finetune', True, command)
  short = tuning.short(labels)
  teachers = [workdir / 'finetune' / f'{short}-seed{seed}' for seed in range(seeds)]
  distill(teachers, workdir / 'distill', distillation, student, command)
  rows = {**kept(workdir)['finetune']['rows']}
  result = kept(workdir / 'distill')['distillation']
  rows['distilled student'] = [result['rows']['student'][0]]
  size = [result['rows'][name][1][0] for name in ('teacher', 'student')]
  order = ('raw pixels', 'from scratch', 'fine-tuned', 'distilled student')
  story = {
    'title': f'SimCLR v2 with {labels} of the labels, top-1 %{_over(seeds)}',
    'columns': kept(workdir)['finetune']['columns'],
    'rows': {name: [rows[name][0]] for name in order},
    'notes': {
      'distilled student': f'{size[1]:.2f} million parameters, its teacher {size[0]:.2f}, '
      'taught on all images without labels'
    },
    'settings': {'seeds': seeds, 'finetuning': finetuning, 'distillation': distillation},
  }
  return _keep(workdir, 'simclrv2', story, orbax.load_encoder(workdir))


def transfer(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  to: list[str],
  folder: str,
  spec: str,
  overrides: dict[str, str],
  fine_tune: bool,
  baselines: bool,
  command: str,
) -> dict[str, Any]:
  """Transfer of a run to other data sets (`transfer.table`), one row for each.

  Args:
    workdir, config: the run, and its recipe.
    to: data sets, as `--data` takes them.
    folder: TFDS's `data_dir`.
    spec, overrides: the recipe of fine-tuning.
    fine_tune: whether to fine-tune, too.
    baselines: raw pixels and the untrained encoder, too.
    command: recorded.
  """
  pixels = {'raw pixels': None} if baselines else {}
  encoders = _encoders(workdir, baselines)
  result = transferring.table(
    workdir, config, {**pixels, **encoders}, to, folder, spec, overrides, fine_tune, command
  )
  return _keep(workdir, 'transfer', result, encoders['pretrained'])


def config_of(workdir: pathlib.Path, overrides: dict[str, str] | None = None):
  """The recipe of a run."""
  return recipes.from_dict(recipes.read_run(workdir), overrides)


def table(result: dict[str, Any]) -> str:
  """A kept result as plain text."""
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
  """Mean and, if known, standard deviation."""
  if mean is None:
    return 'missing'
  if std is None:
    return f'{mean:.2g}' if 0 < mean < 1 else f'{mean:.1f}'
  return f'{mean:.1f} ± {std:.1f}'


def kept(workdir: pathlib.Path) -> dict[str, Any]:
  """The results so far, by name."""
  path = workdir / 'evaluation.json'
  try:
    return json.loads(path.read_text()) if path.exists() else {}
  except ValueError:
    raise ConfigError(f'{path} is damaged: delete it and evaluate again') from None


def _keep(workdir, name, result, encoder):
  result['step'] = encoder.provenance['step']
  if distributed.leader():
    results = {**kept(workdir), name: result}
    new = workdir / 'evaluation.json.new'
    new.write_text(json.dumps(results, indent=1) + '\n')
    new.replace(workdir / 'evaluation.json')
  distributed.wait('evaluation.json')
  print(table(result), flush=True)
  return result


def _over(seeds):
  return f', mean over {seeds} seeds' if seeds > 1 else ''


def _labelled(config):
  def load():
    train, test = data.load(config.data, 'train'), data.load(config.data, 'test')
    if not (train.labelled and test.labelled):
      raise ConfigError('this evaluation needs labels, and the data of the run has none')
    return train, test

  train, test = distributed.together(load)
  data.agree({'the training images': train, 'the test images': test})
  return train, test


def _encoders(workdir, baselines) -> dict[str, features.Encoder]:
  pretrained = orbax.load_encoder(workdir)
  untrained = {'untrained': features.untrained(pretrained.architecture)} if baselines else {}
  return {**untrained, 'pretrained': pretrained}


def _features(encoders, baselines):
  pixels = {'raw pixels': features.raw_pixels} if baselines else {}
  return {**pixels, **{name: encoder.embed for name, encoder in encoders.items()}}
