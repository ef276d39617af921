"""agent-runner: run untrusted work in a fresh container under a policy, and prove what happened."""

__version__ = "0.1.0"
