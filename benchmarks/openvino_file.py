"""Convert the UNet and the decoder of a pipeline to OpenVINO's form, with OpenVINO's own converter.

    python benchmarks/openvino_file.py out/images/sd15-small/diffusers out/images/sd15-small/openvino

Runs in OpenVINO's environment, which borrows torch and diffusers. optimum-intel's command does the same for
OpenVINO GenAI, but needs older releases of both.
"""

from __future__ import annotations

import sys
from pathlib import Path

import diffusers
import openvino as ov
import torch

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
        """Latents [B, 4, S / 8, S / 8], timestep [1] and text [B, 77, D] to a prediction like the latents."""
        return self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def convert(folder: Path, output: Path) -> None:
    """Write unet/ and vae_decoder/ below `output`, with weights in fp32."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    decoder = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    latents = torch.zeros(2, 4, SIDE, SIDE)
    states = torch.zeros(2, LENGTH, unet.config.cross_attention_dim)
    examples = {
        "unet": (UNet(unet), {"sample": latents, "timestep": torch.tensor([1.0]), "encoder_hidden_states": states}),
        "vae_decoder": (Decoder(decoder), {"latent_sample": latents}),
    }
    for name, (module, example) in examples.items():
        with torch.no_grad():
            model = ov.convert_model(module, example_input=example)
        ov.save_model(model, output / name / "openvino_model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
