"""What can be seen of a drawing while it is made, and how it is stopped; and the stage that every pipeline has."""

from collections.abc import Callable

from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from t2i.pipelines.options import DecoderOptions
from t2i.pipelines.progress import Interrupted, Preview
from torch import Generator, Tensor

from t2i.diffusion.denoiser import OnStep, Predict, Wrap
from t2i.diffusion.process import clean
from t2i.diffusion.samplers import evaluations
from t2i.sampling.upsampling import TILE, sample_upsampler, upsampling_generators


class WatchedPipeline(DiffusionPipeline):
    """Previews, `interrupt`, and the upsampler."""

    interrupted = False

    def interrupt(self) -> None:
        """End the call that is going on, from a callback or another thread: its next step raises `Interrupted`."""
        self.interrupted = True

    def watched(
        self,
        stage: str,
        scheduler: SchedulerMixin,
        steps: int,
        options: DecoderOptions,
        to_estimate: Callable[[Tensor], Tensor],
        to_images: Callable[[Tensor], list[Image.Image]],
    ) -> tuple[Wrap, OnStep]:
        """What a stage's sampling passes its predictions and steps through, for previews and `interrupt`."""
        seen: dict[str, Tensor] = {}
        steps = evaluations(scheduler, steps)

        def wrap(predict: Predict) -> Predict:
            def watching(x: Tensor, t: Tensor) -> Tensor:
                prediction = predict(x, t)
                seen["clean"] = clean(scheduler, prediction, x, t)
                return prediction

            return predict if options.on_preview is None else watching

        def report(step: int, t: Tensor, x: Tensor) -> Tensor:
            if options.on_preview is not None and ((step + 1) % options.preview_every == 0 or step + 1 == steps):
                estimate = to_estimate(x if step + 1 == steps else seen.get("clean", x))
                options.on_preview(Preview(stage, step + 1, steps, estimate, lambda: to_images(estimate)))
            if self.interrupted:
                self.interrupted = False
                raise Interrupted(f"interrupted after step {step + 1} of {steps} of the {stage}")
            return x

        return wrap, report

    def upsample(
        self,
        pictures: Tensor,
        z_i: Tensor | None,
        options: DecoderOptions,
        generators: list[Generator],
        tile: int = TILE,
    ) -> Tensor:
        """(N, 3, H, W) in [-1, 1], enlarged `options.upsample` times; fp32. `generators` are those of the decoder."""
        assert self.upsampler is not None and self.upsampler_scheduler is not None, "checked before"
        steps, level = options.upsample_steps, options.upsample_level
        for own in upsampling_generators(generators, options.upsample):
            sides = [self.upsampler.config.factor * side for side in pictures.shape[-2:]]

            def shown(x: Tensor, sides: list[int] = sides) -> Tensor:
                return x[..., : sides[0], : sides[1]].clamp(-1, 1)

            wrap, on_step = self.watched(
                "upsampler", self.upsampler_scheduler, steps, options, shown, self.image_processor.postprocess
            )
            watched = {"progress": self.progress_bar, "on_step": on_step, "wrap": wrap}
            settings = (pictures, own, z_i, steps, level, tile)
            pictures = sample_upsampler(self.upsampler, self.upsampler_scheduler, *settings, **watched)
            pictures = check_finite("upsampler", pictures)
        return pictures


def check_finite(stage: str, x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise ValueError(f"the {stage} returned values that are not finite; its weights or the precision are at fault")
    return x
