"""`python -m finetuned` is `finetuned`."""

from finetuned.cli import main

main()
