"""A tower of every family in timm, without values, and the order in which a tower uses its parameters."""
import functools

import pytest
import timm
import torch
from torch.overrides import TorchFunctionMode

FAMILIES = [min(timm.list_models(module=module), key=lambda name: (not name.startswith('test'), len(name), name))
            for module in timm.list_modules()]  # one tower of each
VARIANTS = ['regnety_032', 'convnext_tiny_hnf', 'vit_small_patch14_reg4_dinov2', 'vit_base_patch16_clip_224',
            'vit_srelpos_small_patch16_224', 'eva02_tiny_patch14_224', 'efficientvit_l1', 'efficientvim_m1_dist',
            'deit_tiny_distilled_patch16_224', 'gemma4_vit_167m_enc', 'qwen3_vit_88m_enc', 'deepseek_vit_412m_enc',
            'mobilenetv5_300m_enc', 'levit_256d', 'vit_base_patch16_rope_mixed_224', 'xcit_tiny_12_p16_224']
REFUSED = {'mobilenetv5_300m_enc'} | (set() if timm.__version__ >= '1.0.31' else {  # before, not all layers were named
    'levit_128', 'levit_256d', 'repvit_m1', 'hgnet_base'})


@functools.cache
def on_meta(name):
    """A timm tower without values, or a skip that says why there is none."""
    if not timm.is_model(name):
        pytest.skip(f'timm {timm.__version__} has no {name} yet')
    try:
        with torch.device('meta'):
            return timm.create_model(name, num_classes=0)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f'timm {timm.__version__} does not build {name} on the meta device: {str(error).splitlines()[0]}')


class FirstUses(TorchFunctionMode):
    """The names of a module's parameters in the order in which a forward pass comes to need them."""

    def __init__(self, module):
        super().__init__()
        self.names, self.order = {id(parameter): name for name, parameter in module.named_parameters()}, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        for value in [*given, *(one for several in given if isinstance(several, (list, tuple)) for one in several)]:
            if id(value) in self.names and function.__name__ != '__get__':  # its shape alone
                self.order.setdefault(self.names[id(value)])
        return function(*args, **kwargs or {})
