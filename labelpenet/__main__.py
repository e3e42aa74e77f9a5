"""``python -m labelpenet``."""

from labelpenet.cli import main

main()
