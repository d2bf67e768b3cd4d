"""Files are whole or absent whatever fails; attached inputs are found; hashes tell contents apart."""
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import save_file

from guie import checkpoints, datasets, embedding, files, plots, results, scores, splits, submission
from guie.config import Config
from guie.files import progress_bar, session_start, write_text
from tests.worlds import lock_folders


def full_disk(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # the kernel cuts the write short
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def refused_rename(monkeypatch):
    def refuse(source, target):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'replace', refuse)
    return monkeypatch.undo


def failing_block(monkeypatch):
    return lambda: None


def text(path):
    path.write_text('new' * 999)


def arrays(path):
    with open(path, 'wb') as file:
        np.savez(file, vectors=np.ones((99, 9)))


def tensors(path):
    save_file({'a': torch.ones(99, 9)}, path)


def half_written(path):
    path.write_text('half')
    raise OSError(5, 'Input/output error')


FAILURES = [(full_disk, text), (full_disk, arrays), (full_disk, tensors), (refused_rename, text), (refused_rename, tensors),
            (failing_block, half_written)]


@pytest.mark.parametrize('old', [b'the old file', None], ids=['over an old file', 'where none was'])
@pytest.mark.parametrize('break_disk, write', FAILURES, ids=lambda part: part.__name__)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, break_disk, write, old):
    path = tmp_path / 'folder' / 'file'
    path.parent.mkdir()
    if old:
        path.write_bytes(old)
    repair = break_disk(monkeypatch)
    try:
        with pytest.raises(OSError) as error, files.whole_file(path) as beside:
            write(beside)
    finally:
        repair()
    message = str(error.value)
    assert message.startswith(f'{path} could not be written (') and '\n' not in message
    assert 'free some space or choose another folder; what was there is unchanged.' in message
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == ({'file': old} if old else {})


@pytest.mark.parametrize('text', ['plain', 'café 可乐', *map(os.fsdecode, ('可乐'.encode('gbk'), bytes(range(128, 256))))])
def test_a_text_keeps_its_bytes_and_can_be_printed_whatever_it_is(tmp_path, text):
    files.write_text(tmp_path / 'file', text)
    assert (tmp_path / 'file').read_bytes() == os.fsencode(text)
    shown = files.printable(f'{tmp_path}/{text}')
    assert shown.encode().isascii() or shown == f'{tmp_path}/{text}'


def test_an_error_that_is_no_file_systems_passes_and_leaves_the_old_file(tmp_path):
    files.write_text(tmp_path / 'file', 'old')
    for error in (ValueError('no number'), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, files.whole_file(tmp_path / 'file') as beside:
            beside.write_text('half')
            raise error
        assert raised.value is error
        assert (tmp_path / 'file').read_text() == 'old' and os.listdir(tmp_path) == ['file']


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    files.write_text(tmp_path / 'new/folder/file', 'old')
    with files.whole_file(tmp_path / 'new/folder/file') as beside:
        beside.write_text('new')
        assert (tmp_path / 'new/folder/file').read_text() == 'old'
        assert beside.parent == tmp_path / 'new/folder'  # a rename between file systems would copy
    assert (tmp_path / 'new/folder/file').read_text() == 'new' and os.listdir(tmp_path / 'new/folder') == ['file']


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'folder').mkdir()
    for path in (tmp_path / 'file/run/log.csv', tmp_path / 'file/log.csv', tmp_path / 'folder', tmp_path / ('long' * 99),
                 Path('/proc/run'), Path('/sys/run')):
        with pytest.raises(OSError, match=f'^{path} could not be written .*: free some space or choose another') as error:
            files.write_text(path, 'text')
        assert '\n' not in str(error.value) and '.part' not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder']


@pytest.mark.parametrize('name, most, kept', [
    ('a.tar', 5, 'a.tar'), ('ab.tar', 5, 'ab.ta'), ('图图图', 9, '图图图'), ('图图图', 8, '图图'), ('é' * 9, 5, 'éé'),
    (os.fsdecode(b'\xff' * 9), 9, os.fsdecode(b'\xff' * 9))])
def test_a_name_is_cut_by_bytes_at_a_characters_end_and_only_if_it_must_be(name, most, kept):
    assert files.short_name(name, most) == kept


