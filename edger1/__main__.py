"""`python -m edger1`: the command line."""

from edger1.cli import main

if __name__ == "__main__":
    main()
