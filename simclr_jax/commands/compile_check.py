"""ahead-of-time (AOT) compile a recipe for TPUs or NVIDIA GPUs, without them

Examples:
  simclr-jax compile-check --config=simclr_imagenet:v1 --topology=v3-128
  simclr-jax compile-check --config=moco_imagenet:v2 --topology="2x v5e-16" --json
  simclr-jax compile-check --config=moco_imagenet:v2 --topology=a100-40x8
  simclr-jax compile-check --config=simclr_cifar10 --topology=rtx3090 --find-batch

The compiler of TPUs (pip install .[compile-check]) or of GPUs (pip install .[compile-check-gpu]) compiles the training
step as a run would, which takes minutes. The output lists memory, operations, every collective and its purpose, and
the bottleneck (roofline: compute, memory or interconnect). The exit code is 1 if the step does not fit, if negatives or
BatchNorm do not reach all devices, or if images move between devices. Fields are set as in pretrain.

--find-batch names the largest batch that fits by each way to save memory: plain, rematerialize=true,
rematerialize=parts and accumulate_steps=8, with the memory per device and the time of an image, relative to plain.
"""

import argparse
import json
import os
import shlex
import sys

from simclr_jax.commands import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments."""
  parser.add_argument('--config', required=True, metavar='RECIPE', help='RECIPE or RECIPE:VARIANT')
  parser.add_argument(
    '--topology',
    required=True,
    metavar='DEVICES',
    help='TPUs: v3-128, v4-128, v5e-256, v5p-8, v6e-64, v5e:4x4; GPUs: h100, h100x8, h200, a100-40, a100-80, l4, t4, '
    'rtx3090, rtx4090, ...',
  )
  parser.add_argument(
    '--slices', type=options.positive, default=1, metavar='N', help='number of TPU slices'
  )
  parser.add_argument('--json', action='store_true', help='print one JSON object')
  parser.add_argument(
    '--hlo', type=options.path, metavar='FILE', help='write the compiled program, as text'
  )
  parser.add_argument('--find-batch', action='store_true', help='find the largest batch that fits')


def run(args: argparse.Namespace) -> int:
  """Compiles the step and prints the result; exit code 1 if there are problems."""
  from simclr_jax import config as recipes

  recipe = recipes.load(args.config, args.overrides)
  import jax

  from simclr_jax.compile_check import check, hardware, text

  os.environ.update(hardware.ENVIRONMENT)
  jax.config.update('jax_platforms', 'cpu')  # no TPU or GPU is needed
  topology = hardware.topology(args.topology, args.slices)
  if args.find_batch:
    return _find_batch(args, recipe, topology)
  fields = [f'--config.{k}={v}' for k, v in args.overrides.items()]
  result = check.check(recipe, topology, shlex.join([args.config, *fields]), args.hlo)
  print(json.dumps(result, indent=1) if args.json else text.report(result))
  if result['problems']:
    print(f'simclr-jax: error: {"; ".join(result["problems"])}', file=sys.stderr)
  return int(bool(result['problems']))


def _find_batch(args, recipe, topology):
  from simclr_jax.compile_check import batches, check

  check.describe_devices(topology)  # an invalid one is one error, not one for each way
  rows = batches.find(recipe, topology, lambda text: print(text, file=sys.stderr, flush=True))
  result = {'recipe': args.config, 'topology': args.topology, 'ways': rows}
  print(json.dumps(result) if args.json else batches.table(rows, topology.devices))
  return 0 if any(row.get('largest_batch') for row in rows) else 1
