"""`t2i push`: what is sent to a hub, what must not leave this machine, and what the hub may answer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from t2i.pipelines.jobs.push import plan_upload, push_folder
from typer.testing import CliRunner

from t2i.cli import app
from t2i.errors import InputError
from tests.helpers.hub import Hub, serve_hub

EMOJI = Path(__file__).parents[3] / "models" / "emoji"
FRONT = "---\nlicense: mit\nlibrary_name: t2i\npipeline_tag: text-to-image\ntags: [unclip]\n---\n"
NAME = "someone/model"
TOKEN = "hf_" + "a" * 34
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of huggingface_hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text(f'{FRONT}# A model\nfrom_pretrained("ORGANISATION/NAME")\n')
    (folder / "config.json").write_text('{"_class_name": "Upsampler"}')
    save_file({"weight": torch.arange(1_000.0)}, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    with serve_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # large files go over HTTP too
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_folder_is_sent_whole_and_privately_and_its_card_names_the_repository(folder, hub: Hub):
    assert push_folder(plan_upload(folder, NAME)) == f"{hub.address}/{NAME}"
    repository = hub.repositories[NAME]
    assert repository["private"]
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected["README.md"] = expected["README.md"].replace(b"ORGANISATION/NAME", NAME.encode())
    assert repository["files"] == expected
    assert f"Bearer {TOKEN}" in hub.tokens
    # Again, after a change
    (folder / "config.json").write_text("{}")
    push_folder(plan_upload(folder, NAME))
    assert repository["files"]["config.json"] == b"{}"


def test_a_repository_is_public_only_if_that_is_said(folder, hub: Hub):
    upload = plan_upload(folder, NAME)
    push_folder(upload, public=True)
    assert not hub.repositories[NAME]["private"]
    with pytest.raises(InputError, match="'someone/model' is public already; give --public"):
        push_folder(upload)
    hub.repositories[NAME]["private"] = True
    with pytest.raises(InputError, match="'someone/model' is private; leave --public out"):
        push_folder(upload, public=True)


def test_what_the_hub_refuses_is_one_line(folder, hub: Hub, monkeypatch):
    upload = plan_upload(folder, NAME)
    for status, expected in ((403, "token needs the right to write"), (401, "token needs"), (413, "status 413")):
        hub.refuse = status
        with pytest.raises(InputError, match=expected) as caught:
            push_folder(upload)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="'someone/model' cannot be pushed: ") as caught:
        push_folder(upload)
    assert "\n" not in str(caught.value)


def test_without_a_token_or_offline_the_hub_is_not_asked(folder, hub: Hub, monkeypatch):
    upload = plan_upload(folder, NAME)
    monkeypatch.setattr("t2i.pipelines.jobs.push.get_token", lambda: None)
    with pytest.raises(InputError, match="no token for the hub; `hf auth login` stores one, or set HF_TOKEN"):
        push_folder(upload)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        push_folder(upload)
    assert hub.tokens == set()


def write(name: str, content: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return change


REFUSED = {
    "a pickle": (write("optimizer.pt", ""), "is a pickle"),
    "a pickle in a folder": (write("prior/diffusion_pytorch_model.bin", ""), "is a pickle"),
    "code": (write("modeling.py", ""), "belongs to no model"),
    "code that is not ours": (write("pipeline.py", "import os"), "is not the code that saving writes"),
    "code that is no text": (
        lambda folder: (folder / "pipeline.py").write_bytes(b"\xff\xfe import os"),
        "is not the code that saving writes",
    ),
    "a log": (write("train.log", ""), "belongs to no model"),
    "a link out": (lambda folder: (folder / "key.json").symlink_to("/etc/hostname"), "is a link out of"),
    "a token": (write("notes.txt", f"x\n{TOKEN}"), "has in line 2 a token of the hub"),
    "a key in the card": (write("README.md", f"{FRONT}sk-{'b' * 40}"), "has in line 7 a key of an API"),
    "a password": (write("a.json", '{"proxy": "http://me:secret@proxy:1"}'), "has in line 1 a password in an address"),
    "a private key": (write("a.txt", "-----BEGIN RSA PRIVATE KEY-----"), "a private key"),
    "no weights in .safetensors": (write("x.safetensors", "no"), "is not a whole safetensors file"),
    "an optimizer": (
        lambda folder: save_file({"0.exp_avg": torch.ones(2)}, folder / "optimizer.safetensors"),
        "holds an optimizer's state",
    ),
    "no card": (lambda folder: (folder / "README.md").unlink(), "has no README.md, its model card"),
    "no front matter": (write("README.md", "# A model"), "does not begin with its front matter"),
    "bad front matter": (write("README.md", "---\na: [\n---\n"), "cannot be read"),
    "a card without fields": (write("README.md", "---\nlicense: mit\n---\n"), "lacks library_name, pipeline_tag, tags"),
    "no model": (lambda folder: (folder / "config.json").unlink(), "neither a model_index.json nor a config.json"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_what_must_not_leave_this_machine_is_refused(change, message, folder, hub: Hub):
    if message.startswith("is not the code"):
        (folder / "model_index.json").write_text('{"_class_name": ["pipeline", "KandinskyV22Pipeline"]}')
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        plan_upload(folder, NAME)
    assert "\n" not in str(caught.value)
    assert hub.tokens == set()


@pytest.mark.parametrize("name", ["model", "a/b/c", "a b/c", "someone/..", "-/x", ""])
def test_names_that_the_hub_does_not_allow_are_refused(name, folder):
    with pytest.raises(InputError):
        plan_upload(folder, name)


def test_a_dry_run_lists_the_shipped_model_and_asks_no_hub(hub: Hub):
    result = CliRunner().invoke(app, ["push", str(EMOJI), NAME, "--dry-run"])
    *files, last = result.stdout.splitlines()
    names = {path.relative_to(EMOJI).as_posix() for path in EMOJI.rglob("*") if path.is_file()}
    assert {line.split()[-1] for line in files} == names
    assert last.endswith("to someone/model, private; nothing was sent")
    assert hub.tokens == set() and hub.repositories == {}


def test_hidden_files_are_left_out_and_named(folder, hub: Hub):
    (folder / ".cache").mkdir()
    (folder / ".cache/token.json").write_text(json.dumps(TOKEN))
    upload = plan_upload(folder, NAME)
    assert [path.name for path in upload.hidden] == ["token.json"]
    assert sorted(upload.files) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]


def test_a_licence_that_is_not_known_is_told(folder, caplog):
    (folder / "README.md").write_text(FRONT.replace("mit", "unknown"))
    plan_upload(folder, NAME)
    assert "the licence of" in caplog.text


@pytest.mark.parametrize(
    "name", ["emoji", "emoji-styles", "emoji-upsampler", "emoji-classifier", "emoji-prior-autoregressive"]
)
def test_the_cards_of_the_shipped_models_are_complete(name):
    plan_upload(EMOJI.with_name(name), NAME)
