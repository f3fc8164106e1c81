"""What happens when an allocation fails in the middle of a turn."""

import json
import subprocess
import sys
import weakref

import pytest
import torch

from mmchat.errors import MemoryError_
from mmchat.runtime.eager import memory_errors

# A turn that needs more than the process may have, then one that does not, in one conversation.
PROGRAM = """
import json, resource
import mmchat
from mmchat.errors import MemoryError_

def size():
    for line in open("/proc/self/status"):
        if line.startswith("VmSize"):
            return int(line.split()[1]) * 1024

def finished(events):
    *_, last = events
    return last

model = mmchat.load("tiny", device="cpu")
chat = model.chat()
first = finished(chat.send("What's in this image?", ["assets/dog.jpg"]))
again = model.chat()
finished(again.send("What's in this image?", ["assets/dog.jpg"]))
expected = finished(again.send("What colour is the dog?"))
before = [message.text for message in chat.messages]
resource.setrlimit(resource.RLIMIT_AS, (size() + 48 * 2**20,) * 2)
try:
    finished(chat.send("dog " * 20000))
    said = None
except MemoryError_ as error:
    said = str(error)
kept = [message.text for message in chat.messages] == before
after = finished(chat.send("What colour is the dog?"))
print(json.dumps([said, kept, after.output_ids == expected.output_ids, after.usage.cached_tokens]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux counts it")
def test_a_turn_that_runs_out_of_memory_ends_and_the_conversation_goes_on():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "HOME": "/nowhere"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, kept, is_the_same_answer, cached = json.loads(done.stdout)
    assert said is not None
    assert said.startswith("out of memory while running the model; use a shorter context")
    assert kept
    assert is_the_same_answer
    assert cached > 0  # what was read before the failed turn was not read again


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_every_allocators_failure_is_a_memory_error(error):
    with pytest.raises(MemoryError_, match="use a shorter context"), memory_errors():
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), memory_errors():
        raise RuntimeError("shapes do not match")


def test_the_tensors_of_the_failed_work_are_freed_while_the_error_is_kept():
    kept = []

    def work():
        taken = torch.zeros(10)
        kept.append(weakref.ref(taken))
        raise MemoryError

    with pytest.raises(MemoryError_) as caught, memory_errors():
        work()
    assert caught.value is not None
    assert kept[0]() is None
