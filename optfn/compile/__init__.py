"""optfn.compile: a pure step made fast, its buffers donated."""

from optfn.compile.step import compile

__all__ = ["compile"]
