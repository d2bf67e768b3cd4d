"""Memory: what a training run needs, in memory and on disk, before it starts, and what to change if that is too much.

Shapes alone decide it: the tower makes a forward pass on torch's meta device, whose tensors have no values."""
import copy
import math
import os
import shutil

import pandas as pd
import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from guie.distributed import processes_here
from guie.files import reason_of, user_path
from guie.model import freeze, resize
from guie.towers import block_modules, checkpoint_activations

RESERVE = 2**30  # bytes of a GPU that no tensor gets: CUDA itself, cuBLAS' workspace, gaps between blocks
# A tower's larger operations that torch.autocast computes on a GPU in half precision, and those in float32
IN_HALF = {*'linear conv1d conv2d matmul mm bmm addmm baddbmm einsum scaled_dot_product_attention'.split()}
IN_FLOAT = {'layer_norm', 'group_norm', 'softmax', 'multi_head_attention_forward'}  # the last for simplicity: of poolers


class FusedAttention(torch.autograd.Function):
    """What a fused F.scaled_dot_product_attention keeps: query, key, value and output, (…, heads, n, width) each."""

    @staticmethod
    def forward(ctx, query, key, value):
        rows = query.transpose(-3, -2)  # the kernels write the heads of a token side by side
        output = query.new_empty(*rows.shape[:-1], value.shape[-1]).transpose(-3, -2)
        ctx.save_for_backward(query, key, value, output)
        return output


class AsOnGPU(TorchFunctionMode):
    """Computes attention fused and, with `half`, products in that dtype, as torch.autocast does."""

    def __init__(self, half):
        super().__init__()
        self.half = half

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, kwargs or {}
        dtype = self.half if name in IN_HALF else torch.float32 if name in IN_FLOAT else None
        if self.half and dtype:
            args = [value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for value in args]
        fused = name == 'scaled_dot_product_attention' and kwargs.get('attn_mask') is None
        return FusedAttention.apply(*args[:3]) if fused else function(*args, **kwargs)


def on_meta(model):
    """A copy of the model on the meta device, made without copying values."""
    copies = {id(tensor): torch.empty_like(tensor, device='meta', requires_grad=tensor.requires_grad)
              for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, copies)  # it takes these for the copies


def forward_pass(tower, images, half):
    """What autograd keeps besides weights: (bytes, {module: [bytes of its input, kept before it ran, kept by it]})."""
    kept, modules = dict.fromkeys((weight.untyped_storage() for weight in tower.parameters()), 0), {}

    def keep(tensor):
        storage = tensor.untyped_storage()  # one object, however many tensors are views of it
        kept.setdefault(storage, storage.nbytes())
        return tensor.detach()

    def enter(module, inputs):
        modules[module] = [sum(value.nbytes for value in inputs if torch.is_tensor(value)), sum(kept.values())]

    def leave(module, inputs, output):
        modules[module].append(sum(kept.values()) - modules[module][1])

    with register_module_forward_pre_hook(enter), register_module_forward_hook(leave), \
            saved_tensors_hooks(keep, lambda tensor: tensor), AsOnGPU(half):
        tower(images)
    return sum(kept.values()), modules


def activation_bytes(model, config, half):
    """Bytes of activations at their peak; the model, on the meta device, is changed."""
    tower, centers, side = model.tower, model.head.centers, config.image_size
    images = torch.empty(config.batch_size, 3, side, side, device='meta')
    kept, parts = forward_pass(tower, images, half)
    most, copies = kept, 0
    if config.checkpoint_activations:
        checkpoint_activations(tower)
        kept, again = forward_pass(tower, images, half)
        # A part that is recomputed keeps no more than its input, until the backward pass; then it holds all of its own.
        most = max([kept, *(before + parts[part][2] for part, (given, before, its) in again.items()
                            if its <= given and part in parts)])
        # Autocast's copies of the weights stay until the pass ends; where nothing is recomputed autograd keeps them anyway.
        copies = sum(weight.numel() * half.itemsize for weight in tower.parameters() if half and weight.requires_grad)
    # The centres' gradient has two parts, of their products and of their lengths, after autocast's copies are freed.
    head = max(copies, 2 * centers.nbytes) + 24 * len(images) * len(centers)  # six values a cosine
    # An operation holds the gradient of its output and makes those of its input and its weight.
    gradients = 2 * max(given for given, *_ in parts.values()) + max(weight.nbytes for weight in tower.parameters())
    return max(kept + head, most + gradients)


