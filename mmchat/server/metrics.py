"""Whether a server is well, and counts and times of its requests in Prometheus' text format.

Nothing of a request is a label.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from starlette.responses import Response

from mmchat.engine.events import Finished
from mmchat.server.stream import Json

if TYPE_CHECKING:
    from mmchat.server.call import Call
    from mmchat.server.service import Service

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_HISTOGRAMS = {
    "time_to_first_token_seconds": "From the request to the first token.",
    "inter_token_latency_seconds": "Between two tokens of one answer, on average.",
    "request_queue_seconds": "Waiting for a row.",
    "vision_seconds": "Encoding the pictures of a prompt.",
    "prefill_seconds": "Reading a prompt.",
    "e2e_request_latency_seconds": "From the request to the end of its answer.",
}
_COUNTERS = {  # and the field of Usage that is counted
    "requests_cancelled_total": ("Requests whose client went before the end of the answer.", None),
    "prompt_tokens_total": ("Tokens of prompts.", "prompt_tokens"),
    "generation_tokens_total": ("Tokens written.", "completion_tokens"),
    "images_total": ("Pictures of prompts.", "image_count"),
    "image_cache_hits_total": ("Pictures that had been encoded before.", None),
    "prefix_cached_tokens_total": ("Tokens of prompts that had been read before.", "cached_tokens"),
    "draft_tokens_total": ("Tokens guessed.", "draft_tokens"),
    "draft_accepted_total": ("Tokens guessed right.", "accepted_tokens"),
}


@dataclass
class _Histogram:
    bounds: Sequence[float] = _SECONDS
    total: float = 0.0
    counts: Counter[int] = field(default_factory=Counter)  # by the place of their bound

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def values(self) -> dict[str, float]:
        """Each bucket holds what those before it do."""
        sums = accumulate(self.counts[at] for at in range(len(self.bounds) + 1))
        pairs = zip((*self.bounds, "+Inf"), sums, strict=True)
        values: dict[str, float] = {f'_bucket{{le="{bound}"}}': count for bound, count in pairs}
        return {**values, "_sum": self.total, "_count": self.counts.total()}


class Metrics:
    """Written and read by the event loop alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by API and status
        self.counts: Counter[str] = Counter()
        self._histograms = {name: _Histogram() for name in _HISTOGRAMS}

    def answered(self, finished: Finished, queue_seconds: float, seconds: float) -> None:
        """An answer came to its end, `seconds` after it was asked for."""
        usage, times = finished.usage, finished.timings
        for name, (_, counted) in _COUNTERS.items():
            self.counts[name] += getattr(usage, counted) if counted else 0
        observe = self._histograms
        observe["request_queue_seconds"].observe(queue_seconds)
        observe["e2e_request_latency_seconds"].observe(seconds)
        if usage.completion_tokens:
            observe["time_to_first_token_seconds"].observe(times.time_to_first_token)
            observe["prefill_seconds"].observe(times.prefill_seconds)
        if usage.image_count:
            observe["vision_seconds"].observe(times.vision_seconds)
        if (gaps := usage.completion_tokens - 1) > 0:
            observe["inter_token_latency_seconds"].observe(times.decode_seconds / gaps, gaps)

    def lines(self, service: Service) -> Iterator[str]:
        engines = [served.engine for served in service.all]

        def total(name: str) -> int:
            return sum(getattr(engine, name) for engine in engines)

        budget = (service.memory or 0) * len(engines)
        gauges = {
            "requests_running": ("Answers that are read or written.", total("running")),
            "requests_waiting": ("Requests that wait for a row.", total("waiting")),
            "kv_bytes_used": ("Memory of rows and pictures.", total("bytes_used")),
            "kv_bytes_budget": ("What they may take; 0 is any.", budget),
        }
        for name, (text, value) in gauges.items():
            yield from _family(name, "gauge", text, {"": value})
        requests = {f'{{api="{api}",code="{code}"}}': n for (api, code), n in self.requests.items()}
        yield from _family("requests_total", "counter", "Answers by status.", requests)
        self.counts["image_cache_hits_total"] = total("known")
        for name, (text, _) in _COUNTERS.items():
            yield from _family(name, "counter", text, {"": self.counts[name]})
        for name, text in _HISTOGRAMS.items():
            yield from _family(name, "histogram", text, self._histograms[name].values)
        rows = _Histogram(range(1, service.rows + 1))
        for engine in engines:
            for count, steps in engine.steps.copy().items():
                rows.observe(count, steps)
        yield from _family("decode_rows", "histogram", "Rows that a step wrote.", rows.values)


def _family(name: str, kind: str, text: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP mmchat_{name} {text}"
    yield f"# TYPE mmchat_{name} {kind}"
    for labels, value in values.items():
        yield f"mmchat_{name}{labels} {value}"


async def metrics(call: Call) -> Response:
    call.service.served(None)  # it is loaded
    lines = call.service.metrics.lines(call.service)
    return Response("".join(f"{line}\n" for line in lines), media_type=MEDIA_TYPE)


async def health(call: Call) -> Response:
    """200 only if an answer would be begun and written."""
    status = call.service.status
    is_well = status == "ok"
    headers = None if is_well else {"retry-after": "1"}
    return Json({"status": status}, 200 if is_well else 503, headers)
