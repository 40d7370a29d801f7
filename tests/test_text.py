"""Text from files that is printed."""

import pytest

from simclr_jax.runtime.text import printable


@pytest.mark.parametrize(
  'name, expected',
  [
    ('Åsa 猫 a.jpg', 'Åsa 猫 a.jpg'), ('\x1b[31mred', '\\x1b[31mred'), ('a\nb\rc\td', 'a\\x0ab\\x0dc\\x09d'),
    ('a\u202egnp.exe', 'a\\u202egnp.exe'), ('a\u2028b', 'a\\u2028b'), ('a\udcffb', 'a\\xffb'), ('\U000e0001', '\\U000e0001'),
    (3, '3'), ('', ''),
  ],
)  # fmt: skip
def test_printable(name, expected):
  """Breaks if the name of a file can move the cursor, hide text or start a new line."""
  assert printable(name) == expected
