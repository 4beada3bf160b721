"""Errors that are written for people: each says what was wrong, where, and what to do.

Entry points (`train.py`, `so8t`) print these as one line and exit with code 2; anything else is a bug and keeps its traceback.
"""


class SO8TError(Exception):
    """Base of every error a user can cause or mend."""


class ConfigError(SO8TError):
    """A key, value or combination in the composed configuration cannot work."""


class DataError(SO8TError):
    """A record, a file or a source is missing or malformed."""


class FetchError(SO8TError):
    """Something that rides in a package could not be fetched, or its sum is wrong."""


class BaseModelError(SO8TError):
    """A base model cannot be loaded, quantised or split."""


class GroupError(SO8TError):
    """A rotation has left SO(8), or a size cannot be split into blocks of eight."""


class HardwareError(SO8TError):
    """The machine does not have what the profile asks for."""


class ArtefactError(SO8TError):
    """A run folder or an adapter cannot be read."""
