"""Train a prior: from the encoding of a caption to an image embedding.

accelerate launch training/train_prior.py configs/emoji/prior.yaml train.steps=1000

`architecture` is diffusion, autoregressive, eclipse, or a regression (linear, mlp) as a baseline.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from t2i.training.common.captions import print_cut_captions
from t2i.training.common.effects import (
    COMMON,
    WEIGHTED_LOSS,
    Idle,
    IdleCases,
    exclude_setting,
    list_preview_cases,
    require_setting,
)
from t2i.training.common.encodings import EncodingSource, open_encodings
from t2i.training.common.entry import run
from t2i.training.common.finetuning import prepare_init_model, resolve_init_scheduler
from t2i.training.common.loop import Stage, build_accelerator, fit
from t2i.training.common.lora import LoraConfig, add_adapters, check_lora_init, export_adapted_model
from t2i.training.common.preview import SampleConfig, TrainingPreviews, encode_preview_input
from torch import Tensor
from torch.nn import Module

from t2i.checks import check_choice
from t2i.config import DataConfig, TrainConfig, build_or_explain, check_fields
from t2i.data import Batch
from t2i.data.cache import ClipFacts
from t2i.data.groups import open_groups
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.flow import get_prediction_type
from t2i.diffusion.loss import check_loss_settings, compute_diffusion_loss, drop_condition
from t2i.diffusion.process import build_noise_scheduler
from t2i.errors import InputError
from t2i.files.fingerprints import compute_weights_fingerprint
from t2i.files.model_folder import load_model, save_model_folder
from t2i.interop.parts import PublicPart
from t2i.interop.trainable import CLIPSummary, find_trainable_part, load_trainable_prior
from t2i.networks.autoregressive_prior import (
    AutoregressivePrior,
    compute_code_cross_entropy,
    count_principal_components,
)
from t2i.networks.prior import Prior
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.regression_prior import REGRESSION_KINDS, RegressionPrior

ARCHITECTURES: dict[str, Any] = {
    "diffusion": Prior,
    "autoregressive": AutoregressivePrior,
    "eclipse": EclipsePrior,
    "linear": RegressionPrior,
    "mlp": RegressionPrior,
}
# The architectures on which each option has an effect
OPTION_ARCHITECTURES = {
    "caption_dropout": ("diffusion", "autoregressive"),
    "scheduler": ("diffusion",),
    "timestep_shift": ("diffusion",),
    "loss_weighting": ("diffusion",),
    "min_snr_gamma": ("diffusion",),
    "logit_mean": ("diffusion",),
    "logit_std": ("diffusion",),
    "explained_variance": ("autoregressive",),
    "regression": ("autoregressive",),
    "label_smoothing": ("autoregressive",),
    "code_noise": ("autoregressive",),
    "contrastive_weight": ("eclipse",),
}
PUBLIC_ARCHITECTURES = ("diffusion", "eclipse")
CONTRASTIVE_WEIGHT = 0.2  # of ECLIPSE's loss, where none is given
CONTRASTIVE_TEMPERATURE = 0.07  # of the cosines in ECLIPSE's loss; CLIP's before training

ONE_PASS = Idle(": this prior does not denoise in steps", lambda config: config.architecture != "diffusion")
ONE_ANSWER = Idle(": this prior has one answer to a text", lambda config: config.architecture in REGRESSION_KINDS)


@dataclass
class Config:
    # Folder of a trained CLIP, or a public one: ViT-L-14:laion2b_s32b_b82k, hf-hub:name, local-dir:path
    clip: str = "???"
    cache: str | None = None  # folder that `t2i data cache` wrote; null encodes images in every step
    architecture: str = "diffusion"  # or autoregressive, linear, mlp; or eclipse, to train one further (`init`)
    model: dict[str, Any] = field(default_factory=dict)  # arguments of the prior's class, but for those CLIP decides
    # Folder of a trained prior to start from, instead of random weights; or the folder or hub name of a public
    # pipeline, Karlo's or Kandinsky's, or of an ECLIPSE prior.
    init: str | None = None
    lora: LoraConfig | None = None  # train adapters on `init` instead of its weights: rank, alpha, targets
    caption_dropout: float = 0.1  # of diffusion and autoregressive priors; guidance needs it
    # Diffusion only
    # Arguments of DDIMScheduler, the rest as in `init`; or `prediction_type: flow_prediction` and a `shift`
    scheduler: dict[str, Any] = field(default_factory=dict)
    timestep_shift: float = 1.0  # above 1, high noise is drawn more often
    loss_weighting: str = "none"  # or min_snr, which gives timesteps of low noise less weight
    min_snr_gamma: float = 5.0
    logit_mean: float = 0.0  # of flow_prediction's timesteps, which are logit-normal; above 0, more noise
    logit_std: float = 1.0
    # Autoregressive only
    explained_variance: float = 0.99  # of z_i, by its principal components, unless model.components is given
    regression: str | None = None  # folder of a trained linear or mlp prior, whose output the codes are relative to
    label_smoothing: float = 0.0  # standard deviation, in buckets, of the target around the true bucket
    code_noise: float = 0.0  # standard deviation of noise on the input codes, as a fraction of all buckets
    # ECLIPSE only
    # Weight of the cross-entropy by which z_i finds its own caption among those of the batch; null is 0.2
    contrastive_weight: float | None = None
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # previews, every train.sample_every steps
    idle: ClassVar[IdleCases] = {
        **COMMON,
        **WEIGHTED_LOSS,
        **list_preview_cases(
            **dict.fromkeys(("count", "prompts", "seed", "decoder", "autoencoder"), ()),
            **dict.fromkeys(("num_inference_steps", "guidance_scale"), (require_setting("sample.decoder"),)),
            prior_num_inference_steps=(ONE_PASS,),
            **dict.fromkeys(("prior_guidance_scale", "prior_candidates"), (ONE_ANSWER,)),
        ),
        "explained_variance": (exclude_setting("init"), exclude_setting("model.components")),
    }

    def __post_init__(self) -> None:
        check_choice("architecture", self.architecture, tuple(ARCHITECTURES))
        check_fields(self, caption_dropout=(0, 1), timestep_shift=(0.01, 100), min_snr_gamma=(0.01, 1000))
        check_fields(self, explained_variance=(0.01, 1), label_smoothing=(0, 100), code_noise=(0, 1))
        if self.contrastive_weight is not None:
            check_fields(self, contrastive_weight=(0, 100))
        for name, architectures in OPTION_ARCHITECTURES.items():
            default = getattr(Config, name, {})  # `scheduler` has a factory, which leaves no class attribute
            if self.architecture not in architectures and getattr(self, name) != default:
                allowed = " or ".join(architectures)
                raise InputError(f"{name} needs architecture={allowed}, got {self.architecture}; leave it out")
        if self.regression is not None and self.init is not None:
            raise InputError(
                f"regression={self.regression!r} is for new weights, but init={self.init!r} is given; give one of them"
            )
        if self.architecture == "eclipse" and self.init is None:
            raise InputError("architecture=eclipse trains an ECLIPSE prior further; give it as init")
        check_fields(self, logit_mean=(-10, 10), logit_std=(0.01, 10))
        self.check_loss(build_noise_scheduler(self.scheduler))
        check_lora_init(self.lora, self.init)

    def check_loss(self, scheduler: SchedulerMixin) -> None:
        """Refuse settings of the loss that do not fit a noise schedule."""
        learned = bool(self.model.get("learned_variance"))
        check_loss_settings(scheduler, self.loss_weighting, (self.logit_mean, self.logit_std), learned)


def main(config: Config) -> None:
    """Train a prior, from new weights or from those of `init`."""
    public = find_public_prior(config)
    source = open_encodings(config.cache, config.data, config.clip)
    accelerator = build_accelerator(config.train)
    if accelerator.is_local_main_process:
        print_cut_captions(source.find_cut_captions())
    fit(accelerator, build_stage(config, source, accelerator.device, public), config.train)


def find_public_prior(config: Config) -> PublicPart | None:
    """Find the prior of the public model `init`; None if it is no public model's name, or none of this architecture's.

    Raises InputError for a public prior of another architecture.
    """
    if config.architecture not in PUBLIC_ARCHITECTURES:
        return None
    public = find_trainable_part(config.init, "prior")
    if public is not None:
        tokens = public.open_component().config.get("additional_embeddings", 4)
        found = "eclipse" if tokens == 3 else "diffusion"  # without a token for the time
        if found != config.architecture:
            raise InputError(f"init={config.init!r} has a prior of architecture={found}, got {config.architecture}")
    return public


def build_stage(
    config: Config, source: EncodingSource, device: torch.device, public: PublicPart | None = None
) -> Stage:
    """Build the stage. public: the part of a public model that `init` names."""
    source.to(device)
    check_unit_length(config, source)
    scheduler = resolve_noise_schedule(config, public) if config.architecture == "diffusion" else None
    # The model
    made_from = dict(source.made_from)
    if config.init is None:
        prior = build_prior(config, source)
        if config.regression is not None:
            made_from["regression"] = compute_weights_fingerprint(prior.regressor)
    else:
        prior = load_init_prior(config, source, public)
        made_from["init"] = compute_weights_fingerprint(prior)
    if config.lora is not None:
        add_adapters(prior, config.lora)
    prior.to(device)

    # Called with the wrapped model; `prior` is the bare one, for its null and its scales
    def loss(model: Module, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of the architecture, and the cosine of z_t and z_i beside it."""
        batch = source.encode(batch)
        text, z_i = batch.text, batch.image_embeds
        assert text is not None and z_i is not None, "a prior is trained on pairs"
        metrics = {"cosine_text": F.cosine_similarity(text.embedding, z_i).mean()}
        match config.architecture:
            case "diffusion":
                return metrics | compute_denoising_loss(config, model, prior, scheduler, text, z_i)
            case "eclipse":
                return metrics | compute_eclipse_loss(config, model, text, z_i)
            case "autoregressive":
                return metrics | compute_autoregressive_loss(config, model, prior, text, z_i)
            case _:
                return metrics | compute_regression_loss(model, prior, text, z_i)

    def export(average: Module) -> None:
        export_adapted_model(average, Path(config.train.output))
        if scheduler is not None:
            save_model_folder(scheduler, Path(config.train.output), "scheduler")

    preview = None
    if config.train.sample_every:
        preview_input = encode_preview_input(source, config.sample)
        previews = TrainingPreviews(config.sample, preview_input, source.clip_facts.identity)
        preview = partial(previews.preview_prior, scheduler=scheduler)
    return Stage(
        model=prior,
        loss=loss,
        dataset=source.dataset,
        export=export,
        made_from=made_from,
        config=asdict(config),
        num_workers=config.data.num_workers,
        groups=open_groups(config.data, source.dataset),
        validation=source.validation,
        preview=preview,
    )


