"""What can be said on the command line: the verbs, their options and their help."""

import argparse
import math

from simclr_jax import paths
from simclr_jax.errors import ConfigError

ALONE = ('check-data', 'compile-check', 'export', 'report')  # one process, even where others are
DESCRIPTION = """Contrastive pretraining of image encoders in JAX.

The same `pretrain` command on the same --workdir goes on where the last one stopped.
"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
  """The words of a command line: `verb` and its options, and the fields set by --config.FIELD=VALUE.

  Exits with code 2 and a sentence on stderr if they are not a command.
  """
  parser = argparse.ArgumentParser(
    'simclr-jax',
    description=DESCRIPTION,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  verbs = parser.add_subparsers(metavar='VERB', required=True)

  def verb(name, summary, details):
    p = verbs.add_parser(
      name,
      help=summary,
      description=f'{summary[0].upper()}{summary[1:]}.\n\n{details}',
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
    )
    p.set_defaults(verb=name, parser=p, coordinator=None, num_processes=None, process_id=None)
    if name in ALONE:
      return p
    several = p.add_argument_group(
      'one of several processes', 'On Cloud TPU and Slurm these are found out.'
    )
    several.add_argument(
      '--coordinator', metavar='HOST:PORT', help='where process 0 can be reached'
    )
    several.add_argument('--num-processes', type=_positive, metavar='N')
    several.add_argument('--process-id', type=int, metavar='I', help='from 0')
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
    'pretrain', 'train an encoder without labels',
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
    'check-data', 'decode every image once and say what is there',
    'Example:\n'
    '  simclr-jax check-data --data=my_photographs --sheet=sheet.png\n\n'
    'Formats, sizes, classes, duplicates, and what cannot be decoded. The exit code is 1 if anything\n'
    'cannot.',
  )  # fmt: skip
  where(p, True)
  p.add_argument('--sheet', type=_path, metavar='FILE', help='write a contact sheet to this .png')

  p = verb(
    'probe', 'train a linear classifier on the frozen features',
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
    '--seeds', type=_positive, default=1, help='simclr, moco: trainings of each classifier (1)'
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
    'knn', 'classify the test images by their nearest training images',
    'Cosine similarity s, a neighbour counts exp(s / temperature). Needs labels.\n\n' + moved,
  )  # fmt: skip
  workdir(p)
  p.add_argument('--k', type=_positive, default=200, help='neighbours (200)')
  p.add_argument('--temperature', type=_above_zero, default=0.1, help='(0.1)')
  p.add_argument(
    '--baselines', action='store_true', help='also: raw pixels and the untrained encoder'
  )

  p = verb(
    'finetune', 'train the encoder on with few labels, and test it',
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
    'distill', 'teach a student what a fine-tuned run answers',
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
    'simclrv2', 'pretrain, fine-tune with few labels and distil, in one go',
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
    'transfer', 'measure the features on other data sets',
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
    '--baselines',
    action='store_true',
    help='also: raw pixels and the untrained encoder; with --finetune, from scratch',
  )

  p = verb(
    'embed', 'write the features of images to a file',
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
    'export', 'write the encoder alone, for fine-tuning elsewhere',
    'The folder gets variables/, an Orbax checkpoint of params and batch_stats, and encoder.json:\n'
    'architecture, preprocessing, provenance. The README shows how to read it without this package.',
  )  # fmt: skip
  workdir(p)
  p.add_argument('--to', choices=('orbax',), default='orbax', help='the format')
  p.add_argument('--out', required=True, type=_path, metavar='DIR', help='a new folder')

  p = verb(
    'report', 'make one HTML page of a run',
    'Curves, augmented views, a map of the embeddings, nearest neighbours, evaluations, recipe and\n'
    'versions. One file with everything in it, to be opened without a network.\n\n' + moved,
  )  # fmt: skip
  workdir(p)
  p.add_argument('--out', type=_path, metavar='FILE', help='(RUN/report.html)')

  p = verb(
    'compile-check', 'compile a recipe for a TPU that is not there',
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
  try:
    return paths.path(text)
  except ConfigError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


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
