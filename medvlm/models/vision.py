"""The vision tower and the images it reads: image bytes → pixel tensor → patch features."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvlm.data.images import decode_image
from medvlm.errors import CheckpointError
from medvlm.models.sources import packaged_file
from medvlm.recipe_schema import Recipe, VisionTower

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage
    from torch import Tensor
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    from medvlm.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel

__all__ = ["ImageProcessor", "draw_tower", "load_tower", "tower_config"]

_NORMALISATION = {
    # EfficientNet-Lite's own (MEAN_RGB 127, STDDEV_RGB 128 in tensorflow/tpu); CLIP's stand in its processor.
    "efficientnet_lite0": {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3},
}


class ImageProcessor:
    """Image bytes to the pixels that a tower was made for: square, normalised, float32.

    It is CLIP's processor on Pillow, saved as ``preprocessor_config.json`` that transformers reads, with
    one thing added: ``pad`` keeps the whole of an image that is not square.
    """

    def __init__(self, clip: CLIPImageProcessorPil, fit: str) -> None:
        self.clip = clip
        self.fit = fit

    @classmethod
    def of(cls, tower: VisionTower) -> ImageProcessor:
        """The processor that a recipe's tower needs."""
        from transformers import CLIPImageProcessorPil

        size = tower.image_px
        make: Any = CLIPImageProcessorPil  # its signature is made of a typed dictionary of everything
        return cls(
            make(
                size={"shortest_edge": size},
                crop_size={"height": size, "width": size},
                **_NORMALISATION.get(tower.architecture, {}),
            ),
            tower.image_fit,
        )

    @classmethod
    def load(cls, folder: Path, tower: VisionTower) -> ImageProcessor:
        """The processor saved with a checkpoint.

        Raises:
            CheckpointError: The checkpoint has none.
        """
        from transformers import CLIPImageProcessorPil

        try:
            return cls(CLIPImageProcessorPil.from_pretrained(folder), tower.image_fit)
        except OSError as error:
            raise CheckpointError(
                "the checkpoint has no image processor", where=str(folder), hint="train the stage again"
            ) from error

    def save(self, folder: Path) -> None:
        """Write ``preprocessor_config.json``."""
        self.clip.save_pretrained(folder)

    def __call__(self, data: bytes) -> Tensor:
        """Pixels (3, H, W) of an encoded image.

        Raises:
            InputError: The bytes do not decode.
        """
        picture = decode_image(data).convert("RGB")
        if self.fit == "pad":
            picture = self._padded(picture)
        return self.clip(images=[picture], return_tensors="pt")["pixel_values"][0]

    def _padded(self, picture: PillowImage) -> PillowImage:
        from PIL import Image

        side = max(picture.size)
        # Rounded down, as LLaVA's expand2square and transformers do: weights were trained with that colour.
        ground = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in self.clip.image_mean))
        ground.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return ground


def tower_config(tower: VisionTower) -> CLIPVisionConfig | EfficientNetLiteConfig:
    """The transformers configuration of a recipe's tower."""
    from transformers import CLIPVisionConfig

    if tower.architecture == "efficientnet_lite0":
        from medvlm.models.efficientnet import STRIDE, EfficientNetLiteConfig

        make_config: Any = EfficientNetLiteConfig
        return make_config(image_size=tower.image_px, fold=tower.patch_px // STRIDE)
    return CLIPVisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.mlp_size,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.image_px,
        patch_size=tower.patch_px,
    )


def load_tower(recipe: Recipe, attention: str) -> CLIPVisionModel | EfficientNetLiteModel:
    """The published tower that a recipe names.

    Args:
        recipe: ``model.vision_tower.weights`` is a hub id or a folder (safetensors only), or a package.
        attention: transformers' name of the attention implementation.

    Raises:
        CheckpointError: It cannot be loaded, lacks weights, or has other sizes than the recipe says.
    """
    from transformers import CLIPVisionModel

    from medvlm.models.loading import check_keys, check_sizes, refuse_loading

    spec = recipe.model.vision_tower
    if spec.architecture == "efficientnet_lite0":
        from medvlm.models.efficientnet import load_published

        config: Any = tower_config(spec)
        return load_published(packaged_file(spec.weights, ".pth"), config)
    with refuse_loading(spec.weights):
        loaded: Any = CLIPVisionModel.from_pretrained(
            spec.weights,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
            attn_implementation=attention,
        )
    tower, info = loaded
    # A full CLIP checkpoint also holds the text half and the two projections into the shared space.
    check_keys(info, spec.weights, ignored=("text_model.", "text_projection", "visual_projection", "logit_scale"))
    expected = tower_config(spec)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    check_sizes(tower.config, expected, names, spec.weights)
    return tower


def draw_tower(tower: CLIPVisionModel | EfficientNetLiteModel, seed: int) -> None:
    """Draw a tower's weights so that a frozen random tower still carries the image.

    CLIP's own random start has positions a hundred times weaker than content, and mixes patches blindly.
    Here the patch embedding is orthogonal (no part of what it can hold is lost), the positions are
    sinusoids of row and column (where something is can be read off linearly), and the layers' branches
    are drawn as CLIP does, small beside what they are added to.

    Args:
        tower: Changed in place.
        seed: Same seed, same weights.
    """
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    if tower.config.model_type == "efficientnet_lite0":
        convolutional: Any = tower
        convolutional.draw(generator)
        return
    embeddings: Any = tower.embeddings
    with torch.no_grad():
        kernel_DK = embeddings.patch_embedding.weight.view(embeddings.patch_embedding.weight.shape[0], -1)
        nn.init.orthogonal_(kernel_DK, generator=generator)
        side = embeddings.image_size // embeddings.patch_size
        positions_PD = _sinusoids(side, kernel_DK.shape[0])
        embeddings.position_embedding.weight[1:].copy_(positions_PD)


def _sinusoids(side: int, width: int) -> Tensor:
    """Sinusoids of row and column, (side * side, width), each entry between -1 and 1."""
    import torch

    count = math.ceil(width / 4)
    frequencies_F = (2 * math.pi / side) / 10 ** (torch.arange(count) / count)
    row_PP, column_PP = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves: list[Tensor] = []
    for place_PP in (column_PP, row_PP):
        angle_PF = place_PP.reshape(-1, 1) * frequencies_F
        waves += [angle_PF.sin(), angle_PF.cos()]
    return torch.cat(waves, dim=1)[:, :width]
