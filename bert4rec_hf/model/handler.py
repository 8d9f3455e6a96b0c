# Copyright 2026 The bert4rec_hf authors. Licensed under the Apache License, Version 2.0.
"""The custom handler of a Hugging Face Inference Endpoint, which serves a folder with published code."""

from typing import Any

from transformers import pipeline

# The task that `publish_code` writes into config.json. It is not the registered one, for which Transformers would ask
# users of the package to trust the folder's code.
PUBLISHED_TASK = "bert4rec-recommendation"


class EndpointHandler:
    """Answers the requests of an endpoint. The endpoint makes one handler, and calls it with each body.

    Args:
        path: The model folder, with the code that `publish_code` wrote.
    """

    def __init__(self, path: str = ""):
        # An endpoint runs the repository's handler.py, so its owner trusts the code beside it already.
        try:
            self.recommend: Any = pipeline(PUBLISHED_TASK, model=path, trust_remote_code=True)
        except KeyError:
            # Where bert4rec_hf is imported, its own code is used, and the task has its other name.
            self.recommend = pipeline("sequential-recommendation", model=path)

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Recommend items.

        Args:
            data: The body of a request: `inputs`, a history, a mapping with `history` and limits, or a list of these;
                and, optionally, `parameters`, the arguments of the pipeline, such as {"top_k": 5}.

        Returns:
            What the pipeline returns for the inputs.

        Raises:
            ValueError: If the body lacks `inputs` or has other keys, or the pipeline refuses a request.
        """
        if not isinstance(data, dict) or not isinstance(data.get("parameters") or {}, dict):
            raise ValueError(f"expected a mapping with inputs and, optionally, parameters, a mapping; got {data!r:.80}")
        others = sorted(map(str, data.keys() - {"inputs", "parameters"}))
        if others or "inputs" not in data:
            raise ValueError(
                f"expected a body with inputs and, optionally, parameters; got {', '.join(data) or 'none'}"
            )
        try:
            return self.recommend(data["inputs"], **(data.get("parameters") or {}))
        except TypeError as error:  # an unknown parameter
            raise ValueError(str(error)) from error
