"""Show whether a policy holds in the container it asks for, and what this host can enforce."""
