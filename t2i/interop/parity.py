"""The same noise and conditions through this project and through diffusers, stage by stage: how far apart they end.

The reference is made of diffusers' and transformers' own classes: their public pipelines for Kandinsky and Stable
unCLIP. Karlo's is not public any more, so its loops are here, written from its description over diffusers' models;
its projection of the condition, which no library has now, is this project's on both sides. So is the prior's loop, and
that of Kandinsky's inpainting, whose pipelines take pictures alone and change their masks.
Each stage of ours starts from what the reference's stage before ended with, so that a difference is of one stage alone.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    KandinskyPipeline,
    KandinskyV22Pipeline,
    PriorTransformer,
    StableUnCLIPImg2ImgPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from torch import Generator, Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    XLMRobertaTokenizer,
)

from t2i.diffusion.condition import TextEncoding, TokenStates
from t2i.diffusion.inpainting import concat_masked_latents
from t2i.diffusion.sampling_loop import Sampling
from t2i.errors import InputError
from t2i.interop.layouts import PublicFolder
from t2i.interop.loading import ModelFolders
from t2i.sampling.embeddings import sample_image_embeds
from t2i.sampling.sample import build_decoder_condition, sample_decoder

Difference = tuple[str, float]
LEARNED_VARIANCES = ("learned", "learned_range")  # kinds of variance of a scheduler


def check_comparable_models(sources: ModelFolders) -> None:
    """Refuse what has no public reference; before it is loaded, for that may take minutes."""
    source = sources.prior
    if source is not None and source.read_component("prior").config.get("additional_embeddings", 4) == 3:
        raise InputError(
            f"the prior in {str(source.path)!r} is an ECLIPSE prior, which no public class draws with: there is "
            "nothing to compare it with"
        )


class ParityCheck:
    """A public model through both.

    Args:
        pipeline: of this project, loaded from the folders, in fp32.
        sources: the folders.
        prompts: B captions, of any lengths.
        steps: of every stage.
        seed: of the first picture; each has its own.
        scale: of the guidance of every stage that has it; 1 is off.
    """

    def __init__(self, pipeline: Any, sources: ModelFolders, prompts: list[str], steps: int, seed: int, scale: float):
        self.pipeline, self.sources, self.decoder = pipeline, sources, sources.decoder
        self.prompts, self.steps, self.seed, self.scale = prompts, steps, seed, scale

    def generate_stage_noise(self, shape: tuple[int, ...], stage: int) -> Tensor:
        return torch.randn((len(self.prompts), *shape), generator=Generator().manual_seed(self.seed + 1000 * stage))

    def build_generators(self) -> list[Generator]:
        return [Generator().manual_seed(self.seed + number) for number in range(len(self.prompts))]

    @torch.no_grad()
    def compare_stages(self) -> Iterator[Difference]:
        """Each stage's name, and the largest difference of a number that it ends with."""
        z_i = self.generate_stage_noise((self.pipeline.clip.embed_dim,), 0)
        if self.pipeline.prior is not None:
            theirs = self.sample_reference_prior()
            yield "prior embedding", compute_max_difference(self.sample_our_prior(), theirs)
            z_i = theirs
        latents, pictures = self.select_reference_functions(z_i)
        theirs = latents()
        yield "decoder output", compute_max_difference(self.sample_our_decoder(z_i), theirs)
        if self.pipeline.is_cascade:
            noise = self.generate_stage_noise(self.compute_large_shape(theirs), 3)
            sampling = Sampling(self.steps, self.build_generators(), noise=noise)
            ours = self.pipeline.autoencoder.draw_images(theirs, sampling)
            drawn = pictures(theirs)
            yield "super-resolution", compute_max_difference(ours, drawn)
        else:
            ours, drawn = self.pipeline.autoencoder.decode(theirs), pictures(theirs)
        to_bits = self.pipeline.image_processor.postprocess
        yield "final picture", compute_max_difference(to_bits(ours, "pt"), (drawn / 2 + 0.5).clamp(0, 1))

    def compute_large_shape(self, latents: Tensor) -> tuple[int, ...]:
        factor = self.pipeline.autoencoder.factor
        return latents.shape[1], factor * latents.shape[2], factor * latents.shape[3]

    def build_masked_canvas(self) -> tuple[Tensor, Tensor]:
        """For a decoder that inpaints: latents of a picture, and 1 where it is painted, in its right half."""
        latents = self.generate_stage_noise(self.pipeline.latent_shape, 4)
        mask = torch.zeros_like(latents[:, :1])
        mask[..., mask.shape[-1] // 2 :] = 1
        return latents, mask

    # Ours

    def sample_our_prior(self) -> Tensor:
        pipeline, noise = self.pipeline, self.generate_stage_noise((self.pipeline.clip.embed_dim,), 1)
        text = pipeline.encode_prompt(self.prompts)
        sampling = Sampling(self.steps, self.build_generators(), self.scale, noise)
        return sample_image_embeds(pipeline.prior, pipeline.prior_scheduler, text, None, sampling)

    def sample_our_decoder(self, z_i: Tensor) -> Tensor:
        pipeline, generators = self.pipeline, self.build_generators()
        text: TextEncoding | Any = None
        if pipeline.text_encoder is not None:
            text = pipeline.text_encoder.encode(self.prompts)
        elif pipeline.clip.config.text is not None:
            text = pipeline.encode_prompt(self.prompts)
        embeds_noise = None
        if pipeline.decoder.noise_levels is not None:  # the reference draws this noise first, even for level 0
            embeds_noise = torch.stack([torch.randn(z_i.shape[1:], generator=item) for item in generators])
        known = concat_masked_latents(*self.build_masked_canvas()) if pipeline.decoder.config.reads_masks else None
        condition = build_decoder_condition(pipeline.decoder, z_i, text, known, embeds_noise)
        noise = self.generate_stage_noise(pipeline.latent_shape, 2)
        sampling = Sampling(self.steps, generators, self.scale, noise)
        return sample_decoder(pipeline.decoder, pipeline.decoder_scheduler, condition, sampling)

    # The reference

    def encode_captions(self, source: PublicFolder) -> tuple[Tensor, Tensor, Tensor]:
        """z_t, states and mask, all tokens that there can be: with guidance of no caption B times, then of captions."""
        tokenizer = CLIPTokenizer.from_pretrained(source.folder("tokenizer"))
        tower = load_library_part(CLIPTextModelWithProjection, source, "text_tower")
        texts = self.prompts if self.scale == 1 else [""] * len(self.prompts) + self.prompts
        longest = tower.config.max_position_embeddings
        found = tokenizer(texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        said = tower(found.input_ids)
        return said.text_embeds, said.last_hidden_state, found.attention_mask.bool()

    def predict_guided(self, predict: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """From a prediction for no caption and captions at once; a variance that was learned is the captions'."""
        if self.scale == 1:
            return predict(x)
        empty, full = predict(torch.cat([x, x])).chunk(2)
        mean, given = empty[:, : x.shape[1]], full[:, : x.shape[1]]
        return torch.cat([mean + self.scale * (given - mean), full[:, x.shape[1] :]], dim=1)

    def run_reference_scheduler(
        self, source: PublicFolder, part: str, x: Tensor, predict: Callable[..., Tensor]
    ) -> Tensor:
        """From noise to a sample, by a scheduler of diffusers; `predict` of (x, t, is_last)."""
        generators, scheduler = (
            self.build_generators(),
            source.find_scheduler_class(part).from_pretrained(source.folder(part)),
        )
        scheduler.set_timesteps(self.steps)
        for t, after in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None]):
            told = {"prev_timestep": after} if isinstance(scheduler, UnCLIPScheduler) else {}
            x = scheduler.step(predict(x, t, after is None), t, x, generator=generators, **told).prev_sample
        return x

    def sample_reference_prior(self) -> Tensor:
        source, tower = self.sources.prior, self.sources.find_clip_tower("text_tower")
        assert source is not None and tower is not None, "there is a prior"
        z_t, states, mask = self.encode_captions(tower)
        prior = load_library_part(PriorTransformer, source, "prior")
        home = next(one for one in [source, *self.sources.folders] if "prior_scheduler" in one)

        def predict(x: Tensor, t: Tensor, is_last: bool) -> Tensor:
            def both(pair: Tensor) -> Tensor:
                said = {"proj_embedding": z_t, "encoder_hidden_states": states, "attention_mask": mask}
                return prior(pair, timestep=t, **said).predicted_image_embedding

            return self.predict_guided(both, x)

        drawn = self.run_reference_scheduler(
            home, "prior_scheduler", self.generate_stage_noise((prior.config.embedding_dim,), 1), predict
        )
        return prior.post_process_latents(drawn)

    def select_reference_functions(self, z_i: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """What draws latents that show z_i, and what makes pictures of latents."""
        match self.decoder.layout.family:
            case "karlo":
                return lambda: self.sample_karlo_latents(z_i), self.decode_karlo_latents
            case "kandinsky":
                if self.pipeline.decoder.config.reads_masks:
                    return lambda: self.sample_inpainted_kandinsky_latents(z_i), self.decode_kandinsky_latents
                return lambda: self.sample_kandinsky_latents(z_i), self.decode_kandinsky_latents
            case _:
                return lambda: self.sample_stable_unclip_latents(z_i), self.decode_stable_unclip_latents

    def sample_karlo_latents(self, z_i: Tensor) -> Tensor:
        tower = self.sources.find_clip_tower("text_tower")
        assert tower is not None, "Karlo's folders have one"
        z_t, states, mask = self.encode_captions(tower)
        projection = self.pipeline.decoder.text_proj
        nothing = projection.learned_classifier_free_guidance_embeddings.expand(len(z_i), -1)
        shown = z_i if self.scale == 1 else torch.cat([nothing, z_i])
        told = projection(shown, z_t, TokenStates(states, mask))
        unet = load_library_part(UNet2DConditionModel, self.decoder, "unet")

        def predict(x: Tensor, t: Tensor, is_last: bool) -> Tensor:
            said = {"encoder_hidden_states": told.tokens, "class_labels": told.embedding, "attention_mask": told.mask}
            return self.predict_guided(lambda pair: unet(pair, t, **said).sample, x)

        return self.run_reference_scheduler(
            self.decoder, "decoder_scheduler", self.generate_stage_noise(self.pipeline.latent_shape, 2), predict
        )

    def decode_karlo_latents(self, latents: Tensor) -> Tensor:
        first, last = (
            load_library_part(UNet2DModel, self.decoder, part) for part in ("super_res_first", "super_res_last")
        )
        shape = self.compute_large_shape(latents)
        small = F.interpolate(latents.clamp(-1, 1), size=shape[1:], mode="bicubic", antialias=True)

        def predict(x: Tensor, t: Tensor, is_last: bool) -> Tensor:
            return (last if is_last else first)(torch.cat([x, small], dim=1), t).sample

        return self.run_reference_scheduler(
            self.decoder, "super_res_scheduler", self.generate_stage_noise(shape, 3), predict
        ).clamp(-1, 1)

    def encode_zero_image(self, count: int) -> Tensor:
        """CLIP's embedding of a zero picture, `count` times: what Kandinsky is guided away from."""
        source = self.sources.find_clip_tower("image_tower")
        if source is None:
            raise InputError(
                "no folder has an image encoder; Kandinsky is guided away from what it says of a zero picture"
            )
        tower = load_library_part(CLIPVisionModelWithProjection, source, "image_tower")
        side = tower.config.image_size
        return tower(torch.zeros(1, 3, side, side)).image_embeds.expand(count, -1)

    def sample_kandinsky_latents(self, z_i: Tensor) -> Tensor:
        """The last latents, as the pipeline's callback sees them."""
        parts: dict[str, Any] = {
            "unet": load_library_part(UNet2DConditionModel, self.decoder, "unet"),
            "movq": load_library_part(VQModel, self.decoder, "movq"),
            "scheduler": self.decoder.load_scheduler("decoder_scheduler"),
        }
        seen: list[Tensor] = []
        side = self.pipeline.latent_shape[1] * self.pipeline.autoencoder.factor
        settings = {
            "image_embeds": z_i,
            "negative_image_embeds": self.encode_zero_image(len(z_i)),
            "latents": self.generate_stage_noise(self.pipeline.latent_shape, 2),
            "generator": self.build_generators(),
            "num_inference_steps": self.steps,
            "guidance_scale": self.scale,
            "height": side,
            "width": side,
            "output_type": "pt",
        }
        if "multilingual_clip" in self.decoder:
            parts["text_encoder"] = load_library_part(MultilingualCLIP, self.decoder, "multilingual_clip")
            parts["tokenizer"] = XLMRobertaTokenizer.from_pretrained(self.decoder.folder("multilingual_tokenizer"))
            disable_progress_bar(KandinskyPipeline(**parts))(
                self.prompts, callback=lambda step, t, latents: seen.append(latents), **settings
            )
            return seen[-1]
        return disable_progress_bar(KandinskyV22Pipeline(**parts))(**settings | {"output_type": "latent"}).images

    def sample_inpainted_kandinsky_latents(self, z_i: Tensor) -> Tensor:
        """The last latents, from what stays of `build_masked_canvas`, where the reference's mask is 1."""
        folder, (latents, mask) = self.decoder, self.build_masked_canvas()
        given = torch.cat([latents * (1 - mask), 1 - mask], dim=1)
        shown = z_i if self.scale == 1 else torch.cat([self.encode_zero_image(len(z_i)), z_i])
        told, states = {"image_embeds": shown}, None
        if "multilingual_clip" in folder:
            tokenizer = XLMRobertaTokenizer.from_pretrained(folder.folder("multilingual_tokenizer"))
            texts = self.prompts if self.scale == 1 else [""] * len(self.prompts) + self.prompts
            found = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            encoder = load_library_part(MultilingualCLIP, folder, "multilingual_clip")
            told["text_embeds"], states = encoder(found.input_ids, found.attention_mask)
        unet = load_library_part(UNet2DConditionModel, folder, "unet")
        learned = folder.load_scheduler("decoder_scheduler").config.get("variance_type") in LEARNED_VARIANCES

        def predict(x: Tensor, t: Tensor, is_last: bool) -> Tensor:
            def both(pair: Tensor) -> Tensor:
                seen = torch.cat([pair, given.repeat(len(pair) // len(given), 1, 1, 1)], dim=1)
                return unet(seen, t, states, added_cond_kwargs=told).sample

            said = self.predict_guided(both, x)
            return said if learned else said[:, : x.shape[1]]

        return self.run_reference_scheduler(
            folder, "decoder_scheduler", self.generate_stage_noise(self.pipeline.latent_shape, 2), predict
        )

    def decode_kandinsky_latents(self, latents: Tensor) -> Tensor:
        return load_library_part(VQModel, self.decoder, "movq").decode(latents, force_not_quantize=True).sample

    def sample_stable_unclip_latents(self, z_i: Tensor) -> Tensor:
        folder, vae = self.decoder, load_library_part(AutoencoderKL, self.decoder, "vae")
        pipeline = StableUnCLIPImg2ImgPipeline(
            feature_extractor=None,
            image_encoder=vae,  # embeddings are given; only its dtype is read
            image_normalizer=StableUnCLIPImageNormalizer.from_pretrained(folder.folder("normalizer")),
            image_noising_scheduler=DDPMScheduler.from_pretrained(folder.folder("noising_scheduler")),
            tokenizer=CLIPTokenizer.from_pretrained(folder.folder("text_tokenizer")),
            text_encoder=load_library_part(CLIPTextModel, folder, "text_encoder"),
            unet=load_library_part(UNet2DConditionModel, folder, "unet"),
            scheduler=folder.load_scheduler("decoder_scheduler"),
            vae=vae,
        )
        return disable_progress_bar(pipeline)(
            prompt=self.prompts,
            image_embeds=z_i,
            latents=self.generate_stage_noise(self.pipeline.latent_shape, 2),
            generator=self.build_generators(),
            num_inference_steps=self.steps,
            guidance_scale=self.scale,
            output_type="latent",
        ).images

    def decode_stable_unclip_latents(self, latents: Tensor) -> Tensor:
        vae = load_library_part(AutoencoderKL, self.decoder, "vae")
        return vae.decode(latents / vae.config.scaling_factor).sample


def load_library_part(kind: Any, source: PublicFolder, part: str) -> Any:
    """A part as its library loads it, in fp32; where a part has no files of the variant, the plain ones, as here."""
    settings: dict[str, Any] = {"use_safetensors": True, "torch_dtype": torch.float32}
    folder = Path(source.folder(part))
    if source.variant and any(f".{source.variant}." in path.name for path in folder.glob("*.safetensors*")):
        settings["variant"] = source.variant
    return kind.from_pretrained(folder, **settings).eval()


def disable_progress_bar(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compute_max_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    if ours.shape != theirs.shape:
        raise InputError(f"ours ends with {tuple(ours.shape)}, the reference with {tuple(theirs.shape)}")
    return (ours.float() - theirs.float()).abs().max().item()
