"""Average precision of object detection, as VOC and COCO define it. Needs numpy only.

A box is [x0, y0, x1, y1] in pixels from the left and top edges of the image, so that its width is x1 - x0. VOC counts
pixels from 1 and includes the last one, and the evaluation of detectron2 adds 1 to x0 and y0 of the detections, and to
all widths and heights. Boxes of VOC minus 1 at x0 and y0 (`voc.annotation`) give the same overlaps without that.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

THRESHOLDS = [t / 100 for t in range(50, 100, 5)]  # of the overlap
# 'voc07': mean over 11 recalls, as VOC until 2009; 'area': area below the curve, as VOC since 2010; 'coco': mean over
# 101 recalls, and COCO's matching.
METRICS = ('voc07', 'area', 'coco')


def evaluate(
  truth: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], metric: str
) -> dict[str, Any]:
  """Average precision, the mean over classes, in percent.

  Args:
    truth: for each image, `boxes` [n, 4], `labels` int [n] and `difficult` bool [n]. Difficult boxes need not be found.
    found: for each image, the detections: `boxes` [m, 4], `labels` int [m] and `scores` [m].
    metric: one of `METRICS`.

  Returns:
    `AP50` and `AP75`, at an overlap of 0.5 and 0.75; `AP`, the mean over `THRESHOLDS`; `per_class`: label -> AP. Only
    classes with boxes that are not difficult count.

  Raises:
    ValueError: there are none.
  """
  match = _match_coco if metric == 'coco' else _match_voc
  classes = sorted({int(c) for image in truth for c in image['labels'][~image['difficult']]})
  if not classes:
    raise ValueError('no test image has a box that is not difficult')
  table = np.zeros((len(classes), len(THRESHOLDS)))
  for row, c in enumerate(classes):
    positives, scores, hits = 0, [np.zeros(0)], [np.zeros((len(THRESHOLDS), 0), int)]
    for real, image in zip(truth, found):
      own = real['labels'] == c
      boxes, difficult = real['boxes'][own], real['difficult'][own]
      positives += np.sum(~difficult)
      own = np.flatnonzero(image['labels'] == c)
      own = own[np.argsort(-image['scores'][own], kind='stable')]
      if len(own):
        iou = overlaps(image['boxes'][own], boxes)
        scores.append(image['scores'][own])
        hits.append(np.array([match(iou, difficult, threshold) for threshold in THRESHOLDS]))
    order = np.argsort(-np.concatenate(scores), kind='stable')
    for column, verdicts in enumerate(np.concatenate(hits, axis=1)[:, order]):
      table[row, column] = average_precision(verdicts[verdicts >= 0], positives, metric)
  mean = 100 * table.mean(axis=0)
  return {
    'AP': float(mean.mean()),
    'AP50': float(mean[THRESHOLDS.index(0.5)]),
    'AP75': float(mean[THRESHOLDS.index(0.75)]),
    'per_class': {c: 100 * float(row.mean()) for c, row in zip(classes, table)},
  }


def average_precision(hits: np.ndarray, positives: int, metric: str) -> float:
  """Average precision of one class, 0 to 1.

  Args:
    hits: whether each detection is right, 0 or 1, the highest score first.
    positives: the number of boxes, above 0.
    metric: one of `METRICS`.
  """
  right = np.cumsum(hits)
  precision = right / np.arange(1, len(hits) + 1)
  precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this or a higher recall
  if metric == 'area':
    return float(precision[np.asarray(hits, bool)].sum() / positives)
  steps = 10 if metric == 'voc07' else 100
  # In integers, so that 3 of 10 boxes reach a recall of 0.3.
  first = np.searchsorted(right * steps, np.arange(steps + 1) * positives)
  return float(np.append(precision, 0)[first].mean())


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Intersection over union of boxes a [m, 4] and b [n, 4], float64 [m, n]."""
  a, b = np.asarray(a, np.float64)[:, None], np.asarray(b, np.float64)[None]
  sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
  common = sides.clip(0).prod(axis=-1)
  area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(axis=-1) for x in (a, b))
  return common / (area_a + area_b - common)


def _match_voc(iou: np.ndarray, difficult: np.ndarray, threshold: float) -> list[int]:
  """Verdicts on the detections of an image: 1 right, 0 wrong, -1 ignored.

  A detection belongs to the box that it overlaps most. The first one of a box is right, the others are wrong; all of a
  difficult box are ignored.
  """
  verdicts, taken = [], set()
  for row in iou:
    best = int(row.argmax()) if len(row) else -1
    if best < 0 or row[best] <= threshold:
      verdicts.append(0)
    elif difficult[best]:
      verdicts.append(-1)
    else:
      verdicts.append(int(best not in taken))
      taken.add(best)
  return verdicts


def _match_coco(iou: np.ndarray, difficult: np.ndarray, threshold: float) -> list[int]:
  """As `_match_voc`, but a detection belongs to the box that it overlaps most among those that no other one has taken.

  Boxes that are not difficult come first, and an overlap equal to the threshold suffices.
  """
  verdicts, taken = [], set()
  for row in iou:
    near = [g for g in range(len(row)) if g not in taken and row[g] >= threshold]
    near = [g for g in near if not difficult[g]] or near
    if not near:
      verdicts.append(0)
      continue
    best = max((row[g], g) for g in near)[1]
    verdicts.append(-1 if difficult[best] else 1)
    taken.add(best)
  return verdicts
