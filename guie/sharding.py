"""Sharding: a model spread over processes (FSDP2) where a whole one does not fit on one GPU, and its states on disk.
torch's distributed checkpoint takes a third of a second to import, so only what needs it does."""
import torch

from guie.errors import FileError
from guie.towers import block_modules


def shard(model):
    """Spreads parameters, gradients and optimiser state over the processes, in place: a block is whole only while it
    computes. Does nothing in a process that was launched alone."""
    if not torch.distributed.is_initialized():
        return
    from torch.distributed.fsdp import fully_shard
    for module in block_modules(model.tower):
        fully_shard(module)
    fully_shard(model)


def is_sharded(model):
    """Whether each process holds a part of the model."""
    return any(hasattr(parameter, 'full_tensor') for parameter in model.parameters())


def full_state(model):
    """{name: whole tensor} of a model. All processes must call it, since it collects the parts of a sharded one."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_sharded(model, optimiser, folder):
    """Weights and optimiser as torch's distributed checkpoint: each process writes its part, any number reads them."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    weights, slots = get_state_dict(model, optimiser)
    call('save', {'model': weights, 'optimiser': slots}, folder)


def load_sharded(model, optimiser, folder):
    """Reads what save_sharded wrote, whatever the number of processes."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    weights, slots = get_state_dict(model, optimiser)
    state = {'model': weights, 'optimiser': slots}
    call('load', state, folder)
    set_state_dict(model, optimiser, model_state_dict=state['model'], optim_state_dict=state['optimiser'])


def call(name, state, folder):
    """A function of torch's distributed checkpoint for a state in a folder, its errors as OSError."""
    from torch.distributed import checkpoint
    try:
        getattr(checkpoint, name)(state, checkpoint_id=str(folder))
    except checkpoint.CheckpointException as error:  # not an Exception in torch
        raise FileError(str(error).strip().splitlines()[-1]) from error
