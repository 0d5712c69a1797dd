"""ImageReward: which of a prompt's pictures people would prefer (Xu et al. 2023, "ImageReward: Learning and Evaluating Human
Preferences for Text-to-Image Generation").

BLIP-L (Li et al. 2022) looks at the picture and reads the prompt; five linear layers turn what it makes of both into a number.
The package image-reward does not import beside transformers 5, so this builds the same network of transformers' own BLIP
modules and gives it the published weights, which bear the names of Salesforce's original BLIP.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rewards import Card
from rewards._tensors import read_tensors
from rewards._weights import checked, fetched, preprocess

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores that it was trained on
_HEAD = 64  # numbers in an attention head, in ViT-L as in BERT
_TOKENS = 35  # of a prompt; what is longer is cut off
_PICTURE = {
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")  # in the file, but not in the score
_NAMES = (  # of BLIP, and of transformers
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
    (r"^(vision\..*)\.attn\.", r"\1.self_attn."),
    (r"^(vision\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "mlp."),
)


class ImageReward:
    """The human preference for a picture given its prompt: about normal, with mean 0 and deviation 1. Differentiable.

    Pictures are made 224 pixels on the shorter side and cropped in the centre; of a prompt, 35 tokens are read.

    Args:
        weights: the published file ImageReward.pt, or one of its tensors as .safetensors: a path, or
            hf-hub:OWNER/NAME/FILE. A .pt is read as bare tensors, and copied once as .safetensors.
        tokenizer: BERT's, by its name on the hub, or a folder that holds it.

    Weights are loaded when the first picture is scored, or by `load()`. The sizes of the network are those of the weights.

    Raises:
        ValueError: there is no such file, or, when it is read, it holds another network.
    """

    name: ClassVar[str] = "image_reward"
    differentiable: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        range="about -2 to 2: mean 0 and deviation 1 over the pictures it was trained on",
        gamed_by="smooth, saturated pictures of one style; the prompt's things repeated",
        watch="pickscore, aesthetic, diversity",
        weights="THUDM/ImageReward, from the hub; BERT's tokenizer google-bert/bert-base-uncased",
        size="1.8 GB, reckoned from its parameters, not looked up",
        licence="Apache-2.0",
    )

    def __init__(
        self,
        weights: str = "hf-hub:THUDM/ImageReward/ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
    ):
        self.weights, self.tokenizer = checked(weights, "ImageReward weights"), tokenizer
        self.device = torch.device("cpu")
        self._model: Any = None

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        self.load()
        size = self._model.vision.config.image_size
        pixels = preprocess(images.to(self.device, torch.float32), _PICTURE | {"size": size})
        tokens = self._tokenize(
            list(prompts), padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        ).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            raw = self._model(pixels, tokens["input_ids"], tokens["attention_mask"])
        return (raw - _MEAN) / _STD

    def load(self) -> None:
        if self._model is None:
            from transformers import BertTokenizer  # here: it takes seconds, and a typo in a config should not

            self._tokenize = BertTokenizer.from_pretrained(self.tokenizer)
            self._tokenize.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's
            with torch.inference_mode(False):  # weights made in inference mode could never carry a gradient
                self._model = _network(fetched(self.weights)).eval().requires_grad_(False).to(self.device)

    def to(self, device: torch.device | str) -> "ImageReward":
        self.device = torch.device(device)
        if self._model is not None:
            self._model.to(self.device)
        return self


class _Network(nn.Module):
    """BLIP's picture encoder, its text encoder with cross-attention to the picture, and the score of the first token."""

    def __init__(self, vision: dict[str, int], text: dict[str, int]):
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision, hidden_act="gelu", layer_norm_eps=1e-6))
        # A "decoder" is what has cross-attention; it is called as an encoder, which lets each token see all.
        config = BlipTextConfig(**text, hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=True)
        self.text = BlipTextModel(config, add_pooling_layer=False)
        self.mlp = nn.Sequential(  # no activation between the layers: as published
            nn.Linear(text["hidden_size"], 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, S, S), (B, T), (B, T) -> (B,)."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=patches, is_decoder=False)
        return self.mlp(read.last_hidden_state[:, 0])[:, 0]


def _network(path: Path) -> _Network:
    try:
        weights = {_renamed(name): tensor for name, tensor in read_tensors(path).items() if not _UNUSED.match(name)}
        network = _Network(*_sizes(weights))
        network.load_state_dict(weights)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"ImageReward weights {path} are not the published network: {error}") from error
    return network


def _renamed(name: str) -> str:
    for blip, transformers in _NAMES:
        name = re.sub(blip, transformers, name)
    return name


def _sizes(weights: dict[str, Tensor]) -> tuple[dict[str, int], dict[str, int]]:
    """What the two encoders' configurations must say for the weights to fit."""
    width, _, patch, _ = weights["vision.embeddings.patch_embedding.weight"].shape
    patches = weights["vision.embeddings.position_embedding"].shape[1] - 1
    vision = {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * round(patches**0.5),
        "intermediate_size": len(weights["vision.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": sum(re.fullmatch(r"vision\..*\.mlp\.fc1\.weight", name) is not None for name in weights),
        "num_attention_heads": width // _HEAD,
    }
    words, text_width = weights["text.embeddings.word_embeddings.weight"].shape
    text = {
        "vocab_size": words,
        "hidden_size": text_width,
        "encoder_hidden_size": width,
        "intermediate_size": len(weights["text.encoder.layer.0.intermediate.dense.weight"]),
        "num_hidden_layers": sum(re.fullmatch(r"text\..*\.intermediate\.dense\.weight", name) is not None for name in weights),
        "num_attention_heads": text_width // _HEAD,
        "max_position_embeddings": len(weights["text.embeddings.position_embeddings.weight"]),
    }
    return vision, text
