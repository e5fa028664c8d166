"""What a command imports before it draws."""

import subprocess
import sys

NEEDLESS = (
    "pyarrow",
    "t2i.training",
    "training",
    "t2i.training.common.loop",
    "t2i.data.dataset",
    "transformers.models.t5.modeling_t5",
    "datasets",
    "omegaconf",
    "pandas",
    "peft",
    "sklearn",
    "tensorboard",
    "timm",
)


def test_drawing_imports_no_training_and_leaves_the_collector_as_it_was():
    code = f"""
import gc, sys
from t2i.commands import speed_up_imports
with speed_up_imports():
    import t2i.pipelines.jobs.generation
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert 'torch' in sys.modules
found = [name for name in {NEEDLESS} if name in sys.modules]
assert not found, found
with speed_up_imports():  # torch is there already: nothing is to be gained
    assert gc.isenabled()
import peft, timm  # which were left out, and can be had
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_a_tower_of_timm_is_built_after_imports_without_it():
    code = """
from t2i.commands import speed_up_imports
with speed_up_imports():
    from t2i.networks.clip import build_open_clip_model, open_clip
assert open_clip.timm_model.timm is None
vision = {"timm_model_name": "resnet10t", "timm_pool": "", "timm_proj": "", "image_size": 32}
text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
model = build_open_clip_model({"embed_dim": 512, "vision_cfg": vision, "text_cfg": text})
assert type(model.visual.trunk).__module__.startswith("timm."), model.visual
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
