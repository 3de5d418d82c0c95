"""Which gate a method has: the one place where a new one is entered, see `register`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from masa_lib.config import METHODS, Config
from masa_lib.gates import baselines, priors
from masa_lib.gates.masa import MasaGate
from masa_lib.method.gating import Gate, Hidden
from masa_lib.tasks.problems import ProblemPool

#: by method, what makes its gate from the config, the training problems and `solve`, see `make_gate`
GATES: dict[str, Callable[..., Gate]] = {
    "masa-efficient": lambda config, pool, solve: MasaGate(config), **baselines.GATES, **priors.GATES}


def register(name: str, about: str, make: Callable[..., Gate]) -> None:
    """Enter a gate, and the method of its name that trains with it.

    Args:
        name: of the method.
        about: a sentence.
        make: see GATES.
    """
    GATES[name], METHODS[name] = make, about


def make_gate(config: Config, pool: ProblemPool, solve: Callable[..., list[int]],
              memory: Mapping[str, Any] | None = None, hidden: Hidden | None = None) -> Gate | None:
    """The gate of a method; None for the methods that roll out every problem they draw.

    Args:
        config: of the step; a changed one takes effect through a new gate that is given the old one's state.
        pool: the training problems.
        solve: how many of so many solutions are right, for each problem; no cost unless `counted` is True.
        memory: by method, the state that its gate goes on from; one without is as new.
        hidden: the policy's last hidden states at the end of problems' prompts, for gates that want them.
    """
    gate: Gate | None = None
    if config.method in GATES:
        gate = GATES[config.method](config, pool, solve)
        gate.hidden = hidden
    if gate and memory and config.method in memory:
        gate.restore(memory[config.method])
    return gate