def test_attached_folders_are_found_six_levels_deep_the_least_deep_first(tmp_path):
    for path in ('b/c/d/e/f/g/too deep', 'b/z', 'a/y', 'store'):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / 'a/link').symlink_to(tmp_path / 'store')
    (tmp_path / 'a/file').touch()
    found = list(files.attached_folders([tmp_path, tmp_path / 'absent', tmp_path / 'a']))
    below = [os.path.relpath(path, tmp_path) for path in found]
    first = ['.', 'absent', 'a']  # the places themselves; then what is in each of them, sorted
    assert below[:3] == first and below[3:8] == ['a', 'b', 'store', 'a/link', 'a/y']
    assert below[8:12] == ['a/link', 'a/y', 'b/c', 'b/z'] and below[12:] == ['b/c/d', 'b/c/d/e', 'b/c/d/e/f', 'b/c/d/e/f/g']
    assert all(type(path) is str and os.path.isabs(path) for path in found)


def test_a_folder_that_cannot_be_read_does_not_end_the_search(tmp_path, monkeypatch):
    for path in ('a/locked/inside', 'a/z/found'):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / 'a/loop').symlink_to('loop')
    lock_folders(monkeypatch, 'locked')
    below = [os.path.relpath(path, tmp_path) for path in files.attached_folders([tmp_path])]
    assert below == ['.', 'a', 'a/locked', 'a/z', 'a/z/found']


def test_kaggles_inputs_are_searched_unless_others_are_given():
    assert files.ATTACHED == ('/kaggle/input',) and next(files.attached_folders()) == '/kaggle/input'


def test_on_kaggle_what_is_only_compared_lies_outside_of_the_output_and_elsewhere_with_the_rest(tmp_path, monkeypatch):
    working, scratch = tmp_path / 'working', tmp_path / 'scratch'
    place = lambda out_dir: files.scratch_folder(out_dir, working, scratch)
    assert place('runs/pets') == Path('runs/pets')  # no such working folder: not on Kaggle
    working.mkdir()
    assert place(working / 'runs') == working / 'runs'  # nowhere to go
    scratch.mkdir()
    assert place(working / 'runs') == place(str(working / 'runs')) == scratch / 'runs'
    monkeypatch.chdir(working)
    assert place('runs/pets') == scratch / 'pets' and place('.') == scratch / 'working'
    assert not list(scratch.iterdir())  # whoever writes makes it
    assert files.scratch_folder(tmp_path) == tmp_path  # this machine is not Kaggle


def test_a_submission_is_copied_to_where_kaggle_looks_for_it_and_nowhere_else(tmp_path, monkeypatch, capsys):
    made, working = tmp_path / 'submission.zip', tmp_path / 'working'
    made.write_bytes(b'new')
    files.copy_to_kaggle_output(made, working)
    assert not working.exists() and not capsys.readouterr().out  # not on Kaggle
    working.mkdir()
    (working / 'submission.zip').write_bytes(b'old')
    for _ in range(2):
        files.copy_to_kaggle_output(made, working)
        assert (working / 'submission.zip').read_bytes() == b'new' and len(list(working.iterdir())) == 1
    files.copy_to_kaggle_output(working / 'submission.zip', working)
    assert (working / 'submission.zip').read_bytes() == b'new'
    assert capsys.readouterr().out == f'{working}/submission.zip: the same file\n'

    def refuse(source, target):
        raise OSError(18, 'Invalid cross-device link')

    monkeypatch.setattr(os, 'link', refuse)
    made.unlink()
    made.write_bytes(b'newer')
    files.copy_to_kaggle_output(made, working)
    assert (working / 'submission.zip').read_bytes() == b'newer' and len(list(working.iterdir())) == 1


