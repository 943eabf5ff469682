"""Tiny diffusers pipelines with random weights, saved as the folders that diffusers writes. Nothing is downloaded.

    folder = save_pipeline("sdxl", tmp_path / "sdxl")

PIPELINES names them all: one of each pipeline that fmedge exports. The words of TEXT are tokens.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from fmedge_converters.decoder import quiet_libraries
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXT = (
    "a small red circle in the left, a large blue square in the center, a photo of an astronaut riding a horse, "
    "a cat in the rain by night, oil painting, highly detailed, low quality, blurry "
) * 4
TOKENS = 77
"""Length that CLIP's tokenizers pad to."""


def _words() -> list[str]:
    return sorted({word for word in TEXT.replace(",", " ").split() if word})


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer, to which every word of TEXT is one token; special tokens at the end, as CLIP has them.

    Not trained: trainers break ties as they come.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*alphabet, *(f"{letter}</w>" for letter in alphabet)])
    merges = {}
    for word in _words():
        letters = [*word[:-1], f"{word[-1]}</w>"]
        left = letters[0]
        for right in letters[1:]:
            merges[left, right] = None
            left += right
            pieces[left] = None
    return transformers.CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])},
        merges=list(merges),
        pad_token=pad,
        model_max_length=TOKENS,
    )


def t5_tokenizer(length: int = 512) -> Any:
    """T5's tokenizer, to which every long word of TEXT is one token: pad 0, </s> 1, <unk> 2, then pieces."""
    letters = sorted({letter for letter in TEXT if letter != " "})
    pieces = [(f"▁{word}", -2.0) for word in _words() if len(word) > 4]
    pieces += [(letter, -5.0) for letter in ["▁", *letters, *(f"▁{letter}" for letter in letters)]]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    extra = [(f"<extra_id_{number}>", 0.0) for number in range(9, -1, -1)]
    return transformers.T5Tokenizer(vocab=[*special, *pieces, *extra], extra_ids=10, model_max_length=length)


def gemma_tokenizer() -> Any:
    """Gemma's tokenizer, which pads on the left by itself; SANA pads on the right."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    alphabet = sorted(set(TEXT.replace(" ", "▁")))
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False, limit_alphabet=100
    )
    trained.train_from_iterator([TEXT.replace(" ", "▁")], trainer)
    bpe = json.loads(trained.to_str())["model"]
    vocab = dict(bpe["vocab"])
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    merges = [tuple(pair) for pair in bpe["merges"]]
    return transformers.GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=300, padding_side="right")


def _clip_config(tokenizer: Any, size: int = 32, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "projection_dim": size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return transformers.CLIPTextConfig(**{**values, **changes})


def _clip(tokenizer: Any, size: int = 32, **changes: Any) -> Any:
    return transformers.CLIPTextModel(_clip_config(tokenizer, size, **changes))


def _clip_projection(tokenizer: Any, size: int = 32, **changes: Any) -> Any:
    return transformers.CLIPTextModelWithProjection(_clip_config(tokenizer, size, **changes))


def _clip_vision(size: int = 32, projection: int = 32) -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=size,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
        projection_dim=projection,
    )
    return transformers.CLIPVisionModelWithProjection(config)


def _t5(tokenizer: Any, size: int = 32) -> Any:
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=size,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return transformers.T5EncoderModel(config)


def _vae(channels: int = 4, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": channels,
        "norm_num_groups": 8,
        "sample_size": 32,
    }
    return diffusers.AutoencoderKL(**{**values, **changes})


def _unet(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DConditionModel(**{**values, **changes})


def _betas(**changes: Any) -> dict[str, Any]:
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **changes}


def _ddim() -> Any:
    return diffusers.DDIMScheduler(**_betas(), clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def stable_diffusion() -> Any:
    """Stable Diffusion 1.x."""
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        # The configurations of 1.x say 2, not the tokenizer's id.
        text_encoder=_clip(tokenizer, eos_token_id=2, bos_token_id=0, pad_token_id=1),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=diffusers.PNDMScheduler(**_betas(), skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_2() -> Any:
    """Stable Diffusion 2.x: velocities, linear projections, another activation in the text encoder."""
    tokenizer = clip_tokenizer(pad="!")
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer, hidden_act="gelu"),
        tokenizer=tokenizer,
        unet=_unet(use_linear_projection=True, attention_head_dim=(4, 8)),
        scheduler=diffusers.DDIMScheduler(
            **_betas(), clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def upscaler() -> Any:
    """Stable Diffusion's upscaler, whose UNet sees the small image and is told how noisy that is."""
    tokenizer = clip_tokenizer(pad="!")
    return diffusers.StableDiffusionUpscalePipeline(
        vae=_vae(scaling_factor=0.08333),
        text_encoder=_clip(tokenizer, hidden_act="gelu"),
        tokenizer=tokenizer,
        unet=_unet(
            in_channels=7, num_class_embeds=1000, use_linear_projection=True, only_cross_attention=(True, False)
        ),
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear"),
        scheduler=diffusers.DDIMScheduler(
            **_betas(), clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        ),
    )


