"""The subcommands of `rpa`."""
