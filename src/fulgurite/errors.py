"""What can go wrong, for people.

FulguriteError
├── SettingError          this machine cannot do what a setting says: says which
├── RequestError          the request asks for what cannot be: says which parameter
│   └── UnknownModelError no such model: names those there are
├── BusyError             no room for more work now: says when to come back
├── NotFiniteError        the network's numbers are none: no picture comes of them
├── OutOfMemoryError      the device's memory cannot hold this picture
├── DeviceError           the device stopped answering or failed: that picture is lost
├── CreditSpentError      the key's credit does not cover the price
├── LedgerError           the ledger cannot be read or written: says which
├── UnknownKeyError       no such API key
├── client.APIError       a server's answer to our client that is an error
└── WeightsError          the weights cannot be used: says which file and tensor
    └── NotPulledError    the weights are not on this machine: says how to pull them
"""

from typing import Any


class FulguriteError(Exception):
    """Anything that this program reports to people in one line."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes as it is: pickle would call the class with the message alone, which some do not take.
        return type(self).__new__, (type(self), *self.args), self.__dict__


class SettingError(FulguriteError):
    """This machine cannot do what a setting says; ``setting`` names it, ``why`` is the rest of the message."""

    def __init__(self, setting: str, why: str) -> None:
        super().__init__(f"{setting}: {why}")
        self.setting, self.why = setting, why


class RequestError(FulguriteError):
    """A request that cannot be drawn; ``param`` names the parameter."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(RequestError):
    """No card has this id."""

    def __init__(self, model: str, known: list[str]) -> None:
        super().__init__(f"There is no model {model!r} here. There are: {', '.join(known)}.", "model")


class WeightsError(FulguriteError):
    """A file of weights is missing a tensor, has one too many, or is damaged."""


class NotPulledError(WeightsError):
    """The model's weights are not on this machine yet."""


class BusyError(FulguriteError):
    """The engine takes no more work now; ``retry_after`` is in how many seconds it may."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotFiniteError(FulguriteError):
    """The network gave infinities or no numbers."""


class OutOfMemoryError(FulguriteError):
    """A picture does not fit into the device's memory, even alone."""

    def __init__(self) -> None:
        super().__init__("This picture does not fit into the device's memory, even alone. Ask for a smaller one.")


class DeviceError(FulguriteError):
    """The engine's thread ended or hung, and what it was making is lost."""


class CreditSpentError(FulguriteError):
    """A key's credit does not cover a picture's price."""


class LedgerError(FulguriteError):
    """The ledger's database cannot be used."""


class UnknownKeyError(FulguriteError):
    """No API key in use has this id; ``revoked``: one had."""

    def __init__(self, key_id: str, revoked: bool = False) -> None:
        what = f"The key {key_id!r} is revoked, for good." if revoked else f"There is no key {key_id!r}."
        super().__init__(f"{what} `fulgurite keys list` shows the keys.")
