"""The exceptions of ringattn.

RingAttentionError
├── InputError (ValueError)            an argument is wrong; nothing was sent
├── UnsupportedError (InputError)      a schedule, kernel or mechanism cannot do this; nothing was sent
├── PlanError                          a plan failed verification
├── AgreementError                     ranks of one call were called with different arguments
├── TransportError                     an exchange failed
│   ├── DeadlockError                  no virtual rank can go on
│   └── InFlightError                  a buffer was written while an exchange still needed it
├── NotFiniteError (ArithmeticError)   a NaN or an infinity, where none may be
├── CheckpointError                    a checkpoint could not be written, or is not one that can be read
└── MissingDependencyError (ImportError)   an optional dependency is not installed
"""

from __future__ import annotations


class RingAttentionError(Exception):
    """Base of every error raised by ringattn."""


class InputError(RingAttentionError, ValueError):
    """An argument is wrong. Says what was got, what is needed and what to do."""


class UnsupportedError(InputError):
    """The request is meaningful, but the named schedule, kernel or mechanism cannot do it."""


class PlanError(RingAttentionError):
    """A plan does not do what its mask asks for, or a set of plans does not fit together."""


class AgreementError(RingAttentionError):
    """The ranks of one call were called with different arguments. Raised on every rank of the call."""


class TransportError(RingAttentionError):
    """An exchange between ranks failed."""


class DeadlockError(TransportError):
    """No virtual rank can go on: says who waits for whom, in which exchange."""


class InFlightError(TransportError):
    """A buffer was written while an exchange was still reading from it or writing to it."""


class NotFiniteError(RingAttentionError, ArithmeticError):
    """A number is NaN or infinite: says on which rank, in which call, in which step. Raised on every rank."""


class CheckpointError(RingAttentionError):
    """A checkpoint could not be written, or cannot be read: it is none, damaged, or of another model.

    Raised on every rank that takes part.
    """


class MissingDependencyError(RingAttentionError, ImportError):
    """An optional dependency is not installed. Names the extra that brings it."""
