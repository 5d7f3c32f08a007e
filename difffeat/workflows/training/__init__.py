"""How the bundled weights were made: `python -m difffeat.workflows.training vae|dit|plaid|bundle`."""
