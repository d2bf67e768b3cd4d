"""Everything that benchmarks/gpu.py does, with the miniature: on the CPU, and on a GPU where there is one."""
import os
import shutil
import subprocess
import sys

import pytest
import torch

GPU = shutil.which('nvidia-smi') and subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize('device', ['CPU', pytest.param('GPU', marks=pytest.mark.skipif(
    not GPU, reason='needs a GPU: training in half precision, and every other path of a GPU, are untested here'))])
def test_training_embedding_export_search_and_resuming_run_on(device, monkeypatch):
    if device == 'GPU':
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES')  # tests/conftest.py hides it
    command = [sys.executable, 'benchmarks/gpu.py', '--quick']
    run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [line.split(' | ') for line in run.stdout.splitlines() if line.startswith(('| miniature', '| 5 neighbours'))]
    found = {work.removeprefix('| '): (measured, against) for work, measured, against in rows}
    assert ('CPU' in run.stdout.split('PyTorch')[0]) == (device == 'CPU')
    scores = [measured for work, (measured, _) in found.items() if 'vectors in' in work]
    assert len(scores) == 3 and len(set(scores)) == 1
    apart = float(found['miniature, submission in float32, image by image'][1].split()[5])
    assert apart < 1e-5
    assert 'the same neighbours' in found['5 neighbours of 20 in 2,000'][1]
    several = [against for work, (_, against) in found.items() if 'images in' in work]
    assert len(several) == (device == 'CPU' or torch.cuda.device_count() > 1)
    assert all(float(against.split()[-2]) > .9 for against in several)  # dropout differs
    weights, told = found['miniature, killed and resumed']
    assert 'resumes from step-' in told and float(weights.split()[-1]) <= (0 if device == 'CPU' else 1e-3)