def inpaint() -> Any:
    """Stable Diffusion whose UNet also takes a mask and the masked image."""
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionInpaintPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(in_channels=9),
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    """Stable Diffusion XL."""
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad="!")
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(force_upcast=True, scaling_factor=0.13025),
        text_encoder=_clip(tokenizer, eos_token_id=2),
        text_encoder_2=_clip_projection(tokenizer_2, size=48, hidden_act="gelu", projection_dim=40),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=40 + 6 * 8,
            cross_attention_dim=32 + 48,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**_betas(), steps_offset=1, timestep_spacing="leading"),
    )


def latent_consistency() -> Any:
    """A latent consistency model, whose UNet takes the guidance."""
    tokenizer = clip_tokenizer()
    return diffusers.LatentConsistencyModelPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(time_cond_proj_dim=32),
        scheduler=diffusers.LCMScheduler(**_betas(), clip_sample=False, set_alpha_to_one=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_3() -> Any:
    """Stable Diffusion 3.5: normalized queries and keys, a block with two attentions."""
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=80,
            caption_projection_dim=32,
            pooled_projection_dim=80,
            pos_embed_max_size=24,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip_projection(tokenizer, size=32),
        tokenizer=tokenizer,
        text_encoder_2=_clip_projection(tokenizer_2, size=48, hidden_act="gelu", projection_dim=48),
        tokenizer_2=tokenizer_2,
        text_encoder_3=_t5(tokenizer_3, size=80),
        tokenizer_3=tokenizer_3,
    )


def flux(*, guidance: bool = True) -> Any:
    """Flux: dev takes the guidance, schnell does not."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance, base_image_seq_len=16, max_image_seq_len=256
        ),
        vae=_vae(shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance,
        ),
    )


def flux_schnell() -> Any:
    """Flux without guidance."""
    return flux(guidance=False)


def _pixart_transformer(sample_size: int, *, conditions: bool) -> Any:
    return diffusers.PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=2,
        patch_size=2,
        attention_head_dim=12,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=48,
        use_additional_conditions=conditions,
    )


def pixart_alpha() -> Any:
    """PixArt alpha with the size conditions of its 1024 models."""
    tokenizer = t5_tokenizer(120)
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        vae=_vae(),
        # Diffusers passes the conditions to transformers of this size only.
        transformer=_pixart_transformer(128, conditions=True),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear"),
    )


def pixart_sigma() -> Any:
    """PixArt sigma."""
    tokenizer = t5_tokenizer(300)
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        vae=_vae(),
        transformer=_pixart_transformer(16, conditions=False),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear"),
    )


def sana() -> Any:
    """SANA: linear attention, Gemma as the text encoder, a deep-compression autoencoder."""
    tokenizer = gemma_tokenizer()
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
        max_position_embeddings=512,
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=transformers.Gemma2Model(config),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=16,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _prior(size: int, **changes: Any) -> Any:
    return diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=12,
        embedding_dim=size,
        num_layers=1,
        num_embeddings=TOKENS,
        additional_embeddings=4,
        **changes,
    )


def _unclip_scheduler(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "variance_type": "fixed_small_log",
        "prediction_type": "sample",
        "num_train_timesteps": 1000,
        "clip_sample_range": 5.0,
    }
    return diffusers.UnCLIPScheduler(**{**values, **changes})


def _image_processor() -> Any:
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True
    )


def kandinsky_2_2_prior() -> Any:
    """From text to CLIP's embedding of an image."""
    tokenizer = clip_tokenizer()
    return diffusers.KandinskyV22PriorPipeline(
        prior=_prior(32),
        image_encoder=_clip_vision(),
        text_encoder=_clip_projection(tokenizer),
        tokenizer=tokenizer,
        scheduler=_unclip_scheduler(),
        image_processor=_image_processor(),
    )


