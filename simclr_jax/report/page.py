"""Everything about a run on one self-contained page."""

import html
import json
import pathlib

import jax
import ml_collections
import numpy as np

from simclr_jax import data, health, logs, losses, methods, sharding
from simclr_jax.data import augment, feed
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import features, run
from simclr_jax.interop import orbax
from simclr_jax.report import figures

MAP_IMAGES = 1500
QUERIES, NEIGHBOURS = 6, 8
SHOWN = 96  # least side of a view, in pixels

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1040px; margin: 2rem auto;
       padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; font-size: 1.2rem }
p.lead, figcaption, caption { color: #6b7280 } figcaption, caption { font-size: .9rem; text-align: left }
img { max-width: 100%; display: block } figure { margin: 1rem 0 0 }
.pixels { image-rendering: pixelated }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 2rem;
       align-items: start }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
td, th { padding: .25rem .9rem .25rem 0; text-align: left; border-bottom: 1px solid #e5e7eb }
td.n, th.n { text-align: right }
pre { background: #f3f4f6; padding: .8rem; overflow-x: auto; font-size: .85rem }
"""


def write(workdir: pathlib.Path, config: ml_collections.ConfigDict, out: pathlib.Path) -> None:
  """Writes the report of a run to the file `out`."""
  if not out.parent.is_dir():
    raise ConfigError(f'--out={out}: the folder {out.parent} does not exist')
  encoder = orbax.load_encoder(workdir)
  train = data.load(config.data, 'train')
  try:
    test, whose = data.load(config.data, 'test'), 'held-out'
  except ConfigError:  # unlabelled data often comes without a test split
    test, whose = train, 'training'
  about = json.loads((workdir / 'config.json').read_text())
  records = logs.read(workdir)
  results = run.kept(workdir)

  shown = test.sample(MAP_IMAGES)
  h, labels = encoder.embed(shown)
  step = encoder.provenance['step']

  parts = [
    f'<h1>{html.escape(workdir.resolve().name)}</h1>',
    f'<p class="lead">{html.escape(config.method)}, ResNet-{config.model.depth}, '
    f'{len(train):,} training images, step {step:,}</p>',
    *(_table(r) for r in results.values()),
  ]
  if 'label_efficiency' in results and len(results['label_efficiency']['columns']) > 1:
    parts.append(
      _figure(figures.label_curve(results['label_efficiency']), 'Accuracy against labels', '',
              'Bars: one standard deviation over the draws.')
    )  # fmt: skip
  for result in results.values():
    if 'runs' in result:
      parts += _few_labels(result)
  parts += [
    '<h2>Training</h2>',
    _figure(figures.curves(records), 'Training curves') if records else '<p>No metrics yet.</p>',
    *_speed(records),
    '<h2>Is it healthy?</h2>',
    *_health(config, records),
    '<h2>What the encoder sees</h2>',
    _figure(_view_grid(train, config), 'Augmented views', 'pixels',
            'Left: training images. Right: views of each in two epochs, drawn as in training.'),
    '<h2>What it makes of it</h2><div class="two">',
    _figure(figures.embedding_map(h, labels if shown.labelled else None), 'Embedding map', '',
            f'{len(shown):,} {whose} images, t-SNE of their features'
            + (', coloured by their labels.' if shown.labelled else '.')),
    _figure(_neighbour_grid(shown, h, encoder), 'Nearest neighbours', 'pixels',
            f'Left: {QUERIES} images. Right: their {NEIGHBOURS} nearest by cosine similarity.'),
    '</div>',
    '<h2>How it was made</h2>',
    f'<pre>{html.escape(about["command"] or "from Python")}</pre>',
    '<table><caption>Versions</caption>',
    *(f'<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>' for k, v in about['versions'].items()),
    '</table><p>Recipe</p>',
    f'<pre>{html.escape(json.dumps(about["config"], indent=1))}</pre>',
  ]  # fmt: skip
  title = html.escape(f'simclr_jax: {workdir.resolve().name}')
  out.write_text(
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>{title}</title><style>{STYLE}</style>\n' + '\n'.join(parts) + '\n</html>\n'
  )


def _table(result):
  head = ''.join(f'<th class="n">{html.escape(c)}</th>' for c in result['columns'])
  rows = ''.join(
    f'<tr><td>{html.escape(name)}</td>'
    + ''.join(f'<td class="n">{run.cell(*c)}</td>' for c in cells)
    + '</tr>'
    for name, cells in result['rows'].items()
  )
  title = html.escape(f'{result["title"]} (step {result["step"]:,})')
  notes = ''.join(
    f'<p>{html.escape(name)}: {html.escape(text)}.</p>'
    for name, text in result.get('notes', {}).items()
  )
  return f'<h2>{title}</h2><table class="evaluation"><tr><th></th>{head}</tr>{rows}</table>{notes}'


def _few_labels(result):
  """Curve, classes and confusions of fine-tuning."""
  if len(result['columns']) > 1:
    yield _figure(figures.label_curve(result), 'Accuracy against labels', '',
                  'Bars: one standard deviation over the seeds.')  # fmt: skip
  column = list(result['runs']['fine-tuned'])[-1]
  runs = {name: by[column] for name, by in result['runs'].items() if 'confusion' in by[column][0]}
  counts = {name: sum(np.array(r['confusion']) for r in found) for name, found in runs.items()}
  if len(counts['fine-tuned']) > 20:
    return  # too many classes to be read
  head = ''.join(f'<th class="n">{html.escape(name)}</th>' for name in counts)
  rows = ''.join(
    f'<tr><td>{c}</td>'
    + ''.join(
      f'<td class="n">{100 * n[c, c] / max(n[c].sum(), 1):.1f}</td>' for n in counts.values()
    )
    + '</tr>'
    for c in range(len(counts['fine-tuned']))
  )
  caption = (
    f'Accuracy of each class, %, with {html.escape(column)} of the labels, all seeds together'
  )
  yield (
    '<div class="two">'
    f'<table class="evaluation"><caption>{caption}</caption><tr><th>class</th>{head}</tr>{rows}</table>'
    + _figure(figures.confusion(counts['fine-tuned']), 'Confusion matrix', '',
              'Fine-tuned: how often a class (row) is taken for another (column), in %.')
    + '</div>'
  )  # fmt: skip


def _speed(records):
  """Who the training waits for."""
  waits = [r for r in records[1:] if r.get('data_wait') is not None]
  if waits:
    share = health.data_wait(records)
    who = 'reading and decoding on the host' if share > 0.1 else 'computing on the device'
    yield (
      f'<p>{waits[-1]["examples_per_second"]:,.0f} images a second; the device waits for images '
      f'{share:.1%} of the time: the bottleneck is {who}.</p>'
    )


def _health(config, records):
  found = health.findings(config, records).values()
  for sentence in found or ['Nothing looks off.']:
    yield f'<p>{html.escape(sentence)}</p>'
  if not records:
    return
  yield _figure(figures.health_curves(records), 'Health curves')
  last = {k: v for r in records for k, v in r.items() if v is not None}
  rows = ''.join(
    f'<tr><td>{name}</td><td class="n">{last[name]:.4g}</td><td>{html.escape(meaning)}</td></tr>'
    for name, meaning in health.MEANING.items()
    if name in last
  )
  yield f'<table><caption>Last values</caption>{rows}</table>'


def _figure(uri, alt, css='', caption=''):
  caption = f'<figcaption>{caption}</figcaption>' if caption else ''
  return f'<figure><img class="{css}" alt="{alt}" src="{uri}">{caption}</figure>'


def _view_grid(train, config):
  """Image, its views in one epoch, its views in the next."""
  few = train.sample(6)
  n = len(few)
  pipelines = augment.pipelines(config.augment, methods.build(config).views)
  mesh = sharding.make_mesh(jax.local_devices()[:1])
  batches = feed.for_training(few, config.seed, n, pipelines, config.image_size, mesh)

  @jax.jit
  def draw(constants, rows):
    b = feed.pick(constants, rows)
    return augment.views(
      b['images'], b['epoch'], b['position'], pipelines, config.seed, config.image_size,
      b.get('crops'),
    )  # fmt: skip

  columns = [features.pictures(few, config.augment.eval, config.image_size)[0]]
  for step in range(2):  # a step is an epoch here
    rows = batches(step)
    views = np.asarray(draw(batches.constants, rows))[np.argsort(rows['index'])]
    columns += list(views.swapaxes(0, 1))
  batches.close()
  rows = [[column[i] for column in columns] for i in range(n)]
  return figures.image_grid(rows, max(round(SHOWN / config.image_size), 1), gap_after=0)


def _neighbour_grid(shown, h, encoder):
  z = np.asarray(losses.l2_normalize(h))
  queries = np.linspace(0, len(z) - 1, QUERIES).astype(int)
  similarity = z[queries] @ z.T
  similarity[np.arange(len(queries)), queries] = -2  # not the image itself
  nearest = np.argsort(-similarity, axis=1)[:, :NEIGHBOURS]
  wanted = np.unique(np.concatenate([queries, nearest.ravel()]))
  size = encoder.architecture['image_size']
  drawn = features.pictures(shown.only(wanted), encoder.architecture['eval_view'], size)[0]
  picture = dict(zip(wanted, drawn))
  rows = [[picture[i] for i in (q, *found)] for q, found in zip(queries, nearest)]
  return figures.image_grid(rows, max(round(56 / size), 1), gap_after=0)
