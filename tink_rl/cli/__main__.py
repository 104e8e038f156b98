"""`python -m tink_rl.cli` is `tink-rl`."""

from tink_rl.cli import main

raise SystemExit(main())
