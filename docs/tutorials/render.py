"""Writes the tutorials as notebooks: `python docs/tutorials/render.py [--execute] [NAME ...]`.

--execute also runs them, minutes each; SIMCLR_JAX_TUTORIAL=small makes that seconds. PROJECT_URL=https://github.com/OWNER/REPO
adds a link that opens the notebook in Colab.
"""

import argparse
import os
import pathlib

import jupytext
import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent
NAMES = ('own_photographs', 'byol')  # label_efficient.py has not been executed in full yet


def notebook(name: str) -> nbformat.NotebookNode:
  """A tutorial without outputs."""
  result = jupytext.read(HERE / f'{name}.py')
  install = '%pip install -q simclr_jax  # in Colab; then restart the runtime'
  result.cells.insert(1, nbformat.v4.new_code_cell('# ' + install))
  if url := os.environ.get('PROJECT_URL'):
    colab = url.replace('https://github.com/', 'https://colab.research.google.com/github/')
    link = f'[Open in Colab]({colab}/blob/main/docs/tutorials/{name}.ipynb)'
    result.cells[0].source += f'\n\n{link}'
  for i, cell in enumerate(result.cells):
    cell['id'] = f'{name}-{i}'  # otherwise random
  result.metadata = {
    'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}
  }
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('names', nargs='*', default=NAMES, metavar='NAME')
  parser.add_argument('--execute', action='store_true', help='run the notebooks')
  args = parser.parse_args()
  for name in args.names:
    result = notebook(name)
    if args.execute:
      nbclient.NotebookClient(result, timeout=1800, record_timing=False).execute()
      for cell in result.cells:
        if cell.cell_type == 'code':  # without progress bars and warnings
          cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    nbformat.write(result, HERE / f'{name}.ipynb')
    print(f'wrote {HERE / name}.ipynb')


if __name__ == '__main__':
  main()
