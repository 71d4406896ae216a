"""Ranges of arguments: said once, in the annotation; checked in recipes before a run, and in Python at construction.

``temperature: Positive`` is all that a class says. ``lab check`` reads the annotation; ``@checked`` on ``__init__``
makes the constructor raise the same error as a ``ValueError`` (pydantic's ``ValidationError``) when called from
Python.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, validate_call

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
OpenFraction = Annotated[float, Gt(0), Lt(1)]
Dropout = Annotated[float, Ge(0), Lt(1)]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]

checked = validate_call(config=ConfigDict(arbitrary_types_allowed=True))
