"""What can be seen of a drawing while it is made, and how it is stopped; and the stage that every pipeline has."""

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
    """Previews, `interrupt`, and the upsampler."""

    interrupted = False

    def interrupt(self) -> None:
        """End the call that is going on, from a callback or another thread: its next step raises `Interrupted`."""
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
        """Build what a stage's sampling passes its predictions and steps through, for previews and `interrupt`."""
        seen: dict[str, Tensor] = {}
        steps = count_model_evaluations(scheduler, steps)

        def wrap_predict(predict: Predict) -> Predict:
            def predict_and_record(x: Tensor, t: Tensor) -> Tensor:
                prediction = predict(x, t)
                seen["clean"] = predict_x0(scheduler, prediction, x, t)
                return prediction

            return predict if options.on_preview is None else predict_and_record

        def report_step(step: int, t: Tensor, x: Tensor) -> Tensor:
            if options.on_preview is not None and ((step + 1) % options.preview_every == 0 or step + 1 == steps):
                estimate = to_estimate(x if step + 1 == steps else seen.get("clean", x))
                options.on_preview(Preview(stage, step + 1, steps, estimate, lambda: to_images(estimate)))
            if self.interrupted:
                self.interrupted = False
                raise Interrupted(f"interrupted after step {step + 1} of {steps} of the {stage}")
            return x

        return wrap_predict, report_step

    def upsample_images(
        self,
        pictures: Tensor,
        z_i: Tensor | None,
        options: DecoderOptions,
        generators: list[Generator],
        tile: int = DEFAULT_TILE_SIZE,
    ) -> Tensor:
        """(N, 3, H, W) in [-1, 1], enlarged `options.upsample` times; fp32. `generators` are those of the decoder."""
        assert self.upsampler is not None and self.upsampler_scheduler is not None, "checked before"
        steps, level = options.upsample_steps, options.upsample_level
        for own in iterate_stage_generators(generators, options.upsample):
            sides = [self.upsampler.config.factor * side for side in pictures.shape[-2:]]

            def crop_estimate(x: Tensor, sides: list[int] = sides) -> Tensor:
                return x[..., : sides[0], : sides[1]].clamp(-1, 1)

            transform, on_step = self.build_preview_hooks(
                "upsampler", self.upsampler_scheduler, steps, options, crop_estimate, self.image_processor.postprocess
            )
            sampling = Sampling(steps, own, progress=self.progress_bar, on_step=on_step, transform=transform)
            pictures = sample_upsampler(self.upsampler, self.upsampler_scheduler, pictures, sampling, z_i, level, tile)
            pictures = check_finite_values("upsampler", pictures)
        return pictures


def check_finite_values(stage: str, x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise ValueError(f"the {stage} returned values that are not finite; its weights or the precision are at fault")
    return x
