"""Tables: the same cells in HTML and as text, whatever names and values hold."""
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from guie.tables import table


class Cells(HTMLParser):
    """What a browser would show: rows of texts, their alignment, and every element that was opened."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.styles, self.opened = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.opened.append(tag)
        if tag == 'tr':
            self.rows.append([])
        if tag in ('th', 'td'):
            self.rows[-1].append('')
            self.styles.append(dict(attributes)['style'])

    def handle_data(self, data):
        if self.rows and self.rows[-1] and self.opened[-1] in ('th', 'td'):
            self.rows[-1][-1] += data.strip('\n')


def shown(made):
    """Rows of a table's HTML, header first, which its text form must agree with."""
    rows = Cells(made._repr_html_()).rows
    lines = repr(made).splitlines()
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows):
        assert line.split() == ' '.join(row).split()
    return rows


def test_values_are_shown_by_what_they_are():
    frame = pd.DataFrame({'name': ['a', 'b', None], 'share': [.12345, np.nan, 2], 'images': [3, 1234, 9_691_000],
                          'chosen': [True, False, True], 'single': np.float32([.1, .2, .3]),
                          'some': pd.array([1000, None, 2], dtype='Int64'),
                          'mixed': [1000, np.bool_(True), .5]})
    assert shown(table(frame)) == [
        ['name', 'share', 'images', 'chosen', 'single', 'some', 'mixed'],
        ['a', '0.123', '3', 'yes', '0.100', '1,000', '1,000'],
        ['b', '–', '1,234', 'no', '0.200', '–', 'yes'],
        ['–', '2.000', '9,691,000', 'yes', '0.300', '2', '0.500']]


def test_formats_win_and_a_function_is_given_what_is_missing_too():
    frame = pd.DataFrame({'low': [.5, None], 'high': [1e-6, 2.], 'seconds': [None, 2.], 'seed': [2024, 7]})
    made = table(frame, {'high': '{:.3g}', 'seed': '{}', 'no column': '{}',
                         'seconds': lambda value: f'{value:.0f} s' if value == value else 'as trained'}, missing='?')
    assert shown(made) == [['low', 'high', 'seconds', 'seed'], ['0.500', '1e-06', 'as trained', '2024'],
                           ['?', '2', '2 s', '7']]


def test_the_text_is_aligned_numbers_right_and_names_left():
    frame = pd.DataFrame({'model': ['soup', 'vit'], 'dim': [64, 1280], '日本': ['日', 'ab'], 'x': [1, 2],
                          'e\u0301': ['a', 'b'], 'end': [1, 20]})
    assert repr(table(frame)) == ('model    dim  日本  x  e\u0301  end\n'
                                  'soup      64  日    1  a    1\n'
                                  'vit    1,280  ab    2  b   20')
    cells = Cells(table(frame)._repr_html_())
    sides = ['left', 'right', 'left', 'right', 'left', 'right']
    assert cells.styles == [f'text-align: {side}' for side in sides] * 3


def test_names_can_neither_open_an_element_nor_break_a_line():
    bad = '<img src=x onerror="alert(1)">&amp;'
    frame = pd.DataFrame({bad: [bad, 'a\nb\tc', 'x\r\x1b[31m\u2028y', '\udcff']}, index=pd.Index([bad] * 4, name=bad))
    made = table(frame)
    assert shown(made)[:2] == [[bad] * 2] * 2 and len(repr(made).splitlines()) == 5
    assert set(Cells(made._repr_html_()).opened) == {'table', 'thead', 'tbody', 'tr', 'th', 'td'}
    assert [row[1] for row in shown(made)[2:]] == ['a b c', 'x  [31m y', '\\udcff']
    made._repr_html_().encode()
    formatted = table(pd.DataFrame({'a': [1]}), {'a': lambda value: '<b>\n</b>'})
    assert repr(formatted) == '       a\n<b> </b>'
    assert '&lt;b&gt; &lt;/b&gt;' in formatted._repr_html_()


def test_a_long_text_loses_its_middle_in_both_forms():
    frame = pd.DataFrame({'path': ['a' * 40 + 'b' * 40, 'c' * 60]})
    assert shown(table(frame))[1:] == [['a' * 30 + '…' + 'b' * 29], ['c' * 60]]
    assert shown(table(frame, longest=None))[1][0] == frame['path'][0]
    assert shown(table(frame, longest=4)) == [['path'], ['aa…b'], ['cc…c']]


@pytest.mark.parametrize('index, head', [
    (None, []), (pd.Index([7], name='step'), ['step']), (pd.Index([7]), []), (pd.MultiIndex.from_tuples([(7, 'a')]), []),
    (pd.MultiIndex.from_tuples([(7, 'a')], names=['step', None]), ['step', '']),
])
def test_the_index_is_shown_if_it_has_a_name(index, head):
    rows = Cells(table(pd.DataFrame({'a': ['x']}, index=index))._repr_html_()).rows
    assert rows[0] == [*head, 'a'] and rows[1] == [*['7', 'a'][:len(head)], 'x']


def test_what_is_empty_shows_its_header_and_a_name_twice_is_shown_twice():
    frame = pd.DataFrame({'model': ['a'], 'low': [.5]})
    assert shown(table(frame[:0])) == [['model', 'low']] and repr(table(frame[:0])) == 'model  low'
    assert repr(table(pd.DataFrame())) == '' and Cells(table(pd.DataFrame())._repr_html_()).rows == []
    twice = pd.concat([frame, frame], axis=1)
    assert shown(table(twice)) == [['model', 'low'] * 2, ['a', '0.500'] * 2]
    assert shown(table(pd.DataFrame({('a', 'b'): [1]}))) == [['a b'], ['1']]


def test_a_table_does_not_change_its_frame():
    frame = pd.DataFrame({'a': [.12345, None], 'b': ['x\ny', None]})
    before = frame.copy(deep=True)
    repr(table(frame, {'a': '{:.1f}'}))
    pd.testing.assert_frame_equal(frame, before)
