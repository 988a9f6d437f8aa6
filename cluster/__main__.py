"""Entry point of the `diptych` command; Ctrl-C prints one line even while the command is being imported."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from cluster.cli.main import main as run  # Takes a second.
    except KeyboardInterrupt:
        print("diptych: interrupted before it began", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
