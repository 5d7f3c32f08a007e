"""`python -m difffeat`."""

from difffeat.cli import main

if __name__ == "__main__":
    main()
