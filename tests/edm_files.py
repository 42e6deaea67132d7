"""Files of the form in which EDM publishes its networks, made without EDM's code.

NVIDIA's classes reduce to a call of `torch_utils.persistence._reconstruct_persistent_obj` with the
source of a module, a class name and the object's __dict__. pickle writes functions and classes by
name, so modules with these names have to exist while it writes, and must not when the file is read.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
import types
from collections import OrderedDict

import torch
from golden_tools import seeded_weight
from torch import nn

from guided_diffusion_ip.diffusion.denoiser import EDMPrecond
from guided_diffusion_ip.networks.edm_unets import SongUNet

# What a published DDPM++ says of itself, but small.
NETWORK_KWARGS = dict(
    model_type="SongUNet",
    embedding_type="positional",
    encoder_type="standard",
    decoder_type="standard",
    channel_mult_noise=1,
    resample_filter=[1, 1],
    model_channels=32,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[8],
    dropout=0.13,
    augment_dim=9,
)
KWARGS = dict(img_resolution=16, img_channels=3, label_dim=0, use_fp16=False, **NETWORK_KWARGS)


@contextlib.contextmanager
def nvidia_modules():
    """torch_utils.persistence and dnnlib.util, importable for as long as pickle writes."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("a file was read by running it")

    class EasyDict(dict):
        pass

    for module, thing in ((persistence, _reconstruct_persistent_obj), (util, EasyDict)):
        thing.__module__, thing.__qualname__ = module.__name__, thing.__name__
        setattr(module, thing.__name__, thing)
    names = {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
    }
    assert not names.keys() & sys.modules.keys()
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


class Persistent:
    """Pickles as an object of one of NVIDIA's classes does; call only within nvidia_modules."""

    def __init__(self, class_name, state, source="raise AssertionError('module_src was run')"):
        self.record = dict(
            type="class", version=6, module_src=source, class_name=class_name, state=state
        )

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.record,)


def easy_dict(**values):
    return sys.modules["dnnlib.util"].EasyDict(values)


class ZipStorages(pickle._Pickler):
    """Writes the bytes of storages as torch.save does by default, where torch's own reduction has
    the legacy form.
    """

    def reducer_override(self, value):
        if not isinstance(value, torch.storage.TypedStorage):
            return NotImplemented
        file = io.BytesIO()
        torch.save(value, file)
        return torch.storage._load_from_bytes, (file.getvalue(),)


def small_denoiser(dtype=torch.float32, **kwargs):
    """An EDMPrecond around a small DDPM++, with weights that are all different."""
    network = {
        key: value for key, value in {**NETWORK_KWARGS, **kwargs}.items() if key != "model_type"
    }
    denoiser = EDMPrecond(SongUNet(16, 3, 3, **network))
    denoiser.load_state_dict(
        {name: seeded_weight(name, tuple(v.shape)) for name, v in denoiser.state_dict().items()}
    )
    return denoiser.to(dtype)


def as_published(module, **init_kwargs):
    """The module as nested persistent objects; torch's own containers stay what they are."""
    parts = OrderedDict(
        (name, None if part is None else as_published(part))
        for name, part in module._modules.items()
    )
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules = parts
        return container
    state = dict(
        training=False,
        _parameters=OrderedDict(module._parameters),
        _buffers=OrderedDict(module._buffers),
        _non_persistent_buffers_set=set(module._non_persistent_buffers_set),
        _backward_hooks=OrderedDict(),
        _is_full_backward_hook=None,
        _forward_hooks=OrderedDict(),
        _state_dict_hooks=OrderedDict(),
        _modules=parts,
        _init_args=(),
        _init_kwargs=init_kwargs,
        resolution=module.__dict__.get("img_resolution", 0),
    )
    return Persistent(type(module).__name__, state)


def edm_file(denoiser=None, protocol=4, zip_storages=False, kwargs=KWARGS, **others):
    """The bytes of a published .pkl with `denoiser` under ema; `others` replace or add entries."""
    with nvidia_modules():
        content = dict(
            ema=as_published(denoiser or small_denoiser(), **kwargs),
            loss_fn=Persistent(
                "EDMLoss",
                dict(P_mean=-1.2, P_std=1.2, sigma_data=0.5, _init_args=(), _init_kwargs={}),
            ),
            augment_pipe=Persistent(
                "AugmentPipe", dict(p=0.12, brightness_std=0.2, _init_args=(), _init_kwargs={})
            ),
            dataset_kwargs=easy_dict(path="cifar10-32x32.zip", use_labels=False, max_size=50000),
            **others,
        )
        file = io.BytesIO()
        (ZipStorages if zip_storages else pickle.Pickler)(file, protocol).dump(content)
    return file.getvalue()
