"""`python -m jqopt`: the command line without the installed script."""

from jqopt.cli import main

if __name__ == "__main__":
    main()
