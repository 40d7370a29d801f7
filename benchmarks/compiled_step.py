"""What three training steps cost, as compiled for an H100 and a TPU v5e, without them: kernels, bytes, operations, memory.

  python benchmarks/compiled_step.py [--devices=h100,v5e-4]

Run before and after a change of the step: all numbers are counted in the compiled program, so they do not depend on
the machine. Needs the extras compile-check-gpu and compile-check; 1 to 3 minutes a step.
"""

import argparse
import os
import pathlib
import tempfile

import jax

from simclr_jax import config
from simclr_jax.compile_check import check, hardware, kernels

# The batch of one H100; of four v5e, which have 16 GB each.
RECIPES = {
  'simclr_imagenet:v1': {'batch_size': '256'},
  'moco_imagenet:v2': {'batch_size': '256'},
  'simclr_cifar10:v1': {'batch_size': '512', 'data.examples': '50000'},
}
HEAD = (
  'recipe', 'devices', 'batch', 'kernels', 'fusions', 'copies', 'collectives', 'GB', 'TFLOP', 'GiB', 'compute, ms', 'memory, ms',
)  # fmt: skip


def row(recipe, fields, topology):
  """The cells of one line: values per device and step, of a TPU the bytes and operations of its compiler."""
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / 'step.txt'
    result = check.check(config.load(recipe, fields), topology, recipe, file)
    count = kernels.count(file.read_text()).kernels
  return (
    f'`{recipe}`',
    topology.text,
    result['batch_size'],
    f'{sum(count.values()):,}',
    f'{count.get("fusion", 0):,}',
    count.get('copy', 0),
    count.get('collective', 0),
    f'{result["bytes_accessed"] / 1e9:.1f}',
    f'{result["flops"] / 1e12:.2f}',
    f'{result["memory"]["total"] / 2**30:.2f}',
    f'{1000 * result["seconds"]["compute"]:.1f}',
    f'{1000 * result["seconds"]["memory"]:.1f}',
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--devices', default='h100,v5e-4', help='names of compile-check')
  args = parser.parse_args()
  os.environ.update(hardware.ENVIRONMENT)
  jax.config.update('jax_platforms', 'cpu')
  for line in (HEAD, ['---'] * len(HEAD)):
    print(f'| {" | ".join(line)} |', flush=True)
  for recipe, fields in RECIPES.items():
    for name in args.devices.split(','):
      cells = row(recipe, fields, hardware.topology(name))
      print(f'| {" | ".join(map(str, cells))} |', flush=True)


if __name__ == '__main__':
  main()
