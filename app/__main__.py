"""`python -m app` is the command `kdpo`."""

from app.cli import main

main()
