"""Explore: a browser clicks through the page, and what it shows is what the runs' files say."""
import json
import os
import re
import shutil
from functools import cache

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.numpy import save_file

from guie import explore as room
from guie.explore import choose_pair, compare_pairs, explore, folders_of, rounded
from guie.scores import paired_bootstrap

EVIL_FILE, EVIL_LABEL = '<img src=x onerror=alert(1)>.jpg', '</script><script>alert(1)</script> & "quoted\'s" \u2028'
BYTES_FILE = os.fsdecode(b'caf\xe9.jpg')
RANKS = range(1, 6)
RUNS = ['stages/first', 'second', 'third']
SETTINGS = {'stages/first': {'seed': 1, 'augmentation': 'none', 'layer_lrs': [[6, .1]]},
            'second': {'seed': 2, 'augmentation': 'none', 'layer_lrs': [[6, .1]]}}


# Runs, made by hand

def make_images(folder):
    """12 objects with 2 queries and 3 index images each, and one with a query alone: DataFrame path, label, part."""
    rows = []
    for place in range(13):
        label = [EVIL_LABEL, 'odd', *(f'object {letter}' for letter in 'abcdefghijk')][place]
        names = {0: [EVIL_FILE], 1: [BYTES_FILE]}.get(place, []) + [f'{number}.jpg' for number in range(5)]
        for number, name in enumerate(names[:1 if place == 12 else 5]):
            path = folder / f'{place:02d}' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (80, 60), (20 * place, 255 - 20 * place, 50 * number)).save(path)
            rows.append((str(path), label, 'query' if number < 2 else 'index'))
    return pd.DataFrame(rows, columns=['path', 'label', 'part'])