def test_a_copy_that_was_killed_does_not_change_the_submission_that_it_was_of(tmp_path):
    (tmp_path / 'working').mkdir()
    for name in ('first', 'second'):
        (tmp_path / name).write_bytes(name.encode())
    with files.whole_file(tmp_path / 'working/submission.zip') as beside:
        os.link(tmp_path / 'first', beside)
        shutil.copytree(tmp_path / 'working', tmp_path / 'killed', copy_function=os.link)
    files.copy_to_kaggle_output(tmp_path / 'second', tmp_path / 'killed')
    assert (tmp_path / 'killed/submission.zip').read_bytes() == b'second'
    assert (tmp_path / 'first').read_bytes() == b'first' and os.listdir(tmp_path / 'killed') == ['submission.zip']


def test_hashes_tell_states_apart_by_name_type_shape_and_value_but_not_by_order(tmp_path):
    (tmp_path / 'abc').write_bytes(b'abc')
    assert files.file_hash(tmp_path / 'abc') == (
        'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad')  # FIPS 180-2, appendix B.1
    a, b = torch.zeros(2, 2), torch.ones(3, dtype=torch.bfloat16)
    same = [{'a': a, 'b': b}, {'b': b, 'a': a}]
    others = [{'a': a}, {'a': a, 'c': b}, {'a': a.view(4), 'b': b}, {'a': a + 1e-7, 'b': b},
              {'a': a.int(), 'b': b}, {'a': a, 'b': b.half()}, {'a': -a, 'b': b}, {'b': a, 'a': b}]
    hashes = [files.state_hash(state) for state in same + others]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 1 + len(others)
    assert all(len(one) == 16 and int(one, 16) for one in hashes)


def test_a_states_hash_is_that_of_its_values_however_they_lie_in_memory():
    a = torch.arange(6.).view(2, 3)
    assert files.state_hash({'a': a.T}) == files.state_hash({'a': a.T.contiguous().requires_grad_()})
    assert files.state_hash({'a': torch.tensor(1.), 'empty': torch.ones(0, 3)})


def test_a_name_that_was_meant_is_proposed_and_nothing_where_none_is_near():
    assert files.did_you_mean('epoch', ['seed', 'epochs']) == ' Did you mean epochs?'
    assert files.did_you_mean('seeds', ('seed', 'seed_', 'x')) == ' Did you mean seed or seed_?'
    assert files.did_you_mean('zyzzyva', {'seed': 1}) == ''


def test_a_progress_bar_is_written_to_the_output_and_not_to_the_errors(capsys):
    assert list(files.progress_bar(range(3), 'reading')) == [0, 1, 2]
    said = capsys.readouterr()
    assert 'reading' in said.out and not said.err


@pytest.mark.parametrize('options, seconds, kept', [
    ('', 2, True), (', leave=False', 4, True), (', leave=False', .05, False), (', disable=True', 2, False)])
def test_a_saved_notebook_keeps_one_line_of_a_bar_and_nothing_of_a_short_one_that_is_not_to_stay(options, seconds, kept):
    source = (f'import time\nfrom guie.files import progress_bar\nfor _ in progress_bar(range(30), "work"{options}):\n'
              f'    time.sleep({seconds / 30})')
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    outputs = NotebookClient(notebook, kernel_name='python3').execute().cells[0].outputs
    assert [output['output_type'] for output in outputs] == ['display_data'] * kept
    for output in outputs:
        assert output['data']['text/plain'].startswith('work: 100%') and '\n' not in output['data']['text/plain']


def test_a_bar_that_is_not_to_stay_takes_the_line_of_one_that_is_done_in_the_same_cell():
    first = """
from guie import files
files.PassingBar.seconds = 0
with files.progress_bar(total=2, desc='training') as outer:
    for name in ('a', 'b'):
        for step in files.progress_bar(range(3), name, leave=False):
            [*files.progress_bar(range(4), f'within {name}', leave=False)]
        outer.update()
"""
    second = "[*files.progress_bar(range(5), 'c', leave=False)]\nprint('done')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (first, second)])
    cells = NotebookClient(notebook, kernel_name='python3').execute().cells
    bars = [[output['data']['text/plain'] for output in cell.outputs if 'data' in output] for cell in cells]
    assert [[(bar.partition(':')[0], bar.partition('[')[0][-5:]) for bar in of_cell] for of_cell in bars] == [
        [('training', ' 2/2 '), ('b', ' 3/3 '), ('within b', ' 4/4 ')], [('c', ' 5/5 ')]]


