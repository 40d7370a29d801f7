"""distil a fine-tuned teacher into a student

Example:
  simclr-jax distill --teacher=runs/c10/finetune/1pct-seed0 --workdir=runs/c10/student \\
      --config.model.width_multiplier=0.5

The student is trained on the predictions of the teacher for all training images, and with --config.alpha below 1
also on the labels that the teacher had. It has the size of the teacher unless --config.model.* changes it.
"""

from simclr_jax import config as recipes
from simclr_jax.commands import options


def add_arguments(parser):
  """Declares the arguments."""
  parser.add_argument(
    '--teacher',
    required=True,
    type=options.path_list,
    metavar='RUN,...',
    help='fine-tuned runs, one per seed',
  )
  options.workdir(parser, 'directory of the students')
  parser.add_argument(
    '--config', metavar='RECIPE', default='distill_small', help='recipe of the distillation'
  )


def check(args):
  """Finds errors in the recipe and its fields."""
  recipes.load(args.config, args.overrides)


def run(args) -> int:
  """Trains, tests, prints and saves the table."""
  distill(args.teacher, args.workdir, args.config, args.overrides, args.command)
  return 0


def distill(teachers, workdir, spec, overrides, command):
  """Distillation of fine-tuned runs (`downstream.students`): teachers and students, top-1.

  Args:
    teachers: one run or, with several seeds, several.
    workdir: of the students.
    spec, overrides: the recipe of distillation.
    command: recorded.

  Returns:
    The saved result.
  """
  from simclr_jax import downstream
  from simclr_jax.commands import common
  from simclr_jax.evaluate import results

  source = recipes.of_run(teachers[0], {'data.labels': ''})  # all images
  train, test = common.labelled(source)
  recipe = downstream.recipe(spec, source, overrides)
  workdir.mkdir(parents=True, exist_ok=True)
  students = downstream.students(workdir, recipe, train, test, teachers=teachers, command=command)
  tests = {'teacher': [downstream.test(t, test) for t in teachers], 'student': students}
  result = {
    'title': f'Distillation, {len(train):,} images{results.over_seeds(len(teachers))}',
    'columns': ['top-1 %', 'parameters, millions'],
    'rows': {
      name: [
        results.mean_and_std([100 * r['top1'] for r in found]),
        [found[0]['parameters'] / 1e6, None],
      ]
      for name, found in tests.items()
    },
    'settings': {'recipe': spec, 'test_images': len(test)},
    'runs': tests,
  }
  step = common.step_of(workdir / teachers[0].name)
  return results.save(workdir, 'distillation', result, step)
