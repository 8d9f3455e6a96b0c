"""The messages of `bert4rec serve`: the JSON of requests and answers, as the API's description has them."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

# Limits of a request.
MAX_ITEMS, MAX_TOP_K, MAX_ID_LENGTH = 10_000, 1_000, 1_000

ItemId = Annotated[StrictStr, Field(max_length=MAX_ID_LENGTH)] | Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)]
Items = Annotated[list[ItemId], Field(max_length=MAX_ITEMS)]


class HistoryEvent(BaseModel):
    """An item of a history, with what the user did, for a model of event types."""

    model_config = ConfigDict(extra="forbid")
    item_id: ItemId
    event_type: Annotated[StrictStr, Field(max_length=MAX_ID_LENGTH)] | None = None


History = Annotated[list[ItemId | HistoryEvent], Field(max_length=MAX_ITEMS)]
UserId = Annotated[StrictStr, Field(min_length=1, max_length=MAX_ID_LENGTH)]


class RecommendRequest(BaseModel):
    """What to recommend, and to whom: by `user_id`, whose events the server has, or by `history`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"history": ["50", "172"], "top_k": 5}, {"user_id": "7", "exclude": ["1"]}]},
    )
    user_id: UserId | None = Field(None, description="A user of POST /events. An unknown user has no history.")
    history: History | None = Field(
        None,
        description="Item ids, or items with an event_type, oldest first. An empty list: nothing is known.",
    )
    event_type: Annotated[StrictStr, Field(max_length=MAX_ID_LENGTH)] | None = Field(
        None, description="The target type to recommend for. Left out: the first target type of the model."
    )
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K, strict=True)] = Field(10, description="Number of items.")
    candidates: Items | None = Field(None, description="Item ids to choose from. Left out: the catalogue.")
    exclude: Items | None = Field(None, description="Item ids never to recommend.")
    filter_seen_items: StrictBool | None = Field(
        None, description="Whether items of the history are left out. Left out: as the model folder says."
    )
    rules: StrictStr | None = Field(None, description="The name of rules of this server.")
    explain: StrictBool = Field(False, description="Whether each item names the items of the history that carry it.")
    where: Annotated[StrictStr, Field(max_length=MAX_ID_LENGTH)] | None = Field(
        None, description="A condition on columns of the item table, if this server allows it."
    )


class Problem(BaseModel):
    """What is wrong, in a sentence."""

    detail: str


class Source(BaseModel):
    """An item of the history that carries a recommendation."""

    item_id: str
    title: str | None = None
    contribution: float


class Recommendation(BaseModel):
    """A recommended or similar item."""

    item_id: str
    title: str | None = None
    score: float
    because: list[Source] | None = None


class SimilarAnswer(BaseModel):
    """The items that are most similar to an item."""

    model_version: str
    items: list[Recommendation]


class RecommendAnswer(BaseModel):
    """The recommendations for a request, the best item first."""

    request_id: str = Field(description="The id of this answer in the log of what was served.")
    model_version: str
    items: list[Recommendation]
    num_events: int = Field(description="Number of items of the history.")
    num_unknown_items: int = Field(description="Number of items of the request that the catalogue lacks.")


class Events(BaseModel):
    """New events of a user, oldest first."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"user_id": "7", "item_ids": ["50", "172"]}]}
    )
    user_id: UserId
    item_ids: Annotated[History, Field(min_length=1, description="Item ids, or items with an event_type.")]


class EventsAnswer(BaseModel):
    """How many events were stored. They are durable when the answer comes."""

    num_events: int
    num_unknown_items: int = Field(description="Number of items that the catalogue lacks. They are stored too.")