def make_vectors(images, noise, seed):
    """Vectors around a direction of each object: {'query', 'index'} of unit rows."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((13, 8))
    vectors = centres[pd.factorize(images['label'])[0]] + noise * rng.standard_normal((len(images), 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return {part: vectors[(images['part'] == part).to_numpy()] for part in ('query', 'index')}


def make_queries(images, vectors):
    """queries.csv by brute force."""
    query, index = (images[images['part'] == part].reset_index(drop=True) for part in ('query', 'index'))
    distances = np.linalg.norm(vectors['query'][:, None] - vectors['index'], axis=2)
    order, table = distances.argsort(1)[:, :5], query[['path', 'label']].assign(domain='things')
    right = index['label'].to_numpy()[order] == query['label'].to_numpy()[:, None]
    there = query['label'].map(index['label'].value_counts()).fillna(0).to_numpy()
    table['precision'] = [hits[:int(count)].mean() if count else None for hits, count in zip(right, there)]
    table['relevant'] = there.astype(int)
    for rank in RANKS[:len(index)]:
        near = order[:, rank - 1]
        table[[f'path_{rank}', f'label_{rank}']] = index[['path', 'label']].to_numpy()[near]
        table[f'distance_{rank}'] = distances[range(len(query)), near].round(4)
    return table


def write_run(folder, images, noise, seed, config=None, metadata=None, vectors=True):
    made = make_vectors(images, noise, seed)
    folder.mkdir(parents=True)
    table = make_queries(images, made)
    table.to_csv(folder / 'queries.csv', index=False, errors='surrogateescape')
    if vectors:
        index = images[images['part'] == 'index']
        np.savez(folder / 'vectors.npz', **{part: rows.astype(np.float16) for part, rows in made.items()},
                 index_paths=np.array(index['path'].tolist()), index_labels=np.array(index['label'].tolist()))
    if config:
        (folder / 'config.json').write_text(json.dumps(config))
    if metadata:
        save_file({'projection.weight': np.ones((2, 2), np.float32)}, folder / 'model.safetensors', metadata)
    return table


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """(folder with three runs, {run: its queries.csv, in the order of the images})."""
    folder = tmp_path_factory.mktemp('runs')
    images = make_images(folder / 'data')
    ingredients = [{'run': 'one', 'score': .5}, {'run': 'two', 'score': None}]
    tables = {
        'stages/first': write_run(folder / 'stages/first', images, .8, 3, metadata={
            'step': '3', 'config': json.dumps(SETTINGS['stages/first'])}),
        'second': write_run(folder / 'second', images, .45, 7, SETTINGS['second'],
                            {'method': 'uniform', 'ingredients': json.dumps(ingredients)}),
        'third': write_run(folder / 'third', images, 1.6, 4, vectors=False)}
    (folder / 'unfinished').mkdir()
    (folder / 'unfinished' / 'scores.csv').write_text('stage,model,dim,mp5,seconds\n')
    return folder, tables


@pytest.fixture(scope='module')
def browser():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        pytest.skip('playwright is not installed (pip install playwright): the page of explore is untested')
    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        except Error as error:
            pytest.skip(f'no browser can be opened (playwright install chromium): the page of explore is untested: {error}')
        yield opened
        opened.close()


@pytest.fixture(scope='module')
def screen(browser):
    """A screen of a size and colour scheme, opened once."""
    return cache(lambda width, height, scheme: browser.new_context(
        viewport={'width': width, 'height': height}, color_scheme=scheme))


@pytest.fixture
def visit(screen):
    """Opens a page; afterwards no script has failed, no dialog was shown and nothing was asked of a network."""
    pages, failed = [], []

    def visit(path, width=1280, height=2200, scheme='light'):
        page = screen(width, height, scheme).new_page()
        pages.append(page)
        page.on('console', lambda message: failed.append(message.text))
        page.on('pageerror', lambda error: failed.append(str(error)))
        page.on('dialog', lambda dialog: (failed.append(dialog.message), dialog.dismiss()))
        page.on('request', lambda asked: asked.url.startswith(('file:', 'data:', 'about:')) or failed.append(asked.url))
        page.goto(f'file://{os.fspath(path)}')
        return page

    yield visit
    for page in pages:
        page.close()
    assert failed == []


@pytest.fixture(scope='module')
def written(world):
    return explore(world[0])


@pytest.fixture
def page(written, visit):
    return visit(written)


# What the page shows

def texts(page, selector):
    return page.locator(selector).all_inner_texts()


def listed(page):
    """[(label, file, precisions, change)] of the list."""
    return page.locator('.option').evaluate_all("""rows => rows.map(row => ['.line:not(.soft)', '.line.soft',
        '.number:not(.change)', '.change'].map(one => row.querySelector(one)?.textContent))""")


def found(page, side):
    """[(label, distance, verdict)] of the neighbours under a run."""
    return page.locator(f'#five-{side} .near').evaluate_all("""all => all.map(one => [
        one.querySelector('p').textContent, one.querySelector('small').textContent, one.classList[1]])""")


def cells(page, table):
    """The texts of a table, row by row."""
    return page.locator(f'{table} tr').evaluate_all('all => all.map(row => [...row.cells].map(cell => cell.textContent))')


def expected_neighbours(row, counted=3):
    pairs = [(row[f'label_{rank}'], f'{row[f"distance_{rank}"]:.2f}') for rank in RANKS]
    return [[label, distance, 'right' if label == row['label'] else 'wrong' if rank < counted else 'none']
            for rank, (label, distance) in enumerate(pairs)]


def number(text):
    return float(text.replace('−', '-'))


def in_page(path):
    return path.encode(errors='backslashreplace').decode()


def both(tables, a='stages/first', b='second'):
    """The queries with precisions and their change, in the list's default order."""
    table = tables[b][['path', 'label']].assign(before=tables[a]['precision'], after=tables[b]['precision'])
    table['change'] = (table['after'] - table['before']).round(3)
    keys = pd.DataFrame({'most': -table['change'].abs(), 'gain': -table['change']})
    return table.loc[keys.sort_values(['most', 'gain'], kind='stable').index]


