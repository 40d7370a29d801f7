"""train a linear classifier on the frozen features

--protocol=sgd: SGD on features that are standardised by the training images and computed once, without augmentation. All
rows, raw pixels and the untrained encoder included, get the best of 11 learning rates on a 20 % validation split; the
final classifier is trained on all training images. --augment trains on cropped and flipped images instead, which takes
hours on a CPU.

The published protocols use features that are not standardised, augmented images and one learning rate.
--protocol=simclr: Nesterov momentum and cosine decay. --protocol=moco: learning rate 30, divided by 10 after 60 % and
80 % of the training. A warning is printed if a quick sweep finds a much better learning rate. --cached computes the
features once. With several --learning-rate values, the best one is chosen as for sgd.

--protocol=logistic: logistic regression (L-BFGS) with few labels per class, on several random subsets.
The result is added to RUN/evaluation.json and to the report.
"""

import argparse
import time
from typing import Any

from simclr_jax.commands import options

DETAILS = options.DATA_OVERRIDE
TITLES = {'sgd': 'SGD on standardised features', 'simclr': "SimCLR's protocol", 'moco': "MoCo's protocol"}  # fmt: skip
# Argument -> the protocols on which it has an effect.
ONLY_WITH = {
  'epochs': ('sgd', 'simclr', 'moco'),
  'batch_size': ('sgd', 'simclr', 'moco'),
  'learning_rate': ('sgd', 'simclr', 'moco'),
  'seeds': ('sgd', 'simclr', 'moco'),
  'augment': ('sgd',),
  'labels': ('logistic',),
  'draws': ('logistic',),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser, 'a run, or an exported encoder')
  options.other_data(parser)
  parser.add_argument(
    '--protocol',
    choices=('sgd', 'simclr', 'moco', 'logistic'),
    default='sgd',
    help='evaluation protocol',
  )
  parser.add_argument(
    '--epochs',
    type=options.positive,
    help='sgd, simclr, moco: epochs (default: 100; sgd: 20, and at least 3,000 steps)',
  )
  parser.add_argument(
    '--batch-size',
    type=options.positive,
    help='sgd, simclr, moco: batch size (default: 512 for simclr, 256 for sgd and moco)',
  )
  parser.add_argument(
    '--learning-rate',
    type=options.above_zero_list,
    metavar='R,R,...',
    help='sgd, simclr, moco: base learning rate, scaled by batch_size/256 '
    '(default: 11 values from 0.0001 to 10 for sgd, 0.1 for simclr, 30 for moco)',
  )
  parser.add_argument(
    '--cached',
    action='store_true',
    help='simclr, moco: no augmentation, features computed once; always so for sgd without --augment',
  )
  parser.add_argument(
    '--augment', action='store_true', help='sgd: train on cropped and flipped images'
  )
  parser.add_argument(
    '--seeds', type=options.positive, help='sgd, simclr, moco: number of random seeds (default: 1)'
  )
  parser.add_argument(
    '--labels',
    type=options.positive_list,
    metavar='N,N,...',
    help='logistic: labels per class (default: 1,10,100)',
  )
  parser.add_argument(
    '--draws',
    type=options.positive,
    help='logistic: random subsets per label count (default: 5)',
  )
  options.baselines(
    parser, 'also the untrained encoder and, for sgd and logistic without --augment, raw pixels'
  )
  options.out(parser)


def check(args: argparse.Namespace) -> None:
  """Refuses arguments that have no effect on the protocol."""
  for name, protocols in ONLY_WITH.items():
    if getattr(args, name) and args.protocol not in protocols:
      args.parser.error(
        f'--{name.replace("_", "-")} has no effect with --protocol={args.protocol}, only with '
        f'{", ".join(protocols)}'
      )
  if args.cached and (args.augment or args.protocol == 'logistic'):
    other = '--augment' if args.augment else '--protocol=logistic'
    args.parser.error(f'--cached has no effect with {other}')


def run(args: argparse.Namespace) -> int:
  """Evaluates; prints and saves the table."""
  from simclr_jax.commands import common
  from simclr_jax.evaluate import results

  config = common.recipe_of_run(args.workdir, args.overrides, args.data)
  results.check(args.workdir, args.out)
  encoders = common.encoders(args.workdir, args.baselines)
  train, test = common.labelled(config)
  evaluate = _logistic if args.protocol == 'logistic' else _linear
  name, result = evaluate(args, encoders, train, test)
  about = common.about(config, encoders['pretrained'], train, test)
  results.save(args.workdir, name, result, about, args.out)
  return 0


