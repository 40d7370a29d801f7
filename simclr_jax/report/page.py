"""The HTML report of a run: one self-contained page."""

import html
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
from simclr_jax.data import Dataset, augment, loader
from simclr_jax.encoder import Encoder
from simclr_jax.errors import ConfigError
from simclr_jax.evaluate import results
from simclr_jax.evaluate.results import Result
from simclr_jax.report import figures
from simclr_jax.runtime import files, goodput, logs, paths

MAP_IMAGES = 1500  # in the map of the embeddings
QUERIES, NEIGHBOURS = 6, 8
MAX_CLASSES = 20  # more classes are not listed, since nobody could read them
VIEW_SIDE = 96  # smallest side of a view on the page, in pixels

Records = Sequence[Mapping[str, Any]]  # of metrics.jsonl

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


def write(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  out: pathlib.Path,
  images: tuple[Dataset, Dataset | None] | None = None,
) -> None:
  """Writes the report of a run.

  Args:
    workdir: of the run.
    config: its recipe.
    out: the HTML file.
    images: the training and test images, if they are loaded already.

  Raises:
    ConfigError: the folder of `out` does not exist, or the data of the run is not available.
    CheckpointError: no checkpoint of the run can be read.
  """
  if not out.parent.is_dir():
    raise ConfigError(f'--out={out}: the folder {out.parent} does not exist')
  encoder = runs.load_encoder(workdir)
  train, held_out = images or data.load_splits(config.data)
  test, split = (train, 'training') if held_out is None else (held_out, 'held-out')
  records = logs.read(workdir)
  metrics = [r for r in records if 'event' not in r]
  name = html.escape(paths.absolute(workdir).name)
  network = config.model.encoder or f'ResNet-{config.model.depth}'
  parts = [
    f'<h1>{name}</h1>',
    f'<p class="lead">{html.escape(config.method)}, {html.escape(network)}, {len(train):,} training '
    f'images, step {encoder.provenance["step"]:,}</p>',
    *_evaluations(workdir, test),
    '<h2>Training</h2>',
    _row(figures.curves(metrics)) if metrics else '<p>No metrics yet.</p>',
    *_speed(metrics),
    *_goodput(records),
    '<h2>Diagnostics</h2>',
    *_diagnostics(config, metrics),
    '<h2>Augmentations</h2>',
    _figure(_view_grid(train, config), 'Augmented views', 'pixels',
            'Left: training images. Right: augmented views of each, in two epochs.'),
    *_embeddings(encoder, test, split),
    '<h2>Configuration</h2>',
    *_configuration(workdir),
  ]  # fmt: skip
  files.write_text(
    out,
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>simclr_jax: {name}</title><style>{STYLE}</style>\n' + '\n'.join(parts) + '\n</html>\n',
  )


# Evaluations.


def _evaluations(workdir: pathlib.Path, test: Dataset) -> Iterator[str]:
  """All results of the run, that of `simclrv2` first, and those of students in folders below."""
  for name, result in sorted(results.load(workdir).items(), key=lambda item: item[0] != 'simclrv2'):
    yield from _evaluation(name, result, test)
  for path in sorted(workdir.glob('*/evaluation.json')):
    yield from _distillation(path.parent, test)


def _evaluation(name: str, result: Result, test: Dataset) -> Iterator[str]:
  """The table of an evaluation; with few labels also the accuracy by number of labels and by class."""
  yield _heading(result)
  if name != 'label_efficiency' and 'runs' not in result:
    yield _table(result)
    return
  caption = _error_bars(result)
  curve = _figure(figures.label_curve(result), 'Accuracy against labels', '', caption)
  yield f'<div class="row">{_table(result)}{curve}</div>'
  yield from _per_class(result.get('runs', {}), test)


def _per_class(tests: Mapping[str, Any], test: Dataset) -> Iterator[str]:
  """Accuracy per class and the confusion matrix of fine-tuning with the most labels.

  Args:
    tests: `downstream.Tests`.
    test: the test images.
  """
  labels = list(tests.get('fine-tuned', ['']))[-1]
  counts = {
    name: np.sum([r['confusion'] for r in by_labels[labels]], axis=0)
    for name, by_labels in tests.items()
    if 'confusion' in by_labels.get(labels, [{}])[0]
  }
  if 'fine-tuned' not in counts or len(counts['fine-tuned']) > MAX_CLASSES:
    return
  names = _class_names(test, len(counts['fine-tuned']))
  head = ''.join(f'<th class="n">{html.escape(name)}</th>' for name in counts)
  rows = ''.join(
    f'<tr><td>{html.escape(name)}</td>'
    + ''.join(f'<td class="n">{100 * n[c, c] / max(n[c].sum(), 1):.1f}</td>' for n in counts.values())
    + '</tr>'
    for c, name in enumerate(names)
  )  # fmt: skip
  amount = f'{labels} of the labels' if '%' in labels else f'{labels} labels per class'
  caption = f'Accuracy per class, %, with {html.escape(amount)}, over all seeds'
  matrix = _figure(figures.confusion(counts['fine-tuned'], names), 'Confusion matrix', '',
                   'Fine-tuned: predictions (columns) by true class (rows), in % of the row.',
                   f'min-width: {30 * len(names)}px')  # fmt: skip
  yield (
    f'<div class="row"><table class="evaluation"><caption>{caption}</caption>'
    f'<tr><th>class</th>{head}</tr>{rows}</table>{matrix}</div>'
  )