def check_unit_length(config: Config, source: EncodingSource) -> None:
    """Refuse a CLIP whose embeddings have any length, for priors that need length 1."""
    if config.architecture not in PUBLIC_ARCHITECTURES and not source.clip_facts.unit_length:
        raise InputError(
            f"architecture={config.architecture} needs embeddings of unit length, which clip={config.clip!r} does not "
            "make; use diffusion"
        )


def resolve_noise_schedule(config: Config, public: PublicPart | None) -> SchedulerMixin:
    """Return the scheduler of a diffusion prior: that of `init` if it has one, else the configuration's."""
    public_scheduler = None if public is None else public.source.find_folder("prior_scheduler")
    scheduler = resolve_init_scheduler(config.init, config.scheduler, public_scheduler)
    config.check_loss(scheduler)
    return scheduler


def build_prior(config: Config, source: EncodingSource) -> Any:
    """Return a prior with random weights, and the null and the statistics of the data.

    Raises InputError for bad arguments, before the data are read.
    """
    arguments, needed = collect_model_arguments(config), collect_clip_arguments(config, source.clip_facts)
    prior_class = ARCHITECTURES[config.architecture]
    if config.architecture in REGRESSION_KINDS:
        return set_data_statistics(config, build_or_explain(prior_class, "model", arguments, **needed), source)
    needed["null_length"] = source.null().states.shape[1]
    if config.architecture == "diffusion":
        return set_data_statistics(config, build_or_explain(prior_class, "model", arguments, **needed), source)
    # An autoregressive prior, perhaps on top of a regression
    regression = None
    if config.regression is not None:
        regression = load_model(RegressionPrior, config.regression)
        stored, current = regression.config.clip_fingerprint, source.clip_facts.identity
        if stored not in (None, current):
            raise InputError(
                f"regression={config.regression!r} was trained with the CLIP {stored}, this run has {current}"
            )
        arguments |= {"regression": {name: regression.config[name] for name in ("kind", "width", "depth")}}
    # A trial for bad arguments, before all images are encoded
    with torch.device("meta"):
        build_or_explain(prior_class, "model", {"components": 1} | arguments, **needed)
    embeddings = source.collect_embeds()
    components = count_principal_components(embeddings, config.explained_variance)
    prior = build_or_explain(prior_class, "model", {"components": components} | arguments, **needed)
    prior.set_embed_statistics(source.null(), embeddings)
    if regression is not None:
        prior.regressor.load_state_dict(regression.state_dict())
    return prior


