"""How likely a model finds something in a picture: the probability that it says so when asked.

"Is there … in this image?", and the probability of "Yes": so a model that answers in words ranks
pictures. Lin et al. 2024 (VQAScore) ask in this way.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from mmchat.batch.rows import Row
from mmchat.batch.run import Outcome, request_or_error
from mmchat.chat.session import user_message
from mmchat.engine.events import Finished
from mmchat.engine.request import Request
from mmchat.engine.sampling import SamplingParams
from mmchat.models.prompt import followed

if TYPE_CHECKING:
    from mmchat.loading.loader import LoadedModel

QUESTION, ANSWER = "Is there {text} in this image?", "Yes"
_SAMPLING = SamplingParams(temperature=0, max_new_tokens=1, speculate="off")


def prepare_score(model: LoadedModel, text: str, row: Row) -> Outcome:
    """The request whose `likelihood` says whether `text` is in the row's picture."""

    def make() -> Request:
        message = user_message(model, QUESTION.format(text=text), row.read().images)
        prompt = model.processor.chat([message])
        answered = followed(model.processor, prompt, model.tokenizer.encode(ANSWER))
        return replace(model.request(answered, _SAMPLING), score_from=len(prompt.token_ids))

    return Outcome(row, "", False, request_or_error(make))


def likelihood(finished: Finished) -> float:
    """Of the answer, from 0 to 1."""
    return math.exp(sum(token.logprob for token in finished.prompt_logprobs))
