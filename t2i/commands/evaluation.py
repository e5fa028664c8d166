"""What measures: `t2i eval`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from t2i.commands import SHIPPED_MODEL, quality

app = typer.Typer(help="Measure a model.")
app.add_typer(quality.app)


@app.command(name="emoji")
def evaluate_emoji(
    folder: Annotated[Path, Argument(help="What `t2i data emoji` drew.")],
    model: Annotated[str, Option(help="A model folder, or a repository on the hub.")] = str(SHIPPED_MODEL),
    out: Annotated[Path, Option(help="Folder for the figures and contact sheets.")] = Path("out/eval"),
    true_embeddings: Annotated[bool, Option("--true-embeddings", help="Draw each emoji's own embedding.")] = False,
    device: Annotated[str, Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Draw an emoji for its caption: is the nearest of all real emoji the right one?"""
    from t2i.evaluation.emoji import choose_emoji_captions, evaluate_emoji_drawings, open_emoji_dataset
    from t2i.evaluation.results import check_result_folder
    from t2i.pipelines.jobs.generation import load_pipeline

    choose_emoji_captions(open_emoji_dataset(folder)[1])  # complain before the model loads
    check_result_folder(out)
    scores = evaluate_emoji_drawings(load_pipeline(model, device), folder, out, true_embeddings)
    for split in ("train", "held_out"):
        score = scores[split]
        print(
            f"{split}: of {score['captions']} captions, nearest is the very emoji {score['exact']:.1%}, "
            f"the same name up to the modifier {score['same_name']:.1%}"
        )
    print(f"figures and pictures are in {out}")


@app.command(name="prior")
def evaluate_prior(
    cache: Annotated[Path, Argument(help="What `t2i data cache` wrote.")],
    prior: Annotated[str, Option(help="A folder of a trained prior or of a pipeline; none: the text itself.")] = str(
        SHIPPED_MODEL
    ),
    count: Annotated[int, Option(help="Captions of each split, at most.")] = 512,
    steps: Annotated[int, Option(help="Of a diffusion prior.")] = 25,
    guidance_scale: Annotated[float | None, Option(help="1 is off; what is usual for the prior, if left out.")] = None,
    candidates: Annotated[int, Option(help="For each caption; the nearest to it is taken.")] = 2,
    temperature: Annotated[float | None, Option(help="Of an autoregressive prior.")] = None,
    seed: Annotated[int, Option(help="Of the first caption; the next has the next.")] = 0,
    out: Annotated[Path | None, Option(help="A file for the figures.")] = None,
) -> None:
    """How near does a prior come to the image embeddings of the captions? Prints JSON."""
    import json

    from t2i.checks import check_integer, check_range
    from t2i.diffusion.guidance import MAX_GUIDANCE_SCALE
    from t2i.diffusion.sampling_loop import MAX_STEPS
    from t2i.evaluation.priors import evaluate_prior_splits, open_cache_splits
    from t2i.evaluation.results import check_result_file, collect_package_versions, write_result_file
    from t2i.sampling.embeddings import MAX_CANDIDATES, default_guidance_scale, load_prior

    check_integer("count", count, 1, 10_000_000)
    check_integer("steps", steps, 1, MAX_STEPS)
    check_integer("candidates", candidates, 1, MAX_CANDIDATES)
    check_integer("seed", seed, 0, 2**62)
    if guidance_scale is not None:
        check_range("guidance-scale", guidance_scale, 0, MAX_GUIDANCE_SCALE)
    check_range("temperature", 0 if temperature is None else temperature, 0, 10)
    if out is not None:
        check_result_file(out)
    model, scheduler = load_prior(prior)
    model = None if model is None else model.float()
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance": default_guidance_scale(model) if guidance_scale is None else guidance_scale,
        "candidates": candidates,
        "temperature": temperature,
    }
    scores = evaluate_prior_splits(model, scheduler, open_cache_splits(cache, model), count, **settings, seed=seed)
    kind = "none" if model is None else type(model).__name__
    result = {
        "prior": prior,
        "kind": kind,
        **settings,
        "seed": seed,
        "scores": scores,
        "versions": collect_package_versions(),
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        write_result_file(result, out)


@app.command(name="likelihood")
def evaluate_likelihood(
    folder: Annotated[Path, Argument(help="A data folder, as `t2i data check` leaves it.")],
    model: Annotated[str, Option(help="A model folder, or a repository on the hub.")] = str(SHIPPED_MODEL),
    out: Annotated[Path, Option(help="File for the figures.")] = Path("out/eval/likelihood.json"),
    count: Annotated[int, Option("--count", "-n", help="Pictures of each split.")] = 32,
    terms: Annotated[int, Option(help="Of the bound, evaluated at random times.")] = 100,
    steps: Annotated[int, Option(help="Of the ODE.")] = 25,
    seed: Annotated[int, Option(help="Of the first picture; the next has the next.")] = 0,
    stage: Annotated[list[str] | None, Option(help="prior, decoder; both if left out.")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Bits per dimension of the true latents and embeddings: the variational bound and the ODE's likelihood."""
    from t2i.evaluation.likelihood import MEASURED_STAGES, SPLITS, check_likelihood_settings, evaluate_model_likelihood
    from t2i.pipelines.jobs.generation import load_pipeline

    stages = tuple(stage or MEASURED_STAGES)
    check_likelihood_settings(out, count, terms, steps, seed, stages)
    result = evaluate_model_likelihood(load_pipeline(model, device), folder, out, count, terms, steps, seed, stages)
    for split in SPLITS:
        for name, figures in result[split].items():
            bound, ode, normal = (figures[key] for key in ("bound", "ode", "gaussian"))
            print(
                f"{split}, {name} ({figures['dimensions']} dimensions): bound {bound['bits']:.3f} "
                f"+- {bound['standard_error']:.3f}, ODE {ode['bits']:.3f} +- {ode['standard_error']:.3f}, "
                f"N(0, 1) {normal['bits']:.3f} bits per dimension"
            )
    print(f"the figures are in {out}")
