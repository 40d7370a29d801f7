"""The figures of the report, as data URIs: opening the page needs no network.

Each figure is drawn at the size at which it is displayed, at most half the width of the page, so that phones need
not shrink it much.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import matplotlib
import matplotlib.figure
import numpy as np
import threadpoolctl
from matplotlib import ticker
from scipy.spatial import distance
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from simclr_jax import losses
from simclr_jax.evaluate.results import Result
from simclr_jax.runtime.text import printable

matplotlib.rcParams.update(
  {
    'font.family': 'sans-serif',
    'font.size': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': '#e6e6e6',
    'text.color': '#1f2937',
    'axes.labelcolor': '#1f2937',
    'xtick.color': '#1f2937',
    'ytick.color': '#1f2937',
    'svg.fonttype': 'none',
    'svg.hashsalt': 'simclr_jax',
  }
)
BLUE, BROWN, GREEN, VIOLET, GRAY = '#1d4ed8', '#b45309', '#047857', '#6d28d9', '#4b5563'
POINTS = 1000  # of a curve; more are replaced by the means of groups
OTHERS = '#d1d5db'  # classes without a colour of their own
ROW_COLORS = {
  'raw pixels': GRAY, 'untrained': BROWN, 'untrained encoder': VIOLET, 'from scratch': BROWN, 'pretrained': BLUE,
  'fine-tuned': BLUE, 'teacher': GRAY, 'student': BLUE,
}  # fmt: skip


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """Loss and chance level, accuracies, and learning rate by step.

  Args:
    records: of `metrics.jsonl`.

  Returns:
    Figures by title; those without values are omitted.
  """
  contrastive = (
    'contrastive_acc' if any('contrastive_acc' in r for r in records) else 'contrastive_acc_n'
  )
  panels = {
    'loss, nats': {'loss': 'loss', 'chance_loss': 'chance'},
    'accuracy, %': {contrastive: 'contrastive', 'probe_acc': 'online probe', 'knn_acc': 'online kNN',
                    'train_acc': 'training batch'},
    'learning rate': {'learning_rate': ''},
  }  # fmt: skip
  return _panels(records, panels, 3.3)


def diagnostic_curves(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """Statistics of the embeddings, and norms, by step; arguments and result as of `curves`."""
  panels = {
    'standard deviation × √d': {'z_std': ''},
    'alignment and uniformity': {'alignment': 'alignment', 'uniformity': 'uniformity'},
    'effective rank': {'rank': ''},
    'norms': {'grad_norm': 'gradient', 'param_norm': 'parameters'},
  }
  return _panels(records, panels, 2.5)


def _panels(records, panels, width):
  """One figure per title, with one line for each `metric: label` that has values."""
  figures = {}
  for title, lines in panels.items():
    figure, ends = matplotlib.figure.Figure(figsize=(width, 2.9), layout='constrained'), []
    axes = figure.subplots()
    for color, (metric, label) in zip((BLUE, BROWN, GREEN, VIOLET), lines.items()):
      points = [(r['step'], r[metric]) for r in records if r.get(metric) is not None]
      if points:
        x, y = _thinned(np.array(points, float)).T * [[1], [100 if '%' in title else 1]]
        axes.plot(x, y, color=color, marker='o' if len(x) < 15 else None, ms=4)
        ends.append((label, x[-1], y[-1], color))
    if not ends:
      continue
    axes.set_title(title, loc='left', fontsize=11)
    axes.set_xlabel('step')
    axes.margins(x=0.45 if any(lines.values()) else 0.05)
    axes.set_xlim(left=0)
    if title == 'norms':
      axes.set_yscale('log')
      axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axes.yaxis.set_major_formatter('{x:g}')
      axes.minorticks_off()
    elif title in ('standard deviation × √d', 'effective rank'):
      axes.set_ylim(bottom=0)
    elif title == 'learning rate':
      axes.ticklabel_format(axis='y', style='sci', scilimits=(-2, 3))
    _label_lines(axes, ends)
    figures[title] = _svg(figure)
  return figures


def _thinned(points: np.ndarray) -> np.ndarray:
  """At most `POINTS` points `[n, 2]`: the means of groups of neighbours, as equal in size as possible."""
  if len(points) <= POINTS:
    return points
  starts = np.arange(POINTS) * len(points) // POINTS
  return np.add.reduceat(points, starts) / np.diff(starts, append=len(points))[:, None]


def label_curve(result: Result) -> str:
  """Accuracy by number of labels, with the standard deviation over seeds or random subsets.

  Args:
    result: its `rows` have [mean, standard deviation] for each number of labels; the numbers are in
      `labels_per_class`, or else at the start of `columns`.
  """
  figure, ends = matplotlib.figure.Figure(figsize=(4.2, 3.3), layout='constrained'), []
  axes = figure.subplots()
  x = result.get('labels_per_class') or [int(c.split()[0]) for c in result['columns']]
  order = np.argsort(x)
  x = np.array(x)[order]
  for row, cells in result['rows'].items():
    mean, std = np.nan_to_num(np.array(cells, float))[order].T  # one seed has no deviation
    color = ROW_COLORS.get(row, VIOLET)
    axes.errorbar(x, mean, std, color=color, marker='o', ms=5, capsize=4)
    ends.append((f'{printable(row)} {mean[-1]:.0f}', x[-1], mean[-1], color))
  axes.set_xscale('log')
  axes.set_xticks(x, [f'{n:,}' for n in x])
  axes.minorticks_off()
  axes.set_xlim(0.8 * x[0], x[-1] * (x[-1] / x[0]) ** 0.6 * 1.4)
  axes.set_ylim(0, min(106, 1.08 * axes.get_ylim()[1]))
  axes.set_xlabel('labels per class')
  axes.set_title('accuracy on held-out images, %', loc='left', fontsize=11)
  _label_lines(axes, ends)
  return _svg(figure)


def teacher_student(result: Result, names: Sequence[str]) -> str:
  """Top-1 accuracy of teacher and student, overall and per class.

  Args:
    result: of a distillation; without the confusion matrices in its `runs`, only the overall accuracy is drawn.
    names: of the classes.
  """
  names = ['all', *(names if 'runs' in result else [])]
  figure = matplotlib.figure.Figure(figsize=(4.2, 1.3 + 0.28 * len(names)), layout='constrained')
  axes, y, dots = figure.subplots(), np.arange(len(names)), []
  for role, row in (('teacher', -0.2), ('student', 0.2)):
    (mean, std), (size, _) = result['rows'][role]
    color = ROW_COLORS[role]
    axes.errorbar(mean, row, xerr=std, color=color, marker='o', capsize=4)
    amount = f'{size:,.0f}' if size >= 10 else f'{size:.2g}'
    text = f'{role} {mean:.1f}, {amount} million parameters'
    axes.text(np.clip(mean, 40, 60), 1.6 * row - 1.1, text, color=color, ha='center', va='center')
    if len(names) > 1:
      counts = np.sum([r['confusion'] for r in result['runs'][role]], axis=0)
      dots.append(_percent(counts).diagonal())
      axes.scatter(dots[-1], y[1:], color=color, s=36, zorder=3)
  if dots:
    axes.hlines(y[1:], *dots, color=GRAY, lw=1)
  axes.set_yticks(y, names, parse_math=False)
  axes.set_xlim(0, 100)
  axes.set_ylim(len(names) - 0.5, -1.9)
  axes.set_title('accuracy on held-out images, %', loc='left', fontsize=11)
  return _svg(figure)


def confusion(counts: np.ndarray, names: Sequence[str]) -> str:
  """A confusion matrix, in % of each row.

  Args:
    counts: integers `[C, C]`, true classes by row, predicted classes by column.
    names: of the C classes.
  """
  side = 1.2 + 0.34 * len(counts)
  figure = matplotlib.figure.Figure(figsize=(side, side), layout='constrained')
  axes, percent = figure.subplots(), _percent(counts)
  axes.imshow(percent, cmap='Blues', vmin=0, vmax=100)
  for (row, column), value in np.ndenumerate(percent):
    if value >= 0.5:
      color = 'white' if value > 55 else '#1f2937'
      axes.text(column, row, f'{value:.0f}', ha='center', va='center', fontsize=10, color=color)
  classes = range(len(counts))
  slanted: dict[str, Any] = {'rotation': 45, 'ha': 'right'} if max(map(len, names)) > 2 else {}
  axes.set_xticks(classes, names, parse_math=False, rotation_mode='anchor', **slanted)
  axes.set_yticks(classes, names, parse_math=False)
  axes.grid(False)
  axes.tick_params(length=0)
  axes.set_xlabel('predicted class')
  axes.set_ylabel('true class')
  axes.spines[:].set_visible(False)
  return _svg(figure)


def _percent(counts):
  """Counts in % of their row."""
  return 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)


def class_colors(labels: np.ndarray) -> dict[int, str]:
  """A colour for each of the 20 most frequent labels."""
  classes, counts = np.unique(labels, return_counts=True)
  common = np.sort(classes[np.argsort(-counts, kind='stable')][:20])
  palette = matplotlib.colormaps['tab10' if len(common) <= 10 else 'tab20']
  return {int(c): matplotlib.colors.to_hex(palette(i)) for i, c in enumerate(common)}


def tsne(h: np.ndarray, seed: int = 0) -> np.ndarray:
  """A two-dimensional map of features: t-SNE of 50 principal components.

  Args:
    h: features `[n, d]`.
    seed: of PCA and t-SNE.

  Returns:
    Coordinates `[n, 2]`.
  """
  unit = np.asarray(losses.l2_normalize(jnp.asarray(h)))
  if not np.isfinite(unit).all() or np.ptp(unit, axis=0).max() < 1e-6:  # collapsed: one point
    return np.zeros((len(h), 2))
  reduced = PCA(min(50, *unit.shape), random_state=seed).fit_transform(unit)
  perplexity = min(30, (len(h) - 1) / 3)
  # One thread: several are slower here, on a busy machine 6 times.
  with threadpoolctl.threadpool_limits(1):
    return TSNE(perplexity=perplexity, init='pca', max_iter=500, random_state=seed).fit_transform(
      reduced
    )


def embedding_map(xy: np.ndarray, labels: np.ndarray | None, names: Sequence[str]) -> str:
  """A map of images in `class_colors`.

  A class is labelled where it is densest, if most images there are of this class and there is room.

  Args:
    xy: coordinates `[n, 2]`.
    labels: int32 `[n]`; None: unknown.
    names: of the classes.
  """
  figure = matplotlib.figure.Figure(figsize=(4.6, 4.2), layout='constrained')
  axes = figure.subplots()
  colors = {} if labels is None else class_colors(labels)
  drawn = [BLUE] * len(xy) if labels is None else [colors.get(c, OTHERS) for c in labels.tolist()]
  axes.scatter(xy[:, 0], xy[:, 1], s=9, lw=0, color=drawn, rasterized=True)
  axes.margins(x=0.12)  # room for labels at the edges
  axes.set_axis_off()
  if not np.ptp(xy):
    return _svg(figure)
  near = distance.cdist(xy, xy) < 0.07 * np.ptp(xy)
  places: list[np.ndarray] = []
  for c, color in colors.items():
    own = near & (labels == c)
    count = own.sum(1) * (labels == c) * (own.sum(1) > 0.5 * near.sum(1))
    if count.max() < 2:
      continue
    place = xy[own[count.argmax()]].mean(0)
    room = np.ptp(xy, axis=0) * [0.03 * len(names[c]) + 0.04, 0.08]
    if all((np.abs(place - p) > room).any() for p in places):
      places.append(place)
      axes.annotate(names[c], place, ha='center', va='center', weight='bold', parse_math=False,
                    bbox={'boxstyle': 'round,pad=0.25', 'fc': 'white', 'ec': color, 'lw': 2})  # fmt: skip
  return _svg(figure)


def picture(image: np.ndarray) -> str:
  """A PNG of an image, uint8 or float in [0, 1], `[h, w, 3]`."""
  buffer = io.BytesIO()
  matplotlib.image.imsave(
    buffer, np.clip(image, 0, 255 if image.dtype == np.uint8 else 1), format='png'
  )
  return _uri(buffer, 'png')


def image_grid(rows: list[list[np.ndarray]], scale: int, gap_after: int | None = None) -> str:
  """A PNG with rows of images.

  Args:
    rows: images `[h, w, 3]` of one size, uint8 or float in [0, 1].
    scale: integer by which they are enlarged.
    gap_after: index of the column after which the gap is wider.
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
  return picture(canvas)


def _label_lines(axes, ends):
  """Labels lines beside their last points, (label, x, y, colour); moves labels apart where they would overlap."""
  place = axes.transData + axes.transAxes.inverted()
  ends = sorted((place.transform((x, y))[1], label, x, color) for label, x, y, color in ends)
  low = -1.0
  for y, label, x, color in ends:
    low = max(y, low + 0.075)
    axes.annotate(
      label, (x, low), xycoords=('data', 'axes fraction'), xytext=(7, 0), textcoords='offset points',
      color=color, va='center', parse_math=False,
    )  # fmt: skip


def _svg(figure):
  buffer = io.BytesIO()
  figure.savefig(buffer, format='svg', dpi=192, metadata={'Date': None})
  return _uri(buffer, 'svg+xml')


def _uri(buffer, kind):
  return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'
