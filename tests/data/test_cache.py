"""Caches: the same numbers as encoding on the fly, whole or made again, and never those of other models or data."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from t2i.training import cache_data
from t2i.training.common.checkpoint import Checkpoint, find_newest_checkpoint, load_checkpoint
from t2i.training.common.encodings import FrozenModels, open_encodings

from t2i.config import DataConfig, load_config
from t2i.data import CaptionedPictures
from t2i.data.cache import CachedPairs, compute_statistics, pad_tokens, strip_padding, write_shard
from t2i.data.manifest import write_manifest
from t2i.diffusion.condition import TextEncoding
from t2i.errors import InputError
from t2i.files.fingerprints import compute_stored_fingerprint, compute_weights_fingerprint
from t2i.interop.by_name import load_autoencoder, load_clip
from tests.helpers.processes.forked import ForkedProgram, run_program
from tests.helpers.stages import CONFIGS, train

ROOT = Path(__file__).resolve().parents[2]
PASSING = ("config.yaml", "run.lock")  # of a cache, that say who made it
KEYS = [(31, 2), (0, 0), (7, 3), (6, 1), (31, 0), (12, 2), (5, 3)]  # in five shards, out of order, one twice
STAGES = {"prior": ("clip",), "decoder": ("clip", "autoencoder")}


def arguments(data: Path, runs: Path, output: Path, **overrides: object) -> list[str]:
    settings = {"data.path": data, "output": output, "clip": runs / "clip", "autoencoder": runs / "autoencoder"}
    settings |= {"shard_size": 6, "batch_size": 4, "dtype": "float32"} | overrides
    return [str(CONFIGS / "tiny/cache.yaml"), *(f"{key}={value}" for key, value in settings.items())]


def make(data: Path, runs: Path, output: Path, **overrides: object) -> Path:
    cache_data.main(load_config(cache_data.Config, "cache", arguments(data, runs, output, **overrides)))
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in PASSING}


@pytest.fixture(scope="session")
def finished(shapes: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(shapes, runs, tmp_path_factory.mktemp("caches") / "finished")


@pytest.fixture
def cache(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "cache"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 4e-3)])
def test_a_batch_from_the_cache_equals_encoding_on_the_fly(dtype, tolerance, shapes, runs, tmp_path):
    data = DataConfig(str(shapes), 32, 0)
    models = FrozenModels(data, str(runs / "clip"), str(runs / "autoencoder"), reads_captions=True)
    expected = models.encode(models.dataset.__getitems__(KEYS))
    pairs = CachedPairs(make(shapes, runs, tmp_path / "cache", dtype=dtype))
    batch = pairs.__getitems__(KEYS)
    assert batch.index.equal(expected.index)
    torch.testing.assert_close(batch.image_embeds, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.latents, expected.latents, atol=tolerance, rtol=0)
    assert batch.text.mask.equal(expected.text.mask)
    torch.testing.assert_close(batch.text.embedding, expected.text.embedding, atol=1e-5, rtol=0)
    there = expected.text.mask[..., None]
    torch.testing.assert_close(batch.text.states, expected.text.states * there, atol=tolerance, rtol=0)
    assert batch.latents.std() > 0.1 and batch.text.states.std() > 0.1  # the tolerance is small beside the values


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is mapped")
def test_embeddings_and_latents_are_read_where_the_file_is_mapped(finished):
    """A shard is not copied: its tensors lie in the pages of the file, and a batch copies its own rows alone."""
    pairs = CachedPairs(finished)
    batch = pairs.__getitems__([(0, 0), (1, 0)])
    shard = pairs.open_shard(0)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if pairs.paths[0].name in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for name in ("image_embeds", "latents", "text_states"):
        first, size = shard[name].data_ptr(), shard[name].nbytes
        assert any(start <= first and first + size <= end for start, end in ranges), name
    for tensor in (batch.image_embeds, batch.latents):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # two rows, not the shard


def test_every_draw_of_a_picture_has_the_caption_of_that_draw_and_more_draws_begin_anew(shapes, runs, finished):
    dataset, pairs = CaptionedPictures(DataConfig(str(shapes), 32, 0)), CachedPairs(finished)
    clip = load_clip(runs / "clip").eval()
    captions = [dataset.get_caption(9, draw) for draw in range(4)]
    assert len(set(captions)) > 2
    with torch.no_grad():
        expected = torch.cat([clip.encode_text([caption]).embedding for caption in captions])
    found = pairs.__getitems__([(9, draw) for draw in range(8)]).text.embedding
    torch.testing.assert_close(found, expected.repeat(2, 1), atol=1e-5, rtol=0)
    assert (expected[:, None] - expected).abs().amax(dim=-1).max() > 1e-3


def test_both_splits_stand_side_by_side_with_the_names_of_their_pictures(shapes, finished):
    data = DataConfig(str(shapes), 32, 0)
    for split, count in (("train", 32), ("held_out", 4)):
        pairs, dataset = CachedPairs(finished, split), CaptionedPictures(data, split)
        assert len(pairs) == count == len(dataset)
        assert [pairs.get_sample_key(i) for i in range(count)] == [dataset.get_sample_key(i) for i in range(count)]
    assert CachedPairs(finished).compute_digest() != CachedPairs(finished, "held_out").compute_digest()
    with pytest.raises(InputError, match="no split 'test'; it has train, held_out"):
        CachedPairs(finished, "test")


def test_trimmed_encodings_restore_exactly():
    lengths = torch.tensor([3, 1, 0, 5])
    mask = torch.arange(5) < lengths[:, None]
    text = TextEncoding(torch.randn(4, 2), torch.randn(4, 5, 3) * mask[..., None], mask)
    states, counts = strip_padding(text)
    assert states.shape == (9, 3) and counts.equal(lengths)
    restored = pad_tokens(states, counts)
    assert torch.equal(restored.states, text.states) and torch.equal(restored.mask, text.mask)


def test_statistics_and_the_empty_caption_are_those_of_the_training_split(runs, finished):
    pairs = CachedPairs(finished)
    embeds = pairs.__getitems__([(i, 0) for i in range(32)]).image_embeds.numpy().astype(np.float64)
    np.testing.assert_allclose(pairs.shared["mean"].numpy(), embeds.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(pairs.shared["std"].numpy(), embeds.std(axis=0), rtol=1e-8)
    with torch.no_grad():
        null = load_clip(runs / "clip").eval().encode_text([""])
    assert all(torch.equal(getattr(pairs.null, name), getattr(null, name)) for name in ("embedding", "states", "mask"))


def test_statistics_keep_their_precision_where_the_mean_is_far_from_zero():
    values = np.random.default_rng(0).normal(5.0, 1e-3, (10_000, 3)).astype(np.float32)
    mean, std = compute_statistics(torch.from_numpy(part) for part in np.array_split(values, 7))
    np.testing.assert_allclose(mean.numpy(), values.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std.numpy(), values.astype(np.float64).std(axis=0), rtol=1e-6)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(shapes, runs, finished, tmp_path):
    folder = tmp_path / "cache"
    command = [ROOT / "training/cache_data.py", *arguments(shapes, runs, folder)]
    # Images that are read slowly make sure that shards are missing when the signal comes.
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import PIL.Image, runpy, sys, time\nread = PIL.Image.open\n"
        "def late(*given, **more):\n    time.sleep(0.02)\n    return read(*given, **more)\nPIL.Image.open = late\n"
        "del sys.argv[0]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    process = ForkedProgram([slow, *command])
    deadline = time.monotonic() + 120
    while not (folder / "train-00001.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "cache.json").exists() and len(list(folder.glob("*.safetensors"))) < 6
    with pytest.raises(InputError, match="is not finished; `t2i data cache .*config.yaml output=.*` finishes it"):
        train("prior", shapes, tmp_path, cache=folder, clip=runs / "clip")
    kept = (folder / "train-00000.safetensors").stat().st_mtime_ns
    assert run_program(command).returncode == 0
    assert contents(folder) == contents(finished)
    assert (folder / "train-00000.safetensors").stat().st_mtime_ns == kept


def test_two_processes_make_the_same_shards_as_one(shapes, runs, finished, tmp_path):
    command = [ROOT / "training/cache_data.py", *arguments(shapes, runs, tmp_path / "cache")]
    result = run_program(command, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "32 images of train, 4 images of held_out" in result.stdout
    names = sorted(path.name for path in finished.glob("*.safetensors"))
    assert names == sorted(path.name for path in (tmp_path / "cache").glob("*.safetensors")) and len(names) == 8
    for name in names:  # each process has half the threads, which changes how sums are rounded
        alone, both = load_file(finished / name), load_file(tmp_path / "cache" / name)
        assert alone.keys() == both.keys()
        for key, value in alone.items():
            torch.testing.assert_close(both[key], value, atol=1e-5, rtol=1e-5)


def test_a_damaged_shard_is_named_and_made_again(shapes, runs, finished, cache, capsys):
    for name, at in (("train-00002", 0.5), ("held_out-00000", 0.99)):
        content = bytearray((cache / f"{name}.safetensors").read_bytes())
        content[int(len(content) * at)] ^= 1
        (cache / f"{name}.safetensors").write_bytes(content)
    (cache / "train-00003.json").unlink()
    make(shapes, runs, cache)
    said = capsys.readouterr().out
    assert f"made again: {cache / 'train-00002.safetensors'} does not match its SHA-256" in said
    assert f"made again: {cache / 'held_out-00000.safetensors'} does not match its SHA-256" in said
    assert f"made again: {cache / 'train-00003.safetensors'} is not complete" in said and said.count("made again") == 3
    assert contents(cache) == contents(finished)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cache: os.truncate(cache / "train-00004.safetensors", 1000), "train-00004.safetensors' has 1000 bytes"),
        (lambda cache: (cache / "train-00005.safetensors").unlink(), "train-00005.safetensors' is missing"),
        (lambda cache: (cache / "cache.json").unlink(), "is not finished"),
        (lambda cache: flip(cache / "shared.safetensors"), "shared.safetensors' does not match its SHA-256"),
    ],
)
def test_a_partial_cache_is_refused_with_the_command_that_finishes_it(
    damage, message, shapes, runs, finished, cache, tmp_path, monkeypatch, capsys
):
    damage(cache)
    with pytest.raises(InputError, match=f"{message}.*finishes it") as caught:
        train("prior", shapes, tmp_path, cache=cache, clip=runs / "clip")
    assert not (tmp_path / "prior").exists()
    command = shlex.split(re.search("`(.*)`", str(caught.value))[1])
    monkeypatch.setattr(sys, "argv", command)
    from t2i.cli import main

    with pytest.raises(SystemExit) as status:
        main()
    assert not status.value.code, capsys.readouterr().err
    assert contents(cache) == contents(finished)
    train("prior", shapes, tmp_path, cache=cache, clip=runs / "clip")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object, got list"),
        ("{}", "lacks autoencoder, clip, format, key, shared, splits; this version reads format 1"),
        ('{"format": 2, "key": 0, "clip": 0, "autoencoder": 0, "shared": 0, "splits": 0}', "has format 2"),
        ('{"format": 1, "key": {}, "clip": 0, "autoencoder": 0, "shared": 0, "splits": 0}', "does not load"),
    ],
)
def test_a_cache_json_that_is_none_is_refused_in_one_line(content, message, cache):
    (cache / "cache.json").write_text(content)
    with pytest.raises(InputError, match=f"cache.json.*{message}"):
        CachedPairs(cache)


def test_a_shard_of_another_cache_is_refused_by_name(shapes, runs, cache, tmp_path):
    other = make(shapes, runs, tmp_path / "other", text=False)
    name = "train-00001.safetensors"
    shutil.copy(other / name, cache / name)
    listed = json.loads((cache / "cache.json").read_text())
    listed["splits"]["train"][1]["bytes"] = (cache / name).stat().st_size
    (cache / "cache.json").write_text(json.dumps(listed))
    with pytest.raises(
        InputError, match="train-00001.safetensors' is not a shard of this cache: text_embeds is missing"
    ):
        CachedPairs(cache).__getitems__([(0, 0), (7, 0)])


@pytest.fixture(scope="session")
def others(shapes: Path, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another CLIP and another autoencoder, and the same images in another order."""
    folder = tmp_path_factory.mktemp("others")
    for stage in ("clip", "autoencoder"):
        train(stage, shapes, folder, 1, **{"train.seed": 5})
    shutil.copytree(shapes, folder / "shapes")
    metadata = folder / "shapes/metadata.jsonl"
    metadata.write_text("\n".join(reversed(metadata.read_text().splitlines())))
    write_manifest(folder / "shapes", quiet=True)
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"clip": "others/clip"}, "another clip, [0-9a-f]{16}, now [0-9a-f]{16}"),
        ({"autoencoder": "others/autoencoder"}, "another autoencoder, [0-9a-f]{16}, now [0-9a-f]{16}"),
        ({"clip": "ViT-L-14:datacomp_xl_s13b_b90k"}, "another clip, .*clip, now ViT-L-14:datacomp_xl_s13b_b90k"),
        ({"autoencoder": "stabilityai/sd-vae-ft-mse"}, "another autoencoder, .*, now stabilityai/sd-vae-ft-mse"),
        ({"data.path": "others/shapes"}, "another data, [0-9a-f]{16}, now [0-9a-f]{16}"),
        ({"data.image_size": 64}, "another data.image_size, 32, now 64"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_a_stale_cache_is_refused_by_name(override, message, shapes, runs, others, finished, tmp_path):
    here = {key: str(value).replace("others", str(others)) for key, value in override.items()}
    settings = {"cache": finished, "clip": runs / "clip", "autoencoder": runs / "autoencoder"} | here
    with pytest.raises(InputError, match=f"the cache {str(finished)!r} is stale: .*{message}") as caught:
        train("decoder", shapes, tmp_path, **settings)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.fixture(scope="session")
def public(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A CLIP and an autoencoder in folders as others write them."""
    folder = tmp_path_factory.mktemp("public")
    AutoencoderKL(block_out_channels=[32], latent_channels=4).save_pretrained(folder / "vae")
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "clip").mkdir()
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    save_file(open_clip.CLIP(**model).state_dict(), folder / "clip/open_clip_model.safetensors")
    return f"local-dir:{folder / 'clip'}", str(folder / "vae")


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "autoencoder"),
        ("vae/config.json", "autoencoder"),
        ("clip/open_clip_model.safetensors", "clip"),
    ],
)
def test_other_weights_in_the_folder_of_a_public_model_make_a_cache_stale(file, what, public, shapes, runs, tmp_path):
    clip, vae = public
    cache = make(shapes, runs, tmp_path / "cache", clip=clip, autoencoder=vae)
    data = DataConfig(str(shapes), 32, 0)
    open_encodings(str(cache), data, clip, vae)
    changed = Path(vae).parent / file
    before = changed.read_bytes()
    try:
        if changed.suffix == ".json":
            changed.write_bytes(before.replace(b"0.18215", b"0.5"))
        else:
            flip(changed)
        with pytest.raises(InputError, match=f"is stale: it was made with another {what}, [0-9a-f]{{16}}, now"):
            open_encodings(str(cache), data, clip, vae)
        with pytest.raises(InputError, match="was made with another"):
            make(shapes, runs, cache, clip=clip, autoencoder=vae)
    finally:
        changed.write_bytes(before)


def test_a_changed_caption_of_a_held_out_picture_makes_a_cache_stale(shapes, runs, finished, tmp_path):
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    next(row for row in rows if row.get("split") == "held_out")["text"] = "another caption"
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_manifest(data, quiet=True)
    with pytest.raises(InputError, match="is stale: it was made with another held-out data, [0-9a-f]{16}, now"):
        open_encodings(str(finished), DataConfig(str(data), 32, 0), str(runs / "clip"))


def test_records_are_refused_where_pictures_have_other_names(shapes, runs, finished, tmp_path):
    data = Path(shutil.copytree(shapes, tmp_path / "shapes"))
    lines = (data / "metadata.jsonl").read_text().splitlines()
    for line in lines:
        name = json.loads(line)["file_name"]
        (data / name).rename(data / f"new-{name}")
    renamed = [json.loads(line) | {"file_name": "new-" + json.loads(line)["file_name"]} for line in lines]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    write_manifest(data, quiet=True)
    source = open_encodings(str(finished), DataConfig(str(data), 32, 0), str(runs / "clip"))
    with pytest.raises(InputError, match="is stale: its image 1 of held_out is '.*', in the data 'new-"):
        source.encode_records([(1, 0)])


def test_data_without_a_manifest_are_said_not_to_be_compared(shapes, runs, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    open_encodings(str(finished), DataConfig("hub:org/shapes", 32, 0), str(runs / "clip"))
    assert f"'hub:org/shapes': the cache {str(finished)!r} is not compared" in capsys.readouterr().out
    shutil.copytree(shapes, tmp_path / "data/org--shapes")
    lines = (tmp_path / "data/org--shapes/metadata.jsonl").read_text().splitlines()
    (tmp_path / "data/org--shapes/metadata.jsonl").write_text("\n".join(reversed(lines)))
    write_manifest(tmp_path / "data/org--shapes", quiet=True)
    shutil.move(tmp_path / "data/org--shapes/t2i/manifest.parquet", tmp_path / "data/org--shapes/manifest.parquet")
    with pytest.raises(InputError, match="another data, "):
        open_encodings(str(finished), DataConfig("hub:org/shapes", 32, 0), str(runs / "clip"))
    open_encodings(str(finished), DataConfig(str(shapes), 32, 0), str(runs / "clip"))
    assert capsys.readouterr().out == ""


def test_another_tokenizer_of_the_same_clip_makes_a_cache_stale(shapes, runs, finished, tmp_path):
    shutil.copytree(runs / "clip/model", tmp_path / "clip")
    data = DataConfig(str(shapes), 32, 0)
    open_encodings(str(finished), data, str(tmp_path / "clip"))
    tokenizer = tmp_path / "clip/tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"].pop()
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(
        InputError, match="is stale: it was made with another tokenizer, [0-9a-f]{16}, now [0-9a-f]{16}"
    ):
        open_encodings(str(finished), data, str(tmp_path / "clip"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"clip": "others/clip"}, "another clip: [0-9a-f]{16}, now [0-9a-f]{16}"),
        ({"autoencoder": "null"}, "another autoencoder: [0-9a-f]{16}, now None"),
        ({"data.path": "others/shapes"}, "another data: .*now"),
        ({"data.image_size": 64}, "another image_size: 32, now 64"),
        ({"variations": 3}, "another variations: 4, now 3"),
        ({"dtype": "float16"}, "another dtype: float32, now float16"),
        ({"shard_size": 5}, "another shard_size: 6, now 5"),
        ({"text": False}, "another text: True, now False"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_other_inputs_never_go_into_the_same_folder(override, message, shapes, runs, others, finished):
    here = {key: str(value).replace("others", str(others)) for key, value in override.items()}
    before = contents(finished)
    with pytest.raises(InputError, match=f"{message}.*; give another output or delete it"):
        make(shapes, runs, finished, **here)
    assert contents(finished) == before


def test_a_folder_with_anything_else_in_it_is_not_written_to(shapes, runs, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(InputError, match="contains other files than a cache"):
        make(shapes, runs, tmp_path / "mine")
    with pytest.raises(InputError, match="which is a file"):
        make(shapes, runs, tmp_path / "mine" / "file")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


@pytest.mark.parametrize("output", ["file/cache", "file/far/cache", "/proc/cache"])
def test_a_folder_that_cannot_be_written_is_refused_before_a_model_is_loaded(output, shapes, runs, tmp_path):
    (tmp_path / "file").write_text("mine")
    output = tmp_path / output  # /proc stays as it is
    with pytest.raises(InputError, match=f"^output='{output}' cannot be written") as caught:
        make(shapes, runs, output, clip="nowhere")
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_makers_do_not_work_in_one_folder(shapes, runs, cache):
    hold = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(cache / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"^output='{cache}' is locked by "):
            make(shapes, runs, cache)
        other.communicate("\n")
    make(shapes, runs, cache)


def test_it_is_said_where_pictures_have_more_captions_than_are_cached(shapes, runs, tmp_path, capsys):
    make(shapes, runs, tmp_path / "one", autoencoder="null", variations=1)
    assert re.search(r"caching 1 of up to [2-9] captions of an image", capsys.readouterr().out)
    make(shapes, runs, tmp_path / "all", autoencoder="null", variations=64)
    assert "captions of an image" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "row", "picture"),
    [("image_embeds", 4, 4), ("latents", 2, 2), ("text_embeds", -1, 5), ("text_states", -1, 5)],
)
def test_a_shard_with_a_value_that_is_not_finite_is_not_written(name, row, picture, finished, tmp_path):
    tensors = load_file(finished / "train-00000.safetensors")
    write_shard(tmp_path / "good.safetensors", tensors)
    key = CachedPairs(finished).get_sample_key(picture)
    tensors[name][row] = torch.tensor(1e6).half()  # infinity
    with pytest.raises(
        InputError, match=f"^bad.safetensors would contain NaN or infinity in {name}, first for '{key}'"
    ):
        write_shard(tmp_path / "bad.safetensors", tensors)
    assert not list(tmp_path.glob("*bad*"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"clip": "null", "autoencoder": "null"}, "clip and autoencoder are both null"),
        ({"variations": 0}, "variations must be from 1"),
        ({"dtype": "int8"}, "dtype must be one of float16, float32"),
        ({"mixed_precision": "int8"}, "mixed_precision must be one of"),
        ({"data.image_size": 30}, "data.image_size must be a multiple of 4, got 30"),
        ({"clip": "nowhere"}, "nowhere"),
    ],
)
def test_a_mistake_is_refused_before_any_work(override, message, shapes, runs, tmp_path):
    with pytest.raises(InputError, match=message):
        make(shapes, runs, tmp_path / "cache", **override)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_does_not_decode_stops_it_by_name_and_can_be_mended(workers, shapes, runs, finished, tmp_path):
    shutil.copytree(shapes, tmp_path / "data")
    picture = tmp_path / "data/20.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-30])
    with pytest.raises(InputError, match="^'20.png': an image whose bytes have changed") as caught:
        make(tmp_path / "data", runs, tmp_path / "cache", **{"data.num_workers": workers})
    assert "\n" not in str(caught.value) and not (tmp_path / "cache/cache.json").exists()
    picture.write_bytes(whole)
    make(tmp_path / "data", runs, tmp_path / "cache", **{"data.num_workers": workers})
    assert contents(tmp_path / "cache") == contents(finished)


def newest(folder: Path) -> Checkpoint:
    path, _ = find_newest_checkpoint(folder / "checkpoints")
    return load_checkpoint(path)


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_trains_from_a_cache_with_no_other_model_and_no_picture(
    stage, shapes, runs, finished, tmp_path, monkeypatch
):
    parts = {part: runs / part for part in STAGES[stage]}
    monkeypatch.setattr("t2i.networks.clip.CLIP.__init__", lambda *_, **__: pytest.fail("a CLIP is built"))
    monkeypatch.setattr(
        "t2i.networks.autoencoder.Autoencoder.__init__", lambda *_, **__: pytest.fail("an autoencoder is built")
    )
    for loader in ("load_clip", "load_autoencoder"):
        monkeypatch.setattr(f"t2i.training.common.encodings.{loader}", lambda _: pytest.fail("a model is loaded"))
    monkeypatch.setattr(CaptionedPictures, "load_image", lambda *_: pytest.fail("an image is read"))
    train(stage, shapes, tmp_path, 3, cache=finished, **parts)
    monkeypatch.undo()
    train(stage, shapes, tmp_path / "live", 3, **parts)
    cached, live = (newest(folder / stage) for folder in (tmp_path, tmp_path / "live"))
    made_from = dict(cached.state["made_from"])
    assert made_from.pop("cache") == CachedPairs(finished).compute_digest() and made_from == live.state["made_from"]
    assert len([value for value in made_from.values() if value]) == 1 + len(parts)
    for name in ("mean", "std", "null_embedding", "null_states") if stage == "prior" else ():
        torch.testing.assert_close(cached.tensors["model"][name], live.tensors["model"][name], atol=1e-6, rtol=1e-5)
    configs = [
        json.loads((folder / stage / "model/config.json").read_text()) for folder in (tmp_path, tmp_path / "live")
    ]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_learns_the_same_from_a_cache_as_on_the_fly(stage, shapes, runs, tmp_path):
    """With the captions of one draw alone both ways see the same samples, noise and conditions."""
    data = tmp_path / "shapes"
    shutil.copytree(shapes, data)
    rows = [json.loads(line) | {"keywords": []} for line in (data / "metadata.jsonl").read_text().splitlines()]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_manifest(data, quiet=True)
    parts = {part: runs / part for part in STAGES[stage]}
    cache = make(data, runs, tmp_path / "cache")
    train(stage, data, tmp_path / "cached", 4, cache=cache, **parts)
    train(stage, data, tmp_path / "live", 4, **parts)
    one, other = (newest(tmp_path / way / stage).tensors["model"] for way in ("cached", "live"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_run_from_a_cache_resumes_bit_for_bit(stage, shapes, runs, finished, tmp_path):
    settings = {"cache": finished, "train.save_every": 2, "train.batch_size": 6, "train.keep": 9}
    settings |= {part: runs / part for part in STAGES[stage]}
    train(stage, shapes, tmp_path / "unbroken", 5, **settings)
    train(stage, shapes, tmp_path / "broken", 5, **settings)
    folder = tmp_path / "broken" / stage
    for later in ("step-00000004", "step-00000005"):
        shutil.rmtree(folder / "checkpoints" / later)
    shutil.rmtree(folder / "model")
    train(stage, shapes, tmp_path / "broken", 5, **settings, **{"data.num_workers": 1})
    train(stage, shapes, tmp_path / "other", 5, **settings, **{"train.seed": 1})
    unbroken, broken, other = (
        (tmp_path / name / stage / "model/diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("unbroken", "broken", "other")
    )
    assert broken == unbroken and other != unbroken


def test_a_cache_without_what_a_stage_needs_is_refused(shapes, runs, tmp_path):
    latents = make(shapes, runs, tmp_path / "latents", clip="null")
    with pytest.raises(InputError, match="was made without clip and text"):
        train("prior", shapes, tmp_path, cache=latents, clip=runs / "clip")
    embeds = make(shapes, runs, tmp_path / "embeds", autoencoder="null", text=False)
    with pytest.raises(InputError, match="was made without autoencoder and text"):
        train("decoder", shapes, tmp_path, cache=embeds, clip=runs / "clip", autoencoder=runs / "autoencoder")
    with pytest.raises(InputError, match="no cache .*nowhere"):
        train("prior", shapes, tmp_path, cache=tmp_path / "nowhere", clip=runs / "clip")


def test_weights_are_recognised_in_a_folder_without_building_the_model(runs, others, tmp_path):
    autoencoder = load_autoencoder(runs / "autoencoder")
    assert compute_stored_fingerprint(runs / "autoencoder/model") == compute_weights_fingerprint(autoencoder)
    assert compute_stored_fingerprint(others / "autoencoder/model") != compute_weights_fingerprint(autoencoder)
    autoencoder.half().save_pretrained(tmp_path / "half")
    assert compute_stored_fingerprint(tmp_path / "half") == compute_stored_fingerprint(runs / "autoencoder/model")
    autoencoder.save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert compute_stored_fingerprint(tmp_path / "parts") == compute_stored_fingerprint(tmp_path / "half")


def test_files_are_readable_by_others(finished):
    mask = os.umask(0)
    os.umask(mask)
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~mask for path in finished.iterdir())