def test_the_two_runs_their_intervals_and_their_difference_are_those_of_the_files(page, world):
    tables, (a, b) = world[1], ('stages/first', 'second')
    names = [option.split(' · ') for option in texts(page, '#choose-b option')]
    means = {run: table['precision'].mean() for run, table in tables.items()}
    assert names == [[run, f'{means[run]:.3f}'] for run in sorted(means, key=means.get, reverse=True)]
    assert page.locator('#choose-b').input_value() == '0' and names[0][0] == b
    assert names[int(page.locator('#choose-a').input_value())][0] == a
    assert texts(page, '.large')[:2] == [f'{means[a]:.3f}', f'{means[b]:.3f}']
    gain, low, high = paired_bootstrap(tables[a]['precision'], tables[b]['precision'], tables[a]['label'])
    assert low > 0 and number(page.locator('#gain').inner_text()) == pytest.approx(gain, abs=.0006)
    told = re.findall(r'[+−]?[\d.]+', page.locator('#sure').inner_text())
    assert [number(text) for text in told[1:]] == pytest.approx([low, high], abs=.02)
    assert page.locator('#sure').inner_text().endswith('B is better')
    change = both(tables)['change']
    assert texts(page, '#kinds button') == [f'▲{(change > 0).sum()} better', f'▼{(change < 0).sum()} worse',
                                            f'={(change == 0).sum()} equal']
    page.select_option('#choose-b', page.locator('#choose-a').input_value())
    page.select_option('#choose-a', '0')
    assert number(page.locator('#gain').inner_text()) == pytest.approx(-gain, abs=.0006)
    turned = [number(text) for text in re.findall(r'[+−]?[\d.]+', page.locator('#sure').inner_text())]
    assert turned[1:] == [-number(text) for text in told[:0:-1]]
    assert page.locator('#sure').inner_text().endswith('A is better')


def test_the_list_is_sorted_as_asked(page, world):
    table, rows = both(world[1]), listed(page)
    assert [row[3] for row in rows] == [
        f'{"▲ +" if change > 0 else "▼ −"}{abs(change):.2f}' if change else None for change in table['change'].fillna(0)]
    assert [row[1] for row in rows] == [in_page(os.path.basename(path)) for path in table['path']]
    orders = {'gain': -table['change'], 'loss': table['change'], 'worst': table['after'], 'best': -table['after']}
    for sort, keys in orders.items():
        page.select_option('#sort', sort)
        values = [re.split(' → ', row[2])[1] for row in listed(page)]
        after = table['after'][keys.sort_values(kind='stable').index]
        if sort in ('worst', 'best'):
            assert values == ['–' if np.isnan(value) else f'{value:.2f}' for value in after]
        else:
            changes = [number(row[3][2:]) if row[3] else 0 for row in listed(page)]
            assert changes[:-1] == pytest.approx(table['change'].dropna().sort_values(
                ascending=sort == 'loss').tolist(), abs=.006)
    page.select_option('#sort', 'name')
    labels = [row[0] for row in listed(page)]
    assert labels == sorted(labels, key=str.lower) and len(labels) == 25


def test_the_filter_finds_labels_and_paths(page):
    page.fill('#filter', 'OBJECT C')
    assert [row[:2] for row in listed(page)] in ([['object c', '0.jpg'], ['object c', '1.jpg']],
                                                 [['object c', '1.jpg'], ['object c', '0.jpg']])
    assert page.locator('#count').inner_text() == '2 of 25' and page.locator('#detail .name').inner_text() == 'object c'
    page.fill('#filter', '/data/03/1.jpg')
    assert [row[:2] for row in listed(page)] == [['object b', '1.jpg']]
    page.fill('#filter', 'no such')
    assert page.locator('#list').inner_text() == 'No query fits.'
    assert page.locator('#detail').inner_text() == 'No query is selected.'


