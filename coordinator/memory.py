"""When the coordinator looks for garbage, and when it gives freed memory back.

Python's own rule looks through everything whenever the number of objects has grown by a quarter:
with a thousand agents that takes a quarter of a second, and it falls into the middle of rounds.
Little of what is here ends in cycles. So young objects are looked at often, old ones by the clock,
and what has been looked at is not looked at again each time.
"""

import asyncio
import gc
import itertools
from typing import Final

from fedloom.memory import give_back

TIDY_SECONDS: Final = 60.0
_WHOLE_EVERY: Final = 10  # times; others look at what is new since the last
_YOUNG_OBJECTS: Final = 2_000  # more than there were before a look at them: a millisecond
_YOUNG_LOOKS: Final = 5  # before one at what they left: ten milliseconds
_NEVER: Final = 1_000_000_000


def collect_by_the_clock() -> None:
    """Keep Python from looking through old objects by itself; somebody must `keep_tidy` then."""
    gc.set_threshold(_YOUNG_OBJECTS, _YOUNG_LOOKS, _NEVER)


async def keep_tidy() -> None:
    """Collect garbage and give memory back, for ever."""
    gc.freeze()  # modules, functions, classes
    for time in itertools.count(1):
        await asyncio.sleep(TIDY_SECONDS)
        if time % _WHOLE_EVERY == 0:
            gc.unfreeze()
        gc.collect()
        gc.freeze()
        await asyncio.to_thread(give_back)
