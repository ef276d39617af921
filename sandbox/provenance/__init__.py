"""What happened, so that it can be proven: the hash-chained ledger, the sealed statement, the index."""