def test_a_click_shows_the_five_nearest_of_both_runs_with_names_distances_and_verdicts(page, world):
    table = both(world[1])
    for place in (0, 7, 20):
        page.locator('.option').nth(place).click()
        query = table.index[place]
        assert page.locator('.option[aria-selected=true]').count() == 1
        for side, run in (('a', 'stages/first'), ('b', 'second')):
            row = world[1][run].loc[query]
            assert found(page, side) == expected_neighbours(row)
            assert page.locator(f'#five-{side} .row-head').text_content() == (
                f'{side.upper()}{run}precision {row["precision"]:.2f}')
    marks = dict(zip((verdict for *_, verdict in found(page, 'a')), texts(page, '#five-a .mark')))
    assert marks == {verdict: {'right': '✓', 'wrong': '✕', 'none': '–'}[verdict] for verdict in marks} and len(marks) > 1


def test_a_query_whose_object_is_not_in_the_index_counts_nowhere(page):
    page.fill('#filter', 'object k')
    (label, _, scores, change), = listed(page)
    assert (label, scores, change) == ('object k', '– → –', None)
    assert {verdict for *_, verdict in found(page, 'b')} == {'none'}
    assert 'its object is not in the index' in page.locator('#five-b').inner_text()


def test_arrow_keys_select_unless_one_types(page):
    names = [row[:2] for row in listed(page)]

    def selected():
        return page.locator('.option[aria-selected=true] .line').all_inner_texts()

    for key, place in (('ArrowDown', 1), ('ArrowRight', 2), ('ArrowDown', 3), ('ArrowUp', 2), ('ArrowLeft', 1)):
        page.keyboard.press(key)
        assert [*map(str.strip, selected())] == [*map(str.strip, names[place])]
        active = page.locator('#list').get_attribute('aria-activedescendant')
        assert page.locator(f'[id="{active}"]').get_attribute('aria-selected') == 'true'
    page.focus('#filter')
    page.keyboard.press('ArrowDown')
    assert selected() == names[1]


def test_other_runs_keep_the_query_in_view_and_another_order_begins_at_its_top(page):
    page.set_viewport_size({'width': 1280, 'height': 700})
    for _ in range(20):
        page.keyboard.press('ArrowDown')
    query = page.locator('#detail .head p').all_inner_texts()
    page.select_option('#choose-a', label=texts(page, '#choose-a option')[2])
    chosen, box = page.locator('.option[aria-selected=true]'), page.locator('#list').bounding_box()
    assert page.locator('#detail .head p').all_inner_texts() == query
    assert chosen.get_attribute('title').endswith(f'/{query[1]}')
    inside = chosen.bounding_box()
    assert box['y'] <= inside['y'] and inside['y'] + inside['height'] <= box['y'] + box['height'] + 1
    page.select_option('#sort', 'best')
    assert page.locator('.option').first.get_attribute('aria-selected') == 'true'


def test_the_most_confused_pairs_are_counted_and_filter_the_list(page, world):
    counts = {}
    for side, run in enumerate(('stages/first', 'second')):
        table = world[1][run].dropna(subset='precision')
        for own, other in table.loc[table['label'] != table['label_1'], ['label', 'label_1']].to_numpy():
            counts.setdefault((own, other), [0, 0])[side] += 1
    rows = cells(page, '#pairs')[1:]
    assert {words: [int(a), int(b)] for words, a, b in rows} == {
        f'{own} → {other}': pair for (own, other), pair in counts.items()}
    assert [max(int(a), int(b)) for _, a, b in rows] == sorted((max(pair) for pair in counts.values()), reverse=True)
    tables = world[1]['stages/first'], world[1]['second']
    for place in (0, next(place for place, row in enumerate(rows) if row[1] == '0')):  # one that only B confuses
        own, other = rows[place][0].split(' → ')
        page.locator('#pairs button').nth(place).click()
        wrong = tables[0]['label'].eq(own) & (tables[0]['label_1'].eq(other) | tables[1]['label_1'].eq(other))
        assert len(listed(page)) == wrong.sum() > 0 and {row[0] for row in listed(page)} == {own}
    page.locator('#no-pair').click()
    assert len(listed(page)) == 25 and page.locator('#chips').is_hidden()


