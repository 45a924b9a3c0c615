"""The network of stage 2: a vision-language model that is shown a galaxy, and a head that reads numbers from it.

Shape legend: B samples, L tokens, K tokens of modalities, D width of the language model, P tokens of an image, S side of a crop.

Source: Galaxy-Walker (arXiv:2503.18578), section 3.2, and its released code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.models.galaxy_walker.image_tokens import embed_images
from armillary.models.galaxy_walker.modal_tokens import ModalTokens, NumericHead
from armillary.models.galaxy_walker.pixels import patches
from armillary.models.method import Batch

__all__ = ["GalaxyReader", "Reading"]


class Reading(NamedTuple):
    """What the network returns. A tuple, so that DeepSpeed finds the tensors in it.

    Attributes:
        hidden: [B, L, D] last hidden states.
        replay: [B, D] float32, sum of the modalities' tokens in the prompt; None without any.
    """

    hidden: Tensor
    replay: Tensor | None


class GalaxyReader(nn.Module):
    """The network.

    Args:
        vlm: A model of transformers, adapted.
        tokens: Makes tokens of embeddings; None where only images are shown.
        image_side: What crops are resized to, in pixels; 0 without images.
    """

    def __init__(self, vlm: Any, tokens: ModalTokens | None, image_side: int) -> None:
        super().__init__()
        self.vlm = vlm
        self.tokens = tokens
        self.dim = int(vlm.config.text_config.hidden_size)
        self.head = NumericHead(self.dim)
        self.image_side = image_side

    @property
    def grid(self) -> int:
        """Patches along a side of the image; 0 without images."""
        return self.image_side // int(self.vlm.config.vision_config.patch_size)

    @property
    def image_tokens(self) -> int:
        """Tokens P of an image; 0 without images."""
        merged = self.grid // int(self.vlm.config.vision_config.spatial_merge_size)
        return merged * merged

    def forward(self, batch: Batch) -> Reading:
        """Show a batch to the model.

        Args:
            batch: `input_ids`, `position_ids` and `slots`; `crop` [B, 3, S, S], `spectrum_vector` and `geometry_vectors`, as
                far as the network was built for them.
        """
        ids, vlm = batch["input_ids"], self.vlm
        embedded = vlm.get_input_embeddings()(ids)
        inputs: dict[str, Any] = {"position_ids": batch["position_ids"], "use_cache": False}
        replay = None
        if self.tokens is not None:
            tokens = self.tokens(batch.get("spectrum_vector"), batch.get("geometry_vectors"))
            shown = batch["slots"] >= 0
            replay = torch.where(shown[..., None], tokens, 0.0).sum(1)
            # One place more takes the tokens that a prompt does not show.
            places = torch.where(shown, batch["slots"], ids.shape[1])[..., None].expand(-1, -1, self.dim)
            embedded = F.pad(embedded, (0, 0, 0, 1)).scatter(1, places, tokens.to(embedded.dtype))[:, :-1]
        if self.image_side:
            vision = vlm.config.vision_config
            sizes = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
            clip_colours = vlm.config.model_type != "qwen3_vl"
            pixels = patches(batch["crop"], self.image_side, *sizes, clip_colours=clip_colours)
            embedded, more = embed_images(vlm, pixels.to(embedded.dtype), self.grid, ids, embedded)
            inputs |= more
        return Reading(vlm.model.language_model(inputs_embeds=embedded, **inputs)["last_hidden_state"], replay)

    def number(self, reading: Reading, starts: Tensor, replayed: bool) -> Tensor:
        """[B] float32 numbers, read in front of the answers.

        Args:
            reading: Of a batch.
            starts: [B] places of the answers' first tokens.
            replayed: Whether the modalities' tokens are added.
        """
        hidden, replay = reading
        state = hidden[torch.arange(len(hidden), device=hidden.device), starts - 1].float()
        found: Tensor = self.head(state if replay is None or not replayed else state + replay)
        return found
