"""What an update counts for that was made from an older state: s of FedBuff and FedAsync.

t is the staleness: how many rounds were applied to the state of the sum that the update comes into
and not to the one that it was made from. Xie, Koyejo, Gupta, arXiv:1903.03934, name three families;
Nguyen et al., arXiv:2106.06639, take the second with a = 1/2 in their experiments.

    constant     1
    polynomial   (t + 1)^-a
    hinge        1 while t <= b, then 1 / (a (t - b) + 1)

t is public and so is s, so a device multiplies its own update and no protection has to see it.
"""

from fedloom.terms import LocalTraining, StalenessWeighting


def staleness_factor(terms: LocalTraining, staleness: int) -> float:
    """Return s, above 0 and at most 1; `staleness` is at least 0."""
    a, late = terms.staleness_exponent, staleness - terms.staleness_threshold
    match terms.staleness_weighting:
        case StalenessWeighting.CONSTANT:
            return 1.0
        case StalenessWeighting.POLYNOMIAL:
            return float((staleness + 1) ** -a)
        case StalenessWeighting.HINGE:
            return 1.0 if late <= 0 else 1 / (a * late + 1)
