"""Sharding: a model spread over two processes is trained, saved and resumed as a whole one is."""
import json

import pandas as pd
import pytest
import torch
from runs import SAVING, apart, check_half, new_model, same, small_model, weights

from guie.checkpoints import open_checkpoint
from guie.sharding import full_state, is_sharded, load_sharded, save_sharded, shard
from guie.training import fit


def test_a_sharded_model_with_activations_recomputed_trains_the_weights_that_a_whole_one_does(launched):
    one, sharded = weights(launched / 'one'), weights(launched / 'sharded')
    assert set(one) == set(sharded) and not same(one, new_model().state_dict())
    # 12 steps of AdamW, which brings noise up to the learning rate where gradients vanish: about 1e-5 was measured
    assert apart(one, sharded) < 1e-4
    scores = [json.loads(open_checkpoint(launched / name).metadata['score']) for name in ('one', 'sharded')]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and scores[0] > 0
    logs = [pd.read_csv(launched / name / 'log.csv') for name in ('one', 'sharded')]
    assert logs[0]['loss'].tolist() == pytest.approx(logs[1]['loss'].tolist(), abs=1e-3) and len(logs[0]) == 12


def test_a_sharded_model_is_distributed_tensors_of_which_each_process_holds_half(launched):
    whole = sum(tensor.numel() for tensor in weights(launched / 'one').values())
    held = [json.loads((launched / f'held{rank}.json').read_text()) for rank in range(2)]
    assert [kinds for kinds, _ in held] == [['DTensor']] * 2
    assert sum(count for _, count in held) == whole and max(count for _, count in held) < .55 * whole


def test_a_sharded_run_that_was_stopped_resumes_bit_for_bit(launched):
    assert 'after 1 of 4 steps; everything is saved' in (launched / 'stopped').read_text()
    assert same(weights(launched / 'whole'), weights(launched / 'parts'))
    assert not (launched / 'whole/state/step-00000004/model.safetensors').exists()  # each process writes its part


def test_a_gradient_too_large_for_fp16_lowers_the_scale_of_all_parts(launched):
    seen = [pd.read_csv(launched / f'half-sharded/seen{rank}.csv') for rank in range(2)]
    check_half(seen[0], launched / 'half-sharded')
    assert seen[0].equals(seen[1])


def test_a_process_alone_shards_nothing_and_resumes_what_several_saved(launched, train, tmp_path, capsys):
    model = small_model()
    shard(model)
    assert not is_sharded(model) and same(full_state(model), model.state_dict())
    (launched / 'parts').rename(tmp_path / 'run')
    newest, *_ = sorted((tmp_path / 'run/state').iterdir(), reverse=True)
    (newest / '__0_0.distcp').write_bytes(b'')  # so that one step is left
    try:
        fit(SAVING.override(shard=True, trains='last 2'), new_model(), train, tmp_path / 'run')
    finally:
        (tmp_path / 'run').rename(launched / 'parts')
    printed = capsys.readouterr().out
    assert 'resumes from step-00000003' in printed and 'saved by 2 processes and 1 resume it' in printed


def test_weights_and_optimiser_are_saved_and_a_part_that_is_missing_is_an_os_error(tmp_path):
    def begun(rate):
        model = small_model()
        optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
        model(torch.zeros(2, 3, 32, 32), classify=True).sum().backward()
        optimiser.step()
        return model, optimiser

    (saved, first), (loaded, second) = begun(.1), begun(.2)
    save_sharded(saved, first, tmp_path / 'state')
    assert not same(saved.state_dict(), loaded.state_dict())
    load_sharded(loaded, second, tmp_path / 'state')
    assert same(saved.state_dict(), loaded.state_dict()) and second.param_groups[0]['lr'] == .1
    next((tmp_path / 'state').glob('*.distcp')).unlink()
    with pytest.raises(OSError, match='No such file') as error:
        load_sharded(loaded, second, tmp_path / 'state')
    assert '\n' not in str(error.value)
