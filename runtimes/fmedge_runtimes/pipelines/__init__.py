"""Which file runs a pipeline, by the class that model_index.json names. A new family is a file and rows here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fmedge_runtimes.errors import BundleError
from fmedge_runtimes.parts import Parts
from fmedge_runtimes.pipelines.deepfloyd import open_deepfloyd, open_deepfloyd_larger
from fmedge_runtimes.pipelines.flux import open_flux
from fmedge_runtimes.pipelines.kandinsky import open_kandinsky
from fmedge_runtimes.pipelines.latent_upscaler import open_latent_upscaler
from fmedge_runtimes.pipelines.pipeline import Pipeline
from fmedge_runtimes.pipelines.pixart import open_pixart_alpha, open_pixart_sigma
from fmedge_runtimes.pipelines.pixel_diffusion import open_pixel_diffusion
from fmedge_runtimes.pipelines.sana import open_sana
from fmedge_runtimes.pipelines.stable_diffusion import open_stable_diffusion
from fmedge_runtimes.pipelines.stable_diffusion_3 import open_stable_diffusion_3
from fmedge_runtimes.pipelines.stable_diffusion_xl import open_stable_diffusion_xl
from fmedge_runtimes.pipelines.unclip import DECODER_SCHEDULER, open_unclip

Open = Callable[[Parts], Pipeline]


@dataclass(frozen=True, slots=True)
class Family:
    """One class of diffusers."""

    open: Open
    scheduler: str = "scheduler"
    """The folder of the scheduler that a request can replace."""
    respaced: bool = False
    """Whether an image's trajectory has all steps in the part that the strength leaves, as LCM's own pipeline has."""


_SD = Family(open_stable_diffusion)
_LCM = Family(open_stable_diffusion, respaced=True)
_XL = Family(open_stable_diffusion_xl)
_SD3 = Family(open_stable_diffusion_3)
_FLUX = Family(open_flux)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "StableDiffusionPipeline": _SD,
        "StableDiffusionImg2ImgPipeline": _SD,
        "StableDiffusionInpaintPipeline": _SD,
        "StableDiffusionUpscalePipeline": Family(open_latent_upscaler),
        "StableDiffusionControlNetPipeline": _SD,
        "StableDiffusionControlNetImg2ImgPipeline": _SD,
        "StableDiffusionControlNetInpaintPipeline": _SD,
        "LatentConsistencyModelPipeline": _LCM,
        "LatentConsistencyModelImg2ImgPipeline": _LCM,
        "StableDiffusionXLPipeline": _XL,
        "StableDiffusionXLImg2ImgPipeline": _XL,
        "StableDiffusionXLInpaintPipeline": _XL,
        "StableDiffusionXLControlNetPipeline": _XL,
        "StableDiffusionXLControlNetImg2ImgPipeline": _XL,
        "StableDiffusionXLControlNetInpaintPipeline": _XL,
        "StableDiffusion3Pipeline": _SD3,
        "StableDiffusion3Img2ImgPipeline": _SD3,
        "StableDiffusion3InpaintPipeline": _SD3,
        "FluxPipeline": _FLUX,
        "FluxImg2ImgPipeline": _FLUX,
        "FluxInpaintPipeline": _FLUX,
        "PixArtAlphaPipeline": Family(open_pixart_alpha),
        "PixArtSigmaPipeline": Family(open_pixart_sigma),
        "SanaPipeline": Family(open_sana),
        "KandinskyV22CombinedPipeline": Family(open_kandinsky),
        "IFPipeline": Family(open_deepfloyd),
        "IFSuperResolutionPipeline": Family(open_deepfloyd_larger),
        "UnCLIPPipeline": Family(open_unclip, DECODER_SCHEDULER),
        "PixelDiffusionPipeline": Family(open_pixel_diffusion),
    }
)
"""By `_class_name` of model_index.json."""


def family_of(parts: Parts) -> Family:
    """The family of a bundle. Raises BundleError if this version runs none of that class."""
    name = parts.index.values.get("_class_name")
    if isinstance(name, list):
        # A class that comes with its folder: [module, class]. It is known by its name, and never run.
        name = name[-1] if name else None
    if not isinstance(name, str):
        raise BundleError(f"{parts.index.path} names no _class_name; copy or export the bundle again.")
    if name not in FAMILIES:
        raise BundleError(
            f"{parts.folder} is a {name}, which this version does not run; it runs {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[name]
