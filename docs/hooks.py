"""Of the documentation site: the pages that are generated from the code, tutorials, equations, links out of docs/.

`python docs/hooks.py` writes docs/fields.md and docs/recipes.md; a test compares them with the code.
"""

import base64
import json
import logging
import pathlib
import re
import subprocess
import sys

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
CODE = re.compile(r'(```.*?```|`[^`\n]*`)', re.DOTALL)
DISPLAY = re.compile(r'\$\$(.+?)\$\$', re.DOTALL)
INLINE = re.compile(r'\$(?=\S)([^$\n]+?)(?<=\S)\$([,.;:]?)')
COPIED = {'contributing.md': 'CONTRIBUTING.md', 'changelog.md': 'CHANGELOG.md'}
GROUPS = {'Training': '', 'Data': 'data', 'Augmentation': 'augment', 'Network': 'model'}
NOTE = '<!-- written by `python docs/hooks.py` -->\n'


def fields_page() -> str:
  """Every field of every method, from the table of fields, as Markdown."""
  from simclr_jax import fields

  lines = [
    NOTE, '# Fields of recipes\n',
    '`--config.FIELD=VALUE` sets a field, `simclr-jax fields PATTERN` prints them. A run may be resumed with '
    'another value of the fields marked *resumable*; all others are fixed by the run. Training, data, augmentation '
    'and network are fields of every method.\n',
  ]  # fmt: skip
  for title, prefix in GROUPS.items():
    table = {name: f for name, f in fields.TABLE.items() if name.rpartition('.')[0] == prefix}
    lines += _table_of_fields(title, table)
  for method in fields.method_names():
    if table := fields.of_method(method):
      lines += _table_of_fields(f'Method {method}', table, f'{method}.')
  return '\n'.join(lines)


def _table_of_fields(title, table, anchor=''):
  lines = [f'## {title}\n', '| field | default | allowed values | meaning |', '|---|---|---|---|']
  for name, field in table.items():
    allowed = str(field.allowed or '') + ' *resumable*' * field.resumable
    cells = [f'<a id="{anchor}{name}"></a>`{name}`', f'`{field.default!r}`', allowed, field.help]
    lines.append('| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |')
  return [*lines, '']


def recipes_page() -> str:
  """The built-in recipes with their headers and variants, as Markdown."""
  from simclr_jax import config

  lines = [
    NOTE, '# Built-in recipes\n',
    'A recipe is a Python file. `--config=NAME:VARIANT` selects a built-in one, without a variant the first one; '
    '`simclr-jax recipes NAME:VARIANT` prints all its fields.\n',
  ]  # fmt: skip
  for name in config.names():
    header = (ROOT / f'configs/{name}.py').read_text().split('"""')[1].replace('\\\\', '\\')
    lines += [f'## {name}\n', f'```text\n{header.strip()}\n```\n']
    variants = config.variants(name)
    lines += [f'- `:{variant}`: {text}' for variant, text in variants.items()] + [''] * bool(
      variants
    )
  return '\n'.join(lines)


PAGES = {'fields.md': fields_page, 'recipes.md': recipes_page}


def commands_page() -> str:
  """The help of every command, as Markdown."""
  from simclr_jax import commands

  lines = ['# Commands\n', 'The same text is printed by `simclr-jax COMMAND --help`.\n']
  for name in commands.NAMES:
    command = [sys.executable, '-m', 'simclr_jax', name, '--help']
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines += [f'## {name}\n', f'```text\n{text.strip()}\n```\n']
  return '\n'.join(lines)


def on_config(config):
  """A link to the repository, if the environment variable PROJECT_URL names it."""
  if url := config.extra['repository']:
    config.nav.append({'Source code': url})


