"""The sandbox: what it shall be (spec), what runs it (runtime), what is mounted in it (workspace)."""