def _distillation(workdir: pathlib.Path, test: Dataset) -> Iterator[str]:
  """Teacher and student, if there are students in `workdir`."""
  result = results.load(workdir).get('distillation')
  if not result:
    return
  students = result.get('runs', {}).get('student')
  classes = len(students[0]['confusion']) if students else 0
  names = _class_names(test, classes) if classes <= MAX_CLASSES else []
  caption = 'Accuracy on held-out images' + (', overall and per class. ' if names else '. ')
  figure = _figure(figures.teacher_student(result, names), 'Teacher and student', '',
                   caption + _error_bars(result))  # fmt: skip
  yield _heading({**result, 'title': f'{result["title"]}, {workdir.name}/'})
  yield f'<div class="row">{_table(result)}{figure}</div>'


def _heading(result: Result) -> str:
  return f'<h2>{html.escape(result["title"])} (step {result["step"]:,})</h2>'


def _table(result: Result) -> str:
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


def _error_bars(result: Result) -> str:
  spread = any(std is not None for cells in result['rows'].values() for _, std in cells)
  return 'Error bars: one standard deviation over random subsets or seeds.' if spread else ''


def _class_names(dataset: Dataset, count: int) -> list[str]:
  """Names of the classes, short and printable; the index of a class without a name."""
  names = [' '.join(n.encode(errors='replace').decode().split()) for n in dataset.class_names]
  names = [n if len(n) <= 18 else f'{n[:17]}…' for n in names[:count]]
  return names + [str(c) for c in range(len(names), count)]


# Training.


def _speed(metrics: Records) -> Iterator[str]:
  """Images per second, and the bottleneck."""
  timed = [r for r in metrics[1:] if r.get('data_wait') is not None]
  if timed:
    share = diagnostics.data_wait(metrics)
    bottleneck = 'reading and decoding on the host' if share > 0.1 else 'computation on the device'
    yield (
      f'<p>{timed[-1]["examples_per_second"]:,.0f} images/s; input-bound {share:.1%} of the time. '
      f'Bottleneck: {bottleneck}.</p>'
    )


def _goodput(records: Sequence[dict[str, Any]]) -> Iterator[str]:
  """The wall-clock time of all attempts by purpose."""
  account = goodput.account(list(records))
  if not account:
    return
  kinds = {
    'steps': 'training steps',
    'redone': f'{account["steps_redone"]:,} recomputed steps',
    'start': 'start-up and compilation',
    'data': 'waiting for data',
    'checkpoint': 'waiting for checkpoints',
    'evaluation': 'evaluation',
    'gaps': 'between attempts',
  }
  rows = ''.join(
    f'<tr><td>{text}</td><td class="n">{account[kind]:,.1f} s</td>'
    f'<td class="n">{account[kind] / max(account["wall"], 1e-9):.1%}</td></tr>'
    for kind, text in kinds.items()
    if account[kind] > 0
  )
  attempts = account['attempts']
  yield (
    f'<table><caption>Goodput {account["goodput"]:.1%}: wall-clock time of {attempts} '
    f'attempt{"s" if attempts > 1 else ""}</caption>{rows}</table>'
  )


def _diagnostics(config: ml_collections.ConfigDict, metrics: Records) -> Iterator[str]:
  """Problems, curves of the diagnostic metrics, and the last value of every metric with its meaning."""
  problems = diagnostics.findings(config, metrics).values()
  for sentence in problems or ['No problems detected.']:
    yield f'<p>{html.escape(sentence)}</p>'
  if not metrics:
    return
  yield _row(figures.diagnostic_curves(metrics))
  last = {k: v for r in metrics for k, v in r.items() if v is not None}
  rows = ''.join(
    f'<tr><td>{name}</td><td class="n">{last[name]:.4g}</td><td>{html.escape(meaning)}</td></tr>'
    for name, meaning in diagnostics.GLOSSARY.items()
    if name in last
  )
  yield f'<table><caption>Last values</caption>{rows}</table>'


