"""`python -m difffeat.cli`."""

from difffeat.cli import main

main()