def _linear(args, encoders, train, test):
  """Name and result of the linear probe."""
  from simclr_jax.commands import common
  from simclr_jax.evaluate import metrics, probe, results

  protocol, seeds = probe.PROTOCOLS[args.protocol], args.seeds or 1
  cached = args.cached or (args.protocol == 'sgd' and not args.augment)
  pixels = args.baselines and args.protocol == 'sgd' and cached
  embeds = common.features(encoders, pixels, train, test)
  settings = probe.Settings(args.epochs, args.batch_size, args.learning_rate or (), cached)
  _announce(encoders, list(embeds), train, test, protocol, settings, seeds)
  scores: dict[str, list[dict[str, Any]]] = {}  # row -> result for each seed
  notes = {}
  for name, embed in embeds.items():
    features, encoder = (embed(train), embed(test)), encoders.get(name)
    if protocol.learning_rate and not args.learning_rate:
      warning = probe.rate_warning(features[0], protocol, max(train.classes, test.classes))
      if warning:
        notes[name] = warning
        print(f'warning: {name}: {warning}', flush=True)
    for seed in range(seeds):
      score = _train(name, encoder, train, test, protocol, settings, seed, features)
      scores.setdefault(name, []).append(score)
  first = scores['pretrained'][0]
  columns = {'top-1 %': 'top1', 'top-5 %': 'top5', 'mean per class %': 'mean_per_class'}
  columns = {column: key for column, key in columns.items() if key in first}
  how = (', cached features' if cached else ', augmented images') + results.over_seeds(seeds)
  result = {
    'title': f'Linear probe, {TITLES[args.protocol]}, {first["steps"]:,} steps{how}',
    'columns': list(columns),
    'rows': {
      name: [results.mean_and_std([100 * s[key] for s in each]) for key in columns.values()]
      for name, each in scores.items()
    },
    'notes': notes,
    'settings': first | {'seeds': seeds},
    'learning_rates': {name: [s['learning_rate'] for s in each] for name, each in scores.items()},
  }
  sizes = [
    metrics.effective_images(test.labels) if key == 'mean_per_class' else len(test)
    for key in columns.values()
  ]
  name = f'linear_{args.protocol}'
  name += (
    '_augmented' if args.augment else '_cached' if args.cached and args.protocol != 'sgd' else ''
  )
  return name, results.assess(result, test.labels, sizes, test.classes)


def _train(name, encoder, train, test, protocol, settings, seed, features):
  """The result of one probe without its weights; prints the learning rate that was chosen."""
  import dataclasses

  from simclr_jax.evaluate import probe
  from simclr_jax.runtime.progress import Bar

  settings, start = dataclasses.replace(settings, seed=seed), time.monotonic()
  with Bar(0, f'probe on {name}', 'step') as bar:
    score = probe.train_linear(
      encoder, train, test, protocol, settings, lambda step, steps, _: bar.to(step, steps), features
    )
  del score['classifier']
  chosen = ' was best on the validation split' if 'held_out' in score else ''
  print(
    f'{name}: learning rate {score["learning_rate"]:.3g}{chosen}; top-1 {score["top1"]:.1%}, '
    f'{time.monotonic() - start:.0f} s',
    flush=True,
  )
  return score


def _announce(encoders, rows, train, test, protocol, settings, seeds):
  """Prints the number of trainings and about how long they take."""
  import jax

  from simclr_jax.commands import common
  from simclr_jax.evaluate import probe

  rates = len(settings.learning_rates) or (1 if protocol.learning_rate else len(probe.RATES))
  trainings = rates + (rates > 1)
  seconds = common.embedding_seconds(encoders, train, test)
  if settings.cached:
    few = train.sample(jax.process_count())  # at least one image for each process
    d = encoders['pretrained'].embed(few)[0].shape[1]
    sizes = [common.pixel_count(train) if row == 'raw pixels' else d for row in rows]
    classes = max(train.classes, test.classes)
    each_size = {n: probe.seconds(n, len(train), classes, protocol, settings) for n in set(sizes)}
    seconds += seeds * sum(each_size[n] for n in sizes)
  else:
    epochs = settings.epochs or protocol.epochs
    seconds += common.embedding_seconds(encoders, train) * epochs * seeds * min(trainings, 2)
  each = f'{rates} learning rates and the best one again' if rates > 1 else '1 learning rate'
  common.announce(
    f'linear probe: {len(rows)} rows ({", ".join(rows)}) x {seeds} seed{"s" * (seeds > 1)} x {each}: '
    f'{len(rows) * seeds * trainings} trainings',
    seconds,
  )


def _logistic(args, encoders, train, test):
  """Name and result of logistic regression with few labels."""
  from simclr_jax.commands import common
  from simclr_jax.errors import ConfigError
  from simclr_jax.evaluate import logistic, results
  from simclr_jax.runtime.progress import Bar

  labels, draws = args.labels or [1, 10, 100], args.draws or 5
  try:
    logistic.check_labels(train.labels, labels)
  except ValueError as error:
    raise ConfigError(f'--labels: {error}') from None
  embeds = common.features(encoders, args.baselines, train, test)
  fits = len(labels) * draws
  common.announce(
    f'logistic regression: {len(embeds)} rows ({", ".join(embeds)}) x {len(labels)} numbers of labels x '
    f'{draws} subsets: {len(embeds) * fits} trainings; features',
    common.embedding_seconds(encoders, train, test),
  )
  rows, unfinished = {}, {}
  for name, embed in embeds.items():
    features = (*embed(train), *embed(test))
    with Bar(fits, f'logistic regression on {name}', 'fit') as bar:
      scores = logistic.label_efficiency(*features, labels, draws, progress=bar.to)
    rows[name] = [[100 * score['mean'], 100 * score['std']] for score in scores]
    stopped = sum(score['unfinished'] for score in scores)
    if stopped:
      unfinished[name] = f'{stopped} of {fits} fits stopped after 1,000 steps, before convergence'
  result = {
    'title': f'Logistic regression with few labels, accuracy % over {draws} draws',
    'columns': [f'{n} per class' for n in labels],
    'rows': rows,
    'notes': unfinished,
    'labels_per_class': labels,
    'settings': {
      'draws': draws,
      'test_images': len(test),
      'regularization': logistic.REGULARIZATION,
    },
  }
  return 'label_efficiency', results.assess(result, test.labels, classes=test.classes)
