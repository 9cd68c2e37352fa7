"""The command line. Thin: parse, call, print. One file per group of verbs; heavy imports happen inside the verbs."""

from lrmil.cli.app import main

__all__ = ["main"]
