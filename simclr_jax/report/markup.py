"""Parts of an HTML page."""

import html
from collections.abc import Mapping, Sequence

from simclr_jax.runtime.text import printable


def text(value: object) -> str:
  """Any text in one line, escaped for HTML; characters that cannot be seen are written as \\xNN or \\uNNNN."""
  return html.escape(printable(value))


def figure(uri: str, alt: str, css: str = '', caption: str = '', style: str = '') -> str:
  """A picture with a caption; `uri`: data URI, `css`: class, `caption`: HTML."""
  caption = f'<figcaption>{caption}</figcaption>' if caption else ''
  return (
    f'<figure><img class="{css}" style="{style}" alt="{text(alt)}" src="{uri}">{caption}</figure>'
  )


def row(pictures: Mapping[str, str]) -> str:
  """Pictures, data URIs by title, side by side as far as there is room."""
  drawn = ''.join(figure(uri, alt) for alt, uri in pictures.items())
  return f'<div class="row">{drawn}</div>'


def table(
  head: Sequence[str], rows: Mapping[str, Sequence[str]], caption: str = '', css: str = ''
) -> str:
  """A table of texts.

  Args:
    head: headings of the columns after the first; none: no heading.
    rows: texts after the first column, by that of the first.
    caption: text above the table.
    css: class.
  """
  caption = f'<caption>{text(caption)}</caption>' if caption else ''
  heading = ''.join(f'<th class="n">{text(h)}</th>' for h in head)
  lines = ''.join(
    f'<tr><td>{text(name)}</td>' + ''.join(f'<td class="n">{text(c)}</td>' for c in cells) + '</tr>'
    for name, cells in rows.items()
  )
  heading = f'<tr><th></th>{heading}</tr>' if heading else ''
  return f'<table class="{css}">{caption}{heading}{lines}</table>'


def details(summary: str, content: str) -> str:
  """A folded part; `content`: HTML."""
  return f'<details><summary>{text(summary)}</summary>{content}</details>'


def banner(sentence: str) -> str:
  """A sentence that must not be overlooked."""
  return f'<p class="banner">{text(sentence)}</p>'
