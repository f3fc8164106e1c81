"""What runs in the decode worker: reads pictures from stdin, writes their pixels to stdout.

A request is a line of JSON, then the bytes of the file; if its `bytes` is null, it is about the
file before. The answer is a line of JSON, then, if the picture was asked for and read, its pixels:
3 bytes each, row by row.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from typing import IO, Any

from PIL import Image as PILImage

from mmchat.images.bounds import RefusedError
from mmchat.images.colour import rgb_strips
from mmchat.images.decode import announced_size, count_pages, decode


def serve() -> None:
    """Answer until stdin ends."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    PILImage.preinit()  # the common decoders are there when the first picture comes
    data = b""
    while line := requests.readline():
        request = json.loads(line)
        if request["bytes"] is not None:
            data = requests.read(request["bytes"])
        _limit(request)
        _answer(request, data, answers)
        answers.flush()
    os._exit(0)


def _limit(request: dict[str, Any]) -> None:
    """Bound the time from now on, and the address space."""
    end = math.ceil(time.process_time() + request["cpu_seconds"])
    for limit, value in ((resource.RLIMIT_CPU, end), (resource.RLIMIT_AS, request["memory"])):
        hard = resource.getrlimit(limit)[1]  # the system's, or the user's by ulimit
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, hard))


def _answer(request: dict[str, Any], data: bytes, answers: IO[bytes]) -> None:
    kind, max_pixels, page = request["kind"], request["max_pixels"], request["page"]
    picture = None
    try:
        if request.get("only_pages"):
            answer = {"pages": count_pages(data, kind)}
        elif request.get("only_size"):
            answer = {"size": announced_size(data, kind, max_pixels, page)}
        else:
            picture, notices = decode(data, kind, max_pixels, page)
            answer = {"size": picture.size, "notices": notices}
    except RefusedError as refusal:
        answer = {"reason": str(refusal), "missing_extra": refusal.missing_extra}
    answers.write(json.dumps(answer).encode() + b"\n")
    if picture is not None:
        for _, strip in rgb_strips(picture, request["alpha"]):
            answers.write(strip.tobytes())