def _view_grid(train: Dataset, config: ml_collections.ConfigDict) -> str:
  """Rows of one image, its views in one epoch and its views in the next; a data URI."""
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
  for step in range(2):  # a step is an epoch, as the batch has all images
    batch = batches(step)
    views = np.asarray(draw(batches.constants, batch))[np.argsort(batch['index'])]
    columns += list(views.swapaxes(0, 1))
  batches.close()
  scale = max(round(VIEW_SIDE / config.image_size), 1)
  return figures.image_grid(list(map(list, zip(*columns))), scale, gap_after=0)


# Embeddings.


def _embeddings(encoder: Encoder, test: Dataset, split: str) -> Iterator[str]:
  """Maps of the embeddings before and after training, and nearest neighbours.

  Args:
    encoder: of the run.
    test: the images.
    split: 'held-out' or 'training'.
  """
  images = test.sample(MAP_IMAGES)
  if len(images) <= NEIGHBOURS:
    return
  features, every_label = encoder.embed(images)
  labels = every_label if images.labelled else None
  names = [] if labels is None else _class_names(images, int(labels.max()) + 1)
  untrained, _ = encoders.untrained(encoder.architecture).embed(images)
  yield '<h2>Learned embeddings</h2>'
  yield f'<p>t-SNE of the features of {len(images):,} {split} images.</p><p>'
  if labels is not None:
    colors = figures.class_colors(labels)
    yield from (_dot(color, names[c]) for c, color in colors.items())
    if len(colors) < len(np.unique(labels)):
      yield _dot(figures.OTHERS, 'others')
  yield '</p><div class="row">'
  for caption, h in (('Untrained encoder', untrained), ('Pretrained encoder', features)):
    yield _figure(figures.embedding_map(h, labels, names), 'Embedding map', '', caption)
  yield '</div>'
  other = '; other classes in red' if names else ''
  yield (
    f'<p>Query image (framed) and its {NEIGHBOURS} nearest neighbours by cosine similarity{other}.</p>'
  )
  yield from _neighbours(encoder, images, features, labels, names)


def _neighbours(
  encoder: Encoder,
  images: Dataset,
  features: np.ndarray,
  labels: np.ndarray | None,
  names: Sequence[str],
) -> Iterator[str]:
  """One strip per query: the image and its nearest neighbours, with the names of their classes."""
  z = np.asarray(losses.l2_normalize(jnp.asarray(features)))
  queries = np.linspace(0, len(z) - 1, QUERIES).astype(int)
  similarity = z[queries] @ z.T
  similarity[np.arange(len(queries)), queries] = -2  # not the image itself
  nearest = np.argsort(-similarity, axis=1)[:, :NEIGHBOURS]
  drawn = np.unique(np.concatenate([queries, nearest.ravel()]))
  architecture = encoder.architecture
  pixels, _ = encoders.preprocess(
    images.subset(drawn), architecture['eval_view'], architecture['image_size']
  )
  uris = {i: figures.picture(image) for i, image in zip(drawn, pixels)}
  for query, neighbours in zip(queries, nearest):
    yield '<div class="strip">'
    for i in (query, *neighbours):
      name = '' if labels is None else html.escape(names[labels[i]])
      if labels is not None and labels[i] != labels[query]:
        name = f'<span class="other">{name}</span>'
      alt = 'Query' if i == query else 'Neighbour'
      yield _figure(uris[i], alt, 'pixels', name)
    yield '</div>'


# Configuration, and parts of the page.


def _configuration(workdir: pathlib.Path) -> Iterator[str]:
  """The command, the versions of the packages and the recipe."""
  about = json.loads((workdir / 'config.json').read_text())
  yield f'<pre>{html.escape(about["command"] or "from Python")}</pre>'
  yield '<table><caption>Versions</caption>'
  for package, version in about['versions'].items():
    yield f'<tr><td>{html.escape(package)}</td><td>{html.escape(version)}</td></tr>'
  yield '</table><p>Recipe</p>'
  yield f'<pre>{html.escape(json.dumps(about["config"], indent=1))}</pre>'


def _figure(uri: str, alt: str, css: str = '', caption: str = '', style: str = '') -> str:
  caption = f'<figcaption>{caption}</figcaption>' if caption else ''
  return f'<figure><img class="{css}" style="{style}" alt="{alt}" src="{uri}">{caption}</figure>'


def _row(pictures: Mapping[str, str]) -> str:
  """Pictures, data URIs by title, side by side as far as there is room."""
  drawn = ''.join(_figure(uri, alt) for alt, uri in pictures.items())
  return f'<div class="row">{drawn}</div>'


def _dot(color: str, name: str) -> str:
  return f'<span class="name"><span class="dot" style="background:{color}"></span>{html.escape(name)}</span>'
