"""Cells: what stands below a picture, whatever its name, and nothing on stderr."""
import warnings

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from guie import cells
from guie.cells import Cell, columns_of, draw_cells, name_of, shortened, wrapped
from guie.images import read_image

ODD = ['苹果红富士苹果红富士苹果红富士', 'تفاح أحمر', '🍎 of 🍏', 'a$b_c$ $x^2', 'bad\udcff\udcfebytes', '\x00\x07',
       'x' * 5000]
BROAD = ['WWWWWWWWWWWWWWWWWWWWWWW', 'a-bcdefghijklmnopqrstuvwxyz', '西瓜 watermelon 西瓜 watermelon']


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close('all')


def texts():
    return [[text.get_text() for text in axis.texts] for axis in plt.gcf().axes]


def test_a_known_data_sets_label_is_called_by_its_last_part():
    assert name_of('products-10k/17') == '17' and name_of('google-landmarks-v2/203/1') == '203/1'
    assert name_of('mine/17') == 'mine/17' and name_of('met/') == 'met/' and name_of(17) == '17'


def test_a_name_is_shortened_in_the_middle_and_wrapped_where_it_has_a_gap():
    assert shortened('0123456789', 10) == '0123456789' and shortened('0123456789', 7) == '012…789'
    assert shortened('a\nb\t c', 9) == 'a b c' and shortened('bad\udcff', 20) == 'bad\\udcff'
    assert wrapped('red apple') == 'red apple' and wrapped('') == ''
    assert wrapped('Beef-Tomato_002.jpg') == 'Beef-Tomato_\n002.jpg' and wrapped('a big red apple') == 'a big\nred apple'
    assert wrapped('abcdefghijklmnop') == 'abcdefgh\nijklmnop'


@pytest.mark.parametrize('name', ODD + BROAD)
def test_no_line_is_broader_than_its_picture(name):
    lines = wrapped(name).split('\n')
    assert len(lines) <= 2 and max(map(columns_of, lines)) <= cells.WIDTH
    figure = plt.figure(figsize=(9, 3))
    cells.write(figure.add_axes((0, 0, 1, 1)), .5, .5, wrapped(name))
    text, = figure.axes[0].texts
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert text.get_window_extent().width / figure.dpi <= cells.SIDE + cells.GAP


def test_names_of_any_script_warn_of_nothing_and_are_no_maths(train, recwarn, capfd, caplog):
    draw_cells([[Cell(i, train['path'][i], name, '0.42', 'red', name) for i, name in enumerate(ODD)]], 32, {})
    plt.gcf().savefig('/dev/null', format='png', bbox_inches='tight')
    assert not recwarn.list and capfd.readouterr() == ('', '') and not caplog.records
    assert texts()[3] == ['a$b_c$ $x^2\n0.42', 'a$b_c$ $x^2']
    assert not any(text.get_parse_math() for axis in plt.gcf().axes for text in axis.texts)


def test_letters_that_matplotlibs_font_lacks_come_from_another_that_is_here(monkeypatch, caplog):
    monkeypatch.setattr(cells, 'OTHER_SCRIPTS', ('No Such Font', 'STIXGeneral'))
    axis = plt.figure().add_axes((0, 0, 1, 1))
    cells.write(axis, .5, .5, 'name')
    plt.gcf().canvas.draw()
    assert axis.texts[0].get_fontfamily() == [*plt.rcParams['font.family'], 'STIXGeneral'] and not caplog.records


def test_distances_stand_beside_names_where_all_of_these_are_short(train):
    path = train['path'][0]
    draw_cells([[Cell(0, path, 'apple'), Cell(1, path, 'pear', '0.42')], [Cell(1, path, '', '0.50')]], 32, {})
    assert texts() == [['apple'], ['pear · 0.42'], ['0.50']]
    draw_cells([[Cell(0, path, 'red apple', '0.10'), Cell(1, path, 'pear', '0.42')]], 32, {})
    assert texts() == [['red apple\n0.10'], ['pear\n0.42']]


def test_cells_stand_in_rows_and_columns_below_each_other_and_are_never_cut_off(train):
    paths = train['path'].tolist()
    rows = [[Cell(0, paths[0], 'one', left='left', above='above'), Cell(1.5, paths[1], 'a long name that\nis wrapped')],
            [Cell(0, None, 'two')], [Cell(1.5, paths[2], 'three', colour='tab:red')]]
    draw_cells(rows, 32, {'tab:red': 'wrong', 'tab:green': 'right'}, together=2)
    figure = plt.gcf()
    boxes = [axis.get_window_extent() for axis in figure.axes]
    assert {(round(box.width), round(box.height)) for box in boxes} == {(round(cells.SIDE * figure.dpi),) * 2}
    assert boxes[0].y0 == boxes[1].y0 and boxes[1].x0 == boxes[3].x0 and boxes[0].x0 == boxes[2].x0 < boxes[1].x0
    lows = [min(text.get_window_extent().y0 for text in axis.texts) for axis in figure.axes]
    assert min(lows[:2]) >= boxes[2].y1 and lows[2] > boxes[3].y1 and lows[3] >= 0
    shown = [*figure.legends, *(text for axis in figure.axes for text in axis.texts)]
    assert all(0 <= edge <= 1 for part in shown for edge in
               part.get_window_extent().transformed(figure.transFigure.inverted()).extents)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['wrong']
    for axis, path in zip(np.array(figure.axes)[[0, 1, 3]], paths):
        assert np.array_equal(axis.get_images()[0].get_array(), read_image(path, 32))
    assert not figure.axes[2].get_images() and 'none' in texts()[2]
    assert figure.axes[3].spines['top'].get_edgecolor() == to_rgba('tab:red')


def test_a_title_of_two_lines_left_of_the_first_column_is_not_cut_off(train):
    for title in ('query', 'two lines of a long title'):
        draw_cells([[Cell(0, train['path'][0], left=title)]], 32, {})
        text = plt.gcf().axes[0].texts[0]
        assert ('\n' in text.get_text()) == (title != 'query')
        assert 0 <= text.get_window_extent().x0 < plt.gcf().axes[0].get_window_extent().x0


def test_unreadable_paths_that_are_no_utf_8_are_named(train, capsys):
    draw_cells([[Cell(0, '/none/\udcff.jpg'), Cell(1, '/none/\udcff.jpg'), Cell(2, train['path'][0])]], 32, {})
    assert texts() == [['×'], ['×'], []]
    assert capsys.readouterr().out == ('1 images of this figure could not be read, first /none/\\udcff.jpg; they are shown '
                                       'black, with a cross.\n')
    with pytest.raises(OSError, match=r'^None of the 1 images of this figure can be read, first /none/\\udcff.jpg: check'):
        draw_cells([[Cell(0, '/none/\udcff.jpg')]], 32, {})
