"""pretrain, fine-tune with few labels, distil and report, end to end

Example:
  simclr-jax simclrv2 --config=simclr_digits --workdir=runs/digits --labels=2 --student-width=0.25 --seeds=3

Each stage is a run: RUN, RUN/finetune/2-seed0, RUN/finetune/2-seed0-scratch, RUN/distill/2-seed0. The report is
RUN/report.html. Rerun the same command to resume the stage that was interrupted. --config.FIELD=VALUE sets fields of
the pretraining; the other stages have their own recipes.
"""

import argparse

from simclr_jax import config as recipes
from simclr_jax.commands import finetune, options


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  options.data(parser, required=False)
  parser.add_argument('--config', required=True, metavar='RECIPE', help='recipe of the pretraining')
  options.workdir(parser, 'directory of the pretraining and of all other stages')
  parser.add_argument(
    '--labels', default='1%', metavar='N|P%', help='label fraction, or labels per class'
  )
  parser.add_argument(
    '--finetune', default='finetune_small', metavar='RECIPE', help='recipe of the fine-tuning'
  )
  parser.add_argument(
    '--distill', default='distill_small', metavar='RECIPE', help='recipe of the distillation'
  )
  parser.add_argument(
    '--student-depth', type=options.positive, help="layers of the student (default: the teacher's)"
  )
  parser.add_argument(
    '--student-width',
    type=options.above_zero,
    help="width multiplier of the student (default: the teacher's)",
  )
  parser.add_argument(
    '--seeds',
    type=options.positive,
    default=1,
    help='number of random seeds for fine-tuning and distillation',
  )
  options.scratch(parser, 'as for finetune')


def check(args: argparse.Namespace) -> None:
  """Checks the recipes of all stages before the first one starts."""
  finetune.check_fields(args.config, args.overrides, {})
  from simclr_jax.data import labels as subsets

  subsets.per_class(args.labels, examples=10**9, classes=1)
  for stage in ('finetune', 'distill'):
    options.check_folder(f'--workdir={args.workdir}', args.workdir / stage)
  recipes.load(args.finetune)
  recipes.load(args.distill, _student(args))


def run(args: argparse.Namespace) -> int:
  """Runs the stages; prints and saves the table."""
  from simclr_jax import downstream, run_config, train
  from simclr_jax.commands import common, report
  from simclr_jax.commands.distill import distill
  from simclr_jax.errors import Stopped
  from simclr_jax.evaluate import results
  from simclr_jax.report import page
  from simclr_jax.runtime import distributed

  workdir = args.workdir
  pretraining = common.recipe_with_data(args.config, args.data, args.overrides)
  if workdir.is_dir():
    results.check(workdir)
    page.check_out(workdir / 'report.html')
  images = common.labelled(pretraining)
  code = train.pretrain(pretraining, workdir, args.command, images[0], test=images[1])
  if code:
    raise Stopped(code)
  fields = finetune.data_fields({'data.dir': pretraining.data.dir})
  finetuned = finetune.finetune(
    workdir, run_config.load(workdir, fields), args.finetune, {},
    labels=[args.labels], seeds=args.seeds, baselines=True, command=args.command,
    scratch_steps=args.scratch_steps, scratch_learning_rate=args.scratch_learning_rate,
  )  # fmt: skip
  short = downstream.short(args.labels)
  teachers = [workdir / 'finetune' / f'{short}-seed{seed}' for seed in range(args.seeds)]
  distilled = distill(teachers, workdir / 'distill', args.distill, _student(args), args.command)
  about = {key: finetuned[key] for key in ('step', 'checkpoint', 'data')}
  results.save(workdir, 'simclrv2', _summary(args, finetuned, distilled), about)
  if not distributed.is_distributed():
    report.write(workdir, run_config.load(workdir, fields), workdir / 'report.html')
  return 0


def _student(args):
  """The fields of the network of the student that the user set."""
  size = {'model.depth': args.student_depth, 'model.width_multiplier': args.student_width}
  return {field: value for field, value in size.items() if value}


def _summary(args, finetuned, distilled):
  """The result of all stages."""
  from simclr_jax.evaluate.results import amount, over_seeds

  rows = {**finetuned['rows'], 'distilled student': distilled['rows']['student']}
  intervals = {**finetuned['interval'], 'distilled student': distilled['interval']['student']}
  size = [distilled['rows'][name][1][0] for name in ('teacher', 'student')]
  order = ('raw pixels', 'untrained encoder', 'from scratch', 'fine-tuned', 'distilled student')
  return {
    'title': f'SimCLR v2 with {amount(args.labels)}, top-1 %{over_seeds(args.seeds)}',
    'columns': finetuned['columns'],
    'rows': {name: [rows[name][0]] for name in order if name in rows},
    'interval': {name: intervals[name][:1] for name in order if name in rows},
    'test_images': finetuned['test_images'],
    'chance': finetuned['chance'],
    'notes': {
      **finetuned['notes'],
      'distilled student': f'{size[1]:.2f} million parameters, teacher {size[0]:.2f} million; '
      'distilled on all images without labels',
    },
    'settings': {'seeds': args.seeds, 'finetuning': args.finetune, 'distillation': args.distill},
  }
