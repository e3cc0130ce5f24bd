"""What a file says about itself: a JSON text among the file's own metadata entries, which interpreters skip.

Reference: the `metadata` table of TFLite's schema,
https://github.com/google-ai-edge/LiteRT/blob/main/tflite/schema/schema.fbs.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from tfaccel.errors import refuse
from tfaccel.export.errors import ExportError

NAME = "tfaccel"


def check_metadata(metadata: Any) -> None:
    """Raises ValueError for what JSON can't hold."""
    try:
        kept = json.loads(json.dumps(metadata))
    except (TypeError, ValueError) as error:
        raise refuse(
            "metadata", metadata, "what JSON can hold", f"Turn arrays into lists ({error})."
        ) from error
    if kept is not None and not isinstance(kept, dict):
        raise refuse("metadata", metadata, "a dict", "Pass e.g. {'labels': ['cat', 'dog']}.")


def with_metadata(content: bytes, facts: dict[str, Any]) -> bytes:
    """The file with `facts` in it."""
    from ai_edge_litert.tools import flatbuffer_utils

    schema = flatbuffer_utils.schema_fb
    file = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = list(json.dumps(facts).encode())
    entry.name, entry.buffer = NAME.encode(), len(file.buffers)
    file.buffers.append(buffer)
    file.metadata = [*(file.metadata or []), entry]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(file))


def read_metadata(content: bytes, path: str) -> dict[str, Any]:
    """The facts in a file.

    Raises:
        ExportError: It is no TFLite file, or tfaccel did not write it.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    if content[4:8] != b"TFL3":
        raise ExportError(f"{path} is not a TFLite file: its identifier is {content[4:8]!r}, not b'TFL3'.")
    try:
        file = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
        entries = {entry.name: file.buffers[entry.buffer].data for entry in file.metadata or []}
        text = entries.get(NAME.encode())
        if text is not None:
            return json.loads(bytes(bytearray(text)))
    except (IndexError, TypeError, ValueError, struct.error) as error:
        raise ExportError(f"{path} is damaged: it ends before its contents do ({error}).") from error
    raise ExportError(
        f"{path} was not written by tfaccel: it says nothing about itself. Compare it with its model with "
        "tfaccel.compare."
    )
