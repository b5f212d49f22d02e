"""Rounds of training: a round has one turn of G and a number of steps of D.

G's turn opens the round, and each training step has one step of D. A round has `optim.d_steps` steps of D, or
`optim.d_warmup_steps` if it is one of warm-up: the first `optim.d_warmup_rounds` of a phase, and each whose number
`optim.d_warmup_every` divides (Arjovsky et al. 2017 trained D for 100 steps in the first 25 rounds and in every 500th).
Which round a step belongs to follows from the number of the step in closed form, so that a run is continued exactly.
"""

from __future__ import annotations

from typing import NamedTuple

from stylegan_pg.config.schema import OptimConfig


class Place(NamedTuple):
    """The place of a training step among the rounds."""

    round: int  # number of the round within the phase
    step: int  # number of the step within the round
    length: int  # steps of the round


def place_of(optim: OptimConfig, number: int) -> Place:
    """The round of step `number` of a phase, counted from 0."""
    plain, warm = optim.d_steps, optim.d_warmup_steps
    first, every = optim.d_warmup_rounds, optim.d_warmup_every
    if number < first * warm:
        return Place(*divmod(number, warm), warm)
    left = number - first * warm
    until_next = -first % every if every else 0  # plain rounds before the next one of warm-up
    if not every or left < until_next * plain:
        rounds, step = divmod(left, plain)
        return Place(first + rounds, step, plain)
    # From here on, a round of warm-up and every - 1 plain ones repeat.
    cycles, rest = divmod(left - until_next * plain, warm + (every - 1) * plain)
    begin = first + until_next + cycles * every
    if rest < warm:
        return Place(begin, rest, warm)
    rounds, step = divmod(rest - warm, plain)
    return Place(begin + 1 + rounds, step, plain)


def g_share(optim: OptimConfig, steps: int) -> float:
    """Optimizer steps of G per training step, over the first `steps` of a phase."""
    place = place_of(optim, steps)
    return optim.g_steps * (place.round + place.step / place.length) / steps
