"""An atheris target: `python tests/fuzz/atheris_parsers.py -max_total_time=60 [corpus]`.

Coverage-guided, where `test_parsers.py` is random. It needs numpy, cryptography and atheris, and
the repository's root on the path; parsers that need TenSEAL are left to hypothesis.
"""

import sys

import atheris

with atheris.instrument_imports(include=["crypto", "parsers"]):
    from parsers import run_one

atheris.Setup(sys.argv, run_one)
atheris.Fuzz()
