"""How the threads of a program that computes wait for each other."""

import os

SPINS = 1000  # looks at what is waited for, 0.015 ms of them where it was measured; GNU's OpenMP has 300,000

WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # the variables that say so


def share_cores() -> None:
    """Has threads that wait give their core away soon, for a program that is not alone on its machine.

    To be called before torch is imported, which reads it. Else a thread holds its core for milliseconds while the one
    that it waits for has none: two programs of torch on two cores then take up to a hundred times as long as one. What
    the user has set in the environment stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def waiting() -> dict[str, str]:
    """The environment's variables that say how threads wait here, for programs on other machines to do the same."""
    return {name: os.environ[name] for name in WAITING if name in os.environ}