def _kandinsky_decoder() -> dict[str, Any]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(16, 32),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
    )
    movq = diffusers.VQModel(
        # The spatial norm has 32 groups whatever the configuration says.
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    return {"unet": unet, "movq": movq, "scheduler": diffusers.DDPMScheduler(**_betas(), clip_sample=False)}


def kandinsky_2_2_decoder() -> Any:
    """From CLIP's embedding of an image to the image."""
    return diffusers.KandinskyV22Pipeline(**_kandinsky_decoder())


def kandinsky_2_2() -> Any:
    """Both stages in one folder, as diffusers' combined pipeline has them."""
    prior = kandinsky_2_2_prior().components
    return diffusers.KandinskyV22CombinedPipeline(
        **_kandinsky_decoder(), **{f"prior_{name}": part for name, part in prior.items()}
    )


def unclip() -> Any:
    """unCLIP (DALL-E 2's design): prior, decoder in pixels, two upscalers."""
    tokenizer = clip_tokenizer()
    super_resolution = {
        "sample_size": 32,
        "in_channels": 6,
        "out_channels": 3,
        "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
        "add_attention": False,
    }
    decoder_steps = {"prediction_type": "epsilon", "clip_sample_range": 1.0}
    return diffusers.UnCLIPPipeline(
        prior=_prior(32),
        decoder=diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",
        ),
        text_encoder=_clip_projection(tokenizer),
        tokenizer=tokenizer,
        text_proj=_unclip_projection(),
        super_res_first=diffusers.UNet2DModel(**super_resolution),
        super_res_last=diffusers.UNet2DModel(**super_resolution),
        prior_scheduler=_unclip_scheduler(),
        decoder_scheduler=_unclip_scheduler(variance_type="learned_range", **decoder_steps),
        super_res_scheduler=_unclip_scheduler(**decoder_steps),
    )


def _unclip_projection() -> Any:
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    return UnCLIPTextProjModel(
        clip_embeddings_dim=32, time_embed_dim=64, cross_attention_dim=32, clip_extra_context_tokens=4
    )


def _if_unet(**changes: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 32,
            "in_channels": 3,
            "out_channels": 6,
            "layers_per_block": 1,
            "block_out_channels": (16, 32),
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 2,
            "cross_attention_norm": "group_norm",
            "encoder_hid_dim": 32,
            "encoder_hid_dim_type": "text_proj",
            "resnet_time_scale_shift": "scale_shift",
            "act_fn": "gelu",
            "norm_num_groups": 8,
            **changes,
        }
    )


def _if_scheduler(**changes: Any) -> Any:
    return diffusers.DDPMScheduler(
        **{
            "beta_schedule": "squaredcos_cap_v2",
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.95,
            "sample_max_value": 1.5,
            "prediction_type": "epsilon",
            "variance_type": "learned_range",
            **changes,
        }
    )


