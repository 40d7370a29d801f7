"""Compiles the shipped ImageNet recipes for TPUs, and writes the table in docs/tpu.md.

  python benchmarks/tpu_table.py [--only=RECIPE,...] [--write]

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


def row(cell):
  """A line of the table."""
  gib = 2**30
  total, limit = cell['memory']['total'], cell['memory']['limit']
  share = f'{total / gib:.1f} of {limit / gib:.1f}' if total else f'more than {limit / gib:.1f}'
  head = [f'`{cell["recipe"].split()[0]}`', cell['topology'], f'{cell["batch_size"]:,}', share]
  verdict = 'ok' if not cell['problems'] else cell['problems'][0].split(':')[0]
  if 'flops' not in cell:
    return [*head, *['–'] * 7, '**does not fit**']
  counts = {'embeddings': 0, 'BatchNorm': 0, 'gradients': 0, 'images': 0}
  for c in cell['collectives']:
    parts = c['bytes_by_purpose']
    main = max(parts, key=parts.get)
    for word in counts:
      counts[word] += c['count'] * (word in main)
  seconds = cell['seconds_at_least']
  times = [f'{1000 * seconds[k]:.1f}' for k in ('compute', 'memory', 'links')]
  index = ('compute', 'memory', 'links').index(cell['bound'])
  times[index] = f'**{times[index]}**'
  numbers = [str(counts[w]) for w in ('embeddings', 'gradients', 'BatchNorm', 'images')]
  return [*head, f'{cell["flops"] / 1e12:.2f}', *times, '/'.join(numbers), verdict]


def table(cells):
  head = [
    'recipe', 'TPU', 'batch', 'GiB a device', 'TFLOP', 'compute, ms', 'memory, ms', 'links, ms',
    'collectives', 'verdict',
  ]  # fmt: skip
  lines = [head, ['---'] * len(head)]
  for recipe in RECIPES:
    for topology in TOPOLOGIES:
      cell = cells.get((recipe, topology))
      if cell:
        found = row(cell)
        lines.append(found if 'flops' in cell else [*found[:4], *['–'] * 5, found[-1]])
      else:
        lines.append([f'`{recipe}`', topology, *['–'] * 7, 'not compiled yet'])
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--cache', type=pathlib.Path, default=HERE / 'tpu_table')
  parser.add_argument('--texts', type=pathlib.Path, help='also keep the compiled programs, here')
  parser.add_argument('--only', default='', help='recipes')
  parser.add_argument('--write', action='store_true')
  parser.add_argument('--page', type=pathlib.Path, default=HERE.parent / 'docs/tpu.md')
  args = parser.parse_args()
  args.cache.mkdir(parents=True, exist_ok=True)
  wanted = args.only.split(',') if args.only else list(RECIPES)
  cells, failed = {}, 0
  for recipe in RECIPES:
    for topology in TOPOLOGIES:
      path = args.cache / f'{recipe.replace(":", "-")}-{topology}.json'
      if not path.exists() and not args.write and recipe in wanted:
        began = time.monotonic()
        print(f'{recipe} on {topology} ...', end=' ', flush=True)
        failed += not compile_cell(recipe, topology, path, args.texts)
        print(f'{time.monotonic() - began:.0f} s', flush=True)
      if path.exists():
        cells[recipe, topology] = json.loads(path.read_text())
  if args.page.exists():
    text = args.page.read_text()
    before, rest = text.split(BEGIN)
    args.page.write_text(f'{before}{BEGIN}\n{table(cells)}\n{END}{rest.split(END)[1]}')
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
