"""Commands that measure models: `t2i eval`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from t2i.commands import SHIPPED_MODEL, flags, quality
from t2i.commands.flags import argument, option
from t2i.progress import show_loading
from t2i.terminal import print_line, print_note

app = typer.Typer(help="Evaluate models and drawn images.")
app.add_typer(quality.app)


@app.command(name="emoji")
def evaluate_emoji(
    folder: Annotated[Path, argument("Folder that `t2i data emoji` wrote.")],
    model: flags.Model = str(SHIPPED_MODEL),
    out: Annotated[Path, option("Folder for the results and contact sheets.")] = Path("out/eval"),
    samples: Annotated[
        int | None,
        option("Number of captions of each kind, keywords and words.", "200, all that are held out, 50 of each kind"),
    ] = None,
    device: flags.Device = "auto",
) -> None:
    """Draw emoji for captions and words, and print scores: each stage by kind of emoji, and how many words are right.

    Each image is compared with all real emoji by colours and edges: it is right if the nearest is its caption's.
    The perceptual distance needs the extra `judge`. The words are in `t2i/evaluation/emoji/words.json`.
    """
    from t2i.checks import check_integer
    from t2i.evaluation.emoji.drawings import evaluate_emoji_drawings, format_emoji_scores
    from t2i.evaluation.emoji.measures import load_perceptual_judge
    from t2i.evaluation.emoji.real_emoji import RealEmoji
    from t2i.evaluation.results import check_result_folder
    from t2i.pipelines import TextDiffPipeline
    from t2i.pipelines.jobs.planning import ModelSource, load_pipeline

    # Complain before the model loads
    if samples is not None:
        check_integer("samples", samples, 1, 1_000_000)
    RealEmoji(folder)
    check_result_folder(out)
    judge = load_perceptual_judge()

    # Draw and report
    pipeline: Any = load_pipeline(ModelSource(model, device=device))
    differ = TextDiffPipeline.from_pipe(pipeline)
    scores = evaluate_emoji_drawings(pipeline, folder, out, samples, judge, differ)
    print("\n".join(format_emoji_scores(scores)))
    if judge is None:
        print_note("the perceptual distance is left out; pip install 't2i[judge]' adds it")
    print_line(f"results and images: {out}")


@app.command(name="prior")
def evaluate_prior(
    cache: Annotated[Path, argument("Cache that `t2i data cache` wrote.")],
    prior: Annotated[
        str, option("Folder of a prior or a pipeline; none evaluates the text embeddings themselves.", "models/emoji")
    ] = str(SHIPPED_MODEL),
    count: Annotated[int, option("Largest number of captions from each split.")] = 512,
    steps: Annotated[int | None, option("Denoising steps of a diffusion prior.", "the prior's")] = None,
    guidance_scale: Annotated[float | None, option("Guidance scale. 1 turns guidance off.", "the prior's")] = None,
    candidates: Annotated[int, option("Embeddings sampled for each caption, to use the nearest to it.")] = 2,
    temperature: Annotated[float | None, option("Temperature of an autoregressive prior.", "the prior's")] = None,
    seed: Annotated[int, option("Seed of the first caption. Each further caption adds 1.")] = 0,
    out: Annotated[Path | None, option("Also write the results to this JSON file.")] = None,
) -> None:
    """Compare a prior's embeddings with the image embeddings of the captions, and print the results as JSON."""
    from t2i.checks import check_integer, check_range
    from t2i.diffusion.guidance import MAX_GUIDANCE_SCALE
    from t2i.diffusion.sampling_loop import MAX_STEPS, Sampling
    from t2i.evaluation.priors import evaluate_prior_splits, open_cache_splits
    from t2i.evaluation.results import check_result_file, collect_package_versions, write_result_file
    from t2i.sampling.embeddings import MAX_CANDIDATES, get_default_guidance_scale, get_default_steps, load_prior

    # Before the model loads
    check_integer("count", count, 1, 10_000_000)
    if steps is not None:
        check_integer("steps", steps, 1, MAX_STEPS)
    check_integer("candidates", candidates, 1, MAX_CANDIDATES)
    check_integer("seed", seed, 0, 2**62)
    if guidance_scale is not None:
        check_range("guidance-scale", guidance_scale, 0, MAX_GUIDANCE_SCALE)
    if temperature is not None:
        check_range("temperature", temperature, 0, 10)
    if out is not None:
        check_result_file(out)

    # Measure
    with show_loading(prior):
        model, scheduler = load_prior(prior)
    model = None if model is None else model.float()
    warn_of_idle_settings(model, steps=steps, candidates=candidates, guidance=guidance_scale, temperature=temperature)
    settings: dict[str, Any] = {
        "steps": get_default_steps(model) if steps is None else steps,
        "guidance": get_default_guidance_scale(model) if guidance_scale is None else guidance_scale,
        "candidates": candidates,
        "temperature": temperature,
    }
    sampling = Sampling(settings["steps"], guidance=settings["guidance"])
    splits = open_cache_splits(cache, model)
    scores = evaluate_prior_splits(model, scheduler, splits, sampling, count, candidates, temperature, seed)

    # Report
    kind = "none" if model is None else type(model).__name__
    result = {"prior": prior, "kind": kind, **settings, "seed": seed, "scores": scores}
    result["versions"] = collect_package_versions()
    print(json.dumps(result, indent=1))
    if out is not None:
        write_result_file(result, out)


