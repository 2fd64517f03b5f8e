"""No arithmetic with keys or on updates on the event loop's thread, neither side's."""

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

from coordinator import candidates
from coordinator.run_state import Phase
from crypto import ciphertexts, cohort, masks, sealed
from crypto.cohort import recovery, secrets
from edge_agent import identity, run_keys, session
from edge_agent import masking as agent_masking
from tests.integration.federation import Federation
from tests.integration.test_masked import FOUR, ends, silence

STEPS: tuple[tuple[Any, str], ...] = (
    (cohort, "handle_relay"),
    (cohort, "handle_member"),
    (cohort, "repeat"),
    (cohort, "check_advertisement"),
    (cohort, "ed25519_valid"),
    (cohort.Certificate, "encode"),
    (secrets, "deal"),
    (secrets, "pair_mask"),
    (secrets.AttemptSecret, "opened"),
    (recovery, "recover"),
    (recovery, "usable"),
    (agent_masking.Masking, "masks"),
    (candidates, "check_certified"),
    (identity, "check_certified"),
    (session, "share_run_key"),
    (run_keys, "open_envelope"),
    (sealed.SealedEncoder, "encode"),
    (sealed, "open_sum"),
    (ciphertexts.CiphertextTotal, "add"),
    (ciphertexts.CiphertextTotal, "result"),
    (masks.Correction, "words"),
)


async def test_no_crypto_on_the_event_loop(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: defaultdict[str, set[int]] = defaultdict(set)

    def watched(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **more: Any) -> Any:
            threads[name].add(threading.get_ident())
            return step(*arguments, **more)

        return noted

    for place, name in STEPS:
        where = f"{place.__name__}.{name}"
        monkeypatch.setattr(place, name, watched(where, getattr(place, name)))
    agents = await federation.enrol_all(FOUR)
    silence(monkeypatch, agents[3], cohort.Certificate)  # its seed is recovered from shares
    run_id = await ends(federation, agents)
    assert federation.run(run_id).phase is Phase.COMPLETED
    expected = {f"{place.__name__}.{name}" for place, name in STEPS} - {"crypto.cohort.repeat"}
    assert threads.keys() >= expected  # each was watched at work
    loop = threading.get_ident()
    assert not {step for step, seen in threads.items() if loop in seen}