def set_data_statistics(config: Config, prior: Any, source: EncodingSource) -> Any:
    """Return a prior, with the null and the statistics of the data set in it."""
    if config.architecture in REGRESSION_KINDS:
        prior.set_embed_statistics(*source.compute_statistics())
    elif config.architecture == "diffusion":
        prior.set_embed_statistics(source.null(), *source.compute_statistics())
    elif config.architecture == "autoregressive":  # ECLIPSE's has none
        prior.set_embed_statistics(source.null(), source.collect_embeds())
    return prior


def load_init_prior(config: Config, source: EncodingSource, public: PublicPart | None) -> Any:
    """Return the prior `init`, with its own null and statistics; one of another CLIP, or public, gets the data's."""
    clip, init = source.clip_facts, str(config.init)
    if public is None:
        prior = load_model(ARCHITECTURES[config.architecture], init)
    else:
        summary = CLIPSummary(clip.embed_dim, clip.text_width, clip.unit_length, source.null())
        prior = load_trainable_prior(public, summary)
    settings, needed = collect_model_arguments(config), collect_clip_arguments(config, clip)
    has_other_clip = prior.config.get("clip_fingerprint") not in (None, clip.identity)
    prior = prepare_init_model(prior, init, settings, **needed)
    return set_data_statistics(config, prior, source) if has_other_clip else prior


