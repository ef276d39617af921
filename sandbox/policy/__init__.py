"""What is allowed: the policy, how it is read, and every decision taken from it. No I/O but reading files."""
