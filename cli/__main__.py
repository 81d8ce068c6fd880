"""`python -m deltakit.cli`."""

from deltakit.cli.main import main

if __name__ == "__main__":
    main(prog_name="deltakit")