def deepfloyd_if() -> Any:
    """The first stage of DeepFloyd IF (Imagen's design): T5 and pixels."""
    tokenizer = t5_tokenizer(77)
    return diffusers.IFPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        unet=_if_unet(),
        scheduler=_if_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def deepfloyd_if_super_resolution() -> Any:
    """The second stage of DeepFloyd IF, which enlarges what the first one made."""
    tokenizer = t5_tokenizer(77)
    return diffusers.IFSuperResolutionPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        unet=_if_unet(in_channels=6, class_embed_type="timestep"),
        scheduler=_if_scheduler(),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd2": stable_diffusion_2,
    "inpaint": inpaint,
    "upscaler": upscaler,
    "sdxl": stable_diffusion_xl,
    "lcm": latent_consistency,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "flux_schnell": flux_schnell,
    "pixart_alpha": pixart_alpha,
    "pixart_sigma": pixart_sigma,
    "sana": sana,
    "kandinsky": kandinsky_2_2,
    "kandinsky_prior": kandinsky_2_2_prior,
    "kandinsky_decoder": kandinsky_2_2_decoder,
    "unclip": unclip,
    "if": deepfloyd_if,
    "if_super_resolution": deepfloyd_if_super_resolution,
}


PIXEL = "pixel"


def save_pixel(folder: Path) -> Path:
    """What `fmedge train image` writes: a transformer in pixel space, and a pipeline class of its own."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 16
    parts = {
        "scheduler": diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="sample"),
        "text_encoder": _clip(tokenizer, max_position_embeddings=16),
        "tokenizer": tokenizer,
        "transformer": diffusers.PRXTransformer2DModel(
            in_channels=3,
            patch_size=8,
            context_in_dim=32,
            hidden_size=64,
            mlp_ratio=2.0,
            num_heads=4,
            depth=2,
            axes_dim=[8, 8],
            theta=10,
            time_factor=1.0,
        ),
    }
    generator = torch.Generator().manual_seed(1)
    index: dict[str, Any] = {"_class_name": ["pipeline", "PixelDiffusionPipeline"], "_diffusers_version": "0.42.1"}
    with quiet_libraries():
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                _spread(part.eval(), generator)
            part.save_pretrained(folder / name)
            index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    index |= {"default_sample_size": 32, "default_steps": 10, "default_guidance": 1.0}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / "pipeline.py").write_text("raise RuntimeError('code of a folder must not run')\n")
    return folder


def _modules(pipeline: Any) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def _spread(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Noise on every norm and bias: a weight that is one, or zero, would not be missed if it got lost."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() < 2 or not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def tiny_pipeline(name: str) -> Any:
    """The pipeline of PIPELINES in memory, in fp32; always with the same weights."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        with quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = PIPELINES[name]()
            generator = torch.Generator().manual_seed(1)
            for module in _modules(pipeline):
                _spread(module.eval(), generator)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline
    finally:
        torch.random.set_rng_state(state)


def save_three_stages(folder: Path) -> Path:
    """DeepFloyd IF with its second stage and the upscaler, in one folder."""
    second, third = tiny_pipeline("if_super_resolution"), tiny_pipeline("upscaler")
    first = tiny_pipeline("if")
    second.unet.register_to_config(sample_size=2 * first.unet.config.sample_size)
    more = {
        "unet_2": second.unet,
        "scheduler_2": second.scheduler,
        "image_noising_scheduler": second.image_noising_scheduler,
        "unet_3": third.unet,
        "scheduler_3": third.scheduler,
        "text_encoder_3": third.text_encoder,
        "tokenizer_3": third.tokenizer,
        "low_res_scheduler": third.low_res_scheduler,
        "vae": third.vae,
    }
    with quiet_libraries():
        first.save_pretrained(folder)
        for name, part in more.items():
            part.save_pretrained(folder / name)
    path = folder / "model_index.json"
    libraries = {name: type(part).__module__.split(".")[0] for name, part in more.items()}
    index = json.loads(path.read_text()) | {name: [libraries[name], type(part).__name__] for name, part in more.items()}
    path.write_text(json.dumps(index))
    return folder


