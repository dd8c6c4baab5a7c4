"""The fused vision backbone: DINOv2 and SigLIP side by side, one channel-concatenated feature a patch.

The features are the output of each tower's second-to-last block without the final norm, as the published model was
trained. So DINOv2's last block and norm compute nothing that is used; SigLIP's last block, norm and attention-pool head
serve the global token alone.
"""

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from robofactory.config import TowerConfig

DINO = "vit_large_patch14_reg4_dinov2.lvd142m"
SIGLIP = "vit_so400m_patch14_siglip_224"
POSITION_SCALE = 0.5  # of the position embedding when trained from scratch; patches start at about the same size


class FusedVision(nn.Module):
    """Both towers under their official names: `featurizer` is DINOv2, `fused_featurizer` is SigLIP.

    Args:
        global_token: put one token before each view's patches: DINOv2's CLS token of the same block as the patches,
            then SigLIP's attention-pooled embedding of its own final features. Needs no weights of its own.
    """

    def __init__(self, dino: VisionTransformer, siglip: VisionTransformer, global_token: bool):
        super().__init__()
        self.featurizer = dino
        self.fused_featurizer = siglip
        self.global_token = global_token
        self.width = dino.embed_dim + siglip.embed_dim
        self.tokens_per_view = siglip.patch_embed.num_patches + int(global_token)
        self.dino_block = len(dino.blocks) - 2  # the second-to-last
        self.siglip_block = len(siglip.blocks) - 2
        self.fused_attention: bool | None = None  # None: PyTorch's fused kernel on a GPU, plain matmuls on a CPU
        dino.blocks[-1].requires_grad_(False)
        dino.norm.requires_grad_(False)
        if not global_token:
            for module in (siglip.blocks[-1], siglip.norm, siglip.attn_pool):
                module.requires_grad_(False)  # type: ignore[union-attr]

    def drop_unused(self) -> None:
        """Delete the layers whose output is never used; official weights then no longer fit."""
        self.featurizer.prune_intermediate_layers([self.dino_block])
        if not self.global_token:
            self.fused_featurizer.prune_intermediate_layers([self.siglip_block])

    def forward(self, pixel_values: Float[Tensor, "b v 6 h w"]) -> Float[Tensor, "b n d"]:
        """One block of tokens a view, in the order of the views; all images go through each tower in one call.

        Source: channels and blocks as in OpenVLA's PrismaticVisionBackbone; the global token is ours.
        """
        num_samples, num_views = pixel_values.shape[:2]
        images = pixel_values.flatten(0, 1)  # [b*v, 6, h, w]
        use_fused_attention(self, images.is_cuda if self.fused_attention is None else self.fused_attention)
        _, [(dino_patches, dino_prefix)] = self.featurizer.forward_intermediates(
            images[:, :3], [self.dino_block], return_prefix_tokens=True, stop_early=True, output_fmt="NLC"
        )
        siglip_final, [siglip_patches] = self.fused_featurizer.forward_intermediates(
            images[:, 3:], [self.siglip_block], stop_early=not self.global_token, output_fmt="NLC"
        )
        features = torch.cat([dino_patches, siglip_patches], dim=-1)  # type: ignore[list-item]  # [b*v, p, d]
        if self.global_token:
            pooled = self.fused_featurizer.pool(siglip_final)  # type: ignore[arg-type]  # [b*v, d_siglip]
            whole_view = torch.cat([dino_prefix[:, 0], pooled], dim=-1)  # type: ignore  # [b*v, d]; CLS is the first prefix
            features = torch.cat([whole_view[:, None], features], dim=1)  # [b*v, 1+p, d]
        return features.reshape(num_samples, num_views * self.tokens_per_view, self.width)


def use_fused_attention(module: nn.Module, fused: bool) -> None:
    """Choose timm's attention code. In bf16 on a CPU the fused kernel's backward is 3-6 times slower than matmuls."""
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = fused  # type: ignore[assignment]


def build_tower(model_id: str, image_size: int, **overrides) -> VisionTransformer:
    """One of timm's vision transformers without a classifier and without its weights."""
    return timm.create_model(model_id, pretrained=False, num_classes=0, img_size=image_size, **overrides)  # type: ignore[return-value]


def build_towers_from_scratch(
    image_size: int, dino: TowerConfig, siglip: TowerConfig, global_token: bool
) -> FusedVision:
    """Towers of any size with timm's initialisation, without the layers that are never used.

    `depth` counts blocks as the published models do: the last one feeds the global token (SigLIP) or nothing (DINOv2,
    so it is not built). Two things differ from timm's initialisation, which is meant for long training: LayerScale,
    which starts at 1e-5 and keeps every block shut for thousands of steps, is left out; and position embeddings start
    as sines as large as the patches' contents instead of 0.02 (300 steps on LiftBarrier: 9.4 instead of 14.4 bins off).
    """
    vision = FusedVision(
        build_tower(DINO, image_size, init_values=None, **vars(dino)),
        build_tower(SIGLIP, image_size, **vars(siglip)),
        global_token,
    )
    vision.drop_unused()
    for tower in (vision.featurizer, vision.fused_featurizer):
        assert isinstance(tower.pos_embed, nn.Parameter)
        tower.pos_embed.data.copy_(POSITION_SCALE * sine_positions(tower.patch_embed.grid_size[0], tower.embed_dim))
    return vision


def sine_positions(grid: int, width: int) -> Float[Tensor, "1 p d"]:
    """Where each patch of a grid x grid image is: sines and cosines of x, then of y, at width / 4 frequencies.

    Source: the fixed 2-D position embedding of MAE (He et al. 2021), here only where learning starts.
    """
    frequencies = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (x, y)]  # [p, d / 4] each
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)[None]
