"""Colours and PNG output that the learning curve and the report share."""

import io
from typing import Any

# Colours from Okabe and Ito's palette, which people with colour blindness can tell apart.
BLUE, VERMILION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#767676"


def png(figure: Any) -> bytes:
    """A matplotlib figure as the content of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
