"""Inputs: kagglehub is asked in Kaggle's and Colab's notebooks alone; what it raises is one sentence with the way out."""
import sys
from types import ModuleType, SimpleNamespace

import pytest

from guie import inputs
from guie.config import Config
from guie.datasets import DATASETS, read_dataset
from guie.splits import load_data
from tests.runs import is_one_sentence
from tests.worlds import write_files

SET = {'train.csv': 'name,class,group\n' + ''.join(f'{number}.jpg,{number % 6},3\n' for number in range(30))}
IMAGES = [f'train/{number}.jpg' for number in range(30)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A kagglehub that hands out tmp_path/cache; its `asked` are the calls, its `error` is raised instead."""
    stub = ModuleType('kagglehub')
    stub.asked, stub.error = [], None

    def answer(kind, handle):
        stub.asked.append((kind, handle))
        if stub.error:
            raise stub.error
        return str(tmp_path / 'cache')

    stub.dataset_download = lambda handle: answer('dataset', handle)
    stub.competition_download = lambda handle: answer('competition', handle)
    monkeypatch.setitem(sys.modules, 'kagglehub', stub)
    monkeypatch.delenv('KAGGLE_KERNEL_RUN_TYPE', raising=False)
    write_files(tmp_path / 'cache', SET)
    write_files(tmp_path / 'cache', IMAGES)
    return stub


def be_in(monkeypatch, place):
    if place == 'Kaggle':
        monkeypatch.setenv('KAGGLE_KERNEL_RUN_TYPE', 'Interactive')
    if place == 'Colab':
        monkeypatch.setitem(sys.modules, 'google.colab', ModuleType('google.colab'))


@pytest.mark.parametrize('place', ['Kaggle', 'Colab'])
def test_a_known_set_that_is_not_attached_is_fetched_where_it_is_asked_for(tmp_path, monkeypatch, hub, capsys, place):
    be_in(monkeypatch, place)
    frame = read_dataset('Products_10k', search=[tmp_path / 'input'], download=True)
    assert len(frame) == 30 and frame['path'].str.startswith(f'{tmp_path}/cache/train/').all()
    assert hub.asked == [('competition', 'products-10k')]
    assert 'products-10k: fetched by kagglehub from https://www.kaggle.com/competitions/products-10k' in (
        capsys.readouterr().out)


def test_what_is_attached_is_taken_before_anything_is_fetched(tmp_path, monkeypatch, hub):
    be_in(monkeypatch, 'Kaggle')
    write_files(tmp_path / 'input/competitions/products-10k', SET)
    write_files(tmp_path / 'input/competitions/products-10k', IMAGES)
    frame = read_dataset('products-10k', search=[tmp_path / 'input'], download=True)
    assert frame['path'].str.startswith(f'{tmp_path}/input/').all() and not hub.asked


@pytest.mark.parametrize('place, options', [
    ('', {'download': True}), ('Kaggle', {}), ('Colab', {}), ('Kaggle', {'download': True, 'root': 'cache/test'})])
def test_nothing_is_fetched_on_ones_own_machine_unasked_or_where_the_folder_is_given(
        tmp_path, monkeypatch, hub, place, options):
    be_in(monkeypatch, place)
    write_files(tmp_path / 'cache/test', ['a.jpg'])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        read_dataset('products-10k', search=[tmp_path / 'input'], **options)
    assert is_one_sentence(error) and not hub.asked


def test_where_kagglehub_is_not_installed_the_sentence_is_that_of_what_is_not_attached(tmp_path, monkeypatch, hub):
    be_in(monkeypatch, 'Colab')
    monkeypatch.setitem(sys.modules, 'kagglehub', None)  # an import of it fails
    with pytest.raises(FileNotFoundError, match='^products-10k: expected train.csv'):
        read_dataset('products-10k', search=[tmp_path / 'input'], download=True)


@pytest.mark.parametrize('place, name, words', [
    ('Kaggle', 'products-10k', 'attach the competition products-10k as an input (accept its rules once, at https://www.'
     'kaggle.com/competitions/products-10k/rules), or give its folder as the root of DATA.'),
    ('', 'shopee', 'get it by `kaggle competitions download shopee-product-matching` (accept its rules once, at https://www.'
     'kaggle.com/competitions/shopee-product-matching/rules), unpack it and give its folder as the root of DATA.'),
    ('', 'food-101', 'get it by `kaggle datasets download dansbecker/food-101`, unpack it and give its folder as the root '
     'of DATA.'),
    ('Kaggle', 'met', '; give its folder as the root of DATA.')])
def test_a_missing_set_says_how_to_get_it(tmp_path, monkeypatch, hub, place, name, words):
    be_in(monkeypatch, place)
    with pytest.raises(FileNotFoundError) as error:
        read_dataset(name, search=[tmp_path / 'input'])
    assert is_one_sentence(error) and str(error.value).endswith(words)


def refusal(status):
    error = OSError(f'{status} Client Error.\n\nYou have no permission.')  # requests' errors are OSErrors
    error.response = SimpleNamespace(status_code=status)
    return error


class UnauthenticatedError(Exception):
    """As kagglehub's own is called."""


@pytest.mark.parametrize('place, error, words', [
    ('Kaggle', refusal(403), '(403 Client Error): accept its rules at https://www.kaggle.com/competitions/products-10k/rules.'),
    ('Colab', UnauthenticatedError('User is not authenticated'),
     '(User is not authenticated): make a token at https://www.kaggle.com/settings/api and keep it as the secret '
     'KAGGLE_API_TOKEN, and accept its rules at https://www.kaggle.com/competitions/products-10k/rules.'),
    ('Kaggle', ConnectionError('Failed to resolve name'),
     '(Failed to resolve name): turn the internet on, or attach the competition products-10k as an input'),
    ('Colab', OSError(28, 'No space left on device'),
     '(No space left on device): free some space or take a smaller data set.')])
def test_what_kagglehub_raises_is_one_sentence_that_says_what_to_do(tmp_path, monkeypatch, hub, place, error, words):
    be_in(monkeypatch, place)
    hub.error = error
    with pytest.raises(FileNotFoundError) as raised:
        read_dataset('products-10k', search=[tmp_path / 'input'], download=True)
    assert is_one_sentence(raised) and raised.value.__cause__ is error
    assert str(raised.value).startswith(f'products-10k could not be fetched by kagglehub {words}')


def test_a_dataset_is_asked_for_as_a_dataset(tmp_path, monkeypatch, hub):
    be_in(monkeypatch, 'Colab')
    write_files(tmp_path / 'cache/food-101/food-101', {'meta/classes.txt': 'a\n'})
    write_files(tmp_path / 'cache/food-101/food-101', ['images/a/1.jpg'])
    frame = read_dataset('food-101', search=[tmp_path / 'input'], download=True)
    assert frame['label'].tolist() == ['food-101/a'] and hub.asked == [('dataset', 'dansbecker/food-101')]


def test_load_data_fetches_only_if_it_is_told_to(tmp_path, monkeypatch, hub):
    be_in(monkeypatch, 'Colab')
    monkeypatch.chdir(tmp_path)
    config = Config(n_classes=None, min_images=2)
    with pytest.raises(FileNotFoundError, match='^products-10k: expected'):
        load_data('products-10k', config=config)
    assert not hub.asked
    splits = load_data(['products-10k'], config=config, download=True)
    assert len({path for frame in splits.values() for path in frame['path']}) == 30 and len(hub.asked) == 1


def test_a_handle_is_a_dataset_of_somebody_or_a_competition_that_the_notebooks_attach():
    handles = {name: layout.kaggle for name, layout in DATASETS.items() if layout.kaggle}
    assert {'products-10k', 'landmark-recognition-2020', 'shopee', 'h-and-m'} <= set(handles)
    assert all(len(handle.split('/')) <= 2 and ' ' not in handle for handle in handles.values())
    assert inputs.page_of('a/b') == 'https://www.kaggle.com/datasets/a/b'
    assert inputs.page_of('c') == 'https://www.kaggle.com/competitions/c'
