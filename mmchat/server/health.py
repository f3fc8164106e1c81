"""Whether the server can answer: for supervisors and load balancers."""

from __future__ import annotations

from starlette.responses import Response

from mmchat.server.call import Call
from mmchat.server.stream import Json


async def health(call: Call) -> Response:
    """200 only if an answer would be begun and written."""
    status = call.service.status
    headers = {} if status == "ok" else {"retry-after": "1"}
    return Json({"status": status}, 200 if status == "ok" else 503, headers)
