"""Where an answer looked: beside it in OpenAI's chat, and of an answer that was given before."""

from __future__ import annotations

from functools import partial

from mmchat.errors import UsageError
from mmchat.server.ask import Answering, in_time, look_at
from mmchat.server.call import Call
from mmchat.server.errors import ApiError, api_error, invalid, logged, said
from mmchat.server.stream import Fields


def check_heat(call: Call) -> None:
    """Raises ApiError for models that do not tell, before anything is asked of them."""
    from mmchat.explain.look import check_model

    try:
        check_model(call.model)
    except UsageError as error:
        raise invalid("heat", said(error)) from None


def tells(call: Call) -> bool:
    """Whether the model tells where it looked."""
    try:
        check_heat(call)
    except ApiError:
        return False
    return True


async def heat_beside(answering: Answering) -> Fields | None:
    """Of an answer that is finished, which stands also where nothing can be told.

    None if there are no words, no pictures, no room or no time left for it.
    """
    call, answer = answering.call, answering.stream.text
    prompt = answering.request.prompt
    if not answer.strip() or not prompt.media:
        return None
    try:
        request = await call.service.apart(partial(look_at, call, prompt, answer))
        looking = answering.beside(request)
        await in_time(call, lambda _: looking.begun())
        return await told(looking, answer)
    except Exception as failure:
        logged(failure)
        return None


async def told(looking: Answering, answer: str) -> Fields:
    """What was asked by `look_at`. Raises ApiError."""
    from mmchat.explain.look import looked
    from mmchat.explain.show import look_record

    await looking.whole()
    call = looking.call
    try:
        return await call.service.apart(
            lambda: look_record(looked(call.model, (), answer, looking.request))
        )
    except Exception as error:
        raise api_error(error) from error
