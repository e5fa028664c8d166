"""What a command imports before it draws."""

import subprocess
import sys
from pathlib import Path

from t2i.commands.imports import KNOWN_VERSIONS

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
    "torch._dynamo.config",
    "triton",
    "scipy.stats.distributions",
)


def test_drawing_imports_no_training_and_leaves_the_collector_as_it_was():
    code = f"""
import gc, sys
from t2i.commands.imports import speed_up_imports
with speed_up_imports():
    import t2i.pipelines.jobs.generation
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert 'torch' in sys.modules
found = [name for name in {NEEDLESS} if name in sys.modules]
assert not found, found
with speed_up_imports():  # torch is there already: nothing is to be gained
    assert gc.isenabled()
import torch
from diffusers.utils.torch_utils import is_compiled_module
assert not is_compiled_module(torch.nn.Identity())
from diffusers import DPMSolverMultistepScheduler
betas = DPMSolverMultistepScheduler(use_beta_sigmas=True)  # calls scipy.stats
betas.set_timesteps(4)
assert len(betas.timesteps) == 4 and 'scipy.stats.distributions' in sys.modules
torch.empty(8, 8, device='meta').uniform_()  # calls what the compiler marks
assert 'torch._dynamo.config' not in sys.modules
import torch._dynamo.config as config
assert config is torch._dynamo.config is sys.modules['torch._dynamo.config']
assert torch._dynamo.utils.counters is not None and torch._dynamo.eval_frame.__file__
import peft, timm  # which were left out, and can be had
compiled = torch.compile(torch.nn.Identity(), backend='eager')
assert compiled(torch.ones(2)).tolist() == [1, 1] and is_compiled_module(compiled)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_a_tower_of_timm_is_built_after_imports_without_it():
    code = """
from t2i.commands.imports import speed_up_imports
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


def test_compiling_commands_import_the_compiler_first():
    code = """
import sys
from t2i.commands.imports import speed_up_imports
with speed_up_imports(needs_compiler=True):
    import diffusers.hooks
assert hasattr(sys.modules['torch._dynamo'], 'optimize')
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_libraries_whose_imports_are_known_are_the_tested_ones():
    pins = dict(line.split("==") for line in Path("constraints.txt").read_text().splitlines() if "==" in line)
    for name, known in KNOWN_VERSIONS.items():
        assert pins[name].startswith(known), f"{name} {pins[name]}: run these tests with KNOWN_VERSIONS of this version"
