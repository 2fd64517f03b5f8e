"""Merged models: a plan's inference graphs with what was trained folded into their weights.

Nothing of torch: graphs are rewritten with onnx, weights added up with numpy, and ONNX Runtime
compares the result with the graphs that take theta. Needs `pip install "fedloom[export]"`.
"""

from fedloom.merging.comparison import Agreement
from fedloom.merging.folders import write_merged, write_quantised

__all__ = ["Agreement", "write_merged", "write_quantised"]
