"""Show that the sandbox holds: probes derived from a policy, run inside, each with its control."""
