"""`python -m reachrl`: the same command line as `reachrl`."""

from reachrl.cli.app import main

if __name__ == "__main__":
    main()
