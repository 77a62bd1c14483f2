"""``python -m anyquant``: the command line."""

from anyquant.cli import main

main()
