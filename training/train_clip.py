"""Train CLIP, an image encoder and a text encoder, on captioned images.

accelerate launch training/train_clip.py configs/emoji/clip.yaml train.steps=1000
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, DistributedType
from open_clip import ClipLoss
from PIL.Image import Image
from t2i.training.common.captions import find_cut_captions, print_cut_captions
from t2i.training.common.effects import COMMON, IdleCases, list_preview_cases
from t2i.training.common.entry import run
from t2i.training.common.finetuning import prepare_init_model
from t2i.training.common.loop import Stage, build_accelerator, fit
from t2i.training.common.picture_bank import PictureBank
from t2i.training.common.preview import SampleConfig, draw_clip_preview, read_fixed_records

from t2i.checks import check_integer, check_required_keys
from t2i.config import DataConfig, TrainConfig, build_or_explain
from t2i.data import Batch, CaptionedPictures, open_datasets
from t2i.data.groups import open_groups
from t2i.errors import InputError
from t2i.files.fingerprints import compute_weights_fingerprint
from t2i.files.known_words import KnownWords
from t2i.files.model_folder import save_model_folder
from t2i.interop.by_name import load_clip
from t2i.networks.clip import CLIP, DEFAULT_RESIZING
from t2i.networks.tokenizer import CaptionTokenizer

# A vocabulary has 256 bytes and special tokens before it has a word.
TEXT_CFG_LIMITS = {"vocab_size": (300, 1_000_000), "context_length": (3, 1024)}


@dataclass
class Config:
    model: dict[str, Any] = field(default_factory=dict)  # open_clip's configuration; vocab_size is an upper bound
    # Folder of a trained CLIP to start from, instead of random weights; or a public one: ViT-L-14:laion2b_s32b_b82k,
    # hf-hub:name, local-dir:path
    init: str | None = None
    preprocess: dict[str, Any] = field(default_factory=dict)  # size, mean, std
    # Train the text tower of `init` alone, and compare each caption with every image of the training split instead of
    # those of its batch. Images that have the caption's phrases are right, by how well the phrases fit them.
    text_only: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)  # previews, every train.sample_every steps
    idle: ClassVar[IdleCases] = {**COMMON, **list_preview_cases(count=())}

    def __post_init__(self) -> None:
        if unknown := set(self.preprocess) - {"size", "mean", "std", *DEFAULT_RESIZING}:
            raise InputError(
                f"preprocess has no {', '.join(sorted(unknown))}; it has size, mean, std, {', '.join(DEFAULT_RESIZING)}"
            )
        if self.text_only and self.init is None:
            raise InputError("text_only=true needs init, a trained CLIP")
        if self.init is not None:  # the model has its own
            return
        check_required_keys("model", self.model, ("embed_dim", "vision_cfg", "text_cfg"))
        check_required_keys("model.text_cfg", self.model["text_cfg"], ("vocab_size", "context_length"))
        for name, (low, high) in TEXT_CFG_LIMITS.items():
            check_integer(f"model.text_cfg.{name}", self.model["text_cfg"][name], low, high)
        check_required_keys("preprocess", self.preprocess, ("size", "mean", "std"))


def main(config: Config) -> None:
    """Train a CLIP on the captioned images of a data folder."""
    datasets = open_datasets(config.data)
    dataset, held_out = datasets["train"], datasets.get("held_out")
    accelerator = build_accelerator(config.train)
    # FSDP cannot shard a single number, such as the scale of the logits.
    if accelerator.distributed_type == DistributedType.FSDP:
        raise InputError("CLIP cannot be trained under FSDP; use configs/accelerate/gpus.yaml (DDP)")
    if config.train.batch_size * accelerator.num_processes == 1:
        raise InputError("train.batch_size must be at least 2 on one process, got 1: CLIP learns to tell images apart")
    clip, tokenizer, made_from = build_clip(config, dataset)
    made_from |= [pictures.add_clip_view(clip, alone=True) for pictures in datasets.values()][0]
    if accelerator.is_local_main_process:
        print_cut_captions(find_cut_captions(dataset, tokenizer))
    # A frozen image tower sees each image once, before the first step
    bank = None
    if config.text_only:
        clip.to(accelerator.device).net.visual.requires_grad_(False)
        bank = PictureBank(clip, dataset, open_groups(config.data, dataset))
        dataset.reads_images = False
    loss = build_loss(accelerator, clip, tokenizer, bank)

    def export(average: torch.nn.Module) -> None:
        average.tokenizer = tokenizer
        average.bound_logit_scale()
        save_model_folder(average, Path(config.train.output))

    records = read_fixed_records(held_out or dataset, config.sample.count if config.train.sample_every else 0)

    def preview(average: torch.nn.Module) -> dict[str, Image]:
        average.tokenizer = tokenizer
        return {"similarity": draw_clip_preview(average, records.image, records.captions)} if records else {}

    stage = Stage(
        model=clip,
        loss=loss,
        dataset=dataset,
        export=export,
        made_from=made_from,
        config=asdict(config),
        num_workers=config.data.num_workers,
        groups=open_groups(config.data, dataset),
        validation=held_out,
        preview=preview,
    )
    fit(accelerator, stage, config.train)


def build_loss(
    accelerator: Accelerator, clip: CLIP, tokenizer: CaptionTokenizer, bank: PictureBank | None
) -> Callable[[torch.nn.Module, Batch], dict[str, torch.Tensor]]:
    """Return the contrastive loss, or with a bank the cross-entropy among all of its images."""
    # Negatives come from all processes
    contrastive_loss = ClipLoss(
        local_loss=True,
        gather_with_grad=True,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )

    def loss(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        clip.bound_logit_scale()
        tokens = tokenizer(batch.captions).to(accelerator.device)
        if bank is not None and model.training:  # held-out images are not in the bank
            _, z_t, scale = model(None, tokens)
            return bank.compute_loss(z_t.float(), scale, batch.phrases) | {"scale": scale}
        z_i, z_t, scale = model(batch.image, tokens)
        z_i, z_t = z_i.float(), z_t.float()
        nearest = (z_t @ z_i.T).argmax(dim=1) == torch.arange(len(z_t), device=z_t.device)
        return {"loss": contrastive_loss(z_i, z_t, scale), "found": nearest.float().mean(), "scale": scale}

    return loss


def build_clip(config: Config, dataset: CaptionedPictures) -> tuple[CLIP, CaptionTokenizer, dict[str, str]]:
    """Return the model and its tokenizer, new or those of `init`, and the identities of what they are made from."""
    made_from = {"data": dataset.compute_digest()}
    if config.init is None:
        text = config.model["text_cfg"]
        tokenizer = CaptionTokenizer.train(dataset.iterate_texts(), text["vocab_size"], text["context_length"])
        tokenizer.known_words = KnownWords.collect(dataset.manifest.iterate_rows("captions", "keywords"))
        text["vocab_size"] = tokenizer.vocab_size
        clip = build_or_explain(CLIP, "model", {"model": config.model, "preprocess": config.preprocess})
        made_from["vocabulary"] = tokenizer.digest()
    else:
        # The configuration's is an upper bound for a new vocabulary; the model has its own.
        config.model.get("text_cfg", {}).pop("vocab_size", None)
        settings = {"model": config.model, "preprocess": config.preprocess}
        clip = prepare_init_model(load_clip(config.init), config.init, settings)
        if not isinstance(clip, CLIP):
            raise InputError(f"init={config.init!r} is the CLIP of a public pipeline, which cannot be trained here")
        tokenizer, made_from["init"] = clip.tokenizer, compute_weights_fingerprint(clip)
        # Where the words of its own captions are not known, those of the new ones alone would be too few
        if (known := tokenizer.known_words) is not None:
            words = KnownWords.collect(dataset.manifest.iterate_rows("captions", "keywords"))
            tokenizer.known_words = known.merge(words)
        # Training changes the weights, and so the identity.
        clip.register_to_config(fingerprint=None, rounded=False)
    return clip, tokenizer, made_from


if __name__ == "__main__":
    run(main, Config, "clip", sys.argv[1:])
