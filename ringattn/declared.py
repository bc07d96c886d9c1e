"""What an exchange may be declared to be: a plan says it, the verifier checks it, and a transport may make use of it.

A declaration changes neither what travels nor what is counted. It says that all ranks of a group take part in the
exchange, each with one message to every other one and one from every other one, none of them empty. So one call of a
library's can take their place, which every rank of its process group must make, in the same order among such calls.
"""

from __future__ import annotations

from typing import Literal

Collective = Literal["all_gather", "all_to_all"]
"""``all_to_all`` says just that; ``all_gather`` also that each rank sends every other one the same."""

WORDS: dict[Collective, str] = {"all_gather": "an all-gather", "all_to_all": "an all-to-all"}
