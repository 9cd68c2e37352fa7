"""`python -m lrmil` is the command line."""

from lrmil.cli import main

main()