def compute_denoising_loss(
    config: Config, model: Module, prior: Prior, scheduler: Any, text: TextEncoding, z_i: Tensor
) -> dict[str, Tensor]:
    """Return the diffusion loss, and the cosine of z_i and its estimate if the prior predicts it directly."""
    condition = drop_condition(text, prior.null(len(text)), config.caption_dropout)
    x = prior.scale_image_embeds(z_i)
    shift, weighting, gamma = config.timestep_shift, config.loss_weighting, config.min_snr_gamma
    logit = (config.logit_mean, config.logit_std)
    metrics, prediction = compute_diffusion_loss(model, scheduler, x, condition, shift, weighting, gamma, logit)
    if get_prediction_type(scheduler) == "sample":
        metrics["cosine"] = F.cosine_similarity(prior.unscale_image_embeds(prediction.detach()), z_i).mean()
    return metrics


def compute_autoregressive_loss(
    config: Config, model: Module, prior: AutoregressivePrior, text: TextEncoding, z_i: Tensor
) -> dict[str, Tensor]:
    """Return the cross-entropy of each code given the true ones before it, in nats a code."""
    codes = prior.quantise_image_embeds(text.embedding, z_i)
    condition = drop_condition(text, prior.null(len(text)), config.caption_dropout)
    inputs = codes
    # In sampling, the codes before are less exact than those of the data.
    if config.code_noise and model.training:
        noise = config.code_noise * prior.config.buckets * torch.randn(codes.shape, device=codes.device)
        inputs = (codes + noise.round().long()).clamp(0, prior.config.buckets - 1)
    logits = model(condition, inputs).float()
    losses = compute_code_cross_entropy(logits, codes, config.label_smoothing if model.training else 0.0)
    # Position 0 is the dot product with z_t; after it come the principal components, the largest first.
    parts = {"loss_dot": losses[:, 0].mean().detach(), "loss_first": losses[:, 1:9].mean().detach()}
    return {"loss": losses.mean(), **parts}