def test_better_and_worse_filter_the_list(page, world):
    change = both(world[1])['change']
    for kind, count in (('better', (change > 0).sum()), ('worse', (change < 0).sum()), ('equal', (change == 0).sum())):
        page.locator('#kinds button', has_text=kind).click()
        assert len(listed(page)) == count and page.locator('#kinds [aria-pressed=true]').inner_text().endswith(kind)
    page.locator('#kinds button', has_text='equal').click()
    assert len(listed(page)) == 25


def test_only_settings_that_differ_are_shown_and_a_missing_config_is_named(page):
    assert cells(page, '#settings') == [
        ['Setting', 'A: stages/first', 'B: second'], ['method', 'training', 'uniform'], ['ingredients', '–', 'one, two'],
        ['seed', '1', '2']]
    page.select_option('#choose-a', label=texts(page, '#choose-a option')[2])
    assert page.locator('#no-settings').inner_text() == 'third: no settings of training to compare.'
    page.select_option('#choose-a', '0')
    assert page.locator('#no-settings').inner_text() == 'None.' and page.locator('#settings tr').count() == 0


# The map

def test_hovering_over_the_map_names_an_image_and_a_click_selects_a_query_or_shows_an_index_image(page, world):
    assert page.locator('#map-note').inner_text().startswith('t-SNE of 61 images by second')
    for is_query in (True, False):
        places = page.evaluate("""() => {
            const {map, at} = placed(), box = get('map').getBoundingClientRect();
            return map.image.map((image, point) => [labelOf(image), pathOf(image), placesOf(state.b).has(image),
                                                    at(point)[0] + box.left, at(point)[1] + box.top]); }""")
        assert len({path for _, path, *_ in places}) == len(places) == 61
        apart = np.array([place[3:] for place in places])
        alone = (np.linalg.norm(apart[:, None] - apart, axis=2) < 6).sum(1) == 1  # nothing else is below the pointer
        label, path, _, x, y = next(place for place, one in zip(places, alone) if place[2] == is_query and one)
        page.mouse.move(x, y)
        assert label in page.locator('#tip').inner_text() and page.locator('#tip img').count() == 1
        page.mouse.click(x, y)
        shown = page.locator('#detail .head' if is_query else '#pinned').inner_text()
        assert label in shown and '/'.join(path.split('/')[-3:]) in shown and path not in shown  # below what all share
    times = sum((world[1]['second'][f'path_{rank}'] == path).sum() for rank in RANKS)
    assert f'of {times} quer' in page.locator('#pinned').inner_text()
    page.mouse.move(5, 5)
    assert page.locator('#tip').is_hidden()


def test_a_map_is_of_the_run_that_is_chosen_and_a_run_without_vectors_has_none(page, world):
    page.locator('#map-of button', has_text='A').click()
    assert 'by stages/first' in page.locator('#map-note').inner_text()
    page.select_option('#choose-a', label=texts(page, '#choose-a option')[2])
    assert page.locator('#map-note').inner_text() == 'third has no vectors.npz, so there is no map.'
    assert page.locator('#plane').is_hidden()


def test_maps_beyond_the_limit_are_sampled_and_by_pca(world, tmp_path, monkeypatch, visit):
    monkeypatch.setattr(room, 'MAP_POINTS', 30)
    monkeypatch.setattr(room, 'TSNE_POINTS', 45)
    page = visit(explore(world[0], tmp_path / 'page.html'))
    notes = [page.locator('#map-note').inner_text()]
    page.locator('#map-of button', has_text='A').click()
    notes.append(page.locator('#map-note').inner_text())
    assert sorted(note.split(' by ')[0] for note in notes) == ['PCA of 30 of 61 images', 't-SNE of 30 of 61 images']


# Names, screens, sizes

