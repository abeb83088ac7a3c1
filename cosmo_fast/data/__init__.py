"""Rows in, validated rows out. See :mod:`cosmo_fast.data.rows` for the schema."""

from cosmo_fast.data.rows import DataError, Row, load_rows, open_image

__all__ = ["DataError", "Row", "load_rows", "open_image"]
