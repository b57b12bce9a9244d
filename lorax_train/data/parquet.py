"""Rows of Parquet files. Needs pyarrow (``pip install 'lorax-serve[parquet]'``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorax_serve.errors import TrainingError

__all__ = ["read_parquet"]

_ROWS_AT_A_TIME = 1000


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows one at a time, as JSON would have them.

    A struct has every field of its type in every row: those that are null within a message or a
    tool are left out, and so is a null for tools.

    Raises:
        TrainingError: naming the file, when it is no Parquet file or damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_AT_A_TIME):
                for row in batch.to_pylist():
                    yield {
                        key: _without_nulls(value)
                        for key, value in row.items()
                        if not (key == "tools" and value is None)
                    }
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise TrainingError(
            f"{path} cannot be read as Parquet: {reason}; write it anew, or convert it to .jsonl"
        ) from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
