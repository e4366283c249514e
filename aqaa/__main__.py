"""`python -m aqaa` is the command `aqaa`."""

import sys


def main():
    """Run the command and return its exit code; Ctrl-C ends it quietly from the first import on."""
    try:
        from aqaa import cli

        return cli.main()
    except KeyboardInterrupt:
        print("aqaa: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
