"""How the learning rate goes over a round's steps and a run's rounds, and what steps add up to."""

import math
from dataclasses import replace

from fedloom.terms import LocalTraining, Schedule


def factor(schedule: Schedule, warmup: int, position: int, total: int) -> float:
    """Return the factor on the learning rate at `position`, 0 .. total - 1: above 0, 1 at most.

    It rises in a line from 1/warmup to 1 in `warmup` positions, then the schedule takes over:
    Loshchilov and Hutter, arXiv:1608.03983v5, equation 5 with eta_min = 0 and one period.
    """
    if position < warmup:
        return (position + 1) / warmup
    match schedule:
        case Schedule.CONSTANT:
            return 1.0
        case Schedule.COSINE:
            return (1 + math.cos(math.pi * (position - warmup) / (total - warmup))) / 2


def step_factor(terms: LocalTraining, step: int, steps: int) -> float:
    """Return the factor of step `step`, from 0, in a round of `steps`."""
    return factor(terms.step_schedule, terms.warmup_steps, step, steps)


def round_terms(terms: LocalTraining, applied: int, rounds: int) -> LocalTraining:
    """Return the terms as they are in the round after `applied` ones, of `rounds`."""
    position = min(applied, rounds - 1)  # a run that goes on past its end keeps the last rate
    rate = factor(terms.round_schedule, terms.warmup_rounds, position, rounds)
    return replace(terms, learning_rate=terms.learning_rate * rate)


def effective_steps(terms: LocalTraining, steps: int) -> float:
    """Return ||a||_1: how many learning rates of gradient a round of `steps` SGD steps adds up.

    Wang et al., arXiv:2007.07481v1, section 4.1: the movement is -eta sum_k a_k g_k. With momentum
    rho and factors f_k on the learning rate, the velocity at step k holds sum_{j <= k} rho^(k-j) of
    gradients, so ||a||_1 = sum_k f_k sum_{j <= k} rho^(k-j); without either it is `steps`.
    """
    velocity = total = 0.0
    for step in range(steps):
        velocity = terms.momentum * velocity + 1
        total += step_factor(terms, step, steps) * velocity
    return total
