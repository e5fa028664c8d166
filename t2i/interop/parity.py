"""Comparison of each stage of a public model with a reference, from the same noise and captions.

The reference computes with the networks and schedulers of diffusers and transformers, and with diffusers' pipelines for
Kandinsky and Stable unCLIP. Where no pipeline fits, its sampling loop is written out here, apart from that of
`t2i.diffusion`: for priors and for Kandinsky's inpainting, whose pipelines take images alone and change the masks, and
for Karlo, whose pipeline is gone. One part is not compared: Karlo's projection of the condition, which no library has
any more, is this project's on both sides.

Each stage of ours starts from the reference's result of the stage before, so that a difference is of one stage alone.
"""

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Generator, Tensor

from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.diffusion.inpainting import concat_masked_latents
from t2i.diffusion.sampling_loop import Sampling
from t2i.errors import InputError
from t2i.files.untrusted import choose_stored_variant
from t2i.interop.folders import SourceFolder
from t2i.interop.layouts import get_weight_stem
from t2i.interop.loading import ModelFolders
from t2i.sampling.embeddings import sample_image_embeds
from t2i.sampling.sample import build_decoder_condition, sample_decoder

Difference = tuple[str, float]
LEARNED_VARIANCES = ("learned", "learned_range")  # a scheduler's `variance_type` for U-Nets that predict it


def check_comparable_models(sources: ModelFolders) -> None:
    """Raise InputError for a model without a public reference, before it is loaded, which may take minutes."""
    prior = sources.prior
    if prior is not None and prior.open_component("prior").config.get("additional_embeddings", 4) == 3:
        raise InputError(
            f"the prior in {str(prior.path)!r} is an ECLIPSE prior, which no public class draws with: there is "
            "nothing to compare it with"
        )