def save_pipeline(name: str, folder: Path, **options: Any) -> Path:
    """Save a pipeline of PIPELINES, or PIXEL, as diffusers does; `options` are those of its save_pretrained."""
    if name == PIXEL:
        return save_pixel(folder)
    with quiet_libraries():
        tiny_pipeline(name).save_pretrained(folder, **options)
    return folder


def save_controlnet(name: str, folder: Path, seed: int = 2, **changes: Any) -> Path:
    """Save a ControlNet for the UNet of a tiny pipeline, whose residuals are not zero as those of a fresh one are."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        with quiet_libraries():
            net = diffusers.ControlNetModel.from_unet(
                tiny_pipeline(name).unet, **{"conditioning_embedding_out_channels": (8, 16), **changes}
            )
            _spread(net, torch.Generator().manual_seed(seed))
            for module in (
                net.controlnet_down_blocks,
                net.controlnet_mid_block,
                net.controlnet_cond_embedding.conv_out,
            ):
                for parameter in module.parameters():
                    parameter.data.normal_(0, 0.3)
            net.save_pretrained(folder)
    finally:
        torch.random.set_rng_state(state)
    return folder


def save_ip_adapter(name: str, folder: Path, kind: str = "plain") -> Path:
    """Save an IP-Adapter (plain, plus, full) for a tiny pipeline, its image encoder beside it; gives the file."""
    from safetensors.torch import save_file

    state = torch.random.get_rng_state()
    torch.manual_seed(4)
    try:
        unet = tiny_pipeline(name).unet
        width = unet.config.cross_attention_dim
        tensors: dict[str, torch.Tensor] = {}
        names = [key for key in unet.attn_processors if not key.endswith("attn1.processor")]
        for number, key in enumerate(names):
            size = unet.get_submodule(key.removesuffix(".processor")).to_k.out_features
            for end in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{2 * number + 1}.{end}.weight"] = torch.randn(size, width) * 0.3
        if kind == "plus":
            shapes = {
                "latents": (1, 3, 64),
                **{f"proj_in.{end}": size for end, size in (("weight", (64, 32)), ("bias", (64,)))},
                **{f"proj_out.{end}": size for end, size in (("weight", (width, 64)), ("bias", (width,)))},
                **{f"norm_out.{end}": (width,) for end in ("weight", "bias")},
            }
            for layer in range(4):
                at, ff = f"layers.{layer}.0", f"layers.{layer}.1"
                shapes |= {f"{at}.{norm}.{end}": (64,) for norm in ("norm1", "norm2") for end in ("weight", "bias")}
                shapes |= {
                    f"{at}.to_q.weight": (64, 64),
                    f"{at}.to_kv.weight": (128, 64),
                    f"{at}.to_out.weight": (64, 64),
                }
                shapes |= {f"{ff}.0.weight": (64,), f"{ff}.0.bias": (64,)}
                shapes |= {f"{ff}.1.weight": (256, 64), f"{ff}.3.weight": (64, 256)}
        elif kind == "full":
            shapes = {"proj.0.weight": (32, 32), "proj.0.bias": (32,), "proj.2.weight": (width, 32)}
            shapes |= {"proj.2.bias": (width,), "proj.3.weight": (width,), "proj.3.bias": (width,)}
        else:
            shapes = {"proj.weight": (4 * width, 32), "proj.bias": (4 * width,)}
            shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
        tensors |= {f"image_proj.{key}": torch.randn(shape) * 0.3 for key, shape in shapes.items()}
        encoder = _clip_vision().eval()
        _spread(encoder, torch.Generator().manual_seed(5))
        with quiet_libraries():
            encoder.save_pretrained(folder / "image_encoder")
    finally:
        torch.random.set_rng_state(state)
    file = folder / f"ip-adapter-{kind}.safetensors"
    save_file(tensors, file)
    return file