def memory_plan(model, config, *, processes=1, half=None):
    """Bytes that one training process needs at most: dict parameters, gradients, optimiser, activations.

    half: dtype of the activations on the device, None for float32. Sharding divides all but activations by the number of
    processes; what is gathered at a time is added. The model is not changed."""
    model = on_meta(model).train()
    with torch.device('meta'):
        resize(model, config.image_size, config.overlap)
        freeze(model, config.trains)
        activations = activation_bytes(model, config, half)
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    sizes = {'parameters': sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
             'gradients': trained, 'optimiser': 2 * trained}  # AdamW keeps two values beside each weight
    if config.shard and processes > 1:
        blocks = [sum(weight.nbytes for weight in block.parameters()) for block in block_modules(model.tower)]
        rest = sum(weight.nbytes for weight in model.parameters()) - sum(blocks)
        sizes = {name: size // processes for name, size in sizes.items()}
        sizes['parameters'] += rest + 2 * max(blocks, default=0)  # one block computes, the next is fetched
    return sizes | {'activations': activations}


def available_memory():
    """(bytes, words for it) of the smallest GPU that this process sees. Without one, or if the GPU shares the machine's
    memory, of this machine. No memory of a GPU is taken."""
    free = psutil.virtual_memory().available
    try:
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError) as error:  # a driver that does not fit, or a PyTorch without CUDA
        return free, f'free on this machine, whose GPU PyTorch cannot use: {reason_of(error)}'
    if not cards:
        return free, 'free on this machine'
    card = min(cards, key=lambda card: card.total_memory)
    if card.is_integrated:
        return min(free, card.total_memory) - RESERVE, f'free on this machine, which its {card.name} shares'
    return card.total_memory - RESERVE, f'of one {card.name}, less {RESERVE / 2**30:.0f} GiB for CUDA itself'


def free_disk(folder):
    """Free bytes where a folder is or will be; infinite for a drive that does not say, such as some network drives."""
    usage = shutil.disk_usage(next(place for place in (folder, *folder.parents) if os.path.exists(place)))
    return usage.free if usage.total else math.inf


def half_here(config):
    """The dtype of activations on this machine's GPU, None for float32; float16 and bfloat16 are as large."""
    return torch.float16 if torch.cuda.device_count() and config.precision != 'no' else None


def fitted(config, model, processes):
    """The configuration with batch_size and checkpoint_activations chosen where they are None. CPU: 8 images, nothing
    recomputed. GPU: the largest batch that fits so; if that is below 8, the largest that fits with activations recomputed. A
    tenth of the memory is left for gaps between tensors."""
    sizes = [size for size in range(max(1, config.effective_batch // processes), 0, -1) if not config.effective_batch % size]
    if config.head_norm:  # which compares the images of a batch
        sizes = [size for size in sizes if size > 1] or sizes
    sizes = [config.batch_size] if config.batch_size else sizes
    recompute = [False, True] if config.checkpoint_activations is None else [config.checkpoint_activations]
    if not torch.cuda.device_count():
        return config.override(batch_size=next(size for size in sizes if size <= 8 or config.batch_size),
                               checkpoint_activations=recompute[0])
    room = .9 * available_memory()[0]
    for again in recompute:
        for size in sizes if again == recompute[-1] else [size for size in sizes if size >= min(8, sizes[0])]:
            choice = config.override(batch_size=size, checkpoint_activations=again)
            plan = memory_plan(model, choice, processes=processes, half=half_here(config))
            if sum(plan.values()) <= room:
                return choice
    return choice


def smaller_plans(config, processes):
    """Changes of a configuration that need less memory, the smallest change first; the result stays the same."""
    less = {} if config.checkpoint_activations else {'checkpoint_activations': True}
    sizes = [size for size in range(config.batch_size // 2, 0, -1)
             if not (config.effective_batch % size or config.head_norm)]  # head_norm compares the images of a batch
    changes = [{}, *({'batch_size': size} for size in sizes)]
    changes += [{'shard': True}, *({'shard': True, 'batch_size': size} for size in sizes[-1:])] if processes > 1 else []
    return [less | change for change in changes]


def training_plan(config, model, run_dir, *, memory=None, disk=None, processes=None):
    """What a run needs at most, in its heaviest stage, and what there is: DataFrame need, GB. Prints what to change if that
    does not fit. memory, disk: bytes there are; processes: GPUs. None: those of this machine."""
    processes, (capacity, words) = processes or processes_here(), (memory, 'given') if memory else available_memory()
    stages, place = [fitted(stage, model, processes) for stage in config.each_stage()], user_path(run_dir).absolute()

    def plan_of_stage(stage):
        return memory_plan(model, stage, processes=processes, half=half_here(stage))

    def fits(change):
        return all(sum(plan_of_stage(stage.override(**change)).values()) <= capacity for stage in stages)

    heaviest, needs = max(zip(stages, map(plan_of_stage, stages)), key=lambda pair: sum(pair[1].values()))
    total = sum(needs.values())
    if total > capacity:
        change = next(filter(fits, smaller_plans(heaviest, processes)), None)
        print(f'{total / 1e9:.1f} GB do not fit into {capacity / 1e9:.1f} GB ({words}): '
              + (f'set OVERRIDES = {change}.' if change else 'take a smaller tower or image size, or more GPUs.'))
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    disk = disk or free_disk(place)
    if 7 * weights > disk:  # these, and two states of thrice their size: the new one is whole before the old one goes
        print(f'{7 * weights / 1e9:.1f} GB do not fit on the disk of {run_dir}, which has {disk / 1e9:.1f}: choose another '
              'OUT_DIR' + ('; only the weights and one state fit, so a run that is killed while it saves loses its state.'
                           if 4 * weights <= disk else '.'))
    rows = {**needs, 'memory in all': total, f'memory {words}': capacity,
            'two checkpoints to resume from, and the weights': 7 * weights, 'disk free': disk}
    table = pd.DataFrame({'need': list(rows), 'GB': [size / 1e9 for size in rows.values()]})
    recomputed = ', recomputed' * heaviest.checkpoint_activations
    return table.replace({'activations': f'activations, batch of {heaviest.batch_size}{recomputed}'})
