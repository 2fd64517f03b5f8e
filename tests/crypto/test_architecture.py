"""What no change may undo: who loads TenSEAL, and which bytes reach its loaders."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import crypto

SOURCES = sorted(Path(crypto.__file__).parent.rglob("*.py"))


def test_masked_and_its_protocol_run_without_tenseal():
    program = """
import sys
sys.modules["tenseal"] = sys.modules["backports.zstd"] = None  # importing them fails
import crypto, crypto.cohort, crypto.masked
crypto.protection("masked"), crypto.protection("plain")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_only_the_bridge_knows_seal():
    """No loader of SEAL or TenSEAL is named elsewhere, and no foreign object format anywhere."""
    foreign = re.compile(r"_vector_from|context_from|deserialize|pickle|\beval\(|\bexec\(")
    for source in SOURCES:
        text = source.read_text()
        assert not foreign.search(text), source
        if source.name != "bfv.py":
            assert "import tenseal" not in text, source
            assert ".load(" not in text, source


def test_no_file_and_no_function_is_too_long():
    for source in SOURCES:
        text = source.read_text()
        assert len(text.splitlines()) < 300, source
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, (source, node.name)
