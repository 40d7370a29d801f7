"""Compiles the shipped ImageNet recipes for TPUs, and writes the table in docs/tpu.md.

  python benchmarks/tpu_table.py [--only=RECIPE[@TPU],...] [--write]

One compilation a cell, each in a process of its own and minutes long; what is done stays in --cache, so the
command can be stopped and goes on. Delete the folder after a change of the code. --write: only the table, from
what there is.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
TOPOLOGIES = ('v3-128', 'v4-128', 'v5e-64', 'v5e-256', 'v6e-64')
LABELS = '--config.data.num_classes=1000'  # which these take from the run that they go on from
# Variants that are left out compile to the same program but for numbers.
RECIPES = {
  'simclr_imagenet:v1': [],
  'moco_imagenet:v2': [],
  'moco_imagenet:v1': [],
  'simclr_imagenet:v2': [],
  'supervised_imagenet': [],
  'finetune_imagenet:v2_1pct': [LABELS],
  'finetune_imagenet:v1_1pct': [LABELS],
  'distill_imagenet:small': [LABELS],
  'memory_bank_imagenet:info_nce': [],
  'memory_bank_imagenet:nce': [],
  'end_to_end_imagenet': [],
}
BEGIN, END = '<!-- begin: make tpu-table -->', '<!-- end: make tpu-table -->'


def compile_cell(recipe, topology, path, texts):
  """One process: `simclr-jax compile-check`. Returns whether there is a result."""
  command = [sys.executable, '-m', 'simclr_jax', 'compile-check', f'--config={recipe}']
  command += [f'--topology={topology}', '--json', *RECIPES[recipe]]
  if texts:
    texts.mkdir(parents=True, exist_ok=True)
    command.append(f'--hlo={texts / path.stem}.txt')
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if not done.stdout.startswith('{'):
    print(done.stderr.strip(), file=sys.stderr)
    return False
  path.write_text(done.stdout)
  return True


def row(recipe, topology, cell):
  """A line of the table."""
  name = [f'`{recipe}`', topology]
  if not cell:
    return [*name, *[''] * 7, 'not compiled yet']
  gib = 2**30
  total, limit = cell['memory']['total'], cell['memory']['limit']
  used = f'{total / gib:.1f} of {limit / gib:.1f}' if total else f'more than {limit / gib:.1f}'
  name += [f'{cell["batch_size"]:,}', used]
  if 'flops' not in cell:
    return [*name, *[''] * 5, '**does not fit**']
  counts = dict.fromkeys(('embeddings', 'gradients', 'BatchNorm', 'images'), 0)
  for c in cell['collectives']:
    parts = c['bytes_by_purpose']
    largest = max(parts, key=parts.get)
    for word in counts:
      counts[word] += c['count'] * (word in largest)
  times = {k: f'{1000 * v:.1f}' for k, v in cell['seconds'].items()}
  times[cell['bound']] = f'**{times[cell["bound"]]}**'
  verdict = '**fails**: ' + '; '.join(cell['problems']) if cell['problems'] else 'ok'
  return [
    *name,
    f'{cell["flops"] / 1e12:.2f}',
    *(times[k] for k in ('compute', 'memory', 'links')),
    ' / '.join(map(str, counts.values())),
    verdict,
  ]


def table(cells):
  head = [
    'recipe', 'TPU', 'batch', 'GiB a device', 'TFLOP', 'compute, ms', 'memory, ms', 'links, ms',
    'collectives', 'verdict',
  ]  # fmt: skip
  rows = [row(r, t, cells.get((r, t))) for r in RECIPES for t in TOPOLOGIES]
  return '\n'.join(f'| {" | ".join(line)} |' for line in [head, ['---'] * len(head), *rows])


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cache', type=pathlib.Path, default=HERE / 'tpu_table')
  parser.add_argument('--texts', type=pathlib.Path, help='also keep the compiled programs, here')
  parser.add_argument('--only', default='', metavar='RECIPE[@TPU],...', help='these, in this order')
  parser.add_argument('--write', action='store_true', help='compile nothing')
  parser.add_argument('--page', type=pathlib.Path, default=HERE.parent / 'docs/tpu.md')
  args = parser.parse_args()
  args.cache.mkdir(parents=True, exist_ok=True)

  def path(recipe, topology):
    return args.cache / f'{recipe.replace(":", "-")}-{topology}.json'

  def write():
    cells = {
      (r, t): json.loads(path(r, t).read_text())
      for r in RECIPES
      for t in TOPOLOGIES
      if path(r, t).exists()
    }
    before, rest = args.page.read_text().split(BEGIN)
    args.page.write_text(f'{before}{BEGIN}\n{table(cells)}\n{END}{rest.split(END)[1]}')

  wanted = []
  for word in args.only.split(',') if args.only else RECIPES:
    recipe, _, topology = word.partition('@')
    wanted += [(recipe, t) for t in ([topology] if topology else TOPOLOGIES)]
  failed = 0
  for recipe, topology in [] if args.write else wanted:
    if path(recipe, topology).exists():
      continue
    began = time.monotonic()
    print(f'{recipe} on {topology} ...', end=' ', flush=True)
    failed += not compile_cell(recipe, topology, path(recipe, topology), args.texts)
    print(f'{time.monotonic() - began:.0f} s', flush=True)
    write()
  write()
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
