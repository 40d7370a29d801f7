"""train a linear classifier on the frozen features

--protocol=simclr: SGD with Nesterov momentum and cosine decay, on cropped and flipped images. --protocol=moco: SGD
with learning rate 30, divided by 10 after 60 % and 80 % of the training. --cached trains on features that are computed
once, without augmentation, which takes minutes instead of hours on a CPU. With several --learning-rate values, all are
trained in parallel, and the one that is best on a 10 % validation split is used.

--protocol=logistic: logistic regression (L-BFGS) with few labels per class, on several random subsets.
The result is added to RUN/evaluation.json and to the report.
"""

import argparse
from typing import Any

from simclr_jax.commands import options

DETAILS = options.DATA_OVERRIDE


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.workdir(parser)
  parser.add_argument(
    '--protocol',
    choices=('simclr', 'moco', 'logistic'),
    default='simclr',
    help='evaluation protocol',
  )
  parser.add_argument('--epochs', type=options.positive, help='simclr, moco: epochs (default: 100)')
  parser.add_argument(
    '--batch-size',
    type=options.positive,
    help='simclr, moco: batch size (default: 512 for simclr, 256 for moco)',
  )
  parser.add_argument(
    '--learning-rate',
    type=options.above_zero_list,
    default=(),
    metavar='R,R,...',
    help='simclr, moco: base learning rate, scaled by batch_size/256 (default: 0.1 for simclr, 30 for moco)',
  )
  parser.add_argument(
    '--cached', action='store_true', help='simclr, moco: no augmentation, features computed once'
  )
  parser.add_argument(
    '--seeds', type=options.positive, default=1, help='simclr, moco: number of random seeds'
  )
  parser.add_argument(
    '--labels',
    type=options.positive_list,
    default='1,10,100',
    metavar='N,N,...',
    help='logistic: labels per class',
  )
  parser.add_argument(
    '--draws', type=options.positive, default=5, help='logistic: random subsets per label count'
  )
  options.baselines(parser, 'also the untrained encoder and, for logistic, raw pixels')


def run(args: argparse.Namespace) -> int:
  """Evaluates; prints and saves the table."""
  from simclr_jax.commands import common
  from simclr_jax.evaluate import results

  train, test = common.labelled(common.recipe_of_run(args.workdir, args.overrides))
  encoders = common.encoders(args.workdir, args.baselines)
  evaluate = _logistic if args.protocol == 'logistic' else _linear
  name, result = evaluate(args, encoders, train, test)
  results.save(args.workdir, name, result, encoders['pretrained'].provenance['step'])
  return 0


def _linear(args, encoders, train, test):
  """Name and result of the linear probe."""
  from simclr_jax.evaluate import probe
  from simclr_jax.evaluate.results import mean_and_std, over_seeds

  def progress(step, total, loss):
    print(f'  step {step}/{total}  loss {loss:.4f}', flush=True)

  scores: dict[str, list[dict[str, Any]]] = {}  # encoder -> result for each seed
  for name, encoder in encoders.items():
    print(f'linear probe on the {name} encoder', flush=True)
    for seed in range(args.seeds):
      settings = probe.Settings(args.epochs, args.batch_size, args.learning_rate, args.cached, seed)
      protocol = probe.PROTOCOLS[args.protocol]
      score = probe.train_linear(encoder, train, test, protocol, settings, progress)
      scores.setdefault(name, []).append(score)
      for rate, accuracy in score.get('held_out', {}).items():
        print(f'  learning rate {rate}: {accuracy:.1%} on the validation split')
  first = scores['pretrained'][0]
  columns = {'top-1 %': 'top1', 'top-5 %': 'top5', 'mean per class %': 'mean_per_class'}
  columns = {column: key for column, key in columns.items() if key in first}
  title = {'simclr': 'SimCLR', 'moco': 'MoCo'}[args.protocol]
  cached = ', cached features' if args.cached else ''
  result = {
    'title': f"Linear probe, {title}'s protocol, {first['epochs']} epochs{cached}"
    + over_seeds(args.seeds),
    'columns': list(columns),
    'rows': {
      name: [mean_and_std([100 * score[key] for score in seeds]) for key in columns.values()]
      for name, seeds in scores.items()
    },
    'settings': first | {'seeds': args.seeds},
  }
  return f'linear_{args.protocol}{"_cached" if args.cached else ""}', result


def _logistic(args, encoders, train, test):
  """Name and result of logistic regression with few labels."""
  from simclr_jax.commands import common
  from simclr_jax.errors import ConfigError
  from simclr_jax.evaluate import logistic

  rows = {}
  for name, embed in common.features(encoders, args.baselines).items():
    try:
      scores = logistic.label_efficiency(*embed(train), *embed(test), args.labels, args.draws)
    except ValueError as error:
      raise ConfigError(f'--labels: {error}') from None
    rows[name] = [[100 * score['mean'], 100 * score['std']] for score in scores]
  result = {
    'title': f'Logistic regression with few labels, accuracy % over {args.draws} draws',
    'columns': [f'{n} per class' for n in args.labels],
    'rows': rows,
    'settings': {
      'draws': args.draws,
      'test_images': len(test),
      'regularization': logistic.REGULARIZATION,
    },
  }
  return 'label_efficiency', result