def test_names_are_only_text(page, world):
    page.fill('#filter', 'onerror')
    assert [row[:2] for row in listed(page)] == [[in_page(EVIL_LABEL), EVIL_FILE]]
    assert page.locator('#detail .name').text_content() == EVIL_LABEL and EVIL_FILE in page.locator('#detail').inner_text()
    page.fill('#filter', 'caf')
    assert [row[:2] for row in listed(page)] == [['odd', 'caf\\udce9.jpg']]
    assert page.locator('img:not([src^="data:image/webp;base64,"])').count() == 0
    assert page.locator('script').count() == 2
    source = (world[0] / 'explore.html').read_text('utf-8')
    data = source.split('id="data">')[1].split('</script>')[0]
    assert not set('<>&\u2028\u2029') & set(data) and EVIL_LABEL in json.loads(data)['images']['labels']


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_narrow_screen_shows_one_column_without_scrolling_sideways_in_light_and_dark(written, visit, scheme):
    page = visit(written, 400, 800, scheme)
    widths = page.evaluate("""[document.documentElement.scrollWidth, ...[...document.querySelectorAll('body *')].filter(
        one => !one.closest('#list, svg')).map(one => one.getBoundingClientRect().right)]""")
    assert max(widths) <= 400
    boxes = [page.locator(f'.card:has({one})').bounding_box() for one in ('#list', '#five-a', '#map', '#pairs', '#settings')]
    assert all(upper['y'] + upper['height'] <= lower['y'] for upper, lower in zip(boxes, boxes[1:]))
    ink, back = page.evaluate("""['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name]
        .match(/\\d+/g).reduce((sum, part) => sum + Number(part), 0))""")
    assert (ink > 500 and back < 150) if scheme == 'dark' else (ink < 150 and back > 500)


def test_every_control_has_a_name_and_shows_its_focus(page):
    names = page.evaluate("""[...document.querySelectorAll('button, select, input, [role]:not([role=presentation])')]
        .filter(one => one.checkVisibility()).map(one => one.getAttribute('aria-label') || one.textContent)""")
    assert len(names) > 30 and all(names)
    page.focus('#choose-a')
    seen = {}
    for _ in range(14):
        page.keyboard.press('Tab')
        name, outline = page.evaluate("""[document.activeElement.id || document.activeElement.textContent,
                                          getComputedStyle(document.activeElement).outlineStyle]""")
        seen[name] = outline
    assert {'choose-b', 'filter', 'sort', 'list', 'A', 'B'} <= set(seen) and set(seen.values()) == {'solid'}


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(written, visit, tmp_path):
    shown = written._repr_html_()
    (tmp_path / 'notebook.html').write_text(f'<p>cell</p>{shown}', 'utf-8')
    page = visit(tmp_path / 'notebook.html')
    frame = page.frame_locator('iframe')
    assert frame.locator('#choose-b option').count() == 3 and frame.locator('.option').count() > 5
    assert page.locator('iframe').bounding_box()['height'] == 700
    assert repr(written) == str(written.path) == os.fspath(written)


def test_with_six_thousand_queries_few_rows_are_in_the_page(tmp_path, visit, capsys):
    rows = np.arange(6000)
    table = pd.DataFrame({'path': [f'/none/q{row}.jpg' for row in rows], 'label': [f'object {row // 2}' for row in rows],
                          'domain': 'x', 'precision': rows % 5 / 4, 'relevant': 4})
    for rank in RANKS:
        table[f'path_{rank}'] = [f'/none/i{(row + rank) % 6000}.jpg' for row in rows]
        table[f'label_{rank}'] = [f'object {(row + rank) % 6000 // 2}' for row in rows]
        table[f'distance_{rank}'] = rank / 10
    (tmp_path / 'run').mkdir()
    table.to_csv(tmp_path / 'run' / 'queries.csv', index=False)
    page = visit(explore(tmp_path), height=900)
    assert page.locator('#facts').inner_text() == ('1 run · 12,000 images · 10,000 without a thumbnail, to keep this page '
                                                   'small · 2,000 could not be read')
    assert '2,000 of 2,000 images could not be read, first /none/' in capsys.readouterr().out
    assert page.locator('#count').inner_text() == '6,000' and page.locator('.option').count() < 40
    page.select_option('#sort', 'name')
    page.evaluate("get('list').scrollTop = 56 * 3000")
    page.wait_for_function("document.querySelector('.option').offsetTop > 56 * 2900")
    assert page.locator('.option').count() < 40
    page.fill('#filter', '/q5999.')
    assert [row[:2] for row in listed(page)] == [['object 2999', 'q5999.jpg']]