def on_files(files, config):
  """Adds the pages that are no files of docs/."""
  from mkdocs.structure.files import File

  texts = {page: (ROOT / source).read_text() for page, source in COPIED.items()}
  texts['commands.md'] = commands_page()
  for page, text in texts.items():
    files.append(File.generated(config, page, content=text))
  for notebook in [file for file in files if file.src_uri.endswith('.ipynb')]:
    for page, content in notebook_page(notebook).items():
      files.append(File.generated(config, page, content=content))
  return files


def notebook_page(notebook):
  """The page of a notebook, as Markdown, and its pictures: file -> content."""
  path = pathlib.PurePosixPath(notebook.src_uri)
  title, *cells = json.loads(notebook.content_string)['cells']
  heading, _, text = ''.join(title['source']).partition('\n')
  parts = [heading, f'<a href="../{path.name}" download>Download this notebook</a>', text]
  pictures = {}
  for cell in cells:
    source = ''.join(cell['source'])
    parts.append(source if cell['cell_type'] == 'markdown' else f'```python\n{source}\n```')
    texts = ''
    for output in cell.get('outputs', []):
      data = output.get('data', {})
      if 'image/png' in data:
        name = f'{path.stem}/{len(pictures)}.png'
        pictures[f'{path.parent}/{name}'] = base64.b64decode(''.join(data['image/png']))
        parts.append(f'![Output of the cell above]({name})')
      else:
        texts += ''.join(output.get('text', data.get('text/plain', '')))
    if texts := re.sub(r'.*\r', '', texts.replace('\r\n', '\n')).rstrip():  # what a terminal shows
      parts.append(f'```text\n{texts}\n```')
  return {f'{path.with_suffix(".md")}': '\n\n'.join(parts)} | pictures


def on_page_markdown(text, page, config, files):
  """Links to files outside docs/, and equations as MathML, which browsers show without a script."""
  folder = (DOCS / page.file.src_uri).parent if page.file.src_uri not in COPIED else ROOT

  def link(match):
    label, target = match[1], match[2]
    path, _, anchor = target.partition('#')
    if '://' in target or not path:
      return match[0]
    file = (folder / path).resolve()
    if file.is_relative_to(DOCS):
      if folder == ROOT:  # a copied page is in docs/ now
        return f'[{label}]({file.relative_to(DOCS)}{"#" * bool(anchor)}{anchor})'
      return match[0].replace('.ipynb)', '.md)')
    if file == ROOT / 'README.md':
      return f'[{label}](index.md)'
    for copy, source in COPIED.items():
      if file == ROOT / source:
        return f'[{label}]({copy})'
    url = config.extra['repository']
    return f'[{label}]({url}/blob/main/{file.relative_to(ROOT)})' if url else label

  parts = CODE.split(text)
  for i in range(0, len(parts), 2):
    parts[i] = DISPLAY.sub(lambda m: _mathml(m[1], 'block'), parts[i])
    parts[i] = INLINE.sub(lambda m: _mathml(m[1], 'inline', m[2]), parts[i])
  return re.sub(r'(?<!!)\[([^\]]*)\]\(([^)\s]+)\)', link, ''.join(parts))


def on_post_page(output, page, config):
  """Warns of what a browser would load from another host; the site loads nothing."""
  for url in re.findall(
    r'(?:\ssrc|rel="(?:stylesheet|preconnect|icon)" href)="(https?:[^"]+)', output
  ):
    logging.getLogger('mkdocs.hooks').warning(f'{page.file.src_uri} loads {url}')
  return output


def _mathml(latex, display, punctuation=''):
  from latex2mathml import converter

  mathml = converter.convert(' '.join(latex.split()), display=display)
  # Without space around | of norms, as in TeX.
  mathml = re.sub(
    r'<mo[^>]*>&#x0007C;', '<mo stretchy="false" lspace="0" rspace="0">&#x0007C;', mathml
  )
  if display == 'block':
    return mathml
  return f'<span class="inline-math">{mathml}{punctuation}</span>'  # a line may start with it


if __name__ == '__main__':
  sys.path.insert(0, str(ROOT))
  for file_name, make in PAGES.items():
    (DOCS / file_name).write_text(make())
