"""The report's pictures, as data URIs: nothing is fetched when the page is opened."""

import base64
import io
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from simclr_jax import losses

matplotlib.rcParams.update(
  {
    'font.family': 'sans-serif',
    'font.size': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': '#e6e6e6',
    'svg.fonttype': 'none',
    'svg.hashsalt': 'simclr_jax',
  }
)
BLUE = '#2563eb'


def curves(records: list[dict[str, Any]]) -> str:
  """Loss against chance, accuracies and learning rate against the step, side by side."""
  figure = matplotlib.figure.Figure(figsize=(10.5, 3.1), layout='constrained')
  loss, accuracy, rate = figure.subplots(1, 3)
  _panel(loss, records, 'loss, nats', loss='loss', chance_loss='chance')
  shown = 'contrastive_acc' if any('contrastive_acc' in r for r in records) else 'contrastive_acc_n'
  _panel(accuracy, records, 'accuracy, %', 100, **{shown: 'contrastive'}, probe_acc='online probe',
         knn_acc='online kNN', train_acc='training batch')  # fmt: skip
  _panel(rate, records, 'learning rate', learning_rate='')
  rate.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3))
  return _svg(figure)


def health_curves(records: list[dict[str, Any]]) -> str:
  """The figures of the embeddings and the norms against the step."""
  figure = matplotlib.figure.Figure(figsize=(10.5, 3.1), layout='constrained')
  spread, sphere, rank, norms = figure.subplots(1, 4)
  _panel(spread, records, 'spread of embeddings', z_std='')
  spread.set_ylim(0, 1.1)
  _panel(sphere, records, 'on the sphere', alignment='alignment', uniformity='uniformity')
  _panel(rank, records, 'effective rank', rank='')
  rank.set_ylim(bottom=0)
  _panel(norms, records, 'norms', grad_norm='gradient', param_norm='parameters')
  norms.set_yscale('log')
  return _svg(figure)


def _panel(axes, records, title, factor=1, **series):
  """One line for each `key='its name'` that the records have."""
  axes.set_title(title, loc='left')
  axes.set_xlabel('step')
  for color, (key, name) in zip((BLUE, '#d97706', '#059669', '#7c3aed'), series.items()):
    points = [(r['step'], r[key]) for r in records if r.get(key) is not None]
    if not points:
      continue
    x, y = np.array(points, float).T
    marker = 'o' if len(x) < 15 else None
    axes.plot(x, factor * y, color=color, marker=marker, ms=4)
    if name:
      _name(axes, name, x[-1], factor * y[-1], color)
      axes.margins(x=0.35)
  axes.set_xlim(left=0)


def label_curve(result: dict[str, Any]) -> str:
  """Accuracy against the number of labels a class, with the spread over the draws."""
  figure = matplotlib.figure.Figure(figsize=(6.2, 3.6), layout='constrained')
  axes = figure.subplots()
  x = result.get('labels_per_class') or [int(c.split()[0]) for c in result['columns']]
  for color, (name, cells) in zip(('#6b7280', '#d97706', BLUE), result['rows'].items()):
    mean, std = np.nan_to_num(np.array(cells, float)).T  # of one seed there is no deviation
    axes.errorbar(x, mean, std, color=color, marker='o', ms=4, capsize=3)
    _name(axes, name, x[-1], mean[-1], color)
  axes.set_xscale('log')
  axes.set_xticks(x, [str(n) for n in x])
  axes.minorticks_off()
  axes.margins(x=0.28)
  axes.set_xlim(left=0.8 * x[0])
  axes.set_ylim(0, 100)
  axes.set_xlabel('labels a class')
  axes.set_title('accuracy on held-out images, %', loc='left')
  return _svg(figure)


def confusion(counts: np.ndarray) -> str:
  """A confusion matrix `[C, C]`, true classes by row, as shares of the rows in %."""
  figure = matplotlib.figure.Figure(figsize=(5.2, 4.8), layout='constrained')
  axes = figure.subplots()
  share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
  axes.imshow(share, cmap='Blues', vmin=0, vmax=100)
  for (row, column), value in np.ndenumerate(share):
    if value >= 0.5:
      color = 'white' if value > 55 else '#1f2937'
      axes.text(column, row, f'{value:.0f}', ha='center', va='center', fontsize=9, color=color)
  classes = range(len(counts))
  axes.set_xticks(classes)
  axes.set_yticks(classes)
  axes.grid(False)
  axes.tick_params(length=0)
  axes.set_xlabel('taken for')
  axes.set_ylabel('is')
  axes.spines[:].set_visible(False)
  return _svg(figure)


def embedding_map(h: np.ndarray, labels: np.ndarray | None, seed: int = 0) -> str:
  """The features `[n, d]` in two dimensions (t-SNE of 50 principal components), coloured by label."""
  figure = matplotlib.figure.Figure(figsize=(6.2, 5.2), layout='constrained')
  axes = figure.subplots()
  unit = np.asarray(losses.l2_normalize(h))
  reduced = PCA(min(50, *unit.shape), random_state=seed).fit_transform(unit)
  perplexity = min(30, (len(h) - 1) / 3)
  xy = TSNE(perplexity=perplexity, init='pca', random_state=seed).fit_transform(reduced)
  if labels is None:
    axes.scatter(*xy.T, s=7, color=BLUE)
  else:
    for c in np.unique(labels):
      here = labels == c
      color = matplotlib.colormaps['tab10' if labels.max() < 10 else 'tab20'](c % 20)
      axes.scatter(*xy[here].T, s=7, color=color)
      axes.annotate(
        str(c), np.median(xy[here], axis=0), ha='center', va='center', fontsize=11, weight='bold',
        bbox={'boxstyle': 'circle,pad=0.25', 'fc': 'white', 'ec': color},
      )  # fmt: skip
  axes.set_axis_off()
  return _png(figure, dpi=130)


def image_grid(rows: list[list[np.ndarray]], scale: int, gap_after: int | None = None) -> str:
  """Rows of images (uint8, or float in [0, 1], all of one size) as one picture, enlarged `scale` times.

  A wider gap follows column `gap_after`.
  """
  height, width = (side * scale for side in rows[0][0].shape[:2])
  pad, gap = 4, 14
  total = len(rows[0]) * (width + pad) - pad + (gap if gap_after is not None else 0)
  canvas = np.ones((len(rows) * (height + pad) - pad, total, 3))
  for i, row in enumerate(rows):
    x = 0
    for j, image in enumerate(row):
      image = image / 255 if image.dtype == np.uint8 else np.asarray(image)
      big = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
      canvas[i * (height + pad) : i * (height + pad) + height, x : x + width] = big
      x += width + pad + (gap if j == gap_after else 0)
  buffer = io.BytesIO()
  matplotlib.image.imsave(buffer, np.clip(canvas, 0, 1), format='png')
  return _uri(buffer, 'png')


def _name(axes, text, x, y, color):
  """The name of a line, behind its last point."""
  axes.annotate(
    text, (x, y), xytext=(6, 0), textcoords='offset points', color=color, va='center', fontsize=9
  )


def _svg(figure):
  buffer = io.BytesIO()
  figure.savefig(buffer, format='svg', metadata={'Date': None})
  return _uri(buffer, 'svg+xml')


def _png(figure, dpi):
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=dpi)
  return _uri(buffer, 'png')


def _uri(buffer, kind):
  return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'
