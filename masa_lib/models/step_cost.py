"""What a step of MASA costs, on paper: operations and bytes of each phase as a function of sizes, G, M, lengths, GPUs.

A phase takes as long as its operations at the hardware's rate of matrix products, or its bytes at the rate of its
memory, whichever is longer. Left out: kernels' own overhead, imbalance between GPUs, reading data, grading (which is
CPU work in milliseconds a solution).

W: numbers in the matrices of a forward pass. L: mean solution length, tokens. M, G: predictions, solutions a problem.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from masa_lib.models.memory import GB
from masa_lib.models.tiers import Architecture


@dataclass(frozen=True)
class Work:
    """Operations and bytes of memory traffic of a phase."""

    flops: float
    bytes: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """At so many operations and bytes a second."""
        return max(self.flops / flops, self.bytes / bandwidth)

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Load:
    """One step: `problems` with `solutions` of mean `length` and `predictions` of mean `meta_length`.

    `prompt`: tokens of a prompt. `batch`: sequences decoded together on one GPU. `longest`: cap of a rollout, tokens;
    the decoding waits for the longest, at most twice the mean length. `signal`: share of the tokens of solution groups
    that carry a gradient; `meta_signal`: of meta groups. `dropped`: share of candidates that a gate drops. `cut`:
    share of the solution tokens that a cap saves.
    """

    problems: int = 128
    solutions: int = 16
    predictions: int = 0
    length: float = 6251
    meta_length: float = 2293
    prompt: float = 256
    batch: int = 64
    longest: float = 8192
    signal: float = 1.0
    meta_signal: float = 1.0
    dropped: float = 0.0
    cut: float = 0.0


@dataclass(frozen=True)
class Hardware:
    """GPUs of one machine: operations, bytes of memory, bytes between GPUs a second, each of one GPU.

    `update_share`, `decode_share`: of the two rates, what a training reaches in practice; assumptions.
    """

    gpus: int = 8
    flops: float = 989e12
    bandwidth: float = 3.35e12
    link: float = 450e9
    memory: float = 80 * GB
    update_share: float = 0.4
    decode_share: float = 0.5


def sampling(sizes: Architecture, load: Load, itemsize: int, stream: str = "solution") -> Work:
    """Prompts and decoding of one stream on one GPU.

    Operations: `2 W` a token, `4 layers heads head_dim` a token and position attended. Bytes: all weights once a
    decoding step of a batch, and a sequence's keys and values once a token.
    """
    meta = stream == "meta"
    count = load.problems * (load.predictions if meta else load.solutions)
    length = load.meta_length if meta else load.length * (1 - load.cut)
    tokens, prompts = count * length, load.problems * load.prompt
    context = load.prompt + length / 2
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim
    tail = min(load.longest, 2 * length)
    steps = tail if count <= load.batch else tokens / load.batch + tail
    attended = tokens * context + prompts * load.prompt / 2
    return Work(flops=2 * sizes.matrices * (tokens + prompts) + attention * attended,
                bytes=itemsize * (sizes.matrices * steps + sizes.key_values * tokens * context))


def update(sizes: Architecture, tokens: float, sequence: float, checkpointed: bool = False) -> Work:
    """Forward and backward pass over so many tokens in sequences of mean length `sequence`.

    Operations: `6 W` a token (`8 W` where activations are computed twice), and three (four) times the attention's.
    """
    passes = 4 if checkpointed else 3
    attention = 4 * sizes.layers * sizes.heads * sizes.head_dim * sequence / 2
    return Work(flops=passes * tokens * (2 * sizes.matrices + attention), bytes=0.0)


def phases(sizes: Architecture, load: Load, hardware: Hardware, itemsize: int = 2) -> dict[str, float]:
    """Seconds of each phase of a step in which the GPUs share the problems and weights are sharded between them.

    A gate that drops a share d of the candidates asks for predictions of P / (1 - d) problems to fill P places.
    Messages: in each of the update's two passes every GPU gets all weights once a micro-batch, here 32 a step, and
    gives all gradients (float32) once; the sampler gets all weights once.
    """
    share = dataclasses.replace(load, problems=load.problems / hardware.gpus)
    candidates = dataclasses.replace(share, problems=share.problems / (1 - load.dropped))
    decode = hardware.flops * hardware.decode_share, hardware.bandwidth * hardware.decode_share
    kept = load.length * (1 - load.cut)
    solved = share.problems * load.solutions * kept * load.signal
    predicted = candidates.problems * load.predictions * load.meta_length * load.meta_signal
    learned = update(sizes, solved, load.prompt + kept, True) + update(sizes, predicted, load.prompt + load.meta_length,
                                                                       True)
    whole, other = sizes.parameters, (hardware.gpus - 1) / hardware.gpus
    moved = other * whole * (2 * 32 * itemsize + 4 + itemsize)
    return {"solutions": sampling(sizes, share, itemsize).seconds(*decode),
            "predictions": sampling(sizes, candidates, itemsize, "meta").seconds(*decode) if load.predictions else 0.0,
            "update": learned.flops / (hardware.flops * hardware.update_share),
            "messages": moved / hardware.link}
