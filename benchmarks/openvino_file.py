"""Convert a pipeline of Stable Diffusion for OpenVINO and OpenVINO GenAI, with OpenVINO's own converters.

    python benchmarks/openvino_file.py out/images/sd15-small/diffusers out/images/sd15-small/openvino

Runs in OpenVINO's environment, which borrows torch, diffusers and transformers. optimum-intel's command does the same,
but needs older releases of them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import diffusers
import openvino as ov
import torch
import transformers
from openvino_tokenizers import convert_tokenizer

LENGTH, SIDE = 77, 16


class Decoder(torch.nn.Module):
    """latent_sample -> sample."""

    def __init__(self, autoencoder: diffusers.AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """Latents [B, 4, S / 8, S / 8] to pixels [B, 3, S, S]."""
        return self.autoencoder.decode(latent_sample, return_dict=False)[0]


class UNet(torch.nn.Module):
    """sample, timestep, encoder_hidden_states -> out_sample."""

    def __init__(self, unet: diffusers.UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Latents [B, 4, S / 8, S / 8], timestep [1] and text [B, 77, D] to a prediction like the latents.

        The timestep is whole, as OpenVINO GenAI gives it.
        """
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class TextEncoder(torch.nn.Module):
    """input_ids -> last_hidden_state, pooler_output."""

    def __init__(self, encoder: transformers.CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, 77] to states [B, 77, D] and a pooled one [B, D]."""
        found = self.encoder(input_ids)
        return found.last_hidden_state, found.pooler_output


def convert(folder: Path, output: Path) -> None:
    """Write the parts below `output`, each with its configuration and weights in fp32."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    decoder = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    latents = torch.zeros(2, 4, SIDE, SIDE)
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    states = torch.zeros(2, LENGTH, unet.config.cross_attention_dim)
    examples = {
        "unet": (UNet(unet), {"sample": latents, "timestep": torch.tensor([1]), "encoder_hidden_states": states}),
        "vae_decoder": (Decoder(decoder), {"latent_sample": latents}),
        "text_encoder": (TextEncoder(encoder), {"input_ids": torch.zeros(2, LENGTH, dtype=torch.int64)}),
    }
    configs = {"unet": "unet", "vae_decoder": "vae", "text_encoder": "text_encoder"}
    for name, (module, example) in examples.items():
        with torch.no_grad():
            model = ov.convert_model(module, example_input=example)
        ov.save_model(model, output / name / "openvino_model.xml", compress_to_fp16=False)
        shutil.copyfile(folder / configs[name] / "config.json", output / name / "config.json")
    (output / "tokenizer").mkdir()
    tokens = convert_tokenizer(tokenizer, max_length=LENGTH, use_max_padding=True)
    ov.save_model(tokens, output / "tokenizer" / "openvino_tokenizer.xml")
    shutil.copytree(folder / "scheduler", output / "scheduler")
    shutil.copyfile(folder / "model_index.json", output / "model_index.json")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
