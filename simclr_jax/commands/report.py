"""write an HTML report of a run

Curves, augmented views, a map of the embeddings, nearest neighbours, evaluations, recipe and
versions. One self-contained file that needs no network.
"""

from simclr_jax.commands import options

DETAILS = options.DATA_OVERRIDE


def add_arguments(parser):
  """Declares the arguments."""
  options.workdir(parser)
  parser.add_argument('--out', type=options.path, metavar='FILE', help='output file (default: RUN/report.html)')


def run(args) -> int:
  """Writes the page."""
  from simclr_jax.commands import common
  from simclr_jax.report import page

  out = args.out or args.workdir / 'report.html'
  page.write(args.workdir, common.recipe_of_run(args.workdir, args.overrides), out)
  print(f'wrote {out}')
  return 0