def test_a_terminal_gets_tqdm(capsys):
    assert list(progress_bar(range(3), 'work')) == [0, 1, 2] and '3/3' in capsys.readouterr().out


# What people and papermill write


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, a variable that names it too, and a folder in it to stand in."""
    for name, value in (('HOME', tmp_path), ('DATA', tmp_path)):
        monkeypatch.setenv(name, str(value))
    (tmp_path / 'here' / ' blank ').mkdir(parents=True)
    (tmp_path / 'here' / '$x.csv').touch()
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path


@pytest.mark.parametrize('written, meant', [
    ('~/runs', '{0}/runs'), ('~', '{0}'), (' ~/runs/x\n', '{0}/runs/x'), ('$HOME/runs', '{0}/runs'),
    ('${DATA}/a b/c.csv', '{0}/a b/c.csv'), (Path('~/runs'), '{0}/runs'), (Path(' runs ') / 'x', 'runs/x'),
    (' runs', 'runs'), (' {0}/here ', '{0}/here'), ('{0}/none ', '{0}/none'),
    (' blank ', ' blank '), ('$x.csv', '$x.csv'), ('$NONE/x', '$NONE/x'),
    ('a/~/b', 'a/~/b'), ('runs/5 $', 'runs/5 $'), ('', '.'), ('.', '.'), ('/', '/')], ids=repr)
def test_a_path_is_what_people_mean_by_it(home, written, meant):
    written = type(written)(str(written).replace('{0}', str(home)))
    assert files.user_path(written) == Path(meant.replace('{0}', str(home)))


def test_a_file_is_written_where_its_path_means(home):
    files.write_text('~/runs/a.txt', 'text')
    files.write_text(' $DATA/b.txt ', 'text')
    assert (home / 'runs/a.txt').read_text() == (home / 'b.txt').read_text() == 'text' and not Path('~').exists()


@pytest.mark.parametrize('text, held', [
    ("{'epochs': 1}", {'epochs': 1}), ('{"head_norm": true, "n_classes": null}', {'head_norm': True, 'n_classes': None}),
    ("{'stages': ({'trains': 'head'}, {}), 'n_classes': None}", {'stages': ({'trains': 'head'}, {}), 'n_classes': None}),
    (' {"a": [1, 2.5]}\n', {'a': [1, 2.5]}), ("['a', 'b']", ['a', 'b']), ('(1, (2, 3))', (1, (2, 3)))])
def test_the_text_of_a_dict_list_or_tuple_is_read(text, held):
    assert files.literal(text, dict, list, tuple) == held == files.literal(held, dict, list, tuple)


@pytest.mark.parametrize('text', ['products-10k', '2022', 'a.csv', "{'epochs': 1", 'dict(a=1)', '__import__("os").getcwd()',
                                  '{[]: 1}', '', 'None', '(' * 9999, 7, None])
def test_any_other_value_stays_as_it_is(text):
    assert files.literal(text, dict, list, tuple) is text


@pytest.mark.parametrize('name, names, words', [
    ('epoch', ['epochs', 'seed'], ' Did you mean epochs?'), ('CUTOUT', ['flip', 'cutout'], ' Did you mean cutout?'),
    ('vit-h-14', ['ViT-H-14', 'RN50'], ' Did you mean ViT-H-14?'), ('zebra', ['flip'], ''), (7, ['flip'], ''),
    (None, [], '')])
def test_a_near_name_is_suggested(name, names, words):
    assert files.did_you_mean(name, names) == words


@pytest.mark.parametrize('error, words', [
    (OSError(28, 'No space left on device', 'x'), 'No space left on device'), (OSError('odd'), 'odd'),
    (OSError(), 'OSError'), (RuntimeError('first\nsecond'), 'first'), (RuntimeError(''), 'RuntimeError')])
def test_the_reason_of_an_error_is_one_line(error, words):
    assert files.reason_of(error) == words


def test_paths_of_every_room_mean_what_people_mean(home, tiny_world, train):
    (home / 'data').symlink_to(tiny_world)
    for source, root in ((' ~/data/train.csv ', None), ('$HOME/data/train.csv', '~/data'),
                         ('~/data/train.csv', ' $DATA/data')):
        assert len(datasets.read_dataset(source, root)) == len(train)
        parts = splits.load_data(source, config=Config(min_images=1), root=root)
    listed = splits.load_data("['~/data/train.csv']", selection="('~/data/train.csv', '$HOME/data/train.csv')",
                              config=Config(min_images=1))  # as papermill passes a list and a tuple
    assert len(listed['selection_query']) == len(train) and set(listed) == set(parts)
    assert len(datasets.list_images('~/data')) == len(train)
    table = pd.DataFrame({'stage': ['a'], 'mp5': [.5]})
    scores.save_scores(table, ' ~/scores.csv')
    checkpoints.save_state({'tower.a': torch.ones(2)}, '~/runs/h_x/model.safetensors')
    for path in ('~/runs/h_x', ' $DATA/runs/h_x/model.safetensors'):
        assert checkpoints.open_checkpoint(path).name == 'h_x'
    assert len(results.list_runs('~/runs')) == 1
    for towers in (['h'], "['h']", 'h'):
        assert len(checkpoints.find_ingredients('~/runs', towers, search=())['h']) == 1
    architecture = "{'h': {'model_name': 'ViT-S-32-alt', 'pretrained': 'random', 'image_size': 32}}"
    assert len(checkpoints.find_ingredients('x', ['h'], "{'h': ['~/runs/h_x']}", architecture)['h']) == 1
    embedding.save_vectors('~/v.npz', np.ones((1, 2)), np.array(['a']), 'key')
    assert embedding.cached_vectors(' ~/v.npz', np.array(['a']), 'key', 32) is not None
    with pytest.raises(ValueError, match='is not a submission'):
        submission.load_submission(files.user_path('~/scores.csv'))
    plots.plot_logs(['~/runs/h_x'])
    assert (home / 'scores.csv').exists() and [path.name for path in Path().iterdir() if '~' in path.name] == []


@pytest.mark.parametrize('in_a_notebook', [True, False])
def test_a_line_that_others_rewrite_is_one_output_and_their_other_lines_are_printed(in_a_notebook, capsys):
    pieces = ['begin\n', '\rwork: 1', '/2', '\rwork: 2/2', '\nbetween\n\rshort', '\r     \r', 'end\n']
    source = ('from guie.files import OutputOfOthers\nothers = OutputOfOthers()\n'
              f'for piece in {pieces}:\n    others.write(piece)')
    if not in_a_notebook:
        exec(source, {})
        assert capsys.readouterr().out == ''.join(pieces)
        return
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    outputs = NotebookClient(notebook, kernel_name='python3').execute().cells[0].outputs
    told = [output['text'] if output['output_type'] == 'stream' else [output['data']['text/plain']] for output in outputs]
    assert told == ['begin\n', ['work: 2/2'], 'between\n', ['end']]


def test_hours_count_from_the_notebooks_beginning_on_kaggle_alone(tmp_path):
    assert abs(session_start(tmp_path / 'no such folder') - time.time()) < 60
    assert session_start(tmp_path) == psutil.Process().create_time()


def test_writers_of_one_file_do_not_meet_and_what_a_killed_one_left_goes(tmp_path):
    code = ("import sys; from guie.files import write_text\n"
            "for number in range(40): write_text(sys.argv[1], sys.argv[2] * 100_000)")
    writers = [subprocess.Popen([sys.executable, '-c', code, tmp_path / 'a.txt', letter], stderr=subprocess.PIPE)
               for letter in 'xyz']
    assert [writer.communicate()[1] for writer in writers] == [b''] * 3
    assert set((tmp_path / 'a.txt').read_text()) in ({'x'}, {'y'}, {'z'}) and [*tmp_path.iterdir()] == [tmp_path / 'a.txt']
    gone, here = tmp_path / f'.part-{writers[0].pid}-a.txt', tmp_path / f'.part-{os.getppid()}-a.txt'
    other = tmp_path / f'.part-{writers[0].pid}-b.txt'
    for path in (gone, here, other):
        path.touch()
    write_text(tmp_path / 'a.txt', 'new')
    assert sorted(tmp_path.iterdir()) == sorted([here, other, tmp_path / 'a.txt'])
