"""Thumbnails: one number an image wherever it lies, those most needed drawn, and those that cannot be read told apart."""
import base64
import io
import os

import numpy as np
import pytest
from PIL import Image

from guie import thumbnails
from guie.images import read_image
from guie.thumbnails import Images, choose_thumbnails, draw_thumbnails


def filled(*lists):
    images = Images()
    for pairs in lists:
        images.add(pairs)
    return images


def test_an_image_has_one_number_in_all_runs_and_empty_paths_have_none():
    images = filled([('/a/1.jpg', 'x'), ('/a/2.jpg', 'y'), ('', '')], [('/a/2.jpg', 'y'), ('/a/3.jpg', 'y')])
    assert images.of([('/a/3.jpg', 'y'), ('', ''), ('/a/1.jpg', 'x'), ('/a/2.jpg', 'y')]).tolist() == [2, -1, 0, 1]
    assert images.labels == ['x', 'y', 'y']


def test_data_in_another_folder_are_the_same_by_label_and_file_name_unless_several_have_it():
    here = [('/a/x/1.jpg', 'x'), ('/a/y/1.jpg', 'y'), ('/a/p/2.jpg', 'z'), ('/a/q/2.jpg', 'z')]
    there = [(path.replace('/a/', '/mnt/b/'), label) for path, label in here]
    images = filled(here, there, [(path.replace('/a/', '/c/'), label) for path, label in here[:1]])
    assert images.of(there).tolist() == [0, 1, 4, 5] and images.paths[0] == ['/a/x/1.jpg', '/mnt/b/x/1.jpg', '/c/x/1.jpg']
    shares_one = filled(here, [here[1], there[0]])  # paths decide as soon as one is shared
    assert shares_one.of([there[0]]).tolist() == [4]


def test_another_label_is_another_image():
    assert filled([('/a/1.jpg', 'x')], [('/a/1.jpg', 'y')]).labels == ['x', 'y']


def test_texts_are_kept_once_and_labels_of_two_data_sets_stay_apart():
    bad = os.fsdecode(b'/a/caf\xe9.jpg')
    held = filled([('/a/1.jpg', 'met/7'), (bad, 'met/7'), ('/1.jpg', 'inaturalist/7'), ('1.jpg', 'mine/7')]).table()
    paths = [held['folders'][folder] + file for folder, file in zip(held['folder'], held['file'])]
    assert paths == ['/a/1.jpg', '/a/caf\\udce9.jpg', '/1.jpg', '1.jpg'] and held['folders'] == ['/a/', '/', '']
    assert held['label'] == [0, 0, 1, 2]
    assert [held['labels'][place] for place in held['label']][0] == '7' and held['labels'][2] == 'mine/7'


def test_folders_are_those_below_what_all_images_share():
    held = filled([('/data/set/a/1.jpg', 'x'), ('/data/set/b/2.jpg', 'y')]).table()
    assert held['above'] == '/data/' and held['folders'] == ['set/a/', 'set/b/'] and held['file'] == ['1.jpg', '2.jpg']
    held = filled([('/data/set/1.jpg', 'x'), ('/data/set/2.jpg', 'y')]).table()
    assert held['above'] == '/data/' and held['folders'] == ['set/']
    held = filled([('/one/1.jpg', 'x'), ('/two/2.jpg', 'y')]).table()
    assert held['above'] == '/' and held['folders'] == ['one/', 'two/']


def test_what_runs_differ_in_comes_first_then_what_is_shown_most(monkeypatch):
    nan = np.nan
    scores = np.array([[0, .2, .4, .6, nan, nan, nan, nan], [0, 1, .4, .8, nan, nan, nan, nan]])
    near = np.array([[4], [5], [6], [6]])
    found = [(np.arange(4), near), (np.arange(4), near.clip(max=5))]
    assert choose_thumbnails(found, scores) == [1, 3, 0, 2, 5, 4, 6, 7]
    monkeypatch.setattr(thumbnails, 'THUMBNAILS', 5)
    assert choose_thumbnails(found, scores) == [1, 3, 5, 6, 0]
    assert choose_thumbnails([(np.arange(4), np.full((4, 1), -1))], scores[:1])[:2] == [0, 1]


def test_pictures_are_the_images_and_broken_ones_are_counted_and_told_apart(tmp_path, capsys):
    colours = [(250, 20, 20), (20, 200, 20), (20, 20, 250)]
    for number, colour in enumerate(colours):
        Image.new('RGB', (90, 60), colour).save(tmp_path / f'{number}.png')
    (tmp_path / 'torn.jpg').write_bytes(b'\xff\xd8\xff')
    images = filled([(str(tmp_path / name), 'x') for name in ('0.png', 'torn.jpg', '1.png', 'absent.png', '2.png')])
    images.paths[4].insert(0, '/elsewhere/2.png')  # another run saw it in a folder that is not here
    pictures = draw_thumbnails(images, [4, 0, 1, 3])
    assert pictures[1] == pictures[3] == 0 and pictures[2] == ''
    for place, colour in ((0, colours[0]), (4, colours[2])):
        shown = Image.open(io.BytesIO(base64.b64decode(pictures[place])))
        assert shown.format == 'WEBP' and shown.size == (64, 64)
        assert np.abs(np.asarray(shown.convert('RGB'), int) - colour).max() <= 6
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == f'2 of 4 images could not be read, first {tmp_path}/torn.jpg; the page shows a cross.'


@pytest.mark.parametrize('seed', [0, 1])
def test_a_picture_is_close_to_what_a_tower_sees(tmp_path, seed):
    noise = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)
    path = str(tmp_path / 'noise.png')
    Image.fromarray(noise).resize((320, 240)).save(path)
    picture, = draw_thumbnails(filled([(path, 'x')]), [0])
    seen = np.asarray(read_image(path, 64), float)
    assert np.abs(np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert('RGB')) - seen).mean() < 16