# Runs of several kinds

def test_what_was_written_and_left_out_is_printed(world, tmp_path, capsys, monkeypatch):
    made = explore(world[0], tmp_path / 'below' / 'page.html')
    size = made.path.stat().st_size
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ('Left out, since they hold no queries.csv: unfinished; run their notebooks again, or '
                        'utilities.save_results.')
    assert lines[-1] == (f'{tmp_path}/below/page.html: 3 runs, 61 images, {size / 1e6:.1f} MB; open it in a browser; it '
                         f'needs no network')
    assert size < 200_000
    monkeypatch.chdir(tmp_path)
    assert explore([world[0] / 'second', str(world[0] / 'third')], 'mine.html').path.absolute() == tmp_path / 'mine.html'


def test_the_page_shows_a_number_as_notebooks_do():
    assert f'{rounded(.063472):.3f}' == '0.063'  # by way of .0635 it would be .064


def test_runs_of_equal_names_are_all_shown_wherever_one_stands(world, tmp_path, monkeypatch):
    for place in ('a/soup', 'b/soup', 'soup'):
        shutil.copytree(world[0] / 'second', tmp_path / place)
    monkeypatch.chdir(tmp_path)
    for given, names in (('.', {'a/soup', 'b/soup', 'soup'}), (tmp_path, {'a/soup', 'b/soup', 'soup'}),
                         (['a', '../' + tmp_path.name + '/b', 'soup'], {'a/soup', f'../{tmp_path.name}/b/soup', 'soup'})):
        assert set(folders_of(given)[0]) == names
    monkeypatch.chdir(tmp_path / 'a/soup')
    assert len(folders_of(['.', '../../b/soup'])[0]) == 2


def test_without_any_queries_one_sentence_names_the_way_out(tmp_path):
    for folder in (tmp_path, tmp_path / 'absent', []):
        with pytest.raises(FileNotFoundError, match='holds no run with queries.csv: run the notebooks, .*save_results'):
            explore(folder)


def test_vectors_of_other_queries_are_refused(world, tmp_path):
    shutil.copytree(world[0] / 'second', tmp_path / 'second')
    kept = dict(np.load(tmp_path / 'second' / 'vectors.npz'))
    np.savez(tmp_path / 'second' / 'vectors.npz', **kept | {'query': kept['query'][1:]})
    with pytest.raises(ValueError, match='second has 25 queries but 24 query vectors: save both again'):
        explore(tmp_path)


def test_one_run_alone_is_shown(world, tmp_path, visit):
    page = visit(explore([world[0] / 'second'], tmp_path / 'one.html'))
    table = world[1]['second']
    assert page.locator('#run-a').is_hidden() and page.locator('#difference').is_hidden()
    assert page.locator('#sort').input_value() == 'worst' and len(listed(page)) == 25
    first = table.sort_values('precision', kind='stable').iloc[0]
    assert found(page, 'b') == expected_neighbours(first) and page.locator('#five-a').count() == 0
    assert page.locator('#map-note').inner_text().startswith('t-SNE of 61 images')


def test_runs_with_other_queries_in_another_folder_are_compared_on_those_that_they_share(world, tmp_path, visit):
    here, there = tmp_path / 'here', tmp_path / 'there'
    images = make_images(here)
    few = images[~images['label'].isin(['object a'])].assign(path=lambda rows: [
        path.replace(str(here), str(there)) for path in rows['path']])
    first = write_run(tmp_path / 'runs' / 'first', images, .9, 1)
    second = write_run(tmp_path / 'runs' / 'second', few, .3, 2)
    page = visit(explore(tmp_path / 'runs'))
    assert page.locator('#shared').inner_text() == '23 shared queries; A has 25, B 23'
    assert page.locator('#facts').inner_text() == '2 runs · 61 images'  # those that lie here were drawn
    assert len(listed(page)) == 23 and 'object a' not in {row[0] for row in listed(page)}
    merged = first.assign(file=first['path'].map(os.path.basename)).merge(
        second.assign(file=second['path'].map(os.path.basename)), on=['label', 'file'])
    gain = (merged['precision_y'] - merged['precision_x']).mean()
    assert number(page.locator('#gain').inner_text()) == pytest.approx(gain, abs=.0006)


