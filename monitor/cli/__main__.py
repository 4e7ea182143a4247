"""`python -m monitor.cli`."""

from monitor.cli.command import main

main()
