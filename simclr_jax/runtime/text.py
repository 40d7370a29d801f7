"""Text from files, made safe to print."""

import unicodedata

# Control characters, invisible ones that change the direction of text, separators of lines, halves of a character.
HIDDEN = ('Cc', 'Cf', 'Zl', 'Zp', 'Cs')


def printable(name: object) -> str:
  """A name from a file in one line of visible characters; others are written as \\xNN, \\uNNNN or \\UNNNNNNNN."""
  return ''.join(_escaped(c) if unicodedata.category(c) in HIDDEN else c for c in str(name))


def _escaped(character):
  code = ord(character)
  if 0xDC80 <= code <= 0xDCFF:  # a byte of a name of a file that is not UTF-8
    return f'\\x{code - 0xDC00:02x}'
  return (
    f'\\x{code:02x}' if code < 0x100 else f'\\u{code:04x}' if code < 0x10000 else f'\\U{code:08x}'
  )