def test_runs_that_share_no_query_say_so(tmp_path, visit):
    images = make_images(tmp_path / 'data')
    for name, kept in (('one', images['label'] < 'object d'), ('two', images['label'] >= 'object d')):
        write_run(tmp_path / 'runs' / name, images[kept].reset_index(drop=True), .5, 1)
    page = visit(explore(tmp_path / 'runs'))
    assert page.locator('#shared').inner_text().startswith('No shared query; A has ')
    assert page.locator('#gain').inner_text() == '–' and page.locator('#list').inner_text() == 'No query fits.'


def test_fewer_than_five_index_images_leave_places_empty(tmp_path, visit):
    images = make_images(tmp_path / 'data')
    index = images[(images['part'] == 'index') & images['label'].eq('object a')]
    queries = images[(images['part'] == 'query') & images['label'].isin(['object a', 'odd'])]
    few = pd.concat([queries, index], ignore_index=True)
    table = make_queries(few, make_vectors(few, .3, 1))
    for rank in (4, 5):
        table = table.assign(**{f'{name}_{rank}': None for name in ('path', 'label', 'distance')})
    (tmp_path / 'run').mkdir()
    table.to_csv(tmp_path / 'run' / 'queries.csv', index=False, errors='surrogateescape')
    page = visit(explore(tmp_path))
    assert len(found(page, 'b')) == 3 and page.locator('#choose-b option').count() == 1


def test_all_pairs_are_compared_as_paired_bootstrap_does():
    rng, labels = np.random.default_rng(0), [f'object {place // 3}' for place in range(60)]
    scores = rng.integers(0, 6, (3, 60)) / 5
    scores[2, 50:] = np.nan
    pairs = compare_pairs(scores, labels)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        kept = ~np.isnan(scores[[a, b]]).any(0)
        assert pairs[a, b] == pytest.approx(paired_bootstrap(scores[a, kept], scores[b, kept], np.array(labels)[kept]))
    scores[2] = np.nan
    assert np.isnan(compare_pairs(scores, labels)[0, 2]).all()


def test_the_page_begins_with_the_best_run_and_the_best_that_it_clearly_improves():
    sure, unsure = (-.1, -.2, -.01), (-.1, -.2, .01)
    assert choose_pair(4, {(0, 1): unsure, (0, 2): sure, (0, 3): sure, (1, 2): sure}) == (2, 0)
    assert choose_pair(3, {(0, 1): unsure, (0, 2): (np.nan,) * 3, (1, 2): sure}) == (1, 0)
    assert choose_pair(1, {}) == (None, 0)


def test_runs_lie_up_to_four_levels_below_and_a_damaged_one_is_left_out(tmp_path, capsys):
    images = make_images(tmp_path / 'images')
    vectors = make_vectors(images, .5, 1)
    for place in ('runs/one', 'runs/demo/mine/soup', 'runs/a/b/c/run', 'runs/broken'):
        (tmp_path / place).mkdir(parents=True)
        make_queries(images, vectors).to_csv(tmp_path / place / 'queries.csv', index=False, errors='surrogateescape')
    (tmp_path / 'runs/broken/queries.csv').write_text('another,table\n1,2\n')
    page = explore(tmp_path / 'runs')
    said = capsys.readouterr().out
    assert f'Left out: {tmp_path}/runs/broken/queries.csv is not a table' in said and ': 3 runs' in said
    assert all(name in page.path.read_text() for name in ('"demo/mine/soup"', '"a/b/c/run"', '"one"'))
