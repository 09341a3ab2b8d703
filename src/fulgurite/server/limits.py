"""What each key may do: requests per minute, pictures at once, money. Counted in this process's memory."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fulgurite.records import Key
from fulgurite.server.problems import Problem


@dataclass
class Meter:
    """One key's counters."""

    tokens: float  # requests that may come at once; they grow back evenly over a minute
    at: float  # when the tokens were counted, in the clock's seconds
    in_flight: int = 0
    reserved: int = 0  # micro-dollars, of the pictures in flight


class Meters:
    """The counters of all keys that have asked for something since the server started."""

    def __init__(self) -> None:
        self._meters: dict[str, Meter] = {}

    def _meter(self, key: Key) -> Meter:
        full = float(key.limits.requests_per_minute or 0)
        return self._meters.setdefault(key.id, Meter(full, time.monotonic()))

    def count_request(self, key: Key) -> dict[str, str]:
        """Counts a request; gives the headers that say what is left. Raises Problem (429) where nothing is."""
        most, meter = key.limits.requests_per_minute, self._meter(key)
        if most is None:
            return self._pictures_left(key)
        time_now = time.monotonic()
        meter.tokens = min(most, meter.tokens + (time_now - meter.at) * most / 60)
        meter.at = time_now
        allowed = meter.tokens >= 1
        meter.tokens -= allowed
        headers = {
            "X-RateLimit-Limit-Requests": str(most),
            "X-RateLimit-Remaining-Requests": str(int(meter.tokens)),
            "X-RateLimit-Reset-Requests": f"{math.ceil((most - meter.tokens) * 60 / most)}s",
        } | self._pictures_left(key)
        if not allowed:
            wait = math.ceil((1 - meter.tokens) * 60 / most)
            message = f"This key may send {counted(most, 'request')} a minute. Come back in {wait} s."
            raise Problem(429, "rate_limited", message, headers=headers | {"Retry-After": str(wait)})
        return headers

    def _pictures_left(self, key: Key) -> dict[str, str]:
        most = key.limits.pictures_in_flight
        if most is None:
            return {}
        left = max(0, most - self._meter(key).in_flight)
        return {"X-RateLimit-Limit-Pictures": str(most), "X-RateLimit-Remaining-Pictures": str(left)}

    @contextmanager
    def picture(self, key: Key, price: int) -> Iterator[None]:
        """Holds a place, and the price, for a picture in flight. Raises Problem: 429 or 402."""
        meter, most, credit = self._meter(key), key.limits.pictures_in_flight, key.limits.credit
        if most is not None and meter.in_flight >= most:
            message = f"This key may have {counted(most, 'picture')} made at once. Wait for one to end."
            raise Problem(429, "too_many_pictures", message, headers={"Retry-After": "1"})
        if credit is not None and key.spent + meter.reserved + price > credit:
            raise credit_spent()
        meter.in_flight += 1
        meter.reserved += price
        try:
            yield
        finally:
            meter.in_flight -= 1
            meter.reserved -= price


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def credit_spent() -> Problem:
    return Problem(402, "credit_spent", "This key's credit does not cover this picture, which was not charged.")
