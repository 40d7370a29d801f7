"""distil a fine-tuned teacher into a student

Example:
  simclr-jax distill --teacher=runs/c10/finetune/1pct-seed0 --workdir=runs/c10/student \\
      --config.model.width_multiplier=0.5

The student is trained on the predictions of the teacher for all training images; with --config.alpha below 1, also on
the labels that the teacher was trained with. The student is as large as the teacher unless --config.model.* is set.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from simclr_jax.commands import finetune, options
from simclr_jax.errors import ConfigError
from simclr_jax.runtime import paths

SEEDS = 'each student has the seed and the labels of its teacher'
# Fields that the command sets itself -> how.
RESERVED = {
  **finetune.RESERVED,
  'seed': SEEDS,
  'data.label_seed': SEEDS,
  'data.labels': SEEDS,
  'teacher': 'use --teacher',
}
RESERVED.pop('init_from')  # a student may start from a run


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def check(args: argparse.Namespace) -> None:
  """Checks the recipe and its fields, and the folders of the students, which have the names of their teachers."""
  args.teacher = [t if t.name not in ('', '..') else paths.absolute(t) for t in args.teacher]
  options.check_folder(f'--workdir={args.workdir}', args.workdir)
  names = [teacher.name for teacher in args.teacher]
  for teacher, name in zip(args.teacher, names):
    if names.count(name) > 1:
      raise ConfigError(
        f'--teacher: two teachers have the name {name!r}: their students would, too'
      )
    if name.lower() in options.OF_A_RUN:
      raise ConfigError(f'--teacher={teacher}: a student cannot have the name {name!r}')
    student = args.workdir / name
    if paths.absolute(student) == paths.absolute(teacher):
      raise ConfigError(
        f'the student would replace its teacher {teacher}: choose another --workdir'
      )
    options.check_folder(f'--workdir={args.workdir}', student)
  finetune.check_fields(args.config, args.overrides, RESERVED)


def run(args: argparse.Namespace) -> int:
  """Trains and evaluates the students."""
  distill(args.teacher, args.workdir, args.config, args.overrides, args.command)
  return 0


def distill(
  teachers: Sequence[pathlib.Path],
  workdir: pathlib.Path,
  spec: str,
  overrides: Mapping[str, Any],
  command: str,
) -> dict[str, Any]:
  """Distils fine-tuned runs; prints and saves a table with the accuracy of teachers and students.

  Args:
    teachers: directories of fine-tuned runs, one per seed.
    workdir: directory of the students.
    spec, overrides: the recipe of the distillation.
    command: the command line, recorded.

  Returns:
    The saved result.
  """
  from simclr_jax import downstream, run_config, runs
  from simclr_jax.commands import common
  from simclr_jax.evaluate import results

  source = run_config.load(teachers[0], finetune.data_fields({'data.labels': '', **overrides}))
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
        results.mean_and_std([100 * r['top1'] for r in seeds]),
        [seeds[0]['parameters'] / 1e6, None],
      ]
      for name, seeds in tests.items()
    },
    'settings': {'recipe': spec, 'test_images': len(test)},
    'runs': tests,
    'class_names': list(test.class_names),
  }
  student = runs.load_encoder(workdir / teachers[0].name)
  # The second column is no accuracy.
  result = results.assess(result, test.labels, [len(test), None], train.classes)
  return results.save(workdir, 'distillation', result, common.about(source, student, train, test))
