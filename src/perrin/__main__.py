"""``python -m perrin``: the command line."""

from perrin.cli.main import main

raise SystemExit(main())
