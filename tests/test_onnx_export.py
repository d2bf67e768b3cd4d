"""ONNX: onnxruntime gives the model's vectors from images of any size, and a file that would not is not kept."""
import numpy as np
import pytest
import torch
from runs import CONFIG, contents, is_one_sentence, new_model, weights
from torch import nn

from guie import onnx_export as room
from guie.checkpoints import load_run, save_projection, save_run
from guie.model import Embedder
from guie.onnx_export import export_onnx
from guie.submission import Submission
from guie.towers import load_image_tower

for package in room.PACKAGES:
    pytest.importorskip(package, reason=f'{package} is not installed: ONNX is untested')


@pytest.fixture(scope='module')
def submission():
    """Two members of different sizes, and a projection to 16 numbers."""
    torch.manual_seed(0)
    tower = load_image_tower('timm:test_vit', 'random', 48)
    return Submission([new_model().eval(), Embedder(tower).eval()], nn.Linear(32 + 64, 16)).eval()


@pytest.fixture(scope='module')
def exported(submission, tmp_path_factory):
    """Its file, the weights in one of their own, as those of the large towers must be."""
    file = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, 'ONE_FILE', 1000)
        export_onnx(submission, file)
    return file


def run_onnx(file, image):
    """The vector that onnxruntime gives."""
    import onnxruntime
    return onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider']).run(['vector'], {'image': image})[0]


@pytest.mark.parametrize('size', [(1, 1), (7, 900), (32, 32), (48, 48), (640, 480)])
def test_a_submission_gives_the_same_vector_for_any_size(submission, exported, size):
    image = np.random.default_rng(1).integers(0, 256, (1, 3, *size), np.uint8)
    with torch.no_grad():
        expected = submission(torch.from_numpy(image))
    found = run_onnx(exported, image)
    assert found.shape == (1, 16) and found.dtype == np.float32
    assert np.abs(found - expected.numpy()).max() < 1e-5


def test_large_weights_have_a_file_of_their_own(exported):
    files = {path.name: path.stat().st_size for path in exported.parent.iterdir()}
    assert files.keys() == {'model.onnx', 'model.onnx.data'} and files['model.onnx.data'] > 4 * files['model.onnx']


def test_a_run_is_one_file_that_gives_its_64_numbers_or_fewer(tmp_path, capsys):
    torch.manual_seed(1)
    save_run(tmp_path / 'run', new_model(), CONFIG)
    save_projection(tmp_path / 'run', nn.Linear(32, 5))
    export_onnx(tmp_path / 'run', tmp_path / 'out/run.onnx')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['run.onnx']
    assert 'MB, 5 dimensions, within ' in capsys.readouterr().out
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), np.uint8)
    with torch.no_grad():
        expected = load_run(tmp_path / 'run')(torch.from_numpy(image))
    assert expected.shape == (1, 5) and 'projection.weight' in weights(tmp_path / 'run')
    assert np.abs(run_onnx(tmp_path / 'out/run.onnx', image) - expected.numpy()).max() < 1e-5


class Small(nn.Module):
    """An image to its mean colour; `mode` spoils the export."""

    def __init__(self, mode=''):
        super().__init__()
        self.mode = mode

    def forward(self, image):
        vector = image.float().mean((2, 3)) + 1
        if self.mode == 'frozen' and not torch.onnx.is_in_onnx_export():
            vector = vector * torch.tensor([1., 2., 3.])
        if self.mode == 'sorted' and float(vector.detach().sum()) > 3:
            vector = -vector
        return nn.functional.normalize(vector)


@pytest.mark.parametrize('mode, words', [('frozen', 'differs from the model by 0'), ('sorted', 'cannot export this model')])
def test_a_model_that_an_export_would_change_is_refused_and_the_old_file_stays(tmp_path, mode, words):
    (tmp_path / 'model.onnx').write_text('old')
    with pytest.raises(ValueError, match=words) as error:
        export_onnx(Small(mode), tmp_path / 'model.onnx')
    assert is_one_sentence(error) and contents(tmp_path) == {'model.onnx': b'old'}


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(room, 'find_spec', lambda name: None if name == 'onnxscript' else name)
    with pytest.raises(RuntimeError, match='ONNX needs onnxscript: run `pip install onnxscript`') as error:
        export_onnx(Small(), tmp_path / 'model.onnx')
    assert is_one_sentence(error) and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='could not be written') as error:
        export_onnx(Small(), tmp_path / 'file/model.onnx')
    assert is_one_sentence(error)
