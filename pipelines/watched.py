"""Previews and interruption of a drawing, and the upsampler, which every pipeline has."""

from collections.abc import Callable

from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image
from t2i.pipelines.options import DecoderOptions
from t2i.pipelines.progress import Interrupted, Preview
from torch import Generator, Tensor

from t2i.diffusion.denoiser import Predict, PredictTransform, StepCallback
from t2i.diffusion.process import predict_x0
from t2i.diffusion.samplers import count_model_evaluations
from t2i.diffusion.sampling_loop import Sampling
from t2i.sampling.upsampling import DEFAULT_TILE_SIZE, iterate_stage_generators, sample_upsampler


class WatchedPipeline(DiffusionPipeline):
    """Base with previews, `interrupt`, and the upsampler."""

    interrupted = False

    def interrupt(self) -> None:
        """End the running call, from a callback or another thread: its next step raises `Interrupted`."""
        self.interrupted = True

    def build_preview_hooks(
        self,
        stage: str,
        scheduler: SchedulerMixin,
        steps: int,
        options: DecoderOptions,
        to_estimate: Callable[[Tensor], Tensor],
        to_images: Callable[[Tensor], list[Image.Image]],
    ) -> tuple[PredictTransform, StepCallback]:
        """Return the transform and the callback of a stage's sampling that make previews and `interrupt` work.

        to_estimate: from x to the estimate of a `Preview`. to_images: from the estimate to images.
        """
        last_x0: dict[str, Tensor] = {}
        steps = count_model_evaluations(scheduler, steps)

        def record_predictions(predict: Predict) -> Predict:
            def predict_and_record(x: Tensor, t: Tensor) -> Tensor:
                prediction = predict(x, t)
                last_x0["x0"] = predict_x0(scheduler, prediction, x, t)
                return prediction

            return predict if options.on_preview is None else predict_and_record

        def report_step(step: int, t: Tensor, x: Tensor) -> Tensor:
            if options.on_preview is not None and ((step + 1) % options.preview_every == 0 or step + 1 == steps):
                estimate = to_estimate(x if step + 1 == steps else last_x0.get("x0", x))
                options.on_preview(Preview(stage, step + 1, steps, estimate, lambda: to_images(estimate)))
            if self.interrupted:
                self.interrupted = False
                raise Interrupted(f"interrupted after step {step + 1} of {steps} of the {stage}")
            return x

        return record_predictions, report_step

    def upsample_images(
        self,
        images: Tensor,
        z_i: Tensor | None,
        options: DecoderOptions,
        generators: list[Generator],
        tile: int = DEFAULT_TILE_SIZE,
    ) -> Tensor:
        """Enlarge images, (N, 3, H, W) in [-1, 1], `options.upsample` times; fp32. generators: of the decoder."""
        assert self.upsampler is not None and self.upsampler_scheduler is not None, "checked before"
        steps, level = options.upsample_steps, options.upsample_level
        for own in iterate_stage_generators(generators, options.upsample):
            sides = [self.upsampler.config.factor * side for side in images.shape[-2:]]

            def crop_estimate(x: Tensor, sides: list[int] = sides) -> Tensor:
                return x[..., : sides[0], : sides[1]].clamp(-1, 1)

            transform, on_step = self.build_preview_hooks(
                "upsampler", self.upsampler_scheduler, steps, options, crop_estimate, self.image_processor.postprocess
            )
            sampling = Sampling(steps, own, progress=self.progress_bar, on_step=on_step, transform=transform)
            images = sample_upsampler(self.upsampler, self.upsampler_scheduler, images, sampling, z_i, level, tile)
            images = check_finite_values("upsampler", images)
        return images


def check_finite_values(stage: str, x: Tensor) -> Tensor:
    """Return x. Raises ValueError for NaN or infinity."""
    if not x.isfinite().all():
        raise ValueError(f"the {stage} returned values that are not finite; its weights or the precision are at fault")
    return x
