"""`python -m vitedge`: the command line, where its script is not on the PATH."""

from vitedge.cli import main

if __name__ == "__main__":
    main()
