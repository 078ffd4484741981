"""`python -m headgate`."""

from headgate.main import main

raise SystemExit(main())