def compute_eclipse_loss(config: Config, model: Module, text: TextEncoding, z_i: Tensor) -> dict[str, Tensor]:
    """Return ECLIPSE's loss (Patel et al. 2023): the squared error of z_i, drawn from noise in one pass, and a weighted
    contrastive term, the cross-entropy by which it finds the z_t of its own caption among those of the batch.
    """
    prediction = model(torch.randn_like(z_i), text).float()
    error = F.mse_loss(prediction, z_i)
    z_t = F.normalize(text.embedding.float(), dim=-1)
    cosines = F.normalize(prediction, dim=-1) @ z_t.T
    # Other images of the same caption are no wrong answers
    own = torch.eye(len(z_t), dtype=torch.bool, device=z_t.device)
    same = z_t @ z_t.T > 1 - 1e-6
    logits = (cosines / CONTRASTIVE_TEMPERATURE).masked_fill(same & ~own, -torch.inf)
    contrast = F.cross_entropy(logits, torch.arange(len(z_t), device=z_t.device))
    cosine = F.cosine_similarity(prediction.detach(), z_i).mean()
    parts = {"error": error.detach(), "contrast": contrast.detach(), "cosine": cosine}
    weight = CONTRASTIVE_WEIGHT if config.contrastive_weight is None else config.contrastive_weight
    return {"loss": error + weight * contrast, **parts}


def compute_regression_loss(
    model: Module, prior: RegressionPrior, text: TextEncoding, z_i: Tensor
) -> dict[str, Tensor]:
    """Return the squared error of the scaled z_i, and the cosine of z_i and its prediction."""
    prediction = model(text).float()
    cosine = F.cosine_similarity(prior.unscale_image_embeds(prediction.detach()), z_i).mean()
    return {"loss": F.mse_loss(prediction, prior.scale_image_embeds(z_i)), "cosine": cosine}


def collect_model_arguments(config: Config) -> dict[str, Any]:
    """Return the model's arguments that the configuration decides."""
    if config.architecture in REGRESSION_KINDS:
        return config.model | {"kind": config.architecture}
    return dict(config.model)


def collect_clip_arguments(config: Config, clip: ClipFacts) -> dict[str, Any]:
    """Return the model's arguments that the CLIP decides."""
    arguments = {"embed_dim": clip.embed_dim, "text_width": clip.text_width, "clip_fingerprint": clip.identity}
    if config.architecture not in REGRESSION_KINDS:
        arguments["context_length"] = clip.context_length
    if config.architecture in PUBLIC_ARCHITECTURES:
        arguments["unit_length"] = clip.unit_length
    return arguments


if __name__ == "__main__":
    run(main, Config, "prior", sys.argv[1:])