class ParityCheck:
    """A comparison of one public model with its reference.

    Args:
        pipeline: that of this project, loaded from the folders, in fp32.
        sources: the folders.
        prompts: B captions, of any lengths.
        steps: number in every stage.
        seed: number for the noise of the first image; each has its own.
        scale: guidance scale of every stage that has one; 1 is off.
    """

    def __init__(self, pipeline: Any, sources: ModelFolders, prompts: list[str], steps: int, seed: int, scale: float):
        self.pipeline, self.sources, self.decoder = pipeline, sources, sources.decoder
        self.prompts, self.steps, self.seed, self.scale = prompts, steps, seed, scale

    @torch.no_grad()
    def compare_stages(self) -> Iterator[Difference]:
        """Yield each stage's name, and the largest absolute difference between the two results."""
        z_i = self.generate_noise((self.pipeline.clip.embed_dim,), 0)
        if self.pipeline.prior is not None:
            reference = self.sample_reference_prior()
            yield "prior embedding", compute_max_difference(self.sample_our_prior(), reference)
            z_i = reference
        # The decoder, from the reference's z_i
        latents = self.sample_reference_decoder(z_i)
        yield "decoder output", compute_max_difference(self.sample_our_decoder(z_i), latents)
        # Images, from the reference's latents
        reference = self.decode_reference(latents)
        if self.pipeline.is_cascade:
            noise = self.generate_noise(self.compute_large_shape(latents), 3)
            sampling = Sampling(self.steps, self.build_generators(), noise=noise)
            images = self.pipeline.autoencoder.draw_images(latents, sampling)
            yield "super-resolution", compute_max_difference(images, reference)
        else:
            images = self.pipeline.autoencoder.decode(latents)
        images = self.pipeline.image_processor.postprocess(images, "pt")
        yield "final image", compute_max_difference(images, (reference / 2 + 0.5).clamp(0, 1))

    # Inputs of both sides

    def generate_noise(self, shape: tuple[int, ...], stage: int) -> Tensor:
        """Return the noise of a stage: 0 stands for z_i, 1 prior, 2 decoder, 3 super-resolution, 4 the masked image, 5
        the control image."""
        return torch.randn((len(self.prompts), *shape), generator=Generator().manual_seed(self.seed + 1000 * stage))

    def build_generators(self) -> list[Generator]:
        return [Generator().manual_seed(self.seed + number) for number in range(len(self.prompts))]

    def build_masked_canvas(self) -> tuple[Tensor, Tensor]:
        """Return latents of an image, and a mask that is 1 in its right half, for a decoder that inpaints."""
        latents = self.generate_noise(self.pipeline.latent_shape, 4)
        mask = torch.zeros_like(latents[:, :1])
        mask[..., mask.shape[-1] // 2 :] = 1
        return latents, mask

    def build_control_images(self) -> Tensor | None:
        """Return control images of noise, (B, 3, H, W) in [0, 1]; None for a decoder that reads none."""
        factor = self.pipeline.decoder.control_factor
        side = None if factor is None else factor * self.pipeline.latent_shape[1]
        return None if side is None else self.generate_noise((3, side, side), 5).sigmoid()

    def compute_large_shape(self, latents: Tensor) -> tuple[int, ...]:
        factor = self.pipeline.autoencoder.factor
        return latents.shape[1], factor * latents.shape[2], factor * latents.shape[3]

    # Ours

    def sample_our_prior(self) -> Tensor:
        pipeline, noise = self.pipeline, self.generate_noise((self.pipeline.clip.embed_dim,), 1)
        text = pipeline.encode_prompt(self.prompts)
        sampling = Sampling(self.steps, self.build_generators(), self.scale, noise)
        return sample_image_embeds(pipeline.prior, pipeline.prior_scheduler, text, None, sampling)

    def sample_our_decoder(self, z_i: Tensor) -> Tensor:
        """Return the latents, (B, C, h, w), that our decoder samples for z_i, (B, D)."""
        pipeline, generators = self.pipeline, self.build_generators()
        text: TextEncoding | Any = None
        if pipeline.text_encoder is not None:
            text = pipeline.text_encoder.encode(self.prompts)
        elif pipeline.clip.reads_captions:
            text = pipeline.encode_prompt(self.prompts)
        embeds_noise = None
        if pipeline.decoder.noise_levels is not None:  # the reference draws this noise first, even for level 0
            embeds_noise = torch.stack([torch.randn(z_i.shape[1:], generator=item) for item in generators])
        known = None
        if pipeline.decoder.config.reads_masks:
            latents, mask = self.build_masked_canvas()
            known = concat_masked_latents(latents, mask)
        control = self.build_control_images()
        condition = build_decoder_condition(pipeline.decoder, z_i, text, known, embeds_noise, control=control)
        sampling = Sampling(self.steps, generators, self.scale, self.generate_noise(pipeline.latent_shape, 2))
        return sample_decoder(pipeline.decoder, pipeline.decoder_scheduler, condition, sampling)

    # The reference: shared

    def encode_captions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return z_t, states and mask of captions, padded to the longest that there can be; see `tokenize_prompts`."""
        source = self.sources.find_clip_tower("text_tower")
        assert source is not None, "a model that reads captions has their tower"
        tower = load_library_part(transformers.CLIPTextModelWithProjection, source, "text_tower")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source.get_folder("tokenizer"))
        tokens = self.tokenize_prompts(tokenizer, tower.config.max_position_embeddings)
        output = tower(tokens.input_ids)
        return output.text_embeds, output.last_hidden_state, tokens.attention_mask.bool()

    def tokenize_prompts(self, tokenizer: Any, length: int) -> Any:
        """Return the tokens of the captions; with guidance those of the empty caption B times, then of the captions."""
        texts = self.prompts if self.scale == 1 else [""] * len(self.prompts) + self.prompts
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")

    def prepend_null(self, null: Tensor, z_i: Tensor) -> Tensor:
        """Return z_i; with guidance `null` B times, then z_i."""
        return z_i if self.scale == 1 else torch.cat([null.expand(len(z_i), -1), z_i])

    def predict_guided(self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
        """Guide by one prediction for no caption and captions together; a learned variance is the captions'."""
        if self.scale == 1:
            return predict(x, t)
        empty, full = predict(torch.cat([x, x]), t).chunk(2)
        uncond, cond = empty[:, : x.shape[1]], full[:, : x.shape[1]]
        return torch.cat([uncond + self.scale * (cond - uncond), full[:, x.shape[1] :]], dim=1)

    def run_reference_scheduler(
        self, source: SourceFolder, part: str, x: Tensor, predict: Callable[..., Tensor]
    ) -> Tensor:
        """Sample from noise by a scheduler of diffusers. `predict` takes (x, t, is_last)."""
        scheduler = source.find_scheduler_class(part).from_pretrained(source.get_folder(part))
        generators = self.build_generators()
        scheduler.set_timesteps(self.steps)
        for t, after in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None]):
            # Karlo's pipelines hand the next timestep over. Others are computed by the scheduler.
            more = {"prev_timestep": after} if isinstance(scheduler, diffusers.UnCLIPScheduler) else {}
            x = scheduler.step(predict(x, t, after is None), t, x, generator=generators, **more).prev_sample
        return x

    def run_decoder_scheduler(self, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sample latents with guidance; `predict` takes (x, t) of the null condition, if any, and of z_i."""
        noise = self.generate_noise(self.pipeline.latent_shape, 2)
        return self.run_reference_scheduler(
            self.decoder, "decoder_scheduler", noise, lambda x, t, _: self.predict_guided(predict, x, t)
        )

    def sample_reference_prior(self) -> Tensor:
        """Return the z_i, (B, D), that diffusers' prior samples for the prompts."""
        source = self.sources.prior
        assert source is not None, "there is a prior"
        z_t, states, mask = self.encode_captions()
        prior = load_library_part(diffusers.PriorTransformer, source, "prior")

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return prior(x, t, z_t, states, mask).predicted_image_embedding

        scheduler_folder = next(folder for folder in [source, *self.sources.folders] if "prior_scheduler" in folder)
        noise = self.generate_noise((prior.config.embedding_dim,), 1)
        sample = self.run_reference_scheduler(
            scheduler_folder, "prior_scheduler", noise, lambda x, t, _: self.predict_guided(predict, x, t)
        )
        return prior.post_process_latents(sample)

    def sample_reference_decoder(self, z_i: Tensor) -> Tensor:
        match self.decoder.family:
            case "karlo":
                return self.sample_karlo_latents(z_i)
            case "kandinsky" if self.pipeline.decoder.config.reads_masks:
                return self.sample_inpainted_kandinsky_latents(z_i)
            case "kandinsky":
                return self.sample_kandinsky_latents(z_i)
            case _:
                return self.sample_stable_unclip_latents(z_i)

    def decode_reference(self, latents: Tensor) -> Tensor:
        """Return images in [-1, 1]."""
        match self.decoder.family:
            case "karlo":
                return self.enlarge_karlo_images(latents)
            case "kandinsky":
                return load_library_part(VQModel, self.decoder, "movq").decode(latents, force_not_quantize=True).sample
            case _:
                vae = load_library_part(diffusers.AutoencoderKL, self.decoder, "vae")
                return vae.decode(latents / vae.config.scaling_factor).sample

    def run_pipeline(self, pipeline: Any, *prompt: Any, **arguments: Any) -> Any:
        """Return what a pipeline of diffusers draws with the settings that all of them take."""
        pipeline.set_progress_bar_config(disable=True)
        arguments |= {"latents": self.generate_noise(self.pipeline.latent_shape, 2)}
        arguments |= {"generator": self.build_generators()}
        return pipeline(*prompt, num_inference_steps=self.steps, guidance_scale=self.scale, **arguments).images

    # The reference: Karlo

    def sample_karlo_latents(self, z_i: Tensor) -> Tensor:
        z_t, states, mask = self.encode_captions()
        projection = self.pipeline.decoder.text_proj
        null = projection.learned_classifier_free_guidance_embeddings
        arguments = projection(self.prepend_null(null, z_i), z_t, TokenStates(states, mask)).arguments
        # diffusers' pipeline gave the mask of the tokens by this name.
        arguments["attention_mask"] = arguments.pop("encoder_attention_mask")
        unet = load_library_part(UNet2DConditionModel, self.decoder, "unet")
        return self.run_decoder_scheduler(lambda x, t: unet(x, t, **arguments).sample)

    def enlarge_karlo_images(self, latents: Tensor) -> Tensor:
        parts = ("super_res_first", "super_res_last")
        first, last = (load_library_part(UNet2DModel, self.decoder, part) for part in parts)
        shape = self.compute_large_shape(latents)
        small = F.interpolate(latents.clamp(-1, 1), size=shape[1:], mode="bicubic", antialias=True)

        def predict(x: Tensor, t: Tensor, is_last: bool) -> Tensor:
            return (last if is_last else first)(torch.cat([x, small], dim=1), t).sample

        noise = self.generate_noise(shape, 3)
        return self.run_reference_scheduler(self.decoder, "super_res_scheduler", noise, predict).clamp(-1, 1)

    # The reference: Kandinsky

    def encode_zero_image(self) -> Tensor:
        """Return CLIP's embedding of an image of zeros, (1, D), which Kandinsky is guided away from."""
        source = self.sources.find_clip_tower("image_tower")
        if source is None:
            raise InputError("no folder has an image encoder; Kandinsky is guided away from its embedding of zeros")
        tower = load_library_part(transformers.CLIPVisionModelWithProjection, source, "image_tower")
        side = tower.config.image_size
        return tower(torch.zeros(1, 3, side, side)).image_embeds

    def load_multilingual_clip(self) -> tuple[MultilingualCLIP, transformers.XLMRobertaTokenizer]:
        tokenizer = transformers.XLMRobertaTokenizer.from_pretrained(self.decoder.get_folder("multilingual_tokenizer"))
        return load_library_part(MultilingualCLIP, self.decoder, "multilingual_clip"), tokenizer

    def sample_kandinsky_latents(self, z_i: Tensor) -> Tensor:
        """Return the latents, (B, C, h, w), that diffusers' Kandinsky pipeline samples for z_i, (B, D)."""
        side = self.pipeline.latent_shape[1] * self.pipeline.autoencoder.factor
        arguments: dict[str, Any] = {"image_embeds": z_i, "height": side, "width": side}
        arguments["negative_image_embeds"] = self.encode_zero_image().expand(len(z_i), -1)
        parts: dict[str, Any] = {
            "unet": load_library_part(UNet2DConditionModel, self.decoder, "unet"),
            "movq": load_library_part(VQModel, self.decoder, "movq"),
            "scheduler": self.decoder.load_scheduler("decoder_scheduler"),
        }
        hint = self.build_control_images()
        if "multilingual_clip" in self.decoder:
            parts["text_encoder"], parts["tokenizer"] = self.load_multilingual_clip()
            pipeline, arguments["prompt"] = diffusers.KandinskyPipeline(**parts), self.prompts
        elif hint is not None:
            pipeline, arguments["hint"] = diffusers.KandinskyV22ControlnetPipeline(**parts), hint
        else:
            return self.run_pipeline(diffusers.KandinskyV22Pipeline(**parts), **arguments, output_type="latent")
        # These pipelines return images alone; their callbacks see the latents.
        seen: list[Tensor] = []
        arguments["callback"] = lambda step, t, latents: seen.append(latents)
        self.run_pipeline(pipeline, **arguments, output_type="pt")
        return seen[-1]

    def sample_inpainted_kandinsky_latents(self, z_i: Tensor) -> Tensor:
        """Sample around what stays of `build_masked_canvas`; in the reference, 1 marks what stays."""
        latents, mask = self.build_masked_canvas()
        kept = torch.cat([latents * (1 - mask), 1 - mask], dim=1)
        condition, states = {"image_embeds": self.prepend_null(self.encode_zero_image(), z_i)}, None
        if "multilingual_clip" in self.decoder:
            encoder, tokenizer = self.load_multilingual_clip()
            tokens = self.tokenize_prompts(tokenizer, 77)
            condition["text_embeds"], states = encoder(tokens.input_ids, tokens.attention_mask)
        unet = load_library_part(UNet2DConditionModel, self.decoder, "unet")
        learned = self.decoder.load_scheduler("decoder_scheduler").config.get("variance_type") in LEARNED_VARIANCES

        def predict(x: Tensor, t: Tensor) -> Tensor:
            inputs = torch.cat([x, kept.repeat(len(x) // len(kept), 1, 1, 1)], dim=1)
            prediction = unet(inputs, t, states, added_cond_kwargs=condition).sample
            return prediction if learned else prediction[:, : x.shape[1]]

        return self.run_decoder_scheduler(predict)

    # The reference: Stable unCLIP

    def sample_stable_unclip_latents(self, z_i: Tensor) -> Tensor:
        """Return the latents, (B, C, h, w), that diffusers' Stable unCLIP pipeline samples for z_i, (B, D)."""
        source, vae = self.decoder, load_library_part(diffusers.AutoencoderKL, self.decoder, "vae")
        pipeline = diffusers.StableUnCLIPImg2ImgPipeline(
            feature_extractor=None,
            image_encoder=vae,  # only its dtype is read, for the embeddings are given
            image_normalizer=StableUnCLIPImageNormalizer.from_pretrained(source.get_folder("normalizer")),
            image_noising_scheduler=diffusers.DDPMScheduler.from_pretrained(source.get_folder("noising_scheduler")),
            tokenizer=transformers.CLIPTokenizer.from_pretrained(source.get_folder("text_tokenizer")),
            text_encoder=load_library_part(transformers.CLIPTextModel, source, "text_encoder"),
            unet=load_library_part(UNet2DConditionModel, source, "unet"),
            scheduler=source.load_scheduler("decoder_scheduler"),
            vae=vae,
        )
        return self.run_pipeline(pipeline, prompt=self.prompts, image_embeds=z_i, output_type="latent")


def load_library_part(model_class: Any, source: SourceFolder, part: str) -> Any:
    """Load a part by its library, in fp32, from the files that are read here too."""
    folder = source.get_folder(part)
    settings = {
        "variant": choose_stored_variant(folder, source.variant, get_weight_stem(part)),
        "use_safetensors": True,
    }
    return model_class.from_pretrained(folder, torch_dtype=torch.float32, **settings).eval()


def compute_max_difference(result: Tensor, reference: Tensor) -> float:
    if result.shape != reference.shape:
        raise InputError(f"ours ends with {tuple(result.shape)}, the reference with {tuple(reference.shape)}")
    return (result.float() - reference.float()).abs().max().item()
