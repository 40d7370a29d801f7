"""`simclr-jax VERB ...`: parses words, calls the function that does the work, turns errors into codes.

Exit codes: 0 done, 1 a failure named on stderr, 2 wrong usage or recipe, 3 the loss is not finite,
75 stopped by SIGTERM after saving, 130 stopped by Ctrl-C (the first one lets `pretrain` save).
"""

import argparse
import logging
import math
import os
import pathlib
import shlex
import sys

from simclr_jax.errors import ConfigError

DESCRIPTION = """Contrastive pretraining of image encoders in JAX.

The same `pretrain` command on the same --workdir goes on where the last one stopped.
"""


def main(argv: list[str] | None = None) -> int:
  """Runs one verb; `argv` defaults to the process's arguments. Returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  # TensorFlow only reads files and writes logs here: it has nothing to announce.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  logging.basicConfig(format='%(levelname)s: %(message)s')
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)  # Orbax raises what it also logs there
  sys.unraisablehook = _unraisable
  args, overrides = _parse(argv)
  args.command = 'simclr-jax ' + shlex.join(argv)
  try:
    return _run(args, overrides)
  except KeyboardInterrupt:
    return _fail('stopped by Ctrl-C', 130)


def _run(args, overrides):
  # After parsing: JAX takes seconds to import, and --help should not.
  import jax

  from simclr_jax.checkpoint import CheckpointError
  from simclr_jax.train import EXIT_NAN, NotFinite, Stopped

  try:
    return args.run(args, overrides)
  except ConfigError as error:
    return _fail(error, 2)
  except Stopped as stop:
    return stop.args[0]
  except NotFinite as error:
    return _fail(error, EXIT_NAN)
  except (CheckpointError, OSError) as error:
    return _fail(error, 1)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return _fail('this does not fit into the memory of the device: lower the batch size', 1)


def _unraisable(error):
  # When Orbax gives up on a damaged checkpoint, its reads that are still under way find their event
  # loop closed, each with a traceback from another thread.
  if str(error.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(error)


def _fail(error, code):
  print(f'simclr-jax: error: {error}', file=sys.stderr)
  return code


def _parse(argv):
  parser = argparse.ArgumentParser(
    'simclr-jax',
    description=DESCRIPTION,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  verbs = parser.add_subparsers(metavar='VERB', required=True)

  def verb(name, run, summary, details):
    p = verbs.add_parser(
      name,
      help=summary,
      description=f'{summary[0].upper()}{summary[1:]}.\n\n{details}',
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    p.set_defaults(run=run, parser=p)
    return p

  moved = 'The data is read from where the run read it; --config.data.dir=DIR names another place.'

  def workdir(p, text='the run to look at'):
    p.add_argument('--workdir', required=True, type=_path, metavar='RUN', help=text)

  def where(p, required):
    p.add_argument(
      '--data',
      required=required,
      metavar='WHERE',
      help='a folder of images; npz or npy files; a prepared TFDS data set, or its name; digits',
    )

  p = verb(
    'pretrain', _pretrain, 'train an encoder without labels',
    'Examples:\n'
    '  simclr-jax pretrain --data=my_photographs\n'
    '  simclr-jax pretrain --config=simclr_cifar10 --workdir=runs/c10 \\\n'
    '      --config.epochs=200 --config.data.dir=$HOME/tensorflow_datasets\n\n'
    'Without --config, a recipe is chosen by the number and size of the images and printed. Folders\n'
    'are searched to any depth; sub-folders called train and test are the splits.\n\n'
    'Shipped recipes, with their variants:\n'
    '  simclr_digits\n'
    '  simclr_images         224, 64, 32, cpu\n'
    '  simclr_cifar10        v1, v2\n'
    '  simclr_imagenet       v1, v2\n'
    '  simclr_losses         nt_xent, nt_logistic, margin_triplet, pairwise_margin; the middle two with _sh\n'
    '  moco_cifar10          asymmetric, symmetric\n'
    '  moco_imagenet         v1, v2\n'
    '  memory_bank_imagenet  info_nce, nce\n'
    '  end_to_end_imagenet\n'
    '  supervised_imagenet\n'
    '  finetune_imagenet     v1_1pct, v1_10pct, v1_100pct, v2_1pct, v2_10pct, v2_100pct\n'
    '  finetune_small\n'
    '  distill_imagenet      self, small\n'
    '  distill_small\n\n'
    'Any field is set with --config.FIELD=VALUE, for instance --config.batch_size=256,\n'
    '--config.model.depth=50, --config.augment.view1="moco_v2 | solarize(p=0.2)".\n'
    'simclr_jax/defaults.py names them all.',
  )  # fmt: skip
  where(p, False)
  p.add_argument(
    '--config', metavar='RECIPE', help='a shipped recipe, or the path of one; RECIPE:VARIANT'
  )
  p.add_argument(
    '--workdir',
    type=_path,
    metavar='RUN',
    help='where the run lives; if it holds one, it is resumed (runs/NAME_OF_DATA)',
  )

  p = verb(
    'check-data', _check_data, 'decode every image once and say what is there',
    'Example:\n'
    '  simclr-jax check-data --data=my_photographs --sheet=sheet.png\n\n'
    'Formats, sizes, classes, duplicates, and what cannot be decoded. The exit code is 1 if anything\n'
    'cannot.',
  )  # fmt: skip
  where(p, True)
  p.add_argument('--sheet', type=_path, metavar='FILE', help='write a contact sheet to this .png')

  p = verb(
    'probe', _probe, 'train a linear classifier on the frozen features',
    '--protocol=simclr: Nesterov SGD on cropped and flipped images, half a cosine; moco: learning rate 30,\n'
    'a tenth of it after 60 and 80 % of the training. --cached trains on features computed once, which\n'
    'takes minutes instead of hours on a CPU. Of several --learning-rate, tried at once, the one is taken that\n'
    'is best on a tenth of the training images, held out.\n'
    '--protocol=logistic fits a logistic regression (L-BFGS) with few labels a class, several\n'
    'times, on random subsets. Results go to RUN/evaluation.json and into the report.\n\n' + moved,
  )  # fmt: skip
  workdir(p)
  p.add_argument('--protocol', choices=('simclr', 'moco', 'logistic'), default='simclr')
  p.add_argument('--epochs', type=_positive, help='simclr, moco: passes over the data (100)')
  p.add_argument('--batch-size', type=_positive, help='simclr, moco: (512, 256)')
  p.add_argument(
    '--learning-rate',
    type=_rates,
    default=(),
    metavar='R,R,...',
    help='simclr, moco: times batch/256 (0.1, 30)',
  )
  p.add_argument(
    '--cached', action='store_true', help='simclr, moco: no augmentation, features computed once'
  )
  p.add_argument(
    '--labels',
    type=_positives,
    default=[1, 10, 100],
    metavar='N,N,...',
    help='logistic: labels a class (1,10,100)',
  )
  p.add_argument('--draws', type=_positive, default=5, help='logistic: random subsets for each (5)')
  p.add_argument(
    '--baselines',
    action='store_true',
    help='also: the untrained encoder, and for logistic raw pixels',
  )

  p = verb(
    'knn', _knn, 'classify the test images by their nearest training images',
    'Cosine similarity s, a neighbour counts exp(s / temperature). Needs labels.\n\n' + moved,
  )  # fmt: skip
  workdir(p)
  p.add_argument('--k', type=_positive, default=200, help='neighbours (200)')
  p.add_argument('--temperature', type=_above_zero, default=0.1, help='(0.1)')
  p.add_argument(
    '--baselines', action='store_true', help='also: raw pixels and the untrained encoder'
  )

  p = verb(
    'finetune', _finetune, 'train the encoder on with few labels, and test it',
    'Example:\n'
    '  simclr-jax finetune --workdir=runs/c10 --labels=1%,10% --seeds=5 --baselines\n\n'
    'Every training is a run of its own, RUN/finetune/1pct-seed0, that goes on where it stopped. Fields of\n'
    'its recipe are set with --config.FIELD=VALUE: head_layer (layers of the projection head that are kept),\n'
    'fine_tune_after_block (what is frozen), steps, learning_rate. ' + moved,
  )  # fmt: skip
  workdir(p, 'the pretrained run')
  p.add_argument('--config', metavar='RECIPE', default='finetune_small', help='(finetune_small)')
  p.add_argument(
    '--labels',
    type=_words,
    default=['1%', '10%'],
    metavar='N,P%,...',
    help='labels a class, or shares of all (1%%,10%%)',
  )
  p.add_argument('--seeds', type=_positive, default=1, help='trainings for each (1)')
  p.add_argument('--name', default='finetune', help='of the folder below RUN (finetune)')
  p.add_argument(
    '--baselines',
    action='store_true',
    help='also: the same from scratch, and logistic regression on raw pixels',
  )

  p = verb(
    'distill', _distill, 'teach a student what a fine-tuned run answers',
    'Example:\n'
    '  simclr-jax distill --teacher=runs/c10/finetune/1pct-seed0 --workdir=runs/c10/student \\\n'
    '      --config.model.width_multiplier=0.5\n\n'
    'The student learns from all training images, and with --config.alpha below 1 also from the labels\n'
    'that the teacher had. It has the size of the teacher unless --config.model.* says otherwise.',
  )  # fmt: skip
  p.add_argument(
    '--teacher', required=True, type=_paths, metavar='RUN,...', help='fine-tuned runs, one a seed'
  )
  workdir(p, 'where the students go')
  p.add_argument('--config', metavar='RECIPE', default='distill_small', help='(distill_small)')

  p = verb(
    'simclrv2', _simclrv2, 'pretrain, fine-tune with few labels and distil, in one go',
    'Example:\n'
    '  simclr-jax simclrv2 --config=simclr_digits --workdir=runs/digits --student-width=0.25 --seeds=5\n\n'
    'Each stage is a run: RUN, RUN/finetune/1pct-seed0, RUN/distill/1pct-seed0. The same command goes on\n'
    'where it stopped. --config.FIELD=VALUE is for the pretraining; the other stages take recipes.',
  )  # fmt: skip
  where(p, False)
  p.add_argument('--config', required=True, metavar='RECIPE', help='of the pretraining')
  workdir(p, 'where all of it goes')
  p.add_argument('--labels', default='1%', metavar='P%', help='a share, or a number a class (1%%)')
  p.add_argument('--finetune', default='finetune_small', metavar='RECIPE', help='(finetune_small)')
  p.add_argument('--distill', default='distill_small', metavar='RECIPE', help='(distill_small)')
  p.add_argument('--student-depth', type=_positive, help="(the teacher's)")
  p.add_argument('--student-width', type=_above_zero, help="(the teacher's)")
  p.add_argument('--seeds', type=_positive, default=1, help='of the last two stages (1)')

  p = verb(
    'transfer', _transfer, 'measure the features on other data sets',
    'Example:\n'
    '  simclr-jax transfer --workdir=runs/c10 --to=cifar100,dtd,my_labelled_photographs --baselines\n\n'
    'Logistic regression (L-BFGS, 45 regularisations, chosen on held-out training images), and with\n'
    '--finetune also fine-tuning. Pets, Flowers, Caltech-101 and Aircraft are measured by the mean accuracy of\n'
    'the classes, as published, all others by top-1. What is missing is listed as missing.',
  )  # fmt: skip
  workdir(p)
  p.add_argument(
    '--to', required=True, type=_words, metavar='WHERE,...', help='data sets as for --data'
  )
  p.add_argument('--data-dir', default='', metavar='DIR', help='where TFDS has prepared them')
  p.add_argument('--finetune', action='store_true', help='fine-tune on each, too')
  p.add_argument(
    '--config', metavar='RECIPE', default='finetune_small', help='of --finetune (finetune_small)'
  )
  p.add_argument(
    '--baselines', action='store_true', help='also: raw pixels and the untrained encoder'
  )

  p = verb(
    'embed', _embed, 'write the features of images to a file',
    'Example:\n'
    '  simclr-jax embed --workdir=runs/c10 --data=my_photographs --out=features.parquet\n\n'
    'Without --data: of the data of the run. The file has the features, float32 [n, d], names and, if\n'
    'they are known, labels; as .npy the features alone. The same command goes on where it stopped. ' + moved,
  )  # fmt: skip
  workdir(p, 'a run, or an exported encoder')
  where(p, False)
  p.add_argument('--split', choices=('train', 'test'), default='train', help='(train)')
  p.add_argument(
    '--out', required=True, type=_path, metavar='FILE', help='.npz, .npy, .csv or .parquet'
  )

  p = verb(
    'export', _export, 'write the encoder alone, for fine-tuning elsewhere',
    'The folder gets variables/, an Orbax checkpoint of params and batch_stats, and encoder.json:\n'
    'architecture, preprocessing, provenance. The README shows how to read it without this package.',
  )  # fmt: skip
  workdir(p)
  p.add_argument('--to', choices=('orbax',), default='orbax', help='the format')
  p.add_argument('--out', required=True, type=_path, metavar='DIR', help='a new folder')

  p = verb(
    'report', _report, 'make one HTML page of a run',
    'Curves, augmented views, a map of the embeddings, nearest neighbours, evaluations, recipe and\n'
    'versions. One file with everything in it, to be opened without a network.\n\n' + moved,
  )  # fmt: skip
  workdir(p)
  p.add_argument('--out', type=_path, metavar='FILE', help='(RUN/report.html)')

  p = verb(
    'compile-check', _compile_check, 'compile a recipe for a TPU that is not there',
    'Examples:\n'
    '  simclr-jax compile-check --config=simclr_imagenet:v1 --topology=v3-128\n'
    '  simclr-jax compile-check --config=moco_imagenet:v2 --topology="2x v5e-16" --json\n'
    '  simclr-jax compile-check --config=simclr_imagenet:v1 --topology=v5e-64 --find-batch\n\n'
    'The TPU compiler (pip install .[compile-check]) compiles the training step as a run would, which\n'
    'takes minutes and no TPU. Printed are memory, operations, every collective and what it is for, and\n'
    'what bounds the time of a step. The exit code is 1 if the step does not fit, if negatives or\n'
    'BatchNorm do not reach all devices, or if images move between devices. Fields are set as in pretrain.',
  )  # fmt: skip
  p.add_argument('--config', required=True, metavar='RECIPE', help='RECIPE or RECIPE:VARIANT')
  p.add_argument(
    '--topology',
    required=True,
    metavar='TPU',
    help='v3-128, v4-128, v5e-256, v5p-8, v6e-64, v5e:4x4',
  )
  p.add_argument('--slices', type=_positive, default=1, metavar='N', help='so many of them (1)')
  p.add_argument('--json', action='store_true', help='print one JSON object')
  p.add_argument('--hlo', type=_path, metavar='FILE', help='write the compiled program, as text')
  p.add_argument('--find-batch', action='store_true', help='find the largest batch that fits')

  args, rest = parser.parse_known_args(argv)
  overrides = {}
  while rest:
    word = rest.pop(0)
    name, equals, value = word.partition('=')
    if not name.startswith('--config.'):
      args.parser.error(f'unexpected argument {word!r}')
    if not equals:
      if not rest:
        args.parser.error(f'{name} needs a value: {name}=VALUE')
      value = rest.pop(0)
    overrides[name.removeprefix('--config.')] = value
  return args, overrides


def _path(text):
  return pathlib.Path(text).expanduser()


def _positive(text):
  try:
    value = int(text)
  except ValueError:
    raise argparse.ArgumentTypeError(f'{text!r} is not a whole number') from None
  if value < 1:
    raise argparse.ArgumentTypeError(f'{text} is below 1')
  return value


def _positives(text):
  return [_positive(t) for t in text.split(',')]


def _words(text):
  return [t.strip() for t in text.split(',')]


def _paths(text):
  return [_path(t) for t in text.split(',')]


def _above_zero(text):
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f'{text!r} is not a number above 0')
  return value


def _rates(text):
  return tuple(_above_zero(t) for t in text.split(','))


def _pretrain(args, overrides):
  from simclr_jax import config, train
  from simclr_jax.data import discover

  if not (args.data or args.config):
    args.parser.error('say --data=WHERE, or --config=RECIPE, or both')
  if not (args.data or args.workdir):
    args.parser.error('say --workdir=RUN')
  workdir = args.workdir or pathlib.Path('runs', _path(args.data).resolve().name.split('.')[0])
  found = discover.fields(args.data) if args.data else {}
  if args.config:
    recipe = config.load(args.config, {**found, **overrides})
  elif (workdir / 'config.json').exists():
    recipe = config.from_dict(config.read_run(workdir), {**found, **overrides})
  else:
    recipe = _suitable(found, overrides)
  return train.pretrain(recipe, workdir, args.command)


def _suitable(found, overrides):
  """A recipe for the data, printed as the words that would name it."""
  import jax

  from simclr_jax import config, data
  from simclr_jax.data import discover

  images = data.load(config.load('simclr_images', {**found, **_data_only(overrides)}).data, 'train')
  accelerators = 0 if jax.default_backend() == 'cpu' else jax.device_count()
  name, chosen = discover.recipe(images, accelerators)
  values = {**chosen, **{k: v for k, v in found.items() if v}}
  words = [f'--config={name}', *(f'--config.{k}={v}' for k, v in values.items())]
  print(f'{len(images):,} images, typically {discover.typical_side(images)} pixels: taking')
  print(f'  {shlex.join(words)}', flush=True)
  return config.load(name, {**chosen, **found, **overrides})


def _data_only(overrides):
  return {k: v for k, v in overrides.items() if k.startswith('data.')}


def _check_data(args, overrides):
  from simclr_jax import config
  from simclr_jax.data import check, discover

  found = {**discover.fields(args.data), 'data.on_device': 'no', **overrides}
  return check.report(config.load('simclr_images', found).data, args.sheet)


def _run_config(args, overrides):
  """The recipe of --workdir; only where its data lies may be overridden."""
  from simclr_jax import config

  for field in overrides:
    if not field.startswith('data.'):
      raise ConfigError(f"--config.{field}: only data.* can be set here, the rest is the run's")
  return config.from_dict(config.read_run(args.workdir), overrides)


def _probe(args, overrides):
  from simclr_jax.evaluate import run

  recipe = _run_config(args, overrides)
  if args.protocol != 'logistic':
    run.linear_probe(
      args.workdir,
      recipe,
      args.protocol,
      args.epochs,
      args.batch_size,
      args.learning_rate,
      args.cached,
      args.baselines,
    )
  else:
    run.label_efficiency(args.workdir, recipe, args.labels, args.draws, args.baselines)
  return 0


def _knn(args, overrides):
  from simclr_jax.evaluate import run

  recipe = _run_config(args, overrides)
  run.nearest_neighbours(args.workdir, recipe, args.k, args.temperature, args.baselines)
  return 0


def _finetune(args, overrides):
  from simclr_jax.evaluate import run

  place = {k: v for k, v in overrides.items() if k == 'data.dir'}
  run.finetune(
    args.workdir,
    run.config_of(args.workdir, place),
    args.config,
    overrides,
    args.labels,
    args.seeds,
    args.name,
    args.baselines,
    args.command,
  )
  return 0


def _distill(args, overrides):
  from simclr_jax.evaluate import run

  run.distill(args.teacher, args.workdir, args.config, overrides, args.command)
  return 0


def _simclrv2(args, overrides):
  from simclr_jax import config
  from simclr_jax.data import discover
  from simclr_jax.evaluate import run

  found = discover.fields(args.data) if args.data else {}
  size = {'model.depth': args.student_depth, 'model.width_multiplier': args.student_width}
  student = {k: str(v) for k, v in size.items() if v}
  for spec in (args.finetune, args.distill):
    config.load(spec)  # a typing error is told now and not in an hour
  run.simclrv2(
    args.workdir,
    config.load(args.config, {**found, **overrides}),
    args.finetune,
    args.distill,
    student,
    args.labels,
    args.seeds,
    args.command,
  )
  return 0


def _transfer(args, overrides):
  from simclr_jax.evaluate import run

  if overrides and not args.finetune:
    args.parser.error('--config.* is for --finetune')
  run.transfer(
    args.workdir,
    run.config_of(args.workdir),
    args.to,
    args.data_dir,
    args.config,
    overrides,
    args.finetune,
    args.baselines,
    args.command,
  )
  return 0


def _embed(args, overrides):
  from simclr_jax import config, data
  from simclr_jax.data import discover
  from simclr_jax.evaluate import embed
  from simclr_jax.interop import orbax

  embed.check(args.out)
  encoder = orbax.load_encoder(args.workdir)
  if args.data:
    found = {**discover.fields(args.data), **_data_only(overrides)}
    recipe = config.load('simclr_images', found)
  else:
    recipe = _run_config(args, overrides)
  dataset = data.load(recipe.data, args.split)
  if not len(dataset):
    raise ConfigError(f'--data={args.data} holds no images')
  embed.embed(encoder, dataset, args.out)
  return 0


def _export(args, overrides):
  from simclr_jax.interop import orbax

  _run_config(args, overrides)
  orbax.export(orbax.load_encoder(args.workdir), args.out)
  print(f'wrote {args.out}')
  return 0


def _report(args, overrides):
  from simclr_jax.report import page

  out = args.out or args.workdir / 'report.html'
  page.write(args.workdir, _run_config(args, overrides), out)
  print(f'wrote {out}')
  return 0


def _compile_check(args, overrides):
  import json

  import jax

  from simclr_jax import compile_check, compile_report, config, hardware

  os.environ.update(hardware.ENVIRONMENT)
  jax.config.update('jax_platforms', 'cpu')  # only describes the TPU
  topology = hardware.topology(args.topology, args.slices)
  recipe = config.load(args.config, overrides)
  if args.find_batch:
    found = compile_check.find_batch(
      recipe, topology, lambda text: print(text, file=sys.stderr, flush=True)
    )
    about = {'recipe': args.config, 'topology': args.topology, 'largest_batch': found}
    print(json.dumps(about) if args.json else f'the largest batch that fits: {found:,}')
    return 0 if found else 1
  words = shlex.join([args.config, *(f'--config.{k}={v}' for k, v in overrides.items())])
  result = compile_check.check(recipe, topology, words, args.hlo)
  print(json.dumps(result, indent=1) if args.json else compile_report.report(result))
  if result['problems']:
    return _fail('; '.join(result['problems']), 1)
  return 0