def warn_of_idle_settings(
    prior: Any, steps: int | None, candidates: int, guidance: float | None, temperature: float | None
) -> None:
    """Print which settings have no effect: all without a prior, and some on priors that do not denoise in steps.

    Guidance and temperature are named where such a prior samples.
    """
    from t2i.networks.regression_prior import RegressionPrior

    # 2 is the command's default: another number was given
    idle = {
        "steps": steps is not None and (prior is None or not prior.needs_scheduler),
        "candidates": candidates != 2 and (prior is None or isinstance(prior, RegressionPrior)),
        "guidance-scale": guidance is not None and prior is None,
        "temperature": temperature is not None and prior is None,
    }
    kind = "without a prior" if prior is None else f"on a {type(prior).__name__}"
    for name in (name for name, is_idle in idle.items() if is_idle):
        print_note(f"warning: --{name} has no effect {kind}", sys.stderr)


@app.command(name="likelihood")
def evaluate_likelihood(
    folder: Annotated[Path, argument("Data folder with a manifest; `t2i data check` writes one.")],
    model: flags.Model = str(SHIPPED_MODEL),
    out: Annotated[Path, option("JSON file for the results.")] = Path("out/eval/likelihood.json"),
    count: Annotated[int, option("Images from each split.", None, "--count", "-n")] = 32,
    terms: Annotated[int, option("Terms of the variational bound, evaluated at random timesteps.")] = 100,
    steps: Annotated[int, option("Steps of the ODE solver.")] = 25,
    seed: Annotated[int, option("Seed of the first image. Each further image adds 1.")] = 0,
    stage: Annotated[
        list[str] | None,
        option(
            "Stage to evaluate: prior or decoder. Repeatable.", "both", metavar="STAGE", choices=("prior", "decoder")
        ),
    ] = None,
    device: flags.Device = "auto",
) -> None:
    """Compute bits per dimension of true latents and embeddings, by the variational bound and by the ODE."""
    from t2i.evaluation.likelihood import MEASURED_STAGES, SPLITS, LikelihoodSettings, evaluate_model_likelihood
    from t2i.evaluation.results import check_result_file
    from t2i.pipelines.jobs.planning import ModelSource, load_pipeline

    # Check settings and file before the model loads
    settings = LikelihoodSettings(count, terms, steps, seed, tuple(stage or MEASURED_STAGES))
    check_result_file(out)
    pipeline: Any = load_pipeline(ModelSource(model, device=device))
    result = evaluate_model_likelihood(pipeline, folder, out, settings)

    for split in SPLITS:
        for name, figures in result[split].items():
            bound, ode, normal = (figures[key] for key in ("bound", "ode", "gaussian"))
            print(
                f"{split}, {name} ({figures['dimensions']} dimensions): bound {bound['bits']:.3f} "
                f"+- {bound['standard_error']:.3f}, ODE {ode['bits']:.3f} +- {ode['standard_error']:.3f}, "
                f"N(0, 1) {normal['bits']:.3f} bits per dimension"
            )
    print_line(f"results: {out}")
