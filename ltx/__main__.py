"""`python -m ltx`, the same as `ltx`."""

from ltx.cli import main

main()
