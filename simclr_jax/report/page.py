"""Everything about a run on one self-contained page."""

import html
import json
import pathlib

import jax
import ml_collections
import numpy as np

from simclr_jax import (
  config as recipes,
  data,
  diagnostics,
  encoder as encoders,
  losses,
  methods,
  runs,
  sharding,
)
from simclr_jax.data import augment, loader
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import results
from simclr_jax.report import figures
from simclr_jax.runtime import files, goodput, logs, paths

MAP_IMAGES = 1500
QUERIES, NEIGHBOURS = 6, 8
CLASSES = 20  # above, there are too many to be read
SHOWN = 96  # least side of a view, in pixels

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1040px; margin: 2rem auto;
       padding: 0 1rem }
h1 { margin-bottom: 0; overflow-wrap: anywhere } h2 { margin-top: 2.5rem; font-size: 1.2rem }
p.lead, figcaption, caption { color: #4b5563 } figcaption, caption { font-size: .9rem; text-align: left }
figcaption { contain: inline-size } .strip figcaption { font-size: .8rem; text-align: center }
img { max-width: 100%; display: block } figure { margin: 1rem 0 0; max-width: 100%; overflow-x: auto }
.pixels { image-rendering: pixelated }
.row { display: flex; flex-wrap: wrap; gap: 0 .8rem; align-items: flex-start }
.row table { margin-right: 2rem; margin-top: 1rem }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: 1rem }
.strip figure { margin: 0; width: 4.6rem; overflow-wrap: anywhere; line-height: 1.2 } .strip img { width: 100% }
.strip figure:first-child img { box-sizing: border-box; border: 3px solid #1d4ed8 }
.other { color: #b91c1c; font-weight: bold }
.dot { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .3em }
.name { display: inline-block; margin-right: 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto;
        max-width: 100% }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #e5e7eb }
td.n, th.n { text-align: right } td.n { white-space: nowrap }
pre { background: #f3f4f6; padding: .8rem; overflow-x: auto; font-size: .85rem }
@media (max-width: 480px) {
  table { font-size: .85rem } .strip figure { width: 4rem } .strip figcaption { font-size: .68rem }
}
"""


def write(workdir: pathlib.Path, config: ml_collections.ConfigDict, out: pathlib.Path) -> None:
  """Writes the report of a run to the file `out`."""
  if not out.parent.is_dir():
    raise ConfigError(f'--out={out}: the folder {out.parent} does not exist')
  encoder = runs.load_encoder(workdir)
  train = data.load(config.data, 'train')
  try:
    test, whose = data.load(config.data, 'test'), 'held-out'
  except ConfigError:  # unlabelled data often comes without a test split
    test, whose = train, 'training'
  about = json.loads((workdir / 'config.json').read_text())
  written = logs.read(workdir)
  records = [r for r in written if 'event' not in r]
  # The whole story comes first.
  found = sorted(results.load(workdir).items(), key=lambda kept: kept[0] != 'simclrv2')
  below = sorted(workdir.glob('*/evaluation.json'))

  shown = test.sample(MAP_IMAGES)
  h, labels = encoder.embed(shown)
  labels = labels if shown.labelled else None
  step = encoder.provenance['step']

  parts = [
    f'<h1>{html.escape(paths.absolute(workdir).name)}</h1>',
    f'<p class="lead">{html.escape(config.method)}, ResNet-{config.model.depth}, '
    f'{len(train):,} training images, step {step:,}</p>',
    *(part for name, result in found for part in _result(name, result, test)),
    *(part for path in below for part in _distilled(path.parent, test)),
    '<h2>Training</h2>',
    _row(figures.curves(records)) if records else '<p>No metrics yet.</p>',
    *_speed(records),
    *_goodput(written),
    '<h2>Is it healthy?</h2>',
    *_health(config, records),
    '<h2>What the encoder sees</h2>',
    _figure(_view_grid(train, config), 'Augmented views', 'pixels',
            'Left: training images. Right: views of each in two epochs, drawn as in training.'),
    *(_embedding(shown, whose, encoder, h, labels) if len(shown) > NEIGHBOURS else ()),
    '<h2>How it was made</h2>',
    f'<pre>{html.escape(about["command"] or "from Python")}</pre>',
    '<table><caption>Versions</caption>',
    *(f'<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>' for k, v in about['versions'].items()),
    '</table><p>Recipe</p>',
    f'<pre>{html.escape(json.dumps(about["config"], indent=1))}</pre>',
  ]  # fmt: skip
  title = html.escape(f'simclr_jax: {paths.absolute(workdir).name}')
  files.write_text(
    out,
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>{title}</title><style>{STYLE}</style>\n' + '\n'.join(parts) + '\n</html>\n',
  )


def _table(result):
  head = ''.join(f'<th class="n">{html.escape(c)}</th>' for c in result['columns'])
  rows = ''.join(
    f'<tr><td>{html.escape(name)}</td>'
    + ''.join(f'<td class="n">{results.cell(*c)}</td>' for c in cells)
    + '</tr>'
    for name, cells in result['rows'].items()
  )
  notes = ''.join(
    f'<p>{html.escape(name)}: {html.escape(text)}.</p>'
    for name, text in result.get('notes', {}).items()
  )
  return f'<table class="evaluation"><tr><th></th>{head}</tr>{rows}</table>{notes}'


def _heading(result):
  return f'<h2>{html.escape(result["title"])} (step {result["step"]:,})</h2>'


def _result(name, result, test):
  """The table of an evaluation and, of learning with few labels, its pictures."""
  yield _heading(result)
  if name != 'label_efficiency' and 'runs' not in result:
    yield _table(result)
    return
  curve = _figure(figures.label_curve(result), 'Accuracy against labels', '', _bars(result))
  yield f'<div class="row">{_table(result)}{curve}</div>'
  yield from _classes(result.get('runs', {}), test)


def _classes(runs, test):
  """Accuracy of each class and confusions, of fine-tuning with the most labels."""
  column = list(runs.get('fine-tuned', ['']))[-1]
  counts = {
    name: sum(np.array(r['confusion']) for r in by_labels[column])
    for name, by_labels in runs.items()
    if 'confusion' in by_labels.get(column, [{}])[0]
  }
  if 'fine-tuned' not in counts or len(counts['fine-tuned']) > CLASSES:
    return
  names = _names(test, len(counts['fine-tuned']))
  head = ''.join(f'<th class="n">{html.escape(name)}</th>' for name in counts)
  rows = ''.join(
    f'<tr><td>{html.escape(name)}</td>'
    + ''.join(f'<td class="n">{100 * n[c, c] / max(n[c].sum(), 1):.1f}</td>' for n in counts.values())
    + '</tr>'
    for c, name in enumerate(names)
  )  # fmt: skip
  caption = f'Accuracy of each class, %, labels: {html.escape(column)}; all seeds together'
  matrix = _figure(figures.confusion(counts['fine-tuned'], names), 'Confusion matrix', '',
                   'Fine-tuned: how often a class (row) is taken for another (column), in %.',
                   f'min-width: {30 * len(names)}px')  # fmt: skip
  yield (
    f'<div class="row"><table class="evaluation"><caption>{caption}</caption>'
    f'<tr><th>class</th>{head}</tr>{rows}</table>{matrix}</div>'
  )


def _distilled(workdir, test):
  """Teacher against student, of students that are kept below the run."""
  result = results.load(workdir).get('distillation')
  if not result:
    return
  found = result.get('runs', {}).get('student')
  classes = len(found[0]['confusion']) if found else 0
  names = _names(test, classes) if classes <= CLASSES else []
  figure = _figure(figures.teacher_student(result, names), 'Teacher against student', '',
                   'Held-out images of all classes' + (', and of each. ' if names else '. ')
                   + _bars(result))  # fmt: skip
  yield _heading({**result, 'title': f'{result["title"]}, {workdir.name}/'})
  yield f'<div class="row">{_table(result)}{figure}</div>'


def _goodput(records):
  """What the time of all attempts went into."""
  found = goodput.account(records)
  if not found:
    return
  kinds = {
    'steps': 'steps that were kept',
    'redone': f'{found["steps_redone"]:,} steps done twice',
    'start': 'starting and compiling',
    'data': 'waiting for data',
    'checkpoint': 'waiting for checkpoints',
    'evaluation': 'evaluating',
    'gaps': 'between attempts',
  }
  rows = ''.join(
    f'<tr><td>{text}</td><td class="n">{found[kind]:,.1f} s</td>'
    f'<td class="n">{found[kind] / max(found["wall"], 1e-9):.1%}</td></tr>'
    for kind, text in kinds.items()
    if found[kind] > 0
  )
  attempts = found['attempts']
  yield (
    f'<table><caption>Goodput {found["goodput"]:.1%}: where the time of '
    f'{attempts} attempt{"s" if attempts > 1 else ""} went</caption>{rows}</table>'
  )


def _bars(result):
  spread = any(std is not None for cells in result['rows'].values() for _, std in cells)
  return 'Bars: one standard deviation over draws or seeds.' if spread else ''


def _names(dataset, count):
  """Names of the classes, fit to be drawn; of one without a name, its number."""
  known = [' '.join(n.encode(errors='replace').decode().split()) for n in dataset.class_names]
  known = [n if len(n) <= 18 else f'{n[:17]}…' for n in known[:count]]
  return known + [str(c) for c in range(len(known), count)]


def _embedding(shown, whose, encoder, h, labels):
  """The map before and after the training, and nearest neighbours."""
  names = [] if labels is None else _names(shown, int(labels.max()) + 1)
  untrained = encoders.untrained(encoder.architecture)
  before = untrained.embed(shown)[0]
  yield '<h2>What it makes of it</h2>'
  yield f'<p>{len(shown):,} {whose} images, t-SNE of their features before and after the training.</p><p>'
  if names:
    colors = figures.class_colors(labels)
    yield from (_dot(color, names[c]) for c, color in colors.items())
    if len(colors) < len(np.unique(labels)):
      yield _dot(figures.OTHERS, 'others')
  yield '</p><div class="row">'
  for when, found in (('Before: an untrained encoder.', before), ('After: the pretrained one.', h)):
    yield _figure(figures.embedding_map(found, labels, names), 'Embedding map', '', when)
  yield '</div>'
  other = '; in red, those of another class' if names else ''
  yield f'<p>Framed: {QUERIES} images. Beside each, its {NEIGHBOURS} nearest by cosine similarity{other}.</p>'
  yield from _neighbours(shown, h, encoder, labels, names)


def _speed(records):
  """Who the training waits for."""
  waits = [r for r in records[1:] if r.get('data_wait') is not None]
  if waits:
    share = diagnostics.data_wait(records)
    who = 'reading and decoding on the host' if share > 0.1 else 'computing on the device'
    yield (
      f'<p>{waits[-1]["examples_per_second"]:,.0f} images a second; the device waits for images '
      f'{share:.1%} of the time: the bottleneck is {who}.</p>'
    )


def _health(config, records):
  found = diagnostics.findings(config, records).values()
  for sentence in found or ['Nothing looks off.']:
    yield f'<p>{html.escape(sentence)}</p>'
  if not records:
    return
  yield _row(figures.health_curves(records))
  last = {k: v for r in records for k, v in r.items() if v is not None}
  rows = ''.join(
    f'<tr><td>{name}</td><td class="n">{last[name]:.4g}</td><td>{html.escape(meaning)}</td></tr>'
    for name, meaning in diagnostics.GLOSSARY.items()
    if name in last
  )
  yield f'<table><caption>Last values</caption>{rows}</table>'


def _figure(uri, alt, css='', caption='', style=''):
  caption = f'<figcaption>{caption}</figcaption>' if caption else ''
  return f'<figure><img class="{css}" style="{style}" alt="{alt}" src="{uri}">{caption}</figure>'


def _row(pictures):
  """Pictures by title side by side, as many as there is room for."""
  drawn = ''.join(_figure(uri, alt) for alt, uri in pictures.items())
  return f'<div class="row">{drawn}</div>'


def _view_grid(train, config):
  """Image, its views in one epoch, its views in the next."""
  few = train.sample(6)
  n = len(few)
  pipelines = augment.pipelines(config.augment, methods.build(config).views)
  mesh = sharding.make_mesh(jax.local_devices()[:1])
  batches = loader.for_training(few, config.seed, n, pipelines, config.image_size, mesh)

  @jax.jit
  def draw(constants, rows):
    b = loader.with_images(constants, rows)
    return augment.views(
      b['images'], b['epoch'], b['position'], pipelines, config.seed, config.image_size,
      b.get('crops'),
    )  # fmt: skip

  columns = [
    encoders.preprocess(few, recipes.architecture(config)['eval_view'], config.image_size)[0]
  ]
  for step in range(2):  # a step is an epoch here
    rows = batches(step)
    views = np.asarray(draw(batches.constants, rows))[np.argsort(rows['index'])]
    columns += list(views.swapaxes(0, 1))
  batches.close()
  rows = [[column[i] for column in columns] for i in range(n)]
  return figures.image_grid(rows, max(round(SHOWN / config.image_size), 1), gap_after=0)


def _dot(color, name):
  return f'<span class="name"><span class="dot" style="background:{color}"></span>{html.escape(name)}</span>'


def _neighbours(shown, h, encoder, labels, names):
  """An image and those nearest to it, with the names of their classes; one row each."""
  z = np.asarray(losses.l2_normalize(h))
  queries = np.linspace(0, len(z) - 1, QUERIES).astype(int)
  similarity = z[queries] @ z.T
  similarity[np.arange(len(queries)), queries] = -2  # not the image itself
  nearest = np.argsort(-similarity, axis=1)[:, :NEIGHBOURS]
  wanted = np.unique(np.concatenate([queries, nearest.ravel()]))
  size = encoder.architecture['image_size']
  drawn = encoders.preprocess(shown.subset(wanted), encoder.architecture['eval_view'], size)[0]
  uris = {i: figures.picture(image) for i, image in zip(wanted, drawn)}
  for query, found in zip(queries, nearest):
    yield '<div class="strip">'
    for i in (query, *found):
      name = html.escape(names[labels[i]]) if names else ''
      if names and labels[i] != labels[query]:
        name = f'<span class="other">{name}</span>'
      yield _figure(uris[i], 'Neighbour', 'pixels', name)
    yield '</div>'
