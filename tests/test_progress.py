"""The progress of long commands: what stands on a terminal and in a log, when, and how long is left."""

import io
import logging
import os
import subprocess
import sys

import pytest
import torch
from t2i.pipelines.jobs.planning import ModelSource, load_pipeline

from t2i import progress, terminal
from t2i.errors import InputError
from t2i.progress import Progress, follow_batch, follow_steps, format_status
from tests.commands.test_cli import QUICK, run


class Clock:
    """A clock that a test turns."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Screen(io.TextIOWrapper):
    """A terminal of one line: `shown` is every text that stood in it, `kept` what was ended with a line break."""

    def __init__(self, encoding: str = "utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def written(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)

    @property
    def shown(self) -> list[str]:
        return [text.rstrip() for text in self.written.split("\r") if text.strip()]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("T2I_QUIET", raising=False)
    monkeypatch.setattr(terminal, "status", "")
    return clock


@pytest.fixture
def use_screen(monkeypatch, clock):
    """A function that makes standard error a terminal; called in the test, for pytest replaces it before."""

    def use(encoding: str = "utf-8") -> Screen:
        monkeypatch.setattr(sys, "stderr", screen := Screen(encoding))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(progress, "find_terminal_columns", lambda: 80)
        monkeypatch.setattr(progress, "STATUS_INTERVAL", 0)
        return screen

    return use


def draw(clock: Clock, batches: list[int], prior: float = 1.0, decoder: float = 4.0, pause: float = 0.0) -> None:
    """Draw batches, whose prior takes 5 steps and whose decoder 10, of so many seconds each."""
    with Progress("drawing", sum(batches)):
        for count in batches:
            with follow_batch(count):
                for _ in follow_steps("prior", range(5)):
                    clock.now += prior
                for _ in follow_steps("decoder", range(10)):
                    clock.now += decoder
            clock.now += pause


def test_a_terminal_shows_pictures_steps_and_the_time_that_is_left(clock, use_screen):
    screen = use_screen()
    draw(clock, [4, 4])
    shown = [text.split("] ")[1] for text in screen.shown[:-1]]
    assert shown[:2] == ["0/8 images", "0/8 images, prior step 1/5"]  # the prior tells nothing of the decoder
    # Of 5 + 40 s for each batch: after 5 + 8 s, 32 s of the first are left, and the second
    assert shown[8] == "0/8 images, decoder step 3/10, 1 min left" and 32 + 45 == 77
    assert shown[16:18] == ["4/8 images, 45 s left", "4/8 images, prior step 1/5, 45 s left"]
    assert shown[-2:] == ["4/8 images, decoder step 10/10, 4 s left", "8/8 images"]
    assert screen.shown[-1] == "drawing: 8 of 8 images in 2 min\n".rstrip() and screen.written.endswith("min\n")
    bars = [text.split("]")[0].count("█") for text in screen.shown[:-1]]
    assert bars == sorted(bars) and bars[0] == 0 and bars[16] == 10 and bars[-1] == 20


def test_a_short_job_leaves_nothing_behind(clock, use_screen):
    screen = use_screen()
    draw(clock, [1], 0.1, 0.2)
    assert screen.written.endswith("\r") and not screen.written.split("\r")[-2].strip()


def test_a_log_gets_a_line_at_most_every_ten_seconds_or_tenth_of_the_whole(monkeypatch, capsys, clock):
    draw(clock, [1] * 4, 0.0, 0.1)
    assert capsys.readouterr().err == ""  # four seconds in all
    draw(clock, [1] * 2, 1.0, 4.0)
    lines = capsys.readouterr().err.splitlines()
    assert 5 <= len(lines) <= 10 and lines[0] == "drawing: 0 of 2 images, decoder step 3 of 10, 1 min left"
    assert lines[-1] == "drawing: 2 of 2 images in 2 min"
    draw(clock, [1] * 1000, 0.0, 10.0)
    lines = capsys.readouterr().err.splitlines()
    assert 1500 <= len(lines) <= 1700  # a line a minute, of 100,000 s
    assert lines[-2].endswith(" left") or "1,000 of 1,000" in lines[-2]


@pytest.mark.parametrize(("name", "value"), [("RANK", "1"), ("T2I_QUIET", "1")])
def test_other_processes_and_quiet_ones_show_nothing(monkeypatch, clock, use_screen, name, value):
    screen = use_screen()
    monkeypatch.setenv(name, value)
    draw(clock, [1, 1])
    assert screen.written == ""


def test_a_dumb_terminal_gets_lines_as_a_log_does(monkeypatch, clock, use_screen):
    screen = use_screen()
    monkeypatch.setenv("TERM", "dumb")
    draw(clock, [1, 1])
    assert "\r" not in screen.written and screen.written.splitlines()[-1] == "drawing: 2 of 2 images in 2 min"


def test_a_terminal_without_unicode_gets_an_ascii_bar(clock, use_screen):
    screen = use_screen("ascii")
    draw(clock, [1, 1])
    assert any("[##########..........] 1/2" in text for text in screen.shown)


@pytest.mark.parametrize("columns", [100, 60, 40, 30, 12])
def test_a_line_fits_its_terminal_and_keeps_the_count_and_the_time(columns):
    parts = ["128/512 images", "super-resolution step 12/50", "loss=0.5", "12 min left"]
    text = format_status("drawing", 0.5, parts, columns)
    assert len(text) < columns
    if columns >= 40:
        assert "128/512 images" in text and "12 min left" in text
    assert ("super-resolution" in text) == (columns >= 70) or columns == 60
    assert terminal.count_columns("模型 a") == 6 and format_status("loading", None, [], 40) == "loading"


def test_results_and_log_records_stand_above_the_status_line(monkeypatch, clock, use_screen):
    screen = use_screen()
    monkeypatch.setattr(sys, "stdout", screen)
    with Progress("drawing", 3) as drawing:
        terminal.print_line("out/a.png")
        assert screen.written.split("\r")[-1].startswith("drawing [")  # shown again
        assert "out/a.png\n" in screen.written.split("\r")
        terminal.make_output_safe()
        record = logging.LogRecord("t2i.test", logging.WARNING, "", 1, "memory is short", (), None)
        logging.lastResort.handle(record)
        assert screen.written.split("\r")[-1] == "memory is short\n"
        clock.now += 1
        drawing.update()
        assert "1/3 images" in screen.written.split("\r")[-1]


def test_a_job_that_fails_removes_its_line_and_tells_how_far_it_came(clock, use_screen):
    screen = use_screen()
    with pytest.raises(InputError), Progress("checking", 3) as checking:
        for number in checking.iterate(range(3)):
            clock.now += 20
            if number == 1:
                raise InputError("broken")
    assert screen.shown[-1] == "checking: 1 of 3 images in 40 s" and terminal.status == ""
    assert progress.current is None


def test_a_terminal_that_has_gone_ends_no_job(monkeypatch, clock, use_screen):
    screen = use_screen()

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(screen, "write", fail)
    with Progress("drawing", 1) as drawing:
        drawing.update()


def test_a_job_of_unknown_length_counts(clock, use_screen):
    screen = use_screen()
    with Progress("checking") as checking:
        for _ in checking.iterate(range(1500)):
            clock.now += 0.001
    assert (screen.shown[0], screen.shown[-1]) == ("checking", "checking: 1,500 images")
    with Progress("checking", 1) as checking:  # a total that was about right
        for _ in checking.iterate(range(2)):
            pass
    assert screen.shown[-1].endswith("] 2 images")


def test_the_bars_of_a_pipeline_work_in_python_and_its_steps_are_followed_in_a_job(
    monkeypatch, capsys, pipeline, clock
):
    call = {"num_inference_steps": 3, "prior_num_inference_steps": 2, "output_type": "latent"}
    pipeline.set_progress_bar_config(disable=False, desc="mine", ascii=True)
    pipeline("red circle", **call)
    err = capsys.readouterr().err
    assert "mine: 100%|##########| 2/2" in err and "mine: 100%|##########| 3/3" in err
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    with Progress("drawing", 1) as drawing:
        monkeypatch.setattr(drawing, "refresh", lambda: seen.append(drawing.stage and drawing.stage[:3]))
        with follow_batch(1):
            pipeline("red circle", **call)
    stages = [("prior", i, 2) for i in (1, 2)] + [("decoder", i, 3) for i in (1, 2, 3)]
    assert seen == [None, *stages, None] and drawing.done == 1


def test_pictures_do_not_depend_on_who_watches(pipeline, clock, use_screen):
    screen = use_screen()
    call = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "latent"}
    alone = pipeline("red circle", generator=torch.Generator().manual_seed(0), **call).images
    with Progress("drawing", 1):
        watched = pipeline("red circle", generator=torch.Generator().manual_seed(0), **call).images
    assert torch.equal(alone, watched) and "prior step 1/2" in screen.written


def test_loading_shows_one_line_and_none_of_diffusers(capfd, pipeline_folder, use_screen):
    from diffusers.utils import logging as diffusers_logging

    load_pipeline(ModelSource(str(pipeline_folder), device="cpu"))
    assert capfd.readouterr().err == "" and diffusers_logging.is_progress_bar_enabled()
    screen = use_screen()
    load_pipeline(ModelSource(str(pipeline_folder), device="cpu"))
    assert screen.shown == [f"loading {pipeline_folder.name}"]


@pytest.mark.parametrize("before", [True, False])
def test_quiet_prints_results_and_errors_only(monkeypatch, capsys, pipeline_folder, tmp_path, before):
    for name in terminal.QUIET_ENVIRONMENT:
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(logging.lastResort, "level", logging.WARNING)
    (tmp_path / "prompts.txt").write_text("red circle\n")
    words = ["--prompts", tmp_path / "prompts.txt", "--model", pipeline_folder, "--out", tmp_path / "out", *QUICK]
    quiet = ["--quiet", "generate", *words] if before else ["generate", *words, "-q"]
    status, out, err = run(monkeypatch, capsys, *quiet)
    assert (status, err) == (0, "") and out == f"{tmp_path / 'out' / 'red-circle-0.png'}\n"
    assert os.environ["T2I_QUIET"] == "1"  # for the processes that a command starts
    status, out, err = run(monkeypatch, capsys, *quiet)  # a warning, that the image is there, is not printed
    assert (status, out, err) == (0, "", "")
    status, out, err = run(monkeypatch, capsys, *quiet, "--steps", "0")
    assert status == 2 and err.startswith("error: num_inference_steps")


def test_every_command_takes_quiet():
    from typer.main import get_command

    from t2i.cli import app, list_commands_below

    commands = list(list_commands_below(get_command(app)))
    assert len(commands) > 20
    assert [command.name for command in commands if all("--quiet" not in p.opts for p in command.params)] == []


def test_the_progress_costs_no_import_of_torch():
    code = "import sys, t2i.progress; assert not {'torch', 'tqdm', 'diffusers'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_commands_of_minutes_count_what_they_do(monkeypatch, capsys, pipeline_folder, shapes, tmp_path):
    closed = []
    monkeypatch.setattr(Progress, "close", lambda self: closed.append((self.what, self.done, self.total, self.unit)))
    pictures = sorted(shapes.glob("*.png"))[:2]
    model = ["--model", pipeline_folder, "--out", tmp_path / "out", "--steps", 2]
    clip = ["--clip", pipeline_folder / "clip"]
    drawing = ("drawing", 2, 2, "images")
    commands = {
        ("generate", "red circle", "blue square", *model): [drawing],
        ("variations", *pictures, *model): [drawing],
        ("image-to-image", pictures[0], "--count", 2, *model): [drawing],
        ("interpolate", *pictures, "--frames", 3, "--video", tmp_path / "a.gif", *model): [
            ("drawing", 3, 3, "frames"),
            ("writing the video", 3, 3, "frames"),
        ],
        ("classify", *pictures, "--labels", "red,blue", *clip): [("embedding", 2, 2, "images")],
        ("data", "check", shapes, "--out", tmp_path / "checked"): [("checking", 36, 36, "images")],
    }
    for words, expected in commands.items():
        closed.clear()
        status, _, err = run(monkeypatch, capsys, *words)
        assert status == 0, err
        assert [one for one in closed if not one[0].startswith("loading")] == expected, words


def test_a_command_writes_its_results_alone_to_standard_output(
    monkeypatch, capsys, use_screen, pipeline_folder, tmp_path
):
    screen = use_screen()
    words = ["generate", "red circle", "blue square", "--batch-size", 1, "--seed", 0, "--steps", 2]
    status, out, _ = run(monkeypatch, capsys, *words, "--model", pipeline_folder, "--out", tmp_path)
    assert status == 0 and out.splitlines() == [str(tmp_path / f"{n}.png") for n in ("red-circle-0", "blue-square-1")]
    assert screen.shown[0] == f"loading {pipeline_folder.name}" and any("1/2 images" in text for text in screen.shown)
    assert any("decoder step 2/2" in text for text in screen.shown) and screen.written.endswith("\r")
