"""Compiles the built-in ImageNet recipes for TPUs, without a TPU, and writes the table in docs/tpu.md.

  python benchmarks/tpu_table.py [--only=RECIPE[@TPU],...] [--write]

Each compilation takes minutes, in a process of its own. Results are saved in --cache, so that an interrupted command
can be resumed. Delete this folder after a change of the code. --write: writes the table from the saved results only.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
TOPOLOGIES = ('v3-128', 'v4-128', 'v5e-64', 'v5e-256', 'v6e-64')
LABELS = '--config.data.num_classes=1000'  # otherwise taken from the pretrained run
# Variants that are not listed compile to the same program, except for constants.
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


def compile_recipe(recipe, topology, path, hlo_folder):
  """Runs `simclr-jax compile-check` in a process; returns whether there is a result."""
  command = [sys.executable, '-m', 'simclr_jax', 'compile-check', f'--config={recipe}']
  command += [f'--topology={topology}', '--json', *RECIPES[recipe]]
  if hlo_folder:
    hlo_folder.mkdir(parents=True, exist_ok=True)
    command.append(f'--hlo={hlo_folder / path.stem}.txt')
  process = subprocess.run(command, capture_output=True, text=True, check=False)
  if not process.stdout.startswith('{'):
    print(process.stderr.strip(), file=sys.stderr)
    return False
  path.write_text(process.stdout)
  return True


def row(recipe, topology, result):
  """The cells of one line of the table; `result`: of compile-check, or None."""
  cells = [f'`{recipe}`', topology]
  if not result:
    return [*cells, *[''] * 7, 'not compiled yet']
  gib = 2**30
  total, limit = result['memory']['total'], result['memory']['limit']
  used = f'{total / gib:.1f} of {limit / gib:.1f}' if total else f'more than {limit / gib:.1f}'
  cells += [f'{result["batch_size"]:,}', used]
  if 'flops' not in result:
    return [*cells, *[''] * 5, '**does not fit**']
  counts = dict.fromkeys(('embeddings', 'gradients', 'BatchNorm', 'images'), 0)
  for c in result['collectives']:
    parts = c['bytes_by_purpose']
    largest = max(parts, key=parts.get)
    for purpose in counts:
      counts[purpose] += c['count'] * (purpose in largest)
  times = {k: f'{1000 * v:.1f}' for k, v in result['seconds'].items()}
  times[result['bound']] = f'**{times[result["bound"]]}**'
  verdict = '**fails**: ' + '; '.join(result['problems']) if result['problems'] else 'ok'
  return [
    *cells,
    f'{result["flops"] / 1e12:.2f}',
    *(times[k] for k in ('compute', 'memory', 'links')),
    ' / '.join(map(str, counts.values())),
    verdict,
  ]


def table(results):
  """The table in Markdown; `results`: of compile-check, by recipe and topology."""
  head = [
    'recipe', 'TPU', 'batch size', 'GiB per device', 'TFLOP', 'compute, ms', 'HBM, ms', 'ICI, ms',
    'collectives', 'verdict',
  ]  # fmt: skip
  rows = [row(r, t, results.get((r, t))) for r in RECIPES for t in TOPOLOGIES]
  return '\n'.join(f'| {" | ".join(line)} |' for line in [head, ['---'] * len(head), *rows])


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cache', type=pathlib.Path, default=HERE / 'tpu_table')
  parser.add_argument('--hlo', type=pathlib.Path, help='folder for the compiled programs (HLO)')
  parser.add_argument(
    '--only', default='', metavar='RECIPE[@TPU],...', help='compile these only, in this order'
  )
  parser.add_argument('--write', action='store_true', help='only write the table')
  parser.add_argument('--page', type=pathlib.Path, default=HERE.parent / 'docs/tpu.md')
  args = parser.parse_args()
  args.cache.mkdir(parents=True, exist_ok=True)

  def path(recipe, topology):
    return args.cache / f'{recipe.replace(":", "-")}-{topology}.json'

  def write():
    results = {
      (r, t): json.loads(path(r, t).read_text())
      for r in RECIPES
      for t in TOPOLOGIES
      if path(r, t).exists()
    }
    before, rest = args.page.read_text().split(BEGIN)
    args.page.write_text(f'{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}')

  jobs = []
  for job in args.only.split(',') if args.only else RECIPES:
    recipe, _, topology = job.partition('@')
    jobs += [(recipe, t) for t in ([topology] if topology else TOPOLOGIES)]
  failed = 0
  for recipe, topology in [] if args.write else jobs:
    if path(recipe, topology).exists():
      continue
    start = time.monotonic()
    print(f'{recipe} on {topology} ...', end=' ', flush=True)
    failed += not compile_recipe(recipe, topology, path(recipe, topology), args.hlo)
    print(f'{time.monotonic() - start:.0f} s', flush=True)
    write()
  write()
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
