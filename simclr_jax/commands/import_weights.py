"""import weights of another program

Examples:
  simclr-jax import moco_v2_800ep_pretrain.pth.tar --network=encoder_q --out=encoders/moco
  simclr-jax import r50_2x_sk1/model.ckpt-250228 --network=ema --out=encoders/simclr_v2

WEIGHTS is a file of PyTorch, which is read without executing anything in it, or of safetensors; a checkpoint of
TensorFlow or its folder; a SavedModel; a folder of Hugging Face; a pickle of BYOL. Depth, width and selective kernels are
detected. The output folder is an exported encoder: knn, probe, finetune, transfer, embed, report and export work on it.
docs/weights.md has the command for each published model. --config.init_from=WEIGHTS of pretrain and finetune reads
the same files.
"""

import argparse
import dataclasses

from simclr_jax.commands import options
from simclr_jax.validation import Choices

# Arguments that are fields `model.*`, which decide what the shapes of the weights do not.
MODEL = {
  'variant': 'padding and shortcuts: that of the program that trained the weights, simclr also for PyTorch files converted from it',
  'stem': 'first layer; needed if it is 3x3: cifar has stride 1, strided stride 2',
  'normalize': 'mean and standard deviation of the pixels that the network was trained with (default: as the file says, or imagenet for PyTorch)',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  from simclr_jax import fields

  parser.add_argument('weights', type=options.path, metavar='WEIGHTS', help='file or folder')
  parser.add_argument(
    '--out', required=True, type=options.path, metavar='DIR', help='output folder, new or empty'
  )
  parser.add_argument(
    '--network', default='', metavar='NAME', help='the network, if the file contains several'
  )
  parser.add_argument(
    '--ema', action='store_true', help='the EMA network of SimCLR v2: the same as --network=ema'
  )
  for name, text in MODEL.items():
    allowed = fields.TABLE[f'model.{name}'].allowed
    assert isinstance(allowed, Choices)
    parser.add_argument(f'--{name}', choices=allowed.values, help=text)
  parser.add_argument(
    '--image-size',
    type=options.positive,
    metavar='N',
    help='side of the images in pixels (default: by stem: imagenet 224, strided 64, cifar 32)',
  )


def run(args: argparse.Namespace) -> int:
  """Reads the weights and writes the folder."""
  from simclr_jax.errors import ConfigError
  from simclr_jax.interop import orbax, weights

  if args.ema and args.network not in ('', 'ema'):
    raise ConfigError(f'--ema and --network={args.network}: choose one of them')
  orbax.check_out(args.out)
  given = {name: getattr(args, name) for name in MODEL if getattr(args, name)}
  network = weights.load(args.weights, given, 'ema' if args.ema else args.network)
  if args.normalize:
    network = dataclasses.replace(network, normalize=args.normalize)
  encoder = weights.encoder(network, args.weights, args.image_size or 0, args.command)
  orbax.export(encoder, args.out, network.head)
  for line in weights.describe(network, encoder):
    print(line)
  print(f'wrote {args.out}')
  return 0
