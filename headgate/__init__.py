"""The command line and the supervisor. Imports lazily; nobody imports it."""
