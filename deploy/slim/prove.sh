#!/usr/bin/env bash
# Prove the slim agent: install its wheel as devices.md says, then let three such agents join, train a sealed round and answer.
# Usage: prove.sh [FOLDER [DEMO OPTION...]]. Needs the development environment (make install) for the coordinator.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:-build/slim}")
python=${PYTHON:-.venv/bin/python}

rm -rf "$out/wheel" "$out/agent"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$out/wheel" .
"$python" -m venv --without-pip "$out/agent"
"$python" -m pip --python "$out/agent/bin/python" install --quiet --no-compile --no-deps \
    --requirement deploy/slim/requirements.txt "$out"/wheel/*.whl
"$out/agent/bin/python" deploy/slim/slim.py

# Agents see their own packages alone.
env -u PYTHONPATH "$python" -m examples.demo --agent "$out/agent/bin/fedloom-agent" --out "$out/demo" --rounds 1 "${@:2}"
echo "after a round, with the bytecode of what was loaded: $(du -sb "$out/agent/lib" | cut -f1) bytes"
