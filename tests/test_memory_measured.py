"""The estimate of working memory against a process that runs a model with the widths of the 11B."""

import json
import os
import subprocess
import sys

import pytest

from mmchat.limits import MIB
from mmchat.quant.kernels.ops import has_fast_bf16

# What is freed goes back at once: what malloc keeps differs by 200 MB from one run to the next.
STEADY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
# Growth of the process over its size once the model is loaded: cache, picture and working memory.
PROGRAM = """
import ctypes, dataclasses, json, pathlib, sys, torch
from mmchat.estimate.memory import OVERHEAD, Setup, Workload
from mmchat.hardware.memory import return_freed_memory
from mmchat.hardware.placement import Placement
from mmchat.engine.reading import encode, rest_of
from mmchat.models.mllama.model import MllamaForConditionalGeneration
from mmchat.models.prompt import PlacedMedia, Prompt
from mmchat.catalog.known import find_spec
from mmchat.nn.linear import set_formats
from mmchat.quant.schemes import make_plan

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages as they are used
scheme, tiles, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

spec = find_spec("llama3.2-11B")
vision = dataclasses.replace(
    spec.config.vision_config, num_hidden_layers=5, num_global_layers=1,
    intermediate_layers_indices=(0, 1, 2, 3, 4),
)
text = dataclasses.replace(
    spec.config.text_config, num_hidden_layers=2, cross_attention_layers=(1,), vocab_size=1024
)
config = dataclasses.replace(spec.config, vision_config=vision, text_config=text)
spec = dataclasses.replace(spec, config=config)
with torch.device("meta"):
    model = MllamaForConditionalGeneration(config)
model.requires_grad_(False).eval()
plan = make_plan(scheme)
set_formats(model, plan)
dtype = torch.bfloat16
for module in model.modules():
    for name, tensor in [*module.named_parameters(recurse=False)]:
        new = torch.ones(tensor.shape, dtype=dtype) * 0.01
        setattr(module, name, torch.nn.Parameter(new, requires_grad=False))
    for name, tensor in [*module.named_buffers(recurse=False)]:
        setattr(module, name, torch.ones(tensor.shape, dtype=tensor.dtype))
if plan.scheme != "none":
    model.fuse_projections()
model.finish_loading(torch.device("cpu"))
class Layout: aspect_ratio_id = {1: 1, 4: 4}[tiles]
class Image:
    content_hash, layout = "x", Layout
    pixel_values = torch.zeros(tiles, 3, vision.image_size, vision.image_size)
    tensors = pixel_values, torch.tensor([Layout.aspect_ratio_id])
whole = Prompt((1,) * prompt, (PlacedMedia(0, 1, Image),))
model.language_model.lm_head(torch.zeros(1, 1, 4096, dtype=dtype))  # libraries start their threads
return_freed_memory()  # what loading freed counts as growth when it is used again
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = memory("VmRSS")
cache = model.new_cache(1, prompt)
with torch.inference_mode():
    encode(model, whole, cache)
    model.forward(rest_of(whole, cache, torch.device("cpu")), cache)
grown = memory("VmHWM") - before
side = vision.image_size
picture = spec.family.facts(config, side, tiles * side)
setup = Setup(spec, "cpu", 2, scheme, workload=Workload(prompt, prompt, (picture,)))
need = setup.need()
print(json.dumps([grown, need.total - need.weights]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own figures")
@pytest.mark.parametrize(
    ("scheme", "tiles", "prompt"), [("none", 4, 64), ("int8", 1, 1024), ("int4", 1, 64)]
)
def test_a_picture_and_a_prompt_take_what_was_estimated(scheme, tiles, prompt):
    command = [sys.executable, "-c", PROGRAM, scheme, str(tiles), str(prompt)]
    done = subprocess.run(
        command, env={**os.environ, **STEADY}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    grown, estimate = json.loads(done.stdout)
    # where bfloat16 products are fast nothing is widened, which the estimate does not count on
    most = 1.9 if scheme == "none" and has_fast_bf16() else 1.6
    assert grown <= estimate <= most * grown + 160 * MIB
