"""Tables: a DataFrame as a notebook shows it, in HTML and as aligned text."""
import html
import unicodedata
from numbers import Integral, Real

import pandas as pd

from guie.files import printable


def table(frame, formats=None, *, missing='–', longest=60):
    """A DataFrame to read: HTML in a notebook, aligned text where it is printed -> Table.
    Numbers are right-aligned, floats with three decimals, whole numbers with a comma for thousands; True is yes. formats:
    {column: a format string such as '{:.3g}', or a function of the value}; a function also gets missing values. missing:
    shown for None and NaN. longest: characters of a text, beyond which it loses its middle; None: all are shown. The index
    is shown if it has a name."""
    frame, formats = pd.DataFrame(frame), formats or {}
    index = [frame.index.get_level_values(level) for level in range(frame.index.nlevels)]
    named = index if any(level.name is not None for level in index) else []
    parts = [('' if level.name is None else level.name, level) for level in named]
    parts += [(name, frame.iloc[:, place]) for place, name in enumerate(frame.columns)]
    columns = []
    for name, values in parts:
        cells = [cell(value, formats.get(name), missing) for value in values.tolist()]
        head = ' '.join(map(str, name)) if isinstance(name, tuple) else str(name)
        columns.append(([shortened(one_line(text), longest) for text in (head, *cells)], is_numeric(values)))
    return Table(columns)


class Table:
    """A table of texts: columns [(header and cells, whether they are right-aligned)]."""

    def __init__(self, columns):
        self.columns = columns

    def __repr__(self):
        padded = []
        for texts, right in self.columns:
            width = max(map(width_of, texts))
            blanks = [' ' * (width - width_of(text)) for text in texts]
            padded.append([blank + text if right else text + blank for text, blank in zip(texts, blanks)])
        return '\n'.join('  '.join(row).rstrip() for row in zip(*padded))

    def _repr_html_(self):
        sides = ['right' if right else 'left' for _, right in self.columns]
        rows = zip(*([html.escape(text) for text in texts] for texts, _ in self.columns))
        head, *body = [html_row('td' if place else 'th', row, sides) for place, row in enumerate(rows)] or ['']
        return (f'<table class="tex2jax_ignore mathjax_ignore">\n<thead>\n{head}</thead>\n'  # a $ is no formula
                f'<tbody>\n{"".join(body)}</tbody>\n</table>')


def html_row(element, cells, sides):
    """A row of escaped texts, each aligned to its side."""
    cells = [f'<{element} style="text-align: {side}">{cell}</{element}>' for cell, side in zip(cells, sides)]
    return f'<tr>{"".join(cells)}</tr>\n'


def cell(value, form, missing):
    """A value as text."""
    if callable(form):
        return str(form(value))
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return missing
    if form:
        return form.format(value)
    if pd.api.types.is_bool(value):
        return 'yes' if value else 'no'
    if isinstance(value, Integral):
        return f'{value:,}'
    return f'{value:.3f}' if isinstance(value, Real) else str(value)


def is_numeric(values):
    """Whether all values of a Series or an Index are numbers, or missing."""
    present = values.dropna().tolist()
    return all(isinstance(value, Real) and not isinstance(value, bool) for value in present) and (
        bool(present) or pd.api.types.is_numeric_dtype(values.dtype))


def one_line(text):
    """A text with a blank for each character that breaks a line or cannot be seen."""
    return ''.join(letter if letter.isprintable() else ' ' for letter in printable(text))


def shortened(text, longest):
    """A text of at most `longest` characters; a longer one has '…' for its middle."""
    if longest is None or len(text) <= longest:
        return text
    return f'{text[:longest // 2]}…{text[len(text) - (longest - 1) // 2:]}'


def width_of(text):
    """Columns that a text takes in a terminal: two for a wide character, none for a mark on the one before."""
    return sum(0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in 'WF') for letter in text)
