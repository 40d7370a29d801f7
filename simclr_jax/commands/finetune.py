"""fine-tune on a small labelled subset and evaluate

Example:
  simclr-jax finetune --workdir=runs/c10 --labels=1%,10% --seeds=5 --baselines

Each fine-tuning run has its own directory, RUN/finetune/1pct-seed0, and is resumed by the same command. Fields of
its recipe are set with --config.FIELD=VALUE: head_layer (layers of the projection head that are kept),
fine_tune_after_block (what is frozen), steps, learning_rate.
"""

from simclr_jax import config as recipes
from simclr_jax.commands import options

DETAILS = options.DATA_OVERRIDE


def add_arguments(parser):
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


def check(args):
  """Finds errors in the recipe and its fields."""
  recipes.load(args.config, args.overrides)


def run(args) -> int:
  """Trains, tests, prints and saves the table."""
  data_dir = {k: v for k, v in args.overrides.items() if k == 'data.dir'}
  finetune(
    args.workdir,
    recipes.of_run(args.workdir, data_dir),
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
  workdir, source, spec, overrides, *, labels, seeds, command, name='finetune', baselines=False
):
  """Fine-tuning of a run with few labels (`downstream.few_labels`): top-1 by initialisation and labels.

  Args:
    workdir, source: the pretrained run and its recipe.
    spec, overrides: the recipe of fine-tuning.
    labels, seeds, command, name, baselines: as of `downstream.few_labels`.

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
